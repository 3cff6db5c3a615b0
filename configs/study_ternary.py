r"""Which choices matter for a ternary ResNet-20? A row for each, at an equal, short budget.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config configs/study_ternary.py \
        --workdir runs/study_ternary --config.init=resnet20.npz

Every row differs from `base` in what its name says: MLQ in six rounds of 100 steps, on a quarter of
the training images; with other numbers of rounds, as many steps in all (but `epochs_2` and
`groups_6`, twice as many). About six minutes a row on one CPU core (AMD EPYC, AVX-512); run the
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
        quantize=Quantize(method="mlq", bits=2, groups=3, recalibrate_batches=50),
        retrain=Fit(epochs=(1,), learning_rate=0.02, distill_weight=0.7),
        plots=Plots(draw=False),
        tensorboard=False,
    )
    soft_t4 = vary(base, retrain=dict(distill_weight=1.0, temperature=4.0))
    soft_t16 = vary(base, retrain=dict(distill_weight=1.0, temperature=16.0))
    features_100 = vary(soft_t16, retrain=dict(feature_weight=100.0))
    zero = vary(features_100, quantize=dict(zero=True))
    linear_first = dict(rules=(LayerRule("linear/kernel", depth=-1), LayerRule(".*kernel")))
    channels = dict(rules=(LayerRule(".*kernel", axis=-1),))
    straight = vary(
        zero,
        quantize=dict(method="slq", rounds=(3,)),
        retrain=dict(epochs=(6,), straight_through=True, centroid_rate=1.0),
    )
    softly = vary(straight, retrain=dict(warmest=0.5))
    return {
        "base": base,
        "seed_1": replace(base, seed=1),
        "seed_2": replace(base, seed=2),
        "magnitude": vary(base, quantize=dict(partition="magnitude")),
        "random": vary(base, quantize=dict(partition="random")),
        "layer_by_layer": vary(base, quantize=dict(order="layer_by_layer")),
        "network": vary(base, quantize=dict(order="network")),
        "reverse": vary(base, quantize=dict(reverse=True)),
        "boundaries_together": vary(
            base, quantize=dict(order="boundaries_together"), retrain=dict(epochs=(3, 1, 1, 1))
        ),
        "groups_1": vary(base, quantize=dict(groups=1), retrain=dict(epochs=(3,))),
        "slq": vary(base, quantize=dict(method="slq", rounds=(1, 2, 3)), retrain=dict(epochs=(2,))),
        "fisher": vary(base, quantize=dict(sensitivity="fisher")),
        "zero": vary(base, quantize=dict(zero=True)),
        "no_recalibration": vary(base, quantize=dict(recalibrate_batches=0)),
        "labels_only": vary(base, retrain=dict(distill_weight=0.0)),
        "centroids_1": vary(base, retrain=dict(centroid_rate=1.0)),
        "centroids_0.1": vary(base, retrain=dict(centroid_rate=0.1)),
        "rate_0.005": vary(base, retrain=dict(learning_rate=0.005)),
        "rate_0.05": vary(base, retrain=dict(learning_rate=0.05)),
        "soft": vary(base, retrain=dict(distill_weight=1.0)),
        "soft_t4": soft_t4,
        "soft_t4_seed_1": replace(soft_t4, seed=1),
        "soft_t8": vary(base, retrain=dict(distill_weight=1.0, temperature=8.0)),
        "soft_t16": soft_t16,
        "soft_t8_rate_0.05": vary(
            base, retrain=dict(distill_weight=1.0, temperature=8.0, learning_rate=0.05)
        ),
        "features_10": vary(soft_t16, retrain=dict(feature_weight=10.0)),
        "features_100": features_100,
        "features_100_zero": zero,
        "linear_first": vary(zero, quantize=linear_first),
        "moments": vary(zero, quantize=dict(moment_batches=8)),
        "linear_first_moments": vary(zero, quantize=dict(moment_batches=8, **linear_first)),
        "straight_through": straight,
        "softly": softly,
        "softly_channels": vary(softly, quantize=channels),
        "softly_then_hard": vary(softly, retrain=dict(coolest=0.02, cooling=0.7)),
        "softly_to_the_end": vary(softly, retrain=dict(coolest=0.0005, cooling=1.0)),
        "decay_0": vary(base, retrain=dict(weight_decay=0.0)),
        "decay_0.0005": vary(base, retrain=dict(weight_decay=5e-4)),
        "channels": vary(base, quantize=channels),
        "features_100_channels": vary(features_100, quantize=channels),
        "epochs_2": vary(base, retrain=dict(epochs=(2,))),
        "groups_6": vary(base, quantize=dict(groups=6)),
    }
