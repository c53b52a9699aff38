// The general form of the delta rule on the CPU: its arguments, and the two kinds of pass over the tokens.
//
//   S' = Diag(e_t) S_{t-1};  R_t = S'^T a_t;  S_t = S' - c_t R_t^T + k_t (w_t * v_t)^T;  o_t = scale S_t^T q_t
//
// With `first`, R_t = S_{t-1}^T a_t. If c is k, the two updates are one: k_t x_t^T with x_t = w_t * v_t - R_t.
//
// As in passes.h, one sweep over the rows of the state serves a block of four tokens. The state has keys as rows, with one decay per row, or (in the
// transposed state) keys as lanes, with one decay per lane. In the first case the packing of the coefficients applies the decays: a coefficient of a
// read-out is multiplied by the decays from the begin of the block to its token, one of an update by those from its token to the end of the block,
// and their dot products by those from the one token to the other.
#pragma once
#include "passes.h"

namespace medssm {
namespace {

// kernels/delta_rule/native.py packs this struct.
struct General {
  Problem problem;                 // g: (b, l, h), or with per_key (b, l, h, dk)
  Tokens erase, erase_out, write;  // a, c, w. erase_out.data is null if c is k. write: (b, l, h), or with per_value (b, l, h, dv)
  int64_t shares;                  // `erase` is k, and a is beta times that
  int64_t per_key, per_value, first;
};

// How many outer products a token adds to the state: kUpdates 1 if c is k. The number of lane vectors of a part is smaller with 2: each of them
// needs more registers.
template <int kUpdates> constexpr int kVectorsOf = kUpdates == 1 ? kVectors : 1;

// Calls f(kUpdates) as a compile-time constant.
template <class F> void with_updates(const General& a, const F& f) {
  if (a.erase_out.data)
    f(std::integral_constant<int, 2>{});
  else
    f(std::integral_constant<int, 1>{});
}

// Features of a tensor whose rows are not needed: none.
MEDSSM_INLINE int64_t if_given(bool given, int64_t features) { return given ? features : 0; }

// e = exp(g) of a block's tokens per row of the state: of logs[j], or e[j] for all rows if there are no logs.
template <class T> struct RowDecays {
  const T* const* logs;
  T e[kBlock];
  template <class Load> MEDSSM_INLINE Vec<T> at(int j, int64_t row, const Load& load_row) const {
    return logs ? exp<T>(load_row(logs[j] + row)) : splat(e[j]);
  }
};

// What a token's recalled key is multiplied by: beta if it is k, else 1.
template <class T> void shares(const General& a, const Item& item, const Block& block, T* share) {
  for (int j = 0; j < kBlock; ++j) share[j] = T(1);
  if (a.shares) scalars(a.problem.beta, item, block, T(0), share);
}

// Calls f(at, load) for each vector of n rows.
template <class T, class F> MEDSSM_INLINE void each_vector(int64_t n, const F& f) {
  int64_t at = 0;
  for (; at + kLanes<T> <= n; at += kLanes<T>) f(at, [](const T* p) { return load<T>(p); });
  if (at < n) f(at, [&](const T* p) { return load_part<T>(p, static_cast<int>(n - at)); });
}

// Packs a block of a forward pass. rows: the coefficients of kUpdates updates, of the read-out before them and of the one after them. products:
// kProducts for each update u: before(i, j) of token i's update and token j's first read-out, upto(i, j) of the same and the second read-out.
// kDecays: with the decays of rows, and shares of the first read-out.
template <class T, int kUpdates, bool kDecays, bool kFirst> __attribute__((noinline)) void pack_forward(const T* const* const (&rows)[kUpdates + 2],
                                                                                                        const RowDecays<T>& decays, const T* share,
                                                                                                        int64_t n, T* panel, T* products) {
  constexpr int kWidth = (kUpdates + 2) * kBlock;
  Vec<T> sums[kUpdates * kProducts] = {};
  each_vector<T>(n, [&](int64_t at, const auto& load_row) {
    Vec<T> written[kUpdates][kBlock], recall[kBlock], query[kBlock], kept = splat(T(1));
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; ++j) {
      Vec<T> a = load_row(rows[kUpdates][j] + at), q = load_row(rows[kUpdates + 1][j] + at), before_decay = kept;
      if constexpr (kDecays) a *= splat(share[j]);
      const auto recalled = [&] {
#pragma GCC unroll 4
        for (int i = 0; i < j; ++i)
          for (int u = 0; u < kUpdates; ++u) {
            Vec<T>& sum = sums[u * kProducts + before(i, j)];
            sum = fma(written[u][i], a, sum);
          }
      };
      if constexpr (kFirst) recalled();
      if constexpr (kDecays) {
        const Vec<T> e = decays.at(j, at, load_row);
#pragma GCC unroll 4
        for (int i = 0; i < j; ++i)
          for (int u = 0; u < kUpdates; ++u) written[u][i] *= e;
        kept *= e;
      }
      if constexpr (!kFirst) recalled();
      for (int u = 0; u < kUpdates; ++u) written[u][j] = load_row(rows[u][j] + at);
#pragma GCC unroll 4
      for (int i = 0; i <= j; ++i)
        for (int u = 0; u < kUpdates; ++u) {
          Vec<T>& sum = sums[u * kProducts + upto(i, j)];
          sum = fma(written[u][i], q, sum);
        }
      recall[j] = kDecays ? a * (kFirst ? before_decay : kept) : a;
      query[j] = kDecays ? q * kept : q;
    }
    T* const to = panel + at * kWidth;
    for (int u = 0; u < kUpdates; ++u) interleave<T, kWidth>(written[u], to + u * kBlock);
    interleave<T, kWidth>(recall, to + kUpdates * kBlock);
    interleave<T, kWidth>(query, to + (kUpdates + 1) * kBlock);
    if constexpr (kDecays) store(panel + round_up(n, kLanes<T>) * kWidth + at, kept);
  });
  sum_all<T, kUpdates * kProducts>(sums, products);
}

// Packs a block of an adjoint pass. rows: the coefficients of the update before the read-outs, of the one after them, and of kReads read-outs.
// products: kProducts for each read-out r: upto(i, j) of token i's first update and token j's read-out, before(i, j) of its second update.
template <class T, int kReads, bool kDecays, bool kFirst> __attribute__((noinline)) void pack_back(const T* const* const (&rows)[2 + kReads],
                                                                                                   const RowDecays<T>& decays, const T* share,
                                                                                                   int64_t n, T* panel, T* products) {
  constexpr int kWidth = (2 + kReads) * kBlock;
  Vec<T> sums[kReads * kProducts] = {};
  each_vector<T>(n, [&](int64_t at, const auto& load_row) {
    Vec<T> one[kBlock], two[kBlock], read[kReads][kBlock], kept = splat(T(1));
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; ++j) {
      one[j] = load_row(rows[0][j] + at);
      for (int r = 0; r < kReads; ++r) {
        const Vec<T> x = load_row(rows[2 + r][j] + at);
#pragma GCC unroll 4
        for (int i = 0; i <= j; ++i) {
          Vec<T>& sum = sums[r * kProducts + upto(i, j)];
          sum = fma(one[i], x, sum);
        }
#pragma GCC unroll 4
        for (int i = 0; i < j; ++i) {
          Vec<T>& sum = sums[r * kProducts + before(i, j)];
          sum = fma(two[i], x, sum);
        }
        read[r][j] = kDecays ? x * kept : x;
      }
      two[j] = load_row(rows[1][j] + at);
      if constexpr (kDecays) {
        two[j] *= splat(share[j]);
        const Vec<T> e = decays.at(j, at, load_row);
#pragma GCC unroll 4
        for (int i = 0; i <= j; ++i) {
          one[i] *= e;
          if (i < j || !kFirst) two[i] *= e;
        }
        kept *= e;
      }
    }
    T* const to = panel + at * kWidth;
    interleave<T, kWidth>(one, to);
    interleave<T, kWidth>(two, to + kBlock);
    for (int r = 0; r < kReads; ++r) interleave<T, kWidth>(read[r], to + (2 + r) * kBlock);
    if constexpr (kDecays) store(panel + round_up(n, kLanes<T>) * kWidth + at, kept);
  });
  sum_all<T, kReads * kProducts>(sums, products);
}

// As pack_forward and pack_back, into the panel of the state. With keys as lanes there are no decays and shares of rows.
template <class T, int N, int kUpdates, Decay kDecay>
MEDSSM_INLINE void pack_forward(State<T, N, kUpdates + 2, kUpdates, 2, kDecay>& state, const T* const* const (&rows)[kUpdates + 2], T* products,
                                const RowDecays<T>& decays = {}, const T* share = nullptr, bool first = false) {
  constexpr bool kDecays = kDecay == Decay::kRows;
  state.pack_with([&](T* panel) {
    first ? pack_forward<T, kUpdates, kDecays, kDecays>(rows, decays, share, state.rows(), panel, products)
          : pack_forward<T, kUpdates, kDecays, false>(rows, decays, share, state.rows(), panel, products);
  });
}
template <class T, int N, int kReads, Decay kDecay>
MEDSSM_INLINE void pack_back(State<T, N, 2 + kReads, 2, kReads, kDecay>& state, const T* const* const (&rows)[2 + kReads], T* products,
                             const RowDecays<T>& decays = {}, const T* share = nullptr, bool first = false) {
  constexpr bool kDecays = kDecay == Decay::kRows;
  state.pack_with([&](T* panel) {
    first ? pack_back<T, kReads, kDecays, kDecays>(rows, decays, share, state.rows(), panel, products)
          : pack_back<T, kReads, kDecays, false>(rows, decays, share, state.rows(), panel, products);
  });
}

// -- keys as rows -------------------------------------------------------------------------------------------------------------------

// For a part of a packed block. x_of(j, recalled, x) gets R_t and writes the values of token j's updates to x[kUpdates]. out(j, after) gets S_t^T
// q_t.
template <class T, int N, int kUpdates, class X, class Out>
MEDSSM_INLINE void write_then_read(State<T, N, kUpdates + 2, kUpdates, 2, Decay::kRows>& state, int part, const T* products, const Prefetch& prefetch,
                                   const X& x_of, const Out& out) {
  using L = Lanes<T, N>;
  L read[2 * kBlock], x[kBlock][kUpdates];
  state.read(part, prefetch, read);
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    L recalled = read[j], after = read[kBlock + j];
#pragma GCC unroll 4
    for (int i = 0; i < j; ++i)
      for (int u = 0; u < kUpdates; ++u) recalled = recalled + products[u * kProducts + before(i, j)] * x[i][u];
    x_of(j, recalled, x[j]);
#pragma GCC unroll 4
    for (int i = 0; i <= j; ++i)
      for (int u = 0; u < kUpdates; ++u) after = after + products[u * kProducts + upto(i, j)] * x[i][u];
    out(j, after);
    for (int u = 0; u < kUpdates; ++u) state.update(part, u, j, x[j][u]);
  }
}

// The adjoint, from the last token to the first: dS_t = X_t + q_t x_t^T;  read_t = dS_t^T r_t;  X_{t-1} = e_t (dS_t + a_t y_t^T), or with `first`
// e_t dS_t + a_t y_t^T. x[j] is x of token j. y_of(j, read) gets kReads read-outs and returns y of token j.
template <class T, int N, int kReads, class Y> MEDSSM_INLINE void read_between(State<T, N, 2 + kReads, 2, kReads, Decay::kRows>& state, int part,
                                                                               const T* products, const Prefetch& prefetch, const Lanes<T, N>* x,
                                                                               const Y& y_of) {
  using L = Lanes<T, N>;
  L read[kReads * kBlock], y[kBlock];
  state.read(part, prefetch, read);
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    L sum[kReads];
    for (int r = 0; r < kReads; ++r) {
      sum[r] = read[r * kBlock + j] + products[r * kProducts + upto(j, j)] * x[j];
#pragma GCC unroll 4
      for (int i = 0; i < j; ++i) sum[r] = sum[r] + products[r * kProducts + upto(i, j)] * x[i] + products[r * kProducts + before(i, j)] * y[i];
    }
    y[j] = y_of(j, sum);
    state.update(part, 0, j, x[j]);
    state.update(part, 1, j, y[j]);
  }
}

// -- keys as lanes ------------------------------------------------------------------------------------------------------------------

// The same as write_then_read above with the transposed state, where all updates are known: x[u][j], with decays e[j]. out(j, recalled, after, own)
// gets S' a_t (with `first`, S_{t-1} a_t) and, in two parts, S_t q_t = after + own: `own` comes from the updates of token j.
template <class T, int N, int kUpdates, class Out>
MEDSSM_INLINE void write_then_read(State<T, N, kUpdates + 2, kUpdates, 2, Decay::kLanes>& state, int part, const T* products, const Lanes<T, N>* e,
                                   bool first, const Prefetch& prefetch, const Lanes<T, N> (&x)[kUpdates][kBlock], const Out& out) {
  using L = Lanes<T, N>;
  L read[2 * kBlock], faded[kUpdates][kBlock], kept = L::all(T(1));
  state.read(part, prefetch, read);
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    const auto sum = [&](int of_read, const auto& product) {
      L total = kept * read[of_read * kBlock + j];
#pragma GCC unroll 4
      for (int i = 0; i < j; ++i)
        for (int u = 0; u < kUpdates; ++u) total = total + products[u * kProducts + product(i, j)] * faded[u][i];
      return total;
    };
    L recalled, own = products[upto(j, j)] * x[0][j];
    if (first) recalled = sum(0, before);
    for (int u = 0; u < kUpdates; ++u) {
      for (int i = 0; i < j; ++i) faded[u][i] = e[j] * faded[u][i];
      faded[u][j] = x[u][j];
      if (u) own = own + products[u * kProducts + upto(j, j)] * x[u][j];
    }
    kept = e[j] * kept;
    if (!first) recalled = sum(0, before);
    out(j, recalled, sum(1, upto), own);
  }
  for (int u = 0; u < kUpdates; ++u)
    for (int j = 0; j < kBlock; ++j) state.update(part, u, j, faded[u][j]);
  state.decay(part, kept);
}

// The same as read_between above with the transposed state, where x[j] and y[j] are known, with decays e[j]. out(j, later, own) gets kReads read-outs
// in two parts: later[r] + own[r] * x[j].
template <class T, int N, int kReads, class Out>
MEDSSM_INLINE void read_between(State<T, N, 2 + kReads, 2, kReads, Decay::kLanes>& state, int part, const T* products, const Lanes<T, N>* e,
                                bool first, const Prefetch& prefetch, const Lanes<T, N>* x, const Lanes<T, N>* y, const Out& out) {
  using L = Lanes<T, N>;
  L read[kReads * kBlock], one[kBlock], two[kBlock], kept = L::all(T(1));
  state.read(part, prefetch, read);
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; ++j) {
    L later[kReads];
    T own[kReads];
    for (int r = 0; r < kReads; ++r) {
      later[r] = kept * read[r * kBlock + j];
      own[r] = products[r * kProducts + upto(j, j)];
#pragma GCC unroll 4
      for (int i = 0; i < j; ++i)
        later[r] = later[r] + products[r * kProducts + upto(i, j)] * one[i] + products[r * kProducts + before(i, j)] * two[i];
    }
    out(j, later, own);
    one[j] = x[j];
    two[j] = y[j];
    for (int i = 0; i <= j; ++i) {
      one[i] = e[j] * one[i];
      if (i < j || !first) two[i] = e[j] * two[i];
    }
    kept = e[j] * kept;
  }
  for (int j = 0; j < kBlock; ++j) {
    state.update(part, 0, j, one[j]);
    state.update(part, 1, j, two[j]);
  }
  state.decay(part, kept);
}

}  // namespace
}  // namespace medssm
