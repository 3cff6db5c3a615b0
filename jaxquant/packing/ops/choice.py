"""Which implementation does a product: by platform and shape."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from jaxquant import cpp, platform
from jaxquant.packing.arrays import PackedArray, ProductArray

Product = Callable[[jax.Array, Any], jax.Array]

IMPLEMENTATIONS = ("unpack", "native", "blocks", "triton", "mosaic", "words")
_OF_PLATFORM = {"cpu": ("native", "words", "blocks"), "gpu": ("triton",), "tpu": ("mosaic",)}
_FEW_FOR_WORDS = 16  # vectors; tables are read for each, a kernel is unpacked once for all
_FEW_FOR_NATIVE = {"plain": 8, "avx2": 128, "avx512": 128}  # of more, XLA's is faster
_FEW_VECTORS = 64  # more are bound by arithmetic, for which XLA's own product is the best on GPUs
_FEW_WEIGHTS = 2**14  # which are unpacked before a loop would start


def product_of(name: str, transposed: bool) -> Product:
    """Return the product of an implementation other than "unpack", of one layer's weight."""
    module = _module(name)
    return module.matmul_transposed if transposed else module.matmul


def fastest(
    vectors: int, x: jax.Array, packed: PackedArray | ProductArray, transposed: bool = False
) -> str:
    """Return the implementation for so many vectors; a symbolic number of them may be any."""
    if platform.is_one_device() and packed.size > _FEW_WEIGHTS:
        for name in _OF_PLATFORM.get(platform.name(), ()):
            most = _most_vectors(name)
            if supports(name, vectors, x, packed, transposed) and (
                most is None or (isinstance(vectors, int) and vectors <= most)
            ):
                return name
    return "unpack"  # which XLA takes apart as the arrays are


def _most_vectors(name: str) -> int | None:
    """Return for how many vectors an implementation is the best; None: for any number."""
    if name == "native":
        return _FEW_FOR_NATIVE.get(cpp.level(), 0)  # none where it was not compiled
    return {"words": _FEW_FOR_WORDS, "blocks": None}.get(name, _FEW_VECTORS)


def supports(
    name: str,
    vectors: int,
    x: jax.Array,
    packed: PackedArray | ProductArray,
    transposed: bool = False,
) -> bool:
    """Return whether an implementation other than "unpack" does a product."""
    if isinstance(packed, ProductArray) and name not in ("words", "blocks"):
        return False
    if name in ("triton", "mosaic") and not isinstance(vectors, int):
        return False  # what a kernel does follows from their number
    if transposed and name not in ("native", "blocks"):
        return False
    if transposed and (isinstance(packed, ProductArray) or packed.k == 1):
        return False
    return _module(name).supports(x, packed)


@functools.cache
def _module(name: str) -> Any:
    """Return the module of an implementation, imported when it is asked for: Pallas takes long."""
    return importlib.import_module(f"jaxquant.packing.ops.{name}")
