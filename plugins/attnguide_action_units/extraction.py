"""Finds landmarks in images, with mediapipe's face mesh; needs the extra `attnguide[landmarks]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnguide.data.files import check_file
from attnguide.data.images import read_image
from attnguide.errors import AttnGuideError, InputError
from attnguide_action_units.landmarks import to_68
from attnguide_action_units.tables import LandmarkTable

__all__ = ["Extractor", "extract", "face_mesh"]

#: Finds the points of the foremost face in an image `(H, W, 3)`, uint8: `(P, 2)` in pixels, or None.
Extractor = Callable[[np.ndarray[Any, Any]], "np.ndarray[Any, Any] | None"]


def face_mesh(model_file: str | Path | None = None) -> Extractor:
    """Make an extractor of mediapipe.

    Args:
        model_file: The file `face_landmarker.task`, for versions of mediapipe without a model (from 0.10.30).

    Raises:
        InputError: If mediapipe is not installed, needs a model file, or cannot use the one that is given.
        DataError: If the model file cannot be read.
    """
    try:
        mediapipe = import_module("mediapipe")
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        late = (
            f" There may be no mediapipe for Python {version} yet: use 3.12, and copy the table here."
            if sys.version_info >= (3, 13)
            else ""
        )
        raise InputError(
            "landmarks are found by mediapipe, which is not installed: pip install 'attnguide[landmarks]'."
            f"{late}"
        ) from error
    if model_file is None and hasattr(mediapipe, "solutions"):
        return _solution(mediapipe)
    if model_file is None:
        raise InputError(
            f"mediapipe {getattr(mediapipe, '__version__', '')} contains no model. Download "
            "face_landmarker.task from mediapipe's site and name it: --model-file face_landmarker.task."
        )
    check_file(model_file)
    return _task(mediapipe, Path(model_file))


def _solution(mediapipe: Any) -> Extractor:
    mesh = mediapipe.solutions.face_mesh.FaceMesh(static_image_mode=True, refine_landmarks=True)

    def find(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        faces = mesh.process(image).multi_face_landmarks
        return _in_pixels(faces[0].landmark, image) if faces else None

    return find


def _task(mediapipe: Any, model_file: Path) -> Extractor:
    tasks = import_module("mediapipe.tasks.python")
    vision = import_module("mediapipe.tasks.python.vision")
    options = vision.FaceLandmarkerOptions(
        base_options=tasks.BaseOptions(model_asset_path=str(model_file)), num_faces=1
    )
    try:
        mesh = vision.FaceLandmarker.create_from_options(options)
    # Which error it is depends on the version and on where the file is broken.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{model_file} cannot be used by mediapipe: {reason}. Download face_landmarker.task again."
        ) from error

    def find(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        picture = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(image))
        faces = mesh.detect(picture).face_landmarks
        return _in_pixels(faces[0], image) if faces else None

    return find


def _in_pixels(points: Any, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert shares of the sides to pixels, whose centres are whole numbers."""
    height, width = image.shape[:2]
    shares = np.array([(point.x, point.y) for point in points], dtype=np.float32)
    return shares * np.array([width, height], dtype=np.float32) - 0.5


def extract(
    files: Iterable[Path], extractor: Extractor, root: Path | None = None
) -> tuple[LandmarkTable, dict[str, str]]:
    """Find the landmarks of images.

    Args:
        files: Image files.
        extractor: Function that finds points in an image.
        root: Folder that names in the table are relative to.

    Returns:
        A table with an entry for each image, NaN for an image without landmarks; and the reason for each of
        these.
    """
    names: list[str] = []
    points: list[Tensor] = []
    failures: dict[str, str] = {}
    for file in files:
        name = str(file if root is None or not file.is_relative_to(root) else file.relative_to(root))
        names.append(name)
        points.append(torch.full((68, 2), torch.nan))
        try:
            face = extractor(np.asarray(read_image(file).convert("RGB")))
        except Exception as error:  # noqa: BLE001  (no error of a single image may end a long run)
            known = isinstance(error, AttnGuideError)
            failures[name] = str(error) if known else f"{type(error).__name__}: {error}"
            continue
        if face is None:
            failures[name] = "no face was found"
        else:
            points[-1] = to_68(face)
    stacked = torch.stack(points) if points else torch.empty(0, 68, 2)
    return LandmarkTable(tuple(names), stacked), failures
