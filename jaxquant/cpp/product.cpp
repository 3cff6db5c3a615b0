#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

namespace jaxquant {
namespace {

constexpr int64_t kWork = 1 << 18;      // weights, for eight vectors at most, that are worth a task
constexpr int64_t kMuch = 1 << 21;      // as large as tasks grow before there are more than `kTasks`
constexpr int64_t kTasks = 8, kMostTasks = 64;
constexpr int kMostStreams = 16;        // rows of bytes that are read at a time, as the memory likes
constexpr int64_t kWide = 1 << 13;      // sums of a task, in columns times vectors
// Floats between vectors: inputs that are a power of two apart would share places of the cache.
constexpr int64_t kApart = 80;

// Digits and bits of a symbol: the fewest bits a code, see `symbol` in jaxquant/packing/codes.py.
std::pair<int, int> symbol_of(int k) {
  std::pair<int, int> best = {1, 8};
  for (int digits = 1; digits <= 5; ++digits) {
    int64_t symbols = 1;
    for (int i = 0; i < digits; ++i) symbols *= k;
    int bits = 0;
    while ((int64_t{1} << bits) < symbols) ++bits;
    if (bits <= 8 && bits * best.first < best.second * digits) best = {digits, bits};
  }
  return best;
}

DigitTables tables_of_digits(int digits, int k) {
  DigitTables tables = {};
  tables.base = k;
  const int width = DigitTables::width_of(digits), together = 8 / width;
  for (int number = 0; number < 256; ++number) {
    int rest = number;
    for (int digit = 0; digit < digits; ++digit, rest /= k) {
      tables.packs[digit / together][number] |=
          static_cast<uint8_t>(rest % k << digit % together * width);
    }
  }
  return tables;
}

// Keys of 2 to 5 centroids: of a symbol of five digits three and two, of three digits two and one;
// of codes of one or two bits those in half a byte.
Keys keys_of(const Plan& plan) {
  Keys keys = {};
  const int k = plan.problem.k, together = 8 / least_width(plan.bits);
  const bool in_fields = plan.digits == 1;
  const int base = in_fields ? 1 << plan.bits : k;
  const int first = in_fields ? 4 / plan.bits : (plan.digits + 1) / 2;  // rows of the first key
  keys.planes = in_fields ? 2 : 2 * together;
  for (int plane = 0; plane < keys.planes; ++plane) {
    const int key = in_fields ? plane : plane / together;
    const int rows = in_fields || key == 0 ? first : plan.digits - first;
    keys.rows[plane] = rows;
    int power = 1;
    for (int row = 0; row < rows; ++row, power *= base) {
      const int number = key * first + row;
      keys.plane_of[plane][row] = in_fields ? number : number * together + plane % together;
      for (int entry = 0; entry < Keys::kEntries; ++entry) {
        keys.values[plane][row][entry] = plan.problem.codebooks[entry / power % base];
      }
    }
  }
  int count = 1;
  for (int row = 0; row < first; ++row) count *= base;
  keys.of_symbols.base = count;
  for (int number = 0; number < 256; ++number) {
    keys.of_symbols.packs[0][number] = static_cast<uint8_t>(number % count);
    keys.of_symbols.packs[1][number] = static_cast<uint8_t>(number / count % Keys::kEntries);
  }
  return keys;
}

Plan plan_of(const Problem& problem, const Kernels& kernels) {
  Plan plan = {};
  plan.problem = problem;
  std::tie(plan.digits, plan.bits) = symbol_of(problem.k);
  const int together = 8 / least_width(plan.bits);
  plan.planes = plan.digits * together;
  plan.length = (problem.rows + plan.planes - 1) / plan.planes;
  const int streams = plan.bits * together / 8;  // rows of bytes of a place
  plan.places = std::clamp<int64_t>(kMostStreams / streams, 1, kMostRows / plan.planes);
  plan.places = std::min(plan.places, plan.length);
  plan.from_codes = problem.scales == nullptr && problem.codebook_blocks.of_row == nullptr &&
                    problem.codebook_blocks.columns == 1 &&
                    problem.k <= kernels.direct && problem.vectors <= kMostFromCodes &&
                    std::all_of(problem.codebooks, problem.codebooks + problem.k,
                                [](float value) { return std::isfinite(value); });
  if (plan.from_codes && problem.vectors == 1 && !problem.transposed && problem.k <= 5) {
    plan.keys = keys_of(plan);
  }
  const int64_t blocks = (problem.columns + kernels.block - 1) / kernels.block;
  const int64_t steps = (plan.length + plan.places - 1) / plan.places;
  const int64_t work = problem.rows * problem.columns * ((problem.vectors + 7) / 8);
  const int64_t wanted = std::clamp<int64_t>(
      work / kWork, 1, std::clamp<int64_t>(work / kMuch, kTasks, kMostTasks));
  if (problem.transposed) {
    plan.chunks = 1;
    plan.vectors = kMostSums / (kMostRows * kernels.block / 4);
    plan.parts = std::min(wanted, steps);
    plan.inputs_of_vector = blocks * kernels.block + kApart;
  } else {
    plan.vectors = kMostVectors;
    const int64_t vectors = std::min<int64_t>(problem.vectors, kMostVectors);
    const int64_t most = std::max<int64_t>(1, kMostSums / (vectors * kernels.block));
    // Long rows are read faster; but each part of the rows has sums of its own.
    const int64_t fewest = (blocks + most - 1) / most;
    const int64_t of_columns =
        std::clamp<int64_t>((problem.columns * vectors + kWide - 1) / kWide, 1, wanted);
    plan.chunks = std::max(fewest, std::min(of_columns, blocks));
    plan.blocks_of_task = (blocks + plan.chunks - 1) / plan.chunks;
    plan.chunks = (blocks + plan.blocks_of_task - 1) / plan.blocks_of_task;
    plan.parts = std::clamp<int64_t>(wanted / plan.chunks, 1, steps);
    plan.inputs_of_vector = plan.length * plan.planes + kApart;
  }
  plan.tasks = plan.chunks * plan.parts;
  return plan;
}

// Memory for the inputs and sums of a product. What is not large a thread keeps for its next one:
// fresh pages cost as much as a product.
class Floats {
 public:
  explicit Floats(int64_t count) {
    static thread_local std::vector<float> kept;
    std::vector<float>& own = count > kMostKept ? own_ : kept;
    if (static_cast<int64_t>(own.size()) < count) own.resize(static_cast<size_t>(count));
    data = own.data();
  }
  float* data;

 private:
  static constexpr int64_t kMostKept = 1 << 18;
  std::vector<float> own_;
};

// Scales of columns that are not rounded with the centroids are those of the inputs or outputs.
bool scales_columns(const Problem& problem) {
  return problem.scales != nullptr && problem.scale_blocks.of_row == nullptr &&
         problem.rounding == Rounding::kNone;
}

std::vector<float> column_scales(const Problem& problem) {
  std::vector<float> scales(static_cast<size_t>(problem.columns));
  for (int64_t column = 0; column < problem.columns; ++column) {
    const int64_t block = column / problem.scale_blocks.width;
    float& scale = scales[static_cast<size_t>(column)];
    if (problem.scales_are_bfloat16) {
      const uint32_t bits = uint32_t{static_cast<const uint16_t*>(problem.scales)[block]} << 16;
      std::memcpy(&scale, &bits, sizeof bits);
    } else {
      scale = static_cast<const float*>(problem.scales)[block];
    }
  }
  return scales;
}

// Copy x as `add_all` reads it: what a group of vectors needs for a row, or for a block of columns,
// side by side; zeros where there is no row or column.
void arrange(const Plan& plan, int64_t block, const float* scales) {
  const Problem& problem = plan.problem;
  const int64_t inputs = problem.transposed ? problem.columns : problem.rows;
  for (int64_t v = 0; v < problem.vectors;) {
    const int64_t together = std::min(plan.vectors - v % plan.vectors, problem.vectors - v);
    const int64_t group = group_of(problem.transposed, together);
    float* to = plan.inputs + v * plan.inputs_of_vector;
    std::fill(to, to + group * plan.inputs_of_vector, 0.0f);
    for (int64_t i = 0; i < group; ++i) {
      const float* from = problem.x + (v + i) * inputs;
      if (problem.transposed) {
        for (int64_t column = 0; column < inputs; ++column) {
          const int64_t own = column % block;
          const int64_t at = plan.from_codes ? own % 4 * (block / 4) + own / 4 : own;
          to[(column / block * group + i) * block + at] =
              scales ? from[column] * scales[column] : from[column];
        }
      } else {
        for (int64_t plane = 0; plane < plan.planes; ++plane) {
          const int64_t first = plane * plan.length;
          const int64_t count = std::min(plan.length, inputs - first);
          for (int64_t place = 0; place < count; ++place) {
            to[(place * plan.planes + plane) * group + i] = from[first + place];
          }
        }
      }
    }
    v += group;
  }
}

}  // namespace

const Kernels* kernels_of(const char* name) {
  const Kernels* all[] = {nullptr, nullptr, plain_kernels()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi")) {
    all[0] = avx512_kernels();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    all[1] = avx2_kernels();
  }
#endif
  for (const Kernels* kernels : all) {
    if (kernels && (!*name || !std::strcmp(name, kernels->name))) return kernels;
  }
  return nullptr;
}

int64_t packed_rows(int64_t rows, int k) {
  const auto [digits, bits] = symbol_of(k);
  const int together = 8 / least_width(bits);
  return (rows + digits * together - 1) / (digits * together) * together * bits / 8;
}

void multiply(const Problem& problem, const Kernels& kernels, const Pool& pool) {
  Problem own = problem;
  std::vector<float> scales;
  if (scales_columns(problem)) {
    scales = column_scales(problem);
    own.scales = nullptr;
  }
  Plan plan = plan_of(own, kernels);
  if (plan.digits > 1 && plan.keys.planes == 0) plan.digit_tables = tables_of_digits(plan.digits, own.k);
  // What stands above a code is another: it shall not matter.
  const int bits = plan.digits > 1 ? DigitTables::width_of(plan.digits) : plan.bits;
  for (int i = 0; plan.from_codes && i < 256; ++i) {
    const int code = i % (1 << bits);
    plan.table[i] = code < own.k ? own.codebooks[code] : 0.0f;
  }
  const int64_t inputs = own.vectors * plan.inputs_of_vector;
  const int64_t sums = plan.parts > 1 && !own.transposed ? plan.parts * own.vectors * own.columns : 0;
  const Floats memory(inputs + sums);
  plan.inputs = memory.data;
  plan.partial = sums ? memory.data + inputs : nullptr;
  arrange(plan, kernels.block, own.transposed && !scales.empty() ? scales.data() : nullptr);
  run_tasks(plan.tasks, pool, [&](int64_t number) { kernels.task(plan, number); });
  if (own.transposed) return;
  for (int64_t v = 0; v < own.vectors; ++v) {
    float* y = own.y + v * own.columns;
    for (int64_t part = 0; plan.partial && part < plan.parts; ++part) {
      const float* from = plan.partial + (part * own.vectors + v) * own.columns;
      for (int64_t i = 0; i < own.columns; ++i) y[i] = part ? y[i] + from[i] : from[i];
    }
    for (int64_t i = 0; !scales.empty() && i < own.columns; ++i) y[i] *= scales[static_cast<size_t>(i)];
  }
}

}  // namespace jaxquant
