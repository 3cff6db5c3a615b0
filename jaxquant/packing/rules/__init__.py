"""What the interpreter does with operations of JAX on packed weights, by their names.

A rule takes the interpreter, an equation and its operands, some of which are views of weights, and
returns the equation's results; None where the weights have to be unpacked for it.
"""

from jaxquant.packing.interpreter import Rule
from jaxquant.packing.rules import calls, contractions, derivatives, views

RULES: dict[str, Rule] = {
    "transpose": views.reorder,
    "reshape": views.reshape,
    "squeeze": views.reshape,
    "expand_dims": views.reshape,
    "broadcast_in_dim": views.broadcast,
    "convert_element_type": views.cast,
    "copy": views.keep,
    "copy_p": views.keep,
    "name": views.keep,
    "optimization_barrier": views.keep,
    "stop_gradient": views.stop_gradient,
    "sharding_constraint": views.keep,
    "slice": views.cut,
    "split": views.split,
    "dynamic_slice": views.dynamic_slice,
    "gather": views.gather,
    "dot_general": contractions.dot_general,
    "conv_general_dilated": contractions.convolve,
    "jit": calls.jit,
    "closed_call": calls.inline,
    "core_call": calls.inline,
    "remat2": calls.checkpoint,
    "checkpoint": calls.checkpoint,
    "scan": calls.scan,
    "while": calls.while_loop,
    "cond": calls.cond,
    "custom_jvp_call": derivatives.custom_jvp,
    "custom_vjp_call": derivatives.custom_vjp,
}
