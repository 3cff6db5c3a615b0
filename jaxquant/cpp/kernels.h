// The products, for the registers of a machine: Avx512, Avx2 or Plain.
//
// A step takes some places of the planes of bytes (see jaxquant/packing/codes.py) and a block of
// columns, as many as a register has bytes. `Layout` makes registers of codes of these bytes. If one
// codebook serves the weight and few vectors are multiplied, weights are looked up in registers and
// used there: `FromCodes`, or several at once: `add_keys`. Else they are made once for all vectors, in
// the innermost cache: `unpack`, `fill_tile`, `FromTile`. `add_rows` sums over the rows, into sums of
// columns; `add_columns` over the columns, into sums of rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "problem.h"

// Loops are fast if compilers keep sums in registers, through functions that visit.
#if defined(__GNUC__)
#define JAXQUANT_INLINE inline __attribute__((always_inline))
#define JAXQUANT_LAMBDA __attribute__((always_inline))
#else
#define JAXQUANT_INLINE inline
#define JAXQUANT_LAMBDA
#endif

namespace jaxquant {
namespace {  // each file that includes this has its own, compiled for its registers

constexpr int kMostRows = 64;       // of a step: the cache holds their weights
constexpr int kMostVectors = 64;    // that are multiplied by a tile before the next is made
constexpr int kMostFromCodes = 8;   // vectors for which codes are looked up anew for each group
constexpr int kMostSums = 1 << 14;  // that a task keeps in the cache
constexpr int64_t kAhead = 16;      // blocks of columns whose bytes are fetched ahead

// Unpacking ---------------------------------------------------------------------------------------

constexpr int least_width(int bits) {
  return bits & 1 ? 1 : bits & 2 ? 2 : bits & 4 ? 4 : 8;
}

// Where the rows of bytes of a place stand: those of plane p are p * `plane` apart.
struct Bytes {
  const uint8_t* first;
  int64_t plane;
  int count;  // of columns that there are; less than a block at the right end
  const uint8_t* ahead;
};

// How codes lie in bytes: `digits` of them in a symbol of `bits` bits, whose fields of width 8, 4, 2
// and 1, from the low bits up, are each in planes of bytes of their own.
template <class M, int digits, int bits,
          int field = M::kDivides ? 8 : DigitTables::width_of(digits)>
struct Layout {
  static constexpr int kTogether = 8 / least_width(bits);  // symbols in whole bytes
  static constexpr int kBytes = bits * kTogether / 8;
  static constexpr int kPlanes = digits * kTogether;
  static constexpr int kPacks = (digits * field + 7) / 8;  // bytes that digits are split into
  // Bits of a code above which a table is not to read.
  static constexpr int kBits = digits == 1 ? bits : DigitTables::width_of(digits);
  // Codes that are looked up together, see `Keys`: digits of 3 and of 5 centroids as two keys of a
  // symbol, codes of one and two bits by halves of bytes.
  static constexpr bool kHasKeys = M::kDirect > 0 && (digits == 5 || (digits == 3 && bits == 7) ||
                                                      (digits == 1 && bits <= 2));
  using ByKeys = std::conditional_t<digits == 1, Layout<M, 1, 4>, Layout<M, 2, bits, 8>>;
  using Register = typename M::Bytes;
  using Split = std::conditional_t<digits == 1, const DigitTables&,
                                   typename M::template Split<kPacks, (bits < 8)>>;

  static JAXQUANT_INLINE void load(const Bytes& from, Register* bytes) {
#pragma GCC unroll 8
    for (int i = 0; i < kBytes; ++i) {
      const uint8_t* row = from.first + i * from.plane;
      if (from.count == M::kBlock) {
        bytes[i] = M::load_bytes(row);
        M::prefetch(from.ahead + i * from.plane);
      } else {  // never a byte beyond those that there are
        uint8_t own[M::kBlock] = {};
        std::memcpy(own, row, static_cast<size_t>(from.count));
        bytes[i] = M::load_bytes(own);
      }
    }
  }

  // Call visit(plane, above, codes) for the codes of each plane, which stand above so many bits.
  template <int number = 0, class Visit>
  static JAXQUANT_INLINE void visit(const Register* bytes, const Split& split,
                                    const Visit& visit_codes) {
    if constexpr (number < kTogether) {
      if constexpr (digits > 1) {
        visit_digits<number, 0>(symbol<number, bits, 0, 0>(bytes), split, visit_codes);
      } else if constexpr (bits == least_width(bits)) {  // a single field
        constexpr int step = kTogether * bits / 8;
        visit_codes(std::integral_constant<int, number>(),
                    std::integral_constant<int, number / step * bits>(), bytes[number % step]);
      } else {
        visit_codes(std::integral_constant<int, number>(), std::integral_constant<int, 0>(),
                    symbol<number, bits, 0, 0>(bytes));
      }
      visit<number + 1>(bytes, split, visit_codes);
    }
  }

 private:
  // With anything in the bits above those of the symbol.
  template <int number, int left, int start, int low>
  static JAXQUANT_INLINE Register symbol(const Register* bytes) {
    constexpr int width = left & 8 ? 8 : left & 4 ? 4 : left & 2 ? 2 : 1;
    constexpr int step = kTogether * width / 8;
    constexpr int above = number / step * width;
    const Register own = M::template shift<above - low>(bytes[start + number % step]);
    if constexpr (left == width) {
      return own;
    } else {
      const Register upper = symbol<number, left - width, start + step, low + width>(bytes);
      return M::select(M::fill_bytes((1 << (low + width)) - 1), own, upper);
    }
  }

  template <int number, int digit, class Visit>
  static JAXQUANT_INLINE void visit_digits(Register symbols, const Split& split,
                                           const Visit& visit_codes) {
    constexpr int together = 8 / field;
    const Register pack = split.get(symbols, digit / together);
    visit_pack<number, digit, (digit + together < digits ? digit + together : digits)>(
        pack, visit_codes);
    if constexpr (digit + together < digits) {
      visit_digits<number, digit + together>(symbols, split, visit_codes);
    }
  }

  template <int number, int digit, int end, class Visit>
  static JAXQUANT_INLINE void visit_pack(Register pack, const Visit& visit_codes) {
    if constexpr (digit < end) {
      visit_codes(std::integral_constant<int, digit * kTogether + number>(),
                  std::integral_constant<int, digit * field % 8>(), pack);
      visit_pack<number, digit + 1, end>(pack, visit_codes);
    }
  }
};

// Write the codes of some places, [places, planes, block].
template <class M, class Layout>
void unpack(Bytes from, int64_t places, const Plan& plan, uint8_t* codes) {
  const typename Layout::Split split(plan.digit_tables);
  const typename M::Bytes mask = M::fill_bytes((1 << Layout::kBits) - 1);
  for (int64_t place = 0; place < places; ++place) {
    typename M::Bytes bytes[Layout::kBytes];
    Layout::load(from, bytes);
    Layout::visit(bytes, split, [&](auto plane, auto above, typename M::Bytes own) JAXQUANT_LAMBDA {
      own = M::both(M::template shift<decltype(above)::value>(own), mask);
      M::store_bytes(codes + decltype(plane)::value * M::kBlock, own);
    });
    from.first += plan.problem.columns;
    from.ahead += plan.problem.columns;
    codes += Layout::kPlanes * M::kBlock;
  }
}

template <class M, class Function>
void with_layout(int digits, int bits, const Function& function) {
  switch (16 * digits + bits) {
    case 16 * 5 + 8: return function(Layout<M, 5, 8>());
    case 16 * 3 + 7: return function(Layout<M, 3, 7>());
    case 16 * 3 + 8: return function(Layout<M, 3, 8>());
    case 16 * 2 + 7: return function(Layout<M, 2, 7>());
    case 16 + 1: return function(Layout<M, 1, 1>());
    case 16 + 2: return function(Layout<M, 1, 2>());
    case 16 + 3: return function(Layout<M, 1, 3>());
    case 16 + 4: return function(Layout<M, 1, 4>());
    case 16 + 5: return function(Layout<M, 1, 5>());
    case 16 + 6: return function(Layout<M, 1, 6>());
    case 16 + 7: return function(Layout<M, 1, 7>());
    default: return function(Layout<M, 1, 8>());
  }
}

// Weights -----------------------------------------------------------------------------------------

// The rows of a step are numbered as they are unpacked: place by place, plane by plane.
inline int64_t row_of(const Plan& plan, int64_t place, int64_t number) {
  return number % plan.planes * plan.length + place + number / plan.planes;
}

// A row of a block, in so many registers of floats.
template <class M>
constexpr int kParts = M::kBlock / M::kLanes;

// Which column of a block has a place in sums and inputs.
template <class M>
int64_t column_of(const Plan& plan, int64_t place) {
  return plan.from_codes ? place % M::kLanes * 4 + place / M::kLanes : place;
}

// The widths of tables that a machine has, from the narrowest up.
template <class M, int width = M::kLanes, class Function>
bool with_width(int k, const Function& function) {
  if constexpr (width <= M::kWidest) {
    if (k > width) return with_width<M, 2 * width>(k, function);
    function(std::integral_constant<int, width>());
    return true;
  }
  return false;
}

// Weights by codebooks of the columns that start where `starts` says, one by one: registers that
// gather from memory take longer. Codes of a corrupt byte may be too large.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize")))
#endif
inline void look_up(const float* codebooks, int k, const int64_t* starts, int count,
                    const uint8_t* codes, float* weights) {
  for (int i = 0; i < count; ++i) {
    const int code = codes[i] < k ? codes[i] : k - 1;
    weights[i] = codebooks[starts[i] + code];
  }
}

// The scales of some columns, in float32.
template <class M>
typename M::Floats load_scales(const Plan& plan, int64_t row, int64_t column, int count) {
  const Problem& problem = plan.problem;
  const Blocks& blocks = problem.scale_blocks;
  const int64_t first = (blocks.of_row ? blocks.of_row[row] : 0) * blocks.columns;
  const auto* narrow = static_cast<const uint16_t*>(problem.scales);
  const auto* wide = static_cast<const float*>(problem.scales);
  if (blocks.width == 1) {
    const int64_t at = first + column, ahead = at + kAhead * M::kBlock;
    if (problem.scales_are_bfloat16) M::prefetch(narrow + ahead);
    else M::prefetch(wide + ahead);
    return problem.scales_are_bfloat16 ? M::load_bfloat16(narrow + at, count)
                                       : M::load_some(wide + at, count);
  }
  float values[M::kLanes] = {};
  uint16_t halves[M::kLanes] = {};
  for (int i = 0; i < count; ++i) {
    const int64_t at = first + (column + i) / blocks.width;
    if (problem.scales_are_bfloat16) halves[i] = narrow[at];
    else values[i] = wide[at];
  }
  return problem.scales_are_bfloat16 ? M::load_bfloat16(halves, count) : M::load(values);
}

// Call function(scale), which scales a register of weights and rounds them as the weight is.
template <class M, class Function>
void with_scales(const Problem& problem, typename M::Floats scales, const Function& function) {
  using Floats = typename M::Floats;
  if (!problem.scales) return function([](Floats weights) { return weights; });
  switch (problem.rounding) {
    case Rounding::kNone:
      return function([=](Floats weights) { return M::multiply(weights, scales); });
    case Rounding::kBfloat16:
      return function([=](Floats own) { return M::to_bfloat16(M::multiply(own, scales)); });
    case Rounding::kFloat16:
      return function([=](Floats own) { return M::to_float16(M::multiply(own, scales)); });
  }
}

// Make the weights of a step, [rows, block]. A plane's rows lie side by side in the weight, so runs
// of them share their codebooks and scales, which stay in registers for a run.
template <class M>
void fill_tile(const Plan& plan, int64_t place, int64_t places, int64_t column, int count,
               const uint8_t* codes, float* tile) {
  const Problem& problem = plan.problem;
  const Blocks& blocks = problem.codebook_blocks;
  const int32_t *codebook_of = blocks.of_row, *scale_of = problem.scale_blocks.of_row;
  const int64_t k = problem.k, apart = plan.planes * M::kBlock;
  const bool in_registers = blocks.columns == 1 || blocks.width % M::kLanes == 0;
  int64_t starts[M::kBlock];
  int64_t start = column / blocks.width * k, left = blocks.width - column % blocks.width;
  for (int i = 0; i < count; ++i, --left) {
    if (left == 0) start += k, left = blocks.width;
    starts[i] = start;
  }
  for (int64_t plane = 0; plane < plan.planes; ++plane) {
    const int64_t first = plane * plan.length + place;
    const int64_t end = first + places < problem.rows ? first + places : problem.rows;
    for (int64_t row = first; row < end;) {
      int64_t next = row + 1;
      while (next < end && (!codebook_of || codebook_of[next] == codebook_of[row]) &&
             (!scale_of || !problem.scales || scale_of[next] == scale_of[row])) {
        ++next;
      }
      const float* codebooks =
          problem.codebooks + (codebook_of ? codebook_of[row] : 0) * blocks.columns * k;
      for (int i = 0; i < count; i += M::kLanes) {
        const int some = count - i < M::kLanes ? count - i : M::kLanes;
        const uint8_t* from = codes + ((row - first) * plan.planes + plane) * M::kBlock + i;
        float* to = tile + (from - codes);
        typename M::Floats scales = M::zero();
        if (problem.scales) scales = load_scales<M>(plan, row, column + i, some);
        const int64_t end_of_run = (next - row) * apart;
        with_scales<M>(problem, scales, [&](const auto& scale) {
          const auto run = [&](auto width) {
            const typename M::template Table<decltype(width)::value> table(
                codebooks + starts[i], problem.k);
            for (int64_t n = 0; n < end_of_run; n += apart) {
              M::store(to + n, scale(table.get(M::side_by_side(from + n))));
            }
          };
          if (in_registers && with_width<M>(problem.k, run)) return;
          for (int64_t n = 0; n < end_of_run; n += apart) {
            look_up(codebooks, problem.k, starts + i, some, from + n, to + n);
            M::store(to + n, scale(M::load(to + n)));
          }
        });
      }
      row = next;
    }
  }
  // What fills up symbols, or a block at the right end, is no weight, whatever the codebook holds.
  const int64_t rows = places * plan.planes;
  if (count < M::kBlock) {
    for (int64_t row = 0; row < rows; ++row) {
      std::memset(tile + row * M::kBlock + count, 0,
                  sizeof(float) * static_cast<size_t>(M::kBlock - count));
    }
  }
  if (place + places + (plan.planes - 1) * plan.length <= problem.rows) return;
  for (int64_t row = 0; row < rows; ++row) {
    if (row_of(plan, place, row) < problem.rows) continue;
    std::memset(tile + row * M::kBlock, 0, sizeof(float) * M::kBlock);
  }
}

// Sums --------------------------------------------------------------------------------------------

// Call visit(row, weights) for each row of a step, with the weights of `count` parts from `first`
// on, made in registers from codes, by one codebook. A part has every fourth column, as it comes
// from codes by a shift; see `column_of`.
template <class M, class Layout>
struct FromCodes {
  static constexpr int kWidth = (1 << Layout::kBits) < M::kLanes ? M::kLanes : 1 << Layout::kBits;
  using Register = typename M::Bytes;
  using Table = typename M::template Table<kWidth>;
  const Plan& plan;
  Bytes bytes;
  int64_t places;

  template <int first, int count, class Visit>
  JAXQUANT_INLINE void visit(const Visit& visit_row) const {
    const typename Layout::Split split(plan.digit_tables);
    const Table table(plan.table);
    Bytes from = bytes;
    for (int64_t place = 0; place < places; ++place) {
      Register own[Layout::kBytes];
      Layout::load(from, own);
      Layout::visit(own, split, [&](auto plane, auto above, Register codes) JAXQUANT_LAMBDA {
        typename M::Floats weights[count];
        put<first, 0, count, decltype(above)::value>(table, codes, weights);
        visit_row(place * Layout::kPlanes + decltype(plane)::value, weights);
      });
      from.first += plan.problem.columns;
      from.ahead += plan.problem.columns;
    }
  }

 private:
  template <int part, int number, int count, int above>
  static JAXQUANT_INLINE void put(const Table& table, Register codes, typename M::Floats* weights) {
    weights[number] = table.get(M::template every_fourth<part, above>(codes));
    if constexpr (number + 1 < count) put<part + 1, number + 1, count, above>(table, codes, weights);
  }
};

// Weights that were made before, side by side.
template <class M>
struct FromTile {
  const float* tile;
  int64_t rows;

  template <int first, int count, class Visit>
  JAXQUANT_INLINE void visit(const Visit& visit_row) const {
    for (int64_t row = 0; row < rows; ++row) {
      typename M::Floats weights[count];
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        weights[i] = M::load(tile + row * M::kBlock + (first + i) * M::kLanes);
      }
      visit_row(row, weights);
    }
  }
};

// sums[v, block] += sum over rows of x[row, v] weight[row, block].
template <class M, int vectors, int first = 0, class Weights>
void add_rows(const Weights& source, const float* x, float* sums) {
  using Floats = typename M::Floats;
  constexpr int wanted = M::kSums / vectors < 1 ? 1 : M::kSums / vectors;
  constexpr int parts = wanted < kParts<M> ? wanted : kParts<M>;
  Floats sum[vectors][parts];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) {
      sum[v][i] = M::load(sums + v * M::kBlock + (first + i) * M::kLanes);
    }
  }
  source.template visit<first, parts>([&](int64_t row, const Floats* weights) JAXQUANT_LAMBDA {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const Floats input = M::fill(x[row * vectors + v]);
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) sum[v][i] = M::multiply_add(weights[i], input, sum[v][i]);
    }
  });
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) {
      M::store(sums + v * M::kBlock + (first + i) * M::kLanes, sum[v][i]);
    }
  }
  if constexpr (first + parts < kParts<M>) add_rows<M, vectors, first + parts>(source, x, sums);
}

template <class M, int part, int above, class Table>
JAXQUANT_INLINE void add_parts(const Table& table, typename M::Bytes keys,
                               typename M::Floats* sum) {
  sum[part] = M::add(sum[part], table.get(M::template every_fourth<part, above>(keys)));
  if constexpr (part + 1 < kParts<M>) add_parts<M, part + 1, above>(table, keys, sum);
}

// The tables of the keys of some places, [places, key planes, entries], from x [places, planes].
template <class M>
void fill_keys(const Plan& plan, int64_t places, const float* x, float* tables) {
  const Keys& keys = plan.keys;
  for (int64_t place = 0; place < places; ++place, x += plan.planes) {
    for (int plane = 0; plane < keys.planes; ++plane, tables += Keys::kEntries) {
      for (int i = 0; i < Keys::kEntries; i += M::kLanes) {
        typename M::Floats sum = M::zero();
        for (int row = 0; row < keys.rows[plane]; ++row) {
          const typename M::Floats input = M::fill(x[keys.plane_of[plane][row]]);
          sum = M::multiply_add(M::load(keys.values[plane][row] + i), input, sum);
        }
        M::store(tables + i, sum);
      }
    }
  }
}

// sums[block] += sum over keys of their tables' entries; parts of columns as in `FromCodes`.
template <class M, class Layout>
void add_keys(const Plan& plan, Bytes from, int64_t places, const float* tables, float* sums) {
  using Register = typename M::Bytes;
  const typename Layout::Split split(plan.keys.of_symbols);
  typename M::Floats sum[kParts<M>];
#pragma GCC unroll 4
  for (int i = 0; i < kParts<M>; ++i) sum[i] = M::load(sums + i * M::kLanes);
  for (int64_t place = 0; place < places; ++place) {
    Register bytes[Layout::kBytes];
    Layout::load(from, bytes);
    Layout::visit(bytes, split, [&](auto plane, auto above, Register keys) JAXQUANT_LAMBDA {
      // The first key of a symbol has up to 27 values; others, and halves of bytes, up to 16.
      constexpr bool is_first = Layout::kPacks == 2 && decltype(plane)::value < Layout::kTogether;
      constexpr int width = is_first ? 32 : 16;
      const typename M::template Table<width> table(
          tables + decltype(plane)::value * Keys::kEntries);
      add_parts<M, 0, decltype(above)::value>(table, keys, sum);
    });
    from.first += plan.problem.columns;
    from.ahead += plan.problem.columns;
    tables += Layout::kPlanes * Keys::kEntries;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kParts<M>; ++i) M::store(sums + i * M::kLanes, sum[i]);
}

// sums[row, v, lanes] += x[v, block] weight[row, block], lane by lane.
template <class M, int vectors, class Weights>
void add_columns(const Weights& source, const float* x, float* sums) {
  using Floats = typename M::Floats;
  constexpr int parts = kParts<M>;
  Floats input[vectors][parts];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) input[v][i] = M::load(x + v * M::kBlock + i * M::kLanes);
  }
  source.template visit<0, parts>([&](int64_t row, const Floats* weights) JAXQUANT_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* at = sums + (row * vectors + v) * M::kLanes;
      Floats sum = M::load(at);
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) sum = M::multiply_add(weights[i], input[v][i], sum);
      M::store(at, sum);
    }
  });
}

// Vectors are taken eight, four, two or one at a time (of the transposed product four at most).
// `arrange` has put what each such group reads side by side.
template <class M, bool transposed, class Weights>
void add_all(const Plan& plan, const Weights& weights, int64_t rows, int64_t vectors,
             const float* x, int64_t offset, float* sums) {
  int64_t v = 0;
  const auto take = [&](auto count) {
    constexpr int n = decltype(count)::value;
    for (; v + n <= vectors; v += n) {
      const float* own = x + v * plan.inputs_of_vector + n * offset;
      if constexpr (transposed) add_columns<M, n>(weights, own, sums + v * rows * M::kLanes);
      else add_rows<M, n>(weights, own, sums + v * M::kBlock);
    }
  };
  if constexpr (!transposed) take(std::integral_constant<int, 8>());
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}

inline int64_t group_of(bool transposed, int64_t left) {
  return left >= 8 && !transposed ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Tasks -------------------------------------------------------------------------------------------

// A step: unpack, and add what its rows and columns make of all vectors.
template <class M, bool transposed, class Layout>
void step(const Plan& plan, const Bytes& bytes, int64_t place, int64_t places, int64_t column,
          int64_t vectors, const float* x, float* sums) {
  const int64_t rows = places * Layout::kPlanes;
  const int64_t offset = transposed ? column : place * Layout::kPlanes;
  if constexpr (1 << Layout::kBits <= M::kDirect) {
    if (plan.from_codes) {
      const FromCodes<M, Layout> weights{plan, bytes, places};
      return add_all<M, transposed>(plan, weights, rows, vectors, x, offset, sums);
    }
  }
  alignas(64) uint8_t codes[kMostRows * M::kBlock];
  alignas(64) float tile[kMostRows * M::kBlock];
  unpack<M, Layout>(bytes, places, plan, codes);
  fill_tile<M>(plan, place, places, column, bytes.count, codes, tile);
  add_all<M, transposed>(plan, FromTile<M>{tile, rows}, rows, vectors, x, offset, sums);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class M, class Layout>
void task_of_columns(const Plan& plan, int64_t number) {
  const Problem& problem = plan.problem;
  const int64_t blocks = (problem.columns + M::kBlock - 1) / M::kBlock;
  const int64_t first = number % plan.chunks * plan.blocks_of_task;
  const int64_t last = smaller(blocks, first + plan.blocks_of_task);
  const int64_t part = number / plan.chunks;
  const int64_t steps = (plan.length + plan.places - 1) / plan.places;
  const int64_t start = smaller(plan.length, steps * part / plan.parts * plan.places);
  const int64_t end = smaller(plan.length, steps * (part + 1) / plan.parts * plan.places);
  float* out = plan.parts > 1 ? plan.partial + part * problem.vectors * problem.columns : problem.y;
  alignas(64) float sums[kMostSums];
  alignas(64) float tables[kMostRows * Keys::kEntries];
  for (int64_t v = 0; v < problem.vectors; v += plan.vectors) {
    const int64_t vectors = smaller(plan.vectors, problem.vectors - v);
    const float* x = plan.inputs + v * plan.inputs_of_vector;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>((last - first) * vectors * M::kBlock));
    for (int64_t place = start; place < end; place += plan.places) {
      const int64_t places = smaller(plan.places, end - place);
      if (plan.keys.planes) fill_keys<M>(plan, places, x + place * plan.planes, tables);
      for (int64_t block = first; block < last; ++block) {
        const int64_t column = block * M::kBlock;
        const uint8_t* bytes = problem.codes + place * problem.columns + column;
        int64_t ahead = block + kAhead, next = 0;
        if (ahead >= last) ahead = smaller(ahead - last + first, last - 1), next = plan.places;
        const uint8_t* fetched =
            problem.codes + (place + next) * problem.columns + ahead * M::kBlock;
        const Bytes own = {bytes, plan.length * problem.columns,
                           static_cast<int>(smaller(M::kBlock, problem.columns - column)),
                           fetched};
        float* to = sums + (block - first) * vectors * M::kBlock;
        if constexpr (Layout::kHasKeys) {
          if (plan.keys.planes) {
            add_keys<M, typename Layout::ByKeys>(plan, own, places, tables, to);
            continue;
          }
        }
        step<M, false, Layout>(plan, own, place, places, column, vectors, x, to);
      }
    }
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * M::kBlock;
      const int64_t count = smaller(M::kBlock, problem.columns - column);
      for (int64_t i = 0; i < vectors; ++i) {
        const float* own = sums + ((block - first) * vectors + i) * M::kBlock;
        float* to = out + (v + i) * problem.columns + column;
        for (int64_t place = 0; place < M::kBlock; ++place) {
          const int64_t at = column_of<M>(plan, place);
          if (at < count) to[at] = own[place];
        }
      }
    }
  }
}

template <class M, class Layout>
void task_of_rows(const Plan& plan, int64_t number) {
  const Problem& problem = plan.problem;
  const int64_t steps = (plan.length + plan.places - 1) / plan.places;
  const int64_t start = smaller(plan.length, steps * number / plan.parts * plan.places);
  const int64_t end = smaller(plan.length, steps * (number + 1) / plan.parts * plan.places);
  alignas(64) float sums[kMostSums];
  for (int64_t place = start; place < end; place += plan.places) {
    const int64_t places = smaller(plan.places, end - place);
    const int64_t rows = places * plan.planes;
    for (int64_t v = 0; v < problem.vectors; v += plan.vectors) {
      const int64_t vectors = smaller(plan.vectors, problem.vectors - v);
      const float* x = plan.inputs + v * plan.inputs_of_vector;
      std::memset(sums, 0, sizeof(float) * static_cast<size_t>(rows * vectors * M::kLanes));
      for (int64_t column = 0; column < problem.columns; column += M::kBlock) {
        const uint8_t* bytes = problem.codes + place * problem.columns + column;
        const Bytes own = {bytes, plan.length * problem.columns,
                           static_cast<int>(smaller(M::kBlock, problem.columns - column)),
                           bytes + plan.places * problem.columns};  // of the next step
        step<M, true, Layout>(plan, own, place, places, column, vectors, x, sums);
      }
      for (int64_t own = 0; own < vectors;) {
        const int64_t group = group_of(true, vectors - own);
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t output = row_of(plan, place, row);
          if (output >= problem.rows) continue;
          for (int64_t i = 0; i < group; ++i) {
            const float* at = sums + (own * rows + row * group + i) * M::kLanes;
            problem.y[(v + own + i) * problem.rows + output] = M::sum(M::load(at));
          }
        }
        own += group;
      }
    }
  }
}

template <class M>
void task(const Plan& plan, int64_t number) {
  with_layout<M>(plan.digits, plan.bits, [&](auto layout) {
    using Own = decltype(layout);
    plan.problem.transposed ? task_of_rows<M, Own>(plan, number)
                            : task_of_columns<M, Own>(plan, number);
  });
}

}  // namespace
}  // namespace jaxquant
