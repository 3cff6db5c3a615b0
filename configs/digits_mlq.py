"""MLQ, ternary, of a small convolutional net on handwritten digits (8x8 pixels, no download).

    python -m train --config configs/digits_mlq.py --workdir runs/digits_mlq

@DM@
"""

from train.config import Config, Data, Fit, Quantize


def get_config() -> Config:
    """Return the experiment."""
    return Config(
        data=Data(name="digits"),
        model="small_cnn",
        fit=Fit(epochs=(20,), learning_rate=0.1, warmup_epochs=1),
        quantize=Quantize(method="mlq", bits=2),
        retrain=Fit(epochs=(8,), learning_rate=0.02),
    )
