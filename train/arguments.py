"""The command line: verbs with their flags, and a page of help for each."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_OVERRIDE = "--config."
_WIDTH = 88


class Verb(NamedTuple):
    """What the program can do."""

    short: str
    page: str  # of help
    flags: tuple[str, ...]


VERBS = {
    "train": Verb(
        "train or load networks, quantize them, report; the usual one",
        """\
        Train or load a network, quantize it, report. The same workdir continues.

        Several configs, separated by commas, and those of a study run one after the other in
        subfolders and end in one table, summary.md; --only runs those whose names match. What is
        finished is not run again, and the same command in a second process (with a GPU or a
        processor core of its own) takes what no other process is at.

        A config is a file of Python code, which every verb but report runs: give none that you
        would not run. Ctrl-C and SIGTERM end the program once it has saved, a second one at once;
        the same command continues.

        --distributed runs the same command in several processes, of one machine or many that share
        the workdir's file system, as one: --config.mesh.devices=0 splits batches over all their
        devices. On TPU pods, Slurm and Kubernetes the flag is enough; elsewhere each process says
        where the first one is, how many there are, and which it is.""",
        ("config", "only", "workdir", "distributed"),
    ),
    "eval": Verb(
        "measure a network",
        """\
        Print the accuracy of the workdir's latest checkpoint or, without --workdir, of
        --config.init=FILE, packed or PyTorch's.""",
        ("config", "only", "workdir", "mirrored"),
    ),
    "export": Verb(
        "write a network to a file",
        """\
        Write the network of the workdir's latest checkpoint to --output FILE.safetensors.""",
        ("config", "only", "workdir", "output", "format"),
    ),
    "report": Verb(
        "print what finished runs came to",
        """\
        Print the reports of finished workdirs, of one or of all in a folder. With --output
        FILE.png, .pdf or .svg draw their accuracies over the rounds or, with --against bytes,
        against the size of their networks.""",
        ("workdir", "output", "against"),
    ),
    "compare": Verb(
        "run several methods from one float network",
        """\
        Run experiments that differ in how they quantize from one float network, trained once, and
        write comparison.md and a figure, accuracy against bytes; see configs/compare_digits.py.""",
        ("config", "only", "workdir"),
    ),
}
_FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "config": (
        ("--config", "--configs"),
        {"metavar": "FILE[,FILE...]", "action": "append", "help": "experiments, in Python"},
    ),
    "only": (
        ("--only",),
        {"metavar": "PATTERN", "default": "*", "help": "rows of a study, as 'a*'"},
    ),
    "workdir": (("--workdir",), {"metavar": "DIR", "type": Path, "help": "where a run lies"}),
    "output": (("--output",), {"metavar": "FILE", "type": Path, "help": "to write"}),
    "against": (
        ("--against",),
        {
            "choices": ("rounds", "bytes"),
            "default": "rounds",
            "help": "the other axis of the figure",
        },
    ),
    "format": (
        ("--format",),
        {
            "choices": ("packed", "pytorch"),
            "default": "packed",
            "help": "packed as the workdir's model.safetensors, or plain floats under PyTorch's "
            "names",
        },
    ),
    "mirrored": (
        ("--mirrored",),
        {
            "action": "store_true",
            "help": "by the mean of the answers to an image and its mirror image",
        },
    ),
    "distributed": (
        ("--distributed",),
        {
            "nargs": "?",
            "const": "",
            "metavar": "HOST:PORT,PROCESSES,INDEX",
            "help": "one of several processes",
        },
    ),
}


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the verb and its flags, and the overrides of the config, as "fit.epochs=3".

    Help is printed, and ends the program, as argparse does.

    Raises:
      ValueError: for what no verb takes.
    """
    overrides = [a.removeprefix(_OVERRIDE) for a in arguments if a.startswith(_OVERRIDE)]
    rest = [a for a in arguments if not a.startswith(_OVERRIDE)]
    verb, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else ("train", rest)
    if verb == "help":
        _help(rest)
    if verb not in VERBS:
        raise ValueError(f"expected one of {', '.join(VERBS)} or help, got {verb!r}")
    options = _parser(verb).parse_args(rest)
    return options, overrides


def _help(words: Sequence[str]) -> NoReturn:
    """Print a page of help: of a verb, or of the config's fields."""
    topics = (*VERBS, "config")
    word = words[0] if words else "train"
    if len(words) > 1 or word not in topics:
        raise ValueError(f"help: expected one of {', '.join(topics)}, got {' '.join(words)!r}")
    print(fields_page() if word == "config" else _parser(word).format_help(), end="")
    raise SystemExit(0)


class _HelpConfig(argparse.Action):
    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        print(fields_page(), end="")
        raise SystemExit(0)


def _parser(verb: str) -> argparse.ArgumentParser:
    usual = verb == "train"
    others = "\n".join(f"  {name:8} {other.short}" for name, other in VERBS.items())
    takes_config = "config" in VERBS[verb].flags
    epilog = (
        "--config.NAME=VALUE overrides a field of the config, such as --config.retrain.epochs=4;\n"
        "`python -m train help config` lists them.\n"
    )
    verbs = f"verbs, each with a page of its own, `python -m train VERB --help`:\n{others}\n"
    parser = argparse.ArgumentParser(
        prog=f"python -m train{'' if usual else f' {verb}'}",
        usage=f"python -m train {'[VERB]' if usual else verb} [flags]",
        description=textwrap.dedent(VERBS[verb].page),
        epilog=epilog * takes_config + f"\n{verbs}" * usual,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=_WIDTH + 2),
        allow_abbrev=False,
    )
    parser.error = _refuse
    parser.set_defaults(verb=verb, **{name: None for name in _FLAGS})
    for name in VERBS[verb].flags:
        names, options = _FLAGS[name]
        parser.add_argument(*names, **options)
    if takes_config:
        parser.add_argument(
            "--help-config", action=_HelpConfig, nargs=0, help="list the fields of a config"
        )
    return parser


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def fields_page() -> str:
    """Return all fields of a config, each with its default and its meaning."""
    from train import config

    lines = ["Fields of a config and their defaults; --config.NAME=VALUE overrides one.", ""]
    for field in config.describe():
        if field.default is None:
            lines += ["", f"{field.name}: {field.meaning}"]
            continue
        meaning = field.meaning + (f" (one of {', '.join(field.choices)})" * bool(field.choices))
        lines.append(f"  {field.name}={field.default}")
        lines += textwrap.wrap(meaning, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"
