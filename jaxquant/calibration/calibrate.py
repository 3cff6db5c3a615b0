"""What the weights of any function meet, and how much they matter: `calibrate`."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from jaxquant import checks, loops
from jaxquant.calibration.answers import OUTPUTS, answers_of
from jaxquant.calibration.observed import OBSERVING, Probes, observed, probes_of
from jaxquant.meshes import compiled
from jaxquant.packing.function import Call, PackedFunction, Role, call_of, leaves_as_given
from jaxquant.rounds.calibration import Calibration
from jaxquant.rounds.selection import Layer, LayerRule, select
from jaxquant.trees import pure, replaced


def calibrate(
    function: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Sequence[LayerRule] | None = None,
    outputs: str = "normal",
    sensitivity: bool = True,
    moments: bool = True,
    guided: bool | int = False,
    key: jax.Array | None = None,
) -> Calibration:
    """Return what the weights of a function meet on some data, and how much each of them matters.

    Two things decide well which centroid a weight gets: the second moments of the inputs that it is
    multiplied with, and how much the outputs change with it. `quantize_round` and `incremental`
    take both as `calibration=`. The function is traced, and its products are observed by their
    derivatives, so it may be of any library, and may use scans, branches, checkpoints and maps.

    - *Moments* of a weight are the mean of `x x^T` over all vectors x that it is multiplied with:
      see `input_moments`. Those of stacked layers are by layer.
    - *Guided* moments are the mean over examples of the sum of `g**2 x x^T`, g**2 the mean over a
      weight's outputs of the squared gradients of the end result: vectors that matter more count
      more. With several groups of outputs each has moments of its own, by its own gradients (Kim et
      al., "GuidedQuant", ICML 2025).
    - *Sensitivity* of a weight is its diagonal entry of the Fisher information, or of the
      Gauss-Newton matrix, `sum x**2 g**2` over vectors as if they were apart (exact for a dense
      layer that sees one vector for each example). Where a weight meets no product, its gradient is
      squared as a whole.

    Gradients are those of random combinations of outputs whose squares have the Fisher information
    as their mean: no labels are drawn or needed. Normalized so that `sum(h * change**2)` is the
    squared change of the outputs of an example ("normal"), or twice the divergence in nats of a
    prediction ("categorical"), to second order and in the mean.

    Args:
      function: of the parameters and a batch, differentiable backwards. It returns arrays: outputs,
        or the loss of each example, whose squared gradients then count.
      params: tree of weights; NNX's models and states, too.
      batches: each is the second argument of a call; arrays or trees of them, with the examples on
        their first axes. They may be sharded, and differ in size, at the cost of a compile.
      rules: of the weights, as for `slq`.
      outputs: what the outputs are: "normal", numbers whose squared error counts, each entry of the
        first axis an example; "categorical", logits [..., classes] whose divergence counts.
      sensitivity: whether sensitivities are wanted. Costs a product for each product.
      moments: whether moments are wanted. Costs O(vectors D**2) for each product, [D, D] in memory.
      guided: whether moments are guided; or by how many groups of outputs at most, runs of equal
        length: a weight of 6 outputs has 3 of 4. Each costs as much as all moments without.
      key: typed key of the random combinations; None stands for a fixed one.

    Returns:
      Calibration. Memory while it runs: that of a backward pass, and twice the result. Compiles
      once for the shapes of a batch.

    Raises:
      ValueError: for what is no array, for no batches, for a weight whose rule tells other inputs
        than those that its products sum over, if nothing is observed, and for results that are not
        finite; names the leaf. For outputs that do not have an entry for each example.

    >>> def function(params, x):
    ...     return x @ params["kernel"]
    >>> found = calibrate(function, {"kernel": jnp.eye(2)}, [jnp.array([[1.0, 2.0], [3.0, 0.0]])])
    >>> found.moments["kernel"].tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"expected outputs to be one of {OUTPUTS}, got {outputs!r}")
    if key is not None:
        checks.key("key", key)
    key = jax.random.key(0) if key is None else key
    groups = int(guided) if isinstance(guided, bool) else checks.integer("guided", guided, least=0)
    layers = select(params, rules, k=1).layers
    flat = jax.tree.leaves(pure(params, only_parameters=True))
    pairs = zip(layers, flat, strict=True)
    checks.values({layer.path: leaf for layer, leaf in pairs if layer.reason is None})
    selected = [layer for layer in layers if layer.reason is None]
    setting, sums, examples = None, {}, jnp.float32(0)
    for number, batch in enumerate(batches):
        if setting is None:
            roles = _roles(function, params, batch, selected)
            setting = _Setting(outputs, groups, sensitivity, moments, tuple(roles.items()))
            sums = {layer.path: _probes(setting, layer, roles[layer.path]) for layer in selected}
        call, arrays = call_of((params, batch))
        own_key = jax.random.fold_in(key, number)
        static = {"function": function, "setting": setting, "call": call}
        sums, examples = compiled(_add, sums, examples, arrays, own_key, **static)
    if setting is None:
        raise ValueError("batches: expected at least one, got none")
    return _calibration(params, layers, setting, sums, examples)


class _Setting(NamedTuple):
    """What is observed of which weights; hashable."""

    outputs: str
    groups: int  # of outputs at most, by which moments are guided; 0 if they are not
    sensitivity: bool
    moments: bool
    roles: tuple[tuple[str, Role], ...]  # of the selected leaves, by path


def _roles(
    function: Callable[..., Any], params: Any, batch: Any, selected: Sequence[Layer]
) -> dict[str, Role]:
    """Return what products do with each selected weight.

    Raises:
      ValueError: for one whose rule tells otherwise; names it.
    """
    stacks = [layer.path for layer in selected if layer.stacks]
    found = PackedFunction(function).roles(params, batch, stacks=stacks)
    roles = {}
    for layer in selected:
        # Of a weight that is cut up before its products they tell nothing: its rule has to.
        untold = Role(layer.inputs or len(layer.shape) - layer.stacks - 1, layer.stacks)
        role = roles[layer.path] = found.get(layer.path, untold)
        if (
            role.inputs
            and layer.inputs is not None
            and layer.axes_of(role.inputs) != layer.input_axes
        ):
            raise ValueError(
                f"{layer.path}: its rule says inputs={layer.inputs}, and the function's products "
                f"sum over {layer.axes_of(role.inputs)} of its axes: expected inputs={role.inputs}"
            )
    return roles


def _probes(setting: _Setting, layer: Layer, role: Role) -> Probes:
    """Return the probes of a weight; layers that share a codebook have no moments of their own."""
    has_moments = setting.moments and role.is_stack == layer.stacks
    return probes_of(
        layer.shape,
        role,
        sensitivity=setting.sensitivity,
        moments=has_moments,
        groups=setting.groups,
    )


def _add(
    sums: dict[str, Probes],
    examples: jax.Array,
    arrays: list[jax.Array],
    key: jax.Array,
    *,
    function: Callable[..., Any],
    setting: _Setting,
    call: Call,
) -> tuple[dict[str, Probes], jax.Array]:
    """Add what one batch tells to what those before told."""
    roles, arguments = dict(setting.roles), call.arguments(arrays)
    structure = jax.tree.structure(arguments)
    pairs = leaves_as_given(arguments)
    run = PackedFunction(function, OBSERVING)

    def combined(probes: dict[str, Probes]) -> tuple[jax.Array, jax.Array]:
        leaves = []
        for path, leaf in pairs:
            argument, _, own = path.partition("/")
            if argument == "0" and own in roles:
                leaf = observed(leaf, probes[own], roles[own], setting.groups)
            leaves.append(leaf)
        results = run(*jax.tree.unflatten(structure, leaves))
        return _combined(results, setting.outputs, key)

    # Inside of `jax.shard_map` each device adds up what is its own.
    sums = loops.varying_like(sums, arrays)
    found, own = jax.grad(combined, has_aux=True)(jax.tree.map(jnp.zeros_like, sums))
    return jax.tree.map(jnp.add, sums, found), examples + own


def _combined(results: Any, outputs: str, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a random combination of outputs, and of how many examples they are.

    The mean of its gradient's square is the Fisher information: what each output is times has that
    of the outputs as its covariance.
    """
    leaves, number = answers_of(results, outputs)
    total = jnp.float32(0)
    for place, x in enumerate(leaves):
        factors = jax.random.rademacher(jax.random.fold_in(key, place), x.shape, jnp.float32)
        if outputs == "categorical":
            shares = jax.nn.softmax(jax.lax.stop_gradient(x))
            roots = jnp.sqrt(shares) * factors
            factors = roots - shares * jnp.sum(roots, axis=-1, keepdims=True)
        total += jnp.sum(factors * x)
    return total, jnp.float32(number)


def _calibration(
    params: Any,
    layers: Sequence[Layer],
    setting: _Setting,
    sums: dict[str, Probes],
    examples: jax.Array,
) -> Calibration:
    """Return means from sums."""
    roles = dict(setting.roles)
    moments, sensitivity = {}, []
    for layer in layers:
        if layer.reason is not None:
            sensitivity.append(jnp.zeros((), jnp.float32))
            continue
        own = sums[layer.path]
        if setting.sensitivity:
            sensitivity.append((own.squares / examples).reshape(layer.shape))
        is_seen = isinstance(own.count, jax.core.Tracer) or bool(jnp.all(own.count > 0))
        if own.moments.size and is_seen:
            number = examples if setting.groups else own.count[..., None, None, None]
            found = own.moments / number
            moments[layer.path] = found if found.shape[-3] > 1 else found[..., 0, :, :]
    tree = None
    if setting.sensitivity:
        structure = jax.tree.structure(pure(params, only_parameters=True))
        tree = jax.tree.unflatten(structure, sensitivity)
    inputs = tuple((path, roles[path].inputs) for path in moments)
    found = Calibration(
        sensitivity=tree, moments=moments, guided=setting.groups > 0, input_axes=inputs
    )
    _check(found, layers)
    if setting.sensitivity:
        tree = replaced(params, tree, only_parameters=True)
    return dataclasses.replace(found, sensitivity=tree)


def _check(found: Calibration, layers: Sequence[Layer]) -> None:
    """Raise a ValueError for results that are not finite, or if nothing was observed."""
    named = {f"moments: {path}": own for path, own in found.moments.items()}
    pairs = zip(layers, jax.tree.leaves(found.sensitivity), strict=False)
    named |= {f"sensitivity: {layer.path}": x for layer, x in pairs if layer.reason is None}
    checks.values(named)
    if any(isinstance(own, jax.core.Tracer) for own in named.values()):
        return
    if not any(bool(jnp.any(own != 0)) for own in named.values()):
        raise ValueError(
            "expected outputs that depend on some selected weight, and can be differentiated, "
            "got nothing to observe"
        )
