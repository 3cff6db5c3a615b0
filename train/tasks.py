"""What is learned, and by what: the seam between a run and networks and data of any make."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.data import Dataset
from train.networks import Answers, Network


class Task(NamedTuple):
    """What a run wants to know of a network on a dataset; all of it may be compiled.

    Variables are {"params": ..., "batch_stats": ...}; inputs are what `prepare` makes of a batch.
    """

    init: Callable[[jax.Array], Any]  # key -> variables, untrained
    prepare: Callable[[Any, jax.Array | None], jax.Array]  # batch, key of a step or None -> inputs
    # variables, inputs, key of a training step or None -> answers, new batch_stats
    answer: Callable[[Any, jax.Array, jax.Array | None], tuple[Answers, Any]]
    # variables, inputs -> answers by the mean over an input and its mirror image
    answer_mirrored: Callable[[Any, jax.Array], Answers]
    losses: Callable[[Answers, Any], jax.Array]  # answers, targets -> float32 [N]
    correct: Callable[[Answers, Any], jax.Array]  # answers, targets -> bool [N]
    network: Network


def classify(network: Network, dataset: Dataset) -> Task:
    """Return the task to name the classes of images.

    The loss is the cross-entropy; images are cropped at random out of a black frame and mirrored,
    as the dataset says, and normalized.
    """
    image = (1, *dataset.train.image_shape)
    return Task(
        init=lambda key: network.init(key, jnp.zeros(image)),
        prepare=lambda images, key: (
            normalize(images, dataset) if key is None else augment(key, images, dataset=dataset)
        ),
        answer=network.apply,
        answer_mirrored=lambda variables, images: _mirrored(network, variables, images),
        losses=lambda answers, labels: optax.softmax_cross_entropy_with_integer_labels(
            answers.logits, labels
        ),
        correct=lambda answers, labels: jnp.argmax(answers.logits, axis=-1) == labels,
        network=network,
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
