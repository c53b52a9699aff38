// The taps of a depthwise convolution: packing them per channel vector for the kernels, and adding up their gradients.
#pragma once
#include <type_traits>

#include "medssm/parallel.h"
#include "medssm/simd.h"

namespace medssm {
namespace {

// The number of threads for `elements` outputs in `tasks` tasks. Starting a thread takes as long as computing about ten thousand outputs.
MEDSSM_INLINE int64_t threads_for(int64_t threads, int64_t tasks, int64_t elements) {
  return least(threads, least(tasks, ceil_div(elements, 16384)));
}

// Weights (d, z, y, x) and a bias (d,) or null, with any strides. For kernels with fewer axes the first sides are 1. All fields are 8 bytes (see
// abi.h).
struct Taps {
  const void *weight, *bias;
  int64_t weight_type, bias_type, channels, side[3], stride[4], bias_stride;

  int64_t count() const { return side[0] * side[1] * side[2]; }
  template <class T> int64_t vectors() const { return ceil_div(channels, kLanes<T>); }
  // The number of elements of the taps and the bias of one channel vector.
  template <class T> int64_t packed() const { return (count() + 1) * kLanes<T>; }
};

// Packs, for each channel vector, the taps in row-major order and then the bias. Channels that do not exist are zero. mirrored: the taps in reverse
// order, and a bias of zero.
template <class T> void pack(const Taps& taps, bool mirrored, T* packed) {
  constexpr int W = kLanes<T>;
  const int64_t count = taps.count(), step = taps.packed<T>();
  std::memset(packed, 0, static_cast<std::size_t>(taps.vectors<T>() * step) * sizeof(T));
  with_storage(taps.weight_type, taps.weight, [&](const auto* weight) {
    for (int64_t c = 0; c < taps.channels; ++c) {
      T* target = packed + c / W * step + c % W;
      for (int64_t z = 0, tap = 0; z < taps.side[0]; ++z)
        for (int64_t y = 0; y < taps.side[1]; ++y)
          for (int64_t x = 0; x < taps.side[2]; ++x, ++tap)
            target[(mirrored ? count - 1 - tap : tap) * W] =
                to_compute<T>(weight[c * taps.stride[0] + z * taps.stride[1] + y * taps.stride[2] + x * taps.stride[3]]);
    }
  });
  if (taps.bias && !mirrored)
    with_storage(taps.bias_type, taps.bias, [&](const auto* bias) {
      for (int64_t c = 0; c < taps.channels; ++c) packed[c / W * step + count * W + c % W] = to_compute<T>(bias[c * taps.bias_stride]);
    });
}

// Adds `shares` partial gradients, each packed like the taps, in a fixed order and in double precision. Writes dweight (d, count) and dbias (d,),
// contiguous, in the types of weight and bias. dbias may be null.
template <class T> void reduce(const Taps& taps, const T* sums, int64_t shares, void* dweight, void* dbias, int64_t threads) {
  constexpr int W = kLanes<T>;
  const int64_t count = taps.count(), vectors = taps.vectors<T>(), step = taps.packed<T>();
  parallel(least(threads, vectors), [&](const Team& team) {
    const Range mine = share(vectors, team);
    for (int64_t v = mine.begin; v < mine.end; ++v) {
      const int64_t lanes = least<int64_t>(W, taps.channels - v * W);
      for (int64_t tap = 0; tap <= count; ++tap) {
        double total[W] = {};
        for (int64_t i = 0; i < shares; ++i) {
          const T* own = sums + (i * vectors + v) * step + tap * W;
          for (int j = 0; j < W; ++j) total[j] += own[j];
        }
        const bool bias = tap == count;
        if (bias && !dbias) continue;
        with_storage(bias ? taps.bias_type : taps.weight_type, bias ? dbias : dweight, [&](auto* target) {
          using S = std::remove_reference_t<decltype(*target)>;
          for (int64_t j = 0; j < lanes; ++j) target[bias ? v * W + j : (v * W + j) * count + tap] = to_storage<S>(total[j]);
        });
      }
    }
  });
}

}  // namespace
}  // namespace medssm
