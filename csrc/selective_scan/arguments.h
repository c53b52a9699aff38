// The arguments of a scan, for the CPU and the GPU.
#pragma once
#include "medssm/storage.h"

namespace medssm {
namespace {

// kernels/selective_scan packs these structs field by field. Strides are in elements.
struct Tokens {  // (b, l, d): u, delta, z, dout
  const void* data;
  int64_t type, batch, token, channel;
};
struct Rows {  // (b, l, g, n): B, C
  const void* data;
  int64_t type, batch, token, group, state;
};
struct Problem {
  Tokens u, delta, z;
  Rows B, C;
  const void *A, *D, *bias, *proj, *initial;  // (d, n), (d), (d), (d, r), (b, d, n): contiguous, in the compute type; all except A may be null. With
                                              // packed sequences the b of states is their number
  const int64_t *index, *starts, *sequences;  // see medssm/walk.h; each may be null
  int64_t start_count, reverse;
  int64_t batch, length, channels, groups, state, rank;  // rank 0: delta has one value per channel, it is not low-rank
  int64_t softplus, wide, threads;                       // wide: compute in double
  double scale;                                          // multiplies y before the gate
};
// An output (b, l, d) with adjacent channels. earlier: null, or a tensor in the compute type with the same strides, which is added to the result.
struct Output {
  void* data;
  int64_t type, batch, token;
  const void* earlier;
};

constexpr int64_t kTile = 64;

// Tokens between two checkpoints, chosen so that the checkpoints take at most a quarter of the memory of u in float32.
// kernels/selective_scan/plan.py has the same rule: change both together.
MEDSSM_INLINE int64_t chunk_tokens(int64_t state) { return kTile * ceil_div(state, 16); }

}  // namespace
}  // namespace medssm
