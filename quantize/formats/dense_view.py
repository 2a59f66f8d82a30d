"""Dequantizing reader of quantized artifacts: a checkpoint seen with dense weights, row by row."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from llmconvert.compute.activations import ActivationRuntime, InputKind
from llmconvert.compute.kv_cache import CacheScales
from llmconvert.errors import CheckpointError, advising
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.base import StoredLinear, read_quantized
from llmconvert.quantize.formats.reading import declared_quantization, without_quantization
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, TensorInfo

__all__ = ["QuantizedView", "cached_by", "open_dense", "served_by"]

# What readers of GPTQ, AWQ and ModelOpt want beside config.json; of a dense model it would be a lie.
_QUANTIZER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def open_dense(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    *,
    weights_only: bool = False,
    progress: Progress = SILENT,
) -> Checkpoint:
    """The checkpoint itself if it is dense, a dequantizing view of it if it is quantized.

    Args:
        dtype: of the weights that are dequantized, which are rounded once; by default what the artifact itself says.
        weights_only: whether inputs are left alone that the model quantizes while it runs: as a source it stands for
            its dense weights.
        progress: told of what is stored and not seen.

    Raises:
        UnsupportedError: quantized in a format that this reader does not know, or in a way.
        CheckpointError: the tensors contradict the config.
    """
    declared = declared_quantization(checkpoint)
    if not declared:
        return checkpoint
    view = QuantizedView(checkpoint, declared, dtype)
    if weights_only:
        view.quantized_inputs, view.quantized_cache = {}, {}
    if not weights_only and view.unmeasured_inputs:
        how, count = view.unmeasured_inputs
        progress.log(
            f"the inputs of {count} linears are quantized while such a model runs ({how}); here they have 16 bits"
        )
    seen = view.quantized_cache and not weights_only
    if not seen and (view.left_out or declared.get("kv_cache_scheme")):
        scales = f", {len(view.left_out)} scales ({view.left_out[0]}, …)" if view.left_out else ""
        progress.log(f"a quantized key-value cache is left out{scales}: what is measured and written here has none")
    return view


def served_by(dense: Checkpoint, runtime: ActivationRuntime) -> Checkpoint:
    """The same weights, their linears' inputs and its cache quantized by a runtime's formulas; itself where neither is.

    Args:
        dense: what :func:`open_dense` gives, which quantizes them as transformers does.
        runtime: whose.
    """
    if runtime == "transformers" or not (dense.quantized_inputs or dense.quantized_cache):
        return dense
    served = cached_by(dense, runtime)
    served.quantized_inputs = _ByRuntime(dense.quantized_inputs, runtime)
    return served


def cached_by(dense: Checkpoint, runtime: ActivationRuntime) -> Checkpoint:
    """The same, its cache alone quantized by a runtime's formula."""
    served = copy.copy(dense)
    served.quantized_cache = {name: replace(scales, runtime=runtime) for name, scales in dense.quantized_cache.items()}
    return served


class _LastRead(CheckpointView):
    """Keeps the tensors of one linear that were read whole: dense rows come in slices, and may be stored as columns."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        self._linear = ""
        self._tensors: dict[str, torch.Tensor] = {}

    def of(self, linear: str) -> Checkpoint:
        """The checkpoint, about to be read for this linear; what was kept of another one is let go."""
        if linear != self._linear:
            self._linear, self._tensors = linear, {}
        return self

    def __getitem__(self, name: str) -> torch.Tensor:
        kept = self._tensors
        if name not in kept:
            kept[name] = super().__getitem__(name)
        return kept[name]


def _is_static_fp8(scheme: object) -> bool:
    """Whether a key-value cache is E4M3 under fixed scales, by layer or by head."""
    wanted = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
    if not isinstance(scheme, Mapping) or scheme.get("strategy") not in ("tensor", "attn_head"):
        return False
    return all(scheme.get(key) == value for key, value in wanted.items())


def _cache_scales(base: Checkpoint, names: Collection[str]) -> dict[str, CacheScales]:
    """Attention modules whose keys and values both have one scale, or one for each head.

    Raises:
        CheckpointError: one is no positive number: all that is divided by it would be none either.
    """
    found: dict[str, CacheScales] = {}
    for name in names:
        module = name.removesuffix(".k_scale")
        pair = name, f"{module}.v_scale"
        if module != name and pair[1] in names:
            key, value = (base[part].flatten() for part in pair)
            for part, scale in zip(pair, (key, value), strict=True):
                if not bool((scale > 0).all() and torch.isfinite(scale).all()):
                    raise CheckpointError(f"tensor {part!r} is no scale ({_shown(scale)}); the checkpoint is damaged")
            shape = (1,) if len(key) == 1 else (-1, 1, 1)
            found[module] = CacheScales(key.reshape(shape), value.reshape(shape))
    return found


def _shown(scale: torch.Tensor) -> str:
    """The first that is none."""
    wrong = ~((scale > 0) & torch.isfinite(scale))
    return f"{scale[wrong][0].item():g}"


class _Inputs(Mapping[str, InputKind]):
    """How inputs of linears are quantized, by their weights' names; what files have fixed is read on use."""

    def __init__(self, base: Checkpoint, linears: Mapping[str, StoredLinear]) -> None:
        self._base = base
        self._linears = {weight: found for weight, found in linears.items() if found.input_kind is not None}

    def __getitem__(self, weight: str) -> InputKind:
        kind = self._linears[weight].inputs(self._base)
        assert kind is not None
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


class _ByRuntime(Mapping[str, InputKind]):
    """Kinds as another runtime computes them."""

    def __init__(self, kinds: Mapping[str, InputKind], runtime: ActivationRuntime) -> None:
        self._kinds = kinds
        self._runtime = runtime

    def __getitem__(self, weight: str) -> InputKind:
        return replace(self._kinds[weight], runtime=self._runtime)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


class QuantizedView(CheckpointView):
    """A quantized checkpoint as dense weights, dequantized by rows (experts in one tensor by expert) as they are read.

    Args:
        base: the checkpoint as stored.
        declared: its ``quantization_config``.
        dtype: see :func:`open_dense`.

    Attributes:
        left_out: tensors that are stored and no weights: see
            :func:`~llmconvert.quantize.formats.reading.left_out`.
    """

    def __init__(self, base: Checkpoint, declared: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
        super().__init__(base)
        self._last = _LastRead(base)
        self.config = without_quantization(base.config)
        self.files = {name: content for name, content in base.files.items() if name not in _QUANTIZER_FILES}
        with advising("take the unquantized model, or save it dequantized with the library that wrote it"):
            linears, self.left_out = read_quantized(base, declared)
        #: Weight name → its quantized linear.
        self.quantized = {found.weight: found for found in linears}
        owners = {part: weight for weight, found in self.quantized.items() for part in found.parts}
        infos: dict[str, TensorInfo] = {}
        for name, info in base.infos.items():
            weight = owners.get(name)
            if name in self.left_out:
                continue
            if weight is None:
                infos[name] = info
            elif weight not in infos:
                found = self.quantized[weight]
                infos[weight] = TensorInfo(weight, dtype or found.dtype, found.shape, info.shard)
        self.infos = infos
        if _is_static_fp8(declared.get("kv_cache_scheme")):
            self.quantized_cache = _cache_scales(base, self.left_out)
        unmeasured = [found.unmeasured_inputs for found in linears if found.unmeasured_inputs]
        #: How inputs are quantized that nothing here does that to, and of how many linears; None where there are none.
        self.unmeasured_inputs = (unmeasured[0], len(unmeasured)) if unmeasured else None
        measured = {weight: found for weight, found in self.quantized.items() if not found.unmeasured_inputs}
        self.quantized_inputs = _Inputs(base, measured)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme a weight is stored in; None for one that is dense."""
        found = self.quantized.get(name)
        return found.scheme if found else None

    def read_quantized(self, name: str) -> QuantizedTensor:
        """The canonical tensor behind a dense weight's name.

        Raises:
            UnsupportedError: it has none (see :meth:`~llmconvert.quantize.formats.base.StoredLinear.read`).
        """
        return self.quantized[name].read(self.base)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        found = self.quantized.get(name)
        if found is None:
            return super().read_rows(name, start, stop)
        dtype = self.infos[name].dtype
        if stop <= start:
            return torch.empty((0, *found.shape[1:]), dtype=dtype)
        return found.read_rows(self._last.of(found.linear), start, stop, dtype)
