"""GGUF: blocks against the gguf package's own arithmetic, and files that others read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import salience
from helpers_checkpoint import config_of, refuse
from salience.checkpoint import GgufCheckpoint
from salience.formats import Gguf
from salience.formats.gguf import LOCAL, codes_of, is_exact, scales_of, zeros_of
from salience.gguf.metadata import rope_factors
from salience.gguf.tokenizer import pre_tokenizer, vocabulary
from salience.gguf.writer import permute_rows
from salience.inspection import inspect
from salience.linear import QuantEmbedding, QuantLinear
from salience.loading import load
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.source import open_source
from tiny_models import VOCABULARY, error, llama_config, logits, make_model, save

Q = gguf.GGMLQuantizationType
TYPES = {18: Q.Q4_0, 20: Q.Q4_1, 34: Q.Q8_0}
FMT = Gguf()


def random_qtensor(scheme: Scheme, rows: int = 4, columns: int = 256, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    q = torch.randint(0, 2**scheme.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3).half()
    shape = (rows, groups)
    zeros = torch.randint(0, 2**scheme.bits, shape, generator=generator, dtype=torch.uint8)
    if scheme.sym:
        zeros = torch.full_like(zeros, 2 ** (scheme.bits - 1))
    return QTensor(q, scales, zeros, scheme)


def dequantized(blocks: Tensor) -> Tensor:
    """By the gguf package."""
    return torch.from_numpy(gguf.dequantize(blocks.flatten(1).numpy(), TYPES[blocks.shape[-1]]))


def same(a: QTensor, b: QTensor) -> None:
    assert a.scheme == b.scheme
    for name in ("q", "scales", "zeros"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_golden_q4_0() -> None:
    # Of (arange(32) - 8) / 4, whose largest is 23/4: llama.cpp's scale is 5.75 / -8.
    golden = bytes.fromhex("c0b95b5a5a4a493939382828271717160606")
    blocks = torch.frombuffer(bytearray(golden), dtype=torch.uint8).view(1, 1, 18)
    qt = FMT.read({LOCAL: blocks}, Scheme(4, 32))
    assert qt.scales.item() == -5.75 / 8
    assert qt.q[0, :4].tolist() == [11, 10, 10, 10] and qt.q[0, -1] == 0
    assert bytes(FMT.write(qt)[LOCAL].flatten().tolist()) == golden
    values = (np.arange(32, dtype=np.float32) - 8) / 4
    assert gguf.quantize(values[None], Q.Q4_0).tobytes() == golden


def test_blocks_by_hand() -> None:
    q = torch.arange(32, dtype=torch.uint8)[None] % 16
    one = torch.ones(1, 1, dtype=torch.float16)
    nibbles = [17 * i for i in range(16)]
    eight, three = (torch.full((1, 1), zero, dtype=torch.uint8) for zero in (8, 3))
    blocks = FMT.write(QTensor(q, one, eight, Scheme(4, 32)))[LOCAL]
    assert blocks.flatten().tolist() == [0x00, 0x3C, *nibbles]
    blocks = FMT.write(QTensor(q, one, three, Scheme(4, 32)))[LOCAL]
    assert blocks.flatten().tolist() == [0x00, 0x3C, 0x00, 0xC2, *nibbles]  # -3 is 0xC200
    q8 = torch.arange(112, 144, dtype=torch.uint8)[None]
    blocks = FMT.write(QTensor(q8, one, eight * 16, Scheme(8, 32, sym=True)))[LOCAL]
    assert blocks.flatten().tolist() == [0x00, 0x3C, *range(240, 256), *range(16)]


@pytest.mark.parametrize("name", ["w4g32", "w4g64", "w4g128-sym", "w8g32-sym", "w8g64-sym"])
def test_gguf_reads_the_weight(name: str) -> None:
    qt = random_qtensor(Scheme.parse(name))
    blocks = FMT.write(qt)[LOCAL]
    value, reference = dequantized(blocks), qt.dequantize()
    # Exact but for m, which is -scale * zero rounded to fp16: half of its last place at most.
    bound = (qt.scales.float() * qt.zeros.float()).abs() * 2**-11
    bound = bound.repeat_interleave(qt.scheme.group_size, dim=1) * (not qt.scheme.sym) + 1e-7
    assert ((value - reference).abs() <= bound).all()


@given(
    st.sampled_from(["w4g32", "w4g64", "w4g128", "w4g32-sym", "w4g128-sym", "w8g32-sym"]),
    st.integers(0, 2**32 - 1),
    st.floats(2**-24, 4000),
)
@settings(deadline=None)
def test_round_trip(name: str, seed: int, largest: float) -> None:
    qt = random_qtensor(Scheme.parse(name), seed=seed)
    scales = (qt.scales.float() * largest).half().clamp(min=2**-24)
    qt = QTensor(qt.q, scales, qt.zeros, qt.scheme)
    blocks = FMT.write(qt)
    assert is_exact(blocks[LOCAL])
    same(FMT.read(blocks, qt.scheme), qt)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q8_0])
def test_reads_what_gguf_quantizes(kind: Q) -> None:
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    data = gguf.quantize(values, kind)
    size = 18 if kind is Q.Q4_0 else 34
    blocks = torch.from_numpy(data.copy()).view(3, 2, size)
    qt = FMT.read({LOCAL: blocks}, Scheme(4, 32))
    assert qt.scheme == (Scheme(4, 32) if kind is Q.Q4_0 else Scheme(8, 32, sym=True))
    assert torch.equal(qt.dequantize(), torch.from_numpy(gguf.dequantize(data, kind)))


def test_q4_1_of_others_is_no_code() -> None:
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    blocks = torch.from_numpy(gguf.quantize(values, Q.Q4_1).copy()).view(3, 2, 20)
    assert not is_exact(blocks) and zeros_of(blocks) is None
    refuse(lambda: FMT.read({LOCAL: blocks}, Scheme(4, 32)), "multiple of their scale")


def test_zero_of_a_positive_or_large_minimum() -> None:
    qt = random_qtensor(Scheme(4, 32))
    blocks = FMT.write(qt)[LOCAL]
    for scale, minimum in ((1.0, 1.0), (1.0, -16.0), (0.0, 1.0), (1.0, -0.5)):
        half = torch.tensor([scale, minimum], dtype=torch.float16).view(torch.uint8)
        damaged = blocks.clone()
        damaged[1, 2, :4] = half
        assert not is_exact(damaged)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("w4channel", "whole rows"),
        ("w4g16", "multiple of 32"),
        ("w8g32", "w8g32-sym"),
        ("w3g32", "not w3g32"),
        ("nf4", "uniform"),
    ],
)
def test_refused_schemes(name: str, part: str) -> None:
    scheme = Scheme.parse(name)
    refuse(lambda: FMT.check({"a.b": scheme}, {"a.b": (8, 64)}), part, "a.b")


def test_refused_weights() -> None:
    qt = random_qtensor(Scheme(4, 32), columns=64)
    order = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, torch.arange(64, dtype=torch.int32) % 2)
    refuse(lambda: FMT.write(order), "activation order")
    tiny = torch.full_like(qt.scales.bfloat16(), 1.17e-6)
    refuse(lambda: FMT.write(QTensor(qt.q, tiny, qt.zeros, qt.scheme)), "fp16 scales")
    large = torch.full_like(qt.scales, 60000)
    refuse(lambda: FMT.write(QTensor(qt.q, large, qt.zeros.clamp(2), qt.scheme)), "fp16 minima")
    refuse(lambda: FMT.check({"x": Scheme(4, 32)}, {"x": (8, 48)}), "not of 48")
    blocks = FMT.write(qt)[LOCAL]
    refuse(lambda: FMT.read({LOCAL: blocks}, Scheme(4, 64)), "differ in their scale")
    refuse(lambda: FMT.read({LOCAL: blocks}, Scheme(4, 32, sym=True)), "symmetric")
    refuse(lambda: FMT.read({LOCAL: blocks}, Scheme(4, 128)), "does not fit")
    refuse(lambda: FMT.read({LOCAL: blocks[..., :19]}, Scheme(4, 32)), "blocks must be")
    refuse(lambda: FMT.read({}, Scheme(4, 32)), "missing")


def test_config_keeps_each_scheme() -> None:
    schemes = {"a": Scheme(4, 64), "b": Scheme(4, 64), "c": Scheme(8, 32, sym=True)}
    config = json.loads(json.dumps(FMT.config(schemes, [])))
    assert {name: FMT.scheme(config, name) for name in schemes} == schemes


def test_permutation_is_llama_cpp_s() -> None:
    # The converter's own formula: head, half, i -> head, i, half.
    weight = torch.randn(4 * 6, 5)
    expected = weight.numpy().reshape(4, 2, 3, 5).swapaxes(1, 2).reshape(24, 5)
    assert np.array_equal(permute_rows(weight, 4).numpy(), expected)
    qt = random_qtensor(Scheme(4, 32), rows=24, columns=64)
    blocks = permute_rows(FMT.write(qt)[LOCAL], 4)
    assert torch.equal(codes_of(blocks), permute_rows(qt.q, 4))
    assert torch.equal(scales_of(blocks), permute_rows(qt.scales.repeat_interleave(1, 1), 4))


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama_config(
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=16
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its GGUF as `gguf`, and the same codes as `ct`."""
    folder = tmp_path_factory.mktemp(request.param)
    save(make_model(CONFIGS[request.param]()), folder / "float")
    for fmt, name in (("gguf", "gguf"), ("compressed-tensors", "ct")):
        source, out = str(folder / "float"), folder / name
        salience.quantize(source, out, scheme="w4g32", method="rtn", format=fmt)
    return folder


def test_same_logits_as_compressed_tensors(made: Path) -> None:
    expected = logits(load(made / "ct", device="cpu"))
    for path in (made / "gguf", made / "gguf" / "model.gguf"):
        model = load(path, device="cpu")
        assert sum(isinstance(m, QuantLinear) for m in model.modules()) > 0
        assert all(not p.requires_grad or p.ndim == 1 or "embed" in n or "head" in n
                   for n, p in model.named_parameters())  # fmt: skip
        assert error(logits(model), expected) < 1e-6


def test_transformers_reads_the_file(made: Path) -> None:
    if made.name.startswith("llama"):
        pytest.skip("Transformers reads neither Llama 3's factors nor biases from GGUF")
    model = AutoModelForCausalLM.from_pretrained(made / "gguf", gguf_file="model.gguf")
    if made.name.startswith("gemma3"):
        model = with_rope_of(model, made)
    # It has m in fp16, ours is the exact zero; wrong rows or norms would be an error near 1.
    assert error(logits(model), logits(load(made / "ct", device="cpu"))) < 1e-2


def with_rope_of(model: Any, made: Path) -> Any:
    """Transformers takes a default for what it does not read."""
    own = load(made / "gguf", device="cpu").float()
    config = own.config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_inspect_and_folder(made: Path) -> None:
    found = inspect(open_source(str(made / "gguf")))
    assert (found.format, found.scheme, found.bits_per_weight) == ("gguf", "w4g32", 5.0)
    lone = inspect(open_source(str(made / "gguf" / "model.gguf")))
    assert lone.modules == found.modules
    names = {path.name for path in (made / "gguf").iterdir()}
    assert {"model.gguf", "config.json", "tokenizer.json", "salience_report.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    report = json.loads((made / "gguf" / "salience_report.json").read_text())
    assert report["bits_per_weight"] == 5.0
    assert GgufCheckpoint(made / "gguf" / "model.gguf").config() == config_of(made / "gguf")


def test_metadata(made: Path) -> None:
    checkpoint = GgufCheckpoint(made / "gguf" / "model.gguf")
    config = load(made / "gguf", device="cpu").config
    arch = checkpoint.architecture
    values = {k: f.value() for k, f in checkpoint.fields("").items()}
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert values["general.quantization_version"] == 2
    assert values[f"{arch}.attention.key_length"] == config.head_dim if arch != "qwen2" else 16
    assert values[f"{arch}.attention.head_count_kv"] == 2
    assert len(values["tokenizer.ggml.tokens"]) == config.vocab_size
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.token_type"][:3] == [3, 3, 3]
    assert values["tokenizer.ggml.eos_token_id"] == 0
    assert "<|user|>" in values["tokenizer.ggml.tokens"]
    assert "messages" in values["tokenizer.chat_template"]
    tied = bool(config.tie_word_embeddings)
    assert ("output.weight" in checkpoint.names()) != tied
    assert ("rope_freqs.weight" in checkpoint.names()) == made.name.startswith("llama")


def test_types_of_the_rest(made: Path) -> None:
    reader = gguf.GGUFReader(made / "gguf" / "model.gguf")
    for tensor in reader.tensors:
        wanted = {1: Q.F32}.get(len(tensor.shape), Q.Q4_1 if "blk." in tensor.name else Q.F16)
        assert tensor.tensor_type == wanted, tensor.name


def test_head_and_embeddings_by_rule(tmp_path: Path) -> None:
    source = save(make_model(llama_config()), tmp_path / "float")
    rules = [("lm_head|embed_tokens", "w8g32-sym")]
    out = tmp_path / "gguf"
    salience.quantize(
        str(source), out, scheme="w4g32-sym", rules=rules, method="rtn", format="gguf"
    )
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds["output.weight"] == kinds["token_embd.weight"] == Q.Q8_0
    assert kinds["blk.0.attn_q.weight"] == Q.Q4_0
    model = load(out, device="cpu")
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    other = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf")
    assert error(logits(other), logits(model)) < 1e-5


def test_lone_file_in_a_folder(tmp_path: Path, made: Path) -> None:
    (tmp_path / "any.gguf").write_bytes((made / "gguf" / "model.gguf").read_bytes())
    assert open_source(str(tmp_path)).path == tmp_path / "any.gguf"
    (tmp_path / "other.gguf").write_bytes(b"")
    refuse(lambda: open_source(str(tmp_path)), "2 .gguf files")


def test_other_architectures_are_refused_before_work(tmp_path: Path) -> None:
    from transformers import PhiConfig

    values = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    source = save(make_model(PhiConfig(**values)), tmp_path / "float")
    run = lambda: salience.quantize(str(source), tmp_path / "out", format="gguf")  # noqa: E731
    refuse(run, "llama, mistral, qwen2, qwen3, gemma3_text, not phi")
    assert {path.name for path in tmp_path.iterdir()} == {"float"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_act": "relu"}, "silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}},
            "dynamic",
        ),
    ],
)
def test_variants_llama_cpp_does_not_run(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    source = save(make_model(llama_config(**changes)), tmp_path / "float")
    refuse(lambda: salience.quantize(str(source), tmp_path / "out", format="gguf"), part)


def test_rope_factors_are_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = CONFIGS["llama"]()
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    factors = rope_factors(config)
    assert factors is not None
    assert torch.allclose(plain / factors, scaled, rtol=1e-5)
    assert factors.min() == 1 and factors.max() == 8


SPLITS = {
    "llama-bpe": (r"\p{N}{1,3}", True),
    "qwen2": (r"\p{N}", False),
    "smaug-bpe": (r"\p{N}{1,3}", False),
}


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizer_by_regex(name: str) -> None:
    # As tokenizer.json of Llama 3 and of Qwen 2 has it.
    digits, whole = SPLITS[name]
    regex = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" + digits + "| ?"
        "[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    assert pre_tokenizer({"pre_tokenizer": steps, "model": {"ignore_merges": whole}}) == name
    split["pattern"] = {"Regex": "."}
    assert pre_tokenizer({"pre_tokenizer": steps, "model": {"ignore_merges": whole}}) is None


def test_pre_tokenizer_of_smollm() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, words]}
    assert pre_tokenizer({"pre_tokenizer": steps, "model": {}}) == "smollm"


def spm_tokenizer() -> dict[str, Any]:
    words = ["<unk>", "<s>", "</s>", "<0x41>", "\u2581", "a", "b", "ab", "\u2581ab", "abab"]
    added = [{"id": i, "content": words[i], "special": True} for i in range(3)]
    added.append({"id": 10, "content": "\u2581\u2581", "special": False})
    return {
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": ["a b", ["\u2581", "ab"], "ab ab"],
        },
    }


def test_sentencepiece_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(spm_tokenizer()))
    values = vocabulary(tmp_path, 12)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.token_type"] == [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 4, 5]
    assert values["tokenizer.ggml.tokens"][10:] == ["  ", "[PAD11]"]
    scores = dict(
        zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"], strict=True)
    )
    assert scores["ab"] > scores["\u2581ab"] > scores["abab"] > scores["a"]
    refuse(lambda: vocabulary(tmp_path, 10), "token 10", "10 embeddings")


def test_unknown_words_warn(tmp_path: Path) -> None:
    tokenizer = spm_tokenizer()
    tokenizer["model"]["byte_fallback"] = False
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="no llama.cpp name"):
        assert "tokenizer.ggml.pre" not in vocabulary(tmp_path, 12)
    tokenizer["model"]["type"] = "Unigram"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(lambda: vocabulary(tmp_path, 12), "neither byte-level BPE")
    (tmp_path / "tokenizer.json").unlink()
    refuse(lambda: vocabulary(tmp_path, 12), "save_pretrained")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float GGUF of a model wide enough for K-quants, as another tool would write it."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    save(make_model(llama_config(**sizes)), folder / "float")
    options: dict[str, Any] = {"scheme": "w4g32", "method": "rtn", "format": "gguf"}
    salience.quantize(str(folder / "float"), folder / "gguf", skip=["[qkv]_proj"], **options)
    return folder / "gguf" / "model.gguf"


def by_another_tool(file: Path, out: Path, kind: Q) -> dict[str, np.ndarray[Any, Any]]:
    """The file without our metadata and with its matrices of blocks in `kind`; their values."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "salience.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    random = np.random.default_rng(0)
    values = {}
    for tensor in reader.tensors:
        data, raw = np.array(tensor.data), None
        if tensor.tensor_type == Q.Q4_1:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            data, raw = encode(weight, kind, random), kind
            values[tensor.name] = gguf.dequantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def encode(weight: np.ndarray[Any, Any], kind: Q, random: np.random.Generator) -> Any:
    """A weight in a type; random bytes with small scales where gguf cannot encode."""
    if kind not in (Q.Q4_K, Q.Q6_K):
        return gguf.quantize(weight, kind)
    size = {Q.Q4_K: 144, Q.Q6_K: 210}[kind]
    blocks = random.integers(0, 256, (*weight.shape[:-1], weight.shape[-1] // 256, size))
    blocks = blocks.astype(np.uint8)
    scale = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)
    for start in (0, 2) if kind is Q.Q4_K else (208,):
        blocks[..., start : start + 2] = scale
    return blocks.reshape(weight.shape[0], -1)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.Q4_K, Q.Q6_K])
def test_files_of_others_as_sources(wide: Path, tmp_path: Path, kind: Q) -> None:
    file = tmp_path / "other.gguf"
    values = by_another_tool(wide, file, kind)
    down = "model.layers.0.mlp.down_proj"
    expected = torch.from_numpy(values["blk.0.ffn_down.weight"].copy())
    source = open_source(str(file))
    weights = source.weights(source.skeleton())
    assert torch.equal(weights.tensor(f"{down}.weight"), expected)
    # What is codes, scales and zeros stays so; anything else is dequantized, as before.
    model = load(file, device="cpu", kernel="reference")
    packed = isinstance(model.get_submodule(down), QuantLinear)
    assert packed == (kind in (Q.Q4_0, Q.Q8_0))
    x = torch.randn(3, 256)
    assert error(model.get_submodule(down)(x), x @ expected.T) < 1e-5
    assert not isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), QuantLinear)
    if kind in (Q.Q4_0, Q.Q6_K):
        out = tmp_path / "again"
        salience.quantize(str(file), out, scheme="w4g32", method="rtn", format="gguf")
        again = GgufCheckpoint(out / "model.gguf")
        assert again.fields("tokenizer.").keys() == source.stored.fields("tokenizer.").keys()  # type: ignore[attr-defined]
        assert torch.isfinite(logits(load(out, device="cpu"))).all()
