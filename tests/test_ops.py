"""Products with packed weights against the products with unpacked ones."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import CASES, Case, made, packed_blocks
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant import cpp, platform
from jaxquant.packing.ops import IMPLEMENTATIONS, blocks, choice
from tests.cases import mostly_slow

NARROW = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16")
HERE = [name for name in IMPLEMENTATIONS if name != "native" or cpp.missing() is None]
OF_CODES = tuple(name for name in HERE if name != "words")  # see tests/test_product.py
BEST = "native" if "native" in HERE else "blocks"  # on CPU
matmul = jax.jit(jq.matmul, static_argnames=("implementation", "preferred_element_type"))


def packed_array(k, shape, *, axis=None, dtype="float32"):
    rng, slices = np.random.default_rng(k), (k,)
    if axis is not None:
        slices = (*(n if i == axis % len(shape) else 1 for i, n in enumerate(shape)), k)
    codebook = jnp.asarray(np.sort(rng.normal(size=slices), axis=-1), dtype)
    weights = jnp.asarray(rng.normal(size=shape), dtype)
    return jax.jit(jq.pack_array)(weights, codebook)


KERNEL = packed_array(3, (3, 3, 4, 8))


def normal(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def supported(implementation, k, axis):
    """What the docs of the implementations say."""
    few = {"triton": 256, "mosaic": 17}
    if implementation not in few:
        return True
    return axis is None or (axis == -1 and k <= few[implementation])


@pytest.fixture
def one_device(monkeypatch):
    """What is chosen on one device, of CPU, also for weights as small as those here."""
    monkeypatch.setattr(platform, "is_one_device", lambda: True)
    monkeypatch.setattr(choice, "_FEW_WEIGHTS", 0)


@pytest.mark.parametrize("axis", [None, -1, 0])
@pytest.mark.parametrize(
    ("implementation", "k"),
    mostly_slow(
        [
            *itertools.product(
                (None, "unpack", "native", "blocks"), (2, 3, 4, 5, 6, 10, 11, 16, 17, 200)
            ),
            *itertools.product(("triton", "mosaic"), (2, 3, 5, 17, 200)),
        ],
        *itertools.product((None, "native", "blocks", "triton", "mosaic"), (3, 17)),
        *itertools.product(("unpack", "blocks"), (2, 5, 10, 200)),
    ),
)
def test_matmul_is_that_of_the_unpacked_weight(k, axis, implementation):
    packed, x = packed_array(k, (70, 24), axis=axis), normal(2, 3, 70)
    if implementation not in (None, *HERE):
        pytest.skip(cpp.missing())
    if not supported(implementation, k, axis):
        with pytest.raises(ValueError, match=f"that '{implementation}' supports, got k={k}, code"):
            jq.matmul(x, packed, implementation=implementation)
        return
    expected = np.asarray(x, np.float64) @ np.asarray(jq.unpack(packed), np.float64)
    y = matmul(x, packed, implementation=implementation)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    y = matmul(x[0, 0], packed, implementation=implementation)
    np.testing.assert_allclose(y, expected[0, 0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["blocks", "triton", "mosaic"])
@pytest.mark.parametrize(
    ("k", "rows", "columns", "vectors"),
    [(3, 1500, 300, 5), (17, 2100, 130, 1), (200, 300, 70, 150)],
)
def test_matmul_takes_weights_of_several_blocks(
    k, rows, columns, vectors, implementation, monkeypatch
):
    monkeypatch.setattr(blocks, "_WEIGHTS", (2**13, 2**13))
    packed, x = packed_array(k, (rows, columns)), normal(vectors, rows)
    expected = np.asarray(x, np.float64) @ np.asarray(jq.unpack(packed), np.float64)
    y = matmul(x, packed, implementation=implementation)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=3e-4)


BLOCKS = {  # which implementations there are beside "unpack", "native" and "blocks"
    "tiles": (Case((40, 24), (5, 6), 8, "float32", "float8_e4m3fn"), ()),
    "groups": (Case((40, 21), (4, 21), 5), ()),
    "rows": (Case((40, 21), (8, 1), 3), ()),
    "wide": (Case((40, 24), (2, 2), 16), ()),
    "bands": (Case((40, 24), (1, 2), 5), ("triton", "mosaic")),
    "bands of columns": (Case((40, 21), (1, 7), 17), ("triton", "mosaic")),
    "scaled groups": (CASES["scaled groups"], ()),
    "scaled integers": (CASES["scaled integers"], ()),
    "scaled columns": (CASES["scaled columns"], ("triton", "mosaic")),
    "rounded columns": (CASES["scaled columns"]._replace(dtype="bfloat16"), ("triton", "mosaic")),
    "a scale": (CASES["scaled columns"]._replace(numbers=(1, 1)), ("triton", "mosaic")),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_matmul_takes_blocks_of_all_kinds(name, monkeypatch):
    # So few that there are several, also in a block of columns.
    monkeypatch.setattr(blocks, "_WEIGHTS", (160, 160))
    case, others = BLOCKS[name]
    packed, weights = packed_blocks(case)
    x = normal(3, case.shape[0])
    expected = np.asarray(x, np.float64) @ weights.astype(np.float64)
    for implementation in HERE:
        product = functools.partial(matmul, x, packed, implementation=implementation)
        if implementation in ("unpack", "native", "blocks", *others):
            np.testing.assert_allclose(product(), expected, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(ValueError, match=f"that '{implementation}' supports"):
                product()
    assert matmul(x, packed).dtype == jnp.float32


@given(
    vectors=st.integers(1, 2**12),
    rows=st.integers(1, 2**20),
    blocks_=st.integers(1, 300),
    own=st.integers(1, 300),
)
def test_pieces_are_whole_blocks_or_lie_in_one(vectors, rows, blocks_, own):
    columns = blocks_ * own
    width = blocks._width(vectors, rows, columns, own)
    assert 1 <= width < max(columns, 2)
    assert blocks_ == 1 or width % own == 0 or (own % width == 0 and columns % width == 0)
    most = min(max(2**18, 2**11 * vectors), 2**20)
    assert width == 1 or rows * width <= 2 * max(most, rows * own)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("tiles", "blocks"), ("scaled groups", "unpack"), ("scaled columns", "native")],
)
def test_derivatives_by_codebooks_and_scales_are_those_of_the_plain_product(name, implementation):
    case = CASES[name]._replace(codebook_dtype="float32")
    packed, x = packed_blocks(case)[0], normal(2, case.shape[0])
    codes = made(case)[1].astype(int)
    block = np.ix_(
        *(np.arange(n) // (n // m) for n, m in zip(case.shape, case.numbers, strict=True))
    )

    def own(x, tables):
        weight = dataclasses.replace(packed, codebook=tables[0], scale=tables[1])
        return jnp.sum(jnp.sin(jq.matmul(x, weight, implementation=implementation)))

    def plain(x, tables):
        codebook, scale = tables
        centroids = jnp.broadcast_to(codebook, (*case.numbers, case.k))
        centroids = centroids if scale is None else centroids * scale
        return jnp.sum(jnp.sin(x @ centroids[(*block, codes)]))

    scale = None if packed.scale is None else packed.scale.astype(jnp.float32)
    gradients = [jax.jit(jax.grad(f, argnums=(0, 1))) for f in (own, plain)]
    chex.assert_trees_all_close(
        *(f(x, (packed.codebook, scale)) for f in gradients), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["groups", "scaled groups", "tiles"])
def test_the_default_unpacks_blocks_a_piece_at_a_time(name, one_device):
    shape, numbers = (2048, 512), {"tiles": (256, 8)}.get(name, (16, 512))
    case = CASES[name]._replace(shape=shape, numbers=numbers, k=16)
    packed, _ = packed_blocks(case)
    compiled = jax.jit(jq.matmul).lower(normal(1, 2048), packed).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * math.prod(shape)
    assert choice.fastest(1, normal(1, 2048), packed) == BEST


@pytest.mark.parametrize("implementation", OF_CODES)
def test_matmul_of_no_vectors_is_empty(implementation):
    packed = packed_array(3, (40, 8))
    assert matmul(jnp.ones((2, 0, 40)), packed, implementation=implementation).shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "result"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float8_e4m3fn", "bfloat16"),
        ("float8_e5m2", "float32", "float32"),
        ("float8_e5m2", "float16", "float16"),
        ("float8_e5m2", "float8_e5m2", "float8_e5m2"),
        ("float8_e4m3", "float8_e5m2", "float8_e4m3"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("float16", "bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("implementation", OF_CODES)
def test_matmul_has_the_dtype_of_the_plain_product(x_dtype, dtype, result, implementation):
    packed, x = packed_array(3, (40, 8), dtype=dtype), normal(5, 40, dtype=x_dtype)
    y = matmul(x, packed, implementation=implementation)
    assert y.dtype == result
    expected = np.asarray(x, np.float64) @ np.asarray(jq.unpack(packed), np.float64)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}.get(result, 0.3)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance)
    assert matmul(x, packed, preferred_element_type="float16").dtype == jnp.float16


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "implementation", [name for name in HERE if name in ("unpack", "native", "blocks")]
)
def test_gradients_have_the_dtypes_of_narrow_floats(dtype, implementation):
    packed, x = packed_array(4, (40, 8), dtype=dtype), normal(3, 40, dtype=dtype)
    product = product_with(packed, implementation, preferred_element_type="float32")

    def loss(x, codebook):
        return jnp.sum(product(x, codebook))

    to_x, to_codebook = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, packed.codebook)
    assert to_x.dtype == to_codebook.dtype == x.dtype
    expected = np.asarray(jq.unpack(packed), np.float32).sum(axis=1)
    np.testing.assert_allclose(np.asarray(to_x[0], np.float32), expected, rtol=0.13, atol=0.1)


@pytest.mark.parametrize(
    ("name", "platform_name", "k", "vectors"),
    [
        (BEST, "cpu", 3, 1),
        (BEST, "cpu", 200, 128),
        ("blocks", "cpu", 3, 129),
        ("triton", "gpu", 3, 64),
        ("unpack", "gpu", 3, 65),
        ("mosaic", "tpu", 3, 64),
        ("unpack", "rocm", 3, 1),
    ],
)
def test_the_implementation_is_that_of_platform_and_shape(
    name, platform_name, k, vectors, one_device, monkeypatch
):
    monkeypatch.setattr(platform, "name", lambda: platform_name)
    monkeypatch.setattr(cpp, "level", lambda: "avx2")
    x, packed = jnp.ones((vectors, 70)), packed_array(k, (70, 24))
    assert choice.fastest(vectors, x, packed) == name
    (unknown,) = jax.export.symbolic_shape("b")
    assert choice.fastest(unknown, x, packed) == ("blocks" if platform_name == "cpu" else "unpack")
    monkeypatch.setattr(platform, "is_one_device", lambda: False)
    assert choice.fastest(vectors, x, packed) == "unpack"


@pytest.mark.slow
@pytest.mark.parametrize("k", mostly_slow([3, 5, 16, 17], 5))
@pytest.mark.parametrize("vectors", [1, 8])
def test_layers_share_the_memory_in_which_they_are_unpacked(vectors, k, one_device):
    layers = [packed_array(k, (256, 512)), packed_array(k, (512, 256))] * 5
    x = normal(vectors, 256)

    def network(product, x, layers):
        for layer in layers:
            x = jnp.tanh(product(x, layer))
        return x

    memory = {}
    floats = jax.jit(jq.unpack)(layers)
    for name, product, weights in (("float", jnp.matmul, floats), ("packed", jq.matmul, layers)):
        run = jax.jit(functools.partial(network, product)).lower(x, weights).compile()
        memory[name] = run.memory_analysis()
    assert memory["packed"].temp_size_in_bytes < 2 * 4 * 256 * 512  # two weights, of ten
    total = {name: m.argument_size_in_bytes + m.temp_size_in_bytes for name, m in memory.items()}
    assert total["packed"] < 0.4 * total["float"]


def test_matmul_sums_over_several_axes():
    packed, x = packed_array(3, (4, 6, 10)), normal(2, 4, 6)
    expected = np.einsum("bij,ijk->bk", x, jq.unpack(packed))
    np.testing.assert_allclose(matmul(x, packed), expected, rtol=1e-5, atol=1e-5)


def product_with(packed, implementation=None, **options):
    def product(x, codebook):
        weight = jq.PackedArray(
            codes=packed.codes, codebook=codebook, rows=packed.rows, columns=packed.columns
        )
        return jq.matmul(x, weight, implementation=implementation, **options)

    return product


@pytest.mark.parametrize(
    ("implementation", "k"),
    mostly_slow(
        [(i, k) for i in OF_CODES for k in (3, 5, 17) if supported(i, k, None)],
        *((i, 5) for i in OF_CODES),
    ),
)
def test_derivatives_are_those_of_the_plain_product(implementation, k):
    packed, x = packed_array(k, (40, 8)), normal(2, 40)
    own = product_with(packed, implementation)
    codes = jq.assign(jq.unpack(packed), packed.codebook)

    def plain(x, codebook):
        return x @ codebook[codes]

    def reverse(product):
        return jax.grad(lambda x, c: jnp.sum(jnp.sin(product(x, c))), argnums=(0, 1))

    def forward(product):
        return lambda x, c: jax.jvp(product, (x, c), (x + 1.0, c * 2.0))[1]

    for derivative in (reverse, forward):
        chex.assert_trees_all_close(
            jax.jit(derivative(own))(x, packed.codebook),
            jax.jit(derivative(plain))(x, packed.codebook),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("implementation", OF_CODES)
def test_no_float_weight_is_kept_for_the_backward_pass(implementation):
    packed, x = packed_array(3, (400, 80)), normal(2, 400)
    _, vjp = jax.vjp(product_with(packed, implementation), x, packed.codebook)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) < 400 * 80
    convolve = jax.vjp(lambda x: jq.conv(x, packed_array(3, (3, 3, 40, 80))), normal(1, 2, 2, 40))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(convolve[1])) < 9 * 40 * 80


def test_stacked_layers_multiply_under_scan_and_vmap():
    packed, x = packed_array(3, (4, 20, 20), axis=0), normal(2, 20)
    weights = jq.unpack(packed)

    def layer(x, one):
        return jq.matmul(x, one), None

    y, _ = jax.jit(lambda x, p: jax.lax.scan(layer, x, p))(x, packed)
    expected = x
    for weight in weights:
        expected = expected @ weight
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    y = jax.jit(jax.vmap(jq.matmul, in_axes=(None, 0)))(x, packed)
    np.testing.assert_allclose(y, jnp.einsum("br,lrc->lbc", x, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["groups of layers", "scaled layers"])
def test_layers_of_blocks_multiply_a_piece_at_a_time_under_vmap_and_scan(name, one_device):
    (packed, weights), x = packed_blocks(CASES[name]), normal(2, 12)
    expected = np.einsum("br,lrc->lbc", x, weights.astype(np.float32))
    products = (
        jax.vmap(jq.matmul, in_axes=(None, 0)),
        lambda x, p: jax.lax.scan(lambda x, one: (x, jq.matmul(x, one)), x, p)[1],
    )
    assert choice.fastest(2, x, jax.tree.map(lambda table: table[0], packed)) == BEST
    for product in products:
        np.testing.assert_allclose(jax.jit(product)(x, packed), expected, rtol=1e-4, atol=1e-4)


def test_vectors_that_are_mapped_over_are_multiplied_together(one_device, monkeypatch):
    monkeypatch.setattr(choice, "_most_vectors", {"native": 1, "words": 16, "blocks": None}.get)
    packed, x = packed_array(5, (4, 6, 10)), normal(70, 4, 6)
    mapped = jax.vmap(jq.matmul, in_axes=(0, None))
    expected = np.einsum("bij,ijk->bk", x, jq.unpack(packed))
    np.testing.assert_allclose(mapped(x, packed), expected, rtol=1e-5, atol=1e-5)
    assert choice.fastest(1, x[:1], packed) == BEST
    assert f"name={BEST}" in str(jax.make_jaxpr(jq.matmul)(x[0], packed))
    assert "name=blocks" in str(jax.make_jaxpr(mapped)(x, packed))
    gradients = jax.vmap(jax.grad(lambda x: jnp.sum(jq.matmul(x, packed))))(x)
    expected = jnp.broadcast_to(jq.unpack(packed).sum(axis=-1)[None], x.shape)
    np.testing.assert_allclose(gradients, expected, rtol=1e-5, atol=1e-5)


AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("spec", [PartitionSpec(None, "x"), PartitionSpec("x", None)])
def test_sharded_codes_give_the_same_product(spec, axis_type):
    packed, x = packed_array(3, (400, 16)), normal(2, 400)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    codes = jax.device_put(packed.codes, NamedSharding(mesh, spec))
    sharded = jq.PackedArray(
        codes=codes, codebook=packed.codebook, rows=packed.rows, columns=packed.columns
    )
    np.testing.assert_allclose(matmul(x, sharded), matmul(x, packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_columns_on_several_devices_multiply_where_they_are(axis_type):
    packed, x = packed_array(3, (400, 64)), normal(2, 400)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    by_column = NamedSharding(mesh, PartitionSpec(None, "x"))
    sharded = jq.PackedArray(
        codes=jax.device_put(packed.codes, by_column),
        codebook=packed.codebook,
        rows=packed.rows,
        columns=packed.columns,
    )
    compiled = jax.jit(jq.matmul, out_shardings=by_column).lower(x, sharded).compile()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in compiled.as_text()
    np.testing.assert_allclose(compiled(x, sharded), matmul(x, packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["groups", "scaled groups"])
def test_blocks_of_columns_multiply_where_they_are(name):
    case = CASES[name]._replace(shape=(48, 64), numbers=(3, 64))
    (packed, weights), x = packed_blocks(case), normal(2, 48)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def by_column(table, axis):
        spec = [None] * table.ndim
        spec[axis] = "x" if table.shape[axis] > 1 else None
        return jax.device_put(table, NamedSharding(mesh, PartitionSpec(*spec)))

    sharded = dataclasses.replace(
        packed,
        codes=by_column(packed.codes, -1),
        codebook=by_column(packed.codebook, -2),
        scale=None if packed.scale is None else by_column(packed.scale, -2),
    )
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    compiled = jax.jit(jq.matmul, out_shardings=columns).lower(x, sharded).compile()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in compiled.as_text()
    np.testing.assert_allclose(compiled(x, sharded), x @ weights, rtol=1e-4, atol=1e-4)


def test_an_implementation_of_one_device_runs_under_shard_map(monkeypatch):
    monkeypatch.setattr(choice, "_FEW_WEIGHTS", 0)
    packed, x = packed_array(3, (400, 64)), normal(2, 400)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, "x"), PartitionSpec()),
        out_specs=PartitionSpec(None, "x"),
    )
    def product(x, codes, codebook):
        part = jq.PackedArray(codes=codes, codebook=codebook, rows=(400,), columns=codes.shape[-1:])
        assert choice.fastest(len(x), x, part) == BEST
        return jq.matmul(x, part)

    y = product(x, packed.codes, packed.codebook)
    np.testing.assert_allclose(y, matmul(x, packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": 2, "padding": ((1, 1), (1, 1))},
        {"padding": "VALID", "kernel_dilation": (2, 1)},
        {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
        {"window_strides": np.int64(2), "kernel_dilation": np.array([2, 1]), "padding": "VALID"},
        {"feature_group_count": np.int32(1), "padding": np.array([[1, 1], [0, 1]])},
    ],
)
def test_conv_is_that_of_the_unpacked_kernel(options):
    packed, x = packed_array(5, (3, 3, 4, 6), axis=-1), normal(2, 8, 8, 4)

    def pair(value):
        return (int(value),) * 2 if np.ndim(value) == 0 else tuple(map(int, value))

    padding = options.get("padding", "SAME")
    expected = jax.lax.conv_general_dilated(
        x,
        jq.unpack(packed),
        pair(options.get("window_strides", 1)),
        padding if isinstance(padding, str) else [pair(p) for p in padding],
        lhs_dilation=pair(options.get("input_dilation", 1)),
        rhs_dilation=pair(options.get("kernel_dilation", 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = jax.jit(lambda x, p: jq.conv(x, p, **options))(x, packed)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_conv_takes_blocks():
    for case in (Case((3, 3, 4, 6), (1, 1, 2, 3), 5), CASES["a window of one"]):
        (packed, weights), x = packed_blocks(case), normal(2, 8, 8, 4)
        expected = jax.lax.conv_general_dilated(
            x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(jq.conv(x, packed), expected, rtol=1e-4, atol=1e-5)


def test_conv_takes_a_kernel_whatever_axes_are_said_to_be_inputs():
    kernel, x = normal(3, 3, 4, 5), normal(2, 8, 8, 4)
    codebook = jnp.linspace(-2.0, 2.0, 5)
    expected = jq.conv(x, jq.pack_array(kernel, codebook))
    for inputs in (1, -2):
        got = jq.conv(x, jq.pack_array(kernel, codebook, inputs=inputs))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_conv_in_groups_and_one_dimension():
    packed, x = packed_array(3, (3, 2, 6)), normal(2, 9, 4)
    expected = jax.lax.conv_general_dilated(
        x, jq.unpack(packed), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=2,
    )  # fmt: skip
    y = jq.conv(x, packed, feature_group_count=2)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: jq.matmul(jnp.ones(9), p), r"expected x of shape \[..., 20\], got \(9,\)"),
        (
            lambda p: jq.matmul(jnp.ones(20), jnp.ones((20, 6))),
            "expected a PackedArray or a ProductArray, got",
        ),
        (
            lambda p: jq.matmul(jnp.ones(20), p, implementation="cuda"),
            "one of unpack, native, blocks, triton, mosaic, words or None, got 'cuda'",
        ),
        (
            lambda p: jq.matmul(jnp.ones(20), packed_array(3, (4, 20, 6), axis=0)),
            r"expected the weight of one layer, got stacked layers \(4, 20, 6\)",
        ),
        (lambda p: jq.matmul(jnp.ones(20), packed_array(3, (20,))), "two axes or more"),
        (lambda p: jq.conv(jnp.ones((1, 20)), p), "one or more of space"),
        (
            lambda p: jq.conv(jnp.ones((1, 8, 8, 4)), KERNEL, window_strides=2.5),
            "an integer, or one for each of 2 axes, got 2.5",
        ),
        (
            lambda p: jq.conv(jnp.ones((1, 8, 8, 4)), KERNEL, window_strides=True),
            "an integer, or one for each of 2 axes, got True",
        ),
        (
            lambda p: jq.conv(jnp.ones((1, 8, 8, 4)), KERNEL, feature_group_count=2.5),
            "expected feature_group_count to be an integer of at least 1, got 2.5",
        ),
        (
            lambda p: jq.conv(jnp.ones((1, 8, 8, 4)), KERNEL, padding=(1, 1)),
            r"a name, or \(before, after\) for each of 2 axes, got \(1, 1\)",
        ),
        (
            lambda p: jq.conv(jnp.ones((1, 8, 8, 3)), packed_array(3, (3, 3, 4, 8))),
            r"expected x with 4 channels last, got \(1, 8, 8, 3\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(packed_array(3, (20, 6)))
