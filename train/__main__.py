"""Command line: `python -m train [VERB] --config configs/X.py --workdir DIR`; `help` tells more.

What goes wrong is told on one line, see `main`; the verbs and their flags are in `arguments`.
"""

from train import signals

if __name__ == "__main__":
    signals.install()  # before anything takes long

import argparse
import contextlib
import fnmatch
import logging
import os
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import arguments as command

if TYPE_CHECKING:
    from train.config import Config

_LONGEST = 2000  # characters of a message


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0, or 2 for what the user can mend."""
    warnings.showwarning = lambda message, *_, **__: _tell("note", message)
    try:
        options, overrides = command.parse(arguments)
        with _joined(options.distributed):
            return _dispatch(options, overrides)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        _tell("error", error)
        return 2


def _tell(kind: str, message: object) -> None:
    """Say it on one line, without what could move a terminal's cursor, of bounded length."""
    words = " ".join(str(message).split()) or type(message).__name__
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words[:_LONGEST])
    print(f"{kind}: {line}", file=sys.stderr)


@contextlib.contextmanager
def _joined(processes: str | None) -> Iterator[None]:
    """Join the other processes; only the first one prints.

    Raises:
      ValueError: if the flag is not as the help says, or they cannot be joined.
    """
    if processes is None:
        yield
        return
    import jax

    host, *numbers = processes.split(",")
    if processes and not (len(numbers) == 2 and all(n.isdecimal() for n in numbers)):
        raise ValueError(f"--distributed: expected HOST:PORT,PROCESSES,INDEX, got {processes!r}")
    try:
        jax.distributed.initialize(*([host, *map(int, numbers)] if processes else []))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed: {error}") from error
    with contextlib.ExitStack() as stack:
        if jax.process_index():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def _dispatch(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if options.verb == "report":
        return _report(options.workdir, options.output, options.against)
    if not options.config:
        raise ValueError("expected --config FILE")
    loaded = _load(",".join(options.config).split(","), overrides)
    chosen = {n: c for n, c in loaded.items() if fnmatch.fnmatchcase(n, options.only)}
    if not chosen:
        raise ValueError(f"--only: expected one of {', '.join(loaded)}, got {options.only!r}")
    _start_devices()
    study = len(loaded) > 1  # one with a folder for each row, even if --only leaves a single one
    if options.verb in ("eval", "export"):
        if len(chosen) > 1:
            raise ValueError(f"expected one config, got {len(chosen)}; --only NAME chooses")
        (name,) = chosen
        folder = options.workdir / name if study and options.workdir else options.workdir
        if options.verb == "eval":
            return _evaluate(name, chosen[name], folder, mirrored=options.mirrored)
        return _export(chosen[name], folder, options.output, options.format)
    if options.workdir is None:
        raise ValueError("expected --workdir DIR")
    if options.verb == "compare":
        return _compare(loaded, chosen, options.workdir)
    return (
        _train_study(loaded, chosen, options.workdir) if study else _train(chosen, options.workdir)
    )


def _start_devices() -> None:
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a plugin is not installed
        reason = " ".join(str(error).split()) or type(error).__name__
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(f"JAX_PLATFORMS={asked!r}: expected a device, got {reason}") from None


def _load(paths: Sequence[str], overrides: Sequence[str]) -> dict[str, "Config"]:
    """Return the experiments of all files by name, which is that of a folder too."""
    from train import config

    loaded, files = {}, {}
    for path in paths:
        for name, one in config.load(path, overrides).items():
            if name in files:
                raise ValueError(
                    f"--config: expected other names, got {name} of {files[name]} and of {path}"
                )
            loaded[name], files[name] = one, path
    return loaded


def _train(loaded: dict[str, "Config"], workdir: Path) -> int:
    from train import experiment, loop, summary
    from train.logs import say

    ((name, config),) = loaded.items()
    job = experiment.prepare(config, workdir)
    with experiment.lock(workdir) as free:
        if not free:
            raise ValueError(f"{workdir}: another process is at it")
        say(f"== {name}: {experiment.title(job)}")
        say(f"\n{summary.table({name: loop.run(job)})}\n")
    say(f"{workdir / 'report.md'}, {workdir / 'plots'}")
    return 0


def _compare(loaded: dict[str, "Config"], chosen: Collection[str], workdir: Path) -> int:
    from train import compare
    from train.logs import say

    say(f"\n{compare.run(loaded, chosen, workdir)}\n")
    say(f"{workdir / 'comparison.md'} and the figure beside it")
    return 0


def _train_study(loaded: dict[str, "Config"], chosen: Collection[str], workdir: Path) -> int:
    from train import experiment, loop, summary
    from train.logs import say, write_text

    loop.run_all(experiment.prepare_all({name: loaded[name] for name in chosen}, workdir))
    done = [name for name in loaded if (workdir / name / "report.json").is_file()]
    results = {name: summary.read(workdir / name) for name in done}
    text = f"{summary.table(results)}\n\n{summary.curves(results)}\n"
    write_text(workdir / "summary.md", text)
    say(f"\n{text}")
    for name in done:
        say(f"{workdir / name / 'report.md'}, {workdir / name / 'plots'}")
    return 0


def _evaluate(name: str, config: "Config", workdir: Path | None, *, mirrored: bool) -> int:
    from train import verbs

    result = verbs.evaluate(config, workdir, mirrored=mirrored)
    print(f"{name}: accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}")
    return 0


def _export(config: "Config", workdir: Path | None, output: Path | None, form: str) -> int:
    from train import verbs

    if workdir is None:
        raise ValueError("expected --workdir DIR")
    if output is None or output.suffix != ".safetensors":
        raise ValueError(f"expected --output FILE.safetensors, got {output}")
    size = verbs.export(config, workdir, output, pytorch=form == "pytorch")
    print(f"{output}: {size:,} bytes")
    return 0


def _report(workdir: Path | None, output: Path | None, against: str) -> int:
    from train import summary

    if workdir is None:
        raise ValueError("expected --workdir DIR")
    if output is not None and output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"expected --output FILE.png, .pdf or .svg, got {output}")
    inner = sorted(path.parent for path in workdir.glob("*/report.json"))
    folders = [workdir] if (workdir / "report.json").is_file() or not inner else inner
    results = {folder.name: summary.read(folder) for folder in folders}
    print(f"{summary.table(results)}\n\n{summary.curves(results)}")
    for folder in folders:
        if (folder / "report.md").is_file():
            print("\n" + (folder / "report.md").read_text(errors="replace"))
    if output is not None:
        draw = summary.plot_curves if against == "rounds" else summary.plot_sizes
        draw(output, results)
        print(f"\n{output}")
    return 0


def _run() -> int:
    """Run the command line. What fails beside it, in threads and callbacks, is told if it does not.

    On a full disk that is dozens of things, of TensorBoard and of checkpoints.
    """
    beside: dict[str, Any] = {}

    def note(failed: Any) -> None:
        beside.setdefault(repr(failed.exc_value), failed.exc_value)

    threading.excepthook = sys.unraisablehook = note
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    code = main(sys.argv[1:])
    for error in beside.values() if code == 0 else ():
        _tell("note", error)
    return code


if __name__ == "__main__":
    sys.exit(_run())
