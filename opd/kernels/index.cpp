// The lightning indexer's choice on the CPU: for every query the k entries with the largest
// sum_h weight_h * relu(query_h . key), equal scores going to the lower entry.
//
// The one idea: no score is ever stored for longer than a chunk of keys. A task takes a few queries of a row and a span
// of the row's keys, brings the keys chunk by chunk into the order of the lanes, scores them and keeps what beats the
// k-th best so far. Scores and indices are compared as one whole number, so the result does not depend on how queries
// and keys are cut, on the number of threads, or on chance.
//
// Keys are read where they lie, by a table of pages; a plain tensor is one page. Rows are float32, bfloat16 or packed
// MXFP4 (codes, then one scale byte per 32 channels). Where queries and keys are MXFP4 values, products are made in
// whole numbers: every one of a block of 32 is a multiple of one power of two, by no more than 15, so they are exact.

#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <functional>

#include "operators.h"
#include "vectors.h"

#ifdef OPD_X86
#include <immintrin.h>
#endif

namespace {

constexpr int TILE = 32;              // keys side by side
constexpr int64_t CHUNK = 8 * TILE;   // keys that are brought into order at a time: they fit a processor's own cache
constexpr int64_t QUERIES = 64;       // of a task: how often a chunk that is in order is used
constexpr int64_t MIN_SPAN = 2048;    // keys of a task, where there are too few queries to occupy all threads
constexpr int64_t MIN_WORK = 1 << 18; // products of a task's smallest worth
constexpr int BLOCK = 32;             // channels that share a scale in MXFP4
constexpr int OFFSET = 16;            // added to a key's whole numbers: the instruction wants them without a sign

#define LOOPS "index_kernels.h"
#include "every_vector.h"

#ifdef OPD_X86
#define WHOLE __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma")))
bool has_whole_products() {
  static const bool found = has_avx512() && __builtin_cpu_supports("avx512vnni");
  return found;
}
#else
bool has_whole_products() { return false; }
#endif

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 2 ** (byte - 127 - less), zero where a float has nothing that small; byte 255 is NaN.
inline float scale_of(int byte, int less) {
  if (byte == 255) return std::nanf("");
  return byte > less ? float_of(uint32_t(byte - less) << 23) : 0.f;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

enum class Rows { floats, bfloats, packed };

constexpr float E2M1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

// A stored row's `width` channels as floats, in `buffer` unless that is how they are stored.
const float* floats_of(const char* row, Rows kind, int64_t width, float* buffer) {
  switch (kind) {
    case Rows::floats:
      return reinterpret_cast<const float*>(row);
    case Rows::bfloats: {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
      for (int64_t c = 0; c < width; ++c) buffer[c] = float_of(uint32_t(halves[c]) << 16);
      return buffer;
    }
    case Rows::packed: {
      const uint8_t *codes = reinterpret_cast<const uint8_t*>(row), *scales = codes + width / 2;
      for (int64_t c = 0; c < width; c += 2) {
        const float scale = scale_of(scales[c / BLOCK], 0);
        buffer[c] = E2M1[codes[c / 2] & 15] * scale, buffer[c + 1] = E2M1[codes[c / 2] >> 4] * scale;
      }
      return buffer;
    }
  }
  return buffer;
}

#ifdef OPD_X86
// 32 MXFP4 values as whole numbers of at most 15 and the power of two that they are multiples of. Others are rounded to
// such; where one is not finite, the power is NaN.
WHOLE inline float whole_block(__m512 low, __m512 high, int8_t* out) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const uint32_t largest = _mm512_reduce_max_epi32(_mm512_max_epi32(
      _mm512_and_si512(_mm512_castps_si512(low), magnitude), _mm512_and_si512(_mm512_castps_si512(high), magnitude)));
  const int exponent = largest >> 23;
  // The largest is 2 ** (exponent - 127) times 1 or 1.5: any of a block is a multiple of an eighth of that power.
  const bool is_small = exponent < 4, is_finite = exponent < 255;
  const __m512 inverse = _mm512_set1_ps(is_small || !is_finite ? 0.f : float_of(uint32_t(257 - exponent) << 23));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse))));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16),
                   _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse))));
  return is_finite ? (is_small ? 0.f : float_of(uint32_t(exponent - 3) << 23)) : std::nanf("");
}

WHOLE inline float whole_block(const float* values, int8_t* out) {
  return whole_block(_mm512_loadu_ps(values), _mm512_loadu_ps(values + 16), out);
}

WHOLE inline float whole_block(const uint16_t* values, int8_t* out) {
  __m512 halves[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 16 * i));
    halves[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16));
  }
  return whole_block(halves[0], halves[1], out);
}

// The same of 16 packed bytes and their scale.
WHOLE inline float whole_block(const uint8_t* codes, uint8_t scale, int8_t* out) {
  const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(bytes, nibble));
  const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(even, odd));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm_unpackhi_epi8(even, odd));
  return scale_of(scale, 1);
}

// One query against tiles of keys. whole: [head][width] and keys [tile][width / 4][TILE][4] (with OFFSET); scales of
// queries [head][width / BLOCK], of keys [tile][width / BLOCK][TILE]; shift [head][width / BLOCK]: what OFFSET costs.
// weights [head]: of one block the scales are factored out, powers of two, so that the result is the same to the bit.
struct WholeQuery {
  std::vector<int8_t> whole;
  std::vector<float> scales, weights;
  std::vector<int32_t> shift;
};

template <int HEADS, bool ONE_BLOCK>
WHOLE inline void add_whole_heads(const int8_t* whole, const float* scales, const int32_t* shift, const float* weights,
                                  const uint8_t* keys, const float* key_scales, int64_t width, __m512* totals) {
  const int64_t blocks = ONE_BLOCK ? 1 : width / BLOCK;
  __m512 sums[HEADS][2] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    __m512i products[HEADS][2];
    for (int h = 0; h < HEADS; ++h) products[h][0] = products[h][1] = _mm512_set1_epi32(shift[h * blocks + block]);
    for (int g = 0; g < BLOCK / 4; ++g) {
      const uint8_t* at = keys + (block * (BLOCK / 4) + g) * TILE * 4;
      const __m512i first = _mm512_loadu_si512(at), second = _mm512_loadu_si512(at + 64);
      for (int h = 0; h < HEADS; ++h) {
        int32_t four;
        std::memcpy(&four, whole + h * width + block * BLOCK + g * 4, 4);
        const __m512i query = _mm512_set1_epi32(four);
        products[h][0] = _mm512_dpbusd_epi32(products[h][0], first, query);
        products[h][1] = _mm512_dpbusd_epi32(products[h][1], second, query);
      }
    }
    for (int v = 0; v < 2; ++v) {
      const __m512 key_scale = ONE_BLOCK ? _mm512_set1_ps(1.f) : _mm512_loadu_ps(key_scales + block * TILE + v * 16);
      for (int h = 0; h < HEADS; ++h) {
        const __m512 product = _mm512_cvtepi32_ps(products[h][v]);
        const __m512 scale = _mm512_mul_ps(key_scale, _mm512_set1_ps(scales[h * blocks + block]));
        sums[h][v] = ONE_BLOCK ? product : _mm512_fmadd_ps(product, scale, sums[h][v]);
      }
    }
  }
  for (int h = 0; h < HEADS; ++h) {
    const __m512 weight = _mm512_set1_ps(weights[h]);
    for (int v = 0; v < 2; ++v) {
      totals[v] = _mm512_fmadd_ps(weight, _mm512_max_ps(_mm512_setzero_ps(), sums[h][v]), totals[v]);
    }
  }
}

template <bool ONE_BLOCK>
WHOLE void whole_score(const WholeQuery& query, int64_t first, const uint8_t* keys, const float* key_scales,
                       int64_t heads, int64_t width, int64_t tiles, float* out) {
  const int64_t blocks = width / BLOCK;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    __m512 totals[2] = {};
    const uint8_t* part = keys + tile * width * TILE;
    const float* part_scales = key_scales + tile * blocks * TILE;
    auto add = [&]<int HEADS>(int64_t h) WHOLE {
      const int64_t row = first + h;
      add_whole_heads<HEADS, ONE_BLOCK>(query.whole.data() + row * width, query.scales.data() + row * blocks,
                                        query.shift.data() + row * blocks, query.weights.data() + row, part,
                                        part_scales, width, totals);
    };
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) add.template operator()<4>(h);
    for (; h < heads; ++h) add.template operator()<1>(h);
    for (int v = 0; v < 2; ++v) {
      const __m512 scale = ONE_BLOCK ? _mm512_loadu_ps(part_scales + v * 16) : _mm512_set1_ps(1.f);
      _mm512_storeu_ps(out + tile * TILE + v * 16, _mm512_mul_ps(totals[v], scale));
    }
  }
}
#endif

// ---- the best so far -----------------------------------------------------------------------------------------------

// A score and its entry as one number, larger for a larger score and, among equal ones, for a lower entry. Never zero.
inline uint64_t rank_of(float score, int64_t entry) {
  const uint32_t bits = bits_of(score + 0.f);  // one zero
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(ordered) << 32 | uint32_t(~uint32_t(entry));
}

inline float score_of(uint64_t rank) {
  const uint32_t ordered = rank >> 32;
  return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

struct Best {
  uint64_t* ranks;  // room for `room`
  int64_t count = 0, k, room;
  float bar = -INFINITY;  // a score must be above it: entries come in ascending order, so an equal one comes too late

  void shrink() {
    std::nth_element(ranks, ranks + k - 1, ranks + count, std::greater<>());
    count = k;
    bar = score_of(ranks[k - 1]);
  }

  // Scores of entries first, first + 1, ..., at most CHUNK. After a while nearly all are too low.
  void add(const float* scores, int64_t first, int64_t size) {
    uint32_t above[CHUNK / TILE];
    WITH_BEST(fast::find_above(scores, (size + TILE - 1) / TILE, bar, above))
    for (int64_t at = 0; at < size; at += TILE) {
      uint32_t rest = above[at / TILE];
      if (size - at < TILE) rest &= (1u << (size - at)) - 1;
      for (; rest; rest &= rest - 1) {
        const int64_t j = at + __builtin_ctz(rest);
        if (!(scores[j] > bar)) continue;  // which has risen
        ranks[count++] = rank_of(scores[j], first + j);
        if (count == room) shrink();
      }
    }
  }
};

// ---- the choice ----------------------------------------------------------------------------------------------------

struct Work {
  const float *query, *weights;
  const char* pool;
  const int64_t *table, *visible;
  int64_t length, heads, width, per_page, row_bytes, num_pages, visible_stride, k, spans;
  int64_t stride;  // 8 where rows lie in eights, 1 where a page may break them
  Rows kind;
  bool whole;
};

// A chunk of keys: where its rows lie, and the keys in the order of the lanes, as floats [tile][width][TILE] or whole.
struct Scratch {
  std::vector<const char*> rows;
  std::vector<float> row, keys, key_scales;
  std::vector<uint8_t> whole_keys;
};

// Where every `work.stride`-th of the rows begin .. end - 1 of a sequence's entries lies.
void find_rows(const Work& work, int64_t batch, int64_t begin, int64_t end, const char** rows) {
  const int64_t* pages = work.table + batch * work.num_pages;
  for (int64_t entry = begin, page = begin / work.per_page; entry < end; ++page) {
    const int64_t stop = std::min(end, (page + 1) * work.per_page);
    const char* row = work.pool + (pages[page] * work.per_page + entry - page * work.per_page) * work.row_bytes;
    for (; entry < stop; entry += work.stride, row += work.stride * work.row_bytes) *rows++ = row;
  }
}

// Asks for the rows begin .. end - 1, page by page: nothing foresees where a page lies.
void ask_for(const Work& work, int64_t batch, int64_t begin, int64_t end) {
  const int64_t* pages = work.table + batch * work.num_pages;
  for (int64_t entry = begin; entry < end;) {
    const int64_t page = entry / work.per_page, stop = std::min(end, (page + 1) * work.per_page);
    const char* row = work.pool + (pages[page] * work.per_page + entry - page * work.per_page) * work.row_bytes;
    for (int64_t at = 0; at < (stop - entry) * work.row_bytes; at += 64) __builtin_prefetch(row + at);
    entry = stop;
  }
}

void order_floats(const Work& work, int64_t size, Scratch& scratch) {
  const char* const* rows = scratch.rows.data();
  for (int64_t i = 0; i < size; ++i) {
    const float* row = floats_of(rows[i], work.kind, work.width, scratch.row.data());
    float* to = scratch.keys.data() + i / TILE * TILE * work.width + i % TILE;
    for (int64_t c = 0; c < work.width; ++c) to[c * TILE] = row[c];
  }
}

#ifdef OPD_X86
// Blocks of packed MXFP4 of eight rows that lie one after the other, whose codes begin `codes` and whose scale is
// `scale` bytes into each: fours of whole numbers, `OFFSET` added, row beside row, and the scales.
WHOLE inline void order_packed(const char* row, int64_t bytes_each, int64_t codes, int64_t scale, uint8_t* to,
                               float* scales) {
  const auto number = [](int value) { return char(OFFSET + value); };
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(
      number(0), number(1), number(2), number(3), number(4), number(6), number(8), number(12), number(0), number(-1),
      number(-2), number(-3), number(-4), number(-6), number(-8), number(-12)));
  // Of a row's four bytes, the first two and the last two, each twice: its low nibble, then its high one.
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
  const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(2));
  const __m512i even = _mm512_set1_epi16(0x00ff), low = _mm512_set1_epi8(0x0f);
  __m256i pair[4], eight[4];
  for (int i = 0; i < 4; ++i) {
    pair[i] = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i * bytes_each + codes))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (i + 4) * bytes_each + codes)), 1);
  }
  uint64_t bytes = 0;
  for (int i = 0; i < 8; ++i) bytes |= uint64_t(static_cast<uint8_t>(row[i * bytes_each + scale])) << (8 * i);
  const __m256i exponents = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes)));
  const __m256i least = _mm256_slli_epi32(_mm256_subs_epu16(exponents, _mm256_set1_epi32(1)), 23);  // as `scale_of`
  const __m256i is_nan = _mm256_cmpeq_epi32(exponents, _mm256_set1_epi32(255));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales),
                      _mm256_blendv_epi8(least, _mm256_set1_epi32(0x7fc00000), is_nan));
  const __m256i a = _mm256_unpacklo_epi32(pair[0], pair[1]), b = _mm256_unpackhi_epi32(pair[0], pair[1]);
  const __m256i c = _mm256_unpacklo_epi32(pair[2], pair[3]), d = _mm256_unpackhi_epi32(pair[2], pair[3]);
  eight[0] = _mm256_unpacklo_epi64(a, c), eight[1] = _mm256_unpackhi_epi64(a, c);
  eight[2] = _mm256_unpacklo_epi64(b, d), eight[3] = _mm256_unpackhi_epi64(b, d);
  for (int g = 0; g < 4; g += 2) {
    const __m512i two = _mm512_inserti64x4(_mm512_castsi256_si512(eight[g]), eight[g + 1], 1);
    for (int half = 0; half < 2; ++half) {
      const __m512i twice = _mm512_shuffle_epi8(two, half ? second : first);
      const __m512i nibbles =  // even bytes as they are, odd ones shifted
          _mm512_and_si512(_mm512_ternarylogic_epi32(even, twice, _mm512_srli_epi16(twice, 4), 0xca), low);
      const __m512i numbers = _mm512_shuffle_epi8(table, nibbles);
      uint8_t* at = to + (2 * g + half) * TILE * 4;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(numbers));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 2 * TILE * 4), _mm512_extracti64x4_epi64(numbers, 1));
    }
  }
}

WHOLE void order_whole(const Work& work, int64_t size, Scratch& scratch) {
  const int64_t blocks = work.width / BLOCK;
  const char* const* rows = scratch.rows.data();
  const __m256i offset = _mm256_set1_epi8(OFFSET);
  alignas(32) int8_t numbers[8][BLOCK] = {};
  for (int64_t begin = 0; begin < size; begin += 8) {
    const int64_t count = std::min<int64_t>(8, size - begin), tile = begin / TILE, lane = begin % TILE;
    for (int64_t block = 0; block < blocks; ++block) {
      float* scales = scratch.key_scales.data() + (tile * blocks + block) * TILE + lane;
      uint8_t* to = scratch.whole_keys.data() + tile * TILE * work.width + block * BLOCK * TILE + lane * 4;
      if (work.kind == Rows::packed && count == 8 && work.stride == 8) {
        order_packed(rows[begin / 8], work.row_bytes, block * BLOCK / 2, work.width / 2 + block, to, scales);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        const char* row = rows[(begin + i) / work.stride] + (begin + i) % work.stride * work.row_bytes;
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(row);
        switch (work.kind) {
          case Rows::packed:
            scales[i] = whole_block(bytes + block * BLOCK / 2, bytes[work.width / 2 + block], numbers[i]);
            break;
          case Rows::bfloats:
            scales[i] = whole_block(reinterpret_cast<const uint16_t*>(row) + block * BLOCK, numbers[i]);
            break;
          case Rows::floats:
            scales[i] = whole_block(reinterpret_cast<const float*>(row) + block * BLOCK, numbers[i]);
        }
      }
      // Eight rows of eight fours, transposed.
      __m256i row[8], pair[8], four[8];
      for (int i = 0; i < 8; ++i) {
        row[i] = _mm256_add_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(numbers[i])), offset);
      }
      for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]), pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
          four[i + 2 * j] = _mm256_unpacklo_epi64(pair[i + j], pair[i + 2 + j]);
          four[i + 2 * j + 1] = _mm256_unpackhi_epi64(pair[i + j], pair[i + 2 + j]);
        }
      }
      for (int g = 0; g < 4; ++g) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + g * TILE * 4),
                            _mm256_permute2x128_si256(four[g], four[g + 4], 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (g + 4) * TILE * 4),
                            _mm256_permute2x128_si256(four[g], four[g + 4], 0x31));
      }
    }
  }
}

WholeQuery whole_queries(const Work& work, const float* query, const float* weights, int64_t num_heads) {
  const int64_t blocks = work.width / BLOCK;
  WholeQuery out{std::vector<int8_t>(num_heads * work.width), std::vector<float>(num_heads * blocks),
                 std::vector<float>(weights, weights + num_heads), std::vector<int32_t>(num_heads * blocks)};
  for (int64_t at = 0; at < num_heads * blocks; ++at) {
    int8_t* whole = out.whole.data() + at * BLOCK;
    out.scales[at] = whole_block(query + at * BLOCK, whole);
    int32_t sum = 0;
    for (int c = 0; c < BLOCK; ++c) sum += whole[c];
    out.shift[at] = -OFFSET * sum;
    if (blocks == 1) out.weights[at] *= out.scales[at];
  }
  return out;
}
#endif

// Queries begin .. end of one row against its span-th part of the keys: up to k ranks each, zeros after them.
void choose(const Work& work, int64_t batch, int64_t begin, int64_t end, int64_t span, uint64_t* found) {
  const int64_t* visible = work.visible + batch * work.visible_stride;
  const int64_t most = *std::max_element(visible + begin, visible + end);
  const int64_t per_span = ((most + work.spans - 1) / work.spans + TILE - 1) / TILE * TILE;
  const int64_t first = std::min(most, span * per_span), last = std::min(most, first + per_span);
  const int64_t room = std::max(2 * work.k, work.k + 48);
  std::vector<uint64_t> ranks((end - begin) * room);
  std::vector<Best> best;
  for (int64_t t = begin; t < end; ++t) {
    best.push_back({.ranks = ranks.data() + (t - begin) * room, .k = work.k, .room = room});
  }
  Scratch scratch{std::vector<const char*>(CHUNK), std::vector<float>(work.width), {}, {}, {}};
  alignas(64) float scores[CHUNK];
  const int64_t first_query = batch * work.length + begin;
  const float* query = work.query + first_query * work.heads * work.width;
  const float* weights = work.weights + first_query * work.heads;
#ifdef OPD_X86
  WholeQuery whole_query;
  if (work.whole) {
    whole_query = whole_queries(work, query, weights, (end - begin) * work.heads);
    scratch.whole_keys.resize(CHUNK * work.width);
    scratch.key_scales.resize(CHUNK * work.width / BLOCK);
  }
#endif
  if (!work.whole) scratch.keys.resize(CHUNK * work.width);
  for (int64_t at = first; at < last; at += CHUNK) {
    const int64_t stop = std::min(last, at + CHUNK);
    find_rows(work, batch, at, stop, scratch.rows.data());
    ask_for(work, batch, stop, std::min(last, stop + CHUNK));
#ifdef OPD_X86
    if (work.whole) order_whole(work, stop - at, scratch);
#endif
    if (!work.whole) order_floats(work, stop - at, scratch);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t size = std::min(stop, visible[t]) - at, tiles = (size + TILE - 1) / TILE;
      if (size <= 0) continue;
      const int64_t q = t - begin;
#ifdef OPD_X86
      if (work.whole) {
        (work.width == BLOCK ? whole_score<true> : whole_score<false>)(
            whole_query, q * work.heads, scratch.whole_keys.data(), scratch.key_scales.data(), work.heads, work.width,
            tiles, scores);
      }
#endif
      if (!work.whole) {
        WITH_BEST((fast::score(query + q * work.heads * work.width, weights + q * work.heads, scratch.keys.data(),
                               work.heads, work.width, tiles, scores)));
      }
      best[q].add(scores, at, size);
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    Best& one = best[t - begin];
    if (one.count > work.k) one.shrink();
    uint64_t* to = found + ((batch * work.length + t) * work.spans + span) * work.k;
    std::fill(std::copy(one.ranks, one.ranks + one.count, to), to + work.k, 0);
  }
}

// Runs task(index) for 0 .. count - 1, each thread taking the next one that is left: they differ in length.
template <typename Task>
void share_out(int64_t count, bool alone, Task task) {
  std::atomic<int64_t> next{0};
  auto take = [&](int64_t, int64_t) {
    for (int64_t index = next++; index < count; index = next++) task(index);
  };
  if (alone) {
    take(0, 1);
  } else {
    at::parallel_for(0, at::get_num_threads(), 1, take);
  }
}

}  // namespace

namespace opd {

at::Tensor index_pick(const at::Tensor& query, const at::Tensor& weights, const at::Tensor& pool,
                      const at::Tensor& table, const at::Tensor& visible, int64_t k, bool is_mxfp4) {
  TORCH_CHECK(query.dim() == 4 && query.is_contiguous() && query.scalar_type() == at::kFloat,
              "query: float [B, T, H, C]");
  const int64_t batch = query.size(0), length = query.size(1), heads = query.size(2), width = query.size(3);
  TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kFloat &&
                  weights.numel() == batch * length * heads,
              "weights: float [B, T, H]");
  TORCH_CHECK(pool.dim() == 3 && pool.is_contiguous(), "pool: [pages, rows of a page, stored size]");
  TORCH_CHECK(table.dim() == 2 && table.size(0) == batch && table.is_contiguous() && table.scalar_type() == at::kLong,
              "table: int64 [B, pages]");
  TORCH_CHECK(visible.dim() == 2 && visible.is_contiguous() && visible.scalar_type() == at::kLong &&
                  (visible.size(0) == batch || visible.size(0) == 1) && visible.size(1) == length,
              "visible: int64 [B or 1, T]");
  TORCH_CHECK(k > 0, "k is at least 1");
  Rows kind = Rows::floats;
  int64_t stored = width;
  switch (pool.scalar_type()) {
    case at::kFloat:
      break;
    case at::kBFloat16:
      kind = Rows::bfloats;
      break;
    case at::kByte:
      kind = Rows::packed, stored = width / 2 + width / BLOCK;
      break;
    default:
      TORCH_CHECK(false, "pool: float, bfloat16 or packed bytes");
  }
  TORCH_CHECK(pool.size(2) == stored && (kind != Rows::packed || width % BLOCK == 0), "pool: rows of another width");
  at::Tensor picks = empty({batch, length, k}, table.options());
  if (batch * length == 0) return picks;
  Work work{};
  work.query = query.const_data_ptr<float>(), work.weights = weights.const_data_ptr<float>();
  work.pool = static_cast<const char*>(pool.const_data_ptr());
  work.table = table.const_data_ptr<int64_t>(), work.visible = visible.const_data_ptr<int64_t>();
  work.length = length, work.heads = heads, work.width = width, work.per_page = pool.size(1);
  work.row_bytes = stored * pool.element_size(), work.num_pages = table.size(1);
  work.visible_stride = visible.size(0) == 1 ? 0 : length, work.k = k, work.kind = kind;
  work.whole = is_mxfp4 && width % BLOCK == 0 && has_whole_products();
  work.stride = work.whole && work.per_page % 8 == 0 ? 8 : 1;
  const auto [least, most] = std::minmax_element(work.visible, work.visible + visible.numel());
  TORCH_CHECK(*least >= 0 && *most <= work.num_pages * work.per_page, "visible: from 0 to the entries of a row");

  const int64_t parts = (length + QUERIES - 1) / QUERIES, threads = at::get_num_threads();
  const bool alone = batch * length * *most * heads * width < MIN_WORK;
  work.spans = 1;
  if (!alone && batch * parts < 2 * threads) {
    work.spans = std::max<int64_t>(1, std::min(2 * threads / (batch * parts) + 1, *most / MIN_SPAN));
  }
  std::vector<uint64_t> found(batch * length * work.spans * k);
  // The last queries see the most and go first.
  share_out(batch * parts * work.spans, alone, [&](int64_t index) {
    const int64_t span = index % work.spans, row = index / work.spans % batch;
    const int64_t begin = (parts - 1 - index / work.spans / batch) * QUERIES;
    choose(work, row, begin, std::min(length, begin + QUERIES), span, found.data());
  });
  int64_t* out = picks.mutable_data_ptr<int64_t>();
  at::parallel_for(0, batch * length, std::max<int64_t>(1, 8192 / (work.spans * k)), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      uint64_t* ranks = found.data() + at * work.spans * k;
      if (work.spans > 1) std::nth_element(ranks, ranks + k - 1, ranks + work.spans * k, std::greater<>());
      int64_t* to = out + at * k;
      int64_t count = 0;
      for (int64_t j = 0; j < k; ++j) {
        if (ranks[j]) to[count++] = uint32_t(~uint32_t(ranks[j]));
      }
      std::sort(to, to + count);
      std::fill(to + count, to + k, -1);
    }
  });
  return picks;
}

}  // namespace opd

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.def("index_pick(Tensor query, Tensor weights, Tensor pool, Tensor table, Tensor visible, int k, "
              "bool is_mxfp4) -> Tensor");
}

TORCH_LIBRARY_IMPL(opd, CPU, library) { library.impl("index_pick", opd::index_pick); }
