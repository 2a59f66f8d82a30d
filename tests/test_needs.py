"""What jobs need: how it adds up and reads, and that plans state what then happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_llama_dir

from llmconvert.context import Context
from llmconvert.convert.dtype import DtypeRequest, plan_dtype
from llmconvert.convert.gqa.job import AttentionRequest, plan_attention
from llmconvert.convert.heal.job import plan_heal
from llmconvert.convert.heal.options import HealOptions, TrainedWeights
from llmconvert.engine.memory import BASE_NBYTES, tokenizer_nbytes
from llmconvert.errors import CapacityError
from llmconvert.gguf.ggml.mix import GgmlMix
from llmconvert.needs import Needs
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.plan import QuantizeRequest
from llmconvert.quantize.requantize import RequantizeRequest, plan_requantize
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.tokens import TokenWindows
from llmconvert.validate.artifact import plan_validation
from llmconvert.validate.generation.behaviour import BehaviourCheck, GenerationOptions

W4, W8 = Scheme.parse("w4a16-g32"), Scheme.parse("w8a16-g32")
SMALL = Context(memory=1_000_000)


def ids(count: int = 3, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (1, length), generator=generator) for _ in range(count)]


def files(path: Path) -> int:
    """Bytes of all files below a path, or of the file itself."""
    paths = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in paths)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_dir(tmp_path_factory.mktemp("model") / "llama", num_attention_heads=4, num_key_value_heads=4)


def test_one_after_the_other_the_disk_fills_and_memory_is_given_back() -> None:
    first, second = Needs(10, 4, 100, 7, 2.0), Needs(6, 5, 50, 0, 3.0)
    assert first.then(second) == Needs(10, 5, 150, 7, 5.0)
    assert first + second == Needs(16, 9, 150, 7, 3.0)
    assert first.then(Needs()).seconds is None and (Needs() + first).seconds is None


def test_what_passes_is_free_for_the_next_one() -> None:
    first, second = Needs(disk=100, passing=30), Needs(disk=20, passing=5)
    both = first.then(second)
    assert (first.left, both.disk, both.left) == (70, 100, 70 + 15)
    assert first.then(Needs(disk=60)) == Needs(disk=130, seconds=None)
    beside = first + second
    assert (beside.disk, beside.left) == (120, 85)


def test_needs_read_as_a_sentence() -> None:
    assert str(Needs()) == "nothing"
    needs = Needs(1_234_000_000, 0, 250_000_000, 80_000_000, 61.2)
    assert str(needs) == "1,234 MB of memory, 250 MB of disk, 80 MB to download, about 61 s"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_conversion_takes_the_disk_that_its_plan_states(model: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(model) as source:
        plan = plan_dtype(source, tmp_path / "out", DtypeRequest(dtype))
        assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir()), "a plan writes nothing"
        assert plan.run().bytes_written == plan.needs.disk == files(tmp_path / "out")


def test_a_quantization_takes_the_disk_that_its_plan_states(model: Path, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(model) as source:
        plan = plan_quantize(source, tmp_path / "rtn", QuantizeRequest("rtn", W4))
        plan.run()
        assert files(tmp_path / "rtn") == plan.needs.disk
        assert plan.needs.memory == plan.memory.total and plan.needs.device_memory == 0
        calibrated = plan_quantize(source, tmp_path / "gptq", QuantizeRequest("gptq", W4), windows=ids())
        # While it runs, the hidden states of every batch at two blocks' entries lie beside the artifact.
        assert calibrated.needs.disk == plan.needs.disk + 2 * 3 * 24 * 64 * 4
        assert calibrated.needs.left == plan.needs.disk
        both = plan_quantize(source, tmp_path / "gptaq", QuantizeRequest("gptaq", W4), windows=ids())
        assert both.needs.disk == plan.needs.disk + 2 * 2 * 3 * 24 * 64 * 4
        assert not list(tmp_path.glob(".*"))


def test_a_requantization_needs_room_for_its_parts(model: Path, tmp_path: Path) -> None:
    linears = [f"model.layers.{layer}.{name}" for layer in range(2) for name in _LINEARS]
    changes = {"model.layers.0.mlp.down_proj": W8}
    with SafetensorsCheckpoint(model) as source:
        plan_quantize(source, tmp_path / "w4", QuantizeRequest("rtn", W4)).run()
        request = RequantizeRequest("rtn", "compressed-tensors", dict.fromkeys(linears, W4), changes)
        plan = plan_requantize(tmp_path / "w4", source, tmp_path / "out", request, record=tmp_path / "layers.json")
        plan.run()
        # What is quantized anew comes first as an artifact of its own, with everything else in it dense.
        assert (
            files(tmp_path / "out") + source.nbytes / 2 < plan.needs.disk < files(tmp_path / "out") + 2 * source.nbytes
        )


_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def test_a_rewrite_and_its_healing_take_the_disk_that_their_plans_state(model: Path, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(model) as source:
        plan = plan_attention(source, tmp_path / "merged", AttentionRequest(2))
        plan.run()
        assert files(tmp_path / "merged") == plan.needs.disk
        refitted = plan_attention(source, tmp_path / "refitted", AttentionRequest(2), windows=ids())
        assert refitted.needs.disk == plan.needs.disk and refitted.needs.memory > plan.needs.memory
        with SafetensorsCheckpoint(tmp_path / "merged") as merged:
            heads = sum(merged[name].numel() for name in merged if ".self_attn." in name)
            others = sum(merged[name].numel() for name in merged) - heads
            counts: dict[TrainedWeights, int] = {"attention": 3 * heads, "all": 3 * heads + 4 * others}
            for train, numbers in counts.items():
                output, options = tmp_path / train, HealOptions(steps=1, held_out=1, train=train)
                state = tmp_path / f"{train}.safetensors"
                heal = plan_heal(source, merged, output, options, windows=ids(), state=state)
                heal.run()
                assert heal.needs.disk - files(output) == heal.needs.passing == 2 * 4 * numbers
                assert 0 < state.stat().st_size - 4 * numbers < 20_000  # names, counts of steps, losses


def test_a_gguf_file_is_as_large_as_its_plan_states(model: Path, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(model) as source:
        plan = plan_quantize(source, tmp_path / "tiny.gguf", QuantizeRequest("rtn", GgmlMix.parse("q8_0"), "gguf"))
        assert plan.run().nbytes == plan.needs.disk == files(tmp_path / "tiny.gguf")


def text(windows: Sequence[torch.Tensor]) -> TokenWindows:
    return TokenWindows(tuple(windows), len(windows), 1000, "text", "", "", False, windows[0].shape[1])


def test_an_artifact_that_transformers_loads_whole_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is loaded at all: no GGUF file, and none that is too large to be tried."""
    # Far more than all of a tiny model.
    monkeypatch.setattr("llmconvert.validate.predictions.needs.COMPARING_NBYTES", 0)
    deep = tiny_llama_dir(tmp_path / "deep", num_hidden_layers=24)
    given: dict[str, Any] = {"windows": text(ids()), "reference": None}
    with SafetensorsCheckpoint(deep) as source:
        given["reference"] = source
        compared = plan_validation(deep, (), **given).needs.memory
        loaded = plan_validation(deep, [BehaviourCheck()], **given).needs.memory
        own = BASE_NBYTES + tokenizer_nbytes(source)
        assert loaded - own == 2 * source.nbytes + 2 * 256 * 320 * 4 > compared - own
        packed = plan_validation(deep, [BehaviourCheck()], **given, stored=1000).needs.memory
        assert loaded - packed == source.nbytes - 1000
        both = [BehaviourCheck(GenerationOptions())]
        assert plan_validation(deep, both, **given, stored=1000).needs.memory == packed - 1000 + source.nbytes
        assert plan_validation(deep, [BehaviourCheck()], **given, loadable=False).needs.memory == compared
        short = Context(memory=loaded - 1)
        assert plan_validation(deep, [BehaviourCheck()], **given, context=short).needs.memory == compared


def test_what_does_not_fit_is_refused_by_the_plan_of_every_job(model: Path, tmp_path: Path) -> None:
    """None of them has begun by then, and each says how much it would take."""
    out = tmp_path / "out"
    with SafetensorsCheckpoint(model) as source:
        plan_attention(source, tmp_path / "merged", AttentionRequest(2)).run()
        with SafetensorsCheckpoint(tmp_path / "merged") as merged:
            with pytest.raises(CapacityError, match="1 MB may be used, which is less than Python"):
                plan_quantize(source, out, QuantizeRequest("gptq", W4), windows=ids(), context=SMALL)
            with pytest.raises(CapacityError, match="0 MB may be used, which is less than Python"):
                plan_attention(source, out, AttentionRequest(2), windows=ids(), context=SMALL)
            with pytest.raises(CapacityError, match="1 MB may be used; use shorter windows or a machine"):
                plan_heal(source, merged, out, HealOptions(held_out=1), windows=ids(), context=SMALL)
            with pytest.raises(CapacityError, match="1 MB may be used, which is less than Python"):
                request = QuantizeRequest("imatrix", GgmlMix.parse("q8_0"), "gguf")
                plan_quantize(source, tmp_path / "o.gguf", request, windows=ids(), context=SMALL)
        with pytest.raises(CapacityError, match=r"evaluation needs about \d+ MB, 1 MB may be used; allow that"):
            plan_validation(model, (), reference=source, windows=text(ids()), context=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
