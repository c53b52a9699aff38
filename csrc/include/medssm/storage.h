// Storage types, and functions of single numbers that CPU and CUDA kernels share.
//
// Storage types are float, double, BFloat16 and Float16; to_compute<T> and to_storage<S> convert between storage and the compute type T (float or
// double). MEDSSM_INLINE functions run on host and device. Everything has internal linkage.
#pragma once
#include <cstdint>
#include <cstring>

#include "medssm/abi.h"

#if defined(__CUDACC__)
#define MEDSSM_INLINE __host__ __device__ __forceinline__
#else
#define MEDSSM_INLINE inline __attribute__((always_inline, unused))
#endif

namespace medssm {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From> MEDSSM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T> MEDSSM_INLINE constexpr T least(T a, T b) { return b < a ? b : a; }
template <class T> MEDSSM_INLINE constexpr T most(T a, T b) { return a < b ? b : a; }

MEDSSM_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MEDSSM_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T> MEDSSM_INLINE T to_compute(float x) { return static_cast<T>(x); }
template <class T> MEDSSM_INLINE T to_compute(double x) { return static_cast<T>(x); }
template <class T> MEDSSM_INLINE T to_compute(BFloat16 x) { return static_cast<T>(bit_cast<float>(static_cast<uint32_t>(x.bits) << 16)); }
template <class T> MEDSSM_INLINE T to_compute(Float16 x) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(x.bits));
  return static_cast<T>(converted);
#else
  // Move exponent and mantissa to their positions in a float. Then correct the exponent bias with a multiplication, which is exact for denormals too.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  float value = bit_cast<float>(magnitude) * 0x1p112f;
  if (magnitude >= 0x7c00u << 13) value = bit_cast<float>(magnitude | 0x7f800000u);
  return static_cast<T>(bit_cast<float>(bit_cast<uint32_t>(value) | sign));
#endif
}

template <class S> MEDSSM_INLINE S to_storage(float x);
template <> MEDSSM_INLINE float to_storage<float>(float x) { return x; }
template <> MEDSSM_INLINE double to_storage<double>(float x) { return static_cast<double>(x); }
template <> MEDSSM_INLINE BFloat16 to_storage<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  BFloat16 converted;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted.bits) : "f"(x));
  return converted;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
#endif
}
template <> MEDSSM_INLINE Float16 to_storage<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted.bits) : "f"(x));
  return converted;
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;
  else if (magnitude >= 0x477ff000)
    half = 0x7c00;  // 65520 and above round to infinity
  else if (magnitude < 0x38800000)
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;  // denormal: adding 0.5 rounds to a multiple of 2^-24
  else
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  return {static_cast<uint16_t>(half | sign)};
#endif
}
template <class S> MEDSSM_INLINE S to_storage(double x) { return to_storage<S>(static_cast<float>(x)); }
template <> MEDSSM_INLINE double to_storage<double>(double x) { return x; }

// Calls body(pointer), where pointer is data cast to the storage type `dtype`.
template <class Body> MEDSSM_INLINE void with_storage(int64_t dtype, const void* data, Body&& body) {
  switch (dtype) {
    case kFloat32:
      return body(static_cast<const float*>(data));
    case kFloat64:
      return body(static_cast<const double*>(data));
    case kBFloat16:
      return body(static_cast<const BFloat16*>(data));
    default:
      return body(static_cast<const Float16*>(data));
  }
}
template <class Body> MEDSSM_INLINE void with_storage(int64_t dtype, void* data, Body&& body) {
  switch (dtype) {
    case kFloat32:
      return body(static_cast<float*>(data));
    case kFloat64:
      return body(static_cast<double*>(data));
    case kBFloat16:
      return body(static_cast<BFloat16*>(data));
    default:
      return body(static_cast<Float16*>(data));
  }
}

}  // namespace
}  // namespace medssm
