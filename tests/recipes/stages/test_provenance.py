"""Base model and licence: what the source's metadata says, and nothing that it doesn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_gguf import byte_level_metadata, model_metadata, stored_tensors, tiny_model, write_gguf
from support.tiny_models import tiny_llama_dir

from llmconvert.convert.source import Source, open_source
from llmconvert.recipes.stages.provenance import Provenance, provenance


def of_gguf(tmp_path: Path, **general: str) -> Provenance:
    model = tiny_model("llama")
    metadata = {key.replace("__", "."): value for key, value in general.items()}
    known = model_metadata(model) | byte_level_metadata()
    source = open_source(str(write_gguf(tmp_path / "tiny.gguf", known | metadata, stored_tensors(model))))
    with source.checkpoint:
        return provenance(source)


@pytest.mark.parametrize(
    ("metadata", "base_model", "parents"),
    [
        ({}, None, ()),
        ({"general__organization": "maker", "general__name": "Tiny", "general__basename": "tiny"}, None, ()),
        ({"general__source__repo_url": "https://huggingface.co/maker/Tiny"}, "maker/Tiny", ()),
        ({"general__source__url": "https://hf.co/maker/Tiny.1-b/tree/main"}, "maker/Tiny.1-b", ()),
        ({"general__source__huggingface__repository": "maker/Tiny"}, "maker/Tiny", ()),
        ({"general__source__url": "https://example.org/maker/Tiny"}, None, ()),
        ({"general__source__url": "https://huggingface.co/datasets/maker"}, None, ()),
        ({"general__source__url": "https://huggingface.co.example.org/maker/Tiny"}, None, ()),
        ({"general__base_model__0__repo_url": "https://huggingface.co/maker/Base"}, None, ("maker/Base",)),
        ({"general__base_model__0__repo_url": "https://huggingface.co/../x"}, None, ()),
    ],
)
def test_gguf_metadata_that_names_a_repository(
    tmp_path: Path, metadata: dict[str, str], base_model: str | None, parents: tuple[str, ...]
) -> None:
    found = of_gguf(tmp_path, **metadata)
    assert (found.base_model, found.parents) == (base_model, parents)


def test_gguf_licence(tmp_path: Path) -> None:
    assert of_gguf(tmp_path, general__license="apache-2.0").inherited == {"license": "apache-2.0"}
    named = {"general__license": "other", "general__license__name": "tiny-community"}
    found = of_gguf(tmp_path, **named, general__license__link="LICENSE.txt").inherited
    assert found == {"license": "other", "license_name": "tiny-community", "license_link": "LICENSE.txt"}
    assert of_gguf(tmp_path, general__license="See the LICENSE file").inherited == {}


def test_a_directory_and_a_hub_model(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "maker" / "Tiny")
    local = open_source(str(directory))
    assert provenance(local) == Provenance()
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    checkpoint = open_source(str(directory)).checkpoint
    for kind, base_model in (("directory", None), ("hub", "maker/Tiny")):
        values: dict[str, Any] = {"kind": kind, "origin": "maker/Tiny", "revision": None, "path": directory}
        found = provenance(Source(**values, checkpoint=checkpoint))
        assert found == Provenance(base_model, (), {"license": "mit"})
