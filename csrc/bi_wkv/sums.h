// The sums of bidirectional WKV, seen while walking one way past the tokens: channels in the lanes.
//
// A sum is kept as e^shift times its numbers, the shift being the exponent of its heaviest token's weight: that token's key less w for each step
// since, multiplied out anew at every step. So nothing overflows, a sum that stays as it is is not touched, no rounding adds up over the distance.
#pragma once
#include <limits>

#include "medssm/activation.h"
#include "medssm/simd.h"

namespace medssm {
namespace {

// e^x for x <= 0; what is above is a difference's rounding.
template <class T> MEDSSM_INLINE Vec<T> exp_below(Vec<T> x) { return exp_bounded<T>(max(splat(-kExpBound<T>), min(Vec<T>{}, x))); }

// A sum as one step sees it: e^shift (a, b), and the derivative of (a, b) by w.
template <class T> struct Term { Vec<T> shift, a, b, slope_a, slope_b; };

// sum over the tokens i passed of e^{key_i - (|t-i|-1) w} (a_i, b_i), t the step that comes next.
template <class T> struct Sums {
  Vec<T> key, age;  // of the heaviest token; the steps between it and t
  Term<T> seen;

  static MEDSSM_INLINE Sums empty() {
    const Vec<T> lowest = splat(std::numeric_limits<T>::lowest()), zero = {};
    return {lowest, zero, {lowest, zero, zero, zero, zero}};
  }

  // Pass a token. One of the two weights is 1: a single exponential serves both.
  template <bool kSlope> MEDSSM_INLINE void add(Vec<T> w, Vec<T> k, Vec<T> a, Vec<T> b) {
    const Vec<T> one = splat(T(1)), older = age + one, aged = fma(-older, w, key), above = k - aged, e = exp_below<T>(-abs(above));
    const auto heavier = above > 0;
    const Vec<T> kept = heavier ? e : one, fresh = heavier ? one : e;
    if constexpr (kSlope) {
      seen.slope_a = kept * (seen.slope_a - seen.a);
      seen.slope_b = kept * (seen.slope_b - seen.b);
    }
    seen.a = fma(kept, seen.a, fresh * a);
    seen.b = fma(kept, seen.b, fresh * b);
    seen.shift = heavier ? k : aged;
    key = heavier ? k : key;
    age = heavier ? Vec<T>{} : older;
  }

  // As it is seen `steps` later.
  MEDSSM_INLINE Sums later(Vec<T> w, Vec<T> steps) const {
    const Vec<T> older = age + steps;
    return {key, older, {fma(-older, w, key), seen.a, seen.b, seen.slope_a - steps * seen.a, seen.slope_b - steps * seen.b}};
  }

  // Both together, seen from one step.
  MEDSSM_INLINE Sums with(const Sums& other) const {
    const auto heavier = other.seen.shift > seen.shift;
    const Vec<T> top = heavier ? other.seen.shift : seen.shift;
    const Vec<T> mine = exp_below<T>(seen.shift - top), its = exp_below<T>(other.seen.shift - top);
    const auto sum = [&](Vec<T> x, Vec<T> y) __attribute__((always_inline)) { return fma(mine, x, its * y); };
    return {heavier ? other.key : key, heavier ? other.age : age,
            {top, sum(seen.a, other.seen.a), sum(seen.b, other.seen.b), sum(seen.slope_a, other.seen.slope_a),
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

// What lies behind on the walk, in either direction. mode "exact": one sum. mode "upstream": the walk is cut into chunks; what was passed before
// this chunk is seen from one step too far, and the sum of the chunk's own tokens taken with the wrong weight comes on top
// (kernels/bi_wkv/reference.py).
template <class T, bool kUpstream> class Behind {
 public:
  static constexpr int kTerms = kUpstream ? 3 : 1;

  // The walk enters a chunk.
  MEDSSM_INLINE void enter(const Rate<T>& rate) {
    if constexpr (kUpstream) {
      before_ = before_.later(rate.w, steps_).with(near_);
      near_ = taken_ = Sums<T>::empty();
      steps_ = Vec<T>{};
    }
  }

  // Pass a token.
  template <bool kSlope> MEDSSM_INLINE void add(const Rate<T>& rate, Vec<T> k, Vec<T> a, Vec<T> b) {
    near_.template add<kSlope>(rate.w, k, a, b);
    if constexpr (kUpstream) steps_ += splat(T(1));
  }
  // Take a token, before it is passed.
  template <bool kSlope> MEDSSM_INLINE void take(const Rate<T>& rate, Vec<T> k, Vec<T> a, Vec<T> b) {
    if constexpr (kUpstream) taken_.template add<kSlope>(-rate.w, k, a, b);
  }

  // The exponent that the sum which they are taken from still has of the chunk's first token.
  MEDSSM_INLINE Vec<T> met(const Rate<T>& rate, Vec<T> first) const { return fma(steps_, rate.w, first); }

  // mode "exact": the one sum.
  Sums<T>& near() { return near_; }

  template <bool kSlope> MEDSSM_INLINE void see(const Rate<T>& rate, Term<T>* terms) const {
    terms[0] = near_.seen;
    if constexpr (kUpstream) {
      terms[1] = before_.later(rate.w, steps_ + splat(T(1))).seen;
      const Term<T>& t = taken_.seen;
      terms[2] = {t.shift + rate.high, rate.taken * t.a, rate.taken * t.b, t.slope_a, t.slope_b};
      if constexpr (kSlope) {  // it grows by w, so its slope counts the other way
        terms[2].slope_a = -fma(rate.taken, t.slope_a, rate.slope * t.a);
        terms[2].slope_b = -fma(rate.taken, t.slope_b, rate.slope * t.b);
      }
    }
  }

 private:
  Sums<T> near_ = Sums<T>::empty(), before_ = Sums<T>::empty(), taken_ = Sums<T>::empty();
  Vec<T> steps_ = {};  // into the chunk
};

// What lies ahead of a walk through which the other direction has already gone.
template <class T, bool kUpstream> MEDSSM_INLINE Term<T> ahead(const Rate<T>& rate, const Term<T>& t) {
  if constexpr (kUpstream) return {t.shift - rate.w, t.a, t.b, t.slope_a - t.a, t.slope_b - t.b};
  else return t;
}

}  // namespace
}  // namespace medssm
