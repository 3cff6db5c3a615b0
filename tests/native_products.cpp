// The native products against sums by the definition, under sanitizers (see .ci/run) and on arrays
// that end, or start, where no memory is: a byte read or written outside of one ends the program.
//
//   native_products [level]    prints "ok" and how many products agreed
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../jaxquant/cpp/product.h"
#include "native_guarded.h"

using namespace jaxquant;

namespace {

std::mt19937 generator(0);

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator); }
int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(generator); }

// As `pack_codes` of jaxquant/packing/codes.py.
void pack(const std::vector<int>& codes, int64_t rows, int64_t columns, int k, uint8_t* packed) {
  int digits = 1, bits = 8;
  for (int d = 1; d <= 5; ++d) {
    const int own = static_cast<int>(std::ceil(std::log2(static_cast<double>(k)) * d - 1e-9));
    if (own <= 8 && own * digits < bits * d) digits = d, bits = own;
  }
  int least = 1;
  while (!(bits & least)) least *= 2;
  const int64_t together = 8 / least;
  const int64_t symbols = (rows + digits * together - 1) / (digits * together) * together;
  const int64_t length = symbols / together;
  std::memset(packed, 0, static_cast<size_t>(symbols * bits / 8 * columns));
  for (int64_t s = 0; s < symbols; ++s) {
    for (int64_t column = 0; column < columns; ++column) {
      int symbol = 0;
      for (int digit = digits - 1; digit >= 0; --digit) {
        const int64_t row = digit * symbols + s;
        symbol = symbol * k + (row < rows ? codes[static_cast<size_t>(row * columns + column)] : 0);
      }
      int64_t start = 0;
      for (int width = 8, low = 0; width > 0; width /= 2) {
        if (!(bits & width)) continue;
        const int64_t step = together * width / 8, plane = s / length;
        const int field = symbol >> low & ((1 << width) - 1);
        packed[((start + plane % step) * length + s % length) * columns + column] |=
            static_cast<uint8_t>(field << plane / step * width);
        start += step, low += width;
      }
    }
  }
}

struct Case {
  int64_t vectors, rows, columns;
  int k;
  int64_t codebook_rows, codebook_columns;  // blocks along both
  int64_t scale_rows, scale_columns;        // 0: no scales
  bool transposed, corrupt;
};

std::vector<int32_t> of_rows(int64_t rows, int64_t blocks) {
  std::vector<int32_t> numbers;
  for (int64_t row = 0; row < rows; ++row) {
    numbers.push_back(static_cast<int32_t>(row / (rows / blocks)));
  }
  return numbers;
}

void check(const Case& own, const Kernels& kernels, bool at_end) {
  const int64_t inputs = own.transposed ? own.columns : own.rows;
  const int64_t outputs = own.transposed ? own.rows : own.columns;
  std::vector<int> codes(static_cast<size_t>(own.rows * own.columns));
  for (int& code : codes) code = below(own.k);
  const size_t bytes = static_cast<size_t>(packed_rows(own.rows, own.k) * own.columns);
  Guarded<uint8_t> packed(bytes, at_end);
  pack(codes, own.rows, own.columns, own.k, packed.data);
  // Whatever the bytes hold, nothing outside of the arrays is read.
  for (size_t i = 0; own.corrupt && i < bytes; ++i) packed.data[i] = static_cast<uint8_t>(below(256));
  Guarded<float> x(static_cast<size_t>(own.vectors * inputs), at_end);
  for (int64_t i = 0; i < own.vectors * inputs; ++i) x.data[i] = uniform();
  const int64_t tables = own.codebook_rows * own.codebook_columns;
  Guarded<float> codebooks(static_cast<size_t>(tables * own.k), at_end);
  for (int64_t i = 0; i < tables * own.k; ++i) codebooks.data[i] = uniform();
  const int64_t number_of_scales = own.scale_rows * own.scale_columns;
  Guarded<float> scales(static_cast<size_t>(number_of_scales) + 1, at_end);
  float* first_scale = scales.data + 1;
  for (int64_t i = 0; i < number_of_scales; ++i) first_scale[i] = uniform();
  Guarded<float> y(static_cast<size_t>(own.vectors * outputs), at_end);

  Problem problem = {};
  problem.x = x.data, problem.codes = packed.data, problem.codebooks = codebooks.data;
  problem.scales = number_of_scales ? first_scale : nullptr;
  problem.y = y.data;
  problem.vectors = own.vectors, problem.rows = own.rows, problem.columns = own.columns;
  problem.k = own.k, problem.transposed = own.transposed;
  const std::vector<int32_t> codebook_of = of_rows(own.rows, own.codebook_rows);
  const std::vector<int32_t> scale_of =
      of_rows(own.rows, own.scale_rows ? own.scale_rows : 1);
  problem.codebook_blocks = {own.codebook_rows > 1 ? codebook_of.data() : nullptr,
                             own.codebook_columns, own.columns / own.codebook_columns};
  if (number_of_scales) {
    problem.scale_blocks = {own.scale_rows > 1 ? scale_of.data() : nullptr, own.scale_columns,
                            own.columns / own.scale_columns};
  }
  multiply(problem, kernels, {});
  if (own.corrupt) return;

  std::vector<double> expected(static_cast<size_t>(own.vectors * outputs));
  for (int64_t row = 0; row < own.rows; ++row) {
    for (int64_t column = 0; column < own.columns; ++column) {
      const int64_t block = codebook_of[static_cast<size_t>(row)] * own.codebook_columns +
                            column / (own.columns / own.codebook_columns);
      const int code = codes[static_cast<size_t>(row * own.columns + column)];
      double weight = codebooks.data[block * own.k + code];
      if (number_of_scales) {
        weight *= first_scale[scale_of[static_cast<size_t>(row)] * own.scale_columns +
                              column / (own.columns / own.scale_columns)];
      }
      for (int64_t v = 0; v < own.vectors; ++v) {
        const int64_t from = own.transposed ? column : row, to = own.transposed ? row : column;
        expected[static_cast<size_t>(v * outputs + to)] += weight * x.data[v * inputs + from];
      }
    }
  }
  std::vector<float> first(y.data, y.data + own.vectors * outputs);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::fabs(first[i] - expected[i]) > 1e-5 * std::sqrt(static_cast<double>(inputs))) {
      std::printf("k %d, %ld x %ld, %ld vectors, transposed %d: %g for %g at %zu\n", own.k,
                  static_cast<long>(own.rows), static_cast<long>(own.columns),
                  static_cast<long>(own.vectors), own.transposed, static_cast<double>(first[i]),
                  expected[i], i);
      std::exit(1);
    }
  }

  // The same bits from any number of threads.
  std::vector<std::thread> threads;
  Pool pool;
  pool.threads = 3;
  pool.schedule = [&](std::function<void()> work) { threads.emplace_back(std::move(work)); };
  multiply(problem, kernels, pool);
  for (std::thread& thread : threads) thread.join();
  if (std::memcmp(first.data(), y.data, first.size() * sizeof(float))) {
    std::printf("k %d: other sums with threads\n", own.k);
    std::exit(1);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels* kernels = kernels_of(count > 1 ? arguments[1] : "");
  if (!kernels) return std::puts("no such level on this processor"), 0;
  int checked = 0;
  const int ks[] = {2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 17, 32, 33, 64, 65, 128, 129, 256};
  for (const int k : ks) {
    for (const bool transposed : {false, true}) {
      for (const bool at_end : {false, true}) {
        const Case plain[] = {
            {1, 1, 1, k, 1, 1, 0, 0, transposed, false},
            {1, 97, 131, k, 1, 1, 0, 0, transposed, false},
            {3, 64, 64, k, 1, 1, 0, 0, transposed, false},
            {23, 60, 63, k, 1, 1, 0, 0, transposed, false},
            {2, 60, 130, k, 1, 1, 0, 0, transposed, true},
            {1, 64, 129, k, 4, 3, 0, 0, transposed, true},   // blocks of 16 x 43
            {9, 64, 129, k, 4, 3, 0, 0, transposed, false},
            {1, 48, 160, k, 6, 10, 0, 0, transposed, false},  // of 8 x 16
            {1, 60, 70, k, 1, 70, 0, 0, transposed, false},   // of columns
            {2, 64, 70, k, 1, 1, 4, 70, transposed, false},   // scaled groups
            {2, 64, 70, k, 1, 1, 4, 7, transposed, true},
            {5, 64, 70, k, 2, 1, 1, 35, transposed, false},
            {1, 64, 70, k, 1, 1, 1, 70, transposed, false},   // scaled columns
        };
        for (const Case& own : plain) check(own, *kernels, at_end), ++checked;
      }
    }
  }
  // Large enough for several tasks, along the columns and along the rows.
  for (const int k : {3, 16, 200}) {
    for (const bool transposed : {false, true}) {
      check({1, 1500, 1100, k, 1, 1, 0, 0, transposed, false}, *kernels, true), ++checked;
      check({70, 500, 300, k, 1, 1, 0, 0, transposed, false}, *kernels, true), ++checked;
      check({1, 9000, 70, k, 1, 1, 0, 0, transposed, false}, *kernels, true), ++checked;
    }
  }
  std::printf("ok: %d products by %s\n", checked, kernels->name);
  return 0;
}
