// A tile of packed FP4 weights times a few rows, for processors with AVX-512.
//
// Included twice inside a namespace of its own by fp4_kernels.h, which defines KERNEL (a function attribute that allows
// the instructions) and PAIRS: 1 multiplies bfloat16 activations as they are, two inputs a lane and step; 0 multiplies
// float32, one input a step.

constexpr int STEPS = PAIRS ? 4 : 8;  // of a group of 8 inputs

// The weights of 16 features at a step of a group whose codes are `raw`. A look-up reads the lowest 4 or 5 bits.
KERNEL __attribute__((always_inline)) inline __m512i decoded(__m512i raw, __m512i table, int step) {
#if PAIRS
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 4 * step), table);
#else
  return _mm512_permutexvar_epi32(_mm512_srli_epi32(raw, 4 * step), table);
#endif
}

KERNEL __attribute__((always_inline)) inline __m512 multiply_add(__m512 sum, __m512i weight, __m512i x) {
#if PAIRS
  return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
#else
  return _mm512_fmadd_ps(_mm512_castsi512_ps(weight), _mm512_castsi512_ps(x), sum);
#endif
}

// The scales of a block of 16 features.
template <int GROUPS>
KERNEL __attribute__((always_inline)) inline __m512 scales_of(const uint8_t* bytes) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  if constexpr (GROUPS == 4) return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 23));
  return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 20)), _mm512_set1_ps(0x1p120f));
}

// What must be taken from a code of FOLDING to make it the weight itself, in both halves of every lane.
KERNEL __attribute__((always_inline)) inline __m512i folds_of(const uint8_t* bytes) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i low = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(252), wide), 7);
  return _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
}

// Adds BLOCKS blocks to the totals of a tile. A step takes 2 vectors of weights and ROWS broadcasts for 2 * ROWS
// multiplications; with 8 rows there are 16 independent sums, which hide an addition's latency, and loads and decoding
// fit beside them.
template <int ROWS, int GROUPS, Scales SCALES, Source SOURCE, int BLOCKS>
KERNEL __attribute__((always_inline)) inline void add_blocks(const uint8_t* codes, const uint8_t* scales,
                                                             uint32_t* kept, const uint32_t* x, float* totals) {
#if PAIRS
  const __m512i table = _mm512_load_si512(SCALES == Scales::folded ? FOLDING : E2M1_BF16);
#else
  const __m512i table = _mm512_loadu_si512(E2M1);
#endif
  [[maybe_unused]] const uint8_t* begin = codes;
  __m512 sum[BLOCKS][ROWS][2];
  __m512i fold[BLOCKS][2];
#pragma GCC unroll 8
  for (int block = 0; block < BLOCKS; ++block) {
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; ++n) sum[block][n][0] = sum[block][n][1] = _mm512_setzero_ps();
    if constexpr (SCALES == Scales::folded && SOURCE != Source::kept) {
      fold[block][0] = folds_of(scales + block * TILE), fold[block][1] = folds_of(scales + block * TILE + LANES);
    }
  }
#pragma GCC unroll 1
  for (int group = 0; group < GROUPS; ++group) {
    __m512i raw[BLOCKS][2];
    if constexpr (SOURCE != Source::kept) {
#pragma GCC unroll 8
      for (int block = 0; block < BLOCKS; ++block) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          raw[block][half] = _mm512_loadu_si512(codes + block * GROUPS * GROUP_BYTES + 64 * half);
          if constexpr (SOURCE == Source::codes) {
            // In the order in which codes lie, unlike the loads. Not to be kept: a large matrix's codes would push all
            // else out of the caches, such as what makes the next call.
            const uint8_t* at = begin + (group * BLOCKS + block) * GROUP_BYTES + 64 * half;
            _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD), _MM_HINT_NTA);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; ++step) {
#pragma GCC unroll 8
      for (int block = 0; block < BLOCKS; ++block) {
        __m512i weight[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          uint32_t* place = kept + block * GROUPS * STEPS * TILE + (step * 2 + half) * LANES;
          if constexpr (SOURCE == Source::kept) {
            weight[half] = _mm512_load_si512(place);
          } else {
            weight[half] = decoded(raw[block][half], table, step);
            // Saturation keeps zero what is zero.
            if constexpr (SCALES == Scales::folded) weight[half] = _mm512_subs_epu16(weight[half], fold[block][half]);
            if constexpr (SOURCE == Source::codes_to_keep) _mm512_store_si512(place, weight[half]);
          }
        }
        const uint32_t* at = x + (block * GROUPS * STEPS + (PAIRS ? step : ORDER[step])) * ROWS;
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; ++n) {
          const __m512i broadcast = _mm512_set1_epi32(at[n]);
          sum[block][n][0] = multiply_add(sum[block][n][0], weight[0], broadcast);
          sum[block][n][1] = multiply_add(sum[block][n][1], weight[1], broadcast);
        }
      }
    }
    codes += GROUP_BYTES, kept += STEPS * TILE, x += STEPS * ROWS;
  }
  // Totals of many rows stay in memory: as variables that outlive a block they would crowd the sums out of registers.
  if constexpr (ROWS > 4) asm volatile("" ::: "memory");
#pragma GCC unroll 8
  for (int block = 0; block < BLOCKS; ++block) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 scale;
      if constexpr (SCALES == Scales::apart) scale = scales_of<GROUPS>(scales + block * TILE + LANES * half);
#pragma GCC unroll 8
      for (int n = 0; n < ROWS; ++n) {
        float* total = totals + n * TILE + LANES * half;
        __m512 value = _mm512_loadu_ps(total);
        if constexpr (SCALES == Scales::folded) {
          value = _mm512_add_ps(value, sum[block][n][half]);
        } else {
          value = _mm512_fmadd_ps(sum[block][n][half], scale, value);
        }
        _mm512_storeu_ps(total, value);
      }
    }
  }
}

// A TileKernel (see fp4_kernels.h). Few rows have few sums, each of which waits for its last addition, so they take two
// blocks at once; each is still added to the totals in its turn. One row is bound by memory, which likes one stream.
template <int ROWS, int GROUPS, Scales SCALES, Source SOURCE>
KERNEL void tile(const uint8_t* codes, const uint8_t* scales, uint32_t* kept, const void* inputs, int64_t num_blocks,
                 float* totals) {
  constexpr int AT_ONCE = ROWS == 1 || ROWS > 4 ? 1 : 2;
  const uint32_t* x = static_cast<const uint32_t*>(inputs);
  const auto add = [&]<int BLOCKS>(std::integral_constant<int, BLOCKS>) KERNEL __attribute__((always_inline)) {
    add_blocks<ROWS, GROUPS, SCALES, SOURCE, BLOCKS>(codes, scales, kept, x, totals);
    constexpr int groups = BLOCKS * GROUPS;
    codes += groups * GROUP_BYTES, scales += BLOCKS * TILE, kept += groups * STEPS * TILE, x += groups * STEPS * ROWS;
  };
#pragma GCC unroll 1
  for (; num_blocks >= AT_ONCE; num_blocks -= AT_ONCE) add(std::integral_constant<int, AT_ONCE>());
  if constexpr (AT_ONCE > 1) {
#pragma GCC unroll 1
    for (; num_blocks > 0; --num_blocks) add(std::integral_constant<int, 1>());
  }
}
