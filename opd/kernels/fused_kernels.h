// The loops of fused.cpp, included after lanes.h and like it once for every kind of vector instructions.
//
// Tokens lie in lanes where each token has a few numbers, channels where it has many; a token's result is the same bits
// whatever other tokens are computed with it.

// ---- hyper-connections ---------------------------------------------------------------------------------------------

// What a token's n + n + n * n linear products become, for TOKENS tokens in lanes: rows are pre, post, residual (from,
// to). `sinkhorn` keeps every normalisation for the way back: n * n results, then n reciprocals.
template <typename T, int n>
struct Coefficients {
  static constexpr int rows = (2 + n) * n;
  alignas(64) T mix[rows][TOKENS];      // the products, divided by the RMS
  alignas(64) T value[rows][TOKENS];    // sigmoid for pre and post, softmax for the residual matrix
  alignas(64) T residual[n * n][TOKENS];
};

template <typename T, int n>
KERNEL static void evaluate(Coefficients<T, n>& c, const T* base, const T* scale, T eps, int iterations, T* steps) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, rows = Coefficients<T, n>::rows;
  for (int row = 0; row < rows; ++row) {
    const T factor = scale[row < n ? 0 : row < 2 * n ? 1 : 2], sign = row < 2 * n ? T(-1) : T(1);
    for (int t = 0; t < TOKENS; ++t) c.value[row][t] = sign * (base[row] + c.mix[row][t] * factor);
  }
  for (int from = 0; from < n; ++from) {  // softmax over `to`, less the largest
    for (int t = 0; t < TOKENS; ++t) {
      T largest = c.value[2 * n + from * n][t];
      for (int to = 1; to < n; ++to) largest = std::max(largest, c.value[2 * n + from * n + to][t]);
      for (int to = 0; to < n; ++to) c.value[2 * n + from * n + to][t] -= largest;
    }
  }
  exponential(&c.value[0][0], int64_t(rows) * TOKENS);
  for (int row = 0; row < 2 * n; ++row) {
    for (int t = 0; t < TOKENS; ++t) c.value[row][t] = T(1) / (T(1) + c.value[row][t]);
  }
  for (int from = 0; from < n; ++from) {
    for (int t = 0; t < TOKENS; ++t) {
      T sum = 0;
      for (int to = 0; to < n; ++to) sum += c.value[2 * n + from * n + to][t];
      for (int to = 0; to < n; ++to) c.value[2 * n + from * n + to][t] /= sum;
    }
  }
  for (int at = 0; at < TOKENS; at += count) {
    V m[n * n];
    for (int i = 0; i < n * n; ++i) m[i] = load(&c.value[2 * n + i][at]) + eps;
    for (int step = 0; step < 2 * iterations - 1; ++step) {
      const int along = step % 2 == 0 ? n : 1, across = step % 2 == 0 ? 1 : n;  // even steps: sums over `from`
      for (int line = 0; line < n; ++line) {
        V sum = m[line * across];
        for (int i = 1; i < n; ++i) sum += m[line * across + i * along];
        const V reciprocal = T(1) / (sum + eps);
        for (int i = 0; i < n; ++i) m[line * across + i * along] *= reciprocal;
        if (steps) store(steps + ((step * (n * n + n)) + n * n + line) * TOKENS + at, reciprocal);
      }
      if (steps) {
        for (int i = 0; i < n * n; ++i) store(steps + (step * (n * n + n) + i) * TOKENS + at, m[i]);
      }
    }
    for (int i = 0; i < n * n; ++i) store(&c.residual[i][at], m[i]);
  }
}

// gradient of the residual matrix -> gradient of its softmax's logits, in place
template <typename T, int n>
KERNEL static void unwind(const Coefficients<T, n>& c, const T* steps, int iterations, T (*grad)[TOKENS]) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  for (int at = 0; at < TOKENS; at += count) {
    V g[n * n];
    for (int i = 0; i < n * n; ++i) g[i] = load(&grad[i][at]);
    for (int step = 2 * iterations - 2; step >= 0; --step) {
      const int along = step % 2 == 0 ? n : 1, across = step % 2 == 0 ? 1 : n;
      const T* kept = steps + step * (n * n + n) * TOKENS + at;
      for (int line = 0; line < n; ++line) {
        V dot = V{};
        for (int i = 0; i < n; ++i) dot += g[line * across + i * along] * load(kept + (line * across + i * along) * TOKENS);
        const V reciprocal = load(kept + (n * n + line) * TOKENS);
        for (int i = 0; i < n; ++i) g[line * across + i * along] = (g[line * across + i * along] - dot) * reciprocal;
      }
    }
    for (int from = 0; from < n; ++from) {
      V dot = V{};
      for (int to = 0; to < n; ++to) dot += g[from * n + to] * load(&c.value[2 * n + from * n + to][at]);
      for (int to = 0; to < n; ++to) {
        store(&grad[from * n + to][at], (g[from * n + to] - dot) * load(&c.value[2 * n + from * n + to][at]));
      }
    }
  }
}

// What is read TOKENS tokens later: streams lie too far from each other for the processor to foresee it.
template <typename T>
KERNEL static inline void ask_for(const T* later) {
  __builtin_prefetch(later);
}

// A number of each of `tokens` tokens, the last one's in all lanes that are left; and back.
template <typename T>
KERNEL static inline void fetch(const T* from, int tokens, T* to) {
  if (tokens == TOKENS) {
    __builtin_memcpy(to, from, TOKENS * sizeof(T));
  } else {
    for (int t = 0; t < TOKENS; ++t) to[t] = from[std::min(t, tokens - 1)];
  }
}

template <typename T>
KERNEL static inline void hand_over(const T* from, int tokens, T* to) {
  if (tokens == TOKENS) {
    __builtin_memcpy(to, from, TOKENS * sizeof(T));
  } else {
    for (int t = 0; t < tokens; ++t) to[t] = from[t];
  }
}

// Tokens begin .. end of streams [n, N, D]. fn_t [n * D, padded]: fn transposed, rows filled up to whole vectors.
template <typename T, int n>
KERNEL static void collapse(const CollapseArguments<T>& a, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, rows = (2 + n) * n;
  constexpr int parts = (rows + count - 1) / count, side = parts * TOKENS > 32 ? TOKENS / 4 : TOKENS / 2;
  const int64_t N = a.tokens, D = a.width, padded = a.padded;
  Coefficients<T, n> c;
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    const T* x[TOKENS];
    alignas(64) T inverse[TOKENS];
    V squares[TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
      x[t] = a.streams + (first + std::min(t, tokens - 1)) * D;
      squares[t] = V{};
      for (int j = 0; j < n; ++j) {
        const T* row = x[t] + j * N * D;
        for (int64_t d = 0; d + count <= D; d += count) {
          ask_for(row + d + TOKENS * D);
          squares[t] += load(row + d) * load(row + d);
        }
      }
    }
    for (int t = 0; t < TOKENS; t += count) store(inverse + t, totals<T>(squares + t));
    for (int t = 0; t < TOKENS; ++t) {
      for (int j = 0; j < n && D % count; ++j) {
        for (int64_t d = D / count * count; d < D; ++d) inverse[t] += x[t][j * N * D + d] * x[t][j * N * D + d];
      }
      inverse[t] = T(1) / std::sqrt(inverse[t] / T(n * D) + a.norm_eps);
    }
    for (int group = 0; group < TOKENS; group += side) {
      V sum[side][parts];
      for (int t = 0; t < side; ++t) {
        for (int p = 0; p < parts; ++p) sum[t][p] = V{};
      }
      for (int j = 0; j < n; ++j) {
        const T* weight = a.fn_t + j * D * padded;
        const T* row[side];
        for (int t = 0; t < side; ++t) row[t] = x[group + t] + j * N * D;
        for (int64_t d = 0; d < D; ++d, weight += padded) {
          V w[parts];
          for (int p = 0; p < parts; ++p) w[p] = load(weight + p * count);
#pragma GCC unroll 16
          for (int t = 0; t < side; ++t) {
            const T value = row[t][d];
            for (int p = 0; p < parts; ++p) sum[t][p] += w[p] * value;
          }
        }
      }
      alignas(64) T spread[parts * count];
      for (int t = 0; t < side; ++t) {
        for (int p = 0; p < parts; ++p) store(spread + p * count, sum[t][p]);
        for (int row = 0; row < rows; ++row) c.mix[row][group + t] = spread[row] * inverse[group + t];
      }
    }
    evaluate<T, n>(c, a.base, a.scale, a.hc_eps, a.iterations, nullptr);
    for (int t = 0; t < tokens; ++t) {
      T* out = a.collapsed + (first + t) * D;
      T weight[n];
      for (int j = 0; j < n; ++j) weight[j] = c.value[j][t] + a.hc_eps;
      int64_t d = 0;
      for (; d + count <= D; d += count) {
        V sum = load(x[t] + d) * weight[0];
        for (int j = 1; j < n; ++j) sum += load(x[t] + j * N * D + d) * weight[j];
        store(out + d, sum);
      }
      for (; d < D; ++d) {
        T sum = 0;
        for (int j = 0; j < n; ++j) sum += x[t][j * N * D + d] * weight[j];
        out[d] = sum;
      }
    }
    hand_over(inverse, tokens, a.inverse + first);
    for (int j = 0; j < n; ++j) {
      for (int t = 0; t < TOKENS; ++t) c.value[n + j][t] *= 2;
      hand_over(c.value[n + j], tokens, a.post + j * N + first);
    }
    for (int i = 0; i < n * n; ++i) hand_over(c.residual[i], tokens, a.residual + i * N + first);
    for (int row = 0; row < rows; ++row) hand_over(c.mix[row], tokens, a.mix + row * N + first);
  }
}

// Adds to a.grad_streams, which already holds what came through the streams that were handed on, and to grad_fn.
template <typename T, int n>
KERNEL static void collapse_backward(const CollapseGradients<T>& a, int64_t begin, int64_t end, T* grad_fn) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, rows = (2 + n) * n;
  const int64_t N = a.tokens, D = a.width;
  Coefficients<T, n> c;
  std::vector<T> steps(size_t(2 * a.iterations - 1) * (n * n + n) * TOKENS + 64);
  alignas(64) T grad[rows][TOKENS];
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    for (int row = 0; row < rows; ++row) fetch(a.mix + row * N + first, tokens, c.mix[row]);
    evaluate<T, n>(c, a.base, a.scale, a.hc_eps, a.iterations, steps.data());
    for (int j = 0; j < n; ++j) {
      V dots[TOKENS];
      for (int t = 0; t < TOKENS; ++t) {
        const int64_t token = first + std::min(t, tokens - 1);
        const T *given = a.grad_collapsed + token * D, *row = a.streams + (j * N + token) * D;
        dots[t] = V{};
        const T* grads = a.grad_streams + (j * N + token) * D;
        for (int64_t d = 0; d + count <= D; d += count) {
          ask_for(row + d + TOKENS * D);
          ask_for(grads + d + TOKENS * D);
          dots[t] += load(row + d) * load(given + d);
        }
      }
      for (int t = 0; t < TOKENS; t += count) store(grad[j] + t, totals<T>(dots + t));
      for (int t = 0; t < TOKENS && D % count; ++t) {
        const int64_t token = first + std::min(t, tokens - 1);
        const T *given = a.grad_collapsed + token * D, *row = a.streams + (j * N + token) * D;
        for (int64_t d = D / count * count; d < D; ++d) grad[j][t] += row[d] * given[d];
      }
      fetch(a.grad_post + j * N + first, tokens, grad[n + j]);
      for (int t = 0; t < TOKENS; ++t) {
        const T pre = c.value[j][t], post = c.value[n + j][t];
        grad[j][t] *= pre * (1 - pre);
        grad[n + j][t] *= 2 * post * (1 - post);
      }
    }
    for (int i = 0; i < n * n; ++i) fetch(a.grad_residual + i * N + first, tokens, grad[2 * n + i]);
    unwind<T, n>(c, steps.data(), a.iterations, grad + 2 * n);
    alignas(64) T along[TOKENS] = {}, inverse[TOKENS];  // along: how the gradient moves with the streams' RMS
    fetch(a.inverse + first, tokens, inverse);
    for (int row = 0; row < rows; ++row) {
      const T factor = a.scale[row < n ? 0 : row < 2 * n ? 1 : 2];
      hand_over(grad[row], tokens, a.grad_logits + row * N + first);
      for (int t = 0; t < TOKENS; ++t) {
        const T of_mix = grad[row][t] * factor;
        along[t] -= of_mix * c.mix[row][t] * inverse[t] * inverse[t] / T(n * D);
        grad[row][t] = of_mix * inverse[t];
      }
    }
    // While the streams are near: what the products' gradients are of fn, for a vector of its columns and all its rows.
    for (int j = 0; j < n; ++j) {
      const T* from = a.streams + (j * N + first) * D;
      T* to = grad_fn + j * D;
      int64_t d = 0;
      for (; d + count <= D; d += count) {
        V sum[rows];
#pragma GCC unroll 24
        for (int row = 0; row < rows; ++row) sum[row] = load(to + row * n * D + d);
        for (int t = 0; t < tokens; ++t) {
          const V value = load(from + t * D + d);
#pragma GCC unroll 24
          for (int row = 0; row < rows; ++row) sum[row] += value * grad[row][t];
        }
#pragma GCC unroll 24
        for (int row = 0; row < rows; ++row) store(to + row * n * D + d, sum[row]);
      }
      for (; d < D; ++d) {
        for (int row = 0; row < rows; ++row) {
          for (int t = 0; t < tokens; ++t) to[row * n * D + d] += from[t * D + d] * grad[row][t];
        }
      }
    }
    for (int j = 0; j < n; ++j) {
      T* to[TOKENS];
      for (int t = 0; t < TOKENS; ++t) to[t] = a.grad_streams + (j * N + first + std::min(t, tokens - 1)) * D;
      const T* fn = a.fn + j * D;
      constexpr int side = TOKENS / 2;
      for (int group = 0; group < tokens; group += side) {
        const int here = std::min(side, tokens - group);
        int64_t d = 0;
        for (; d + count <= D; d += count) {
          V sum[side];
          for (int t = 0; t < side; ++t) {
            const int64_t token = first + std::min(group + t, tokens - 1);
            sum[t] = load(a.grad_collapsed + token * D + d) * (c.value[j][group + t] + a.hc_eps);
            sum[t] += load(a.streams + (j * N + token) * D + d) * along[group + t];
          }
          for (int row = 0; row < rows; ++row) {
            const V w = load(fn + row * n * D + d);
#pragma GCC unroll 16
            for (int t = 0; t < side; ++t) sum[t] += w * grad[row][group + t];
          }
          for (int t = 0; t < here; ++t) store(to[group + t] + d, load(to[group + t] + d) + sum[t]);
        }
        for (; d < D; ++d) {
          for (int t = group; t < group + here; ++t) {
            const int64_t token = first + t;
            T sum = a.grad_collapsed[token * D + d] * (c.value[j][t] + a.hc_eps);
            sum += a.streams[(j * N + token) * D + d] * along[t];
            for (int row = 0; row < rows; ++row) sum += fn[row * n * D + d] * grad[row][t];
            to[t][d] += sum;
          }
        }
      }
    }
  }
}

// X'_k = post_k y + sum_j residual[j, k] X_j
template <typename T, int n>
KERNEL static void expand(const ExpandArguments<T>& a, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t N = a.tokens, D = a.width;
  for (int64_t token = begin; token < end; ++token) {
    T post[n], residual[n * n];
    for (int k = 0; k < n; ++k) post[k] = a.post[k * N + token];
    for (int i = 0; i < n * n; ++i) residual[i] = a.residual[i * N + token];
    const T *x = a.streams + token * D, *y = a.output + token * D;
    T* to = a.mixed + token * D;
    int64_t d = 0;
    for (; d + count <= D; d += count) {
      const V own = load(y + d);
      V in[n];
      for (int j = 0; j < n; ++j) {
        ask_for(x + j * N * D + d + TOKENS * D);
        in[j] = load(x + j * N * D + d);
      }
      for (int k = 0; k < n; ++k) {
        V sum = own * post[k];
        for (int j = 0; j < n; ++j) sum += in[j] * residual[j * n + k];
        store(to + k * N * D + d, sum);
      }
    }
    for (; d < D; ++d) {
      for (int k = 0; k < n; ++k) {
        T sum = y[d] * post[k];
        for (int j = 0; j < n; ++j) sum += x[j * N * D + d] * residual[j * n + k];
        to[k * N * D + d] = sum;
      }
    }
  }
}

template <typename T, int n, bool PAST>
KERNEL static void expand_backward(const ExpandGradients<T>& a, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t N = a.tokens, D = a.width;
  for (int64_t token = begin; token < end; ++token) {
    T post[n], residual[n * n];
    for (int k = 0; k < n; ++k) post[k] = a.post[k * N + token];
    for (int i = 0; i < n * n; ++i) residual[i] = a.residual[i * N + token];
    const T *x = a.streams + token * D, *y = a.output + token * D, *g = a.grad + token * D;
    T *to_x = a.grad_streams + token * D, *to_y = a.grad_output + token * D;
    V of_post[n], of_residual[n * n];
    for (int k = 0; k < n; ++k) of_post[k] = V{};
    for (int i = 0; i < n * n; ++i) of_residual[i] = V{};
    int64_t d = 0;
    for (; d + count <= D; d += count) {
      V given[n];
      for (int k = 0; k < n; ++k) {
        ask_for(g + k * N * D + d + TOKENS * D);
        ask_for(x + k * N * D + d + TOKENS * D);
        given[k] = load(g + k * N * D + d);
      }
      const V own = load(y + d);
      V sum = given[0] * post[0];
      for (int k = 1; k < n; ++k) sum += given[k] * post[k];
      store(to_y + d, sum);
      for (int k = 0; k < n; ++k) of_post[k] += own * given[k];
      for (int j = 0; j < n; ++j) {
        const V in = load(x + j * N * D + d);
        V back = given[0] * residual[j * n];
        for (int k = 1; k < n; ++k) back += given[k] * residual[j * n + k];
        if constexpr (PAST) {
          store_past(to_x + j * N * D + d, back);
        } else {
          store(to_x + j * N * D + d, back);
        }
        for (int k = 0; k < n; ++k) of_residual[j * n + k] += in * given[k];
      }
    }
    // All sums across lanes together.
    constexpr int sums = (n + n * n + count - 1) / count * count;
    V parts[sums];
    alignas(64) T across[sums];
    for (int i = 0; i < sums; ++i) parts[i] = i < n ? of_post[i] : i < n + n * n ? of_residual[i - n] : V{};
    for (int i = 0; i < sums; i += count) store(across + i, totals<T>(parts + i));
    T *post_sum = across, *residual_sum = across + n;
    for (; d < D; ++d) {
      T sum = 0;
      for (int k = 0; k < n; ++k) {
        const T given = g[k * N * D + d];
        sum += given * post[k];
        post_sum[k] += y[d] * given;
      }
      to_y[d] = sum;
      for (int j = 0; j < n; ++j) {
        T back = 0;
        for (int k = 0; k < n; ++k) {
          const T given = g[k * N * D + d];
          back += given * residual[j * n + k];
          residual_sum[j * n + k] += x[j * N * D + d] * given;
        }
        to_x[j * N * D + d] = back;
      }
    }
    for (int k = 0; k < n; ++k) a.grad_post[k * N + token] = post_sum[k];
    for (int i = 0; i < n * n; ++i) a.grad_residual[i * N + token] = residual_sum[i];
  }
  if constexpr (PAST) stored_past();
}

// The streams' gradients wait until the block between has had its own: large ones would be out of the caches by then.
template <typename T, int n>
KERNEL static void expand_backward(const ExpandGradients<T>& a, int64_t begin, int64_t end) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(a.grad_streams) % BYTES == 0 && a.width * sizeof(T) % BYTES == 0;
  if (is_aligned && n * a.tokens * a.width * int64_t(sizeof(T)) > LARGE) {
    expand_backward<T, n, true>(a, begin, end);
  } else {
    expand_backward<T, n, false>(a, begin, end);
  }
}

// ---- RMS norm and RoPE ---------------------------------------------------------------------------------------------

// Turns channels width - 2 * pairs .. width, neighbours together, by the complex numbers `turn`.
template <typename T>
KERNEL static inline void turn_pairs(T* row, int64_t width, const T* turn, int64_t pairs, T direction) {
  T* tail = row + width - 2 * pairs;
  for (int64_t p = 0; p < pairs; ++p) {
    const T c = turn[2 * p], s = turn[2 * p + 1] * direction, even = tail[2 * p], odd = tail[2 * p + 1];
    tail[2 * p] = even * c - odd * s;
    tail[2 * p + 1] = even * s + odd * c;
  }
}

template <typename T>
KERNEL static void norm(const NormArguments<T>& a, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t W = a.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.x + row * W;
    T* y = a.y + row * W;
    T inverse = 1;
    if (a.inverse) {
      V sum = V{};
      int64_t d = 0;
      for (; d + count <= W; d += count) {
        const V v = load(x + d);
        sum += v * v;
      }
      T square = total<T>(sum);
      for (; d < W; ++d) square += x[d] * x[d];
      inverse = T(1) / std::sqrt(square / T(W) + a.eps);
      a.inverse[row] = inverse;
    }
    if (a.weight) {
      for (int64_t d = 0; d < W; ++d) y[d] = x[d] * inverse * a.weight[d];
    } else {
      for (int64_t d = 0; d < W; ++d) y[d] = x[d] * inverse;
    }
    if (a.pairs) turn_pairs(y, W, a.turns + row / a.heads % a.turn_rows * 2 * a.pairs, a.pairs, a.direction);
  }
}

// grad_weight [W] of the rows begin .. end, in the order of the rows.
template <typename T>
KERNEL static void norm_backward(const NormGradients<T>& a, T* grad_weight, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t W = a.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.x + row * W;
    T* out = a.grad_x + row * W;  // first the gradient before the turn
    std::copy(a.grad + row * W, a.grad + (row + 1) * W, out);
    if (a.pairs) turn_pairs(out, W, a.turns + row / a.heads % a.turn_rows * 2 * a.pairs, a.pairs, -a.direction);
    if (!a.inverse) continue;
    const T inverse = a.inverse[row];
    if (a.weight) {
      if (grad_weight) {
        for (int64_t d = 0; d < W; ++d) grad_weight[d] += out[d] * x[d] * inverse;
      }
      for (int64_t d = 0; d < W; ++d) out[d] *= a.weight[d];
    }
    V sum = V{};
    int64_t d = 0;
    for (; d + count <= W; d += count) sum += load(x + d) * load(out + d);
    T dot = total<T>(sum);
    for (; d < W; ++d) dot += x[d] * out[d];
    const T along = dot * inverse * inverse / T(W);
    for (d = 0; d < W; ++d) out[d] = (out[d] - x[d] * along) * inverse;
  }
}

// ---- SwiGLU --------------------------------------------------------------------------------------------------------

// gate and up are rows of a.width numbers, a.stride apart.
template <typename T>
KERNEL static void swiglu(const SwigluArguments<T>& a, int64_t begin, int64_t end) {
  constexpr int count = Lanes<T>::count;
  constexpr int64_t step = 8 * count;
  alignas(64) T decay[step] = {};
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = a.gate + row * a.stride, *up = a.up + row * a.stride;
    T* out = a.out + row * a.width;
    for (int64_t d = 0; d < a.width; d += step) {
      const int64_t size = std::min(step, a.width - d);
      for (int64_t i = 0; i < size; ++i) decay[i] = -std::min(gate[d + i], a.limit);
      exponential(decay, size);
      for (int64_t i = 0; i < size; ++i) {
        const T g = std::min(gate[d + i], a.limit), u = std::max(std::min(up[d + i], a.limit), -a.limit);
        out[d + i] = g * u / (T(1) + decay[i]);
      }
    }
  }
}

template <typename T>
KERNEL static void swiglu_backward(const SwigluGradients<T>& a, int64_t begin, int64_t end) {
  constexpr int count = Lanes<T>::count;
  constexpr int64_t step = 8 * count;
  alignas(64) T decay[step] = {};
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = a.gate + row * a.stride, *up = a.up + row * a.stride, *grad = a.grad + row * a.width;
    T *to_gate = a.grad_gate + row * a.stride, *to_up = a.grad_up + row * a.stride;
    for (int64_t d = 0; d < a.width; d += step) {
      const int64_t size = std::min(step, a.width - d);
      for (int64_t i = 0; i < size; ++i) decay[i] = -std::min(gate[d + i], a.limit);
      exponential(decay, size);
      for (int64_t i = 0; i < size; ++i) {
        const T g = std::min(gate[d + i], a.limit), u = std::max(std::min(up[d + i], a.limit), -a.limit);
        const T sigmoid = T(1) / (T(1) + decay[i]), silu = g * sigmoid;
        const T of_up = grad[d + i] * silu, of_gate = grad[d + i] * u * (sigmoid + silu * (T(1) - sigmoid));
        to_up[d + i] = up[d + i] < -a.limit || up[d + i] > a.limit ? T(0) : of_up;
        to_gate[d + i] = gate[d + i] > a.limit ? T(0) : of_gate;
      }
    }
  }
}

// ---- rows that were sorted by expert -------------------------------------------------------------------------------

// out[t] = sum_k weights[t, k] x[places[t, k]]; weights null: all one.
template <typename T>
KERNEL static void gather(const GatherArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t W = a.width, K = a.per_token;
  for (int64_t t = begin; t < end; ++t) {
    T* out = a.out + t * W;
    for (int64_t k = 0; k < K; ++k) {
      const T* from = a.x + a.places[t * K + k] * W;
      const T weight = a.weights ? a.weights[t * K + k] : T(1);
      if (k == 0) {
        for (int64_t d = 0; d < W; ++d) out[d] = from[d] * weight;
      } else {
        for (int64_t d = 0; d < W; ++d) out[d] += from[d] * weight;
      }
    }
  }
}

// grad_x[places[t, k]] = weights[t, k] grad[t] (places are distinct), grad_weights[t, k] = grad[t] . x[places[t, k]]
template <typename T>
KERNEL static void gather_backward(const GatherGradients<T>& a, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t W = a.width, K = a.per_token;
  for (int64_t t = begin; t < end; ++t) {
    const T* grad = a.grad + t * W;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t place = a.places[t * K + k];
      const T weight = a.weights[t * K + k], *x = a.x + place * W;
      T* to = a.grad_x + place * W;
      V sum = V{};
      int64_t d = 0;
      for (; d + count <= W; d += count) {
        const V given = load(grad + d);
        store(to + d, given * weight);
        sum += given * load(x + d);
      }
      T dot = total<T>(sum);
      for (; d < W; ++d) {
        to[d] = grad[d] * weight;
        dot += grad[d] * x[d];
      }
      a.grad_weights[t * K + k] = dot;
    }
  }
}

// ---- MXFP4 values --------------------------------------------------------------------------------------------------

// Each block of 32 as the values that its MXFP4 codes stand for: opd.fp4's rounding, bit for bit.
KERNEL static void round_mxfp4(const float* in, float* out, int64_t begin, int64_t end) {
  constexpr int block = 32;
  for (int64_t at = begin * block; at < end * block; at += block) {
    int32_t bits[block], largest = 0;
    __builtin_memcpy(bits, in + at, sizeof bits);
    for (int i = 0; i < block; ++i) largest = std::max(largest, bits[i] & 0x7FFFFFFF);
    const int32_t scale_byte = std::max(1, int32_t((uint32_t(largest) + 0x3FFFFFu) >> 23) - 2);
    const int32_t scale_bits[2] = {scale_byte << 23, (254 - scale_byte) << 23};
    float scale[2];
    __builtin_memcpy(scale, scale_bits, sizeof scale);
    for (int i = 0; i < block; ++i) {
      const float element = in[at + i] * scale[1];
      int32_t binade_bits;
      __builtin_memcpy(&binade_bits, &element, 4);
      binade_bits = std::max(binade_bits & 0x7F800000, 0x3F800000);  // of numbers not below 1
      float binade;
      __builtin_memcpy(&binade, &binade_bits, 4);
      // Adding 1.5 * 2 ** 23 steps of the grid at this element, and taking them off again, rounds to it.
      const float shift = binade * 6291456.f;
      out[at + i] = std::copysign((element + shift) - shift, in[at + i]) * scale[0];
    }
  }
}

// ---- one token more for a compressor -------------------------------------------------------------------------------

// Softmax over candidates, channel by channel: out[d] = sum_i exp(gate_i[d]) kv_i[d] / sum_i exp(gate_i[d]). `weights`
// has room for a vector's channels of all candidates.
template <typename T>
KERNEL static void pool(const T* const* kv, const T* const* gate, int64_t candidates, int64_t width, T* weights, T* out) {
  constexpr int count = Lanes<T>::count;
  for (int64_t d = 0; d < width; d += count) {
    const int64_t size = std::min<int64_t>(count, width - d);
    alignas(64) T largest[count], sum[count] = {}, total[count] = {};
    for (int64_t k = 0; k < size; ++k) largest[k] = gate[0][d + k];
    for (int64_t i = 1; i < candidates; ++i) {
      for (int64_t k = 0; k < size; ++k) largest[k] = std::max(largest[k], gate[i][d + k]);
    }
    for (int64_t i = 0; i < candidates; ++i) {
      for (int64_t k = 0; k < count; ++k) weights[i * count + k] = k < size ? gate[i][d + k] - largest[k] : T(0);
    }
    exponential(weights, candidates * count);
    for (int64_t i = 0; i < candidates; ++i) {
      for (int64_t k = 0; k < size; ++k) {
        sum[k] += weights[i * count + k];
        total[k] += weights[i * count + k] * kv[i][d + k];
      }
    }
    for (int64_t k = 0; k < size; ++k) out[d + k] = total[k] / sum[k];
  }
}
