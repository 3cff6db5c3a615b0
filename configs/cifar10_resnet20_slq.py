r"""SLQ, 5 bits, of a pretrained ResNet-20 on CIFAR-10; one epoch of re-training a round.

    python -m train --config configs/cifar10_resnet20_slq.py --workdir runs/slq \
        --config.init=resnet20.npz

From 91.73 % to 91.44 %; after the rounds 91.65, 91.43, 91.17, 91.39, 91.44. One seed, five epochs
in all, 71 minutes on one of two busy CPU cores (AMD EPYC).
Run on a development version from before 0.1.0: a rerun may differ in the last digits.
"""

from train.config import Config, Data, Fit, Quantize


def get_config() -> Config:
    """Return the experiment."""
    return Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(method="slq", bits=5, recalibrate_batches=20),
        retrain=Fit(epochs=(1,), learning_rate=0.01),
    )
