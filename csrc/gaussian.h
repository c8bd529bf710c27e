// The Gaussian negative log-likelihood of one number, for CPU and CUDA.
//
//   z = (target - mean) exp(-s),  s = log_std, or b tanh(log_std / b) with a bound b
//   energy = z^2 / 2 + s,  d energy / d mean = -z exp(-s),  d energy / d s = 1 - z^2
#pragma once

#include "common.h"

namespace mtkd::gaussian {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

template <class A>
struct Element {
  A energy, mean_grad, log_std_grad;
};

// `grad` scales the gradients; it comes first, so that a 0 meets z, not a z^2 that is infinite.
template <bool Bounded, class A>
MTKD_INLINE Element<A> element(A mean, A log_std, A target, A bound, A inverse_bound, A grad) {
  const auto ratio = Bounded ? tanh_and_slope(log_std * inverse_bound) : ValueAndSlope<A>{0, 1};
  if constexpr (Bounded) log_std = bound * ratio.value;
  const A inverse_std = exponential(-log_std);
  const A z = (target - mean) * inverse_std;
  const A gz = grad * z;
  return {A(0.5) * z * z + log_std, -gz * inverse_std, (grad - gz * z) * ratio.slope};
}

}  // namespace mtkd::gaussian
