// The gradients of a causal linear attention. With q' = f(q), k' = f(k), s_t = scale / den_t, den_t = q'_t . z_t + eps and do = dout:
//
//     w_t = S_t do_t,    dden_t = -(R q'_t) . w_t s_t / den_t,    dq'_t = R^T s_t w_t + dden_t z_t           a pass in the direction of the walk
//     dS_t = sum_{u >= t} s_u (R q'_u) do_u^T,    dz_t = sum_{u >= t} dden_u q'_u
//     dk'_t = R^T dS_t v_t + dz_t,    dv_t = dS_t^T (R k'_t)                                                 a pass in reverse
//
// The first of these passes also computes what each segment adds to dS and dz. These sums are then added up from the end of the walk. Heads that
// share k and v each have their own dS in the pass in reverse, and the resulting dk and dv are added.
#include "causal.h"
#include "medssm/abi.h"

using namespace medssm;

namespace {

// What one pass stores for the next ones.
template <class T> struct Shared {
  const Backward& a;
  const Problem& p;
  const Plan<T> plan;
  const Walk walk, back;
  const Resets resets;
  const Scratch<T> parts, later;   // for each segment and group: the state at its first step, the gradient of the state at its last
  const Scratch<T> scaled, slope;  // s_t and dden_t for each batch element, head and token

  explicit Shared(const Backward& a) :
      a(a),
      p(a.problem),
      plan(p),
      walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse),
      back(p.length, p.index, p.starts, p.sequences, p.start_count, !p.reverse),
      resets(p, plan.k),
      parts(plan.k.shares() * plan.totals * plan.sums),
      later(plan.k.shares() * plan.totals * plan.sums),
      scaled(p.batch * p.heads * p.length),
      slope(p.batch * p.heads * p.length) {}

  int64_t tokens_of(const Task& task, int64_t head) const { return (task.n * p.heads + head) * p.length; }
};

template <class T> class Adjoint {
 public:
  explicit Adjoint(const Shared<T>& shared) :
      shared_(shared),
      plan_(shared.plan),
      p_(shared.p),
      block_(plan_, p_, true),
      row_(plan_.dk_padded),
      v_row_(plan_.dv_padded),
      matrix_(row_ * v_row_),
      state_(2 * matrix_ + row_),
      states_(plan_.block * most<int64_t>(1, plan_.per_group) * state_),
      sums_(plan_.sums),
      gradient_(block_.k_tile),
      dv_(block_.v_tile),
      before_(row_) {}

  // Scratch memory for the sums of a group; not to be used during a task.
  T* scratch() const { return sums_.data(); }

  void sum(const Task& task) {
    sum_segment(plan_, p_, shared_.walk, task, shared_.a.initial_kv, shared_.a.initial_z, block_.k.data(), block_.v.data(), block_.rotated.data(),
                shared_.parts.data());
  }

  // dq, and what a segment adds to dS and dz of earlier segments. Only the steps before its first start add to them: after a start the state does not
  // depend on earlier segments.
  void queries(const Task& task) {
    const int64_t first = task.first * plan_.per_group, heads = task.count * plan_.per_group;
    const auto set_states = [&](int64_t g, const T* sums) {
      for (int64_t i = g * plan_.per_group; i < (g + 1) * plan_.per_group; ++i) {
        to_lanes_transposed(sums, row_, v_row_, state(i));
        std::memcpy(state(i) + 2 * matrix_, sums + matrix_, static_cast<std::size_t>(row_) * sizeof(T));
      }
    };
    for (int64_t g = 0; g < task.count; ++g) {
      set_states(g, part(plan_, p_, plan_.k, task, task.first + g, shared_.parts.data()));
      clear(part(plan_, p_, plan_.k, task, task.first + g, shared_.later.data()), plan_.sums);
    }
    bool reset = false;
    each_tile(shared_.walk, task.begin, task.end, [&](const Tile& tile) {
      if (tile.begins_sequence())
        for (int64_t g = 0; g < task.count; ++g) {
          if (!reset) add_final(task, g, tile.previous);
          set_states(g, sums_of(shared_.a.initial_kv, shared_.a.initial_z, task, tile.sequence, g));
        }
      else if (tile.begins_segment)
        clear(states_.data(), heads * state_);
      reset |= tile.begins_segment;
      load(task, tile);
      for (int64_t i = 0; i < heads; ++i) query_head(task, tile, i, first + i, reset);
    });
  }

  // dk and dv.
  void keys(const Task& task) {
    const int64_t heads = task.count * plan_.per_group;
    // The gradient of a group's state: the first head has it, the others have zeros.
    const auto set_states = [&](int64_t g, const T* sums) {
      T* first = state(g * plan_.per_group);
      clear(first, plan_.per_group * state_);
      to_lanes(sums, row_, v_row_, first);
      to_lanes_transposed(sums, row_, v_row_, first + matrix_);
      std::memcpy(first + 2 * matrix_, sums + matrix_, static_cast<std::size_t>(row_) * sizeof(T));
    };
    for (int64_t g = 0; g < task.count; ++g) set_states(g, part(plan_, p_, plan_.k, task, task.first + g, shared_.later.data()));
    each_tile(shared_.back, p_.length - task.end, p_.length - task.begin, [&](const Tile& tile) {
      if (tile.begins_sequence())
        for (int64_t g = 0; g < task.count; ++g) {
          if (shared_.a.dkv)
            write_state(plan_, state_row(p_, task.n, tile.previous, task.first + g), plan_.per_group, state(g * plan_.per_group), state_, 2 * matrix_,
                        shared_.a.dkv, shared_.a.dz);
          set_states(g, sums_of(shared_.a.later_kv, shared_.a.later_z, task, tile.sequence, g));
        }
      else if (tile.begins_segment)
        clear(states_.data(), heads * state_);
      load(task, tile);
      for (int64_t g = 0; g < task.count; ++g) key_group(task, tile, g);
    });
  }

 private:
  // The state of the block's i-th head. In the pass for dq: S with dk as lanes, an unused part, z. In the pass for dk and dv: dS with dv as lanes, dS
  // with dk as lanes, dz.
  T* state(int64_t i) const { return states_.data() + i * state_; }
  // A sequence's sums of the block's g-th group, padded, in scratch memory.
  const T* sums_of(const void* kv, const void* z, const Task& task, int64_t sequence, int64_t g) const {
    pad(plan_, state_row(p_, task.n, sequence, task.first + g), static_cast<const T*>(kv), static_cast<const T*>(z), sums_.data());
    return sums_.data();
  }
  // Adds the gradient of a sequence's final state to what the task's segment adds to dS and dz of earlier segments.
  void add_final(const Task& task, int64_t g, int64_t sequence) const {
    const T* gradient = sums_of(shared_.a.later_kv, shared_.a.later_z, task, sequence, g);
    T* sums = part(plan_, p_, plan_.k, task, task.first + g, shared_.later.data());
    for (int64_t i = 0; i < plan_.sums; i += kLanes<T>) store(sums + i, medssm::load<T>(sums + i) + medssm::load<T>(gradient + i));
  }
  void load(const Task& task, const Tile& tile) const {
    block_.load_keys(task, tile);
    block_.load_queries(task, tile);
    load_tiles(shared_.a.dout, kIdentity, task.n, tile, task.first * plan_.per_group, task.count * plan_.per_group, plan_.dv, block_.dout.data());
  }

  void query_head(const Task& task, const Tile& tile, int64_t i, int64_t head, bool reset) {
    const int64_t g = i / plan_.per_group, count = tile.count;
    const T *k = block_.k.data() + g * block_.k_tile, *dout = block_.dout.data() + i * block_.v_tile;
    T *q = block_.q.data() + i * block_.k_tile, *w = gradient_.data(), *z = state(i) + 2 * matrix_;
    std::memcpy(before_.data(), z, static_cast<std::size_t>(row_) * sizeof(T));
    Weights<T> weights;
    if (p_.normalize) running_dots(q, k, row_, count, z, weights.inverse);
    weights.invert(p_);
    T* rotated = block_.queries(task, tile, i);
    walk_state(dout, block_.v.data() + g * block_.v_tile, v_row_, block_.keys(g), row_, count, state(i),
               [&](int64_t t, int64_t c, Vec<T> o) __attribute__((always_inline)) { store(w + t * row_ + c, o); });
    alignas(64) T dden[kTokens] = {};
    if (p_.normalize) {
      dot_rows(rotated, w, row_, row_, count, dden);
      weights.slope(dden);
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = shared_.tokens_of(task, head) + tile.token(t);
      shared_.scaled.data()[at] = weights.scaled[t];
      shared_.slope.data()[at] = dden[t];
    }
    multiply_rows(w, weights.scaled, row_, count);
    if (p_.cos.data) rotate(p_, true, tile, task.first + g, w, w);
    if (p_.normalize) add_running(k, dden, row_, count, before_.data(), w);
    write_gradient(plan_, p_, shared_.a.dq, task.n, tile, head, q, w);
    if (reset) return;
    T* sums = part(plan_, p_, plan_.k, task, task.first + g, shared_.later.data());
    if (p_.normalize) add_rows(q, dden, row_, count, sums + matrix_);
    multiply_rows(rotated, weights.scaled, row_, count);
    add_products(rotated, row_, dout, v_row_, v_row_, count, sums);
  }

  void key_group(const Task& task, const Tile& tile, int64_t g) {
    const int64_t count = tile.count, group = task.first + g;
    T *dk = gradient_.data(), *dv = dv_.data();
    clear(dk, block_.k_tile);
    clear(dv, block_.v_tile);
    const auto add_to = [](T* rows, int64_t row) {
      return [=](int64_t t, int64_t c, Vec<T> o)
                 __attribute__((always_inline)) { store(rows + t * row + c, medssm::load<T>(rows + t * row + c) + o); };
    };
    for (int64_t i = g * plan_.per_group; i < (g + 1) * plan_.per_group; ++i) {
      const T *dout = block_.dout.data() + i * block_.v_tile, *rotated = block_.queries(task, tile, i);
      alignas(64) T scaled[kTokens];
      numbers(shared_.scaled, task, tile, i, scaled);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < row_; c += kLanes<T>)
          store(block_.rotated.data() + t * row_ + c, medssm::load<T>(rotated + t * row_ + c) * scaled[t]);
      walk_state(block_.keys(g), block_.rotated.data(), row_, dout, v_row_, count, state(i), add_to(dv, v_row_));
      walk_state(block_.v.data() + g * block_.v_tile, dout, v_row_, block_.rotated.data(), row_, count, state(i) + matrix_, add_to(dk, row_));
    }
    if (p_.cos.data) rotate(p_, true, tile, group, dk, dk);
    for (int64_t i = g * plan_.per_group; i < (g + 1) * plan_.per_group; ++i) {
      alignas(64) T dden[kTokens];
      numbers(shared_.slope, task, tile, i, dden);
      add_running_sums(block_.q.data() + i * block_.k_tile, dden, row_, count, state(i) + 2 * matrix_, dk);
    }
    write_gradient(plan_, p_, shared_.a.dk, task.n, tile, group, block_.k.data() + g * block_.k_tile, dk);
    write_rows<T>(p_, shared_.a.dv, task.n, tile, group, plan_.dv, [&](const auto& put) {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < plan_.dv; c += kLanes<T>) put(t, c, medssm::load<T>(dv + t * v_row_ + c));
    });
  }

  // Copies the numbers of a tile's tokens, one per token, for the block's i-th head.
  void numbers(const Scratch<T>& all, const Task& task, const Tile& tile, int64_t i, T* to) const {
    const T* own = all.data() + shared_.tokens_of(task, task.first * plan_.per_group + i);
    for (int64_t t = 0; t < tile.count; ++t) to[t] = own[tile.token(t)];
  }

  const Shared<T>& shared_;
  const Plan<T>& plan_;
  const Problem& p_;
  const Block<T> block_;
  const int64_t row_, v_row_, matrix_, state_;
  const Scratch<T> states_, sums_;
  const Tiles<T> gradient_, dv_, before_;
};

template <class T> void backward(const Backward& a) {
  const Shared<T> shared(a);
  const Problem& p = a.problem;
  const Plan<T>& plan = shared.plan;
  for (const Tokens* gradient : {&a.dq, &a.dk, &a.dv}) prefer_huge_pages(p, *gradient);
  const PerThread<Adjoint<T>> own(plan.threads(p), [&] { return Adjoint<T>(shared); });
  parallel_phases(plan.threads(p), [&](PhasedTeam& team) {
    Adjoint<T>& adjoint = own[team.rank];
    const Range mine = share(plan.totals, team);
    each_task(plan.k, team, [&](const Task& task) { adjoint.sum(task); });
    team.barrier();
    for (int64_t i = mine.begin; i < mine.end; ++i)
      chain<T>(plan, p, i, shared.walk, shared.resets, false, a.initial_kv, a.initial_z, shared.parts.data(), adjoint.scratch(), nullptr, nullptr);
    team.barrier();
    each_task(plan.k, team, [&](const Task& task) { adjoint.queries(task); });
    team.barrier();
    for (int64_t i = mine.begin; i < mine.end; ++i)
      chain<T>(plan, p, i, shared.walk, shared.resets, true, a.later_kv, a.later_z, shared.later.data(), adjoint.scratch(), a.dkv, a.dz);
    team.barrier();
    each_task(plan.k, team, [&](const Task& task) { adjoint.keys(task); });
    finish_streaming();
  });
}

}  // namespace

MEDSSM_EXPORT(linear_attention_causal_backward, Backward) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
