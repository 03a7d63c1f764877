// The body of Kernels::search_nested, compiled once for each instruction set. kGroups groups are searched side by side,
// one in each lane; decisions about parents are taken for the lanes of a span together.
#pragma once

#include "kernels.h"
#include "nested_tile.h"

namespace pennyweight {
namespace {

// Bounds on what nearly always ends earlier, because no span gains any more.
constexpr int kFreeSteps = 2;
constexpr int kRounds = 3;
// Upper bound on SearchNested::tried.
constexpr std::size_t kTried = 4;

template <bool kTable, bool kWeighted, bool kOffset>
struct NestedSearch {
  const SearchNested& s;
  const Tile& t;
  Whole values, scale_codes, offset_codes;

  NestedSearch(const SearchNested& search, const Tile& tile)
      : s(search),
        t(tile),
        values(whole(kTable ? 0.0f : s.smallest, kTable ? 0.0f : s.largest)),
        scale_codes(whole(s.scale.parents == nullptr ? 0.0f : s.scale.smallest,
                          s.scale.parents == nullptr ? 0.0f : s.scale.largest)),
        offset_codes(whole(s.offset.parents == nullptr ? 0.0f : s.offset.smallest,
                           s.offset.parents == nullptr ? 0.0f : s.offset.largest)) {}

  Lanes value_of(Lanes x) const {
    if constexpr (!kTable) return nearest(x, values);
    Lanes found = lanes(s.element.values[0]);
    for (std::size_t v = 1; v < s.element.count; ++v) {
      found = x > lanes(s.element.thresholds[v - 1]) ? lanes(s.element.values[v]) : found;
    }
    return found;
  }

  // The moments of the values nearest to (w - mean) * inverse + shift.
  Moments free_moments(Lanes inverse, Lanes shift) const {
    Lanes v = {}, vv = {}, vw = {};
    for (std::size_t k = 0; k < t.size; ++k) {
      const Lanes w = kOffset ? t.w[k] - t.mean : t.w[k];
      const Lanes value = value_of(kOffset ? w * inverse + shift : w * inverse);
      const Lanes hv = kWeighted ? t.h[k] * value : value;
      if constexpr (kOffset) v += hv;
      vv += hv * value;
      vw += hv * w;
    }
    return {v, vv, vw, Lanes{}};
  }

  // The moments of the values nearest to (w + offset) / scale, and their error.
  Moments moments(Lanes scale, Lanes offset) const {
    const Lanes inverse = lanes(1.0f) / scale;
    Lanes v = {}, vv = {}, vw = {}, error = {};
    for (std::size_t k = 0; k < t.size; ++k) {
      const Lanes w = t.w[k];
      const Lanes value = value_of(kOffset ? (w + offset) * inverse : w * inverse);
      const Lanes hv = kWeighted ? t.h[k] * value : value;
      if constexpr (kOffset) v += hv;
      vv += hv * value;
      vw += kOffset ? hv * (w - t.mean) : hv * w;
      const Lanes difference = kOffset ? value * scale - offset - w : value * scale - w;
      error += kWeighted ? t.h[k] * (difference * difference) : difference * difference;
    }
    return {v, vv, vw, error};
  }

  Fit tried(Lanes a, Lanes b, Lanes step, Lanes offset_step) const {
    return {a, b, step, offset_step, moments(step * a, offset_step * b)};
  }

  Lanes scale_code(Lanes scale, Lanes inverse_step) const {
    const Lanes clear = bounded(scale, -s.scale.limit, s.scale.limit);
    if (s.scale.parents == nullptr) {
      const Lanes x = to_stored(clear, s.scale.stored);
      return x == lanes(0.0f) ? lanes(s.scale.tiny) : x;
    }
    const Lanes code = nearest(clear * inverse_step, scale_codes);
    return code == lanes(0.0f) ? lanes(s.scale.tiny) : code;
  }

  Lanes offset_code(Lanes offset, Lanes inverse_step) const {
    const Lanes clear = bounded(offset, -s.offset.limit, s.offset.limit);
    if (s.offset.parents == nullptr) {
      return to_stored(s.offset.smallest < 0.0f ? clear : max_of(clear, Lanes{}), s.offset.stored);
    }
    return nearest(clear * inverse_step, offset_codes);
  }

  Lanes parent(const Field& field, Lanes wanted) const {
    const Lanes x = to_stored(bounded(wanted, -field.parent_limit, field.parent_limit), field.stored);
    return magnitude(x) > lanes(0.0f) ? x : lanes(field.parent_tiny);
  }

  // sum h v v less what an offset makes up for: how much the error rises with the square of a change of scale.
  Lanes weight_of_scale(const Moments& m) const { return kOffset ? m.vv - m.v * m.v * t.over : m.vv; }

  // The smallest scale that reaches both ends of the range, and the offset that places it.
  Fit ranged() const {
    Lanes low = t.least, high = t.most, scale;
    if constexpr (kOffset) {
      if (!(s.offset.smallest < 0.0f)) {
        low = min_of(low, Lanes{});
        high = max_of(high, Lanes{});
      }
      scale = (high - low) / lanes(s.largest - s.smallest);
    } else if (s.smallest < 0.0f) {
      scale = max_of(high / lanes(s.largest), low / lanes(s.smallest));
    } else {
      scale = (-low > high ? low : high) / lanes(s.largest);
    }
    Lanes step = lanes(1.0f), offset_step = lanes(1.0f);
    if (s.scale.parents != nullptr) {
      step = parent(s.scale, max_of_span(magnitude(scale), s.span) / lanes(s.scale.largest));
    }
    if constexpr (!kOffset) return tried(scale_code(scale, lanes(1.0f) / step), Lanes{}, step, offset_step);
    if (s.offset.parents != nullptr) {
      const Lanes offset = lanes(s.smallest) * scale - low;
      offset_step = parent(s.offset, max_of_span(magnitude(offset), s.span) / lanes(s.offset.largest));
    }
    const Lanes a = scale_code(scale, lanes(1.0f) / step);
    const Lanes offset = lanes(s.smallest) * (step * a) - low;
    return tried(a, offset_code(offset, lanes(1.0f) / offset_step), step, offset_step);
  }

  // Any scales and offsets: the best of a grid, each with the least squares of its codes.
  struct Free {
    Lanes scale, offset, gain;
    Moments sums;
  };

  // Offsets of the side `side` only (0: both).
  Free better(const Free& best, const Moments& m, float side) const {
    const Lanes over = weight_of_scale(m);
    Lanes scale = m.vw / over;
    Lanes gain = m.vw * scale;
    Mask valid = over > lanes(0.0f);
    Lanes offset = {};
    if constexpr (kOffset) {
      offset = scale * m.v * t.over - t.mean;
      const Mask outside = offset * lanes(side) < Lanes{};
      if (any(outside)) {
        // Offset 0: what is left is the scale.
        const Lanes bound = (m.vw + t.mean * m.v) / m.vv;
        const Lanes loss = bound * (bound * m.vv - lanes(2.0f) * (t.mean * m.v + m.vw)) + t.mean * t.mean * t.ones;
        scale = outside ? bound : scale;
        gain = outside ? -loss : gain;
        offset = outside ? Lanes{} : offset;
      }
    }
    if (!(s.scale.smallest < 0.0f)) valid &= scale > Lanes{};
    valid &= gain > best.gain;
    return {valid ? scale : best.scale, valid ? offset : best.offset, valid ? gain : best.gain,
            where(valid, m, best.sums)};
  }

  // Calls `visit` with the inverse scale and the shift of each point of the grid.
  template <typename Visit>
  void each(Visit visit) const {
    if constexpr (kOffset) {
      const Lanes half = (t.most - t.least) * lanes(0.5f), centre = (t.most + t.least) * lanes(0.5f) - t.mean;
      const Lanes full = lanes((s.largest - s.smallest) * 0.5f) / half;
      for (std::size_t f = 0; f < s.factor_count; ++f) {
        const float below = s.factors[2 * f], above = s.factors[2 * f + 1];
        const Lanes inverse = full * lanes(2.0f / (below + above));
        const Lanes at = centre + half * lanes((above - below) * 0.5f);
        visit(inverse, lanes((s.largest + s.smallest) * 0.5f) - at * inverse);
      }
    } else {
      const Lanes extreme = -t.least >= t.most ? t.least : t.most;
      const Lanes full = lanes(s.smallest < 0.0f ? s.smallest : s.largest) / extreme;
      for (std::size_t f = 0; f < s.factor_count; ++f) visit(full * lanes(1.0f / s.factors[f]), Lanes{});
    }
  }

  Free explored(const Fit& first, float side) const {
    Free best = {first.step * first.a, first.offset_step * first.b, lanes(-__builtin_inff()), first.sums};
    each([&](Lanes inverse, Lanes shift) { best = better(best, free_moments(inverse, shift), side); });
    for (int step = 0; step < kFreeSteps; ++step) {
      const Lanes inverse = lanes(1.0f) / best.scale;
      best = better(best, free_moments(inverse, (best.offset + t.mean) * inverse), side);
    }
    return best;
  }

  // The offset that is best beside a scale.
  Lanes offset_of(Lanes scale, const Moments& m) const { return scale * m.v * t.over - t.mean; }

  // The parent of offsets whose rounding costs least, as estimated for codes that stay.
  Lanes offset_parent(Lanes offset, float side) const {
    const Lanes peak = max_of_span(s.offset.smallest < 0.0f ? magnitude(offset) : offset * lanes(side), s.span);
    Lanes best = parent(s.offset, peak * lanes(side / s.offset.largest));
    Lanes lowest = lanes(__builtin_inff());
    const Lanes over = lanes(side) / peak;
    for (std::size_t i = 0; i < s.share_count; ++i) {
      const Lanes step = peak * lanes(side * s.shares[i] / s.offset.largest);
      const Lanes inverse = over * lanes(s.offset.largest / s.shares[i]);
      const Lanes rest = step * offset_code(offset, inverse) - offset;
      const Lanes cost = sum_of_span(t.ones * rest * rest, s.span);
      const Mask wins = cost < lowest;
      best = wins ? step : best;
      lowest = wins ? cost : lowest;
    }
    return parent(s.offset, best);
  }

  // The parents of scales whose rounding costs least, best first.
  void scale_parents(const Free& free, Lanes* best) const {
    const Lanes peak = max_of_span(magnitude(free.scale), s.span), over = lanes(1.0f) / peak;
    const Lanes weight = weight_of_scale(free.sums);
    Lanes lowest[kTried];
    for (std::size_t i = 0; i < s.tried; ++i) {
      best[i] = peak * lanes(1.0f / s.scale.largest);
      lowest[i] = lanes(__builtin_inff());
    }
    const int sides = s.scale.smallest < 0.0f ? 2 : 1;
    for (int side = 0; side < sides; ++side) {
      const float code = side == 0 ? s.scale.largest : s.scale.smallest;
      for (std::size_t i = 0; i < s.share_count; ++i) {
        Lanes step = peak * lanes(s.shares[i] / code);
        const Lanes rest = step * scale_code(free.scale, over * lanes(code / s.shares[i])) - free.scale;
        Lanes cost = sum_of_span(weight * rest * rest, s.span);
        for (std::size_t at = 0; at < s.tried; ++at) {
          const Mask wins = cost < lowest[at];
          const Lanes out = wins ? best[at] : step, out_cost = wins ? lowest[at] : cost;
          best[at] = wins ? step : best[at];
          lowest[at] = wins ? cost : lowest[at];
          step = out;
          cost = out_cost;
        }
      }
    }
    for (std::size_t i = 0; i < s.tried; ++i) best[i] = parent(s.scale, best[i]);
  }

  // Scales and offsets on the grid of these parents.
  Fit placed(Lanes scale, const Moments& m, Lanes step, Lanes offset_step) const {
    const Lanes a = scale_code(scale, lanes(1.0f) / step);
    if constexpr (!kOffset) return tried(a, Lanes{}, step, offset_step);
    return tried(a, offset_code(offset_of(step * a, m), lanes(1.0f) / offset_step), step, offset_step);
  }

  // The points of the grid of `explored` once more, on the grid of these parents.
  Fit again(Fit best) const {
    each([&](Lanes inverse, Lanes shift) {
      const Moments m = free_moments(inverse, shift);
      const Fit next = placed(m.vw / weight_of_scale(m), m, best.step, best.offset_step);
      best = where(next.sums.error < best.sums.error, next, best);
    });
    return best;
  }

  // In each lane the best of `best` and its neighbours on the grid.
  Fit moved(Fit best) const {
    if (s.scale.parents == nullptr) return best;
    const Lanes over = kOffset ? lanes(1.0f) / best.offset_step : Lanes{};
    for (float by = s.reach; by >= -s.reach; by -= 1.0f) {
      const Lanes a = bounded(best.a + lanes(by), s.scale.smallest, s.scale.largest);
      const Lanes allowed = a == Lanes{} ? best.a : a;
      const Lanes b = kOffset ? offset_code(offset_of(best.step * allowed, best.sums), over) : Lanes{};
      const Fit next = tried(allowed, b, best.step, best.offset_step);
      best = where(next.sums.error < best.sums.error, next, best);
    }
    if constexpr (kOffset) {
      for (float by = 1.0f; by >= -1.0f; by -= 2.0f) {
        const Lanes b =
            s.offset.parents == nullptr ? best.b : bounded(best.b + lanes(by), s.offset.smallest, s.offset.largest);
        const Fit next = tried(best.a, b, best.step, best.offset_step);
        best = where(next.sums.error < best.sums.error, next, best);
      }
    }
    return best;
  }

  // The parents that are best for the codes of weights, scales and offsets, and scales and offsets on their grid.
  Fit refitted(const Fit& from) const {
    const Moments& m = from.sums;
    const bool has_parents = s.scale.parents != nullptr;
    Lanes step = from.step, offset_step = from.offset_step;
    const Lanes aa = sum_of_span(from.a * from.a * m.vv, s.span);
    const Lanes aw = sum_of_span(from.a * (m.vw + t.mean * m.v), s.span);
    if constexpr (!kOffset) {
      if (has_parents) step = parent(s.scale, aw / aa);
      return placed(m.vv > Lanes{} ? m.vw / m.vv : from.step * from.a, m, step, offset_step);
    }
    const Lanes ab = sum_of_span(from.a * from.b * m.v, s.span);
    const Lanes bb = sum_of_span(from.b * from.b * t.ones, s.span);
    const Lanes bw = sum_of_span(from.b * t.mean * t.ones, s.span);
    if (has_parents) {
      const Lanes determinant = aa * bb - ab * ab;
      const Lanes wanted = determinant > Lanes{} ? (aw * bb - bw * ab) / determinant : aw / aa;
      step = parent(s.scale, magnitude(wanted) > Lanes{} ? wanted : from.step);
    }
    if (s.offset.parents != nullptr) {
      offset_step = parent(s.offset, bb > Lanes{} ? (step * ab - bw) / bb : from.offset_step);
    }
    const Lanes over = weight_of_scale(m);
    return placed(over > Lanes{} ? m.vw / over : from.step * from.a, m, step, offset_step);
  }

  // `other` in the spans where its error is less, of those in `allowed`; whether there is one.
  bool improve(Fit& best, const Fit& other, Mask allowed) const {
    const Mask wins = (sum_of_span(other.sums.error, s.span) < sum_of_span(best.sums.error, s.span)) & allowed;
    best = where(wins, other, best);
    return any(wins);
  }

  void search(Fit& best, float side, Mask allowed) const {
    const Free free = explored(best, side);
    Lanes steps[kTried];
    const bool has_parents = s.scale.parents != nullptr;
    if (has_parents) scale_parents(free, steps);
    Fit found = best;
    for (std::size_t i = 0; i < (has_parents ? s.tried : 1); ++i) {
      const Lanes step = has_parents ? steps[i] : lanes(1.0f);
      Lanes offset_step = lanes(1.0f);
      if (kOffset && s.offset.parents != nullptr) {
        const Lanes scale = step * scale_code(free.scale, lanes(1.0f) / step);
        offset_step = offset_parent(offset_of(scale, free.sums), side);
      }
      const Fit next = moved(placed(free.scale, free.sums, step, offset_step));
      if (i == 0) found = next;
      improve(found, next, next.a == next.a);
    }
    if (s.is_thorough && has_parents) found = again(found);
    for (int round = 0; round < kRounds; ++round) {
      if (!improve(found, moved(refitted(found)), found.a == found.a)) break;
    }
    improve(best, found, allowed);
  }
};

template <bool kTable, bool kWeighted, bool kOffset>
bool search_tiles(const SearchNested& s) {
  Mask is_constant = {};
  for (std::size_t first = 0; first < s.groups; first += kGroups) {
    const Tile tile = tile_of<kWeighted, kOffset>(s, first);
    const NestedSearch<kTable, kWeighted, kOffset> search(s, tile);
    is_constant |= tile.least == tile.most;
    Fit best = search.ranged();
    const bool is_signed = !kOffset || s.offset.smallest < 0.0f;
    search.search(best, is_signed ? 0.0f : 1.0f, best.a == best.a);
    if (!is_signed && s.offset.parents != nullptr) {
      // Where weights of a group lie above zero, offsets below it may serve.
      const Lanes above = max_of_span(tile.least, s.span);
      if (any(above > Lanes{})) search.search(best, -1.0f, above > Lanes{});
    }
    write(s.scale, s, first, best.a, best.step);
    if constexpr (kOffset) write(s.offset, s, first, best.b, best.offset_step);
  }
  return any(is_constant);
}

template <bool kTable>
bool search_nested_with(const SearchNested& s) {
  if (s.offset.values == nullptr) {
    return s.importance == nullptr ? search_tiles<kTable, false, false>(s) : search_tiles<kTable, true, false>(s);
  }
  return s.importance == nullptr ? search_tiles<kTable, false, true>(s) : search_tiles<kTable, true, true>(s);
}

bool search_nested(const SearchNested& s) {
  if (s.size == 0) return false;
  return s.element.values == nullptr ? search_nested_with<false>(s) : search_nested_with<true>(s);
}

}  // namespace
}  // namespace pennyweight
