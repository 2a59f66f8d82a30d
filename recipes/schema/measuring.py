"""The recipe's validate section: what is measured, and the limits that decide."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llmconvert.recipes.schema.quantities import Bytes, LeastShare, Share
from llmconvert.recipes.schema.section import Count, Length, Name, Section, switch, to_tuple

__all__ = [
    "BackendSettings",
    "DecodingSettings",
    "GenerationSettings",
    "MemorySettings",
    "PerplexitySettings",
    "PositionSettings",
    "RepairSettings",
    "ServeSettings",
    "TaskSettings",
    "ValidateSettings",
]

_RUNTIMES = ("vllm", "llama.cpp", "mlx", "transformers")


def _runtime(value: object) -> object:
    if not isinstance(value, str):
        return value
    name, equals, python = (part.strip() for part in value.partition("="))
    if name in _RUNTIMES:
        return name + equals + python
    close = difflib.get_close_matches(name.lower(), _RUNTIMES, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"expected {', '.join(_RUNTIMES[:-1])} or {_RUNTIMES[-1]}{hint}")


#: A runtime, and after ``=`` the Python that has it.
RuntimeName = Annotated[str, BeforeValidator(_runtime), Field(pattern=r"^(vllm|llama\.cpp|mlx|transformers)(=.+)?$")]
BackendName = Literal["eager", "math", "flash", "efficient", "cudnn", "sdpa", "flash_attention_2", "flash_attention_3"]


def _backends(value: object) -> object:
    """A list of names stands for a section with its defaults, an empty one for none."""
    if isinstance(value, (list, tuple)):
        return {"backends": tuple(value)} if value else None
    return value


def _runtime_names(value: object) -> object:
    """A list of names stands for a section with nothing else."""
    return {"runtimes": value} if isinstance(value, list) else value


def _task_names(value: object) -> object:
    """A list of names stands for a section with nothing else."""
    return {"names": value} if isinstance(value, list) else value


class PerplexitySettings(Section):
    """Perplexity over windows of ``window`` tokens. ``max_increase`` is the gate: 5% over the original's at most.

    Windows begin ``stride`` tokens apart, by default their length. With less they overlap: all predictions but those of
    the first window have at least ``window - stride`` tokens of context, and each is scored once.
    """

    dataset: Name
    window: Length = 2048
    stride: Count | None = None
    max_windows: Count | None = None
    max_increase: Share | None = None


class GenerationSettings(Section):
    """Greedy generation of original and artifact; ``min_agreement`` is the gate on the share of equal tokens.

    ``prompts`` replaces the shipped set of everyday requests.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=65_536)] = 64
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(to_tuple)] = ()
    min_agreement: LeastShare | None = None


class BackendSettings(Section):
    """Attention backends to compare, prompt lengths in tokens to read with each, and the seconds one may take.

    Without ``lengths`` they are 512 to 16,384, as far as memory and ``seconds`` allow. A list of names stands for the
    section: ``attention: [eager, flash]``.
    """

    backends: Annotated[tuple[BackendName, ...], BeforeValidator(to_tuple), Field(min_length=1)] = (
        "eager",
        "math",
        "flash",
    )
    lengths: Annotated[tuple[Length, ...], BeforeValidator(to_tuple), Field(min_length=1)] | None = None
    seconds: Annotated[float, Field(gt=0, le=604_800)] = 120.0


class PositionSettings(Section):
    """Perplexity by position: ``windows`` windows of ``window`` tokens, by default twice what the model was trained on.

    The text is that of ``perplexity`` unless ``dataset`` names another.
    """

    dataset: Name | None = None
    window: Length | None = None
    windows: Count = 4


class MemorySettings(Section):
    """The KV cache and the memory ladder at these contexts; ``measured`` are dtypes to load and run for real."""

    contexts: Annotated[tuple[Length, ...], BeforeValidator(to_tuple), Field(min_length=1)] = (2048, 8192, 32768)
    batches: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1 << 16)], ...], BeforeValidator(to_tuple), Field(min_length=1)
    ] = (1, 8)
    measured: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...], BeforeValidator(to_tuple)] = (
        "float32",
        "bfloat16",
    )
    measured_contexts: Annotated[tuple[Length, ...], BeforeValidator(to_tuple)] = (2048, 8192)


class DecodingSettings(Section):
    """Speed of writing, original and artifact in ``rounds`` turns: ``tokens`` tokens after ``context`` others."""

    context: Length = 4096
    tokens: Annotated[int, Field(ge=1, le=65_536)] = 32
    rounds: Annotated[int, Field(ge=1, le=1_000)] = 2


class ServeSettings(Section):
    """Load time, memory, and speed of reading and writing in runtimes; a list of their names stands for the section.

    ``runtimes`` are of vllm, llama.cpp, mlx and transformers, with ``=`` and its Python where it is in another
    environment: ``serve: [transformers, mlx=/opt/mlx/bin/python]``. In ``rounds`` turns, original and artifact read
    prompts of ``contexts`` tokens and write ``tokens`` behind each.
    """

    runtimes: Annotated[tuple[RuntimeName, ...], BeforeValidator(to_tuple), Field(min_length=1)]
    contexts: Annotated[tuple[Length, ...], BeforeValidator(to_tuple), Field(min_length=1)] = (512, 2048)
    tokens: Annotated[int, Field(ge=1, le=65_536)] = 32
    rounds: Annotated[int, Field(ge=1, le=1_000)] = 2


class TaskSettings(Section):
    """Benchmarks of lm-eval by name, on original and artifact; a list stands for the section: ``tasks: [arc_easy]``.

    ``samples`` of each task are used, all by default; ``fewshot`` examples are shown before, as many as the task says
    by default. ``include`` is a directory of task files of your own. ``max_drop`` is the gate: no task may lose more.
    """

    names: Annotated[tuple[str, ...], BeforeValidator(to_tuple), Field(min_length=1)]
    samples: Count | None = None
    fewshot: Annotated[int, Field(ge=0, le=1_000)] | None = None
    include: Name | None = None
    max_drop: Share | None = None


class RepairSettings(Section):
    """Give layers better schemes when the gate fails, in ``rounds`` at most, each measured whole.

    The weight files may grow to ``max_bytes``, to ``validate.max_bytes`` or the original's size without it.
    """

    max_bytes: Bytes | None = None
    rounds: Count = 4


class ValidateSettings(Section):
    """What is measured on the artifact and on the original, both reloaded from disk.

    ``max_kl`` (mean divergence per token, nats), ``min_top1`` (share of equal predictions) and ``max_bytes`` (of the
    weight files) are further gates; the first two need ``perplexity``, on whose text they are measured, and so does
    ``max_saturated``: the share of a linear's inputs that a static scale (``fp8-static``, ``nvfp4``) may cut off.
    ``activations`` says whose formulas inputs of linears are quantized by while predictions are measured, where an
    artifact has that: transformers' (which are compressed-tensors') or vLLM's.
    ``decoding`` is measured where the recipe rewrites attention, unless it says ``false``.
    ``repair`` gives an artifact that misses one of them more bits where they tell most.
    """

    perplexity: PerplexitySettings | None = None
    generation: Annotated[GenerationSettings | None, BeforeValidator(switch)] = None
    attention: Annotated[BackendSettings | None, BeforeValidator(_backends)] = None
    positions: Annotated[PositionSettings | None, BeforeValidator(switch)] = None
    memory: Annotated[MemorySettings | None, BeforeValidator(switch)] = None
    decoding: Annotated[DecodingSettings | None, BeforeValidator(switch)] = None
    serve: Annotated[ServeSettings | None, BeforeValidator(_runtime_names)] = None
    max_kl: Annotated[float, Field(gt=0)] | None = None
    min_top1: LeastShare | None = None
    max_saturated: Share | None = None
    activations: Literal["transformers", "vllm"] = "transformers"
    max_bytes: Bytes | None = None
    tasks: Annotated[TaskSettings | None, BeforeValidator(_task_names)] = None
    repair: Annotated[RepairSettings | None, BeforeValidator(switch)] = None
