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

// Of LANES columns (D, LANES), each with rows `begin` to `end`, which are D long: the largest product, divided by the
// row's length, and which row: the first of equals, and the best of the rows before, if that is no less. What is no
// number is never larger.
template <int BYTES, typename Wide, typename Place>
INLINE void best_of(const Wide* rows, const Wide* inverses, int64_t begin, int64_t end, const Wide* columns, int64_t D,
                    Wide* best, Place* places) {
  constexpr int64_t ROWS = TILE<BYTES, Wide>, WIDTH = BYTES / sizeof(Wide), V = LANES / WIDTH;
  typedef Wide Values __attribute__((vector_size(BYTES)));
  typedef Place Places __attribute__((vector_size(BYTES)));
  Values top[V];
  Places at[V];
  std::memcpy(top, best, sizeof top), std::memcpy(at, places, sizeof at);
  rows += begin * D;
  for (int64_t first = begin; first < end; first += ROWS, rows += ROWS * D) {
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
#define BEST_OF_COLUMNS(TARGET, BYTES, Wide, Place)                                                        \
  TARGET void best_of_columns(const Wide* rows, const Wide* inverses, int64_t begin, int64_t end,          \
                              const Wide* columns, int64_t D, Wide* best, Place* places) {                 \
    best_of<BYTES>(rows, inverses, begin, end, columns, D, best, places);                                  \
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

constexpr int64_t MOST_ROWS = 42;             // a multiple of every TILE, to which rows are filled up
constexpr int64_t NEAR_BYTES = 1 << 18;       // rows that stay in a core's cache
constexpr int64_t AHEAD = 4;                  // rows that are fetched before they are read
constexpr int64_t GROUP = 8;                  // blocks of columns that meet them there
constexpr int64_t KEPT_BYTES = int64_t{1} << 25;  // memory that a thread keeps for the next call

// What a thread keeps for its next call, unless it was much
template <typename Value>
struct Kept {
  Value value;
  void release(int64_t bytes) {
    if (bytes > KEPT_BYTES) value = {};
  }
};

template <typename F>
void in_parallel(int64_t count, int64_t products_each, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN_PRODUCTS / std::max<int64_t>(1, products_each));
  torch::stable::parallel_for(0, count, grain, f);
}

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A token's metric where it lies, or in the thread's room, widened, and multiplied by a power of two if need be
template <typename Wide>
struct Unit {
  const Wide* values;
  Wide inverse;  // of its length
};
template <typename T, typename Wide>
Unit<Wide> unit_of(const char* row, int64_t stride, int64_t D) {
  Wide* const room = room_for<Wide>(D);
  const Wide* values = widened<T>(row, stride, D, room);
  Wide squares = dot(values, values, D);
  if (const Wide power = Powers<Wide>::of(squares); power != 1) {
    scale(room, values, power, D);
    values = room, squares = dot(values, values, D);
  }
  return {values, 1 / std::max(std::sqrt(squares), Powers<Wide>::SMALLEST)};
}

// The tokens of an image, or a sequence, behind its prefix
struct Tokens {
  const char* data;
  int64_t stride_n, stride_c, D;
  const char* at(int64_t n) const { return data + n * stride_n; }
  // what is read soon, every other row, which a processor does not foresee
  void fetch(int64_t n, int64_t bytes) const {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at(n) + b);
  }
};

// What matching an image needs: the metrics of the odd tokens as rows, of both sides the inverses of their lengths, and
// of each even token its best odd one. Rows that are none are like nothing: their lengths are no numbers. Those of the
// even tokens are columns (blocks, D, LANES) for as long as they are compared.
template <typename Wide>
struct Edges {
  using Place = std::conditional_t<std::is_same_v<Wide, double>, int64_t, int32_t>;
  std::vector<Wide> rows, inverse_rows, inverse_columns, best;
  std::vector<Place> places;
  std::vector<KeyOf<Wide>> keys;
  std::vector<int64_t> order;

  // for `up` rows and `across` columns
  void resize(const Sides& sides, int64_t up, int64_t across) {
    inverse_rows.resize(up), inverse_columns.resize(across);
    best.resize(across), places.resize(across);
    std::fill(inverse_rows.begin() + sides.odds, inverse_rows.end(), std::numeric_limits<Wide>::quiet_NaN());
  }

  template <typename T>
  void put_odd(const Sides& sides, int64_t j, const Tokens& from) {
    from.fetch(sides.odd(std::min(j + AHEAD, sides.odds - 1)), from.D * sizeof(T));
    const Unit<Wide> unit = unit_of<T, Wide>(from.at(sides.odd(j)), from.stride_c, from.D);
    inverse_rows[j] = unit.inverse;
    std::copy_n(unit.values, from.D, rows.data() + j * from.D);
  }

  // of the even tokens of blocks `begin` to `end`
  template <typename T>
  void find(const Sides& sides, int64_t begin, int64_t end, const Tokens& from) {
    thread_local std::vector<Wide> memory;
    std::vector<Wide>& columns = memory;
    const int64_t D = from.D;
    columns.resize((end - begin) * LANES * D);
    for (int64_t i = begin * LANES; i < std::min(end * LANES, sides.evens); ++i) {
      from.fetch(sides.even(std::min(i + AHEAD, sides.evens - 1)), D * sizeof(T));
      const Unit<Wide> unit = unit_of<T, Wide>(from.at(sides.even(i)), from.stride_c, D);
      inverse_columns[i] = unit.inverse;
      Wide* const column = columns.data() + (i / LANES - begin) * D * LANES + i % LANES;
      for (int64_t d = 0; d < D; ++d) column[d * LANES] = unit.values[d];
    }
    std::fill(best.begin() + begin * LANES, best.begin() + end * LANES, -std::numeric_limits<Wide>::infinity());
    std::fill(places.begin() + begin * LANES, places.begin() + end * LANES, Place{0});
    for (int64_t first = 0, last; first < sides.odds; first = last) {
      last = std::min(sides.odds, first + near_rows(D));
      for (int64_t block = begin; block < end; ++block) {
        best_of_columns(rows.data(), inverse_rows.data(), first, last, columns.data() + (block - begin) * D * LANES, D,
                        best.data() + block * LANES, places.data() + block * LANES);
      }
    }
  }

  static int64_t near_rows(int64_t D) {
    return std::max<int64_t>(1, NEAR_BYTES / (MOST_ROWS * std::max<int64_t>(1, D) * sizeof(Wide))) * MOST_ROWS;
  }

  // by their own lengths; what is no number is the least
  void settle(const Sides& sides) {
    for (int64_t i = 0; i < sides.evens; ++i) {
      constexpr Wide least = -std::numeric_limits<Wide>::infinity();
      const Wide likeness = best[i] == least ? least : best[i] * inverse_columns[i];
      if (likeness == likeness) best[i] = likeness;
      else best[i] = least, places[i] = 0;  // its own length is no number
    }
  }

  // the r best go where they are most like
  void choose(const Sides& sides, int64_t r, int64_t* index) {
    keys.resize(sides.evens), order.resize(sides.evens + 1);
    keys_of(best.data(), keys.data(), sides.evens);
    best_places(keys.data(), sides.evens, r, order.data());
    for (int64_t i = 0; i < r; ++i) index[sides.even(order[i])] = sides.evens - r + places[order[i]];
  }
};

#if TOKENOPS_TILES
void find_by_tiles(const Tokens& from, const Sides& sides, Edges<float>& edges) {
  constexpr int64_t SIDE = TileRows::SIDE;
  thread_local Kept<TileRows> memory;
  TileRows& rows = memory.value;
  const int64_t D = from.D, up = up_to(sides.odds, SIDE), across = up_to(sides.evens, 2 * SIDE);
  edges.resize(sides, up, across);
  rows.resize(up, across, D);
  const int64_t width = rows.deep * TileRows::DEEP;
  in_parallel(sides.tokens, 8 * D, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const bool odd = (sides.prefix + n) % 2 != 0;
      uint16_t* const to = (odd ? rows.odd : rows.even).data() + n / 2 * width;
      const uint16_t* const row = reinterpret_cast<const uint16_t*>(from.at(n));
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
  memory.release(3 * sides.tokens * width);
}
#endif

// Of each even token the best odd one, into `edges`; there are some of both. No more memory than the tokens take.
template <typename T, typename Wide>
void find_best(const Tokens& from, const Sides& sides, Edges<Wide>& edges) {
#if TOKENOPS_TILES
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (from.stride_c == 2 && usable(Isa::Amx)) {
      find_by_tiles(from, sides, edges);
      return edges.settle(sides);
    }
  }
#endif
  const int64_t D = from.D, up = up_to(sides.odds, MOST_ROWS), across = up_to(sides.evens, LANES);
  edges.resize(sides, up, across);
  edges.rows.resize(up * D);
  in_parallel(sides.odds, 8 * D, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) edges.template put_odd<T>(sides, j, from);
  });
  // where rows are read again and again from memory, for several blocks at once
  const int64_t blocks = across / LANES, group = sides.odds > Edges<Wide>::near_rows(D) ? GROUP : 1;
  in_parallel((blocks + group - 1) / group, group * LANES * sides.odds * D, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      edges.template find<T>(sides, g * group, std::min(blocks, (g + 1) * group), from);
    }
  });
  edges.settle(sides);
}

template <typename Wide>
Kept<Edges<Wide>>& edges_of_this_thread() {
  thread_local Kept<Edges<Wide>> memory;
  return memory;
}

template <typename T, typename Wide>
void match_image(const Tensor& metric, const Sides& sides, int64_t b, int64_t r, int64_t* index) {
  Kept<Edges<Wide>>& memory = edges_of_this_thread<Wide>();
  Edges<Wide>& edges = memory.value;  // of this thread, for all that work on the image
  const Strided from = strided(metric);
  const char* const tokens = from.data + b * from.stride_b + sides.prefix * from.stride_n;
  find_best<T>({tokens, from.stride_n, from.stride_c, metric.size(2)}, sides, edges);
  edges.choose(sides, r, index);
  memory.release(sides.tokens * metric.size(2) * sizeof(Wide));
}

Tensor match_bipartite_fwd(Tensor metric, int64_t r, int64_t prefix) {
  const Sides sides = checked_sides(metric, r, prefix);
  const Tensor index = new_index(metric, sides);
  const Matching match{metric, sides, r, static_cast<int64_t*>(index.data_ptr())};
  for_images_and_rows(metric.size(0), 0, 0, match.bytes(), match, [](int64_t, int64_t, int64_t) {});
  return index;
}

// Sequence s of packed ones: its first row, and its two sides
struct Sequence {
  int64_t begin;
  Sides sides;
  int64_t end() const { return begin + sides.prefix + sides.tokens; }
  double products() const { return static_cast<double>(sides.evens) * static_cast<double>(sides.odds); }
};

std::vector<Sequence> sequences_of(const Tensor& cu_seqlens, int64_t rows, int64_t prefix) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.size(0) > 0 &&
                      !cu_seqlens.is_cuda(),
                  "cu_seqlens must be int32 (S+1,)");
  const int32_t* const ends = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t stride = cu_seqlens.stride(0);
  STD_TORCH_CHECK(ends[0] == 0, "cu_seqlens must begin with 0");
  std::vector<Sequence> found;
  for (int64_t s = 1; s < cu_seqlens.size(0); ++s) {
    const int64_t begin = ends[(s - 1) * stride], end = ends[s * stride];
    STD_TORCH_CHECK(begin <= end && end <= rows, "cu_seqlens must ascend to at most the number of rows");
    found.push_back({begin, Sides(std::min(prefix, end - begin), end - begin)});
  }
  return found;
}

// f(sequence) for all: long ones one by one, by all threads, the others by shares of about as many products
template <typename F>
void for_sequences(const std::vector<Sequence>& all, int64_t D, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  double whole = 0, before = 0;
  for (const Sequence& sequence : all) whole += sequence.products();
  std::vector<const Sequence*> others;
  for (const Sequence& sequence : all) {
    if (threads > 1 && sequence.products() * 4 * threads > whole) f(sequence);
    else others.push_back(&sequence), before += sequence.products();
  }
  const int64_t shares = before * D < GRAIN_PRODUCTS ? 1 : threads;
  std::vector<size_t> ends(shares, others.size());  // of each share
  double done = 0;
  for (size_t i = 0, share = 0; i < others.size(); ++i) {
    while (share + 1 < static_cast<size_t>(shares) && done * shares >= before * (share + 1)) ends[share++] = i;
    done += others[i]->products();
  }
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (size_t i = begin == 0 ? 0 : ends[begin - 1]; i < ends[end - 1]; ++i) f(*others[i]);
  });
}

// Of every row of packed sequences that looks for its like: the likeness, and the row that it is of; else -inf and -1.
std::tuple<Tensor, Tensor> match_packed_fwd(Tensor metric, Tensor cu_seqlens, int64_t, int64_t prefix) {
  STD_TORCH_CHECK(metric.dim() == 2, "metric must have 2 dimensions");
  check_float("metric", metric);
  STD_TORCH_CHECK(prefix >= 0, "prefix must be at least 0");
  const int64_t rows = metric.size(0), D = metric.size(1), size = static_cast<int64_t>(metric.element_size());
  const int64_t stride_n = metric.stride(0) * size, stride_c = metric.stride(1) * size;
  const std::vector<Sequence> sequences = sequences_of(cu_seqlens, rows, prefix);
  const Tensor best = new_tensor(metric, {rows}, wide_type(metric));
  const Tensor target = new_tensor(metric, {rows}, ScalarType::Long);
  int64_t* const targets = static_cast<int64_t*>(target.data_ptr());
  std::fill_n(targets, rows, -1);
  with_float(metric.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    Wide* const likeness = static_cast<Wide*>(best.data_ptr());
    std::fill_n(likeness, rows, -std::numeric_limits<Wide>::infinity());
    const char* const data = static_cast<const char*>(metric.data_ptr());
    for_sequences(sequences, D, [&](const Sequence& sequence) {
      const Sides& sides = sequence.sides;
      if (sides.most() == 0) return;
      const int64_t first = sequence.begin + sides.prefix;
      Kept<Edges<Wide>>& memory = edges_of_this_thread<Wide>();
      Edges<Wide>& edges = memory.value;
      find_best<T>({data + first * stride_n, stride_n, stride_c, D}, sides, edges);
      for (int64_t i = 0; i < sides.evens; ++i) {
        likeness[first + sides.even(i)] = edges.best[i];
        targets[first + sides.even(i)] = first + sides.odd(edges.places[i]);
      }
      memory.release(sides.tokens * D * sizeof(Wide));
    });
  });
  return {best, target};
}

// Where every row of packed sequences goes, of each of which so many are merged: -1 for slack.
template <typename Wide>
void place(const Sequence& sequence, const Wide* best, const int64_t* target, int64_t r, int64_t begin,
           int64_t* index) {
  thread_local std::vector<Wide> likeness;
  thread_local std::vector<KeyOf<Wide>> keys;
  thread_local std::vector<int64_t> order;
  const Sides& sides = sequence.sides;
  const int64_t first = sequence.begin + sides.prefix, left = sides.evens - r;
  likeness.resize(sides.evens), keys.resize(sides.evens), order.resize(sides.evens + 1);
  for (int64_t i = 0; i < sides.evens; ++i) likeness[i] = best[first + sides.even(i)];
  keys_of(likeness.data(), keys.data(), sides.evens);
  best_places(keys.data(), sides.evens, r, order.data());
  for (int64_t n = 0; n < sides.prefix; ++n) index[sequence.begin + n] = begin + n;
  begin += sides.prefix;
  for (int64_t i = 0, merged = 0; i < sides.evens; ++i) {
    const int64_t row = first + sides.even(i);
    const bool goes = merged < r && order[merged] == i;
    index[row] = begin + (goes ? left + (target[row] - first) / 2 : i - merged);
    merged += goes;
  }
  for (int64_t j = 0; j < sides.odds; ++j) index[first + sides.odd(j)] = begin + left + j;
}

Tensor match_packed_places(Tensor best, Tensor target, Tensor counts, Tensor cu_seqlens, int64_t prefix) {
  STD_TORCH_CHECK(best.dim() == 1 && target.dim() == 1 && target.size(0) == best.size(0),
                  "best and target must be (T,)");
  STD_TORCH_CHECK(best.scalar_type() == ScalarType::Float || best.scalar_type() == ScalarType::Double,
                  "best must be in an accumulation dtype");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && counts.scalar_type() == ScalarType::Long,
                  "target and counts must be int64");
  STD_TORCH_CHECK(prefix >= 0, "prefix must be at least 0");
  STD_TORCH_CHECK(!best.is_cuda() && !target.is_cuda() && !counts.is_cuda(), "all must be on a CPU");
  const std::vector<Sequence> sequences = sequences_of(cu_seqlens, best.size(0), prefix);
  const int64_t S = static_cast<int64_t>(sequences.size());
  STD_TORCH_CHECK(counts.dim() == 1 && counts.size(0) == S, "counts must be (S,)");
  const Tensor scores = dense(best), targets = dense(target), each = dense(counts);
  const int64_t* const goals = static_cast<int64_t*>(targets.data_ptr());
  const int64_t* const r = static_cast<int64_t*>(each.data_ptr());
  const Tensor index = new_tensor(target, {best.size(0)});
  int64_t* const places = static_cast<int64_t*>(index.data_ptr());
  std::vector<int64_t> begins(S + 1);
  for (int64_t s = 0; s < S; ++s) {
    const Sides& sides = sequences[s].sides;
    STD_TORCH_CHECK(r[s] >= 0 && r[s] <= sides.most(), "counts must be between 0 and the number of even rows");
    begins[s + 1] = begins[s] + sequences[s].end() - sequences[s].begin - r[s];
  }
  const int64_t end = S > 0 ? sequences.back().end() : 0;
  std::fill_n(places + end, best.size(0) - end, -1);
  const auto placed = [&](auto* type) {
    using Wide = std::remove_pointer_t<decltype(type)>;
    const Wide* const likeness = static_cast<const Wide*>(scores.data_ptr());
    for_sequences(sequences, 1, [&](const Sequence& sequence) {
      const int64_t s = &sequence - sequences.data();
      place(sequence, likeness, goals, r[s], begins[s], places);
    });
  };
  if (best.scalar_type() == ScalarType::Double) placed(static_cast<double*>(nullptr));
  else placed(static_cast<float*>(nullptr));
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
  m.impl("match_packed_fwd.native", TORCH_BOX(&tokenops::match_packed_fwd));
  m.impl("match_packed_places.native", TORCH_BOX(&tokenops::match_packed_places));
}
