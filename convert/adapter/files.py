"""Adapters of peft as they lie in a directory or on the Hub: their config understood, their tensors read when asked.

``adapter_config.json`` and ``adapter_model.safetensors``. What is no sum of weights, or changes others than it names,
is refused by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from llmconvert.convert.source import parse_hub_id
from llmconvert.errors import ChangedError, CheckpointError, SourceError, UnsupportedError
from llmconvert.hub import fetch_adapter
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint, read_header
from llmconvert.storage.parsing import read_json
from llmconvert.text.files import local_path

__all__ = ["CONFIG", "Adapter", "open_adapter"]

#: What an adapter's config is called.
CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
# Keys of its config that a merge follows.
_READ: Final = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        "init_lora_weights",
    )
)
# Keys that say nothing of what the weights come to: which modules were trained the file itself tells, and how.
_SILENT: Final = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules"),
        *("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision"),
        *("runtime_config", "target_modules", "task_type", "velora_config"),
    )
)
# Beginnings that leave the base's weights as they are. Others (pissa, olora, corda, loftq, lora_ga) subtract from them.
_PLAIN_BEGINNINGS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
_UNSET: Final[tuple[Any, ...]] = (None, False, "", [], {})


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was opened.

    Attributes:
        origin: as a record may name it: ``org/name``, or the path as given.
        revision: the commit on the Hub; None for a directory.
        config: its ``adapter_config.json``.
        tensors: its weights.
        fingerprint: changes when it does.
    """

    origin: str
    revision: str | None
    config: Mapping[str, Any]
    tensors: Checkpoint
    fingerprint: str


def open_adapter(text: str, *, progress: Progress = SILENT) -> Adapter:
    """Find and open the adapter that ``text`` names: a directory, or a Hub id ``org/name[@revision]``.

    Raises:
        SourceError: neither, or no adapter is there.
        CheckpointError: its files are corrupt.
        HubError: the Hub refused or could not be reached.
        UnsupportedError: its config says what can't be merged.
    """
    directory, origin, revision = local_path(text), text, None
    if not directory.is_dir():
        hub = parse_hub_id(text)
        if hub is None:
            raise SourceError(f"adapter {text!r}: no such directory, and no Hub id org/name[@revision]")
        fetched = fetch_adapter(*hub, progress=progress)
        directory, origin, revision = fetched.directory, fetched.repo_id, fetched.commit_hash
    for name in (CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise SourceError(f"adapter {text}: has no {name}; expected a directory that peft wrote (save_pretrained)")
    try:
        config = read_json(directory / CONFIG)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG}: holds a JSON {type(config).__name__}, expected an object")
    _check(config, text)
    digest = hashlib.sha256((directory / CONFIG).read_bytes())
    with (directory / _WEIGHTS).open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 24), b""):
            digest.update(chunk)
    return Adapter(origin, revision, config, _AdapterTensors(directory / _WEIGHTS), digest.hexdigest())


class _AdapterTensors(Checkpoint):
    """The one file of an adapter's weights; it is opened for each read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.infos, self._offsets, _ = read_header(path)
        self.config, self.files = {}, {}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.infos[name]
        out = torch.empty((max(0, stop - start), *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        if out.numel() == 0:
            return out
        first = self._offsets[name] + start * math.prod(info.shape[1:]) * info.dtype.itemsize
        with self._path.open("rb") as file:
            file.seek(first)
            if file.readinto(out.reshape(-1).view(torch.uint8).numpy().data) != out.nbytes:
                raise ChangedError(f"{self._path}: the file ended inside {name}; it changed on disk")
        return out


def _check(config: Mapping[str, Any], text: str) -> None:
    """Refuse what is no LoRA, or one that isn't merged by adding to weights."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"adapter {text}: peft_type is {kind!r}; LORA can be merged. Merge it with peft itself")
    for key, value in config.items():
        if key not in _READ and key not in _SILENT and value not in _UNSET:
            raise UnsupportedError(
                f"adapter {text}: {CONFIG} has {key}: {value!r}, and what that does to the weights is not known here; "
                "merge it with peft (merge_and_unload), and give the model that was saved"
            )
    beginning = config.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        raise UnsupportedError(
            f"adapter {text}: init_lora_weights is {beginning!r}, which changed the base's weights too; have peft "
            "convert it to a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
