// Products with packed FP4 weights on the CPU: y[r, n] = sum over k of x[r, k] * W_e[n, k], rows sorted by expert e.
//
// The one idea: 16 output features lie side by side in the lanes of a vector, so that a weight is decoded by one table
// look-up, its activation is one broadcast, and nothing is ever summed across lanes. An element's products are added in
// one fixed order, first within a block and then, times the block's scale, over blocks. Hence a row's result is the
// same bits whatever rows, threads and experts it is computed with; it depends on the path only.
//
// Packed layout (made by opd/kernels/cpu.py). A tile is 16 output features; N is padded to whole tiles.
//   codes  [E, tiles, K / 8, 16, 4]: for every 8 inputs, 4 bytes per feature. Nibble p of those 32 bits, from the
//          lowest, is input ORDER[p]: two 16-bit halves that, shifted alike, show two neighbouring inputs.
//   scales [E, tiles, K / B, 16]: one byte per feature and block of B inputs. B = 32: 2 ** (byte - 127), 1..254.
//          B = 16: E4M3.
//
// Paths, of which the best that the processor has is taken: avx512_bf16 (bfloat16 activations are multiplied as they
// are, two per lane), avx512, avx2, plain. All accumulate in float32; all but the first widen bfloat16 activations.
// Left out: gradients, and activations of other types.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define OPD_X86 1
#endif

namespace {

constexpr int LANES = 16;        // features of a tile
constexpr int GROUP = 8;         // inputs in the 32 bits of one lane
constexpr int GROUP_BYTES = 64;  // of a tile
constexpr int ORDER[GROUP] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int64_t CHUNK_ROWS = 64;     // rows that share one pass over an expert's weights: their inputs fit in L2
constexpr int64_t MIN_WORK = 1 << 20;  // products below which a second thread costs more than it saves

constexpr float E2M1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

// The same values as bfloat16, twice: vpermw reads 5 bits of an index, the last of which belongs to the next code.
alignas(64) constexpr uint16_t E2M1_BF16[32] = {
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
    0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
    0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

enum class Path { plain, avx2, avx512, avx512_bf16 };

// One tile times NB rows: codes, scales, rows interleaved as [K][NB] (bfloat16: [K / 2][NB] pairs), blocks of K,
// output [NB][16].
using TileKernel = void (*)(const uint8_t*, const uint8_t*, const void*, int64_t, float*);

// How far ahead of their use codes are asked for: memory's latency times a core's bandwidth. The processor's own
// prefetcher stops at every page.
constexpr int AHEAD = 4096;

// Independent sums that hide the latency of an addition: as many blocks at a time as a few rows leave room for.
constexpr int unroll_of(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int GROUPS>
inline float scale_of(uint8_t byte) {
  if constexpr (GROUPS == 4) return float_of(uint32_t(byte) << 23);
  return float_of(uint32_t(byte) << 20) * 0x1p120f;  // E4M3 in a float's fields; 120 is the difference of the biases
}

template <int NB, int GROUPS>
void tile_plain(const uint8_t* codes, const uint8_t* scales, const void* x_, int64_t num_blocks, float* out) {
  const float* x = static_cast<const float*>(x_);
  std::fill(out, out + NB * LANES, 0.f);
  for (int64_t block = 0; block < num_blocks; ++block) {
    float sum[NB][LANES] = {};
    for (int group = 0; group < GROUPS; ++group, codes += GROUP_BYTES, x += GROUP * NB) {
      for (int p = 0; p < GROUP; ++p) {
        float weight[LANES];
        for (int lane = 0; lane < LANES; ++lane) weight[lane] = E2M1[codes[4 * lane + p / 2] >> (p % 2 * 4) & 15];
        for (int n = 0; n < NB; ++n) {
          for (int lane = 0; lane < LANES; ++lane) sum[n][lane] += weight[lane] * x[ORDER[p] * NB + n];
        }
      }
    }
    for (int lane = 0; lane < LANES; ++lane) {
      const float scale = scale_of<GROUPS>(scales[lane]);
      for (int n = 0; n < NB; ++n) out[n * LANES + lane] += sum[n][lane] * scale;
    }
    scales += LANES;
  }
}

#ifdef OPD_X86

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

template <int NB, int GROUPS>
AVX2 void tile_avx2(const uint8_t* codes, const uint8_t* scales, const void* x_, int64_t num_blocks, float* out) {
  const __m256 magnitudes = _mm256_loadu_ps(E2M1);
  const __m256i sign_bit = _mm256_set1_epi32(INT32_MIN);
  for (int half = 0; half < LANES; half += 8) {
    const float* x = static_cast<const float*>(x_);
    const uint8_t* code = codes + 4 * half;
    const uint8_t* scale_bytes = scales + half;
    __m256 total[NB];
    for (int n = 0; n < NB; ++n) total[n] = _mm256_setzero_ps();
    for (int64_t block = 0; block < num_blocks; ++block, scale_bytes += LANES) {
      __m256 sum[NB];
      for (int n = 0; n < NB; ++n) sum[n] = _mm256_setzero_ps();
      for (int group = 0; group < GROUPS; ++group, code += GROUP_BYTES, x += GROUP * NB) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
#pragma GCC unroll 8
        for (int p = 0; p < GROUP; ++p) {
          const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(raw, 28 - 4 * p), sign_bit);
          const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, _mm256_srli_epi32(raw, 4 * p));
          const __m256 weight = _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
#pragma GCC unroll 16
          for (int n = 0; n < NB; ++n) {
            sum[n] = _mm256_fmadd_ps(weight, _mm256_broadcast_ss(x + ORDER[p] * NB + n), sum[n]);
          }
        }
      }
      const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scale_bytes)));
      __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(bytes, GROUPS == 4 ? 23 : 20));
      if (GROUPS == 2) scale = _mm256_mul_ps(scale, _mm256_set1_ps(0x1p120f));
      for (int n = 0; n < NB; ++n) total[n] = _mm256_fmadd_ps(sum[n], scale, total[n]);
    }
    for (int n = 0; n < NB; ++n) _mm256_storeu_ps(out + n * LANES + half, total[n]);
  }
}

// One or two rows take codes as fast as memory gives them: those go to L2, for what waits on its way to L1 takes up the
// few slots that loads need too, and a third of the bandwidth with them. With more rows there is time, and L1 is nearer.
template <int NB>
constexpr _mm_hint PREFETCH = NB <= 2 ? _MM_HINT_T1 : _MM_HINT_T0;

// The scales of a block of all 16 features.
template <int GROUPS>
AVX512 __attribute__((always_inline)) inline __m512 scales_avx512(const uint8_t* bytes) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  if constexpr (GROUPS == 4) return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 23));
  return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 20)), _mm512_set1_ps(0x1p120f));
}

// UNROLL blocks of one tile, in steps that are independent of each other; the totals take them up in order.
template <int NB, int UNROLL, int GROUPS>
AVX512 __attribute__((always_inline)) inline void blocks_avx512(
    const uint8_t* codes, const uint8_t* scales, const float* x, __m512 table, __m512* total) {
  __m512 sum[UNROLL][NB];
#pragma GCC unroll 4
  for (int u = 0; u < UNROLL; ++u)
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) sum[u][n] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int group = 0; group < GROUPS; ++group) {
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) {
      const int at = u * GROUPS + group;
      const __m512i raw = _mm512_loadu_si512(codes + at * GROUP_BYTES);
      _mm_prefetch(reinterpret_cast<const char*>(codes + at * GROUP_BYTES + AHEAD), PREFETCH<NB>);
#pragma GCC unroll 8
      for (int p = 0; p < GROUP; ++p) {
        const __m512 weight = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4 * p), table);  // reads the low 4 bits
#pragma GCC unroll 16
        for (int n = 0; n < NB; ++n) {
          sum[u][n] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[(at * GROUP + ORDER[p]) * NB + n]), sum[u][n]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < UNROLL; ++u) {
    const __m512 scale = scales_avx512<GROUPS>(scales + u * LANES);
    if (u == 0) _mm_prefetch(reinterpret_cast<const char*>(scales + AHEAD / GROUP_BYTES / GROUPS * LANES), PREFETCH<NB>);
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) total[n] = _mm512_fmadd_ps(sum[u][n], scale, total[n]);
  }
}

template <int NB, int GROUPS>
AVX512 void tile_avx512(const uint8_t* codes, const uint8_t* scales, const void* x_, int64_t num_blocks, float* out) {
  constexpr int UNROLL = unroll_of(NB), BYTES = GROUPS * GROUP_BYTES, INPUTS = GROUPS * GROUP;
  const float* x = static_cast<const float*>(x_);
  const __m512 table = _mm512_loadu_ps(E2M1);
  __m512 total[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) total[n] = _mm512_setzero_ps();
  int64_t block = 0;
  for (; block + UNROLL <= num_blocks; block += UNROLL) {
    blocks_avx512<NB, UNROLL, GROUPS>(codes, scales, x, table, total);
    codes += UNROLL * BYTES, scales += UNROLL * LANES, x += UNROLL * INPUTS * NB;
  }
  for (; block < num_blocks; ++block) {
    blocks_avx512<NB, 1, GROUPS>(codes, scales, x, table, total);
    codes += BYTES, scales += LANES, x += INPUTS * NB;
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) _mm512_storeu_ps(out + n * LANES, total[n]);
}

template <int NB, int UNROLL, int GROUPS>
AVX512_BF16 __attribute__((always_inline)) inline void blocks_avx512_bf16(
    const uint8_t* codes, const uint8_t* scales, const uint32_t* x, __m512i table, __m512* total) {
  __m512 sum[UNROLL][NB];
#pragma GCC unroll 4
  for (int u = 0; u < UNROLL; ++u)
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) sum[u][n] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int group = 0; group < GROUPS; ++group) {
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) {
      const int at = u * GROUPS + group;
      const __m512i raw = _mm512_loadu_si512(codes + at * GROUP_BYTES);
      _mm_prefetch(reinterpret_cast<const char*>(codes + at * GROUP_BYTES + AHEAD), PREFETCH<NB>);
#pragma GCC unroll 4
      for (int p = 0; p < GROUP / 2; ++p) {
        __m512i index = _mm512_srli_epi16(raw, 4 * p);
        if constexpr (NB == 1) {
          // Here decoding is what takes the time, and loading from one byte on is a shift by 8 that shares no unit with
          // it. The last byte is masked, for it may be beyond the tensor; no index needs it.
          if (p >= 2) index = _mm512_maskz_loadu_epi8(~(1ULL << 63), codes + at * GROUP_BYTES + 1);
          if (p == 3) index = _mm512_srli_epi16(index, 4);
        }
        const __m512i weight = _mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 16
        for (int n = 0; n < NB; ++n) {
          const __m512i pair = _mm512_set1_epi32(x[(at * (GROUP / 2) + p) * NB + n]);
          sum[u][n] = _mm512_dpbf16_ps(sum[u][n], (__m512bh)weight, (__m512bh)pair);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < UNROLL; ++u) {
    const __m512 scale = scales_avx512<GROUPS>(scales + u * LANES);
    if (u == 0) _mm_prefetch(reinterpret_cast<const char*>(scales + AHEAD / GROUP_BYTES / GROUPS * LANES), PREFETCH<NB>);
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) total[n] = _mm512_fmadd_ps(sum[u][n], scale, total[n]);
  }
}

template <int NB, int GROUPS>
AVX512_BF16 void tile_avx512_bf16(
    const uint8_t* codes, const uint8_t* scales, const void* x_, int64_t num_blocks, float* out) {
  constexpr int UNROLL = unroll_of(NB), BYTES = GROUPS * GROUP_BYTES, PAIRS = GROUPS * GROUP / 2;
  const uint32_t* x = static_cast<const uint32_t*>(x_);
  const __m512i table = _mm512_load_si512(E2M1_BF16);
  __m512 total[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) total[n] = _mm512_setzero_ps();
  int64_t block = 0;
  for (; block + UNROLL <= num_blocks; block += UNROLL) {
    blocks_avx512_bf16<NB, UNROLL, GROUPS>(codes, scales, x, table, total);
    codes += UNROLL * BYTES, scales += UNROLL * LANES, x += UNROLL * PAIRS * NB;
  }
  for (; block < num_blocks; ++block) {
    blocks_avx512_bf16<NB, 1, GROUPS>(codes, scales, x, table, total);
    codes += BYTES, scales += LANES, x += PAIRS * NB;
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) _mm512_storeu_ps(out + n * LANES, total[n]);
}

#endif  // OPD_X86

constexpr int MAX_ROWS = 16;  // of a tile's product, on any path

struct Kernels {
  int max_rows;
  TileKernel by_rows[2][MAX_ROWS];  // [B == 16][rows - 1]
};

#define OPD_TABLE(NAME, COUNT)                                                                     \
  []<int... I>(std::integer_sequence<int, I...>) {                                                 \
    return Kernels{COUNT, {{NAME<I + 1, 4>...}, {NAME<I + 1, 2>...}}};                             \
  }(std::make_integer_sequence<int, COUNT>())

const Kernels& kernels_of(Path path) {
  static const Kernels plain = OPD_TABLE(tile_plain, 4);
#ifdef OPD_X86
  static const Kernels avx2 = OPD_TABLE(tile_avx2, 6);
  static const Kernels avx512 = OPD_TABLE(tile_avx512, 16);
  static const Kernels avx512_bf16 = OPD_TABLE(tile_avx512_bf16, 16);
  switch (path) {
    case Path::avx2: return avx2;
    case Path::avx512: return avx512;
    case Path::avx512_bf16: return avx512_bf16;
    case Path::plain: break;
  }
#endif
  return plain;
}

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

// Rows of one expert that share a pass over its weights, cut into near-equal groups for the tile kernels.
struct Chunk {
  int64_t expert, first_row, rows, groups;
  int64_t first_item;  // of the work items, which are (chunk, tile, group), group fastest

  int64_t group_begin(int64_t group) const { return first_row + rows * group / groups; }
};

template <typename From, typename To>
void interleave(const From* x, int64_t width, int64_t rows, To* out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < width; ++k) out[k * rows + row] = static_cast<To>(x[row * width + k]);
  }
}

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
  TORCH_CHECK_VALUE(width > 0 && codes.size(2) * GROUP == width && codes.size(3) == LANES && codes.size(4) == 4,
                    "x has ", width, " inputs, the codes ", codes.size(2) * GROUP);
  TORCH_CHECK_VALUE(scales.size(0) == codes.size(0) && scales.size(1) == num_tiles && scales.size(3) == LANES &&
                        (num_blocks * 32 == width || num_blocks * 16 == width),
                    "scales do not belong to codes");
  TORCH_CHECK_VALUE(num_features <= num_tiles * LANES && num_features > (num_tiles - 1) * LANES,
                    num_features, " features do not fill ", num_tiles, " tiles");
  TORCH_CHECK_VALUE(static_cast<int64_t>(sizes.size()) == codes.size(0), "sizes must have one entry per expert");
  int64_t counted = 0;
  for (int64_t size : sizes) {
    TORCH_CHECK_VALUE(size >= 0, "sizes must not be negative");
    counted += size;
  }
  TORCH_CHECK_VALUE(counted == num_rows, "sizes sum to ", counted, ", x has ", num_rows, " rows");

  at::Tensor y = at::empty({num_rows, num_features}, x.options());
  if (num_rows == 0 || num_features == 0) return y;
  Path path = path_named(path_name);
  if (path == Path::avx512_bf16 && !is_bf16) path = Path::avx512;
  const bool in_pairs = path == Path::avx512_bf16;
  const Kernels& kernels = kernels_of(path);
  const auto& by_rows = kernels.by_rows[num_blocks * 16 == width];

  std::vector<Chunk> chunks;
  int64_t num_items = 0, first_row = 0;
  for (size_t expert = 0; expert < sizes.size(); ++expert) {
    for (int64_t done = 0; done < sizes[expert]; done += CHUNK_ROWS) {
      const int64_t rows = std::min(CHUNK_ROWS, sizes[expert] - done);
      const int64_t groups = (rows + kernels.max_rows - 1) / kernels.max_rows;
      chunks.push_back({static_cast<int64_t>(expert), first_row + done, rows, groups, num_items});
      num_items += num_tiles * groups;
    }
    first_row += sizes[expert];
  }

  // Interleaved copy of x, rows of a group side by side. A lone row of the right type needs none.
  const int64_t row_bytes = width * (in_pairs ? 2 : 4);
  const char* x_bytes = static_cast<const char*>(x.const_data_ptr());
  const char* inputs = x_bytes;
  at::Tensor buffer;
  if (num_rows > 1 || is_bf16 != in_pairs) {
    buffer = at::empty({num_rows * row_bytes}, x.options().dtype(at::kByte));
    char* out = static_cast<char*>(buffer.mutable_data_ptr());
    inputs = out;
    at::parallel_for(0, chunks.size(), std::max<int64_t>(1, MIN_WORK / (64 * width)), [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Chunk& chunk = chunks[index];
        for (int64_t group = 0; group < chunk.groups; ++group) {
          const int64_t row = chunk.group_begin(group), rows = chunk.group_begin(group + 1) - row;
          char* to = out + row * row_bytes;
          if (in_pairs) {
            interleave(reinterpret_cast<const uint32_t*>(x_bytes) + row * width / 2, width / 2, rows,
                       reinterpret_cast<uint32_t*>(to));
          } else if (is_bf16) {
            interleave(reinterpret_cast<const c10::BFloat16*>(x_bytes) + row * width, width, rows,
                       reinterpret_cast<float*>(to));
          } else {
            interleave(reinterpret_cast<const float*>(x_bytes) + row * width, width, rows,
                       reinterpret_cast<float*>(to));
          }
        }
      }
    });
  }

  const uint8_t* code_bytes = codes.const_data_ptr<uint8_t>();
  const uint8_t* scale_bytes = scales.const_data_ptr<uint8_t>();
  const int64_t code_stride = width / 2 * LANES, scale_stride = num_blocks * LANES;
  float* y_float = is_bf16 ? nullptr : y.mutable_data_ptr<float>();
  c10::BFloat16* y_bf16 = is_bf16 ? y.mutable_data_ptr<c10::BFloat16>() : nullptr;
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / (width * LANES * std::min<int64_t>(num_rows, 8)));
  at::parallel_for(0, num_items, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float out[MAX_ROWS * LANES];
    auto chunk = std::upper_bound(chunks.begin(), chunks.end(), begin,
                                  [](int64_t item, const Chunk& c) { return item < c.first_item; }) - 1;
    for (int64_t item = begin; item < end; ++item) {
      while (item >= chunk->first_item + num_tiles * chunk->groups) ++chunk;
      const int64_t tile = (item - chunk->first_item) / chunk->groups, group = (item - chunk->first_item) % chunk->groups;
      const int64_t row = chunk->group_begin(group), rows = chunk->group_begin(group + 1) - row;
      const int64_t at = chunk->expert * num_tiles + tile;
      by_rows[rows - 1](code_bytes + at * code_stride, scale_bytes + at * scale_stride, inputs + row * row_bytes,
                        num_blocks, out);
      const int64_t first = tile * LANES, lanes = std::min<int64_t>(LANES, num_features - first);
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t to = (row + n) * num_features + first;
        if (is_bf16) {
          for (int64_t lane = 0; lane < lanes; ++lane) y_bf16[to + lane] = out[n * LANES + lane];
        } else {
          std::memcpy(y_float + to, out + n * LANES, lanes * sizeof(float));
        }
      }
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(opd, library) {
  library.def("fp4_paths() -> str[]", path_names);
  library.def("fp4_linear(Tensor x, Tensor codes, Tensor scales, int[] sizes, int num_features, str path) -> Tensor");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) { library.impl("fp4_linear", fp4_linear); }
