// Tiles of mode "exact" whose keys differ little, as a network's do: one shift serves the whole tile.
//
// Weights are then products of three things: e^{key - base}, one exponential a token; e^{-w distance} within the tile, by letting sums
// fall from step to step; and the same to the tile's ends, from a table. Sums over many tiles are sums of the tiles' sums, which also rounds less.
#pragma once
#include "problem.h"
#include "sums.h"

namespace medssm {
namespace {

template <class T> class Level {
 public:
  Level(const Rate<T>& rate, Vec<T> u) {
    const Vec<T> reach = abs(rate.w) * T(kTile);
    serves_ = all_at_most<T>(max(reach, abs(u)), kSteep);
    if (!serves_) return;
    bonus = exp_bounded<T>(u);
    for (int i = 0; i < kLanes<T>; ++i) loss[i] = std::expm1(-rate.w[i]);
    for (int64_t t = 0; t < kTile; ++t) fall[t] = exp_bounded<T>(-rate.w * T(t));
  }

  Vec<T> bonus;        // e^u
  Vec<T> fall[kTile];  // e^{-w distance}
  Vec<T> loss;         // e^-w - 1: e^-w itself, rounded, would be off by as much at every step

  // Whether decay and bonus are such that any tile has a sum of this kind,
  bool sums() const { return serves_; }
  // and whether the outputs of a tile do: every token counts for itself at least e^-50 of the heaviest.
  bool outputs(Vec<T> lowest, Vec<T> base, const Sums<T>& past, const Sums<T>& future) const {
    return serves_ && all_at_most<T>(max(base, max(past.seen.shift, future.seen.shift)) - lowest, kSpread);
  }
  // Whether sums may be multiplied up to the tile's base.
  static bool near(Vec<T> base, const Sums<T>& past, const Sums<T>& future) {
    return all_at_most<T>(base + max(past.seen.shift, future.seen.shift), kSpread);
  }

  static constexpr T kSteep = 20, kSpread = 30, kAbove = kSteep + kSpread + 1;

 private:
  bool serves_;
};

// A sum over some of a tile's tokens, over e^base, as the next step sees it.
template <class T> struct Partial {
  Vec<T> a = {}, b = {}, slope_a = {}, slope_b = {};

  template <bool kSlope> MEDSSM_INLINE void add(const Level<T>& level, Vec<T> x, Vec<T> y) {
    if constexpr (kSlope) {
      const Vec<T> rest_a = slope_a - a, rest_b = slope_b - b;
      slope_a = fma(level.loss, rest_a, rest_a);
      slope_b = fma(level.loss, rest_b, rest_b);
    }
    a += fma(level.loss, a, x);
    b += fma(level.loss, b, y);
  }

  // The sum before the tile, with the tile's own.
  MEDSSM_INLINE Sums<T> behind(const Sums<T>& before, Vec<T> w, int64_t steps, Vec<T> base) const {
    return before.later(w, splat(T(steps))).with({base, Vec<T>{}, {base, a, b, slope_a, slope_b}});
  }
};

// A sum from outside the tile, over e^base, seen from its nearest step; `at` is what a step so much further away sees.
template <class T> struct Outside {
  Vec<T> a, b, slope_a, slope_b;
  MEDSSM_INLINE Outside(const Sums<T>& s, Vec<T> base) {
    const Vec<T> scale = exp_bounded<T>(max(splat(-kExpBound<T>), s.seen.shift - base));
    a = scale * s.seen.a;
    b = scale * s.seen.b;
    slope_a = scale * s.seen.slope_a;
    slope_b = scale * s.seen.slope_b;
  }
  template <bool kSlope> MEDSSM_INLINE void add_to(Partial<T>& sum, const Level<T>& level, int64_t steps) const {
    const Vec<T> fall = level.fall[steps];
    sum.a = fma(fall, a, sum.a);
    sum.b = fma(fall, b, sum.b);
    if constexpr (kSlope) {
      const Vec<T> distance = splat(T(steps));
      sum.slope_a = fma(fall, fma(-distance, a, slope_a), sum.slope_a);
      sum.slope_b = fma(fall, fma(-distance, b, slope_b), sum.slope_b);
    }
  }
};

}  // namespace
}  // namespace medssm
