// exp2, softplus and sigmoid on vectors of float (a few ulp) and of double (the C library's).
#pragma once
#include <cmath>

#include "medssm/simd.h"

namespace medssm {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x. Float: 2 ulp; 0 and inf where they belong for finite x, NaN kept. x = -inf is for the caller to keep out (clamp).
template <class T>
inline Vec<T> exp2(Vec<T> x) {
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

#if defined(__AVX512F__)
// 2^(i/32) for the 32 values of i.
alignas(64) constexpr float kExp2Table[32] = {
    1.0f, 1.0218971487f, 1.0442737824f, 1.0671404007f, 1.0905077327f, 1.1143867426f, 1.1387886348f, 1.1637248588f,
    1.1892071150f, 1.2152473600f, 1.2418578121f, 1.2690509572f, 1.2968395547f, 1.3252366432f, 1.3542555469f, 1.3839098820f,
    1.4142135624f, 1.4451808070f, 1.4768261459f, 1.5091644276f, 1.5422108254f, 1.5759808451f, 1.6104903319f, 1.6457554782f,
    1.6817928305f, 1.7186192981f, 1.7562521604f, 1.7947090750f, 1.8340080864f, 1.8741676341f, 1.9152065614f, 1.9571441241f};

// x = n + r with n a multiple of 1/32: adding 1.5 * 2^18 leaves n's fraction in the low five bits of the sum, the index of a table of 32
// held in two registers; 2^r = 1 + r (c1 + c2 r) for |r| <= 1/64 (minimax, 5e-8); vscalefps multiplies by 2^floor(n), subnormals, 0 and inf
// included. Seven operations of the FMA ports.
template <>
inline __attribute__((always_inline)) Vec<float> exp2<float>(Vec<float> x) {
  const __m512 magic = _mm512_set1_ps(393216.0f);
  const __m512 sum = _mm512_add_ps((__m512)x, magic), n = _mm512_sub_ps(sum, magic), r = _mm512_sub_ps((__m512)x, n);
  const __m512 power = _mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), _mm512_castps_si512(sum), _mm512_load_ps(kExp2Table + 16));
  const __m512 q = _mm512_mul_ps(_mm512_fmadd_ps(_mm512_set1_ps(0.2402265312f), r, _mm512_set1_ps(0.6931573305f)), r);
  return (Vec<float>)_mm512_scalef_ps(_mm512_fmadd_ps(power, q, power), n);
}
#else
// x = n + r with n an integer: adding 1.5 * 2^23 leaves n in the low bits of the sum; 2^r by a minimax polynomial of degree 5 (1e-7); n goes
// into the exponent. Results below 2^-126 and above 2^127.99 saturate there.
template <>
inline __attribute__((always_inline)) Vec<float> exp2<float>(Vec<float> x) {
  constexpr float kMagic = 12582912.0f;
  const Vec<float> low = splat(-126.0f), high = splat(127.99f);
  x = x < low ? low : x;  // a NaN compares false and stays
  x = x > high ? high : x;
  const Vec<float> sum = x + kMagic, r = x - (sum - kMagic);
  Vec<float> p = r * 0.001326472712f + 0.009671512645f;
  p = p * r + 0.05550733743f;
  p = p * r + 0.2402224209f;
  p = p * r + 0.6931469776f;
  p = p * r + 1.0f;
  using Bits = Words<kLanes<float>>;
  return (Vec<float>)((Bits)p + ((Bits)sum << 23));
}
#endif

template <class T>
inline Vec<T> absolute(Vec<T> x) { return x < 0 ? -x : x; }
template <class T>
inline Vec<T> at_least(Vec<T> x, T low) { return x < low ? splat<T>(low) : x; }  // NaN stays
template <class T>
inline Vec<T> at_most(Vec<T> x, T high) { return x > high ? splat<T>(high) : x; }

template <class T>
inline Vec<T> exp(Vec<T> x) {
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::exp(x[i]);
  return x;
}
template <>
inline Vec<float> exp<float>(Vec<float> x) { return exp2<float>(at_most<float>(at_least<float>(x * float(kLog2E), -150), 150)); }

// softplus(x) = log(1 + e^x) and its derivative, sigmoid(x), from one exponential.
template <class T>
struct Softplus {
  Vec<T> value, slope;
};
template <class T>
inline Softplus<T> softplus(Vec<T> x) {
  Softplus<T> out;
  for (int i = 0; i < kLanes<T>; ++i) {
    const T e = std::exp(-std::fabs(x[i]));
    out.value[i] = std::log1p(e) + (x[i] > 0 ? x[i] : 0);
    out.slope[i] = (x[i] < 0 ? e : T(1)) / (1 + e);
  }
  return out;
}
// log1p(e) = 2 atanh(w) with w = e / (e + 2) <= 1/3: an odd polynomial, relative error 1e-7 however small e is.
template <>
inline Softplus<float> softplus<float>(Vec<float> x) {
  const Vec<float> e = exp<float>(-absolute<float>(x)), w = e / (e + 2), w2 = w * w;
  Vec<float> p = w2 * 0.140059935f + 0.1400090262f;
  p = p * w2 + 0.2001076362f;
  p = p * w2 + 0.3333320814f;
  p = p * w2 + 1.0f;
  return {2 * w * p + at_least<float>(x, 0), (x < 0 ? e : splat(1.0f)) / (1 + e)};
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) { return 1 / (1 + exp<T>(-x)); }

}  // namespace
}  // namespace medssm
