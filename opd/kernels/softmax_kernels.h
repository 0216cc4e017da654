// The loops of softmax.cpp, for one kind of vector instructions; see every_vector.h.

using Floats = Lanes<float>::V;
constexpr int LANES = Lanes<float>::count;

// 2^x to about an ulp for x <= 0, and exactly zero where a float has nothing that small.
KERNEL static inline Floats power_of_two(const Floats& given) {
  const Floats x = given < -126.f ? Floats{} - 126.f : given;
  const Floats n = (x + 12582912.f) - 12582912.f;  // 1.5 * 2 ** 23: adding it rounds
  const Floats r = x - n;
  Floats power = Floats{} + 1.525273380e-5f;  // ln(2)^k / k!
  power = power * r + 1.540353039e-4f;
  power = power * r + 1.333355815e-3f;
  power = power * r + 9.618129108e-3f;
  power = power * r + 5.550410866e-2f;
  power = power * r + 2.402265070e-1f;
  power = power * r + 6.931471806e-1f;
  power = power * r + 1.f;
  const Lanes<float>::I exponent = (__builtin_convertvector(n, Lanes<float>::I) + 127) << 23;
  Floats scale;
  __builtin_memcpy(&scale, &exponent, BYTES);
  return given < -126.f ? Floats{} : power * scale;
}

// Some numbers of a row, what is missing filled up; and back.
KERNEL static inline Floats some(const float* from, int64_t size) {
  alignas(64) float part[LANES];
  for (int64_t i = 0; i < LANES; ++i) part[i] = i < size ? from[i] : FAR_BELOW;
  return load(part);
}

KERNEL static inline void put(float* to, const Floats& values, int64_t size) {
  alignas(64) float part[LANES];
  store(part, values);
  for (int64_t i = 0; i < size; ++i) to[i] = part[i];
}

// NaN if one is among them, which no comparison would tell.
KERNEL static inline float largest(const float* row, int64_t width) {
  Floats most = Floats{} - INFINITY, odd{};
  for (int64_t i = 0; i < width; i += LANES) {
    const Floats x = i + LANES <= width ? load(row + i) : some(row + i, width - i);
    most = x > most ? x : most;
    odd += x == x ? Floats{} : Floats{} + 1.f;
  }
  float top = most[0];
  for (int lane = 1; lane < LANES; ++lane) top = std::max<float>(top, most[lane]);
  return total<float>(odd) ? NAN : top;
}

// Sums of rows first .. last - 1 of z [., width], which become relative to their largest.
KERNEL static void sums(float* z, int64_t width, int64_t rows, int64_t first, int64_t last, float* out) {
  for (int64_t row = first; row < last; ++row) {
    float* own = z + row * width;
    const float top = largest(own, width);
    Floats mass{}, moment{};
    for (int64_t i = 0; i < width; i += LANES) {
      const bool whole = i + LANES <= width;
      const Floats x = (whole ? load(own + i) : some(own + i, width - i)) - top, weight = power_of_two(x);
      whole ? store(own + i, x) : put(own + i, x, width - i);
      mass += weight;
      moment += weight * x;
    }
    out[row] = top;
    out[rows + row] = total<float>(mass);
    out[2 * rows + row] = total<float>(moment);
  }
}

// Of two sides.
KERNEL static void pair_sums(
    float* z, float* u, int64_t width, int64_t rows, int64_t first, int64_t last, float* out) {
  for (int64_t row = first; row < last; ++row) {
    float *own_z = z + row * width, *own_u = u + row * width;
    const float top_z = largest(own_z, width), top_u = largest(own_u, width);
    Floats mass_z{}, mass_u{}, moment_z{}, moment_u{}, reverse{}, forward{}, both = Floats{} + FAR_BELOW;
    for (int64_t i = 0; i < width; i += LANES) {
      const bool whole = i + LANES <= width;
      const Floats x = (whole ? load(own_z + i) : some(own_z + i, width - i)) - top_z;
      const Floats y = (whole ? load(own_u + i) : some(own_u + i, width - i)) - top_u;
      whole ? store(own_z + i, x) : put(own_z + i, x, width - i);
      whole ? store(own_u + i, y) : put(own_u + i, y, width - i);
      const Floats p = power_of_two(x), q = power_of_two(y), gap = x - y, sum = x + y;
      mass_z += p;
      mass_u += q;
      moment_z += p * x;
      moment_u += q * y;
      reverse += p * gap;
      forward -= q * gap;
      both = sum > both ? sum : both;
    }
    float agree = 0.f;
    for (int lane = 0; lane < LANES; ++lane) agree = both[lane] == 0.f ? 1.f : agree;
    const float found[9] = {top_z, top_u, total<float>(mass_z), total<float>(mass_u), total<float>(moment_z),
                            total<float>(moment_u), total<float>(reverse), total<float>(forward), agree};
    for (int i = 0; i < 9; ++i) out[i * rows + row] = found[i];
  }
}

// out = slope 2^(z - top)
KERNEL static void gradient(
    const float* z, const float* top, const float* slope, int64_t width, int64_t first, int64_t last, float* out) {
  for (int64_t row = first; row < last; ++row) {
    const float *own = z + row * width, below = top[row], factor = slope[row];
    float* to = out + row * width;
    for (int64_t i = 0; i < width; i += LANES) {
      if (i + LANES <= width) {
        store(to + i, power_of_two(load(own + i) - below) * factor);
      } else {
        put(to + i, power_of_two(some(own + i, width - i) - below) * factor, width - i);
      }
    }
  }
}

// out = 2^z (slope (z - u - offset) + constant) - 2^u teacher, z and u relative to their tops.
template <bool WITH_TEACHER>
KERNEL static void pair_gradient(
    const float* z, const float* u, const float* numbers, int64_t width, int64_t rows, int64_t first, int64_t last,
    float* out) {
  for (int64_t row = first; row < last; ++row) {
    const float *own_z = z + row * width, *own_u = u + row * width;
    float* to = out + row * width;
    float n[6];
    for (int i = 0; i < 6; ++i) n[i] = numbers[i * rows + row];
    // As 2^z (... + constant - teacher) + (2^z - 2^u) teacher, which is zero, and not a rounding, for equal sides.
    const float constant = WITH_TEACHER ? n[4] - n[5] : n[4];
    for (int64_t i = 0; i < width; i += LANES) {
      const bool whole = i + LANES <= width;
      const Floats x = (whole ? load(own_z + i) : some(own_z + i, width - i)) - n[0];
      const Floats y = (whole ? load(own_u + i) : some(own_u + i, width - i)) - n[1];
      const Floats p = power_of_two(x);
      Floats found = p * ((x - y - n[2]) * n[3] + constant);
      if constexpr (WITH_TEACHER) found += (p - power_of_two(y)) * n[5];
      whole ? store(to + i, found) : put(to + i, found, width - i);
    }
  }
}
