// Finds out what the processor can do.
#include "kernels.h"

namespace pennyweight {

std::size_t instruction_sets(const char** names) {
  std::size_t count = 0;
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
  // __builtin_cpu_supports takes string literals only, so this cannot be a loop over a table.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) names[count++] = "avx2";
  if (__builtin_cpu_supports("fma")) names[count++] = "fma";
  if (__builtin_cpu_supports("avxvnni")) names[count++] = "avxvnni";
  if (__builtin_cpu_supports("avx512f")) names[count++] = "avx512f";
  if (__builtin_cpu_supports("avx512bw")) names[count++] = "avx512bw";
  if (__builtin_cpu_supports("avx512vl")) names[count++] = "avx512vl";
  if (__builtin_cpu_supports("avx512vnni")) names[count++] = "avx512vnni";
  if (__builtin_cpu_supports("avx512bf16")) names[count++] = "avx512bf16";
#elif defined(__aarch64__) || defined(_M_ARM64)
  names[count++] = "neon";  // part of the base architecture
#else
  (void)names;
#endif
  return count;
}

namespace {

Kernels combined(const char* name, const Kernels& kernels, const PackedKernels& packed) {
  Kernels both = kernels;
  both.name = name;
  both.packed = &packed;
  return both;
}

}  // namespace

std::size_t kernel_tables(Kernels* tables) {
  std::size_t count = 0;
#if defined(PENNYWEIGHT_X86_KERNELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw")) {
    if (__builtin_cpu_supports("avx512vnni")) {
      if (__builtin_cpu_supports("avx512bf16")) {
        tables[count++] = combined("avx512bf16", kAvx512Bf16Kernels, kPackedAvx512Vnni);
      }
      tables[count++] = combined("avx512vnni", kAvx512Kernels, kPackedAvx512Vnni);
    }
    tables[count++] = combined("avx512", kAvx512Kernels, kPackedAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avxvnni")) tables[count++] = combined("avx2vnni", kAvx2Kernels, kPackedAvx2Vnni);
    tables[count++] = combined("avx2", kAvx2Kernels, kPackedAvx2);
  }
#elif defined(PENNYWEIGHT_NEON_KERNELS)
  tables[count++] = combined("neon", kScalarKernels, kPackedNeon);
#endif
  tables[count++] = combined("scalar", kScalarKernels, kPackedScalar);
  return count;
}

}  // namespace pennyweight
