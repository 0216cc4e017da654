// One site's expansion and the next one's collapse as one step, on the CPU, forward and backward.
//
// What lies between them, the streams, is the largest thing in the model. A tile of tokens is expanded, and collapsed
// while it is in the first caches; on the way back its values are computed again and its gradient is never in memory.
// The loops are those of the two steps by themselves (`fused.cpp`), so the numbers are the same.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "vectors.h"

namespace {

constexpr int64_t PART = 512;  // tokens whose part of the mixing matrix's gradient is summed before the rest

#include "hyper_connection.h"

#define LOOPS "hyper_connection_kernels.h"
#include "every_vector.h"

using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// -> the streams after the first site; collapsed, post, residual, mix and inverse RMS of the second.
Tensors expand_collapse(const at::Tensor& streams, const at::Tensor& output, const at::Tensor& post,
                        const at::Tensor& residual, const at::Tensor& fn, const at::Tensor& base,
                        const at::Tensor& scale, double norm_eps, double hc_eps, int64_t iterations) {
  const int64_t n = streams.size(0), tokens = streams.size(1), width = streams.size(2), rows = fn.size(0);
  TORCH_CHECK(n == 4, "expand_collapse is compiled for 4 streams");
  const auto options = streams.options();
  at::Tensor mixed = at::empty_like(streams), collapsed = at::empty({tokens, width}, options),
             next_post = at::empty({n, tokens}, options), next_residual = at::empty({n, n, tokens}, options),
             mix = at::empty({rows, tokens}, options), inverse = at::empty({tokens}, options);
  at::Tensor fn_t = at::zeros({n * width, (rows + 15) / 16 * 16}, options);
  fn_t.narrow(1, 0, rows).copy_(fn.t());
  by_type(streams, [&](auto zero) {
    using T = decltype(zero);
    const ExpandArguments<T> e{streams.const_data_ptr<T>(), output.const_data_ptr<T>(), post.const_data_ptr<T>(),
                               residual.const_data_ptr<T>(), mixed.mutable_data_ptr<T>(), tokens, width};
    const CollapseArguments<T> c{nullptr, fn_t.const_data_ptr<T>(), base.const_data_ptr<T>(),
                                 scale.const_data_ptr<T>(), collapsed.mutable_data_ptr<T>(),
                                 next_post.mutable_data_ptr<T>(), next_residual.mutable_data_ptr<T>(),
                                 mix.mutable_data_ptr<T>(), inverse.mutable_data_ptr<T>(), tokens, width, fn_t.size(1),
                                 T(norm_eps), T(hc_eps), int(iterations)};
    const int64_t tiles = (tokens + TOKENS - 1) / TOKENS;
    at::parallel_for(0, tiles, 1 + GRAIN / (n * width * 8 * TOKENS), [&](int64_t begin, int64_t end) {
      WITH_BEST((fast::expand_collapse<T, 4>(e, c, begin * TOKENS, std::min(tokens, end * TOKENS))));
    });
  });
  return {mixed, collapsed, next_post, next_residual, mix, inverse};
}

// grad_mixed, of the streams between, may be absent. -> gradients of streams, output, post and residual; of fn, in
// parts that are yet to be summed [parts, rows, n D], and of the logits [rows, N]. Parts are cut by the number of
// tokens alone.
Tensors expand_collapse_backward(
    const std::optional<at::Tensor>& grad_mixed, const at::Tensor& grad_collapsed, const at::Tensor& grad_next_post,
    const at::Tensor& grad_next_residual, const at::Tensor& streams, const at::Tensor& output, const at::Tensor& post,
    const at::Tensor& residual, const at::Tensor& fn, const at::Tensor& base, const at::Tensor& scale,
    const at::Tensor& mix, const at::Tensor& inverse, double hc_eps, int64_t iterations) {
  const int64_t tokens = streams.size(1), width = streams.size(2), rows = fn.size(0);
  TORCH_CHECK(streams.size(0) == 4, "expand_collapse is compiled for 4 streams");
  const int64_t size = std::max(PART, width / TOKENS * TOKENS),
                parts = std::max<int64_t>(1, (tokens + size - 1) / size);
  at::Tensor grad_streams = at::empty_like(streams), grad_output = at::empty_like(output),
             grad_post = at::empty_like(post), grad_residual = at::empty_like(residual),
             grad_fn = at::zeros({parts, rows, 4 * width}, fn.options()), grad_logits = at::empty_like(mix);
  by_type(streams, [&](auto zero) {
    using T = decltype(zero);
    const ExpandGradients<T> e{streams.const_data_ptr<T>(), output.const_data_ptr<T>(), post.const_data_ptr<T>(),
                               residual.const_data_ptr<T>(), nullptr, grad_streams.mutable_data_ptr<T>(),
                               grad_output.mutable_data_ptr<T>(), grad_post.mutable_data_ptr<T>(),
                               grad_residual.mutable_data_ptr<T>(), tokens, width};
    const CollapseGradients<T> c{nullptr, fn.const_data_ptr<T>(), base.const_data_ptr<T>(), scale.const_data_ptr<T>(),
                                 mix.const_data_ptr<T>(), inverse.const_data_ptr<T>(),
                                 grad_collapsed.const_data_ptr<T>(), grad_next_post.const_data_ptr<T>(),
                                 grad_next_residual.const_data_ptr<T>(), nullptr, grad_logits.mutable_data_ptr<T>(),
                                 tokens, width, T(hc_eps), int(iterations)};
    const T* given = data<T>(grad_mixed);
    T* to = grad_fn.mutable_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * size, last = std::min(tokens, first + size);
        WITH_BEST((fast::expand_collapse_backward<T, 4>(e, c, given, first, last, to + part * rows * 4 * width)));
      }
    });
  });
  return {grad_streams, grad_output, grad_post, grad_residual, grad_fn, grad_logits};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("hc_expand_collapse(Tensor streams, Tensor output, Tensor post, Tensor residual, Tensor fn, Tensor base, "
              "Tensor scale, float norm_eps, float hc_eps, int iterations) "
              "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("hc_expand_collapse_backward(Tensor? grad_mixed, Tensor grad_collapsed, Tensor grad_next_post, "
              "Tensor grad_next_residual, Tensor streams, Tensor output, Tensor post, Tensor residual, Tensor fn, "
              "Tensor base, Tensor scale, Tensor mix, Tensor inverse, float hc_eps, int iterations) "
              "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("hc_expand_collapse", expand_collapse);
  library.impl("hc_expand_collapse_backward", expand_collapse_backward);
}
