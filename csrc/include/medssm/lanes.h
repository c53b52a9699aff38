// Vec<T> and its functions, for code that is compiled for both the CPU and a GPU. Vec<T> is a vector of T on the CPU and a single T on a GPU.
// Functions: splat, select, min, max, abs, fma, quotient, exp2 and exp_bounded.
#pragma once
#if defined(MEDSSM_DEVICE)
#include "medssm/device.h"
#else
#include "medssm/math.h"
#endif
