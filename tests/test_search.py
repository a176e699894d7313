"""Search files: the same bytes without the search, and nothing that does not fit is taken."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OPTConfig

import salience
from salience.blocks.search_files import open_search
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.formats import AutoAwq
from tiny_models import VOCABULARY, llama_config, make_model, save

KINDS: dict[str, dict[str, Any]] = {
    "awq w4": {"scheme": "w4g32"},
    "awq w4 balanced": {"scheme": "w4g32", "effort": "balanced"},
    "awq w4 skip": {"scheme": "w4g32", "skip": ["q_proj", r"layers\.1\."]},
    "awq w4 balanced only": {"scheme": "w4g32", "effort": "balanced", "only": ["mlp"]},
    "compressed w4": {"scheme": "w4g32", "format": "compressed-tensors"},
    "compressed w3": {"scheme": "w3g32", "format": "compressed-tensors"},
    "compressed w3 balanced": {
        "scheme": "w3g32-sym",
        "effort": "balanced",
        "format": "compressed-tensors",
    },
    "compressed rules": {
        "scheme": "w3g32",
        "format": "compressed-tensors",
        "rules": [("down_proj", "w8g32"), ("lm_head", "w4g64"), ("k_proj", "w4channel")],
        "skip": [r"layers\.0\.self_attn\.o_proj"],
    },
    "gptq": {"scheme": "w4g32", "method": "gptq"},
    "rtn": {"scheme": "w4g32", "method": "rtn"},
}


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=2, seqlen=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_hidden_layers=2, num_key_value_heads=4)
    return save(make_model(config), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def searched(
    model: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """The checkpoint and the search file of a kind, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("searched")
            made[kind] = folder / "out", folder / "found"
            salience.quantize(
                str(model),
                folder / "out",
                calibration=calibration,
                save_search=folder / "found",
                **KINDS[kind],
            )
        return made[kind]

    return make


@pytest.fixture
def apply(model: Path, calibration: Calibration, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Quantize from a search; when that is refused, nothing is left."""
    out = tmp_path / "place" / "out"
    out.parent.mkdir()

    def run(search: Path, source: Path = model, **options: Any) -> Path:
        salience.quantize(
            str(source), out, from_search=search, **{"calibration": calibration, **options}
        )
        return out

    yield run
    assert out.exists() or list(out.parent.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes(
    kind: str, searched: Any, apply: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, found = searched(kind)
    options = {key: KINDS[kind][key] for key in ("format",) if key in KINDS[kind]}
    if "balanced" not in kind and kind != "gptq":
        # No text is read.
        monkeypatch.setattr(Calibration, "tokens", lambda *_: pytest.fail("text was read"))
    again = apply(found, save_search=tmp_path / "again", **options)
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    a, b = load_file(found), load_file(tmp_path / "again")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    scales = [name for name in a if name.endswith("|scales")]
    assert bool(scales) == kind.startswith(("awq", "compressed"))


def test_a_codebook_has_nothing_to_search(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SalienceError, match="--save-search has nothing to save of --scheme nf4"):
        salience.quantize(str(model), tmp_path / "a", method="nf4", save_search=tmp_path / "found")
    assert not (tmp_path / "found").exists()


def test_another_format(searched: Any, apply: Any) -> None:
    """The same codes by another layout."""
    out, _ = searched("compressed w4")
    again = apply(searched("awq w4")[1], format="compressed-tensors")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_options_that_agree(searched: Any, apply: Any) -> None:
    out, found = searched("compressed rules")
    options = KINDS["compressed rules"]
    again = apply(found, method="awq", effort="fast", **options)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w4g16"}, "was searched with w4g32 for .*, not w4g16; leave --scheme"),
        ({"skip": ["q_proj"], "scheme": "w4g32"}, "searched with w4g32 for .*q_proj, not float"),
        ({"rules": [("lm_head", "w4g32")], "scheme": "w4g32"}, "float for lm_head, not w4g32"),
    ],
)
def test_another_scheme(searched: Any, apply: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SalienceError, match=message):
        apply(searched("awq w4")[1], **options)


def test_another_model(searched: Any, apply: Any, tmp_path: Path) -> None:
    """The same shapes: only the last block, then only the head, have other weights."""
    config = llama_config(num_hidden_layers=2, num_key_value_heads=4)
    for name, found, message in (
        ("model.layers.1.mlp.up_proj", searched("awq w4")[1], r"model\.layers\.1 differs"),
        ("lm_head", searched("compressed rules")[1], "what is in no block differs"),
    ):
        other = make_model(config)
        with torch.no_grad():
            other.get_submodule(name).weight[0, 0] += 1
        source = save(other, tmp_path / name)
        options = {"format": "compressed-tensors"} if name == "lm_head" else {}
        with pytest.raises(SalienceError, match=f"was searched on other weights: {message}"):
            apply(found, source, **options)


@pytest.mark.parametrize("layers", [1, 3])
def test_another_depth(searched: Any, apply: Any, tmp_path: Path, layers: int) -> None:
    config = llama_config(num_hidden_layers=layers, num_key_value_heads=4)
    other = save(make_model(config), tmp_path / "other")
    with pytest.raises(SalienceError, match=r"layers\.1.*does not have|other weights: .* differs"):
        apply(searched("awq w4")[1], other)


def rewritten(found: Path, target: Path, change: Callable[[dict, dict], None]) -> Path:  # type: ignore[type-arg]
    """A copy of a search file with other tensors or metadata."""
    with safe_open(found, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(found)
    change(tensors, metadata)
    save_file(tensors, target, metadata=metadata)
    return target


def edit(key: str, value: object) -> Callable[[dict, dict], None]:  # type: ignore[type-arg]
    """Change what the metadata says; None takes it away."""

    def change(_: Any, metadata: dict[str, str]) -> None:
        info = json.loads(metadata["salience-search"])
        info[key] = value
        metadata["salience-search"] = json.dumps(info)

    return change


Q = "model.layers.0.self_attn.q_proj"
SCALE = "model.layers.0|input_layernorm|self_attn.q_proj|scales"
DAMAGES: dict[str, Callable[[dict[str, Any], dict[str, str]], Any]] = {
    "no metadata": lambda _, m: m.clear() or m.update(format="pt"),
    "metadata that is no JSON": lambda _, m: m.update({"salience-search": "{"}),
    "metadata that is a list": lambda _, m: m.update({"salience-search": "[]"}),
    "metadata that nests": lambda _, m: m.update({"salience-search": "[" * 100_000}),
    "schemes that are a list": edit("schemes", []),
    "schemes that are numbers": edit("schemes", {Q: 4}),
    "schemes that are none": edit("schemes", {Q: "w99"}),
    "schemes of no linear": edit("schemes", {}),
    "a method that is none": edit("method", "hope"),
    "a method that is a list": edit("method", ["awq"]),
    "no effort": edit("effort", None),
    "a grid without scales": lambda t, _: t.pop(f"{Q}|grid_scales"),
    "a grid without zeros": lambda t, _: t.pop(f"{Q}|grid_zeros"),
    "a scale without exponents": lambda t, _: t.pop(SCALE.replace("scales", "exponents")),
    "exponents without a scale": lambda t, _: t.pop(SCALE),
    "a block without a digest": lambda t, _: t.pop("model.layers.1|digest"),
    "a digest of words": lambda t, _: t.update({"model.layers.1|digest": torch.zeros(8)}),
    "a short digest": lambda t, _: t.update(
        {"model.layers.1|digest": torch.zeros(8, dtype=torch.uint8)}
    ),
    "a flat grid": lambda t, _: t.update({f"{Q}|grid_scales": torch.ones(64).half()}),
    "a grid of another shape": lambda t, _: t.update(
        {f"{Q}|grid_scales": torch.ones(64, 4).half()}
    ),
    "zeros of another shape": lambda t, _: t.update(
        {f"{Q}|grid_zeros": torch.ones(64, 4, dtype=torch.uint8)}
    ),
    "zeros beyond the codes": lambda t, _: t[f"{Q}|grid_zeros"].fill_(200),
    "a grid of fp32": lambda t, _: t.update({f"{Q}|grid_scales": torch.ones(64, 2)}),
    "a grid that is not finite": lambda t, _: t[f"{Q}|grid_scales"].fill_(torch.inf),
    "a grid of zeros": lambda t, _: t[f"{Q}|grid_scales"].fill_(0),
    "a scale that is not finite": lambda t, _: t[SCALE].fill_(torch.nan),
    "a scale that is negative": lambda t, _: t[SCALE].neg_(),
    "a scale of another length": lambda t, _: t.update({SCALE: torch.ones(32)}),
    "a scale that is a number": lambda t, _: t.update({SCALE: torch.tensor(1.0)}),
    "a scale of halves": lambda t, _: t.update({SCALE: torch.ones(64).half()}),
    "three exponents": lambda t, _: t.update({SCALE.replace("scales", "exponents"): torch.ones(3)}),
    "a scale with no such source": lambda t, _: t.update(
        {
            "model.layers.0|mlp|mlp.down_proj|scales": torch.ones(128),
            "model.layers.0|mlp|mlp.down_proj|exponents": torch.ones(2),
        }
    ),
    "a scale of no such block": lambda t, _: t.update(
        {
            "model.layers.9|mlp.up_proj|mlp.down_proj|scales": torch.ones(128),
            "model.layers.9|mlp.up_proj|mlp.down_proj|exponents": torch.ones(2),
        }
    ),
    "a grid of no such linear": lambda t, _: t.update(
        {"x|grid_scales": torch.ones(64, 2).half(), "x|grid_zeros": torch.ones(64, 2).byte()}
    ),
    "a tensor with another name": lambda t, _: t.update({"weight": torch.ones(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(searched: Any, apply: Any, tmp_path: Path, damage: str) -> None:
    bad = rewritten(searched("awq w4")[1], tmp_path / "bad", DAMAGES[damage])
    with pytest.raises(SalienceError) as caught:
        apply(bad)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    if "method" not in damage and damage != "schemes that are none":
        assert str(bad) in message


def test_damaged_bytes(searched: Any, tmp_path: Path) -> None:
    """Truncated anywhere, random, empty, or a header with changed bytes: an error or a search."""
    whole = searched("awq w4")[1].read_bytes()
    chance = random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    files = [b"", b"{}", chance.randbytes(1000), (2**62).to_bytes(8, "little") + whole[8:]]
    files += [whole[: chance.randrange(len(whole))] for _ in range(40)]
    for i, content in enumerate(files):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(content)
        with pytest.raises(SalienceError, match=f"{i}.safetensors"):
            open_search(path)
    for _ in range(300):
        changed = bytearray(whole)
        changed[8 + chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            open_search(path)
        except SalienceError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("name", ["found", "found.pt", "folder"])
def test_no_such_file(apply: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SalienceError, match=f"search file .*{name} does not exist"):
        apply(tmp_path / name)


# llm-awq's own files.

Entry = tuple[str, tuple[str, ...], Tensor]


def dequantized(folder: Path) -> dict[str, Tensor]:
    """A checkpoint of format awq as dense fp32 tensors."""
    fmt, stored = AutoAwq(), load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dense = {}
    for name, tensor in stored.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            parts = {key: stored[f"{owner}.{key}"] for key in fmt.tensors}
            dense[f"{owner}.weight"] = fmt.read(parts, fmt.scheme(config, owner)).dequantize()
        elif leaf not in fmt.tensors:
            dense[name] = tensor.float()
    return dense


def llama_pairs(block: str) -> list[tuple[str, tuple[str, ...]]]:
    """The pairs that llm-awq scales, in its order."""
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    return [
        (f"{block}.input_layernorm", tuple(f"{attention}.{n}_proj" for n in "qkv")),
        (f"{attention}.v_proj", (f"{attention}.o_proj",)),
        (f"{block}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
        (f"{mlp}.up_proj", (f"{mlp}.down_proj",)),
    ]


def opt_pairs(block: str) -> list[tuple[str, tuple[str, ...]]]:
    attention = f"{block}.self_attn"
    return [
        (f"{block}.self_attn_layer_norm", tuple(f"{attention}.{n}_proj" for n in "qkv")),
        (f"{attention}.v_proj", (f"{attention}.out_proj",)),
        (f"{block}.final_layer_norm", (f"{block}.fc1",)),
        (f"{block}.fc1", (f"{block}.fc2",)),
    ]


OPT = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    ffn_dim=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    word_embed_proj_dim=64,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
FAMILIES: dict[str, Any] = {
    "llama": (
        llama_config(num_hidden_layers=2, num_key_value_heads=4),
        "model.layers",
        llama_pairs,
    ),
    "opt": (OPT, "model.decoder.layers", opt_pairs),
}


def llm_awq(model: Any, family: str, group: int, seed: int = 0) -> dict[str, list[Any]]:
    """A search result as llm-awq saves it: some scales, and clips of all but q and k."""
    _, prefix, pairs = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    scales, clips = [], []
    for i in range(2):
        for prev, sinks in pairs(f"{prefix}.{i}"):
            width = model.get_submodule(sinks[0]).weight.shape[1]
            scale = torch.rand(width, generator=generator) * 1.5 + 0.5
            scales.append((prev, sinks, scale.half() if i else scale))
        for name, module in model.named_modules():
            if not name.startswith(f"{prefix}.{i}.") or not isinstance(module, torch.nn.Linear):
                continue
            if not any(part in name for part in ("q_", "k_", "query", "key", "Wqkv")):
                rows, columns = module.weight.shape
                most = torch.rand(rows, columns // group, 1, generator=generator)
                clips.append((name, most * 0.2 + 0.05))
    return {"scale": scales, "clip": clips}


@torch.no_grad()
def oracle(model: Any, found: dict[str, list[Any]], prefix: str, group: int) -> dict[str, Tensor]:
    """The dense weights that llm-awq's steps leave, and those of the divided norms."""
    for prev, sinks, scale in found["scale"]:
        scale, source = scale.float(), model.get_submodule(prev)
        source.weight /= scale[:, None] if source.weight.ndim == 2 else scale
        if getattr(source, "bias", None) is not None:
            source.bias /= scale
        for sink in sinks:
            model.get_submodule(sink).weight *= scale
    for name, most in found["clip"]:
        weight = model.get_submodule(name).weight
        groups = weight.view(weight.shape[0], -1, group)
        weight.copy_(groups.clamp(-most, most).view_as(weight))
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if name.startswith(f"{prefix}.") and isinstance(module, torch.nn.Linear):
            groups = module.weight.view(len(module.weight), -1, group)
            low = groups.amin(-1, keepdim=True).clamp(max=0)
            high = groups.amax(-1, keepdim=True).clamp(min=0)
            step = ((high - low) / 15).half().float()
            zero = (-low / step).round().clamp(0, 15)
            code = ((groups / step).round() + zero).clamp(0, 15)
            dense[f"{name}.weight"] = ((code - zero) * step).view_as(module.weight)
    return dense


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", ["scales and clips", "scales", "clips", "a few scales"])
def test_llm_awq(family: str, parts: str, apply: Any, tmp_path: Path) -> None:
    config, prefix, _ = FAMILIES[family]
    model = make_model(config)
    source = save(model, tmp_path / "model")
    found = llm_awq(model, family, 32)
    if parts == "scales":
        found["clip"] = []
    elif parts == "clips":
        found["scale"] = []
    elif parts == "a few scales":
        found["scale"] = found["scale"][1::3]
    torch.save(found, tmp_path / "found.pt")
    out = apply(tmp_path / "found.pt", source, scheme="w4g32")
    ours, theirs = dequantized(out), oracle(model, found, prefix, 32)
    assert ours.keys() <= theirs.keys()
    linears = [name for name in ours if theirs[name].ndim == 2 and name.startswith(prefix)]
    assert len(linears) == 2 * (7 if family == "llama" else 6)
    for name, value in ours.items():
        right = theirs[name] if name in linears else theirs[name].half().float()
        assert torch.equal(value, right), name


def bad_awq(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    def apply(found: dict[str, Any]) -> object:
        change(found)
        return found

    return apply


B = "model.layers.0"
BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a pair without a fold": (
        bad_awq(lambda f: f["scale"].append((f"{B}.mlp.gate_proj", (f"{B}.mlp.down_proj",), ONES))),
        rf"{B}\.mlp\.gate_proj into mlp\.down_proj, and the model does not allow that",
    ),
    "an activation": (
        bad_awq(lambda f: f["scale"].append((f"{B}.mlp.act_fn", (f"{B}.mlp.down_proj",), ONES))),
        rf"{B}\.mlp\.act_fn into mlp\.down_proj, and the model",
    ),
    "a sink too many": (
        bad_awq(
            lambda f: f["scale"].append(
                (f"{B}.mlp.up_proj", (f"{B}.mlp.down_proj", f"{B}.mlp.gate_proj"), ONES)
            )
        ),
        rf"{B}\.mlp\.up_proj into mlp\.down_proj, mlp\.gate_proj, and the model",
    ),
    "another block": (
        bad_awq(
            lambda f: f["scale"].append(
                ("model.layers.7.mlp.up_proj", ("model.layers.7.mlp.down_proj",), ONES)
            )
        ),
        r"is for model\.layers\.7, which the model does not have",
    ),
    "two blocks": (
        bad_awq(
            lambda f: f["scale"].append(
                (f"{B}.mlp.up_proj", ("model.layers.1.mlp.down_proj",), ONES)
            )
        ),
        "are in no common block",
    ),
    "a clip of no linear": (
        bad_awq(lambda f: f["clip"].append((f"{B}.mlp.gate", torch.ones(4, 4, 1)))),
        rf"is for {B}\.mlp\.gate, which the model does not have",
    ),
    "a clip of another shape": (
        bad_awq(lambda f: f["clip"].append((f"{B}.mlp.up_proj", torch.ones(128, 1, 1)))),
        r"clip of .*up_proj is \[128, 1\], w4g32 wants \[128, 2\]; use the group size",
    ),
    "a negative clip": (
        bad_awq(lambda f: f["clip"].append((f"{B}.mlp.up_proj", -torch.ones(128, 2, 1)))),
        "no magnitudes",
    ),
    "a scale of another length": (
        bad_awq(lambda f: f["scale"].__setitem__(0, (*f["scale"][0][:2], torch.ones(32)))),
        "has 32 channels, the model 64",
    ),
    "a scale of zeros": (
        bad_awq(lambda f: f["scale"].__setitem__(0, (*f["scale"][0][:2], torch.zeros(64)))),
        "no scales",
    ),
    "no clips": (lambda f: {"scale": f["scale"]}, "no search result of llm-awq: .*clip"),
    "a list": (lambda f: [f], "no search result of llm-awq"),
    "numbers": (lambda f: {"scale": [("a", ("b",), 3)], "clip": []}, "no search result"),
    "a real quantization": (lambda f: {"model.embed_tokens.weight": ONES}, "no search result"),
}
ONES = torch.ones(128)


@pytest.mark.parametrize("name", BAD)
def test_llm_awq_that_does_not_fit(name: str, apply: Any, model: Path, tmp_path: Path) -> None:
    change, message = BAD[name]
    found = llm_awq(make_model(FAMILIES["llama"][0]), "llama", 32)
    torch.save(change(found), tmp_path / "found.pt")
    with pytest.raises(SalienceError, match=message) as caught:
        apply(tmp_path / "found.pt", scheme="w4g32")
    assert "\n" not in str(caught.value)


def test_llm_awq_scales_across_shared_heads(apply: Any, tmp_path: Path) -> None:
    """One scale a channel of o's input, where two heads have one v: the function would change."""
    config = llama_config(num_hidden_layers=2)
    source = save(make_model(config), tmp_path / "model")
    block = "model.layers.1.self_attn"
    scale = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    found = {"scale": [(f"{block}.v_proj", (f"{block}.o_proj",), scale)], "clip": []}
    torch.save(found, tmp_path / "found.pt")
    with pytest.raises(SalienceError, match=r"scales for model\.layers\.1 change what it computes"):
        apply(tmp_path / "found.pt", source, scheme="w4g32")


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_llm_awq_pickle_that_runs_code(apply: Any, tmp_path: Path, zipped: bool) -> None:
    content = {"scale": [], "clip": [Malicious(tmp_path / "owned")]}
    file = tmp_path / "found.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SalienceError, match="could run code; it is not loaded") as caught:
        apply(file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_llm_awq_damaged_bytes(tmp_path: Path, zipped: bool) -> None:
    found = llm_awq(make_model(FAMILIES["llama"][0]), "llama", 32)
    torch.save(found, tmp_path / "found.pt", _use_new_zipfile_serialization=zipped)
    whole, chance = (tmp_path / "found.pt").read_bytes(), random.Random(0)
    files = [b"", b"\x80", chance.randbytes(1000)]
    files += [whole[: chance.randrange(len(whole))] for _ in range(20)]
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(5):
            changed[chance.randrange(min(len(changed), 5000))] = chance.randrange(256)
        files.append(bytes(changed))
    path = tmp_path / "bad.pt"
    for i, content in enumerate(files):
        path.write_bytes(content)
        try:
            open_search(path)
        except SalienceError as error:
            assert str(path) in str(error)
        else:
            assert i >= 23  # what was cut off is missed
