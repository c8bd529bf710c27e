// The four operators of alignment, once for CPU and CUDA: they check the arguments, make the
// outputs and leave the work to a device's `run`.
#pragma once

#include "alignment.h"
#include "operators.h"

namespace mtkd::alignment {

// The arguments that the operators share, checked.
struct Arguments : RowArguments {
  Tensor target;
  OptionalTensor shift, scale, dispersion;
  double cosine, smooth_l1, mse, angle, beta, eps;

  Arguments(OptionalTensor mask, std::vector<int64_t> dims, const Tensor& student, Tensor target,
            OptionalTensor shift, OptionalTensor scale, OptionalTensor dispersion, double cosine,
            double smooth_l1, double mse, double angle, double beta, double eps)
      : RowArguments("alignment", std::move(mask), std::move(dims), student,
                     accumulate_dtype(student, student)),
        target(std::move(target)),
        shift(std::move(shift)),
        scale(std::move(scale)),
        dispersion(std::move(dispersion)),
        cosine(cosine),
        smooth_l1(smooth_l1),
        mse(mse),
        angle(angle),
        beta(beta),
        eps(eps) {
    check_shapes();
    check_numbers(student);
    check_numbers(this->target);
    check_vector(this->shift, columns, "shift is (D,)");
    check_vector(this->scale, columns, "scale is (D,)");
    check_vector(this->dispersion, teachers, "dispersion is (T,)");
    check_mask();
  }

  void check_shapes() {
    STD_TORCH_CHECK(student.dim() == 2 && target.dim() == 2,
                    "alignment: student and target are (N, D)");
    rows = student.size(0);
    STD_TORCH_CHECK(has_shape(student, {rows, columns}) && has_shape(target, {rows, columns}),
                    "alignment: student, target and dims do not agree");
  }

  void check_vector(const OptionalTensor& vector, int64_t size, const char* expected) const {
    if (!vector) return;
    STD_TORCH_CHECK(has_shape(*vector, {size}), "alignment: ", expected);
    check_numbers(*vector);
  }

  template <class A>
  Settings<A> settings() const {
    return {cosine, smooth_l1, mse, angle, beta, eps};
  }
};

// Where a device writes; without a value what is not wanted.
struct Results {
  OptionalTensor loss, student_grad;
  bool fresh = false;  // whether the gradient lies in memory that nobody has touched yet
};

// run(arguments, coefficient, results): the losses, and given the gradient to their matrix, (N, T),
// the gradient.
using Run = void(const Arguments&, const OptionalTensor&, const Results&);

#define MTKD_ALIGNMENT_ARGUMENTS                                                            \
  OptionalTensor mask, std::vector<int64_t> dims, Tensor student, Tensor target,            \
      OptionalTensor shift, OptionalTensor scale, OptionalTensor dispersion, double cosine, \
      double smooth_l1, double mse, double angle, double beta, double eps
#define MTKD_ALIGNMENT_CHECKED                                                              \
  Arguments(std::move(mask), std::move(dims), student, std::move(target), std::move(shift), \
            std::move(scale), std::move(dispersion), cosine, smooth_l1, mse, angle, beta, eps)

template <Run run>
std::tuple<Tensor, Tensor> forward(MTKD_ALIGNMENT_ARGUMENTS) {
  const Arguments arguments = MTKD_ALIGNMENT_CHECKED;
  const Tensor loss = arguments.matrix();
  run(arguments, std::nullopt, {loss, std::nullopt});
  return {loss, arguments.nothing()};
}

template <Run run>
Tensor backward(Tensor grad, Tensor /*saved*/, MTKD_ALIGNMENT_ARGUMENTS,
                std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_ALIGNMENT_CHECKED;
  arguments.check_gradient(grad);
  const Results results{std::nullopt, gradient_like(student, output_mask[0]), true};
  if (results.student_grad) run(arguments, grad, results);
  return arguments.or_nothing(results.student_grad);
}

template <Run run>
std::tuple<Tensor, Tensor> value_and_grad(Tensor coefficient, MTKD_ALIGNMENT_ARGUMENTS,
                                          std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_ALIGNMENT_CHECKED;
  arguments.check_gradient(coefficient);
  const Results results{arguments.matrix(), gradient_like(student, output_mask[0]), true};
  run(arguments, coefficient, results);
  return {*results.loss, arguments.or_nothing(results.student_grad)};
}

// The gradient goes into a tensor of any dtype, which may be the student itself.
template <Run run>
Tensor value_and_grad_out(Tensor coefficient, MTKD_ALIGNMENT_ARGUMENTS, Tensor student_grad) {
  const Arguments arguments = MTKD_ALIGNMENT_CHECKED;
  arguments.check_gradient(coefficient);
  arguments.check_output(student_grad, student, "student_grad");
  const Tensor loss = arguments.matrix();
  run(arguments, coefficient, {loss, student_grad});
  return loss;
}

#undef MTKD_ALIGNMENT_ARGUMENTS
#undef MTKD_ALIGNMENT_CHECKED

template <Run run, class Library>
void register_operators(Library& m) {
  m.impl("alignment", TORCH_BOX(&forward<run>));
  m.impl("alignment_backward", TORCH_BOX(&backward<run>));
  m.impl("alignment_value_and_grad", TORCH_BOX(&value_and_grad<run>));
  m.impl("alignment_value_and_grad_out", TORCH_BOX(&value_and_grad_out<run>));
}

}  // namespace mtkd::alignment
