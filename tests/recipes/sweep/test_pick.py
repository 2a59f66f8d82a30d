"""Rules that take a variant, and the knee of sizes and qualities."""

from __future__ import annotations

import pytest

from llmconvert.recipes.sweep.pick import Pick
from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.validate.render.pareto import Point, front, knee


def report(size: float, perplexity: float | None, kl: float, top1: float) -> Report:
    checks = [
        Check(name="size_bytes", value=size, reference=1000.0, unit="bytes"),
        Check(name="perplexity", value=perplexity, reference=20.0),
        Check(name="kl_mean", value=kl, unit="nats"),
        Check(name="top1_agreement", value=top1, unit="share"),
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


def test_front_and_knee() -> None:
    points = [Point("a", 1, 10), Point("b", 2, 4), Point("c", 3, 3.5), Point("d", 4, 3), Point("bad", 3, 9)]
    assert [point.name for point in front(points)] == ["a", "b", "c", "d"]
    bend = knee(points)
    assert bend is not None and bend.name == "b"
    assert knee(points[:2]) is None
    straight = [Point("a", 1, 3), Point("b", 2, 2), Point("c", 3, 1)]
    assert knee(straight) is None
