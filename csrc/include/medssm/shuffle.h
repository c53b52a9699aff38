// Transposes vectors in registers, and sums several vectors over their lanes at the same time.
#pragma once
#include <utility>

#include "medssm/simd.h"

namespace medssm {
namespace {

// Lane i of the result is lane Index::at(i) of the 2 kLanes lanes of a and b.
template <class T, class Index, int... I> MEDSSM_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::at(I)...);
#else
  return __builtin_shuffle(a, b, IntVec<T>{Index::at(I)...});
#endif
}
template <class T, class Index> MEDSSM_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle<T, Index>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// The two results of exchanging the off-diagonal squares of kHalf x kHalf lanes between two rows.
template <class T, int kHalf> struct Upper {
  static constexpr int at(int i) { return i & kHalf ? kLanes<T> + i - kHalf : i; }
};
template <class T, int kHalf> struct Lower {
  static constexpr int at(int i) { return i & kHalf ? kLanes<T> + i : i + kHalf; }
};

// rows[i][j] <-> rows[j][i], kLanes rows.
template <class T, int kHalf = kLanes<T> / 2> MEDSSM_INLINE void transpose(Vec<T>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & kHalf) continue;
    const Vec<T> a = rows[i], b = rows[i + kHalf];
    rows[i] = shuffle<T, Upper<T, kHalf>>(a, b);
    rows[i + kHalf] = shuffle<T, Lower<T, kHalf>>(a, b);
  }
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(rows);
}

// On x86, a shuffle within 128-bit quarters of a vector is one cheap instruction. So sums first add adjacent lanes within each
// quarter, then add the quarters.
template <class T> constexpr int kQuarter = 16 / static_cast<int>(sizeof(T));

template <class T, int kOdd> struct Adjacent {
  static constexpr int at(int i) {
    const int within = i % kQuarter<T>, pair = within % (kQuarter<T> / 2);
    return (within < kQuarter<T> / 2 ? 0 : kLanes<T>)+i / kQuarter<T> * kQuarter<T> + 2 * pair + kOdd;
  }
};
template <class T, int kBlock, int kHigh> struct Across {  // kBlock quarters hold the partial sums of one group of values
  static constexpr int at(int i) {
    constexpr int half = kBlock / 2 * kQuarter<T>;
    return i / half * 2 * half + i % half + kHigh * half;
  }
};

template <class T, int kCount, int kBlock> MEDSSM_INLINE Vec<T> sum_across(Vec<T>* v) {
  if constexpr (kBlock == 1) {
    return v[0];
  } else {
    constexpr int kNext = kCount > 1 ? kCount / 2 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < kNext; ++i) {
      const Vec<T> a = v[kCount > 1 ? 2 * i : 0], b = v[kCount > 1 ? 2 * i + 1 : 0];
      v[i] = shuffle<T, Across<T, kBlock, 0>>(a, b) + shuffle<T, Across<T, kBlock, 1>>(a, b);
    }
    return sum_across<T, kNext, kBlock / 2>(v);
  }
}
template <class T, int kCount, int kWidth> MEDSSM_INLINE Vec<T> sum_adjacent(Vec<T>* v) {
  if constexpr (kWidth == 1) {
    return sum_across<T, kCount, kLanes<T> / kQuarter<T>>(v);
  } else {
    constexpr int kNext = kCount > 1 ? kCount / 2 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < kNext; ++i) {
      const Vec<T> a = v[kCount > 1 ? 2 * i : 0], b = v[kCount > 1 ? 2 * i + 1 : 0];
      v[i] = shuffle<T, Adjacent<T, 0>>(a, b) + shuffle<T, Adjacent<T, 1>>(a, b);
    }
    return sum_adjacent<T, kNext, kWidth / 2>(v);
  }
}

// Lane i of the result is the sum of all lanes of v[i], for i < kCount. kCount is a power of two, at most kLanes. The other lanes repeat these sums.
// v is overwritten.
template <class T, int kCount> MEDSSM_INLINE Vec<T> sum_each(Vec<T>* v) { return sum_adjacent<T, kCount, kQuarter<T>>(v); }

}  // namespace
}  // namespace medssm
