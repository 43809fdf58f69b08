// The step of tensors with few-bit first moments in which a row crosses indices of the axis, so that one block of codes
// belongs to several runs. The step updates all second moments before it updates any parameter.

#pragma once

#include "low_bit.h"

namespace adam_mini {

// Writes the sums of squares of all columns of a [between][axis] plane to `sums`. Threads sum ranges of whole rows, which
// are contiguous in memory. The ranges do not depend on the number of threads, so the results do not either.
template <typename T, typename P>
void plane_sums(const P* g, int64_t between, int64_t axis, T* sums, int threads) {
  constexpr int64_t kMost = 64;  // ranges, each of which has its own sums
  const int64_t rows = std::max((kLong + axis - 1) / axis, (between + kMost - 1) / kMost);
  const int64_t ranges = (between + rows - 1) / rows;
  std::vector<std::vector<T>> parts(ranges);
#pragma omp parallel for num_threads(threads) if (ranges > 1) schedule(static)
  for (int64_t k = 0; k < ranges; ++k)
    parts[k] = column_sums<T>(g + k * rows * axis, std::min(rows, between - k * rows), axis, axis);
  std::fill_n(sums, axis, T(0));
  for (const std::vector<T>& part : parts) {
#pragma omp simd
    for (int64_t i = 0; i < axis; ++i) sums[i] += part[i];
  }
}

// Updates the second moments of one window of the axis, at one outer index.
template <typename T, typename P>
void second_moments(const Task& task, int64_t k) {
  const Layout& l = task.layout;
  const int64_t o = k / task.windows(), from = k % task.windows() * task.window;
  T* v = reinterpret_cast<T*>(task.record->second) + o * l.axis;
  each_run(l, from, std::min(l.axis, from + task.window), [&](int64_t first, int64_t length) {
    const double mean = run_mean<T>(reinterpret_cast<const P*>(task.grad), l, o, first, length);
    spread(v, first, length, mean, task.of<T>());
  });
}

// Updates all second moments of a tensor, and returns the factor of every index of the axis at every outer index.
template <typename T, typename P>
std::vector<T> factors_of(const Task& task, int threads) {
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t count = l.outer * l.axis, windows = l.outer * task.windows();
  T* v = reinterpret_cast<T*>(task.record->second);
  std::vector<T> factors(count);
  if (l.inner == 1) {
    for (int64_t o = 0; o < l.outer; ++o) {
      T* sums = factors.data() + o * l.axis;
      const P* g = reinterpret_cast<const P*>(task.grad) + o * l.between * l.axis;
      plane_sums<T>(g, l.between, l.axis, sums, threads);
      each_run(l, 0, l.axis, [&](int64_t first, int64_t length) {
        double total = 0;
        for (int64_t i = first; i < first + length; ++i) total += sums[i];
        spread(v + o * l.axis, first, length, total / (static_cast<double>(l.between) * length), s);
      });
    }
  } else {
#pragma omp parallel for num_threads(threads) if (l.numel() > kChunk) schedule(static)
    for (int64_t k = 0; k < windows; ++k) second_moments<T, P>(task, k);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) factors[i] = s.factor(v[i]);
  return factors;
}

// Steps a tensor in which rows cross indices of the axis: second moments first, then blocks in any order.
template <typename T, typename P, typename Q, int R>
void low_bit_any(const Task& task, int threads) {
  const Layout& l = task.layout;
  const std::vector<T> factors = factors_of<T, P>(task, threads);
  const int64_t blocks = l.numel() / l.row * ((l.row + Q::kBlock - 1) / Q::kBlock), share = kChunk / Q::kBlock;
#pragma omp parallel for num_threads(threads) if (l.numel() > kChunk) schedule(static)
  for (int64_t b = 0; b < blocks; b += share) {
    alignas(64) T gathered[kSpan];
    low_bit_blocks<T, P, Q, R>(task, b, std::min(blocks, b + share), task.way->ahead, [&](int64_t at, int64_t n) {
      // index: row-major index over the axis and all axes in front of it. left: elements until the next index.
      int64_t index = at / l.inner, left = l.inner - at % l.inner;
      int64_t o = index / (l.axis * l.between), a = index % l.axis, between = index / l.axis % l.between;
      const T* line = factors.data() + o * l.axis;
      if (l.inner == 1 && a + n <= l.axis) return ElementFactors<T>{line + a};
      for (int64_t i = 0; i < n; ++i) {
        gathered[i] = line[a];
        if (--left) continue;
        left = l.inner;
        if (++a < l.axis) continue;
        a = 0;
        if (++between == l.between) between = 0, line += l.axis;
      }
      return ElementFactors<T>{gathered};
    });
  }
}

}  // namespace adam_mini
