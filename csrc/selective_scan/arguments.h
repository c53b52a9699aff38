// The arguments of a scan, on the CPU and on a GPU.
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
  const void *A, *D, *bias, *proj, *initial;  // (d, n), (d), (d), (d, r), (b, d, n): dense, the compute type; all but A may be null
  const int64_t *index, *starts;              // null: raster; null: no segment begins after step 0
  int64_t start_count, reverse;
  int64_t batch, length, channels, groups, state, rank;  // rank 0: delta has a value for every channel
  int64_t softplus, wide, threads;                       // wide: compute in double
  double scale;                                          // of y, before the gate
};
// An output (b, l, d) with adjacent channels. earlier: null, or what to add to, the compute type and the same strides.
struct Output {
  void* data;
  int64_t type, batch, token;
  const void* earlier;
};

constexpr int64_t kTile = 64;

// Tokens between checkpoints: they take at most a quarter of the memory of u in float32. kernels/selective_scan/plan.py says the same.
MEDSSM_INLINE int64_t chunk_tokens(int64_t state) { return kTile * ceil_div(state, 16); }

}  // namespace
}  // namespace medssm
