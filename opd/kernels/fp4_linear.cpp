// Products with packed FP4 weights on the CPU: y[r, n] = sum over k of x[r, k] * W_e[n, k], rows sorted by expert e.
//
// The one idea: output features lie side by side in the lanes of vectors, so that a weight is decoded by one table
// look-up, its activation is one broadcast, and nothing is ever summed across lanes. An element's products are added in
// one fixed order, first within a block and then, times the block's scale, over blocks. Hence a row's result is the
// same bits whatever rows, threads and experts it is computed with; it depends on the path only.
//
// Few rows are bound by how fast codes come from memory: they are read once, in the order in which they lie, asked for
// well ahead, and held in large pages. Many rows are bound by multiplying: the first rows that need a weight decode it,
// and leave it in the innermost cache for the others.
//
// Packed layout (made by opd/kernels/cpu.py). A tile is 32 output features; N is padded to whole tiles.
//   codes  [E, tiles, K / 8, 32, 4]: for every 8 inputs, 4 bytes per feature. Nibble p of those 32 bits, from the
//          lowest, is input ORDER[p]: two 16-bit halves that, shifted alike, show two neighbouring inputs.
//   scales [E, tiles, K / B, 32]: one byte per feature and block of B inputs. B = 32: 2 ** (byte - 127), 1..254.
//          B = 16: E4M3.
//
// Paths, of which the best that the processor has is taken: avx512_bf16 (bfloat16 activations are multiplied as they
// are, two per lane), avx512, avx2, plain. All accumulate in float32; all but the first widen bfloat16 activations.
// Left out: gradients, and activations of other types.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "operators.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define OPD_X86 1
#endif

namespace {

#include "fp4_kernels.h"

constexpr int64_t CHUNK_ROWS = 64;     // rows that share one pass over an expert's weights: their inputs fit in L2
constexpr int64_t MIN_WORK = 1 << 20;  // products below which a second thread costs more than it saves

std::vector<std::pair<std::string, Path>> available_paths() {
  std::vector<std::pair<std::string, Path>> paths;
#ifdef OPD_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) paths.emplace_back("avx512_bf16", Path::avx512_bf16);
  if (has_avx512) paths.emplace_back("avx512", Path::avx512);
  if (has_avx2) paths.emplace_back("avx2", Path::avx2);
#endif
  paths.emplace_back("plain", Path::plain);
  return paths;
}

std::vector<std::string> path_names() {
  std::vector<std::string> names;
  for (const auto& entry : available_paths()) names.push_back(entry.first);
  return names;
}

Path path_named(const std::string& name) {
  static const auto paths = available_paths();
  for (const auto& [candidate, path] : paths) {
    if (candidate == name) return path;
  }
  TORCH_CHECK_VALUE(false, "path ", name, " is not one that this processor has");
}

// Scale bytes that may be folded into the weights which a number of bfloat16 activations are multiplied by, the bits of
// the result being the same: no product or sum overflows or falls below the normal numbers, folded or not.
struct Window {
  int lowest = 256, highest = -1;  // none
};

// Rows of a tile's totals, of `lanes` features, to places in y that are `stride` apart.
inline void narrow(const float* totals, int64_t rows, int64_t lanes, c10::BFloat16* to, int64_t stride) {
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t lane = 0; lane < lanes; ++lane) to[n * stride + lane] = totals[n * TILE + lane];
  }
}

#ifdef OPD_X86
AVX512 Window window_of(const uint16_t* x, int64_t count) {
  constexpr int FIELD = 0x7f80;
  int16_t most = 0, most_below = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int16_t field = x[i] & FIELD, below = field ? FIELD - field : 0;
    most = std::max(most, field), most_below = std::max(most_below, below);
  }
  // 2 ** smallest <= |x| < 2 ** (largest + 1), zero apart. A sum of a block's products is a multiple of
  // 2 ** (smallest - 8), for x has 8 bits and a weight is a multiple of 1/2, and below 32 * 6 * 2 ** (largest + 1).
  const int smallest = ((FIELD - most_below) >> 7) - 127, largest = (most >> 7) - 127;
  if (smallest - 8 < -126 || largest + 9 > 127) return {};
  return {std::max(2, 127 - 126 + 8 - smallest), std::min(252, 127 + 127 - 9 - largest)};
}

// Whether all of the bytes, a multiple of 32, lie within the window, which is not empty.
AVX512 bool holds(const Window& window, const uint8_t* bytes, int64_t count) {
  const __m256i lowest = _mm256_set1_epi8(window.lowest), highest = _mm256_set1_epi8(window.highest);
  __mmask32 outside = 0;
  for (int64_t i = 0; i < count; i += 32) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
    outside |= _mm256_cmplt_epu8_mask(values, lowest) | _mm256_cmpgt_epu8_mask(values, highest);
  }
  return outside == 0;
}

AVX512 void narrow_avx512(const float* totals, int64_t rows, int64_t lanes, c10::BFloat16* to, int64_t stride) {
  if (lanes == TILE) return narrow(totals, rows, TILE, to, stride);  // known to the compiler, which unrolls it
  narrow(totals, rows, lanes, to, stride);
}
#endif

// Rows that a kernel takes together.
struct Group {
  int64_t first_row, rows;
  Window window = {};
};

// Groups of one expert's rows, of near-equal size, that share a pass over its weights.
struct Chunk {
  int64_t expert, first_group, groups;
  int64_t first_item;  // of the work items, which are (chunk, tile), tile fastest
};

// [rows][width] -> [width][rows].
template <typename From, typename To>
void interleave(const From* x, int64_t width, int64_t rows, To* out) {
  for (int64_t k = 0; k < width; ++k) {
    for (int64_t row = 0; row < rows; ++row) *out++ = static_cast<To>(x[row * width + k]);
  }
}

#ifdef OPD_X86
// The same for pairs of bfloat16 in up to 8 rows: 8 x 8 pairs at a time are transposed. `width` is a multiple of 8.
AVX512 void interleave_pairs(const uint32_t* x, int64_t width, int64_t rows, uint32_t* out) {
  const __mmask8 mask = (1 << rows) - 1;
  for (int64_t k = 0; k < width; k += 8) {
    __m256i row[8], pair[8], quad[8];
    for (int n = 0; n < 8; ++n) {
      row[n] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + std::min<int64_t>(n, rows - 1) * width + k));
    }
    for (int n = 0; n < 8; n += 2) {
      pair[n] = _mm256_unpacklo_epi32(row[n], row[n + 1]), pair[n + 1] = _mm256_unpackhi_epi32(row[n], row[n + 1]);
    }
    for (int n = 0; n < 8; n += 4) {
      for (int i = 0; i < 2; ++i) {
        quad[n + 2 * i] = _mm256_unpacklo_epi64(pair[n + i], pair[n + 2 + i]);
        quad[n + 2 * i + 1] = _mm256_unpackhi_epi64(pair[n + i], pair[n + 2 + i]);
      }
    }
    for (int i = 0; i < 8; ++i) {
      const __m256i low = quad[i % 4], high = quad[4 + i % 4];
      const __m256i column =
          i < 4 ? _mm256_permute2x128_si256(low, high, 0x20) : _mm256_permute2x128_si256(low, high, 0x31);
      _mm256_mask_storeu_epi32(out + (k + i) * rows, mask, column);
    }
  }
}
#endif

// Adds to totals [rows][32] the products of a chunk's groups with one tile of its expert. `inputs` are the interleaved
// rows of all groups.
void multiply(const Kernels& kernels, const Group* groups, int64_t num_groups, const uint8_t* codes,
              const uint8_t* scales, const char* inputs, int64_t row_bytes, int64_t num_blocks, int block_groups,
              float* totals) {
  alignas(64) uint32_t kept[KEPT / 4];
  const bool keeps = num_groups > 1 && kernels.kept_bytes > 0;
  const int64_t pass = keeps ? KEPT / (kernels.kept_bytes * block_groups) : num_blocks;
  const int64_t share = pass * block_groups * GROUP_BYTES / num_groups;
  Window window = groups->window;
  for (const Group* group = groups + 1; group < groups + num_groups; ++group) {
    window.lowest = std::max(window.lowest, group->window.lowest);
    window.highest = std::min(window.highest, group->window.highest);
  }
  for (int64_t block = 0; block < num_blocks; block += pass) {
    const int64_t blocks = std::min(pass, num_blocks - block);
    const uint8_t* pass_scales = scales + block * TILE;
    bool folds = false;
#ifdef OPD_X86
    // Only rows of bfloat16 pairs have a window, and their path has the instructions that `holds` takes.
    folds = keeps && block_groups == 4 && window.lowest <= window.highest &&
            holds(window, pass_scales, blocks * TILE);
#endif
    // Codes are asked for by all groups, evenly: a burst would hold up what the products wait for.
    const uint8_t* ahead = codes + block * block_groups * GROUP_BYTES + AHEAD_KEPT;
    int64_t asked = 0;
    const auto& by_rows = kernels.by_rows[folds ? 2 : block_groups == 2];
    for (const Group* group = groups; group < groups + num_groups; ++group) {
      if (keeps) {
        for (int64_t end = asked + share; asked < end; asked += 64) __builtin_prefetch(ahead + asked);
      }
      const Source source = !keeps ? Source::codes : group == groups ? Source::codes_to_keep : Source::kept;
      by_rows[int(source)][group->rows - 1](
          codes + block * block_groups * GROUP_BYTES, pass_scales, kept,
          inputs + row_bytes * group->first_row + row_bytes / num_blocks * block * group->rows, blocks,
          totals + (group->first_row - groups->first_row) * TILE);
    }
  }
}

}  // namespace

namespace opd {

at::Tensor fp4_linear(
    const at::Tensor& x,
    const at::Tensor& codes,
    const at::Tensor& scales,
    at::IntArrayRef sizes,
    int64_t num_features,
    const std::string& path_name) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), "x must be contiguous [rows, inputs]");
  const bool is_bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(is_bf16 || x.scalar_type() == at::kFloat, "x must be float32 or bfloat16");
  TORCH_CHECK_VALUE(codes.dim() == 5 && codes.is_contiguous() && codes.scalar_type() == at::kByte, "bad codes");
  TORCH_CHECK_VALUE(scales.dim() == 4 && scales.is_contiguous() && scales.scalar_type() == at::kByte, "bad scales");
  const int64_t num_rows = x.size(0), width = x.size(1), num_tiles = codes.size(1), num_blocks = scales.size(2);
  TORCH_CHECK_VALUE(width > 0 && codes.size(2) * GROUP == width && codes.size(3) == TILE && codes.size(4) == 4,
                    "x has ", width, " inputs, the codes ", codes.size(2) * GROUP);
  TORCH_CHECK_VALUE(scales.size(0) == codes.size(0) && scales.size(1) == num_tiles && scales.size(3) == TILE &&
                        (num_blocks * 32 == width || num_blocks * 16 == width),
                    "scales do not belong to codes");
  TORCH_CHECK_VALUE(num_features <= num_tiles * TILE && num_features > (num_tiles - 1) * TILE,
                    num_features, " features do not fill ", num_tiles, " tiles");
  TORCH_CHECK_VALUE(static_cast<int64_t>(sizes.size()) == codes.size(0), "sizes must have one entry per expert");
  int64_t counted = 0;
  for (int64_t size : sizes) {
    TORCH_CHECK_VALUE(size >= 0, "sizes must not be negative");
    counted += size;
  }
  TORCH_CHECK_VALUE(counted == num_rows, "sizes sum to ", counted, ", x has ", num_rows, " rows");

  at::Tensor y = empty({num_rows, num_features}, x.options());
  if (num_rows == 0 || num_features == 0) return y;
  Path path = path_named(path_name);
  if (path == Path::avx512_bf16 && !is_bf16) path = Path::avx512;
  const bool in_pairs = path == Path::avx512_bf16;
  const Kernels& kernels = kernels_of(path);
  const int block_groups = num_blocks * 16 == width ? 2 : 4;

  std::vector<Group> groups;
  std::vector<Chunk> chunks;
  int64_t num_items = 0, first_row = 0;
  for (size_t expert = 0; expert < sizes.size(); ++expert) {
    for (int64_t done = 0; done < sizes[expert]; done += CHUNK_ROWS) {
      const int64_t rows = std::min(CHUNK_ROWS, sizes[expert] - done);
      const int64_t count = (rows + kernels.max_rows - 1) / kernels.max_rows;
      chunks.push_back({int64_t(expert), int64_t(groups.size()), count, num_items});
      for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
        groups.push_back({first_row + done + begin, end - begin});
      }
      num_items += num_tiles;
    }
    first_row += sizes[expert];
  }

  // Interleaved copy of x, rows of a group side by side. A lone row of the right type needs none.
  const int64_t row_bytes = width * (in_pairs ? 2 : 4);
  const char* x_bytes = static_cast<const char*>(x.const_data_ptr());
  const char* inputs = x_bytes;
  at::Tensor buffer;
  if (num_rows > 1 || is_bf16 != in_pairs) {
    buffer = empty({num_rows * row_bytes}, x.options().dtype(at::kByte));
    char* out = static_cast<char*>(buffer.mutable_data_ptr());
    inputs = out;
    const int64_t grain = std::max<int64_t>(1, (MIN_WORK >> 5) / (kernels.max_rows * width));
    at::parallel_for(0, groups.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        Group& group = groups[index];
        const int64_t first = group.first_row * width;
        char* to = out + group.first_row * row_bytes;
        if (in_pairs) {
#ifdef OPD_X86
          group.window = window_of(reinterpret_cast<const uint16_t*>(x_bytes) + first, group.rows * width);
          interleave_pairs(reinterpret_cast<const uint32_t*>(x_bytes) + first / 2, width / 2, group.rows,
                           reinterpret_cast<uint32_t*>(to));
#endif
        } else if (is_bf16) {
          interleave(reinterpret_cast<const c10::BFloat16*>(x_bytes) + first, width, group.rows,
                     reinterpret_cast<float*>(to));
        } else {
          interleave(reinterpret_cast<const float*>(x_bytes) + first, width, group.rows, reinterpret_cast<float*>(to));
        }
      }
    });
  }

  const uint8_t* code_bytes = codes.const_data_ptr<uint8_t>();
  const uint8_t* scale_bytes = scales.const_data_ptr<uint8_t>();
  const int64_t code_stride = width / 2 * TILE, scale_stride = num_blocks * TILE;
  auto* narrow_best = &narrow;
#ifdef OPD_X86
  if (path == Path::avx512 || path == Path::avx512_bf16) narrow_best = &narrow_avx512;
#endif
  const int64_t element_bytes = x.element_size();
  char* y_bytes = static_cast<char*>(y.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / (width * TILE * std::min<int64_t>(num_rows, 8)));
  at::parallel_for(0, num_items, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float totals[CHUNK_ROWS * TILE];
    auto chunk = std::upper_bound(chunks.begin(), chunks.end(), begin,
                                  [](int64_t item, const Chunk& c) { return item < c.first_item; }) - 1;
    for (int64_t item = begin; item < end; ++item) {
      while (item >= chunk->first_item + num_tiles) ++chunk;
      const int64_t tile = item - chunk->first_item, at = chunk->expert * num_tiles + tile;
      const Group *first_group = &groups[chunk->first_group], *last_group = first_group + chunk->groups - 1;
      const int64_t first_row = first_group->first_row, rows = last_group->first_row + last_group->rows - first_row;
      const int64_t feature = tile * TILE, lanes = std::min<int64_t>(TILE, num_features - feature);
      const int64_t to = first_row * num_features + feature;
      // Rows of y are far apart, so a tile's are asked for while it is computed.
      for (int64_t n = 0; n < rows; ++n) __builtin_prefetch(y_bytes + (to + n * num_features) * element_bytes, 1);
      std::fill(totals, totals + rows * TILE, 0.f);
      multiply(kernels, first_group, chunk->groups, code_bytes + at * code_stride, scale_bytes + at * scale_stride,
               inputs, row_bytes, num_blocks, block_groups, totals);
      if (is_bf16) {
        narrow_best(totals, rows, lanes, reinterpret_cast<c10::BFloat16*>(y_bytes) + to, num_features);
      } else {
        float* place = reinterpret_cast<float*>(y_bytes) + to;
        for (int64_t n = 0; n < rows; ++n) {
          std::memcpy(place + n * num_features, totals + n * TILE, lanes * sizeof(float));
        }
      }
    }
  });
  return y;
}

// A contiguous copy that begins where a large page can and fills such pages from there, if the system gives any:
// reading packed weights once from end to end is slowed by every change of page. What fills none is only contiguous.
at::Tensor in_large_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr size_t PAGE = 2 << 20;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which the C library's headers may be too old to name
  const size_t whole = tensor.nbytes() / PAGE * PAGE;
  void* place = nullptr;
  if (whole > 0 && posix_memalign(&place, PAGE, tensor.nbytes()) == 0) {
    at::Tensor copy = at::from_blob(place, tensor.sizes(), std::free, tensor.options());
    copy.copy_(tensor);
    madvise(place, whole, COLLAPSE);  // only a wish, which costs no memory
    return copy;
  }
#endif
  return tensor.contiguous();
}

}  // namespace opd

TORCH_LIBRARY(opd, library) {
  library.def("in_large_pages(Tensor tensor) -> Tensor");
  library.def("fp4_paths() -> str[]", path_names);
  library.def("fp4_linear(Tensor x, Tensor codes, Tensor scales, int[] sizes, int num_features, str path) -> Tensor");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) {
  library.impl("fp4_linear", opd::fp4_linear);
  library.impl("in_large_pages", opd::in_large_pages);
}
