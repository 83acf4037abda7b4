// The matching of bipartite merging on a CPU: lengths, then blocks of dot products, of which only the best for each
// even token is kept, then the choice.
#include "matching.h"

#include "../unit_rows.h"
#include "choice.h"
#include "match_tiles.h"
#include "vector_rows.h"

#include <limits>

namespace tokenops {
namespace {

constexpr int64_t GRAIN_PRODUCTS = 1 << 18;  // less than this is not worth a second thread
constexpr int64_t TILES_FASTER = 8;          // products by tiles, about

// rows whose sums fit in the registers
template <int BYTES, typename Wide>
constexpr int64_t TILE = std::is_same_v<Wide, double> ? 3 : BYTES == 64 ? 14 : 6;

// Of LANES columns (D, LANES), each with a row of `count` that is D long: the largest product, divided by the row's
// length, and which row: the first of equals. What is no number counts as -inf.
template <int BYTES, typename Wide, typename Place>
INLINE void best_of(const Wide* rows, const Wide* inverses, int64_t count, const Wide* columns, int64_t D, Wide* best,
                    Place* places) {
  constexpr int64_t ROWS = TILE<BYTES, Wide>, WIDTH = BYTES / sizeof(Wide), V = LANES / WIDTH;
  typedef Wide Values __attribute__((vector_size(BYTES)));
  typedef Place Places __attribute__((vector_size(BYTES)));
  Values top[V];
  Places at[V];
  for (int64_t v = 0; v < V; ++v) top[v] = Values{} - std::numeric_limits<Wide>::infinity(), at[v] = Places{};
  for (int64_t first = 0; first < count; first += ROWS, rows += ROWS * D) {
    Values dots[ROWS][V] = {};
    for (int64_t d = 0; d < D; ++d) {
      Values column[V];
      for (int64_t v = 0; v < V; ++v) std::memcpy(&column[v], columns + d * LANES + v * WIDTH, BYTES);
#pragma GCC unroll 14
      for (int64_t t = 0; t < ROWS; ++t)
        for (int64_t v = 0; v < V; ++v) dots[t][v] += rows[t * D + d] * column[v];
    }
#pragma GCC unroll 14
    for (int64_t t = 0; t < ROWS; ++t) {
      for (int64_t v = 0; v < V; ++v) {
        const Values likeness = dots[t][v] * inverses[first + t];
        const Places better = likeness > top[v];
        top[v] = better ? likeness : top[v];
        at[v] = better ? Places{} + static_cast<Place>(first + t) : at[v];
      }
    }
  }
  std::memcpy(best, top, sizeof top), std::memcpy(places, at, sizeof at);
}

// For each machine with vectors of its own size: others would be kept in memory.
#define BEST_OF_COLUMNS(TARGET, BYTES, Wide, Place)                                                              \
  TARGET void best_of_columns(const Wide* rows, const Wide* inverses, int64_t count, const Wide* columns, int64_t D, \
                              Wide* best, Place* places) {                                                       \
    best_of<BYTES>(rows, inverses, count, columns, D, best, places);                                             \
  }
#define BEST_OF(TARGET, BYTES)                    \
  BEST_OF_COLUMNS(TARGET, BYTES, float, int32_t)  \
  BEST_OF_COLUMNS(TARGET, BYTES, double, int64_t)
#if defined(__x86_64__) && defined(__GNUC__)
BEST_OF(__attribute__((target("default"))), 16)
BEST_OF(__attribute__((target("arch=x86-64-v3"))), 32)
BEST_OF(__attribute__((target("arch=x86-64-v4"))), 64)
#else
BEST_OF(, 16)
#endif
#undef BEST_OF_COLUMNS
#undef BEST_OF

constexpr int64_t MOST_ROWS = 42;  // a multiple of every TILE, to which rows are filled up

template <typename F>
void in_parallel(int64_t count, int64_t products_each, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN_PRODUCTS / std::max<int64_t>(1, products_each));
  torch::stable::parallel_for(0, count, grain, f);
}

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What matching an image needs: the metrics of both sides, the odd ones as rows, the even ones as columns (blocks, D,
// LANES), as they are, or multiplied by a power of two; the inverses of their lengths; and of each even token its best
// odd one. Rows that are none are like nothing: their lengths are no numbers.
template <typename Wide>
struct Edges {
  using Place = std::conditional_t<std::is_same_v<Wide, double>, int64_t, int32_t>;
  std::vector<Wide> rows, columns, inverse_rows, inverse_columns, best;
  std::vector<Place> places;
  std::vector<KeyOf<Wide>> keys;
  std::vector<int64_t> order;

  // for `up` rows and `across` columns
  void resize(const Sides& sides, int64_t up, int64_t across) {
    inverse_rows.resize(up), inverse_columns.resize(across);
    best.resize(across), places.resize(across), keys.resize(across), order.resize(across + 1);
    std::fill(inverse_rows.begin() + sides.odds, inverse_rows.end(), std::numeric_limits<Wide>::quiet_NaN());
  }

  // token n's metric
  template <typename T>
  void put(const Sides& sides, int64_t n, const char* row, int64_t stride, int64_t D) {
    Wide* const room = room_for<Wide>(D);
    const Wide* values = widened<T>(row, stride, D, room);
    Wide squares = dot(values, values, D);
    if (const Wide power = Powers<Wide>::of(squares); power != 1) {
      scale(room, values, power, D);
      values = room, squares = dot(values, values, D);
    }
    const Wide inverse = 1 / std::max(std::sqrt(squares), Powers<Wide>::SMALLEST);
    const int64_t at = n / 2;
    if ((sides.prefix + n) % 2 != 0) {
      inverse_rows[at] = inverse;
      std::copy_n(values, D, rows.data() + at * D);
    } else {
      inverse_columns[at] = inverse;
      Wide* const column = columns.data() + at / LANES * D * LANES + at % LANES;
      for (int64_t d = 0; d < D; ++d) column[d * LANES] = values[d];
    }
  }

  void find(const Sides& sides, int64_t block, int64_t D) {
    best_of_columns(rows.data(), inverse_rows.data(), sides.odds, columns.data() + block * D * LANES, D,
                    best.data() + block * LANES, places.data() + block * LANES);
  }

  // the r best go where they are most like
  void choose(const Sides& sides, int64_t r, int64_t* index) {
    for (int64_t i = 0; i < sides.evens; ++i) {
      constexpr Wide least = -std::numeric_limits<Wide>::infinity();
      const Wide likeness = best[i] == least ? least : best[i] * inverse_columns[i];
      if (likeness == likeness) best[i] = likeness;
      else best[i] = least, places[i] = 0;  // its own length is no number
    }
    keys_of(best.data(), keys.data(), sides.evens);
    best_places(keys.data(), sides.evens, r, order.data());
    for (int64_t i = 0; i < r; ++i) index[sides.even(order[i])] = sides.evens - r + places[order[i]];
  }
};

#if TOKENOPS_TILES
void match_by_tiles(const char* tokens, int64_t stride, int64_t D, const Sides& sides, int64_t r, Edges<float>& edges,
                    int64_t* index) {
  constexpr int64_t SIDE = TileRows::SIDE;
  thread_local TileRows memory;
  TileRows& rows = memory;
  const int64_t up = up_to(sides.odds, SIDE), across = up_to(sides.evens, 2 * SIDE);
  edges.resize(sides, up, across);
  rows.resize(up, across, D);
  const int64_t width = rows.deep * TileRows::DEEP;
  in_parallel(sides.tokens, 8 * D, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const bool odd = (sides.prefix + n) % 2 != 0;
      const uint16_t* const row = reinterpret_cast<const uint16_t*>(tokens + n * stride);
      uint16_t* const to = (odd ? rows.odd : rows.even).data() + n / 2 * width;
      (odd ? edges.inverse_rows : edges.inverse_columns)[n / 2] = TileRows::put(row, D, to);
    }
  });
  in_parallel(across / (2 * SIDE), 2 * SIDE * sides.odds * D / TILES_FASTER, [&](int64_t begin, int64_t end) {
    const amx::Tiles tiles;
    for (int64_t block = begin; block < end; ++block) {
      rows.pack(2 * block), rows.pack(2 * block + 1);
      rows.find(block, sides.odds, edges.inverse_rows.data(), edges.best.data(), edges.places.data());
    }
  });
  edges.choose(sides, r, index);
}
#endif

template <typename T, typename Wide>
void match_image(const Tensor& metric, const Sides& sides, int64_t b, int64_t r, int64_t* index) {
  thread_local Edges<Wide> memory;
  Edges<Wide>& edges = memory;  // of this thread, for all that work on the image
  const int64_t D = metric.size(2);
  const Strided from = strided(metric);
  const char* const tokens = from.data + b * from.stride_b + sides.prefix * from.stride_n;
#if TOKENOPS_TILES
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (from.stride_c == 2 && usable(Isa::Amx)) return match_by_tiles(tokens, from.stride_n, D, sides, r, edges, index);
  }
#endif
  const int64_t up = up_to(sides.odds, MOST_ROWS), across = up_to(sides.evens, LANES);
  edges.resize(sides, up, across);
  edges.rows.resize(up * D), edges.columns.resize(across * D);
  in_parallel(sides.tokens, 8 * D, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) edges.template put<T>(sides, n, tokens + n * from.stride_n, from.stride_c, D);
  });
  in_parallel(across / LANES, LANES * sides.odds * D, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) edges.find(sides, block, D);
  });
  edges.choose(sides, r, index);
}

Tensor match_bipartite_fwd(Tensor metric, int64_t r, int64_t prefix) {
  const Sides sides = checked_sides(metric, r, prefix);
  const Tensor index = new_index(metric, sides);
  const Matching match{metric, sides, r, static_cast<int64_t*>(index.data_ptr())};
  for_images_and_rows(metric.size(0), 0, 0, match.bytes(), match, [](int64_t, int64_t, int64_t) {});
  return index;
}

}  // namespace

void Matching::operator()(int64_t b) const {
  int64_t *const places = index + b * sides.tokens, place = 0;
  std::fill_n(places, sides.tokens, -1);
  if (r > 0) {
    with_float(metric.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      match_image<T, std::conditional_t<std::is_same_v<T, double>, double, float>>(metric, sides, b, r, places);
    });
  }
  for (int64_t i = 0; i < sides.evens; ++i) {  // the others stay, in their order, and the odd ones come behind them
    if (places[sides.even(i)] < 0) places[sides.even(i)] = place++;
  }
  for (int64_t j = 0; j < sides.odds; ++j) places[sides.odd(j)] = place++;
}

}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("match_bipartite_fwd.native", TORCH_BOX(&tokenops::match_bipartite_fwd));
}
