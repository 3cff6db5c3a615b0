"""The products for CPU in C++: codes are looked up in registers, or in the innermost cache.

XLA on CPU cannot keep a table in a register; the machine can. `kernels.h` has how: a register of
codes looks up 16 centroids at once. A custom call of XLA, compiled when the package is installed,
if there is a compiler; `missing` says what is not there. At run time the best code is taken that
the processor has: AVX-512, AVX2, or C++ alone.
"""

import ctypes
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.packing.arrays import PackedArray, ProductArray
from jaxquant.packing.ops import reference

LEVELS = ("avx512", "avx2", "plain")
_TARGET = "jaxquant_product"
_ROUNDING = {jnp.dtype(jnp.float32): 0, jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 2}


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the library, its product known to XLA; or what is missing."""
    files = sorted(pathlib.Path(__file__).parent.glob("_native*"))
    if not files:
        return "it was not compiled when jaxquant was installed: that needs a C++17 compiler"
    jax.default_backend()  # started first, XLA refuses at once what it cannot call
    try:
        library = ctypes.CDLL(str(files[0]))
        handler = jax.ffi.pycapsule(library.jaxquant_product)
        jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    except Exception as error:  # of the loader, or of XLA, which may be of another version
        return f"{files[0].name} does not load: {error}"
    library.jaxquant_level.restype = ctypes.c_char_p
    return library


def missing() -> str | None:
    """Return why there are no native products here, or None."""
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def level(wanted: str = "") -> str:
    """Return the code that this processor runs, "avx512", "avx2" or "plain"; "" if not `wanted`."""
    library = _library()
    return "" if isinstance(library, str) else library.jaxquant_level(wanted.encode()).decode()


def supports(x: jax.Array, packed: PackedArray | ProductArray) -> bool:
    """Return whether there is a product here, plain and transposed: sums in float32."""
    if isinstance(packed, ProductArray) or packed.k == 1 or missing() is not None:
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
      level: one of LEVELS that the processor has; "" for the best.
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
    multiply = jax.ffi.ffi_call(_TARGET, like, vmap_method="sequential")
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
