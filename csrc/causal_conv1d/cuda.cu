// Causal depthwise convolution on a GPU.
//
// What it costs is memory: so every number is read once and written once. A thread has one channel, and neighbours have neighbouring channels, so
// that any walk reads whole rows; it goes through a run of steps with the taps it has seen in registers, and asks for several steps at a time. Other
// widths than four read their taps anew, from the caches. Backward a run's thread goes on for width - 1 steps behind its end, whose gradients reach
// into it: these few outputs are worked out twice, which spares a workspace. The gradients of weight and bias are added in registers over a run, over
// a block's runs in shared memory, and over blocks by PyTorch: no atomics.
#include "medssm/activation.h"

namespace medssm {
namespace {

constexpr int kColumns = 64, kRuns = 4, kThreads = kColumns * kRuns, kRun = 32, kAhead = 4;

// kernels/causal_conv1d/cuda.py packs this.
struct Arguments {
  void* stream;
  Strided<3> x;        // (b, l, d)
  Strided<2> weight;   // (d, w)
  Strided<1> bias;     // (d,), may be null
  Strided<3> initial;  // (b, d, w - 1), may be null: zeros
  const int64_t *index,
      *begin;  // (l,): the token of each step, null for raster; the first step that each step sees, null: all back to the initial state
  int64_t reverse, batch, length, channels, width, silu, wide;
  void* out;                // contiguous, x's type
  Strided<3> dout, dstate;  // backward: (b, l, d), (b, d, w - 1) or null
  void *dx, *dinitial;      // contiguous, x's and initial's type; dinitial may be null
  void* sums;               // (blocks of runs, w + 1, d), the compute type: of dweight, and last of dbias
};

struct Place {
  int64_t batch, run, first;  // run: of the batch element; first: its first step
  int channel;
  bool live;

  // Runs of kRun steps from `from` on, which begin at step -early.
  __device__ Place(const Arguments& a, int64_t runs, int early) {
    const int64_t tiles = ceil_div(a.channels, kColumns), groups = ceil_div(runs, kRuns), at = blockIdx.x / tiles;
    channel = static_cast<int>(blockIdx.x % tiles) * kColumns + static_cast<int>(threadIdx.x) % kColumns;
    batch = at / groups;
    run = at % groups * kRuns + static_cast<int>(threadIdx.x) / kColumns;
    first = run * kRun - early;
    live = channel < a.channels && run < runs;
  }
};

MEDSSM_INLINE int64_t token_at(const Arguments& a, int64_t step) {
  const int64_t at = a.reverse ? a.length - 1 - step : step;
  return a.index ? a.index[at] : at;
}

// What lies at a step: a token, one of the initial state before step 0, or nothing.
template <class T> MEDSSM_INLINE T tap_at(const Arguments& a, const Place& place, int64_t step) {
  if (step >= a.length) return 0;
  if (step >= 0) return a.x.get<T>(place.batch, token_at(a, step), place.channel);
  const int64_t slot = step + a.width - 1;
  return a.initial.data && slot >= 0 ? a.initial.get<T>(place.batch, place.channel, slot) : T(0);
}
// The first step that a step sees.
MEDSSM_INLINE int64_t begin_at(const Arguments& a, int64_t step) { return a.begin ? a.begin[step] : 1 - a.width; }

// The taps of consecutive steps. kWidth: in registers, moved on step by step; 0: any width, read where they are wanted.
template <class T, int kWidth> class Window {
 public:
  // Before `step`.
  __device__ Window(const Arguments& a, const Place& place, int64_t step) {
#pragma unroll
    for (int j = 1; j < kWidth; ++j) taps_[j] = tap_at<T>(a, place, step - kWidth + j);
  }
  __device__ void move(T next) {
#pragma unroll
    for (int j = 0; j + 1 < kWidth; ++j) taps_[j] = taps_[j + 1];
    taps_[kWidth - 1] = next;
  }
  __device__ T tap(const Arguments&, const Place&, int64_t, int j) const { return taps_[j]; }

 private:
  T taps_[kWidth];
};
template <class T> class Window<T, 0> {
 public:
  __device__ Window(const Arguments&, const Place&, int64_t) {}
  __device__ void move(T) {}
  __device__ T tap(const Arguments& a, const Place& place, int64_t step, int j) const { return tap_at<T>(a, place, step - a.width + 1 + j); }
};

// weight_j of a channel, in registers where the width is known.
template <class T, int kWidth> class Weights {
 public:
  __device__ Weights(const Arguments& a, const Place& place) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) weights_[j] = place.live ? a.weight.get<T>(place.channel, j) : T(0);
  }
  __device__ T operator()(const Arguments&, const Place&, int j) const { return weights_[j]; }

 private:
  T weights_[kWidth];
};
template <class T> class Weights<T, 0> {
 public:
  __device__ Weights(const Arguments&, const Place&) {}
  __device__ T operator()(const Arguments& a, const Place& place, int j) const { return a.weight.get<T>(place.channel, j); }
};

// bias + sum_j weight_j tap_j at a step that the window has moved to.
template <class T, int kWidth> __device__ T before_activation(const Arguments& a, const Place& place, int64_t step, T bias,
                                                              const Weights<T, kWidth>& weight, const Window<T, kWidth>& window) {
  const int width = kWidth ? kWidth : static_cast<int>(a.width);
  const int64_t begin = begin_at(a, step);
  T y = bias;
#pragma unroll
  for (int j = 0; j < width; ++j)
    if (step - width + 1 + j >= begin) y = fma(weight(a, place, j), window.tap(a, place, step, j), y);
  return y;
}

template <class T, int kWidth> __global__ void __launch_bounds__(kThreads) forward(Arguments a) {
  const Place place(a, ceil_div(a.length, kRun), 0);
  if (!place.live) return;
  const T bias = a.bias.data ? a.bias.get<T>(place.channel) : T(0);
  const Weights<T, kWidth> weight(a, place);
  Window<T, kWidth> window(a, place, place.first);
  const int64_t end = least(a.length, place.first + kRun);
  for (int64_t step = place.first; step < end; step += kAhead) {
    Bits<T> bits[kAhead];
    int64_t tokens[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (step + i < end) {
        tokens[i] = token_at(a, step + i);
        if (kWidth) bits[i].load(a.x.data, a.x.type, a.x.at(place.batch, tokens[i], place.channel));
      }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (step + i < end) {
        if (kWidth) window.move(bits[i].value(a.x.type));
        T y = before_activation<T, kWidth>(a, place, step + i, bias, weight, window);
        if (a.silu) y = silu<T>(y);
        write<T>(a.out, a.x.type, (place.batch * a.length + tokens[i]) * a.channels + place.channel, y);
      }
  }
}

// The gradient before the activation at a step that the window has moved to; 0 where there is no such step.
template <class T, int kWidth> __device__ T inner_gradient(const Arguments& a, const Place& place, int64_t step, T bias,
                                                           const Weights<T, kWidth>& weight, const Window<T, kWidth>& window) {
  if (step < 0 || step >= a.length) return 0;
  T g = a.dout.get<T>(place.batch, token_at(a, step), place.channel);
  if (a.silu) g *= silu_slope<T>(before_activation<T, kWidth>(a, place, step, bias, weight, window));
  return g;
}

// What reaches a step from the final state.
template <class T> MEDSSM_INLINE T from_state(const Arguments& a, const Place& place, int64_t step) {
  const int64_t slot = step - (a.length - a.width + 1);
  if (!a.dstate.data || slot < 0 || step < begin_at(a, a.length - 1)) return 0;
  return a.dstate.get<T>(place.batch, place.channel, slot);
}

template <class T> MEDSSM_INLINE void write_step(const Arguments& a, const Place& place, int64_t step, T value) {
  if (step >= 0)
    write<T>(a.dx, a.x.type, (place.batch * a.length + token_at(a, step)) * a.channels + place.channel, value);
  else if (a.dinitial)
    write<T>(a.dinitial, a.initial.type, (place.batch * a.channels + place.channel) * (a.width - 1) + step + a.width - 1, value);
}

// Adds a block's runs and writes a row of the sums.
template <class T> __device__ void write_sum(const Arguments& a, const Place& place, int term, T own) {
  T* parts = shared_memory<T>();
  __syncthreads();
  parts[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x >= kColumns || place.channel >= a.channels) return;
  T sum = 0;
  for (int run = 0; run < kRuns; ++run) sum += parts[run * kColumns + threadIdx.x];
  const int64_t row = blockIdx.x / ceil_div(a.channels, kColumns);
  static_cast<T*>(a.sums)[(row * (a.width + 1) + term) * a.channels + place.channel] = sum;
}

// Four taps: outputs in order, each added to the steps that it saw, which are done when the last of them has passed.
template <class T, int kWidth> __global__ void __launch_bounds__(kThreads) backward(Arguments a) {
  const Place place(a, ceil_div(a.length + kWidth - 1, kRun), kWidth - 1);
  T dweight[kWidth] = {}, dbias = 0;
  if (place.live) {
    const T bias = a.bias.data ? a.bias.get<T>(place.channel) : T(0);
    const Weights<T, kWidth> weight(a, place);
    Window<T, kWidth> window(a, place, place.first);
    T open[kWidth] = {};  // gradients of steps t - kWidth + 1 … t
    const int64_t end = least(a.length, place.first + kRun);
#pragma unroll 2
    for (int64_t t = place.first; t < end + kWidth - 1; ++t) {
      window.move(tap_at<T>(a, place, t));
      const T g = inner_gradient<T, kWidth>(a, place, t, bias, weight, window);
      const int64_t begin = t >= 0 && t < a.length ? begin_at(a, t) : 0;
#pragma unroll
      for (int j = 0; j + 1 < kWidth; ++j) open[j] = open[j + 1];
      open[kWidth - 1] = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (t - kWidth + 1 + j >= begin) {
          open[j] = fma(g, weight(a, place, j), open[j]);
          if (t < end) dweight[j] = fma(g, window.tap(a, place, t, j), dweight[j]);
        }
      if (t < end) dbias += g;
      const int64_t done = t - kWidth + 1;
      if (done >= place.first) write_step<T>(a, place, done, open[0] + from_state<T>(a, place, done));
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) write_sum<T>(a, place, j, dweight[j]);
  write_sum<T>(a, place, kWidth, dbias);
}

// Any width: a step gathers from the outputs that saw it; then each weight gathers over the run.
template <class T> __global__ void __launch_bounds__(kThreads, 1) backward_any(Arguments a) {
  const int width = static_cast<int>(a.width);
  const Place place(a, ceil_div(a.length + width - 1, kRun), width - 1);
  const T bias = a.bias.data && place.live ? a.bias.get<T>(place.channel) : T(0);
  const Weights<T, 0> weight(a, place);
  const Window<T, 0> window(a, place, 0);
  const int64_t end = place.live ? least(a.length, place.first + kRun) : place.first;
  for (int64_t step = place.first; step < end; ++step) {
    T sum = from_state<T>(a, place, step);
    for (int k = 0; k < width; ++k) {
      const int64_t t = step + k;
      if (t >= 0 && t < a.length && begin_at(a, t) <= step)
        sum = fma(inner_gradient<T, 0>(a, place, t, bias, weight, window), weight(a, place, width - 1 - k), sum);
    }
    write_step<T>(a, place, step, sum);
  }
  for (int j = 0; j <= width; ++j) {
    T sum = 0;
    for (int64_t t = most<int64_t>(place.first, 0); t < end; ++t) {
      const T g = inner_gradient<T, 0>(a, place, t, bias, weight, window);
      if (j == width)
        sum += g;
      else if (t - width + 1 + j >= begin_at(a, t))
        sum = fma(g, window.tap(a, place, t, j), sum);
    }
    write_sum<T>(a, place, j, sum);
  }
}

int64_t blocks(const Arguments& a, int64_t steps) { return a.batch * ceil_div(ceil_div(steps, kRun), kRuns) * ceil_div(a.channels, kColumns); }

template <class T> void run_forward(const Arguments& a) {
  launch(a.width == 4 ? forward<T, 4> : forward<T, 0>, blocks(a, a.length), kThreads, 0, a.stream, a);
}
template <class T> void run_backward(const Arguments& a) {
  launch(a.width == 4 ? backward<T, 4> : backward_any<T>, blocks(a, a.length + a.width - 1), kThreads, kThreads * sizeof(T), a.stream, a);
}

}  // namespace

MEDSSM_CUDA_EXPORT(causal_conv1d_forward, Arguments) { (a.wide ? run_forward<double> : run_forward<float>)(a); }
MEDSSM_CUDA_EXPORT(causal_conv1d_backward, Arguments) { (a.wide ? run_backward<double> : run_backward<float>)(a); }

}  // namespace medssm
