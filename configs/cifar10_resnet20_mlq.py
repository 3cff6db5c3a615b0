r"""MLQ, ternary, of a pretrained ResNet-20 on CIFAR-10; one epoch of re-training a round.

    python -m train --config configs/cifar10_resnet20_mlq.py --workdir runs/mlq \
        --config.init=resnet20.npz

From 91.73 % to 89.05 %; after the rounds 91.31, 90.92, 90.35, 90.08, 89.45, 89.05. One seed, six
epochs in all, 88 minutes on one of two busy CPU cores (AMD EPYC).
Run on a development version from before 0.1.0: a rerun may differ in the last digits.
"""

from train.config import Config, Data, Fit, Quantize


def get_config() -> Config:
    """Return the experiment."""
    return Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="mlq", bits=2, groups=3, recalibrate_batches=50),
        retrain=Fit(epochs=(1,), learning_rate=0.02, distill_weight=0.7, temperature=2.0),
    )
