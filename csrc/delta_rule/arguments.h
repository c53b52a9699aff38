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

// Columns of one head's state, or of the transposed state: one or more parts.
struct Item {
  int64_t batch, head;
  int64_t part;   // the first part, counted over all heads
  int64_t first;  // first column
  int columns;
};

// A part of an item: as many columns as a pass computes together.
struct Part {
  int index;    // in the item
  int64_t all;  // counted over all heads
  int first;    // first column, in the item
  int lanes;
};

// Calls f(part) for an item's parts of N vectors of lanes.
template <class T, int N, class F> MEDSSM_INLINE void each_part(const Item& item, const F& f) {
  constexpr int kColumns = N * kLanes<T>;
  for (int i = 0; i * kColumns < item.columns; ++i)
    f(Part{i, item.part + i, i * kColumns, static_cast<int>(least(kColumns, item.columns - i * kColumns))});
}

// The most parts of an item, and the largest state of one: half of a first-level cache, which holds the packed tokens too.
constexpr int kMostParts = 16;
constexpr int64_t kMostState = 16 << 10;

// All items. The parts of a head share the work of packing its tokens, so an item has as many parts as fit, if that leaves enough items for the
// threads. Parts depend only on the shapes, and what a pass computes for a part does not depend on the other parts of its item.
template <class T> struct Items {
  int64_t heads, columns, lanes, parts, of_item, items, count;  // parts, items: of a head; lanes: of a part; of_item: parts of an item
  // width: of the columns. rows: of the state.
  Items(const Problem& p, int64_t width, int64_t rows, int vectors = kVectors) :
      heads(p.heads), columns(width), lanes(vectors * kLanes<T>), parts(ceil_div(width, lanes)) {
    // A last part of less than a vector is an item of its own: it takes passes with one vector.
    const int64_t whole = parts - narrow(), fit = least<int64_t>(kMostParts, most<int64_t>(1, kMostState / (rows * lanes * int64_t{sizeof(T)})));
    int64_t groups = ceil_div(whole, fit);
    while (groups < whole && !balanced(p.batch * heads * groups, p.threads)) ++groups;
    of_item = groups ? ceil_div(whole, groups) : 1;
    items = ceil_div(whole, of_item) + narrow();
    count = p.batch * heads * items;
  }
  int64_t most_columns() const { return of_item * lanes; }
  Item operator[](int64_t i) const {
    const int64_t head = i / items, whole = parts - narrow(), begin = least(i % items * of_item, whole),
                  end = begin < whole ? least(begin + of_item, whole) : parts;
    return {head / heads, head % heads, head * parts + begin, begin * lanes, static_cast<int>(least(columns, end * lanes) - begin * lanes)};
  }

 private:
  bool narrow() const { return lanes > kLanes<T> && columns - (parts - 1) * lanes <= kLanes<T>; }
  // Whether threads that share so many items take at most an eighth longer than with equal shares.
  static bool balanced(int64_t items, int64_t threads) { return 8 * threads * ceil_div(items, threads) <= 9 * items; }
};

// The offset of an item's head in states (b, h, dk, dv) (see medssm/walk.h).
MEDSSM_INLINE int64_t state_offset(const Problem& p, const Item& item, int64_t sequence) {
  return ((item.batch + sequence) * p.heads + item.head) * p.keys * p.values;
}

// Calls f with the number of lane vectors that the item's parts need, at most N, as a compile-time constant.
template <class T, int N = kVectors, class F> void with_vectors(const Item& item, const F& f) {
  if (N > 1 && item.columns > kLanes<T>)
    f(std::integral_constant<int, N>{});
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
