// Alignment of a student's columns with a teacher's, for CPU and CUDA: one number, then one row.
//
//   loss = cosine (1 - cos) + angle arccos(cos)^2 / dispersion
//        + (smooth_l1 sum h(e) + mse sum e^2) / width,  e = student - target
//   d loss / d student is linear in target, student, h'(e) and e; its factors are one row's.
#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace mtkd::alignment {

// Terms of a loss, as bits: what a loop has to compute.
enum Terms : int { kDirection = 1, kHuber = 2, kSquare = 4 };

// As a number of type A; what is less would be 0 or have an infinite reciprocal.
template <class A>
A at_least(double value, A smallest) {
  const A number = static_cast<A>(value);
  return number < smallest ? smallest : number;
}

template <class A>
struct Settings {
  A cosine, smooth_l1, mse, angle, eps;
  A beta, inverse_beta;

  Settings(double cosine, double smooth_l1, double mse, double angle, double beta, double eps)
      : cosine(static_cast<A>(cosine)),
        smooth_l1(static_cast<A>(smooth_l1)),
        mse(static_cast<A>(mse)),
        angle(static_cast<A>(angle)),
        eps(at_least(eps, std::sqrt(std::numeric_limits<A>::min()))),  // 1 / eps^2 is finite
        beta(at_least(beta, std::numeric_limits<A>::min())),  // without beta slopes are signs
        inverse_beta(A(1) / this->beta) {}

  int terms() const {
    return (cosine != 0 || angle != 0 ? kDirection : 0) | (smooth_l1 != 0 ? kHuber : 0) |
           (mse != 0 ? kSquare : 0);
  }
};

// h(e) for sizes |e|: e^2 / (2 beta) inside, |e| - beta / 2 outside; and its derivative, |e| / beta
// at most 1. A NaN stays one. The limit is no constant, so that scalar loops have no branch either.
template <class A>
MTKD_INLINE ValueAndSlope<A> huber(A size, A beta, A inverse_beta) {
  const A inside = beta < size ? beta : size, slope = inside * inverse_beta;
  return {slope * (size - A(0.5) * inside), slope};
}

// Over the columns of a row and teacher; those of terms that a loss has not are 0.
template <class A>
struct Sums {
  A student, target, product;  // of squares, and of student times target
  A huber, square;
};

// What the two rows' directions give: the cosine, 1 / (|s| |t|) and 1 / |s|^2, where norms are at
// least eps, or 0 for the last, which is then not a derivative.
template <class A>
struct Direction {
  A cos, inverse_norms, inverse_square;
};

// A division by the product of the norms makes the cosine of a single column exactly 1 or -1.
template <class A>
MTKD_INLINE Direction<A> direction_of(const Sums<A>& sums, A eps) {
  const A student = std::sqrt(sums.student), target = std::sqrt(sums.target);
  const A norms = (student < eps ? eps : student) * (target < eps ? eps : target);
  return {sums.product / norms, A(1) / norms, student <= eps ? A(0) : A(1) / sums.student};
}

template <class A>
MTKD_INLINE A angle_of(A cos) {
  cos = cos > A(1) ? A(1) : cos;
  return std::acos(cos < A(-1) ? A(-1) : cos);
}

template <class A>
MTKD_INLINE A loss_of(const Sums<A>& sums, const Direction<A>& direction,
                      const Settings<A>& settings, A width, A dispersion) {
  A loss = 0;
  if (settings.cosine != 0) loss += settings.cosine * (A(1) - direction.cos);
  if (settings.angle != 0) {
    const A angle = angle_of(direction.cos);
    loss += settings.angle * angle * angle / dispersion;
  }
  if (settings.smooth_l1 != 0) loss += settings.smooth_l1 * sums.huber / width;
  if (settings.mse != 0) loss += settings.mse * sums.square / width;
  return loss;
}

// The gradient: target * t + student * s + huber * h'(e) + square * e.
template <class A>
struct Factors {
  A target, student, huber, square;
};

template <class A>
MTKD_INLINE Factors<A> factors_of(const Direction<A>& direction, const Settings<A>& settings,
                                  A width, A dispersion, A grad) {
  const A cos = direction.cos, share = grad / width;
  A slope = -settings.cosine;
  if (settings.angle != 0 && std::fabs(cos) < A(1))
    slope -= A(2) * settings.angle * std::acos(cos) /
             (std::sqrt((A(1) - cos) * (A(1) + cos)) * dispersion);
  const A to_cos = grad * slope;
  return {to_cos * direction.inverse_norms, -to_cos * cos * direction.inverse_square,
          settings.smooth_l1 * share, A(2) * settings.mse * share};
}

}  // namespace mtkd::alignment
