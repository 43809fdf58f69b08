// The step of tensors with arbitrary strides. It is meant to be correct and not to be fast. A chunk consists of a few
// blocks, and the innermost loop over a block runs along the axis with the smallest stride.

#pragma once

#include "dense.h"

namespace adam_mini {

constexpr int kMaxDims = 80;  // torch's own limit is 64

// The offset of one element in every tensor, and its row-major index.
struct Position {
  int64_t param = 0, grad = 0, moment = 0, compensation = 0, index = 0;

  // Returns the position `steps` indices further along the axis d.
  Position after(const Dim& d, int64_t steps) const {
    return {param + steps * d.param, grad + steps * d.grad, moment + steps * d.moment,
            compensation + steps * d.compensation, index + steps * d.index};
  }
};

// Calls f(position, dim) for every line of elements along the last of n axes.
template <typename F>
void each_line(const Dim* dims, int64_t n, const Position& at, F&& f) {
  if (n == 0) {
    f(at, Dim{1, 0, 0, 0, 0, 0});
  } else if (n == 1) {
    f(at, dims[0]);
  } else {
    for (int64_t i = 0; i < dims[0].size; ++i) each_line(dims + 1, n - 1, at.after(dims[0], i), f);
  }
}

// Returns the position of the first element of outer index o.
inline Position outer_position(const Layout& l, int64_t o) {
  Position at;
  for (int64_t d = l.leading - 1; d >= 0; --d) {
    at = at.after(l.dims[d], o % l.dims[d].size);
    o /= l.dims[d].size;
  }
  return at;
}

// Writes the axes of a block to `out` and returns their number. The axis of the runs has the size of the run, and axes
// of size 1 are left out.
inline int64_t block_dims(const Layout& l, int64_t length, Dim* out) {
  int64_t n = 0;
  for (int64_t d = 0; d < l.others; ++d) {
    out[n] = l.dims[l.leading + d];
    if (d == l.axis_at) out[n].size = length;
    n += out[n].size != 1;
  }
  return n;
}

// Updates the first moments and parameters of one line of elements, which all have the same factor.
template <typename T, typename P, typename M, int R>
void strided_line(const Tensors<T, P, M, R>& x, const Position& at, const Dim& d, const Step<T>& s, T factor) {
  for (int64_t i = 0; i < d.size; ++i) {
    M* m = x.m + at.moment + i * d.moment;
    store(m, s.beta1 * load(m) + s.rest1 * (s.unscale * load(x.g + at.grad + i * d.grad)));
    x.to.put(at.param + i * d.param, at.compensation + i * d.compensation, at.index + i * d.index, s,
             factor * load(m));
  }
}

// Steps one chunk of a tensor.
template <typename T, typename P, typename M, int R>
void strided_chunk(const Task& task, int64_t k) {
  const Tensors<T, P, M, R> x(task);
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const int64_t o = k / task.windows(), from = k % task.windows() * task.window;
  const Position base = outer_position(l, o);
  const Dim& axis = l.dims[l.leading + l.axis_at];
  each_run(l, from, std::min(l.axis, from + task.window), [&](int64_t first, int64_t length) {
    Dim dims[kMaxDims];
    const int64_t n = block_dims(l, length, dims);
    const Position at = base.after(axis, first);
    double total = 0;
    each_line(dims, n, at, [&](const Position& line, const Dim& d) {
      for (int64_t i = 0; i < d.size; ++i) {
        const double g = load(x.g + line.grad + i * d.grad);
        total += g * g;
      }
    });
    const double count = static_cast<double>(l.between) * l.inner * length;
    const T factor = s.factor(spread(x.v + o * l.axis, first, length, total / count, s));
    each_line(dims, n, at, [&](const Position& line, const Dim& d) { strided_line(x, line, d, s, factor); });
  });
}

}  // namespace adam_mini
