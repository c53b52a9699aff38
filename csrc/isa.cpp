// Chooses the best of the compiled instruction sets that this processor supports: "v4" (AVX-512), "v3" (AVX2, FMA, F16C) or "base".
#include "medssm/abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)

// Read from CPUID, because __builtin_cpu_supports of clang 16 has no names for these features. They use the same registers as AVX2, so the operating
// system support that __builtin_cpu_supports checks for AVX2 is enough.
bool has_f16c_movbe_lzcnt() {
  constexpr unsigned kF16C = 1u << 29, kMovbe = 1u << 22, kLzcnt = 1u << 5;
  unsigned eax, ebx, ecx, edx, extended;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !__get_cpuid(0x80000001, &eax, &ebx, &extended, &edx)) return false;
  return (ecx & kF16C) && (ecx & kMovbe) && (extended & kLzcnt);
}

[[maybe_unused]] bool runs_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         has_f16c_movbe_lzcnt();
}

[[maybe_unused]] bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif

}  // namespace

// The name of the best instruction set that was compiled and that this processor supports.
MEDSSM_VISIBLE const char* medssm_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(MEDSSM_HAS_v4)
  if (runs_v4()) return "v4";
#endif
#if defined(MEDSSM_HAS_v3)
  if (runs_v3()) return "v3";
#endif
#endif
  return "base";
}
