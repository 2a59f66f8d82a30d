"""What comes with a model and fails is known before anything is computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmconvert import load_recipe, make_recipe, plan_recipe, quantize_model, run_recipe, validate_model
from llmconvert.errors import SourceError, UnsupportedError
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.formats.base import load_format
from llmconvert.recipes.stages.measurements import require_loader

QUANTIZE = {"method": "rtn", "scheme": "w8a16-g32"}


def with_template(source: Path, directory: Path, template: str) -> Path:
    shutil.copytree(source, directory)
    (directory / "chat_template.jinja").write_text(template)
    return directory


def test_a_template_that_fails_on_the_prompts_is_refused_before_the_work(
    write_recipe: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    model = with_template(tiny_llama, tmp_path / "model", "{# v1 #}\n{{ raise_exception('no system prompt') }}")
    validate = {"generation": {"max_new_tokens": 2, "prompts": ["Say hello."]}}
    recipe = write_recipe(model=str(model), calibrate=None, quantize=QUANTIZE, validate=validate)
    with pytest.raises(SourceError, match=r"chat template: line 2: TemplateError: no system prompt; without valid"):
        run_recipe(load_recipe(recipe))
    work = tmp_path / "work"
    assert not work.exists() or not list(work.glob("quantize-*"))


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"gguf", "mlx"}))
def test_what_loads_a_format_is_known_before_the_work(
    write_recipe: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scheme = {"bitsandbytes": "nf4", "awq": "w4a16-g32-asym"}.get(name, "w4a16-g32")
    quantize = {"method": "rtn", "scheme": scheme, "format": name}
    recipe = make_recipe(
        {"model": str(tiny_llama), "quantize": quantize, "validate": {"generation": {"max_new_tokens": 2}}}
    )
    loaders = load_format(name).loaders
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    if not loaders:
        require_loader(recipe)
        return
    with pytest.raises(UnsupportedError, match=rf"validate\.generation: .*{name} with {' and '.join(loaders)}"):
        require_loader(recipe)
    require_loader(recipe.model_copy(update={"validation": None}))


def test_a_runtime_that_cannot_read_the_artifact_is_told_by_the_plan_and_before_the_work(
    write_recipe: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    def recipe(*runtimes: str) -> Any:
        own = {"model": str(tiny_llama), "calibrate": None, "quantize": QUANTIZE, "publish": None}
        return load_recipe(write_recipe(**own, validate={"serve": {"runtimes": list(runtimes), "contexts": [16]}}))

    for refused in (plan_recipe, run_recipe):
        with pytest.raises(
            UnsupportedError, match=r"validate\.serve: llama\.cpp does not read compressed-tensors; transformers can"
        ):
            refused(recipe("llama.cpp"))
    assert not list((tmp_path / "work").glob("quantize-*"))
    (last,) = [step for step in plan_recipe(recipe("llama.cpp", "transformers")).steps if step.name == "validate"]
    assert "validate.serve: llama.cpp is left out; it does not read compressed-tensors" in last.notes


def test_an_artifact_that_is_there_is_told_apart_from_what_a_runtime_reads(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    quantize_model(tiny_llama, artifact, method="rtn", scheme="w8a16-g32")
    with pytest.raises(UnsupportedError, match=r"validate\.serve: llama\.cpp does not read compressed-tensors"):
        validate_model(artifact, serve=["llama.cpp"])


def test_a_template_that_nobody_renders_is_carried_along(write_recipe: Any, tiny_llama: Path, tmp_path: Path) -> None:
    template = "{{ raise_exception('never') }}"
    model = with_template(tiny_llama, tmp_path / "model", template)
    recipe = write_recipe(model=str(model), calibrate=None, quantize=QUANTIZE, validate=None)
    result = run_recipe(load_recipe(recipe))
    assert (result.artifact / "chat_template.jinja").read_text() == template
