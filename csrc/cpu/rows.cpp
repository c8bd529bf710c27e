#include "rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mtkd::cpu {
namespace {

MTKD_INLINE float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}

// Half to float in integer and float arithmetic alone, so that the loop is vectorised anywhere.
MTKD_INLINE float widen(Half value) {
  const uint32_t shifted = static_cast<uint32_t>(value.x) << 16;
  const uint32_t sign = shifted & 0x80000000u, magnitude = shifted << 1;
  const float normal = bit_cast<float>((magnitude >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = bit_cast<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  const float size = magnitude < (1u << 27) ? subnormal : normal;
  return bit_cast<float>(sign | bit_cast<uint32_t>(size));
}
MTKD_INLINE float widen(float value) { return value; }
MTKD_INLINE double widen(double value) { return value; }

// Round to nearest even; a NaN stays one.
MTKD_INLINE void narrow(float value, BFloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.x = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
MTKD_INLINE void narrow(float value, Half& out) {
  const uint32_t bits = bit_cast<uint32_t>(value), shifted = bits + bits;
  const float size = bit_cast<float>(bits & 0x7FFFFFFFu);
  const uint32_t exponent = shifted & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float base = (size * 0x1p+112f) * 0x1p-110f + bit_cast<float>((bias >> 1) + 0x07800000u);
  const uint32_t base_bits = bit_cast<uint32_t>(base);
  const uint32_t packed = ((base_bits >> 13) & 0x7C00u) + (base_bits & 0x0FFFu);
  out.x =
      static_cast<uint16_t>((bits >> 16 & 0x8000u) | (shifted > 0xFF000000u ? 0x7E00u : packed));
}
MTKD_INLINE void narrow(float value, float& out) { out = value; }
MTKD_INLINE void narrow(float value, double& out) { out = value; }
template <class To>
MTKD_INLINE void narrow(double value, To& out) {
  if constexpr (std::is_same_v<To, double>) {
    out = value;
  } else {
    narrow(static_cast<float>(value), out);
  }
}

template <class From, class A>
MTKD_INLINE void read_loop(const void* data, int64_t stride, int64_t n, A* out) {
  const From* from = static_cast<const From*>(data);
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(widen(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(widen(from[i * stride]));
  }
}

template <class A, class To>
MTKD_INLINE void write_loop(const A* values, int64_t n, int64_t stride, void* data) {
  To* to = static_cast<To*>(data);
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(values[i], to[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(values[i], to[i * stride]);
  }
}

template <class A>
MTKD_INLINE void read_any(const void* data, ScalarType dtype, int64_t stride, int64_t n, A* out) {
  switch (dtype) {
    case ScalarType::Float:
      return read_loop<float>(data, stride, n, out);
    case ScalarType::Double:
      return read_loop<double>(data, stride, n, out);
    case ScalarType::BFloat16:
      return read_loop<BFloat16>(data, stride, n, out);
    case ScalarType::Half:
      return read_loop<Half>(data, stride, n, out);
    default:
      return;  // dtypes are checked where a kernel begins
  }
}

template <class A>
MTKD_INLINE void write_any(const A* values, int64_t n, ScalarType dtype, int64_t stride,
                           void* data) {
  switch (dtype) {
    case ScalarType::Float:
      return write_loop<A, float>(values, n, stride, data);
    case ScalarType::Double:
      return write_loop<A, double>(values, n, stride, data);
    case ScalarType::BFloat16:
      return write_loop<A, BFloat16>(values, n, stride, data);
    case ScalarType::Half:
      return write_loop<A, Half>(values, n, stride, data);
    default:
      return;
  }
}

}  // namespace

#if defined(__SSE2__)
namespace {

// Whole 64-byte lines; `to` is aligned to one.
void stream_lines(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), part);
  }
}

__attribute__((target("avx512f"))) void stream_lines_avx512(const char* from, char* to,
                                                            int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}

}  // namespace
#endif

void stream(const void* values, int64_t bytes, void* data) {
#if defined(__SSE2__)
  static const bool wide = __builtin_cpu_supports("avx512f");
  const char* from = static_cast<const char*>(values);
  char* to = static_cast<char*>(data);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 63);
  const int64_t lines = (bytes - head) / 64 * 64;
  memcpy(to, from, head);
  wide ? stream_lines_avx512(from + head, to + head, lines)
       : stream_lines(from + head, to + head, lines);
  memcpy(to + head + lines, from + head + lines, bytes - head - lines);
#else
  memcpy(data, values, bytes);
#endif
}

void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

MTKD_CLONES void read(const void* data, ScalarType dtype, int64_t stride, int64_t n, float* out) {
  read_any(data, dtype, stride, n, out);
}
MTKD_CLONES void read(const void* data, ScalarType dtype, int64_t stride, int64_t n, double* out) {
  read_any(data, dtype, stride, n, out);
}
MTKD_CLONES void write(const float* v, int64_t n, ScalarType dtype, int64_t stride, void* data) {
  write_any(v, n, dtype, stride, data);
}
MTKD_CLONES void write(const double* v, int64_t n, ScalarType dtype, int64_t stride, void* data) {
  write_any(v, n, dtype, stride, data);
}

std::vector<int64_t> group_short(const std::vector<int64_t>& offsets) {
  constexpr int64_t kShort = 96;
  std::vector<int64_t> groups{0};
  const int64_t teachers = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t t = 1; t < teachers; ++t) {
    const bool both = std::max(offsets[t + 1] - offsets[t], offsets[t] - offsets[t - 1]) <= kShort;
    if (!both || offsets[t + 1] - offsets[groups.back()] > kBlock) groups.push_back(t);
  }
  groups.push_back(teachers);
  return groups;
}

}  // namespace mtkd::cpu
