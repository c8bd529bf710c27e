// Votes on the CPU: a row at a time. Its gradient begins as the student's softmax, then every
// teacher's logits are read once, and its vote is taken off while they are in a cache.
#include "../votes.h"

#include <limits>
#include <memory>

#include "../votes_operators.h"
#include "rows.h"

namespace mtkd::cpu {
namespace {

using votes::exponential_of_excess;
using votes::product;

// 64 bytes of numbers, wherever they lie.
template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(64), aligned(alignof(A)), may_alias));
};

// The largest number, in four accumulators, since one waits for itself; NaN is passed over. The
// last vectors begin where they end with the numbers: single ones would take as long as all the
// others.
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

// Where numbers are not below `most`, as NaN is not: how many, and the sum of their indices.
template <class A>
struct Matches {
  using Index = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  Index count = 0, indices = 0;
};

template <class A>
MTKD_INLINE Matches<A> matches_loop(const A* x, int64_t n, A most) {
  using Index = typename Matches<A>::Index;
  const Index end = static_cast<Index>(n);
  Index count = 0, indices = 0;
#pragma omp simd reduction(+ : count, indices)
  for (Index i = 0; i < end; ++i) {
    const bool match = !(x[i] < most);
    count += match ? Index(1) : Index(0);
    indices += match ? i : Index(0);
  }
  return {count, indices};
}

// The student's logits less the largest, their exponentials, and the sum of these.
template <class A>
MTKD_INLINE A student_loop(const A* s, A most, int64_t n, A* excess, A* exponentials) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const A x = s[i] - most, e = exponential_of_excess(x);
    excess[i] = x, exponentials[i] = e;
    sum += e;
  }
  return sum;
}

template <class A>
MTKD_INLINE void scale_loop(A factor, int64_t n, A* x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// A teacher's exponentials, whose factor is only known after all of them.
template <class A>
struct Exponentials {
  const A* numbers;
  A factor;
};

template <class A>
struct Sums {
  A exponentials = 0, products = 0;  // the latter with the student's excess
};

// The exponentials of a teacher; meanwhile those of the teacher before are taken off the gradient.
template <bool Before, class A>
MTKD_INLINE Sums<A> teacher_loop(const A* x, A most, A scale, const A* excess, int64_t n, A* out,
                                 Exponentials<A> before, A* grad) {
  A sum = 0, products = 0;
  const A *numbers = before.numbers, factor = before.factor;
#pragma omp simd reduction(+ : sum, products)
  for (int64_t i = 0; i < n; ++i) {
    const A e = exponential_of_excess((x[i] - most) * scale);
    out[i] = e;
    sum += e;
    products += product(e, excess[i]);
    if constexpr (Before) grad[i] -= factor * numbers[i];
  }
  return {sum, products};
}

template <class A>
MTKD_INLINE void subtract_loop(Exponentials<A> from, int64_t n, A* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] -= from.factor * from.numbers[i];
}

// Takes a softmax off whose sum is known.
template <class A>
MTKD_INLINE void subtract_softmax_loop(const A* x, A most, A scale, A factor, int64_t n, A* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] -= factor * exponential_of_excess((x[i] - most) * scale);
}

#define MTKD_VOTES_LOOPS(A)                                                                      \
  MTKD_CLONES A largest(const A* x, int64_t n) { return largest_loop(x, n); }                    \
  MTKD_CLONES Matches<A> matches(const A* x, int64_t n, A most) {                                \
    return matches_loop(x, n, most);                                                             \
  }                                                                                              \
  MTKD_CLONES A student_part(const A* s, A most, int64_t n, A* excess, A* exponentials) {        \
    return student_loop(s, most, n, excess, exponentials);                                       \
  }                                                                                              \
  MTKD_CLONES void scale_by(A factor, int64_t n, A* x) { scale_loop(factor, n, x); }             \
  MTKD_CLONES Sums<A> teacher_part(const A* x, A most, A scale, const A* excess, int64_t n,      \
                                   A* out, Exponentials<A> before, A* grad) {                    \
    return before.numbers ? teacher_loop<true>(x, most, scale, excess, n, out, before, grad)     \
                          : teacher_loop<false>(x, most, scale, excess, n, out, before, grad);   \
  }                                                                                              \
  MTKD_CLONES void subtract(Exponentials<A> from, int64_t n, A* grad) {                          \
    subtract_loop(from, n, grad);                                                                \
  }                                                                                              \
  MTKD_CLONES void subtract_softmax(const A* x, A most, A scale, A factor, int64_t n, A* grad) { \
    subtract_softmax_loop(x, most, scale, factor, n, grad);                                      \
  }
MTKD_VOTES_LOOPS(float)
MTKD_VOTES_LOOPS(double)
#undef MTKD_VOTES_LOOPS

constexpr int64_t kPrefetched = int64_t{32} << 10;  // bytes of a row; longer ones are fetched well

template <class A>
struct Kernel {
  View student, mask, weight, coefficient, loss, grad;  // those not there have no data
  std::vector<View> teacher;
  int64_t *written_class = nullptr, *saved_class = nullptr;  // of hard votes
  A *written_sums = nullptr, *saved_sums = nullptr;          // of soft ones
  int64_t rows, classes, voters, columns;
  A scale;
  bool hard;

  Kernel(const votes::Arguments& arguments, const OptionalTensor& coefficient,
         const OptionalTensor& saved, const votes::Results& results)
      : student(arguments.student),
        mask(arguments.mask),
        weight(arguments.weight),
        coefficient(coefficient),
        loss(results.loss),
        grad(output_view(results.student_grad, results.fresh)),
        rows(arguments.rows),
        classes(arguments.classes),
        voters(arguments.voters),
        columns(arguments.teachers),
        scale(static_cast<A>(1 / arguments.temperature)),
        hard(arguments.hard) {
    for (const Tensor& each : arguments.teacher) teacher.emplace_back(each);
    if (hard) {
      if (results.saved) written_class = static_cast<int64_t*>(results.saved->data_ptr());
      if (saved) saved_class = static_cast<int64_t*>(saved->data_ptr());
    } else {
      if (results.saved) written_sums = static_cast<A*>(results.saved->data_ptr());
      if (saved) saved_sums = static_cast<A*>(saved->data_ptr());
    }
  }

  // The view in which a teacher lies, and its place there.
  const View& view(int64_t t) const { return teacher.size() == 1 ? teacher[0] : teacher[t]; }
  int64_t place(int64_t t) const { return teacher.size() == 1 ? t : 0; }

  const A* logits(int64_t n, int64_t t, A* scratch) const {
    return view(t).load(n, place(t), 0, classes, scratch);
  }

  // Fetch the teacher two places on, be it the next row's. Inlined, since GCC drops calls of a
  // function that does nothing else.
  MTKD_INLINE void prefetch_after(int64_t n, int64_t t) const {
    t += 2;
    if (t >= voters) ++n, t -= voters;
    if (n >= rows || t >= voters) return;
    prefetch(view(t), n, place(t));
  }
  MTKD_INLINE void prefetch_student(int64_t n) const {
    if (n < rows) prefetch(student, n, 0);
  }
  MTKD_INLINE void prefetch(const View& from, int64_t n, int64_t t) const {
    const int64_t bytes = classes * from.item;
    if (from.column != 1 || bytes > kPrefetched) return;
    const char* source = from.at(n, t, 0);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(source + i);
  }
};

// The rows of a thread, one after another.
template <class A>
struct Row {
  const Kernel<A>& in;
  int64_t n = 0;
  std::unique_ptr<A[]> memory;
  A *excess, *read, *gradient, *exponentials, *before;
  A* grad = nullptr;               // where the gradient of this row is made
  A log_sum = 0;                   // of the student's exponentials
  std::vector<A> factors;          // of each teacher's vote in the gradient
  std::vector<int64_t> several;    // the classes of a vote that is not for one
  std::vector<double> tally;       // zeros between rows
  std::vector<int64_t> mentioned;  // classes with votes

  explicit Row(const Kernel<A>& in) : in(in), memory(new A[5 * in.classes]), factors(in.voters) {
    excess = memory.get(), read = excess + in.classes, gradient = read + in.classes;
    exponentials = gradient + in.classes, before = exponentials + in.classes;
    if (in.hard && in.weight) tally.assign(in.classes, 0.0);
  }

  bool together() const { return static_cast<bool>(in.weight); }
  A weight(int64_t t) const { return in.weight.template get<A>(n, 0, t); }
  bool counted(int64_t t) const { return together() ? weight(t) != 0 : counts(in.mask, n, t); }
  A coefficient(int64_t k) const {
    return in.coefficient && counts(in.mask, n, k) ? in.coefficient.template get<A>(n, 0, k) : A(0);
  }

  void run(int64_t row) {
    n = row;
    bool any = false;
    for (int64_t k = 0; k < in.columns; ++k) {
      const bool here = counts(in.mask, n, k);
      any |= here;
      if (!here) in.loss.put(n, 0, k, A(0));
    }
    leave_nothing();
    if (!any) return write_zeros(in.grad, n, 0, 0, in.classes);
    begin_gradient();
    if (in.hard) {
      together() ? hard_together() : hard_each();
    } else {
      soft();
    }
    if (in.grad) in.grad.store(n, 0, 0, in.classes, grad);
  }

  // What backward will not read is written all the same.
  void leave_nothing() const {
    if (in.written_class) std::fill_n(in.written_class + n * in.columns, in.columns, -1);
    if (in.written_sums) std::fill_n(in.written_sums + n * in.voters * 2, in.voters * 2, A(0));
  }

  // The student's softmax, by all that it is worth.
  void begin_gradient() {
    const A* s = in.student.load(n, 0, 0, in.classes, read);
    grad = in.grad ? in.grad.target(n, 0, 0, gradient) : gradient;
    const A most = largest(s, in.classes);
    A sum = 0;
    for (int64_t j = 0; j < in.classes; j += kBlock)
      sum += student_part(s + j, most, std::min(kBlock, in.classes - j), excess + j, grad + j);
    log_sum = std::log(sum);
    in.prefetch_student(n + 1);
    if (!in.grad) return;
    A total = 0;
    for (int64_t k = 0; k < in.columns; ++k) total += coefficient(k);
    scale_by(total / sum, in.classes, grad);
  }

  // The class of a teacher's largest logit; -1 where there are `several`, or none.
  int64_t decision(int64_t t) {
    in.prefetch_after(n, t);
    const A* x = in.logits(n, t, read);
    constexpr A kLeast = -std::numeric_limits<A>::infinity();
    const A most = largest(x, in.classes);
    const Matches<A> found = matches(x, in.classes, most);
    if (found.count == 1 && most > kLeast) return static_cast<int64_t>(found.indices);
    several.clear();
    for (int64_t c = 0; c < in.classes; ++c) {
      if (x[c] == most) several.push_back(c);
      if (x[c] != x[c] || most == kLeast) return several.clear(), -1;
    }
    return -1;
  }

  // The loss of a vote, and its part of the gradient.
  void take_vote(int64_t k, int64_t chosen) {
    const int64_t* classes = chosen < 0 ? several.data() : &chosen;
    const int64_t count = chosen < 0 ? static_cast<int64_t>(several.size()) : 1;
    const A share = A(1) / static_cast<A>(count), each = coefficient(k) * share;
    A sum = count ? A(0) : std::numeric_limits<A>::quiet_NaN();
    for (int64_t i = 0; i < count; ++i) sum += excess[classes[i]];
    in.loss.put(n, 0, k, log_sum - sum * share);
    if (in.written_class) in.written_class[n * in.columns + k] = chosen;
    if (!in.grad) return;
    for (int64_t i = 0; i < count; ++i) grad[classes[i]] -= each;
    if (!count) std::fill_n(grad, in.classes, std::numeric_limits<A>::quiet_NaN());
  }

  int64_t saved_class(int64_t k) const {
    return in.saved_class ? in.saved_class[n * in.columns + k] : -1;
  }

  void hard_each() {
    for (int64_t t = 0; t < in.voters; ++t) {
      if (!counted(t)) continue;
      const int64_t saved = saved_class(t);
      take_vote(t, saved < 0 ? decision(t) : saved);
    }
  }

  void hard_together() {
    const int64_t saved = saved_class(0);
    take_vote(0, saved < 0 ? plurality() : saved);
  }

  void vote_for(int64_t c, double votes) {
    tally[c] += votes;
    mentioned.push_back(c);
  }

  // The class of most votes; -1 where there are `several`, or a teacher that counts has no vote.
  int64_t plurality() {
    bool valid = true;
    mentioned.clear();
    for (int64_t t = 0; t < in.voters; ++t) {
      if (!counted(t)) continue;
      const double votes = weight(t);
      const int64_t chosen = decision(t);
      if (chosen >= 0) vote_for(chosen, votes);
      for (int64_t c : several)
        if (chosen < 0) vote_for(c, votes / static_cast<double>(several.size()));
      valid &= chosen >= 0 || !several.empty();
    }
    double most = 0;
    for (int64_t c : mentioned) most = tally[c] > most ? tally[c] : most;
    several.clear();
    for (int64_t c : mentioned) {
      if (valid && most > 0 && tally[c] >= (1 - votes::kTied) * most) several.push_back(c);
      tally[c] = 0;  // named once, and ready for the next row
    }
    return several.size() == 1 ? several[0] : -1;
  }

  // Each teacher's softmax; or together, weighed by what they have of all votes.
  void soft() {
    A all = 0;
    for (int64_t t = 0; together() && t < in.voters; ++t) all += weight(t);
    const A whole = coefficient(0);
    for (int64_t t = 0; t < in.voters; ++t)
      factors[t] = together() ? whole * weight(t) / all : coefficient(t);
    if (in.saved_sums) return soft_gradient();
    Exponentials<A> last{nullptr, 0};
    A mean = 0;  // of the student's excess, over all votes
    for (int64_t t = 0; t < in.voters; ++t) {
      if (!counted(t)) continue;
      in.prefetch_after(n, t);
      const A* x = in.logits(n, t, read);
      const A most = largest(x, in.classes);
      const Sums<A> sums = exponentiate(x, most, last);
      const A expected = sums.products / sums.exponentials;
      if (together()) {
        mean += weight(t) / all * expected;
      } else {
        in.loss.put(n, 0, t, log_sum - expected);
      }
      if (in.written_sums) {
        A* saved = in.written_sums + (n * in.voters + t) * 2;
        saved[0] = most, saved[1] = sums.exponentials;
      }
      if (!in.grad) continue;
      last = {exponentials, factors[t] / sums.exponentials};
      std::swap(exponentials, before);
    }
    if (together()) in.loss.put(n, 0, 0, log_sum - mean);
    if (last.numbers) subtract(last, in.classes, grad);
  }

  Sums<A> exponentiate(const A* x, A most, Exponentials<A> last) {
    Sums<A> all;
    for (int64_t j = 0; j < in.classes; j += kBlock) {
      const Exponentials<A> part{last.numbers ? last.numbers + j : nullptr, last.factor};
      const Sums<A> sums =
          teacher_part(x + j, most, in.scale, excess + j, std::min(kBlock, in.classes - j),
                       exponentials + j, part, grad + j);
      all.exponentials += sums.exponentials, all.products += sums.products;
    }
    return all;
  }

  void soft_gradient() {
    for (int64_t t = 0; t < in.voters; ++t) {
      if (!counted(t)) continue;
      in.prefetch_after(n, t);
      const A* saved = in.saved_sums + (n * in.voters + t) * 2;
      subtract_softmax(in.logits(n, t, read), saved[0], in.scale, factors[t] / saved[1], in.classes,
                       grad);
    }
  }
};

template <class A>
void run_as(const Kernel<A>& kernel) {
  constexpr int64_t kThreadWork = 16384;  // numbers below which another thread does not pay
  const int64_t grain = std::max<int64_t>(1, kThreadWork / (kernel.classes * kernel.voters + 1));
  if (!kernel.rows) return;
  torch::stable::parallel_for(0, kernel.rows, grain, [&](int64_t begin, int64_t end) {
    Row<A> row(kernel);
    for (int64_t n = begin; n < end; ++n) row.run(n);
    stream_fence();
  });
}

void run(const votes::Arguments& arguments, const OptionalTensor& coefficient,
         const OptionalTensor& saved, const votes::Results& results) {
  if (arguments.dtype == ScalarType::Double) {
    run_as(Kernel<double>(arguments, coefficient, saved, results));
  } else {
    run_as(Kernel<float>(arguments, coefficient, saved, results));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) { votes::register_operators<run>(m); }

}  // namespace mtkd::cpu
