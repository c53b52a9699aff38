// What the scan's kernels on a GPU share: how the work is cut, and tiles of tokens in shared memory.
//
// The state of a channel lies in the registers of `share` neighbouring threads, kStates of them in each; so a warp has 32 / share channels, and a
// block up to 64 (48 of 16 states: 96, 192 and 384 channels fill such tiles). Time runs serially inside a block. With one block per 64 channels a
// batch of one would leave most of a GPU idle: so time is cut into chunks, which a first pass scans from a zero state, a second joins, and a third
// scans again from the right state (see cuda_forward.cu).
//
// A tile is kSteps steps of the walk. The block reads it with channels along its threads, which any order and most strides give whole sectors,
// works the step size out once per token and channel, and then every thread finds s and s u of its channel and B and C of its states in shared
// memory. Steps behind the end and channels beyond the last are zeros there: e^0 = 1 keeps their state, and nothing asks for it.
#pragma once
#include "arguments.h"
#include "medssm/activation.h"
#include "medssm/step.h"

namespace medssm {
namespace {

// How a compute type and a number of states are served. kShare: threads of a channel, 0 where known at the launch only. kSteps: of a tile forwards,
// kBack: of a tile backwards. kKeep: backwards, the states at the tiles' beginnings of a run between checkpoints are kept; else
// they are scanned anew for each tile.
template <class T_, int kStates_, int kShare_, int kThreads_, int kSteps_, int kBack_, bool kKeep_> struct Shape {
  using T = T_;
  static constexpr int kStates = kStates_, kShare = kShare_, kThreads = kThreads_, kSteps = kSteps_, kBack = kBack_;
  static constexpr bool kKeep = kKeep_;
  template <int kOf> static constexpr int kRows = kOf / (kShare ? kShare : 1);  // of a tile of kOf steps, a thread's where it works token by token
};

// Calls body(Shape) with the shape that serves a problem.
template <class Body> void with_shape(const Problem& p, Body&& body) {
  if (p.wide)
    body(Shape<double, 8, 0, 64, 4, 2, false>{});
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

// The cut of a problem into blocks. kernels/selective_scan/cuda.py knows `per_group` and `tiles` too: it allocates by them.
struct Cut {
  int share, channels;          // threads of a channel; channels of a block
  int width, per_group, tiles;  // channels of a group; tiles of channels of a group, and in all
  int chunk, chunks;            // steps of a chunk of time, and how many

  template <class S> static Cut of(const Problem& p, int64_t chunk, S) {
    Cut cut;
    cut.share = 1;
    while (cut.share * S::kStates < p.state) cut.share *= 2;
    cut.width = static_cast<int>(p.channels / p.groups);
    cut.per_group = static_cast<int>(ceil_div(cut.width, least(64, S::kThreads / cut.share)));
    cut.channels = static_cast<int>(round_up(ceil_div(cut.width, cut.per_group), most(1, kWarp / cut.share)));  // alike, of whole warps
    cut.tiles = cut.per_group * static_cast<int>(p.groups);
    cut.chunk = static_cast<int>(chunk);
    cut.chunks = static_cast<int>(ceil_div(p.length, chunk));
    return cut;
  }
  int threads() const { return channels * share; }
};

// What a block and a thread of it are for.
template <class S> struct Slot {
  using T = typename S::T;
  int share, channels, states;     // of the cut; states of a channel, zeros included
  int batch, chunk, from, end;     // from, end: the chunk's steps
  int tile, within, group, first;  // the tile of channels, in all and in its group; the group; the first channel
  int live;                        // channels of the tile that exist
  int channel, state;              // this thread's: channel of the tile, first state
  int column, row, rows;           // this thread's where the block works token by token: channel of the tile, first step, steps between

  // Blocks of `chunks` chunks, the tiles of channels next to each other: they read the same B and C.
  __device__ Slot(const Problem& p, const Cut& cut, int first_chunk, int chunk_count) {
    share = S::kShare ? S::kShare : cut.share;
    channels = cut.channels;
    states = share * S::kStates;
    const int at = static_cast<int>(blockIdx.x) / cut.tiles;
    tile = static_cast<int>(blockIdx.x) % cut.tiles;
    batch = at / chunk_count;
    chunk = first_chunk + at % chunk_count;
    from = chunk * cut.chunk;
    end = static_cast<int>(least<int64_t>(p.length, int64_t(from) + cut.chunk));
    group = tile / cut.per_group;
    within = tile % cut.per_group;
    first = group * cut.width + within * channels;
    live = least(channels, cut.width - within * channels);
    channel = static_cast<int>(threadIdx.x) / share;
    state = static_cast<int>(threadIdx.x) % share * S::kStates;
    column = static_cast<int>(threadIdx.x) % channels;
    row = static_cast<int>(threadIdx.x) / channels;
    rows = share;
  }
  __device__ bool has(const Problem& p, int i) const { return channel < live && state + i < p.state; }
  // Of this thread's state i in (b, chunks, n, d); in (b, d, n).
  __device__ int64_t in_chunks(const Problem& p, int64_t chunks, int64_t chunk, int i) const {
    return ((batch * chunks + chunk) * p.state + state + i) * p.channels + first + channel;
  }
  __device__ int64_t in_state(const Problem& p, int i) const { return (batch * p.channels + first + channel) * p.state + state + i; }

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

// The steps at which the state begins anew, looked up by one thread that moves through the walk either way.
class Starts {
 public:
  // Bit t of the result: the state begins anew at step from + t. Step 0 is left out: the initial state precedes it.
  __device__ unsigned mask(const Problem& p, int from, int count) {
    if (p.start_count == 0) return 0;
    if (next_ < 0) seek(p, from);
    while (next_ > 0 && start(p, next_ - 1) >= from) --next_;
    while (next_ < p.start_count && start(p, next_) < from) ++next_;
    unsigned bits = 0;
    for (int64_t i = next_; i < p.start_count && start(p, i) < from + count; ++i)
      if (start(p, i) > 0) bits |= 1u << (start(p, i) - from);
    return bits;
  }

 private:
  __device__ int64_t start(const Problem& p, int64_t i) const { return p.reverse ? p.length - p.starts[p.start_count - 1 - i] : p.starts[i]; }
  __device__ void seek(const Problem& p, int64_t from) {
    int64_t low = 0, high = p.start_count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start(p, middle) < from)
        low = middle + 1;
      else
        high = middle;
    }
    next_ = low;
  }
  int64_t next_ = -1;
};

// Several numbers that one instruction moves.
template <class T, int kCount> struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T at[kCount];
};

// What goes before the softplus at a token of a channel, from the tensor's own value where there is one for every channel.
template <class T> MEDSSM_INLINE T raw_step(const Problem& p, int batch, int64_t token, int channel, T delta) {
  T x = p.bias ? static_cast<const T*>(p.bias)[channel] : T(0);
  if (p.rank == 0) return x + delta;
  const int64_t at = batch * p.delta.batch + token * p.delta.token;
#pragma unroll 1
  for (int r = 0; r < p.rank; ++r)  // delta_proj lies as (r, d) here: neighbours read neighbours
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

// A thread's share of a tile on its way into shared memory: one channel at kRows of its steps, from its step number `row` on. `load` only asks memory
// for it, so that a kernel can work on one tile while the next is under way. kInput: u too, for s u; kGradient: dout and z, for dy = dout scale
// silu(z).
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
      if (p.rank == 0) ask(p.delta, slot.batch, token, channel, &delta_[k]);
      if (kInput) ask(p.u, slot.batch, token, channel, &u_[k]);
      if (kGradient) ask(*dout, slot.batch, token, channel, &dout_[k]);
      if (kGradient && p.z.data) ask(p.z, slot.batch, token, channel, &z_[k]);
    }
  }

  // s, s u and dy of the tile, zeros where there is no step or no channel.
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
  static MEDSSM_INLINE void ask(const Tokens& x, int batch, int64_t token, int channel, Bits<T>* bits) {
    bits->load(x.data, x.type, batch * x.batch + token * x.token + channel * x.channel);
  }
  int from_, count_, first_;
  Bits<T> delta_[kRows], u_[kInput ? kRows : 1], dout_[kGradient ? kRows : 1], z_[kGradient ? kRows : 1];
};

// Rows of B and, where asked, C of a tile, states beyond the last and steps behind the end as zeros.
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

// The states at the chunks' beginnings from what each chunk made of a zero state: in place, (b, chunks, n, d). A thread has one state of one channel
// and reads kAhead chunks before it uses them, since each waits for the one before. sums (b, chunks, d): of a chunk's step sizes; infinite where the
// state begins anew inside the chunk: nothing is left of what came before. kBack: from the last chunk to the first.
template <class T, bool kBack> __global__ void __launch_bounds__(128) carry(Problem p, int64_t chunks, const T* initial, T* states, const T* sums) {
  constexpr int kAhead = 16;
  const int64_t size = p.state * p.channels, at = blockIdx.x * int64_t(128) + threadIdx.x;
  if (at >= p.batch * size) return;
  const int64_t batch = at / size, n = at % size / p.channels, channel = at % p.channels;
  const T rate = static_cast<const T*>(p.A)[channel * p.state + n] * static_cast<T>(kLog2E);
  T h = initial ? initial[(batch * p.channels + channel) * p.state + n] : T(0);
  states += batch * chunks * size + n * p.channels + channel;
  sums += batch * chunks * p.channels + channel;
  for (int64_t done = 0; done < chunks; done += kAhead) {
    T ends[kAhead], spans[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t chunk = kBack ? chunks - 1 - done - i : done + i;
      const bool wanted = done + i + 1 < chunks;  // the last one's leads nowhere
      ends[i] = wanted ? states[chunk * size] : T(0);
      spans[i] = wanted ? sums[chunk * p.channels] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (done + i >= chunks) break;
      states[(kBack ? chunks - 1 - done - i : done + i) * size] = h;
      const bool cut = spans[i] > (sizeof(T) == 4 ? T(3.4e38) : T(1.7e308));
      h = (cut ? T(0) : exp2<T>(spans[i] * rate) * h) + ends[i];
    }
  }
}

template <class T, bool kBack> void launch_carry(const Problem& p, int chunks, const void* initial, void* states, const void* sums, void* stream) {
  launch(carry<T, kBack>, ceil_div(p.batch * p.state * p.channels, 128), 128, 0, stream, p, chunks, static_cast<const T*>(initial),
         static_cast<T*>(states), static_cast<const T*>(sums));
}

}  // namespace
}  // namespace medssm
