// Shared by forward and backward on the CPU: the blocks of channels, and the walk through the tokens.
//
// A block is one vector of channels. The last block of a group may have fewer. A chunk is the steps between two checkpoints of the state.
#pragma once
#include "arguments.h"
#include "medssm/simd.h"
#include "medssm/walk.h"

namespace medssm {
namespace {

MEDSSM_INLINE int64_t element_size(int64_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// Work is divided into items. An item is one block of one batch element. If there are fewer items than threads, two threads share an item, and
// each takes half of its states. A sum over states is always (sum over the first half) + (sum over the second half), so the result has the same bits
// for any number of threads.
MEDSSM_INLINE int64_t first_half(int64_t state) { return ceil_div(state, 2); }

struct Block {
  int64_t batch, group, channel;  // index of the batch element, of the group and of the first channel
  int lanes;                      // number of channels
};

template <class T> struct Blocks {
  int64_t width, per_group, count;  // channels per group, blocks per group, blocks in total
  explicit Blocks(const Problem& p) : width(p.channels / p.groups), per_group(ceil_div(width, kLanes<T>)), count(per_group * p.groups) {}
  Block operator[](int64_t item) const {
    const int64_t batch = item / count, block = item % count, group = block / per_group, within = block % per_group * kLanes<T>;
    return {batch, group, group * width + within, static_cast<int>(least<int64_t>(kLanes<T>, width - within))};
  }
};

static_assert(kTile == kTileSteps, "checkpoints lie between tiles of the walk");
MEDSSM_INLINE Walk walk_of(const Problem& p) { return {p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse != 0}; }

}  // namespace
}  // namespace medssm
