"""The products for CPU in C++: codes are looked up in registers, or in the innermost cache.

XLA on CPU cannot keep a table in a register; the machine can. `kernels.h` has how: a register of
codes looks up 16 centroids at once. At run time the best code is taken that the processor has:
AVX-512, AVX2, or C++ alone.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import cpp
from jaxquant.packing.arrays import PackedArray, ProductArray
from jaxquant.packing.ops import reference

_ROUNDING = {jnp.dtype(jnp.float32): 0, jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 2}


def supports(x: jax.Array, packed: PackedArray | ProductArray) -> bool:
    """Return whether there is a product here, plain and transposed: sums in float32."""
    if isinstance(packed, ProductArray) or packed.k == 1 or cpp.missing() is not None:
        return False
    scale = packed.scale
    narrow = scale is None or (
        packed.dtype in _ROUNDING and scale.dtype in (jnp.float32, jnp.bfloat16)
    )
    return narrow and packed.size > 0 and reference.accumulator(x, packed) == jnp.float32


def matmul(
    x: jax.Array, packed: PackedArray, *, transposed: bool = False, level: str = ""
) -> jax.Array:
    """Return [vectors, columns] from x [vectors, prod(rows)], or the transposed product.

    Args:
      x: floating point, not float64.
      packed: one layer, its columns on one axis.
      transposed: whether to return [vectors, prod(rows)] from x [vectors, columns].
      level: one of `cpp.LEVELS` that the processor has; "" for the best.
    """
    axes = len(packed.rows)

    def of_blocks(table: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """Return [row blocks, column blocks, k], and the number of blocks along each row axis."""
        numbers = table.shape[:-1] if table.ndim > 1 else (1,) * (axes + 1)
        rows = np.asarray(numbers[:axes], np.int64)
        return table.reshape(math.prod(numbers[:axes]), numbers[axes], -1), rows

    own, scale, rounding = packed.codebook, packed.scale, 0
    if scale is None or packed.numbers == (1,) * (axes + 1):
        own, scale = packed.centroids, None  # rounded as the weight is
    else:
        rounding = _ROUNDING[packed.dtype]
    codebooks, codebook_rows = of_blocks(own.astype(jnp.float32))
    if scale is None:
        scales, scale_rows = jnp.zeros((0, 0), jnp.float32), np.ones(axes, np.int64)
    else:
        scales, scale_rows = of_blocks(scale)
        scales = scales[..., 0]
    outputs = math.prod(packed.rows) if transposed else packed.columns[0]
    like = jax.ShapeDtypeStruct((len(x), outputs), jnp.float32)
    multiply = jax.ffi.ffi_call("jaxquant_product", like, vmap_method="sequential")
    return multiply(
        x.astype(jnp.float32),
        packed.codes,
        codebooks,
        scales,
        row_sizes=np.asarray(packed.rows, np.int64),
        codebook_rows=codebook_rows,
        scale_rows=scale_rows,
        transposed=transposed,
        rounding=np.int32(rounding),
        level=level,
    )


matmul_transposed = functools.partial(matmul, transposed=True)
