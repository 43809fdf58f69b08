// The step of tensors whose first moments have eight or four bits, as optimizer/step/moments.py specifies them. Tensors
// are dense, rows have task.layout.row elements, and kBlock elements share a scale.
//
// For the elements of one scale, the new moment before it is quantised is stored in a buffer. The parameter is updated
// from these values, and then they are quantised.
//
// In this file a block is the elements of one scale; blocks of second moments are called runs, as elsewhere.

#pragma once

#include <limits>
#include <type_traits>

#include "dense.h"

namespace adam_mini {

// How many elements ahead parameters are prefetched, and gradients that are not in cache.
constexpr int64_t kAhead = 512;

// The int8 format: how codes are stored and how scales are rounded.
struct Int8 {
  using Scale = float;
  static constexpr int64_t kBlock = ADAM_MINI_INT8_BLOCK, kLevels = ADAM_MINI_INT8_LEVELS;  // from moments.FORMATS
  static float scale(float exact) { return exact; }
  static int64_t row_bytes(int64_t n) { return n; }
  static int64_t offset(int64_t within_row) { return within_row; }
  static void unpack(const uint8_t* from, int8_t* codes, int64_t n) { std::memcpy(codes, from, n); }
  static void pack(const int8_t* codes, uint8_t* to, int64_t n) { std::memcpy(to, codes, n); }
};

// The int4 format: two codes per byte, and scales in bf16.
struct Int4 {
  using Scale = bfloat16;
  static constexpr int64_t kBlock = ADAM_MINI_INT4_BLOCK, kLevels = ADAM_MINI_INT4_LEVELS;
  static float scale(float exact) {  // rounded up, so that no element exceeds the value of the largest code
    const bfloat16 up{static_cast<uint16_t>((bits_of(exact) + 0xffffu) >> 16)};
    return load(&up);
  }
  static int64_t row_bytes(int64_t n) { return (n + 1) / 2; }
  static int64_t offset(int64_t within_row) { return within_row / 2; }
  static void unpack(const uint8_t* from, int8_t* codes, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      codes[2 * i] = static_cast<int8_t>(static_cast<int8_t>(from[i] << 4) >> 4);
      codes[2 * i + 1] = static_cast<int8_t>(static_cast<int8_t>(from[i]) >> 4);
    }
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

// Returns the scale of n moments; NaN if one of them is not finite, 0 if all of them are tiny.
template <typename T, typename Q>
inline __attribute__((always_inline)) float scale_of(const T* m, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude(m[i]));
  T absmax;
  std::memcpy(&absmax, &largest, sizeof absmax);
  if (!(largest < magnitude(std::numeric_limits<T>::infinity()))) return std::numeric_limits<float>::quiet_NaN();
  if (absmax < T(0x1p-100)) return 0;
  return Q::scale(static_cast<float>(absmax / T(Q::kLevels * Q::kLevels)));
}

// Quantises n moments with stochastic rounding: a code is rounded up with the probability that makes the mean of its
// value exact. base: the block's random number.
template <typename T, typename Q>
inline __attribute__((always_inline)) void quantise(const T* m, int8_t* codes, float scale, int64_t n, uint32_t base) {
  if (!(scale > 0)) return std::fill(codes, codes + n, int8_t(0)), void();
  const T inverse = T(1) / T(scale);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x = std::abs(m[i]) * inverse, low = std::floor(std::sqrt(x));
    const uint32_t bits = (base + static_cast<uint32_t>(i) * 0x9e3779b9u) >> 8;
    const T uniform = T(static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-24f);
    const T code = std::min(T(Q::kLevels), low + (uniform * (low * T(2) + T(1)) < x - low * low ? T(1) : T(0)));
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(std::copysign(code, m[i])));
  }
}

// Steps the n elements of one scale, which begin at element `at` of the tensor. factor(i) returns the factor of the
// block's element i.
template <typename T, typename P, typename Q, int R, typename F>
inline __attribute__((always_inline)) void low_bit_block(const Tensors<T, P, uint8_t, R>& x, int8_t* codes,
                                                         typename Q::Scale* scale, int64_t at, int64_t n,
                                                         const Step<T>& s, uint32_t random, const F& factor) {
  alignas(64) T m[Q::kBlock];
  const T before = load(scale);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T c = codes[i];
    m[i] = s.beta1 * (c * std::abs(c) * before) + s.rest1 * (s.unscale * load(x.g + at + i));
    x.to.put(at + i, at + i, at + i, s, factor(i) * m[i]);
  }
  const float after = scale_of<T, Q>(m, n);
  store(scale, after);
  quantise<T, Q>(m, codes, after, n, random);
}

constexpr int64_t kSpan = 8;  // number of blocks that are unpacked together

// Steps blocks [from, to) of the tensor. factor_at(element, n) returns a function of i: the factor of element i among
// the n elements from `element` on. ahead: how many elements ahead the gradient is prefetched, which is the distance to
// the next gradient that is not in cache. The processor's own prefetching does not look that far ahead, because the
// rounding takes long.
template <typename T, typename P, typename Q, int R, typename F>
void low_bit_blocks(const Task& task, int64_t from, int64_t to, int64_t ahead, const F& factor_at) {
  const Tensors<T, P, uint8_t, R> x(task);
  const Step<T>& s = task.of<T>();
  auto* scales = reinterpret_cast<typename Q::Scale*>(task.record->scale);
  const uint32_t start = s.count * 0x85ebca6bu + static_cast<uint32_t>(task.record->seed);
  const int64_t n = task.layout.row, per_row = (n + Q::kBlock - 1) / Q::kBlock;
  alignas(64) int8_t codes[kSpan * Q::kBlock + 2];
  for (int64_t b = from; b < to;) {
    const int64_t row = b / per_row, k = b % per_row, blocks = std::min({kSpan, to - b, per_row - k});
    const int64_t first = k * Q::kBlock, length = std::min(blocks * Q::kBlock, n - first);
    uint8_t* stored = x.m + row * Q::row_bytes(n) + Q::offset(first);
    Q::unpack(stored, codes, length);
    for (int64_t done = 0; done < length; done += Q::kBlock, ++b) {
      const int64_t count = std::min(Q::kBlock, length - done), at = row * n + first + done;
      for (int64_t i = 0; i < Q::kBlock; i += 64 / static_cast<int64_t>(sizeof(P))) {
        __builtin_prefetch(x.g + at + ahead + i);
        __builtin_prefetch(x.to.p + at + kAhead + i, 1);
      }
      const uint32_t random = random_bits(static_cast<uint32_t>(b), start);
      const auto factor = factor_at(at, count);
      if (count == Q::kBlock)  // with a constant length the compiler makes a faster loop
        low_bit_block<T, P, Q, R>(x, codes + done, scales + b, at, Q::kBlock, s, random, factor);
      else
        low_bit_block<T, P, Q, R>(x, codes + done, scales + b, at, count, s, random, factor);
    }
    Q::pack(codes, stored, length);
  }
}

// The factor of every element of a block, if it is the same for all.
template <typename T>
struct SharedFactor {
  T value;
  T operator()(int64_t) const { return value; }
};

// The factor of every element of a block, if each has its own.
template <typename T>
struct ElementFactors {
  const T* values;
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
      low_bit_blocks_of<T, P, Q, R>(task, b, std::min(to, b + share), kAhead, factor);
  });
}

// Updates the second moments of one window of the axis, at one outer index. If a row crosses indices of the axis, the
// step updates all second moments of the tensor before it updates any parameter.
template <typename T, typename P>
void second_moments(const Task& task, int64_t k) {
  const P* g = reinterpret_cast<const P*>(task.grad);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t o = k / task.windows(), from = k % task.windows() * task.window;
  const int64_t to = std::min(l.axis, from + task.window), width = l.axis * l.inner;
  T* v = reinterpret_cast<T*>(task.record->second) + o * l.axis;
  if (l.inner == 1 && l.ones()) {
    const std::vector<T> sums = column_sums<T>(g + o * l.between * width + from, l.between, width, to - from);
    for (int64_t i = from; i < to; ++i) v[i] = s.advance(v[i], sums[i - from] / static_cast<double>(l.between));
    return;
  }
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    spread(v, first, length, run_mean<T>(g, l, o, first, length), s);
  });
}

// Steps a tensor in which rows cross indices of the axis: second moments first, then blocks in any order.
template <typename T, typename P, typename Q, int R>
void low_bit_any(const Task& task, int threads) {
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const T* v = reinterpret_cast<const T*>(task.record->second);
  const int64_t windows = l.outer * task.windows();
#pragma omp parallel for num_threads(threads) if (l.numel() > kChunk) schedule(static)
  for (int64_t k = 0; k < windows; ++k) second_moments<T, P>(task, k);
  const int64_t blocks = l.numel() / l.row * ((l.row + Q::kBlock - 1) / Q::kBlock), share = kChunk / Q::kBlock;
#pragma omp parallel for num_threads(threads) if (l.numel() > kChunk) schedule(static)
  for (int64_t b = 0; b < blocks; b += share) {
    T factors[Q::kBlock];
    low_bit_blocks<T, P, Q, R>(task, b, std::min(blocks, b + share), kAhead, [&](int64_t at, int64_t n) {
      // index: row-major index over the axis and all axes in front of it. left: elements until the next index.
      int64_t index = at / l.inner, left = l.inner - at % l.inner;
      int64_t o = index / (l.axis * l.between), a = index % l.axis, between = index / l.axis % l.between;
      for (int64_t i = 0; i < n; ++i) {
        factors[i] = v[o * l.axis + a];
        if (--left) continue;
        left = l.inner;
        if (++a < l.axis) continue;
        a = 0;
        if (++between == l.between) between = 0, ++o;
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) factors[i] = s.factor(factors[i]);
      return ElementFactors<T>{factors};
    });
  }
}

}  // namespace adam_mini
