"""How codes lie in bytes: in as few bits as whole bytes allow, so that products can read them.

Layout. A weight of shape [..., columns] is a matrix of rows and columns: what is multiplied and
summed over runs down the rows, so that a product reads whole rows of packed bytes. Down a column,
`digits` codes make a symbol, `code_0 + code_1 k + code_2 k**2 + ...`, of `bits` bits; its bits are
cut into fields of 8, 4, 2 or 1 bits, and 8 / width fields of equal width share a byte, the first in
the low bits. What shares a symbol or a byte does not stand side by side: with S symbols, symbol s
holds the rows s, s + S, s + 2S, ..., and byte b of B the fields b, b + B, b + 2B, ... of the
symbols. So unpacking is shifts and slices of whole rows, and never moves single codes. S is rounded
up until every B is whole: fields of all widths then start at the same symbols.

    k = 2: 1 bit     3: 1.6 (5 digits in 8)     4: 2     5: 2.33 (3 in 7)     6: 2.67 (3 in 8)
    7, 8: 3     9 to 11: 3.5 (2 in 7)     12 to 16: 4     17 to 32: 5     to 64: 6, 128: 7, 256: 8
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.clustering.codebooks import MOST_CENTROIDS

_WIDTHS = (8, 4, 2, 1)


@functools.cache
def symbol(k: int) -> tuple[int, int]:
    """Return how many codes share a symbol, and its bits: the fewest bits a code.

    Raises:
      ValueError: unless k is from 1 to 256.

    >>> [symbol(k) for k in (2, 3, 5, 17, 256)]
    [(1, 1), (5, 8), (3, 7), (1, 5), (1, 8)]
    """
    if not 1 <= k <= MOST_CENTROIDS:
        raise ValueError(f"expected k from 1 to {MOST_CENTROIDS}, got {k}")
    sizes = {digits: math.ceil(math.log2(k) * digits - 1e-9) for digits in range(1, 6)}
    return min(
        ((digits, bits) for digits, bits in sizes.items() if bits <= 8),
        key=lambda pair: (pair[1] / pair[0], pair[0]),
    )


def packed_rows(rows: int, k: int) -> int:
    """Return how many rows of bytes so many rows of codes take."""
    _, bits = symbol(k)
    return num_symbols(rows, k) * bits // 8


def num_symbols(rows: int, k: int) -> int:
    """Return how many symbols hold a column of so many codes."""
    together = symbols_together(k)
    return -(-rows // (symbol(k)[0] * together)) * together


def symbols_together(k: int) -> int:
    """Return how many symbols take whole bytes, of fields of every width."""
    return 8 // min(field_widths(symbol(k)[1]), default=8)


def field_widths(bits: int) -> list[int]:
    """Return the widths of the fields of a symbol, from the low bits up."""
    return [width for width in _WIDTHS if bits & width]


def pack_codes(codes: Any, k: int) -> Any:
    """Pack codes below k down the second to last axis; see the module for the layout.

    Args:
      codes: [..., rows, columns] integers, of JAX or of NumPy, which compiles nothing.
      k: number of centroids, 1 to 256.

    Returns:
      [..., packed rows, columns] uint8, of the library that `codes` are of.

    >>> pack_codes(jnp.array([[0], [1], [2], [2], [1]]), 3).tolist()  # 3 + 2 * 9 + 2 * 27 + 81
    [[156]]
    """
    digits, bits = symbol(k)
    together, count = symbols_together(k), num_symbols(codes.shape[-2], k)
    planes = _planes(codes.astype(np.uint8), digits * together, count // together)
    weighted = [plane * np.uint8(k ** (i // together)) for i, plane in enumerate(planes)]
    symbols = [functools.reduce(operator.add, weighted[i::together]) for i in range(together)]
    arrays = codes.__array_namespace__()
    fields, low = [arrays.zeros((*codes.shape[:-2], 0, codes.shape[-1]), dtype=np.uint8)], 0
    for width in field_widths(bits):
        step = together * width // 8
        field = [(s >> np.uint8(low)) & np.uint8(2**width - 1) for s in symbols]
        shifted = [part << np.uint8(i // step * width) for i, part in enumerate(field)]
        fields += [functools.reduce(operator.or_, shifted[i::step]) for i in range(step)]
        low += width
    return arrays.concat(fields, axis=-2)


def unpack_codes(packed: Any, rows: int, k: int) -> Any:
    """Return the codes that `pack_codes` packed.

    Args:
      packed: [..., packed rows, columns] uint8, of JAX or of NumPy.
      rows: how many rows of codes.
      k: number of centroids.

    Returns:
      [..., rows, columns] uint8, of the library that `packed` is of.

    >>> unpack_codes(pack_codes(jnp.array([[3], [16], [0]]), 17), 3, 17).ravel().tolist()
    [3, 16, 0]
    """
    arrays = packed.__array_namespace__()
    planes = unpack_planes(list(arrays.moveaxis(byte_planes(packed, k), -3, 0)), k)
    if not planes:
        return arrays.zeros((*packed.shape[:-2], rows, packed.shape[-1]), dtype=np.uint8)
    return arrays.concat(planes, axis=-2)[..., :rows, :]


def byte_planes(packed: Any, k: int) -> Any:
    """Return packed codes as [..., byte planes, rows, columns]; see `unpack_planes`."""
    *stacked, length, columns = packed.shape
    count = symbol(k)[1] * symbols_together(k) // 8
    return packed.reshape(*stacked, count, length // max(count, 1), columns)


def unpack_planes(planes: Sequence[jax.Array], k: int) -> list[jax.Array]:
    """Return the planes of codes in the planes of bytes, of whatever part of the rows and columns.

    What shares a byte or a symbol stands at the same place of the planes: all work is by entry, and
    row j of code plane p, of B rows each, is row p * B + j of the weight. The part that kernels
    share, so in any integer dtype of 8 bits or more.

    Args:
      planes: of bytes, from `byte_planes`.
      k: number of centroids; at k = 1 there are no bytes and no planes.

    Returns:
      Planes of codes, of the shape and dtype of those of bytes.
    """
    digits, bits = symbol(k)
    symbols = unpack_symbols(planes, k)
    codes = []
    for digit in range(digits if bits else 0):
        rest = [_quotient(s, k) for s in symbols] if digit < digits - 1 else []
        codes += [s - r * k for s, r in zip(symbols, rest, strict=True)] if rest else symbols
        symbols = rest
    return codes


def unpack_rows(packed: Any, numbers: Any, rows: int, k: int) -> Any:
    """Return some rows of the codes that `pack_codes` packed; the others' bytes are not read.

    Args:
      packed: [packed rows, columns] uint8, of JAX or of NumPy.
      numbers: [...] integers, which rows; out of bounds, any row comes.
      rows: how many rows of codes there are.
      k: number of centroids.

    Returns:
      [..., columns] uint8.

    >>> packed = pack_codes(jnp.array([[3], [16], [0], [9]]), 17)
    >>> unpack_rows(packed, jnp.array([3, 1]), 4, 17).tolist()
    [[9], [16]]
    """
    digits, bits = symbol(k)
    arrays = packed.__array_namespace__()
    if not bits or not rows:
        return arrays.zeros((*numbers.shape, packed.shape[-1]), dtype=np.uint8)
    together, count = symbols_together(k), num_symbols(rows, k)
    length = count // together  # of a plane
    number = numbers % count
    plane, place = number // length, number % length
    symbols, start, low = None, 0, 0
    for width in field_widths(bits):
        step = together * width // 8
        read = packed[(start + plane % step) * length + place]
        shift = (plane // step * width).astype(np.uint8)[..., None]
        field = ((read >> shift) & np.uint8(2**width - 1)) << np.uint8(low)
        symbols = field if symbols is None else symbols | field
        start, low = start + step, low + width
    powers = arrays.asarray([k**digit % 256 for digit in range(digits)], dtype=np.uint8)
    power = powers[numbers // count % digits][..., None]
    return symbols // power % np.uint8(k % 256) if k < 256 else symbols


def unpack_symbols(planes: Sequence[jax.Array], k: int) -> list[jax.Array]:
    """Return the planes of symbols in the planes of bytes; see `unpack_planes`.

    Row j of symbol plane p, of B rows each, is symbol p * B + j of the column.
    """
    _, bits = symbol(k)
    together = symbols_together(k)
    symbols: list[Any] = [None] * together
    start, low = 0, 0
    for width in field_widths(bits):
        step = together * width // 8
        for i in range(together):
            plane = planes[start + i % step]
            field = (plane >> (i // step * width)) & (2**width - 1)
            symbols[i] = field if symbols[i] is None else symbols[i] | (field << low)
        start, low = start + step, low + width
    return symbols


def _quotient(x: Any, k: int) -> Any:
    """Return x // k of numbers that are not negative, without a test of their sign."""
    return x // k if isinstance(x, np.ndarray) else jax.lax.div(x, jnp.full_like(x, k))


def _planes(x: Any, count: int, length: int) -> list[Any]:
    """Cut the rows into `count` runs of a length, with zeros at the end."""
    missing = [(0, 0)] * (x.ndim - 2) + [(0, count * length - x.shape[-2]), (0, 0)]
    x = x.__array_namespace__().pad(x, missing)
    return [x[..., i * length : (i + 1) * length, :] for i in range(count)]
