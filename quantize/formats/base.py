"""The protocol of an on-disk format of quantized weights, both ways; ``quantize/catalog/formats.py`` lists them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from llmconvert.compute.activations import InputKind
from llmconvert.engine.architecture.config import declared_dtype
from llmconvert.engine.sites import Site
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.ggml.mix import GgmlMix
from llmconvert.quantize.catalog.formats import FOR_RUNTIMES, FORMATS, READERS, require_format
from llmconvert.quantize.formats.container import CheckpointContainer, Container, ContainerRequest
from llmconvert.quantize.formats.reading import left_out
from llmconvert.quantize.scheme import Override, Scheme, SchemeOrMix
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.writer import check_output_directory

if TYPE_CHECKING:
    from llmconvert.gguf.export import TensorTypes

__all__ = [
    "FLOATS",
    "NO_OUTER",
    "Feature",
    "FileFormat",
    "Format",
    "Reader",
    "StoredLinear",
    "load_format",
    "model_dtype",
    "read_quantized",
    "require_matrix",
    "require_shape",
    "settings",
]

#: What scales are stored in.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Of formats whose artifacts have embedding and head as they were.
NO_OUTER = (
    "no reader of this format was seen to take a quantized head or embedding; compressed-tensors, mlx and gguf do"
)
#: Whether embeddings and heads are quantized: never, where an override names them, or like linears.
OuterUse = Literal["never", "asked", "always"]
#: What may be asked for beside method, scheme and format, and does not go with every format.
Feature = Literal[
    "outer", "budget", "repair", "mixed zero points", "rotations", "streaming", "generation", "distillation"
]


@dataclass(frozen=True)
class StoredLinear(ABC):
    """One quantized linear of a checkpoint, or experts' in one tensor; each format has a subclass that knows how it is
    stored.

    Attributes:
        linear: its name, without ``.weight``.
        shape: ``(rows, columns)`` of the dense weight; of experts in one tensor three dimensions, and what is said of
            rows is of experts.
        dtype: what the dense weight is rounded to, unless the reader is asked for another one.
        scheme: what it is stored in.
        parts: the tensors that make it up.
    """

    linear: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme
    parts: tuple[str, ...]

    @property
    def weight(self) -> str:
        """The dense weight's name."""
        return f"{self.linear}.weight"

    @property
    def holds_codes(self) -> bool:
        """Whether it still has its codes: a weight that was decompressed is as dense as any."""
        return True

    @property
    def unmeasured_inputs(self) -> str:
        """How its inputs are quantized while the model runs, where nothing here does that; "" otherwise."""
        return ""

    @property
    def input_kind(self) -> InputKind | None:
        """How its inputs are quantized while the model runs; None if they are not."""
        return self.scheme.input_kind

    def inputs(self, checkpoint: Checkpoint) -> InputKind | None:
        """The same with what the file has fixed of it."""
        return self.input_kind

    @abstractmethod
    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``start:stop`` (at least one) of the dense weight, computed in float32 and rounded once to ``dtype``."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        """The canonical tensor.

        Raises:
            UnsupportedError: there is none: groups of scattered columns, or levels of another kind.
        """


class Reader(Protocol):
    """Finds the quantized linears of checkpoints of one ``quant_method``."""

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        """The quantized linears of a checkpoint, whoever wrote it.

        Args:
            checkpoint: as stored.
            declared: its ``quantization_config``, whose ``quant_method`` is this reader's.

        Raises:
            UnsupportedError: a version or layout of the format that is not read here.
            CheckpointError: parts are missing, or contradict each other or the config.
        """


class Format(Reader, Protocol):
    """Packs canonical quantized tensors into named tensors of a checkpoint, and back, bit for bit.

    It also finds and reads what other producers wrote in it.
    """

    #: The library that loads it, as model cards name it (``library_name``).
    library: ClassVar[str] = "transformers"
    #: What does not go with it, and why.
    lacks: ClassVar[Mapping[Feature, str]] = {"outer": NO_OUTER}
    #: Whether its runtimes fuse linears that share an input, which then need one scheme.
    fuses: ClassVar[bool] = True
    #: Whether it takes layers that hold their weights transposed (GPT-2's ``Conv1D``).
    transposes: ClassVar[bool] = False
    #: Whether a layer's experts are in tensors of all of them, each with a type of its own, whatever a class reads.
    stacks_experts: ClassVar[bool] = False
    #: Whether embeddings and heads are quantized in it: never, where an override names them, or like linears.
    outer: ClassVar[OuterUse] = "never"
    #: Whether artifacts have tensors in one that transformers joins as it loads: there it fails at that.
    joins: ClassVar[bool] = False
    #: Packages that its library needs to load it, beside those that this one depends on.
    loaders: ClassVar[Sequence[str]] = ()

    def check(self, scheme: Scheme) -> None:
        """Refuse a scheme the format cannot hold.

        Raises:
            UnsupportedError: with the schemes that it can.
        """

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a method has to choose its scales, for a model in ``dtype``."""

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        """What :meth:`pack` will write for a linear, known from its shape alone.

        Raises:
            UnsupportedError: the format cannot hold a weight of this shape.
        """

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The tensors to store, by checkpoint name. ``linear`` is the name without ``.weight``."""

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        """The inverse of :meth:`pack`."""

    def check_outer(self, site: Site, scheme: Scheme) -> bool:
        """Refuse a scheme in which no reader of the format takes an embedding or a head; by default none.

        Returns:
            whether transformers has to load all weights dense then, by what :meth:`loaded_dense` gives.

        Raises:
            UnsupportedError: with what is read.
        """
        return False

    def for_model(self, outer: Mapping[str, Site], *, dense: bool) -> Format:
        """The format as it stores a model with this embedding and head; by default itself.

        Args:
            outer: those of them that are quantized, by name.
            dense: whether transformers loads all weights dense.
        """
        return self

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``: schemes by linear, and the linears left unquantized.

        Raises:
            UnsupportedError: the format cannot hold these schemes in one model.
        """

    def config(self, source: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
        """The ``config.json`` of an artifact, from the source's and what :meth:`quantization_config` gives."""
        return {**source, "quantization_config": declared}

    def cache_config(self, *, by_head: bool) -> Mapping[str, Any] | None:
        """What its config says of a cache in E4M3 whose scales are in the artifact, by layer or by head; None where it
        holds none."""
        return None

    def loaded_dense(self, schemes: Collection[Scheme]) -> Mapping[str, Any]:
        """What a config says for transformers to load all weights dense, of linears in these schemes; or nothing."""
        return {}

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        """Files that readers want beside ``config.json``, by name; ``declared`` is :meth:`quantization_config`'s."""

    def check_output(self, output: Path) -> None:
        """Refuse a place that cannot become an artifact in this format: by default, no new or empty directory.

        Raises:
            OutputError: something is there, or it cannot be written.
        """
        check_output_directory(output)

    def check_experts(self, scheme: Scheme, *, apart: bool) -> None:
        """Refuse a scheme in which no reader of the format takes the experts of a mixture; by default all.

        Args:
            scheme: of the experts.
            apart: whether transformers makes linears of them where it knows the format to need that.

        Raises:
            UnsupportedError: with the format and the schemes that are read.
        """
        raise UnsupportedError(
            f"{type(self).__name__.lower()}: no reader of this format has been seen to take the experts of a mixture; "
            "use format: compressed-tensors"
        )

    def check_dense_experts(self, schemes: Collection[Scheme], *, apart: bool) -> None:
        """Refuse schemes of other linears beside which no reader takes dense experts; by default none.

        Args:
            schemes: of all that is quantized.
            apart: see :meth:`check_experts`; otherwise each expert is in tensors of its own.

        Raises:
            UnsupportedError: with what to do instead.
        """
        return

    def check_source(self, source: Checkpoint) -> None:
        """Refuse a model that no runtime of the format has, as far as its config and names tell.

        Raises:
            UnsupportedError: with what it lacks.
            CheckpointError: tensors are missing.
        """
        return

    def remarks(self, source: Checkpoint) -> tuple[str, ...]:
        """What users should know of the format with such a model, a sentence each; by default nothing."""
        return ()

    def container(self, source: Checkpoint, output: Path, request: ContainerRequest) -> Container:
        """What the artifact's tensors go into.

        Args:
            source: dense weights, whose tensors are quantized or taken over.
            output: what the artifact will be.
            request: what else there is to know.

        Raises:
            UnsupportedError: the format's runtimes do not have such a model.
        """
        declared = request.declared
        return CheckpointContainer(
            source,
            request.specs,
            self.pack,
            self.config(source.config, declared),
            self.files(declared),
            request.max_shard_bytes,
            self.remarks(source),
        )


@runtime_checkable
class FileFormat(Format, Protocol):
    """A format whose artifact may be a file of its own, and which holds GGML's types too."""

    def mix_of(self, scheme: SchemeOrMix) -> GgmlMix:
        """The types of the file's tensors, for a mix, or for a scheme that :meth:`check` lets pass."""

    def types(
        self, source: Checkpoint, scheme: SchemeOrMix, overrides: Sequence[Override], *, importance: bool
    ) -> TensorTypes:
        """The type of each tensor, see :func:`~llmconvert.gguf.export.tensor_types`."""

    def schemes(self, types: TensorTypes, scheme: SchemeOrMix) -> Mapping[str, Scheme]:
        """Where a method chooses codes: what it stores tensors of these types in, but for floats."""


def load_format(name: str, runtime: str | None = None) -> Format:
    """The format of that name, for all that read it or for one runtime alone.

    Raises:
        UnsupportedError: there is none, and the message lists those there are; or it is the same for all runtimes.
    """
    require_format(name)
    if runtime is not None and (name, runtime) not in FOR_RUNTIMES:
        raise UnsupportedError(f"runtime {runtime}: {name} is the same for all that read it; leave it out")
    instance: Format = _load(FORMATS[name] if runtime is None else FOR_RUNTIMES[name, runtime])
    return instance


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def read_quantized(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> tuple[list[StoredLinear], tuple[str, ...]]:
    """Every quantized linear of a checkpoint whose ``quantization_config`` is ``declared``.

    Returns:
        The linears, and the tensors that are no part of the model's weights.

    Raises:
        UnsupportedError: stored in a way that no format here knows, or with keys or tensors that its reader does not.
        CheckpointError: the tensors contradict the config.
    """
    method = str(declared.get("quant_method", "")).lower()
    known = {**FORMATS, **READERS}
    if method not in known:
        raise UnsupportedError(f"quantized with {method!r} (quant_method in its config); known are {', '.join(known)}")
    reader: Reader = _load(known[method])
    linears = list(reader.find(checkpoint, declared))
    # What compressed-tensors decompressed may be saved without its scales, and is dense then.
    if not linears and str(declared.get("quantization_status")).lower() != "decompressed":
        raise CheckpointError(f"config.json says quantized with {method!r}, and no tensor is")
    return linears, left_out(checkpoint, {found.linear: found.parts for found in linears})


def require_shape(
    checkpoint: Checkpoint,
    linear: str,
    part: str,
    shape: tuple[int, ...] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (),
) -> str:
    """The full name of a linear's part.

    Raises:
        CheckpointError: it is not there, or has another shape or dtype.
    """
    name = f"{linear}.{part}"
    stored = checkpoint.infos.get(name)
    if stored is None:
        raise CheckpointError(f"quantized linear {linear!r} has no tensor {name!r}")
    if shape is not None and stored.shape != shape:
        raise CheckpointError(f"tensor {name!r} has shape {list(stored.shape)}, expected {list(shape)}")
    if dtypes and stored.dtype not in dtypes:
        found, *expected = (str(dtype).removeprefix("torch.") for dtype in (stored.dtype, *dtypes))
        raise CheckpointError(f"tensor {name!r} is {found}, expected {' or '.join(expected)}")
    return name


def require_matrix(
    checkpoint: Checkpoint, linear: str, part: str, *, dtypes: Sequence[torch.dtype] = ()
) -> tuple[int, int]:
    """The shape of a linear's part that has two dimensions, neither of them empty.

    Raises:
        CheckpointError: it is not there, or has another shape or dtype.
    """
    shape = checkpoint.infos[require_shape(checkpoint, linear, part, dtypes=dtypes)].shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"tensor '{linear}.{part}' has shape {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def model_dtype(checkpoint: Checkpoint, usual: torch.dtype = torch.float16) -> torch.dtype:
    """The floating dtype that a config declares; if it has none that in which such models are usually saved."""
    dtype = getattr(torch, (declared_dtype(checkpoint.config) or "").removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else usual


def settings(declared: Mapping[str, Any], *keys: str) -> str:
    """What a config declares under some keys, for an error."""
    return ", ".join(f"{key}: {declared[key]}" for key in keys if key in declared)
