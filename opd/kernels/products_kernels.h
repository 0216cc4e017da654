// The loops of products.cpp, for one kind of vector instructions; see every_vector.h.

constexpr int LANES = BYTES / sizeof(float);
// A tile's sums stay in registers: 24 of AVX-512's 32, 12 of the 16 that the others have.
constexpr int TILE_ROWS = BYTES == 64 ? 12 : 6;
constexpr int64_t PAGE = 4096;  // bytes from one address to the next with the same place in a first cache, or less
constexpr int64_t ALIGNMENT = 64 / sizeof(float);  // of `aligned`, whatever the vectors
using Floats = Lanes<float>::V;

// Rows 0 .. TILE_ROWS / VECTORS * 2 - 1 of a tile whose columns are VECTORS vectors.
template <int VECTORS>
constexpr int tile_rows() {
  return TILE_ROWS * 2 / VECTORS;
}

// Columns of b, [inner, width], as panels [width / (VECTORS LANES)][inner][VECTORS LANES], filled up with zeros.
template <int VECTORS>
KERNEL static void pack_columns(
    const float* b, int64_t row, int64_t column, int64_t inner, int64_t first, int64_t last, int64_t width, float* to) {
  constexpr int64_t SPAN = VECTORS * LANES;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t start = panel * SPAN, columns = std::min(SPAN, width - start);
    const float* from = b + start * column;
    float* target = to + panel * SPAN * inner;
    if (column == 1 && columns == SPAN) {
      for (int64_t p = 0; p < inner; ++p) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(target + p * SPAN + v * LANES, load(from + p * row + v * LANES));
      }
    } else if (row == 1) {
      const int64_t whole = inner / LANES * LANES;
      for (int v = 0; v < VECTORS; ++v) {
        const float* source = from + v * LANES * column;
        const int64_t here = std::clamp<int64_t>(columns - v * LANES, 0, LANES);
        alignas(64) float some[LANES * LANES] = {};
        for (int64_t p = 0; p < whole; p += LANES) {
          const float* block = source + p;
          int64_t stride = column;
          if (here < LANES) {
            for (int64_t j = 0; j < here; ++j) {
              __builtin_memcpy(some + j * LANES, block + j * stride, LANES * sizeof(float));
            }
            block = some, stride = LANES;
          }
          transpose(block, stride, target + p * SPAN + v * LANES, SPAN);
        }
        for (int64_t p = whole; p < inner; ++p) {
          for (int j = 0; j < LANES; ++j) target[p * SPAN + v * LANES + j] = j < here ? source[j * column + p] : 0.f;
        }
      }
    } else {
      for (int64_t p = 0; p < inner; ++p) {
        for (int64_t j = 0; j < columns; ++j) target[p * SPAN + j] = from[p * row + j * column];
        for (int64_t j = columns; j < SPAN; ++j) target[p * SPAN + j] = 0.f;
      }
    }
  }
}

// Rows of a, by rows [ROWS][DEPTH + 16] where they are contiguous and otherwise [inner][ROWS], zeros in place of
// missing ones. The gap keeps rows of a power of two out of each other's place in the cache.
template <int ROWS>
KERNEL static void pack_rows(
    const float* a, int64_t row, int64_t column, int64_t inner, int64_t rows, bool by_rows, float* to) {
  if (by_rows) {
    for (int64_t i = 0; i < ROWS; ++i) {
      float* target = to + i * ROW_STRIDE;
      if (i < rows) {
        __builtin_memcpy(target, a + i * row, inner * sizeof(float));
      } else {
        __builtin_memset(target, 0, inner * sizeof(float));
      }
    }
  } else if (row == 1 && rows == ROWS) {
    for (int64_t p = 0; p < inner; ++p) __builtin_memcpy(to + p * ROWS, a + p * column, ROWS * sizeof(float));
  } else {
    for (int64_t p = 0; p < inner; ++p) {
      for (int64_t i = 0; i < ROWS; ++i) to[p * ROWS + i] = i < rows ? a[i * row + p * column] : 0.f;
    }
  }
}

// One tile: each sum runs over `inner` in order, in one register, whatever the tile's place in the product. By rows,
// `a` has them `a_row` apart, three to a pointer, or there would not be enough registers for the pointers.
template <int VECTORS, bool BY_ROWS>
KERNEL static inline void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inner, float* c,
                               int64_t c_row, int64_t c_column, int64_t rows, int64_t columns, bool add) {
  constexpr int ROWS = tile_rows<VECTORS>(), SPAN = VECTORS * LANES;
  const float* threes[ROWS / 3];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS / 3; ++i) threes[i] = a + 3 * i * a_row;
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 24
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = Floats{};
  }
  for (int64_t p = 0; p < inner; ++p) {
    Floats from_b[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) from_b[v] = load(b + p * b_row + v * LANES);
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; ++i) {
      const float from_a = BY_ROWS ? threes[i / 3][i % 3 * a_row] : a[p * ROWS + i];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += from_a * from_b[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS / 3; ++i) ++threes[i];
  }
  if (c_column == 1 && rows == ROWS && columns == SPAN) {
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        float* place = c + i * c_row + v * LANES;
        store(place, add ? load(place) + sums[i][v] : sums[i][v]);
      }
    }
    return;
  }
  alignas(64) float whole[ROWS][SPAN];
#pragma GCC unroll 24
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(whole[i] + v * LANES, sums[i][v]);
  }
  if (c_column == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        float* place = c + i * c_row + j;
        *place = add ? *place + whole[i][j] : whole[i][j];
      }
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        float* place = c + i * c_row + j * c_column;
        *place = add ? *place + whole[i][j] : whole[i][j];
      }
    }
  }
}

// Row panels first .. last - 1 times some columns of b: spans of them `b_span` apart, with `b_row` from one row of a
// span to the next, whether they are packed or lie as they are given.
template <int VECTORS, bool BY_ROWS>
KERNEL static void multiply_rows(const Product& product, const float* b, int64_t b_row, int64_t b_span,
                                 int64_t inner_start, int64_t inner, int64_t column_start, int64_t columns, bool add,
                                 int64_t first, int64_t last) {
  constexpr int64_t ROWS = tile_rows<VECTORS>(), SPAN = VECTORS * LANES;
  alignas(64) float own[ROWS * ROW_STRIDE];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t start = panel * ROWS, rows = std::min(ROWS, product.rows - start);
    const float* a = product.a + start * product.a_row + inner_start * product.a_column;
    // Whole rows are read where they lie, unless they would be in each other's place in the first cache.
    const bool as_it_lies = BY_ROWS && rows == ROWS && product.a_row * sizeof(float) % PAGE != 0;
    for (int64_t i = 0; as_it_lies && i < ROWS; ++i) {  // the next panel's, which the processor does not foresee
      const float* later = a + (ROWS + i) * product.a_row;
      for (int64_t p = 0; p < inner; p += 64 / sizeof(float)) __builtin_prefetch(later + p, 0, 2);
    }
    if (!as_it_lies) pack_rows<ROWS>(a, product.a_row, product.a_column, inner, rows, BY_ROWS, own);
    float* c = product.c + start * product.c_row + column_start * product.c_column;
    for (int64_t column = 0; column < columns; column += SPAN) {
      tile<VECTORS, BY_ROWS>(
          as_it_lies ? a : own, as_it_lies ? product.a_row : ROW_STRIDE, b + column / SPAN * b_span, b_row, inner,
          c + column * product.c_column, product.c_row, product.c_column, rows, std::min(SPAN, columns - column), add);
    }
  }
}

template <int VECTORS>
static void multiply_rows(const Product& product, const float* b, int64_t b_row, int64_t b_span, int64_t inner_start,
                          int64_t inner, int64_t column_start, int64_t columns, bool add, int64_t first, int64_t last) {
  if (product.a_column == 1) {
    multiply_rows<VECTORS, true>(product, b, b_row, b_span, inner_start, inner, column_start, columns, add, first,
                                 last);
  } else {
    multiply_rows<VECTORS, false>(product, b, b_row, b_span, inner_start, inner, column_start, columns, add, first,
                                  last);
  }
}

// Few row panels: b's columns would be packed to be read a few times only. Whole spans of them are read where they lie,
// the rest is packed; every thread has panels, or spans, of its own and waits for nobody.
template <int VECTORS>
static void multiply_as_it_lies(const Product& product, bool alone) {
  constexpr int64_t ROWS = tile_rows<VECTORS>(), SPAN = VECTORS * LANES;
  const int64_t panels = (product.rows + ROWS - 1) / ROWS, spans = (product.columns + SPAN - 1) / SPAN;
  const auto work = [&](int64_t first, int64_t last, int64_t first_span, int64_t last_span) {
    thread_local std::vector<float> room;
    room.resize(SPAN * DEPTH + ALIGNMENT);
    float* packed = aligned(room.data());
    const int64_t begin = first_span * SPAN, end = std::min(product.columns, last_span * SPAN);
    const int64_t whole = (end - begin) / SPAN * SPAN, rest = end - begin - whole;
    for (int64_t start = 0; start < product.inner; start += DEPTH) {
      const int64_t inner = std::min<int64_t>(DEPTH, product.inner - start);
      const bool add = product.add || start > 0;
      const float* b = product.b + start * product.b_row + begin;
      multiply_rows<VECTORS>(product, b, product.b_row, SPAN, start, inner, begin, whole, add, first, last);
      if (!rest) continue;
      pack_columns<VECTORS>(b + whole, product.b_row, 1, inner, 0, 1, rest, packed);
      multiply_rows<VECTORS>(product, packed, SPAN, SPAN * inner, start, inner, begin + whole, rest, add, first, last);
    }
  };
  if (alone) {
    work(0, panels, 0, spans);
  } else if (panels >= at::get_num_threads()) {
    at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) { work(first, last, 0, spans); });
  } else {
    at::parallel_for(0, spans, 1, [&](int64_t first, int64_t last) { work(0, panels, first, last); });
  }
}

template <int VECTORS>
static void multiply_with(const Product& product, bool alone) {
  constexpr int64_t ROWS = tile_rows<VECTORS>(), SPAN = VECTORS * LANES;
  const int64_t panels = (product.rows + ROWS - 1) / ROWS;
  if (product.b_column == 1 && panels <= FEW_PANELS) {
    multiply_as_it_lies<VECTORS>(product, alone);
    return;
  }
  thread_local std::vector<float> room;
  for (int64_t column = 0; column < product.columns; column += WIDTH) {
    const int64_t columns = std::min(WIDTH, product.columns - column);
    const int64_t spans = (columns + SPAN - 1) / SPAN;
    for (int64_t start = 0; start < product.inner; start += DEPTH) {
      const int64_t inner = std::min<int64_t>(DEPTH, product.inner - start);
      const int64_t size = spans * SPAN * inner + ALIGNMENT;
      if (static_cast<int64_t>(room.size()) < size) room.resize(size);
      float* packed = aligned(room.data());
      const bool add = product.add || start > 0;
      const auto pack = [&](int64_t first, int64_t last) {
        pack_columns<VECTORS>(
            product.b + start * product.b_row + column * product.b_column, product.b_row, product.b_column, inner,
            first, last, columns, packed);
      };
      const auto multiply = [&](int64_t first, int64_t last) {
        multiply_rows<VECTORS>(product, packed, SPAN, SPAN * inner, start, inner, column, columns, add, first, last);
      };
      if (alone) {
        pack(0, spans);
        multiply(0, panels);
      } else {
        at::parallel_for(0, spans, 1 + GRAIN / (SPAN * inner), pack);
        at::parallel_for(0, panels, 1, multiply);
      }
    }
  }
}

// One to four rows times columns that lie in memory one after the other: panels first .. last - 1 of LANES columns,
// turned in registers as they are read. The same sums in the same order as those of a tile.
template <int ROWS>
KERNEL static void multiply_few(const Product& product, int64_t first, int64_t last) {
  alignas(64) float turned[LANES * LANES], part[LANES * LANES];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t start = panel * LANES, columns = std::min<int64_t>(LANES, product.columns - start);
    float* c = product.c + start;
    Floats done[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      done[i] = Floats{};
      for (int64_t j = 0; product.add && j < columns; ++j) done[i][j] = c[i * product.c_row + j];
    }
    for (int64_t block = 0; block < product.inner; block += DEPTH) {
      const int64_t end = std::min(product.inner, block + DEPTH);
      Floats sums[ROWS];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sums[i] = Floats{};
      for (int64_t p = block; p < end; p += LANES) {
        const int64_t inner = std::min<int64_t>(LANES, end - p);
        const float* from = product.b + start * product.b_column + p;
        if (columns == LANES && inner == LANES) {
          transpose(from, product.b_column, turned, LANES);
        } else {
          for (int64_t j = 0; j < LANES; ++j) {
            for (int64_t q = 0; q < LANES; ++q) {
              part[j * LANES + q] = j < columns && q < inner ? from[j * product.b_column + q] : 0.f;
            }
          }
          transpose(part, LANES, turned, LANES);
        }
        for (int64_t q = 0; q < inner; ++q) {
          const Floats weights = load(turned + q * LANES);
#pragma GCC unroll 4
          for (int i = 0; i < ROWS; ++i) sums[i] += product.a[i * product.a_row + p + q] * weights;
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) done[i] = block || product.add ? done[i] + sums[i] : sums[i];
    }
    for (int i = 0; i < ROWS; ++i) {
      for (int64_t j = 0; j < columns; ++j) c[i * product.c_row + j] = done[i][j];
    }
  }
}

static void multiply_few(const Product& product, bool alone) {
  const auto work = [&](int64_t first, int64_t last) {
    switch (product.rows) {
      case 1: multiply_few<1>(product, first, last); break;
      case 2: multiply_few<2>(product, first, last); break;
      case 3: multiply_few<3>(product, first, last); break;
      default: multiply_few<4>(product, first, last);
    }
  };
  const int64_t panels = (product.columns + LANES - 1) / LANES;
  if (alone) {
    work(0, panels);
  } else {
    at::parallel_for(0, panels, 1, work);
  }
}

static void multiply(const Product& product, bool alone) {
  // A panel of one vector's columns has twice the rows: it may hold all there are.
  const bool is_one_panel = product.b_column == 1 && product.rows > TILE_ROWS && product.rows <= 2 * TILE_ROWS;
  if (product.columns <= LANES || is_one_panel) {
    multiply_with<1>(product, alone);
  } else {
    multiply_with<2>(product, alone);
  }
}
