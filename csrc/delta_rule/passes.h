// The two kinds of pass over the tokens. Forward and backward consist of these.
#pragma once
#include "state.h"

namespace medssm {
namespace {

// The dot products of a packed block, times the decays between the two tokens, and the decays of the block: computed once for all parts of an item.
// e: of the block's tokens. kAfter: a token's decay follows its read-out and its updates, as in a pass from the last token to the first.
template <class T, bool kAfter> struct Weights {
  T products[kProducts];
  T kept[kBlock];   // of the state before the block, at each token's read-outs
  T since[kBlock];  // of each token's updates, at the end of the block
  T decay;          // of the whole block

  Weights(const T* plain, const T* e) {
    decay = T(1);
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; ++j) {
      if (!kAfter) fade(j, e[j]);
#pragma GCC unroll 4
      for (int i = 0; i < j; ++i) {
        products[before(i, j)] = since[i] * plain[before(i, j)];
        products[upto(i, j)] = since[i] * plain[upto(i, j)];
      }
      products[upto(j, j)] = plain[upto(j, j)];
      kept[j] = decay;
      since[j] = T(1);
      if (kAfter) fade(j + 1, e[j]);
    }
  }

 private:
  // A decay by which the updates of the first n tokens fade.
  MEDSSM_INLINE void fade(int n, T e) {
    for (int i = 0; i < n; ++i) since[i] *= e;
    decay *= e;
  }
};

// For each token: one read-out before the update, the update, and one read-out after it:
//
//   S' = e_t S_{t-1};  before_t = S'^T r_t;  S_t = S' + c_t x_t^T;  after_t = S_t^T s_t
//
// The coefficients that the state has packed: c, r, s (kSlots 3), or c = r, s (kSlots 2); w: theirs. part: of the item. x_of(j, before) returns x of
// token j. out(j, after, own, x) gets the read-out after the update in two parts: after_t = after + own * x.
template <class T, int kVectors, int kSlots, class X, class Out>
MEDSSM_INLINE void write_then_read(State<T, kVectors, kSlots, 1>& state, int part, const Weights<T, false>& w, const Prefetch& prefetch,
                                   const X& x_of, const Out& out) {
  using L = Lanes<T, kVectors>;
  L read[2 * kBlock], x[kBlock];
  state.read(part, prefetch, read);
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    L before_j = w.kept[j] * read[j], after = w.kept[j] * read[kBlock + j];
#pragma GCC unroll 4
    for (int i = 0; i < j; ++i) {
      before_j = before_j + w.products[before(i, j)] * x[i];
      after = after + w.products[upto(i, j)] * x[i];
    }
    x[j] = x_of(j, before_j);
    out(j, after, w.products[upto(j, j)], x[j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) state.update(part, 0, j, w.since[j] * x[j]);
  state.decay(part, w.decay);
}

// The adjoint, from the last token to the first. For each token: an update, a read-out, and a second update.
//
//   read_t = (X_t + c_t x_t^T)^T r_t;  X_{t-1} = e_t (X_t + c_t x_t^T - d_t y_t^T)
//
// The packed coefficients: c, d, r (kSlots 3), or c, d = r (kSlots 2). x[j] is x of token j. y_of(j, later, own) returns y of token j. It gets the
// read-out in two parts: read_t = later + own * x[j].
template <class T, int kVectors, int kSlots, class Y> MEDSSM_INLINE void read_between(State<T, kVectors, kSlots, 2>& state, int part,
                                                                                      const Weights<T, true>& w, const Prefetch& prefetch,
                                                                                      const Lanes<T, kVectors>* x, const Y& y_of) {
  using L = Lanes<T, kVectors>;
  L read[kBlock], y[kBlock];
  state.read(part, prefetch, read);
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    L later = w.kept[j] * read[j];
#pragma GCC unroll 4
    for (int i = 0; i < j; ++i) later = later + w.products[upto(i, j)] * x[i] - w.products[before(i, j)] * y[i];
    y[j] = y_of(j, later, w.products[upto(j, j)]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    state.update(part, 0, j, w.since[j] * x[j]);
    state.update(part, 1, j, -w.since[j] * y[j]);
  }
  state.decay(part, w.decay);
}

}  // namespace
}  // namespace medssm
