"""``llmconvert convert``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write MODEL in another dtype.")
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option(
    "--overflow",
    type=click.Choice(["error", "clip"]),
    default="error",
    show_default=True,
    help="What to do with values too large for the dtype.",
)
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights, with weights_only=True.")
@click.option("--stream", is_flag=True, help="Convert while downloading; disk need: the output and two source shards.")
def convert(model: str, output: Path, dtype: str, overflow: str, allow_pickle: bool, stream: bool) -> None:
    """Write MODEL to the directory OUTPUT as safetensors in another dtype, in constant memory.

    \b
    Examples:
      llmconvert convert model.gguf out/model --dtype bfloat16
      llmconvert convert org/name out/model --stream
    """
    from llmconvert.progress import console_progress
    from llmconvert.recipes.loading import make_recipe
    from llmconvert.recipes.single import convert_model

    values = {"model": model, "allow_pickle": allow_pickle, "convert": {"dtype": dtype, "overflow": overflow}}
    report = convert_model(make_recipe(values, "convert"), output, stream=stream, progress=console_progress())
    error = f"{report.largest_relative_error:.2e} in {report.largest_error_tensor}" if report.cast else "none"
    click.echo(
        f"{output}: {report.tensors:,} tensors, {report.bytes_written:,} bytes, {report.seconds:.1f} s, "
        f"largest relative rounding error {error}"
    )
