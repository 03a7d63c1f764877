// The body of Kernels::search_groups, compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "rounding.h"

namespace pennyweight {
namespace {

// Partial sums, each over every kLanes-th weight: the same order of additions whatever the width of the vectors.
constexpr std::size_t kLanes = 16;
constexpr int kLeastSquaresSteps = 2;

// One group; `importance` is null for ones.
struct Group {
  const float* w;
  const float* importance;
  std::size_t size;
};

struct Candidate {
  float scale;
  float zero;
};

// sum h (w - scale q)^2, sum h w q and sum h q q with q = value - zero.
struct Sums {
  float error;
  float wq;
  float qq;
};

inline float total(const float* lanes) {
  float sums[kLanes];
  for (std::size_t l = 0; l < kLanes; ++l) sums[l] = lanes[l];
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

// The lanes from `at` on, added to the partial sums. Dividing by the scale would be exact but slow; the codes are
// chosen by division later.
template <bool kWeighted, bool kLeastSquares>
inline void add(const Group& g, Candidate c, float low, float high, std::size_t at, std::size_t lanes, float* error,
                float* wq, float* qq) {
  const float* __restrict w = g.w + at;
  const float inverse = 1.0f / c.scale;
  for (std::size_t l = 0; l < lanes; ++l) {
    const float q = round_even(min_of(max_of(w[l] * inverse + c.zero, low), high)) - c.zero;
    const float h = kWeighted ? g.importance[at + l] : 1.0f;
    const float difference = q * c.scale - w[l];
    error[l] += difference * difference * h;
    if constexpr (kLeastSquares) {
      const float hq = h * q;
      wq[l] += hq * w[l];
      qq[l] += hq * q;
    }
  }
}

template <bool kWeighted, bool kLeastSquares>
Sums sums_of(const Group& g, Candidate c, float low, float high) {
  float error[kLanes] = {}, wq[kLanes] = {}, qq[kLanes] = {};
  std::size_t at = 0;
  for (; at + kLanes <= g.size; at += kLanes) add<kWeighted, kLeastSquares>(g, c, low, high, at, kLanes, error, wq, qq);
  if (at < g.size) add<kWeighted, kLeastSquares>(g, c, low, high, at, g.size - at, error, wq, qq);
  if constexpr (kLeastSquares) return {total(error), total(wq), total(qq)};
  return {total(error), 0.0f, 0.0f};
}

inline float stored_scale(const SearchGroups& s, float scale) {
  const float clamped = min_of(max_of(scale, -s.limit), s.limit);
  float rounded = clamped;
  if (s.stored == Stored::kBFloat16) rounded = to_bfloat16(clamped);
  if (s.stored == Stored::kFloat16) rounded = to_float16(clamped);
  return rounded == 0.0f ? s.tiny : rounded;
}

// The range of a group, times `factor`, as a scale and a zero.
inline Candidate shrunk(const SearchGroups& s, float low, float high, float factor) {
  if (s.zeros == nullptr) {
    const float extreme = -low >= high ? low : high;
    const float full = extreme / (s.smallest < 0.0f ? s.smallest : s.largest);
    return {stored_scale(s, full * factor), 0.0f};
  }
  low = min_of(low, 0.0f);
  high = max_of(high, 0.0f);
  const float scale = stored_scale(s, (high - low) * (factor / (s.largest - s.smallest)));
  // Clamped before it is rounded, which gives the same whole number and keeps the rounding in its domain.
  const float zero = min_of(max_of(s.smallest - low * factor / scale, s.smallest), s.largest);
  return {scale, round_even(zero)};
}

template <bool kWeighted>
void search_group(const SearchGroups& s, const Group& g, float* scale, float* zero) {
  float low = g.w[0], high = g.w[0];
  for (std::size_t k = 1; k < g.size; ++k) {
    low = min_of(g.w[k], low);
    high = max_of(g.w[k], high);
  }
  Candidate best = {*scale, zero == nullptr ? 0.0f : *zero};
  float lowest = sums_of<kWeighted, false>(g, best, s.smallest, s.largest).error;
  for (std::size_t f = 0; f < s.factor_count; ++f) {
    const Candidate next = shrunk(s, low, high, s.factors[f]);
    const float error = sums_of<kWeighted, false>(g, next, s.smallest, s.largest).error;
    if (error < lowest) {
      best = next;
      lowest = error;
    }
  }
  Sums sums = sums_of<kWeighted, true>(g, best, s.smallest, s.largest);
  for (int step = 0; step < kLeastSquaresSteps && sums.qq > 0.0f; ++step) {
    const Candidate next = {stored_scale(s, sums.wq / sums.qq), best.zero};
    const Sums after = sums_of<kWeighted, true>(g, next, s.smallest, s.largest);
    if (!(after.error < sums.error)) break;
    best = next;
    sums = after;
  }
  *scale = best.scale;
  if (zero != nullptr) *zero = best.zero;
}

void search_groups(const SearchGroups& s) {
  if (s.size == 0) return;
  for (std::size_t i = 0; i < s.groups; ++i) {
    float* zero = s.zeros == nullptr ? nullptr : s.zeros + i;
    const float* importance = s.importance == nullptr ? nullptr : s.importance + (i % s.importance_groups) * s.size;
    const Group group = {s.w + i * s.size, importance, s.size};
    if (importance == nullptr) {
      search_group<false>(s, group, s.scales + i, zero);
    } else {
      search_group<true>(s, group, s.scales + i, zero);
    }
  }
}

}  // namespace
}  // namespace pennyweight
