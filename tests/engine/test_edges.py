"""Edges against what is known of each architecture, and against the logits of models with scales moved along them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_architectures import ARCHITECTURES, tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from llmconvert.engine.discovery import discover
from llmconvert.engine.edges import Edge, find_edges
from llmconvert.engine.skeleton import Skeleton
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
Tiny = Callable[..., Path]

_VALUES = ("self_attn.v_proj", "linear", ("self_attn.o_proj",))
_UP = ("mlp.up_proj", "linear", ("mlp.down_proj",))


def _pre_norm(kind: str, second: str) -> list[tuple[str, str, tuple[str, ...]]]:
    return [
        ("input_layernorm", kind, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        _VALUES,
        (second, kind, ("mlp.gate_proj", "mlp.up_proj")),
        _UP,
    ]


_LLAMA = _pre_norm("norm", "post_attention_layernorm")
_OPT = [
    ("self_attn_layer_norm", "norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", "linear", ("self_attn.out_proj",)),
    ("final_layer_norm", "norm", ("fc1",)),
    ("fc1", "linear", ("fc2",)),  # through a ReLU
]
#: Without the variants of one architecture.
EXPECTED = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _pre_norm("offset norm", "pre_feedforward_layernorm"),
    "phi3": [
        ("input_layernorm", "norm", ("self_attn.qkv_proj",)),
        ("self_attn.qkv_proj", "linear", ("self_attn.o_proj",)),
        ("post_attention_layernorm", "norm", ("mlp.gate_up_proj",)),
        ("mlp.gate_up_proj", "linear", ("mlp.down_proj",)),
    ],
    "gpt_neox": [
        ("input_layernorm", "norm", ("attention.query_key_value",)),
        ("attention.query_key_value", "linear", ("attention.dense",)),
        ("post_attention_layernorm", "norm", ("mlp.dense_h_to_4h",)),  # then comes a GELU
    ],
    "opt": _OPT,
    "opt-untied": [_OPT[1], _OPT[3]],  # its norms feed the residual stream too
    "olmo2": [_VALUES, _UP],  # its norms come after attention and MLP
}


def edges_of(directory: Path) -> tuple[tuple[Edge, ...], ...]:
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    return find_edges(skeleton, discover(skeleton, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_edges_are_found(tiny: Tiny, name: str, dtype: torch.dtype) -> None:
    found = edges_of(tiny(name, dtype))
    expected = EXPECTED[name if name in EXPECTED else name.removesuffix("-tied")]
    assert len(found) == 3
    for block in found:
        assert [(edge.producer, edge.kind, edge.linears) for edge in block] == expected


def test_channels_are_those_behind_the_columns(tiny: Tiny) -> None:
    """Two heads share one of values; in fused projections the values, and the second half of gate and up, come last."""
    llama = {edge.producer: edge.channels for edge in edges_of(tiny("llama"))[0]}
    heads = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).reshape(-1)
    assert torch.equal(llama["self_attn.v_proj"], heads)
    assert torch.equal(llama["input_layernorm"], torch.arange(64))
    assert torch.equal(llama["mlp.up_proj"], torch.arange(96))
    phi3 = {edge.producer: edge.channels for edge in edges_of(tiny("phi3"))[0]}
    assert torch.equal(phi3["self_attn.qkv_proj"], 96 + heads)
    assert torch.equal(phi3["mlp.gate_up_proj"], 96 + torch.arange(96))
    neox = {edge.producer: edge.channels for edge in edges_of(tiny("gpt_neox"))[0]}
    assert torch.equal(neox["attention.query_key_value"], torch.arange(192).view(4, 3, 16)[:, 2].reshape(-1))


def test_nothing_but_the_producers_consumers_may_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm whose output also goes round the linears, and a product that passes through a square, are no edges."""
    plain = LlamaDecoderLayer.forward

    def around(self: LlamaDecoderLayer, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return plain(self, hidden_states, *args, **kwargs) + self.input_layernorm(hidden_states)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", around)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj((self.gate_proj(x) * self.up_proj(x)) ** 2))
    found = edges_of(tiny_model(tmp_path / "model"))[0]
    assert [edge.producer for edge in found] == ["self_attn.v_proj", "post_attention_layernorm"]


def test_weights_are_not_read(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SafetensorsCheckpoint, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    assert all(edges_of(tiny("qwen2")))


def test_the_model_given_stays_on_meta(tiny: Tiny) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(tiny("llama")), CPU)
    find_edges(skeleton, discover(skeleton, 16))
    modules: list[nn.Module] = [skeleton.model, *skeleton.blocks]
    assert all(value.is_meta for module in modules for value in module.parameters())
