// First moments in eight or four bits, as optimizer/step/moments.py specifies them; dense tensors, rows of task.layout.row
// elements, blocks of kBlock elements that share a scale.
//
// A scale's block goes through a buffer: the exact new moment, from which the parameter moves, and its codes.

#pragma once

#include <limits>
#include <type_traits>

#include "dense.h"

namespace adam_mini {

constexpr int64_t kAhead = 512;

struct Int8 {
  using Scale = float;
  static constexpr int64_t kBlock = ADAM_MINI_INT8_BLOCK, kLevels = ADAM_MINI_INT8_LEVELS;  // of moments.FORMATS
  static float scale(float exact) { return exact; }
  static int64_t row_bytes(int64_t n) { return n; }
  static int64_t offset(int64_t within_row) { return within_row; }
  static void unpack(const uint8_t* from, int8_t* codes, int64_t n) { std::memcpy(codes, from, n); }
  static void pack(const int8_t* codes, uint8_t* to, int64_t n) { std::memcpy(to, codes, n); }
};

struct Int4 {
  using Scale = bfloat16;
  static constexpr int64_t kBlock = ADAM_MINI_INT4_BLOCK, kLevels = ADAM_MINI_INT4_LEVELS;
  static float scale(float exact) {  // up, so that no element lies above the largest code
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
    codes[n] = 0;  // a spare nibble; the buffer has room
#pragma omp simd
    for (int64_t i = 0; i < (n + 1) / 2; ++i)
      to[i] = static_cast<uint8_t>((codes[2 * i] & 15) | (static_cast<uint8_t>(codes[2 * i + 1]) << 4));
  }
};

// |x| as an integer of its width: ordered as the numbers are, NaN above infinity.
inline int32_t magnitude(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffffu); }
inline int64_t magnitude(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & std::numeric_limits<int64_t>::max();
}

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

// Codes rounded up with the probability that makes their mean right; base: the block's random number.
template <typename T, typename Q>
inline __attribute__((always_inline)) void quantise(const T* m, int8_t* codes, float scale, int64_t n, uint32_t base) {
  if (!(scale > 0)) return std::fill(codes, codes + n, int8_t(0)), void();
  const T inverse = T(1) / T(scale);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x = std::abs(m[i]) * inverse, low = std::floor(std::sqrt(x));
    const uint32_t bits = (base + static_cast<uint32_t>(i) * 0x9e3779b9u) >> 8;
    const T share = T(static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-24f);
    const T code = std::min(T(Q::kLevels), low + (share * (low * T(2) + T(1)) < x - low * low ? T(1) : T(0)));
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(std::copysign(code, m[i])));
  }
}

// One block of a scale: element `at` of the tensor, n elements. factor(i) is of the block's element i.
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

constexpr int64_t kSpan = 8;  // blocks unpacked at once

// Blocks [from, to) of the tensor's; factor_at(element, n) gives the factor of each of n elements as a function.
// ahead: in how many elements the gradient is needed next from memory; rounding keeps the processor busy for longer
// than its own prefetching looks.
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
      if (count == Q::kBlock)  // a loop of known length is a faster one
        low_bit_block<T, P, Q, R>(x, codes + done, scales + b, at, Q::kBlock, s, random, factor);
      else
        low_bit_block<T, P, Q, R>(x, codes + done, scales + b, at, count, s, random, factor);
    }
    Q::pack(codes, stored, length);
  }
}

template <typename T>
struct Same {
  T value;
  T operator()(int64_t) const { return value; }
};

template <typename T>
struct Each {
  const T* values;
  T operator()(int64_t i) const { return values[i]; }
};

// Blocks [from, to), one factor for all.
template <typename T, typename P, typename Q, int R>
void low_bit_blocks_of(const Task& task, int64_t from, int64_t to, int64_t ahead, T factor) {
  low_bit_blocks<T, P, Q, R>(task, from, to, ahead, [=](int64_t, int64_t) { return Same<T>{factor}; });
}

// Where an index of the axis holds whole rows: as in dense.h.
template <typename T, typename P, typename Q, int R>
void low_bit_rows_piece(const Task& task, int64_t k) {
  const Tensors<T, P, uint8_t, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t from = k * task.window, to = std::min(l.axis, from + task.window);
  const int64_t blocks = l.inner / l.row * ((l.row + Q::kBlock - 1) / Q::kBlock);  // of an index
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    const int64_t count = length * l.inner;
    if (count > kLong) return;
    const T second = spread(x.v, first, length, sum_of_squares<T>(x.g + first * l.inner, count) / count, s);
    low_bit_blocks_of<T, P, Q, R>(task, first * blocks, (first + length) * blocks, count, s.factor(second));
  });
}

template <typename T, typename P, typename Q, int R>
void low_bit_long_runs(const Task& task, int threads) {
  const Tensors<T, P, uint8_t, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t blocks = l.inner / l.row * ((l.row + Q::kBlock - 1) / Q::kBlock), share = kChunk / Q::kBlock;
  each_run(l, 0, l.axis, [&](int64_t first, int64_t length) {
    const int64_t at = first * l.inner, count = length * l.inner, pieces = (count + kChunk - 1) / kChunk;
    if (count <= kLong) return;
    std::vector<double> parts(pieces);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < pieces; ++c)
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

// Where rows cross indices of the axis, all second moments come first, in windows as in dense.h.
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
      int64_t index = at / l.inner, left = l.inner - at % l.inner;  // of axis and everything in front; until the next
      int64_t o = index / (l.axis * l.between), a = index % l.axis, b = index / l.axis % l.between;
      for (int64_t i = 0; i < n; ++i) {
        factors[i] = v[o * l.axis + a];
        if (--left) continue;
        left = l.inner;
        if (++a < l.axis) continue;
        a = 0;
        if (++b == l.between) b = 0, ++o;
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) factors[i] = s.factor(factors[i]);
      return Each<T>{factors};
    });
  }
}

}  // namespace adam_mini
