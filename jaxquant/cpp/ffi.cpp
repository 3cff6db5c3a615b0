// Products and clusters as custom calls of XLA. Whatever comes is checked first: nothing is read or written
// that its buffers do not hold.
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clusters.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace jaxquant {
namespace {

namespace ffi = xla::ffi;
using Sizes = ffi::Span<const int64_t>;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("jaxquant: " + what); }

int64_t product_of(Sizes sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

Pool pool_of(ffi::ThreadPool& threads) {
  Pool pool;
  pool.threads = threads.num_threads();
  pool.schedule = [&](std::function<void()> work) { threads.Schedule(std::move(work)); };
  return pool;
}

// Fill in which of `counts` blocks along axes of such sizes each row is in; in the order of both.
// False if blocks do not divide the axes.
bool blocks_of_rows(Sizes sizes, Sizes counts, std::vector<int32_t>& blocks) {
  if (sizes.size() != counts.size()) return false;
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (counts[axis] < 1 || sizes[axis] % counts[axis] != 0) return false;
  }
  blocks.assign(1, 0);
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    std::vector<int32_t> next;
    next.reserve(blocks.size() * static_cast<size_t>(sizes[axis]));
    const int64_t size = sizes[axis] / counts[axis];
    for (const int32_t block : blocks) {
      for (int64_t i = 0; i < sizes[axis]; ++i) {
        next.push_back(static_cast<int32_t>(block * counts[axis] + i / size));
      }
    }
    blocks = std::move(next);
  }
  return true;
}

ffi::Error run_product(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes,
                       ffi::Buffer<ffi::F32> codebooks, ffi::AnyBuffer scales,
                       ffi::ResultBuffer<ffi::F32> y, Sizes row_sizes, Sizes codebook_rows,
                       Sizes scale_rows, bool transposed, int32_t rounding,
                       std::string_view level) {
  const auto x_shape = x.dimensions(), codes_shape = codes.dimensions();
  const auto codebooks_shape = codebooks.dimensions(), scales_shape = scales.dimensions();
  const auto y_shape = y->dimensions();
  if (x_shape.size() != 2 || codes_shape.size() != 2 || codebooks_shape.size() != 3 ||
      scales_shape.size() != 2 || y_shape.size() != 2) {
    return invalid("expected x, codes, scales and y of 2 axes and codebooks of 3");
  }
  Problem problem = {};
  problem.vectors = x_shape[0];
  problem.rows = product_of(row_sizes);
  problem.columns = codes_shape[1];
  const int64_t inputs = transposed ? problem.columns : problem.rows;
  const int64_t outputs = transposed ? problem.rows : problem.columns;
  const int64_t k = codebooks_shape[2];
  if (k < 2 || k > 256) return invalid("expected k from 2 to 256, got " + std::to_string(k));
  problem.k = static_cast<int32_t>(k);
  if (std::min({problem.vectors, problem.rows, problem.columns}) < 1) {
    return invalid("expected no empty arrays");
  }
  if (problem.rows > INT32_MAX) return invalid("expected fewer rows, got more than 2^31");
  if (x_shape[1] != inputs || y_shape[0] != problem.vectors || y_shape[1] != outputs) {
    return invalid("expected x [vectors, inputs] and y [vectors, outputs] of the weight");
  }
  if (codes_shape[0] != packed_rows(problem.rows, problem.k)) {
    return invalid("expected " + std::to_string(packed_rows(problem.rows, problem.k)) +
                   " rows of bytes, got " + std::to_string(codes_shape[0]));
  }
  if (rounding < 0 || rounding > 2) return invalid("expected rounding from 0 to 2");

  std::vector<int32_t> of_codebooks, of_scales;
  const auto set = [&](Blocks& blocks, std::vector<int32_t>& of_rows, Sizes counts, int64_t rows,
                       int64_t columns) {
    const int64_t count = product_of(counts);
    if (columns < 1 || count != rows || problem.columns % columns != 0) return false;
    if (!blocks_of_rows(row_sizes, counts, of_rows)) return false;
    blocks.of_row = count == 1 ? nullptr : of_rows.data();
    blocks.columns = columns;
    blocks.width = problem.columns / columns;
    return true;
  };
  if (!set(problem.codebook_blocks, of_codebooks, codebook_rows, codebooks_shape[0],
           codebooks_shape[1])) {
    return invalid("expected codebooks of blocks that cut the weight");
  }
  if (scales.element_count() > 0) {
    problem.scales_are_bfloat16 = scales.element_type() == ffi::BF16;
    if (!problem.scales_are_bfloat16 && scales.element_type() != ffi::F32) {
      return invalid("expected scales in float32 or bfloat16");
    }
    if (!set(problem.scale_blocks, of_scales, scale_rows, scales_shape[0], scales_shape[1])) {
      return invalid("expected scales of blocks that cut the weight");
    }
    problem.scales = scales.untyped_data();
  }
  const Kernels* kernels = kernels_of(std::string(level).c_str());
  if (kernels == nullptr) {
    return invalid("expected a processor with " + std::string(level));
  }
  problem.x = x.typed_data();
  problem.codes = codes.typed_data();
  problem.codebooks = codebooks.typed_data();
  problem.y = y->typed_data();
  problem.transposed = transposed;
  problem.rounding = static_cast<Rounding>(rounding);
  multiply(problem, *kernels, pool_of(threads));
  return ffi::Error::Success();
}

// Axes before the last are of blocks; weights [..., 0] are none.
ffi::Error run_clusters(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x,
                        ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::F32> start,
                        ffi::Buffer<ffi::PRED> frozen, ffi::ResultBuffer<ffi::F32> centroids,
                        ffi::ResultBuffer<ffi::S32> counts, ffi::ResultBuffer<ffi::F32> losses,
                        ffi::ResultBuffer<ffi::F32> norms, ffi::ResultBuffer<ffi::PRED> finite,
                        int64_t cells, int64_t longest, int64_t iterations, int64_t passes,
                        bool zero, int32_t digits, int32_t least_exponent, float least,
                        float largest) {
  const auto shape = x.dimensions(), of_codebooks = start.dimensions();
  if (shape.size() < 1 || of_codebooks.size() != shape.size()) {
    return invalid("expected x [blocks, size] and codebooks [blocks, k]");
  }
  Blocks1D problem = {};
  problem.size = shape.back();
  problem.k = of_codebooks.back();
  problem.blocks = product_of({shape.begin(), shape.size() - 1});
  const auto count = [](const auto& buffer) { return static_cast<int64_t>(buffer.element_count()); };
  const int64_t in_codebooks = problem.blocks * problem.k;
  if (std::min({problem.size, problem.k, problem.blocks}) < 1 || problem.size >= 1 << 16) {
    return invalid("expected blocks of 1 to 65,535 weights");
  }
  if (count(start) != in_codebooks || count(frozen) != in_codebooks ||
      count(*centroids) != in_codebooks || count(*counts) != in_codebooks ||
      count(*losses) != in_codebooks || count(*norms) != problem.blocks ||
      count(*finite) != problem.blocks) {
    return invalid("expected a codebook for each block");
  }
  if (count(weights) != 0 && count(weights) != count(x)) {
    return invalid("expected sample weights like x, or none");
  }
  if (cells < 1 || cells > problem.size || longest < 1 || longest > cells || longest * problem.k < cells) {
    return invalid("expected cells that the blocks and the codebooks have");
  }
  problem.x = x.typed_data();
  problem.weights = count(weights) ? weights.typed_data() : nullptr;
  problem.start = start.typed_data();
  problem.frozen = frozen.typed_data();
  problem.centroids = centroids->typed_data();
  problem.counts = counts->typed_data();
  problem.losses = losses->typed_data();
  problem.norms = norms->typed_data();
  problem.finite = finite->typed_data();
  problem.cells = cells;
  problem.longest = longest;
  problem.iterations = iterations;
  problem.passes = passes;
  problem.zero = zero;
  problem.format = {digits, least_exponent, least, largest};
  cluster(problem, pool_of(threads));
  return ffi::Error::Success();
}

}  // namespace

#if defined(__GNUC__)
#define JAXQUANT_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define JAXQUANT_EXPORT extern "C"
#endif

JAXQUANT_EXPORT XLA_FFI_Error* jaxquant_product(XLA_FFI_CallFrame* frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_product, run_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<Sizes>("row_sizes")
                                  .Attr<Sizes>("codebook_rows")
                                  .Attr<Sizes>("scale_rows")
                                  .Attr<bool>("transposed")
                                  .Attr<int32_t>("rounding")
                                  .Attr<std::string_view>("level"));

JAXQUANT_EXPORT XLA_FFI_Error* jaxquant_clusters(XLA_FFI_CallFrame* frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_clusters, run_clusters,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::PRED>>()
                                  .Attr<int64_t>("cells")
                                  .Attr<int64_t>("longest")
                                  .Attr<int64_t>("iterations")
                                  .Attr<int64_t>("passes")
                                  .Attr<bool>("zero")
                                  .Attr<int32_t>("digits")
                                  .Attr<int32_t>("least_exponent")
                                  .Attr<float>("least")
                                  .Attr<float>("largest"));

// The name of the kernels that this processor runs by default, or nothing if it has not those asked
// for.
JAXQUANT_EXPORT const char* jaxquant_level(const char* wanted) {
  const Kernels* kernels = kernels_of(wanted);
  return kernels ? kernels->name : "";
}

}  // namespace jaxquant
