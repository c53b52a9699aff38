// The arguments of ssd3 (Mamba-3, of rank 1), and what its passes share: numbers and angles of all steps, and the operands of a tile.
//
// A token's x_t k_t^T enters the state twice: at its own step with the weight now_t, at the next one with e_{t+1} later_t. So S'_t = S_t + later_t
// x_t k_t^T obeys a plain recurrence,
//
//   S'_t = e_t S'_{t-1} + (now_t + later_t) x_t k_t^T,   y_t = (e_t S'_{t-1}) q_t + (now_t k_t . q_t + D) x_t
//   now_t = m_t dt_t,   later_t = (1 - m_{t+1}) dt_{t+1}, 0 where the walk ends or begins anew;   m = sigmoid(trap), e = exp(dt A)
//
// in which q and k are C and B with their biases, turned by the angles. Nothing turned is kept: every pass turns the rows of its tile.
#pragma once
#include "medssm/heads.h"
#include "medssm/matrix_scan.h"
#include "medssm/rotation.h"

namespace medssm {
namespace {

// The argument block that kernels/ssd3/native.py packs. Strides are in elements.
struct Problem {
  HeadTokens x, z, B, C;                      // x (b,l,h,p), z the same or null, B and C (b,l,g,n)
  HeadTokens dt, A, trap, angles;             // (b,l,h); angles (b,l,h,a), the stride of the heads 0 where they share them
  StateTensor initial;                        // S'_0 (b,h,n,p): rows are states, lanes are a head's channels; the data may be null
  const double* angle;                        // the angles before the first step (b,h,a), in revolutions; may be null
  const void *D, *B_bias, *C_bias;            // (h), (h,n), (h,n): dense, the compute type; each may be null
  const int64_t *index, *starts, *sequences;  // see medssm/walk.h
  int64_t start_count, reverse;
  int64_t batch, length, heads, size, groups, states, turning;  // turning: a, the pairs of channels that turn
  int64_t wide, threads;                                        // wide: compute in double
};

// The same memory with rows and lanes exchanged.
MEDSSM_INLINE StateTensor transposed(const StateTensor& s) { return {s.data, s.type, s.batch, s.head, s.lane, s.row}; }

// x without the nearest whole number, from -1/2 to 1/2.
MEDSSM_INLINE double fraction(double x) {
  constexpr double kWhole = 6755399441055744;  // 1.5 * 2^52
  return x - ((x + kWhole) - kWhole);
}

// For every step of the walk: its numbers, each [b, h][step], and its angles in revolutions, [b, h][step][turning, padded].
template <class T> class Steps {
 public:
  // last: the angles after the last step (b,h,a) in revolutions; may be null.
  Steps(const Problem& p, const Walk& walk, double* last) :
      p_(p),
      padded_(round_up(p.turning, kPairs) + kPairs),
      now_(p.batch * p.heads * p.length),
      later_(p.batch * p.heads * p.length),
      decay_(p.batch * p.heads * p.length),
      angle_(p.batch * p.heads * p.length * padded_) {
    const int64_t items = p.batch * p.heads, threads = useful_threads(p.threads, items, p.length * (8 + p.turning));
    struct Own {
      Scratch<double> sums;
      Scratch<T> rates;
    };
    const PerThread<Own> own_of(threads, [&] { return Own{Scratch<double>(p.turning), Scratch<T>(padded_ + kLanes<T>)}; });
    prefer_huge_pages(angle_.data(), items * p.length * padded_ * static_cast<int64_t>(sizeof(T)));
    parallel(threads, [&](const Team& team) {
      const Own& own = own_of[team.rank];
      const Range mine = share(items, team);
      for (int64_t item = mine.begin; item < mine.end; ++item) {
        weigh(walk, item / p.heads, item % p.heads);
        turn(walk, item / p.heads, item % p.heads, own.sums.data(), own.rates.data(), last);
      }
    });
  }

  // The numbers of one head, beginning at step `from` of the walk.
  const T* now(int64_t batch, int64_t head, int64_t from) const { return now_.data() + at(batch, head, from); }
  const T* later(int64_t batch, int64_t head, int64_t from) const { return later_.data() + at(batch, head, from); }
  const T* decay(int64_t batch, int64_t head, int64_t from) const { return decay_.data() + at(batch, head, from); }
  const T* angle(int64_t batch, int64_t head, int64_t from) const { return angle_.data() + at(batch, head, from) * padded_; }
  // Numbers from the angles of one step to those of the next. As many as kLanes may be read from the first angle of any block of lanes.
  int64_t padded() const { return padded_; }

 private:
  static constexpr int kPairs = kLanes<T> / 2;

  int64_t at(int64_t batch, int64_t head, int64_t from) const { return (batch * p_.heads + head) * p_.length + from; }

  void weigh(const Walk& walk, int64_t batch, int64_t head) const {
    constexpr int W = kLanes<T>;
    T *const now = now_.data() + at(batch, head, 0), *const later = later_.data() + at(batch, head, 0),
             *const decay = decay_.data() + at(batch, head, 0);
    T dt[kTileSteps], A[kTileSteps], trap[kTileSteps], held[kTileSteps];
    for (int64_t from = 0; from < p_.length;) {
      const Tile tile = walk.tile(from, p_.length);
      stage_numbers<T>(p_.dt, batch, head, tile, dt);
      stage_numbers<T>(p_.A, batch, head, tile, A);
      stage_numbers<T>(p_.trap, batch, head, tile, trap);
      for (int64_t t = 0; t < tile.count; t += W) {
        const int lanes = static_cast<int>(least<int64_t>(W, tile.count - t));
        const Vec<T> step = load_part<T>(dt + t, lanes), mix = sigmoid<T>(load_part<T>(trap + t, lanes));
        store_part(now + from + t, mix * step, lanes);
        store_part(held + t, (T(1) - mix) * step, lanes);
        store_part(decay + from + t, exp<T>(step * load_part<T>(A + t, lanes)), lanes);
      }
      if (from) later[from - 1] = tile.begins_segment ? T(0) : held[0];
      for (int64_t t = 1; t < tile.count; ++t) later[from + t - 1] = held[t];
      from += tile.count;
    }
    later[p_.length - 1] = 0;
  }

  void turn(const Walk& walk, int64_t batch, int64_t head, double* sums, T* rates, double* last) const {
    const int64_t count = p_.turning;
    const auto begin = [&](int64_t sequence, bool initial) {
      for (int64_t i = 0; i < count; ++i) sums[i] = initial && p_.angle ? fraction(p_.angle[((batch + sequence) * p_.heads + head) * count + i]) : 0;
    };
    const auto end = [&](int64_t sequence) {
      for (int64_t i = 0; last && i < count; ++i) last[((batch + sequence) * p_.heads + head) * count + i] = sums[i];
    };
    begin(walk.first_sequence(), true);
    T dt[kTileSteps];
    for (int64_t from = 0; from < p_.length;) {
      const Tile tile = walk.tile(from, p_.length);
      if (tile.begins_segment) {
        if (tile.begins_sequence()) end(tile.previous);
        begin(tile.sequence, tile.begins_sequence());
      }
      stage_numbers<T>(p_.dt, batch, head, tile, dt);
      with_storage(p_.angles.type, p_.angles.data, [&](const auto* angles) {
        angles += batch * p_.angles.batch + head * p_.angles.head;
        for (int64_t t = 0; t < tile.count; ++t) {
          const auto* row = angles + tile.token(t) * p_.angles.token;
          for (int64_t i = 0; i < count; i += kLanes<T>)
            store(rates + i, tanh<T>(load_part<T>(row + i, static_cast<int>(least<int64_t>(kLanes<T>, count - i)))));
          T* const to = angle_.data() + at(batch, head, from + t) * padded_;
          const double half = static_cast<double>(dt[t]) / 2;  // pi dt in revolutions
          for (int64_t i = 0; i < count; ++i) {
            sums[i] = fraction(sums[i] + static_cast<double>(rates[i]) * half);
            to[i] = static_cast<T>(sums[i]);
          }
          for (int64_t i = count; i < padded_; ++i) to[i] = 0;
        }
      });
      from += tile.count;
    }
    end(walk.last_sequence());
  }

  const Problem& p_;
  const int64_t padded_;
  const Scratch<T> now_, later_, decay_, angle_;
};

// The parts of a pass (medssm/matrix_scan.h) that read its operands. Every pass is strict: a token's own key and query meet in own_products.
template <class T, bool kBack> class Reader {
 public:
  using Form = medssm::Form<Decay::kWhole, kBack, true>;

  Reader(const Problem& p, const Steps<T>& steps) : p_(p), steps_(steps), rotations_(2 * kTileSteps * W) {}

  void begin_head(const Slot<T>&) const {}
  void begin_tile(const Slot<T>&, const Tile&) const {}
  void end_head(const Slot<T>&) const {}

 protected:
  static constexpr int W = kLanes<T>;

  // Elements of a row of q or k in a buffer.
  int64_t row() const { return round_up(padded_rows(p_.states), W); }

  // The turned q and k of all channels, each [step][row()].
  void turned_rows(const Slot<T>& slot, const Tile& tile, T* q, T* k) const { stage_turned(slot, tile, 0, p_.states, row(), q, k); }
  // Those of a block of lanes, each [step][lane].
  void turned_block(const Slot<T>& slot, const Tile& tile, int64_t block, T* q, T* k) const {
    stage_turned(slot, tile, block * W, slot.width(block), W, q, k);
  }

  // The rotation of step t of the block that turned_block was called with last. Only where it turns.
  bool turns(int64_t block) const { return block * W < 2 * p_.turning; }
  Rotation<T> rotation(int64_t t) const { return {load<T>(rotations_.data() + 2 * t * W), load<T>(rotations_.data() + (2 * t + 1) * W)}; }

  View<T> block_of(const HeadTokens& x, const Slot<T>& slot, const Tile& tile, int64_t block, T* buffer) const {
    return rows_of<T>(x, slot.batch, slot.head, block * W, slot.width(block), W, tile, buffer);
  }
  // Numbers of a tile's steps. A pass that goes through the walk backward reads them in reverse order.
  View<T> decay(const Slot<T>& slot, const Tile& tile) const { return in_time(steps_.decay(slot.batch, slot.head, first(tile))); }
  View<T> now(const Slot<T>& slot, const Tile& tile) const { return in_time(steps_.now(slot.batch, slot.head, first(tile))); }
  View<T> later(const Slot<T>& slot, const Tile& tile) const { return in_time(steps_.later(slot.batch, slot.head, first(tile))); }
  int64_t first(const Tile& tile) const { return kBack ? p_.length - 1 - tile.from : tile.from; }

  const Problem& p_;
  const Steps<T>& steps_;

 private:
  static View<T> in_time(const T* first) { return {first, kBack ? -1 : 1}; }

  void stage_turned(const Slot<T>& slot, const Tile& tile, int64_t from, int64_t count, int64_t padded, T* q, T* k) const {
    const int64_t group = slot.head / (p_.heads / p_.groups);
    stage_rows<T>(p_.C, slot.batch, group, from, count, padded, tile, q);
    stage_rows<T>(p_.B, slot.batch, group, from, count, padded, tile, k);
    const T *const angles = steps_.angle(slot.batch, slot.head, first(tile)), *const q_bias = bias(p_.C_bias, slot),
                   *const k_bias = bias(p_.B_bias, slot);
    const int64_t step = kBack ? -steps_.padded() : steps_.padded();
    for (int64_t e = 0; e < count; e += W) {
      const int width = static_cast<int>(least<int64_t>(W, count - e));
      const Vec<T> added_q = q_bias ? load_part<T>(q_bias + from + e, width) : Vec<T>{},
                   added_k = k_bias ? load_part<T>(k_bias + from + e, width) : Vec<T>{};
      const bool turning = from + e < 2 * p_.turning;
      if (!turning && !q_bias && !k_bias) continue;
      for (int64_t t = 0; t < tile.count; ++t) {
        T *const q_t = q + t * padded + e, *const k_t = k + t * padded + e;
        Vec<T> new_q = load<T>(q_t) + added_q, new_k = load<T>(k_t) + added_k;
        if (turning) {
          const Rotation<T> by = pairs_of<T>(load<T>(angles + t * step + (from + e) / 2));
          new_q = turned<T>(new_q, by), new_k = turned<T>(new_k, by);
          store(rotations_.data() + 2 * t * W, by.cos);
          store(rotations_.data() + (2 * t + 1) * W, by.sin);
        }
        store(q_t, new_q);
        store(k_t, new_k);
      }
    }
  }
  const T* bias(const void* of, const Slot<T>& slot) const { return of ? static_cast<const T*>(of) + slot.head * p_.states : nullptr; }

  const Scratch<T> rotations_;
};

// D of a head; zero without D.
template <class T> T skip_of(const Problem& p, const Slot<T>& slot) { return p.D ? static_cast<const T*>(p.D)[slot.head] : T(0); }

}  // namespace
}  // namespace medssm
