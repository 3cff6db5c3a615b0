r"""Product quantization of layers: clustering, error correction, and scikit-learn beside.

    python -m benchmarks.products

Kernels of ImageNet networks with random normal weights, 128 words of four channels, as in
configs/imagenet.py. Clustering is a k-means++ start and 20 Lloyd passes in every subspace, compiled
before; a distance is one sub-vector against one word in one pass. scikit-learn's KMeans does as
much with the same start and number of passes on the first subspaces, and its time is scaled to all
of them. Correction is two sweeps on the sums of 512 random inputs, or 8 x 8 places of 8 images.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from benchmarks import common

SHAPES = ((3, 3, 64, 64), (3, 3, 256, 256), (1024, 1000), (4096, 1000), (4096, 4096))
WORDS, LENGTH, PASSES, SWEEPS = 128, 4, 20, 2
_COMPARED = 8  # subspaces that scikit-learn clusters


def measure(shape: tuple[int, ...]) -> list[str]:
    """Run one layer; return a row of the table."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal(shape, np.float32))
    *window, channels, features = shape
    places = (8, 8, 8) if window else (512,)
    inputs = jnp.asarray(np.maximum(rng.standard_normal((*places, channels), np.float32), 0))
    layout = ("NHWC", "HWIO", "NHWC")
    wanted = (
        jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=layout)
        if window
        else inputs @ kernel
    )

    run = jax.jit(jq.product.cluster, static_argnames=("words", "length", "iterations"))
    options = {"words": WORDS, "length": LENGTH, "iterations": PASSES, "key": jax.random.key(0)}
    array = run(kernel, **options)
    response = jax.jit(jq.product.observe, static_argnames="window")(
        inputs, wanted, window=tuple(window)
    )
    correct = jax.jit(jq.product.correct, static_argnames="sweeps")
    _, errors = correct(array, response, sweeps=SWEEPS)
    cluster_seconds = min(common.seconds(lambda: run(kernel, **options), 3))
    correct_seconds = min(common.seconds(lambda: correct(array, response, sweeps=SWEEPS), 3))
    vectors = np.asarray(kernel).reshape(-1, channels // LENGTH, LENGTH, features)
    vectors = vectors.transpose(1, 0, 3, 2).reshape(channels // LENGTH, -1, LENGTH)
    compared = vectors[:_COMPARED]
    other = common.scikit_learn(compared, WORDS, PASSES) * len(vectors) / len(compared)
    distances = vectors[..., 0].size * WORDS * (PASSES + 1)
    return [
        " x ".join(map(str, shape)),
        f"{cluster_seconds:.2f}",
        f"{cluster_seconds / distances * 1e9:.2f}",
        f"{other:.1f}",
        f"{other / cluster_seconds:.0f}",
        f"{correct_seconds:.2f}",
        f"{float(errors[0]):.1%} -> {float(errors[-1]):.1%}",
    ]


def main() -> None:
    """Print the table."""
    print(common.machine(), end="\n\n")
    header = [
        "kernel",
        "clustering, s",
        "ns a distance",
        "scikit-learn, s",
        "times slower",
        "correction, s",
        "response error",
    ]
    print(common.markdown(header, (measure(shape) for shape in SHAPES)))


if __name__ == "__main__":
    main()
