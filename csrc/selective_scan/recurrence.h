// The recurrence of one block over one tile:  h_t = 2^(s_t rate) h_{t-1} + s_t u_t B_t,  y_t = C_t . h_t.
//
// Each lane of a vector has one channel. The states of a unit (see Unit) are kept in registers. With AVX-512 the multiplier limits the speed: it
// executes seven operations per state and step, four for the exponential and three for the recurrence and y. All other operations run in parallel
// with these on other execution units.
#pragma once
#include "medssm/activation.h"
#include "medssm/step.h"
#include "staging.h"

namespace medssm {
namespace {

// The data of one block that a thread keeps during the walk: its parameters and its state, with one channel per lane.
template <class T> struct Channels {
  Block block;
  T *rates, *state, *proj;       // A log2(e) [n][lane], h [n][lane], delta_proj [r][lane]
  Vec<T> D, bias, largest_rate;  // largest_rate: the largest |rate| over the states

  static int64_t size(const Problem& p) { return (2 * p.state + p.rank) * kLanes<T>; }

  void load_parameters(const Problem& p, const Block& at, T* memory) {
    constexpr int W = kLanes<T>;
    block = at;
    rates = memory;
    state = rates + p.state * W;
    proj = state + p.state * W;
    load_weights<T>(p.A, block.channel, block.lanes, p.state, rates);
    Largest<T> magnitude;
    for (int64_t n = 0; n < p.state; ++n) {
      const Vec<T> rate = load<T>(rates + n * W) * static_cast<T>(kLog2E);
      magnitude.add(rate);
      store(rates + n * W, rate);
    }
    largest_rate = magnitude.value();
    if (p.rank) load_weights<T>(p.proj, block.channel, block.lanes, p.rank, proj);
    D = p.D ? load_part<T>(static_cast<const T*>(p.D) + block.channel, block.lanes) : Vec<T>{};
    bias = p.bias ? load_part<T>(static_cast<const T*>(p.bias) + block.channel, block.lanes) : Vec<T>{};
  }

  // The row of the block's first channel in states (b, d, n) (see medssm/walk.h).
  int64_t state_row(const Problem& p, int64_t sequence) const { return (block.batch + sequence) * p.channels + block.channel; }
  // Reads `to` [n][lane] from states (b, d, n). Zeros if `from` is null.
  void load_state(const Problem& p, const void* from, int64_t sequence, T* to) const {
    if (from)
      load_weights<T>(from, state_row(p, sequence), block.lanes, p.state, to);
    else
      std::memset(to, 0, sizeof(T) * kLanes<T> * p.state);
  }
  // The state before the first step of a tile that begins a segment.
  void begin_segment(const Problem& p, const Tile& tile) const { load_state(p, tile.begins_sequence() ? p.initial : nullptr, tile.sequence, state); }
};

// The rows of a tile that all blocks of a group read.
template <class T> struct Shared {
  View<T> B, C, low;
};
// Points into the tensors where possible. Otherwise the rows are copied to the buffers of the same name.
template <class T, class Buffers> Shared<T> shared_rows(const Problem& p, const Block& block, const Tile& tile, const Buffers& buffers) {
  Shared<T> rows{
      row_view<T>(p.B, block.batch, block.group, p.state, tile, buffers.B), row_view<T>(p.C, block.batch, block.group, p.state, tile, buffers.C), {}};
  const Tokens& low = p.delta;
  if (p.rank) rows.low = row_view<T>({low.data, low.type, low.batch, low.token, 0, low.channel}, block.batch, 0, p.rank, tile, buffers.low);
  return rows;
}

// The inputs of a tile: one vector per step.
template <class T> struct Inputs {
  View<T> u;
  T *s, *su, *slope;  // the step size s, s u, and ds / d(delta + bias); slope may be null if it is not needed
  bool bounded;       // every product s rate is in the range of exp2_bounded
};

template <class T, bool kSoftplus, bool kSlope> void step_sizes(const Channels<T>& channels, View<T> delta, int64_t count, Inputs<T>* in) {
  constexpr int W = kLanes<T>;
  const Vec<T> bias = channels.bias;
  const View<T> u = in->u;
  T *const to_s = in->s, *const to_su = in->su, *const to_slope = in->slope;
  Largest<T> largest;
  if constexpr (kSoftplus) {
    // First all exponentials, then all logarithms. In a single loop each step would be one long chain of dependent operations, and the processor
    // could overlap too few steps.
    for (int64_t t = 0; t < count; ++t) store(to_su + t * W, exp_minus_abs<T>(load<T>(delta[t]) + bias));
    for (int64_t t = 0; t < count; ++t) {
      const Softplus<T> both = softplus_of<T>(load<T>(delta[t]) + bias, load<T>(to_su + t * W));
      largest.add_positive(both.value);
      if constexpr (kSlope) store(to_slope + t * W, both.slope);
      store(to_s + t * W, both.value);
      store(to_su + t * W, both.value * load<T>(u[t]));
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      const Vec<T> s = load<T>(delta[t]) + bias;
      largest.add(s);
      if constexpr (kSlope) store(to_slope + t * W, splat<T>(1));
      store(to_s + t * W, s);
      store(to_su + t * W, s * load<T>(u[t]));
    }
  }
  in->bounded = all_at_most<T>(largest.value() * channels.largest_rate, kExp2Bound<T>);
}

// Computes s, s u and, if in->slope is not null, the slope for each step of a tile. low: the rows of the low-rank delta. buffer: for a copy of u.
template <class T> void prepare(const Problem& p, const Channels<T>& channels, const Tile& tile, const View<T>& low, T* buffer, Inputs<T>* in) {
  constexpr int W = kLanes<T>;
  in->u = block_view<T>(p.u, channels.block, tile, buffer);
  View<T> delta{in->s, W};
  if (p.rank) {
    for (int64_t t = 0; t < tile.count; ++t) {
      Vec<T> sum{};
      for (int64_t r = 0; r < p.rank; ++r) sum = fma(splat(low[t][r]), load<T>(channels.proj + r * W), sum);
      store(in->s + t * W, sum);
    }
  } else {
    delta = block_view<T>(p.delta, channels.block, tile, in->s);
  }
  if (in->slope)
    (p.softplus ? step_sizes<T, true, true> : step_sizes<T, false, true>)(channels, delta, tile.count, in);
  else
    (p.softplus ? step_sizes<T, true, false> : step_sizes<T, false, false>)(channels, delta, tile.count, in);
}

// Consecutive states n, n + 1, … of one half; or, if both halves are computed together, also half + n, half + n + 1, … of the second half.
template <class T> struct Unit {
  const T *rates, *s, *su;  // rates: of states n, n + 1, …
  View<T> B, C;             // of states n, n + 1, …
  int64_t count, half;
  T *state, *y[2];           // state: of states n, n + 1, …; y: one per half
  bool first[2], join;       // first: set y instead of adding to it; join: store the sum of both halves in y[0]
  const Prefetch* prefetch;  // requested during the first unit; may be null
};

template <class T, bool kBounded> MEDSSM_INLINE Vec<T> power(Vec<T> x) {
  if constexpr (kBounded)
    return exp2_bounded<T>(x);
  else
    return exp2<T>(x);
}

template <class T, int kStates, bool kBoth, bool kBounded> __attribute__((noinline)) void advance(const Unit<T>& unit) {
  constexpr int W = kLanes<T>, kHalves = kBoth ? 2 : 1;
  Vec<T> h[kHalves][kStates];
#pragma GCC unroll 2
  for (int k = 0; k < kHalves; ++k)
#pragma GCC unroll 8
    for (int n = 0; n < kStates; ++n) h[k][n] = load<T>(unit.state + (k * unit.half + n) * W);
  const T *rates[2] = {unit.rates, unit.rates + unit.half * W}, *B = unit.B.rows, *C = unit.C.rows;
  for (int64_t t = 0; t < unit.count; ++t, B += unit.B.step, C += unit.C.step) {
    const Vec<T> s = load<T>(unit.s + t * W), su = load<T>(unit.su + t * W);
    if (unit.prefetch) unit.prefetch->request(t);
    Vec<T> y[2];
#pragma GCC unroll 2
    for (int k = 0; k < kHalves; ++k) {
      y[k] = unit.first[k] ? Vec<T>{} : load<T>(unit.y[k] + t * W);
#pragma GCC unroll 8
      for (int n = 0; n < kStates; ++n) {
        const Vec<T> e = power<T, kBounded>(s * load<T>(rates[k] + n * W));
        h[k][n] = next_state<T>(e, h[k][n], su, B[k * unit.half + n]);
        y[k] = fma(splat(C[k * unit.half + n]), h[k][n], y[k]);
      }
    }
    if (kBoth && unit.join) {
      store(unit.y[0] + t * W, y[0] + y[1]);
    } else {
#pragma GCC unroll 2
      for (int k = 0; k < kHalves; ++k) store(unit.y[k] + t * W, y[k]);
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < kHalves; ++k)
#pragma GCC unroll 8
    for (int n = 0; n < kStates; ++n) store(unit.state + (k * unit.half + n) * W, h[k][n]);
}

// Number of states per half that fit into the registers together with the constants.
constexpr int kUnit = kVectorBytes == 64 ? 8 : 4;

// Advances `states` states of one half, or of each half: in units of kStates, and the remaining states in smaller units.
template <class T, int kStates, bool kBoth, bool kBounded> void advance_all(Unit<T> unit, int64_t states) {
  const bool join = unit.join;
  for (; states >= kStates; states -= kStates) {
    unit.join = join && states == kStates;
    advance<T, kStates, kBoth, kBounded>(unit);
    unit.rates += kStates * kLanes<T>;
    unit.state += kStates * kLanes<T>;
    unit.B.rows += kStates;
    unit.C.rows += kStates;
    unit.first[0] = unit.first[1] = false;
    unit.prefetch = nullptr;
  }
  unit.join = join;
  if constexpr (kStates > 1)
    if (states) advance_all<T, kStates / 2, kBoth, kBounded>(unit, states);
}

template <class T, bool kBoth> void advance_any(const Unit<T>& unit, int64_t states, bool bounded) {
  constexpr int kRare = 2;  // steps outside the range of exp2_bounded are rare, so a small unit is fast enough for them
  if (bounded)
    advance_all<T, kUnit, kBoth, true>(unit, states);
  else
    advance_all<T, kRare, kBoth, false>(unit, states);
}

// Advances half 0 or half 1 of the states over a tile. Sets y to this half's sum and updates the state.
template <class T> void advance_half(const Problem& p, const Channels<T>& channels, const Inputs<T>& in, View<T> B, View<T> C, int64_t count,
                                     int half, T* y, const Prefetch* prefetch) {
  const int64_t from = half ? first_half(p.state) : 0, states = half ? p.state - from : first_half(p.state);
  advance_any<T, false>({channels.rates + from * kLanes<T>,
                         in.s,
                         in.su,
                         {B.rows + from, B.step},
                         {C.rows + from, C.step},
                         count,
                         0,
                         channels.state + from * kLanes<T>,
                         {y, nullptr},
                         {true, true},
                         false,
                         prefetch},
                        states, in.bounded);
}

// Advances all states over a tile. Sets y[0] to the sum of both halves and updates the state. y[1] is scratch memory.
template <class T> void advance_both(const Problem& p, const Channels<T>& channels, const Inputs<T>& in, View<T> B, View<T> C, int64_t count,
                                     T* const* y, const Prefetch* prefetch) {
  const int64_t half = first_half(p.state), paired = p.state - half;
  Unit<T> unit{channels.rates, in.s, in.su, B, C, count, half, channels.state, {y[0], y[1]}, {true, true}, true, prefetch};
  if (half > paired) {
    // If the number of states is odd, the first half has one more state. It is computed first, alone.
    advance_any<T, false>(unit, 1, in.bounded);
    unit.rates += kLanes<T>;
    unit.state += kLanes<T>;
    unit.B.rows += 1;
    unit.C.rows += 1;
    unit.half = paired;
    unit.first[0] = false;
    unit.prefetch = nullptr;
  }
  if (paired) advance_any<T, true>(unit, paired, in.bounded);
}

}  // namespace
}  // namespace medssm
