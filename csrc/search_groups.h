// The body of Kernels::search_groups, compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "rounding.h"

namespace pennyweight {
namespace {

// Partial sums, each over every kLanes-th weight: the same order of additions whatever the width of the vectors.
constexpr std::size_t kLanes = 16;
// Bounds on what nearly always ends earlier, because the group gains no more.
constexpr int kLeastSquaresSteps = 8;
constexpr int kMoves = 3;

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

// The range of a group as a scale and a zero: times one factor, or each of its ends times its own.
inline Candidate shrunk(const SearchGroups& s, float low, float high, const float* factors) {
  if (s.zeros == nullptr) {
    const float extreme = -low >= high ? low : high;
    const float full = extreme / (s.smallest < 0.0f ? s.smallest : s.largest);
    return {stored_scale(s, full * factors[0]), 0.0f};
  }
  low = min_of(low, 0.0f) * factors[0];
  high = max_of(high, 0.0f) * factors[1];
  const float scale = stored_scale(s, (high - low) / (s.largest - s.smallest));
  // Clamped before it is rounded, which gives the same whole number and keeps the rounding in its domain.
  const float zero = min_of(max_of(s.smallest - low / scale, s.smallest), s.largest);
  return {scale, round_even(zero)};
}

// A candidate with its sums.
struct Found {
  Candidate candidate;
  Sums sums;
};

template <bool kWeighted>
inline Found found(const SearchGroups& s, const Group& g, Candidate c) {
  return {c, sums_of<kWeighted, true>(g, c, s.smallest, s.largest)};
}

// With the scale that is best for the codes of `from`; `from` itself where all of them are zero.
template <bool kWeighted>
inline Found least_squares(const SearchGroups& s, const Group& g, const Found& from) {
  if (!(from.sums.qq > 0.0f)) return from;
  return found<kWeighted>(s, g, {stored_scale(s, from.sums.wq / from.sums.qq), from.candidate.zero});
}

// Least squares and rounding to nearest in turns, until the group gains no more.
template <bool kWeighted>
inline Found settled(const SearchGroups& s, const Group& g, Found best) {
  for (int step = 0; step < kLeastSquaresSteps; ++step) {
    const Found next = least_squares<kWeighted>(s, g, best);
    if (!(next.sums.error < best.sums.error)) break;
    best = next;
  }
  return best;
}

// Zero points one beside that of `best`, each with the scale that is best for its codes.
template <bool kWeighted>
inline Found moved(const SearchGroups& s, const Group& g, Found best) {
  for (float step = -1.0f; step <= 1.0f; step += 2.0f) {
    const float zero = min_of(max_of(best.candidate.zero + step, s.smallest), s.largest);
    const Found next = least_squares<kWeighted>(s, g, found<kWeighted>(s, g, {best.candidate.scale, zero}));
    if (next.sums.error < best.sums.error) best = next;
  }
  return settled<kWeighted>(s, g, best);
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
  const std::size_t ends = zero == nullptr ? 1 : 2;
  for (std::size_t f = 0; f < s.factor_count; ++f) {
    const Candidate next = shrunk(s, low, high, s.factors + f * ends);
    const float error = sums_of<kWeighted, false>(g, next, s.smallest, s.largest).error;
    if (error < lowest) {
      best = next;
      lowest = error;
    }
  }
  Found chosen = settled<kWeighted>(s, g, found<kWeighted>(s, g, best));
  for (int move = 0; zero != nullptr && move < kMoves; ++move) {
    const Found next = moved<kWeighted>(s, g, chosen);
    if (!(next.sums.error < chosen.sums.error)) break;
    chosen = next;
  }
  *scale = chosen.candidate.scale;
  if (zero != nullptr) *zero = chosen.candidate.zero;
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
