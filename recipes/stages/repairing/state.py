"""What a repair knows of an artifact: what its linears are stored in now, their errors, and what these cost."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from llmconvert.engine.skeleton import Skeleton
from llmconvert.gguf.architectures.decoder import find_decoder
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.ggml.mix import FLOATS, MIXES, GgmlType
from llmconvert.gguf.split import gguf_models
from llmconvert.quantize.formats.base import FileFormat, load_format
from llmconvert.quantize.methods.base import load_method, load_quantizer
from llmconvert.quantize.methods.imatrix import weighs
from llmconvert.quantize.mixed_precision.units import FusedUnit, Storage, outer_tensors, units_of
from llmconvert.quantize.plan import Override, plan_quantization
from llmconvert.quantize.requantize import Assignment, trace
from llmconvert.quantize.scheme import Scheme, SchemeOrMix
from llmconvert.recipes.forecast import require_repairable
from llmconvert.recipes.schema.recipe import OverrideSettings, QuantizeSettings
from llmconvert.recipes.stages.budget import layer_overrides
from llmconvert.recipes.stages.stage import Finished
from llmconvert.report.report import Report
from llmconvert.report.steps import QuantizeReport
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.validate.repair import TYPE_ERRORS, Unit, sensitivities, unit_error

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """What the artifact is stored in now, and what is known about its linears.

    Attributes:
        settings: of what was made, without a budget once it has chosen.
        storage: what method and format can do.
        units: what can have a scheme of its own.
        assignment: linear, ``head`` or ``embedding`` → what it is stored in; None for floats.
        records: what the inventory calls their tensors.
        stored: names of linears by what the report of a quantization calls them.
        tensors: in the artifact.
        in_place: whether tensors of the artifact can be exchanged; a file is quantized again as a whole.
        errors: linear → squared relative error of its output, where the method knows it.
        costs: of each unit, what its squared error costs.
    """

    settings: QuantizeSettings
    storage: Storage
    units: tuple[FusedUnit, ...]
    assignment: Assignment
    records: Mapping[str, str]
    stored: Mapping[str, str]
    tensors: int
    in_place: bool
    errors: dict[str, float] = field(default_factory=dict)
    costs: list[float] = field(default_factory=list)

    @classmethod
    def begin(
        cls, source: Checkpoint, settings: QuantizeSettings, made: Finished[QuantizeReport], device: torch.device
    ) -> State:
        """What is known of an artifact that was made by these settings from a source."""
        skeleton, blocks = trace(source, device)
        layout = load_format(settings.format)
        sites = skeleton.sites
        stored = {site.stored: name for name, site in sites.items()}
        units = units_of(skeleton, blocks, layout)
        if isinstance(layout, FileFormat):
            settings = _settled(settings, made)
            method = load_method(settings.method, settings.options)
            types = layout.types(source, settings.scheme, layer_overrides(settings), importance=weighs(method))
            kinds = {tensor: kind for tensor, kind in types.linears.items() if kind not in FLOATS}
            decoder = find_decoder(source)
            called = {actual: name for name, actual in decoder.names.items()} if decoder.others else {}
            tensors = {name: site.tensor for name, site in sites.items()} | {**outer_tensors(skeleton)}
            return cls(
                settings,
                Storage(method, layout, skeleton.dtype),
                units,
                {name: Scheme.of_block(kinds[one]) if one in kinds else None for name, one in tensors.items()},
                {name: called.get(one, one) for name, one in tensors.items()},
                stored,
                len(types.stored),
                in_place=False,
            )
        require_repairable(sites.values(), settings.runtime)
        assert isinstance(settings.scheme, Scheme)  # recipes with another kind are refused
        quantizer, overrides = load_quantizer(settings.method, settings.options), layer_overrides(settings)
        if settings.budget is not None:
            overrides = _as_made(skeleton, made.details)
        plan = plan_quantization(skeleton, blocks, settings.scheme, overrides, quantizer, layout)
        return cls(
            settings,
            Storage(quantizer, layout, skeleton.dtype),
            units,
            {name: plan.schemes.get(name) for name in plan.sites},
            {name: site.tensor for name, site in plan.sites.items()},
            stored,
            len(plan.specs),
            in_place=True,
        )

    def after(self, changes: Assignment) -> State:
        """The same with other schemes for some."""
        settings = self.settings if self.in_place else self.settings_with(changes)
        return replace(self, settings=settings, assignment={**self.assignment, **changes})

    def settings_with(self, changes: Assignment) -> QuantizeSettings:
        """The settings with overrides for what changes, before those that there are."""
        outer = set(changes) & set(_WORDS)
        if outer and not set(_WORDS) <= set(self.assignment):  # one matrix is both, by either word
            outer = set(_WORDS)
        own = [Override(_exactly(name), scheme) for name, scheme in changes.items()]
        kept = [one for one in layer_overrides(self.settings) if one.match not in outer]
        return _with_overrides(self.settings, self.settings.scheme, [*own, *kept])

    def learn(self, made: QuantizeReport) -> None:
        """Take note of the output errors that a stage reports."""
        for linear in made.linears:
            if linear.error is not None and linear.name in self.stored:
                self.errors[self.stored[linear.name]] = linear.error

    def weigh(self, report: Report) -> None:
        """Take note of what errors cost, from the report on the artifact before any repair."""
        self.costs.extend(sensitivities(report, [unit.linears for unit in self.units], self._known_errors(report)))

    def units_now(self, report: Report) -> list[Unit]:
        """The units as they are stored now, ``report`` being the last."""
        errors = self._known_errors(report)
        return [
            Unit(
                unit.linears,
                unit.shapes,
                self.assignment[unit.linears[0]],
                cost * unit_error(unit.linears, errors),
                fixed=unit.experts,
            )
            for unit, cost in zip(self.units, self.costs, strict=True)
        ]

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        """Whether a linear of that shape can have the scheme beside what the others have."""
        others = {str(other): other for other in self.assignment.values() if other is not None}
        return self.storage.accepts(scheme, shape, tuple(others.values()))

    def _known_errors(self, report: Report) -> Mapping[str, float]:
        """Squared relative errors of the linears: of their outputs, or else of their weights.

        Those of embedding and head are of their weights: what the embedding gives are its weights. Where norms have
        moved, the inventory has none, and what their types usually leave stands for them.
        """
        inventory = report.check("inventory")
        found = inventory.detail.get("tensors", ()) if inventory is not None else ()
        by_tensor = {record["name"]: record["error"] for record in found}
        by_weight = {name: (by_tensor.get(tensor) or 0.0) ** 2 for name, tensor in self.records.items()}
        if not self.errors:
            return by_weight
        outer: dict[str, float] = {}
        for word in set(_WORDS) & set(self.records):
            scheme = self.assignment[word]
            usual = TYPE_ERRORS[scheme.block] if scheme is not None and scheme.block is not None else 0.0
            outer[word] = usual if by_tensor.get(self.records[word]) is None else by_weight[word]
        return {**outer, **self.errors}


# What overrides call the matrices outside the blocks.
_WORDS = ("head", "embedding")


def _as_made(skeleton: Skeleton, made: QuantizeReport) -> list[Override]:
    """What a budget has chosen, from what the artifact's stage reports of its linears."""
    schemes = {linear.name: Scheme.parse(linear.scheme) for linear in made.linears}
    return [Override(glob.escape(site.name), schemes.get(site.stored)) for site in skeleton.sites.values()]


def _settled(settings: QuantizeSettings, made: Finished[QuantizeReport]) -> QuantizeSettings:
    """The settings of a file with what a budget has chosen for it in the place of the budget."""
    chosen = made.details.budget
    if chosen is None:
        return settings
    with open_gguf(gguf_models(made.model)[0]) as file:
        number = vars(file)["general"]["general.file_type"]
    mix = next(mix for mix in MIXES.values() if mix.file_type == number)
    own = [
        Override(_exactly(name), Scheme.of_block(unit.scheme.upper())) for unit in chosen.units for name in unit.linears
    ]
    return _with_overrides(settings, mix, [*layer_overrides(settings), *own])


def _with_overrides(settings: QuantizeSettings, scheme: SchemeOrMix, overrides: Sequence[Override]) -> QuantizeSettings:
    """The settings with these overrides alone, as a recipe would have them."""
    given = tuple(
        OverrideSettings(match=one.match, scheme="none" if one.scheme is None else _recipe_value(one.scheme))
        for one in overrides
    )
    return settings.model_copy(
        update={"scheme": scheme, "budget": None, "head": None, "embedding": None, "overrides": given}
    )


def _recipe_value(scheme: Scheme) -> Scheme | GgmlType:
    return scheme if scheme.block is None else GgmlType(scheme.block)


def _exactly(name: str) -> str:
    return name if name in _WORDS else glob.escape(name)
