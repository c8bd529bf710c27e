// How CPU kernels walk over the elements of several tensors of one shape, whatever their strides.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>

#include "rows.h"

namespace mtkd::cpu {

// How a tensor is walked over: strides of the elements' dimensions, and of its own further one,
// of classes or of messages.
struct Operand {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t item = 0, across = 0;
  std::vector<int64_t> strides;

  Operand() = default;
  Operand(const Tensor& t, std::optional<int64_t> further)
      : data(static_cast<char*>(t.data_ptr())),
        dtype(t.scalar_type()),
        item(static_cast<int64_t>(t.element_size())) {
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (further == d) {
        across = t.stride(d);
      } else {
        strides.push_back(t.stride(d));
      }
    }
  }
  explicit operator bool() const { return data != nullptr; }
  int64_t inner() const { return strides.empty() ? 1 : strides.back(); }

  template <class A>
  const A* load(int64_t at, int64_t n, A* scratch) const {
    char* from = data + at * item;
    if (dtype == dtype_of<A>() && inner() == 1) return reinterpret_cast<const A*>(from);
    read(from, dtype, inner(), n, scratch);
    return scratch;
  }
  template <class A>
  void store(int64_t at, int64_t n, const A* values) const {
    write(values, n, dtype, inner(), data + at * item);
  }
};

// The elements' dimensions, outermost first, merged where every operand allows it.
struct Nest {
  std::vector<int64_t> sizes;

  Nest(std::vector<int64_t> shape, const std::vector<Operand*>& operands) : sizes(shape) {
    std::vector<size_t> order(shape.size());
    std::iota(order.begin(), order.end(), 0);
    const std::vector<int64_t> lead = operands[0]->strides;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return (shape[a] == 1 ? 0 : 1) * lead[a] > (shape[b] == 1 ? 0 : 1) * lead[b];
    });
    apply(order, operands);
    for (size_t d = sizes.size(); d-- > 1;) {
      const bool merged = std::all_of(operands.begin(), operands.end(), [&](const Operand* o) {
        return sizes[d - 1] == 1 || o->strides[d - 1] == o->strides[d] * sizes[d];
      });
      if (merged || sizes[d] == 1) merge(d, sizes[d] == 1, operands);
    }
    if (sizes.empty()) sizes.push_back(1);
  }
  int64_t inner() const { return sizes.back(); }
  int64_t outer() const {
    return std::accumulate(sizes.begin(), sizes.end() - 1, int64_t{1}, std::multiplies<>());
  }
  // Where an operand's element is, of a flat index of the outer dimensions and an inner one.
  int64_t offset(const Operand& o, int64_t outer, int64_t inner) const {
    int64_t at = inner * o.inner();
    for (size_t d = sizes.size() - 1; d-- > 0; outer /= sizes[d])
      at += outer % sizes[d] * o.strides[d];
    return at;
  }

 private:
  void apply(const std::vector<size_t>& order, const std::vector<Operand*>& operands) {
    const auto sorted = [&](std::vector<int64_t>& values) {
      const std::vector<int64_t> old = values;
      for (size_t d = 0; d < order.size(); ++d) values[d] = old[order[d]];
    };
    sorted(sizes);
    for (Operand* o : operands) sorted(o->strides);
  }
  // Dimensions d - 1 and d become one, with the strides of d, or of d - 1 where d has one element.
  void merge(size_t d, bool keep_outer, const std::vector<Operand*>& operands) {
    sizes[d - 1] *= sizes[d];
    sizes.erase(sizes.begin() + d);
    for (Operand* o : operands) o->strides.erase(o->strides.begin() + (keep_outer ? d : d - 1));
  }
};

}  // namespace mtkd::cpu
