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

// e^x, to about an ulp: x = n log 2 + r, then the series of e^r. Below the smallest and above the largest it saturates.
template <typename T>
KERNEL static inline void exponential(T* values, int64_t size) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? -87.f : -708., highest = single ? 88.f : 709.;
  constexpr T shift = single ? 12582912.f : 6755399441055744.;  // 1.5 * 2 ** mantissa bits: adding it rounds
  constexpr T log2_high = single ? 0.693359375f : 6.93147180369123816490e-01;
  constexpr T log2_low = single ? -2.12194440e-4f : 1.90821492927058770002e-10;
  constexpr int degree = single ? 8 : 14, mantissa = single ? 23 : 52;
  constexpr typename Lanes<T>::Integer bias = single ? 127 : 1023;
  for (int64_t i = 0; i < size; i += Lanes<T>::count) {
    V x = load(values + i);
    x = x < lowest ? V{} + lowest : x;
    x = x > highest ? V{} + highest : x;
    const V n = (x * T(1.4426950408889634) + shift) - shift;
    const V r = (x - n * log2_high) - n * log2_low;
    V power = V{} + T(1);
    for (int k = degree; k >= 1; --k) power = T(1) + power * r * T(1. / k);
    const I exponent = (__builtin_convertvector(n, I) + bias) << mantissa;
    V scale;
    __builtin_memcpy(&scale, &exponent, BYTES);
    store(values + i, power * scale);
  }
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
