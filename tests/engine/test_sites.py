"""Sites against the models and checkpoints they describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_architectures import ARCHITECTURES, ids, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_of_the_blocks_is_a_site_with_its_values(tmp_path: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, name))
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        skeleton = Skeleton(checkpoint, CPU)
        inside = f"{skeleton.reach.blocks}."
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(inside)
        }
        assert skeleton.sites.keys() == linears.keys()
        for site in skeleton.sites.values():
            weight = linears[site.name].weight
            assert (site.shape, site.weights) == (tuple(weight.shape), weight.numel())
            assert torch.equal(site.read(checkpoint), weight)
            assert torch.equal(model.get_parameter(site.parameter), weight)
            assert site.name.startswith(skeleton.prefix(site.block))
            assert checkpoint.infos[site.tensor].name.startswith(f"{site.stored}.")
        assert [site.name for index in range(skeleton.block_count) for site in skeleton.sites_of(index)] == list(
            linears
        )


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_names_in_a_checkpoint_that_has_no_prefix(tmp_path: Path, name: str) -> None:
    """A base model's checkpoint: the module is ``model.layers.0…``, what is written about it ``layers.0…``."""
    AutoModel.from_pretrained(tiny_model(tmp_path / "whole", name)).save_pretrained(tmp_path / "bare")
    with SafetensorsCheckpoint(tmp_path / "bare") as checkpoint:
        for site in Skeleton(checkpoint, CPU).sites.values():
            assert site.name == f"model.{site.stored}" and site.tensor == f"{site.stored}.weight"
            assert site.parameter == f"model.{site.tensor}"
            assert tuple(site.read(checkpoint).shape) == site.shape


def test_a_running_model_meets_what_is_put_into_a_site(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        skeleton = Skeleton(checkpoint, CPU)
        stream = Stream(skeleton, ids((8,)), discover(skeleton), mode="lockstep")
        try:
            run = next(iter(stream.blocks()))
            site = skeleton.sites_of(0)[0]
            assert torch.equal(run.weight(site.name), site.read(checkpoint))
            run.install(site.name, torch.full(site.shape, 0.5))
            assert torch.equal(run.weight(site.name), torch.full(site.shape, 0.5))
            assert torch.equal(run.module(site.name).get_parameter("weight"), run.weight(site.name))
            assert skeleton.submodule(0, site.name) is run.module(site.name)
        finally:
            stream.close()


def test_how_long_a_probe_is_does_not_change_what_shares_an_input(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen2")
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        skeleton = Skeleton(checkpoint, CPU)
        short, long = discover(skeleton), discover(skeleton, 64)
    assert [[stop.linears for stop in plan.stops] for plan in short] == [
        [stop.linears for stop in plan.stops] for plan in long
    ]
