// Votes of messages about n elements: means, and quantiles by sorting networks. In float32 the
// network of up to 16 messages is unrolled and its values stay in registers; more of them, and
// float64, are sorted row by row in a cache.
#pragma once

#include "../common.h"

namespace mtkd::cpu {

// The mean (trim 0), the median (1/2) or the trimmed mean of `count` rows. False where there is no
// loop for it, or a message may abstain, being NaN: then the weighted vote gives the result.
bool vote(const float* const* rows, int64_t count, int64_t n, double trim, float* out);
bool vote(const double* const* rows, int64_t count, int64_t n, double trim, double* out);

// The same with weights, of which what is not positive is 0; `totals` are the weights that
// counted, `scratch` has (2 * count + 2) * n numbers.
void weighted_vote(const float* const* rows, const float* const* weights, int64_t count, int64_t n,
                   double trim, float* out, float* totals, float* scratch);
void weighted_vote(const double* const* rows, const double* const* weights, int64_t count,
                   int64_t n, double trim, double* out, double* totals, double* scratch);

}  // namespace mtkd::cpu
