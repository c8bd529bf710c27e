// Votes on the CPU: a row at a time. Its gradient begins as the student's softmax, then every
// teacher's logits are read once, and its vote is taken off while they are in a cache.
#include "../votes.h"

#include <limits>
#include <memory>

#include "../votes_operators.h"
#include "teachers.h"

namespace mtkd::cpu {
namespace {

using votes::exponential_of_excess;

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

// Takes a softmax off whose sum is known.
template <class A>
MTKD_INLINE void subtract_softmax_loop(const A* x, A most, A scale, A factor, int64_t n, A* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] -= factor * exponential_of_excess((x[i] - most) * scale);
}

#define MTKD_VOTES_LOOPS(A)                                                                      \
  MTKD_CLONES Matches<A> matches(const A* x, int64_t n, A most) {                                \
    return matches_loop(x, n, most);                                                             \
  }                                                                                              \
  MTKD_CLONES void subtract_softmax(const A* x, A most, A scale, A factor, int64_t n, A* grad) { \
    subtract_softmax_loop(x, most, scale, factor, n, grad);                                      \
  }
MTKD_VOTES_LOOPS(float)
MTKD_VOTES_LOOPS(double)
#undef MTKD_VOTES_LOOPS

template <class A>
struct Kernel {
  View student, mask, weight, coefficient, loss, grad;  // those not there have no data
  Teachers teachers;
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
        teachers(arguments.teacher, arguments.rows, arguments.voters, arguments.classes),
        rows(arguments.rows),
        classes(arguments.classes),
        voters(arguments.voters),
        columns(arguments.teachers),
        scale(static_cast<A>(1 / arguments.temperature)),
        hard(arguments.hard) {
    if (hard) {
      if (results.saved) written_class = static_cast<int64_t*>(results.saved->data_ptr());
      if (saved) saved_class = static_cast<int64_t*>(saved->data_ptr());
    } else {
      if (results.saved) written_sums = static_cast<A*>(results.saved->data_ptr());
      if (saved) saved_sums = static_cast<A*>(saved->data_ptr());
    }
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
    const A sum = student_part(s, most, A(1), in.classes, excess, grad);
    log_sum = std::log(sum);
    in.teachers.prefetch_student(in.student, n + 1);
    if (!in.grad) return;
    A total = 0;
    for (int64_t k = 0; k < in.columns; ++k) total += coefficient(k);
    scale_by(total / sum, in.classes, grad);
  }

  // The class of a teacher's largest logit; -1 where there are `several`, or none.
  int64_t decision(int64_t t) {
    in.teachers.prefetch_after(n, t);
    const A* x = in.teachers.load(n, t, read);
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
      in.teachers.prefetch_after(n, t);
      const A* x = in.teachers.load(n, t, read);
      const A most = largest(x, in.classes);
      const Sums<A> sums =
          teacher_part(x, most, in.scale, excess, in.classes, exponentials, last, grad);
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
      last = {exponentials, -factors[t] / sums.exponentials};
      std::swap(exponentials, before);
    }
    if (together()) in.loss.put(n, 0, 0, log_sum - mean);
    if (last.numbers) add(last, in.classes, grad);
  }

  void soft_gradient() {
    for (int64_t t = 0; t < in.voters; ++t) {
      if (!counted(t)) continue;
      in.teachers.prefetch_after(n, t);
      const A* saved = in.saved_sums + (n * in.voters + t) * 2;
      subtract_softmax(in.teachers.load(n, t, read), saved[0], in.scale, factors[t] / saved[1],
                       in.classes, grad);
    }
  }
};

template <class A>
void run_as(const Kernel<A>& kernel) {
  for_each_range(kernel.rows, kernel.classes * kernel.voters, [&](int64_t begin, int64_t end) {
    Row<A> row(kernel);
    for (int64_t n = begin; n < end; ++n) row.run(n);
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
