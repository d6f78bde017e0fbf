"""How fast `ProceduralFaces` draws, in images per second on one core."""

from __future__ import annotations

import time

import torch

from attnguide.data.procedural.faces import ProceduralFaces


def images_per_second(size: int, seconds: float = 2.0, repeats: int = 3) -> float:
    """Return the best of a few timings, the one that other processes disturbed least."""
    faces = ProceduralFaces(100_000, size=size)
    for i in range(20):  # fill the caches
        faces[i]
    best, index = 0.0, 20
    for _ in range(repeats):
        start, drawn = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / repeats:
            faces[index % len(faces)]
            index, drawn = index + 1, drawn + 1
        best = max(best, drawn / (time.perf_counter() - start))
    return best


def main() -> None:
    torch.set_num_threads(1)
    for size in (64, 224):
        print(f"{size:4d} px  {images_per_second(size):7.0f} images/s")


if __name__ == "__main__":
    main()
