"""What pages show of the code is what the code says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import generated
import pytest
from support.pages import ROOT

import llmconvert
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.schema.reference import markdown_reference


@pytest.mark.parametrize(("page", "name"), generated.PARTS, ids=lambda part: str(part))
def test_generated_parts_are_current(page: str, name: str) -> None:
    """``python docs/hooks/generated.py`` writes them."""
    assert generated.filled(page, name, generated.PARTS[page, name]()) == (ROOT / page).read_text(encoding="utf-8")


def test_a_page_without_the_part_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# nothing generated\n")
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="expected one part table, found 0"):
        generated.filled("page.md", "table", "x")


def test_the_recipe_reference_names_every_key_of_a_full_recipe() -> None:
    """Judged by the defaults that pydantic writes out, not by the schema that the reference is made from."""
    sections = {
        "model": "m",
        "attention": {"kv_heads": 1, "heal": {}},
        "calibrate": {"dataset": "d"},
        "quantize": {
            "method": "gptq",
            "budget": {"bits_per_weight": 4},
            "rotate": True,
            "overrides": [{"match": "*", "scheme": "none"}],
        },
        "validate": {
            "perplexity": {"dataset": "e"},
            "generation": True,
            "attention": ["eager"],
            "positions": True,
            "memory": True,
            "decoding": True,
            "serve": ["mlx"],
            "tasks": ["t"],
            "repair": True,
        },
        "publish": {"to": "file:out"},
    }
    found = dict(_tables(markdown_reference()))

    def compare(path: str, values: dict[str, object]) -> None:
        assert set(values) <= set(found[path]), path
        for key, value in values.items():
            own = f"{path}.{key}" if path else key
            if isinstance(value, dict) and own in found:
                compare(own, value)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                compare(f"{own}[]", value[0])

    compare("", Recipe.model_validate(sections).to_mapping())
    assert found["calibrate"]["samples"] == ["whole number, ≥ 1", "`128`"]
    assert found["validate"]["min_top1"][0] == "a share: `5%` or `0.05`"
    assert "or `true`" in found["validate"]["generation"][0] and "or `true`" not in found["validate"]["perplexity"][0]
    assert found["quantize"]["scheme"][1] == "**required**"


def _tables(text: str) -> list[tuple[str, dict[str, list[str]]]]:
    """Section path → key → value and default, read back from the Markdown."""
    sections = []
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        heading = part.partition("\n")[0].strip("`")
        rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", part, re.MULTILINE)
        sections.append(
            ("" if heading == "The recipe" else heading, {key: [value, default] for key, value, default in rows})
        )
    return sections


def test_the_api_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: llmconvert\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(llmconvert.__all__) - {"__version__"})


def test_which_method_is_told_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without a mark in the table of docs/methods.md are rows of the page that the picture is drawn from."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    picture = importlib.import_module("choice_plot")
    rows = picture.own_rows((ROOT / "bench/results/2026-11-30-quality-epyc.md").read_text(encoding="utf-8"))
    table = re.findall(
        r"^\|[^|]*\|[^|]*\| `(\w+)`.*?`([\w-]+)`[^|`]*\|[^|]*\| ([\d.]+) \|$", _methods_page(), re.MULTILINE
    )
    assert len(table) >= 8
    for method, scheme, divergence in table:
        digits = len(divergence.partition(".")[2])
        assert any(
            (row.method, row.label.split()[-1]) == (method, scheme) and f"{row.divergence:.{digits}f}" == divergence
            for row in rows
        ), (method, scheme)
    assert picture.draw_choice(rows).startswith(b"\x89PNG")


def _methods_page() -> str:
    return (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
