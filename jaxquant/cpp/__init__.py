"""The library's code in C++: custom calls of XLA on CPU, compiled when the package is installed.

Where there was no compiler there are none, and all is done by XLA: `missing` says why. `product.h`
has products with packed weights, `clusters.h` the clusters of small blocks.
"""

import ctypes
import functools
import pathlib

import jax

LEVELS = ("avx512", "avx2", "plain")
_TARGETS = ("jaxquant_product", "jaxquant_clusters")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the library, its calls known to XLA; or what is missing."""
    files = sorted(pathlib.Path(__file__).parent.glob("_native*"))
    if not files:
        return "it was not compiled when jaxquant was installed: that needs a C++17 compiler"
    jax.default_backend()  # started first, XLA refuses at once what it cannot call
    try:
        library = ctypes.CDLL(str(files[0]))
        for target in _TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except Exception as error:  # of the loader, or of XLA, which may be of another version
        return f"{files[0].name} does not load: {error}"
    library.jaxquant_level.restype = ctypes.c_char_p
    return library


def missing() -> str | None:
    """Return why there is no native code here, or None."""
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def level(wanted: str = "") -> str:
    """Return the code that this processor runs, "avx512", "avx2" or "plain"; "" if not `wanted`."""
    library = _library()
    return "" if isinstance(library, str) else library.jaxquant_level(wanted.encode()).decode()
