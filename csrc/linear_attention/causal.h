// What the passes of causal linear attention share.
//
// The walk is divided into segments. There is no decay, so the state at the first step of a segment is the sum over all segments before it. A first
// pass computes the sum of each segment. The sums are then added up in order. After that all segments are independent, and any thread can process any
// of them. Within a segment the state of a head is in registers (medssm/matrix_state.h). The state at the first step of a segment was rounded once
// per tile and segment, not at every step.
#pragma once
#include "medssm/matrix_state.h"
#include "tasks.h"

namespace medssm {
namespace {

// body(tile) for each tile of steps [from, end).
template <class Body> void each_tile(const Walk& walk, int64_t from, int64_t end, const Body& body) {
  for (; from < end;) {
    const Tile tile = walk.tile(from, least(from + kTokens, end));
    body(tile);
    from += tile.count;
  }
}

// Which segments of the walk contain a start, a step at which the sums are reset to zero.
class Resets {
 public:
  Resets(const Problem& p, const Cut& cut) : inside_(cut.shares()) {
    clear(inside_.data(), cut.shares());
    for (int64_t i = 0; i < p.start_count; ++i) {
      const int64_t at = p.reverse ? p.length - p.starts[i] : p.starts[i];
      if (at > 0 && at < p.length) inside_.data()[at / cut.segment()] = 1;
    }
  }
  bool operator[](int64_t share) const { return inside_.data()[share]; }

 private:
  const Scratch<int64_t> inside_;
};

// The row of a group in kv and z, of which each packed sequence has its own (medssm/walk.h).
MEDSSM_INLINE int64_t state_row(const Problem& p, int64_t batch, int64_t sequence, int64_t group) { return (batch + sequence) * p.groups + group; }

// The sums of R k' v^T and of k' over a task's segment, from its last start on, and of the initial sums if a sequence begins there. tiles and
// v_tiles: scratch memory for the tiles of k and v of a block of groups; rotated: for one tile of k. Tokens before that start are not read.
template <class T> void sum_segment(const Plan<T>& plan, const Problem& p, const Walk& walk, const Task& task, const void* initial_kv,
                                    const void* initial_z, T* tiles, T* v_tiles, T* rotated, T* parts) {
  const auto begin = [&](bool sequence, int64_t number) {
    for (int64_t g = task.first; g < task.first + task.count; ++g) {
      T* sums = part(plan, p, plan.k, task, g, parts);
      if (sequence)
        pad(plan, state_row(p, task.n, number, g), static_cast<const T*>(initial_kv), static_cast<const T*>(initial_z), sums);
      else
        clear(sums, plan.sums);
    }
  };
  begin(false, 0);
  each_tile(walk, walk.begin_of_last_segment(task.begin, task.end), task.end, [&](const Tile& tile) {
    if (tile.begins_segment) begin(tile.begins_sequence(), tile.sequence);
    load_tiles(p.k, p.feature_map, task.n, tile, task.first, task.count, plan.dk, tiles);
    load_tiles(p.v, kIdentity, task.n, tile, task.first, task.count, plan.dv, v_tiles);
    for (int64_t i = 0; i < task.count; ++i)
      add_tile(plan, p, tile, task.first + i, tiles + i * kTokens * plan.dk_padded, v_tiles + i * kTokens * plan.dv_padded, rotated,
               part(plan, p, plan.k, task, task.first + i, parts));
  });
}

// Replaces the sums of each segment by the state at its first step, the sum over all segments before it. back: by the sum over all segments after it.
// `before` is the state before the first segment (back: after the last one). The state after all segments is written to kv and z, unless they are
// null. state: scratch memory for the sums of a group.
template <class T> void chain(const Plan<T>& plan, const Problem& p, int64_t item, const Walk& walk, const Resets& resets, bool back,
                              const void* before_kv, const void* before_z, T* parts, T* state, void* kv, void* z) {
  const int64_t shares = plan.k.shares(), first = state_row(p, 0, walk.first_sequence(), item), last = state_row(p, 0, walk.last_sequence(), item);
  pad(plan, back ? last : first, static_cast<const T*>(before_kv), static_cast<const T*>(before_z), state);
  for (int64_t i = 0; i < shares; ++i) {
    const int64_t share = back ? shares - 1 - i : i;
    T* own = parts + ((item / p.groups * shares + share) * p.groups + item % p.groups) * plan.sums;
    for (int64_t j = 0; j < plan.sums; j += kLanes<T>) {
      const Vec<T> sum = load<T>(own + j), before = load<T>(state + j);
      store(own + j, before);
      store(state + j, resets[share] ? sum : before + sum);
    }
  }
  if (kv) unpad(plan, back ? first : last, state, static_cast<T*>(kv), static_cast<T*>(z));
}

// Converts dense rows, or their transpose, to a state in the layout of matrix_state.h: [block of lanes][row][lane].
template <class T> void to_lanes(const T* rows, int64_t count, int64_t row, T* state) {
  for (int64_t c = 0; c < row; c += kLanes<T>)
    for (int64_t r = 0; r < count; ++r, state += kLanes<T>) store(state, load<T>(rows + r * row + c));
}
template <class T> void to_lanes_transposed(const T* rows, int64_t count, int64_t row, T* state) {
  for (int64_t c = 0; c < count; c += kLanes<T>)
    for (int64_t r = 0; r < row; ++r)
      for (int64_t lane = c; lane < c + kLanes<T>; ++lane) *state++ = rows[lane * row + r];
}

// Writes the sum of the states of several heads to a row of dense kv and z. Each is S as to_lanes makes it, and z_offset numbers later z; the next
// head's follows after `step` numbers.
template <class T>
void write_state(const Plan<T>& plan, int64_t row, int64_t heads, const T* states, int64_t step, int64_t z_offset, void* kv, void* z) {
  constexpr int W = kLanes<T>;
  const auto write = [&](int64_t at, int64_t width, const T* from, T* to) {
    for (int64_t c = 0; c < width; c += W) {
      Vec<T> sum{};
      for (int64_t i = 0; i < heads; ++i) sum += load<T>(from + i * step + c * at);
      store_part(to + c, sum, static_cast<int>(least<int64_t>(W, width - c)));
    }
  };
  for (int64_t r = 0; r < plan.dk; ++r) write(plan.dk_padded, plan.dv, states + r * W, static_cast<T*>(kv) + (row * plan.dk + r) * plan.dv);
  write(1, plan.dk, states + z_offset, static_cast<T*>(z) + row * plan.dk);
}

// For each step t in order: S += k_t v_t, then take(t, c, o) with o = q_t S, for the vector of channels that begins at c. The rows of q and k have
// `rows` numbers, those of v `lanes`, all padded.
template <class T, class F>
MEDSSM_INLINE void walk_state(const T* q, const T* k, int64_t rows, const T* v, int64_t lanes, int64_t count, T* state, const F& take) {
  constexpr int W = kLanes<T>;
  alignas(64) T o[kTokens * W];
  for (int64_t c = 0; c < lanes; c += W) {
    advance<T, Form<Decay::kNone, false, false>>({{q, rows}, {k, rows}, {v + c, lanes}, {nullptr, 0}, count}, rows, state + c * rows, o);
    for (int64_t t = 0; t < count; ++t) take(t, c, load<T>(o + t * W));
  }
}

// One thread's tiles for a block of groups: k and v of each group, q and dout of each head.
template <class T> struct Block {
  const Plan<T>& plan;
  const Problem& p;
  const int64_t k_tile, v_tile;
  const Tiles<T> k, k_rotated, v, q, rotated, dout;

  Block(const Plan<T>& plan, const Problem& p, bool backward) :
      plan(plan),
      p(p),
      k_tile(kTokens * plan.dk_padded),
      v_tile(kTokens * plan.dv_padded),
      k(plan.block * k_tile),
      k_rotated(p.cos.data ? plan.block * k_tile : 0),
      v(plan.block * v_tile),
      q(plan.block * plan.per_group * k_tile),
      rotated(k_tile),
      dout(backward ? plan.block * plan.per_group * v_tile : 0) {}

  void load_keys(const Task& task, const Tile& tile) const {
    load_tiles(p.k, p.feature_map, task.n, tile, task.first, task.count, plan.dk, k.data());
    load_tiles(p.v, kIdentity, task.n, tile, task.first, task.count, plan.dv, v.data());
    if (p.cos.data)
      for (int64_t i = 0; i < task.count; ++i) rotate(p, false, tile, task.first + i, k.data() + i * k_tile, k_rotated.data() + i * k_tile);
  }
  void load_queries(const Task& task, const Tile& tile) const {
    load_tiles(p.q, p.feature_map, task.n, tile, task.first * plan.per_group, task.count * plan.per_group, plan.dk, q.data());
  }
  // R k' of the block's i-th group.
  const T* keys(int64_t i) const { return (p.cos.data ? k_rotated : k).data() + i * k_tile; }
  // R q' of the block's i-th head: in the scratch tile, or q' itself if there is no rotation.
  T* queries(const Task& task, const Tile& tile, int64_t i) const {
    if (!p.cos.data) return q.data() + i * k_tile;
    rotate(p, false, tile, task.first + i / plan.per_group, q.data() + i * k_tile, rotated.data());
    return rotated.data();
  }
};

}  // namespace
}  // namespace medssm
