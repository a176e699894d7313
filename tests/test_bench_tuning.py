"""What is fastest on a GPU, measured and kept."""

import json

import pytest
import torch

from salience.bench.tuning import tune
from salience.errors import SalienceError
from salience.kernels import choice, gpu
from salience.scheme import Scheme


def test_kept_for_the_gpu(tmp_path, monkeypatch):
    measured = []

    def measure(variants, shape, device, tokens):
        measured.append((shape, tuple(tokens)))
        timed = [choice.Timed("mma", {"tiles": 2}, 5.0), choice.Timed("triton", {}, 9.0)]
        return choice.Entry(shape, dict.fromkeys(tokens, timed))

    monkeypatch.setattr(choice, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Toy 9")
    monkeypatch.setattr(gpu.Gpu, "supports", lambda *_: True)
    said = []
    path = tune(
        [Scheme(4, 128), Scheme(3, -1)], [(256, 64)], [1, 16], torch.float16,
        torch.device("cuda"), progress=lambda *what: said.append(what), folder=tmp_path,
    )  # fmt: skip
    assert path == tmp_path / "nvidia-toy-9.json"
    assert [one["group_size"] for one in json.loads(path.read_text())["entries"]] == [128, 256]
    assert [tokens for _, tokens in measured] == [(1, 16)] * 2
    assert said[-1][1:] == (1, 2)


def test_only_on_a_gpu(tmp_path):
    with pytest.raises(SalienceError, match="on a GPU, not on cpu"):
        tune([Scheme()], [(256, 64)], [1], torch.float16, torch.device("cpu"), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_not_what_another_backend_has(tmp_path):
    with pytest.raises(SalienceError, match="kernel gpu takes no w5g64"):
        tune([Scheme(5, 64)], [(256, 64)], [1], torch.float16, torch.device("cuda"))
