// A student's classes against the mean of its teachers' distributions: the mathematics of one
// class.
//
//   q    = sum_t w_t q_t / W,  p the student's softmax, both at a temperature
//   loss = scale sum_c (q log(q / p) + p - q)
//   d loss / d s   = scale (p - q) / temperature
//   d loss / d w_t = scale sum_c (q_t - q) log(q / p) / W
#pragma once

#include <limits>

#include "common.h"

namespace mtkd::mixtures {

// log(q / p), q for this at least the least normal number; 0 where p is 0. From the quotient where
// that is normal, so that a small divergence keeps its digits.
template <class A>
MTKD_INLINE A log_ratio(A q, A p, A log_p) {
  constexpr A kTiny = std::numeric_limits<A>::min();
  const bool normal = (q > kTiny) & (p > kTiny);
  const A least = q > kTiny ? q : kTiny;
  const A log = logarithm(normal ? q / p : least) - (normal ? A(0) : log_p);
  return log_p == -std::numeric_limits<A>::infinity() ? A(0) : log;
}

// A class's part of the loss. p - q sums to 0, and takes away what rounding of the two sums adds.
template <class A>
MTKD_INLINE A term(A q, A p, A log_p, A ratio) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  const bool missed = (q > 0) & (log_p == -kInfinity);
  return missed ? kInfinity : q * ratio + (p - q);
}

}  // namespace mtkd::mixtures
