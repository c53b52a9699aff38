// What the backward passes of ssd and ssd3 store of a matrix state for each other: the gradients of the states every so many steps, with which dg is
// computed exactly there (csrc/ssd/cpu_backward.cpp says why), and tables with a number for each step and block of states.
#pragma once
#include "medssm/matrix_scan.h"
#include "medssm/parallel.h"

namespace medssm {
namespace {

template <class T> struct StoredStates {
  const int64_t length, heads;
  const int64_t blocks;        // of kLanes<T> states
  const int64_t every;         // steps between stored states. These need as much memory as x, or twice as much where n is not a multiple of a vector.
  const int64_t saved, state;  // stored states of a head; elements of a block's
  const Scratch<T> states;     // [batch, head][saved][block][channel][lane]

  // p: the problem: batch, length, heads, size (channels of a head), states.
  template <class P> explicit StoredStates(const P& p) :
      length(p.length),
      heads(p.heads),
      blocks(ceil_div(p.states, kLanes<T>)),
      every(p.states <= 16   ? 16
            : p.states <= 32 ? 32
                             : round_up(p.states, kTileSteps)),
      saved(ceil_div(p.length, every)),
      state(padded_rows(p.size) * kLanes<T>),
      states(p.batch * heads * saved * blocks * state) {
    prefer_huge_pages(states.data(), p.batch * heads * saved * blocks * state * static_cast<int64_t>(sizeof(T)));
  }

  T* state_at(const Slot<T>& slot, int64_t block, int64_t step) const {
    return states.data() + (((slot.batch * heads + slot.head) * saved + step / every) * blocks + block) * state;
  }
  // The numbers of one block in a table [batch, head][block][step].
  T* of(const Scratch<T>& table, int64_t batch, int64_t head, int64_t block) const {
    return table.data() + ((batch * heads + head) * blocks + block) * length;
  }
};

}  // namespace
}  // namespace medssm
