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

from jaxquant import checks, loops
from jaxquant.clustering.blocks import per_block
from jaxquant.clustering.kmeans import Clustering
from jaxquant.meshes import compiled
from jaxquant.rounds.cluster import ClusteredLeaf, cluster_leaf
from jaxquant.rounds.partition import choose, priority
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.selection import Layer, by_slice
from jaxquant.rounds.sharing import (
    LEAF_SHAPED,
    Shared,
    compensated,
    free_loss,
    share_clusters,
    share_weights,
)
from jaxquant.rounds.state import QuantState, centroids_of, check_state
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


class _Work(NamedTuple):
    """A selected leaf on its way through a round.

    Tables are those of its codebooks, `[*numbers, ...]`. Numbers are 1 for a single codebook, and
    in place of blocks that share one.
    """

    layer: Layer
    weights: jax.Array
    sensitivity: Any  # like the weights, or None
    frozen: jax.Array
    codebook: jax.Array  # [*numbers, k], as it is stored
    frozen_centroids: jax.Array  # like the codebook
    scale: Any  # [*numbers, 1], or None


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

    Layers of all sizes share one compiled solver: only the histogram and the passes over the
    weights are compiled for each shape. Cost: about four reads of the weights, more than twice that
    for shares of weights.

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
        [..., N] with D entries for each of N outputs, [slices, D, D] for layers stacked along axis
        0. For layers without, the nearest centroid. Plans of shares of clusters only.
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
    given, params = params, pure(params, only_parameters=True)
    state, sensitivity = pure(state), pure(sensitivity, only_parameters=True)
    _check(plan, params, state, sensitivity)
    moments = dict(moments or {})
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
    work = _start(plan, leaves, sensitivities)
    share, growing = _row(plan, round_)
    # 1. Cluster every block.
    clustered = _cluster(plan, work)
    # 2. Partition: the only step that may look across layers. Weights need no look.
    groups = [by_slice(w.layer, jnp.array(w.layer.groups)) for w in work]
    over = round_ >= plan.num_rounds  # what was passed over, or comes from another plan, ends here
    active = [
        (growing[group] | (over & ~_whole(plan, w))) & c.clusters.finite
        for w, group, c in zip(work, groups, clustered, strict=True)
    ]
    chosen = shares = [share[group] for group in groups]
    if plan.shares_of == "clusters":
        chosen = _partition(plan, work, clustered, shares, active, key)
    # 3. Share.
    shared = [
        _share(plan, number, *one, moments=moments.get(one[0].layer.path), key=key)
        for number, one in enumerate(zip(work, clustered, chosen, active, strict=True))
    ]
    info = _describe(plan, work, clustered, shared)
    changed = [_finish(*one) for one in zip(work, clustered, shared, active, strict=True)]
    return changed, jnp.minimum(round_ + 1, plan.num_rounds).astype(jnp.int32), info


def _share(
    plan: Plan,
    number: int,
    work: _Work,
    clustered: ClusteredLeaf,
    chosen: jax.Array,
    active: jax.Array,
    *,
    moments: jax.Array | None,
    key: jax.Array | None,
) -> Shared:
    """Freeze what a round freezes of leaf `number`; tables are those of its codebooks.

    `chosen` is what the partition gave: clusters [*numbers, k], or shares of the weights
    [*numbers].
    """
    layer, dtype = work.layer, work.weights.dtype
    new_centroids = centroids_of(clustered.clusters.centroids, clustered.scale, dtype)
    arrays: list[Any] = [work.weights, work.frozen]
    tables: list[Any] = [centroids_of(work.codebook, work.scale, dtype), work.frozen_centroids]
    tables += [new_centroids, chosen, active]
    options: dict[str, Any] = {}
    function = share_clusters
    if plan.shares_of == "weights":
        function = share_weights
        options = {"partition": plan.partition, "fixed": plan.clustering.iterations == 0}
        noise = None
        if plan.partition == "random" and key is not None:
            noise = jax.random.bits(jax.random.fold_in(key, number), work.weights.shape, jnp.uint32)
        arrays += [work.sensitivity, noise]
    of_blocks = [_of_blocks(layer, table) for table in tables]
    shared = per_block(function, arrays, of_blocks, leaf_shaped=LEAF_SHAPED, **options)
    if moments is not None:
        shared = _compensated(plan, work, shared, of_blocks[2:], moments.astype(jnp.float32))
    return shared._replace(
        frozen_centroids=_of_codebooks(layer, jnp.any, shared.frozen_centroids),
        frozen_share=_of_codebooks(layer, jnp.mean, shared.frozen_share),
    )


def _compensated(
    plan: Plan, work: _Work, near: Shared, tables: list[jax.Array], moments: jax.Array
) -> Shared:
    """Compensate for a layer that is whole after a round, or for each of those that are stacked.

    Args:
      plan: of the round.
      work: the leaf.
      near: the leaf with all that freezes on its nearest centroid.
      tables: of its blocks: new centroids, clusters that are frozen then, whether it is active.
      moments: of the layer's inputs.
    """
    layer = work.layer
    new_centroids, chosen, active = tables
    if work.scale is None:
        new_centroids = new_centroids.astype(work.codebook.dtype)  # and back, without a loss
    fixed = _of_blocks(layer, _immovable(plan.clustering, work, new_centroids))
    whole = active & jnp.all(chosen, axis=-1)
    together = jnp.all(whole, axis=tuple(range(int(layer.stacks), whole.ndim)))
    compensate = jax.vmap(compensated) if layer.stacks else compensated
    arrays = work.weights, work.frozen, near.weights, new_centroids, fixed, together, moments
    weights, centroids = compensate(*arrays)
    centroids = jnp.where(whole[..., None], centroids.astype(near.centroids.dtype), near.centroids)
    return near._replace(weights=weights, centroids=centroids)


def _of_blocks(layer: Layer, table: jax.Array) -> jax.Array:
    """Return a table of a leaf's codebooks as one of its blocks, some of which may share one."""
    return jnp.broadcast_to(table, (*layer.all_numbers, *table.shape[len(layer.shape) :]))


def _of_codebooks(layer: Layer, reduce: Callable[..., jax.Array], table: jax.Array) -> jax.Array:
    """Return a table of a leaf's blocks as one of its codebooks, each of which some may share."""
    pairs = zip(layer.codebook_numbers, layer.all_numbers, strict=True)
    shared = tuple(axis for axis, (own, blocks) in enumerate(pairs) if own != blocks)
    return reduce(table, axis=shared, keepdims=True) if shared else table


def _row(plan: Plan, round_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return this row's shares [groups], and which groups grow in it."""
    schedule = jnp.pad(jnp.asarray(plan.schedule), ((1, 0), (0, 0)))
    last = jnp.minimum(round_ + 1, plan.num_rounds)
    return schedule[last], (schedule[last] > schedule[last - 1]) & (round_ < plan.num_rounds)


def _whole(plan: Plan, work: _Work) -> jax.Array:
    """Return whether nothing is left to freeze, bool [*numbers] of the codebooks."""
    if plan.shares_of == "clusters":
        return jnp.all(work.frozen_centroids, axis=-1)
    tables = [_of_blocks(work.layer, work.frozen_centroids)]
    whole = per_block(_all, [work.frozen], tables, leaf_shaped=False)
    return _of_codebooks(work.layer, jnp.all, whole)


def _all(frozen: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.all(frozen)


def _cluster(plan: Plan, work: list[_Work]) -> list[ClusteredLeaf]:
    """Return the clusters of every leaf; leaves that are alike are one program."""
    alike: dict[Any, list[int]] = {}
    for number, w in enumerate(work):
        kind = dataclasses.replace(w.layer, path="", groups=None, depth=0)
        weighed = None if w.sensitivity is None else w.sensitivity.dtype
        alike.setdefault((kind, weighed), []).append(number)
    found: dict[int, ClusteredLeaf] = {}
    for members in alike.values():
        rows = [(work[i].weights, work[i].sensitivity) for i in members]
        tables = [(work[i].codebook, work[i].frozen_centroids, work[i].scale) for i in members]
        function = functools.partial(
            cluster_leaf, layer=work[members[0]].layer, clustering=plan.clustering
        )
        found |= dict(zip(members, _one_by_one(function, rows, tables), strict=True))
    return [found[i] for i in range(len(work))]


def _one_by_one(
    function: Callable[..., Any], arrays: Sequence[Any], tables: Sequence[Any]
) -> list[Any]:
    """Call a function on the arrays and the tables of each leaf, in a single program.

    Results are tables. One leaf at a time is copied to where the program reads it.
    """
    if len(arrays) == 1:
        return [function(*arrays[0], *tables[0])]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tables)
    choices = [lambda own=own: own for own in arrays]

    def step(_: None, inputs: tuple[jax.Array, Any]) -> tuple[None, Any]:
        number, own = inputs
        return None, function(*loops.switch(number, choices), *own)

    numbers = jnp.arange(len(arrays), dtype=jnp.int32)
    _, results = loops.scan(step, None, (numbers, stacked))
    return [jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(arrays))]


def _immovable(clustering: Clustering, work: _Work, centroids: jax.Array) -> jax.Array:
    """Return which of the new centroids must keep their value to the last bit."""
    if clustering.iterations == 0 or clustering.powers_of_two or work.scale is not None:
        return jnp.ones_like(work.frozen_centroids)
    return work.frozen_centroids | ((centroids == 0) & clustering.zero)


def _partition(
    plan: Plan,
    work: list[_Work],
    clustered: list[ClusteredLeaf],
    shares: list[jax.Array],
    active: list[jax.Array],
    key: jax.Array | None,
) -> list[jax.Array]:
    """Return the clusters [*numbers, k] that are frozen after this round."""
    priorities = []
    for i, c in enumerate(clustered):
        own_key = None if key is None else jax.random.fold_in(key, i)
        own = c.clusters
        cluster_priority = priority(plan.partition, own.losses, own.centroids, key=own_key)
        # A layer that stays as it is takes no other layer's place in the ranking.
        priorities.append(jnp.where(active[i][..., None], cluster_priority, -jnp.inf))
    frozen = [w.frozen_centroids for w in work]
    if not plan.network:
        return [_choose(*x) for x in zip(priorities, frozen, shares, strict=True)]
    everything = jnp.concatenate([x.reshape(-1) for x in priorities])
    all_frozen = jnp.concatenate([x.reshape(-1) for x in frozen])
    chosen = choose(everything, all_frozen, shares[0].reshape(-1)[0])
    ends = list(itertools.accumulate(x.size for x in frozen))[:-1]
    parts = jnp.split(chosen, ends)
    return [part.reshape(x.shape) for part, x in zip(parts, frozen, strict=True)]


def _choose(priorities: jax.Array, frozen: jax.Array, shares: jax.Array) -> jax.Array:
    """Return the clusters [*numbers, k] of a leaf that are frozen after this round."""
    function = choose
    for _ in range(shares.ndim):
        function = jax.vmap(function)
    return function(priorities, frozen, shares)


def _describe(
    plan: Plan, work: list[_Work], clustered: list[ClusteredLeaf], shared: list[Shared]
) -> RoundInfo:
    rows: dict[str, dict[str, jax.Array]] = {name: {} for name in RoundInfo._fields}
    for w, c, s in zip(work, clustered, shared, strict=True):
        layer, own = w.layer, c.clusters
        norm = jnp.where(own.norm > 0, own.norm, 1.0)
        row = {
            "loss": own.losses,
            "counts": own.counts,
            "clusters_frozen": jnp.mean(s.frozen_centroids, axis=-1, dtype=jnp.float32),
            "weights_frozen": s.frozen_share,
            "error_before": jnp.sum(own.losses, axis=-1) / norm,
            "error_after": _free_loss(plan, w, c, s) / norm,
            "finite": own.finite,
        }
        first = () if layer.numbers is None else (layer.codebooks,)
        for name, value in row.items():
            rows[name][layer.path] = value.reshape(*first, *value.shape[len(layer.shape) :])
    return RoundInfo(**rows)


def _free_loss(plan: Plan, work: _Work, clustered: ClusteredLeaf, shared: Shared) -> jax.Array:
    """Return the loss [*numbers] of what is still free under each codebook."""
    if plan.shares_of == "clusters":
        still = jnp.where(shared.frozen_centroids, 0.0, clustered.clusters.losses)
        return jnp.sum(still, axis=-1)
    centroids = centroids_of(clustered.clusters.centroids, clustered.scale, work.weights.dtype)
    arrays = shared.weights, shared.frozen, work.sensitivity
    tables = [_of_blocks(work.layer, centroids)]
    losses = per_block(free_loss, arrays, tables, leaf_shaped=False)
    return _of_codebooks(work.layer, jnp.sum, losses)


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
        leaves = check_leaves(name, tree, [(layer.path, layer.shape) for layer in layers])
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
    for path, own in moments.items():
        layer = layers.get(path)
        if layer is None:
            raise ValueError(f"moments: expected paths of selected leaves, got {path}")
        lead = layer.shape[:1] if layer.stacks else ()
        if len(layer.shape) < 2 + len(lead):
            raise ValueError(f"moments: {path}: expected inputs and outputs, got {layer.shape}")
        inputs = math.prod(layer.shape[len(lead) : -1])
        check_shape(f"moments: {path}", own, (*lead, inputs, inputs))
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


def _start(plan: Plan, leaves: list[_Leaf], sensitivities: list[jax.Array] | None) -> list[_Work]:
    layers = plan.selection.selected
    rows = zip(layers, leaves, sensitivities or [None] * len(layers), strict=True)

    def table(layer: Layer, x: jax.Array) -> jax.Array:
        return x.reshape(*layer.codebook_numbers, layer.k)

    return [
        _Work(
            layer,
            leaf.weights,
            sensitivity,
            leaf.frozen,
            table(layer, leaf.codebook),
            table(layer, leaf.frozen_centroids),
            None if layer.scale_dtype is None else leaf.scale,
        )
        for layer, leaf, sensitivity in rows
    ]


def _finish(work: _Work, clustered: ClusteredLeaf, shared: Shared, active: jax.Array) -> _Leaf:
    """Return the arrays of a leaf as they are outside of a round."""
    layer, scale = work.layer, jnp.zeros(())
    if clustered.scale is None:
        codebook = shared.centroids.astype(work.codebook.dtype)  # which rounding has been to
    else:
        new = clustered.clusters.centroids
        codebook = jnp.where(active[..., None], new, work.codebook)
        shared_by = tuple(axis for axis, number in enumerate(work.scale.shape) if number == 1)
        taken = jnp.any(active[..., None], axis=shared_by, keepdims=True)
        scale = jnp.where(taken, clustered.scale, work.scale)
    return _Leaf(
        shared.weights,
        shared.frozen,
        codebook.reshape(layer.codebook_shape),
        shared.frozen_centroids.reshape(layer.codebook_shape),
        scale,
    )


def _scatter(plan: Plan, tree: Any, new: Sequence[jax.Array]) -> Any:
    """Return a tree with new arrays in place of the selected leaves; the others are not touched."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = iter(new)
    pairs = zip(plan.selection.layers, leaves, strict=True)
    return jax.tree.unflatten(
        structure, [leaf if layer.reason else next(arrays) for layer, leaf in pairs]
    )
