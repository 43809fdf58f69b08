// Adam-mini over a list of tensors in one pass (arXiv 2406.16793, Algorithm 1), for CPUs.
//
// A tensor is seen as [outer][between][axis][inner] (row-major, dense); its blocks are runs along axis, repeated for
// each outer index. What a row-wise run needs twice, its gradient, is read the second time from cache; where a run is
// too long for that, or lies across memory, the tensor takes two passes.
//
// Every operation rounds as torch's own would, one by one: the build switches contraction off.
// No header of torch is used: the library builds in seconds and does not depend on torch's C++ interface.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { _Float16 value; };

inline double load(const double* p) { return *p; }
inline float load(const float* p) { return *p; }
inline float load(const float16* p) { return static_cast<float>(p->value); }
inline float load(const bfloat16* p) {
  const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

inline void store(double* p, double x) { *p = x; }
inline void store(float* p, float x) { *p = x; }
inline void store(float16* p, float x) { p->value = static_cast<_Float16>(x); }
inline void store(bfloat16* p, float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t nan = (wide >> 16) | 0x40u;
  p->bits = static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// What is the same for every element of a tensor. T: float, or double for double parameters.
template <typename T>
struct Step {
  T beta1, beta2, keep;  // keep: 1 - lr * weight_decay
  T unscale;             // gradients are multiplied by this (+-1 / grad scale)
  T lr_corrected;        // lr / (1 - beta1^t)
  T root2;               // sqrt(1 - beta2^t)
  T eps;

  T factor(T v) const { return lr_corrected / (std::sqrt(v) / root2 + eps); }
};

struct Layout {
  int64_t outer, between, axis, inner, repeat, segments;
  const int64_t* lengths;  // (length, count) pairs
  int64_t numel() const { return outer * between * axis * inner; }
};

constexpr int64_t kChunk = 1 << 15;  // elements of a piece of work: a few cache lines short of L2

template <typename T, typename G>
double sum_of_squares(const G* g, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += 4096) {  // short sums in T, their sum in double
    const int64_t stop = std::min(n, start + 4096);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < stop; ++i) {
      const T x = load(g + i);
      part += x * x;
    }
    total += part;
  }
  return total;
}

template <typename T, typename P, typename G, typename M>
void update(P* p, const G* g, M* m, int64_t n, const Step<T>& s, T factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T moment = s.beta1 * load(m + i) + (T(1) - s.beta1) * (s.unscale * load(g + i));
    store(m + i, moment);
    store(p + i, s.keep * load(p + i) - factor * load(m + i));
  }
}

template <typename T, typename P, typename G, typename M>
void update_each(P* p, const G* g, M* m, T* v, int64_t n, const Step<T>& s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x = s.unscale * load(g + i);
    const T second = s.beta2 * v[i] + (T(1) - s.beta2) * x * x;
    v[i] = second;
    store(m + i, s.beta1 * load(m + i) + (T(1) - s.beta1) * x);
    store(p + i, s.keep * load(p + i) - load(m + i) * (s.lr_corrected / (std::sqrt(second) / s.root2 + s.eps)));
  }
}

template <typename T>
T advance(T v, double mean, const Step<T>& s) {
  return s.beta2 * v + (T(1) - s.beta2) * static_cast<T>(mean) * s.unscale * s.unscale;
}

struct Run { int64_t first, length; };  // along the axis, outer indices laid end to end

std::vector<Run> runs_of(const Layout& l) {
  std::vector<Run> out;
  int64_t at = 0;
  for (int64_t o = 0; o < l.outer * l.repeat; ++o)
    for (int64_t k = 0; k < l.segments; ++k)
      for (int64_t c = 0; c < l.lengths[2 * k + 1]; ++c) {
        out.push_back({at, l.lengths[2 * k]});
        at += l.lengths[2 * k];
      }
  return out;
}

bool all_ones(const Layout& l) {
  for (int64_t k = 0; k < l.segments; ++k)
    if (l.lengths[2 * k] != 1) return false;
  return true;
}

// Runs that are contiguous in memory: nothing between the outer axes and the axis.
template <typename T, typename P, typename G, typename M>
void rows(P* p, const G* g, M* m, T* v, const Layout& l, const Step<T>& s, int threads) {
  if (all_ones(l)) {
    const int64_t n = l.outer * l.axis;
    if (l.inner == 1) {
#pragma omp parallel for num_threads(threads) if (n > kChunk) schedule(static)
      for (int64_t start = 0; start < n; start += kChunk)
        update_each(p + start, g + start, m + start, v + start, std::min(kChunk, n - start), s);
      return;
    }
#pragma omp parallel for num_threads(threads) if (n * l.inner > kChunk) schedule(static)
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = r * l.inner;
      v[r] = advance(v[r], sum_of_squares<T>(g + at, l.inner) / l.inner, s);
      update(p + at, g + at, m + at, l.inner, s, s.factor(v[r]));
    }
    return;
  }
  const std::vector<Run> runs = runs_of(l);
  const int64_t n = static_cast<int64_t>(runs.size());
  const bool few = n < 2 * threads && l.numel() > kChunk;
  if (!few) {
#pragma omp parallel for num_threads(threads) if (l.numel() > kChunk) schedule(dynamic, 1 + n / (8 * threads))
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = runs[r].first * l.inner, count = runs[r].length * l.inner;
      const T second = advance(v[runs[r].first], sum_of_squares<T>(g + at, count) / count, s);
      std::fill(v + runs[r].first, v + runs[r].first + runs[r].length, second);
      update(p + at, g + at, m + at, count, s, s.factor(second));
    }
    return;
  }
  for (const Run& run : runs) {  // long runs: all threads on each
    const int64_t at = run.first * l.inner, count = run.length * l.inner, pieces = (count + kChunk - 1) / kChunk;
    std::vector<double> parts(pieces);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < pieces; ++c)
      parts[c] = sum_of_squares<T>(g + at + c * kChunk, std::min(kChunk, count - c * kChunk));
    double total = 0;
    for (double part : parts) total += part;
    const T second = advance(v[run.first], total / count, s);
    std::fill(v + run.first, v + run.first + run.length, second);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < pieces; ++c) {
      const int64_t i = at + c * kChunk;
      update(p + i, g + i, m + i, std::min(kChunk, count - c * kChunk), s, s.factor(second));
    }
  }
}

// Blocks across memory: one outer index at a time, [between][axis][inner]; columns in strips that stay in cache.
template <typename T, typename P, typename G, typename M>
void columns(P* p, const G* g, M* m, T* v, const Layout& l, const Step<T>& s, int threads) {
  const int64_t width = l.axis * l.inner, plane = l.between * width;
  const bool ones = all_ones(l) && l.inner == 1;
  const int64_t strip = ones ? std::max<int64_t>(64, std::min(width, kChunk / std::max<int64_t>(1, l.between) / 64 * 64))
                             : width;
  const int64_t strips = (width + strip - 1) / strip;
  const double share = static_cast<double>(l.between) * l.inner;
  if (ones) {
#pragma omp parallel for num_threads(threads) if (l.numel() > kChunk) schedule(static)
    for (int64_t k = 0; k < l.outer * strips; ++k) {
      const int64_t o = k / strips, from = k % strips * strip, n = std::min(strip, width - from);
      std::vector<T> sums(n, T(0)), factors(n);
      for (int64_t b = 0; b < l.between; ++b) {
        const G* row = g + o * plane + b * width + from;
        T* acc = sums.data();
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const T x = load(row + i);
          acc[i] += x * x;
        }
      }
      T* second = v + o * l.axis + from;
      for (int64_t i = 0; i < n; ++i) {
        second[i] = advance(second[i], sums[i] / share, s);
        factors[i] = s.factor(second[i]);
      }
      for (int64_t b = 0; b < l.between; ++b) {
        const int64_t at = o * plane + b * width + from;
        const T* f = factors.data();
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const T moment = s.beta1 * load(m + at + i) + (T(1) - s.beta1) * (s.unscale * load(g + at + i));
          store(m + at + i, moment);
          store(p + at + i, s.keep * load(p + at + i) - f[i] * load(m + at + i));
        }
      }
    }
    return;
  }
  const std::vector<Run> runs = runs_of(l);
  const int64_t per_outer = static_cast<int64_t>(runs.size()) / std::max<int64_t>(1, l.outer);
#pragma omp parallel for num_threads(threads) if (l.numel() > kChunk) schedule(static)
  for (int64_t k = 0; k < l.outer * per_outer; ++k) {
    const Run run = runs[k];
    const int64_t o = k / per_outer, first = run.first - o * l.axis, count = run.length * l.inner;
    double total = 0;
    for (int64_t b = 0; b < l.between; ++b)
      total += sum_of_squares<T>(g + o * plane + b * width + first * l.inner, count);
    const T second = advance(v[run.first], total / (share * run.length), s);
    std::fill(v + run.first, v + run.first + run.length, second);
    for (int64_t b = 0; b < l.between; ++b) {
      const int64_t at = o * plane + b * width + first * l.inner;
      update(p + at, g + at, m + at, count, s, s.factor(second));
    }
  }
}

template <typename T, typename P, typename M>
void one(const int64_t* pointers, const Step<T>& step, int threads) {
  P* p = reinterpret_cast<P*>(pointers[0]);
  const P* g = reinterpret_cast<const P*>(pointers[1]);
  M* m = reinterpret_cast<M*>(pointers[2]);
  T* v = reinterpret_cast<T*>(pointers[3]);
  const int64_t* meta = reinterpret_cast<const int64_t*>(pointers[5]);
  const Layout layout{meta[0], meta[1], meta[2], meta[3], meta[4], meta[5], meta + 6};
  if (layout.numel() == 0) return;
  if (layout.between == 1)
    rows(p, g, m, v, layout, step, threads);
  else
    columns(p, g, m, v, layout, step, threads);
}

}  // namespace

extern "C" {

int64_t adam_mini_abi() { return 1; }

// pointers: for each tensor param, grad, exp_avg, exp_avg_sq, step (float, advanced here), layout
// dtype: 0 double, 1 float, 2 bfloat16, 3 float16, of param and grad; moment likewise, or 1 beside 2 and 3
// gradients are multiplied by sign / grad_scale
void adam_mini_step(int64_t n, const int64_t* pointers, int64_t dtype, int64_t moment, double lr, double beta1,
                    double beta2, double eps, double weight_decay, double sign, double grad_scale, int64_t threads) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* own = pointers + 6 * i;
    float* taken = reinterpret_cast<float*>(own[4]);
    const double t = static_cast<double>(*taken += 1.0f);
    const auto fill = [&](auto zero) {
      using T = decltype(zero);
      return Step<T>{T(beta1), T(beta2), T(1 - lr * weight_decay), T(sign / grad_scale),
                     T(lr / (1 - std::pow(beta1, t))), T(std::sqrt(1 - std::pow(beta2, t))), T(eps)};
    };
    const int used = static_cast<int>(threads);
    if (dtype == 0) one<double, double, double>(own, fill(0.0), used);
    else if (dtype == 1 && moment == 1) one<float, float, float>(own, fill(0.0f), used);
    else if (dtype == 1 && moment == 2) one<float, float, bfloat16>(own, fill(0.0f), used);
    else if (dtype == 2 && moment == 1) one<float, bfloat16, float>(own, fill(0.0f), used);
    else if (dtype == 2 && moment == 2) one<float, bfloat16, bfloat16>(own, fill(0.0f), used);
    else if (dtype == 3 && moment == 1) one<float, float16, float>(own, fill(0.0f), used);
    else if (dtype == 3 && moment == 3) one<float, float16, float16>(own, fill(0.0f), used);
  }
}

}  // extern "C"
