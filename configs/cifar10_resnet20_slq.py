r"""SLQ, 5 bits, of a pretrained ResNet-20 on CIFAR-10; one epoch of re-training a round.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train \
        --config configs/cifar10_resnet20_slq.py --workdir runs/slq --config.init=resnet20.npz

Three seeds; `--only '*_seed0'` runs the one that these figures are from.
From 91.73 % to 91.54 %; after the rounds 91.80, 91.74, 91.73, 91.63, 91.54. One seed, five epochs
in all, 24 minutes on one of two busy CPU cores (AMD EPYC, AVX-512), jax 0.10.2.
"""

from train.config import Config, Data, Fit, Quantize, seeds


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    config = Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="slq", bits=5, recalibrate_batches=20),
        retrain=Fit(epochs=(1,), learning_rate=0.002, distill_weight=0.7),
    )
    return seeds("cifar10_resnet20_slq", config)
