"""What all commands have in common: quiet, verbose, JSON, tracebacks on demand; widths, colours, speed, completion."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from rich.console import Console

from llmconvert.cli import main
from llmconvert.progress import Bytes, TerminalProgress
from llmconvert.report.report import Check, ModelInfo, Report
from llmconvert.validate.render.terminal import render_terminal


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", main.commands)
def test_every_command_has_them(name: str) -> None:
    options = {option for parameter in main.commands[name].params for option in parameter.opts}
    assert {"--quiet", "-q", "--verbose", "-v", "--debug", "--json"} <= options


def test_quiet_says_nothing_but_the_result_and_json_is_one_value(tiny_llama: Path, tmp_path: Path) -> None:
    loud = call("convert", tiny_llama, tmp_path / "a")
    assert loud.exit_code == 0 and "converting" in loud.stderr
    quiet = call("convert", tiny_llama, tmp_path / "b", "-q", "--dtype", "fp16")
    assert not quiet.stderr and quiet.stdout.startswith(str(tmp_path / "b"))
    verbose = call("quantize", tiny_llama, tmp_path / "c", "--method", "rtn", "--scheme", "w4a16-g32", "-v", "--json")
    assert re.findall(r"^Quantizing: (\d+) %", verbose.stderr, re.MULTILINE)[-2:] == ["50", "100"], "for each block"
    said = json.loads(verbose.stdout)
    assert said["layers"] == 14 and said["path"] == str(tmp_path / "c")
    both = call("convert", tiny_llama, tmp_path / "d", "-q", "-v")
    assert both.exit_code == 2 and "exclude each other" in both.stderr


def test_a_gguf_file_and_its_types_need_no_format(tiny_llama: Path, tmp_path: Path) -> None:
    result = call("quantize", tiny_llama, tmp_path / "model.gguf", "--scheme", "q8_0", "-q", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["types"]["Q8_0"] > 0


def test_commands_speak_of_options_and_recipes_of_keys(tmp_path: Path) -> None:
    message = call("quantize", "m", tmp_path / "o", "--scheme", "w4a16-g64").stderr
    assert message == (
        "error: quantize --method: gptq needs calibration text; give it, for example --calibration pydoc-topics:train\n"
    )
    recipe = tmp_path / "a.yaml"
    recipe.write_text("model: m\nquantize: {scheme: w4a16-g64}\n")
    assert "for example calibrate: {dataset: pydoc-topics:train}" in call("run", recipe).stderr
    message = call("validate", "m", "--max-kl", 3).stderr
    assert "validate --max-kl: is measured on text; name one, for example --text pydoc-topics:test\n" in message


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("hlep", "No such command 'hlep'. Did you mean 'llmconvert --help'?"),
        ("Quantise", "No such command 'Quantise'. Did you mean 'llmconvert quantize'?"),
        ("upload", "No such command 'upload'. Did you mean 'llmconvert push'?"),
        ("xyzzy", "No such command 'xyzzy'; there are inspect, plan, run,"),
    ],
)
def test_a_command_that_is_none_is_answered_with_the_one_that_was_meant(typed: str, expected: str) -> None:
    result = call(typed, "m")
    assert result.exit_code == 2 and expected in result.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quantize m o --scheme w4a16g32", "did you mean w4a16-g32?"),
        ("quantize m o --format ggfu", "format 'ggfu' is not known"),
        ("quantize m o --method gtpq", "did you mean gptq?"),
        ("plan a.yaml b.yaml --probe", "--probe times one recipe"),
        ("--debug plan a.yaml", "--debug goes behind the command: llmconvert COMMAND … --debug"),
        ("validate out/w4 original", "unexpected extra argument (original); the original is named by --reference"),
        ("schemes w4", "scheme 'w4' is not understood; expected w<bits>a<bits>"),
        ("formats guff", "did you mean gguf?"),
        ("push . file:out", "push goes to the Hub; copy the artifact there"),
        ("push . https://huggingface.co/a/b", "did you mean a/b?"),
        ("convert m o --dtype int8", "Fewer bits are what quantize makes: llmconvert quantize MODEL OUTPUT --scheme"),
        ("validate m --serve llamacpp", "expected vllm, llama.cpp, mlx or transformers; did you mean llama.cpp?"),
        ("validate m --text t --reference m --max-increase five", "expected a share such as 5% or 0.05"),
    ],
)
def test_a_value_that_is_wrong_is_answered_with_what_was_expected(line: str, expected: str) -> None:
    result = call(*line.split())
    assert result.exit_code == 2 and expected in " ".join(result.stderr.split())


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    assert "Traceback" not in call("run", tmp_path / "gone.yaml").stderr
    shown = call("run", tmp_path / "gone.yaml", "--debug")
    assert shown.exit_code == 2 and "Traceback" in shown.stderr and "loading.py" in shown.stderr


def test_versions_have_a_short_option() -> None:
    assert call("-V").output == call("--version").output


def spent(*arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Processor seconds of a Python process, the fewest of two runs, and what it printed."""
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds), done


def test_help_and_usage_errors_come_at_once(tmp_path: Path) -> None:
    # On a busy machine processor seconds grow too, by several times: they are measured in what it takes to import the
    # libraries of the command line and of recipes (0.09 s on an idle one, where torch takes 1.2).
    unit, _ = spent("-c", "import typer, pydantic.main, yaml")
    command = ("-m", "llmconvert.cli")
    assert spent(*command, "quantize", "--help")[0] < 2 * unit
    recipe = tmp_path / "a.yaml"
    recipe.write_text("model: m\nquantize: {method: gtpq, scheme: w4a16-g64}\n")
    for arguments in (["run", str(recipe)], ["quantize", "m", str(tmp_path / "o"), "--scheme", "w4x"]):
        seconds, done = spent(*command, *arguments)
        assert done.returncode == 2, done.stderr
        assert seconds < 6 * unit, f"{seconds:.2f} s in units of {unit:.2f}"


def drawn(width: int, **kwargs: object) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, force_terminal=True, **kwargs), stream  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [30, Bytes(13_500_000_000)])
def test_progress_keeps_bar_count_and_time_on_80_columns(total: int) -> None:
    console, stream = drawn(80)
    with TerminalProgress(console).task("converting to a-long-name-of-a-model-in-some-folder/bf16", total) as task:
        task.advance(total / 2, "model.layers.12.self_attn.q_proj.weight and more that is long")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    last = lines[-1]
    assert ("6.8/13.5 GB" if isinstance(total, Bytes) else "15/30") in last and "0:00:0" in last and "━" in last
    assert "…" in last, "what is long is cut, not the rest"


def test_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ((), *((name,) for name in main.commands)):
        lines = call(*arguments, "--help").output.splitlines()
        assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]


def test_the_closing_table_fits_80_columns() -> None:
    checks = (
        Check(name="size_bytes", value=113_200_000, reference=269_100_000, unit="bytes"),
        Check(name="perplexity", value=15.76, reference=14.89, limit=18.61, detail={"low": 14.1, "high": 17.6}),
        Check(name="generation.agreement", value=0.197, unit="share", label="Same tokens in greedy continuations"),
    )
    report = Report(model=ModelInfo(name="m", source="s", architecture="A"), environment={}, checks=checks)
    console, stream = drawn(80)
    render_terminal(report, console)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("113.2 MB" in line for line in lines) and any("≤ 18.61" in line for line in lines)


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console, stream = drawn(80)
    with TerminalProgress(console).task("converting", 2) as task:
        task.advance()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", stream.getvalue())


def completions(*arguments: str, incomplete: str) -> set[str]:
    complete = BashComplete(main, {}, "llmconvert", "_LLMCONVERT_COMPLETE")
    return {item.value for item in complete.get_completions(list(arguments), incomplete)}


def test_the_shell_completes_commands_options_and_names() -> None:
    assert {"quantize", "validate"} <= completions(incomplete="") and completions(incomplete="quan") == {"quantize"}
    assert "--scheme" in completions("quantize", incomplete="--sch")
    assert completions("quantize", "--method", incomplete="gpt") == {"gptq", "gptaq"}
    assert "gguf" in completions("quantize", "--format", incomplete="g")
    assert completions("quantize", "--scheme", incomplete="q4_k") == {"q4_k_m", "q4_k_s"}
    assert completions("methods", incomplete="awq") == {"awq"}
    assert "demo" in completions("run", incomplete="de") and "demo" in completions("recipes", incomplete="d")
    done = subprocess.run(
        [sys.executable, "-c", "from llmconvert.cli import main; main(prog_name='llmconvert')"],
        env={**os.environ, "_LLMCONVERT_COMPLETE": "zsh_source"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "#compdef llmconvert" in done.stdout
    assert isinstance(main, click.Group)
