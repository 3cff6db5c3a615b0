// The native clusters against their definition, under sanitizers (see .ci/run) and on arrays that
// end, or start, where no memory is.
//
//   native_clusters    prints "ok" and how many blocks agreed
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../jaxquant/cpp/clusters.h"
#include "native_guarded.h"

using namespace jaxquant;

namespace {

std::mt19937 generator(0);

float normal() { return std::normal_distribution<float>()(generator); }
int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(generator); }

void fail(const char* what, const Blocks1D& own) {
  std::printf("%s: size %ld, k %ld, cells %ld, zero %d, weights %d\n", what,
              static_cast<long>(own.size), static_cast<long>(own.k), static_cast<long>(own.cells),
              own.zero, own.weights != nullptr);
  std::exit(1);
}

enum class Kind { kNormal, kFewValues, kFarModes, kExtreme, kNoNumbers };

float drawn(Kind kind) {
  const float most = std::numeric_limits<float>::max();
  switch (kind) {
    case Kind::kNormal: return normal();
    case Kind::kFewValues: return static_cast<float>(below(5)) - 2.0f;
    case Kind::kFarModes: return below(2) ? 1e8f + 100.0f * normal() : 1e-3f * normal();
    case Kind::kExtreme: return below(3) ? std::ldexp(normal(), below(250) - 126) : below(2) ? most : -most;
    default: return below(9) ? normal() : std::numeric_limits<float>::quiet_NaN();
  }
}

int check(int64_t size, int64_t k, Kind kind, bool zero, bool weighted, bool freezes, bool at_end) {
  const int64_t blocks = 3;
  const size_t entries = static_cast<size_t>(blocks * size), of_codebooks = static_cast<size_t>(blocks * k);
  Guarded<float> x(entries, at_end), weights(entries, at_end), start(of_codebooks, at_end);
  Guarded<float> centroids(of_codebooks, at_end), losses(of_codebooks, at_end), norms(blocks, at_end);
  Guarded<bool> frozen(of_codebooks, at_end), finite(blocks, at_end);
  Guarded<int32_t> counts(of_codebooks, at_end);
  for (size_t i = 0; i < entries; ++i) {
    x.data[i] = drawn(kind);
    weights.data[i] = below(4) ? std::abs(normal()) : 0.0f;
  }
  for (size_t i = 0; i < of_codebooks; ++i) {
    start.data[i] = drawn(Kind::kFewValues);
    frozen.data[i] = freezes && below(3) == 0;
  }
  Blocks1D own = {};
  own.x = x.data;
  own.weights = weighted ? weights.data : nullptr;
  own.start = start.data;
  own.frozen = frozen.data;
  own.centroids = centroids.data;
  own.counts = counts.data;
  own.losses = losses.data;
  own.norms = norms.data;
  own.finite = finite.data;
  own.blocks = blocks;
  own.size = size;
  own.k = k;
  own.cells = std::min<int64_t>(size, std::max<int64_t>(2 * k, 64));
  own.longest = std::min(own.cells, 2 * k <= size ? 4 * ((own.cells + k - 1) / k) : own.cells);
  own.iterations = below(3) - 1;
  own.passes = 200;
  own.zero = zero;
  own.format = {23, -126, -std::numeric_limits<float>::max(), std::numeric_limits<float>::max()};
  std::vector<std::thread> threads;
  Pool pool;
  pool.threads = 3;
  pool.schedule = [&](std::function<void()> work) { threads.emplace_back(std::move(work)); };
  cluster(own, pool);
  for (std::thread& thread : threads) thread.join();
  for (int64_t block = 0; block < blocks; ++block) {
    const float* values = x.data + block * size;
    const bool usable = std::all_of(values, values + size, [](float v) { return std::isfinite(v); });
    if (finite.data[block] != usable) fail("other numbers are finite", own);
    if (!usable) continue;
    const float* codebook = centroids.data + block * k;
    std::vector<int32_t> members(static_cast<size_t>(k), 0);
    std::vector<double> sums(static_cast<size_t>(k), 0.0);
    for (int64_t i = 0; i < size; ++i) {
      // The nearest, of the same values the first, else the lower.
      int64_t best = 0;
      const double v = values[i];
      for (int64_t c = 1; c < k; ++c) {
        const double now = std::abs(v - codebook[c]), then = std::abs(v - codebook[best]);
        if (now < then || (now == then && codebook[c] < codebook[best])) best = c;
      }
      ++members[static_cast<size_t>(best)];
      const double mass = weighted ? weights.data[block * size + i] : 1.0;
      sums[static_cast<size_t>(best)] += mass * (v - codebook[best]) * (v - codebook[best]);
    }
    for (int64_t c = 0; c < k; ++c) {
      const size_t at = static_cast<size_t>(block * k + c);
      if (!std::isfinite(codebook[c])) fail("no number", own);
      if (frozen.data[at] && codebook[c] != start.data[at]) fail("a frozen centroid moved", own);
      if (kind == Kind::kExtreme) continue;  // doubles, too, are at their end
      const double sum = sums[static_cast<size_t>(c)];
      const bool any = std::any_of(weights.data + block * size, weights.data + (block + 1) * size,
                                   [](float w) { return w > 0; });
      if (counts.data[at] != members[static_cast<size_t>(c)]) fail("other counts", own);
      if (weighted && !any) continue;  // all count alike then
      if (std::abs(sum - losses.data[at]) > 1e-4 * sum + 1e-9) fail("other losses", own);
    }
    if (zero && std::none_of(codebook, codebook + k, [](float c) { return c == 0; }) && !freezes) {
      fail("no zero", own);
    }
  }
  return static_cast<int>(blocks);
}

}  // namespace

int main() {
  int checked = 0;
  const Kind kinds[] = {Kind::kNormal, Kind::kFewValues, Kind::kFarModes, Kind::kExtreme, Kind::kNoNumbers};
  for (const int64_t size : {1, 2, 7, 64, 129, 2100}) {
    for (const int64_t k : {1, 2, 3, 16, 100}) {
      for (const Kind kind : kinds) {
        for (int options = 0; options < 16; ++options) {
          checked += check(size, k, kind, options & 1, options & 2, options & 4, options & 8);
        }
      }
    }
  }
  std::printf("ok: %d blocks\n", checked);
  return 0;
}
