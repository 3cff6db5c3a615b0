// The clusters of many small blocks of weights, each by itself: what `solve` of
// jaxquant/clustering/solver.py does, one block after the other, all of it in the cache.
#pragma once

#include <cstdint>

#include "pool.h"

namespace jaxquant {

// Numbers that a codebook may have: those of so many binary digits behind the first; below a power of
// two they are as far apart as above it.
struct Format {
  int32_t digits;          // 23: float32, and nothing is rounded
  int32_t least_exponent;  // of that power
  float least, largest;
};

struct Blocks1D {
  const float* x;        // [blocks, size]
  const float* weights;  // [blocks, size] sample weights, or null
  const float* start;    // [blocks, k] codebooks before
  const bool* frozen;    // [blocks, k] centroids that stay as they are
  float* centroids;      // [blocks, k]
  int32_t* counts;       // [blocks, k] of entries nearest to each
  float* losses;         // [blocks, k] (weighted) sums of squared distances
  float* norms;          // [blocks] (weighted) sums of squares
  bool* finite;          // [blocks] whether entries and weights can be clustered; else all above is 0
  int64_t blocks, size, k;
  int64_t cells;       // of the dynamic program that finds where a codebook starts
  int64_t longest;     // cells of a cluster there, at most, at first
  int64_t iterations;  // exactly so many passes of Lloyd, or -1: as many as needed
  int64_t passes;      // at most, if as many as needed
  bool zero;           // whether one centroid is zero
  Format format;
};

// Fill in the results. Sizes are 1 or more, and fewer than 2^16; longest <= cells <= size, and
// longest * k >= cells.
void cluster(const Blocks1D& problem, const Pool& pool);

}  // namespace jaxquant
