"""Device maps: parts of a model on the disk or the CPU, the same logits as all in one place."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import salience
from salience.chat.session import Session
from salience.errors import DoesNotFitError, SalienceError, StorageError
from salience.linear import QuantLinear
from salience.placement import OffloadFolder, Placement, input_device, main_device
from salience.runtime import Engine, Sampling
from salience.source import open_source
from tiny_models import error, llama_config, logits, make_model, random_tokens, save
from workshop import Workshop

MIB = 2**20
CPU = torch.device("cpu")
# Each: a map, and the modules that lie on the disk by it.
MAPS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cpu": ("cpu", ()),
    "all on cpu": ({"": "cpu"}, ()),
    "disk": ("disk", ("model", "lm_head")),
    "all on disk": ({"": CPU, "model": "disk", "lm_head": "disk"}, ("model", "lm_head")),
    "some blocks": (
        {"": "cpu", "model.layers.0": "disk", "model.layers.2.mlp": "disk"},
        ("model.layers.0", "model.layers.2.mlp"),
    ),
    "ends": ({"model.layers": "cpu", "": "disk"}, ("lm_head", "model.embed_tokens", "model.norm")),
}


def quantized(folder: Path, out: Path, scheme: str, format: str, *rules: str) -> Path:
    """Rounded to nearest: what is in the codes does not matter here."""
    method = "nf4" if scheme.startswith("nf4") else "rtn"
    wanted = [(pattern, other) for pattern, other in (rule.split("=") for rule in rules)]
    salience.quantize(str(folder), out, method=method, scheme=scheme, format=format, rules=wanted)
    return out


@pytest.fixture(scope="module")
def awq(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(llama, tmp_path_factory.mktemp("awq") / "out", "w4g32", "awq")


def on_disk(model: Any) -> set[str]:
    """Tensors that are not in memory between two forwards."""
    return {name for name, tensor in model.state_dict().items() if tensor.is_meta}


@pytest.mark.parametrize("name", MAPS)
def test_maps(awq: Path, name: str, tmp_path: Path) -> None:
    device_map, disk = MAPS[name]
    plain = salience.load(awq, device="cpu")
    model = salience.load(awq, device="cpu", device_map=device_map, offload_folder=tmp_path)
    want = {k for k in plain.state_dict() if any(k.startswith(f"{each}.") for each in disk)}
    assert on_disk(model) == want
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), logits(plain)), "the second time"
    assert on_disk(model) == want
    assert input_device(model) == CPU == input_device(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert hasattr(model, "hf_device_map") == bool(disk)


@pytest.mark.parametrize(
    ("scheme", "format", "kernel"),
    [
        ("w4g32", "awq", "reference"),
        ("w3g32", "compressed-tensors", "auto"),
        ("nf4-dq", "bitsandbytes", "auto"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formats_from_disk(
    llama: Path, tmp_path: Path, scheme: str, format: str, kernel: str, dtype: torch.dtype
) -> None:
    out = quantized(llama, tmp_path / "out", scheme, format)
    plain = salience.load(out, kernel=kernel, dtype=dtype)
    model = salience.load(
        out, kernel=kernel, dtype=dtype, device_map="disk", offload_folder=tmp_path / "disk"
    )
    assert torch.equal(logits(model), logits(plain)) and logits(model).dtype == dtype
    assert on_disk(model) == set(plain.state_dict())


@pytest.mark.parametrize(
    ("scheme", "format", "rules"),
    [
        ("w4g32", "awq", ()),
        ("w3g32", "compressed-tensors", ("embed_tokens=w8g32", "lm_head=w8g32")),
        ("nf4-dq", "bitsandbytes", ()),
    ],
)
def test_over_devices(
    llama: Path, tmp_path: Path, device: torch.device, scheme: str, format: str, rules: tuple[str]
) -> None:
    """Some on the GPU, some beside it: all runs there, packed for it, and says the same."""
    out = quantized(llama, tmp_path / "out", scheme, format, *rules)
    plain = salience.load(out, device, dtype=torch.float32)
    first = f"{device.type}:0" if device.type == "cuda" else "cpu"
    own = {"": first, "model.layers.1": "cpu", "model.layers.2": "disk"}
    total = memory(plain)
    share: dict[str | int, int] = {"cpu": total // 3}
    if device.type == "cuda":
        share[0] = total // 2
    for options in ({"device_map": own}, {"device_map": "auto", "max_memory": share}):
        model = salience.load(
            out, device, dtype=torch.float32, offload_folder=tmp_path / "disk", **options
        )
        assert on_disk(model) and input_device(model).type == device.type
        assert kernels_of(model) == kernels_of(plain)
        for _ in range(2):
            assert error(logits(model), logits(plain)) <= (device.type == "cuda") * 1e-6
        if device.type == "cuda":
            assert memory(model) < total
    assert model.generate(random_tokens(1, 8).to(device), max_new_tokens=2).shape[1] in (9, 10)


def kernels_of(model: Any) -> dict[str, str]:
    return {name: m.kernel for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("kind", ["auto", "balanced", "sequential"])
def test_automatic_maps_take_what_is_free(awq: Path, kind: str, device: torch.device) -> None:
    model = salience.load(awq, device, device_map=kind)
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", ["tied", "biases", "stacked experts"])
def test_float_models_from_disk(kind: str, tmp_path: Path) -> None:
    """Tied parameters, buffers in a module of their own, and parameters of three dimensions."""
    from tiny_architectures import architecture

    name = {"tied": "qwen2", "biases": "gpt2", "stacked experts": "deepseek_v3"}[kind]
    folder = save(make_model(architecture(name)), tmp_path / "in")
    plain = salience.load(folder)
    for device_map in ("disk", {"": "cpu", "lm_head": "disk"}):
        model = salience.load(folder, device_map=device_map, offload_folder=tmp_path / "disk")
        assert torch.equal(logits(model), logits(plain))


def test_coded_embeddings_and_head_from_disk(llama: Path, tmp_path: Path) -> None:
    rules = ("embed_tokens=w8g32", "lm_head=w8g32")
    out = quantized(llama, tmp_path / "out", "w4g32", "compressed-tensors", *rules)
    plain = salience.load(out)
    model = salience.load(out, device_map="disk", offload_folder=tmp_path / "disk")
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(logits(model), logits(plain))


def test_generates_and_replies_from_disk(awq: Path, tmp_path: Path) -> None:
    tokenizer = open_source(str(awq)).tokenizer
    texts = [
        Session(Engine(salience.load(awq, **options), tokenizer), Sampling(max_new_tokens=6))
        .ask("Python")
        .text
        for options in ({}, {"device_map": "disk", "offload_folder": tmp_path})
    ]
    assert texts[0] == texts[1]


def test_files_live_as_long_as_the_model(awq: Path, tmp_path: Path) -> None:
    model = salience.load(awq, device_map="disk", offload_folder=tmp_path)
    other = salience.load(awq, device_map="disk", offload_folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    stored = sum(file.stat().st_size for file in next(tmp_path.iterdir()).iterdir())
    assert stored == sum(tensor.nbytes for tensor in salience.load(awq).state_dict().values())
    del other
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.isfinite(logits(model)).all()
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_nothing_stays_of_a_load_that_failed(awq: Path, tmp_path: Path) -> None:
    tensors = load_file(awq / "model.safetensors")
    del tensors["model.norm.weight"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((awq / "config.json").read_bytes())
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(SalienceError, match=r"model\.norm\.weight is missing"):
        salience.load(broken, device_map="disk", offload_folder=tmp_path / "disk")
    assert not list((tmp_path / "disk").iterdir())


def memory(model: Any) -> int:
    return sum(t.nbytes for t in model.state_dict().values() if not t.is_meta)


@pytest.mark.parametrize("kind", ["auto", "balanced", "sequential"])
def test_automatic_maps_stay_under_the_limit(awq: Path, kind: str, tmp_path: Path) -> None:
    plain = salience.load(awq)
    total = memory(plain)
    for share in (0.3, 0.6, 2.0):
        limit = int(share * total)
        model = salience.load(
            awq,
            device="cpu",
            device_map=kind,
            max_memory={"cpu": limit},
            offload_folder=tmp_path,
        )
        assert memory(model) <= limit
        # A block is one piece; what is left free is less than the largest.
        assert (memory(model) == total) == (share > 1)
        assert torch.equal(logits(model), logits(plain))
        in_memory = plain.state_dict().keys() - on_disk(model)
        blocks = [
            {name.split(".")[2] for name in names if ".layers." in name}
            for names in (on_disk(model), in_memory)
        ]
        assert not blocks[0] & blocks[1]


def test_one_size_is_for_the_device_and_asks_for_an_automatic_map(
    awq: Path, tmp_path: Path
) -> None:
    total = memory(salience.load(awq))
    model = salience.load(awq, device="cpu", max_memory=total * 4 // 5, offload_folder=tmp_path)
    assert 0 < memory(model) <= total * 4 // 5
    assert memory(salience.load(awq, device="cpu", max_memory="1GiB")) == total


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"device_map": "disk"}, "offload_folder=FOLDER"),
    "unknown kind": ({"device_map": "fastest"}, "'fastest' is not understood; use auto, balanced"),
    "unknown device": ({"device_map": {"": "tpu"}}, "'tpu' is not understood"),
    "empty": ({"device_map": {}}, "device_map is empty"),
    "unknown module": (
        {"device_map": {"": "cpu", "model.layer.0": "cpu"}},
        "'model.layer.0', which is no module of the model",
    ),
    "not all": (
        {"device_map": {"model": "cpu"}},
        "gives lm_head.weight no device; add one for it",
    ),
    "size": ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "'much' is not understood"),
    "no such gpu": ({"device_map": "auto", "max_memory": {99: "1GiB"}}, "GPU 99, which is not"),
    "limit of a dict": (
        {"device_map": {"": "cpu"}, "max_memory": "1GiB"},
        "max_memory is for a device map of auto",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_maps(llama: Path, name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(SalienceError, match=message.replace(".", r"\.")):
        salience.load(llama, device="cpu", **options)


def test_too_little_memory_and_no_folder_does_not_fit(awq: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"offload_folder=FOLDER .*, or allow more"):
        salience.load(awq, device="cpu", max_memory={"cpu": 1000})


def test_folder_that_cannot_be_made(awq: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        salience.load(awq, device_map="disk", offload_folder=tmp_path / "file")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.arange(6, dtype=torch.uint8).view(2, 3),
        torch.randn(3, 4).bfloat16().T,
        torch.randn(2, 2, 2).half(),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
    ],
    ids=lambda t: str(t.dtype),
)
def test_offloaded_tensors_come_back(tensor: torch.Tensor, tmp_path: Path) -> None:
    folder = OffloadFolder(tmp_path / "new")
    meta = folder.write("a.b", tensor)
    assert (meta.is_meta, meta.shape, meta.dtype) == (True, tensor.shape, tensor.dtype)
    back = folder["a.b"]
    assert torch.equal(back, tensor) and back.dtype == tensor.dtype
    assert list(folder) == ["a.b"] and len(folder) == 1


def test_what_lies_off_the_gpu_runs_on_the_main_device() -> None:
    """Told of GPUs that need not be there."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    devices = {"": CPU, "a": first, "a.b": None, "c": second, "c.d": CPU}
    placement = Placement(first, devices)
    lies = {"a.x": first, "a.b.x": None, "c.x": second, "c.d.x": CPU, "e": CPU, "ab": CPU}
    runs = {"a.x": first, "a.b.x": first, "c.x": second, "c.d.x": first, "e": first, "ab": first}
    assert {name: placement.lies(name) for name in lies} == lies
    assert {name: placement.runs(name) for name in runs} == runs
    assert not placement.is_plain
    assert Placement(CPU, {"": CPU}).is_plain and not Placement(CPU, {"": None}).is_plain


def test_main_device() -> None:
    assert main_device("cpu", None) == main_device("cpu", "auto") == CPU
    assert main_device("auto", {"a": "cpu", "b": "disk"}) == CPU
    assert main_device("cpu", "disk") == CPU


PROGRAM = """
import json, resource, sys, torch, salience
from salience.machine import peak_rss_bytes
torch.set_num_threads(1)
salience.load(sys.argv[2])  # imports, and whatever is set up once
def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
before = now()
options = json.loads(sys.argv[3])
model = salience.load(sys.argv[1], **options)
loaded, held = peak() - before, now() - before
ids = torch.arange(16)[None] + 5
with torch.no_grad():
    out = model(input_ids=ids, use_cache=False).logits
state = [t for t in {id(t): t for t in model.state_dict().values()}.values()]
print(json.dumps({
    "loading": loaded, "held": held, "running": peak() - before,
    "final": sum(t.nbytes for t in state if not t.is_meta),
    "logits": out.float().sum().item(),
}))
"""


def measured(workshop: Workshop, model: Path, small: Path, **options: Any) -> dict[str, Any]:
    """Memory of a load and of a forward in a process of its own."""
    done = workshop(model, small, json.dumps(options), cwd=model.parent, program=PROGRAM)
    assert done.status == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float model of 130 MiB in shards of 32, and its codes."""
    folder = tmp_path_factory.mktemp("wide")
    config = llama_config(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    save(make_model(config).half(), folder / "float", max_shard_size="32MB")
    quantized(folder / "float", folder / "awq", "w4g128", "awq")
    return {name: folder / name for name in ("float", "awq")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_loading(
    wide: dict[str, Path], llama: Path, awq: Path, workshop: Workshop, tmp_path: Path
) -> None:
    """At most what stays and one shard, and from the disk a few modules: packed weights, and float
    ones that are held in twice the bytes they are stored in."""
    for name, small in (("float", llama), ("awq", awq)):
        files = list(wide[name].glob("*.safetensors"))
        shard = max(file.stat().st_size for file in files)
        found = measured(workshop, wide[name], small)
        assert found["loading"] <= found["final"] + shard
        folder = str(tmp_path)
        disk = measured(workshop, wide[name], small, device_map="disk", offload_folder=folder)
        assert disk["final"] == 0 and disk["logits"] == found["logits"]
        assert disk["loading"] <= shard + 48 * MIB and disk["running"] <= shard + 48 * MIB


def test_command_line(awq: Path, workshop: Workshop, tmp_path: Path) -> None:
    """`eval` with half of the model on the disk, and what it says where that cannot be."""
    place = tmp_path.resolve()
    (place / "text.txt").write_text("It is a truth universally acknowledged. " * 40)
    command = ("eval", awq, "--device", "cpu", "--json", "--text", "text.txt")
    command += ("--context", "32", "--max-chunks", "2")
    found = []
    for more in ((), ("--max-memory", "200KB", "--offload-folder", "disk")):
        run = workshop(*command, *more, cwd=place)
        assert (run.status, run.stderr) == (0, "")
        found.append(json.loads(run.stdout)["perplexity"])
    assert found[0] == found[1]
    refused = workshop(*command, "--device-map", "disk", cwd=place)
    assert refused.status == 3 and "--offload-folder FOLDER" in refused.line
