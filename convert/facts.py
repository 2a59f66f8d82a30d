"""What a user asks of a model besides its sizes: what its parameters are for, licence, chat template, devices.

From headers and small files alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.architecture.families import EMBEDDINGS, HEADS
from llmconvert.errors import HubError, SourceError
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.hub.card import CARD, front_matter
from llmconvert.quantize.formats.dense_view import QuantizedView
from llmconvert.quantize.serving.fused_blocks import cut_at_seams
from llmconvert.quantize.serving.kernel_groups import unusual_groups
from llmconvert.quantize.serving.tensor_parallel import Matrix, tensor_parallel
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.chat import ChatTemplate, render_prompts

__all__ = ["chat_template", "chat_template_fault", "devices", "licence", "parameters_by_kind", "parts_beside"]


_ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight", ".gate.wg.weight")


def parts_beside(dense: Checkpoint, beside: frozenset[str]) -> dict[str, int]:
    """Parts that text never meets, by the first of their names that tells them apart → numbers in them."""
    found: dict[str, int] = {}
    for name in beside:
        words = name.removeprefix("model.").split(".")
        found[words[0]] = found.get(words[0], 0) + math.prod(dense.infos[name].shape)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def parameters_by_kind(dense: Checkpoint, beside: frozenset[str]) -> dict[str, int]:
    """Kind → numbers in tensors of it: embeddings, output head, experts, routers, attention, MLP, beside the text, …"""
    found: dict[str, int] = {}
    for name, info in dense.infos.items():
        kind = "beside the text" if name in beside else _kind(name, len(info.shape))
        found[kind] = found.get(kind, 0) + math.prod(info.shape)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kind(name: str, dimensions: int) -> str:
    if name.endswith(HEADS):
        return "output head"
    if any(part in name for part in EMBEDDINGS):
        return "embeddings"
    if dimensions < 2:
        return "norms and biases"
    if "shared_expert" in name:
        return "shared experts"
    if "experts." in name:
        return "experts"
    if name.endswith(_ROUTERS):
        return "routers"
    if "attn" in name or "attention" in name:
        return "attention"
    return "MLP" if "mlp" in name or "ffn" in name or "feed_forward" in name else "other"


def chat_template(checkpoint: Checkpoint) -> bool | None:
    """Whether the tokenizer has one; None where small files were not fetched."""
    files = checkpoint.files
    if not files:
        return None
    if any(name.startswith("chat_template") for name in files):
        return True
    with suppress(ValueError, KeyError, OSError):
        return bool(json.loads(checkpoint.read_file("tokenizer_config.json")).get("chat_template"))
    return False


def chat_template_fault(checkpoint: Checkpoint) -> str:
    """What the tokenizer's chat template makes of a user's message where it fails, as a run would find; else nothing.

    Raises:
        MachineError: no process can be started for it.
    """
    config: Any = {}
    with suppress(ValueError, KeyError, OSError):
        config = json.loads(checkpoint.read_file("tokenizer_config.json"))
    config = config if isinstance(config, dict) else {}
    text = config.get("chat_template")
    with suppress(KeyError, OSError, UnicodeDecodeError):
        text = checkpoint.read_file("chat_template.jinja").decode()
    if isinstance(text, list):  # of several, each with a name
        text = next((one.get("template") for one in text if isinstance(one, dict) and one.get("name") == "default"), "")
    if not isinstance(text, str) or not text:
        return ""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    tokens = tuple((name, value) for name, value in named.items() if isinstance(value, str))
    try:
        render_prompts(ChatTemplate(text, tokens), ("Hello",))
    except SourceError as error:
        return str(error).removeprefix("the model's chat template: ")
    return ""


def licence(checkpoint: Checkpoint) -> str | None:
    """Its identifier, as the card or the file's metadata says it; None where nothing does."""
    found: Any = None
    if isinstance(checkpoint, GgufCheckpoint):
        found = checkpoint.general.get("general.license")
    elif CARD in checkpoint.files:
        with suppress(HubError, OSError):
            found = front_matter(checkpoint.read_file(CARD).decode(errors="replace"), CARD).get("license")
    names = found if isinstance(found, list) else [found]
    return ", ".join(name for name in names if isinstance(name, str)) or None


def devices(architecture: Architecture, dense: Checkpoint) -> str:
    """Over how many devices it can be split where it is served, or why it can't be served at all; empty of files that
    are split in other ways."""
    if isinstance(dense, GgufCheckpoint):
        return ""
    matrices = tuple(_matrices(dense))
    split = cut_at_seams(matrices) or str(tensor_parallel(architecture, matrices))
    groups = unusual_groups(matrix.scheme for matrix in matrices if matrix.scheme is not None)
    return "; ".join(filter(None, (split, groups)))


def _matrices(dense: Checkpoint) -> Iterator[Matrix]:
    for name, info in dense.infos.items():
        if len(info.shape) == 2:
            scheme = dense.scheme_of(name) if isinstance(dense, QuantizedView) else None
            yield Matrix(name, info.shape[0], info.shape[1], scheme)
