// The general form of the delta rule, forward, on a CPU: general.h has the formula. One column of the state per lane.
#include "general.h"
#include "medssm/abi.h"
#include "medssm/parallel.h"

using namespace medssm;

namespace {

struct Forward {
  General general;
  void *out, *state, *recalled;  // as in cpu_forward.cpp; recalled is R
};

template <class T, int N, int kUpdates> void run(const Forward& f, const Walk& walk, const Item& item, Workspace<T>& memory) {
  using L = Lanes<T, N>;
  const General& a = f.general;
  const Problem& p = a.problem;
  const auto at_state = [&](int64_t sequence) { return state_offset(p, item, sequence) + item.first; };
  const auto at = [&](int64_t token) { return ((item.batch * p.length + token) * p.heads + item.head) * p.values + item.first; };
  const T scale = static_cast<T>(p.scale);
  memory.clear();
  Rows<T> q(p.q, item, 0, p.keys, memory), k(p.k, item, 0, p.keys, memory), g(p.g, item, 0, if_given(a.per_key, p.keys), memory),
      erase(a.erase, item, 0, p.keys, memory), erase_out(a.erase_out, item, 0, if_given(kUpdates > 1, p.keys), memory),
      v(p.v, item, item.first, item.columns, memory),
      write(a.write, item, if_given(a.per_value, item.first), if_given(a.per_value, item.columns), memory);
  State<T, N, kUpdates + 2, kUpdates, 2, Decay::kRows> state(p.keys, item, memory);
  state.set(p.initial, at_state(walk.first_sequence()), p.values, 1);
  for (int64_t from = 0; from < p.length;) {
    const Tile tile = walk.tile(from, p.length);
    if (tile.begins_sequence()) {
      if (f.state) state.get(f.state, at_state(tile.previous), p.values);
      state.set(p.initial, at_state(tile.sequence), p.values, 1);
    } else if (tile.begins_segment) {
      state.clear();
    }
    each_block(tile, true, [&](const Block& block) {
      RowDecays<T> e{a.per_key ? g.of(block) : nullptr, {}};
      T share[kBlock], w[kBlock], products[kUpdates * kProducts];
      if (!a.per_key) decays(p.g, item, block, e.e);
      shares(a, item, block, share);
      if (!a.per_value) scalars(a.write, item, block, T(0), w);
      const T *const *values = v.of(block), *const *gates = a.per_value ? write.of(block) : nullptr;
      const Prefetch ahead = prefetch(walk, p.length, block, true, q, k, g, erase, erase_out, v, write);
      if constexpr (kUpdates == 1)
        pack_forward<T, N, kUpdates>(state, {k.of(block), erase.of(block), q.of(block)}, products, e, share, a.first);
      else
        pack_forward<T, N, kUpdates>(state, {k.of(block), erase_out.of(block), erase.of(block), q.of(block)}, products, e, share, a.first);
      each_part<T, N>(item, [&](const Part& part) {
        write_then_read<T, N, kUpdates>(
            state, part.index, products, ahead,
            [&](int j, const L& recalled, L* x) {
              if (f.recalled && j < block.count) recalled.put(static_cast<T*>(f.recalled) + at(block.token[j]) + part.first, part.lanes);
              L value = L::at(values[j] + part.first, part.lanes);
              value = gates ? L::at(gates[j] + part.first, part.lanes) * value : w[j] * value;
              if constexpr (kUpdates == 1) {
                x[0] = value - recalled;
              } else {
                x[0] = value;
                x[1] = T(-1) * recalled;
              }
            },
            [&](int j, const L& after) {
              if (j >= block.count) return;
              const L o = scale * after;
              with_storage(p.v.type, f.out, [&](auto* out) { o.put(out + at(block.token[j]) + part.first, part.lanes); });
            });
      });
    });
    from += tile.count;
  }
  if (f.state) state.get(f.state, at_state(walk.last_sequence()), p.values);
}

template <class T, int kUpdates> void forward(const Forward& f) {
  constexpr int N = kVectorsOf<kUpdates>;
  const Problem& p = f.general.problem;
  const Walk walk = p.walk();
  const Items<T> items(p, p.values, p.keys, N);
  const int64_t elements = p.batch * p.length * p.heads * p.values;
  prefer_huge_pages(f.out, elements * element_size(p.v.type));
  if (f.recalled) prefer_huge_pages(f.recalled, elements * static_cast<int64_t>(sizeof(T)));
  const int64_t threads = team_size(p, items.count), columns = items.most_columns();
  const int64_t memory =
      5 * Rows<T>::size(p.keys) + 2 * Rows<T>::size(columns) + State<T, N, kUpdates + 2, kUpdates, 2, Decay::kRows>::size(p.keys, columns);
  const PerThread<Workspace<T>> own(threads, [&] { return Workspace<T>(memory); });
  parallel(threads, [&](const Team& team) {
    const Range mine = share(items.count, team);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      with_vectors<T, N>(items[i], [&](auto n) { run<T, n, kUpdates>(f, walk, items[i], own[team.rank]); });
  });
}

template <class T> void forward(const Forward& f) {
  with_updates(f.general, [&](auto updates) { forward<T, updates>(f); });
}

}  // namespace

MEDSSM_EXPORT(delta_rule_general_forward, Forward) { a.general.problem.wide ? forward<double>(a) : forward<float>(a); }
