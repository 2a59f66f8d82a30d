"""Rules that take a variant, and the knee of sizes and qualities."""

from __future__ import annotations

import pytest

from llmconvert.errors import RecipeError
from llmconvert.recipes.loading import make_recipe
from llmconvert.recipes.sweep.pick import Pick
from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.validate.render.pareto import Point, front, knee, measure_of


def report(size: float, perplexity: float | None, kl: float, top1: float) -> Report:
    checks = [
        Check(name="size_bytes", value=size, reference=1000.0, unit="bytes"),
        Check(name="perplexity", value=perplexity, reference=20.0),
        Check(name="kl_mean", value=kl, unit="nats"),
        Check(name="top1_agreement", value=top1, unit="share"),
        Check(name="task.arc", value=top1 - 0.4, reference=0.6, unit="share"),
        Check(name="speed.decode", value=size / 10, reference=50.0, unit="tokens/s"),
    ]
    return Report(model=ModelInfo(name="m", source="s"), checks=tuple(checks), environment={}, steps=())


REPORTS = {
    "w8": report(500, 20.1, 0.001, 0.99),
    "w4": report(300, 20.35, 0.02, 0.95),
    "w4-worse": report(300, 20.39, 0.03, 0.94),
    "w3": report(230, 24.0, 0.2, 0.85),
    "unmeasured": report(100, None, 9.0, 0.1),
}


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        ("smallest within 2%", "w4"),
        ("smallest within 1 %", "w8"),
        ("smallest within 0.1%", None),
        ("smallest within 25% of perplexity", "w3"),
        ("smallest within 0.025", "w4"),
        ("smallest within 0.03 of kl_mean", "w4"),
        ("smallest within 0.16 of top1_agreement", "w3"),
        ("smallest within 2% of task.arc", "w8"),
        ("smallest within 0.06 of task.arc", "w4"),
        ("smallest within 0.5 of perplexity", "w4"),
        ("smallest within 20 of speed.decode", "w4"),
        ("smallest within 40% of speed.decode", "w4"),
        ("best under 300B", "w4"),
        ("best under 0.4kB by perplexity", "w4"),
        ("best under 50B", None),
    ],
)
def test_rules(rule: str, taken: str | None) -> None:
    assert Pick.parse(rule).choose(REPORTS) == taken


@pytest.mark.parametrize(
    "rule", ["", "smallest", "smallest within", "smallest within x", "best under 4", "best under 4QB"]
)
def test_what_is_no_rule_is_refused_with_what_is(rule: str) -> None:
    with pytest.raises(ValueError, match="expected smallest within 2%"):
        Pick.parse(rule)


def test_what_has_no_value_in_the_original_or_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_p99 is itself a difference .* smallest within 0\.05 of kl_p99"):
        Pick.parse("smallest within 2% of kl_p99")
    values = {"model": "m", "quantize": {"method": "rtn", "scheme": "w4a16"}, "name": "r"}
    bare = make_recipe({**values, "validate": {"perplexity": None}})
    read = make_recipe({**values, "validate": {"perplexity": {"dataset": "pydoc-topics:test"}}})
    Pick.parse("smallest within 2%").require_measured([bare, read])
    for rule, said in (
        ("smallest within 2%", "needs perplexity, which no variant measures; give validate.perplexity"),
        ("best under 1GB by task.arc_easy", r"needs task\.arc_easy, .* give validate\.tasks"),
        ("smallest within 1 of perplexities", r"no number called 'perplexities'; did you mean perplexity\?"),
        ("smallest within 1 of beauty", "no number called 'beauty'; there are bits_per_weight, "),
    ):
        with pytest.raises(RecipeError, match=said):
            Pick.parse(rule).require_measured([bare])


def test_front_and_knee() -> None:
    points = [Point("a", 1, 10), Point("b", 2, 4), Point("c", 3, 3.5), Point("d", 4, 3), Point("bad", 3, 9)]
    assert [point.name for point in front(points)] == ["a", "b", "c", "d"]
    bend = knee(points)
    assert bend is not None and bend.name == "b"
    assert knee(points[:2]) is None
    straight = [Point("a", 1, 3), Point("b", 2, 2), Point("c", 3, 1)]
    assert knee(straight) is None


def test_one_original_is_compared_by_divergence_and_several_by_perplexity() -> None:
    assert measure_of(REPORTS) == "kl_mean"
    other = REPORTS["w4"].model_copy(update={"model": ModelInfo(name="n", source="another")})
    assert measure_of({**REPORTS, "other": other}) == "perplexity"
    checks = tuple(check for check in REPORTS["w4"].checks if check.name != "kl_mean")
    assert measure_of({**REPORTS, "w4": REPORTS["w4"].model_copy(update={"checks": checks})}) == "perplexity"
