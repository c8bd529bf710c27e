// The four operators of kl_div, once for CPU and CUDA: they check the arguments, make the outputs
// and leave the work to a device's `run`.
#pragma once

#include "divergence.h"
#include "operators.h"

namespace mtkd::divergence {

// The arguments that the operators share, checked.
struct Arguments : RowArguments {
  Tensor teacher;
  bool shared;  // one head of the student for all teachers
  double forward, reverse;
  bool mixture;
  double temperature, scale;

  Arguments(OptionalTensor mask, std::vector<int64_t> dims, const Tensor& student, Tensor teacher,
            double forward, double reverse, bool mixture, double temperature, double scale)
      : RowArguments("kl_div", std::move(mask), std::move(dims), student,
                     accumulate_dtype(student, teacher)),
        teacher(std::move(teacher)),
        shared(false),
        forward(forward),
        reverse(reverse),
        mixture(mixture),
        temperature(temperature),
        scale(scale) {
    check_shapes();
    check_numbers(student);
    check_numbers(this->teacher);
    check_mask();
  }

  void check_shapes() {
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2,
                    "kl_div: student and teacher have two dimensions");
    rows = student.size(0);
    shared = student.size(1) != columns;
    const bool equal = std::all_of(dims.begin(), dims.end(),
                                   [this](int64_t width) { return width == student.size(1); });
    STD_TORCH_CHECK(has_shape(teacher, {rows, columns}) && (!shared || equal),
                    "kl_div: student, teacher and dims do not agree");
  }

  template <class A>
  Settings<A> settings() const {
    return {forward, reverse, mixture, temperature, scale};
  }
};

// Where a device writes; without a value what is not wanted.
struct Results {
  OptionalTensor loss, student_grad, teacher_grad;
  bool fresh = false;  // whether the gradients lie in memory that nobody has touched yet

  bool gradients() const { return student_grad || teacher_grad; }
};

// run(arguments, coefficient, results): the losses, and given the gradient to their matrix, (N, T),
// the gradients.
using Run = void(const Arguments&, const OptionalTensor&, const Results&);

#define MTKD_DIVERGENCE_ARGUMENTS                                                 \
  OptionalTensor mask, std::vector<int64_t> dims, Tensor student, Tensor teacher, \
      double forward_weight, double reverse_weight, bool mixture, double temperature, double scale
#define MTKD_DIVERGENCE_CHECKED                                                                 \
  Arguments(std::move(mask), std::move(dims), student, teacher, forward_weight, reverse_weight, \
            mixture, temperature, scale)

template <Run run>
std::tuple<Tensor, Tensor> forward(MTKD_DIVERGENCE_ARGUMENTS) {
  const Arguments arguments = MTKD_DIVERGENCE_CHECKED;
  const Tensor loss = arguments.matrix();
  run(arguments, std::nullopt, {loss, std::nullopt, std::nullopt});
  return {loss, arguments.nothing()};
}

template <Run run>
std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor /*saved*/, MTKD_DIVERGENCE_ARGUMENTS,
                                    std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_DIVERGENCE_CHECKED;
  arguments.check_gradient(grad);
  const Results results{std::nullopt, gradient_like(student, output_mask[0]),
                        gradient_like(teacher, output_mask[1]), true};
  if (results.gradients()) run(arguments, grad, results);
  return {arguments.or_nothing(results.student_grad), arguments.or_nothing(results.teacher_grad)};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> value_and_grad(Tensor coefficient, MTKD_DIVERGENCE_ARGUMENTS,
                                                  std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_DIVERGENCE_CHECKED;
  arguments.check_gradient(coefficient);
  const Results results{arguments.matrix(), gradient_like(student, output_mask[0]),
                        gradient_like(teacher, output_mask[1]), true};
  run(arguments, coefficient, results);
  return {*results.loss, arguments.or_nothing(results.student_grad),
          arguments.or_nothing(results.teacher_grad)};
}

// The gradients go into tensors of any dtype, which may be the logits themselves.
template <Run run>
Tensor value_and_grad_out(Tensor coefficient, MTKD_DIVERGENCE_ARGUMENTS, Tensor student_grad,
                          OptionalTensor teacher_grad) {
  const Arguments arguments = MTKD_DIVERGENCE_CHECKED;
  arguments.check_gradient(coefficient);
  arguments.check_output(student_grad, student, "student_grad");
  if (teacher_grad) arguments.check_output(*teacher_grad, teacher, "teacher_grad");
  const Tensor loss = arguments.matrix();
  run(arguments, coefficient, {loss, student_grad, teacher_grad});
  return loss;
}

#undef MTKD_DIVERGENCE_ARGUMENTS
#undef MTKD_DIVERGENCE_CHECKED

template <Run run, class Library>
void register_operators(Library& m) {
  m.impl("kl_div", TORCH_BOX(&forward<run>));
  m.impl("kl_div_backward", TORCH_BOX(&backward<run>));
  m.impl("kl_div_value_and_grad", TORCH_BOX(&value_and_grad<run>));
  m.impl("kl_div_value_and_grad_out", TORCH_BOX(&value_and_grad_out<run>));
}

}  // namespace mtkd::divergence
