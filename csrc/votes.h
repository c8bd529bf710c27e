// A student's classes against a vote, for CPU and CUDA: the mathematics of one number.
//
//   loss = log sum exp(s) - sum q s,  d loss / d s = softmax(s) - q
//   q of one teacher: the softmax of its logits, or uniform over its largest
#pragma once

#include "common.h"

namespace mtkd::votes {

// Shares of a vote that differ relatively by less are equal: sums of weights are rounded.
constexpr double kTied = 1e-5;

// exp(x) of x <= 0, which is a logit less the largest: 0 where that is no normal number, so that
// excluded classes, of -inf, get exactly nothing. NaN stays NaN.
template <class A>
MTKD_INLINE A exponential_of_excess(A x) {
  constexpr A kLeast = sizeof(A) == sizeof(float) ? A(-86.625) : A(-708);
  const A e = exponential_within(x);
  return x < kLeast ? A(0) : e;
}

// q s without 0 * inf, where a student excludes a class for which nobody votes.
template <class A>
MTKD_INLINE A product(A q, A s) {
  const A both = q * s;
  return q == A(0) ? A(0) : both;
}

}  // namespace mtkd::votes
