// Divergence between two sides' distributions over a teacher's classes, for CPU and CUDA: one
// class, then one row.
//
//   p = exp(a) / sum exp(a),  a = (logit - largest) / temperature, and likewise for both sides
//   loss = scale (forward KL(p_T || p_S) + reverse KL(p_S || p_T)), or with the mixture
//          m = forward p_T + reverse p_S  scale (forward KL(p_T || m) + reverse KL(p_S || m))
//   d loss / d logit of a side is linear in its exponential, that times a logarithm, and the other
//   side's exponential; the factors are one row's.
#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace mtkd::divergence {

// Terms of a loss, as bits: what a loop has to compute. A mixture has its two anyway.
enum Terms : int { kForward = 1, kReverse = 2, kMixture = 4 };

template <class A>
struct Settings {
  A forward, reverse, inverse_temperature, scale;
  bool mixture;

  Settings(double forward, double reverse, bool mixture, double temperature, double scale)
      : forward(static_cast<A>(forward)),
        reverse(static_cast<A>(reverse)),
        inverse_temperature(static_cast<A>(1.0 / temperature)),
        scale(static_cast<A>(scale)),
        mixture(mixture) {}

  int terms() const {
    return mixture ? kMixture : (forward != 0 ? kForward : 0) | (reverse != 0 ? kReverse : 0);
  }
};

// A term of a sum that is 0 without a weight, whatever its other factor. Not a choice between
// products, which compilers make a branch.
template <class A>
MTKD_INLINE A weighted(A weight, A x) {
  return weight * (weight == 0 ? A(0) : x);
}

// One class: both sides' exponentials, and those times (teacher's - student's) exponent.
template <class A>
struct Class {
  A student, teacher, forward, reverse;
};

template <int Terms, class A>
MTKD_INLINE Class<A> class_of(A student, A teacher, A student_largest, A teacher_largest,
                              A inverse_temperature) {
  const A a = (student - student_largest) * inverse_temperature;
  const A b = (teacher - teacher_largest) * inverse_temperature;
  Class<A> out{exponential_or_zero(a), exponential_or_zero(b), 0, 0};
  if constexpr (Terms & kForward) out.forward = weighted(out.teacher, b - a);
  if constexpr (Terms & kReverse) out.reverse = weighted(out.student, b - a);
  return out;
}

// log p / m, and 0 where p is 0, given 1 / m.
template <class A>
MTKD_INLINE A log_ratio(A p, A inverse_mixture) {
  const A log = logarithm(p * inverse_mixture);
  return p == 0 ? A(0) : log;
}

template <class A>
MTKD_INLINE A inverse_mixture(A forward, A teacher, A reverse, A student) {
  const A mixture = forward * teacher + reverse * student;
  constexpr A kTiny = std::numeric_limits<A>::min();
  return A(1) / (mixture < kTiny ? kTiny : mixture);
}

// Over the classes of a row and teacher; forward and reverse are those of `Class`, or with a
// mixture the exponentials times their `log_ratio`.
template <class A>
struct Sums {
  A student, teacher, forward, reverse;
};

// A row of one side: its largest logit, the sum of its exponentials, and its term of the loss.
template <class A>
struct Side {
  A largest, total, term;
};

// Sets the terms of both sides; returns the loss, which is infinite for a side without any class.
template <class A>
MTKD_INLINE A loss_of(const Sums<A>& sums, const Settings<A>& settings, Side<A>& student,
                      Side<A>& teacher) {
  student.total = sums.student, teacher.total = sums.teacher;
  if (sums.student == 0 || sums.teacher == 0) return std::numeric_limits<A>::infinity();
  const A log = settings.mixture ? A(0) : std::log(sums.teacher / sums.student);
  const A sign = settings.mixture ? A(1) : A(-1);
  teacher.term = sums.forward / sums.teacher - log;
  student.term = sign * sums.reverse / sums.student + log;
  A loss = 0;
  if (settings.forward != 0) loss += settings.forward * teacher.term;
  if (settings.reverse != 0) loss += settings.reverse * student.term;
  return loss;
}

// The gradient to a logit: own exponential (constant + slope x) - cross (other exponential), with
// x the other logit less the own one, each less its side's largest, or with a mixture the
// `log_ratio`.
template <class A>
struct Factors {
  A constant, slope, cross;
};

// `weight` is that of the side's own term.
template <class A>
MTKD_INLINE Factors<A> factors_of(const Side<A>& own, const Side<A>& other, A weight,
                                  A other_weight, const Settings<A>& settings, A grad) {
  const A inverse = settings.inverse_temperature, to_logit = grad * settings.scale * inverse;
  const A share = to_logit / own.total;
  if (settings.mixture) return {-share * weight * own.term, share * weight, 0};
  const A log = std::log(other.total / own.total);
  return {share * (other_weight + weight * (log - own.term)), -share * weight * inverse,
          to_logit * other_weight / other.total};
}

}  // namespace mtkd::divergence
