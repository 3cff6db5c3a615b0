// What a product with a packed weight is given, and how it is cut into tasks.
#pragma once

#include <cstdint>

namespace jaxquant {

// Which row of codebooks, or of scales, each row of the weight has; and how many columns share one.
struct Blocks {
  const int32_t* of_row = nullptr;  // [rows]; null: all rows have the first
  int64_t columns = 1;              // how many blocks lie along the columns
  int64_t width = 1;                // columns of a block
};

enum class Rounding : int32_t { kNone = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Problem {
  const float* x;          // [vectors, inputs]
  const uint8_t* codes;    // [packed rows, columns], see jaxquant/packing/codes.py
  const float* codebooks;  // [rows of codebooks, blocks along the columns, k]
  const void* scales;      // [rows of scales, blocks along the columns] float32 or bfloat16, or null
  float* y;                // [vectors, outputs]
  int64_t vectors, rows, columns;
  int32_t k;
  bool scales_are_bfloat16;
  bool transposed;  // inputs are the columns and outputs the rows; else the other way round
  Rounding rounding;  // of what is a centroid times a scale
  Blocks codebook_blocks, scale_blocks;
};

// How symbols are split into bytes of digits: by division, a digit in each byte, or by tables of what
// stands for each symbol, several digits in a byte.
struct DigitTables {
  int base;               // of the digits
  uint8_t packs[2][256];  // four digits of two bits, of 3 centroids, or two of four bits
  static constexpr int width_of(int digits) { return digits > 3 ? 2 : 4; }
};

// Codes that are looked up together, of few centroids and for one vector: what the rows of such a
// key add to a column is an entry of a table of 32 sums, made for each key once for all columns.
struct Keys {
  static constexpr int kMost = 16, kRows = 4, kEntries = 32;
  int planes;                      // of keys; 0: there are none
  int rows[kMost];                 // of codes in a key
  int plane_of[kMost][kRows];      // of codes, for each row of a key
  DigitTables of_symbols;          // the keys of each symbol, one in a byte
  alignas(64) float values[kMost][kRows][kEntries];  // what a row adds for an input of 1
};

// What all tasks of a product share; `task` may be called from any thread, once for each number
// below `tasks`. No sum depends on the number of threads.
struct Plan {
  Problem problem;
  int32_t digits, bits;          // of a symbol
  int32_t planes;                // of codes
  int64_t length;                // rows of bytes of a plane
  int64_t places;                // rows of a plane that are unpacked at a time
  int64_t chunks, parts, tasks;  // tasks along the columns, along the rows of a plane, and in all
  int64_t vectors;               // whose sums a task keeps at a time
  int64_t blocks_of_task;        // blocks of columns in a chunk
  Keys keys;
  bool from_codes;               // for few vectors and one codebook: weights stay in registers
  DigitTables digit_tables;
  alignas(64) float table[256];  // the codebook, if weights stay in registers: again and again
  float* inputs;                 // x as the kernels read it, `inputs_of_vector` of each vector
  int64_t inputs_of_vector;
  float* partial;                // [parts, vectors, columns] sums, if there are several parts
};

struct Kernels {
  const char* name;
  int64_t block;  // columns that are unpacked together
  int direct;     // entries of the largest codebook that weights are made by in registers
  void (*task)(const Plan&, int64_t number);
};

// Each null where the binary has none.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* plain_kernels();

}  // namespace jaxquant
