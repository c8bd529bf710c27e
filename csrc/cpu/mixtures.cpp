// Mixtures of teachers on the CPU: a row at a time. Every teacher's logits are read once, and its
// softmax is added to the mixture while the next one's is made. The gradient to the weights is a
// product with each softmax again: those of a row are kept while they fit a cache.
#include "../mixtures.h"

#include <memory>

#include "../mixtures_operators.h"
#include "teachers.h"

namespace mtkd::cpu {
namespace {

// Turns the student's excess into log(q / p), and sums the loss.
template <class A>
MTKD_INLINE A ratios_loop(const A* q, const A* p, A log_sum, int64_t n, A* excess) {
  A loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t i = 0; i < n; ++i) {
    const A log_p = excess[i] - log_sum;
    const A ratio = mixtures::log_ratio(q[i], p[i], log_p);
    loss += mixtures::term(q[i], p[i], log_p, ratio);
    excess[i] = ratio;
  }
  return loss;
}

// The mean of log(q / p) over a teacher's distribution, less that over the mixture. Of differences:
// those of two such sums would be lost where the teacher is most of the mixture.
template <class A>
MTKD_INLINE A departure_loop(const Exponentials<A> teacher, const A* q, const A* ratio, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += (teacher.factor * teacher.numbers[i] - q[i]) * ratio[i];
  return sum;
}

template <class A>
MTKD_INLINE void gradient_loop(A factor, const A* q, const A* p, int64_t n, A* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] = factor * (p[i] - q[i]);
}

#define MTKD_MIXTURES_LOOPS(A)                                                              \
  MTKD_CLONES A ratios(const A* q, const A* p, A log_sum, int64_t n, A* excess) {           \
    return ratios_loop(q, p, log_sum, n, excess);                                           \
  }                                                                                         \
  MTKD_CLONES A departure(Exponentials<A> teacher, const A* q, const A* ratio, int64_t n) { \
    return departure_loop(teacher, q, ratio, n);                                            \
  }                                                                                         \
  MTKD_CLONES void find_gradient(A factor, const A* q, const A* p, int64_t n, A* grad) {    \
    gradient_loop(factor, q, p, n, grad);                                                   \
  }
MTKD_MIXTURES_LOOPS(float)
MTKD_MIXTURES_LOOPS(double)
#undef MTKD_MIXTURES_LOOPS

constexpr int64_t kKept = int64_t{512} << 10;  // bytes of a row's softmaxes that stay in a cache

template <class A>
struct Kernel {
  View student, weight, mask, counted, coefficient, loss, student_grad, weight_grad;
  Teachers teachers;
  int64_t rows, classes, mixed;
  A inverse_temperature, scale;
  bool keep;  // whether a row's softmaxes are kept for the gradient to the weights

  Kernel(const mixtures::Arguments& arguments, const OptionalTensor& coefficient,
         const mixtures::Results& results)
      : student(arguments.student),
        weight(arguments.weight),
        mask(arguments.mask),
        counted(arguments.counted),
        coefficient(coefficient),
        loss(results.loss),
        student_grad(output_view(results.student_grad, results.fresh)),
        weight_grad(results.weight_grad),
        teachers(arguments.teacher, arguments.rows, arguments.mixed, arguments.classes),
        rows(arguments.rows),
        classes(arguments.classes),
        mixed(arguments.mixed),
        inverse_temperature(static_cast<A>(1 / arguments.temperature)),
        scale(static_cast<A>(arguments.scale)),
        keep(weight_grad && mixed * classes * static_cast<int64_t>(sizeof(A)) <= kKept) {}
};

// The rows of a thread, one after another.
template <class A>
struct Row {
  const Kernel<A>& in;
  int64_t n = 0;
  std::unique_ptr<A[]> memory;
  A *excess, *read, *p, *q, *exponentials;
  A log_sum = 0, total = 0;  // of the student's exponentials; of the weights
  struct Softmax {
    A most, sum;
  };
  std::vector<Softmax> softmaxes;

  explicit Row(const Kernel<A>& in)
      : in(in), memory(new A[(4 + (in.keep ? in.mixed : 2)) * in.classes]), softmaxes(in.mixed) {
    excess = memory.get(), read = excess + in.classes, p = read + in.classes, q = p + in.classes;
    exponentials = q + in.classes;
  }

  bool counted(int64_t t) const { return counts(in.counted, n, t); }
  A weight(int64_t t) const { return in.weight.template get<A>(n, 0, t); }
  // Where a teacher's exponentials go: those of the teacher before stay.
  A* room(int64_t t, const A* before) const {
    if (in.keep) return exponentials + t * in.classes;
    return before == exponentials ? exponentials + in.classes : exponentials;
  }

  void run(int64_t row) {
    n = row;
    if (!counts(in.mask, n, 0)) return zero();
    student();
    mixture();
    A loss = 0;
    for (int64_t j = 0; j < in.classes; j += kBlock)
      loss += ratios(q + j, p + j, log_sum, std::min(kBlock, in.classes - j), excess + j);
    in.loss.put(n, 0, 0, in.scale * loss);
    if (!in.coefficient) return;
    const A grad = in.scale * in.coefficient.template get<A>(n, 0, 0);
    if (in.student_grad) to_student(grad * in.inverse_temperature);
    if (in.weight_grad) to_weight(grad / total);
  }

  void zero() {
    in.loss.put(n, 0, 0, A(0));
    write_zeros(in.student_grad, n, 0, 0, in.classes);
    write_zeros(in.weight_grad, n, 0, 0, in.mixed);
  }

  void student() {
    const A* s = in.student.load(n, 0, 0, in.classes, read);
    const A sum =
        student_part(s, largest(s, in.classes), in.inverse_temperature, in.classes, excess, p);
    log_sum = std::log(sum);
    scale_by(A(1) / sum, in.classes, p);
    in.teachers.prefetch_student(in.student, n + 1);
  }

  void mixture() {
    total = 0;
    for (int64_t t = 0; t < in.mixed; ++t) total += counted(t) ? weight(t) : A(0);
    if (total == 0) total = 1;
    std::fill_n(q, in.classes, A(0));
    Exponentials<A> last{nullptr, 0};
    for (int64_t t = 0; t < in.mixed; ++t) {
      if (!counted(t)) continue;
      in.teachers.prefetch_after(n, t);
      const A* x = in.teachers.load(n, t, read);
      const A most = largest(x, in.classes);
      A* to = room(t, last.numbers);
      const A sum = exponentiate(x, most, to, last);
      softmaxes[t] = {most, sum};
      last = {to, weight(t) / total / sum};
    }
    if (last.numbers) add(last, in.classes, q);
  }

  A exponentiate(const A* x, A most, A* to, Exponentials<A> before) {
    constexpr const A* kNone = nullptr;  // no products with the student's excess
    return teacher_part(x, most, in.inverse_temperature, kNone, in.classes, to, before, q)
        .exponentials;
  }

  void to_student(A factor) {
    A* grad = in.student_grad.target(n, 0, 0, read);
    find_gradient(factor, q, p, in.classes, grad);
    in.student_grad.store(n, 0, 0, in.classes, grad);
  }

  void to_weight(A factor) {
    for (int64_t t = 0; t < in.mixed; ++t)
      in.weight_grad.put(n, 0, t, counted(t) ? factor * departure_of(t) : A(0));
  }

  A departure_of(int64_t t) {
    const auto [most, sum] = softmaxes[t];
    A* numbers = room(t, nullptr);
    if (!in.keep) exponentiate(in.teachers.load(n, t, read), most, numbers, {nullptr, 0});
    A all = 0;
    for (int64_t j = 0; j < in.classes; j += kBlock)
      all +=
          departure({numbers + j, A(1) / sum}, q + j, excess + j, std::min(kBlock, in.classes - j));
    return all;
  }
};

template <class A>
void run_as(const Kernel<A>& kernel) {
  for_each_range(kernel.rows, kernel.classes * kernel.mixed, [&](int64_t begin, int64_t end) {
    Row<A> row(kernel);
    for (int64_t n = begin; n < end; ++n) row.run(n);
  });
}

void run(const mixtures::Arguments& arguments, const OptionalTensor& coefficient,
         const mixtures::Results& results) {
  if (arguments.dtype == ScalarType::Double) {
    run_as(Kernel<double>(arguments, coefficient, results));
  } else {
    run_as(Kernel<float>(arguments, coefficient, results));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) { mixtures::register_operators<run>(m); }

}  // namespace mtkd::cpu
