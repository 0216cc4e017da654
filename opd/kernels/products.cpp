// Products of float32 matrices whose bits do not depend on who else is in them.
//
// An element of a product is the sum over the inner dimension, in order, in blocks of DEPTH that are added one after
// the other. Neither the number of rows, nor a row's place, nor the number of threads changes that, so a token gets the
// same numbers alone, in any batch and in any chunk. Libraries choose their loops by shape and promise no such thing;
// and the one that torch brings uses half the width of a processor's vectors when it is not of its maker.
//
// One operand's columns are packed into panels that stay in the second-level cache, the other's rows one panel at a
// time, and a tile of sums stays in registers from the first to the last element of a block. With few rows the operands
// change places, so that no large matrix is turned for a handful of them; multiplication commutes, bit for bit. With
// one to four rows the matrix is read once and never written.

#include <torch/library.h>

#include <functional>
#include <numeric>

#include "operators.h"
#include "vectors.h"

namespace {

constexpr int64_t DEPTH = 512;              // of the inner dimension, summed in registers
constexpr int64_t ROW_STRIDE = DEPTH + 16;  // of packed rows
constexpr int64_t WIDTH = 256;              // columns packed at once, whole spans whatever the vectors
constexpr int64_t FEW_PANELS = 24;          // of rows, up to which columns that lie side by side are not packed
constexpr int64_t VERY_FEW = 4;             // rows, up to which nothing is packed
constexpr int64_t FEW = 32;                 // rows, up to which they are the packed columns
constexpr int64_t ALONE = 1 << 21;          // multiplications below which a second thread costs more than it saves

struct Product {
  const float* a;
  const float* b;
  float* c;
  int64_t rows, columns, inner;
  int64_t a_row, a_column, b_row, b_column, c_row, c_column;
  bool add;
};

float* aligned(float* from) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(from) + 63) & ~uintptr_t{63});
}

#define LOOPS "products_kernels.h"
#include "every_vector.h"

void run(Product product) {
  if (product.rows == 0 || product.columns == 0) return;
  if (product.inner == 0) {
    if (product.add) return;
    for (int64_t i = 0; i < product.rows; ++i) std::fill_n(product.c + i * product.c_row, product.columns, 0.f);
    return;
  }
  const bool alone = at::get_num_threads() == 1 || product.rows * product.columns * product.inner < ALONE;
  if (product.rows <= VERY_FEW && product.b_row == 1 && product.a_column == 1) {
    WITH_BEST(fast::multiply_few(product, alone))
    return;
  }
  if (product.rows <= FEW && product.b_row == 1 && product.columns > product.rows) {
    product = {
        product.b, product.a, product.c, product.columns, product.rows, product.inner, product.b_column, product.b_row,
        product.a_column, product.a_row, product.c_column, product.c_row, product.add};
  }
  WITH_BEST(fast::multiply(product, alone))
}

void check(const at::Tensor& x, const char* name, int64_t dimensions) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.device().is_cpu(), name, " must be float32 on the CPU");
  TORCH_CHECK(x.dim() == dimensions, name, " has ", x.dim(), " dimensions, not ", dimensions);
}

void check_sizes(at::IntArrayRef sizes, int64_t rows) {
  int64_t sum = 0;
  for (const int64_t size : sizes) {
    TORCH_CHECK(size >= 0 && sum + size <= rows, "sizes ", sizes, " exceed ", rows, " rows");
    sum += size;
  }
  TORCH_CHECK(sum == rows, "sizes ", sizes, " sum to ", sum, ", not to ", rows, " rows");
}

// One of its last two strides is 1: a matrix or a transposed one.
at::Tensor readable(const at::Tensor& x) { return x.stride(-1) == 1 || x.stride(-2) == 1 ? x : x.contiguous(); }

}  // namespace

namespace opd {

// out [G, M, N] = a [G, M, K] b [G, K, N], or out + that.
void products(const at::Tensor& a_given, const at::Tensor& b_given, at::Tensor& out, bool add) {
  check(a_given, "a", 3), check(b_given, "b", 3), check(out, "out", 3);
  const at::Tensor a = readable(a_given), b = readable(b_given);
  TORCH_CHECK(
      a.size(0) == b.size(0) && a.size(0) == out.size(0) && a.size(1) == out.size(1) && b.size(2) == out.size(2) &&
          a.size(2) == b.size(1),
      "a ", a.sizes(), ", b ", b.sizes(), " and out ", out.sizes(), " do not fit each other");
  TORCH_CHECK(out.stride(2) == 1 || out.size(2) == 1, "out's last stride is ", out.stride(2), ", not 1");
  const float *from_a = a.const_data_ptr<float>(), *from_b = b.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for (int64_t group = 0; group < out.size(0); ++group) {
    run({from_a + group * a.stride(0), from_b + group * b.stride(0), to + group * out.stride(0), a.size(1), b.size(2),
         a.size(2), a.stride(1), a.stride(2), b.stride(1), b.stride(2), out.stride(1), 1, add});
  }
}

// x [..., K] times the transposed weight [N, K]: [..., N].
at::Tensor linear(const at::Tensor& x_given, const at::Tensor& weight_given) {
  check(weight_given, "weight", 2);
  TORCH_CHECK(x_given.scalar_type() == at::kFloat && x_given.device().is_cpu(), "x must be float32 on the CPU");
  TORCH_CHECK(
      x_given.dim() > 0 && x_given.size(-1) == weight_given.size(1), "x ", x_given.sizes(), " and weight ",
      weight_given.sizes(), " do not fit each other");
  const at::Tensor x = x_given.contiguous(), weight = readable(weight_given);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor out = empty(shape, x.options());
  const int64_t inner = weight.size(1),
                rows = std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies<>());
  run({x.const_data_ptr<float>(), weight.const_data_ptr<float>(), out.mutable_data_ptr<float>(), rows, weight.size(0),
       inner, inner, 1, weight.stride(1), weight.stride(0), weight.size(0), 1, false});
  return out;
}

// Segments of `sizes`[e] rows of a [R, K], each times its b[e] of [E, K, N]: out [R, N].
void products_by_rows(const at::Tensor& a_given, const at::Tensor& b_given, at::IntArrayRef sizes, at::Tensor& out) {
  check(a_given, "a", 2), check(b_given, "b", 3), check(out, "out", 2);
  const at::Tensor a = readable(a_given), b = readable(b_given);
  TORCH_CHECK(
      a.size(0) == out.size(0) && a.size(1) == b.size(1) && b.size(2) == out.size(1) &&
          b.size(0) == static_cast<int64_t>(sizes.size()) && out.is_contiguous(),
      "a ", a.sizes(), ", b ", b.sizes(), " and out ", out.sizes(), " do not fit each other");
  check_sizes(sizes, a.size(0));
  int64_t start = 0;
  for (size_t e = 0; e < sizes.size(); ++e) {
    run({a.const_data_ptr<float>() + start * a.stride(0), b.const_data_ptr<float>() + e * b.stride(0),
         out.mutable_data_ptr<float>() + start * out.stride(0), sizes[e], b.size(2), a.size(1), a.stride(0),
         a.stride(1), b.stride(1), b.stride(2), out.stride(0), 1, false});
    start += sizes[e];
  }
}

// For each segment of `sizes`[e] rows of a [R, M] and b [R, N]: out[e] of [E, M, N] = a^T b, zero without rows.
void products_over_rows(const at::Tensor& a_given, const at::Tensor& b_given, at::IntArrayRef sizes, at::Tensor& out) {
  check(a_given, "a", 2), check(b_given, "b", 2), check(out, "out", 3);
  const at::Tensor a = readable(a_given), b = readable(b_given);
  TORCH_CHECK(
      a.size(0) == b.size(0) && a.size(1) == out.size(1) && b.size(1) == out.size(2) &&
          out.size(0) == static_cast<int64_t>(sizes.size()) && out.is_contiguous(),
      "a ", a.sizes(), ", b ", b.sizes(), " and out ", out.sizes(), " do not fit each other");
  check_sizes(sizes, a.size(0));
  int64_t start = 0;
  for (size_t e = 0; e < sizes.size(); ++e) {
    run({a.const_data_ptr<float>() + start * a.stride(0), b.const_data_ptr<float>() + start * b.stride(0),
         out.mutable_data_ptr<float>() + e * out.stride(0), a.size(1), b.size(1), sizes[e], a.stride(1), a.stride(0),
         b.stride(0), b.stride(1), out.stride(1), 1, false});
    start += sizes[e];
  }
}

}  // namespace opd

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("linear(Tensor x, Tensor weight) -> Tensor");
  library.def("products(Tensor a, Tensor b, Tensor(c!) out, bool add) -> ()");
  library.def("products_by_rows(Tensor a, Tensor b, int[] sizes, Tensor(c!) out) -> ()");
  library.def("products_over_rows(Tensor a, Tensor b, int[] sizes, Tensor(c!) out) -> ()");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("linear", opd::linear);
  library.impl("products", opd::products);
  library.impl("products_by_rows", opd::products_by_rows);
  library.impl("products_over_rows", opd::products_over_rows);
}
