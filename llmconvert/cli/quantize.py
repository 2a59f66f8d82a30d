"""``llmconvert quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(short_help="Quantize MODEL to a directory.")
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--method", help="gptq by default; of a GGUF type rtn, or imatrix with calibration text.")
@click.option("--scheme", help="For example w4a16-g128, w8a8; of GGUF q4_k_m, q8_0.")
@click.option("--bits-per-weight", type=float, help="Choose bits and groups by layer, for this mean.")
@click.option("--format", "format_", default="compressed-tensors", show_default=True, help="gguf for llama.cpp.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="PATTERN=SCHEME",
    help="Another scheme for layers whose name matches.",
)
@click.option("--rotate", is_flag=True, help="Rotate hidden states and values first, folded into the weights.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--calibration", metavar="FILE|NAME", help="Text to calibrate on, pydoc-topics:train for example.")
@click.option("--samples", type=int, default=128, show_default=True, help="Windows of calibration text.")
@click.option("--length", type=int, default=2048, show_default=True, help="Tokens per window.")
@click.option("--order", type=click.Choice(["shuffled", "sequential"]), default="shuffled", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--memory", metavar="SIZE", help="Use at most this much memory, 4GB for example.")
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights, with weights_only=True.")
@click.option("--stream", is_flag=True, help="Quantize while downloading, by a method without calibration.")
def quantize(model: str, output: Path, stream: bool, **options: Any) -> None:
    """Quantize MODEL to the directory OUTPUT, or to a .gguf file. Stopped, the same command continues.

    \b
    Example:
      llmconvert quantize org/name out/w4 --scheme w4a16-g128 \\
          --calibration pydoc-topics:train --samples 32 --length 512
      llmconvert quantize org/name out/mixed --bits-per-weight 4.25 --calibration FILE
      llmconvert quantize org/name model-q4_k_m.gguf --format gguf --scheme q4_k_m
    """
    from llmconvert.progress import console_progress
    from llmconvert.recipes.loading import make_recipe
    from llmconvert.recipes.single import quantize_model

    recipe = make_recipe({"model": model, **_settings(options)}, "quantize")
    details = quantize_model(recipe, output, stream=stream, progress=console_progress())
    layers, size, seconds = details["layers"], details["bytes"], details["seconds"]
    click.echo(f"{output}: {layers} layers quantized, {size:,} bytes, {seconds:.1f} s")


def _usual_method(options: dict[str, Any]) -> str:
    """Nothing in GPTQ chooses the scales of a GGUF type; what llama.cpp offers for them is an importance matrix."""
    if options["format_"] == "gguf" and not (options["scheme"] or "w").lower().startswith("w"):
        return "rtn" if options["calibration"] is None else "imatrix"
    return "gptq"


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe's sections that the options stand for."""
    overrides = []
    for text in options["overrides"]:
        pattern, separator, scheme = text.rpartition("=")
        if not separator:
            raise click.BadParameter(f"{text!r} is not PATTERN=SCHEME", param_hint="--override")
        overrides.append({"match": pattern, "scheme": scheme})
    if options["scheme"] is None and options["bits_per_weight"] is None:
        raise click.UsageError("give --scheme, or --bits-per-weight to have schemes chosen by layer")
    settings: dict[str, Any] = {
        "allow_pickle": options["allow_pickle"],
        "convert": {"dtype": options["dtype"]},
        "quantize": {
            "method": options["method"] or _usual_method(options),
            "scheme": options["scheme"],
            "format": options["format_"],
            "overrides": overrides,
            "rotate": options["rotate"],
        },
        "device": options["device"],
        "memory": options["memory"],
    }
    if options["bits_per_weight"] is not None:
        settings["quantize"]["budget"] = {"bits_per_weight": options["bits_per_weight"]}
    if options["calibration"] is not None:
        settings["calibrate"] = {
            "dataset": options["calibration"],
            **{key: options[key] for key in ("samples", "length", "order", "seed")},
        }
    return settings
