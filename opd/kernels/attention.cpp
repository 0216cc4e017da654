// Attention of every query to its own few keys, on the CPU: for whole sequences with its backward, and for a decoding
// step that reads the cache where it lies. Nothing of the size of queries times keys exists.
//
// The equations are those of opd/model/sparse.py, which is also the way for other dtypes and for long dense prefixes
// of entries. The loops are in attention_kernels.h.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "vectors.h"

namespace {

constexpr int64_t MAX_PARTS = 8;      // of a row's queries, each with gradients of keys of its own
constexpr int64_t PART_QUERIES = 64;  // below which a part is not worth its buffers

// As Reach of opd/model/sparse.py. Null: first, no column is hidden; visible, there are no entries; picks, no choice.
template <typename T>
struct Reach {
  const T *recent, *entries;
  const int64_t *first, *visible, *picks;
  int64_t tokens, heads, width, recent_tokens, num_entries, num_picks, visible_rows, window, past;
};

template <typename T>
struct Decoding {
  const T *query, *own, *ring, *entries, *sinks;
  const int64_t *slots, *positions, *pages, *visible, *picks;
  T* out;
  int64_t heads, width, window, num_pages, per_page, num_picks;
};

namespace plain {
#define KERNEL
#define BYTES 16
#include "lanes.h"
#include "attention_kernels.h"
#undef KERNEL
#undef BYTES
}  // namespace plain

#ifdef OPD_X86
namespace avx2 {
#define KERNEL AVX2_KERNEL
#define BYTES 32
#include "lanes.h"
#include "attention_kernels.h"
#undef KERNEL
#undef BYTES
}  // namespace avx2

namespace avx512 {
#define KERNEL AVX512_KERNEL
#define BYTES 64
#include "lanes.h"
#include "attention_kernels.h"
#undef KERNEL
#undef BYTES
}  // namespace avx512
#endif

using Maybe = std::optional<at::Tensor>;

template <typename T>
Reach<T> reach_of(const at::Tensor& query, const at::Tensor& recent, const Maybe& entries, const Maybe& first,
                  const Maybe& visible, const Maybe& picks, int64_t window, int64_t past) {
  return {recent.const_data_ptr<T>(),
          data<T>(entries),
          data<int64_t>(first),
          entries ? data<int64_t>(visible) : nullptr,
          entries ? data<int64_t>(picks) : nullptr,
          query.size(1),
          query.size(2),
          query.size(3),
          recent.size(1),
          entries ? entries->size(1) : 0,
          picks ? picks->size(2) : 0,
          visible ? visible->size(0) : 1,
          window,
          past};
}

int64_t most_keys(const Maybe& entries, const Maybe& picks, int64_t window) {
  return window + (entries ? (picks ? picks->size(2) : entries->size(1)) : 0);
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& query, const at::Tensor& recent, const Maybe& entries,
                                             const at::Tensor& sinks, const Maybe& first, const Maybe& visible,
                                             const Maybe& picks, int64_t window, int64_t past) {
  at::Tensor out = at::empty_like(query);
  at::Tensor log_total = at::empty({query.size(0), query.size(1), query.size(2)}, query.options());
  const int64_t most = most_keys(entries, picks, window), items = query.size(0) * query.size(1);
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    const Reach<T> a = reach_of<T>(query, recent, entries, first, visible, picks, window, past);
    const int64_t grain = std::max<int64_t>(1, GRAIN / (most * a.heads));
    at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
      WITH_BEST((fast::attention<T>(a, query.const_data_ptr<T>(), sinks.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
                                    log_total.mutable_data_ptr<T>(), most, begin, end)));
    });
  });
  return {out, log_total};
}

// Gradients of query, recent, entries (empty without them) and sinks. Parts, and so the order of additions, depend on
// the shapes alone.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& recent, const Maybe& entries,
    const at::Tensor& sinks, const at::Tensor& log_total, const Maybe& first, const Maybe& visible, const Maybe& picks,
    int64_t window, int64_t past) {
  const int64_t batch = query.size(0), tokens = query.size(1), heads = query.size(2), width = query.size(3);
  const int64_t wanted = std::max<int64_t>(1, MAX_PARTS / batch);
  const int64_t parts = std::min(wanted, std::max<int64_t>(1, tokens / PART_QUERIES));
  const int64_t part_tokens = (tokens + parts - 1) / parts;
  at::Tensor grad_query = at::empty_like(query), grad_sinks = at::zeros({parts, batch, heads}, query.options());
  at::Tensor grad_recent = at::zeros({parts, batch, recent.size(1), width}, query.options());
  at::Tensor grad_entries = at::zeros({parts, batch, entries ? entries->size(1) : 0, width}, query.options());
  const int64_t most = most_keys(entries, picks, window);
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    const Reach<T> a = reach_of<T>(query, recent, entries, first, visible, picks, window, past);
    T *to_query = grad_query.mutable_data_ptr<T>(), *to_recent = grad_recent.mutable_data_ptr<T>(),
      *to_entries = grad_entries.mutable_data_ptr<T>(), *to_sinks = grad_sinks.mutable_data_ptr<T>();
    at::parallel_for(0, parts * batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item % batch, from = item / batch * part_tokens, to = std::min(tokens, from + part_tokens);
        WITH_BEST((fast::attention_backward<T>(
            a, query.const_data_ptr<T>(), grad.const_data_ptr<T>(), sinks.const_data_ptr<T>(),
            log_total.const_data_ptr<T>(), to_query, to_recent + item * a.recent_tokens * width,
            to_entries + item * a.num_entries * width, to_sinks + item * heads, most, b, from, to)));
      }
    });
  });
  return {grad_query, parts == 1 ? grad_recent[0] : grad_recent.sum(0),
          parts == 1 ? grad_entries[0] : grad_entries.sum(0), grad_sinks.sum({0, 1})};
}

at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& own, const at::Tensor& ring,
                            const Maybe& entries, const at::Tensor& sinks, const at::Tensor& slots,
                            const at::Tensor& positions, const at::Tensor& pages, const Maybe& visible,
                            const Maybe& picks, int64_t most_visible) {
  at::Tensor out = at::empty_like(query);
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    const Decoding<T> a{query.const_data_ptr<T>(), own.const_data_ptr<T>(), ring.const_data_ptr<T>(), data<T>(entries),
                        sinks.const_data_ptr<T>(), slots.const_data_ptr<int64_t>(),
                        positions.const_data_ptr<int64_t>(), pages.const_data_ptr<int64_t>(), data<int64_t>(visible),
                        data<int64_t>(picks), out.mutable_data_ptr<T>(), query.size(1), query.size(2), ring.size(1),
                        pages.size(1), entries ? entries->size(1) : 1, picks ? picks->size(1) : 0};
    const int64_t most = a.window + 1 + (entries ? (picks ? a.num_picks : most_visible) : 0);
    at::parallel_for(0, query.size(0), std::max<int64_t>(1, GRAIN / (most * a.heads)),
                     [&](int64_t begin, int64_t end) { WITH_BEST((fast::decode<T>(a, most, begin, end))); });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("attention(Tensor query, Tensor recent, Tensor? entries, Tensor sinks, Tensor? first, Tensor? visible, "
              "Tensor? picks, int window, int past) -> (Tensor, Tensor)");
  library.def("attention_backward(Tensor grad, Tensor query, Tensor recent, Tensor? entries, Tensor sinks, "
              "Tensor log_total, Tensor? first, Tensor? visible, Tensor? picks, int window, int past) "
              "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def("decode_attention(Tensor query, Tensor own, Tensor ring, Tensor? entries, Tensor sinks, Tensor slots, "
              "Tensor positions, Tensor pages, Tensor? visible, Tensor? picks, int most_visible) -> Tensor");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("attention", attention);
  library.impl("attention_backward", attention_backward);
  library.impl("decode_attention", decode_attention);
}
