// Tensors that lie dense in memory as [outer][between][axis][inner].
//
// What a block needs twice, its gradient, is read the second time from cache; a run too long for that is shared by all
// threads, piece by piece.

#pragma once

#include <vector>

#include "tensors.h"

namespace adam_mini {

constexpr int64_t kShort = 1 << 13;  // a run of at most as many elements stays in cache with all that its update reads

template <typename T, typename P, typename M, int R>
void update(const Tensors<T, P, M, R>& x, int64_t at, int64_t n, const Step<T>& s, T factor) {
#pragma omp simd
  for (int64_t i = at; i < at + n; ++i) {
    store(x.m + i, s.beta1 * load(x.m + i) + s.rest1 * (s.unscale * load(x.g + i)));
    x.to.put(i, i, i, s, factor * load(x.m + i));
  }
}

template <typename T, typename P, typename M, int R>
void update_columns(const Tensors<T, P, M, R>& x, int64_t at, int64_t n, const Step<T>& s, const T* factors) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    store(x.m + at + i, s.beta1 * load(x.m + at + i) + s.rest1 * (s.unscale * load(x.g + at + i)));
    x.to.put(at + i, at + i, at + i, s, factors[i] * load(x.m + at + i));
  }
}

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

// The second moment of one run, from its mean square; it is the same all along the run.
template <typename T>
T spread(T* v, int64_t first, int64_t length, double mean, const Step<T>& s) {
  const T second = s.advance(v[first], mean);
  std::fill(v + first, v + first + length, second);
  return second;
}

// Runs that are contiguous in memory: nothing between the outer axes and the axis.
template <typename T, typename P, typename M, int R>
void rows_piece(const Task& task, int64_t k) {
  const Tensors<T, P, M, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t from = k * task.window, to = std::min(l.axis, from + task.window);
  if (l.inner == 1 && l.ones()) return update_each(x, from, to - from, s);
  each_run(l, from, to, [&](int64_t first, int64_t length) {
    const int64_t count = length * l.inner;
    if (count > kLong) return;  // long_runs takes these
    const int64_t at = first * l.inner;
    const double total = count <= kShort ? sum_and_fetch<T>(x.g + at, x.to.p + at, x.m + at, count)
                                         : sum_of_squares<T>(x.g + at, count);
    const T second = spread(x.v, first, length, total / count, s);
    update(x, first * l.inner, count, s, s.factor(second));
  });
}

template <typename T, typename P, typename M, int R>
void long_runs(const Task& task, int threads) {
  const Tensors<T, P, M, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
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
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < pieces; ++c)
      update(x, at + c * kChunk, std::min(kChunk, count - c * kChunk), s, factor);
  });
}

// Sums of squares of n neighbouring columns of a [between][width] plane.
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

// Mean square of one run across the planes of an outer index.
template <typename T, typename G>
double run_mean(const G* g, const Layout& l, int64_t o, int64_t first, int64_t length) {
  const int64_t width = l.axis * l.inner, count = length * l.inner;
  double total = 0;
  for (int64_t b = 0; b < l.between; ++b)
    total += sum_of_squares<T>(g + (o * l.between + b) * width + first * l.inner, count);
  return total / (static_cast<double>(l.between) * count);
}

// Blocks across memory, one outer index at a time: [between][axis]. The sums of a strip of columns that starts and ends
// with a run, row by row, then its update, row by row: memory is read in long pieces, whatever the runs' lengths.
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
    T* own = factors.data() + first - start;
    double total = 0;
    for (int64_t i = 0; i < length; ++i) total += own[i];
    const T second = spread(x.v + o * l.axis, first, length, total / (static_cast<double>(l.between) * length), s);
    std::fill(own, own + length, s.factor(second));
  });
  for (int64_t b = 0; b < l.between; ++b)
    update_columns(x, base + b * l.axis + start, stop - start, s, factors.data());
}

// Likewise [between][axis][inner]: where an index has several elements, run by run.
template <typename T, typename P, typename M, int R>
void columns_piece(const Task& task, int64_t k) {
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
