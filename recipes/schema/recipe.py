"""The recipe: what a run does, as a frozen value. ``recipes/loading.py`` reads it from YAML.

Every section is optional but ``model``: a recipe with ``convert`` alone converts, one with ``quantize`` quantizes.
Unknown keys are errors. Shares such as ``max_increase`` are written ``5%`` or ``0.05``.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from llmconvert.errors import SchemeError
from llmconvert.quantize.catalog.formats import only_format
from llmconvert.quantize.catalog.methods import METHODS, needs_calibration, usual_method
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.recipes.schema.budget import BudgetSettings
from llmconvert.recipes.schema.measuring import DecodingSettings, ValidateSettings
from llmconvert.recipes.schema.named import Dtype, OptionalScheme, ScalingField, SchemeOrMix
from llmconvert.recipes.schema.presets import with_preset
from llmconvert.recipes.schema.quantities import FileSize, Memory, Share
from llmconvert.recipes.schema.section import Count, Device, Length, Name, Section, Seed, possible, switch, to_tuple

__all__ = [
    "PLACEHOLDERS",
    "AttentionSettings",
    "BudgetSettings",
    "CalibrateSettings",
    "CardSettings",
    "ConvertSettings",
    "DistilSettings",
    "HealSettings",
    "MixSettings",
    "OverrideSettings",
    "PublishSettings",
    "QuantizeSettings",
    "Recipe",
    "RotateSettings",
]


class ConvertSettings(Section):
    """The dtype of everything that is not quantized. Values too large for it are an error, or clipped on request.

    ``rope_scaling`` stretches rotary positions over longer inputs: ``yarn:2.0``, ``linear:4``, ``dynamic:2``.
    """

    dtype: Dtype = "bfloat16"
    overflow: Literal["error", "clip"] = "error"
    rope_scaling: ScalingField | None = None


class HealSettings(Section):
    """Distillation from the original after the attention rewrite.

    ``train`` says what learns: the weights of ``attention``, ``all`` weights, or ``lora``, adapters of all linears in
    the blocks, of ``rank`` and multiplied by ``alpha`` over it, which are merged in the end.

    ``steps`` of ``batch`` windows of ``length`` tokens, drawn from ``dataset`` (that of ``calibrate`` by default).
    ``held_out`` more windows tell which step was best, and when to stop. ``hidden`` weighs the error of the hidden
    states beside the divergence of the predictions. ``seed`` is not that of ``calibrate``, which would draw first the
    windows that the merge has seen already.
    """

    steps: Annotated[int, Field(ge=0, le=1 << 20)] = 200
    batch: Annotated[int, Field(ge=1, le=1 << 16)] = 2
    length: Length = 512
    dataset: Name | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    hidden: Annotated[float, Field(ge=0)] = 0.5
    held_out: Annotated[int, Field(ge=0, le=1 << 20)] = 8
    seed: Seed = 1
    train: Literal["attention", "all", "lora"] = "attention"
    rank: Annotated[int, Field(ge=1, le=1 << 16)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0


class AttentionSettings(Section):
    """Rewrite to ``kv_heads`` key-value heads: 1 is MQA, fewer than the query heads GQA.

    ``refit`` adapts queries, keys, values and output projections to the original's attention on the calibration text.
    """

    kv_heads: Count
    method: Literal["svd", "mean", "first"] = "svd"
    refit: bool = True
    heal: HealSettings | None = None


class MixSettings(Section):
    """One dataset of a calibration mix, and its ``share`` of the windows.

    ``template`` names which of the tokenizer's chat templates renders conversations; ``none`` takes what is said in
    them as text.
    """

    name: Name
    share: Annotated[Share, Field(gt=0, le=1)]
    template: Annotated[str, Field(min_length=1)] = "default"

    @classmethod
    def meant_by(cls, value: object) -> Mapping[str, object]:
        return {"name": value, "share": "60%"}


class CalibrateSettings(Section):
    """Text whose activations a method measures: ``samples`` windows of ``length`` tokens.

    ``dataset`` may be a list of datasets with shares, which add up to 100 %.

    ``statistics`` says in which model: ``sequential`` in one whose layers before are quantized already, which makes up
    for a part of their errors; ``original`` in the unquantized one, which the variants of a sweep share.
    """

    dataset: Name | Annotated[tuple[MixSettings, ...], BeforeValidator(to_tuple), Field(min_length=1)]
    samples: Count = 128
    length: Length = 2048
    order: Literal["shuffled", "sequential"] = "shuffled"
    seed: Seed = 0
    statistics: Literal["sequential", "original"] = "sequential"

    @property
    def names(self) -> tuple[str, ...]:
        """Of all datasets."""
        return (self.dataset,) if isinstance(self.dataset, str) else tuple(source.name for source in self.dataset)


class OverrideSettings(Section):
    """Layers whose name matches the shell pattern ``match`` get another scheme; the first match counts.

    ``scheme: none`` leaves them unquantized. With ``format: gguf`` the scheme is a type of tensors, ``q6_k``, and
    patterns may be of names in the file (``blk.*.attn_v``), of embedding and head too.
    """

    match: Annotated[str, Field(min_length=1)]
    scheme: OptionalScheme


class RotateSettings(Section):
    """Rotations folded into the weights before they are quantized: of the residual stream, of each head's values."""

    residual: bool = True
    values: bool = True
    seed: Seed = 0


def _text_of(scheme: object) -> str | None:
    return str(scheme) if scheme is not None else None


class DistilSettings(Section):
    """Distillation after quantization: what the artifact stores learns from the original's predictions.

    ``steps`` of ``batch`` windows of ``length`` tokens, drawn from ``dataset`` (that of ``calibrate`` by default), move
    scales and, unless ``norms`` is false, the weights of norms by about ``learning_rate`` of their size a step, and
    codes by about ``code_rate`` of the way to the next one; zero leaves codes as they are. ``held_out`` more windows
    tell which step was best, and when to stop. ``hidden`` weighs the error of the hidden states beside the divergence
    of the predictions. Layout and size of the files stay.
    """

    steps: Annotated[int, Field(ge=0, le=1 << 20)] = 150
    batch: Annotated[int, Field(ge=1, le=1 << 16)] = 2
    length: Length = 512
    dataset: Name | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    code_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    norms: bool = True
    hidden: Annotated[float, Field(ge=0)] = 0.0
    held_out: Annotated[int, Field(ge=0, le=1 << 20)] = 8
    seed: Seed = 1


class QuantizeSettings(Section):
    """The method, the scheme and the format on disk; ``overrides`` give some layers another scheme.

    The method is by default ``gptq``; of GGUF's types without calibration text, and of schemes without integers,
    ``rtn``. The format is the one that alone has the scheme: ``gguf``, or ``bitsandbytes``.

    ``options`` are the method's own settings, by the names that its class documents: ``{steps: 100}`` for signround.
    With ``format: gguf`` the scheme is one of llama.cpp's types, ``q4_k_m`` for example. With a ``budget`` bits and
    group sizes are chosen by layer, and the scheme says no more than whether there are zero points: ``w4a16-asym``.

    ``head`` and ``embedding`` give the output head and the embedding another type, in formats that hold them.
    A GGUF file is split into several where its tensors take more than ``split_max_size``.

    Of a mixture each expert is calibrated on the tokens that the router sends it; with ``experts: all`` on all of the
    text. ``min_tokens_per_expert`` begins nothing while an expert gets fewer. ``distil`` trains what is stored against
    the original's predictions afterwards. ``kv_cache: fp8`` adds scales from the calibration text, by which runtimes
    keep keys and values in 8 bits: one for a layer, or with ``fp8-head`` one for each of its key-value heads.
    ``runtime: vllm`` writes what vLLM alone has to load: experts that transformers has no names for, one by one.
    """

    method: str = "gptq"
    options: Mapping[str, bool | int | float | str] = {}
    scheme: SchemeOrMix
    budget: BudgetSettings | None = None
    rotate: Annotated[RotateSettings | None, BeforeValidator(switch)] = None
    format: str = "compressed-tensors"
    overrides: Annotated[tuple[OverrideSettings, ...], BeforeValidator(to_tuple)] = ()
    head: OptionalScheme | None = None
    embedding: OptionalScheme | None = None
    experts: Literal["all"] | None = None
    min_tokens_per_expert: Count | None = None
    distil: Annotated[DistilSettings | None, BeforeValidator(switch)] = None
    kv_cache: Literal["fp8", "fp8-head"] | None = None
    split_max_size: FileSize | None = None
    runtime: Literal["vllm"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        """What can be only one thing need not be said: the scheme beside a budget, the format that has the scheme."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if values.get("method") is None:
            values["method"] = usual_method(_text_of(values.get("scheme")), text=False)
        if values.get("budget") is not None and values.get("scheme") is None:
            values["scheme"] = "q4_k_m" if values.get("format") == "gguf" else "w4a16"
        if values.get("format") is None and isinstance(values.get("scheme"), str):
            only = only_format(values["scheme"])
            if only is not None:
                values["format"] = only
            else:
                values.pop("format", None)
        return values

    @classmethod
    def meant_by(cls, value: object) -> Mapping[str, object]:
        if value in METHODS:
            return {"method": value, "scheme": "q4_k_m" if value == "imatrix" else "w4a16-g64"}
        try:
            scheme = str(parse_scheme(str(value)))
        except SchemeError:
            scheme = "w4a16-g64"
        return {"method": usual_method(scheme, text=False), "scheme": scheme}

    @property
    def calibrates(self) -> bool:
        """Whether the method, the budget or a scheme reads calibration text."""
        read = self.method == "imatrix" and bool(self.options.get("file"))  # in the place of text
        by_method = self.method in METHODS and needs_calibration(self.method) and not read
        return self.budget is not None or by_method or self.fixes_inputs or self.kv_cache is not None

    @property
    def fixes_inputs(self) -> bool:
        """Whether a scheme has calibration text fix how inputs are quantized."""
        schemes = (self.scheme, *(override.scheme for override in self.overrides))
        return any(isinstance(scheme, Scheme) and scheme.fixes_inputs for scheme in schemes)

    @property
    def label(self) -> str:
        """What names the result: the scheme, or the budget."""
        return str(self.scheme) if self.budget is None else self.budget.label


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


_PLACE = re.compile(r"file:.+|[\w.{}-]+/[\w.{}-]+")


def _check_place(target: str) -> str:
    if _PLACE.fullmatch(target) is None:
        meant = target.replace("\\", "/")
        raise ValueError(f"expected a Hub repository, user/name, or a directory, file:DIR; did you mean file:{meant}?")
    return target


class PublishSettings(Section):
    """Where the artifact goes: ``file:DIR`` or a Hub repository ``user/name``; the rest is for the Hub.

    ``private`` says what a new repository becomes; ``true`` also refuses to publish into a public one. Variants of
    one model go to a repository each, or into one, each on a branch (``revision``) or in a folder (``folder``) of its
    own; ``{name}``, ``{model}``, ``{method}`` and ``{scheme}`` stand for this recipe's values. ``replace`` removes
    files that are there and don't belong to the artifact; ``verify_download`` fetches everything again and compares it.
    ``gated`` has whoever wants a new repository's files ask for them, and refuses one that is open. ``collection``
    lists the repository in the collection of that title, or at that address, made if need be: variants on one page.
    All variants of a sweep go to one place with ``set``, with one card. What nothing tells the quality of goes to the
    Hub with ``unmeasured: true`` only, and its card says so.
    """

    to: Annotated[Target, AfterValidator(possible), AfterValidator(_check_place)]
    private: bool | None = None
    revision: Target | None = None
    folder: Annotated[Target, Field(pattern=r"^[\w.{}-]+(/[\w.{}-]+)*$")] | None = None
    create_pr: bool = False
    tag: Target | None = None
    message: Target | None = None
    replace: bool = False
    verify_download: bool = False
    gated: Literal["auto", "manual"] | None = None
    collection: Target | None = None
    unmeasured: bool = False
    set: bool = False


class CardSettings(Section):
    """What the model card says and the source doesn't: ``base_model``, the Hub id of the model that the source is."""

    base_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] | None = None


class Recipe(Section):
    """One job. ``name`` names it in tables and in the work directory; it defaults to the file's name.

    With ``stream``, a Hub model is worked on while it downloads, and is never on this disk as a whole. What somebody
    quantized for deployment (GPTQ, AWQ, bitsandbytes, GGUF below 8 bits, artifacts of this package) is quantized again
    with ``requantize: true`` only; releases in FP8, MXFP4, NVFP4 or int4 are read as any model is. ``adapter`` is a
    LoRA of peft that is merged into the model first: a directory, or ``org/name[@revision]`` on the Hub.

    ``preset`` stands for calibrate and quantize sections, keys of which are taken where the recipe has none.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "recipe"
    model: Name
    preset: Literal["fast", "balanced", "best"] | None = None
    allow_pickle: bool = False
    stream: bool = False
    requantize: bool = False
    adapter: Name | None = None
    convert: ConvertSettings = ConvertSettings()
    attention: AttentionSettings | None = None
    calibrate: CalibrateSettings | None = None
    quantize: QuantizeSettings | None = None
    # "validate" is a method of pydantic's models, so the attribute has another name than the key.
    validation: ValidateSettings | None = Field(default=None, alias="validate")
    card: CardSettings = CardSettings()
    publish: PublishSettings | None = None
    device: Device = "cpu"
    memory: Memory | None = None
    work_dir: Name = "work"

    @model_validator(mode="before")
    @classmethod
    def _usual_method(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = with_preset(values)
        quantize = values.get("quantize")
        if not isinstance(quantize, Mapping) or quantize.get("method") is not None:
            return values
        method = usual_method(_text_of(quantize.get("scheme")), text=values.get("calibrate") is not None)
        return {**values, "quantize": {**quantize, "method": method}}

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
