// Causal linear attention: o_t = scale (R_t f(q_t)) S_t / (f(q_t) . z_t + eps). S_t and z_t are the sums of R_s f(k_s) v_s^T and of f(k_s) over the
// steps s <= t.
#include "causal.h"
#include "medssm/abi.h"

using namespace medssm;

namespace {

template <class T> void forward(const Forward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Walk walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse);
  const Resets resets(p, plan.k);
  const Scratch<T> parts(plan.k.shares() * plan.totals * plan.sums);
  const int64_t matrix = plan.dk_padded * plan.dv_padded;
  prefer_huge_pages(p, a.out);
  struct Own {
    Block<T> block;
    Scratch<T> states;   // for each head S, then z
    Scratch<T> initial;  // the sums of a group where a sequence begins
  };
  const PerThread<Own> own(plan.threads(p), [&] {
    return Own{{plan, p, false}, Scratch<T>(plan.block * most<int64_t>(1, plan.per_group) * plan.sums), Scratch<T>(plan.sums)};
  });
  parallel_phases(plan.threads(p), [&](PhasedTeam& team) {
    const Block<T>& block = own[team.rank].block;
    const Scratch<T>& states = own[team.rank].states;
    each_task(plan.k, team, [&](const Task& task) {
      sum_segment(plan, p, walk, task, a.initial_kv, a.initial_z, block.k.data(), block.v.data(), block.rotated.data(), parts.data());
    });
    team.barrier();
    const Range mine = share(plan.totals, team);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      chain(plan, p, i, walk, resets, false, a.initial_kv, a.initial_z, parts.data(), states.data(), a.kv, a.z);
    team.barrier();
    each_task(plan.k, team, [&](const Task& task) {
      const int64_t first = task.first * plan.per_group, heads = task.count * plan.per_group;
      const auto group_states = [&](int64_t g) { return states.data() + g * plan.per_group * plan.sums; };
      const auto set_states = [&](int64_t g, const T* sums) {
        for (int64_t i = 0; i < plan.per_group; ++i) {
          T* state = group_states(g) + i * plan.sums;
          to_lanes(sums, plan.dk_padded, plan.dv_padded, state);
          std::memcpy(state + matrix, sums + matrix, static_cast<std::size_t>(plan.dk_padded) * sizeof(T));
        }
      };
      for (int64_t g = 0; g < task.count; ++g) set_states(g, part(plan, p, plan.k, task, task.first + g, parts.data()));
      each_tile(walk, task.begin, task.end, [&](const Tile& tile) {
        if (tile.begins_sequence())
          for (int64_t g = 0; g < task.count; ++g) {
            write_state(plan, state_row(p, task.n, tile.previous, task.first + g), 1, group_states(g), 0, matrix, a.kv, a.z);
            T* const initial = own[team.rank].initial.data();
            pad(plan, state_row(p, task.n, tile.sequence, task.first + g), static_cast<const T*>(a.initial_kv), static_cast<const T*>(a.initial_z),
                initial);
            set_states(g, initial);
          }
        else if (tile.begins_segment)
          clear(states.data(), heads * plan.sums);
        block.load_keys(task, tile);
        block.load_queries(task, tile);
        for (int64_t i = 0; i < heads; ++i) {
          const int64_t g = i / plan.per_group;
          T* state = states.data() + i * plan.sums;
          Weights<T> weights;
          if (p.normalize)
            running_dots(block.q.data() + i * block.k_tile, block.k.data() + g * block.k_tile, plan.dk_padded, tile.count, state + matrix,
                         weights.inverse);
          else if (p.sequences)  // o does not need z, but where a sequence ends it is written
            add_rows<T>(block.k.data() + g * block.k_tile, nullptr, plan.dk_padded, tile.count, state + matrix);
          weights.invert(p);
          const T* q = block.queries(task, tile, i);
          write_rows<T>(p, a.out, task.n, tile, first + i, plan.dv, [&](const auto& put) __attribute__((always_inline)) {
            walk_state(q, block.keys(g), plan.dk_padded, block.v.data() + g * block.v_tile, plan.dv_padded, tile.count, state,
                       [&](int64_t t, int64_t c, Vec<T> o) __attribute__((always_inline)) {
                         if (c < plan.dv) put(t, c, o * weights.scaled[t]);
                       });
          });
        }
      });
    });
    finish_streaming();
  });
}

}  // namespace

MEDSSM_EXPORT(linear_attention_causal_forward, Forward) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
