// Rotations of pairs of adjacent channels, tanh and sigmoid, on vectors of T.
#pragma once
#include <cmath>

#include "medssm/activation.h"
#include "medssm/shuffle.h"

namespace medssm {
namespace {

// f of each lane, by the standard library.
template <class F> MEDSSM_INLINE Doubles by_lane(Doubles x, const F& f) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

// tanh(x). The relative error for float is about 2 units in the last place. Small x has a polynomial: the quotient would cancel.
template <class T> MEDSSM_INLINE Vec<T> tanh(Vec<T> x);
template <> MEDSSM_INLINE Floats tanh<float>(Floats x) {
  const Floats u = x * x, e = exp_minus_abs<float>(x + x), one = splat(1.f);
  Floats p = fma(splat(-0.00570498677f), u, splat(0.020639087f));  // fitted to (tanh(x) / x - 1) / x^2
  p = fma(p, u, splat(-0.053739715f));
  p = fma(p, u, splat(0.133314422f));
  p = fma(p, u, splat(-0.3333328194f));
  const Floats large = quotient<float>(one - e, one + e);
  return select(u < 0.390625f, fma(p * u, x, x), select(x < 0, -large, large));
}
template <> MEDSSM_INLINE Doubles tanh<double>(Doubles x) {
  return by_lane(x, [](double lane) { return std::tanh(lane); });
}

// 1 / (1 + e^-x).
template <class T> MEDSSM_INLINE Vec<T> sigmoid(Vec<T> x) { return softplus_of<T>(x, exp_minus_abs<T>(x)).slope; }

template <class T> struct Rotation {
  Vec<T> cos, sin;
};

// Of an angle in revolutions, from -1/2 to 1/2.
template <class T> MEDSSM_INLINE Rotation<T> rotation_of(Vec<T> revolutions);
template <> MEDSSM_INLINE Rotation<float> rotation_of<float>(Floats revolutions) {
  constexpr double w = 6.283185307179586 * 6.283185307179586;
  constexpr float kSin[] = {6.283185307179586f, static_cast<float>(-6.283185307179586 * w / 6), static_cast<float>(6.283185307179586 * w * w / 120),
                            static_cast<float>(-6.283185307179586 * w * w * w / 5040),
                            static_cast<float>(6.283185307179586 * w * w * w * w / 362880)};
  constexpr float kCos[] = {1.f, static_cast<float>(-w / 2), static_cast<float>(w * w / 24), static_cast<float>(-w * w * w / 720),
                            static_cast<float>(w * w * w * w / 40320)};
  // The nearest quarter of a revolution, in the low bits of `shifted`; the rest is at most 1/8, where Taylor's series are short.
  const Floats shifted = fma(revolutions, splat(4.f), splat(12582912.f)), quarter = shifted - 12582912.f;
  const Floats rest = fma(quarter, splat(-0.25f), revolutions), u = rest * rest;
  Floats sin = splat(kSin[4]), cos = splat(kCos[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) {
    sin = fma(sin, u, splat(kSin[i]));
    cos = fma(cos, u, splat(kCos[i]));
  }
  sin = sin * rest;
  const Ints32 turns = bit_cast<Ints32>(shifted), odd = -(turns & 1);
  const Floats c = select(odd, sin, cos), s = select(odd, cos, sin);
  return {bit_cast<Floats>(bit_cast<Ints32>(c) ^ (((turns + 1) & 2) << 30)), bit_cast<Floats>(bit_cast<Ints32>(s) ^ ((turns & 2) << 30))};
}
template <> MEDSSM_INLINE Rotation<double> rotation_of<double>(Doubles revolutions) {
  const Doubles angle = revolutions * 6.283185307179586;
  return {by_lane(angle, [](double lane) { return std::cos(lane); }), by_lane(angle, [](double lane) { return std::sin(lane); })};
}

struct Twice {  // lane i of the first half, in lanes 2i and 2i + 1
  static constexpr int at(int i) { return i / 2; }
};
struct Swapped {  // lanes 2i and 2i + 1 exchanged
  static constexpr int at(int i) { return i ^ 1; }
};
struct Even {  // lanes 0, 2, … of the two vectors
  static constexpr int at(int i) { return 2 * i; }
};
template <class T> MEDSSM_INLINE Vec<T> swapped(Vec<T> x) { return shuffle<T, Swapped>(x, x); }

// x with the sign of its even lanes changed.
template <class T> MEDSSM_INLINE Vec<T> negate_even(Vec<T> x) {
  Vec<T> signs;
  for (int i = 0; i < kLanes<T>; ++i) signs[i] = static_cast<T>(i % 2 ? 1 : -1);
  return x * signs;
}

// The rotation of each pair of lanes, from the angles in the first half of the lanes: cos twice, and -sin, sin.
template <class T> MEDSSM_INLINE Rotation<T> pairs_of(Vec<T> revolutions) {
  const Rotation<T> r = rotation_of<T>(shuffle<T, Twice>(revolutions, revolutions));
  return {r.cos, negate_even<T>(r.sin)};
}

// Turns each pair of lanes of x, or turns it back.
template <class T> MEDSSM_INLINE Vec<T> turned(Vec<T> x, const Rotation<T>& by) { return fma(swapped<T>(x), by.sin, x * by.cos); }
template <class T> MEDSSM_INLINE Vec<T> turned_back(Vec<T> x, const Rotation<T>& by) { return fma(-swapped<T>(x), by.sin, x * by.cos); }

// The gradient of the angle that turned a pair of lanes to x, from the gradient d of x: d_odd x_even - d_even x_odd, in the first half of the lanes.
template <class T> MEDSSM_INLINE Vec<T> angle_gradient(Vec<T> d, Vec<T> x) {
  const Vec<T> product = d * swapped<T>(x), difference = swapped<T>(product) - product;
  return shuffle<T, Even>(difference, difference);
}

}  // namespace
}  // namespace medssm
