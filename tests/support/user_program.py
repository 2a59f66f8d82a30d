"""What a user may write on top of the package: type-checked by ``mypy --strict``, and run on a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llmconvert


def convert(model: str, folder: Path) -> int:
    """Tensors in half precision, and key-value heads after the merge."""
    half = llmconvert.convert_model(model, folder / "half", dtype="float16")
    assert half.dtype is not None and half.attention is None
    merged = llmconvert.convert_model(model, folder / "mqa", kv_heads=1, gqa_method="mean", refit=False)
    assert merged.attention is not None
    return half.dtype.tensors * merged.attention.kv_heads[1]


def quantize(model: str, text: Path, folder: Path) -> llmconvert.QuantizedModel:
    """A quantized artifact, one kind of layer better than the others."""
    return llmconvert.quantize_model(
        model,
        folder / "w4",
        scheme="w4a16-g32",
        method="gptq",
        overrides={"*.down_proj": "w8a16-g32"},
        calibration=text,
        samples=2,
        length=32,
        progress=llmconvert.SILENT,
    )


@dataclass(frozen=True)
class Tensors(llmconvert.Measurement):
    """How many tensors the artifact has; a measurement of one's own."""

    most: int

    def measure(self, subject: llmconvert.Subject) -> Sequence[llmconvert.Check]:
        count = len(list(subject.dense))
        return [llmconvert.Check(name="own.tensors", value=count, limit=self.most, ok=count <= self.most)]


def measure(artifact: Path, model: str, text: Path) -> tuple[float, bool, list[str]]:
    """Perplexity, whether its limit was kept, and what failed."""
    report: llmconvert.Report = llmconvert.validate_model(
        artifact,
        model,
        text=text,
        window=32,
        max_windows=2,
        max_increase="0%",
        max_kl=1e-9,
        measurements=[Tensors(most=1)],
    )
    check: llmconvert.Check = report["perplexity"]
    value: float | None = check.value
    assert value is not None and "perplexity" in report and "speed" not in report
    try:
        llmconvert.require_passed(report.checks)
    except llmconvert.GateError as error:
        assert error.exit_code == 3
    return value, check.ok, [failed.name for failed in report.failed]


def refusals(model: str, folder: Path) -> list[str]:
    """The names of errors, by the class that a program would catch."""
    found: list[str] = []
    try:
        llmconvert.quantize_model(model, folder / "none", scheme="w4a16-g48", method="rtn")
    except llmconvert.SchemeError as error:
        found.append(type(error).__name__)
    try:
        llmconvert.inspect_model(str(folder / "gone"))
    except llmconvert.SourceError as error:
        found.append(type(error).__name__)
    return found


def run(model: str, folder: Path) -> str:
    """A recipe from values, run to its end, and the same by a batch from its file."""
    recipe: llmconvert.Recipe = llmconvert.make_recipe(
        {"model": model, "quantize": {"method": "rtn", "scheme": "w8a16-g32"}, "validate": {"max_bytes": "1GB"}}
    )
    result: llmconvert.RunResult = llmconvert.run_recipe(recipe, work_dir=folder / "work")
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({**recipe.to_mapping(), "name": "again"}))
    (outcome,) = llmconvert.run_batch([str(file)], overrides=["validate.max_bytes=2GB"], work_dir=folder / "work")
    assert outcome.result is not None and outcome.failure is None
    plan: llmconvert.PushPlan = llmconvert.plan_push(result.artifact, "user/name")
    return f"{result.report['size_bytes'].ok} {any(file.name == 'README.md' for file in plan.files)}"


def main(model: str, text: str, folder: str) -> None:
    """Print everything as JSON."""
    place = Path(folder)
    summary: llmconvert.ModelSummary = llmconvert.inspect_model(model)
    made = quantize(model, Path(text), place)
    others = place / "others.txt"  # an artifact is not measured on the text that it was calibrated on
    others.write_text(Path(text).read_text()[::-1])
    value, kept, failed = measure(made.path, model, others)
    print(  # noqa: T201
        json.dumps(
            {
                "parameters": summary.parameters,
                "converted": convert(model, place),
                "layers": made.layers,
                "perplexity": value,
                "kept": kept,
                "failed": failed,
                "refusals": refusals(model, place),
                "run": run(model, place),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
