// Gaussian negative log-likelihood on the CPU: a row and teacher at a time, blocks of columns in
// L1. Without mixture modes the value and the gradient take one pass; with modes a first pass
// finds each mode's energy, a second one writes the gradients weighted by the posterior.
#include "../gaussian.h"

#include <algorithm>
#include <numeric>

#include "../gaussian_operators.h"
#include "rows.h"

namespace mtkd::cpu {
namespace {

template <bool Bounded, class A>
MTKD_INLINE A energy_loop(const A* mean, const A* log_std, const A* target, int64_t n, A bound) {
  const A inverse_bound = Bounded ? A(1) / bound : A(0);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i)
    total += gaussian::element<Bounded>(mean[i], log_std[i], target[i], bound, inverse_bound, A(0))
                 .energy;
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
    const auto e =
        gaussian::element<Bounded>(mean[i], log_std[i], target[i], bound, inverse_bound, grad);
    total += e.energy;
    mean_grad[i] = e.mean_grad;
    log_std_grad[i] = e.log_std_grad;
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
    const auto e =
        gaussian::element<Bounded>(mean[i], log_std[i], target[i], bound, inverse_bound, grad[i]);
    energy[i] = e.energy;
    mean_grad[i] = e.mean_grad;
    log_std_grad[i] = e.log_std_grad;
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
void zero_teacher(const Inputs& in, const Outputs& out, int64_t n, int64_t t) {
  out.loss.put(n, 0, t, A(0));
  for (int64_t m = 0; m < in.modes; ++m) {
    out.logits_grad.put(n, m, t, A(0));
    for (const View* view : {&out.mean_grad, &out.log_std_grad})
      write_zeros(*view, n, m, in.offsets[t], in.offsets[t + 1]);
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

template <class A>
A constant_of(const Inputs& in, int64_t t) {
  const int64_t width = in.offsets[t + 1] - in.offsets[t];
  return in.full ? static_cast<A>(gaussian::kHalfLog2Pi) * static_cast<A>(width) : A(0);
}

// The loss of one row and teacher, and with a coefficient (rows, teachers) its scaled gradients.
template <class A>
void long_teacher(const Inputs& in, const Outputs& out, const View& coefficient, int64_t n,
                  int64_t t) {
  if (!counts(in.mask, n, t)) return zero_teacher<A>(in, out, n, t);
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
    if (!counts(in.mask, n, t)) {
      zero_teacher<A>(in, out, n, t);
    } else {
      out.loss.put(n, 0, t,
                   static_cast<A>(in.scales[t]) * (sums[t - first] + constant_of<A>(in, t)));
    }
  }
}

template <class A>
void run_as(const Inputs& in, const Outputs& out, const View& coefficient) {
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

std::vector<int64_t> each_teacher(int64_t teachers) {
  std::vector<int64_t> groups(teachers + 1);
  std::iota(groups.begin(), groups.end(), 0);
  return groups;
}

Inputs inputs_of(const gaussian::Arguments& arguments) {
  Inputs in;
  in.mean = View(arguments.mean), in.log_std = View(arguments.log_std);
  in.target = View(arguments.target), in.logits = View(arguments.mode_logits);
  in.mask = View(arguments.mask);
  in.offsets = offsets_of(arguments.dims);
  for (int64_t width : arguments.dims)
    in.scales.push_back(arguments.per_dim ? 1.0 / static_cast<double>(width) : 1.0);
  in.groups = in.logits ? each_teacher(arguments.teachers) : group_short(in.offsets);
  in.rows = arguments.rows, in.modes = arguments.modes, in.teachers = arguments.teachers;
  in.bound = arguments.bound, in.full = arguments.full;
  return in;
}

Outputs outputs_of(const gaussian::Results& results) {
  return {View(results.loss), output_view(results.mean_grad, results.fresh),
          output_view(results.log_std_grad, results.fresh), View(results.logits_grad)};
}

void run(const gaussian::Arguments& arguments, const OptionalTensor& coefficient,
         const gaussian::Results& results) {
  const Inputs in = inputs_of(arguments);
  const Outputs out = outputs_of(results);
  if (arguments.dtype == ScalarType::Double) {
    run_as<double>(in, out, View(coefficient));
  } else {
    run_as<float>(in, out, View(coefficient));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) { gaussian::register_operators<run>(m); }

}  // namespace mtkd::cpu
