// A decoder of text over packed weights: blocks of attention and a gated feed-forward part, all between two tokens
// without a way back to Python.
#pragma once

#include <cstdint>
#include <vector>

#include "packed_call.h"

namespace pennyweight {

// Weights of one linear map: packed, or as they are. Everything is the caller's memory.
struct Linear {
  const PackedWeights* packed = nullptr;
  const void* dense = nullptr;  // [rows, cols], float32 or bfloat16
  FloatKind kind = FloatKind::kFloat32;
  std::size_t rows = 0, cols = 0;
  const float* bias = nullptr;  // [rows], or null
};

// x += attention(norm(x)); x += feed_forward(norm(x)).
struct DecoderBlock {
  const float* attention_norm;  // [hidden]
  const float* query_norm;      // [width] of each head before it is turned, or null
  const float* key_norm;
  const float* feed_norm;
  Linear query, key, value, out;
  Linear gate, up, down;
  std::size_t window;  // positions that a token sees, itself counted; 0: all
};

struct DecoderShape {
  std::size_t hidden, heads, key_heads, width;  // width: of a head
  std::size_t rotated;                          // numbers of a head that are turned by position
  float epsilon;                                // of all norms
  float scale;                                  // of attention
  Activation activation;
  bool is_exact;         // of products, see multiply_packed
  FloatKind cache_kind;  // of keys and values: float32 or bfloat16
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, std::vector<DecoderBlock> blocks, const float* final_norm, Linear head,
          const PackedKernels& kernels);

  // Room for keys and values of so many positions, those that are known among them. `cosines` and `sines`
  // [positions, rotated].
  void reserve(std::size_t positions, const float* cosines, const float* sines);

  // Embeddings x [tokens, hidden], changed, of the next tokens -> logits [rows of the head] after the last of them;
  // null where nobody asks. Throws std::invalid_argument where there is no room for them.
  void run(float* x, std::size_t tokens, float* logits, std::size_t threads);

  // Tokens that went through it.
  std::size_t length() const { return length_; }

  // Keys, turned, and values of a block, both [key heads, length, width].
  void copy(std::size_t block, float* keys, float* values) const;

 private:
  void run_block(const DecoderBlock& block, std::size_t index, float* x, std::size_t tokens, std::size_t threads);
  void multiply(const float* x, std::size_t tokens, const std::vector<std::pair<const Linear*, float*>>& products,
                std::size_t threads);
  std::size_t number_bytes() const { return bytes_of(shape_.cache_kind); }
  // Keys or values of a head.
  std::uint8_t* cache(std::vector<std::uint8_t>& all, std::size_t block, std::size_t head);
  void keep(std::size_t block, std::size_t head, std::size_t position, const float* key, const float* value);

  DecoderShape shape_;
  std::vector<DecoderBlock> blocks_;
  const float* final_norm_;
  Linear head_;
  const PackedKernels& kernels_;
  std::size_t length_ = 0;
  std::size_t limit_ = 0;      // positions that were asked for
  std::size_t positions_ = 0;  // that there is room for
  const float* cosines_ = nullptr;
  const float* sines_ = nullptr;
  // [blocks, key heads, width, positions] and [blocks, key heads, positions, width]
  std::vector<std::uint8_t> keys_, values_;
  std::vector<float> normed_, query_, key_, value_, mixed_, gate_, up_, scores_;
};

}  // namespace pennyweight
