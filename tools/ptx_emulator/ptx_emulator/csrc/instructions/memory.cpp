// ld, st.
#include "elements.h"

namespace ptx {
namespace {

// What a load that failed returns: NaN in every float type.
constexpr uint64_t NOTHING = 0x7fc0dead7fc0deadull;

// Shared addresses are 32 bits wide; anything else stays as it is.
uint64_t address_of(const Instruction& i, uint64_t base) {
  const uint64_t address = base + uint64_t(i.address.offset);
  return i.space == Space::shared && address < SHARED_WINDOW ? uint32_t(address) : address;
}

void count(Warp& warp, const Instruction& i, Mask mask, const uint64_t* addresses, bool store) {
  Grid& grid = warp.block.grid;
  if (!grid.options.statistics) return;
  const uint64_t first = addresses[__builtin_ctz(mask)];
  const Space space = i.space == Space::generic ? space_of_generic(first) : i.space;
  const int bytes = size_of(i.type) * i.vector;
  if (space == Space::global) grid.statistics.count_global(grid.memory, addresses, mask, bytes, store);
  if (space == Space::shared) grid.statistics.count_shared(addresses, mask, bytes, store);
}

// A signed value narrower than its register is extended.
uint64_t extended(uint64_t value, const Instruction& i) {
  if (!is_signed(i.type)) return value;
  const uint64_t wide = uint64_t(sign_extend(value, i.type));
  return i.extend_to_64 ? wide : zero_extend(wide, size_of(i.type) < 8 ? Type::b32 : Type::b64);
}

void load_parameter(Warp& warp, const Instruction& i, Mask mask) {
  const int size = size_of(i.type);
  const uint64_t* const base = warp.row(i.address.base);
  for_lanes(mask, [&](int lane) {
    const uint64_t offset = base[lane] + uint64_t(i.address.offset);
    const uint8_t* from = warp.block.grid.request.parameters.data() + offset;
    for (int n = 0; n < i.vector; ++n) {
      uint64_t value = 0;
      std::memcpy(&value, from + n * size, size_t(size));
      warp.destination(i, size_t(n))[lane] = extended(value, i);
    }
  });
}

void load(Warp& warp, const Instruction& i, Mask mask) {
  const int size = size_of(i.type), bytes = size * i.vector;
  const uint64_t* const base = warp.row(i.address.base);
  uint64_t addresses[WARP_SIZE] = {};
  for_lanes(mask, [&](int lane) { addresses[lane] = address_of(i, base[lane]); });
  count(warp, i, mask, addresses, false);
  for_lanes(mask, [&](int lane) {
    const uint8_t* from =
        i.space == Space::shared ? warp.block.reach_readily(warp, lane, addresses[lane], bytes) : nullptr;
    if (!from) from = warp.block.reach(warp, i, lane, i.space, addresses[lane], bytes, AccessKind::read);
    for (int n = 0; n < i.vector; ++n) {
      uint64_t value = 0;
      if (from) {
        std::memcpy(&value, from + n * size, size_t(size));
      } else {
        value = zero_extend(NOTHING, i.type);
      }
      warp.destination(i, size_t(n))[lane] = extended(value, i);
    }
  });
}

// Lanes that store different values to one address in one instruction.
void check_collisions(Warp& warp, const Instruction& i, Mask mask, const uint64_t* addresses) {
  bool ascending = true;
  int before = -1;
  for_lanes(mask, [&](int lane) {
    ascending = ascending && (before < 0 || addresses[before] < addresses[lane]);
    before = lane;
  });
  if (ascending) return;
  for_lanes(mask, [&](int lane) {
    if (i.space == Space::generic && space_of_generic(addresses[lane]) == Space::local) return;
    for_lanes(mask & ((Mask(1) << lane) - 1), [&](int other) {
      if (addresses[other] != addresses[lane]) return;
      for (int n = 0; n < i.vector; ++n) {
        const uint64_t* const values = warp.source(i, size_t(n));
        if (zero_extend(values[lane] ^ values[other], i.type) == 0) continue;
        warp.fault(FaultKind::warp_race, i, lane,
                   "lane " + std::to_string(other) + " stores another value to the same address");
      }
    });
  });
}

void store(Warp& warp, const Instruction& i, Mask mask) {
  const int size = size_of(i.type), bytes = size * i.vector;
  const uint64_t* const base = warp.row(i.address.base);
  uint64_t addresses[WARP_SIZE] = {};
  for_lanes(mask, [&](int lane) { addresses[lane] = address_of(i, base[lane]); });
  count(warp, i, mask, addresses, true);
  if (warp.block.grid.options.races && i.space != Space::local && !i.exempt) check_collisions(warp, i, mask, addresses);
  for_lanes(mask, [&](int lane) {
    uint8_t bytes_stored[64];
    for (int n = 0; n < i.vector; ++n)
      std::memcpy(bytes_stored + n * size, &warp.source(i, size_t(n))[lane], size_t(size));
    uint8_t* to = warp.block.reach(warp, i, lane, i.space, addresses[lane], bytes, AccessKind::write, bytes_stored);
    if (to) std::memcpy(to, bytes_stored, size_t(bytes));
  });
}

void read_address(Operands& operands, Instruction& i) { i.address = operands.address(&i.space); }

void finish(const Mnemonic& mnemonic, Operands& operands, Instruction& i, size_t elements) {
  if (operands.accept(",")) operands.row();  // a cache policy
  i.vector = int(elements);
  i.type = i.source_type;  // ld.param::entry and the like name one type, at the end
  const int bytes = size_of(i.type) * i.vector;
  if (bytes & (bytes - 1) || bytes > 64) unsupported(mnemonic);
  i.access_bytes = bytes;
  i.exempt = mnemonic.has("volatile") || mnemonic.has("relaxed") || mnemonic.has("acquire") || mnemonic.has("release");
}

void decode_load(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  i.destinations = operands.rows();
  operands.expect(",");
  read_address(operands, i);
  finish(mnemonic, operands, i, i.destinations.size());
  i.extend_to_64 = operands.has_64_bits(i.destinations.front());
  if (i.space == Space::param) i.access_bytes = 0;
  i.execute = i.space == Space::param ? load_parameter : load;
}

void decode_store(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  read_address(operands, i);
  if (i.space == Space::param || i.space == Space::constant) unsupported(mnemonic);
  operands.expect(",");
  i.sources = operands.rows();
  finish(mnemonic, operands, i, i.sources.size());
  i.execute = store;
}

}  // namespace

void add_memory(InstructionSet& set) {
  const std::vector<Type> stored =
      both(both({Type::b8, Type::u8, Type::s8}, both(BITS, INTEGERS)), {Type::f32, Type::f64});
  set.add("ld", stored, decode_load);
  set.add("ldu", stored, decode_load);
  set.add("st", stored, decode_store);
}

}  // namespace ptx
