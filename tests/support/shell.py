"""Commands of a shell as pages show them, checked without being run: the command exists and takes the arguments."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from support.pages import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

# What a reader has or is told to install; none of it is this project's to check further.
OTHERS = {"bash", "cd", "cmake", "git", "mypy", "ncu", "nvidia-smi", "pre-commit", "ruff", "tar"}
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, one list of words each, without comments and assignments before them."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                while words and ASSIGNMENT.fullmatch(words[0]):
                    words = words[1:]
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def problem(words: list[str]) -> str:
    """What is wrong with a command; empty if nothing is."""
    name, arguments = words[0], words[1:]
    if name in ("python", "python3"):
        return _python(arguments)
    if name == "pip":
        return _pip(arguments)
    if name == "torchrun":
        from torch.distributed import run

        parsed, problem = _parse(run.get_args_parser(), arguments)
        return problem or _python(
            [*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]
        )
    if name == "pytest":
        paths = [word.partition("::")[0] for word in arguments if not word.startswith("-") and "/" in word]
        return "; ".join(f"no {path} here" for path in paths if not (ROOT / path).exists())
    if name == "mkdocs":
        return "" if arguments[:1] in (["serve"], ["build"]) else f"mkdocs {' '.join(arguments)} is unknown"
    if name == "sn-reid":
        return _reid(arguments)
    if "/" in name:
        return "" if (ROOT / name).is_file() else f"no {name} here"
    return "" if name in OTHERS else f"{name} is unknown"


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, str]:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return parser.parse_args(arguments), ""
    except SystemExit:
        return argparse.Namespace(), errors.getvalue().strip().splitlines()[-1]


def _python(arguments: list[str]) -> str:
    if arguments[:1] == ["-m"]:
        module = arguments[1]
        if importlib.util.find_spec(module) is None:
            return f"no module {module}"
        return _reid(arguments[2:]) if module == "sn_ops.reid" else ""
    script = Path(arguments[0])
    if script.parent == Path():  # a reader's own, such as train.py
        return ""
    if not (ROOT / script).is_file():
        return f"no {script} here"
    unknown = [
        word for word in arguments[1:] if word.startswith("--") and word.partition("=")[0] not in _options(script)
    ]
    return f"{script} has no {', '.join(unknown)}" if unknown else ""


@cache
def _options(script: Path) -> frozenset[str]:
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    return frozenset(re.findall(r"--[\w-]+", done.stdout))


def _reid(arguments: list[str]) -> str:
    from sn_ops.reid import cli, preset

    if not arguments:  # the command as such
        return ""
    options, problem = _parse(cli._parser(), arguments)
    if not problem and hasattr(options, "preset"):  # `render --set` sets what is rendered
        try:
            preset(options.preset or "default").override(*options.set)
        except (ValueError, TypeError, KeyError) as error:
            return str(error)
    return problem


def extras() -> set[str]:
    """The extras that pyproject.toml has."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return set(tomllib.load(file)["project"]["optional-dependencies"])


def _pip(arguments: list[str]) -> str:
    if arguments[:1] != ["install"]:
        return f"pip {' '.join(arguments)} is unknown"
    for word in arguments[1:]:
        if word.startswith("-"):
            continue
        try:
            wanted = Requirement("sn_ops" + word.removeprefix(".") if word.startswith(".") else word)
        except InvalidRequirement as error:
            return str(error)
        if wanted.name == "sn_ops" and (unknown := wanted.extras - extras()):
            return f"no extra {', '.join(sorted(unknown))}"
    return ""
