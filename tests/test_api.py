"""The public Python API: complete, lazy, without side effects, typed, and the command line's own."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmconvert
from llmconvert import cli, errors

ROOT = Path(__file__).parent.parent
PROGRAM = Path(__file__).parent / "support" / "user_program.py"
# Where a command writes what Python has as values already; a dry run is ``plan_push``.
OF_THE_TERMINAL = {"plan", "json_file", "html_file", "dry_run", "quiet", "verbose", "debug", "json_result"}


@pytest.mark.parametrize("name", sorted(set(llmconvert.__all__) - {"__version__"}))
def test_every_public_name_is_what_its_module_exports(name: str) -> None:
    module = importlib.import_module(f"llmconvert.{llmconvert._MODULES[name]}")
    assert getattr(llmconvert, name) is getattr(module, name)
    assert name in module.__all__
    assert name == "SILENT" or inspect.getdoc(getattr(llmconvert, name))


def test_the_list_is_complete() -> None:
    assert set(llmconvert.__all__) == {*llmconvert._MODULES, "__version__"} == set(dir(llmconvert))
    assert {name for name in errors.__all__ if name[0].isupper()} <= set(llmconvert.__all__)
    assert not hasattr(llmconvert, "no_such_name")


def test_importing_loads_nothing_heavy_and_prints_nothing() -> None:
    code = (
        "import sys, llmconvert, llmconvert.cli; "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'huggingface_hub', 'pydantic', 'yaml', 'rich'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("convert", llmconvert.convert_model),
        ("quantize", llmconvert.quantize_model),
        ("validate", llmconvert.validate_model),
        ("push", llmconvert.push_model),
    ],
)
def test_functions_take_every_option_of_their_command_with_its_default(
    command: str, function: Callable[..., Any]
) -> None:
    parameters = inspect.signature(function).parameters
    keywords = {
        name: found.default for name, found in parameters.items() if found.kind is inspect.Parameter.KEYWORD_ONLY
    }
    parsed = cli.main.commands[command].make_context(command, [], resilient_parsing=True).params
    options = {name: value for name, value in parsed.items() if name not in OF_THE_TERMINAL}
    of_python = {"quantize": {"ranks"}, "validate": {"ranks", "measurements"}}
    assert keywords.keys() - options.keys() == {"progress"} | of_python.get(command, set())
    assert options.keys() <= parameters.keys()
    assert {name: options[name] or None for name in keywords if name in options} == {
        name: value or None for name, value in keywords.items() if name in options
    }


def test_a_report_is_read_by_the_names_of_its_checks() -> None:
    report = llmconvert.Report(
        model=llmconvert.ModelInfo(name="a", source="b"),
        checks=(llmconvert.Check(name="perplexity", value=2.0), llmconvert.Check(name="kl_mean")),
    )
    assert report["perplexity"].value == 2.0 and "kl_mean" in report and "perplexities" not in report
    with pytest.raises(KeyError, match="'perplexities' was not measured; there are perplexity, kl_mean"):
        report["perplexities"]


def installed(folder: Path) -> Path:
    """The package's sources laid out as a wheel has them."""
    shutil.copytree(ROOT / "llmconvert", folder / "llmconvert", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("quantize", "convert", "validate", "recipes"):
        shutil.copytree(ROOT / name, folder / "llmconvert" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def type_check(program: Path, site: Path, cache: Path) -> str:
    """What ``mypy --strict`` says of a program; of the package's own errors nothing, as of any installed package's.

    What the package itself imports from the largest of its dependencies is left unread, which takes most of the time.
    """
    settings = site / "mypy.ini"
    settings.write_text("[mypy]\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--config-file={settings}"]
    done = subprocess.run(
        [*command, "--cache-dir", str(cache), str(program)],
        env={**os.environ, "MYPYPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_users_program_passes_the_type_checker(tmp_path: Path) -> None:
    assert (ROOT / "llmconvert" / "py.typed").is_file()
    site, cache = installed(tmp_path / "site"), tmp_path / "cache"
    assert type_check(PROGRAM, site, cache).startswith("Success")
    wrong = tmp_path / "wrong.py"
    wrong.write_text('import llmconvert\n\nllmconvert.quantize_model("a", "b", shceme="w4a16")\n')
    assert 'Unexpected keyword argument "shceme"' in type_check(wrong, site, cache)


def test_a_users_program_runs(tiny_llama: Path, tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    text = tmp_path / "text.txt"
    text.write_text(topics["assignment"][:4000])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tiny_llama), str(text), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["layers"], found["converted"]) == (14, 20) and found["perplexity"] > 1
    assert (found["kept"], found["refusals"]) == ("perplexity" not in found["failed"], ["SchemeError", "SourceError"])
    assert {"kl_mean", "own.tensors"} <= set(found["failed"]) and found["run"] == "True True"


def test_a_measurement_of_ones_own_is_refused_before_the_work(tmp_path: Path) -> None:
    class Needy(llmconvert.Measurement):
        def require(self) -> None:
            raise llmconvert.UnsupportedError("needs what is not installed")

        def measure(self, subject: llmconvert.Subject) -> list[llmconvert.Check]:
            raise AssertionError

    with pytest.raises(llmconvert.UnsupportedError, match="needs what is not installed"):
        llmconvert.validate_model(tmp_path / "gone", measurements=[Needy()])
