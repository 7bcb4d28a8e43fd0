"""The HTML report: what it contains, and how a real browser shows it."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sn_ops.reid.config import Config, to_yaml
from sn_ops.reid.data import Sample, Split
from sn_ops.reid.data.loading import eval_transform
from sn_ops.reid.evaluation import ReRank, Scores, evaluate, evaluate_with_distractors
from sn_ops.reid.models import build_model
from sn_ops.reid.report import Embedded, Report, build, page, plots, write_report

# The extra `reid` has these; they are not optional for a run of the whole suite.
image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'sn_ops[reid]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'sn_ops[reid]'")

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@dataclass(frozen=True)
class Picture:
    """As `data.records.Sample`."""

    path: Path
    pid: int
    camera: int


def embedded(folder: Path, n: int, seed: int, first: int = 1) -> Embedded:
    """Images of one colour a person, and features around a centre a person."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    samples, rows = [], []
    for i in range(n):
        pid = int(torch.randint(first, 8, (), generator=generator))
        camera = int(torch.randint(0, 3, (), generator=generator))
        path = folder / f"{seed}_{i:03d}_{pid}.png"
        image_module.new("RGB", (48, 96), (30 * pid, 255 - 30 * pid, 40 * camera)).save(path)
        samples.append(Picture(path, pid, camera))
        rows.append(centres[pid] + 1.2 * torch.randn(16, generator=generator))
    return Embedded(samples, torch.nn.functional.normalize(torch.stack(rows)))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report with every part."""
    folder = tmp_path_factory.mktemp("images")
    query, gallery = embedded(folder, 12, 1), embedded(folder, 70, 2, first=-1)
    arguments = (query.features, query.ids, query.cameras, gallery.features, gallery.ids, gallery.cameras)
    distractors = torch.nn.functional.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(1)))
    return Report(
        title="Run <1> & more",
        notice="Synthetic pedestrians: <not> a benchmark.",
        configuration={"loss.alpha": 50.0, "note": "<script>alert(1)</script>"},
        history=[{"epoch": e, "loss": 1 / (e + 1), "lr": 5e-5, **({"mAP": e / 10} if e % 2 else {})} for e in range(6)],
        scores={"single query": evaluate(*arguments), "re-ranked": evaluate(*arguments, rerank=ReRank(6, 3))},
        distractors=evaluate_with_distractors(*arguments, distractors=distractors),
        query=query,
        gallery=gallery,
        k=5,
        lists=4,
    )


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's file; tests only read it."""
    return write_report(tmp_path_factory.mktemp("report") / "report.html", report)


def test_contents(written: Path) -> None:
    """Every part is there, text is escaped, right and wrong are counted, and nothing is loaded from elsewhere."""
    text = written.read_text()
    for heading in (
        "Scores", "Accuracy against gallery size", "Training", "Ranked lists", "Distances", "Embedding",
        "Support neighbours", "Configuration",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text, heading
    assert "Run &lt;1&gt; &amp; more" in text and "&lt;script&gt;" in text and "<script" not in text
    assert text.count('class="asked"') == 4 + 6
    assert "What the loss would see in a batch of some gallery images, by their features for retrieval" in text
    assert re.search(r'<figure class="right"><img [^>]*><figcaption><b>✓ [1-7]<', text)
    assert re.search(r'<figure class="wrong"><img [^>]*><figcaption><b>✗ ', text)
    assert set(re.findall(r'(?:src|href)="([^"]{5})', text)) == {"data:"}
    assert [file.name for file in written.parent.iterdir()] == ["report.html"]


def test_frames_tell_right_from_wrong(written: Path) -> None:
    """In the ranked lists a frame is right exactly where the file name has the query's identity."""
    text = written.read_text()
    part = text[text.index("<h2>Ranked lists</h2>") : text.index("<h2>Distances</h2>")]
    strips = part.split('<div class="strip">')[1:]
    assert len(strips) == 4
    frames = 0
    for strip in strips:
        asked, *found = re.findall(r'class="(\w+)"><img alt="\d_\d+_(-?\d+)\.png"', strip)
        assert asked[0] == "asked"
        assert all((kind == "right") == (pid == asked[1]) and int(pid) >= 0 for kind, pid in found)
        frames += len(found)
    assert frames == 40


def test_the_same_run_gives_the_same_file(report: Report, written: Path, tmp_path: Path) -> None:
    """No date, no random ids."""
    assert write_report(tmp_path / "again.html", report).read_bytes() == written.read_bytes()


def test_a_report_of_little(tmp_path: Path) -> None:
    """Parts without data are left out."""
    text = write_report(
        tmp_path / "report.html", Report(title="empty", history=[{"epoch": 0, "loss": 1.0}])
    ).read_text()
    assert "<h2>" not in text and "<title>empty</title>" in text


def test_features_and_samples_must_be_as_many(report: Report) -> None:
    """The message has both."""
    assert report.query is not None
    with pytest.raises(ValueError, match=r"features: expected \[11, D\], one row a sample, got \[12, 16\]"):
        Embedded(report.query.samples[1:], report.query.features)


def test_tsne_keeps_clusters_apart() -> None:
    """Of points in clear clusters the nearest neighbour in the plane is of the same cluster; the layout repeats."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(60) % 6
    x = 4 * torch.randn(6, 20, generator=generator)[groups] + torch.randn(60, 20, generator=generator)
    y = plots.plane(x)
    assert y.shape == (60, 2) and bool(y.isfinite().all()) and torch.equal(y, plots.plane(x))
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    assert float((groups[nearest] == groups).double().mean()) > 0.95
    for n in range(7):
        assert plots.plane(x[:n]).shape == (n, 2)
    assert bool(plots.plane(torch.ones(9, 3)).isfinite().all())


def test_support_neighbours_are_those_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric loss takes features before the neck, retrieval those behind it; the report shows both as they are."""
    folder = tmp_path / "images"
    folder.mkdir()
    samples = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 32, 3), dtype=np.uint8)
        image_module.fromarray(pixels).save(folder / f"{i}.png")
        samples.append(Sample(folder / f"{i}.png", 1 + i // 2, i % 2))
    train, test = tuple(samples[:4]), tuple(samples[4:])
    split = Split("eight", train, test[::2], test[1::2])
    config = Config().override(
        "data.height=64", "data.width=32", "data.identities=2", "data.images=2", "data.workers=0", "model.neck=true",
        "loss.identity=1.0",
    )  # fmt: skip
    to_yaml(config, tmp_path / "config.yaml")
    torch.manual_seed(0)
    model = build_model(config.model, 2).train()
    assert isinstance(model.neck, torch.nn.BatchNorm1d) and model.neck.running_mean is not None
    torch.nn.init.normal_(model.neck.running_mean)
    torch.nn.init.uniform_(model.neck.weight, 0.5, 2.0)
    seen: list[Report] = []

    def noted(path: Path, report: Report) -> Path:
        seen.append(report)
        return write_report(path, report)

    monkeypatch.setattr(build, "write_report", noted)
    text = build.write_run_report(tmp_path, model=model, split=split).read_text()
    assert "What the loss sees in a training batch, by the features that it takes (before a neck" in text
    assert all(module.training for module in model.modules())

    transform = eval_transform(config.data)

    def images(shown: Embedded) -> torch.Tensor:
        return torch.stack([transform(image_module.open(sample.path)) for sample in shown.samples])

    anchors, query = seen[0].anchors, seen[0].query
    assert anchors is not None and query is not None
    assert {sample.path for sample in anchors.samples} == {sample.path for sample in train}
    model.eval()
    normalize = torch.nn.functional.normalize
    with torch.no_grad():
        before, behind = model.projection(model.backbone(images(anchors))), model(images(anchors))
        assert torch.allclose(anchors.features, normalize(before), atol=1e-5)
        assert not torch.allclose(anchors.features, normalize(behind), atol=1e-2)
        assert torch.allclose(query.features, normalize(model(images(query))), atol=1e-5)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    """The error names the image file."""
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(OSError, match=r"^sn_ops.reid: images: expected an image, got .*x\.png: "):
        page.thumbnail(tmp_path / "x.png")


# ---- in a browser -----------------------------------------------------------------------------------------------

PROBE = """
<script>
window.addEventListener("load", () => {
  const images = [...document.images];
  const hidden = images.filter(i => !(i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 0));
  document.title = `images ${images.length} broken ${hidden.length} ` +
    `width ${document.documentElement.scrollWidth <= window.innerWidth}`;
});
</script>
"""


@dataclass(frozen=True)
class Shown:
    """What the browser shows of a page."""

    title: str
    console: str
    screenshot: Path


def show(page: Path, folder: Path) -> Shown:
    """Opens a copy of the page that counts its images, and takes a picture of it."""
    assert BROWSER is not None
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    screenshot = folder / "shot.png"
    common = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1200,5000", "--virtual-time-budget=10000",
        "--enable-logging=stderr",
    ]  # fmt: skip
    dom = subprocess.run(
        [*common, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    subprocess.run([*common, f"--screenshot={screenshot}", page.as_uri()], capture_output=True, timeout=180, check=True)
    title = re.search(r"<title>(.*?)</title>", dom.stdout)
    assert title is not None, dom.stdout[:500]
    console = "\n".join(line for line in dom.stderr.splitlines() if "CONSOLE" in line)
    return Shown(title[1], console, screenshot)


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome here (Debian package: chromium)"
)


@needs_browser
def test_a_browser_shows_the_report(written: Path, tmp_path: Path) -> None:
    """Every image loads and has a size, nothing is reported on the console, the page is not wider than the window."""
    shown = show(written, tmp_path)
    count = written.read_text().count("<img ")
    assert count > 50
    assert shown.title == f"images {count} broken 0 width true"
    assert shown.console == ""
    # The frames' colours are on the screen, and so is the first query's own.
    pixels = image_module.open(shown.screenshot).convert("RGB")
    colours = {colour for _, colour in pixels.getcolors(maxcolors=1 << 24)}
    assert {(0x1D, 0x8A, 0x4A), (0xC8, 0x37, 0x2D), (0xE0, 0xA1, 0x00)} <= colours


@needs_browser
def test_the_browser_check_sees_faults(written: Path, tmp_path: Path) -> None:
    """A broken image and a message on the console are found by the check above."""
    good = re.search(r"data:image/jpeg;base64,[^\"]+", written.read_text())
    assert good is not None
    bad = "data:image/jpeg;base64," + base64.b64encode(b"no image").decode()
    broken = (
        written.read_text().replace(good[0], bad).replace("</body>", "<script>console.error('seen')</script></body>")
    )
    page = tmp_path / "report.html"
    page.write_text(broken)
    shown = show(page, tmp_path)
    assert "broken 0" not in shown.title and "seen" in shown.console


def test_scores_in_the_table(report: Report, written: Path) -> None:
    """Both definitions of mAP, by name, to two decimals of a per cent."""
    scores: Scores = report.scores["single query"]
    text = written.read_text()
    assert "<th>mAP (standard)</th><th>mAP (market)</th>" in text
    assert (
        f"<td>single query</td><td>{100 * scores.mAP_standard:.2f}</td><td>{100 * scores.mAP_market:.2f}</td>" in text
    )
