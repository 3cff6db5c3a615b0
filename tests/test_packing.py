"""Packing: the fewest whole bits, exact round trips, stacked layers, errors."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import CASES, on_blocks, packed_blocks

import jaxquant as jq
from jaxquant.packing import arrays
from jaxquant.packing import codes as layout
from tests.cases import mostly_slow


def random_codes(k: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, k, shape).astype(np.uint8)


def on_codebook(k: int, shape: tuple[int, ...], axis: int | None = None, dtype: str = "float32"):
    """Return random weights on a random codebook, one for each slice along `axis`."""
    rng, slices = np.random.default_rng(0), (k,)
    if axis is not None:
        slices = (*(n if i == axis % len(shape) else 1 for i, n in enumerate(shape)), k)
    codebook = np.sort(np.asarray(jnp.asarray(rng.normal(size=slices), dtype)), axis=-1)
    tables = np.broadcast_to(codebook, (*shape, k))
    codes = random_codes(k, (*shape, 1)).astype(int)
    return jnp.asarray(np.take_along_axis(tables, codes, axis=-1)[..., 0]), jnp.asarray(codebook)


def tree_of(weights, codebook):
    """Return a tree with that leaf and one that is left alone, and its state after all rounds."""
    params = {"a": {"w": weights}, "b": jnp.ones(3)}
    nothing = jnp.bool_(False)
    state = jq.QuantState(
        codebooks={"a": {"w": codebook}, "b": jnp.zeros(())},
        frozen={"a": {"w": jnp.ones_like(weights, bool)}, "b": nothing},
        frozen_centroids={"a": {"w": jnp.ones_like(codebook, bool)}, "b": nothing},
        round=jnp.int32(1),
    )
    return params, state


BITS = {1: 0, 2: 1, 3: 8 / 5, 4: 2, 5: 7 / 3, 6: 8 / 3, 8: 3, 9: 3.5, 11: 3.5, 12: 4, 16: 4}
BITS |= {17: 5, 32: 5, 33: 6, 64: 6, 65: 7, 128: 7, 129: 8, 256: 8}
SHAPES = [((64,), None), ((12, 7), None), ((3, 3, 5, 8), None)]  # shape, axis of the slices
SHAPES += [((3, 3, 5, 8), -1), ((4, 20, 6), 0), ((20, 18), 0), ((6, 20, 4), 1)]
SHAPES += [((1, 20, 6), 0), ((20, 1), 1), ((5, 1, 6), 1)]  # a single slice

pack_codes = jax.jit(layout.pack_codes, static_argnums=1)
unpack_codes = jax.jit(layout.unpack_codes, static_argnums=(1, 2))
pack_array = jax.jit(arrays.pack_array)
unpack = jax.jit(jq.unpack)


@pytest.mark.parametrize(("k", "bits"), BITS.items())
def test_codes_take_the_fewest_whole_bits_and_come_back(k, bits):
    for rows in (8 * 5 * 3 * 2, 29, 1, 0):
        codes = random_codes(k, (rows, 2))
        packed = pack_codes(codes, k)
        assert packed.shape == (layout.packed_rows(rows, k), 2) and packed.dtype == jnp.uint8
        np.testing.assert_array_equal(unpack_codes(packed, rows, k), codes)
        if rows == 240:
            assert 8 * packed.shape[0] / rows == pytest.approx(bits)


def test_rows_of_codes_are_those_of_all_codes():
    random, unpack_rows = (
        np.random.default_rng(0),
        jax.jit(layout.unpack_rows, static_argnums=(2, 3)),
    )
    for k in range(1, 257):
        for rows in (1, 17, 100):
            codes = random.integers(0, k, (rows, 5))
            packed, numbers = layout.pack_codes(codes, k), random.integers(0, rows, (3, 4))
            found = layout.unpack_rows(packed, numbers, rows, k)
            np.testing.assert_array_equal(found, codes[numbers])
            if k in (3, 5, 17) and rows == 17:
                np.testing.assert_array_equal(unpack_rows(packed, numbers, rows, k), found)


def test_every_k_has_the_smallest_symbol():
    for k in range(1, 257):
        digits, bits = layout.symbol(k)
        assert k**digits <= 2**bits <= 256
        fewest = min(math.ceil(math.log2(k) * d) / d for d in range(1, 9) if k**d <= 256)
        assert bits / digits == fewest


def test_the_layout_is_the_documented_one():
    # k = 17: the low four bits of symbols s and s + 4 share a byte, then the fifth bits of all.
    codes = np.array([[3], [16], [0], [7], [12], [16], [1]])
    packed = np.asarray(layout.pack_codes(jnp.asarray(codes), 17)).ravel()
    np.testing.assert_array_equal(packed, [3 + 16 * 12, 0 + 16 * 0, 0 + 16 * 1, 7 + 0, 0b0100010])


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize(
    ("k", "dtype"),
    mostly_slow([(3, "float32"), (17, "bfloat16"), (5, "float16")], (17, "bfloat16")),
)
def test_arrays_come_back_bit_for_bit(dtype, shape, axis, k):
    weights, codebook = on_codebook(k, shape, axis, dtype)
    packed = pack_array(weights, codebook)
    assert packed.shape == shape and packed.dtype == dtype and packed.k == k
    assert packed.size == math.prod(shape) and packed.ndim == len(shape)
    back = np.asarray(unpack(packed))
    np.testing.assert_array_equal(back.view(np.uint8), np.asarray(weights).view(np.uint8))


@pytest.mark.parametrize("name", CASES)
def test_blocks_come_back_bit_for_bit(name):
    case = CASES[name]
    weights, codebook, scale = on_blocks(case)
    packed = pack_array(weights, codebook, scale)
    assert packed.shape == case.shape and packed.numbers == case.numbers and packed.k == case.k
    assert packed.dtype == case.dtype == packed.centroids.dtype
    assert packed.codebook.dtype == case.codebook_dtype
    assert packed.centroids.shape == (*case.numbers, case.k)
    np.testing.assert_array_equal(np.asarray(unpack(packed)).view(np.uint8), bits_of(weights))
    expected, _ = packed_blocks(case)  # by NumPy, where equal centroids have codes of their own
    assert jax.tree.structure(packed) == jax.tree.structure(expected)
    assert packed.nbytes == expected.nbytes
    chex.assert_trees_all_equal_shapes_and_dtypes(packed, expected)
    np.testing.assert_array_equal(np.asarray(unpack(expected)).view(np.uint8), bits_of(weights))


def test_what_has_one_codebook_is_a_stack_only_if_that_is_of_layers():
    weights, codebook = jnp.ones((1, 1, 4, 6)), jnp.arange(3.0)  # the kernel of a convolution
    for own, layers in (((), 0), ((1, 1, 1, 1), 1), ((1, 1, 1, 6), 0), ((1, 1, 2, 3), 0)):
        packed = pack_array(weights, jnp.broadcast_to(codebook, (*own, 3)))
        assert packed.codes.ndim == 2 + layers and packed.shape == weights.shape
        assert packed.numbers == (own or (1, 1, 1, 1))


def bits_of(x):
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("name", ["scaled integers", "scaled layers"])
def test_scaled_leaves_of_a_tree_are_packed_with_their_scales(name):
    weights, codebook, scale = on_blocks(CASES[name])
    params, state = tree_of(weights, codebook)
    state = state._replace(scales={"a": {"w": scale}, "b": jnp.zeros(())})
    packed = jq.pack(params, state)
    np.testing.assert_array_equal(packed["a"]["w"].scale, scale)
    assert packed["b"] is params["b"]
    chex.assert_trees_all_equal(jq.unpack(packed), params)
    params["a"]["w"] = weights.at[..., 0].mul(1.5)
    with pytest.raises(ValueError, match=r"a/w: expected every weight .* got \d+ of"):
        jq.pack(params, state)


@pytest.mark.parametrize("name", ["groups of layers", "scaled layers"])
def test_blocks_of_stacked_layers_are_taken_apart_by_vmap_and_scan(name):
    packed, weights = packed_blocks(CASES[name])
    x = jnp.ones((2, weights.shape[1]))

    def layer(x, one):
        assert one.shape == weights.shape[1:] and one.numbers == CASES[name].numbers[1:]
        return x, (jq.unpack(one), jq.matmul(x, one, preferred_element_type=jnp.float32))

    _, (unpacked, products) = jax.jit(lambda x, p: jax.lax.scan(layer, x, p))(x, packed)
    np.testing.assert_array_equal(unpacked, weights)
    mapped = jax.jit(jax.vmap(lambda x, p: layer(x, p)[1], in_axes=(None, 0)))(x, packed)
    chex.assert_trees_all_close(mapped, (unpacked, products), rtol=1e-5, atol=1e-5)
    expected = np.broadcast_to(weights.astype(np.float32).sum(axis=1)[:, None], products.shape)
    np.testing.assert_allclose(products, expected, rtol=1e-4, atol=1e-4)


def test_exported_functions_take_packed_arrays_and_refuse_older_ones():
    packed, weights = packed_blocks(CASES["scaled integers"])
    data = jax.export.export(jax.jit(lambda p: (p, jq.unpack(p))))(packed).serialize()
    same, unpacked = jax.export.deserialize(data).call(packed)
    chex.assert_trees_all_equal(same, packed)
    np.testing.assert_array_equal(unpacked, weights)
    for old in (b"[[16], [12]]", b"[2, [16], [12]]", b'[2, [16], [-1], "float32"]', b"{", b"5"):
        with pytest.raises(ValueError, match="expected version 2 of a PackedArray"):
            arrays._read_static(old, kind=jq.PackedArray)
    for odd in (b'[2, [16], [12], "int32"]', b'[2, [16], [12], "evil"]', b"[2, [1.5], [], null]"):
        with pytest.raises(ValueError, match="expected version 2 of a PackedArray"):
            arrays._read_static(odd, kind=jq.PackedArray)
    with pytest.raises(ValueError, match="expected version 2 of a ProductArray"):
        arrays._read_static(b"[]", kind=jq.ProductArray)


@pytest.mark.parametrize(
    ("codebook", "scale", "message"),
    [
        ((5, 1, 3), None, r"codebooks for weights of shape \(12, 8\), got shape \(5, 1, 3\)"),
        ((1, 3), None, "expected codebooks for weights"),
        ((1, 1, 3), (5, 1, 1), "expected codebooks for weights"),
        ((1, 1, 3), (3, 1, 3), r"expected a scale \[\*numbers, 1\]"),
        ((2, 1, 3), (3, 1, 1), r"expected a scale \[\*numbers, 1\]"),
        ((3,), (3, 1, 1), r"expected a scale \[\*numbers, 1\]"),
    ],
)
def test_codebooks_and_scales_that_do_not_fit_are_refused(codebook, scale, message):
    scale = None if scale is None else jnp.ones(scale)
    with pytest.raises(ValueError, match=message):
        jq.pack_array(jnp.ones((12, 8)), jnp.ones(codebook), scale)


def test_dtypes_that_no_product_has_are_refused():
    weights, codebook = jnp.ones((12, 8)), jnp.ones((1, 1, 3))
    with pytest.raises(ValueError, match="of floating point, got int32"):
        jq.pack_array(jnp.ones((12, 8), jnp.int32), codebook)
    with pytest.raises(ValueError, match="or of int8 with a scale, got int8"):
        jq.pack_array(weights, codebook.astype(jnp.int8))
    with pytest.raises(ValueError, match="a scale of float32 or bfloat16, got float16"):
        jq.pack_array(weights, codebook, jnp.ones((3, 8, 1), jnp.float16))


def test_trees_come_back_bit_for_bit_in_and_out_of_jit():
    params, state = tree_of(*on_codebook(3, (12, 7)))
    packed = jq.pack(params, state)
    assert isinstance(packed["a"]["w"], jq.PackedArray) and packed["b"] is params["b"]
    chex.assert_trees_all_equal(jq.unpack(packed), params)
    chex.assert_trees_all_equal(unpack(packed), params)
    chex.assert_trees_all_equal(jax.jit(jq.pack)(params, state), packed)


def test_a_tree_of_the_last_round_packs():
    params = {"w": jax.random.normal(jax.random.key(0), (12, 7))}
    plan = jq.slq(params, bits=2, rounds=(1, 3))
    quantize = jax.jit(jq.quantize_round, static_argnums=0)
    params, state, _ = quantize(plan, params, jq.init(plan, params))
    with pytest.raises(ValueError, match=r"w: expected every weight .* got \d+ of 84"):
        jq.pack(params, state)
    params, state, _ = quantize(plan, params, state)
    chex.assert_trees_all_equal(jq.unpack(jq.pack(params, state)), params)


@pytest.mark.default_promotion
@pytest.mark.slow
def test_a_tree_of_blocks_packs_after_the_last_round(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"tiles": (8, 128), "scaled": (16, 6), "layers": (2, 8, 6)}
    params = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in shapes.items()}
    rules = [
        jq.LayerRule("tiles", block=(8, 64), k=8, centroid_dtype="float8_e4m3fn"),
        jq.LayerRule("scaled", block=(8, 1), k=3, scaled=True, centroid_dtype="int8"),
        jq.LayerRule("layers", block=(1, 4, 1), k=3, scaled=True),
    ]
    plan = jq.slq(params, rounds=(8,), rules=rules)
    quantize = jax.jit(jq.quantize_round, static_argnums=0)
    params, state, _ = quantize(plan, params, jq.init(plan, params))
    packed = jq.pack(params, state)
    assert packed["tiles"].codebook.dtype == jnp.float8_e4m3fn
    assert packed["scaled"].codebook.dtype == jnp.int8 and packed["layers"].codes.ndim == 3
    chex.assert_trees_all_equal(jq.unpack(packed), params)
    jq.save(tmp_path / "x", packed)
    chex.assert_trees_all_equal(jq.load(tmp_path / "x"), packed)
    report = jq.report(params, state)
    assert report.bytes == sum(one.nbytes for one in packed.values()) and report.frozen == 1
    np.testing.assert_array_equal(
        jq.unpack(jq.from_lut_b(jq.to_lut_b(packed["tiles"]))), params["tiles"]
    )


@pytest.mark.parametrize("shape", [(4, 20, 6), (1, 20, 6), (1, 1, 6), (1, 3, 2, 5), (3, 1, 1)])
def test_stacked_layers_are_taken_apart_by_vmap_and_scan(shape):
    weights, codebook = on_codebook(3, shape, axis=0)
    packed = pack_array(weights, codebook)
    layers, *inputs, outputs = shape
    assert packed.codes.shape == (layers, layout.packed_rows(math.prod(inputs), 3), outputs)

    def layer(x, one):
        assert one.shape == shape[1:]
        np.testing.assert_equal(jq.matmul(jnp.ones(inputs), one).shape, (outputs,))
        return x, jq.unpack(one)

    _, unpacked = jax.lax.scan(layer, 0, packed)
    np.testing.assert_array_equal(unpacked, weights)
    np.testing.assert_array_equal(jax.vmap(jq.unpack)(packed), weights)


def test_five_ternary_weights_take_a_byte_in_memory():
    assert pack_array(*on_codebook(3, (640, 50))).nbytes == 640 * 50 // 5 + 3 * 4


def test_minus_zero_comes_back_as_zero():
    codebook = jnp.array([-1.0, -0.0, 1.0])
    params, state = tree_of(jnp.array([[-0.0, 0.0], [1.0, -1.0]]), codebook)
    back = jq.unpack(jq.pack(params, state))["a"]["w"]
    assert np.signbit(back).tolist() == [[False, False], [False, True]]


def test_an_empty_tree_and_one_without_quantized_leaves_pass():
    assert jq.unpack({}) == {}
    state = jq.QuantState({"b": jnp.zeros(())}, {"b": jnp.bool_(False)}, {}, jnp.int32(0))
    params = {"b": jnp.ones(3)}
    assert jq.pack(params, state)["b"] is params["b"]


def test_weights_off_their_codebook_are_refused_by_name():
    weights, codebook = on_codebook(3, (8, 4))
    params, state = tree_of(weights.at[1, 1].add(0.25).at[0, 0].set(jnp.nan), codebook)
    with pytest.raises(ValueError, match=r"a/w: expected every weight .* got 2 of 32"):
        jq.pack(params, state)


def test_trees_that_differ_are_refused():
    params, state = tree_of(*on_codebook(3, (8, 4)))
    with pytest.raises(ValueError, match="expected params to have the state's structure"):
        jq.pack({"a": params["a"]}, state)


def test_scalars_and_more_than_256_centroids_are_refused_by_name():
    params, state = tree_of(*on_codebook(257, (8, 4)))
    with pytest.raises(ValueError, match="a/w: expected k from 1 to 256, got 257"):
        jq.pack(params, state)
    params, state = tree_of(jnp.float32(1.0), jnp.ones(1))
    with pytest.raises(ValueError, match="a/w: expected a weight with at least one axis"):
        jq.pack(params, state)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 11, 17, 256])
def test_codes_of_numpy_are_packed_as_those_of_jax_and_stay_of_numpy(k):
    codes = np.random.default_rng(k).integers(0, k, (2, 37, 3)).astype(np.uint8)
    packed = layout.pack_codes(codes, k)
    unpacked = layout.unpack_codes(packed, 37, k)
    assert type(packed) is type(unpacked) is np.ndarray
    np.testing.assert_array_equal(unpacked, codes)
    np.testing.assert_array_equal(layout.pack_codes(jnp.asarray(codes), k), packed)
