// Attention of every query to its own keys, in float32 on the CPU: a window of recent keys, compressed entries (a
// prefix of them or picked ones), a sink; one key per position serves all heads and is its own value. Forward and
// backward.
//
// The one idea: logits never leave the processor's own cache. A tile of queries meets its keys chunk by chunk, carrying
// largest logit and sum along; the backward computes the weights again from the log of that sum. A chunk is brought
// into the order of the lanes once for the whole tile, which is what makes long prefixes cheap. A query meets exactly
// the keys it may see, so hidden ones need not be finite.
//
// Order of additions is fixed: queries are cut into parts by their number alone, a part has sums of its own for the
// keys' gradients, and these are added in the order of the parts. Results do not depend on threads.
//
// The equations are those of opd/model/sparse.py. The loops are in tiled_attention_kernels.h.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <tuple>
#include <utility>

#include "vectors.h"

namespace {

constexpr int CHUNK = 64;             // keys that are brought into order at a time
constexpr int64_t ROWS = 128;         // queries times heads of a tile: how often a chunk that is in order is used
constexpr int64_t CHANNELS = 32;      // channels are filled up to a multiple of it
constexpr int64_t PART = 512;         // queries of a part, at least
constexpr int64_t MAX_PARTS = 16;
constexpr int64_t MIN_WORK = 1 << 18; // products below which a second thread costs more than it saves

struct Chunk {
  float *keys, *transposed, *grad_keys;  // [CHUNK][padded], [width][CHUNK], [CHUNK][padded]
};

#define LOOPS "tiled_attention_kernels.h"
#include "every_vector.h"

// Who sees what. Recent key past + t is query t's own. Null: first, no column is hidden; entries, there are none;
// picks, no choice.
struct Reach {
  const float *recent, *entries;
  const int64_t *first, *visible, *picks;
  int64_t batch, length, heads, width, padded, num_recent, num_entries, num_picks, window, past, visible_stride;

  int64_t window_begin(int64_t row, int64_t t) const {
    return std::max({int64_t(0), past + t - window + 1, first ? first[row] : 0});
  }
  int64_t window_end(int64_t t) const { return past + t + 1; }
  int64_t prefix(int64_t row, int64_t t) const { return entries && !picks ? visible[row * visible_stride + t] : 0; }
};

struct Scratch {
  std::vector<float> buffer;
  Chunk chunk;
  float *queries, *grads, *sums, *largest, *total;

  Scratch(const Reach& reach, int64_t rows) : buffer(2 * CHUNK * reach.padded + CHUNK * reach.width +
                                                     3 * rows * reach.padded + 2 * rows + 16) {
    float* at = buffer.data();
    auto take = [&](int64_t size) { float* taken = at; at += size; return taken; };
    chunk.keys = take(CHUNK * reach.padded), chunk.grad_keys = take(CHUNK * reach.padded);
    chunk.transposed = take(CHUNK * reach.width);
    queries = take(rows * reach.padded), grads = take(rows * reach.padded), sums = take(rows * reach.padded);
    largest = take(rows), total = take(rows);
  }
};

// Rows of `width` to rows of `padded`, times a factor, and back. What fills up stays zero.
void widen_rows(const float* from, int64_t rows, int64_t width, int64_t padded, float factor, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < width; ++c) to[row * padded + c] = from[row * width + c] * factor;
  }
}

void put(Chunk& chunk, int64_t at, const float* row, int64_t width, int64_t padded) {
  std::memcpy(chunk.keys + at * padded, row, width * sizeof(float));
  for (int64_t c = 0; c < width; ++c) chunk.transposed[c * CHUNK + at] = row[c];
}

// Calls meet(q, begin, end) for the queries begin .. of a tile and the keys of each chunk that they may see, the chunk
// being in order, and leave(destination of its key's gradient, index in the chunk) for every key of it afterwards.
template <typename Meet, typename Leave>
void meet_keys(const Reach& reach, int64_t row, int64_t begin, int64_t end, Chunk& chunk, Meet meet, Leave leave) {
  const int64_t width = reach.width, padded = reach.padded;
  auto segment = [&](const float* keys, int64_t low, int64_t high, bool is_recent, auto range) {
    for (int64_t at = low; at < high; at += CHUNK) {
      const int64_t size = std::min<int64_t>(CHUNK, high - at);
      for (int64_t j = 0; j < size; ++j) put(chunk, j, keys + (at + j) * width, width, padded);
      for (int64_t t = begin; t < end; ++t) {
        const auto [from, to] = range(t);
        const int first = std::max<int64_t>(0, from - at), last = std::min<int64_t>(size, to - at);
        if (first < last) meet(t - begin, first, last);
      }
      for (int64_t j = 0; j < size; ++j) leave(is_recent, at + j, j);
    }
  };
  segment(reach.recent + row * reach.num_recent * width, reach.window_begin(row, begin), reach.window_end(end - 1),
          true, [&](int64_t t) { return std::pair(reach.window_begin(row, t), reach.window_end(t)); });
  if (!reach.entries) return;
  const float* entries = reach.entries + row * reach.num_entries * width;
  if (!reach.picks) {
    int64_t most = 0;
    for (int64_t t = begin; t < end; ++t) most = std::max(most, reach.prefix(row, t));
    segment(entries, 0, most, false, [&](int64_t t) { return std::pair(int64_t(0), reach.prefix(row, t)); });
    return;
  }
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* picks = reach.picks + (row * reach.length + t) * reach.num_picks;
    int64_t chosen[CHUNK];
    for (int64_t at = 0; at < reach.num_picks;) {
      int size = 0;
      for (; at < reach.num_picks && size < CHUNK; ++at) {
        if (picks[at] < 0) continue;
        chosen[size] = picks[at];
        put(chunk, size++, entries + picks[at] * width, width, padded);
      }
      if (size == 0) break;
      meet(t - begin, 0, size);
      for (int64_t j = 0; j < size; ++j) leave(false, chosen[j], j);
    }
  }
}

// Runs task(index) for 0 .. count - 1, each thread taking the next one that is left: they differ in length.
template <typename Task>
void share_out(int64_t count, bool alone, Task task) {
  std::atomic<int64_t> next{0};
  auto take = [&](int64_t, int64_t) {
    for (int64_t index = next++; index < count; index = next++) task(index);
  };
  if (alone || count == 1) {
    take(0, 1);
  } else {
    at::parallel_for(0, at::get_num_threads(), 1, take);
  }
}

const float* floats(const at::Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == shape, name, ": float, contiguous, ",
              shape, ", not ", x.sizes());
  return x.const_data_ptr<float>();
}

Reach reach_of(const at::Tensor& query, const at::Tensor& recent, const std::optional<at::Tensor>& entries,
               const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& visible,
               const std::optional<at::Tensor>& picks, int64_t window, int64_t past) {
  TORCH_CHECK(query.dim() == 4 && recent.dim() == 3, "query [B, T, H, C] and recent [B, past + T, C]");
  Reach reach{};
  reach.batch = query.size(0), reach.length = query.size(1), reach.heads = query.size(2), reach.width = query.size(3);
  reach.padded = (reach.width + CHANNELS - 1) / CHANNELS * CHANNELS;
  reach.window = window, reach.past = past, reach.num_recent = past + reach.length;
  reach.recent = floats(recent, {reach.batch, reach.num_recent, reach.width}, "recent");
  if (first) {
    TORCH_CHECK(first->scalar_type() == at::kLong && first->is_contiguous() && first->numel() == reach.batch, "first");
    reach.first = first->const_data_ptr<int64_t>();
  }
  if (!entries) return reach;
  reach.num_entries = entries->size(1);
  reach.entries = floats(*entries, {reach.batch, reach.num_entries, reach.width}, "entries");
  if (picks) {
    TORCH_CHECK(picks->scalar_type() == at::kLong && picks->is_contiguous() && picks->dim() == 3 &&
                    picks->size(0) == reach.batch && picks->size(1) == reach.length, "picks: int64 [B, T, k]");
    reach.picks = picks->const_data_ptr<int64_t>(), reach.num_picks = picks->size(2);
    return reach;
  }
  TORCH_CHECK(visible && visible->scalar_type() == at::kLong && visible->is_contiguous() && visible->dim() == 2 &&
                  (visible->size(0) == 1 || visible->size(0) == reach.batch) && visible->size(1) == reach.length,
              "visible: int64 [B or 1, T]");
  reach.visible = visible->const_data_ptr<int64_t>(), reach.visible_stride = visible->size(0) == 1 ? 0 : reach.length;
  return reach;
}

int64_t tile_queries(const Reach& reach) { return std::max<int64_t>(1, ROWS / reach.heads); }

bool is_small(const Reach& reach) {
  const int64_t dense = reach.picks ? reach.num_picks : reach.num_entries;
  return reach.batch * reach.length * reach.heads * reach.width * (reach.window + dense) < MIN_WORK;
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& recent,
                                           const std::optional<at::Tensor>& entries, const at::Tensor& sinks,
                                           const std::optional<at::Tensor>& first,
                                           const std::optional<at::Tensor>& visible,
                                           const std::optional<at::Tensor>& picks, int64_t window, int64_t past) {
  const Reach reach = reach_of(query, recent, entries, first, visible, picks, window, past);
  const int64_t heads = reach.heads, width = reach.width, padded = reach.padded, size = tile_queries(reach);
  const float *queries = floats(query, query.sizes(), "query"), *sink = floats(sinks, {heads}, "sinks");
  at::Tensor mixed = at::empty_like(query), log_sums = at::empty({reach.batch, reach.length, heads}, query.options());
  float *out = mixed.mutable_data_ptr<float>(), *logs = log_sums.mutable_data_ptr<float>();
  const int64_t tiles = (reach.length + size - 1) / size;
  share_out(reach.batch * tiles, is_small(reach), [&](int64_t index) {
    const int64_t row = index % reach.batch, begin = (tiles - 1 - index / reach.batch) * size;
    const int64_t end = std::min(reach.length, begin + size), first_row = (row * reach.length + begin) * heads;
    Scratch scratch(reach, size * heads);
    widen_rows(queries + first_row * width, (end - begin) * heads, width, padded, 1 / std::sqrt(float(width)),
               scratch.queries);
    for (int64_t i = 0; i < (end - begin) * heads; ++i) scratch.largest[i] = sink[i % heads], scratch.total[i] = 1.f;
    meet_keys(
        reach, row, begin, end, scratch.chunk,
        [&](int64_t q, int low, int high) {
          const int64_t at = q * heads;
          WITH_BEST((fast::forward(scratch.queries + at * padded, scratch.chunk, heads, width, padded, low, high,
                                   scratch.sums + at * padded, scratch.largest + at, scratch.total + at)));
        },
        [](bool, int64_t, int64_t) {});
    for (int64_t i = 0; i < (end - begin) * heads; ++i) {
      const float share = 1 / scratch.total[i];
      for (int64_t c = 0; c < width; ++c) out[(first_row + i) * width + c] = scratch.sums[i * padded + c] * share;
      logs[first_row + i] = scratch.largest[i] + std::log(scratch.total[i]);
    }
  });
  return {mixed, log_sums};
}

std::tuple<at::Tensor, at::Tensor, std::optional<at::Tensor>> backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& recent, const std::optional<at::Tensor>& entries,
    const at::Tensor& log_sums, const at::Tensor& along, const std::optional<at::Tensor>& first,
    const std::optional<at::Tensor>& visible, const std::optional<at::Tensor>& picks, int64_t window, int64_t past) {
  const Reach reach = reach_of(query, recent, entries, first, visible, picks, window, past);
  const int64_t heads = reach.heads, width = reach.width, padded = reach.padded, size = tile_queries(reach);
  const float *queries = floats(query, query.sizes(), "query"), *grads = floats(grad, query.sizes(), "grad");
  const float *logs = floats(log_sums, query.sizes().slice(0, 3), "log_sums");
  const float *delta = floats(along, query.sizes().slice(0, 3), "along");
  // Parts' own sums take about as much memory as the recent keys do.
  const int64_t most = std::min(MAX_PARTS, reach.num_entries ? reach.length / reach.num_entries : MAX_PARTS);
  const int64_t parts = std::max<int64_t>(1, std::min(most, reach.length / PART));
  const int64_t per_part = ((reach.length + parts - 1) / parts + size - 1) / size * size;
  at::Tensor grad_query = at::empty_like(query);
  at::Tensor of_recent = at::zeros({reach.batch, parts, std::min(reach.num_recent, per_part + window - 1), width},
                                   query.options());
  at::Tensor of_entries = at::zeros({reach.batch, parts, reach.num_entries, width}, query.options());
  float* out = grad_query.mutable_data_ptr<float>();
  float *to_recent = of_recent.mutable_data_ptr<float>(), *to_entries = of_entries.mutable_data_ptr<float>();
  const float scale = 1 / std::sqrt(float(width));
  auto part_begin = [&](int64_t part) {  // of the recent keys that it may see
    return std::min(std::max<int64_t>(0, past + part * per_part - window + 1), reach.num_recent - of_recent.size(2));
  };
  share_out(reach.batch * parts, is_small(reach), [&](int64_t index) {
    const int64_t row = index % reach.batch, part = parts - 1 - index / reach.batch;
    const int64_t own = row * parts + part;
    float* own_recent = to_recent + (own * of_recent.size(2) - part_begin(part)) * width;
    float* own_entries = to_entries + own * reach.num_entries * width;
    Scratch scratch(reach, size * heads);
    for (int64_t begin = part * per_part; begin < std::min(reach.length, (part + 1) * per_part); begin += size) {
      const int64_t end = std::min(reach.length, begin + size), first_row = (row * reach.length + begin) * heads;
      widen_rows(queries + first_row * width, (end - begin) * heads, width, padded, scale, scratch.queries);
      widen_rows(grads + first_row * width, (end - begin) * heads, width, padded, 1.f, scratch.grads);
      std::fill(scratch.sums, scratch.sums + (end - begin) * heads * padded, 0.f);
      meet_keys(
          reach, row, begin, end, scratch.chunk,
          [&](int64_t q, int low, int high) {
            const int64_t at = q * heads;
            WITH_BEST((fast::backward(scratch.queries + at * padded, scratch.grads + at * padded, scratch.chunk, heads,
                                      width, padded, low, high, logs + first_row + at, delta + first_row + at,
                                      scratch.sums + at * padded)));
          },
          [&](bool is_recent, int64_t key, int64_t j) {
            float* from = scratch.chunk.grad_keys + j * padded;
            float* to = (is_recent ? own_recent : own_entries) + key * width;
            for (int64_t c = 0; c < width; ++c) to[c] += from[c];
            std::fill(from, from + padded, 0.f);
          });
      for (int64_t i = 0; i < (end - begin) * heads; ++i) {
        for (int64_t c = 0; c < width; ++c) out[(first_row + i) * width + c] = scratch.sums[i * padded + c] * scale;
      }
    }
  });
  std::optional<at::Tensor> grad_entries;
  if (entries) grad_entries = parts == 1 ? of_entries.view(entries->sizes()) : of_entries.sum(1);
  if (parts == 1 && of_recent.size(2) == reach.num_recent) {
    return {grad_query, of_recent.view(recent.sizes()), grad_entries};
  }
  at::Tensor grad_recent = at::zeros_like(recent);
  for (int64_t part = 0; part < parts; ++part) {
    grad_recent.narrow(1, part_begin(part), of_recent.size(2)).add_(of_recent.select(1, part));
  }
  return {grad_query, grad_recent, grad_entries};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def(
      "tiled_attention(Tensor query, Tensor recent, Tensor? entries, Tensor sinks, Tensor? first, Tensor? visible, "
      "Tensor? picks, int window, int past) -> (Tensor, Tensor)");
  library.def(
      "tiled_attention_backward(Tensor grad, Tensor query, Tensor recent, Tensor? entries, Tensor log_sums, "
      "Tensor along, Tensor? first, Tensor? visible, Tensor? picks, int window, int past) -> (Tensor, Tensor, "
      "Tensor?)");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("tiled_attention", forward);
  library.impl("tiled_attention_backward", backward);
}
