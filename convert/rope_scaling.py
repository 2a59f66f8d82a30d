"""RoPE scaling to longer inputs: linear interpolation, YaRN and dynamic NTK.

Linear interpolation is Chen et al. 2023 (arXiv 2306.15595), YaRN Peng et al. 2023 (arXiv 2309.00071).

Only ``config.json`` changes: which scaling, its factor, and how long inputs may be. No weight is touched, so what the
model makes of it has to be measured (:mod:`llmconvert.validate.long_inputs.positions`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from llmconvert.convert.rope_factor import RopeScaling
from llmconvert.engine.architecture.config import build_config, with_rope
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

__all__ = ["RopeScalingView", "scale_positions"]

_ORIGINAL = "original_max_position_embeddings"


class RopeScalingView(CheckpointView):
    """A checkpoint whose config declares a scaling; its tensors are the base's."""

    def __init__(self, base: Checkpoint, scaling: RopeScaling) -> None:
        super().__init__(base)
        self.config = scale_positions(base.config, scaling)


def scale_positions(config: Mapping[str, Any], scaling: RopeScaling) -> dict[str, Any]:
    """``config`` with ``scaling`` under ``rope_parameters``.

    Models that keep one set of parameters per kind of layer get it in their full-attention layers: sliding windows
    never look further back than they did in training. ``max_position_embeddings`` grows by the factor, but not under
    dynamic scaling, which takes it for the trained length and starts from there.

    Raises:
        UnsupportedError: no rotary positions, positions that are scaled already, or a config without a trained length.
    """
    found = Architecture.of(build_config(config))
    parameters = copy.deepcopy(dict(found.rope_sets))
    if not parameters:
        raise UnsupportedError(
            f"rope scaling {scaling}: {found.model_type!r} has no rotary positions that its config could scale; "
            "leave rope_scaling out"
        )
    trained = found.context
    if trained is None:
        raise UnsupportedError(
            f"rope scaling {scaling}: config.json does not say how long inputs may be; set max_position_embeddings "
            "there"
        )
    nested = parameters.get("full_attention")
    target = nested if isinstance(nested, dict) else parameters
    found = target.get("rope_type", "default")
    if found != "default":
        raise UnsupportedError(
            f"rope scaling {scaling}: positions are scaled already ({found} ×{target.get('factor', 1):g}); start from "
            "the model before that, factors don't add up"
        )
    target |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        target[_ORIGINAL] = trained
    context = None if scaling.kind == "dynamic" else int(trained * scaling.factor)
    changed = with_rope(config, parameters, context)
    _check(changed, scaling)
    return changed


def _check(config: Mapping[str, Any], scaling: RopeScaling) -> None:
    """transformers must read back what was written."""
    read = Architecture.of(build_config(config)).rope
    if (read.get("rope_type"), read.get("factor")) != (scaling.kind, scaling.factor):
        raise UnsupportedError(
            f"rope scaling {scaling}: the config's class reads {read} instead; it has its own scaling; leave "
            "rope_scaling out"
        )
