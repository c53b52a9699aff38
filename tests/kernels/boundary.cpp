// Kernels that fail, for test_boundary.py: a thread throws in one of three phases, and memory that no machine has is asked for.
#include <stdexcept>

#include "medssm/abi.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"

using namespace medssm;

namespace {

struct Throw {
  int64_t threads, rank, phase;  // who throws, and where: -1 for nobody
  int64_t* done;                 // how many threads got through each phase
};

void step(const Throw& a, const Team& team, int64_t phase) {
  if (phase == a.phase && (team.rank == a.rank || a.rank == team.size)) throw std::runtime_error("thrown on purpose");
  __atomic_add_fetch(a.done + phase, 1, __ATOMIC_RELAXED);
}

struct Take {
  int64_t bytes, threads, rank;  // who asks for them: -1 for the caller, before the threads begin
};

}  // namespace

MEDSSM_EXPORT(throw_at_once, Throw) {
  parallel(a.threads, [&](const Team& team) { step(a, team, 0); });
}

MEDSSM_EXPORT(throw_between_barriers, Throw) {
  parallel_phases(a.threads, [&](PhasedTeam& team) {
    step(a, team, 0);
    team.barrier();
    step(a, team, 1);
    team.barrier();
    step(a, team, 2);
  });
}

MEDSSM_EXPORT(take_memory, Take) {
  const PerThread<Scratch<char>> memory(2, [&] { return Scratch<char>(a.rank < 0 ? a.bytes : 1); });
  parallel(a.threads, [&](const Team& team) {
    if (team.rank == a.rank) Scratch<char> more(a.bytes);
  });
}
