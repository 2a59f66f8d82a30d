"""State spaces alone: Mamba (Gu and Dao 2023, arXiv 2312.00752) and Mamba 2 (Dao and Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture, Reading, Setting
from llmconvert.gguf.architectures.entries import Change, Config, Form, entries

__all__ = [
    "ARCHITECTURES",
    "BACKBONE",
    "BACKBONE_OUTER",
    "DECAY",
    "MAMBA2_TENSORS",
    "RMS_EPS",
    "SQUEEZED",
    "UNUSED",
    "attending",
    "kv_heads",
    "mamba2_forms",
]

SQUEEZED: Final = Form(squeezed=True)
DECAY: Final = Form(change=Change.MINUS_EXP)
_DECAY_COLUMN: Final = Form(change=Change.MINUS_EXP, column=True)
_COLUMN: Final = Form(column=True)
# ALiBi, recurrences: nothing knows a longest input.
_ENDLESS: Final = 1 << 20
RMS_EPS: Final = "attention.layer_norm_rms_epsilon"
BACKBONE: Final = "backbone.layers.*."
BACKBONE_OUTER: Final = entries("backbone.embeddings.weight\nbackbone.norm_f.weight\nlm_head.weight?", prefix="")
_STEP: Final = frozenset(
    {"time_step_min", "time_step_max", "time_step_floor", "time_step_limit", "time_step_scale", "time_step_init_scheme"}
)
UNUSED: Final = _STEP | {
    *("rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "use_associative_scan", "chunk_size", "expand"),
    *("num_logits_to_keep", "use_mamba_kernels", "mamba_ssm_cache_dtype", "mamba_chunk_size", "mamba_expand"),
}


def kv_heads(config: Config, layers: list[bool]) -> np.ndarray:
    """Key-value heads of each layer; none tells llama.cpp that it does not attend."""
    return np.array([config["num_key_value_heads"] if one else 0 for one in layers], np.int32)


def attending(file: Reading) -> tuple[list[bool], int]:
    """Which layers attend, and with how many key-value heads."""
    counts = np.atleast_1d(np.asarray(file.get("attention.head_count_kv", 0)))
    counts = np.broadcast_to(counts, (file.layers,)) if counts.size == 1 else counts
    return [bool(count) for count in counts], int(counts.max(initial=0))


def _check_width(config: Config, inner: int) -> None:
    if inner != 2 * config["hidden_size"]:
        raise UnsupportedError(
            f"config.json: state spaces have {inner} channels; llama.cpp's mamba computes with twice the width, "
            f"{2 * config['hidden_size']}"
        )


# Mamba (Gu and Dao 2023) and Mamba 2.
_MAMBA_TENSORS: Final = """
norm.weight
mixer.in_proj.weight
mixer.conv1d.weight
mixer.conv1d.bias
mixer.x_proj.weight
mixer.dt_proj.weight
mixer.dt_proj.bias
mixer.A_log -> SSM_A
mixer.D -> SSM_D
mixer.out_proj.weight
"""
_MAMBA_SETTINGS: Final = (
    Setting("embedding_length", "hidden_size"),
    Setting("block_count", "num_hidden_layers"),
    Setting("ssm.conv_kernel", "conv_kernel"),
    Setting("ssm.state_size", "state_size"),
    Setting(RMS_EPS, "layer_norm_epsilon", float),
)


def _write_mamba(normed: bool) -> Callable[[Config], Mapping[str, Any]]:
    def write(config: Config) -> Mapping[str, Any]:
        _check_width(config, config["intermediate_size"])
        return {
            "context_length": _ENDLESS,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "ssm.inner_size": config["intermediate_size"],
            "ssm.time_step_rank": config["time_step_rank"],
            "ssm.dt_b_c_rms": normed,
        }

    return write


def _read_mamba(file: Reading) -> Mapping[str, Any]:
    inner = file.get("ssm.inner_size")
    return {
        "expand": inner // file.config["hidden_size"],
        "intermediate_size": inner,
        "time_step_rank": file.get("ssm.time_step_rank"),
        "use_bias": False,
        "use_conv_bias": True,
    }


def _mamba(model_type: str, model_class: str, *, normed: bool) -> GgufArchitecture:
    return GgufArchitecture(
        "mamba",
        model_type,
        model_class,
        BACKBONE_OUTER,
        entries(_MAMBA_TENSORS, {"mixer.conv1d.weight": SQUEEZED, "mixer.A_log": DECAY}, prefix=BACKBONE),
        _MAMBA_SETTINGS,
        write=_write_mamba(normed),
        read=_read_mamba,
        inert=UNUSED,
        attention=False,
        described=lambda header: bool(header.metadata.get("mamba.ssm.dt_b_c_rms")) == normed,
    )


MAMBA: Final = _mamba("mamba", "MambaForCausalLM", normed=False)
FALCON_MAMBA: Final = _mamba("falcon_mamba", "FalconMambaForCausalLM", normed=True)
MAMBA2_TENSORS: Final = """
mixer.in_proj.weight~
mixer.conv1d.weight~
mixer.conv1d.bias~
mixer.dt_bias~ -> SSM_DT.bias
mixer.A_log~ -> SSM_A
mixer.D~ -> SSM_D
mixer.norm.weight~
mixer.out_proj.weight~
"""


def mamba2_forms(module: str, groups: str) -> Mapping[str, Form]:
    return {
        f"{module}.conv1d.weight": SQUEEZED,
        f"{module}.A_log": _DECAY_COLUMN,
        f"{module}.D": _COLUMN,
        f"{module}.norm": Form(heads=lambda config: int(config[groups])),
    }


def _write_mamba2(config: Config) -> Mapping[str, Any]:
    inner = config["num_heads"] * config["head_dim"]
    _check_width(config, inner)
    return {
        "context_length": _ENDLESS,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.inner_size": inner,
        "ssm.time_step_rank": config["num_heads"],
    }


def _read_mamba2(file: Reading) -> Mapping[str, Any]:
    inner, heads = file.get("ssm.inner_size"), file.get("ssm.time_step_rank")
    return {
        "expand": inner // file.config["hidden_size"],
        "num_heads": heads,
        "head_dim": inner // heads,
        "use_bias": False,
        "use_conv_bias": True,
    }


MAMBA2: Final = GgufArchitecture(
    "mamba2",
    "mamba2",
    "Mamba2ForCausalLM",
    BACKBONE_OUTER,
    entries("norm.weight\n" + MAMBA2_TENSORS, mamba2_forms("mixer", "n_groups"), prefix=BACKBONE),
    (*_MAMBA_SETTINGS, Setting("ssm.group_count", "n_groups")),
    write=_write_mamba2,
    read=_read_mamba2,
    inert=UNUSED | {"time_step_rank"},
    attention=False,
)

ARCHITECTURES: Final = (MAMBA, FALCON_MAMBA, MAMBA2)
