"""The compiled parts of training: augmentation, learning rates, distillation, measurements."""

import dataclasses
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from tests import own
from train import engine, layout, networks, tasks
from train.config import Config, Fit, Quantize
from train.data import Dataset, Images
from train.networks import Answers


class Tiny(nn.Module):
    """Dense layer with batch normalization."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(len(x), -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="bn")(x)
        self.sow("intermediates", "features", x)
        return nn.Dense(3, name="dense")(x)


class Dropping(Tiny):
    """The same on half of the pixels."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return Tiny(self.momentum, name="tiny")(x, train=train)


def make_dataset(size=40, pad=0, flip=False):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 4, 4, 2), dtype=np.uint8)
    labels = rng.integers(0, 3, size).astype(np.int32)
    train = Images(images, labels)
    return Dataset("x", train, train.part(0, 7), 3, (0.5, 0.25), (0.5, 2.0), pad, flip)


def task_of(module, dataset):
    return tasks.classify(networks.linen(module), dataset)


def make_engine(config, dataset, network=Tiny, inputs=(), plan=None):
    where = layout.make(config)
    functions = engine.build(config, dataset, task_of(network(), dataset), where, inputs, plan)
    variables = network().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), train=False)
    return functions, variables, dataset.train


KEY = engine.key_data(jax.random.key(3))


def begin(functions, variables, quant=(), *, momentum=0.9, weight_decay=0.0, optimizer=""):
    numbers = np.float32(momentum), np.float32(weight_decay)
    return functions.start(variables, quant, *numbers, optimizer=optimizer)


def normalized(dataset, images):
    return (images / 255.0 - np.array(dataset.mean)) / np.array(dataset.std)


def test_without_padding_and_flip_augmentation_is_normalization():
    dataset = make_dataset()
    out = tasks.augment(jax.random.key(0), jnp.asarray(dataset.train.images), dataset=dataset)
    np.testing.assert_allclose(out, normalized(dataset, dataset.train.images), atol=1e-6)


def test_bytes_come_to_the_network_as_zero_to_one_and_numbers_as_they_are():
    dataset = make_dataset()
    out = tasks.normalize(jnp.array([[0, 255]], jnp.uint8), dataset)
    np.testing.assert_allclose(out, [[-0.5 / 0.5, 0.75 / 2.0]], atol=1e-6)
    out = tasks.normalize(jnp.array([[-3.0, 255.0]]), dataset)
    np.testing.assert_allclose(out, [[-3.5 / 0.5, 254.75 / 2.0]], atol=1e-6)


def test_crops_are_windows_of_the_framed_image_and_flips_mirror_them():
    dataset = make_dataset(pad=1, flip=True)
    images = dataset.train.images
    out = tasks.augment(jax.random.key(1), jnp.asarray(images), dataset=dataset)
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for image, got in zip(framed, np.asarray(out), strict=True):
        windows = {
            (i, j, flip): normalized(dataset, image[i : i + 4, j : j + 4][:, :: -1 if flip else 1])
            for i in range(3)
            for j in range(3)
            for flip in (False, True)
        }
        hits = [at for at, w in windows.items() if np.allclose(w, got, atol=1e-6)]
        assert hits
        seen.update(hits)
    assert len(seen) > 10  # of 18: position and mirror really vary


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = engine.learning_rates(Fit(learning_rate=0.2, warmup_epochs=1), 4, 10)
    assert rates.shape == (40,)
    assert rates[0] == 0 and rates[10] == pytest.approx(0.2)
    assert np.all(np.diff(rates[10:]) < 0) and rates[-1] < 0.002
    assert engine.learning_rates(Fit(learning_rate=0.2), 1, 10)[0] == pytest.approx(0.2)


def test_epoch_order_visits_every_example_once():
    order = engine.epoch_order(jax.random.key(0), 40, 10)
    assert order.shape == (4, 10) and sorted(np.ravel(order)) == list(range(40))
    assert engine.epoch_order(jax.random.key(0), 43, 10).shape == (4, 10)
    assert engine.epoch_order(jax.random.key(0), 4, 4).shape == (1, 4)


def test_evaluate_counts_every_image_once_whatever_the_batch():
    dataset = make_dataset()
    results = []
    for batch in (3, 7, 100):
        functions, variables, images = make_engine(Config(eval_batch_size=batch), dataset)
        test = engine.Images(images.images[:7], images.labels[:7])
        results.append(functions.evaluate(variables["params"], variables["batch_stats"], test))
    x = normalized(dataset, dataset.test.images).astype(np.float32)
    logits = Tiny().apply(variables, x, train=False)
    accuracy = np.mean(np.argmax(logits, -1) == dataset.test.labels)
    for result in results:
        assert result["accuracy"] == pytest.approx(accuracy)
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)


def test_mirrored_evaluation_answers_by_the_mean_over_image_and_mirror_image():
    dataset = make_dataset(flip=True)
    functions, variables, images = make_engine(Config(eval_batch_size=6), dataset)
    args = (variables["params"], variables["batch_stats"], images)
    x = normalized(dataset, images.images).astype(np.float32)
    plain, mirror = (Tiny().apply(variables, v, train=False) for v in (x, x[:, :, ::-1]))
    for mirrored, logits in ((False, plain), (True, (plain + mirror) / 2)):
        result = functions.evaluate(*args, mirrored=mirrored)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)
        assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        correct = np.argmax(logits, -1) == images.labels
        assert result["accuracy"] == pytest.approx(correct.mean())


def quant_state(params, frozen=None, codebooks=None, frozen_centroids=None):
    """Return a QuantState with these masks; nothing is frozen where there is none."""
    none = jax.tree.map(lambda _: jnp.bool_(False), params)
    return jq.QuantState(
        codebooks or jax.tree.map(lambda _: jnp.zeros(()), params),
        frozen or none,
        frozen_centroids or none,
        jnp.int32(0),
    )


def train(
    functions,
    state,
    images,
    variables,
    quant,
    *,
    steps,
    distill=False,
    move=False,
    warmth=None,
    **more,
):
    order = engine.epoch_order(jax.random.key(2), 40, 10)[:steps]
    rates = np.full(steps, 0.1, np.float32)
    return functions.train(
        jax.tree.map(jnp.copy, state),
        quant,
        variables,
        functions.parts.layout.feed(images, order),
        np.int32(0),
        KEY,
        rates,
        None if warmth is None else np.full(steps, warmth, np.float32),
        distill=distill,
        move_centroids=move,
        **more,
    )


def first_loss(dataset, variables):
    """Return the loss of the first step's batch, as a function of the parameters."""
    index = np.asarray(engine.epoch_order(jax.random.key(2), 40, 10)[0])
    x = normalized(dataset, dataset.train.images[index]).astype(np.float32)

    def loss(params):
        logits, _ = Tiny().apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        labels = dataset.train.labels[index]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


@pytest.mark.parametrize("size", [1, 4])
def test_steps_in_one_call_equal_steps_one_by_one(size):
    config = Config(steps_per_call=size)
    functions, variables, images = make_engine(config, make_dataset(pad=1))
    start = begin(functions, variables, weight_decay=0.1)
    together, _, sums = train(functions, start, images, variables, (), steps=4)
    order = engine.epoch_order(jax.random.key(2), 40, 10)
    state, total = jax.tree.map(jnp.copy, start), 0.0
    for i in range(4):
        state, _, metrics = functions.train(
            state,
            (),
            variables,
            functions.parts.layout.feed(images, order[i : i + 1]),
            np.int32(i),
            KEY,
            np.full(1, 0.1, np.float32),
            distill=False,
            move_centroids=False,
        )
        total += float(metrics["loss"])
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-4)


def test_a_step_is_sgd_with_momentum_and_decay_on_the_free_weights():
    config = Config(steps_per_call=1)
    dataset = make_dataset()
    functions, variables, images = make_engine(config, dataset)
    start = begin(functions, variables, weight_decay=0.5)
    params = variables["params"]
    frozen = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
    frozen["dense"]["kernel"] = frozen["dense"]["kernel"].at[0].set(True)
    quant = quant_state(params, frozen)
    state, _, _ = train(functions, start, images, variables, quant, steps=1)
    loss = first_loss(dataset, variables)
    gradient = jax.grad(loss)(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * (g + 0.5 * p), params, gradient)
    kernel = state.params["dense"]["kernel"]
    np.testing.assert_array_equal(kernel[0], params["dense"]["kernel"][0])
    np.testing.assert_allclose(kernel[1:], expected["dense"]["kernel"][1:], atol=1e-5)
    np.testing.assert_allclose(state.params["bn"]["scale"], expected["bn"]["scale"], atol=1e-5)


def test_an_optimizer_of_your_own_sees_the_free_weights_alone():
    """It clips by the norm of all gradients, and takes no momentum."""
    dataset = make_dataset()
    functions, variables, images = make_engine(Config(steps_per_call=1), dataset)
    params = variables["params"]
    start = begin(functions, variables, weight_decay=0.5, optimizer=own.clipped)
    frozen = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
    frozen["dense"]["kernel"] = frozen["dense"]["kernel"].at[4:].set(True)
    got, _, _ = train(
        functions,
        start,
        images,
        variables,
        quant_state(params, frozen),
        steps=1,
        optimizer=own.clipped,
    )
    loss = first_loss(dataset, variables)
    tx = jq.freeze_quantized(own.clipped(0.1, 0.5))
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, frozen=frozen)
    chex.assert_trees_all_close(got.params, optax.apply_updates(params, updates), atol=1e-5)
    kernel = got.params["dense"]["kernel"]
    np.testing.assert_array_equal(kernel[4:], params["dense"]["kernel"][4:])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("optax:nowhere", "x: expected nowhere in optax, got no such name"),
        (
            "optax:clip",
            "x: expected optax.transforms._clipping:clip to need no arguments but learn",
        ),
        (lambda: optax.sgd(0.1), "<lambda> to take a learning_rate, which changes by step"),
        (lambda learning_rate: 3, "<lambda>: AttributeError: "),
    ],
)
def test_what_is_no_optimizer_is_named(optimizer, message):
    params = {"a": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.check_optimizer("x", optimizer, params)
    engine.check_optimizer("x", "optax:adamw", params)
    engine.check_optimizer("x", "", params)


def test_a_step_drops_by_a_key_that_augmentation_does_not_use():
    dataset = make_dataset(flip=True)
    functions, variables, images = make_engine(Config(steps_per_call=1), dataset, Dropping)
    state, _, _ = train(functions, begin(functions, variables), images, variables, (), steps=1)
    key = jax.random.fold_in(jax.random.wrap_key_data(KEY), 0)  # of the first step
    index = np.asarray(engine.epoch_order(jax.random.key(2), 40, 10)[0])
    x = tasks.augment(key, jnp.asarray(dataset.train.images[index]), dataset=dataset)
    dropout = jax.random.fold_in(key, 2)

    def loss(params):
        logits, _ = Dropping().apply(
            {**variables, "params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout},
        )
        labels = dataset.train.labels[index]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.grad(loss)(variables["params"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    chex.assert_trees_all_close(state.params, expected, atol=1e-6)
    used = jnp.stack([jax.random.key_data(k) for k in (*jax.random.split(key), dropout)])
    assert len(np.unique(used, axis=0)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
def test_centroids_take_the_step_of_all_their_members_and_stay_shared(steps):
    config = Config(retrain=Fit(centroid_rate=0.5), steps_per_call=steps)
    dataset = make_dataset()
    functions, variables, images = make_engine(config, dataset)
    params = variables["params"]
    plan = jq.slq(params, bits=2, rounds=(2, 3))
    params, quant, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    start = begin(functions, {**variables, "params": params}, quant)
    state, moved, _ = train(functions, start, images, variables, quant, steps=steps, move=True)
    kernel, before = state.params["dense"]["kernel"], params["dense"]["kernel"]
    mask = np.asarray(quant.frozen["dense"]["kernel"])
    old, new = quant.codebooks["dense"]["kernel"], moved.codebooks["dense"]["kernel"]
    codes = np.asarray(jq.assign(before, old))
    np.testing.assert_array_equal(kernel[mask], np.asarray(new)[codes[mask]])
    clusters_frozen = np.asarray(quant.frozen_centroids["dense"]["kernel"])
    assert (np.asarray(new != old) == clusters_frozen).all()
    np.testing.assert_array_equal(moved.frozen["dense"]["kernel"], mask)
    if steps > 1:
        return
    loss_of = first_loss(dataset, variables)

    def loss(codebook):
        kernel = jnp.where(mask, codebook[codes], before)
        return loss_of({**params, "dense": {**params["dense"], "kernel": kernel}})

    members = np.array([np.sum(mask & (codes == j)) for j in range(3)])
    expected = old - 0.5 * 0.1 * jax.grad(loss)(old) / np.sqrt(np.maximum(members, 1))
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("warmth", [0.0, 0.3])
def test_a_straight_through_step_trains_all_weights_and_their_centroids(warmth, move):
    config = Config(retrain=Fit(centroid_rate=0.5), steps_per_call=1)
    dataset = make_dataset()
    variables = Tiny().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), train=False)
    params = variables["params"]
    plan = jq.slq(params, bits=2, rounds=(3,), zero=True)
    functions, _, images = make_engine(config, dataset, plan=plan)
    quant = jq.release(jq.quantize_round(plan, params, jq.init(plan, params))[1])
    start = begin(functions, variables, quant)
    state, moved, _ = train(
        functions, start, images, variables, quant, steps=1, move=move, warmth=warmth
    )
    loss_of = first_loss(dataset, variables)

    def loss(params, codebooks):
        own = quant._replace(codebooks=codebooks)
        return loss_of(jq.straight_through(plan, params, own, temperature=warmth))

    gradient, own = jax.grad(loss, argnums=(0, 1))(params, quant.codebooks)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    chex.assert_trees_all_close(state.params, expected, atol=1e-6)
    before, after = (tree.codebooks["dense"]["kernel"] for tree in (quant, moved))
    members = params["dense"]["kernel"].size / 3
    step = 0.5 * 0.1 * own["dense"]["kernel"] / np.sqrt(members) if move else 0.0
    np.testing.assert_allclose(after, before - step, rtol=1e-5, atol=1e-7)
    assert np.any(after == 0)  # pinned
    settled, quant = functions.settle(state.params, moved)
    assert all(jax.tree.leaves(jq.is_on_codebook(settled, quant)))
    np.testing.assert_array_equal(
        settled["dense"]["kernel"],
        jq.straight_through(plan, state.params, moved)["dense"]["kernel"],
    )


def test_temperatures_fall_and_then_are_zero():
    stage = Fit(straight_through=True, warmest=0.5, coolest=0.02, cooling=0.5)
    found = engine.temperatures(stage, 4, 10)
    assert found.shape == (40,) and found[0] == pytest.approx(0.5)
    np.testing.assert_allclose(found[1:20] / found[:19], (0.02 / 0.5) ** (1 / 20), rtol=1e-5)
    assert np.all(found[20:] == 0)
    for cold in (Fit(straight_through=True), Fit(straight_through=True, warmest=1, cooling=0)):
        assert not np.any(engine.temperatures(cold, 2, 5))
    assert engine.temperatures(stage, 0, 10).shape == (0,)


def test_distillation_at_weight_one_moves_a_network_towards_its_teacher():
    config = Config(retrain=Fit(distill_weight=1.0), steps_per_call=1)
    functions, variables, images = make_engine(config, make_dataset())
    start = begin(functions, variables)
    x = normalized(make_dataset(), make_dataset().train.images).astype(np.float32)
    # A teacher with statistics of the training batch's kind: its own logits as a fixed point.
    teacher = jax.tree.map(lambda p: 2.0 * p, variables["params"])
    teacher = {"params": teacher, "batch_stats": variables["batch_stats"]}

    def divergence(state):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        ours, theirs = (Tiny().apply(v, x, train=False) for v in (variables, teacher))
        soft = jax.nn.softmax(theirs / 2), jax.nn.log_softmax(ours / 2)
        return float(optax.losses.kl_divergence(soft[1], soft[0]).mean())

    state = start
    for _ in range(30):
        state, _, _ = train(functions, state, images, teacher, (), steps=4, distill=True)
    assert divergence(state) < 0.3 * divergence(start)


def test_features_at_a_distance_are_pulled_towards_those_of_the_teacher():
    config = Config(
        retrain=Fit(distill_weight=1.0, feature_weight=4.0, temperature=8.0),
        quantize=Quantize(recalibrate_batches=4),
        batch_size=10,
        steps_per_call=1,
    )
    functions, variables, images = make_engine(config, make_dataset())
    start = begin(functions, variables)
    teacher = jax.tree.map(jnp.copy, variables)
    teacher["batch_stats"] = functions.recalibrate(
        teacher["params"], teacher["batch_stats"], images, jax.random.key(0)
    )
    teacher["params"]["bn"]["scale"] = 2.0 * teacher["params"]["bn"]["scale"]
    state = start
    for _ in range(30):
        state, _, _ = train(functions, state, images, teacher, (), steps=4, distill=True)
    np.testing.assert_allclose(start.params["bn"]["scale"], 1.0)
    # The logits alone cannot tell: half the scale and twice the kernel give the same.
    assert np.abs(state.params["bn"]["scale"] - 2.0).mean() < 0.25


def test_distillation_is_the_weighted_sum_of_labels_soft_targets_and_relative_feature_errors():
    rng = np.random.default_rng(0)
    ours, theirs = (
        Answers(
            jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
            [jnp.asarray(rng.normal(size=(5, n)), jnp.float32) for n in (4, 7)],
        )
        for _ in range(2)
    )
    stage = Fit(distill_weight=0.7, temperature=3.0, feature_weight=2.0)
    got = engine._distill(stage, jnp.float32(1.5), ours, theirs)
    p, q = (np.exp(o.logits / 3.0) for o in (theirs, ours))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    soft = np.sum(p * np.log(p / q), axis=1).mean()
    errors = [
        np.square(a - b).sum() / np.square(b).sum()
        for a, b in zip(ours.features, theirs.features, strict=True)
    ]
    assert float(got) == pytest.approx(0.3 * 1.5 + 0.7 * 9 * soft + 2 * np.mean(errors), rel=1e-5)
    assert float(engine._distill(Fit(), jnp.float32(1.5), ours, theirs)) == 1.5


class Sided(nn.Module):
    """Two convolutions that tell left from right, and maybe a dense layer with features."""

    dense: bool

    @nn.compact
    def __call__(self, x, *, train):
        for features in (3, 5):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            self.sow("intermediates", "features", x)
        x = jnp.mean(x[:, :, :2], axis=(1, 2))  # of the left half
        if self.dense:
            x = nn.relu(nn.Dense(4)(x))
            self.sow("intermediates", "features", x)
        return nn.Dense(3)(x)


@pytest.mark.parametrize("dense", [False, True])
def test_a_mirrored_teacher_answers_an_image_as_its_mirror_image(dense):
    model, stage = Sided(dense), Fit(distill_weight=1.0, mirrored_teacher=True)
    task = task_of(model, make_dataset())
    images = jax.random.normal(jax.random.key(1), (6, 4, 4, 2))
    variables = model.init(jax.random.key(0), images, train=False)
    plain = [engine._teach(Fit(), task, variables, x) for x in (images, images[:, :, ::-1])]
    got = [engine._teach(stage, task, variables, x) for x in (images, images[:, :, ::-1])]
    for x in got:
        np.testing.assert_allclose(x.logits, (plain[0].logits + plain[1].logits) / 2, rtol=1e-5)
    assert np.abs(got[0].logits - plain[0].logits).max() > 1e-3
    # A place's features answer from where it lies; all before the last block are the image's own.
    back = got[1].features[-1] if dense else got[1].features[-1][:, :, ::-1]
    np.testing.assert_allclose(got[0].features[-1], back, rtol=1e-5)
    assert np.abs(got[0].features[-1] - plain[0].features[-1]).max() > 1e-3
    chex.assert_trees_all_equal(got[0].features[:-1], plain[0].features[:-1])


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_step_asks_the_teacher_that_the_config_names(mirrored):
    stage = Fit(distill_weight=1.0, temperature=3.0, mirrored_teacher=mirrored)
    functions, variables, images = make_engine(Config(retrain=stage), make_dataset())
    teacher = jax.tree.map(lambda p: 2.0 * p, variables["params"])
    teacher = {"params": teacher, "batch_stats": variables["batch_stats"]}
    state = begin(functions, variables)
    _, _, metrics = train(functions, state, images, teacher, (), steps=1, distill=True)
    index = np.asarray(engine.epoch_order(jax.random.key(2), 40, 10)[0])
    x = normalized(make_dataset(), images.images[index]).astype(np.float32)
    ours, _ = Tiny().apply(variables, x, train=True, mutable=["batch_stats", "intermediates"])
    theirs = [Tiny().apply(teacher, v, train=False) for v in (x, x[:, :, ::-1])]
    wanted = (theirs[0] + theirs[1]) / 2 if mirrored else theirs[0]
    soft = jax.nn.softmax(wanted / 3), jax.nn.log_softmax(ours / 3)
    expected = 9 * optax.losses.kl_divergence(soft[1], soft[0]).mean()
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_features_that_are_zero_in_the_teacher_give_a_finite_gradient():
    ours = Answers(jnp.ones((2, 3)), [jnp.zeros((2, 4))])
    stage = Fit(feature_weight=1.0)
    gradient = jax.grad(lambda o: engine._distill(stage, jnp.float32(0.0), o, ours))(ours)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("momentum", [0.9, 0.25, 0.0])
def test_recalibrated_statistics_are_means_over_batches(momentum):
    config = Config(quantize=Quantize(recalibrate_batches=4), batch_size=10)
    dataset = make_dataset()
    network = functools.partial(Tiny, momentum)
    functions, variables, images = make_engine(config, dataset, network)
    variables["batch_stats"] = jax.tree.map(lambda x: x + 100, variables["batch_stats"])
    stats = functions.recalibrate(
        variables["params"], variables["batch_stats"], images, jax.random.key(0)
    )
    x = normalized(dataset, dataset.train.images).reshape(40, -1)
    np.testing.assert_allclose(stats["bn"]["mean"], x.mean(0), atol=1e-5)  # every image once
    off = dataclasses.replace(config, quantize=Quantize(recalibrate_batches=0))
    functions, _, _ = make_engine(off, dataset)
    kept = functions.recalibrate(
        variables["params"], variables["batch_stats"], images, jax.random.key(0)
    )
    assert kept is variables["batch_stats"]


def test_recalibrated_statistics_are_those_of_training_that_drops():
    config = Config(quantize=Quantize(recalibrate_batches=1), batch_size=40)
    dataset = make_dataset()
    functions, variables, images = make_engine(config, dataset, Dropping)
    stats = functions.recalibrate(
        variables["params"], variables["batch_stats"], images, jax.random.key(0)
    )
    x = normalized(dataset, dataset.train.images).reshape(40, -1)
    # Half of the entries are zero, the others twice what they were: twice the mean square.
    expected = (2 * np.square(x).mean(0) - np.square(x.mean(0))).mean()
    assert np.mean(stats["tiny"]["bn"]["var"]) == pytest.approx(expected, rel=0.1)


def test_sensitivity_is_the_mean_of_squared_gradients():
    config = Config(quantize=Quantize(sensitivity="fisher", sensitivity_batches=1), batch_size=40)
    dataset = make_dataset()
    functions, variables, images = make_engine(config, dataset)
    guides = functions.guides(
        variables["params"], variables["batch_stats"], images, jax.random.key(0)
    )
    got = guides["sensitivity"]
    x = normalized(dataset, dataset.train.images).astype(np.float32)

    def loss(params):
        logits = Tiny().apply({**variables, "params": params}, x, train=False)
        labels = dataset.train.labels
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.grad(loss)(variables["params"])["dense"]["kernel"]
    np.testing.assert_allclose(got["dense"]["kernel"], gradient**2, rtol=1e-3, atol=1e-8)
    plain, _, _ = make_engine(Config(), dataset)
    guides = plain.guides(None, None, images, jax.random.key(0))
    assert guides == {"sensitivity": None, "moments": None}


def test_moments_are_means_over_batches_of_what_layers_get():
    config = Config(quantize=Quantize(moment_batches=4), batch_size=10)
    dataset = make_dataset()
    functions, variables, images = make_engine(config, dataset, inputs=["dense/kernel"])
    args = variables["params"], variables["batch_stats"], images, jax.random.key(0)
    guides = functions.guides(*args)
    got = guides["moments"]
    assert guides["sensitivity"] is None
    x = normalized(dataset, dataset.train.images).astype(np.float32).reshape(40, -1)
    x = x / np.sqrt(1 + 1e-5)  # by the running statistics of an untrained network
    assert list(got) == ["dense/kernel"]
    np.testing.assert_allclose(got["dense/kernel"], x.T @ x / 40, rtol=1e-4, atol=1e-4)
    plain, _, _ = make_engine(Config(), dataset)
    assert plain.guides(*args)["moments"] is None


@pytest.mark.slow
def test_a_round_freezes_by_the_moments_it_is_given():
    config = Config(quantize=Quantize(moment_batches=4), batch_size=10)
    dataset = make_dataset()
    functions, variables, images = make_engine(config, dataset, inputs=["dense/kernel"])
    params = variables["params"]
    guides = functions.guides(params, variables["batch_stats"], images, jax.random.key(0))
    plan = jq.slq(params, bits=2, rounds=(3,))
    old = params["dense"]["kernel"]

    def error(guides):
        new, _, _ = functions.quantize(plan, params, jq.init(plan, params), guides, KEY)
        change = np.asarray(new["dense"]["kernel"] - old)
        return np.einsum("in,ij,jn->", change, seen, change)

    seen = np.asarray(guides["moments"]["dense/kernel"])
    assert error(guides) < 0.8 * error({})
