// What the sources of this folder share: room for results (`empty.cpp`), and the operators, for C++ that makes several
// of them in a row (`step.cpp`). Each is described where it is.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace opd {

using Maybe = std::optional<at::Tensor>;

// A tensor of anything, on the CPU.
at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options);

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);
void products(const at::Tensor& a, const at::Tensor& b, at::Tensor& out, bool add);
void products_by_rows(const at::Tensor& a, const at::Tensor& b, at::IntArrayRef sizes, at::Tensor& out);
at::Tensor fp4_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales, at::IntArrayRef sizes,
                      int64_t num_features, const std::string& path);

at::Tensor mixing_panel(const at::Tensor& fn);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> collapse_with_panel(
    const at::Tensor& streams, const at::Tensor& panel, const at::Tensor& base, const at::Tensor& scale,
    double norm_eps, double hc_eps, int64_t iterations);
at::Tensor expand(const at::Tensor& streams, const at::Tensor& output, const at::Tensor& post,
                  const at::Tensor& residual);
std::tuple<at::Tensor, at::Tensor> norm(const at::Tensor& x, const Maybe& weight, const Maybe& turns, int64_t heads,
                                        double eps, bool normalise, bool back);
at::Tensor swiglu(const at::Tensor& gate, const Maybe& up, double limit);
at::Tensor affinity(const at::Tensor& logits, bool is_sigmoid);
std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_rows(const at::Tensor& chosen, int64_t experts);
at::Tensor gather(const at::Tensor& x, const at::Tensor& places, const Maybe& weights);
at::Tensor mxfp4_values(const at::Tensor& x);

std::tuple<at::Tensor, at::Tensor, at::Tensor> compress_step(
    const at::Tensor& kv, const at::Tensor& gate, const at::Tensor& bias, at::Tensor ring_kv, at::Tensor ring_gate,
    const at::Tensor& slots, const at::Tensor& starts, const at::Tensor& lengths, bool overlap);
at::Tensor index_pick(const at::Tensor& query, const at::Tensor& weights, const at::Tensor& pool,
                      const at::Tensor& table, const at::Tensor& visible, int64_t k, bool is_mxfp4);
at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& own, const at::Tensor& ring,
                            const Maybe& entries, const at::Tensor& sinks, const at::Tensor& slots,
                            const at::Tensor& starts, const at::Tensor& lengths, const at::Tensor& pages,
                            const Maybe& visible, const Maybe& picks, int64_t most_visible);

}  // namespace opd
