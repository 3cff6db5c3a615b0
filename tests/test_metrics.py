"""The report: bits, bytes, entropy, error, distinct values, and why a leaf was left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import CASES, by_block, on_blocks

import jaxquant as jq
from jaxquant.packing.report import _most_distinct


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32))


def quantized(params, plan, rounds=None):
    state = jq.init(plan, params)
    step = jax.jit(jq.quantize_round, static_argnums=0)
    for _ in range(plan.num_rounds if rounds is None else rounds):
        params, state, _ = step(plan, params, state)
    return params, state


def test_a_report_worked_by_hand():
    params = {"w": jnp.array([[0.0, 0.0, 1.0, 1.2], [4.0, 5.0, 4.0, 5.0]]), "b": jnp.array([7.0])}
    plan = jq.slq(params, bits=2, rounds=(1, 3))
    new, state = quantized(params, plan, rounds=1)
    report = jq.report(new, state, reference=params)
    bias, layer = report.layers
    assert bias.reason == "1 dimension, fewer than 2" and bias.bytes == bias.float_bytes == 4
    assert (layer.k, layer.bits, layer.distinct, layer.frozen) == (3, 4, 4, 0.5)
    np.testing.assert_allclose(layer.error, 1 / (1 + 1.44 + 2 * 16 + 2 * 25), rtol=1e-5)
    np.testing.assert_allclose(layer.entropy, 1.5, rtol=1e-6)  # shares 1/4, 1/4, 1/2
    assert layer.bytes == 4 + 3 * 4 and layer.float_bytes == 32  # a column of 2 takes a byte
    assert (report.bytes, report.float_bytes) == (20, 36)
    assert layer.entropy_bytes == np.ceil(8 * 1.5 / 8) + 12
    assert report.entropy_bytes == layer.entropy_bytes + 4
    assert report.codebook_bytes == 12 and report.left_alone_bytes == 4
    assert report.compression == 1.8 and report.bits_per_weight == 8 * 16 / 8
    assert report.frozen == 0.5 and report.quantized == (layer,)


def test_bytes_are_those_of_pack_whatever_axes_are_inputs():
    params = {"w": normal(6, 4, 7)}
    for inputs in (1, 2):
        plan = jq.slq(params, rounds=(3,), rules=[jq.LayerRule("w", k=3, inputs=inputs)])
        new, state = quantized(params, plan)
        packed = jq.pack(new, state, inputs=plan.selection.inputs)
        assert jq.report(new, state, plan=plan).layers[0].code_bytes == packed["w"].codes.size


def test_codes_take_whole_bytes_and_an_empty_cluster_no_entropy():
    params = {"w": jnp.array([[5.0, 5.0, 5.0], [6.0, 6.0, 6.0], [6.0, 6.0, 6.0]])}
    layer = jq.report(*quantized(params, jq.slq(params, bits=2, rounds=(3,), zero=True))).layers[0]
    assert layer.bytes == 3 + 12 and layer.distinct == 2  # 3 columns of up to 5 codes
    np.testing.assert_allclose(layer.entropy, np.log2(3) - 2 / 3, rtol=1e-6)


def test_without_a_reference_there_is_no_error_to_tell():
    params = {"w": normal(8, 8)}
    plan = jq.slq(params, bits=2, rounds=(1, 3))
    for rounds in (1, 2):
        report = jq.report(*quantized(params, plan, rounds=rounds))
        assert report.layers[0].error is None
        assert str(report).splitlines()[2].split("|")[6].strip() == ""
    new, state = quantized(params, plan)
    assert jq.report(new, state).layers[0].distinct == 3
    assert jq.report(new, state, reference=params).layers[0].error > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_zeros_of_a_pruned_layer_that_are_lost_are_noted(share):
    rank = np.random.default_rng(1).permutation(1600).reshape(40, 40)
    pruned = {"w": jnp.where(rank < share * 1600, 0, normal(40, 40) + 0.1)}
    lost, state = quantized(pruned, jq.slq(pruned, bits=2, rounds=(3,)))
    assert np.isclose(jq.report(lost, state, reference=pruned).layers[0].lost_zeros, share, 0.01)
    assert "zero=True keeps them" in str(jq.report(lost, state, reference=pruned))
    assert ("zero=True keeps them" in str(jq.report(lost, state))) == (share > 0.75)
    kept, state = quantized(pruned, jq.slq(pruned, bits=2, rounds=(3,), zero=True))
    for reference in (None, pruned):
        assert "zero=True" not in str(jq.report(kept, state, reference=reference))


@pytest.mark.parametrize(("shape", "axis"), [((30, 7), None), ((3, 3, 4, 5), -1), ((4, 9, 8), 0)])
def test_bytes_are_those_of_the_packed_tree(shape, axis):
    params = {"w": normal(*shape)}
    plan = jq.slq(params, rounds=(3,), rules=[jq.LayerRule("w", k=3, axis=axis)], init="quantile")
    new, state = quantized(params, plan)
    report = jq.report(new, state)
    assert report.bytes == jq.pack(new, state)["w"].nbytes


def test_slices_count_their_own_codebooks():
    params = {"w": normal(4, 8, 8)}
    plan = jq.slq(params, bits=3, rounds=(5,), rules=[jq.LayerRule("w", axis=0)], init="quantile")
    layer = jq.report(*quantized(params, plan)).layers[0]
    assert (layer.k, layer.bits, layer.distinct, layer.frozen) == (5, 7, 5, 1)
    assert layer.bytes == 4 * 8 * 7 + 4 * 5 * 4  # 8 symbols of 7 bits a column, few of them used
    assert 1.5 < layer.entropy < np.log2(5)


@pytest.mark.parametrize(
    "name", ["tiles", "groups of layers", "narrow tiles", "scaled integers", "scaled layers"]
)
def test_blocks_are_reported_as_numpy_counts_them(name):
    case = CASES[name]
    weights, codebook, scale = on_blocks(case)
    weights = weights.at[(0,) * weights.ndim].set(9.0)  # a weight that is still free
    frozen = jnp.ones(case.shape, bool).at[(0,) * weights.ndim].set(False)
    state = jq.QuantState({"w": codebook}, {"w": frozen}, {"w": codebook == 0}, jnp.int32(1))
    if scale is not None:
        state = state._replace(scales={"w": scale})
    layer = jq.report({"w": weights}, state).layers[0]
    packed = jq.pack_array(weights, codebook, scale)
    rows = by_block(weights, case.numbers)
    assert (layer.bytes, layer.k) == (packed.nbytes, case.k)
    assert layer.codebook_bytes == packed.nbytes - packed.codes.size
    assert layer.distinct == max(len(np.unique(row.astype(np.float64))) for row in rows)
    entropies = []
    for row in by_block(jq.unpack(packed), case.numbers):
        shares = np.unique(row.astype(np.float64), return_counts=True)[1] / row.size
        entropies.append(-np.sum(shares * np.log2(shares)))
    np.testing.assert_allclose(layer.entropy, np.mean(entropies), rtol=1e-6)
    np.testing.assert_allclose(layer.frozen, 1 - 1 / weights.size, rtol=1e-6)


def test_distinct_weights_are_those_that_differ():
    rows = np.array([[0.0, -0.0, 1.0, 1.0], [np.nan, np.nan, np.inf, 2.0]], np.float32)
    assert _most_distinct(rows) == 3 and _most_distinct(rows[:1]) == 2
    assert _most_distinct(rows[:, :0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bytes_are_those_of_the_dtype(dtype):
    params = {"w": normal(8, 8).astype(dtype)}
    layer = jq.report(*quantized(params, jq.slq(params, bits=2, rounds=(3,)))).layers[0]
    assert (layer.float_bytes, layer.codebook_bytes) == (128, 6)
    assert layer.distinct == 3 and layer.error is None


def test_reasons_are_those_of_the_plan_if_given():
    params = {"a": normal(8, 8), "b": normal(8, 8), "n": jnp.arange(9).reshape(3, 3)}
    rules = [jq.LayerRule("b", quantize=False), jq.LayerRule(".*", bits=2)]
    plan = jq.slq(params, bits=2, rounds=(3,), rules=rules, init="quantile")
    new, state = quantized(params, plan)
    reasons = [layer.reason for layer in jq.report(new, state, plan=plan).layers]
    assert reasons == [None, "left alone by rule 'b'", "dtype int32 is not floating point"]
    guessed = [layer.reason for layer in jq.report(new, state).layers]
    assert guessed[1] == "left alone by the rules, or no more weights than centroids"
    assert guessed[2] == reasons[2]


def test_the_table_has_a_row_a_leaf_in_natural_order_and_totals():
    params = {f"layer_{i}": normal(8, 8, seed=i) for i in (10, 2)} | {"bias": normal(3)}
    new, state = quantized(params, jq.slq(params, bits=2, rounds=(3,)))
    report = jq.report(new, state)
    lines = str(report).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "bias",
        "layer_2",
        "layer_10",
        "**total**",
    ]
    assert len({line.count("|") for line in lines}) == 1
    assert "float: 1 dimension, fewer than 2" in lines[2] and "8x8" in lines[3]
    assert f"{report.compression:.1f}x smaller" in lines[-1]


def test_trees_that_differ_are_refused():
    params = {"w": normal(8, 8)}
    state = jq.init(jq.slq(params, bits=2, rounds=(3,)), params)
    message = "expected .* to have the params' structure"
    with pytest.raises(ValueError, match=message):
        jq.report({"v": params["w"]}, state)
    with pytest.raises(ValueError, match=message):
        jq.report(params, state, reference={})
    with pytest.raises(ValueError, match=r"w: expected shape \(8, 8\), got \(8,\)"):
        jq.report(params, state, reference={"w": jnp.ones(8)})
