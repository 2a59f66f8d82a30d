"""What an adapter of peft is, from its config and its tensors' headers: for which model, how large, what it changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llmconvert.convert.adapter.files import CONFIG, Adapter, open_adapter
from llmconvert.convert.adapter.view import sorted_tensors
from llmconvert.convert.source import parse_hub_id
from llmconvert.errors import HubError
from llmconvert.text.files import local_path

__all__ = ["AdapterSummary", "describe_adapter", "find_adapter"]


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What :func:`describe_adapter` finds.

    Attributes:
        kind: ``LoRA`` or ``DoRA``.
        base: the model that it was trained on, as its config names it; None if it does not.
        ranks: of its products; several where modules have ranks of their own.
        alpha: by which products are scaled, divided by the rank, or by its root under ``rslora``; None if not said.
        rslora: whether the root is taken.
        modules: what is changed, as ``self_attn.q_proj`` → in which layers; none of what is in no layer.
        whole: parameters that were trained and saved whole.
        parameters: numbers in all tensors.
        stored_bytes: of all tensors.
        dtypes: of the tensors → how many numbers.
    """

    kind: str
    base: str | None
    ranks: tuple[int, ...]
    alpha: float | None
    rslora: bool
    modules: Mapping[str, tuple[int, ...]]
    whole: tuple[str, ...]
    parameters: int
    stored_bytes: int
    dtypes: Mapping[str, int]


def find_adapter(text: str, problem: Exception | None = None) -> Adapter | None:
    """The adapter that ``text`` names, if it names one and no model.

    Args:
        problem: why the Hub has no such model; without it only a directory is looked at.

    Raises:
        LlmconvertError: see :func:`~llmconvert.convert.adapter.files.open_adapter`.
    """
    directory = local_path(text)
    if directory.is_dir():
        here = (directory / CONFIG).is_file() and not (directory / "config.json").exists()
        return open_adapter(text) if here else None
    if problem is None or parse_hub_id(text) is None:
        return None
    try:
        return open_adapter(text)
    except HubError:
        return None


def describe_adapter(adapter: Adapter) -> AdapterSummary:
    """Summarize an adapter without reading a weight.

    Raises:
        UnsupportedError: it holds what no LoRA of linears and embeddings has.
        CheckpointError: it holds nothing.
    """
    parts, whole = sorted_tensors(adapter)
    infos, config = adapter.tensors.infos, adapter.config
    ranks, layers, dora = set[int](), dict[str, set[int]](), False
    for module, found in parts.items():
        words = module.split(".")
        at = next((place for place, word in enumerate(words) if word.isdecimal()), None)
        name = ".".join(words[at + 1 :]) if at is not None else words[-1]
        layers.setdefault(name, set()).update([int(words[at])] if at is not None else [])
        ranks |= {infos[stored].shape[0] for part, stored in found.items() if part in ("lora_A", "lora_embedding_A")}
        dora = dora or "lora_magnitude_vector" in found
    numbers = Counter[str]()
    for info in infos.values():
        numbers[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    base, alpha = config.get("base_model_name_or_path"), config.get("lora_alpha")
    return AdapterSummary(
        kind="DoRA" if dora else "LoRA",
        base=base if isinstance(base, str) and base else None,
        ranks=tuple(sorted(ranks)),
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
        rslora=bool(config.get("use_rslora")),
        modules={name: tuple(sorted(at)) for name, at in layers.items()},
        whole=tuple(sorted(whole.values())),
        parameters=numbers.total(),
        stored_bytes=sum(info.nbytes for info in infos.values()),
        dtypes=dict(numbers),
    )
