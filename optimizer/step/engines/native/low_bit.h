// The step of tensors whose first moments have eight or four bits, as optimizer/step/moments.py specifies them. Tensors
// are dense, rows have task.layout.row elements, and kBlock elements share a scale.
//
// In this file a block is the elements of one scale; blocks of second moments are called runs, as elsewhere.
//
// A span is several blocks, which go through every stage together: codes are unpacked, new moments are computed and the
// parameter is updated from them, scales are computed, moments are quantised, codes are packed. Moments before they are
// quantised are in a buffer. A block alone would be slow: 32 elements are two vectors, and each step from the largest
// moment to the scale, its inverse and the codes waits for the previous one. The scales of a span are one vector.

#pragma once

#include <limits>
#include <type_traits>

#include "dense.h"

namespace adam_mini {

// The int8 format: how codes are stored and how scales are rounded.
struct Int8 {
  using Scale = float;
  static constexpr int64_t kBlock = ADAM_MINI_INT8_BLOCK, kLevels = ADAM_MINI_INT8_LEVELS;  // from moments.FORMATS
  static float scale(float exact) { return exact; }
  static int64_t row_bytes(int64_t n) { return n; }
  static int64_t offset(int64_t within_row) { return within_row; }
  // Returns where the codes are and where pack expects the new ones: in their place, because they are not packed.
  static int8_t* unpack(uint8_t* from, int8_t*, int64_t) { return reinterpret_cast<int8_t*>(from); }
  static void pack(const int8_t*, uint8_t*, int64_t) {}
};

// The int4 format: two codes per byte, and scales in bf16.
struct Int4 {
  using Scale = bfloat16;
  static constexpr int64_t kBlock = ADAM_MINI_INT4_BLOCK, kLevels = ADAM_MINI_INT4_LEVELS;
  static float scale(float exact) {  // rounded up, so that no element exceeds the value of the largest code
    return float_of((bits_of(exact) + 0xffffu) & 0xffff0000u);
  }
  static int64_t row_bytes(int64_t n) { return (n + 1) / 2; }
  static int64_t offset(int64_t within_row) { return within_row / 2; }
  static int8_t* unpack(const uint8_t* from, int8_t* codes, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      codes[2 * i] = static_cast<int8_t>(static_cast<int8_t>(from[i] << 4) >> 4);
      codes[2 * i + 1] = static_cast<int8_t>(static_cast<int8_t>(from[i]) >> 4);
    }
    return codes;
  }
  static void pack(int8_t* codes, uint8_t* to, int64_t n) {
    codes[n] = 0;  // an unused nibble is 0; the buffer has room for it
#pragma omp simd
    for (int64_t i = 0; i < (n + 1) / 2; ++i)
      to[i] = static_cast<uint8_t>((codes[2 * i] & 15) | (static_cast<uint8_t>(codes[2 * i + 1]) << 4));
  }
};

// Returns the bits of |x| as an integer of the same width. They have the order of the numbers, with NaN above infinity.
inline int32_t magnitude(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffffu); }
inline int64_t magnitude(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & std::numeric_limits<int64_t>::max();
}

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Returns the bits of the largest of n magnitudes.
template <typename T>
inline __attribute__((always_inline)) Bits<T> largest_of(const T* m, int64_t n) {
  Bits<T> largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude(m[i]));
  return largest;
}

// Returns the scale of moments whose largest magnitude has these bits; NaN if it is not finite, 0 if it is tiny.
template <typename T, typename Q>
inline __attribute__((always_inline)) float scale_of(Bits<T> largest) {
  T absmax;
  std::memcpy(&absmax, &largest, sizeof absmax);
  const float scale = Q::scale(static_cast<float>(absmax / T(Q::kLevels * Q::kLevels)));
  const float finite = absmax < T(0x1p-100) ? 0.0f : scale;
  return largest < magnitude(std::numeric_limits<T>::infinity()) ? finite : std::numeric_limits<float>::quiet_NaN();
}

// Quantises n moments with stochastic rounding: a code is rounded up with the probability that makes the mean of its
// value exact. The codes replace the moments. inverse: 1 / scale. base: the block's random number.
template <typename T, typename Q>
inline __attribute__((always_inline)) void quantise(T* m, T inverse, int64_t n, uint32_t base) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x = std::abs(m[i]) * inverse, low = std::floor(std::sqrt(x));
    const uint32_t bits = (base + static_cast<uint32_t>(i) * 0x9e3779b9u) >> 8;
    const T uniform = T(static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-24f);
    const T code = std::min(T(Q::kLevels), low + (uniform * (low * T(2) + T(1)) < x - low * low ? T(1) : T(0)));
    m[i] = std::copysign(code, m[i]);
  }
}

// Computes the new moments of the n elements of one scale, which begin at element `at` of the tensor, and updates the
// parameter. m: c |c| of the codes, which the moments replace. factor(i) returns the factor of the block's element i.
template <typename T, typename P, typename Q, int R, typename F>
inline __attribute__((always_inline)) void low_bit_update(const Tensors<T, P, uint8_t, R>& x, T* m, T scale, int64_t at,
                                                          int64_t n, const Step<T>& s, const F& factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    m[i] = s.beta1 * (m[i] * scale) + s.rest1 * (s.unscale * load(x.g + at + i));
    x.to.put(at + i, at + i, at + i, s, factor(i) * m[i]);
  }
}

// Calls f(n) with the number of elements of a block, as a constant if the block is complete: the compiler makes a
// faster loop from a constant length.
template <int64_t kBlock, typename F>
inline __attribute__((always_inline)) void with_length(int64_t n, const F& f) {
  if (n == kBlock) f(std::integral_constant<int64_t, kBlock>());
  else f(n);
}

constexpr int64_t kSpan = 512;  // elements of a span

// Steps blocks [from, to) of the tensor. factor_at(element, n) returns the factors of the n elements from `element` on,
// which are at most kSpan: a SharedFactor or ElementFactors. ahead: how many elements ahead the gradient is prefetched, which is the distance to
// the next gradient that is not in cache. The processor's own prefetching does not look that far ahead, because the
// rounding takes long.
template <typename T, typename P, typename Q, int R, typename F>
void low_bit_blocks(const Task& task, int64_t from, int64_t to, int64_t ahead, const F& factor_at) {
  constexpr int64_t kBlock = Q::kBlock, kBlocks = kSpan / kBlock, kLine = 64 / static_cast<int64_t>(sizeof(P));
  const Tensors<T, P, uint8_t, R> x(task);
  const Step<T> s = task.of<T>();
  auto* scales = reinterpret_cast<typename Q::Scale*>(task.record->scale);
  const uint32_t start = s.count * 0x85ebca6bu + static_cast<uint32_t>(task.record->seed);
  const int64_t n = task.layout.row, per_row = (n + kBlock - 1) / kBlock, far = task.way->ahead;
  alignas(64) int8_t buffer[kSpan + 2];
  alignas(64) T m[kSpan], inverse[kBlocks];
  alignas(64) float scale[kBlocks];
  alignas(64) uint32_t random[kBlocks];
  alignas(64) Bits<T> largest[kBlocks] = {};  // also beyond the last block of a short span
  for (int64_t b = from; b < to;) {
    const int64_t row = b / per_row, k = b % per_row, blocks = std::min({kBlocks, to - b, per_row - k});
    const int64_t first = k * kBlock, length = std::min(blocks * kBlock, n - first), at = row * n + first;
    uint8_t* stored = x.m + row * Q::row_bytes(n) + Q::offset(first);
    int8_t* codes = Q::unpack(stored, buffer, length);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) m[i] = static_cast<int16_t>(codes[i] * std::abs(codes[i]));
    const auto factors = factor_at(at, length);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t done = j * kBlock, count = std::min(kBlock, length - done);
      for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(x.g + at + done + ahead + i);
      const T before = load(scales + b + j);
      with_length<kBlock>(count, [&](auto size) {
        low_bit_update<T, P, Q, R>(x, m + done, before, at + done, size, s, factors.from(done));
        largest[j] = largest_of(m + done, size);
      });
    }
#pragma omp simd
    for (int64_t j = 0; j < kBlocks; ++j) {
      scale[j] = scale_of<T, Q>(largest[j]);
      inverse[j] = T(1) / T(scale[j]);
      random[j] = random_bits(static_cast<uint32_t>(b + j), start);
    }
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t done = j * kBlock, count = std::min(kBlock, length - done);
      // Not with the gradient's, so that the processor reads memory at all stages.
      for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(x.to.p + at + done + far + i, 1);
      store(scales + b + j, scale[j]);
      if (!(scale[j] > 0)) std::fill_n(m + done, count, T(0));
      else with_length<kBlock>(count, [&](auto size) { quantise<T, Q>(m + done, inverse[j], size, random[j]); });
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) codes[i] = static_cast<int8_t>(static_cast<int32_t>(m[i]));
    Q::pack(codes, stored, length);
    b += blocks;
  }
}

// The factor of neighbouring elements, if it is the same for all.
template <typename T>
struct SharedFactor {
  T value;
  SharedFactor from(int64_t) const { return *this; }
  T operator()(int64_t) const { return value; }
};

// The factors of neighbouring elements, if each has its own.
template <typename T>
struct ElementFactors {
  const T* values;
  ElementFactors from(int64_t first) const { return {values + first}; }
  T operator()(int64_t i) const { return values[i]; }
};

// Steps blocks [from, to), whose elements all have the same factor.
template <typename T, typename P, typename Q, int R>
void low_bit_blocks_of(const Task& task, int64_t from, int64_t to, int64_t ahead, T factor) {
  low_bit_blocks<T, P, Q, R>(task, from, to, ahead, [=](int64_t, int64_t) { return SharedFactor<T>{factor}; });
}

// Steps one chunk of a tensor in which an index of the axis consists of whole rows, so no row belongs to two runs.
template <typename T, typename P, typename Q, int R>
void low_bit_rows_chunk(const Task& task, int64_t k) {
  const Tensors<T, P, uint8_t, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t from = k * task.window, to = std::min(l.axis, from + task.window);
  const int64_t blocks = l.inner / l.row * ((l.row + Q::kBlock - 1) / Q::kBlock);  // per index of the axis
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    const int64_t count = length * l.inner;
    if (count > kLong) return;
    const T second = spread(x.v, first, length, sum_of_squares<T>(x.g + first * l.inner, count) / count, s);
    low_bit_blocks_of<T, P, Q, R>(task, first * blocks, (first + length) * blocks, count, s.factor(second));
  });
}

// Steps the runs of a tensor that have more than kLong elements, one after another; all threads share each run.
template <typename T, typename P, typename Q, int R>
void low_bit_long_runs(const Task& task, int threads) {
  const Tensors<T, P, uint8_t, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t blocks = l.inner / l.row * ((l.row + Q::kBlock - 1) / Q::kBlock), share = kChunk / Q::kBlock;
  each_run(l, 0, l.axis, [&](int64_t first, int64_t length) {
    const int64_t at = first * l.inner, count = length * l.inner, chunks = (count + kChunk - 1) / kChunk;
    if (count <= kLong) return;
    std::vector<double> parts(chunks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; ++c)
      parts[c] = sum_of_squares<T>(x.g + at + c * kChunk, std::min(kChunk, count - c * kChunk));
    double total = 0;
    for (double part : parts) total += part;
    const T factor = s.factor(spread(x.v, first, length, total / count, s));
    const int64_t from = first * blocks, to = (first + length) * blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = from; b < to; b += share)
      low_bit_blocks_of<T, P, Q, R>(task, b, std::min(to, b + share), task.way->ahead, factor);
  });
}

}  // namespace adam_mini
