// The C ABI of the kernels: no torch, no Python, one packed argument block a call.
//
// Every kernel file is compiled once per instruction set with MEDSSM_ISA set to `base`, `v3` or `v4`; a function declared with
// MEDSSM_EXPORT(name) is exported as `medssm_<name>_<isa>` and takes a pointer to a struct whose fields are all 8 bytes wide
// (pointers, int64_t, double), so that Python can pack it with struct.pack and nothing depends on a compiler's padding.
#pragma once
#include <cstdint>

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
#define MEDSSM_EXPORT(name) MEDSSM_VISIBLE void MEDSSM_JOIN(name, MEDSSM_ISA)

namespace medssm {
// Storage types as Python names them (kernels/native.py, DTYPES).
enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
}  // namespace medssm
