"""What a stage will need and make, known before it is built; of a quantization exact sizes, or a budget's bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llmconvert.context import Context
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.needs import Needs
from llmconvert.quantize.catalog.methods import needs_calibration
from llmconvert.quantize.formats.base import FileFormat, load_format
from llmconvert.quantize.formats.experts import for_vllm_alone
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.passes.run import QuantizePlan
from llmconvert.quantize.plan import Override, QuantizeRequest, Statistics
from llmconvert.quantize.rotate import rotate_checkpoint
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.quantize.serving.fused_blocks import cut_at_seams
from llmconvert.quantize.serving.kernel_groups import unusual_groups
from llmconvert.quantize.serving.tensor_parallel import Matrix, tensor_parallel
from llmconvert.recipes.schema.recipe import BudgetSettings, QuantizeSettings
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import Layout

__all__ = [
    "Forecast",
    "engine_budget",
    "files_of_layout",
    "foresee_quantization",
    "parameters",
    "require_repairable",
    "served_by",
]

_NO_HEAD = (
    "of SGLang it is reported that it takes a quantized head of compressed-tensors for a dense one, without a word, "
    "and computes noise (sgl-project/sglang, issue 35358)"
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a stage will need of the machine, and what it will make.

    Attributes:
        needs: peak memory while it runs, disk of what it leaves, and download.
        files: weight files by name → bytes.
        least: bytes of the weight files at least, where ``files`` are the most they can be; None where they are exact.
        tensors: in those files.
        model: what it makes as later stages will see it, its tensors still to be computed; None of what is no model, or
            looks like what it was made from.
        kind: what other stages with this kind have taken time for; of one kind, time is in proportion to ``work``.
        work: how much there is to do, in units that only stages of the same kind share.
        solving: bytes of the memory that a pass takes once more for each artifact that it makes beside this one.
        readers: which runtimes read what it makes; empty where that is not the question.
        notes: what else to know, a sentence each.
    """

    needs: Needs = field(default_factory=Needs)
    files: Mapping[str, int] = field(default_factory=dict)
    least: int | None = None
    tensors: int = 0
    model: Checkpoint | None = None
    kind: str = ""
    work: float = 0.0
    solving: int = 0
    readers: str = ""
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the weight files, at most."""
        return sum(self.files.values())


def files_of_layout(layout: Layout) -> dict[str, int]:
    """The weight files of a layout, and its index where it has one."""
    files = {shard.name: shard.nbytes for shard in layout.shards}
    return files | ({"model.safetensors.index.json": len(layout.index)} if layout.index else {})


def parameters(checkpoint: Checkpoint) -> int:
    """Numbers in a checkpoint's tensors."""
    return sum(info.nbytes // info.dtype.itemsize for info in checkpoint.infos.values())


def require_repairable(sites: Iterable[Site], runtime: str | None) -> None:
    """Refuse repair of a model by what can be quantized in it.

    Args:
        sites: what can be.
        runtime: the only one that will load the artifact, if it is made so.

    Raises:
        UnsupportedError: other linears than experts can't be quantized anew beside its experts.
    """
    experts = (site for site in sites if site.experts is not None)
    found = next((site for site in experts if runtime is not None or (site.experts and site.experts.apart)), None)
    if found is not None:
        why = (
            "are no linears where transformers loads dense ones" if runtime is None else f"are read by {runtime} alone"
        )
        raise UnsupportedError(
            f"validate.repair: the model is a mixture whose experts ({found.name}, for one) {why}, so nothing can be "
            "quantized anew beside them in a finished artifact; leave repair out, and give more bits with "
            "quantize.overrides or a quantize.budget"
        )


def engine_budget(settings: BudgetSettings) -> Budget:
    """The section as the engine takes it."""
    types = None if settings.types is None else tuple(kind.name for kind in settings.types)
    return Budget(settings.bits_per_weight, settings.bits, settings.group_sizes, settings.max_bytes, types)


def foresee_quantization(
    source: Checkpoint,
    output: Path,
    settings: QuantizeSettings,
    overrides: tuple[Override, ...],
    *,
    name: str,
    windows: Sequence[torch.Tensor],
    context: Context,
    statistics: Statistics = "sequential",
    repaired: bool = False,
    build: Callable[..., Skeleton] = Skeleton,
) -> Forecast:
    """What :func:`llmconvert.recipes.stages.quantization.quantize` would need and make.

    Args:
        repaired: whether it is repaired if need be.
        build: builds the model on shapes.

    Raises:
        LlmconvertError: whatever it would refuse before its work.
    """
    if settings.rotate is not None:
        source = rotate_checkpoint(source, **settings.rotate.model_dump())
    tokens = sum(window.shape[1] for window in windows)

    def plan_with(scheme: SchemeOrMix) -> QuantizePlan:
        request = QuantizeRequest(settings.method, scheme, settings.format, overrides, settings.options, name=name)
        request = replace(request, statistics=statistics, experts=settings.experts or "routed")
        request = replace(request, min_tokens_per_expert=settings.min_tokens_per_expert or 0)
        request = replace(request, kv_cache=settings.kv_cache, runtime=settings.runtime)
        request = replace(request, split_nbytes=settings.split_max_size)
        plan = plan_quantize(source, output, request, windows=windows, context=context, build=build)
        if repaired and not isinstance(load_format(settings.format), FileFormat):  # a file is quantized as a whole
            require_repairable(plan.decisions.sites.values(), settings.runtime)
        return plan

    kind = " ".join(
        ("quantize", settings.method, *map(str, sorted(settings.options.items())), context.device.type)
        + (("gguf",) if settings.format == "gguf" else ())
        + (("rotated",) if settings.rotate is not None else ())
        # Text that a scheme or a cache wants passes through the model, whatever the method does without.
        + (("with text",) if tokens and not needs_calibration(settings.method) else ())
        + ((f"by {context.ranks.count}",) if not context.ranks.alone else ())
    )
    if settings.budget is None:
        plan = plan_with(settings.scheme)
        return Forecast(
            plan.needs,
            files_of_layout(plan.container.layout),
            tensors=len(plan.container.layout.specs),
            kind=kind,
            work=_work(plan, tokens),
            solving=plan.inputs.work,
            readers=str(plan.readers),
            notes=(*plan.container.notes, *served_by(plan)),
        )
    from llmconvert.quantize.mixed_precision.job import plan_choice  # plans without a budget don't wait for it

    scheme, budget = settings.scheme, settings.budget
    choice = plan_choice(
        source,
        output.with_name(f".{output.name}.sensitivity"),
        engine_budget(budget),
        QuantizeRequest(settings.method, scheme, settings.format, overrides, settings.options),
        windows=windows,
        context=context,
    )
    note = f"bits by layer are chosen by measured sensitivity, {_limit(budget)} at most"
    if not isinstance(scheme, Scheme):
        mixed = plan_with(scheme)
        bottom, top = choice.nbytes
        return Forecast(
            choice.needs.then(mixed.needs),
            {mixed.container.layout.shards[0].name: top},
            least=bottom,
            tensors=len(mixed.container.layout.specs),
            kind=f"{kind} budget",
            work=_work(mixed, tokens),
            readers=str(mixed.readers),
            notes=(note, *mixed.container.notes),
        )
    symmetry = "" if scheme.symmetric else "-asym"
    # One scale per channel takes the least of all groupings, and fits every layer; the smallest groups take the most.
    coarse = [f"g{size}" for size in sorted(budget.group_sizes, reverse=True)]
    low, high = (pick(budget.bits, key=_width) for pick in (min, max))
    fine = str(high) if isinstance(high, Scheme) else f"w{high}a16-g{min(budget.group_sizes)}{symmetry}"
    fewest = [f"w{low}a16-{group}{symmetry}" for group in ("channel", *coarse)]
    try:
        least = _first([str(low)] if isinstance(low, Scheme) else fewest, plan_with)
    except (SchemeError, UnsupportedError):  # only what is chosen goes together, which is not known yet
        if repaired:
            raise
        return Forecast(choice.needs, notes=(note,))
    try:
        most = plan_with(Scheme.parse(fine))
        largest = min(most.container.layout.nbytes, _largest(least, source, budget))
    except SchemeError:  # layers that these groups don't divide get others; the budget bounds all of them
        most, largest = least, _largest(least, source, budget)
    smallest = min(least.container.layout.nbytes, largest)
    needs = choice.needs.then(most.needs)
    return Forecast(
        needs,
        {shard.name: shard.nbytes for shard in most.container.layout.shards}
        if len(most.container.layout.shards) > 1
        else {most.container.layout.shards[0].name: largest},
        least=smallest,
        tensors=len(least.container.layout.specs),
        kind=f"{kind} budget",
        work=_work(least, tokens),
        readers=str(least.readers),
        notes=(note,),
    )


def _width(option: int | Scheme) -> int:
    return option.bits if isinstance(option, Scheme) else option


def served_by(plan: QuantizePlan) -> tuple[str, ...]:
    """Which runtimes are known not to load the artifact, or to load it wrongly, over how many devices it can be split,
    and which groups would do better; nothing of formats that runtimes split in other ways."""
    if isinstance(load_format(plan.request.format), FileFormat):
        return ()
    schemes = plan.decisions.schemes
    sites = plan.decisions.sites.items()
    matrices = [Matrix(name, site.rows, site.columns, schemes.get(name)) for name, site in sites]
    found = tensor_parallel(plan.inputs.skeleton.architecture, matrices)
    alone = for_vllm_alone(plan.decisions.sites[name] for name in schemes)
    seams = cut_at_seams(matrices)
    split = seams or f"can be split {found}"
    outer = (_NO_HEAD,) if plan.decisions.outer and plan.request.format == "compressed-tensors" else ()
    groups = unusual_groups(schemes.values())
    better = found.warning if not seams else ""
    return (*alone, *outer, split, *(note for note in (better, groups) if note))


def _first(schemes: Sequence[str], plan_with: Callable[[SchemeOrMix], QuantizePlan]) -> QuantizePlan:
    """The plan with the first scheme that format and layers take.

    Raises:
        UsageError: none of them goes; what the last one lacks.
    """
    *others, last = schemes
    for scheme in others:
        with suppress(SchemeError, UnsupportedError):
            return plan_with(Scheme.parse(scheme))
    return plan_with(Scheme.parse(last))


def _limit(budget: BudgetSettings) -> str:
    if budget.max_bytes is not None:
        return f"{budget.max_bytes:,} bytes"
    return f"{budget.bits_per_weight:g} per weight"


def _largest(plan: QuantizePlan, source: Checkpoint, budget: BudgetSettings) -> int:
    return budget.max_bytes or int(_within(plan, source, budget.bits_per_weight or 0.0))


def _within(plan: QuantizePlan, source: Checkpoint, bits: float) -> float:
    """Bytes of an artifact whose quantized linears take so many bits per weight, scales included."""
    chosen = [plan.decisions.sites[name] for name in plan.decisions.schemes]
    quantized = {site.tensor for site in chosen}
    dense = sum(info.nbytes for name, info in source.infos.items() if name not in quantized)
    headers = plan.container.layout.nbytes - sum(spec.nbytes for spec in plan.container.layout.specs.values())
    return dense + headers + bits * sum(site.weights for site in chosen) / 8


def _work(plan: QuantizePlan, tokens: int) -> float:
    """Products of the forward pass and of the solution, up to a factor: weights by tokens and columns."""
    sites = plan.decisions.sites.values()
    if not tokens:
        return float(sum(site.weights for site in sites))
    return float(sum(site.weights * (tokens + 2 * site.columns) for site in sites))
