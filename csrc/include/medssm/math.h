// exp2, exp, softplus and sigmoid on vectors, for Floats and Doubles.
//
// Floats are right to about 2 units in the last place, and 2^x near x = 0 to half a unit: a scan with small steps multiplies
// thousands of such factors, and a bias there would add up. Doubles are right to about 1e-15.
#pragma once
#include <cmath>

#include "medssm/simd.h"

// Keeps the compiler from fusing the product x into the additions that follow: they run on other pipes than the multiplier.
#if defined(__x86_64__)
#define MEDSSM_OPAQUE(x) asm("" : "+v"(x))
#else
#define MEDSSM_OPAQUE(x) (void)(x)
#endif

namespace medssm {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x for |x| <= kExp2Bound<T>; and NaN for NaN. The result may overflow to infinity.
#if defined(__AVX512F__)

template <class T> constexpr T kExp2Bound = sizeof(T) == 4 ? T(65536) : T(1000);

alignas(64) constexpr float kExp2Table[32] = {
    1.000000000f, 1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f, 1.163724859f,
    1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f,
    1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f, 1.610490332f, 1.645755478f,
    1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f, 1.834008086f, 1.874167634f, 1.915206561f, 1.957144124f};

// x = n + r with n the nearest multiple of 1/32: 2^x = 2^floor(n) * table[32 frac(n)] * 2^r, the last by a parabola.
MEDSSM_INLINE Floats exp2_bounded(Floats x) {
  MEDSSM_OPAQUE(x);
  constexpr float kRound = 393216.f;  // 1.5 * 2^18: its unit in the last place is 1/32
  const Floats shifted = x + kRound, n = shifted - kRound, r = x - n;
  const Floats scale = (Floats)_mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), (__m512i)shifted, _mm512_load_ps(kExp2Table + 16));
  const Floats q = (0.2402265312f * r + 0.6931573303f) * r;
  return (Floats)_mm512_scalef_ps((__m512)(scale * q + scale), (__m512)n);
}

#else

template <class T> constexpr T kExp2Bound = sizeof(T) == 4 ? T(125) : T(1000);

// x = n + r with n an integer: a polynomial for 2^r, then n is added to its exponent.
MEDSSM_INLINE Floats exp2_bounded(Floats x) {
  MEDSSM_OPAQUE(x);
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23
  const Floats shifted = x + kRound, r = x - (shifted - kRound);
  Floats p = 0.001326472712f * r + 0.009671512645f;
  p = p * r + 0.05550733743f;
  p = p * r + 0.2402224209f;
  p = p * r + 0.6931469776f;
  p = p * r + 1.f;
  return bit_cast<Floats>(bit_cast<Ints32>(p) + (bit_cast<Ints32>(shifted) << 23));
}

#endif

MEDSSM_INLINE Doubles exp2_bounded(Doubles x) {
  constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  const Doubles shifted = x + kRound, r = x - (shifted - kRound);
  constexpr double kTaylor[] = {1., 0.6931471805599453, 0.24022650695910072, 0.05550410866482158, 0.009618129107628477,
                                0.0013333558146428443, 0.0001540353039338161, 1.525273380405984e-05, 1.3215486790144307e-06,
                                1.0178086009239699e-07, 7.054911620801122e-09, 4.445538271870811e-10, 2.5678435993488196e-11};  // ln(2)^k / k!
  Doubles p = splat(kTaylor[12]);
  for (int k = 11; k >= 0; --k) p = p * r + kTaylor[k];
  return bit_cast<Doubles>(bit_cast<Ints64>(p) + (bit_cast<Ints64>(shifted) << 52));
}

// 2^x for every x: 0 at -inf, inf where it overflows, NaN at NaN; results below the normal numbers may be 0.
template <class V> MEDSSM_INLINE V exp2(V x) {
  using T = Element<V>;
  const V inside = exp2_bounded(min(splat(kExp2Bound<T>), max(splat(-kExp2Bound<T>), x)));
  const V low = select(x < -kExp2Bound<T>, V{}, inside);
  const V high = select(x > kExp2Bound<T>, splat(static_cast<T>(INFINITY)), low);
  return select(x == x, high, x);
}

template <class V> MEDSSM_INLINE V exp(V x) { return exp2(x * static_cast<Element<V>>(kLog2E)); }

// e^-|x|: in (0, 1], NaN at NaN.
template <class V> MEDSSM_INLINE V exp_minus_abs(V x) {
  using T = Element<V>;
  const V scaled = abs(x) * static_cast<T>(-kLog2E), inside = exp2_bounded(max(splat(-kExp2Bound<T>), scaled));
  return select(scaled < -kExp2Bound<T>, V{}, inside);
}

// ln(1 + e) for e in [0, 1] as 2 atanh(s), s = e / (2 + e), relatively exact down to the smallest e.
MEDSSM_INLINE Floats log1p_unit(Floats e) {
  const Floats s = e / (e + 2.f), w = s * s;
  Floats p = 0.140059935f * w + 0.1400090262f;
  p = p * w + 0.2001076362f;
  p = p * w + 0.3333320814f;
  p = p * w + 1.f;
  return (s + s) * p;
}
MEDSSM_INLINE Doubles log1p_unit(Doubles e) {
  const Doubles s = e / (e + 2.), w = s * s;
  Doubles p = splat(1. / 35);
  for (int k = 16; k >= 0; --k) p = p * w + 1. / (2 * k + 1);
  return (s + s) * p;
}

template <class V> MEDSSM_INLINE V softplus(V x) { return max(V{}, x) + log1p_unit(exp_minus_abs(x)); }

// 1 / (1 + e^-x), which is also softplus'.
template <class V> MEDSSM_INLINE V sigmoid(V x) {
  const V e = exp_minus_abs(x), one = splat(static_cast<Element<V>>(1));
  return select(x < 0, e, one) / (one + e);
}

template <class V> MEDSSM_INLINE V silu(V x) { return x * sigmoid(x); }

// d silu(x) / dx, given sigmoid(x).
template <class V> MEDSSM_INLINE V silu_slope(V x, V sigmoid) {
  const V one = splat(static_cast<Element<V>>(1));
  return sigmoid * (x * (one - sigmoid) + one);
}

}  // namespace
}  // namespace medssm
