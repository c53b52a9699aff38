// silu(x) = x sigmoid(x) and its derivative.
#pragma once
#include "medssm/math.h"

namespace medssm {
namespace {

template <class T> struct Silu { Vec<T> value, slope; };

// Both from one exponential. Below kSigmoidFrom<T> silu is 0 to the last place, and x is kept there: sigmoid stops short of 0.
template <class T> MEDSSM_INLINE Silu<T> silu_and_slope(Vec<T> x) {
  const Vec<T> kept = max(splat(kSigmoidFrom<T>), x), s = sigmoid_bounded<T>(kept), one = splat(static_cast<T>(1));
  return {kept * s, s * fma(kept, one - s, one)};
}
template <class T> MEDSSM_INLINE Vec<T> silu(Vec<T> x) { return silu_and_slope<T>(x).value; }
template <class T> MEDSSM_INLINE Vec<T> silu_slope(Vec<T> x) { return silu_and_slope<T>(x).slope; }

}  // namespace
}  // namespace medssm
