// What the model does between its matrix products, on the CPU: hyper-connections, norms with RoPE, SwiGLU, the way to
// and from rows sorted by expert, a compressor's next token. Each is one pass over memory where a chain of tensor
// operations takes many.
//
// Forward and backward of each are operators without autograd; opd/kernels/fused.py joins them. The loops are in
// fused_kernels.h, compiled for AVX-512, AVX2 and plain vectors; the best that the processor has is taken at run time.
// float and double; every tensor is contiguous, and what fused.py passes has been checked there.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "operators.h"
#include "vectors.h"

namespace {

constexpr int64_t PART = 512;            // tokens whose part of the mixing matrix's gradient is summed before the rest
constexpr int64_t WEIGHT_ROWS = 512;     // whose part of a norm weight's gradient is summed before the rest

#include "hyper_connection.h"

// inverse null: no norm. turns [turn_rows, pairs] complex; row r takes turn r / heads % turn_rows.
template <typename T>
struct NormArguments {
  const T *x, *weight, *turns;
  T *y, *inverse;
  int64_t width, heads, turn_rows, pairs;
  T eps, direction;
};

template <typename T>
struct NormGradients {
  const T *x, *weight, *turns, *inverse, *grad;
  T* grad_x;
  int64_t width, heads, turn_rows, pairs;
  T direction;
};

template <typename T>
struct SwigluArguments {
  const T *gate, *up;
  T* out;
  int64_t width, stride;
  T limit;
};

template <typename T>
struct SwigluGradients {
  const T *gate, *up, *grad;
  T *grad_gate, *grad_up;
  int64_t width, stride;
  T limit;
};

template <typename T>
struct GatherArguments {
  const T *x, *weights;
  const int64_t* places;
  T* out;
  int64_t width, per_token;
};

template <typename T>
struct GatherGradients {
  const T *x, *weights, *grad;
  const int64_t* places;
  T *grad_x, *grad_weights;
  int64_t width, per_token;
};

#define LOOPS "fused_kernels.h"
#include "every_vector.h"

// Whole tiles of tokens for each thread, so that lanes are filled alike however many threads there are.
template <typename Work>
void over_rows(int64_t rows, int64_t width, Work work) {
  const int64_t tiles = (rows + TOKENS - 1) / TOKENS;
  at::parallel_for(0, tiles, std::max<int64_t>(1, GRAIN / (TOKENS * std::max<int64_t>(1, width))),
                   [&](int64_t begin, int64_t end) { work(begin * TOKENS, std::min(rows, end * TOKENS)); });
}

}  // namespace

namespace opd {

// fn [rows, n D] as `collapse_with_panel` reads it: [n D, rows filled up with zeros to whole vectors].
at::Tensor mixing_panel(const at::Tensor& fn) {
  at::Tensor panel = at::zeros({fn.size(1), (fn.size(0) + 15) / 16 * 16}, fn.options());
  panel.narrow(1, 0, fn.size(0)).copy_(fn.t());
  return panel;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> collapse_with_panel(
    const at::Tensor& streams, const at::Tensor& panel, const at::Tensor& base, const at::Tensor& scale,
    double norm_eps, double hc_eps, int64_t iterations) {
  const int64_t n = streams.size(0), tokens = streams.size(1), width = streams.size(2), rows = base.size(0);
  TORCH_CHECK(n == 4, "collapse is compiled for 4 streams");
  const auto options = streams.options();
  at::Tensor collapsed = empty({tokens, width}, options), post = empty({n, tokens}, options),
             residual = empty({n, n, tokens}, options), mix = empty({rows, tokens}, options),
             inverse = empty({tokens}, options);
  by_type(streams, [&](auto zero) {
    using T = decltype(zero);
    const CollapseArguments<T> a{streams.const_data_ptr<T>(), panel.const_data_ptr<T>(), base.const_data_ptr<T>(),
                                 scale.const_data_ptr<T>(), collapsed.mutable_data_ptr<T>(), post.mutable_data_ptr<T>(),
                                 residual.mutable_data_ptr<T>(), mix.mutable_data_ptr<T>(),
                                 inverse.mutable_data_ptr<T>(), tokens, width, panel.size(1), T(norm_eps), T(hc_eps),
                                 int(iterations)};
    over_rows(tokens, n * width * 8, [&](int64_t begin, int64_t end) {
      WITH_BEST((fast::collapse<T, 4>(a, begin, end)));
    });
  });
  return {collapsed, post, residual, mix, inverse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> collapse(
    const at::Tensor& streams, const at::Tensor& fn, const at::Tensor& base, const at::Tensor& scale,
    double norm_eps, double hc_eps, int64_t iterations) {
  return collapse_with_panel(streams, mixing_panel(fn), base, scale, norm_eps, hc_eps, iterations);
}

// Adds to `grad_streams`. Also returns the gradients of fn, in parts that are yet to be summed [parts, rows, n D], and
// of the logits [rows, N]. Parts are cut by the number of tokens alone.
std::tuple<at::Tensor, at::Tensor> collapse_backward(
    at::Tensor grad_streams, const at::Tensor& streams, const at::Tensor& fn, const at::Tensor& base,
    const at::Tensor& scale, const at::Tensor& mix, const at::Tensor& inverse, const at::Tensor& grad_collapsed,
    const at::Tensor& grad_post, const at::Tensor& grad_residual, double hc_eps, int64_t iterations) {
  const int64_t tokens = streams.size(1), width = streams.size(2), rows = fn.size(0);
  const int64_t size = std::max(PART, width / TOKENS * TOKENS),
                parts = std::max<int64_t>(1, (tokens + size - 1) / size);
  at::Tensor grad_logits = at::empty_like(mix), grad_fn = at::zeros({parts, rows, 4 * width}, fn.options());
  TORCH_CHECK(streams.size(0) == 4, "collapse is compiled for 4 streams");
  by_type(streams, [&](auto zero) {
    using T = decltype(zero);
    const CollapseGradients<T> a{streams.const_data_ptr<T>(), fn.const_data_ptr<T>(), base.const_data_ptr<T>(),
                                 scale.const_data_ptr<T>(), mix.const_data_ptr<T>(), inverse.const_data_ptr<T>(),
                                 grad_collapsed.const_data_ptr<T>(), grad_post.const_data_ptr<T>(),
                                 grad_residual.const_data_ptr<T>(), grad_streams.mutable_data_ptr<T>(),
                                 grad_logits.mutable_data_ptr<T>(), tokens, width, T(hc_eps), int(iterations)};
    T* to = grad_fn.mutable_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * size, last = std::min(tokens, first + size);
        WITH_BEST((fast::collapse_backward<T, 4>(a, first, last, to + part * rows * 4 * width)));
      }
    });
  });
  return {grad_fn, grad_logits};
}

at::Tensor expand(const at::Tensor& streams, const at::Tensor& output, const at::Tensor& post,
                  const at::Tensor& residual) {
  at::Tensor mixed = empty(streams.sizes(), streams.options());
  const int64_t tokens = streams.size(1), width = streams.size(2);
  TORCH_CHECK(streams.size(0) == 4, "expand is compiled for 4 streams");
  by_type(streams, [&](auto zero) {
    using T = decltype(zero);
    const ExpandArguments<T> a{streams.const_data_ptr<T>(), output.const_data_ptr<T>(), post.const_data_ptr<T>(),
                               residual.const_data_ptr<T>(), mixed.mutable_data_ptr<T>(), tokens, width};
    over_rows(tokens, 4 * width, [&](int64_t begin, int64_t end) { WITH_BEST((fast::expand<T, 4>(a, begin, end))); });
  });
  return mixed;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand_backward(
    const at::Tensor& grad, const at::Tensor& streams, const at::Tensor& output, const at::Tensor& post,
    const at::Tensor& residual) {
  at::Tensor grad_streams = at::empty_like(streams), grad_output = at::empty_like(output),
             grad_post = at::empty_like(post), grad_residual = at::empty_like(residual);
  const int64_t tokens = streams.size(1), width = streams.size(2);
  TORCH_CHECK(streams.size(0) == 4, "expand is compiled for 4 streams");
  by_type(streams, [&](auto zero) {
    using T = decltype(zero);
    const ExpandGradients<T> a{streams.const_data_ptr<T>(), output.const_data_ptr<T>(), post.const_data_ptr<T>(),
                               residual.const_data_ptr<T>(), grad.const_data_ptr<T>(),
                               grad_streams.mutable_data_ptr<T>(), grad_output.mutable_data_ptr<T>(),
                               grad_post.mutable_data_ptr<T>(), grad_residual.mutable_data_ptr<T>(), tokens, width};
    over_rows(tokens, 4 * width,
              [&](int64_t begin, int64_t end) { WITH_BEST((fast::expand_backward<T, 4>(a, begin, end))); });
  });
  return {grad_streams, grad_output, grad_post, grad_residual};
}

// y of x's shape and, where `normalise`, 1 / RMS of each row.
std::tuple<at::Tensor, at::Tensor> norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& turns, int64_t heads, double eps,
                                        bool normalise, bool back) {
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  at::Tensor y = empty(x.sizes(), x.options()), inverse = empty({normalise ? rows : 0}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const NormArguments<T> a{x.const_data_ptr<T>(), data<T>(weight), data<T>(turns), y.mutable_data_ptr<T>(),
                             normalise ? inverse.mutable_data_ptr<T>() : nullptr, width, heads,
                             turns ? turns->size(0) : 1, turns ? turns->size(1) : 0, T(eps), T(back ? -1 : 1)};
    over_rows(rows, width, [&](int64_t begin, int64_t end) { WITH_BEST((fast::norm<T>(a, begin, end))); });
  });
  return {y, inverse};
}

// Gradients of x and, where asked for, of the weight (in parts, [parts, width], whose number depends on x alone).
std::tuple<at::Tensor, at::Tensor> norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const std::optional<at::Tensor>& weight,
                                                 const std::optional<at::Tensor>& turns,
                                                 const std::optional<at::Tensor>& inverse, int64_t heads, bool back,
                                                 bool with_weight) {
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  const int64_t parts = (rows + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
  at::Tensor grad_x = at::empty_like(x), grad_weight = at::zeros({with_weight ? parts : 0, width}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const NormGradients<T> a{x.const_data_ptr<T>(), data<T>(weight), data<T>(turns), data<T>(inverse),
                             grad.const_data_ptr<T>(), grad_x.mutable_data_ptr<T>(), width, heads,
                             turns ? turns->size(0) : 1, turns ? turns->size(1) : 0, T(back ? -1 : 1)};
    T* sums = grad_weight.mutable_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t from = part * WEIGHT_ROWS, to = std::min(rows, from + WEIGHT_ROWS);
        WITH_BEST((fast::norm_backward<T>(a, with_weight ? sums + part * width : nullptr, from, to)));
      }
    });
  });
  return {grad_x, grad_weight};
}

// joint: gate's rows are followed by up's, [R, 2 I]; else gate and up are [R, I] each.
at::Tensor swiglu(const at::Tensor& gate, const std::optional<at::Tensor>& up, double limit) {
  const int64_t stride = gate.size(-1), width = up ? stride : stride / 2,
                rows = gate.numel() / std::max<int64_t>(1, stride);
  auto shape = gate.sizes().vec();
  shape.back() = width;
  at::Tensor out = empty(shape, gate.options());
  by_type(gate, [&](auto zero) {
    using T = decltype(zero);
    const T* first = gate.const_data_ptr<T>();
    const SwigluArguments<T> a{first, up ? up->const_data_ptr<T>() : first + width, out.mutable_data_ptr<T>(), width,
                               stride, T(limit)};
    over_rows(rows, width * 4, [&](int64_t begin, int64_t end) { WITH_BEST((fast::swiglu<T>(a, begin, end))); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                   const std::optional<at::Tensor>& up, double limit) {
  const int64_t stride = gate.size(-1), width = up ? stride : stride / 2,
                rows = gate.numel() / std::max<int64_t>(1, stride);
  at::Tensor grad_gate = at::empty_like(gate), grad_up = up ? at::empty_like(*up) : empty({0}, gate.options());
  by_type(gate, [&](auto zero) {
    using T = decltype(zero);
    const T* first = gate.const_data_ptr<T>();
    T* to = grad_gate.mutable_data_ptr<T>();
    const SwigluGradients<T> a{first, up ? up->const_data_ptr<T>() : first + width, grad.const_data_ptr<T>(), to,
                               up ? grad_up.mutable_data_ptr<T>() : to + width, width, stride, T(limit)};
    over_rows(rows, width * 4,
              [&](int64_t begin, int64_t end) { WITH_BEST((fast::swiglu_backward<T>(a, begin, end))); });
  });
  return {grad_gate, grad_up};
}

at::Tensor gather(const at::Tensor& x, const at::Tensor& places, const std::optional<at::Tensor>& weights) {
  const int64_t tokens = places.size(0), width = x.size(1);
  at::Tensor out = empty({tokens, width}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const GatherArguments<T> a{x.const_data_ptr<T>(), data<T>(weights), places.const_data_ptr<int64_t>(),
                               out.mutable_data_ptr<T>(), width, places.size(1)};
    over_rows(tokens, width * 2, [&](int64_t begin, int64_t end) { WITH_BEST((fast::gather<T>(a, begin, end))); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> gather_backward(const at::Tensor& grad, const at::Tensor& x,
                                                   const at::Tensor& places, const at::Tensor& weights) {
  const int64_t tokens = places.size(0), width = x.size(1);
  at::Tensor grad_x = at::empty_like(x), grad_weights = at::empty_like(weights);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const GatherGradients<T> a{x.const_data_ptr<T>(), weights.const_data_ptr<T>(), grad.const_data_ptr<T>(),
                               places.const_data_ptr<int64_t>(), grad_x.mutable_data_ptr<T>(),
                               grad_weights.mutable_data_ptr<T>(), width, places.size(1)};
    over_rows(tokens, width * 2,
              [&](int64_t begin, int64_t end) { WITH_BEST((fast::gather_backward<T>(a, begin, end))); });
  });
  return {grad_x, grad_weights};
}

// Tokens of B sequences enter the rings, lengths[b] of them from position starts[b] on; -> the rows whose blocks they
// complete, the blocks' numbers, and the pooled entries. kv, gate [B, T, S], bias [ratio, S], rings [slots, R, S] by
// position; with `overlap` S is twice the width. A block is pooled when its last token is in, and a ring holds no more
// than the next block needs, so one sequence's tokens go in one after the other, as they would one call at a time.
std::tuple<at::Tensor, at::Tensor, at::Tensor> compress_step(
    const at::Tensor& kv, const at::Tensor& gate, const at::Tensor& bias, at::Tensor ring_kv, at::Tensor ring_gate,
    const at::Tensor& slots, const at::Tensor& starts, const at::Tensor& lengths, bool overlap) {
  const int64_t batch = kv.size(0), tokens = kv.size(1), series = kv.size(2), ratio = bias.size(0);
  const int64_t ring = ring_kv.size(1), width = overlap ? series / 2 : series;
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *start = starts.const_data_ptr<int64_t>(),
                *length = lengths.const_data_ptr<int64_t>();
  std::vector<int64_t> before(batch + 1, 0);  // blocks that the rows before complete
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK(length[b] <= tokens, "a row of ", length[b], " tokens among ", tokens, " columns");
    before[b + 1] = before[b] + (start[b] + length[b]) / ratio - start[b] / ratio;
  }
  at::Tensor rows = empty({before[batch]}, slots.options()), blocks = empty({before[batch]}, slots.options()),
             pooled = empty({before[batch], width}, kv.options());
  by_type(kv, [&](auto zero) {
    using T = decltype(zero);
    T *kept_kv = ring_kv.mutable_data_ptr<T>(), *kept_gate = ring_gate.mutable_data_ptr<T>();
    const T *new_kv = kv.const_data_ptr<T>(), *new_gate = gate.const_data_ptr<T>(), *added = bias.const_data_ptr<T>();
    int64_t *row = rows.mutable_data_ptr<int64_t>(), *block = blocks.mutable_data_ptr<int64_t>();
    T* out = pooled.mutable_data_ptr<T>();
    at::parallel_for(0, batch, std::max<int64_t>(1, GRAIN / (series * tokens * 8)), [&](int64_t begin, int64_t end) {
      std::vector<const T*> from_kv(2 * ratio), from_gate(2 * ratio);
      std::vector<T> weights(2 * ratio * TOKENS);
      for (int64_t b = begin; b < end; ++b) {
        int64_t closed = before[b];
        for (int64_t t = 0; t < length[b]; ++t) {
          const int64_t position = start[b] + t, at = (slot[b] * ring + position % ring) * series;
          const T *own_kv = new_kv + (b * tokens + t) * series, *own_gate = new_gate + (b * tokens + t) * series,
                  *own_bias = added + position % ratio * series;
          for (int64_t d = 0; d < series; ++d) {
            kept_kv[at + d] = own_kv[d];
            kept_gate[at + d] = own_gate[d] + own_bias[d];
          }
          if ((position + 1) % ratio) continue;
          const int64_t number = position / ratio;
          int64_t candidates = 0;
          const auto add = [&](int64_t first, int64_t offset) {
            for (int64_t p = first; p < first + ratio; ++p, ++candidates) {
              const int64_t place = (slot[b] * ring + p % ring) * series + offset;
              from_kv[candidates] = kept_kv + place;
              from_gate[candidates] = kept_gate + place;
            }
          };
          if (overlap && number > 0) add((number - 1) * ratio, 0);
          add(number * ratio, overlap ? width : 0);
          row[closed] = b;
          block[closed] = number;
          WITH_BEST((fast::pool<T>(
              from_kv.data(), from_gate.data(), candidates, width, weights.data(), out + closed * width)));
          ++closed;
        }
      }
    });
  });
  return {rows, blocks, pooled};
}

// sqrt(log(1 + e^x)), or 1 / (1 + e^-x), of every number by the same instructions wherever it stands: torch's own take
// others for the last few of a tensor.
at::Tensor affinity(const at::Tensor& logits, bool is_sigmoid) {
  at::Tensor out = empty(logits.sizes(), logits.options());
  by_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const T* from = logits.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, logits.numel(), GRAIN / 16, [&](int64_t begin, int64_t end) {
      WITH_BEST((fast::affinity<T>(from + begin, to + begin, end - begin, is_sigmoid)));
    });
  });
  return out;
}

// Copies of tokens in the order of their experts, first come first: -> each copy's token [N K], where each token's
// copies are [N, K], and the copies of each expert [experts].
std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_rows(const at::Tensor& chosen, int64_t experts) {
  const int64_t copies = chosen.numel(), per_token = chosen.size(1);
  at::Tensor source = empty({copies}, chosen.options()), places = empty(chosen.sizes(), chosen.options()),
             sizes = at::zeros({experts}, chosen.options());
  const int64_t* expert = chosen.const_data_ptr<int64_t>();
  int64_t *from = source.mutable_data_ptr<int64_t>(), *to = places.mutable_data_ptr<int64_t>(),
          *size = sizes.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < copies; ++i) {
    TORCH_CHECK(expert[i] >= 0 && expert[i] < experts, "expert ", expert[i], " is not one of ", experts);
    ++size[expert[i]];
  }
  std::vector<int64_t> next(experts);
  for (int64_t e = 1; e < experts; ++e) next[e] = next[e - 1] + size[e - 1];
  for (int64_t i = 0; i < copies; ++i) {
    to[i] = next[expert[i]]++;
    from[to[i]] = i / per_token;
  }
  return {source, places, sizes};
}

at::Tensor mxfp4_values(const at::Tensor& x) {
  at::Tensor out = empty(x.sizes(), x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel() / 32, GRAIN / 32,
                   [&](int64_t begin, int64_t end) { WITH_BEST((fast::round_mxfp4(from, to, begin, end))); });
  return out;
}

}  // namespace opd

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("hc_collapse(Tensor streams, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, "
              "int iterations) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("hc_collapse_backward(Tensor(a!) grad_streams, Tensor streams, Tensor fn, Tensor base, Tensor scale, "
              "Tensor mix, Tensor inverse, Tensor grad_collapsed, Tensor grad_post, Tensor grad_residual, "
              "float hc_eps, int iterations) -> (Tensor, Tensor)");
  library.def("hc_expand(Tensor streams, Tensor output, Tensor post, Tensor residual) -> Tensor");
  library.def("hc_expand_backward(Tensor grad, Tensor streams, Tensor output, Tensor post, Tensor residual) "
              "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def("norm(Tensor x, Tensor? weight, Tensor? turns, int heads, float eps, bool normalise, bool back) "
              "-> (Tensor, Tensor)");
  library.def("norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? turns, Tensor? inverse, int heads, "
              "bool back, bool with_weight) -> (Tensor, Tensor)");
  library.def("swiglu(Tensor gate, Tensor? up, float limit) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor gate, Tensor? up, float limit) -> (Tensor, Tensor)");
  library.def("affinity(Tensor logits, bool is_sigmoid) -> Tensor");
  library.def("compress_step(Tensor kv, Tensor gate, Tensor bias, Tensor(a!) ring_kv, Tensor(b!) ring_gate, "
              "Tensor slots, Tensor starts, Tensor lengths, bool overlap) -> (Tensor, Tensor, Tensor)");
  library.def("expert_rows(Tensor chosen, int experts) -> (Tensor, Tensor, Tensor)");
  library.def("mxfp4_values(Tensor x) -> Tensor");
  library.def("gather(Tensor x, Tensor places, Tensor? weights) -> Tensor");
  library.def("gather_backward(Tensor grad, Tensor x, Tensor places, Tensor weights) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("hc_collapse", opd::collapse);
  library.impl("hc_collapse_backward", opd::collapse_backward);
  library.impl("hc_expand", opd::expand);
  library.impl("hc_expand_backward", opd::expand_backward);
  library.impl("norm", opd::norm);
  library.impl("norm_backward", opd::norm_backward);
  library.impl("swiglu", opd::swiglu);
  library.impl("swiglu_backward", opd::swiglu_backward);
  library.impl("affinity", opd::affinity);
  library.impl("compress_step", opd::compress_step);
  library.impl("expert_rows", opd::expert_rows);
  library.impl("mxfp4_values", opd::mxfp4_values);
  library.impl("gather", opd::gather);
  library.impl("gather_backward", opd::gather_backward);
}
