// What formulas are written in: Vec<T>, a vector of T on the CPU and a single T on a GPU, with splat, select, min, max, abs, fma, quotient,
// exp2 and exp_bounded on it.
#pragma once
#if defined(MEDSSM_DEVICE)
#include "medssm/device.h"
#else
#include "medssm/math.h"
#endif
