"""What each step of a run has to report: the cast, the attention rewrite, its healing, the quantization.

Every job returns one of these, so the report holds what the job said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator

from llmconvert.report.section import Section, Value

__all__ = [
    "AttentionReport",
    "BudgetReport",
    "DistilReport",
    "DtypeReport",
    "ExpertsReport",
    "HealReport",
    "LayerReport",
    "LinearReport",
    "QuantizeReport",
    "Step",
    "StepDetails",
    "UniformReport",
    "UnitReport",
    "read_details",
]


def _is_empty(value: object) -> bool:
    return not value


def _is_none(value: object) -> bool:
    return value is None


class StepDetails(Value):
    """What a step says of itself; ``sections`` are its tables and plots, which the report keeps beside the details."""

    sections: tuple[Section, ...] = Field(default=(), exclude_if=_is_empty)


class DtypeReport(StepDetails):
    """A conversion to another dtype.

    Attributes:
        dtype: the target, as ``config.json`` spells it.
        tensors: tensors written.
        cast: those of them whose dtype changed.
        bytes_read: bytes of tensor data read.
        bytes_written: bytes of all files written.
        seconds: wall time, until everything was on disk.
        largest_relative_error: largest ``|cast(x) - x| / |x|``; 0 when nothing was rounded.
        largest_error_tensor: where that was, None when nothing was rounded.
        clipped: values beyond the target's range that were clipped.
        underflows: values other than zero that became zero.
        non_finite: NaN and infinities of the source, written as they were.
        non_finite_tensor: the first tensor with such a value, or None.
        streamed: whether the source was converted while it downloaded.
    """

    dtype: str
    tensors: int
    cast: int
    bytes_read: int
    bytes_written: int
    seconds: float
    largest_relative_error: float
    largest_error_tensor: str | None
    clipped: int
    underflows: int
    non_finite: int
    non_finite_tensor: str | None
    streamed: bool = Field(default=False, exclude_if=_is_empty)


class LayerReport(Value):
    """What an attention rewrite did to one layer.

    Attributes:
        groups: key-value heads that became one, by their old numbers.
        key_loss: share of the attention logits' energy lost by the merge; None where the method doesn't say.
        value_loss: likewise of the values.
        output_loss: share lost after the refit of what attention should add: the original's output, and what layers
            before have lost; on the calibration text, None without.
        output_loss_before: the same before the output refit.
        divergence: of the attention from the original's, in nats, after the logit refit; None without one.
        divergence_before: the same before it.
        symmetric: whether keys were brought together by symmetries of the layer alone.
    """

    groups: tuple[tuple[int, ...], ...]
    key_loss: float | None
    value_loss: float | None
    output_loss: float | None = None
    output_loss_before: float | None = None
    divergence: float | None = None
    divergence_before: float | None = None
    symmetric: bool = True


class AttentionReport(StepDetails):
    """A rewrite to fewer key-value heads.

    Attributes:
        method: of the merge.
        kv_heads: key-value heads per layer, before and after.
        kv_bytes_per_token: of a 16-bit cache over all layers, before and after.
        contexts: longest context that fits with the weights, in tokens before and after, by memory and weight dtype;
            0 where the weights alone don't fit. 4 bits count every matrix of the blocks with 4.25 bits per weight.
        layers: in order.
        left_out: what the architecture kept from being used.
        nbytes: size of the weight files.
        seconds: wall-clock time.
    """

    method: str
    kv_heads: tuple[int, int]
    kv_bytes_per_token: tuple[int, int]
    contexts: Mapping[str, tuple[int, int]]
    layers: tuple[LayerReport, ...]
    left_out: tuple[str, ...]
    nbytes: int
    seconds: float


class HealReport(StepDetails):
    """A distillation after an attention rewrite.

    Attributes:
        train: which weights learned: ``attention``, ``all``, or ``lora`` (adapters, merged); None where it is not said.
        steps: taken, of those that were asked for.
        asked: steps asked for; fewer are taken when the held-out text stops getting better.
        best_step: whose weights were written.
        tokens: learned from, repetitions included.
        trained: numbers in the trained tensors.
        before, after: divergence of the predictions from the original's on the held-out text, in nats; None without.
        history: ``step``, ``kl``, ``hidden`` (share of error in hidden states), ``rate`` of every step.
        held_out: ``step``, ``kl`` of every look at the held-out text.
        seconds: wall-clock time, that of earlier calls included when it was resumed.
        resumed_at: the step that this call began with.
    """

    train: str | None = Field(default=None, exclude_if=_is_none)
    steps: int
    asked: int
    best_step: int
    tokens: int
    trained: int
    before: float | None
    after: float | None
    history: tuple[Mapping[str, float], ...]
    held_out: tuple[Mapping[str, float], ...]
    seconds: float
    resumed_at: int


class DistilReport(HealReport):
    """A distillation of a quantized model.

    Attributes:
        codes: of all weights that were trained.
        moved: those that moved to the next one.
        norms: tensors of norms that were trained; where there are any, the artifact's are not the original's.
        streamed: whether one block was in memory at a time.
    """

    codes: int
    moved: int
    norms: int
    streamed: bool = False


class LinearReport(Value):
    """One quantized linear.

    Attributes:
        name: in the checkpoint, without ``.weight``.
        scheme: what it is stored in.
        error: squared output error over squared output on the calibration inputs; None for data-free methods.
        outer: ``head``, ``embedding`` or ``tied`` (one matrix that is both), of what lies outside the blocks.
        coarse: share of it that has few digits left below a float32 scale of all of it; None where that is none or
            there is no such scale.
    """

    name: str
    scheme: str
    error: float | None
    outer: str = Field(default="", exclude_if=_is_empty)
    coarse: float | None = Field(default=None, exclude_if=_is_none)


class UnitReport(Value):
    """Linears that runtimes fuse, the scheme that a budget gave them, their bytes, and the divergence that it expects
    of them, in nats per token."""

    linears: tuple[str, ...]
    scheme: str
    bytes: int
    divergence: float


class UniformReport(Value):
    """One scheme everywhere for no more bytes, and the divergence that is expected of it, in nats per token."""

    scheme: str
    divergence: float


class BudgetReport(Value):
    """Schemes by layer for a mean number of bits.

    Attributes:
        bits_per_weight: what all quantized weights come to, scales included.
        asked: what was asked for; None where it was a number of bytes.
        max_bytes: of the weight files, if that was asked for.
        divergence: expected of all choices, in nats per token.
        uniform: the best single scheme for no more bytes; None if there is none.
        tokens: of calibration text that sensitivity was measured on.
        units: every choice, in model order.
    """

    bits_per_weight: float
    asked: float | None
    max_bytes: int | None = None
    divergence: float
    uniform: UniformReport | None
    tokens: int
    units: tuple[UnitReport, ...]


class ExpertsReport(Value):
    """The experts of a layer, and how many tokens of the calibration text its router sent to each.

    Attributes:
        layer: the module that has them, ``model.layers.0.mlp.experts``.
        tokens: by the expert's number.
        columns: width of their inputs.
    """

    layer: str
    tokens: tuple[int, ...]
    columns: int

    @property
    def starved(self) -> tuple[int, ...]:
        """Numbers of the experts with fewer tokens than their inputs have columns."""
        return tuple(number for number, tokens in enumerate(self.tokens) if tokens < self.columns)


class QuantizeReport(StepDetails):
    """A quantization.

    Attributes:
        layers: number of quantized linears (of GGUF: tensors).
        linears: every one, in model order; of GGUF those whose codes a method chose, and not the file's type.
        bytes: of the weight files.
        seconds: wall-clock time of the call that finished it; what earlier, stopped ones took is not counted.
        phases: seconds of that call by phase.
        mode: how batches went through the blocks, ``lockstep`` or ``replay``; None where none did.
        resumed_blocks: blocks that an earlier, interrupted call had finished.
        budget: what a budget chose; None without one.
        experts: of a mixture, how many tokens each expert was calibrated on; empty without text.
        file: of GGUF, the file's name.
        projector: of GGUF, the name of the file beside it that has the model's part for images.
        types: of GGUF, how many tensors have each type.
        notes: what is otherwise than asked for, or otherwise in the runtime than in transformers, a sentence each.
        streamed: whether the source was quantized while it downloaded.
        runtime: the one that it was written for alone; None for all that read the format.
    """

    budget: BudgetReport | None = Field(default=None, exclude_if=_is_none)
    file: str | None = Field(default=None, exclude_if=_is_none)
    projector: str | None = Field(default=None, exclude_if=_is_none)
    experts: tuple[ExpertsReport, ...] = Field(default=(), exclude_if=_is_empty)
    layers: int
    linears: tuple[LinearReport, ...] = Field(default=(), exclude_if=_is_empty)
    types: Mapping[str, int] = Field(default_factory=dict, exclude_if=_is_empty)
    notes: tuple[str, ...] = Field(default=(), exclude_if=_is_empty)
    bytes: int
    seconds: float
    phases: Mapping[str, float] = Field(default_factory=dict, exclude_if=_is_empty)
    mode: str | None = Field(default=None, exclude_if=_is_none)
    resumed_blocks: int | None = Field(default=None, exclude_if=_is_none)
    streamed: bool = Field(default=False, exclude_if=_is_empty)
    runtime: str | None = Field(default=None, exclude_if=_is_none)


_DETAILS: Mapping[str, type[StepDetails]] = {
    "convert": DtypeReport,
    "attention": AttentionReport,
    "heal": HealReport,
    "distil": DistilReport,
    "quantize": QuantizeReport,
    "repair": QuantizeReport,
}


def read_details(name: str, values: Mapping[str, Any]) -> StepDetails:
    """Details as what the name of their step stands for; those that another version wrote are kept as they are."""
    try:
        return _DETAILS.get(name.partition("-")[0], StepDetails).model_validate(values)
    except ValidationError:
        return StepDetails.model_validate(values)


class Step(Value):
    """A step of the run.

    Attributes:
        name: ``fetch``, ``convert``, ``attention``, ``heal``, ``quantize``, ``distil``, ``validate``, ``repair-1``, …
        seconds: wall-clock time it took when it was done.
        peak_rss_bytes: peak resident memory of the process until its end.
        peak_rss_method: how that is known: ``exact``, ``sampled``, or ``process`` (an upper bound).
        reused: whether it was complete before this run.
        resumed: whether an earlier run had begun it, whose time is not in ``seconds``.
        sections: what it has to show.
        details: what it did; left out where there is nothing to say.
    """

    name: str
    seconds: float
    peak_rss_bytes: int | None = None
    peak_rss_method: str | None = Field(default=None, exclude_if=_is_none)
    reused: bool | None = Field(default=None, exclude_if=_is_none)
    resumed: bool | None = Field(default=None, exclude_if=_is_none)
    sections: tuple[Section, ...] = Field(default=(), exclude_if=_is_empty)
    details: DtypeReport | AttentionReport | DistilReport | HealReport | QuantizeReport | StepDetails | None = Field(
        default=None, exclude_if=_is_none
    )

    @model_validator(mode="before")
    @classmethod
    def _details_by_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("details"), Mapping):
            return values
        found = values["details"]
        return {**values, "details": read_details(str(values.get("name")), found) if found else None}
