"""The command line: `sn-reid <command>`, or `python -m sn_ops.reid <command>`.

A user error (a missing file, an unknown setting, an incomplete data set) prints one message on stderr and exits with 2;
a bug prints a traceback. A run that a signal stopped exits with `sn_ops.reid.training.EXIT_STOPPED`, one whose loss is
not finite with `EXIT_NONFINITE`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .config import PRESETS

USAGE_ERROR = 2
INTERRUPTED = 130

_SCRIPT = "sn-reid"
_EPILOG = """\
from nothing to a ranked list:
  {0} train --quick --out runs/first        renders pedestrians, trains, writes a report
  {0} evaluate runs/first --rerank          scores, in both definitions of mAP
  {0} rank runs/first QUERY.jpg FOLDER      the images of a folder most like one image

on real data:
  {0} train --preset paper --data market1501 --root DATA --set model.weights=imagenet
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: without the program's name; default: those of this process.

    Returns:
        The exit status: 0; 2 after a user error, whose message is on stderr; 130 after Ctrl-C; the status of a run that
        was stopped, see the module.
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as left:  # --help, or arguments that argparse has explained
        return left.code if isinstance(left.code, int) else USAGE_ERROR
    try:
        with _quiet_pipe():
            options.run(options)
    except KeyboardInterrupt:
        print("sn_ops.reid: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        status = exit_status(error)
        if status is None:
            raise
        print(_message(error), file=sys.stderr)
        return status
    return 0


def exit_status(error: BaseException) -> int | None:
    """The exit status of a user error; None for a bug, which needs its traceback.

    User errors are those that a check of this package raises, whose messages begin with its name, and what the system
    refuses: a folder without permission, a full disk.
    """
    status = getattr(error, "exit_status", None)
    if isinstance(status, int):
        return status
    if isinstance(error, (ValueError, TypeError, KeyError, OSError, ImportError)) and _message(error).startswith(
        ("sn_ops.reid: ", "sn_ops: ")
    ):
        return USAGE_ERROR
    return USAGE_ERROR if isinstance(error, OSError) and error.filename is not None else None


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"sn_ops.reid: {error.strerror}: {error.filename}"
    return str(error)


@contextlib.contextmanager
def _quiet_pipe() -> Iterator[None]:
    """A reader that leaves early (`| head`) ends the program without an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would fail again when Python closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- arguments ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    program = _SCRIPT if Path(sys.argv[0]).name == _SCRIPT else "python -m sn_ops.reid"
    parser = argparse.ArgumentParser(
        prog=program,
        description="Person re-identification with the Support Neighbor loss.",
        epilog=_EPILOG.format(program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for add in (_train, _evaluate, _compare, _render, _embed, _rank, _export, _report, _settings):
        add(commands)
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A subcommand, which runs the function of its name in `sn_ops.reid.commands`."""

    def run(options: argparse.Namespace) -> None:
        from . import commands as functions  # not before it is needed: --help stays fast

        getattr(functions, name)(options)

    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _configuration(parser: argparse.ArgumentParser, usual: str = "default") -> None:
    """Options that choose a configuration; `usual` is the default preset."""
    parser.set_defaults(usual_preset=usual)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default: {usual})")
    base.add_argument("--config", type=Path, metavar="YAML", help="a configuration file, such as a run's config.yaml")
    base.add_argument("--quick", action="store_true", help="the preset quick: about a minute")
    _data(parser)
    _set(parser)


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="NAME", help="data set: short for --set data.name=NAME")
    parser.add_argument("--root", metavar="DIR", help="folder of the data set: short for --set data.root=DIR")


def _set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting, such as loss.k=8; may be repeated (the command settings lists them)",
    )


def _trained(parser: argparse.ArgumentParser) -> None:
    """Options that choose a network."""
    parser.add_argument("trained", metavar="RUN", type=Path, help="a run's folder, or a checkpoint file")
    parser.add_argument(
        "--checkpoint",
        choices=["best", "last"],
        default="last",
        help="which checkpoint of a run; best was chosen on the test images (default: last)",
    )
    _device(parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: auto)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images")


def _train(commands: Any) -> None:
    parser = _command(commands, "train", "train a network, by default on rendered pedestrians, and write a report")
    _configuration(parser)
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run, bit for bit on a CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: the next free one in runs)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "score a trained network: CMC, mAP in both definitions, mINP")
    _trained(parser)
    _data(parser)
    _set(parser)
    parser.add_argument(
        "--distractors",
        type=Path,
        metavar="DIR",
        help="images to add to the gallery: draws accuracy against gallery size",
    )
    parser.add_argument("--rerank", action="store_true", help="also by k-reciprocal re-ranking")
    parser.add_argument("--multi-query", action="store_true", help="also with the mean feature of a query's images")
    parser.add_argument("--average-precision", choices=["standard", "market"], help="the definition of mAP")
    parser.add_argument("--baseline", action="store_true", help="also colour histograms, without any training")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of scores.json and report.html (default: evaluation, in RUN)"
    )
    parser.add_argument("--no-report", action="store_true", help="write scores.json only")


def _compare(commands: Any) -> None:
    parser = _command(commands, "compare", "train each loss and each reading of the squeeze term over several seeds")
    _configuration(parser, usual="metric")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument("--losses", metavar="A,B", help="only these; an unknown name prints the list")
    parser.add_argument("--baseline", action="store_true", help="also colour histograms, without any training")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="folder (default: runs/compare)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _render(commands: Any) -> None:
    parser = _command(commands, "render", "render the synthetic set in Market-1501 layout")
    parser.add_argument("out", metavar="DIR", type=Path, help="folder to write")
    parser.add_argument("--quick", action="store_true", help="a few hundred images")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the set, such as seed=1"
    )


def _embed(commands: Any) -> None:
    parser = _command(commands, "embed", "images to embeddings, as an .npz of features and paths")
    _trained(parser)
    parser.add_argument("images", metavar="FOLDER", type=Path, help="searched recursively")
    parser.add_argument("--out", type=Path, default=Path("embeddings.npz"), metavar="FILE", help="(%(default)s)")


def _rank(commands: Any) -> None:
    parser = _command(commands, "rank", "the images of a folder that are most like one image")
    _trained(parser)
    parser.add_argument("query", metavar="IMAGE", type=Path, help="what to look for")
    parser.add_argument(
        "images", metavar="FOLDER", type=Path, help="where to look: a folder, or an .npz of the command embed"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many (default: 10)")
    parser.add_argument(
        "--out", type=Path, action="append", metavar="FILE", help="an .html or .csv to write; may be repeated"
    )


def _export(commands: Any) -> None:
    parser = _command(commands, "export", "write the network as ONNX, checked against PyTorch")
    _trained(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: model.onnx, in RUN)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference, relative to the largest entry (%(default)s)"
    )


def _report(commands: Any) -> None:
    parser = _command(commands, "report", "rebuild the report of a run")
    _trained(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: report.html, in RUN)")


def _settings(commands: Any) -> None:
    parser = _command(commands, "settings", "print every setting, what it is, and its value, for --set")
    _configuration(parser)
