// What this library was compiled for, for `medssm doctor`.
#include "medssm/abi.h"

#ifndef MEDSSM_TARGETS
#define MEDSSM_TARGETS "emulation"
#endif

MEDSSM_VISIBLE const char* medssm_cuda_targets() { return MEDSSM_TARGETS; }
