// Rows of channels in the compute type. If a tensor has that type, its rows are used in place; otherwise they are copied to scratch memory.
#pragma once
#include <type_traits>

#include "medssm/scratch.h"
#include "medssm/stream.h"
#include "problem.h"
#include "tile.h"

namespace medssm {
namespace {

// A (b, l, d) tensor of any storage type, read and written as rows of the compute type T. Inputs are never written.
template <class T> class Tokens {
 public:
  Tokens(const Plan<T>& plan, const Walk& walk, const void* data, int64_t type, int64_t batch_stride, int64_t token_stride) :
      plan_(plan), walk_(walk), data_(const_cast<void*>(data)), type_(type), batch_stride_(batch_stride), token_stride_(token_stride) {}

  // Whether to use stores that bypass the caches.
  bool streams() const { return in_place() && medssm::streams<T>(static_cast<T*>(data_), plan_.elements, plan_.channels); }
  // Whether the tensor's type is T. Only then may `at` be used.
  bool in_place() const { return type_ == (sizeof(T) == sizeof(double) ? kFloat64 : kFloat32); }
  T* at(const Task& task, int64_t step) const { return static_cast<T*>(data_) + offset(task, step); }

  void load_row(const Task& task, int64_t step, T* row) const {
    with_storage(type_, static_cast<const void*>(data_), [&](const auto* data) {
      data += offset(task, step);
      each_vector<T>(plan_.width(task), [&](int64_t c, auto lanes) { store(row + c, lanes.template load_from<T>(data + c)); });
    });
  }
  void store_row(const Task& task, int64_t step, const T* row) const {
    with_storage(type_, data_, [&](auto* data) {
      data += offset(task, step);
      each_vector<T>(plan_.width(task), [&](int64_t c, auto lanes) { lanes.store_to(data + c, load<T>(row + c)); });
    });
  }

 private:
  int64_t offset(const Task& task, int64_t step) const { return task.n * batch_stride_ + walk_.token(step) * token_stride_ + task.first * kLanes<T>; }

  const Plan<T>& plan_;
  const Walk& walk_;
  void* data_;
  int64_t type_, batch_stride_, token_stride_;
};

// The rows of one tile of a tensor: in place if its type is T, otherwise copies.
template <class T> class Rows {
 public:
  Rows(const Plan<T>& plan, const Tokens<T>& tokens) : tokens_(tokens), row_(plan.row), copies_(kTile * plan.row) {}

  // Rows to read. Valid until the next call.
  const T* const* load(const Task& task, int64_t step, int64_t steps) {
    for (int64_t t = 0; t < steps; ++t)
      if (!tokens_.in_place()) tokens_.load_row(task, step + t, copy(t));
    return store_into(task, step, steps);
  }
  // Rows to write. Call `store` afterwards.
  T* const* store_into(const Task& task, int64_t step, int64_t steps) {
    for (int64_t t = 0; t < steps; ++t) rows_[t] = tokens_.in_place() ? tokens_.at(task, step + t) : copy(t);
    return rows_;
  }
  void store(const Task& task, int64_t step, int64_t steps) const {
    for (int64_t t = 0; t < steps; ++t)
      if (!tokens_.in_place()) tokens_.store_row(task, step + t, copy(t));
  }

 private:
  T* copy(int64_t t) const { return copies_.data() + t * row_; }

  const Tokens<T>& tokens_;
  const int64_t row_;
  const Scratch<T> copies_;
  T* rows_[kTile];
};

// A (b, d, width - 1) tensor of any storage type, or null: the tokens before a sequence (initial state), or its last tokens (final state).
struct State {
  const void* data;
  int64_t type, stride[3];

  // row[c] += state[n, first + c, slot] for c in [0, channels).
  template <class T> void add_to(T* row, int64_t n, int64_t first, int64_t channels, int64_t slot) const {
    if (!data) return;
    with_storage(type, data, [&](const auto* source) {
      source += n * stride[0] + first * stride[1] + slot * stride[2];
      for (int64_t c = 0; c < channels; ++c) row[c] += to_compute<T>(source[c * stride[1]]);
    });
  }
};

// Writes a row to a contiguous tensor (b, d, width - 1): channel c at offset at + c * stride.
template <class T> void store_state(void* data, int64_t type, int64_t at, int64_t stride, int64_t channels, const T* row) {
  with_storage(type, data, [&](auto* target) {
    for (int64_t c = 0; c < channels; ++c) target[at + c * stride] = to_storage<std::remove_reference_t<decltype(*target)>>(row[c]);
  });
}

// The input rows of the tiles of a run (a part of a task inside one segment), one tile after the other.
template <class T> class Input {
 public:
  Input(const Plan<T>& plan, const Walk& walk, const Problem& p) :
      plan_(plan),
      x_(plan, walk, p.x, p.x_type, p.x_stride[0], p.x_stride[1]),
      initial_{p.initial, p.initial_type, {p.initial_stride[0], p.initial_stride[1], p.initial_stride[2]}},
      slots_(kTile + plan.past),
      scratch_(slots_ * plan.row),
      rows_(slots_) {}

  void start(const Task& task, const Segment& segment, int64_t step) {
    task_ = task;
    segment_ = segment;
    next_ = step - plan_.past;
  }

  // The rows of steps [step - (width - 1), step + steps). A tile always reads kTile + width - 1 rows: the last row is repeated up to that number.
  const T* const* window(int64_t step, int64_t steps) {
    for (int64_t i = 0; i < slots_; ++i) rows_.data()[i] = row(least(step + i - plan_.past, step + steps - 1));
    next_ = step + steps;
    return rows_.data();
  }

 private:
  const T* row(int64_t step) const {
    if (x_.in_place() && step >= segment_.begin) return x_.at(task_, step);
    T* row = scratch_.data() + (step + plan_.past) % slots_ * plan_.row;
    if (step < next_) return row;  // an earlier tile has filled it
    if (step >= segment_.begin) {
      x_.load_row(task_, step, row);
    } else {
      std::memset(row, 0, static_cast<std::size_t>(plan_.row) * sizeof(T));
      if (segment_.begins_sequence)
        initial_.add_to(row, task_.n + segment_.sequence, task_.first * kLanes<T>, plan_.width(task_), step - segment_.begin + plan_.past);
    }
    return row;
  }

  const Plan<T>& plan_;
  const Tokens<T> x_;
  const State initial_;
  const int64_t slots_;
  const Scratch<T> scratch_;
  const Scratch<const T*> rows_;
  Task task_;
  Segment segment_;
  int64_t next_;  // the first step whose row is not in scratch memory yet
};

}  // namespace
}  // namespace medssm
