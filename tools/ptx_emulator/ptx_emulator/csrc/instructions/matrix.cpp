// ldmatrix, stmatrix, mma.sync: fragments of matrices spread over the lanes of a warp.
//
// Lane l holds row l / 4 of an 8x8 matrix of 16-bit elements, columns 2 (l mod 4) and the next. Products are summed in
// double and rounded once; the hardware aligns and truncates, and differs in the last bits.
#include "elements.h"

namespace ptx {
namespace {

constexpr int TILE = 8;
using Tile = uint16_t[TILE][TILE];

uint32_t shared_offset(uint64_t address) {
  return uint32_t(address >= SHARED_WINDOW ? address - SHARED_WINDOW : address);
}

// Lane 8 n + r gives the address of row r of tile n.
void load_matrix(Warp& warp, const Instruction& i, Mask mask) {
  warp.need_all_lanes(i, mask);
  const uint64_t* const base = warp.row(i.address.base);
  Tile tiles[4] = {};
  for (int n = 0; n < i.vector; ++n) {
    uint64_t rows[WARP_SIZE] = {};
    for (int r = 0; r < TILE; ++r) {
      const int lane = n * TILE + r;
      rows[r] = shared_offset(base[lane] + uint64_t(i.address.offset));
      const uint8_t* from = warp.block.reach_readily(warp, lane, rows[r], 16);
      if (!from) from = warp.block.reach(warp, i, lane, Space::shared, rows[r], 16, AccessKind::read);
      if (from) std::memcpy(tiles[n][r], from, 16);
    }
    if (warp.block.grid.options.statistics) warp.block.grid.statistics.count_shared(rows, 0xff, 16, false);
  }
  for (int n = 0; n < i.vector; ++n) {
    uint64_t* const to = warp.destination(i, size_t(n));
    const Tile& tile = tiles[n];
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t first = i.transposed ? tile[c][r] : tile[r][c];
      const uint32_t second = i.transposed ? tile[c + 1][r] : tile[r][c + 1];
      to[lane] = second << 16 | first;
    }
  }
}

void store_matrix(Warp& warp, const Instruction& i, Mask mask) {
  warp.need_all_lanes(i, mask);
  const uint64_t* const base = warp.row(i.address.base);
  for (int n = 0; n < i.vector; ++n) {
    const uint64_t* const from = warp.source(i, size_t(n));
    Tile tile;
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      (i.transposed ? tile[c][r] : tile[r][c]) = uint16_t(from[lane]);
      (i.transposed ? tile[c + 1][r] : tile[r][c + 1]) = uint16_t(from[lane] >> 16);
    }
    uint64_t rows[WARP_SIZE] = {};
    for (int r = 0; r < TILE; ++r) {
      const int lane = n * TILE + r;
      rows[r] = shared_offset(base[lane] + uint64_t(i.address.offset));
      const auto* const stored = reinterpret_cast<const uint8_t*>(tile[r]);
      uint8_t* to = warp.block.reach(warp, i, lane, Space::shared, rows[r], 16, AccessKind::write, stored);
      if (to) std::memcpy(to, stored, 16);
    }
    if (warp.block.grid.options.statistics) warp.block.grid.statistics.count_shared(rows, 0xff, 16, true);
  }
}

void read_tiles(const Mnemonic& mnemonic, Instruction& i) {
  if (!mnemonic.has("m8n8")) unsupported(mnemonic);
  i.vector = mnemonic.has("x4") ? 4 : mnemonic.has("x2") ? 2 : 1;
  i.space = Space::shared;
  i.access_bytes = 16;
}

void decode_load_matrix(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  read_tiles(mnemonic, i);
  i.destinations = operands.rows();
  operands.expect(",");
  i.address = operands.address(nullptr);
  i.execute = load_matrix;
}

void decode_store_matrix(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  read_tiles(mnemonic, i);
  i.address = operands.address(nullptr);
  operands.expect(",");
  i.sources = operands.rows();
  i.execute = store_matrix;
}

// --- mma.sync.m16n8k* ---

constexpr int M = 16, N = 8, MOST_K = 32;

double element(uint64_t bits, int n, Type type) {
  switch (type) {
    case Type::f16:
      return half_to_float(uint16_t(bits >> 16 * n));
    case Type::bf16:
      return bfloat_to_float(uint16_t(bits >> 16 * n));
    case Type::tf32:
      return to_tf32(uint32_t(bits));
    case Type::s8:
      return int8_t(bits >> 8 * n);
    default:
      return uint8_t(bits >> 8 * n);
  }
}

int bytes_of_element(Type type) { return type == Type::tf32 ? 4 : size_of(type); }

// The types of A and B; they differ at most in signedness.
Type type_of_a(const Instruction& i) { return Type(i.operation); }
Type type_of_b(const Instruction& i) { return i.source_type; }

void multiply_matrices(Warp& warp, const Instruction& i, Mask mask) {
  warp.need_all_lanes(i, mask);
  const int k = i.shape[2], per_register = 4 / bytes_of_element(type_of_a(i));
  const int a_registers = M * k / (WARP_SIZE * per_register), b_registers = N * k / (WARP_SIZE * per_register);
  double a[M][MOST_K], b[MOST_K][N], sums[M][N];
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    const int group = lane / 4, within = lane % 4;
    for (int n = 0; n < per_register; ++n) {
      for (int r = 0; r < a_registers; ++r) {
        const int row = group + r % 2 * 8, column = within * per_register + n + r / 2 * 4 * per_register;
        a[row][column] = element(warp.source(i, size_t(r))[lane], n, type_of_a(i));
      }
      for (int r = 0; r < b_registers; ++r) {
        const int row = within * per_register + n + r * 4 * per_register;
        b[row][group] = element(warp.source(i, size_t(a_registers + r))[lane], n, type_of_b(i));
      }
    }
  }
  const size_t c = size_t(a_registers + b_registers);
  const auto accumulators = [&](auto visit) {
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
      for (int n = 0; n < 4; ++n) visit(lane, n, sums[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2]);
    }
  };
  accumulators([&](int lane, int n, double& sum) {
    sum = i.type == Type::f16   ? half_to_float(uint16_t(warp.source(i, c + size_t(n / 2))[lane] >> n % 2 * 16))
          : i.type == Type::f32 ? double(bit_cast<float>(uint32_t(warp.source(i, c + size_t(n))[lane])))
                                : double(int32_t(warp.source(i, c + size_t(n))[lane]));
  });
  for (int row = 0; row < M; ++row) {
    for (int step = 0; step < k; ++step) {
      for (int column = 0; column < N; ++column) sums[row][column] += a[row][step] * b[step][column];
    }
  }
  accumulators([&](int lane, int n, double& sum) {
    if (i.type == Type::f16) {
      uint64_t& to = warp.destination(i, size_t(n / 2))[lane];
      const uint64_t half = double_to_half(sum);
      to = n % 2 ? (to & 0xffff) | half << 16 : half;
    } else {
      warp.destination(i, size_t(n))[lane] =
          i.type == Type::f32 ? bit_cast<uint32_t>(float(sum)) : uint32_t(int64_t(sum));
    }
  });
  warp.block.grid.statistics.matrix_instructions += 1;
  warp.block.grid.statistics.matrix_macs += uint64_t(M * N * k);
}

bool is_known(const std::vector<Type>& types, const std::array<int, 3>& shape) {
  if (types.size() != 4 || shape[0] != M || shape[1] != N || types[0] != types[3]) return false;
  const Type d = types[0], a = types[1], b = types[2];
  const int k = shape[2];
  if (a == Type::f16 && b == Type::f16) return (d == Type::f16 || d == Type::f32) && (k == 8 || k == 16);
  if (a == Type::bf16 && b == Type::bf16) return d == Type::f32 && (k == 8 || k == 16);
  if (a == Type::tf32 && b == Type::tf32) return d == Type::f32 && (k == 4 || k == 8);
  const auto is_byte = [](Type type) { return type == Type::s8 || type == Type::u8; };
  return is_byte(a) && is_byte(b) && d == Type::s32 && (k == 16 || k == 32);
}

void decode_multiply(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  const auto shape = mnemonic.shape();
  const bool plain = mnemonic.has("sync") && mnemonic.has("row") && mnemonic.has("col");
  if (!shape || !plain || i.saturate || mnemonic.has("satfinite") || !is_known(mnemonic.types, *shape)) {
    unsupported(mnemonic);
  }
  i.shape = *shape;
  i.operation = int(mnemonic.types[1]);
  i.source_type = mnemonic.types[2];
  i.destinations = operands.rows();
  for (int n = 0; n < 3; ++n) {
    operands.expect(",");
    const std::vector<Row> rows = operands.rows();
    i.sources.insert(i.sources.end(), rows.begin(), rows.end());
  }
  i.execute = multiply_matrices;
}

}  // namespace

void add_matrix(InstructionSet& set) {
  set.add("ldmatrix", {Type::b16}, decode_load_matrix);
  set.add("stmatrix", {Type::b16}, decode_store_matrix);
  set.add("mma", {Type::f16, Type::f32, Type::s32}, decode_multiply);
}

}  // namespace ptx
