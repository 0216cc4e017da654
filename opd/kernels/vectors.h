// Which vector instructions the loops are compiled for, and the choice among them at run time.
//
// A file that has loops includes this, and its *_kernels.h through every_vector.h.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#define OPD_X86 1
#define AVX2_KERNEL __attribute__((target("avx2,fma")))
#define AVX512_KERNEL __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")))

inline bool has_avx512() {
  static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return found;
}

inline bool has_avx2() {
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
}

// Makes CALL, in which `fast` is the namespace of the best instructions that the processor has.
#define WITH_BEST(CALL)      \
  if (has_avx512()) {        \
    namespace fast = avx512; \
    CALL;                    \
  } else if (has_avx2()) {   \
    namespace fast = avx2;   \
    CALL;                    \
  } else {                   \
    namespace fast = plain;  \
    CALL;                    \
  }
#else
#define WITH_BEST(CALL)     \
  {                         \
    namespace fast = plain; \
    CALL;                   \
  }
#endif

constexpr int TOKENS = 16;          // in lanes together, whatever the vectors
constexpr int64_t GRAIN = 1 << 15;  // numbers below which a second thread costs more than it saves

template <typename Work>
void by_type(const at::Tensor& x, Work work) {
  if (x.scalar_type() == at::kFloat) {
    work(float{});
  } else {
    work(double{});
  }
}

template <typename T>
const T* data(const std::optional<at::Tensor>& x) {
  return x.has_value() ? x->const_data_ptr<T>() : nullptr;
}
