// Depthwise convolution of volumes (b, z, y, x, d), channels adjacent, with zero padding so that the output has the same size. Images have z = 1,
// sequences have z = y = 1.
//
// A task computes a box of outputs for some vectors of channels, one plane after the other. It keeps the input planes that the taps need in a ring
// buffer of scratch memory. There, each channel vector has contiguous rows in the compute type, with zeros outside the volume. So a value is
// converted only once per box, strides of a power of two cause no cache conflicts, and the register tile needs no code for edges, strides or storage
// types.
//
// Backward: one pass computes g = dout act'(pre), where pre is recomputed, and dweight = sum_p x_{p+o} g_p. Then dx is the convolution of g with the
// mirrored taps. Each box computes its own share of dweight. The shares are added in a fixed order, in double precision. Boxes depend only on the
// shapes, so any number of threads gives the same bits.
#include "medssm/abi.h"
#include "medssm/activation.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"
#include "medssm/simd.h"
#include "medssm/stream.h"
#include "medssm/taps.h"
#include "tile.h"

using namespace medssm;

namespace {

// kernels/depthwise_conv/native.py packs these structs. Axes are in the order z, y, x. Strides are in elements.
struct Problem {
  const void* x;
  int64_t x_type, x_stride[4];  // of batch, z, y, x; channels are adjacent
  int64_t batch, size[3];
  Taps taps;
  int64_t silu, wide, threads;  // wide: compute in double
};
struct Forward {
  Problem problem;
  void* out;  // contiguous, in x's type
};
struct Backward {
  Problem problem;
  const void* dout;  // x's type
  int64_t dout_stride[4];
  void *dx, *dweight, *dbias;  // contiguous, in the types of x, weight and bias; dbias is null if there is no bias
  void* inner;                 // g, contiguous, in the compute type; null if there is no activation: then g is dout
};

// Divides `total` into the smallest number of equal parts with at most `limit` each. Returns the size of a part, rounded up to a multiple of `unit`.
inline int64_t part(int64_t total, int64_t limit, int64_t unit) { return ceil_div(ceil_div(total, ceil_div(total, limit)), unit) * unit; }

// A (b, z, y, x, d) tensor with adjacent channels.
template <class S> struct Volume {
  const S* data;
  int64_t stride[4];

  Volume(const S* data, const int64_t (&s)[4]) : data(data), stride{s[0], s[1], s[2], s[3]} {}
  // The first token of a row.
  const S* row(int64_t n, int64_t z, int64_t y) const { return data + n * stride[0] + z * stride[1] + y * stride[2]; }
};
// `data` as a pointer to the type of the first argument.
template <class S> const S* same_type(const S*, const void* data) { return static_cast<const S*>(data); }
template <class S> S* same_type(const S*, void* data) { return static_cast<S*>(data); }

// The outputs of one task: the channel vectors [first, first + count) of the positions [from, to) of image n. share: index of its partial sum of
// gradients.
struct Box {
  int64_t n, first, count, from[3], to[3], share;
};

// How the work is divided into boxes.
template <class T> struct Plan {
  static constexpr int W = kLanes<T>;
  int64_t size[3], channels, elements, side[3], half[3];  // sizes of x, and of the kernel
  int64_t vectors, packed;                                // number of channel vectors; elements of the taps and the bias of one vector
  int64_t box[3], box_vectors;                            // size of a box; its channel vectors
  int64_t boxes[3], groups, shares;  // number of boxes along each axis, over the channels, and per channel vector (each has its own partial sum)
  int64_t row, plane, ring;          // elements of scratch memory for one channel vector: a row, a plane, all planes

  explicit Plan(const Problem& p) :
      channels(p.taps.channels), elements(p.batch * channels), vectors(p.taps.vectors<T>()), packed(p.taps.packed<T>()), shares(p.batch) {
    for (int i = 0; i < 3; ++i) {
      size[i] = p.size[i];
      side[i] = p.taps.side[i];
      half[i] = side[i] / 2;
      elements *= size[i];
    }
    // Boxes are large enough that few positions are copied for two boxes, and small enough that the ring stays in the second-level cache.
    constexpr int64_t kRing = 512 << 10;
    box[0] = part(size[0], 16, 1);
    const bool volume = size[0] > 1, image = size[1] > 1;
    box[1] = part(size[1], volume ? 8 : 16, rows());
    box[2] = part(size[2], volume ? 32 : image ? 64 : 512, kColumns);
    row = (box[2] + side[2] - 1) * W;
    plane = (box[1] + side[1] - 1) * row;
    ring = side[0] * plane;
    box_vectors = part(vectors, most<int64_t>(1, least<int64_t>(8, kRing / (ring * sizeof(T)))), 1);
    groups = ceil_div(vectors, box_vectors);
    for (int i = 0; i < 3; ++i) shares *= boxes[i] = ceil_div(size[i], box[i]);
  }
  int64_t rows() const { return size[1] == 1 ? 1 : kRows; }  // rows of outputs in a register tile
  int64_t tasks() const { return shares * groups; }
  bool whole(int64_t v) const { return (v + 1) * W <= channels; }
  int tail() const { return static_cast<int>(channels % W); }  // channels in the last vector, if it is not full

  Box task(int64_t i) const {
    Box b;
    b.share = i / groups;
    b.first = i % groups * box_vectors;
    b.count = least(box_vectors, vectors - b.first);
    int64_t rest = b.share;
    for (int axis = 2; axis >= 0; --axis) {
      b.from[axis] = rest % boxes[axis] * box[axis];
      b.to[axis] = least(size[axis], b.from[axis] + box[axis]);
      rest /= boxes[axis];
    }
    b.n = rest;
    return b;
  }
};

// Copies the rows of input plane z that a box needs to the ring, with zeros for positions outside the volume.
template <class T, class S> void stage(const Plan<T>& plan, const Volume<S>& x, const Box& box, int64_t z, T* ring) {
  constexpr int W = kLanes<T>;
  const int64_t top = box.from[1] - plan.half[1], left = box.from[2] - plan.half[2], width = plan.row / W;
  const int64_t begin = most<int64_t>(0, -left), end = least(width, plan.size[2] - left);
  const int64_t whole = plan.whole(box.first + box.count - 1) ? box.count : box.count - 1;
  for (int64_t y = most<int64_t>(0, top); y < least(plan.size[1], top + plan.plane / plan.row); ++y) {
    T* row = ring + z % plan.side[0] * plan.plane + (y - top) * plan.row;
    for (int64_t v = 0; v < box.count; ++v) {
      for (int64_t i = 0; i < begin; ++i) store(row + v * plan.ring + i * W, Vec<T>{});
      for (int64_t i = end; i < width; ++i) store(row + v * plan.ring + i * W, Vec<T>{});
    }
    const S* token = x.row(box.n, z, y) + (left + begin) * x.stride[3] + box.first * W;
    for (int64_t i = begin; i < end; ++i, token += x.stride[3]) {
      for (int64_t v = 0; v < whole; ++v) {
        store(row + v * plan.ring + i * W, load<T>(token + v * W));
        __builtin_prefetch(token + x.stride[1] + v * W, 0, 2);  // the same row of the next plane, which is copied after this plane has been used
      }
      if (whole < box.count) store(row + whole * plan.ring + i * W, load_part<T>(token + whole * W, plan.tail()));
    }
  }
}

// Walks the planes of a box and keeps its input in the ring. Calls tile(source, v, z, y, x) for each register tile of channel vector v, whose first
// output is at (z, y, x).
template <class T, class S, class F> void walk(const Plan<T>& plan, const Volume<S>& x, const Box& box, T* ring, const T** planes, const F& tile) {
  const int64_t depth = plan.size[0], half = plan.half[0];
  for (int64_t z = most<int64_t>(0, box.from[0] - half); z < least(depth, box.from[0] + half); ++z) stage(plan, x, box, z, ring);
  for (int64_t z = box.from[0]; z < box.to[0]; ++z) {
    if (z + half < depth) stage(plan, x, box, z + half, ring);
    for (int64_t v = 0; v < box.count; ++v) {
      for (int64_t k = 0; k < plan.side[0]; ++k) {
        const int64_t from = z + k - half;
        planes[k] = from < 0 || from >= depth ? nullptr : ring + v * plan.ring + from % plan.side[0] * plan.plane;
      }
      for (int64_t y = box.from[1]; y < box.to[1]; y += plan.rows())
        for (int64_t column = box.from[2]; column < box.to[2]; column += kColumns) {
          const Source<T> source = {planes,
                                    (y - box.from[1]) * plan.row + (column - box.from[2]) * kLanes<T>,
                                    plan.row,
                                    plan.side[0],
                                    plan.side[1],
                                    plan.side[2],
                                    most<int64_t>(0, plan.half[1] - y),
                                    plan.size[1] + plan.half[1] - y};
          tile(source, box.first + v, z, y, column);
        }
    }
  }
}

// Runs body(box, ring, planes) for every task.
template <class T, class Body> void each_box(const Plan<T>& plan, int64_t threads, const Body& body) {
  struct Own {
    Scratch<T> ring;
    Scratch<const T*> planes;
  };
  threads = threads_for(threads, plan.tasks(), plan.elements);
  const PerThread<Own> own(threads, [&] { return Own{Scratch<T>(plan.box_vectors * plan.ring), Scratch<const T*>(plan.side[0])}; });
  parallel(threads, [&](const Team& team) {
    const auto& [ring, planes] = own[team.rank];
    const Range mine = share(plan.tasks(), team);
    for (int64_t i = mine.begin; i < mine.end; ++i) body(plan.task(i), ring.data(), planes.data());
    finish_streaming();
  });
}

// Calls f(i, y, x, at) for the outputs of a tile that are inside the box. i: index in the tile. at: offset of channel vector v in a contiguous
// tensor.
template <class T, class F>
MEDSSM_INLINE void each_output(const Plan<T>& plan, const Box& box, int64_t v, int64_t z, int64_t y, int64_t x, const F& f) {
  const int64_t rows = least(plan.rows(), box.to[1] - y), columns = least<int64_t>(kColumns, box.to[2] - x);
  for (int64_t o = 0; o < rows; ++o) {
    const int64_t first = (((box.n * plan.size[0] + z) * plan.size[1] + y + o) * plan.size[2] + x) * plan.channels + v * kLanes<T>;
    for (int64_t t = 0; t < columns; ++t) f(o * kColumns + t, y + o, x + t, first + t * plan.channels);
  }
}

// Writes act(pre) of a tile to a contiguous tensor.
template <class T, class S>
void finish(const Plan<T>& plan, const Box& box, int64_t v, int64_t z, int64_t y, int64_t x, const Vec<T>* pre, bool activate, bool stream, S* out) {
  const bool whole = plan.whole(v);
  each_output(plan, box, v, z, y, x, [&](int64_t i, int64_t, int64_t, int64_t at) __attribute__((always_inline)) {
    const Vec<T> value = activate ? silu<T>(pre[i]) : pre[i];
    if (whole)
      write(out + at, value, stream);
    else
      store_part(out + at, value, plan.tail());
  });
}

// Computes g = dout act'(pre) of a tile and writes it to `inner`. g is zero outside the box. If there is no activation, pre and inner are null and g
// is dout.
template <class T, class S> void differentiate(const Plan<T>& plan, const Box& box, int64_t v, int64_t z, int64_t y, int64_t x, const Vec<T>* pre,
                                               const Volume<S>& dout, T* inner, bool stream, Vec<T>* g) {
  const bool whole = plan.whole(v);
  for (int i = 0; i < kRows * kColumns; ++i) g[i] = Vec<T>{};
  each_output(plan, box, v, z, y, x, [&](int64_t i, int64_t row, int64_t column, int64_t at) __attribute__((always_inline)) {
    const S* source = dout.row(box.n, z, row) + column * dout.stride[3] + v * kLanes<T>;
    g[i] = whole ? load<T>(source) : load_part<T>(source, plan.tail());
    __builtin_prefetch(source + dout.stride[1], 0, 2);  // the same position in the next plane
    if (!pre) return;
    g[i] *= silu_slope<T>(pre[i]);
    if (whole)
      write(inner + at, g[i], stream);
    else
      store_part(inner + at, g[i], plan.tail());
  });
}

// The register tile's functions for a plan: unrolled for kernel sides 3, 5 and 7.
template <class T> struct Tile {
  void (*convolve)(const Source<T>&, const T*, Vec<T>*);
  void (*correlate)(const Source<T>&, const Vec<T>*, T*);

  explicit Tile(const Plan<T>& plan) {
    switch (plan.side[2]) {
      case 3:
        choose<3>(plan.rows());
        break;
      case 5:
        choose<5>(plan.rows());
        break;
      case 7:
        choose<7>(plan.rows());
        break;
      default:
        choose<0>(plan.rows());
    }
  }
  template <int kSide> void choose(int64_t rows) {
    convolve = rows == 1 ? &medssm::convolve<T, kSide, 1> : &medssm::convolve<T, kSide, kRows>;
    correlate = rows == 1 ? &medssm::correlate<T, kSide, 1> : &medssm::correlate<T, kSide, kRows>;
  }
};

// out = act(taps * x), contiguous.
template <class T, class In, class Out>
void convolution(const Plan<T>& plan, const Problem& p, const Volume<In>& x, const T* taps, bool activate, Out* out) {
  const Tile<T> tile(plan);
  const bool stream = streams<T>(out, plan.elements, plan.channels);
  prefer_huge_pages(out, plan.elements * static_cast<int64_t>(sizeof(Out)));
  each_box(plan, p.threads, [&](const Box& box, T* ring, const T** planes) {
    walk(plan, x, box, ring, planes, [&](const Source<T>& source, int64_t v, int64_t z, int64_t y, int64_t column) {
      Vec<T> pre[kRows * kColumns];
      tile.convolve(source, taps + v * plan.packed, pre);
      finish(plan, box, v, z, y, column, pre, activate, stream, out);
    });
  });
}

template <class T> void forward(const Forward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Scratch<T> taps(plan.vectors * plan.packed);
  pack(p.taps, false, taps.data());
  with_storage(p.x_type, p.x, [&](const auto* x) { convolution(plan, p, Volume(x, p.x_stride), taps.data(), p.silu, same_type(x, a.out)); });
}

// Writes g to `inner`, and each box's share of the gradients of the taps and the bias to `sums`, packed like the taps.
template <class T, class S>
void accumulate(const Plan<T>& plan, const Problem& p, const Volume<S>& x, const Volume<S>& dout, const T* taps, T* inner, T* sums) {
  const Tile<T> tile(plan);
  const bool stream = streams<T>(inner, plan.elements, plan.channels);
  each_box(plan, p.threads, [&](const Box& box, T* ring, const T** planes) {
    T* own = sums + box.share * plan.vectors * plan.packed;
    std::memset(own + box.first * plan.packed, 0, static_cast<std::size_t>(box.count * plan.packed) * sizeof(T));
    walk(plan, x, box, ring, planes, [&](const Source<T>& source, int64_t v, int64_t z, int64_t y, int64_t column) {
      Vec<T> pre[kRows * kColumns], g[kRows * kColumns];
      if (inner) tile.convolve(source, taps + v * plan.packed, pre);
      differentiate(plan, box, v, z, y, column, inner ? pre : nullptr, dout, inner, stream, g);
      tile.correlate(source, g, own + v * plan.packed);
    });
  });
}

template <class T> void backward(const Backward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Scratch<T> taps(plan.vectors * plan.packed), sums(plan.shares * plan.vectors * plan.packed);
  T* inner = static_cast<T*>(a.inner);
  if (inner) prefer_huge_pages(inner, plan.elements * static_cast<int64_t>(sizeof(T)));
  pack(p.taps, false, taps.data());
  with_storage(p.x_type, p.x, [&](const auto* x) {
    const Volume dout(same_type(x, a.dout), a.dout_stride);
    accumulate(plan, p, Volume(x, p.x_stride), dout, taps.data(), inner, sums.data());
    reduce(p.taps, sums.data(), plan.shares, a.dweight, a.dbias, p.threads);
    pack(p.taps, true, taps.data());
    auto* dx = same_type(x, a.dx);
    if (inner) {
      const int64_t row = plan.size[2] * plan.channels, plane = plan.size[1] * row;
      const int64_t dense[4] = {plan.size[0] * plane, plane, row, plan.channels};
      convolution(plan, p, Volume<T>(inner, dense), taps.data(), false, dx);
    } else {
      convolution(plan, p, dout, taps.data(), false, dx);
    }
  });
}

}  // namespace

MEDSSM_EXPORT(depthwise_conv_forward, Forward) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
MEDSSM_EXPORT(depthwise_conv_backward, Backward) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
