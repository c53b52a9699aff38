// The sums of bidirectional WKV in one direction of the walk. The lanes of a vector are channels.
//
// Sums are stored scaled: sum = e^shift times the stored numbers. `shift` is the exponent of the token with the largest weight, or nearly the
// largest, so that exp never overflows. It is computed at every step from that token's key and its distance: key - distance w. So rounding errors
// do not add up over the distance, and a sum to which nothing is added only changes its shift.
#pragma once
#include <limits>

#include "medssm/activation.h"
#include "medssm/simd.h"

namespace medssm {
namespace {

// e^x for x <= 0. Rounding can make x slightly larger than 0: then x counts as 0.
template <class T> MEDSSM_INLINE Vec<T> exp_below(Vec<T> x) { return exp_bounded<T>(max(splat(-kExpBound<T>), min(Vec<T>{}, x))); }

// A new token becomes the one that defines a sum's shift only if its exponent is larger than the shift by more than this. Without the margin, where
// keys are about equal and w is small, every token would define the shift. The sum would be multiplied at every step by the same number just below 1,
// always rounded in the same direction: after 65,536 steps gradients lose four digits. (In mode "upstream" the eps is relative to the largest
// exponent; this margin is the precision of that exponent.)
template <class T> constexpr T kMargin = sizeof(T) == 4 ? T(0.125) : T(0);

// Two weights, the larger of which is 1. difference: the exponent of the second less that of the first.
template <class T> struct Pair {
  IntVec<T> heavier;  // true where the second is 1
  Vec<T> first, second;
  MEDSSM_INLINE explicit Pair(Vec<T> difference) : heavier(difference > kMargin<T>) {
    const Vec<T> one = splat(T(1)), e = exp_bounded<T>(max(splat(-kExpBound<T>), heavier ? -difference : difference));
    first = heavier ? e : one;
    second = heavier ? one : e;
  }
};

// The value of a sum at one step: e^shift (a, b), and the derivative of that by w: e^shift (slope_a, slope_b).
template <class T> struct Term {
  Vec<T> shift, a, b, slope_a, slope_b;
};

// The sum of e^{key_i - (|t-i|-1) w} (a_i, b_i) over the tokens i added so far; t is the next step.
template <class T> struct Sums {
  Vec<T> key, age;  // the key of the token that defines the shift; the steps between that token and t
  Term<T> term;

  static MEDSSM_INLINE Sums empty() {
    const Vec<T> lowest = splat(std::numeric_limits<T>::lowest()), zero = {};
    return {lowest, zero, {lowest, zero, zero, zero, zero}};
  }

  // Adds the token of step t and moves to the next step.
  template <bool kSlope> MEDSSM_INLINE void add(Vec<T> w, Vec<T> k, Vec<T> a, Vec<T> b) {
    const Vec<T> older = age + splat(T(1)), aged = fma(-older, w, key);
    const Pair<T> weights(k - aged);
    if constexpr (kSlope) {
      term.slope_a = weights.first * (term.slope_a - term.a);
      term.slope_b = weights.first * (term.slope_b - term.b);
    }
    term.a = fma(weights.first, term.a, weights.second * a);
    term.b = fma(weights.first, term.b, weights.second * b);
    term.shift = weights.heavier ? k : aged;
    key = weights.heavier ? k : key;
    age = weights.heavier ? Vec<T>{} : older;
  }

  // The same sum at a step that is `steps` later.
  MEDSSM_INLINE Sums later(Vec<T> w, Vec<T> steps) const {
    const Vec<T> older = age + steps;
    return {key, older, {fma(-older, w, key), term.a, term.b, term.slope_a - steps * term.a, term.slope_b - steps * term.b}};
  }

  // The sum of both, for the same step.
  MEDSSM_INLINE Sums plus(const Sums& other) const {
    const Pair<T> weights(other.term.shift - term.shift);
    const auto heavier = weights.heavier;
    const auto sum = [&](Vec<T> x, Vec<T> y) __attribute__((always_inline)) { return fma(weights.first, x, weights.second * y); };
    return {heavier ? other.key : key,
            heavier ? other.age : age,
            {heavier ? other.term.shift : term.shift, sum(term.a, other.term.a), sum(term.b, other.term.b), sum(term.slope_a, other.term.slope_a),
             sum(term.slope_b, other.term.slope_b)}};
  }
};

// w of a block of channels. For mode "upstream" also the factor 1 - e^w of its error term and that factor's e^w, both divided by e^high, with
// high = max(w, 0), so that neither overflows.
template <class T> struct Rate {
  Vec<T> w, high, remainder, slope;

  MEDSSM_INLINE explicit Rate(Vec<T> rate) : w(rate), high(max(Vec<T>{}, rate)) {
    const Vec<T> magnitude = abs(w);
    for (int i = 0; i < kLanes<T>; ++i) {
      const T loss = -std::expm1(-magnitude[i]);
      remainder[i] = w[i] > 0 ? -loss : loss;
      slope[i] = w[i] > 0 ? T(1) : std::exp(w[i]);
    }
  }
};

// The sums over all tokens that a sweep has passed, in either direction of the walk. The tokens of this tile and all tokens before it have separate
// sums. So a number is rounded once per tile and once per step of its tile, not once per token.
//
// Mode "upstream" repeats the arithmetic of the published kernels (kernels/bi_wkv/reference.py). Tokens of earlier chunks have one step of decay too
// many. A third sum is its error term: the remainder of each token of this chunk that is subtracted with the wrong weight.
template <class T, bool kUpstream> class PassedSums {
 public:
  static constexpr int kTerms = kUpstream ? 3 : 2;

  // Before the first tile of a chunk.
  MEDSSM_INLINE void begin_chunk(const Rate<T>& rate) {
    if constexpr (kUpstream) {
      earlier_chunks_ = earlier_chunks_.later(rate.w, chunk_steps_).plus(passed_);
      passed_ = subtracted_ = Sums<T>::empty();
      chunk_steps_ = Vec<T>{};
    }
  }

  // Before and after each tile.
  MEDSSM_INLINE void begin(const Rate<T>& rate) {
    before_tile_ = passed_;
    if constexpr (kUpstream) before_tile_ = earlier_chunks_.later(rate.w, chunk_steps_ + splat(T(1))).plus(passed_);
    tile_ = Sums<T>::empty();
    tile_steps_ = Vec<T>{};
  }
  MEDSSM_INLINE void end(const Rate<T>& rate) {
    passed_ = passed_.later(rate.w, tile_steps_).plus(tile_);
    chunk_steps_ += tile_steps_;
  }

  // Adds a token.
  template <bool kSlope> MEDSSM_INLINE void add(const Rate<T>& rate, Vec<T> k, Vec<T> a, Vec<T> b) {
    tile_.template add<kSlope>(rate.w, k, a, b);
    tile_steps_ += splat(T(1));
  }
  // Mode "upstream": adds a token to the error term. Comes before add() of the same token.
  template <bool kSlope> MEDSSM_INLINE void subtract(const Rate<T>& rate, Vec<T> k, Vec<T> a, Vec<T> b) {
    if constexpr (kUpstream) subtracted_.template add<kSlope>(-rate.w, k, a, b);
  }

  // The exponent of the chunk's first token in the sum from which mode "upstream" subtracts. Its running maximum contains this exponent too.
  MEDSSM_INLINE Vec<T> first_shift(const Rate<T>& rate, Vec<T> first) const { return fma(chunk_steps_ + tile_steps_, rate.w, first); }

  // The sum over all tiles before this one. In mode "upstream": over those of the same chunk.
  Sums<T>& passed() { return passed_; }

  template <bool kSlope> MEDSSM_INLINE void terms(const Rate<T>& rate, Term<T>* terms) const {
    terms[0] = tile_.term;
    terms[1] = before_tile_.later(rate.w, tile_steps_).term;
    if constexpr (kUpstream) {
      const Term<T>& t = subtracted_.term;
      terms[2] = {t.shift + rate.high, rate.remainder * t.a, rate.remainder * t.b, t.slope_a, t.slope_b};
      if constexpr (kSlope) {  // this sum grows with w, so its derivative has the opposite sign
        terms[2].slope_a = -fma(rate.remainder, t.slope_a, rate.slope * t.a);
        terms[2].slope_b = -fma(rate.remainder, t.slope_b, rate.slope * t.b);
      }
    }
  }

 private:
  Sums<T> tile_ = Sums<T>::empty(), passed_ = Sums<T>::empty();  // the tokens of this tile; of the tiles before it
  Sums<T> before_tile_ = Sums<T>::empty();                       // all tokens before this tile, at its first step
  Sums<T> earlier_chunks_ = Sums<T>::empty();                    // mode "upstream": the chunks before this one, at its first step
  Sums<T> subtracted_ = Sums<T>::empty();                        // mode "upstream": the error term
  Vec<T> tile_steps_ = {}, chunk_steps_ = {};                    // steps made in this tile, and in the chunk's tiles before it
};

// The sum over the tokens ahead, which the sweep in the other direction has computed. Mode "upstream" has one step of decay too many.
template <class T, bool kUpstream> MEDSSM_INLINE Term<T> ahead(const Rate<T>& rate, const Term<T>& t) {
  if constexpr (kUpstream)
    return {t.shift - rate.w, t.a, t.b, t.slope_a - t.a, t.slope_b - t.b};
  else
    return t;
}

}  // namespace
}  // namespace medssm
