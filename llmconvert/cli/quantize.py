"""``llmconvert quantize``: a model to a quantized artifact, or to a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmconvert.cli.manners import DtypeName, Known, Manners, calibration_option, manners, plan_option

if TYPE_CHECKING:
    from llmconvert.report.steps import DistilReport


def _overrides(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """``PATTERN=SCHEME`` each, in order: the first that matches a layer counts."""
    found: dict[str, str] = {}
    for text in values:
        pattern, separator, scheme = text.rpartition("=")
        if not separator:
            raise click.BadParameter(f"{text!r} is not PATTERN=SCHEME")
        found.setdefault(pattern, scheme)
    return found


@click.command(short_help="Quantize MODEL to a directory.")
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option("--method", type=Known("method"), help="gptq by default; of a GGUF type without calibration text rtn.")
@click.option(
    "--scheme",
    type=Known("scheme"),
    help="For example w4a16-g128, w8a8; of GGUF q4_k_m. `llmconvert schemes` lists them.",
)
@click.option("--bits-per-weight", type=float, help="Choose bits and groups by layer, for this mean.")
@click.option(
    "--format",
    type=Known("format"),
    help="`llmconvert formats` lists them. [default: compressed-tensors; of .gguf files gguf]",
)
@click.option(
    "--override",
    "overrides",
    multiple=True,
    callback=_overrides,
    metavar="PATTERN=SCHEME",
    help="Another scheme for layers whose name matches.",
)
@click.option("--imatrix", metavar="FILE", help="An importance matrix of llama.cpp's, in the place of text.")
@click.option("--split-max-size", metavar="SIZE", help="Of a GGUF file, above which another is begun: 2GB.")
@click.option("--rotate", is_flag=True, help="Rotate hidden states and values first, folded into the weights.")
@click.option("--experts", type=click.Choice(["all"]), help="Calibrate every expert on all tokens.")
@click.option("--min-tokens-per-expert", type=int, help="Begin nothing while an expert gets fewer.")
@click.option(
    "--preset",
    type=click.Choice(["fast", "balanced", "best"]),
    help="Method, scheme, text and samples in one word. [default: balanced, if nothing is chosen]",
)
@click.option("--distil-steps", type=int, help="Steps of distillation from the original afterwards. [default: 0]")
@click.option("--kv-cache", type=click.Choice(["fp8", "fp8-head"]), help="Add scales for keys and values in 8 bits.")
@click.option("--runtime", type=click.Choice(["vllm"]), help="Write what this one alone has to load.")
@click.option("--requantize", is_flag=True, help="Quantize again what was quantized for deployment.")
@click.option("--dtype", type=DtypeName(), help="Of the rest; or bf16, fp16, fp32. [default: bfloat16]")
@calibration_option("Text to calibrate on, pydoc-topics:train for example")
@click.option("--samples", type=int, help="Windows of calibration text. [default: 128]")
@click.option("--length", type=int, help="Tokens per window. [default: 2048]")
@click.option("--order", type=click.Choice(["shuffled", "sequential"]), help="[default: shuffled]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--device", help="cpu, cuda, cuda:N or auto. [default: cpu]")
@click.option("--memory", metavar="SIZE", help="Use at most this much memory, 4GB for example.")
@click.option("--adapter", metavar="DIR|ID", help="Merge this LoRA of peft into the model first.")
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights; what is more than tensors is refused.")
@click.option("--stream", is_flag=True, help="Quantize while downloading, by a method without calibration.")
@plan_option
@manners
def quantize(model: str, output: Path | None, plan: bool, manners: Manners, **options: Any) -> None:
    """Quantize MODEL to the directory OUTPUT, or to a .gguf file. Stopped, the same command continues.

    With MODEL alone it becomes a 4-bit artifact by the preset balanced, in a directory beside you.

    \b
    Examples:
      llmconvert quantize org/name
      llmconvert quantize org/name out/w4 --scheme w4a16-g128 \\
          --calibration pydoc-topics:train --samples 32 --length 512
      llmconvert quantize org/name out/mixed --bits-per-weight 4.25 \\
          --calibration FILE
      llmconvert quantize org/name model-q4_k_m.gguf --scheme q4_k_m
    """
    output = output or Path(f"{Path(model.partition('@')[0]).name}-{options['scheme'] or options['preset'] or 'w4a16'}")
    if plan:
        from llmconvert.cli.plan import show_plan
        from llmconvert.recipes.options import quantize_recipe

        recipe = quantize_recipe({**options, "model": model}, output)
        from llmconvert.recipes.plans.commands import plan_making

        if manners.leads:
            show_plan(plan_making(recipe, output, manners.ranks), manners)
        return
    from llmconvert.api import quantize_model

    made = quantize_model(model, output, progress=manners.progress(), ranks=manners.ranks, **options)
    lines = [f"{output}: {made.layers} layers quantized, {made.nbytes:,} bytes, {made.seconds:.1f} s"]
    if made.details.types:
        lines.append("types: " + ", ".join(f"{count} {kind}" for kind, count in made.details.types.items()))
    parts = made.details.model_dump(mode="json")
    if made.distilled is not None:
        parts["distillation"] = made.distilled.model_dump(mode="json")
        lines += _distilled(made.distilled)
    manners.result({"path": str(output), **parts}, *lines)


def _distilled(report: DistilReport) -> list[str]:
    gained = ""
    if report.before is not None and report.after is not None:
        gained = f": {report.before:.3f} → {report.after:.3f} nats from the original on held-out text"
    return [f"distilled in {report.steps} steps on {report.tokens:,} tokens, {report.seconds:.1f} s{gained}"]
