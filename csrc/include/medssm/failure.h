// Errors of kernels. Inside a kernel a Failure is thrown; exported functions catch it and return its status.
#pragma once
#include <cstdint>
#include <cstring>
#include <exception>

namespace medssm {

// Keeps the text of this thread's last failure for medssm_cpu_error (csrc/library.cpp).
void keep_error(const char* text) noexcept;

namespace {

struct Failure {
  int64_t status = 0;  // 0: no failure; positive: the number of bytes that could not be allocated; negative: any other failure, described by `text`
  char text[160] = "";

  static Failure no_memory(int64_t bytes) {
    Failure failure;
    failure.status = bytes > 0 ? bytes : INT64_MAX;
    return failure;
  }

  // The failure for the exception that is being handled. Call it in a catch block.
  static Failure current() noexcept {
    Failure failure;
    failure.status = -1;
    try {
      throw;
    } catch (const Failure& thrown) { return thrown; } catch (const std::exception& thrown) {
      std::strncpy(failure.text, thrown.what(), sizeof(failure.text) - 1);
    } catch (...) { std::strncpy(failure.text, "an unknown exception", sizeof(failure.text) - 1); }
    return failure;
  }
};

// Runs a kernel and returns its status (see Failure).
template <class Body> int64_t status_of(const Body& body) noexcept {
  try {
    body();
    return 0;
  } catch (...) {
    const Failure failure = Failure::current();
    keep_error(failure.text);
    return failure.status;
  }
}

}  // namespace
}  // namespace medssm
