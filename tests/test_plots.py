"""Tests of the figures: the files, and that what is drawn is the data."""

import itertools
import os
import stat
import subprocess
import sys
from pathlib import Path

import matplotlib
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.image import imread
from matplotlib.patches import StepPatch

from tests.cases import mostly_slow
from train import plots
from train.plots import drawing, errors, weights

# Where set, the figures of the tests stay there to be looked at.
KEEP = os.environ.get("JAXQUANT_PLOTS")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    return Path(KEEP) if KEEP else tmp_path


def resnet_layers(blocks):
    """Paths and shapes of the kernels of a CIFAR ResNet with 6 * blocks + 2 layers."""
    shapes = {"conv1/kernel": (3, 3, 3, 16)}
    channels = 16
    for stage, features in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            for conv in (1, 2):
                path = f"layer{stage}_{block}/conv{conv}/kernel"
                shapes[path] = (3, 3, channels, features)
                channels = features
    shapes["linear/kernel"] = (64, 10)
    return shapes


LENET = {"conv1/kernel": (5, 5, 1, 20), "conv2/kernel": (5, 5, 20, 50), "fc1/kernel": (800, 500)}
SLOW = pytest.mark.slow  # 55 panels
NETS = {"lenet": LENET, "resnet20": resnet_layers(3), "resnet56": resnet_layers(9)}


def rounds_5bit():
    """Five rounds at 5 bits: small drops that re-training makes good."""
    shares = (0.38, 0.61, 0.83, 0.95, 1.0)
    quantized = (0.9121, 0.9087, 0.9012, 0.9102, 0.9154)
    trained = (0.9183, 0.9174, 0.9166, 0.9171, 0.9163)
    return make_rounds(quantized, trained, shares)


def rounds_ternary():
    """Six rounds at 2 bits: the accuracy falls to chance at first."""
    shares = (0.21, 0.43, 0.66, 0.79, 0.90, 1.0)
    quantized = (0.412, 0.102, 0.335, 0.841, 0.868, 0.801)
    trained = (0.914, 0.909, 0.903, 0.901, 0.898, 0.896)
    return make_rounds(quantized, trained, shares)


def make_rounds(quantized, trained, shares):
    names = ("accuracy_quantized", "accuracy", "weights_frozen")
    return [
        {"round": i, **dict(zip(names, values, strict=True))}
        for i, values in enumerate(zip(quantized, trained, shares, strict=True), start=1)
    ]


def make_layers(shapes, *, k, share, seed=0):
    """Weights of which about `share` lies on quantile codebooks of k centroids.

    The clusters of largest magnitude are frozen first; the free weights have moved a little.
    """
    rng = np.random.default_rng(seed)
    result = {"weights": {}, "codebooks": {}, "frozen": {}, "before": {}}
    for path, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        before = (0.5 * scale * rng.standard_t(5, shape)).astype(np.float32)
        limit = 2.5 * before.std()
        codebook = np.linspace(-limit, limit, k).astype(np.float32)
        codes = np.abs(before[..., None] - codebook).argmin(-1)
        last_free = np.argsort(np.abs(codebook))[: round((1 - share) * k)]
        frozen = ~np.isin(codes, last_free)
        moved = before + rng.normal(0, 0.1 * before.std(), shape).astype(np.float32)
        result["weights"][path] = np.where(frozen, codebook[codes], moved)
        result["codebooks"][path] = codebook
        result["frozen"][path] = frozen
        result["before"][path] = before
    return result


def make_errors(shapes, rounds, seed=0):
    rng = np.random.default_rng(seed)
    fall = 10 ** -np.linspace(0, 0.6, rounds)
    return {p: 0.01 * fall * 10 ** rng.normal(0, 0.25, rounds) for p in shapes}


def by_label(figure):
    return {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def check_png(path, figure):
    """The file is an image of the figure's size at 150 dpi with something in it."""
    image = imread(path)
    width, height = figure.get_size_inches()
    assert image.shape[:2] == pytest.approx((150 * height, 150 * width), abs=1)
    assert image.std() > 0.01
    assert not list(Path(path).parent.glob("*.tmp"))


def check_texts_apart(figure):
    """No text leaves the figure, no title or tick label reaches into its neighbour."""
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    titles = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.axison]
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        if axes.axison:
            assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1
            assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1
            for axis in (axes.xaxis, axes.yaxis):
                boxes = [t.get_window_extent(renderer) for t in axis.get_ticklabels()]
                boxes = [b for b in boxes if b.width]
                assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    for i, box in enumerate(titles):
        assert not any(box.overlaps(other) for other in titles[i + 1 :] if other.width)


def check_legend_apart(figure):
    """The legend covers no panel."""
    renderer = figure.canvas.get_renderer()
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


@pytest.mark.parametrize("name,make", [("5bit", rounds_5bit), ("ternary", rounds_ternary)])
def test_rounds_are_drawn_in_percent(folder, name, make):
    rounds, path = make(), folder / f"rounds-{name}.png"
    figure = plots.plot_rounds(path, float_accuracy=0.9174, rounds=rounds)
    check_png(path, figure)
    check_legend_apart(figure)
    check_texts_apart(figure)
    lines = by_label(figure)
    quantized = [100 * r["accuracy_quantized"] for r in rounds]
    trained = [100 * r["accuracy"] for r in rounds]
    np.testing.assert_allclose(lines["quantized"].get_ydata(), quantized)
    np.testing.assert_allclose(lines["re-trained"].get_ydata(), trained)
    np.testing.assert_allclose(lines["float"].get_ydata(), 91.74)
    bars = figure.axes[1].patches
    np.testing.assert_allclose(
        [b.get_height() for b in bars], [100 * r["weights_frozen"] for r in rounds]
    )
    np.testing.assert_allclose(
        [b.get_x() + b.get_width() / 2 for b in bars], [r["round"] for r in rounds]
    )


@pytest.mark.parametrize("name", ["5bit", "ternary"])
def test_rounds_form_a_saw_tooth_from_the_float_accuracy(tmp_path, name):
    rounds = {"5bit": rounds_5bit, "ternary": rounds_ternary}[name]()
    figure = plots.plot_rounds(tmp_path / "a.png", float_accuracy=0.9174, rounds=rounds)
    steps = [a for r in rounds for a in (r["accuracy_quantized"], r["accuracy"])]
    (tooth,) = (
        line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2 * len(rounds) + 1
    )
    np.testing.assert_allclose(tooth.get_ydata(), 100 * np.array([0.9174, *steps]))
    assert np.all(np.diff(tooth.get_xdata()) > 0)


@pytest.mark.parametrize("low,high", [(0.80, 0.92), (0.97, 0.99)])
def test_accuracy_range_shows_differences(tmp_path, low, high):
    trained = np.linspace(high, (low + high) / 2, 5)
    rounds = make_rounds(np.linspace(low, high - 0.001, 5), trained, [0.2, 0.4, 0.6, 0.8, 1])
    figure = plots.plot_rounds(tmp_path / "a.png", float_accuracy=high, rounds=rounds)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 100 * low < 100 * high < top
    assert 100 * (high - low) > 0.7 * (top - bottom)
    assert not texts(figure)


def test_deep_drops_are_cut_and_written_out(tmp_path):
    figure = plots.plot_rounds(tmp_path / "a.png", float_accuracy=0.9174, rounds=rounds_ternary())
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > 50 and top > 91.74
    assert bottom < 89.6 and 0.1 * (top - bottom) < 91.74 - 89.6
    below = [f"{100 * r['accuracy_quantized']:.0f}" for r in rounds_ternary()]
    assert texts(figure) == [f"↓{v}" for v in below if float(v) < bottom] != []


def test_rounds_skip_what_is_not_finite(tmp_path):
    rounds = rounds_5bit()
    rounds[1]["accuracy"] = float("nan")
    rounds[2]["accuracy_quantized"] = None
    del rounds[3]["weights_frozen"]
    figure = plots.plot_rounds(tmp_path / "a.png", float_accuracy=float("nan"), rounds=rounds)
    check_png(tmp_path / "a.png", figure)
    lines = by_label(figure)
    assert "float" not in lines
    assert np.isnan(lines["re-trained"].get_ydata()).tolist() == [0, 1, 0, 0, 0]
    assert np.isnan(lines["quantized"].get_ydata()).tolist() == [0, 0, 1, 0, 0]
    assert np.isfinite(figure.axes[0].get_ylim()).all()


@pytest.mark.parametrize("float_accuracy", [0.9, float("nan")])
@pytest.mark.parametrize("rounds", [[], [{"round": 1}]])
def test_rounds_without_values_say_so(tmp_path, float_accuracy, rounds):
    figure = plots.plot_rounds(tmp_path / "a.png", float_accuracy=float_accuracy, rounds=rounds)
    check_png(tmp_path / "a.png", figure)
    assert texts(figure) == ["no accuracies", "no frozen shares"]


@pytest.mark.parametrize("count", [1, 40])
def test_any_number_of_rounds(folder, count):
    rounds = make_rounds(*np.linspace([0.88, 0.915, 1 / count], [0.90, 0.905, 1], count).T)
    path = folder / f"rounds-{count}.png"
    figure = plots.plot_rounds(path, float_accuracy=0.92, rounds=rounds)
    check_png(path, figure)
    ticks = figure.axes[1].get_xticks()
    assert all(tick == round(tick) for tick in ticks)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["lenet", "resnet20", pytest.param("resnet56", marks=SLOW)])
@pytest.mark.parametrize("k,share", [(17, 0.6), pytest.param(3, 1.0, marks=SLOW)])
def test_weights_of_networks(folder, net, k, share):
    layers = make_layers(NETS[net], k=k, share=share)
    path = folder / f"weights-{net}-k{k}-{share}.png"
    figure = plots.plot_weights(path, **layers)
    check_png(path, figure)
    check_legend_apart(figure)
    check_texts_apart(figure)
    width, height = figure.get_size_inches()
    assert width == 7 and height <= 11  # a page of a paper
    panels = [axes for axes in figure.axes if axes.axison]
    assert [a.get_title() for a in panels] == [p.removesuffix("/kernel") for p in NETS[net]]
    for axes, path in zip(panels, NETS[net], strict=True):
        weights, frozen = layers["weights"][path], layers["frozen"][path]
        codebook = layers["codebooks"][path]
        counts = np.array([np.sum(frozen & (weights == c)) for c in codebook])
        held = counts > 0
        np.testing.assert_allclose(
            [segment[:, 0] for segment in stems(axes)], np.stack([codebook, codebook], 1)[held]
        )
        np.testing.assert_allclose(
            [segment[:, 1] for segment in stems(axes)],
            np.stack([0 * counts, 100 * counts / weights.size], 1)[held],
            rtol=1e-6,
        )
        ticks = [
            x for line in axes.get_lines() if line.get_marker() == "|" for x in line.get_xdata()
        ]
        np.testing.assert_allclose(ticks, codebook[~held])
        outlines = histograms(axes)
        assert len(outlines) == (1 if frozen.all() else 2)
        assert outlines[0].sum() == pytest.approx(100, rel=1e-5)
        if not frozen.all():
            assert outlines[1].sum() == pytest.approx(100 * np.mean(~frozen), rel=1e-5)


def stems(axes):
    return [s for c in axes.collections if isinstance(c, LineCollection) for s in c.get_segments()]


def histograms(axes):
    """Heights of the histograms: before, then still free."""
    return [p.get_data().values for p in axes.patches if isinstance(p, StepPatch)]


def test_histograms_count_by_hand(tmp_path):
    figure = plots.plot_weights(
        tmp_path / "a.png",
        weights={"a": np.array([[0.0, 1.0], [1.0, 0.25]])},
        codebooks={"a": np.array([1.0, 0.0, -1.0])},  # index order need not be ascending
        frozen={"a": np.array([[True, True], [True, False]])},
        before={"a": np.array([[0.1, 0.9], [0.9, -1.0]])},
    )
    (axes,) = figure.axes
    assert [s.tolist() for s in stems(axes)] == [[[0, 0], [0, 25]], [[1, 0], [1, 50]]]
    before, free = histograms(axes)
    assert sorted(before[before > 0]) == [25, 25, 50]
    assert free[free > 0].tolist() == [25]
    edges = axes.patches[0].get_data().edges
    assert edges[0] == -1 and edges[-1] == 1
    assert edges[np.flatnonzero(free)[0]] <= 0.25 <= edges[np.flatnonzero(free)[0] + 1]


FLOATS = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(FLOATS, st.floats(1e-3, 1e6), FLOATS, FLOATS)
def test_bins_hold_every_weight(low, span, a, b):
    high = low + span
    edges = weights._edges(low, high, min(a, b), max(a, b))
    assert np.all(np.diff(edges) > 0)
    assert np.histogram([a, b], edges)[0].sum() == 2
    assert edges[0] <= min(low, a, b) and edges[-1] >= max(high, a, b)
    assert len(edges) <= 20_000


def test_far_weights_do_not_shrink_the_rest(tmp_path):
    layers = make_layers({"a": (200, 50)}, k=3, share=1)
    layers["before"]["a"][0, 0] = 1e4 * layers["before"]["a"].std()
    (axes,) = plots.plot_weights(tmp_path / "a.png", **layers).axes
    assert np.ptp(axes.get_xlim()) < 20 * layers["weights"]["a"].std()
    assert histograms(axes)[0].sum() == pytest.approx(100)


def test_weights_of_any_array_type(tmp_path):
    """bfloat16, JAX arrays, scalar masks and stacked codebooks."""
    jnp = pytest.importorskip("jax.numpy")
    values = np.linspace(-1, 1, 24).reshape(2, 12)
    figure = plots.plot_weights(
        tmp_path / "a.png",
        weights={"b": values.astype(ml_dtypes.bfloat16), "s": jnp.sign(values)},
        codebooks={"b": jnp.array([-1.0, 0.0, 1.0]), "s": np.array([[-1, 0], [0, 1.0]])},
        frozen={"b": np.False_, "s": jnp.ones((2, 12), bool)},
        before={"b": values, "s": values},
    )
    free, stacked = figure.axes
    assert stems(free) == [] and len(histograms(free)) == 2
    assert [s[1].tolist() for s in stems(stacked)] == [[-1, 50], [1, 50]]


def test_empty_and_broken_layers_are_noted(folder):
    layers = make_layers(LENET, k=3, share=0.67)
    layers["weights"]["conv1/kernel"] = np.full((5, 5, 1, 20), np.nan)
    layers["before"]["conv1/kernel"] = np.full((5, 5, 1, 20), np.nan)
    layers["codebooks"]["conv1/kernel"] = np.full(3, np.nan)
    layers["weights"]["conv2/kernel"][0, 0, 0, :2] = np.nan, np.inf
    none = np.zeros((0, 10))
    for name, value in (("weights", none), ("codebooks", none[:, 0]), ("before", none)):
        layers[name]["fc2/kernel"] = value
    layers["frozen"]["fc2/kernel"] = none.astype(bool)
    figure = plots.plot_weights(folder / "weights-broken.png", **layers)
    check_png(folder / "weights-broken.png", figure)
    assert texts(figure) == ["no finite weights", "2 not finite", "no weights"]


@pytest.mark.parametrize("count", mostly_slow([1, 2, 3, 5, 31], 1, 5))
def test_long_names_stay_apart(folder, count):
    shapes = {f"decoder_{i}/self_attention/MultiHead/query/kernel": (40, 3) for i in range(count)}
    figure = plots.plot_weights(
        folder / f"weights-long-{count}.png", **make_layers(shapes, k=5, share=0.5)
    )
    check_texts_apart(figure)
    assert all(axes.get_title().startswith("decoder_") for axes in figure.axes if axes.axison)
    path = folder / f"errors-long-{count}.png"
    check_texts_apart(plots.plot_errors(path, layers=make_errors(shapes, 1), rounds=[1]))


@pytest.mark.parametrize("accuracy", [0.0, 0.1, 1.0])
def test_accuracy_axis_stays_within_percent(tmp_path, accuracy):
    rounds = make_rounds([accuracy, accuracy], [accuracy, accuracy], [0.5, 1])
    figure = plots.plot_rounds(tmp_path / "a.png", float_accuracy=accuracy, rounds=rounds)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 100 * accuracy < top
    assert all(0 <= tick <= 100 for tick in figure.axes[0].get_yticks() if bottom <= tick <= top)


def test_no_layers_are_noted(tmp_path):
    empty = {"weights": {}, "codebooks": {}, "frozen": {}, "before": {}}
    figure = plots.plot_weights(tmp_path / "a.png", **empty)
    assert texts(figure) == ["no layers"]
    figure = plots.plot_errors(tmp_path / "b.png", layers={}, rounds=[])
    assert texts(figure) == ["no errors above zero"]


@pytest.mark.parametrize("value", [0, 1, -1e30])
def test_constant_layer_has_a_range(tmp_path, value):
    ones = {"a": np.full(5, value)}
    figure = plots.plot_weights(
        tmp_path / "a.png", weights=ones, codebooks=ones, frozen={"a": np.True_}, before=ones
    )
    assert histograms(figure.axes[0])[0].sum() == 100


@pytest.mark.parametrize("missing", ["codebooks", "frozen", "before"])
def test_missing_layers_are_refused(tmp_path, missing):
    layers = make_layers(LENET, k=3, share=1)
    del layers[missing]["fc1/kernel"]
    with pytest.raises(ValueError, match=f"fc1/kernel: expected an entry in {missing}"):
        plots.plot_weights(tmp_path / "a.png", **layers)


def test_masks_of_another_shape_are_refused(tmp_path):
    layers = make_layers(LENET, k=3, share=1)
    layers["frozen"]["fc1/kernel"] = np.ones((500, 800), bool)
    with pytest.raises(ValueError, match=r"fc1/kernel: expected a mask of shape \(800, 500\)"):
        plots.plot_weights(tmp_path / "a.png", **layers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rounds", [1, 2, 6, 10])
def test_errors_of_networks(folder, net, rounds):
    layers, path = make_errors(NETS[net], rounds), folder / f"errors-{net}-{rounds}.png"
    figure = plots.plot_errors(path, layers=layers, rounds=range(1, rounds + 1))
    check_png(path, figure)
    check_texts_apart(figure)
    axes, bar = figure.axes
    width, height = figure.get_size_inches()
    assert width == (7 if rounds > 8 else 3.5) and height < 10
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        p.removesuffix("/kernel") for p in layers
    ]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer on top
    assert axes.get_xlabel() == "at the start of round"
    assert [t.get_text() for t in axes.get_xticklabels()] == [str(i + 1) for i in range(rounds)]
    percent = 100 * np.array(list(layers.values()))
    np.testing.assert_allclose(cells_of(axes).get_array().reshape(percent.shape), percent)
    assert bar.get_xlabel() == "relative squared error (%)"
    assert len(axes.texts) == percent.size
    for text in axes.texts:  # in the cell of its value
        column, row = (int(x) for x in text.get_position())
        assert float(text.get_text()) == pytest.approx(percent[row, column], rel=0.05)
    check_within_cells(figure)


def cells_of(axes):
    (cells,) = (x for x in axes.collections if isinstance(x, QuadMesh))
    return cells


def check_within_cells(figure):
    """No value reaches out of its cell, so none into another one."""
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    for text in axes.texts:
        column, row = (int(x) for x in text.get_position())
        corners = axes.transData.transform([[column, row + 1], [column + 1, row]])
        box = text.get_window_extent(renderer)
        assert corners[0][0] <= box.x0 and box.x1 <= corners[1][0], text.get_text()
        assert corners[0][1] <= box.y0 + 1 and box.y1 - 1 <= corners[1][1], text.get_text()


def staircase(groups, rounds):
    """Errors of MLQ as they come: alike from round to round until a layer has frozen, then 0."""
    return {
        f"layer{i}/kernel": [0.26 if r == 0 else 0.07 * (r < 2 + i) for r in range(rounds)]
        for i in range(groups)
    }


def test_errors_of_layers_that_stay_alike_are_told_apart_until_they_are_zero(folder):
    layers, path = staircase(4, 6), folder / "errors-mlq.png"
    figure = plots.plot_errors(path, layers=layers, rounds=range(1, 7))
    check_png(path, figure)
    check_texts_apart(figure)
    check_legend_apart(figure)
    check_within_cells(figure)
    axes = figure.axes[0]
    written = np.array([text.get_text() for text in axes.texts]).reshape(4, 6)
    assert written[0].tolist() == ["26", "7.0", "0", "0", "0", "0"]
    assert written[3].tolist() == ["26", "7.0", "7.0", "7.0", "7.0", "0"]
    none = cells_of(axes).get_array().mask.reshape(4, 6)  # left to the panel's grey
    np.testing.assert_array_equal(none, written == "0")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "0: all weights on their centroids"
    ]
    assert axes.get_facecolor() == figure.legends[0].get_patches()[0].get_facecolor()


def test_errors_that_do_not_fit_into_cells_are_left_to_colours(folder):
    layers, path = make_errors({"a": 0, "b": 0}, 120), folder / "errors-many.png"
    layers["b"][3] = np.inf
    figure = plots.plot_errors(path, layers=layers, rounds=range(1, 121))
    check_png(path, figure)
    check_texts_apart(figure)
    assert texts(figure) == ["?"]
    assert 10 < len(figure.axes[0].get_xticks()) <= 24


def test_in_place_of_what_is_not_finite_stands_a_question_mark(folder):
    layers = {"a": [0.01, 0.0], "b": [float("nan"), 0.02], "c": [0.0, float("inf")]}
    figure = plots.plot_errors(folder / "errors-zero.png", layers=layers, rounds=[1, 2])
    check_png(folder / "errors-zero.png", figure)
    check_texts_apart(figure)
    assert texts(figure) == ["1.0", "0", "?", "2.0", "0", "?"]


@pytest.mark.parametrize(
    ("percent", "text"),
    [(0, "0"), (1e-9, "<.01"), (0.0096, "0.010"), (0.1, "0.10"), (0.996, "1.0"), (9.96, "10")],
)
def test_errors_are_written_with_two_digits(percent, text):
    assert errors._error_text(percent) == text


def test_errors_need_one_value_per_round(tmp_path):
    with pytest.raises(ValueError, match="b: expected 2 errors, got 1"):
        plots.plot_errors(tmp_path / "a.png", layers={"a": [1, 2], "b": [1]}, rounds=[1, 2])


@pytest.mark.parametrize("form", ["svg", "pdf"])
def test_errors_are_drawn_for_papers_too(form, tmp_path):
    path = tmp_path / f"a.{form}"
    plots.plot_errors(path, layers=staircase(4, 6), rounds=range(1, 7))
    content = path.read_bytes()
    assert b"<image" not in content and b"/Subtype /Image" not in content  # shapes, no pixels
    if form == "svg":
        assert content.count(b">26</text>") == 4 and b">at the start of round</text>" in content


def test_titles_are_short():
    paths = ["params/encoder_0/kernel", "params/encoder_1/attention/query/kernel", "params/head"]
    titles = drawing.titles(dict.fromkeys(paths), length=20)
    assert titles == ["encoder_0", "encoder_1…tion/query", "head"]
    assert max(map(len, titles)) <= 20
    assert drawing.titles({"kernel": 0}, length=20) == ["kernel"]


def test_markup_in_names_is_plain_text(tmp_path):
    layers = {"$a_1$/kernel": [0.1, 0.2], "_b$^$": [0.3, 0.4]}
    figure = plots.plot_errors(tmp_path / "a.svg", layers=layers, rounds=[1, 2])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["$a_1$", "_b$^$"]
    content = (tmp_path / "a.svg").read_text()
    assert ">$a_1$</text>" in content and ">_b$^$</text>" in content


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "plots" / "rounds.png"
    plots.plot_rounds(path, float_accuracy=0.9, rounds=rounds_5bit())
    first = path.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)

    def fail(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.plot_rounds(path, float_accuracy=0.9, rounds=rounds_ternary())
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_same_figure_under_any_settings(tmp_path):
    """A user's own matplotlib settings neither change our figures nor are changed by them."""
    plots.plot_rounds(tmp_path / "a.png", float_accuracy=0.9, rounds=rounds_5bit())
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 10}):
        plots.plot_rounds(tmp_path / "b.png", float_accuracy=0.9, rounds=rounds_5bit())
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("form", "start"), [("pdf", b"%PDF-"), ("svg", b"<?xml")])
def test_figures_are_for_papers_too_and_undated(form, start, tmp_path, monkeypatch):
    for name, epoch in (("a", "0"), ("b", "1000000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        path = tmp_path / f"{name}.{form}"
        plots.plot_rounds(path, float_accuracy=0.9, rounds=rounds_5bit())
        assert path.read_bytes().startswith(start)
    assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()
    if form == "svg":
        assert ">accuracy (%)</text>" in (tmp_path / "a.svg").read_text()


def test_pyplot_is_not_imported():
    code = "import sys; from train import plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_comparison_draws_a_curve_for_each_family_and_tells_what_fell_off(tmp_path):
    families = {"SLQ": [(300.0, 0.9), (200.0, 0.88)], "INQ": [(100.0, 0.42), (250.0, 0.87)]}
    figure = plots.plot_comparison(tmp_path / "a.png", families=families, full=(1000.0, 0.91))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["SLQ"].get_xydata(), [[200, 88], [300, 90]])
    np.testing.assert_allclose(lines["INQ"].get_xydata(), [[100, 76], [250, 87]])  # the foot
    np.testing.assert_allclose(lines["float"].get_xydata(), [[1000, 91]])
    assert [text.get_text() for text in axes.texts] == ["42"]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    np.testing.assert_allclose(hollow[0].get_xydata(), [[100, 76]])
    assert axes.get_xscale() == "log" and (tmp_path / "a.png").stat().st_size > 5000


def test_networks_are_drawn_by_size_with_what_each_point_is(folder):
    points = [
        plots.Sized("float", 1000e3, [0.9]),
        plots.Sized("2 bits, 15.0x smaller", 60e3, [0.88, 0.90]),
        plots.Sized("5 bits", 200e3, [0.91]),
    ]
    networks = {"small": points, "large": [plots.Sized("float", 3000e3, [0.95])]}
    figure = plots.plot_sizes(folder / "sizes.png", networks=networks)
    check_png(folder / "sizes.png", figure)
    check_legend_apart(figure)
    check_texts_apart(figure)
    (axes,) = figure.axes
    lines = by_label(figure)
    np.testing.assert_allclose(lines["small"].get_xydata(), [[60e3, 89], [200e3, 91], [1e6, 90]])
    assert texts(figure) == ["2 bits, 15.0x smaller", "5 bits", "float", "float"]
    bars = next(x for x in axes.collections if isinstance(x, LineCollection))
    assert bars.get_segments()[0][:, 1].tolist() == [88, 90]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["small", "large", "float"]
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert axes.get_window_extent(renderer).contains(box.x0, box.y1)
        for name in networks:
            path = lines[name].get_transform().transform_path(lines[name].get_path())
            assert not path.intersects_bbox(box, filled=False)


def test_curves_are_means_over_seeds_amid_their_range(tmp_path):
    families = {"a": [[0.01, -0.02], [0.03, 0.0]], "b": [[-0.3]]}
    figure = plots.plot_curves(tmp_path / "a.png", families=families)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["a"].get_xydata(), [[0, 0], [1, 2], [2, -1]], atol=1e-12)
    np.testing.assert_allclose(lines["b"].get_xydata(), [[0, 0], [1, -15]])  # the foot
    assert [text.get_text() for text in axes.texts] == ["-30"]
    (band,) = axes.collections  # of the one with two seeds
    corners = {tuple(point) for point in np.round(band.get_paths()[0].vertices, 9)}
    assert {(1, 1), (1, 3), (2, -2), (2, 0)} <= corners
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="a: expected runs of equally many rounds"):
        plots.plot_curves(tmp_path / "b.png", families={"a": [[0.0], [0.0, 0.0]]})


def check_values_apart(figure):
    """No value that is written in a panel lies over another one, or over a curve."""
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert axes.get_window_extent(renderer).contains(box.x0, box.y0)
        for line in axes.lines:
            path = line.get_transform().transform_path(line.get_path())
            assert not path.intersects_bbox(box, filled=False)
    return boxes


def test_no_curve_crosses_the_values_of_those_that_fell_off(tmp_path):
    runs = {f"{i}": [[-0.01 * i, -0.1 * i, -0.02 * i, -0.051 * i]] for i in range(12)}
    assert len(check_values_apart(plots.plot_curves(tmp_path / "a.png", families=runs))) == 23
    sizes = {f"{i}": [(90.0 + 3 * i, 0.8 - 0.05 * i), (300.0 - i, 0.9)] for i in range(12)}
    figure = plots.plot_comparison(tmp_path / "b.png", families=sizes, full=(1000.0, 0.91))
    assert len(check_values_apart(figure)) == 11


def test_the_scale_of_shares_is_told(tmp_path):
    layers = make_layers({"a/kernel": (8, 8)}, k=3, share=1.0)
    figure = plots.plot_weights(tmp_path / "a.png", **layers)
    assert figure.get_supylabel() == "share of weights (%), square root"


def test_36_curves_are_told_apart(tmp_path):
    families = {str(i): [[i / 100]] for i in range(36)}
    figure = plots.plot_curves(tmp_path / "a.png", families=families)
    lines = figure.axes[0].lines[1:]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 36
    check_png(tmp_path / "a.png", figure)
