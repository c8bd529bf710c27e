#include "consensus_votes.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace mtkd::cpu {
namespace {

// Not omp simd, of which GCC keeps arrays inside the loop in memory.
#if defined(__clang__)
#define MTKD_VECTORISED _Pragma("clang loop vectorize(assume_safety)")
#else
#define MTKD_VECTORISED _Pragma("GCC ivdep")
#endif
#define MTKD_UNROLLED __attribute__((always_inline))  // of lambdas
constexpr double kTie = 1e-6;  // share of the weight within which a cumulative weight is one half

// Batcher's odd-even merge sort of n numbers: calls exchange(i, j), i < j, for each comparator.
template <class Exchange>
constexpr void sort_network(int64_t n, const Exchange& exchange) {
  for (int64_t p = 1; p < n; p *= 2)
    for (int64_t k = p; k >= 1; k /= 2)
      for (int64_t j = k % p; j + k < n; j += 2 * k)
        for (int64_t i = 0; i < k && i + j + k < n; ++i)
          if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) exchange(i + j, i + j + k);
}

constexpr size_t comparators(int64_t n) {
  size_t count = 0;
  sort_network(n, [&](int64_t, int64_t) { ++count; });
  return count;
}

template <int64_t P>
constexpr auto make_network() {
  std::array<std::pair<int8_t, int8_t>, comparators(P)> pairs{};
  size_t count = 0;
  sort_network(P, [&](int64_t i, int64_t j) {
    pairs[count].first = static_cast<int8_t>(i);
    pairs[count++].second = static_cast<int8_t>(j);
  });
  return pairs;
}

template <int64_t P>
constexpr auto kNetwork = make_network<P>();

template <class A>
MTKD_INLINE void exchange(A& a, A& b) {
  const A low = b < a ? b : a, high = b < a ? a : b;
  a = low;
  b = high;
}

// Of two messages and their weights.
template <class A>
MTKD_INLINE void exchange(A& a, A& b, A& wa, A& wb) {
  const bool swap = b < a;
  const A low = swap ? b : a, high = swap ? a : b, first = swap ? wb : wa, last = swap ? wa : wb;
  a = low;
  b = high;
  wa = first;
  wb = last;
}

// f(0), ..., f(P - 1) as straight code: the vectoriser takes a loop around it, not around a loop.
template <class F, size_t... I>
MTKD_INLINE void unroll(std::index_sequence<I...>, const F& f) {
  (f(I), ...);
}
template <size_t P, class F>
MTKD_INLINE void unroll(const F& f) {
  unroll(std::make_index_sequence<P>(), f);
}

// One element's sum over sorted messages, in their order: the median or the trimmed mean.
template <bool Median, class A>
struct Quantiles {
  A total, first, last;
  A end = 0, sum = 0, upper = 0;  // of the median, `sum` is the lower middle

  MTKD_INLINE Quantiles(A total, A trim)
      : total(total),
        first(Median ? A(0.5 - kTie) * total : trim * total),
        last(Median ? A(0.5 + kTie) * total : total - trim * total) {}

  MTKD_INLINE void add(A v, A w) {
    if constexpr (Median) {
      sum = end < first ? v : sum;
      upper = end <= last ? v : upper;
      end += w;
    } else {
      const A begin = end;
      end += w;
      const A inside = (end < last ? end : last) - (begin > first ? begin : first);
      sum += inside > 0 ? inside * v : A(0);
    }
  }
  MTKD_INLINE A result() const {
    if constexpr (!Median) return sum / (last - first);
    return total > 0 ? A(0.5) * sum + A(0.5) * upper : std::numeric_limits<A>::quiet_NaN();
  }
};

// A message that is NaN abstains, and one whose weight is not positive has no vote.
template <class A>
MTKD_INLINE A counted(A v, A w) {
  return (v == v) & (w > 0) ? w : A(0);
}

// Unweighted median; whether there may be a NaN, so that the result is not to be used.
template <int64_t P>
MTKD_INLINE bool median_loop(const float* const* rows, int64_t n, float* out) {
  const float* row[P];  // a copy that the stores to `out` cannot change
  unroll<P>([&](size_t p) MTKD_UNROLLED { row[p] = rows[p]; });
  int bad = 0;
  MTKD_VECTORISED
  for (int64_t i = 0; i < n; ++i) {
    float v[P], sum = 0;
    unroll<P>([&](size_t p) MTKD_UNROLLED { sum += v[p] = row[p][i]; });
    bad |= sum != sum;
    unroll<kNetwork<P>.size()>([&](size_t c) MTKD_UNROLLED {
      exchange(v[kNetwork<P>[c].first], v[kNetwork<P>[c].second]);
    });
    out[i] = P % 2 ? v[P / 2] : 0.5f * v[(P - 1) / 2] + 0.5f * v[P / 2];
  }
  return bad;
}

template <bool Median, int64_t P>
MTKD_INLINE void quantiles_loop(const float* const* rows, const float* const* weights, int64_t n,
                                float trim, float* out, float* totals) {
  const float *row[P], *weight[P];
  unroll<P>([&](size_t p) MTKD_UNROLLED {
    row[p] = rows[p];
    weight[p] = weights[p];
  });
  MTKD_VECTORISED
  for (int64_t i = 0; i < n; ++i) {
    float v[P], w[P], total = 0;
    unroll<P>([&](size_t p) MTKD_UNROLLED {
      const float value = row[p][i];
      total += w[p] = counted(value, weight[p][i]);
      v[p] = value == value ? value : std::numeric_limits<float>::infinity();
    });
    unroll<kNetwork<P>.size()>([&](size_t c) MTKD_UNROLLED {
      const auto [a, b] = kNetwork<P>[c];
      exchange(v[a], v[b], w[a], w[b]);
    });
    Quantiles<Median, float> q(total, trim);
    unroll<P>([&](size_t p) MTKD_UNROLLED { q.add(v[p], w[p]); });
    out[i] = q.result();
    totals[i] = total;
  }
}

template <class A>
MTKD_INLINE bool mean_loop(const A* const* rows, int64_t count, int64_t n, A* out) {
  std::copy(rows[0], rows[0] + n, out);
  for (int64_t p = 1; p < count; ++p) {
    const A* row = rows[p];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += row[i];
  }
  int bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    out[i] /= static_cast<A>(count);
    bad |= out[i] != out[i];
  }
  return bad;
}

template <class A>
MTKD_INLINE void weighted_mean_loop(const A* const* rows, const A* const* weights, int64_t count,
                                    int64_t n, A* out, A* totals) {
  std::fill(out, out + n, A(0));
  std::fill(totals, totals + n, A(0));
  for (int64_t p = 0; p < count; ++p) {
    const A *row = rows[p], *weight = weights[p];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A w = counted(row[i], weight[i]);
      out[i] += w > 0 ? w * row[i] : A(0);
      totals[i] += w;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] /= totals[i];
}

// Any number of messages; `scratch` has 2 * count + 2 rows of n.
template <bool Median, class A>
MTKD_INLINE void sorted_rows_loop(const A* const* rows, const A* const* weights, int64_t count,
                                  int64_t n, A trim, A* out, A* totals, A* scratch) {
  A *v = scratch, *w = scratch + count * n;
  std::fill(totals, totals + n, A(0));
  for (int64_t p = 0; p < count; ++p) {
    const A *row = rows[p], *weight = weights[p];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      totals[i] += w[p * n + i] = counted(row[i], weight[i]);
      v[p * n + i] = row[i] == row[i] ? row[i] : std::numeric_limits<A>::infinity();
    }
  }
  sort_network(count, [=](int64_t a, int64_t b) {
    A *va = v + a * n, *vb = v + b * n, *wa = w + a * n, *wb = w + b * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) exchange(va[i], vb[i], wa[i], wb[i]);
  });
  A *end = scratch + 2 * count * n, *upper = end + n;
  std::fill(end, upper + n, A(0));
  std::fill(out, out + n, A(0));
  for (int64_t p = 0; p < count; ++p) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      Quantiles<Median, A> q(totals[i], trim);
      q.end = end[i], q.sum = out[i], q.upper = upper[i];
      q.add(v[p * n + i], w[p * n + i]);
      end[i] = q.end, out[i] = q.sum, upper[i] = q.upper;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Quantiles<Median, A> q(totals[i], trim);
    q.sum = out[i], q.upper = upper[i];
    out[i] = q.result();
  }
}

// A function each, since GCC gives up on taking apart the arrays of several in one.
#define MTKD_UNROLLED_VOTES(P)                                                                  \
  MTKD_CLONES bool median_##P(const float* const* v, int64_t n, float* out) {                   \
    return median_loop<P>(v, n, out);                                                           \
  }                                                                                             \
  MTKD_CLONES void weighted_median_##P(const float* const* v, const float* const* w, int64_t n, \
                                       float trim, float* out, float* totals) {                 \
    quantiles_loop<true, P>(v, w, n, trim, out, totals);                                        \
  }                                                                                             \
  MTKD_CLONES void trimmed_mean_##P(const float* const* v, const float* const* w, int64_t n,    \
                                    float trim, float* out, float* totals) {                    \
    quantiles_loop<false, P>(v, w, n, trim, out, totals);                                       \
  }
#define MTKD_COUNTS(F) \
  F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15) F(16)
MTKD_COUNTS(MTKD_UNROLLED_VOTES)

constexpr int64_t kUnrolled = 16;
using Median = bool (*)(const float* const*, int64_t, float*);
using Weighted = void (*)(const float* const*, const float* const*, int64_t, float, float*, float*);
#define MTKD_NAMED(P) {median_##P, weighted_median_##P, trimmed_mean_##P},
constexpr struct {
  Median median;
  Weighted weighted_median, trimmed_mean;
} kVotes[] = {MTKD_COUNTS(MTKD_NAMED)};

#define MTKD_VOTES(A)                                                                              \
  MTKD_CLONES bool mean_of(const A* const* v, int64_t count, int64_t n, A* out) {                  \
    return mean_loop(v, count, n, out);                                                            \
  }                                                                                                \
  MTKD_CLONES void weighted_mean_of(const A* const* v, const A* const* w, int64_t count,           \
                                    int64_t n, A* out, A* totals) {                                \
    weighted_mean_loop(v, w, count, n, out, totals);                                               \
  }                                                                                                \
  MTKD_CLONES void median_of(const A* const* v, const A* const* w, int64_t count, int64_t n,       \
                             A* out, A* totals, A* scratch) {                                      \
    sorted_rows_loop<true>(v, w, count, n, A(0), out, totals, scratch);                            \
  }                                                                                                \
  MTKD_CLONES void trimmed_mean_of(const A* const* v, const A* const* w, int64_t count, int64_t n, \
                                   A trim, A* out, A* totals, A* scratch) {                        \
    sorted_rows_loop<false>(v, w, count, n, trim, out, totals, scratch);                           \
  }
MTKD_VOTES(float)
MTKD_VOTES(double)

template <class A>
void any_weighted_vote(const A* const* rows, const A* const* weights, int64_t count, int64_t n,
                       double trim, A* out, A* totals, A* scratch) {
  const A cut = static_cast<A>(trim);
  if (trim == 0) return weighted_mean_of(rows, weights, count, n, out, totals);
  if constexpr (std::is_same_v<A, float>) {
    if (count <= kUnrolled) {
      const auto& vote = kVotes[count - 1];
      return (trim == 0.5 ? vote.weighted_median : vote.trimmed_mean)(rows, weights, n, cut, out,
                                                                      totals);
    }
  }
  if (trim == 0.5) return median_of(rows, weights, count, n, out, totals, scratch);
  trimmed_mean_of(rows, weights, count, n, cut, out, totals, scratch);
}

}  // namespace

bool vote(const float* const* rows, int64_t count, int64_t n, double trim, float* out) {
  if (trim == 0) return !mean_of(rows, count, n, out);
  if (trim == 0.5 && count <= kUnrolled) return !kVotes[count - 1].median(rows, n, out);
  return false;
}
bool vote(const double* const* rows, int64_t count, int64_t n, double trim, double* out) {
  return trim == 0 && !mean_of(rows, count, n, out);
}
void weighted_vote(const float* const* rows, const float* const* weights, int64_t count, int64_t n,
                   double trim, float* out, float* totals, float* scratch) {
  any_weighted_vote(rows, weights, count, n, trim, out, totals, scratch);
}
void weighted_vote(const double* const* rows, const double* const* weights, int64_t count,
                   int64_t n, double trim, double* out, double* totals, double* scratch) {
  any_weighted_vote(rows, weights, count, n, trim, out, totals, scratch);
}

}  // namespace mtkd::cpu
