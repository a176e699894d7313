"""Pickled state dicts: what is read, and that nothing in one is ever run."""

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers_checkpoint import TENSORS, refuse
from salience.checkpoint import SafetensorsCheckpoint, open_checkpoint
from salience.errors import SalienceError
from salience.pt_checkpoint import PtCheckpoint

NAME = "model-w4-g128-awq-v2.pt"


def save(folder: Path, value: Any, name: str = NAME, **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder


def check(checkpoint: Any, path: Path) -> None:
    assert isinstance(checkpoint, PtCheckpoint)
    assert checkpoint.path == path
    assert checkpoint.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.nbytes(name) == tensor.nbytes


def test_reads_a_state_dict(tmp_path: Path) -> None:
    check(open_checkpoint(save(tmp_path, TENSORS)), tmp_path)


def test_reads_a_split_one(tmp_path: Path) -> None:
    """A file for each tensor, as tinychat's split_ckpt leaves them."""
    for name, tensor in TENSORS.items():
        save(tmp_path, tensor, f"{name}.pt")
    check(open_checkpoint(tmp_path), tmp_path)


def test_views_and_parameters(tmp_path: Path) -> None:
    """State dicts hold transposed tensors, parts of others, and parameters."""
    whole = torch.arange(12.0).view(3, 4)
    values = {"t": whole.T, "part": whole[1:, 1:], "p": nn.Parameter(whole)}
    stored = PtCheckpoint(save(tmp_path, values))
    for name, value in values.items():
        read = stored.tensor(name)
        assert torch.equal(read, value) and read.is_contiguous() and not read.requires_grad
        assert read.untyped_storage().nbytes() == stored.nbytes(name)


def test_a_tensor_is_a_copy(tmp_path: Path) -> None:
    stored = PtCheckpoint(save(tmp_path, TENSORS))
    stored.tensor("a.weight").zero_()
    assert torch.equal(stored.tensor("a.weight"), TENSORS["a.weight"])


def test_safetensors_come_first(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(TENSORS, save(tmp_path, TENSORS) / "model.safetensors")
    assert isinstance(open_checkpoint(tmp_path), SafetensorsCheckpoint)


def test_missing_tensor(tmp_path: Path) -> None:
    stored = PtCheckpoint(save(tmp_path, TENSORS))
    for read in (stored.tensor, stored.shape, stored.nbytes):
        refuse(lambda read=read: read("nothing"), "tensor nothing is missing", tmp_path / NAME)


def test_two_files(tmp_path: Path) -> None:
    save(save(tmp_path, TENSORS), TENSORS, "other-v2.pt")
    refuse(lambda: open_checkpoint(tmp_path), tmp_path, "one file that ends in -v2.pt", "other-v2")


def test_one_file_of_another_name(tmp_path: Path) -> None:
    """llm-awq's first layout, or no checkpoint of its at all."""
    save(tmp_path, TENSORS, "model-w4-g128-awq.pt")
    refuse(lambda: open_checkpoint(tmp_path), "one file that ends in -v2.pt", "w4-g128-awq.pt")


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("split", [False, True])
def test_code_is_not_run(split: bool, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    if split:
        save(save(tmp_path, Trap(trap), "a.weight.pt"), torch.zeros(1), "b.weight.pt")
    else:
        save(tmp_path, {"a.weight": TENSORS["a.weight"], "b": Trap(trap)})
    refuse(lambda: open_checkpoint(tmp_path), tmp_path, "holds more than tensors")
    assert not trap.exists()


VALUES: list[tuple[Any, str]] = [
    ([torch.zeros(2)], "holds a list, no state dict"),
    (torch.zeros(2), "holds a Tensor, no state dict"),
    ({"a": {"b": torch.zeros(2)}}, "a of .* is a dict, no tensor"),
    ({"a": 1.5}, "a of .* is a float, no tensor"),
    ({"a": torch.zeros(2, 2).to_sparse()}, "tensor a of .* torch.sparse_coo"),
    ({"a": torch.zeros(2, device="meta")}, "tensor a of .* on meta"),
    ({"a": torch.zeros(2, dtype=torch.complex64)}, "torch.complex64"),
    ({"a": torch.zeros(1).expand(10**9, 10**6)}, "tensor a of .* claims more bytes than are"),
]


@pytest.mark.parametrize(("value", "match"), VALUES, ids=[match for _, match in VALUES])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refuses_other_values(value: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(SalienceError, match=match):
        open_checkpoint(save(tmp_path, value))


def test_the_old_file_format(tmp_path: Path) -> None:
    """From before torch 1.6: no zip, and nothing to map."""
    save(tmp_path, TENSORS, _use_new_zipfile_serialization=False)
    refuse(lambda: open_checkpoint(tmp_path), tmp_path / NAME, "mmap")


def damage(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, or a piece cut out."""
    out = bytearray(data)
    if rng.random() < 0.2:
        start = rng.randrange(len(out))
        del out[start : start + rng.randrange(1, 64)]
    for _ in range(rng.randrange(1, 4)):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def test_damaged_files(tmp_path: Path) -> None:
    """Any damage is read over, in the values, or named."""
    buffer = io.BytesIO()
    torch.save({name: TENSORS[name] for name in ("a.weight", "c.qweight")}, buffer)
    data, rng = buffer.getvalue(), random.Random(0)
    pieces = [data[:end] for end in range(0, len(data), 97)]
    for piece in [*pieces, *(damage(data, rng) for _ in range(150))]:
        (tmp_path / NAME).write_bytes(piece)
        read_or_refuse(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles(tmp_path: Path) -> None:
    """The same within the pickle, where the zip's checksum would hide it."""
    buffer = io.BytesIO()
    torch.save({name: TENSORS[name] for name in ("a.weight", "c.qweight")}, buffer)
    rng = random.Random(0)
    with zipfile.ZipFile(buffer) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    inner = next(name for name in parts if name.endswith("data.pkl"))
    for _ in range(200):
        with zipfile.ZipFile(tmp_path / NAME, "w", zipfile.ZIP_STORED) as out:
            for name, part in parts.items():
                out.writestr(name, damage(part, rng) if name == inner else part)
        read_or_refuse(tmp_path)


def read_or_refuse(folder: Path) -> None:
    try:
        stored = open_checkpoint(folder)
        tensors: dict[str, Tensor] = {name: stored.tensor(name) for name in stored.names()}
    except SalienceError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1
    else:
        assert all(tensor.numel() <= 12 for tensor in tensors.values())
