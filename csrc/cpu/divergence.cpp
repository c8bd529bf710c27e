// Divergences on the CPU: a row and teacher at a time, or several teachers of few classes at once.
// A first walk finds the largest logits, a second one the exponentials and with them the loss, a
// third one the gradients; a mixture takes one more, for its logarithms. What fits a block stays
// in L1 between the walks, exponentials too; longer teachers' blocks are made again.
#include "../divergence.h"

#include "../divergence_operators.h"
#include "rows.h"

namespace mtkd::cpu {
namespace {

using divergence::kForward;
using divergence::kMixture;
using divergence::kReverse;
using divergence::Settings;
using divergence::Side;
using divergence::Sums;

constexpr int64_t kColumns = 2 * kBlock;  // at a time: five arrays of them stay in L1

// A block of columns, as loops read and write it; x holds what multiplies exponentials, or terms.
// Loops take it by value: its pointers then stay in registers, which vectorising them needs.
template <class A>
struct Block {
  const A *student, *teacher;
  int64_t count;
  const int64_t* offsets;  // of its teachers; the first one's is where the block begins
  int64_t teachers;
  A *student_exp, *teacher_exp, *student_x, *teacher_x;
};

// What belongs to a column's teacher: the first of a block with a single teacher, else the
// column's.
template <bool Spread, class A>
MTKD_INLINE A constant(const A* columns, A first, int64_t i) {
  if constexpr (Spread) return columns[i];
  return first;
}

constexpr int64_t kVector = 16;  // columns from which a vector loop pays

template <class A>
MTKD_INLINE void raise(A value, A& largest) {
  largest = value > largest ? value : largest;
}

template <class A>
MTKD_INLINE void largest_loop(const Block<A> at, Side<A>* student, Side<A>* teacher) {
  for (int64_t k = 0; k < at.teachers; ++k) {
    const int64_t begin = at.offsets[k] - at.offsets[0], end = at.offsets[k + 1] - at.offsets[0];
    A s = student[k].largest, t = teacher[k].largest;
    if (end - begin < kVector) {
      for (int64_t i = begin; i < end; ++i) raise(at.student[i], s), raise(at.teacher[i], t);
    } else {
#pragma omp simd reduction(max : s, t)
      for (int64_t i = begin; i < end; ++i) raise(at.student[i], s), raise(at.teacher[i], t);
    }
    student[k].largest = s, teacher[k].largest = t;
  }
}

// Writes the exponentials; adds to the sums, or writes their terms for `segments_loop`.
template <int Terms, bool Spread, class A>
MTKD_INLINE void classes_loop(const Block<A> at, const A* const* constants,
                              const Settings<A>& settings, Sums<A>& sums) {
  const A *students = constants[0], *teachers = constants[1];
  const A first_student = students[0], first_teacher = teachers[0];
  const A inverse = settings.inverse_temperature;
  A student = 0, teacher = 0, forward = 0, reverse = 0;
#pragma omp simd reduction(+ : student, teacher, forward, reverse)
  for (int64_t i = 0; i < at.count; ++i) {
    const auto one = divergence::class_of<Terms>(
        at.student[i], at.teacher[i], constant<Spread>(students, first_student, i),
        constant<Spread>(teachers, first_teacher, i), inverse);
    at.student_exp[i] = one.student;
    at.teacher_exp[i] = one.teacher;
    if constexpr (Spread) {
      at.student_x[i] = one.reverse;
      at.teacher_x[i] = one.forward;
    } else {
      student += one.student, teacher += one.teacher;
      forward += one.forward, reverse += one.reverse;
    }
  }
  sums.student += student, sums.teacher += teacher;
  sums.forward += forward, sums.reverse += reverse;
}

// Writes the logarithms of the ratios to the mixture, given the weights' shares of the sums.
template <bool Spread, class A>
MTKD_INLINE void ratios_loop(const Block<A> at, const A* const* constants,
                             const Settings<A>& settings, Sums<A>& sums) {
  const A *students = constants[0], *teachers = constants[1];
  const A first_student = students[0], first_teacher = teachers[0];
  const A to_forward = settings.forward, to_reverse = settings.reverse;
  A forward = 0, reverse = 0;
#pragma omp simd reduction(+ : forward, reverse)
  for (int64_t i = 0; i < at.count; ++i) {
    const A p = at.student_exp[i] * constant<Spread>(students, first_student, i);
    const A q = at.teacher_exp[i] * constant<Spread>(teachers, first_teacher, i);
    const A inverse = divergence::inverse_mixture(to_forward, q, to_reverse, p);
    const A x = divergence::log_ratio(p, inverse), y = divergence::log_ratio(q, inverse);
    at.student_x[i] = x;
    at.teacher_x[i] = y;
    forward += at.teacher_exp[i] * y, reverse += at.student_exp[i] * x;
  }
  sums.forward += forward, sums.reverse += reverse;
}

// Adds one column: exponentials and their terms, or with a mixture their products.
template <bool Mixture, class A>
MTKD_INLINE void add_column(const Block<A>& at, int64_t i, A& student, A& teacher, A& forward,
                            A& reverse) {
  student += at.student_exp[i], teacher += at.teacher_exp[i];
  forward += Mixture ? at.teacher_exp[i] * at.teacher_x[i] : at.teacher_x[i];
  reverse += Mixture ? at.student_exp[i] * at.student_x[i] : at.student_x[i];
}

// The sums of each teacher's columns.
template <bool Mixture, class A>
MTKD_INLINE void segments_loop(const Block<A> at, Sums<A>* sums) {
  for (int64_t k = 0; k < at.teachers; ++k) {
    const int64_t begin = at.offsets[k] - at.offsets[0], end = at.offsets[k + 1] - at.offsets[0];
    A student = 0, teacher = 0, forward = 0, reverse = 0;
    if (end - begin < kVector) {
      for (int64_t i = begin; i < end; ++i)
        add_column<Mixture>(at, i, student, teacher, forward, reverse);
    } else {
#pragma omp simd reduction(+ : student, teacher, forward, reverse)
      for (int64_t i = begin; i < end; ++i)
        add_column<Mixture>(at, i, student, teacher, forward, reverse);
    }
    sums[k] = {student, teacher, forward, reverse};
  }
}

// What one side's gradient is made of: exponentials, and logits or their ratios to the mixture.
template <class A>
struct Inputs {
  const A *exp, *other_exp, *logits, *other_logits, *ratios;
};

template <bool Own, bool Cross, bool Mixture, bool Spread, class A>
MTKD_INLINE void gradient_loop(const Inputs<A> at, int64_t n, const A* const* constants, A* out) {
  const A *bases = constants[0], *slopes = constants[1], *crosses = constants[2];
  const A *largests = constants[3], *other_largests = constants[4];
  const A first_base = bases[0], first_slope = slopes[0], first_cross = crosses[0];
  const A first_largest = largests[0], first_other = other_largests[0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A slope = constant<Spread>(slopes, first_slope, i);
    A factor = constant<Spread>(bases, first_base, i);
    if constexpr (Mixture) factor += slope * at.ratios[i];
    if constexpr (Own && !Mixture) {  // sides far apart cancel exactly in these differences
      const A other = at.other_logits[i] - constant<Spread>(other_largests, first_other, i);
      factor += slope * (other - (at.logits[i] - constant<Spread>(largests, first_largest, i)));
    }
    A grad = divergence::weighted(at.exp[i], factor);
    if constexpr (Cross && !Mixture)
      grad -= constant<Spread>(crosses, first_cross, i) * at.other_exp[i];
    out[i] = grad;
  }
}

template <bool Spread, class A>
MTKD_INLINE void classes_as(int terms, const Block<A> at, const A* const* constants,
                            const Settings<A>& settings, Sums<A>& sums) {
  switch (terms) {
    case kForward:
      return classes_loop<kForward, Spread>(at, constants, settings, sums);
    case kReverse:
      return classes_loop<kReverse, Spread>(at, constants, settings, sums);
    case kForward | kReverse:
      return classes_loop<kForward | kReverse, Spread>(at, constants, settings, sums);
    default:  // of a mixture its ratios come later
      return classes_loop<0, Spread>(at, constants, settings, sums);
  }
}

template <bool Spread, class A>
MTKD_INLINE void gradient_as(bool own, bool cross, bool mixture, const Inputs<A> at, int64_t n,
                             const A* const* c, A* out) {
  if (mixture) return gradient_loop<true, false, true, Spread>(at, n, c, out);
  if (own && cross) return gradient_loop<true, true, false, Spread>(at, n, c, out);
  if (own) return gradient_loop<true, false, false, Spread>(at, n, c, out);
  return gradient_loop<false, true, false, Spread>(at, n, c, out);
}

#define MTKD_DIVERGENCE_LOOPS(A)                                                                   \
  MTKD_CLONES void find_largest(const Block<A>& at, Side<A>* student, Side<A>* teacher) {          \
    largest_loop(at, student, teacher);                                                            \
  }                                                                                                \
  MTKD_CLONES void find_classes(int terms, bool spread, const Block<A>& at, const A* const* c,     \
                                const Settings<A>& settings, Sums<A>& sums) {                      \
    spread ? classes_as<true>(terms, at, c, settings, sums)                                        \
           : classes_as<false>(terms, at, c, settings, sums);                                      \
  }                                                                                                \
  MTKD_CLONES void find_ratios(bool spread, const Block<A>& at, const A* const* c,                 \
                               const Settings<A>& settings, Sums<A>& sums) {                       \
    spread ? ratios_loop<true>(at, c, settings, sums) : ratios_loop<false>(at, c, settings, sums); \
  }                                                                                                \
  MTKD_CLONES void sum_segments(bool mixture, const Block<A>& at, Sums<A>* sums) {                 \
    mixture ? segments_loop<true>(at, sums) : segments_loop<false>(at, sums);                      \
  }                                                                                                \
  MTKD_CLONES void find_gradient(bool spread, bool own, bool cross, bool mixture,                  \
                                 const Inputs<A>& at, int64_t n, const A* const* c, A* out) {      \
    spread ? gradient_as<true>(own, cross, mixture, at, n, c, out)                                 \
           : gradient_as<false>(own, cross, mixture, at, n, c, out);                               \
  }                                                                                                \
  MTKD_CLONES void add_to(A* sum, const A* values, int64_t n) {                                    \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) sum[i] += values[i];                       \
  }
MTKD_DIVERGENCE_LOOPS(float)
MTKD_DIVERGENCE_LOOPS(double)
#undef MTKD_DIVERGENCE_LOOPS

template <class A>
struct Kernel {
  View student, teacher, mask, coefficient, loss, student_grad, teacher_grad;
  std::vector<int64_t> offsets, groups;
  Settings<A> settings;
  int terms;
  bool shared;
  int64_t rows;

  Kernel(const divergence::Arguments& arguments, const OptionalTensor& coefficient,
         const divergence::Results& results)
      : student(arguments.student),
        teacher(arguments.teacher),
        mask(arguments.mask),
        coefficient(coefficient),
        loss(results.loss),
        student_grad(output_view(results.student_grad, results.fresh)),
        teacher_grad(output_view(results.teacher_grad, results.fresh)),
        offsets(offsets_of(arguments.dims)),
        groups(group_short(offsets)),
        settings(arguments.settings<A>()),
        terms(settings.terms()),
        shared(arguments.shared),
        rows(arguments.rows) {}

  int64_t group_count() const { return static_cast<int64_t>(groups.size()) - 1; }
  // Where a column of a teacher that begins at `begin` is the student's.
  int64_t student_column(int64_t j, int64_t begin) const { return shared ? j - begin : j; }
};

// One row of a group of teachers: successive ones within a block, or a single one of any width.
template <class A>
struct Group {
  const Kernel<A>& in;
  A* const sum;  // of the gradient to a shared student
  const int64_t n, first, teachers, begin, end;
  const bool whole, spread;  // whether a block holds it all; whether in it are several teachers
  alignas(64) A student[kColumns], teacher[kColumns], student_exp[kColumns], teacher_exp[kColumns];
  alignas(64) A student_x[kColumns], teacher_x[kColumns], constants[5][kBlock];
  bool live[kBlock];  // counted, and of a finite loss
  Side<A> student_side[kBlock], teacher_side[kBlock];
  Sums<A> sums[kBlock];
  int64_t block[2];  // what `load` gives as offsets when a teacher takes several blocks
  const A* const pointers[5] = {constants[0], constants[1], constants[2], constants[3],
                                constants[4]};

  Group(const Kernel<A>& in, int64_t n, int64_t group, A* sum)
      : in(in),
        sum(sum),
        n(n),
        first(in.groups[group]),
        teachers(in.groups[group + 1] - first),
        begin(in.offsets[first]),
        end(in.offsets[first + teachers]),
        whole(end - begin <= kColumns),
        spread(teachers > 1) {}

  bool mixture() const { return in.terms & kMixture; }

  void run() {
    bool any = false;
    for (int64_t k = 0; k < teachers; ++k) any |= live[k] = counts(in.mask, n, first + k);
    if (!any) return zero();
    Block<A> at = walk_to_sums();
    any = write_losses();
    if (!in.student_grad && !in.teacher_grad) return;
    if (!any) return write_zero_gradients();
    if (whole) {  // the memory is idle while a gradient is computed: fetch what comes next
      if (!in.shared) in.student.prefetch(n, end, end - begin);
      in.teacher.prefetch(n, end, end - begin);
    }
    for (int64_t j = begin; j < end; j += kColumns) {
      if (!whole) at = make_again(j);
      write_gradients(at, j);
    }
  }

  void zero() {
    for (int64_t k = 0; k < teachers; ++k) in.loss.put(n, 0, first + k, A(0));
    write_zero_gradients();
  }

  void write_zero_gradients() {
    if (!in.shared) write_zeros(in.student_grad, n, 0, begin, end);
    write_zeros(in.teacher_grad, n, 0, begin, end);
  }

  Block<A> walk_to_sums() {
    Block<A> at;
    constexpr A kNone = -std::numeric_limits<A>::infinity();
    for (int64_t k = 0; k < teachers; ++k)
      student_side[k] = teacher_side[k] = {kNone, 0, 0}, sums[k] = {};
    for (int64_t j = begin; j < end; j += kColumns) {
      at = load(j);
      find_largest(at, student_side, teacher_side);
    }
    for (int64_t k = 0; k < teachers; ++k) {
      for (Side<A>* side : {&student_side[k], &teacher_side[k]})
        if (side->largest == kNone) side->largest = 0;  // -inf less -inf would be NaN
    }
    set_largest();
    for (int64_t j = begin; j < end; j += kColumns) {
      if (!whole) at = load(j);
      find_classes(in.terms, spread, at, pointers, in.settings, sums[0]);
    }
    if (spread) sum_segments(false, at, sums);
    if (!mixture()) return at;
    for (int64_t j = begin; j < end; j += kColumns) {
      if (!whole) at = make_classes_again(j);
      set_shares();
      find_ratios(spread, at, pointers, in.settings, sums[0]);
    }
    if (spread) sum_segments(true, at, sums);
    return at;
  }

  Block<A> load(int64_t j) {
    const int64_t count = std::min(kColumns, end - j);
    block[0] = j, block[1] = j + count;
    return {load_student(j, count),
            in.teacher.load(n, 0, j, count, teacher),
            count,
            spread ? &in.offsets[first] : block,
            teachers,
            student_exp,
            teacher_exp,
            student_x,
            teacher_x};
  }

  const A* load_student(int64_t j, int64_t count) {
    const int64_t own = in.student_column(j, begin);
    if (!in.shared || !spread) return in.student.load(n, 0, own, count, student);
    const int64_t width = (end - begin) / teachers;
    const A* row = in.student.load(n, 0, own, width, student);
    for (int64_t k = row == student ? 1 : 0; k < teachers; ++k)
      std::copy(row, row + width, student + k * width);
    return student;
  }

  // A longer teacher's block again, as it was when its sums were found.
  Block<A> make_classes_again(int64_t j) {
    const Block<A> at = load(j);
    Sums<A> unused{};
    set_largest();
    find_classes(0, spread, at, pointers, in.settings, unused);
    return at;
  }

  Block<A> make_again(int64_t j) {
    const Block<A> at = make_classes_again(j);
    if (!mixture()) return at;
    Sums<A> unused{};
    set_shares();
    find_ratios(spread, at, pointers, in.settings, unused);
    return at;
  }

  // Give a teacher's columns their numbers; a single teacher's are all columns, and take them once.
  template <class... X>
  void set(int64_t k, X... x) {
    const int64_t from = spread ? in.offsets[first + k] - begin : 0;
    const int64_t to = spread ? in.offsets[first + k + 1] - begin : 1;
    A* row = constants[0];
    ((std::fill(row + from, row + to, x), row += kBlock), ...);
  }

  void set_largest() {
    for (int64_t k = 0; k < teachers; ++k) {
      set(k, student_side[k].largest, teacher_side[k].largest);
    }
  }

  void set_shares() {
    const auto share = [](A total) { return total == 0 ? A(0) : A(1) / total; };
    for (int64_t k = 0; k < teachers; ++k) {
      set(k, share(sums[k].student), share(sums[k].teacher));
    }
  }

  // Returns whether any gradient is not 0.
  bool write_losses() {
    bool any = false;
    for (int64_t k = 0; k < teachers; ++k) {
      const A loss = divergence::loss_of(sums[k], in.settings, student_side[k], teacher_side[k]);
      in.loss.put(n, 0, first + k, live[k] ? in.settings.scale * loss : A(0));
      live[k] &= loss != std::numeric_limits<A>::infinity();
      any |= live[k];
    }
    return any;
  }

  // Both gradients need both logits, which they may overwrite: two of them wait in scratch.
  void write_gradients(const Block<A>& at, int64_t j) {
    const int64_t own = in.student_column(j, begin);
    const bool both = in.student_grad && in.teacher_grad;
    A* student_out = student_x;
    A* teacher_out = teacher_x;
    if (in.student_grad) {
      if (!in.shared && !both) student_out = in.student_grad.target(n, 0, own, student_x);
      set_factors(student_side, teacher_side, in.settings.reverse, in.settings.forward);
      find(kReverse, kForward, {student_exp, teacher_exp, at.student, at.teacher, student_x}, at,
           student_out);
    }
    if (in.teacher_grad) {
      if (!both) teacher_out = in.teacher_grad.target(n, 0, j, teacher_x);
      set_factors(teacher_side, student_side, in.settings.forward, in.settings.reverse);
      find(kForward, kReverse, {teacher_exp, student_exp, at.teacher, at.student, teacher_x}, at,
           teacher_out);
    }
    if (in.shared && in.student_grad) add_up(student_out, own, at.count);
    if (!in.shared) store(in.student_grad, own, at.count, student_out, both);
    store(in.teacher_grad, j, at.count, teacher_out, both);
  }

  void find(int own, int cross, const Inputs<A>& inputs, const Block<A>& at, A* out) {
    find_gradient(spread, in.terms & own, in.terms & cross, mixture(), inputs, at.count, pointers,
                  out);
    for (int64_t k = 0; spread && k < teachers; ++k) {
      const int64_t* offsets = &in.offsets[first];
      if (!live[k]) std::fill(out + (offsets[k] - begin), out + (offsets[k + 1] - begin), A(0));
    }
  }

  void store(const View& view, int64_t j, int64_t count, const A* values, bool waited) const {
    if (view && waited && !view.streamed) {
      write(values, count, view.dtype, view.column, view.at(n, 0, j));
    } else {
      view.store(n, 0, j, count, values);
    }
  }

  void set_factors(const Side<A>* own, const Side<A>* other, A weight, A other_weight) {
    for (int64_t k = 0; k < teachers; ++k) {
      const A grad = in.coefficient.template get<A>(n, 0, first + k);
      const auto [constant, slope, cross] =
          divergence::factors_of(own[k], other[k], weight, other_weight, in.settings, grad);
      set(k, constant, slope, cross, own[k].largest, other[k].largest);
    }
  }

  // A shared student's gradient is the sum of its teachers', in their order.
  void add_up(const A* grad, int64_t own, int64_t count) {
    const int64_t width = (end - begin) / teachers;
    if (!spread) return add_to(sum + own, grad, count);
    for (int64_t k = 0; k < teachers; ++k) add_to(sum, grad + k * width, width);
  }
};

// Rows of a student that is shared: one thread takes all teachers of a row.
template <class A>
void run_shared(const Kernel<A>& kernel) {
  const int64_t width = kernel.offsets[1];
  for_each_range(kernel.rows, kernel.offsets.back(), [&](int64_t from, int64_t to) {
    std::vector<A> sum(kernel.student_grad ? width : 0);
    for (int64_t n = from; n < to; ++n) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t g = 0; g < kernel.group_count(); ++g) Group<A>(kernel, n, g, sum.data()).run();
      if (!kernel.student_grad) continue;
      const View& view = kernel.student_grad;
      write(sum.data(), width, view.dtype, view.column, view.at(n, 0, 0));
    }
  });
}

template <class A>
void run_as(const Kernel<A>& kernel) {
  if (kernel.shared) return run_shared(kernel);
  for_each_row_and_group(kernel.rows, kernel.group_count(), kernel.offsets.back(),
                         [&](int64_t n, int64_t g) { Group<A>(kernel, n, g, nullptr).run(); });
}

void run(const divergence::Arguments& arguments, const OptionalTensor& coefficient,
         const divergence::Results& results) {
  if (arguments.dtype == ScalarType::Double) {
    run_as(Kernel<double>(arguments, coefficient, results));
  } else {
    run_as(Kernel<float>(arguments, coefficient, results));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) { divergence::register_operators<run>(m); }

}  // namespace mtkd::cpu
