// The loops of a consensus over n elements of a message: softmax, distances, kernels, agreement.
#pragma once

#include <algorithm>
#include <limits>

#include "../common.h"

namespace mtkd::cpu {
namespace {

enum Kernel : int64_t { kNone, kFlat, kLinear, kGaussian };  // as the formulas number them
constexpr double kNoClass = 1e-6;  // sum of the classes' votes below which the mean decides

template <class A>
MTKD_INLINE A exponential_or_zero(A x) {
  const A underflow = sizeof(A) == sizeof(float) ? A(-86.5) : A(-700);
  return x < underflow ? A(0) : exponential(x);
}

// Softmax over classes, each a row of n `stride` apart.
template <class A>
MTKD_INLINE void softmax_loop(A* values, int64_t classes, int64_t stride, int64_t n, A* largest,
                              A* sum) {
  std::fill(largest, largest + n, -std::numeric_limits<A>::infinity());
  for (int64_t k = 0; k < classes; ++k) {
    const A* v = values + k * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) largest[i] = v[i] > largest[i] ? v[i] : largest[i];
  }
  std::fill(sum, sum + n, A(0));
  for (int64_t k = 0; k < classes; ++k) {
    A* v = values + k * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      v[i] = exponential_or_zero(v[i] - largest[i]);
      sum[i] += v[i];
    }
  }
  for (int64_t k = 0; k < classes; ++k) {
    A* v = values + k * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] /= sum[i];
  }
}

// A message with one class that is NaN abstains in all.
template <class A>
MTKD_INLINE void abstain_loop(A* values, int64_t classes, int64_t stride, int64_t n, A* nan) {
  std::fill(nan, nan + n, A(0));
  for (int64_t k = 0; k < classes; ++k) {
    const A* v = values + k * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) nan[i] = v[i] == v[i] ? nan[i] : v[i];
  }
  for (int64_t k = 0; k < classes; ++k) {
    A* v = values + k * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] += nan[i];
  }
}

// Add a factor times the distance of each number to its center.
template <class A>
MTKD_INLINE void add_distance_loop(const A* x, const A* center, int64_t n, A factor, A* far) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    far[i] += x[i] == center[i] ? A(0) : factor * std::fabs(x[i] - center[i]);
}

template <class A>
MTKD_INLINE void scale_loop(const A* low, const A* unit, int64_t n, A* far) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A scaled = (far[i] - low[i]) / unit[i];
    far[i] = scaled < 0 ? A(0) : scaled;  // nearer to its consensus than all to the last one
  }
}

// Distances become a kernel's weights times the messages' own; a NaN becomes 0.
template <class A>
MTKD_INLINE void similarity_loop(const A* weight, int64_t n, int64_t kernel, A bandwidth, A slope,
                                 A* far) {
  if (kernel == kGaussian) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A u = far[i] / bandwidth, w = exponential_or_zero(A(-0.5) * u * u) * weight[i];
      far[i] = w > 0 ? w : A(0);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A w = (far[i] <= bandwidth ? A(1) - far[i] * slope : A(0)) * weight[i];
      far[i] = w > 0 ? w : A(0);
    }
  }
}

// Add a message's weight to all of it, and to what agrees where the message is near.
template <class A>
MTKD_INLINE void agree_loop(const A* x, const A* center, const A* weight, int64_t n, A bandwidth,
                            A* agreed, A* all) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A w = weight[i] > 0 ? weight[i] : A(0);
    const bool near = (std::fabs(x[i] - center[i]) <= bandwidth) | (x[i] == center[i]);
    agreed[i] += near ? w : A(0);
    all[i] += w;
  }
}

template <class A>
MTKD_INLINE void ratio_loop(const A* x, const A* total, int64_t n, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = total[i] > 0 ? x[i] / total[i] : A(0);
}

template <class A>
MTKD_INLINE void range_loop(const A* far, int64_t n, A* low, A* high) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    low[i] = far[i] < low[i] ? far[i] : low[i];
    high[i] = far[i] > high[i] ? far[i] : high[i];
  }
}

#define MTKD_CONSENSUS_LOOPS(A)                                                                   \
  MTKD_CLONES void softmax(A* v, int64_t classes, int64_t stride, int64_t n, A* a, A* b) {        \
    softmax_loop(v, classes, stride, n, a, b);                                                    \
  }                                                                                               \
  MTKD_CLONES void abstain(A* v, int64_t classes, int64_t stride, int64_t n, A* nan) {            \
    abstain_loop(v, classes, stride, n, nan);                                                     \
  }                                                                                               \
  MTKD_CLONES void add_distance(const A* x, const A* c, int64_t n, A factor, A* far) {            \
    add_distance_loop(x, c, n, factor, far);                                                      \
  }                                                                                               \
  MTKD_CLONES void scale(const A* low, const A* unit, int64_t n, A* far) {                        \
    scale_loop(low, unit, n, far);                                                                \
  }                                                                                               \
  MTKD_CLONES void similarity(const A* w, int64_t n, int64_t kernel, A bandwidth, A slope,        \
                              A* far) {                                                           \
    similarity_loop(w, n, kernel, bandwidth, slope, far);                                         \
  }                                                                                               \
  MTKD_CLONES void agree(const A* x, const A* c, const A* w, int64_t n, A h, A* agreed, A* all) { \
    agree_loop(x, c, w, n, h, agreed, all);                                                       \
  }                                                                                               \
  MTKD_CLONES void ratio(const A* x, const A* total, int64_t n, A* out) {                         \
    ratio_loop(x, total, n, out);                                                                 \
  }                                                                                               \
  MTKD_CLONES void range(const A* far, int64_t n, A* low, A* high) {                              \
    range_loop(far, n, low, high);                                                                \
  }
MTKD_CONSENSUS_LOOPS(float)
MTKD_CONSENSUS_LOOPS(double)

}  // namespace
}  // namespace mtkd::cpu
