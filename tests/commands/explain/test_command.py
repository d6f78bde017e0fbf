"""`attnguide explain`, from the files that go in to the files that come out."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.pictures import index_of, no_leftovers, picture

import attnguide as ag
from attnguide import models
from attnguide.commands.explain import run, sheet
from attnguide.commands.explain.reserving import reserved
from attnguide.data.images import read_image
from attnguide.errors import InputError

TINY = "test_efficientnet"


def bomb(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
        + chunk(b"IEND", b"")
    )


def test_maps_and_index_agree_with_explain(call, photos, tmp_path):
    out = tmp_path / "out"
    result = call("explain", photos, "--model", TINY, "--out", out, "--format", "all", "--target", "top:2")
    assert "weights of test_efficientnet are random" in result.stderr
    assert result.stdout == f"10 maps, 0 images skipped, in {out}\n"
    loaded = models.load(TINY)
    lines = index_of(out)
    paths = sorted(photos.iterdir())
    images = torch.stack([loaded.read(path) for path in paths])
    logits = loaded.model(images).detach()
    top = logits.topk(2, dim=1).indices
    explanation = ag.explain(loaded.model, images, targets=[(i, int(c)) for i in range(5) for c in top[i]])
    assert len(lines) == 10
    for number, line in enumerate(lines):
        row, column = divmod(number, 2)
        cls = int(top[row, column])
        assert line["image"] == str(paths[row])
        assert (line["class"], line["class_name"]) == (cls, loaded.classes[cls])
        assert line["logit"] == pytest.approx(float(logits[row, cls]), abs=1e-5)
        assert line["score"] == pytest.approx(float(logits[row].softmax(0)[cls]), abs=1e-6)
        assert (line["layer"], line["source"], line["model"]) == (explanation.layer, "grad_cam", TINY)
        assert line["size"] == list(loaded.size)
        files = {Path(file).suffix: out / file for file in line["files"]}
        with np.load(files[".npz"]) as file:
            saved = dict(file)
        assert saved["map"].dtype == np.float32
        assert (int(saved["cls"]), str(saved["layer"])) == (cls, explanation.layer)
        assert float(saved["score"]) == line["score"]
        expected = explanation.maps[row, column]
        scale = float(expected.abs().max())
        np.testing.assert_allclose(saved["map"], expected.numpy(), atol=1e-4 * scale + 1e-9)
        np.testing.assert_array_equal(np.load(files[".npy"]), saved["map"])
        drawn = np.asarray(read_image(files[".png"])).astype(int)
        overlay = explanation.overlay(loaded.displayed(images))[row, column].permute(1, 2, 0).numpy()
        assert np.abs(drawn - overlay).max() <= 2
    with Image.open(out / "contact_sheet.png") as page:
        assert page.width > 3 * 192
    assert no_leftovers(out)


def test_the_embedded_form_is_the_model_without_a_name(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    call("explain", photos, "--checkpoint", faces, "--out", out)
    loaded = models.embedded(faces)
    expected = []
    for path in sorted(photos.iterdir()):
        logits = loaded.model(loaded.read(path)[None])[0]
        classes = [c for c in logits.argsort(descending=True).tolist() if logits[c] > 0]
        expected += [(str(path), loaded.classes[c]) for c in classes or [int(logits.argmax())]]
    assert [(line["image"], line["class_name"]) for line in index_of(out)] == expected
    assert all(0.5 < line["score"] <= 1 for line in index_of(out))


def test_formats_sizes_and_evidence(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    options = ("--format", "npy", "--size", "layer", "--target", "wavy HAIR,1", "--evidence", "decision")
    call("explain", photos / "0.png", "--checkpoint", faces, "--out", out, *options)
    lines = index_of(out)
    assert [line["files"] for line in lines] == [["0_wavy-hair.npy"], ["0_bald.npy"]]
    assert np.load(out / "0_bald.npy").shape == (4, 4)
    loaded = models.embedded(faces)
    image = loaded.read(photos / "0.png")[None]
    expected = ag.explain(loaded.model, image, targets=[1], size=None, evidence="decision").maps[0, 0]
    np.testing.assert_allclose(np.load(out / "0_bald.npy"), expected.numpy(), rtol=1e-4, atol=1e-7)
    assert (out / "contact_sheet.png").exists()


def test_the_sheet_is_drawn_from_any_format(call, photos, faces, tmp_path):
    pages = []
    for format in ("png", "npy", "npz"):
        out = tmp_path / format
        call("explain", photos, "--checkpoint", faces, "--target", "0", "--out", out, "--format", format)
        pages.append(np.asarray(read_image(out / "contact_sheet.png")))
    np.testing.assert_array_equal(pages[0], pages[1])
    np.testing.assert_array_equal(pages[0], pages[2])


def test_all_classes_of_many(call, photos, tmp_path):
    out = tmp_path / "out"
    call("explain", photos / "0.png", "--model", TINY, "--num-classes", 40, "--target", "all", "--out", out)
    assert [line["class"] for line in index_of(out)] == list(range(40))
    assert len(list(out.glob("0_class-*.png"))) == 40


def test_same_names_in_two_folders(call, faces, tmp_path):
    for folder in "ab":
        picture(tmp_path / folder / "1.png", ord(folder))
    out = tmp_path / "out"
    call("explain", tmp_path / "a", tmp_path / "b", "--checkpoint", faces, "--target", "hat", "--out", out)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*hat*")) == [
        "a/1_hat.png",
        "b/1_hat.png",
    ]


def test_class_names_from_files(call, photos, faces, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n\nc\nd\n")
    (tmp_path / "names.json").write_text('["a", "b", "c", "d"]')
    for name in ("names.txt", "names.json"):
        out = tmp_path / name.replace(".", "-")
        options = ("--class-names", tmp_path / name, "--target", "d", "--out", out)
        call("explain", photos / "1.png", "--checkpoint", faces, *options)
        assert index_of(out)[0]["class"] == 3
    (tmp_path / "names.json").write_text('{"a": 1}')
    result = call(
        "explain", photos, "--checkpoint", faces, "--class-names", tmp_path / "names.json", status=2
    )
    assert "JSON list" in result.stderr


def test_unreadable_images_are_skipped_and_reported(call, photos, faces, tmp_path):
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("hello")
    (photos / "void.png").touch()
    bomb(photos / "bomb.png")
    out = tmp_path / "out"
    options = ("--checkpoint", faces, "--target", "0", "--out", out, "--batch-size", 2)
    result = call("explain", photos, *options, status=1)
    assert result.stdout == f"5 maps, 4 images skipped, in {out}\n"
    reasons = [line for line in result.stderr.splitlines() if line.startswith("Skipped: ")]
    assert [name for line in reasons for name in ("bomb", "cut", "text", "void") if f"{name}." in line] == [
        "bomb", "cut", "text", "void",
    ]  # fmt: skip
    assert len(index_of(out)) == 5


def test_nothing_but_unreadable_images(call, faces, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    result = call("explain", tmp_path / "a.png", "--checkpoint", faces, "--out", tmp_path / "out", status=1)
    assert "0 maps, 1 images skipped" in result.stdout
    assert (tmp_path / "out/index.jsonl").read_text() == ""


def test_a_model_that_answers_nan_is_reported(call, photos, tmp_path, faces, monkeypatch):
    # Such weights are refused; logits may overflow with others, too.
    monkeypatch.setattr("attnguide.models.checkpoints._check_values", lambda *_: None)
    model = models.embedded(faces).model
    model.get_submodule("head").bias.data[0] = torch.nan
    path = tmp_path / "nan.safetensors"
    models.write_embedded(path, model, classes="abcd", size=32, width=4, mean=[0] * 3, std=[1] * 3)
    result = call("explain", photos, "--checkpoint", path, "--out", tmp_path / "out", status=1)
    assert "NaN" in result.stderr
    assert index_of(tmp_path / "out") == []


def test_resume_explains_only_what_is_left(call, photos, faces, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("explain", photos, "--checkpoint", faces, "--target", "0", "--out", out, "--resume")
    call(*arguments)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*_*.png") if path.name != sheet.NAME}
    picture(photos / "new.png", 9)
    (out / "3_smiling.png").unlink()
    batches = []
    original = run.explain
    monkeypatch.setattr(
        run,
        "explain",
        lambda model, images, *a, **k: batches.append(len(images)) or original(model, images, *a, **k),
    )
    result = call(*arguments)
    assert result.stdout == f"6 maps (4 images were done before), 0 images skipped, in {out}\n"
    assert batches == [2]
    assert sorted(line["name"] for line in index_of(out)) == ["0", "1", "2", "3", "4", "new"]
    changed = [path.name for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert changed == ["3_smiling.png"]
    monkeypatch.setattr(models, "load", None)  # nothing left: not even the model is needed
    assert "6 maps (6 images were done before)" in call(*arguments).stdout


def test_resume_with_other_settings_is_an_error(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    arguments = ("explain", photos, "--checkpoint", faces, "--out", out)
    call(*arguments, "--target", "0")
    result = call(*arguments, "--target", "1", "--resume", status=2)
    assert "target was '0' and is '1'" in result.stderr
    call(*arguments, "--target", "1")
    assert {line["class"] for line in index_of(out)} == {1}


def test_resume_of_a_damaged_index_is_an_error(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    call("explain", photos, "--checkpoint", faces, "--target", "0", "--out", out)
    with (out / "index.jsonl").open("a") as file:
        file.write('{"image": ')
    result = call(
        "explain", photos, "--checkpoint", faces, "--target", "0", "--out", out, "--resume", status=2
    )
    assert "index.jsonl, line 6" in result.stderr


def test_an_interruption_leaves_a_valid_index_and_no_temporary_file(
    call, photos, faces, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    arguments = (
        "explain",
        photos,
        "--checkpoint",
        faces,
        "--target",
        "0",
        "--out",
        out,
        "--batch-size",
        2,
        "--resume",
    )
    original, calls = run.explain, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(run, "explain", interrupted)
    result = call(*arguments, status=130)
    assert "Interrupted." in result.stderr
    assert [line["name"] for line in index_of(out)] == ["0", "1"]
    assert no_leftovers(out)
    monkeypatch.setattr(run, "explain", original)
    assert "5 maps (2 images were done before)" in call(*arguments).stdout


def test_an_interruption_between_the_maps_of_an_image(call, photos, faces, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("explain", photos, "--checkpoint", faces, "--target", "top:3", "--out", out, "--resume")
    original = Future.result

    def interrupted(future, *args):
        answer = original(future, *args)
        if isinstance(answer, dict) and (answer["name"], answer["class"]) == ("2", second):
            raise KeyboardInterrupt
        return answer

    loaded = models.embedded(faces)
    second = int(loaded.model(loaded.read(photos / "2.png")[None])[0].argsort(descending=True)[1])
    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        call(*arguments, status=130)
    assert [line["name"] for line in index_of(out)] == ["0"] * 3 + ["1"] * 3
    assert "15 maps (2 images were done before)" in call(*arguments).stdout
    assert sorted(line["name"] for line in index_of(out)) == sorted("01234" * 3)
    assert len(list(out.glob("?_*.png"))) == 15


ATTNGUIDE = [sys.executable, "-c", "from attnguide.cli.main import main; main()"]


def until_maps(process, out, count=3):
    end = time.monotonic() + 60
    while len(list(out.glob("*_*.png"))) < count:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_ended_from_outside_can_be_resumed(faces, tmp_path, number, status):
    for index in range(60):
        picture(tmp_path / "photos" / f"{index}.png", index)
    out = tmp_path / "out"
    options = ["--checkpoint", faces, "--target", "top:3", "--batch-size", "2", "--out", out, "--resume"]
    command = [*ATTNGUIDE, "explain", tmp_path / "photos", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until_maps(process, out)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    if number == signal.SIGTERM:
        assert errors.endswith("Terminated.\n")
        assert no_leftovers(out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("180 maps")
    assert len(list(out.glob("*_*.png"))) == 180 + 1
    assert no_leftovers(out)


def test_two_runs_into_one_folder(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with reserved(out):
        result = call("explain", photos, "--checkpoint", faces, "--out", out, status=2)
    assert f"another run writes to {out} (process {os.getpid()})" in result.stderr
    assert list(out.iterdir()) == []
    call("explain", photos, "--checkpoint", faces, "--out", out)


@pytest.mark.filterwarnings("default")
def test_a_run_does_not_explain_what_an_earlier_run_drew(call, photos, faces, tmp_path):
    (photos / "raw.cr2").touch()
    for number in range(3):
        # The target changes, so that the index does not list the maps of the run before.
        out = photos / "out" if number else photos
        result = call("explain", photos, "--checkpoint", faces, "--target", number, "--out", out)
        assert result.stdout.startswith("5 maps, 0 images skipped")
        expected = f"{6 * number} pictures that attnguide has drawn" if number else ""
        assert expected in result.stderr
        assert "1 images of formats that are not read (1 .cr2); convert them." in result.stderr
    assert call("explain", "", "--checkpoint", faces, status=2).stderr.startswith("Error: a path is ''")


def test_the_embedded_model_says_what_it_knows(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    result = call("explain", photos, "--target", "0", "--out", out)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("No --model")]
    assert "attributes of drawn faces" in line
    assert "No --model" not in call("explain", photos, "--checkpoint", faces, "--out", out).stderr


def test_the_page_of_an_earlier_run_does_not_outlive_an_interruption(
    call, photos, faces, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    arguments = ("explain", photos, "--checkpoint", faces, "--target", "0", "--out", out, "--resume")
    call(*arguments)
    picture(photos / "new.png", 9)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sheet, "write_sheet", interrupted)
        call(*arguments, status=130)
    assert len(index_of(out)) == 6
    assert not (out / sheet.NAME).exists()
    call(*arguments)
    assert (out / sheet.NAME).exists()


def test_a_damaged_map_is_named(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    options = ("--checkpoint", faces, "--target", "0", "--format", "npy", "--out", out, "--resume")
    call("explain", photos, *options)
    (out / sheet.NAME).unlink()
    (out / "2_smiling.npy").write_bytes(b"no array")
    result = call("explain", photos, *options, status=2)
    assert "2_smiling.npy is not a map that attnguide wrote" in result.stderr


def test_an_interruption_while_a_picture_is_written(call, photos, faces, tmp_path, monkeypatch):
    def interrupted(picture):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr("attnguide.visual.to_pil", interrupted)
    call("explain", photos, "--checkpoint", faces, "--out", out, status=130)
    assert index_of(out) == []
    assert no_leftovers(out)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_written_is_an_error_before_the_model_is_loaded(
    call, photos, tmp_path, monkeypatch, below
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(models, "load", None)
    result = call("explain", photos, "--out", tmp_path / "file" / below, status=2)
    assert "cannot write to the folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_full_disk_is_one_error(call, photos, faces, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    out = tmp_path / "out"
    result = call("explain", photos, "--checkpoint", faces, "--out", out, "--format", "npy", status=2)
    assert "No space left on device" in result.stderr
    assert no_leftovers(out)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_hints_at_the_batch_size(call, photos, faces, tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(run, "explain", fail)
    result = call("explain", photos, "--checkpoint", faces, "--out", tmp_path / "out", status=2)
    assert "--batch-size 8 --resume" in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "resnet5"], "Did you mean resnet50"),
        (["--source", "gradcam"], "Did you mean 'grad_cam'"),
        (["--target", "smilling"], "Did you mean 'smiling'"),
        (["--layer", "block9"], "Did you mean 'block"),
        (["--device", "warp9"], "--device warp9"),
        (["--pretrained"], "--pretrained needs a model"),
        (["--model", TINY, "--pretrained"], "exclude each other"),
        (["--class-names", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--batch-size", "0"], "Invalid value"),
        (["--alpha", "2"], "Invalid value"),
    ],
)
def test_errors_are_clean(call, photos, faces, tmp_path, options, expected):
    result = call("explain", photos, "--checkpoint", faces, "--out", tmp_path / "out", *options, status=2)
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_a_pattern_without_a_match(call, tmp_path):
    assert "matches no image" in call("explain", tmp_path / "*.png", status=2).stderr


def test_an_earlier_index_survives_a_mistake(call, photos, faces, tmp_path):
    out = tmp_path / "out"
    call("explain", photos, "--checkpoint", faces, "--out", out)
    before = (out / "index.jsonl").read_bytes()
    call("explain", photos, "--model", "resnet5", "--out", out, status=2)
    assert (out / "index.jsonl").read_bytes() == before


def test_pretrained_offline_in_a_fresh_process(photos, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    command = "from attnguide.cli.main import main; main()"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            command,
            "explain",
            photos,
            "--model",
            "test_vit",
            "--pretrained",
            "--out",
            tmp_path / "o",
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: the pretrained weights of test_vit")
    assert len(done.stderr.splitlines()) == 1


def test_the_sheet_has_the_best_maps_of_images_spread_over_the_run(
    monkeypatch, faces, photos, tmp_path, call
):
    monkeypatch.setattr(sheet, "_IMAGES", 3)
    pages = []
    original = sheet.visual.contact_sheet
    monkeypatch.setattr(
        sheet.visual, "contact_sheet", lambda *a, **k: pages.append((a, k)) or original(*a, **k)
    )
    call("explain", photos, "--checkpoint", faces, "--target", "all", "--out", tmp_path / "out")
    ((pictures, captions), options) = pages[0]
    assert options["group"] == 5
    assert captions[::5] == ["0.png", "1.png", "3.png"]
    scores = [float(caption.partition("%")[0]) for caption in captions[1:5]]
    assert scores == sorted(scores, reverse=True)
    assert len(pictures) == 15


def test_contact_sheet_groups_must_be_whole():
    with pytest.raises(InputError, match="whole groups of 2"):
        ag.visual.contact_sheet([None] * 3, group=2)


def test_real_photos(call, tmp_path, real_data):
    photos = sorted(real_data.path("imagenet_samples").glob("*.jpg"))[:6]
    call("explain", *photos, "--model", "mobilenetv3_small_050", "--out", tmp_path)
    assert len(index_of(tmp_path)) == len(photos)
    json.loads((tmp_path / "settings.json").read_text())
