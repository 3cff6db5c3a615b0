"""Products with packed weights: `matmul`, `conv`, and Linen layers that use them.

One public function each; `implementation` says how. "unpack" unpacks the weight inside the compiled
product: it runs everywhere, shards, and is the oracle of the others. "lookup" (for `matmul`) reads
sums from tables, see `jaxquant.ops.lookup`.
"""

from jaxquant.ops.api import IMPLEMENTATIONS, conv, matmul
from jaxquant.ops.layers import intercept_linen

__all__ = ["IMPLEMENTATIONS", "conv", "intercept_linen", "matmul"]
