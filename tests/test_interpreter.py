"""Any function on packed weights: what it answers, and what of it stays packed."""

import dataclasses
import itertools
import math
import re

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxquant as jq
from jaxquant import platform
from jaxquant.packing.arrays import is_quantized
from jaxquant.packing.ops import choice
from tests.cases import mostly_slow, unpadded

pytestmark = pytest.mark.default_promotion
KEY = jax.random.key(0)


@pytest.fixture(params=[pytest.param("unpack", marks=pytest.mark.slow), "in parts"])
def implementation(request, monkeypatch):
    """Products as on several devices, and as on one, where no weight is unpacked as a whole."""
    if request.param == "in parts":
        monkeypatch.setattr(platform, "is_one_device", lambda: True)
        monkeypatch.setattr(choice, "_FEW_WEIGHTS", 0)
        jax.clear_caches()  # of programs for several devices
    yield request.param
    if request.param == "in parts":
        jax.clear_caches()


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weight(*shape, k=5, seed=0, inputs=None, stacked=False, numbers=None, dtype=jnp.float32):
    """Return a packed weight on k levels; of stacked layers each has its own."""
    levels = jnp.linspace(-1, 1, k).astype(dtype)
    if stacked:
        numbers = (shape[0], *(1,) * (len(shape) - 1))
    if numbers:
        levels = levels * (1 + jnp.arange(np.prod(numbers))[:, None] / 8).astype(dtype)
        levels = levels.reshape(*numbers, k)
    return jq.pack_array(normal(*shape, seed=seed, dtype=dtype), levels, inputs=inputs)


def pack_tree(tree, inputs=None):
    """Return a tree with all leaves of two axes or more packed; `inputs` by the end of a path."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    levels, made = jnp.linspace(-0.4, 0.4, 5), []
    for path, leaf in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = next((n for end, n in (inputs or {}).items() if name.endswith(end)), None)
        is_weight = jnp.ndim(leaf) > 1 and "bias" not in name
        made.append(jq.pack_array(leaf, levels, inputs=own) if is_weight else leaf)
    return jax.tree.unflatten(structure, made)


def check(function, *args, unpacked=()):
    """Compare a function on packed weights with itself on unpacked; return what became of them."""
    return check_all({"it": (function, args)}, unpacked)["it"]


def check_all(cases, unpacked=()):
    """Check all cases, each a function and its arguments, in one program."""

    def everything(args):
        return {name: function(*args[name]) for name, (function, _) in cases.items()}

    args = {name: own for name, (_, own) in cases.items()}
    expected = jax.jit(everything)(jq.unpack(args))
    got = jq.packed(everything)(args)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for name in cases:
        tolerance = 0.05 if "bfloat16" in name else 1e-4
        wide = jax.tree.map(lambda y: y.astype(jnp.float32), (got[name], expected[name]))
        chex.assert_trees_all_close(*wide, rtol=tolerance, atol=tolerance)
    uses = jq.packed(everything).report(args)
    assert sorted({use.operation for use in uses.unpacked}) == sorted(unpacked), str(uses)
    assert not any("unpacked in" in use.how for use in uses), str(uses)
    found = {name: [] for name in cases}
    for use in uses:
        found[use.path.split("/")[0]].append(use.how)
    return found


# Layers of every make ----------------------------------------------------------------------------


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x, x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        return embed.attend(nn.Dense(8)(embed(tokens)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.LSTMCell(6))(x)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(8)(x)), None

        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers()(x, None)[0]


ATTENTION = {"query/kernel": 1, "key/kernel": 1, "value/kernel": 1}
TOKENS = jnp.array([[1, 4, 10], [0, 3, 3]])
LINEN = {  # of a layer: an input, and how many axes of which kernels are summed over
    "Dense": (nn.Dense(6), normal(3, 8), None),
    "DenseGeneral": (nn.DenseGeneral((2, 3)), normal(3, 8), {"kernel": 1}),
    "DenseGeneral over two axes": (nn.DenseGeneral(6, axis=(-2, -1)), normal(3, 2, 4), None),
    "DenseGeneral with a batch axis": (
        nn.DenseGeneral(6, axis=-1, batch_dims=(0,)),
        normal(3, 5, 8),
        "stacked",
    ),
    "attention": (Attention(), normal(2, 3, 8), ATTENTION),
    "Embed and its transpose": (Tied(), TOKENS, None),
    "Einsum": (nn.Einsum((8, 2, 3), "bd,dhe->bhe"), normal(4, 8), {"kernel": 1}),
    "Conv in 1 dimension": (nn.Conv(6, (3,)), normal(2, 7, 4), None),
    "Conv in 2 dimensions": (nn.Conv(6, (3, 3), strides=2), normal(2, 7, 7, 4), None),
    "Conv in 3 dimensions": (nn.Conv(6, (2, 2, 2)), normal(1, 4, 4, 4, 3), None),
    "Conv with circular padding": (nn.Conv(6, (3,), padding="CIRCULAR"), normal(2, 7, 4), None),
    "grouped Conv": (nn.Conv(6, (3, 3), feature_group_count=2), normal(2, 5, 5, 4), None),
    "depthwise Conv": (nn.Conv(4, (3, 3), feature_group_count=4), normal(2, 5, 5, 4), None),
    "ConvTranspose": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), normal(2, 5, 5, 4), None),
    "LSTM": (Recurrent(), normal(2, 4, 5), None),
    "GRU": (nn.RNN(nn.GRUCell(6)), normal(2, 4, 5), None),
    "bfloat16": (nn.Dense(6, dtype=jnp.bfloat16), normal(3, 8), None),
}


def test_layers_of_linen(implementation):
    def variables():
        return {name: module.init(KEY, x) for name, (module, x, _) in LINEN.items()}

    cases = {}
    for name, own in jax.jit(variables)().items():
        module, x, inputs = LINEN[name]
        if inputs == "stacked":
            levels = jnp.linspace(-0.4, 0.4, 5)[None, None, None].repeat(3, 0)
            own["params"]["kernel"] = jq.pack_array(own["params"]["kernel"], levels)
        else:
            own = pack_tree(own, inputs)
        cases[name] = module.apply, (own, x)
    for name, uses in check_all(cases).items():
        assert set(uses) <= {"product", "transposed product", "rows", "convolution"} and uses, name


def test_stacked_layers_of_linen_under_remat(implementation):
    module, x = Stack(), normal(3, 8)
    variables = jax.jit(module.init)(KEY, x)
    packed = jax.tree.map(
        lambda leaf: (
            jq.pack_array(leaf, jnp.linspace(-0.4, 0.4, 5)[None, None, None].repeat(3, 0))
            if leaf.ndim == 3
            else leaf
        ),
        variables,
    )
    assert check(module.apply, packed, x) == ["product"]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.einsum = nnx.Einsum("btij,ijo->bto", (2, 4, 8), (8,), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.transposed = nnx.ConvTranspose(8, 8, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.cell = nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs))
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.attention(self.embed(tokens))
        x = self.transposed(self.conv(self.einsum(self.general(x))))
        return self.embed.attend(self.out(self.cell(self.norm(x))))


def test_layers_of_nnx(implementation):
    model = NnxNet(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    inputs = {f"{end}/value": n for end, n in (ATTENTION | {"general/kernel": 1}).items()}
    packed = pack_tree(params, inputs)
    assert any(map(is_quantized, jax.tree.leaves(packed, is_leaf=is_quantized)))

    def apply(params, tokens):
        return nnx.merge(graph, params, rest, copy=True)(tokens)

    check(apply, packed, TOKENS)


def test_a_model_of_nnx_runs_with_packed_variables():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    plan = jq.slq(model, bits=2, rounds=(3,))
    params, state, _ = jq.quantize_round(plan, model, jq.init(plan, model))
    nnx.update(model, params)
    x = normal(3, 8)
    expected = model(x)
    nnx.update(model, jq.pack(params, state))
    got = jq.packed(lambda model, x: model(x))(model, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert repr(model.kernel[...]).startswith("PackedArray(float32[8, 6], k=3")
    (use,) = jq.packed(lambda model, x: model(x)).report(model, x)
    assert (use.path, use.how) == ("kernel", "product")


EQUINOX = {
    "Linear": lambda: (eqx.nn.Linear(8, 6, key=KEY), normal(8)),
    "MLP": lambda: (eqx.nn.MLP(8, 6, 8, 2, key=KEY), normal(8)),
    "attention": lambda: (eqx.nn.MultiheadAttention(2, 8, key=KEY), normal(3, 8)),
    "Conv1d": lambda: (eqx.nn.Conv1d(4, 6, 3, key=KEY), normal(4, 7)),
    "Conv2d": lambda: (eqx.nn.Conv2d(4, 6, 3, padding=1, key=KEY), normal(4, 7, 7)),
    "ConvTranspose2d": lambda: (eqx.nn.ConvTranspose2d(4, 6, 3, key=KEY), normal(4, 5, 5)),
    "grouped": lambda: (eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY), normal(4, 7, 7)),
    "LSTM": lambda: (eqx.nn.LSTMCell(8, 6, key=KEY), normal(8)),
    "GRU": lambda: (eqx.nn.GRUCell(8, 6, key=KEY), normal(8)),
    "Embedding": lambda: (eqx.nn.Embedding(11, 8, key=KEY), jnp.array(3)),
}


def test_layers_of_equinox(implementation):
    cases = {}
    for name, make in EQUINOX.items():
        module, x = make()
        params, static = eqx.partition(module, eqx.is_inexact_array)

        def apply(params, x, name=name, static=static):
            module = eqx.combine(params, static)
            start = jnp.ones(6)
            more = {"attention": (x, x), "LSTM": ((start, start),), "GRU": (start,)}
            return module(x, *more.get(name, ()))

        cases[name] = apply, (pack_tree(params), x)
    apply, (params, x) = cases["Linear"]
    cases["a batch"] = jax.vmap(apply, (None, 0)), (params, normal(4, 8))
    for name, uses in check_all(cases).items():
        assert set(uses) <= {"product", "transposed product", "rows", "convolution"} and uses, name


def test_dictionaries_as_of_haiku(implementation):
    params = {"mlp/~/linear_0": {"w": weight(8, 6), "b": jnp.ones(6)}, "head": {"w": weight(6, 3)}}

    def apply(params, x):
        first = params["mlp/~/linear_0"]
        return jnp.tanh(x @ first["w"] + first["b"]) @ params["head"]["w"]

    assert check(apply, params, normal(4, 8)) == ["product", "product"]
    uses = jq.packed(apply).report(params, normal(4, 8))
    assert [use.path for use in uses] == ["mlp/~/linear_0/w", "head/w"]
    assert "| mlp/~/linear_0/w | 8x6 | dot_general | product | 0 |" in unpadded(str(uses))


# Operations --------------------------------------------------------------------------------------

PRODUCTS = {
    "rows": (lambda w, x: x @ w, (8, 6), (3, 8), None, "product"),
    "columns": (lambda w, x: x @ w.T, (8, 6), (3, 6), None, "transposed product"),
    "the weight first": (lambda w, x: w @ x, (8, 6), (6, 3), None, "transposed product"),
    "the weight first, transposed": (lambda w, x: w.T @ x, (8, 6), (8,), None, "product"),
    "a vector": (lambda w, x: jnp.dot(x, w), (8, 6), (8,), None, "product"),
    "kept axes": (
        lambda w, x: jnp.einsum("btd,dhe->bhte", x, w), (8, 2, 3), (2, 4, 8), 1, "product",
    ),
    "kept axes, back": (
        lambda w, x: jnp.einsum("bhte,dhe->btd", x, w), (8, 2, 3), (2, 2, 4, 3), 1,
        "transposed product",
    ),
    "contracted axes": (
        lambda w, x: jnp.einsum("bthe,hed->btd", x, w), (2, 3, 8), (2, 4, 2, 3), None, "product",
    ),
    "contracted axes out of order": (
        lambda w, x: jnp.einsum("beth,hed->dbt", x, w), (2, 3, 8), (2, 3, 4, 2), None, "product",
    ),
    "contracted axes, the last": (
        lambda w, x: jnp.einsum("ohe,bhe->bo", w, x), (8, 2, 3), (4, 2, 3), -2,
        "transposed product",
    ),
    "split heads": (
        lambda w, x: jnp.einsum("bd,dhe->bhe", x, w.reshape(8, 2, 3)), (8, 6), (4, 8), None,
        "product",
    ),
    "merged heads": (
        lambda w, x: x @ w.reshape(6, 8), (2, 3, 8), (4, 6), None, "product",
    ),
    "tensordot": (
        lambda w, x: jnp.tensordot(w, x, ((0, 1), (1, 0))), (2, 3, 8), (3, 2, 4), None, "product",
    ),
    "cast to bfloat16": (
        lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
        (8, 6), (3, 8), None, "product",
    ),
    "some columns": (lambda w, x: x @ w[:, 2:5], (8, 6), (3, 8), None, "product"),
    "fused heads": (
        lambda w, x: [x @ part for part in jnp.split(w, 3, axis=1)][1], (8, 6), (3, 8), None,
        "product",
    ),
    "one row": (lambda w, x: x @ w.T, (1, 6), (3, 6), None, "transposed product"),
    "one column": (lambda w, x: x @ w, (6, 1), (3, 6), None, "product"),
    "a stopped gradient": (
        lambda w, x: x @ lax.stop_gradient(w), (8, 6), (3, 8), None, "product",
    ),
    "a barrier": (
        lambda w, x: x @ lax.optimization_barrier((w, x))[0], (8, 6), (3, 8), None, "product"
    ),
}  # fmt: skip


def test_products_of_every_form_stay_packed(implementation):
    cases = {}
    for name, (function, shape, x_shape, inputs, _) in PRODUCTS.items():
        ones, x = (1,) * (len(shape) - 1), normal(*x_shape)
        for kind, numbers in enumerate(((min(2, shape[0]), *ones), (*ones, shape[-1]))):
            packed = weight(*shape, inputs=inputs, numbers=numbers)
            cases[f"{name} {kind}"] = function, (packed, x)
    for name, uses in check_all(cases).items():
        assert set(uses) == {PRODUCTS[name[:-2]][-1]}, name


def test_layers_are_batch_axes_and_are_taken_one_by_one(implementation):
    packed, x = weight(3, 8, 6, stacked=True), normal(3, 4, 8)
    cases = {
        "batch": (lambda w, x: jnp.einsum("lbd,lde->lbe", x, w), (packed, x)),
        "kept": (lambda w, x: jnp.einsum("bd,lde->leb", x, w), (packed, x[0])),
        "summed": (lambda w, x: jnp.einsum("lbd,lde->be", x, w), (packed, x)),
        "mapped": (jax.vmap(lambda w, x: jnp.tanh(x @ w)), (packed, x)),
        "one": (lambda w, x: x @ w[1], (packed, x[0])),
        "one that varies": (lambda w, x, i: x @ w[i], (packed, x[0], jnp.array(2))),
        "one by take": (lambda w, x, i: x @ jnp.take(w, i, 0), (packed, x[0], jnp.array(2))),
        "some": (lambda w, x: jnp.einsum("lbd,lde->lbe", x, w[1:]), (packed, x[1:])),
    }
    assert set(map(tuple, check_all(cases).values())) == {("product",)}
    back = check(lambda w, x: jnp.einsum("lbe,lde->bld", x, w), packed, normal(3, 4, 6))
    assert back == ["transposed product"]
    beyond = jq.packed(lambda w, i: jnp.take(w, i, 0))(packed, jnp.array(3))
    assert jnp.isnan(beyond).all()


def test_rows_are_read_by_themselves():
    cases = {}
    for k, numbers in itertools.product([3, 17], [None, (11, 1), (1, 2)]):
        own = weight(11, 6, k=k, numbers=numbers)
        cases[f"{k} {numbers}"] = lambda w, i: jnp.take(w, i, axis=0), (own, TOKENS)
        layers = weight(3, 11, 6, k=k, stacked=True)
        cases[f"{k} of layers"] = lambda w, i: jnp.take(w, i, axis=1), (layers, TOKENS)
    assert set(map(tuple, check_all(cases).values())) == {("rows",)}


def test_look_ups_of_every_kind():
    table, outside = weight(12, 6), jnp.array([-13, -1, 0, 11, 12, 99])
    functions = {
        "a number": (lambda w: w[3],),
        "numbers": (lambda w, i: w[i], TOKENS),
        "a number that varies": (lambda w, i: w[i], jnp.array(7)),
        "a slice": (lambda w: w[4:9:2],),
        "a slice that varies": (lambda w, i: lax.dynamic_slice_in_dim(w, i, 3), jnp.array(11)),
        "a slice before all": (lambda w, i: lax.dynamic_slice_in_dim(w, i, 3), jnp.array(-30)),
        "reshaped": (lambda w, i: w.reshape(4, 3, 6)[i], jnp.array([2, 0])),
        "of the second axis": (lambda w, i: w.reshape(4, 3, 6)[:, i], jnp.array([2, 0])),
    }
    for mode in ("fill", "clip", "wrap"):
        functions[mode] = lambda w, i, mode=mode: jnp.take(w, i, axis=0, mode=mode), outside
    cases = {name: (function, (table, *rest)) for name, (function, *rest) in functions.items()}
    long = weight(300, 4)
    for name in ("uint8", "int8"):
        numbers = jnp.array([1, 100, 200 if name == "uint8" else -3], name)
        for mode in ("fill", "clip"):
            cases[f"{name} {mode}"] = cases[mode][0], (long, numbers)
        alone = lambda w, i: lax.dynamic_index_in_dim(w, i, 0)  # noqa: E731
        cases[f"{name} alone"] = alone, (long, numbers[2])
    assert set(map(tuple, check_all(cases).values())) == {("rows",)}
    # Columns are packed again, and are unpacked where they leave the function.
    check(lambda w, i: jnp.take(w, i, axis=1, mode="clip"), table, TOKENS, unpacked=["result"])


def test_what_knows_no_packed_weight_gets_an_unpacked_one():
    packed, x = weight(8, 6), normal(8, 6)
    for name, function in {
        "add": lambda w, x: w + x,
        "mul": lambda w, x: (w * x) @ w.T,
        "sort": lambda w, x: jnp.sort(w) + x,
        "reduce_sum": lambda w, x: w.sum() * x,
        "result": lambda w, x: (w.T, x),
    }.items():
        check(function, packed, x, unpacked=[name])
    (use,) = jq.packed(lambda w, x: w + x).report(packed, x).unpacked
    assert (use.path, use.shape, use.float_bytes) == ("0", (8, 6), 192)


def test_parts_without_entries_and_other_orders_are_right_all_the_same():
    packed, x, layers = weight(8, 6), normal(3, 8), weight(3, 4, 4, stacked=True)
    functions = {
        "no rows": lambda w, x: x[:, :0] @ w[:0],
        "no columns": lambda w, x: x @ w[:, :0],
        "repeated never": lambda w, x: jnp.broadcast_to(w, (0, 8, 6)),
        "in Fortran's order": lambda w, x: (w.ravel(order="F"), w.reshape((6, 8), order="F") @ w),
    }
    for function in functions.values():
        got, want = jq.packed(function)(packed, x), function(jq.unpack(packed), x)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    scanned = jq.packed(lambda w, x: lax.scan(lambda c, w: (c @ w, None), x, w[:0])[0])
    np.testing.assert_array_equal(scanned(layers, x[:, :4]), x[:, :4])


def test_a_product_over_a_part_of_the_rows_is_unpacked_in_it():
    packed, x = weight(8, 2, 3), normal(4, 8)  # packed for products over 8 x 2

    def function(w, x):
        return jnp.einsum("bd,dhe->bhe", x, w)

    chex.assert_trees_all_close(
        jq.packed(function)(packed, x), function(jq.unpack(packed), x), rtol=1e-5
    )
    (use,) = jq.packed(function).report(packed, x)
    assert use.how == "unpacked in product" and use.float_bytes == 0


# Control flow and transformations ----------------------------------------------------------------


def test_calls_of_every_kind_go_inside_packed(implementation):
    packed, x = weight(8, 8), normal(3, 8)

    @jax.custom_jvp
    def jvp(w, x):
        return jnp.tanh(x @ w)

    @jvp.defjvp
    def _(primals, tangents):
        (w, x), (w_dot, x_dot) = primals, tangents
        return jvp(w, x), 2 * (x_dot @ w + x @ w_dot)  # twice, to be told from the plain one

    @jax.custom_vjp
    def vjp(w, x):
        return jnp.sin(x @ w)

    vjp.defvjp(lambda w, x: (jnp.sin(x @ w), (w, x)), lambda r, g: (r[1].T @ g, 3 * g @ r[0].T))

    @jax.jit
    def step(carry):
        number, w, x = carry
        return number + 1, w, jnp.tanh(x @ w)

    functions = {
        "jit": jax.jit(lambda w, x: x @ w),
        "remat": jax.checkpoint(lambda w, x: jnp.sin(x @ w)),
        "custom_jvp": jvp,
        "custom_vjp": vjp,
        "cond": lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w.T),
        "switch": lambda w, x: lax.switch(1, [lambda w, x: x, lambda w, x: x @ w], w, x),
        "while": lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )[1],
        "while, in its carry": lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1], jnp.tanh(c[2] @ c[1])), (0, w, x)
        )[2],
        "while, in the carry of a jitted body": lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, jax.jit(lambda c: step(c)), (0, w, x)
        )[2],
        "scan, in the carry of a jitted body": lambda w, x: lax.scan(
            lambda c, _: (jax.jit(lambda c: step(c))(c), None), (0, w, x), length=3
        )[0][2],
        "fori": lambda w, x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x),
        "scan": lambda w, x: lax.scan(lambda x, _: (jnp.tanh(x @ w), x @ w.T), x, length=3),
        "scan, in its carry": lambda w, x: lax.scan(
            lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (w, x), length=3
        )[0][1],
        "map": lambda w, x: lax.map(lambda x: x @ w, x),
    }
    cases = {name: (function, (packed, x)) for name, function in functions.items()}
    for name, uses in check_all(cases).items():
        assert uses and set(uses) <= {"product", "transposed product"}, name

    def losses(xs, w):
        made = {n: functions[n](w, x) for n, x in xs.items()}
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(made))

    xs = {name: x for name in functions if not name.startswith("while")}
    got = jax.grad(lambda xs: jq.packed(losses)(xs, packed))(xs)
    want = jax.jit(jax.grad(losses))(xs, jq.unpack(packed))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
def test_stacked_layers_are_scanned_packed(reverse, implementation):
    layers = {"w": weight(3, 8, 8, stacked=True), "b": normal(3, 8)}

    def function(layers, x):
        def step(x, layer):
            return jnp.tanh(x @ layer["w"] + layer["b"]), x.sum()

        return lax.scan(step, x, layers, reverse=reverse)

    assert check(function, layers, normal(4, 8)) == ["product"]
    # One codebook for all layers: a layer's rows are read in its step.
    one = {"w": weight(3, 8, 8), "b": normal(3, 8)}
    assert check(function, one, normal(4, 8)) == ["rows"]


def test_a_carry_that_changes_is_unpacked_before_its_loop():
    packed, x = weight(8, 8), normal(3, 8)

    def function(w, x):
        return lax.fori_loop(0, 2, lambda _, c: (c[0] * 0.5, c[1] @ c[0]), (w, x))[1]

    check(function, packed, x, unpacked=["scan"])


def test_it_is_transformed_as_other_functions_are(implementation):
    params, x = {"w": weight(8, 6), "b": normal(6)}, normal(5, 8)

    def function(params, x):
        return jnp.tanh(x @ params["w"] + params["b"])

    packed, floats = jq.packed(function), jq.unpack(params)
    want = function(floats, x)
    chex.assert_trees_all_close(jax.jit(packed)(params, x), want, rtol=1e-5)
    chex.assert_trees_all_close(jax.vmap(packed, (None, 0))(params, x), want, rtol=1e-5)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    both = jax.vmap(packed, (0, None))(several, x)
    chex.assert_trees_all_close(both, jnp.stack([want, want]), rtol=1e-5)
    assert jax.eval_shape(packed, params, x).shape == (5, 6)

    def loss(rest, x, apply, w):
        return jnp.sum(apply(rest | {"w": w}, x) ** 2)

    rest = {"b": params["b"]}
    got = jax.grad(loss, (0, 1))(rest, x, packed, params["w"])
    want = jax.grad(loss, (0, 1))(rest, x, function, floats["w"])
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    tangent = jax.jvp(lambda x: packed(params, x), (x,), (x,))[1]
    want = jax.jvp(lambda x: function(floats, x), (x,), (x,))[1]
    chex.assert_trees_all_close(tangent, want, rtol=1e-4, atol=1e-5)


def test_gradients_by_codebooks_are_those_by_their_members():
    packed, x = weight(8, 6, k=3), normal(5, 8)

    def loss(packed):
        return jnp.sum(jq.packed(lambda w, x: jnp.tanh(x @ w))(packed, x) ** 2)

    got = jax.grad(loss, allow_int=True)(packed).codebook
    by_weight = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(jq.unpack(packed))
    want = [jnp.sum(by_weight * (jq.unpack(packed) == c)) for c in packed.codebook]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_rules_of_ones_own_pass_on_derivatives_by_codebooks():
    packed, x = weight(8, 6, k=3), normal(5, 8)

    @jax.custom_vjp
    def doubled(w, x):
        return x @ w

    doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (2 * r[1].T @ g, g @ r[0].T))

    def function(w, x):
        own = jnp.sum((x @ jax.nn.relu(w)) ** 2) + jnp.logaddexp(w, 1).sum()
        return own + jnp.sum(doubled(w, x))

    def by_codebook(codebook, function):
        return function(dataclasses.replace(packed, codebook=codebook), x)

    got = jax.grad(by_codebook)(packed.codebook, jq.packed(function))
    want = jax.grad(by_codebook)(packed.codebook, lambda w, x: function(jq.unpack(w), x))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for function in (jq.packed(jax.nn.relu), lambda w: jax.nn.relu(jq.unpack(w))):
        tangent = jax.jvp(
            lambda c, f=function: f(dataclasses.replace(packed, codebook=c)),
            *[(packed.codebook,)] * 2,
        )[1]
        np.testing.assert_allclose(tangent, jax.nn.relu(jq.unpack(packed)), rtol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 3, jnp.asarray(2.0), jnp.float32(2)], ids=repr)
def test_rules_of_ones_own_may_keep_constants(scale):
    packed, x = weight(8, 6), normal(5, 8)

    @jax.custom_vjp
    def scaled(x, w, s):
        return x @ w * s

    scaled.defvjp(
        lambda x, w, s: (scaled(x, w, s), (w, s)),
        lambda kept, g: (g @ kept[0].T * kept[1], jnp.zeros_like(kept[0]), None),
    )
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        function = wrap(lambda w, x: scaled(x, w, scale))
        got = jax.grad(lambda x, f=function: jnp.sum(jq.packed(f)(packed, x)))(x)
        want = jax.grad(lambda x, f=function: jnp.sum(f(jq.unpack(packed), x)))(x)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_constants_differ_by_their_bits():
    divide = jq.packed(lambda w, c: jnp.sum(w) / jnp.float32(c))
    packed = jq.pack_array(jnp.ones((4, 4)), jnp.array([0.0, 1.0]))
    assert [float(divide(packed, c)) for c in (0.0, -0.0, 2, 2.0)] == [np.inf, -np.inf, 8, 8]
    traces = []
    count = jq.packed(lambda w, c: (traces.append(c), jnp.sum(w) * c)[1])
    for value in (float("nan"), -float("nan"), 1.0, 1, True, 1.0, float("nan")):
        count(packed, value)
    assert len(traces) == 4


def test_attributes_of_a_callable_hide_nothing():
    class Model:
        def __init__(self):
            self.report, self.inputs = "mine", 3

        def __call__(self, w, x):
            return x @ w

    packed = jq.packed(Model())
    assert [use.how for use in packed.report(weight(8, 6), normal(5, 8))] == ["product"]


def test_rules_of_ones_own_are_told_what_is_differentiated():
    packed, x, bias, seen = weight(8, 6), normal(5, 8), jnp.ones(6), []

    @jax.custom_vjp
    def function(w, x, bias):
        return x @ w + bias

    def forward(w, x, bias):
        seen.append((w.perturbed, x.perturbed, bias.perturbed))
        return x.value @ w.value + bias.value, (w.value, x.perturbed)

    def backward(residuals, cotangent):
        w, is_wanted = residuals
        return None, 3 * cotangent @ w.T if is_wanted else None, cotangent.sum(0)

    function.defvjp(forward, backward, symbolic_zeros=True)

    def loss(w, x):
        return jnp.sum(function(w, x, bias) ** 2)

    got = jax.grad(jq.packed(loss), 1)(packed, x)
    np.testing.assert_allclose(got, jax.grad(loss, 1)(jq.unpack(packed), x), rtol=1e-4)
    assert seen[0] == seen[1] == (False, True, False)


def test_a_low_rank_adapter_trains_on_a_packed_base(implementation):
    base = {"up": weight(8, 12), "down": weight(12, 8)}
    lora = {name: (normal(w.shape[0], 2), normal(2, w.shape[1])) for name, w in base.items()}
    x = normal(5, 8)

    def apply(base, lora, x):
        for name in ("up", "down"):
            a, b = lora[name]
            x = jnp.tanh(x @ base[name] + x @ a @ b)
        return jnp.mean(x**2)

    got = jax.jit(jax.grad(jq.packed(apply), 1))(base, lora, x)
    want = jax.grad(apply, 1)(jq.unpack(base), lora, x)
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5)


def test_options_of_python_are_constants_and_nothing_compiles_twice():
    traced = []

    def function(params, x, double, *, shift=0):
        traced.append(double)
        y = x @ params
        return (2 * y if double else y) + shift

    apply, packed, x = jq.packed(function), weight(8, 6), normal(3, 8)
    want = x @ jq.unpack(packed)
    for _ in range(3):
        np.testing.assert_allclose(apply(packed, x, True, shift=1), 2 * want + 1, rtol=1e-4)
    assert traced == [True]
    np.testing.assert_allclose(apply(packed, x, False), want, rtol=1e-4)
    np.testing.assert_allclose(apply(jq.unpack(packed), x, False), want, rtol=1e-4)
    assert apply.__name__ == "function"


def test_constants_of_other_types_are_other_programs():
    apply, packed, x = jq.packed(lambda w, x, n: (x @ w)[n]), weight(8, 6), normal(3, 8)
    assert [apply(packed, x, n).shape for n in (1, True)] == [(6,), (1, 3, 6)]
    apply = jq.packed(lambda w, n: jnp.asarray(n))
    assert [apply(packed, n).dtype for n in (1, 1.0, True)] == [jnp.int32, jnp.float32, bool]


def test_a_model_that_holds_packed_weights_has_to_be_an_argument():
    model = eqx.nn.Linear(8, 6, key=KEY)
    model = eqx.tree_at(lambda m: m.weight, model, weight(6, 8))
    with pytest.raises(ValueError, match=r"got a model that holds them: jq\.packed"):
        jq.packed(model)
    got = jq.packed(lambda model, x: model(x))(model, normal(8))
    want = normal(8) @ jq.unpack(model.weight).T + model.bias
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_every_use_is_listed_by_its_path():
    layer, packed, x = jax.jit(lambda w, x: x @ w), weight(8, 8), normal(3, 8)
    uses = jq.packed(lambda p, x: layer(p["w"], layer(p["w"], x))).report({"w": packed}, x)
    assert [use.path for use in uses] == ["w", "w"]
    both = jq.packed(lambda p, q, x: x @ p["w"] @ q["w"])
    uses = both.report({"w": packed}, {"w": packed.T}, x)
    assert [use.path for use in uses] == ["0/w", "1/w"]
    assert [use.how for use in uses] == ["product", "transposed product"]
    assert both.inputs({"w": normal(8, 8)}, {"w": packed}, x) == {"w": 1}


def test_errors_of_the_function_are_its_own():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        jq.packed(lambda w, x: x @ w)(weight(8, 6), normal(3, 7))


def test_half_precision_is_rounded_as_the_weights_are():
    packed, x = weight(8, 6, k=200), normal(3, 8)

    def twice(w):
        return w.astype(jnp.bfloat16).astype(jnp.float16).astype(jnp.float32)

    np.testing.assert_array_equal(jq.packed(twice)(packed), twice(jq.unpack(packed)))
    assert np.any(twice(jq.unpack(packed)) != jq.unpack(packed).astype(jnp.float16))

    def narrow_and_wide(w, x):
        return x @ w.astype(jnp.bfloat16).astype(jnp.float32)

    expected = narrow_and_wide(jq.unpack(packed), x)
    got = jq.packed(narrow_and_wide)(packed, x)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(got - x @ jq.unpack(packed)).max() > 1e-4


# PackedArray -------------------------------------------------------------------------------------


def test_a_packed_array_is_an_array_as_far_as_it_goes():
    packed, x = weight(8, 6), normal(3, 6)
    np.testing.assert_allclose(jq.matmul(x, packed.T), x @ jq.unpack(packed).T, rtol=1e-5)
    np.testing.assert_array_equal(jq.unpack(packed.T), jq.unpack(packed).T)
    assert packed.T.shape == (6, 8) and packed.T.T.shape == (8, 6)
    assert packed.astype(jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        jq.unpack(packed.astype(jnp.bfloat16)), jq.unpack(packed).astype(jnp.bfloat16)
    )
    with pytest.raises(ValueError, match="a dtype of floating point, got int32"):
        packed.astype(jnp.int32)
    assert packed == packed and packed != weight(8, 6) and len({packed, packed}) == 1
    assert repr(packed) == "PackedArray(float32[8, 6], k=5, numbers=(1, 1), 62 bytes)"
    assert repr(packed.T).startswith("View(float32[6, 8] of PackedArray")
    with pytest.raises(ValueError, match=r"expected x of shape \[..., 6\]"):
        jq.matmul(normal(3, 8), packed.T)
    with pytest.raises(ValueError, match="a product that 'triton' supports"):
        jq.matmul(x, packed.T, implementation="triton")


def test_leading_axes_are_indexed(tmp_path):
    stack = weight(3, 8, 6, stacked=True)
    weights = jq.unpack(stack)
    np.testing.assert_array_equal(jq.unpack(stack[1]), weights[1])
    assert isinstance(stack[1], jq.PackedArray) and stack[1].shape == (8, 6)
    np.testing.assert_array_equal(jq.unpack(stack[1:]), weights[1:])
    np.testing.assert_array_equal(jq.unpack(stack[jnp.array([2, 0])]), weights[jnp.array([2, 0])])
    np.testing.assert_array_equal(jq.unpack(stack[-1]), weights[-1])
    one_by_one = jax.tree.map(lambda *leaves: jnp.stack(leaves), weight(8, 6), weight(8, 6, seed=1))
    floats = jnp.stack([jq.unpack(weight(8, 6, seed=seed)) for seed in (0, 1)])
    np.testing.assert_array_equal(jq.unpack(one_by_one), floats)
    assert repr(one_by_one).startswith("PackedArray(float32[2, 8, 6], k=5, numbers=(2, 1, 1)")
    jq.save(tmp_path / "a.safetensors", {"w": one_by_one})
    np.testing.assert_array_equal(jq.unpack(jq.load(tmp_path / "a.safetensors"))["w"], floats)
    with pytest.raises(ValueError, match="w: expected a packed weight as it was packed, got View"):
        jq.save(tmp_path / "b.safetensors", {"w": weight(8, 6).T})
    with pytest.raises(IndexError, match="one of 3 layers, got 3"):
        stack[3]
    for index in (np.int64(7), -4):
        with pytest.raises(IndexError, match=f"one of 3 layers, got {index}"):
            stack[index]
    for index in ((0, 1), (slice(None), 0), "a", None, 1.5):
        with pytest.raises(IndexError, match="expected numbers of layers, or a slice"):
            stack[index]
    with pytest.raises(IndexError, match="stacked layers"):
        weight(8, 6)[0]
    assert [part.shape for part in stack] == [(8, 6)] * 3
    with pytest.raises(TypeError, match="expected stacked layers to go through"):
        list(weight(8, 6))
    with pytest.raises(TypeError, match=r"expected jq.unpack\(PackedArray"):
        np.asarray(stack)


@pytest.mark.parametrize("k", [2, 3, 5, 7, 16, 17, 33, 256])
@pytest.mark.parametrize("numbers", [None, (20, 1), (4, 3), (1, 6), (20, 6)])
def test_the_transposed_product_is_that_of_the_transposed_weight(k, numbers, monkeypatch):
    monkeypatch.setattr("jaxquant.packing.ops.blocks._WEIGHTS", (60, 60))
    packed, x = weight(20, 6, k=k, numbers=numbers), normal(3, 6)
    want = x @ jq.unpack(packed).T
    for implementation in ("unpack", "blocks"):
        got = jq.matmul(x, packed.T, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", [1, 2, -1, -2])
def test_inputs_say_which_axes_are_rows(inputs, tmp_path):
    for stacked, numbers in itertools.product([False, True], [None, "all"]):
        shape = (2, 4, 3, 6) if stacked else (4, 3, 6)
        own = {"stacked": True} if stacked else {"numbers": (2, 3, 1) if numbers else None}
        packed = weight(*shape, inputs=inputs, **own)
        rows = inputs if inputs > 0 else 3 + inputs
        assert packed.rows == shape[-3:][:rows] and packed.columns == shape[-3:][rows:]
        floats = jq.unpack(packed)
        assert floats.shape == shape
        jq.save(tmp_path / "a.safetensors", {"w": packed})
        loaded = jq.load(tmp_path / "a.safetensors")["w"]
        chex.assert_trees_all_equal(loaded, packed)
        assert (loaded.rows, loaded.columns) == (packed.rows, packed.columns)
        if not stacked:
            x = normal(5, *packed.rows)
            want = jnp.tensordot(x, floats, rows)
            for implementation in ("unpack", "blocks"):
                got = jq.matmul(x, packed, implementation=implementation)
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected inputs to leave axes of inputs and of outputs"):
        weight(4, 6, inputs=2)


def test_the_function_tells_which_axes_are_inputs():
    module, x = Attention(), normal(2, 3, 8)
    params = jax.jit(module.init)(KEY, x)["params"]
    found = jq.packed(lambda params, x: module.apply({"params": params}, x)).inputs(params, x)
    of = {path.split("/")[1]: number for path, number in found.items()}
    assert of == {"query": 1, "key": 1, "value": 1, "out": 2}
    tree = {"columns": normal(6, 8), "both": normal(8, 8), "stack": normal(3, 8, 2, 4)}

    def function(tree, x):
        def step(x, w):
            return jnp.einsum("td,dhe->the", x, w).reshape(-1, 8), None

        y = x @ tree["columns"].T + (x @ tree["both"] @ tree["both"].T)[:, :6]
        return y, lax.scan(step, x, tree["stack"])

    assert jq.packed(function).inputs(tree, x[0]) == {"columns": -1, "stack": 1}


def test_rules_and_functions_tell_pack_what_rows_are():
    params = {"query": {"kernel": normal(8, 2, 3)}, "bias": normal(6)}

    def function(params, x):
        return jnp.einsum("td,dhe->the", x, params["query"]["kernel"])

    x = normal(5, 8)
    plan = jq.slq(params, bits=3, rounds=(5,), rules=[jq.LayerRule("query/kernel", inputs=1)])
    params, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    told = plan.selection.inputs
    assert told == jq.packed(function).inputs(params, x) == {"query/kernel": 1}
    packed = jq.pack(params, state, inputs=told)
    assert check(function, packed, x) == ["product"]
    assert packed["query"]["kernel"].rows == (8,)
    with pytest.raises(ValueError, match="inputs: expected paths of leaves, got 'key/kernel'"):
        jq.pack(params, state, inputs={"key/kernel": 1})
    with pytest.raises(ValueError, match="query/kernel: expected inputs to leave axes of inputs"):
        jq.pack(params, state, inputs={"query/kernel": 3})


def test_packed_functions_and_arrays_are_exported(implementation):
    packed, x = weight(8, 6), normal(3, 8)
    apply = jax.jit(jq.packed(lambda w, x: x @ w + (x @ w) @ w.T @ w))
    (batch,) = jax.export.symbolic_shape("b")
    shapes = packed, jax.ShapeDtypeStruct((batch, 8), jnp.float32)
    exported = jax.export.export(apply)(*shapes).serialize()
    got = jax.export.deserialize(exported).call(packed, x)
    np.testing.assert_allclose(got, apply(packed, x), rtol=1e-5)
    look_up = jax.jit(jq.packed(lambda w, i: (w[i] @ w.T, jnp.broadcast_to(w, (*i.shape, 8, 6)))))
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    got = jax.export.export(look_up)(packed, numbers).call(packed, jnp.array([3, 1, 7]))
    chex.assert_trees_all_close(got, look_up(packed, jnp.array([3, 1, 7])), rtol=1e-5)


# Programs ----------------------------------------------------------------------------------------


def decoder(layers, width, *, stacked):
    keys = iter(jax.random.split(KEY, 4 * layers + 1))

    def make(*shape, inputs=None):
        levels = jnp.linspace(-0.3, 0.3, 16)
        return jq.pack_array(jax.random.normal(next(keys), shape) / 8, levels, inputs=inputs)

    blocks = [
        {
            "qkv": make(width, 3, width, inputs=1),
            "out": make(width, width),
            "up": make(width, 2 * width),
            "down": make(2 * width, width),
        }
        for _ in range(layers)
    ]
    if stacked:
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {"embed": make(4 * width, width), "blocks": blocks}


def decode(params, tokens, shift):
    def block(x, layer):
        q, k, v = jnp.einsum("td,dne->nte", x, layer["qkv"])
        x = x + jax.nn.softmax(q @ k.T) @ v @ layer["out"]
        return x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]

    x = params["embed"][tokens] + shift
    if isinstance(params["blocks"], list):
        for layer in params["blocks"]:
            x = block(x, layer)
    else:
        x = lax.scan(lambda x, layer: (block(x, layer), None), x, params["blocks"])[0]
    return x @ params["embed"].T


@pytest.mark.parametrize(
    ("stacked", "differentiated"),
    mostly_slow(itertools.product([False, True], [False, True]), (False, True)),
)
def test_no_float_weight_outlives_its_product(stacked, differentiated, optimized, monkeypatch):
    monkeypatch.setattr(platform, "is_one_device", lambda: True)
    jax.clear_caches()
    params, width = decoder(3, 512, stacked=stacked), 512
    apply = jq.packed(decode)

    def gradient(params, tokens, shift):
        return jax.grad(lambda shift: jnp.sum(apply(params, tokens, shift) ** 2))(shift)

    function = jax.jit(gradient if differentiated else apply)
    compiled = function.lower(params, jnp.arange(4), jnp.ones(width)).compile()
    weights = [leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_quantized)]
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * max(weights)  # 1.5 of one
    sizes = re.findall(r"\b(?:f32|bf16|f64)\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, own.split(","))) for own in sizes)
    assert largest < 1.1 * width**2 < 2 * width**2 <= sorted(weights)[-7]  # a piece at a time
    jax.clear_caches()
