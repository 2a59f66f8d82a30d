"""A recipe's model known from its headers: where it lies on this disk, from there; on the Hub, by range requests."""

from __future__ import annotations

from dataclasses import dataclass

import huggingface_hub

from llmconvert.convert.download.shards import describe_remote
from llmconvert.convert.source import Source, parse_hub_id
from llmconvert.errors import UnsupportedError
from llmconvert.hub import missing_weights
from llmconvert.progress import SILENT
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.opening import open_model
from llmconvert.text.files import local_path

__all__ = ["Headers", "UnknownWeightsError", "open_headers"]


class UnknownWeightsError(UnsupportedError):
    """Nothing is known of a model's weights before they are fetched."""


@dataclass(frozen=True, slots=True)
class Headers:
    """A model of which nothing but headers and small files were read.

    Attributes:
        source: the model; its tensors can be read as well, from the Hub range by range.
        download: bytes of weights that a run fetches first.
    """

    source: Source
    download: int = 0


def open_headers(recipe: Recipe) -> Headers:
    """Look at a recipe's model without fetching its weights.

    Raises:
        UnknownWeightsError: the weights are pickle files that are still to be fetched.
        SourceError, HubError, CheckpointError: see :func:`llmconvert.convert.source.open_source`.
    """
    if recipe.stream:
        return Headers(open_model(recipe, SILENT))
    named = parse_hub_id(recipe.model) if not local_path(recipe.model).exists() else None
    if named is None or recipe.model.endswith(".gguf") or huggingface_hub.constants.HF_HUB_OFFLINE:
        return Headers(open_model(recipe, SILENT))
    missing = missing_weights(*named, allow_pickle=recipe.allow_pickle)
    if any(not name.endswith(".safetensors") for name in missing):
        raise UnknownWeightsError(
            f"{recipe.model}: its weights are pickle files, of which nothing is known before they are fetched "
            f"({sum(missing.values()) / 1e6:,.0f} MB); run it, or name a repository with safetensors"
        )
    if not missing:
        return Headers(open_model(recipe, SILENT))
    model = describe_remote(*named)
    remote = model.remote
    source = Source("hub", remote.repo_id, remote.commit_hash, remote.directory, model.checkpoint)
    return Headers(source, sum(missing.values()))
