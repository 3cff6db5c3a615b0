"""Quantization inside an optax optimizer: keep the frozen weights where they are."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


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
    return jnp.where(frozen, jnp.zeros_like(update), update)


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
