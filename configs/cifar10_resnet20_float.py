"""ResNet-20 on CIFAR-10 in float, from scratch: 182 epochs as in He et al. (2016), cosine.

    python -m train --config configs/cifar10_resnet20_float.py --workdir runs/resnet20

Not run to its end by us yet: an epoch takes about 5 minutes on two CPU cores, a second or two on a
GPU. With `eval` and `--config.init=FILE` it measures a PyTorch checkpoint instead; a public one,
trained by the step-wise recipe, has 91.73 %, and with `--config.model=resnet56` 93.39 %.
"""

from train.config import Config, Data, Fit, Quantize


def get_config() -> Config:
    """Return the experiment."""
    return Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(182,), learning_rate=0.1, warmup_epochs=1),
        quantize=Quantize(method="none"),
    )
