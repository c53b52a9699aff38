// Shared by the scan's GPU kernels: how the work is divided, and tiles of tokens in shared memory.
//
// The states of a channel are in the registers of `share` neighbouring threads, kStates in each. So a warp has 32 / share channels. A block has up to
// 64 channels (up to 48 with 16 states: 96, 192 and 384 channels are multiples of 48). A block walks through its steps one after the other. With one
// block per 64 channels and a small batch, most of a GPU would be idle. So the steps are divided into chunks that run in parallel: a first kernel
// scans each chunk from a zero state, a second one computes the state at the start of each chunk, and a third one scans each chunk again from that
// state (see cuda_forward.cu).
//
// A tile is kSteps steps of the walk. To read it, neighbouring threads read neighbouring channels, so loads fill whole memory sectors in any order of
// tokens and for most strides. The step size is computed once per token and channel. Then every thread reads s and s u of its channel, and B and C of
// its states, from shared memory. Steps after the end and channels after the last one are zeros there: e^0 = 1 leaves their state unchanged, and
// their results are not used.
//
// Packed sequences: where a sequence begins, its initial state takes the place of the state, and the state before is the final state of the sequence
// before it. Backward, the gradients of these states likewise. Such steps are few, so what belongs to them is looked up there.
#pragma once
#include "arguments.h"
#include "medssm/activation.h"
#include "medssm/step.h"

namespace medssm {
namespace {

// The compile-time parameters for a compute type and a number of states. kShare: threads per channel, or 0 if known only at the launch. kSteps: steps
// of a tile in the forward pass. kBack: steps of a tile in the backward pass. kKeep: the backward pass keeps the states at the start of each tile
// between two checkpoints; if false, it recomputes them from the checkpoint for each tile.
template <class T_, int kStates_, int kShare_, int kThreads_, int kSteps_, int kBack_, bool kKeep_> struct Shape {
  using T = T_;
  static constexpr int kStates = kStates_, kShare = kShare_, kThreads = kThreads_, kSteps = kSteps_, kBack = kBack_;
  static constexpr bool kKeep = kKeep_;
  template <int kOf> static constexpr int kRows = kOf / (kShare ? kShare : 1);  // steps of a tile of kOf steps that one thread loads
};

// Calls body(Shape) with the shape for a problem.
template <class Body> void with_shape(const Problem& p, Body&& body) {
  if (p.wide)
    body(Shape<double, 8, 0, 64, 4, 1, false>{});
  else if (p.state == 1)
    body(Shape<float, 1, 1, 64, 8, 8, true>{});
  else if (p.state > 4 && p.state <= 8)
    body(Shape<float, 4, 2, 128, 8, 8, true>{});
  else if (p.state > 8 && p.state <= 16)
    body(Shape<float, 4, 4, 192, 16, 8, true>{});
  else if (p.state <= 128)
    body(Shape<float, 4, 0, 64, 8, 8, true>{});
  else
    body(Shape<float, 8, 0, 128, 8, 4, false>{});
}

// How a problem is divided into blocks. kernels/selective_scan/cuda.py computes `per_group` and `tiles` in the same way to allocate memory.
struct Partition {
  int share, channels;          // threads per channel; channels per block
  int width, per_group, tiles;  // channels per group; tiles of channels per group, and in total
  int chunk, chunks;            // steps per chunk, number of chunks

  template <class S> static Partition of(const Problem& p, int64_t chunk, S) {
    Partition partition;
    partition.share = 1;
    while (partition.share * S::kStates < p.state) partition.share *= 2;
    partition.width = static_cast<int>(p.channels / p.groups);
    partition.per_group = static_cast<int>(ceil_div(partition.width, least(64, S::kThreads / partition.share)));
    partition.channels = static_cast<int>(round_up(ceil_div(partition.width, partition.per_group), most(1, kWarp / partition.share)));  // whole warps
    partition.tiles = partition.per_group * static_cast<int>(p.groups);
    partition.chunk = static_cast<int>(chunk);
    partition.chunks = static_cast<int>(ceil_div(p.length, chunk));
    return partition;
  }
  int threads() const { return channels * share; }
};

// The part of the problem that a block and each of its threads compute.
template <class S> struct Slot {
  using T = typename S::T;
  int share, channels, states;     // share, channels: as in Partition; states: per channel, padding included
  int batch, chunk, from, end;     // the chunk has steps [from, end)
  int tile, within, group, first;  // index of the tile of channels in total, and in its group; the group; the first channel
  int live;                        // number of channels of the tile that exist
  int channel, state;              // of this thread: its channel in the tile, its first state
  int column, row,
      rows;  // of this thread when threads are assigned to tokens: its channel in the tile, its first step, the distance to its next step

  // A block per chunk and tile of channels, for chunks first_chunk … first_chunk + chunk_count - 1. Neighbouring blocks have the same chunk: they
  // read the same B and C.
  __device__ Slot(const Problem& p, const Partition& partition, int first_chunk, int chunk_count) {
    share = S::kShare ? S::kShare : partition.share;
    channels = partition.channels;
    states = share * S::kStates;
    const int at = static_cast<int>(blockIdx.x) / partition.tiles;
    tile = static_cast<int>(blockIdx.x) % partition.tiles;
    batch = at / chunk_count;
    chunk = first_chunk + at % chunk_count;
    from = chunk * partition.chunk;
    end = static_cast<int>(least<int64_t>(p.length, int64_t(from) + partition.chunk));
    group = tile / partition.per_group;
    within = tile % partition.per_group;
    first = group * partition.width + within * channels;
    live = least(channels, partition.width - within * channels);
    channel = static_cast<int>(threadIdx.x) / share;
    state = static_cast<int>(threadIdx.x) % share * S::kStates;
    column = static_cast<int>(threadIdx.x) % channels;
    row = static_cast<int>(threadIdx.x) / channels;
    rows = share;
  }
  __device__ bool has(const Problem& p, int i) const { return channel < live && state + i < p.state; }
  // The offset of this thread's state i in a tensor (b, chunks, n, d), and in a tensor (b, d, n).
  __device__ int64_t in_chunks(const Problem& p, int64_t chunks, int64_t chunk, int i) const {
    return ((batch * chunks + chunk) * p.state + state + i) * p.channels + first + channel;
  }
  __device__ int64_t in_state(const Problem& p, int64_t row, int i) const { return (row * p.channels + first + channel) * p.state + state + i; }

  __device__ void load_rates(const Problem& p, T* rates) const {
#pragma unroll
    for (int i = 0; i < S::kStates; ++i)
      rates[i] = has(p, i) ? static_cast<const T*>(p.A)[(first + channel) * p.state + state + i] * static_cast<T>(kLog2E) : T(0);
  }
};

MEDSSM_INLINE int64_t token_at(const Problem& p, int step) {
  const int64_t at = p.reverse ? p.length - 1 - step : step;
  return p.index ? p.index[at] : at;
}

// The i-th step at which a segment begins, in the direction of the walk.
MEDSSM_INLINE int64_t start_at(const Problem& p, int64_t i) { return p.reverse ? p.length - p.starts[p.start_count - 1 - i] : p.starts[i]; }

// The first of the steps at which a segment begins that is not before `step`.
MEDSSM_INLINE int64_t first_start(const Problem& p, int64_t step) {
  int64_t low = 0, high = p.start_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (start_at(p, middle) < step)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The rows of a tensor of states that the walk begins and ends with.
MEDSSM_INLINE int64_t first_row(const Problem& p, int64_t batch) { return p.sequences ? p.sequences[p.reverse ? p.start_count - 1 : 0] : batch; }
MEDSSM_INLINE int64_t last_row(const Problem& p, int64_t batch) { return p.sequences ? p.sequences[p.reverse ? 0 : p.start_count - 1] : batch; }

// The sequences of the segment that ends before a step and of the one that begins with it.
struct Crossing {
  int64_t before, after;
  __device__ Crossing(const Problem& p, int step) : before(0), after(0) {
    if (!p.sequences) return;
    const int64_t i = first_start(p, step), last = p.start_count - 1;
    before = p.sequences[p.reverse ? last - i : most<int64_t>(i - 1, 0)];
    after = p.sequences[p.reverse ? most<int64_t>(last - 1 - i, 0) : i];
  }
  __device__ bool sequences() const { return before != after; }
};

// A thread's states of a row; zeros where there are none.
template <class S> __device__ void load_row(const Problem& p, const Slot<S>& slot, const void* states, int64_t row, typename S::T* h) {
  using T = typename S::T;
#pragma unroll
  for (int i = 0; i < S::kStates; ++i) h[i] = states && slot.has(p, i) ? static_cast<const T*>(states)[slot.in_state(p, row, i)] : T(0);
}
template <class S> __device__ void store_row(const Problem& p, const Slot<S>& slot, void* states, int64_t row, const typename S::T* h) {
  if (!states) return;
#pragma unroll
  for (int i = 0; i < S::kStates; ++i)
    if (slot.has(p, i)) static_cast<typename S::T*>(states)[slot.in_state(p, row, i)] = h[i];
}

// What takes the place of a state where a segment begins: `states` of the sequence that begins, or else zero; backward, of the one that ends.
template <class S, bool kBack>
__device__ void cross(const Problem& p, const Slot<S>& slot, const Crossing& crossing, const void* states, typename S::T* h) {
  load_row<S>(p, slot, crossing.sequences() ? states : nullptr, kBack ? crossing.before : crossing.after, h);
}

// The steps at which a segment begins. Used by one thread, which walks forward or backward.
class Starts {
 public:
  // Bit t of the result is 1 if a segment begins at step from + t. Step 0 does not count: an initial state comes before it.
  __device__ unsigned mask(const Problem& p, int from, int count) {
    if (p.start_count == 0) return 0;
    if (next_ < 0) next_ = first_start(p, from);
    while (next_ > 0 && start_at(p, next_ - 1) >= from) --next_;
    while (next_ < p.start_count && start_at(p, next_) < from) ++next_;
    unsigned bits = 0;
    for (int64_t i = next_; i < p.start_count && start_at(p, i) < from + count; ++i)
      if (start_at(p, i) > 0) bits |= 1u << (start_at(p, i) - from);
    return bits;
  }

 private:
  int64_t next_ = -1;
};

// Several numbers that one instruction loads.
template <class T, int kCount> struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T at[kCount];
};

// The argument of softplus at one token and channel: delta + bias. `delta` is the tensor's value; it is not used if delta is low-rank.
template <class T> MEDSSM_INLINE T raw_step(const Problem& p, int batch, int64_t token, int channel, T delta) {
  T x = p.bias ? static_cast<const T*>(p.bias)[channel] : T(0);
  if (p.rank == 0) return x + delta;
  const int64_t at = batch * p.delta.batch + token * p.delta.token;
#pragma unroll 1
  for (int r = 0; r < p.rank; ++r)  // delta_proj has the layout (r, d) here, so that neighbouring threads read neighbouring values
    x = fma(read<T>(p.delta.data, p.delta.type, at + r * p.delta.channel), static_cast<const T*>(p.proj)[r * p.channels + channel], x);
  return x;
}
template <class T> MEDSSM_INLINE Softplus<T> step_size(const Problem& p, T raw) {
  if (!p.softplus) return {raw, T(1)};
  return softplus_of<T>(raw, exp_minus_abs<T>(raw));
}
template <class T> MEDSSM_INLINE T read_token(const Tokens& x, int64_t batch, int64_t token, int64_t channel) {
  return read<T>(x.data, x.type, batch * x.batch + token * x.token + channel * x.channel);
}

// One thread's share of a tile that is copied to shared memory: one channel, kRows steps, beginning with the thread's step number `row`. `load` only
// starts the loads, so that a kernel can compute one tile while the next is being read. kInput: also read u, for s u. kGradient: also read dout and
// z, for dy = dout scale silu(z).
template <class S, int kSteps, bool kInput, bool kGradient, int kRows = S::template kRows<kSteps>> class Columns {
 public:
  using T = typename S::T;

  __device__ void load(const Problem& p, const Slot<S>& slot, int from, int end, const Tokens* dout, int row = 0) {
    first_ = slot.row + row * slot.rows;
    from_ = from;
    count_ = slot.column < slot.live ? least(kSteps, end - from) : 0;
    const int channel = slot.first + slot.column;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int t = first_ + k * slot.rows;
      if (t >= count_) continue;
      const int64_t token = token_at(p, from + t);
      if (p.rank == 0) request(p.delta, slot.batch, token, channel, &delta_[k]);
      if (kInput) request(p.u, slot.batch, token, channel, &u_[k]);
      if (kGradient) request(*dout, slot.batch, token, channel, &dout_[k]);
      if (kGradient && p.z.data) request(p.z, slot.batch, token, channel, &z_[k]);
    }
  }

  // Writes s, s u and dy of the tile; zeros for steps and channels that do not exist.
  __device__ void store(const Problem& p, const Slot<S>& slot, const Tokens* dout, T* s, T* su, T* dy) const {
    const int channel = slot.first + slot.column;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int t = first_ + k * slot.rows;
      if (t >= kSteps) break;
      T step = 0, input = 0, gradient = 0;
      if (t < count_) {
        const int64_t token = p.rank ? token_at(p, from_ + t) : 0;
        step = step_size<T>(p, raw_step<T>(p, slot.batch, token, channel, p.rank ? T(0) : delta_[k].value(p.delta.type))).value;
        if (kInput) input = step * u_[k].value(p.u.type);
        if (kGradient) {
          gradient = static_cast<T>(p.scale) * dout_[k].value(dout->type);
          if (p.z.data) gradient *= silu<T>(z_[k].value(p.z.type));
        }
      }
      const int at = t * slot.channels + slot.column;
      s[at] = step;
      if (kInput) su[at] = input;
      if (kGradient) dy[at] = gradient;
    }
  }

 private:
  static MEDSSM_INLINE void request(const Tokens& x, int batch, int64_t token, int channel, Bits<T>* bits) {
    bits->load(x.data, x.type, batch * x.batch + token * x.token + channel * x.channel);
  }
  int from_, count_, first_;
  Bits<T> delta_[kRows], u_[kInput ? kRows : 1], dout_[kGradient ? kRows : 1], z_[kGradient ? kRows : 1];
};

// Copies the rows of B and C of a tile to shared memory. B or C may be null. States and steps that do not exist become zeros.
template <class S, int kSteps>
__device__ void stage_rows(const Problem& p, const Slot<S>& slot, int from, int end, typename S::T* B, typename S::T* C) {
  using T = typename S::T;
  const int count = least(kSteps, end - from);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kSteps * slot.states; i += slot.channels * slot.share) {
    const int t = i / slot.states, n = i % slot.states;
    const bool there = t < count && n < p.state;
    Bits<T> b, c;
    if (there) {
      const int64_t token = token_at(p, from + t);
      if (B) b.load(p.B.data, p.B.type, slot.batch * p.B.batch + token * p.B.token + slot.group * p.B.group + n * p.B.state);
      if (C) c.load(p.C.data, p.C.type, slot.batch * p.C.batch + token * p.C.token + slot.group * p.C.group + n * p.C.state);
    }
    if (B) B[i] = there ? b.value(p.B.type) : T(0);
    if (C) C[i] = there ? c.value(p.C.type) : T(0);
  }
}

// Computes the state at the start of each chunk. `states` (b, chunks, n, d) has the state at the end of each chunk after a scan from zero; it is
// overwritten with the results. A thread has one state of one channel. Each chunk depends on the one before it, so a thread loads kAhead chunks
// before it uses them. sums (b, chunks, d): the sum of the step sizes of a chunk, or infinity if a segment begins inside the chunk, because then
// nothing of the earlier state remains. kBack: from the last chunk to the first.
template <class T, bool kBack> __global__ void __launch_bounds__(128) carry(Problem p, int64_t chunks, const T* initial, T* states, const T* sums) {
  constexpr int kAhead = 16;
  const int64_t size = p.state * p.channels, at = blockIdx.x * int64_t(128) + threadIdx.x;
  if (at >= p.batch * size) return;
  const int64_t batch = at / size, n = at % size / p.channels, channel = at % p.channels;
  const T rate = static_cast<const T*>(p.A)[channel * p.state + n] * static_cast<T>(kLog2E);
  const int64_t row = kBack ? last_row(p, batch) : first_row(p, batch);
  T h = initial ? initial[(row * p.channels + channel) * p.state + n] : T(0);
  states += batch * chunks * size + n * p.channels + channel;
  sums += batch * chunks * p.channels + channel;
  for (int64_t done = 0; done < chunks; done += kAhead) {
    T ends[kAhead], spans[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t chunk = kBack ? chunks - 1 - done - i : done + i;
      const bool wanted = done + i + 1 < chunks;  // no chunk follows the last one
      ends[i] = wanted ? states[chunk * size] : T(0);
      spans[i] = wanted ? sums[chunk * p.channels] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (done + i >= chunks) break;
      states[(kBack ? chunks - 1 - done - i : done + i) * size] = h;
      const bool reset = spans[i] > (sizeof(T) == 4 ? T(3.4e38) : T(1.7e308));
      h = (reset ? T(0) : exp2<T>(spans[i] * rate) * h) + ends[i];
    }
  }
}

template <class T, bool kBack> void launch_carry(const Problem& p, int chunks, const void* initial, void* states, const void* sums, void* stream) {
  launch(carry<T, kBack>, ceil_div(p.batch * p.state * p.channels, 128), 128, 0, stream, p, chunks, static_cast<const T*>(initial),
         static_cast<T*>(states), static_cast<const T*>(sums));
}

}  // namespace
}  // namespace medssm
