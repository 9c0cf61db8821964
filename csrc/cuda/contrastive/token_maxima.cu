// Means of the best similarity of every token, for every pair of an image b and a text c, in both directions:
//
//   per_image[b, c] = sum_n w_bn max_m <v_bn, t_cm>        per_text[c, b] = sum_m w_cm max_n <v_bn, t_cm>
//
// and the index of the best token for each (the first of equals), over tokens that are not masked; w are normalized
// weights.
//
//   v [B, N, D], t [C, M, D] float32, float16 or bfloat16       the rest float32, indices of 1, 2 or 4 bytes
//
//   reads     B N D v, C M D t, the weights and masks; texts again for every image, from the L2 cache
//   writes    8 B C, and where they are wanted B C (N + M) indices and maxima
//   flops     2 B C N M D
//
// What is asked of L2: a block that keeps its image in shared memory loads 64 tokens of texts for each tile of 64 x 64,
// D element bytes each: 64 flops per byte in half precision and 32 in float32, where five products make 160 of them;
// half of that where the image does not fit and is loaded again. A100 does 312 TFLOP/s in bfloat16 and L2 has 5120
// bytes a clock, 43 flops per byte; H100 does 989 TFLOP/s with what is taken to be 5.5 TB/s, 180 flops per byte. TF32
// is half as fast. So it is bound by the tensor cores on A100, and on H100 in float32; in half precision on H100 it is
// bound by L2, at a third of what the tensor cores could do. Only rows make that more, and 49 tokens fill no more than
// 64: that takes tiles of two images. Tiles of 64 x 128 load no less.
//
// The B C N M similarities exist as one tile for each block. A block owns an image and several texts. Real tokens alone
// are multiplied: those of the image are rows, in tiles of 64 of which groups of 16 are computed; those of its texts
// are columns, 64 at a time, the tokens of one text right behind those of the one before. So masked tokens cost nothing
// but a look at the mask, and of 49 x 77 tokens 3 of 4 multiply-adds are useful. Warp w has columns 16 w to 16 w + 15
// of all rows; float32 is split (elements.h), half precision is not. Sums run over a piece of 128 bytes of the
// channels, and these sums over all pieces.
//
// Columns are reduced in the accumulators and by shuffles. For the rows the tile goes to shared memory, where thread r
// walks along row r: it carries the maximum of the text that a tile breaks off, so a text may be as long as it likes.
// Sums over rows are trees over 32 rows, sums over a text's tokens run in order and compensated: no atomics, and the
// bits of a pair depend on nothing around it.
#include "cuda/contrastive/contrastive.h"

#include "cuda/contrastive/tile.cuh"

namespace mlip::cuda::contrastive {
namespace {

constexpr int TILE_PITCH = TILE + 5;  // reading rows meets no bank twice, storing products none more than twice
constexpr int FIRST = 1, LAST = 2, INDEX = 4;  // of the real tokens of a text; what an index is multiplied by
constexpr int MOST_TEXT_TOKENS = 2048;         // that a block has, where a text has no more
constexpr int LEAST_TEXT_TOKENS = 4 * TILE;
constexpr int BLOCKS_WANTED = 6;  // for each multiprocessor: twice what it holds

// What a block keeps besides the operands and the row states.
struct alignas(16) Shared {
  int64_t offset[TILE];  // of each column's token
  float tile[TILE * TILE_PITCH];
  float column_maxima[TILE];
  int column_argmax[TILE];           // row
  int column_text[TILE];             // counted from the block's first
  int column_info[TILE];             // INDEX * token + flags
  float sums[TILE][2];               // over rows, by the two warps that walk along them
  float text_sum[2], text_error[2];  // of the text that a tile breaks off, and of the one before it
  int counts[WARPS];
};

__device__ inline void store_index(void* indices, int bytes, int64_t at, int index) {
  if (bytes == 1) {
    static_cast<uint8_t*>(indices)[at] = uint8_t(index);
  } else if (bytes == 2) {
    static_cast<uint16_t*>(indices)[at] = uint16_t(index);
  } else {
    static_cast<int32_t*>(indices)[at] = index;
  }
}

// Of the real tokens of the image: their indices, and of the text that a tile breaks off, the best similarity so far
// and its token.
struct RowState {
  float* maxima;
  uint16_t *argmax, *valid;
};

// Thread r goes along row r of a tile, and writes what it has found where a text ends.
__device__ inline void walk_rows(const TokenMaxima& p, Shared& shared, const RowState& state, int b, int first_text,
                                 int tile, int height, int width, bool goes_on) {
  const int thread = threadIdx.x, row = tile * TILE + thread;
  const bool real = thread < height;
  const int token = real ? state.valid[row] : 0;
  const float weight = real ? p.images.weight[int64_t(b) * p.images.count + token] : 0.0f;
  float value = real && goes_on ? state.maxima[row] : 0.0f;
  int argmax = real && goes_on ? state.argmax[row] : 0;
  for (int column = 0; column < width; ++column) {
    const int info = shared.column_info[column];
    const float other = real ? shared.tile[thread * TILE_PITCH + column] : 0.0f;
    if (info & FIRST || beats(other, value)) {
      value = other;
      argmax = info / INDEX;
    }
    if (!(info & LAST)) continue;
    const int64_t at = (int64_t(b) * p.texts.batch + first_text + shared.column_text[column]) * p.images.count + token;
    if (real && p.text_maxima) p.text_maxima[at] = value;
    if (real && p.argmax_text) store_index(p.argmax_text, p.argmax_text_bytes, at, argmax);
    float sum = real ? weight * value : 0.0f;
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    float& sums = shared.sums[column][thread / WARP];
    if (thread % WARP == 0) sums = tile == 0 ? sum : sums + sum;
  }
  if (real) {
    state.maxima[row] = value;
    state.argmax[row] = uint16_t(argmax);
  }
}

// Writes the result of a column, and at the first column of a text, or of its part in this tile, the (partial) mean
// over the text. Sums carried from tile to tile are double-buffered: write slot `next`, read the other one.
__device__ inline void write_column(const TokenMaxima& p, Shared& shared, const RowState& state, int b, int first_text,
                                    int column, int width, int next) {
  const int64_t text = int64_t(first_text) + shared.column_text[column];
  const int info = shared.column_info[column];
  const int64_t at = (int64_t(b) * p.texts.batch + text) * p.texts.count + info / INDEX;
  if (p.image_maxima) p.image_maxima[at] = shared.column_maxima[column];
  if (p.argmax_image) store_index(p.argmax_image, p.argmax_image_bytes, at, state.valid[shared.column_argmax[column]]);
  if (column > 0 && !(info & FIRST)) return;

  const float* weight = p.texts.weight + text * p.texts.count;
  float sum = info & FIRST ? 0.0f : shared.text_sum[1 - next];
  float error = info & FIRST ? 0.0f : shared.text_error[1 - next];
  bool last = false;
  for (int c = column; c < width && !last; ++c) {
    const int column_info = shared.column_info[c];
    const float term = weight[column_info / INDEX] * shared.column_maxima[c] - error, more = sum + term;
    error = isfinite(more) ? (more - sum) - term : 0.0f;
    sum = more;
    last = column_info & LAST;
  }
  if (last) {
    p.per_text[text * p.images.batch + b] = sum;
  } else {
    shared.text_sum[next] = sum;
    shared.text_error[next] = error;
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 4 ? 2 : 3)
    contrastive_token_maxima_kernel(const __grid_constant__ TokenMaxima p) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int row_limit = int(ceil_div(p.images.count, TILE)) * TILE;
  const int pieces = int(ceil_div(p.channels * int64_t(sizeof(T)), PIECE * 4));
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint32_t* columns = reinterpret_cast<uint32_t*>(memory + sizeof(Shared));
  uint32_t* rows = columns + (p.held ? pieces : p.stages) * OPERAND;
  RowState state;
  state.maxima = reinterpret_cast<float*>(rows + (p.resident ? row_limit / TILE * pieces : p.stages) * OPERAND);
  state.argmax = reinterpret_cast<uint16_t*>(state.maxima + row_limit);
  state.valid = state.argmax + row_limit;
  uint16_t* valid_texts = state.valid + row_limit;

  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int images = int(p.images.batch), b = int(blockIdx.x) % images;
  const int first_text = int(blockIdx.x) / images * p.texts_per_block;
  const int64_t texts_left = p.texts.batch - first_text;
  const int texts = int(texts_left < p.texts_per_block ? texts_left : p.texts_per_block);
  const int text_count = p.texts.count;

  const int row_count =
      find_valid_indices(p.images.mask, int64_t(b) * p.images.count, p.images.count, state.valid, shared.counts);
  const int column_count = find_valid_indices(p.texts.mask, int64_t(first_text) * text_count, texts * text_count,
                                              valid_texts, shared.counts);
  if (row_count == 0 || column_count == 0) return;

  const auto row_offset = [&](int tile) {
    return [&, tile](int row) {
      return b * p.images.stride_batch + state.valid[tile * TILE + row] * p.images.stride_token;
    };
  };
  const auto rows_of = [&](int tile) { return row_count - tile * TILE < TILE ? row_count - tile * TILE : TILE; };
  const auto channel = [&](int piece) { return int64_t(piece) * (PIECE * 4 / sizeof(T)); };
  const int row_tiles = int(ceil_div(row_count, TILE));
  if (p.resident) {
    for (int tile = 0; tile < row_tiles; ++tile) {
      for (int piece = 0; piece < pieces; ++piece) {
        copy_piece<T>(rows + (tile * pieces + piece) * OPERAND, p.images, row_offset(tile), rows_of(tile),
                      (rows_of(tile) + 15) / 16 * 16, channel(piece), p.channels);
      }
    }
  }

  for (int start = 0; start < column_count; start += TILE) {
    const int width = column_count - start < TILE ? column_count - start : TILE;
    if (thread < width) {
      const int at = start + thread, index = valid_texts[at], text = index / text_count, token = index % text_count;
      const bool first = at == 0 || valid_texts[at - 1] / text_count != text;
      const bool last = at + 1 == column_count || valid_texts[at + 1] / text_count != text;
      shared.offset[thread] = (first_text + text) * p.texts.stride_batch + token * p.texts.stride_token;
      shared.column_text[thread] = text;
      shared.column_info[thread] = token * INDEX + (first ? FIRST : 0) + (last ? LAST : 0);
    }
    __syncthreads();  // the columns are known

    const int eighths_left = (width - 16 * warp + 7) / 8;
    const int eighths = eighths_left < 0 ? 0 : eighths_left < 2 ? eighths_left : 2;
    float maxima[4];
    int argmax[4];
    for (int tile = 0; tile < row_tiles; ++tile) {
      const int height = rows_of(tile), groups = (height + 15) / 16;
      const auto copy = [&](int piece) {
        const int stage = piece % p.stages;
        if (tile == 0 || !p.held) {
          copy_piece<T>(
              columns + (p.held ? piece : stage) * OPERAND, p.texts, [&](int column) { return shared.offset[column]; },
              width, (width + 7) / 8 * 8, channel(piece), p.channels);
        }
        if (!p.resident) {
          copy_piece<T>(rows + stage * OPERAND, p.images, row_offset(tile), height, groups * 16, channel(piece),
                        p.channels);
        }
        __pipeline_commit();
      };
      float sums[GROUPS][2][4] = {};
      copy(0);
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        if (p.stages > 1 && piece + 1 < pieces) {
          copy(piece + 1);
          __pipeline_wait_prior(1);
        } else {
          __pipeline_wait_prior(0);
        }
        __syncthreads();  // the piece is there
        const int64_t words = ceil_div((p.channels - channel(piece)) * int64_t(sizeof(T)), 4);
        const uint32_t* left = rows + (p.resident ? tile * pieces + piece : piece % p.stages) * OPERAND;
        const uint32_t* right = columns + (p.held ? piece : piece % p.stages) * OPERAND + 16 * warp * PITCH;
        multiply_piece<T>(sums, left, right, groups, eighths, words < PIECE ? int(words) : PIECE);
        if (piece + 1 == pieces) break;
        __syncthreads();  // the piece has been read
        if (p.stages == 1) copy(piece + 1);
      }

      float tile_maxima[4];
      int tile_argmax[4];
      reduce_columns(sums, height, tile_maxima, tile_argmax);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (tile == 0 || beats(tile_maxima[c], maxima[c])) {
          maxima[c] = tile_maxima[c];
          argmax[c] = tile * TILE + tile_argmax[c];
        }
      }
#pragma unroll
      for (int m = 0; m < GROUPS; ++m) {
        if (m >= groups) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = 16 * m + i / 2 % 2 * 8 + lane / 4, column = 16 * warp + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (i / 4 < eighths) shared.tile[row * TILE_PITCH + column] = sums[m][i / 4][i % 4];
        }
      }
      __syncthreads();  // the tile is there

      if (thread < TILE) walk_rows(p, shared, state, b, first_text, tile, height, width, start > 0);
    }

    if (lane < 4) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = 16 * warp + c / 2 * 8 + lane * 2 + c % 2;
        shared.column_maxima[column] = maxima[c];
        shared.column_argmax[column] = argmax[c];
      }
    }
    __syncthreads();  // columns and sums are there

    if (thread < width && shared.column_info[thread] & LAST) {
      p.per_image[b * p.texts.batch + first_text + shared.column_text[thread]] =
          shared.sums[thread][0] + shared.sums[thread][1];
    }
    const int column = thread - TILE;
    if (column >= 0 && column < width) write_column(p, shared, state, b, first_text, column, width, start / TILE % 2);
    __syncthreads();  // the columns may be replaced
  }
}

int64_t valid_texts(const TokenMaxima& p) { return int64_t(p.texts_per_block) * p.texts.count; }

int64_t shared_bytes(const TokenMaxima& p) {
  const int64_t tiles = ceil_div(p.images.count, TILE), pieces = ceil_div(p.channels * size_of(p.type), PIECE * 4);
  const int64_t operands = (p.held ? pieces : p.stages) + (p.resident ? tiles * pieces : p.stages);
  return int64_t(sizeof(Shared)) + operands * OPERAND * 4 + tiles * TILE * 8 + valid_texts(p) * 2;
}

// As many texts for a block as fill its list of valid tokens, unless that leaves part of the GPU without work. A block
// has enough of them that its last tile, which is not full, does not matter.
int texts_per_block(const TokenMaxima& p, int multiprocessors) {
  const int64_t most = p.texts.count < MOST_TEXT_TOKENS ? MOST_TEXT_TOKENS / p.texts.count : 1;
  const int64_t wanted = ceil_div(int64_t(multiprocessors) * BLOCKS_WANTED, p.images.batch);
  const int64_t worth = ceil_div(p.texts.batch * p.texts.count, LEAST_TEXT_TOKENS);
  const int64_t least = ceil_div(p.texts.batch, most), groups = wanted < worth ? wanted : worth;
  return int(ceil_div(p.texts.batch, groups < least ? least : groups));
}

template <typename T>
void launch(const TokenMaxima& p, cudaStream_t stream) {
  const int64_t bytes = shared_bytes(p);
  const auto kernel = contrastive_token_maxima_kernel<T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  kernel<<<unsigned(token_maxima_blocks(p)), THREADS, size_t(bytes), stream>>>(p);
}

}  // namespace

bool choose_tiling(TokenMaxima& p) {
  int index = 0, multiprocessors = 0, shared = 0, reserved = 0;
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, index);
  p.texts_per_block = texts_per_block(p, multiprocessors);
  const int most_stages = p.channels * size_of(p.type) > PIECE * 4 ? 2 : 1;
  // Two blocks hide each other's waiting; what is kept or in flight is worth less than that.
  for (const int blocks : {2, 1}) {
    for (int stages = most_stages; stages > 0; --stages) {
      for (const bool resident : {true, false}) {
        for (const bool held : {true, false}) {
          if (held && p.images.count <= TILE) continue;  // the texts are read once as it is
          p.stages = stages;
          p.resident = resident;
          p.held = held;
          if (blocks * (shared_bytes(p) + reserved) <= shared) return true;
        }
      }
    }
  }
  return false;
}

int64_t token_maxima_blocks(const TokenMaxima& p) {
  return p.images.batch * ceil_div(p.texts.batch, p.texts_per_block);
}

void token_maxima(const TokenMaxima& p, cudaStream_t stream) {
  dispatch(p.type, [&](auto element) { launch<decltype(element)>(p, stream); });
}

}  // namespace mlip::cuda::contrastive
