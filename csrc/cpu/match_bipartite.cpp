// The matching of bipartite merging on a CPU: unit vectors once an image, then tiles of dot products, of which only the
// best of each row is kept, then the choice.
#include "../merge_bipartite.h"
#include "../unit_rows.h"
#include "vector_rows.h"

#include <limits>
#include <numeric>

namespace tokenops {
namespace {

constexpr int64_t GRAIN_PRODUCTS = 1 << 18;  // less than this is not worth a second thread

template <typename Wide>
constexpr int64_t TILE = std::is_same_v<Wide, double> ? 3 : 6;  // rows whose sums fit in the registers

// Of TILE rows, D apart, the largest dot product with a column of (blocks, D, LANES), and which column: the first of
// equals. What is no number counts as -inf.
template <int BYTES, typename Wide, typename Place>
INLINE void best_of(const Wide* rows, const Wide* columns, int64_t blocks, int64_t D, Wide* best, Place* places) {
  constexpr int64_t ROWS = TILE<Wide>, WIDTH = BYTES / sizeof(Wide), V = LANES / WIDTH;
  constexpr Wide least = -std::numeric_limits<Wide>::infinity();
  typedef Wide Values __attribute__((vector_size(BYTES)));
  typedef Place Places __attribute__((vector_size(BYTES)));
  Values top[ROWS][V];
  Places at[ROWS][V];
  for (int64_t t = 0; t < ROWS; ++t)
    for (int64_t v = 0; v < V; ++v) top[t][v] = Values{} + least, at[t][v] = Places{};
  for (int64_t block = 0; block < blocks; ++block) {
    Values dots[ROWS][V] = {};
    for (int64_t d = 0; d < D; ++d, columns += LANES) {
      Values column[V];
      for (int64_t v = 0; v < V; ++v) std::memcpy(&column[v], columns + v * WIDTH, BYTES);
#pragma GCC unroll 8
      for (int64_t t = 0; t < ROWS; ++t)
        for (int64_t v = 0; v < V; ++v) dots[t][v] += rows[t * D + d] * column[v];
    }
    for (int64_t t = 0; t < ROWS; ++t) {
      for (int64_t v = 0; v < V; ++v) {
        const Places better = dots[t][v] > top[t][v];
        top[t][v] = better ? dots[t][v] : top[t][v];
        at[t][v] = better ? Places{} + static_cast<Place>(block) : at[t][v];
      }
    }
  }
  for (int64_t t = 0; t < ROWS; ++t) {
    Wide value[LANES];
    Place place[LANES];
    std::memcpy(value, top[t], sizeof value), std::memcpy(place, at[t], sizeof place);
    best[t] = value[0], places[t] = place[0] * LANES;
    for (Place l = 1; l < LANES; ++l) {
      const Place column = place[l] * LANES + l;
      if (value[l] > best[t] || (value[l] == best[t] && column < places[t])) best[t] = value[l], places[t] = column;
    }
  }
}

// For each machine with vectors of its own size: others would be kept in memory.
#define BEST_OF_TILE(TARGET, BYTES, Wide, Place)                                                        \
  TARGET void best_of_tile(const Wide* rows, const Wide* columns, int64_t blocks, int64_t D, Wide* best, \
                           Place* places) {                                                             \
    best_of<BYTES>(rows, columns, blocks, D, best, places);                                             \
  }
#define BEST_OF_TILES(TARGET, BYTES)           \
  BEST_OF_TILE(TARGET, BYTES, float, int32_t)  \
  BEST_OF_TILE(TARGET, BYTES, double, int64_t)
#if defined(__x86_64__) && defined(__GNUC__)
BEST_OF_TILES(__attribute__((target("default"))), 16)
BEST_OF_TILES(__attribute__((target("arch=x86-64-v3"))), 32)
BEST_OF_TILES(__attribute__((target("arch=x86-64-v4"))), 64)
#else
BEST_OF_TILES(, 16)
#endif
#undef BEST_OF_TILE
#undef BEST_OF_TILES

template <typename F>
void in_parallel(int64_t count, int64_t products_each, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN_PRODUCTS / std::max<int64_t>(1, products_each));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// What matching an image needs: the unit vectors of both sides, and of each even token its best odd one.
template <typename Wide>
struct Edges {
  using Place = std::conditional_t<std::is_same_v<Wide, double>, int64_t, int32_t>;
  std::vector<Wide> rows, columns, best;
  std::vector<Place> places, order;

  void resize(const Sides& sides, int64_t D) {
    const int64_t tiled = (sides.evens + TILE<Wide> - 1) / TILE<Wide> * TILE<Wide>;
    rows.resize(tiled * D), best.resize(tiled), places.resize(tiled), order.resize(sides.evens);
    columns.resize(blocks(sides) * D * LANES);
    if (sides.odds % LANES == 0) return;
    for (int64_t d = 0; d < D; ++d) {  // columns that are none are like nothing
      Wide* const last = columns.data() + ((blocks(sides) - 1) * D + d) * LANES;
      std::fill(last + sides.odds % LANES, last + LANES, std::numeric_limits<Wide>::quiet_NaN());
    }
  }
  static int64_t blocks(const Sides& sides) { return (sides.odds + LANES - 1) / LANES; }

  // token n's metric
  template <typename T>
  void put(const Sides& sides, int64_t n, const char* row, int64_t stride, int64_t D) {
    thread_local std::vector<Wide> memory;
    memory.resize(std::max<size_t>(memory.size(), 2 * D));
    Wide* const unit = memory.data() + D;
    const Wide* values = widened<T>(row, stride, D, memory.data());
    Wide squares = dot(values, values, D);
    if (const Wide power = Powers<Wide>::of(squares); power != 1) {
      scale(unit, values, power, D);
      values = unit, squares = dot(values, values, D);
    }
    const Wide inverse = 1 / std::max(std::sqrt(squares), Powers<Wide>::SMALLEST);
    if ((sides.prefix + n) % 2 == 0) return scale(rows.data() + n / 2 * D, values, inverse, D);
    scale(unit, values, inverse, D);
    Wide* const column = columns.data() + n / 2 / LANES * D * LANES + n / 2 % LANES;
    for (int64_t d = 0; d < D; ++d) column[d * LANES] = unit[d];
  }

  void find(const Sides& sides, int64_t tile, int64_t D) {
    const int64_t first = tile * TILE<Wide>;
    best_of_tile(rows.data() + first * D, columns.data(), blocks(sides), D, best.data() + first, places.data() + first);
  }

  // the r best go where they are most like
  void choose(const Sides& sides, int64_t r, int64_t* index) {
    std::iota(order.begin(), order.end(), 0);
    if (r < sides.evens) {
      std::nth_element(order.begin(), order.begin() + r, order.end(),
                       [&](Place a, Place b) { return best[a] != best[b] ? best[a] > best[b] : a < b; });
    }
    for (int64_t i = 0; i < r; ++i) index[sides.even(order[i])] = sides.evens - r + places[order[i]];
  }
};

template <typename T, typename Wide>
void match_image(const Tensor& metric, const Sides& sides, int64_t b, int64_t r, int64_t* index) {
  thread_local Edges<Wide> memory;
  Edges<Wide>& edges = memory;  // of this thread, for all that work on the image
  const int64_t D = metric.size(2);
  const Strided from = strided(metric);
  const char* const tokens = from.data + b * from.stride_b + sides.prefix * from.stride_n;
  edges.resize(sides, D);
  in_parallel(sides.tokens, 8 * D, [&](int64_t n) {
    edges.template put<T>(sides, n, tokens + n * from.stride_n, from.stride_c, D);
  });
  in_parallel((sides.evens + TILE<Wide> - 1) / TILE<Wide>, TILE<Wide> * sides.odds * D,
              [&](int64_t tile) { edges.find(sides, tile, D); });
  edges.choose(sides, r, index);
}

Tensor match_bipartite_fwd(Tensor metric, int64_t r, int64_t prefix) {
  const Sides sides = checked_sides(metric, r, prefix);
  const Tensor index = new_index(metric, sides);
  int64_t* const out = static_cast<int64_t*>(index.data_ptr());
  const int64_t B = metric.size(0);
  with_float(metric.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const auto match = [&](int64_t b) {
      int64_t *const places = out + b * sides.tokens, place = 0;
      std::fill_n(places, sides.tokens, -1);
      if (r > 0) match_image<T, Wide>(metric, sides, b, r, places);
      for (int64_t i = 0; i < sides.evens; ++i) {  // the others stay, in their order, and the odd ones come behind them
        if (places[sides.even(i)] < 0) places[sides.even(i)] = place++;
      }
      for (int64_t j = 0; j < sides.odds; ++j) places[sides.odd(j)] = place++;
    };
    if (B >= static_cast<int64_t>(torch::stable::get_num_threads())) {
      in_parallel(B, sides.evens * (r > 0 ? sides.odds * metric.size(2) : 1), match);
    } else {
      for (int64_t b = 0; b < B; ++b) match(b);  // threads share an image
    }
  });
  return index;
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("match_bipartite_fwd.native", TORCH_BOX(&tokenops::match_bipartite_fwd));
}
