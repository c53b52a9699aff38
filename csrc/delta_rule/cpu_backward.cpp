// Gradients of the delta rule. With u_t = beta_t (v_t - recalled_t), the state is a gated recurrence: S_t = e_t S_{t-1} + k_t u_t^T. With X_t the
// gradient of S_t that comes from later tokens, S'_t = e_t S_{t-1} and do' = scale do:
//
//   dS_t = X_t + q_t do'_t^T;  du_t = dS_t^T k_t;  dv_t = beta_t du_t;  X_{t-1} = e_t (dS_t - k_t dv_t^T)
//   dq_t = scale S_t do_t;  dk_t = dS_t u_t - S'_t dv_t;  dbeta_t = du_t . (v_t - recalled_t)
//
// There are three passes. The first computes X with one column of S per lane, and from it du and dv. The second computes S, and the third X, with one
// row of S per lane; they give dq and dk.
//
// The gradient of g_t is <S'_t, dS'_t> = <S_{t-1}, X_{t-1}>, with dS' = dS - k dv^T. The difference between the gradients of a token and of the next
// token is
//
//   q_t . S'_t do'_t - beta_t (q_t . k_t) (recalled_t . do'_t) - beta_t v_t . X_t^T k_t
//
// In this form the terms that a token contributes to its own gradient cancel exactly. So with strong decay the terms are as small as the gradient.
// dg is the running sum of these differences, from a segment's first token on: <S, X> of the initial state where a sequence begins, otherwise 0. (A
// sum from the end would begin with the final state times its gradient, and only the rounding error of that would remain after a strong decay.) It
// restarts from <S, X> every kChunk steps, so that the rounding error does not grow with the length, and from 0 where the decay is negligible.
#include "gradients.h"
#include "medssm/abi.h"
#include "medssm/parallel.h"
#include "passes.h"

using namespace medssm;

namespace {

struct Backward {
  Problem problem;
  Tokens dout;
  const void *dstate, *recalled;  // contiguous, in the compute type; dstate may be null
  void *dq, *dk, *dv;             // contiguous, in the compute type, like all outputs below
  void *dbeta, *dg;               // (b, l, h); dg is null if there is no g
  void* dinitial;                 // null without an initial state
};

// Results that one pass computes for the next, and each part's share of the dbeta and dg of a token, indexed by step.
template <class T> struct Intermediates {
  const Items<T> by_values, by_keys;
  const int64_t length, chunks;
  const Scratch<T> u;                      // (b, l, h, dv)
  const Scratch<T> dbeta, later, earlier;  // shares (part, l): of the parts by_values, by_values and by_keys
  const Scratch<T> inner;                  // <S, X> at the end of each chunk: shares (part, chunk) of the parts by_keys

  explicit Intermediates(const Problem& p) :
      by_values(p, p.values, p.keys),
      by_keys(p, p.keys, p.values),
      length(p.length),
      chunks(ceil_div(p.length, kChunk)),
      u(p.batch * p.length * p.heads * p.values),
      dbeta(p.batch * p.heads * by_values.parts * length),
      later(p.batch * p.heads * by_values.parts * length),
      earlier(p.batch * p.heads * by_keys.parts * length),
      inner(p.batch * p.heads * by_keys.parts * chunks) {
    prefer_huge_pages(u.data(), p.batch * p.length * p.heads * p.values * static_cast<int64_t>(sizeof(T)));
  }
};

// First pass: computes dv, u, dinitial and shares of dbeta and dg. One column of S per lane, from the last token to the first.
template <class T, int N>
void values_pass(const Backward& a, const Walk& walk, const Intermediates<T>& intermediates, int64_t i, Workspace<T>& memory) {
  using L = Lanes<T, N>;
  const Problem& p = a.problem;
  const Item item = intermediates.by_values[i];
  const auto at_state = [&](int64_t sequence) { return state_offset(p, item, sequence) + item.first; };
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  Rows<T> q(p.q, item, 0, p.keys, memory), k(p.k, item, 0, p.keys, memory), v(p.v, item, item.first, item.columns, memory),
      dout(a.dout, item, item.first, item.columns, memory), recalled(dense<T>(a.recalled, p, p.values), item, item.first, item.columns, memory);
  const Target<T> dv(a.dv, p, item, p.values), u(intermediates.u.data(), p, item, p.values);
  State<T, N, 2, 2> state(p.keys, item, memory);
  state.set(a.dstate, at_state(walk.last_sequence()), p.values, 1);
  each_tile_back(walk, 0, p.length, [&](const Tile& tile) {
    each_block(tile, false, [&](const Block& block) {
      T e[kBlock], beta[kBlock], products[kProducts];
      decays(p.g, item, block, e);
      scalars(p.beta, item, block, T(0), beta);
      const T *const *values = v.of(block), *const *recalled_rows = recalled.of(block), *const *douts = dout.of(block);
      const Prefetch ahead = prefetch(walk, p.length, block, false, q, k, v, dout, recalled);
      state.pack_block({q.of(block), k.of(block)}, products);
      const Weights<T, true> weights(products, e);
      each_part<T, N>(item, [&](const Part& part) {
        L x[kBlock];
        for (int j = 0; j < kBlock; ++j) x[j] = scale * L::at(douts[j] + part.first, part.lanes);
        Vec<T> of_beta[kBlock] = {}, of_g[kBlock] = {};
        read_between(state, part.index, weights, ahead, x, [&](int j, const L& later, T own) {
          const L du = later + own * x[j], v_j = L::at(values[j] + part.first, part.lanes),
                  recalled_j = L::at(recalled_rows[j] + part.first, part.lanes), error = v_j - recalled_j;
          const L y = beta[j] * du;
          of_beta[j] = (du * error).sum();
          of_g[j] = -beta[j] * (own * (recalled_j * x[j]) + v_j * later).sum();
          if (j < block.count) {
            y.put(dv[block.token[j]] + part.first, part.lanes);
            (beta[j] * error).put(u[block.token[j]] + part.first, part.lanes);
          }
          return y;
        });
        put_shares(of_beta, block, intermediates.dbeta.data() + part.all * p.length);
        put_shares(of_g, block, intermediates.later.data() + part.all * p.length);
      });
    });
    if (tile.begins_sequence()) {
      if (a.dinitial) state.get(a.dinitial, at_state(tile.sequence), p.values);
      state.set(a.dstate, at_state(tile.previous), p.values, 1);
    } else if (tile.begins_segment) {
      state.clear();
    }
  });
  if (a.dinitial) state.get(a.dinitial, at_state(walk.first_sequence()), p.values);
}

// Second pass: computes dq, the term -S' dv of dk, and shares of dg. If `kept` is not null, stores S at the end of each chunk there. One row of S per
// lane.
template <class T, int N>
void queries_pass(const Backward& a, const Walk& walk, const Intermediates<T>& intermediates, int64_t i, Workspace<T>& memory, T* kept) {
  using L = Lanes<T, N>;
  const Problem& p = a.problem;
  const Item item = intermediates.by_keys[i];
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  Rows<T> u(dense<T>(intermediates.u.data(), p, p.values), item, 0, p.values, memory), dv(dense<T>(a.dv, p, p.values), item, 0, p.values, memory),
      dout(a.dout, item, 0, p.values, memory), q(p.q, item, item.first, item.columns, memory), k(p.k, item, item.first, item.columns, memory);
  const Target<T> dq(a.dq, p, item, p.keys), dk(a.dk, p, item, p.keys);
  State<T, N, 3, 1> state(p.values, item, memory);
  const auto begin = [&](int64_t sequence) { state.set(p.initial, state_offset(p, item, sequence) + item.first * p.values, 1, p.values); };
  begin(walk.first_sequence());
  for (int64_t from = 0; from < p.length;) {
    const Tile tile = walk.tile(from, chunk_end(from));
    if (tile.begins_sequence())
      begin(tile.sequence);
    else if (tile.begins_segment)
      state.clear();
    each_block(tile, true, [&](const Block& block) {
      T e[kBlock], products[kProducts];
      decays(p.g, item, block, e);
      const T *const *queries = q.of(block), *const *keys = k.of(block);
      const Prefetch ahead = prefetch(walk, p.length, block, true, u, dv, dout, q, k);
      state.pack_block({u.of(block), dv.of(block), dout.of(block)}, products);
      const Weights<T, false> weights(products, e);
      each_part<T, N>(item, [&](const Part& part) {
        Vec<T> of_g[kBlock] = {};
        write_then_read(
            state, part.index, weights, ahead,
            [&](int j, const L& before) {
              if (j < block.count) (T(-1) * before).put(dk[block.token[j]] + part.first, part.lanes);
              return L::at(keys[j] + part.first, part.lanes);
            },
            [&](int j, const L& after, T own, const L& x) {
              of_g[j] = scale * (L::at(queries[j] + part.first, part.lanes) * after).sum();
              if (j < block.count) (scale * (after + own * x)).put(dq[block.token[j]] + part.first, part.lanes);
            });
        put_shares(of_g, block, intermediates.earlier.data() + part.all * p.length);
      });
    });
    from += tile.count;
    if (kept && from % kChunk == 0)
      std::memcpy(kept + (from - 1) / kChunk * state.size(), state.value(), static_cast<std::size_t>(state.size()) * sizeof(T));
  }
}

// Third pass: adds the term dS u of dk. If `kept` is not null, computes <S, X> at the end of each chunk but the last. One row of X per lane, from the
// last token to the first.
template <class T, int N>
void keys_pass(const Backward& a, const Walk& walk, const Intermediates<T>& intermediates, int64_t i, Workspace<T>& memory, const T* kept) {
  using L = Lanes<T, N>;
  const Problem& p = a.problem;
  const Item item = intermediates.by_keys[i];
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  Rows<T> u(dense<T>(intermediates.u.data(), p, p.values), item, 0, p.values, memory), dv(dense<T>(a.dv, p, p.values), item, 0, p.values, memory),
      dout(a.dout, item, 0, p.values, memory), q(p.q, item, item.first, item.columns, memory), k(p.k, item, item.first, item.columns, memory),
      partial(dense<T>(a.dk, p, p.keys), item, item.first, item.columns, memory);
  const Target<T> dk(a.dk, p, item, p.keys);
  State<T, N, 3, 2> state(p.values, item, memory);
  const auto begin = [&](int64_t sequence) { state.set(a.dstate, state_offset(p, item, sequence) + item.first * p.values, 1, p.values); };
  begin(walk.last_sequence());
  for (int64_t chunk = intermediates.chunks - 1; chunk >= 0; --chunk) {
    if (kept && chunk + 1 < intermediates.chunks) {
      const T *x = state.value(), *s = kept + chunk * state.size();
      each_part<T, N>(item, [&](const Part& part) {
        Vec<T> sum{};
        for (int64_t at = 0; at < state.of_part(); at += kLanes<T>) sum = fma(load<T>(x + at), load<T>(s + at), sum);
        intermediates.inner.data()[part.all * intermediates.chunks + chunk] = sum_lanes(sum);
        x += state.of_part(), s += state.of_part();
      });
    }
    each_tile_back(walk, chunk * kChunk, least((chunk + 1) * kChunk, p.length), [&](const Tile& tile) {
      each_block(tile, false, [&](const Block& block) {
        T e[kBlock], products[kProducts];
        decays(p.g, item, block, e);
        const T *const *queries = q.of(block), *const *keys = k.of(block), *const *before = partial.of(block);
        const Prefetch ahead = prefetch(walk, p.length, block, false, u, dv, dout, q, k, partial);
        state.pack_block({dout.of(block), dv.of(block), u.of(block)}, products);
        const Weights<T, true> weights(products, e);
        each_part<T, N>(item, [&](const Part& part) {
          L x[kBlock];
          for (int j = 0; j < kBlock; ++j) x[j] = scale * L::at(queries[j] + part.first, part.lanes);
          read_between(state, part.index, weights, ahead, x, [&](int j, const L& later, T own) {
            if (j < block.count) (L::at(before[j] + part.first, part.lanes) + later + own * x[j]).put(dk[block.token[j]] + part.first, part.lanes);
            return L::at(keys[j] + part.first, part.lanes);
          });
        });
      });
      if (tile.begins_sequence())
        begin(tile.previous);
      else if (tile.begins_segment)
        state.clear();
    });
  }
}

// <S, X> of a head's initial state of a sequence.
template <class T> T initial_product(const Backward& a, const Item& head, int64_t sequence) {
  if (!a.dinitial) return T(0);
  const Problem& p = a.problem;
  const int64_t at = state_offset(p, head, sequence), count = p.keys * p.values;
  const T *s = static_cast<const T*>(p.initial) + at, *x = static_cast<const T*>(a.dinitial) + at;
  Vec<T> sum{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int lanes = static_cast<int>(least<int64_t>(kLanes<T>, count - i));
    sum = fma(load_part<T>(s + i, lanes), load_part<T>(x + i, lanes), sum);
  }
  return sum_lanes(sum);
}

// Computes dbeta and dg of one head: adds the shares of its parts.
template <class T> void add_shares(const Backward& a, const Walk& walk, const Intermediates<T>& intermediates, int64_t head) {
  const Problem& p = a.problem;
  const auto add = [&](const Scratch<T>& shares, const Items<T>& items, int64_t length, int64_t at) {
    T sum = T(0);
    for (int64_t part = 0; part < items.parts; ++part) sum += shares.data()[(head * items.parts + part) * length + at];
    return sum;
  };
  const Item item{head / p.heads, head % p.heads, 0, 0, 0};
  const int64_t offset = item.batch * p.length * p.heads + item.head;
  T *const dbeta = static_cast<T*>(a.dbeta) + offset, *const dg = a.dg ? static_cast<T*>(a.dg) + offset : nullptr;
  T sum = T(0), g[kTileSteps];
  for (int64_t from = 0; from < p.length;) {
    const Tile tile = walk.tile(from, chunk_end(from));
    if (from == 0 || tile.begins_sequence())
      sum = initial_product<T>(a, item, tile.sequence);
    else if (tile.begins_segment)
      sum = T(0);
    else if (a.dg && from % kChunk == 0)
      sum = add(intermediates.inner, intermediates.by_keys, intermediates.chunks, from / kChunk - 1);
    if (a.dg)
      with_storage(p.g.type, p.g.data, [&](const auto* data) {
        data += p.g.batch * item.batch + p.g.head * item.head;
        for (int64_t t = 0; t < tile.count; ++t) g[t] = to_compute<T>(data[tile.token(t) * p.g.token]);
      });
    for (int64_t t = 0; t < tile.count; ++t, ++from) {
      const int64_t at = tile.token(t) * p.heads;
      dbeta[at] = add(intermediates.dbeta, intermediates.by_values, p.length, from);
      if (!a.dg) continue;
      if (g[t] < kNegligibleLog<T>) sum = T(0);
      dg[at] = sum;
      sum -= add(intermediates.earlier, intermediates.by_keys, p.length, from) + add(intermediates.later, intermediates.by_values, p.length, from);
    }
  }
}

// The largest amount of memory that a pass needs: rows of keys or of values, rows of an item's columns, and a state.
template <class T> int64_t pass_size(const Problem& p, const Intermediates<T>& intermediates) {
  const int64_t of_values = intermediates.by_values.most_columns(), of_keys = intermediates.by_keys.most_columns();
  return most(2 * Rows<T>::size(p.keys) + 3 * Rows<T>::size(of_values) + State<T, kVectors, 2, 2>::size(p.keys, of_values),
              3 * Rows<T>::size(p.values) + 3 * Rows<T>::size(of_keys) + State<T, kVectors, 3, 2>::size(p.values, of_keys));
}

template <class T> void backward(const Backward& a) {
  const Problem& p = a.problem;
  const Walk walk = p.walk();
  const Intermediates<T> intermediates(p);
  const int64_t tokens = p.batch * p.length * p.heads, size = static_cast<int64_t>(sizeof(T));
  for (void* gradient : {a.dq, a.dk}) prefer_huge_pages(gradient, tokens * p.keys * size);
  prefer_huge_pages(a.dv, tokens * p.values * size);
  const int64_t threads = team_size(p, most(intermediates.by_values.count, intermediates.by_keys.count));
  struct Own {
    Workspace<T> memory;
    Scratch<T> kept;  // the state of an item at the end of each chunk
  };
  const int64_t kept_size = intermediates.chunks * p.values * intermediates.by_keys.most_columns();
  const PerThread<Own> own(threads, [&] { return Own{Workspace<T>(pass_size(p, intermediates)), Scratch<T>(a.dg ? kept_size : 0)}; });
  parallel_phases(threads, [&](PhasedTeam& team) {
    const Range values = share(intermediates.by_values.count, team), keys = share(intermediates.by_keys.count, team),
                heads = share(p.batch * p.heads, team);
    Workspace<T>& memory = own[team.rank].memory;
    T* const kept = a.dg ? own[team.rank].kept.data() : nullptr;
    for (int64_t i = values.begin; i < values.end; ++i)
      with_vectors<T>(intermediates.by_values[i], [&](auto n) { values_pass<T, n>(a, walk, intermediates, i, memory); });
    team.barrier();
    for (int64_t i = keys.begin; i < keys.end; ++i)
      with_vectors<T>(intermediates.by_keys[i], [&](auto n) {
        queries_pass<T, n>(a, walk, intermediates, i, memory, kept);
        keys_pass<T, n>(a, walk, intermediates, i, memory, kept);
      });
    team.barrier();
    for (int64_t head = heads.begin; head < heads.end; ++head) add_shares(a, walk, intermediates, head);
  });
}

}  // namespace

MEDSSM_EXPORT(delta_rule_backward, Backward) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
