"""The command line: help, exit codes, messages, and each command once on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from llmconvert import __version__
from llmconvert.cli import main
from llmconvert.report.report import Report
from llmconvert.report.steps import QuantizeReport

COMMANDS = (
    *("inspect", "plan", "run", "batch", "convert", "quantize", "report", "validate", "push"),
    *("methods", "schemes", "formats", "recipes", "doctor"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(topics["assignment"][:6000])
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails(code: int, *arguments: object) -> str:
    """The message of a call that ends with ``code``: on standard error, without a traceback."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert not result.stdout and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    return result.stderr


def test_help_shows_an_example_for_every_command() -> None:
    assert {*main.commands} == {*COMMANDS}
    for command in COMMANDS:
        result = call(command, "--help")
        assert result.exit_code == 0 and f"llmconvert {command}" in result.output and "Example" in result.output
        assert "\\" not in result.output.replace("\\\n", ""), "no markup is left"


def test_version_and_bare_call() -> None:
    assert call("--version").output == f"llmconvert {__version__}\n"
    assert call().exit_code == 2 and "Commands:" in call("--help").output


def test_help_is_fast() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "llmconvert.cli", "--help"]
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - begin)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy", "pydantic", "huggingface_hub"}
    assert min(times) < 1.0, "half a second on an idle machine"


def test_inspect(tiny_llama: Path) -> None:
    result = call("inspect", tiny_llama)
    assert result.exit_code == 0
    assert "GQA, 4 heads of 16 over 2 key-value heads" in result.output and "RoPE" in result.output
    summary = json.loads(call("inspect", tiny_llama, "--json").output)
    assert summary["kv_bytes_per_token"] == 256 and summary["weight_bytes"]["bfloat16"] == 2 * summary["parameters"]


def test_convert(tiny_llama: Path, here: Path) -> None:
    result = call("convert", tiny_llama, "out", "--dtype", "float16")
    assert result.exit_code == 0 and "largest relative rounding error" in result.output
    assert json.loads((here / "out" / "config.json").read_text())["dtype"] == "float16"
    assert "not empty" in fails(2, "convert", tiny_llama, "out")
    assert os.listdir(here) == ["out"]


def test_files_that_cannot_be_written_are_refused_before_the_work(here: Path) -> None:
    for option in ("--html", "--json"):
        message = fails(2, "validate", "no-such-model", option, "missing/page")
        assert "missing/page: " in message and "make it first" in message
    assert "make it first" in fails(2, "report", "no-such-artifact", "--html", "missing/page.html")


def test_a_model_without_a_tokenizer_is_told_what_it_lacks(tiny_llama: Path, here: Path, text: Path) -> None:
    shutil.copytree(tiny_llama, "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    message = fails(4, "validate", "bare", "--text", text, "--window", 64)
    assert "no tokenizer beside its weights (tokenizer.json, for example)" in message


def test_quantize_and_validate(tiny_llama: Path, here: Path, text: Path) -> None:
    options = ["--scheme", "w4a16-g32", "--calibration", text, "--samples", 4, "--length", 64, "--order", "sequential"]
    result = call("quantize", tiny_llama, "w4", *options, "--override", "*.mlp.down_proj=w8a16-g32")
    assert result.exit_code == 0, result.output
    assert "14 layers quantized" in result.output
    config = json.loads((here / "w4" / "config.json").read_text())["quantization_config"]
    assert sorted(group["weights"]["num_bits"] for group in config["config_groups"].values()) == [4, 8]

    assert "was calibrated on this very text" in fails(4, "validate", "w4", "--text", text)
    (here / "held-out.txt").write_text(text.read_text()[::-1])
    about = ["--text", "held-out.txt", "--window", 64, "--max-windows", 2]
    measured = ["validate", "w4", "--reference", tiny_llama, *about]
    result = call(*measured, "--json", "report.json")
    assert result.exit_code == 0, result.output
    assert "Perplexity" in result.output
    report = json.loads((here / "report.json").read_text())
    assert report["schema"] == "llmconvert.report/1" and str(here) not in json.dumps(report)
    assert {"perplexity", "kl_mean", "size_bytes"} <= {check["name"] for check in report["checks"]}

    call(*measured, "--min-agreement", "0%", "--json", "agreement.json")  # fails: a random model in 4 bits loops
    checks = {check["name"]: check for check in json.loads((here / "agreement.json").read_text())["checks"]}
    assert checks["generation.agreement"]["limit"] == 0
    assert "--task-samples without --tasks" in call(*measured, "--task-samples", 3).output

    result = call(*measured, "--stride", 24, "--json", "overlapping.json", "--html", "overlapping.html")
    assert result.exit_code == 0, result.output
    checks = {check["name"]: check for check in json.loads((here / "overlapping.json").read_text())["checks"]}
    assert (checks["perplexity"]["detail"]["stride"], checks["perplexity"]["detail"]["tokens"]) == (24, 63 + 24)
    assert "2 windows of 64 tokens, 24 apart, each prediction scored once" in (here / "overlapping.html").read_text()
    assert "validate --stride: found 65" in fails(2, *measured, "--stride", 65)


def test_a_missed_limit_ends_with_three(tiny_llama: Path, here: Path, text: Path) -> None:
    assert call("quantize", tiny_llama, "w2", "--method", "rtn", "--scheme", "w2a16-g32").exit_code == 0
    recipe = {"model": str(tiny_llama), "validate": {"max_bytes": 1000}}
    (here / "strict.yaml").write_text(yaml.safe_dump(recipe))
    message = fails(3, "run", "strict.yaml")
    assert "allowed are 1,000" in message and "the artifact is in" in message


def test_run_prints_what_was_gained_and_where_it_lies(tiny_llama: Path, here: Path, text: Path) -> None:
    recipe = {
        "model": str(tiny_llama),
        "quantize": {"method": "rtn", "scheme": "w4a16-g32"},
        "validate": {"perplexity": {"dataset": str(text), "window": 64, "max_windows": 2}},
        "publish": {"to": "file:out/tiny"},
    }
    (here / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    result = call("run", "tiny.yaml")
    assert result.exit_code == 0, result.output
    assert "Perplexity" in result.stdout and "out/tiny" in result.stdout
    assert "quantize: done in" in result.stderr
    assert (here / "out" / "tiny" / "README.md").is_file() and (here / "work").is_dir()
    again = call("run", "tiny.yaml", "--no-publish")
    assert "quantize: unchanged, reusing" in again.stderr and "publishing" not in again.stderr


def test_an_artifact_is_not_scored_on_the_text_it_was_calibrated_on(tiny_llama: Path, here: Path, text: Path) -> None:
    recipe = {
        "model": str(tiny_llama),
        "calibrate": {"dataset": str(text), "samples": 2, "length": 64},
        "quantize": {"method": "gptq", "scheme": "w4a16-g32"},
    }
    (here / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert call("run", "tiny.yaml").exit_code == 0
    (artifact,) = (here / "work").glob("artifact-*/model")
    (here / "renamed.txt").write_bytes(text.read_bytes())
    options = ["--window", 64, "--max-windows", 1]
    message = fails(4, "validate", artifact, "--text", "renamed.txt", *options)
    assert "dataset renamed.txt: model was calibrated on this very text" in message
    (here / "other.txt").write_text("Another text. " * 100)
    assert call("validate", artifact, "--text", "other.txt", *options).exit_code == 0


def test_nothing_measured_is_not_passed(tiny_llama: Path, here: Path) -> None:
    """Neither alone nor in a run; what goes to the Hub unmeasured is said to be."""
    alone = call("validate", tiny_llama, "--json", "alone.json")
    assert alone.exit_code == 0 and "✓" not in alone.stdout and "not measured: nothing here tells" in alone.stdout
    assert json.loads((here / "alone.json").read_text())["outcome"] == "not measured"
    (here / "bare.yaml").write_text(yaml.safe_dump({"model": str(tiny_llama), "publish": {"to": "file:out"}}))
    ran = call("run", "bare.yaml")
    assert ran.exit_code == 0 and "✓" not in ran.stdout and "not measured: nothing here tells" in ran.stdout
    assert "How well it predicts was not measured" in (here / "out" / "README.md").read_text()
    assert "publish.unmeasured: true" in fails(2, "run", "bare.yaml", "--set", "publish.to=me/bare")
    assert "nothing in its llmconvert/report.json tells" in fails(2, "push", "out", "me/bare")
    assert "has no llmconvert/report.json" in fails(2, "push", tiny_llama, "me/bare")
    assert "'bare': is no repository; expected user/name" in fails(4, "push", tiny_llama, "bare")


def test_single_steps_end_like_runs(
    tiny_llama: Path, here: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured with --card, an artifact has report and card as a run would write them; else it is not pushed."""
    scored = ["--reference", tiny_llama, "--text", text, "--window", 64, "--max-windows", 1, "--card"]
    assert "has no llmconvert/recipe.yaml" in fails(2, "validate", tiny_llama, *scored)
    quantized = call("quantize", tiny_llama, "out", "--scheme", "w4a16-g32", "--method", "rtn")
    assert quantized.exit_code == 0, quantized.output
    assert "nothing in its llmconvert/report.json tells" in fails(2, "push", "out", "me/w4")
    assert call("validate", "out", *scored).exit_code == 0
    (step,) = Report.read("out/llmconvert/report.json").steps
    assert isinstance(step.details, QuantizeReport) and step.details.layers == 14 and step.peak_rss_bytes
    card = (here / "out" / "README.md").read_text()
    assert (
        "| Perplexity |" in card and "llmconvert/layers.png" in card and (here / "out/llmconvert/layers.png").is_file()
    )
    assert "HF_TOKEN" in fails(4, "push", "out", "me/w4")
    (program,) = [one for one in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "transformers" in one]
    with monkeypatch.context() as patch:
        patch.chdir(here / "out")
        exec(program, {})
    assert capsys.readouterr().out
    assert call("validate", "out", *scored, "--max-bytes", "1KB").exit_code == 3
    assert "did not pass what it was measured for (size_bytes" in fails(2, "push", "out", "me/w4", "--unmeasured")
    assert "HF_TOKEN" in fails(4, "push", "out", "me/w4", "--force")
    assert "is no model, it has no weights" in fails(2, "push", "out/llmconvert", "me/w4")
    (here / "out" / "README.md").write_text(f"{card}mine")
    assert "was edited since" in fails(2, "validate", "out", *scored)
    (here / "out" / "README.md").unlink()
    assert call("validate", "out", *scored[:-1], "--json", "out/llmconvert/report.json").exit_code == 0
    assert "has no model card (README.md)" in fails(2, "push", "out", "me/w4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "out", "--heal-steps", 3), "convert --heal-steps without --kv-heads"),
        (("convert", "out", "--no-refit"), "convert --refit without --kv-heads"),
        (("convert", "out", "--samples", 128), "convert --samples without --calibration"),
        (("convert", "out", "--calibration", "pydoc-topics:train"), "nothing here reads calibration text"),
        (("convert", "out", "--device", "cuda"), "convert --device: a change of dtype"),
        (("convert", "out", "--kv-heads", 1, "--stream"), "convert --stream: heads are merged"),
        (("convert", "out.gguf"), "is named like a file"),
        (("quantize", "out", "--scheme", "w4a16-g32", "--seed", 0), "quantize --seed without --calibration"),
        (
            ("quantize", "out", "--scheme", "w4a16", "--method", "rtn", "--calibration", "pydoc-topics:train"),
            "quantize --calibration: rtn reads no calibration text",
        ),
        (
            ("quantize", "out", "--scheme", "w4a16-g32", "--bits-per-weight", 4, "--calibration", "pydoc-topics:train"),
            "quantize --scheme: a budget chooses",
        ),
        (("quantize", "out.safetensors", "--scheme", "w4a16-g32", "--method", "rtn"), "is named like a file"),
        (("validate", "--window", 64), "validate --window without --text"),
        (("validate", "--max-increase", "0.0001%"), "validate --max-increase without --text"),
        (("validate", "--max-kl", 1), "validate --max-kl: is measured on text"),
        (("validate", "--task-samples", 3), "validate --task-samples without --tasks"),
    ],
)
def test_an_option_is_used_or_refused(tiny_llama: Path, here: Path, arguments: tuple[str, ...], message: str) -> None:
    command, *rest = arguments
    assert message in fails(2, command, tiny_llama, *rest)
    assert not os.listdir(here)


@pytest.mark.parametrize(
    "limit", [("--max-increase", "1%"), ("--max-kl", "1"), ("--min-top1", "5%"), ("--min-agreement", "5%")]
)
def test_a_limit_needs_something_to_compare_with(tiny_llama: Path, text: Path, limit: tuple[str, str]) -> None:
    options = ["--text", text, "--window", 64, "--max-windows", 1, *limit]
    assert f"({limit[0]}) compares with the original" in fails(2, "validate", tiny_llama, *options)


def test_names_of_others_command_no_terminal(tiny_llama: Path, here: Path) -> None:
    (here / "evil.yaml").write_text('model: a\n"quan\\e[2Jtize": {}\n')
    assert "unknown key quan\\x1b[2Jtize" in fails(2, "run", "evil.yaml")
    copy = here / "copy"
    shutil.copytree(tiny_llama, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["Ll\x1b]0;x\x07ama"]}))
    result = call("inspect", copy)
    assert not set(result.output) & set("\x1b\x07")


def test_a_batch_ends_with_its_first_failure(tiny_llama: Path, here: Path) -> None:
    (here / "good.yaml").write_text(yaml.safe_dump({"model": str(tiny_llama)}))
    (here / "bad.yaml").write_text("model: a\nquantise: {}\n")
    (here / "gone.yaml").write_text("model: ./gone.gguf\n")
    result = call("run", "gone.yaml", "bad.yaml", "good.yaml")
    assert result.exit_code == 4
    assert "failed (4)" in result.stdout and "failed (2)" in result.stdout and "done, not" in result.stdout
    assert "did you mean quantize?" in result.stderr


def test_mistakes_leave_nothing_behind(tiny_llama: Path, here: Path, text: Path) -> None:
    (here / "bad.yaml").write_text("model: m\nquantize: {metod: gptq, scheme: w4a16}\n")
    before = sorted(os.listdir(here))
    assert "line 2: unknown key quantize.metod; did you mean quantize.method?" in fails(2, "run", "bad.yaml")
    assert "no such file, and no shipped recipe" in fails(2, "run", "nothing.yaml")
    assert "--set x: expected key=value" in fails(2, "run", "demo", "--set", "x")
    assert "needs calibration text" in fails(2, "quantize", tiny_llama, "out", "--scheme", "w4a16-g32")
    unknown = fails(2, "quantize", tiny_llama, "out", "--scheme", "w4")
    assert "--scheme: scheme 'w4' is not understood" in unknown and "did you mean w4a16-g128?" in unknown
    assert "--scheme: found 'awq': is a method (--method awq) and a format (--format awq)" in fails(
        2, "quantize", tiny_llama, "out", "--scheme", "awq"
    )
    override = fails(2, "quantize", tiny_llama, "out", "--method", "rtn", "--scheme", "w4a16", "--override", "*=w8")
    assert "quantize --override: scheme 'w8'" in override
    alone = fails(2, "quantize", tiny_llama, "out", "--method", "rtn", "--scheme", "w4a16", "--samples", "4")
    assert "quantize --samples without --calibration: --calibration is missing" in alone
    gone = fails(4, "quantize", tiny_llama, "out", "--scheme", "w4a16", "--calibration", "gone")
    assert "dataset gone: is no file here" in gone
    fit = fails(2, "quantize", tiny_llama, "out", "--scheme", "w4a16-g48", "--method", "rtn")
    assert "48" in fit and "sizes that fit it: 16, 32, 64" in fit
    assert "did you mean gptq" in fails(2, "quantize", tiny_llama, "out", "--scheme", "w4a16", "--method", "gtpq")
    missing = ["--scheme", "w4a16-g32", "--calibration", "gone.txt"]
    assert "gone.txt" in fails(4, "quantize", tiny_llama, "out", *missing)
    assert "no such" in fails(4, "inspect", "./gone")
    assert "no such" in fails(4, "convert", "./gone", "out")
    assert "HF_TOKEN" in fails(4, "push", tiny_llama, "someone/something", "--force")
    assert sorted(os.listdir(here)) == before


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    def broken(model: str) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("llmconvert.convert.inspection.inspect_model", broken)
    result = call("inspect", tiny_llama)
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


def test_it_runs_as_a_process(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "llmconvert.cli", "inspect"]
    good = subprocess.run([*command, str(tiny_llama)], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "") and "LlamaForCausalLM" in good.stdout
    bad = subprocess.run([*command, "./gone"], capture_output=True, text=True)
    assert bad.returncode == 4 and len(bad.stderr.splitlines()) == 1 and bad.stderr.startswith("error: ")
