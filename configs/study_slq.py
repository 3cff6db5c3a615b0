r"""Which choices matter for SLQ at 3 bits, five centroids? A row for each, at an equal budget.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config configs/study_slq.py \
        --workdir runs/study_slq --config.init=resnet20.npz

Every row differs from `base` in what its name says: SLQ in four rounds of 100 steps, on a quarter
of the training images. About five minutes a row on one CPU core (AMD EPYC, AVX-512); run the
command once for each core. What came out: docs/results.md.
"""

from dataclasses import replace

from jaxquant import LayerRule
from train.config import Config, Data, Fit, Plots, Quantize, vary


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    base = Config(
        data=Data(name="cifar10", train_limit=12_800),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="slq", bits=3, rounds=(2, 3, 4, 5), recalibrate_batches=50),
        retrain=Fit(epochs=(1,), learning_rate=0.01, distill_weight=0.7),
        plots=Plots(draw=False),
        tensorboard=False,
    )
    features_100 = vary(
        base, retrain=dict(distill_weight=1.0, temperature=16.0, feature_weight=100.0)
    )
    moments = vary(features_100, quantize=dict(moment_batches=8))
    return {
        "base": base,
        "seed_1": replace(base, seed=1),
        "seed_2": replace(base, seed=2),
        "magnitude": vary(base, quantize=dict(partition="magnitude")),
        "random": vary(base, quantize=dict(partition="random")),
        "authors": vary(
            base, quantize=dict(init="power_of_two", iterations=10, zero=True, partition="index")
        ),
        "authors_start": vary(base, quantize=dict(init="power_of_two", iterations=10, zero=True)),
        "all_at_once": vary(base, quantize=dict(rounds=(5,)), retrain=dict(epochs=(4,))),
        "fisher": vary(base, quantize=dict(sensitivity="fisher")),
        "soft_t16": vary(base, retrain=dict(distill_weight=1.0, temperature=16.0)),
        "features_100": features_100,
        "mirrored": vary(features_100, retrain=dict(mirrored_teacher=True)),
        "moments": moments,
        "moments_groups": vary(
            moments,
            quantize=dict(
                method="mlq",
                groups=3,
                order="boundaries_together",
                rules=(LayerRule("linear/kernel", depth=-1), LayerRule(".*kernel")),
            ),
        ),
        "rate_0.002": vary(base, retrain=dict(learning_rate=0.002)),
        "rate_0.05": vary(base, retrain=dict(learning_rate=0.05)),
    }
