"""What is learned, and by what: the seam between a run and networks and data of any make."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.data import Dataset, Images
from train.named import call, guarded, name_of, resolve
from train.networks import Answers, Network, check_variables


class Task(NamedTuple):
    """What a run wants to know of a network on a dataset; all of it may be compiled.

    Variables are {"params": ..., "batch_stats": ...}; inputs are what `prepare` makes of a batch;
    targets are the labels of a batch, as the dataset has them.
    """

    init: Callable[[jax.Array], Any]  # key -> variables, untrained
    prepare: Callable[[Any, jax.Array | None], jax.Array]  # batch, key of a step or None -> inputs
    # variables, inputs, key of a training step or None -> answers, new batch_stats
    answer: Callable[[Any, jax.Array, jax.Array | None], tuple[Answers, Any]]
    losses: Callable[[Answers, Any], jax.Array]  # answers, targets -> float32 [N]
    # answers, targets -> bool [N], or float32 [N] in [0, 1]: how much of each is right
    correct: Callable[[Answers, Any], jax.Array]
    network: Network
    # answers, the teacher's answers, temperature -> float32 [N, ...]; None: no soft targets
    imitate: Callable[[Answers, Answers, float], jax.Array] | None = None
    # variables, inputs -> answers by the mean over an input and its mirror image; None: no mirror
    answer_mirrored: Callable[[Any, jax.Array], Answers] | None = None


def build(given: str | Callable[..., Any], network: Network, dataset: Dataset) -> Task:
    """Return the task that a config's `task` names or gives, of images' classes if that is empty.

    Args:
      given: a function that returns a Task, or "package.module:function" of one. Of `network` and
        `dataset` it is given those that it takes by name.
      network: of the config's model.
      dataset: of the config.

    Raises:
      ValueError: for what gives no task, or one that cannot be learned.
    """
    if not given:
        return classify(network, dataset)
    task = call("task", resolve("task", given), network=network, dataset=dataset)
    if not isinstance(task, Task):
        raise ValueError(
            f"task: expected {name_of(given)} to return a train.tasks.Task, got "
            f"{name_of(type(task))}"
        )
    _check(task, name_of(given), dataset)
    return task


def learn(
    network: Network,
    dataset: Dataset,
    *,
    losses: Callable[[Answers, Any], jax.Array],
    correct: Callable[[Answers, Any], jax.Array],
    prepare: Callable[[Any, jax.Array | None], jax.Array] | None = None,
    imitate: Callable[[Answers, Answers, float], jax.Array] | None = None,
) -> Task:
    """Return the task of a network that a loss and a measure define.

    Args:
      network: as a task's function is given it.
      dataset: likewise.
      losses: answers and targets [N, ...] to float32 [N], of which training takes the mean.
      correct: likewise to bool [N], or to how much of each is right, in [0, 1].
      prepare: a batch of the dataset, and a key in training steps or else None, to the network's
        inputs; without it they are the batch.
      imitate: answers, the float network's answers and `temperature` to float32 [N, ...], for
        `distill_weight`; without it there is no such thing.
    """
    if prepare is None:
        prepare = _as_it_is
    given = jax.eval_shape(lambda batch: prepare(batch, None), _batch(dataset, 1).images)
    return Task(
        init=lambda key: network.init(key, jnp.zeros(given.shape, given.dtype)),
        prepare=prepare,
        answer=network.apply,
        losses=losses,
        correct=correct,
        network=network,
        imitate=imitate,
    )


def classify(network: Network, dataset: Dataset) -> Task:
    """Return the task to name the classes of images.

    The loss is the cross-entropy; images are cropped at random out of a black frame and mirrored,
    as the dataset says, and normalized.
    """
    task = learn(
        network,
        dataset,
        prepare=lambda images, key: (
            normalize(images, dataset) if key is None else augment(key, images, dataset=dataset)
        ),
        losses=lambda answers, labels: optax.softmax_cross_entropy_with_integer_labels(
            answers.logits, labels
        ),
        correct=lambda answers, labels: jnp.argmax(answers.logits, axis=-1) == labels,
        imitate=soft_targets,
    )
    return task._replace(
        answer_mirrored=lambda variables, images: _mirrored(network, variables, images)
    )


def soft_targets(ours: Answers, teacher: Answers, temperature: float) -> jax.Array:
    """Return `T**2 KL(teacher || ours)` at a temperature T (Hinton et al., 2015), [N, ...]."""
    return temperature**2 * optax.losses.kl_divergence(
        jax.nn.log_softmax(ours.logits / temperature),
        jax.nn.softmax(teacher.logits / temperature),
    )


def _as_it_is(batch: Any, key: jax.Array | None) -> Any:
    del key
    return batch


def inputs(task: Task, dataset: Dataset) -> Any:
    """Return the shape and dtype of what `prepare` makes of one example."""
    return jax.eval_shape(lambda batch: task.prepare(batch, None), _batch(dataset, 1).images)


def _batch(dataset: Dataset, size: int) -> Images:
    """Return the shapes and dtypes of a batch."""
    split = dataset.train
    if not isinstance(split, Images):
        images = jax.ShapeDtypeStruct((size, *split.image_shape), jnp.uint8)
        return Images(images, jax.ShapeDtypeStruct((size,), jnp.int32))
    return Images(*(jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in split))


def _check(task: Task, name: str, dataset: Dataset) -> None:
    """Raise a ValueError for a task that cannot be trained."""

    def shapes(what: str, function: Callable[..., Any], *args: Any) -> Any:
        return guarded("task", f"{name}: {what}", lambda: jax.eval_shape(function, *args))

    count, key = 2, jax.random.key(0)
    batch = _batch(dataset, count)
    variables = shapes("init", task.init, key)
    check_variables("task", name, variables)
    for of_step in (None, key):
        inputs = shapes("prepare", lambda x, k=of_step: task.prepare(x, k), batch.images)
        answers, stats = shapes(
            "answer", lambda v, x, k=of_step: task.answer(v, x, k), variables, inputs
        )
        if jax.tree.structure(stats) != jax.tree.structure(variables.get("batch_stats", {})):
            raise ValueError(f"task: {name}: expected answer to renew the batch_stats of init")
        if not isinstance(answers, Answers):
            raise ValueError(
                f"task: {name}: expected answer to give train.networks.Answers, got "
                f"{name_of(type(answers))}"
            )
        losses = shapes("losses", task.losses, answers, batch.labels)
        _expect_one_each(name, "losses", losses, count, jnp.floating)
        right = shapes("correct", task.correct, answers, batch.labels)
        _expect_one_each(name, "correct", right, count, jnp.floating, jnp.bool_)
        imitate = task.imitate
        if imitate is not None:
            shapes("imitate", lambda a, of=imitate: of(a, a, 1.0).mean(), answers)


def _expect_one_each(name: str, what: str, got: Any, count: int, *kinds: Any) -> None:
    one_each = isinstance(got, jax.ShapeDtypeStruct) and got.shape == (count,)
    if not one_each or not any(jnp.issubdtype(got.dtype, kind) for kind in kinds):
        wanted = " or ".join("bool" if kind is jnp.bool_ else "floating point" for kind in kinds)
        array = isinstance(got, jax.ShapeDtypeStruct)
        raise ValueError(
            f"task: {name}: expected {what} to be {wanted} [{count}] for {count} examples, got "
            + (f"{got.dtype}{list(got.shape)}" if array else type(got).__name__)
        )


def normalize(images: jax.Array, dataset: Dataset) -> jax.Array:
    """Return images as the network takes them: float32, bytes on [0, 1], channel by channel."""
    mean = jnp.array(dataset.mean, jnp.float32)
    std = jnp.array(dataset.std, jnp.float32)
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    return (images.astype(jnp.float32) / scale - mean) / std


def augment(key: jax.Array, images: jax.Array, *, dataset: Dataset) -> jax.Array:
    """Crop at random out of a black frame, mirror half of the images, normalize."""
    crop_key, flip_key = jax.random.split(key)
    if dataset.pad:
        pad, (_, height, width, channels) = dataset.pad, images.shape
        framed = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * pad + 1)

        def crop(image: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, channels))

        images = jax.vmap(crop)(framed, corners)
    if dataset.flip:
        flips = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
        images = jnp.where(flips, images[:, :, ::-1], images)
    return normalize(images, dataset)


def _mirrored(network: Network, variables: Any, images: jax.Array) -> Answers:
    """Return answers by the mean over images and their mirror images.

    Of the features only the last block's are a mean: what it finds at a place does not depend on
    which side that is, whereas earlier channels tell left edges from right ones.
    """
    answers, _ = network.apply(variables, images, None)
    mirrored, _ = network.apply(variables, images[:, :, ::-1], None)
    features = list(answers.features)
    if features:
        back = mirrored.features[-1]
        back = back[:, :, ::-1] if back.ndim == images.ndim else back  # vectors have no sides
        features[-1] = (features[-1] + back) / 2
    return Answers((answers.logits + mirrored.logits) / 2, features)
