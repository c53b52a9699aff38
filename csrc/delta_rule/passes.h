// The two kinds of pass over the tokens. Forward and backward consist of these.
#pragma once
#include "state.h"

namespace medssm {
namespace {

// For each token: one read-out before the update, the update, and one read-out after it:
//
//   S' = e_t S_{t-1};  before_t = S'^T r_t;  S_t = S' + c_t x_t^T;  after_t = S_t^T s_t
//
// The coefficients that the state has packed: c, r, s (kSlots 3), or c = r, s (kSlots 2); products: theirs. part: of the item. x_of(j, before)
// returns x of token j. out(j, after, own, x) gets the read-out after the update in two parts: after_t = after + own * x.
template <class T, int kVectors, int kSlots, class X, class Out>
MEDSSM_INLINE void write_then_read(State<T, kVectors, kSlots, 1>& state, int part, const T* products, const T* e, const Prefetch& prefetch,
                                   const X& x_of, const Out& out) {
  using L = Lanes<T, kVectors>;
  L read[2 * kBlock], x[kBlock];
  state.read(part, prefetch, read);
  T decay = T(1), since[kBlock];  // decay: of the state before the block; since[i]: of token i's update, since token i
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
  for (int j = 0; j < kBlock; ++j) state.update(part, 0, j, since[j] * x[j]);
  state.decay(part, decay);
}

// The adjoint, from the last token to the first. For each token: an update, a read-out, and a second update.
//
//   read_t = (X_t + c_t x_t^T)^T r_t;  X_{t-1} = e_t (X_t + c_t x_t^T - d_t y_t^T)
//
// The packed coefficients: c, d, r (kSlots 3), or c, d = r (kSlots 2). x[j] is x of token j. y_of(j, later, own) returns y of token j. It gets the
// read-out in two parts: read_t = later + own * x[j].
template <class T, int kVectors, int kSlots, class Y> MEDSSM_INLINE void read_between(State<T, kVectors, kSlots, 2>& state, int part,
                                                                                      const T* products, const T* e, const Prefetch& prefetch,
                                                                                      const Lanes<T, kVectors>* x, const Y& y_of) {
  using L = Lanes<T, kVectors>;
  L read[kBlock], y[kBlock];
  state.read(part, prefetch, read);
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
    state.update(part, 0, j, since[j] * x[j]);
    state.update(part, 1, j, -since[j] * y[j]);
  }
  state.decay(part, decay);
}

}  // namespace
}  // namespace medssm
