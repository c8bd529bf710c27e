// Gaussian negative log-likelihood on the CPU: a row and teacher at a time, blocks of columns in
// L1. Without mixture modes the value and the gradient take one pass; with modes a first pass
// finds each mode's energy, a second one writes the gradients weighted by the posterior.
#include "../gaussian.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "rows.h"

namespace mtkd::cpu {
namespace {

template <bool Bounded, class A>
MTKD_INLINE A energy_loop(const A* mean, const A* log_std, const A* target, int64_t n, A bound) {
  const A inverse_bound = Bounded ? A(1) / bound : A(0);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i)
    total +=
        gaussian::element<Bounded>(mean[i], log_std[i], target[i], bound, inverse_bound).energy;
  return total;
}

// `grad` scales the gradients; they may overwrite mean and log_std.
template <bool Bounded, class A>
MTKD_INLINE A gradient_loop(const A* mean, const A* log_std, const A* target, int64_t n, A bound,
                            A grad, A* mean_grad, A* log_std_grad) {
  const A inverse_bound = Bounded ? A(1) / bound : A(0);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const auto e = gaussian::element<Bounded>(mean[i], log_std[i], target[i], bound, inverse_bound);
    total += e.energy;
    mean_grad[i] = grad * e.mean_grad;
    log_std_grad[i] = grad * e.log_std_grad;
  }
  return total;
}

// Teachers shorter than a few vectors: one flat pass over the columns of several, with a gradient
// scale a column, then each teacher's sum. `energy` is scratch for the terms.
template <bool Bounded, class A>
MTKD_INLINE void short_loop(const A* mean, const A* log_std, const A* target, int64_t n, A bound,
                            const A* grad, A* energy, A* mean_grad, A* log_std_grad) {
  const A inverse_bound = Bounded ? A(1) / bound : A(0);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto e = gaussian::element<Bounded>(mean[i], log_std[i], target[i], bound, inverse_bound);
    energy[i] = e.energy;
    mean_grad[i] = grad[i] * e.mean_grad;
    log_std_grad[i] = grad[i] * e.log_std_grad;
  }
}

template <class A>
MTKD_INLINE void segment_sums_loop(const A* terms, const int64_t* offsets, int64_t count, A* sums) {
  for (int64_t t = 0; t < count; ++t) {
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = offsets[t] - offsets[0]; i < offsets[t + 1] - offsets[0]; ++i)
      total += terms[i];
    sums[t] = total;
  }
}

#define MTKD_GAUSSIAN_LOOPS(A)                                                                    \
  MTKD_CLONES A energy_of(const A* m, const A* s, const A* t, int64_t n, A bound) {               \
    return bound > 0 ? energy_loop<true>(m, s, t, n, bound)                                       \
                     : energy_loop<false>(m, s, t, n, bound);                                     \
  }                                                                                               \
  MTKD_CLONES A gradient_of(const A* m, const A* s, const A* t, int64_t n, A bound, A g, A* dm,   \
                            A* ds) {                                                              \
    return bound > 0 ? gradient_loop<true>(m, s, t, n, bound, g, dm, ds)                          \
                     : gradient_loop<false>(m, s, t, n, bound, g, dm, ds);                        \
  }                                                                                               \
  MTKD_CLONES void short_of(const A* m, const A* s, const A* t, int64_t n, A bound, const A* g,   \
                            A* e, A* dm, A* ds) {                                                 \
    bound > 0 ? short_loop<true>(m, s, t, n, bound, g, e, dm, ds)                                 \
              : short_loop<false>(m, s, t, n, bound, g, e, dm, ds);                               \
  }                                                                                               \
  MTKD_CLONES void segment_sums(const A* terms, const int64_t* offsets, int64_t count, A* sums) { \
    segment_sums_loop(terms, offsets, count, sums);                                               \
  }
MTKD_GAUSSIAN_LOOPS(float)
MTKD_GAUSSIAN_LOOPS(double)
#undef MTKD_GAUSSIAN_LOOPS

struct Inputs {
  View mean, log_std, target, logits, mask;
  std::vector<int64_t> offsets;
  std::vector<double> scales;   // of each teacher's loss: 1 / width with per_dim
  std::vector<int64_t> groups;  // first teacher of each: one long teacher, or several short ones
  int64_t rows, modes, teachers;
  double bound;
  bool full;
};

struct Outputs {
  View loss, mean_grad, log_std_grad, logits_grad;  // those not wanted have no data
};

// The pass over one row, mode and teacher; with gradients when `grad` is given.
template <class A>
A segment(const Inputs& in, const Outputs& out, int64_t n, int64_t m, int64_t t, const A* grad) {
  alignas(64) A scratch[5][kBlock];
  A total = 0;
  for (int64_t j = in.offsets[t]; j < in.offsets[t + 1]; j += kBlock) {
    const int64_t count = std::min(kBlock, in.offsets[t + 1] - j);
    const A* mean = in.mean.load(n, m, j, count, scratch[0]);
    const A* log_std = in.log_std.load(n, m, j, count, scratch[1]);
    const A* target = in.target.load(n, 0, j, count, scratch[2]);
    const A bound = static_cast<A>(in.bound);
    if (!grad) {
      total += energy_of(mean, log_std, target, count, bound);
      continue;
    }
    A* mean_grad = out.mean_grad.target(n, m, j, scratch[3]);
    A* log_std_grad = out.log_std_grad.target(n, m, j, scratch[4]);
    total += gradient_of(mean, log_std, target, count, bound, *grad, mean_grad, log_std_grad);
    out.mean_grad.store(n, m, j, count, mean_grad);
    out.log_std_grad.store(n, m, j, count, log_std_grad);
  }
  return total;
}

template <class A>
void write_zeros(const Inputs& in, const Outputs& out, int64_t n, int64_t t) {
  out.loss.put(n, 0, t, A(0));
  const std::vector<A> zeros(std::min(kBlock, in.offsets[t + 1] - in.offsets[t]), A(0));
  for (int64_t m = 0; m < in.modes; ++m) {
    out.logits_grad.put(n, m, t, A(0));
    for (int64_t j = in.offsets[t]; j < in.offsets[t + 1]; j += kBlock) {
      const int64_t count = std::min(kBlock, in.offsets[t + 1] - j);
      for (const View* view : {&out.mean_grad, &out.log_std_grad})
        if (*view) write(zeros.data(), count, view->dtype, view->column, view->at(n, m, j));
    }
  }
}

template <class A>
A log_sum_exp(const std::vector<A>& values) {
  A largest = values[0];
  for (A value : values) largest = value > largest ? value : largest;
  if (std::isinf(largest)) return largest;  // inf - inf would be NaN
  A total = 0;
  for (A value : values) total += std::exp(value - largest);
  return largest + std::log(total);
}

// Loss of a mixture, and its gradients when `grad` is given.
template <class A>
A mixture(const Inputs& in, const Outputs& out, int64_t n, int64_t t, A constant, const A* grad) {
  std::vector<A> prior(in.modes), joint(in.modes);
  for (int64_t m = 0; m < in.modes; ++m) prior[m] = in.logits.get<A>(n, m, t);
  const A normaliser = log_sum_exp(prior);
  for (int64_t m = 0; m < in.modes; ++m) {
    prior[m] -= normaliser;
    joint[m] = prior[m] - constant - segment<A>(in, out, n, m, t, nullptr);
  }
  const A evidence = log_sum_exp(joint);
  for (int64_t m = 0; grad && m < in.modes; ++m) {
    const A posterior = std::exp(joint[m] - evidence), mode_grad = *grad * posterior;
    segment<A>(in, out, n, m, t, &mode_grad);
    out.logits_grad.put(n, m, t, *grad * (std::exp(prior[m]) - posterior));
  }
  return -evidence;
}

bool counts(const Inputs& in, int64_t n, int64_t t) {
  return !in.mask || *reinterpret_cast<bool*>(in.mask.at(n, 0, t));
}

template <class A>
A constant_of(const Inputs& in, int64_t t) {
  const int64_t width = in.offsets[t + 1] - in.offsets[t];
  return in.full ? static_cast<A>(gaussian::kHalfLog2Pi) * static_cast<A>(width) : A(0);
}

// The loss of one row and teacher, and with a coefficient (rows, teachers) its scaled gradients.
template <class A>
void long_teacher(const Inputs& in, const Outputs& out, const View& coefficient, int64_t n,
                  int64_t t) {
  if (!counts(in, n, t)) return write_zeros<A>(in, out, n, t);
  const A constant = constant_of<A>(in, t), scale = static_cast<A>(in.scales[t]);
  A grad_value = 0;
  if (coefficient) grad_value = scale * coefficient.get<A>(n, 0, t);
  const A* grad = coefficient ? &grad_value : nullptr;
  const A loss = in.logits ? mixture<A>(in, out, n, t, constant, grad)
                           : segment<A>(in, out, n, 0, t, grad) + constant;
  out.loss.put(n, 0, t, scale * loss);
}

// Likewise for teachers first to last, whose columns fit a block.
template <class A>
void short_teachers(const Inputs& in, const Outputs& out, const View& coefficient, int64_t n,
                    int64_t first, int64_t last) {
  alignas(64) A scratch[6][kBlock];
  A grad[kBlock], sums[kBlock];
  const int64_t begin = in.offsets[first], columns = in.offsets[last] - begin;
  for (int64_t t = first; t < last; ++t) {
    const A value = coefficient ? static_cast<A>(in.scales[t]) * coefficient.get<A>(n, 0, t) : A(0);
    std::fill(grad + (in.offsets[t] - begin), grad + (in.offsets[t + 1] - begin), value);
  }
  A* mean_grad = out.mean_grad.target(n, 0, begin, scratch[3]);
  A* log_std_grad = out.log_std_grad.target(n, 0, begin, scratch[4]);
  short_of(in.mean.load(n, 0, begin, columns, scratch[0]),
           in.log_std.load(n, 0, begin, columns, scratch[1]),
           in.target.load(n, 0, begin, columns, scratch[2]), columns, static_cast<A>(in.bound),
           grad, scratch[5], mean_grad, log_std_grad);
  out.mean_grad.store(n, 0, begin, columns, mean_grad);
  out.log_std_grad.store(n, 0, begin, columns, log_std_grad);
  segment_sums(scratch[5], in.offsets.data() + first, last - first, sums);
  for (int64_t t = first; t < last; ++t) {
    if (!counts(in, n, t)) {
      write_zeros<A>(in, out, n, t);
    } else {
      out.loss.put(n, 0, t,
                   static_cast<A>(in.scales[t]) * (sums[t - first] + constant_of<A>(in, t)));
    }
  }
}

template <class A>
void run(const Inputs& in, const Outputs& out, const View& coefficient) {
  const int64_t groups = static_cast<int64_t>(in.groups.size()) - 1;
  for_each_row_and_group(in.rows, groups, in.modes * in.offsets.back(), [&](int64_t n, int64_t g) {
    const int64_t first = in.groups[g], last = in.groups[g + 1];
    if (last - first == 1) {
      long_teacher<A>(in, out, coefficient, n, first);
    } else {
      short_teachers<A>(in, out, coefficient, n, first, last);
    }
  });
}

// Join successive teachers of at most kShort columns while together they fit a block.
std::vector<int64_t> group_short(const std::vector<int64_t>& offsets) {
  constexpr int64_t kShort = 96;
  std::vector<int64_t> groups{0};
  const int64_t teachers = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t t = 1; t < teachers; ++t) {
    const bool both = std::max(offsets[t + 1] - offsets[t], offsets[t] - offsets[t - 1]) <= kShort;
    if (!both || offsets[t + 1] - offsets[groups.back()] > kBlock) groups.push_back(t);
  }
  groups.push_back(teachers);
  return groups;
}

std::vector<int64_t> each_teacher(int64_t teachers) {
  std::vector<int64_t> groups(teachers + 1);
  std::iota(groups.begin(), groups.end(), 0);
  return groups;
}

bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::Half ||
         s == ScalarType::BFloat16;
}

// The arguments that the four operators share, checked and in one place.
struct Problem {
  Inputs in;
  ScalarType dtype;

  Problem(const OptionalTensor& mask, const std::vector<int64_t>& dims, const Tensor& mean,
          const Tensor& log_std, const Tensor& target, const OptionalTensor& mode_logits,
          std::optional<double> bound, bool per_dim, bool full)
      : dtype(accumulate_dtype(mean, log_std)) {
    const int64_t inner = mode_logits ? 3 : 2;
    STD_TORCH_CHECK(mean.dim() == inner && log_std.dim() == inner && target.dim() == 2,
                    "gaussian_nll: mean and log_std are (N, D), or (N, M, D) with mode_logits");
    in.offsets = offsets_of(dims);
    for (int64_t width : dims)
      in.scales.push_back(per_dim ? 1.0 / static_cast<double>(width) : 1.0);
    in.rows = mean.size(0), in.modes = mode_logits ? mean.size(1) : 1, in.teachers = dims.size();
    in.groups = mode_logits ? each_teacher(in.teachers) : group_short(in.offsets);
    in.bound = bound.value_or(0.0), in.full = full;
    for (int64_t i = 0; i < inner; ++i)
      STD_TORCH_CHECK(log_std.size(i) == mean.size(i), "gaussian_nll: mean and log_std differ");
    STD_TORCH_CHECK(target.size(0) == in.rows && target.size(1) == in.offsets.back() &&
                        mean.size(inner - 1) == in.offsets.back(),
                    "gaussian_nll: columns and dims do not agree");
    STD_TORCH_CHECK(is_floating(mean) && is_floating(log_std) && is_floating(target) &&
                        (!mode_logits || is_floating(*mode_logits)),
                    "gaussian_nll: floating-point tensors expected");
    if (mode_logits)
      STD_TORCH_CHECK(mode_logits->dim() == 3 && mode_logits->size(0) == in.rows &&
                          mode_logits->size(1) == in.modes && mode_logits->size(2) == in.teachers,
                      "gaussian_nll: mode_logits is (N, M, T)");
    if (mask) check_matrix(*mask, "mask");
    in.mean = View(mean), in.log_std = View(log_std), in.target = View(target);
    in.logits = View(mode_logits), in.mask = View(mask);
  }

  void check_matrix(const Tensor& matrix, const char* name) const {
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == in.rows && matrix.size(1) == in.teachers,
                    "gaussian_nll: ", name, " is (N, T)");
  }

  Tensor empty_matrix(const Tensor& like) const {
    return empty(like, {in.rows, in.teachers}, dtype);
  }

  void run(const Outputs& out, const View& coefficient) const {
    if (dtype == ScalarType::Double) {
      cpu::run<double>(in, out, coefficient);
    } else {
      cpu::run<float>(in, out, coefficient);
    }
  }
};

std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

void check_output(const Tensor& output, const Tensor& argument, const char* name) {
  STD_TORCH_CHECK(is_floating(output) && shape_of(output) == shape_of(argument), "gaussian_nll: ",
                  name, " has its argument's shape, and a floating dtype");
}

Tensor gradient_like(const Tensor& t, bool wanted) {
  return empty(t, wanted ? shape_of(t) : std::vector<int64_t>{0}, t.scalar_type());
}

View view_if(const Tensor& t, bool wanted) { return wanted ? View(t) : View(); }

View gradient_view(const Tensor& t, bool wanted) {
  View view = view_if(t, wanted);
  view.streamed = t.numel() * view.item >= kLargeBytes;
  return view;
}

// (matrix if wanted, gradients) from a gradient to the matrix.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Problem& problem, bool with_matrix,
                                                     const Tensor& coefficient, const Tensor& mean,
                                                     const Tensor& log_std,
                                                     const OptionalTensor& mode_logits,
                                                     const std::vector<bool>& wanted) {
  problem.check_matrix(coefficient, "the gradient");
  const bool with_logits = wanted[2] && mode_logits;
  Tensor matrix = with_matrix ? problem.empty_matrix(mean) : empty(mean, {0}, problem.dtype);
  Tensor mean_grad = gradient_like(mean, wanted[0]);
  Tensor log_std_grad = gradient_like(log_std, wanted[1]);
  Tensor logits_grad = gradient_like(mode_logits ? *mode_logits : mean, with_logits);
  problem.run({view_if(matrix, with_matrix), gradient_view(mean_grad, wanted[0]),
               gradient_view(log_std_grad, wanted[1]), view_if(logits_grad, with_logits)},
              View(coefficient));
  return {matrix, mean_grad, log_std_grad, logits_grad};
}

#define MTKD_GAUSSIAN_ARGUMENTS                                                               \
  OptionalTensor mask, std::vector<int64_t> dims, Tensor mean, Tensor log_std, Tensor target, \
      OptionalTensor mode_logits, std::optional<double> bound, bool per_dim, bool full
#define MTKD_GAUSSIAN_PROBLEM \
  Problem(mask, dims, mean, log_std, target, mode_logits, bound, per_dim, full)

std::tuple<Tensor, Tensor> forward(MTKD_GAUSSIAN_ARGUMENTS) {
  const auto problem = MTKD_GAUSSIAN_PROBLEM;
  Tensor matrix = problem.empty_matrix(mean);
  problem.run({View(matrix), View(), View(), View()}, View());
  return {matrix, empty(mean, {0}, mean.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor /*saved*/, MTKD_GAUSSIAN_ARGUMENTS,
                                            std::vector<bool> output_mask) {
  auto [matrix, mean_grad, log_std_grad, logits_grad] =
      gradients(MTKD_GAUSSIAN_PROBLEM, false, grad, mean, log_std, mode_logits, output_mask);
  return {mean_grad, log_std_grad, logits_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> value_and_grad(Tensor coefficient,
                                                          MTKD_GAUSSIAN_ARGUMENTS,
                                                          std::vector<bool> output_mask) {
  return gradients(MTKD_GAUSSIAN_PROBLEM, true, coefficient, mean, log_std, mode_logits,
                   output_mask);
}

// The gradients go into tensors of any dtype, which may be the arguments themselves.
Tensor value_and_grad_out(Tensor coefficient, MTKD_GAUSSIAN_ARGUMENTS, Tensor mean_grad,
                          Tensor log_std_grad, OptionalTensor mode_logits_grad) {
  const auto problem = MTKD_GAUSSIAN_PROBLEM;
  problem.check_matrix(coefficient, "the coefficient");
  check_output(mean_grad, mean, "mean_grad");
  check_output(log_std_grad, log_std, "log_std_grad");
  STD_TORCH_CHECK(mode_logits.has_value() == mode_logits_grad.has_value(),
                  "gaussian_nll: mode_logits_grad is given with mode_logits");
  if (mode_logits) check_output(*mode_logits_grad, *mode_logits, "mode_logits_grad");
  Tensor matrix = problem.empty_matrix(mean);
  problem.run({View(matrix), View(mean_grad), View(log_std_grad), View(mode_logits_grad)},
              View(coefficient));
  return matrix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) {
  m.impl("gaussian_nll", TORCH_BOX(&forward));
  m.impl("gaussian_nll_backward", TORCH_BOX(&backward));
  m.impl("gaussian_nll_value_and_grad", TORCH_BOX(&value_and_grad));
  m.impl("gaussian_nll_value_and_grad_out", TORCH_BOX(&value_and_grad_out));
}

}  // namespace mtkd::cpu
