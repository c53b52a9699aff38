// The C ABI of the kernels. It needs neither torch nor Python. A call takes a pointer to one packed struct of arguments, and returns a status.
//
// Every kernel file is compiled once per instruction set, with MEDSSM_ISA set to `base`, `v3` or `v4`. An exported kernel is written as
//
//   MEDSSM_EXPORT(ssd_forward, Arguments) { ... uses `a`, a const Arguments& ... }
//
// which defines both exported functions:
//
//   int64_t medssm_ssd_forward_v4(const Arguments*)   runs it; returns 0, or a status (failure.h); throws nothing
//   int64_t medssm_ssd_forward_bytes_v4()             the size of the struct; the loader compares it with the size that Python packs
//
// All fields of the struct are 8 bytes wide (pointers, int64_t, double). So there is no padding, and Python can pack it with struct.pack.
#pragma once
#include <cstdint>
#include <type_traits>

#include "medssm/failure.h"

#ifndef MEDSSM_ISA
#define MEDSSM_ISA base
#endif
#define MEDSSM_JOIN_(name, isa) medssm_##name##_##isa
#define MEDSSM_JOIN(name, isa) MEDSSM_JOIN_(name, isa)

#if defined(_WIN32)
#define MEDSSM_VISIBLE extern "C" __declspec(dllexport)
#else
#define MEDSSM_VISIBLE extern "C" __attribute__((visibility("default")))
#endif

#define MEDSSM_EXPORT(name, Arguments)                                                                                                   \
  static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) % 8 == 0, "fields of 8 bytes, as struct.pack writes them"); \
  static void run_##name(const Arguments& a);                                                                                            \
  MEDSSM_VISIBLE int64_t MEDSSM_JOIN(name##_bytes, MEDSSM_ISA)() { return sizeof(Arguments); }                                           \
  MEDSSM_VISIBLE int64_t MEDSSM_JOIN(name, MEDSSM_ISA)(const Arguments* a) {                                                             \
    return medssm::status_of([a] { run_##name(*a); });                                                                                   \
  }                                                                                                                                      \
  static void run_##name(const Arguments& a)

namespace medssm {
// Storage types, with the same numbers as in Python (kernels/native.py, DTYPES).
enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
}  // namespace medssm
