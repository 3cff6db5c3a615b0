// A product from its arguments to its result: what is computed once, and the tasks in threads.
#pragma once

#include <cstdint>

#include "pool.h"
#include "problem.h"

namespace jaxquant {

// The kernels of a name that this processor runs, or of "" the fastest; null if there are none.
const Kernels* kernels_of(const char* name);

// How many rows of bytes hold so many rows of codes.
int64_t packed_rows(int64_t rows, int k);

// Fill in y. All sizes are 1 or more, and k is from 2 to 256.
void multiply(const Problem& problem, const Kernels& kernels, const Pool& pool);

}  // namespace jaxquant
