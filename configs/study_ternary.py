r"""Which choices matter for a ternary ResNet-20? A row for each, at an equal, short budget.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train --config configs/study_ternary.py \
        --workdir runs/study_ternary --config.init=resnet20.npz

Every row differs from `base` in what its name says: MLQ in six rounds of 100 steps, on a quarter of
the training images; with other numbers of rounds, as many steps in all (but `epochs_2` and
`groups_6`, twice as many). About six minutes a row on one CPU core (AMD EPYC, AVX-512); run the
command once for each core. What came out: docs/results.md.
"""

from dataclasses import replace

from train.config import Config, Data, Fit, Quantize


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    base = Config(
        data=Data(name="cifar10", train_limit=12_800),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="mlq", bits=2, groups=3, recalibrate_batches=50),
        retrain=Fit(epochs=(1,), learning_rate=0.02, distill_weight=0.7),
        plots=False,
        tensorboard=False,
    )
    slq = replace(base.quantize, method="slq", rounds=(1, 2, 3))

    def retrain(**changes) -> Config:
        return replace(base, retrain=replace(base.retrain, **changes))

    def quantize(**changes) -> Config:
        return replace(base, quantize=replace(base.quantize, **changes))

    return {
        "base": base,
        "seed_1": replace(base, seed=1),
        "seed_2": replace(base, seed=2),
        "magnitude": quantize(partition="magnitude"),
        "random": quantize(partition="random"),
        "layer_by_layer": quantize(order="layer_by_layer"),
        "network": quantize(order="network"),
        "reverse": quantize(reverse=True),
        "boundaries_together": replace(
            quantize(order="boundaries_together"),
            retrain=replace(base.retrain, epochs=(3, 1, 1, 1)),
        ),
        "groups_1": replace(quantize(groups=1), retrain=replace(base.retrain, epochs=(3,))),
        "slq": replace(base, quantize=slq, retrain=replace(base.retrain, epochs=(2,))),
        "fisher": quantize(sensitivity="fisher"),
        "zero": quantize(zero=True),
        "equalize": quantize(equalize=True),
        "no_recalibration": quantize(recalibrate_batches=0),
        "labels_only": retrain(distill_weight=0.0),
        "centroids_1": retrain(centroid_rate=1.0),
        "centroids_0.1": retrain(centroid_rate=0.1),
        "rate_0.005": retrain(learning_rate=0.005),
        "rate_0.05": retrain(learning_rate=0.05),
        "epochs_2": retrain(epochs=(2,)),
        "groups_6": quantize(groups=6),
    }
