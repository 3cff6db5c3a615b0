"""Functions on packed weights: `packed`, and what becomes of the weights in them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.meshes import is_explicit
from jaxquant.packing.arrays import PackedArray, View, is_quantized, unpack_node, view_of
from jaxquant.packing.codes import packed_rows
from jaxquant.packing.interpreter import Interpreter, Rule, Use
from jaxquant.packing.rules import RULES
from jaxquant.tables import markdown
from jaxquant.trees import is_nnx


class PackedFunction:
    """A function that also takes packed weights; made by `packed`."""

    def __init__(self, function: Callable[..., Any], rules: Mapping[str, Rule] = RULES):
        """Keep the function and what becomes of weights in it; nothing is traced yet.

        Raises:
          ValueError: for a model that holds packed weights itself, which have to be an argument.
        """
        if any(map(is_quantized, jax.tree.leaves(function, is_leaf=is_quantized))):
            raise ValueError(
                "expected a function of packed weights, got a model that holds them: "
                "jq.packed(lambda model, *args: model(*args))(model, ...)"
            )
        functools.update_wrapper(self, function, updated=())  # its attributes could hide ours
        self._function, self._rules = function, rules
        self._jitted = jax.jit(self._run, static_argnums=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function does of the unpacked weights, from packed ones."""
        call, arrays = call_of((args, kwargs))
        if not any(map(is_quantized, arrays)):
            return self._function(*args, **kwargs)
        try:
            hash(call)
        except TypeError:  # an option that cannot be: traced at each call
            return self._run(call, arrays)
        return self._jitted(call, arrays)

    def report(self, *args: Any, **kwargs: Any) -> "Uses":
        """Return where the function uses packed weights, and where it has to unpack one.

        Nothing is computed; arrays may be shape and dtype structs.
        """
        pairs = leaves_as_given((args, kwargs))
        uses = self._uses(pairs, args, kwargs)
        holding = {tuple(path.split("/")[:2]) for path, leaf in pairs if is_quantized(leaf)}
        # Of a single argument that holds weights, paths are those in it; else of all arguments.
        first = 2 if len(holding) == 1 else 1
        return Uses(use._replace(path=_shortened(use.path, first)) for use in uses)

    def inputs(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
        """Return how many axes of each weight the function's products sum over.

        For `pack(params, state, inputs=...)`, before anything is packed: see `LayerRule.inputs`.
        The weights are in the first argument. Nothing is computed; arrays may be shape and dtype
        structs.

        Returns:
          By path in `params`, a number for each floating array of two axes or more whose products
          all sum over its first axes, or its last, behind those of stacked layers.

        >>> import jax.numpy as jnp
        >>> heads = packed(lambda params, x: jnp.einsum("td,dhe->the", x, params["query"]))
        >>> heads.inputs({"query": jnp.ones((8, 2, 4))}, jnp.ones((3, 8)))
        {'query': 1}
        """
        return {path: role.inputs for path, role in self.roles(params, *args, **kwargs).items()}

    def roles(
        self, params: Any, *args: Any, stacks: Iterable[str] = (), **kwargs: Any
    ) -> dict[str, "Role"]:
        """Return what the function's products do with weights, see `inputs`.

        Args:
          params: the first argument, which has the weights.
          args, kwargs: the others.
          stacks: paths of weights that are layers in a stack, beside those that a scan tells of.
        """
        arguments = (params, *args), kwargs
        pairs = leaves_as_given(arguments)
        shapes = {
            path: jnp.shape(leaf) for path, leaf in pairs if path.split("/")[:2] == ["0", "0"]
        }

        def uses_with(stacks: set[str]) -> Uses:
            stand_ins = [
                (path, _stand_in(leaf, path in stacks) if path in shapes else leaf)
                for path, leaf in pairs
            ]
            uses = self._uses(stand_ins, *arguments)
            return Uses(use for use in uses if use.path in shapes)

        told = set(stacks)
        known = {path for path in shapes if _shortened(path, 2) in told}
        while True:  # a scan inside of a scan shows its stacks only where the outer ones are known
            uses = uses_with(known)
            scanned = {use.path for use in uses if use.operation == "scan" and use.how == "rows"}
            if scanned <= known:
                break
            known |= scanned
        found: dict[str, set[int]] = {}
        for use in uses:
            if use.summed:
                first = int(use.path in known) - len(shapes[use.path])
                first = max([first, *(axis + 1 for axis in use.shared)])
                number = _signed(use.summed, range(first, 0))
                found.setdefault(use.path, set()).add(number)
        return {
            _shortened(path, 2): Role(min(own), path in known)
            for path, own in found.items()
            if len(own) == 1 and 0 not in own
        }

    def _uses(self, pairs: Sequence[tuple[str, Any]], args: Any, kwargs: Any) -> "Uses":
        """Return where weights that stand for leaves of the arguments are used."""
        call, _ = call_of((args, kwargs))
        uses: list[Use] = []
        views = [
            dataclasses.replace(_as_view(leaf), path=path) if is_quantized(leaf) else leaf
            for path, leaf in pairs
            if _is_array(leaf)
        ]
        jax.eval_shape(functools.partial(self._run, call, uses=uses), views)
        return Uses(tuple(uses))

    def _run(self, call: "Call", values: list[Any], uses: list[Use] | None = None) -> Any:
        """Trace the function with the unpacked weights' types, and evaluate that with packed."""
        out = None

        def flat(*arrays: jax.Array) -> list[jax.Array]:
            nonlocal out
            args, kwargs = call.arguments(arrays)
            results, out = jax.tree.flatten(self._function(*args, **kwargs))
            return results

        views = [_as_view(value) if is_quantized(value) else value for value in values]
        types = [_unpacked_type(value) if is_quantized(value) else value for value in values]
        jaxpr = jax.make_jaxpr(flat)(*types)
        results = Interpreter(self._rules, uses).arrays(jaxpr, views)
        assert out is not None
        return jax.tree.unflatten(out, results)


class Role(NamedTuple):
    """What a function's products do with a weight."""

    inputs: int  # how many axes they sum over: the first ones, or the last ones if negative
    is_stack: bool  # whether axis 0, before these, is that of stacked layers


@dataclasses.dataclass(frozen=True)
class _Constant:
    """What is compared by type and bits: 1, 1.0 and True differ, 0.0 and -0.0; NaN equals NaN."""

    kind: type
    bits: Any
    value: Any = dataclasses.field(compare=False)

    @classmethod
    def of(cls, value: Any) -> "_Constant":
        bits = value
        if isinstance(value, float | complex):
            bits = value.real.hex(), value.imag.hex()
        return cls(type(value), bits, value)


class Call(NamedTuple):
    """What a call has beside arrays; hashable if its constants are."""

    structure: Any
    constants: tuple["_Constant | None", ...]  # what is no array; None stands for one

    def arguments(self, arrays: Sequence[Any]) -> Any:
        """Return the tree of arguments with such arrays."""
        rest = iter(arrays)
        leaves = [next(rest) if own is None else own.value for own in self.constants]
        return jax.tree.unflatten(self.structure, leaves)


def call_of(arguments: Any) -> tuple[Call, list[Any]]:
    """Return what a tree of arguments has beside arrays, and the arrays; packed ones are whole."""
    leaves, structure = jax.tree.flatten(arguments, is_leaf=is_quantized)
    constants = tuple(None if _is_array(leaf) else _Constant.of(leaf) for leaf in leaves)
    return Call(structure, constants), [leaf for leaf in leaves if _is_array(leaf)]


class Uses(tuple[Use, ...]):
    """Where a function uses packed weights, in its order; prints as a table."""

    @property
    def unpacked(self) -> "Uses":
        """Those for which a weight is unpacked outside of a product."""
        return Uses(use for use in self if use.float_bytes)

    def __str__(self) -> str:
        """Return a table in Markdown."""
        rows = [
            [u.path, "x".join(map(str, u.shape)), u.operation, u.how, f"{u.float_bytes:,}"]
            for u in self
        ]
        return markdown(["weight", "seen as", "operation", "how", "float bytes"], rows, "<<<<>")


def packed(function: Callable[..., Any]) -> PackedFunction:
    """Return a function that also takes packed weights, wherever it takes arrays.

    `packed(f)(*packed_args)` is `f(*unpack(packed_args))` to rounding, but no float weight exists
    outside of the product that uses it. The function is traced with the types of the unpacked
    weights; where a packed weight, or a view of one (transposed, cast, reshaped, a slice of its
    layers, columns or rows), meets a product, a convolution or a look-up of rows, the packed one
    runs. Into `jit`, `checkpoint`, `scan`, `while_loop`, `cond` and functions with derivatives of
    their own it goes inside. Everywhere else the weight is unpacked there, and
    `packed(f).report(...)` lists it.

    It knows nothing of the library that made the layers: Linen, NNX, Equinox, Haiku and plain
    functions are all the same. Runs under jit, vmap and grad; differentiable by whatever is not
    packed, and by codebooks and scales. No unpacked weight is kept for the backward pass.

    Args:
      function: of trees of arrays, in which some may be packed. Arguments that are no arrays
        (numbers and flags of Python, strings) are constants of the program. As under `jax.jit`, it
        should return arrays and have no side effects.

    Returns:
      The function, with a method `report` that takes the same arguments and lists where weights
      are used. Outside of jit it compiles once for the shapes and constants.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> weight = jq.pack_array(jnp.eye(3), jnp.array([0.0, 1.0]))
    >>> attend = packed(lambda embedding, x: x @ embedding.T)
    >>> attend(weight, jnp.arange(3.0)).tolist()
    [0.0, 1.0, 2.0]
    >>> print(attend.report(weight, jnp.arange(3.0))[0].how)
    transposed product
    """
    return PackedFunction(function)


def _shortened(path: str, first: int) -> str:
    """Return the path of a leaf in an argument; its number or name if it is the argument."""
    return "/".join(path.split("/")[first:]) or path.split("/")[-1]


def _signed(summed: tuple[int, ...], axes: range) -> int:
    """Return how many of the axes are summed over: less than 0 for the last ones, 0 for others."""
    number = len(summed)
    if summed == tuple(axes[:number]):
        return number
    return -number if summed == tuple(axes[len(axes) - number :]) else 0


def _stand_in(leaf: Any, is_stack: bool) -> Any:
    """Return an array of two axes or more as a packed weight of rows alone, of shapes only."""
    is_floating = _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    if is_quantized(leaf) or not is_floating or len(leaf.shape) < 2:
        return leaf
    layers, rows = leaf.shape[: int(is_stack)], leaf.shape[int(is_stack) :]
    codes: Any = jax.ShapeDtypeStruct((*layers, packed_rows(math.prod(rows), 2), 1), jnp.uint8)
    table = (*layers, *(1,) * len(rows), 2) if layers else (2,)
    codebook: Any = jax.ShapeDtypeStruct(table, leaf.dtype)
    return PackedArray(codes=codes, codebook=codebook, rows=rows, columns=())


def leaves_as_given(tree: Any) -> list[tuple[str, Any]]:
    """Return leaves as they are flattened, with paths that end at NNX's variables."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]
    paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in pairs]
    if is_nnx(tree):
        paths = [path.removesuffix("/value") for path in paths]
    return list(zip(paths, (leaf for _, leaf in pairs), strict=True))


def _is_array(leaf: Any) -> bool:
    kinds = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return is_quantized(leaf) or isinstance(leaf, kinds)


def _as_view(value: Any) -> View:
    return value if isinstance(value, View) else view_of(value)


def _unpacked_type(value: Any) -> Any:
    """Return the type of an unpacked weight; on a mesh it says how it is spread."""
    if jax.sharding.get_abstract_mesh().empty and not any(
        is_explicit(jax.typeof(leaf)) for leaf in jax.tree.leaves(value)
    ):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    return jax.eval_shape(unpack_node, value)
