"""Plans: tables of cumulative shares, rounds by layer groups, for SLQ, MLQ and INQ."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from jaxquant import checks
from jaxquant.clustering.codebooks import MOST_CENTROIDS, num_centroids
from jaxquant.clustering.options import Clustering
from jaxquant.rounds.partition import PARTITIONS, WEIGHT_PARTITIONS
from jaxquant.rounds.selection import Layer, LayerRule, Selection, select

ORDERS = ("boundaries_first", "boundaries_together", "layer_by_layer", "network")
EQUALS = ("layers", "weights")
_RANKED_SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # of the clusters of all layers


class ClusteringOptions(TypedDict, total=False):
    """The fields of `Clustering`, as keyword arguments."""

    init: str
    iterations: int | None
    zero: bool
    powers_of_two: bool
    bins: int
    cells: int | None


_INQ: ClusteringOptions = {"init": "inq", "iterations": 0}
SHARES_OF = {"clusters": PARTITIONS, "weights": WEIGHT_PARTITIONS}  # and the partitions of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is quantized when; static and hashable, so jit may take it as a static argument.

    Made by `slq`, `mlq` and `inq`, or by hand. Invariants, which are checked: `schedule[round,
    group]` lies in [0, 1], never falls down a column, and ends in a row of ones; every selected
    layer has its groups, all of them columns of the schedule, and at most 256 centroids.

    Attributes:
      selection: the settings of all leaves.
      method: "slq", "mlq" or "inq", for the record.
      table: the schedule as nested tuples.
      shares_of: what the shares count, the "clusters" or the "weights" of a layer.
      partition: order in which these freeze, see `partition.priority` and `weight_priority`.
      network: whether the clusters of all layers are ranked together.
      clustering: how weights are clustered.

    Raises:
      ValueError: says which invariant does not hold, and for which leaf.
    """

    selection: Selection
    table: tuple[tuple[float, ...], ...]
    method: str = ""
    shares_of: str = "clusters"
    partition: str = "loss"
    network: bool = False
    clustering: Clustering = dataclasses.field(default_factory=Clustering)

    def __post_init__(self):
        """Check the invariants."""
        schedule = _check_table(self.table)
        object.__setattr__(self, "table", tuple(map(tuple, schedule.tolist())))
        _check_order(self)
        if not isinstance(self.clustering, Clustering):
            raise ValueError(f"expected clustering to be a Clustering, got {self.clustering!r}")
        if not isinstance(self.selection, Selection) or not self.selection.selected:
            layers = getattr(self.selection, "layers", ())
            reasons = "; ".join(f"{x.path}: {x.reason}" for x in layers[:5])
            raise ValueError(
                f"expected at least one leaf to quantize, got none ({reasons or 'no leaves'})"
            )
        for layer in self.selection.selected:
            try:
                _check_layer(self, layer)
            except ValueError as error:
                raise ValueError(f"{layer.path}: {error}") from None

    @property
    def schedule(self) -> np.ndarray:
        """Cumulative shares, float32 [rounds, groups]."""
        return np.array(self.table, np.float32)

    @property
    def num_rounds(self) -> int:
        """Number of rows."""
        return len(self.table)


def _check_table(table: Any) -> np.ndarray:
    """Return the shares [rounds, groups]."""
    try:
        schedule = np.array(table, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"expected a schedule [rounds, groups], got {table!r}") from None
    if schedule.ndim != 2 or not schedule.size:
        raise ValueError(f"expected a schedule [rounds, groups], got shape {schedule.shape}")
    if not ((schedule >= 0) & (schedule <= 1)).all() or not (schedule[-1] == 1).all():
        raise ValueError(f"expected shares in [0, 1] and a last row of ones, got {table}")
    if (np.diff(schedule, axis=0) < 0).any():
        raise ValueError(f"expected shares that never fall from round to round, got {table}")
    return schedule


def _check_order(plan: Plan) -> None:
    if plan.shares_of not in SHARES_OF:
        raise ValueError(f"expected shares_of clusters or weights, got {plan.shares_of!r}")
    if plan.partition not in SHARES_OF[plan.shares_of]:
        raise ValueError(
            f"expected partition to be one of {SHARES_OF[plan.shares_of]} for shares of "
            f"{plan.shares_of}, got {plan.partition!r}"
        )
    if plan.network and plan.shares_of == "weights":
        raise ValueError("expected shares of clusters where all layers are ranked together")
    if plan.network and len(plan.table[0]) != 1:
        raise ValueError(
            f"expected one group where all layers are ranked together, got {len(plan.table[0])}"
        )


def _check_layer(plan: Plan, layer: Layer) -> None:
    if not 1 <= layer.k <= MOST_CENTROIDS:
        raise ValueError(
            f"expected 1 to {MOST_CENTROIDS} centroids, as many as can be packed, got {layer.k}"
        )
    columns = len(plan.table[0])
    if (
        layer.groups is None
        or len(layer.groups) != layer.slices
        or not all(0 <= group < columns for group in layer.groups)
    ):
        raise ValueError(
            f"expected groups below {columns}, one for each of {layer.slices} slices, "
            f"got {layer.groups}"
        )
    plan.clustering.check(layer.k)


def slq(
    params: Any,
    *,
    bits: int = 5,
    rounds: Sequence[int] = (5, 9, 13, 15, 17),
    rules: Sequence[LayerRule] | None = None,
    partition: str = "loss",
    **clustering: Unpack[ClusteringOptions],
) -> Plan:
    """Plan single-level quantization: all layers at once, more clusters each round.

    Source: Xu et al., AAAI 2018; `init="power_of_two", iterations=10, zero=True,
    partition="index"` is the authors' released code.

    Args:
      params: tree of arrays, or of shape and dtype structs; only shapes are read.
      bits: `k = 2**(bits-1) + 1` centroids a layer where no rule says otherwise.
      rounds: clusters frozen after each round, out of the last number; a layer with another k
        freezes the same shares, to the nearest cluster; a round in which no layer would freeze
        another cluster is left out.
      rules: which leaves, see `select`.
      partition: see `partition.priority`.
      clustering: `init`, `iterations`, `zero` and others, see `Clustering`.

    Raises:
      ValueError: for rounds that do not grow to the end, and as `select` and `kmeans` do.

    >>> import jax
    >>> slq({"kernel": jax.ShapeDtypeStruct((64, 64), "float32")}).num_rounds
    5
    """
    counts = tuple(checks.integer("a round", count, least=1) for count in rounds)
    if not counts or any(b <= a for a, b in zip((0, *counts), counts, strict=False)):
        raise ValueError(f"expected rounds that grow from 1, got {counts}")
    selection = _assign_groups(select(params, rules, k=num_centroids(bits)), 1, spread=False)
    layer_ks = {layer.k for layer in selection.selected}
    return Plan(
        selection=selection,
        method="slq",
        table=_without_idle_rounds([count / counts[-1] for count in counts], layer_ks),
        partition=partition,
        clustering=Clustering(**clustering),
    )


def mlq(
    params: Any,
    *,
    groups: int | None = None,
    equal: str | None = None,
    order: str = "boundaries_first",
    reverse: bool = False,
    rounds: Sequence[float] | None = None,
    bits: int = 2,
    rules: Sequence[LayerRule] | None = None,
    partition: str = "loss",
    **clustering: Unpack[ClusteringOptions],
) -> Plan:
    """Plan multiple-level quantization: clusters and layers, incrementally; ternary by default.

    The boundaries, all clusters but one, are those that the partition puts first. Orders:
    "boundaries_first": the boundaries of one layer group after the other, then the last clusters
    likewise; "boundaries_together": those of all groups in one round, then the last clusters of one
    group after the other; "layer_by_layer": boundaries and last cluster of a group before the next
    group; "network": the clusters of all layers ranked together, `rounds` being the cumulative
    shares.

    Source: Xu et al., AAAI 2018 (incremental layer compensation).

    Args:
      params: tree of arrays, or of shape and dtype structs; only shapes are read.
      groups: number of layer groups, contiguous in depth (the rules' `depth`, then the natural
        order of the paths); layers stacked along axis 0, none of whose blocks reaches over two,
        spread over the groups; a rule's `group` says otherwise. None: 3. Not for "network".
      equal: what the groups have equal numbers of, "layers" (None) or "weights". Networks that
        widen with depth keep most of their weights in few layers; by weights these are not all
        frozen at once. A layer too large for one group takes the place of several: fewer groups.
        Not for "network".
      order: see above.
      reverse: from output to input; not for "network".
      rounds: for "network" only; None: 0.2, 0.4, 0.6, 0.8, 0.9, 1.
      bits: `k = 2**(bits-1) + 1` centroids a layer where no rule says otherwise.
      rules: which leaves, see `select`.
      partition: see `partition.priority`.
      clustering: `init`, `iterations`, `zero` and others, see `Clustering`.

    Raises:
      ValueError: for an unknown order, options that it does not read, more groups than layers,
        and as `select` and `kmeans` do.

    >>> import jax
    >>> kernel = jax.ShapeDtypeStruct((64, 64), "float32")
    >>> mlq({"a": kernel, "b": kernel}, groups=2).schedule.shape
    (4, 2)
    """
    if order not in ORDERS:
        raise ValueError(f"expected order to be one of {ORDERS}, got {order!r}")
    network = order == "network"
    others = {"groups": groups, "equal": equal, "reverse": reverse or None}
    _refuse_unread(order, others if network else {"rounds": rounds})
    groups = checks.integer("groups", 3 if groups is None else groups, least=1)
    equal = "layers" if equal is None else equal
    if equal not in EQUALS:
        raise ValueError(f"expected equal to be one of {EQUALS}, got {equal!r}")
    k = num_centroids(bits)
    selection = select(params, rules, k=k)
    selection = _assign_groups(selection, 1 if network else groups, spread=not network, equal=equal)
    if network:
        table = tuple((float(share),) for share in (_RANKED_SHARES if rounds is None else rounds))
    else:
        used = {group for layer in selection.selected for group in layer.groups or ()}
        table = _incremental_table(sorted(used or {0}), (k - 1) / k, order, reverse)
    return Plan(
        selection=selection,
        method="mlq",
        table=table,
        partition=partition,
        network=network,
        clustering=Clustering(**clustering),
    )


def inq(
    params: Any,
    *,
    bits: int = 5,
    shares: Sequence[float] = (0.5, 0.75, 0.875, 1.0),
    rules: Sequence[LayerRule] | None = None,
    partition: str = "magnitude",
    **clustering: Unpack[ClusteringOptions],
) -> Plan:
    """Plan incremental network quantization: more weights of every layer each round.

    The codebook of a layer is 0 and the powers of two from 2**n1 down to 2**n2, n1 from its largest
    weight before training, and stays; a weight that has grown beyond them is clamped to 2**n1. The
    largest weights freeze first ("magnitude"), or any ("random"). A share is exact, but for weights
    of equal magnitude, which freeze together. As everywhere, a weight half-way between two
    centroids goes to the lower one.

    Source: Zhou et al., "Incremental Network Quantization", ICLR 2017; at 2 bits their shares are
    0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.

    Args:
      params: tree of arrays, or of shape and dtype structs; only shapes are read.
      bits: `k = 2**(bits-1) + 1` centroids a layer where no rule says otherwise; at least 2.
      shares: of the weights of each layer that are frozen after each round, cumulative.
      rules: which leaves, see `select`.
      partition: see `partition.weight_priority`.
      clustering: see `Clustering`; here `init` is "inq" and `iterations` 0 if not given. With
        "optimal" and None, shares of weights of k-means clusters, of which those with frozen
        weights stay.

    Raises:
      ValueError: for shares that do not grow to one, and as `select` and `kmeans` do.

    >>> import jax
    >>> inq({"kernel": jax.ShapeDtypeStruct((64, 64), "float32")}).schedule[:, 0].tolist()
    [0.5, 0.75, 0.875, 1.0]
    """
    shares = tuple(map(float, shares))
    if not shares or any(b <= a for a, b in zip((0, *shares), shares, strict=False)):
        raise ValueError(f"expected shares that grow from 0 to 1, got {shares}")
    selection = select(params, rules, k=num_centroids(bits))
    return Plan(
        selection=_assign_groups(selection, 1, spread=False),
        method="inq",
        table=tuple((share,) for share in shares),
        shares_of="weights",
        partition=partition,
        clustering=Clustering(**(_INQ | clustering)),
    )


def _refuse_unread(order: str, options: Mapping[str, Any]) -> None:
    """Refuse options that an order does not read."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise ValueError(f"expected no {given} for order={order!r}, got {options[given]!r}")


def _without_idle_rounds(shares: list[float], ks: set[int]) -> tuple[tuple[float], ...]:
    """Return the rows of one group in which some layer of k centroids freezes a cluster more."""
    rows: dict[tuple[int, ...], tuple[float]] = {}
    for share in shares:  # of rows that freeze the same clusters the last stays, share 1 included
        rows[tuple(int(share * k + 0.5) for k in sorted(ks))] = (share,)
    return tuple(row for counts, row in rows.items() if any(counts) or not counts)


def _incremental_table(
    groups: list[int], boundary: float, order: str, reverse: bool
) -> tuple[tuple[float, ...], ...]:
    """Return the rows that raise these groups to the boundary share and then to one."""
    depth = list(reversed(groups)) if reverse else groups
    each, together = [[group] for group in depth], [depth]
    steps = {
        "boundaries_first": [(g, boundary) for g in each] + [(g, 1.0) for g in each],
        "boundaries_together": [(g, boundary) for g in together] + [(g, 1.0) for g in each],
        "layer_by_layer": [(g, share) for g in each for share in (boundary, 1.0)],
    }[order]
    unused = set(range(groups[-1])) - set(groups)  # nothing waits for them: no rows
    shares, rows = [float(group in unused) for group in range(groups[-1] + 1)], []
    for raised, share in steps:
        for group in raised:
            shares[group] = share
        rows.append(tuple(shares))
    return tuple(rows)


def _assign_groups(
    selection: Selection, groups: int, *, spread: bool, equal: str = "layers"
) -> Selection:
    """Give every selected layer without a group one by depth; without `spread`, all are 0."""
    layers = selection.by_depth()
    positions = max((layer.slices for layer in layers if layer.is_stack), default=1)
    undecided = any(layer.groups is None for layer in layers)
    if spread and undecided and groups > max(len(layers), positions):
        raise ValueError(
            f"expected at most as many groups as layers, {len(layers)}, got groups={groups}"
        )
    by_depth = _groups_by_depth(layers, groups, equal)
    resolved = {
        layer.path: _groups_of(layer, group, groups) if spread else (0,) * layer.slices
        for layer, group in zip(layers, by_depth, strict=True)
    }

    def resolve(layer: Layer) -> Layer:
        if layer.reason is not None or (layer.groups is not None and spread):
            return layer
        return dataclasses.replace(layer, groups=resolved[layer.path])

    return Selection(tuple(resolve(layer) for layer in selection.layers))


def _groups_by_depth(layers: Sequence[Layer], groups: int, equal: str) -> list[int]:
    """Return the group of each layer; by weights, that in which the middle of its weights lies."""
    if equal == "layers":
        return [index * groups // len(layers) for index in range(len(layers))]
    sizes = np.array([math.prod(layer.shape) for layer in layers])
    middles = np.cumsum(sizes) - sizes / 2
    return [int(middle * groups // sizes.sum()) for middle in middles]


def _groups_of(layer: Layer, group: int, groups: int) -> tuple[int, ...]:
    """Slices of layers stacked along axis 0 lie at depths of their own; else the path decides."""
    if layer.is_stack and layer.slices > 1:
        return tuple(i * groups // layer.slices for i in range(layer.slices))
    return (group,) * layer.slices
