"""Several recipes in one go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llmconvert.cli.summary import print_batch
from llmconvert.errors import RecipeError, RunInterruptedError, SchemeError, SourceError
from llmconvert.recipes.batch import in_turn
from llmconvert.recipes.batch.run import run_batch


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def task(self, description: str, total: float) -> Any:
        from llmconvert.progress import SILENT

        return SILENT.task(description, total)


def test_failures_do_not_stop_the_others_and_work_is_shared(
    write_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_recipe("first", validate=None)
    misspelt = write_recipe("misspelt", quantise={})
    unfit = write_recipe("unfit", quantize={"method": "rtn", "scheme": "w4a16-g48"}, validate=None)
    absent = write_recipe("absent", model=str(tmp_path / "no-such-model"))
    last = write_recipe("last", quantize={"method": "rtn", "scheme": "w8a16-g32"}, validate=None)
    log = Log()
    outcomes = run_batch([str(p) for p in (first, misspelt, unfit, absent, last)], progress=log)

    assert [outcome.exit_code for outcome in outcomes] == [0, 2, 2, 4, 0]
    assert [type(outcome.failure) for outcome in outcomes[1:4]] == [RecipeError, SchemeError, SourceError]
    assert "did you mean quantize?" in outcomes[1].error
    converted = [line for line in log.lines if line.startswith("convert: ")]
    assert sum("done in" in line for line in converted) == 1, "one conversion serves all"
    # What is refused from headers converts nothing.
    assert sum("unchanged, reusing" in line for line in converted) == 1

    print_batch(outcomes)
    table = re.sub(r"[│\s]+", " ", capsys.readouterr().out)  # cells may be broken into lines
    for text in ("first", "failed (2)", "failed (4)", "did you mean quantize?", "done"):
        assert text in table


def test_fresh_converts_once_for_the_whole_batch(write_recipe: Any) -> None:
    paths = [
        str(write_recipe(f"w{bits}", quantize={"method": "rtn", "scheme": f"w{bits}a16-g32"}, validate=None))
        for bits in (4, 8)
    ]
    for fresh in (False, True):
        log = Log()
        outcomes = run_batch(paths, fresh=fresh, progress=log)
        assert [outcome.exit_code for outcome in outcomes] == [0, 0]
        assert sum(line.startswith("convert: done") for line in log.lines) == 1


def test_a_bug_in_one_is_shown_and_the_next_one_runs(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = in_turn.run_recipe

    def broken(recipe: Any, **options: Any) -> Any:
        if recipe.name == "bad":
            raise ZeroDivisionError("a bug")
        return original(recipe, **options)

    monkeypatch.setattr(in_turn, "run_recipe", broken)
    log = Log()
    bad, good = write_recipe("bad"), write_recipe("good", calibrate=None, quantize=None, validate=None)
    outcomes = run_batch([str(bad), str(good)], progress=log)
    assert [outcome.exit_code for outcome in outcomes] == [1, 0]
    assert outcomes[0].error == "ZeroDivisionError: a bug"
    assert any("Traceback" in line for line in log.lines)


def test_an_interruption_ends_the_batch(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(recipe: Any, **options: Any) -> Any:
        raise RunInterruptedError("stopped by SIGINT")

    monkeypatch.setattr(in_turn, "run_recipe", stopped)
    with pytest.raises(RunInterruptedError):
        run_batch([str(write_recipe("a")), str(write_recipe("b"))])
