"""The parts of a drawn face: flat shapes, each an outline, a colour and a label, from back to front."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attnguide.data.procedural import _geometry as geo
from attnguide.data.procedural._colors import (
    FRAMES,
    IRISES,
    LIPSTICKS,
    Color,
    dim,
    hair_color,
    hsv,
    mix,
    pick,
)
from attnguide.data.procedural._geometry import Draws, Points, between

__all__ = ["SKIN", "TO_HELEN", "Shape", "face_shapes", "glasses_shapes"]

#: An outline (m, 2) in the canonical frame, a colour, and a label.
Shape = tuple[Points, Color, int]

SKIN, _LEFT_BROW, _RIGHT_BROW, _LEFT_EYE, _RIGHT_EYE, _NOSE, _UPPER_LIP, _INNER_MOUTH, _LOWER_LIP, _HAIR = (
    range(1, 11)
)
# Two labels that a segmentation does not have: parts that Helen counts as background, such as ears and hats,
# and parts on the skin, such as a beard.
_BODY, _ON_SKIN = 11, 12
#: Turns labels of shapes into labels of the segmentation.
TO_HELEN = np.array([*range(11), 0, SKIN], dtype=np.uint8)

_WHITE: Color = (255, 255, 255)
# Landmarks of the subject's right eye and brow, then of the left, each from its outer end.
_EYES = np.array([[36, 37, 38, 39, 40, 41], [45, 44, 43, 42, 47, 46]])
_BROWS = np.array([[17, 18, 19, 20, 21], [26, 25, 24, 23, 22]])
_WINGS = np.array([[(-0.022, -0.016)], [(0.022, -0.016)]])
_PUPIL = np.concatenate(  # iris, pupil and glint
    [
        geo.ellipse(0, 0, 0.0285, 0.0285, 20),
        geo.ellipse(0, 0, 0.0145, 0.0145, 14),
        geo.ellipse(-0.010, -0.009, 0.007, 0.007, 8),
    ]
)
_BROW_WIDTH = 0.35 + 0.85 * np.linspace(0, 1, 17) - 0.2 * np.linspace(0, 1, 17) ** 4
_ROUND = geo.ellipse(0, 0, 1, 1, 32)[[*range(32), 0]]
_SQUARE = np.sign(_ROUND) * np.abs(_ROUND) ** 0.55


def face_shapes(d: Draws, has: Mapping[str, bool], teeth: float, points: Points, skin: Color) -> list[Shape]:
    """List everything with an edge, from back to front, except glasses, which lie on top.

    Args:
        d: Random numbers of the face.
        has: Whether each attribute is present, by name.
        teeth: Fraction of the open mouth that the upper teeth fill.
        points: The landmarks (68, 2) in the canonical frame.
        skin: Colour of the skin.
    """
    half = (points[16, 0] - points[0, 0]) / 2
    hair = hair_color(d, has)
    outer, crown = geo.hair_outline(d, half)
    shapes: list[Shape] = []
    if not has["bald"]:
        shapes.append((outer, dim(hair, 0.70), _HAIR))
    shapes += _bust(d, points, skin)
    shapes += _head(points, skin)
    if has["moustache"] or has["goatee"]:
        shapes += _beard(d, has, points)
    shapes += _nose(d, points, skin)
    shapes += _mouth(d, has["lipstick"], teeth, points, skin)
    shapes += _eyes(d, has["heavy_makeup"], points, skin)
    shapes += _brows(d, has["bushy_eyebrows"], points)
    if not has["bald"]:
        shapes += _front_hair(d, has["bangs"], outer, crown, half, hair)
    if has["earrings"]:
        shapes += _earrings(d, points)
    if has["hat"]:
        shapes += _hat(d, half)
    return shapes


def _mirrored(side: Points | list[tuple[float, float]]) -> Points:
    """Continue the left side (n, 2) of an outline about x = 0, given from bottom to top, down the right."""
    left = np.asarray(side)
    return np.concatenate([left, left[::-1] * (-1, 1)])


def _bust(d: Draws, points: Points, skin: Color) -> list[Shape]:
    """Shoulders, neck, and the shadow that the chin throws on it."""
    under = points[8, 1]
    shirt = hsv(d.shirt_hue, between(0.15, 0.65, d.shirt_tone), between(0.85, 0.35, d.shirt_tone))
    body = _mirrored([(-0.60, 1.25), (-0.48, 1.04), (-0.34, 0.985), (-0.165, 0.955), (-0.06, 0.985)])
    neck = _mirrored([(-0.05, 1.06), (-0.11, 1.03), (-0.145, 0.96), (-0.145, 0.72)])
    shade = np.array(
        [(-0.145, 0.72), (0.145, 0.72), (0.145, under - 0.01), (0, under + 0.045), (-0.145, under - 0.01)]
    )
    return [
        (geo.moved(geo.smooth(body, steps=4), 0.5, 0), shirt, _BODY),
        (geo.moved(neck, 0.5, 0), dim(skin, 0.90), _BODY),
        (geo.moved(geo.smooth(shade), 0.5, 0), dim(skin, 0.74), _BODY),
    ]


def _head(points: Points, skin: Color) -> list[Shape]:
    """Ears and face."""
    left, right = points[0, 0], points[16, 0]
    return [
        (geo.ellipse(left - 0.008, 0.515, 0.036, 0.070), dim(skin, 0.93), _BODY),
        (geo.ellipse(right + 0.008, 0.515, 0.036, 0.070), dim(skin, 0.93), _BODY),
        (geo.ellipse(left - 0.014, 0.512, 0.016, 0.042, 12), dim(skin, 0.78), _BODY),
        (geo.ellipse(right + 0.014, 0.512, 0.016, 0.042, 12), dim(skin, 0.78), _BODY),
        (geo.face_outline(points), skin, SKIN),
    ]


def _beard(d: Draws, has: Mapping[str, bool], points: Points) -> list[Shape]:
    """Moustache and goatee; the lips come on top."""
    color = mix((32, 24, 22), (96, 60, 34), d.beard_tone)
    shapes: list[Shape] = []
    if has["moustache"]:
        droop = between(0.018, 0.048, d.beard_size)
        top = np.concatenate([_mirrored([(-0.155, droop), (-0.10, -0.022), (-0.035, -0.045)])])
        top = geo.moved(np.insert(top, 3, (0, -0.036), axis=0), *points[51])
        top[:, 1] = np.maximum(top[:, 1], points[33, 1] + 0.010)  # below the nose
        bottom = geo.moved(points[49:54], 0, 0.012)
        shapes.append(
            (geo.smooth(np.concatenate([top, bottom[::-1]]), closed=True, steps=3), color, _ON_SKIN)
        )
    if has["goatee"]:
        lip, chin, wide = points[57, 1], points[8, 1], between(0.075, 0.115, d.beard_size)
        side = [(-0.4, chin + 0.028), (-0.86, chin - 0.015), (-1.0, lip - 0.010), (-0.3, lip + 0.012)]
        patch = geo.moved(_mirrored(side) * (wide, 1), points[57, 0], 0)
        shapes.append((geo.smooth(patch, closed=True, steps=4), color, _ON_SKIN))
    return shapes


def _nose(d: Draws, points: Points, skin: Color) -> list[Shape]:
    """Nose along landmarks 27 to 35, its far side in shade."""
    bridge, base = points[27:31], points[31:36]
    wing = base[4, 0] - base[2, 0]
    wide = np.array([(0.016, 0.0), (0.018, 0.0), (0.026, 0.0)])
    alar = np.array([(0.20 * wing, -0.022)])
    right = np.concatenate([bridge[:3] + wide, base[4:] + alar, base[4:]])
    left = np.concatenate([bridge[:3] - wide, base[:1] + alar * (-1, 1), base[:1]])
    whole = geo.smooth(np.concatenate([left, base[1:4], right[::-1]]), closed=True, steps=3)
    far = right if d.light_angle < 0.5 else left
    shade = np.concatenate([far, geo.moved(bridge[3:], 0, 0.012), bridge[2:0:-1]])
    return [
        (whole, dim(skin, 0.955), _NOSE),
        (shade, dim(skin, 0.875), _NOSE),
        (geo.ellipse(base[1, 0] - 0.004, base[1, 1] - 0.008, 0.013, 0.007, 10), dim(skin, 0.60), _NOSE),
        (geo.ellipse(base[3, 0] + 0.004, base[3, 1] - 0.008, 0.013, 0.007, 10), dim(skin, 0.60), _NOSE),
    ]


def _mouth(d: Draws, lipstick: bool, teeth: float, points: Points, skin: Color) -> list[Shape]:
    """Lips through landmarks 48 to 67, and the inside of an open mouth."""
    rosy = between(0.78, 0.60, d.lip_tone)  # the colour of the skin, from hardly to clearly pinker
    lower: Color = (skin[0] * 0.89, skin[1] * rosy, skin[2] * (rosy + 0.02))
    shine = 0.10
    if lipstick:  # from a thin coat to a full one: plain to see, yet harder to learn than make-up on the eyes
        coat = between(0.36, 0.80, d.lipstick_depth)
        lower, shine = mix(lower, pick(LIPSTICKS, d.lipstick_hue), coat), 0.40
    upper, gloss = dim(lower, 0.88), mix(lower, _WHITE, shine)
    over, under = (
        geo.smooth(points[48:55], steps=4),
        geo.smooth(points[[54, 55, 56, 57, 58, 59, 48]], steps=4),
    )
    top, bottom = geo.smooth(points[60:65], steps=4), geo.smooth(points[[64, 65, 66, 67, 60]], steps=4)
    # Each lip covers the opening, which then is filled on top of both.
    shapes: list[Shape] = [
        (np.concatenate([over, bottom]), upper, _UPPER_LIP),
        (np.concatenate([under, top]), lower, _LOWER_LIP),
    ]
    gap = points[66, 1] - points[62, 1]
    if gap > 0:
        shapes.append((np.concatenate([top, bottom]), (74, 18, 26), _INNER_MOUTH))
        if teeth:
            inside, color = geo.moved(top[::-1], 0, teeth * gap), (244, 240, 232)
        else:
            inside, color = geo.ellipse(points[66, 0], points[66, 1], 0.045, 0.42 * gap, 16), (184, 78, 84)
        # Teeth and tongue stay above the lower lip.
        inside[:, 1] = np.minimum(inside[:, 1], np.interp(inside[:, 0], bottom[::-1, 0], bottom[::-1, 1]))
        shapes.append((np.concatenate([top, inside]) if teeth else inside, color, _INNER_MOUTH))
    else:
        shapes.append((geo.stroke(top, 0.003, 0.004), dim(upper, 0.58), _UPPER_LIP))
    thick = points[57, 1] - points[66, 1]
    x = points[57, 0] + (-0.035 if d.light_angle < 0.5 else 0.035)
    shapes.append((geo.ellipse(x, points[66, 1] + 0.46 * thick, 0.036, 0.13 * thick, 10), gloss, _LOWER_LIP))
    return shapes


def _eyes(d: Draws, made_up: bool, points: Points, skin: Color) -> list[Shape]:
    """Both eyes through landmarks 36 to 47, with lashes, and a crease above."""
    eyes = points[_EYES]  # (2, 6, 2)
    upper, lower = geo.smooth(eyes[:, :4], steps=4), geo.smooth(eyes[:, [3, 4, 5, 0]], steps=4)
    # A made-up eye's line is thick, and runs on into a wing.
    line = np.concatenate([upper[:, :1] + _WINGS, upper], axis=1) if made_up else upper
    ink: Color = (18, 14, 20) if made_up else mix(dim(skin, 0.35), (40, 26, 24), 0.6)
    lashes = geo.stroke(line, (0.016 if made_up else 0.0085) * geo.swell(line.shape[1], 0.25), 0.0)
    creases = geo.stroke(geo.moved(upper, 0, -0.020), 0.0, 0.006 * geo.swell(upper.shape[1]))
    whites = np.concatenate([upper, lower], axis=1)
    gaze = geo.moved(eyes.mean(axis=1), between(-0.010, 0.010, d.gaze_x), between(-0.007, 0.0, d.gaze_y))
    shapes: list[Shape] = []
    for k, label in enumerate((_RIGHT_EYE, _LEFT_EYE)):
        # The lids cut the iris off; np.interp wants them from left to right.
        order = 1 if k == 0 else -1
        lid, floor = upper[k, ::order], lower[k, ::-order]
        discs = _PUPIL + gaze[k]
        discs[:, 1] = np.maximum(discs[:, 1], np.interp(discs[:, 0], lid[:, 0], lid[:, 1]))
        discs[:, 1] = np.minimum(discs[:, 1], np.interp(discs[:, 0], floor[:, 0], floor[:, 1]))
        shapes += [
            (creases[k], dim(skin, 0.84), SKIN),
            (lashes[k], ink, _ON_SKIN),
            (whites[k], (246, 244, 242), label),
            (discs[:20], pick(IRISES, d.iris), label),
            (discs[20:34], (14, 10, 12), label),
            (discs[34:], _WHITE, label),
        ]
    return shapes


def _brows(d: Draws, bushy: bool, points: Points) -> list[Shape]:
    """Both brows along landmarks 17 to 26."""
    thick = between(0.0165, 0.0205, d.brow_weight) if bushy else between(0.0065, 0.0085, d.brow_weight)
    right, left = geo.stroke(
        geo.smooth(points[_BROWS], steps=4), thick * _BROW_WIDTH, 0.8 * thick * _BROW_WIDTH
    )
    color = mix((30, 22, 22), (104, 68, 40), d.brow_tone)
    return [(right, color, _RIGHT_BROW), (left, color, _LEFT_BROW)]


def _front_hair(d: Draws, bangs: bool, outer: Points, crown: Points, half: float, hair: Color) -> list[Shape]:
    """Hair in front of the face: the area between its outer edge and the hairline, from tip to tip."""
    reach, tip = crown[-1, 1], crown[-1, 0] - 0.5
    right = np.array(
        [(0.94 * half, 0.40), (half, 0.5 * reach + 0.22), (tip - 0.03 if reach > 0.7 else tip, reach)]
    )
    left = right[::-1] * (-1, 1)
    if bangs:
        across = np.linspace(-0.83, 0.83, 17)
        fringe = np.stack(
            [half * across, 0.346 - 0.02 * across**2 + 0.010 * np.resize([1.0, -1.0], 17)], axis=1
        )
        line = np.concatenate([geo.smooth(left, steps=4), fringe, geo.smooth(right, steps=4)])
    else:
        part, temple = between(-0.5, 0.5, d.hair_part) * half, 0.79 * half
        sweep = [((part - temple) / 2, 0.262), (part, 0.222), ((part + temple) / 2, 0.262)]
        line = geo.smooth(np.concatenate([left, [(-temple, 0.315), *sweep, (temple, 0.315)], right]), steps=4)
    # A band of shine around the crown.
    middle = len(crown) // 2
    band = geo.moved(geo.moved(crown[middle - 16 : middle + 17], -0.5, -0.46) * (0.88, 0.85), 0.5, 0.46)
    width = 0.012 * geo.swell(len(band))
    return [
        (np.concatenate([outer, geo.moved(line[::-1], 0.5, 0)]), hair, _HAIR),
        (geo.stroke(band, width, width), mix(dim(hair, 1.10), (255, 250, 240), 0.10), _HAIR),
    ]


def _earrings(d: Draws, points: Points) -> list[Shape]:
    """Pearls or drops, of gold or silver."""
    metal: Color = (236, 188, 62) if d.earring_kind < 0.5 else (226, 232, 240)
    shapes: list[Shape] = []
    for x in (points[0, 0] - 0.012, points[16, 0] + 0.012):
        if d.earring_kind * 2 % 1 < 0.5:
            shapes.append((geo.ellipse(x, 0.606, 0.024, 0.024, 14), metal, _BODY))
            shapes.append((geo.ellipse(x - 0.006, 0.599, 0.008, 0.008, 8), _WHITE, _BODY))
        else:
            drop = np.array([(0, -0.030), (0.018, 0.020), (0.0, 0.044), (-0.018, 0.020)])
            shapes.append((geo.smooth(geo.moved(drop, x, 0.612), closed=True, steps=3), metal, _BODY))
            shapes.append((geo.ellipse(x - 0.004, 0.630, 0.006, 0.009, 8), _WHITE, _BODY))
    return shapes


def _hat(d: Draws, half: float) -> list[Shape]:
    """A knitted cap, or a hat with a brim."""
    wide = half + 0.065
    cloth = hsv(d.hat_hue, 0.62, between(0.45, 0.85, d.hat_kind * 7 % 1))
    dome = geo.smooth(_mirrored([(-1.0, 0.30), (-0.98, 0.21), (-0.72, 0.095), (-0.2, 0.048)]))
    edge = geo.smooth(np.array([(-1.0, 0.285), (-0.5, 0.268), (0.0, 0.262), (0.5, 0.268), (1.0, 0.285)]))
    dome, edge = geo.moved(dome * (wide, 1), 0.5, 0), geo.moved(edge * (wide, 1), 0.5, 0)
    if d.hat_kind < 0.5:
        return [
            (dome, cloth, _BODY),
            (geo.stroke(edge, 0.036, 0.034), dim(cloth, 0.74), _BODY),
            (geo.ellipse(0.5, 0.055, 0.05, 0.045), mix(cloth, _WHITE, 0.5), _BODY),
        ]
    return [
        (geo.ellipse(0.5, 0.285, wide + 0.10, 0.046, 28), dim(cloth, 0.80), _BODY),
        (dome[dome[:, 1] < 0.285], cloth, _BODY),
        (geo.stroke(geo.moved(edge, 0, -0.015), 0.020, 0.016), dim(cloth, 0.55), _BODY),
    ]


def glasses_shapes(d: Draws, points: Points) -> list[Shape]:
    """List the shapes of the frame of a pair of glasses, round or square."""
    color, thin = pick(FRAMES, d.glasses_tone), 0.0075
    eyes = points[_EYES].mean(axis=1)
    center, apart = eyes.mean(axis=0), (eyes[1, 0] - eyes[0, 0]) / 2
    size = np.array((min(0.094, apart - 0.018), 0.066))
    rim = (_ROUND if d.glasses_kind < 0.5 else _SQUARE) * size
    ring = np.concatenate([rim * (1 + thin / size), (rim * (1 - thin / size))[::-1]])
    bridge = geo.smooth(np.array([(size[0] - apart, -0.004), (0.0, -0.018), (apart - size[0], -0.004)]))
    arm = np.array([(apart + size[0], -0.012), ((points[16, 0] - points[0, 0]) / 2 + 0.012, -0.004)])
    shapes: list[Shape] = [(center + geo.stroke(bridge, thin, thin), color, _ON_SKIN)]
    for eye, side in zip(eyes, (-1, 1), strict=True):
        shapes.append((eye + ring, color, _ON_SKIN))
        shapes.append((center + geo.stroke(arm * (side, 1), thin, thin), color, _ON_SKIN))
    return shapes
