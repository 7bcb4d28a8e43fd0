"""The command line, in this process, on a tiny rendered set: from training to a ranked list, and its error messages."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sn_ops import reid
from sn_ops.reid import cli, compare
from sn_ops.reid.checkpoint import load_checkpoint, save_checkpoint
from sn_ops.reid.config import from_dict, keys
from sn_ops.reid.evaluation import evaluate
from sn_ops.reid.inference import embed_images, load_embeddings
from sn_ops.reid.report import build
from support.tiny_runs import one_thread

image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'sn_ops[reid]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'sn_ops[reid]'")

SET = {
    "train_identities": 6, "test_identities": 4, "cameras": 2, "cameras_each": 2, "train_frames": 2,
    "gallery_frames": 1, "box_frames": 2, "distractors": 4, "junk": 2, "height": 64, "width": 32,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@dataclass(frozen=True)
class Place:
    """Where the tests work."""

    root: Path
    data: Path
    run: Path

    def settings(self, **more: object) -> list[str]:
        """--root and --set of a run of a second."""
        chosen: dict[str, object] = {
            "data.height": 64, "data.width": 32, "data.identities": 3, "data.images": 2, "data.workers": 0,
            "data.options": json.dumps(SET), "optim.epochs": 1, "optim.warmup_epochs": 0, "loss.k": 3,
            "run.log_every": 1, "run.device": "cpu", "eval.max_rank": 8,
        } | more  # fmt: skip
        return [
            "--root",
            str(self.data),
            *(word for pair in chosen.items() for word in ("--set", "=".join(map(str, pair)))),
        ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A rendered set and a run of two epochs."""
    root = tmp_path_factory.mktemp("cli")
    place = Place(root, root / "data", root / "runs" / "first")
    settings = place.settings(**{"optim.epochs": 2, "eval.multi_query": "true"})
    assert cli.main(["train", *settings, "--out", str(place.run), "--no-progress"]) == 0
    return place


def records(file: Path) -> Any:
    """A JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def fails(capsys: pytest.CaptureFixture[str], pattern: str, *arguments: object) -> None:
    """The command ends with status 2 and one message on stderr, without a traceback."""
    assert cli.main([str(argument) for argument in arguments]) == cli.USAGE_ERROR
    captured = capsys.readouterr()
    assert re.search(pattern, captured.err), captured.err
    assert "Traceback" not in captured.err and captured.out == ""


# ---- train --------------------------------------------------------------------------------------


def test_a_run_is_complete(place: Place) -> None:
    """Configuration, checkpoints, log, scores and report; every score is named synthetic."""
    for name in ("config.yaml", "checkpoints/last.pt", "checkpoints/best.pt", "metrics.jsonl", "report.html"):
        assert (place.run / name).stat().st_size > 0, name
    scores = records(place.run / "scores.json")
    assert scores["synthetic"] is True
    assert list(scores["scores"]) == ["single query (synthetic)", "multiple query (synthetic)"]
    text = (place.run / "report.html").read_text(encoding="utf-8")
    assert "Synthetic: rendered pedestrians" in text and "single query (synthetic)" in text
    for heading in ("Scores", "Training", "Ranked lists", "Support neighbours", "Embedding", "Configuration"):
        assert f"<h2>{heading}</h2>" in text, heading


def test_a_finished_run_is_resumed_for_more_epochs_only_as_another_run(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that decide the training cannot change when a run is resumed."""
    fails(capsys, "same configuration.*optim.epochs", "train", "--resume", place.run, "--set", "optim.epochs=5")
    before = (place.run / "config.yaml").read_bytes()
    for more in ((), ("--set", "run.threads=1"), ("--quick",)):
        words = ("train", "--resume", place.run, "--out", place.root / "other", *more)
        fails(capsys, "--out: expected none with --resume", *words)
    assert (place.run / "config.yaml").read_bytes() == before


def test_a_network_that_is_not_the_configurations(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message, not PyTorch's traceback."""
    state = load_checkpoint(place.run / "checkpoints" / "last.pt")
    config = from_dict(state["config"])
    whole = dict(state["model"])
    name, value = next(iter(whole.items()))
    for model in ({}, {key: v for key, v in whole.items() if key != name}, whole | {name: value[:1]}):
        save_checkpoint(tmp_path / "spoiled.pt", {**state, "model": model}, config)
        message = (
            r"^sn_ops\.reid: checkpoint: expected contents that fit the configuration in .*spoiled\.pt, got others"
        )
        fails(capsys, message, "embed", tmp_path / "spoiled.pt", place.data / "query")


def test_settings_from_files_and_the_command_line(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is the base; --data, --root and --set override it. Every setting is listed with its value."""
    file = tmp_path / "c.yaml"
    file.write_text("loss: {k: 7, alpha: 30}\ndata: {options: {quick: true}}\n")
    assert cli.main(["settings", "--config", str(file), "--root", "elsewhere", "--set", "loss.alpha=20"]) == 0
    lines = dict(line.split(maxsplit=2)[:2] for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(keys())
    assert (lines["loss.k"], lines["loss.alpha"], lines["data.root"]) == ("7", "20.0", "elsewhere")
    assert lines["data.options"].startswith("{'quick'")
    # Another data set does not inherit this one's options.
    assert cli.main(["settings", "--config", str(file), "--data", "msmt17"]) == 0
    assert re.search(r"^data.options +\{\} ", capsys.readouterr().out, re.M)
    assert cli.main(["settings", "--preset", "paper"]) == 0
    assert re.search(r"^optim.epochs +800 ", capsys.readouterr().out, re.M)


# ---- evaluate, report ---------------------------------------------------------------------------


def test_evaluate(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way to score, each under its name, the chosen definition said, and the numbers those of the features."""
    out = tmp_path / "evaluation"
    arguments = [
        "evaluate",
        place.run,
        "--checkpoint",
        "last",
        "--rerank",
        "--multi-query",
        "--baseline",
        "--workers",
        0,
    ]
    arguments += ["--average-precision", "market", "--distractors", place.data / "bounding_box_train", "--out", out]
    assert cli.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "The mAP of this run is the market one" in printed and "on synthetic" in printed
    found = records(out / "scores.json")
    names = [
        "single query",
        "multiple query",
        "single query, re-ranked",
        "multiple query, re-ranked",
        "colour histograms",
    ]
    assert list(found["scores"]) == [f"{name} (synthetic)" for name in names]
    assert all(f"{name} (synthetic)" in printed for name in names)

    trained = reid.open_trained(place.run, which="last")
    split = reid.load_split(trained.config.data)
    from sn_ops.reid.data.loading import eval_transform

    def embed(samples: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = embed_images(trained.model, [s.path for s in samples], eval_transform(trained.config.data))
        return features, torch.tensor([s.pid for s in samples]), torch.tensor([s.camera for s in samples])

    expected = evaluate(*embed(split.query), *embed(split.gallery))
    single = found["scores"]["single query (synthetic)"]
    assert single["average_precision"] == "market" and single["mAP"] == single["mAP_market"]
    assert single["mAP_standard"] == pytest.approx(expected.mAP_standard, abs=1e-12)
    assert single["mAP_market"] == pytest.approx(expected.mAP_market, abs=1e-12)
    assert len(single["cmc"]) == 8

    small, large = found["distractors"].values()
    sizes = [small["gallery"], large["gallery"]]
    assert sizes == [12, 12 + 24]  # four people under two cameras, four distractors; junk is not counted
    assert all(name.endswith(" (synthetic)") for name in found["distractors"])
    assert small["mAP"] == pytest.approx(single["mAP"], abs=1e-12) and large["mAP"] <= small["mAP"]
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Accuracy against gallery size</h2>" in text and "Synthetic: rendered" in text


def test_a_checkpoint_outside_of_a_run(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint has all that evaluation needs, and results are written beside it; a report needs the run."""
    moved = tmp_path / "moved.pt"
    moved.write_bytes((place.run / "checkpoints" / "last.pt").read_bytes())
    assert cli.main(["evaluate", str(moved), "--no-report", "--workers", "0"]) == 0
    assert [file.name for file in (tmp_path / "evaluation").iterdir()] == ["scores.json"]
    capsys.readouterr()
    fails(capsys, "report: expected a run's folder, got the checkpoint", "report", moved)


def test_report_is_rebuilt(place: Place, tmp_path: Path) -> None:
    """The same run and the same checkpoint give the same file, with every epoch's curves."""
    for name in ("a.html", "b.html"):
        assert cli.main(["report", str(place.run), "--out", str(tmp_path / name), "--workers", "0"]) == 0
    text = (tmp_path / "a.html").read_bytes()
    assert text == (tmp_path / "b.html").read_bytes() and b"<h2>Training</h2>" in text


def test_a_log_that_was_cut_off(tmp_path: Path) -> None:
    """A last line without its end is left out; a broken one before it is an error."""
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"epoch": 1, "step": 2, "loss": 2.0, "metric": 2.0, "lr": 2.0}\n'
        '{"epoch": 1, "step": 3, "gallery": 9, "mAP": 0.5}\n'
        '{"epoch": 2, "step": 4, "loss": 1.0, "metric": 1.0, "lr": 2.0}\n{"epo'
    )
    history = build.read_history(log)
    assert len(history) == 3
    shown = [{"step": 2, "loss": 2.0, "lr": 2.0}, {"step": 3, "mAP": 0.5}, {"step": 4, "loss": 1.0, "lr": 2.0}]
    assert build.curves(history) == shown
    assert build.curves(history, " (synthetic)")[1] == {"step": 3, "mAP (synthetic)": 0.5}
    log.write_text('{"epo\n{"epoch": 2}\n')
    with pytest.raises(ValueError, match="expected a JSON object, got line 1"):
        build.read_history(log)


# ---- render, embed, rank, export ----------------------------------------------------------------


def test_render(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many images as asked for; a second call finds the set, and another set in its folder is refused."""
    words = [
        word
        for pair in {**SET, "train_identities": 2, "seed": 5}.items()
        for word in ("--set", "=".join(map(str, pair)))
    ]
    assert cli.main(["render", str(tmp_path), *words]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)
    assert len(list((tmp_path / "bounding_box_train").glob("*.jpg"))) == 2 * 2 * 2
    assert cli.main(["render", str(tmp_path), *words]) == 0
    capsys.readouterr()
    fails(capsys, "sn_ops.reid: ", "render", tmp_path, "--quick")
    fails(capsys, r"--set: expected KEY=NUMBER with one of seed, .*got 'sead=1'", "render", tmp_path, "--set", "sead=1")
    fails(capsys, "--set: expected a number for seed, got 'x'", "render", tmp_path, "--set", "seed=x")


def test_embed_and_rank(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's embeddings, and lists from the folder and from the embeddings that are the same."""
    images, file = place.data / "bounding_box_test", tmp_path / "e.npz"
    assert cli.main(["embed", str(place.run), str(images), "--out", str(file), "--workers", "0"]) == 0
    stored = load_embeddings(file)
    assert len(stored.paths) == 14 and torch.allclose(stored.features.norm(dim=1), torch.ones(14), atol=1e-5)
    query = sorted((place.data / "query").iterdir())[0]
    printed = []
    for where in (images, file):
        out = tmp_path / f"{where.name}.csv"
        words = [
            "rank",
            place.run,
            query,
            where,
            "--top",
            3,
            "--out",
            out,
            "--out",
            out.with_suffix(".html"),
            "--workers",
            0,
        ]
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        printed.append(capsys.readouterr().out.splitlines()[:3])
        with out.open(newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        assert [row["rank"] for row in rows] == ["1", "2", "3"]
        assert [row["path"] for row in rows] == [line.split(maxsplit=2)[2] for line in printed[-1]]
        assert [float(row["distance"]) for row in rows] == sorted(float(row["distance"]) for row in rows)
        assert out.with_suffix(".html").read_text(encoding="utf-8").count("<img ") == 4
    assert printed[0] == printed[1]


def test_export(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that ONNX Runtime runs, checked; a tolerance that nothing meets leaves no file."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'sn_ops[reid]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'sn_ops[reid]'")
    file = tmp_path / "m.onnx"
    assert cli.main(["export", str(place.run), "--out", str(file)]) == 0
    assert "images [n, 3, 64, 32] to unit rows, within" in capsys.readouterr().out
    images = torch.rand(3, 3, 64, 32)
    (rows,) = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(reid.open_trained(place.run).model(images))
    assert torch.allclose(torch.from_numpy(rows), expected, atol=1e-4)


# ---- compare ------------------------------------------------------------------------------------


def test_compare(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two losses, two seeds: mean and deviation are those of the runs, and a second call trains nothing."""
    out = tmp_path / "compare"
    words = [
        "compare",
        *place.settings(),
        "--losses",
        "sn-span,triplet",
        "--seeds",
        "2",
        "--out",
        str(out),
        "--no-progress",
    ]
    assert cli.main([*words, "--baseline"]) == 0
    table = (out / "compare.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(table)
    found = records(out / "compare.json")
    assert "**synthetic**" in table and found["synthetic"] is True and "± " in table
    assert list(found["runs"]) == ["sn-span", "triplet"]
    for name, runs in found["runs"].items():
        scores = [records(out / name / f"seed{seed}" / "scores.json")["scores"] for seed in range(2)]
        values = torch.tensor([s["single query (synthetic)"]["mAP_standard"] for s in scores], dtype=torch.float64)
        assert [run["mAP_standard"] for run in runs] == values.tolist()
        summary = found["summary"][name]["mAP_standard"]
        assert summary["mean"] == pytest.approx(float(values.mean())) and summary["stdev"] == pytest.approx(
            float(values.std())
        )
        assert f"{100 * float(values.mean()):.2f} ± {100 * float(values.std()):.2f}" in table
    assert "| colour histograms, no training |" in table
    trained = {file: file.stat().st_mtime_ns for file in out.rglob("last.pt")}
    assert len(trained) == 4
    assert cli.main(words) == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("last.pt")} == trained
    # One run that was killed before its scores, one before its first checkpoint.
    (out / "triplet" / "seed0" / "scores.json").unlink()
    for file in (out / "sn-span" / "seed1" / "checkpoints").iterdir():
        file.unlink()
    (out / "sn-span" / "seed1" / "scores.json").unlink()
    assert cli.main(words) == 0
    assert records(out / "compare.json")["runs"] == found["runs"]
    capsys.readouterr()
    fails(capsys, "expected runs of this configuration", *words, "--set", "loss.k=2")


def test_compare_has_every_loss_and_reading() -> None:
    """Each variant is a valid configuration, and no two of them are one."""
    base = reid.preset("quick")
    prints = {name: base.override(*changes).fingerprint() for name, changes in compare.VARIANTS.items()}
    assert len(set(prints.values())) == len(prints) == len(compare.ABOUT)
    squeezes = {
        base.override(*changes).loss.squeeze for name, changes in compare.VARIANTS.items() if name.startswith("sn-")
    }
    assert squeezes == {"span", "support", "nearest", "none", "pair"}
    metrics = {base.override(*changes).loss.metric for changes in compare.VARIANTS.values()}
    assert metrics == {"sn", "triplet", "supcon", "none"}


def test_one_seed_has_no_spread() -> None:
    """The mean of one run has no deviation."""
    run = {"mAP_standard": 0.5, "mAP_market": 0.4, "rank1": 0.6, "mINP": 0.3}
    found = compare.Comparison("x", False, 3, {"sn-span": [run]}, None, {})
    assert "1 seed each" in found.markdown()
    under_way = compare.Comparison("x", False, 3, {"sn-span": [run, run], "triplet": [run]}, None, {})
    assert "1 to 2 seeds each" in under_way.markdown()
    assert found.spread("sn-span", "rank1") == (0.6, None)
    assert "| 50.00 | 40.00 | 60.00 | 30.00 |" in found.markdown() and "synthetic" not in found.markdown()


# ---- mistakes -----------------------------------------------------------------------------------


def test_mistakes_of_the_user(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message says what was expected and what was given."""
    run = place.run
    fails(capsys, r"preset: expected one of 'default', .*got 'papre'", "train", "--preset", "papre")
    fails(capsys, r"expected one of loss\.metric.*got 'loss\.kk'", "train", "--set", "loss.kk=3")
    fails(capsys, r"loss\.k: expected an int.*'many'", "train", "--set", "loss.k=many")
    fails(capsys, r"expected section\.field=value, got 'loss\.k'", "train", "--set", "loss.k")
    fails(capsys, r"No such file or directory: .*no\.yaml", "train", "--config", tmp_path / "no.yaml")
    fails(capsys, "data set: expected one of market1501", "train", "--data", "market", "--out", tmp_path / "r")
    fails(capsys, "not allowed with argument", "train", "--quick", "--preset", "paper")
    fails(capsys, "the following arguments are required", "evaluate")
    fails(capsys, "run: expected a run's folder or a checkpoint at", "evaluate", tmp_path / "nowhere")
    fails(capsys, "a folder without checkpoints", "evaluate", tmp_path)
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    fails(capsys, "expected a checkpoint of sn_ops.reid", "evaluate", tmp_path / "bad.pt")
    fails(capsys, "images: expected a folder, got", "embed", run, tmp_path / "nowhere")
    fails(capsys, "query: expected an image file", "rank", run, tmp_path / "no.jpg", place.data / "query")
    fails(
        capsys, r"--out: expected a file name that ends in \.html or \.csv", "rank", run, "a", "b", "--out", "list.txt"
    )
    for device in ("gpu", "mps", "meta", "cpu:0", "cuda:-1", "cuda:01", "cuda:x", ""):
        message = f"device: expected auto, cpu, cuda or cuda:<index>, got '{device}'"
        fails(capsys, message, "embed", run, place.data / "query", "--device", device)
    for device in ("cuda:255", "cuda:256"):  # PyTorch keeps an index in a byte
        message = f"device: expected a device that is here, got '{device}'"
        fails(capsys, message, "embed", run, place.data / "query", "--device", device)
    (tmp_path / "numbers.yaml").write_text("1: 2")
    fails(capsys, r"expected one of data\.name", "train", "--config", tmp_path / "numbers.yaml")
    fails(capsys, "--workers: expected an int >= 0", "embed", run, place.data / "query", "--workers", -1)
    fails(capsys, "--losses: expected names among sn-span", "compare", "--losses", "softmax")
    fails(capsys, "--seeds: expected an int >= 1, got 0", "compare", "--seeds", 0, *place.settings())


def test_multiple_query_without_images_for_it(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Multiple query without images for it is an error, not a score over fewer queries."""
    data = tmp_path / "market"
    for name in ("bounding_box_train", "query", "bounding_box_test"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).symlink_to(place.data / name)
    words = ["evaluate", place.run, "--data", "market1501", "--root", data, "--set", "data.options.check_counts=false"]
    fails(capsys, "multiple query: expected a data set with several images", *words, "--multi-query")


def test_faults_of_ours_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that no check raised is a bug: it keeps its traceback. An error's own exit status is kept."""
    from sn_ops.reid import commands

    class StopError(Exception):
        exit_status = 75

    def raising(error: BaseException) -> Any:
        def run(options: object) -> None:
            raise error

        return run

    for error in (
        ValueError("something else"),
        RuntimeError("sn_ops.reid: model: a fault"),
        KeyError("k"),
        OSError("x"),
    ):
        monkeypatch.setattr(commands, "settings", raising(error))
        with pytest.raises(type(error)):
            cli.main(["settings"])
    ends: list[tuple[BaseException, int]] = [
        (StopError("stopped"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left", "f"), 2),
    ]
    for ending, status in ends:
        monkeypatch.setattr(commands, "settings", raising(ending))
        assert cli.main(["settings"]) == status
    assert capsys.readouterr().err == "stopped\nsn_ops.reid: interrupted\nsn_ops.reid: No space left: f\n"


def elsewhere(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A program in another folder, with the package that this process has."""
    environment = os.environ | {"PYTHONPATH": str(Path(reid.__file__).parents[2])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_help_and_a_closed_pipe(tmp_path: Path) -> None:
    """As a program: every command is in the help, and a reader that leaves early is no error."""
    assert cli.main(["--help"]) == 0
    command = f"{sys.executable} -m sn_ops.reid settings | head -n 1; exit ${{PIPESTATUS[0]}}"
    ended = elsewhere(tmp_path, "bash", "-c", command)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("data.name")


def test_console_script(tmp_path: Path) -> None:
    """The entry point that pip installs is `python -m sn_ops.reid` under its own name."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    entry = re.search(r'^\[project\.scripts\]\nsn-reid = "([\w.]+):(\w+)"$', project, re.MULTILINE)
    assert entry is not None
    script = tmp_path / "sn-reid"
    script.write_text(f"import sys\nfrom {entry[1]} import {entry[2]}\nsys.exit({entry[2]}())\n")
    for program, command in {"sn-reid": [str(script)], "python -m sn_ops.reid": ["-m", "sn_ops.reid"]}.items():
        shown = elsewhere(tmp_path, sys.executable, *command, "--help")
        assert shown.returncode == 0 and shown.stdout.startswith(f"usage: {program} [-h] command "), shown.stderr
        assert f"\n  {program} train --quick " in shown.stdout
    wrong = elsewhere(tmp_path, sys.executable, str(script), "train", "--set", "loss.q=1")
    assert wrong.returncode == cli.USAGE_ERROR and "got 'loss.q'" in wrong.stderr


def test_public_names(tmp_path: Path) -> None:
    """Every public name exists, none is imported before it is used, and another name is an AttributeError."""
    for name in reid.__all__:
        assert getattr(reid, name) is not None and name in dir(reid)
    code = (
        "import sys, sn_ops.reid; print([m for m in sys.modules if m.startswith('sn_ops.reid.') or m == 'torchvision'])"
    )
    ended = elsewhere(tmp_path, sys.executable, "-c", code)
    assert ended.stdout.strip() == "[]", ended.stderr
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = reid.nonsense
