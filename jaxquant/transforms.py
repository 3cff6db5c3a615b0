"""Quantization inside an optax optimizer: keep frozen weights in place, or run a whole plan."""

import itertools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxquant.quantize import QuantState, nearest, quantize_round
from jaxquant.quantize import init as init_quantization
from jaxquant.schedules import Plan

# Steps after a round in which frozen weights are still moved onto their centroids: p + (c - p) may
# miss c by a rounding. Once p is near c the difference is exact (Sterbenz), so that the second or
# third step lands; differences in bfloat16 of float32 weights take up to two more.
_LANDING_STEPS = 8


def freeze_quantized() -> optax.GradientTransformationExtraArgs:
    """Zero the updates of frozen weights; put it last in `optax.chain`.

    `u <- 0 where frozen, u elsewhere`, on the *final* update. Masking gradients instead is not
    enough: momentum from before the freeze and weight decay would still move the weight. The value
    under the mask does not matter, NaN and infinity included. The optimizer's own state goes on as
    if nothing were frozen. Costs one `select` per leaf, which XLA fuses into the update.

    The optimizers whose evaluated weights are not the trained ones need the same mask once more:
    for `optax.contrib.schedule_free` (which trains y, and evaluates an average x of past iterates)
    that is `jax.tree.map(jnp.where, frozen, params, schedule_free_eval_params(state, params))`, for
    a moving average of the parameters likewise. `optax.lbfgs` hands every extra argument on to its
    `value_fn`, which must name `frozen` among its parameters.

    Source: Xu et al., "Deep Neural Network Compression with Single and Multiple Level
    Quantization", AAAI 2018: their released code applies its 0/1 mask to the final update, after
    momentum and weight decay.

    `update(updates, state, params=None, *, frozen)` takes the mask as a keyword.

    Args:
      frozen: the tree `QuantState.frozen`, with the structure of the updates; per leaf a bool array
        of the leaf's shape, or a scalar bool for the whole leaf (True = frozen). May be traced.

    Returns:
      The transformation; its state is `optax.EmptyState()`.

    Raises:
      ValueError: By `update`, at trace time, if `frozen` is missing (a wrapper that drops extra
        arguments, such as `optax.MultiSteps(...).gradient_transformation()`, loses it: use
        `MultiSteps` itself), or if its structure or a leaf's shape or dtype is not as above.

    >>> params, frozen = {"w": jnp.ones(2)}, {"w": jnp.array([True, False])}
    >>> tx = optax.chain(optax.sgd(0.5), freeze_quantized())
    >>> tx.update(params, tx.init(params), params, frozen=frozen)[0]["w"].tolist()
    [0.0, -0.5]
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        frozen: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra
        if frozen is None:
            raise ValueError(
                "expected the keyword argument frozen=state.frozen in tx.update(...), got none"
            )
        _check_structure(updates, frozen)
        return jax.tree_util.tree_map_with_path(_zero_frozen, updates, frozen), state

    return optax.GradientTransformationExtraArgs(init, update)


def _zero_frozen(path: tuple[Any, ...], update: jax.Array, frozen: Any) -> jax.Array:
    """Return `update` with exact zeros where `frozen`."""
    frozen = jnp.asarray(frozen)
    if frozen.dtype != jnp.bool_:
        raise ValueError(f"expected frozen of dtype bool at {_name(path)}, got {frozen.dtype}")
    if frozen.shape not in ((), jnp.shape(update)):
        raise ValueError(
            f"expected frozen of shape {jnp.shape(update)} or () at {_name(path)}, "
            f"got {frozen.shape}"
        )
    return _zero(frozen, update)


def _check_structure(updates: Any, frozen: Any) -> None:
    """Raise if the two trees differ, naming the leaf at which they part."""
    expected, got = jax.tree.structure(updates), jax.tree.structure(frozen)
    if expected == got:
        return
    wanted, given = _paths(updates), _paths(frozen)
    missing = next((path for path in wanted if path not in given), None)
    surplus = next((path for path in given if path not in wanted), None)
    if missing is not None:
        raise ValueError(f"expected frozen to have the updates' structure, got no leaf {missing}")
    if surplus is not None:
        raise ValueError(f"expected frozen to have the updates' structure, got a leaf {surplus}")
    raise ValueError(f"expected frozen to have the updates' structure {expected}, got {got}")


def _paths(tree: Any) -> list[str]:
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name(path: tuple[Any, ...]) -> str:
    return repr(jax.tree_util.keystr(path, simple=True, separator="/"))


class IncrementalState(NamedTuple):
    """State of `incremental`; `optax.tree.get` finds its fields."""

    step: jax.Array  # int32 scalar, updates so far
    quant: QuantState
    inner: optax.OptState  # of the optimizer inside


def incremental(
    tx: optax.GradientTransformation,
    plan: Plan,
    steps_per_round: int | Sequence[int],
    *,
    restart: bool = False,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run a whole plan inside an optimizer; the training loop does not change.

    Round r starts at the update after `sum(steps_per_round[:r])` others, so the first update
    quantizes the parameters as they are. An update that starts a round moves the weights of the
    round's clusters onto their centroids, `c - p`, and nothing else: its gradient was that of other
    weights, and is dropped. All others are those of `tx` where weights are free, and zero where
    they are frozen. In the first steps after a round frozen weights get `c - p` again, because
    `p + (c - p)` may miss `c` by a rounding: they are on the codebook bit for bit from the fourth
    update after the one that froze them (the sixth, if updates have a narrower dtype than the
    weights), and stay.

    Everything is in the state, which is checkpointed, sharded and donated as that of any optimizer.
    Pure, under jit, vmap and scan; one compile for all rounds, a `lax.cond` chooses. It must be
    outermost but for wrappers that call it or do not (`MultiSteps`, `apply_if_finite`,
    `inject_hyperparams`): what changes its updates would move frozen weights. Costs a select for
    each weight, and in the rounds' first steps an assignment.

    Source: Xu et al., AAAI 2018, whose rounds it runs; INQ (Zhou et al., ICLR 2017) has the same
    loop.

    Args:
      tx: the optimizer of the free weights.
      plan: from `slq`, `mlq`.
      steps_per_round: updates in each round, the one that starts it included; a number for all
        rounds, or one for each. The last round has no end: train until `sum(steps_per_round)`.
      restart: start `tx` anew in each round, its momentum and its learning rate schedule.
      key: typed key, for `partition="random"` only.

    Returns:
      The transformation; its state is an `IncrementalState`, from which `quant_state` takes what
      `report`, `pack` and others want. `update(updates, state, params, *, sensitivity=None,
      **extra)` needs the parameters; `sensitivity` is that of `quantize_round`, read in the updates
      that start a round; other extra arguments go to `tx`.

    Raises:
      ValueError: for steps that are not positive or not as many as rounds, a missing key; by
        `init` and `update` for parameters that are missing or not the plan's, and for float16
        updates of wider weights; names the leaf.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    >>> tx = incremental(optax.adam(0.01), jq.mlq(params, groups=1), steps_per_round=10)
    >>> state, update = tx.init(params), jax.jit(tx.update)
    >>> for _ in range(20):
    ...     updates, state = update(params, state, params)  # the gradient of sum(w**2) / 2
    ...     params = optax.apply_updates(params, updates)
    >>> int(jnp.unique(params["kernel"]).size)
    3
    """
    starts = jnp.array(_starts(plan, steps_per_round), jnp.int32)
    if plan.partition == "random" and key is None:
        raise ValueError("expected a key for partition='random', got None")
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> IncrementalState:
        return IncrementalState(jnp.int32(0), init_quantization(plan, params), tx.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sensitivity: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("expected tx.update(updates, state, params), got no params")
        jax.tree_util.tree_map_with_path(_check_dtype, state.quant.frozen, params, updates)
        step, quant, inner = state

        # Everything that is traced is an operand: what is closed over would look like a constant.
        def start_round(
            updates: Any, params: Any, quant: QuantState, inner: Any, sensitivity: Any
        ) -> tuple[optax.Updates, QuantState, optax.OptState]:
            own_key = None if key is None else jax.random.fold_in(key, quant.round)
            moved, new, _ = quantize_round(
                plan, params, quant, sensitivity=sensitivity, key=own_key
            )
            change = jax.tree.map(_difference, moved, params, updates)
            return change, new, tx.init(params) if restart else inner

        def train(
            updates: Any, params: Any, quant: QuantState, inner: Any, sensitivity: Any
        ) -> tuple[optax.Updates, QuantState, optax.OptState]:
            del sensitivity
            free, new = tx.update(updates, inner, params, **extra)
            free = jax.tree.map(lambda new, old: new.astype(old.dtype), free, updates)
            landing = step < starts[jnp.maximum(quant.round - 1, 0)] + _LANDING_STEPS
            change = jax.lax.cond(
                landing,
                lambda *trees: jax.tree.map(_land, *trees),
                lambda frozen, codebooks, params, free: jax.tree.map(_zero, frozen, free),
                *(quant.frozen, quant.codebooks, params, free),
            )
            return change, quant, new

        is_start = (quant.round < plan.num_rounds) & (step >= starts[quant.round])
        change, quant, inner = jax.lax.cond(
            is_start, start_round, train, updates, params, quant, inner, sensitivity
        )
        after: Any = optax.safe_increment(step)
        return change, IncrementalState(after, quant, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def quant_state(opt_state: optax.OptState) -> QuantState:
    """Return the `QuantState` in the state of an optimizer that `incremental` is a part of.

    Args:
      opt_state: of `incremental`, or of a wrapper or a chain around it.

    Raises:
      ValueError: unless there is exactly one.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.eye(8)}
    >>> tx = optax.MultiSteps(incremental(optax.sgd(0.1), jq.mlq(params, groups=1), 5), 2)
    >>> int(quant_state(tx.init(params)).round)
    0
    """

    def is_incremental(node: Any) -> bool:
        return isinstance(node, IncrementalState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_incremental)
    found = [leaf.quant for leaf in leaves if is_incremental(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"expected the optimizer state of one jq.incremental, got {len(found)} of them"
            + (" (restored without its type?)" if not found else "")
        )
    return found[0]


def _starts(plan: Plan, steps_per_round: int | Sequence[int]) -> list[int]:
    """Return the step at which each round starts, and for the round past the last once more."""
    several = isinstance(steps_per_round, Sequence)
    steps = list(steps_per_round) if several else [steps_per_round] * plan.num_rounds
    whole = all(isinstance(n, numbers.Integral) and n >= 1 for n in steps)
    if len(steps) != plan.num_rounds or not whole:
        raise ValueError(
            f"expected steps_per_round to be a number from 1, or {plan.num_rounds} of them, one a "
            f"round, got {steps_per_round}"
        )
    return list(itertools.accumulate(steps, initial=0))


def _check_dtype(path: tuple[Any, ...], frozen: jax.Array, weights: Any, update: Any) -> None:
    if frozen.ndim and update.dtype == jnp.float16 != weights.dtype:
        raise ValueError(
            f"expected updates of {weights.dtype} or bfloat16 at {_name(path)}, got float16, which "
            "cannot hold the last bits of a move"
        )


def _difference(target: jax.Array, weights: jax.Array, update: jax.Array) -> jax.Array:
    """Return the update that moves the weights to a target, in the dtype of updates."""
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    return (target.astype(wide) - weights.astype(wide)).astype(update.dtype)


def _land(
    frozen: jax.Array, codebook: jax.Array, weights: jax.Array, update: jax.Array
) -> jax.Array:
    """Return the update, that of frozen weights leading onto their centroids."""
    if not codebook.ndim:
        return update
    return jnp.where(frozen, _difference(nearest(weights, codebook), weights, update), update)


def _zero(frozen: jax.Array, update: jax.Array) -> jax.Array:
    return jnp.where(frozen, jnp.zeros_like(update), update)
