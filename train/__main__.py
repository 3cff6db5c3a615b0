"""Command line: `python -m train [eval|report] --config configs/X.py --workdir DIR`.

Without a verb: train or load a network, quantize it, report; the same workdir continues. Several
configs, separated by commas, and those of a study run one after the other in subfolders and end in
one table, summary.md. What is finished is not run again, and the same command in a second process
(with a GPU or a processor core of its own) takes what no other process is at.

eval: accuracy of --config.init=FILE, or of the latest checkpoint in the workdir.
report: print the reports of finished workdirs.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

_OVERRIDE = "--config."


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0, or 2 for what the user can mend."""
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        return _dispatch(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _dispatch(arguments: Sequence[str]) -> int:
    options, overrides = _parse(arguments)
    if options.verb == "report":
        return _report(options.workdir)
    from train import config

    if not options.config:
        raise ValueError("expected --config FILE")
    loaded = {}
    for path in options.config.split(","):
        loaded.update(config.load(path, overrides))
    if options.verb == "eval":
        return _evaluate(loaded, options.workdir)
    if options.workdir is None:
        raise ValueError("expected --workdir DIR")
    return _train(loaded, options.workdir)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    overrides = [a.removeprefix(_OVERRIDE) for a in arguments if a.startswith(_OVERRIDE)]
    rest = [a for a in arguments if not a.startswith(_OVERRIDE)]
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=__doc__,
        epilog="--config.NAME=VALUE overrides a field, such as --config.retrain.epochs=4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", nargs="?", choices=("train", "eval", "report"), default="train")
    parser.add_argument("--config", metavar="FILE[,FILE...]")
    parser.add_argument("--workdir", metavar="DIR", type=Path)
    return parser.parse_args(rest), overrides


def _train(loaded: dict, workdir: Path) -> int:
    from train import loop, summary
    from train.logs import say, write_text

    several = len(loaded) > 1
    # All of them are checked before the first one starts.
    jobs = {
        name: loop.prepare(config, workdir / name if several else workdir)
        for name, config in loaded.items()
    }
    for name, job in jobs.items():
        if several and (job.workdir / "report.json").is_file():
            continue
        with loop.lock(job.workdir) as free:
            if free:
                say(f"== {name}: {job.config.model} on {job.dataset.name}")
                loop.run(job)
            elif several:
                say(f"== {name}: another process is at it")
            else:
                raise ValueError(f"{workdir}: another process is at it")
    finished = {n: j for n, j in jobs.items() if (j.workdir / "report.json").is_file()}
    table = summary.table({name: summary.read(job.workdir) for name, job in finished.items()})
    if several:
        write_text(workdir / "summary.md", table + "\n")
    say(f"\n{table}\n")
    for job in finished.values():
        say(f"{job.workdir / 'report.md'}, {job.workdir / 'plots'}")
    return 0


def _evaluate(loaded: dict, workdir: Path | None) -> int:
    from train import loop

    if len(loaded) > 1:
        raise ValueError(f"expected one config, got {len(loaded)}")
    for name, config in loaded.items():
        result = loop.evaluate(config, workdir)
        print(f"{name}: accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}")
    return 0


def _report(workdir: Path | None) -> int:
    from train import summary

    if workdir is None:
        raise ValueError("expected --workdir DIR")
    inner = sorted(path.parent for path in workdir.glob("*/report.json"))
    folders = [workdir] if (workdir / "report.json").is_file() or not inner else inner
    print(summary.table({folder.name: summary.read(folder) for folder in folders}))
    for folder in folders:
        print("\n" + (folder / "report.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
