// Selective scan, forward, on a GPU.
//
// Three kernels over (batch, chunk of steps, tile of channels):
//   local  scans each chunk from a zero state, and sums its step sizes.
//   carry  computes the state at the start of each chunk. Over a whole chunk the state decays by one exponential of A times the sum of step sizes.
//   apply  scans each chunk again from that state, and writes the outputs.
// If batch and channels give enough blocks to fill a GPU, there is only one chunk, and `apply` alone is launched.
//
// Cost per token and channel in each of `local` and `apply`: one exponential per state, two more for softplus, four multiply-adds per state, and two
// values read from global memory.
#include "cuda.h"

namespace medssm {
namespace {

// kernels/selective_scan/cuda.py packs this struct.
struct Arguments {
  void* stream;
  Problem problem;
  Output out;                 // out.data may be null if the output is not needed
  void *state, *checkpoints;  // (b, d, n); (b, l / spacing, n, d): in the compute type; may be null
  int64_t checkpoint_batch, spacing, chunk;
  void *ends, *sums;  // (b, chunks, n, d), (b, chunks, d): scratch memory, used if there is more than one chunk
};

template <class S> size_t tile_bytes(const Partition& partition, int columns, int rows) {
  return sizeof(typename S::T) * S::kSteps * (columns * partition.channels + rows * partition.share * S::kStates) + 16;
}

template <class S> __global__ void __launch_bounds__(S::kThreads, S::kKeep ? 768 / S::kThreads : 1)
    local(Problem p, Partition partition, typename S::T* ends, typename S::T* sums) {
  using T = typename S::T;
  constexpr int kSteps = S::kSteps, kStates = S::kStates;
  const Slot<S> slot(p, partition, 0, partition.chunks - 1);  // the end of the last chunk is not needed
  T *s = shared_memory<T>() + 16 / sizeof(T), *su = s + kSteps * slot.channels, *B = su + kSteps * slot.channels;
  unsigned* reset_bits = shared_memory<unsigned>();
  Starts starts;
  T rates[kStates], h[kStates] = {}, span = 0;
  slot.load_rates(p, rates);
  bool reset_inside = false;
  Columns<S, kSteps, true, false> columns;
  columns.load(p, slot, slot.from, slot.end, nullptr);
#pragma unroll 1
  for (int from = slot.from; from < slot.end; from += kSteps) {
    if (threadIdx.x == 0) *reset_bits = starts.mask(p, from, least(kSteps, slot.end - from));
    columns.store(p, slot, nullptr, s, su, nullptr);
    stage_rows<S, kSteps>(p, slot, from, slot.end, B, nullptr);
    __syncthreads();
    if (from + kSteps < slot.end) columns.load(p, slot, from + kSteps, slot.end, nullptr);
    const unsigned resets = *reset_bits;
    T part = 0;
#pragma unroll 2
    for (int t = 0; t < kSteps; ++t) {
      if (resets >> t & 1) {
        reset_inside = true;
        cross<S, false>(p, slot, Crossing(p, from + t), p.initial, h);
      }
      const T step = s[t * slot.channels + slot.channel], input = su[t * slot.channels + slot.channel];
      const Pack<T, kStates> b = *reinterpret_cast<const Pack<T, kStates>*>(B + t * slot.states + slot.state);
      part += step;
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[i] = next_state<T>(exp2<T>(step * rates[i]), h[i], input, b.at[i]);
    }
    span += part;
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (slot.has(p, i)) ends[slot.in_chunks(p, partition.chunks, slot.chunk, i)] = h[i];
  if (slot.state == 0 && slot.channel < slot.live)
    sums[(slot.batch * partition.chunks + slot.chunk) * p.channels + slot.first + slot.channel] = reset_inside ? static_cast<T>(INFINITY) : span;
}

template <class S> __global__ void __launch_bounds__(S::kThreads, S::kShare ? 576 / S::kThreads : 1) apply(Arguments a, Partition partition) {
  using T = typename S::T;
  constexpr int kSteps = S::kSteps, kStates = S::kStates;
  const Problem& p = a.problem;
  const Slot<S> slot(p, partition, 0, partition.chunks);
  T *s = shared_memory<T>() + 16 / sizeof(T), *su = s + kSteps * slot.channels, *y = su + kSteps * slot.channels, *B = y + kSteps * slot.channels,
    *C = B + kSteps * slot.states;
  unsigned* reset_bits = shared_memory<unsigned>();
  Starts starts;
  T rates[kStates], h[kStates];
  slot.load_rates(p, rates);
  if (partition.chunks > 1) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      h[i] = slot.has(p, i) ? static_cast<const T*>(a.ends)[slot.in_chunks(p, partition.chunks, slot.chunk, i)] : T(0);
  } else {
    load_row<S>(p, slot, p.initial, first_row(p, slot.batch), h);
  }
  const int64_t column = slot.first + slot.column;
  const T D = p.D && slot.column < slot.live ? static_cast<const T*>(p.D)[column] : T(0);

  Columns<S, kSteps, true, false> columns;
  columns.load(p, slot, slot.from, slot.end, nullptr);
#pragma unroll 1
  for (int from = slot.from; from < slot.end; from += kSteps) {
    const int count = least(kSteps, slot.end - from);
    if (a.checkpoints && from % a.spacing == 0) {
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        if (slot.has(p, i))
          static_cast<T*>(a.checkpoints)[slot.batch * a.checkpoint_batch + (from / a.spacing * p.state + slot.state + i) * p.channels + slot.first +
                                         slot.channel] = h[i];
    }
    if (threadIdx.x == 0) *reset_bits = starts.mask(p, from, count);
    columns.store(p, slot, nullptr, s, su, nullptr);
    stage_rows<S, kSteps>(p, slot, from, slot.end, B, a.out.data ? C : nullptr);
    __syncthreads();
    if (from + kSteps < slot.end) columns.load(p, slot, from + kSteps, slot.end, nullptr);
    const unsigned resets = *reset_bits;
#pragma unroll 2
    for (int t = 0; t < kSteps; ++t) {
      if (resets >> t & 1) {
        const Crossing crossing(p, from + t);
        if (crossing.sequences()) store_row<S>(p, slot, a.state, crossing.before, h);
        cross<S, false>(p, slot, crossing, p.initial, h);
      }
      const T step = s[t * slot.channels + slot.channel], input = su[t * slot.channels + slot.channel];
      const Pack<T, kStates> b = *reinterpret_cast<const Pack<T, kStates>*>(B + t * slot.states + slot.state);
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[i] = next_state<T>(exp2<T>(step * rates[i]), h[i], input, b.at[i]);
      if (a.out.data) {
        const Pack<T, kStates> c = *reinterpret_cast<const Pack<T, kStates>*>(C + t * slot.states + slot.state);
        T sum = 0;
#pragma unroll
        for (int i = 0; i < kStates; ++i) sum = fma(c.at[i], h[i], sum);
        sum_across<1>(&sum, 1, slot.share);
        if (slot.state == 0) y[t * slot.channels + slot.channel] = sum;
      }
    }
    __syncthreads();
    if (a.out.data && slot.column < slot.live) {
#pragma unroll 1
      for (int t = slot.row; t < count; t += slot.rows) {
        const int64_t token = token_at(p, from + t), at = slot.batch * a.out.batch + token * a.out.token + column;
        T value = y[t * slot.channels + slot.column];
        if (p.D) value = fma(D, read_token<T>(p.u, slot.batch, token, column), value);
        if (a.out.earlier) value += static_cast<const T*>(a.out.earlier)[at];
        value *= static_cast<T>(p.scale);
        if (p.z.data) value *= silu<T>(read_token<T>(p.z, slot.batch, token, column));
        write<T>(a.out.data, a.out.type, at, value);
      }
    }
  }
  if (slot.chunk == partition.chunks - 1) store_row<S>(p, slot, a.state, last_row(p, slot.batch), h);
}

}  // namespace

MEDSSM_CUDA_EXPORT(selective_scan_forward, Arguments) {
  const Problem& p = a.problem;
  with_shape(p, [&](auto shape) {
    using S = decltype(shape);
    using T = typename S::T;
    const Partition partition = Partition::of(p, a.chunk, shape);
    if (partition.chunks > 1) {
      launch(local<S>, p.batch * (partition.chunks - 1) * partition.tiles, partition.threads(), tile_bytes<S>(partition, 2, 1), a.stream, p,
             partition, static_cast<T*>(a.ends), static_cast<T*>(a.sums));
      launch_carry<T, false>(p, partition.chunks, p.initial, a.ends, a.sums, a.stream);
    }
    launch(apply<S>, p.batch * partition.chunks * partition.tiles, partition.threads(), tile_bytes<S>(partition, 3, 2), a.stream, a, partition);
  });
}

}  // namespace medssm
