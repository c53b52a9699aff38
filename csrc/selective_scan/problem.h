// What forward and backward share: the arguments, the blocks of channels, and the walk through the tokens.
//
// A block is one vector of channels (fewer at the end of a group). A chunk is the run of steps between two checkpoints of the state.
#pragma once
#include "arguments.h"
#include "medssm/simd.h"
#include "medssm/walk.h"

namespace medssm {
namespace {

MEDSSM_INLINE int64_t element_size(int64_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// Threads share the work by items: a block of one batch element. Where items are fewer than threads, by halves of an item's states:
// the sums over states are always those of the first half plus those of the second, so that the bits do not depend on who adds.
MEDSSM_INLINE int64_t first_half(int64_t state) { return ceil_div(state, 2); }

struct Block {
  int64_t batch, group, channel;  // of the batch element, the group and the first channel
  int lanes;                      // channels in it
};

template <class T> struct Blocks {
  int64_t width, per_group, count;  // channels per group, blocks per group, blocks in all
  explicit Blocks(const Problem& p) : width(p.channels / p.groups), per_group(ceil_div(width, kLanes<T>)), count(per_group * p.groups) {}
  Block operator[](int64_t item) const {
    const int64_t batch = item / count, block = item % count, group = block / per_group, within = block % per_group * kLanes<T>;
    return {batch, group, group * width + within, static_cast<int>(least<int64_t>(kLanes<T>, width - within))};
  }
};

static_assert(kTile == kTileSteps, "checkpoints lie between tiles of the walk");
MEDSSM_INLINE Walk walk_of(const Problem& p) { return {p.length, p.index, p.starts, p.start_count, p.reverse != 0}; }

}  // namespace
}  // namespace medssm
