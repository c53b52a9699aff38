// Runs a function (the body) on a team of threads.
//
//   parallel(threads, [&](const Team& team) { for (i in share(items, team)) ...; });
//   parallel_phases(threads, [&](PhasedTeam& team) { ...; team.barrier(); ...; });       // if threads must wait for each other
//
// With one thread, the body runs on the calling thread, without a parallel region. The results of a body must not depend on team.size, which may be
// smaller than `threads`. Bodies should not allocate memory; PerThread (scratch.h) allocates before they start. If a body throws, the exception does
// not leave its thread, no other thread waits at a barrier forever, and the call throws a Failure at the end.
#pragma once
#include <atomic>
#include <cstdint>

#include "medssm/failure.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace medssm {

// Defined in csrc/threads.cpp, which is compiled once for all instruction sets. A TeamBody must not throw.
using TeamBody = void (*)(void* context, int64_t rank, int64_t size, void* gate);
void run_team(int64_t threads, TeamBody body, void* context);
void team_barrier(void* gate);

namespace {

struct Range {
  int64_t begin, end;
};

struct Team {
  int64_t rank, size;
};

// The first failure of a team's threads.
class FirstFailure {
 public:
  void keep() noexcept {
    if (!taken_.exchange(true)) failure_ = Failure::current();
  }
  // Call after all threads have finished.
  void rethrow() const {
    if (failure_.status) throw failure_;
  }

 private:
  std::atomic<bool> taken_{false};
  Failure failure_;
};

template <class Body> void parallel(int64_t threads, const Body& body) {
  if (threads <= 1) return body(Team{0, 1});
  struct Call {
    const Body& body;
    FirstFailure failure;
  } call{body, {}};
  const auto enter = [](void* context, int64_t rank, int64_t size, void*) {
    Call& call = *static_cast<Call*>(context);
    try {
      call.body(Team{rank, size});
    } catch (...) { call.failure.keep(); }
  };
  run_team(threads, enter, &call);
  call.failure.rethrow();
}

// A team whose threads wait for each other at barriers. Barriers divide a body into phases. If a thread fails in a phase, it still waits at the
// barrier at the end of this phase, and all other threads stop at the same barrier. A thread that has finished its body waits at one more barrier,
// because a thread that failed in the last phase waits there too.
class PhasedTeam : public Team {
 public:
  struct Shared {
    FirstFailure failure;
    std::atomic<int64_t> failed{INT64_MAX};  // the first phase in which a thread failed
  };

  PhasedTeam(int64_t rank, int64_t size, void* gate, Shared* shared) : Team{rank, size}, gate_(gate), shared_(shared) {}

  void barrier() {
    if (size == 1) return;
    team_barrier(gate_);
    // Another thread may already be in the next phase and fail there. That failure must not count here, because all threads must stop at the same
    // barrier.
    if (shared_->failed.load() <= phase_++) throw Cancelled();
  }

  template <class Body> void run(const Body& body) noexcept {
    try {
      body(*this);
    } catch (const Cancelled&) { return; } catch (...) {
      shared_->failure.keep();
      for (int64_t first = shared_->failed.load(); phase_ < first && !shared_->failed.compare_exchange_weak(first, phase_);) continue;
    }
    if (size > 1) team_barrier(gate_);
  }

 private:
  struct Cancelled {};
  void* gate_;  // the argument of team_barrier
  Shared* shared_;
  int64_t phase_ = 0;
};

template <class Body> void parallel_phases(int64_t threads, const Body& body) {
  if (threads <= 1) {
    PhasedTeam alone(0, 1, nullptr, nullptr);
    return body(alone);
  }
  struct Call {
    const Body& body;
    PhasedTeam::Shared shared;
  } call{body, {}};
  const auto enter = [](void* context, int64_t rank, int64_t size, void* gate) {
    Call& call = *static_cast<Call*>(context);
    PhasedTeam(rank, size, gate, &call.shared).run(call.body);
  };
  run_team(threads, enter, &call);
  call.shared.failure.rethrow();
}

// This thread's contiguous share of `items`. The sizes of the shares differ by at most one.
inline __attribute__((unused)) Range share(int64_t items, const Team& team) {
  return {items * team.rank / team.size, items * (team.rank + 1) / team.size};
}

// Requests 2 MiB pages for a large new buffer. The first writes then cause one page fault per 2 MiB instead of one per 4 KiB.
inline __attribute__((unused)) void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(4 * kHuge)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace
}  // namespace medssm
