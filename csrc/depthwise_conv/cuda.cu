// Depthwise convolution on a GPU.
//
// A thread has one channel and a run of kRun positions along the last axis. Neighbouring threads have neighbouring channels. For each row of the
// convolution kernel, a thread reads the kRun + side - 1 inputs of its run once. All these loads are started before the first is used. Values that
// the next rows and runs read again come from the caches.
//
// The gradient of x is the same convolution with mirrored offsets, applied to the gradient before the activation. That gradient is computed first and
// stored in the compute type; if there is no activation, it is dout itself. For the gradient of the weight, a block has one row of the convolution
// kernel and a share of the volume's rows. So the values that it reads are used for all offsets of that row. PyTorch adds the blocks in a fixed
// order. No atomic operations are used.
#include <type_traits>

#include "medssm/activation.h"

namespace medssm {
namespace {

constexpr int kColumns = 64, kRuns = 4, kThreads = kColumns * kRuns, kRun = 8;

// kernels/depthwise_conv/cuda.py packs this struct. Images and sequences are volumes whose first axes have size 1.
struct Arguments {
  void* stream;
  Strided<5> x;       // (b, z, y, x, d)
  Strided<4> weight;  // (d, z, y, x)
  Strided<1> bias;    // (d,), may be null
  Strided<5> dout;    // as x; null except for the gradient before the activation and the gradient of the weight
  void* out;          // contiguous
  int64_t out_type, batch, size[3], channels, side[3];
  int64_t mirrored, silu, wide;
  int64_t share, shares;  // for the gradient of the weight: rows (along the last axis) per block, and shares per image
};

struct Position {
  int64_t batch, z, y;
  int x, channel;
  bool live;

  __device__ explicit Position(const Arguments& a) {
    const int64_t tiles = ceil_div(a.channels, kColumns), per_row = ceil_div(a.size[2], kRun);
    const int64_t run = blockIdx.x / tiles * kRuns + threadIdx.x / kColumns, row = run / per_row;
    channel = static_cast<int>(blockIdx.x % tiles) * kColumns + static_cast<int>(threadIdx.x) % kColumns;
    x = static_cast<int>(run % per_row) * kRun;
    y = row % a.size[1];
    z = row / a.size[1] % a.size[0];
    batch = row / a.size[1] / a.size[0];
    live = channel < a.channels && batch < a.batch;
  }
};

// out_p = act(bias + sum_o weight_o x_{p+o}). mirrored: out_p = sum_o weight_o x_{p-o}, without bias and activation. If dout is not null:
// out_p = dout_p act'(bias + sum_o weight_o x_{p+o}). kSide: the side of the kernel along the last axis, 0 if known only at the launch.
template <class T, int kSide> __global__ void __launch_bounds__(kThreads) convolve(Arguments a) {
  const Position position(a);
  if (!position.live) return;
  const int side = kSide ? kSide : static_cast<int>(a.side[2]), sign = a.mirrored ? -1 : 1;
  const T bias = a.bias.data ? a.bias.get<T>(position.channel) : T(0);
  T sums[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) sums[i] = bias;
#pragma unroll 1
  for (int row = 0; row < a.side[0] * a.side[1]; ++row) {
    const int kz = row / static_cast<int>(a.side[1]), ky = row % static_cast<int>(a.side[1]);
    const int64_t z = position.z + sign * (kz - a.side[0] / 2), y = position.y + sign * (ky - a.side[1] / 2);
    if (z < 0 || z >= a.size[0] || y < 0 || y >= a.size[1]) continue;
    const int64_t line = a.x.at(position.batch, z, y, 0, position.channel);
    if (kSide) {
      constexpr int kInputs = kRun + kSide - 1;
      Bits<T> bits[kInputs];
      T weight[kSide ? kSide : 1];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        const int64_t x = position.x + i - kSide / 2;
        if (x >= 0 && x < a.size[2]) bits[i].load(a.x.data, a.x.type, line + x * a.x.stride[3]);
      }
#pragma unroll
      for (int k = 0; k < kSide; ++k) weight[k] = a.weight.get<T>(position.channel, kz, ky, a.mirrored ? kSide - 1 - k : k);
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        const int64_t x = position.x + i - kSide / 2;
        const T value = x >= 0 && x < a.size[2] ? bits[i].value(a.x.type) : T(0);
#pragma unroll
        for (int k = 0; k < kSide; ++k)
          if (i - k >= 0 && i - k < kRun) sums[i - k] = fma(weight[k], value, sums[i - k]);
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < side; ++k) {
        const T weight = a.weight.get<T>(position.channel, kz, ky, a.mirrored ? side - 1 - k : k);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int64_t x = position.x + i + k - side / 2;
          if (x >= 0 && x < a.size[2]) sums[i] = fma(weight, read<T>(a.x.data, a.x.type, line + x * a.x.stride[3]), sums[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int64_t x = position.x + i;
    if (x >= a.size[2]) break;
    T value = sums[i];
    if (a.dout.data)
      value = silu_slope<T>(value) * a.dout.get<T>(position.batch, position.z, position.y, x, position.channel);
    else if (a.silu)
      value = silu<T>(value);
    write<T>(a.out, a.out_type,
             (((position.batch * a.size[0] + position.z) * a.size[1] + position.y) * a.size[2] + x) * a.channels + position.channel, value);
  }
}

// out (batch * shares, offsets + 1, channels), in the compute type: for each offset o the sum of g_p x_{p+o} over a share's rows; last, the sum of
// g_p. a.dout is g here. A block has one row of the convolution kernel; the block with the central row also sums g_p.
template <class T, int kSide> __global__ void __launch_bounds__(kThreads, 1) weights(Arguments a) {
  const int side = kSide ? kSide : static_cast<int>(a.side[2]);
  const int64_t tiles = ceil_div(a.channels, kColumns), rows_of_kernel = a.side[0] * a.side[1];
  const int channel = static_cast<int>(blockIdx.x % tiles) * kColumns + static_cast<int>(threadIdx.x) % kColumns;
  const int64_t kernel_row = blockIdx.x / tiles % rows_of_kernel, share = blockIdx.x / tiles / rows_of_kernel;
  const int64_t batch = share / a.shares, first = share % a.shares * a.share, last = least(first + a.share, a.size[0] * a.size[1]);
  const int64_t kz = kernel_row / a.side[1] - a.side[0] / 2, ky = kernel_row % a.side[1] - a.side[1] / 2;
  const bool live = channel < a.channels, central = kernel_row == rows_of_kernel / 2;
  T* const parts = shared_memory<T>();
  T* const out = static_cast<T*>(a.out) + share * (rows_of_kernel * side + 1) * a.channels;

  const auto add_up = [&](int64_t term, T own) {  // sums over the kRuns threads of a channel
    __syncthreads();
    parts[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x < kColumns && live) {
      T sum = 0;
      for (int i = 0; i < kRuns; ++i) sum += parts[i * kColumns + threadIdx.x];
      out[term * a.channels + channel] = sum;
    }
  };
  // Computes the sums for kCount offsets beginning with `from`, and the sum of g.
  constexpr int kSpan = kSide ? kRun : kRun / 2;  // positions that are loaded at the same time
  const auto gather = [&](int from, auto count, T* sums, T* total) {
    constexpr int kCount = decltype(count)::value;
#pragma unroll 1
    for (int64_t row = first + threadIdx.x / kColumns; live && row < last; row += kRuns) {
      const int64_t z = row / a.size[1], y = row % a.size[1];
      const bool inside = z + kz >= 0 && z + kz < a.size[0] && y + ky >= 0 && y + ky < a.size[1];
      if (!inside && !central) continue;
      const int64_t g_line = a.dout.at(batch, z, y, 0, channel), x_line = inside ? a.x.at(batch, z + kz, y + ky, 0, channel) : 0;
#pragma unroll 1
      for (int64_t begin = 0; begin < a.size[2]; begin += kSpan) {
        Bits<T> g[kSpan], inputs[kSpan + kCount - 1];
#pragma unroll
        for (int i = 0; i < kSpan; ++i)
          if (begin + i < a.size[2]) g[i].load(a.dout.data, a.dout.type, g_line + (begin + i) * a.dout.stride[3]);
#pragma unroll
        for (int i = 0; i < kSpan + kCount - 1; ++i) {
          const int64_t x = begin + i + from - side / 2;
          if (inside && x >= 0 && x < a.size[2]) inputs[i].load(a.x.data, a.x.type, x_line + x * a.x.stride[3]);
        }
        T values[kSpan];
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
          values[i] = begin + i < a.size[2] ? g[i].value(a.dout.type) : T(0);
          *total += values[i];
        }
#pragma unroll
        for (int i = 0; i < kSpan + kCount - 1; ++i) {
          const int64_t x = begin + i + from - side / 2;
          const T value = inside && x >= 0 && x < a.size[2] ? inputs[i].value(a.x.type) : T(0);
#pragma unroll
          for (int k = 0; k < kCount; ++k)
            if (i - k >= 0 && i - k < kSpan) sums[k] = fma(values[i - k], value, sums[k]);
        }
      }
    }
  };

  constexpr int kAtOnce = kSide ? kSide : 1;
  for (int from = 0; from < side; from += kAtOnce) {
    T sums[kAtOnce] = {}, total = 0;
    gather(from, std::integral_constant<int, kAtOnce>{}, sums, &total);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) add_up(kernel_row * side + from + k, sums[k]);
    if (central && from == 0) add_up(rows_of_kernel * side, total);
  }
}

template <class T> void run(const Arguments& a) {
  const int64_t runs = a.batch * a.size[0] * a.size[1] * ceil_div(a.size[2], kRun);
  launch(a.side[2] == 3 ? convolve<T, 3> : convolve<T, 0>, ceil_div(runs, kRuns) * ceil_div(a.channels, kColumns), kThreads, 0, a.stream, a);
}
template <class T> void run_weights(const Arguments& a) {
  const int64_t blocks = a.batch * a.shares * a.side[0] * a.side[1] * ceil_div(a.channels, kColumns);
  launch(a.side[2] == 3 ? weights<T, 3> : weights<T, 0>, blocks, kThreads, kThreads * sizeof(T), a.stream, a);
}

}  // namespace

MEDSSM_CUDA_EXPORT(depthwise_conv_convolve, Arguments) { (a.wide ? run<double> : run<float>)(a); }
MEDSSM_CUDA_EXPORT(depthwise_conv_weights, Arguments) { (a.wide ? run_weights<double> : run_weights<float>)(a); }

}  // namespace medssm
