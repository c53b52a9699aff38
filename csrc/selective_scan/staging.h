// Reads tiles of tokens from tensors of any type and strides into contiguous rows of the compute type, small enough for the cache, and writes them
// back. If a tensor's rows already have the compute type and adjacent elements, they are used without a copy.
#pragma once
#include "medssm/shuffle.h"
#include "problem.h"

namespace medssm {
namespace {

// Row t of a tile is at rows + t * step.
template <class T> struct View {
  const T* rows;
  int64_t step;
  MEDSSM_INLINE const T* operator[](int64_t t) const { return rows + t * step; }
};

// Copies one vector of elements per token. Only the first `lanes` elements exist; the other lanes become zero.
template <class T, class S> void stage_lanes(const S* data, int64_t token, int64_t element, int lanes, const Tile& tile, T* out, int64_t out_step) {
  constexpr int W = kLanes<T>;
  if (element == 1 || lanes == 1) {
    if (lanes == W)
      for (int64_t t = 0; t < tile.count; ++t) store(out + t * out_step, load<T>(data + tile.token(t) * token));
    else
      for (int64_t t = 0; t < tile.count; ++t) store(out + t * out_step, load_part<T>(data + tile.token(t) * token, lanes));
  } else if (token == 1 && !tile.index) {
    // The tensor has tokens adjacent, not channels: W x W squares of tokens and channels are transposed in registers.
    const S* low = data + (tile.direction > 0 ? tile.first : tile.first - tile.count + 1);  // the tile's first token in memory
    for (int64_t t = 0; t < tile.count; t += W) {
      const int count = static_cast<int>(least<int64_t>(W, tile.count - t));
      Vec<T> square[W];
      for (int c = 0; c < W; ++c) {
        const S* row = low + c * element + t;
        square[c] = c >= lanes ? Vec<T>{} : count == W ? load<T>(row) : load_part<T>(row, count);
      }
      transpose<T>(square);
      for (int i = 0; i < count; ++i) store(out + (tile.direction > 0 ? t + i : tile.count - 1 - t - i) * out_step, square[i]);
    }
  } else {
    for (int64_t t = 0; t < tile.count; ++t) {
      const S* from = data + tile.token(t) * token;
      T* to = out + t * out_step;
      for (int c = 0; c < W; ++c) to[c] = c < lanes ? to_compute<T>(from[c * element]) : T(0);
    }
  }
}

// Copies rows of any number of elements. out_step is a multiple of kLanes<T>.
template <class T> void stage(const void* data, int64_t type, int64_t offset, int64_t token, int64_t element, int64_t elements, const Tile& tile,
                              T* out, int64_t out_step) {
  with_storage(type, data, [&](const auto* typed) {
    for (int64_t e = 0; e < elements; e += kLanes<T>) {
      const int lanes = static_cast<int>(least<int64_t>(kLanes<T>, elements - e));
      stage_lanes<T>(typed + offset + e * element, token, element, lanes, tile, out + e, out_step);
    }
  });
}

template <class T> constexpr int64_t kType = sizeof(T) == 8 ? kFloat64 : kFloat32;

// The channels of a block in a tile of u, delta, z or dout: in place if possible, otherwise copied to `buffer`.
template <class T> View<T> block_view(const Tokens& x, const Block& block, const Tile& tile, T* buffer) {
  const int64_t offset = x.batch * block.batch + x.channel * block.channel;
  if (x.type == kType<T> && x.channel == 1 && block.lanes == kLanes<T> && !tile.index)
    return {static_cast<const T*>(x.data) + offset + tile.first * x.token, tile.direction * x.token};
  stage<T>(x.data, x.type, offset, x.token, x.channel, block.lanes, tile, buffer, kLanes<T>);
  return {buffer, kLanes<T>};
}

// The rows of a tile that are the same for every lane: n values of B or C, or r values of the low-rank delta.
template <class T> View<T> row_view(const Rows& x, int64_t batch, int64_t group, int64_t elements, const Tile& tile, T* buffer) {
  const int64_t offset = x.batch * batch + x.group * group, step = round_up(elements, kLanes<T>);
  if (x.type == kType<T> && (x.state == 1 || elements == 1) && !tile.index)
    return {static_cast<const T*>(x.data) + offset + tile.first * x.token, tile.direction * x.token};
  stage<T>(x.data, x.type, offset, x.token, x.state, elements, tile, buffer, step);
  return {buffer, step};
}

// The cache lines that the next tile of a block reads or writes. A few are requested at each step of the tile before it. The hardware prefetcher
// does not find them, because tokens are far apart in memory and a walk may visit them in any order. Requesting all of them at once would overflow
// the queue of outstanding loads.
class Prefetch {
 public:
  explicit Prefetch(const Tile& next) : next_(next) {}

  // Does nothing if data is null, or if channels are not adjacent: then a step's channels are not in one cache line.
  void add(const void* data, int64_t type, int64_t batch, int64_t token, int64_t channel, const Block& block) {
    if (!data || channel != 1 || count_ == kMost) return;
    const int64_t size = element_size(type);
    lines_[count_++] = {static_cast<const char*>(data) + (batch * block.batch + block.channel) * size, token * size};
  }
  void add(const Tokens& x, const Block& block) { add(x.data, x.type, x.batch, x.token, x.channel, block); }
  void add(const Output& x, const Block& block) { add(x.data, x.type, x.batch, x.token, 1, block); }

  // Share number `part` when the lines are divided into `parts` shares.
  Prefetch share(int64_t part, int64_t parts) const {
    Prefetch some(next_);
    for (int64_t i = part * count_ / parts; i < (part + 1) * count_ / parts; ++i) some.lines_[some.count_++] = lines_[i];
    return some;
  }

  MEDSSM_INLINE void request(int64_t t) const {
    if (t >= next_.count) return;
    for (int i = 0; i < count_; ++i) __builtin_prefetch(lines_[i].base + next_.token(t) * lines_[i].step);
  }

 private:
  static constexpr int kMost = 8;
  struct Line {
    const char* base;
    int64_t step;
  };
  Tile next_;
  Line lines_[kMost];
  int count_ = 0;
};

// The offset of the block's channels at step t of a tile.
MEDSSM_INLINE int64_t offset(const Output& out, const Block& block, const Tile& tile, int64_t t) {
  return out.batch * block.batch + tile.token(t) * out.token + block.channel;
}

// Writes the vector value(t) for each step t of the tile.
template <class T, class F> MEDSSM_INLINE void write(const Output& out, const Block& block, const Tile& tile, F value) {
  with_storage(out.type, out.data, [&](auto* data) {
    auto* const base = data + out.batch * block.batch + block.channel;
    if (block.lanes == kLanes<T> && !tile.index) {
      auto* to = base + tile.first * out.token;
      const int64_t step = tile.direction * out.token;
      for (int64_t t = 0; t < tile.count; ++t, to += step) store(to, value(t));
    } else {
      for (int64_t t = 0; t < tile.count; ++t) store_part(base + tile.token(t) * out.token, value(t), block.lanes);
    }
  });
}

// The values of out.earlier (the sum over the scan orders computed before) at step t of the tile.
template <class T> MEDSSM_INLINE Vec<T> earlier(const Output& out, const Block& block, const Tile& tile, int64_t t) {
  return load_part<T>(static_cast<const T*>(out.earlier) + offset(out, block, tile, t), block.lanes);
}

// load_weights reads weights (d, n) or states (b, d, n) as [n][lane]. store_weights writes columns [low, high) back. `item` is the row of the first
// channel.
template <class T> void load_weights(const void* data, int64_t item, int lanes, int64_t columns, T* out) {
  const Tile columns_as_steps{0, columns, false, nullptr, 0, 1};
  stage_lanes<T>(static_cast<const T*>(data) + item * columns, 1, columns, lanes, columns_as_steps, out, kLanes<T>);
}
template <class T> void store_weights(const T* rows, void* data, int64_t item, int lanes, int64_t columns, int64_t low, int64_t high) {
  T* out = static_cast<T*>(data) + item * columns;
  for (int c = 0; c < lanes; ++c)
    for (int64_t n = low; n < high; ++n) out[c * columns + n] = rows[n * kLanes<T> + c];
}

}  // namespace
}  // namespace medssm
