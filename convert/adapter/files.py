"""Adapters of peft as they lie in a directory or on the Hub: their config understood, their tensors read when asked.

``adapter_config.json`` and ``adapter_model.safetensors``. What is no sum of weights, or changes others than it names,
is refused by name.
"""

from __future__ import annotations

import hashlib
import math
import re
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

__all__ = ["CHAT_TEMPLATE", "CONFIG", "TOKENIZER", "Adapter", "open_adapter"]

#: What an adapter's config is called.
CONFIG = "adapter_config.json"
_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
#: What trainers put beside an adapter: the tokenizer that they made tokens by, and its chat template.
TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
# Keys of its config that a merge follows.
_READ: Final = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("init_lora_weights", "ensure_weight_tying"),
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
_EXPECTED: Final = {"r": "a whole number above 0", "lora_alpha": "a number"}
# Read at a time to look at.
_READ_NBYTES = 1 << 24
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
        files: :data:`TOKENIZER` and :data:`CHAT_TEMPLATE`, if they lie beside it.
    """

    origin: str
    revision: str | None
    config: Mapping[str, Any]
    tensors: Checkpoint
    fingerprint: str
    files: Mapping[str, Path]


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
    if (directory / _PICKLE).is_file() and not (directory / _WEIGHTS).is_file():
        raise SourceError(
            f"adapter {text}: has its weights as pickle ({_PICKLE}), which can run code when loaded; open it with "
            f"peft, and save it anew (save_pretrained), which writes {_WEIGHTS}"
        )
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
    _check_values(config, text)
    tensors = _AdapterTensors(directory / _WEIGHTS)
    _check_numbers(tensors, text)
    digest = hashlib.sha256((directory / CONFIG).read_bytes())
    with (directory / _WEIGHTS).open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 24), b""):
            digest.update(chunk)
    files = {name: directory / name for name in (TOKENIZER, CHAT_TEMPLATE) if (directory / name).is_file()}
    return Adapter(origin, revision, config, tensors, digest.hexdigest(), files)


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


def _check_values(config: Mapping[str, Any], text: str) -> None:
    """Refuse values of the wrong kind under the keys that a merge follows.

    Raises:
        CheckpointError: naming the key.
    """

    def require(key: str, value: Any, understood: bool, expected: str) -> None:
        if not understood:
            raise CheckpointError(f"adapter {text}: {CONFIG}: {key} is {value!r:.80}, expected {expected}")

    for key in ("fan_in_fan_out", "use_rslora", "use_dora", "ensure_weight_tying"):
        require(key, config.get(key), config.get(key) in (None, True, False), "true or false")
    numbers = {"r": _is_rank, "lora_alpha": _is_scale}
    for key, is_number in numbers.items():
        require(key, config.get(key), key not in config or is_number(config[key]), _EXPECTED[key])
    for key, one in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = config.get(key) or {}
        require(key, patterns, isinstance(patterns, dict), "names of modules with numbers")
        for pattern, value in patterns.items():
            require(f"{key}.{pattern}", value, numbers[one](value), _EXPECTED[one])
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"adapter {text}: {CONFIG}: {key}: {pattern!r} is no pattern: {error}") from error


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(tensors: Checkpoint, text: str) -> None:
    """Refuse weights that are no numbers to add.

    Raises:
        UnsupportedError: of another kind.
        CheckpointError: some of them are infinite, or none.
    """
    for name, info in tensors.infos.items():
        if not info.dtype.is_floating_point:
            kind = str(info.dtype).removeprefix("torch.")
            raise UnsupportedError(f"adapter {text}: tensor {name!r} is {kind}; expected floating-point numbers")
        rows = info.shape[0] if info.shape else 1
        step = max(1, _READ_NBYTES * rows // max(1, info.nbytes))
        for start in range(0, rows, step):
            if not tensors.read_rows(name, start, min(start + step, rows)).float().isfinite().all():
                raise CheckpointError(
                    f"adapter {text}: tensor {name!r} holds values that are infinite or no number, which its training "
                    "came to; take an earlier checkpoint of it"
                )
