// What forward and backward share: loops over tasks and tiles, and the sums over tasks.
#pragma once
#include "medssm/scratch.h"
#include "problem.h"
#include "tile.h"

namespace medssm {
namespace {

template <class T> void clear(T* data, int64_t count) { std::memset(data, 0, static_cast<std::size_t>(count) * sizeof(T)); }

// Scratch memory, set to zero. The rows of a tile after its last token are read, but their results are not used: they must be valid numbers.
template <class T> class Tiles {
 public:
  explicit Tiles(int64_t count) : scratch_(count) { clear(scratch_.data(), count); }
  T* data() const { return scratch_.data(); }

 private:
  const Scratch<T> scratch_;
};

// body(task) for this thread's share of the tasks.
template <class Body> void each_task(const Cut& cut, const Team& team, const Body& body) {
  const Range mine = share(cut.tasks(), team);
  for (int64_t i = mine.begin; i < mine.end; ++i) body(cut[i]);
}
// body(tile) for each tile of a task, in raster order.
template <class Body> void each_tile(const Task& task, const Body& body) {
  for (int64_t begin = task.begin; begin < task.end; begin += kTokens) body(Tile{begin, least(kTokens, task.end - begin), false, nullptr, begin, 1});
}

// Asks for 2 MiB pages for a large output.
inline __attribute__((unused)) void prefer_huge_pages(const Problem& p, const Tokens& t) {
  medssm::prefer_huge_pages(t.data, p.batch * t.stride[0] * (t.type == kFloat64 ? 8 : t.type == kFloat32 ? 4 : 2));
}

// Copies the dense sums of one group of one batch element to padded ones. Null counts as zeros.
template <class T> void pad(const Plan<T>& plan, int64_t item, const T* kv, const T* z, T* total) {
  clear(total, plan.sums);
  for (int64_t r = 0; kv && r < plan.dk; ++r)
    std::memcpy(total + r * plan.dv_padded, kv + (item * plan.dk + r) * plan.dv, static_cast<std::size_t>(plan.dv) * sizeof(T));
  if (z) std::memcpy(total + plan.dk_padded * plan.dv_padded, z + item * plan.dk, static_cast<std::size_t>(plan.dk) * sizeof(T));
}

// Copies padded sums to dense ones.
template <class T> void unpad(const Plan<T>& plan, int64_t item, const T* total, T* kv, T* z) {
  for (int64_t r = 0; r < plan.dk; ++r)
    std::memcpy(kv + (item * plan.dk + r) * plan.dv, total + r * plan.dv_padded, static_cast<std::size_t>(plan.dv) * sizeof(T));
  std::memcpy(z + item * plan.dk, total + plan.dk_padded * plan.dv_padded, static_cast<std::size_t>(plan.dk) * sizeof(T));
}

// Adds the sums of all segments of one group of one batch element to `before`, in the order of the segments. Writes the result to `totals`, padded,
// and to kv and z, dense.
template <class T> void reduce(const Plan<T>& plan, const Problem& p, int64_t item, const T* parts, int64_t shares, const T* before_kv,
                               const T* before_z, T* totals, T* kv, T* z) {
  T* total = totals + item * plan.sums;
  pad(plan, item, before_kv, before_z, total);
  const T* first = parts + (item / p.groups * shares * p.groups + item % p.groups) * plan.sums;
  for (int64_t i = 0; i < plan.sums; i += kLanes<T>) {
    Vec<T> sum = load<T>(total + i);
    for (int64_t s = 0; s < shares; ++s) sum += load<T>(first + s * p.groups * plan.sums + i);
    store(total + i, sum);
  }
  unpad(plan, item, total, kv, z);
}

// Where a task stores its sums for its group g.
template <class T> T* part(const Plan<T>& plan, const Problem& p, const Cut& cut, const Task& task, int64_t g, T* parts) {
  return parts + ((task.n * cut.shares() + task.share) * p.groups + g) * plan.sums;
}

// Adds R k' v^T and k' of a tile to the sums of one group. k (which holds k' = f(k)) and v: the tile's rows; rotated: scratch memory for a tile of k.
template <class T>
void add_tile(const Plan<T>& plan, const Problem& p, const Tile& tile, int64_t group, const T* k, const T* v, T* rotated, T* sums) {
  add_rows<T>(k, nullptr, plan.dk_padded, tile.count, sums + plan.dk_padded * plan.dv_padded);
  if (p.cos.data) {
    rotate(p, false, tile, group, k, rotated);
    k = rotated;
  }
  add_products(k, plan.dk_padded, v, plan.dv_padded, plan.dv_padded, tile.count, sums);
}

// For the tokens of a tile: inverse = 1 / (q' . z + eps), or 1 without normalization, and scaled = inverse * scale. Before invert(), inverse holds
// q' . z.
template <class T> struct Weights {
  alignas(64) T inverse[kTokens] = {}, scaled[kTokens];

  void invert(const Problem& p) {
    const Vec<T> one = splat(static_cast<T>(1)), scale = splat(static_cast<T>(p.scale)), eps = splat(static_cast<T>(p.eps));
    for (int64_t t = 0; t < kTokens; t += kLanes<T>) {
      const Vec<T> own = p.normalize ? one / (load<T>(inverse + t) + eps) : one;
      store(inverse + t, own);
      store(scaled + t, own * scale);
    }
  }

  // Converts dots from numerator . dout to the gradient of q' . z. This follows from o = scale numerator / (q' . z + eps).
  void slope(T* dots) const {
    for (int64_t t = 0; t < kTokens; t += kLanes<T>) store(dots + t, -load<T>(dots + t) * load<T>(scaled + t) * load<T>(inverse + t));
  }
};

// Calls f(put), which writes one head's rows of a tile to `out`, `width` channels each: put(t, c, v) writes the vector that begins at channel c.
template <class T, class F>
MEDSSM_INLINE void write_rows(const Problem& p, const Tokens& out, int64_t n, const Tile& tile, int64_t head, int64_t width, const F& f) {
  with_storage(out.type, out.data, [&](auto* data) {
    const bool stream = streams<T>(data, p.batch * out.stride[0], width);
    data += n * out.stride[0] + head * out.stride[2];
    f([&](int64_t t, int64_t c, Vec<T> o)
          __attribute__((always_inline)) { write_part<T>(data + tile.token(t) * out.stride[1], c, width, o, stream); });
  });
}

// Writes f'(x_t) gradient_t for one head's tokens. f: the values f(x).
template <class T> void write_gradient(const Plan<T>& plan, const Problem& p, const Tokens& out, int64_t n, const Tile& tile, int64_t head,
                                       const T* f, const T* gradient) {
  with_feature(p.feature_map, [&](auto chosen) {
    constexpr int64_t kMap = decltype(chosen)::value;
    write_rows<T>(p, out, n, tile, head, plan.dk, [&](const auto& put) {
      for (int64_t t = 0; t < tile.count; ++t)
        for (int64_t c = 0; c < plan.dk; c += kLanes<T>) {
          const int64_t at = t * plan.dk_padded + c;
          put(t, c, load<T>(gradient + at) * slope<kMap, T>(load<T>(f + at)));
        }
    });
  });
}

}  // namespace
}  // namespace medssm
