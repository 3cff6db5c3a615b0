"""The native products at every level that this processor has; without a compiler they are not."""

import functools
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import CASES, packed_blocks

import jaxquant as jq
from jaxquant import cpp, platform
from jaxquant.packing.codes import pack_codes
from jaxquant.packing.ops import choice, native

FOLDER = Path(cpp.__file__).parent
LEVELS = [
    pytest.param(name, marks=() if cpp.level(name) else pytest.mark.skip("not here"))
    for name in cpp.LEVELS
]
needs_native = pytest.mark.skipif(cpp.missing() is not None, reason=str(cpp.missing()))


def test_they_are_compiled_where_the_project_is_checked():
    if os.environ.get("CI"):
        assert cpp.missing() is None
        assert cpp.level() in cpp.LEVELS


def packed_array(k, rows, columns):
    rng = np.random.default_rng(k)
    codebook = np.sort(rng.normal(size=k)).astype(np.float32)
    return jq.pack_array(codebook[rng.integers(0, k, (rows, columns))], jnp.asarray(codebook))


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_products_are_those_of_the_unpacked_weight(level):
    # All layouts of codes; a block of columns and what is beside it; symbols that are not full.
    weights = [packed_array(k, 61, 70) for k in (2, 3, 4, 5, 6, 8, 11, 16, 17, 33, 65, 129, 256)]
    rng = np.random.default_rng(0)

    @jax.jit
    def products(x, to_columns, weights):
        run = functools.partial(native.matmul, level=level)
        return [(run(x, w), run(to_columns, w, transposed=True)) for w in weights]

    for vectors in (1, 2, 7, 8, 13):
        x = rng.normal(size=(vectors, 61)).astype(np.float32)
        y = rng.normal(size=(vectors, 70)).astype(np.float32)
        for weight, made in zip(weights, products(x, y, weights), strict=True):
            floats = np.asarray(jq.unpack(weight), np.float64)
            for got, expected in zip(made, (x @ floats, y @ floats.T), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_are_rounded_as_the_weight_is(level, dtype):
    layers = [name for name in CASES if "layers" in name]
    cases = [case._replace(dtype=dtype) for name, case in CASES.items() if name not in layers]
    made = [packed_blocks(case) for case in cases if len(case.shape) == 2]
    assert len(made) > 3
    for packed, weight in made:
        weight = np.asarray(weight, np.float64)
        # Of a single input the product is the weight, to the bit.
        for transposed in (False, True):
            one = np.eye(weight.shape[transposed], dtype=np.float32)
            got = native.matmul(jnp.asarray(one), packed, transposed=transposed, level=level)
            np.testing.assert_array_equal(got, weight.T if transposed else weight)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 7), ("float16", 10)])
def test_halves_between_two_numbers_are_rounded_to_the_even_one(level, dtype, bits):
    halfway = 1 + np.arange(1, 8) * 2.0 ** -(bits + 1)
    codebook = jnp.asarray(np.append(halfway, 3e-5), jnp.float32)  # the last is small for a half
    packed = jq.PackedArray(
        codes=pack_codes(jnp.arange(64).reshape(8, 8) % 8, 8),
        codebook=codebook.reshape(1, 1, 8),
        scale=jnp.ones((2, 8, 1)),
        rows=(8,),
        columns=(8,),
        dtype=dtype,
    )
    got = native.matmul(jnp.eye(8), packed, level=level)
    np.testing.assert_array_equal(got, np.asarray(jq.unpack(packed), np.float32))


@needs_native
def test_every_run_gives_the_same_bits():
    packed = packed_array(5, 1200, 900)  # several tasks
    for vectors, transposed in itertools.product((1, 9), (False, True)):
        x = np.random.default_rng(1).normal(size=(vectors, packed.shape[transposed]))
        x = jnp.asarray(x, jnp.float32)
        first = native.matmul(x, packed, transposed=transposed)
        weight = np.asarray(jq.unpack(packed), np.float64)
        expected = np.asarray(x, np.float64) @ (weight.T if transposed else weight)
        np.testing.assert_allclose(first, expected, rtol=1e-3, atol=1e-3)
        for _ in range(5):
            again = native.matmul(x, packed, transposed=transposed)
            np.testing.assert_array_equal(again, first)


@needs_native
def test_what_is_no_number_stays_none_where_it_is():
    packed = packed_array(3, 64, 70)
    inputs = np.zeros((2, 64), np.float32)
    inputs[0, 5] = np.inf
    y = native.matmul(jnp.asarray(inputs), packed)
    assert not np.isfinite(y[0]).any() and (np.asarray(y[1]) == 0).all()
    codebook = packed.codebook.at[0].set(-jnp.inf)  # of code 0, which also fills up symbols
    endless = jq.PackedArray(codes=packed.codes, codebook=codebook, rows=(64,), columns=(70,))
    x = np.ones((1, 64), np.float32)
    expected = x @ np.asarray(jq.unpack(endless))
    np.testing.assert_array_equal(native.matmul(jnp.asarray(x), endless), expected)
    expected = np.ones((1, 70), np.float32) @ np.asarray(jq.unpack(endless)).T
    got = native.matmul(jnp.ones((1, 70)), endless, transposed=True)
    np.testing.assert_array_equal(got, expected)


@needs_native
def test_gradients_and_maps_are_native_too(monkeypatch):
    monkeypatch.setattr(platform, "is_one_device", lambda: True)
    monkeypatch.setattr(choice, "_FEW_WEIGHTS", 0)
    packed, x = packed_array(5, 61, 70), jnp.ones((4, 61))
    gradient = jax.grad(lambda x: jnp.sum(jq.matmul(x, packed) ** 2))
    text = str(jax.make_jaxpr(gradient)(x))
    assert text.count("name=native") == 2 and "name=blocks" not in text
    floats = jq.unpack(packed)
    np.testing.assert_allclose(gradient(x), 2 * x @ floats @ floats.T, rtol=1e-4)
    mapped = jax.vmap(jax.vmap(jq.matmul, (0, None)), (0, None))(x.reshape(2, 2, 61), packed)
    np.testing.assert_allclose(mapped.reshape(4, 70), x @ floats, rtol=1e-4)


@needs_native
def test_exported_products_run_where_nothing_is_compiled():
    packed, x = packed_array(5, 200, 170), jnp.ones((2, 200))
    product = jax.jit(functools.partial(jq.matmul, implementation="native"))
    exported = jax.export.export(product)(x, packed)
    assert "jaxquant_product" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, packed), product(x, packed), rtol=1e-5)


@needs_native
def test_what_does_not_fit_is_refused_before_it_is_read():
    packed, x = packed_array(5, 61, 70), jnp.ones((1, 61))
    short = jq.PackedArray(
        codes=packed.codes[:-1], codebook=packed.codebook, rows=(61,), columns=(70,)
    )
    for call, message in [
        (lambda: native.matmul(x, short), "expected 21 rows of bytes, got 20"),
        (lambda: native.matmul(jnp.ones((1, 60)), packed), r"expected x \[vectors, inputs\]"),
        (lambda: native.matmul(x, packed, level="avx9"), "expected a processor with avx9"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="that 'native' supports, got k=1"):
        jq.matmul(
            jnp.ones(6), jq.pack_array(jnp.ones((6, 2)), jnp.ones(1)), implementation="native"
        )


def test_without_them_it_is_said_what_is_missing_and_all_else_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(cpp, "_library", functools.cache(cpp._library.__wrapped__))
    monkeypatch.setattr(cpp, "level", cpp.level.__wrapped__)
    monkeypatch.setattr(platform, "is_one_device", lambda: True)
    monkeypatch.setattr(choice, "_FEW_WEIGHTS", 0)
    packed, x = packed_array(3, 40, 8), jnp.ones((2, 40))
    with pytest.raises(ValueError, match=r"native.*not compiled when jaxquant was installed.*C"):
        jq.matmul(x, packed, implementation="native")
    assert choice.fastest(1, x, packed) == "blocks"
    np.testing.assert_allclose(jq.matmul(x, packed), x @ jq.unpack(packed), rtol=1e-5)
    (tmp_path / "_native.so").write_bytes(b"no library")
    monkeypatch.setattr(cpp, "_library", functools.cache(cpp._library.__wrapped__))
    assert "_native.so does not load" in str(cpp.missing())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_nothing_outside_of_arrays_is_touched(tmp_path):
    """Guard pages, sanitizers, and what is computed by its definition: tests/native.sh."""
    script = FOLDER.parents[1] / "tests" / "native.sh"
    made = subprocess.run([script, tmp_path], capture_output=True, text=True, timeout=1200)
    assert made.returncode == 0, made.stdout + made.stderr
    levels = sum(bool(cpp.level(name)) for name in cpp.LEVELS)
    assert made.stdout.count("ok:") == levels + 1  # products at each, clusters once
