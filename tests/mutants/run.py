"""Breaks the kernels on purpose, one place at a time, and shows that a test notices.

    python tests/mutants/run.py [--list] [--tree FOLDER] [NAME ...]

Runs all of `catalogue.MUTANTS`, or those whose names begin with one of the given ones. It works on a copy of the tree
(all files that git knows, as they are on disk), in a temporary folder or in the one of --tree, which is kept: there a
later run builds only what has changed. First the tests that kill must pass on the copy as it is. Then each mutant is
applied, its tests run, and the file is put back.

A mutant is "killed" if a test fails, "survived" if all pass: then a test is missing. "does not apply": its old text is
no longer in the file exactly once; "does not build": nothing is proved. The exit status is 0 if all are killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from mutants.catalogue import MUTANTS  # noqa: E402
from mutants.mutant import CPU, Mutant  # noqa: E402

PATIENCE = 900
"""Seconds that the tests of one mutant may take: a kernel that never ends is noticed too."""


def copy_tree(to: Path) -> None:
    """Brings the files of the checkout there; equal ones keep their times, so that they are not built again."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    names += [str(library.relative_to(ROOT)) for library in (ROOT / "sn_ops").glob("*.so")]
    for name in names:
        source, target = ROOT / name, to / name
        if target.exists() and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def command(tree: Path, *arguments: str, patience: float) -> tuple[int, str]:
    """Runs this Python in the tree, on its sn_ops and its harness. The status and what it printed."""
    path = os.pathsep.join([str(tree), str(tree / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("SN_SIMT_LIBRARY", None)
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tree, env=environment, timeout=patience,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"nothing after {patience:.0f} s"
    return done.returncode, done.stdout


def build(tree: Path, targets: Iterable[str]) -> tuple[bool, str]:
    """Libraries of the emulator, as pytest uses them, and the package's own, without CUDA."""
    if set(CPU) & set(targets):
        program = "import os, runpy, sys; os.environ['SN_OPS_CUDA'] = '0'; "
        program += "sys.argv[1:] = ['build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
        status, output = command(tree, "-c", program, patience=3600)
        if status != 0:
            return False, output
    targets = [target for target in targets if target not in CPU]
    program = "; ".join(["from support import simt_build", *(f"simt_build.build({target!r})" for target in targets)])
    status, output = command(tree, "-c", program, patience=3600)
    return status == 0, output


def tests(tree: Path, selection: Sequence[str]) -> tuple[bool, str]:
    """Whether all pass. The first failure ends it; a crash is a failure."""
    status, output = command(tree, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selection, patience=PATIENCE)
    # 4 and 5: no such test, nothing collected. That would make every mutant look killed.
    if status in (4, 5):
        raise SystemExit(f"pytest does not know {' '.join(selection)}:\n{output[-2000:]}")
    return status == 0, output


def try_out(tree: Path, mutant: Mutant) -> str:
    """Applies a mutant, runs its tests, and puts the file back."""
    file = tree / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return "does not apply"
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        built, output = build(tree, mutant.builds)
        if not built:
            print(output[-2000:])
            return "does not build"
        return "survived" if tests(tree, mutant.killers)[0] else "killed"
    finally:
        file.write_text(text, encoding="utf-8")
        if set(CPU) & set(mutant.builds):
            build(tree, CPU)  # other mutants' tests load it, too


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help="beginnings of names; none: all")
    parser.add_argument("--list", action="store_true", help="name the mutants, and what is wrong with each")
    parser.add_argument("--tree", type=Path, help="folder of the copy, kept for the next run")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or m.name.startswith(tuple(options.names))]
    if not chosen:
        parser.error("no mutant has such a name")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}: {mutant.file}: {mutant.why}")
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        tree = options.tree.resolve() if options.tree else Path(temporary)
        if tree == ROOT or ROOT in tree.parents:
            parser.error("the copy must lie outside the checkout")
        begin = time.monotonic()
        copy_tree(tree)
        targets = sorted({target for mutant in chosen for target in mutant.builds})
        built, output = build(tree, targets)
        if not built:
            raise SystemExit(f"the tree as it is does not build:\n{output}")
        print(f"built    {time.monotonic() - begin:6.0f} s", flush=True)
        begin = time.monotonic()
        passed, output = tests(tree, sorted({killer for mutant in chosen for killer in mutant.killers}))
        if not passed:
            raise SystemExit(f"the tests do not pass on the tree as it is:\n{output[-4000:]}")
        print(f"as it is {time.monotonic() - begin:6.0f} s: passes", flush=True)

        results: dict[str, str] = {}
        for mutant in chosen:
            begin = time.monotonic()
            results[mutant.name] = try_out(tree, mutant)
            print(f"{mutant.name:40} {time.monotonic() - begin:6.0f} s: {results[mutant.name]}", flush=True)
        if options.tree:
            build(tree, targets)  # of the files as they are again
    lively = [name for name, result in results.items() if result != "killed"]
    print(f"{len(results) - len(lively)} of {len(results)} killed" + "".join(f"\n{results[n]}: {n}" for n in lively))
    return 1 if lively else 0


if __name__ == "__main__":
    sys.exit(main())
