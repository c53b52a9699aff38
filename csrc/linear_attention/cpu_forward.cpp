// Linear attention over all tokens. One pass over k and v computes the sums kv = sum_s R_s f(k_s) v_s^T and z = sum_s f(k_s). One pass over q
// computes o_t = scale (R_t f(q_t)) kv / (f(q_t) . z + eps).
//
// A task processes a segment of the tokens for some heads, one tile of kTokens tokens at a time. It applies the feature map to the rows of a tile and
// stores them as dense tiles, in the order of memory. All products use these tiles (in direct.h: v and o in their tensors). Each task sums over its
// tiles in the compute type, and the sums of the segments are added in order. How the tokens are divided depends on shapes only, so any number of
// threads gives the same bits.
#include "direct.h"
#include "medssm/abi.h"

using namespace medssm;

namespace {

template <class T> void forward(const Forward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const bool direct = is_direct<T>(p);
  const Scratch<T> parts(plan.k.shares() * plan.totals * plan.sums), totals(plan.totals * plan.sums);
  const int64_t k_tile = kTokens * plan.dk_padded, v_tile = kTokens * plan.dv_padded;
  prefer_huge_pages(p, a.out);
  struct Own {
    Tiles<T> tiles, v_tiles, rotated;
  };
  const PerThread<Own> own(plan.threads(p),
                           [&] { return Own{Tiles<T>(plan.block * plan.per_group * k_tile), Tiles<T>(plan.block * v_tile), Tiles<T>(k_tile)}; });
  parallel_phases(plan.threads(p), [&](PhasedTeam& team) {
    const Own& buffers = own[team.rank];
    T *const tiles = buffers.tiles.data(), *const v_tiles = buffers.v_tiles.data(), *const rotated = buffers.rotated.data();
    each_task(plan.k, team, [&](const Task& task) {
      for (int64_t g = task.first; g < task.first + task.count; ++g) clear(part(plan, p, plan.k, task, g, parts.data()), plan.sums);
      if (direct) return with_feature(p.feature_map, [&](auto map) { direct_keys<decltype(map)::value>(plan, p, task, parts.data()); });
      each_tile(task, [&](const Tile& tile) {
        load_tiles(p.k, p.feature_map, task.n, tile, task.first, task.count, plan.dk, tiles);
        load_tiles(p.v, kIdentity, task.n, tile, task.first, task.count, plan.dv, v_tiles);
        for (int64_t i = 0; i < task.count; ++i)
          add_tile(plan, p, tile, task.first + i, tiles + i * k_tile, v_tiles + i * v_tile, rotated,
                   part(plan, p, plan.k, task, task.first + i, parts.data()));
      });
    });
    team.barrier();
    const Range mine = share(plan.totals, team);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      reduce(plan, p, i, parts.data(), plan.k.shares(), static_cast<const T*>(a.initial_kv), static_cast<const T*>(a.initial_z), totals.data(),
             static_cast<T*>(a.kv), static_cast<T*>(a.z));
    team.barrier();
    each_task(plan.q, team, [&](const Task& task) {
      const int64_t first = task.first * plan.per_group, heads = task.count * plan.per_group;
      if (direct) return with_feature(p.feature_map, [&](auto map) { direct_queries<decltype(map)::value>(plan, p, a.out, task, totals.data()); });
      each_tile(task, [&](const Tile& tile) {
        load_tiles(p.q, p.feature_map, task.n, tile, first, heads, plan.dk, tiles);
        for (int64_t i = 0; i < heads; ++i) {
          const int64_t group = (first + i) / plan.per_group;
          const T *kv = totals.data() + (task.n * p.groups + group) * plan.sums, *q = tiles + i * k_tile;
          Weights<T> weights;
          if (p.normalize) dot_rows(q, kv + plan.dk_padded * plan.dv_padded, 0, plan.dk_padded, tile.count, weights.inverse);
          weights.invert(p);
          if (p.cos.data) {
            rotate(p, false, tile, group, q, rotated);
            q = rotated;
          }
          write_rows<T>(p, a.out, task.n, tile, first + i, plan.dv, [&](const auto& put) __attribute__((always_inline)) {
            apply(q, plan.dk_padded, kv, plan.dk, plan.dv_padded, tile.count,
                  [&](int64_t t, int64_t c, Vec<T> o) __attribute__((always_inline)) { put(t, c, o * weights.scaled[t]); });
          });
        }
      });
    });
    finish_streaming();
  });
}

}  // namespace

MEDSSM_EXPORT(linear_attention_forward, Forward) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
