// Spectral operators on tokens as passes over the axes of a grid: the problem that a CUDA kernel is given, and how it
// is built from matrices and sizes. Host code, no torch headers.
//
// A pass multiplies every row, or every column, of a tile of tokens by one matrix. spectral.cu tells which passes make
// which operator, run_passes.cuh how they are executed.
#pragma once
#include <algorithm>

#include "cuda/elements.h"

namespace mlip::cuda::spectral {

constexpr int WARPS = 4;
constexpr int THREADS = WARP * WARPS;
constexpr int BLOCKS = 3;     // that share the registers of a multiprocessor
constexpr int CHANNELS = 32;  // of a tile
constexpr int MOST_PASSES = 8;
constexpr int64_t FRAGMENT_BYTES = WARP * 16;
constexpr int64_t POINT_BYTES = CHANNELS * 4;

// --- the problem -----------------------------------------------------------------------------------------------------

// float32 on the device, with any strides; `part` leads from the real to the imaginary part of a complex one.
struct Matrix {
  const float* data = nullptr;  // null: there is none
  int64_t row = 0, column = 0, part = 0;
  int rows = 0, columns = 0;

  constexpr Matrix transposed() const { return {data, column, row, part, columns, rows}; }
};

// A matrix cut for mma.m16n8k8. A tile has rows in two halves of 8: row i and, `row_pair` further, its partner, which
// is the eighth row after it or, in Fourier transforms, the imaginary part that belongs to the real part i. Columns
// likewise.
struct AxisTransform {
  Matrix matrix;
  float sign;  // of a complex matrix's imaginary part; 0 where the matrix is real
  int row_tile, row_pair, row_limit, rows;
  int column_tile, column_pair, column_limit, columns;
  int m_tiles, k_steps;
  int fragments;  // where the matrix lies in shared memory, in tiles; -1: it is fetched from global memory
};

// Point i of line l is l * line + i * step, and its partner lies `pair` further.
struct Strides {
  int line, step, pair;
};

// What becomes of the products of a pass.
enum class Output {
  tile,            // they are kept in the tile `to`
  tokens,          // they are tokens of the result
  spectrum,        // they are coefficients of the result
  weighted,        // kept, times the weight of each coefficient and channel
  masked,          // kept, times the frequency mask
  band_gradients,  // kept, times twice the gradient of the band of each coefficient
  scaled,          // kept, times twice the gradient of the energy of each token
  energies,        // their squares are summed over channels
  powers,          // their squares are kept
  products         // multiplied by what the tile `to` has, and added to the gradient of the weight
};

struct Pass {
  AxisTransform axis;
  Strides in, out;  // points of tiles; for tokens, points of the result
  Strides label;    // coefficients and tokens, as the result, weights and bands count them
  int lines;        // rows or columns of the grid
  int from, to;     // tiles; a line is replaced by its product where both are the same
  Output output;
};

struct Tokens {
  const void* data;
  int64_t stride_batch, stride_token;  // in elements
  bool vector;                         // whether rows can be read 16 bytes at a time
};

// Which members are used depends on the kernel. float pointers are float32 whatever `type` is.
struct SpectralProblem {
  Type type;
  int64_t batch, channels;
  int prefix;
  int coefficients, frequencies, width;  // of a spectrum: in all, in a row; the points of the row it comes from
  bool fourier;
  bool exact;  // whether the data are split too, not only the matrices

  Tokens x;
  Tokens second;  // imaginary parts, or gradients, where two tensors are read
  // Of what is read: rows and points of a row; in the tile: points from row to row, where the second tensor starts.
  int height, row_points, pitch, imaginary;
  int first_tile, second_tile;

  void* out;
  void* out_imaginary;
  int64_t out_tokens;  // of each batch element, prefix included
  bool out_vector;
  bool copy_prefix;  // from x; else the prefix is 0

  const float* weight;          // [coefficients, D] or [coefficients, D, 2]
  bool row_vector;              // whether rows of the weight, of its gradient or of `grad` are read 16 bytes at a time
  int cached_points;            // of them in shared memory: one for each row, two for complex ones
  const float* frequency_mask;  // [coefficients] 1 or 0
  const int* bands;             // [coefficients]
  int table;                    // how many of either are put into shared memory: all or none
  int64_t band_count;
  const void* grad;  // [B, bands, D] of `type`, or float [B, tokens]
  float* partial;    // sums of part of the channels, or of the batch

  int num_passes, second_begin;  // those from `second_begin` on belong to `second`, where that has passes of its own
  Pass passes[MOST_PASSES];
  int own_fragments;  // passes whose matrices are put into shared memory; later ones use the same
  int fragments;      // in all
  int tiles, tile_points;
  int64_t splits;    // parts into which the batch is cut, one for each row of blocks
  float* workspace;  // the tiles, where shared memory is too small for them
};

inline int64_t column_blocks(const SpectralProblem& p) { return ceil_div(p.channels, CHANNELS); }
inline int64_t tile_bytes(const SpectralProblem& p) { return int64_t(p.tiles) * p.tile_points * POINT_BYTES; }
// What follows the table in shared memory is aligned.
constexpr int table_entries(const SpectralProblem& p) { return (p.table + WARP - 1) / WARP * WARP; }
inline int64_t shared_bytes(const SpectralProblem& p) {
  const int64_t cached = int64_t(p.cached_points) * POINT_BYTES;
  return p.fragments * FRAGMENT_BYTES + 4 * table_entries(p) + cached + (p.workspace ? 0 : tile_bytes(p));
}

// --- the kernels -----------------------------------------------------------------------------------------------------

// Each fills in passes, tiles and grid of a problem that has its tensors and sizes, and returns the kernel that solves
// it. `h` is null on the token axis; then `height` is 1, and the tokens are a grid of one column.
using Kernel = void (*)(SpectralProblem);
Kernel separable(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);
Kernel analysis(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);
Kernel synthesis(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int frequencies);
Kernel filtered(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);
// Cuts the batch into parts by the shape alone, so results do not change from one GPU to another: `partial` has one sum
// for each, which `add_weight_gradients` adds.
Kernel filtered_backward_weight(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);
Kernel band_energy(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);
Kernel band_energy_backward(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);
Kernel token_energy(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);
Kernel token_energy_backward(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width);

// Bytes of workspace that a kernel needs: where shared memory cannot hold the tiles.
int64_t workspace_bytes(Kernel kernel, const SpectralProblem& p);
void launch(Kernel kernel, const SpectralProblem& p, cudaStream_t stream);
void add_weight_gradients(const SpectralProblem& p, float* grad_weight, cudaStream_t stream);
void add_token_energies(const SpectralProblem& p, float* energy, cudaStream_t stream);

// --- how passes are built --------------------------------------------------------------------------------------------

constexpr int MOST_TILES_IN_PLACE = 4;  // of rows: as many as a warp's registers hold
constexpr int MOST_STEPS_IN_PLACE = 8;  // longer sums are made in parts
constexpr int MOST_FRAGMENTS = 32;      // of a matrix in shared memory
constexpr int MOST_IN_TABLE = 4096;     // mask entries or bands in shared memory

// Adds passes to a problem, one after another. On a grid, tiles have a row of points for each row of the grid; the
// pitch is odd, so that points below each other lie in different banks. The token axis is a grid of one column. A
// Fourier row has K real parts, then K imaginary ones.
class PassBuilder {
 public:
  // A grid of height x width tokens is read, or a spectrum in two parts.
  PassBuilder(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width, bool two_parts = false)
      : p_(p), h_(h), w_(w), grid_(h.data != nullptr), grid_height_(height) {
    pitch_ = grid_ ? std::max(w.rows, w.columns) | 1 : 1;
    p.height = grid_ ? height : width;
    p.row_points = grid_ ? width : 1;
    p.pitch = pitch_;
    p.imaginary = two_parts ? width : 0;
    p.tile_points = grid_ ? pitch_ * std::max({height, h.rows, h.columns}) : std::max(w.rows, w.columns);
    use(0);
  }

  // From tokens to coefficients, of which `output` becomes.
  void forward(Output output) {
    if (!grid_) return columns(axis_of(w_, p_.fourier, false), {0, 1, 0}, w_.rows, output);
    rows(axis_of(w_, p_.fourier, false), grid_height_, {}, Output::tile);
    const int count = p_.fourier ? w_.rows / 2 : w_.rows;
    if (p_.fourier) return columns(axis_of(h_, true, true, 1.0f), {1, count, 0}, count, output);
    columns(axis_of(h_, false, false), {1, count, 8 * count}, count, output);
  }

  // From coefficients to tokens: by the matrices as they are, or by the adjoint of `forward`.
  void inverse(Output output) { back(h_, w_, 1.0f, output); }
  void adjoint(Output output) { back(h_.transposed(), w_.transposed(), -1.0f, output); }

  // The next passes read `second`; the tile that was made so far stays where it is, for `products`.
  void begin_second() {
    held_ = tile_;
    tile_ = free_tile();
    use(tile_);
    p_.second_tile = tile_;
    p_.second_begin = p_.num_passes;
  }

  // The second half of the passes uses the matrices of the first half.
  void share_fragments() {
    const int half = p_.num_passes / 2;
    for (int s = 0; s < half; ++s) p_.passes[half + s].axis.fragments = p_.passes[s].axis.fragments;
    p_.fragments /= 2;
    p_.own_fragments = half;
  }

 private:
  // Real and imaginary parts: neither, rows, columns, or both (a complex matrix).
  static AxisTransform axis_of(const Matrix& matrix, bool rows_paired, bool columns_paired, float sign = 0) {
    AxisTransform axis{};
    axis.matrix = matrix;
    axis.sign = sign;
    const int parts = sign != 0 ? 2 : 1;
    axis.rows = parts * matrix.rows, axis.columns = parts * matrix.columns;
    axis.row_limit = rows_paired ? axis.rows / 2 : axis.rows;
    axis.column_limit = columns_paired ? axis.columns / 2 : axis.columns;
    axis.row_tile = rows_paired ? 8 : 16, axis.row_pair = rows_paired ? axis.row_limit : 8;
    axis.column_tile = columns_paired ? 4 : 8, axis.column_pair = columns_paired ? axis.column_limit : 4;
    axis.m_tiles = int(ceil_div(axis.row_limit, axis.row_tile));
    axis.k_steps = int(ceil_div(axis.column_limit, axis.column_tile));
    axis.fragments = -1;
    return axis;
  }

  void back(const Matrix& h, const Matrix& w, float sign, Output output) {
    if (!grid_) return columns(axis_of(w, false, p_.fourier), {0, 1, 8}, w.rows, output);
    if (p_.fourier) {
      columns(axis_of(h, true, true, sign), {}, w.columns / 2, Output::tile);
    } else {
      columns(axis_of(h, false, false), {}, w.columns, Output::tile);
    }
    rows(axis_of(w, false, p_.fourier), h.rows, {w.rows, 1, 8}, output);
  }

  void rows(const AxisTransform& axis, int height, const Strides& label, Output output) {
    add(axis, {pitch_, 1, axis.column_pair}, {pitch_, 1, axis.row_pair}, label, height, output);
  }

  void columns(const AxisTransform& axis, Strides label, int lines, Output output) {
    if (!grid_) {  // one column
      label.pair = axis.row_tile == 8 ? 0 : 8;
      return add(axis, {0, 1, axis.column_pair}, {0, 1, axis.row_pair}, label, 1, output);
    }
    const bool complex = axis.sign != 0;
    const int in = complex ? lines : axis.column_pair * pitch_, out = complex ? lines : axis.row_pair * pitch_;
    add(axis, {1, pitch_, in}, {1, pitch_, out}, label, lines, output);
  }

  void add(const AxisTransform& axis, const Strides& in, const Strides& out, const Strides& label, int lines,
           Output output) {
    Pass& pass = p_.passes[p_.num_passes++];
    p_.own_fragments = p_.num_passes;
    pass = {axis, in, out, label, lines, tile_, tile_, output};
    const int fragments = axis.m_tiles * axis.k_steps;
    if (fragments <= MOST_FRAGMENTS) {
      pass.axis.fragments = p_.fragments;
      p_.fragments += fragments;
    }
    const bool in_place = axis.m_tiles <= MOST_TILES_IN_PLACE && axis.k_steps <= MOST_STEPS_IN_PLACE;
    const bool to_tile = output != Output::tokens && output != Output::spectrum && output != Output::energies &&
                         output != Output::products;
    if (output == Output::products) pass.to = held_;
    if (to_tile && !in_place) pass.to = free_tile();
    if (to_tile) tile_ = pass.to;
    use(pass.to);
  }

  int free_tile() const {
    int tile = 0;
    while (tile == tile_ || tile == held_) ++tile;
    return tile;
  }

  void use(int tile) { p_.tiles = std::max(p_.tiles, tile + 1); }

  SpectralProblem& p_;
  const Matrix h_, w_;
  const bool grid_;
  const int grid_height_;
  int pitch_ = 1, tile_ = 0, held_ = -1;
};

}  // namespace mlip::cuda::spectral
