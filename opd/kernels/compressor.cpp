// Whole sequences' blocks of tokens become entries: a softmax over gates, channel by channel, in one pass each way.
//
// opd/kernels/fused.py joins forward and backward; the equations are those of opd/model/compressor.py. float and
// double. What a token adds to an entry is the same bits whatever other sequences there are.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>

#include "vectors.h"

namespace {

constexpr int64_t PART = 128;  // blocks whose part of the bias's gradient is summed before the rest
constexpr int64_t PARTS = 64;  // at most

// kv, gate [sequences, tokens, series], bias [ratio, series], pooled [sequences, blocks, width]. Where series is twice
// the width, blocks overlap.
template <typename T>
struct PoolArguments {
  const T *kv, *gate, *bias;
  T* pooled;
  int64_t tokens, blocks, ratio, series, width;
};

template <typename T>
struct PoolGradients {
  const T* pooled;
  T *kv, *gate;
};

#define LOOPS "compressor_kernels.h"
#include "every_vector.h"

template <typename T>
PoolArguments<T> arguments(const at::Tensor& kv, const at::Tensor& gate, const at::Tensor& bias, bool overlap,
                           T* pooled) {
  const int64_t tokens = kv.size(1), series = kv.size(2), ratio = bias.size(0);
  return {kv.const_data_ptr<T>(), gate.const_data_ptr<T>(), bias.const_data_ptr<T>(), pooled, tokens, tokens / ratio,
          ratio, series, overlap ? series / 2 : series};
}

at::Tensor pool(const at::Tensor& kv, const at::Tensor& gate, const at::Tensor& bias, bool overlap) {
  const int64_t batch = kv.size(0), ratio = bias.size(0), blocks = kv.size(1) / ratio, series = kv.size(2);
  at::Tensor pooled = at::empty({batch, blocks, overlap ? series / 2 : series}, kv.options());
  by_type(kv, [&](auto zero) {
    using T = decltype(zero);
    const PoolArguments<T> a = arguments<T>(kv, gate, bias, overlap, pooled.mutable_data_ptr<T>());
    at::parallel_for(0, batch * blocks, 1 + GRAIN / (8 * ratio * series), [&](int64_t begin, int64_t end) {
      WITH_BEST((fast::pool<T>(a, begin, end)));
    });
  });
  return pooled;
}

// -> gradients of kv, of the gate, and of the bias in parts that are yet to be summed [parts, ratio, series], which are
// cut by the number of blocks alone.
std::tuple<at::Tensor, at::Tensor, at::Tensor> pool_backward(const at::Tensor& grad, const at::Tensor& kv,
                                                             const at::Tensor& gate, const at::Tensor& bias,
                                                             bool overlap) {
  const int64_t blocks = grad.size(0) * grad.size(1);
  const int64_t size = std::max(PART, (blocks + PARTS - 1) / PARTS), parts = (blocks + size - 1) / size;
  at::Tensor grad_kv = blocks ? at::empty_like(kv) : at::zeros_like(kv),
             grad_gate = blocks ? at::empty_like(gate) : at::zeros_like(gate),
             grad_bias = at::zeros({parts, bias.size(0), bias.size(1)}, bias.options());
  by_type(kv, [&](auto zero) {
    using T = decltype(zero);
    const PoolArguments<T> a = arguments<T>(kv, gate, bias, overlap, nullptr);
    const PoolGradients<T> to{grad.const_data_ptr<T>(), grad_kv.mutable_data_ptr<T>(), grad_gate.mutable_data_ptr<T>()};
    T* sums = grad_bias.mutable_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * size, last = std::min(blocks, first + size);
        WITH_BEST((fast::pool_backward<T>(a, to, first, last, sums + part * bias.numel())));
      }
    });
  });
  return {grad_kv, grad_gate, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("pool(Tensor kv, Tensor gate, Tensor bias, bool overlap) -> Tensor");
  library.def("pool_backward(Tensor grad, Tensor kv, Tensor gate, Tensor bias, bool overlap) "
              "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("pool", pool);
  library.impl("pool_backward", pool_backward);
}
