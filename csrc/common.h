// What every kernel file stands on: names of the stable torch ABI, argument checks, outputs, and
// the elementary functions that loops over rows are made of.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__CUDACC__)
#define MTKD_INLINE __host__ __device__ __forceinline__
#else
#define MTKD_INLINE inline __attribute__((always_inline))
#endif

namespace mtkd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Losses and their sums are float32, or float64 where an input that receives a gradient is.
inline ScalarType accumulate_dtype(const Tensor& a, const Tensor& b) {
  const bool is_double =
      a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double;
  return is_double ? ScalarType::Double : ScalarType::Float;
}

// Ask for huge pages: a fresh large output costs more in 4 KB page faults than its arithmetic.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthIt = int64_t{4} << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kWorthIt) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, sizes, dtype);
  if (out.is_cpu()) advise_huge_pages(out.data_ptr(), out.numel() * out.element_size());
  return out;
}

// Where each teacher's columns begin; one more entry for the end of the last.
inline std::vector<int64_t> offsets_of(const std::vector<int64_t>& dims) {
  std::vector<int64_t> offsets(dims.size() + 1, 0);
  for (size_t t = 0; t < dims.size(); ++t) offsets[t + 1] = offsets[t] + dims[t];
  return offsets;
}

template <class To, class From>
MTKD_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#if defined(__CUDACC__)
MTKD_INLINE float exponential(float x) { return expf(x); }
#else
// exp for vector loops: Cody-Waite reduction, degree-7 polynomial, scaling in two halves so that
// overflow, underflow and subnormal results are those of exp. Within 2 ulp; NaN stays NaN.
MTKD_INLINE float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -105.0f ? -105.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRound;
  const float k = shifted - kRound;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
  const int32_t half = exponent >> 1;
  const uint32_t low = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t high = static_cast<uint32_t>(exponent - half + 127) << 23;
  return p * bit_cast<float>(low) * bit_cast<float>(high);
}
#endif
MTKD_INLINE double exponential(double x) { return exp(x); }

// tanh(x) and its derivative from one exponential; the derivative keeps its relative accuracy.
template <class A>
MTKD_INLINE A tanh_and_slope(A x, A& slope) {
  const A size = x < A(0) ? -x : x;
  const A e = exponential(A(-2) * size);
  const A r = A(1) / (A(1) + e);
  slope = A(4) * e * r * r;
  const A t = (A(1) - e) * r;
  return x < A(0) ? -t : t;
}

}  // namespace mtkd
