#include "plain.h"

#include "kernels.h"

namespace jaxquant {

const Kernels* plain_kernels() {
  static const Kernels kernels = {"plain", Plain::kBlock, Plain::kDirect, task<Plain>};
  return &kernels;
}

}  // namespace jaxquant
