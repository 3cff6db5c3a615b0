r"""SLQ, 5 bits, of a pretrained ResNet-20 on CIFAR-10; two epochs of re-training a round.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m train \
        --config configs/cifar10_resnet20_slq.py --workdir runs/slq --config.init=resnet20.npz

Three seeds; `--only '*_seed0'` runs the first. From 91.73 % to 91.78 % in the mean (91.69 to
91.86); after the rounds of the first 91.79, 91.87, 91.96, 91.96, 91.79. Ten epochs in all, about
35 minutes a seed on one of two busy CPU cores (AMD EPYC, AVX-512), jax 0.10.2. At a high
temperature, distillation is regression on the float network's logits.
"""

from train.config import Config, Data, Fit, Quantize, seeds


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    config = Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="slq", bits=5, recalibrate_batches=20),
        retrain=Fit(epochs=(2,), learning_rate=0.01, distill_weight=0.9, temperature=16.0),
    )
    return seeds("cifar10_resnet20_slq", config)
