#include "teachers.h"

#include <limits>

#include "../votes.h"

namespace mtkd::cpu {
namespace {

using votes::exponential_of_excess;
using votes::product;

// 64 bytes of numbers, wherever they lie.
template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(64), aligned(alignof(A)), may_alias));
};

// In four accumulators, since one waits for itself. The last vectors begin where they end with the
// numbers: single ones would take as long as all the others.
template <class A>
MTKD_INLINE A largest_loop(const A* x, int64_t n) {
  using V = typename Vector<A>::type;
  constexpr int64_t kLanes = 64 / sizeof(A), kStep = 4 * kLanes;
  A most = -std::numeric_limits<A>::infinity();
  if (n < kStep) {
    for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
  }
  V a = V{} + most, b = a, c = a, d = a;
  for (int64_t i = 0; i < n; i += kStep) {
    const V* at = reinterpret_cast<const V*>(x + std::min(i, n - kStep));
    a = at[0] > a ? at[0] : a, b = at[1] > b ? at[1] : b;
    c = at[2] > c ? at[2] : c, d = at[3] > d ? at[3] : d;
  }
  a = a > b ? a : b, c = c > d ? c : d, a = a > c ? a : c;
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) a[k] = a[k] > a[k + half] ? a[k] : a[k + half];
  return a[0];
}

template <class A>
MTKD_INLINE A student_loop(const A* s, A most, A scale, int64_t n, A* excess, A* out) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const A x = (s[i] - most) * scale, e = exponential_of_excess(x);
    excess[i] = x, out[i] = e;
    sum += e;
  }
  return sum;
}

template <bool Products, bool Before, class A>
MTKD_INLINE Sums<A> teacher_loop(const A* x, A most, A scale, const A* excess, int64_t n, A* out,
                                 Exponentials<A> before, A* total) {
  A sum = 0, products = 0;
  const A *numbers = before.numbers, factor = before.factor;
#pragma omp simd reduction(+ : sum, products)
  for (int64_t i = 0; i < n; ++i) {
    const A e = exponential_of_excess((x[i] - most) * scale);
    out[i] = e;
    sum += e;
    if constexpr (Products) products += product(e, excess[i]);
    if constexpr (Before) total[i] += factor * numbers[i];
  }
  return {sum, products};
}

template <bool Products, class A>
MTKD_INLINE Sums<A> teacher_block(const A* x, A most, A scale, const A* excess, int64_t n, A* out,
                                  Exponentials<A> before, A* total) {
  return before.numbers
             ? teacher_loop<Products, true>(x, most, scale, excess, n, out, before, total)
             : teacher_loop<Products, false>(x, most, scale, excess, n, out, before, total);
}

// Whole rows, a block at a time: one float32 sum over all classes would lose digits.
template <class A>
MTKD_INLINE A student_row(const A* s, A most, A scale, int64_t n, A* excess, A* out) {
  A sum = 0;
  for (int64_t j = 0; j < n; j += kBlock)
    sum += student_loop(s + j, most, scale, std::min(kBlock, n - j), excess + j, out + j);
  return sum;
}

template <class A>
MTKD_INLINE Sums<A> teacher_row(const A* x, A most, A scale, const A* excess, int64_t n, A* out,
                                Exponentials<A> before, A* total) {
  Sums<A> all;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t size = std::min(kBlock, n - j);
    const Exponentials<A> part{before.numbers ? before.numbers + j : nullptr, before.factor};
    const Sums<A> sums =
        excess ? teacher_block<true>(x + j, most, scale, excess + j, size, out + j, part, total + j)
               : teacher_block<false>(x + j, most, scale, excess, size, out + j, part, total + j);
    all.exponentials += sums.exponentials, all.products += sums.products;
  }
  return all;
}

template <class A>
MTKD_INLINE void add_loop(Exponentials<A> last, int64_t n, A* total) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) total[i] += last.factor * last.numbers[i];
}

template <class A>
MTKD_INLINE void scale_loop(A factor, int64_t n, A* x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

}  // namespace

#define MTKD_TEACHERS_LOOPS(A)                                                                  \
  MTKD_CLONES A largest(const A* x, int64_t n) { return largest_loop(x, n); }                   \
  MTKD_CLONES A student_part(const A* s, A most, A scale, int64_t n, A* excess, A* out) {       \
    return student_row(s, most, scale, n, excess, out);                                         \
  }                                                                                             \
  MTKD_CLONES Sums<A> teacher_part(const A* x, A most, A scale, const A* excess, int64_t n,     \
                                   A* out, Exponentials<A> before, A* total) {                  \
    return teacher_row(x, most, scale, excess, n, out, before, total);                          \
  }                                                                                             \
  MTKD_CLONES void add(Exponentials<A> last, int64_t n, A* total) { add_loop(last, n, total); } \
  MTKD_CLONES void scale_by(A factor, int64_t n, A* x) { scale_loop(factor, n, x); }
MTKD_TEACHERS_LOOPS(float)
MTKD_TEACHERS_LOOPS(double)
#undef MTKD_TEACHERS_LOOPS

}  // namespace mtkd::cpu
