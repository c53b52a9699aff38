// SSD, backward, on a CPU: three passes with the recurrence of the forward pass, two in reverse and one in the direction of the walk. With dy the
// gradient of y and e_t = exp(s_t A):
//
//   dS_t = C_t dy_t + e_{t+1} dS_{t+1},  d(initial) = e_0 dS_0;   dC_t = sum of S_t dy_t,   dB_t = sum of s_t dS_t x_t  over the heads of a group
//   dx_t = s_t B_t dS_t + D dy_t;   ds_t = x_t . (B_t dS_t) + A dg_t,   dg the gradient of log e;   dA = sum over t of s_t dg_t
//
// Let X_t = e_{t+1} dS_{t+1} be the gradient of S_t that comes from later steps, and F_t the sum over all elements of S_t X_t. Then  dg_t = F_{t-1}
// and  F_t = F_{t-1} + s_t B_t X_t x_t - C_t (e_t S_{t-1}) dy_t,  so that
//
//   dg_{t+1} = dg_t + s_t B_t dS_t x_t - C_t S_t dy_t,   without the term of step t's own token, which is in both products and cancels (kStrict).
//
// dg at the first step of a sequence is the sum over its initial state times the gradient of that; at any other start of a segment it is 0. With
// strong decay all terms of the sum are as small as dg is. (A sum from the end would begin with the final state times its gradient, and only the
// rounding error of that would remain after a strong decay.)
//
// Over a long walk the rounding errors of this sum would add up, all with the same sign. So every so many steps dg is computed exactly, as the
// sum over S times X; the second pass stores X at these steps. And where the decay is negligible, dg is set to 0: otherwise A, which may be large,
// would multiply a rounding error.
#include "medssm/gate.h"
#include "medssm/group_sum.h"
#include "medssm/stored_states.h"
#include "problem.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  HeadTokens dout, y;              // y: the compute type; null without z
  StateTensor dstate;              // of the final state; may be null
  double *dA, *dbias, *dD;         // (b,h), (b,h), (b,h,p); dD may be null
  HeadOutput dx, ddt, dB, dC, dz;  // in the types of x, dt, B, C, z; dz may be null
  StateTensor dinitial;            // the compute type; null without an initial state
};

// What one pass stores for the next ones, for each batch element, head and block of states.
template <class T> struct Shared : StoredStates<T> {
  const Scratch<T> terms, sums;  // B_t dS_t x_t of a block's states, without and with step t's own token: [block][step]; sums: later ds
  const Scratch<double> rates;   // dA

  explicit Shared(const Problem& p) :
      StoredStates<T>(p),
      terms(p.batch * p.heads * this->blocks * p.length),
      sums(p.batch * p.heads * this->blocks * p.length),
      rates(p.batch * p.heads * this->blocks) {}

  double& rate_of(int64_t batch, int64_t head, int64_t block) const { return rates.data()[(batch * this->heads + head) * this->blocks + block]; }
};

// dB, and the terms of ds and dg: a pass in reverse. The gradient of the state is transposed: rows are channels, lanes are states.
template <class T> class GradientB : public Reader<T, true, true, false> {
 public:
  GradientB(const Arguments& a, const HeadTokens& dy, const Steps<T>& steps, const Shared<T>& shared, const GroupSum<T>& sum) :
      GradientB::Reader(a.problem, steps, a.problem.size, {a.problem.x, 1}, {dy, 1}, {a.problem.C, a.problem.heads / a.problem.groups}),
      a_(a),
      shared_(shared),
      sum_(sum),
      memory_(kTileSteps * (W + 3)),
      tile_(shared.blocks * kTileSteps * W) {}

  void begin_tile(const Slot<T>& slot, const Tile& tile) const {
    const int64_t step = a_.problem.length - tile.from;  // the one after the tile, in the direction of the walk
    if (tile.from == 0 || step % shared_.every) return;
    for (int64_t block = slot.first_block; block < slot.end_block; ++block)
      std::memcpy(shared_.state_at(slot, block, step), slot.state(block), sizeof(T) * static_cast<std::size_t>(shared_.state));
  }

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    const Operands<T> in = GradientB::Reader::rows(slot, tile);
    own_products(in.q, in.k, slot.rows, tile.count, own());
    return in;
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>& in, const T* o) const {
    const View<T> s = this->step(slot, tile);
    const auto whole = [&](int64_t t) { return fma(splat(own()[t]), load<T>(in.v[t]), load<T>(o + t * W)); };  // x_t dS_t
    sum_.add(slot, tile, block, tile_.data(), [&](int64_t t) { return whole(t) * splat(*s[t]); });
    const View<T> B = this->block_of({a_.problem.B, this->sharing_}, slot, tile, block, memory_.data());
    T *const strict = own() + kTileSteps, *const all = strict + kTileSteps;
    lane_sums<T>(tile.count, [&](int64_t t) { return load<T>(B[t]) * load<T>(o + t * W); }, strict);
    lane_sums<T>(tile.count, [&](int64_t t) { return load<T>(B[t]) * whole(t); }, all);
    T* const terms = shared_.of(shared_.terms, slot.batch, slot.head, block) + this->first(tile);
    T* const sums = shared_.of(shared_.sums, slot.batch, slot.head, block) + this->first(tile);
    for (int64_t t = 0; t < tile.count; ++t) {
      terms[-t] = strict[t];
      sums[-t] = all[t];
    }
  }

 private:
  static constexpr int W = kLanes<T>;

  T* own() const { return memory_.data() + kTileSteps * W; }

  const Arguments& a_;
  const Shared<T>& shared_;
  const GroupSum<T>& sum_;
  const Scratch<T> memory_;  // B of a block; x_t . dy_t of each step; two sums over lanes
  const Scratch<T> tile_;    // dB
};

// dC, ds and dA: a pass in the direction of the walk. The state is transposed: rows are channels, lanes are states.
template <class T> class GradientC : public Reader<T, false, true, true> {
 public:
  GradientC(const Arguments& a, const HeadTokens& dy, const Steps<T>& steps, const Shared<T>& shared, const GroupSum<T>& sum) :
      GradientC::Reader(a.problem, steps, a.problem.size, {dy, 1}, {a.problem.x, 1}, {a.problem.B, a.problem.heads / a.problem.groups}),
      a_(a),
      shared_(shared),
      sum_(sum),
      memory_(kTileSteps * (W + 2)),
      tile_(shared.blocks * kTileSteps * W),
      gradient_(shared.state) {}

  // What the pass carries from tile to tile for a block: dg of the next step, and dA so far.
  struct Carried {
    double dg, dA;
  };
  static constexpr int64_t kCarry = 64 / sizeof(T);  // a cache line, so that states stay aligned

  void begin_tile(const Slot<T>& slot, const Tile& tile) const {
    const bool segment = tile.from == 0 || tile.begins_segment, sequence = tile.from == 0 || tile.begins_sequence();
    if (!segment && tile.from % shared_.every) return;
    for (int64_t block = slot.first_block; block < slot.end_block; ++block) {
      Vec<T> sum{};
      if (!segment)
        sum = sum_of_products(slot, block, shared_.state_at(slot, block, tile.from));
      else if (sequence && a_.dinitial.data)
        sum = sum_of_products(slot, block, load_state(transposed(a_.dinitial), tile.sequence, slot, block, gradient_.data()));
      carry(slot, block, {static_cast<double>(sum_lanes(sum)), carried(slot, block).dA});
    }
  }
  void end_head(const Slot<T>& slot) const {
    for (int64_t block = slot.first_block; block < slot.end_block; ++block) shared_.rate_of(slot.batch, slot.head, block) = carried(slot, block).dA;
  }

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    const Operands<T> in = GradientC::Reader::rows(slot, tile);
    own_products(in.q, in.k, slot.rows, tile.count, own());
    return in;
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>& in, const T* o) const {
    sum_.add(slot, tile, block, tile_.data(), [&](int64_t t) { return fma(splat(own()[t]), load<T>(in.v[t]), load<T>(o + t * W)); });
    const View<T> C = this->block_of({a_.problem.C, this->sharing_}, slot, tile, block, memory_.data()), s = this->step(slot, tile);
    T* const tile_sums = own() + kTileSteps;
    lane_sums<T>(tile.count, [&](int64_t t) { return load<T>(C[t]) * load<T>(o + t * W); }, tile_sums);
    const T* const terms = shared_.of(shared_.terms, slot.batch, slot.head, block) + tile.from;
    T* const sums = shared_.of(shared_.sums, slot.batch, slot.head, block) + tile.from;
    const double A = static_cast<double>(static_cast<const T*>(a_.problem.A)[slot.head]);
    Carried c = carried(slot, block);
    for (int64_t t = 0; t < tile.count; ++t) {
      const double step = static_cast<double>(*s[t]);
      if (*in.decay[t] < kNegligibleDecay<T>) c.dg = 0;
      c.dA += step * c.dg;
      sums[t] = static_cast<T>(static_cast<double>(sums[t]) + A * c.dg);
      c.dg += step * static_cast<double>(terms[t]) - static_cast<double>(tile_sums[t]);
    }
    carry(slot, block, c);
  }

 private:
  static constexpr int W = kLanes<T>;

  T* own() const { return memory_.data() + kTileSteps * W; }

  static Carried carried(const Slot<T>& slot, int64_t block) {
    Carried c;
    std::memcpy(&c, slot.carry + (block - slot.first_block) * kCarry, sizeof(c));
    return c;
  }
  static void carry(const Slot<T>& slot, int64_t block, const Carried& c) {
    std::memcpy(slot.carry + (block - slot.first_block) * kCarry, &c, sizeof(c));
  }

  const Arguments& a_;
  const Shared<T>& shared_;
  const GroupSum<T>& sum_;
  const Scratch<T> memory_;    // C of a block; x_t . dy_t of each step; sums over lanes
  const Scratch<T> tile_;      // dC
  const Scratch<T> gradient_;  // of an initial state's block
};

// dx, dD and the gradient of the initial state: a pass in reverse.
template <class T> class GradientX : public Reader<T, true, false, false> {
 public:
  GradientX(const Arguments& a, const HeadTokens& dy, const Steps<T>& steps) :
      GradientX::Reader(a.problem, steps, a.problem.states, {a.problem.B, a.problem.heads / a.problem.groups},
                        {a.problem.C, a.problem.heads / a.problem.groups}, {dy, 1}),
      a_(a),
      memory_(kTileSteps * W) {}

  static constexpr int64_t kCarry = kLanes<T> * sizeof(double) / sizeof(T);  // dD of a block

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>& in, const T* o) const {
    const View<T> s = this->step(slot, tile);
    const Vec<T> D = skip_of(a_.problem, slot, block);
    write_rows<T>(a_.dx, slot.batch, slot.head, block * W, slot.width(block), tile,
                  [&](int64_t t) { return fma(D, load<T>(in.v[t]), load<T>(o + t * W) * splat(*s[t])); });
    if (!a_.dD) return;
    const View<T> x = this->block_of({a_.problem.x, 1}, slot, tile, block, memory_.data());
    Vec<T> sum{};
    for (int64_t t = 0; t < tile.count; ++t) sum = fma(load<T>(x[t]), load<T>(in.v[t]), sum);
    double dD[W];
    T* const carried = slot.carry + (block - slot.first_block) * kCarry;
    std::memcpy(dD, carried, sizeof(dD));
    for (int i = 0; i < W; ++i) dD[i] += static_cast<double>(sum[i]);
    std::memcpy(carried, dD, sizeof(dD));
  }

  void end_head(const Slot<T>& slot) const {
    if (!a_.dD) return;
    for (int64_t block = slot.first_block; block < slot.end_block; ++block)
      std::memcpy(a_.dD + (slot.batch * a_.problem.heads + slot.head) * a_.problem.size + block * W, slot.carry + (block - slot.first_block) * kCarry,
                  sizeof(double) * static_cast<std::size_t>(slot.width(block)));
  }

 private:
  static constexpr int W = kLanes<T>;
  const Arguments& a_;
  const Scratch<T> memory_;  // x of a block
};

// ddt, and the sums dA and dbias, from what the passes stored.
template <class T> void write_step_gradients(const Arguments& a, const Steps<T>& steps, const Shared<T>& shared, const Walk& walk) {
  const Problem& p = a.problem;
  const int64_t items = p.batch * p.heads;
  parallel(useful_threads(p.threads, items, p.length), [&](const Team& team) {
    const Range mine = share(items, team);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t batch = item / p.heads, head = item % p.heads;
      double bias = 0, rate = 0;
      for (int64_t block = 0; block < shared.blocks; ++block) rate += shared.rate_of(batch, head, block);
      for (int64_t from = 0; from < p.length;) {
        const Tile tile = walk.tile(from, p.length);
        const T* slope = steps.slope(batch, head, from);
        with_storage(a.ddt.type, a.ddt.data, [&](auto* ddt) {
          using S = std::remove_reference_t<decltype(*ddt)>;
          ddt += batch * a.ddt.batch + head * a.ddt.head;
          for (int64_t t = 0; t < tile.count; ++t) {
            T ds = 0;
            for (int64_t block = 0; block < shared.blocks; ++block) ds += shared.of(shared.sums, batch, head, block)[from + t];
            bias += static_cast<double>(ds * slope[t]);
            ddt[tile.token(t) * a.ddt.token] = to_storage<S>(ds * slope[t]);
          }
        });
        from += tile.count;
      }
      a.dA[item] = rate;
      a.dbias[item] = bias;
    }
  });
}

template <class T> void backward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse),
      back(p.length, p.index, p.starts, p.sequences, p.start_count, !p.reverse);
  prefer_huge_pages_for(p.batch, a.dx, a.dB, a.dC, a.dz);
  const Steps<T> steps(p, walk);
  const Shared<T> shared(p);
  const int64_t token = p.heads * p.size;
  const Scratch<T> gated(p.z.data ? p.batch * p.length * token : 0);
  HeadTokens dy = a.dout;
  if (p.z.data) {
    const HeadOutput to{gated.data(), kStorage<T>, p.length * token, token, p.size};
    prefer_huge_pages_for(p.batch, to);
    gate_gradient<T>(MatrixShape{p.batch, p.heads, 1, p.size, 0}, p.length, p.threads, a.dout, a.y, p.z, to, a.dz);
    dy = {to.data, to.type, to.batch, to.token, to.head};
  }
  const GroupShape shared_by{p.batch, p.length, p.heads, p.groups, p.states, p.threads};
  const GroupSum<T> of_B(shared_by, a.dB), of_C(shared_by, a.dC);
  const MatrixShape transposed_shape{p.batch, p.heads, of_B.heads_per_piece(), p.size, p.states}, shape{p.batch, p.heads, 1, p.states, p.size};
  scan<T>(shape, back, p.length, p.threads, a.dstate, a.dinitial, {}, GradientX<T>::kCarry, [&] { return GradientX<T>(a, dy, steps); });
  scan<T>(transposed_shape, back, p.length, p.threads, transposed(a.dstate), {}, {shared.every, p.length}, 0,
          [&] { return GradientB<T>(a, dy, steps, shared, of_B); });
  scan<T>(transposed_shape, walk, p.length, p.threads, transposed(p.initial), {}, {shared.every, 0}, GradientC<T>::kCarry,
          [&] { return GradientC<T>(a, dy, steps, shared, of_C); });
  write_step_gradients(a, steps, shared, walk);
  of_B.finish();
  of_C.finish();
}

}  // namespace

MEDSSM_EXPORT(ssd_backward, Arguments) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
