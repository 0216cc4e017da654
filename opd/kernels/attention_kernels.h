// The loops of attention.cpp, included after lanes.h and like it once for every kind of vector instructions.
//
// A query's keys are pointers to rows of `width` numbers, wherever they lie; one row is key and value of all heads.
// Channels lie in lanes. Keys are taken in groups of as many as there are lanes, so that their dot products are summed
// across lanes together. A query's result does not depend on what else is computed, nor on where its keys lie.

// Lane i of the result is the sum of the lanes of v[i].
template <typename T>
KERNEL static inline typename Lanes<T>::V totals(typename Lanes<T>::V* v) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  constexpr int count = Lanes<T>::count;
#pragma GCC unroll 8
  for (int half = 1; half < count; half *= 2) {
    I first, second;
    for (int lane = 0; lane < count; ++lane) {
      first[lane] = lane & half ? count + (lane ^ half) : lane;
      second[lane] = lane & half ? count + lane : lane ^ half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; i += 2 * half) {
      const V a = v[i], b = v[i + half];
      v[i] = __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
    }
  }
  return v[0];
}

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

// Softmax over the keys and the sink, in place; `log_total` [heads] gets the logarithm of the sum, sink included.
template <typename T>
KERNEL static void weigh(T* logits, int64_t heads, int64_t size, int64_t padded, const T* sinks, T scale,
                         T* log_total) {
  for (int64_t h = 0; h < heads; ++h) {
    T* row = logits + h * padded;
    T largest = sinks[h];
    for (int64_t s = 0; s < size; ++s) row[s] *= scale;
    for (int64_t s = 0; s < size; ++s) largest = std::max(largest, row[s]);
    for (int64_t s = 0; s < size; ++s) row[s] -= largest;
    exponential(row, size);
    T sum = std::exp(sinks[h] - largest);
    for (int64_t s = 0; s < size; ++s) sum += row[s];
    const T reciprocal = T(1) / sum;
    for (int64_t s = 0; s < size; ++s) row[s] *= reciprocal;
    log_total[h] = largest + std::log(sum);
  }
}

// One query: its weights [heads, padded] and its output [heads, width].
template <typename T>
KERNEL static void attend(const T* query, int64_t heads, int64_t width, const T* const* keys, int64_t size,
                          int64_t padded, const T* sinks, T* weights, T* log_total, T* out) {
  products(query, heads, width, keys, size, padded, weights);
  weigh(weights, heads, size, padded, sinks, T(1) / std::sqrt(T(width)), log_total);
  mixture(weights, heads, width, keys, size, padded, out);
}

// One query's gradients: of itself (written), of its keys and of the sinks (added to). `scratch` holds 2 [heads, padded].
template <typename T>
KERNEL static void attend_backward(const T* query, const T* grad, int64_t heads, int64_t width, const T* const* keys,
                                   T* const* grad_keys, int64_t size, int64_t padded, const T* sinks,
                                   const T* log_total, T* scratch, T* grad_query, T* grad_sinks) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, side = 4;
  const T scale = T(1) / std::sqrt(T(width));
  T *weights = scratch, *of_logits = scratch + heads * padded;
  products(query, heads, width, keys, size, padded, weights);
  products(grad, heads, width, keys, size, padded, of_logits);
  for (int64_t h = 0; h < heads; ++h) {
    T *weight = weights + h * padded, *back = of_logits + h * padded, dot = 0;
    for (int64_t s = 0; s < size; ++s) weight[s] = weight[s] * scale - log_total[h];
    exponential(weight, size);
    for (int64_t s = 0; s < size; ++s) dot += weight[s] * back[s];
    grad_sinks[h] -= std::exp(sinks[h] - log_total[h]) * dot;
    for (int64_t s = 0; s < size; ++s) back[s] = weight[s] * (back[s] - dot) * scale;
  }
  mixture(of_logits, heads, width, keys, size, padded, grad_query);
  int64_t d = 0;
  for (; d + count <= width; d += count) {
    for (int64_t h = 0; h < heads; h += side) {
      const int64_t here = std::min<int64_t>(side, heads - h);
      V in[side], given[side];
      for (int64_t i = 0; i < side; ++i) {
        const int64_t at = (h + std::min(i, here - 1)) * width + d;
        in[i] = i < here ? load(query + at) : V{};
        given[i] = i < here ? load(grad + at) : V{};
      }
      const int64_t last = (here - 1) * padded;
      const T *weight = weights + h * padded, *back = of_logits + h * padded;
      for (int64_t s = 0; s < size; ++s) {
        V sum = load(grad_keys[s] + d);
        for (int64_t i = 0; i < side; ++i) {
          const int64_t at = std::min(i * padded, last) + s;
          sum += in[i] * back[at] + given[i] * weight[at];
        }
        store(grad_keys[s] + d, sum);
      }
    }
  }
  for (; d < width; ++d) {
    for (int64_t s = 0; s < size; ++s) {
      T sum = grad_keys[s][d];
      for (int64_t h = 0; h < heads; ++h) {
        sum += query[h * width + d] * of_logits[h * padded + s] + grad[h * width + d] * weights[h * padded + s];
      }
      grad_keys[s][d] = sum;
    }
  }
}

// Points at the keys of query t of row b, and at their gradients where there are any; -> how many.
template <typename T>
KERNEL static int64_t reach(const Reach<T>& a, int64_t b, int64_t t, const T** keys, T* grad_recent, T* grad_entries,
                            T** grad_keys) {
  const int64_t own = a.past + t, C = a.width;
  int64_t size = 0, low = std::max<int64_t>(0, own - a.window + 1);
  if (a.first) low = std::max(low, a.first[b]);
  for (int64_t column = low; column <= own; ++column, ++size) {
    keys[size] = a.recent + (b * a.recent_tokens + column) * C;
    if (grad_keys) grad_keys[size] = grad_recent + column * C;
  }
  const int64_t limit = a.picks ? a.num_picks : a.visible ? a.visible[a.visible_rows == 1 ? t : b * a.tokens + t] : 0;
  for (int64_t i = 0; i < limit; ++i) {
    const int64_t entry = a.picks ? a.picks[(b * a.tokens + t) * a.num_picks + i] : i;
    if (entry < 0) continue;
    keys[size] = a.entries + (b * a.num_entries + entry) * C;
    if (grad_keys) grad_keys[size] = grad_entries + entry * C;
    ++size;
  }
  return size;
}

template <typename T>
KERNEL static void attention(const Reach<T>& a, const T* query, const T* sinks, T* out, T* log_total, int64_t most,
                             int64_t begin, int64_t end) {
  const int64_t stride = a.heads * a.width, padded = (most + 15) / 16 * 16;
  std::vector<const T*> keys(most + 1);
  std::vector<T> weights(a.heads * padded);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t size = reach<T>(a, item / a.tokens, item % a.tokens, keys.data(), nullptr, nullptr, nullptr);
    attend(query + item * stride, a.heads, a.width, keys.data(), size, padded, sinks, weights.data(),
           log_total + item * a.heads, out + item * stride);
  }
}

// Queries first .. last of row b; gradients of keys are added to the buffers of this part.
template <typename T>
KERNEL static void attention_backward(const Reach<T>& a, const T* query, const T* grad, const T* sinks,
                                      const T* log_total, T* grad_query, T* grad_recent, T* grad_entries,
                                      T* grad_sinks, int64_t most, int64_t b, int64_t first, int64_t last) {
  const int64_t stride = a.heads * a.width, padded = (most + 15) / 16 * 16;
  std::vector<const T*> keys(most + 1);
  std::vector<T*> grad_keys(most + 1);
  std::vector<T> scratch(2 * a.heads * padded);
  for (int64_t t = first; t < last; ++t) {
    const int64_t item = b * a.tokens + t;
    const int64_t size = reach<T>(a, b, t, keys.data(), grad_recent, grad_entries, grad_keys.data());
    attend_backward(query + item * stride, grad + item * stride, a.heads, a.width, keys.data(), grad_keys.data(), size,
                    padded, sinks, log_total + item * a.heads, scratch.data(), grad_query + item * stride, grad_sinks);
  }
}

// A decoding step of row b: ring, own key, and paged entries (all visible ones or picks).
template <typename T>
KERNEL static void decode(const Decoding<T>& a, int64_t most, int64_t begin, int64_t end) {
  const int64_t C = a.width, stride = a.heads * C, padded = (most + 15) / 16 * 16;
  std::vector<const T*> keys(most + 1);
  std::vector<T> weights(a.heads * padded), log_total(a.heads);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t position = a.positions[b];
    int64_t size = 0;
    for (int64_t past = std::max<int64_t>(0, position - a.window + 1); past < position; ++past, ++size) {
      keys[size] = a.ring + (a.slots[b] * a.window + past % a.window) * C;
    }
    keys[size++] = a.own + b * C;
    const int64_t limit = a.entries ? (a.picks ? a.num_picks : a.visible[b]) : 0;
    for (int64_t i = 0; i < limit; ++i) {
      const int64_t entry = a.picks ? a.picks[b * a.num_picks + i] : i;
      if (entry < 0) continue;
      keys[size++] = a.entries + (a.pages[b * a.num_pages + entry / a.per_page] * a.per_page + entry % a.per_page) * C;
    }
    attend(a.query + b * stride, a.heads, C, keys.data(), size, padded, a.sinks, weights.data(), log_total.data(),
           a.out + b * stride);
  }
}
