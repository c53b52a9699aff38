// silu(x) = x sigmoid(x) and its derivative.
#pragma once
#include "medssm/math.h"

namespace medssm {
namespace {

template <class T> MEDSSM_INLINE Vec<T> silu(Vec<T> x) { return x * sigmoid<T>(x); }
template <class T> MEDSSM_INLINE Vec<T> silu_slope(Vec<T> x) {
  const Vec<T> s = sigmoid<T>(x), one = splat(T(1));
  return s * (x * (one - s) + one);
}

}  // namespace
}  // namespace medssm
