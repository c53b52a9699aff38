// The GPU version of the functions of lanes.h, and code shared by the GPU kernels: launches, loads and stores, sums across lanes.
//
// A thread computes one number at a time: Vec<T> is T. Kernels use only dynamic shared memory, as `shared_memory<T>()`, and synchronise only with
// __syncthreads and __shfl_xor_sync. So tests/emulation can run them on a CPU.
#pragma once
#include <cuda_runtime.h>

#include "medssm/storage.h"

// An exported kernel is written as MEDSSM_CUDA_EXPORT(name, Arguments) { ... uses `a`, a const Arguments& ... }. The first field of the struct is the
// stream. The exported function returns null, or the text of an error, and throws nothing. Like MEDSSM_EXPORT (abi.h), it also
// exports the size of the struct.
#define MEDSSM_CUDA_EXPORT(name, Arguments)                                                                                              \
  static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) % 8 == 0, "fields of 8 bytes, as struct.pack writes them"); \
  static void run_##name(const Arguments& a);                                                                                            \
  MEDSSM_VISIBLE int64_t medssm_##name##_bytes_cuda() { return sizeof(Arguments); }                                                      \
  MEDSSM_VISIBLE const char* medssm_##name##_cuda(const Arguments* a) {                                                                  \
    return medssm::launch_status([a] { run_##name(*a); });                                                                               \
  }                                                                                                                                      \
  static void run_##name(const Arguments& a)

namespace medssm {
namespace {

template <class T> using Vec = T;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T> MEDSSM_INLINE T splat(T x) { return x; }
template <class T> MEDSSM_INLINE T select(bool mask, T a, T b) { return mask ? a : b; }
template <class T> MEDSSM_INLINE T min(T bound, T x) { return bound < x ? bound : x; }
template <class T> MEDSSM_INLINE T max(T bound, T x) { return bound > x ? bound : x; }
template <class T> MEDSSM_INLINE T abs(T x) { return x < 0 ? -x : x; }
MEDSSM_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
MEDSSM_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }

// a / b. For float, 1 / b comes from the special-function unit; the error is at most 2 units in the last place for normal b below 2^126.
template <class T> MEDSSM_INLINE T quotient(T a, T b) { return a / b; }
// 2^x. For float, it comes from the special-function unit too; the error is at most 2 units in the last place.
// Results below the normal numbers are 0.
template <class T> MEDSSM_INLINE T exp2(T x) { return ::exp2(x); }
#if defined(__CUDA_ARCH__)
template <> MEDSSM_INLINE float quotient<float>(float a, float b) { return __fdividef(a, b); }
template <> MEDSSM_INLINE float exp2<float>(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
#else
template <> MEDSSM_INLINE float exp2<float>(float x) { return ::exp2f(x); }
#endif

// e^x for |x| <= kExpBound<T>. In this range the result and its reciprocal are normal numbers.
template <class T> constexpr T kExpBound = sizeof(T) == 4 ? T(86) : T(690);
template <class T> MEDSSM_INLINE T exp_bounded(T x) { return exp2<T>(x * static_cast<T>(kLog2E)); }

// -- memory -------------------------------------------------------------------------------------------------------------------------

// Element `at` of a tensor whose storage type is known only at run time. All threads take the same branch, so this is cheap.
template <class T> MEDSSM_INLINE T read(const void* data, int64_t type, int64_t at) {
  switch (type) {
    case kFloat32:
      return to_compute<T>(static_cast<const float*>(data)[at]);
    case kFloat64:
      return to_compute<T>(static_cast<const double*>(data)[at]);
    case kBFloat16:
      return to_compute<T>(static_cast<const BFloat16*>(data)[at]);
    default:
      return to_compute<T>(static_cast<const Float16*>(data)[at]);
  }
}
template <class T> MEDSSM_INLINE void write(void* data, int64_t type, int64_t at, T value) {
  switch (type) {
    case kFloat32:
      static_cast<float*>(data)[at] = to_storage<float>(value);
      break;
    case kFloat64:
      static_cast<double*>(data)[at] = to_storage<double>(value);
      break;
    case kBFloat16:
      static_cast<BFloat16*>(data)[at] = to_storage<BFloat16>(value);
      break;
    default:
      static_cast<Float16*>(data)[at] = to_storage<Float16>(value);
      break;
  }
}

// A tensor of any strides, in elements. data may be null if a call has no such tensor.
template <int kDims> struct Strided {
  const void* data;
  int64_t type, stride[kDims];
  template <class... I> MEDSSM_INLINE int64_t at(I... index) const {
    static_assert(sizeof...(I) == kDims, "an index for each dimension");
    const int64_t indices[] = {static_cast<int64_t>(index)...};
    int64_t offset = 0;
    for (int i = 0; i < kDims; ++i) offset += indices[i] * stride[i];
    return offset;
  }
  template <class T, class... I> MEDSSM_INLINE T get(I... index) const { return read<T>(data, type, at(index...)); }
};

// The same as `read`, in two steps: `load` loads the bits from memory, `value` converts them. So a thread can start several loads before it waits for
// the first one.
template <class T> struct Bits;
template <> struct Bits<float> {
  uint32_t bits;
  MEDSSM_INLINE void load(const void* data, int64_t type, int64_t at) {
    if (type == kFloat32)
      bits = static_cast<const uint32_t*>(data)[at];
    else
      bits = static_cast<const uint16_t*>(data)[at];
  }
  MEDSSM_INLINE float value(int64_t type) const {
    if (type == kFloat32) return bit_cast<float>(bits);
    if (type == kBFloat16) return bit_cast<float>(bits << 16);
    return to_compute<float>(Float16{static_cast<uint16_t>(bits)});
  }
};
template <> struct Bits<double> {
  double number;
  MEDSSM_INLINE void load(const void* data, int64_t type, int64_t at) { number = read<double>(data, type, at); }
  MEDSSM_INLINE double value(int64_t) const { return number; }
};

#if defined(__CUDACC__)
// The block's shared memory.
template <class T> __device__ T* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return reinterpret_cast<T*>(memory);
}
#endif

// -- across lanes -------------------------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;

// Sums each of `kCount` values over a group of lanes: the lanes whose numbers differ only in the bits with values low, 2 low, …, high / 2. kCount,
// low and high are powers of two. While a lane has more than one value, each step halves their number: two lanes exchange values, and each keeps the
// sums of one half. At the end values[0 … kept) of a lane are the sums of the values from the returned index on, kept = max(1, kCount * low / high).
// If there are more lanes than values, several lanes have the same sums.
template <int kCount, class T> __device__ __forceinline__ int sum_across(T* values, int low, int high) {
  const int lane = threadIdx.x % kWarp;
  int first = 0;
  int bit = high / 2;
  if constexpr (kCount > 1) {
    if (bit >= low) {
      constexpr int kHalf = kCount / 2;
      const bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const T kept = upper ? values[i + kHalf] : values[i], sent = upper ? values[i] : values[i + kHalf];
        values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, bit);
      }
      first = upper ? kHalf : 0;
      return first + sum_across<kHalf>(values, low, bit);
    }
    return 0;
  } else {
    for (; bit >= low; bit /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], bit);
    return 0;
  }
}

// -- launches -----------------------------------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
// All blocks are along the grid's first axis. Only this axis allows more than 65,535 blocks.
template <class... P, class... A> void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t bytes, void* stream, A... arguments) {
  if (blocks > 0) kernel<<<static_cast<unsigned>(blocks), threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
}
#endif

// Runs `launches`. Returns null, or the text of the error.
template <class Launches> const char* launch_status(const Launches& launches) noexcept {
  try {
    launches();
  } catch (...) { return "an exception on the host"; }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace medssm
