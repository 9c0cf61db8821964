// Compiles the file named by MLIP_KERNELS once per instruction set; see cpu/simd.h. Everything that file needs from
// the standard library is included here, outside the namespaces.
#ifndef MLIP_VECTOR_BYTES  // a file that names itself comes by here again
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/types.h"

#if MLIP_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own AVX-512 header
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define MLIP_BF16_DOT 0
#define MLIP_VECTOR_BYTES 16
namespace mlip::cpu::baseline {
#include "cpu/vector.h"
#include MLIP_KERNELS
}  // namespace mlip::cpu::baseline
#undef MLIP_VECTOR_BYTES

#if MLIP_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define MLIP_VECTOR_BYTES 32
namespace mlip::cpu::avx2 {
#include "cpu/vector.h"
#include MLIP_KERNELS
}  // namespace mlip::cpu::avx2
#undef MLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define MLIP_VECTOR_BYTES 64
namespace mlip::cpu::avx512 {
#include "cpu/vector.h"
#include MLIP_KERNELS
}  // namespace mlip::cpu::avx512
#undef MLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if MLIP_X86_BF16 && defined(MLIP_BF16_COPY)
#undef MLIP_BF16_DOT
#define MLIP_BF16_DOT 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define MLIP_VECTOR_BYTES 64
namespace mlip::cpu::avx512_bf16 {
#include "cpu/vector.h"
#include MLIP_KERNELS
}  // namespace mlip::cpu::avx512_bf16
#undef MLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#endif  // MLIP_X86
#endif  // MLIP_VECTOR_BYTES
