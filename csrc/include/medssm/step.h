// One step of the recurrence and of its adjoint, for one state: of a vector of channels on the CPU, or of one channel on a GPU.
//
//   h_t = e_t h_{t-1} + s_t u_t B_t,  e_t = 2^(s_t rate),  rate = A log2(e);  y_t = C_t . h_t
//
// With g_t the gradient of h_t that comes from later steps:
//
//   dh_t = g_t + dy_t C_t                        dC_t = sum over channels of dy_t h_t
//   g_{t-1} = e_t dh_t                           dB_t = sum over channels of dh_t s_t u_t
//   w_t = g_{t-1} h_{t-1}, the gradient of s_t A    dA = sum over t of w_t s_t
//   along_A_t = sum over n of w_t rate_n         along_B_t = sum over n of dh_t B_t   (ds = u along_B + ln 2 along_A, du = s along_B)
#pragma once
#include "medssm/lanes.h"

namespace medssm {
namespace {

// h_t from h_{t-1}.
template <class T> MEDSSM_INLINE Vec<T> next_state(Vec<T> e, Vec<T> h, Vec<T> su, T B) { return fma(e, h, su * B); }

// The terms of dB_t and dC_t from one state, before they are summed over channels.
template <class T> struct RowTerms {
  Vec<T> dB, dC;
};

// Replaces g by g_{t-1}, and adds to dA, along_A and along_B. h is h_t, and before is h_{t-1}.
template <class T> MEDSSM_INLINE RowTerms<T> step_back(Vec<T> e, Vec<T> h, Vec<T> before, Vec<T> s, Vec<T> su, Vec<T> dy, Vec<T> rate, T B, T C,
                                                       Vec<T>& g, Vec<T>& dA, Vec<T>& along_A, Vec<T>& along_B) {
  const Vec<T> dh = fma(splat(C), dy, g);
  along_B = fma(splat(B), dh, along_B);
  g = e * dh;
  const Vec<T> w = g * before;
  along_A = fma(w, rate, along_A);
  dA = fma(w, s, dA);
  return {dh * su, dy * h};
}

}  // namespace
}  // namespace medssm
