"""gpt-oss's experts in MXFP4: ``…_blocks`` of sixteen bytes with two E2M1 codes each, ``…_scales`` of their exponents.

Blocks are ``[experts, outputs, groups, 16]``, scales ``[experts, outputs, groups]``; the model's parameter is
``[experts, inputs, outputs]``. Source: https://github.com/openai/gpt-oss (``gpt_oss/torch/weights.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from llmconvert.errors import CheckpointError
from llmconvert.quantize.formats.base import StoredLinear, model_dtype
from llmconvert.quantize.formats.reading import Declared
from llmconvert.quantize.formats.released.scaled import ScaledLinear, require_scales
from llmconvert.quantize.numbers import MXFP4
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["GptOssMxfp4"]

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32


class _Config(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(("quant_method", "modules_to_not_convert", "dequantize"))


class GptOssMxfp4:
    """``quant_method: mxfp4``."""

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        _Config.read(declared)
        dtype, scheme = model_dtype(checkpoint, torch.bfloat16), Scheme(MXFP4, _GROUP)
        for name, info in checkpoint.infos.items():
            if not name.endswith(_BLOCKS):
                continue
            if info.dtype != torch.uint8 or len(info.shape) != 4 or info.shape[3] != _GROUP // 2 or 0 in info.shape:
                raise CheckpointError(
                    f"tensor {name!r} is {str(info.dtype).removeprefix('torch.')} {list(info.shape)}, expected uint8 "
                    f"[experts, outputs, groups, {_GROUP // 2}]"
                )
            experts, outputs, groups, _ = info.shape
            linear = name.removesuffix(_BLOCKS)
            scale = f"{linear}{_SCALES}"
            require_scales(checkpoint, scale, name, scheme, (experts, outputs, groups * _GROUP))
            shape = (experts, groups * _GROUP, outputs)
            yield ScaledLinear(linear, shape, dtype, scheme, (name, scale), linear, name, scale, transposed=True)
