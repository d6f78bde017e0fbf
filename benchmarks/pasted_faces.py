"""Real faces on real photographs: a second shortcut in the manner of Waterbirds.

Happy and surprised faces (fer_faces, aligned, 112×112, with 68 landmarks) are cut out along the hull of
their landmarks and pasted onto crops of photographs (imagenet_samples): most happy ones onto animals, most
surprised ones onto things. Faces are split by person, and the photographs too, so that the test has neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

__all__ = ["FACES_SIDE", "pasted_faces"]

#: Side of the pictures, in pixels.
FACES_SIDE = 128
_CLASSES = ("happiness", "surprise")
#: Share of the training faces that are on the photographs that go with their label.
_TOGETHER = 0.95
#: WordNet numbers below this are animals, in the names of the files.
_FIRST_THING = "n02600000"
#: Pictures of each face for training, validation and test.
_COPIES = (4, 1, 2)


def pasted_faces(data: Path, seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Draw images `(N, 3, H, W)` in [−1, 1], labels, masks `(N, H, W)` and places for three splits.

    Args:
        data: A folder with the folders `fer_faces` and `imagenet_samples`.
        seed: Seed of the split, the crops and the places.
    """
    random = np.random.default_rng(seed)
    with np.load(data / "fer_faces" / "fer_faces.npz", allow_pickle=False) as found:
        names = ("files", "labels", "classes", "landmarks68", "identity", "yaw")
        faces = {name: found[name] for name in names}
    wanted = [list(faces["classes"]).index(name) for name in _CLASSES]
    kept = np.flatnonzero(np.isin(faces["labels"], wanted) & (np.abs(faces["yaw"]) <= 0.6))
    people = random.permutation(np.unique(faces["identity"][kept]))
    groups = np.split(people, [len(people) * 6 // 10, len(people) * 7 // 10])
    files = sorted((data / "imagenet_samples").glob("*.jpg"))
    kinds = [[f for f in files if (f.name >= _FIRST_THING) == thing] for thing in (False, True)]
    scenes = [np.split(random.permutation(np.array(kind)), [len(kind) * 2 // 3]) for kind in kinds]
    parts = []
    for split, (group, copies) in enumerate(zip(groups, _COPIES, strict=True)):
        drawn: list[tuple[Tensor, Tensor, int, int]] = []
        for face in kept[np.isin(faces["identity"][kept], group)]:
            label = wanted.index(faces["labels"][face])
            for copy in range(copies):
                together = (copy % 2 == 0) if split == 2 else split == 1 or random.random() < _TOGETHER
                place = label if together else 1 - label
                scene = random.choice(scenes[place][split == 2])
                file = data / "fer_faces" / "images" / str(faces["files"][face])
                drawn.append((*_paste(file, faces["landmarks68"][face], scene, random), label, place))
        images, masks, labels, places = zip(*drawn, strict=True)
        parts.append((torch.stack(images), torch.tensor(labels), torch.stack(masks), torch.tensor(places)))
    return parts


def _paste(
    face: Path, landmarks: np.ndarray, scene: Path, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Paste a face at a random place of a random crop; return the image and the mask."""
    side = int(random.integers(64, 97))
    left, top = (int(random.integers(0, FACES_SIDE - side + 1)) for _ in range(2))
    with Image.open(face) as picture, Image.open(scene) as photograph:
        scale = side / picture.width
        small = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        crop = int(random.uniform(0.6, 1.0) * min(photograph.size))
        x, y = (int(random.integers(0, length - crop + 1)) for length in photograph.size)
        image = photograph.convert("RGB").resize(
            (FACES_SIDE, FACES_SIDE), Image.Resampling.BILINEAR, box=(x, y, x + crop, y + crop)
        )
    mask = Image.new("L", (FACES_SIDE, FACES_SIDE))
    points = [(left + scale * x, top + scale * y) for x, y in _with_forehead(landmarks)]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(1))
    whole = Image.new("RGB", (FACES_SIDE, FACES_SIDE))
    whole.paste(small, (left, top))
    image = Image.composite(whole, image, mask)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.from_numpy(np.array(mask)).float() / 255


def _with_forehead(landmarks: np.ndarray) -> list[tuple[float, float]]:
    """The jaw, and the brows raised by a quarter of the face's height."""
    jaw, brows = landmarks[:17], landmarks[26:16:-1]
    up = 0.25 * (jaw[:, 1].max() - brows[:, 1].min())
    return [(float(x), float(y)) for x, y in jaw] + [(float(x), float(y - up)) for x, y in brows]
