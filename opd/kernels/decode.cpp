// Attention of new tokens of each sequence to their window, their entries and a sink, reading the cache where it lies.
//
// A query's keys are pointers into ring, new keys and pages, so a step copies nothing and costs the keys that it sees.
// One order of additions for a query, whether its token comes alone, in a chunk, or beside other sequences: the same
// bits in decoding and in prefill. The equations are those of opd/model/sparse.py; training goes through
// tiled_attention.cpp. The loops are in decode_kernels.h. float and double; every tensor is contiguous, and what
// fused.py passes has been checked there.

#include <torch/library.h>

#include <cstring>

#include "operators.h"
#include "vectors.h"

namespace {

template <typename T>
struct Decoding {
  const T *query, *own, *ring, *entries, *sinks;
  const int64_t *slots, *starts, *lengths, *pages, *visible, *picks;
  T* out;
  int64_t tokens, heads, width, window, num_pages, per_page, num_picks;
};

#define LOOPS "decode_kernels.h"
#include "every_vector.h"

}  // namespace

namespace opd {

at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& own, const at::Tensor& ring,
                            const Maybe& entries, const at::Tensor& sinks, const at::Tensor& slots,
                            const at::Tensor& starts, const at::Tensor& lengths, const at::Tensor& pages,
                            const Maybe& visible, const Maybe& picks, int64_t most_visible) {
  at::Tensor out = empty(query.sizes(), query.options());
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    const Decoding<T> a{query.const_data_ptr<T>(), own.const_data_ptr<T>(), ring.const_data_ptr<T>(), data<T>(entries),
                        sinks.const_data_ptr<T>(), slots.const_data_ptr<int64_t>(),
                        starts.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>(),
                        pages.const_data_ptr<int64_t>(), data<int64_t>(visible), data<int64_t>(picks),
                        out.mutable_data_ptr<T>(), query.size(1), query.size(2), query.size(3), ring.size(1),
                        pages.size(1), entries ? entries->size(1) : 1, picks ? picks->size(2) : 0};
    const int64_t most = a.window + 1 + (entries ? (picks ? a.num_picks : most_visible) : 0);
    at::parallel_for(0, query.size(0) * query.size(1), std::max<int64_t>(1, GRAIN / (most * a.heads)),
                     [&](int64_t begin, int64_t end) { WITH_BEST((fast::decode<T>(a, most, begin, end))); });
  });
  return out;
}

// tensor[destinations[i]] = tensor[sources[i]] for all of the tensors, row by row, in order.
void copy_rows(const std::vector<at::Tensor>& tensors, const at::Tensor& sources, const at::Tensor& destinations) {
  const int64_t *from = sources.const_data_ptr<int64_t>(), *to = destinations.const_data_ptr<int64_t>();
  const int64_t count = sources.numel();
  TORCH_CHECK(destinations.numel() == count, "as many destinations as sources");
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.is_contiguous() && tensor.dim() > 0, "rows of contiguous tensors");
    if (tensor.numel() == 0) continue;
    const int64_t rows = tensor.size(0), bytes = static_cast<int64_t>(tensor.nbytes()) / rows;
    char* data = static_cast<char*>(tensor.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      TORCH_CHECK(from[i] >= 0 && from[i] < rows && to[i] >= 0 && to[i] < rows, "a row out of range");
      if (from[i] != to[i]) std::memcpy(data + to[i] * bytes, data + from[i] * bytes, bytes);
    }
  }
}

}  // namespace opd

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("copy_rows(Tensor[] tensors, Tensor sources, Tensor destinations) -> ()");
  library.def(
      "decode_attention(Tensor query, Tensor own, Tensor ring, Tensor? entries, Tensor sinks, Tensor slots, "
      "Tensor starts, Tensor lengths, Tensor pages, Tensor? visible, Tensor? picks, int most_visible) -> Tensor");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("copy_rows", opd::copy_rows);
  library.impl("decode_attention", opd::decode_attention);
}
