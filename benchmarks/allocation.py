r"""Mixed bits by `jq.allocate` beside one number of centroids for all layers, at the same bytes.

    python -m benchmarks.allocation resnet20.npz --model resnet20 --data-dir ~/tensorflow_datasets

A network of CIFAR-10, from a state_dict as `train.pretrained` reads it, is quantized in one round,
without training, calibrated on the first images of the training set. Every layer has a codebook and
a scale for each output. A row of k has that many centroids everywhere, the one below it as many
bytes at most, spent where `allocate` wants them. Bits are those of entropy-coded codes, codebooks
and scales. The rest is measured on all test images: the divergence from the float network's
predictions in nats, cross-entropy and accuracy.
"""

import argparse
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from benchmarks import common
from train import data, models, pretrained

KS = (2, 3, 4, 6, 8, 12, 16)
_BATCH, _MEASURED = 128, 4


class Network(NamedTuple):
    """A float network, and what a round needs to know of it."""

    function: Callable[[Any, jax.Array], jax.Array]  # of parameters and pixels, logits
    params: Any
    batches: list[jax.Array]  # to calibrate on
    calibration: jq.Calibration


def load(path: Path, model: str, dataset: data.Dataset, calibrating: int) -> Network:
    """Return the network of a file, calibrated on so many images."""
    module = models.build(model, num_classes=dataset.num_classes)
    images = jnp.zeros((1, *dataset.train.image_shape))
    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images)
    variables = pretrained.load(path, shapes)

    def function(params: Any, pixels: jax.Array) -> jax.Array:
        x = pixels.astype(jnp.float32) / 255
        x = (x - jnp.array(dataset.mean)) / jnp.array(dataset.std)
        return cast(jax.Array, module.apply({**variables, "params": params}, x, train=False))

    params = variables["params"]
    batches = list(_cut(cast(data.Images, dataset.train).images[:calibrating]))
    seen = jq.calibrate(function, params, batches, outputs="categorical", guided=True)
    return Network(function, params, batches, seen)


def _cut(images: np.ndarray) -> Iterator[jax.Array]:
    for start in range(0, len(images), _BATCH):
        yield jnp.asarray(images[start : start + _BATCH])


def rules(params: Any, k: int) -> list[jq.LayerRule]:
    """Return a rule of k centroids, one codebook and a scale an output, for each kernel."""
    return [
        jq.LayerRule(
            re.escape(layer.path), k=k, block=(*[-1] * (len(layer.shape) - 1), 1), scaled=True
        )
        for layer in jq.select(params, k=k).selected
    ]


def quantized(network: Network, rules: Sequence[jq.LayerRule]) -> Any:
    """Return parameters after one round."""
    plan = jq.slq(network.params, rounds=(1,), rules=rules)
    state = jq.init(plan, network.params)
    return jq.quantize_round(plan, network.params, state, calibration=network.calibration)[0]


def measured(network: Network, params: Any, test: data.Images) -> tuple[float, float, float]:
    """Return the divergence, the cross-entropy and the accuracy on images that are held out."""
    run = jax.jit(network.function)
    sums = np.zeros(3)
    for start, pixels in zip(range(0, test.size, _BATCH), _cut(test.images), strict=True):
        labels = jnp.asarray(test.labels[start : start + _BATCH])
        theirs, ours = (jax.nn.log_softmax(run(x, pixels)) for x in (network.params, params))
        sums += [
            float(jnp.sum(jnp.exp(theirs) * (theirs - ours))),
            -float(jnp.sum(jnp.take_along_axis(ours, labels[:, None], axis=1))),
            float(jnp.sum(jnp.argmax(ours, axis=1) == labels)),
        ]
    divergence, entropy, right = sums / test.size
    return divergence, entropy, right


def rows(network: Network, test: data.Images, ks: Sequence[int]) -> Iterator[list[str]]:
    """Yield a row for each number of centroids, and one of the same bytes."""
    yield ["float32", "32", *_numbers(measured(network, network.params, test))]
    found = jq.allocate(
        network.params,
        bits=32,
        choices=[rule for k in KS for rule in rules(network.params, k)],
        calibration=network.calibration,
        function=network.function,
        batches=network.batches[:_MEASURED],
        outputs="categorical",
    )
    for k in ks:
        equal = [choice for choice in found.table if choice.rule.k == k]
        bits = 8 * sum(choice.bytes for choice in equal) / found.size
        mixed = found.within(bits=bits)
        yield _row(f"k = {k}", bits, network, rules(network.params, k), test)
        yield _row("allocated", mixed.bits, network, mixed, test)


def _row(
    name: str, bits: float, network: Network, rules: Sequence[jq.LayerRule], test: data.Images
) -> list[str]:
    return [name, f"{bits:.3f}", *_numbers(measured(network, quantized(network, rules), test))]


def _numbers(measured: tuple[float, float, float]) -> list[str]:
    divergence, entropy, accuracy = measured
    return [f"{divergence:.4f}", f"{entropy:.4f}", f"{100 * accuracy:.2f}"]


def main() -> None:
    """Print the table, each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path, help="a state_dict, .npz or .safetensors")
    parser.add_argument("--model", default="resnet20", help=f"one of {', '.join(models.NAMES)}")
    parser.add_argument("--data-dir", default="~/tensorflow_datasets")
    parser.add_argument("--allow-unofficial", action="store_true", help="archives placed by hand")
    parser.add_argument("--calibrating", type=int, default=1024, help="images")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8], choices=KS)
    options = parser.parse_args()
    dataset = data.load(
        "cifar10", data_dir=options.data_dir, allow_unofficial=options.allow_unofficial
    )
    print(f"{common.machine()}\n")
    network = load(options.weights, options.model, dataset, options.calibrating)
    header = ["weights", "bits there", "divergence", "cross-entropy", "accuracy, %"]
    print(common.markdown(header, []), flush=True)
    for row in rows(network, cast(data.Images, dataset.test), options.k):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
