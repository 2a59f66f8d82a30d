"""Tokens per expert in the report: every count, and those that are starved by name."""

from __future__ import annotations

from llmconvert.quantize.passes.run import LayerResult
from llmconvert.recipes.stages.expert_report import expert_counts, expert_sections


def layer(number: int, part: str, columns: int, tokens: int | None) -> LayerResult:
    expert = f"model.layers.1.mlp.experts.{number}"
    return LayerResult(f"{expert}.{part}", "w4a16-g16", (8, columns), 0.1, None, expert, tokens)


def test_every_count_is_kept_and_starved_experts_are_named() -> None:
    tokens = [70, 0, 12, 64]
    layers = [LayerResult("model.layers.0.mlp.up_proj", "w4a16", (8, 64), 0.1, None)]
    for number, count in enumerate(tokens):
        layers += [layer(number, "w1", 64, count), layer(number, "w3", 64, count), layer(number, "w2", 96, count)]
    (found,) = expert_counts(layers)
    assert found.layer == "model.layers.1.mlp.experts" and found.tokens == (70, 0, 12, 64) and found.columns == 64
    assert found.starved == (1, 2)
    (section,) = expert_sections([found])
    assert section.rows == (("model.layers.1.mlp.experts", 4, 0, 38, 70, "1 (0), 2 (12)"),)
    assert "each of 4 experts: 0 at least, 70 at most. 2 got fewer than their inputs have columns" in section.text


def test_there_is_nothing_to_say_without_text_or_experts() -> None:
    assert expert_counts([layer(0, "w1", 64, None)]) == () and expert_sections(()) == ()
