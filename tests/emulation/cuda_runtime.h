// CUDA's runtime as far as medssm's kernels use it, on a CPU: for tests without a GPU.
//
// A block's threads are fibers of one thread, run in turn: each up to its next __syncthreads or shuffle, which it leaves when all threads of the
// block or the warp have arrived; now the first thread goes first, now the last, so that what depends on their order shows. Blocks run one after
// another. A block whose threads wait at different places stops the process with a message. A block's shared memory starts out as NaNs, so that what
// is read before it is written shows.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline, unused))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace emulation {

enum Waits { kRuns, kForBlock, kForWarp, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  Waits waits = kRuns;
  std::unique_ptr<char[]> stack{new char[kStack]};
  static constexpr std::size_t kStack = 96 << 10;
};

struct State {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> body;
  std::vector<char> shared;
  jmp_buf scheduler;
  ucontext_t home;
  int current = 0;
  double slots[2][1024];  // what the threads hand over in a shuffle, by turns
  int turn[1024];
};
inline State state;
inline dim3 thread, block, threads, blocks;

// Back to the scheduler until what this thread waits for has come.
inline void wait(Waits what) {
  Fiber& own = *state.fibers[state.current];
  own.waits = what;
  if (_setjmp(own.at) == 0) _longjmp(state.scheduler, 1);
}

inline void enter() {
  state.body();
  state.fibers[state.current]->waits = kDone;
  _longjmp(state.scheduler, 1);
}

inline void resume(int i) {
  Fiber& fiber = *state.fibers[i];
  state.current = i;
  thread.x = static_cast<unsigned>(i);
  if (_setjmp(state.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = Fiber::kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  swapcontext(&state.home, &fiber.start);
}

// Whether all of threads [from, to) wait for `what`; they then run on.
inline bool release(int from, int to, Waits what) {
  for (int i = from; i < to; ++i)
    if (state.fibers[i]->waits != what) return false;
  for (int i = from; i < to; ++i) state.fibers[i]->waits = kRuns;
  return true;
}

inline void run_block(int count) {
  for (int i = 0; i < count; ++i) {
    state.fibers[i]->started = false;
    state.fibers[i]->waits = kRuns;
    state.turn[i] = 0;
  }
  for (bool forwards = true;; forwards = !forwards) {
    bool ran = false, done = true;
    for (int k = 0; k < count; ++k) {
      const int i = forwards ? k : count - 1 - k;
      if (state.fibers[i]->waits == kRuns) {
        resume(i);
        ran = true;
      }
      done &= state.fibers[i]->waits == kDone;
    }
    if (done) return;
    for (int i = 0; i < count; i += 32) ran |= release(i, i + 32 < count ? i + 32 : count, kForWarp);
    ran |= release(0, count, kForBlock);
    if (!ran) {
      std::fprintf(stderr, "emulation: the threads of block %u wait at different places\n", block.x);
      std::abort();
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::threads
#define gridDim emulation::blocks

inline void __syncthreads() { emulation::wait(emulation::kForBlock); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  emulation::State& s = emulation::state;
  const int own = s.current, turn = s.turn[own]++ % 2;
  std::memcpy(&s.slots[turn][own], &value, sizeof(T));
  emulation::wait(emulation::kForWarp);
  T other;
  std::memcpy(&other, &s.slots[turn][own / 32 * 32 + ((own % 32) ^ mask)], sizeof(T));
  return other;
}

namespace medssm {
namespace {

template <class T> T* shared_memory() { return reinterpret_cast<T*>(emulation::state.shared.data()); }

template <class... P, class... A> void launch(void (*kernel)(P...), int64_t blocks, int threads, std::size_t bytes, void*, A... arguments) {
  emulation::State& s = emulation::state;
  if (threads % 32 || threads > 1024) {
    std::fprintf(stderr, "emulation: a block has whole warps and at most 1,024 threads, got %d\n", threads);
    std::abort();
  }
  while (static_cast<int>(s.fibers.size()) < threads) s.fibers.push_back(std::make_unique<emulation::Fiber>());
  s.body = [=] { kernel(arguments...); };
  emulation::threads.x = static_cast<unsigned>(threads);
  emulation::blocks.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    s.shared.assign(bytes, static_cast<char>(0xff));
    emulation::block.x = static_cast<unsigned>(i);
    emulation::run_block(threads);
  }
}

}  // namespace
}  // namespace medssm
