// Threads: a team of them runs one body together.
//
//   parallel(threads, [&](const Team& team) { for (i in share(items, team)) ...; team.barrier(); ... });
//
// One thread runs the body in place and enters no parallel region. What a body computes must not depend on team.size.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace medssm {

// csrc/threads.cpp, which is compiled once for all instruction sets.
using TeamBody = void (*)(void* context, int64_t rank, int64_t size, void* gate);
void run_team(int64_t threads, TeamBody body, void* context);
void team_barrier(void* gate);

namespace {

struct Range {
  int64_t begin, end;
};

struct Team {
  int64_t rank, size;
  void* gate;  // what team_barrier takes

  void barrier() const {
    if (size > 1) team_barrier(gate);
  }
};

template <class Body> void parallel(int64_t threads, const Body& body) {
  if (threads <= 1) return body(Team{0, 1, nullptr});
  const auto enter = [](void* context, int64_t rank, int64_t size, void* gate) { (*static_cast<const Body*>(context))(Team{rank, size, gate}); };
  run_team(threads, enter, const_cast<Body*>(&body));
}

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
