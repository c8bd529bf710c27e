// The four operators of mixture_kl: they check the arguments, make the outputs and leave the work
// to a device's `run`.
#pragma once

#include "mixtures.h"
#include "operators.h"

namespace mtkd::mixtures {

// The arguments that the operators share, checked. The matrix has a single column.
struct Arguments : RowArguments {
  std::vector<Tensor> teacher;  // one (N, T, C), or T of (N, C)
  Tensor weight;                // (N, T)
  OptionalTensor counted;       // (N, T), of bools
  double temperature, scale;
  int64_t classes = 0, mixed = 0;  // the number of teachers

  Arguments(OptionalTensor mask, std::vector<int64_t> dims, const Tensor& student,
            std::vector<Tensor> teacher, Tensor weight, OptionalTensor counted, double temperature,
            double scale)
      : RowArguments("mixture_kl", std::move(mask), std::move(dims), student,
                     accumulate_dtype(student, student)),
        teacher(std::move(teacher)),
        weight(std::move(weight)),
        counted(std::move(counted)),
        temperature(temperature),
        scale(scale) {
    STD_TORCH_CHECK(student.dim() == 2, "mixture_kl: student is (N, C)");
    rows = student.size(0), classes = student.size(1);
    mixed = check_logits(this->teacher, classes);
    check_numbers(student);
    check_numbers(this->weight);
    STD_TORCH_CHECK(has_shape(this->weight, {rows, mixed}), "mixture_kl: weight is (N, T)");
    if (this->counted) check_bools(*this->counted, mixed, "counted");
    STD_TORCH_CHECK(teachers == 1 && columns == classes,
                    "mixture_kl: dims has the number of classes");
    STD_TORCH_CHECK(temperature > 0, "mixture_kl: temperature is positive");
    check_mask();
  }
};

// Where a device writes; without a value what is not wanted.
struct Results {
  OptionalTensor loss, student_grad, weight_grad;
  bool fresh = false;  // whether the gradients lie in memory that nobody has touched yet

  bool gradients() const { return student_grad || weight_grad; }
};

// run(arguments, coefficient, results): the losses, and given the gradient to their matrix, (N, 1),
// the gradients.
using Run = void(const Arguments&, const OptionalTensor&, const Results&);

#define MTKD_MIXTURES_ARGUMENTS                                                                \
  OptionalTensor mask, std::vector<int64_t> dims, Tensor student, std::vector<Tensor> teacher, \
      Tensor weight, OptionalTensor counted, double temperature, double scale
#define MTKD_MIXTURES_CHECKED                                                      \
  Arguments(std::move(mask), std::move(dims), student, std::move(teacher), weight, \
            std::move(counted), temperature, scale)

template <Run run>
std::tuple<Tensor, Tensor> forward(MTKD_MIXTURES_ARGUMENTS) {
  const Arguments arguments = MTKD_MIXTURES_CHECKED;
  const Tensor loss = arguments.matrix();
  run(arguments, std::nullopt, {loss, std::nullopt, std::nullopt});
  return {loss, arguments.nothing()};
}

template <Run run>
std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor /*saved*/, MTKD_MIXTURES_ARGUMENTS,
                                    std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_MIXTURES_CHECKED;
  arguments.check_gradient(grad);
  const Results results{std::nullopt, gradient_like(student, output_mask[0]),
                        gradient_like(weight, output_mask[1]), true};
  if (results.gradients()) run(arguments, grad, results);
  return {arguments.or_nothing(results.student_grad), arguments.or_nothing(results.weight_grad)};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> value_and_grad(Tensor coefficient, MTKD_MIXTURES_ARGUMENTS,
                                                  std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_MIXTURES_CHECKED;
  arguments.check_gradient(coefficient);
  const Results results{arguments.matrix(), gradient_like(student, output_mask[0]),
                        gradient_like(weight, output_mask[1]), true};
  run(arguments, coefficient, results);
  return {*results.loss, arguments.or_nothing(results.student_grad),
          arguments.or_nothing(results.weight_grad)};
}

// The gradients go into tensors of any dtype, which may be the student and the weights themselves.
template <Run run>
Tensor value_and_grad_out(Tensor coefficient, MTKD_MIXTURES_ARGUMENTS, Tensor student_grad,
                          Tensor weight_grad) {
  const Arguments arguments = MTKD_MIXTURES_CHECKED;
  arguments.check_gradient(coefficient);
  arguments.check_output(student_grad, student, "student_grad");
  arguments.check_output(weight_grad, weight, "weight_grad");
  const Tensor loss = arguments.matrix();
  run(arguments, coefficient, {loss, student_grad, weight_grad});
  return loss;
}

#undef MTKD_MIXTURES_ARGUMENTS
#undef MTKD_MIXTURES_CHECKED

template <Run run, class Library>
void register_operators(Library& m) {
  m.impl("mixture_kl", TORCH_BOX(&forward<run>));
  m.impl("mixture_kl_backward", TORCH_BOX(&backward<run>));
  m.impl("mixture_kl_value_and_grad", TORCH_BOX(&value_and_grad<run>));
  m.impl("mixture_kl_value_and_grad_out", TORCH_BOX(&value_and_grad_out<run>));
}

}  // namespace mtkd::mixtures
