// Teams of threads for medssm/parallel.h: torch's OpenMP pool where this process has loaded torch, else std::thread.
//
// Nothing here is linked to an OpenMP library. torch's wheels carry an OpenMP runtime of their own, under a name that differs between
// platforms, and a second runtime would start a second pool of threads beside torch's. So its functions are looked up in torch at run time.
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "medssm/abi.h"
#include "medssm/parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#endif

namespace medssm {
namespace {

// The entry points that compilers call for `#pragma omp parallel` and `#pragma omp barrier`. libgomp, libomp and libiomp5 all have them.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
  void (*barrier)();
  int (*rank)();
  int (*size)();

  bool complete() const { return parallel && barrier && rank && size; }
};

#if defined(__linux__)

std::string path_of_torch() {
  std::string path;
  const auto look = [](dl_phdr_info* library, size_t, void* found) {
    const char* slash = std::strrchr(library->dlpi_name, '/');
    if (slash == nullptr || std::strcmp(slash + 1, "libtorch_cpu.so") != 0) return 0;
    *static_cast<std::string*>(found) = library->dlpi_name;
    return 1;
  };
  dl_iterate_phdr(look, &path);
  return path;
}

// dlsym on a library searches what it depends on: this finds the runtime that torch itself uses, and no other.
OpenMP look_up() {
  const std::string path = path_of_torch();
  void* torch = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return {};
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(torch, "GOMP_parallel"));
  found.barrier = reinterpret_cast<decltype(found.barrier)>(dlsym(torch, "GOMP_barrier"));
  found.rank = reinterpret_cast<decltype(found.rank)>(dlsym(torch, "omp_get_thread_num"));
  found.size = reinterpret_cast<decltype(found.size)>(dlsym(torch, "omp_get_num_threads"));
  return found;
}

#else

OpenMP look_up() { return {}; }

#endif

const OpenMP& openmp() {
  static const OpenMP found = look_up();
  return found;
}

// Where std::threads of a team wait for each other.
class Gate {
 public:
  // Called once, by the first thread: the others start now.
  void open(int64_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_ = size;
    moved_.notify_all();
  }

  // The team's size, as soon as it is known.
  int64_t size() {
    std::unique_lock<std::mutex> lock(mutex_);
    moved_.wait(lock, [&] { return size_ > 0; });
    return size_;
  }

  void pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t turn = turn_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++turn_;
      moved_.notify_all();
    } else {
      moved_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable moved_;
  int64_t size_ = 0, arrived_ = 0, turn_ = 0;
};

void run_threads(int64_t threads, TeamBody body, void* context) {
  Gate gate;
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    for (int64_t rank = 1; rank < threads; ++rank) others.emplace_back([&gate, body, context, rank] { body(context, rank, gate.size(), &gate); });
  } catch (const std::exception&) {
    // The system starts no more threads, or has no memory for them: the team is smaller than asked, which changes no result.
  }
  gate.open(static_cast<int64_t>(others.size()) + 1);
  body(context, 0, gate.size(), &gate);
  for (std::thread& other : others) other.join();
}

}  // namespace

void run_team(int64_t threads, TeamBody body, void* context) {
  if (!openmp().complete()) return run_threads(threads, body, context);
  struct Call {
    TeamBody body;
    void* context;
  } call{body, context};
  const auto enter = [](void* data) {
    const Call& call = *static_cast<Call*>(data);
    call.body(call.context, openmp().rank(), openmp().size(), nullptr);
  };
  openmp().parallel(enter, &call, static_cast<unsigned>(threads), 0);
}

void team_barrier(void* gate) { gate != nullptr ? static_cast<Gate*>(gate)->pass() : openmp().barrier(); }

}  // namespace medssm

// "OpenMP" (torch's pool) or "std::thread".
MEDSSM_VISIBLE const char* medssm_cpu_threads() { return medssm::openmp().complete() ? "OpenMP" : "std::thread"; }
