"""What lies where: a line of devices, batches split over it, weights whole on each or split too.

Arrays are global: with several processes each holds the parts of its own devices, and the same
program runs in all of them. The compiled functions only say where their results lie; XLA puts the
communication in between.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.config import Config

_AXIS = "data"
_SMALL = 1024  # entries; less than that is cheaper to hold than to fetch


class Layout(NamedTuple):
    """Where the arrays of a run lie."""

    mesh: jax.sharding.Mesh  # of one axis
    fsdp: bool

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def everywhere(self) -> NamedSharding:
        """On each device all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of(self, shape: tuple[int, ...]) -> NamedSharding:
        """Return where a weight, or anything else of its shape, lies."""
        splittable = [i for i, n in enumerate(shape) if n % self.size == 0]
        if not self.fsdp or not splittable or math.prod(shape) < _SMALL:
            return self.everywhere
        longest = max(splittable, key=lambda i: (shape[i], i))
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * longest, _AXIS))

    def settle(self, tree: Any) -> Any:
        """Say in a compiled function that these arrays, of weights' shapes, lie as weights do."""
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.of(x.shape)), tree)

    def whole(self, tree: Any) -> Any:
        """Say in a compiled function that each device has all of these arrays."""
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.everywhere), tree)

    def take(self, data: Any, rows: jax.Array) -> Any:
        """Return in a compiled function a batch of what each device has all of, split over them."""
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x[rows], self._batches(0)), data
        )

    def place(self, tree: Any) -> Any:
        """Return arrays of the host, the same in each process, on the devices, as weights lie."""
        return jax.tree.map(lambda x: _place(np.asarray(x), self.of(np.shape(x))), tree)

    def place_whole(self, tree: Any) -> Any:
        """Return arrays of the host, the same in each process, all of them on each device."""
        return jax.tree.map(lambda x: _place(np.asarray(x), self.everywhere), tree)

    def describe(self, tree: Any) -> Any:
        """Return the shapes, dtypes and places of arrays of which these are the shapes."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.of(x.shape)), tree
        )

    def columns(self, batch_size: int, devices: Sequence[Any] | None = None) -> np.ndarray:
        """Return which of a batch's rows lie on these devices, by default on this process's own."""
        places = self._batches(0).devices_indices_map((batch_size,))
        own = self.mesh.local_devices if devices is None else devices
        return np.unique([np.arange(batch_size)[places[device]] for device in own])

    def join(self, own: Any, batch_size: int, axis: int) -> Any:
        """Return batches, along an axis of these arrays, of which each process gives its columns.

        They are split over the devices, as those of `feed`.
        """

        def one(array: np.ndarray) -> jax.Array:
            shape = (*array.shape[:axis], batch_size, *array.shape[axis + 1 :])
            return jax.make_array_from_process_local_data(self._batches(axis), array, shape)

        return jax.tree.map(one, own)

    def _batches(self, axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, _AXIS))

    def feed(self, split: Any, rows: np.ndarray) -> Any:
        """Return rows of the arrays of a split, [..., batch, ...] for rows [..., batch].

        The batch is split over the devices; each process reads the rows of its own devices alone.
        """

        def one(array: np.ndarray) -> jax.Array:
            shape = (*rows.shape, *array.shape[1:])
            return jax.make_array_from_callback(
                shape,
                self._batches(rows.ndim - 1),
                lambda index: array[rows[(index or ())[: rows.ndim]]],
            )

        return jax.tree.map(one, split)


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def make(config: Config) -> Layout:
    """Return the layout that a config asks for.

    Raises:
      ValueError: if there are fewer devices, or they do not divide a batch.
    """
    wanted, there = config.mesh.devices, jax.device_count()
    if wanted > there:
        raise ValueError(f"mesh.devices: expected at most {there}, all there are, got {wanted}")
    if jax.process_count() > 1 and wanted not in (0, there):
        raise ValueError(
            f"mesh.devices: expected 0, all {there} devices of the {jax.process_count()} "
            f"processes, got {wanted}"
        )
    devices = jax.devices()[: wanted or there]
    if config.batch_size % len(devices):
        raise ValueError(
            f"batch_size: expected a multiple of the {len(devices)} devices, "
            f"got {config.batch_size}"
        )
    mesh = jax.sharding.Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
    return Layout(mesh, config.mesh.fsdp)


def gather(tree: Any) -> Any:
    """Return arrays with all their parts, on the default device; every process has to call it."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


def highest(number: int) -> int:
    """Return the highest number of all processes; every process has to call it."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.array(number))))


def is_primary() -> bool:
    """Return whether this process is the one that writes files."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
