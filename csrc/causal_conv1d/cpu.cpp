// Causal depthwise convolution along a walk through the tokens (b, l, d), channels adjacent.
//
// A task computes kSteps steps of the walk for some vectors of channels, kTile steps at a time: a tile gets pointers to the rows of channels
// that it sees and writes, so a walk costs an index look-up per token and no copy. Rows that are not in the compute type, or that lie
// before the start of a segment (zeros, or the initial state), are put into scratch memory.
//
// Backward: g = dout act'(pre), with pre recomputed, kept in scratch memory for the task's steps and the width - 1 after them; dx is the
// convolution of g with the mirrored taps. Each task sums its own share of dweight, and the shares are added in order, in double
// precision: tasks depend on shapes only, so any number of threads gives the same bits.
#include "medssm/abi.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"
#include "medssm/simd.h"
#include "medssm/taps.h"
#include "tile.h"

using namespace medssm;

namespace {

// What kernels/causal_conv1d/native.py packs. Strides in elements.
struct Problem {
  const void* x;
  int64_t x_type, x_stride[2];  // batch, token; channels are adjacent
  int64_t batch, length;
  Taps taps;
  const void* initial;  // (b, d, width - 1), or null: zeros
  int64_t initial_type, initial_stride[3];
  const int64_t *index, *starts;  // the token of each step, null for raster; the sorted steps at which the taps begin anew
  int64_t start_count, reverse;   // reverse: the same walk backwards
  int64_t silu, wide, threads;    // wide: compute in double
};
struct Forward {
  Problem problem;
  void *out, *state;  // contiguous, x's type; state (b, d, width - 1) may be null
};
struct Backward {
  Problem problem;
  const void* dout;  // x's type
  int64_t dout_stride[2];
  const void* dstate;  // x's type, may be null
  int64_t dstate_stride[3];
  void *dx, *dweight, *dbias, *dinitial;  // contiguous, in the types of x, weight, bias, initial; dbias and dinitial may be null
};

constexpr int64_t kSteps = 128, kChannels = 256;  // of a task, at most

// The order in which tokens are visited.
class Walk {
 public:
  explicit Walk(const Problem& p) : index_(p.index), starts_(p.starts), count_(p.start_count), length_(p.length), reverse_(p.reverse) {}

  int64_t token(int64_t step) const {
    const int64_t at = reverse_ ? length_ - 1 - step : step;
    return index_ ? index_[at] : at;
  }

  // The segment that contains a step: the taps see nothing before it begins.
  Range segment(int64_t step) const {
    const int64_t at = reverse_ ? length_ - 1 - step : step;
    int64_t low = 0, high = count_;  // the first start after `at`
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts_[middle] <= at) low = middle + 1;
      else high = middle;
    }
    const int64_t begin = low > 0 ? starts_[low - 1] : 0, end = low < count_ ? starts_[low] : length_;
    return reverse_ ? Range{length_ - end, length_ - begin} : Range{begin, end};
  }

 private:
  const int64_t *index_, *starts_;
  int64_t count_, length_;
  bool reverse_;
};

// The steps [begin, end) of image n for channel vectors [first, first + count).
struct Task {
  int64_t n, begin, end, first, count, share;
};

// How the work is cut.
template <class T> struct Plan {
  static constexpr int W = kLanes<T>;
  int64_t length, channels, past, vectors, packed;  // past: width - 1; packed: elements of the taps and the bias of one vector
  int64_t chunks, group, groups, shares, row;       // chunks of steps, vectors of a task, tasks per chunk, tasks that add to the same taps,
                                                    // elements of a task's row in scratch memory

  explicit Plan(const Problem& p)
      : length(p.length), channels(p.taps.channels), past(p.taps.count() - 1), vectors(p.taps.vectors<T>()), packed(p.taps.packed<T>()),
        chunks(ceil_div(length, kSteps)), group(ceil_div(vectors, ceil_div(vectors, kChannels / W))), groups(ceil_div(vectors, group)),
        shares(p.batch * chunks), row(group * W) {}

  int64_t tasks() const { return shares * groups; }
  Task task(int64_t i) const {
    const int64_t share = i / groups, begin = share % chunks * kSteps, first = i % groups * group;
    return {share / chunks, begin, least(length, begin + kSteps), first, least(group, vectors - first), share};
  }
  // The channels of a task.
  int64_t width(const Task& t) const { return least(t.count * W, channels - t.first * W); }
};

// A (b, l, d) tensor of any storage type whose rows are wanted in the compute type T.
template <class T> class Tokens {
 public:
  // data of an input is only read.
  Tokens(const Plan<T>& plan, const Walk& walk, const void* data, int64_t type, int64_t batch_stride, int64_t token_stride)
      : plan_(plan), walk_(walk), data_(const_cast<void*>(data)), type_(type), batch_stride_(batch_stride), token_stride_(token_stride) {}

  // Whether the tensor holds T, so that `at` may be used.
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
  int64_t offset(const Task& task, int64_t step) const {
    return task.n * batch_stride_ + walk_.token(step) * token_stride_ + task.first * kLanes<T>;
  }

  const Plan<T>& plan_;
  const Walk& walk_;
  void* data_;
  int64_t type_, batch_stride_, token_stride_;
};

// The rows of one tile of a tensor: its tokens in place where it holds T, else copies.
template <class T> class Rows {
 public:
  Rows(const Plan<T>& plan, const Tokens<T>& tokens) : tokens_(tokens), row_(plan.row), copies_(kTile * plan.row) {}

  // To be read.
  const T* const* load(const Task& task, int64_t step, int64_t steps) {
    for (int64_t t = 0; t < steps; ++t)
      if (!tokens_.in_place()) tokens_.load_row(task, step + t, copy(t));
    return store_into(task, step, steps);
  }
  // To be written, and then stored.
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

// A (b, d, width - 1) tensor of any storage type, or none: the tokens before the walk, or the last ones on it.
struct State {
  const void* data;
  int64_t type, stride[3];

  // row_c += slot_c for `channels` channels from `first` on.
  template <class T> void add_to(T* row, int64_t n, int64_t first, int64_t channels, int64_t slot) const {
    if (!data) return;
    with_storage(type, data, [&](const auto* source) {
      source += n * stride[0] + first * stride[1] + slot * stride[2];
      for (int64_t c = 0; c < channels; ++c) row[c] += to_compute<T>(source[c * stride[1]]);
    });
  }
};
template <class T> void store_state(void* data, int64_t type, int64_t at, int64_t stride, int64_t channels, const T* row) {
  with_storage(type, data, [&](auto* target) {
    for (int64_t c = 0; c < channels; ++c) target[at + c * stride] = to_storage<std::remove_reference_t<decltype(*target)>>(row[c]);
  });
}

// The rows that the tiles of a run see, one tile after the other.
template <class T> class Input {
 public:
  Input(const Plan<T>& plan, const Walk& walk, const Problem& p)
      : plan_(plan), x_(plan, walk, p.x, p.x_type, p.x_stride[0], p.x_stride[1]),
        initial_{p.initial, p.initial_type, {p.initial_stride[0], p.initial_stride[1], p.initial_stride[2]}}, slots_(kTile + plan.past),
        scratch_(slots_ * plan.row), rows_(slots_) {}

  void start(const Task& task, const Range& segment, int64_t step) {
    task_ = task;
    segment_ = segment;
    next_ = step - plan_.past;
  }

  // The rows of the steps [step - (width - 1), step + steps); what a tile reads beyond them are rows too.
  const T* const* see(int64_t step, int64_t steps) {
    for (int64_t i = 0; i < slots_; ++i) rows_.data()[i] = row(least(step + i - plan_.past, step + steps - 1));
    next_ = step + steps;
    return rows_.data();
  }

 private:
  const T* row(int64_t step) const {
    if (x_.in_place() && step >= segment_.begin) return x_.at(task_, step);
    T* row = scratch_.data() + (step + plan_.past) % slots_ * plan_.row;
    if (step < next_) return row;  // an earlier tile's
    if (step >= segment_.begin) {
      x_.load_row(task_, step, row);
    } else {
      std::memset(row, 0, static_cast<std::size_t>(plan_.row) * sizeof(T));
      if (segment_.begin == 0) initial_.add_to(row, task_.n, task_.first * kLanes<T>, plan_.width(task_), step + plan_.past);
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
  Range segment_;
  int64_t next_;  // the first step whose row has not been seen
};

// body(run, segment) for each part of a task that lies in one segment.
template <class Body> void each_run(const Walk& walk, const Task& task, const Body& body) {
  for (Range run = {task.begin, task.begin}; run.begin < task.end; run.begin = run.end) {
    const Range segment = walk.segment(run.begin);
    run.end = least(task.end, segment.end);
    body(run, segment);
  }
}

// f(step, steps) for each tile of a range.
template <class F> void each_tile(const Range& range, const F& f) {
  for (int64_t step = range.begin; step < range.end; step += kTile) f(step, least<int64_t>(kTile, range.end - step));
}

// The last width - 1 taps, oldest first, into a contiguous state (b, d, width - 1).
template <class T> void final_state(const Problem& p, const Plan<T>& plan, const Walk& walk, void* state) {
  Input<T> input(plan, walk, p);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t group = 0; group < plan.groups; ++group) {
      const Task task = plan.task((n * plan.chunks + plan.chunks - 1) * plan.groups + group);
      const int64_t at = (n * plan.channels + task.first * kLanes<T>) * plan.past;
      input.start(task, walk.segment(plan.length - 1), plan.length);
      const T* const* rows = input.see(plan.length, 0);
      for (int64_t slot = 0; slot < plan.past; ++slot) store_state(state, p.x_type, at + slot, plan.past, plan.width(task), rows[slot]);
    }
}

// body(task) for this thread's share of the tasks.
template <class T, class Body> void each_task(const Plan<T>& plan, const Team& team, const Body& body) {
  const Range mine = share(plan.tasks(), team);
  for (int64_t i = mine.begin; i < mine.end; ++i) body(plan.task(i));
}

// A contiguous tensor of x's shape and type, about to be written for the first time.
template <class T> Tokens<T> fresh(const Plan<T>& plan, const Walk& walk, const Problem& p, void* data) {
  const int64_t size = p.x_type == kFloat64 ? 8 : p.x_type == kFloat32 ? 4 : 2;
  prefer_huge_pages(data, p.batch * plan.length * plan.channels * size);
  return {plan, walk, data, p.x_type, plan.length * plan.channels, plan.channels};
}

template <class T> void forward(const Forward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Walk walk(p);
  const Tile<T> tile(p.taps.count());
  const Scratch<T> taps(plan.vectors * plan.packed);
  pack(p.taps, false, taps.data());
  const Tokens<T> out = fresh(plan, walk, p, a.out);
  parallel(least(p.threads, plan.tasks()), [&](const Team& team) {
    Input<T> input(plan, walk, p);
    Rows<T> rows(plan, out);
    each_task(plan, team, [&](const Task& task) {
      each_run(walk, task, [&](const Range& run, const Range& segment) {
        input.start(task, segment, run.begin);
        each_tile(run, [&](int64_t step, int64_t steps) {
          tile.convolve(input.see(step, steps), taps.data() + task.first * plan.packed, plan.past + 1, plan.width(task), p.silu, steps,
                        rows.store_into(task, step, steps));
          rows.store(task, step, steps);
        });
      });
    });
  });
  if (a.state) final_state(p, plan, walk, a.state);
}

// The gradients of one task after another, with one thread's scratch memory.
template <class T> class Adjoint {
 public:
  // taps, mirrored: packed.
  Adjoint(const Backward& a, const Plan<T>& plan, const Walk& walk, const Tokens<T>& dout, const Tokens<T>& dx, const T* taps, const T* mirrored)
      : a_(a), p_(a.problem), plan_(plan), walk_(walk), tile_(p_.taps.count()), dx_(dx), input_(plan, walk, p_), dout_rows_(plan, dout),
        dx_rows_(plan, dx), dstate_{a.dstate, p_.x_type, {a.dstate_stride[0], a.dstate_stride[1], a.dstate_stride[2]}}, taps_(taps),
        mirrored_(mirrored), g_((kSteps + plan.past) * plan.row), edge_(kTile * plan.row), zeros_(plan.row), seen_(kTile + plan.past) {
    std::memset(zeros_.data(), 0, static_cast<std::size_t>(plan.row) * sizeof(T));
  }

  // The gradients of the task's tokens, and its share of those of the taps and the bias.
  void run(const Task& task, T* sums) {
    std::memset(sums, 0, static_cast<std::size_t>(task.count * plan_.packed) * sizeof(T));
    each_run(walk_, task, [&](const Range& run, const Range& segment) {
      const Range seeing = {run.begin, least(run.end + plan_.past, segment.end)};  // the steps that see the run's tokens
      input_.start(task, segment, run.begin);
      each_tile(run, [&](int64_t step, int64_t steps) { differentiate(task, seeing, step, steps, sums); });
      each_tile({run.end, seeing.end}, [&](int64_t step, int64_t steps) { differentiate(task, seeing, step, steps, nullptr); });
      if (run.begin == 0 && a_.dinitial) each_tile({-plan_.past, 0}, [&](int64_t step, int64_t steps) { propagate(task, seeing, step, steps); });
      each_tile(run, [&](int64_t step, int64_t steps) { propagate(task, seeing, step, steps); });
    });
  }

 private:
  // g of a tile, into the scratch rows of the steps `seeing`.
  void differentiate(const Task& task, const Range& seeing, int64_t step, int64_t steps, T* sums) {
    T* g[kTile];
    for (int64_t t = 0; t < kTile; ++t) g[t] = g_.data() + (step + t - seeing.begin) * plan_.row;
    tile_.differentiate(input_.see(step, steps), taps_ + task.first * plan_.packed, plan_.past + 1, plan_.width(task), p_.silu, steps,
                        dout_rows_.load(task, step, steps), g, sums);
  }

  // The gradients of a tile's tokens from g, and at the end of the walk from that of the final state. Before step 0 the tokens are the
  // initial state's.
  void propagate(const Task& task, const Range& seeing, int64_t step, int64_t steps) {
    for (int64_t i = 0; i < kTile + plan_.past; ++i) {
      const int64_t at = step + i;
      seen_.data()[i] = at >= seeing.begin && at < seeing.end ? g_.data() + (at - seeing.begin) * plan_.row : zeros_.data();
    }
    const int64_t channels = plan_.width(task), first_kept = plan_.length - plan_.past;
    const bool kept = seeing.end == plan_.length && step + steps > first_kept;
    const auto convolve_into = [&](T* const* rows) {
      tile_.convolve(seen_.data(), mirrored_ + task.first * plan_.packed, plan_.past + 1, channels, false, steps, rows);
    };
    if (step >= 0 && !kept) {
      convolve_into(dx_rows_.store_into(task, step, steps));
      return dx_rows_.store(task, step, steps);
    }
    T* rows[kTile];
    for (int64_t t = 0; t < kTile; ++t) rows[t] = edge_.data() + t * plan_.row;
    convolve_into(rows);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = step + t;
      if (kept && at >= first_kept) dstate_.add_to(rows[t], task.n, task.first * kLanes<T>, channels, at - first_kept);
      if (at >= 0)
        dx_.store_row(task, at, rows[t]);
      else
        store_state(a_.dinitial, p_.initial_type, (task.n * plan_.channels + task.first * kLanes<T>) * plan_.past + at + plan_.past, plan_.past,
                    channels, rows[t]);
    }
  }

  const Backward& a_;
  const Problem& p_;
  const Plan<T>& plan_;
  const Walk& walk_;
  const Tile<T> tile_;
  const Tokens<T>& dx_;
  Input<T> input_;
  Rows<T> dout_rows_, dx_rows_;
  const State dstate_;
  const T *taps_, *mirrored_;
  const Scratch<T> g_, edge_, zeros_;
  const Scratch<const T*> seen_;
};

template <class T> void backward(const Backward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Walk walk(p);
  const Scratch<T> taps(plan.vectors * plan.packed), mirrored(plan.vectors * plan.packed), sums(plan.shares * plan.vectors * plan.packed);
  pack(p.taps, false, taps.data());
  pack(p.taps, true, mirrored.data());
  const Tokens<T> dout(plan, walk, a.dout, p.x_type, a.dout_stride[0], a.dout_stride[1]), dx = fresh(plan, walk, p, a.dx);
  parallel(least(p.threads, plan.tasks()), [&](const Team& team) {
    Adjoint<T> adjoint(a, plan, walk, dout, dx, taps.data(), mirrored.data());
    each_task(plan, team, [&](const Task& task) { adjoint.run(task, sums.data() + (task.share * plan.vectors + task.first) * plan.packed); });
  });
  reduce(p.taps, sums.data(), plan.shares, a.dweight, a.dbias, p.threads);
}

}  // namespace

MEDSSM_EXPORT(causal_conv1d_forward)(const Forward* a) { a->problem.wide ? forward<double>(*a) : forward<float>(*a); }
MEDSSM_EXPORT(causal_conv1d_backward)(const Backward* a) { a->problem.wide ? backward<double>(*a) : backward<float>(*a); }
