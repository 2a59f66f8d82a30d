"""``llmconvert convert``: another dtype, or fewer key-value heads (MHA to GQA or MQA)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmconvert.cli.manners import DtypeName, Manners, calibration_option, manners, plan_option

if TYPE_CHECKING:
    from llmconvert.report.steps import AttentionReport, HealReport


@click.command(short_help="Write MODEL in another dtype.")
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--dtype", type=DtypeName(), help="Or bf16, fp16, fp32. [default: bfloat16]")
@click.option(
    "--overflow",
    type=click.Choice(["error", "clip"]),
    help="What to do with values beyond or below the dtype's range. [default: error]",
)
@click.option("--rope-scaling", metavar="KIND:FACTOR", help="Stretch positions: yarn:2.0, linear:4, dynamic:2.")
@click.option("--adapter", metavar="DIR|ID", help="Merge this LoRA of peft into the model first.")
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights; what is more than tensors is refused.")
@click.option("--kv-heads", type=int, help="Merge key-value heads to this number per layer; 1 is MQA.")
@click.option("--gqa-method", type=click.Choice(["svd", "mean", "first"]), help="[default: svd]")
@click.option("--refit/--no-refit", default=None, help="Refit merged attention to the original's. [default: refit]")
@click.option("--heal-steps", type=int, help="Steps of distillation after the merge. [default: 0]")
@click.option("--heal-train", type=click.Choice(["attention", "all", "lora"]), help="What learns. [default: attention]")
@calibration_option("Text for the merge, pydoc-topics:train for example")
@click.option("--samples", type=int, help="Windows of calibration text. [default: 128]")
@click.option("--length", type=int, help="Tokens per window. [default: 2048]")
@click.option("--order", type=click.Choice(["shuffled", "sequential"]), help="[default: shuffled]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--device", help="Where to merge: cpu, cuda, cuda:N or auto. [default: cpu]")
@click.option("--stream", is_flag=True, help="Convert while downloading; disk need: the output and two source shards.")
@plan_option
@manners
def convert(model: str, output: Path, plan: bool, manners: Manners, **options: Any) -> None:
    """Write MODEL to the directory OUTPUT as safetensors in another dtype, in constant memory.

    With --kv-heads, its attention is rewritten to fewer key-value heads: a smaller cache at long context.

    \b
    Examples:
      llmconvert convert model.gguf out/model --dtype bfloat16
      llmconvert convert org/name out/model --stream
      llmconvert convert org/name out/gqa --kv-heads 8 \\
          --calibration pydoc-topics:train --length 512
    """
    if plan:
        from llmconvert.cli.plan import show_plan
        from llmconvert.recipes.options import convert_recipe

        recipe = convert_recipe({**options, "model": model})
        from llmconvert.recipes.plans.commands import plan_making

        show_plan(plan_making(recipe, output), manners)
        return
    from llmconvert.api import convert_model

    made = convert_model(model, output, progress=manners.progress(), **options)
    lines: list[str] = []
    if made.dtype is not None:
        report = made.dtype
        error = f"{report.largest_relative_error:.2e} in {report.largest_error_tensor}" if report.cast else "none"
        lines.append(
            f"{output}: {report.tensors:,} tensors, {report.bytes_written:,} bytes, {report.seconds:.1f} s, "
            f"largest relative rounding error {error}"
        )
    if made.attention is not None:
        lines += _merged(output, made.attention, made.healing)
    parts = {"dtype": made.dtype, "attention": made.attention, "healing": made.healing}
    said = {name: part.model_dump(mode="json") for name, part in parts.items() if part is not None}
    manners.result({"path": str(output), **said}, *lines)


def _merged(output: Path, report: AttentionReport, healed: HealReport | None) -> Iterator[str]:
    (before, after), (wide, narrow) = report.kv_heads, report.kv_bytes_per_token
    losses = [layer.output_loss for layer in report.layers if layer.output_loss is not None]
    lost = f", {sum(losses) / len(losses):.1%} of what attention should add lost on the average" if losses else ""
    yield (
        f"{output}: {before} → {after} key-value heads, {wide:,} → {narrow:,} cache bytes per token, "
        f"{report.nbytes:,} bytes, {report.seconds:.1f} s{lost}"
    )
    if healed is not None and healed.before is not None and healed.after is not None:
        yield (
            f"healed in {healed.steps} steps on {healed.tokens:,} tokens, {healed.seconds:.1f} s: "
            f"{healed.before:.3f} → {healed.after:.3f} nats from the original on held-out text"
        )
    for note in report.left_out:
        yield f"note: {note}"
