"""``llmconvert inspect``: what a model is and needs, from its headers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from llmconvert.cli.manners import Manners, manners
from llmconvert.cli.say import beside

if TYPE_CHECKING:
    from llmconvert.convert.adapter.inspection import AdapterSummary
    from llmconvert.convert.inspection import ModelSummary, Stored


@click.command(short_help="Show what MODEL is and what it needs.")
@click.argument("model")
@manners
def inspect(model: str, manners: Manners) -> None:
    """Show what MODEL is and what it needs, from its headers alone; of a LoRA adapter what it changes.

    \b
    Example:
      llmconvert inspect Qwen/Qwen2.5-0.5B-Instruct
    """
    from dataclasses import asdict

    from llmconvert.convert.adapter.inspection import describe_adapter, find_adapter
    from llmconvert.convert.inspection import inspect_model
    from llmconvert.errors import HubError

    adapter = find_adapter(model)
    try:
        summary = inspect_model(model) if adapter is None else None
    except HubError as error:
        adapter = find_adapter(model, error)
        if adapter is None:
            raise
        summary = None
    if adapter is not None:
        about = describe_adapter(adapter)
        manners.result({"adapter": asdict(about)}, *beside(_adapter_rows(model, about)))
        return
    assert summary is not None
    said = {**asdict(summary), "bits_per_weight": summary.bits_per_weight}
    if (found := summary.quantizable) is not None:
        scheme = None if found.scheme is None else str(found.scheme)
        said["quantizable"] = {**asdict(found), "scheme": scheme, "taken": scheme is not None}
    manners.result(said, *beside(_rows(summary)))


def _rows(summary: ModelSummary) -> list[tuple[str, str]]:
    shared = "" if summary.attention in ("MHA", "MLA") else f" over {summary.kv_heads} key-value heads"
    heads = f"{summary.attention}, {summary.query_heads} heads of {summary.head_dim}{shared}"
    rows = [
        ("architecture", summary.architecture),
        ("parameters", _counted(summary)),
        ("layers", f"{summary.layers} of width {summary.hidden_size:,}"),
        ("attention", heads if summary.query_heads else "none"),
        ("positions", summary.positions),
        ("vocabulary", f"{summary.vocabulary:,}"),
    ]
    if summary.beside:
        towers = [(f"    {name}", f"{count:,}") for name, count in summary.parts.items()]
        met = f"{summary.beside:,}: towers for images or sound, and what joins them to the text"
        rows[2:2] = [("  met by no text", met), *towers, ("loaded by", summary.loader)]
    rows[2:2] = [(f"  {kind}", f"{count:,}") for kind, count in summary.kinds.items() if kind != "beside the text"]
    if summary.context:
        rows.append(("context", f"{summary.context:,} tokens"))
    if summary.windows:
        rows.append(("sliding windows", f"{summary.windows[1]:,} tokens in {summary.windows[0]} layers"))
    if summary.experts:
        routed = f", {summary.experts_per_token} for each token" if summary.experts_per_token else ""
        rows.append(("experts", f"{summary.experts} per layer{routed}"))
    cache = summary.kv_bytes_per_token
    told = f"{cache:,} bytes per token, {_size(cache * 4096)} at 4,096 tokens"
    rows.append(("KV cache, 16 bits", told if cache else "none"))
    if summary.quantization:
        bits = f", {summary.bits_per_weight:.3f} bits per weight in all" if summary.bits_per_weight else ""
        rows.append(("quantized", f"{summary.quantization}, {_size(summary.stored_bytes)}{bits}"))
        for way, stored in summary.mixture.items():
            rows.append((f"  {way}", f"{stored.weights:,} weights in {stored.tensors} tensors{_words(way)}"))
            rows += [("", line) for line in _where(stored, summary)]
    elif summary.mixture:
        only = len(summary.mixture) == 1
        ways = (way if only else f"{stored.weights:,} in {way}" for way, stored in summary.mixture.items())
        rows.append(("stored", f"{', '.join(ways)}, {_size(summary.stored_bytes)}"))
    if summary.devices:
        rows.append(("can be split", summary.devices))
    if summary.chat_template is not None:
        fault = summary.chat_template_fault
        said = f"one that fails, which runs refuse: {fault}" if fault else "yes"
        rows.append(("chat template", said if summary.chat_template else "none"))
    if summary.license is not None:
        rows.append(("licence", summary.license))
    if summary.unread:
        rows.append(("not read here", summary.unread))
    if summary.weight_bytes:
        sizes = (f"{_size(size)} in {name}" for name, size in summary.weight_bytes.items())
        rows.append(("weights", ", ".join(sizes)))
    return rows + _verdict(summary)


def _adapter_rows(name: str, summary: AdapterSummary) -> list[tuple[str, str]]:
    """What an adapter is, and the command that merges it."""
    scale = "" if summary.alpha is None else f", alpha {summary.alpha:g}{' (rslora)' if summary.rslora else ''}"
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in summary.dtypes.items())
    rows = [
        ("adapter", f"{summary.kind} of peft, for {summary.base or 'a model that it does not name'}"),
        ("rank", f"{', '.join(map(str, summary.ranks)) or 'none'}{scale}"),
        ("parameters", f"{dtypes}, {_size(summary.stored_bytes)}"),
    ]
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for module, layers in summary.modules.items():
        by_layers.setdefault(layers, []).append(module)
    for layers, modules in by_layers.items():
        several = "s" if len(layers) > 1 else ""
        rows.append(("changes", ", ".join(modules) + (f" in layer{several} {_ranges(layers)}" if layers else "")))
    if summary.whole:
        rows.append(("trained whole", ", ".join(summary.whole)))
    merge = f"llmconvert convert {summary.base or 'MODEL'} OUTPUT --adapter {name}"
    return [*rows, ("merge", f"{merge}; quantize takes --adapter too")]


def _verdict(summary: ModelSummary) -> list[tuple[str, str]]:
    """Whether ``quantize`` takes the model."""
    found = summary.quantizable
    if found is None:
        return [("quantize", "refuses it, since it is not read here")] if summary.unread else []
    if found.scheme is None:
        return [("quantize", f"refuses it: {found.reason}")]
    share = f", {found.weights / summary.parameters:.0%} of the parameters" if summary.parameters else ""
    anew = " with --requantize (it was quantized for deployment)" if summary.released is False else ""
    rows = [("quantize", f"takes it{anew}, for example in {found.scheme} by gptq{share}")]
    return rows + [("  note", note) for note in found.notes]


def _where(stored: Stored, summary: ModelSummary) -> Iterator[str]:
    """Which of the blocks' matrices are stored so, and in which layers, where the blocks have several ways."""
    mixed = [one for one in summary.mixture.values() if any(_is_matrix(name) for name in one.where)]
    if len(mixed) < 2:
        return
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for name, layers in stored.where.items():
        if _is_matrix(name):
            by_layers.setdefault(layers, []).append(name.rpartition(".*.")[2])
    for layers, names in by_layers.items():
        places = (
            "all layers"
            if len(layers) == summary.layers
            else f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}"
        )
        yield f"{', '.join(dict.fromkeys(names))} in {places}"


def _is_matrix(name: str) -> bool:
    """Whether that is a block's linear, as far as names tell."""
    return ".*." in name and not name.endswith(("norm", ".bias", "_norm1", "_norm2"))


def _ranges(numbers: Sequence[int]) -> str:
    """``0 to 3, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _words(way: str) -> str:
    from llmconvert.errors import SchemeError
    from llmconvert.quantize.scheme import Scheme

    try:
        return f": {Scheme.parse(way).words}"
    except SchemeError:  # a GGUF type, or a dtype
        return ""


def _counted(summary: ModelSummary) -> str:
    count = "not known" if summary.parameters is None else f"{summary.parameters:,}"
    return f"{count}{', embeddings tied' if summary.tied else ''}"


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 10e9 else f"{size / 1e6:,.1f} MB"
