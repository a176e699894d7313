"""The folder beside an output, and files that are there whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from salience.blocks.journal import Journal, check_output, held_bytes, is_published
from salience.errors import DoesNotFitError, SalienceError, StorageError
from salience.writer import check_file, replacing, write_json

JOB: dict[str, Any] = {"--method": "awq", "--seed": 0, "a list": [["a", "b"]], "nothing": None}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begin(out: Path, blocks: int = 2) -> None:
    """Leave a job with some blocks done, as a kill does."""
    with pytest.raises(KeyboardInterrupt), Journal(out, JOB) as journal:
        for index in range(blocks):
            tensors = {f"weight.{index}": torch.full((3,), float(index))}
            journal.save_search(index, {f"scale.{index}": torch.ones(2)})
            journal.save_block(index, tensors, {"index": index})
        raise KeyboardInterrupt


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_blocks_are_kept(out: Path) -> None:
    begin(out)
    assert not out.exists() and held_bytes(out) > 100
    with pytest.raises(KeyboardInterrupt), Journal(out, JOB) as journal:
        assert journal.done() == 2 and not journal.finished
        assert [journal.record(i) for i in range(2)] == [{"index": 0}, {"index": 1}]
        with journal.block(1) as block:
            assert block.get_tensor("weight.1").tolist() == [1, 1, 1]
        raise KeyboardInterrupt


def test_done_counts_from_the_first(out: Path) -> None:
    """Tensors without a record, and what comes after a gap, are not done."""
    begin(out, 4)
    (out.parent / "out.partial" / "block-00002.json").unlink()
    with pytest.raises(KeyboardInterrupt), Journal(out, JOB) as journal:
        assert journal.done() == 2
        raise KeyboardInterrupt


def test_publish(out: Path, tmp_path: Path) -> None:
    begin(out)
    with Journal(out, JOB) as journal:
        journal.join_searches({"about": "it"}, 2)
        journal.final.mkdir()
        write_json(journal.final / "config.json", {})
        assert not is_published(out)
        journal.publish(tmp_path / "found")
        assert is_published(out)
    assert names(tmp_path) == {"out", "config.json", "found"}
    with safe_open(tmp_path / "found", framework="pt") as file:
        assert file.metadata() == {"about": "it"}
        assert sorted(file.keys()) == ["scale.0", "scale.1"]


@pytest.mark.parametrize("renamed", [False, True])
def test_publish_after_a_kill(out: Path, tmp_path: Path, renamed: bool) -> None:
    begin(out)
    with pytest.raises(KeyboardInterrupt), Journal(out, JOB) as journal:
        journal.final.mkdir()
        write_json(journal.final / "config.json", {})
        journal._begun.rename(journal._published)
        if renamed:
            journal.final.rename(out)
        raise KeyboardInterrupt
    with pytest.raises(SalienceError, match="begun with --seed 0, now it is 1"):
        Journal(out, JOB | {"--seed": 1}).__enter__()
    with Journal(out, JOB) as journal:
        assert journal.finished
        journal.publish()
    assert names(tmp_path) == {"out", "config.json"}


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (StorageError("full"), True),
        (DoesNotFitError("too large"), True),
        (KeyboardInterrupt(), True),
        (RuntimeError("a bug"), True),
        (SalienceError("bad input"), False),
    ],
)
def test_what_an_error_leaves(out: Path, tmp_path: Path, error: BaseException, kept: bool) -> None:
    begin(out)
    with pytest.raises(type(error)), Journal(out, JOB) as journal:
        journal.final.mkdir()
        (journal.final / "shard").touch()
        raise error
    assert ("block-00001.json" in names(tmp_path)) == kept
    assert kept or names(tmp_path) == set()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--seed": 1}, "begun with --seed 0, now it is 1"),
        ({"--seed": 1, "--method": "rtn"}, "begun with --method awq, now it is rtn"),
        ({"new": 5}, "begun with new None, now it is 5"),
    ],
)
def test_another_job(out: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    begin(out)
    before = names(tmp_path)
    with pytest.raises(SalienceError, match=message):
        Journal(out, JOB | changed).__enter__()
    assert names(tmp_path) == before
    without = {key: value for key, value in JOB.items() if key != "--seed"}
    with pytest.raises(SalienceError, match="begun with --seed 0, now it is None"):
        Journal(out, without).__enter__()
    begin(out)  # the lock was given back


def test_lock(out: Path) -> None:
    begin(out)
    with pytest.raises(KeyboardInterrupt), Journal(out, JOB):
        with pytest.raises(SalienceError, match=r"another process is making .*out; wait for it"):
            Journal(out, JOB).__enter__()
        raise KeyboardInterrupt


def test_output_that_is_taken(out: Path, tmp_path: Path) -> None:
    out.mkdir()
    check_output(out)
    (out / "mine.txt").touch()
    with pytest.raises(SalienceError, match="not an empty folder"):
        check_output(out)
    # What a kill at the very end leaves is swept up, and nothing else.
    partial = tmp_path / "out.partial"
    for left in ((), ("lock",)):
        partial.mkdir()
        for name in left:
            (partial / name).touch()
        with pytest.raises(SalienceError, match="not an empty folder"):
            check_output(out)
        assert names(tmp_path) == {"out", "mine.txt"}
    partial.mkdir()
    (partial / "job.json").touch()
    with pytest.raises(SalienceError, match="not an empty folder"):
        Journal(out, JOB).__enter__()
    assert names(tmp_path) == {"out", "mine.txt", "out.partial", "job.json"}


def test_folder_of_someone_else(out: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "diary.txt").touch()
    with pytest.raises(SalienceError, match="was not made by salience; move it"):
        Journal(out, JOB).__enter__()
    assert names(tmp_path) == {"out.partial", "diary.txt"}


def test_file_of_that_name(out: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").touch()
    with pytest.raises(StorageError, match=r"cannot read .*out\.partial: Not a directory"):
        Journal(out, JOB).__enter__()


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    journal = Journal(tmp_path / "link", JOB)
    assert journal.out == tmp_path / "real"
    assert journal.folder == tmp_path / "real.partial"


def test_hidden_files(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Journal(out, JOB) as journal:
        assert journal.latest_hidden(5) is None
        for index in (0, 2, 5):
            journal.save_hidden(index, torch.full((2, 3, 4), float(index)))
        assert [journal.latest_hidden(i) for i in range(7)] == [0, 0, 2, 2, 2, 5, 5]
        assert journal.hidden_file(2).read_bytes() == torch.full((24,), 2.0).numpy().tobytes()
        journal.forget_hidden(4)
        assert [journal.hidden_file(i).exists() for i in (0, 2, 5)] == [False, True, True]
        raise KeyboardInterrupt


def test_replacing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_json(file, {"a": 1})
    with pytest.raises(StorageError, match=r"writing .*file failed"), replacing(file) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert json.loads(file.read_text()) == {"a": 1}
    assert names(tmp_path) == {"file"}


def test_check_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_file(tmp_path / "found", out)
    (tmp_path / "there").touch()
    for name, message in (
        ("there", "exists; name another"),
        ("no/found", "does not exist; make it first"),
        ("out", "is in the output"),
        ("out/a/found", "is in the output"),
    ):
        with pytest.raises(SalienceError, match=message):
            check_file(tmp_path / name, out)
