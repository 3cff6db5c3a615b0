"""Files: round trips, size, the documented reader, damage and hostility."""

import base64
import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import random
import re
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from block_cases import CASES, packed_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save as serialize

import jaxquant as jq
from jaxquant.packing.arrays import is_quantized
from jaxquant.packing.codes import pack_codes
from jaxquant.packing.storage.entries import DTYPE_NAMES, DTYPES, path_text
from jaxquant.packing.storage.reading import as_jax

FORMAT = Path(__file__).parent.parent / "docs" / "format.md"


def packed_array(k, shape, *, axis=None, dtype="float32", skew=1.0, seed=0, codebook_shape=()):
    """Return random weights with unequal clusters, packed."""
    rng, slices = np.random.default_rng(seed), (*codebook_shape, k)
    if axis is not None:
        slices = (*(n if i == axis % len(shape) else 1 for i, n in enumerate(shape)), k)
    codebook = np.sort(rng.normal(size=slices), axis=-1)
    codebook = np.asarray(codebook, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    codes = rng.choice(k, shape, p=rng.dirichlet(np.full(k, 1 / skew)))
    return as_packed(codes, codebook, stacked=int(axis == 0 and len(shape) > 2))


def as_packed(codes, codebook, *, stacked=0):
    """Return a PackedArray of codes, without a program for each shape."""
    *layers, rows, columns = codes.shape if codes.ndim > 1 else (*codes.shape, 1)
    layers, rows = (*layers, rows)[:stacked], (*layers, rows)[stacked:]
    matrix = codes.reshape(*layers, math.prod(rows), columns).astype(np.uint8)
    return jq.PackedArray(
        codes=jax.device_put(pack_codes(matrix, codebook.shape[-1])),
        codebook=jax.device_put(codebook),
        rows=rows,
        columns=codes.shape[1:][-1:],
    )


@pytest.fixture(scope="module")
def tree():
    return {
        "conv": {"kernel": packed_array(17, (3, 3, 8, 16)), "bias": jnp.arange(16.0)},
        "dense": {"kernel": packed_array(3, (64, 10)), "scale": jnp.ones((10,), jnp.bfloat16)},
        "layers": packed_array(5, (4, 20, 6), axis=0, dtype="bfloat16"),
        "channels": packed_array(3, (50, 6), axis=-1, dtype="float16"),
        "one": packed_array(1, (5, 5)),
        "tiles": packed_blocks(CASES["narrow tiles"])[0],
        "scaled": packed_blocks(CASES["scaled integers"])[0],
        "scaled layers": packed_blocks(CASES["scaled layers"])[0],
        "step": jnp.int32(7),
        "mask": jnp.array([True, False]),
        "nothing": jnp.zeros((0, 3)),
    }


@pytest.fixture(scope="module")
def file(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("storage") / "model.safetensors"
    jq.save(path, tree, metadata={"accuracy": 0.9})
    return path


def test_a_tree_comes_back_bit_for_bit(tree, file):
    loaded = jq.load(file)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(loaded, tree)
    chex.assert_trees_all_equal_dtypes(loaded, tree)


@pytest.mark.parametrize("name", CASES)
def test_blocks_come_back_bit_for_bit(name, tmp_path):
    packed, _ = packed_blocks(CASES[name])
    jq.save(tmp_path / "x", {"w": packed})
    assert_equal_bits(jq.load(tmp_path / "x"), {"w": packed})


FIRST_VERSION = (  # saved by jaxquant 0.1 before there were blocks and scales
    "c-ou5!~h1>O7ZczsU?Xii6x2g@k&<JN@@8;xrrr8R!Uik6@{gVc_m6Z2&R=%b&OJ3YEf}!eqM}{m4cy;LJV9"
    "MBoL!ypl7IO5TgW=02-W;p8^ujE6vFPi4^1{<{|T8R)fTVCWC3iTCmEZ{FKt<l46iZbTphFqZAukt5mC_l$?"
    ">8oLyX+TMTk@N=aowD$sGE#zsKb7H1@ac+uvuI!a)F<)@_;r<MR!MjPlDS;T^L=clBSrqjqm$J7j@wJb5GG_"
    "_bSEhj&*1gHtg3^x=rj0`aiF*VaMG%)~~l2(*jSelxboQdWPLo*~J42>|20P5E<G&4bRNfOv8K#fS|IJu!1W"
    "QN5YGZP&{a||D$8bjC=bD)nbz(Jaun3tKBT3mwS9SdaNSQub2z`{bu*bHbutpXSn>^Wi3e1~z?#lXW_CN~za"
    "RMe)~otdllePY#?Zwy=v<_y}lr!pZ)_a-<ABltkjU=Ji5aI+nNxB-Y40Pz7JegKkpWMB{gVg(>J0OE%IP{Zs"
    "Q8bU)?Ypu=-4F&3L0AdFy8)Tk?gF}M@$Q%Y6pokNL3xjLLt*H|o`3@-vxV|@febc~1uWIVDZp{RPOP2y>9g}"
    "#k=dxHeE9!6>+mHW$8=rA0yK|Q^-|bY-5L7$8*i+i*s#RPOulsXLuO{hz@3l`KPKa43=<#ErFuMas-OPE*PV"
    "L?)U*sMs6*;%pFE*=c{pMs{0WtZKb=N$OiwkopEcD3kee*BrQn<$2g~=bP!UQ*Un$7nAaww>A?Kbznj<s{dj"
    "J=oio{wBpo>qQkRfpDhm)!U1nVa7O0Co^d1p"
)


def test_files_of_the_first_version_are_read_bit_for_bit(tmp_path):
    def numbers(*shape):
        return (np.arange(math.prod(shape)) * 7 % 11 % 3).reshape(shape)

    layers = np.arange(6).reshape(2, 1, 1, 3).astype(jnp.bfloat16)
    codes = as_packed(numbers(2, 4), np.arange(3, dtype=np.float32))
    words = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 2)
    tree = {
        "whole": as_packed(numbers(4, 3), np.array([-1, 0, 0.5], np.float32)),
        "channels": as_packed(numbers(3, 2), np.arange(6, dtype=np.float16).reshape(1, 2, 3)),
        "layers": as_packed(numbers(2, 3, 2), layers, stacked=1),
        "product": jq.ProductArray(codes=codes, words=words),
        "bias": jnp.arange(3, dtype=jnp.float32),
    }
    path = tmp_path / "x"
    path.write_bytes(zlib.decompress(base64.b85decode("".join(FIRST_VERSION))))
    assert_equal_bits(jq.load(path), tree)
    assert jq.read_metadata(path)["version"] == 1
    jq.save(tmp_path / "again", tree)  # nothing but the version differs
    for file in (path, tmp_path / "again"):
        entries = unwrapped(file.read_bytes())[1]
        assert entries == unwrapped(path.read_bytes())[1]


class Pair(NamedTuple):
    first: object
    second: object


def test_other_containers_come_back_into_the_structure_of_like(tmp_path):
    tree = Pair([packed_array(3, (8, 4)), jnp.ones(2)], ({"a/b": jnp.zeros(3)}, jnp.ones(1)))
    jq.save(tmp_path / "x", tree)
    chex.assert_trees_all_equal(jq.load(tmp_path / "x", like=tree), tree)
    shapes = jax.eval_shape(lambda: tree)
    chex.assert_trees_all_equal(jq.load(tmp_path / "x", like=shapes), tree)
    assert jq.load(tmp_path / "x")["second"]["0"].keys() == {"a/b"}
    with pytest.raises(ValueError, match=r"x: expected the leaves of `like`.* differ in first/1"):
        jq.load(tmp_path / "x", like=tree._replace(first=[tree.first[0]]))
    with pytest.raises(ValueError, match=r"x: first/1: expected shape \(3,\), got \(2,\)"):
        jq.load(tmp_path / "x", like=tree._replace(first=[tree.first[0], jnp.ones(3)]))


def test_a_single_array_is_a_tree(tmp_path):
    packed = packed_array(3, (8, 4))
    jq.save(tmp_path / "x", packed)
    chex.assert_trees_all_equal(jq.load(tmp_path / "x"), packed)


def test_numbers_of_64_bits_are_kept(tmp_path):
    jq.save(tmp_path / "x", {"n": np.int64(2**40), "x": np.float64(1 / 3)})
    loaded = jq.load(tmp_path / "x")
    assert loaded["n"] == 2**40 and loaded["n"].dtype == np.int64
    assert loaded["x"] == 1 / 3


def test_what_was_recorded_can_be_read(tmp_path, file):
    assert jq.read_metadata(file)["metadata"] == {"accuracy": 0.9}
    plan = jq.mlq({"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, groups=1)
    jq.save(tmp_path / "x", {"w": packed_array(3, (64, 64))}, plan=plan)
    read = jq.read_metadata(tmp_path / "x")
    assert read["version"] == 2 and read["jaxquant"] == jq.__version__ and read["method"] == "mlq"
    assert read["plan"]["table"] == [[pytest.approx(2 / 3)], [1.0]]
    assert read["plan"]["clustering"]["init"] == plan.clustering.init


def entropy_bytes(packed):
    """Return the entropy of the codes in bytes, in NumPy."""
    weights = np.asarray(jq.unpack(packed)).ravel()
    _, counts = np.unique(weights, return_counts=True)
    return -np.sum(counts * np.log2(counts / weights.size)) / 8


def test_the_same_tree_is_the_same_file(tree, file, tmp_path):
    jq.save(tmp_path / "x", tree, metadata={"accuracy": 0.9})
    data = file.read_bytes()
    assert (tmp_path / "x").read_bytes() == data
    assert int.from_bytes(data[:8], "little") % 8 == 0  # tensors are aligned


@pytest.mark.parametrize(("k", "skew"), [(3, 1.0), (3, 30.0), (5, 1.0), (17, 3.0), (256, 1.0)])
def test_codes_take_their_entropy(tmp_path, k, skew):
    packed = packed_array(k, (500, 400), skew=skew)
    jq.save(tmp_path / "x", {"w": packed})
    size = (tmp_path / "x").stat().st_size
    ideal = entropy_bytes(packed) + packed.codebook.nbytes
    assert ideal < size < 1.002 * ideal + 2000


def test_many_small_leaves_stay_within_5_percent_and_2_kb(tmp_path):
    layers = {
        f"layer{i}": {
            "conv": {"kernel": packed_array(3, (3, 3, 32, 32), seed=i)},
            "norm": {name: jnp.arange(32.0) for name in ("scale", "bias", "mean", "var")},
        }
        for i in range(20)
    }
    jq.save(tmp_path / "x", layers)
    packed = [layer["conv"]["kernel"] for layer in layers.values()]
    ideal = sum(entropy_bytes(p) + p.codebook.nbytes for p in packed) + 20 * 4 * 32 * 4
    assert (tmp_path / "x").stat().st_size < 1.05 * ideal + 2048


def test_stacked_layers_get_models_of_their_own_where_that_is_smaller(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.choice(3, (100, 100), p=np.roll([0.9, 0.05, 0.05], i)) for i in range(3)])
    packed = jq.pack_array(jnp.asarray(codes, jnp.float32), jnp.arange(9.0).reshape(3, 1, 1, 3) % 3)
    jq.save(tmp_path / "x", packed)
    np.testing.assert_array_equal(jq.unpack(jq.load(tmp_path / "x")), codes)
    assert (tmp_path / "x").stat().st_size < 30000 * 0.57 / 8 + 1000  # log2(3) = 1.58 if shared


# What is saved loads -----------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=())
@dataclasses.dataclass
class Node:
    left: object
    right: object


def random_packed(rng, k, shape, *, codebook_shape=(), dtype="float32", stacked=0):
    numbers = rng.bytes(math.prod(codebook_shape) * k * jnp.dtype(dtype).itemsize)
    codebook = np.frombuffer(numbers, dtype).reshape(*codebook_shape, k)
    return as_packed(rng.integers(0, k, shape), codebook, stacked=stacked)


FLOATS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
SIZES = st.integers(0, 7)


@st.composite
def packed_arrays(draw):
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    stacked = draw(st.integers(0, 1)) if len(shape) > 2 else 0
    axis = draw(st.sampled_from([None, *range(len(shape))]))
    slices = tuple(n if i == axis else 1 for i, n in enumerate(shape))
    divisors = ([m for m in range(1, max(n, 1) + 1) if n % m == 0] for n in shape)
    blocks = tuple(draw(st.sampled_from(numbers)) for numbers in divisors)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    packed = random_packed(
        rng,
        draw(st.integers(1, 256)),
        shape,
        stacked=stacked,
        codebook_shape=draw(st.sampled_from([(), slices, blocks])),
        dtype=draw(st.sampled_from(FLOATS)),
    )
    if not draw(st.booleans()):
        return packed
    own, k = draw(st.sampled_from([blocks, (1,) * len(shape)])), packed.k
    codebook = rng.integers(-128, 128, (*own, k)).astype(draw(st.sampled_from(["int8", *FLOATS])))
    scale = rng.normal(size=(*blocks, 1)).astype(draw(st.sampled_from(["float32", "bfloat16"])))
    return dataclasses.replace(
        packed,
        codebook=jax.device_put(codebook),
        scale=jax.device_put(scale),
        dtype=draw(st.sampled_from(FLOATS)),
    )


@st.composite
def product_arrays(draw):
    rng, k = np.random.default_rng(draw(st.integers(0, 99))), draw(st.integers(1, 256))
    *window, subspaces, features = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    codes = random_packed(rng, k, (*window, subspaces, features))
    codes = dataclasses.replace(codes, codebook=jnp.arange(k, dtype=jnp.float32))
    words = rng.normal(size=(subspaces, k, draw(st.integers(0, 3))))
    return jq.ProductArray(codes=codes, words=jnp.asarray(words, draw(st.sampled_from(FLOATS))))


@st.composite
def plain_arrays(draw):
    shape, dtype = (
        tuple(draw(st.lists(SIZES, max_size=4))),
        draw(st.sampled_from([*DTYPES])),
    )
    numbers = np.random.default_rng(draw(st.integers(0, 99))).bytes(
        math.prod(shape) * jnp.dtype(dtype).itemsize
    )
    array = np.frombuffer(numbers, "uint8" if dtype == "bool" else dtype).reshape(shape)
    array = array % 2 == 1 if dtype == "bool" else array
    how = draw(st.sampled_from(["JAX", "C", "Fortran", "reversed", "big-endian"]))
    if how == "big-endian":
        return array.astype(array.dtype.newbyteorder(">"))
    if how == "JAX":
        return as_jax(array)
    return {
        "C": array,
        "Fortran": np.asfortranarray(array),
        "reversed": array[::-1] if shape else array,
    }[how]


NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.sampled_from([np.float32(0.1), np.int64(2**40), np.True_, jnp.float32(2.0)]),
)
TEXT = st.text(max_size=5)
TREES = st.recursive(
    st.one_of(st.none(), NUMBERS, plain_arrays(), packed_arrays(), product_arrays()),
    lambda inner: st.one_of(
        st.dictionaries(TEXT, inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.builds(Node, inner, inner),
    ),
    max_leaves=8,
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        TEXT,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)


def assert_equal_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        other = other.astype(other.dtype.newbyteorder("="))
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@settings(max_examples=100)
@given(
    tree=TREES.filter(lambda tree: tree is not None),
    metadata=st.dictionaries(TEXT, JSON, max_size=3),
)
def test_what_is_saved_loads(tmp_path_factory, tree, metadata):
    path = tmp_path_factory.getbasetemp() / "law"
    jq.save(path, tree, metadata=metadata)
    assert_equal_bits(jq.load(path, like=tree), tree)
    nested, like = (
        jq.load(path),
        jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0],
    )
    for key_path, leaf in like:
        found = functools.reduce(lambda node, key: node[key], path_text(key_path), nested)
        assert_equal_bits(found, leaf)
    read = jq.read_metadata(path)["metadata"]
    assert json.dumps(read) == json.dumps(metadata)  # the order of keys too


class Alike(str):
    def __str__(self):
        return "a"


HALF = "\ud800"
UNFIT = {
    "an object": ({"a": object()}, "a: expected a dtype of safetensors, got object"),
    "complex128": ({"a": 1j}, "a: expected a dtype of safetensors, got complex128"),
    "too large an integer": ({"a": 2**64}, "a: expected a dtype of safetensors, got object"),
    "shapes only": ({"a": jax.ShapeDtypeStruct((3,), jnp.float32)}, "a: expected a dtype"),
    "half a character": ({HALF: jnp.ones(3)}, "expected a path of text"),
    "a long name": (
        {"x" * 1001: jnp.ones(3)},
        r"x\.\.\.: expected keys of at most 1000 char.*limits",
    ),
    "a deep leaf": (
        functools.reduce(lambda tree, _: [tree], range(101), jnp.ones(3)),
        "0/0.*: expected at most 100 keys to a leaf .*limits.*got 101",
    ),
    "an absurd and empty leaf": (
        {"a": np.zeros((0, 2**40))},
        "a: expected at most .* weights in a file of this size .see `limits`",
    ),
    "equal names": ({Alike("x"): 1, Alike("y"): 2}, "a: expected paths that differ as text"),
    "codes of another shape": (
        {"a": dataclasses.replace(packed_array(3, (8, 4)), rows=(20,))},
        r"a: expected codes uint8 \[..., 4, 4\], got uint8 \(2, 4\)",
    ),
    "codes beyond the codebook": (
        {
            "a": dataclasses.replace(
                packed_array(3, (10, 4)), codes=jnp.full((2, 4), 255, jnp.uint8)
            )
        },
        "a: expected codes below 3, got 3",
    ),
    "no codes": ({"a": dataclasses.replace(packed_array(3, (8, 4)), codes=None)}, "a: expected"),
    "a codebook of integers": (
        {"a": dataclasses.replace(packed_array(3, (8, 4)), codebook=jnp.arange(3))},
        "a: expected a codebook of floating point, or int8 with a scale, got 'int32'",
    ),
    "integers without a scale": (
        {"a": dataclasses.replace(packed_array(3, (8, 4)), codebook=jnp.ones(3, jnp.int8))},
        "a: expected a codebook of floating point, or int8 with a scale, got 'int8'",
    ),
    "weights of integers": (
        {"a": dataclasses.replace(packed_array(3, (8, 4)), dtype="int8")},
        "a: expected weights of floating point, got 'int8'",
    ),
    "blocks that do not divide": (
        {"a": packed_array(3, (8, 4), codebook_shape=(3, 1))},
        r"a: expected a codebook for weights of shape \(8, 4\), got shape \(3, 1, 3\)",
    ),
    "a scale of another shape": (
        {"a": dataclasses.replace(packed_array(3, (8, 4)), scale=jnp.ones((4, 1, 1)))},
        r"a: expected a scale for weights of shape \(8, 4\) and codebooks of shape \(3,\), got ",
    ),
    "two axes of layers": (
        {"a": jax.tree.map(lambda x: jnp.stack([x, x]), packed_array(3, (2, 8, 4), axis=0))},
        "a: expected at most one axis of stacked layers, got 2",
    ),
    "a stack of products": (
        {"a": jq.ProductArray(codes=packed_array(3, (8, 4)), words=jnp.ones((2, 8, 3, 2)))},
        r"a: expected codes \[..., M, features\] and words \[M, K, D\]",
    ),
    "another codebook of a product": (
        {"a": jq.ProductArray(codes=packed_array(3, (8, 4)), words=jnp.ones((8, 3, 2)))},
        "a: expected the numbers of 3 words",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_could_not_be_loaded_is_refused_by_name_and_nothing_is_written(name, tmp_path):
    tree, message = UNFIT[name]
    with pytest.raises(ValueError, match=message):
        jq.save(tmp_path / "x", tree)
    assert not list(tmp_path.iterdir())


def test_metadata_that_would_come_back_otherwise_is_refused(tmp_path):
    deep = functools.reduce(lambda inner, _: [inner], range(100), "x")
    for value, message in (
        ({1: 2}, "expected text as keys, got 1"),
        ({1: 2, "1": 3}, "expected text as keys, got 1"),
        ([{"a": [{None: 2}]}], "expected text as keys, got None"),
        (float("nan"), "expected what JSON can hold"),
        (HALF, "expected what JSON can hold"),
        (10**5000, "expected what JSON can hold"),
        (object(), "expected what JSON can hold"),
        (deep, "expected at most 100 levels"),
        ([deep] * 10 + [functools.reduce(lambda x, _: [x], range(9999), 1)], "what JSON can hold"),
    ):
        with pytest.raises(ValueError, match=f"metadata: .*{message}"):
            jq.save(tmp_path / "x", {}, metadata={"a": value})
    assert not list(tmp_path.iterdir())
    jq.save(tmp_path / "x", {}, metadata={"a": deep[0], "b": (1, 2)})
    assert jq.read_metadata(tmp_path / "x")["metadata"] == {"a": deep[0], "b": [1, 2]}


def test_layers_of_one_centroid_and_empty_leaves_are_no_absurd_claims(tmp_path):
    zeros = jnp.zeros(2**17 * 8, jnp.uint8)
    tree = {
        "one": jq.PackedArray(
            codes=jnp.zeros((0, 1024), jnp.uint8),
            codebook=jnp.ones(1),
            rows=(1024,),
            columns=(1024,),
        ),
        "zeros": jq.PackedArray(
            codes=zeros.reshape(256, 4096), codebook=jnp.arange(2.0), rows=(2048,), columns=(4096,)
        ),
        "empty": np.zeros((0, 2**20)),
    }
    jq.save(tmp_path / "x", tree)
    assert (tmp_path / "x").stat().st_size < 2000
    assert_equal_bits(jq.load(tmp_path / "x"), tree)


def test_a_manifest_that_compresses_too_well_is_not_compressed(tmp_path):
    tree = {"x" * 900 + str(i): 1 for i in range(2000)}
    jq.save(tmp_path / "x", tree)
    assert len(jq.load(tmp_path / "x")) == 2000


def test_limits_can_be_raised_for_both(tmp_path):
    tree, path = {"a": {"b": np.zeros((0, 9))}, "c": 1}, tmp_path / "x"
    for tight in (
        jq.Limits(leaves=1),
        jq.Limits(depth=1),
        jq.Limits(name=0),
    ):
        with pytest.raises(ValueError, match="see `limits`"):
            jq.save(path, tree, limits=tight)
        jq.save(path, tree)
        with pytest.raises(ValueError, match=r"x: .*see `limits`"):
            jq.load(path, limits=tight)
        path.unlink()
    large = {"a": np.zeros((0, 2**27))}
    jq.save(path, large, limits=jq.Limits(weights=2**27))
    with pytest.raises(ValueError, match=r"x: a: expected at most .* weights .*see `limits`"):
        jq.load(path)
    assert jq.load(path, limits=jq.Limits(weights=2**27))["a"].shape == (0, 2**27)


def test_a_stack_of_one_layer_stays_a_stack(tmp_path):
    for stacked, codebook_shape in ((1, (1, 1, 1)), (0, (1, 1, 1)), (0, ())):
        rng = np.random.default_rng(0)
        packed = random_packed(rng, 3, (1, 8, 4), stacked=stacked, codebook_shape=codebook_shape)
        jq.save(tmp_path / "x", {"a": packed})
        assert_equal_bits(jq.load(tmp_path / "x"), {"a": packed})


def test_files_of_many_shapes_compile_nothing(tmp_path):
    rng, compiled = np.random.default_rng(0), []
    tree = {f"{k} {n}": random_packed(rng, k, (n, 3)) for k, n in enumerate(range(7, 66), 1)}
    jax.block_until_ready(tree)
    listener = lambda name, *_, **__: compiled.append(name) if "compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jq.save(tmp_path / "x", tree)
        loaded = jq.load(tmp_path / "x")
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled
    assert_equal_bits(loaded, tree)


# The documented reader ---------------------------------------------------------------------------


def test_the_documented_reader_reads_the_same(tree, file):
    text = FORMAT.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.strip().splitlines()) <= 40
    names: dict = {}
    exec(compile(code, str(FORMAT), "exec"), names)
    read = names["read"](file)
    leaves = jax.tree_util.tree_flatten_with_path(jq.unpack(tree))[0]
    expected = {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves
    }
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype and read[name].shape == array.shape


# Damage and hostility ----------------------------------------------------------------------------


def unwrapped(data):
    """Return the tensors, the manifest's entries and the fields of the header of a file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = {
        name: np.frombuffer(tensor["data"], jnp.dtype(DTYPE_NAMES[tensor["dtype"]]))
        for name, tensor in deserialize(data)
    }
    return tensors, json.loads(zlib.decompress(tensors.pop("manifest"))), header


def wrapped(tensors, entries, header):
    """Return the file of all that, the header's checksum right, as an attacker would make it."""
    if "manifest" not in tensors:
        manifest = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        tensors = tensors | {"manifest": np.frombuffer(zlib.compress(manifest, 9), np.uint8)}
    return sealed(serialize(tensors, header))


def sealed(data):
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    if not {"checksums", "manifest"} <= header.keys():
        return data
    (start, end), (_, last) = (header[x]["data_offsets"] for x in ("manifest", "checksums"))
    checksum = zlib.crc32(data[begin + start : begin + end], zlib.crc32(data[:begin]))
    return data[: begin + last - 4] + struct.pack("<I", checksum) + data[begin + last :]


def rewritten(file, path, change):
    """Write a file whose tensors, manifest and header went through `change`."""
    tensors, entries, header = unwrapped(file.read_bytes())
    change(tensors, entries, header)
    path.write_bytes(wrapped(tensors, entries, header))


def entry_of(entries, name):
    return next(entry for entry in entries if "/".join(entry["path"]) == name)


def set_entry(name, **fields):
    return lambda tensors, entries, header: entry_of(entries, name).update(fields)


def set_scale(**fields):
    return lambda tensors, entries, header: entry_of(entries, "scaled")["scale"].update(fields)


def set_tensor(name, array):
    return lambda tensors, entries, header: tensors.update({name: array})


def change_frequency(tensors, entries, header):
    (start,) = np.flatnonzero(tensors["frequencies"] == 0)  # that of `one`
    tensors["frequencies"] = tensors["frequencies"].copy()
    tensors["frequencies"][start] = 1


def set_description(**fields):
    def change(tensors, entries, header):
        header["jaxquant"] = json.dumps(json.loads(header["jaxquant"]) | fields)

    return change


def set_header(**fields):
    return lambda tensors, entries, header: header.update(fields)


HOSTILE = {
    "absurd weights": (
        set_entry("dense/kernel", rows=[2**40]),
        "expected at most .* weights in a file of this size",
    ),
    "absurd shape": (set_entry("conv/bias", shape=[2**20]), "values.float32: expected"),
    "beyond any size": (set_entry("conv/bias", shape=[2**60]), "expected shape to be sizes"),
    "absurd and empty": (
        set_entry("nothing", shape=[0, 2**47]),
        "expected at most .* weights in a file of this size",
    ),
    "absurd and empty weights": (
        set_entry("one", rows=[2**47], columns=[0]),
        "expected at most .* weights in a file of this size",
    ),
    "negative": (set_entry("conv/bias", shape=[-16]), "expected shape to be sizes"),
    "fraction": (set_entry("conv/bias", shape=[16.0]), "expected shape to be sizes"),
    "true": (set_entry("step", shape=[True]), "expected shape to be sizes"),
    "many axes": (set_entry("step", shape=[1] * 65), "expected shape to be sizes"),
    "words": (set_entry("conv/kernel", words=1), "codes: expected"),
    "models": (set_entry("conv/kernel", models=2), "expected a model for all layers"),
    "no models": (set_entry("conv/kernel", models=-1), "expected models to be a count"),
    "columns": (set_entry("dense/kernel", columns=[5, 3]), "expected another checksum"),
    "codebook": (set_entry("channels", shape=[1, 5, 3]), "expected a codebook for weights"),
    "no centroids": (set_entry("conv/kernel", shape=[0]), "1 to 256 centroids"),
    "dtype": (set_entry("conv/bias", dtype="object"), "expected a dtype"),
    "list as dtype": (set_entry("conv/bias", dtype=[]), "expected a dtype"),
    "integer codebook": (set_entry("conv/kernel", dtype="int32"), "of floating point"),
    "missing dtype": (set_entry("conv/bias", dtype="float64"), "expected a tensor values.float64"),
    "same path": (set_entry("conv/bias", path=["conv", "kernel"]), "conv/kernel: .* twice"),
    "path through a leaf": (
        set_entry("conv/bias", path=["conv", "kernel", "x"]),
        "conv/kernel/x: expected no leaf at conv/kernel",
    ),
    "path of numbers": (set_entry("conv/bias", path=[1]), "expected a path of text"),
    "path of half a character": (set_entry("conv/bias", path=["\ud800"]), "a path of text"),
    "deep path": (set_entry("conv/bias", path=["a"] * 101), "expected at most 100 keys"),
    "long name": (set_entry("conv/bias", path=["a" * 1001]), "keys of at most 1000 characters"),
    "other fields": (set_entry("conv/bias", pickle="x"), "expected other fields"),
    "no entry": (lambda t, e, h: e.pop(), "expected an entry for each checksum"),
    "odd entry": (lambda t, e, h: e.__setitem__(0, 5), "expected an object"),
    "weights": (set_entry("tiles", weights="int32"), "expected weights of floating point"),
    "weights of nothing": (set_entry("tiles", weights=None), "expected weights of floating point"),
    "blocks": (set_entry("tiles", shape=[3, 2, 8]), "expected a codebook for weights"),
    "scale of nothing": (set_entry("scaled", scale=None), "expected a scale of a shape and a dty"),
    "scale of more": (
        set_entry("scaled", scale={"shape": [2, 3, 1], "dtype": "float32", "x": 1}),
        "expected a scale of a shape and a dtype",
    ),
    "scale's dtype": (set_scale(dtype="float16"), "expected a scale of float32 or bfloat16"),
    "list as a scale's dtype": (set_scale(dtype=[]), "expected a scale of float32 or bfloat16"),
    "scale's shape": (set_scale(shape=3), "expected the scale's shape to be sizes"),
    "absurd scale": (set_scale(shape=[2**40, 3, 1]), "expected a scale for weights of shape"),
    "scale of no axes": (set_scale(shape=[]), "expected a scale for weights of shape"),
    "scale of columns": (set_scale(shape=[2, 3, 2]), "expected a scale for weights of shape"),
    "other blocks": (set_scale(shape=[3, 2, 1]), "expected a scale for weights of shape"),
    "fewer scales": (set_scale(shape=[1, 3, 1]), "values.float32: expected"),
    "codebooks beside a scale": (
        set_entry("scaled", shape=[1, 2, 8]),
        "expected a scale for weights of shape .* codebooks of shape .1, 2, 8.",
    ),
    "another codebook beside a scale": (set_entry("scaled", shape=[16]), "expected a scale for"),
    "integers without a scale": (
        lambda t, e, h: entry_of(e, "scaled").pop("scale"),
        "expected a codebook of floating point, or int8 with a scale",
    ),
    "a scale of plain values": (
        set_entry("conv/bias", scale={"shape": [1], "dtype": "float32"}),
        "expected other fields",
    ),
    "frequencies": (
        lambda t, e, h: t.update(frequencies=np.zeros_like(t["frequencies"])),
        "expected frequencies",
    ),
    "more words": (
        lambda t, e, h: t.update(codes=np.append(t["codes"], np.uint32(1))),
        "codes: expected",
    ),
    "bomb": (
        set_tensor("manifest", np.frombuffer(zlib.compress(bytes(2**27)), np.uint8)),
        "manifest: expected",
    ),
    "no zlib": (set_tensor("manifest", np.arange(9, dtype=np.uint8)), "manifest: "),
    "more than a manifest": (
        set_tensor("manifest", np.frombuffer(zlib.compress(b"[]") + b"x", np.uint8)),
        "manifest: expected",
    ),
    "frequency of one centroid": (change_frequency, "frequency of 0 for one centroid"),
    "unknown tensor": (set_tensor("evil", np.zeros(3, np.uint8)), "expected no tensor evil"),
    "other rank": (set_tensor("codes", np.zeros((1, 1), np.uint32)), "expected no tensor codes"),
    "missing tensor": (lambda t, e, h: t.pop("checksums"), "expected a tensor checksums"),
    "other format": (set_header(format="pt"), "expected a file of jaxquant.save"),
    "other version": (
        set_header(jaxquant='{"version": 3}'),
        "expected format version 1 or 2, got 3",
    ),
    "no version": (set_header(jaxquant="[]"), "expected a JSON object"),
    "name twice": (set_header(jaxquant='{"version": 1, "version": 1}'), "every name once"),
    "version true": (set_header(jaxquant='{"version": true}'), "expected format version 1"),
    "version only": (set_header(jaxquant='{"version": 1}'), "expected a header with"),
    "deep": (set_header(jaxquant="[" * 100000), "expected JSON"),
    "many digits": (set_header(jaxquant=f'{{"version": {"1" * 5000}}}'), "expected JSON"),
    "not a number": (set_header(jaxquant='{"version": NaN}'), "expected JSON"),
    "metadata of text": (set_description(metadata="x"), "expected a header with"),
    "deep metadata": (
        set_description(metadata=json.loads('{"a": ' * 200 + "1" + "}" * 200)),
        "metadata: expected at most 100 levels",
    ),
    "products of text": (set_description(products=["x"]), "expected products to be paths"),
    "products of nothing": (set_description(products=5), "expected products to be paths"),
    "product at the root": (set_description(products=[[]]), "the root: expected packed codes"),
    "no product": (set_description(products=[["conv"]]), "conv: expected packed codes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(file, tmp_path, name):
    change, message = HOSTILE[name]
    rewritten(file, tmp_path / "evil", change)
    with pytest.raises(ValueError, match=f"evil: .*({message})"):
        jq.load(tmp_path / "evil")


def test_a_header_with_a_name_twice_is_refused(file, tmp_path):
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    (entry,) = re.findall(rb'"codes":\{.*?\}', header)
    header = header[:-1] + b"," + entry + b"}"
    header += b" " * (-len(header) % 8)
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    with pytest.raises(ValueError, match="x: "):
        jq.load(path)


def test_every_truncation_is_refused(file, tmp_path):
    data, path = file.read_bytes(), tmp_path / "x"
    for length in [0, 1, 7, 8, 9, *range(10, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="x: "):
            jq.load(path)


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    numbers = jnp.arange(3, dtype=jnp.float32)
    codes = dataclasses.replace(packed_array(3, (2, 4)), codebook=numbers)
    tree = {
        "a": jq.ProductArray(codes=codes, words=jnp.ones((2, 3, 1))),
        "b": dataclasses.replace(
            packed_array(1, (2, 2), codebook_shape=(1, 1)), scale=jnp.full((2, 1, 1), 0.5)
        ),
    }
    path = tmp_path / "x"
    jq.save(path, tree, metadata={"a": 1})
    data, metadata = path.read_bytes(), jq.read_metadata(path)
    header, noticed = 8 + int.from_bytes(data[:8], "little"), 0
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            if position >= header:
                assert_equal_bits(jq.load(path), tree)
            assert jq.read_metadata(path) == metadata
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), error
            noticed += 1
        else:
            assert position >= header, "a bit of the header went unnoticed"
    assert noticed > 7.9 * len(data)


def test_the_metadata_is_not_read_from_a_damaged_header(file, tmp_path):
    data = file.read_bytes()
    assert data.count(b'accuracy\\": 0.9') == 1
    (tmp_path / "x").write_bytes(data.replace(b'accuracy\\": 0.9', b'accuracy\\": 0.8'))
    for read in (jq.load, jq.read_metadata):
        with pytest.raises(ValueError, match=r"x: expected another checksum, the header is damag"):
            read(tmp_path / "x")


def test_files_of_before_the_checksum_of_the_header_are_read(tree, file, tmp_path):
    tensors, entries, header = unwrapped(file.read_bytes())
    tensors["checksums"] = tensors["checksums"][:-1]
    manifest = np.frombuffer(zlib.compress(json.dumps(entries).encode()), np.uint8)
    (tmp_path / "x").write_bytes(serialize(tensors | {"manifest": manifest}, header))
    chex.assert_trees_all_equal(jq.load(tmp_path / "x"), tree)
    assert jq.read_metadata(tmp_path / "x") == jq.read_metadata(file)


def described(products=(), **metadata):
    fields = {"version": 1, "jaxquant": "0", "method": None, "plan": None, "metadata": metadata}
    return {"format": "jaxquant", "jaxquant": json.dumps(fields | {"products": list(products)})}


def plain_entry(*path, shape=(0,)):
    return {"path": list(path), "shape": list(shape), "dtype": "float32"}


def packed_entry(*path, k=3, words=0, **sizes):
    return plain_entry(*path, shape=(k,)) | {
        **{"rows": [], "columns": [], "stacked": [], "models": 1, "words": words},
        **sizes,
    }


def hostile_file(entries, *, values=0, codes=(), frequencies=(), header=None, leaves=None):
    tensors = {
        "checksums": np.zeros(len(entries) if leaves is None else leaves, np.uint32),
        "codes": np.array(codes, np.uint32),
        "frequencies": np.array(frequencies, np.uint16),
        "values.float32": np.zeros(values, np.float32),
    }
    return wrapped(tensors, entries, header or described())


COSTLY = {
    "a million keys": lambda: hostile_file([plain_entry(*"a" * 10**6)]),
    "nested dictionaries": lambda: hostile_file(
        [plain_entry(*"ab" * 400, str(i)) for i in range(20)]
    ),
    "many nested dictionaries": lambda: hostile_file(
        [plain_entry(str(i), *"a" * 90) for i in range(20_000)]
    ),
    "equal names": lambda: hostile_file(
        [*(plain_entry(str(i)) for i in range(20_000)), plain_entry("19999")]
    ),
    "names that begin alike": lambda: hostile_file(
        [plain_entry(*"a" * 99, "b")] + [plain_entry(*"a" * 99, "c", "d")] * 9000
    ),
    "brackets": lambda: hostile_file(b"[" * 10**7, leaves=1),
    "empty objects": lambda: hostile_file(b"[" + b"{}," * 10**7 + b"1]", leaves=1),
    "many leaves": lambda: hostile_file([plain_entry(str(i)) for i in range(70_000)]),
    "weights": lambda: hostile_file(
        [packed_entry("a", rows=[2**15], columns=[2**15], words=2**18)],
        values=3,
        codes=np.arange(1, 2**18 + 1),
        frequencies=[65534, 1, 1],
    ),
    "empty weights": lambda: hostile_file(
        [packed_entry(str(i), k=1, rows=[2**26], columns=[0]) for i in range(500)],
        values=500,
        frequencies=[0] * 500,
    ),
    "one centroid": lambda: hostile_file(
        [packed_entry(str(i), k=1, rows=[2**25]) for i in range(500)],
        values=500,
        frequencies=[0] * 500,
    ),
    "words of a product": lambda: hostile_file(
        [
            packed_entry("p", "codes", rows=[0], columns=[1]),
            plain_entry("p", "words", shape=(0, 2**26, 0)),
        ],
        values=3,
        frequencies=[65534, 1, 1],
        header=described(products=[["p"]]),
    ),
    "digits": lambda: hostile_file(b"[" + b"1" * 10**6 + b"]", leaves=1),
    "metadata": lambda: hostile_file([], header=described(a=json.loads("[" * 900 + "]" * 900))),
}


@pytest.mark.parametrize("name", COSTLY)
def test_small_files_are_refused_at_little_cost(name, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(COSTLY[name]())
    assert path.stat().st_size < 2**21
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(ValueError, match="x: "):
            jq.load(path)
        assert time.process_time() - begin < 5
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def product_parts(k=3, subspaces=2, **others):
    """Return a dictionary of what makes a product, some of it otherwise."""
    numbers = np.arange(3, dtype=np.float32)
    codes = as_packed(np.zeros((2, 4), int), numbers)
    return {"codes": codes, "words": np.ones((subspaces, k, 2), np.float32)} | others


MATRIX = as_packed(np.zeros((2, 4), int), np.ones(3, np.float32))
NUMBERS_OF_3 = as_packed(np.zeros((2, 4), int), np.arange(3, dtype=np.float32))
PRODUCTS = {
    "at the root beside a leaf": (product_parts(x=1), [[]], "x: expected no leaf at the root"),
    "beside a leaf": ({"p": product_parts(x=1)}, [["p"]], "p/x: expected no leaf at p"),
    "at a leaf": ({"p": product_parts()}, [["p", "codes"]], "p/codes: expected packed codes"),
    "twice": ({"p": product_parts()}, [["p"], ["p"]], "p: expected packed codes and words"),
    "inside of another": (
        {"p": product_parts(codes=product_parts())},
        [["p", "codes"], ["p"]],
        "p: expected packed codes and words",
    ),
    "without codes": ({"p": {"words": np.ones((2, 3, 2))}}, [["p"]], "p: expected packed codes"),
    "without words": ({"p": {"codes": MATRIX}}, [["p"]], "p: expected packed codes and words"),
    "of words as codes": (
        {"p": product_parts(codes=np.ones((2, 4)))},
        [["p"]],
        "p: expected packed codes and words",
    ),
    "of codes as words": ({"p": product_parts(words=MATRIX)}, [["p"]], "p: expected packed codes"),
    "of a matrix of words": (
        {"p": product_parts(words=np.ones((2, 6)))},
        [["p"]],
        r"p: expected codes \[..., M, features\] and words \[M, K, D\], got \(2, 4\), \(2, 6\)",
    ),
    "of other subspaces": ({"p": product_parts(subspaces=3)}, [["p"]], "p: expected codes "),
    "of other words": ({"p": product_parts(k=4)}, [["p"]], "p: expected the numbers of 4 words"),
    "of scaled numbers": (
        {
            "p": product_parts(
                codes=dataclasses.replace(
                    NUMBERS_OF_3,
                    codebook=NUMBERS_OF_3.codebook[None, None],
                    scale=np.ones((1, 1, 1), np.float32),
                )
            )
        },
        [["p"]],
        "p: expected the numbers of 3 words as the codebook",
    ),
    "of other numbers": (
        {"p": product_parts(codes=MATRIX)},
        [["p"]],
        "p: expected the numbers of 3 words as the codebook",
    ),
    "of integers": (
        {"p": product_parts(words=np.ones((2, 3, 2), int))},
        [["p"]],
        "p: expected words of floating point, got int64",
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_have_two_leaves_and_share_a_path_with_none(name, tmp_path):
    tree, products, message = PRODUCTS[name]
    jq.save(tmp_path / "dictionaries", tree)
    rewritten(tmp_path / "dictionaries", tmp_path / "x", set_description(products=products))
    with pytest.raises(ValueError, match=f"x: {message}"):
        jq.load(tmp_path / "x")


def mutated(value, rng):
    """Return JSON with one of its values replaced, removed, or put elsewhere."""
    box = [copy.deepcopy(value)]
    places, level = [], [box]
    while level:
        pairs = [
            (node, key)
            for node in level
            for key in (list(node) if isinstance(node, dict) else range(len(node)))
        ]
        places += pairs
        level = [node[key] for node, key in pairs if isinstance(node[key], dict | list)]
    (node, key), (other, name) = rng.choice(places), rng.choice(places)
    atom = rng.choice([None, True, -1, 0, 1, 2**40, 2**70, 0.5, "", "a", EVIL, [], {}, [[]], ["p"]])
    match rng.randrange(4):
        case 0:
            node[key] = copy.deepcopy(other[name])
        case 1 if isinstance(node, dict):
            del node[key]
        case 2 if type(node[key]) is int:
            node[key] += rng.choice([-1, 1])
        case _:
            node[key] = atom
    return box[0]


def test_mutated_files_load_or_are_refused_by_name(tmp_path):
    path, rng = tmp_path / "x", random.Random(0)
    numbers = np.arange(3, dtype=np.float32)
    jq.save(
        path,
        {
            "p": jq.ProductArray(codes=as_packed(np.eye(2, 4), numbers), words=jnp.ones((2, 3, 1))),
            "layers": packed_array(5, (3, 4, 2), axis=0, dtype="bfloat16"),
            "scaled": packed_blocks(CASES["scaled integers"])[0],
            "plain": jnp.arange(4.0),
        },
        metadata={"a": [1, {"b": 2.5}]},
    )
    data, refused = path.read_bytes(), 0
    for _ in range(400):
        tensors, entries, header = unwrapped(data)
        if rng.random() < 0.7:
            entries = mutated(entries, rng)
        else:
            header["jaxquant"] = json.dumps(mutated(json.loads(header["jaxquant"]), rng))
        path.write_bytes(wrapped(tensors, entries, header))
        try:
            loaded = jq.load(path)
            jq.save(tmp_path / "again", loaded)
            assert_equal_bits(jq.load(tmp_path / "again"), loaded)
        except ValueError as error:
            message = str(error).removeprefix(f"{path}: ")
            assert message != str(error) and message.isprintable() and len(message) < 600, error
            refused += 1
    assert 200 < refused < 400


EVIL = "\x1b]0;evil\x07\r\n\u202e" + "x" * 10**5


def test_messages_are_short_and_control_no_terminal(tmp_path):
    path = tmp_path / "x"
    limits = jq.Limits(name=10**6, weights=0)
    for data in (
        hostile_file([plain_entry(EVIL), plain_entry(EVIL)]),
        hostile_file([plain_entry(*[EVIL] * 99), plain_entry(*[EVIL] * 100)]),
        hostile_file([plain_entry("a") | {"dtype": EVIL}]),
        hostile_file([plain_entry("a") | {EVIL: 1}]),
        hostile_file([plain_entry("a") | {"shape": [EVIL] * 1000}]),
        hostile_file([plain_entry("a") | {"path": [[EVIL]] * 1000}]),
        hostile_file([EVIL]),
        hostile_file([], header=described(products=[[EVIL]])),
        hostile_file([], header={"format": "jaxquant", "jaxquant": json.dumps({"version": EVIL})}),
        hostile_file([], header={"format": EVIL, "jaxquant": EVIL}),
        hostile_file([], header={"format": "jaxquant", "jaxquant": EVIL}),
        hostile_file(json.dumps(EVIL).encode(), leaves=1),
        serialize({EVIL: np.ones(1)}, described()),
        EVIL.encode(),
        struct.pack("<Q", 10**5) + EVIL.encode(),
        struct.pack("<Q", len(EVIL.encode()) + 4)
        + json.dumps({EVIL: EVIL}, ensure_ascii=False).encode() * 2,
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="x: ") as caught:
            jq.load(path, limits=limits)
        message = str(caught.value).removeprefix(str(path))
        assert message.isprintable() and len(message) < 600, message


def test_a_damaged_leaf_is_named(file, tmp_path):
    for name, leaf in (("values.int32", "step"), ("values.float16", "channels")):

        def change(tensors, entries, header, name=name):
            tensors[name] = tensors[name] + tensors[name].dtype.type(1)

        rewritten(file, tmp_path / "x", change)
        with pytest.raises(ValueError, match=rf"x: {leaf}: expected another checksum"):
            jq.load(tmp_path / "x")


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text: expected a safetensors file"):
        jq.load(tmp_path / "text")
    (tmp_path / "plain").write_bytes(serialize({"a": np.ones(3)}))
    with pytest.raises(ValueError, match=r"plain: expected a file of jaxquant.save"):
        jq.load(tmp_path / "plain")
    with pytest.raises(FileNotFoundError):
        jq.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        jq.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        for read in (jq.load, jq.read_metadata):
            with pytest.raises(ValueError, match=f"{path}: expected a regular file"):
                read(path)


def test_leaves_that_cannot_be_stored_are_named_and_nothing_is_written(tmp_path):
    path = tmp_path / "x"
    for tree, message in (
        ({"a": {"key": jax.random.key(0)}}, "a/key: expected an array of numbers"),
        ({"a": np.array(["text"])}, "a: expected a dtype of safetensors, got <U4"),
        ({"a": jnp.ones(3, jnp.int4)}, "a: expected a dtype of safetensors, got int4"),
    ):
        with pytest.raises(ValueError, match=message):
            jq.save(path, tree)
    with pytest.raises(ValueError, match="metadata: expected what JSON can hold"):
        jq.save(path, {}, metadata={"a": object()})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    jq.save(path, {"a": jnp.ones(3)})
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        jq.save(path, {"a": jnp.zeros(3)})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    jq.save(tmp_path / "x", {"a": jnp.ones(3)})
    (tmp_path / "y").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_an_empty_tree_comes_back(tmp_path):
    jq.save(tmp_path / "x", {})
    assert jq.load(tmp_path / "x") == {}
