"""Products with packed weights: `matmul` and `conv`.

One public function each; `implementation` says how. "unpack" unpacks the weight inside the
compiled product: it runs everywhere, shards, and is the oracle of the others. Those, for `matmul`
only, never have the whole weight unpacked: "native" looks codes up in registers, in C++ (CPU),
"blocks" unpacks what the cache holds (CPU without a compiler, and exported functions), "triton" and
"mosaic" are kernels for NVIDIA GPUs and for TPUs. "words" sums entries of tables of products with
the words of a ProductArray. Each is in the module of its name.
"""

from jaxquant.packing.ops.api import IMPLEMENTATIONS, conv, matmul

__all__ = ["IMPLEMENTATIONS", "conv", "matmul"]
