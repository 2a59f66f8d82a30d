"""Benchmarks by lm-eval, on a task of a few lines that needs no network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from llmconvert.cli import main
from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.measurement import Subject
from llmconvert.validate.tasks import Tasks

INSTALLED = importlib.util.find_spec("lm_eval") is not None
with_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")

TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """A directory with one task of six questions."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    rows = [
        {"question": f"What comes after {n}?", "choices": [" one", " a b c", f" {n + 1}"], "answer": n % 3}
        for n in range(6)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "choices.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl", cache=tmp_path / "cache"))
    return directory


def right(directory: Path, include: Path) -> float:
    """The share of right answers, from the logits of the model as transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [json.loads(line) for line in (include.parent / "questions.jsonl").read_text().splitlines()]
    hits = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            with torch.inference_mode():
                logits = model(ids).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        hits += max(range(3), key=scores.__getitem__) == row["answer"]
    return hits / len(rows)


@with_lm_eval
def test_both_models_are_scored_as_lm_eval_would(original: Path, quantized: Path, include: Path) -> None:
    tasks = Tasks(("choices",), include=include, max_drop=0.0)
    tasks.require()
    with SafetensorsCheckpoint(original) as reference, SafetensorsCheckpoint(quantized) as stored:
        subject = Subject(quantized, stored, reference, reference, reference, None, torch.device("cpu"), torch.float32)
        (check,) = tasks.measure(subject)
    assert check.name == "task.choices" and check.unit == "share" and check.detail["samples"] == 6
    assert check.reference == pytest.approx(right(original, include))
    assert check.value == pytest.approx(right(quantized, include))
    assert check.limit == check.reference and check.ok == ((check.value or 0) >= (check.reference or 0))
    assert check.sections[0].rows[0][:4] == ("choices", "acc", check.reference, check.value)


@with_lm_eval
def test_a_recipe_puts_them_into_the_report(original: Path, quantized: Path, include: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tasks.yaml"
    settings = f"{{names: [choices], samples: 4, include: {include}, max_drop: 100%}}"
    recipe.write_text(f"model: {original}\nvalidate: {{tasks: {settings}}}\nwork_dir: {tmp_path / 'work'}\n")
    done = CliRunner().invoke(main, ["run", str(recipe)])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "work").glob("artifact-*/model/llmconvert/report.json")
    checks = {check["name"]: check for check in json.loads(path.read_text())["checks"]}
    assert checks["task.choices"]["detail"]["samples"] == 4
    assert checks["task.choices"]["value"] == checks["task.choices"]["reference"]
    assert "choices" in (path.parent.parent / "README.md").read_text()
    unknown = CliRunner().invoke(main, ["validate", str(quantized), "--tasks", "nonesuch", "--task-samples", "2"])
    assert unknown.exit_code == 2 and "has no task 'nonesuch'" in " ".join(unknown.output.split())


@with_lm_eval
def test_an_unknown_task_is_refused_before_the_work(include: Path) -> None:
    with pytest.raises(UsageError, match="has no task 'nonesuch'"):
        Tasks(("nonesuch",), include=include).require()


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_way_to_install_it_is_said(tmp_path: Path, original: Path) -> None:
    with pytest.raises(UnsupportedError, match="pip install 'lm-eval"):
        Tasks(("hellaswag",)).require()
    recipe = tmp_path / "tasks.yaml"
    recipe.write_text(f"model: {original}\nvalidate: {{tasks: [hellaswag]}}\nwork_dir: {tmp_path / 'work'}\n")
    found = CliRunner().invoke(main, ["run", str(recipe)])
    assert found.exit_code == 2 and "pip install 'lm-eval>=0.4.9'" in " ".join(found.output.split())
    assert not (tmp_path / "work").exists()
