"""Pages by task: each one's files are written and its commands run, in order, on a tiny model under the names it uses.

A block whose first line is a comment with a file's name is that file. The Hub is a stand-in on the loopback interface,
and the commands share one process, which is told so before its client is imported.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from support.hub_client import Client
from support.hub_server import HubServer
from support.pages import TASKS, Block, blocks, commands, smaller
from support.tiny_models import tiny_llama_dir

from llmconvert.cli import main
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.catalog.methods import METHODS

pytestmark = pytest.mark.slow
ON_THE_HUB = (
    *("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-2-7b-hf"),
    *("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
)
#: Values of a recipe's keys, wherever they stand.
SMALL: Mapping[str, Any] = {
    **{"samples": 4, "length": 64, "window": 64, "max_windows": 2, "steps": 2, "batch": 1},
    "max_increase": "900%",
}
#: What every Python has is tokenized in half a second; a few pages of it do.
SHORT = {"pydoc-topics:train": "train.txt", "pydoc-topics:test": "test.txt"}
EXTENDING = {"add-a-method.md": METHODS, "add-a-format.md": FORMATS}
RUN = [page for page in TASKS if page.name not in EXTENDING]


def of_page(page: Path, *languages: str) -> list[Block]:
    """Its blocks of these languages, in the order of the page."""
    found = [block for language in languages for block in blocks(language) if block.page == page]
    return sorted(found, key=lambda block: block.line)


def comments(block: Block) -> list[str]:
    """What stands behind each command."""
    return [line.partition(" # ")[2] for line in block.text.splitlines() if line.startswith("$ ")]


def files(page: Path) -> dict[str, str]:
    """The files that the page shows, by name."""
    named = [(re.match(r"# ([\w./-]+\.\w+)\n", block.text), block.text) for block in of_page(page, "yaml", "python")]
    assert all(name for name, _ in named), "a block on a page by task that is no file"
    return {name[1]: text for name, text in named if name}


def small(values: Any) -> Any:
    """A recipe for a tiny model; what a rewritten attention is timed at by default is far more than that."""
    if isinstance(values, dict) and {"attention", "validate"} <= set(values):
        values["validate"]["decoding"] = False
    if isinstance(values, dict):
        return {key: SMALL.get(key, small(value)) for key, value in values.items()}
    if isinstance(values, list):
        return [small(value) for value in values[:2]]  # of many variants two are enough
    return SHORT.get(values, values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 query heads and as many key-value heads, and rows of 256, which all types of GGUF take."""
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 16}
    config = {"hidden_size": 256, "intermediate_size": 256, **heads}
    return tiny_llama_dir(tmp_path_factory.mktemp("tasks") / "MODEL", dtype=torch.bfloat16, **config)


@pytest.fixture(scope="module")
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer().running() as server:
        server.account = {"orgs": [{"name": "you", "roleInOrg": "write"}]}
        for name in ON_THE_HUB:
            server.add_repo(name, {path.name: path.read_bytes() for path in model.iterdir()})
        yield server


@pytest.fixture(scope="module")
def terminal(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("home") / "hf", OMP_NUM_THREADS="1") as client:
        yield client


def killed(words: list[str], here: Path, hub: HubServer) -> None:
    """Start a run, and end it without warning as soon as a block is done."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(here / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmconvert.cli", *words]
    with subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.DEVNULL) as process:
        journals: list[Path] = []
        while process.poll() is None and not any('"block ' in path.read_text() for path in journals):
            time.sleep(0.002)
            journals = [*here.glob("work/.quantize-*.partial/.model.partial/.work/journal.jsonl")]
        process.kill()
    assert process.returncode < 0, "it ended before it was killed"


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs_from_beginning_to_end(page: Path, hub: HubServer, terminal: Client, tmp_path: Path) -> None:
    terminal("chdir", tmp_path)
    texts = [topics[key] for key in sorted(topics)]
    (tmp_path / "train.txt").write_text("\n".join(texts[:20])[:16_000])
    (tmp_path / "test.txt").write_text("\n".join(texts[-20:])[:8_000])
    for name, text in files(page).items():
        (tmp_path / name).write_text(yaml.safe_dump(small(yaml.safe_load(text))))
    said: list[str] = []
    for block in of_page(page, "console"):
        for (program, *words), comment in zip(commands(block), comments(block), strict=True):
            assert program == "llmconvert"
            if comment.startswith("killed"):
                killed(words, tmp_path, hub)
                continue
            if "--address" in words:  # a cluster is started by tests/recipes/batch/test_ray_cluster.py
                pytest.importorskip("ray")
                answer = terminal("cli", *["127.0.0.1:9" if "ray-head" in word else word for word in words])
                assert answer["code"] == 5 and "no Ray cluster answers" in answer["text"]
                continue
            answer = terminal("cli", *(SHORT.get(word, word) for word in smaller(words)))
            assert answer["code"] == 0, f"{block}: {' '.join(words)}\n{answer['text']}"
            said.append(answer["out"])
    COMES_OF[page.stem](tmp_path, hub, said)


def laptop(here: Path, hub: HubServer, said: list[str]) -> None:
    assert "70B" in said[1] and "memory" in said[1] and not re.search(r"there already", said[1])
    for name in ("70b-w4", "70b-hqq"):
        assert (here / "out" / name / "model.safetensors").is_file()
    assert "perplexity" in (here / "out/70b-w4/README.md").read_text().lower()


def gqa(here: Path, hub: HubServer, said: list[str]) -> None:
    for name in ("llama-gqa-w4", "llama-gqa-w8"):
        assert json.loads((here / "out" / name / "config.json").read_text())["num_key_value_heads"] == 8
    assert len([*here.glob("work/attention-*")]) == 1, "the second run takes the first one's heads"


def gguf_set(here: Path, hub: HubServer, said: list[str]) -> None:
    published = hub.files("you/Qwen2.5-7B-Instruct-GGUF")
    assert sum(name.endswith(".gguf") for name in published) == 2 and (here / "qwen-q4_k_m.gguf").is_file()
    assert all(kind in published["README.md"].decode() for kind in ("Q3_K_M", "Q4_K_M"))


def sweep(here: Path, hub: HubServer, said: list[str]) -> None:
    assert (here / "work/sweeps/sweep/index.html").is_file()
    assert "README.md" in hub.files("you/Qwen2.5-0.5B-Instruct-quantized")
    assert sum(name.startswith("you/Qwen2.5-0.5B-Instruct-w") for name in hub.repos) == 2


def crash(here: Path, hub: HubServer, said: list[str]) -> None:
    plan, *_ = said
    assert re.search(r"^calibrate +there already", plan, re.MULTILINE)
    assert not re.search(r"^quantize +there already", plan, re.MULTILINE)
    assert (here / "out/night/llmconvert/report.json").is_file()


def machines(here: Path, hub: HubServer, said: list[str]) -> None:
    assert all((here / "out" / name / "model.safetensors").is_file() for name in "ab")


COMES_OF = {
    **{"laptop": laptop, "gqa": gqa, "gguf-set": gguf_set},
    **{"sweep": sweep, "crash": crash, "machines": machines},
}


@pytest.mark.parametrize("name", EXTENDING)
def test_what_a_page_adds_is_taken(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file lies in the package, and its line in the table; then its commands and its test run."""
    (page,) = (page for page in TASKS if page.name == name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(model)
    (tmp_path / "TEST").write_text("A text that was not seen before. " * 40)
    programs = files(page)
    for path, text in programs.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        if not path.startswith("tests/"):
            package = importlib.import_module(f"llmconvert.{Path(path).parent.as_posix().replace('/', '.')}")
            monkeypatch.setattr(package, "__path__", [*package.__path__, str((tmp_path / path).parent)])
    (line,) = of_page(page, "text")
    for key, place in ast.literal_eval(f"{{{line.text}}}").items():
        monkeypatch.setitem(EXTENDING[name], key, place)
    for block in of_page(page, "console"):
        for (_, *words), comment in zip(commands(block), comments(block), strict=True):
            done = CliRunner().invoke(main, words)
            expected = int((re.findall(r"exit code (\d)", comment) or ["0"])[0])
            assert done.exit_code == expected, f"{' '.join(words)}\n{done.output}\n{done.exception}"
    for path, text in programs.items():
        if path.startswith("tests/"):
            inside: dict[str, Any] = {}
            exec(compile(text, path, "exec"), inside)
            run = [value for key, value in inside.items() if key.startswith("test_")]
            assert run
            for test in run:
                test()
