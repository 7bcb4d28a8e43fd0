"""The rendered set: the same bytes whatever the order, true names, what differs between people, folders that exist."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from sn_ops.reid.data import DISTRACTOR, JUNK, load_dataset, market1501
from sn_ops.reid.data.records import Sample, Split
from sn_ops.reid.data.synthetic import FOLDERS, MANIFEST, Image, Renderer, SyntheticConfig, plan, render, writing
from sn_ops.reid.data.synthetic.appearance import PATTERNS, Appearance, appearance
from sn_ops.reid.data.synthetic.canvas import Canvas
from sn_ops.reid.data.synthetic.figure import Figure
from sn_ops.reid.data.synthetic.plan import Kind, cameras_of, identities
from sn_ops.reid.data.synthetic.pose import Box, Moment, View, leg, moment
from sn_ops.reid.evaluation import Scores, evaluate
from sn_ops.reid.inference.histograms import colour_histograms

NAME = re.compile(r"(-1|\d{4})_c([1-6])s([1-6])_(\d{6})_(\d{2})\.jpg")
TINY = SyntheticConfig(
    seed=3,
    train_identities=5,
    test_identities=4,
    cameras=3,
    cameras_each=2,
    train_frames=2,
    gallery_frames=2,
    box_frames=2,
    distractors=7,
    junk=5,
    occlusion=0.5,
)


def contents(root: Path) -> dict[str, bytes]:
    """All files of the set's four folders."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes() for folder in FOLDERS for path in (root / folder).iterdir()
    }


def pixels(jpeg: bytes) -> NDArray[np.float32]:
    """`[H, W, 3]`."""
    with Pillow.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB"), dtype=np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY, rendered."""
    return render(tmp_path_factory.mktemp("rendered") / "tiny", TINY)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick set with few training identities, rendered."""
    config = replace(SyntheticConfig.quick(), train_identities=2, box_frames=1)
    return render(tmp_path_factory.mktemp("rendered") / "quick", config)


# ---- images -------------------------------------------------------------------------------------


def test_an_image_is_the_same_alone_and_in_any_order(tiny: Path) -> None:
    """Each is a function of the seed, identity, camera and frame, not of what the renderer drew before."""
    whole = contents(tiny)
    images = list(plan(TINY))
    backwards = Renderer(TINY)
    for image in reversed(images):
        assert backwards.jpeg(image) == whole[f"{image.folder}/{image.name(TINY.seed)}"]
    for image in images[::9]:
        assert Renderer(TINY).jpeg(image) == whole[f"{image.folder}/{image.name(TINY.seed)}"]


def test_processes_do_not_change_a_byte(tiny: Path, tmp_path: Path) -> None:
    assert contents(render(tmp_path / "set", TINY, workers=2)) == contents(tiny)


def test_a_larger_set_keeps_the_images_of_a_smaller_one() -> None:
    """Numbers of people, frames and distractors decide which images exist, not what they show."""
    larger = replace(TINY, train_identities=30, train_frames=6, distractors=90, junk=40, gallery_frames=9)
    small, large = Renderer(TINY), Renderer(larger)
    for image in plan(TINY)[::7]:
        assert small.jpeg(image) == large.jpeg(image)


def test_seed_camera_frame_and_box_change_the_image() -> None:
    image = next(image for image in plan(TINY) if image.kind is Kind.PERSON)
    renderer = Renderer(TINY)
    others = [replace(image, camera=(image.camera + 1) % 3), replace(image, frame=image.frame + 1)]
    others += [replace(image, box=1 - image.box), replace(image, identity=image.identity + 1)]
    versions = {renderer.jpeg(image), Renderer(replace(TINY, seed=4)).jpeg(image), *map(renderer.jpeg, others)}
    assert len(versions) == 6


def test_no_two_images_of_a_set_are_the_same(tiny: Path) -> None:
    """Except the queries, which are in gt_bbox too, as in Market-1501."""
    count = Counter(contents(tiny).values())
    repeated = {content for content, times in count.items() if times > 1}
    assert repeated == {path.read_bytes() for path in (tiny / "query").iterdir()}
    assert max(count.values()) == 2


@pytest.mark.parametrize(("height", "width"), [(128, 64), (96, 48)])
def test_images_have_the_size_asked_for(height: int, width: int) -> None:
    config = replace(TINY, height=height, width=width)
    for image in plan(config)[::25]:
        assert pixels(Renderer(config).jpeg(image)).shape == (height, width, 3)


def test_a_person_is_in_the_middle_and_differs_from_the_background() -> None:
    """The mean over people of many colours is flat; that a figure is drawn shows in the spread across people."""
    config = replace(TINY, train_identities=40, occlusion=0.0)
    renderer = Renderer(config)
    shots = np.stack([pixels(renderer.jpeg(Image(FOLDERS[1], Kind.PERSON, p, 1, 0, 0))) for p in range(1, 41)])
    spread = shots.std(axis=0).mean(axis=2)
    assert spread[30:60, 27:37].mean() > 1.5 * spread[30:60, :6].mean()


def test_cameras_differ_in_light_and_sharpness() -> None:
    renderer = Renderer(SyntheticConfig())
    cameras = [renderer.camera(number) for number in range(6)]
    red_to_blue = [float(camera.gains[0] / camera.gains[2]) for camera in cameras]
    assert max(red_to_blue) / min(red_to_blue) > 1.1
    for name in ("gamma", "softness", "noise", "quality", "pitch", "lamp", "saturation"):
        assert len({getattr(camera, name) for camera in cameras}) >= 5, name
    assert len({camera.scene.tobytes() for camera in cameras}) == 6


def test_the_quality_of_a_jpeg_is_the_cameras() -> None:
    renderer = Renderer(SyntheticConfig())
    for number in range(3):
        with Pillow.open(io.BytesIO(renderer.jpeg(Image("query", Kind.PERSON, 1, number, 0, 0)))) as image:
            got = {key: list(table) for key, table in image.quantization.items()}  # type: ignore[attr-defined]
        again = io.BytesIO()
        Pillow.new("RGB", (64, 128)).save(again, "JPEG", quality=renderer.camera(number).quality)
        with Pillow.open(again) as image:
            assert got == {key: list(table) for key, table in image.quantization.items()}  # type: ignore[attr-defined]


# ---- people -------------------------------------------------------------------------------------


def differences(one: Appearance, other: Appearance) -> set[str]:
    """The attributes in which two people differ."""
    return {name for name, value in asdict(one).items() if value != asdict(other)[name]}


def test_twins_differ_in_one_attribute_and_are_in_one_split() -> None:
    config = SyntheticConfig(twins=1.0)
    train, test = identities(config)
    seen = Counter[str]()
    for split in (train, test):
        for first in [identity for identity in split if identity % 2 and identity + 1 in split]:
            (name,) = differences(appearance(0, first, 1.0), appearance(0, first + 1, 1.0))
            seen[name] += 1
        assert sum(identity + 1 in split for identity in split if identity % 2) == len(split) // 2
    assert len(seen) >= 6, seen
    assert not seen.keys() & {"tall", "girth", "legs", "skin"}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_share_of_twins_is_the_one_asked_for(share: float) -> None:
    pairs = range(1, 601, 2)
    twins = sum(len(differences(appearance(0, first, share), appearance(0, first + 1, share))) == 1 for first in pairs)
    assert abs(twins / len(pairs) - share) < 0.08


def test_a_twin_looks_different() -> None:
    """In the same pose, under the same camera, at more than the pixels that noise moves."""
    config = SyntheticConfig(twins=1.0, occlusion=0.0)
    renderer = Renderer(config)
    for first in range(1, 41, 2):
        when = moment(0, first, 0, 0, 0.0)
        views = [
            _drawn(renderer.person(identity), replace(when, yaw=yaw))
            for yaw in (0.4, 2.6)
            for identity in (first, first + 1)
        ]
        changed = max(int((np.abs(views[i] - views[i + 1]).max(axis=2) > 60).sum()) for i in (0, 2))
        assert changed > 40, (first, differences(renderer.person(first), renderer.person(first + 1)))


def _drawn(who: Appearance, when: Moment) -> NDArray[np.float32]:
    """A figure on grey, without a camera's doing, `[H, W, 3]` at the canvas's resolution."""
    canvas = Canvas(Pillow.new("RGB", (192, 384), (128, 128, 128)))
    Figure(canvas, who, when, Box(0.5, 0.97, 0.9, 0.0), 0.1).draw()
    return np.asarray(canvas.image, dtype=np.float32)


def test_people_differ_in_every_attribute_and_share_colours() -> None:
    people = [appearance(0, identity, 0.0) for identity in range(1, 301)]
    for field in fields(Appearance):
        assert len({getattr(person, field.name) for person in people}) >= 3, field.name
    assert {person.pattern for person in people} == set(PATTERNS)
    # What a histogram sees: it must not be enough to tell people apart.
    garments = Counter((person.upper_colour, person.lower_colour) for person in people)
    assert garments.most_common(1)[0][1] >= 8
    assert all(person.upper_colour != person.second_colour for person in people)


def test_figures_turn_walk_and_are_covered() -> None:
    who = appearance(0, 1, 0.0)
    still = replace(moment(0, 1, 0, 0, 0.0), yaw=0.0, phase=0.0, stride=0.5)
    others = [replace(still, yaw=1.57), replace(still, yaw=3.14), replace(still, phase=1.57)]
    shots = [_drawn(who, when) for when in (still, *others)]
    for i, one in enumerate(shots):
        for other in shots[i + 1 :]:
            assert (np.abs(one - other).max(axis=2) > 60).mean() > 0.01
    share = np.mean([moment(0, p, 0, f, 0.25).occluder != "none" for p in range(1, 101) for f in range(5)])
    assert abs(share - 0.25) < 0.06


def test_projection_and_gait_by_hand() -> None:
    """Facing the camera, one's left is on the image's right; walking to the right, it is away from the camera."""
    assert View(0.0, 0.0).project(1, 2, 3) == (1, 2, 3)
    across, up, depth = View(np.pi / 2, 0.0).project(1, 2, 3)
    assert (across, up, depth) == pytest.approx((3, 2, -1))
    assert View(np.pi, 0.0).project(1, 2, 3)[0] == pytest.approx(-1)
    assert View(0.0, 0.1).project(0, 0, 1)[1] < 0  # seen from above, what is nearer is lower
    left, right = (leg(side, 0.5, 0.05, 0.7, 0.4) for side in (1, -1))
    assert left.knee[2] > 0 > right.knee[2]  # one leg ahead, the other behind
    for joints in (left, right):
        lengths = [
            np.linalg.norm(np.subtract(joints.hip, joints.knee)),
            np.linalg.norm(np.subtract(joints.knee, joints.ankle)),
        ]
        assert lengths == pytest.approx([0.2325, 0.2325])


# ---- the layout ---------------------------------------------------------------------------------


def samples(root: Path, folder: str) -> list[tuple[int, int]]:
    """(pid, camera) of every file, from its name alone."""
    found = [NAME.fullmatch(path.name) for path in sorted((root / folder).iterdir())]
    assert all(found), folder
    return [(int(match[1]), int(match[2]) - 1) for match in found if match]


def test_names_splits_and_counts(tiny: Path) -> None:
    train, query, gallery, boxes = (samples(tiny, folder) for folder in FOLDERS)
    assert len(train) == 5 * 2 * 2 and len(query) == 4 * 2 and len(boxes) == 4 * 2 * 2
    trained, tested = {pid for pid, _ in train}, {pid for pid, _ in query}
    assert (len(trained), len(tested)) == (5, 4) and not trained & tested
    assert Counter(query) == Counter(set(query)) and set(boxes) == set(query)
    people = Counter(pid for pid, _ in gallery)
    assert people.pop(0) == 7 and people.pop(-1) == 5 and people == dict.fromkeys(tested, 2 * 2)
    for pid, camera in query:
        assert any(pid == other and camera != elsewhere for other, elsewhere in gallery), "every query has a match"


@pytest.mark.parametrize("seed", range(6))
def test_default_plan(seed: int) -> None:
    config = SyntheticConfig(seed=seed)
    images = plan(config)
    names = [(image.folder, image.name(seed)) for image in images]
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) for _, name in names)
    train, test = identities(config)
    assert len(train) == config.train_identities and len(test) == config.test_identities and not {*train} & {*test}
    assert all(len(set(cameras_of(config, identity))) == config.cameras_each for identity in train + test)
    assert {image.camera for image in images} == set(range(config.cameras))


def test_other_seeds_split_other_people() -> None:
    assert len({identities(SyntheticConfig(seed=seed)) for seed in range(5)}) == 5


def test_the_real_loader_reads_it(tiny: Path) -> None:
    split = market1501.load(tiny, check_counts=False)
    assert isinstance(split, Split)
    assert len(split.train) == 20 and len(split.query) == 8 and len(split.multi) == 16
    assert len(split.identities()) == 5
    assert {0} <= {sample.pid for sample in split.gallery}
    assert {(s.pid, s.camera) for s in split.multi} == {(s.pid, s.camera) for s in split.query}


# ---- folders that exist -------------------------------------------------------------------------


def test_a_complete_set_is_left_alone(tiny: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    ticks: list[int] = []
    assert render(tiny, TINY, tick=ticks.append) == tiny
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before and ticks == []


def test_another_set_is_refused_by_what_differs(tiny: Path) -> None:
    before = contents(tiny)
    with pytest.raises(FileExistsError, match=r"sn_ops\.reid: .*seed 3 instead of 4, train_frames 2 instead of 3"):
        render(tiny, replace(TINY, seed=4, train_frames=3))
    assert contents(tiny) == before


def test_files_of_somebody_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"expected a new or empty folder.*holiday\.jpg"):
        render(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("content", ["", "[1]", '{"version": 0}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(FileExistsError, match=r"sn_ops\.reid: synthetic: expected"):
        render(tmp_path, TINY)


def test_an_interrupted_render_is_completed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first chunk: no manifest; the next call renders what is missing, and only that."""
    monkeypatch.setattr(writing, "_CHUNK", 30)

    class Killed(BaseException):
        pass

    def kill(done: int) -> None:
        raise Killed

    root, twice = tmp_path / "set", replace(TINY, distractors=9)
    with pytest.raises(Killed):
        render(root, twice, tick=kill)
    assert not (root / MANIFEST).exists()
    first = {path: path.stat().st_mtime_ns for path in root.glob("*/*.jpg")}
    assert 0 < len(first) < len(plan(twice))
    hit = sorted(first)[0]
    hit.write_bytes(b"")  # as a power cut leaves it
    (root / "query" / "0001_c1s1_000001_00.jpg.part").write_bytes(b"half")
    with pytest.raises(FileExistsError, match="another one: distractors 9 instead of 7"):
        render(root, TINY)
    ticks: list[int] = []
    render(root, twice, tick=ticks.append)
    assert sum(ticks) == len(plan(twice)) - len(first) + 1
    assert json.loads((root / MANIFEST).read_text()) == twice.as_dict()
    assert all(path.stat().st_mtime_ns == then for path, then in first.items() if path != hit)
    got = contents(root)
    assert all(got[name] == content for name, content in contents(tiny).items())


@pytest.mark.parametrize("attempt", range(5))  # the order of the threads is chance
def test_callers_at_once_render_each_image_once(tmp_path: Path, tiny: Path, attempt: int) -> None:
    """As the ranks of a distributed run call it: the lock is per open file, so threads stand in for processes."""
    ticks: list[int] = []
    with ThreadPoolExecutor(6) as pool:
        roots = [pool.submit(render, tmp_path / "set", TINY, tick=ticks.append) for _ in range(6)]
    assert {root.result() for root in roots} == {tmp_path / "set"}
    assert sum(ticks) == len(plan(TINY)) and contents(tmp_path / "set") == contents(tiny)


def test_a_lost_image_is_rendered_again(tmp_path: Path) -> None:
    config = replace(TINY, distractors=0, junk=0, train_identities=2, test_identities=2)
    root = render(tmp_path / "set", config)
    before = contents(root)
    lost = next((root / "query").iterdir())
    lost.unlink()
    render(root, config)
    assert contents(root) == before


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("seed", -1, ValueError),
        ("seed", 2**32, ValueError),
        ("seed", 1.0, TypeError),
        ("cameras", 7, ValueError),
        ("cameras_each", 1, ValueError),
        ("cameras_each", 4, ValueError),
        ("twins", 1.5, ValueError),
        ("twins", float("nan"), ValueError),
        ("twins", "half", TypeError),
        ("occlusion", True, TypeError),
        ("train_identities", 1, ValueError),
        ("box_frames", 4, ValueError),
        ("junk", -1, ValueError),
        ("width", 8, ValueError),
    ],
)
def test_wrong_configurations(field: str, value: object, error: type[Exception]) -> None:
    change: dict[str, Any] = {field: value}
    with pytest.raises(error, match=rf"sn_ops\.reid: synthetic: {field}: expected"):
        replace(TINY, **change)


def test_wrong_workers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        render(tmp_path / "set", TINY, workers=0)
    assert not (tmp_path / "set").exists()


# ---- the baseline -------------------------------------------------------------------------------


def score(features: torch.Tensor, split: Split) -> Scores:
    """Of features of the queries, then of the gallery."""

    def labels(part: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([s.pid for s in part]), torch.tensor([s.camera for s in part])

    query, gallery = features[: len(split.query)], features[len(split.query) :]
    return evaluate(query, *labels(split.query), gallery, *labels(split.gallery))


def test_colours_find_some_people_and_far_from_all(quick: Path) -> None:
    """Colours alone neither solve the set nor say nothing about it."""
    split = market1501.load(quick, check_counts=False)
    paths = [sample.path for sample in (*split.query, *split.gallery)]
    got = score(colour_histograms(paths), split)
    # Chance level: random features.
    noise = score(torch.randn(len(paths), 16, generator=torch.Generator().manual_seed(0)), split)
    assert noise.mAP + 0.05 < got.mAP < 0.5
    assert noise.rank1 < got.rank1 < 0.6


def test_histograms_by_hand(tmp_path: Path) -> None:
    """Upper half red, lower half blue, in two stripes: two cells, each with half of the squared length."""
    image = np.zeros((8, 4, 3), np.uint8)
    image[:4, :, 0] = 255
    image[4:, :, 2] = 255
    Pillow.fromarray(image).save(tmp_path / "a.png")
    Pillow.fromarray(image[::-1]).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    ticks: list[int] = []
    rows = colour_histograms(paths, stripes=2, bins=(6, 2, 2), balance=False, tick=ticks.append)
    assert rows.shape == (2, 2 * 6 * 2 * 2) and rows.dtype == torch.float32 and sum(ticks) == 2
    # Pillow's hue: red 0, blue 170 of 256, which is bin 3 of 6; saturation and value are in their upper bins.
    red, blue = (0 * 2 + 1) * 2 + 1, (3 * 2 + 1) * 2 + 1
    expected = torch.zeros(2, 48)
    expected[0, [red, 24 + blue]] = expected[1, [blue, 24 + red]] = 0.5**0.5
    torch.testing.assert_close(rows, expected)
    # In one stripe the layout is lost.
    torch.testing.assert_close(*colour_histograms(paths, stripes=1, balance=False))


def test_histograms_weigh_the_middle_and_balance_colours(tmp_path: Path) -> None:
    image = np.zeros((6, 4, 3), np.uint8)
    image[:, 1:3] = (200, 0, 0)
    image[:, [0, 3]] = (0, 0, 200)
    Pillow.fromarray(image).save(tmp_path / "a.png")
    (row,) = colour_histograms([tmp_path / "a.png"], stripes=1, balance=False)
    # 1 - x**2 at x = +-1/4 and +-3/4: 15/16 and 7/16.
    assert sorted(row[row > 0].square().tolist()) == pytest.approx([7 / 22, 15 / 22])
    tinted = np.random.default_rng(0).integers(20, 120, (24, 12, 3)).astype(np.float32)
    for name, gains in (("plain.png", (1, 1, 1)), ("warm.png", (1.6, 1, 0.7))):
        Pillow.fromarray(np.rint(tinted * np.array(gains, np.float32)).astype(np.uint8)).save(tmp_path / name)
    paths = [tmp_path / "plain.png", tmp_path / "warm.png"]
    apart = [float(torch.dist(*colour_histograms(paths, balance=balance))) for balance in (False, True)]
    assert apart[1] < 0.6 * apart[0]


def test_histograms_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one path"):
        colour_histograms([])
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(OSError, match=r"expected an image, got .*a\.jpg"):
        colour_histograms([tmp_path / "a.jpg"])
    Pillow.new("RGB", (4, 4)).save(tmp_path / "flat.png")
    with pytest.raises(OSError, match=r"at least 6 rows, got 4.*flat\.png"):
        colour_histograms([tmp_path / "flat.png"])
    with pytest.raises(ValueError, match="counts from 1"):
        colour_histograms([tmp_path / "flat.png"], stripes=0)


def test_the_synthetic_set_is_rendered_and_read_as_market1501(tmp_path: Path) -> None:
    options = {"height": 32, "width": 16, "train_identities": 2, "test_identities": 2, "distractors": 2, "junk": 2}
    split = load_dataset("synthetic", tmp_path / "set", quick=True, **options)
    assert split.synthetic and split.name == "synthetic"
    assert len(split.identities()) == 2
    assert {sample.pid for sample in split.query} and DISTRACTOR in {sample.pid for sample in split.gallery}
    assert JUNK not in {sample.pid for sample in split.gallery}
    assert {(s.pid, s.camera) for s in split.multi} == {(s.pid, s.camera) for s in split.query}
    assert load_dataset("synthetic", tmp_path / "set", quick=True, **options) == split
