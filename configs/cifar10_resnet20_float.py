"""ResNet-20 on CIFAR-10 in float, from scratch: the recipe of He et al. (2016), 182 epochs."""

from train.config import Config, Data, Fit, Quantize


def get_config() -> Config:
    """Return the experiment."""
    return Config(
        data=Data(name="cifar10"),
        model="resnet20",
        fit=Fit(epochs=(182,), learning_rate=0.1, warmup_epochs=1),
        quantize=Quantize(method="none"),
    )
