r"""SLQ, 5 bits, on digits: batches split over all devices, weights whole on each.

    python -m train --config configs/digits_slq_data_parallel.py --workdir runs/digits_dp

On a CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=4` before it makes four devices of one.
In several processes see docs/scale.md. 98.59 % before and after on four such devices (seed 0).
"""

from train.config import Config, Data, Fit, Mesh, Quantize


def get_config() -> Config:
    """Return the experiment."""
    return Config(
        data=Data(name="digits"),
        model="small_cnn",
        fit=Fit(epochs=(20,), learning_rate=0.1, warmup_epochs=1),
        quantize=Quantize(method="slq", bits=5),
        retrain=Fit(epochs=(4,), learning_rate=0.02),
        mesh=Mesh(devices=0),
    )
