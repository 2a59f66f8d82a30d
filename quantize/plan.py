"""Plan of a quantization: every linear's scheme and the artifact's layout, from names and shapes, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from llmconvert.engine.discovery import BlockPlan, Stop
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.statistics import hessian_nbytes
from llmconvert.engine.stream import Mode
from llmconvert.errors import CalibrationError, SchemeError, UnsupportedError
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.formats.coverage import check_coverage, narrow_linears
from llmconvert.quantize.formats.declared_names import DeclaredNames
from llmconvert.quantize.formats.experts import check_experts, gates_of
from llmconvert.quantize.formats.loading import asked_for, check_loadable, unloadable, unloadable_outer, what_is_left
from llmconvert.quantize.formats.outer import outer_schemes
from llmconvert.quantize.matrix import check_combination
from llmconvert.quantize.methods.base import BlockQuantizer, Quantizer, ScalingQuantizer
from llmconvert.quantize.methods.outer import outer_nbytes
from llmconvert.quantize.scheme import Override, Scheme, SchemeOrMix
from llmconvert.quantize.solve.group_scales import block_scales_nbytes
from llmconvert.quantize.solve.shared_scales import shares_divisor
from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES

__all__ = [
    "CacheKind",
    "Override",
    "QuantizationPlan",
    "QuantizeRequest",
    "RuntimeName",
    "ShownTokens",
    "Statistics",
    "plan_encoding",
    "plan_quantization",
    "with_cache",
    "work_nbytes",
]


#: Of what model a linear's moments are.
Statistics = Literal["sequential", "original"]
#: What a cache holds keys and values as: E4M3, one scale for a layer's keys and one for its values, or one by head.
CacheKind = Literal["fp8", "fp8-head"]
#: Which tokens of the text an expert is calibrated on.
ShownTokens = Literal["routed", "all"]
#: For which runtime alone an artifact is, where others need not load it.
RuntimeName = Literal["vllm"]


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What is asked for when a checkpoint is quantized.

    Attributes:
        method: a name in :data:`~llmconvert.quantize.catalog.methods.METHODS`.
        scheme: for every linear that no override names; or, in formats that have such, a mix of tensor types.
        format: a name in :data:`~llmconvert.quantize.catalog.formats.FORMATS`.
        overrides: other schemes by name pattern, first match wins.
        options: of the method.
        mode: lockstep or replay; chosen by the memory when None. The result is the same.
        name: of the model, for formats that store it; the output's by default.
        max_shard_bytes: size at which a new shard is begun.
        experts: which tokens an expert is calibrated on: those that the router sends it, or all of the layer.
        min_tokens_per_expert: with fewer tokens for an expert, by the original's routers, nothing is begun.
        text: what the calibration windows are of, for formats that store it.
        split_nbytes: of a file of a format that is one file (GGUF), above which another is begun; None for one.
        statistics: of what model the moments are: ``sequential`` of one whose linears before are quantized already,
            ``original`` of the unquantized one, which several artifacts can share.
        kv_cache: what keys and values are quantized to in the cache, by scales from calibration text; None for nothing.
        runtime: which one alone has to load the artifact; None for all that read the format, transformers first.
    """

    method: str
    scheme: SchemeOrMix
    format: str = "compressed-tensors"
    overrides: tuple[Override, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: Mode | None = None
    name: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    statistics: Statistics = "sequential"
    experts: ShownTokens = "routed"
    min_tokens_per_expert: int = 0
    kv_cache: CacheKind | None = None
    split_nbytes: int | None = None
    text: str = ""
    runtime: RuntimeName | None = None

    @property
    def fixes_inputs(self) -> bool:
        """Whether a scheme has calibration text fix how inputs are quantized."""
        schemes = (self.scheme, *(override.scheme for override in self.overrides))
        return any(isinstance(scheme, Scheme) and scheme.fixes_inputs for scheme in schemes)


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """The job's decisions.

    Attributes:
        schemes: module name of a linear → its scheme, in model order; linears left dense are not in it.
        sites: all linears in the blocks by their module names, dense ones too; and the embedding and the head where the
            format may have them quantized.
        kept: what runtimes call all linears left dense, the output head included, and whatever else of the checkpoint
            could be taken for one.
        specs: every tensor of the artifact, in the order of the source.
        declared: what ``config.json`` says about them.
        uncalibrated: linears with a scheme that a calibrated method has no inputs for, since the forward never calls
            them; they are rounded to nearest.
        left: what is said of linears that stay dense unasked, or that transformers loads dense.
        caches: attention modules whose keys and values get scales, by what the checkpoint calls them.
        cache_by_head: whether there is a scale for each head.
        layout: the format as it stores this model; None where it encodes every tensor by itself.
        head: the tensor of the output head, where it is encoded by what comes to the head on calibration text.
        sharing: linears that runtimes fuse and whose tensors have a float32 scale in common → all that have it.
    """

    schemes: Mapping[str, Scheme]
    sites: Mapping[str, Site]
    kept: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    declared: Mapping[str, Any]
    uncalibrated: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    cache_by_head: bool = False
    head: str | None = None
    layout: Format | None = None
    sharing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def outer(self) -> tuple[Site, ...]:
        """The embedding and the head, those of them that are quantized."""
        return tuple(site for name, site in self.sites.items() if site.is_outer and name in self.schemes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is otherwise than asked for, a sentence each."""
        notes: list[str] = []
        if self.uncalibrated:
            notes.append(
                f"{len(self.uncalibrated)} of {len(self.schemes)} linears take no part when text alone passes the "
                f"model ({self.uncalibrated[0]}, …); without inputs to be calibrated on they are rounded to nearest; "
                "an override with scheme: none keeps them"
            )
        return *notes, *self.left


def plan_quantization(
    skeleton: Skeleton,
    blocks: Sequence[BlockPlan],
    scheme: Scheme | Mapping[str, Scheme],
    overrides: Sequence[Override],
    method: Quantizer,
    layout: Format,
) -> QuantizationPlan:
    """Assign a scheme, one or those by tensors' names, to every linear of the blocks; the first override to match wins.

    Raises:
        SchemeError: a group size does not fit, an override matches nothing, or linears that are fused get two schemes.
        UnsupportedError: the format has no such scheme, the method no such codes, or the model no such linears.
        CalibrationError: the method is calibrated, and the forward calls none of the linears that are to be quantized.
    """
    usual = [scheme] if isinstance(scheme, Scheme) else scheme.values()
    for used in {*usual, *(override.scheme for override in overrides if override.scheme)}:
        check_combination(method, used, layout)
    prefixes = [skeleton.prefix(index) for index in range(skeleton.block_count)]
    sites = skeleton.sites
    turned = set() if layout.transposes else {name for name, site in sites.items() if site.transposed}
    linears = [{name: linear for name, linear in found.items() if name not in turned} for found in skeleton.linears]
    check_coverage(skeleton.model, skeleton.blocks, prefixes, linears)
    gates = gates_of(skeleton)
    asked = asked_for(skeleton, scheme, layout) if isinstance(scheme, Scheme) else frozenset()
    repeated = {name for block in blocks for name in block.repeated}
    narrow = narrow_linears(sites, scheme)
    # Linears of a multimodal model that text never reaches are for images, and stay as they are.
    idle = {name for block in blocks for name in block.unreached} if skeleton.reach.idle else set[str]()
    dense = gates | turned | repeated | narrow | idle
    own = {name: scheme if isinstance(scheme, Scheme) else scheme.get(site.tensor) for name, site in sites.items()}
    assigned = {name: Override.chosen((name,), None if name in dense else own[name], overrides) for name in sites}
    outer = outer_schemes(skeleton.outer, layout, scheme, overrides)
    dense_outer = [
        name for name, chosen in outer.items() if chosen and layout.check_outer(skeleton.outer[name], chosen)
    ]
    packed = {chosen for name, chosen in assigned.items() if chosen is not None and sites[name].kind == "linear"}
    packed |= {chosen for chosen in outer.values() if chosen is not None}
    said = layout.loaded_dense(packed) if asked or dense_outer else {}
    if dense_outer and not said:
        raise UnsupportedError(unloadable_outer(skeleton.outer[dense_outer[0]], outer[dense_outer[0]], packed))
    if asked and not said:
        dense |= asked
        assigned = {name: Override.chosen((name,), None if name in dense else own[name], overrides) for name in sites}
    check_experts(skeleton, assigned, method, layout)
    sites = {**sites, **{name: skeleton.outer[name] for name in outer}}
    assigned |= outer
    layout = layout.for_model({name: sites[name] for name, chosen in outer.items() if chosen}, dense=bool(said))
    _check_overrides(overrides, [word for site in sites.values() for word in site.called])
    for name, site in sites.items():
        chosen = assigned[name]
        if chosen is not None:
            chosen.check_fits(name, site.columns)
    if layout.fuses:
        alone = gates | asked | repeated | narrow
        _check_fused(blocks, {name: chosen for name, chosen in assigned.items() if name not in alone})
    aside = (name for block in blocks for name in (*block.unreached, *block.repeated))
    unreached = tuple(name for name in aside if assigned[name] is not None)
    fixed = next((name for name in unreached if (one := assigned[name]) is not None and one.fixes_inputs), None)
    if fixed is not None:
        raise SchemeError(
            f"scheme {assigned[fixed]}: calibration text fixes a scale for the inputs of a linear, and text never "
            f"passes {fixed} once (it is called for something else, or twice); give such linears fp8-dynamic, "
            "w4a16-g64 or none with an override"
        )
    calibrated = method.calibration != "none"
    if calibrated and unreached and len(unreached) == sum(chosen is not None for chosen in assigned.values()):
        raise CalibrationError(
            f"{unreached[0]}: the model's forward never calls this linear, nor any other that is to be quantized, so "
            "none can be calibrated; use rtn"
        )
    if asked and not any(assigned.values()):
        raise UnsupportedError(unloadable(skeleton.architecture.model_type, asked))
    if not any(assigned.values()):
        raise SchemeError("the overrides leave no linear to quantize")
    schemes = {name: chosen for name, chosen in assigned.items() if chosen is not None}
    check_loadable(skeleton, [sites[name] for name in schemes], layout)
    quantized: dict[str, list[tuple[Site, Scheme]]] = {}
    for name, chosen in schemes.items():
        quantized.setdefault(sites[name].tensor, []).append((sites[name], chosen))
    specs: list[TensorSpec] = []
    for name, info in skeleton.checkpoint.infos.items():
        for site, chosen in quantized.get(name, ()):
            specs += layout.specs(site.stored, site.shape, chosen, layout.scale_dtype(chosen, skeleton.dtype))
        if name not in quantized:
            specs.append(TensorSpec(name, info.dtype, info.shape))
    names = DeclaredNames.of(skeleton)
    declared = {called: chosen for name, chosen in schemes.items() for called in names.of_site(sites[name])}
    kept = names.kept([sites[name] for name, chosen in assigned.items() if chosen is None], declared)
    config = {**layout.quantization_config(declared, kept), **said}
    left = what_is_left(sites, schemes, asked, repeated, narrow, dense=bool(said))
    unmet = unreached if calibrated else ()
    sharing = _sharing(blocks, schemes)
    return QuantizationPlan(schemes, sites, kept, tuple(specs), config, unmet, left, layout=layout, sharing=sharing)


def with_cache(plan: QuantizationPlan, skeleton: Skeleton, layout: Format, kind: CacheKind) -> QuantizationPlan:
    """The plan with scales of an FP8 cache for every layer that attends.

    Raises:
        UnsupportedError: the format holds no such scales, or the model has another kind of cache.
    """
    by_head = kind == "fp8-head"
    declared = layout.cache_config(by_head=by_head)
    if declared is None:
        raise UnsupportedError("kv_cache: this format holds no scales of a cache; use format: compressed-tensors")
    caches = tuple(skeleton.watch_caches())
    if not caches or skeleton.architecture.latent_size:
        raise UnsupportedError(
            f"kv_cache: architecture {skeleton.architecture.model_type!r} hands no keys and values to a cache that "
            "runtimes quantize by scales of an artifact (latent attention, or none); leave it out"
        )
    parts = [f"{name}.{part}" for name in caches for part in ("k_scale", "v_scale")]
    shape = (skeleton.architecture.kv_heads, 1, 1) if by_head else (1,)
    specs = (*plan.specs, *(TensorSpec(name, skeleton.dtype, shape) for name in parts))
    declared = {**plan.declared, "kv_cache_scheme": declared}
    return replace(plan, specs=specs, declared=declared, caches=caches, cache_by_head=by_head)


def plan_encoding(skeleton: Skeleton) -> QuantizationPlan:
    """A plan that chooses nothing: the artifact's container encodes every tensor in the type that it has there."""
    return QuantizationPlan({}, skeleton.sites, (), (), {})


def work_nbytes(
    skeleton: Skeleton, blocks: Sequence[BlockPlan], plan: QuantizationPlan, method: Quantizer, dtype: torch.dtype
) -> int:
    """Peak bytes of the statistics and the solution of the most demanding stop.

    With ``n`` columns and ``r`` rows in all, GPTQ needs ``4 n²`` for the Hessian, which is permuted and factorized in
    place, and beside it what :func:`~llmconvert.engine.statistics.hessian_nbytes` states for a chunk of tokens or
    :meth:`~llmconvert.quantize.methods.gptq.Gptq.nbytes` in ``r · n``; with the original's inputs too, a chunk of
    those and another ``4 n²``, or ``4 r n`` and a chunk of the outputs where these add to the residual stream. A data-
    free method takes one linear at a time, whose weight is read for it, and a block-wise one all linears of a
    block. A method that moves scales gathers the Hessians of all stops at once.
    """
    sites = skeleton.sites
    needs = [0, *(outer_nbytes(site, method, dtype) for site in plan.outer)]
    alone: set[tuple[int, int]] = set()
    for block in blocks:
        if isinstance(method, BlockQuantizer):
            # Experts are blocks of their own, one at a time.
            parts: dict[tuple[str, int], int] = {}
            for site in (sites[name] for stop in block.stops for name in stop.linears):
                part = (site.layer, site.expert) if site.kind == "expert" else ("", 0)
                parts[part] = parts.get(part, 0) + site.weights
            needs.append(method.block_nbytes(max(parts.values(), default=0), block.peak_nbytes))
            continue
        if isinstance(method, ScalingQuantizer):
            needs.append(_scaling_nbytes(block, sites, method, dtype))
        for stop in block.stops:
            heights = [sites[name].rows for name in stop.linears if name in plan.schemes]
            columns = stop.columns
            if method.calibration == "none":
                alone |= {(rows, columns) for rows in heights}
            elif heights:
                aimed = sum(heights) if method.original and stop.residual is not None else 0
                matrices = 4 * columns * (columns * (2 if method.original and not aimed else 1) + aimed)
                scales = _scales_nbytes(plan, stop, sites)
                solution = matrices + method.nbytes(sum(heights), columns) + scales
                if isinstance(method, ScalingQuantizer):  # rescaled weights in float32, and one more as it is made
                    solution += 8 * sum(heights) * columns
                statistics = hessian_nbytes(columns, dtype, original=method.original, aimed=aimed)
                # The layer's moments, for experts that no token reaches, stand beside their copy.
                drawn = statistics if sites[stop.linears[0]].kind == "expert" else 0
                needs.append(drawn + max(statistics, solution))
    needs += [rows * columns * dtype.itemsize + method.nbytes(rows, columns) for rows, columns in alone]
    return max(needs)


def _scales_nbytes(plan: QuantizationPlan, stop: Stop, sites: Mapping[str, Site]) -> int:
    """Bytes of the scales of GGML's types, twice: those of slices of rows stand beside what they are joined to."""
    chosen = {name: plan.schemes[name] for name in stop.linears if name in plan.schemes}
    return 2 * sum(block_scales_nbytes(scheme, *sites[name].shape) for name, scheme in chosen.items())


def _scaling_nbytes(block: BlockPlan, sites: Mapping[str, Site], method: ScalingQuantizer, dtype: torch.dtype) -> int:
    # Of experts those of one are held at a time, beside those of what all of a layer receive.
    ordinary = [stop for stop in block.stops if sites[stop.linears[0]].kind == "linear"]
    widths = [stop.columns for stop in ordinary]
    experts = {stop.columns for stop in block.stops if sites[stop.linears[0]].kind == "expert"}
    widths += [*experts, *experts] if method.moments else []
    if method.moments:
        held = sum(hessian_nbytes(columns, dtype) for columns in widths)
    else:
        held = sum(12 * columns for columns in widths)
    # A batch gives whole tokens, which makes twice as many of them at most.
    held += 2 * method.sample_tokens * dtype.itemsize * sum(widths)
    heights = {stop: sum(sites[name].rows for name in stop.linears) for stop in block.stops}
    return held + max((method.scales_nbytes(rows, stop.columns) for stop, rows in heights.items()), default=0)


def _check_overrides(overrides: Sequence[Override], linears: Iterable[str]) -> None:
    for override in overrides:
        if not any(fnmatchcase(name, override.match) for name in linears):
            example = next(iter(linears), "none")
            raise SchemeError(f"override {override.match!r} matches no linear of this model; they look like {example}")


def _sharing(blocks: Sequence[BlockPlan], schemes: Mapping[str, Scheme]) -> dict[str, tuple[str, ...]]:
    """Linears of one module with one input, where their schemes have a float32 scale for what is fused.

    Of those that the forward never calls nothing says what they share; all of a module have it in common then.
    """
    found: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        for linears in (*(stop.linears for stop in block.stops), block.unreached, block.repeated):
            groups: dict[tuple[str, Scheme], list[str]] = {}
            for name in linears:
                if (scheme := schemes.get(name)) is not None and shares_divisor(scheme):
                    groups.setdefault((name.rpartition(".")[0], scheme), []).append(name)
            found |= {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}
    return found


def _check_fused(blocks: Sequence[BlockPlan], assigned: Mapping[str, Scheme | None]) -> None:
    for block in blocks:
        for stop in block.stops:
            schemes = {str(assigned[name] or "none") for name in stop.linears if name in assigned}
            if len(schemes) > 1:
                raise SchemeError(
                    f"{', '.join(stop.linears)} share one input and are fused by runtimes, so they need one scheme; "
                    f"the overrides give them {', '.join(sorted(schemes))}"
                )
