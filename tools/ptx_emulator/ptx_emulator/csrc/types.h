// The scalar types of PTX, and the state spaces of its memory.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace ptx {

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2,
  tf32,
};

std::optional<Type> type_named(const std::string& name);
const char* name_of(Type type);

constexpr int size_of(Type type) {
  switch (type) {
    case Type::b8:
    case Type::u8:
    case Type::s8:
    case Type::pred:
      return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64:
      return 8;
    default:
      return 4;
  }
}

constexpr bool is_signed(Type type) { return type >= Type::s8 && type <= Type::s64; }
constexpr bool is_float(Type type) { return type >= Type::f16; }
constexpr bool is_packed(Type type) { return type == Type::f16x2 || type == Type::bf16x2; }

// The value of a register, read as an integer of `type`.
inline uint64_t zero_extend(uint64_t bits, Type type) {
  switch (size_of(type)) {
    case 1:
      return uint8_t(bits);
    case 2:
      return uint16_t(bits);
    case 4:
      return uint32_t(bits);
    default:
      return bits;
  }
}

inline int64_t sign_extend(uint64_t bits, Type type) {
  switch (size_of(type)) {
    case 1:
      return int8_t(bits);
    case 2:
      return int16_t(bits);
    case 4:
      return int32_t(bits);
    default:
      return int64_t(bits);
  }
}

inline int64_t as_integer(uint64_t bits, Type type) {
  return is_signed(type) ? sign_extend(bits, type) : int64_t(zero_extend(bits, type));
}

enum class Space : uint8_t { generic, global, constant, shared, local, param };

const char* name_of(Space space);

// Where shared and local memory begin in the generic address space. Addresses of the host lie below.
constexpr uint64_t SHARED_WINDOW = uint64_t(1) << 60;
constexpr uint64_t LOCAL_WINDOW = uint64_t(2) << 60;

inline Space space_of_generic(uint64_t address) {
  return address >= LOCAL_WINDOW ? Space::local : address >= SHARED_WINDOW ? Space::shared : Space::global;
}

}  // namespace ptx
