// The four operators of majority_vote: they check the arguments, make the outputs and leave the
// work to a device's `run`.
#pragma once

#include "operators.h"
#include "votes.h"

namespace mtkd::votes {

// The arguments that the operators share, checked. A column of the matrix is a vote.
struct Arguments : RowArguments {
  std::vector<Tensor> teacher;  // one (N, T, C), or T of (N, C)
  OptionalTensor weight;        // (N, T), with it all teachers share one vote
  double temperature;
  bool hard;
  int64_t classes = 0, voters = 0;

  Arguments(OptionalTensor mask, std::vector<int64_t> dims, const Tensor& student,
            std::vector<Tensor> teacher, OptionalTensor weight, double temperature, bool hard)
      : RowArguments("majority_vote", std::move(mask), std::move(dims), student,
                     accumulate_dtype(student, student)),
        teacher(std::move(teacher)),
        weight(std::move(weight)),
        temperature(temperature),
        hard(hard) {
    STD_TORCH_CHECK(student.dim() == 2, "majority_vote: student is (N, C)");
    rows = student.size(0), classes = student.size(1);
    voters = check_logits(this->teacher, classes);
    check_numbers(student);
    if (this->weight) {
      STD_TORCH_CHECK(has_shape(*this->weight, {rows, voters}), "majority_vote: weight is (N, T)");
      check_numbers(*this->weight);
    }
    STD_TORCH_CHECK(teachers == (this->weight ? 1 : voters) && columns == teachers * classes,
                    "majority_vote: dims has the number of classes of each column");
    STD_TORCH_CHECK(temperature > 0, "majority_vote: temperature is positive");
    check_mask();
  }

  // What forward leaves for backward: of a hard vote its class, -1 where that is not one; of a
  // teacher's softmax its largest logit and the sum of exponentials.
  std::vector<int64_t> saved_shape() const {
    return hard ? std::vector<int64_t>{rows, teachers} : std::vector<int64_t>{rows, voters, 2};
  }
  ScalarType saved_dtype() const { return hard ? ScalarType::Long : dtype; }
  void check_saved(const Tensor& saved) const {
    STD_TORCH_CHECK(has_shape(saved, saved_shape()) && saved.is_contiguous() &&
                        saved.scalar_type() == saved_dtype(),
                    "majority_vote: saved is what the forward operator returned");
    check_device(saved);
  }
};

// Where a device writes; without a value what is not wanted.
struct Results {
  OptionalTensor loss, student_grad, saved;
  bool fresh = false;  // whether the gradient lies in memory that nobody has touched yet
};

// run(arguments, coefficient, saved, results): the losses, and given the gradient to their matrix,
// (N, K), the gradient. With `saved` from forward the teachers are not searched again.
using Run = void(const Arguments&, const OptionalTensor&, const OptionalTensor&, const Results&);

#define MTKD_VOTES_ARGUMENTS                                                                   \
  OptionalTensor mask, std::vector<int64_t> dims, Tensor student, std::vector<Tensor> teacher, \
      OptionalTensor weight, double temperature, bool hard
#define MTKD_VOTES_CHECKED                                                                    \
  Arguments(std::move(mask), std::move(dims), student, std::move(teacher), std::move(weight), \
            temperature, hard)

template <Run run>
std::tuple<Tensor, Tensor> forward(MTKD_VOTES_ARGUMENTS) {
  const Arguments arguments = MTKD_VOTES_CHECKED;
  const Tensor loss = arguments.matrix();
  const Tensor saved = empty(student, arguments.saved_shape(), arguments.saved_dtype());
  run(arguments, std::nullopt, std::nullopt, {loss, std::nullopt, saved});
  return {loss, saved};
}

template <Run run>
Tensor backward(Tensor grad, Tensor saved, MTKD_VOTES_ARGUMENTS, std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_VOTES_CHECKED;
  arguments.check_gradient(grad);
  arguments.check_saved(saved);
  const Results results{std::nullopt, gradient_like(student, output_mask[0]), std::nullopt, true};
  if (results.student_grad) run(arguments, grad, saved, results);
  return arguments.or_nothing(results.student_grad);
}

template <Run run>
std::tuple<Tensor, Tensor> value_and_grad(Tensor coefficient, MTKD_VOTES_ARGUMENTS,
                                          std::vector<bool> output_mask) {
  const Arguments arguments = MTKD_VOTES_CHECKED;
  arguments.check_gradient(coefficient);
  const Results results{arguments.matrix(), gradient_like(student, output_mask[0]), std::nullopt,
                        true};
  run(arguments, coefficient, std::nullopt, results);
  return {*results.loss, arguments.or_nothing(results.student_grad)};
}

// The gradient goes into a tensor of any dtype, which may be the student itself.
template <Run run>
Tensor value_and_grad_out(Tensor coefficient, MTKD_VOTES_ARGUMENTS, Tensor student_grad) {
  const Arguments arguments = MTKD_VOTES_CHECKED;
  arguments.check_gradient(coefficient);
  arguments.check_output(student_grad, student, "student_grad");
  const Tensor loss = arguments.matrix();
  run(arguments, coefficient, std::nullopt, {loss, student_grad, std::nullopt});
  return loss;
}

#undef MTKD_VOTES_ARGUMENTS
#undef MTKD_VOTES_CHECKED

template <Run run, class Library>
void register_operators(Library& m) {
  m.impl("majority_vote", TORCH_BOX(&forward<run>));
  m.impl("majority_vote_backward", TORCH_BOX(&backward<run>));
  m.impl("majority_vote_value_and_grad", TORCH_BOX(&value_and_grad<run>));
  m.impl("majority_vote_value_and_grad_out", TORCH_BOX(&value_and_grad_out<run>));
}

}  // namespace mtkd::votes
