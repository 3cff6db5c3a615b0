r"""SLQ, 5 bits, on digits with batches split over all devices, and with weights split too (FSDP).

    python -m train --config configs/digits_slq_meshes.py --workdir runs/digits_meshes

On a CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=4` before it makes four devices of one.
In several processes see docs/scale.md. 98.59 % before and after in both rows on four such devices.
"""

from train.config import Config, Data, Fit, Mesh, Quantize, vary


def get_configs() -> dict[str, Config]:
    """Return the experiments by name."""
    data_parallel = Config(
        data=Data(name="digits"),
        model="small_cnn",
        fit=Fit(epochs=(20,), learning_rate=0.1, warmup_epochs=1),
        quantize=Quantize(method="slq", bits=5),
        retrain=Fit(epochs=(4,), learning_rate=0.02),
        mesh=Mesh(devices=0),
    )
    return {"data_parallel": data_parallel, "fsdp": vary(data_parallel, mesh={"fsdp": True})}
