"""SLQ, 5 bits, of a small convolutional net on handwritten digits (8x8 pixels, no download).

    python -m train --config configs/digits_slq.py --workdir runs/digits_slq

From 98.59 % to 98.59 % (seed 0); both digits configs together, with plots, take less than a
minute on two CPU cores (AMD EPYC). One test image is 0.28 points.
"""

from train.config import Config, Data, Fit, Quantize


def get_config() -> Config:
    """Return the experiment."""
    return Config(
        data=Data(name="digits"),
        model="small_cnn",
        fit=Fit(epochs=(20,), learning_rate=0.1, warmup_epochs=1),
        quantize=Quantize(method="slq", bits=5),
        retrain=Fit(epochs=(4,), learning_rate=0.02),
    )
