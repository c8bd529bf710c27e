// The four operators of gaussian_nll, once for CPU and CUDA: they check the arguments, make the
// outputs and leave the work to a device's `run`.
#pragma once

#include "operators.h"

namespace mtkd::gaussian {

// The arguments that the operators share, checked.
struct Arguments : RowArguments {
  Tensor mean, log_std, target;
  OptionalTensor mode_logits;
  double bound;  // 0 for none
  bool per_dim, full;
  int64_t modes = 1;

  Arguments(OptionalTensor mask, std::vector<int64_t> dims, Tensor mean, Tensor log_std,
            Tensor target, OptionalTensor mode_logits, std::optional<double> bound, bool per_dim,
            bool full)
      : RowArguments("gaussian_nll", std::move(mask), std::move(dims), mean,
                     accumulate_dtype(mean, log_std)),
        mean(std::move(mean)),
        log_std(std::move(log_std)),
        target(std::move(target)),
        mode_logits(std::move(mode_logits)),
        bound(bound.value_or(0.0)),
        per_dim(per_dim),
        full(full) {
    check_shapes();
    for (const Tensor* t : {&this->mean, &this->log_std, &this->target}) check_numbers(*t);
    if (this->mode_logits) check_numbers(*this->mode_logits);
    check_mask();
  }

  void check_shapes() {
    const int64_t inner = mode_logits ? 3 : 2;
    STD_TORCH_CHECK(mean.dim() == inner && log_std.dim() == inner && target.dim() == 2,
                    "gaussian_nll: mean and log_std are (N, D), or (N, M, D) with mode_logits");
    rows = mean.size(0), modes = mode_logits ? mean.size(1) : 1;
    STD_TORCH_CHECK(has_shape(log_std, mean.sizes()), "gaussian_nll: mean and log_std differ");
    STD_TORCH_CHECK(
        target.size(0) == rows && target.size(1) == columns && mean.size(inner - 1) == columns,
        "gaussian_nll: columns and dims do not agree");
    STD_TORCH_CHECK(modes > 0, "gaussian_nll: at least one mode expected");
    STD_TORCH_CHECK(!mode_logits || has_shape(*mode_logits, {rows, modes, teachers}),
                    "gaussian_nll: mode_logits is (N, M, T)");
  }
};

// Where a device writes; without a value what is not wanted.
struct Results {
  OptionalTensor loss, mean_grad, log_std_grad, logits_grad;
  bool fresh = false;  // whether the gradients lie in memory that nobody has touched yet
};

// run(arguments, coefficient, results): the losses, and given the gradient to their matrix, (N, T),
// the gradients.
using Run = void(const Arguments&, const OptionalTensor&, const Results&);

#define MTKD_GAUSSIAN_ARGUMENTS                                                               \
  OptionalTensor mask, std::vector<int64_t> dims, Tensor mean, Tensor log_std, Tensor target, \
      OptionalTensor mode_logits, std::optional<double> bound, bool per_dim, bool full
#define MTKD_GAUSSIAN_CHECKED                                                      \
  Arguments(std::move(mask), std::move(dims), std::move(mean), std::move(log_std), \
            std::move(target), std::move(mode_logits), bound, per_dim, full)

// The gradients wanted.
inline Results gradients_of(const Arguments& arguments, const std::vector<bool>& wanted) {
  return {std::nullopt, gradient_like(arguments.mean, wanted[0]),
          gradient_like(arguments.log_std, wanted[1]),
          gradient_like(arguments.mode_logits, wanted[2]), true};
}

template <Run run>
std::tuple<Tensor, Tensor> forward(MTKD_GAUSSIAN_ARGUMENTS) {
  const Arguments arguments = MTKD_GAUSSIAN_CHECKED;
  const Tensor loss = arguments.matrix();
  Results results;
  results.loss = loss;
  run(arguments, std::nullopt, results);
  return {loss, arguments.nothing()};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor /*saved*/, MTKD_GAUSSIAN_ARGUMENTS,
                                            std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_GAUSSIAN_CHECKED;
  arguments.check_gradient(grad);
  const Results results = gradients_of(arguments, output_mask);
  run(arguments, grad, results);
  return {arguments.or_nothing(results.mean_grad), arguments.or_nothing(results.log_std_grad),
          arguments.or_nothing(results.logits_grad)};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor, Tensor> value_and_grad(Tensor coefficient,
                                                          MTKD_GAUSSIAN_ARGUMENTS,
                                                          std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_GAUSSIAN_CHECKED;
  arguments.check_gradient(coefficient);
  Results results = gradients_of(arguments, output_mask);
  results.loss = arguments.matrix();
  run(arguments, coefficient, results);
  return {*results.loss, arguments.or_nothing(results.mean_grad),
          arguments.or_nothing(results.log_std_grad), arguments.or_nothing(results.logits_grad)};
}

// The gradients go into tensors of any dtype, which may be the arguments themselves.
template <Run run>
Tensor value_and_grad_out(Tensor coefficient, MTKD_GAUSSIAN_ARGUMENTS, Tensor mean_grad,
                          Tensor log_std_grad, OptionalTensor mode_logits_grad) {
  const Arguments arguments = MTKD_GAUSSIAN_CHECKED;
  arguments.check_gradient(coefficient);
  arguments.check_output(mean_grad, arguments.mean, "mean_grad");
  arguments.check_output(log_std_grad, arguments.log_std, "log_std_grad");
  STD_TORCH_CHECK(arguments.mode_logits.has_value() == mode_logits_grad.has_value(),
                  "gaussian_nll: mode_logits_grad is given with mode_logits");
  if (mode_logits_grad)
    arguments.check_output(*mode_logits_grad, *arguments.mode_logits, "mode_logits_grad");
  const Tensor loss = arguments.matrix();
  run(arguments, coefficient, {loss, mean_grad, log_std_grad, mode_logits_grad});
  return loss;
}

#undef MTKD_GAUSSIAN_ARGUMENTS
#undef MTKD_GAUSSIAN_CHECKED

template <Run run, class Library>
void register_operators(Library& m) {
  m.impl("gaussian_nll", TORCH_BOX(&forward<run>));
  m.impl("gaussian_nll_backward", TORCH_BOX(&backward<run>));
  m.impl("gaussian_nll_value_and_grad", TORCH_BOX(&value_and_grad<run>));
  m.impl("gaussian_nll_value_and_grad_out", TORCH_BOX(&value_and_grad_out<run>));
}

}  // namespace mtkd::gaussian
