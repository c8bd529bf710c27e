// Teachers' logits, and the loops over a row of them that votes and mixtures share: softmaxes whose
// logits are read once.
#pragma once

#include "rows.h"

namespace mtkd::cpu {

// The logits of T teachers: one tensor (N, T, C), or T of (N, C).
struct Teachers {
  std::vector<View> views;
  int64_t rows, count, classes;

  Teachers(const std::vector<Tensor>& logits, int64_t rows, int64_t count, int64_t classes)
      : rows(rows), count(count), classes(classes) {
    for (const Tensor& each : logits) views.emplace_back(each);
  }

  // The view in which a teacher lies, and its place there.
  const View& view(int64_t t) const { return views.size() == 1 ? views[0] : views[t]; }
  int64_t place(int64_t t) const { return views.size() == 1 ? t : 0; }

  template <class A>
  const A* load(int64_t n, int64_t t, A* scratch) const {
    return view(t).load(n, place(t), 0, classes, scratch);
  }

  // Fetch the teacher two places on, be it the next row's. Inlined, since GCC drops calls of a
  // function that does nothing else.
  MTKD_INLINE void prefetch_after(int64_t n, int64_t t) const {
    t += 2;
    if (t >= count) ++n, t -= count;
    if (n >= rows || t >= count) return;
    prefetch(view(t), n, place(t));
  }
  MTKD_INLINE void prefetch_student(const View& student, int64_t n) const {
    if (n < rows) prefetch(student, n, 0);
  }
  MTKD_INLINE void prefetch(const View& from, int64_t n, int64_t t) const {
    constexpr int64_t kPrefetched = int64_t{32} << 10;  // bytes; longer rows are fetched well
    const int64_t bytes = classes * from.item;
    if (from.column != 1 || bytes > kPrefetched) return;
    const char* source = from.at(n, t, 0);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(source + i);
  }
};

// A teacher's exponentials, whose factor is only known after all of them.
template <class A>
struct Exponentials {
  const A* numbers;
  A factor;
};

template <class A>
struct Sums {
  A exponentials = 0, products = 0;  // the latter with the student's excess, if it is given
};

// The largest number; NaN is passed over.
float largest(const float* x, int64_t n);
double largest(const double* x, int64_t n);

// A row's logits less the largest, times a scale, their exponentials, and the sum of these.
float student_part(const float* s, float most, float scale, int64_t n, float* excess, float* out);
double student_part(const double* s, double most, double scale, int64_t n, double* excess,
                    double* out);

// The exponentials of a teacher; meanwhile those of the teacher before, if there was one, are added
// to a total.
Sums<float> teacher_part(const float* x, float most, float scale, const float* excess, int64_t n,
                         float* out, Exponentials<float> before, float* total);
Sums<double> teacher_part(const double* x, double most, double scale, const double* excess,
                          int64_t n, double* out, Exponentials<double> before, double* total);

void add(Exponentials<float> last, int64_t n, float* total);
void add(Exponentials<double> last, int64_t n, double* total);

void scale_by(float factor, int64_t n, float* x);
void scale_by(double factor, int64_t n, double* x);

}  // namespace mtkd::cpu
