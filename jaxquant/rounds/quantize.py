"""One round of quantization of a tree: cluster, partition, share."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxquant import checks, loops
from jaxquant.clustering.blocks import (
    at_codes,
    by_batch,
    centroids_of,
    in_order,
    reduced,
    rewrite,
)
from jaxquant.meshes import compiled
from jaxquant.rounds.calibration import Calibration, guided_by
from jaxquant.rounds.cluster import ClusteredLeaf, cluster_leaf
from jaxquant.rounds.partition import choose, priority
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.selection import Layer, by_slice
from jaxquant.rounds.sharing import (
    Codebook,
    can_join,
    compensated,
    count_frozen,
    free_loss,
    join_clusters,
    join_weights,
    least_priority,
    share_centroids,
    used_centroids,
    with_equals,
)
from jaxquant.rounds.state import QuantState, check_state
from jaxquant.trees import check_leaves, check_shape, pure, replaced


class RoundInfo(NamedTuple):
    """What a round did, by the path of each selected leaf; [codebooks, ...] if it is cut."""

    loss: dict[str, jax.Array]  # [k] float32, (weighted) sum of squares of each cluster
    counts: dict[str, jax.Array]  # [k] int32, weights in each cluster
    clusters_frozen: dict[str, jax.Array]  # float32, share of the clusters, after the round
    weights_frozen: dict[str, jax.Array]  # float32, share of the weights, after the round
    error_before: dict[str, jax.Array]  # float32, squared distance to the codebook / squared norm
    error_after: dict[str, jax.Array]  # float32, the same over the weights that are still free
    finite: dict[str, jax.Array]  # bool; a layer that cannot be clustered is left as it was


class _Leaf(NamedTuple):
    """The arrays of a selected leaf, as they are in the parameters and in the state."""

    weights: jax.Array
    frozen: jax.Array
    codebook: jax.Array
    frozen_centroids: jax.Array
    scale: jax.Array  # a scalar where there is none


class _Alike(NamedTuple):
    """Selected leaves of one shape and setting on their way through a round.

    Tables are those of their codebooks, `[leaves, *numbers, ...]`. Numbers are 1 for a single
    codebook, and in place of blocks that share one.
    """

    layer: Layer  # the setting, of the first
    members: list[int]  # their places among all selected leaves
    weights: list[jax.Array]
    sensitivities: list[Any]  # like the weights, or None
    frozen: list[jax.Array]
    codebook: jax.Array  # [leaves, *numbers, k], as it is stored
    frozen_centroids: jax.Array  # like the codebook
    scale: Any  # [leaves, *numbers, 1], or None
    groups: jax.Array  # [leaves, *numbers] int32


class _Shared(NamedTuple):
    """Leaves that are alike after a round."""

    weights: list[jax.Array]
    frozen: list[jax.Array]
    codebook: jax.Array
    frozen_centroids: jax.Array
    scale: Any
    frozen_share: jax.Array  # [leaves, *numbers] float32, of the weights
    free_loss: jax.Array  # [leaves, *numbers] float32, of the weights that are not frozen


def init(plan: Plan, params: Any) -> QuantState:
    """Return the state before the first round: nothing is frozen.

    Args:
      plan: from `slq`, `mlq`, `inq`.
      params: the tree the plan was made for.

    Raises:
      ValueError: if the tree is not the plan's, or holds NaN or infinite weights to quantize;
        names the leaf.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.eye(8)}
    >>> jq.init(jq.slq(params, bits=2), params).codebooks["kernel"]
    Array([0., 0., 0.], dtype=float32)
    """
    params = pure(params, only_parameters=True)
    leaves = check_leaves("params", params, [(x.path, x.shape) for x in plan.selection.layers])
    pairs = zip(plan.selection.layers, leaves, strict=True)
    checks.values({layer.path: leaf for layer, leaf in pairs if layer.reason is None})
    structure = jax.tree.structure(params)

    def tree_of(make: Callable[[Layer, jax.Array], jax.Array]) -> Any:
        made = [make(*pair) for pair in zip(plan.selection.layers, leaves, strict=True)]
        return jax.tree.unflatten(structure, made)

    def codebook(layer: Layer, leaf: jax.Array) -> jax.Array:
        del leaf
        dtype = layer.centroid_dtype if layer.reason is None else jnp.float32  # a key has no zero
        return jnp.zeros(layer.codebook_shape, dtype)

    def frozen(layer: Layer, leaf: jax.Array) -> jax.Array:
        # Computed from the leaf: its shape alone would not say, under jit, on which devices.
        return jnp.isnan(leaf) & False if layer.reason is None else jnp.bool_(False)

    def scale(layer: Layer, _: jax.Array) -> jax.Array:
        return jnp.zeros(layer.scale_shape, layer.scale_dtype or jnp.float32)

    return QuantState(
        codebooks=tree_of(codebook),
        frozen=tree_of(frozen),
        frozen_centroids=tree_of(lambda layer, _: jnp.zeros(layer.codebook_shape, bool)),
        round=jnp.int32(0),
        scales=tree_of(scale) if any(x.scale_dtype for x in plan.selection.layers) else None,
    )


def quantize_round(
    plan: Plan,
    params: Any,
    state: QuantState,
    *,
    sensitivity: Any = None,
    moments: Mapping[str, jax.Array] | None = None,
    calibration: Calibration | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, QuantState, RoundInfo]:
    """Apply row `state.round` of the plan: cluster, partition, share.

    For every layer whose share grows in that row, and for no other: its weights are clustered
    (in its first round from the plan's start, then from its codebook, of which the frozen
    centroids stay); the clusters that the partition puts first freeze, up to the row's share; their
    weights become their centroids. A free weight that is nearest to a frozen centroid joins it. In
    a plan of shares of weights (`inq`) the weights that the partition puts first freeze instead,
    whatever their cluster, those of equal priority together. Past the last row what
    is still free freezes, of a layer that was passed over or of a state of another plan; else
    nothing changes. Pure; runs under jit, vmap and scan, one compile for all rounds. A layer with
    NaN or infinite weights, or sensitivities that cannot weigh, is left as it was and reported in
    `finite`; outside of jit it is an error.

    Layers of one shape and setting are clustered by one program, one after the other, and kernels
    that are alike put their weights on centroids, which XLA compiles once. Cost: about four reads
    of the weights, more than twice that for shares of weights, and a sort of those of small
    codebooks.

    Weights take the centroid that is nearest. With `moments`, a layer of which nothing is free
    after this round freezes so that what it answers changes least: one input after the other, those
    still to come make up for it, centroids that have no members yet are refitted, and the answers'
    squared error is never above that of the nearest centroids (Frantar et al., "GPTQ", ICLR 2023;
    `jaxquant.rounds.compensation`). In rounds before its last, re-training makes up for the nearest
    centroids better. Of D inputs and N outputs that costs O(D**2 (D + k N)) and gathers the layer;
    of stacked layers in every round.

    Args:
      plan: static.
      params: tree of weights.
      state: from `init` or the last round.
      sensitivity: tree like `params` of non-negative squared gradients (diagonal Fisher). They
        weigh the clustering and the loss of the clusters. Leaves left alone are not read.
      moments: of the inputs of some layers, by path, from `input_moments`: [D, D] for a kernel
        [..., N] with D entries for each of N outputs (of the axes that the rule's `inputs` tells,
        where it does), [slices, D, D] for layers stacked along axis 0. With an axis before [D, D]
        for each of so many runs of outputs. For layers without, the nearest centroid. Plans of
        shares of clusters only.
      calibration: from `calibrate`, in place of both.
      key: typed key, for `partition="random"` only.

    Returns:
      New params, new state, RoundInfo.

    Raises:
      ValueError: if trees or moments do not fit the plan, or the key is missing; names the leaf.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    >>> plan = jq.slq(params, bits=2, rounds=(1, 3))
    >>> params, state, info = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> round(float(info.clusters_frozen["kernel"]), 3)
    0.333
    """
    check_key(plan, key)
    plan, sensitivity, moments = guided_by(plan, calibration, sensitivity, moments)
    given, params = params, pure(params, only_parameters=True)
    state, sensitivity = pure(state), pure(sensitivity, only_parameters=True)
    _check(plan, params, state, sensitivity)
    _check_moments(plan, moments)
    scales = state.scales
    if scales is None:
        scales = jax.tree.map(lambda _: jnp.zeros(()), state.codebooks)
    trees = (params, state.frozen, state.codebooks, state.frozen_centroids, scales)
    leaves = [_Leaf(*arrays) for arrays in _gather(plan, *trees)]
    weighed = None if sensitivity is None else [leaf for (leaf,) in _gather(plan, sensitivity)]
    changed, round_, info = compiled(
        _round,
        *(leaves, weighed, state.round, moments, key),
        like=(leaves, None, None),
        plan=plan,
    )
    new = [_scatter(plan, *pair) for pair in zip(trees, zip(*changed, strict=True), strict=True)]
    params, frozen, codebooks, frozen_centroids, scales = new
    scales = None if state.scales is None else scales
    state = QuantState(codebooks, frozen, frozen_centroids, round_, scales)
    return replaced(given, params, only_parameters=True), state, info


def _round(
    leaves: list[_Leaf],
    sensitivities: list[jax.Array] | None,
    round_: jax.Array,
    moments: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    plan: Plan,
) -> tuple[list[_Leaf], jax.Array, RoundInfo]:
    alike = _alike(plan, leaves, sensitivities)
    share, growing = _row(plan, round_)
    # 1. Cluster every block.
    clustered = [_cluster(plan, part) for part in alike]
    # 2. Partition: the only step that may look across layers. Weights need no look.
    over = round_ >= plan.num_rounds  # what was passed over, or comes from another plan, ends here
    active = [
        (growing[part.groups] | (over & ~_whole(plan, part))) & found.clusters.finite
        for part, found in zip(alike, clustered, strict=True)
    ]
    chosen = [share[part.groups] for part in alike]
    if plan.shares_of == "clusters":
        chosen = _partition(plan, alike, clustered, chosen, active, key)
    # 3. Share.
    shared = [
        _share(plan, *one, moments=moments, key=key)
        for one in zip(alike, clustered, chosen, active, strict=True)
    ]
    changed: dict[int, _Leaf] = {}
    for part, new in zip(alike, shared, strict=True):
        changed |= dict(zip(part.members, _finish(part, new), strict=True))
    info = _describe(plan, alike, clustered, shared)
    next_round = jnp.minimum(round_ + 1, plan.num_rounds).astype(jnp.int32)
    return [changed[i] for i in range(len(leaves))], next_round, info


def _alike(plan: Plan, leaves: list[_Leaf], sensitivities: list[jax.Array] | None) -> list[_Alike]:
    """Put leaves of one shape and setting together: what is small is one array for all of them."""
    layers = plan.selection.selected
    weighed: Sequence[Any] = sensitivities or [None] * len(layers)
    places: dict[Any, list[int]] = {}
    for place, (layer, sensitivity) in enumerate(zip(layers, weighed, strict=True)):
        kind = dataclasses.replace(layer, path="", groups=None, depth=0)
        dtype = None if sensitivity is None else sensitivity.dtype
        places.setdefault((kind, dtype), []).append(place)

    def together(members: list[int]) -> _Alike:
        layer, own = layers[members[0]], [leaves[i] for i in members]
        shape = (len(members), *layer.codebook_numbers, layer.k)
        scale = None
        if layer.scale_dtype is not None:
            scale = jnp.stack([leaf.scale for leaf in own])
            scale = scale.reshape(len(members), *layer.scale_numbers, 1)
        return _Alike(
            layer,
            members,
            [leaf.weights for leaf in own],
            [weighed[i] for i in members],
            [leaf.frozen for leaf in own],
            jnp.stack([leaf.codebook for leaf in own]).reshape(shape),
            jnp.stack([leaf.frozen_centroids for leaf in own]).reshape(shape),
            scale,
            jnp.stack([by_slice(layers[i], jnp.array(layers[i].groups)) for i in members]),
        )

    return [together(members) for members in places.values()]


def _row(plan: Plan, round_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return this row's shares [groups], and which groups grow in it."""
    schedule = jnp.pad(jnp.asarray(plan.schedule), ((1, 0), (0, 0)))
    last = jnp.minimum(round_ + 1, plan.num_rounds)
    return schedule[last], (schedule[last] > schedule[last - 1]) & (round_ < plan.num_rounds)


def _whole(plan: Plan, alike: _Alike) -> jax.Array:
    """Return whether nothing is left to freeze, bool [leaves, *numbers]."""
    if plan.shares_of == "clusters":
        return jnp.all(alike.frozen_centroids, axis=-1)
    found = [reduced(jnp.all, frozen, alike.layer.all_numbers) for frozen in alike.frozen]
    return _of_codebooks(alike.layer, jnp.all, jnp.stack(found))


def _looked_up(
    layer: Layer,
    function: Callable[..., jax.Array],
    reduce: Callable[..., jax.Array],
    tables: jax.Array,
    *arrays: Sequence[Any],
) -> jax.Array:
    """Return what a function tells of each block of leaves that are alike, by their codebooks.

    Args:
      layer: their setting.
      function: of arrays of a block, and of its entry of the tables.
      reduce: what joins the blocks that share a codebook.
      tables: [leaves, *numbers, ...] of the blocks.
      arrays: like the leaves, a sequence of each kind.
    """
    rows = zip(zip(*arrays, strict=True), tables, strict=True)
    found = [by_batch(function, own, [table], layer.all_numbers) for own, table in rows]
    return _of_codebooks(layer, reduce, jnp.stack(found))


def _cluster(plan: Plan, alike: _Alike) -> ClusteredLeaf:
    """Return the clusters of leaves that are alike, by a single program.

    One leaf at a time is copied to where the program reads it.
    """
    function = functools.partial(cluster_leaf, layer=alike.layer, clustering=plan.clustering)
    arrays = list(zip(alike.weights, alike.sensitivities, strict=True))
    tables = alike.codebook, alike.frozen_centroids, alike.scale
    return _one_by_one(lambda arrays, tables: function(*arrays, *tables), arrays, tables)


def _one_by_one(function: Callable[..., Any], arrays: list[Any], tables: Any) -> Any:
    """Return what a function tells of each leaf of some that are alike, [leaves, ...].

    By a single program, for which one leaf at a time is copied to where it is read.

    Args:
      function: of arrays of a leaf, and of its entry of the tables.
      arrays: of each leaf.
      tables: [leaves, ...].
    """
    if len(arrays) == 1:
        found = function(arrays[0], jax.tree.map(lambda x: x[0], tables))
        return jax.tree.map(lambda x: x[None], found)
    choices = [lambda own=own: own for own in arrays]

    def step(_: None, inputs: tuple[jax.Array, Any]) -> tuple[None, Any]:
        number, own = inputs
        return None, function(loops.switch(number, choices), own)

    numbers = jnp.arange(len(arrays), dtype=jnp.int32)
    return loops.scan(step, None, (numbers, tables))[1]


def _partition(
    plan: Plan,
    alike: list[_Alike],
    clustered: list[ClusteredLeaf],
    shares: list[jax.Array],
    active: list[jax.Array],
    key: jax.Array | None,
) -> list[jax.Array]:
    """Return the clusters [leaves, *numbers, k] that are frozen after this round."""
    priorities = []
    for part, found, is_active in zip(alike, clustered, active, strict=True):
        own = found.clusters
        # Of the sizes that they have in the leaf: stored, those of several leaves do not compare.
        centroids = centroids_of(own.centroids, found.scale, jnp.float32)
        centroids = _of_codebooks(part.layer, jnp.mean, centroids)
        if key is None:
            ranked = priority(plan.partition, own.losses, centroids)
        else:
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.array(part.members))
            ranked = jax.vmap(functools.partial(priority, plan.partition))(
                own.losses, centroids, key=keys
            )
        # A layer that stays as it is takes no other layer's place in the ranking.
        priorities.append(jnp.where(is_active[..., None], ranked, -jnp.inf))
    frozen = [part.frozen_centroids for part in alike]
    if not plan.network:
        rows = zip(priorities, frozen, shares, strict=True)
        return [choose(*row) for row in rows]
    order = [(place, i, j) for i, part in enumerate(alike) for j, place in enumerate(part.members)]
    order = [(i, j) for _, i, j in sorted(order)]  # ties go to the leaf that comes first
    everything = jnp.concatenate([priorities[i][j].reshape(-1) for i, j in order])
    all_frozen = jnp.concatenate([frozen[i][j].reshape(-1) for i, j in order])
    chosen = choose(everything, all_frozen, shares[0].reshape(-1)[0])
    ends = list(itertools.accumulate(frozen[i][j].size for i, j in order))[:-1]
    parts = dict(zip(order, jnp.split(chosen, ends), strict=True))
    return [
        jnp.stack([parts[i, j] for j in range(len(mask))]).reshape(mask.shape)
        for i, mask in enumerate(frozen)
    ]


def _share(
    plan: Plan,
    alike: _Alike,
    clustered: ClusteredLeaf,
    chosen: jax.Array,
    active: jax.Array,
    *,
    moments: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> _Shared:
    """Freeze what a round freezes of leaves that are alike.

    `chosen` is what the partition gave: clusters [leaves, *numbers, k], or shares of the weights
    [leaves, *numbers].
    """
    layer, dtype = alike.layer, alike.weights[0].dtype
    centroids = centroids_of(clustered.clusters.centroids, clustered.scale, dtype)
    tables = [_of_blocks(layer, table) for table in (centroids, chosen, active)]
    last, codes = in_order(tables[0], dtype)
    codebooks = Codebook(last, at_codes(tables[0], codes))
    wanted = tables[1]
    if plan.shares_of == "clusters":
        wanted = at_codes(with_equals(tables[0], wanted), codes) & tables[2][..., None]
    weights, frozen, counts = [], [], []
    rows = loops.unstacked((codebooks, wanted, tables[2]))
    for j, (place, row) in enumerate(zip(alike.members, rows, strict=True)):
        own: list[Any] = [alike.frozen[j], alike.weights[j]]
        codebook, moving, is_active = row
        join: Callable[..., jax.Array] = join_clusters
        if plan.shares_of == "weights":
            if plan.partition == "loss" and alike.sensitivities[j] is not None:
                own.append(alike.sensitivities[j])
            elif plan.partition == "random" and key is not None:
                own_key = jax.random.fold_in(key, place)
                own.append(jax.random.bits(own_key, own[0].shape, jnp.uint32))
            least = functools.partial(least_priority, partition=plan.partition)
            least, some = by_batch(least, own, (codebook, moving), layer.all_numbers)
            join = functools.partial(join_weights, partition=plan.partition)
            moving = least, some & is_active
        own_tables = codebook, moving, is_active
        mask, leaf, *_ = rewrite((join, share_centroids), own, own_tables, layer.all_numbers)
        weights.append(leaf)
        frozen.append(mask)
        counts.append(by_batch(count_frozen, [mask], [], layer.all_numbers))
    new_codebook = clustered.clusters.centroids
    paths = [plan.selection.selected[place].path for place in alike.members]
    scale = clustered.scale
    told = [j for j, path in enumerate(paths) if path in moments]
    if told:
        own_moments = [moments[paths[j]].astype(jnp.float32) for j in told]
        own_tables = new_codebook, scale, *tables[1:]
        found = _compensated(plan, alike, told, weights, own_tables, own_moments)
        own_weights, moved, moved_scale = found
        for j, own in zip(told, loops.unstacked(own_weights), strict=True):
            weights[j] = own
        new_codebook = new_codebook.at[np.array(told)].set(moved)
        if scale is not None:
            scale = scale.at[np.array(told)].set(moved_scale)
    frozen_share = jnp.stack(counts).astype(jnp.float32) / math.prod(layer.block)
    by_weights = plan.shares_of == "weights"
    joined = chosen
    if by_weights and plan.clustering.iterations == 0:
        joined = jnp.ones_like(alike.frozen_centroids)  # of a codebook that stays as it starts
    elif by_weights:
        joined = _looked_up(layer, used_centroids, jnp.any, tables[0], weights, frozen)
    frozen_centroids = jnp.where(active[..., None], joined, alike.frozen_centroids)
    if by_weights:
        like_weights = weights, frozen, alike.sensitivities
        free = _looked_up(layer, free_loss, jnp.sum, tables[0], *like_weights)
    else:
        losses = jnp.where(frozen_centroids, 0.0, clustered.clusters.losses)
        free = jnp.sum(losses, axis=-1)
    codebook = jnp.where(active[..., None], new_codebook, alike.codebook)
    if scale is not None:
        several = tuple(axis for axis, number in enumerate(scale.shape) if axis and number == 1)
        taken = jnp.any(active[..., None], axis=several, keepdims=True)
        scale = jnp.where(taken, scale, alike.scale)
    return _Shared(
        weights=weights,
        frozen=frozen,
        codebook=codebook,
        frozen_centroids=frozen_centroids,
        scale=scale,
        frozen_share=_of_codebooks(layer, jnp.mean, frozen_share),
        free_loss=free,
    )


def _compensated(
    plan: Plan,
    alike: _Alike,
    told: list[int],
    near: list[jax.Array],
    tables: tuple[Any, ...],
    moments: list[jax.Array],
) -> tuple[jax.Array, jax.Array, Any]:
    """Return weights, codebooks and scales of layers, or of stacked ones, where they are whole now.

    Each has an axis of layers first.

    Args:
      plan: of the round.
      alike: leaves that are alike.
      told: which of them there are moments for.
      near: the leaves with all that freezes on its nearest centroid.
      tables: their codebooks and scales, and of their blocks: clusters that are frozen then, which
        are active.
      moments: of the inputs of those that are told of.
    """
    layer, clustering = alike.layer, plan.clustering
    codebook, scale, chosen, active = tables
    stays = scale is not None and not (layer.scaled and jnp.dtype(codebook.dtype).itemsize > 1)
    if clustering.iterations == 0 or clustering.powers_of_two or stays:
        fixed = jnp.ones(codebook.shape, bool)
    else:
        fixed = alike.frozen_centroids | ((codebook == 0) & clustering.zero)
    whole = active & jnp.all(chosen, axis=-1)
    whole = jnp.all(whole, axis=tuple(range(1 + int(layer.stacks), whole.ndim)))
    compensate = functools.partial(compensated, input_axes=layer.input_axes)
    compensate = jax.vmap(compensate) if layer.stacks else compensate

    def close(arrays: Any, tables: Any) -> tuple[jax.Array, jax.Array, Any]:
        (weights, frozen, near, moments), (codebook, scale, fixed, whole) = arrays, tables
        return compensate(weights, frozen, near, codebook, scale, fixed, whole, moments)

    arrays = [
        (alike.weights[j], alike.frozen[j], near[j], own)
        for j, own in zip(told, moments, strict=True)
    ]
    tables = jax.tree.map(lambda x: x[np.array(told)], (codebook, scale, fixed, whole))
    return _one_by_one(close, arrays, tables)


def _of_blocks(layer: Layer, table: jax.Array) -> jax.Array:
    """Return a table [leaves, *numbers, ...] of codebooks as one of blocks: some may share one."""
    axes = len(layer.shape)
    return jnp.broadcast_to(table, (len(table), *layer.all_numbers, *table.shape[1 + axes :]))


def _of_codebooks(layer: Layer, reduce: Callable[..., jax.Array], table: jax.Array) -> jax.Array:
    """Return a table [leaves, *numbers, ...] of blocks as one of codebooks."""
    pairs = zip(layer.codebook_numbers, layer.all_numbers, strict=True)
    shared = tuple(1 + axis for axis, (own, blocks) in enumerate(pairs) if own != blocks)
    return reduce(table, axis=shared, keepdims=True) if shared else table


def _describe(
    plan: Plan, alike: list[_Alike], clustered: list[ClusteredLeaf], shared: list[_Shared]
) -> RoundInfo:
    rows: dict[str, dict[str, jax.Array]] = {name: {} for name in RoundInfo._fields}
    for part, found, new in zip(alike, clustered, shared, strict=True):
        layer, clusters = part.layer, found.clusters
        norm = jnp.where(clusters.norm > 0, clusters.norm, 1.0)
        row = {
            "loss": clusters.losses,
            "counts": clusters.counts,
            "clusters_frozen": jnp.mean(new.frozen_centroids, axis=-1, dtype=jnp.float32),
            "weights_frozen": new.frozen_share,
            "error_before": jnp.sum(clusters.losses, axis=-1) / norm,
            "error_after": new.free_loss / norm,
            "finite": clusters.finite,
        }
        first = () if layer.numbers is None else (layer.codebooks,)
        lead = len(part.members), *first
        tables = {
            name: value.reshape(*lead, *value.shape[1 + len(layer.shape) :])
            for name, value in row.items()
        }
        for place, own in zip(part.members, loops.unstacked(tables), strict=True):
            for name, value in own.items():
                rows[name][plan.selection.selected[place].path] = value
    paths = [layer.path for layer in plan.selection.selected]
    return RoundInfo(**{name: {path: row[path] for path in paths} for name, row in rows.items()})


def check_key(plan: Plan, key: Any) -> None:
    """Raise a ValueError for what is no key, or none where the plan draws."""
    if key is not None:
        checks.key("key", key)
    elif plan.partition == "random":
        raise ValueError("expected a key for partition='random', got None")


def _check(plan: Plan, params: Any, state: QuantState, sensitivity: Any) -> None:
    """Raise a ValueError that names the first leaf that does not fit the plan."""
    check_state(state)
    trees = {"params": params} | ({} if sensitivity is None else {"sensitivity": sensitivity})
    layers = plan.selection.layers
    for name, tree in trees.items():
        any_shape = name == "sensitivity"  # of what is left alone, which is not read
        expected = [(x.path, None if x.reason and any_shape else x.shape) for x in layers]
        leaves = check_leaves(name, tree, expected)
        prefix = "" if name == "params" else f"{name}: "
        pairs = zip(layers, leaves, strict=True)
        named = {prefix + x.path: leaf for x, leaf in pairs if x.reason is None}
        checks.values(named, nonnegative=named if name == "sensitivity" else ())
    for name in ("frozen", "codebooks", "frozen_centroids"):
        shapes = [x.shape if name == "frozen" else x.codebook_shape for x in layers]
        expected = [
            (layer.path, shape if layer.reason is None else None)
            for layer, shape in zip(layers, shapes, strict=True)
        ]
        check_leaves(f"state.{name}", getattr(state, name), expected)
    if not isinstance(state.round, jax.core.Tracer) and int(state.round) > plan.num_rounds:
        raise ValueError(
            f"state.round: expected at most {plan.num_rounds}, the rounds of the plan, "
            f"got {int(state.round)}: the state is of another plan"
        )


def _check_moments(plan: Plan, moments: dict[str, jax.Array]) -> None:
    """Raise a ValueError that names the first layer that cannot be compensated for so."""
    layers = {layer.path: layer for layer in plan.selection.selected}
    if moments and plan.shares_of == "weights":
        raise ValueError("moments: expected a plan of shares of clusters, got shares of weights")
    alike: dict[Any, str] = {}  # the first of those of a shape, which are one program
    for path, own in moments.items():
        layer = layers.get(path)
        if layer is None:
            raise ValueError(f"moments: expected paths of selected leaves, got {path}")
        lead = layer.shape[:1] if layer.stacks else ()
        if len(layer.shape) < 2 + len(lead):
            raise ValueError(f"moments: {path}: expected inputs and outputs, got {layer.shape}")
        inputs = math.prod(layer.shape[len(lead) + axis] for axis in layer.input_axes)
        shape = (*lead, inputs, inputs)
        if jnp.ndim(own) == len(shape) + 1:
            outputs = math.prod(layer.shape[len(lead) :]) // inputs
            groups = jnp.shape(own)[len(lead)]
            if not groups or outputs % groups:
                raise ValueError(
                    f"moments: {path}: expected groups into which its {outputs} outputs can be cut "
                    f"evenly, got {groups}"
                )
            shape = (*lead, groups, inputs, inputs)
        check_shape(f"moments: {path}", own, shape)
        first = alike.setdefault((layer.shape, layer.input_axes), path)
        if jnp.shape(own) != jnp.shape(moments[first]):
            raise ValueError(
                f"moments: {path}: expected the groups of outputs that {first} of this shape has, "
                f"got shapes {jnp.shape(own)} and {jnp.shape(moments[first])}"
            )
        sizes, numbers = layer.shape[len(lead) :], layer.all_numbers[len(lead) :]
        if not can_join(sizes, numbers, layer.input_axes):
            raise ValueError(
                f"moments: {path}: expected blocks that cut no axis of outputs after one that they "
                f"leave whole, got blocks of {layer.block} for {layer.shape}"
            )
    checks.values({f"moments: {path}": own for path, own in moments.items()})
    energies = {
        f"moments: {path}: the diagonal": jnp.diagonal(own, axis1=-2, axis2=-1)
        for path, own in moments.items()
    }
    checks.values(energies, nonnegative=energies)


def _gather(plan: Plan, *trees: Any) -> list[Any]:
    """Return the arrays of each selected leaf in some trees."""
    rows = zip(plan.selection.layers, *map(jax.tree.leaves, trees), strict=True)
    return [leaves for layer, *leaves in rows if layer.reason is None]


def _finish(alike: _Alike, shared: _Shared) -> list[_Leaf]:
    """Return the arrays of leaves as they are outside of a round."""
    number = len(alike.members)
    shape = (number, *alike.layer.codebook_shape)
    tables = {
        "codebook": shared.codebook.reshape(shape),
        "frozen_centroids": shared.frozen_centroids.reshape(shape),
    }
    scale = {"scale": jnp.zeros(())}
    if shared.scale is not None:
        tables["scale"] = shared.scale.reshape(number, *alike.layer.scale_shape)
    rows = zip(shared.weights, shared.frozen, loops.unstacked(tables), strict=True)
    return [_Leaf(weights, frozen, **(scale | own)) for weights, frozen, own in rows]


def _scatter(plan: Plan, tree: Any, new: Sequence[jax.Array]) -> Any:
    """Return a tree with new arrays in place of the selected leaves; the others are not touched."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = iter(new)
    pairs = zip(plan.selection.layers, leaves, strict=True)
    return jax.tree.unflatten(
        structure, [leaf if layer.reason else next(arrays) for layer, leaf in pairs]
    )
