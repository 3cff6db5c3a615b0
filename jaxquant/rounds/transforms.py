"""Quantization inside an optax optimizer: keep frozen weights in place, or run a whole plan."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np
import optax

from jaxquant import loops
from jaxquant.checks import whole_number, whole_numbers
from jaxquant.clustering.blocks import nearest_in_each
from jaxquant.rounds.calibration import Calibration
from jaxquant.rounds.quantize import check_key, quantize_round
from jaxquant.rounds.quantize import init as init_quantization
from jaxquant.rounds.schedules import Plan
from jaxquant.rounds.selection import Layer, by_slice, fitted
from jaxquant.rounds.state import QuantState, block_codebooks
from jaxquant.trees import check_structure, leaves_with_paths, pure, replaced

# Steps after a round in which frozen weights are still moved onto their centroids: p + (c - p) may
# miss c by a rounding. Once p is near c the difference is exact (Sterbenz), so that the second or
# third step lands; differences in bfloat16 of float32 weights take up to two more.
_LANDING_STEPS = 8


def freeze_quantized(
    tx: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keep frozen weights where they are: alone, last in `optax.chain`, or around an optimizer.

    `u <- 0 where frozen, u elsewhere`, on the *final* update. Masking gradients instead is not
    enough: momentum from before the freeze and weight decay would still move the weight. The value
    under the mask does not matter, NaN and infinity included.

    An optimizer that looks at whole leaves, or at all of them together, must not see what is frozen
    either: the norm by which `clip_by_global_norm` divides would be that of gradients which move
    nothing, and the free weights would hardly train. With `tx`, frozen entries take no part in its
    arithmetic: it gets gradients *and* parameters that are zero there, as if there were only the
    free weights. So a global norm, a trust ratio (LAMB, LARS), adaptive clipping, a row or a column
    of Adafactor's second moments and what Muon makes orthogonal are those of free weights; weight
    decay adds nothing to norms; a mean over a leaf still divides by all its entries. Extra
    arguments like the parameters are zero there too; functions (`value_fn` of a line search,
    `grad_fn` of `sam`) get the parameters whole. What `tx` remembers of parameters is about zeros:
    begin it anew after each round if it measures a distance from its start (DoG, DoWG) or
    differences (L-BFGS), and keep averages of parameters outside.
    `optax.chain(freeze_quantized(), tx, freeze_quantized())` does the same for the gradients alone,
    and shows `tx` the parameters as they are. Costs one `select` per leaf and tree, which XLA fuses
    into the update.

    The optimizers whose evaluated weights are not the trained ones need the same mask once more:
    for `optax.contrib.schedule_free` (which trains y, and evaluates an average x of past iterates)
    that is `jax.tree.map(jnp.where, frozen, params, schedule_free_eval_params(state, params))`, for
    a moving average of the parameters likewise. `optax.lbfgs` in a chain hands every extra argument
    on to its `value_fn`, which must name `frozen` among its parameters; inside it need not.

    Source: Xu et al., "Deep Neural Network Compression with Single and Multiple Level
    Quantization", AAAI 2018: their released code applies its 0/1 mask to the final update, after
    momentum and weight decay.

    `update(updates, state, params=None, *, frozen)` takes the mask as a keyword.

    Args:
      tx: the optimizer of the free weights, or None.
      frozen: the tree `QuantState.frozen`, with the structure of the updates; per leaf a bool array
        of the leaf's shape, or a scalar bool for the whole leaf (True = frozen). May be traced.

    Returns:
      The transformation; its state is that of `tx`, or `optax.EmptyState()`.

    Raises:
      ValueError: By `update`, at trace time, if `frozen` is missing (a wrapper that drops extra
        arguments, such as `optax.MultiSteps(...).gradient_transformation()`, loses it: use
        `MultiSteps` itself), or if its structure or a leaf's shape or dtype is not as above.

    >>> params, frozen = {"w": jnp.array([3.0, 0.4])}, {"w": jnp.array([True, False])}
    >>> tx = freeze_quantized(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)))
    >>> tx.update(params, tx.init(params), params, frozen=frozen)[0]["w"].tolist()
    [0.0, -0.20000000298023224]
    """
    inner = optax.with_extra_args_support(optax.identity() if tx is None else tx)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        frozen: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if frozen is None:
            raise ValueError(
                "expected the keyword argument frozen=state.frozen in tx.update(...), got none"
            )
        frozen = pure(frozen)
        check_structure(pure(updates), frozen, "frozen to have the updates' structure")
        frozen = jax.tree_util.tree_map_with_path(_check_mask, pure(updates), frozen)
        if tx is None:
            return _hidden(frozen, updates), state
        return _update_free(inner, frozen, updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _update_free(
    tx: optax.GradientTransformationExtraArgs,
    frozen: Any,
    updates: Any,
    state: optax.OptState,
    params: Any,
    extra: Mapping[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """Update by an optimizer that sees zeros in the place of frozen weights; they get zeros."""

    def shown(value: Any) -> Any:
        if callable(value):
            return of_whole(value)
        return _hidden(frozen, value) if _is_like(params, value) else value

    def of_whole(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(seen: Any, *args: Any, **kwargs: Any) -> Any:
            whole = jax.tree.map(jnp.where, frozen, pure(params), pure(seen))
            return shown(function(replaced(seen, whole), *args, **kwargs))

        return call

    extra = {name: shown(value) for name, value in extra.items()}
    free, state = tx.update(_hidden(frozen, updates), state, shown(params), **extra)
    return _hidden(frozen, free), state


def _is_like(params: Any, tree: Any) -> bool:
    """Return whether a tree has the structure and the shapes of the parameters."""
    params, tree = pure(params), pure(tree)
    if params is None or jax.tree.structure(params) != jax.tree.structure(tree):
        return False
    return all(
        jax.tree.leaves(jax.tree.map(lambda *x: len(set(map(jnp.shape, x))) == 1, params, tree))
    )


def _hidden(frozen: Any, tree: Any) -> Any:
    """Return a tree like the weights, in its own form, with exact zeros where frozen."""
    return replaced(tree, jax.tree.map(_zero, frozen, pure(tree)))


def _check_mask(path: tuple[Any, ...], update: jax.Array, frozen: Any) -> jax.Array:
    frozen = jnp.asarray(frozen)
    if frozen.dtype != jnp.bool_:
        raise ValueError(f"expected frozen of dtype bool at {_name(path)}, got {frozen.dtype}")
    if frozen.shape not in ((), jnp.shape(update)):
        raise ValueError(
            f"expected frozen of shape {jnp.shape(update)} or () at {_name(path)}, "
            f"got {frozen.shape}"
        )
    return frozen


def _name(path: tuple[Any, ...]) -> str:
    return repr(jax.tree_util.keystr(path, simple=True, separator="/"))


class IncrementalState(NamedTuple):
    """State of `incremental`; `optax.tree.get` finds its fields."""

    step: jax.Array  # int32 scalar, updates so far
    quant: QuantState  # of the plan, after the last round
    inner: optax.OptState  # of the optimizer inside
    began: jax.Array  # int32 scalar, the update at which the last round ran
    skipped: Any  # like the parameters; bool, [codebooks] if cut: NaN kept it out of its round


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

    What is frozen takes no part in the arithmetic of `tx`, which sees gradients and parameters that
    are zero there: `freeze_quantized` says what that is good for, and which optimizers need
    `restart` with it.

    A layer with NaN or infinite weights is left as it was by a round, and `skipped` in the state
    says so, until a later round that raises its share finds it finite, and catches up. A layer that
    is still skipped after the last round stays float. `optax.apply_if_finite` keeps it from
    happening. A state that has passed the plan's last round with something free, as that of a plan
    of more rounds has, gets one more in which all of it freezes.

    Everything is in the state, which is checkpointed, sharded and donated as that of any optimizer.
    Pure, under jit, vmap and scan; one compile for all rounds, a `lax.cond` chooses. It must be
    outermost but for wrappers that call it or do not (`MultiSteps`, `apply_if_finite`,
    `inject_hyperparams`, `masked`, `partition`, `nnx.Optimizer`): what changes its updates would
    move frozen weights. A part of the parameters will do, if what it lacks is left alone; then
    `quant_state` wants all of them. Costs a select for each weight, and in the rounds' first steps
    an assignment.

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
      calibration=None, **extra)` needs the parameters; `sensitivity` or `calibration` is that of
      `quantize_round`, read in the updates that start a round; other extra arguments go to `tx`.

    Raises:
      ValueError: for steps that are not positive or not as many as rounds, a missing key; by
        `init` and `update` for parameters that are missing or not the plan's, for a state that has
        lost its types, and for float16 updates of wider weights; names the leaf.

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
    check_key(plan, key)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> IncrementalState:
        if _is_placeholder(params):
            return _placeholders(params, tx.init(params))
        own = _fitted(plan, params)
        quant = init_quantization(own, params)
        skipped = _nothing_skipped(own, quant)
        return IncrementalState(jnp.int32(0), quant, tx.init(params), jnp.int32(0), skipped)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sensitivity: Any = None,
        calibration: Calibration | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("expected tx.update(updates, state, params), got no params")
        _check_state(state)
        check_structure(state.quant.frozen, pure(params), "params to have the state's structure")
        check_structure(pure(params), pure(updates), "updates to have the params' structure")
        jax.tree_util.tree_map_with_path(
            _check_dtype, state.quant.frozen, pure(params), pure(updates)
        )
        guides = {"sensitivity": sensitivity, "calibration": calibration}
        if all(isinstance(leaf, jax.typing.ArrayLike) for leaf in jax.tree.leaves(extra)):
            return compiled_step(updates, state, params, guides, extra)
        return advance(updates, state, params, guides, extra)

    def advance(
        updates: Any, state: IncrementalState, params: Any, guides: dict[str, Any], extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        own = _fitted(plan, params)
        step, quant, inner, began, skipped = state

        # Everything that is traced is an operand: what is closed over would look like a constant.
        def start_round(
            updates: Any, params: Any, quant: QuantState, inner: Any, skipped: Any, guides: Any
        ) -> tuple[optax.Updates, QuantState, optax.OptState, Any]:
            own_key = None if key is None else jax.random.fold_in(key, quant.round)
            moved, new, info = quantize_round(own, params, quant, key=own_key, **guides)
            trees = map(pure, (moved, params, updates))
            change = replaced(updates, jax.tree.map(_move, new.frozen, *trees))
            skipped = _skipped(own, quant.round, info.finite, skipped)
            inner = tx.init(_hidden(new.frozen, moved)) if restart else inner
            return change, new, inner, skipped

        def train(
            updates: Any, params: Any, quant: QuantState, inner: Any, skipped: Any, guides: Any
        ) -> tuple[optax.Updates, QuantState, optax.OptState, Any]:
            del guides
            free, new = _update_free(tx, quant.frozen, updates, inner, params, extra)
            free = jax.tree.map(lambda new, old: new.astype(old.dtype), *map(pure, (free, updates)))
            landing = step < began + _LANDING_STEPS
            change = loops.cond(
                landing,
                _land,
                lambda quant, params, free: free,
                *(quant, pure(params), free),
            )
            return replaced(updates, change), quant, new, skipped

        is_start = loops.cond(
            quant.round < plan.num_rounds,
            lambda quant, skipped: step >= starts[quant.round],
            functools.partial(_is_unfinished, plan),
            *(quant, skipped),
        )
        change, quant, inner, skipped = loops.cond(
            is_start, start_round, train, updates, params, quant, inner, skipped, guides
        )
        after: Any = optax.safe_increment(step)
        began = jnp.where(is_start, step, began)
        return change, IncrementalState(after, quant, inner, began, skipped)

    compiled_step = jax.jit(advance)  # outside of jit, branches would be compiled at every call

    return optax.GradientTransformationExtraArgs(init, update)


def quant_state(opt_state: Any, params: Any = None) -> QuantState:
    """Return the `QuantState` in the state of an optimizer that `incremental` is a part of.

    Args:
      opt_state: of `incremental`, or of a wrapper or a chain around it; an `nnx.Optimizer`.
      params: tree of all weights, where the optimizer has a part of them (`optax.masked`,
        `optax.partition`): the state is then of their structure, as `pack` and others want it, and
        what the optimizer does not have is left alone. None: the state as the optimizer has it.

    Raises:
      ValueError: unless there is exactly one, and for params that lack a leaf of it; names it.

    >>> import jaxquant as jq
    >>> params = {"kernel": jnp.eye(8)}
    >>> tx = optax.MultiSteps(incremental(optax.sgd(0.1), jq.mlq(params, groups=1), 5), 2)
    >>> int(quant_state(tx.init(params)).round)
    0
    """

    def is_incremental(node: Any) -> bool:
        return isinstance(node, IncrementalState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_incremental)
    found = [leaf for leaf in leaves if is_incremental(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"expected the optimizer state of one jq.incremental, got {len(found)} of them"
            + ("" if found else f" (restored without its type? {_RESTORE})")
        )
    _check_state(found[0])
    quant = pure(found[0].quant)
    return quant if params is None else _of_all(quant, pure(params, only_parameters=True))


def _of_all(quant: QuantState, params: Any) -> QuantState:
    """Return a state of some leaves as one of all parameters, the others left alone."""
    paths = [path for path, _ in leaves_with_paths(params)]

    def tree_of(tree: Any, missing: jax.Array) -> Any:
        own = dict(leaves_with_paths(tree))
        unknown = own.keys() - set(paths)
        if unknown:
            raise ValueError(f"params: expected a leaf {min(unknown)}, got none")
        leaves = [own.get(path, missing) for path in paths]
        return jax.tree.structure(params).unflatten(leaves)

    return quant._replace(
        codebooks=tree_of(quant.codebooks, jnp.zeros(())),
        frozen=tree_of(quant.frozen, jnp.bool_(False)),
        frozen_centroids=tree_of(quant.frozen_centroids, jnp.bool_(False)),
        scales=None if quant.scales is None else tree_of(quant.scales, jnp.zeros(())),
    )


_RESTORE = "Restore into the structure of tx.init(params)"


def _check_state(state: Any) -> None:
    """Refuse a state that came back from a checkpoint as dictionaries or lists."""
    for part, wanted in ((state, IncrementalState), (getattr(state, "quant", None), QuantState)):
        if not isinstance(part, wanted):
            raise ValueError(
                f"expected the {wanted.__name__} of tx.init(params), got a {type(part).__name__} "
                f"(restored without its type? {_RESTORE})"
            )


def _is_placeholder(params: Any) -> bool:
    """Return whether this is no tree: `optax.tree.map_params` asks where the parameters go."""
    return not isinstance(params, Mapping | Sequence | None) and not jax.tree.leaves(params)


def _placeholders(params: Any, inner: optax.OptState) -> IncrementalState:
    """Return the state with a placeholder where trees of the parameters' shapes are."""
    other = jnp.zeros(())  # stands for a whole tree: codebooks have other shapes
    return IncrementalState(other, QuantState(other, params, other, other), inner, other, other)


def _fitted(plan: Plan, params: Any) -> Plan:
    tree = pure(params, only_parameters=True)
    return dataclasses.replace(plan, selection=fitted(plan.selection, tree))


def _nothing_skipped(plan: Plan, quant: QuantState) -> Any:
    shapes = [() if x.numbers is None else (x.codebooks,) for x in plan.selection.layers]
    nothing = [jnp.zeros(shape, bool) for shape in shapes]
    return jax.tree.unflatten(jax.tree.structure(quant.frozen), nothing)


def _is_unfinished(plan: Plan, quant: QuantState, skipped: Any) -> jax.Array:
    """Return whether something is free after the last row: the state is of a longer plan."""
    whole = quant.frozen_centroids if plan.shares_of == "clusters" else quant.frozen

    def is_left(codebook: jax.Array, whole: jax.Array, skipped: jax.Array) -> jax.Array:
        return ~jnp.all(whole) & ~jnp.any(skipped) if codebook.ndim else jnp.bool_(False)

    left = jax.tree.leaves(jax.tree.map(is_left, quant.codebooks, whole, skipped))
    return functools.reduce(jnp.logical_or, left)


def _skipped(plan: Plan, round_: jax.Array, finite: Mapping[str, jax.Array], before: Any) -> Any:
    """Return which layers were to freeze more in this round or one before, and could not."""
    grows = jnp.asarray(np.diff(plan.schedule, axis=0, prepend=0) > 0)[round_]
    grows |= round_ >= plan.num_rounds

    def after(layer: Layer, before: jax.Array) -> jax.Array:
        if layer.reason is not None or layer.groups is None:
            return before
        groups = by_slice(layer, jnp.array(layer.groups)).reshape(before.shape)
        return jnp.where(grows[groups], ~finite[layer.path], before)

    leaves, structure = jax.tree.flatten(before)
    return structure.unflatten(map(after, plan.selection.layers, leaves))


def _starts(plan: Plan, steps_per_round: int | Sequence[int]) -> list[int]:
    """Return the step at which each round starts, and for the round past the last once more."""
    number = whole_number(steps_per_round)
    several = whole_numbers(steps_per_round) if number is None else (number,) * plan.num_rounds
    if several is None or len(several) != plan.num_rounds or min(several) < 1:
        raise ValueError(
            f"expected steps_per_round to be a number from 1, or {plan.num_rounds} of them, one a "
            f"round, got {steps_per_round}"
        )
    return list(itertools.accumulate(several, initial=0))


def _check_dtype(path: tuple[Any, ...], frozen: jax.Array, weights: Any, update: Any) -> None:
    if frozen.ndim and update.dtype == jnp.float16 != weights.dtype:
        raise ValueError(
            f"expected updates of {weights.dtype} or bfloat16 at {_name(path)}, got float16, which "
            "cannot hold the last bits of a move"
        )


def _move(frozen: jax.Array, target: jax.Array, weights: jax.Array, update: jax.Array) -> jax.Array:
    """Return the update that moves frozen weights to a target; infinite ones are not, and stay."""
    return jnp.where(frozen, _difference(target, weights, update), jnp.zeros_like(update))


def _difference(target: jax.Array, weights: jax.Array, update: jax.Array) -> jax.Array:
    """Return the update that moves the weights to a target, in the dtype of updates."""
    wide = jnp.float64 if weights.dtype == jnp.float64 else jnp.float32
    return (target.astype(wide) - weights.astype(wide)).astype(update.dtype)


def _land(quant: QuantState, params: Any, updates: Any) -> Any:
    """Return the updates, those of frozen weights leading onto their centroids."""
    trees = quant.frozen, block_codebooks(quant, params), params, updates
    frozen, codebooks, weights, updates = map(jax.tree.leaves, trees)
    selected = [place for place, codebook in enumerate(codebooks) if codebook.ndim]
    shared = nearest_in_each([weights[i] for i in selected], [codebooks[i] for i in selected])
    for i, target in zip(selected, shared, strict=True):
        landing = _difference(target, weights[i], updates[i])
        updates[i] = jnp.where(frozen[i], landing, updates[i])
    return jax.tree.structure(quant.frozen).unflatten(updates)


def _zero(frozen: jax.Array, update: jax.Array) -> jax.Array:
    return jnp.where(frozen, jnp.zeros_like(update), update)
