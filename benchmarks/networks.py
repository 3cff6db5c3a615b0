r"""A round on AlexNet, VGG-16, GoogLeNet and ResNet-18, and scikit-learn beside it.

    python -m benchmarks.networks

The trees have their real shapes and random He-normal weights, as clustering cares for shapes and
distributions only. A row for each network, in a process of its own: the seconds of the fastest of
the first three rounds of 5-bit SLQ, compiled before, in which every layer is clustered into 17
(optimal start), measured and partly frozen; the memory that a round takes beside the parameters and
its state; the peak of resident memory of the process, with interpreter and compiler; and the
seconds of scikit-learn's KMeans(17, n_init=1) on each layer's weights, one after the other, in the
same process.
"""

import argparse
import subprocess
import sys

import jax
import numpy as np

import jaxquant as jq
from benchmarks import common
from benchmarks.scale import time_rounds

NETWORKS = ("alexnet", "vgg16", "googlenet", "resnet18")


def measure(name: str) -> list[str]:
    """Run rounds on one network; return a row of the table."""
    params = _params(name)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    clustered = [np.asarray(x).reshape(-1, 1) for x in jax.tree.leaves(params) if x.ndim > 1]
    rounds = time_rounds(params, jq.slq(params))
    other = common.scikit_learn(clustered, 17)
    return [
        name,
        f"{size:,}",
        f"{len(clustered)}",
        f"{rounds.compiling:.1f}",
        f"{rounds.seconds:.2f}",
        f"{rounds.seconds / size * 1e9:.1f}",
        f"{rounds.temporary / 1e6:.0f}",
        f"{rounds.peak / 1e9:.2f}",
        f"{other:.1f}",
        f"{other / rounds.seconds:.0f}",
    ]


def _params(name: str) -> dict:
    from train import models

    module = models.build(name, num_classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        deviation = np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(deviation)
        return jax.numpy.asarray(values)

    return jax.tree.map(draw, shapes["params"])


def main() -> None:
    """Print the table, each row from a process of its own: the peak of memory is a process'."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, help="this one only")
    parser.add_argument("--row", action="store_true", help="print the row alone")
    options = parser.parse_args()
    if options.row:
        print("\t".join(measure(options.network)))
        return
    print(common.machine(), end="\n\n")
    rows = []
    for name in [options.network] if options.network else NETWORKS:
        command = [sys.executable, "-m", "benchmarks.networks", "--network", name, "--row"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(out.splitlines()[-1].split("\t"))
    header = [
        "network",
        "parameters",
        "layers",
        "compiling, s",
        "round, s",
        "ns a parameter",
        "a round takes, MB",
        "peak, GB",
        "scikit-learn, s",
        "times slower",
    ]
    print(common.markdown(header, rows))


if __name__ == "__main__":
    main()
