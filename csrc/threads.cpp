// Teams of threads for medssm/parallel.h. They are threads of torch's OpenMP pool if this process has loaded torch, otherwise std::threads.
//
// This file is not linked to an OpenMP library. torch's wheels include their own OpenMP runtime, whose name differs between platforms. A second
// runtime would start a second thread pool. So the functions of torch's runtime are looked up at run time.
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

// The functions that compilers call for `#pragma omp parallel` and `#pragma omp barrier`. libgomp, libomp and libiomp5 all have them.
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

// dlsym on a library also searches the libraries it depends on. So this finds the runtime that torch itself uses.
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

// A barrier for a team of std::threads.
class Barrier {
 public:
  // Called once, by the first thread. The other threads wait in size() until then.
  void start(int64_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_ = size;
    changed_.notify_all();
  }

  // Waits until the team's size is known, and returns it.
  int64_t size() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return size_ > 0; });
    return size_;
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t phase = phase_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++phase_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return phase_ != phase; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t size_ = 0, arrived_ = 0, phase_ = 0;
};

void run_threads(int64_t threads, TeamBody body, void* context) {
  Barrier barrier;
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    for (int64_t rank = 1; rank < threads; ++rank)
      others.emplace_back([&barrier, body, context, rank] { body(context, rank, barrier.size(), &barrier); });
  } catch (const std::exception&) {
    // The system cannot start more threads, or there is no memory for them. The team is smaller than requested; this changes no result.
  }
  barrier.start(static_cast<int64_t>(others.size()) + 1);
  body(context, 0, barrier.size(), &barrier);
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

void team_barrier(void* barrier) { barrier != nullptr ? static_cast<Barrier*>(barrier)->wait() : openmp().barrier(); }

}  // namespace medssm

// Which threads are used: "OpenMP" (torch's pool) or "std::thread".
MEDSSM_VISIBLE const char* medssm_cpu_threads() { return medssm::openmp().complete() ? "OpenMP" : "std::thread"; }
