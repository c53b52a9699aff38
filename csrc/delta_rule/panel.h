// The coefficients of a block of tokens, packed for a sweep over the rows of the state, and the dot products of the block's tokens with each other.
//
// The panel has kSlots groups of kBlock numbers for each row i of the state: for each slot, element i of each token of the block. So a sweep reads
// memory contiguously. The dot products are computed at the same time, while the tokens are in registers.
#pragma once
#include "medssm/shuffle.h"
#include "rows.h"

namespace medssm {
namespace {

// The index in `products` of the first kind of product, for tokens i < j, and of the second kind, for tokens i <= j.
MEDSSM_INLINE constexpr int before(int i, int j) { return j * (j - 1) / 2 + i; }
MEDSSM_INLINE constexpr int upto(int i, int j) { return kBlock * (kBlock - 1) / 2 + j * (j + 1) / 2 + i; }
constexpr int kProducts = kBlock * kBlock;

// out[i] = the sum of the lanes of v[i], for i < kCount. kCount is a power of two.
template <class T, int kCount> MEDSSM_INLINE void sum_all(Vec<T>* v, T* out) {
  constexpr int kGroup = least(kCount, kLanes<T>);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i += kGroup) {
    const Vec<T> sums = sum_each<T, kGroup>(v + i);
    store_first<T, kGroup>(out + i, sums);
  }
}

template <class T, int kHigh> struct Pairs {  // in each quarter (four lanes): a0 b0 a1 b1, or a2 b2 a3 b3
  static constexpr int at(int i) { return (i & 1 ? kLanes<T> : 0) + (i & ~3) + (i & 3) / 2 + 2 * kHigh; }
};
template <class T, int kHigh> struct Halves {  // in each quarter: the first two lanes of a and b, or the last two
  static constexpr int at(int i) { return (i & 2 ? kLanes<T> : 0) + (i & ~3) + (i & 1) + 2 * kHigh; }
};

template <class T, int kWidth, int kQuarterIndex = 0> MEDSSM_INLINE void store_quarters(Vec<T> x, T* out) {
  store_first<T, kBlock, kQuarterIndex * kBlock>(out + kQuarterIndex * kBlock * kWidth, x);
  if constexpr ((kQuarterIndex + 1) * kBlock < kLanes<T>) store_quarters<T, kWidth, kQuarterIndex + 1>(x, out);
}

// out[c * kWidth + j] = rows[j][c]
template <class T, int kWidth> MEDSSM_INLINE void interleave(const Vec<T>* rows, T* out) {
  static_assert(kBlock == 4, "four rows are transposed in registers");
  if constexpr (sizeof(T) == 4) {
    const Vec<T> low01 = shuffle<T, Pairs<T, 0>>(rows[0], rows[1]), low23 = shuffle<T, Pairs<T, 0>>(rows[2], rows[3]);
    const Vec<T> high01 = shuffle<T, Pairs<T, 1>>(rows[0], rows[1]), high23 = shuffle<T, Pairs<T, 1>>(rows[2], rows[3]);
    store_quarters<T, kWidth>(shuffle<T, Halves<T, 0>>(low01, low23), out);
    store_quarters<T, kWidth>(shuffle<T, Halves<T, 1>>(low01, low23), out + kWidth);
    store_quarters<T, kWidth>(shuffle<T, Halves<T, 0>>(high01, high23), out + 2 * kWidth);
    store_quarters<T, kWidth>(shuffle<T, Halves<T, 1>>(high01, high23), out + 3 * kWidth);
  } else {
    for (int c = 0; c < kLanes<T>; ++c)
      for (int j = 0; j < kBlock; ++j) out[c * kWidth + j] = rows[j][c];
  }
}

// rows[slot][j]: n elements of token j. The panel has round_up(n, lanes) rows. products: the dot products of slot kA of token i with slot kB of token
// j, for i < j; and of slot kC of token i with slot kD of token j, for i <= j.
template <class T, int kSlots, int kA, int kB, int kC, int kD> void pack(const T* const* const (&rows)[kSlots], int64_t n, T* panel, T* products) {
  constexpr int W = kLanes<T>, kWidth = kSlots * kBlock;
  Vec<T> sums[kProducts] = {};
  const auto columns = [&](int64_t at, auto load_row) {
    Vec<T> x[kSlots][kBlock];
#pragma GCC unroll 4
    for (int s = 0; s < kSlots; ++s) {
#pragma GCC unroll 4
      for (int j = 0; j < kBlock; ++j) x[s][j] = load_row(rows[s][j] + at);
      interleave<T, kWidth>(x[s], panel + at * kWidth + s * kBlock);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; ++j)
#pragma GCC unroll 4
      for (int i = 0; i <= j; ++i) {
        if (i < j) sums[before(i, j)] = fma(x[kA][i], x[kB][j], sums[before(i, j)]);
        sums[upto(i, j)] = fma(x[kC][i], x[kD][j], sums[upto(i, j)]);
      }
  };
  int64_t at = 0;
  for (; at + W <= n; at += W) columns(at, [](const T* p) { return load<T>(p); });
  if (at < n) columns(at, [&](const T* p) { return load_part<T>(p, static_cast<int>(n - at)); });
  sum_all<T, kProducts>(sums, products);
}

}  // namespace
}  // namespace medssm
