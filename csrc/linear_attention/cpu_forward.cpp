// Linear attention over all tokens: one pass over k and v for the sums kv = sum_s R_s f(k_s) v_s^T and z = sum_s f(k_s), one over q for
// o_t = scale (R_t f(q_t)) kv / (f(q_t) . z + eps). Backward: one pass over q and do for dq and the gradients of the sums, one over k and v for theirs.
//
// A task goes through a segment of the tokens for some heads, a tile of kTokens tokens at a time: its rows are brought through the feature map into
// dense tiles, token after token as memory has them, and all products run on those. Each task sums in float from tile to tile, and the segments'
// sums are added in order: how the tokens are cut depends on shapes only, so any number of threads gives the same bits.
#include "medssm/abi.h"
#include "tasks.h"

using namespace medssm;

namespace {

// The share of a task in kv and z.
template <class T> void accumulate(const Plan<T>& plan, const Problem& p, const Task& task, T* k_tiles, T* v_tiles, T* turned, T* parts) {
  for (int64_t g = task.first; g < task.first + task.count; ++g) clear(part(plan, p, plan.k, task, g, parts), plan.sums);
  each_tile(task, [&](int64_t begin, int64_t count) {
    load_tiles(p.k, p.feature_map, task.n, begin, count, task.first, task.count, plan.dk, k_tiles);
    load_tiles(p.v, kIdentity, task.n, begin, count, task.first, task.count, plan.dv, v_tiles);
    for (int64_t i = 0; i < task.count; ++i) {
      T* sums = part(plan, p, plan.k, task, task.first + i, parts);
      const T* k = k_tiles + i * kTokens * plan.dk_padded;
      add_rows<T>(k, nullptr, plan.dk_padded, count, sums + plan.dk_padded * plan.dv_padded);
      if (p.cos.data) {
        rotate(p, false, begin, count, task.first + i, k, turned);
        k = turned;
      }
      add_products(k, plan.dk_padded, v_tiles + i * kTokens * plan.dv_padded, plan.dv_padded, count, sums);
    }
  });
}

template <class T> void forward(const Forward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Scratch<T> parts(plan.k.shares() * plan.totals * plan.sums), totals(plan.totals * plan.sums);
  parallel(plan.threads(p), [&](const Team& team) {
    const Tiles<T> k_tiles(plan.block * kTokens * plan.dk_padded), v_tiles(plan.block * kTokens * plan.dv_padded), turned(kTokens * plan.dk_padded);
    each_task(plan.k, team, [&](const Task& task) { accumulate(plan, p, task, k_tiles.data(), v_tiles.data(), turned.data(), parts.data()); });
    team.barrier();
    const Range mine = share(plan.totals, team);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      reduce(plan, p, i, parts.data(), plan.k.shares(), static_cast<const T*>(a.initial_kv), static_cast<const T*>(a.initial_z), totals.data(),
             static_cast<T*>(a.kv), static_cast<T*>(a.z));
    team.barrier();
    each_task(plan.q, team, [&](const Task& task) {
      each_tile(task, [&](int64_t begin, int64_t count) {
        each_run(plan, task, [&](int64_t first, int64_t heads) {
          load_tiles(p.q, p.feature_map, task.n, begin, count, first, heads, plan.dk, k_tiles.data());
          for (int64_t i = 0; i < heads; ++i) {
            const int64_t group = (first + i) / plan.per_group;
            const T *kv = totals.data() + (task.n * p.groups + group) * plan.sums, *q = k_tiles.data() + i * kTokens * plan.dk_padded;
            const Weights<T> weights(plan, p, q, kv + plan.dk_padded * plan.dv_padded, count);
            if (p.cos.data) {
              rotate(p, false, begin, count, group, q, turned.data());
              q = turned.data();
            }
            write_products(plan, p, a.out, task.n, begin, count, first + i, q, kv, weights.scaled);
          }
        });
      });
    });
    finish_streaming();
  });
}

}  // namespace

MEDSSM_EXPORT(linear_attention_forward)(const Forward* a) { a->problem.wide ? forward<double>(*a) : forward<float>(*a); }
