r"""SLQ, 3 bits (five centroids), of a pretrained ResNet-20 on CIFAR-10; ten epochs in all.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train \
        --config configs/cifar10_resnet20_slq3.py --workdir runs/slq3 --config.init=resnet20.npz

Three seeds: from 91.73 % to 91.73, 91.73 and 91.86 %; seed 0 after the rounds 92.22, 92.01, 91.86,
91.73. 33 to 39 minutes a seed on two cores of an Intel Xeon, jax 0.10.2;
`--only '*_seed0'` runs one. The float network teaches by the mean of its answers to an image and
its mirror image, which is right more often than either: docs/results.md.
"""

from train.config import Config, Data, Fit, Quantize, seeds


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    config = Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="slq", bits=3, rounds=(2, 3, 4, 5), recalibrate_batches=50),
        retrain=Fit(
            epochs=(2, 2, 2, 4),
            learning_rate=0.02,
            distill_weight=1.0,
            temperature=16.0,
            feature_weight=100.0,
            mirrored_teacher=True,
        ),
    )
    return seeds("cifar10_resnet20_slq3", config)
