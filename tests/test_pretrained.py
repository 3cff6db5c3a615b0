"""Tests of PyTorch state_dicts: names, layouts, the round trip, and what is refused."""

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from train import models, pretrained

CHECKPOINTS = os.environ.get("JAXQUANT_CHECKPOINTS")
INPUTS = {"resnet20": (1, 32, 32, 3), "small_cnn": (1, 8, 8, 1), "lenet5": (1, 28, 28, 1)}


def random_variables(name, seed=0):
    module = models.build(name, num_classes=10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(INPUTS[name]))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def lenet(tmp_path):
    """A network's variables, their state_dict, and a function that writes a changed one."""
    variables = random_variables("lenet5")
    tensors = pretrained.to_state_dict(variables)

    def write(**changes):
        path = tmp_path / "lenet.npz"
        changed = {**tensors, **changes}
        np.savez(path, **{name: value for name, value in changed.items() if value is not None})
        return path

    return variables, tensors, write


@pytest.mark.parametrize("name", list(INPUTS))
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_round_trip(name, suffix, tmp_path):
    variables, path = random_variables(name), tmp_path / f"model{suffix}"
    tensors = pretrained.to_state_dict(variables)
    save_file(tensors, path) if suffix == ".safetensors" else np.savez(path, **tensors)
    loaded = pretrained.load(path, random_variables(name, seed=1))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_names_are_those_of_pytorch():
    names = set(pretrained.to_state_dict(random_variables("resnet20")))
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.running_var"} <= names
    assert {"bn1.weight", "bn1.bias", "bn1.running_mean", "linear.weight", "linear.bias"} <= names
    assert set(pretrained.to_state_dict(random_variables("lenet5"))) == {
        f"{layer}.{leaf}"
        for layer in ("conv1", "conv2", "fc1", "fc2")
        for leaf in ("weight", "bias")
    }


def test_layouts_are_those_of_pytorch():
    variables = random_variables("lenet5")
    tensors, params = pretrained.to_state_dict(variables), variables["params"]
    assert tensors["conv2.weight"].shape == (50, 20, 5, 5)
    assert tensors["conv2.weight"][7, 3, 1, 4] == params["conv2"]["kernel"][1, 4, 3, 7]
    assert tensors["fc1.weight"].shape == (500, 800)
    assert tensors["fc1.weight"][5, 17] == params["fc1"]["kernel"][17, 5]
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_module_prefix_and_batch_counts_are_dropped(tmp_path):
    variables, path = random_variables("small_cnn"), tmp_path / "parallel.npz"
    tensors = {**pretrained.to_state_dict(variables), "bn1.num_batches_tracked": np.int64(7)}
    np.savez(path, **{f"module.{name}": tensor for name, tensor in tensors.items()})
    loaded = pretrained.load(path, variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_shapes_suffice_as_the_template(lenet):
    variables, _, write = lenet
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(write(), shapes), variables)


def test_float64_becomes_the_dtype_of_the_network(lenet):
    variables, tensors, write = lenet
    path = write(**{"fc2.bias": tensors["fc2.bias"].astype(np.float64)})
    assert pretrained.load(path, variables)["params"]["fc2"]["bias"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc2.bias": None}, r"expected the model's 8 tensors, got 1 missing \(fc2.bias\)"),
        ({"fc9.bias": np.zeros(3)}, r"got 1 unexpected \(fc9.bias\)"),
        ({"fc2.bias": None, "fc9.bias": np.zeros(3)}, r"1 missing \(.*\), 1 unexpected \("),
        ({"module.fc2.bias": np.zeros(10)}, r"1 unexpected \(module.fc2.bias\)"),
        (
            {"conv1.weight": np.zeros((5, 5, 1, 20))},
            r"conv1.weight: expected shape \(20, 1, 5, 5\), got \(5, 5, 1, 20\)",
        ),
        ({"fc2.bias": np.full(10, np.nan, np.float32)}, "fc2.bias: expected finite .* got 10 NaN"),
        ({"fc2.bias": np.full(10, 1e300)}, "fc2.bias: expected finite .* got 10 NaN"),
        ({"fc2.bias": np.zeros(10, np.int32)}, "fc2.bias: expected floating point .* got int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(lenet, changes, message):
    variables, _, write = lenet
    path = write(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(path, variables)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_missing_names_are_cut_short(tmp_path):
    path = tmp_path / "empty.npz"
    np.savez(path)
    with pytest.raises(ValueError, match=r"got 97 missing \((\S+, ){4}\.\.\.\)$"):
        pretrained.load(path, random_variables("resnet20"))


def read_all(path):
    with pretrained.opened(path) as file:
        return {name: tensor.read() for name, tensor in file.items()}


def damaged_files(folder):
    np.savez(folder / "whole.npz", a=np.arange(1000.0))
    whole = (folder / "whole.npz").read_bytes()
    save_file({"a": np.arange(1000.0)}, folder / "whole.safetensors")
    safe = (folder / "whole.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[500] ^= 1
    np.save(folder / "lone.npy", np.zeros(3))
    np.savez(folder / "pickle.npz", a=np.array([{}], object))
    return {
        "cut.npz": whole[:3000],
        "flipped.npz": bytes(flipped),
        "text.npz": b"hello\nworld",
        "empty.npz": b"",
        "lone.npz": (folder / "lone.npy").read_bytes(),
        "pickle.npz": (folder / "pickle.npz").read_bytes(),
        "cut.safetensors": safe[:3000],
        "text.safetensors": b"hello\nworld",
        "empty.safetensors": b"",
        "swapped.safetensors": whole,
        "weights.pth": whole,
    }


def test_damaged_and_other_files_are_refused_by_name(tmp_path):
    for name, content in damaged_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: (.*: )?expected an? .*, got") as caught:
            read_all(path)
        assert "\n" not in str(caught.value)


def npy(array, *, version=(1, 0), header=""):
    """Return an array as `np.save` writes it, with another header if one is given."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    content = file.getvalue()
    if header:
        values = content[content.index(b"\n") + 1 :]
        size = (len(header) + 1).to_bytes(2 if version == (1, 0) else 4, "little")
        content = content[:8] + size + header.encode() + b"\n" + values
    return content


BIG = 1 << 24  # float32: 64 MiB, which deflate to 64 KiB


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.npy", npy(np.zeros(BIG, np.float32)), r"got 1 unexpected \(other\)"),
        (
            "fc2.bias.npy",
            npy(np.zeros(BIG, np.float32)),
            r"fc2.bias: expected shape \(10,\), got \(16777216,\)",
        ),
        ("fc2.bias.npy", npy(np.zeros(10, "U1000000")), "fc2.bias: expected floating point values"),
        (
            "fc2.bias.npy",
            npy(np.zeros(10, np.float32)) + bytes(4 * BIG),
            "member fc2.bias.npy: expected an array, got ValueError: more values",
        ),
        ("fc2.bias.npy", b"\x93NUMPY\x02\x00" + b"\xff" * 4 + bytes(4 * BIG), "EOF"),
    ],
    ids=["name", "shape", "dtype", "trailing", "header"],
)
def test_nothing_is_decompressed_before_names_and_shapes_are_right(lenet, name, content, message):
    variables, _, write = lenet
    path = write(**{"fc2.bias": None})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        if name == "other.npy":
            archive.writestr("fc2.bias.npy", npy(np.zeros(10)))
    del content
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        pretrained.load(path, variables)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # the network has 1.7 MB


def test_what_the_network_does_without_is_not_decompressed(lenet):
    variables, _, write = lenet
    path = write()
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bn.num_batches_tracked.npy", npy(np.zeros(BIG, np.float32)))
    tracemalloc.start()
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(path, variables), variables)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(
    "header",
    [
        "(" * 9_000,
        "[" * 99 + "]" * 99,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ",), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + "f" * 9000 + ",), }",
        "{'descr': 'x" + "," * 1000 + "', 'fortran_order': False, 'shape': (), }",
        "-" * 9_000 + "1",
        "\x1b[2J",
    ],
    ids=["open", "deep", "negative", "long", "hexadecimal", "dtype", "signs", "escapes"],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_malformed_headers_are_one_line_with_file_and_member(lenet, header, version):
    variables, _, write = lenet
    path = write(**{"fc2.bias": None})
    with zipfile.ZipFile(path, "a") as archive:
        content = npy(np.zeros(10, np.float32), version=version, header=header)
        archive.writestr("fc2.bias.npy", content)
    with pytest.raises(ValueError) as caught:
        pretrained.load(path, variables)
    message = str(caught.value)
    assert message.startswith(f"{path}: member fc2.bias.npy: expected an array, got ")
    assert message.isprintable() and len(message) < len(str(path)) + 300


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("member", "compression"),
    [
        ("fc2.bias.npy", zipfile.ZIP_LZMA),  # whose header says how much memory it takes
        ("fc2.bias", zipfile.ZIP_STORED),
        ("fc1.bias.npy", zipfile.ZIP_STORED),  # a second one
    ],
)
def test_members_that_numpy_does_not_write_are_refused(lenet, member, compression):
    variables, _, write = lenet
    path = write(**{"fc2.bias": None})
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr(member, npy(np.zeros(10)))
    with pytest.raises(ValueError, match=f"member {member}: expected an array, got"):
        pretrained.load(path, variables)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_of_a_file_are_shown_cut_and_without_escapes(tmp_path, suffix):
    path = tmp_path / f"names{suffix}"
    tensors = {f"\x1b[2J{i}" + "x" * 10_000: np.zeros(1) for i in range(5)}
    save_file(tensors, path) if suffix == ".safetensors" else np.savez(path, **tensors)
    with pytest.raises(ValueError) as caught:
        pretrained.load(path, random_variables("lenet5"))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.npz: no such file"):
        read_all(tmp_path / "absent.npz")


def test_unknown_leaf_is_refused():
    with pytest.raises(ValueError, match="params/dense/gamma: expected a leaf named"):
        pretrained.to_state_dict({"params": {"dense": {"gamma": np.zeros(3)}}})


@pytest.mark.skipif(CHECKPOINTS is None, reason="JAXQUANT_CHECKPOINTS names no folder")
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_public_checkpoint_fits(name):
    path = Path(CHECKPOINTS or "") / f"{name}_cifar10.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    module = models.build(name, num_classes=10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = pretrained.load(path, shapes)
    tensors = read_all(path)
    back = pretrained.to_state_dict(variables)
    ours = {f"module.{name}": tensor for name, tensor in back.items()}
    theirs = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
