// Compiled with the flags of its registers, see setup.py: nothing else may be called from here.
#include "kernels.h"
#if defined(__x86_64__)
#include "avx2.h"
#endif

namespace jaxquant {

const Kernels* avx2_kernels() {
#if defined(__x86_64__)
  static const Kernels kernels = {"avx2", Avx2::kBlock, Avx2::kDirect, task<Avx2>};
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace jaxquant
