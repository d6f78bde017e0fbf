"""A tiny folder in the format of CelebA's release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

ATTRIBUTES = [
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
]


def make_celeba(root: Path, n: int = 8, *, seed: int = 0, size: tuple[int, int] = (178, 218)) -> np.ndarray:
    """Write `n` random images with random annotations under `root/celeba`.

    Every fourth image is of the split "valid", the one after it of "test", and the others of "train".

    Args:
        root: What to give to CelebA.
        n: Number of images.
        seed: Seed of the random numbers.
        size: Width and height of the images in pixels.

    Returns:
        The attributes, `(n, 40)` of 0 and 1.
    """
    rng = np.random.default_rng(seed)
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, n + 1)]
    attributes = rng.integers(0, 2, (n, len(ATTRIBUTES)))
    for name in names:
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)

    def write(filename: str, rows: np.ndarray, header: str | None = None, width: int = 0) -> None:
        lines = [] if header is None else [str(n), header]
        for name, row in zip(names, rows, strict=True):
            lines.append(f"{name} " + " ".join(f"{value:>{width}}" for value in row))
        (folder / filename).write_text("\n".join(lines) + "\n")

    # As in the release: the names of the attributes end in a space, and the values are padded to two places.
    write("list_attr_celeba.txt", 2 * attributes - 1, " ".join(ATTRIBUTES) + " ", width=2)
    write("list_eval_partition.txt", np.array([[{2: 1, 3: 2}.get(i % 4, 0)] for i in range(n)]))
    write("identity_CelebA.txt", rng.integers(1, 10178, (n, 1)))
    write("list_bbox_celeba.txt", rng.integers(0, 400, (n, 4)), "image_id x_1 y_1 width height", width=4)
    points = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
    landmarks = " ".join(f"{point}_{axis}" for point in points for axis in "xy")
    write("list_landmarks_align_celeba.txt", rng.integers(0, 178, (n, 10)), landmarks + " ", width=4)
    return attributes
