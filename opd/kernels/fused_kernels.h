// The loops of fused.cpp, included after lanes.h and like it once for every kind of vector instructions.
//
// Tokens lie in lanes where each token has a few numbers, channels where it has many; a token's result is the same bits
// whatever other tokens are computed with it.

#include "hyper_connection_kernels.h"

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
  using V = typename Lanes<T>::V;
  const V limit = V{} + a.limit;
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = a.gate + row * a.stride, *up = a.up + row * a.stride;
    for (int64_t d = 0; d < a.width; d += Lanes<T>::count) {
      V g = load_some(gate + d, a.width - d), u = load_some(up + d, a.width - d);
      g = g > limit ? limit : g, u = u > limit ? limit : u, u = u < -limit ? -limit : u;
      store_some(a.out + row * a.width + d, g * u / (T(1) + power_of_e<T>(-g)), a.width - d);
    }
  }
}

template <typename T>
KERNEL static void swiglu_backward(const SwigluGradients<T>& a, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  const V limit = V{} + a.limit;
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = a.gate + row * a.stride, *up = a.up + row * a.stride, *grad = a.grad + row * a.width;
    T *to_gate = a.grad_gate + row * a.stride, *to_up = a.grad_up + row * a.stride;
    for (int64_t d = 0; d < a.width; d += Lanes<T>::count) {
      const int64_t size = a.width - d;
      const V given = load_some(grad + d, size), own_gate = load_some(gate + d, size), own_up = load_some(up + d, size);
      const V g = own_gate > limit ? limit : own_gate;
      V u = own_up > limit ? limit : own_up;
      u = u < -limit ? -limit : u;
      const V sigmoid = T(1) / (T(1) + power_of_e<T>(-g)), silu = g * sigmoid;
      const V of_up = given * silu, of_gate = given * u * (sigmoid + silu * (T(1) - sigmoid));
      store_some(to_up + d, u == own_up ? of_up : V{}, size);
      store_some(to_gate + d, own_gate > limit ? V{} : of_gate, size);
    }
  }
}

// ---- affinities ----------------------------------------------------------------------------------------------------

// sqrt(log(1 + e^x)), or 1 / (1 + e^-x). With s = p / (2 + p) the logarithm of 1 + p is 2 (s + s^3 / 3 + s^5 / 5 + ..),
// and s is no more than a third.
template <typename T>
KERNEL static void affinity(const T* from, T* to, int64_t size, bool is_sigmoid) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count, terms = sizeof(T) == 4 ? 8 : 17;
  constexpr T lowest = sizeof(T) == 4 ? -87.f : -708.;  // below it `power_of_e` stays where it is
  for (int64_t i = 0; i < size; i += count) {
    const V x = load_some(from + i, size - i), far = x < T(0) ? x : -x;
    const V power = far < lowest ? V{} : power_of_e<T>(far);
    if (is_sigmoid) {
      store_some(to + i, (x < T(0) ? power : V{} + T(1)) / (T(1) + power), size - i);
      continue;
    }
    const V s = power / (T(2) + power);
    V series = V{} + T(1. / (2 * terms + 1));
    for (int k = terms - 1; k >= 0; --k) series = T(1. / (2 * k + 1)) + series * (s * s);
    V sum = (x > T(0) ? x : V{}) + 2 * s * series;
    for (int lane = 0; lane < count; ++lane) sum[lane] = std::sqrt(sum[lane]);
    store_some(to + i, sum, size - i);
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
KERNEL static void pool(const T* const* kv, const T* const* gate, int64_t candidates, int64_t width, T* weights,
                        T* out) {
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
