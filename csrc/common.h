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

inline bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::Half ||
         s == ScalarType::BFloat16;
}

// From this size on a tensor does not stay in a cache until it is used.
constexpr int64_t kLargeBytes = int64_t{4} << 20;

// Ask for huge pages: a fresh large output costs more in 4 KB page faults than its arithmetic.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLargeBytes) return;
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

// A builtin, since taking a local's address, as memcpy does, keeps GCC from vectorising a loop.
template <class To, class From>
MTKD_INLINE To bit_cast(From from) {
  return __builtin_bit_cast(To, from);
}

#if defined(__CUDACC__)
MTKD_INLINE float exponential(float x) { return expf(x); }
MTKD_INLINE float exponential_within(float x) { return expf(x); }
MTKD_INLINE float exponential_or_zero(float x) { return expf(x); }
#else
// exp for vector loops, of x between -87.34 and 88.75: x = k log 2 + r, a minimax polynomial for
// 2 exp(r), and 2^(k-1) made of the rounding's low bits; 0 where x rounds to k = -126. Within 2 ulp
// where the result is a normal number, NaN stays NaN.
MTKD_INLINE float exponential_within(float x) {
  constexpr float kRound = 12582912.0f + 126.0f;  // 1.5 * 2^23 rounds to an integer; 126 biases it
  const float shifted = x * 1.44269504f + kRound;
  const float k = shifted - kRound;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 2.7673671485e-3f;
  p = p * r + 1.67496481012e-2f;
  p = p * r + 8.33364523786e-2f;
  p = p * r + 3.33328401443e-1f;
  p = p * r + 0.999999841502f;
  p = p * r + 2.00000007269f;
  p = p * r + 2.0f;
  return p * bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
}

// Of any x: overflow gives inf, results under 2e-38 are clamped there.
MTKD_INLINE float exponential(float x) {
  x = 88.75f < x ? 88.75f : x;
  x = -86.625f > x ? -86.625f : x;
  return exponential_within(x);
}

// Likewise of x <= 0, and 0 in place of results under 2e-38.
MTKD_INLINE float exponential_or_zero(float x) {
  return exponential_within(-87.34f > x ? -87.34f : x);
}
#endif
MTKD_INLINE double exponential(double x) { return exp(x); }
MTKD_INLINE double exponential_within(double x) { return exp(x); }
MTKD_INLINE double exponential_or_zero(double x) { return exp(x); }

#if defined(__CUDACC__)
MTKD_INLINE float logarithm(float x) { return logf(x); }
#else
// log for vector loops: x = 2^k (1 + f) with f from sqrt(1/2) - 1 to sqrt(2) - 1, a minimax
// polynomial for (log(1 + f) - f + f^2 / 2) / f^3. Within 2 ulp for normal numbers x > 0; what is
// not is taken for some number of their size.
MTKD_INLINE float logarithm(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = bit_cast<float>(bits - (exponent << 23)) - 1.0f, k = static_cast<float>(exponent);
  float p = -7.634496528e-2f;
  p = p * f + 1.276157704e-1f;
  p = p * f - 1.316018240e-1f;
  p = p * f + 1.420175800e-1f;
  p = p * f - 1.662335734e-1f;
  p = p * f + 2.000122688e-1f;
  p = p * f - 2.500082103e-1f;
  p = p * f + 3.333333171e-1f;
  const float square = f * f, low = p * (f * square) - 2.12194440e-4f * k;
  return (f + (low - 0.5f * square)) + 0.693359375f * k;
}
#endif
MTKD_INLINE double logarithm(double x) { return log(x); }

// Of a number from 1 to 2, within 2 ulp. A GPU's division has a branch for all others.
MTKD_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}
MTKD_INLINE double reciprocal(double x) { return 1.0 / x; }

template <class A>
struct ValueAndSlope {
  A value, slope;
};

// (tanh(x) / x - 1) / z of z = x^2: a minimax polynomial to x = 1/2, the Taylor series to 1/32.
MTKD_INLINE float tanh_polynomial(float z) {
  return ((1.7241487e-2f * z - 5.3045493e-2f) * z + 1.3325879e-1f) * z - 3.3333144e-1f;
}
MTKD_INLINE double tanh_polynomial(double z) {
  return ((62.0 / 2835 * z - 17.0 / 315) * z + 2.0 / 15) * z - 1.0 / 3;
}

// tanh(x) and its derivative from one exponential; both keep their relative accuracy, tanh by a
// polynomial where 1 - e would cancel.
template <class A>
MTKD_INLINE ValueAndSlope<A> tanh_and_slope(A x) {
  constexpr A kLimit = sizeof(A) == sizeof(float) ? A(0.5) : A(0.03125);
  const A a = std::fabs(x), z = a * a;
  const A e = exponential(A(-2) * a);
  const A r = reciprocal(A(1) + e);
  const A near = a + a * (z * tanh_polynomial(z)), far = (A(1) - e) * r;
  return {std::copysign(a < kLimit ? near : far, x), A(4) * e * r * r};
}

}  // namespace mtkd
