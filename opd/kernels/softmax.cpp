// Softmaxes over tiles of logits in bits, one or two that are compared, each in two passes over memory where a chain of
// tensor operations takes ten or more: the sums of opd/softmax.py, and the gradients in the logits.
//
// Rows are independent of each other, and a row is summed in one order, so neither threads nor tiles of tokens change a
// bit. Whoever passes minus infinity gets sums that are not finite, as plain tensor operations would give. float32;
// every tensor is contiguous. The loops are in softmax_kernels.h.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vectors.h"

namespace {

constexpr float FAR_BELOW = -1e30f;  // in place of a logit that does not exist: its weight is zero, and zero times it

#define LOOPS "softmax_kernels.h"
#include "every_vector.h"

float* tile(const at::Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(
      x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == shape, "a tile must be float32 ", shape,
      " and contiguous, not ", x.scalar_type(), " ", x.sizes());
  return x.mutable_data_ptr<float>();
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)); }

// z [n, v] -> [3, n]: the largest, the mass, the moment; z becomes relative to the largest.
at::Tensor softmax_sums(at::Tensor z) {
  const int64_t rows = z.size(0), width = z.size(1);
  at::Tensor out = at::empty({3, rows}, z.options());
  float *from = tile(z, z.sizes()), *to = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain(width), [&](int64_t first, int64_t last) {
    WITH_BEST(fast::sums(from, width, rows, first, last, to))
  });
  return out;
}

// z, u [n, v] -> [9, n]: largest, mass and moment of z and u in turn, reverse, forward, agree; both become relative.
at::Tensor pair_sums(at::Tensor z, at::Tensor u) {
  const int64_t rows = z.size(0), width = z.size(1);
  at::Tensor out = at::empty({9, rows}, z.options());
  float *from_z = tile(z, z.sizes()), *from_u = tile(u, z.sizes()), *to = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain(2 * width), [&](int64_t first, int64_t last) {
    WITH_BEST(fast::pair_sums(from_z, from_u, width, rows, first, last, to))
  });
  return out;
}

// slope 2^(z - top) into out: z [n, v], top and slope [n]. `out` may be z.
void softmax_gradient(const at::Tensor& z, const at::Tensor& top, const at::Tensor& slope, at::Tensor out) {
  const int64_t rows = z.size(0), width = z.size(1);
  const float *from = tile(z, z.sizes()), *tops = tile(top, {rows}), *slopes = tile(slope, {rows});
  float* to = tile(out, z.sizes());
  at::parallel_for(0, rows, grain(width), [&](int64_t first, int64_t last) {
    WITH_BEST(fast::gradient(from, tops, slopes, width, first, last, to))
  });
}

// 2^z (slope (z - u - offset) + constant) - 2^u teacher into out, which may be z or u; numbers [6, n]: the tops of z
// and u, to which they become relative, offset, slope, constant, teacher.
void pair_gradient(
    const at::Tensor& z, const at::Tensor& u, const at::Tensor& numbers, bool with_teacher, at::Tensor out) {
  const int64_t rows = z.size(0), width = z.size(1);
  const float *from_z = tile(z, z.sizes()), *from_u = tile(u, z.sizes()), *given = tile(numbers, {6, rows});
  float* to = tile(out, z.sizes());
  at::parallel_for(0, rows, grain(2 * width), [&](int64_t first, int64_t last) {
    if (with_teacher) {
      WITH_BEST(fast::pair_gradient<true>(from_z, from_u, given, width, rows, first, last, to))
    } else {
      WITH_BEST(fast::pair_gradient<false>(from_z, from_u, given, width, rows, first, last, to))
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("softmax_sums(Tensor(a!) z) -> Tensor");
  library.def("pair_sums(Tensor(a!) z, Tensor(b!) u) -> Tensor");
  library.def("softmax_gradient(Tensor z, Tensor top, Tensor slope, Tensor(a!) out) -> ()");
  library.def("pair_gradient(Tensor z, Tensor u, Tensor numbers, bool with_teacher, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("softmax_sums", softmax_sums);
  library.impl("pair_sums", pair_sums);
  library.impl("softmax_gradient", softmax_gradient);
  library.impl("pair_gradient", pair_gradient);
}
