// A tile of a causal convolution: kTile steps of the walk, given as pointers to kTile + width - 1 rows of channels.
//
// Each input vector is loaded once and used for all steps whose taps read it. `taps` are packed per channel vector: width taps, then the bias.
// kWidth: the width if it is known at compile time, otherwise 0.
#pragma once
#include "medssm/activation.h"
#include "medssm/simd.h"
#include "medssm/stream.h"

namespace medssm {
namespace {

constexpr int kTile = 4;

// Reads and writes a vector of channels: all lanes, or only the first n.
template <bool kWhole> struct Lanes {
  int n;
  template <class T, class S> MEDSSM_INLINE Vec<T> load_from(const S* p) const {
    if constexpr (kWhole)
      return load<T>(p);
    else
      return load_part<T>(p, n);
  }
  template <class S, class V> MEDSSM_INLINE void store_to(S* p, V v, bool stream = false) const {
    if constexpr (kWhole)
      write(p, v, stream);
    else
      store_part(p, v, n);
  }
};

// Calls f(c, lanes) for each vector of `channels` channels. c: its first channel.
template <class T, class F> MEDSSM_INLINE void each_vector(int64_t channels, const F& f) {
  constexpr int W = kLanes<T>;
  int64_t c = 0;
  for (; c + W <= channels; c += W) f(c, Lanes<true>{W});
  if (c < channels) f(c, Lanes<false>{static_cast<int>(channels - c)});
}

// acc_t = bias + sum_j taps_j rows_{t+j}
template <class T, int kWidth, class L>
MEDSSM_INLINE void preactivation(const T* const* rows, int64_t c, const T* taps, int64_t width, L lanes, Vec<T> (&acc)[kTile]) {
  constexpr int W = kLanes<T>;
  for (int t = 0; t < kTile; ++t) acc[t] = load<T>(taps + width * W);
  if constexpr (kWidth > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kTile + kWidth - 1; ++i) {
      const Vec<T> x = lanes.template load_from<T>(rows[i] + c);
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j)
        if (i - j >= 0 && i - j < kTile) acc[i - j] += load<T>(taps + j * W) * x;
    }
  } else {
    for (int64_t j = 0; j < width; ++j) {
      const Vec<T> tap = load<T>(taps + j * W);
      for (int t = 0; t < kTile; ++t) acc[t] += tap * lanes.template load_from<T>(rows[t + j] + c);
    }
  }
}

// out_t = act(bias + sum_j taps_j rows_{t+j}) for t < steps. stream: use stores that bypass the caches.
template <class T, int kWidth>
void convolve(const T* const* rows, const T* taps, int64_t width, int64_t channels, bool activate, int64_t steps, T* const* out, bool stream) {
  each_vector<T>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    Vec<T> acc[kTile];
    preactivation<T, kWidth>(rows, c, taps + c * (width + 1), width, lanes, acc);
    for (int64_t t = 0; t < steps; ++t) lanes.store_to(out[t] + c, activate ? silu<T>(acc[t]) : acc[t], stream);
  });
}

// g_t = dout_t act'(bias + sum_j taps_j rows_{t+j}) for t < steps, stored as whole vectors. If sums is not null, also adds the tile's share of the
// gradients of the taps and the bias: sums_j += sum_t g_t rows_{t+j}, packed like the taps.
template <class T, int kWidth> void differentiate(const T* const* rows, const T* taps, int64_t width, int64_t channels, bool activate, int64_t steps,
                                                  const T* const* dout, T* const* g, T* sums) {
  constexpr int W = kLanes<T>;
  const int64_t side = kWidth > 0 ? kWidth : width;
  each_vector<T>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    Vec<T> pre[kTile] = {}, grad[kTile];
    if (activate) preactivation<T, kWidth>(rows, c, taps + c * (side + 1), side, lanes, pre);
#pragma GCC unroll 4
    for (int t = 0; t < kTile; ++t) {
      grad[t] = Vec<T>{};
      if (t >= steps) continue;
      grad[t] = lanes.template load_from<T>(dout[t] + c);
      if (activate) grad[t] *= silu_slope<T>(pre[t]);
      store(g[t] + c, grad[t]);
    }
    if (!sums) return;
    T* own = sums + c * (side + 1);
    for (int64_t j = 0; j < side; ++j) {
      Vec<T> share = {};
#pragma GCC unroll 4
      for (int t = 0; t < kTile; ++t) share += grad[t] * lanes.template load_from<T>(rows[t + j] + c);
      store(own + j * W, load<T>(own + j * W) + share);
    }
    store(own + side * W, load<T>(own + side * W) + ((grad[0] + grad[1]) + (grad[2] + grad[3])));
  });
}

// The functions above, compiled for a given width.
template <class T> struct Tile {
  void (*convolve)(const T* const*, const T*, int64_t, int64_t, bool, int64_t, T* const*, bool);
  void (*differentiate)(const T* const*, const T*, int64_t, int64_t, bool, int64_t, const T* const*, T* const*, T*);

  explicit Tile(int64_t width) {
    switch (width) {
      case 2:
        choose<2>();
        break;
      case 3:
        choose<3>();
        break;
      case 4:
        choose<4>();
        break;
      default:
        choose<0>();
    }
  }

 private:
  template <int kWidth> void choose() {
    convolve = &medssm::convolve<T, kWidth>;
    differentiate = &medssm::differentiate<T, kWidth>;
  }
};

}  // namespace
}  // namespace medssm
