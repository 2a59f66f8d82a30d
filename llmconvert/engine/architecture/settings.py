"""Settings that no model can have, found before a model is built of them.

transformers takes a RoPE factor of zero or an infinite epsilon as it comes, and computes nothing but NaN; and makes a
list with an entry for each of a billion layers. What its classes refuse themselves isn't checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmconvert.errors import CheckpointError

__all__ = ["check_counts", "check_settings"]

# Lists are as long as these are large. No model comes near.
_COUNTED = re.compile(r"(?:.*_)?(?:layers?|labels|blocks|depth|stages)")
_MOST = 10_000
# Of RoPE's parameters.
_FACTOR = re.compile(r".*_factor")
# What a division or a root needs.
_POSITIVE = re.compile(
    r"hidden_size|vocab_size|num_hidden_layers|num_attention_heads|num_key_value_heads|num_kv_heads|head_dim"
    r"|max_position_embeddings|(?:attn|final)_logit_?softcapping|logits_scaling|query_pre_attn_scalar|rope_theta|factor"
    r"|original_max_position_embeddings|beta_fast|beta_slow"
)
_NOT_NEGATIVE = re.compile(r".*_eps|eps|.*epsilon|rotary_dim|partial_rotary_factor")
_FINITE = re.compile(r".*_multiplier|.*_scale|.*_scaling|mscale.*")
_ROPE = ("rope_parameters", "rope_scaling")
# Of RoPE's numbers, those that there is one of for each frequency.
_LISTS = ("short_factor", "long_factor")


def check_counts(config: Mapping[str, Any], path: str = "") -> None:
    """Look at a parsed ``config.json`` before it is given to any class.

    Raises:
        CheckpointError: it counts more layers, labels or the like than any model has.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, f"{path}{name}.")
        elif isinstance(value, int) and value > _MOST and _COUNTED.fullmatch(name):
            raise CheckpointError(f"config.json: {path}{name} is {_short(value)}, {_MOST:,} at most were expected")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Look at a decoder's settings, those that its config's class filled in included.

    Raises:
        CheckpointError: a number that has to be positive or finite is not, or RoPE has something else in its place.
    """
    # With compressed keys and values these are the sizes of a head's parts, of which one may be left out.
    parts = ("head_dim", "qk_rope_head_dim") if settings.get("qk_nope_head_dim") else ()
    for path, name, value in _values(settings):
        if name in parts and value == 0:
            continue
        if _NOT_NEGATIVE.fullmatch(name):
            wanted, right = "a number, zero or above", _is_number(value) and math.isfinite(value) and value >= 0
        elif _POSITIVE.fullmatch(name) or (path != name and _FACTOR.fullmatch(name)):
            wanted, right = "a number above zero", _is_number(value) and math.isfinite(value) and value > 0
        elif _FINITE.fullmatch(name):
            wanted, right = "a number", _is_number(value) and math.isfinite(value)
        else:
            continue
        if not right:
            raise CheckpointError(f"config.json: {path} is {_short(value)}, expected {wanted}")


def _values(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every number of the model with its path and name, and whatever RoPE's parameters hold, one by one."""
    for name, value in settings.items():
        if name in _ROPE and isinstance(value, Mapping):
            yield from _nested(value, name)
        elif _is_number(value):
            yield name, name, value


def _nested(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, Any]]:
    for name, value in values.items():
        inside = f"{path}.{name}"
        if isinstance(value, Mapping):
            yield from _nested(value, inside)
        elif isinstance(value, list) and name in _LISTS:
            for index, part in enumerate(value):
                yield f"{inside}[{index}]", name, part
        elif value is not None:
            yield inside, name, value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    """A value as it is, or by its length where it is long."""
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:8]}… ({len(text)} {'digits' if _is_number(value) else 'characters'})"
