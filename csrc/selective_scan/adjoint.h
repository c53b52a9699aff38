// The adjoint of the recurrence (medssm/step.h) of one block over one tile.
//
// A tile is walked forwards once more, keeping e and h of a few states in the first-level cache, then backwards: fifteen operations of the
// multiplier per step and state with AVX-512, against seven forwards.
#pragma once
#include "recurrence.h"

namespace medssm {
namespace {

// States that a tile's e and h are kept of at a time.
constexpr int kAdjointUnit = 4;

template <class T> struct Adjoint {
  const T *rates, *s, *su, *dy;  // rates of state n
  View<T> B, C;                  // of state n
  int64_t count;
  const T* state;            // h before the tile
  T *carry, *dA;             // of state n: g, in and out; added to
  T *y, *along_A, *along_B;  // of this half; y may be null: nobody asks
  bool first;                // set them, do not add to them
  T *dB, *dC;                // rows of state n, one every row_step
  int64_t row_step;
  T* kept;             // scratch: e and h, kTile * 2 * kAdjointUnit vectors
  const Ahead* ahead;  // a share of it is asked for during each unit; may be null
};

template <class T, int kStates, bool kY, bool kBounded> __attribute__((noinline)) void retreat(const Adjoint<T>& a) {
  constexpr int W = kLanes<T>;
  Vec<T> h[kStates];
#pragma GCC unroll 8
  for (int n = 0; n < kStates; ++n) h[n] = load<T>(a.state + n * W);

  const T *B = a.B.rows, *C = a.C.rows;
  T* kept = a.kept;
  const Ahead* const ahead = a.ahead;
  for (int64_t t = 0; t < a.count; ++t, B += a.B.step, C += a.C.step, kept += 2 * kStates * W) {
    const Vec<T> s = load<T>(a.s + t * W), su = load<T>(a.su + t * W);
    if (ahead) ahead->ask(t);
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

template <class T, int kStates, bool kY, bool kBounded> void retreat_all(Adjoint<T> a, int64_t states) {
  constexpr int W = kLanes<T>;
  const Ahead* const all = a.ahead;
  const int64_t units = states / kStates;
  for (int64_t unit = 0; unit < units; ++unit) {
    const Ahead some = all ? all->share(unit, units) : Ahead(Tile{});
    a.ahead = all ? &some : nullptr;
    retreat<T, kStates, kY, kBounded>(a);
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
  a.ahead = units ? nullptr : all;
  if constexpr (kStates > 1)
    if (states % kStates) retreat_all<T, kStates / 2, kY, kBounded>(a, states % kStates);
}

template <class T> void retreat_any(const Adjoint<T>& a, int64_t states, bool bounded) {
  constexpr int kUnit = least(kAdjointUnit, kLanes<T>), kRare = 1;
  if (bounded && a.y)
    retreat_all<T, kUnit, true, true>(a, states);
  else if (bounded)
    retreat_all<T, kUnit, false, true>(a, states);
  else if (a.y)
    retreat_all<T, kRare, true, false>(a, states);
  else
    retreat_all<T, kRare, false, false>(a, states);
}

}  // namespace
}  // namespace medssm
