"""The recipe: what a run does, as a frozen value. ``recipes/loading.py`` reads it from YAML.

Every section is optional but ``model``: a recipe with ``convert`` alone converts, one with ``quantize`` quantizes.
Unknown keys are errors. Shares such as ``max_increase`` are written ``5%`` or ``0.05``.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from llmconvert.quantize.methods.base import METHODS, needs_calibration
from llmconvert.recipes.schema.named import OptionalScheme, ScalingField, SchemeOrMix
from llmconvert.recipes.schema.quantities import Bytes, LeastShare, Share

__all__ = [
    "PLACEHOLDERS",
    "AttentionSettings",
    "BackendSettings",
    "BudgetSettings",
    "CalibrateSettings",
    "CardSettings",
    "ConvertSettings",
    "DecodingSettings",
    "GenerationSettings",
    "HealSettings",
    "MemorySettings",
    "OverrideSettings",
    "PerplexitySettings",
    "PositionSettings",
    "PublishSettings",
    "QuantizeSettings",
    "Recipe",
    "RepairSettings",
    "RotateSettings",
    "TaskSettings",
    "ValidateSettings",
]


def _backends(value: object) -> object:
    """A list of names stands for a section with its defaults, an empty one for none."""
    if isinstance(value, (list, tuple)):
        return {"backends": tuple(value)} if value else None
    return value


def _switch(value: object) -> object:
    """``true`` stands for a section with its defaults, ``false`` for none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def _task_names(value: object) -> object:
    """A list of names stands for a section with nothing else."""
    return {"names": value} if isinstance(value, list) else value


def _to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
BackendName = Literal["eager", "math", "flash", "efficient", "cudnn", "sdpa", "flash_attention_2", "flash_attention_3"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class ConvertSettings(_Section):
    """The dtype of everything that is not quantized. Values too large for it are an error, or clipped on request.

    ``rope_scaling`` stretches rotary positions over longer inputs: ``yarn:2.0``, ``linear:4``, ``dynamic:2``.
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    overflow: Literal["error", "clip"] = "error"
    rope_scaling: ScalingField | None = None


class HealSettings(_Section):
    """Distillation from the original after the attention rewrite; attention weights alone are trained.

    ``steps`` of ``batch`` windows of ``length`` tokens, drawn from ``dataset`` (that of ``calibrate`` by default).
    ``held_out`` more windows tell which step was best, and when to stop. ``hidden`` weighs the error of the hidden
    states beside the divergence of the predictions. ``seed`` is not that of ``calibrate``, which would draw first the
    windows that the merge has seen already.
    """

    steps: Annotated[int, Field(ge=0)] = 200
    batch: Count = 2
    length: Annotated[int, Field(ge=2)] = 512
    dataset: Annotated[str, Field(min_length=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    hidden: Annotated[float, Field(ge=0)] = 0.5
    held_out: Annotated[int, Field(ge=0)] = 8
    seed: Seed = 1


class AttentionSettings(_Section):
    """Rewrite to ``kv_heads`` key-value heads: 1 is MQA, fewer than the query heads GQA.

    ``refit`` adapts queries, keys and output projections to the original's attention on the calibration text.
    """

    kv_heads: Count
    method: Literal["svd", "mean", "first"] = "svd"
    refit: bool = True
    heal: HealSettings | None = None


class CalibrateSettings(_Section):
    """Text whose activations a method measures: ``samples`` windows of ``length`` tokens."""

    dataset: Annotated[str, Field(min_length=1)]
    samples: Count = 128
    length: Annotated[int, Field(ge=2)] = 2048
    order: Literal["shuffled", "sequential"] = "shuffled"
    seed: Seed = 0


class OverrideSettings(_Section):
    """Layers whose name matches the shell pattern ``match`` get another scheme; the first match counts.

    ``scheme: none`` leaves them unquantized.
    """

    match: Annotated[str, Field(min_length=1)]
    scheme: OptionalScheme


class BudgetSettings(_Section):
    """A mean number of bits per weight, scales included; layers get what brings the least divergence for it.

    ``bits`` and ``group_sizes`` are what there is to choose from.
    """

    bits_per_weight: Annotated[float, Field(gt=0, le=16)]
    bits: Annotated[tuple[Annotated[int, Field(ge=2, le=8)], ...], BeforeValidator(_to_tuple), Field(min_length=1)] = (
        2,
        3,
        4,
        8,
    )
    group_sizes: Annotated[tuple[Count, ...], BeforeValidator(_to_tuple), Field(min_length=1)] = (32, 64, 128)


class RotateSettings(_Section):
    """Rotations folded into the weights before they are quantized: of the residual stream, of each head's values."""

    residual: bool = True
    values: bool = True
    seed: Seed = 0


class QuantizeSettings(_Section):
    """The method, the scheme and the format on disk; ``overrides`` give some layers another scheme.

    ``options`` are the method's own settings, by the names that its class documents: ``{steps: 100}`` for signround.
    With ``format: gguf`` the scheme is one of llama.cpp's types, ``q4_k_m`` for example. With a ``budget`` bits and
    group sizes are chosen by layer, and the scheme says no more than whether there are zero points: ``w4a16-asym``.
    """

    method: str
    options: Mapping[str, bool | int | float | str] = {}
    scheme: SchemeOrMix
    budget: BudgetSettings | None = None
    rotate: Annotated[RotateSettings | None, BeforeValidator(_switch)] = None
    format: str = "compressed-tensors"
    overrides: Annotated[tuple[OverrideSettings, ...], BeforeValidator(_to_tuple)] = ()

    @model_validator(mode="before")
    @classmethod
    def _usual_scheme(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("budget") is not None and values.get("scheme") is None:
            return {**values, "scheme": "w4a16"}
        return values

    @property
    def calibrates(self) -> bool:
        """Whether the method or the budget reads calibration text."""
        return self.budget is not None or (self.method in METHODS and needs_calibration(self.method))

    @property
    def label(self) -> str:
        """What names the result: the scheme, or the budget."""
        return str(self.scheme) if self.budget is None else f"{self.budget.bits_per_weight:g}bpw"


class PerplexitySettings(_Section):
    """Perplexity over windows of ``window`` tokens. ``max_increase`` is the gate: 5% over the original's at most.

    Windows begin ``stride`` tokens apart, by default their length. With less they overlap: all predictions but those of
    the first window have at least ``window - stride`` tokens of context, and each is scored once.
    """

    dataset: Annotated[str, Field(min_length=1)]
    window: Annotated[int, Field(ge=2)] = 2048
    stride: Count | None = None
    max_windows: Count | None = None
    max_increase: Share | None = None


class GenerationSettings(_Section):
    """Greedy generation of original and artifact; ``min_agreement`` is the gate on the share of equal tokens.

    ``prompts`` replaces the shipped set of everyday requests.
    """

    max_new_tokens: Count = 64
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_to_tuple)] = ()
    min_agreement: LeastShare | None = None


class BackendSettings(_Section):
    """Attention backends to compare, prompt lengths in tokens to read with each, and the seconds one may take.

    Without ``lengths`` they are 512 to 16,384, as far as memory and ``seconds`` allow. A list of names stands for the
    section: ``attention: [eager, flash]``.
    """

    backends: Annotated[tuple[BackendName, ...], BeforeValidator(_to_tuple), Field(min_length=1)] = (
        "eager",
        "math",
        "flash",
    )
    lengths: Annotated[tuple[Length, ...], BeforeValidator(_to_tuple), Field(min_length=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] = 120.0


class PositionSettings(_Section):
    """Perplexity by position: ``windows`` windows of ``window`` tokens, by default twice what the model was trained on.

    The text is that of ``perplexity`` unless ``dataset`` names another.
    """

    dataset: Annotated[str, Field(min_length=1)] | None = None
    window: Length | None = None
    windows: Count = 4


class MemorySettings(_Section):
    """The KV cache and the memory ladder at these contexts; ``measured`` are dtypes to load and run for real."""

    contexts: Annotated[tuple[Length, ...], BeforeValidator(_to_tuple), Field(min_length=1)] = (2048, 8192, 32768)
    batches: Annotated[tuple[Count, ...], BeforeValidator(_to_tuple), Field(min_length=1)] = (1, 8)
    measured: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...], BeforeValidator(_to_tuple)] = (
        "float32",
        "bfloat16",
    )
    measured_contexts: Annotated[tuple[Length, ...], BeforeValidator(_to_tuple)] = (2048, 8192)


class DecodingSettings(_Section):
    """Speed of writing, original and artifact in ``rounds`` turns: ``tokens`` tokens after ``context`` others."""

    context: Count = 4096
    tokens: Count = 32
    rounds: Count = 2


class TaskSettings(_Section):
    """Benchmarks of lm-eval by name, on original and artifact; a list stands for the section: ``tasks: [arc_easy]``.

    ``samples`` of each task are used, all by default; ``fewshot`` examples are shown before, as many as the task says
    by default. ``include`` is a directory of task files of your own. ``max_drop`` is the gate: no task may lose more.
    """

    names: Annotated[tuple[str, ...], BeforeValidator(_to_tuple), Field(min_length=1)]
    samples: Count | None = None
    fewshot: Annotated[int, Field(ge=0)] | None = None
    include: str | None = None
    max_drop: Share | None = None


class RepairSettings(_Section):
    """Give layers better schemes when the gate fails, in ``rounds`` at most, each measured whole.

    The weight files may grow to ``max_bytes``, to ``validate.max_bytes`` or the original's size without it.
    """

    max_bytes: Bytes | None = None
    rounds: Count = 4


class ValidateSettings(_Section):
    """What is measured on the artifact and on the original, both reloaded from disk.

    ``max_kl`` (mean divergence per token, nats), ``min_top1`` (share of equal predictions) and ``max_bytes`` (of the
    weight files) are further gates; the first two need ``perplexity``, on whose text they are measured.
    ``decoding`` is measured where the recipe rewrites attention, unless it says ``false``.
    ``repair`` gives an artifact that misses one of them more bits where they tell most.
    """

    perplexity: PerplexitySettings | None = None
    generation: Annotated[GenerationSettings | None, BeforeValidator(_switch)] = None
    attention: Annotated[BackendSettings | None, BeforeValidator(_backends)] = None
    positions: Annotated[PositionSettings | None, BeforeValidator(_switch)] = None
    memory: Annotated[MemorySettings | None, BeforeValidator(_switch)] = None
    decoding: Annotated[DecodingSettings | None, BeforeValidator(_switch)] = None
    max_kl: Annotated[float, Field(gt=0)] | None = None
    min_top1: LeastShare | None = None
    max_bytes: Bytes | None = None
    tasks: Annotated[TaskSettings | None, BeforeValidator(_task_names)] = None
    repair: Annotated[RepairSettings | None, BeforeValidator(_switch)] = None


def _check_placeholders(value: str | None) -> str | None:
    """Only the known ones, in the plain form ``{scheme}``."""
    if value is not None:
        try:
            found = [part[1:] for part in string.Formatter().parse(value) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"{value!r}: {error}") from error
        for name, form, conversion in found:
            if name not in PLACEHOLDERS or form or conversion:
                known = ", ".join(f"{{{placeholder}}}" for placeholder in PLACEHOLDERS)
                raise ValueError(f"{{{name}}} stands for nothing; known are {known}")
    return value


#: What a publishing target may name in braces, so that one setting serves several variants.
PLACEHOLDERS = ("name", "model", "method", "scheme")
Target = Annotated[str, AfterValidator(_check_placeholders)]


class PublishSettings(_Section):
    """Where the artifact goes: ``file:DIR`` or a Hub repository ``user/name``; the rest is for the Hub.

    ``private`` says what a new repository becomes; ``true`` also refuses to publish into a public one. Variants of
    one model go to a repository each, or into one, each on a branch (``revision``) or in a folder (``folder``) of its
    own; ``{name}``, ``{model}``, ``{method}`` and ``{scheme}`` stand for this recipe's values. ``replace`` removes
    files that are there and don't belong to the artifact; ``verify_download`` fetches everything again and compares it.
    Where nothing tells how well the artifact predicts, the Hub gets it with ``unmeasured: true`` only; its card says so.
    """

    to: Annotated[Target, Field(pattern=r"^(file:.+|[\w.{}-]+/[\w.{}-]+)$")]
    private: bool | None = None
    revision: Target | None = None
    folder: Annotated[Target, Field(pattern=r"^[\w.{}-]+(/[\w.{}-]+)*$")] | None = None
    create_pr: bool = False
    tag: Target | None = None
    message: Target | None = None
    replace: bool = False
    verify_download: bool = False
    unmeasured: bool = False


class CardSettings(_Section):
    """What the model card says and the source doesn't: ``base_model``, the Hub id of the model that the source is."""

    base_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] | None = None


class Recipe(_Section):
    """One job. ``name`` names it in tables and in the work directory; it defaults to the file's name.

    With ``stream``, a Hub model is worked on while it downloads, and is never on this disk as a whole.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "recipe"
    model: Annotated[str, Field(min_length=1)]
    allow_pickle: bool = False
    stream: bool = False
    convert: ConvertSettings = ConvertSettings()
    attention: AttentionSettings | None = None
    calibrate: CalibrateSettings | None = None
    quantize: QuantizeSettings | None = None
    # "validate" is a method of pydantic's models, so the attribute has another name than the key.
    validation: ValidateSettings | None = Field(default=None, alias="validate")
    card: CardSettings = CardSettings()
    publish: PublishSettings | None = None
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    memory: Bytes | None = None
    work_dir: Annotated[str, Field(min_length=1)] = "work"

    @property
    def predictions_measured(self) -> bool:
        """Whether anything asked for tells how well the artifact predicts."""
        checks = self.validation
        return checks is not None and any((checks.perplexity, checks.generation, checks.positions, checks.tasks))

    @property
    def measured(self) -> ValidateSettings | None:
        """The validate section; where attention is rewritten, decoding is part of it unless it says no."""
        settings = self.validation
        if settings is None or self.attention is None or "decoding" in settings.model_fields_set:
            return settings
        # Not among the fields that were set: what is measured by default may be left out.
        values = {**dict(settings), "decoding": DecodingSettings()}
        return ValidateSettings.model_construct(settings.model_fields_set, **values)

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as plain values with every default written out; what was not asked for is left out."""
        values: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return values
