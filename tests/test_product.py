"""Product quantization: k-means of sub-vectors, error correction, tables, files, reports."""

import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import meshes, platform, product
from jaxquant.packing.arrays import pack_product, product_codes, unpack_product
from jaxquant.packing.ops import choice
from tests.cases import mostly_slow

cluster = jax.jit(product.cluster, static_argnames=("words", "length", "iterations"))
correct = jax.jit(product.correct, static_argnames="sweeps")
KEY = jax.random.key(0)


def normal(shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def relu_inputs(shape, seed):
    """Inputs as a network has them: correlated, not negative, of unequal size."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(0, 1, (shape[-1], shape[-1]))
    x = np.maximum(rng.normal(0.3, 1, shape) @ mix, 0) * np.linspace(0.1, 2, shape[-1])
    return jnp.asarray(x, jnp.float32)


def convolve(x, kernel, stride=1, padding="SAME", dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def relative(got, want):
    return float(jnp.sum(jnp.square(got - want)) / jnp.sum(jnp.square(want)))


# Clustering ---------------------------------------------------------------------------------------


def test_a_kernel_of_words_by_hand():
    words = jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    array = pack_product(jnp.array([[0, 1, 1], [1, 0, 0]]), words)
    want = [[1, 3, 3], [2, 4, 4], [7, 5, 5], [8, 6, 6]]
    np.testing.assert_array_equal(unpack_product(array), want)
    assert array.shape == (4, 3) and array.k == 2 and array.dtype == jnp.float32
    assert array.nbytes == 3 + 8 * 4 and array.size == 12 and array.ndim == 2


@pytest.mark.parametrize(
    "dtype",
    mostly_slow(
        [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2],
        jnp.bfloat16,
        jnp.float8_e4m3fn,
    ),
)
def test_enough_words_of_one_channel_reproduce_a_layer_exactly(dtype):
    kernel = normal((3, 3, 5, 7)).astype(dtype)
    array = cluster(kernel, words=63, length=1, key=KEY)
    np.testing.assert_array_equal(unpack_product(array), kernel)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_words_for_every_distinct_sub_vector_reproduce_a_layer_exactly(seed):
    rng = np.random.default_rng(seed)
    pieces = rng.normal(size=(5, 4)).astype(np.float32)
    kernel = np.moveaxis(pieces[rng.integers(0, 5, (3, 10))], -1, -2).reshape(12, 10)
    array = cluster(jnp.asarray(kernel), words=5, length=4, key=jax.random.key(seed))
    np.testing.assert_array_equal(unpack_product(array), kernel)


@pytest.mark.slow
def test_clusters_are_as_good_as_those_of_scikit_learn():
    from sklearn.cluster import KMeans

    kernel = normal((8, 600))
    array = cluster(kernel, words=16, length=4, key=KEY, iterations=50)
    for m, rows in enumerate(np.asarray(kernel).reshape(2, 4, 600)):
        vectors = rows.T
        losses = [
            KMeans(16, n_init=1, random_state=seed, max_iter=50).fit(vectors).inertia_
            for seed in range(5)
        ]
        words = np.asarray(array.words[m])
        loss = np.sum(np.min(np.sum((vectors[:, None] - words) ** 2, -1), -1))
        assert loss < 1.02 * max(losses)
        got = np.sum((np.asarray(unpack_product(array)).reshape(2, 4, 600)[m].T - vectors) ** 2)
        assert got == pytest.approx(loss, rel=1e-5)  # every code is of the nearest word


@pytest.mark.slow
def test_more_passes_never_lose_more():
    kernel = normal((3, 3, 8, 20))
    losses = [
        relative(unpack_product(cluster(kernel, words=8, length=4, key=KEY, iterations=n)), kernel)
        for n in (0, 1, 2, 5, 20)
    ]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_subspaces_do_not_share_words():
    kernel = jnp.concatenate([normal((2, 30)), 100 + normal((2, 30), seed=1)])
    array = cluster(kernel, words=4, length=2, key=KEY)
    assert (array.words[0] < 50).all() and (array.words[1] > 50).all()


def test_no_distances_of_all_sub_vectors_to_all_words_are_held():
    kernel = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)  # 256 subspaces of 4,096 sub-vectors
    compiled = cluster.lower(kernel, words=256, length=4, key=KEY).compile()
    all_distances = 4 * 256 * 4096 * 256
    assert compiled.memory_analysis().temp_size_in_bytes < 0.12 * all_distances


# Responses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride", "padding", "dilation"),
    [((3, 3), 1, "SAME", 1), ((3, 2), 2, ((1, 1), (0, 2)), 1), ((3, 3), 1, "VALID", 2)],
)
def test_sums_say_what_the_responses_are(window, stride, padding, dilation):
    x, kernel = normal((4, 9, 8, 6)), normal((*window, 6, 5), seed=1)
    wanted = convolve(x, kernel, stride, padding, dilation)
    options = {"window_strides": stride, "padding": padding, "kernel_dilation": dilation}
    response = product.observe(x, wanted, window=window, **options)
    np.testing.assert_allclose(product.response_error(kernel, response), 0, atol=2e-6)
    other = normal(kernel.shape, seed=2)
    got = convolve(x, other, stride, padding, dilation)
    np.testing.assert_allclose(
        product.response_error(other, response), relative(got, wanted), rtol=1e-4
    )


def test_sums_of_batches_add_up():
    x, kernel = normal((10, 6)), normal((6, 5))
    parts = [product.observe(x[i], x[i] @ kernel) for i in (slice(0, 3), slice(3, 10))]
    whole = product.observe(x, x @ kernel)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        jax.tree.map(jnp.add, *parts),
        whole,
    )
    by_time = product.observe(x.reshape(2, 5, 6), (x @ kernel).reshape(2, 5, 5))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), by_time, whole)


def port_of_dense_descent(words, codes, inputs, wanted):
    """Wu et al., section 3.2, on the samples themselves, in float64: a sweep over the subspaces."""
    words, codes = words.astype(np.float64).copy(), codes.copy()
    subspaces, k, length = words.shape
    pieces = inputs.astype(np.float64).reshape(len(inputs), subspaces, length)

    def response(m):
        return pieces[:, m] @ words[m][codes[m]].T

    for m in range(subspaces):
        rest = wanted - sum(response(other) for other in range(subspaces) if other != m)
        for word in range(k):
            members = codes[m] == word
            if members.any():
                mean = rest[:, members].mean(axis=1)
                words[m, word] = np.linalg.lstsq(pieces[:, m], mean, rcond=None)[0]
        left = np.square(rest[:, :, None] - (pieces[:, m] @ words[m].T)[:, None]).sum(axis=0)
        best = left.argmin(axis=1)
        gains = np.take_along_axis(left, codes[m][:, None], 1)[:, 0] > left.min(axis=1) * (1 + 1e-9)
        codes[m] = np.where(gains, best, codes[m])
    return words, codes


@pytest.mark.parametrize("run", [1, 2, 32])
def test_a_sweep_over_a_dense_layer_is_that_of_a_numpy_port(run, monkeypatch):
    monkeypatch.setattr(product, "_RUN", run)  # of four subspaces
    meshes._run.clear_cache()
    correct = jax.jit(functools.partial(product.correct), static_argnames="sweeps")  # traced anew
    x, kernel = relu_inputs((200, 12), 0), normal((12, 30), seed=3)
    wanted = x @ kernel
    array = cluster(kernel, words=4, length=3, key=KEY)
    words, codes = port_of_dense_descent(
        np.asarray(array.words), np.asarray(product_codes(array)), np.asarray(x), np.asarray(wanted)
    )
    got, errors = correct(array, product.observe(x, wanted), sweeps=1)
    np.testing.assert_array_equal(product_codes(got), codes)
    np.testing.assert_allclose(got.words, words, rtol=0.01, atol=0.01)
    port = np.asarray(pack_unpack(words, codes))
    assert float(errors[1]) == pytest.approx(relative(x @ port, wanted), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("run", [1, 3])
def test_subspaces_of_a_convolution_that_are_corrected_together_hear_of_each_other(
    run, monkeypatch
):
    x, kernel = relu_inputs((4, 6, 6, 12), 0), normal((3, 3, 12, 10), seed=3)
    array = cluster(kernel, words=4, length=2, key=KEY)
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    response = product.observe(x, wanted, window=(3, 3))
    want, want_errors = correct(array, response, sweeps=1)  # six subspaces at once
    monkeypatch.setattr(product, "_RUN", run)
    meshes._run.clear_cache()
    anew = jax.jit(functools.partial(product.correct), static_argnames="sweeps")
    got, errors = anew(array, response, sweeps=1)
    np.testing.assert_array_equal(product_codes(got), product_codes(want))
    np.testing.assert_allclose(got.words, want.words, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(errors, want_errors, rtol=1e-3)


def test_words_are_drawn_in_proportion_to_their_weights():
    weights = jnp.array([0.0, 1.0, 0.0, 3.0, 6.0, 0.0, 0.0, 10.0, 0.0, 0.0, 20.0, 0.0])
    drawn = jax.vmap(functools.partial(product._draw, weights))(jax.random.split(KEY, 40_000))
    shares = np.bincount(np.asarray(drawn), minlength=12) / 40_000
    np.testing.assert_allclose(shares, weights / 40, atol=0.0125)  # five standard deviations
    assert not shares[np.asarray(weights) == 0].any()


@pytest.mark.slow
def test_64_bit_types_change_nothing():
    kernel, x = normal((6, 9)), relu_inputs((30, 6), 1)

    def quantize():
        array = product.cluster(kernel, words=3, length=2, key=KEY)
        return product.correct(array, product.observe(x, x @ kernel), sweeps=1)[0]

    want = quantize()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        got = quantize()
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(product_codes(got), product_codes(want))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_layers_of_narrow_floats_are_observed_and_corrected(dtype):
    kernel, x = normal((6, 9)).astype(dtype), relu_inputs((30, 6), 1).astype(dtype)
    wide = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    response = product.observe(x, wide.astype(dtype))
    assert response.gram.dtype == response.cross.dtype == jnp.float32
    array = product.cluster(kernel, words=3, length=2, key=KEY)
    better, errors = product.correct(array, response, sweeps=2)
    assert array.dtype == better.dtype == dtype and errors[-1] < errors[0]
    moments = jq.input_moments(x)
    np.testing.assert_allclose(moments, response.gram / 30, rtol=1e-5)


def pack_unpack(words, codes):
    return unpack_product(pack_product(jnp.asarray(codes), jnp.asarray(words, jnp.float32)))


@pytest.mark.parametrize("window", [pytest.param((), marks=pytest.mark.slow), (3, 3)])
def test_errors_never_rise_and_held_out_inputs_profit(window):
    if window:
        kernel = normal((*window, 8, 24), seed=1, scale=0.1)
        answer, shape = convolve, (8, 6, 6, 8)
    else:
        kernel = normal((16, 40), seed=1, scale=0.1)
        answer, shape = jnp.matmul, (300, 16)
    x, held_out = relu_inputs(shape, 0), relu_inputs(shape, 1)
    array = cluster(kernel, words=8, length=4, key=KEY)
    response = product.observe(x, answer(x, kernel), window=window)
    better, errors = correct(array, response, sweeps=6)
    errors = np.asarray(errors)
    assert (np.diff(errors) <= 1e-6).all() and errors[-1] < 0.7 * errors[0]
    np.testing.assert_allclose(
        errors[-1], relative(answer(x, unpack_product(better)), answer(x, kernel)), rtol=1e-3
    )
    plain, improved = (
        relative(answer(held_out, unpack_product(a)), answer(held_out, kernel))
        for a in (array, better)
    )
    assert improved < 0.9 * plain


def test_correction_makes_up_for_a_front_that_is_off():
    x, kernel = relu_inputs((400, 16), 0), normal((16, 40), seed=1, scale=0.1)
    off = x * jnp.linspace(0.7, 1.4, 16)[None]  # what the quantized front makes of it
    array = cluster(kernel, words=16, length=2, key=KEY)
    asked = product.observe(off, x @ kernel)
    better, _ = correct(array, asked, sweeps=4)
    unaware, _ = correct(array, product.observe(x, x @ kernel), sweeps=4)
    errors = [relative(off @ unpack_product(a), x @ kernel) for a in (better, unaware, array)]
    assert errors[0] < 0.5 * min(errors[1:])


def test_inputs_that_are_always_zero_leave_their_words_as_they_are():
    x = normal((50, 8)).at[:, 4:].set(0.0)
    kernel = normal((8, 12), seed=1)
    array = cluster(kernel, words=3, length=4, key=KEY)
    better, errors = correct(array, product.observe(x, x @ kernel), sweeps=2)
    assert np.isfinite(np.asarray(errors)).all()
    np.testing.assert_allclose(better.words[1], array.words[1], atol=1e-6)
    nothing, errors = correct(array, product.observe(0 * x, 0 * x @ kernel))
    np.testing.assert_array_equal(nothing.words, array.words)
    np.testing.assert_array_equal(errors, 0)


# Products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_of_table_entries_are_the_product(dtype):
    x, kernel = normal((3, 5, 12)).astype(dtype), normal((12, 9), seed=1).astype(dtype)
    array = cluster(kernel, words=4, length=3, key=KEY)
    want = x.astype(jnp.float32) @ unpack_product(array).astype(jnp.float32)
    for name in ("words", "unpack", "blocks", None):
        got = jq.matmul(x, array, implementation=name)
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), want, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [(1, "SAME", 1), (2, "SAME", 1), (2, ((1, 1), (2, 0)), 1), (1, "VALID", 2), (3, "VALID", 1)],
)
def test_sums_of_table_entries_are_the_convolution(stride, padding, dilation):
    x, kernel = normal((2, 9, 8, 6)), normal((3, 3, 6, 5), seed=1)
    array = cluster(kernel, words=4, length=3, key=KEY)
    want = convolve(x, unpack_product(array), stride, padding, dilation)
    options = {"window_strides": stride, "padding": padding, "kernel_dilation": dilation}
    for name in ("words", "unpack", None):
        got = jq.conv(x, array, implementation=name, **options)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_derivatives_of_sums_of_table_entries_are_those_of_the_product():
    x, kernel = normal((3, 12)), normal((12, 9), seed=1)
    array = cluster(kernel, words=4, length=3, key=KEY)

    def loss(name, x, words):
        changed = pack_product(product_codes(array), words)
        return jnp.sum(jnp.sin(jq.matmul(x, changed, implementation=name)))

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1)))(x, array.words)
        for name in ("words", "unpack")
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


def test_few_vectors_are_looked_up_and_many_unpack(monkeypatch):
    monkeypatch.setattr(platform, "is_one_device", lambda: True)
    monkeypatch.setattr(choice, "_FEW_WEIGHTS", 0)
    array = cluster(normal((12, 9)), words=4, length=3, key=KEY)
    monkeypatch.setattr(platform, "name", lambda: "cpu")
    assert [choice.fastest(n, jnp.ones((n, 12)), array) for n in (1, 16, 17)] == [
        *["words"] * 2,
        "blocks",
    ]
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    assert choice.fastest(1, jnp.ones((1, 12)), array) == "unpack"
    assert jq.matmul(jnp.ones((2, 0, 12)), array, implementation="words").shape == (2, 0, 9)


@pytest.mark.default_promotion
def test_linen_layers_run_from_words():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
            return nn.Dense(5)(x.reshape(len(x), -1))

    module, x = Net(), normal((2, 6, 6, 4))
    params = jax.jit(module.init)(KEY, x)["params"]
    packed = jax.tree.map(
        lambda w: cluster(w, words=8, length=4, key=KEY) if w.ndim > 1 else w, params
    )
    want = module.apply({"params": jq.unpack(packed)}, x)
    got = jq.packed(module.apply)({"params": packed}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# Files and reports --------------------------------------------------------------------------------


def tree():
    kernel = normal((3, 3, 8, 64))
    return {"conv": {"kernel": cluster(kernel, words=16, length=4, key=KEY), "bias": jnp.ones(64)}}


def test_a_file_gives_back_the_same_words_and_codes(tmp_path):
    jq.save(tmp_path / "a.safetensors", tree())
    for like in (None, jq.unpack(tree()), tree()):
        back = jq.load(tmp_path / "a.safetensors", like=like)
        assert jax.tree.structure(back) == jax.tree.structure(tree())
        jax.tree.map(np.testing.assert_array_equal, back, tree())
    size = (tmp_path / "a.safetensors").stat().st_size
    assert size < tree()["conv"]["kernel"].nbytes + 64 * 4 + 1000
    jq.save(tmp_path / "b.safetensors", tree())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ([["conv", "bias"]], "conv/bias: expected packed codes and words"),
        ([["other"]], "other: expected packed codes and words"),
        ([["conv", "kernel"], ["conv", "kernel"]], "conv/kernel: expected packed codes"),
        ("conv", "expected products to be paths"),
        ([[1]], "expected products to be paths"),
    ],
)
def test_a_file_that_lies_about_its_products_is_refused(tmp_path, products, message):
    path = tmp_path / "a.safetensors"
    jq.save(path, tree())
    change_description(path, lambda description: description | {"products": products})
    with pytest.raises(ValueError, match=message):
        jq.load(path)


def test_words_that_do_not_fit_their_codes_are_refused(tmp_path):
    good = tree()["conv"]["kernel"]
    nodes = [
        {"codes": good.codes, "words": good.words[:1]},
        {"codes": good.codes, "words": good.words[:, :3]},
        {"codes": good.codes, "words": good.words.astype(jnp.int32)},
        {"codes": good.words, "words": good.words},
    ]
    for node in nodes:
        path = tmp_path / "a.safetensors"
        jq.save(path, {"kernel": node})
        change_description(path, lambda description: description | {"products": [["kernel"]]})
        with pytest.raises(ValueError, match=r"a.safetensors: kernel: expected"):
            jq.load(path)


def change_description(path, change):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    description = change(json.loads(header["__metadata__"]["jaxquant"]))
    header["__metadata__"]["jaxquant"] = json.dumps(description)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_a_report_counts_the_bytes_of_words_and_codes():
    packed = tree()
    reference = {"conv": {"kernel": normal((3, 3, 8, 64)), "bias": jnp.ones(64)}}
    report = jq.report(packed, reference=reference)
    bias, kernel = report.layers
    assert kernel.bytes == packed["conv"]["kernel"].nbytes == 9 * 2 * 64 // 2 + 2 * 16 * 4 * 4
    assert report.bytes == kernel.bytes + 256 and bias.reason is not None
    assert kernel.k == 16 and kernel.distinct <= 16 and kernel.bits == 1.0
    assert kernel.error == pytest.approx(
        relative(unpack_product(packed["conv"]["kernel"]), reference["conv"]["kernel"]), rel=1e-4
    )
    assert 0.5 < kernel.entropy <= 1.0  # at most four bits for four weights
    assert "conv/kernel" in str(report)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (jnp.ones((8, 4), int), {}, "expected a floating-point kernel, got int"),
        (jnp.ones(8), {}, r"expected a kernel \[..., channels, features\], got \(8,\)"),
        (jnp.ones((0, 4)), {}, r"expected a kernel .* got \(0, 4\)"),
        (jnp.ones((8, 4)), {"words": 0}, "expected words to be 1 to 256, got 0"),
        (jnp.ones((8, 4)), {"words": 257}, "expected words to be 1 to 256, got 257"),
        (jnp.ones((8, 4)), {"length": 3}, "expected length to divide 8 channels, got 3"),
        (jnp.ones((8, 4)), {"words": 2.0}, "expected words to be 1 to 256, got 2.0"),
        (
            jnp.ones((8, 4)),
            {"iterations": -1},
            "expected iterations to be an integer of at least 0, got -1",
        ),
        (jnp.ones((8, 4)).at[0, 0].set(jnp.nan), {}, "expected finite values in kernel, got 1"),
    ],
)
def test_kernels_that_cannot_be_clustered_are_refused(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        product.cluster(kernel, **{"words": 2, "length": 2, "key": KEY} | options)


def test_constant_kernels_and_more_words_than_sub_vectors():
    array = cluster(jnp.full((4, 6), 0.25), words=8, length=2, key=KEY)
    np.testing.assert_array_equal(unpack_product(array), 0.25)
    np.testing.assert_array_equal(
        unpack_product(cluster(normal((4, 6)), words=200, length=2, key=KEY)), normal((4, 6))
    )


def test_responses_and_products_that_do_not_fit_are_refused():
    array = cluster(normal((8, 6)), words=2, length=2, key=KEY)
    with pytest.raises(ValueError, match="expected a response of 8 inputs and 6 features"):
        product.correct(array, product.observe(jnp.ones((2, 8)), jnp.ones((2, 5))))
    with pytest.raises(ValueError, match=r"expected inputs of 4 axes, got \(2, 8\)"):
        product.observe(jnp.ones((2, 8)), jnp.ones((2, 5)), window=(3, 3))
    with pytest.raises(ValueError, match=r"expected wanted responses of shape \(2, 4, 4\)"):
        product.observe(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 4, 5)), window=(3, 3))
    with pytest.raises(ValueError, match=r"expected x of shape \[..., 8\], got \(2, 7\)"):
        jq.matmul(jnp.ones((2, 7)), array)
    with pytest.raises(ValueError, match="expected a product that 'native' supports, got words"):
        jq.matmul(jnp.ones((2, 8)), array, implementation="native")
    packed = jq.pack_array(jnp.ones((8, 6)), jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="expected a product that 'words' supports, got k=2"):
        jq.matmul(jnp.ones((2, 8)), packed, implementation="words")
    window = cluster(normal((3, 3, 8, 6)), words=2, length=2, key=KEY)
    with pytest.raises(ValueError, match="no input dilation and no groups for 'words'"):
        jq.conv(jnp.ones((1, 4, 4, 8)), window, implementation="words", input_dilation=2)
    with pytest.raises(ValueError, match=r"expected codes \[..., M, features\] and words"):
        pack_product(jnp.zeros((3, 4), int), jnp.zeros((2, 2, 2)))
