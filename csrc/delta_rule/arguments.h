// The arguments of the delta rule on the CPU, and how its work is divided.
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
struct Scalars {  // (b, l, h): beta, g
  const void* data;
  int64_t type, batch, token, head;
};
struct Problem {
  Tokens q, k, v;
  Scalars beta, g;                // g.data null: no decay
  const void* initial;            // (b, h, dk, dv): dense, the compute type; may be null
  const int64_t *index, *starts;  // null: raster; null: no segment begins after step 0
  int64_t start_count, reverse;
  int64_t batch, length, heads, keys, values;  // keys: dk, values: dv
  int64_t wide, threads;                       // wide: compute in double
  double scale;

  Walk walk() const { return {length, index, starts, start_count, reverse != 0}; }
};

MEDSSM_INLINE int64_t element_size(int64_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// A dense (b, l, h, d) tensor of the compute type that a kernel writes and reads again.
template <class T> Tokens dense(const void* data, const Problem& p, int64_t features) {
  return {data, sizeof(T) == 8 ? kFloat64 : kFloat32, p.length * p.heads * features, p.heads * features, features};
}

// Lane vectors that a pass carries side by side: a broadcast coefficient then serves as many FMAs.
#if defined(__AVX512F__)
constexpr int kVectors = 2;
#else
constexpr int kVectors = 1;
#endif

// One head's share of the columns of the state (or of its transpose).
struct Item {
  int64_t batch, head, block;
  int64_t first;  // column
  int lanes;
};

// Items are blocks of kVectors vectors of columns: they depend on shapes only.
template <class T> struct Items {
  int64_t heads, columns, blocks, count;
  Items(const Problem& p, int64_t width) :
      heads(p.heads), columns(width), blocks(ceil_div(width, kVectors * kLanes<T>)), count(p.batch * heads * blocks) {}
  Item operator[](int64_t i) const {
    const int64_t head = i / blocks, block = i % blocks, first = block * kVectors * kLanes<T>;
    return {head / heads, head % heads, block, first, static_cast<int>(least<int64_t>(kVectors * kLanes<T>, columns - first))};
  }
};

// f.template operator()<vectors>() with as many lane vectors as the item needs.
template <class T, class F> void with_vectors(const Item& item, const F& f) {
  if (kVectors > 1 && item.lanes > kLanes<T>)
    f(std::integral_constant<int, kVectors>{});
  else
    f(std::integral_constant<int, 1>{});
}

// Threads for so many items of a problem: one where the work would not repay waking the others.
MEDSSM_INLINE int64_t team_size(const Problem& p, int64_t items) {
  const bool small = p.batch * p.length * p.heads * p.keys * p.values < (1 << 18);
  return small ? 1 : least(p.threads, items);
}

}  // namespace
}  // namespace medssm
