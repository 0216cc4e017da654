// The loop of index.cpp, included once for every kind of vector instructions, inside a namespace of its own, after
// lanes.h.

// sum_h weights[h] * relu(query[h] . key) over HEADS heads, added to `totals`, for two vectors of keys.
template <int HEADS>
KERNEL static inline void add_heads(const float* query, const float* weights, const float* keys, int64_t width,
                                    typename Lanes<float>::V* totals) {
  using V = typename Lanes<float>::V;
  V sums[HEADS][2] = {};
  for (int64_t c = 0; c < width; ++c) {
    const V low = load(keys + c * TILE), high = load(keys + c * TILE + Lanes<float>::count);
    for (int h = 0; h < HEADS; ++h) {
      sums[h][0] += query[h * width + c] * low;
      sums[h][1] += query[h * width + c] * high;
    }
  }
  for (int h = 0; h < HEADS; ++h) {
    for (int v = 0; v < 2; ++v) totals[v] += weights[h] * (sums[h][v] < 0.f ? V{} : sums[h][v]);
  }
}

// Scores of one query [heads][width] for `tiles` tiles of keys, [tile][channel][TILE].
KERNEL static void score(const float* query, const float* weights, const float* keys, int64_t heads, int64_t width,
                         int64_t tiles, float* out) {
  using V = typename Lanes<float>::V;
  constexpr int count = Lanes<float>::count;
  for (int64_t at = 0; at < tiles * TILE; at += 2 * count) {
    const float* part = keys + at / TILE * width * TILE + at % TILE;
    V totals[2] = {};
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) add_heads<4>(query + h * width, weights + h, part, width, totals);
    for (; h < heads; ++h) add_heads<1>(query + h * width, weights + h, part, width, totals);
    store(out + at, totals[0]), store(out + at + count, totals[1]);
  }
}

// Of the scores of `tiles` tiles, which are above the bar: bit j of above[tile] for the j-th one. NaN is not.
KERNEL static void find_above(const float* scores, int64_t tiles, float bar, uint32_t* above) {
  using V = Lanes<float>::V;
  constexpr int LANES = Lanes<float>::count;
  const V bars = V{} + bar;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    uint32_t bits = 0;
    for (int i = 0; i < TILE; i += LANES) {
      const V x = load(scores + tile * TILE + i);
#if defined(OPD_X86) && BYTES == 64
      bits |= uint32_t(_mm512_cmp_ps_mask((__m512)x, (__m512)bars, _CMP_GT_OQ)) << i;
#elif defined(OPD_X86) && BYTES == 32
      bits |= uint32_t(_mm256_movemask_ps((__m256)(x > bars))) << i;
#else
      for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(x[lane] > bars[lane]) << (i + lane);
#endif
    }
    above[tile] = bits;
  }
}
