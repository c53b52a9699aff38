// Gated linear attention, backward, on a CPU: three passes with the recurrence of the forward pass, two in reverse and one in the direction of the
// walk.
//
//   dq_t = scale S_t do_t,   dk_t = dS_t v_t,   dv_t = k_t dS_t,   dS_t = scale q_t do_t + e_{t+1} dS_{t+1},   d(initial) = e_0 dS_0
//
// The gradient of the decay: let X_t = e_{t+1} dS_{t+1} be the gradient of S_t that comes from later steps, and F_t the sum over the rows of S_t X_t.
// Then  dg_t = F_{t-1}  and  F_t = F_{t-1} + k_t X_t v_t - q_t (e_t S_{t-1}) do_t,  so that
//
//   dg_{t+1} = dg_t + k_t dk_t - q_t dq_t,   dk_t and dq_t without the term of step t's own key and value, which is in both and cancels (kStrict).
//
// dg at the first step of a sequence is the sum over its initial state times the gradient of that; at any other start of a segment it is 0. With
// strong decay all terms of the sum are as small as dg is. (A sum from the end would begin with the final state times its gradient, and only the
// rounding error of that would remain after a strong decay.)
//
// Over a long walk the rounding errors of this sum would add up. So every kExactSteps steps dg is computed exactly, as the sum over S times X. The
// second pass stores X at these steps. And where the decay is negligible, dg is set to 0.
#include <initializer_list>

#include "problem.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  HeadTokens dout;
  StateTensor dstate;     // of the final state; may be null
  HeadOutput dq, dk, dv;  // in the types of q, k, v
  HeadOutput dg;          // the compute type; with a value per key the second pass stores k dk here
  StateTensor dinitial;   // the compute type; null without an initial state
};

constexpr int64_t kExactSteps = 1024;

// What one pass stores for the next ones.
template <class T> struct Shared {
  static constexpr int W = kLanes<T>;
  const int64_t length, heads, blocks, saved, state;  // blocks of keys; stored states per head; elements of a block's state
  const Scratch<T> states;                            // X every kExactSteps steps: [b, h][saved][block][row: value][lane: key]
  const Scratch<T> sums;  // sums over a block's keys of k dk, later replaced by those of dg: [b, h][block][step]; only without per_key

  explicit Shared(const Problem& p) :
      length(p.length),
      heads(p.heads),
      blocks(ceil_div(p.keys, W)),
      saved(ceil_div(p.length, kExactSteps)),
      state(padded_rows(p.values) * W),
      states(p.batch * p.heads * saved * blocks * state),
      sums(p.per_key ? 0 : p.batch * p.heads * blocks * p.length) {
    prefer_huge_pages(states.data(), p.batch * p.heads * saved * blocks * state * static_cast<int64_t>(sizeof(T)));
  }

  T* state_at(const Slot<T>& slot, int64_t block, int64_t step) const {
    return states.data() + (((slot.batch * heads + slot.head) * saved + step / kExactSteps) * blocks + block) * state;
  }
  T* sums_of(int64_t batch, int64_t head, int64_t block) const { return sums.data() + ((batch * heads + head) * blocks + block) * length; }
};

// dk, and the terms k dk of dg: a pass in reverse. The gradient of the state is transposed: rows are values, lanes are keys.
template <class T, Decay kDecay> class GradientK : public Reader<T, Form<kDecay, true, true>> {
 public:
  GradientK(const Arguments& a, const Shared<T>& shared) :
      GradientK::Reader(a.problem, a.problem.values, a.problem.v, a.dout, a.problem.q, a.problem.scale),
      a_(a),
      shared_(shared),
      memory_(kTileSteps * (W + 2)) {}

  void begin_tile(const Slot<T>& slot, const Tile& tile) const {
    const int64_t step = a_.problem.length - tile.from;  // the one after the tile, in the direction of the walk
    if (tile.from == 0 || step % kExactSteps) return;
    for (int64_t block = slot.first_block; block < slot.end_block; ++block)
      std::memcpy(shared_.state_at(slot, block, step), slot.state(block), sizeof(T) * static_cast<std::size_t>(shared_.state));
  }

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    const Operands<T> in = GradientK::Reader::rows(slot, tile);
    own_products(in.q, in.k, slot.rows, tile.count, own());
    return in;
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>& in, const T* o) const {
    const Problem& p = a_.problem;
    const int width = slot.width(block);
    write_rows<T>(a_.dk, slot.batch, slot.head, block * W, width, tile,
                  [&](int64_t t) { return fma(splat(own()[t]), load<T>(in.v[t]), load<T>(o + t * W)); });
    const View<T> k = rows_of<T>(p.k, slot.batch, slot.head, block * W, width, W, tile, memory_.data());
    const auto term = [&](int64_t t) { return load<T>(k[t]) * load<T>(o + t * W); };
    if constexpr (kDecay == Decay::kLanes) {
      write_rows<T>(a_.dg, slot.batch, slot.head, block * W, width, tile, term);
    } else {
      T *const tile_sums = own() + kTileSteps, *const at_end = shared_.sums_of(slot.batch, slot.head, block) + p.length - 1 - tile.from;
      lane_sums<T>(tile.count, term, tile_sums);
      for (int64_t t = 0; t < tile.count; ++t) at_end[-t] = tile_sums[t];
    }
  }

 private:
  static constexpr int W = kLanes<T>;

  T* own() const { return memory_.data() + kTileSteps * W; }

  const Arguments& a_;
  const Shared<T>& shared_;
  const Scratch<T> memory_;  // k of a block; v_t . do_t of each step; sums over lanes
};

// dq and dg: a pass in the direction of the walk. The state is transposed: rows are values, lanes are keys.
template <class T, Decay kDecay> class GradientQ : public Reader<T, Form<kDecay, false, true>> {
 public:
  GradientQ(const Arguments& a, const Shared<T>& shared) :
      GradientQ::Reader(a.problem, a.problem.values, a.dout, a.problem.v, a.problem.k, 1.0),
      a_(a),
      shared_(shared),
      memory_(kTileSteps * (W + 2)),
      gradient_(padded_rows(a.problem.values) * W) {}

  // How many numbers the pass carries from tile to tile for a block. They hold dg of the next step: one number per key, or a single one in double
  // precision.
  static constexpr int64_t kCarry = most<int64_t>(kLanes<T>, sizeof(double) / sizeof(T));

  void begin_tile(const Slot<T>& slot, const Tile& tile) const {
    const bool segment = tile.from == 0 || tile.begins_segment, sequence = tile.from == 0 || tile.begins_sequence();
    if (!segment && tile.from % kExactSteps) return;
    for (int64_t block = slot.first_block; block < slot.end_block; ++block) {
      if (!segment)
        carry(slot, block, sum_of_products(slot, block, shared_.state_at(slot, block, tile.from)));
      else if (sequence && a_.dinitial.data)
        carry(slot, block, sum_of_products(slot, block, load_state(transposed(a_.dinitial), tile.sequence, slot, block, gradient_.data())));
      else
        carry(slot, block, Vec<T>{});
    }
  }

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    const Operands<T> in = GradientQ::Reader::rows(slot, tile);
    own_products(in.q, in.k, slot.rows, tile.count, own());
    return in;
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>& in, const T* o) const {
    const Problem& p = a_.problem;
    const int width = slot.width(block);
    const Vec<T> scale = splat(static_cast<T>(p.scale));
    write_rows<T>(a_.dq, slot.batch, slot.head, block * W, width, tile,
                  [&](int64_t t) { return fma(splat(own()[t]), load<T>(in.v[t]), load<T>(o + t * W)) * scale; });
    const View<T> q = rows_of<T>(p.q, slot.batch, slot.head, block * W, width, W, tile, memory_.data());
    const auto term = [&](int64_t t) { return load<T>(q[t]) * load<T>(o + t * W) * scale; };
    T* const carried = slot.carry + (block - slot.first_block) * kCarry;
    if constexpr (kDecay == Decay::kLanes) {
      const T* terms = static_cast<const T*>(a_.dg.data) + slot.batch * a_.dg.batch + slot.head * a_.dg.head + block * W;
      Vec<T> next = load<T>(carried);
      write_rows<T>(a_.dg, slot.batch, slot.head, block * W, width, tile, [&](int64_t t) {
        const Vec<T> dg = select(load<T>(in.decay[t]) < kNegligibleDecay<T>, Vec<T>{}, next);
        next = dg + load_part<T>(terms + tile.token(t) * a_.dg.token, width) - term(t);
        return dg;
      });
      store(carried, next);
    } else {
      T *const tile_sums = own() + kTileSteps, *const at = shared_.sums_of(slot.batch, slot.head, block) + tile.from;
      lane_sums<T>(tile.count, term, tile_sums);
      double dg;
      std::memcpy(&dg, carried, sizeof(dg));
      for (int64_t t = 0; t < tile.count; ++t) {
        if (*in.decay[t] < kNegligibleDecay<T>) dg = 0;
        const double change = static_cast<double>(at[t]) - static_cast<double>(tile_sums[t]);
        at[t] = static_cast<T>(dg);
        dg += change;
      }
      std::memcpy(carried, &dg, sizeof(dg));
    }
  }

 private:
  static constexpr int W = kLanes<T>;

  T* own() const { return memory_.data() + kTileSteps * W; }

  void carry(const Slot<T>& slot, int64_t block, Vec<T> dg) const {
    T* const to = slot.carry + (block - slot.first_block) * kCarry;
    if constexpr (kDecay == Decay::kLanes) return store(to, dg);
    const double sum = static_cast<double>(sum_lanes(dg));
    std::memcpy(to, &sum, sizeof(sum));
  }

  const Arguments& a_;
  const Shared<T>& shared_;
  const Scratch<T> memory_;    // q of a block; v_t . do_t of each step; sums over lanes
  const Scratch<T> gradient_;  // of an initial state's block
};

// dv and the gradient of the initial state: a pass in reverse.
template <class T, Decay kDecay> class GradientV : public Reader<T, Form<kDecay, true, false>> {
 public:
  explicit GradientV(const Arguments& a) : GradientV::Reader(a.problem, a.problem.keys, a.problem.k, a.problem.q, a.dout, a.problem.scale), a_(a) {}

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>&, const T* o) const {
    write_rows<T>(a_.dv, slot.batch, slot.head, block * kLanes<T>, slot.width(block), tile, [&](int64_t t) { return load<T>(o + t * kLanes<T>); });
  }

 private:
  const Arguments& a_;
};

// dg of each head: the sum over its blocks of keys, added in a fixed order.
template <class T> void write_decay_gradient(const Arguments& a, const Shared<T>& shared, const Walk& walk) {
  const Problem& p = a.problem;
  const Tile all = walk.steps(0, p.length);
  for (int64_t batch = 0; batch < p.batch; ++batch)
    for (int64_t head = 0; head < p.heads; ++head) {
      T* const to = static_cast<T*>(a.dg.data) + batch * a.dg.batch + head * a.dg.head;
      for (int64_t step = 0; step < p.length; ++step) {
        T sum = 0;
        for (int64_t block = 0; block < shared.blocks; ++block) sum += shared.sums_of(batch, head, block)[step];
        to[all.token(step) * a.dg.token] = sum;
      }
    }
}

template <class T, Decay kDecayOfRows, Decay kDecayOfLanes> void backward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse),
      back(p.length, p.index, p.starts, p.sequences, p.start_count, !p.reverse);
  const Shared<T> shared(p);
  for (const HeadOutput* out : {&a.dq, &a.dk, &a.dv, &a.dg}) prefer_huge_pages(*out, p.batch);
  const MatrixShape transposed_shape{p.batch, p.heads, 1, p.values, p.keys}, shape{p.batch, p.heads, 1, p.keys, p.values};
  scan<T>(shape, back, p.length, p.threads, a.dstate, a.dinitial, {}, 0, [&] { return GradientV<T, kDecayOfRows>(a); });
  scan<T>(transposed_shape, back, p.length, p.threads, transposed(a.dstate), {}, {kExactSteps, p.length}, 0,
          [&] { return GradientK<T, kDecayOfLanes>(a, shared); });
  scan<T>(transposed_shape, walk, p.length, p.threads, transposed(p.initial), {}, {kExactSteps, 0}, GradientQ<T, kDecayOfLanes>::kCarry,
          [&] { return GradientQ<T, kDecayOfLanes>(a, shared); });
  if (!p.per_key) write_decay_gradient(a, shared, walk);
}

template <class T> void backward(const Arguments& a) {
  a.problem.per_key ? backward<T, Decay::kRows, Decay::kLanes>(a) : backward<T, Decay::kWhole, Decay::kWhole>(a);
}

}  // namespace

MEDSSM_EXPORT(gated_linear_attention_backward, Arguments) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
