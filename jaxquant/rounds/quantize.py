"""One round of quantization: what happens to one layer, and then to a tree of them."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from jaxquant import checks, loops
from jaxquant.clustering.clusters import Clusters, measure, settle, weight_scale
from jaxquant.clustering.codebooks import assign, reconstruct, to_powers_of_two
from jaxquant.clustering.histogram import Histogram, bin_width, histogram
from jaxquant.clustering.kmeans import is_usable, lloyd, named_start, pin
from jaxquant.clustering.passes import fold, rewrite
from jaxquant.meshes import compiled
from jaxquant.rounds.compensation import compensate
from jaxquant.rounds.partition import choose, priority, threshold, weight_priority
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.selection import Layer
from jaxquant.rounds.state import QuantState, check_state
from jaxquant.trees import leaves_with_paths, pure, replaced

_BATCH = 64  # codebooks solved side by side; bounds the memory of the dynamic program


class RoundInfo(NamedTuple):
    """What a round did, by the path of each selected leaf; leading [slices] if it has an axis."""

    loss: dict[str, jax.Array]  # [k] float32, (weighted) sum of squares of each cluster
    counts: dict[str, jax.Array]  # [k] int32, weights in each cluster
    clusters_frozen: dict[str, jax.Array]  # float32, share of the clusters, after the round
    weights_frozen: dict[str, jax.Array]  # float32, share of the weights, after the round
    error_before: dict[str, jax.Array]  # float32, squared distance to the codebook / squared norm
    error_after: dict[str, jax.Array]  # float32, the same over the weights that are still free
    finite: dict[str, jax.Array]  # bool; a layer that cannot be clustered is left as it was


# One layer ---------------------------------------------------------------------------------------


class _Clustered(NamedTuple):
    centroids: jax.Array  # [k] of the layer's dtype
    clusters: Clusters
    norm: jax.Array  # float32 scalar, (weighted) squared norm
    finite: jax.Array  # bool scalar


class _Shared(NamedTuple):
    weights: jax.Array
    frozen: jax.Array  # bool, like the weights
    centroids: jax.Array  # [k]
    frozen_centroids: jax.Array  # [k] bool
    frozen_share: jax.Array  # float32 scalar, of the weights
    free_loss: jax.Array  # float32 scalar, of the weights that are not frozen


def _measure(
    weights: jax.Array,
    sensitivity: jax.Array | None,
    statistic: Histogram,
    centroids: jax.Array,
    fixed: jax.Array,
) -> _Clustered:
    """Put the centroids into the layer's dtype and measure its clusters under them."""
    centroids = centroids.astype(weights.dtype)
    centroids, clusters = settle(weights, centroids, fixed, bin_width(statistic), sensitivity)
    clusters = clusters._replace(losses=clusters.losses * weight_scale(sensitivity))
    squares = jnp.square(weights.astype(jnp.float32))
    if sensitivity is not None:
        squares = squares * sensitivity.astype(jnp.float32)
    norm = jnp.sum(squares)
    # That a norm is not negative says nothing, but orders: sharing may then overwrite the weights.
    finite = is_usable(statistic, sensitivity) & ~(norm < 0)
    return _Clustered(centroids, clusters, norm, finite)


def _share_clusters(
    weights: jax.Array,
    frozen: jax.Array,
    centroids: jax.Array,
    frozen_centroids: jax.Array,
    clustered: _Clustered,
    chosen: jax.Array,
    active: jax.Array,
) -> _Shared:
    """Freeze the chosen clusters if the layer is active: all their weights onto the centroids."""
    new_centroids = clustered.centroids
    moving = _with_equals(new_centroids, chosen & active)

    def joins(weights: jax.Array) -> jax.Array:
        return _flags_of(assign(weights, new_centroids), moving)

    weights, frozen = _freeze(joins, active, new_centroids, frozen, weights)
    still = jnp.where(active, chosen, frozen_centroids)
    return _Shared(
        weights,
        frozen,
        jnp.where(active, new_centroids, centroids),
        still,
        _count(frozen).astype(jnp.float32) / frozen.size,
        jnp.sum(jnp.where(still, 0.0, clustered.clusters.losses)),
    )


def _share_weights(
    partition: str,
    fixed: bool,
    weights: jax.Array,
    frozen: jax.Array,
    sensitivity: jax.Array | None,
    noise: jax.Array | None,
    centroids: jax.Array,
    frozen_centroids: jax.Array,
    clustered: _Clustered,
    share: jax.Array,
    active: jax.Array,
) -> _Shared:
    """Freeze weights, up to a share of the layer's, if it is active: those onto their centroids.

    Of equal priorities all freeze. A centroid of frozen weights is frozen too; with a `fixed`
    codebook every centroid is, from the layer's first round on.
    """
    new_centroids = clustered.centroids
    extra = {"random": noise, "loss": sensitivity}.get(partition)
    extras = () if extra is None else (extra,)
    number = jnp.floor(share * frozen.size + 0.5).astype(jnp.int32)
    number = jnp.where(share < 1, number, frozen.size) - _count(frozen)

    def rank(weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return weight_priority(partition, weights, new_centroids, *extras)

    least = threshold(rank, (weights, *extras), frozen, number)

    def joins(weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return (rank(weights, *extras) >= least) & (number > 0)

    weights, frozen = _freeze(joins, active, new_centroids, frozen, weights, *extras)
    count = _count(frozen)
    importance = jnp.where(frozen, 0.0, jnp.float32(1.0) if sensitivity is None else sensitivity)
    free = measure(weights, new_centroids, importance)
    if fixed:
        used = jnp.ones_like(frozen_centroids)
    else:  # sample weights of zero everywhere would count alike
        members = measure(weights, new_centroids, frozen.astype(jnp.float32))
        used = (members.lows < jnp.inf) & (count > 0)
    return _Shared(
        weights,
        frozen,
        jnp.where(active, new_centroids, centroids),
        jnp.where(active, used, frozen_centroids),
        count.astype(jnp.float32) / frozen.size,
        jnp.sum(free.losses) * weight_scale(importance),
    )


def _share_compensated(
    weights: jax.Array,
    frozen: jax.Array,
    centroids: jax.Array,
    frozen_centroids: jax.Array,
    clustered: _Clustered,
    chosen: jax.Array,
    active: jax.Array,
    fixed: jax.Array,
    moments: jax.Array,
) -> _Shared:
    """As `_share_clusters`; a layer that is whole after it, so that its answers change least."""
    near = _share_clusters(weights, frozen, centroids, frozen_centroids, clustered, chosen, active)
    start, shape = clustered.centroids, (-1, weights.shape[-1])

    def close() -> tuple[jax.Array, jax.Array]:
        found = compensate(
            weights.reshape(shape).astype(jnp.float32),
            frozen.reshape(shape),
            start.astype(jnp.float32),
            ~fixed,
            moments,
        )
        centroids = jnp.where(fixed, start, found.centroids.astype(start.dtype))
        shared = reconstruct(found.codes, centroids).reshape(weights.shape)
        return jnp.where(frozen, weights, shared), centroids

    def keep() -> tuple[jax.Array, jax.Array]:
        return near.weights, near.centroids

    weights, centroids = loops.cond(active & jnp.all(chosen), close, keep)
    return near._replace(weights=weights, centroids=centroids)


def _with_equals(centroids: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return the chosen clusters, and those with the same centroid.

    Centroids that are equal (of bfloat16 weights, say) share their members' fate: which of them a
    weight gets depends on where it comes from.
    """
    equal = centroids[:, None] == centroids[None, :]
    return jnp.any(equal & chosen[None, :], axis=-1)


def _freeze(
    joins: Callable[..., jax.Array],
    active: jax.Array,
    centroids: jax.Array,
    frozen: jax.Array,
    weights: jax.Array,
    *extras: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Freeze the weights that join, in an active layer, and put what is frozen on its centroid."""

    def freeze(frozen: jax.Array, weights: jax.Array, *extras: jax.Array) -> jax.Array:
        return frozen | (joins(weights, *extras) & active)

    def move(frozen: jax.Array, weights: jax.Array, *_: jax.Array) -> jax.Array:
        nearest = reconstruct(assign(weights, centroids), centroids)
        return jnp.where(frozen & active, nearest, weights)

    frozen, weights, *_ = rewrite((freeze, move), frozen, weights, *extras)
    return weights, frozen


def _count(frozen: jax.Array) -> jax.Array:
    """Return the number of frozen weights, int32."""

    def count(number: jax.Array, frozen: jax.Array) -> jax.Array:
        return number + jnp.sum(frozen, dtype=jnp.int32)

    return fold(count, jnp.int32(0), frozen)  # of a whole mask XLA would write floats to memory


def _flags_of(codes: jax.Array, flags: jax.Array) -> jax.Array:
    """Return the flag of each code's cluster."""
    return flags.at[codes].get(mode="promise_in_bounds")


# The tree ----------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    """The arrays of a selected leaf; tables are shaped like the leaf's codebook."""

    weights: jax.Array
    frozen: jax.Array
    codebook: jax.Array
    frozen_centroids: jax.Array


class _Work(NamedTuple):
    """A selected leaf on its way through a round; codebooks as [slices, k]."""

    layer: Layer
    weights: jax.Array
    sensitivity: Any  # like the weights, or None
    frozen: jax.Array
    centroids: jax.Array
    frozen_centroids: jax.Array


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
    leaves = _check_tree(plan, params, "params")
    pairs = zip(plan.selection.layers, leaves, strict=True)
    checks.values({layer.path: leaf for layer, leaf in pairs if layer.reason is None})
    structure = jax.tree.structure(params)

    def tree_of(make: Callable[[Layer, jax.Array], jax.Array]) -> Any:
        made = [make(*pair) for pair in zip(plan.selection.layers, leaves, strict=True)]
        return jax.tree.unflatten(structure, made)

    def codebook(layer: Layer, leaf: jax.Array) -> jax.Array:
        dtype = leaf.dtype if layer.reason is None else jnp.float32  # a key has no zero
        return jnp.zeros(_codebook_shape(layer), dtype)

    def frozen(layer: Layer, leaf: jax.Array) -> jax.Array:
        # Computed from the leaf: its shape alone would not say, under jit, on which devices.
        return jnp.isnan(leaf) & False if layer.reason is None else jnp.bool_(False)

    return QuantState(
        codebooks=tree_of(codebook),
        frozen=tree_of(frozen),
        frozen_centroids=tree_of(lambda layer, _: jnp.zeros(_codebook_shape(layer), bool)),
        round=jnp.int32(0),
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
    trees = (params, state.frozen, state.codebooks, state.frozen_centroids)
    leaves = [_Leaf(*arrays) for arrays in _gather(plan, *trees)]
    weighed = None if sensitivity is None else [leaf for (leaf,) in _gather(plan, sensitivity)]
    changed, round_, info = compiled(
        _round,
        *(leaves, weighed, state.round, moments, key),
        like=(leaves, None, None),
        plan=plan,
    )
    new = [_scatter(plan, *pair) for pair in zip(trees, zip(*changed, strict=True), strict=True)]
    params, frozen, codebooks, frozen_centroids = new
    state = QuantState(codebooks, frozen, frozen_centroids, round_)
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
    # 1. Cluster every layer.
    statistics = [_on_slices(w.layer, histogram, _entries(w)) for w in work]
    solved = _solve(plan, work, statistics)
    clustered = [
        _on_slices(
            w.layer,
            _measure,
            _entries(w),
            (statistic, centroids, _immovable(plan, w, centroids)),
        )
        for w, centroids, statistic in zip(work, solved, statistics, strict=True)
    ]
    # 2. Partition: the only step that may look across layers. Weights need no look.
    finite = [c.finite for c in clustered]
    groups = [jnp.array(w.layer.groups) for w in work]
    over = round_ >= plan.num_rounds  # what was passed over, or comes from another plan, ends here
    active = [
        (growing[group] | (over & ~_whole(plan, w))) & ok
        for w, group, ok in zip(work, groups, finite, strict=True)
    ]
    chosen = shares = [share[group] for group in groups]
    if plan.shares_of == "clusters":
        chosen = _partition(plan, work, clustered, shares, active, key)
    # 3. Share.
    shared = []
    for i, (w, *results) in enumerate(zip(work, clustered, chosen, active, strict=True)):
        share_layer, arrays = _sharing(plan, w, i, key)
        tables = (w.centroids, w.frozen_centroids, *results)
        if w.layer.path in moments:
            share_layer = _share_compensated
            own = moments[w.layer.path].astype(jnp.float32)
            fixed = _immovable(plan, w, clustered[i].centroids)
            tables = (*tables, fixed, own[None] if w.layer.axis is None else own)
        shared.append(_on_slices(w.layer, share_layer, arrays, tables))
    info = _describe(work, clustered, shared, finite)
    changed = [_finish(w.layer, s) for w, s in zip(work, shared, strict=True)]
    return changed, jnp.minimum(round_ + 1, plan.num_rounds).astype(jnp.int32), info


def _sharing(
    plan: Plan, work: _Work, number: int, key: jax.Array | None
) -> tuple[Callable[..., _Shared], tuple[jax.Array | None, ...]]:
    """Return how layer `number` shares, and the arrays like its weights that it takes for that."""
    if plan.shares_of == "clusters":
        return _share_clusters, (work.weights, work.frozen)
    noise = None
    if plan.partition == "random" and key is not None:
        noise = jax.random.bits(jax.random.fold_in(key, number), work.weights.shape, jnp.uint32)
    share = functools.partial(_share_weights, plan.partition, plan.iterations == 0)
    return share, (work.weights, work.frozen, work.sensitivity, noise)


def _codebook_shape(layer: Layer) -> tuple[int, ...]:
    if layer.reason is not None:
        return ()  # no empty arrays: checkpoint libraries refuse them
    if layer.axis is None:
        return (layer.k,)
    slices = tuple(n if i == layer.axis else 1 for i, n in enumerate(layer.shape))
    return (*slices, layer.k)


def _on_slices(layer: Layer, function: Callable, arrays: Sequence, tables: Sequence = ()) -> Any:
    """Call a function of one layer on each slice; results have a leading [slices].

    `arrays` are shaped like the leaf, or None; `tables` are trees with a leading [slices].
    """
    if layer.axis is None:
        result = function(*arrays, *jax.tree.map(lambda x: x[0], tuple(tables)))
        return jax.tree.map(lambda x: x[None], result)
    axes = [None if array is None else layer.axis for array in arrays] + [0] * len(tables)
    return jax.vmap(function, in_axes=tuple(axes))(*arrays, *tables)


def _entries(work: _Work) -> tuple[jax.Array, jax.Array | None]:
    return work.weights, work.sensitivity


def _row(plan: Plan, round_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return this row's shares [groups], and which groups grow in it."""
    schedule = jnp.pad(jnp.asarray(plan.schedule), ((1, 0), (0, 0)))
    last = jnp.minimum(round_ + 1, plan.num_rounds)
    return schedule[last], (schedule[last] > schedule[last - 1]) & (round_ < plan.num_rounds)


def _whole(plan: Plan, work: _Work) -> jax.Array:
    """Return whether nothing is left to freeze, bool [slices]."""
    if plan.shares_of == "clusters":
        return jnp.all(work.frozen_centroids, axis=-1)
    return _on_slices(work.layer, jnp.all, (work.frozen,))


def _solve(plan: Plan, work: list[_Work], statistics: list[Histogram]) -> list[jax.Array]:
    """Return each layer's new centroids [slices, k]; one program for all layers of equal k."""
    solved: list[Any] = [None] * len(work)
    for k in sorted({w.layer.k for w in work}):
        members = [i for i, w in enumerate(work) if w.layer.k == k]
        stack = jax.tree.map(lambda *x: jnp.concatenate(x), *(statistics[i] for i in members))
        current = jnp.concatenate([work[i].centroids.astype(jnp.float32) for i in members])
        frozen = jnp.concatenate([work[i].frozen_centroids for i in members])
        centroids = _solve_stack(plan, stack, current, frozen)
        ends = list(itertools.accumulate(work[i].layer.slices for i in members))[:-1]
        for i, part in zip(members, jnp.split(centroids, ends), strict=True):
            solved[i] = part
    return solved


def _solve_stack(plan: Plan, stack: Histogram, current: jax.Array, frozen: jax.Array) -> jax.Array:
    """Cluster a stack of histograms; codebooks without a frozen centroid start anew."""
    k = current.shape[-1]
    fresh = ~jnp.any(frozen, axis=-1)

    def start(statistic: Histogram) -> jax.Array:
        return named_start(statistic, k, plan.init, zero=plan.zero)

    def improve(one: tuple[Histogram, jax.Array, jax.Array]) -> jax.Array:
        statistic, centroids, fixed = one
        centroids, still = pin(centroids, fixed, zero=plan.zero)
        centroids = lloyd(statistic, centroids, still, plan.iterations)
        if plan.powers_of_two:
            centroids = jnp.where(fixed, centroids, to_powers_of_two(centroids))
        return centroids

    starts = loops.cond(
        jnp.any(fresh), lambda: _batched(start, stack), lambda: jnp.zeros_like(current)
    )
    current = jnp.where(fresh[:, None], starts, current)
    return _batched(improve, (stack, current, frozen))


def _immovable(plan: Plan, work: _Work, centroids: jax.Array) -> jax.Array:
    """Return which of the new centroids [slices, k] must keep their value to the last bit."""
    if plan.iterations == 0 or plan.powers_of_two:
        return jnp.ones_like(work.frozen_centroids)
    return work.frozen_centroids | ((centroids == 0) & plan.zero)


def _batched(function: Callable, stack: Any) -> jax.Array:
    many = jax.tree.leaves(stack)[0].shape[0] > _BATCH
    return jax.lax.map(function, stack, batch_size=_BATCH) if many else jax.vmap(function)(stack)


def _partition(
    plan: Plan,
    work: list[_Work],
    clustered: list[_Clustered],
    shares: list[jax.Array],
    active: list[jax.Array],
    key: jax.Array | None,
) -> list[jax.Array]:
    """Return the clusters [slices, k] that are frozen after this round."""
    priorities = []
    for i, c in enumerate(clustered):
        own_key = None if key is None else jax.random.fold_in(key, i)
        cluster_priority = priority(plan.partition, c.clusters.losses, c.centroids, key=own_key)
        # A layer that stays as it is takes no other layer's place in the ranking.
        priorities.append(jnp.where(active[i][:, None], cluster_priority, -jnp.inf))
    frozen = [w.frozen_centroids for w in work]
    if not plan.network:
        return [jax.vmap(choose)(*x) for x in zip(priorities, frozen, shares, strict=True)]
    everything = jnp.concatenate([x.reshape(-1) for x in priorities])
    all_frozen = jnp.concatenate([x.reshape(-1) for x in frozen])
    chosen = choose(everything, all_frozen, shares[0][0])
    ends = list(itertools.accumulate(x.size for x in frozen))[:-1]
    parts = jnp.split(chosen, ends)
    return [part.reshape(x.shape) for part, x in zip(parts, frozen, strict=True)]


def _describe(
    work: list[_Work], clustered: list[_Clustered], shared: list[_Shared], finite: list[jax.Array]
) -> RoundInfo:
    rows: dict[str, dict[str, jax.Array]] = {name: {} for name in RoundInfo._fields}
    for w, c, s, ok in zip(work, clustered, shared, finite, strict=True):
        counts, losses = c.clusters.counts, c.clusters.losses
        norm = jnp.where(c.norm > 0, c.norm, 1.0)
        row = {
            "loss": losses,
            "counts": counts,
            "clusters_frozen": jnp.mean(s.frozen_centroids, axis=-1, dtype=jnp.float32),
            "weights_frozen": s.frozen_share,
            "error_before": jnp.sum(losses, axis=-1) / norm,
            "error_after": s.free_loss / norm,
            "finite": ok,
        }
        for name, value in row.items():
            rows[name][w.layer.path] = value[0] if w.layer.axis is None else value
    return RoundInfo(**rows)


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
    for name, tree in trees.items():
        pairs = zip(plan.selection.layers, _check_tree(plan, tree, name), strict=True)
        prefix = "" if name == "params" else f"{name}: "
        named = {prefix + x.path: leaf for x, leaf in pairs if x.reason is None}
        checks.values(named, nonnegative=named if name == "sensitivity" else ())
    for name in ("frozen", "codebooks", "frozen_centroids"):
        leaves = _check_tree(plan, getattr(state, name), f"state.{name}", shapes=False)
        for layer, leaf in zip(plan.selection.layers, leaves, strict=True):
            if layer.reason is None:
                shape = layer.shape if name == "frozen" else _codebook_shape(layer)
                _check_shape(f"state.{name}: {layer.path}", leaf, shape)
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
        if layer.axis not in (None, 0) or len(layer.shape) < (2 if layer.axis is None else 3):
            raise ValueError(
                f"moments: {path}: expected a codebook for the whole layer, or for each slice of "
                f"layers stacked along axis 0, got axis {layer.axis} of shape {layer.shape}"
            )
        lead = layer.shape[:1] if layer.axis == 0 else ()
        inputs = math.prod(layer.shape[len(lead) : -1])
        _check_shape(f"moments: {path}", own, (*lead, inputs, inputs))
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
    return [
        _Work(
            layer,
            leaf.weights,
            sensitivity,
            leaf.frozen,
            *(x.reshape(layer.slices, layer.k) for x in (leaf.codebook, leaf.frozen_centroids)),
        )
        for layer, leaf, sensitivity in rows
    ]


def _finish(layer: Layer, shared: _Shared) -> _Leaf:
    """Return the arrays of a leaf as they are outside of a round."""

    def leaf_shaped(x: jax.Array) -> jax.Array:
        return x[0] if layer.axis is None else jnp.moveaxis(x, 0, layer.axis)

    return _Leaf(
        leaf_shaped(shared.weights),
        leaf_shaped(shared.frozen),
        shared.centroids.reshape(_codebook_shape(layer)),
        shared.frozen_centroids.reshape(_codebook_shape(layer)),
    )


def _scatter(plan: Plan, tree: Any, new: Sequence[jax.Array]) -> Any:
    """Return a tree with new arrays in place of the selected leaves; the others are not touched."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = iter(new)
    pairs = zip(plan.selection.layers, leaves, strict=True)
    return jax.tree.unflatten(
        structure, [leaf if layer.reason else next(arrays) for layer, leaf in pairs]
    )


def _check_tree(plan: Plan, tree: Any, name: str, *, shapes: bool = True) -> list[jax.Array]:
    """Return the leaves, or raise a ValueError that names the first that is not the plan's."""
    pairs = leaves_with_paths(tree)
    layers = plan.selection.layers
    for layer, (path, leaf) in zip(layers, pairs, strict=False):
        if path != layer.path:
            raise ValueError(f"{name}: expected the leaf {layer.path}, got {path}")
        if shapes:
            _check_shape(f"{name}: {path}", leaf, layer.shape)
    if len(pairs) != len(layers):
        raise ValueError(f"{name}: expected the plan's {len(layers)} leaves, got {len(pairs)}")
    return [leaf for _, leaf in pairs]


def _check_shape(name: str, leaf: jax.Array, shape: tuple[int, ...]) -> None:
    if jnp.shape(leaf) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {jnp.shape(leaf)}")
