"""A model on the Hub seen through its headers: a few kilobytes instead of the whole download.

Safetensors headers are read with HTTP range requests
(https://huggingface.co/docs/safetensors/metadata_parsing).
"""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from llmconvert.checkpoint import DTYPES, Checkpoint, TensorInfo
from llmconvert.errors import CheckpointError
from llmconvert.hub import hub_errors

__all__ = ["RemoteCheckpoint"]


class RemoteCheckpoint(Checkpoint):
    """Names, dtypes, shapes and config of a Hub model. Its tensors cannot be read.

    Args:
        model_id: ``org/name``.
        revision: branch, tag or commit; the default branch if None.

    Raises:
        HubError: the Hub refused or could not be reached.
        CheckpointError: the repository has no safetensors, or their headers are malformed.
    """

    def __init__(self, model_id: str, revision: str | None = None) -> None:
        self._model_id = model_id
        try:
            with hub_errors(model_id, revision):
                config = Path(huggingface_hub.hf_hub_download(model_id, "config.json", revision=revision))
                metadata = huggingface_hub.get_safetensors_metadata(model_id, revision=revision)
            # The cache files a download under the commit that the revision stood for.
            self.commit_hash = config.parent.name
            self.config = json.loads(config.read_bytes())
        except (NotASafetensorsRepoError, SafetensorsParsingError, ValueError) as error:
            raise CheckpointError(f"{model_id}: {str(error).splitlines()[0]}") from error
        self.files = {}
        infos: dict[str, TensorInfo] = {}
        for shard, file in sorted(metadata.files_metadata.items()):
            # In on-disk order, as from files on this disk.
            for name, tensor in sorted(file.tensors.items(), key=lambda entry: entry[1].data_offsets):
                if tensor.dtype not in DTYPES:
                    raise CheckpointError(f"{model_id}: tensor {name!r} has dtype {tensor.dtype!r}, which is not known")
                infos[name] = TensorInfo(name, DTYPES[tensor.dtype], tuple(tensor.shape), shard)
        self.infos = infos

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise CheckpointError(f"{self._model_id}: only headers were read; fetch the model to read {name!r}")
