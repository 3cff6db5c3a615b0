"""What a stranger's module may hold: networks of both makes of Flax, arrays, an optimizer."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train import tasks
from train.networks import Answers


def arrays(size=60, *, side=8, seed=0, noise=60):
    """Return images of three classes that their brightness tells."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % 3
    images = rng.integers(0, noise, (size, side, side)) + 60 * labels[:, None, None]
    return {"images": images.astype(np.uint8), "labels": labels}


class Linen(nn.Module):
    """Its names do not sort by depth, and it takes no `train`."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="body")(x))
        return nn.Dense(self.num_classes, name="answer")(x.mean((1, 2)))


class Nnx(nnx.Module):
    """With batch normalization, dropout, features and a list."""

    def __init__(self, num_classes, image_shape, *, rngs):
        widths = (image_shape[-1], 8, 8)
        self.layers = nnx.List(
            nnx.Conv(n, m, (3, 3), strides=2, rngs=rngs) for n, m in itertools.pairwise(widths)
        )
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.answer = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
            self.sow(nnx.Intermediate, "features", x)
        return self.answer(self.dropout(self.norm(x)).mean((1, 2)))


class Counting(nn.Module):
    """It counts, which no checkpoint of ours holds."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        self.variable("counts", "calls", lambda: jnp.zeros(()))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class NoLogits(nn.Module):
    """It answers with one number too many."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes + 1)(x.mean((1, 2)))


class Wide(nn.Module):
    """It cannot be built without a width."""

    width: int
    num_classes: int

    def __call__(self, x):
        return x


class Failing(nnx.Module):
    """It fails."""

    def __init__(self, rngs):
        raise RuntimeError("no such luck")


def no_module():
    """Return what is no module."""
    return 3


def clipped(learning_rate, weight_decay):
    """Return an optimizer that looks at all gradients together."""
    return optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=0.9),
    )


CLASSES = 4  # of tokens


def sequences():
    """Return tokens, each labelled by the remainder of it and the one before."""
    tokens = np.random.default_rng(0).integers(0, 9, (30, 6))
    return {"inputs": tokens, "targets": (tokens + np.roll(tokens, 1, axis=1)) % CLASSES}


class Tagger(nn.Module):
    """Its names do not sort by depth."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(9, 8, name="tokens")(x)
        x = nn.relu(nn.Conv(16, (3,), name="neighbours")(x))
        return nn.Dense(CLASSES, name="answer")(x)


def tag(network, dataset, **changes):
    """Return the task to label each token of a sequence."""
    parts = {
        "losses": lambda answers, targets: (
            -jnp.take_along_axis(
                jax.nn.log_softmax(answers.logits), targets[..., None], axis=-1
            ).mean((1, 2))
        ),
        "correct": lambda answers, targets: (answers.logits.argmax(-1) == targets).mean(1),
        "imitate": tasks.soft_targets,
    }
    return tasks.learn(network, dataset, **{**parts, **changes})


def pure(network, dataset):
    """Return a task with a network of no library."""

    def answer(variables, inputs, key):
        hidden = jnp.tanh(jax.nn.one_hot(inputs, 9) @ variables["params"]["z_first"])
        return Answers(hidden @ variables["params"]["a_second"], [hidden]), {}

    def init(key):
        shapes = {"z_first": (9, 8), "a_second": (8, CLASSES)}
        return {"params": {n: jax.random.normal(key, shape) for n, shape in shapes.items()}}

    return tag(network, dataset)._replace(init=init, answer=answer)


def smoothed(network, dataset):
    """Return the task to name classes, by another loss."""
    return tasks.classify(network, dataset)._replace(
        losses=lambda answers, labels: jnp.square(
            answers.logits - jax.nn.one_hot(labels, dataset.num_classes)
        ).sum(-1)
    )


def regression():
    """Return inputs and targets that are no classes."""
    return {"inputs": np.ones((10, 3)), "targets": np.arange(10.0)}


NUMBER = 3
