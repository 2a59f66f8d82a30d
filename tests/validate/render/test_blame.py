"""What a failed gate says about the layers."""

from __future__ import annotations

import pytest

from llmconvert.errors import GateError
from llmconvert.report.report import Check, Report, Step, require_passed
from llmconvert.validate.render.blame import blame


def failing(report: Report, name: str) -> Report:
    checks = tuple(check.model_copy(update={"ok": check.name != name}) for check in report.checks)
    return report.model_copy(update={"checks": checks})


def test_nobody_is_to_blame_for_a_pass_or_for_the_size(report: Report) -> None:
    assert blame(report) == "" and blame(failing(report, "size_bytes")) == ""


def test_blocks_by_what_they_err_alone_and_linears_by_their_output(report: Report) -> None:
    linears = [
        {"name": f"model.layers.{index}.mlp.up_proj", "scheme": "w4a16-g64-sym", "error": error}
        for index, error in enumerate((0.0004, 0.01, None))
    ]
    details = {"layers": len(linears), "linears": linears, "bytes": 1000, "seconds": 1}
    step = Step.model_validate({"name": "quantize", "seconds": 1, "details": details})
    found = blame(failing(report, "perplexity").model_copy(update={"steps": (step,)}))
    assert found == (
        "the blocks that err most by themselves are model.layers.1 (3.5 %), model.layers.0 (3.0 %), model.layers.2 "
        "(1.0 %); the largest errors of a linear's output are those of model.layers.1.mlp.up_proj (10.0 %), "
        "model.layers.0.mlp.up_proj (2.0 %)"
    )


def test_without_outputs_the_weights_speak(report: Report) -> None:
    found = blame(failing(report, "kl_mean"))
    assert "the weights that changed most are model.layers.2.mlp.up_proj.weight (10.0 %)" in found
    with pytest.raises(GateError, match=r"KL is 0\.1\. To blame: layer 7; give these layers more bits"):
        require_passed([Check(name="kl_mean", ok=False, detail={"text": "KL is 0.1"})], "layer 7")
