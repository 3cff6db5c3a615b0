"""What a program that is being traced will run on."""

import jax


def name() -> str:
    """Return "cpu", "gpu" or "tpu": that of the mesh in use, which may be absent, or of this host.

    A mesh of devices that are not there is how JAX compiles for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_one_device() -> bool:
    """Return whether arrays lie on one device: no mesh of several, or all of its axes manual."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or mesh.are_all_axes_manual
