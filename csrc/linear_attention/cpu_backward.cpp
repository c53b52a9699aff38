// The gradients of a linear attention over all tokens. With q' = f(q), k' = f(k), s_t = scale / den_t, den_t = q'_t . z + eps and do = dout:
//
//     w_t = kv do_t,    dden_t = -(R q'_t) . w_t s_t / den_t
//     dq'_t = R^T s_t w_t + dden_t z,    dkv = sum_t s_t (R q'_t) do_t^T,    dz = sum_t dden_t q'_t        one pass over q and do
//     dk'_s = R^T dkv v_s + dz,    dv_s = dkv^T (R k'_s)                                                  one pass over k and v
//
// The work is divided, and the sums are added, as in the forward pass. dden_t needs the product of the numerator (R q'_t)^T kv with do_t. It is
// computed as (R q'_t) . w_t, because w_t is needed anyway.
#include "medssm/abi.h"
#include "tasks.h"

using namespace medssm;

namespace {

// The transpose of a group's matrix: dv rows of dk_padded numbers.
template <class T> void transpose(const Plan<T>& plan, const T* rows, T* columns) {
  clear(columns, plan.dv * plan.dk_padded);
  for (int64_t r = 0; r < plan.dk; ++r)
    for (int64_t c = 0; c < plan.dv; ++c) columns[c * plan.dk_padded + r] = rows[r * plan.dv_padded + c];
}

// The passes over the tasks, with the scratch memory of one thread.
template <class T> class Adjoint {
 public:
  Adjoint(const Backward& a, const Plan<T>& plan, T* parts, T* totals, T* columns) :
      a_(a),
      p_(a.problem),
      plan_(plan),
      parts_(parts),
      totals_(totals),
      columns_(columns),
      k_tiles_(plan.block * plan.per_group * kTokens * plan.dk_padded),
      v_tiles_(plan.block * plan.per_group * kTokens * plan.dv_padded),
      rotated_(kTokens * plan.dk_padded),
      gradient_(kTokens * plan.dk_padded) {}

  // dq of a task's tokens, and what they add to the gradients of the sums.
  void queries(const Task& task) {
    const int64_t first = task.first * plan_.per_group, heads = task.count * plan_.per_group;
    for (int64_t g = task.first; g < task.first + task.count; ++g) clear(part(plan_, p_, plan_.q, task, g, parts_), plan_.sums);
    each_tile(task, [&](const Tile& tile) {
      load_tiles(p_.q, p_.feature_map, task.n, tile, first, heads, plan_.dk, k_tiles_.data());
      load_tiles(a_.dout, kIdentity, task.n, tile, first, heads, plan_.dv, v_tiles_.data());
      for (int64_t i = 0; i < heads; ++i) query_head(task, tile, i, first + i);
    });
  }

  // dk and dv of a task's tokens.
  void keys(const Task& task) {
    each_tile(task, [&](const Tile& tile) {
      load_tiles(p_.k, p_.feature_map, task.n, tile, task.first, task.count, plan_.dk, k_tiles_.data());
      load_tiles(p_.v, kIdentity, task.n, tile, task.first, task.count, plan_.dv, v_tiles_.data());
      for (int64_t i = 0; i < task.count; ++i) key_head(task, tile, i, task.first + i);
    });
  }

 private:
  void query_head(const Task& task, const Tile& tile, int64_t i, int64_t head) {
    const int64_t row = plan_.dk_padded, rows = row * plan_.dv_padded, group = head / plan_.per_group, count = tile.count;
    const T *total = totals_ + (task.n * p_.groups + group) * plan_.sums, *z = total + rows;
    T* sums = part(plan_, p_, plan_.q, task, group, parts_);
    T *q = k_tiles_.data() + i * kTokens * row, *rotated = q, *w = gradient_.data();
    const T* dout = v_tiles_.data() + i * kTokens * plan_.dv_padded;
    Weights<T> weights;
    if (p_.normalize) dot_rows(q, z, 0, row, count, weights.inverse);
    weights.invert(p_);
    if (p_.cos.data) rotate(p_, false, tile, group, q, rotated = rotated_.data());
    transform(dout, plan_.dv_padded, columns_ + (task.n * p_.groups + group) * plan_.dv * row, plan_.dv, row, count, w);
    alignas(64) T dden[kTokens] = {};
    if (p_.normalize) {
      dot_rows(rotated, w, row, row, count, dden);
      weights.slope(dden);
      add_rows(q, dden, row, count, sums + rows);
    }
    multiply_rows(w, weights.scaled, row, count);
    if (p_.cos.data) rotate(p_, true, tile, group, w, w);
    if (p_.normalize) add_row(w, dden, row, count, z);
    write_gradient(plan_, p_, a_.dq, task.n, tile, head, q, w);
    multiply_rows(rotated, weights.scaled, row, count);
    add_products(rotated, row, dout, plan_.dv_padded, plan_.dv_padded, count, sums);
  }

  void key_head(const Task& task, const Tile& tile, int64_t i, int64_t group) {
    const int64_t row = plan_.dk_padded, rows = row * plan_.dv_padded, item = task.n * p_.groups + group, count = tile.count;
    const T *total = totals_ + item * plan_.sums, *v = v_tiles_.data() + i * kTokens * plan_.dv_padded;
    T *k = k_tiles_.data() + i * kTokens * row, *rotated = k, *dk = gradient_.data();
    if (p_.cos.data) rotate(p_, false, tile, group, k, rotated = rotated_.data());
    write_rows<T>(p_, a_.dv, task.n, tile, group, plan_.dv,
                  [&](const auto& put) __attribute__((always_inline)) { apply(rotated, row, total, plan_.dk, plan_.dv_padded, count, put); });
    transform(v, plan_.dv_padded, columns_ + item * plan_.dv * row, plan_.dv, row, count, dk);
    if (p_.cos.data) rotate(p_, true, tile, group, dk, dk);
    if (p_.normalize || a_.later_z) add_row<T>(dk, nullptr, row, count, total + rows);
    write_gradient(plan_, p_, a_.dk, task.n, tile, group, k, dk);
  }

  // result_t = sum_r a_t[r] rows[r].
  static void transform(const T* a, int64_t a_row, const T* rows, int64_t width, int64_t row, int64_t count, T* result) {
    apply(a, a_row, rows, width, row, count, [&](int64_t t, int64_t c, Vec<T> o) __attribute__((always_inline)) { store(result + t * row + c, o); });
  }

  const Backward& a_;
  const Problem& p_;
  const Plan<T>& plan_;
  T *const parts_, *const totals_, *const columns_;
  const Tiles<T> k_tiles_, v_tiles_, rotated_, gradient_;
};

template <class T> void backward(const Backward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Scratch<T> parts(plan.q.shares() * plan.totals * plan.sums), totals(plan.totals * plan.sums), columns(plan.totals * plan.dv * plan.dk_padded);
  for (const Tokens* gradient : {&a.dq, &a.dk, &a.dv}) prefer_huge_pages(p, *gradient);
  const PerThread<Adjoint<T>> own(plan.threads(p), [&] { return Adjoint<T>(a, plan, parts.data(), totals.data(), columns.data()); });
  parallel_phases(plan.threads(p), [&](PhasedTeam& team) {
    Adjoint<T>& adjoint = own[team.rank];
    const Range mine = share(plan.totals, team);
    const auto transpose_total = [&](int64_t i) { transpose(plan, totals.data() + i * plan.sums, columns.data() + i * plan.dv * plan.dk_padded); };
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      T* total = totals.data() + i * plan.sums;
      pad(plan, i, static_cast<const T*>(a.kv), static_cast<const T*>(a.z), total);
      transpose_total(i);
    }
    team.barrier();
    each_task(plan.q, team, [&](const Task& task) { adjoint.queries(task); });
    team.barrier();
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      reduce(plan, p, i, parts.data(), plan.q.shares(), static_cast<const T*>(a.later_kv), static_cast<const T*>(a.later_z), totals.data(),
             static_cast<T*>(a.dkv), static_cast<T*>(a.dz));
      transpose_total(i);
    }
    team.barrier();
    each_task(plan.k, team, [&](const Task& task) { adjoint.keys(task); });
    finish_streaming();
  });
}

}  // namespace

MEDSSM_EXPORT(linear_attention_backward, Backward) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
