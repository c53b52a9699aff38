// The two kinds of pass over the tokens that forward and backward are made of.
#pragma once
#include "state.h"

namespace medssm {
namespace {

// One update, a read-out before it and one behind it:
//
//   S' = e_t S_{t-1};  before_t = S'^T r_t;  S_t = S' + c_t x_t^T;  after_t = S_t^T s_t
//
// Coefficients: c, r, s (kSlots 3), or c = r, s (kSlots 2). x(j, before) gives token j's x; out(j, after, own, x) takes the read-out without the
// token's own update, and the factor of x_t in it.
template <class T, int kVectors, int kSlots, class X, class Out>
MEDSSM_INLINE void write_then_read(State<T, kVectors, kSlots, 1>& state, const T* const* const (&coefficients)[kSlots], const T* e,
                                   const Ahead& ahead, const X& x_of, const Out& out) {
  using L = Lanes<T, kVectors>;
  T products[kProducts];
  L read[2 * kBlock], x[kBlock];
  state.take(coefficients, ahead, products, read);
  T decay = T(1), since[kBlock];  // of the state before the block, and of each earlier token's update
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    decay *= e[j];
    L before_j = decay * read[j], after = decay * read[kBlock + j];
#pragma GCC unroll 4
    for (int i = 0; i < j; ++i) {
      since[i] *= e[j];
      before_j = before_j + (since[i] * products[before(i, j)]) * x[i];
      after = after + (since[i] * products[upto(i, j)]) * x[i];
    }
    since[j] = T(1);
    x[j] = x_of(j, before_j);
    out(j, after, products[upto(j, j)], x[j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) state.update(0, j, since[j] * x[j]);
  state.decay(decay);
}

// The adjoint's kind, from the last token to the first: an update, a read-out, another update.
//
//   X + c_t x_t^T;  read_t = (X + c_t x_t^T)^T r_t;  X_{t-1} = e_t (X + c_t x_t^T - d_t y_t^T)
//
// Coefficients: c, d, r (kSlots 3), or c, d = r (kSlots 2). x[j] is token j's x; y(j, later, own) gives its y, from the read-out without the token's
// own first update, and the factor of x_t in it.
template <class T, int kVectors, int kSlots, class Y>
MEDSSM_INLINE void read_between(State<T, kVectors, kSlots, 2>& state, const T* const* const (&coefficients)[kSlots], const T* e, const Ahead& ahead,
                                const Lanes<T, kVectors>* x, const Y& y_of) {
  using L = Lanes<T, kVectors>;
  T products[kProducts];
  L read[kBlock], y[kBlock];
  state.take(coefficients, ahead, products, read);
  T decay = T(1), since[kBlock];
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    L later = decay * read[j];
#pragma GCC unroll 4
    for (int i = 0; i < j; ++i) {
      later = later + (since[i] * products[upto(i, j)]) * x[i] - (since[i] * products[before(i, j)]) * y[i];
      since[i] *= e[j];
    }
    y[j] = y_of(j, later, products[upto(j, j)]);
    since[j] = e[j];
    decay *= e[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    state.update(0, j, since[j] * x[j]);
    state.update(1, j, -since[j] * y[j]);
  }
  state.decay(decay);
}

}  // namespace
}  // namespace medssm
