"""Commands and programs on the pages work: run on tiny stand-ins for the models and texts that they name, or parsed.

``$`` lines of ``console`` blocks are commands. Every ``llmconvert`` command is parsed by the command line itself; those
that need no Hub are run, block by block, with the names that the pages use (``MODEL``, ``FILE``, …) as files of a
directory. ``yaml`` blocks are recipes or parts of recipes; ``python`` blocks are programs.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.pages import PAGES, ROOT, TASKS, Block, blocks, commands, prose, smaller
from support.tiny_models import tiny_llama_dir

from llmconvert.cli import main
from llmconvert.gguf.records.importance import ImportanceMatrix, write_importance
from llmconvert.recipes.loading import make_recipe
from llmconvert.recipes.sweep.expand import make_sweep

CONSOLE, PYTHON, YAML = ([*blocks(language)] for language in ("console", "python", "yaml"))
# Not run: what needs the Hub or a cluster. Artifacts are opened in other runtimes by tests/readers and tests/gguf.
OF_THE_HUB = ("--stream", "--private", "--engine")
# Run at shorter lengths by tests/validate/long_inputs: each length and backend in a process of its own takes minutes.
MEASURED_FOR_MINUTES = ("--attention", "--memory")
# Run by tests/validate/serving: it needs runtimes, which the page names by paths.
IN_RUNTIMES = ("--serve",)
# What the pages' adapter is of.
LINEAR = "model.layers.0.self_attn.q_proj"
RUNTIMES = ("vllm", "gptqmodel", "xllamacpp", "mlx_lm")


def parse(words: list[str]) -> None:
    """Let the command line parse a call, and do nothing else.

    Raises:
        click.UsageError: there is no such command or option, or an argument is missing or wrong.
    """
    name, command, rest = main.resolve_command(main.make_context("llmconvert", list(words)), list(words))
    assert name is not None and command is not None
    command.make_context(name, rest)


@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_commands_parse(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "out/demo"):
        (tmp_path / name).mkdir(parents=True)  # what is pushed has to be there
    found = commands(block)
    assert found, "a console block without a command"
    for words in found:
        while "=" in words[0]:
            words = words[1:]  # variables of the environment
        match words:
            case ["llmconvert", *rest]:
                parse(rest)
            case ["torchrun", *rest]:
                module = rest.index("-m")
                assert rest[module + 1] == "llmconvert"
                parse(rest[module + 2 :])
            case ["make", *targets]:
                makefile = (ROOT / "Makefile").read_text()
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets if "=" not in target)
            case ["pip", "install", *wanted]:
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                for extra in re.findall(r"llmconvert\[([\w,-]+)\]", " ".join(wanted)):
                    assert set(extra.split(",")) <= set(extras)
            case ["uv", "tool", "install", "."]:
                assert (ROOT / "pyproject.toml").is_file()
            case ["llama-mtmd-cli", "-m", model, "--mmproj", projector, *_]:  # llama.cpp's own
                assert model.endswith(".gguf") and Path(projector).name.startswith("mmproj-")
            case ["python", script, *rest]:
                source = (ROOT / script).read_text()
                assert all(f'"{word}"' in source for word in rest if word.startswith("--"))
            case _:
                pytest.fail(f"no test knows the command {words[0]}")


def test_what_does_not_parse_is_found() -> None:
    for line in ("convert MODEL", "quantize MODEL OUT --no-such-option", "push DIR", "train MODEL"):
        with pytest.raises(click.UsageError):
            parse(line.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_name_what_there_is(page: Path) -> None:
    """``llmconvert validate --stride`` in a sentence leaves out arguments, but names a command and its options."""
    for text in re.findall(r"`llmconvert ([^`]+)`", prose(page)):
        name, *rest = text.split()
        assert name in main.commands or name.startswith("-"), text
        if name in main.commands:
            known = {option for parameter in main.commands[name].params for option in parameter.opts}
            assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, text


@pytest.fixture(scope="module")
def pages_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that the pages name: models, texts, recipes, finished artifacts."""
    from pydoc_data.topics import topics

    here = tmp_path_factory.mktemp("world")
    tiny_llama_dir(here / "MODEL", hidden_size=256, intermediate_size=256)
    for name in ("REF", "PLAIN", "org/name"):
        shutil.copytree(here / "MODEL", here / name)
    weight = load_file(here / "MODEL" / "model.safetensors")[f"{LINEAR}.weight"]
    matrices = {"A": torch.ones(2, weight.shape[1]), "B": torch.ones(len(weight), 2)}
    (here / "org/lora").mkdir()
    save_file(
        {f"base_model.model.{LINEAR}.lora_{part}.weight": matrix for part, matrix in matrices.items()},
        here / "org/lora/adapter_model.safetensors",
    )
    (here / "org/lora/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 0.001}')
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{block}.{linear}.weight" for block in range(2) for linear in linears]
    alike = {name: np.ones(256, np.float32) for name in names}
    seen = {name: np.ones(1, np.float32) for name in names}
    write_importance(here / "imatrix.gguf", ImportanceMatrix(alike, seen, ("words.txt",), 1, 1))
    texts = [topics[key] for key in sorted(topics)]
    (here / "FILE").write_text("\n".join(texts[:20])[:16_000])
    (here / "TEST").write_text("\n".join(texts[-20:])[:8_000])
    validate = {"perplexity": {"dataset": "TEST", "window": 64, "max_windows": 2, "max_increase": "900%"}}
    recipe = {"model": "MODEL", "quantize": {"method": "rtn", "scheme": "w4a16-g64"}, "validate": validate}
    (here / "recipes").mkdir()
    for name in ("recipe", "other", "a", "b", "recipes/demo"):
        (here / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    matrix = {"quantize.scheme": ["w4a16-g64", "w8a16-g64"]}
    (here / "many.yaml").write_text(yaml.safe_dump({**recipe, "matrix": matrix, "pick": "best under 1GB"}))
    (here / "once.yaml").write_text(yaml.safe_dump(recipe | {"publish": {"to": "file:A"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        done = CliRunner().invoke(main, ["run", "once.yaml", "--work-dir", "made"])
    assert done.exit_code == 0, done.output
    for name in ("B", "C", "DIR", "ARTIFACT", "out/artifact"):
        shutil.copytree(here / "A", here / name)
    return here


@pytest.fixture
def world(pages_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in."""
    here = tmp_path / "world"
    shutil.copytree(pages_world, here)
    monkeypatch.chdir(here)
    return here


def runnable(block: Block) -> bool:
    if block.page.name == "commands.md" or block.page in TASKS:
        return False  # examples of the help, on models of the Hub; pages that are run from beginning to end
    calls = commands(block)
    return all(call[0] == "llmconvert" and not set(call) & set(OF_THE_HUB) for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in CONSOLE if runnable(block)], ids=str)
def test_commands_run(block: Block, world: Path) -> None:
    for _, *words in commands(block):
        if words[0] == "validate" and set(words) & {*MEASURED_FOR_MINUTES, *IN_RUNTIMES}:
            continue
        small = [
            path for word in smaller(words) for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        done = CliRunner().invoke(main, small)
        assert done.exit_code == 0, f"{' '.join(words)}\n{done.output}\n{done.exception}"


@pytest.mark.parametrize("block", [block for block in YAML if block.page not in TASKS], ids=str)
def test_recipes_are_valid(block: Block) -> None:
    """Parts get what they leave out: a model, text to calibrate on, a method, a measurement."""
    values = yaml.safe_load(block.text)
    usual = {
        "calibrate": {"dataset": "wikitext-2:train"},
        "quantize": {"method": "gptq", "scheme": "w4a16-g64"},
        "validate": {"perplexity": {"dataset": "wikitext-2:test"}},
    }
    varied = "matrix" in values or "schemes" in values.get("quantize", {})
    made = make_sweep if varied else make_recipe
    made({"model": "org/name", **usual, **values})


@pytest.mark.parametrize("block", [block for block in PYTHON if block.page not in TASKS], ids=str)
def test_programs_run(block: Block, world: Path) -> None:
    code = compile(block.text, str(block), "exec")
    imported = set(re.findall(r"^(?:from|import) (\w+)", block.text, re.MULTILINE))
    assert all(importlib.util.find_spec(name) for name in imported - set(RUNTIMES))
    if not imported & set(RUNTIMES):
        exec(code, {"__name__": "__main__"})
