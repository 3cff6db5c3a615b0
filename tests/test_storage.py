"""Files: round trips, size, the documented reader, damage and hostility."""

import errno
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save as serialize

import jaxquant as jq
from jaxquant import storage

FORMAT = Path(__file__).parent.parent / "docs" / "format.md"


def packed_array(k, shape, *, axis=None, dtype="float32", skew=1.0, seed=0):
    """Return random weights with unequal clusters, packed."""
    rng, slices = np.random.default_rng(seed), (k,)
    if axis is not None:
        slices = (*(n if i == axis % len(shape) else 1 for i, n in enumerate(shape)), k)
    codebook = np.sort(rng.normal(size=slices), axis=-1)
    codebook = np.asarray(codebook, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    codes = rng.choice(k, (*shape, 1), p=rng.dirichlet(np.full(k, 1 / skew)))
    weights = np.take_along_axis(np.broadcast_to(codebook, (*shape, k)), codes, axis=-1)[..., 0]
    return jq.pack_array(jnp.asarray(weights), jnp.asarray(codebook))


@pytest.fixture(scope="module")
def tree():
    return {
        "conv": {"kernel": packed_array(17, (3, 3, 8, 16)), "bias": jnp.arange(16.0)},
        "dense": {"kernel": packed_array(3, (64, 10)), "scale": jnp.ones((10,), jnp.bfloat16)},
        "layers": packed_array(5, (4, 20, 6), axis=0, dtype="bfloat16"),
        "channels": packed_array(3, (50, 6), axis=-1, dtype="float16"),
        "one": packed_array(1, (5, 5)),
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
    assert read["version"] == 1 and read["jaxquant"] == jq.__version__ and read["method"] == "mlq"
    assert read["plan"]["table"] == [[pytest.approx(2 / 3)], [1.0]]


def entropy_bytes(packed):
    """Return the entropy of the codes in bytes, in NumPy."""
    weights = np.asarray(jq.unpack(packed)).ravel()
    _, counts = np.unique(weights, return_counts=True)
    return -np.sum(counts * np.log2(counts / weights.size)) / 8


def test_the_order_in_which_safetensors_hashes_does_not_show(file):
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    fields = header.pop("__metadata__")
    assert list(fields) == ["format", "jaxquant"]
    other = {**header, "__metadata__": dict(reversed(fields.items()))}
    text = json.dumps(other).encode()
    assert storage._in_order(struct.pack("<Q", len(text)) + text + data[8 + size :]) == data


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


def rewritten(file, path, change):
    """Write a file whose tensors, manifest and header went through `change`."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = {
        name: np.frombuffer(tensor["data"], jnp.dtype(storage._NAMES[tensor["dtype"]]))
        for name, tensor in deserialize(data)
    }
    manifest = tensors["manifest"]
    entries = json.loads(zlib.decompress(manifest))
    change(tensors, entries, header)
    if tensors["manifest"] is manifest:
        tensors["manifest"] = np.frombuffer(zlib.compress(json.dumps(entries).encode()), np.uint8)
    path.write_bytes(serialize(tensors, header))


def entry_of(entries, name):
    return next(entry for entry in entries if "/".join(entry["path"]) == name)


def set_entry(name, **fields):
    return lambda tensors, entries, header: entry_of(entries, name).update(fields)


def set_tensor(name, array):
    return lambda tensors, entries, header: tensors.update({name: array})


def set_header(**fields):
    return lambda tensors, entries, header: header.update(fields)


HOSTILE = {
    "absurd weights": (
        set_entry("dense/kernel", rows=[2**40]),
        "expected at most .* weights in a file of this size",
    ),
    "absurd shape": (set_entry("conv/bias", shape=[2**40]), "values.float32: expected"),
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
    "columns": (set_entry("dense/kernel", columns=[5, 2]), "expected a codebook for weights"),
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
    "other fields": (set_entry("conv/bias", pickle="x"), "expected other fields"),
    "no entry": (lambda t, e, h: e.pop(), "expected an entry for each checksum"),
    "odd entry": (lambda t, e, h: e.__setitem__(0, 5), "expected an object"),
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
    "unknown tensor": (set_tensor("evil", np.zeros(3, np.uint8)), "expected no tensor evil"),
    "other rank": (set_tensor("codes", np.zeros((1, 1), np.uint32)), "expected no tensor codes"),
    "missing tensor": (lambda t, e, h: t.pop("checksums"), "expected a tensor checksums"),
    "other format": (set_header(format="pt"), "expected a file of jaxquant.save"),
    "other version": (set_header(jaxquant='{"version": 2}'), "expected format version 1, got 2"),
    "no version": (set_header(jaxquant="[]"), "expected a JSON object"),
    "name twice": (set_header(jaxquant='{"version": 1, "version": 1}'), "every name once"),
    "deep": (set_header(jaxquant="[" * 100000), "expected JSON"),
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


def test_a_flipped_byte_is_refused_or_harmless(tree, file, tmp_path):
    data, path = bytearray(file.read_bytes()), tmp_path / "x"
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for position in [*range(0, header, 7), *rng.integers(header, len(data), 150)]:
        old = data[position]
        data[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            loaded = jq.load(path)
        except ValueError as error:
            assert str(error).startswith(str(path)), error
            refused += 1
        else:
            assert position < header, "a flipped byte of the tensors went unnoticed"
            chex.assert_trees_all_equal(loaded, tree)
        data[position] = old
    assert refused >= 150


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
