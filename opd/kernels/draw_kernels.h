// The loops of draw.cpp, included after lanes.h and like it once for every kind of vector instructions.

// Weights e^(x - largest) of one row's logits over `temperature`, and their sum in double precision block by block;
// false if a logit is not finite. `weights` has room for whole blocks.
KERNEL static bool weigh(const float* logits, int64_t size, float temperature, float* weights, double* sums,
                         float& largest) {
  using V = Lanes<float>::V;
  using I = Lanes<float>::I;
  using Doubles = Lanes<double>::V;
  typedef float Half __attribute__((vector_size(BYTES / 2)));
  constexpr int LANES = Lanes<float>::count;
  V most = V{} - INFINITY;
  I broken{};
  const int64_t whole = size / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    const V x = load(logits + i);
    broken |= x - x != V{};
    most = x > most ? x : most;
  }
  largest = -INFINITY;
  bool finite = true;
  for (int lane = 0; lane < LANES; ++lane) {
    largest = std::max(largest, most[lane]);
    finite &= broken[lane] == 0;
  }
  for (int64_t i = whole; i < size; ++i) {
    largest = std::max(largest, logits[i]);
    finite &= std::isfinite(logits[i]);
  }
  if (!finite) return false;
  largest /= temperature;
  const int64_t padded = (size + DRAW_BLOCK - 1) / DRAW_BLOCK * DRAW_BLOCK;
  for (int64_t i = 0; i < whole; i += LANES) store(weights + i, load(logits + i) / temperature - largest);
  for (int64_t i = whole; i < size; ++i) weights[i] = logits[i] / temperature - largest;
  std::fill(weights + size, weights + padded, -INFINITY);
  for (int64_t block = 0; block < padded; block += DRAW_BLOCK) {
    float* part = weights + block;
    V far[DRAW_BLOCK / LANES];
    for (int i = 0; i < DRAW_BLOCK / LANES; ++i) far[i] = load(part + i * LANES);
    exponential(part, DRAW_BLOCK);
    Doubles sum{};
    for (int i = 0; i < DRAW_BLOCK / LANES; ++i) {
      store(part + i * LANES, far[i] < -87.f ? V{} : load(part + i * LANES));  // there the exponential ends
      for (int half = 0; half < 2; ++half) {
        Half floats;
        __builtin_memcpy(&floats, part + i * LANES + half * LANES / 2, BYTES / 2);
        sum += __builtin_convertvector(floats, Doubles);
      }
    }
    sums[block / DRAW_BLOCK] = total<double>(sum);
  }
  return true;
}
