// What the backward passes share.
#pragma once
#include "state.h"

namespace medssm {
namespace {

// Steps between the points where a running sum of the gradient of g begins anew.
constexpr int64_t kChunk = 256;

// The first step after `from` at which a chunk ends.
MEDSSM_INLINE int64_t chunk_end(int64_t from) { return round_up(from + 1, kChunk); }

// The tiles of steps [from, end), from the last to the first.
template <class F> void each_tile_back(const Walk& walk, int64_t from, int64_t end, const F& f) {
  while (end > from) {
    const Tile tile = walk.tile_before(end, from);
    f(tile);
    end = tile.from;
  }
}

// The rows of an item in a contiguous (b, l, h, d) tensor.
template <class T> struct Target {
  T* data;
  int64_t token;
  Target(const void* tensor, const Problem& p, const Item& item, int64_t features) :
      data(static_cast<T*>(const_cast<void*>(tensor)) + (item.batch * p.length * p.heads + item.head) * features + item.first),
      token(p.heads * features) {}
  T* operator[](int64_t t) const { return data + t * token; }
};

template <class T> MEDSSM_INLINE void put_shares(Vec<T>* sums, const Block& block, T* out) {
  T sum[kBlock];
  sum_all<T, kBlock>(sums, sum);
  for (int j = 0; j < block.count; ++j) out[block.step[j]] = sum[j];
}

}  // namespace
}  // namespace medssm
