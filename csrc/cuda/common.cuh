// What CUDA kernels of row losses stand on: tensors of any floating dtype and stride, read and
// written V numbers at a time; the plan that shares rows and teachers out to groups of lanes; sums
// over such a group in a fixed order; launches.
//
// One group of 1 to 256 lanes takes one row and teacher: a part of a warp where teachers are
// short, a block where they are long or few. Teachers of equal width need no table. Else the table
// is part of the kernel's parameters, so that a launch copies nothing, waits for nothing and can
// be captured in a graph; more than kTableSize ragged teachers take several launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <functional>

#include "../operators.h"

#define MTKD_DEVICE __device__ __forceinline__

namespace mtkd::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr int kClasses = 9;      // of teachers: class c has groups of 2^c lanes
constexpr int kTableSize = 512;  // ragged teachers a launch takes: parameters end at 4 KB
constexpr int64_t kLanesInFlight = 1 << 17;               // that fill a large GPU
constexpr int64_t kPartials = kThreads / kWarp * 8;       // bytes of shared memory that sums need
constexpr int64_t kSharedLimit = (48 << 10) - kPartials;  // left for a loss, on every GPU

// ---- Tensors ----

// A tensor seen as (row, mode, column), or (row, column) with a single mode, or (column) with a
// single row; strides in elements.
struct View {
  char* data = nullptr;
  int64_t row = 0, mode = 0, column = 0;
  ScalarType dtype = ScalarType::Float;

  View() = default;
  explicit View(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        row(t.dim() == 1 ? 0 : stride(t, 0)),
        mode(t.dim() == 3 ? stride(t, 1) : 0),
        column(stride(t, t.dim() - 1)),
        dtype(t.scalar_type()) {}
  explicit View(const OptionalTensor& t) : View(t ? View(*t) : View()) {}

  // A dimension of size 1 may have any stride, which must not spoil alignment.
  static int64_t stride(const Tensor& t, int64_t dim) {
    return t.size(dim) == 1 ? 0 : t.stride(dim);
  }

  MTKD_INLINE explicit operator bool() const { return data != nullptr; }
  MTKD_INLINE int item() const {
    return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  }
  MTKD_INLINE int64_t offset(int64_t n, int64_t m, int64_t j) const {
    return n * row + m * mode + j * column;
  }
  // Whether V numbers at a time can be read where every column count is a multiple of V.
  bool aligned(int V) const {
    const int bytes = V * item();
    return !data || (column == 1 && (bytes == 16 || bytes == 8) && row % V == 0 && mode % V == 0 &&
                     reinterpret_cast<uintptr_t>(data) % bytes == 0);
  }
};

// The columns that a lane takes in one step: V from `first` on, `spacing` apart, before `end`.
struct Columns {
  int64_t first, end;
  int spacing;
};

// Numbers as they lie in memory. Those of all tensors are loaded before any is converted, so that
// the loads overlap. Vectors are contiguous and aligned, and take at most 16 bytes.
template <int V, bool Vector>
struct Pack {
  uint32_t words[Vector ? 4 : 2 * V] = {};
};

// The word that a whole vector is moved as: 16 or 8 bytes.
template <int Bytes>
using Word = std::conditional_t<Bytes == 16, uint4, uint2>;

template <class Bits, int V, bool Vector>
MTKD_DEVICE void fetch(const View& view, int64_t base, const Columns& at, Pack<V, Vector>& pack) {
  if constexpr (!Vector) {
    const Bits* data = reinterpret_cast<const Bits*>(view.data) + base;
    Bits values[V] = {};
    for (int k = 0; k < V; ++k) {
      const int64_t j = at.first + int64_t{k} * at.spacing;
      if (j < at.end) values[k] = data[j * view.column];
    }
    memcpy(pack.words, values, sizeof(values));
  } else if constexpr (sizeof(Bits) * V == 16 || sizeof(Bits) * V == 8) {
    using Whole = Word<sizeof(Bits) * V>;
    const Bits* data = reinterpret_cast<const Bits*>(view.data) + base + at.first;
    const Whole whole = *reinterpret_cast<const Whole*>(data);
    memcpy(pack.words, &whole, sizeof(whole));
  }
}

template <int V, bool Vector>
MTKD_DEVICE Pack<V, Vector> load(const View& view, int64_t base, const Columns& at) {
  Pack<V, Vector> pack;
  switch (view.item()) {
    case 2:
      fetch<uint16_t>(view, base, at, pack);
      break;
    case 4:
      fetch<uint32_t>(view, base, at, pack);
      break;
    default:
      fetch<uint64_t>(view, base, at, pack);
  }
  return pack;
}

// Calls body(T()) with the C++ type of a floating dtype.
template <class Body>
MTKD_DEVICE void with_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Half:
      return body(Half());
    case ScalarType::BFloat16:
      return body(BFloat16());
    case ScalarType::Float:
      return body(float());
    default:
      return body(double());
  }
}

template <class A, int V, bool Vector>
MTKD_DEVICE void convert(const Pack<V, Vector>& pack, ScalarType dtype, A (&out)[V]) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) * V <= sizeof(pack.words)) {
      T values[V];
      memcpy(values, pack.words, sizeof(values));
      for (int k = 0; k < V; ++k) out[k] = static_cast<A>(values[k]);
    }
  });
}

template <class A, int V, bool Vector>
MTKD_DEVICE void store(const View& view, int64_t base, const Columns& at, const A (&values)[V]) {
  with_type(view.dtype, [&](auto type) {
    using T = decltype(type);
    T* data = reinterpret_cast<T*>(view.data) + base;
    if constexpr (!Vector) {
      for (int k = 0; k < V; ++k) {
        const int64_t j = at.first + int64_t{k} * at.spacing;
        if (j < at.end) data[j * view.column] = static_cast<T>(values[k]);
      }
    } else if constexpr (sizeof(T) * V == 16 || sizeof(T) * V == 8) {
      T converted[V];
      for (int k = 0; k < V; ++k) converted[k] = static_cast<T>(values[k]);
      Word<sizeof(converted)> whole;
      memcpy(&whole, converted, sizeof(whole));
      __stwb(reinterpret_cast<Word<sizeof(converted)>*>(data + at.first), whole);  // never split
    }
  });
}

template <class A>
MTKD_DEVICE A get(const View& view, int64_t n, int64_t m, int64_t j) {
  A value = 0;
  with_type(view.dtype, [&](auto type) {
    value = static_cast<A>(reinterpret_cast<decltype(type)*>(view.data)[view.offset(n, m, j)]);
  });
  return value;
}

template <class A>
MTKD_DEVICE void put(const View& view, int64_t n, int64_t m, int64_t j, A value) {
  with_type(view.dtype, [&](auto type) {
    using T = decltype(type);
    reinterpret_cast<T*>(view.data)[view.offset(n, m, j)] = static_cast<T>(value);
  });
}

// ---- Which lanes take which row and teacher ----

// One launch: some successive teachers, in order of their class. Blocks of class c begin at
// blocks[c], its teachers stand from position teachers[c] on.
struct Plan {
  int64_t rows, first_teacher, first_column;
  int64_t width;                   // of each teacher, or 0 where they differ: then
  uint32_t begin[kTableSize + 1];  // they begin here, counted from first_column
  uint16_t order[kTableSize];      // and stand in this order
  int32_t teachers[kClasses + 1];
  uint32_t blocks[kClasses + 1];
  uint32_t shared;  // bytes of dynamic shared memory
};

// What a group of lanes takes; a group beyond the last row is not inside, and takes no columns.
struct Unit {
  int64_t row = 0, teacher = 0, begin = 0, width = 0;
  int group, lane, lanes;
  bool inside;

  template <int V, bool Vector>
  MTKD_DEVICE Columns first() const {
    return {begin + int64_t{lane} * (Vector ? V : 1), begin + width, Vector ? 1 : lanes};
  }
};

// Calls body(columns) for each step that a lane takes.
template <int V, bool Vector, class Body>
MTKD_DEVICE void each_step(const Unit& unit, const Body& body) {
  auto at = unit.first<V, Vector>();
  for (; at.first < at.end; at.first += int64_t{unit.lanes} * V) body(at);
}

// A quotient, most often of numbers below 2^32, whose division is several times cheaper.
MTKD_DEVICE int64_t divide(int64_t a, int64_t b) {
  if ((a | b) >> 32) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

MTKD_DEVICE Unit unit_of(const Plan& plan, uint32_t block, int thread) {
  int c = 0;
  while (block >= plan.blocks[c + 1]) ++c;
  Unit unit;
  unit.lanes = 1 << c, unit.group = thread >> c, unit.lane = thread & (unit.lanes - 1);
  const int count = plan.teachers[c + 1] - plan.teachers[c];
  const int64_t index = int64_t{block - plan.blocks[c]} * (kThreads >> c) + unit.group;
  const int64_t row = divide(index, count);
  unit.inside = row < plan.rows;
  if (!unit.inside) return unit;
  int64_t teacher = plan.teachers[c] + (index - row * count);
  int64_t begin = teacher * plan.width;
  unit.width = plan.width;
  if (!plan.width) {
    teacher = plan.order[teacher];
    begin = plan.begin[teacher];
    unit.width = plan.begin[teacher + 1] - plan.begin[teacher];
  }
  unit.row = row, unit.teacher = plan.first_teacher + teacher;
  unit.begin = plan.first_column + begin;
  return unit;
}

// How groups are made: for vectors of V numbers, `steps` of them a lane before a group gets more
// than a warp, and at least 2^least lanes, so that what groups share fits a block.
struct Grouping {
  int V, least = 0;
  int64_t steps, per_group;  // bytes of shared memory that a group needs

  Grouping(int V, int64_t columns, int64_t per_group) : V(V), per_group(per_group) {
    steps = std::clamp<int64_t>(columns / V / kLanesInFlight, 1, 8);
    while (least < kClasses && (kThreads >> least) * per_group > kSharedLimit) ++least;
    STD_TORCH_CHECK(least < kClasses, "mtkd: a row and teacher needs ", per_group,
                    " bytes of shared memory, and there are ", kSharedLimit);
  }
  int class_of(int64_t width) const {
    const int64_t vectors = (width + V - 1) / V;
    const int64_t lanes = std::max(std::min<int64_t>(vectors, kWarp), (vectors - 1) / steps + 1);
    int c = least;
    while (c < kClasses - 1 && (1 << c) < lanes) ++c;
    return c;
  }
};

// A plan for the teachers whose widths are given, at most kTableSize unless these are equal.
inline Plan make_plan(int64_t rows, const int64_t* dims, int64_t count, const Grouping& grouping) {
  Plan plan = {};
  plan.rows = rows;
  const bool equal = std::all_of(dims, dims + count, [&](int64_t width) { return width == *dims; });
  plan.width = equal ? *dims : 0;
  int64_t sizes[kClasses] = {};
  uint8_t classes[kTableSize];
  if (equal) sizes[grouping.class_of(*dims)] = count;
  for (int64_t t = 0; !equal && t < count; ++t) {
    plan.begin[t + 1] = plan.begin[t] + static_cast<uint32_t>(dims[t]);
    classes[t] = static_cast<uint8_t>(grouping.class_of(dims[t]));
    ++sizes[classes[t]];
  }
  int64_t blocks = 0, groups = 0;
  int32_t next[kClasses];  // position of a class's next teacher
  for (int c = 0; c < kClasses; ++c) {
    const int64_t per_block = kThreads >> c;
    blocks += (rows * sizes[c] + per_block - 1) / per_block;
    if (sizes[c]) groups = std::max(groups, per_block);
    next[c] = plan.teachers[c];
    plan.teachers[c + 1] = plan.teachers[c] + static_cast<int32_t>(sizes[c]);
    plan.blocks[c + 1] = static_cast<uint32_t>(blocks);
  }
  for (int64_t t = 0; !equal && t < count; ++t)
    plan.order[next[classes[t]]++] = static_cast<uint16_t>(t);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "mtkd: ", blocks, " blocks are more than a launch has");
  plan.shared = static_cast<uint32_t>(kPartials + groups * grouping.per_group);
  return plan;
}

// The plans of a call, one a launch: one where teachers are of equal width or few enough.
inline std::vector<Plan> make_plans(int64_t rows, const std::vector<int64_t>& dims,
                                    const Grouping& grouping) {
  const int64_t teachers = static_cast<int64_t>(dims.size());
  const bool equal =
      std::adjacent_find(dims.begin(), dims.end(), std::not_equal_to<>()) == dims.end();
  std::vector<Plan> plans;
  for (int64_t first = 0, column = 0; first < teachers;) {
    int64_t end = first, width = 0;
    const auto fits = [&] {
      return end == first || (end - first < kTableSize && width + dims[end] <= UINT32_MAX);
    };
    while (end < teachers && (equal || fits())) width += dims[end++];
    plans.push_back(make_plan(rows, dims.data() + first, end - first, grouping));
    plans.back().first_teacher = first, plans.back().first_column = column;
    first = end, column += width;
  }
  return plans;
}

// ---- Entries of the matrix of losses ----

MTKD_DEVICE bool counts(const View& mask, const Unit& unit) {
  return unit.inside && (!mask || reinterpret_cast<const bool*>(
                                      mask.data)[mask.offset(unit.row, 0, unit.teacher)]);
}

// The gradient to an entry; 0 where there is none or it is not counted.
template <class A>
MTKD_DEVICE A gradient_to(const View& coefficient, const Unit& unit, bool counted) {
  return counted && coefficient ? get<A>(coefficient, unit.row, 0, unit.teacher) : A(0);
}

template <class A>
MTKD_DEVICE void write_loss(const View& loss, const Unit& unit, bool counted, A value) {
  if (loss && unit.inside && unit.lane == 0)
    put(loss, unit.row, 0, unit.teacher, counted ? value : A(0));
}

// ---- Reductions ----

extern __shared__ double shared_memory[];  // partial results of warps, then the loss's own

template <class A>
MTKD_DEVICE A* shared_of_group(const Unit& unit, int64_t count) {
  return reinterpret_cast<A*>(shared_memory + kPartials / 8) + unit.group * count;
}

// Wait for the other lanes of a group; all of a block's lanes must come here.
MTKD_DEVICE void synchronise(int lanes) {
  if (lanes <= kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The result over a group of lanes, on each of them: always in the same order, hence the same
// bits. All of a block's lanes must come here. (CUB wants a group's size when it is compiled.)
template <class A, class Op>
MTKD_DEVICE A reduce(A value, int lanes, const Op& op) {
  for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step > 0; step /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, step));
  if (lanes <= kWarp) return value;
  A* partial = reinterpret_cast<A*>(shared_memory);
  const int warp = threadIdx.x / kWarp, warps = lanes / kWarp;
  __syncthreads();  // every lane has read the partial results of the reduction before
  if (threadIdx.x % kWarp == 0) partial[warp] = value;
  __syncthreads();
  const A* of_group = partial + warp / warps * warps;
  value = of_group[0];
  for (int w = 1; w < warps; ++w) value = op(value, of_group[w]);
  return value;
}

template <class A>
MTKD_DEVICE A sum(A value, int lanes) {
  return reduce(value, lanes, [](A a, A b) { return a + b; });
}

// Logarithm of the sum of exponentials of value(0) to value(count - 1), shared out to a group.
template <class A, class Value>
MTKD_DEVICE A log_sum_exp(const Unit& unit, int count, const Value& value) {
  A largest = -INFINITY;
  for (int m = unit.lane; m < count; m += unit.lanes) largest = std::fmax(largest, value(m));
  largest = reduce(largest, unit.lanes, [](A a, A b) { return std::fmax(a, b); });
  if (std::isinf(largest)) largest = 0;  // inf - inf would be NaN
  A total = 0;
  for (int m = unit.lane; m < count; m += unit.lanes) total += exponential(value(m) - largest);
  return largest + std::log(sum(total, unit.lanes));
}

// ---- Launches ----

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess,
                  "mtkd: a CUDA kernel was not launched: ", cudaGetErrorString(error));
}

// Launch on the current stream of a tensor's GPU.
template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, uint32_t shared, const Tensor& where,
            Parameters parameters) {
  static_assert(sizeof(Parameters) <= 4096, "what a kernel launch can carry");
  if (blocks == 0) return;
  const int32_t device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "mtkd: GPU ", device,
                  " has no current stream");
  void* arguments[] = {&parameters};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                         shared, static_cast<cudaStream_t>(stream)));
  check(cudaGetLastError());
}

// Launch a kernel as often as its table needs.
template <class Parameters>
void launch_plans(void (*kernel)(Parameters), const RowArguments& arguments,
                  const Grouping& grouping, Parameters parameters) {
  for (const Plan& plan : make_plans(arguments.rows, arguments.dims, grouping)) {
    parameters.plan = plan;
    launch(kernel, plan.blocks[kClasses], plan.shared, arguments.student, parameters);
  }
}

// How a kernel takes columns: V at a time, as vectors or each by itself; it computes in A.
template <class A, int V, bool Vector>
struct Access {};

// Calls body(Access<...>()) for the longest vectors that fit all columns' tensors.
template <class Body>
void with_access(const RowArguments& arguments, std::initializer_list<const View*> views,
                 const Body& body) {
  const auto fits = [&](int V) {
    const auto whole = [V](int64_t width) { return width % V == 0; };
    const auto aligned = [V](const View* view) { return view->aligned(V); };
    return std::all_of(arguments.dims.begin(), arguments.dims.end(), whole) &&
           std::all_of(views.begin(), views.end(), aligned);
  };
  if (arguments.dtype == ScalarType::Double) {
    fits(2) ? body(Access<double, 2, true>()) : body(Access<double, 2, false>());
  } else if (fits(8)) {
    body(Access<float, 8, true>());
  } else {
    fits(4) ? body(Access<float, 4, true>()) : body(Access<float, 4, false>());
  }
}

}  // namespace mtkd::cuda
