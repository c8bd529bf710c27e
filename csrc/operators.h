// What the operators of every row loss share, for CPU and CUDA: how arguments are checked and
// outputs made.
#pragma once

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "common.h"

namespace mtkd {

inline bool has_shape(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return t.sizes().equals(shape);
}

// The arguments that all row losses have, and their checks; a loss adds its own.
struct RowArguments {
  const char* loss;  // its name, for messages
  OptionalTensor mask;
  std::vector<int64_t> dims;
  Tensor student;    // the first differentiable argument: it has the rows and the device
  ScalarType dtype;  // of losses
  int64_t rows = 0, teachers, columns;

  RowArguments(const char* loss, OptionalTensor mask, std::vector<int64_t> dims, Tensor student,
               ScalarType dtype)
      : loss(loss),
        mask(std::move(mask)),
        dims(std::move(dims)),
        student(std::move(student)),
        dtype(dtype),
        teachers(static_cast<int64_t>(this->dims.size())),
        columns(std::accumulate(this->dims.begin(), this->dims.end(), int64_t{0})) {
    STD_TORCH_CHECK(std::all_of(this->dims.begin(), this->dims.end(), [](auto n) { return n > 0; }),
                    loss, ": dims are positive");
  }

  void check_device(const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == student.device(), loss, ": tensors on one device expected");
  }

  // What kernels read and write as numbers.
  void check_numbers(const Tensor& t) const {
    STD_TORCH_CHECK(is_floating(t), loss, ": floating-point tensors expected");
    check_device(t);
  }

  // Teachers' logits: one (N, T, C), or T of (N, C). Returns T.
  int64_t check_logits(const std::vector<Tensor>& teacher, int64_t classes) const {
    STD_TORCH_CHECK(!teacher.empty(), loss, ": teachers expected");
    const bool packed = teacher[0].dim() == 3;
    STD_TORCH_CHECK(!packed || teacher.size() == 1, loss, ": one packed teacher expected");
    const int64_t count = packed ? teacher[0].size(1) : static_cast<int64_t>(teacher.size());
    for (const Tensor& each : teacher) {
      STD_TORCH_CHECK(
          packed ? has_shape(each, {rows, count, classes}) : has_shape(each, {rows, classes}), loss,
          ": teacher is (N, T, C), or T tensors (N, C)");
      check_numbers(each);
    }
    return count;
  }

  void check_bools(const Tensor& t, int64_t width, const char* name) const {
    STD_TORCH_CHECK(has_shape(t, {rows, width}) && t.scalar_type() == ScalarType::Bool, loss, ": ",
                    name, " is (N, T), of bools");
    check_device(t);
  }

  void check_mask() const {
    if (mask) check_bools(*mask, teachers, "mask");
  }

  void check_gradient(const Tensor& matrix) const {
    STD_TORCH_CHECK(has_shape(matrix, {rows, teachers}), loss,
                    ": the gradient to the losses is (N, T)");
    check_numbers(matrix);
  }

  void check_output(const Tensor& output, const Tensor& argument, const char* name) const {
    STD_TORCH_CHECK(has_shape(output, argument.sizes()), loss, ": ", name,
                    " has its argument's shape");
    check_numbers(output);
  }

  Tensor matrix() const { return empty(student, {rows, teachers}, dtype); }
  // The empty tensor that stands for a result which is not wanted.
  Tensor nothing() const { return empty(student, {0}, student.scalar_type()); }
  Tensor or_nothing(const OptionalTensor& result) const { return result ? *result : nothing(); }
};

inline OptionalTensor gradient_like(const OptionalTensor& t, bool wanted) {
  if (!wanted || !t) return std::nullopt;
  return empty(*t, {t->sizes().begin(), t->sizes().end()}, t->scalar_type());
}

}  // namespace mtkd
