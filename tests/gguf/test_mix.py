"""llama.cpp's mixes, and types of single tensors that somebody wants otherwise."""

from __future__ import annotations

import pytest

from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.gguf.ggml.mix import MIXES, GgmlType, MixContext
from llmconvert.gguf.ggml.overrides import Matrix, TypeOverride, override_types


@pytest.mark.parametrize("name", MIXES)
def test_mixes_follow_llama_quantize(name: str) -> None:
    mix = MIXES[name]
    context = MixContext(layers=32, tied=False, importance=False)
    assert mix.type_of("blk.0.attn_norm.weight", (4096,), context) == "F32"
    assert mix.type_of("blk.9.attn_q.weight", (4096, 4096), context) == mix.base
    assert mix.type_of("blk.9.ffn_up.weight", (11008, 4096), context) == mix.base
    assert mix.type_of("token_embd.weight", (32000, 4096), context) == mix.base
    floats = mix.base in ("F32", "F16", "BF16", "Q8_0")
    assert mix.type_of("output.weight", (32000, 4096), context) == (mix.base if floats else "Q6_K")
    tied = MixContext(layers=32, tied=True, importance=False)
    assert mix.type_of("token_embd.weight", (32000, 4096), tied) == (mix.base if floats else "Q6_K")


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [  # of 32 layers: the first, the third, the tenth, the last
        ("q2_k", "attn_v", ["Q3_K", "Q3_K", "Q3_K", "Q3_K"]),
        ("q2_k", "ffn_down", ["Q3_K", "Q3_K", "Q3_K", "Q3_K"]),
        ("q2_k", "attn_output", ["Q3_K", "Q3_K", "Q3_K", "Q3_K"]),
        ("q2_k_s", "ffn_down", ["Q4_K", "Q4_K", "Q2_K", "Q2_K"]),
        ("q3_k_m", "attn_v", ["Q5_K", "Q4_K", "Q4_K", "Q4_K"]),
        ("q3_k_m", "ffn_down", ["Q5_K", "Q4_K", "Q4_K", "Q4_K"]),
        ("q3_k_m", "attn_output", ["Q4_K", "Q4_K", "Q4_K", "Q4_K"]),
        ("q3_k_m", "attn_qkv", ["Q4_K", "Q4_K", "Q4_K", "Q4_K"]),
        ("q3_k_l", "ffn_down", ["Q5_K", "Q5_K", "Q5_K", "Q5_K"]),
        ("q3_k_s", "attn_v", ["Q3_K", "Q3_K", "Q3_K", "Q3_K"]),
        ("iq4_xs", "ffn_down", ["Q5_K", "Q5_K", "IQ4_XS", "IQ4_XS"]),
        ("iq4_nl", "attn_v", ["IQ4_NL", "IQ4_NL", "IQ4_NL", "IQ4_NL"]),
    ],
)
def test_types_by_layer_are_llama_cpps(name: str, part: str, expected: list[str]) -> None:
    context = MixContext(layers=32, tied=False, importance=False)
    layers = [f"blk.{layer}.{part}.weight" for layer in (0, 2, 9, 31)]
    assert [MIXES[name].type_of(layer, (4096, 4096), context) for layer in layers] == expected


def test_grouped_queries_give_values_more_bits() -> None:
    context = MixContext(layers=32, tied=False, importance=True, queries_per_key=4)
    found = {name: mix.type_of("blk.9.attn_v.weight", (1024, 4096), context) for name, mix in MIXES.items()}
    assert (found["q2_k"], found["q2_k_s"], found["iq4_xs"], found["iq4_nl"]) == ("Q4_K", "Q4_K", "Q5_K", "Q5_K")
    down = MIXES["iq4_xs"].type_of("blk.0.ffn_down.weight", (4096, 11008), context)
    assert down == "IQ4_XS"  # with an importance matrix


def test_q4_k_m_gives_more_bits_where_llama_cpp_does() -> None:
    context = MixContext(layers=32, tied=False, importance=False)
    mix = MIXES["q4_k_m"]
    better = [i for i in range(32) if mix.type_of(f"blk.{i}.ffn_down.weight", (4096, 11008), context) == "Q6_K"]
    # The first and last eighth, and every third between.
    assert better == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert mix.type_of("blk.5.attn_qkv.weight", (9216, 3072), context) == "Q5_K"
    assert mix.type_of("blk.5.ffn_up.weight", (1536, 576), context) == "Q5_0"
    assert mix.type_of("blk.0.attn_v.weight", (192, 576), context) == "Q8_0"
    assert mix.type_of("blk.5.ffn_up.weight", (1536, 40), context) == "F16"


TENSORS = [
    Matrix("token_embd.weight", ("model.embed_tokens.weight",), (320, 256), "BF16"),
    Matrix("blk.0.attn_v.weight", ("model.layers.0.self_attn.v_proj.weight",), (64, 256), "BF16"),
    Matrix("blk.0.ffn_down.weight", ("model.layers.0.mlp.down_proj.weight",), (256, 96), "BF16"),
    Matrix("blk.0.attn_norm.weight", ("model.layers.0.input_layernorm.weight",), (256,), "BF16"),
    Matrix("output.weight", ("lm_head.weight",), (320, 256), "BF16"),
]
TYPES = {tensor.name: "Q4_K" if len(tensor.shape) > 1 else "F32" for tensor in TENSORS}


def overridden(*overrides: tuple[str, str | None], tied: bool = False) -> list[str]:
    tensors = TENSORS[: -1 if tied else None]
    given = [TypeOverride(*override) for override in overrides]
    return list(override_types({t.name: TYPES[t.name] for t in tensors}, tensors, given, tied=tied).values())


def test_the_first_override_that_matches_a_tensor_by_any_of_its_names_counts() -> None:
    found = overridden(("head", "Q8_0"), ("*.v_proj", "Q6_K"), ("blk.*", "Q5_0"), ("*", None))
    assert found == ["BF16", "Q6_K", "Q5_0", "F32", "Q8_0"]
    assert overridden(("embedding", "Q6_K"), ("token_embd", "Q2_K"))[0] == "Q6_K"
    assert overridden(("head", "Q6_K"), tied=True)[0] == "Q6_K"


def test_overrides_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        SchemeError, match=r"'attn' matches no matrix of this model; they look like model.embed_tokens, "
    ):
        overridden(("attn", "Q6_K"))
    with pytest.raises(
        SchemeError, match=r"down_proj.weight have 96 weights, no whole blocks of q6_k; .*fit: q8_0, q5"
    ):
        overridden(("*", "Q6_K"))
    with pytest.raises(UnsupportedError, match=r"embedding: q6_k, head: none: the model's head is its embedding"):
        overridden(("embedding", "Q6_K"), ("head", None), tied=True)
    with pytest.raises(SchemeError, match=r"'q4_k_m' is not known; known are q8_0, q6_k"):
        GgmlType.parse("q4_k_m")
    assert str(GgmlType.parse("Q4_K")) == "q4_k"
