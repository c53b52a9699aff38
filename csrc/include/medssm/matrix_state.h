// The recurrence of a matrix state over one tile of steps, for one vector of its columns (one column per lane):
//
//   S = e_t S;  S += k_t v_t;  o_t = q_t S        S (rows, lanes), q and k (rows), v and o (lanes)
//
// Every pass of linear attention, gated linear attention and SSD, forward and backward, has this form, with other tensors as q, k and v:
//
//   forward        o  = scan(q, k, v)
//   its gradients  dq = scan(q: do, k: v, v: k)                       the state transposed
//                  dv = scan backward in time(q: k, k: q, v: do)      the gradient of the state
//                  dk = scan backward in time(q: v, k: do, v: q)      the gradient of the state, transposed
//
// A strip is kStrip rows of the state. It is kept in registers while the tile's steps are computed. With AVX-512 a step takes three operations of the
// multiplier per row, two without decay. The only decay factors are the e_t themselves: no inverse or quotient of decays is computed, so strong decay
// cannot cause overflow.
#pragma once
#include "medssm/shuffle.h"
#include "medssm/token_rows.h"

namespace medssm {
namespace {

// The decay e_t: none, one value for the whole state, one per row, or one per lane.
enum class Decay { kNone, kWhole, kRows, kLanes };

// The variants of the recurrence. kAfter: S = e_t S is the last operation of a step, not the first; a scan backward in time needs this. kStrict: o_t
// is read after the decay but before k_t v_t is added, so it does not include (q_t . k_t) v_t. The gradient of the decays needs q_t o_t without this
// term. The term may be much larger than the rest, so subtracting it afterwards would lose accuracy.
template <Decay kKind, bool kIsAfter, bool kIsStrict> struct Form {
  static constexpr Decay kDecay = kKind;
  static constexpr bool kAfter = kIsAfter, kStrict = kIsStrict;
};

// Strips have kStrip or kShortStrip rows. The number of rows is padded with zeros to a multiple of kShortStrip.
constexpr int64_t kShortStrip = 8;
constexpr int64_t kStrip = kVectorBytes == 64 ? 16 : 8;
MEDSSM_INLINE int64_t padded_rows(int64_t rows) { return round_up(rows, kShortStrip); }

// The operands of a tile. Per step: q and k have padded_rows(rows) elements, v has one vector, decay has 1 element, `rows` elements or one vector.
template <class T> struct Operands {
  View<T> q, k, v, decay;
  int64_t count;
};

template <class T, class F, int kRows> __attribute__((noinline)) void advance_strip(const Operands<T>& in, int64_t row, bool first, T* state, T* o) {
  constexpr int W = kLanes<T>;
  Vec<T> S[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) S[r] = load<T>(state + r * W);
  const T *q = in.q.rows + row, *k = in.k.rows + row, *v = in.v.rows, *e = in.decay.rows + (F::kDecay == Decay::kRows ? row : 0);
  for (int64_t t = 0; t < in.count; ++t, q += in.q.step, k += in.k.step, v += in.v.step, e += in.decay.step, o += W) {
    const Vec<T> v_t = load<T>(v);
    // Prefetch the same step of the next tile (if the view points into a tensor). The hardware prefetcher does not, because tokens are far apart.
    __builtin_prefetch(q + kTileSteps * in.q.step, 0, 2);
    __builtin_prefetch(k + kTileSteps * in.k.step, 0, 2);
    if (first) __builtin_prefetch(v + kTileSteps * in.v.step, 0, 2);
    [[maybe_unused]] Vec<T> decay;
    if constexpr (F::kDecay == Decay::kWhole) decay = splat(*e);
    if constexpr (F::kDecay == Decay::kLanes) decay = load<T>(e);
    Vec<T> sum[2] = {first ? Vec<T>{} : load<T>(o), Vec<T>{}};  // two sums: the additions to a single one would wait for each other
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if constexpr (F::kDecay == Decay::kRows) decay = splat(e[r]);
      if constexpr (F::kDecay != Decay::kNone && !F::kAfter) S[r] = S[r] * decay;
      if constexpr (F::kStrict) sum[r % 2] = fma(splat(q[r]), S[r], sum[r % 2]);
      S[r] = fma(splat(k[r]), v_t, S[r]);
      if constexpr (!F::kStrict) sum[r % 2] = fma(splat(q[r]), S[r], sum[r % 2]);
      if constexpr (F::kDecay != Decay::kNone && F::kAfter) S[r] = S[r] * decay;
    }
    store(o, sum[0] + sum[1]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) store(state + r * W, S[r]);
}

// Computes a tile: updates state [padded rows][lane] and sets o [step][lane].
template <class T, class F> void advance(const Operands<T>& in, int64_t rows, T* state, T* o) {
  int64_t row = 0;
  for (; rows - row > kStrip - kShortStrip; row += kStrip) advance_strip<T, F, kStrip>(in, row, row == 0, state + row * kLanes<T>, o);
  if constexpr (kStrip > kShortStrip)
    if (row < rows) advance_strip<T, F, kShortStrip>(in, row, row == 0, state + row * kLanes<T>, o);
}

// sums[t] = the sum of the lanes of f(t), for each step t. `sums` has kTileSteps elements.
template <class T, class F> void lane_sums(int64_t count, const F& f, T* sums) {
  constexpr int W = kLanes<T>;
  for (int64_t t = 0; t < count; t += W) {
    Vec<T> v[W];
    for (int i = 0; i < W; ++i) v[i] = t + i < count ? f(t + i) : Vec<T>{};
    store(sums + t, sum_each<T, W>(v));
  }
}

// q_t . k_t of each step: the factor of v_t that kStrict omits from o_t.
template <class T> void own_products(const View<T>& q, const View<T>& k, int64_t rows, int64_t count, T* own) {
  constexpr int W = kLanes<T>;
  const int64_t whole = rows / W * W;
  const int rest = static_cast<int>(rows - whole);
  lane_sums<T>(
      count,
      [&](int64_t t) {
        Vec<T> sum{};
        for (int64_t r = 0; r < whole; r += W) sum = fma(load<T>(q[t] + r), load<T>(k[t] + r), sum);
        return rest ? fma(load_part<T>(q[t] + whole, rest), load_part<T>(k[t] + whole, rest), sum) : sum;
      },
      own);
}

}  // namespace
}  // namespace medssm
