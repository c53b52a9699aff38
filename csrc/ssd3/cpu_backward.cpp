// Mamba-3's recurrence, backward, on a CPU: three passes with the recurrence of the forward pass, two in reverse and one in the direction of the
// walk. With dy the gradient of y, X_t = e_{t+1} dS_{t+1} the gradient of S'_t that comes from later steps, and w_t = now_t + later_t:
//
//   dq_t = (e_t S'_{t-1}) dy_t + now_t (x_t . dy_t) k_t,   dk_t = w_t X_t x_t + now_t (x_t . dy_t) q_t,   dS_t = q_t dy_t + X_t
//   dx_t = w_t k_t X_t + (now_t q_t . k_t + D) dy_t,   dlater_t = k_t X_t x_t,   dnow_t = dlater_t + (q_t . k_t) (x_t . dy_t)
//
// and for g = dt A, the logarithm of the decay, as in csrc/ssd/cpu_backward.cpp, with exact sums every so many steps:
//
//   dg_{t+1} = dg_t + w_t k_t X_t x_t - q_t (e_t S'_{t-1}) dy_t
//
// The gradient of an angle is that of its pair in q and in k, summed over the later steps of its segment. Turned back, dq and dk give dC and dB.
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
  const double* dangle;            // of the final angles (b,h,a), in radians; may be null
  double *dD, *dB_bias, *dC_bias;  // (b,h), (b,h,n), (b,h,n), to be summed over b
  HeadOutput dx, dB, dC, dz;       // in the types of x, B, C, z; dz may be null
  HeadOutput ddt, dA, dtrap;       // (b,l,h), the compute type
  HeadOutput dangles;              // (b,l,h,a), the compute type
  StateTensor dinitial;            // of S'_0, the compute type; null without an initial state
  double* dinitial_angle;          // (b,h,a); may be null
};

// What one pass stores for the next ones, for each batch element, head and block of states.
template <class T> struct Shared : StoredStates<T> {
  const Scratch<T> later, now, decay;  // a block's part of dlater, of dnow and of dg: [block][step]
  const Scratch<T> own;                // x_t . dy_t: [step]
  const Scratch<T> angles;             // the gradients of the angles: [step][angle], as many as Steps has

  Shared(const Problem& p, const Steps<T>& steps) :
      StoredStates<T>(p),
      later(p.batch * p.heads * this->blocks * p.length),
      now(p.batch * p.heads * this->blocks * p.length),
      decay(p.batch * p.heads * this->blocks * p.length),
      own(p.batch * p.heads * p.length),
      angles(p.batch * p.heads * p.length * steps.padded()),
      padded_(steps.padded()) {
    prefer_huge_pages(angles.data(), p.batch * p.heads * p.length * padded_ * static_cast<int64_t>(sizeof(T)));
  }

  T* own_of(int64_t batch, int64_t head) const { return own.data() + (batch * this->heads + head) * this->length; }
  T* angles_of(int64_t batch, int64_t head, int64_t step) const {
    return angles.data() + ((batch * this->heads + head) * this->length + step) * padded_;
  }

 private:
  const int64_t padded_;
};

// What the passes with states in the lanes have in common: the operands x, dy, q and k, and what becomes of dq and dk.
template <class T, bool kBack> class GradientOfTurned : public Reader<T, kBack> {
 public:
  GradientOfTurned(const Arguments& a, const HeadTokens& dy, const Steps<T>& steps, const Shared<T>& shared, const GroupSum<T>& sum, double* biases) :
      GradientOfTurned::Reader(a.problem, steps),
      a_(a),
      shared_(shared),
      dy_(dy),
      sum_(sum),
      biases_(biases),
      rows_(2 * kTileSteps * padded_rows(a.problem.size)),
      memory_(kTileSteps * (4 * W + 3)),
      tile_(shared.blocks * kTileSteps * W) {}

 protected:
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kBias = most<int64_t>(64, W* static_cast<int64_t>(sizeof(double))) / static_cast<int64_t>(sizeof(T));  // of the carry

  T* q() const { return memory_.data(); }
  T* k() const { return q() + kTileSteps * W; }
  T* v() const { return k() + kTileSteps * W; }
  T* d() const { return v() + kTileSteps * W; }
  T* own() const { return d() + kTileSteps * W; }  // x_t . dy_t of each step, then two sums over lanes

  // x and dy of a tile.
  View<T> x_rows(const Slot<T>& slot, const Tile& tile) const { return rows_from(a_.problem.x, slot, tile, rows_.data()); }
  View<T> dy_rows(const Slot<T>& slot, const Tile& tile) const {
    return rows_from(dy_, slot, tile, rows_.data() + kTileSteps * padded_rows(a_.problem.size));
  }

  // Takes the gradients d() of the turned rows x [step][lane]. add: whether the pass before has stored its part of the angles' gradients.
  void finish(const Slot<T>& slot, const Tile& tile, int64_t block, const T* x, T* carry, bool add) const {
    if (this->turns(block))
      for (int64_t t = 0; t < tile.count; ++t) {
        const int64_t step = kBack ? this->first(tile) - t : this->first(tile) + t;
        T* const to = shared_.angles_of(slot.batch, slot.head, step) + block * W / 2;
        const Vec<T> gradient = load<T>(d() + t * W);
        Vec<T> angle = angle_gradient<T>(gradient, load<T>(x + t * W));
        if (add) angle += load<T>(to);
        store_first<T, W / 2>(to, angle);
        store(d() + t * W, turned_back<T>(gradient, this->rotation(t)));
      }
    sum_.add(slot, tile, block, tile_.data(), [&](int64_t t) { return load<T>(d() + t * W); });
    if (!biases_) return;
    Vec<T> sum{};
    for (int64_t t = 0; t < tile.count; ++t) sum += load<T>(d() + t * W);
    double total[W];
    std::memcpy(total, carry, sizeof(total));
    for (int i = 0; i < W; ++i) total[i] += static_cast<double>(sum[i]);
    std::memcpy(carry, total, sizeof(total));
  }
  void write_bias(const Slot<T>& slot, int64_t block, const T* carry) const {
    if (biases_)
      std::memcpy(biases_ + (slot.batch * a_.problem.heads + slot.head) * a_.problem.states + block * W, carry,
                  sizeof(double) * static_cast<std::size_t>(slot.width(block)));
  }

  const Arguments& a_;
  const Shared<T>& shared_;

 private:
  View<T> rows_from(const HeadTokens& x, const Slot<T>& slot, const Tile& tile, T* buffer) const {
    return rows_of<T>(x, slot.batch, slot.head, 0, a_.problem.size, padded_rows(a_.problem.size), tile, buffer);
  }

  const HeadTokens dy_;
  const GroupSum<T>& sum_;
  double* const biases_;
  const Scratch<T> rows_;    // x and dy
  const Scratch<T> memory_;  // q, k, the pass's v and d of a block, and numbers of each step
  const Scratch<T> tile_;    // the sums of the group
};

// dB, and the parts of dlater, dnow and the angles' gradients: a pass in reverse. The gradient of the state is transposed: rows are channels.
template <class T> class GradientB : public GradientOfTurned<T, true> {
 public:
  using GradientOfTurned<T, true>::GradientOfTurned;
  static constexpr int64_t kCarry = GradientB::kBias;

  void begin_tile(const Slot<T>& slot, const Tile& tile) const {
    const Shared<T>& shared = this->shared_;
    const int64_t step = shared.length - tile.from;  // the one after the tile, in the direction of the walk
    if (tile.from == 0 || step % shared.every) return;
    for (int64_t block = slot.first_block; block < slot.end_block; ++block)
      std::memcpy(shared.state_at(slot, block, step), slot.state(block), sizeof(T) * static_cast<std::size_t>(shared.state));
  }
  void end_head(const Slot<T>& slot) const {
    for (int64_t block = slot.first_block; block < slot.end_block; ++block)
      this->write_bias(slot, block, slot.carry + (block - slot.first_block) * kCarry);
  }

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    const Operands<T> in{this->x_rows(slot, tile), this->dy_rows(slot, tile), {}, this->decay(slot, tile), tile.count};
    own_products(in.q, in.k, slot.rows, tile.count, this->own());
    if (slot.first_block == 0) {
      T* const to = this->shared_.own_of(slot.batch, slot.head) + this->first(tile);
      for (int64_t t = 0; t < tile.count; ++t) to[-t] = this->own()[t];
    }
    return in;
  }

  void lanes(const Slot<T>& slot, const Tile& tile, int64_t block, Operands<T>* in) const {
    this->turned_block(slot, tile, block, this->q(), this->k());
    in->v = {this->q(), W};
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>&, const T* o) const {
    const Shared<T>& shared = this->shared_;
    const View<T> now = this->now(slot, tile), later = this->later(slot, tile);
    const T *const q = this->q(), *const k = this->k(), *const own = this->own();
    T *const strict = this->own() + kTileSteps, *const all = strict + kTileSteps;
    lane_sums<T>(tile.count, [&](int64_t t) { return load<T>(k + t * W) * load<T>(o + t * W); }, strict);
    lane_sums<T>(tile.count, [&](int64_t t) { return load<T>(k + t * W) * fma(splat(own[t]), load<T>(q + t * W), load<T>(o + t * W)); }, all);
    T* const dlater = shared.of(shared.later, slot.batch, slot.head, block) + this->first(tile);
    T* const dnow = shared.of(shared.now, slot.batch, slot.head, block) + this->first(tile);
    for (int64_t t = 0; t < tile.count; ++t) {
      dlater[-t] = strict[t];
      dnow[-t] = all[t];
      store(this->d() + t * W, fma(splat(*now[t] * own[t]), load<T>(q + t * W), load<T>(o + t * W) * splat(*now[t] + *later[t])));
    }
    this->finish(slot, tile, block, k, slot.carry + (block - slot.first_block) * kCarry, false);
  }

 private:
  static constexpr int W = kLanes<T>;
};

// dC, dg and the rest of the angles' gradients: a pass in the direction of the walk. The state is transposed: rows are channels.
template <class T> class GradientC : public GradientOfTurned<T, false> {
 public:
  GradientC(const Arguments& a, const HeadTokens& dy, const Steps<T>& steps, const Shared<T>& shared, const GroupSum<T>& sum) :
      GradientOfTurned<T, false>(a, dy, steps, shared, sum, a.dC_bias), gradient_(shared.state) {}

  static constexpr int64_t kCarry = GradientC::kBias + 64 / sizeof(T);  // the bias, then dg of the next step in double precision

  void begin_tile(const Slot<T>& slot, const Tile& tile) const {
    const Shared<T>& shared = this->shared_;
    const StateTensor& dinitial = this->a_.dinitial;
    const bool segment = tile.from == 0 || tile.begins_segment, sequence = tile.from == 0 || tile.begins_sequence();
    if (!segment && tile.from % shared.every) return;
    for (int64_t block = slot.first_block; block < slot.end_block; ++block) {
      Vec<T> sum{};
      if (!segment)
        sum = sum_of_products(slot, block, shared.state_at(slot, block, tile.from));
      else if (sequence && dinitial.data)
        sum = sum_of_products(slot, block, load_state(transposed(dinitial), tile.sequence, slot, block, gradient_.data()));
      const double dg = static_cast<double>(sum_lanes(sum));
      std::memcpy(carry(slot, block) + GradientC::kBias, &dg, sizeof(dg));
    }
  }
  void end_head(const Slot<T>& slot) const {
    for (int64_t block = slot.first_block; block < slot.end_block; ++block) this->write_bias(slot, block, carry(slot, block));
  }

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    const Operands<T> in{this->dy_rows(slot, tile), this->x_rows(slot, tile), {}, this->decay(slot, tile), tile.count};
    own_products(in.q, in.k, slot.rows, tile.count, this->own());
    return in;
  }

  void lanes(const Slot<T>& slot, const Tile& tile, int64_t block, Operands<T>* in) const {
    const View<T> now = this->now(slot, tile), later = this->later(slot, tile);
    this->turned_block(slot, tile, block, this->q(), this->k());
    for (int64_t t = 0; t < tile.count; ++t) store(this->v() + t * W, load<T>(this->k() + t * W) * splat(*now[t] + *later[t]));
    in->v = {this->v(), W};
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>& in, const T* o) const {
    const Shared<T>& shared = this->shared_;
    const View<T> now = this->now(slot, tile), later = this->later(slot, tile);
    const T *const q = this->q(), *const k = this->k(), *const own = this->own();
    T* const tile_sums = this->own() + kTileSteps;
    lane_sums<T>(tile.count, [&](int64_t t) { return load<T>(q + t * W) * load<T>(o + t * W); }, tile_sums);
    const T* const terms = shared.of(shared.later, slot.batch, slot.head, block) + tile.from;
    T *const decay = shared.of(shared.decay, slot.batch, slot.head, block) + tile.from, *const carried = carry(slot, block);
    double dg;
    std::memcpy(&dg, carried + GradientC::kBias, sizeof(dg));
    for (int64_t t = 0; t < tile.count; ++t) {
      store(this->d() + t * W, fma(splat(*now[t] * own[t]), load<T>(k + t * W), load<T>(o + t * W)));
      if (*in.decay[t] < kNegligibleDecay<T>) dg = 0;
      decay[t] = static_cast<T>(dg);
      dg += static_cast<double>(*now[t] + *later[t]) * static_cast<double>(terms[t]) - static_cast<double>(tile_sums[t]);
    }
    std::memcpy(carried + GradientC::kBias, &dg, sizeof(dg));
    this->finish(slot, tile, block, q, carried, true);
  }

 private:
  static constexpr int W = kLanes<T>;

  static T* carry(const Slot<T>& slot, int64_t block) { return slot.carry + (block - slot.first_block) * kCarry; }

  const Scratch<T> gradient_;  // of an initial state's block
};

// dx and the gradient of the initial state: a pass in reverse.
template <class T> class GradientX : public Reader<T, true> {
 public:
  GradientX(const Arguments& a, const HeadTokens& dy, const Steps<T>& steps) :
      GradientX::Reader(a.problem, steps), a_(a), dy_(dy), rows_(2 * kTileSteps * this->row()), memory_(kTileSteps * (W + 1)) {}

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    T *const q = rows_.data(), *const k = q + kTileSteps * this->row();
    this->turned_rows(slot, tile, q, k);
    const Operands<T> in{{k, this->row()}, {q, this->row()}, {}, this->decay(slot, tile), tile.count};
    own_products(in.q, in.k, slot.rows, tile.count, own());
    return in;
  }

  void lanes(const Slot<T>& slot, const Tile& tile, int64_t block, Operands<T>* in) const {
    in->v = this->block_of(dy_, slot, tile, block, memory_.data());
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>& in, const T* o) const {
    const View<T> now = this->now(slot, tile), later = this->later(slot, tile);
    const T D = skip_of(a_.problem, slot);
    write_rows<T>(a_.dx, slot.batch, slot.head, block * W, slot.width(block), tile,
                  [&](int64_t t) { return fma(splat(*now[t] * own()[t] + D), load<T>(in.v[t]), load<T>(o + t * W) * splat(*now[t] + *later[t])); });
  }

 private:
  static constexpr int W = kLanes<T>;

  T* own() const { return memory_.data() + kTileSteps * W; }

  const Arguments& a_;
  const HeadTokens dy_;
  const Scratch<T> rows_;    // q and k
  const Scratch<T> memory_;  // dy of a block; q_t . k_t of each step
};

// The gradients of dt, A, trap and the angles of one head, from what the passes stored: against the walk, since an angle turns all later steps.
template <class T> class StepGradients {
 public:
  StepGradients(const Arguments& a, const Shared<T>& shared) :
      a_(a), shared_(shared), count_(a.problem.turning), sums_(count_), rates_(round_up(count_, kLanes<T>)) {}

  void write(const Walk& back, int64_t batch, int64_t head) const {
    const Problem& p = a_.problem;
    double skip = 0;
    begin(batch, head, back.first_sequence(), true);
    T dt[kTileSteps], A[kTileSteps], trap[kTileSteps];
    for (int64_t from = 0; from < p.length;) {
      const Tile tile = back.tile(from, p.length);
      if (tile.begins_segment) { begin(batch, head, tile.sequence, tile.begins_sequence()); }
      stage_numbers<T>(p.dt, batch, head, tile, dt);
      stage_numbers<T>(p.A, batch, head, tile, A);
      stage_numbers<T>(p.trap, batch, head, tile, trap);
      // The step before the tile's last one, in the direction of the walk, is in the same segment unless a segment begins there.
      const int64_t end = from + tile.count;
      const bool begins = end == p.length || back.tile(end, p.length).begins_segment;
      for (int64_t t = 0; t < tile.count; ++t) {
        const int64_t step = p.length - 1 - from - t, token = tile.token(t);
        T dnow = 0, dheld = 0, dg = 0;
        for (int64_t block = 0; block < shared_.blocks; ++block) {
          dnow += shared_.of(shared_.now, batch, head, block)[step];
          dg += shared_.of(shared_.decay, batch, head, block)[step];
          if (t + 1 < tile.count || !begins) dheld += shared_.of(shared_.later, batch, head, block)[step - 1];
        }
        skip += static_cast<double>(shared_.own_of(batch, head)[step]);
        const T mix = sigmoid<T>(splat(trap[t]))[0], slope = dt[t] * (dnow - dheld) * mix * (1 - mix);
        const T turning = turn(batch, head, step, token, dt[t]);
        at(a_.ddt, batch, head, token)[0] = mix * dnow + (1 - mix) * dheld + A[t] * dg + turning;
        at(a_.dA, batch, head, token)[0] = dt[t] * dg;
        at(a_.dtrap, batch, head, token)[0] = slope;
      }
      if (begins && a_.dinitial_angle)
        std::memcpy(row(a_.dinitial_angle, batch + tile.sequence, head), sums_.data(), sizeof(double) * static_cast<std::size_t>(count_));
      from = end;
    }
    if (a_.dD) a_.dD[batch * p.heads + head] = skip;
  }

 private:
  static T* at(const HeadOutput& x, int64_t batch, int64_t head, int64_t token) {
    return static_cast<T*>(x.data) + batch * x.batch + head * x.head + token * x.token;
  }
  double* row(double* of, int64_t sequence, int64_t head) const { return of + (sequence * a_.problem.heads + head) * count_; }

  // The end of a segment, from which the sums go back.
  void begin(int64_t batch, int64_t head, int64_t sequence, bool last) const {
    for (int64_t i = 0; i < count_; ++i)
      sums_.data()[i] = last && a_.dangle ? a_.dangle[((batch + sequence) * a_.problem.heads + head) * count_ + i] : 0;
  }

  // Adds a step to the sums, writes its dangles, and returns what dt gets of them.
  T turn(int64_t batch, int64_t head, int64_t step, int64_t token, T dt) const {
    constexpr double kPi = 3.141592653589793;
    const Problem& p = a_.problem;
    T* const rates = rates_.data();
    with_storage(p.angles.type, p.angles.data, [&](const auto* angles) {
      angles += batch * p.angles.batch + head * p.angles.head + token * p.angles.token;
      for (int64_t i = 0; i < count_; i += kLanes<T>)
        store(rates + i, tanh<T>(load_part<T>(angles + i, static_cast<int>(least<int64_t>(kLanes<T>, count_ - i)))));
    });
    const T* const gradient = shared_.angles_of(batch, head, step);
    T* const to = at(a_.dangles, batch, head, token);
    T total = 0;
    for (int64_t i = 0; i < count_; ++i) {
      double& sum = sums_.data()[i];
      sum += static_cast<double>(gradient[i]);
      const T turned = static_cast<T>(sum * kPi);
      to[i] = turned * dt * (1 - rates[i] * rates[i]);
      total += turned * rates[i];
    }
    return total;
  }

  const Arguments& a_;
  const Shared<T>& shared_;
  const int64_t count_;
  const Scratch<double> sums_;
  const Scratch<T> rates_;
};

template <class T> void backward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse),
      back(p.length, p.index, p.starts, p.sequences, p.start_count, !p.reverse);
  prefer_huge_pages_for(p.batch, a.dx, a.dB, a.dC, a.dz, a.dangles);
  const Steps<T> steps(p, walk, nullptr);
  const Shared<T> shared(p, steps);
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
  scan<T>(shape, back, p.length, p.threads, a.dstate, a.dinitial, {}, 0, [&] { return GradientX<T>(a, dy, steps); });
  scan<T>(transposed_shape, back, p.length, p.threads, transposed(a.dstate), {}, {shared.every, p.length}, GradientB<T>::kCarry,
          [&] { return GradientB<T>(a, dy, steps, shared, of_B, a.dB_bias); });
  scan<T>(transposed_shape, walk, p.length, p.threads, transposed(p.initial), {}, {shared.every, 0}, GradientC<T>::kCarry,
          [&] { return GradientC<T>(a, dy, steps, shared, of_C); });
  const int64_t items = p.batch * p.heads, threads = useful_threads(p.threads, items, p.length * (8 + p.turning));
  const PerThread<StepGradients<T>> writer_of(threads, [&] { return StepGradients<T>(a, shared); });
  parallel(threads, [&](const Team& team) {
    const Range mine = share(items, team);
    for (int64_t item = mine.begin; item < mine.end; ++item) writer_of[team.rank].write(back, item / p.heads, item % p.heads);
  });
  of_B.finish();
  of_C.finish();
}

}  // namespace

MEDSSM_EXPORT(ssd3_backward, Arguments) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
