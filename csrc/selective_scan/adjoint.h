// The adjoint of the recurrence (medssm/step.h) of one block over one tile.
//
// A tile is first computed forward again, for a few states at a time, and e and h of each step are kept in the first-level cache. Then the same steps
// are walked backward. With AVX-512 this takes fifteen operations of the multiplier per step and state; the forward pass takes seven.
#pragma once
#include "recurrence.h"

namespace medssm {
namespace {

// Number of states whose e and h are kept at the same time.
constexpr int kAdjointUnit = 4;

template <class T> struct Adjoint {
  const T *rates, *s, *su, *dy;  // rates: of states n, n + 1, …
  View<T> B, C;                  // of states n, n + 1, …
  int64_t count;
  const T* state;            // h before the tile
  T *carry, *dA;             // of states n, n + 1, …; carry: g, read and updated; dA: added to
  T *y, *along_A, *along_B;  // of this half of the states; y may be null if it is not needed
  bool first;                // set y, along_A and along_B instead of adding to them
  T *dB, *dC;                // from state n on; one row per step, row_step elements apart
  int64_t row_step;
  T* kept;                   // scratch memory for e and h: kTile * 2 * kAdjointUnit vectors
  const Prefetch* prefetch;  // each unit requests a share of these lines; may be null
};

template <class T, int kStates, bool kY, bool kBounded> __attribute__((noinline)) void backward_unit(const Adjoint<T>& a) {
  constexpr int W = kLanes<T>;
  Vec<T> h[kStates];
#pragma GCC unroll 8
  for (int n = 0; n < kStates; ++n) h[n] = load<T>(a.state + n * W);

  const T *B = a.B.rows, *C = a.C.rows;
  T* kept = a.kept;
  const Prefetch* const prefetch = a.prefetch;
  for (int64_t t = 0; t < a.count; ++t, B += a.B.step, C += a.C.step, kept += 2 * kStates * W) {
    const Vec<T> s = load<T>(a.s + t * W), su = load<T>(a.su + t * W);
    if (prefetch) prefetch->request(t);
    Vec<T> y = !kY || a.first ? Vec<T>{} : load<T>(a.y + t * W);
#pragma GCC unroll 8
    for (int n = 0; n < kStates; ++n) {
      const Vec<T> e = power<T, kBounded>(s * load<T>(a.rates + n * W));
      store(kept + 2 * n * W, e);
      store(kept + (2 * n + 1) * W, h[n]);
      h[n] = next_state<T>(e, h[n], su, B[n]);
      if constexpr (kY) y = fma(splat(C[n]), h[n], y);
    }
    if constexpr (kY) store(a.y + t * W, y);
  }

  Vec<T> g[kStates], dA[kStates];
#pragma GCC unroll 8
  for (int n = 0; n < kStates; ++n) {
    g[n] = load<T>(a.carry + n * W);
    dA[n] = Vec<T>{};
  }
  for (int64_t t = a.count - 1; t >= 0; --t) {
    B -= a.B.step;
    C -= a.C.step;
    kept -= 2 * kStates * W;
    const Vec<T> s = load<T>(a.s + t * W), su = load<T>(a.su + t * W), dy = load<T>(a.dy + t * W);
    Vec<T> along_A = a.first ? Vec<T>{} : load<T>(a.along_A + t * W), along_B = a.first ? Vec<T>{} : load<T>(a.along_B + t * W);
    Vec<T> rows[2 * kStates];
#pragma GCC unroll 8
    for (int n = 0; n < kStates; ++n) {
      const Vec<T> before = load<T>(kept + (2 * n + 1) * W);
      const RowTerms<T> terms =
          step_back<T>(load<T>(kept + 2 * n * W), h[n], before, s, su, dy, load<T>(a.rates + n * W), B[n], C[n], g[n], dA[n], along_A, along_B);
      rows[n] = terms.dB;
      rows[kStates + n] = terms.dC;
      h[n] = before;
    }
    store(a.along_A + t * W, along_A);
    store(a.along_B + t * W, along_B);
    if constexpr (2 * kStates <= W) {
      const Vec<T> sums = sum_each<T, 2 * kStates>(rows);
      store_first<T, kStates>(a.dB + t * a.row_step, sums);
      store_first<T, kStates, kStates>(a.dC + t * a.row_step, sums);
    } else {
      store_first<T, kStates>(a.dB + t * a.row_step, sum_each<T, kStates>(rows));
      store_first<T, kStates>(a.dC + t * a.row_step, sum_each<T, kStates>(rows + kStates));
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kStates; ++n) {
    store(a.carry + n * W, g[n]);
    store(a.dA + n * W, load<T>(a.dA + n * W) + dA[n]);
  }
}

template <class T, int kStates, bool kY, bool kBounded> void backward_units(Adjoint<T> a, int64_t states) {
  constexpr int W = kLanes<T>;
  const Prefetch* const all = a.prefetch;
  const int64_t units = states / kStates;
  for (int64_t unit = 0; unit < units; ++unit) {
    const Prefetch some = all ? all->share(unit, units) : Prefetch(Tile{});
    a.prefetch = all ? &some : nullptr;
    backward_unit<T, kStates, kY, kBounded>(a);
    a.rates += kStates * W;
    a.state += kStates * W;
    a.carry += kStates * W;
    a.dA += kStates * W;
    a.B.rows += kStates;
    a.C.rows += kStates;
    a.dB += kStates;
    a.dC += kStates;
    a.first = false;
  }
  a.prefetch = units ? nullptr : all;
  if constexpr (kStates > 1)
    if (states % kStates) backward_units<T, kStates / 2, kY, kBounded>(a, states % kStates);
}

template <class T> void backward_half(const Adjoint<T>& a, int64_t states, bool bounded) {
  constexpr int kUnit = least(kAdjointUnit, kLanes<T>), kRare = 1;
  if (bounded && a.y)
    backward_units<T, kUnit, true, true>(a, states);
  else if (bounded)
    backward_units<T, kUnit, false, true>(a, states);
  else if (a.y)
    backward_units<T, kRare, true, false>(a, states);
  else
    backward_units<T, kRare, false, false>(a, states);
}

}  // namespace
}  // namespace medssm
