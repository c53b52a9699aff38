// A faster path of mode "exact" for tiles whose keys differ little, as is usual in a network: all sums of a tile have one shift, its `base`.
//
// A token's weight is then a product of e^{key - base}, which takes one exponential per token, and of e^{-w distance}. Inside the tile that decay
// is applied to the sums at every step. For sums from outside the tile it comes from a table. The sums of the tiles are then added up, which also
// rounds less often than adding token by token.
#pragma once
#include "problem.h"
#include "sums.h"

namespace medssm {
namespace {

template <class T> class SharedShift {
 public:
  SharedShift(const Rate<T>& rate, Vec<T> u) {
    const Vec<T> total_decay = abs(rate.w) * T(kTile);
    usable_ = all_at_most<T>(max(total_decay, abs(u)), kMaxDecay);
    if (!usable_) return;
    bonus = exp_bounded<T>(u);
    for (int i = 0; i < kLanes<T>; ++i) decay_minus_one[i] = std::expm1(-rate.w[i]);
    for (int64_t t = 0; t < kTile; ++t) decay[t] = exp_bounded<T>(-rate.w * T(t));
  }

  Vec<T> bonus;            // e^u
  Vec<T> decay[kTile];     // e^{-w distance}
  Vec<T> decay_minus_one;  // e^-w - 1. More exact than e^-w, whose rounding error would act at every step.

  // Whether w and u are small enough for this path. Then any tile can be summed with one shift.
  bool usable() const { return usable_; }
  // Whether a tile's outputs can be computed with one shift. Then the weight of every step's own token is at least e^-(kMaxDecay + kMaxSpread) of the
  // largest weight, so that no denominator is near underflow.
  bool usable_for(Vec<T> lowest, Vec<T> base, const Sums<T>& past, const Sums<T>& future) const {
    return usable_ && all_at_most<T>(max(base, max(past.term.shift, future.term.shift)) - lowest, kMaxSpread);
  }
  // Whether the sums over outputs outside a tile can be scaled to those of the tile without overflow. top: the common top of the tile's outputs.
  static bool can_scale(Vec<T> top, const Sums<T>& past, const Sums<T>& future) {
    return all_at_most<T>(top + max(past.term.shift, future.term.shift), kMaxSpread);
  }

  // The largest |w| kTile and |u|; how far apart exponents of a tile may be; a bound of the exponents of the weights of any token.
  static constexpr T kMaxDecay = 20, kMaxSpread = 30, kMaxExponent = kMaxDecay + kMaxSpread + 1;

 private:
  bool usable_;
};

// A sum over the tokens of a tile passed so far, divided by e^base. It has the decay that applies at the next step.
template <class T> struct Partial {
  Vec<T> a = {}, b = {}, slope_a = {}, slope_b = {};

  template <bool kSlope> MEDSSM_INLINE void add(const SharedShift<T>& shared, Vec<T> x, Vec<T> y) {
    if constexpr (kSlope) {
      const Vec<T> rest_a = slope_a - a, rest_b = slope_b - b;
      slope_a = fma(shared.decay_minus_one, rest_a, rest_a);
      slope_b = fma(shared.decay_minus_one, rest_b, rest_b);
    }
    a += fma(shared.decay_minus_one, a, x);
    b += fma(shared.decay_minus_one, b, y);
  }

  // The sum at the first step after this tile: `before`, decayed over the tile's `steps`, plus this sum.
  MEDSSM_INLINE Sums<T> added_to(const Sums<T>& before, Vec<T> w, int64_t steps, Vec<T> base) const {
    return before.later(w, splat(T(steps))).plus({base, Vec<T>{}, {base, a, b, slope_a, slope_b}});
  }
};

// A sum over tokens outside the tile, divided by e^base, with the decay that applies at the tile's nearest step. add_to adds it for a step that is
// `steps` further away.
template <class T> struct Outside {
  Vec<T> a, b, slope_a, slope_b;
  MEDSSM_INLINE Outside(const Sums<T>& s, Vec<T> base) {
    const Vec<T> scale = exp_bounded<T>(max(splat(-kExpBound<T>), s.term.shift - base));
    a = scale * s.term.a;
    b = scale * s.term.b;
    slope_a = scale * s.term.slope_a;
    slope_b = scale * s.term.slope_b;
  }
  template <bool kSlope> MEDSSM_INLINE void add_to(Partial<T>& sum, const SharedShift<T>& shared, int64_t steps) const {
    const Vec<T> decay = shared.decay[steps];
    sum.a = fma(decay, a, sum.a);
    sum.b = fma(decay, b, sum.b);
    if constexpr (kSlope) {
      const Vec<T> distance = splat(T(steps));
      sum.slope_a = fma(decay, fma(-distance, a, slope_a), sum.slope_a);
      sum.slope_b = fma(decay, fma(-distance, b, slope_b), sum.slope_b);
    }
  }
};

}  // namespace
}  // namespace medssm
