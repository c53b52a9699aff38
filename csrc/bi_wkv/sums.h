// The sums of bidirectional WKV, seen while walking one way past the tokens: channels in the lanes.
//
// A sum is kept as e^shift times its numbers, the shift being the exponent of one token's weight, which is the heaviest or nearly so: that token's
// key less w for each step since, multiplied out anew at every step. So nothing overflows, a sum that stays as it is is not touched, no rounding
// adds up over the distance.
#pragma once
#include <limits>

#include "medssm/activation.h"
#include "medssm/simd.h"

namespace medssm {
namespace {

// e^x for x <= 0; what is above is a difference's rounding.
template <class T> MEDSSM_INLINE Vec<T> exp_below(Vec<T> x) { return exp_bounded<T>(max(splat(-kExpBound<T>), min(Vec<T>{}, x))); }

// A token heavier than a sum's own by no more than this does not take its place. Where keys are about equal and weights fall slowly every token is
// the heaviest, and the sum would be multiplied by a number just below 1 at every step, the same one, which is rounded the same way each time:
// after 65,536 steps gradients have lost four digits. (Against the eps of mode "upstream" the shift counts with this precision.)
template <class T> constexpr T kMargin = sizeof(T) == 4 ? T(0.125) : T(0);

// Two weights, of which one is 1, whose exponents lie `apart`: the second's above the first's.
template <class T> struct Pair {
  IntVec<T> heavier;  // whether the second is 1
  Vec<T> first, second;
  MEDSSM_INLINE explicit Pair(Vec<T> apart) : heavier(apart > kMargin<T>) {
    const Vec<T> one = splat(T(1)), e = exp_bounded<T>(max(splat(-kExpBound<T>), heavier ? -apart : apart));
    first = heavier ? e : one;
    second = heavier ? one : e;
  }
};

// A sum as one step sees it: e^shift (a, b), and the derivative of (a, b) by w.
template <class T> struct Term {
  Vec<T> shift, a, b, slope_a, slope_b;
};

// sum over the tokens i passed of e^{key_i - (|t-i|-1) w} (a_i, b_i), t the step that comes next.
template <class T> struct Sums {
  Vec<T> key, age;  // of its token; the steps between that and t
  Term<T> seen;

  static MEDSSM_INLINE Sums empty() {
    const Vec<T> lowest = splat(std::numeric_limits<T>::lowest()), zero = {};
    return {lowest, zero, {lowest, zero, zero, zero, zero}};
  }

  // Pass a token.
  template <bool kSlope> MEDSSM_INLINE void add(Vec<T> w, Vec<T> k, Vec<T> a, Vec<T> b) {
    const Vec<T> older = age + splat(T(1)), aged = fma(-older, w, key);
    const Pair<T> weights(k - aged);
    if constexpr (kSlope) {
      seen.slope_a = weights.first * (seen.slope_a - seen.a);
      seen.slope_b = weights.first * (seen.slope_b - seen.b);
    }
    seen.a = fma(weights.first, seen.a, weights.second * a);
    seen.b = fma(weights.first, seen.b, weights.second * b);
    seen.shift = weights.heavier ? k : aged;
    key = weights.heavier ? k : key;
    age = weights.heavier ? Vec<T>{} : older;
  }

  // As it is seen `steps` later.
  MEDSSM_INLINE Sums later(Vec<T> w, Vec<T> steps) const {
    const Vec<T> older = age + steps;
    return {key, older, {fma(-older, w, key), seen.a, seen.b, seen.slope_a - steps * seen.a, seen.slope_b - steps * seen.b}};
  }

  // Both together, seen from one step.
  MEDSSM_INLINE Sums with(const Sums& other) const {
    const Pair<T> weights(other.seen.shift - seen.shift);
    const auto heavier = weights.heavier;
    const auto sum = [&](Vec<T> x, Vec<T> y) __attribute__((always_inline)) { return fma(weights.first, x, weights.second * y); };
    return {heavier ? other.key : key,
            heavier ? other.age : age,
            {heavier ? other.seen.shift : seen.shift, sum(seen.a, other.seen.a), sum(seen.b, other.seen.b), sum(seen.slope_a, other.seen.slope_a),
             sum(seen.slope_b, other.seen.slope_b)}};
  }
};

// w of some channels, and what upstream's chunks make of it: 1 - e^w and the derivative's e^w, both over e^high with high = max(w, 0).
template <class T> struct Rate {
  Vec<T> w, high, taken, slope;

  MEDSSM_INLINE explicit Rate(Vec<T> rate) : w(rate), high(max(Vec<T>{}, rate)) {
    const Vec<T> magnitude = abs(w);
    for (int i = 0; i < kLanes<T>; ++i) {
      const T fall = -std::expm1(-magnitude[i]);
      taken[i] = w[i] > 0 ? -fall : fall;
      slope[i] = w[i] > 0 ? T(1) : std::exp(w[i]);
    }
  }
};

// What lies behind on the walk, in either direction, in two parts: the tokens of this tile, and all before it. So a number is rounded as often as
// there are tiles and steps in one, not as often as there are tokens.
//
// mode "upstream": the walk is cut into chunks; what was passed before this chunk is seen from one step too far, and the sum of the chunk's own
// tokens taken with the wrong weight comes on top (kernels/bi_wkv/reference.py).
template <class T, bool kUpstream> class Behind {
 public:
  static constexpr int kTerms = kUpstream ? 3 : 2;

  // The walk enters a chunk.
  MEDSSM_INLINE void begin_chunk(const Rate<T>& rate) {
    if constexpr (kUpstream) {
      earlier_ = earlier_.later(rate.w, steps_).with(passed_);
      passed_ = taken_ = Sums<T>::empty();
      steps_ = Vec<T>{};
    }
  }

  // A tile begins, and ends.
  MEDSSM_INLINE void begin(const Rate<T>& rate) {
    outside_ = passed_;
    if constexpr (kUpstream) outside_ = earlier_.later(rate.w, steps_ + splat(T(1))).with(passed_);
    near_ = Sums<T>::empty();
    inside_ = Vec<T>{};
  }
  MEDSSM_INLINE void end(const Rate<T>& rate) {
    passed_ = passed_.later(rate.w, inside_).with(near_);
    steps_ += inside_;
  }

  // Pass a token.
  template <bool kSlope> MEDSSM_INLINE void add(const Rate<T>& rate, Vec<T> k, Vec<T> a, Vec<T> b) {
    near_.template add<kSlope>(rate.w, k, a, b);
    inside_ += splat(T(1));
  }
  // Take a token, before it is passed.
  template <bool kSlope> MEDSSM_INLINE void take(const Rate<T>& rate, Vec<T> k, Vec<T> a, Vec<T> b) {
    if constexpr (kUpstream) taken_.template add<kSlope>(-rate.w, k, a, b);
  }

  // The exponent that the sum which they are taken from still has of the chunk's first token.
  MEDSSM_INLINE Vec<T> met(const Rate<T>& rate, Vec<T> first) const { return fma(steps_ + inside_, rate.w, first); }

  // The sum of all tiles before this one; in mode "upstream" of this chunk's.
  Sums<T>& passed() { return passed_; }

  template <bool kSlope> MEDSSM_INLINE void see(const Rate<T>& rate, Term<T>* terms) const {
    terms[0] = near_.seen;
    terms[1] = outside_.later(rate.w, inside_).seen;
    if constexpr (kUpstream) {
      const Term<T>& t = taken_.seen;
      terms[2] = {t.shift + rate.high, rate.taken * t.a, rate.taken * t.b, t.slope_a, t.slope_b};
      if constexpr (kSlope) {  // it grows by w, so its slope counts the other way
        terms[2].slope_a = -fma(rate.taken, t.slope_a, rate.slope * t.a);
        terms[2].slope_b = -fma(rate.taken, t.slope_b, rate.slope * t.b);
      }
    }
  }

 private:
  Sums<T> near_ = Sums<T>::empty(), passed_ = Sums<T>::empty();    // this tile's tokens; those of the tiles before it
  Sums<T> outside_ = Sums<T>::empty();                             // all tokens before this tile, seen from its first step
  Sums<T> earlier_ = Sums<T>::empty(), taken_ = Sums<T>::empty();  // mode "upstream": the chunks before this one, seen from its first step
  Vec<T> inside_ = {}, steps_ = {};                                // steps into the tile, and of the chunk's tiles before it
};

// What lies ahead of a walk through which the other direction has already gone.
template <class T, bool kUpstream> MEDSSM_INLINE Term<T> ahead(const Rate<T>& rate, const Term<T>& t) {
  if constexpr (kUpstream)
    return {t.shift - rate.w, t.a, t.b, t.slope_a - t.a, t.slope_b - t.b};
  else
    return t;
}

}  // namespace
}  // namespace medssm
