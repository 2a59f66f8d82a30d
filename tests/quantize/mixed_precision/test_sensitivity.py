"""What schemes cost in divergence, against what they bring; stopped and continued; and the whole choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_architectures import ids, tiny_model
from transformers import AutoModelForCausalLM

from llmconvert.context import Context
from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CalibrationError, CapacityError, SchemeError
from llmconvert.progress import SILENT
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.mixed_precision.job import Allocation, plan_choice
from llmconvert.quantize.mixed_precision.sensitivity import Divergences, Subject, enough_windows, measure_sensitivity
from llmconvert.quantize.mixed_precision.units import fused_units
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

WINDOWS = ids((48,) * 12)
SCHEMES = tuple(Scheme.parse(name) for name in ("w4a16-g32", "w8a16-g32"))
BLOCKS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sensitivity") / "model"
    return tiny_model(directory, "llama-tied", dtype=torch.float32, num_hidden_layers=BLOCKS)


def subject(source: Path, **changes: Any) -> Subject:
    skeleton = Skeleton(SafetensorsCheckpoint(source), torch.device("cpu"))
    blocks = discover(skeleton, 48)
    units = fused_units(skeleton, blocks)
    given = Subject(skeleton, blocks, dict.fromkeys(units, SCHEMES), Rtn(), torch.float32, WINDOWS)
    return replace(given, **changes)


class StoppedError(Exception):
    """Stands for a kill."""


class StopAfter:
    """A progress that stops the work when so many steps are done."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[StopAfter]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._left -= int(amount)
        if self._left < 0:
            raise StoppedError

    def log(self, message: str) -> None:
        pass


def measured_divergence(source: Path, changed: dict[str, torch.Tensor]) -> float:
    """KL per token of the resident model with some weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        before = [model(window).logits[0].log_softmax(-1) for window in WINDOWS]
        for name, weight in changed.items():
            model.get_submodule(name).weight.copy_(weight)
        for window, reference in zip(WINDOWS, before, strict=True):
            difference = reference - model(window).logits[0].log_softmax(-1)
            total += float((reference.exp() * difference).sum(dtype=torch.float64))
            tokens += window.shape[1]
    return total / tokens


def test_predicted_divergences_are_those_that_the_schemes_bring(source: Path, tmp_path: Path) -> None:
    """Unit by unit within what few windows and rows can tell, from 1e-6 to 1e-2 nats; in sum within a tenth."""
    about = subject(source)
    found = measure_sensitivity(about, tmp_path, "key")
    pairs: list[tuple[float, float]] = []
    for unit, schemes in found.items():
        weights = {name: about.skeleton.checkpoint[f"{name}.weight"] for name in unit.linears}
        for scheme, predicted in schemes.items():
            targets = [Target(name, weight, scheme) for name, weight in weights.items()]
            solutions = Rtn().quantize(targets, None, torch.float32)
            changed = {name: solutions[name].tensor.dequantize(torch.float32) for name in unit.linears}
            pairs.append((predicted, measured_divergence(source, changed)))
    assert len(pairs) == BLOCKS * 4 * len(SCHEMES)
    for predicted, measured in pairs:
        assert predicted == pytest.approx(measured, rel=0.45)
    total = [sum(values) for values in zip(*pairs, strict=True)]
    assert total[0] == pytest.approx(total[1], rel=0.1)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_a_stopped_measurement_continues_to_the_same_numbers(source: Path, tmp_path: Path, name: str) -> None:
    from llmconvert.quantize.methods.base import load_method

    about = subject(source, method=load_method(name, {}))
    whole = measure_sensitivity(about, tmp_path / "whole", "key")
    for steps in range(2 * BLOCKS):
        with pytest.raises(StoppedError):
            measure_sensitivity(about, tmp_path / "part", "key", progress=StopAfter(steps))
        if steps in (BLOCKS // 2, BLOCKS):
            assert again(about, tmp_path / "part", 2 * BLOCKS - steps) == whole
            for path in (tmp_path / "part").iterdir():
                path.unlink()


def again(about: Subject, work: Path, most: int) -> Divergences:
    """Continue; a step that was done before must not be done again."""
    progress = StopAfter(2 * BLOCKS)
    found = measure_sensitivity(about, work, "key", progress=progress)
    assert progress._left == 0
    assert measure_sensitivity(about, work, "key", progress=StopAfter(-1)) == found  # which takes no step at all
    return found


def test_what_belongs_to_another_key_or_lost_its_files_is_measured_anew(source: Path, tmp_path: Path) -> None:
    about = subject(source)
    whole = measure_sensitivity(about, tmp_path / "whole", "key")
    with pytest.raises(StoppedError):
        measure_sensitivity(about, tmp_path / "part", "other", progress=StopAfter(2))
    with pytest.raises(StoppedError):
        measure_sensitivity(about, tmp_path / "part", "key", progress=StopAfter(BLOCKS + 1))
    assert measure_sensitivity(about, tmp_path / "part", "key") == whole
    with pytest.raises(StoppedError):
        measure_sensitivity(about, tmp_path / "lost", "key", progress=StopAfter(BLOCKS + 1))
    (tmp_path / "lost" / "tape-1.bin").unlink()
    assert measure_sensitivity(about, tmp_path / "lost", "key") == whole


def choose(source: Path, work: Path, mean: float, **options: Any) -> Allocation:
    budget = Budget(mean, **{key: options.pop(key) for key in ("bits", "group_sizes") if key in options})
    context = Context(memory=options.pop("memory_budget", None), progress=options.pop("progress", SILENT))
    windows = options.pop("windows", WINDOWS)
    options["overrides"] = tuple(options.get("overrides", ()))
    request = QuantizeRequest(**{"method": "gptq", "scheme": Scheme.parse("w4a16"), **options})
    return plan_choice(SafetensorsCheckpoint(source), work, budget, request, windows=windows, context=context).run()


def test_what_was_chosen_is_what_is_written(source: Path, tmp_path: Path) -> None:
    allocation = choose(source, tmp_path / "work", 5.5)
    assert 5.0 < allocation.bits_per_weight <= 5.5
    assert len({choice.scheme for choice in allocation.choices}) > 1
    result = quantize_checkpoint(
        SafetensorsCheckpoint(source),
        tmp_path / "out",
        method="gptq",
        scheme=allocation.scheme,
        overrides=allocation.overrides,
        windows=WINDOWS,
    )
    chosen = {name: str(choice.scheme) for choice in allocation.choices for name in choice.unit.linears}
    assert {layer.name: layer.scheme for layer in result.layers} == chosen
    stored = SafetensorsCheckpoint(tmp_path / "out")
    inside = [info for name, info in stored.infos.items() if name.rpartition(".")[0] in chosen]
    weights = sum(rows * columns for rows, columns in (layer.shape for layer in result.layers))
    assert 8 * sum(info.nbytes for info in inside) / weights == pytest.approx(allocation.bits_per_weight)


def test_more_bits_bring_less_divergence_than_the_best_scheme_for_all(source: Path, tmp_path: Path) -> None:
    found = [choose(source, tmp_path / "work", bits) for bits in (3.6, 4.6, 6.0)]
    assert [one.divergence for one in found] == sorted((one.divergence for one in found), reverse=True)
    for one in found:
        assert one.uniform is not None
        assert one.divergence <= one.uniform[1]


def test_overrides_are_not_up_for_choice(source: Path, tmp_path: Path) -> None:
    eight = Scheme.parse("w8a16-g32")
    overrides = [Override("*.layers.0.mlp.*", None), Override("*.layers.1.mlp.*", eight)]
    allocation = choose(source, tmp_path, 5.5, overrides=overrides)
    names = {name for choice in allocation.choices for name in choice.unit.linears}
    assert not any(".layers.0.mlp" in name or ".layers.1.mlp" in name for name in names)
    assert any(".layers.0.self_attn" in name for name in names)
    assert allocation.overrides[:2] == tuple(overrides)
    assert allocation.bits_per_weight <= 5.5


def test_what_cannot_be_done_is_refused_before_anything_is_measured(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (SchemeError, "smallest schemes to choose from already take", {"bits": (8,)}),
        (SchemeError, "can have none of the schemes", {"group_sizes": (48,)}),
        (SchemeError, "integer weights with 16-bit activations", {"scheme": Scheme.parse("w8a8")}),
        (SchemeError, "matches no linear", {"overrides": [Override("*.nothing", None)]}),
        (SchemeError, "share one input and are fused", {"overrides": [Override("*.q_proj", None)]}),
        (SchemeError, "leave no linear", {"overrides": [Override("*", None)]}),
        (CalibrationError, "given none", {"windows": ()}),
        (CapacityError, "needs", {"memory_budget": 1_000_000}),
    ]
    for error, words, options in refused:
        with pytest.raises(error, match=words):
            choose(source, work, 4.25, **options)
        assert not work.exists(), words


def test_text_is_taken_as_far_as_needed(source: Path) -> None:
    units = list(subject(source).schemes)
    rows = [torch.zeros((1, length), dtype=torch.long) for length in [1024] * 20]
    assert len(enough_windows(rows, units)) == 8
    wide = replace(units[0], shapes=((64, 6000),))
    assert len(enough_windows(rows, [wide])) == 12
    assert len(enough_windows(rows[:3], units)) == 3


def test_rows_that_were_not_measured_count_by_their_cost(tmp_path: Path) -> None:
    """A linear with more rows than are quantized comes to what all of them come to, within the sampling."""
    directory = tiny_model(tmp_path / "wide", "llama-tied", dtype=torch.float32, intermediate_size=1024)
    about = subject(directory)
    sampled = measure_sensitivity(about, tmp_path / "sampled", "key", progress=SILENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmconvert.quantize.mixed_precision.sensitivity._ROWS", 4096)
        every = measure_sensitivity(about, tmp_path / "every", "key")
    for unit in every:
        for scheme in SCHEMES:
            assert sampled[unit][scheme] == pytest.approx(every[unit][scheme], rel=0.2)
