"""The pose of a person in a frame: viewpoint, phase of the gait, place in the box, occluder."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np

from .config import Stream, generator

OCCLUDERS = ("post", "box", "bush", "person")


@dataclass(frozen=True)
class Moment:
    """One frame of a person's passage under a camera: the same for every box drawn around it."""

    yaw: float
    """Radians: 0 faces the camera, pi/2 walks to the right of the image, pi shows the back."""
    phase: float
    """Radians of the gait; a step is pi."""
    stride: float
    """Greatest angle of the thigh, radians; near 0 for a person who stands."""
    light: float
    """Brightness relative to the camera's usual."""
    occluder: str
    """"none" or one of OCCLUDERS."""
    side: float
    """Where across the person the occluder is, -1 to 1."""
    cover: float
    """How much of it covers the person, 0 to 1."""
    scene: float
    """Where along the camera's scene the person is, 0 to 1."""


@dataclass(frozen=True)
class Box:
    """Where the person is in the image, in fractions of the image."""

    x: float
    """Of the person's middle, across."""
    feet: float
    """Of the ground under the person, down."""
    height: float
    """Of a person of average height."""
    roll: float
    """Radians."""


def moment(
    seed: int, identity: int, camera: int, frame: int, occlusion: float, stream: Stream = Stream.MOMENT
) -> Moment:
    """The frame of that number. A passage has one direction; its frames differ by some degrees and by the gait."""
    track = generator(seed, Stream.TRACK, identity, camera, 1 + stream)
    yaw, phase, stride = track.uniform(-pi, pi), track.uniform(0, 2 * pi), track.choice([0.08, 0.35, 0.5])
    scene = track.uniform()
    random = generator(seed, stream, identity, camera, frame)
    blocked = random.random() < occlusion
    return Moment(
        yaw=float(yaw + random.normal(0, 0.3)),
        phase=float(phase + 0.9 * frame + random.normal(0, 0.3)),
        stride=float(stride * random.uniform(0.8, 1.2)),
        light=float(np.exp(random.normal(0, 0.1))),
        occluder=str(random.choice(OCCLUDERS)) if blocked else "none",
        side=float(random.choice([-1, 1]) * random.uniform(0.3, 1)),
        cover=float(random.uniform()),
        scene=float((scene + 0.07 * frame + random.normal(0, 0.02)) % 1),
    )


def hand_drawn_box(random: np.random.Generator) -> Box:
    """Tight around the person."""
    return Box(
        x=0.5 + float(random.normal(0, 0.02)),
        feet=0.975 + float(random.normal(0, 0.008)),
        height=0.91 * float(np.exp(random.normal(0, 0.015))),
        roll=0.0,
    )


def detected_box(random: np.random.Generator) -> Box:
    """As a detector draws it: off by some per cent, sometimes cutting feet or head."""
    return Box(
        x=0.5 + float(random.normal(0, 0.045)),
        feet=0.975 + float(random.normal(0, 0.03)),
        height=0.91 * float(np.exp(random.normal(0, 0.06))),
        roll=float(random.normal(0, 0.02)),
    )


def bad_box(random: np.random.Generator) -> Box:
    """A box that shows less than half of a person: a magnified part, or the person at the edge."""
    if random.random() < 0.6:
        return Box(
            x=float(random.uniform(0.2, 0.8)),
            feet=float(random.uniform(0.8, 2.6)),
            height=float(random.uniform(1.7, 2.6)),
            roll=float(random.normal(0, 0.03)),
        )
    return Box(
        x=float(random.choice([-0.12, 1.12])),
        feet=float(random.uniform(0.9, 1.3)),
        height=float(random.uniform(0.7, 1.1)),
        roll=float(random.normal(0, 0.03)),
    )


@dataclass(frozen=True)
class View:
    """From a person's own axes to the image: turned by the yaw, seen from above by the pitch."""

    yaw: float
    pitch: float

    def project(self, left: float, up: float, ahead: float) -> tuple[float, float, float]:
        """x to the right, y up, depth towards the camera."""
        across = left * cos(self.yaw) + ahead * sin(self.yaw)
        depth = ahead * cos(self.yaw) - left * sin(self.yaw)
        return across, up * cos(self.pitch) - depth * sin(self.pitch), depth * cos(self.pitch) + up * sin(self.pitch)

    def half_width(self, half: float, deep: float) -> float:
        """Half the width that an ellipse of these half axes (left, ahead) shows."""
        return float(np.hypot(half * cos(self.yaw), deep * sin(self.yaw)))


Point = tuple[float, float, float]


@dataclass(frozen=True)
class Leg:
    """Joints in (left, up, ahead)."""

    hip: Point
    knee: Point
    ankle: Point
    toe: Point


@dataclass(frozen=True)
class Arm:
    """Joints in (left, up, ahead)."""

    shoulder: Point
    elbow: Point
    hand: Point


def leg(side: int, hip: float, half: float, phase: float, stride: float) -> Leg:
    """The left (side 1) or right (-1) leg of a person of height 1 whose hips are that high and half that far apart."""
    swing = stride * sin(phase if side > 0 else phase + pi)
    forward = max(0.0, cos(phase if side > 0 else phase + pi))  # the knee bends while the leg comes forward
    bend = 1.6 * stride * forward
    thigh = shin = (hip - 0.035) / 2
    across = side * half
    knee = (across, hip - thigh * cos(swing), thigh * sin(swing))
    lower = swing - bend
    ankle = (across, knee[1] - shin * cos(lower), knee[2] + shin * sin(lower))
    return Leg((across, hip, 0.0), knee, ankle, (across, ankle[1] - 0.02, ankle[2] + 0.075))


def arm(side: int, shoulder: float, half: float, phase: float, stride: float, carries: bool) -> Arm:
    """The left (side 1) or right (-1) arm; it swings against the leg of its side, less if it carries something."""
    swing = stride * (0.25 if carries else 0.9) * sin(phase + pi if side > 0 else phase)
    across = side * half
    elbow = (across * 1.1, shoulder - 0.17 * cos(swing), 0.17 * sin(swing))
    lower = swing + 0.15 + 0.5 * stride * (not carries)
    hand = (across * 1.12, elbow[1] - 0.16 * cos(lower), elbow[2] + 0.16 * sin(lower))
    return Arm((across, shoulder, 0.0), elbow, hand)
