"""A product with a packed weight as one operation of JAX, linear in the vectors.

So it is differentiated as what it is: its gradient by the vectors is the transposed product, packed
as well, where a loop inside of an implementation would run backwards and keep what it unpacked.
`vmap` over vectors makes it a product of more vectors, for which there may be a better way.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxquant import loops
from jaxquant.packing.arrays import PackedArray, ProductArray
from jaxquant.packing.ops import choice, reference
from jaxquant.packing.ops.reference import accumulator


def product(
    x: jax.Array,
    packed: PackedArray | ProductArray,
    *,
    name: str,
    chosen: bool = False,
    transposed: bool = False,
) -> jax.Array:
    """Return [vectors, columns], or [vectors, rows] of the transposed product.

    Args:
      x: [vectors, prod(rows)], or [vectors, prod(columns)].
      packed: one layer, its columns on one axis.
      name: of the implementation.
      chosen: whether it was chosen by shape, and is to be again where `vmap` adds vectors.
      transposed: whether to sum over the columns.
    """
    if name == "unpack":
        return _unpacked(x, packed, transposed)
    x, packed = loops.varying_like((x, packed), (x, packed))
    leaves, structure = jax.tree.flatten(packed)
    return _product.bind(
        x,
        *leaves,
        structure=structure,
        name=name,
        chosen=chosen,
        transposed=transposed,
        mapped=0,
    )


# What is unpacked for a product is unpacked again in the backward pass: kept for it, the float
# weights of all layers would add up.
@functools.partial(jax.checkpoint, static_argnums=(2,))
def _unpacked(x: jax.Array, packed: PackedArray | ProductArray, transposed: bool) -> jax.Array:
    return (reference.matmul_transposed if transposed else reference.matmul)(x, packed)


_product = Primitive("packed_product")  # operands x [*mapped, vectors, n], then the weight's leaves
_STATIC = ("structure", "name", "chosen", "transposed", "mapped")


def _of_layers(function: Any, mapped: int) -> Any:
    """Return a function of one layer as one of layers along so many axes, all in front."""
    for _ in range(mapped):
        function = jax.vmap(function)
    return function


def _run(
    x: jax.Array,
    *leaves: jax.Array,
    structure: Any,
    name: str,
    chosen: bool,
    transposed: bool,
    mapped: int,
) -> jax.Array:
    del chosen
    multiply = choice.product_of(name, transposed)
    packed = jax.tree.unflatten(structure, leaves)
    return _of_layers(multiply, mapped)(x, packed)


def _shape(
    x: Any, *leaves: Any, structure: Any, name: str, chosen: bool, transposed: bool, mapped: int
) -> Any:
    del name, chosen
    own = [jax.ShapeDtypeStruct(leaf.shape[mapped:], leaf.dtype) for leaf in leaves]
    packed = jax.tree.unflatten(structure, own)
    sizes = packed.rows if transposed else packed.columns
    shape = (*x.shape[: mapped + 1], math.prod(sizes))
    return x.update(shape=shape, dtype=accumulator(x, packed), weak_type=False)


def _tangent(primals: Any, tangents: Any, **options: Any) -> tuple[jax.Array, Any]:
    (x, *leaves), (x_tangent, *table_tangents) = primals, tangents
    y = _product.bind(x, *leaves, **options)
    made = []
    if type(x_tangent) is not ad.Zero:
        made.append(_product.bind(x_tangent, *leaves, **options))
    if any(type(tangent) is not ad.Zero for tangent in table_tangents):

        def multiply(x: jax.Array, packed: Any) -> jax.Array:
            return _unpacked(x, packed, options["transposed"])

        def by_tables(*leaves: jax.Array) -> jax.Array:
            packed = jax.tree.unflatten(options["structure"], leaves)
            return _of_layers(multiply, options["mapped"])(x, packed)

        table_tangents = [ad.instantiate_zeros(tangent) for tangent in table_tangents]
        made.append(jax.jvp(by_tables, leaves, table_tangents)[1])
    if not made:
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, functools.reduce(jnp.add, made)


def _transpose(cotangent: Any, x: Any, *leaves: Any, **options: Any) -> list[Any]:
    nothing = [None] * len(leaves)
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval), *nothing]
    packed = jax.tree.unflatten(options["structure"], leaves)
    transposed = not options["transposed"]

    def multiply(cotangent: jax.Array, packed: Any) -> jax.Array:
        name = options["name"]
        if options["chosen"] or not choice.supports(name, 1, cotangent, packed, transposed):
            name = choice.fastest(cotangent.shape[0], cotangent, packed, transposed)
        return product(
            cotangent, packed, name=name, chosen=options["chosen"], transposed=transposed
        )

    made = _of_layers(multiply, options["mapped"])(cotangent, packed)
    return [made.astype(x.aval.dtype), *nothing]


def _batched(args: Any, axes: Any, **options: Any) -> tuple[jax.Array, int]:
    (x, *leaves), (of_x, *of_leaves), mapped = args, axes, options["mapped"]
    if any(axis is not None for axis in of_leaves):
        size = next(
            array.shape[axis] for array, axis in zip(args, axes, strict=True) if axis is not None
        )
        args = [batching.bdim_at_front(a, d, size) for a, d in zip(args, axes, strict=True)]
        return _product.bind(*args, **(options | {"mapped": mapped + 1})), 0
    x = jnp.moveaxis(x, of_x, mapped)
    together = x.reshape(*x.shape[:mapped], -1, x.shape[-1])
    name, packed = options["name"], jax.tree.unflatten(options["structure"], leaves)
    if options["chosen"] and not mapped:
        name = choice.fastest(together.shape[0], together, packed, options["transposed"])
    if name == "unpack":
        y = _unpacked(together, packed, options["transposed"])
    else:
        y = _product.bind(together, *leaves, **(options | {"name": name}))
    return y.reshape(*x.shape[:-1], y.shape[-1]), mapped


def _lower(context: Any, *args: Any, **options: Any) -> Any:
    # A file that `jax.export` writes runs where there may be no native code.
    if options["name"] == "native" and context.module_context.lowering_parameters.for_export:
        options |= {"name": "blocks"}
    return mlir.lower_fun(_run, multiple_results=False)(context, *args, **options)


_product.def_impl(jax.jit(_run, static_argnames=_STATIC))
_product.def_abstract_eval(_shape)
ad.primitive_jvps[_product] = _tangent
ad.primitive_transposes[_product] = _transpose
batching.primitive_batchers[_product] = _batched
mlir.register_lowering(_product, _lower)
