// exp2, exp, softplus and sigmoid on vectors: f<float>(Floats), f<double>(Doubles).
//
// Floats are right to about 2 units in the last place, 2^x near x = 0 to half a unit: a scan with small steps multiplies thousands of
// such factors, and a bias there would add up. Doubles are right to about 1e-15.
#pragma once
#include <cmath>

#include "medssm/simd.h"

// Keeps the compiler from fusing the product x into the additions that follow: they run beside the multiplier, not on it.
#if defined(__x86_64__)
#define MEDSSM_OPAQUE(x) asm("" : "+v"(x))
#else
#define MEDSSM_OPAQUE(x) (void)(x)
#endif

namespace medssm {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x for |x| <= kExp2Bound<T>, and NaN for NaN.
template <class T> MEDSSM_INLINE Vec<T> exp2_bounded(Vec<T> x);

#if defined(__AVX512F__)

template <class T> constexpr T kExp2Bound = sizeof(T) == 4 ? T(65536) : T(1000);

// 2^(i / 32)
alignas(64) constexpr float kExp2Table[32] = {
    1.000000000f, 1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f, 1.163724859f,
    1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f,
    1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f, 1.610490332f, 1.645755478f,
    1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f, 1.834008086f, 1.874167634f, 1.915206561f, 1.957144124f};

// x = n + r with n the nearest multiple of 1/32: 2^x = 2^floor(n) * table[32 frac(n)] * (1 + c1 r + c2 r^2). Four operations of the
// multiplier. c1 is ln 2 itself, so that 1 - 2^x is relatively right for small x; c2 then leaves at most 2.5e-7 at r = 1/64.
template <> MEDSSM_INLINE Floats exp2_bounded<float>(Floats x) {
  MEDSSM_OPAQUE(x);
  constexpr float kRound = 393216.f;  // 1.5 * 2^18: its unit in the last place is 1/32, its low five bits are the index
  const Floats shifted = x + kRound, n = shifted - kRound, r = x - n;
  const Floats scale = (Floats)_mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), (__m512i)shifted, _mm512_load_ps(kExp2Table + 16));
  const Floats q = fma(splat(0.24000969f), r, splat(0.69314718f)) * r;
  return (Floats)_mm512_scalef_ps((__m512)fma(scale, q, scale), (__m512)n);
}

#else

template <class T> constexpr T kExp2Bound = sizeof(T) == 4 ? T(125) : T(1000);

// x = n + r with n an integer: a polynomial for 2^r, then n is added to its exponent.
template <> MEDSSM_INLINE Floats exp2_bounded<float>(Floats x) {
  MEDSSM_OPAQUE(x);
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: its unit in the last place is 1
  const Floats shifted = x + kRound, r = x - (shifted - kRound);
  Floats p = fma(splat(0.001326472712f), r, splat(0.009671512645f));
  p = fma(p, r, splat(0.05550733743f));
  p = fma(p, r, splat(0.2402224209f));
  p = fma(p, r, splat(0.6931469776f));
  p = fma(p, r, splat(1.f));
  return bit_cast<Floats>(bit_cast<Ints32>(p) + (bit_cast<Ints32>(shifted) << 23));
}

#endif

template <> MEDSSM_INLINE Doubles exp2_bounded<double>(Doubles x) {
  MEDSSM_OPAQUE(x);
  constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  constexpr double kTaylor[] = {1., 0.6931471805599453, 0.2402265069591007, 0.055504108664821576, 0.009618129107628477,
                                0.0013333558146428441, 0.00015403530393381606, 1.5252733804059838e-05, 1.3215486790144305e-06,
                                1.0178086009239696e-07, 7.054911620801121e-09, 4.44553827187081e-10, 2.5678435993488196e-11};  // ln(2)^k / k!
  const Doubles shifted = x + kRound, r = x - (shifted - kRound);
  Doubles p = splat(kTaylor[12]);
  for (int k = 11; k >= 0; --k) p = fma(p, r, splat(kTaylor[k]));
  return bit_cast<Doubles>(bit_cast<Ints64>(p) + (bit_cast<Ints64>(shifted) << 52));
}

// 2^x for every x: 0 at -inf, inf where it overflows, NaN at NaN. Results below the normal numbers may be 0.
template <class T> MEDSSM_INLINE Vec<T> exp2(Vec<T> x) {
  const Vec<T> inside = exp2_bounded<T>(min(splat(kExp2Bound<T>), max(splat(-kExp2Bound<T>), x)));
  const Vec<T> low = select(x < -kExp2Bound<T>, Vec<T>{}, inside);
  return select(x > kExp2Bound<T>, splat(static_cast<T>(INFINITY)), select(x == x, low, x));
}

template <class T> MEDSSM_INLINE Vec<T> exp(Vec<T> x) { return exp2<T>(x * static_cast<T>(kLog2E)); }

// e^-|x|: in [0, 1], NaN at NaN.
template <class T> MEDSSM_INLINE Vec<T> exp_minus_abs(Vec<T> x) {
  const Vec<T> scaled = abs(x) * static_cast<T>(-kLog2E);
  return select(scaled < -kExp2Bound<T>, Vec<T>{}, exp2_bounded<T>(max(splat(-kExp2Bound<T>), scaled)));
}

// ln(1 + e) for e in [0, 1] as 2 atanh(s), s = e / (2 + e): relatively right down to the smallest e.
template <class T> MEDSSM_INLINE Vec<T> log1p_unit(Vec<T> e);
template <> MEDSSM_INLINE Floats log1p_unit<float>(Floats e) {
  const Floats s = e / (e + 2.f), w = s * s;
  Floats p = fma(splat(0.140059935f), w, splat(0.1400090262f));
  p = fma(p, w, splat(0.2001076362f));
  p = fma(p, w, splat(0.3333320814f));
  p = fma(p, w, splat(1.f));
  return (s + s) * p;
}
template <> MEDSSM_INLINE Doubles log1p_unit<double>(Doubles e) {
  const Doubles s = e / (e + 2.), w = s * s;
  Doubles p = splat(1. / 35);
  for (int k = 16; k >= 0; --k) p = fma(p, w, splat(1. / (2 * k + 1)));
  return (s + s) * p;
}

// softplus(x) = ln(1 + e^x) and its derivative, which is sigmoid(x), from one exponential.
template <class T> struct Softplus { Vec<T> value, slope; };
template <class T> MEDSSM_INLINE Softplus<T> softplus(Vec<T> x) {
  const Vec<T> e = exp_minus_abs<T>(x), one = splat(static_cast<T>(1));
  return {max(Vec<T>{}, x) + log1p_unit<T>(e), select(x < 0, e, one) / (one + e)};
}

template <class T> MEDSSM_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_minus_abs<T>(x), one = splat(static_cast<T>(1));
  return select(x < 0, e, one) / (one + e);
}

}  // namespace
}  // namespace medssm
