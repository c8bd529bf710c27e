// How CPU kernels walk over rows: numbers of any floating dtype and stride, read in blocks as the
// accumulation type A and written back likewise; contiguous numbers of type A are used in place.
#pragma once

#include <algorithm>

#include "../common.h"

namespace mtkd::cpu {

constexpr int64_t kBlock = 1024;  // numbers a loop takes at a time: five blocks stay in L1

template <class A>
constexpr ScalarType dtype_of() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

// Conversion loops, defined in rows.cpp; strides are in elements.
void read(const void* data, ScalarType dtype, int64_t stride, int64_t n, float* out);
void read(const void* data, ScalarType dtype, int64_t stride, int64_t n, double* out);
void write(const float* values, int64_t n, ScalarType dtype, int64_t stride, void* data);
void write(const double* values, int64_t n, ScalarType dtype, int64_t stride, void* data);

// Copy past the caches: a store that misses first reads its line, which costs as much again.
void stream(const void* values, int64_t bytes, void* data);
void stream_fence();  // after the last of a thread's streams

// A tensor seen as (row, mode, column), or (row, column) with a single mode.
struct View {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t item = 0, row = 0, mode = 0, column = 0;
  bool streamed = false;  // an output too large to stay in a cache

  View() = default;
  explicit View(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        dtype(t.scalar_type()),
        item(static_cast<int64_t>(t.element_size())),
        row(t.stride(0)),
        mode(t.dim() == 3 ? t.stride(1) : 0),
        column(t.stride(t.dim() - 1)) {}
  explicit View(const OptionalTensor& t) : View(t ? View(*t) : View()) {}

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t n, int64_t m, int64_t j) const {
    return data + (n * row + m * mode + j * column) * item;
  }
  template <class A>
  bool direct() const {
    return dtype == dtype_of<A>() && column == 1;
  }
  template <class A>
  const A* load(int64_t n, int64_t m, int64_t j, int64_t count, A* scratch) const {
    char* source = at(n, m, j);
    if (direct<A>()) return reinterpret_cast<const A*>(source);
    read(source, dtype, column, count, scratch);
    return scratch;
  }
  // Fetch contiguous columns into a cache; it does not matter whether they exist. Inlined, since
  // GCC drops calls of a function that does nothing else.
  MTKD_INLINE void prefetch(int64_t n, int64_t j, int64_t count) const {
    const char* source = at(n, 0, j);
    for (int64_t i = 0; column == 1 && i < count * item; i += 64) __builtin_prefetch(source + i);
  }
  template <class A>
  A get(int64_t n, int64_t m, int64_t j) const {
    if (dtype == dtype_of<A>()) return *reinterpret_cast<const A*>(at(n, m, j));
    A value;
    read(at(n, m, j), dtype, 1, 1, &value);
    return value;
  }
  template <class A>
  void put(int64_t n, int64_t m, int64_t j, A value) const {
    if (!data) return;
    if (dtype == dtype_of<A>()) {
      *reinterpret_cast<A*>(at(n, m, j)) = value;
    } else {
      write(&value, 1, dtype, 1, at(n, m, j));
    }
  }
  // Where to write n numbers: in place, or in scratch that `store` then converts or drops.
  template <class A>
  A* target(int64_t n, int64_t m, int64_t j, A* scratch) const {
    return data && direct<A>() && !streamed ? reinterpret_cast<A*>(at(n, m, j)) : scratch;
  }
  template <class A>
  void store(int64_t n, int64_t m, int64_t j, int64_t count, const A* values) const {
    if (!data) return;
    if (!direct<A>()) {
      write(values, count, dtype, column, at(n, m, j));
    } else if (streamed) {
      stream(values, count * item, at(n, m, j));
    }
  }
};

// An output that is written once; one in memory that nobody has touched yet may pass the caches.
inline View output_view(const OptionalTensor& t, bool fresh) {
  View view(t);
  view.streamed = fresh && t && t->numel() * view.item >= kLargeBytes;
  return view;
}

inline bool counts(const View& mask, int64_t n, int64_t t) {
  return !mask || *reinterpret_cast<bool*>(mask.at(n, 0, t));
}

// Zeros in the columns from begin to end, if the view is of anything.
inline void write_zeros(const View& view, int64_t n, int64_t m, int64_t begin, int64_t end) {
  static const float zeros[kBlock] = {};
  for (int64_t j = begin; view && j < end; j += kBlock)
    write(zeros, std::min(kBlock, end - j), view.dtype, view.column, view.at(n, m, j));
}

// The first teacher of each group, and the number of teachers: a group is one teacher, or several
// successive ones of few columns that together fit a block.
std::vector<int64_t> group_short(const std::vector<int64_t>& offsets);

// body(begin, end) for consecutive units that together are all, spread over threads by the work in
// them.
template <class Body>
void for_each_range(int64_t units, int64_t unit_work, const Body& body) {
  if (units == 0) return;
  constexpr int64_t kThreadWork = 16384;  // numbers below which another thread does not pay
  const int64_t grain = std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, unit_work));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    body(begin, end);
    stream_fence();
  });
}

// body(n, g) for every row and group of teachers.
template <class Body>
void for_each_row_and_group(int64_t rows, int64_t groups, int64_t row_work, const Body& body) {
  if (groups == 0) return;
  for_each_range(rows * groups, row_work / groups, [&](int64_t begin, int64_t end) {
    int64_t n = begin / groups, g = begin % groups;
    for (int64_t i = begin; i < end; ++i) {
      body(n, g);
      if (++g == groups) g = 0, ++n;
    }
  });
}

}  // namespace mtkd::cpu
