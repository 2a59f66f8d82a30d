"""The memory and disk that a distillation takes: known from headers, refused before the work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.engine.backward import graph_nbytes
from llmconvert.engine.coroutine import check_start
from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import BASE_NBYTES, tokenizer_nbytes
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import STATES_IN_MEMORY_NBYTES
from llmconvert.needs import Needs
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.requirements import Counted, numbers_of, require_single_experts, require_still_experts
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.loss import divergence_nbytes
from llmconvert.training.needs import backward_nbytes, fits, require_memory

__all__ = ["DistilMemory", "distil_memory", "foresee_distil", "needs_of", "state_nbytes", "visit_groups"]

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
# And per linear: tensors of a few KB that stay, between which the heap keeps holes.
_KEPT_NBYTES = 64 << 10
# Of a mixture: what windows that go through the model together bring to a layer's experts, and get from them.
_VISITS_NBYTES = 128 << 20
# And products that are compiled for the numbers of tokens that experts are sent.
_PRODUCTS_NBYTES = 32 << 20


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
        UnsupportedError: the model is a mixture of experts, and the options ask for all of it in memory, or a file
            would have its experts in a way in which they can't be learned.
        CapacityError: memory does not suffice.
    """
    skeleton = Skeleton(original, context.device, compute_dtype(context.device))
    require_still_experts(skeleton, options)
    sites = skeleton.sites.values()
    if outer:  # where a class reads no experts one by one, neither does it from such a file
        require_single_experts(skeleton, {site.tensor for site in sites if not site.named_alone})
    windows = options.steps * options.batch + options.held_out
    codes, scales = sum(site.weights for site in sites), _scales(sites, scheme)
    groups = codes // _LEAST_GROUP if outer else scales
    apart = sum(numbers_of(original, site.tensor) for site in skeleton.outer.values()) if outer else 0
    counted = Counted(codes, groups, scales, 0, apart)
    largest = max(site.weights for site in sites)
    memory = distil_memory(skeleton, largest, counted, options, [length] * windows, context)
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


def distil_memory(
    skeleton: Skeleton,
    largest: int,
    counted: Counted,
    options: DistilOptions,
    lengths: Sequence[int],
    context: Context,
) -> DistilMemory:
    """What distillation takes: both models in memory, or, where these do not fit, one block of them at a time.

    Mixtures are taken block by block in any case, and one expert at a time.

    Args:
        skeleton: of the artifact as dense weights, or of the original before it is quantized; in the dtype that is
            computed in.
        largest: numbers of the largest matrix whose scales are trained.
        counted: what that comes to.
        options: how.
        lengths: tokens of every window.
        context: device and memory.

    Raises:
        CapacityError: neither fits, or both models do not and the options ask for them.
        UnsupportedError: the model's last blocks need more of earlier ones than hidden states.
    """
    resident = _resident_nbytes(skeleton.checkpoint, counted, options, max(lengths), context)
    activations = backward_nbytes(skeleton.checkpoint, max(lengths), compute_dtype(context.device))
    parts = f"both models with what they share held once, the optimizer, {activations / 1e6:,.0f} MB of activations"
    advice = (
        "use shorter windows (quantize.distil.length), take a machine with more memory, or leave out quantize.distil"
    )
    if options.whole:
        without = " and ".join(f"{key} (quantize.distil.{key}: 0)" for key in options.whole)
        advice = f"without {without} one block at a time is enough; or {advice}"
    mixture = any(skeleton.experts)
    if not mixture and (options.whole or fits(resident, context)):
        require_memory(resident, "distillation", parts, advice, context)
        return DistilMemory(resident)
    streamed, tape = _streamed_nbytes(skeleton, largest, counted.scales, options, lengths)
    parts = f"a block of each model, {'an expert, ' if mixture else ''}their heads, what is learned"
    require_memory(streamed, "distillation", parts, advice, context)
    return DistilMemory(streamed, tape, streamed=True)


def _resident_nbytes(view: Checkpoint, counted: Counted, options: DistilOptions, length: int, context: Context) -> int:
    dtype = compute_dtype(context.device)
    rest = sum(numbers_of(view, name) for name in view.infos) - counted.codes + counted.apart
    per_weight = 3 * dtype.itemsize + _CODE_NBYTES + (_MOVING_NBYTES if options.code_rate else 0)
    scales = counted.groups * _GROUP_NBYTES + (counted.scales + counted.norms) * _SCALE_NBYTES
    held = rest * dtype.itemsize + counted.codes * per_weight + scales
    return BASE_NBYTES + tokenizer_nbytes(view) + held + backward_nbytes(view, length, dtype)


def _streamed_nbytes(
    skeleton: Skeleton, largest: int, scales: int, options: DistilOptions, lengths: Sequence[int]
) -> tuple[int, int]:
    """Peak bytes with one block in memory, and those of the tape on disk.

    Embeddings and head are counted twice, for the artifact's may not be the original's. A block has its weights, those
    that are read for the next one, their gradients and the codes of one linear; a window its graph, or the logits of
    both models. An expert has its weights, the parts that they are put together of, and their gradients, and takes
    turns with others: what grows with how many there are is what is learned.
    """
    dtype, length = skeleton.dtype, max(lengths)
    check_start(skeleton, 1)
    plans = discover(skeleton, length)
    block = max(skeleton.block_nbytes(index) for index in range(skeleton.block_count))
    logits = divergence_nbytes(length, skeleton.architecture.vocab_size, dtype)
    row = skeleton.hidden_size * dtype.itemsize
    tape = (skeleton.block_count + 2) * options.batch * length * row
    needed = BASE_NBYTES + tokenizer_nbytes(skeleton.checkpoint) + 2 * skeleton.outer_nbytes(head=True) + 3 * block
    needed += skeleton.expert_nbytes() * 3 // 2 + (_PRODUCTS_NBYTES if any(skeleton.experts) else 0)
    needed += largest * _LINEAR_NBYTES + _SCALE_NBYTES * scales + _KEPT_NBYTES * len(skeleton.sites)
    needed += graph_nbytes(plans) + logits
    together = max(sum(lengths[group.start : group.stop]) for group in visit_groups(skeleton, lengths))
    needed += skeleton.visit_nbytes(together + length, held=True)
    return needed + min(sum(lengths) * row, STATES_IN_MEMORY_NBYTES), tape


def visit_groups(skeleton: Skeleton, lengths: Sequence[int]) -> list[range]:
    """Windows that go through a model together, by number: all of them, where they needn't wait for experts.

    What waits is held to a bound that does not grow with the text, or to one window.
    """
    groups, tokens = [range(0, 1)], lengths[0]
    for number, length in enumerate(lengths[1:], 1):
        tokens += length
        if skeleton.visit_nbytes(tokens, held=True) <= _VISITS_NBYTES:
            groups[-1] = range(groups[-1].start, number + 1)
        else:
            groups.append(range(number, number + 1))
            tokens = length
    return groups


def _scales(sites: Iterable[Site], scheme: SchemeOrMix | None) -> int:
    """How many scales these will have in a scheme, which may not be known yet."""
    if isinstance(scheme, Scheme):
        learned = 2 if scheme.number.minima else 1
        return sum(learned * site.rows * scheme.groups(site.columns) for site in sites)
    return sum(site.weights for site in sites) // _LIKELY_GROUP
