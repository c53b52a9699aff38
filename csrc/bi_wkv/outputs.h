// The forward pass through a block of channels, which the backward pass makes too.
//
// A sweep from the end keeps what lies ahead of each tile; a sweep from the start finds, tile by tile, what lies ahead of each of its steps by
// going back through the tile, which is then in the cache, and what lies behind on the way.
#pragma once
#include "problem.h"
#include "sums.h"

namespace medssm {
namespace {

// One step's quotient. Its weights are relative to e^top.
template <class T> struct Quotient { Vec<T> top, own, out, inverse, slope_a, slope_b; };

template <class T, bool kUpstream, bool kSlope> class Outputs {
 public:
  // ahead: room for a sum for each tile of a segment.
  Outputs(const Problem& p, const Walk& walk, const Block<T>& block, Sums<T>* ahead)
      : p_(p), walk_(walk), block_(block), rate_(block.weight(p.w)), u_(block.weight(p.u)), ahead_(ahead) {}

  const Block<T>& block() const { return block_; }
  const Rate<T>& rate() const { return rate_; }
  Tile rows(const Run& run) const { return walk_.steps(run.from, run.from + run.count); }

  // A segment begins, at its end.
  void begin() {
    future_ = Sums<T>::empty();
    past_ = Behind<T, kUpstream>();
  }

  // Tile i of the sweep from the end.
  void retreat(int64_t i, const Run& run) {
    ahead_[i] = future_;
    if (i == 0) return;
    Vec<T> k[kTile], v[kTile];
    load(run, k, v);
    Sums<T> future = future_;
    for (int64_t t = run.count - 1; t >= 0; --t) future.template add<kSlope>(rate_.w, k[t], v[t], splat(T(1)));
    future_ = future;
  }

  // Tile i of the sweep from the start: write(t, v, quotient) for each of its steps.
  template <class Write> MEDSSM_INLINE void advance(int64_t i, const Run& run, const Write& write) {
    Vec<T> k[kTile], v[kTile];
    Term<T> later[kTile];
    load(run, k, v);
    const Vec<T> one = splat(T(1));
    const Rate<T> rate = rate_;
    Sums<T> future = ahead_[i];
    for (int64_t t = run.count - 1; t >= 0; --t) {
      later[t] = ahead<T, kUpstream>(rate, future.seen);
      future.template add<kSlope>(rate.w, k[t], v[t], one);
    }
    if (run.first) {
      past_.enter(rate);
      first_ = k[0];
    }
    Behind<T, kUpstream> past = past_;
    for (int64_t t = 0; t < run.count; ++t) {
      if (!run.first || t > 0) past.template take<kSlope>(rate, k[t], v[t], one);
      write(t, v[t], quotient(past, later[t], k[t], v[t]));
      past.template add<kSlope>(rate, k[t], v[t], one);
    }
    past_ = past;
  }

 private:
  void load(const Run& run, Vec<T>* k, Vec<T>* v) const {
    block_.load_rows(p_.k, rows(run), k);
    block_.load_rows(p_.v, rows(run), v);
  }

  MEDSSM_INLINE Quotient<T> quotient(const Behind<T, kUpstream>& past, const Term<T>& later, Vec<T> k, Vec<T> v) const {
    constexpr int kTerms = Behind<T, kUpstream>::kTerms + 1;
    Term<T> terms[kTerms];
    past.template see<kSlope>(rate_, terms);
    terms[kTerms - 1] = later;
    Quotient<T> q;
    const Vec<T> own = u_ + k;
    q.top = kUpstream ? max(own, past.met(rate_, first_)) : own;
    for (const Term<T>& term : terms) q.top = max(q.top, term.shift);
    q.own = exp_below<T>(own - q.top);
    Vec<T> a = q.own * v, b = kUpstream ? q.own + splat(T(kEps)) : q.own;
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
  Sums<T>* const ahead_;  // of each tile
  Sums<T> future_ = Sums<T>::empty();
  Behind<T, kUpstream> past_;
  Vec<T> first_ = {};  // the key of the chunk's first token
};

}  // namespace
}  // namespace medssm
