r"""SLQ, 3 bits (five centroids), of a pretrained ResNet-20 on CIFAR-10; five epochs in all.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train \
        --config configs/cifar10_resnet20_slq3.py --workdir runs/slq3 --config.init=resnet20.npz

Three seeds; `--only '*_seed0'` runs the first. From 91.73 % to 91.37 % in the mean (91.36 to
91.39); after the rounds of the first 91.58, 91.60, 91.52, 91.39. Half an hour a seed on one of two
busy CPU cores (AMD EPYC, AVX-512), jax 0.10.2.
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
            epochs=(1, 1, 1, 2),
            learning_rate=0.01,
            distill_weight=1.0,
            temperature=16.0,
            feature_weight=100.0,
        ),
    )
    return seeds("cifar10_resnet20_slq3", config)
