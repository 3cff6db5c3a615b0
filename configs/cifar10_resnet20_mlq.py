r"""MLQ, ternary, of a pretrained ResNet-20 on CIFAR-10; 33 epochs of re-training in all.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train \
        --config configs/cifar10_resnet20_mlq.py --workdir runs/mlq --config.init=resnet20.npz

Three seeds; `--only '*_seed0'` runs the one that these figures are from.
From 91.73 % to 90.25 %; after the rounds 91.49, 91.57, 91.45, 91.00, 90.99, 90.25. One seed, about
two hours on one of two busy CPU cores (AMD EPYC, AVX-512), jax 0.10.2.
"""

from train.config import Config, Data, Fit, Quantize, seeds


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    config = Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="mlq", bits=2, groups=3, recalibrate_batches=50),
        retrain=Fit(epochs=(4, 6, 7, 6, 7, 3), learning_rate=0.05, distill_weight=0.7),
    )
    return seeds("cifar10_resnet20_mlq", config)
