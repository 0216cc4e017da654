// The products of one tile of packed FP4 weights with a few rows, for every path. Included by fp4_linear.cpp, inside
// its anonymous namespace; that file's head states the layout and the order of additions.

constexpr int TILE = 32;          // features that lie side by side
constexpr int LANES = 16;         // features of a vector
constexpr int GROUP = 8;          // inputs in the 32 bits of one lane
constexpr int GROUP_BYTES = 128;  // of a tile
constexpr int ORDER[GROUP] = {0, 2, 4, 6, 1, 3, 5, 7};

constexpr float E2M1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

// The same values as bfloat16, twice: vpermw reads 5 bits of an index, the last of which belongs to the next code.
alignas(64) constexpr uint16_t E2M1_BF16[32] = {
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
    0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
    0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

// Those times 2 ** 125, but for the zeros: of these 16 bits (252 - scale byte) << 7 is taken to multiply by the scale.
struct Folding {
  alignas(64) uint16_t values[32] = {};
  constexpr Folding() {
    for (int i = 0; i < 32; ++i) values[i] = E2M1_BF16[i] & 0x7fff ? E2M1_BF16[i] + (125 << 7) : 0;
  }
};
constexpr Folding FOLDING_TABLE;
constexpr const uint16_t* FOLDING = FOLDING_TABLE.values;

enum class Path { plain, avx2, avx512, avx512_bf16 };

// How a block's scale comes in: after the block's products have been added, or in the weights themselves. Since it is a
// power of two that is the same bits, as long as nothing overflows or falls below the normal numbers (see `Window`).
enum class Scales { apart, folded };

// Where weights come from: from codes, from codes and on into `kept`, or from `kept`, where the last call left them.
enum class Source { codes, codes_to_keep, kept };

// Adds to totals [rows][32] one tile times so many rows: codes, scales, `kept` (KEPT bytes, or unused), rows
// interleaved as [K][rows] (bfloat16: [K / 2][rows] pairs), blocks of K.
using TileKernel = void (*)(const uint8_t*, const uint8_t*, uint32_t*, const void*, int64_t, float*);

// How far ahead of their use codes are asked for. A processor's own prefetcher begins anew at every page, and this
// hides memory's latency on either side of it. Many rows, which need longer for a code, ask less far ahead.
constexpr int AHEAD = 8192, AHEAD_KEPT = 4096;

constexpr int KEPT = 8192;  // bytes of decoded weights: with the rows they meet, they fit in a first-level cache

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
void tile_plain(
    const uint8_t* codes, const uint8_t* scales, uint32_t*, const void* x_, int64_t num_blocks, float* totals) {
  const float* x = static_cast<const float*>(x_);
  for (int64_t block = 0; block < num_blocks; ++block) {
    float sum[NB][TILE] = {};
    for (int group = 0; group < GROUPS; ++group, codes += GROUP_BYTES, x += GROUP * NB) {
      for (int p = 0; p < GROUP; ++p) {
        float weight[TILE];
        for (int lane = 0; lane < TILE; ++lane) weight[lane] = E2M1[codes[4 * lane + p / 2] >> (p % 2 * 4) & 15];
        for (int n = 0; n < NB; ++n) {
          for (int lane = 0; lane < TILE; ++lane) sum[n][lane] += weight[lane] * x[ORDER[p] * NB + n];
        }
      }
    }
    for (int lane = 0; lane < TILE; ++lane) {
      const float scale = scale_of<GROUPS>(scales[lane]);
      for (int n = 0; n < NB; ++n) totals[n * TILE + lane] += sum[n][lane] * scale;
    }
    scales += TILE;
  }
}

#ifdef OPD_X86

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

template <int NB, int GROUPS>
AVX2 void tile_avx2(
    const uint8_t* codes, const uint8_t* scales, uint32_t*, const void* x_, int64_t num_blocks, float* totals) {
  const __m256 magnitudes = _mm256_loadu_ps(E2M1);
  const __m256i sign_bit = _mm256_set1_epi32(INT32_MIN);
  for (int half = 0; half < TILE; half += 8) {
    const float* x = static_cast<const float*>(x_);
    const uint8_t* code = codes + 4 * half;
    const uint8_t* scale_bytes = scales + half;
    __m256 total[NB];
    for (int n = 0; n < NB; ++n) total[n] = _mm256_loadu_ps(totals + n * TILE + half);
    for (int64_t block = 0; block < num_blocks; ++block, scale_bytes += TILE) {
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
    for (int n = 0; n < NB; ++n) _mm256_storeu_ps(totals + n * TILE + half, total[n]);
  }
}

namespace avx512 {
#define KERNEL AVX512
#define PAIRS 0
#include "fp4_avx512_kernels.h"
#undef KERNEL
#undef PAIRS
}  // namespace avx512

namespace avx512_bf16 {
#define KERNEL AVX512_BF16
#define PAIRS 1
#include "fp4_avx512_kernels.h"
#undef KERNEL
#undef PAIRS
}  // namespace avx512_bf16

#endif  // OPD_X86

constexpr int MAX_ROWS = 8;  // that a kernel takes, on any path

using ByRows = std::array<TileKernel, MAX_ROWS>;  // [rows - 1]

// The kernels of one path.
struct Kernels {
  int max_rows;
  int kept_bytes;          // of a group's decoded weights; 0: every call reads codes
  ByRows by_rows[3][3];    // [scales: apart with B = 32, apart with B = 16, folded with B = 32][source]
};

#define OPD_ROWS(COUNT, ...)                       \
  []<int... I>(std::integer_sequence<int, I...>) { \
    return ByRows{__VA_ARGS__...};                 \
  }(std::make_integer_sequence<int, COUNT>())

#define OPD_SOURCES(NAMESPACE, GROUPS, SCALES)                                    \
  {OPD_ROWS(MAX_ROWS, NAMESPACE::tile<I + 1, GROUPS, SCALES, Source::codes>),     \
   OPD_ROWS(MAX_ROWS, NAMESPACE::tile<I + 1, GROUPS, SCALES, Source::codes_to_keep>), \
   OPD_ROWS(MAX_ROWS, NAMESPACE::tile<I + 1, GROUPS, SCALES, Source::kept>)}

const Kernels& kernels_of(Path path) {
  static const Kernels plain = {4, 0, {{OPD_ROWS(4, tile_plain<I + 1, 4>)}, {OPD_ROWS(4, tile_plain<I + 1, 2>)}}};
#ifdef OPD_X86
  static const Kernels avx2 = {6, 0, {{OPD_ROWS(6, tile_avx2<I + 1, 4>)}, {OPD_ROWS(6, tile_avx2<I + 1, 2>)}}};
  static const Kernels avx512 = {
      MAX_ROWS,
      GROUP * TILE * 4,
      {OPD_SOURCES(avx512, 4, Scales::apart), OPD_SOURCES(avx512, 2, Scales::apart)}};
  static const Kernels avx512_bf16 = {
      MAX_ROWS,
      GROUP * TILE * 2,
      {OPD_SOURCES(avx512_bf16, 4, Scales::apart), OPD_SOURCES(avx512_bf16, 2, Scales::apart),
       OPD_SOURCES(avx512_bf16, 4, Scales::folded)}};
  switch (path) {
    case Path::avx2: return avx2;
    case Path::avx512: return avx512;
    case Path::avx512_bf16: return avx512_bf16;
    case Path::plain: break;
  }
#endif
  return plain;
}
