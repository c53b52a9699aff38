// The arguments of the delta rule on the CPU, and how its work is divided into items.
#pragma once
#include <type_traits>

#include "medssm/simd.h"
#include "medssm/walk.h"

namespace medssm {
namespace {

// kernels/delta_rule/native.py packs these structs field by field. Strides are in elements.
struct Tokens {  // (b, l, h, d) with adjacent features
  const void* data;
  int64_t type, batch, token, head;
};
using Scalars = Tokens;  // (b, l, h): beta, g
struct Problem {
  Tokens q, k, v;
  Scalars beta, g;                            // g.data is null if there is no decay
  const void* initial;                        // (b, h, dk, dv): contiguous, in the compute type; may be null
  const int64_t *index, *starts, *sequences;  // see medssm/walk.h; each may be null
  int64_t start_count, reverse;
  int64_t batch, length, heads, keys, values;  // keys: dk, values: dv
  int64_t wide, threads;                       // wide: compute in double
  double scale;

  Walk walk() const { return {length, index, starts, sequences, start_count, reverse != 0}; }
};

MEDSSM_INLINE int64_t element_size(int64_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// A contiguous (b, l, h, d) tensor in the compute type, which one pass writes and another reads.
template <class T> Tokens dense(const void* data, const Problem& p, int64_t features) {
  return {data, sizeof(T) == 8 ? kFloat64 : kFloat32, p.length * p.heads * features, p.heads * features, features};
}

// Number of lane vectors that a pass computes together: each broadcast coefficient is used in that many FMAs.
#if defined(__AVX512F__)
constexpr int kVectors = 2;
#else
constexpr int kVectors = 1;
#endif

// A block of columns of one head's state, or of the transposed state.
struct Item {
  int64_t batch, head, block;
  int64_t first;  // first column
  int lanes;
};

// All items: blocks of `vectors` vectors of columns. They depend only on the shapes, not on the number of threads.
template <class T> struct Items {
  int64_t heads, columns, lanes, blocks, count;
  Items(const Problem& p, int64_t width, int vectors = kVectors) :
      heads(p.heads), columns(width), lanes(vectors * kLanes<T>), blocks(ceil_div(width, lanes)), count(p.batch * heads * blocks) {}
  Item operator[](int64_t i) const {
    const int64_t head = i / blocks, block = i % blocks, first = block * lanes;
    return {head / heads, head % heads, block, first, static_cast<int>(least(lanes, columns - first))};
  }
};

// The offset of an item's head in states (b, h, dk, dv) (see medssm/walk.h).
MEDSSM_INLINE int64_t state_offset(const Problem& p, const Item& item, int64_t sequence) {
  return ((item.batch + sequence) * p.heads + item.head) * p.keys * p.values;
}

// Calls f with the number of lane vectors that the item needs, as a compile-time constant.
template <class T, class F> void with_vectors(const Item& item, const F& f) {
  if (kVectors > 1 && item.lanes > kLanes<T>)
    f(std::integral_constant<int, kVectors>{});
  else
    f(std::integral_constant<int, 1>{});
}

// The number of threads for a problem with that many items. Small problems use one thread, because starting more would take longer.
MEDSSM_INLINE int64_t team_size(const Problem& p, int64_t items) {
  const bool small = p.batch * p.length * p.heads * p.keys * p.values < (1 << 18);
  return small ? 1 : least(p.threads, items);
}

}  // namespace
}  // namespace medssm
