// The tokens of a block as rows of the compute type, and the scalars (beta, g) of these tokens.
#pragma once
#include <stdexcept>

#include "arguments.h"
#include "medssm/math.h"
#include "medssm/scratch.h"

namespace medssm {
namespace {

constexpr int kBlock = 4;  // tokens that one sweep over the state processes together

// `count` tokens of the walk, in the order of the pass. If count < kBlock, the other rows are zero.
struct Block {
  int count;
  int64_t step[kBlock], token[kBlock];
};

// Calls f(block) for the blocks of a tile, forward or from its end.
template <class F> void each_block(const Tile& tile, bool forward, const F& f) {
  for (int64_t t = 0; t < tile.count; t += kBlock) {
    Block block{static_cast<int>(least<int64_t>(kBlock, tile.count - t)), {}, {}};
    for (int j = 0; j < block.count; ++j) {
      const int64_t at = forward ? t + j : tile.count - 1 - t - j;
      block.step[j] = tile.from + at;
      block.token[j] = tile.token(at);
    }
    f(block);
  }
}

// The cache lines that the block after the next one will read. The sweeps of a block request them evenly spread over their rows. The hardware
// prefetcher does not find them, because tokens are far apart in memory and a walk may visit them in any order. Requesting many at once would
// overflow the queue of outstanding loads.
class Prefetch {
 public:
  void add(const char* line) {
    if (count_ < kMost) lines_[count_++] = line;
  }
  int64_t count() const { return count_; }
  // Requests lines [begin, end), or those of them that there are.
  MEDSSM_INLINE void request(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < least(end, count_); ++i) __builtin_prefetch(lines_[i]);
  }

 private:
  static constexpr int kMost = 96;
  const char* lines_[kMost];
  int64_t count_ = 0;
};

// Scratch memory that is used again for each item. `clear` frees all of it.
template <class T> class Workspace {
 public:
  explicit Workspace(int64_t size) : scratch_(size), size_(size) {}
  void clear() { used_ = 0; }
  T* allocate(int64_t count) {
    T* const taken = scratch_.data() + used_;
    used_ += round_up(count, kLanes<T>);
    if (used_ > size_) throw std::length_error("a pass takes more memory than was set aside for it");
    return taken;
  }

 private:
  const Scratch<T> scratch_;
  const int64_t size_;
  int64_t used_ = 0;
};

// Features [first, first + count) of one head's tokens: in place if the tensor has the compute type, otherwise copies.
template <class T> class Rows {
 public:
  // The largest amount of memory that rows of `count` features need.
  static int64_t size(int64_t count) { return (kBlock + 1) * round_up(count, kLanes<T>); }

  Rows(const Tokens& x, const Item& item, int64_t first, int64_t count, Workspace<T>& memory) :
      x_(x),
      offset_(x.batch * item.batch + x.head * item.head + first),
      count_(count),
      step_(round_up(count, kLanes<T>)),
      in_place_(x.type == (sizeof(T) == 8 ? kFloat64 : kFloat32)),
      copies_(memory.allocate((in_place_ ? 1 : kBlock + 1) * step_)) {
    for (int64_t i = 0; i < step_; ++i) copies_[i] = T(0);
  }

  // Adds a token's cache lines to `lines`.
  void prefetch(int64_t token, Prefetch& lines) const {
    const int64_t size = element_size(x_.type);
    const char* line = static_cast<const char*>(x_.data) + (offset_ + token * x_.token) * size;
    for (int64_t i = 0; i < count_ * size; i += 64) lines.add(line + i);
  }

  // Valid until the next call.
  const T* const* of(const Block& block) {
    for (int j = 0; j < kBlock; ++j) rows_[j] = j < block.count ? row(block.token[j], j) : copies_;
    return rows_;
  }

 private:
  const T* row(int64_t token, int j) {
    const int64_t at = offset_ + token * x_.token;
    if (in_place_) return static_cast<const T*>(x_.data) + at;
    T* copy = copies_ + (j + 1) * step_;
    with_storage(x_.type, x_.data, [&](const auto* data) {
      for (int64_t i = 0; i < count_; i += kLanes<T>)
        store(copy + i, load_part<T>(data + at + i, static_cast<int>(least<int64_t>(kLanes<T>, count_ - i))));
    });
    return copy;
  }

  const Tokens x_;
  const int64_t offset_, count_, step_;
  const bool in_place_;
  T* const copies_;  // the first row is zero
  const T* rows_[kBlock];
};

// The cache lines of `rows` that the block after the next one will read.
template <class... R> Prefetch prefetch(const Walk& walk, int64_t length, const Block& block, bool forward, const R&... rows) {
  Prefetch lines;
  for (int64_t j = 2 * kBlock; j < 3 * kBlock; ++j) {
    const int64_t step = forward ? block.step[0] + j : block.step[0] - j;
    if (step < 0 || step >= length) break;
    const int64_t token = walk.steps(step, step + 1).token(0);
    (rows.prefetch(token, lines), ...);
  }
  return lines;
}

// beta or g of a block's tokens; `absent` for tokens that do not exist.
template <class T> void scalars(const Scalars& x, const Item& item, const Block& block, T absent, T* out) {
  with_storage(x.type, x.data, [&](const auto* data) {
    data += x.batch * item.batch + x.head * item.head;
    for (int j = 0; j < kBlock; ++j) out[j] = j < block.count ? to_compute<T>(data[block.token[j] * x.token]) : absent;
  });
}

// e = exp(g) of a block's tokens, or 1 if there is no decay.
template <class T> void decays(const Scalars& g, const Item& item, const Block& block, T* e) {
  constexpr int W = kLanes<T>;
  alignas(64) T log[round_up(kBlock, W)] = {};
  if (g.data) scalars<T>(g, item, block, T(0), log);
  for (int j = 0; j < kBlock; j += W) store(log + j, exp<T>(load<T>(log + j)));
  for (int j = 0; j < kBlock; ++j) e[j] = log[j];
}

// An item's columns of one row: kVectors vectors. The last one may be partly filled.
template <class T, int kVectors> struct Lanes {
  Vec<T> v[kVectors];

  static MEDSSM_INLINE Lanes all(T x) {
    Lanes lanes;
#pragma GCC unroll 2
    for (int l = 0; l < kVectors; ++l) lanes.v[l] = splat(x);
    return lanes;
  }
  static MEDSSM_INLINE Lanes at(const T* row, int lanes) {
    Lanes x;
#pragma GCC unroll 2
    for (int l = 0; l < kVectors; ++l)
      x.v[l] = lanes >= (l + 1) * kLanes<T> ? load<T>(row + l * kLanes<T>) : load_part<T>(row + l * kLanes<T>, lanes - l * kLanes<T>);
    return x;
  }
  template <class S> MEDSSM_INLINE void put(S* row, int lanes) const {
#pragma GCC unroll 2
    for (int l = 0; l < kVectors; ++l)
      if (lanes >= (l + 1) * kLanes<T>)
        store(row + l * kLanes<T>, v[l]);
      else
        store_part(row + l * kLanes<T>, v[l], lanes - l * kLanes<T>);
  }
  MEDSSM_INLINE Vec<T> sum() const {
    Vec<T> s = v[0];
    for (int l = 1; l < kVectors; ++l) s += v[l];
    return s;
  }
};
#define MEDSSM_LANEWISE(expression)                                        \
  Lanes<T, N> r;                                                           \
  _Pragma("GCC unroll 2") for (int l = 0; l < N; ++l) r.v[l] = expression; \
  return r;
template <class T, int N> MEDSSM_INLINE Lanes<T, N> operator*(T a, const Lanes<T, N>& x) { MEDSSM_LANEWISE(a * x.v[l]) }
template <class T, int N> MEDSSM_INLINE Lanes<T, N> operator*(const Lanes<T, N>& a, const Lanes<T, N>& x) { MEDSSM_LANEWISE(a.v[l] * x.v[l]) }
template <class T, int N> MEDSSM_INLINE Lanes<T, N> operator+(const Lanes<T, N>& a, const Lanes<T, N>& x) { MEDSSM_LANEWISE(a.v[l] + x.v[l]) }
template <class T, int N> MEDSSM_INLINE Lanes<T, N> operator-(const Lanes<T, N>& a, const Lanes<T, N>& x) { MEDSSM_LANEWISE(a.v[l] - x.v[l]) }
#undef MEDSSM_LANEWISE

}  // namespace
}  // namespace medssm
