// What the CUDA kernels of the spectral family are made of: stages, each of which multiplies every line of a tile of
// tokens by one matrix. stages.cuh executes them and tells the story; plan.h makes them. No torch headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda::spectral {

constexpr int WARP = 32;
constexpr int WARPS = 4;
constexpr int BLOCKS = 3;  // that share the registers of a multiprocessor
constexpr int THREADS = WARP * WARPS;
constexpr int CHANNELS = 32;  // of a tile
constexpr int MOST_STAGES = 8;

// float32 on the device, with any strides; `part` leads from the real to the imaginary part of a complex one.
struct Matrix {
  const float* data = nullptr;  // null: there is none
  int64_t row = 0, column = 0, part = 0;
  int rows = 0, columns = 0;

  constexpr Matrix transposed() const { return {data, column, row, part, columns, rows}; }
};

// A matrix cut for mma.m16n8k8. A tile has rows in two halves of 8: row i and, `row_pair` further, its partner, which
// is the eighth row after it or, in Fourier maps, the imaginary part that belongs to the real part i. Columns likewise.
struct Axis {
  Matrix matrix;
  float sign;  // of a complex matrix's imaginary part; 0 where the matrix is real
  int row_tile, row_pair, row_limit, rows;
  int column_tile, column_pair, column_limit, columns;
  int m_tiles, k_steps;
  int fragments;  // where the matrix lies in shared memory, in tiles; -1: it is fetched from global memory
};

// Point i of line l is l * line + i * step, and its partner lies `pair` further.
struct Lines {
  int line, step, pair;
};

// What becomes of the products of a stage.
enum class To {
  tile,      // they are kept in the tile `to`
  tokens,    // they are tokens of the result
  spectrum,  // they are coefficients of the result
  weighted,  // kept, times the weight of each coefficient and channel
  factored,  // kept, times the factor of each coefficient
  shares,    // kept, times twice the gradient of the band of each coefficient
  scaled,    // kept, times twice the gradient of the energy of each token
  energies,  // their squares are summed over channels
  powers,    // their squares are kept
  products   // multiplied by what the tile `to` has, and added to the gradient of the weight
};

struct Stage {
  Axis axis;
  Lines in, out;  // points of tiles; for tokens, points of the result
  Lines label;    // coefficients and tokens, as the result, weights and bands count them
  int lines;
  int from, to;  // tiles; a line is replaced by its product where both are the same
  To what;
};

struct Tokens {
  const void* data;
  int64_t stride_batch, stride_token;  // in elements
  bool vector;                         // whether rows can be read 16 bytes at a time
};

// One problem. Which members are used depends on the kernel. float pointers are float32 whatever `type` is.
struct Map {
  Type type;
  int64_t batch, channels;
  int prefix;
  int coefficients, frequencies, width;  // of a spectrum: in all, in a row; the points of the row it comes from
  bool fourier;
  bool exact;  // whether the data are split too, not only the matrices

  Tokens x;
  Tokens second;                      // imaginary parts, or gradients, where two tensors are read
  int height, row, pitch, imaginary;  // of what is read: rows, points in each; in the tile: a row's, the second's start
  int first_tile, second_tile;

  void* out;
  void* out_imaginary;
  int64_t out_tokens;  // of each batch element, prefix included
  bool out_vector;
  bool copy_prefix;  // from x; else the prefix is 0

  const float* weight;  // [coefficients, D] or [coefficients, D, 2]
  bool row_vector;      // whether rows of the weight, of its gradient or of `grad` can be read 16 bytes at a time
  int kept;             // points of them in shared memory: one for each row, two for complex ones
  const float* factor;  // [coefficients]
  const int* bands;     // [coefficients]
  int table;            // how many of them are put into shared memory: all or none
  int64_t count;        // of bands
  const void* grad;     // [B, count, D] of `type`, or float [B, tokens]
  float* partial;       // sums of part of the channels, or of the batch

  int stages, second_stages;  // those behind `second_stages` belong to `second`, where that has stages of its own
  Stage stage[MOST_STAGES];
  int own_fragments;  // stages whose matrices are put into shared memory; later ones use the same
  int fragments;      // in all
  int tiles, tile_points;
  int64_t splits;    // parts into which the batch is cut, one for each row of blocks
  float* workspace;  // the tiles, where shared memory is too small for them
};

constexpr int64_t FRAGMENT_BYTES = WARP * 16;
constexpr int64_t POINT_BYTES = CHANNELS * 4;

inline int64_t column_blocks(const Map& map) { return ceil_div(map.channels, CHANNELS); }
inline int64_t tile_bytes(const Map& map) { return int64_t(map.tiles) * map.tile_points * POINT_BYTES; }
constexpr int table_entries(const Map& map) { return (map.table + WARP - 1) / WARP * WARP; }  // what follows is aligned
inline int64_t fragment_bytes(const Map& map) { return map.fragments * FRAGMENT_BYTES; }

// Grid and block of every kernel of stages: a block has 32 channels and every `splits`-th batch element.
inline Launch stages_launch(const Map& map) { return {column_blocks(map), map.splits, WARP, WARPS}; }
inline int64_t stages_shared(const Map& map) {
  const int64_t kept = int64_t(map.kept) * POINT_BYTES;
  return fragment_bytes(map) + 4 * table_entries(map) + kept + (map.workspace ? 0 : tile_bytes(map));
}

}  // namespace mlip::cuda::spectral
