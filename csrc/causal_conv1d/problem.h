// The arguments of a causal convolution, the walk through the tokens, and how the work is divided into tasks.
#pragma once
#include "medssm/parallel.h"
#include "medssm/simd.h"
#include "medssm/taps.h"

namespace medssm {
namespace {

// kernels/causal_conv1d/native.py packs these structs. Strides are in elements.
struct Problem {
  const void* x;
  int64_t x_type, x_stride[2];  // of batch and token; channels are adjacent
  int64_t batch, length;
  Taps taps;
  const void* initial;  // (b, d, width - 1), or null for zeros; with packed sequences, here and below, the b of states is their number
  int64_t initial_type, initial_stride[3];
  const int64_t *index, *starts, *sequences;  // each may be null. index: the token of each step; starts: the sorted steps at which a segment begins;
  int64_t start_count, reverse;               // sequences: that of each segment (see medssm/walk.h); reverse: the same walk from its end
  int64_t silu, wide, threads;                // wide: compute in double
};
struct Forward {
  Problem problem;
  void *out, *state;  // contiguous, in x's type; state: (b, d, width - 1), may be null
};
struct Backward {
  Problem problem;
  const void* dout;  // x's type
  int64_t dout_stride[2];
  const void* dstate;  // x's type, may be null
  int64_t dstate_stride[3];
  void *dx, *dweight, *dbias, *dinitial;  // contiguous, in the types of x, weight, bias and initial; dbias and dinitial may be null
};

constexpr int64_t kSteps = 128, kChannels = 256;  // the largest task: steps, channels

// The steps [begin, end). The taps read zeros before the first step, or the initial state of the sequence if it begins there.
struct Segment : Range {
  int64_t sequence;
  bool begins_sequence, ends_sequence;
};

// The order in which tokens are visited.
class Walk {
 public:
  explicit Walk(const Problem& p) :
      index_(p.index), starts_(p.starts), sequences_(p.sequences), count_(p.start_count), length_(p.length), reverse_(p.reverse) {}

  int64_t token(int64_t step) const {
    const int64_t at = reverse_ ? length_ - 1 - step : step;
    return index_ ? index_[at] : at;
  }

  // The segment that contains a step.
  Segment segment(int64_t step) const {
    const int64_t at = reverse_ ? length_ - 1 - step : step;
    int64_t low = 0, high = count_;  // the first start after `at`
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts_[middle] <= at)
        low = middle + 1;
      else
        high = middle;
    }
    const int64_t begin = low > 0 ? starts_[low - 1] : 0, end = low < count_ ? starts_[low] : length_;
    const int64_t own = sequence_of(low - 1);
    const bool first = begin == 0 || sequence_of(low - 2) != own, last = end == length_ || sequence_of(low) != own;
    return reverse_ ? Segment{{length_ - end, length_ - begin}, own, last, first} : Segment{{begin, end}, own, first, last};
  }

 private:
  // The sequence of the i-th segment. Even if a compiled graph brings starts without 0, which nobody has checked, no memory outside is read.
  int64_t sequence_of(int64_t i) const { return sequences_ ? sequences_[most<int64_t>(0, i)] : 0; }

  const int64_t *index_, *starts_, *sequences_;
  int64_t count_, length_;
  bool reverse_;
};

// The steps [begin, end) of image n, for the channel vectors [first, first + count). share: index of the partial sum of gradients it adds to.
struct Task {
  int64_t n, begin, end, first, count, share;
};

// How the work is divided into tasks.
template <class T> struct Plan {
  static constexpr int W = kLanes<T>;
  int64_t length, channels, elements, past;  // sizes of x; past: width - 1, the number of earlier tokens that an output reads
  int64_t vectors, packed;                   // number of channel vectors; elements of the taps and the bias of one vector
  int64_t chunks, group, groups,
      shares;   // chunks of steps; vectors of a task; tasks per chunk; tasks per channel vector, each with its own partial sum
  int64_t row;  // elements of one row of a task in scratch memory

  explicit Plan(const Problem& p) :
      length(p.length),
      channels(p.taps.channels),
      elements(p.batch * length * channels),
      past(p.taps.count() - 1),
      vectors(p.taps.vectors<T>()),
      packed(p.taps.packed<T>()),
      chunks(ceil_div(length, kSteps)),
      group(ceil_div(vectors, ceil_div(vectors, kChannels / W))),
      groups(ceil_div(vectors, group)),
      shares(p.batch * chunks),
      row(group * W) {}

  int64_t tasks() const { return shares * groups; }
  Task task(int64_t i) const {
    const int64_t share = i / groups, begin = share % chunks * kSteps, first = i % groups * group;
    return {share / chunks, begin, least(length, begin + kSteps), first, least(group, vectors - first), share};
  }
  // The number of channels of a task.
  int64_t width(const Task& t) const { return least(t.count * W, channels - t.first * W); }
  // The offset of a task's first channel in a contiguous state (b, d, width - 1).
  int64_t slots(const Task& t, int64_t sequence) const { return ((t.n + sequence) * channels + t.first * W) * past; }
};

}  // namespace
}  // namespace medssm
