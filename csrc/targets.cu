// Information about the CUDA library: the package version it was built for, and the GPU architectures it was compiled for.
#include "medssm/abi.h"

#ifndef MEDSSM_TARGETS
#define MEDSSM_TARGETS "emulation"
#endif

MEDSSM_VISIBLE const char* medssm_cuda_version() { return MEDSSM_VERSION; }
MEDSSM_VISIBLE const char* medssm_cuda_targets() { return MEDSSM_TARGETS; }
