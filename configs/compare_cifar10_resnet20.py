r"""Every method on a pretrained ResNet-20 for CIFAR-10, at an equal, short budget of training.

    python -m train compare --config configs/compare_cifar10_resnet20.py \
        --workdir runs/compare --config.init=resnet20.npz

Those that re-train get five epochs of 6,400 training images, taught by the float network's logits
and features; rounding to nearest and Q-CNN do not re-train.
"""

from train.compare import methods
from train.config import Config, Data, Fit, Plots, Quantize


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    config = Config(
        data=Data(name="cifar10", train_limit=6_400),
        model="resnet20",
        fit=Fit(epochs=(0,)),
        quantize=Quantize(recalibrate_batches=20),
        retrain=Fit(learning_rate=0.02, distill_weight=1.0, temperature=16.0, feature_weight=100.0),
        plots=Plots(draw=False),
        tensorboard=False,
    )
    return methods(config, epochs=1)
