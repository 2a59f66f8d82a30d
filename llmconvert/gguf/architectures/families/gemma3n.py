"""Gemma 3n: four streams of which one is computed (AltUp), low-rank paths beside attention (LAuReL), an embedding for
each layer, sparse activations in the first layers, keys and values shared by the last ones.

Most of its numbers are constants of llama.cpp's class: those of the published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, outer
from llmconvert.gguf.architectures.entries import Config, Form, entries
from llmconvert.gguf.architectures.families.llama import MLP, RMS
from llmconvert.gguf.architectures.windows import read_windows, write_windows
from llmconvert.gguf.rope import shortest

__all__ = ["ARCHITECTURES"]

_GELU: Final = "gelu_pytorch_tanh"
_SLIDING, _FULL = "sliding_attention", "full_attention"
_PERIOD: Final = 5
_TABLE: Final = "vocab_size_per_layer_input"
# Layers whose gates are sparse, and how; layers with keys and values of their own.
_SPARSE, _SPARSITY, _OWN = 10, 0.95, 20
# Of so many neurons on it does not matter that llama.cpp's deviation of them is over one less.
_MANY: Final = 1024
_LAYER: Final = entries(
    """
input_layernorm.weight hidden
post_attention_layernorm.weight hidden -> ATTN_POST_NORM.weight
pre_feedforward_layernorm.weight hidden
post_feedforward_layernorm.weight hidden
self_attn.q_proj.weight query hidden
self_attn.o_proj.weight hidden query
self_attn.q_norm.weight head
altup.correct_output_scale hidden -> ALTUP_CORRECT_SCALE.weight
altup.correction_coefs.weight
altup.prediction_coefs.weight
altup.modality_router.weight
altup.router_norm.weight hidden
laurel.linear_left.weight
laurel.linear_right.weight
laurel.post_laurel_norm.weight hidden
per_layer_input_gate.weight
per_layer_projection.weight
post_per_layer_input_norm.weight hidden
"""
    + "\n".join(line.partition(" ")[0] for line in MLP.split("\n"))
)


def _shared(config: Config, layer: int) -> int:
    """The layer whose keys and values one of the last layers takes; a layer with its own is itself."""
    kinds = config["layer_types"]
    own = len(kinds) - config["num_kv_shared_layers"]
    return layer if layer < own else max(before for before in range(own) if kinds[before] == kinds[layer])


# llama.cpp loads these of all layers. Published checkpoints have them, what transformers saves does not.
_KEYS: Final = tuple(
    replace(entry, instead=_shared)
    for entry in entries(
        """
self_attn.k_proj.weight key hidden
self_attn.v_proj.weight key hidden
self_attn.k_norm.weight head
"""
    )
)


def _padded(config: Config, rows: int) -> np.ndarray:
    """llama.cpp has as many rows as the vocabulary; transformers takes the first for tokens that have none."""
    return np.concatenate([np.arange(rows), np.zeros(max(0, config["vocab_size"] - rows), np.int64)])


_OUTER: Final = (
    *outer(),
    *entries(
        """
model.embed_tokens_per_layer.weight
model.per_layer_model_projection.weight
model.per_layer_projection_norm.weight
model.altup_projections.#.weight hidden hidden
model.altup_unembed_projections.#.weight hidden hidden
""",
        {
            "model.embed_tokens_per_layer": Form(
                _padded, padded=lambda config: int(config["vocab_size_per_layer_input"])
            )
        },
        prefix="",
    ),
)


def _write(config: Config) -> Mapping[str, Any]:
    sets, inner = config["rope_parameters"], set(config["intermediate_size"])
    if len(inner) > 1:
        raise UnsupportedError(
            f"config.json: intermediate_size is {config['intermediate_size']}; llama.cpp's gemma3n has one for all "
            "layers"
        )
    for kind in (_FULL, _SLIDING):
        if sets[kind].get("rope_type", "default") != "default":
            raise UnsupportedError(
                f"config.json: rope_parameters.{kind} is of type {sets[kind]['rope_type']!r}; llama.cpp's gemma3n does "
                "not scale positions"
            )
    return {
        "feed_forward_length": int(inner.pop()),
        "embedding_length_per_layer_input": int(config["hidden_size_per_layer_input"]),
        # llama.cpp does not look at it: its rows are as many as tokens.
        _TABLE: int(config["vocab_size_per_layer_input"]),
        "altup.active_idx": int(config["altup_active_idx"]),
        "altup.num_inputs": int(config["altup_num_inputs"]),
        "attention.shared_kv_layers": int(config["num_kv_shared_layers"]),
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": float(sets[_FULL]["rope_theta"]),
        "rope.freq_base_swa": float(sets[_SLIDING]["rope_theta"]),
        **write_windows("gemma3n", _PERIOD, told=False)(config),
    }


def _read(file: Reading) -> Mapping[str, Any]:
    metadata, layers = file.header.metadata, file.layers
    sparse = min(_SPARSE, layers)
    inner = metadata.integer(f"{file.arch}.feed_forward_length")
    rows = file.header.tensors["per_layer_token_embd.weight"].shape[0]
    table = metadata.integer(f"{file.arch}.{_TABLE}", rows)
    if not 0 < table <= rows:
        raise CheckpointError(f"{file.header.path}: {file.arch}.{_TABLE} is {table:,}, the table has {rows:,} rows")
    return {
        "hidden_activation": _GELU,
        "intermediate_size": [inner] * layers,
        "activation_sparsity_pattern": [_SPARSITY] * sparse + [0.0] * (layers - sparse),
        "num_kv_shared_layers": max(0, layers - _OWN),
        "vocab_size_per_layer_input": table,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": shortest(metadata.number(f"{file.arch}.rope.{key}", usual))}
            for kind, key, usual in ((_FULL, "freq_base", 1e6), (_SLIDING, "freq_base_swa", 1e4))
        },
        **read_windows(file, _PERIOD),
    }


def _notes(config: Config) -> tuple[str, ...]:
    neurons = min(config["intermediate_size"])
    if neurons >= _MANY:
        return ()
    return (
        f"llama.cpp takes the deviation of a gate's {neurons} values over {neurons - 1}, the model over all of them: "
        "the fewer there are, the further from it are the values that the first layers cut off",
    )


GEMMA3N: Final = GgufArchitecture(
    "gemma3n",
    "gemma3n_text",
    "Gemma3nForCausalLM",
    _OUTER,
    _LAYER + _KEYS,
    tuple(setting for setting in RMS if setting.name != "intermediate_size"),
    always={
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "altup_num_inputs": 4,
        "attention_bias": False,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 256,
        "laurel_rank": 64,
    },
    write=_write,
    read=_read,
    # Coefficients are clipped in training alone.
    inert=frozenset({"altup_coef_clip"}),
    windows="kept",
    rotary="own",
    activation=_GELU,
    notes=_notes,
    # Streams beside the one that is computed.
    experts=lambda config: int(config["altup_num_inputs"]) - 1,
    unquantized=("per_layer_model_proj.weight",),
    known=frozenset({"final_logit_softcapping", "attention.shared_kv_layers"}),
)
ARCHITECTURES: Final = (GEMMA3N,)
