// Gradients of the general form of the delta rule. With X_t the gradient of S_t that comes from later tokens and do' = scale do:
//
//   dS_t = X_t + q_t do'_t^T;  du_t = dS_t^T k_t;  dR_t = -dS_t^T c_t;  X_{t-1} = e_t (dS_t + a_t dR_t^T), with `first` e_t dS_t + a_t dR_t^T
//   dq_t = scale S_t do_t;  dk_t = dS_t (w_t * v_t);  dc_t = -dS_t R_t;  da_t = S'_t dR_t, with `first` S_{t-1} dR_t;  dw_t = du_t * v_t;  dv_t = w_t
//   * du_t
//
// If c is k, dk_t = dS_t u_t with u_t = w_t * v_t - R_t has both. There are three passes. The first computes X with one column per lane: du and dR.
// The second computes X and the third S with one row per lane: the rest.
//
// dg_t = the sums over the rows of S'_t * dS'_t, with dS' the gradient of S'. Let F_t be those of S_t * X_t. Then, each product one of vectors over
// keys,
//
//   F_t = dg_t - [q_t * S'_t do'_t + c_t * X_t R_t - k_t * X_t (w_t * v_t)] - a_t * da_t,  dg_t = F_{t-1}
//
// or with `first` dg_t = F_{t-1} - a_t * da_t, and the last term of F_t is absent. The terms that a token contributes to its own gradient are not
// among these. dg is a running sum as in cpu_backward.cpp, with the same points where it begins anew.
#include "general.h"
#include "gradients.h"
#include "medssm/abi.h"
#include "medssm/parallel.h"

using namespace medssm;

namespace {

struct Backward {
  General general;
  Tokens dout;
  const void *dstate, *recalled;             // contiguous, in the compute type; dstate may be null; recalled is R
  void *dq, *dk, *dv, *derase, *derase_out;  // contiguous, in the compute type, like all outputs below; derase_out: null without erase_out
  void *dwrite, *dg, *dinitial;              // shaped as write, g and the initial state; dg and dinitial are null without those
  void* dbeta;                               // (b, l, h): with `shares`, of beta as a's factor; then derase is null, and dk has a's part too
};

// Results that one pass computes for the next, and each part's share of what is one number per token, indexed by step.
template <class T> struct Intermediates {
  const Items<T> by_values, by_keys;
  const Scratch<T> u, drecalled;       // (b, l, h, dv): u, or w v if c is not k
  const Scratch<T> term;               // (b, l, h, dk): c X R - k X (w v), if dg is not of this shape
  const Scratch<T> dwrite, dg, dbeta;  // shares (part, l)

  Intermediates(const Backward& b, int vectors) :
      by_values(b.general.problem, b.general.problem.values, b.general.problem.keys, vectors),
      by_keys(b.general.problem, b.general.problem.keys, b.general.problem.values, vectors),
      u(tokens(b) * b.general.problem.values),
      drecalled(tokens(b) * b.general.problem.values),
      term(if_given(per_head(b), tokens(b) * b.general.problem.keys)),
      dwrite(if_given(!b.general.per_value, tokens(b) * by_values.parts)),
      dg(if_given(per_head(b), tokens(b) * by_keys.parts)),
      dbeta(if_given(b.dbeta, tokens(b) * by_keys.parts)) {
    for (const Scratch<T>* x : {&u, &drecalled}) prefer_huge_pages(x->data(), tokens(b) * b.general.problem.values * static_cast<int64_t>(sizeof(T)));
  }
  static int64_t tokens(const Backward& b) { return b.general.problem.batch * b.general.problem.length * b.general.problem.heads; }
  static bool per_head(const Backward& b) { return b.dg && !b.general.per_key; }
};

// First pass: dv, dwrite, dinitial, u and dR. One column of X per lane, from the last token to the first.
template <class T, int N, int kUpdates>
void values_pass(const Backward& b, const Walk& walk, const Intermediates<T>& intermediates, int64_t i, Workspace<T>& memory) {
  using L = Lanes<T, N>;
  const General& a = b.general;
  const Problem& p = a.problem;
  const Item item = intermediates.by_values[i];
  const auto at_state = [&](int64_t sequence) { return state_offset(p, item, sequence) + item.first; };
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  Rows<T> q(p.q, item, 0, p.keys, memory), k(p.k, item, 0, p.keys, memory), g(p.g, item, 0, if_given(a.per_key, p.keys), memory),
      erase(a.erase, item, 0, p.keys, memory), erase_out(a.erase_out, item, 0, if_given(kUpdates > 1, p.keys), memory),
      v(p.v, item, item.first, item.columns, memory),
      write(a.write, item, if_given(a.per_value, item.first), if_given(a.per_value, item.columns), memory),
      dout(b.dout, item, item.first, item.columns, memory), recalled(dense<T>(b.recalled, p, p.values), item, item.first, item.columns, memory);
  const Target<T> dv(b.dv, p, item, p.values), dwrite(b.dwrite, p, item, p.values), u(intermediates.u.data(), p, item, p.values),
      drecalled(intermediates.drecalled.data(), p, item, p.values);
  State<T, N, 2 + kUpdates, 2, kUpdates, Decay::kRows> state(p.keys, item, memory);
  state.set(b.dstate, at_state(walk.last_sequence()), p.values, 1);
  each_tile_back(walk, 0, p.length, [&](const Tile& tile) {
    each_block(tile, false, [&](const Block& block) {
      RowDecays<T> e{a.per_key ? g.of(block) : nullptr, {}};
      T share[kBlock], w[kBlock], products[kUpdates * kProducts];
      if (!a.per_key) decays(p.g, item, block, e.e);
      shares(a, item, block, share);
      if (!a.per_value) scalars(a.write, item, block, T(0), w);
      const T *const *values = v.of(block), *const *gates = a.per_value ? write.of(block) : nullptr, *const *recalled_rows = recalled.of(block),
                     *const *douts = dout.of(block);
      const Prefetch ahead = prefetch(walk, p.length, block, false, q, k, g, erase, erase_out, v, write, dout, recalled);
      if constexpr (kUpdates == 1)
        pack_back<T, N, kUpdates>(state, {q.of(block), erase.of(block), k.of(block)}, products, e, share, a.first);
      else
        pack_back<T, N, kUpdates>(state, {q.of(block), erase.of(block), k.of(block), erase_out.of(block)}, products, e, share, a.first);
      each_part<T, N>(item, [&](const Part& part) {
        L x[kBlock];
        for (int j = 0; j < kBlock; ++j) x[j] = scale * L::at(douts[j] + part.first, part.lanes);
        Vec<T> of_write[kBlock] = {};
        read_between<T, N, kUpdates>(state, part.index, products, ahead, x, [&](int j, const L* read) {
          const L du = read[0], y = T(-1) * read[kUpdates - 1], value = L::at(values[j] + part.first, part.lanes);
          const L gate = gates ? L::at(gates[j] + part.first, part.lanes) : L::all(w[j]), of_gate = du * value;
          of_write[j] = of_gate.sum();
          if (j < block.count) {
            const int64_t at = block.token[j];
            L written = gate * value;
            if constexpr (kUpdates == 1) written = written - L::at(recalled_rows[j] + part.first, part.lanes);
            written.put(u[at] + part.first, part.lanes);
            y.put(drecalled[at] + part.first, part.lanes);
            (gate * du).put(dv[at] + part.first, part.lanes);
            if (a.per_value) of_gate.put(dwrite[at] + part.first, part.lanes);
          }
          return y;
        });
        if (!a.per_value) put_shares(of_write, block, intermediates.dwrite.data() + part.all * p.length);
      });
    });
    if (tile.begins_sequence()) {
      if (b.dinitial) state.get(b.dinitial, at_state(tile.sequence), p.values);
      state.set(b.dstate, at_state(tile.previous), p.values, 1);
    } else if (tile.begins_segment) {
      state.clear();
    }
  });
  if (b.dinitial) state.get(b.dinitial, at_state(walk.first_sequence()), p.values);
}

// What the two passes with one row of the state per lane read of a token: rows over values, and lanes over keys.
template <class T, int N, int kUpdates> class ByKeys {
 public:
  using L = Lanes<T, N>;

  static int64_t size(const Problem& p, int64_t columns) { return 4 * Rows<T>::size(p.values) + 5 * Rows<T>::size(columns); }

  ByKeys(const Backward& b, const Item& item, const Intermediates<T>& intermediates, Workspace<T>& memory) :
      a_(b.general),
      p_(a_.problem),
      item_(item),
      u_(dense<T>(intermediates.u.data(), p_, p_.values), item, 0, p_.values, memory),
      drecalled_(dense<T>(intermediates.drecalled.data(), p_, p_.values), item, 0, p_.values, memory),
      recalled_(dense<T>(b.recalled, p_, p_.values), item, 0, if_given(kUpdates > 1, p_.values), memory),
      dout_(b.dout, item, 0, p_.values, memory),
      q_(p_.q, item, item.first, item.columns, memory),
      k_(p_.k, item, item.first, item.columns, memory),
      erase_(a_.erase, item, item.first, item.columns, memory),
      erase_out_(a_.erase_out, item, item.first, if_given(kUpdates > 1, item.columns), memory),
      g_(p_.g, item, if_given(a_.per_key, item.first), if_given(a_.per_key, item.columns), memory) {}

  T share[kBlock];
  // Of a part.
  L q[kBlock], k[kBlock], a[kBlock], c[kBlock], e[kBlock];

  // The next block, before its parts are read.
  void begin(const Block& block) {
    shares(a_, item_, block, share);
    if (!a_.per_key) decays(p_.g, item_, block, decay_);
    queries_ = q_.of(block), keys_ = k_.of(block), erased_ = erase_.of(block);
    from_ = kUpdates > 1 ? erase_out_.of(block) : keys_;
    logs_ = a_.per_key ? g_.of(block) : nullptr;
  }
  MEDSSM_INLINE void read(const Part& part) {
    for (int j = 0; j < kBlock; ++j) {
      q[j] = L::at(queries_[j] + part.first, part.lanes);
      k[j] = L::at(keys_[j] + part.first, part.lanes);
      a[j] = share[j] * L::at(erased_[j] + part.first, part.lanes);
      c[j] = L::at(from_[j] + part.first, part.lanes);
      e[j] = logs_ ? L::at(logs_[j] + part.first, part.lanes) : L::all(decay_[j]);
      if (logs_)
        for (int l = 0; l < N; ++l) e[j].v[l] = exp<T>(e[j].v[l]);
    }
  }

  // Calls f(rows...): dR and do, and u; if there are two updates, w v and R in place of u.
  template <class F> void with_rows(const Block& block, const F& f) {
    if constexpr (kUpdates == 1)
      f(drecalled_.of(block), dout_.of(block), u_.of(block));
    else
      f(drecalled_.of(block), dout_.of(block), u_.of(block), recalled_.of(block));
  }
  Prefetch lines(const Walk& walk, const Block& block, bool forward) const {
    return prefetch(walk, p_.length, block, forward, u_, drecalled_, dout_, recalled_, q_, k_, erase_, erase_out_, g_);
  }

 private:
  const General& a_;
  const Problem& p_;
  const Item item_;
  Rows<T> u_, drecalled_, recalled_, dout_, q_, k_, erase_, erase_out_, g_;
  T decay_[kBlock];
  const T *const *queries_, *const *keys_, *const *erased_, *const *from_, *const *logs_;
};

// c X R - k X (w v) of each token and key: where dg will be, or in scratch memory.
template <class T> Target<T> terms(const Backward& b, const Item& item, const Intermediates<T>& intermediates) {
  return {b.general.per_key ? b.dg : intermediates.term.data(), b.general.problem, item, b.general.problem.keys};
}

// Second pass: dk and dc, and terms of dg. Stores X at the begin of each chunk in `kept`. One row of X per lane, from the last token to the first.
template <class T, int N, int kUpdates>
void keys_pass(const Backward& b, const Walk& walk, const Intermediates<T>& intermediates, int64_t i, Workspace<T>& memory, T* kept) {
  using L = Lanes<T, N>;
  const Problem& p = b.general.problem;
  const Item item = intermediates.by_keys[i];
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  ByKeys<T, N, kUpdates> token(b, item, intermediates, memory);
  const Target<T> dk(b.dk, p, item, p.keys), dc(b.derase_out, p, item, p.keys), term = terms(b, item, intermediates);
  State<T, N, 2 + kUpdates, 2, kUpdates, Decay::kLanes> state(p.values, item, memory);
  const auto begin = [&](int64_t sequence) { state.set(b.dstate, state_offset(p, item, sequence) + item.first * p.values, 1, p.values); };
  begin(walk.last_sequence());
  for (int64_t chunk = ceil_div(p.length, kChunk) - 1; chunk >= 0; --chunk) {
    each_tile_back(walk, chunk * kChunk, least((chunk + 1) * kChunk, p.length), [&](const Tile& tile) {
      each_block(tile, false, [&](const Block& block) {
        T products[kUpdates * kProducts];
        token.begin(block);
        token.with_rows(
            block, [&](auto drecalled, auto dout, const auto&... reads) { pack_back<T, N, kUpdates>(state, {dout, drecalled, reads...}, products); });
        const Prefetch ahead = token.lines(walk, block, false);
        each_part<T, N>(item, [&](const Part& part) {
          token.read(part);
          L x[kBlock];
          for (int j = 0; j < kBlock; ++j) x[j] = scale * token.q[j];
          read_between<T, N, kUpdates>(state, part.index, products, token.e, b.general.first, ahead, x, token.a,
                                       [&](int j, const L* later, const T* own) {
                                         if (j >= block.count) return;
                                         const int64_t at = block.token[j];
                                         (later[0] + own[0] * x[j]).put(dk[at] + part.first, part.lanes);
                                         L sum = T(-1) * (token.k[j] * later[0]);
                                         if constexpr (kUpdates > 1) {
                                           (T(-1) * (later[1] + own[1] * x[j])).put(dc[at] + part.first, part.lanes);
                                           sum = sum + token.c[j] * later[1];
                                         }
                                         if (b.dg) sum.put(term[at] + part.first, part.lanes);
                                       });
        });
      });
      if (tile.begins_sequence())
        begin(tile.previous);
      else if (tile.begins_segment)
        state.clear();
    });
    if (kept && chunk > 0) std::memcpy(kept + (chunk - 1) * state.size(), state.value(), static_cast<std::size_t>(state.size()) * sizeof(T));
  }
}

// The sums over values of a sequence's initial state times its gradient, for a part's keys.
template <class T, int N> Lanes<T, N> initial_products(const Backward& b, const Item& item, const Part& part, int64_t sequence) {
  alignas(64) T sums[N * kLanes<T>] = {};
  const Problem& p = b.general.problem;
  const int64_t at = state_offset(p, item, sequence) + (item.first + part.first) * p.values;
  if (b.dinitial)
    for (int64_t i = 0; i < part.lanes * p.values; ++i)
      sums[i / p.values] += static_cast<const T*>(p.initial)[at + i] * static_cast<const T*>(b.dinitial)[at + i];
  return Lanes<T, N>::at(sums, N * kLanes<T>);
}

// Third pass: dq, da and dg; if a is beta k, not da but its parts of dk and of dbeta. One row of S per lane.
template <class T, int N, int kUpdates>
void queries_pass(const Backward& b, const Walk& walk, const Intermediates<T>& intermediates, int64_t i, Workspace<T>& memory, const T* kept) {
  using L = Lanes<T, N>;
  const Problem& p = b.general.problem;
  const Item item = intermediates.by_keys[i];
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  ByKeys<T, N, kUpdates> token(b, item, intermediates, memory);
  const Target<T> dq(b.dq, p, item, p.keys), dk(b.dk, p, item, p.keys), da(b.derase, p, item, p.keys), dg(b.dg, p, item, p.keys),
      term = terms(b, item, intermediates);
  State<T, N, kUpdates + 2, kUpdates, 2, Decay::kLanes> state(p.values, item, memory);
  L f[kMostParts];  // F of each part
  const auto begin = [&](int64_t sequence) {
    state.set(p.initial, state_offset(p, item, sequence) + item.first * p.values, 1, p.values);
    each_part<T, N>(item, [&](const Part& part) { f[part.index] = initial_products<T, N>(b, item, part, sequence); });
  };
  begin(walk.first_sequence());
  for (int64_t from = 0; from < p.length;) {
    const Tile tile = walk.tile(from, chunk_end(from));
    if (tile.begins_sequence()) {
      begin(tile.sequence);
    } else if (tile.begins_segment) {
      state.clear();
      for (L& product : f) product = L::all(T(0));
    } else if (kept && from > 0 && from % kChunk == 0) {
      const T *s = state.value(), *x = kept + (from / kChunk - 1) * state.size();
      each_part<T, N>(item, [&](const Part& part) {
        L product = L::all(T(0));
        for (int64_t end = (part.index + 1) * state.of_part(), row = end - state.of_part(); row < end; row += N * kLanes<T>)
          product = product + L::at(s + row, N * kLanes<T>) * L::at(x + row, N * kLanes<T>);
        f[part.index] = product;
      });
    }
    each_block(tile, true, [&](const Block& block) {
      T products[kUpdates * kProducts];
      token.begin(block);
      token.with_rows(block, [&](auto drecalled, auto dout, const auto&... updates) {
        pack_forward<T, N, kUpdates>(state, {updates..., drecalled, dout}, products);
      });
      const Prefetch ahead = token.lines(walk, block, true);
      each_part<T, N>(item, [&](const Part& part) {
        token.read(part);
        L x[kUpdates][kBlock];
        for (int j = 0; j < kBlock; ++j) {
          x[0][j] = token.k[j];
          if constexpr (kUpdates > 1) x[1][j] = T(-1) * token.c[j];
        }
        Vec<T> of_g[kBlock] = {}, of_beta[kBlock] = {};
        L product = f[part.index];
        write_then_read<T, N, kUpdates>(state, part.index, products, token.e, b.general.first, ahead, x,
                                        [&](int j, const L& recalled, const L& after, const L& own) {
                                          if (j >= block.count) return;
                                          const int64_t at = block.token[j];
                                          (scale * (after + own)).put(dq[at] + part.first, part.lanes);
                                          if (b.dbeta) {
                                            (L::at(dk[at] + part.first, part.lanes) + token.share[j] * recalled).put(dk[at] + part.first, part.lanes);
                                            of_beta[j] = (token.k[j] * recalled).sum();
                                          } else {
                                            recalled.put(da[at] + part.first, part.lanes);
                                          }
                                          if (!b.dg) return;
                                          const L erased = token.a[j] * recalled;
                                          if (b.general.first) product = product - erased;
                                          for (int l = 0; l < N; ++l)
                                            product.v[l] = select(token.e[j].v[l] < kNegligibleDecay<T>, Vec<T>{}, product.v[l]);
                                          const L here = product;
                                          product = product - (scale * (token.q[j] * after) + L::at(term[at] + part.first, part.lanes));
                                          if (!b.general.first) product = product - erased;
                                          if (b.general.per_key)
                                            here.put(dg[at] + part.first, part.lanes);
                                          else
                                            of_g[j] = here.sum();
                                        });
        f[part.index] = product;
        if (b.dbeta) put_shares(of_beta, block, intermediates.dbeta.data() + part.all * p.length);
        if (b.dg && !b.general.per_key) put_shares(of_g, block, intermediates.dg.data() + part.all * p.length);
      });
    });
    from += tile.count;
  }
}

// Adds the shares of a head's parts: (b, l, h).
template <class T> void add_shares(const Problem& p, const Walk& walk, const Scratch<T>& shares, const Items<T>& items, int64_t head, void* sums) {
  T* const to = static_cast<T*>(sums) + head / p.heads * p.length * p.heads + head % p.heads;
  const Tile all = walk.steps(0, p.length);
  for (int64_t step = 0; step < p.length; ++step) {
    T sum = T(0);
    for (int64_t part = 0; part < items.parts; ++part) sum += shares.data()[(head * items.parts + part) * p.length + step];
    to[all.token(step) * p.heads] = sum;
  }
}

template <class T, int kUpdates> void backward(const Backward& b) {
  constexpr int N = kVectorsOf<kUpdates>;
  const General& a = b.general;
  const Problem& p = a.problem;
  const Walk walk = p.walk();
  const Intermediates<T> intermediates(b, N);
  const int64_t tokens = intermediates.tokens(b), size = static_cast<int64_t>(sizeof(T));
  for (void* gradient : {b.dq, b.dk, b.derase})
    if (gradient) prefer_huge_pages(gradient, tokens * p.keys * size);
  prefer_huge_pages(b.dv, tokens * p.values * size);
  const int64_t threads = team_size(p, most(intermediates.by_values.count, intermediates.by_keys.count));
  const int64_t of_values = intermediates.by_values.most_columns(), of_keys = intermediates.by_keys.most_columns();
  const int64_t memory =
      most(5 * Rows<T>::size(p.keys) + 4 * Rows<T>::size(of_values) + State<T, N, 2 + kUpdates, 2, kUpdates, Decay::kRows>::size(p.keys, of_values),
           ByKeys<T, N, kUpdates>::size(p, of_keys) + State<T, N, 4, 2, 2, Decay::kLanes>::size(p.values, of_keys));
  struct Own {
    Workspace<T> memory;
    Scratch<T> kept;  // X of an item at the begin of each chunk
  };
  const int64_t of_chunks = ceil_div(p.length, kChunk) * p.values * of_keys;
  const PerThread<Own> own(threads, [&] { return Own{Workspace<T>(memory), Scratch<T>(if_given(b.dg, of_chunks))}; });
  const auto each = [&](const Items<T>& items, const PhasedTeam& team, const auto& f) {
    const Range mine = share(items.count, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) with_vectors<T, N>(items[i], [&](auto n) { f(i, n); });
  };
  parallel_phases(threads, [&](PhasedTeam& team) {
    Workspace<T>& memory = own[team.rank].memory;
    T* const kept = b.dg ? own[team.rank].kept.data() : nullptr;
    each(intermediates.by_values, team, [&](int64_t i, auto n) { values_pass<T, n, kUpdates>(b, walk, intermediates, i, memory); });
    team.barrier();
    each(intermediates.by_keys, team, [&](int64_t i, auto n) {
      keys_pass<T, n, kUpdates>(b, walk, intermediates, i, memory, kept);
      queries_pass<T, n, kUpdates>(b, walk, intermediates, i, memory, kept);
    });
    team.barrier();
    const Range heads = share(p.batch * p.heads, team);
    for (int64_t head = heads.begin; head < heads.end; ++head) {
      if (!a.per_value) add_shares(p, walk, intermediates.dwrite, intermediates.by_values, head, b.dwrite);
      if (b.dbeta) add_shares(p, walk, intermediates.dbeta, intermediates.by_keys, head, b.dbeta);
      if (intermediates.per_head(b)) add_shares(p, walk, intermediates.dg, intermediates.by_keys, head, b.dg);
    }
  });
}

template <class T> void backward(const Backward& b) {
  with_updates(b.general, [&](auto updates) { backward<T, updates>(b); });
}

}  // namespace

MEDSSM_EXPORT(delta_rule_general_backward, Backward) { a.general.problem.wide ? backward<double>(a) : backward<float>(a); }
