// The body of Kernels::search_groups, compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "ranges.h"
#include "rounding.h"

namespace pennyweight {
namespace {

// Partial sums, each over every kLanes-th weight: the same order of additions whatever the width of the vectors.
constexpr std::size_t kLanes = 16;
// Candidates whose errors are summed side by side.
constexpr std::size_t kAtOnce = 4;
// Bounds on what nearly always ends earlier, because the group gains no more.
constexpr int kLeastSquaresSteps = 8;
constexpr int kMoves = 3;

// One group; `importance` is null for ones.
struct Group {
  const float* w;
  const float* importance;
  std::size_t size;
  float parent;
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
template <bool kTable, bool kWeighted, bool kLeastSquares>
inline void add(const SearchGroups& s, const Group& g, Candidate c, std::size_t at, std::size_t lanes, float* error,
                float* wq, float* qq) {
  const float* __restrict w = g.w + at;
  const float inverse = 1.0f / c.scale;
  const float low = s.smallest, high = s.largest;
  float looked_up[kLanes];
  if constexpr (kTable) {
    float scaled[kLanes];
    for (std::size_t l = 0; l < lanes; ++l) {
      scaled[l] = w[l] * inverse;
      looked_up[l] = s.element.values[0];
    }
    for (std::size_t v = 1; v < s.element.count; ++v) {
      const float threshold = s.element.thresholds[v - 1], value = s.element.values[v];
      for (std::size_t l = 0; l < lanes; ++l) looked_up[l] = scaled[l] > threshold ? value : looked_up[l];
    }
  }
  for (std::size_t l = 0; l < lanes; ++l) {
    const float whole = round_even(min_of(max_of(w[l] * inverse + c.zero, low), high)) - c.zero;
    const float q = kTable ? looked_up[l] : whole;
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

template <bool kTable, bool kWeighted, bool kLeastSquares>
Sums sums_of(const SearchGroups& s, const Group& g, Candidate c) {
  float error[kLanes] = {}, wq[kLanes] = {}, qq[kLanes] = {};
  std::size_t at = 0;
  for (; at + kLanes <= g.size; at += kLanes) add<kTable, kWeighted, kLeastSquares>(s, g, c, at, kLanes, error, wq, qq);
  if (at < g.size) add<kTable, kWeighted, kLeastSquares>(s, g, c, at, g.size - at, error, wq, qq);
  if constexpr (kLeastSquares) return {total(error), total(wq), total(qq)};
  return {total(error), 0.0f, 0.0f};
}

// The errors of several candidates, each summed in the same order as by itself: one reading of the weights serves all,
// and the sums do not wait for each other.
template <bool kTable, bool kWeighted>
void errors_of(const SearchGroups& s, const Group& g, const Candidate* candidates, float* errors) {
  float error[kAtOnce][kLanes] = {};
  std::size_t at = 0;
  for (; at + kLanes <= g.size; at += kLanes) {
    for (std::size_t c = 0; c < kAtOnce; ++c) {
      add<kTable, kWeighted, false>(s, g, candidates[c], at, kLanes, error[c], nullptr, nullptr);
    }
  }
  for (std::size_t c = 0; c < kAtOnce; ++c) {
    if (at < g.size) add<kTable, kWeighted, false>(s, g, candidates[c], at, g.size - at, error[c], nullptr, nullptr);
    errors[c] = total(error[c]);
  }
}

// The value before the first threshold that `x` does not exceed.
inline float nearest_in(const Table& table, float x) {
  std::size_t first = 0, end = table.count - 1;
  while (first < end) {
    const std::size_t middle = (first + end) / 2;
    if (table.thresholds[middle] < x) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  return table.values[first];
}

inline float stored_scale(const SearchGroups& s, const Group& g, float scale) {
  const float clamped = min_of(max_of(scale, -s.limit), s.limit);
  if (s.scale.values != nullptr) {
    const float nearest = nearest_in(s.scale, clamped / g.parent);
    return (nearest == 0.0f ? s.tiny : nearest) * g.parent;
  }
  float rounded = clamped;
  if (s.stored == Stored::kBFloat16) rounded = to_bfloat16(clamped);
  if (s.stored == Stored::kFloat16) rounded = to_float16(clamped);
  return rounded == 0.0f ? s.tiny : rounded;
}

// The range of a group as a scale and a zero: times one factor, or each of its ends times its own.
inline Candidate shrunk(const SearchGroups& s, const Group& g, float low, float high, const float* factors) {
  if (s.zeros == nullptr) {
    const float extreme = -low >= high ? low : high;
    const float full = extreme / (s.smallest < 0.0f ? s.smallest : s.largest);
    return {stored_scale(s, g, full * factors[0]), 0.0f};
  }
  low = min_of(low, 0.0f) * factors[0];
  high = max_of(high, 0.0f) * factors[1];
  const float scale = stored_scale(s, g, (high - low) / (s.largest - s.smallest));
  // Clamped before it is rounded, which gives the same whole number and keeps the rounding in its domain.
  const float zero = min_of(max_of(s.smallest - low / scale, s.smallest), s.largest);
  return {scale, round_even(zero)};
}

// A candidate with its sums.
struct Found {
  Candidate candidate;
  Sums sums;
};

template <bool kTable, bool kWeighted>
inline Found found(const SearchGroups& s, const Group& g, Candidate c) {
  return {c, sums_of<kTable, kWeighted, true>(s, g, c)};
}

// With the scale that is best for the codes of `from`; `from` itself where all of them are zero.
template <bool kTable, bool kWeighted>
inline Found least_squares(const SearchGroups& s, const Group& g, const Found& from) {
  if (!(from.sums.qq > 0.0f)) return from;
  return found<kTable, kWeighted>(s, g, {stored_scale(s, g, from.sums.wq / from.sums.qq), from.candidate.zero});
}

// Least squares and rounding to nearest in turns, until the group gains no more.
template <bool kTable, bool kWeighted>
inline Found settled(const SearchGroups& s, const Group& g, Found best) {
  for (int step = 0; step < kLeastSquaresSteps; ++step) {
    const Found next = least_squares<kTable, kWeighted>(s, g, best);
    if (!(next.sums.error < best.sums.error)) break;
    best = next;
  }
  return best;
}

// Zero points one beside that of `best`, each with the scale that is best for its codes.
template <bool kTable, bool kWeighted>
inline Found moved(const SearchGroups& s, const Group& g, Found best) {
  for (float step = -1.0f; step <= 1.0f; step += 2.0f) {
    const float zero = min_of(max_of(best.candidate.zero + step, s.smallest), s.largest);
    const Found next =
        least_squares<kTable, kWeighted>(s, g, found<kTable, kWeighted>(s, g, {best.candidate.scale, zero}));
    if (next.sums.error < best.sums.error) best = next;
  }
  return settled<kTable, kWeighted>(s, g, best);
}

template <bool kTable, bool kWeighted>
void search_group(const SearchGroups& s, const Group& g, float* scale, float* zero) {
  float low, high;
  range_of(g.w, 1, g.size, &low, &high);
  Candidate best = {*scale, zero == nullptr ? 0.0f : *zero};
  float lowest = sums_of<kTable, kWeighted, false>(s, g, best).error;
  const std::size_t ends = zero == nullptr ? 1 : 2;
  for (std::size_t f = 0; f < s.factor_count; f += kAtOnce) {
    Candidate next[kAtOnce];
    for (std::size_t c = 0; c < kAtOnce; ++c) {
      next[c] = shrunk(s, g, low, high, s.factors + (f + c < s.factor_count ? f + c : f) * ends);
    }
    float errors[kAtOnce];
    errors_of<kTable, kWeighted>(s, g, next, errors);
    for (std::size_t c = 0; c < kAtOnce; ++c) {
      if (errors[c] < lowest) {
        best = next[c];
        lowest = errors[c];
      }
    }
  }
  Found chosen = settled<kTable, kWeighted>(s, g, found<kTable, kWeighted>(s, g, best));
  for (int move = 0; zero != nullptr && move < kMoves; ++move) {
    const Found next = moved<kTable, kWeighted>(s, g, chosen);
    if (!(next.sums.error < chosen.sums.error)) break;
    chosen = next;
  }
  *scale = chosen.candidate.scale;
  if (zero != nullptr) *zero = chosen.candidate.zero;
}

template <bool kTable>
void search_any(const SearchGroups& s, const Group& g, float* scale, float* zero) {
  if (g.importance == nullptr) {
    search_group<kTable, false>(s, g, scale, zero);
  } else {
    search_group<kTable, true>(s, g, scale, zero);
  }
}

void search_groups(const SearchGroups& s) {
  if (s.size == 0) return;
  for (std::size_t i = 0; i < s.groups; ++i) {
    float* zero = s.zeros == nullptr ? nullptr : s.zeros + i;
    const float* importance = s.importance == nullptr ? nullptr : s.importance + (i % s.importance_groups) * s.size;
    const float parent = s.parents == nullptr ? 1.0f : s.parents[i];
    const Group group = {s.w + i * s.size, importance, s.size, parent};
    if (s.element.values == nullptr) {
      search_any<false>(s, group, s.scales + i, zero);
    } else {
      search_any<true>(s, group, s.scales + i, zero);
    }
  }
}

}  // namespace
}  // namespace pennyweight
