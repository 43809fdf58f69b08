// The description of a tensor for the native loop: its record, its layout, and the chunks into which its step is cut.

#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace adam_mini {

// One parameter, as step.py encodes it: one int64 per field. The first eight fields are addresses, 0 for a tensor that
// does not exist.
struct Record {
  int64_t param, moment, second, counter, layout, scale, compensation, columns;
  int64_t seed;  // of blocks in the lower 32 bits, of elements in the upper 32 bits
  int64_t dtype, moment_dtype, rounding;
};

enum Form { kDense = 0, kStrided = 1, kFactored = 2 };

// One axis: its size, its stride in each tensor, and its stride in row-major order.
struct Dim { int64_t size, param, grad, moment, compensation, index; };

// A dense tensor is [outer][between][axis][inner] in memory. Its blocks are runs along axis, repeated for each outer
// index. A strided tensor has the same four sizes as products of its axes, which `dims` lists: first the leading axes,
// then all others by decreasing stride. The axis of the runs is number axis_at among the others. A factored tensor is
// dense, its lengths are (part, length) pairs, and other numbers take the place of `dims` (Columns in factored.h).
struct Layout {
  int64_t form, outer, between, axis, inner, repeat, row, segments, leading, others, axis_at;
  const int64_t* lengths;  // (length, count) pairs
  const Dim* dims;

  int64_t numel() const { return outer * between * axis * inner; }
  bool ones() const { return segments == 1 && lengths[0] == 1; }
};

// Decodes a layout that layouts.py encoded at this address.
inline Layout layout_at(int64_t address) {
  const int64_t* n = reinterpret_cast<const int64_t*>(address);
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n + 11,
          reinterpret_cast<const Dim*>(n + 11 + 2 * n[7])};
}

// Calls f(first, length) for each run that begins in [from, to), where all numbers are indices along the axis.
template <typename F>
void each_run(const Layout& l, int64_t from, int64_t to, F&& f) {
  const int64_t period = l.axis / std::max<int64_t>(1, l.repeat);
  if (period == 0) return;
  for (int64_t at = from / period * period; at < to;) {
    for (int64_t k = 0; k < l.segments; ++k) {
      const int64_t length = l.lengths[2 * k], count = l.lengths[2 * k + 1];
      int64_t c = at >= from ? 0 : std::min(count, (from - at + length - 1) / length);
      at += c * length;
      for (; c < count; ++c, at += length) {
        if (at >= to) return;
        f(at, length);
      }
    }
  }
}

constexpr int64_t kChunk = 1 << 15;  // elements of a chunk where the cut decides the order of a sum; Way::chunk is the tunable one
constexpr int64_t kLong = 1 << 17;   // elements; a longer run is shared by all threads

// How the loop goes through memory. It changes no result, so which way is the fastest is a question of the processor;
// ways.py finds out.
struct Way {
  int64_t chunk;  // elements of a chunk of rows
  int64_t strip;  // smallest number of columns of a strip
  int64_t ahead;  // how many elements ahead the loop of quantised moments prefetches
  int64_t fetch;  // whether sums of squares prefetch what the update reads
};

// The step of one tensor, cut into chunks that do not depend on each other.
struct Task {
  void (*process)(const Task&, int64_t);  // steps one chunk, given by its number
  const Record* record;
  int64_t grad;
  const void* step;  // Step<T>
  const Way* way;
  Layout layout;
  int64_t window;  // indices of the axis; a chunk consists of the runs that begin in a window
  int64_t chunks;
  int64_t first_chunk;  // number of the tensor's first chunk among the chunks of all tensors

  template <typename T> const Step<T>& of() const { return *static_cast<const Step<T>*>(step); }
  int64_t windows() const { return (layout.axis + window - 1) / window; }
};

// The tensors of a task as typed pointers.
template <typename T, typename P, typename M, int R>
struct Tensors {
  Target<T, P, R> to;
  const P* g;
  M* m;
  T* v;

  explicit Tensors(const Task& task)
      : to{reinterpret_cast<P*>(task.record->param), reinterpret_cast<bfloat16*>(task.record->compensation),
           task.of<T>().count * 0x85ebca6bu + static_cast<uint32_t>(static_cast<uint64_t>(task.record->seed) >> 32)},
        g(reinterpret_cast<const P*>(task.grad)),
        m(reinterpret_cast<M*>(task.record->moment)),
        v(reinterpret_cast<T*>(task.record->second)) {}
};

// Returns the sum of squares of n contiguous gradients.
template <typename T, typename G>
double sum_of_squares(const G* g, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += 4096) {  // short sums in T are added in double precision
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

constexpr int64_t kLanes = 64;  // number of parallel sums; with so many, no addition waits for the previous one

// Prefetches kLanes elements. Prefetching an address beyond the end of a tensor is allowed.
template <typename E>
inline __attribute__((always_inline)) void fetch(const E* at) {
  for (int64_t j = 0; j < kLanes; j += 64 / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(at + j, 0, 3);
}

// Returns the sum of squares of a short run of gradients. A sum reads one stream of memory, but an update reads three.
// So with kFetch the sum also prefetches what the update of this run and the sum of the next run will read, which
// balances the load on memory.
template <bool kFetch, typename T, typename G, typename P, typename M>
T short_sum(const G* g, const P* p, const M* m, int64_t n) {
  T parts[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    if constexpr (kFetch) {
      fetch(p + i);
      fetch(m + i);
      fetch(g + i + n);
    }
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      const T x = load(g + i + j);
      parts[j] += x * x;
    }
  }
  T total = 0;
  for (int64_t j = 0; j < kLanes; ++j) total += parts[j];
  for (int64_t i = whole; i < n; ++i) {
    const T x = load(g + i);
    total += x * x;
  }
  return total;
}

}  // namespace adam_mini
