// Vectors, the exponential and sums across lanes, for the loops of this folder.
//
// Included once for every kind of vector instructions, inside a namespace of its own, by whoever defines KERNEL (a
// function attribute that allows the instructions) and BYTES (of a vector). T is float or double.

template <typename T>
struct Lanes {
  static constexpr int count = BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(BYTES)));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Integer I __attribute__((vector_size(BYTES)));
};

template <typename T>
KERNEL static inline typename Lanes<T>::V load(const T* from) {
  typename Lanes<T>::V v;
  __builtin_memcpy(&v, from, BYTES);
  return v;
}

template <typename T>
KERNEL static inline void store(T* to, const typename Lanes<T>::V& v) {
  __builtin_memcpy(to, &v, BYTES);
}

// A store past the caches, which would first read what it overwrites: for results that are read again when other data
// has long taken their place. `to` must be aligned to a vector, and who reads it waits for `stored_past`.
template <typename T>
KERNEL static inline void store_past(T* to, const typename Lanes<T>::V& v) {
#ifdef OPD_X86
  if constexpr (sizeof(T) == 4) {
#if BYTES == 64
    __builtin_ia32_movntps512(to, v);
#elif BYTES == 32
    __builtin_ia32_movntps256(to, v);
#else
    __builtin_ia32_movntps(to, v);
#endif
  } else {
#if BYTES == 64
    __builtin_ia32_movntpd512(to, v);
#elif BYTES == 32
    __builtin_ia32_movntpd256(to, v);
#else
    __builtin_ia32_movntpd(to, v);
#endif
  }
#else
  store(to, v);
#endif
}

KERNEL static inline void stored_past() {
#ifdef OPD_X86
  __builtin_ia32_sfence();
#endif
}

// Up to a vector's numbers, the rest zero; and back.
template <typename T>
KERNEL static inline typename Lanes<T>::V load_some(const T* from, int64_t size) {
  if (size >= Lanes<T>::count) return load(from);
  typename Lanes<T>::V v{};
  for (int64_t i = 0; i < size; ++i) v[i] = from[i];
  return v;
}

template <typename T>
KERNEL static inline void store_some(T* to, const typename Lanes<T>::V& v, int64_t size) {
  if (size >= Lanes<T>::count) return store(to, v);
  for (int64_t i = 0; i < size; ++i) to[i] = v[i];
}

// e^x, to about an ulp: x = n log 2 + r, then the series of e^r. Below the smallest and above the largest it saturates.
template <typename T>
KERNEL static inline typename Lanes<T>::V power_of_e(typename Lanes<T>::V x) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? -87.f : -708., highest = single ? 88.f : 709.;
  constexpr T shift = single ? 12582912.f : 6755399441055744.;  // 1.5 * 2 ** mantissa bits: adding it rounds
  constexpr T log2_high = single ? 0.693359375f : 6.93147180369123816490e-01;
  constexpr T log2_low = single ? -2.12194440e-4f : 1.90821492927058770002e-10;
  constexpr int degree = single ? 8 : 14, mantissa = single ? 23 : 52;
  constexpr typename Lanes<T>::Integer bias = single ? 127 : 1023;
  x = x < lowest ? V{} + lowest : x;
  x = x > highest ? V{} + highest : x;
  const V n = (x * T(1.4426950408889634) + shift) - shift;
  const V r = (x - n * log2_high) - n * log2_low;
  V power = V{} + T(1);
  for (int k = degree; k >= 1; --k) power = T(1) + power * r * T(1. / k);
  const I exponent = (__builtin_convertvector(n, I) + bias) << mantissa;
  V scale;
  __builtin_memcpy(&scale, &exponent, BYTES);
  return power * scale;
}

// Of `size` numbers, in whole vectors.
template <typename T>
KERNEL static inline void exponential(T* values, int64_t size) {
  for (int64_t i = 0; i < size; i += Lanes<T>::count) store(values + i, power_of_e<T>(load(values + i)));
}

template <typename T>
KERNEL static inline T total(typename Lanes<T>::V v) {
  alignas(64) T lanes[Lanes<T>::count];
  store(lanes, v);
  for (int half = Lanes<T>::count / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Of a pair of vectors, the sums of lanes HALF apart: those of `a` where a lane's number lacks HALF, those of `b`
// elsewhere. The lanes are constants, or every call would make them anew.
template <typename T, int HALF, int... LANE>
KERNEL static inline typename Lanes<T>::V folded(
    typename Lanes<T>::V a, typename Lanes<T>::V b, std::integer_sequence<int, LANE...>) {
  using I = typename Lanes<T>::I;
  constexpr int count = sizeof...(LANE);
  return __builtin_shuffle(a, b, I{(LANE & HALF ? count + (LANE ^ HALF) : LANE)...}) +
         __builtin_shuffle(a, b, I{(LANE & HALF ? count + LANE : LANE ^ HALF)...});
}

// Lane i of the result is the sum of the lanes of v[i].
template <typename T, int HALF = 1>
KERNEL static inline typename Lanes<T>::V totals(typename Lanes<T>::V* v) {
  constexpr int count = Lanes<T>::count;
  if constexpr (HALF == count) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < count; i += 2 * HALF) {
      v[i] = folded<T, HALF>(v[i], v[i + HALF], std::make_integer_sequence<int, count>());
    }
    return totals<T, 2 * HALF>(v);
  }
}

// As many floats of as many rows as there are lanes, turned: to[i][row] = from[row][i].
KERNEL static inline void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
  constexpr int LANES = Lanes<float>::count;
  using Floats = Lanes<float>::V;
  Floats rows[LANES], next[LANES];
  Lanes<float>::I low{}, high{};
  for (int lane = 0; lane < LANES; ++lane) {
    low[lane] = lane / 2 + (lane % 2) * LANES;
    high[lane] = low[lane] + LANES / 2;
  }
#pragma GCC unroll 16
  for (int row = 0; row < LANES; ++row) rows[row] = load(from + row * stride);
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
    for (int pair = 0; pair < LANES / 2; ++pair) {
      next[2 * pair] = __builtin_shuffle(rows[pair], rows[pair + LANES / 2], low);
      next[2 * pair + 1] = __builtin_shuffle(rows[pair], rows[pair + LANES / 2], high);
    }
#pragma GCC unroll 16
    for (int row = 0; row < LANES; ++row) rows[row] = next[row];
  }
#pragma GCC unroll 16
  for (int row = 0; row < LANES; ++row) store(to + row * to_stride, rows[row]);
}
