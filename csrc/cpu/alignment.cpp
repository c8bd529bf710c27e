// Alignment losses on the CPU: a row and teacher at a time, or several short teachers at once,
// whose sums come first and whose gradient follows while the row is in a cache. Without terms that
// depend on directions both come from one walk.
#include "../alignment.h"

#include "../alignment_operators.h"
#include "rows.h"

namespace mtkd::cpu {
namespace {

using alignment::Direction;
using alignment::Factors;
using alignment::kDirection;
using alignment::kHuber;
using alignment::kSquare;
using alignment::Settings;
using alignment::Sums;

constexpr int64_t kColumns = 2 * kBlock;  // at a time: three arrays of them stay in L1

template <class A>
MTKD_INLINE void standardise_loop(const A* target, const A* shift, const A* scale, int64_t n,
                                  A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (target[i] - shift[i]) * scale[i];
}

// Adds to the sums of one teacher.
template <int Terms, class A>
MTKD_INLINE void sums_loop(const A* s, const A* t, int64_t n, const Settings<A>& settings,
                           Sums<A>& sums) {
  const A beta = settings.beta, inverse_beta = settings.inverse_beta;
  A student = 0, target = 0, product = 0, huber = 0, square = 0;
#pragma omp simd reduction(+ : student, target, product, huber, square)
  for (int64_t i = 0; i < n; ++i) {
    const A error = s[i] - t[i];
    if constexpr (Terms & kDirection) {
      student += s[i] * s[i];
      target += t[i] * t[i];
      product += s[i] * t[i];
    }
    if constexpr (Terms & kHuber)
      huber += alignment::huber(std::fabs(error), beta, inverse_beta).value;
    if constexpr (Terms & kSquare) square += error * error;
  }
  sums.student += student, sums.target += target, sums.product += product;
  sums.huber += huber, sums.square += square;
}

// The gradient of one teacher, which may overwrite the student; without directions, its sums too.
template <int Terms, class A>
MTKD_INLINE void gradient_loop(const A* s, const A* t, int64_t n, const Settings<A>& settings,
                               const Factors<A>& factors, A* grad, Sums<A>& sums) {
  const A beta = settings.beta, inverse_beta = settings.inverse_beta;
  const A to_target = factors.target, to_student = factors.student;
  const A to_huber = factors.huber, to_square = factors.square;
  constexpr bool kSums = !(Terms & kDirection);
  A huber = 0, square = 0;
#pragma omp simd reduction(+ : huber, square)
  for (int64_t i = 0; i < n; ++i) {
    const A error = s[i] - t[i];
    A total = 0;
    if constexpr (Terms & kDirection) total = to_target * t[i] + to_student * s[i];
    if constexpr (Terms & kHuber) {
      const auto h = alignment::huber(std::fabs(error), beta, inverse_beta);
      total += to_huber * std::copysign(h.slope, error);
      if constexpr (kSums) huber += h.value;
    }
    if constexpr (Terms & kSquare) {
      total += to_square * error;
      if constexpr (kSums) square += error * error;
    }
    grad[i] = total;
  }
  sums.huber += huber, sums.square += square;
}

// Columns of successive teachers, and what belongs to each.
template <class A>
struct Segments {
  const A *student, *target;
  const int64_t* offsets;  // of the teachers; the first one's is where the columns begin
  int64_t teachers;
  const bool* counted;
  const Settings<A>* settings;
  Sums<A>* sums;
};

template <int Terms, class A>
MTKD_INLINE void add_sums_as(const Segments<A>& at) {
  for (int64_t k = 0; k < at.teachers; ++k) {
    const int64_t begin = at.offsets[k] - at.offsets[0], width = at.offsets[k + 1] - at.offsets[k];
    sums_loop<Terms>(at.student + begin, at.target + begin, width, *at.settings, at.sums[k]);
  }
}

template <int Terms, class A>
MTKD_INLINE void gradients_as(const Segments<A>& at, const Factors<A>* factors, A* grad) {
  for (int64_t k = 0; k < at.teachers; ++k) {
    const int64_t begin = at.offsets[k] - at.offsets[0], width = at.offsets[k + 1] - at.offsets[k];
    if (at.counted[k]) {
      gradient_loop<Terms>(at.student + begin, at.target + begin, width, *at.settings, factors[k],
                           grad + begin, at.sums[k]);
    } else {
      for (int64_t i = 0; i < width; ++i) grad[begin + i] = 0;
    }
  }
}

// loop<terms>(arguments); without any term nothing is left of a loop but the zeros it writes.
#define MTKD_WITH_TERMS(terms, loop, ...) \
  switch (terms) {                        \
    case 1:                               \
      return loop<1>(__VA_ARGS__);        \
    case 2:                               \
      return loop<2>(__VA_ARGS__);        \
    case 3:                               \
      return loop<3>(__VA_ARGS__);        \
    case 4:                               \
      return loop<4>(__VA_ARGS__);        \
    case 5:                               \
      return loop<5>(__VA_ARGS__);        \
    case 6:                               \
      return loop<6>(__VA_ARGS__);        \
    case 7:                               \
      return loop<7>(__VA_ARGS__);        \
    default:                              \
      return loop<0>(__VA_ARGS__);        \
  }
#define MTKD_ALIGNMENT_LOOPS(A)                                                                 \
  MTKD_CLONES void standardise(const A* t, const A* shift, const A* scale, int64_t n, A* out) { \
    standardise_loop(t, shift, scale, n, out);                                                  \
  }                                                                                             \
  MTKD_CLONES void add_sums(int terms, const Segments<A>& at){MTKD_WITH_TERMS(                  \
      terms, add_sums_as, at)} MTKD_CLONES void gradients(int terms, const Segments<A>& at,     \
                                                          const Factors<A>* factors, A* grad) { \
    MTKD_WITH_TERMS(terms, gradients_as, at, factors, grad)                                     \
  }
MTKD_ALIGNMENT_LOOPS(float)
MTKD_ALIGNMENT_LOOPS(double)
#undef MTKD_ALIGNMENT_LOOPS
#undef MTKD_WITH_TERMS

// A vector of the user's as numbers of type A, or that many times `missing`.
template <class A>
std::vector<A> numbers_of(const OptionalTensor& vector, int64_t size, A missing) {
  std::vector<A> numbers(size, missing);
  if (const View view{vector}) read(view.data, view.dtype, view.column, size, numbers.data());
  return numbers;
}

template <class A>
struct Kernel {
  View student, target, mask, coefficient, loss, grad;  // those not there have no data
  std::vector<int64_t> offsets, groups;
  std::vector<A> shift, scale, dispersion;  // without standardisation the first two are empty
  Settings<A> settings;
  int terms;
  int64_t rows;

  Kernel(const alignment::Arguments& arguments, const OptionalTensor& coefficient,
         const alignment::Results& results)
      : student(arguments.student),
        target(arguments.target),
        mask(arguments.mask),
        coefficient(coefficient),
        loss(results.loss),
        grad(output_view(results.student_grad, results.fresh)),
        offsets(offsets_of(arguments.dims)),
        groups(group_short(offsets)),
        dispersion(numbers_of<A>(arguments.dispersion, arguments.teachers, A(1))),
        settings(arguments.settings<A>()),
        terms(settings.terms()),
        rows(arguments.rows) {
    if (!arguments.shift && !arguments.scale) return;
    shift = numbers_of<A>(arguments.shift, arguments.columns, A(0));
    scale = numbers_of<A>(arguments.scale, arguments.columns, A(1));
  }

  A width(int64_t t) const { return static_cast<A>(offsets[t + 1] - offsets[t]); }
};

// One row of a group of teachers: successive ones within a block, or a single one of any width.
template <class A>
struct Group {
  const Kernel<A>& in;
  const int64_t n, first, teachers, begin, end;
  alignas(64) A student[kColumns], target[kColumns], gradient[kColumns];
  bool counted[kBlock];
  Sums<A> sums[kBlock];
  Factors<A> factors[kBlock];
  int64_t block[2];  // what `load` gives as offsets when a teacher takes several blocks

  Group(const Kernel<A>& in, int64_t n, int64_t group)
      : in(in),
        n(n),
        first(in.groups[group]),
        teachers(in.groups[group + 1] - first),
        begin(in.offsets[first]),
        end(in.offsets[first + teachers]) {}

  void run() {
    bool any = false;
    for (int64_t k = 0; k < teachers; ++k) any |= counted[k] = counts(in.mask, n, first + k);
    if (!any) return zero();
    std::fill(sums, sums + teachers, Sums<A>{});
    const bool whole = end - begin <= kColumns;  // then a block stays loaded
    const bool sums_first = in.terms & kDirection || !in.grad;
    Segments<A> at;
    for (int64_t j = begin; sums_first && j < end; j += kColumns) {
      at = load(j);
      add_sums(in.terms, at);
    }
    if (sums_first) write_losses();
    if (!in.grad) return;
    if (whole) {  // the memory is idle while a gradient is computed: fetch what comes next
      in.student.prefetch(n, end, end - begin);
      in.target.prefetch(n, end, end - begin);
    }
    find_factors();
    for (int64_t j = begin; j < end; j += kColumns) {
      if (!sums_first || !whole) at = load(j);
      write_gradients(at, j);
    }
    if (!sums_first) write_losses();
  }

  void zero() const {
    for (int64_t k = 0; k < teachers; ++k) in.loss.put(n, 0, first + k, A(0));
    write_zeros(in.grad, n, 0, begin, end);
  }

  Segments<A> load(int64_t j) {
    const int64_t count = std::min(kColumns, end - j);
    const A* t = in.target.load(n, 0, j, count, target);
    if (!in.shift.empty()) {
      standardise(t, &in.shift[j], &in.scale[j], count, target);
      t = target;
    }
    block[0] = j, block[1] = j + count;
    const int64_t* offsets = teachers == 1 ? block : &in.offsets[first];
    return {in.student.load(n, 0, j, count, student),
            t,
            offsets,
            teachers,
            counted,
            &in.settings,
            sums};
  }

  Direction<A> direction(int64_t k) const {
    return in.terms & kDirection ? alignment::direction_of(sums[k], in.settings.eps)
                                 : Direction<A>{};
  }

  void write_losses() const {
    for (int64_t k = 0; in.loss && k < teachers; ++k) {
      const int64_t t = first + k;
      const A loss =
          alignment::loss_of(sums[k], direction(k), in.settings, in.width(t), in.dispersion[t]);
      in.loss.put(n, 0, t, counted[k] ? loss : A(0));
    }
  }

  void find_factors() {
    for (int64_t k = 0; k < teachers; ++k) {
      const int64_t t = first + k;
      factors[k] = alignment::factors_of(direction(k), in.settings, in.width(t), in.dispersion[t],
                                         in.coefficient.template get<A>(n, 0, t));
    }
  }

  void write_gradients(const Segments<A>& at, int64_t j) {
    const int64_t count = std::min(kColumns, end - j);
    A* grad = in.grad.target(n, 0, j, gradient);
    gradients(in.terms, at, factors, grad);
    in.grad.store(n, 0, j, count, grad);
  }
};

template <class A>
void run_as(const Kernel<A>& kernel) {
  const int64_t groups = static_cast<int64_t>(kernel.groups.size()) - 1;
  for_each_row_and_group(kernel.rows, groups, kernel.offsets.back(),
                         [&](int64_t n, int64_t g) { Group<A>(kernel, n, g).run(); });
}

void run(const alignment::Arguments& arguments, const OptionalTensor& coefficient,
         const alignment::Results& results) {
  if (arguments.dtype == ScalarType::Double) {
    run_as(Kernel<double>(arguments, coefficient, results));
  } else {
    run_as(Kernel<float>(arguments, coefficient, results));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) { alignment::register_operators<run>(m); }

}  // namespace mtkd::cpu
