// The step of tensors that are dense in memory as [outer][between][axis][inner].
//
// A block reads its gradient twice, and the second time from cache. A run that is too long for the cache is cut into
// chunks, which all threads share.

#pragma once

#include <vector>

#include "tensors.h"

namespace adam_mini {

// Elements of the longest run whose gradient, parameter and moment all fit in cache.
constexpr int64_t kShort = 1 << 13;

// Updates the first moment and the parameter of n elements from `at` on, which all have the same factor.
template <typename T, typename P, typename M, int R>
void update(const Tensors<T, P, M, R>& x, int64_t at, int64_t n, const Step<T>& s, T factor) {
#pragma omp simd
  for (int64_t i = at; i < at + n; ++i) {
    store(x.m + i, s.beta1 * load(x.m + i) + s.rest1 * (s.unscale * load(x.g + i)));
    x.to.put(i, i, i, s, factor * load(x.m + i));
  }
}

// Updates the first moment and the parameter of n elements from `at` on; element i has factors[i].
template <typename T, typename P, typename M, int R>
void update_columns(const Tensors<T, P, M, R>& x, int64_t at, int64_t n, const Step<T>& s, const T* factors) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    store(x.m + at + i, s.beta1 * load(x.m + at + i) + s.rest1 * (s.unscale * load(x.g + at + i)));
    x.to.put(at + i, at + i, at + i, s, factors[i] * load(x.m + at + i));
  }
}

// Updates the second moment, the first moment and the parameter of n elements from `at` on, each of which is a block.
template <typename T, typename P, typename M, int R>
void update_each(const Tensors<T, P, M, R>& x, int64_t at, int64_t n, const Step<T>& s) {
#pragma omp simd
  for (int64_t i = at; i < at + n; ++i) {
    const T g = s.unscale * load(x.g + i);
    x.v[i] = s.beta2 * x.v[i] + s.rest2 * g * g;
    store(x.m + i, s.beta1 * load(x.m + i) + s.rest1 * g);
    x.to.put(i, i, i, s, load(x.m + i) * s.factor(x.v[i]));
  }
}

// Updates the second moment of one run from the run's mean square, stores it at every index of the run, and returns it.
template <typename T>
T spread(T* v, int64_t first, int64_t length, double mean, const Step<T>& s) {
  const T second = s.advance(v[first], mean);
  std::fill(v + first, v + first + length, second);
  return second;
}

// Steps one chunk of a tensor whose runs are contiguous in memory, which is so if between == 1.
template <typename T, typename P, typename M, int R>
void rows_chunk(const Task& task, int64_t k) {
  const Tensors<T, P, M, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t from = k * task.window, to = std::min(l.axis, from + task.window);
  if (l.inner == 1 && l.ones()) return update_each(x, from, to - from, s);
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    const int64_t count = length * l.inner;
    if (count > kLong) return;  // long_runs updates these
    const int64_t at = first * l.inner;
    const double total = count > kShort      ? sum_of_squares<T>(x.g + at, count)
                         : task.way->fetch ? short_sum<true, T>(x.g + at, x.to.p + at, x.m + at, count)
                                           : short_sum<false, T>(x.g + at, x.to.p + at, x.m + at, count);
    const T second = spread(x.v, first, length, total / count, s);
    update(x, first * l.inner, count, s, s.factor(second));
  });
}

// Steps the runs of a tensor that have more than kLong elements, one after another; all threads share each run.
template <typename T, typename P, typename M, int R>
void long_runs(const Task& task, int threads) {
  const Tensors<T, P, M, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
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
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; ++c)
      update(x, at + c * kChunk, std::min(kChunk, count - c * kChunk), s, factor);
  });
}

// Returns the sums of squares of n neighbouring columns of a [between][width] plane.
template <typename T, typename G>
std::vector<T> column_sums(const G* g, int64_t between, int64_t width, int64_t n) {
  std::vector<T> sums(n, T(0));
  T* acc = sums.data();
  for (int64_t b = 0; b < between; ++b, g += width) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T x = load(g + i);
      acc[i] += x * x;
    }
  }
  return sums;
}

// Returns the mean square of one run at outer index o, over all indices of `between`.
template <typename T, typename G>
double run_mean(const G* g, const Layout& l, int64_t o, int64_t first, int64_t length) {
  const int64_t width = l.axis * l.inner, count = length * l.inner;
  double total = 0;
  for (int64_t b = 0; b < l.between; ++b)
    total += sum_of_squares<T>(g + (o * l.between + b) * width + first * l.inner, count);
  return total / (static_cast<double>(l.between) * count);
}

// Steps a strip of columns of one outer index, [between][axis], in which each block is spread over all rows. The strip
// begins and ends at a run. It is summed row by row and then updated row by row, so that memory is read in long
// contiguous ranges for any length of the runs.
template <typename T, typename P, typename M, int R>
void strip(const Tensors<T, P, M, R>& x, const Layout& l, int64_t o, int64_t from, int64_t to, const Step<T>& s) {
  const int64_t base = o * l.between * l.axis;
  int64_t start = l.axis, stop = 0;
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    start = std::min(start, first);
    stop = first + length;
  });
  if (start >= stop) return;
  std::vector<T> factors = column_sums<T>(x.g + base + start, l.between, l.axis, stop - start);
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    T* run_factors = factors.data() + first - start;  // the sums of the run's columns until they are overwritten
    double total = 0;
    for (int64_t i = 0; i < length; ++i) total += run_factors[i];
    const T second = spread(x.v + o * l.axis, first, length, total / (static_cast<double>(l.between) * length), s);
    std::fill(run_factors, run_factors + length, s.factor(second));
  });
  for (int64_t b = 0; b < l.between; ++b)
    update_columns(x, base + b * l.axis + start, stop - start, s, factors.data());
}

// Steps one chunk of a tensor in which each block is spread over the indices of `between`. If an index of the axis has
// several contiguous elements (inner > 1), the runs are processed one by one, else in a strip.
template <typename T, typename P, typename M, int R>
void columns_chunk(const Task& task, int64_t k) {
  const Tensors<T, P, M, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t o = k / task.windows(), from = k % task.windows() * task.window;
  const int64_t to = std::min(l.axis, from + task.window), width = l.axis * l.inner, base = o * l.between * width;
  if (l.inner == 1) return strip(x, l, o, from, to, s);
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    const T second = spread(x.v + o * l.axis, first, length, run_mean<T>(x.g, l, o, first, length), s);
    for (int64_t b = 0; b < l.between; ++b)
      update(x, base + b * width + first * l.inner, length * l.inner, s, s.factor(second));
  });
}

}  // namespace adam_mini
