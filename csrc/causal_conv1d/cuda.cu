// Causal depthwise convolution on a GPU.
//
// Memory traffic limits the speed, so every value is read once and written once. Neighbouring threads have neighbouring channels, so that any order
// of tokens reads whole rows. A thread has one channel and walks a run of kRun steps. It keeps the last inputs in registers, and loads several steps
// at a time. This holds for width 4; other widths read each input again for every tap, from the caches.
//
// Backward: a thread continues for width - 1 steps after the end of its run, because the gradients of those steps are needed for the run's tokens. So
// these steps are computed twice, and no workspace is needed. The gradients of weight and bias are added in registers over a run, in shared memory
// over the runs of a block, and by PyTorch over blocks. No atomic operations are used.
//
// Packed sequences: the taps of a segment's first steps read the initial state of the sequence that begins with it. Backward, one more kernel
// computes the gradients of these states.
#include "medssm/activation.h"

namespace medssm {
namespace {

constexpr int kColumns = 64, kRuns = 4, kThreads = kColumns * kRuns, kRun = 32, kAhead = 4;

// kernels/causal_conv1d/cuda.py packs this struct.
struct Arguments {
  void* stream;
  Strided<3> x;        // (b, l, d)
  Strided<2> weight;   // (d, w)
  Strided<1> bias;     // (d,), may be null
  Strided<3> initial;  // (b, d, w - 1), or null for zeros; of packed sequences (n, d, w - 1), like all states
  const int64_t *index,
      *begin;  // (l,): index: the token of each step, null for raster order; begin: the first step that each step's taps may read, null: no limit
  const int64_t *segment, *table;  // of packed sequences, else null: (l,) the segment of each step; (segments, 4), see Segment
  int64_t segments;
  int64_t reverse, batch, length, channels, width, silu, wide;
  void* out;                // contiguous, in x's type
  Strided<3> dout, dstate;  // used by backward: (b, l, d); (b, d, w - 1) or null
  void *dx, *dinitial;      // contiguous, in the types of x and initial; dinitial may be null
  void* sums;               // (blocks of runs, w + 1, d), in the compute type: partial sums of dweight, then of dbias
};

struct Position {
  int64_t batch, run, first;  // run: index in the batch element; first: the run's first step
  int channel;
  bool live;

  // Of no run.
  __device__ Position(int64_t batch_, int channel_) : batch(batch_), run(0), first(0), channel(channel_), live(true) {}

  // The run and channel of this thread. Run i begins at step i * kRun - early.
  __device__ Position(const Arguments& a, int64_t runs, int early) {
    const int64_t tiles = ceil_div(a.channels, kColumns), groups = ceil_div(runs, kRuns), at = blockIdx.x / tiles;
    channel = static_cast<int>(blockIdx.x % tiles) * kColumns + static_cast<int>(threadIdx.x) % kColumns;
    batch = at / groups;
    run = at % groups * kRuns + static_cast<int>(threadIdx.x) / kColumns;
    first = run * kRun - early;
    live = channel < a.channels && run < runs;
  }
};

// A segment of packed sequences: its first step, the step after its last, the sequences that begin and end with it, or -1.
struct Segment {
  int64_t begin, end, opening, closing;
};
MEDSSM_INLINE const Segment& segment_of(const Arguments& a, int64_t step) { return reinterpret_cast<const Segment*>(a.table)[a.segment[step]]; }

MEDSSM_INLINE int64_t token_at(const Arguments& a, int64_t step) {
  const int64_t at = a.reverse ? a.length - 1 - step : step;
  return a.index ? a.index[at] : at;
}

// The input at a step: a token, a value of the initial state before step 0, or zero.
template <class T> MEDSSM_INLINE T tap_at(const Arguments& a, const Position& position, int64_t step) {
  if (step >= a.length) return 0;
  if (step >= 0) return a.x.get<T>(position.batch, token_at(a, step), position.channel);
  const int64_t slot = step + a.width - 1;
  return a.initial.data && !a.table && slot >= 0 ? a.initial.get<T>(position.batch, position.channel, slot) : T(0);
}
// The first step that the taps at `step` may read with tap_at.
MEDSSM_INLINE int64_t begin_at(const Arguments& a, int64_t step) {
  if (a.table) return segment_of(a, step).begin;
  return a.begin ? a.begin[step] : 1 - a.width;
}
// What a tap reads before the first step of its segment, if sequences are packed.
template <class T> MEDSSM_INLINE T early_tap(const Arguments& a, const Position& position, const Segment& segment, int64_t tap) {
  if (!a.initial.data || segment.opening < 0) return 0;
  return a.initial.get<T>(segment.opening, position.channel, tap - segment.begin + a.width - 1);
}

// The kWidth inputs that a step's taps read. kWidth > 0: kept in registers and shifted by one at each step. kWidth 0: any width, read from memory at
// each use.
template <class T, int kWidth> class Window {
 public:
  // The window just before `step`: call `move` with the input at `step`.
  __device__ Window(const Arguments& a, const Position& position, int64_t step) {
#pragma unroll
    for (int j = 1; j < kWidth; ++j) taps_[j] = tap_at<T>(a, position, step - kWidth + j);
  }
  __device__ void move(T next) {
#pragma unroll
    for (int j = 0; j + 1 < kWidth; ++j) taps_[j] = taps_[j + 1];
    taps_[kWidth - 1] = next;
  }
  __device__ T tap(const Arguments&, const Position&, int64_t, int j) const { return taps_[j]; }

 private:
  T taps_[kWidth];
};
template <class T> class Window<T, 0> {
 public:
  __device__ Window(const Arguments&, const Position&, int64_t) {}
  __device__ void move(T) {}
  __device__ T tap(const Arguments& a, const Position& position, int64_t step, int j) const { return tap_at<T>(a, position, step - a.width + 1 + j); }
};

// weight_j of a channel: in registers if the width is known at compile time.
template <class T, int kWidth> class Weights {
 public:
  __device__ Weights(const Arguments& a, const Position& position) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) weights_[j] = position.live ? a.weight.get<T>(position.channel, j) : T(0);
  }
  __device__ T operator()(const Arguments&, const Position&, int j) const { return weights_[j]; }

 private:
  T weights_[kWidth];
};
template <class T> class Weights<T, 0> {
 public:
  __device__ Weights(const Arguments&, const Position&) {}
  __device__ T operator()(const Arguments& a, const Position& position, int j) const { return a.weight.get<T>(position.channel, j); }
};

// bias + sum_j weight_j tap_j at `step`, which is the last step in the window.
template <class T, int kWidth> __device__ T before_activation(const Arguments& a, const Position& position, int64_t step, T bias,
                                                              const Weights<T, kWidth>& weight, const Window<T, kWidth>& window) {
  const int width = kWidth ? kWidth : static_cast<int>(a.width);
  const int64_t begin = begin_at(a, step);
  T y = bias;
#pragma unroll
  for (int j = 0; j < width; ++j)
    if (step - width + 1 + j >= begin)
      y = fma(weight(a, position, j), window.tap(a, position, step, j), y);
    else if (a.table)
      y = fma(weight(a, position, j), early_tap<T>(a, position, segment_of(a, step), step - width + 1 + j), y);
  return y;
}

template <class T, int kWidth> __global__ void __launch_bounds__(kThreads) forward(Arguments a) {
  const Position position(a, ceil_div(a.length, kRun), 0);
  if (!position.live) return;
  const T bias = a.bias.data ? a.bias.get<T>(position.channel) : T(0);
  const Weights<T, kWidth> weight(a, position);
  Window<T, kWidth> window(a, position, position.first);
  const int64_t end = least(a.length, position.first + kRun);
  for (int64_t step = position.first; step < end; step += kAhead) {
    Bits<T> bits[kAhead];
    int64_t tokens[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (step + i < end) {
        tokens[i] = token_at(a, step + i);
        if (kWidth) bits[i].load(a.x.data, a.x.type, a.x.at(position.batch, tokens[i], position.channel));
      }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (step + i < end) {
        if (kWidth) window.move(bits[i].value(a.x.type));
        T y = before_activation<T, kWidth>(a, position, step + i, bias, weight, window);
        if (a.silu) y = silu<T>(y);
        write<T>(a.out, a.x.type, (position.batch * a.length + tokens[i]) * a.channels + position.channel, y);
      }
  }
}

// The gradient before the activation at `step`, which is the last step in the window; 0 if there is no such step.
template <class T, int kWidth> __device__ T preactivation_gradient(const Arguments& a, const Position& position, int64_t step, T bias,
                                                                   const Weights<T, kWidth>& weight, const Window<T, kWidth>& window) {
  if (step < 0 || step >= a.length) return 0;
  T g = a.dout.get<T>(position.batch, token_at(a, step), position.channel);
  if (a.silu) g *= silu_slope<T>(before_activation<T, kWidth>(a, position, step, bias, weight, window));
  return g;
}

// The gradient that the input at `step` gets from the final state.
template <class T> MEDSSM_INLINE T from_state(const Arguments& a, const Position& position, int64_t step) {
  if (a.table) {
    if (!a.dstate.data || step < 0) return 0;
    const Segment& segment = segment_of(a, step);
    const int64_t slot = step - (segment.end - a.width + 1);
    return segment.closing >= 0 && slot >= 0 ? a.dstate.get<T>(segment.closing, position.channel, slot) : T(0);
  }
  const int64_t slot = step - (a.length - a.width + 1);
  if (!a.dstate.data || slot < 0 || step < begin_at(a, a.length - 1)) return 0;
  return a.dstate.get<T>(position.batch, position.channel, slot);
}

template <class T> MEDSSM_INLINE void write_step(const Arguments& a, const Position& position, int64_t step, T value) {
  if (step >= 0)
    write<T>(a.dx, a.x.type, (position.batch * a.length + token_at(a, step)) * a.channels + position.channel, value);
  else if (a.dinitial && !a.table)
    write<T>(a.dinitial, a.initial.type, (position.batch * a.channels + position.channel) * (a.width - 1) + step + a.width - 1, value);
}

// Adds one term over the runs of a block and writes it as a row of `sums`.
template <class T> __device__ void write_sum(const Arguments& a, const Position& position, int term, T own) {
  T* parts = shared_memory<T>();
  __syncthreads();
  parts[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x >= kColumns || position.channel >= a.channels) return;
  T sum = 0;
  for (int run = 0; run < kRuns; ++run) sum += parts[run * kColumns + threadIdx.x];
  const int64_t row = blockIdx.x / ceil_div(a.channels, kColumns);
  static_cast<T*>(a.sums)[(row * (a.width + 1) + term) * a.channels + position.channel] = sum;
}

// For a width known at compile time. At each output step, its gradient is added to the kWidth inputs that its taps read. The gradient of an input is
// complete after the last step that reads it, and is then written.
template <class T, int kWidth> __global__ void __launch_bounds__(kThreads) backward(Arguments a) {
  const Position position(a, ceil_div(a.length + kWidth - 1, kRun), kWidth - 1);
  T dweight[kWidth] = {}, dbias = 0;
  if (position.live) {
    const T bias = a.bias.data ? a.bias.get<T>(position.channel) : T(0);
    const Weights<T, kWidth> weight(a, position);
    Window<T, kWidth> window(a, position, position.first);
    T pending[kWidth] = {};  // gradients of steps t - kWidth + 1 … t
    const int64_t end = least(a.length, position.first + kRun);
#pragma unroll 2
    for (int64_t t = position.first; t < end + kWidth - 1; ++t) {
      window.move(tap_at<T>(a, position, t));
      const T g = preactivation_gradient<T, kWidth>(a, position, t, bias, weight, window);
      const int64_t begin = t >= 0 && t < a.length ? begin_at(a, t) : 0;
#pragma unroll
      for (int j = 0; j + 1 < kWidth; ++j) pending[j] = pending[j + 1];
      pending[kWidth - 1] = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (t - kWidth + 1 + j >= begin) {
          pending[j] = fma(g, weight(a, position, j), pending[j]);
          if (t < end) dweight[j] = fma(g, window.tap(a, position, t, j), dweight[j]);
        } else if (a.table && t >= 0 && t < end) {
          dweight[j] = fma(g, early_tap<T>(a, position, segment_of(a, t), t - kWidth + 1 + j), dweight[j]);
        }
      if (t < end) dbias += g;
      const int64_t done = t - kWidth + 1;
      if (done >= position.first) write_step<T>(a, position, done, pending[0] + from_state<T>(a, position, done));
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) write_sum<T>(a, position, j, dweight[j]);
  write_sum<T>(a, position, kWidth, dbias);
}

// For any width. The gradient of an input is the sum over the output steps that read it. Then the gradient of each weight is the sum over the run.
template <class T> __global__ void __launch_bounds__(kThreads, 1) backward_any(Arguments a) {
  const int width = static_cast<int>(a.width);
  const Position position(a, ceil_div(a.length + width - 1, kRun), width - 1);
  const T bias = a.bias.data && position.live ? a.bias.get<T>(position.channel) : T(0);
  const Weights<T, 0> weight(a, position);
  const Window<T, 0> window(a, position, 0);
  const int64_t end = position.live ? least(a.length, position.first + kRun) : position.first;
  for (int64_t step = position.first; step < end; ++step) {
    T sum = from_state<T>(a, position, step);
    for (int k = 0; k < width; ++k) {
      const int64_t t = step + k;
      if (t >= 0 && t < a.length && begin_at(a, t) <= step)
        sum = fma(preactivation_gradient<T, 0>(a, position, t, bias, weight, window), weight(a, position, width - 1 - k), sum);
    }
    write_step<T>(a, position, step, sum);
  }
  for (int j = 0; j <= width; ++j) {
    T sum = 0;
    for (int64_t t = most<int64_t>(position.first, 0); t < end; ++t) {
      const T g = preactivation_gradient<T, 0>(a, position, t, bias, weight, window);
      if (j == width)
        sum += g;
      else if (t - width + 1 + j >= begin_at(a, t))
        sum = fma(g, window.tap(a, position, t, j), sum);
      else if (a.table)
        sum = fma(g, early_tap<T>(a, position, segment_of(a, t), t - width + 1 + j), sum);
    }
    write_sum<T>(a, position, j, sum);
  }
}

// Of packed sequences: the gradients of the initial states. A thread has one of their tokens, which the first steps of a segment read.
template <class T> __global__ void __launch_bounds__(kThreads, 1) initial_gradients(Arguments a) {
  const int64_t at = blockIdx.x * int64_t(kThreads) + threadIdx.x, past = a.width - 1;
  if (at >= a.segments * past * a.channels) return;
  const Segment& segment = reinterpret_cast<const Segment*>(a.table)[at / a.channels / past];
  if (segment.opening < 0) return;
  const Position position(0, static_cast<int>(at % a.channels));
  const int64_t slot = at / a.channels % past, step = segment.begin - past + slot;
  const T bias = a.bias.data ? a.bias.get<T>(position.channel) : T(0);
  const Weights<T, 0> weight(a, position);
  const Window<T, 0> window(a, position, 0);
  const int64_t in_final = step - (segment.end - past);
  T sum = a.dstate.data && segment.closing >= 0 && in_final >= 0 ? a.dstate.get<T>(segment.closing, position.channel, in_final) : T(0);
  for (int64_t t = segment.begin; t <= step + past && t < segment.end; ++t)
    sum = fma(preactivation_gradient<T, 0>(a, position, t, bias, weight, window), weight(a, position, static_cast<int>(step + past - t)), sum);
  write<T>(a.dinitial, a.initial.type, (segment.opening * a.channels + position.channel) * past + slot, sum);
}

int64_t blocks(const Arguments& a, int64_t steps) { return a.batch * ceil_div(ceil_div(steps, kRun), kRuns) * ceil_div(a.channels, kColumns); }

template <class T> void run_forward(const Arguments& a) {
  launch(a.width == 4 ? forward<T, 4> : forward<T, 0>, blocks(a, a.length), kThreads, 0, a.stream, a);
}
template <class T> void run_backward(const Arguments& a) {
  launch(a.width == 4 ? backward<T, 4> : backward_any<T>, blocks(a, a.length + a.width - 1), kThreads, kThreads * sizeof(T), a.stream, a);
  if (a.table && a.dinitial) launch(initial_gradients<T>, ceil_div(a.segments * (a.width - 1) * a.channels, kThreads), kThreads, 0, a.stream, a);
}

}  // namespace

MEDSSM_CUDA_EXPORT(causal_conv1d_forward, Arguments) { (a.wide ? run_forward<double> : run_forward<float>)(a); }
MEDSSM_CUDA_EXPORT(causal_conv1d_backward, Arguments) { (a.wide ? run_backward<double> : run_backward<float>)(a); }

}  // namespace medssm
