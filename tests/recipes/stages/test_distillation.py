"""``quantize.distil`` in runs and single commands: its stage, its texts, what it shares with others, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmconvert
from llmconvert.errors import OutputError, RecipeError
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.planning.planner import plan_recipe
from llmconvert.recipes.runner import run_recipe
from llmconvert.report.steps import DistilReport
from llmconvert.storage.directory import SINGLE_NAME

QUICK = {"steps": 4, "length": 32, "held_out": 2, "learning_rate": 5e-3}


@pytest.mark.slow
def test_a_run_distils_after_quantizing_and_keeps_the_codes_for_other_settings(write_recipe: Any) -> None:
    quantize = {"method": "rtn", "scheme": "w3a16-g32"}
    calibrate = {"dataset": "pydoc-topics:train", "samples": 4, "length": 64}
    recipe = load_recipe(write_recipe(calibrate=calibrate, quantize={**quantize, "distil": QUICK}))
    assert "distil" in [step.name for step in plan_recipe(recipe).steps]
    result = run_recipe(recipe)
    names = [step.name for step in result.report.steps]
    assert names.index("quantize") + 1 == names.index("distil")
    details = next(step.details for step in result.report.steps if step.name == "distil")
    assert isinstance(details, DistilReport) and details.steps == 4 and details.norms > 0 and details.moved == 0
    assert details.before is not None and details.after is not None and details.after < details.before
    assert "distillation" in {section.name for section in result.report.sections}
    assert "norms were trained and are not the original's" in (result.artifact / "README.md").read_text()
    inventory = result.report.check("inventory")
    assert inventory is not None and inventory.ok and "norms are changed" in inventory.text
    again = run_recipe(
        load_recipe(write_recipe(calibrate=calibrate, quantize={**quantize, "distil": {**QUICK, "norms": False}}))
    )
    reused = {step.name: step.reused for step in again.report.steps}
    assert reused["quantize"] and not reused["distil"]


@pytest.mark.parametrize("scheme", ["w3a16-g32", "q4_0"])
def test_the_command_writes_what_the_run_does(
    scheme: str, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": "rtn", "scheme": scheme, "calibration": texts[0], "length": 32}
    made = llmconvert.quantize_model(tiny_llama, tmp_path / "out", **settings, distil_steps=3)
    assert made.distilled is not None and made.distilled.steps == 3
    file = next((tmp_path / "out").glob("*.gguf"), tmp_path / "out" / SINGLE_NAME)
    assert made.nbytes == file.stat().st_size and (file.suffix == ".gguf") == (scheme == "q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if scheme == "q4_0":
        with pytest.raises(OutputError, match="name one, without"):
            llmconvert.quantize_model(tiny_llama, tmp_path / "out.gguf", **settings, distil_steps=3)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"quantize": {"method": "rtn", "scheme": "w4a16-g32", "distil": True}}, "names none"),
        ({"quantize": {"method": "rtn", "scheme": "nf4", "distil": QUICK}}, "prescribed"),
        ({"quantize": {"scheme": "f16", "distil": {"dataset": "pydoc-topics:train"}}}, "f16 stores floats"),
        (
            {"quantize": {"scheme": "iq4_nl", "distil": {"dataset": "pydoc-topics:train", "code_rate": 0.1}}},
            "iq4_nl, and only codes of integers can move",
        ),
        (
            {
                "calibrate": {"dataset": "pydoc-topics:train"},
                "quantize": {"budget": {"bits_per_weight": 4, "bits": ["mxfp4", 8]}, "distil": QUICK},
            },
            r"quantize\.budget: .*powers of two.* or name quantize\.budget\.bits without it",
        ),
        (
            {
                "calibrate": {"dataset": "pydoc-topics:train"},
                "quantize": {
                    "format": "gguf",
                    "budget": {"bits_per_weight": 5},
                    "distil": {**QUICK, "code_rate": 0.1},
                },
            },
            r"quantize\.budget: .*iq4.*code_rate to 0, or name quantize\.budget\.types without it",
        ),
        (
            {
                "calibrate": {"dataset": "pydoc-topics:train"},
                "quantize": {"scheme": "w4a16-g32", "distil": QUICK},
                "validate": {"perplexity": {"dataset": "pydoc-topics:test"}, "max_kl": 0.1, "repair": True},
            },
            "distillation changes norms",
        ),
        (
            {
                "calibrate": {"dataset": "pydoc-topics:train"},
                "quantize": {"scheme": "w4a16-g32", "distil": {"dataset": "pydoc-topics:test"}},
                "validate": {"perplexity": {"dataset": "pydoc-topics:test"}},
            },
            "flatters the result",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_work(
    sections: dict[str, Any], message: str, write_recipe: Any
) -> None:
    with pytest.raises(RecipeError, match=message):
        run_recipe(load_recipe(write_recipe(**sections)))
