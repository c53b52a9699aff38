// Threads: OpenMP where the compiler has it (torch's own pool then), std::thread elsewhere.
//
//   parallel(threads, [&](Team& team) { for (i in share(items, team)) ...; team.barrier(); ... });
//
// One thread runs the body in place and enters no parallel region. What a body computes must not depend on team.size.
#pragma once
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace medssm {
namespace {

struct Range {
  int64_t begin, end;
};

#if defined(_OPENMP)

struct Team {
  int64_t rank, size;
  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

template <class Body> void parallel(int64_t threads, const Body& body) {
  if (threads <= 1) return body(Team{0, 1});
#pragma omp parallel num_threads(static_cast<int>(threads))
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

#else

class Gate {
 public:
  void pass(int64_t size) {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t mine = turn_;
    if (++arrived_ == size) {
      arrived_ = 0;
      ++turn_;
      opened_.notify_all();
    } else {
      opened_.wait(lock, [&] { return turn_ != mine; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  int64_t arrived_ = 0, turn_ = 0;
};

struct Team {
  int64_t rank, size;
  Gate* gate;
  void barrier() const {
    if (size > 1) gate->pass(size);
  }
};

template <class Body> void parallel(int64_t threads, const Body& body) {
  if (threads <= 1) return body(Team{0, 1, nullptr});
  Gate gate;
  std::vector<std::thread> others;
  for (int64_t rank = 1; rank < threads; ++rank) others.emplace_back([&, rank] { body(Team{rank, threads, &gate}); });
  body(Team{0, threads, &gate});
  for (std::thread& other : others) other.join();
}

#endif

// This thread's contiguous share of `items`, within one of each other's size.
inline __attribute__((unused)) Range share(int64_t items, const Team& team) {
  return {items * team.rank / team.size, items * (team.rank + 1) / team.size};
}

// Asks for 2 MiB pages inside a large fresh buffer: a first write then faults once per 2 MiB instead of once per 4 KiB.
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
