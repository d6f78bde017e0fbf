"""Draws a face: flat shapes with clean edges, then soft light and make-up.

Shapes are filled on a canvas three times as fine as the picture, whose fourth channel holds the label,
so colours and segmentation come from the same strokes. Averaging the canvas gives smooth edges; its
middle sub-pixel gives the label. Everything soft (make-up, light) is added to the small picture: make-up
weighted by how much of each pixel is bare skin, which is exact because the skin below is one flat colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from attnguide.data.procedural import _geometry as geo
from attnguide.data.procedural._colors import EYE_SHADOWS, Color, hsv, mix, pick, skin_color
from attnguide.data.procedural._geometry import Draws, Points, between
from attnguide.data.procedural._parts import SKIN, TO_HELEN, Shape, face_shapes, glasses_shapes

__all__ = ["Drawing", "Scene", "draw_face"]

_FINE = 3  # odd, so that a pixel has a middle

Plane = NDArray[np.float32]


class Scene(NamedTuple):
    """Settings of how faces are shown."""

    size: int
    """Side of the picture in pixels."""
    pose: float
    """Factor on the deviation of faces from the canonical frame."""
    clutter: float
    """Share in [0, 1] of the background's shapes that are drawn."""
    noise: float
    """Standard deviation of the noisiest pictures' noise, in units of the full range."""


class Drawing(NamedTuple):
    """A rendered face."""

    image: Plane
    """(3, size, size) in [0, 1]."""
    segmentation: NDArray[np.uint8]
    """(size, size), Helen labels."""
    landmarks: Plane
    """(68, 2), x and y in pixels; (0, 0) is the centre of the top left pixel."""


def draw_face(
    d: Draws, has: Mapping[str, bool], expression: str, scene: Scene, rng: np.random.Generator
) -> Drawing:
    """Render one face.

    Args:
        d: Random numbers of the face.
        has: Whether each attribute is present, by name.
        expression: Name of the expression.
        scene: Settings of how it is shown.
        rng: Generator of the background's shapes and the noise, used in a fixed order.
    """
    size = scene.size
    points = geo.landmarks(d, expression, has["mouth_open"], scene.pose)
    turn, shift = geo.pose(d, scene.pose)
    skin = skin_color(d, has["pale_skin"])

    canvas = Image.new("RGBX", (_FINE * size, _FINE * size), 0)
    teeth = geo.EXPRESSION_SHAPES[expression].teeth
    _fill(canvas, face_shapes(d, has, teeth, points, skin), turn, shift)
    labels = np.asarray(canvas.getchannel(3))
    segmentation = TO_HELEN[labels[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE]]
    if has["eyeglasses"]:  # glasses are transparent, so the segmentation does not show them
        _fill(canvas, glasses_shapes(d, points), turn, shift)
        labels = np.asarray(canvas.getchannel(3))
    picture = _planes(canvas.reduce(_FINE))

    # Canonical coordinates of every pixel centre.
    back = turn.T / (turn[0] @ turn[0])  # the inverse of a similarity
    grid = (np.arange(size) + 0.5) / size
    along, down = np.outer(back[:, 0], grid - shift[0]), np.outer(back[:, 1], grid - shift[1])
    u, v = along.astype(np.float32)[:, None, :] + down.astype(np.float32)[:, :, None]

    if has["heavy_makeup"]:
        _make_up(picture, _cover(labels == SKIN), d, points, skin, u, v)
    picture *= _light(d, u, v)
    backdrop = _backdrop(d, size, scene.clutter, rng.random((12, 8)))
    backdrop *= 1 - _cover(labels != 0)  # the canvas is black where nobody is, so this adds up
    picture += backdrop
    _expose(picture, d)
    if scene.noise:
        # Uniform noise of this standard deviation: at a glance the same as normal, four times as fast.
        grain = rng.random(picture.shape, dtype=np.float32)
        grain -= 0.5
        grain *= scene.noise * 12**0.5 * between(0.4, 1.0, d.grain)
        picture += grain
    np.clip(picture, 0, 1, out=picture)
    pixels = ((points @ turn.T + shift) * size - 0.5).astype(np.float32)
    return Drawing(picture, segmentation, pixels)


def _fill(canvas: Image.Image, shapes: list[Shape], turn: Points, shift: Points) -> None:
    """Fill shapes given in the canonical frame, in order."""
    scale = canvas.width
    # The coordinates of a canvas pixel are those of its centre, hence the half.
    placed = np.concatenate([outline for outline, _, _ in shapes]) @ (turn.T * scale) + (shift * scale - 0.5)
    flat = placed.ravel().tolist()
    pen = ImageDraw.Draw(canvas)
    start = 0
    for outline, color, label in shapes:
        end = start + 2 * len(outline)
        pen.polygon(flat[start:end], fill=(*_ink(color), label))
        start = end


def _ink(color: Color) -> tuple[int, int, int]:
    return (int(color[0]), int(color[1]), int(color[2]))


def _planes(image: Image.Image) -> Plane:
    """Return the colours of an image as floats (3, height, width) in [0, 1]."""
    planes = np.asarray(image).transpose(2, 0, 1)[:3].astype(np.float32, order="C")
    planes *= np.float32(1 / 255)
    return planes


def _column(color: Color) -> Plane:
    """Return a colour as (3, 1, 1) in [0, 1], to be combined with planes."""
    return (np.array(color) / 255).astype(np.float32).reshape(3, 1, 1)


def _cover(mask: NDArray[np.bool_]) -> Plane:
    """Return how much of each pixel (size, size) of the picture the fine mask covers, in [0, 1]."""
    small = Image.fromarray(mask.view(np.uint8) * np.uint8(255)).reduce(_FINE)
    cover = np.asarray(small).astype(np.float32)
    cover *= np.float32(1 / 255)
    return cover


def _spot(u: Plane, v: Plane, x: float, y: float, rx: float, ry: float) -> Plane:
    """Return a soft spot of height 1 at (x, y)."""
    a, b = (u - np.float32(x)) * np.float32(1 / rx), (v - np.float32(y)) * np.float32(1 / ry)
    spot: Plane = np.exp(-(a * a) - b * b)
    return spot


def _make_up(picture: Plane, bare: Plane, d: Draws, points: Points, skin: Color, u: Plane, v: Plane) -> None:
    """Add eye shadow and blush to the bare skin of the picture; the mouth stays as it is."""
    shadow = _column(pick(EYE_SHADOWS, d.makeup_hue)) - _column(skin)
    rouge = _column(mix((226, 60, 92), (214, 72, 52), d.makeup_depth)) - _column(skin)
    lids = [
        _spot(u, v, x, y - 0.034, 0.098, 0.052)
        for x, y in (points[36:42].mean(axis=0), points[42:48].mean(axis=0))
    ]
    amount = np.minimum(np.maximum(*lids) * np.float32(1.25), 1) * np.float32(
        between(0.78, 0.92, d.makeup_depth)
    )
    picture += (amount * bare) * shadow
    x, y = points[30]
    cheeks = _spot(u, v, x - 0.185, y + 0.045, 0.085, 0.058) + _spot(u, v, x + 0.185, y + 0.045, 0.085, 0.058)
    picture += (np.float32(0.55) * cheeks * bare) * rouge


def _light(d: Draws, u: Plane, v: Plane) -> Plane:
    """Return the factor (size, size) by which light from one side brightens or dims the head."""
    angle = between(-1.2, 1.2, d.light_angle)
    strength = between(0.05, 0.22, d.light_strength)
    x, y = (u - np.float32(0.5)) * np.float32(2.6), (v - np.float32(0.55)) * np.float32(1.9)
    facing = x * np.float32(np.sin(angle)) - y * np.float32(np.cos(angle))
    shade: Plane = np.float32(strength) * np.clip(facing, -1.2, 1.2)
    shade += np.float32(0.99) - np.float32(0.07) * np.minimum(x * x + y * y, 1.5)
    return shade


def _backdrop(d: Draws, size: int, clutter: float, shapes: NDArray[np.float64]) -> Plane:
    """Return the background (3, size, size): plain, stripes, or out-of-focus clutter, over a gradient."""
    side = 64
    base = hsv(
        d.backdrop_hue, between(0.06, 0.36, d.backdrop_tone), between(0.92, 0.35, d.backdrop_hue2 * 3 % 1)
    )
    canvas = Image.new("RGB", (side, side), _ink(base))
    pen = ImageDraw.Draw(canvas)
    if d.backdrop < 0.35 * clutter:  # stripes
        wide, lean = int(between(5, 12, d.backdrop_hue2)), between(-26, 26, d.backdrop_angle)
        ink = _ink(mix(base, hsv(d.backdrop_hue2, 0.4, 0.75), 0.45))
        for x in range(-side, 2 * side, 2 * wide):
            pen.polygon([x, 0, x + wide, 0, x + wide + lean, side, x + lean, side], fill=ink)
    elif d.backdrop > 0.45:
        for draw, x, y, rx, ry, hue, tone, form in shapes.tolist():
            if draw < clutter:
                rx, ry = 4 + 11 * rx, 4 + 11 * ry
                box = (x * side - rx, y * side - ry, x * side + rx, y * side + ry)
                ink = _ink(mix(base, hsv(hue, 0.5, between(0.3, 0.9, tone)), 0.65))
                (pen.ellipse if form < 0.6 else pen.rectangle)(box, fill=ink)
    # Shrunk and enlarged again, it is as blurred as what lies behind a portrait.
    picture = _planes(canvas.reduce(2).resize((size, size), Image.Resampling.BICUBIC))
    slope = np.linspace(-1, 1, size, dtype=np.float32)
    angle = 2 * np.pi * d.backdrop_angle
    ramp = slope * np.float32(0.16 * np.cos(angle)) + slope[:, None] * np.float32(0.16 * np.sin(angle))
    picture *= 1 + ramp
    return picture


def _expose(picture: Plane, d: Draws) -> None:
    """Apply the camera's exposure and colour cast."""
    gain = between(0.84, 1.02, d.exposure)
    warm, green = between(-0.06, 0.06, d.cast_warm), between(-0.025, 0.025, d.cast_green)
    picture *= np.array([gain * (1 + warm), gain * (1 + green), gain * (1 - warm)], dtype=np.float32)[
        :, None, None
    ]
