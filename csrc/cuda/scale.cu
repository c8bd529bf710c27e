// mtkd::scale_ on CUDA: stored gradients times the gradient that arrives, which most often is 1. A
// device knows that without the host waiting for it: each block reads the number first.
#include <array>

#include "common.cuh"

namespace mtkd::cuda {
namespace {

struct ScaleParameters {
  View tensor, scale;
  int64_t size, vectors;  // numbers, and how many times V of them are taken at once
};

template <class A, int V>
__global__ void __launch_bounds__(kThreads) scale(const __grid_constant__ ScaleParameters p) {
  const A factor = get<A>(p.scale, 0, 0, 0);
  if (factor == A(1)) return;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = thread; i < p.vectors; i += threads) {
    const Columns at{i * V, p.size, 1};
    A values[V];
    convert(load<V, true>(p.tensor, 0, at), p.tensor.dtype, values);
    for (A& value : values) value *= factor;
    store<A, V, true>(p.tensor, 0, at, values);
  }
  for (int64_t i = p.vectors * V + thread; i < p.size; i += threads)
    put(p.tensor, 0, 0, i, get<A>(p.tensor, 0, 0, i) * factor);
}

template <class A, int V>
void launch_scale(const Tensor& tensor, const Tensor& factor) {
  ScaleParameters p = {};
  p.tensor.data = static_cast<char*>(tensor.data_ptr());
  p.tensor.dtype = tensor.scalar_type(), p.tensor.column = 1;
  p.scale.data = static_cast<char*>(factor.data_ptr()), p.scale.dtype = factor.scalar_type();
  p.size = tensor.numel();
  p.vectors = p.tensor.aligned(V) ? p.size / V : 0;
  const int64_t items = p.vectors ? p.vectors : p.size;
  constexpr int64_t kBlocks = kLanesInFlight / kThreads;  // each lane takes several
  launch(scale<A, V>, std::min((items + kThreads - 1) / kThreads, kBlocks), 0, tensor, p);
}

// PyTorch's own product, for the rare gradient that is not contiguous.
void multiply(const Tensor& tensor, const Tensor& factor) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(factor)};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION) == 0,
      "scale_: aten::mul_ failed");
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that it returns
}

void scale_all(std::vector<Tensor> tensors, Tensor factor) {
  STD_TORCH_CHECK(factor.numel() == 1 && is_floating(factor),
                  "scale_: one floating-point number expected as scale");
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(is_floating(tensor) && tensor.device() == factor.device(),
                    "scale_: floating-point tensors on the GPU of the scale expected");
    if (!tensor.is_contiguous()) {
      multiply(tensor, factor);
    } else if (tensor.scalar_type() == ScalarType::Double) {
      launch_scale<double, 2>(tensor, factor);
    } else if (tensor.scalar_type() == ScalarType::Float) {
      launch_scale<float, 4>(tensor, factor);
    } else {
      launch_scale<float, 8>(tensor, factor);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd_cuda, CUDA, m) { m.impl("scale_", TORCH_BOX(&scale_all)); }

}  // namespace mtkd::cuda
