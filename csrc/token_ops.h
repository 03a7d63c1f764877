// What a transformer does beside its products, for one token or one head at a time; compiled once for each instruction
// set. All numbers are float32.
#pragma once

#include "lanes.h"
#include "packed_round.h"
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

// Numbers in the type of a cache.
inline Lanes cached(const float* p) { return lanes_at(p); }
inline Lanes cached(const std::uint16_t* p) {
  typedef std::uint16_t Halves __attribute__((vector_size(2 * kGroups)));
  Halves bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Lanes)(__builtin_convertvector(bits, Mask) << 16);
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

template <typename Stored>
void attend_cached(const Attention& a) {
  const Stored* keys = static_cast<const Stored*>(a.keys);
  const Stored* values = static_cast<const Stored*>(a.values);
  const std::size_t count = a.end - a.begin;
  for (std::size_t head = 0; head < a.heads; ++head) {
    const float* query = a.queries + head * a.width;
    float* out = a.out + head * a.width;
    float most = -3.0e38f;
    for (std::size_t i = 0; i < count; ++i) {
      const Stored* key = keys + (a.begin + i) * a.width;
      Lanes sums = {};
      for (std::size_t k = 0; k < a.width; k += kGroups) sums += lanes_at(query + k) * cached(key + k);
      a.scores[i] = sum_of(sums) * a.scale;
      most = max_of(most, a.scores[i]);
    }
    for (std::size_t i = count; i % kGroups != 0; ++i) a.scores[i] = -3.0e38f;
    Lanes total = {};
    for (std::size_t i = 0; i < count; i += kGroups) {
      const Lanes share = exp_of(lanes_at(a.scores + i) - lanes(most));
      store_lanes(a.scores + i, share);
      if (i + kGroups <= count) total += share;
    }
    float sum = sum_of(total);
    for (std::size_t i = count / kGroups * kGroups; i < count; ++i) sum += a.scores[i];
    for (std::size_t k = 0; k < a.width; k += kGroups) {
      Lanes mixed = {};
      const Stored* value = values + a.begin * a.width + k;
      for (std::size_t i = 0; i < count; ++i, value += a.width) mixed += lanes(a.scores[i]) * cached(value);
      store_lanes(out + k, mixed * lanes(1.0f / sum));
    }
  }
}

void attend(const Attention& a) {
  a.kind == FloatKind::kFloat32 ? attend_cached<float>(a) : attend_cached<std::uint16_t>(a);
}

// Up to kDenseTokens rows of x [tokens, cols] times rows [begin, end) of a weight in float32 or bfloat16.
template <typename Stored>
void dense_rows(const DenseProduct& p) {
  const Stored* weights = static_cast<const Stored*>(p.weights);
  for (std::size_t row = p.begin; row < p.end; ++row) {
    const Stored* w = weights + row * p.cols;
    Lanes sums[kDenseTokens] = {};
    std::size_t k = 0;
    for (; k + kGroups <= p.cols; k += kGroups) {
      const Lanes weight = cached(w + k);
      for (std::size_t t = 0; t < p.tokens; ++t) sums[t] += weight * lanes_at(p.x + t * p.cols + k);
    }
    for (std::size_t t = 0; t < p.tokens; ++t) {
      float sum = sum_of(sums[t]);
      for (std::size_t i = k; i < p.cols; ++i) sum += number(w[i]) * p.x[t * p.cols + i];
      p.out[t * p.rows + row] = p.bias == nullptr ? sum : sum + p.bias[row];
    }
  }
}

void multiply_dense(const DenseProduct& p) {
  p.kind == FloatKind::kFloat32 ? dense_rows<float>(p) : dense_rows<std::uint16_t>(p);
}

}  // namespace
}  // namespace pennyweight
