// Causal depthwise convolution along a walk through the tokens (b, l, d), channels adjacent.
//
// A task computes kSteps steps of the walk for some vectors of channels, kTile steps at a time. A tile gets pointers to the rows that it reads and
// writes, so any order of tokens costs one index look-up per token and no copy. Rows in another type than the compute type are converted into scratch
// memory. Rows before the start of a segment (zeros, or the initial state) are also created there.
//
// Backward: g = dout act'(pre), where pre is recomputed. g is kept in scratch memory for the task's steps and the width - 1 steps after them. dx is
// the convolution of g with the mirrored taps. Each task computes its own share of dweight. The shares are added in a fixed order, in double
// precision. Tasks depend only on the shapes, so any number of threads gives the same bits.
#include "medssm/abi.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"
#include "medssm/taps.h"
#include "problem.h"
#include "rows.h"
#include "tile.h"

using namespace medssm;

namespace {

// Calls body(run, segment) for each part of a task inside one segment.
template <class Body> void each_run(const Walk& walk, const Task& task, const Body& body) {
  for (Range run = {task.begin, task.begin}; run.begin < task.end; run.begin = run.end) {
    const Segment segment = walk.segment(run.begin);
    run.end = least(task.end, segment.end);
    body(run, segment);
  }
}

// Calls f(step, steps) for each tile of a range.
template <class F> void each_tile(const Range& range, const F& f) {
  for (int64_t step = range.begin; step < range.end; step += kTile) f(step, least<int64_t>(kTile, range.end - step));
}

// Calls body(task) for this thread's share of the tasks.
template <class T, class Body> void each_task(const Plan<T>& plan, const Team& team, const Body& body) {
  const Range mine = share(plan.tasks(), team);
  for (int64_t i = mine.begin; i < mine.end; ++i) body(plan.task(i));
  finish_streaming();
}

// A new contiguous output with x's shape and type.
template <class T> Tokens<T> new_output(const Plan<T>& plan, const Walk& walk, const Problem& p, void* data) {
  const int64_t size = p.x_type == kFloat64 ? 8 : p.x_type == kFloat32 ? 4 : 2;
  prefer_huge_pages(data, plan.elements * size);
  return {plan, walk, data, p.x_type, plan.length * plan.channels, plan.channels};
}

template <class T> void forward(const Forward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Walk walk(p);
  const Tile<T> tile(p.taps.count());
  const Scratch<T> taps(plan.vectors * plan.packed);
  pack(p.taps, false, taps.data());
  const Tokens<T> out = new_output(plan, walk, p, a.out);
  struct Own {
    Input<T> input;
    Rows<T> rows;
  };
  const int64_t threads = threads_for(p.threads, plan.tasks(), plan.elements);
  const PerThread<Own> own(threads, [&] { return Own{Input<T>(plan, walk, p), Rows<T>(plan, out)}; });
  parallel(threads, [&](const Team& team) {
    Input<T>& input = own[team.rank].input;
    Rows<T>& rows = own[team.rank].rows;
    each_task(plan, team, [&](const Task& task) {
      each_run(walk, task, [&](const Range& run, const Segment& segment) {
        input.start(task, segment, run.begin);
        each_tile(run, [&](int64_t step, int64_t steps) {
          tile.convolve(input.window(step, steps), taps.data() + task.first * plan.packed, plan.past + 1, plan.width(task), p.silu, steps,
                        rows.store_into(task, step, steps), out.streams());
          rows.store(task, step, steps);
        });
        if (!a.state || run.end < segment.end || !segment.ends_sequence) return;
        const T* const* last = input.window(run.end, 0);
        for (int64_t slot = 0; slot < plan.past; ++slot)
          store_state(a.state, p.x_type, plan.slots(task, segment.sequence) + slot, plan.past, plan.width(task), last[slot]);
      });
    });
  });
}

// Computes the gradients of tasks, one after the other, with the scratch memory of one thread.
template <class T> class Adjoint {
 public:
  // taps and mirrored are packed (medssm/taps.h).
  Adjoint(const Backward& a, const Plan<T>& plan, const Walk& walk, const Tokens<T>& dout, const Tokens<T>& dx, const T* taps, const T* mirrored) :
      a_(a),
      p_(a.problem),
      plan_(plan),
      walk_(walk),
      tile_(p_.taps.count()),
      dx_(dx),
      input_(plan, walk, p_),
      dout_rows_(plan, dout),
      dx_rows_(plan, dx),
      dstate_{a.dstate, p_.x_type, {a.dstate_stride[0], a.dstate_stride[1], a.dstate_stride[2]}},
      taps_(taps),
      mirrored_(mirrored),
      g_((kSteps + plan.past) * plan.row),
      edge_(kTile * plan.row),
      zeros_(plan.row),
      window_(kTile + plan.past) {
    std::memset(zeros_.data(), 0, static_cast<std::size_t>(plan.row) * sizeof(T));
  }

  // Writes the gradients of the task's tokens, and stores its share of the gradients of the taps and the bias in `sums`.
  void run(const Task& task, T* sums) {
    std::memset(sums, 0, static_cast<std::size_t>(task.count * plan_.packed) * sizeof(T));
    each_run(walk_, task, [&](const Range& run, const Segment& segment) {
      const Range readers = {run.begin, least(run.end + plan_.past, segment.end)};  // the steps whose taps read the run's tokens
      input_.start(task, segment, run.begin);
      each_tile(run, [&](int64_t step, int64_t steps) { differentiate(task, readers, step, steps, sums); });
      each_tile({run.end, readers.end}, [&](int64_t step, int64_t steps) { differentiate(task, readers, step, steps, nullptr); });
      const auto propagate_tile = [&](int64_t step, int64_t steps) { propagate(task, segment, readers, step, steps); };
      if (run.begin == segment.begin && segment.begins_sequence && a_.dinitial) each_tile({run.begin - plan_.past, run.begin}, propagate_tile);
      each_tile(run, propagate_tile);
    });
  }

 private:
  // Computes g of a tile. The scratch memory has one row for each step of `readers`.
  void differentiate(const Task& task, const Range& readers, int64_t step, int64_t steps, T* sums) {
    T* g[kTile];
    for (int64_t t = 0; t < steps; ++t) g[t] = g_.data() + (step + t - readers.begin) * plan_.row;
    tile_.differentiate(input_.window(step, steps), taps_ + task.first * plan_.packed, plan_.past + 1, plan_.width(task), p_.silu, steps,
                        dout_rows_.load(task, step, steps), g, sums);
  }

  // Computes the gradients of a tile's tokens from g. At the end of a sequence the gradient of the final state is added. Tokens before the segment
  // belong to the initial state.
  void propagate(const Task& task, const Segment& segment, const Range& readers, int64_t step, int64_t steps) {
    for (int64_t i = 0; i < kTile + plan_.past; ++i) {
      const int64_t at = step + i;
      window_.data()[i] = at >= readers.begin && at < readers.end ? g_.data() + (at - readers.begin) * plan_.row : zeros_.data();
    }
    const int64_t channels = plan_.width(task), first_kept = segment.end - plan_.past;
    const bool kept = dstate_.data && segment.ends_sequence && readers.end == segment.end && step + steps > first_kept;
    const auto convolve_into = [&](T* const* rows, bool stream) {
      tile_.convolve(window_.data(), mirrored_ + task.first * plan_.packed, plan_.past + 1, channels, false, steps, rows, stream);
    };
    if (step >= segment.begin && !kept) {
      convolve_into(dx_rows_.store_into(task, step, steps), dx_.streams());
      return dx_rows_.store(task, step, steps);
    }
    T* rows[kTile];
    for (int64_t t = 0; t < kTile; ++t) rows[t] = edge_.data() + t * plan_.row;
    convolve_into(rows, false);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = step + t;
      if (kept && at >= first_kept) dstate_.add_to(rows[t], task.n + segment.sequence, task.first * kLanes<T>, channels, at - first_kept);
      if (at >= segment.begin)
        dx_.store_row(task, at, rows[t]);
      else
        store_state(a_.dinitial, p_.initial_type, plan_.slots(task, segment.sequence) + at - segment.begin + plan_.past, plan_.past, channels,
                    rows[t]);
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
  const Scratch<const T*> window_;
};

template <class T> void backward(const Backward& a) {
  const Problem& p = a.problem;
  const Plan<T> plan(p);
  const Walk walk(p);
  const Scratch<T> taps(plan.vectors * plan.packed), mirrored(plan.vectors * plan.packed), sums(plan.shares * plan.vectors * plan.packed);
  pack(p.taps, false, taps.data());
  pack(p.taps, true, mirrored.data());
  const Tokens<T> dout(plan, walk, a.dout, p.x_type, a.dout_stride[0], a.dout_stride[1]), dx = new_output(plan, walk, p, a.dx);
  const int64_t threads = threads_for(p.threads, plan.tasks(), plan.elements);
  const PerThread<Adjoint<T>> own(threads, [&] { return Adjoint<T>(a, plan, walk, dout, dx, taps.data(), mirrored.data()); });
  parallel(threads, [&](const Team& team) {
    each_task(plan, team, [&](const Task& task) { own[team.rank].run(task, sums.data() + (task.share * plan.vectors + task.first) * plan.packed); });
  });
  reduce(p.taps, sums.data(), plan.shares, a.dweight, a.dbias, p.threads);
}

}  // namespace

MEDSSM_EXPORT(causal_conv1d_forward, Forward) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
MEDSSM_EXPORT(causal_conv1d_backward, Backward) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
