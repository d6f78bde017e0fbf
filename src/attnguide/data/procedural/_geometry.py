"""The positions of everything on a drawn face.

All coordinates are in the canonical frame: the image is the unit square, x runs right and y down, and
an aligned face looks straight out of it. The 68 landmarks are the control points of what is drawn:
every outline is a smooth curve *through* them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EXPRESSION_SHAPES",
    "EXPRESSION_UNITS",
    "UNIT_EFFECTS",
    "Draws",
    "ExpressionShape",
    "Points",
    "between",
    "ellipse",
    "face_outline",
    "hair_outline",
    "landmarks",
    "moved",
    "pose",
    "smooth",
    "stroke",
    "swell",
]

Points = NDArray[np.float64]


class ExpressionShape(NamedTuple):
    """The effect of an expression on a face; lengths are in units of the image side."""

    brow_raise: float = 0.0
    """Whole brow upward."""
    brow_inner: float = 0.0
    """Inner end of the brow upward (worry), negative downward (frown)."""
    eye_open: float = 1.0
    """Factor on the height of the eye."""
    lid_raise: float = 0.0
    """Lower lid upward, as a fraction of the eye's height."""
    nose_up: float = 0.0
    """Base of the nose upward (wrinkled nose)."""
    lip_corner: float = 0.0
    """Mouth corners upward, negative downward."""
    mouth_width: float = 1.0
    """Factor on the width of the mouth."""
    lip_press: float = 1.0
    """Factor on the thickness of the lips."""
    gap: float = 0.026
    """Height of the opening, if the mouth is open at all."""
    teeth: float = 0.35
    """Fraction of the opening that the upper teeth fill."""


#: Action units of each expression, with their numbers in the Facial Action Coding System, as in the codebook
#: of arXiv 2402.00281. The neutral expression has none.
EXPRESSION_UNITS: dict[str, tuple[int, ...]] = {
    "neutral": (),
    "happiness": (6, 12, 25),
    "sadness": (1, 4, 6, 15, 17),
    "surprise": (1, 2, 5, 26, 27),
    "fear": (1, 2, 4, 5, 20, 25, 26, 27),
    "disgust": (9, 10, 16, 17, 25, 26),
    "anger": (4, 5, 7, 10, 17, 23, 24, 25, 26),
}

#: Effect of each action unit on a face at rest. Units that part the lips (25 to 27) determine how far, not
#: whether: that is a separate attribute.
UNIT_EFFECTS: dict[int, dict[str, float]] = {
    1: {"brow_inner": 0.060},  # inner brow raiser
    2: {"brow_raise": 0.034, "brow_inner": -0.056},  # outer brow raiser: the inner end hardly moves
    4: {"brow_raise": -0.014, "brow_inner": -0.024},  # brow lowerer
    5: {"eye_open": 0.42},  # upper lid raiser
    6: {"lid_raise": 0.35},  # cheek raiser: pushes the lower lid up
    7: {"eye_open": -0.50, "lid_raise": 0.15},  # lid tightener
    9: {"nose_up": 0.014, "brow_raise": -0.012, "brow_inner": -0.014, "eye_open": -0.34, "lid_raise": 0.3},
    10: {"teeth": 0.30},  # upper lip raiser
    12: {"lip_corner": 0.042, "mouth_width": 0.12, "lip_press": -0.08, "teeth": 0.27, "brow_raise": 0.006},
    15: {"lip_corner": -0.022},  # lip corner depressor
    16: {"mouth_width": -0.08, "lip_press": 0.06},  # lower lip depressor
    17: {"lip_corner": -0.014, "mouth_width": -0.04},  # chin raiser: the lower lip rises, the corners hang
    20: {"mouth_width": 0.30, "lip_corner": -0.016, "gap": -0.045, "teeth": 0.45},  # lip stretcher
    23: {"lip_press": -0.12},  # lip tightener
    24: {"lip_press": -0.12},  # lip pressor
    25: {"gap": 0.026},  # lips part
    26: {"gap": 0.012},  # jaw drop
    27: {"gap": 0.047, "mouth_width": -0.24, "teeth": -0.35},  # mouth stretch
}


def _shape_of(units: Iterable[int]) -> ExpressionShape:
    """Add up the effects of action units on a face at rest."""
    total = ExpressionShape()._asdict()
    for unit in units:
        for part, amount in UNIT_EFFECTS[unit].items():
            total[part] += amount
    return ExpressionShape(**total)


#: Effect of each expression in full strength.
EXPRESSION_SHAPES: dict[str, ExpressionShape] = {
    name: _shape_of(units) for name, units in EXPRESSION_UNITS.items()
}


class Draws(NamedTuple):
    """An independent uniform number in [0, 1) for each property that varies, whatever the attributes."""

    shift_x: float
    shift_y: float
    zoom: float
    roll: float
    yaw: float
    face_width: float
    chin: float
    jaw: float
    eye_gap: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    brow_height: float
    brow_arch: float
    brow_weight: float
    nose_width: float
    nose_length: float
    mouth_height: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    strength: float
    gaze_x: float
    gaze_y: float
    hair_volume: float
    hair_length: float
    hair_wave: float
    hair_part: float
    skin: float
    skin_warmth: float
    lip_tone: float
    lipstick_hue: float
    lipstick_depth: float
    makeup_hue: float
    makeup_depth: float
    iris: float
    brow_tone: float
    beard_tone: float
    beard_size: float
    hair_tone: float
    hair_other: float
    hat_kind: float
    hat_hue: float
    glasses_kind: float
    glasses_tone: float
    earring_kind: float
    shirt_hue: float
    shirt_tone: float
    light_angle: float
    light_strength: float
    exposure: float
    cast_warm: float
    cast_green: float
    backdrop: float
    backdrop_hue: float
    backdrop_tone: float
    backdrop_hue2: float
    backdrop_angle: float
    grain: float


def between(low: float, high: float, u: float) -> float:
    """Map u in [0, 1] to [low, high]."""
    return low + (high - low) * u


def moved(points: Points, x: float, y: float) -> Points:
    """Return the points (..., 2) shifted."""
    place: Points = points + np.array((x, y))
    return place


@lru_cache(maxsize=64)
def _basis(n: int, closed: bool, steps: int) -> Points:
    """Return the matrix that turns n control points into a Catmull-Rom curve through them."""
    eye = np.eye(n)
    ring = [(i - 1, i, i + 1, i + 2) for i in range(n if closed else n - 1)]
    t = np.arange(steps)[:, None] / steps
    pieces = []
    for corner in ring:
        a, b, c, d = (eye[i % n if closed else min(max(i, 0), n - 1)] for i in corner)
        pieces.append(b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))))
    if not closed:
        pieces.append(eye[-1:])
    return np.concatenate(pieces)


def smooth(points: Points, *, closed: bool = False, steps: int = 5) -> Points:
    """Return smooth curves (..., m, 2) through control points (..., n, 2), both ends included if open."""
    curves: Points = _basis(points.shape[-2], closed, steps) @ points
    return curves


def normals(curve: Points) -> Points:
    """Return the unit normals (..., m, 2) of open curves (..., m, 2) that run sideways; they point up."""
    step = np.empty_like(curve)
    step[..., 1:-1, :] = curve[..., 2:, :] - curve[..., :-2, :]
    step[..., 0, :] = curve[..., 1, :] - curve[..., 0, :]
    step[..., -1, :] = curve[..., -1, :] - curve[..., -2, :]
    length = np.sqrt((step * step).sum(axis=-1, keepdims=True)) + 1e-12
    length *= np.where(curve[..., -1:, :1] > curve[..., :1, :1], 1.0, -1.0)  # left or right
    up: Points = step[..., ::-1] * (1.0, -1.0) / length
    return up


def stroke(curve: Points, above: Points | float, below: Points | float) -> Points:
    """Return the outlines (..., 2m, 2) of strokes along curves (..., m, 2) that run sideways.

    Args:
        curve: Middle lines of the strokes.
        above: Width of the stroke above the line, one number or (m,).
        below: Width of the stroke below the line, one number or (m,).
    """
    up = normals(curve)
    above, below = np.asarray(above)[..., None], np.asarray(below)[..., None]
    return np.concatenate([curve + up * above, (curve - up * below)[..., ::-1, :]], axis=-2)


@lru_cache(maxsize=64)
def swell(n: int, ends: float = 0.0) -> Points:
    """Return widths (n,) that grow from nearly 0 to 1 and back, as those of a brush stroke."""
    return np.sin(np.linspace(ends, np.pi - ends, n))


def ellipse(x: float, y: float, rx: float, ry: float, points: int = 20) -> Points:
    """Return the outline of an ellipse."""
    return moved(_circle(points) * (rx, ry), x, y)


@lru_cache(maxsize=8)
def _circle(points: int) -> Points:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def pose(draws: Draws, amount: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the similarity (2, 2), (2,) from the canonical frame to the picture."""
    roll = np.deg2rad(between(-6, 6, draws.roll) * amount)
    zoom = 1 + between(-0.09, 0.03, draws.zoom) * amount
    turn = zoom * np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    center = np.array([0.5, 0.54])
    shift = np.array([between(-0.025, 0.025, draws.shift_x), between(-0.02, 0.02, draws.shift_y)]) * amount
    return turn, center + shift - turn @ center


_EAR_LEVEL, _CROWN = 0.47, 0.17  # heights of the ears and of the top of the skull
# Positions of landmarks, in units of the part that they belong to. Jaw from ear to ear, over the chin:
_JAW = np.linspace(-np.pi / 2, np.pi / 2, 17)
_JAW_X, _JAW_Y = np.sin(_JAW), np.cos(_JAW).clip(0)
_FOREHEAD = np.stack([np.cos(np.linspace(0, np.pi, 24)), -np.sin(np.linspace(0, np.pi, 24))], axis=1)[1:-1]
# A brow from its outer end to its inner one:
_BROW_ALONG = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_BROW_ARCH = np.array([0.0, 0.85, 1.15, 0.85, 0.35])
# The mouth, landmarks 48 to 67: across it, outward from the line between the lips to the outer edge of
# each lip, and apart from that line to the edges of the opening. Upper lip, lower lip, inside.
_LIP_X = np.array([-1, -0.60, -0.22, 0, 0.22, 0.60, 1, 0.62, 0.28, 0, -0.28, -0.62,
                   -0.80, -0.38, 0, 0.38, 0.80, 0.38, 0, -0.38])  # fmt: skip
_LIP_CURL = np.abs(_LIP_X) ** 1.7
_LIP_UP = np.array([0, 0.66, 1, 0.84, 1, 0.66, 0] + [0.0] * 13)
_LIP_DOWN = np.array([0.0] * 7 + [0.68, 0.96, 1, 0.96, 0.68] + [0.0] * 8)
_LIP_APART = np.concatenate(
    [
        -0.35 * (1 - _LIP_X[:7] ** 2),
        0.65 * (1 - _LIP_X[7:12] ** 2),
        [0, -0.31, -0.35, -0.31, 0, 0.57, 0.65, 0.57],
    ]
)


def landmarks(draws: Draws, expression: str, mouth_open: bool, turn: float = 1.0) -> Points:
    """Return the 68 landmarks (68, 2) in the canonical frame, in iBUG order.

    Args:
        draws: Random numbers of the face.
        expression: A name of `EXPRESSION_SHAPES`.
        mouth_open: Whether the lips part.
        turn: Factor on the sideways shift of the features, as on a slightly turned head.
    """
    d, full = draws, EXPRESSION_SHAPES[expression]
    shape = ExpressionShape(
        *(
            rest + (value - rest) * between(0.8, 1.1, d.strength)
            for rest, value in zip(ExpressionShape(), full, strict=True)
        )
    )
    gap = full.gap * between(0.85, 1.15, d.strength) if mouth_open else 0.0
    out = np.empty((68, 2))

    half = between(0.272, 0.312, d.face_width)
    chin = between(0.905, 0.945, d.chin) + 0.35 * gap
    out[:17, 0] = half * np.sign(_JAW_X) * np.abs(_JAW_X) ** between(0.72, 1.0, d.jaw)
    out[:17, 1] = _EAR_LEVEL + (chin - _EAR_LEVEL) * _JAW_Y ** between(0.78, 0.95, d.jaw)

    eye_x = between(0.122, 0.142, d.eye_gap)
    eye_w = between(0.056, 0.067, d.eye_width)
    eye_h = between(0.025, 0.033, d.eye_height) * shape.eye_open
    tilt = between(-0.010, 0.010, d.eye_tilt)
    low = eye_h * (0.85 - shape.lid_raise)
    out[36:42] = [(-eye_w, -tilt), (-0.42 * eye_w, -eye_h - 0.5 * tilt), (0.40 * eye_w, -eye_h),
                  (eye_w, 0.004), (0.36 * eye_w, low), (-0.42 * eye_w, low - 0.3 * tilt)]  # fmt: skip
    out[36:42] += (-eye_x, 0.462)
    out[42:48] = out[[39, 38, 37, 36, 41, 40]] * (-1, 1)

    brow_y = between(0.386, 0.406, d.brow_height) - shape.brow_raise
    outer, inner = eye_x + 1.30 * eye_w, eye_x - 1.12 * eye_w
    out[17:22, 0] = -outer + (outer - inner) * _BROW_ALONG
    out[17:22, 1] = (
        brow_y - between(0.008, 0.022, d.brow_arch) * _BROW_ARCH - shape.brow_inner * _BROW_ALONG**1.5
    )
    out[22:27] = out[[21, 20, 19, 18, 17]] * (-1, 1)

    nose_w = between(0.040, 0.056, d.nose_width)
    base = between(0.604, 0.622, d.nose_length) - shape.nose_up
    out[27:31] = [(0, y) for y in np.linspace(0.465, base - 0.022, 4)]
    out[31:36] = [(-nose_w, base - 0.010), (-0.5 * nose_w, base + 0.004), (0, base + 0.010),
                  (0.5 * nose_w, base + 0.004), (nose_w, base - 0.010)]  # fmt: skip

    line = between(0.742, 0.756, d.mouth_height) + shape.lip_corner * (0.35 - _LIP_CURL)
    top = between(0.050, 0.064, d.upper_lip) * shape.lip_press
    bottom = between(0.064, 0.080, d.lower_lip) * shape.lip_press
    out[48:, 0] = between(0.138, 0.164, d.mouth_width) * shape.mouth_width * _LIP_X
    out[48:, 1] = line + gap * _LIP_APART - top * _LIP_UP + bottom * _LIP_DOWN

    # On a slightly turned head, parts that lie further forward shift further.
    slide = between(-0.016, 0.016, d.yaw) * turn
    out[17:, 0] += slide
    out[29:36, 0] += 0.6 * slide
    out[:, 0] += 0.5
    return out


def face_outline(points: Points) -> Points:
    """Return the outline of the face (m, 2): the jaw, closed over the forehead."""
    half = (points[16, 0] - points[0, 0]) / 2
    forehead = moved(_FOREHEAD * (half, _EAR_LEVEL - _CROWN), points[0, 0] + half, _EAR_LEVEL)
    return np.concatenate([smooth(points[:17], steps=3), forehead])


def hair_outline(draws: Draws, half: float) -> tuple[Points, Points]:
    """Return the outer edge of the hair (m, 2), from its lower left tip over the crown to the lower right.

    Args:
        draws: Random numbers of the face.
        half: Half of the face's width.

    Returns:
        The edge with its waves, and without.
    """
    volume = between(0.028, 0.080, draws.hair_volume)
    # To the ears, to the chin, or beyond the shoulders.
    reach = (0.50, 0.54, 0.84, 1.06, 1.10)[int(draws.hair_length * 5)]
    wide, crown = half + volume, _CROWN - 0.8 * volume
    tip = half + (0.09 if reach > 0.7 else 0.0)
    side = [(tip, reach), (wide + (0.03 if reach > 0.7 else -0.01), 0.35 * 0.42 + 0.65 * reach), (wide, 0.42)]
    dome = [(wide * np.cos(a), 0.42 - (0.42 - crown) * np.sin(a)) for a in np.deg2rad([22, 45, 68])]
    right = np.array(side + dome)
    curve = moved(smooth(np.concatenate([right * (-1, 1), [(0.0, crown)], right[::-1]]), steps=8), 0.5, 0.0)
    if draws.hair_wave < 0.4:
        return curve, curve
    swing = between(0.004, 0.014, (draws.hair_wave - 0.4) / 0.6)
    phase = np.linspace(0, (26 if draws.hair_wave > 0.75 else 14) * np.pi, len(curve))
    return curve + normals(curve) * (swing * np.sin(phase))[:, None], curve
