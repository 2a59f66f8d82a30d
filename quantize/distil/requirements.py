"""What can be distilled, and the memory and disk that it takes: known from headers, refused before the work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.engine.backward import graph_nbytes
from llmconvert.engine.coroutine import check_start
from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import BASE_NBYTES, tokenizer_nbytes
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import STATES_IN_MEMORY_NBYTES
from llmconvert.errors import UnsupportedError
from llmconvert.needs import Needs
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.loss import divergence_nbytes
from llmconvert.training.needs import backward_nbytes, fits, require_memory

__all__ = [
    "Counted",
    "DistilMemory",
    "differing",
    "distil_memory",
    "foresee_distil",
    "needs_of",
    "norm_names",
    "numbers_of",
    "require_learnable",
    "require_no_experts",
    "state_nbytes",
]

# Bytes per weight beside the student's and the teacher's values and the gradient: its code; where codes move, the code
# as it was best and as it is being stored, its place in float32 and the place's means in bfloat16.
_CODE_NBYTES, _MOVING_NBYTES = 1, 10
# Block by block: bytes per scale (its factor, Adam's two means, the best so far, the gradient and a sum of it, all in
# float32) and, of the linear at hand, per weight (packed and unpacked codes, values, a copy).
_SCALE_NBYTES, _LINEAR_NBYTES = 24, 8
# Per group of weights, where all are in memory: its scale and minimum as they are stored and in float32, and their
# gradients.
_GROUP_NBYTES = 20
# Weights that share a scale, where the scheme is not known yet, and at least in GGUF's types.
_LIKELY_GROUP, _LEAST_GROUP = 32, 16


@dataclass(frozen=True, slots=True)
class Counted:
    """What is trained, and what is held beside it.

    Attributes:
        codes: weights that are stored as codes of these.
        groups: of such weights.
        scales: that are learned, minima among them.
        norms: weights of norms that are.
        apart: other numbers that original and artifact don't share.
    """

    codes: int
    groups: int
    scales: int
    norms: int
    apart: int


@dataclass(frozen=True, slots=True)
class DistilMemory:
    """What a distillation takes.

    Attributes:
        nbytes: at the worst moment, on the device where it runs.
        tape: bytes of hidden states on disk, block by block.
        streamed: whether one block is in memory at a time.
    """

    nbytes: int
    tape: int = 0
    streamed: bool = False


def require_learnable(name: str, scheme: Scheme, *, moving: bool) -> None:
    """Refuse weights whose scales follow from others, or stand for many rows.

    Raises:
        UnsupportedError: naming tensor and scheme.
    """
    number = scheme.number
    powers = number.scales is not None and not number.scales.shared
    nested = scheme.nested and scheme.block is None
    if scheme.rows != 1 or nested or powers or number.absmax:
        raise UnsupportedError(
            f"distillation: {name} is stored in {scheme}, whose scales are those of several rows, powers of two, "
            "nested or prescribed; those of integers in groups or by channel (w4a16-g64), of MLX's affine weights, of "
            "nvfp4 and of GGUF's types can be learned"
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


def differing(original: Checkpoint, view: Checkpoint, names: Collection[str]) -> list[str]:
    """Tensors, of ``names``, that are in both and not the same: of a rotated model, for example."""
    common = [name for name in view if name in original and name in names]
    return [
        name
        for name in common
        if original.infos[name].shape != view.infos[name].shape
        or not torch.equal(original[name].float(), view[name].float())
    ]


def numbers_of(checkpoint: Checkpoint, name: str) -> int:
    """How many numbers a tensor has."""
    info = checkpoint.infos[name]
    return info.nbytes // info.dtype.itemsize


def foresee_distil(
    original: Checkpoint,
    options: DistilOptions,
    length: int,
    *,
    context: Context,
    scheme: SchemeOrMix | None = None,
    outer: bool = False,
) -> Needs:
    """What distilling a quantized form of ``original`` takes, all linears of its blocks being quantized in ``scheme``.

    Disk is that of the state, and of an output that is no larger than the original.

    Args:
        outer: whether embedding and head are quantized too, all in types of GGUF's.

    Raises:
        UnsupportedError: the model is a mixture of experts.
        CapacityError: memory does not suffice.
    """
    skeleton = Skeleton(original, context.device)
    require_no_experts(skeleton)
    weights = [site.tensor for site in skeleton.sites.values()]
    windows = options.steps * options.batch + options.held_out
    codes, scales = sum(numbers_of(original, name) for name in weights), _scales(original, weights, scheme)
    groups = codes // _LEAST_GROUP if outer else scales
    apart = sum(numbers_of(original, site.tensor) for site in skeleton.outer.values()) if outer else 0
    counted = Counted(codes, groups, scales, 0, apart)
    memory = distil_memory(original, weights, counted, options, [length] * windows, context)
    kept = state_nbytes(codes, scales, options)
    return needs_of(memory, original, original.nbytes, kept, context)


def state_nbytes(codes: int, scales: int, options: DistilOptions) -> int:
    """Bytes of the state on disk, twice while one replaces the last: the best so far, what the optimizer remembers."""
    return 2 * ((_MOVING_NBYTES - 1 if options.code_rate else 0) * codes + 16 * scales)


def needs_of(memory: DistilMemory, original: Checkpoint, output: int, state: int, context: Context) -> Needs:
    """As what a job needs that leaves ``output`` bytes, and has ``state`` bytes beside them while it runs."""
    passing = state + memory.tape
    if context.device.type == "cpu":
        return Needs(memory.nbytes, disk=output + passing, passing=passing)
    host = BASE_NBYTES + (memory.nbytes - BASE_NBYTES if memory.streamed else original.nbytes)
    return Needs(host, memory.nbytes - BASE_NBYTES, output + passing, passing=passing)


def require_no_experts(skeleton: Skeleton) -> None:
    if any(skeleton.experts):
        raise UnsupportedError(
            f"distillation: architecture {skeleton.architecture.model_type!r} is a mixture of experts, whose weights "
            "are not all in memory together; leave out quantize.distil"
        )


def distil_memory(
    view: Checkpoint,
    weights: Sequence[str],
    counted: Counted,
    options: DistilOptions,
    lengths: Sequence[int],
    context: Context,
) -> DistilMemory:
    """What distillation takes: both models in memory, or, where these do not fit, one block of them at a time.

    Args:
        view: the artifact as dense weights, or the original before it is quantized.
        weights: whose scales are trained.
        counted: what that comes to.
        options: how.
        lengths: tokens of every window.
        context: device and memory.

    Raises:
        CapacityError: neither fits, or both models do not and the options ask for them.
        UnsupportedError: the model's last blocks need more of earlier ones than hidden states.
    """
    resident = _resident_nbytes(view, counted, options, max(lengths), context)
    activations = backward_nbytes(view, max(lengths), compute_dtype(context.device))
    parts = f"both models with what they share held once, the optimizer, {activations / 1e6:,.0f} MB of activations"
    advice = (
        "use shorter windows (quantize.distil.length), take a machine with more memory, or leave out quantize.distil"
    )
    whole = [
        f"{key} (quantize.distil.{key}: 0)"
        for key, value in (("code_rate", options.code_rate), ("hidden", options.hidden))
        if value
    ]
    if whole:
        advice = f"without {' and '.join(whole)} one block at a time is enough; or {advice}"
    if whole or fits(resident, context):
        require_memory(resident, "distillation", parts, advice, context)
        return DistilMemory(resident)
    streamed, tape = _streamed_nbytes(view, weights, counted.scales, options, lengths, context)
    require_memory(streamed, "distillation", "a block of each model, their heads, what is learned", advice, context)
    return DistilMemory(streamed, tape, streamed=True)


def _resident_nbytes(view: Checkpoint, counted: Counted, options: DistilOptions, length: int, context: Context) -> int:
    dtype = compute_dtype(context.device)
    rest = sum(numbers_of(view, name) for name in view.infos) - counted.codes + counted.apart
    per_weight = 3 * dtype.itemsize + _CODE_NBYTES + (_MOVING_NBYTES if options.code_rate else 0)
    scales = counted.groups * _GROUP_NBYTES + (counted.scales + counted.norms) * _SCALE_NBYTES
    held = rest * dtype.itemsize + counted.codes * per_weight + scales
    return BASE_NBYTES + held + backward_nbytes(view, length, dtype)


def _streamed_nbytes(
    view: Checkpoint,
    weights: Sequence[str],
    scales: int,
    options: DistilOptions,
    lengths: Sequence[int],
    context: Context,
) -> tuple[int, int]:
    """Peak bytes with one block in memory, and those of the tape on disk.

    Embeddings and head are counted twice, for the artifact's may not be the original's. A block has its weights, those
    that are read for the next one, their gradients and the codes of one linear; a window its graph, or the logits of
    both models.
    """
    dtype, length = compute_dtype(context.device), max(lengths)
    skeleton = Skeleton(view, context.device, dtype)
    check_start(skeleton, 1)
    plans = discover(skeleton, length)
    block = max(skeleton.block_nbytes(index) for index in range(skeleton.block_count))
    largest = max(numbers_of(view, name) for name in weights)
    logits = divergence_nbytes(length, skeleton.architecture.vocab_size, dtype)
    row = skeleton.hidden_size * dtype.itemsize
    tape = (skeleton.block_count + 2) * options.batch * length * row
    needed = BASE_NBYTES + tokenizer_nbytes(view) + 2 * skeleton.outer_nbytes(head=True) + 3 * block
    needed += largest * _LINEAR_NBYTES + _SCALE_NBYTES * scales
    needed += graph_nbytes(plans) + logits
    return needed + min(sum(lengths) * row, STATES_IN_MEMORY_NBYTES), tape


def _scales(original: Checkpoint, weights: Sequence[str], scheme: SchemeOrMix | None) -> int:
    """How many scales weights will have in a scheme, which may not be known yet."""
    if isinstance(scheme, Scheme):
        learned = 2 if scheme.number.minima else 1
        shapes = [original.infos[name].shape for name in weights]
        return sum(learned * rows * scheme.groups(columns) for rows, columns in shapes)
    return sum(numbers_of(original, name) for name in weights) // _LIKELY_GROUP
