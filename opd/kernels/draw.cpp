// A token for every row of logits: the first at which the cumulative distribution exceeds the row's noise, and its
// log-probability, in one pass over what stays in a core's cache.
//
// The noise is output `position` of the SplitMix64 generator that starts at the row's key, as in rollout/sampling.py,
// whose plain way this is compared with. Rows do not depend on each other. Left out: truncation.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "vectors.h"

namespace {

constexpr int64_t DRAW_BLOCK = 64;  // weights whose sum is tried before they are

#define LOOPS "draw_kernels.h"
#include "every_vector.h"

// In (0, 1), ends excluded.
double uniform(uint64_t key, uint64_t position) {
  uint64_t state = key + (position + 1) * 0x9E3779B97F4A7C15u;
  state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
  state = (state ^ state >> 27) * 0x94D049BB133111EBu;
  state ^= state >> 31;
  return (static_cast<double>(state >> 12) + 0.5) * 0x1p-52;
}

// logits float32 [N, V], keys and positions int64 [N] -> int32 [2, N]: tokens, -1 for a row that holds something that is
// not finite, and the bits of their log-probabilities at this temperature.
at::Tensor draw(const at::Tensor& logits, const at::Tensor& keys, const at::Tensor& positions, double temperature) {
  TORCH_CHECK(logits.scalar_type() == at::kFloat && logits.dim() == 2 && logits.is_contiguous(), "logits: float [N, V]");
  const int64_t rows = logits.size(0), size = logits.size(1), blocks = (size + DRAW_BLOCK - 1) / DRAW_BLOCK;
  TORCH_CHECK(keys.numel() == rows && positions.numel() == rows && size > 0, "one key and one position for each row");
  at::Tensor out = at::empty({2, rows}, logits.options().dtype(at::kInt));
  const float* from = logits.const_data_ptr<float>();
  const int64_t *key = keys.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  int32_t* to = out.mutable_data_ptr<int32_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / (8 * size)), [&](int64_t begin, int64_t end) {
    std::vector<float> weights(blocks * DRAW_BLOCK);
    std::vector<double> sums(blocks);
    for (int64_t row = begin; row < end; ++row) {
      float largest = 0;
      bool finite = false;
      const float* x = from + row * size;
      WITH_BEST(finite = fast::weigh(x, size, float(temperature), weights.data(), sums.data(), largest))
      if (!finite) {
        to[row] = -1, to[rows + row] = 0;
        continue;
      }
      double mass = 0;
      for (const double sum : sums) mass += sum;
      const double threshold = uniform(key[row], position[row]) * mass;
      double before = 0;
      int64_t block = 0;
      while (block + 1 < blocks && before + sums[block] <= threshold) before += sums[block++];
      int64_t token = block * DRAW_BLOCK;
      const int64_t end_of_block = std::min(size, token + DRAW_BLOCK);
      while (token < end_of_block && before + weights[token] <= threshold) before += weights[token++];
      // Should rounding let the end be missed: the last one that has added something.
      while (token == end_of_block || (token > 0 && before + weights[token] == before)) --token;
      const float log_probability = static_cast<float>(x[token] / float(temperature) - largest - std::log(mass));
      to[row] = token;
      std::memcpy(to + rows + row, &log_probability, sizeof(float));
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("draw(Tensor logits, Tensor keys, Tensor positions, float temperature) -> Tensor");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) { library.impl("draw", draw); }
