"""Data sets are explained part by part: each image once, whoever does it, whatever ends."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.helpers.models import CLASSES, cnn
from torch import Tensor

import attnguide as ag
from attnguide import dataset, models
from attnguide.data import files
from attnguide.dataset import place_in_world
from attnguide.errors import DataError, InputError
from attnguide.models import LoadedModel

ROWS = 7


class Drawn:
    """A data set of Python that makes its images."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise OSError(f"no image {index}")
        return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)), 0


@pytest.fixture
def model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cnn().eval()


def explained(data: Any, out: Path | str, model: Any, **settings: Any) -> ag.DatasetReport:
    settings = {"rows": ROWS, "batch_size": 4, "workers": 0, "progress": False, **settings}
    return ag.explain_dataset(data, out, model=model, **settings)


def keys(out: Path | str) -> list[str]:
    return [row.key for row in ag.read_maps(out)]


def visible(out: Path) -> list[str]:
    return sorted(file.name for file in out.iterdir())


# ---------------------------------------------------------------- the maps are right


def test_maps_are_those_of_explain_to_half_precision(tmp_path: Path, model: torch.nn.Module) -> None:
    data = Drawn(17)
    report = explained(data, tmp_path, model)
    assert (report.parts, report.images, report.failed, report.missing) == (3, 17, 0, 0)
    rows = list(report.maps())
    assert [row.key for row in rows] == [str(index) for index in range(17)]
    for index, row in enumerate(rows):
        found = ag.explain(model, data[index][0][None], size=None)
        cls, expected = int(found.classes[0, 0]), found.maps[0, 0].numpy()
        np.testing.assert_allclose(row.map, expected, rtol=2**-10, atol=np.abs(expected).max() * 2**-20)
        assert (row.index, row.cls, row.layer) == (cls, str(cls), found.layer)
        assert row.logit == pytest.approx(float(found.scores[0, 0]), rel=1e-4)
        assert row.score == pytest.approx(float(found.logits.softmax(1)[0, cls]), rel=1e-4)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_tiny_and_huge_maps_keep_their_precision(tmp_path: Path, factor: float) -> None:
    data, model = Drawn(2), cnn().eval()
    expected = ag.explain(model, data[0][0][None], size=None, targets=[(0, 1)])
    # The gradient, and so the map, grows with the weights of the head.
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    head.weight.data *= factor
    explained(data, tmp_path, model, targets="1")
    row = next(iter(ag.read_maps(tmp_path)))
    values = expected.maps[0, 0].numpy() * factor
    np.testing.assert_allclose(row.map, values, rtol=2**-9, atol=np.abs(values).max() * 2**-15)


def test_several_classes_and_what_cannot_be_explained(tmp_path: Path, model: torch.nn.Module) -> None:
    class Odd(Drawn):
        def __getitem__(self, index: int) -> Any:
            image = super().__getitem__(index)[0]
            odd = {2: image * torch.nan, 3: image[:, :16], 4: "nowhere.png", 5: 7.5, 6: (image * 255).byte()}
            return {"image": odd.get(index, image)}

    report = explained(Odd(10, broken=(1,)), tmp_path, model, targets="top:2")
    rows = list(report.maps())
    counts = Counter(row.key for row in rows)
    assert counts == {str(index): 1 if 1 <= index <= 6 else 2 for index in range(10)}
    reasons = {row.key: str(row.error) for row in rows if row.error}
    assert [*reasons] == ["1", "2", "3", "4", "5", "6"]
    for key, reason in zip("123456", ("no image 1", "NaN", "shape", "exist", "float", "uint8"), strict=True):
        assert reason in reasons[key]
    assert report.failed == 6
    assert len(ag.read_maps(tmp_path, "error is null").to_arrow()) == 8
    first = [row for row in rows if row.key == "0"]
    assert first[0].logit >= first[1].logit  # type: ignore[operator]


def test_any_reader_of_parquet_takes_the_files(tmp_path: Path, model: torch.nn.Module) -> None:
    rows = list(explained(Drawn(5), tmp_path, model).maps())
    part = pq.ParquetFile(tmp_path / "part-000000.parquet")
    table = part.read().to_pydict()
    for number, row in enumerate(rows):
        flat = np.array(table["map"][number], np.float32) * np.float32(table["scale"][number])
        np.testing.assert_array_equal(flat.reshape(table["h"][number], table["w"][number]), row.map)
    # Several readers know this encoding for float and double alone.
    columns = [part.metadata.row_group(0).column(number) for number in range(part.metadata.num_columns)]
    split = {each.path_in_schema for each in columns if "BYTE_STREAM_SPLIT" in each.encodings}
    assert split == {"score", "logit"}


# ---------------------------------------------------------------- many processes


def test_each_image_once_with_any_number_of_processes(tmp_path: Path, model: torch.nn.Module) -> None:
    data = Drawn(40)
    explained(data, tmp_path / "three", model, rank=0, world_size=3)
    # The first process has measured the layer; the others take it from the settings.
    for rank in (2, 1):
        report = explained(data, tmp_path / "three", model, rank=rank, world_size=3)
        assert report.parts == 2
    assert report.missing == 0
    explained(data, tmp_path / "one", model)
    tables = [ag.read_maps(tmp_path / name).to_arrow() for name in ("three", "one")]
    assert tables[0].equals(tables[1])
    assert tables[0].column("key").to_pylist() == [str(index) for index in range(40)]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, model: torch.nn.Module) -> None:
    data = Drawn(40)
    assert explained(data, tmp_path, model, rank=0, world_size=4).missing == 4
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in visible(tmp_path)}
    reports = [explained(data, tmp_path, model, rank=rank, world_size=2) for rank in (0, 1)]
    assert (sum(report.parts for report in reports), reports[1].missing) == (4, 0)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    assert keys(tmp_path) == [str(index) for index in range(40)]


def test_the_place_in_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_in_world() == (0, 1)
    assert place_in_world(1, 2) == (1, 2)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match="RANK=3 and WORLD_SIZE=None"):
        place_in_world()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place_in_world() == (3, 4)
    for rank, size in ((2, 2), (-1, 2), (0, None), (None, 3)):
        with pytest.raises(InputError, match="must fit"):
            place_in_world(rank, size)


def killed(target: Callable[[], None]) -> None:
    """Run a function in a process of its own, which must kill itself."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("point", ["settings", "flush 1", "flush 3", "replaced 1", "write 2"])
def test_whatever_a_kill_interrupts_is_made_up_for(
    tmp_path: Path, model: torch.nn.Module, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _, number = point.partition(" ")
    count = iter(range(100))

    def die() -> None:
        if next(count) == int(number or 0):
            os.kill(os.getpid(), signal.SIGKILL)

    def victim() -> None:
        if where == "settings":
            monkeypatch.setattr(os, "link", lambda *_: die())
        elif where == "flush":
            monkeypatch.setattr(files, "_flush_to_disk", lambda _: die())
        elif where == "write":
            write = pq.ParquetWriter.write_table

            def written(self: Any, *given: Any) -> None:
                die()
                write(self, *given)

            monkeypatch.setattr(pq.ParquetWriter, "write_table", written)
        else:
            replace = Path.replace

            def replaced(self: Path, target: Any) -> Path:
                found = replace(self, target)
                die()
                return found

            monkeypatch.setattr(Path, "replace", replaced)
        explained(Drawn(40), tmp_path, model)

    killed(victim)
    # Another number of processes goes on.
    for rank in (0, 1):
        explained(Drawn(40), tmp_path, model, rank=rank, world_size=2)
    assert visible(tmp_path) == [*(f"part-{part:06}.parquet" for part in range(6)), "settings.json"]
    assert keys(tmp_path) == [str(index) for index in range(40)]


def test_a_full_disk_leaves_no_part(
    tmp_path: Path, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "_flush_to_disk", full)
        with pytest.raises(InputError, match=r"No space left on device\. Make room"):
            explained(Drawn(10), tmp_path, model)
    assert visible(tmp_path) == ["settings.json"]
    explained(Drawn(10), tmp_path, model)
    assert keys(tmp_path) == [str(index) for index in range(10)]


def test_a_disk_that_fills_while_a_part_is_written(tmp_path: Path, model: torch.nn.Module) -> None:
    # A limit for files is to a process what a full disk is: writing fails in the middle.
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            explained(Drawn(300), tmp_path, model, rows=200)
        except InputError as error:
            os._exit(3 if "Make room" in str(error) else 4)
        os._exit(5)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(60)
    assert process.exitcode == 3
    assert visible(tmp_path) == ["settings.json"]
    explained(Drawn(300), tmp_path, model, rows=200)
    assert keys(tmp_path) == [str(index) for index in range(300)]


def test_a_damaged_part_is_made_again(tmp_path: Path, model: torch.nn.Module) -> None:
    explained(Drawn(20), tmp_path, model)
    part = tmp_path / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"part-000001\.parquet is damaged"):
        keys(tmp_path)
    with pytest.warns(UserWarning, match="1 parts are damaged"):
        assert explained(Drawn(20), tmp_path, model).parts == 1
    assert keys(tmp_path) == [str(index) for index in range(20)]


def test_readers_that_are_processes(tmp_path: Path, model: torch.nn.Module) -> None:
    explained(Drawn(20, broken=(3,)), tmp_path / "a", model, workers=2)
    explained(Drawn(20, broken=(3,)), tmp_path / "b", model)
    tables = [ag.read_maps(tmp_path / name).to_arrow() for name in "ab"]
    assert tables[0].equals(tables[1])


class Deadly(Drawn):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_reader_that_is_killed_is_one_clear_error(tmp_path: Path, model: torch.nn.Module) -> None:
    with pytest.raises(ag.AttnGuideError, match="a process that reads images ended"):
        explained(Deadly(20), tmp_path, model, workers=1)
    assert "part-000001.parquet" not in visible(tmp_path)


def test_a_reader_says_nothing_when_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(kind))
    dataset._silent_when_left(0)
    for error in (EOFError(), BrokenPipeError(), ConnectionResetError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert shown == [ValueError]


# ---------------------------------------------------------------- settings


def test_other_settings_are_refused_by_name(tmp_path: Path, model: torch.nn.Module) -> None:
    explained(Drawn(10), tmp_path, model)
    other = cnn().eval()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    for change, named in (
        ({"rows": 8}, "data.rows was 7 and is 8"),
        ({"targets": "all"}, "targets was 'predicted' and is 'all'"),
        ({"source": "layer_cam"}, "source was 'grad_cam' and is 'layer_cam'"),
        ({"model": other}, "weights was"),
    ):
        with pytest.raises(InputError, match=named):
            explained(Drawn(10), tmp_path, **{"model": model, **change})
    with pytest.raises(InputError, match=r"data\.images was 10 and is 11"):
        explained(Drawn(11), tmp_path, model)
    # A part from elsewhere.
    explained(Drawn(10), tmp_path / "other", other)
    (tmp_path / "other/part-000001.parquet").replace(tmp_path / "part-000001.parquet")
    with pytest.raises(InputError, match=r"part-000001\.parquet was made with other settings: weights"):
        explained(Drawn(10), tmp_path, model)
    with pytest.raises(DataError, match=r"part-000001\.parquet was made with other settings"):
        keys(tmp_path)


def test_the_layer_is_measured_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cnn().eval()
    explained(Drawn(10), tmp_path, model, rank=0, world_size=2)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["layers"][0]["layout"]["kind"] == "nchw"

    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("attnguide.layers.finding.list_candidates", measured)
    ag.layers.forget()
    explained(Drawn(10), tmp_path, model, rank=1, world_size=2)
    assert len(keys(tmp_path)) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": []}, "data is empty"),
        ({"data": 3}, "must be a path"),
        ({"data": "nowhere"}, "does not exist"),
        ({"rows": 0}, "rows=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"workers": -1}, "workers=-1"),
        ({"model": 3}, "model=3"),
        ({"engine": "spark"}, "engine='spark'"),
        ({"evidence": "none"}, "evidence='none'"),
        ({"source": "nothing"}, "unknown source"),
        ({"targets": "top:0"}, "selects no class"),
        ({"out": ""}, "output is empty"),
        ({"data": Drawn(3, broken=(0, 1, 2))}, "none of the first 3 images can be read"),
        ({"out": "no-such-store://x"}, "cannot be reached"),
    ],
)
def test_what_cannot_be_done(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    given = {"data": Drawn(3), "out": tmp_path / "out", "model": cnn().eval(), **settings}
    with pytest.raises(ag.AttnGuideError, match=message):
        explained(**given)


# ---------------------------------------------------------------- kinds of data


def photo(index: int) -> bytes:
    values = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return models.load()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for index in range(9):
        (folder / ("sub" if index % 2 else "") / f"{index}.png").write_bytes(photo(index))
    return folder


def in_tar(path: Path, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            for name, content in ((f"{index:03}.png", photo(index)), (f"{index:03}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_all_kinds_of_data_give_the_same_maps(tmp_path: Path, photos: Path, loaded: LoadedModel) -> None:
    order = [photos / ("sub" if index % 2 else "") / f"{index}.png" for index in range(9)]
    (tmp_path / "list.csv").write_text("label,path\n" + "".join(f"a,{each}\n" for each in order))
    contents = [each.read_bytes() for each in order]
    pq.write_table(
        pa.table({"key": [str(each) for each in order], "bytes": contents}), tmp_path / "t.parquet", 4
    )
    pq.write_table(
        pa.table({"image": [{"bytes": each, "path": "x"} for each in contents]}), tmp_path / "h.parquet"
    )
    in_tar(tmp_path / "train-000.tar", 5)
    in_tar(tmp_path / "train-001.tar", 4)
    (tmp_path / "train-001.tar").unlink()
    in_tar(tmp_path / "all-000.tar", 9)
    kinds: dict[str, Any] = {
        "files": list(map(str, order)),
        "csv": tmp_path / "list.csv",
        "parquet": tmp_path / "t.parquet",
        "hugging face": str(tmp_path / "h.parquet"),
        "tar": str(tmp_path / "all-{000..000}.tar"),
        "pictures": [Image.open(each) for each in order],
    }
    tables = {}
    for name, data in kinds.items():
        explained(data, tmp_path / "out" / name, loaded)
        tables[name] = ag.read_maps(tmp_path / "out" / name).to_arrow()
    expected = tables["files"]
    # A tar file is one part, so that its batches are others.
    for one, other in zip(
        ag.read_maps(tmp_path / "out/tar"), ag.read_maps(tmp_path / "out/files"), strict=True
    ):
        assert one.index == other.index
        np.testing.assert_allclose(one.map, other.map, rtol=2**-9, atol=1e-5)
    del tables["tar"]
    for name, table in tables.items():
        assert table.drop_columns("key").equals(expected.drop_columns("key")), name
    for name in ("csv", "parquet"):
        assert tables[name].equals(expected), name
    explained(photos, tmp_path / "folder", loaded)
    assert Counter(keys(tmp_path / "folder")) == Counter(expected.column("key").to_pylist())
    # One part for each tar file.
    in_tar(tmp_path / "train-001.tar", 4)
    report = explained(str(tmp_path / "train-*.tar"), tmp_path / "tars", loaded)
    assert (report.parts, report.images) == (2, 9)


def test_a_store_behind_an_address(photos: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(f"{photos}/", "/scale/photos/", recursive=True)
    explained("memory://scale/photos", "memory://scale/maps", loaded)
    assert sorted(Path(each).name for each in store.ls("/scale/maps", detail=False)) == [
        "part-000000.parquet",
        "part-000001.parquet",
        "settings.json",
    ]
    explained(photos, tmp_path / "maps", loaded)
    names = [Path(key).name for key in keys("memory://scale/maps")]
    assert sorted(names) == sorted(Path(key).name for key in keys(tmp_path / "maps"))

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("connection lost")

    # An upload that ends before it is moved, and one that ends in the middle.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(store), "mv", broken)
        with pytest.raises(InputError, match="connection lost"):
            explained("memory://scale/photos", "memory://scale/other", loaded)
    assert store.ls("/scale/other", detail=False) == []

    def half(self: Any, local: str, remote: str, **_: Any) -> None:
        content = Path(local).read_bytes()
        self.pipe_file(remote, content[: len(content) // 2])
        if "part-000001" in remote:
            broken()
        self.pipe_file(remote, content)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(store), "put_file", half)
        with pytest.raises(InputError, match=r"part-000001\.parquet: connection lost\. Make room"):
            explained("memory://scale/photos", "memory://scale/other", loaded)
    names = [Path(each).name for each in store.ls("/scale/other", detail=False)]
    assert sorted(names) == ["part-000000.parquet", "settings.json"]
    # What a process left that was killed while it uploaded.
    store.pipe_file("/scale/other/.attnguide-part-000001.parquet-0123456789abcdef", b"PAR1")
    assert explained("memory://scale/photos", "memory://scale/other", loaded).parts == 1
    names = [Path(each).name for each in store.ls("/scale/other", detail=False)]
    assert sorted(names) == ["part-000000.parquet", "part-000001.parquet", "settings.json"]
    assert keys("memory://scale/other") == keys("memory://scale/maps")
    store.rm("/scale", recursive=True)


def test_damaged_files_of_many_images(tmp_path: Path, loaded: LoadedModel) -> None:
    in_tar(tmp_path / "a.tar", 3)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        explained(tmp_path / "a.tar", tmp_path / "out", loaded)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        explained(tmp_path / "b.parquet", tmp_path / "out2", loaded)
    (tmp_path / "c.csv").write_text("label\na\n")
    with pytest.raises(DataError, match="has the columns label"):
        explained(tmp_path / "c.csv", tmp_path / "out3", loaded)
    with pytest.raises(InputError, match="data mixes"):
        explained([tmp_path / "a.tar", tmp_path / "c.csv"], tmp_path / "out4", loaded)


def test_a_name_that_is_not_unicode(tmp_path: Path, loaded: LoadedModel, photos: Path) -> None:
    try:
        (photos / "0.png").rename(photos / "\udcff.png")
    except OSError:
        pytest.skip("this file system takes no such name")
    (photos / "\udcfe.png").write_bytes(b"no image")
    report = explained(photos, tmp_path / "out", loaded, targets="top:1")
    assert (report.images, report.failed) == (10, 2)
    reasons = {row.key: row.error for row in report.maps() if row.error}
    assert sorted(Path(key).name for key in reasons) == ["\\udcfe.png", "\\udcff.png"]
    assert "no name that is not Unicode" in str(reasons[str(photos / "\\udcff.png")])


def test_classes_have_their_names(tmp_path: Path, loaded: LoadedModel, photos: Path) -> None:
    explained(photos, tmp_path / "out", loaded, targets=loaded.classes[1])
    rows = list(ag.read_maps(tmp_path / "out", f"class = '{loaded.classes[1]}'"))
    assert len(rows) == 9
    assert CLASSES  # the plain model of the other tests has numbers alone
