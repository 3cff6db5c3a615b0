// Compiled with the flags of its registers, see setup.py: nothing else may be called from here.
#include "kernels.h"
#if defined(__x86_64__)
#include "avx512.h"
#endif

namespace jaxquant {

const Kernels* avx512_kernels() {
#if defined(__x86_64__)
  static const Kernels kernels = {"avx512", Avx512::kBlock, Avx512::kDirect, task<Avx512>};
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace jaxquant
