"""What a step of training costs, by what the float network teaches in it.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.distillation

Whole steps of the program's own, augmentation and optimizer included, on 128 random images of
32x32, in turns; times are the least of all turns.
"""

import argparse
from functools import partial

import jax
import numpy as np

from benchmarks import common
from train import engine, layout, models, networks, tasks
from train.config import Config, Fit
from train.data import Dataset, Images

WAYS = {
    "labels only": Fit(),
    "logits": Fit(distill_weight=1.0),
    "logits and features": Fit(distill_weight=1.0, feature_weight=100.0),
    "the same, as the mean over mirror images": Fit(
        distill_weight=1.0, feature_weight=100.0, mirrored_teacher=True
    ),
}


def rows(model: str, batch: int, turns: int) -> list[list[object]]:
    """Return a row for each way."""
    rng = np.random.default_rng(0)
    shape = (batch, 32, 32, 3)
    split = Images(
        rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, 10, batch).astype(np.int32)
    )
    dataset = Dataset("random", split, split, 10, (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)
    module = models.build(model, num_classes=10)
    task = tasks.classify(networks.linen(module), dataset)
    images = np.zeros(shape, np.float32)
    variables = jax.jit(partial(module.init, train=False))(jax.random.key(0), images)

    def steps(stage: Fit):
        config = Config(model=model, batch_size=batch, retrain=stage)
        functions = engine.build(config, dataset, task, layout.make(config))
        state = functions.start(variables, (), np.float32(0.9), np.float32(1e-4))
        batches = Images(split.images[None], split.labels[None])
        key = engine.key_data(jax.random.key(1))

        def step() -> jax.Array:
            nonlocal state
            state, _, metrics = functions.train(
                state,
                (),
                variables,
                batches,
                np.int32(0),
                key,
                np.full(1, 1e-3, np.float32),
                distill=stage.has_teacher,
                move_centroids=False,
            )
            return metrics["loss"]

        return step

    times = common.least({name: steps(stage) for name, stage in WAYS.items()}, turns)
    first = times["labels only"]
    return [
        [name, f"{1e3 * t:.0f}", f"{batch / t:.0f}", f"{t / first:.2f}x"]
        for name, t in times.items()
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    print(common.machine())
    table = rows(options.model, options.batch, options.turns)
    print(common.markdown(["taught", "ms a step", "images a second", "time"], table))


if __name__ == "__main__":
    main()
