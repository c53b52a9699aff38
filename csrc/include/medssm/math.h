// exp2 and exp on vectors: f<float>(Floats), f<double>(Doubles).
//
// The error for float is about 2 units in the last place, and about half a unit for 2^x near x = 0. Near 0 it must be small, because a scan with
// small steps multiplies thousands of such factors, and a systematic error would add up. The relative error for double is about 1e-15.
#pragma once
#include <cmath>

#include "medssm/simd.h"

// Stops the compiler from fusing the product x and the additions after it into FMAs. Separate additions are faster: they do not use the multiplier,
// which limits the speed.
#if defined(__x86_64__)
#define MEDSSM_OPAQUE(x) asm("" : "+v"(x))
#else
#define MEDSSM_OPAQUE(x) (void)(x)
#endif

namespace medssm {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A decay below this, or its logarithm, makes a state smaller than the rounding error of what is added to it. The gradient of the logarithm is then
// set to 0: it would be the difference of two sums that are equal but for their rounding errors.
template <class T> constexpr T kNegligibleDecay = sizeof(T) == 4 ? T(0x1p-30) : T(0x1p-60);
template <class T> constexpr T kNegligibleLog = static_cast<T>(kLn2 * (sizeof(T) == 4 ? -30 : -60));

// x = n + r, where n is the nearest multiple of a fixed power of two. `shifted` has n in its low bits.
template <class T> struct Split {
  Vec<T> shifted, n, r;
};

// 2^(n + r).
template <class T> MEDSSM_INLINE Vec<T> exp2_of(const Split<T>& x);

#if defined(__AVX512F__)

template <class T> constexpr T kExp2Bound = sizeof(T) == 4 ? T(65536) : T(1000);
template <class T> constexpr T kRound = sizeof(T) == 4 ? T(393216) : T(6755399441055744);  // 1.5 * 2^18, 1.5 * 2^52: units of 1/32 and 1

// 2^(i / 32)
alignas(64) constexpr float kExp2Table[32] = {1.000000000f, 1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f,
                                              1.163724859f, 1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f,
                                              1.354255547f, 1.383909882f, 1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f,
                                              1.575980845f, 1.610490332f, 1.645755478f, 1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f,
                                              1.834008086f, 1.874167634f, 1.915206561f, 1.957144124f};

// 2^floor(n) * table[32 frac(n)] * (1 + c1 r + c2 r^2). A recurrence with small steps multiplies many such factors near 1, so the relative error of
// 1 - 2^x matters. Therefore c1 and c2 are not the minimax coefficients (error 5e-8 against 2^r). They are nearer to ln 2 and ln(2)^2 / 2
// (error 1.6e-7) and give the smallest error in simulated scans.
template <> MEDSSM_INLINE Floats exp2_of<float>(const Split<float>& x) {
  const Floats scale = (Floats)_mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), (__m512i)x.shifted, _mm512_load_ps(kExp2Table + 16));
  const Floats q = fma(splat(0.24018315f), x.r, splat(0.69315068f)) * x.r;
  return (Floats)_mm512_scalef_ps((__m512)fma(scale, q, scale), (__m512)x.n);
}

#else

template <class T> constexpr T kExp2Bound = sizeof(T) == 4 ? T(125) : T(1000);
template <class T> constexpr T kRound = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5 * 2^23, 1.5 * 2^52: units of 1

// A polynomial for 2^r. n is added to the exponent of its value.
template <> MEDSSM_INLINE Floats exp2_of<float>(const Split<float>& x) {
  Floats p = fma(splat(0.001326472712f), x.r, splat(0.009671512645f));
  p = fma(p, x.r, splat(0.05550733743f));
  p = fma(p, x.r, splat(0.2402224209f));
  p = fma(p, x.r, splat(0.6931469776f));
  p = fma(p, x.r, splat(1.f));
  return bit_cast<Floats>(bit_cast<Ints32>(p) + (bit_cast<Ints32>(x.shifted) << 23));
}

#endif

template <> MEDSSM_INLINE Doubles exp2_of<double>(const Split<double>& x) {
  constexpr double kTaylor[] = {1.,
                                0.6931471805599453,
                                0.2402265069591007,
                                0.055504108664821576,
                                0.009618129107628477,
                                0.0013333558146428441,
                                0.00015403530393381606,
                                1.5252733804059838e-05,
                                1.3215486790144305e-06,
                                1.0178086009239696e-07,
                                7.054911620801121e-09,
                                4.44553827187081e-10,
                                2.5678435993488196e-11};  // ln(2)^k / k!
  Doubles p = splat(kTaylor[12]);
  for (int k = 11; k >= 0; --k) p = fma(p, x.r, splat(kTaylor[k]));
  return bit_cast<Doubles>(bit_cast<Ints64>(p) + (bit_cast<Ints64>(x.shifted) << 52));
}

// 2^x for |x| <= kExp2Bound<T>, and NaN for NaN. With AVX-512 it takes four operations of the multiplier, including the product that gives x.
template <class T> MEDSSM_INLINE Vec<T> exp2_bounded(Vec<T> x) {
  MEDSSM_OPAQUE(x);
  const Vec<T> shifted = x + kRound<T>, n = shifted - kRound<T>;
  return exp2_of<T>({shifted, n, x - n});
}

// e^x for |x| <= kExpBound<T>, and NaN for NaN.
template <class T> constexpr T kExpBound = kExp2Bound<T> * T(0.6931);
template <class T> MEDSSM_INLINE Vec<T> exp_bounded(Vec<T> x) {
  const Vec<T> log2e = splat(static_cast<T>(kLog2E)), shifted = fma(x, log2e, splat(kRound<T>)), n = shifted - kRound<T>;
  return exp2_of<T>({shifted, n, fma(x, log2e, -n)});
}

// 2^x for every x: 0 for -inf, inf on overflow, NaN for NaN. Results below the normal numbers may be 0.
template <class T> MEDSSM_INLINE Vec<T> exp2(Vec<T> x) {
  const Vec<T> inside = exp2_bounded<T>(min(splat(kExp2Bound<T>), max(splat(-kExp2Bound<T>), x)));
  const Vec<T> low = select(x < -kExp2Bound<T>, Vec<T>{}, inside);
  return select(x > kExp2Bound<T>, splat(static_cast<T>(INFINITY)), select(x == x, low, x));
}

template <class T> MEDSSM_INLINE Vec<T> exp(Vec<T> x) { return exp2<T>(x * static_cast<T>(kLog2E)); }

// a / b for normal b below 2^126. AVX-512 has an instruction that estimates 1 / b. One Newton step reduces the error to one unit in the last place;
// this takes a third of the time of a division.
template <class T> MEDSSM_INLINE Vec<T> quotient(Vec<T> a, Vec<T> b) { return a / b; }
#if defined(__AVX512F__)
template <> MEDSSM_INLINE Floats quotient<float>(Floats a, Floats b) {
  const Floats estimate = (Floats)_mm512_rcp14_ps((__m512)b);
  return a * fma(estimate, fma(-b, estimate, splat(1.f)), estimate);
}
#endif

}  // namespace
}  // namespace medssm
