// Vectors of the full width of the instruction set. One kernel source works for AVX-512, AVX2, SSE2 and any other processor.
//
// `Floats` and `Doubles` are GCC vector extensions (clang has them too), so + - * / and comparisons are written as usual. v * w + x becomes one fused
// multiply-add if the processor has it (-ffp-contract=fast). Storage types are float, double, BFloat16 and Float16. load<T> and store convert between
// the storage type and the compute type T (float or double). load_part and store_part access only the first n elements in memory; load_part sets the
// other lanes to zero.
//
//   using V = Vec<float>;  constexpr int W = kLanes<float>;
//   V x = load<float>(p), y = load_part<float>(q, 3);  store(out, x * splat<float>(2.f) + y);
//
// Everything has internal linkage. So each instruction set's object file has its own copy, and the linker cannot use the code of one for another.
#pragma once
#include <cstdint>
#include <cstring>

#include "medssm/storage.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace medssm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t Ints64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words64 __attribute__((vector_size(kVectorBytes)));

template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  using type = Floats;
  using ints = Ints32;
  using words = Words;
};
template <> struct VectorOf<double> {
  using type = Doubles;
  using ints = Ints64;
  using words = Words64;
};

// The vector of T, the vectors of integers with lanes of the same width, and the number of lanes.
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> using IntVec = typename VectorOf<T>::ints;
template <class T> using UIntVec = typename VectorOf<T>::words;
template <class T> constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T> MEDSSM_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }

// mask ? a : b for each lane. mask is the result of a comparison of vectors.
template <class V, class M> MEDSSM_INLINE V select(M mask, V a, V b) { return bit_cast<V>((bit_cast<M>(a) & mask) | (bit_cast<M>(b) & ~mask)); }

// Lane-wise minimum and maximum. If a lane of `x` is NaN, the result in that lane is NaN.
#if defined(__AVX512F__)
MEDSSM_INLINE Floats min(Floats bound, Floats x) { return (Floats)_mm512_min_ps((__m512)bound, (__m512)x); }
MEDSSM_INLINE Floats max(Floats bound, Floats x) { return (Floats)_mm512_max_ps((__m512)bound, (__m512)x); }
#elif defined(__AVX2__)
MEDSSM_INLINE Floats min(Floats bound, Floats x) { return (Floats)_mm256_min_ps((__m256)bound, (__m256)x); }
MEDSSM_INLINE Floats max(Floats bound, Floats x) { return (Floats)_mm256_max_ps((__m256)bound, (__m256)x); }
#else
MEDSSM_INLINE Floats min(Floats bound, Floats x) { return select(bound < x, bound, x); }
MEDSSM_INLINE Floats max(Floats bound, Floats x) { return select(bound > x, bound, x); }
#endif
MEDSSM_INLINE Doubles min(Doubles bound, Doubles x) { return select(bound < x, bound, x); }
MEDSSM_INLINE Doubles max(Doubles bound, Doubles x) { return select(bound > x, bound, x); }

MEDSSM_INLINE Floats abs(Floats x) { return bit_cast<Floats>(bit_cast<Ints32>(x) & 0x7fffffff); }
MEDSSM_INLINE Doubles abs(Doubles x) { return bit_cast<Doubles>(bit_cast<Ints64>(x) & 0x7fffffffffffffff); }

// The largest of several magnitudes, for each lane. A NaN counts as larger than any number.
template <class T> class Largest {
 public:
  // Adds |x|.
  MEDSSM_INLINE void add(Vec<T> x) { add_positive(abs(x)); }
  // Adds x. It must not be negative, but may be a NaN of any sign.
  MEDSSM_INLINE void add_positive(Vec<T> x) {
    const UIntVec<T> bits = bit_cast<UIntVec<T>>(x);
    bits_ = bits_ > bits ? bits_ : bits;
  }
  MEDSSM_INLINE Vec<T> value() const { return bit_cast<Vec<T>>(bits_); }

 private:
  UIntVec<T> bits_{};  // non-negative floats have the same order as their bits read as integers
};

// Whether every lane is at most `bound`. False if a lane is NaN.
template <class T> MEDSSM_INLINE bool all_at_most(Vec<T> x, T bound) {
  bool inside = true;
  for (int i = 0; i < kLanes<T>; ++i) inside &= x[i] <= bound;
  return inside;
}

// a * b + c, with a single rounding if the processor has FMA. In a sum of two products, an explicit fma determines which product is fused.
#if defined(__AVX512F__)
MEDSSM_INLINE Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
MEDSSM_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__AVX2__)
MEDSSM_INLINE Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
MEDSSM_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
MEDSSM_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
MEDSSM_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }
#endif

// The sum of all lanes, always in the same order.
template <class V> MEDSSM_INLINE auto sum_lanes(V x) {
  auto sum = x[0];
  for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) sum += x[i];
  return sum;
}

// -- loads and stores ---------------------------------------------------------------------------------------------------------------

template <class V, class S> MEDSSM_INLINE V load_bits(const S* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Element by element, for types that have no faster version below.
template <class T, class S> MEDSSM_INLINE Vec<T> load_lanes(const S* p, int n) {
  alignas(kVectorBytes) T lanes[kLanes<T>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_compute<T>(p[i]);
  return load_bits<Vec<T>>(lanes);
}
template <class T, class S> MEDSSM_INLINE void store_lanes(S* p, Vec<T> v, int n) {
  alignas(kVectorBytes) T lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int i = 0; i < n; ++i) p[i] = to_storage<S>(lanes[i]);
}

template <class T, class S> struct Memory {
  static MEDSSM_INLINE Vec<T> load(const S* p) { return load_lanes<T>(p, kLanes<T>); }
  static MEDSSM_INLINE Vec<T> load_part(const S* p, int n) { return load_lanes<T>(p, n); }
  static MEDSSM_INLINE void store(S* p, Vec<T> v) { store_lanes<T>(p, v, kLanes<T>); }
  static MEDSSM_INLINE void store_part(S* p, Vec<T> v, int n) { store_lanes<T>(p, v, n); }
};

template <> struct Memory<double, double> {
  static MEDSSM_INLINE Doubles load(const double* p) { return load_bits<Doubles>(p); }
  static MEDSSM_INLINE Doubles load_part(const double* p, int n) { return load_lanes<double>(p, n); }
  static MEDSSM_INLINE void store(double* p, Doubles v) { std::memcpy(p, &v, sizeof(v)); }
  static MEDSSM_INLINE void store_part(double* p, Doubles v, int n) { store_lanes<double>(p, v, n); }
};

template <> struct Memory<float, float> {
  static MEDSSM_INLINE Floats load(const float* p) { return load_bits<Floats>(p); }
  static MEDSSM_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }
#if defined(__AVX512F__)
  static MEDSSM_INLINE Floats load_part(const float* p, int n) { return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
  static MEDSSM_INLINE void store_part(float* p, Floats v, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v); }
#elif defined(__AVX2__)
  static MEDSSM_INLINE __m256i mask(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static MEDSSM_INLINE Floats load_part(const float* p, int n) { return (Floats)_mm256_maskload_ps(p, mask(n)); }
  static MEDSSM_INLINE void store_part(float* p, Floats v, int n) { _mm256_maskstore_ps(p, mask(n), (__m256)v); }
#else
  static MEDSSM_INLINE Floats load_part(const float* p, int n) { return load_lanes<float>(p, n); }
  static MEDSSM_INLINE void store_part(float* p, Floats v, int n) { store_lanes<float>(p, v, n); }
#endif
};

// 16-bit storage. `Shorts` has the bits of as many numbers as Floats has lanes.
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

template <class S> MEDSSM_INLINE Shorts load_shorts(const S* p, int n) {
#if defined(__AVX512F__)
  return (Shorts)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
#else
  Shorts v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i].bits;
  return v;
#endif
}
template <class S> MEDSSM_INLINE void store_shorts(S* p, Shorts v, int n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)v);
#else
  for (int i = 0; i < n; ++i) p[i].bits = v[i];
#endif
}

MEDSSM_INLINE Floats widen(BFloat16, Shorts bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }
MEDSSM_INLINE Shorts narrow(BFloat16, Floats v) {
  const Words bits = (Words)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  return __builtin_convertvector(select(v == v, rounded, bits | 0x400000) >> 16, Shorts);
}

template <class S> struct Half {
  static MEDSSM_INLINE Floats load(const S* p) { return widen(S{}, load_bits<Shorts>(p)); }
  static MEDSSM_INLINE Floats load_part(const S* p, int n) { return widen(S{}, load_shorts(p, n)); }
  static MEDSSM_INLINE void store(S* p, Floats v) {
    const Shorts bits = narrow(S{}, v);
    std::memcpy(p, &bits, sizeof(bits));
  }
  static MEDSSM_INLINE void store_part(S* p, Floats v, int n) { store_shorts(p, narrow(S{}, v), n); }
};
template <> struct Memory<float, BFloat16> : Half<BFloat16> {};

#if defined(__AVX512F__)
MEDSSM_INLINE Floats widen(Float16, Shorts bits) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
MEDSSM_INLINE Shorts narrow(Float16, Floats v) {
  return (Shorts)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <> struct Memory<float, Float16> : Half<Float16> {};
#elif defined(__AVX2__)
MEDSSM_INLINE Floats widen(Float16, Shorts bits) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }
MEDSSM_INLINE Shorts narrow(Float16, Floats v) { return (Shorts)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <> struct Memory<float, Float16> : Half<Float16> {};
#endif

// Loads kLanes<T> elements, or only the first n.
template <class T, class S> MEDSSM_INLINE Vec<T> load(const S* p) { return Memory<T, S>::load(p); }
template <class T, class S> MEDSSM_INLINE Vec<T> load_part(const S* p, int n) { return Memory<T, S>::load_part(p, n); }

// Stores all lanes, or only the first n. The compute type follows from the vector.
template <class S> MEDSSM_INLINE void store(S* p, Floats v) { Memory<float, S>::store(p, v); }
template <class S> MEDSSM_INLINE void store(S* p, Doubles v) { Memory<double, S>::store(p, v); }
template <class S> MEDSSM_INLINE void store_part(S* p, Floats v, int n) { Memory<float, S>::store_part(p, v, n); }
template <class S> MEDSSM_INLINE void store_part(S* p, Doubles v, int n) { Memory<double, S>::store_part(p, v, n); }

// Stores lanes kFrom, …, kFrom + kCount - 1 without conversion.
template <class T, int kCount, int kFrom = 0> MEDSSM_INLINE void store_first(T* p, Vec<T> v) {
  std::memcpy(p, reinterpret_cast<const char*>(&v) + kFrom * sizeof(T), kCount * sizeof(T));
}

}  // namespace
}  // namespace medssm
