// The loops of compressor.cpp, included after lanes.h and like it once for every kind of vector instructions.

// Where candidate i of a block is: with overlap, the block before contributes its tokens' first channels.
struct Candidates {
  int64_t ratio, series, own, carried, count;  // own: first channel of a block's own tokens; carried: how many are not
  template <typename T>
  Candidates(const PoolArguments<T>& a, int64_t block)
      : ratio(a.ratio), series(a.series), own(a.series - a.width), carried(own && block ? a.ratio : 0),
        count(carried + a.ratio) {}
  // From the block's first token, and from the first row of the bias.
  int64_t place(int64_t i) const { return i < carried ? (i - ratio) * series : (i - carried) * series + own; }
  int64_t bias(int64_t i) const { return i < carried ? i * series : (i - carried) * series + own; }
};

// e^(gate - largest gate) of a block's candidates for `size` channels from d on, into `weights`; returns their sum.
template <typename T>
KERNEL static typename Lanes<T>::V weigh(
    const Candidates& of, const T* gate, const T* bias, int64_t d, int64_t size, T* weights) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  V largest = load_some(gate + of.place(0) + d, size) + load_some(bias + of.bias(0) + d, size);
  for (int64_t i = 0; i < of.count; ++i) {
    const V logit = load_some(gate + of.place(i) + d, size) + load_some(bias + of.bias(i) + d, size);
    store(weights + i * count, logit);
    largest = logit > largest ? logit : largest;
  }
  for (int64_t i = 0; i < of.count; ++i) store(weights + i * count, load(weights + i * count) - largest);
  exponential(weights, of.count * count);
  V sum{};
  for (int64_t i = 0; i < of.count; ++i) sum += load(weights + i * count);
  return sum;
}

// Blocks begin .. end, those of all sequences one after the other.
template <typename T>
KERNEL static void pool(const PoolArguments<T>& a, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  std::vector<T> weights(2 * a.ratio * count);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t block = number % a.blocks, first = (number / a.blocks * a.tokens + block * a.ratio) * a.series;
    const Candidates of(a, block);
    const T *kv = a.kv + first, *gate = a.gate + first;
    for (int64_t d = 0; d < a.width; d += count) {
      const int64_t size = std::min<int64_t>(count, a.width - d);
      const V sum = weigh(of, gate, a.bias, d, size, weights.data());
      V total{};
      for (int64_t i = 0; i < of.count; ++i) {
        total += load(weights.data() + i * count) * load_some(kv + of.place(i) + d, size);
      }
      store_some(a.pooled + number * a.width + d, total / sum, size);
    }
  }
}

// Every token's two halves are candidates once at most, so all gradients but the bias's are written, none is added up.
template <typename T>
KERNEL static void pool_backward(
    const PoolArguments<T>& a, const PoolGradients<T>& to, int64_t begin, int64_t end, T* grad_bias) {
  using V = typename Lanes<T>::V;
  constexpr int count = Lanes<T>::count;
  std::vector<T> weights(2 * a.ratio * count);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t block = number % a.blocks, first = (number / a.blocks * a.tokens + block * a.ratio) * a.series;
    const Candidates of(a, block);
    const T *kv = a.kv + first, *gate = a.gate + first;
    T *grad_kv = to.kv + first, *grad_gate = to.gate + first;
    for (int64_t d = 0; d < a.width; d += count) {
      const int64_t size = std::min<int64_t>(count, a.width - d);
      const V share = T(1) / weigh(of, gate, a.bias, d, size, weights.data());
      const V grad = load_some(to.pooled + number * a.width + d, size);
      V pooled{};
      for (int64_t i = 0; i < of.count; ++i) {
        const V weight = load(weights.data() + i * count) * share;
        store(weights.data() + i * count, weight);
        pooled += weight * load_some(kv + of.place(i) + d, size);
      }
      for (int64_t i = 0; i < of.count; ++i) {
        const V of_value = load(weights.data() + i * count) * grad;
        const V of_gate = of_value * (load_some(kv + of.place(i) + d, size) - pooled);
        store_some(grad_kv + of.place(i) + d, of_value, size);
        store_some(grad_gate + of.place(i) + d, of_gate, size);
        T* sum = grad_bias + of.bias(i) + d;
        store_some(sum, load_some(sum, size) + of_gate, size);
      }
    }
    if (block + 1 < a.blocks) continue;
    // Nobody takes up what the last block's tokens would carry on, nor the tokens of an unfinished block.
    const int64_t rest = a.tokens - block * a.ratio;
    for (int64_t t = 0; t < rest; ++t) {
      const int64_t channels = t < a.ratio ? a.series - a.width : a.series;
      std::fill_n(grad_kv + t * a.series, channels, T(0));
      std::fill_n(grad_gate + t * a.series, channels, T(0));
    }
  }
}
