"""The colours of drawn faces; red, green and blue from 0 to 255."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping

from attnguide.data.procedural._geometry import Draws, between

__all__ = [
    "EYE_SHADOWS",
    "FRAMES",
    "IRISES",
    "LIPSTICKS",
    "Color",
    "dim",
    "hair_color",
    "hsv",
    "mix",
    "pick",
    "skin_color",
]

Color = tuple[float, float, float]

LIPSTICKS: tuple[Color, ...] = ((204, 22, 44), (226, 46, 118), (146, 22, 88), (236, 70, 62), (178, 12, 62))
EYE_SHADOWS: tuple[Color, ...] = (
    (112, 52, 150),
    (38, 88, 172),
    (20, 128, 128),
    (58, 50, 72),
    (176, 54, 120),
)
IRISES: tuple[Color, ...] = ((70, 42, 24), (104, 66, 34), (84, 112, 58), (66, 118, 160), (96, 112, 122))
FRAMES: tuple[Color, ...] = ((26, 24, 28), (92, 52, 28), (150, 30, 40), (36, 56, 110))

_SKINS: tuple[Color, ...] = (
    (246, 208, 178), (236, 188, 148), (219, 166, 120), (190, 132, 90),
    (150, 98, 64), (106, 68, 45), (74, 47, 34),
)  # fmt: skip
_HAIRS: dict[str, tuple[Color, Color]] = {
    "black_hair": ((20, 18, 24), (40, 35, 40)),
    "brown_hair": ((86, 52, 30), (128, 80, 46)),
    "blond_hair": ((222, 180, 92), (244, 216, 142)),
}
_RED_HAIR: tuple[Color, Color] = ((150, 54, 24), (192, 84, 38))
_GRAY_HAIR: tuple[Color, Color] = ((150, 150, 156), (206, 206, 210))


def mix(a: Color, b: Color, t: float) -> Color:
    """Blend from `a` (t = 0) to `b` (t = 1)."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def dim(color: Color, factor: float) -> Color:
    """Scale a colour, no brighter than white."""
    return (min(255.0, color[0] * factor), min(255.0, color[1] * factor), min(255.0, color[2] * factor))


def hsv(hue: float, saturation: float, value: float) -> Color:
    """Return the colour of this hue, saturation and value, each in [0, 1]."""
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return (255 * r, 255 * g, 255 * b)


def pick(options: tuple[Color, ...], u: float) -> Color:
    """Choose one of the colours by u in [0, 1)."""
    return options[int(u * len(options))]


def skin_color(d: Draws, pale: bool) -> Color:
    """Return the colour of the skin: porcelain if pale, else from light to deep."""
    if pale:
        return mix((246, 220, 212), (244, 216, 200), d.skin_warmth)
    place = between(0.06, 1.0, d.skin) * (len(_SKINS) - 1)
    below = min(int(place), len(_SKINS) - 2)
    tone = mix(_SKINS[below], _SKINS[below + 1], place - below)
    return mix(tone, (tone[0] * 1.02, tone[1] * 0.96, tone[2] * 0.90), d.skin_warmth)


def hair_color(d: Draws, has: Mapping[str, bool]) -> Color:
    """Return the hair colour among the attributes, else red or grey."""
    for name, (dark, light) in _HAIRS.items():
        if has[name]:
            return mix(dark, light, d.hair_tone)
    return mix(*(_RED_HAIR if d.hair_other < 0.5 else _GRAY_HAIR), d.hair_tone)
