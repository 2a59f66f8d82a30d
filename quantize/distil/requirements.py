"""What can be distilled, and the memory and disk that it takes: known from headers, refused before the work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError
from llmconvert.needs import Needs
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.formats.dense_view import QuantizedView
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.needs import backward_nbytes, require_memory

__all__ = [
    "count_trained",
    "differing",
    "distil_nbytes",
    "foresee_distil",
    "needs_of",
    "norm_names",
    "require_learnable",
    "require_no_experts",
    "state_nbytes",
]

# Bytes per weight beside the student's and the teacher's values: the gradient, codes as they were and the best ones;
# and where codes move, their place in float32 and its means in bfloat16.
_CODE_NBYTES, _PLACE_NBYTES = 2, 8


def require_learnable(name: str, scheme: Scheme, *, moving: bool) -> None:
    """Refuse weights whose scales follow from others, or stand for many rows.

    Raises:
        UnsupportedError: naming tensor and scheme.
    """
    number = scheme.number
    powers = number.scales is not None and not number.scales.shared
    if scheme.rows != 1 or scheme.nested or scheme.block or powers or number.absmax:
        raise UnsupportedError(
            f"distillation: {name} is stored in {scheme}, whose scales are those of several rows, powers of two, "
            "nested or prescribed; those of integers in groups or by channel (w4a16-g64), of MLX's affine weights and "
            "of nvfp4 can be learned"
        )
    if moving and not number.even:
        raise UnsupportedError(
            f"distillation: {name} is stored in {scheme}, and only codes of integers can move; set "
            "quantize.distil.code_rate to 0"
        )


def norm_names(skeleton: Skeleton) -> tuple[str, ...]:
    """The checkpoint's names of all weights of norms in the decoder."""
    base = f"{skeleton.model.base_model_prefix}."
    found = []
    for parameter, stored in skeleton.names.items():
        module, _, leaf = parameter.rpartition(".")
        if parameter.startswith(base) and leaf == "weight":
            kind = type(skeleton.model.get_submodule(module)).__name__
            found += [stored] if "norm" in kind.lower() else []
    return tuple(found)


def differing(original: Checkpoint, view: Checkpoint) -> list[str]:
    """Tensors that are there in both and are not the same: of a rotated model, for example."""
    common = [
        name for name, info in view.infos.items() if name in original and name not in getattr(view, "quantized", ())
    ]
    return [
        name
        for name in common
        if original.infos[name].shape != view.infos[name].shape
        or not torch.equal(original[name].float(), view[name].float())
    ]


def _numel(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.infos[name]
    return info.nbytes // info.dtype.itemsize


def count_trained(view: QuantizedView, weights: Sequence[str], norms: Sequence[str]) -> int:
    """How many scales and weights of norms there are."""
    total = sum(_numel(view, name) for name in norms)
    for name in weights:
        scheme, (rows, columns) = view.scheme_of(name), view.infos[name].shape
        assert scheme is not None
        total += rows * scheme.groups(columns) * (2 if scheme.number.minima else 1)
    return total


def foresee_distil(original: Checkpoint, options: DistilOptions, length: int, *, context: Context) -> Needs:
    """What distilling a quantized form of ``original`` takes, all linears of its blocks being quantized.

    Disk is that of the state, and of an output that is no larger than the original.

    Raises:
        UnsupportedError: the model is a mixture of experts.
        CapacityError: memory does not suffice.
    """
    skeleton = Skeleton(original, context.device)
    require_no_experts(skeleton)
    weights = [site.tensor for site in skeleton.sites.values()]
    memory = distil_nbytes(original, weights, options, length, context)
    state = state_nbytes(sum(_numel(original, name) for name in weights), 0, options)
    return needs_of(memory, original, original.nbytes, state, context)


def state_nbytes(codes: int, scales: int, options: DistilOptions) -> int:
    """Bytes of the state on disk, twice while one replaces the last: the best so far, what the optimizer remembers."""
    return 2 * ((1 + (_PLACE_NBYTES if options.code_rate else 0)) * codes + 16 * scales)


def needs_of(memory: int, original: Checkpoint, output: int, state: int, context: Context) -> Needs:
    """As what a job needs that leaves ``output`` bytes, and has ``state`` bytes beside them while it runs."""
    if context.device.type == "cpu":
        return Needs(memory, disk=output + state, passing=state)
    return Needs(BASE_NBYTES + original.nbytes, memory - BASE_NBYTES, output + state, passing=state)


def require_no_experts(skeleton: Skeleton) -> None:
    if any(skeleton.experts):
        raise UnsupportedError(
            f"distillation: architecture {skeleton.architecture.model_type!r} is a mixture of experts, whose weights "
            "are not all in memory together; leave out quantize.distil"
        )


def distil_nbytes(
    view: Checkpoint, weights: Sequence[str], options: DistilOptions, length: int, context: Context
) -> int:
    """Bytes that distillation takes; refuses, before any work, what does not fit."""
    dtype = compute_dtype(context.device)
    numel = {name: _numel(view, name) for name in view.infos}
    trained = sum(numel[name] for name in weights)
    rest = sum(numel.values()) - trained
    activations = backward_nbytes(view, length, dtype)
    per_weight = 3 * dtype.itemsize + _CODE_NBYTES + (1 + _PLACE_NBYTES if options.code_rate else 0)
    needed = BASE_NBYTES + rest * dtype.itemsize + trained * per_weight + activations
    require_memory(
        needed,
        "distillation",
        f"both models with what they share held once, the optimizer, {activations / 1e6:,.0f} MB of activations",
        "use shorter windows (quantize.distil.length), leave codes as they are (quantize.distil.code_rate: 0), take a "
        "machine with more memory, or leave out quantize.distil",
        context,
    )
    return needed
