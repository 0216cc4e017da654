// A token for every row of logits: the first at which the cumulative distribution exceeds the row's noise, and its
// log-probability, in one pass over what stays in a core's cache.
//
// The noise is output `position` of the SplitMix64 generator that starts at the row's key, as in rollout/sampling.py,
// whose plain way this is compared with. Rows do not depend on each other. Left out: truncation.

#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <cstring>

#include "operators.h"
#include "vectors.h"

namespace {

constexpr int64_t DRAW_BLOCK = 64;  // weights whose sum is tried before they are
constexpr int64_t LEAST_ROWS = 4;   // of a thread
constexpr int64_t MOST_ROWS = 32;   // whose logits exist at a time, and that the head need not be packed for
constexpr int64_t SMALL = 8 << 20;  // bytes of a head that every thread may read

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

// Rows `begin` .. `end` of logits [.., V] that start at row `begin`: to[row], to[rows + row].
void draw_rows(const float* logits, int64_t size, const int64_t* keys, const int64_t* positions, float temperature,
               int64_t begin, int64_t end, int64_t rows, int32_t* to) {
  const int64_t blocks = (size + DRAW_BLOCK - 1) / DRAW_BLOCK;
  std::vector<float> weights(blocks * DRAW_BLOCK);
  std::vector<double> sums(blocks);
  for (int64_t row = begin; row < end; ++row) {
    float largest = 0;
    bool finite = false;
    const float* x = logits + (row - begin) * size;
    WITH_BEST(finite = fast::weigh(x, size, temperature, weights.data(), sums.data(), largest))
    if (!finite) {
      to[row] = -1, to[rows + row] = 0;
      continue;
    }
    double mass = 0;
    for (const double sum : sums) mass += sum;
    const double threshold = uniform(keys[row], positions[row]) * mass;
    double before = 0;
    int64_t block = 0;
    while (block + 1 < blocks && before + sums[block] <= threshold) before += sums[block++];
    int64_t token = block * DRAW_BLOCK;
    const int64_t end_of_block = std::min(size, token + DRAW_BLOCK);
    while (token < end_of_block && before + weights[token] <= threshold) before += weights[token++];
    // Should rounding let the end be missed: the last one that has added something.
    while (token == end_of_block || (token > 0 && before + weights[token] == before)) --token;
    const float log_probability = static_cast<float>(x[token] / temperature - largest - std::log(mass));
    to[row] = token;
    std::memcpy(to + rows + row, &log_probability, sizeof(float));
  }
}

at::Tensor room(const at::Tensor& x, const at::Tensor& keys, const at::Tensor& positions) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 2 && x.is_contiguous(), "rows: float [N, ..]");
  TORCH_CHECK(keys.numel() == x.size(0) && positions.numel() == x.size(0), "one key and one position for each row");
  return opd::empty({2, x.size(0)}, x.options().dtype(at::kInt));
}

// logits float32 [N, V], keys and positions int64 [N] -> int32 [2, N]: tokens, -1 for a row that holds something that
// is not finite, and the bits of their log-probabilities at this temperature.
at::Tensor draw(const at::Tensor& logits, const at::Tensor& keys, const at::Tensor& positions, double temperature) {
  at::Tensor out = room(logits, keys, positions);
  const int64_t rows = logits.size(0), size = logits.size(1);
  const float* from = logits.const_data_ptr<float>();
  const int64_t *key = keys.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  int32_t* to = out.mutable_data_ptr<int32_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / (8 * size)), [&](int64_t begin, int64_t end) {
    draw_rows(from + begin * size, size, key, position, float(temperature), begin, end, rows, to);
  });
  return out;
}

// The same of the logits hidden [N, D] head [V, D]^T. Threads take rows, not vocabulary, where they can all keep the
// head in a shared cache.
at::Tensor draw_next(const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& keys,
                     const at::Tensor& positions, double temperature) {
  const int64_t rows = hidden.size(0), size = head.size(0);
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), rows / LEAST_ROWS);
  if (shares < 2 || head.nbytes() > SMALL) return draw(opd::linear(hidden, head), keys, positions, temperature);
  at::Tensor out = room(hidden, keys, positions);
  const int64_t *key = keys.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  int32_t* to = out.mutable_data_ptr<int32_t>();
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    const c10::InferenceMode mode;
    const int64_t begin = rows * first / shares, end = rows * last / shares;
    for (int64_t row = begin; row < end; row += MOST_ROWS) {
      const int64_t stop = std::min(end, row + MOST_ROWS);
      const at::Tensor logits = opd::linear(hidden.narrow(0, row, stop - row), head);
      draw_rows(logits.const_data_ptr<float>(), size, key, position, float(temperature), row, stop, rows, to);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("draw(Tensor logits, Tensor keys, Tensor positions, float temperature) -> Tensor");
  library.def("draw_next(Tensor hidden, Tensor head, Tensor keys, Tensor positions, float temperature) -> Tensor");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("draw", draw);
  library.impl("draw_next", draw_next);
}
