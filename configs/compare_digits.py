"""Every method on handwritten digits at an equal budget of re-training: a comparison in minutes.

    python -m train compare --config configs/compare_digits.py --workdir runs/compare_digits

All start from one float network. Those that re-train get five rounds of two epochs, or as many
epochs in fewer rounds; rounding to nearest and Q-CNN do not re-train.
"""

from train.compare import methods
from train.config import Config, Data, Fit, Plots


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    config = Config(
        data=Data(name="digits"),
        model="small_cnn",
        fit=Fit(epochs=(20,), learning_rate=0.1, warmup_epochs=1),
        retrain=Fit(learning_rate=0.02),
        plots=Plots(draw=False),
        tensorboard=False,
    )
    return methods(config, epochs=2)
