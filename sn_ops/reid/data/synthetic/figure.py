"""A person on a canvas: a jointed figure in three dimensions, dressed, projected, drawn from far to near."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, sin
from typing import Any

from .appearance import CLOTH, HAIR, SKIN, Appearance, Colour
from .canvas import Canvas, Pixel, shade, texture
from .pose import Arm, Box, Leg, Moment, Point, View, arm, leg

SHOULDER = 0.815
# How far down a person's height a garment reaches, as a height above the ground; sleeves as a share of the arm.
_HEMS = {"tank": 0.47, "tee": 0.47, "shirt": 0.46, "jacket": 0.44, "coat": 0.27}
_SLEEVES = {"tank": 0.0, "tee": 0.4, "shirt": 1.0, "jacket": 1.0, "coat": 1.0}
_SKIRTS = {"skirt": 0.34, "long skirt": 0.12}
_LEATHER: dict[str, Colour] = {**CLOTH, "white": (232, 232, 230), "brown": (92, 60, 40)}


@dataclass(frozen=True)
class _Part:
    depth: float
    draw: Callable[[], None]


class Figure:
    """One person in one box. `draw` puts them on the canvas."""

    def __init__(self, canvas: Canvas, who: Appearance, moment: Moment, box: Box, pitch: float) -> None:
        self.canvas, self.who, self.box = canvas, who, box
        self.view = View(moment.yaw, pitch)
        width, height = canvas.size
        self.unit = box.height * height * who.tall
        self.foot = (box.x * width, box.feet * height)
        self.edge = 0.004 * self.unit
        self.skin = SKIN[who.skin]
        self.wide, self.deep = 1.2 * who.girth**0.8, 1.2 * who.girth
        self.legs = {side: leg(side, who.legs, 0.048 * self.wide, moment.phase, moment.stride) for side in (1, -1)}
        self.arms = {
            side: arm(side, SHOULDER - 0.028, 0.1 * self.wide, moment.phase, moment.stride, self._carries(side))
            for side in (1, -1)
        }

    def _carries(self, side: int) -> bool:
        return self.who.bag == "handbag" and side == 1

    def pixel(self, point: Point) -> Pixel:
        """Where a point of the person is on the canvas."""
        x, y, _ = self.view.project(*point)
        x, y = x * self.unit, y * self.unit
        turn = self.box.roll
        return self.foot[0] + x * cos(turn) + y * sin(turn), self.foot[1] - y * cos(turn) + x * sin(turn)

    def depth(self, point: Point) -> float:
        """How near to the camera, not counting the height."""
        return point[2] * cos(self.view.yaw) - point[0] * sin(self.view.yaw)

    def draw(self) -> None:
        """From far to near. Legs are behind the garments over them, whatever the view."""
        coat, trousers = self._cloth()
        for part in sorted((self._leg(joints, trousers) for joints in self.legs.values()), key=lambda part: part.depth):
            part.draw()
        parts = [_Part(0.0, lambda: self._body(coat, trousers)), *(self._arm(side, coat) for side in (1, -1))]
        parts += self._bag()
        for part in sorted(parts, key=lambda part: part.depth):
            part.draw()
        self._head()

    def _cloth(self) -> tuple[Any, Any]:
        """The patterns of the upper and of the lower garment; None for a plain one."""
        who, size, unit = self.who, self.canvas.size, self.unit
        facing, turn = cos(self.view.yaw), 0.1 * self.wide * self.view.yaw
        coat = trousers = None
        if who.pattern != "plain":
            colours = CLOTH[who.upper_colour], CLOTH[who.second_colour]
            coat = texture(size, who.pattern, *colours, self.pixel((0, 0.845, 0)), unit, turn, facing)
        if who.leg_pattern != "plain":
            first = CLOTH[who.lower_colour]
            second = shade(first, 0.6) if sum(first) > 330 else (214, 212, 206)
            hips = self.pixel((0, who.legs, 0))
            trousers = texture(size, who.leg_pattern, first, second, hips, unit, turn, facing)
        return coat, trousers

    def _leg(self, joints: Leg, trousers: Any) -> _Part:
        cloth, shoe = CLOTH[self.who.lower_colour], _LEATHER[self.who.shoes]
        covered = {"trousers": 1.0, "shorts": 0.5}.get(self.who.lower, 0.0)

        def draw() -> None:
            hip, knee, ankle, toe = (self.pixel(p) for p in (joints.hip, joints.knee, joints.ankle, joints.toe))
            thick = [half * self.deep * self.unit for half in (0.05, 0.037, 0.024)]
            self.canvas.limb(ankle, toe, (0.023 * self.unit, 0.017 * self.unit), shoe, edge=self.edge)
            if covered == 1:
                loose = [1.08 * half for half in thick]
                self.canvas.limb(knee, ankle, (loose[1], 1.2 * loose[2]), cloth, trousers, self.edge)
                self.canvas.limb(hip, knee, (loose[0], loose[1]), cloth, trousers, self.edge)
                return
            self.canvas.limb(knee, ankle, (thick[1], 0.9 * thick[2]), self.skin, edge=self.edge)
            self.canvas.limb(hip, knee, (thick[0], thick[1]), self.skin, edge=self.edge)
            if covered:
                self.canvas.limb(hip, knee, (1.1 * thick[0], 1.25 * thick[1]), cloth, trousers, self.edge)

        return _Part(self.depth(joints.knee) + 0.5 * self.depth(joints.ankle), draw)

    def _body(self, coat: Any, trousers: Any) -> None:
        who, girth, deep = self.who, self.wide, self.deep
        hem, cloth = _HEMS[who.upper], CLOTH[who.upper_colour]
        hips = [(who.legs + 0.03, 0.088 * girth, 0.066 * deep), (who.legs - 0.05, 0.093 * girth, 0.066 * deep)]
        self.canvas.polygon(self._outline(hips), CLOTH[who.lower_colour], trousers, self.edge)
        if who.lower in _SKIRTS:
            low = _SKIRTS[who.lower]
            skirt = [(who.legs + 0.05, 0.08 * girth, 0.06 * deep), (low, 0.125 * girth, 0.115 * deep)]
            self.canvas.polygon(self._outline(skirt), CLOTH[who.lower_colour], trousers, self.edge)
        flare = 1.25 if who.upper == "coat" else 1.0
        torso = [
            (0.85, 0.034, 0.034),
            (0.83, 0.085 * girth, 0.045 * deep),
            (SHOULDER - 0.02, 0.108 * girth, 0.055 * deep),
            (0.72, 0.1 * girth, 0.075 * deep),
            (0.6, 0.084 * girth, 0.068 * deep),
            (min(hem, 0.5), 0.093 * girth, 0.07 * deep),
            (hem - 0.005, 0.093 * girth * flare, 0.072 * deep * flare),
        ]
        self.canvas.limb(self.pixel((0, 0.86, 0)), self.pixel((0, 0.9, 0)), (0.028 * self.unit,) * 2, self.skin)
        self.canvas.polygon(self._outline(torso), cloth, coat, self.edge)
        if who.upper in ("jacket", "coat") and cos(self.view.yaw) > 0.15:
            self._opening(hem)

    def _outline(self, rings: list[tuple[float, float, float]]) -> list[Pixel]:
        """The silhouette of ellipses (height, half axis to the left, half axis ahead) on top of each other."""
        sides: tuple[list[Pixel], list[Pixel]] = ([], [])
        for up, left, ahead in rings:
            x, y = self.pixel((0, up, 0))
            half = self.view.half_width(left, ahead) * self.unit
            sides[0].append((x - half, y))
            sides[1].append((x + half, y))
        return sides[0] + sides[1][::-1]

    def _opening(self, hem: float) -> None:
        """What an open jacket shows of the shirt beneath it."""
        top, half = 0.83, 0.026 * self.wide
        front = 0.07 * self.deep
        points = [(-half, top, front), (half, top, front), (0.7 * half, hem, front), (-0.7 * half, hem, front)]
        self.canvas.polygon([self.pixel(point) for point in points], CLOTH[self.who.second_colour])

    def _arm(self, side: int, coat: Any) -> _Part:
        joints: Arm = self.arms[side]
        sleeve, cloth = _SLEEVES[self.who.upper], CLOTH[self.who.upper_colour]

        def draw() -> None:
            shoulder, elbow, hand = (self.pixel(point) for point in (joints.shoulder, joints.elbow, joints.hand))
            thick = [half * self.deep**0.7 * self.unit for half in (0.032, 0.026, 0.018)]
            if sleeve < 1:
                self.canvas.limb(elbow, hand, (0.85 * thick[1], 0.85 * thick[2]), self.skin, edge=self.edge)
                self.canvas.limb(shoulder, elbow, (0.85 * thick[0], 0.85 * thick[1]), self.skin, edge=self.edge)
                if sleeve:
                    end = tuple(a + 0.75 * (b - a) for a, b in zip(shoulder, elbow, strict=True))
                    self.canvas.limb(shoulder, (end[0], end[1]), (thick[0], 1.1 * thick[1]), cloth, coat, self.edge)
            else:
                self.canvas.ellipse(hand, 0.02 * self.unit, 0.022 * self.unit, self.skin)
                wrist = (elbow[0] + 0.9 * (hand[0] - elbow[0]), elbow[1] + 0.9 * (hand[1] - elbow[1]))
                self.canvas.limb(elbow, wrist, (thick[1], thick[2]), cloth, coat, self.edge)
                self.canvas.limb(shoulder, elbow, (thick[0], thick[1]), cloth, coat, self.edge)
            if self._carries(side):
                self._handbag(hand)

        return _Part(self.depth(joints.elbow) + 0.25 * self.depth(joints.hand), draw)

    def _handbag(self, hand: Pixel) -> None:
        colour, unit = _LEATHER[self.who.bag_colour], self.unit
        half = self.view.half_width(0.022, 0.07) * unit
        x, top = hand[0], hand[1] + 0.03 * unit
        self.canvas.limb(hand, (x, top), (0.006 * unit,) * 2, shade(colour, 0.7))
        corners = [(x - half, top), (x + half, top), (x + half, top + 0.1 * unit), (x - half, top + 0.1 * unit)]
        self.canvas.polygon(corners, colour, edge=self.edge)

    def _bag(self) -> list[_Part]:
        """The parts of a backpack or of a satchel."""
        colour, who = _LEATHER[self.who.bag_colour], self.who
        front = 0.072 * self.deep
        if who.bag == "backpack":
            half = 0.075 * self.wide
            place = (0.0, 0.7, -front - 0.045)

            def sack() -> None:
                x, y = self.pixel(place)
                across = self.view.half_width(half, 0.055) * self.unit
                tall = 0.105 * self.unit
                corners = [(-0.7, -1), (0.7, -1), (1, -0.6), (1, 0.9), (0.8, 1), (-0.8, 1), (-1, 0.9), (-1, -0.6)]
                self.canvas.polygon([(x + a * across, y + b * tall) for a, b in corners], colour, edge=self.edge)
                pocket = [(x + a * across, y + b * tall) for a, b in ((-0.6, 0.2), (0.6, 0.2), (0.6, 0.8), (-0.6, 0.8))]
                self.canvas.polygon(pocket, shade(colour, 0.75))

            def straps() -> None:
                for side in (1, -1):
                    ends = [self.pixel((side * x * self.wide, up, front)) for x, up in ((0.06, 0.83), (0.07, 0.66))]
                    self.canvas.limb(ends[0], ends[1], (0.014 * self.unit,) * 2, colour)

            return [_Part(self.depth(place), sack), *([_Part(0.001, straps)] if cos(self.view.yaw) > 0.1 else [])]
        if who.bag == "satchel":
            place = (-0.11 * self.wide, 0.5, 0.0)

            def satchel() -> None:
                x, y = self.pixel(place)
                across, tall = self.view.half_width(0.03, 0.075) * self.unit, 0.055 * self.unit
                corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
                self.canvas.polygon([(x + a * across, y + b * tall) for a, b in corners], colour, edge=self.edge)

            def strap() -> None:
                near = front if cos(self.view.yaw) > 0 else -front
                ends = [self.pixel((0.07 * self.wide, 0.83, near)), self.pixel((-0.1 * self.wide, 0.54, near))]
                self.canvas.limb(ends[0], ends[1], (0.01 * self.unit,) * 2, colour)

            return [_Part(self.depth(place), satchel), _Part(0.001, strap)]
        return []

    def _head(self) -> None:
        """Skull, face, hair and hat."""
        who, unit, edge = self.who, self.unit, self.edge
        hair, ahead = HAIR[who.hair_colour], cos(self.view.yaw)
        side = self.view.half_width(0.052, 0.06)

        def back() -> None:
            if who.hair == "bald":
                self.canvas.ellipse(self.pixel((0, 0.935, -0.01)), side * unit, 0.066 * unit, self.skin, edge)
                return
            low = {"short": 0.0, "bun": 0.0, "bob": 0.04, "long": 0.1}[who.hair]
            if low:
                top, end = self.pixel((0, 0.93, -0.022)), self.pixel((0, 0.91 - low, -0.035))
                self.canvas.limb(top, end, (side * unit, 0.85 * side * unit), hair, edge=edge)
            if who.hair == "bun":
                self.canvas.ellipse(self.pixel((0, 0.985, -0.045)), 0.03 * unit, 0.03 * unit, hair, edge)
            self.canvas.ellipse(self.pixel((0, 0.94, -0.012)), (side + 0.003) * unit, 0.064 * unit, hair, edge)

        def face() -> None:
            across = self.view.half_width(0.044, 0.038) * unit
            self.canvas.ellipse(self.pixel((0, 0.92, 0.022)), across, 0.052 * unit, self.skin)

        for draw in (back, face) if ahead > -0.25 else (face, back):
            draw()
        if who.hat != "none":
            self._hat(side)

    def _hat(self, side: float) -> None:
        who, unit, edge = self.who, self.unit, self.edge
        colour = CLOTH[who.hat_colour]
        x, y = self.pixel((0, 0.955, -0.004))
        half, tall = (side + 0.008) * unit, 0.058 * unit
        dome = [(-1, 0), (-0.95, -0.5), (-0.6, -0.9), (0, -1), (0.6, -0.9), (0.95, -0.5), (1, 0)]
        if who.hat == "brim":
            self.canvas.ellipse((x, y), 1.75 * half, 0.018 * unit, colour, edge)
        self.canvas.polygon([(x + a * half, y + b * tall) for a, b in dome], colour, edge=edge)
        if who.hat == "cap":
            near, far = self.pixel((0, 0.952, 0.03)), self.pixel((0, 0.945, 0.105))
            if cos(self.view.yaw) > -0.3:
                self.canvas.limb(near, far, (0.022 * unit, 0.014 * unit), shade(colour, 0.85))
        elif who.hat == "beanie":
            band = [(x - half, y - 0.25 * tall), (x + half, y - 0.25 * tall), (x + half, y + 0.2 * tall)]
            self.canvas.polygon([*band, (x - half, y + 0.2 * tall)], shade(colour, 0.7))
