#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace pennyweight {
namespace {

// Below so many tokens waking a thread takes longer than what it would do.
constexpr std::size_t kTokensOfATask = 4;
constexpr std::size_t kRowsOfATask = 256;

// work(thread, index) for all indices, as in_parallel has it.
template <typename Work>
void for_each(std::size_t threads, std::size_t count, const Work& work) {
  const auto call = [](void* context, std::size_t thread, std::size_t index) {
    (*static_cast<const Work*>(context))(thread, index);
  };
  in_parallel(threads, count, call, const_cast<void*>(static_cast<const void*>(&work)));
}

// work(token) for all tokens, some at a time.
template <typename Work>
void for_each_token(std::size_t threads, std::size_t tokens, const Work& work) {
  for_each(threads, (tokens + kTokensOfATask - 1) / kTokensOfATask, [&](std::size_t, std::size_t index) {
    const std::size_t end = std::min(tokens, (index + 1) * kTokensOfATask);
    for (std::size_t token = index * kTokensOfATask; token < end; ++token) work(token);
  });
}

std::uint16_t to_cache(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

Decoder::Decoder(const DecoderShape& shape, std::vector<DecoderBlock> blocks, const float* final_norm, Linear head,
                 const PackedKernels& kernels)
    : shape_(shape), blocks_(std::move(blocks)), final_norm_(final_norm), head_(head), kernels_(kernels) {
  const std::size_t queries = shape.heads * shape.width, keys = shape.key_heads * shape.width;
  if (shape.width % 16 != 0 || shape.key_heads == 0 || shape.heads % shape.key_heads != 0 || shape.rotated % 2 != 0 ||
      shape.rotated > shape.width || shape.cache_kind == FloatKind::kFloat16) {
    throw std::invalid_argument("decoder: heads of this shape are not run");
  }
  const auto check = [](const Linear& linear, std::size_t rows, std::size_t cols, const char* name) {
    if (linear.rows != rows || linear.cols != cols || (linear.packed == nullptr) == (linear.dense == nullptr)) {
      throw std::invalid_argument(std::string("decoder: ") + name + " has another shape");
    }
  };
  for (const DecoderBlock& block : blocks_) {
    check(block.query, queries, shape.hidden, "query");
    check(block.key, keys, shape.hidden, "key");
    check(block.value, keys, shape.hidden, "value");
    check(block.out, shape.hidden, queries, "out");
    check(block.gate, block.gate.rows, shape.hidden, "gate");
    check(block.up, block.gate.rows, shape.hidden, "up");
    check(block.down, shape.hidden, block.gate.rows, "down");
  }
  check(head_, head_.rows, shape.hidden, "head");
}

std::uint8_t* Decoder::cache(std::vector<std::uint8_t>& all, std::size_t block, std::size_t head) {
  return all.data() + (block * shape_.key_heads + head) * positions_ * shape_.width * number_bytes();
}

void Decoder::reserve(std::size_t positions, const float* cosines, const float* sines) {
  if (positions < length_) throw std::invalid_argument("decoder: there are more tokens than that");
  cosines_ = cosines;
  sines_ = sines;
  limit_ = positions;
  const std::size_t before = positions_, bytes = number_bytes(), heads = blocks_.size() * shape_.key_heads;
  const std::size_t after = (positions + kPositionsAtOnce - 1) / kPositionsAtOnce * kPositionsAtOnce;
  if (after <= before) return;
  // Moves `rows` of `used` bytes each.
  const auto grown = [&](const std::vector<std::uint8_t>& all, std::size_t rows, std::size_t used) {
    std::vector<std::uint8_t> room(heads * after * shape_.width * bytes, 0);
    const std::size_t to = room.size() / std::max<std::size_t>(1, rows),
                      from = all.size() / std::max<std::size_t>(1, rows);
    for (std::size_t row = 0; used != 0 && row < rows; ++row) {
      std::memcpy(room.data() + row * to, all.data() + row * from, used);
    }
    return room;
  };
  keys_ = grown(keys_, heads * shape_.width, length_ * bytes);
  values_ = grown(values_, heads, length_ * shape_.width * bytes);
  positions_ = after;
}

void Decoder::copy(std::size_t block, float* keys, float* values) const {
  if (block >= blocks_.size()) throw std::invalid_argument("decoder: there is no such block");
  const auto number = [&](const std::vector<std::uint8_t>& all, std::size_t at) {
    float x = 0;
    if (shape_.cache_kind == FloatKind::kFloat32) {
      std::memcpy(&x, all.data() + 4 * at, 4);
    } else {
      std::memcpy(reinterpret_cast<std::uint8_t*>(&x) + 2, all.data() + 2 * at, 2);
    }
    return x;
  };
  for (std::size_t head = 0; head < shape_.key_heads; ++head) {
    const std::size_t first = (block * shape_.key_heads + head) * shape_.width * positions_;
    for (std::size_t position = 0; position < length_; ++position) {
      for (std::size_t k = 0; k < shape_.width; ++k) {
        *keys++ = number(keys_, first + k * positions_ + position);
        *values++ = number(values_, first + position * shape_.width + k);
      }
    }
  }
}

void Decoder::keep(std::size_t block, std::size_t head, std::size_t position, const float* key, const float* value) {
  const std::size_t width = shape_.width;
  if (shape_.cache_kind == FloatKind::kFloat32) {
    float* keys = reinterpret_cast<float*>(cache(keys_, block, head)) + position;
    for (std::size_t k = 0; k < width; ++k) keys[k * positions_] = key[k];
    std::memcpy(reinterpret_cast<float*>(cache(values_, block, head)) + position * width, value, width * sizeof(float));
  } else {
    std::uint16_t* keys = reinterpret_cast<std::uint16_t*>(cache(keys_, block, head)) + position;
    std::uint16_t* values = reinterpret_cast<std::uint16_t*>(cache(values_, block, head)) + position * width;
    for (std::size_t k = 0; k < width; ++k) keys[k * positions_] = to_cache(key[k]);
    for (std::size_t k = 0; k < width; ++k) values[k] = to_cache(value[k]);
  }
}

void Decoder::multiply(const float* x, std::size_t tokens,
                       const std::vector<std::pair<const Linear*, float*>>& products, std::size_t threads) {
  std::vector<Product> packed;
  for (const auto& [linear, out] : products) {
    if (linear->packed != nullptr) packed.push_back({linear->packed, linear->bias, out});
  }
  if (!packed.empty()) {
    multiply_packed(x, FloatKind::kFloat32, tokens, packed[0].weights->cols, shape_.is_exact, packed, threads,
                    kernels_);
  }
  for (const auto& [linear, out] : products) {
    if (linear->packed != nullptr) continue;
    for (std::size_t first = 0; first < tokens; first += kDenseTokens) {
      const DenseProduct all{linear->dense,
                             linear->kind,
                             linear->rows,
                             linear->cols,
                             linear->bias,
                             x + first * linear->cols,
                             std::min(kDenseTokens, tokens - first),
                             0,
                             0,
                             out + first * linear->rows};
      for_each(threads, (linear->rows + kRowsOfATask - 1) / kRowsOfATask, [&](std::size_t, std::size_t index) {
        DenseProduct some = all;
        some.begin = index * kRowsOfATask;
        some.end = std::min(some.begin + kRowsOfATask, some.rows);
        kernels_.multiply_dense(some);
      });
    }
  }
}

void Decoder::run_block(const DecoderBlock& block, std::size_t index, float* x, std::size_t tokens,
                        std::size_t threads) {
  const DecoderShape& s = shape_;
  const std::size_t queries = s.heads * s.width, keys = s.key_heads * s.width, inner = block.gate.rows;
  const std::size_t shared = s.heads / s.key_heads;
  for_each_token(threads, tokens, [&](std::size_t t) {
    kernels_.normalize(x + t * s.hidden, block.attention_norm, s.hidden, s.epsilon, normed_.data() + t * s.hidden);
  });
  multiply(normed_.data(), tokens,
           {{&block.query, query_.data()}, {&block.key, key_.data()}, {&block.value, value_.data()}}, threads);

  for_each_token(threads, tokens, [&](std::size_t t) {
    const std::size_t position = length_ + t;
    const auto turn = [&](float* head, const float* norm) {
      if (norm != nullptr) kernels_.normalize(head, norm, s.width, s.epsilon, head);
      kernels_.rotate(head, cosines_ + position * s.rotated, sines_ + position * s.rotated, s.rotated);
    };
    for (std::size_t head = 0; head < s.heads; ++head) {
      turn(query_.data() + t * queries + head * s.width, block.query_norm);
    }
    for (std::size_t head = 0; head < s.key_heads; ++head) {
      float* key = key_.data() + t * keys + head * s.width;
      const float* value = value_.data() + t * keys + head * s.width;
      turn(key, block.key_norm);
      keep(index, head, position, key, value);
    }
  });

  for_each(threads, tokens * s.key_heads, [&](std::size_t thread, std::size_t task) {
    const std::size_t t = task / s.key_heads, head = task % s.key_heads;
    const std::size_t end = length_ + t + 1;
    const std::size_t begin = block.window != 0 && end > block.window ? end - block.window : 0;
    const std::size_t at = t * queries + head * shared * s.width;
    const Attention attention{query_.data() + at,
                              cache(keys_, index, head),
                              cache(values_, index, head),
                              s.cache_kind,
                              shared,
                              s.width,
                              positions_,
                              begin,
                              end,
                              s.scale,
                              scores_.data() + thread * kHeadsAtOnce * positions_,
                              mixed_.data() + at};
    kernels_.attend(attention);
  });
  multiply(mixed_.data(), tokens, {{&block.out, normed_.data()}}, threads);
  for_each_token(threads, tokens, [&](std::size_t t) {
    float* row = x + t * s.hidden;
    float* normed = normed_.data() + t * s.hidden;
    for (std::size_t k = 0; k < s.hidden; ++k) row[k] += normed[k];
    kernels_.normalize(row, block.feed_norm, s.hidden, s.epsilon, normed);
  });
  multiply(normed_.data(), tokens, {{&block.gate, gate_.data()}, {&block.up, up_.data()}}, threads);
  for_each_token(threads, tokens, [&](std::size_t t) {
    kernels_.gate_by(s.activation, gate_.data() + t * inner, up_.data() + t * inner, inner);
  });
  multiply(gate_.data(), tokens, {{&block.down, normed_.data()}}, threads);
  for_each_token(threads, tokens, [&](std::size_t t) {
    for (std::size_t k = 0; k < s.hidden; ++k) x[t * s.hidden + k] += normed_[t * s.hidden + k];
  });
}

void Decoder::run(float* x, std::size_t tokens, float* logits, std::size_t threads) {
  if (tokens == 0 || length_ + tokens > limit_) {
    throw std::invalid_argument("decoder: there is no room for " + std::to_string(tokens) + " tokens after " +
                                std::to_string(length_));
  }
  threads = std::max<std::size_t>(1, threads);
  std::size_t inner = 0;
  for (const DecoderBlock& block : blocks_) inner = std::max(inner, block.gate.rows);
  const auto grow = [](std::vector<float>& room, std::size_t count) {
    if (room.size() < count) room.resize(count);
  };
  grow(normed_, tokens * shape_.hidden);
  grow(query_, tokens * shape_.heads * shape_.width);
  grow(mixed_, tokens * shape_.heads * shape_.width);
  grow(key_, tokens * shape_.key_heads * shape_.width);
  grow(value_, tokens * shape_.key_heads * shape_.width);
  grow(gate_, tokens * inner);
  grow(up_, tokens * inner);
  grow(scores_, threads * kHeadsAtOnce * positions_);
  for (std::size_t index = 0; index < blocks_.size(); ++index) run_block(blocks_[index], index, x, tokens, threads);
  length_ += tokens;
  if (logits == nullptr) return;
  kernels_.normalize(x + (tokens - 1) * shape_.hidden, final_norm_, shape_.hidden, shape_.epsilon, normed_.data());
  multiply(normed_.data(), 1, {{&head_, logits}}, threads);
}

}  // namespace pennyweight
