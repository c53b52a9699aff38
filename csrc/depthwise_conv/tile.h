// The register tile of a depthwise convolution: kRows x kColumns outputs of one vector of channels, computed from contiguous rows of input.
//
// Every input vector is loaded once and used for all outputs that need it: with 3 x 3 taps and two rows, one load is used in up to six FMAs.
//   convolve   pre_p = bias + sum_o weight_o x_{p+o}
//   correlate  dweight_o += sum_p x_{p+o} g_p, which reads the same rows in the same order
#pragma once
#include "medssm/simd.h"

namespace medssm {
namespace {

// The outputs of a tile. They fit into the registers together with two rows of taps and one input. If planes have one row, tiles have one row too.
constexpr int kRows = 2, kColumns = kVectorBytes == 64 ? 8 : 4;

// The input rows of a tile, with one plane per tap along z.
template <class T> struct Source {
  const T* const* planes;          // [side_z]: nullptr for a plane outside the volume
  int64_t offset, row_stride;      // in elements: from a plane's start to the tile's first input row; between two rows
  int64_t side_z, side_y, side_x;  // taps along each axis
  int64_t first, last;             // input rows [first, last) are inside the volume, counted from the tile's first input row
};

// Calls f(z, r, row) for each input row that kTileRows rows of outputs need. z: the tap along z. r: the input row; output row o uses it with tap
// y = r - o.
template <int kTileRows, class T, class F> MEDSSM_INLINE void each_row(const Source<T>& source, F&& f) {
  const int64_t last = source.last < source.side_y + kTileRows - 1 ? source.last : source.side_y + kTileRows - 1;
  for (int64_t z = 0; z < source.side_z; ++z)
    if (source.planes[z])
      for (int64_t r = source.first; r < last; ++r) f(z, r, source.planes[z] + source.offset + r * source.row_stride);
}

// acc_t += sum_j taps_j row_{t+j} for the output rows [kFrom, kTo). The taps of output row o are at taps[o].
template <class T, int kSide, int kFrom, int kTo, int kTileRows>
MEDSSM_INLINE void add_row(Vec<T> (&acc)[kTileRows][kColumns], const T* const (&taps)[2], const T* row, int64_t side) {
  constexpr int W = kLanes<T>;
  if constexpr (kSide > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kColumns + kSide - 1; ++i) {
      const Vec<T> x = load<T>(row + i * W);
#pragma GCC unroll 2
      for (int o = kFrom; o < kTo; ++o)
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j)
          if (i - j >= 0 && i - j < kColumns) acc[o][i - j] += load<T>(taps[o] + j * W) * x;
    }
  } else {
    for (int64_t j = 0; j < side; ++j)
#pragma GCC unroll 2
      for (int o = kFrom; o < kTo; ++o) {
        const Vec<T> tap = load<T>(taps[o] + j * W);
#pragma GCC unroll 8
        for (int t = 0; t < kColumns; ++t) acc[o][t] += tap * load<T>(row + (t + j) * W);
      }
  }
}

// Computes the values of a tile before the activation. taps: [z][y][x] vectors, then the bias. kSide: taps along the x axis, 0 if known only at run
// time.
template <class T, int kSide, int kTileRows> __attribute__((noinline)) void convolve(const Source<T>& source, const T* taps, Vec<T>* out) {
  constexpr int W = kLanes<T>;
  const int64_t side = kSide > 0 ? kSide : source.side_x, row_of_taps = side * W;
  const Vec<T> bias = load<T>(taps + source.side_z * source.side_y * row_of_taps);
  Vec<T> acc[kTileRows][kColumns];
#pragma GCC unroll 2
  for (int o = 0; o < kTileRows; ++o)
#pragma GCC unroll 8
    for (int t = 0; t < kColumns; ++t) acc[o][t] = bias;
  each_row<kTileRows>(source, [&](int64_t z, int64_t r, const T* row) __attribute__((always_inline)) {
    const T* own = taps + (z * source.side_y + r) * row_of_taps;
    const T* const of_rows[2] = {own, own - row_of_taps};
    if (r == source.side_y)
      add_row<T, kSide, kTileRows - 1, kTileRows>(acc, of_rows, row, side);
    else if (kTileRows == 1 || r == 0)
      add_row<T, kSide, 0, 1>(acc, of_rows, row, side);
    else
      add_row<T, kSide, 0, kTileRows>(acc, of_rows, row, side);
  });
#pragma GCC unroll 2
  for (int o = 0; o < kTileRows; ++o)
#pragma GCC unroll 8
    for (int t = 0; t < kColumns; ++t) out[o * kColumns + t] = acc[o][t];
}

// sums_j += sum_t row_{t+j} g_t for the output rows [kFrom, kTo). The tile's share is summed in registers and added to memory once.
template <class T, int kSide, int kFrom, int kTo, int kTileRows>
MEDSSM_INLINE void add_products(T* const (&sums)[2], const Vec<T> (&g)[kTileRows][kColumns], const T* row, int64_t side) {
  constexpr int W = kLanes<T>;
  if constexpr (kSide > 0) {
    Vec<T> share[2][kSide] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kColumns + kSide - 1; ++i) {
      const Vec<T> x = load<T>(row + i * W);
#pragma GCC unroll 2
      for (int o = kFrom; o < kTo; ++o)
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j)
          if (i - j >= 0 && i - j < kColumns) share[o][j] += x * g[o][i - j];
    }
#pragma GCC unroll 2
    for (int o = kFrom; o < kTo; ++o)
#pragma GCC unroll 8
      for (int j = 0; j < kSide; ++j) store(sums[o] + j * W, load<T>(sums[o] + j * W) + share[o][j]);
  } else {
    for (int64_t j = 0; j < side; ++j)
#pragma GCC unroll 2
      for (int o = kFrom; o < kTo; ++o) {
        Vec<T> share = {};
#pragma GCC unroll 8
        for (int t = 0; t < kColumns; ++t) share += load<T>(row + (t + j) * W) * g[o][t];
        store(sums[o] + j * W, load<T>(sums[o] + j * W) + share);
      }
  }
}

// Adds a tile's share of the gradients of the taps and the bias. `sums` has the layout of `taps` in convolve.
template <class T, int kSide, int kTileRows> __attribute__((noinline)) void correlate(const Source<T>& source, const Vec<T>* gradient, T* sums) {
  constexpr int W = kLanes<T>;
  const int64_t side = kSide > 0 ? kSide : source.side_x, row_of_taps = side * W;
  Vec<T> g[kTileRows][kColumns];
#pragma GCC unroll 2
  for (int o = 0; o < kTileRows; ++o)
#pragma GCC unroll 8
    for (int t = 0; t < kColumns; ++t) g[o][t] = gradient[o * kColumns + t];
  each_row<kTileRows>(source, [&](int64_t z, int64_t r, const T* row) __attribute__((always_inline)) {
    T* own = sums + (z * source.side_y + r) * row_of_taps;
    T* const of_rows[2] = {own, own - row_of_taps};
    if (r == source.side_y)
      add_products<T, kSide, kTileRows - 1, kTileRows>(of_rows, g, row, side);
    else if (kTileRows == 1 || r == 0)
      add_products<T, kSide, 0, 1>(of_rows, g, row, side);
    else
      add_products<T, kSide, 0, kTileRows>(of_rows, g, row, side);
  });
  Vec<T> total = gradient[0];
  for (int t = 1; t < kTileRows * kColumns; ++t) total += gradient[t];
  T* bias = sums + source.side_z * source.side_y * row_of_taps;
  store(bias, load<T>(bias) + total);
}

}  // namespace
}  // namespace medssm
