// The forward computation of a block of channels. The backward pass repeats it.
//
// A sweep from the end to the start stores, for each tile, the sum over all tokens after that tile. A sweep from the start then processes each tile
// twice, while it is in the cache: backward for the sum over the tokens ahead of each step, forward for the sum over those behind and for the
// outputs.
//
// The backward pass (kSlope) subtracts an estimate of their mean from the values. This shifts the outputs by the same number and does not change the
// gradients, which depend on differences between values and outputs only. It makes them more exact: rounding errors are relative to the values, so
// small values have small errors.
#pragma once
#include "problem.h"
#include "shared_shift.h"
#include "sums.h"

namespace medssm {
namespace {

// The quotient that is the output of one step, and its parts. Weights and sums are divided by e^top; inverse is 1 / denominator.
template <class T> struct Quotient {
  Vec<T> top, own, out, inverse, slope_a, slope_b;
};

template <class T, bool kUpstream, bool kSlope> class Outputs {
 public:
  // ahead: scratch memory for one sum per tile of a segment.
  Outputs(const Problem& p, const Walk& walk, const Block<T>& block, Sums<T>* ahead) :
      p_(p), walk_(walk), block_(block), rate_(block.weight(p.w)), u_(block.weight(p.u)), shared_(rate_, u_), ahead_(ahead) {
    if constexpr (kSlope) center_ = block.mean(p.v, p.length);
  }

  const Block<T>& block() const { return block_; }
  const Rate<T>& rate() const { return rate_; }
  const SharedShift<T>& shared() const { return shared_; }
  Tile rows(const Run& run) const { return walk_.steps(run.from, run.from + run.count); }

  // The kTile steps before a tile, and after it: those that a sweep needs next, for prefetching.
  Tile rows_before(const Run& run) const { return walk_.steps(most<int64_t>(0, run.from - kTile), run.from); }
  Tile rows_after(const Run& run) const { return walk_.steps(run.from + run.count, least(p_.length, run.from + run.count + kTile)); }

  void load(const Run& run, Vec<T>* k, Vec<T>* v) const {
    block_.load_rows(p_.k, rows(run), k);
    block_.load_rows(p_.v, rows(run), v);
    if constexpr (kSlope)
      for (int64_t t = 0; t < run.count; ++t) v[t] -= center_;
  }

  // Before the first sweep of a segment, which is the one from its end.
  void begin() {
    future_ = Sums<T>::empty();
    past_ = PassedSums<T, kUpstream>();
  }

  // Tile i of the sweep from the end: stores the sum over the tokens after the tile, then adds the tile's tokens.
  void sum_ahead(int64_t i, const Run& run) {
    ahead_[i] = future_;
    if (i == 0) return;
    Vec<T> k[kTile], v[kTile];
    prefetch(rows_before(run));
    load(run, k, v);
    if (!kUpstream && shared_.usable()) {
      const Vec<T> base = bounds(run, k).highest;
      Partial<T> sum;
      for (int64_t t = run.count - 1; t >= 0; --t) {
        const Vec<T> weight = exp_below<T>(k[t] - base);
        sum.template add<kSlope>(shared_, weight * v[t], weight);
      }
      future_ = sum.added_to(future_, rate_.w, run.count, base);
      return;
    }
    Sums<T> tile = Sums<T>::empty();
    for (int64_t t = run.count - 1; t >= 0; --t) tile.template add<kSlope>(rate_.w, k[t], v[t], splat(T(1)));
    future_ = future_.later(rate_.w, splat(T(run.count))).plus(tile);
  }

  // Tile i of the sweep from the start: calls write(t, v, quotient) for each of its steps. Returns whether all quotients have the same top.
  template <class Write> MEDSSM_INLINE bool advance(int64_t i, const Run& run, const Write& write) {
    Vec<T> k[kTile], v[kTile];
    prefetch(rows_after(run));
    load(run, k, v);
    if constexpr (!kUpstream) {
      const Bounds keys = bounds(run, k);
      if (shared_.usable_for(keys.lowest, keys.highest, past_.passed(), ahead_[i])) {
        advance_shared(run, k, v, keys.highest, ahead_[i], write);
        return true;
      }
    }
    Term<T> later[kTile];
    const Vec<T> one = splat(T(1));
    const Rate<T> rate = rate_;
    Sums<T> future = ahead_[i];
    for (int64_t t = run.count - 1; t >= 0; --t) {
      later[t] = ahead<T, kUpstream>(rate, future.term);
      future.template add<kSlope>(rate.w, k[t], v[t], one);
    }
    if (run.first) {
      past_.begin_chunk(rate);
      first_ = k[0];
    }
    PassedSums<T, kUpstream> past = past_;
    past.begin(rate);
    for (int64_t t = 0; t < run.count; ++t) {
      if (!run.first || t > 0) past.template subtract<kSlope>(rate, k[t], v[t], one);
      write(t, v[t], quotient(past, later[t], k[t], v[t]));
      past.template add<kSlope>(rate, k[t], v[t], one);
    }
    past.end(rate);
    past_ = past;
    return false;
  }

 private:
  struct Bounds {
    Vec<T> lowest, highest;
  };
  static MEDSSM_INLINE Bounds bounds(const Run& run, const Vec<T>* k) {
    Bounds keys = {k[0], k[0]};
    for (int64_t t = 1; t < run.count; ++t) keys = {min(keys.lowest, k[t]), max(keys.highest, k[t])};
    return keys;
  }

  template <class Write>
  MEDSSM_INLINE void advance_shared(const Run& run, const Vec<T>* k, const Vec<T>* v, Vec<T> base, const Sums<T>& future, const Write& write) {
    Vec<T> weights[kTile];
    Partial<T> later[kTile], sum;
    for (int64_t t = run.count - 1; t >= 0; --t) {
      weights[t] = exp_bounded<T>(k[t] - base);
      later[t] = sum;
      sum.template add<kSlope>(shared_, weights[t] * v[t], weights[t]);
    }
    const Outside<T> before(past_.passed(), base), after(future, base);
    sum = {};
    for (int64_t t = 0; t < run.count; ++t) {
      const Vec<T> own = shared_.bonus * weights[t];
      const Partial<T>& ahead = later[t];
      Partial<T> all = {fma(own, v[t], sum.a + ahead.a), own + (sum.b + ahead.b), sum.slope_a + ahead.slope_a, sum.slope_b + ahead.slope_b};
      before.template add_to<kSlope>(all, shared_, t);
      after.template add_to<kSlope>(all, shared_, run.count - 1 - t);
      const Vec<T> inverse = medssm::quotient<T>(splat(T(1)), all.b);
      write(t, v[t], Quotient<T>{base, own, all.a * inverse, inverse, all.slope_a, all.slope_b});
      sum.template add<kSlope>(shared_, weights[t] * v[t], weights[t]);
    }
    past_.passed() = sum.added_to(past_.passed(), rate_.w, run.count, base);
  }

  void prefetch(const Tile& rows) const {
    block_.prefetch_rows(p_.k, rows);
    block_.prefetch_rows(p_.v, rows);
  }
  MEDSSM_INLINE Quotient<T> quotient(const PassedSums<T, kUpstream>& past, const Term<T>& later, Vec<T> k, Vec<T> v) const {
    constexpr int kTerms = PassedSums<T, kUpstream>::kTerms + 1;
    Term<T> terms[kTerms];
    past.template terms<kSlope>(rate_, terms);
    terms[kTerms - 1] = later;
    Quotient<T> q;
    const Vec<T> own = u_ + k;
    q.top = kUpstream ? max(own, past.first_shift(rate_, first_)) : own;
    for (const Term<T>& term : terms) q.top = max(q.top, term.shift);
    q.own = exp_below<T>(own - q.top);
    Vec<T> a = q.own * v, b = kUpstream ? q.own + splat(T(kEps)) : q.own;
    if constexpr (kUpstream && kSlope) a -= T(kEps) * center_;
    q.slope_a = q.slope_b = Vec<T>{};
    for (const Term<T>& term : terms) {
      const Vec<T> scale = exp_below<T>(term.shift - q.top);
      a = fma(scale, term.a, a);
      b = fma(scale, term.b, b);
      if constexpr (kSlope) {
        q.slope_a = fma(scale, term.slope_a, q.slope_a);
        q.slope_b = fma(scale, term.slope_b, q.slope_b);
      }
    }
    q.inverse = medssm::quotient<T>(splat(T(1)), b);
    q.out = a * q.inverse;
    return q;
  }

  const Problem& p_;
  const Walk& walk_;
  const Block<T> block_;
  const Rate<T> rate_;
  const Vec<T> u_;
  const SharedShift<T> shared_;
  Sums<T>* const ahead_;  // for each tile, the sum over the tokens after it
  Sums<T> future_ = Sums<T>::empty();
  PassedSums<T, kUpstream> past_;
  Vec<T> first_ = {};  // the key of the chunk's first token
  Vec<T> center_ = {};
};

}  // namespace
}  // namespace medssm
