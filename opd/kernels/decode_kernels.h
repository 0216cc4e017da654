// The loops of decode.cpp, included after lanes.h and like it once for every kind of vector instructions.
//
// A query's keys are pointers to rows of `width` numbers, wherever they lie; one row is key and value of all heads.
// Channels lie in lanes. Keys are taken in groups of as many as there are lanes, so that their dot products are summed
// across lanes together. A query's result does not depend on what else is computed, nor on where its keys lie.

// products[h, s] = rows[h] . keys[s] for `heads` rows and `size` keys; the last dimension is padded to whole vectors.
template <typename T>
KERNEL static void products(const T* rows, int64_t heads, int64_t width, const T* const* keys, int64_t size,
                            int64_t padded, T* out) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, side = 4;
  const int64_t whole = width / count * count;
  for (int64_t h = 0; h < heads; h += side) {
    const int64_t here = std::min<int64_t>(side, heads - h);
    const T* row[side];
    for (int i = 0; i < side; ++i) row[i] = rows + (h + std::min<int64_t>(i, here - 1)) * width;
    for (int64_t s = 0; s < size; s += count) {
      V part[side][count];
      for (int k = 0; k < count; ++k) {
        const T* key = keys[std::min<int64_t>(s + k, size - 1)];
        V sum[side];
        for (int i = 0; i < side; ++i) sum[i] = V{};
        for (int64_t d = 0; d < whole; d += count) {
          const V in = load(key + d);
          for (int i = 0; i < side; ++i) sum[i] += in * load(row[i] + d);
        }
        for (int i = 0; i < side; ++i) part[i][k] = sum[i];
      }
      for (int64_t i = 0; i < here; ++i) store(out + (h + i) * padded + s, totals<T>(part[i]));
    }
    for (int64_t d = whole; d < width; ++d) {
      for (int64_t i = 0; i < here; ++i) {
        for (int64_t s = 0; s < size; ++s) out[(h + i) * padded + s] += row[i][d] * keys[s][d];
      }
    }
  }
}

// out[h] = sum_s weights[h, s] keys[s]
template <typename T>
KERNEL static void mixture(const T* weights, int64_t heads, int64_t width, const T* const* keys, int64_t size,
                           int64_t padded, T* out) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, side = 4;
  for (int64_t h = 0; h < heads; h += side) {
    const int64_t here = std::min<int64_t>(side, heads - h);
    const T* weight[side];
    for (int i = 0; i < side; ++i) weight[i] = weights + (h + std::min<int64_t>(i, here - 1)) * padded;
    int64_t d = 0;
    for (; d + count <= width; d += count) {
      V sum[side];
      for (int i = 0; i < side; ++i) sum[i] = V{};
      for (int64_t s = 0; s < size; ++s) {
        const V in = load(keys[s] + d);
        for (int i = 0; i < side; ++i) sum[i] += in * weight[i][s];
      }
      for (int64_t i = 0; i < here; ++i) store(out + (h + i) * width + d, sum[i]);
    }
    for (; d < width; ++d) {
      for (int64_t i = 0; i < here; ++i) {
        T sum = 0;
        for (int64_t s = 0; s < size; ++s) sum += keys[s][d] * weight[i][s];
        out[(h + i) * width + d] = sum;
      }
    }
  }
}

// Softmax over the keys and the sink, in place. What is past `size` becomes zero.
template <typename T>
KERNEL static void weigh(T* logits, int64_t heads, int64_t size, int64_t padded, const T* sinks, T scale) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t whole = (size + count - 1) / count * count;
  for (int64_t h = 0; h < heads; ++h) {
    T* row = logits + h * padded;
    std::fill(row + size, row + whole, -INFINITY);
    V most = V{} + sinks[h];
    for (int64_t s = 0; s < whole; s += count) {
      const V x = load(row + s) * scale;
      store(row + s, x);
      most = x > most ? x : most;
    }
    T largest = most[0];
    for (int lane = 1; lane < count; ++lane) largest = std::max(largest, most[lane]);
    for (int64_t s = 0; s < whole; s += count) store(row + s, load(row + s) - largest);
    exponential(row, whole);
    std::fill(row + size, row + whole, T(0));
    V sum{};
    for (int64_t s = 0; s < whole; s += count) sum += load(row + s);
    const T reciprocal = T(1) / (total<T>(sum) + std::exp(sinks[h] - largest));
    for (int64_t s = 0; s < whole; s += count) store(row + s, load(row + s) * reciprocal);
  }
}

// One query: its weights [heads, padded] and its output [heads, width].
template <typename T>
KERNEL static void attend(const T* query, int64_t heads, int64_t width, const T* const* keys, int64_t size,
                          int64_t padded, const T* sinks, T* weights, T* out) {
  products(query, heads, width, keys, size, padded, weights);
  weigh(weights, heads, size, padded, sinks, T(1) / std::sqrt(T(width)));
  mixture(weights, heads, width, keys, size, padded, out);
}

// Queries begin .. end - 1, counted over rows of a.tokens: ring, new keys, paged entries (all visible ones or picks).
template <typename T>
KERNEL static void decode(const Decoding<T>& a, int64_t most, int64_t begin, int64_t end) {
  const int64_t C = a.width, stride = a.heads * C, padded = (most + 15) / 16 * 16;
  std::vector<const T*> keys(most + 1);
  std::vector<T> weights(a.heads * padded);
  for (int64_t query = begin; query < end; ++query) {
    const int64_t b = query / a.tokens, token = query % a.tokens, position = a.starts[b] + token;
    if (token >= a.lengths[b]) {
      std::fill_n(a.out + query * stride, stride, T(0));
      continue;
    }
    int64_t size = 0;
    int64_t past = std::max<int64_t>(0, position - a.window + 1), place = past % a.window;
    for (; past < a.starts[b]; ++past, ++size) {
      keys[size] = a.ring + (a.slots[b] * a.window + place) * C;
      if (++place == a.window) place = 0;
    }
    for (int64_t own = std::max<int64_t>(0, token - a.window + 1); own <= token; ++own, ++size) {
      keys[size] = a.own + (b * a.tokens + own) * C;
    }
    const int64_t limit = a.entries ? (a.picks ? a.num_picks : a.visible[query]) : 0;
    const int64_t* pages = a.pages + b * a.num_pages;
    for (int64_t i = 0, page = 0; i < limit; ++i) {
      const int64_t entry = a.picks ? a.picks[query * a.num_picks + i] : i;
      if (entry < 0) continue;
      if (entry < page * a.per_page || entry >= (page + 1) * a.per_page) page = entry / a.per_page;
      keys[size++] = a.entries + (pages[page] * a.per_page + entry - page * a.per_page) * C;
    }
    attend(a.query + query * stride, a.heads, C, keys.data(), size, padded, a.sinks, weights.data(),
           a.out + query * stride);
  }
}
