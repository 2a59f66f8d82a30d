"""Scales moved along edges: the model computes what it computed, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.tiny_architectures import ARCHITECTURES, ids
from transformers import AutoModelForCausalLM

from llmconvert.engine.discovery import discover
from llmconvert.engine.edges import Edge, find_edges
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.methods.awq import Awq
from llmconvert.quantize.methods.base import ScaledEdge
from llmconvert.quantize.methods.rescale import describe_edges, rescale_block, share_by_channel
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((24, 16, 24))
Tiny = Callable[..., Path]


class RandomScales(Awq):
    """Scales between a quarter and four, and a note of what was seen."""

    sample_tokens: ClassVar[int] = 20
    seen: list[ScaledEdge]

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def scales(self, edge: ScaledEdge, scale_dtype: torch.dtype) -> torch.Tensor:
        self.seen.append(edge)
        generator = torch.Generator().manual_seed(len([*edge.targets]))
        return share_by_channel(4 ** (2 * torch.rand(len(edge.mean), generator=generator) - 1), edge.channels, "amax")


def rescaled(directory: Path, method: RandomScales, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model that have new values after rescaling each block, with their names in the checkpoint."""
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    plans = discover(skeleton, 24)
    edges = options.get("edges") or find_edges(skeleton, plans)
    schemes = {name: Scheme(Int(8)) for linears in skeleton.linears for name in linears}
    stream = Stream(skeleton, WINDOWS, plans, mode="lockstep")
    found: dict[str, torch.Tensor] = {}
    for run in stream.blocks():
        index = run.plan.index
        block, prefix = skeleton.blocks[index], skeleton.prefix(index)
        scaling = rescale_block(run, block, len(WINDOWS), edges[index], prefix, schemes, method, torch.float32)
        new = {name: value.clone() for name, value in scaling.changed.items()}
        for name in skeleton.linears[index]:
            if name in scaling:
                new[f"{name}.weight"] = scaling.apply(name, run.weight(name))
                run.install(name, new[f"{name}.weight"])
        found |= {skeleton.names[name]: value for name, value in new.items()}
    stream.close()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_rescaled_model_computes_what_the_original_does(tiny: Tiny, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(name), attn_implementation="eager").eval()
    with torch.no_grad():
        before = [model(input_ids=window).logits for window in WINDOWS]
    method = RandomScales()
    for key, value in rescaled(tiny(name), method).items():
        parameter = model.get_parameter(key)
        assert float((value - parameter.detach()).abs().max()) > 0.01
        parameter.data.copy_(value)
    assert len(method.seen) >= 3 * 2
    with torch.no_grad():
        for window, expected in zip(WINDOWS, before, strict=True):
            torch.testing.assert_close(model(input_ids=window).logits, expected, rtol=1e-3, atol=2e-4)


def test_statistics_are_those_of_the_inputs(tiny: Tiny) -> None:
    method = RandomScales()
    rescaled(tiny("llama"), method)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    inputs: list[torch.Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window)
    rows, edge = torch.cat(inputs), method.seen[3]
    assert next(iter(edge.targets)).name == "model.layers.0.mlp.down_proj"
    assert edge.hessian is not None and edge.hessian.tokens == len(rows)
    torch.testing.assert_close(edge.hessian.matrix, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(edge.mean, rows.abs().mean(0))
    torch.testing.assert_close(edge.largest, rows.abs().amax(0))
    # Seven different tokens of each of the three windows.
    assert edge.sample is not None
    nearest = torch.cdist(edge.sample, rows).min(1)
    torch.testing.assert_close(edge.sample, rows[nearest.indices])
    windows = torch.bucketize(nearest.indices, torch.tensor([24, 40]), right=True)
    assert nearest.indices.unique().numel() == 21 and windows.bincount().tolist() == [7, 7, 7]


def test_linears_take_the_scale_that_a_rounded_norm_really_has(tiny: Tiny) -> None:
    """In bfloat16 a norm's weight can't be divided exactly; the linears make up for what it became."""
    before = SafetensorsCheckpoint(tiny("llama", torch.bfloat16))
    norm, linear = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    after = rescaled(tiny("llama", torch.bfloat16), RandomScales())
    assert after[norm].dtype == torch.bfloat16
    products = before[linear].double() * before[norm].double()
    torch.testing.assert_close(after[linear].double() * after[norm].double(), products, rtol=1e-6, atol=0)


def test_an_edge_that_does_not_hold_is_refused(tiny: Tiny) -> None:
    """Whatever told of it: it is tried on each block's own weights."""
    wrong = Edge("mlp.gate_proj", "linear", ("mlp.down_proj",), torch.arange(96))
    message = r"model\.layers\.0\.mlp\.gate_proj: scaling its channels changes what this block computes"
    with pytest.raises(UnsupportedError, match=message):
        rescaled(tiny("llama"), RandomScales(), edges=[(wrong,)] * 3)


def test_edges_in_words(tiny: Tiny) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(tiny("olmo2")), CPU)
    plans = discover(skeleton, 16)
    words = describe_edges(skeleton, plans, find_edges(skeleton, plans))
    assert words == (
        "scales move from self_attn.o_proj to self_attn.v_proj; mlp.down_proj to mlp.up_proj; none from "
        "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.gate_proj, mlp.up_proj"
    )
    with pytest.raises(UnsupportedError, match=r"architecture 'olmo2': .* nowhere to move scales"):
        describe_edges(skeleton, plans, [(), (), ()])
