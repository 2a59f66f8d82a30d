"""One run in a forked process, killed or with a failing file operation, and what lies in its place afterwards.

For ``bench/faults.py``: one process imports everything once and forks each run, whose output and whose disturbed
operation lie in files beside what it makes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from file_faults import FileFault, install

__all__ = ["Disturbance", "Outcome", "empty", "listing", "new_place", "prepare", "published", "run", "verdicts"]

TESTS = Path(__file__).parent.parent / "tests"
_KEY = re.compile(r"-[0-9a-f]{12}(?=[./]|$)")
# Files of an artifact that tell of one run: when, how long.
VOLATILE = ("README.md", "llmconvert/report.json", "llmconvert/report.html", "llmconvert/publication.json")


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What happens to one run: a kill after ``seconds``, or a fault at a file operation."""

    row: str
    seconds: float = 0.0
    fault: FileFault = FileFault()  # noqa: RUF009 (frozen)


@dataclass(slots=True)
class Outcome:
    """How a run ended: ``code`` as :func:`os.waitstatus_to_exitcode` gives it; ``met`` the operation disturbed."""

    code: int
    seconds: float
    log: str
    met: str


def prepare(scratch: Path) -> Path:
    """A recipe over a tiny model and two texts, in an absolute ``scratch``.

    It is run once in this process, so that all is imported and compiled.
    """
    sys.path.insert(0, str(TESTS))
    from pydoc_data.topics import topics

    import torch
    from support.tiny_models import tiny_llama_dir

    torch.set_num_threads(1)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = tiny_llama_dir(scratch / "llama", num_key_value_heads=4)
    for name, keys in (("train", ("assignment", "while")), ("test", ("class", "import"))):
        (scratch / f"{name}.txt").write_text("\n\n".join(topics[key] for key in keys)[:6000])
    values = {
        "model": str(model),
        "calibrate": {"dataset": str(scratch / "train.txt"), "samples": 4, "length": 64},
        "attention": {"kv_heads": 2},
        "quantize": {"method": "gptq", "budget": {"bits_per_weight": 5, "group_sizes": [32]}},
        "validate": {
            "perplexity": {"dataset": str(scratch / "test.txt"), "window": 64, "max_windows": 4, "max_increase": 0.5},
            "generation": {"max_new_tokens": 4, "prompts": ["Where?", "Say hello."]},
            "decoding": None,
            "repair": True,
        },
    }
    recipe = scratch / "tiny.yaml"
    recipe.write_text(json.dumps(values))  # JSON is YAML
    from llmconvert.recipes.loading import load_recipe
    from llmconvert.recipes.runner import run_recipe

    _leave_plots_blank()
    place = new_place(scratch, "warm")
    run_recipe(load_recipe(recipe, [f"publish.to=file:{place}/out"]), work_dir=place / "work")
    return recipe


def _leave_plots_blank() -> None:
    from matplotlib.figure import Figure

    def save(figure: Any, file: Any, **options: Any) -> None:
        file.write(b"<svg></svg>")

    setattr(Figure, "savefig", save)  # noqa: B010 (a declared method)


def new_place(scratch: Path, name: str) -> Path:
    """An empty directory for runs."""
    place = scratch / name
    shutil.rmtree(place, ignore_errors=True)
    (place / "tmp").mkdir(parents=True)
    return place


def empty(directory: Path) -> None:
    """Remove all that is in a directory."""
    shutil.rmtree(directory)
    directory.mkdir()


def run(recipe: Path, place: Path, disturbance: Disturbance) -> Outcome:
    """Fork a run of ``recipe`` in ``place``, disturb it, and wait for its end."""
    log, met = place / "log.txt", place / "met.txt"
    met.unlink(missing_ok=True)
    log.write_text("")
    sys.stdout.flush()
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        _child(recipe, place, disturbance.fault, log, met)
    status = _wait(child, begin + disturbance.seconds if disturbance.seconds else None)
    operation = met.read_text() if met.exists() else ""
    return Outcome(os.waitstatus_to_exitcode(status), time.perf_counter() - begin, log.read_text(), operation)


def _wait(child: int, deadline: float | None) -> int:
    while deadline is not None and time.perf_counter() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.002)
    if deadline is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _child(recipe: Path, place: Path, fault: FileFault, log: Path, met: Path) -> None:
    """The forked process: the command, with its output in ``log``; never returns."""
    import torch

    from llmconvert.cli import main

    # A thread pool of torch is made anew after a fork; two threads at once must not be the first to ask for it.
    torch.set_num_threads(1)
    code = 1
    true_open, true_write = os.open, os.write

    def note(text: str) -> None:
        true_write(true_open(met, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), text.encode())

    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        tempfile.tempdir = str(place / "tmp")
        names = install(f"{place}/", fault, note)
        arguments = ["run", str(recipe), "--work-dir", str(place / "work")]
        try:
            main.main([*arguments, "--set", f"publish.to=file:{place}/out"], prog_name="llmconvert")
        except SystemExit as end:
            code = int(end.code or 0)
        if not fault.at:
            note(str(len(names)))
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def published(place: Path) -> dict[str, bytes]:
    """What lies at the published place, but for what tells of one run."""
    files = sorted(path for path in (place / "out").rglob("*") if path.is_file())
    named = {str(path.relative_to(place / "out")): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if name not in VOLATILE and path.suffix != ".png"}


def verdicts(place: Path) -> list[Any]:
    """Name, value, limit and verdict of every check but speeds."""
    report = json.loads((place / "out" / "llmconvert" / "report.json").read_text())
    kept = [check for check in report["checks"] if not check["name"].startswith("speed.")]
    return [[check[key] for key in ("name", "value", "reference", "limit", "ok")] for check in kept]


def listing(place: Path) -> set[str]:
    """Everything in a place, hidden or not, as relative names; stages without their keys."""
    names = {_KEY.sub("-", str(path.relative_to(place))) for path in place.rglob("*")}
    return names - {"log.txt", "met.txt"}
