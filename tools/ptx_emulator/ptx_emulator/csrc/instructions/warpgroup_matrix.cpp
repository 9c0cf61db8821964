// wgmma (sm_90a): products of 64 x k and k x n matrices by four warps, B and optionally A in shared memory.
//
// A product runs when the warp waits for its group; until then its accumulators read as NaN. The hardware may read the
// operands in shared memory at any time from issue to wait: both ends are checked, and the later one gives the values.
// Each warp computes the 16 rows that are its own. Fences between the proxies are not modelled: a missing
// fence.proxy.async goes unnoticed.
#include "elements.h"

namespace ptx {
namespace {

constexpr int ROWS = 16;  // of each warp
constexpr uint64_t PENDING = 0x7fc0dead;

int bytes_of_element(const Instruction& i) { return i.source_type == Type::tf32 ? 4 : 2; }

float to_number(uint32_t bits, Type type) {
  return type == Type::tf32   ? to_tf32(bits)
         : type == Type::bf16 ? bfloat_to_float(uint16_t(bits))
                              : half_to_float(uint16_t(bits));
}

// Where an element of a matrix in shared memory lies: the canonical layouts of the PTX ISA's matrix descriptors.
class SharedMatrix {
 public:
  SharedMatrix(uint64_t descriptor, bool major_is_k, int element_bytes)
      : base_(uint32_t(descriptor & 0x3fff) << 4),
        leading_(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride_(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        swizzle_(int(descriptor >> 62)),
        major_is_k_(major_is_k),
        element_(element_bytes) {}

  // Element `index` along M or N, `k` along K.
  uint32_t offset(int index, int k) const {
    static constexpr int ROW_BYTES[] = {16, 128, 64, 32};
    static constexpr uint32_t SWIZZLE[] = {0, 0x70, 0x30, 0x10};
    const uint32_t row_bytes = uint32_t(ROW_BYTES[swizzle_]), element = uint32_t(element_);
    const uint32_t i = uint32_t(index), j = uint32_t(k);
    uint32_t offset;
    if (major_is_k_) {
      const uint32_t chunk = j * element / 16, within = j * element % 16;
      offset = i % 8 * row_bytes + i / 8 * stride_ + chunk * (swizzle_ == 0 ? leading_ : 16) + within;
    } else {
      const uint32_t per_chunk = 16 / element, chunk = i / per_chunk, within = i % per_chunk * element;
      const uint32_t chunks_per_row = row_bytes / 16;
      offset = swizzle_ == 0 ? chunk * stride_ + j % 8 * 16 + j / 8 * leading_ + within
                             : chunk % chunks_per_row * 16 + chunk / chunks_per_row * leading_ + j % 8 * row_bytes +
                                   j / 8 * stride_ + within;
    }
    offset += base_;
    return offset ^ (offset >> 3 & SWIZZLE[swizzle_]);
  }

 private:
  uint32_t base_, leading_, stride_;
  int swizzle_;
  bool major_is_k_;
  int element_;
};

// The operation's bits: whether A and B are transposed, that is, contiguous along M and N.
bool a_is_k_major(const Instruction& i) { return !(i.operation & 1); }
bool b_is_k_major(const Instruction& i) { return !(i.operation & 2); }

std::vector<std::vector<uint64_t>> values_of(Warp& warp, const Instruction& i) {
  std::vector<std::vector<uint64_t>> values;
  for (const Row r : i.destinations) values.emplace_back(warp.row(r), warp.row(r) + WARP_SIZE);
  return values;
}

constexpr int CHUNK = 16;  // bytes that lie together in every layout

// Calls use(bytes, index, step) for the chunks of rows `first` to `first` + `count` along M or N: the elements from
// (index, step) on, along K, or along the rows where the matrix is transposed. `bytes` is null after a fault.
template <class Use>
void for_chunks(Warp& warp, const Instruction& i, uint64_t descriptor, bool major_is_k, int first, int count, Use use) {
  const int k = i.shape[2], element = bytes_of_element(i), together = CHUNK / element;
  const SharedMatrix matrix(descriptor, major_is_k, element);
  for (int index = first; index < first + count; index += major_is_k ? 1 : together) {
    for (int step = 0; step < k; step += major_is_k ? together : 1) {
      const uint32_t offset = matrix.offset(index, step);
      const uint8_t* bytes = warp.block.reach_readily(warp, 0, offset, CHUNK);
      if (!bytes) bytes = warp.block.reach(warp, i, 0, Space::shared, offset, CHUNK, AccessKind::read);
      use(bytes, index, step);
    }
  }
}

int first_row_of(const Warp& warp) { return warp.index % 4 * ROWS; }

void check_operands(Warp& warp, const WarpgroupProduct& product) {
  const Instruction& i = *product.instruction;
  const auto ignore = [](const uint8_t*, int, int) {};
  if (product.a.empty()) {
    for_chunks(warp, i, product.a_descriptor, a_is_k_major(i), first_row_of(warp), ROWS, ignore);
  }
  for_chunks(warp, i, product.b_descriptor, b_is_k_major(i), 0, i.shape[1], ignore);
}

void run(Warp& warp, const WarpgroupProduct& product, std::vector<std::vector<uint64_t>>& accumulators) {
  const Instruction& i = *product.instruction;
  const int n = i.shape[1], k = i.shape[2], element = bytes_of_element(i), first_row = first_row_of(warp);
  std::vector<double> a(product.a.begin(), product.a.end()), b(size_t(k * n)), sums(size_t(ROWS * n));
  const auto store_to = [&](double* to, int first, int row_stride, int step_stride, bool major_is_k) {
    return [=, &i](const uint8_t* bytes, int row, int step) {
      for (int x = 0; x < CHUNK / element; ++x) {
        uint32_t bits = 0;
        if (bytes) std::memcpy(&bits, bytes + x * element, size_t(element));
        double& place =
            to[(row - first + (major_is_k ? 0 : x)) * row_stride + (step + (major_is_k ? x : 0)) * step_stride];
        place = bytes ? to_number(bits, i.source_type) : std::numeric_limits<double>::quiet_NaN();
      }
    };
  };
  if (product.a.empty()) {
    a.resize(size_t(ROWS * k));
    const auto store = store_to(a.data(), first_row, k, 1, a_is_k_major(i));
    for_chunks(warp, i, product.a_descriptor, a_is_k_major(i), first_row, ROWS, store);
  }
  for_chunks(warp, i, product.b_descriptor, b_is_k_major(i), 0, n, store_to(b.data(), 0, 1, n, b_is_k_major(i)));
  const bool half = i.type == Type::f16;
  const auto visit = [&](auto action) {
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
      for (int x = 0; x < n / 2; ++x) {
        const int row = lane / 4 + x / 2 % 2 * 8, column = x / 4 * 8 + lane % 4 * 2 + x % 2;
        action(accumulators[size_t(half ? x / 2 : x)][size_t(lane)], x, sums[size_t(row * n + column)]);
      }
    }
  };
  visit([&](uint64_t& bits, int x, double& sum) {
    if (product.accumulate) {
      sum = half ? half_to_float(uint16_t(bits >> x % 2 * 16)) : bit_cast<float>(uint32_t(bits));
    }
  });
  for (int row = 0; row < ROWS; ++row) {
    for (int step = 0; step < k; ++step) {
      const double factor = a[size_t(row * k + step)];
      for (int column = 0; column < n; ++column)
        sums[size_t(row * n + column)] += factor * b[size_t(step * n + column)];
    }
  }
  visit([&](uint64_t& bits, int x, double& sum) {
    if (half) {
      const uint64_t rounded = double_to_half(sum);
      bits = x % 2 ? (bits & 0xffff) | rounded << 16 : (bits & 0xffff0000) | rounded;
    } else {
      bits = bit_cast<uint32_t>(float(sum));
    }
  });
  warp.block.grid.statistics.matrix_instructions += 1;
  warp.block.grid.statistics.matrix_macs += uint64_t(ROWS * n * k);
}

// A from registers: four rows of 32-bit values, as for mma.m16n8k16.
std::vector<float> a_from_registers(Warp& warp, const Instruction& i) {
  const int k = i.shape[2], per_register = 4 / bytes_of_element(i);
  std::vector<float> a(size_t(ROWS * k));
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const uint32_t bits = uint32_t(warp.source(i, size_t(r))[lane]);
      for (int n = 0; n < per_register; ++n) {
        const int row = lane / 4 + r % 2 * 8, column = lane % 4 * per_register + n + r / 2 * 4 * per_register;
        a[size_t(row * k + column)] = to_number(bits >> 16 * n, i.source_type);
      }
    }
  }
  return a;
}

bool same_everywhere(const uint64_t* values) {
  return std::all_of(values, values + WARP_SIZE, [&](uint64_t value) { return value == values[0]; });
}

void issue(Warp& warp, const Instruction& i, Mask mask) {
  warp.need_all_lanes(i, mask);
  const size_t operands = i.sources.size();
  const bool in_registers = operands > 3;
  const uint64_t* const b = warp.source(i, operands - 2);
  if (!same_everywhere(b) || (!in_registers && !same_everywhere(warp.source(i, 0)))) {
    warp.fault(FaultKind::matrix, i, 0, "the lanes of the warp give different descriptors");
  }
  WarpgroupProduct product{&i, warp.source(i, 0)[0], b[0], {}, (warp.source(i, operands - 1)[0] & 1) != 0};
  if (in_registers) product.a = a_from_registers(warp, i);
  // The first product in flight on these accumulators finds their values, the next ones what it leaves.
  auto& accumulators = warp.products.accumulators;
  if (!accumulators.count(i.destinations.front())) accumulators[i.destinations.front()] = values_of(warp, i);
  for (const Row r : i.destinations) std::fill_n(warp.row(r), WARP_SIZE, PENDING);
  check_operands(warp, product);
  warp.products.open.push_back(std::move(product));
}

void commit_group(Warp& warp, const Instruction&, Mask) {
  warp.products.committed.push_back(std::move(warp.products.open));
  warp.products.open.clear();
}

bool in_flight(const WarpgroupProducts& products, Row accumulator) {
  const auto uses = [&](const WarpgroupProduct& product) {
    return product.instruction->destinations.front() == accumulator;
  };
  return std::any_of(products.open.begin(), products.open.end(), uses) ||
         std::any_of(products.committed.begin(), products.committed.end(),
                     [&](const auto& group) { return std::any_of(group.begin(), group.end(), uses); });
}

// All but the latest `operation` groups are done.
void wait_group(Warp& warp, const Instruction& i, Mask) {
  WarpgroupProducts& products = warp.products;
  while (products.committed.size() > size_t(i.operation)) {
    const std::vector<WarpgroupProduct> group = std::move(products.committed.front());
    products.committed.pop_front();
    for (const WarpgroupProduct& product : group) {
      run(warp, product, products.accumulators[product.instruction->destinations.front()]);
    }
    for (const WarpgroupProduct& product : group) {
      const std::vector<Row>& rows = product.instruction->destinations;
      const auto finished = products.accumulators.find(rows.front());
      if (finished == products.accumulators.end() || in_flight(products, rows.front())) continue;
      for (size_t r = 0; r < rows.size(); ++r) {
        std::copy(finished->second[r].begin(), finished->second[r].end(), warp.row(rows[r]));
      }
      products.accumulators.erase(finished);
    }
  }
  warp.product_registers.nothing_in_flight();
  const auto still_in_flight = [&](const std::vector<WarpgroupProduct>& group) {
    for (const WarpgroupProduct& product : group) warp.product_registers.in_flight(*product.instruction);
  };
  std::for_each(products.committed.begin(), products.committed.end(), still_in_flight);
  still_in_flight(products.open);
}

void fence(Warp& warp, const Instruction&, Mask) { warp.product_registers.fence(); }

void decode_product(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  const auto shape = mnemonic.shape();
  const std::vector<Type>& types = mnemonic.types;
  const bool known = types.size() == 3 && types[1] == types[2] &&
                     (types[1] == Type::f16 || types[1] == Type::bf16 || types[1] == Type::tf32) &&
                     (types[0] == Type::f32 || (types[0] == Type::f16 && types[1] == Type::f16));
  if (!shape || (*shape)[0] != 64 || !known || mnemonic.has("sp")) unsupported(mnemonic);
  i.warpgroup_product = true;
  i.shape = *shape;
  i.space = Space::shared;
  i.access_bytes = CHUNK;
  i.destinations = operands.rows();
  operands.expect(",");
  const bool in_registers = operands.next_is("{");
  i.sources = operands.rows();
  for (int n = 0; n < 2; ++n) {  // the descriptor of B, and whether to accumulate
    operands.expect(",");
    i.sources.push_back(operands.row());
  }
  std::vector<int> flags;  // scale A, scale B, transpose A (where it is in shared memory), transpose B
  while (operands.accept(",")) flags.push_back(operands.immediate());
  if (flags.size() < 2 || flags[0] != 1 || flags[1] != 1) unsupported(mnemonic);
  flags.resize(4);
  i.operation = in_registers ? flags[2] << 1 : flags[2] | flags[3] << 1;
  i.execute = issue;
}

void decode(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (mnemonic.has("fence")) {
    i.execute = fence;
  } else if (mnemonic.has("commit_group")) {
    i.execute = commit_group;
  } else if (mnemonic.has("wait_group")) {
    i.operation = operands.immediate();
    i.execute = wait_group;
  } else {
    decode_product(mnemonic, operands, i);
  }
}

}  // namespace

void add_warpgroup_matrix(InstructionSet& set) { set.add("wgmma", {Type::none, Type::f16, Type::f32}, decode); }

}  // namespace ptx
