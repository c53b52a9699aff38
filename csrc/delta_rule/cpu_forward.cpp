// The delta rule, forward, on a CPU. For each head and token, with the state S (dk, dv), one column per lane:
//
//   S' = exp(g_t) S;  recalled_t = S'^T k_t;  S = S' + k_t (beta_t (v_t - recalled_t))^T;  o_t = scale S^T q_t
#include "medssm/abi.h"
#include "medssm/parallel.h"
#include "passes.h"

using namespace medssm;

namespace {

struct Forward {
  Problem problem;
  void* out;       // (b, l, h, dv), contiguous, in v's type
  void* state;     // (b, h, dk, dv), contiguous, in the compute type; b is the number of packed sequences, if there are any; may be null
  void* recalled;  // (b, l, h, dv), contiguous, in the compute type; may be null
};

template <class T, int kVectors> void run(const Forward& a, const Walk& walk, const Item& item, Workspace<T>& memory) {
  using L = Lanes<T, kVectors>;
  const Problem& p = a.problem;
  const auto at_state = [&](int64_t sequence) { return state_offset(p, item, sequence) + item.first; };
  const auto at = [&](int64_t token) { return ((item.batch * p.length + token) * p.heads + item.head) * p.values + item.first; };
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  Rows<T> k(p.k, item, 0, p.keys, memory), q(p.q, item, 0, p.keys, memory), v(p.v, item, item.first, item.columns, memory);
  State<T, kVectors, 2, 1> state(p.keys, item, memory);
  state.set(p.initial, at_state(walk.first_sequence()), p.values, 1);
  for (int64_t from = 0; from < p.length;) {
    const Tile tile = walk.tile(from, p.length);
    if (tile.begins_sequence()) {
      if (a.state) state.get(a.state, at_state(tile.previous), p.values);
      state.set(p.initial, at_state(tile.sequence), p.values, 1);
    } else if (tile.begins_segment) {
      state.clear();
    }
    each_block(tile, true, [&](const Block& block) {
      T e[kBlock], beta[kBlock], products[kProducts];
      decays(p.g, item, block, e);
      scalars(p.beta, item, block, T(0), beta);
      const T* const* values = v.of(block);
      const Prefetch ahead = prefetch(walk, p.length, block, true, k, q, v);
      state.pack_block({k.of(block), q.of(block)}, products);
      const Weights<T, false> weights(products, e);
      each_part<T, kVectors>(item, [&](const Part& part) {
        write_then_read(
            state, part.index, weights, ahead,
            [&](int j, const L& recalled) {
              if (a.recalled && j < block.count) recalled.put(static_cast<T*>(a.recalled) + at(block.token[j]) + part.first, part.lanes);
              return beta[j] * (L::at(values[j] + part.first, part.lanes) - recalled);
            },
            [&](int j, const L& after, T own, const L& x) {
              if (j >= block.count) return;
              const L o = scale * (after + own * x);
              with_storage(p.v.type, a.out, [&](auto* out) { o.put(out + at(block.token[j]) + part.first, part.lanes); });
            });
      });
    });
    from += tile.count;
  }
  if (a.state) state.get(a.state, at_state(walk.last_sequence()), p.values);
}

template <class T> void forward(const Forward& a) {
  const Problem& p = a.problem;
  const Walk walk = p.walk();
  const Items<T> items(p, p.values, p.keys);
  const int64_t elements = p.batch * p.length * p.heads * p.values;
  prefer_huge_pages(a.out, elements * element_size(p.v.type));
  if (a.recalled) prefer_huge_pages(a.recalled, elements * static_cast<int64_t>(sizeof(T)));
  const int64_t threads = team_size(p, items.count), columns = items.most_columns();
  const int64_t memory = 2 * Rows<T>::size(p.keys) + Rows<T>::size(columns) + State<T, kVectors, 2, 1>::size(p.keys, columns);
  const PerThread<Workspace<T>> own(threads, [&] { return Workspace<T>(memory); });
  parallel(threads, [&](const Team& team) {
    const Range mine = share(items.count, team);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      with_vectors<T>(items[i], [&](auto vectors) { run<T, vectors>(a, walk, items[i], own[team.rank]); });
  });
}

}  // namespace

MEDSSM_EXPORT(delta_rule_forward, Forward) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
