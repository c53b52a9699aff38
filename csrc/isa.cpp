// Which of the compiled variants this processor can run: "v4" (AVX-512), "v3" (AVX2, FMA, F16C) or "base".
#include "medssm/abi.h"

MEDSSM_VISIBLE const char* medssm_cpu_isa() {
#if defined(__x86_64__) && defined(MEDSSM_MULTI_ISA)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
    return "v3";
#endif
  return "base";
}
