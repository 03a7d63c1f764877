// Finds out what the processor can do.
#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(PENNYWEIGHT_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pennyweight {

namespace {

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__APPLE__)
  return true;
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP, which old headers lack
#else
  return false;
#endif
}
#endif

#if defined(PENNYWEIGHT_AMX)
// Whether the processor has matrix instructions for bytes. By hand: older compilers do not know their names.
bool has_matrices() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTiles) != 0 && (d & kBytes) != 0;
}

// Linux lets a process use their registers once it has asked; all its threads may then, and those of its children.
bool may_use_matrices() {
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return has_matrices() && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

}  // namespace

std::size_t instruction_sets(const char** names) {
  std::size_t count = 0;
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
  // __builtin_cpu_supports takes string literals only, so this cannot be a loop over a table.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) names[count++] = "avx2";
  if (__builtin_cpu_supports("fma")) names[count++] = "fma";
#if defined(PENNYWEIGHT_AVX2VNNI)  // older compilers do not know the name
  if (__builtin_cpu_supports("avxvnni")) names[count++] = "avxvnni";
#endif
  if (__builtin_cpu_supports("avx512f")) names[count++] = "avx512f";
  if (__builtin_cpu_supports("avx512bw")) names[count++] = "avx512bw";
  if (__builtin_cpu_supports("avx512vl")) names[count++] = "avx512vl";
#if defined(PENNYWEIGHT_AVX512VNNI)
  if (__builtin_cpu_supports("avx512vnni")) names[count++] = "avx512vnni";
#endif
#if defined(PENNYWEIGHT_AVX512BF16)
  if (__builtin_cpu_supports("avx512bf16")) names[count++] = "avx512bf16";
#endif
#if defined(PENNYWEIGHT_AMX)
  if (has_matrices()) names[count++] = "amx_int8";
#endif
#elif defined(__aarch64__)
  names[count++] = "neon";  // part of the base architecture
  if (has_dot_products()) names[count++] = "asimddp";
#else
  (void)names;
#endif
  return count;
}

namespace {

// With the best products that go with these kernels.
Kernels combined(const char* name, const Kernels& kernels, const PackedKernels& packed) {
  Kernels both = kernels;
  both.name = name;
  both.packed = &packed;
  return both;
}

#if defined(PENNYWEIGHT_AMX)
// Made here, since code of packed_amx.cc must not run on processors that lack its instructions.
const PackedKernels& packed_amx() {
  static const PackedKernels kernels = [] {
    PackedKernels with_matrices = kPackedAvx512Vnni;
    with_matrices.matrix_from = kMatrixBlock;
    with_matrices.multiply = multiply_by_matrices;
    return with_matrices;
  }();
  return kernels;
}
#endif

}  // namespace

std::size_t kernel_tables(Kernels* tables) {
  std::size_t count = 0;
#if defined(PENNYWEIGHT_AVX512) || defined(PENNYWEIGHT_AVX2)
  __builtin_cpu_init();
#endif
#if defined(PENNYWEIGHT_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw")) {
#if defined(PENNYWEIGHT_AVX512VNNI)
    if (__builtin_cpu_supports("avx512vnni")) {
#if defined(PENNYWEIGHT_AVX512BF16)
      if (__builtin_cpu_supports("avx512bf16")) {
#if defined(PENNYWEIGHT_AMX)
        if (may_use_matrices()) tables[count++] = combined("amx", kAvx512Bf16Kernels, packed_amx());
#endif
        tables[count++] = combined("avx512bf16", kAvx512Bf16Kernels, kPackedAvx512Vnni);
      }
#endif
      tables[count++] = combined("avx512vnni", kAvx512Kernels, kPackedAvx512Vnni);
    }
#endif
    tables[count++] = combined("avx512", kAvx512Kernels, kPackedAvx512);
  }
#endif
#if defined(PENNYWEIGHT_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
#if defined(PENNYWEIGHT_AVX2VNNI)
    if (__builtin_cpu_supports("avxvnni")) tables[count++] = combined("avx2vnni", kAvx2Kernels, kPackedAvx2Vnni);
#endif
    tables[count++] = combined("avx2", kAvx2Kernels, kPackedAvx2);
  }
#endif
#if defined(PENNYWEIGHT_NEON)
  if (has_dot_products()) tables[count++] = combined("neon", kScalarKernels, kPackedNeon);
#endif
  tables[count++] = combined("scalar", kScalarKernels, kPackedScalar);
  return count;
}

}  // namespace pennyweight
