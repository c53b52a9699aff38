// Depthwise convolution on a GPU.
//
// A thread has one channel, neighbours neighbouring ones, and a run of kRun positions along the last axis: for each row of the kernel it reads the
// kRun + side - 1 values that the run sees there once, all under way together, and the caches hold what the next rows and runs read again. The
// gradient of x is the same kernel with its offsets turned round, on the gradient before the activation, which is worked out first and kept in the
// compute type (without an activation it is dout itself). The gradient of the weight has a block per row of the kernel and share of the volume's
// rows, so that each pair of values read serves the whole row of offsets; blocks are added by PyTorch in a fixed order: no atomics.
#include <type_traits>

#include "medssm/activation.h"

namespace medssm {
namespace {

constexpr int kColumns = 64, kRuns = 4, kThreads = kColumns * kRuns, kRun = 8;

// kernels/depthwise_conv/cuda.py packs this. Images and sequences are volumes with leading axes of size 1.
struct Arguments {
  void* stream;
  Strided<5> x;       // (b, z, y, x, d)
  Strided<4> weight;  // (d, z, y, x)
  Strided<1> bias;    // (d,), may be null
  Strided<5> dout;    // as x; null but for the gradient before the activation and that of the weight
  void* out;          // contiguous
  int64_t out_type, batch, size[3], channels, side[3];
  int64_t turned, silu, wide;
  int64_t share, shares;  // rows along the last axis that a block sums the gradient of the weight over, and shares of an image's
};

struct Place {
  int64_t batch, z, y;
  int x, channel;
  bool live;

  __device__ explicit Place(const Arguments& a) {
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

// out_p = act(bias + sum_o weight_o x_{p+o}); turned: of x_{p-o}, without bias and activation. With dout: out_p is instead dout_p times the
// activation's derivative there. kSide: of the kernel's last axis, 0 where known at the launch only.
template <class T, int kSide> __global__ void __launch_bounds__(kThreads) convolve(Arguments a) {
  const Place place(a);
  if (!place.live) return;
  const int side = kSide ? kSide : static_cast<int>(a.side[2]), sign = a.turned ? -1 : 1;
  const T bias = a.bias.data ? a.bias.get<T>(place.channel) : T(0);
  T sums[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) sums[i] = bias;
#pragma unroll 1
  for (int row = 0; row < a.side[0] * a.side[1]; ++row) {
    const int kz = row / static_cast<int>(a.side[1]), ky = row % static_cast<int>(a.side[1]);
    const int64_t z = place.z + sign * (kz - a.side[0] / 2), y = place.y + sign * (ky - a.side[1] / 2);
    if (z < 0 || z >= a.size[0] || y < 0 || y >= a.size[1]) continue;
    const int64_t line = a.x.at(place.batch, z, y, 0, place.channel);
    if (kSide) {
      constexpr int kSeen = kRun + kSide - 1;
      Bits<T> bits[kSeen];
      T weight[kSide ? kSide : 1];
#pragma unroll
      for (int i = 0; i < kSeen; ++i) {
        const int64_t x = place.x + i - kSide / 2;
        if (x >= 0 && x < a.size[2]) bits[i].load(a.x.data, a.x.type, line + x * a.x.stride[3]);
      }
#pragma unroll
      for (int k = 0; k < kSide; ++k) weight[k] = a.weight.get<T>(place.channel, kz, ky, a.turned ? kSide - 1 - k : k);
#pragma unroll
      for (int i = 0; i < kSeen; ++i) {
        const int64_t x = place.x + i - kSide / 2;
        const T value = x >= 0 && x < a.size[2] ? bits[i].value(a.x.type) : T(0);
#pragma unroll
        for (int k = 0; k < kSide; ++k)
          if (i - k >= 0 && i - k < kRun) sums[i - k] = fma(weight[k], value, sums[i - k]);
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < side; ++k) {
        const T weight = a.weight.get<T>(place.channel, kz, ky, a.turned ? side - 1 - k : k);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int64_t x = place.x + i + k - side / 2;
          if (x >= 0 && x < a.size[2]) sums[i] = fma(weight, read<T>(a.x.data, a.x.type, line + x * a.x.stride[3]), sums[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int64_t x = place.x + i;
    if (x >= a.size[2]) break;
    T value = sums[i];
    if (a.dout.data)
      value = silu_slope<T>(value) * a.dout.get<T>(place.batch, place.z, place.y, x, place.channel);
    else if (a.silu)
      value = silu<T>(value);
    write<T>(a.out, a.out_type, (((place.batch * a.size[0] + place.z) * a.size[1] + place.y) * a.size[2] + x) * a.channels + place.channel, value);
  }
}

// out (batch * shares, offsets + 1, channels), the compute type: the sum over a share's rows of g_p x_{p+o}, behind the offsets of g_p alone. g is
// dout here. A block has a row of the kernel; the row through its centre sums g too.
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

  const auto add_up = [&](int64_t term, T own) {  // over the block's rows of threads
    __syncthreads();
    parts[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x < kColumns && live) {
      T sum = 0;
      for (int i = 0; i < kRuns; ++i) sum += parts[i * kColumns + threadIdx.x];
      out[term * a.channels + channel] = sum;
    }
  };
  // The sums of kCount offsets from `from` on, and of g.
  constexpr int kSpan = kSide ? kRun : kRun / 2;  // positions whose values are under way together
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
        Bits<T> g[kSpan], seen[kSpan + kCount - 1];
#pragma unroll
        for (int i = 0; i < kSpan; ++i)
          if (begin + i < a.size[2]) g[i].load(a.dout.data, a.dout.type, g_line + (begin + i) * a.dout.stride[3]);
#pragma unroll
        for (int i = 0; i < kSpan + kCount - 1; ++i) {
          const int64_t x = begin + i + from - side / 2;
          if (inside && x >= 0 && x < a.size[2]) seen[i].load(a.x.data, a.x.type, x_line + x * a.x.stride[3]);
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
          const T value = inside && x >= 0 && x < a.size[2] ? seen[i].value(a.x.type) : T(0);
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
