// The order in which a recurrence visits the tokens (the walk), divided into tiles.
//
// A tile is at most kTileSteps consecutive steps of the walk. A segment can begin only at the first step of a tile.
//
// The walk may go through several packed sequences, each of one or more segments. Every sequence has its own initial and final state, a row of the
// state tensors. Without packed sequences all segments belong to sequence 0, and the row is that of the batch element: in both cases the row is
// (batch element) + (sequence), because packed sequences have a batch of one.
#pragma once
#include "medssm/storage.h"

namespace medssm {
namespace {

constexpr int64_t kTileSteps = 64;

// Steps [from, from + count) of the walk. Step from + t visits token first + t * direction if index is null, otherwise token
// index[first + t * direction].
struct Tile {
  int64_t from, count;
  bool begins_segment;  // a segment begins at step `from`: if a sequence begins with it, the state is its initial state, otherwise zero
  const int64_t* index;
  int64_t first, direction;
  int64_t sequence = 0, previous = 0;  // the sequence of these steps, and the one of the step before them
  bool begins_sequence() const { return sequence != previous; }
  int64_t token(int64_t t) const { return index ? index[first + t * direction] : first + t * direction; }
};

class Walk {
 public:
  // index: the token of each step, null for raster order. starts: the sorted steps at which a segment begins, numbered in forward direction.
  // sequences: the sequence of each segment, in the order of the starts, the first of which is then 0; null without packed sequences. reverse: the
  // same walk from its end.
  Walk(int64_t length, const int64_t* index, const int64_t* starts, const int64_t* sequences, int64_t start_count, bool reverse) :
      length_(length), index_(index), starts_(starts), sequences_(sequences), start_count_(start_count), reverse_(reverse) {}
  // A walk of one segment.
  explicit Walk(int64_t length, const int64_t* index = nullptr, bool reverse = false) : Walk(length, index, nullptr, nullptr, 0, reverse) {}

  // Steps [from, end), ignoring segments. Used for prefetches and single steps.
  Tile steps(int64_t from, int64_t end) const { return {from, end - from, false, index_, reverse_ ? length_ - 1 - from : from, reverse_ ? -1 : 1}; }

  // The sequences of the first and of the last step.
  int64_t first_sequence() const { return sequences_ ? sequences_[reverse_ ? start_count_ - 1 : 0] : 0; }
  int64_t last_sequence() const { return sequences_ ? sequences_[reverse_ ? 0 : start_count_ - 1] : 0; }

  // The longest tile that begins at `from`. It ends at `end` or at the next segment start at the latest.
  Tile tile(int64_t from, int64_t end) const {
    end = least(least(end, length_), from + kTileSteps);
    const int64_t next = first_start(from);
    const bool begins = from > 0 && next < start_count_ && start(next) == from;
    if (next + begins < start_count_) end = least(end, start(next + begins));
    Tile tile = steps(from, end);
    tile.begins_segment = begins;
    if (sequences_) {
      const int64_t segment = reverse_ ? start_count_ - 1 - next - begins : next + begins - 1;
      tile.sequence = sequence_of(segment);
      tile.previous = sequence_of(begins ? segment + (reverse_ ? 1 : -1) : segment);
    }
    return tile;
  }

  // The longest tile that ends at `end` and does not begin before `from`.
  Tile tile_before(int64_t end, int64_t from) const { return tile(most(begin_of_last_segment(from, end), end - kTileSteps), end); }

  // A tile that also ends at the next multiple of kTileSteps.
  Tile aligned_tile(int64_t from, int64_t end) const { return tile(from, least(end, round_up(from + 1, kTileSteps))); }

  // Writes the aligned tiles of steps [from, end) to `tiles` (at most end - from of them) and returns their number.
  int64_t aligned_tiles(int64_t from, int64_t end, Tile* tiles) const {
    int64_t count = 0;
    for (end = least(end, length_); from < end; from += tiles[count++].count) tiles[count] = aligned_tile(from, end);
    return count;
  }

  // The last step in [from, end) at which a segment begins, or `from` if there is none.
  int64_t begin_of_last_segment(int64_t from, int64_t end) const {
    const int64_t next = first_start(end);
    return next > 0 ? most(from, start(next - 1)) : from;
  }

 private:
  // The i-th step at which a segment begins, in the direction of the walk. Starts at step 0 and at the end of the walk have no effect: an initial
  // state comes before step 0.
  int64_t start(int64_t i) const { return reverse_ ? length_ - starts_[start_count_ - 1 - i] : starts_[i]; }
  // A compiled graph may bring sequences that nobody has checked. Even if the first one does not begin at step 0, no memory outside is read.
  int64_t sequence_of(int64_t segment) const { return sequences_[most<int64_t>(0, segment)]; }
  int64_t first_start(int64_t from) const {
    int64_t low = 0, high = start_count_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start(middle) < most<int64_t>(from, 1))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  const int64_t length_;
  const int64_t *const index_, *const starts_, *const sequences_;
  const int64_t start_count_;
  const bool reverse_;
};

}  // namespace
}  // namespace medssm
