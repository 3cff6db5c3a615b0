"""The compiled parts of an experiment: train, evaluate, recalibrate, weigh, quantize.

Images come to the devices as they are stored; augmentation and normalization are part of the
compiled step. What the network is, and what is learned, is the business of `train.tasks`.
Where the arrays lie is the layout's business: each function settles its results there.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq
from train.config import Config, Fit
from train.data import Dataset, Images
from train.imagenet import Encoded
from train.layout import Layout
from train.named import guarded, name_of, resolve, taken
from train.networks import Answers
from train.tasks import Task, soft_targets

_TINY = 1e-12  # for features that are all zero


class TrainState(NamedTuple):
    """What training changes."""

    params: Any
    batch_stats: Any  # empty for networks without batch normalization
    opt_state: Any  # of the weights, and of the frozen centroids


class Parts(NamedTuple):
    """What is compiled: alone for the loop, together for the one program."""

    start: Callable[..., TrainState]
    train: Callable[..., tuple[TrainState, Any, dict[str, jax.Array]]]
    count_correct: Callable[..., tuple[jax.Array, jax.Array]]
    batch_statistics: Callable[..., Any]
    squared_gradient: Callable[..., Any]
    input_moments: Callable[..., dict[str, jax.Array]]
    quantize: Callable[..., tuple[Any, jq.QuantState, jq.RoundInfo]]
    settle: Callable[..., tuple[Any, jq.QuantState]]
    eval_batch: int
    layout: Layout


class Engine(NamedTuple):
    """What rounds are made of, see `train.stages`.

    Those of `build` compile once for a whole run. Splits are the host's; what is compiled takes
    keys as in `key_data`. `train.program` has others.
    """

    start: Callable[..., TrainState]  # variables, QuantState or () -> with a fresh optimizer
    train: Callable[..., tuple[TrainState, Any, dict[str, jax.Array]]]
    evaluate: Callable[..., Any]  # accuracy and loss by name
    recalibrate: Callable[..., Any]
    guides: Callable[..., dict[str, Any]]
    quantize: Callable[..., tuple[Any, jq.QuantState, jq.RoundInfo]]
    settle: Callable[..., tuple[Any, jq.QuantState]]  # ends a straight-through stage
    steps_per_call: int
    parts: Parts


def build(
    config: Config,
    dataset: Dataset,
    task: Task,
    layout: Layout,
    inputs: Sequence[str] = (),
    plan: jq.Plan | None = None,
) -> Engine:
    """Return the compiled functions for one network on one dataset.

    Args:
      config: of the experiment.
      dataset: its splits, as far as their size goes.
      task: the network, and what it learns of this dataset.
      layout: where arrays lie.
      inputs: paths of the weights whose inputs' moments rounds take.
      plan: of the rounds, for `straight_through`.
    """
    eval_batch = min(config.eval_batch_size, dataset.test.size)
    parts = Parts(
        start=functools.partial(_start, layout),
        train=functools.partial(
            _train_steps, functools.partial(_train_step, config, task, layout, plan), layout
        ),
        count_correct=functools.partial(_count_correct, task, layout),
        batch_statistics=functools.partial(_batch_statistics, task, layout),
        squared_gradient=functools.partial(_squared_gradient, task, layout),
        input_moments=functools.partial(_input_moments, task, layout, inputs),
        quantize=functools.partial(_quantize, layout),
        settle=functools.partial(_settle, layout, plan),
        eval_batch=eval_batch + -eval_batch % layout.size,  # the devices divide a batch
        layout=layout,
    )
    # XLA on CPU runs convolutions inside a loop about 50 times slower than outside of one; where
    # the images do not fit in memory, 50 batches hardly do, and their steps are long.
    one_by_one = jax.default_backend() == "cpu" or isinstance(dataset.train, Encoded)
    steps_per_call = config.steps_per_call or (1 if one_by_one else 50)

    def averaged(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_mean_over_batches, config, layout, jax.jit(function))

    return Engine(
        start=jax.jit(parts.start, static_argnames="optimizer"),
        train=jax.jit(
            parts.train,
            static_argnames=("distill", "move_centroids", "optimizer"),
            donate_argnums=0,
        ),
        evaluate=functools.partial(
            _evaluate,
            parts.eval_batch,
            layout,
            jax.jit(parts.count_correct, static_argnames="mirrored"),
        ),
        recalibrate=functools.partial(recalibrate, config, averaged(parts.batch_statistics)),
        guides=functools.partial(
            guides, config, averaged(parts.squared_gradient), averaged(parts.input_moments)
        ),
        quantize=jax.jit(parts.quantize, static_argnums=0),
        settle=jax.jit(parts.settle),
        steps_per_call=steps_per_call,
        parts=parts,
    )


def key_data(key: jax.Array) -> np.ndarray:
    """Return a key as numbers of the host, which programs of several processes take."""
    return np.asarray(jax.random.key_data(key))


@functools.cache
def learning_rates(stage: Fit, epochs: int, steps_per_epoch: int) -> np.ndarray:
    """Return the learning rate of every step of a stage: linear warm-up, then cosine to zero."""
    total = max(1, epochs * steps_per_epoch)
    warmup = min(int(stage.warmup_epochs * steps_per_epoch), total - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else stage.learning_rate, stage.learning_rate, warmup, total
    )
    return np.asarray(jax.jit(schedule)(jnp.arange(total)), np.float32)


@functools.cache
def temperatures(stage: Fit, epochs: int, steps_per_epoch: int) -> np.ndarray:
    """Return the temperature of every step of a straight-through stage: geometric, then 0."""
    total = epochs * steps_per_epoch
    cooling, steps = int(stage.cooling * total), np.arange(total)
    fall = stage.coolest / max(stage.warmest, stage.coolest)
    warm = stage.warmest * fall ** (steps / max(cooling, 1))
    return np.where(steps < cooling, warm, 0.0).astype(np.float32)


def _start(
    layout: Layout,
    variables: Any,
    quant: Any,
    momentum: jax.Array,
    weight_decay: jax.Array,
    *,
    optimizer: str | Callable[..., Any] = "",
) -> TrainState:
    params = variables["params"]
    codebooks = quant.codebooks if quant else ()
    given = _taken(optimizer, {"momentum": momentum, "weight_decay": weight_decay})
    weights = optax.tree.set(_optimizer(optimizer).init(params), **given)
    centroids = optax.tree.set(_centroid_optimizer().init(codebooks), momentum=momentum)
    state = TrainState(params, variables.get("batch_stats", {}), (weights, centroids))
    return layout.settle(state)


def _optimizer(optimizer: str | Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of the weights: SGD, or what the config's function makes.

    The hyperparameters are part of the state: stages that differ in them share a program.
    """
    make = resolve("optimizer", optimizer) if optimizer else _sgd
    tx = optax.inject_hyperparams(make)(**_taken(optimizer, dict.fromkeys(_NUMBERS, 0.0)))
    # SGD looks at each weight alone; others may not see what is frozen.
    return jq.freeze_quantized(tx) if optimizer else optax.chain(tx, jq.freeze_quantized())


_NUMBERS = ("learning_rate", "momentum", "weight_decay")


def _taken(optimizer: str | Callable[..., Any], numbers: dict[str, Any]) -> dict[str, Any]:
    make = resolve("optimizer", optimizer) if optimizer else _sgd
    names = taken("optimizer", make, dict.fromkeys(_NUMBERS))
    return {name: numbers[name] for name in names if name in numbers}


def check_optimizer(field: str, optimizer: str | Callable[..., Any], params: Any) -> None:
    """Raise a ValueError for what makes no optimizer with a learning rate; shapes serve."""
    if not optimizer:
        return
    name = name_of(optimizer)
    if "learning_rate" not in taken(field, resolve(field, optimizer), dict.fromkeys(_NUMBERS)):
        raise ValueError(f"{field}: expected {name} to take a learning_rate, which changes by step")

    def updates(params: Any) -> Any:
        tx = _optimizer(optimizer)
        frozen = jax.tree.map(lambda _: jnp.bool_(False), params)
        return tx.update(params, tx.init(params), params, frozen=frozen)[0]

    guarded(field, name, lambda: jax.eval_shape(updates, params))


def _centroid_optimizer() -> optax.GradientTransformationExtraArgs:
    # No weight decay: it would pull a whole cluster to zero.
    return optax.inject_hyperparams(optax.sgd)(learning_rate=0.0, momentum=0.0)


def _sgd(
    learning_rate: float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=momentum)
    )


# Training ----------------------------------------------------------------------------------------


def _teach(stage: Fit, task: Task, teacher: Any, inputs: jax.Array) -> Answers:
    """Return the float network's answers, maybe by the mean over inputs and mirror images."""
    if stage.mirrored_teacher:
        assert task.answer_mirrored is not None
        return task.answer_mirrored(teacher, inputs)
    return task.answer(teacher, inputs, None)[0]


def _loss(
    config: Config,
    task: Task,
    params: Any,
    batch_stats: Any,
    inputs: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    teacher: Answers | None,
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    variables = {"params": params, "batch_stats": batch_stats}
    ours, batch_stats = task.answer(variables, inputs, key)
    loss = task.losses(ours, labels).mean()
    if teacher is not None:
        loss = _distill(config.retrain, loss, ours, teacher, task.imitate)
    return loss, (batch_stats, jnp.sum(task.correct(ours, labels)))


def _distill(
    stage: Fit,
    label_loss: jax.Array,
    ours: Answers,
    teacher: Answers,
    imitate: Callable[..., jax.Array] | None = soft_targets,
) -> jax.Array:
    """Return the loss that also asks for the teacher's soft targets and features.

    Soft targets: `(1 - w) label_loss + w imitate(ours, teacher, T)` at temperature T, the mean over
    all that `imitate` gives. Features as in Romero et al. (FitNets, ICLR 2015), of every block, and
    relative: the squared distance over the teacher's squares, averaged over the blocks.
    """
    loss, weight = label_loss, stage.distill_weight
    if weight:
        assert imitate is not None
        loss = (1 - weight) * loss + weight * imitate(ours, teacher, stage.temperature).mean()
    if stage.feature_weight:
        errors = [
            jnp.mean(jnp.square(s - t)) / jnp.maximum(jnp.mean(jnp.square(t)), _TINY)
            for s, t in zip(ours.features, teacher.features, strict=True)
        ]
        loss += stage.feature_weight * sum(errors) / len(errors)
    return loss


def _train_step(
    config: Config,
    task: Task,
    layout: Layout,
    plan: jq.Plan | None,
    state: TrainState,
    quant: Any,
    teacher: Any,
    batch: Images,
    key: jax.Array,
    learning_rate: jax.Array,
    temperature: jax.Array | None = None,
    *,
    move_centroids: bool,
    optimizer: str | Callable[..., Any] = "",
) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    inputs, labels = task.prepare(batch.images, key), batch.labels
    # Each layer's weights come together where they are used; their gradients part again.
    teacher, stats = layout.whole((teacher, state.batch_stats))
    taught = None if teacher is None else _teach(config.retrain, task, teacher, inputs)

    straight_through = temperature is not None
    trained = quant.codebooks if straight_through and move_centroids else ()

    def loss_of(params: Any, codebooks: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        if straight_through:
            assert plan is not None
            seen = quant._replace(codebooks=codebooks) if move_centroids else quant
            params = jq.straight_through(plan, params, seen, temperature=temperature)
        return _loss(config, task, layout.whole(params), stats, inputs, labels, key, taught)

    grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (loss, (batch_stats, correct)), (gradient, own) = grad(state.params, trained)
    gradient = layout.settle(gradient)
    weights_state, centroids_state = state.opt_state
    weights_state = optax.tree.set(weights_state, learning_rate=learning_rate)
    frozen = quant.frozen if quant else jax.tree.map(lambda _: jnp.bool_(False), state.params)
    tx = _optimizer(optimizer)
    updates, weights_state = tx.update(gradient, weights_state, state.params, frozen=frozen)
    params = optax.apply_updates(state.params, updates)
    if move_centroids:
        rate = config.retrain.centroid_rate * learning_rate
        if straight_through:
            members = jax.tree.map(lambda x, table: x.size / table.size, params, trained)
            trained, centroids_state = _step_of_centroids(
                trained, own, members, centroids_state, rate
            )
            quant = quant._replace(codebooks=trained)
        else:
            params, quant, centroids_state = _move_centroids(
                params, quant, gradient, centroids_state, rate
            )
    state = TrainState(params, batch_stats, (weights_state, centroids_state))
    return state, quant, {"loss": loss, "correct": correct}


def _move_centroids(
    params: Any, quant: jq.QuantState, gradient: Any, opt_state: Any, rate: jax.Array
) -> tuple[Any, jq.QuantState, Any]:
    """Take a step on the frozen centroids, and put their weights on them."""
    own = jq.centroid_gradients(gradient, params, quant)
    members = jq.centroid_gradients(jax.tree.map(jnp.ones_like, params), params, quant)
    codebooks, opt_state = _step_of_centroids(quant.codebooks, own, members, opt_state, rate)
    return *jq.set_centroids(params, quant, codebooks), opt_state


def _step_of_centroids(
    codebooks: Any, gradient: Any, members: Any, opt_state: Any, rate: jax.Array
) -> tuple[Any, Any]:
    """Take a step of SGD, gradients scaled as in LSQ: by the root of the number of members."""
    scaled = jax.tree.map(
        lambda total, count: total * jax.lax.rsqrt(jnp.maximum(count, 1.0)), gradient, members
    )
    opt_state = optax.tree.set(opt_state, learning_rate=rate)
    updates, opt_state = _centroid_optimizer().update(scaled, opt_state, codebooks)
    return optax.apply_updates(codebooks, updates), opt_state


def _train_steps(
    step: Callable[..., tuple[TrainState, Any, dict[str, jax.Array]]],
    layout: Layout,
    state: TrainState,
    quant: Any,
    teacher: Any,
    batches: Images,
    first_step: jax.Array,
    key: jax.Array,
    learning_rates: jax.Array,
    temperatures: jax.Array | None = None,
    *,
    distill: bool,
    move_centroids: bool,
    optimizer: str | Callable[..., Any] = "",
) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    """Run a step for each learning rate [steps], on batches [steps, batch, ...].

    Temperatures [steps] are those of a straight-through stage; None freezes instead.

    `quant` is a QuantState, or () if nothing is to be frozen; only its codebooks may change.
    Returns the new state, the new `quant`, and the sums of loss and correct answers.
    """
    teacher = teacher if distill else None
    key = jax.random.wrap_key_data(key)

    def one(carry: tuple[TrainState, Any], inputs: tuple[Images, *tuple[Any, ...]]):
        batch, number, learning_rate, temperature = inputs
        state, quant, metrics = step(
            *carry,
            teacher,
            batch,
            jax.random.fold_in(key, number),
            learning_rate,
            temperature,
            move_centroids=move_centroids,
            optimizer=optimizer,
        )
        return layout.settle((state, quant)), metrics

    numbers = first_step + jnp.arange(len(learning_rates))
    steps = (batches, numbers, learning_rates, temperatures)
    if len(learning_rates) == 1:
        carry, metrics = one((state, quant), jax.tree.map(lambda x: x[0], steps))
    else:
        carry, metrics = jax.lax.scan(one, (state, quant), steps)
    return *carry, layout.whole(jax.tree.map(jnp.sum, metrics))


def epoch_rows(key: jax.Array, size: int, batch_size: int) -> jax.Array:
    """Return a random order of all examples, [steps, batch_size]; the remainder sits out."""
    steps = max(1, size // batch_size)
    return jax.random.permutation(key, size)[: steps * batch_size].reshape(steps, -1)


def epoch_order(key: jax.Array, size: int, batch_size: int) -> np.ndarray:
    """Return `epoch_rows` on the host."""
    return np.asarray(_epoch_rows(key, size, batch_size))


_epoch_rows = jax.jit(epoch_rows, static_argnums=(1, 2))


def feed(
    layout: Layout,
    split: Images | Encoded,
    parts: Sequence[np.ndarray],
    *,
    key: np.ndarray | None = None,
    first: int = 0,
) -> Generator[Images, None, None]:
    """Give rows of a split on the devices, [..., batch, ...] for each of the rows [..., batch].

    Those on disk are decoded ahead, and cropped at random by the `key` and each row's position,
    counted from `first`; without a key they are the images' centres. Images in memory come as they
    are: the compiled step augments them.
    """
    if isinstance(split, Images):
        yield from (layout.feed(split, rows) for rows in parts)
        return
    starts = first + np.cumsum([0, *(rows.size for rows in parts)])
    batch_size, axis = parts[0].shape[-1], parts[0].ndim - 1
    columns = layout.columns(batch_size)
    own = [
        (rows[..., columns], (start + np.arange(rows.size).reshape(rows.shape))[..., columns])
        for rows, start in zip(parts, starts, strict=False)
    ]
    with contextlib.closing(split.read(own, key)) as batches:
        for batch in batches:
            yield layout.join(Images(*batch), batch_size, axis)


def _quantize(
    layout: Layout, plan: jq.Plan, params: Any, quant: jq.QuantState, guides: Any, key: Any
) -> tuple[Any, jq.QuantState, jq.RoundInfo]:
    key = jax.random.wrap_key_data(key)
    params, quant, info = jq.quantize_round(plan, params, quant, **guides, key=key)
    return *layout.settle((params, quant)), layout.whole(info)


def _settle(
    layout: Layout, plan: jq.Plan | None, params: Any, quant: jq.QuantState
) -> tuple[Any, jq.QuantState]:
    assert plan is not None
    return layout.settle(jq.settle(plan, params, quant))


# Measuring ---------------------------------------------------------------------------------------


def _count_correct(
    task: Task,
    layout: Layout,
    variables: Any,
    batch: Images,
    known: jax.Array,
    *,
    mirrored: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return correct answers and summed losses of a batch, of those of its examples that are known.

    With `mirrored` by the mean over an image and its mirror image.
    """

    def answer(variables: Any, inputs: jax.Array) -> Answers:
        if mirrored:
            assert task.answer_mirrored is not None
            return task.answer_mirrored(variables, inputs)
        return task.answer(variables, inputs, None)[0]

    # Kernels may be packed.
    answers: Any = jq.packed(answer)(variables, task.prepare(batch.images, None))
    losses, correct = (of(answers, batch.labels) for of in (task.losses, task.correct))
    sums = (jnp.sum(jnp.where(known, x, jnp.zeros_like(x))) for x in (correct, losses))
    return layout.whole(tuple(sums))


def fill_up(data: Images, batch_size: int) -> tuple[Images, np.ndarray]:
    """Return a split with zeros in the rest of its last batch, and which examples are known."""
    size, missing = data.size, -data.size % batch_size
    filled = (np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for x in data)
    return Images(*filled), np.arange(size + missing) < size


def _evaluate(
    batch_size: int,
    layout: Layout,
    count_correct: Callable[..., tuple[jax.Array, jax.Array]],
    params: Any,
    batch_stats: Any,
    data: Images | Encoded,
    *,
    mirrored: bool = False,
) -> dict[str, float]:
    """Return accuracy (share) and mean loss on a split."""
    variables, size = {"params": params, "batch_stats": batch_stats}, data.size
    rows = np.arange(size + -size % batch_size).reshape(-1, batch_size)
    # On disk, rows past the end already are images.
    filled = fill_up(data, batch_size)[0] if isinstance(data, Images) else data
    batches = feed(layout, filled, list(rows))
    known = (layout.feed(np.arange(rows.size) < size, own) for own in rows)
    sums = [
        count_correct(variables, *both, mirrored=mirrored)
        for both in zip(batches, known, strict=True)
    ]
    correct, loss = (sum(float(x) for x in column) for column in zip(*sums, strict=True))
    return {"accuracy": correct / size, "loss": loss / size}


def _mean_over_batches(
    config: Config,
    layout: Layout,
    function: Callable[..., Any],
    batches: int,
    params: Any,
    batch_stats: Any,
    data: Images | Encoded,
    key: jax.Array,
) -> Any:
    """Return the mean of a function's trees over random batches of training images."""
    order = epoch_order(key, data.size, min(config.batch_size, data.size))
    parts = [order[i % len(order)] for i in range(batches)]
    variables = {"params": params, "batch_stats": batch_stats}
    total = None
    for i, batch in enumerate(feed(layout, data, parts, key=key_data(key))):
        row = function(variables, batch, key_data(jax.random.fold_in(key, i)))
        total = row if total is None else jax.tree.map(jnp.add, total, row)
    return jax.tree.map(lambda x: x / batches, total)


def _batch_statistics(
    task: Task, layout: Layout, variables: Any, batch: Images, key: jax.Array
) -> Any:
    """Return the statistics of a batch alone, of which training keeps moving averages."""
    key = jax.random.wrap_key_data(key)
    inputs, old = task.prepare(batch.images, key), variables["batch_stats"]

    def renewed(old: Any) -> Any:
        return task.answer({**variables, "batch_stats": old}, inputs, key)[1]

    # An average is decay * old + (1 - decay) * own, whoever takes it: its derivative is the decay.
    zeros, ones = (jax.tree.map(like, old) for like in (jnp.zeros_like, jnp.ones_like))
    new, decay = jax.jvp(renewed, (zeros,), (ones,))
    own = jax.tree.map(lambda n, d, x: jnp.where(d < 1, n / (1 - d), x), new, decay, old)
    return layout.settle(own)


def recalibrate(
    config: Config,
    average: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    data: Images | Encoded,
    key: jax.Array,
) -> Any:
    """Return batch-norm statistics averaged over batches of training images; weights stay.

    `average` is `_mean_over_batches` of the batches' statistics, here or in one program.
    """
    batches = config.quantize.recalibrate_batches
    if not batches or not jax.tree.leaves(batch_stats):
        return batch_stats
    return average(batches, params, batch_stats, data, key)


def _squared_gradient(
    task: Task, layout: Layout, variables: Any, batch: Images, key: jax.Array
) -> Any:
    inputs = task.prepare(batch.images, jax.random.wrap_key_data(key))

    def loss(params: Any) -> jax.Array:
        whole = layout.whole({**variables, "params": params})
        return task.losses(task.answer(whole, inputs, None)[0], batch.labels).mean()

    return layout.settle(jax.tree.map(jnp.square, jax.grad(loss)(variables["params"])))


def _input_moments(
    task: Task,
    layout: Layout,
    paths: Sequence[str],
    variables: Any,
    batch: Images,
    key: jax.Array,
) -> dict[str, jax.Array]:
    inputs = task.prepare(batch.images, jax.random.wrap_key_data(key))
    rule = jq.LayerRule("params/(" + "|".join(map(re.escape, paths)) + ")")

    def logits(variables: Any, inputs: jax.Array) -> Any:
        return task.answer(variables, inputs, None)[0].logits

    found = jq.calibrate(logits, layout.whole(variables), [inputs], rules=[rule], sensitivity=False)
    return layout.settle({path.removeprefix("params/"): x for path, x in found.moments.items()})


def guides(
    config: Config,
    gradients: Callable[..., Any],
    inputs: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    data: Images | Encoded,
    key: jax.Array,
) -> dict[str, Any]:
    """Return what decides a round besides the weights: means over batches, for `_quantize`.

    `sensitivity` is the mean of squared gradients: those of a batch's mean loss, the diagonal
    Fisher information up to a factor that all weights share, as long as gradients of different
    examples are uncorrelated. `moments` are those of layers' inputs. Either is None if the plan
    does not want it. `gradients` and `inputs` are `_mean_over_batches` of these, here or in one
    program.
    """
    settings = config.quantize
    wanted = {
        "sensitivity": (gradients, settings.sensitivity_batches * (settings.sensitivity != "none")),
        "moments": (inputs, settings.moment_batches),
    }
    return {
        name: average(batches, params, batch_stats, data, key) if batches else None
        for name, (average, batches) in wanted.items()
    }
