// Groups of SearchNested as lanes, and what is known of them.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace pennyweight {
namespace {

// kGroups groups.
struct Tile {
  const Lanes* w;
  const Lanes* h;  // importance
  std::size_t size;
  Lanes mean;   // of w, where there are offsets
  Lanes ones;   // sum h
  Lanes over;   // 1 / sum h
  Lanes least;  // of w
  Lanes most;
};

// sum h v, sum h v v and sum h v (w - mean) with v the values of the codes, and sum h (s v - o - w)^2.
struct Moments {
  Lanes v, vv, vw, error;
};

// Stored numbers: scale = step * a, offset = offset_step * b; steps are the parents, or 1.
struct Fit {
  Lanes a, b, step, offset_step;
  Moments sums;
};

inline Moments where(Mask mask, const Moments& x, const Moments& y) {
  return {mask ? x.v : y.v, mask ? x.vv : y.vv, mask ? x.vw : y.vw, mask ? x.error : y.error};
}

inline Fit where(Mask mask, const Fit& x, const Fit& y) {
  return {mask ? x.a : y.a, mask ? x.b : y.b, mask ? x.step : y.step, mask ? x.offset_step : y.offset_step,
          where(mask, x.sums, y.sums)};
}

// The groups from `first` on, as lanes; those past the last are zeros.
template <bool kWeighted, bool kOffset>
inline Tile tile_of(const SearchNested& s, std::size_t first) {
  Lanes* w = reinterpret_cast<Lanes*>(s.scratch);
  Lanes* h = w + s.size;
  for (std::size_t l = 0; l < kGroups; ++l) {
    const bool is_there = first + l < s.groups;
    const float* from = s.w + (is_there ? first + l : 0) * s.size;
    for (std::size_t k = 0; k < s.size; ++k) w[k][l] = is_there ? from[k] : 0.0f;
    if constexpr (kWeighted) {
      const float* importance = s.importance + (first + l) % s.importance_groups * s.size;
      for (std::size_t k = 0; k < s.size; ++k) h[k][l] = importance[k];
    }
  }
  Tile t = {w, h, s.size, {}, {}, {}, w[0], w[0]};
  for (std::size_t k = 0; k < s.size; ++k) {
    t.least = min_of(t.least, w[k]);
    t.most = max_of(t.most, w[k]);
    t.ones += kWeighted ? h[k] : lanes(1.0f);
    if constexpr (kOffset) t.mean += kWeighted ? h[k] * w[k] : w[k];
  }
  t.over = lanes(1.0f) / t.ones;
  if constexpr (kOffset) {
    t.mean *= t.over;
  }
  return t;
}

// Writes the lanes of `values` [groups] and of their parents.
inline void write(const Field& field, const SearchNested& s, std::size_t first, Lanes codes, Lanes steps) {
  for (std::size_t l = 0; l < kGroups && first + l < s.groups; ++l) {
    if (field.parents != nullptr) field.parents[(first + l) / s.span] = steps[l];
    field.values[first + l] = steps[l] * codes[l];
  }
}

}  // namespace
}  // namespace pennyweight
