"""What a checkpoint format is: a pure function from a QTensor to named tensors, and back."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from salience.qtensor import QTensor
from salience.scheme import Scheme


class Format(Protocol):
    """One way to store quantized linears. Tensor names are local: "qweight", not "a.b.qweight"."""

    @property
    def name(self) -> str: ...

    @property
    def tensors(self) -> frozenset[str]:
        """The local names that replace a linear's `weight`; some may be absent of some weights."""
        ...

    @property
    def marker(self) -> str:
        """The one of `tensors` that every quantized linear has and no float one."""
        ...

    @property
    def heads(self) -> bool:
        """Whether readers take quantized linears outside the decoder's blocks, such as the head."""
        ...

    @property
    def act_order(self) -> bool:
        """Whether it has a place for `g_idx`, the groups of columns in activation order."""
        ...

    @property
    def config_file(self) -> str | None:
        """A file beside `config.json` that readers look for the `quantization_config` in, too."""
        ...

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's `quantization_config` is of this format."""
        ...

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        """The scheme of linear `name` by that config.

        Raises:
            SalienceError: a config this format cannot have.
        """
        ...

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse what the format cannot hold, before any work.

        Args:
            schemes: the wanted one of each linear to quantize, by its full name.
            shapes: (out, in) of the same linears.

        Raises:
            SalienceError: naming the linear or option, and the mend.
        """
        ...

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        """The stored tensors of one weight, by their local names."""
        ...

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        """Undo `write`, from those of `tensors` that are stored.

        Raises:
            SalienceError: tensors that are no such weight.
        """
        ...

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint.

        Args:
            schemes: of each quantized linear, by its full name.
            kept: full names of the linears that stay float.
            outside: those of `schemes` that are in no block: the head, the embeddings.
            act_order: whether the method forms groups in activation order.
        """
        ...
