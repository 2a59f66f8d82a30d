"""Checkpoint names against module names: prefixes that are there or not, tensors too few or too many."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_architectures import ARCHITECTURES, ids, tiny_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

from llmconvert.engine.architecture.expert_storage import Conversions
from llmconvert.engine.architecture.names import map_names
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CheckpointError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
Tiny = Callable[..., Path]


def renamed(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Rewrite a model's tensors in place."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_finds_its_tensor(tiny: Tiny, name: str) -> None:
    checkpoint = SafetensorsCheckpoint(tiny(name))
    skeleton = Skeleton(checkpoint, CPU)
    assert set(skeleton.names.values()) == set(checkpoint)
    states = {re.sub(r"(\.\d+)\.block\.", r"\1.", state) for state in skeleton.model.state_dict()}
    untold = states - set(skeleton.names)
    assert untold <= set(skeleton.model.all_tied_weights_keys)


@pytest.mark.parametrize("name", ["llama-tied", "opt", "qwen3-tied", "gemma2"])
def test_checkpoints_of_the_base_model_have_no_prefix(tiny: Tiny, name: str, tmp_path: Path) -> None:
    """OPT's on the Hub are saved so: ``decoder.layers.0…`` where the causal model says ``model.decoder.layers.0…``."""
    AutoModel.from_pretrained(tiny(name)).save_pretrained(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert not any(tensor.startswith("model.") for tensor in checkpoint)
    assert set(Skeleton(checkpoint, CPU).names.values()) == set(checkpoint)
    window = ids((24,))
    attention = "eager" if name == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(tiny(name), attn_implementation=attention).eval()
    with torch.no_grad():
        expected = model(input_ids=window[0], use_cache=False).logits
    (streamed,) = stream_logits(checkpoint, window, device=CPU)
    assert torch.equal(streamed, expected)


def test_tensors_that_the_model_does_not_know_are_left_out(tmp_path: Path) -> None:
    directory = renamed(
        tiny_model(tmp_path / "model"), lambda old: {**old, "model.mtp.0.head.weight": torch.zeros(3, 3)}
    )
    checkpoint = SafetensorsCheckpoint(directory)
    names = Skeleton(checkpoint, CPU).names
    assert set(checkpoint) - set(names.values()) == {"model.mtp.0.head.weight"}


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    def without(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in old.items() if ".1.mlp." not in name}

    directory = renamed(tiny_model(tmp_path / "model"), without)
    with pytest.raises(CheckpointError, match=r"no tensor for 'model\.layers\.1\.mlp\.gate_proj\.weight' and 2 more"):
        Skeleton(SafetensorsCheckpoint(directory), CPU)


def test_an_untied_head_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = renamed(
        tiny_model(tmp_path / "model"), lambda old: {name: old[name] for name in old if name != "lm_head.weight"}
    )
    with pytest.raises(CheckpointError, match=r"no tensor for 'lm_head\.weight'; config\.json and the weights do not"):
        Skeleton(SafetensorsCheckpoint(directory), CPU)


def test_two_tensors_for_one_parameter_are_named(tmp_path: Path) -> None:
    directory = renamed(
        tiny_model(tmp_path / "model"), lambda old: {**old, "norm.weight": old["model.norm.weight"].clone()}
    )
    with pytest.raises(CheckpointError, match=r"'(model\.)?norm\.weight' and '(model\.)?norm\.weight' are both meant"):
        Skeleton(SafetensorsCheckpoint(directory), CPU)


def test_a_tied_head_that_is_stored_again_is_no_conflict(tmp_path: Path) -> None:
    """Some checkpoints hold the tied matrix twice; transformers ties it all the same."""
    directory = renamed(
        tiny_model(tmp_path / "model", "llama-tied"),
        lambda old: {**old, "lm_head.weight": old["model.embed_tokens.weight"].clone()},
    )
    window = ids((24,))
    (streamed,) = stream_logits(SafetensorsCheckpoint(directory), window, device=CPU)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        assert torch.equal(streamed, model(input_ids=window[0], use_cache=False).logits)


def test_only_names_are_looked_at(tiny: Tiny) -> None:
    config = Skeleton(SafetensorsCheckpoint(tiny("llama")), CPU).model.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = list(SafetensorsCheckpoint(tiny("llama")))
    assert dict(map_names(Conversions(model), names)) == {name: name for name in names}


def test_scales_are_loaded_beside_a_weight_unless_its_name_alone_is_changed(tiny: Tiny) -> None:
    conversions = Conversions(Skeleton(SafetensorsCheckpoint(tiny("llama")), CPU).model)
    down = "model.layers.0.mlp.down_proj.weight"
    assert conversions.loads_beside(down, down) and conversions.loads_beside(down.removeprefix("model."), down)
    for pattern, loaded in ((r"mlp\.w2\.weight", False), (r"mlp\.w2", True)):
        target = "mlp.down_proj.weight" if pattern.endswith("weight") else "mlp.down_proj"
        conversions._renamings = [WeightRenaming(pattern, target)]
        assert conversions.target("model.layers.0.mlp.w2.weight") == (down, None)
        assert conversions.loads_beside("model.layers.0.mlp.w2.weight", down) is loaded
