// The loops of tiled_attention.cpp, included once for every kind of vector instructions, inside a namespace of its own,
// after lanes.h.
//
// Rows of queries and keys are filled up with zeros to `padded` channels. Keys come in chunks, once as rows
// [key][channel] and once transposed [channel][key].

constexpr int count = Lanes<float>::count;
constexpr int step = 2 * count;  // keys or channels of which every head of a group has its sums in registers
using Floats = Lanes<float>::V;
using Integers = Lanes<float>::I;

// e^x to about an ulp for x <= 0; exactly zero where a float has nothing that small, and for minus infinity.
KERNEL static inline Floats exponential(const Floats& given) {
  const Floats x = given < -87.f ? Floats{} - 87.f : given;
  const Floats n = (x * 1.4426950408889634f + 12582912.f) - 12582912.f;  // 1.5 * 2 ** 23: adding it rounds
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats power = Floats{} + 1.f / 5040;
  power = power * r + 1.f / 720;
  power = power * r + 1.f / 120;
  power = power * r + 1.f / 24;
  power = power * r + 1.f / 6;
  power = power * r + .5f;
  power = power * r + 1.f;
  power = power * r + 1.f;
  const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
  Floats scale;
  __builtin_memcpy(&scale, &exponent, BYTES);
  return given < -87.f ? Floats{} : power * scale;
}

KERNEL static inline float largest_of(const Floats& v) {
  alignas(64) float parts[count];
  store(parts, v);
  for (int half = count / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  }
  return parts[0];
}

// out[h][j] = rows[h] . key j, for the steps that keys begin .. end - 1 touch.
template <int HEADS>
KERNEL static inline void dots(const float* rows, int64_t padded, int64_t width, const float* transposed, int begin,
                               int end, float* out) {
  for (int j = begin / step * step; j < end; j += step) {
    Floats sums[HEADS][2] = {};
    for (int64_t c = 0; c < width; ++c) {
      const Floats low = load(transposed + c * CHUNK + j), high = load(transposed + c * CHUNK + j + count);
      for (int h = 0; h < HEADS; ++h) {
        sums[h][0] += rows[h * padded + c] * low;
        sums[h][1] += rows[h * padded + c] * high;
      }
    }
    for (int h = 0; h < HEADS; ++h) {
      store(out + h * CHUNK + j, sums[h][0]), store(out + h * CHUNK + j + count, sums[h][1]);
    }
  }
}

// sums[h] = factor[h] * sums[h] + sum over keys begin .. end - 1 of weights[h][j] * keys[j].
template <int HEADS>
KERNEL static inline void mix(const float* weights, const float* factor, const float* keys, int64_t padded, int begin,
                              int end, float* sums) {
  for (int64_t c = 0; c < padded; c += step) {
    Floats part[HEADS][2];
    for (int h = 0; h < HEADS; ++h) {
      for (int v = 0; v < 2; ++v) part[h][v] = load(sums + h * padded + c + v * count) * factor[h];
    }
    for (int j = begin; j < end; ++j) {
      const Floats low = load(keys + j * padded + c), high = load(keys + j * padded + c + count);
      for (int h = 0; h < HEADS; ++h) {
        part[h][0] += weights[h * CHUNK + j] * low;
        part[h][1] += weights[h * CHUNK + j] * high;
      }
    }
    for (int h = 0; h < HEADS; ++h) {
      for (int v = 0; v < 2; ++v) store(sums + h * padded + c + v * count, part[h][v]);
    }
  }
}

// keys[j] += sum_h of_logits[h][j] * queries[h] + weights[h][j] * grads[h].
template <int HEADS>
KERNEL static inline void spread(const float* of_logits, const float* weights, const float* queries, const float* grads,
                                 int64_t padded, int begin, int end, float* keys) {
  for (int64_t c = 0; c < padded; c += count) {
    Floats query[HEADS], grad[HEADS];
    for (int h = 0; h < HEADS; ++h) query[h] = load(queries + h * padded + c), grad[h] = load(grads + h * padded + c);
    for (int j = begin; j < end; ++j) {
      Floats sum = load(keys + j * padded + c);
      for (int h = 0; h < HEADS; ++h) {
        sum += of_logits[h * CHUNK + j] * query[h];
        sum += weights[h * CHUNK + j] * grad[h];
      }
      store(keys + j * padded + c, sum);
    }
  }
}

// Minus infinity in place of what the steps hold beside keys begin .. end - 1.
KERNEL static inline void hide(float* logits, int begin, int end) {
  for (int j = begin / step * step; j < begin; ++j) logits[j] = -INFINITY;
  for (int j = end; j < (end + step - 1) / step * step; ++j) logits[j] = -INFINITY;
}

// Some heads of one query and keys begin .. end - 1 of a chunk: the softmax so far goes on.
template <int HEADS>
KERNEL static void attend(const float* queries, const Chunk& chunk, int64_t width, int64_t padded, int begin, int end,
                          float* mixed, float* largest, float* sums) {
  alignas(64) float logits[HEADS][CHUNK];
  float factor[HEADS];
  dots<HEADS>(queries, padded, width, chunk.transposed, begin, end, &logits[0][0]);
  const int first = begin / step * step;
  for (int h = 0; h < HEADS; ++h) {
    hide(logits[h], begin, end);
    Floats most = load(logits[h] + first);
    for (int j = first; j < end; j += count) {
      const Floats x = load(logits[h] + j);
      most = x > most ? x : most;
    }
    const float before = largest[h], now = std::max(before, largest_of(most));
    Floats sum{};
    for (int j = first; j < end; j += count) {
      const Floats weight = exponential(load(logits[h] + j) - now);
      store(logits[h] + j, weight);
      sum += weight;
    }
    factor[h] = exponential(Floats{} + (before - now))[0];
    sums[h] = sums[h] * factor[h] + total<float>(sum);
    largest[h] = now;
  }
  mix<HEADS>(&logits[0][0], factor, chunk.keys, padded, begin, end, mixed);
}

// The way back of `attend`, with the log of the whole sum known: `along` is each head's gradient . output.
template <int HEADS>
KERNEL static void attend_backward(const float* queries, const float* grads, const Chunk& chunk, int64_t width,
                                   int64_t padded, int begin, int end, const float* log_sum, const float* along,
                                   float* grad_queries) {
  alignas(64) float weights[HEADS][CHUNK], of_logits[HEADS][CHUNK];
  float ones[HEADS];
  dots<HEADS>(queries, padded, width, chunk.transposed, begin, end, &weights[0][0]);
  dots<HEADS>(grads, padded, width, chunk.transposed, begin, end, &of_logits[0][0]);
  for (int h = 0; h < HEADS; ++h) {
    for (int j = begin / step * step; j < end; j += count) {
      // A logit is at most the log of the sum, but for rounding.
      const Floats below = load(weights[h] + j) - log_sum[h];
      const Floats weight = exponential(below > 0.f ? Floats{} : below);
      store(weights[h] + j, weight);
      store(of_logits[h] + j, weight * (load(of_logits[h] + j) - along[h]));
    }
    ones[h] = 1.f;
  }
  mix<HEADS>(&of_logits[0][0], ones, chunk.keys, padded, begin, end, grad_queries);
  spread<HEADS>(&of_logits[0][0], &weights[0][0], queries, grads, padded, begin, end, chunk.grad_keys);
}

KERNEL static void forward(const float* queries, const Chunk& chunk, int64_t heads, int64_t width, int64_t padded,
                           int begin, int end, float* mixed, float* largest, float* sums) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) {
    attend<4>(queries + h * padded, chunk, width, padded, begin, end, mixed + h * padded, largest + h, sums + h);
  }
  for (; h < heads; ++h) {
    attend<1>(queries + h * padded, chunk, width, padded, begin, end, mixed + h * padded, largest + h, sums + h);
  }
}

KERNEL static void backward(const float* queries, const float* grads, const Chunk& chunk, int64_t heads, int64_t width,
                            int64_t padded, int begin, int end, const float* log_sum, const float* along,
                            float* grad_queries) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) {
    attend_backward<4>(queries + h * padded, grads + h * padded, chunk, width, padded, begin, end, log_sum + h,
                       along + h, grad_queries + h * padded);
  }
  for (; h < heads; ++h) {
    attend_backward<1>(queries + h * padded, grads + h * padded, chunk, width, padded, begin, end, log_sum + h,
                       along + h, grad_queries + h * padded);
  }
}
