// Linear transforms of tokens on a grid, for every channel: a matrix along rows and a matrix along columns.
//
//   tokens to tokens      Y = A_h X A_w^T           the DCTs, their inverses, resizing
//   tokens to a spectrum  Z = M_h (X R_w^T)         the real FFT, and adjoints of its inverse; M_h is complex,
//                                                   R_w [2 K, W] has the rows of real, then those of imaginary parts
//   spectrum to tokens    Y = Re (M_h Z) S_w^T      the inverse real FFT, and adjoints of the real FFT;
//                                                   S_w [W', 2 K] has the columns of real, then of imaginary parts
//
// Reads x once and writes y once. Between the two, the first axis leaves its results in a tile of the accumulation type
// that stays in cache: rows first from tokens, [H, W', block of channels]; columns first from a spectrum,
// [H', 2 K, block of channels]. A task is a block of channels of one batch element. An empty matrix_h: the token axis,
// nothing happens along columns.
//
// Multiplications are those of cpu/spectral/axis_transform.h, 10.6 an element for the DCT of 14 x 14, and take about as
// long as memory takes to deliver x and to accept y. So that the two overlap, the x of the next task is fetched while
// the second axis is computed; and large results go past the caches, as reading every line of y before writing it would
// cost as much as reading x.
#pragma once
#include <cstdint>

#include "cpu/spectral/axis_transform.h"
#include "cpu/simd.h"

namespace mlip::cpu {

// Tokens [B, prefix + rows columns, D], or the two parts of a spectrum [B, rows, columns, D]. Unit stride over channels.
template <typename T>
struct Grid {
  T *real, *imaginary;  // at the first position of the grid, behind the prefix; tokens have no imaginary part
  int64_t rows, columns;
  int64_t stride_batch, stride_row, stride_column;  // in elements, of both parts

  int64_t parts() const { return imaginary ? 2 : 1; }
  int64_t positions() const { return rows * columns; }

  Grid behind(int64_t elements) const {
    Grid result = *this;
    result.real += elements;
    if (imaginary) result.imaginary += elements;
    return result;
  }
  Strided<T> row(int64_t h) const {
    if (!imaginary) return {real + h * stride_row, stride_column};
    return {real + h * stride_row, stride_column, imaginary + h * stride_row, columns};
  }
  Strided<T> column(int64_t w) const {
    if (!imaginary) return {real + w * stride_column, stride_row};
    return {real + w * stride_column, stride_row, imaginary + w * stride_column, rows};
  }
};

template <typename T>
struct GridTransform {
  int64_t batch, channels;
  int64_t prefix;  // tokens before the grid of y: copied from x, or zeros where x is a spectrum
  AxisTransform<Accumulate<T>> matrix_h, matrix_w;
  Grid<const T> x;
  Grid<T> y;  // contiguous

  int64_t channel_blocks() const { return (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS; }
  int64_t tasks() const { return batch * channel_blocks(); }
  int64_t positions() const { return x.positions() > y.positions() ? x.positions() : y.positions(); }
  bool streamable() const {
    return can_stream(y.real, batch * (prefix + y.positions()), channels) &&
           (!y.imaginary || can_stream(y.imaginary, batch * y.positions(), channels));
  }

  // What lies between the two axes: in a row the real, then the imaginary parts.
  bool rows_first() const { return !x.imaginary; }
  int64_t tile_rows() const { return rows_first() ? x.rows : y.rows; }
  int64_t tile_columns() const { return rows_first() ? y.columns : x.columns; }
  int64_t tile_parts() const { return rows_first() ? y.parts() : x.parts(); }
  Grid<Accumulate<T>> tile(Accumulate<T>* memory, int64_t point) const {
    Accumulate<T>* imaginary = tile_parts() == 2 ? memory + tile_columns() * point : nullptr;
    return {memory, imaginary, tile_rows(), tile_columns(), 0, tile_parts() * tile_columns() * point, point};
  }

  // What a thread needs, in elements of the accumulation type: for an axis, for the tile, for padded x and y.
  int64_t axis_scratch() const {
    const int64_t rows = matrix_w.streaming_scratch(), columns = matrix_h.streaming_scratch();
    return rows > columns ? rows : columns;
  }
  int64_t tile_scratch() const {
    return matrix_h.outputs ? tile_rows() * tile_parts() * tile_columns() * BLOCK_CHANNELS : 0;
  }
  int64_t padded_scratch() const {
    const int64_t elements = x.parts() * x.positions() + y.parts() * y.positions();
    return channels % BLOCK_CHANNELS ? elements * MOST_LANES<Accumulate<T>> : 0;
  }
  int64_t scratch() const { return axis_scratch() + tile_scratch() + padded_scratch(); }
};

// Over tasks.
template <typename T>
void grid_transform(const GridTransform<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
