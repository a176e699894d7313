"""Writing to disk: shards, files that are there whole or not at all, and what a full disk says."""

import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers_checkpoint import TENSORS, refuse
from salience.checkpoint import INDEX_NAME, SafetensorsCheckpoint, read_json
from salience.errors import SalienceError, StorageError
from salience.writer import (
    ShardWriter,
    check_disk,
    check_file,
    check_free,
    disk_errors,
    replacing,
    write_json,
    write_tensors,
)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder, as the journal makes one."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_writes_one_file(out: Path) -> None:
    writer = ShardWriter(out)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.write_json("config.json", {"model_type": "é"})
    assert not (out / "model.safetensors").exists()
    writer.finish()
    assert entries(out) == ["config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == {"model_type": "é"}
    written = load_file(out / "model.safetensors")
    assert set(written) == set(TENSORS)
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())
    assert all(written[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with (out / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}


def test_the_same_bytes_as_the_library(tmp_path: Path) -> None:
    """Whose order of dtypes of one width is its own: I64, F64 and BF16, F16 and I8, U8."""
    dtypes = [
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ]
    tensors = {f"{key}{i}": torch.ones(3).to(d) for i, d in enumerate(dtypes) for key in "ba"}
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_writes_shards(out: Path) -> None:
    tensors = {f"t{i}": torch.full((16,), float(i)) for i in range(5)}
    writer = ShardWriter(out, shard_bytes=128)  # two tensors each
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    # No more is held than a shard: two of the three are on the disk, under other names.
    assert len(entries(out)) == 2 and not list(out.glob("*.safetensors"))
    writer.finish()
    files = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert entries(out) == [*files, INDEX_NAME]
    index = read_json(out / INDEX_NAME)
    assert index["metadata"] == {"total_size": 5 * 64}
    assert index["weight_map"] == dict(
        zip(tensors, [files[0], files[0], files[1], files[1], files[2]], strict=True)
    )
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], tensors[name])
    assert SafetensorsCheckpoint(out).names() == set(tensors)


def test_writes_tensors_of_any_layout(out: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    writer = ShardWriter(out)
    writer.add("t", base.T)
    writer.finish()
    assert torch.equal(load_file(out / "model.safetensors")["t"], base.detach().T)
    write_tensors(out / "one", {"t": base.T}, {"of": "test"})
    assert torch.equal(load_file(out / "one")["t"], base.detach().T)


def test_all_is_put_on_the_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the folder, and the folder itself, last: it holds their names."""
    synced: list[Path] = []
    monkeypatch.setattr("salience.writer.sync", synced.append)
    writer = ShardWriter(out, shard_bytes=1)
    writer.add("a", torch.zeros(4))
    writer.add("b", torch.zeros(4))
    (out / "sub").mkdir()
    (out / "sub" / "tokenizer.json").touch()
    writer.finish()
    after = [path for path in synced if not path.name.startswith(".")]
    assert after[-1] == out
    assert set(after) == {path for path in out.rglob("*") if path.is_file()} | {out}
    write_json(out / "x.json", {})
    assert synced[-2:] == [out / ".x.json.tmp", out]


KINDS = [ValueError, SalienceError, KeyboardInterrupt, SystemExit]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_there_whole_or_not_at_all(
    tmp_path: Path, kind: type[BaseException], before: str | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
    with pytest.raises(kind), replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent  # a rename does not cross disks
        assert path.exists() == (before is not None)
        raise kind("stop")
    assert entries(tmp_path) == ([] if before is None else ["file"])
    assert before is None or path.read_text() == before
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() or path.read_text() == before
    assert entries(tmp_path) == ["file"] and path.read_text() == "whole"


def test_writes_json_and_tensors_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": "é"})
    assert read_json(tmp_path / "a.json") == {"x": "é"}
    write_tensors(tmp_path / "b.safetensors", TENSORS, {"format": "pt"})
    written = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())
    assert entries(tmp_path) == ["a.json", "b.safetensors"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    refuse(lambda: write_json(tmp_path / "no" / "a.json", {}), "a.json failed", kind=StorageError)
    file = tmp_path / "file"
    file.touch()
    tensors = {"t": torch.zeros(2)}
    refuse(lambda: write_tensors(file / "x", tensors, {}), f"writing {file / 'x'} failed")
    refuse(lambda: ShardWriter(file).write_json("x", 1), "failed", kind=StorageError)
    assert entries(tmp_path) == ["file"]


def test_output_that_is_taken(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "x").touch()
    file.touch()
    for out in (folder, file):
        refuse(lambda out=out: check_free(out), out, "exists and is not an empty folder")
    assert entries(tmp_path) == ["file", "folder"]
    check_free(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")


def test_output_with_a_name_no_disk_takes(tmp_path: Path) -> None:
    refuse(lambda: check_free(tmp_path / ("x" * 300)), "File name too long")
    assert entries(tmp_path) == []


def test_output_that_is_a_mounted_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed to: better said before the work than after it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    refuse(lambda: check_free(tmp_path), "a disk is mounted at", tmp_path)


def test_files_to_write(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    out = tmp_path / "out"
    refuse(lambda: check_file(there, out), f"{there} exists; name another file")
    refuse(lambda: check_file(tmp_path / "no" / "x", out), "the folder of", tmp_path / "no" / "x")
    refuse(lambda: check_file(there / "x", out), "the folder of", there / "x")
    refuse(lambda: check_file(out / "x", out), "is in the output", out / "x")
    check_file(tmp_path / "new", out)
    assert entries(tmp_path) == ["there"]


def test_a_file_to_write_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_file(Path("new"), Path("out"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    out = tmp_path / "out"
    old = os.umask(umask)
    try:
        out.mkdir()
        writer = ShardWriter(out, shard_bytes=1)
        writer.add("a", torch.zeros(4))
        writer.add("b", torch.zeros(4))
        writer.write_json("config.json", {})
        writer.finish()
    finally:
        os.umask(old)
    assert len(entries(out)) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {mode}


FULL_DISK = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from salience.errors import StorageError
from salience.writer import ShardWriter, write_tensors

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
said = {}
for step in ("shard", "finish", "json", "tensors"):
    out = Path(sys.argv[1]) / step
    out.mkdir()
    try:
        if step == "tensors":
            write_tensors(out / "x", {"large": torch.zeros(10_000)}, {})
        writer = ShardWriter(out, shard_bytes=10_000 if step == "shard" else 2**20)
        writer.add("small", torch.zeros(2500))  # 10 kB: fits
        if step != "json":
            writer.add("large", torch.zeros(10_000))
        else:
            writer.write_json("config.json", {"x": "y" * 40_000})
        writer.finish()
    except StorageError as error:
        said[step] = str(error)
print(json.dumps(said))
"""


def test_full_disk(tmp_path: Path) -> None:
    """The limit on a file's size fails a write in the middle, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert done.stderr == "" and len(said) == 4
    for step, message in said.items():
        out = tmp_path / step
        assert message.startswith(f"writing {out}") and " failed: " in message
        assert "\n" not in message
        # Nothing has the name of a whole file.
        assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
        assert not (out / "x").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("no room")], ids=str
)
def test_disk_errors(error: Exception) -> None:
    def fail() -> None:
        with disk_errors(Path("out")):
            raise error

    refuse(fail, f"writing out failed: {error}", kind=StorageError)
    with pytest.raises(ValueError, match="not the disk's"), disk_errors(Path("out")):
        raise ValueError("not the disk's")


def test_check_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salience.writer.free_disk_bytes", lambda _path: 3 * 2**20)
    check_disk(tmp_path, 3 * 2**20)
    refuse(
        lambda: check_disk(tmp_path, 5 * 2**20),
        *(tmp_path, "has 3 MiB free and the work needs 5 MiB"),
        kind=StorageError,
    )
