"""Product quantization of kernels, with error correction: Q-CNN.

The input dimension of a kernel is cut into subspaces, each with a codebook of words found by
k-means over its sub-vectors; then words and codes are improved, one subspace after the other, so
that the layer *responds* as the float one does to the inputs that it will get.

Source: Wu et al., "Quantized Convolutional Neural Networks for Mobile Devices", CVPR 2016.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import checks, loops
from jaxquant.calibration.moments import windows
from jaxquant.clustering.codebooks import MOST_CENTROIDS
from jaxquant.meshes import compiled
from jaxquant.packing.arrays import ProductArray, pack_product, product_codes
from jaxquant.packing.ops.windows import Windows, window_options

_TOGETHER = 8  # subspaces that run side by side
_RUN = 32  # subspaces that are corrected before the others hear of it
_RIDGE = 1e-6  # of the mean eigenvalue: inputs that are always zero leave their words as they are
_PRECISION = jax.lax.Precision.HIGHEST


# Clustering --------------------------------------------------------------------------------------


def cluster(
    kernel: jax.Array, *, words: int, length: int, key: jax.Array, iterations: int = 20
) -> ProductArray:
    """Quantize the sub-vectors of a kernel by k-means, a codebook for each subspace.

    Starts by k-means++ (Arthur & Vassilvitskii, 2007), then `iterations` Lloyd passes; an empty
    cluster keeps its word, and a tie goes to the lower number. Some subspaces run side by side; of
    the distances only the least of each sub-vector is held. Cost O(weights words (iterations + 1)).
    With as many words as a subspace has distinct sub-vectors, exact.

    Args:
      kernel: [*window, channels, features] floating point, finite.
      words: of each subspace, 1 to 256.
      length: channels of a subspace; divides the channels.
      key: typed key, for the start.
      iterations: Lloyd passes.

    Returns:
      ProductArray, its words of the kernel's dtype.

    Raises:
      ValueError: for arguments that do not fit, and for NaN or infinite weights outside of jit.

    >>> import jaxquant as jq
    >>> kernel = jnp.arange(32.0).reshape(8, 4) % 3
    >>> array = cluster(kernel, words=4, length=2, key=jax.random.key(0))
    >>> bool(jnp.all(jq.unpack({"w": array})["w"] == kernel))
    True
    """
    kernel = jnp.asarray(kernel)
    _check_kernel(kernel)
    checks.key("key", key)
    words = checks.integer("words", words, least=1, most=MOST_CENTROIDS)
    length = checks.integer("length", length, least=1)
    if kernel.shape[-2] % length:
        raise ValueError(f"expected length to divide {kernel.shape[-2]} channels, got {length!r}")
    iterations = checks.integer("iterations", iterations, least=0)
    return compiled(_cluster, kernel, key, words=words, length=length, iterations=iterations)


def _cluster(
    kernel: jax.Array, key: jax.Array, *, words: int, length: int, iterations: int
) -> ProductArray:
    *window, channels, features = kernel.shape
    subspaces = channels // length
    vectors = kernel.astype(jnp.float32).reshape(-1, subspaces, length, features)
    vectors = vectors.transpose(1, 0, 3, 2).reshape(subspaces, -1, length)
    run = functools.partial(_kmeans, words=words, iterations=iterations, dtype=kernel.dtype)
    keys = jax.random.split(key, subspaces)
    codes, table = jax.lax.map(run, (vectors, keys), batch_size=min(_TOGETHER, subspaces))
    codes = jnp.moveaxis(codes.reshape(subspaces, -1, features), 0, 1)
    return pack_product(codes.reshape(*window, subspaces, features), table)


def _check_kernel(kernel: jax.Array) -> None:
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"expected a floating-point kernel, got {kernel.dtype}")
    if kernel.ndim < 2 or not kernel.size:
        raise ValueError(f"expected a kernel [..., channels, features], got {kernel.shape}")
    checks.values({"kernel": kernel})


def _kmeans(
    inputs: tuple[jax.Array, jax.Array], *, words: int, iterations: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cluster one subspace's sub-vectors [n, D]; return codes [n] int32 and words [words, D]."""
    vectors, key = inputs
    table = _spread_out(vectors, words, key)
    table = loops.fori_loop(0, iterations, lambda _, table: _lloyd(vectors, table), table)
    table = table.astype(dtype)
    return _nearest(vectors, table.astype(jnp.float32)), table


def _spread_out(vectors: jax.Array, words: int, key: jax.Array) -> jax.Array:
    """Return sub-vectors drawn one after the other, by squared distance from those before."""

    def draw(distances: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        word = vectors[_draw(distances, key)]
        return jnp.minimum(distances, _distances(vectors.T, word)), word

    keys = jax.random.split(key, words)
    first = vectors[jax.random.randint(keys[0], (), 0, len(vectors), jnp.int32)]
    others = loops.scan(draw, _distances(vectors.T, first), keys[1:])[1]
    return jnp.concatenate([first[None], others])


def _draw(weights: jax.Array, key: jax.Array) -> jax.Array:
    """Return an index drawn with a probability in proportion to its weight; any, if all are 0."""
    side = math.isqrt(len(weights) - 1) + 1
    rows = jnp.pad(weights, (0, side**2 - len(weights))).reshape(side, side)
    sums = jnp.sum(rows, axis=1)  # a running sum of all weights would be slower, and less exact
    share = jax.random.uniform(key, dtype=weights.dtype)  # under jax_enable_x64 too
    row, rest = _reach(sums, share * jnp.sum(sums))
    return row * side + _reach(rows[row], rest)[0]


def _reach(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where the running sum passes the target, and how far beyond its start that is."""
    until = jnp.cumsum(weights)
    index = jnp.argmax(until > target)
    # Sums that round may pass it nowhere, or at a weight of 0.
    index = jnp.where(weights[index] > 0, index, jnp.argmax(weights))
    return index, target - (until[index] - weights[index])


def _distances(columns: jax.Array, word: jax.Array) -> jax.Array:
    """Return the squared distances [n] of sub-vectors, given as columns [D, n], from a word [D]."""
    # Not a reduction over an axis: that would be slow on CPU.
    return functools.reduce(
        jnp.add, (jnp.square(column - entry) for column, entry in zip(columns, word, strict=True))
    )


def _nearest(vectors: jax.Array, table: jax.Array) -> jax.Array:
    """Return the number of the nearest word, int32 [n]; of equally near ones the lowest."""
    start = jnp.full(len(vectors), jnp.inf, jnp.float32), jnp.zeros(len(vectors), jnp.int32)
    return _least(functools.partial(_distances, vectors.T), table, start)[1]


def _least(
    score: Callable[[Any], jax.Array], words: Any, start: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the least of all words' scores [n] and of the start's, and whose it is, int32 [n].

    A word after the other against all of n: nothing [n, words] is held, and on CPU argmin over one
    is slow. Of equal scores the start's counts, then that of the lowest word.
    """

    def compare(least: tuple[jax.Array, jax.Array], item: tuple[jax.Array, Any]):
        (scores, codes), (number, word) = least, item
        own = score(word)
        return (jnp.minimum(own, scores), jnp.where(own < scores, number, codes)), None

    count = len(jax.tree.leaves(words)[0])
    items = jnp.arange(count, dtype=jnp.int32), words
    return loops.scan(compare, start, items, unroll=min(16, count))[0]


def _lloyd(vectors: jax.Array, table: jax.Array) -> jax.Array:
    codes = _nearest(vectors, table)
    members = jnp.zeros(len(table), table.dtype).at[codes].add(1.0)
    # About the old words: a cluster of equal sub-vectors lands on them exactly.
    shift = jnp.zeros_like(table).at[codes].add(vectors - table[codes])
    return table + shift / jnp.maximum(members, 1.0)[:, None]


# Responses ---------------------------------------------------------------------------------------


class Response(NamedTuple):
    """What a layer is asked for, summed over places: enough to correct it, whatever their number.

    Two of these add up (`jax.tree.map(jnp.add, ...)`): batches, or devices.
    """

    gram: jax.Array  # [P C, P C] float32, inputs by inputs; P positions of the window, C channels
    cross: jax.Array  # [P C, features] float32, inputs by wanted responses
    energy: jax.Array  # float32 scalar, sum of squared wanted responses


def observe(
    inputs: jax.Array,
    wanted: jax.Array,
    *,
    window: Sequence[int] = (),
    window_strides: Sequence[int] | int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    kernel_dilation: Sequence[int] | int = 1,
) -> Response:
    """Return the sums over a batch that `correct` needs.

    Args:
      inputs: [batch, *space, channels], what the layer gets: from the front of the network as it
        is already quantized. A dense layer takes any axes before the channels.
      wanted: [batch, *space, features], what it should answer, before the bias: what the float
        network's layer does with the float network's inputs.
      window: of a convolution; () for a dense layer.
      window_strides, padding, kernel_dilation: of the convolution, see `jaxquant.conv`.

    Returns:
      Response. Pure, under jit too. Takes (P C)**2 floats; cost O(places (P C)**2).

    Raises:
      ValueError: if the shapes do not fit.

    >>> observe(jnp.ones((5, 4)), jnp.ones((5, 3))).gram.shape
    (4, 4)
    """
    inputs, wanted = jnp.asarray(inputs), jnp.asarray(wanted)
    options = window_options(window, window_strides, padding, kernel_dilation)
    return compiled(_observe, inputs, wanted, options=options)


def _observe(inputs: jax.Array, wanted: jax.Array, *, options: Windows) -> Response:
    rows = windows(inputs, options)
    if rows.shape[:-1] != wanted.shape[:-1]:
        raise ValueError(
            f"expected wanted responses of shape {rows.shape[:-1]} and features, got {wanted.shape}"
        )
    rows = rows.reshape(-1, rows.shape[-1])
    wanted = wanted.astype(jnp.float32).reshape(-1, wanted.shape[-1])
    dot = functools.partial(jnp.matmul, precision=_PRECISION)
    return Response(dot(rows.T, rows), dot(rows.T, wanted), jnp.sum(jnp.square(wanted)))


def response_error(kernel: jax.Array, response: Response) -> jax.Array:
    """Return the squared error of a float kernel's responses over their squares, float32 scalar."""
    return compiled(_response_error, kernel, response)


def _response_error(kernel: jax.Array, response: Response) -> jax.Array:
    matrix = kernel.astype(jnp.float32).reshape(response.cross.shape)
    rest = response.cross - jnp.matmul(response.gram, matrix, precision=_PRECISION)
    return _error(matrix, response.cross, rest, response.energy)


def _error(kernel: jax.Array, cross: jax.Array, rest: jax.Array, energy: jax.Array) -> jax.Array:
    """Return the error of a kernel, given inputs by what is missing from the wanted responses."""
    squares = energy - jnp.sum(kernel * cross) - jnp.sum(kernel * rest)
    return squares / jnp.where(energy > 0, energy, 1.0)


# Error correction --------------------------------------------------------------------------------


class _Block(NamedTuple):
    """One subspace while it is corrected."""

    words: jax.Array  # [K, D]
    codes: jax.Array  # [P, features] int32
    rest: jax.Array  # [P, D, features]: inputs by what is missing from the wanted responses


def correct(
    array: ProductArray, response: Response, *, sweeps: int = 2
) -> tuple[ProductArray, jax.Array]:
    """Improve words and codes so that the layer answers as wanted: block coordinate descent.

    Minimizes `sum |wanted - kernel^T inputs|**2`, a subspace after the other: each of its words to
    the least squares of what the others leave, then each code to the word that leaves least, window
    position after position. Every step is exact given the rest, so the error never rises, but for
    rounding. Works on the sums in `response` alone. Cost of a sweep O((P C)**2 features), in
    float32; memory that of `response`.

    Args:
      array: from `cluster`.
      response: of the layer, from `observe`.
      sweeps: over all subspaces.

    Returns:
      The corrected ProductArray, and the errors [sweeps + 1] over the squares of the wanted
      responses, before the first and after each sweep.

    Raises:
      ValueError: if the response is not of such a kernel.

    >>> kernel, x = jax.random.normal(jax.random.key(0), (8, 16)), jnp.tril(jnp.ones((8, 8)))
    >>> array = cluster(kernel, words=4, length=2, key=jax.random.key(1))
    >>> _, errors = correct(array, observe(x, x @ kernel))
    >>> bool(errors[-1] < errors[0])
    True
    """
    *window, channels, features = array.shape
    positions = math.prod(window)
    if response.cross.shape != (positions * channels, features):
        raise ValueError(
            f"expected a response of {positions * channels} inputs and {features} features, "
            f"got {response.cross.shape}"
        )
    sweeps = checks.integer("sweeps", sweeps, least=0)
    return compiled(_correct, array, response, sweeps=sweeps)


def _correct(
    array: ProductArray, response: Response, *, sweeps: int
) -> tuple[ProductArray, jax.Array]:
    *window, _, features = array.shape
    positions, (subspaces, _, length) = math.prod(window), array.words.shape
    by_subspace = (positions, subspaces, length)
    gram = response.gram.reshape(*by_subspace, *by_subspace).transpose(1, 0, 2, 4, 3, 5)
    cross = response.cross.reshape(*by_subspace, features).transpose(1, 0, 2, 3)
    codes = jnp.moveaxis(product_codes(array).reshape(positions, subspaces, features), 1, 0)
    run = max(n for n in range(1, min(subspaces, _RUN) + 1) if subspaces % n == 0)

    def missing(words: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return inputs by what is missing from the wanted responses, and the error."""
        kernel = _kernel(words, codes)
        got = jnp.einsum("mpdnqe,nqet->mpdt", gram, kernel, precision=_PRECISION)
        return cross - got, _error(kernel, cross, cross - got, response.energy)

    def sweep(carry: tuple[jax.Array, jax.Array], _: None):
        rest, error = missing(*carry)  # anew: roundings do not add up
        correct_run = functools.partial(_correct_run, gram, run)
        words, codes, _ = loops.fori_loop(0, subspaces // run, correct_run, (*carry, rest))
        return (words, codes), error

    start = array.words.astype(jnp.float32), codes
    (words, codes), errors = loops.scan(sweep, start, length=sweeps)
    errors = jnp.append(errors, missing(words, codes)[1])
    codes = jnp.moveaxis(codes, 0, 1).reshape(array.codes.shape)
    return pack_product(codes, words.astype(array.dtype)), errors


def _kernel(words: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the weights [M, P, D, features] of words [M, K, D] and codes [M, P, features]."""
    return jnp.moveaxis(jax.vmap(lambda table, code: table[code])(words, codes), -1, -2)


def _correct_run(
    gram: jax.Array, run: int, number: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Correct neighbouring subspaces one after the other, and then what they leave to the others.

    The same numbers as telling all others after each subspace, but for rounding; a pass over what
    is missing from all responses serves for many subspaces.
    """

    def own(x: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, number * run, run, axis)

    (words, codes, rest), rows = carry, own(gram)
    change_one = functools.partial(_correct_subspace, own(rows, 3))
    parts = own(words), own(codes), own(rest)
    new_words, new_codes, _ = loops.fori_loop(0, run, change_one, parts)
    change = _kernel(new_words, new_codes) - _kernel(*parts[:2])  # [run, P, D, features]
    rest -= jnp.einsum("mpdnqe,mpdt->nqet", rows, change, precision=_PRECISION)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    start = number * run
    return put(words, new_words, start), put(codes, new_codes, start), rest


def _correct_subspace(
    gram: jax.Array, m: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    words, codes, rest = carry
    own = gram[m][:, :, m]  # [P, D, P, D]
    block = _Block(words[m], codes[m], rest[m])
    before = block.words[block.codes]
    block = _move_words(own, block)
    block, _ = loops.scan(functools.partial(_move_codes, own), block, jnp.arange(codes.shape[1]))
    change = block.words[block.codes] - before  # [P, features, D]
    rest -= jnp.einsum("pdnqe,ptd->nqet", gram[m], change, precision=_PRECISION)
    return words.at[m].set(block.words), codes.at[m].set(block.codes), rest


def _move_words(own: jax.Array, block: _Block) -> _Block:
    """Move all words to their least squares; `own` is the Gram matrix of the subspace's inputs."""
    if own.shape[0] > 1:
        numbers = jnp.arange(block.words.shape[0])
        return loops.scan(functools.partial(_move_word, own), block, numbers)[0]
    # At a single position no response is of two words: all of them at once.
    codes, dot = block.codes[0], functools.partial(jnp.matmul, precision=_PRECISION)
    zeros = jnp.zeros_like(block.words)
    members = jnp.maximum(zeros[:, 0].at[codes].add(1.0), 1.0)
    slopes = zeros.at[codes].add(block.rest[0].T) / members[:, None]
    matrix = own[0, :, 0]
    steps = jnp.linalg.solve(_regular(matrix), slopes.T).T
    moved = dot(matrix, steps[codes].T)[None]
    return block._replace(words=block.words + steps, rest=block.rest - moved)


def _move_word(own: jax.Array, block: _Block, number: jax.Array) -> tuple[_Block, None]:
    """Move one word to its least squares, which may meet others at other positions."""
    members = (block.codes == number).astype(jnp.float32)  # [P, features]
    together = jnp.matmul(members, members.T, precision=_PRECISION)
    matrix = jnp.einsum("pq,pdqe->de", together, own, precision=_PRECISION)
    slope = jnp.einsum("pt,pdt->d", members, block.rest, precision=_PRECISION)
    step = jnp.linalg.solve(_regular(matrix), slope)
    moved = jnp.einsum("pdqe,e,qt->pdt", own, step, members, precision=_PRECISION)
    return block._replace(words=block.words.at[number].add(step), rest=block.rest - moved), None


def _regular(matrix: jax.Array) -> jax.Array:
    """Return a Gram matrix that can be solved for: inputs that are always zero move nothing."""
    ridge = _RIDGE * jnp.trace(matrix) / len(matrix)
    return matrix + jnp.where(ridge > 0, ridge, 1.0) * jnp.eye(len(matrix), dtype=matrix.dtype)


def _move_codes(own: jax.Array, block: _Block, position: jax.Array) -> tuple[_Block, None]:
    """Give each feature the word that leaves least, at one position of the window."""
    matrix = own[position][:, position]  # [D, D]
    codes = block.codes[position]
    old = block.words[codes]  # [features, D]
    dot = functools.partial(jnp.matmul, precision=_PRECISION)
    # |wanted - response|**2 with another word in place of the old, without what is the same.
    target = 2 * (block.rest[position].T + dot(old, matrix)).T
    squares = jnp.sum(block.words * dot(block.words, matrix), axis=-1)

    def left(word: tuple[jax.Array, jax.Array]) -> jax.Array:
        square, entries = word
        products = (row * entry for row, entry in zip(target, entries, strict=True))
        return square - functools.reduce(jnp.add, products)

    start = left((squares[codes], old.T)), codes
    codes = _least(left, (squares, block.words), start)[1]
    change = block.words[codes] - old
    moved = jnp.einsum("pde,te->pdt", own[:, :, position], change, precision=_PRECISION)
    return block._replace(codes=block.codes.at[position].set(codes), rest=block.rest - moved), None
