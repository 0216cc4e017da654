// The loops of hyper-connections, included after lanes.h and like it once for every kind of vector instructions.
//
// Tokens lie in lanes where each token has a few numbers, channels where it has many; a token's result is the same bits
// whatever other tokens are computed with it. Every loop is over a tile of tokens, whose streams are either where the
// model keeps them or in a small copy that stays in the first caches: so one site's expansion is followed by the next
// site's collapse, and the latter's gradient by the former's, with one way to memory for both.

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
        for (int i = 0; i < n; ++i) {
          dot += g[line * across + i * along] * load(kept + (line * across + i * along) * TOKENS);
        }
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
  __builtin_prefetch(later, 0, 2);
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

// The block's input and the coefficients of up to TOKENS tokens from number `first` on. fn_t [n * D, padded]: fn
// transposed, rows filled up to whole vectors. `next` is what is read for the tokens that follow.
template <typename T, int n>
KERNEL static void collapse_tile(
    const CollapseArguments<T>& a, int64_t first, int tokens, Tile<const T> streams, Tile<const T> next) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, rows = (2 + n) * n;
  constexpr int parts = (rows + count - 1) / count, side = parts * TOKENS > 32 ? TOKENS / 4 : TOKENS / 2;
  const int64_t N = a.tokens, D = a.width, padded = a.padded, stride = streams.stride;
  Coefficients<T, n> c;
  const T* x[TOKENS];
  alignas(64) T inverse[TOKENS];
  V squares[TOKENS];
  for (int t = 0; t < TOKENS; ++t) {
    x[t] = streams.at + std::min(t, tokens - 1) * D;
    squares[t] = V{};
    for (int j = 0; j < n; ++j) {
      const T* row = x[t] + j * stride;
      for (int64_t d = 0; d + count <= D; d += count) squares[t] += load(row + d) * load(row + d);
    }
  }
  for (int t = 0; t < TOKENS; t += count) store(inverse + t, totals<T>(squares + t));
  for (int t = 0; t < TOKENS; ++t) {
    for (int j = 0; j < n && D % count; ++j) {
      for (int64_t d = D / count * count; d < D; ++d) inverse[t] += x[t][j * stride + d] * x[t][j * stride + d];
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
      for (int t = 0; t < side; ++t) row[t] = x[group + t] + j * stride;
      for (int64_t start = 0; start < D; start += count) {
        const int64_t end = std::min(D, start + count);
        for (int t = 0; t < side; ++t) ask_for(next.at + j * next.stride + (group + t) * D + start);
        for (int64_t d = start; d < end; ++d, weight += padded) {
          V w[parts];
          for (int p = 0; p < parts; ++p) w[p] = load(weight + p * count);
#pragma GCC unroll 16
          for (int t = 0; t < side; ++t) {
            const T value = row[t][d];
            for (int p = 0; p < parts; ++p) sum[t][p] += w[p] * value;
          }
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
      for (int j = 1; j < n; ++j) sum += load(x[t] + j * stride + d) * weight[j];
      store(out + d, sum);
    }
    for (; d < D; ++d) {
      T sum = 0;
      for (int j = 0; j < n; ++j) sum += x[t][j * stride + d] * weight[j];
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

// Tokens begin .. end.
template <typename T, int n>
KERNEL static void collapse(const CollapseArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    const Tile<const T> streams{a.streams + first * a.width, a.tokens * a.width};
    collapse_tile<T, n>(a, first, tokens, streams, {streams.at + TOKENS * a.width, streams.stride});
  }
}

// Numbers of `unwind`'s for one tile.
template <typename T, int n>
KERNEL static size_t kept_steps(int iterations) {
  return size_t(2 * iterations - 1) * (n * n + n) * TOKENS;
}

// grad_streams = given + what comes through the collapse, and grad_fn += this tile's; `given` may be null, or
// grad_streams. `next` is what else is read for the tokens that follow.
template <typename T, int n>
KERNEL static void collapse_backward_tile(const CollapseGradients<T>& a, int64_t first, int tokens,
                                          Tile<const T> streams, Tile<const T> next, Tile<const T> given,
                                          Tile<T> grad_streams, T* grad_fn, T* steps) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, rows = (2 + n) * n;
  const int64_t N = a.tokens, D = a.width;
  Coefficients<T, n> c;
  alignas(64) T grad[rows][TOKENS];
  for (int row = 0; row < rows; ++row) fetch(a.mix + row * N + first, tokens, c.mix[row]);
  evaluate<T, n>(c, a.base, a.scale, a.hc_eps, a.iterations, steps);
  V dots[n][TOKENS];
  for (int t = 0; t < TOKENS; ++t) {
    const int64_t token = std::min(t, tokens - 1);
    const T *collapsed = a.grad_collapsed + (first + token) * D, *x = streams.at + token * D;
    V sum[n];
    for (int j = 0; j < n; ++j) sum[j] = V{};
    for (int64_t d = 0; d + count <= D; d += count) {
      const V v = load(collapsed + d);
      for (int j = 0; j < n; ++j) sum[j] += load(x + j * streams.stride + d) * v;
    }
    for (int j = 0; j < n; ++j) dots[j][t] = sum[j];
  }
  for (int j = 0; j < n; ++j) {
    for (int t = 0; t < TOKENS; t += count) store(grad[j] + t, totals<T>(dots[j] + t));
    for (int t = 0; t < TOKENS && D % count; ++t) {
      const int64_t token = std::min(t, tokens - 1);
      const T *collapsed = a.grad_collapsed + (first + token) * D, *row = streams.at + j * streams.stride + token * D;
      for (int64_t d = D / count * count; d < D; ++d) grad[j][t] += row[d] * collapsed[d];
    }
    fetch(a.grad_post + j * N + first, tokens, grad[n + j]);
    for (int t = 0; t < TOKENS; ++t) {
      const T pre = c.value[j][t], post = c.value[n + j][t];
      grad[j][t] *= pre * (1 - pre);
      grad[n + j][t] *= 2 * post * (1 - post);
    }
  }
  for (int i = 0; i < n * n; ++i) fetch(a.grad_residual + i * N + first, tokens, grad[2 * n + i]);
  unwind<T, n>(c, steps, a.iterations, grad + 2 * n);
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
  // What the products' gradients are of fn, for a vector of its columns and all its rows.
  for (int j = 0; j < n; ++j) {
    const T* from = streams.at + j * streams.stride;
    T* to = grad_fn + j * D;
    int64_t d = 0;
    for (; d + count <= D; d += count) {
      V sum[rows];
#pragma GCC unroll 24
      for (int row = 0; row < rows; ++row) sum[row] = load(to + row * n * D + d);
      for (int t = 0; t < tokens; ++t) {
        ask_for(next.at + j * next.stride + t * D + d);
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
  // And of the streams, for a vector of channels and as many tokens as there is room for in registers.
  constexpr int side = BYTES == 64 ? TOKENS : TOKENS / 2;
  for (int j = 0; j < n; ++j) {
    const T *x = streams.at + j * streams.stride, *before = given.at ? given.at + j * given.stride : nullptr;
    T* to = grad_streams.at + j * grad_streams.stride;
    const T *fn = a.fn + j * D, *collapsed = a.grad_collapsed + first * D;
    for (int group = 0; group < tokens; group += side) {
      const int here = std::min(side, tokens - group);
      int64_t d = 0;
      for (; d + count <= D; d += count) {
        V sum[side];
        for (int t = 0; t < side; ++t) {
          const int64_t place = std::min(group + t, tokens - 1) * D + d;
          sum[t] = load(collapsed + place) * (c.value[j][group + t] + a.hc_eps);
          sum[t] += load(x + place) * along[group + t];
        }
        for (int row = 0; row < rows; ++row) {
          const V w = load(fn + row * n * D + d);
#pragma GCC unroll 16
          for (int t = 0; t < side; ++t) sum[t] += w * grad[row][group + t];
        }
        for (int t = 0; t < here; ++t) {
          const int64_t place = (group + t) * D + d;
          if (before) {
            ask_for(before + place + TOKENS * D);
            sum[t] += load(before + place);
          }
          store(to + place, sum[t]);
        }
      }
      for (; d < D; ++d) {
        for (int t = group; t < group + here; ++t) {
          const int64_t place = t * D + d;
          T sum = collapsed[place] * (c.value[j][t] + a.hc_eps);
          sum += x[place] * along[t];
          for (int row = 0; row < rows; ++row) sum += fn[row * n * D + d] * grad[row][t];
          to[place] = before ? before[place] + sum : sum;
        }
      }
    }
  }
}

// Adds to a.grad_streams, which already holds what came through the streams that were handed on, and to grad_fn.
template <typename T, int n>
KERNEL static void collapse_backward(const CollapseGradients<T>& a, int64_t begin, int64_t end, T* grad_fn) {
  const int64_t D = a.width, stride = a.tokens * D;
  std::vector<T> steps(kept_steps<T, n>(a.iterations));
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    const T* streams = a.streams + first * D;
    T* grad = a.grad_streams + first * D;
    collapse_backward_tile<T, n>(
        a, first, tokens, {streams, stride}, {streams + TOKENS * D, stride}, {grad, stride}, {grad, stride}, grad_fn,
        steps.data());
  }
}

// Numbers of each token that are factors of whole rows. They are read anew for every vector, as operands from memory:
// all in registers, they would be written out and read back.
template <typename T, int count>
struct Factors {
  alignas(64) T of[count][TOKENS];
};

KERNEL static inline void read_anew(const void* from) { asm volatile("" : : "r"(from) : "memory"); }

// X'_k = post_k y + sum_j residual[j, k] X_j for up to TOKENS tokens from number `first` on, from `from` to `to`.
template <typename T, int n, bool ASK>
KERNEL static void expand_tile(const ExpandArguments<T>& a, int64_t first, int tokens, Tile<const T> from, Tile<T> to) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t N = a.tokens, D = a.width;
  Factors<T, n> post;
  Factors<T, n * n> residual;
  for (int k = 0; k < n; ++k) fetch(a.post + k * N + first, tokens, post.of[k]);
  for (int i = 0; i < n * n; ++i) fetch(a.residual + i * N + first, tokens, residual.of[i]);
  for (int t = 0; t < tokens; ++t) {
    const T *x = from.at + t * D, *y = a.output + (first + t) * D;
    T* mixed = to.at + t * D;
    int64_t d = 0;
    for (; d + count <= D; d += count) {
      read_anew(&post), read_anew(&residual);
      const V own = load(y + d);
      V in[n];
      for (int j = 0; j < n; ++j) {
        if constexpr (ASK) ask_for(x + j * from.stride + d + TOKENS * D);
        in[j] = load(x + j * from.stride + d);
      }
      for (int k = 0; k < n; ++k) {
        V sum = own * post.of[k][t];
        for (int j = 0; j < n; ++j) sum += in[j] * residual.of[j * n + k][t];
        store(mixed + k * to.stride + d, sum);
      }
    }
    for (; d < D; ++d) {
      for (int k = 0; k < n; ++k) {
        T sum = y[d] * post.of[k][t];
        for (int j = 0; j < n; ++j) sum += x[j * from.stride + d] * residual.of[j * n + k][t];
        mixed[k * to.stride + d] = sum;
      }
    }
  }
}

template <typename T, int n>
KERNEL static void expand(const ExpandArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t D = a.width, stride = a.tokens * D;
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    expand_tile<T, n, true>(a, first, tokens, {a.streams + first * D, stride}, {a.mixed + first * D, stride});
  }
}

// PAST: the streams' gradient goes past the caches. ASK: what the next tokens need is not yet in them.
template <typename T, int n, bool PAST, bool ASK>
KERNEL static void expand_backward_tile(const ExpandGradients<T>& a, int64_t first, int tokens, Tile<const T> grad) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  const int64_t N = a.tokens, D = a.width;
  Factors<T, n> post;
  Factors<T, n * n> residual;
  for (int k = 0; k < n; ++k) fetch(a.post + k * N + first, tokens, post.of[k]);
  for (int i = 0; i < n * n; ++i) fetch(a.residual + i * N + first, tokens, residual.of[i]);
  V sums[n + n * n][TOKENS];  // of_post and of_residual, still to be added up across lanes
  alignas(64) T across[n + n * n][TOKENS];
  for (int t = 0; t < tokens; ++t) {
    const int64_t token = first + t;
    const T *x = a.streams + token * D, *y = a.output + token * D, *g = grad.at + t * D;
    T *to_x = a.grad_streams + token * D, *to_y = a.grad_output + token * D;
    V of_post[n], of_residual[n * n];
    for (int k = 0; k < n; ++k) of_post[k] = V{};
    for (int i = 0; i < n * n; ++i) of_residual[i] = V{};
    for (int64_t d = 0; d + count <= D; d += count) {
      read_anew(&post), read_anew(&residual);
      V given[n];
      for (int k = 0; k < n; ++k) {
        if constexpr (ASK) {
          ask_for(g + k * grad.stride + d + TOKENS * D);
          ask_for(x + k * N * D + d + TOKENS * D);
        }
        given[k] = load(g + k * grad.stride + d);
      }
      const V own = load(y + d);
      V sum = given[0] * post.of[0][t];
      for (int k = 1; k < n; ++k) sum += given[k] * post.of[k][t];
      store(to_y + d, sum);
      for (int k = 0; k < n; ++k) of_post[k] += own * given[k];
      for (int j = 0; j < n; ++j) {
        const V in = load(x + j * N * D + d);
        V back = given[0] * residual.of[j * n][t];
        for (int k = 1; k < n; ++k) back += given[k] * residual.of[j * n + k][t];
        if constexpr (PAST) {
          store_past(to_x + j * N * D + d, back);
        } else {
          store(to_x + j * N * D + d, back);
        }
        for (int k = 0; k < n; ++k) of_residual[j * n + k] += in * given[k];
      }
    }
    for (int k = 0; k < n; ++k) sums[k][t] = of_post[k];
    for (int i = 0; i < n * n; ++i) sums[n + i][t] = of_residual[i];
  }
  for (int t = tokens; t < TOKENS; ++t) {
    for (int i = 0; i < n + n * n; ++i) sums[i][t] = V{};
  }
  for (int i = 0; i < n + n * n; ++i) {
    for (int t = 0; t < TOKENS; t += count) store(across[i] + t, totals<T>(sums[i] + t));
  }
  for (int t = 0; t < tokens && D % count; ++t) {
    const int64_t token = first + t;
    for (int64_t d = D / count * count; d < D; ++d) {
      T sum = 0;
      for (int k = 0; k < n; ++k) {
        const T given = grad.at[k * grad.stride + t * D + d];
        sum += given * post.of[k][t];
        across[k][t] += a.output[token * D + d] * given;
      }
      a.grad_output[token * D + d] = sum;
      for (int j = 0; j < n; ++j) {
        T back = 0;
        for (int k = 0; k < n; ++k) {
          const T given = grad.at[k * grad.stride + t * D + d];
          back += given * residual.of[j * n + k][t];
          across[n + j * n + k][t] += a.streams[(j * N + token) * D + d] * given;
        }
        a.grad_streams[(j * N + token) * D + d] = back;
      }
    }
  }
  for (int k = 0; k < n; ++k) hand_over(across[k], tokens, a.grad_post + k * N + first);
  for (int i = 0; i < n * n; ++i) hand_over(across[n + i], tokens, a.grad_residual + i * N + first);
}

// Whether streams that nobody reads soon should go past the caches: small ones are better off in them.
template <typename T, int n>
KERNEL static bool goes_past(const T* streams, int64_t tokens, int64_t width) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(streams) % BYTES == 0 && width * sizeof(T) % BYTES == 0;
  return is_aligned && n * tokens * width * int64_t(sizeof(T)) > LARGE;
}

// The streams' gradients wait until the block between has had its own.
template <typename T, int n>
KERNEL static void expand_backward(const ExpandGradients<T>& a, int64_t begin, int64_t end) {
  const bool past = goes_past<T, n>(a.grad_streams, a.tokens, a.width);
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    const Tile<const T> grad{a.grad + first * a.width, a.tokens * a.width};
    if (past) {
      expand_backward_tile<T, n, true, true>(a, first, tokens, grad);
    } else {
      expand_backward_tile<T, n, false, true>(a, first, tokens, grad);
    }
  }
  if (past) stored_past();
}

// ---- one site's expansion and the next one's collapse ---------------------------------------------------------------

// Room for `streams` tiles that stays in the nearer caches.
template <typename T, int n>
struct Near {
  std::vector<T> room;
  int64_t stride;  // of a stream
  Near(int64_t width, int streams) : room(streams * n * TOKENS * width + 64), stride(TOKENS * width) {}
  Tile<T> tile(int number) {
    T* begin = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t{63});
    return {begin + number * n * stride, stride};
  }
};

// Tokens begin .. end. e.mixed are the streams between the two sites; c.streams is not read.
template <typename T, int n>
KERNEL static void expand_collapse(
    const ExpandArguments<T>& e, const CollapseArguments<T>& c, int64_t begin, int64_t end) {
  constexpr int count = Lanes<T>::count;
  const int64_t D = e.width, stride = e.tokens * D;
  const bool past = goes_past<T, n>(e.mixed, e.tokens, D);
  Near<T, n> near(D, 1);
  const Tile<T> streams = near.tile(0);
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    const T* from = e.streams + first * D;
    expand_tile<T, n, false>(e, first, tokens, {from, stride}, streams);
    for (int j = 0; j < n; ++j) {
      const T* mixed = streams.at + j * streams.stride;
      T* to = e.mixed + j * stride + first * D;
      if (past) {
        for (int64_t i = 0; i < tokens * D; i += count) store_past(to + i, load(mixed + i));
      } else {
        std::copy(mixed, mixed + tokens * D, to);
      }
    }
    collapse_tile<T, n>(c, first, tokens, {streams.at, streams.stride}, {from + TOKENS * D, stride});
  }
  if (past) stored_past();
}

// Of the streams between the sites neither values nor gradients are read or written: the former are expanded again.
// `given`, the gradient of them that comes from beyond, may be null. Adds to grad_fn.
template <typename T, int n>
KERNEL static void expand_collapse_backward(const ExpandGradients<T>& e, const CollapseGradients<T>& c, const T* given,
                                            int64_t begin, int64_t end, T* grad_fn) {
  const int64_t D = e.width, stride = e.tokens * D;
  const ExpandArguments<T> again{e.streams, e.output, e.post, e.residual, nullptr, e.tokens, D};
  const bool past = goes_past<T, n>(e.grad_streams, e.tokens, D);
  Near<T, n> near(D, 2);
  const Tile<T> streams = near.tile(0), grad = near.tile(1);
  std::vector<T> steps(kept_steps<T, n>(c.iterations));
  for (int64_t first = begin; first < end; first += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, end - first));
    const T* from = e.streams + first * D;
    expand_tile<T, n, false>(again, first, tokens, {from, stride}, streams);
    collapse_backward_tile<T, n>(
        c, first, tokens, {streams.at, streams.stride}, {from + TOKENS * D, stride},
        {given ? given + first * D : nullptr, stride}, grad, grad_fn, steps.data());
    if (past) {
      expand_backward_tile<T, n, true, false>(e, first, tokens, {grad.at, grad.stride});
    } else {
      expand_backward_tile<T, n, false, false>(e, first, tokens, {grad.at, grad.stride});
    }
  }
  if (past) stored_past();
}
