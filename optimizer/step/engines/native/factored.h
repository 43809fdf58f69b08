// The step of tensors whose second moment is a product of row means and column means (optimizer/step/factored.py).
// Tensors are dense in memory as [outer][between][axis][inner], and each outer index is a matrix with means of its own.
//
// No element can move before all means are known, so a matrix is read twice: once for the sums of both kinds, once for
// the update. It is cut into tiles, which depend neither on each other nor on the number of threads. Each tile writes
// its sums to memory of its own, and they are added in the order of the tiles, in double precision.

#pragma once

#include <memory>
#include <vector>

#include "low_bit.h"

namespace adam_mini {

// The factored part of a layout that layouts.py encoded. Each part has column means of its own. Column k is the k-th in
// the order of memory, which is not the order of the column means if the tensor is a permuted view.
struct Columns {
  int64_t parts, part_stride, dims;
  const int64_t* axes;  // (size, stride in the column means) of each axis, in the order of memory

  explicit Columns(const Layout& l) {
    const int64_t* n = reinterpret_cast<const int64_t*>(l.dims);
    parts = n[0], part_stride = n[1], dims = n[2], axes = n + 3;
  }

  // Calls f(k, offset in the means of one part) for each column.
  template <typename F>
  void each(int64_t columns, F&& f) const {
    const int64_t size = dims ? axes[2 * dims - 2] : 1, stride = dims ? axes[2 * dims - 1] : 0;
    for (int64_t k = 0; k < columns;) {
      int64_t offset = 0, rest = k / size;
      for (int64_t d = dims - 2; d >= 0; --d) {
        offset += rest % axes[2 * d] * axes[2 * d + 1];
        rest /= axes[2 * d];
      }
      for (int64_t i = 0; i < size; ++i, ++k) f(k, offset + i * stride);
    }
  }
};

// Calls f(part, first, length) for each piece of one part in [from, to), where all numbers are indices along the axis.
// The segments of a factored layout are (part, length) pairs.
template <typename F>
void each_piece(const Layout& l, int64_t from, int64_t to, F&& f) {
  const int64_t period = l.axis / std::max<int64_t>(1, l.repeat);
  for (int64_t at = from / period * period; at < to;) {
    for (int64_t k = 0; k < l.segments && at < to; ++k) {
      const int64_t end = at + l.lengths[2 * k + 1], first = std::max(at, from), stop = std::min(end, to);
      if (first < stop) f(l.lengths[2 * k], first, stop - first);
      at = end;
    }
  }
}

constexpr int64_t kTile = 1 << 17;    // elements of a tile, unless the next limits apply
constexpr int64_t kLines = 256;       // most lines of a tile: so many squares are added in the precision of the sums
constexpr int64_t kFewLines = 64;     // fewest lines: a tile's sums of its columns take a share of 1 / lines of memory
constexpr int64_t kWidth = 4096;      // most elements of a line in a tile, whose sums stay in the L1 cache
constexpr int64_t kPiece = 16;        // shorter pieces along a line are not worth a loop of their own
constexpr int64_t kMatrix = 1 << 18;  // elements; a larger matrix is shared by all threads

// A matrix in memory: planes of lines. If `down` is false, each line is a row or a part of one (a weight of nn.Linear).
// If it is true, each line is a column, and rows run down the lines (a weight of transformers' Conv1D).
struct Grid {
  bool down;
  int64_t planes, lines, width;            // of the matrix
  int64_t tile_lines, tile_width;          // of a tile
  int64_t across, along;                   // number of tiles across the lines of a plane and along a line

  Grid(const Layout& l, int64_t parts) : down(l.inner == 1 && l.between > 1) {
    planes = down ? 1 : l.between, lines = down ? l.between : l.axis, width = down ? l.axis : l.inner;
    along = (width + kWidth - 1) / kWidth;
    tile_width = std::min(width, ((width + along - 1) / along + 63) / 64 * 64);
    along = (width + tile_width - 1) / tile_width;
    const int64_t few = std::min(kLines, kFewLines * (down ? 1 : parts));
    tile_lines = std::min(lines, std::max(few, std::min(kLines, kTile / tile_width)));
    across = (lines + tile_lines - 1) / tile_lines;
  }
  int64_t tiles() const { return planes * across * along; }
};

// The part of a matrix in one tile.
struct Tile {
  int64_t plane, line_tile, width_tile, line, lines, column, width;

  Tile(const Grid& grid, int64_t number) {
    width_tile = number % grid.along;
    line_tile = number / grid.along % grid.across;
    plane = number / grid.along / grid.across;
    line = line_tile * grid.tile_lines, lines = std::min(grid.tile_lines, grid.lines - line);
    column = width_tile * grid.tile_width, width = std::min(grid.tile_width, grid.width - column);
  }
};

// How many elements ahead the sums prefetch the gradient. They read one stream of memory, in which the processor's own
// prefetching stops at every page; without these, sums took a tenth longer.
constexpr int64_t kFar = 2048;

// Returns the sum of squares of n gradients and adds each square to its sum in `each`.
template <typename T, typename G>
inline T sum_both(const G* g, T* each, int64_t n) {
  T parts[kLanes] = {}, total = 0;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    fetch(g + i + kFar);
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      const T x = load(g + i + j), square = x * x;
      each[i + j] += square;
      parts[j] += square;
    }
  }
#pragma omp simd reduction(+ : total)
  for (int64_t i = whole; i < n; ++i) {
    const T x = load(g + i), square = x * x;
    each[i] += square;
    total += square;
  }
  if (whole)
    for (int64_t j = 0; j < kLanes; ++j) total += parts[j];
  return total;
}

// The step of one matrix up to the roots of its means.
template <typename T, typename P>
struct Means {
  const Layout& l;
  const Step<T>& s;
  Columns columns;
  Grid grid;
  const P* g;
  T *r, *c;  // the state: means of rows and of columns
  int64_t n;  // number of columns
  // The sums of the tiles: rows [planes * along or across][axis], columns [planes][across or along][parts][extent].
  int64_t row_sums_of, column_sums_of, extent;
  std::unique_ptr<T[]> row_sums, column_sums;
  std::vector<T> row_roots, column_roots;  // sqrt(v) is their product; column roots are [parts][n] in memory's order

  Means(const Task& task, int64_t o)
      : l(task.layout), s(task.of<T>()), columns(l), grid(l, columns.parts),
        g(reinterpret_cast<const P*>(task.grad) + o * l.between * l.axis * l.inner),
        r(reinterpret_cast<T*>(task.record->second) + o * l.axis),
        c(reinterpret_cast<T*>(task.record->columns) + o * columns.parts * l.between * l.inner),
        n(l.between * l.inner),
        row_sums_of(grid.down ? grid.across : grid.planes * grid.along),
        column_sums_of(grid.down ? grid.along : grid.across),
        extent(grid.down ? l.between : l.inner),
        row_sums(new T[row_sums_of * l.axis]),
        column_sums(new T[grid.planes * column_sums_of * columns.parts * extent]) {}

  T* row_sums_at(int64_t k) { return row_sums.get() + k * l.axis; }
  T* column_sums_at(int64_t plane, int64_t k, int64_t part) {
    return column_sums.get() + ((plane * column_sums_of + k) * columns.parts + part) * extent;
  }

  // Computes the sums of one tile.
  void sum(int64_t number) {
    const Tile tile(grid, number);
    const P* at = g + (tile.plane * grid.lines + tile.line) * grid.width + tile.column;
    if (grid.down) return sum_down(tile, at);
    T* rows = row_sums_at(tile.plane * grid.along + tile.width_tile);
    for (int64_t part = 0; part < columns.parts; ++part)
      std::fill_n(column_sums_at(tile.plane, tile.line_tile, part) + tile.column, tile.width, T(0));
    each_piece(l, tile.line, tile.line + tile.lines, [&](int64_t part, int64_t first, int64_t length) {
      T* each = column_sums_at(tile.plane, tile.line_tile, part) + tile.column;
      for (int64_t i = first; i < first + length; ++i, at += grid.width) rows[i] = sum_both<T>(at, each, tile.width);
    });
  }

  void sum_down(const Tile& tile, const P* at) {
    T* rows = row_sums_at(tile.line_tile) + tile.column;
    std::fill_n(rows, tile.width, T(0));
    for (int64_t part = 0; part < columns.parts; ++part)
      std::fill_n(column_sums_at(0, tile.width_tile, part) + tile.line, tile.lines, T(0));
    for (int64_t i = tile.line; i < tile.line + tile.lines; ++i, at += grid.width) {
      each_piece(l, tile.column, tile.column + tile.width, [&](int64_t part, int64_t first, int64_t length) {
        const int64_t k = first - tile.column;
        T& sum = column_sums_at(0, tile.width_tile, part)[i];
        if (length >= kPiece) return sum += sum_both<T>(at + k, rows + k, length), void();
        for (int64_t j = k; j < k + length; ++j) {
          const T x = load(at + j), square = x * x;
          rows[j] += square;
          sum += square;
        }
      });
    }
  }

  // Updates the means of rows and columns and computes their roots. The mean of all row means of a part is the mean of
  // its column means. If it is 0, so are the roots, and if it is infinite, so are they.
  void advance() {
    std::vector<double> sums(std::max(n, l.axis));
    std::vector<int64_t> sizes(columns.parts);
    std::vector<char> infinite(columns.parts);
    each_piece(l, 0, l.axis, [&](int64_t part, int64_t, int64_t length) { sizes[part] += length; });
    column_roots.resize(columns.parts * n);
    for (int64_t part = 0; part < columns.parts; ++part) {
      for (int64_t plane = 0; plane < grid.planes; ++plane)
        add(sums.data() + plane * extent, column_sums_at(plane, 0, part), columns.parts * extent, column_sums_of,
            extent);
      infinite[part] = advance_columns(sums.data(), sizes[part], part);
    }
    add(sums.data(), row_sums_at(0), l.axis, row_sums_of, l.axis);
    row_roots.resize(l.axis);
#pragma omp simd
    for (int64_t i = 0; i < l.axis; ++i) {
      r[i] = s.advance(r[i], sums[i] / static_cast<double>(n));
      row_roots[i] = std::sqrt(r[i]);
    }
    each_piece(l, 0, l.axis, [&](int64_t part, int64_t first, int64_t length) {
      if (infinite[part]) std::fill_n(row_roots.data() + first, length, std::numeric_limits<T>::infinity());
    });
  }

  // Updates the means of the columns of one part, computes their roots, and returns whether their mean is infinite.
  bool advance_columns(const double* sums, int64_t size, int64_t part) {
    T *means = c + part * columns.part_stride, *roots = column_roots.data() + part * n;
    double total = 0;
    columns.each(n, [&](int64_t k, int64_t offset) {
      roots[k] = means[offset] = s.advance(means[offset], sums[k] / static_cast<double>(std::max<int64_t>(1, size)));
      total += roots[k];
    });
    const T mean = static_cast<T>(total / static_cast<double>(n)), share = mean == 0 ? 1 : mean;
    if (std::isinf(mean)) return std::fill_n(roots, n, std::numeric_limits<T>::infinity()), true;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) roots[k] = std::sqrt(roots[k] / share);
    return false;
  }

  // Writes the sums of `count` arrays of n numbers, which are `stride` apart, to `sums`.
  static void add(double* sums, const T* parts, int64_t stride, int64_t count, int64_t n) {
    std::fill_n(sums, n, 0.0);
    for (int64_t k = 0; k < count; ++k, parts += stride) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sums[i] += parts[i];
    }
  }
};

// Updates the first moment and the parameter of n elements from `at` on. sqrt(v) of element i is root(i) * roots[i].
template <typename T, typename P, typename M, int R, typename F>
inline __attribute__((always_inline)) void update_products(const Tensors<T, P, M, R>& x, int64_t at, int64_t n,
                                                           const Step<T>& s, const F& root, const T* roots) {
  const T size = s.lr_corrected * s.root2, eps = s.eps * s.root2;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    store(x.m + at + i, s.beta1 * load(x.m + at + i) + s.rest1 * (s.unscale * load(x.g + at + i)));
    x.to.put(at + i, at + i, at + i, s, size / (root(i) * roots[i] + eps) * load(x.m + at + i));
  }
}

// Updates the elements of one tile, once the means of matrix o are advanced.
template <typename T, typename P, typename M, int R>
__attribute__((noinline)) void update_tile(const Tensors<T, P, M, R>& x, const Means<T, P>& means, int64_t o, int64_t number) {
  const Grid& grid = means.grid;
  const Layout& l = means.l;
  const Step<T>& s = means.s;
  const Tile tile(grid, number);
  int64_t at = ((o * grid.planes + tile.plane) * grid.lines + tile.line) * grid.width + tile.column;
  if (!grid.down) {
    return each_piece(l, tile.line, tile.line + tile.lines, [&](int64_t part, int64_t first, int64_t length) {
      const T* roots = means.column_roots.data() + part * means.n + tile.plane * grid.width + tile.column;
      for (int64_t i = first; i < first + length; ++i, at += grid.width)
        update_products(x, at, tile.width, s, SharedFactor<T>{means.row_roots[i]}, roots);
    });
  }
  const T* roots = means.row_roots.data() + tile.column;
  T short_pieces[kWidth];
  for (int64_t i = tile.line; i < tile.line + tile.lines; ++i, at += grid.width) {
    int64_t done = 0, filled = 0;  // indices from done to filled have their line's root in short_pieces
    const auto flush = [&] {
      if (done < filled)
        update_products(x, at + done, filled - done, s, ElementFactors<T>{short_pieces + done}, roots + done);
      done = filled;
    };
    each_piece(l, tile.column, tile.column + tile.width, [&](int64_t part, int64_t first, int64_t length) {
      const T root = means.column_roots[part * means.n + i];
      const int64_t k = first - tile.column;
      if (length < kPiece) return std::fill_n(short_pieces + k, length, root), filled = k + length, void();
      flush();
      update_products(x, at + k, length, s, SharedFactor<T>{root}, roots + k);
      done = filled = k + length;
    });
    flush();
  }
}

// Steps matrix o of a tensor on one thread.
template <typename T, typename P, typename M, int R>
void factored_matrix(const Task& task, int64_t o) {
  const Tensors<T, P, M, R> x(task);
  Means<T, P> means(task, o);
  const int64_t tiles = means.grid.tiles();
  for (int64_t k = 0; k < tiles; ++k) means.sum(k);
  means.advance();
  for (int64_t k = tiles - 1; k >= 0; --k) update_tile(x, means, o, k);
}

// Steps a tensor of large matrices, one after another; all threads share each of them. The update begins with the tiles
// that were read last, which may still be in cache.
template <typename T, typename P, typename M, int R>
void factored_shared(const Task& task, int threads) {
  const Tensors<T, P, M, R> x(task);
  for (int64_t o = 0; o < task.layout.outer; ++o) {
    Means<T, P> means(task, o);
    const int64_t tiles = means.grid.tiles();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t k = 0; k < tiles; ++k) means.sum(k);
    means.advance();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t k = 0; k < tiles; ++k) update_tile(x, means, o, tiles - 1 - k);
  }
}

// Steps a tensor with a quantised first moment: all means first, because a row of codes may belong to several matrices.
// Then the factors of every block are computed one after another in row-major order, in which the tensor is dense.
template <typename T, typename P, typename Q, int R>
void factored_low_bit(const Task& task, int threads) {
  const Layout& l = task.layout;
  const Step<T>& s = task.of<T>();
  const bool shares = l.numel() > kChunk;
  std::vector<Means<T, P>> means;
  means.reserve(l.outer);
  for (int64_t o = 0; o < l.outer; ++o) {
    means.emplace_back(task, o);
    const int64_t tiles = means.back().grid.tiles();
#pragma omp parallel for num_threads(threads) if (shares) schedule(dynamic, 1)
    for (int64_t k = 0; k < tiles; ++k) means.back().sum(k);
    means.back().advance();
    means.back().row_sums.reset(), means.back().column_sums.reset();
  }
  std::vector<int64_t> part_of(l.axis);
  each_piece(l, 0, l.axis, [&](int64_t part, int64_t first, int64_t length) {
    std::fill_n(part_of.begin() + first, length, part);
  });
  const T size = s.lr_corrected * s.root2, eps = s.eps * s.root2;
  const int64_t blocks = l.numel() / l.row * ((l.row + Q::kBlock - 1) / Q::kBlock), share = kChunk / Q::kBlock;
#pragma omp parallel for num_threads(threads) if (shares) schedule(static)
  for (int64_t b = 0; b < blocks; b += share) {
    T factors[kSpan];
    low_bit_blocks<T, P, Q, R>(task, b, std::min(blocks, b + share), task.way->ahead, [&](int64_t at, int64_t n) {
      // index: row-major index over the axis and all axes in front of it; k: the index behind it.
      int64_t index = at / l.inner, k = at % l.inner;
      for (int64_t i = 0; i < n; ++index, k = 0) {
        const int64_t a = index % l.axis, between = index / l.axis % l.between;
        const Means<T, P>& matrix = means[index / (l.axis * l.between)];
        const T root = matrix.row_roots[a];
        const T* roots = matrix.column_roots.data() + part_of[a] * matrix.n + between * l.inner;
        for (; k < l.inner && i < n; ++k, ++i) factors[i] = root * roots[k];
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) factors[i] = size / (factors[i] + eps);
      return ElementFactors<T>{factors};
    });
  }
}

}  // namespace adam_mini
