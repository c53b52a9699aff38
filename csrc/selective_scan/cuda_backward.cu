// Selective scan, backward, on a GPU.
//
// The same three kernels as forward, with the steps in reverse order:
//   local_adjoint  computes the adjoint of each chunk from a zero gradient at its end: g_{t-1} = e_t (g_t + dy_t C_t). This needs no state.
//   carry          computes the gradient at the end of each chunk, from the last chunk to the first.
//   apply_adjoint  walks each chunk from its end, in runs of 64 steps. Forward stored a checkpoint of the state at the start of each run.
// `apply_adjoint` first scans a run forward and keeps the state at the start of each tile of kBack steps. Then it takes the tiles from the last to
// the first. It computes each tile forward, with e and h of its steps in registers, and then backward. So a step costs three exponentials per state
// (forward: two), and no tensor with a state per step is written.
//
// dB and dC are sums over channels. They are added within a warp by shuffles (see sum_across in device.h), over the warps of a block through shared
// memory, and over tiles of channels by PyTorch. Sums over steps are added in registers, and over chunks by PyTorch. Every sum has a fixed order. No
// atomic operations are used.
#include <type_traits>

#include "cuda.h"

namespace medssm {
namespace {

// kernels/selective_scan/cuda.py packs this struct. Scratch memory is contiguous, in the compute type.
struct Arguments {
  void* stream;
  Problem problem;
  Tokens dout;
  const void *dstate, *checkpoints;  // dstate: (b, d, n), may be null; checkpoints: (b, l / 64, n, d)
  int64_t checkpoint_batch;
  Output du, ddelta, dz;  // ddelta: used if delta has one value per channel; dz: used if there is z
  void* dinitial;         // (b, d, n), in the compute type, may be null
  int64_t chunk;
  void *ends, *sums;  // (b, chunks, n, d), (b, chunks, d): scratch memory, used if there is more than one chunk
  void *dB, *dC;      // (tiles per group, b, l, g, n): sums over the channels of each tile
  void* dlow;         // (tiles, b, l, r), used if delta is low-rank
  void *dA, *dD, *dbias,
      *dproj;  // (b, chunks, n, d), (b, chunks, d), (b, chunks, d), (b, chunks, r, d): sums over each chunk; all except dA may be null
};

// -- the adjoint of each chunk from zero --------------------------------------------------------------------------------------------

template <class S> size_t local_bytes(const Partition& partition) {
  return sizeof(typename S::T) * S::kSteps * (2 * partition.channels + partition.share * S::kStates) + 16;
}

template <class S> __global__ void __launch_bounds__(S::kThreads, S::kKeep ? 768 / S::kThreads : 1) local_adjoint(Arguments a, Partition partition) {
  using T = typename S::T;
  constexpr int kSteps = S::kSteps, kStates = S::kStates;
  const Problem& p = a.problem;
  const Slot<S> slot(p, partition, 1, partition.chunks - 1);  // the first chunk's result is computed by `apply_adjoint`
  T *s = shared_memory<T>() + 16 / sizeof(T), *dy = s + kSteps * slot.channels, *C = dy + kSteps * slot.channels;
  unsigned* reset_bits = shared_memory<unsigned>();
  Starts starts;
  T rates[kStates], g[kStates] = {}, span = 0;
  slot.load_rates(p, rates);
  bool reset_inside = false;
  const int last = slot.from + (slot.end - 1 - slot.from) / kSteps * kSteps;
  Columns<S, kSteps, false, true> columns;
  columns.load(p, slot, last, slot.end, &a.dout);
#pragma unroll 1
  for (int from = last; from >= slot.from; from -= kSteps) {
    if (threadIdx.x == 0) *reset_bits = starts.mask(p, from, least(kSteps, slot.end - from));
    columns.store(p, slot, &a.dout, s, nullptr, dy);
    stage_rows<S, kSteps>(p, slot, from, slot.end, nullptr, C);
    __syncthreads();
    if (from > slot.from) columns.load(p, slot, from - kSteps, slot.end, &a.dout);
    const unsigned resets = *reset_bits;
    T part = 0;
#pragma unroll 2
    for (int t = kSteps - 1; t >= 0; --t) {
      const T step = s[t * slot.channels + slot.channel], gradient = dy[t * slot.channels + slot.channel];
      const Pack<T, kStates> c = *reinterpret_cast<const Pack<T, kStates>*>(C + t * slot.states + slot.state);
      part += step;
#pragma unroll
      for (int i = 0; i < kStates; ++i) g[i] = exp2<T>(step * rates[i]) * fma(gradient, c.at[i], g[i]);
      if (resets >> t & 1) {
        reset_inside = true;
        cross<S, true>(p, slot, Crossing(p, from + t), a.dstate, g);
      }
    }
    span += part;
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (slot.has(p, i)) static_cast<T*>(a.ends)[slot.in_chunks(p, partition.chunks, slot.chunk, i)] = g[i];
  if (slot.state == 0 && slot.channel < slot.live)
    static_cast<T*>(a.sums)[(slot.batch * partition.chunks + slot.chunk) * p.channels + slot.first + slot.channel] =
        reset_inside ? static_cast<T>(INFINITY) : span;
}

// -- the gradients ------------------------------------------------------------------------------------------------------------------

constexpr int kRun = static_cast<int>(kTile);  // steps between two checkpoints of the state

// The shared memory of a tile. along: y, along_A, along_B [step][channel]. rows: the sums of dB and dC of each warp [warp][step][state]. kept: the
// states at the start of each tile of a run, except the first and the last [tile][thread]. If these were in registers, a multiprocessor could run one
// block at a time instead of two.
template <class S> struct Tile {
  using T = typename S::T;
  using States = Pack<T, S::kStates>;
  static constexpr int kTiles = kRun / S::kBack;
  T *s, *su, *dy, *along, *B, *C, *rows;
  States* kept;
  unsigned* reset_bits;

  static size_t bytes(const Partition& partition) {
    const int states = partition.share * S::kStates, warps = partition.threads() / kWarp;
    const int kept = S::kKeep ? (kTiles - 2) * partition.threads() * S::kStates : 0;
    return sizeof(T) * (S::kBack * (6 * partition.channels + 2 * states + 2 * states * warps) + kept) + 16;
  }
  __device__ explicit Tile(const Slot<S>& slot) {
    const int column = S::kBack * slot.channels, row = S::kBack * slot.states;
    reset_bits = shared_memory<unsigned>();
    s = shared_memory<T>() + 16 / sizeof(T);
    su = s + column;
    dy = su + column;
    along = dy + column;
    B = along + 3 * column;
    C = B + row;
    rows = C + row;
    kept = reinterpret_cast<States*>(rows + 2 * row * (slot.channels * slot.share / kWarp));
  }
};

// Advances the state over a tile that is in shared memory and begins with step `from`.
template <class S>
__device__ void advance(const Problem& p, const Slot<S>& slot, const Tile<S>& tile, int from, const typename S::T* rates, typename S::T* h) {
  using T = typename S::T;
  const unsigned resets = *tile.reset_bits;
#pragma unroll 2
  for (int t = 0; t < S::kBack; ++t) {
    if (resets >> t & 1) cross<S, false>(p, slot, Crossing(p, from + t), p.initial, h);
    const T step = tile.s[t * slot.channels + slot.channel], input = tile.su[t * slot.channels + slot.channel];
    const Pack<T, S::kStates> b = *reinterpret_cast<const Pack<T, S::kStates>*>(tile.B + t * slot.states + slot.state);
#pragma unroll
    for (int i = 0; i < S::kStates; ++i) h[i] = next_state<T>(exp2<T>(step * rates[i]), h[i], input, b.at[i]);
  }
}

// Walks a tile in shared memory forward from the state h, then backward. Updates g from the end of the tile to its start, adds to dA, and writes
// tile.along and tile.rows.
template <class S> __device__ void backward_tile(const Arguments& a, const Slot<S>& slot, const Tile<S>& tile, int first_step,
                                                 const typename S::T* rates, const typename S::T* h, typename S::T* g, typename S::T* dA) {
  using T = typename S::T;
  constexpr int kBack = S::kBack, kStates = S::kStates;
  const Problem& p = a.problem;
  const bool with_y = p.z.data != nullptr;
  const unsigned resets = *tile.reset_bits;
  constexpr int kRecomputed = kBack / 2;                         // the first steps compute their exponentials twice: registers are too few
  T e[kBack - kRecomputed][kStates], after[kBack + 1][kStates];  // after[t]: the state before step t, if no segment begins there
#pragma unroll
  for (int t = 0; t < kBack; ++t) {
    const T step = tile.s[t * slot.channels + slot.channel], input = tile.su[t * slot.channels + slot.channel];
    const Pack<T, kStates> b = *reinterpret_cast<const Pack<T, kStates>*>(tile.B + t * slot.states + slot.state);
    const bool begins = resets >> t & 1;
    T entered[kStates] = {};
    if (begins) cross<S, false>(p, slot, Crossing(p, first_step + t), p.initial, entered);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      if (t == 0) after[0][i] = h[i];
      const T decay = exp2<T>(step * rates[i]);
      if (t >= kRecomputed) e[t - kRecomputed][i] = decay;
      after[t + 1][i] = next_state<T>(decay, begins ? entered[i] : after[t][i], input, b.at[i]);
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = kBack * slot.channels;
#pragma unroll
  for (int t = kBack - 1; t >= 0; --t) {
    const int at = t * slot.channels + slot.channel;
    const T step = tile.s[at], input = tile.su[at], gradient = tile.dy[at];
    const Pack<T, kStates> b = *reinterpret_cast<const Pack<T, kStates>*>(tile.B + t * slot.states + slot.state);
    const Pack<T, kStates> c = *reinterpret_cast<const Pack<T, kStates>*>(tile.C + t * slot.states + slot.state);
    const bool begins = resets >> t & 1;
    T entered[kStates] = {};
    if (begins) cross<S, false>(p, slot, Crossing(p, first_step + t), p.initial, entered);
    T terms[2 * kStates], along[4] = {};  // y, along_A, along_B, and one unused: sum_across needs a power of two
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      if (with_y) along[0] = fma(c.at[i], after[t + 1][i], along[0]);
      const T decay = t >= kRecomputed ? e[t - kRecomputed][i] : exp2<T>(step * rates[i]);
      const RowTerms<T> term = step_back<T>(decay, after[t + 1][i], begins ? entered[i] : after[t][i], step, input, gradient, rates[i], b.at[i],
                                            c.at[i], g[i], dA[i], along[1], along[2]);
      terms[i] = term.dB;
      terms[kStates + i] = term.dC;
    }
    if (begins) {
      const Crossing crossing(p, first_step + t);
      if (crossing.sequences()) store_row<S>(p, slot, a.dinitial, crossing.after, g);
      cross<S, true>(p, slot, crossing, a.dstate, g);
    }
    // Sum y, along_A and along_B over the threads of a channel. For each sum, one of the threads that hold it writes it.
    const int share = slot.share, first = sum_across<4>(along, 1, share);
    if ((lane & ((share / 4 > 1 ? share / 4 : 1) - 1)) == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < 4 / share || i == 0) {
          if (first + i < 3) tile.along[(first + i) * column + at] = along[i];
        }
    }
    // Sum dB and dC over the channels of a warp.
    constexpr int kTerms = 2 * kStates;
    const int channels = kWarp / share, from = sum_across<kTerms>(terms, share, kWarp);
    if ((lane / share & ((channels / kTerms > 1 ? channels / kTerms : 1) - 1)) == 0) {
      T* row = tile.rows + (warp * kBack + t) * 2 * slot.states;
#pragma unroll
      for (int i = 0; i < kTerms; ++i)
        if (i < kTerms / channels || i == 0) {
          const int term = from + i;
          row[term < kStates ? slot.state + term : slot.states + slot.state + term - kStates] = terms[i];
        }
    }
  }
}

// Writes du, ddelta and dz of a tile. Adds to dD and dbias, which are sums over the steps of this thread's channel. If delta is low-rank, the
// gradient of delta of every channel is stored in place of along_A.
template <class S> __device__ void write_tokens(const Arguments& a, const Slot<S>& slot, const Tile<S>& tile, int from, int count, typename S::T* dD,
                                                typename S::T* dbias) {
  using T = typename S::T;
  const Problem& p = a.problem;
  const int channel = slot.first + slot.column;
  const int column = S::kBack * slot.channels;
  const T D = p.D && slot.column < slot.live ? static_cast<const T*>(p.D)[channel] : T(0);
#pragma unroll 1
  for (int t = slot.row; t < S::kBack; t += slot.rows) {
    const int at = t * slot.channels + slot.column;
    T dstep = 0;
    if (t < count && slot.column < slot.live) {
      const int64_t token = token_at(p, from + t);
      const T u = read_token<T>(p.u, slot.batch, token, channel), dy = tile.dy[at];
      const T along_A = tile.along[column + at], along_B = tile.along[2 * column + at];
      const Softplus<T> step =
          step_size<T>(p, raw_step<T>(p, slot.batch, token, channel, p.rank ? T(0) : read_token<T>(p.delta, slot.batch, token, channel)));
      dstep = fma(u, along_B, static_cast<T>(kLn2) * along_A) * step.slope;
      *dbias += dstep;
      *dD = fma(dy, u, *dD);
      T du = fma(step.value, along_B, D * dy);
      const int64_t du_at = slot.batch * a.du.batch + token * a.du.token + channel;
      if (a.du.earlier) du += static_cast<const T*>(a.du.earlier)[du_at];
      write<T>(a.du.data, a.du.type, du_at, du);
      if (a.ddelta.data) write<T>(a.ddelta.data, a.ddelta.type, slot.batch * a.ddelta.batch + token * a.ddelta.token + channel, dstep);
      if (p.z.data) {
        const int64_t dz_at = slot.batch * a.dz.batch + token * a.dz.token + channel;
        T dz = static_cast<T>(p.scale) * read_token<T>(a.dout, slot.batch, token, channel) * fma(D, u, tile.along[at]) *
               silu_slope<T>(read_token<T>(p.z, slot.batch, token, channel));
        if (a.dz.earlier) dz += static_cast<const T*>(a.dz.earlier)[dz_at];
        write<T>(a.dz.data, a.dz.type, dz_at, dz);
      }
    }
    if (p.rank) tile.along[column + at] = dstep;
  }
}

// Writes the rows of dB and dC of a tile: the sums of the warps, added in a fixed order.
template <class S> __device__ void write_rows(const Arguments& a, const Slot<S>& slot, const Tile<S>& tile, int from, int count) {
  using T = typename S::T;
  const Problem& p = a.problem;
  const int threads = slot.channels * slot.share, warps = threads / kWarp, row = 2 * slot.states;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * row; i += threads) {
    const int t = i / row, term = i % row, state = term % slot.states;
    if (state >= p.state) continue;
    T sum = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) sum += tile.rows[(w * S::kBack + t) * row + term];
    const int64_t token = token_at(p, from + t);
    T* to = static_cast<T*>(term < slot.states ? a.dB : a.dC);
    to[(((slot.within * p.batch + slot.batch) * p.length + token) * p.groups + slot.group) * p.state + state] = sum;
  }
}

// Computes a tile's share of the gradients of the low-rank delta and of its projection.
template <class S> __device__ void write_low_rank(const Arguments& a, const Slot<S>& slot, const Tile<S>& tile, int from, int count, bool begin) {
  using T = typename S::T;
  const Problem& p = a.problem;
  const int threads = slot.channels * slot.share, rank = static_cast<int>(p.rank);
  const T* dsteps = tile.along + S::kBack * slot.channels;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * rank; i += threads) {
    const int t = i / rank, r = i % rank;
    const T* weights = static_cast<const T*>(p.proj) + r * p.channels + slot.first;
    T sum = 0;
#pragma unroll 1
    for (int c = 0; c < slot.live; ++c) sum = fma(dsteps[t * slot.channels + c], weights[c], sum);
    static_cast<T*>(a.dlow)[((slot.tile * p.batch + slot.batch) * p.length + token_at(p, from + t)) * rank + r] = sum;
  }
  T* dproj = static_cast<T*>(a.dproj) + (slot.batch * ceil_div(p.length, a.chunk) + slot.chunk) * rank * p.channels + slot.first;
  for (int i = static_cast<int>(threadIdx.x); i < rank * slot.channels; i += threads) {
    const int r = i / slot.channels, c = i % slot.channels;
    if (c >= slot.live) continue;
    T sum = begin ? T(0) : dproj[r * p.channels + c];  // the same thread wrote it for the tile before
#pragma unroll 1
    for (int t = 0; t < count; ++t)
      sum = fma(dsteps[t * slot.channels + c],
                read<T>(p.delta.data, p.delta.type, slot.batch * p.delta.batch + token_at(p, from + t) * p.delta.token + r * p.delta.channel), sum);
    dproj[r * p.channels + c] = sum;
  }
}

template <class S> __global__ void __launch_bounds__(S::kThreads, S::kShare == 2 ? 2
                                                                  : S::kShare    ? 384 / S::kThreads
                                                                                 : 1) apply_adjoint(Arguments a, Partition partition) {
  using T = typename S::T;
  constexpr int kBack = S::kBack, kStates = S::kStates;
  const Problem& p = a.problem;
  const Slot<S> slot(p, partition, 0, partition.chunks);
  const Tile<S> tile(slot);
  Starts starts;
  T rates[kStates], g[kStates], dA[kStates] = {}, dD = 0, dbias = 0;
  slot.load_rates(p, rates);
  if (partition.chunks > 1) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      g[i] = slot.has(p, i) ? static_cast<const T*>(a.ends)[slot.in_chunks(p, partition.chunks, slot.chunk, i)] : T(0);
  } else {
    load_row<S>(p, slot, a.dstate, last_row(p, slot.batch), g);
  }

  const auto stage = [&](int from, int end, auto gradients) {
    constexpr bool kGradients = decltype(gradients)::value;
    if (threadIdx.x == 0) *tile.reset_bits = starts.mask(p, from, least(kBack, end - from));
    constexpr int kRows = S::template kRows<kBack>, kAtOnce = S::kKeep ? least(kRows, 2) : 1;
#pragma unroll 1
    for (int row = 0; row < kRows; row += kAtOnce) {
      Columns<S, kBack, true, kGradients, kAtOnce> columns;
      columns.load(p, slot, from, end, &a.dout, row);
      columns.store(p, slot, &a.dout, tile.s, tile.su, kGradients ? tile.dy : nullptr);
    }
    stage_rows<S, kBack>(p, slot, from, end, tile.B, kGradients ? tile.C : nullptr);
    __syncthreads();
  };

  for (int run = (slot.end - 1) / kRun * kRun; run >= slot.from; run -= kRun) {
    const int end = least(slot.end, run + kRun);
    const int tiles = static_cast<int>(ceil_div(end - run, kBack));
    T h[kStates];
    const auto begin_run = [&] {
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        h[i] = slot.has(p, i) ? static_cast<const T*>(a.checkpoints)[slot.batch * a.checkpoint_batch +
                                                                     (run / kRun * p.state + slot.state + i) * p.channels + slot.first + slot.channel]
                              : T(0);
    };
    typename Tile<S>::States* const kept = tile.kept + threadIdx.x;  // of this thread
    const auto advance_to = [&](int last) {                          // sets h to the state at the start of tile `last`
      begin_run();
#pragma unroll 1
      for (int j = 0; j < last; ++j) {
        if (S::kKeep && j > 0) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) kept[(j - 1) * slot.channels * slot.share].at[i] = h[i];
        }
        stage(run + j * kBack, end, std::false_type{});
        advance<S>(p, slot, tile, run + j * kBack, rates, h);
        __syncthreads();
      }
    };
    if (S::kKeep) advance_to(tiles - 1);
#pragma unroll 1
    for (int j = tiles - 1; j >= 0; --j) {
      if (!S::kKeep) {
        advance_to(j);
      } else if (j == 0) {
        begin_run();
      } else if (j < tiles - 1) {
#pragma unroll
        for (int i = 0; i < kStates; ++i) h[i] = kept[(j - 1) * slot.channels * slot.share].at[i];
      }
      const int from = run + j * kBack, count = least(kBack, end - from);
      stage(from, end, std::true_type{});
      backward_tile<S>(a, slot, tile, from, rates, h, g, dA);
      __syncthreads();
      write_tokens<S>(a, slot, tile, from, count, &dD, &dbias);
      write_rows<S>(a, slot, tile, from, count);
      if (p.rank) {
        __syncthreads();
        write_low_rank<S>(a, slot, tile, from, count, from + kBack >= slot.end);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (slot.has(p, i)) { static_cast<T*>(a.dA)[slot.in_chunks(p, partition.chunks, slot.chunk, i)] = dA[i]; }
  if (slot.chunk == 0) store_row<S>(p, slot, a.dinitial, first_row(p, slot.batch), g);
  if (a.dD == nullptr && a.dbias == nullptr) return;
  // `rows` threads each have a part of the sum of one channel: add the parts through shared memory.
  T* parts = tile.s;
  __syncthreads();
  parts[(0 * slot.rows + slot.row) * slot.channels + slot.column] = dD;
  parts[(1 * slot.rows + slot.row) * slot.channels + slot.column] = dbias;
  __syncthreads();
  if (slot.row == 0 && slot.column < slot.live) {
    T* const to[2] = {static_cast<T*>(a.dD), static_cast<T*>(a.dbias)};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (!to[which]) continue;
      T sum = 0;
      for (int row = 0; row < slot.rows; ++row) sum += parts[(which * slot.rows + row) * slot.channels + slot.column];
      to[which][(slot.batch * partition.chunks + slot.chunk) * p.channels + slot.first + slot.column] = sum;
    }
  }
}

}  // namespace

MEDSSM_CUDA_EXPORT(selective_scan_backward, Arguments) {
  const Problem& p = a.problem;
  with_shape(p, [&](auto shape) {
    using S = decltype(shape);
    const Partition partition = Partition::of(p, a.chunk, shape);
    if (partition.chunks > 1) {
      launch(local_adjoint<S>, p.batch * (partition.chunks - 1) * partition.tiles, partition.threads(), local_bytes<S>(partition), a.stream, a,
             partition);
      launch_carry<typename S::T, true>(p, partition.chunks, a.dstate, a.ends, a.sums, a.stream);
    }
    launch(apply_adjoint<S>, p.batch * partition.chunks * partition.tiles, partition.threads(), Tile<S>::bytes(partition), a.stream, a, partition);
  });
}

}  // namespace medssm
