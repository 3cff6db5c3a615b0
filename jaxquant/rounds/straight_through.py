"""Training weights that the loss already sees quantized, and codes that may change once more."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxquant import checks, loops
from jaxquant.clustering.blocks import elementwise, nearest, numbers_of, reduced
from jaxquant.meshes import compiled
from jaxquant.rounds.centroids import sums_of_blocks
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.state import QuantState, block_codebooks, check_state
from jaxquant.trees import check_leaves, pure, replaced

_COLDEST = 1e-12  # temperature; below it counts as 0


def straight_through(plan: Plan, params: Any, state: QuantState, *, temperature: Any = 0.0) -> Any:
    """Return the parameters as the network has them once all is quantized; gradients go through.

    A free weight takes the centroid that is nearest, and hands the gradient on as if it had not
    (Bengio et al., arXiv 1308.3432; with codebooks that train, "LSQ", Esser et al., ICLR 2020). So
    weights that are still free train for what they will be, and their codes may change. Frozen
    weights are what they are, and get no gradient. What has no codebook yet stays float: layers,
    and slices of stacked ones. So does a weight that is NaN or infinite.

    The centroids of free weights get their gradients too, by `state.codebooks` and `state.scales`:
    sums over the weights that share them, so they want a smaller learning rate, or a division by
    the square root of the members. Centroids that are exactly zero get none.

        def loss(params, tables):
            own = state._replace(codebooks=tables)
            return task_loss(jq.straight_through(plan, params, own), batch)

    Above a temperature T of 0 a free weight w is seen as a mean of all centroids instead, in shares
    that fall with distance, `softmax_c(-((w - c) / d)**2 / T)`, where d is the mean distance of
    neighbouring centroids of its block; gradients are those of the mean. A weight between two
    centroids then feels which way it should go, where straight through it jumps to and fro. From
    0.5 down to 0.02 there is less and less between; then take 0, to train for what will be
    (Agustsson et al., "Soft-to-Hard Vector Quantization", NeurIPS 2017; Cho et al., "DKM", ICLR
    2022).

    Begin with the codebooks of a round (`release` what it froze, beside the weights before it), or
    with those of a plan that is done, whose codes then may change once more; end with `settle`.

    Args:
      plan: of the state.
      params: tree of weights.
      state: with codebooks, from `quantize_round` or `release`.
      temperature: scalar, not negative; may be traced: one compile for a whole schedule. Below
        1e-12 it counts as 0.

    Returns:
      Tree like `params`. Pure, under jit and grad; costs a pass over the weights, and another one
      with sums by centroid in the backward pass. Above a temperature of 0 it costs k exponentials
      and as many floats in memory for a weight.

    Raises:
      ValueError: if the trees do not fit the plan; names the leaf. For a temperature that is no
        scalar, or negative.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.array([[0.1, 0.9], [2.2, 1.8]])}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> state = release(jq.quantize_round(plan, params, jq.init(plan, params))[1])
    >>> jax.grad(lambda x: jnp.sum(straight_through(plan, x, state)["kernel"]))(params)["kernel"]
    Array([[1., 1.],
           [1., 1.]], dtype=float32)
    """
    given, params, state = params, pure(params, only_parameters=True), pure(state)
    _check(plan, params, state)
    temperature = _temperature(temperature)

    def leaf(weights: jax.Array, frozen: jax.Array, centroids: jax.Array) -> jax.Array:
        if not centroids.ndim:
            return weights
        if temperature is None:
            return compiled(_seen, weights, frozen, centroids, like=weights)
        return compiled(_seen_warm, weights, frozen, centroids, temperature, like=weights)

    seen = jax.tree.map(leaf, params, state.frozen, block_codebooks(state, params))
    return replaced(given, seen, only_parameters=True)


@jax.custom_vjp
def _seen(weights: jax.Array, frozen: jax.Array, centroids: jax.Array) -> jax.Array:
    return jnp.where(frozen | _is_float(weights, centroids), weights, nearest(weights, centroids))


def _is_float(weights: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return which weights stay as they are: those without a codebook, and what is no number."""
    has_codebook = jnp.any(centroids != 0, axis=-1, keepdims=True)  # zeros before its first round
    return elementwise(_without, (weights,), (has_codebook,))


def _without(weights: jax.Array, has_codebook: jax.Array) -> jax.Array:
    return ~(has_codebook[0] & jnp.isfinite(weights))


def _forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _seen(*arrays), arrays


def _backward(arrays: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[Any, ...]:
    weights, frozen, centroids = arrays
    sums = sums_of_blocks((weights, gradient, ~frozen), (centroids, centroids != 0))
    straight = jnp.where(frozen, jnp.zeros_like(gradient), gradient)
    return straight, None, sums.astype(centroids.dtype)


_seen.defvjp(_forward, _backward)


def _temperature(temperature: Any) -> jax.Array | None:
    """Return the temperature, or None for one that is known to be zero."""
    if jnp.ndim(temperature):
        raise ValueError(f"expected a scalar temperature, got shape {jnp.shape(temperature)}")
    if isinstance(temperature, jax.core.Tracer):
        return jnp.asarray(temperature, jnp.float32)
    if not float(temperature) >= 0:
        raise ValueError(f"expected a temperature of at least 0, got {temperature}")
    return jnp.float32(temperature) if temperature else None


def _seen_warm(
    weights: jax.Array, frozen: jax.Array, centroids: jax.Array, temperature: jax.Array
) -> jax.Array:
    arrays = weights, frozen, centroids
    return loops.cond(
        temperature >= _COLDEST, _mixed, lambda *arrays: _seen(*arrays[:3]), *arrays, temperature
    )


def _mixed(
    weights: jax.Array, frozen: jax.Array, centroids: jax.Array, temperature: jax.Array
) -> jax.Array:
    wide = jnp.promote_types(centroids.dtype, jnp.float32)
    table = centroids.astype(wide)
    table = jnp.where(table != 0, table, jax.lax.stop_gradient(table))
    ends = jax.lax.stop_gradient((jnp.min(table, axis=-1), jnp.max(table, axis=-1)))
    apart = (ends[1] - ends[0]) / max(table.shape[-1] - 1, 1)
    sharpness = jnp.where(apart > 0, 1.0 / jnp.where(apart > 0, apart, 1.0), 0.0)
    sharpness = sharpness / jnp.sqrt(jnp.where(temperature >= _COLDEST, temperature, 1.0))
    mean = elementwise(_mean, (weights,), (table, sharpness.astype(wide)))
    mean = jnp.where(_is_float(weights, centroids), weights, mean.astype(weights.dtype))
    return jnp.where(frozen, jax.lax.stop_gradient(weights), mean)


def _mean(weights: jax.Array, centroids: jax.Array, sharpness: jax.Array) -> jax.Array:
    """Return the mean of centroids [k, ...] in shares that fall with their distance.

    Scores are squared distances less that of the nearest, whose own is 0 however XLA rounds: where
    it computes them anew for the largest, others may come out above all of them.
    """
    away = jax.lax.stop_gradient(jax.vmap(lambda centroid: jnp.abs(weights - centroid))(centroids))
    tables = jax.vmap(lambda centroid: jnp.broadcast_to(centroid, weights.shape))(centroids)
    is_nearest = away == jnp.min(away, axis=0, keepdims=True)
    near = jax.lax.stop_gradient(jnp.max(jnp.where(is_nearest, tables, -jnp.inf), axis=0))

    def score(centroid: jax.Array) -> jax.Array:
        beyond = (weights - centroid) + (weights - near)
        return -(sharpness * (near - centroid)) * (sharpness * beyond)

    shares = jax.nn.softmax(jax.vmap(score)(centroids), axis=0)
    return jnp.sum(jax.vmap(jnp.multiply)(shares, centroids), axis=0)


def release(state: QuantState) -> QuantState:
    """Return the state with its codebooks and nothing frozen: all codes may change again.

    Weights that stand on their centroids stay there until something moves them.

    Args:
      state: from `quantize_round`, or of an optimizer.

    Raises:
      ValueError: for what is no state.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.eye(8)}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> _, state, _ = jq.quantize_round(plan, params, jq.init(plan, params))
    >>> bool(jnp.any(release(state).frozen["kernel"]))
    False
    """
    check_state(state)
    masks = state.frozen, state.frozen_centroids
    frozen, centroids = jax.tree.map(lambda mask: mask & False, masks)
    return state._replace(frozen=frozen, frozen_centroids=centroids)


def settle(plan: Plan, params: Any, state: QuantState) -> tuple[Any, QuantState]:
    """Put every free weight on the centroid that is nearest, and freeze it: the end of a plan.

    Codebooks stay as they are, where a round would find others. What has none, as no round has
    reached it yet or all of its weights were zero then, cannot be settled: an error outside of jit;
    inside it stays free, and the next `quantize_round` freezes it.

    Args:
      plan: of the state.
      params: tree of weights.
      state: with codebooks.

    Returns:
      Params and state, as after the last round: for `pack`, `report` and others.

    Raises:
      ValueError: if the trees do not fit the plan, for weights that are not finite and for those
        without a codebook; names the leaf.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.array([[0.1, 0.9], [2.2, 1.8]])}
    >>> plan = jq.slq(params, bits=2, rounds=(3,))
    >>> state = release(jq.quantize_round(plan, params, jq.init(plan, params))[1])
    >>> params, state = settle(plan, params, state)
    >>> bool(jq.is_on_codebook(params, state)["kernel"])
    True
    """
    state = pure(state)
    given, params = params, pure(params, only_parameters=True)
    _check(plan, params, state)
    selected = [layer.reason is None for layer in plan.selection.layers]
    structure = jax.tree.structure(params)
    trees = params, state.frozen, state.frozen_centroids, block_codebooks(state, params)
    rows = list(zip(*map(jax.tree.leaves, trees), strict=True))
    named = zip(plan.selection.layers, rows, strict=True)
    checks.values({layer.path: row[0] for layer, row in named if layer.reason is None})
    settled = [
        compiled(_settled, *row, like=(row[0], row[1], row[2])) if own else row[:3]
        for own, row in zip(selected, rows, strict=True)
    ]
    for layer, (_, frozen, _) in zip(plan.selection.layers, settled, strict=True):
        left = jnp.sum(~frozen) if layer.reason is None else 0
        if not isinstance(left, jax.core.Tracer) and left:
            raise ValueError(
                f"{layer.path}: expected a codebook for all weights, got none for {left} of "
                f"{frozen.size}: quantize a round that reaches them first"
            )
    params, frozen, centroids = (structure.unflatten(x) for x in zip(*settled, strict=True))
    round_ = jnp.full_like(state.round, plan.num_rounds)
    state = state._replace(frozen=frozen, frozen_centroids=centroids, round=round_)
    return replaced(given, params, only_parameters=True), state


def _settled(
    weights: jax.Array, frozen: jax.Array, frozen_centroids: jax.Array, centroids: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return a leaf on its centroids, and the masks: blocks that are not on them stay free."""
    near = nearest(weights, centroids)
    settled = jnp.where(frozen | _is_float(weights, centroids), weights, near)

    def are_done(table: jax.Array) -> jax.Array:
        numbers = numbers_of(table.shape, weights.shape)
        return reduced(jnp.all, settled == near, numbers).reshape(*table.shape[:-1], 1)

    frozen = elementwise(_joined, (frozen,), (are_done(centroids),))
    return settled, frozen, frozen_centroids | are_done(frozen_centroids)


def _joined(frozen: jax.Array, done: jax.Array) -> jax.Array:
    return frozen | done[0]


def _check(plan: Plan, params: Any, state: QuantState) -> None:
    check_state(state)
    layers = plan.selection.layers
    check_leaves("params", params, [(layer.path, layer.shape) for layer in layers])
    for name, shapes in {
        "frozen": [layer.shape for layer in layers],
        "codebooks": [layer.codebook_shape for layer in layers],
    }.items():
        expected = [
            (layer.path, None if layer.reason else shape)
            for layer, shape in zip(layers, shapes, strict=True)
        ]
        check_leaves(f"state.{name}", getattr(state, name), expected)
