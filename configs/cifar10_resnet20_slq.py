"""SLQ, 5 bits, of a pretrained ResNet-20 on CIFAR-10; one epoch of re-training a round."""

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
