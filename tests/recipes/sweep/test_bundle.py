"""A set of GGUF files: made in one go, in one directory, with a card that compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.image_families import save_images_family

from llmconvert.errors import RecipeError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.hub.card import front_matter, state_of_card
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.runner import run_recipe
from llmconvert.recipes.sweep.expand import load_sweep
from llmconvert.recipes.sweep.job import run_sweep
from llmconvert.report.report import Report
from llmconvert.report.steps import QuantizeReport
from llmconvert.validate.render.set_card import SetMember, render_set_card

SCHEMES = ["q4_0", "q5_0", "q8_0"]


def test_a_set_of_gguf_files_is_published_with_one_card(write_recipe: Any, tiny_llama: Path, tmp_path: Path) -> None:
    target = {"to": f"file:{tmp_path / 'set'}", "set": True}
    quantize = {"method": "imatrix", "format": "gguf", "schemes": SCHEMES}
    sweep = load_sweep(write_recipe("many", quantize=quantize, publish=target))
    assert sweep is not None and [variant.settings["quantize.scheme"] for variant in sweep.variants] == SCHEMES
    result = run_sweep(sweep)
    assert not result.failures
    assert {made.published for made in result.results.values()} == {target["to"]}
    directory = tmp_path / "set"
    files = sorted(path.name for path in directory.glob("*.gguf"))
    assert [name.rpartition("-")[2] for name in files] == ["Q4_0.gguf", "Q5_0.gguf", "Q8_0.gguf"]
    card = (directory / "README.md").read_text()
    for variant, name in zip(sweep.variants, files, strict=True):
        artifact = result.results[variant.name].artifact
        assert (directory / name).read_bytes() == (artifact / name).read_bytes()
        report = Report.read(directory / "llmconvert" / variant.name.removeprefix("many-") / "report.json")
        value = report["perplexity"].value
        assert value is not None and f"| [{name}]({name}) |" in card and f"| {value:.2f} |" in card
        with open_gguf(directory / name) as stored:
            assert stored.config["model_type"] == "llama"
    assert f"\n# {tiny_llama.name}\n" in card
    assert "![Size against KL](llmconvert/sizes.png)" in card
    assert (directory / "llmconvert" / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert "- 8 GB: `" in card and "with 32k tokens of context" in card
    assert {"gguf", "llmconvert"} <= set(front_matter(card, "card")["tags"])
    listed = json.loads((directory / "llmconvert" / "publication.json").read_text())
    assert listed["recipe"] == "many" and "README.md" in listed["files"]
    run_sweep(sweep)  # again: everything is there, and the same directory takes it
    assert (directory / "README.md").read_text() == card


@pytest.mark.slow
def test_a_set_of_a_model_for_images_has_one_projector(write_recipe: Any, tmp_path: Path) -> None:
    model = save_images_family(tmp_path / "Looking-1M", "smolvlm")
    target = {"to": f"file:{tmp_path / 'set'}", "set": True}
    quantize = {"method": "rtn", "format": "gguf", "schemes": ["q4_0", "q8_0"]}
    sweep = load_sweep(write_recipe("many", model=str(model), quantize=quantize, publish=target))
    assert sweep is not None
    result = run_sweep(sweep)
    assert not result.failures
    names = sorted(path.name for path in (tmp_path / "set").glob("*.gguf"))
    assert names == ["Looking-1M-Q4_0.gguf", "Looking-1M-Q8_0.gguf", "mmproj-Looking-1M-f16.gguf"]
    made = next(iter(result.results.values()))
    (details,) = (step.details for step in made.report.steps if isinstance(step.details, QuantizeReport))
    assert details.projector == names[-1]
    card = (made.artifact / "README.md").read_text()
    assert f"llama-mtmd-cli -m {names[0]} --mmproj {names[-1]} --image photo.jpg" in card


def test_variants_apart_have_cards_that_compare_all(write_recipe: Any, tmp_path: Path) -> None:
    quantize = {"method": "rtn", "schemes": ["w4a16-g32", "w8a16-g32"]}
    target = {"to": f"file:{tmp_path}/out-{{scheme}}", "set": True}
    sweep = load_sweep(write_recipe("many", quantize=quantize, publish=target))
    assert sweep is not None
    result = run_sweep(sweep)
    assert not result.failures
    for scheme, (name, made) in zip(quantize["schemes"], result.results.items(), strict=True):
        directory = tmp_path / f"out-{scheme}-sym"
        assert made.published == f"file:{directory}"
        own, card = (made.artifact / "README.md").read_text(), (directory / "README.md").read_text()
        assert front_matter(own, "own") == front_matter(card, "card")
        assert card.startswith(own.partition("<!-- llmconvert")[0]) and own.partition("-->")[2].strip() in card
        text = card.partition("## The set")[2]
        for other, report in result.reports.items():
            assert f"| {other.removeprefix('many-')} |" in text and f"| {report['perplexity'].value:.2f} |" in text
        assert state_of_card(card, "set") == "ours" and name in result.reports
        files = {path.relative_to(made.artifact): path for path in made.artifact.rglob("*") if path.is_file()}
        for inside, path in files.items():
            assert inside.name == "README.md" or (directory / inside).read_bytes() == path.read_bytes()
    run_sweep(sweep)  # again: the same directories take it


def test_sets_that_cannot_be_are_refused(write_recipe: Any, tmp_path: Path) -> None:
    target = {"to": f"file:{tmp_path / 'set'}", "set": True}
    one = write_recipe("one", quantize={"method": "rtn", "scheme": "w4a16-g32"}, publish=target)
    with pytest.raises(RecipeError, match=r"publish.set: is for the variants of a sweep"):
        run_recipe(load_recipe(one))
    quantize = {"method": "rtn", "format": "gguf", "schemes": SCHEMES}
    mixed = write_recipe(
        "mixed",
        quantize={"method": "rtn", "format": "gguf", "scheme": "q4_0"},
        matrix={"quantize.scheme": SCHEMES[:2], "validate.perplexity.max_windows": [3, 4]},
        publish={**target, "to": f"file:{tmp_path}/{{scheme}}"},
    )
    picked = write_recipe("picked", quantize=quantize, publish=target, pick="smallest within 2%")
    for path, message in (
        (mixed, r"all variants go to one place, or each to its own"),
        (picked, r"pick one of them; leave one out"),
    ):
        sweep = load_sweep(path)
        assert sweep is not None
        with pytest.raises(RecipeError, match=message):
            run_sweep(sweep)


def test_what_fits_into_a_machine_is_said_with_its_context() -> None:
    def member(place: str, size: float, cost: float) -> SetMember:
        checks = [{"name": "size_bytes", "value": size}, {"name": "kl_mean", "value": cost}]
        notes = ["of all", *(["of one alone"] if place == "huge.gguf" else [])]
        step = {"name": "quantize", "seconds": 1, "details": {"layers": 1, "bytes": size, "seconds": 1, "notes": notes}}
        about = {"schema": "llmconvert.report/1", "model": {"name": "m", "source": "org/m"}, "checks": checks}
        return SetMember(place, Report.model_validate({**about, "steps": [step]}), 100_000)

    members = {
        "a": member("small.gguf", 3e9, 0.2),
        "b": member("large.gguf", 13e9, 0.1),
        "c": member("huge.gguf", 30e9, 0),
    }
    card = render_set_card("", "m", members, None)
    assert "- 8 GB: `small.gguf`, with 32k tokens of context" in card
    assert "- 16 GB: `small.gguf`, with 32k tokens of context" in card  # the larger one leaves too little for it
    assert "- 24 GB: `large.gguf`, with 32k tokens of context" in card
    assert "3.4 GB | 6.3 GB |" in card
    assert "## What to know\n\n- Of all.\n- Of one alone. (`huge.gguf`)\n" in card
