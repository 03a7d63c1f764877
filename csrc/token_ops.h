// What a transformer does beside its products, for one token or one head at a time; compiled once for each instruction
// set. All numbers are float32.
#pragma once

#include "lanes.h"
#include "packed_multiply.h"
#include "ranges.h"

namespace pennyweight {
namespace {

inline void store_lanes(float* p, Lanes x) { __builtin_memcpy(p, &x, sizeof x); }

inline float sum_of(Lanes x) { return sum_of_span(x, kGroups)[0]; }

// exp, to two units in the last place, by 2^n times a polynomial (Cephes' expf).
inline Lanes exp_of(Lanes x) {
  x = bounded(x, -87.0f, 88.0f);
  const Lanes moved = x * lanes(1.44269504f) + lanes(kMagic);
  const Lanes n = moved - lanes(kMagic);
  const Lanes r = (x - n * lanes(0.693359375f)) - n * lanes(-2.12194440e-4f);
  Lanes p = lanes(1.9875691500e-4f);
  p = p * r + lanes(1.3981999507e-3f);
  p = p * r + lanes(8.3334519073e-3f);
  p = p * r + lanes(4.1665795894e-2f);
  p = p * r + lanes(1.6666665459e-1f);
  p = p * r + lanes(5.0000001201e-1f);
  p = p * r * r + r + lanes(1.0f);
  const Mask power = ((Mask)moved - static_cast<std::int32_t>(bits_of(kMagic)) + 127) << 23;
  return p * (Lanes)power;
}

// kRows numbers, float32 or bfloat16.
template <class L, typename Stored>
PENNYWEIGHT_INLINE typename L::Floats stored_floats(const Stored* p) {
  constexpr FloatKind kKind = sizeof(Stored) == 4 ? FloatKind::kFloat32 : FloatKind::kBFloat16;
  return L::load_floats(reinterpret_cast<const std::uint8_t*>(p), kKind);
}

// x / sqrt(mean of x^2 + epsilon) * weight.
void normalize(const float* x, const float* weight, std::size_t count, float epsilon, float* out) {
  Lanes sums = {};
  std::size_t k = 0;
  for (; k + kGroups <= count; k += kGroups) sums += lanes_at(x + k) * lanes_at(x + k);
  float sum = sum_of(sums);
  for (std::size_t i = k; i < count; ++i) sum += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(count) + epsilon);
  for (k = 0; k + kGroups <= count; k += kGroups)
    store_lanes(out + k, lanes_at(x + k) * lanes(inverse) * lanes_at(weight + k));
  for (; k < count; ++k) out[k] = x[k] * inverse * weight[k];
}

// Pairs (k, k + count / 2) turned by the angles of the cosines and sines [count].
void rotate(float* x, const float* cosines, const float* sines, std::size_t count) {
  const std::size_t half = count / 2;
  for (std::size_t k = 0; k < half; ++k) {
    const float low = x[k], high = x[k + half];
    x[k] = low * cosines[k] - high * sines[k];
    x[k + half] = high * cosines[k + half] + low * sines[k + half];
  }
}

// activation(gate) * up, in `gate`.
void gate_by(Activation kind, float* gate, const float* up, std::size_t count) {
  for (std::size_t k = 0; k < count; k += kGroups) {
    float x[kGroups] = {}, y[kGroups] = {};
    const std::size_t here = count - k < kGroups ? count - k : kGroups;
    for (std::size_t l = 0; l < here; ++l) x[l] = gate[k + l];
    for (std::size_t l = 0; l < here; ++l) y[l] = up[k + l];
    const Lanes g = lanes_at(x);
    // gelu(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), by the identity of tanh.
    const Lanes inner = kind == Activation::kSilu ? g : lanes(1.5957691216f) * (g + lanes(0.044715f) * g * g * g);
    store_lanes(x, g / (lanes(1.0f) + exp_of(-inner)) * lanes_at(y));
    for (std::size_t l = 0; l < here; ++l) gate[k + l] = x[l];
  }
}

// Scores of kHeads heads and all positions from `begin` on, which is a multiple of kPositionsAtOnce.
template <class L, int kHeads, typename Stored>
PENNYWEIGHT_INLINE void score_heads(const Attention& a, const float* queries, std::size_t begin) {
  const Stored* keys = static_cast<const Stored*>(a.keys);
  for (std::size_t i = begin; i < a.end; i += static_cast<std::size_t>(L::kRows)) {
    typename L::Floats sums[kHeads];
    for (int h = 0; h < kHeads; ++h) sums[h] = L::floats(0.0f);
    for (std::size_t k = 0; k < a.width; ++k) {
      const typename L::Floats key = stored_floats<L>(keys + k * a.stride + i);
      PENNYWEIGHT_UNROLL for (int h = 0; h < kHeads; ++h) {
        sums[h] = L::add_product(sums[h], L::floats(queries[static_cast<std::size_t>(h) * a.width + k]), key);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      float* scores = a.scores + static_cast<std::size_t>(h) * a.stride + i;
      L::store_floats(scores, L::product(sums[h], L::floats(a.scale)));
    }
  }
}

// exp(score - the largest) for the positions that are looked at, 0 beside them; returns their sum.
inline float share_out(const Attention& a, float* scores, std::size_t begin) {
  const std::size_t stop = (a.end + kGroups - 1) / kGroups * kGroups;
  for (std::size_t i = begin; i < a.begin; ++i) scores[i] = -3.0e38f;
  for (std::size_t i = a.end; i < stop; ++i) scores[i] = -3.0e38f;
  Lanes most = lanes(-3.0e38f);
  for (std::size_t i = begin; i < stop; i += kGroups) most = max_of(most, lanes_at(scores + i));
  const Lanes largest = lanes(max_of_span(most, kGroups)[0]);
  Lanes total = {};
  for (std::size_t i = begin; i < stop; i += kGroups) {
    const Lanes share = exp_of(lanes_at(scores + i) - largest);
    store_lanes(scores + i, share);
    total += share;
  }
  float sum = sum_of(total);
  // exp of the least score there is is not quite 0.
  for (std::size_t i = begin; i < a.begin; ++i) sum -= scores[i], scores[i] = 0.0f;
  for (std::size_t i = a.end; i < stop; ++i) sum -= scores[i], scores[i] = 0.0f;
  return sum;
}

// The values of all positions by the shares of kHeads heads.
template <class L, int kHeads, typename Stored>
PENNYWEIGHT_INLINE void mix_heads(const Attention& a, const float* sums, float* out) {
  constexpr int kVectors = 16 / L::kRows < 4 ? 4 : 16 / L::kRows;
  constexpr std::size_t kRows = static_cast<std::size_t>(L::kRows);
  const Stored* values = static_cast<const Stored*>(a.values);
  for (std::size_t k = 0; k < a.width; k += kVectors * kRows) {
    const int here = a.width - k < kVectors * kRows ? static_cast<int>((a.width - k) / kRows) : kVectors;
    typename L::Floats mixed[kHeads][kVectors];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVectors; ++v) mixed[h][v] = L::floats(0.0f);
    }
    for (std::size_t i = a.begin; i < a.end; ++i) {
      PENNYWEIGHT_UNROLL for (int v = 0; v < kVectors; ++v) {
        if (v >= here) break;
        const typename L::Floats value =
            stored_floats<L>(values + i * a.width + k + static_cast<std::size_t>(v) * kRows);
        PENNYWEIGHT_UNROLL for (int h = 0; h < kHeads; ++h) {
          mixed[h][v] =
              L::add_product(mixed[h][v], L::floats(a.scores[static_cast<std::size_t>(h) * a.stride + i]), value);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < here; ++v) {
        L::store_floats(out + static_cast<std::size_t>(h) * a.width + k + static_cast<std::size_t>(v) * kRows,
                        L::product(mixed[h][v], L::floats(1.0f / sums[h])));
      }
    }
  }
}

template <class L, int kHeads, typename Stored>
__attribute__((noinline)) void attend_heads(const Attention& a, std::size_t head) {
  const std::size_t begin = a.begin / kPositionsAtOnce * kPositionsAtOnce;
  float sums[kHeads];
  score_heads<L, kHeads, Stored>(a, a.queries + head * a.width, begin);
  for (int h = 0; h < kHeads; ++h) sums[h] = share_out(a, a.scores + static_cast<std::size_t>(h) * a.stride, begin);
  mix_heads<L, kHeads, Stored>(a, sums, a.out + head * a.width);
}

template <class L, typename Stored>
void attend_stored(const Attention& a) {
  std::size_t head = 0;
  for (; head + kHeadsAtOnce <= a.heads; head += kHeadsAtOnce) attend_heads<L, kHeadsAtOnce, Stored>(a, head);
  for (; head < a.heads; ++head) attend_heads<L, 1, Stored>(a, head);
}

template <class L>
void attend(const Attention& a) {
  a.kind == FloatKind::kFloat32 ? attend_stored<L, float>(a) : attend_stored<L, std::uint16_t>(a);
}

// Up to kDenseTokens rows of x [tokens, cols] times rows [begin, end) of a weight in float32 or bfloat16.
template <class L, typename Stored>
void dense_rows(const DenseProduct& p) {
  constexpr std::size_t kRows = static_cast<std::size_t>(L::kRows);
  const Stored* weights = static_cast<const Stored*>(p.weights);
  for (std::size_t row = p.begin; row < p.end; ++row) {
    const Stored* w = weights + row * p.cols;
    for (std::size_t t = 0; t < p.tokens; ++t) {
      const float* x = p.x + t * p.cols;
      typename L::Floats sums[4] = {L::floats(0.0f), L::floats(0.0f), L::floats(0.0f), L::floats(0.0f)};
      std::size_t k = 0;
      for (; k + 4 * kRows <= p.cols; k += 4 * kRows) {
        if (t == 0) ask_for(reinterpret_cast<const char*>(w + k) + kAhead, 4 * kRows * sizeof(Stored));
        PENNYWEIGHT_UNROLL for (std::size_t v = 0; v < 4; ++v) {
          sums[v] = L::add_product(sums[v], stored_floats<L>(w + k + v * kRows), L::load_floats(x + k + v * kRows));
        }
      }
      float parts[4 * kRows], sum = 0.0f;
      for (std::size_t v = 0; v < 4; ++v) L::store_floats(parts + v * kRows, sums[v]);
      for (std::size_t i = 0; i < 4 * kRows; ++i) sum += parts[i];
      for (; k < p.cols; ++k) sum += number(w[k]) * x[k];
      p.out[t * p.rows + row] = p.bias == nullptr ? sum : sum + p.bias[row];
    }
  }
}

template <class L>
void multiply_dense(const DenseProduct& p) {
  p.kind == FloatKind::kFloat32 ? dense_rows<L, float>(p) : dense_rows<L, std::uint16_t>(p);
}

// All kernels over packed weights, by the operations of one instruction set.
template <class L>
constexpr PackedKernels packed_kernels() {
  return {L::kLargestBlock, L::kOneOfSeveral, kNoMatrix, round_tokens, multiply_tiles<L>, read_bytes<L>,
          normalize,        rotate,           gate_by,   attend<L>,    multiply_dense<L>};
}

}  // namespace
}  // namespace pennyweight
