// An upper bound for the speed of a selective scan on this processor, used by the benchmark. It does only the arithmetic of the recurrence, on data
// in registers and the first-level cache.
//
// Per token, channel and state (16 states): one exponential, one product and two FMAs. No softplus, D, gate, type conversion or main memory.
#include "medssm/math.h"
#include "medssm/parallel.h"

using namespace medssm;

namespace {

struct Arguments {
  int64_t channels, tokens, threads;  // channels: rounded up to whole vectors
  float* sum;                         // one output value, so that the compiler does not remove the work
};

constexpr int kStates = 16, kSteps = 64, W = kLanes<float>;

// Computes kSteps steps of the recurrence for one vector of channels.
__attribute__((noinline)) Floats steps(const float* rates, const float* s, const float* B, const float* C, float* state) {
  Floats h[kStates], total{};
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n) h[n] = load<float>(state + n * W);
  for (int t = 0; t < kSteps; ++t) {
    const Floats step = load<float>(s + t * W);
    Floats y[2] = {};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      h[n] = fma(exp2_bounded<float>(step * load<float>(rates + n * W)), h[n], step * B[t * kStates + n]);
      y[n % 2] = fma(splat(C[t * kStates + n]), h[n], y[n % 2]);
    }
    total += y[0] + y[1];
  }
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n) store(state + n * W, h[n]);
  return total;
}

}  // namespace

MEDSSM_EXPORT(ceiling_scan, Arguments) {
  const int64_t blocks = (a.channels + W - 1) / W;
  parallel(least(a.threads, blocks), [&](const Team& team) {
    alignas(64) float rates[kStates * W], s[kSteps * W], B[kSteps * kStates], C[kSteps * kStates], state[kStates * W] = {};
    for (int i = 0; i < kStates * W; ++i) rates[i] = -1.f - i / W;
    for (int i = 0; i < kSteps * W; ++i) s[i] = 0.01f + 0.001f * (i % 97);
    for (int i = 0; i < kSteps * kStates; ++i) B[i] = 0.5f - 0.01f * (i % 89), C[i] = 0.4f - 0.01f * (i % 83);
    Floats total{};
    for (int64_t block = share(blocks, team).begin; block < share(blocks, team).end; ++block)
      for (int64_t t = 0; t < a.tokens; t += kSteps) total += steps(rates, s, B, C, state);
    if (team.rank == 0) *a.sum = sum_lanes(total);
  });
}
