// The arguments of linear attention, and how the work is divided into tasks.
#pragma once
#include "medssm/parallel.h"
#include "medssm/simd.h"
#include "medssm/walk.h"

namespace medssm {
namespace {

enum FeatureMap : int64_t { kIdentity = 0, kRelu = 1, kElu = 2 };

// A (batch, token, head, channel) tensor with adjacent channels. Strides are in elements.
struct Tokens {
  void* data;
  int64_t type, stride[3];
};
// A (token, head, channel) table in the compute type with adjacent channels, or null.
struct Angles {
  const void* data;
  int64_t stride[2];
};

// The argument blocks that kernels/linear_attention/native.py packs.
struct Problem {
  Tokens q, k, v;
  Angles cos, sin;
  int64_t batch, q_length, length, heads, groups, dk, dv;
  const int64_t *index, *starts, *sequences;  // of a causal walk: see medssm/walk.h
  int64_t start_count, reverse, causal;
  int64_t feature_map, normalize, wide, threads;  // wide: compute in double
  double scale, eps;
};
// The sums kv (b, g, dk, dv) and z (b, g, dk) are contiguous, in the compute type. With packed sequences b is their number.
struct Forward {
  Problem problem;
  Tokens out;
  const void *initial_kv, *initial_z;  // may be null
  void *kv, *z;
};
struct Backward {
  Problem problem;
  Tokens dout, dq, dk, dv;
  const void *initial_kv, *initial_z;       // causal: as in Forward; otherwise not read
  const void *kv, *z, *later_kv, *later_z;  // the final sums, and the gradients the caller has for them, which may be null
  void *dkv, *dz;  // the gradients of the initial state, null if causal without one; if not causal, those of the final sums are the same
};

constexpr int64_t kTokens = 32;  // most tokens of a tile
constexpr int64_t kTileBytes = 32 << 10;

// A piece of work: the tokens [begin, end) of batch element n, for the groups of heads [first, first + count). share: the index of the segment among
// those that add to the same sums.
struct Task {
  int64_t n, begin, end, first, count, share;
};

// How the tokens of q, or of k and v, are divided into tasks: into segments of tokens, and into blocks of groups of heads.
class Cut {
 public:
  // Segments are at most `longest` tokens long.
  Cut(int64_t batch, int64_t length, int64_t groups, int64_t block, int64_t longest) :
      length_(length),
      groups_(groups),
      block_(block),
      blocks_(ceil_div(groups, block)),
      segment_(round_up(least(longest, most<int64_t>(512, ceil_div(length, 32))), kTokens)),
      segments_(most<int64_t>(1, ceil_div(length, segment_))),
      tasks_(batch * segments_ * blocks_) {}

  int64_t tasks() const { return tasks_; }
  int64_t shares() const { return segments_; }
  int64_t segment() const { return segment_; }
  Task operator[](int64_t i) const {
    const int64_t block = i % blocks_, rest = i / blocks_, share = rest % segments_, first = block * block_;
    return {rest / segments_, share * segment_, least(length_, (share + 1) * segment_), first, least(block_, groups_ - first), share};
  }

 private:
  int64_t length_, groups_, block_, blocks_, segment_, segments_, tasks_;
};

// The numbers in a row of a tile. A multiple of the vector, and of 8, which matrix_state.h requires for the rows of a state.
template <class T> MEDSSM_INLINE int64_t padded_width(int64_t width) { return round_up(width, most<int64_t>(kLanes<T>, 8)); }

// The sizes of all buffers. The sums of a group are padded: dk_padded rows of dv_padded numbers, then z; the padding beyond dk and dv is zero.
template <class T> struct Plan {
  int64_t dk, dv, dk_padded, dv_padded, per_group, block, sums, totals;
  Cut q, k;

  explicit Plan(const Problem& p) :
      dk(p.dk),
      dv(p.dv),
      dk_padded(padded_width<T>(p.dk)),
      dv_padded(padded_width<T>(p.dv)),
      per_group(p.groups ? p.heads / p.groups : 1),
      block(most<int64_t>(1, least(p.groups, kTileBytes / most<int64_t>(1, row() * per_group)))),
      sums(dk_padded * (dv_padded + 1)),
      totals(p.batch * p.groups),
      q(p.batch, p.q_length, p.groups, block, longest(p)),
      k(p.batch, p.length, p.groups, block, longest(p)) {}

  // The bytes of one head's tile of k and v.
  int64_t row() const { return kTokens * (dk_padded + dv_padded) * static_cast<int64_t>(sizeof(T)); }
  // The most tokens of a segment. A causal sum is rounded once per token: short segments limit its rounding error. Other sums are rounded once per
  // tile.
  static int64_t longest(const Problem& p) { return p.causal ? 4096 : INT64_MAX / 2; }
  // The number of threads. Starting a thread takes as long as some ten thousand multiplications, so each must have more work than that.
  int64_t threads(const Problem& p) const {
    const int64_t work = (p.q_length * p.heads + p.length * p.groups) * p.batch * p.dk * p.dv;
    return most<int64_t>(1, least(p.threads, least(most(q.tasks(), k.tasks()), ceil_div(work, 1 << 18))));
  }
};

}  // namespace
}  // namespace medssm
