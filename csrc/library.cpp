// Information about the CPU library: the package version it was built for, and the error of this thread's last failed kernel.
#include "medssm/abi.h"

namespace {
thread_local char last_error[sizeof(medssm::Failure::text)] = "";
}

void medssm::keep_error(const char* text) noexcept { std::strncpy(last_error, text, sizeof(last_error) - 1); }

MEDSSM_VISIBLE const char* medssm_cpu_version() { return MEDSSM_VERSION; }
MEDSSM_VISIBLE const char* medssm_cpu_error() { return last_error; }
