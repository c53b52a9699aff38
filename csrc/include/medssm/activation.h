// softplus, sigmoid and silu with their derivatives. The same code works on vectors on the CPU and on single numbers on a GPU.
#pragma once
#include "medssm/lanes.h"

namespace medssm {
namespace {

// e^-|x|, in [0, 1]; NaN for NaN. A result below the normal numbers may be a small positive number instead.
template <class T> MEDSSM_INLINE Vec<T> exp_minus_abs(Vec<T> x) { return exp_bounded<T>(max(splat(-kExpBound<T>), -abs(x))); }

// ln(1 + e) for e in [0, 1]. The relative error is small even for the smallest e.
template <class T> MEDSSM_INLINE Vec<T> log1p_unit(Vec<T> e);
#if defined(__AVX512F__) && !defined(MEDSSM_DEVICE)
// c = 1 / (1 + i / 32) rounded to float, and -ln(c).
alignas(64) constexpr float kInverseTable[32] = {1.000000000f, 0.969696999f, 0.941176474f, 0.914285719f, 0.888888896f, 0.864864886f, 0.842105269f,
                                                 0.820512831f, 0.800000012f, 0.780487776f, 0.761904776f, 0.744186044f, 0.727272749f, 0.711111128f,
                                                 0.695652187f, 0.680851042f, 0.666666687f, 0.653061211f, 0.639999986f, 0.627451003f, 0.615384638f,
                                                 0.603773594f, 0.592592597f, 0.581818163f, 0.571428597f, 0.561403513f, 0.551724136f, 0.542372882f,
                                                 0.533333361f, 0.524590135f, 0.516129017f, 0.507936537f};
alignas(64) constexpr float kLogTable[32] = {-0.000000000f, 0.030771628f, 0.060624618f, 0.089612156f, 0.117783025f, 0.145181984f, 0.171850249f,
                                             0.197825730f,  0.223143533f, 0.247836202f, 0.271933705f, 0.295464218f, 0.318453699f, 0.340926558f,
                                             0.362905473f,  0.384411722f, 0.405465066f, 0.426084429f, 0.446287125f, 0.466089696f, 0.485507786f,
                                             0.504556000f,  0.523248136f, 0.541597307f, 0.559615731f, 0.577315331f, 0.594707131f, 0.611801565f,
                                             0.628608584f,  0.645138025f, 0.661398530f, 0.677398741f};
// ln(1 + e) = ln((1 + e) c) - ln(c), where c is the table's value nearest to 1 / (1 + e). (1 + e) c is near 1, and (1 + e) c - 1 = e c + (c - 1) has
// no cancellation error: c - 1 is exact, and the FMA rounds once.
template <> MEDSSM_INLINE Floats log1p_unit<float>(Floats e) {
  const Ints32 nearest = bit_cast<Ints32>(min(splat(0.97f), e) + kRound<float>);
  const Floats c = (Floats)_mm512_permutex2var_ps(_mm512_load_ps(kInverseTable), (__m512i)nearest, _mm512_load_ps(kInverseTable + 16));
  const Floats whole = (Floats)_mm512_permutex2var_ps(_mm512_load_ps(kLogTable), (__m512i)nearest, _mm512_load_ps(kLogTable + 16));
  const Floats r = fma(e, c, c - 1.f);
  Floats p = fma(splat(-0.25f), r, splat(0.33333333f));
  p = fma(p, r, splat(-0.5f));
  return fma(r, fma(p, r, splat(1.f)), whole);
}
#else
// 2 atanh(s), s = e / (2 + e)
template <> MEDSSM_INLINE Vec<float> log1p_unit<float>(Vec<float> e) {
  const Vec<float> s = quotient<float>(e, e + 2.f), w = s * s;
  Vec<float> p = fma(splat(0.28011987f), w, splat(0.2800180524f));
  p = fma(p, w, splat(0.4002152724f));
  p = fma(p, w, splat(0.6666641628f));
  return s * fma(p, w, splat(2.f));
}
#endif
template <> MEDSSM_INLINE Vec<double> log1p_unit<double>(Vec<double> e) {
  const Vec<double> s = e / (e + 2.), w = s * s;
  Vec<double> p = splat(2. / 35);
  for (int k = 16; k >= 0; --k) p = fma(p, w, splat(2. / (2 * k + 1)));
  return s * p;
}

// softplus(x) = ln(1 + e^x) and its derivative, which is sigmoid(x), from e = exp_minus_abs(x).
template <class T> struct Softplus {
  Vec<T> value, slope;
};
template <class T> MEDSSM_INLINE Softplus<T> softplus_of(Vec<T> x, Vec<T> e) {
  const Vec<T> one = splat(static_cast<T>(1));
  return {max(Vec<T>{}, x) + log1p_unit<T>(e), quotient<T>(select(x < 0, e, one), one + e)};
}

// 1 / (1 + e^-x) for x >= kSigmoidFrom<T>. In this range the result and its reciprocal are normal numbers.
template <class T> constexpr T kSigmoidFrom = sizeof(T) == 4 ? T(-86) : T(-690);
template <class T> MEDSSM_INLINE Vec<T> sigmoid_bounded(Vec<T> x) {
  const Vec<T> one = splat(static_cast<T>(1));
  return quotient<T>(one, one + exp_bounded<T>(max(splat(-kExpBound<T>), -x)));
}

// silu(x) = x sigmoid(x) and its derivative, both from one exponential. For x below kSigmoidFrom<T>, silu is almost 0, and x is replaced by
// kSigmoidFrom<T>, because sigmoid_bounded does not become smaller below it.
template <class T> struct Silu {
  Vec<T> value, slope;
};
template <class T> MEDSSM_INLINE Silu<T> silu_and_slope(Vec<T> x) {
  const Vec<T> kept = max(splat(kSigmoidFrom<T>), x), s = sigmoid_bounded<T>(kept), one = splat(static_cast<T>(1));
  return {kept * s, s * fma(kept, one - s, one)};
}
template <class T> MEDSSM_INLINE Vec<T> silu(Vec<T> x) { return silu_and_slope<T>(x).value; }
template <class T> MEDSSM_INLINE Vec<T> silu_slope(Vec<T> x) { return silu_and_slope<T>(x).slope; }

}  // namespace
}  // namespace medssm
