"""Damaged artifacts of every format are read, or refused in one line: never a traceback, never a hang."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized import random_tensor, write_quantized

from llmconvert.errors import LlmconvertError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import NestedScales, QuantizedTensor

FORMATS = [
    ("w4a16-g32-asym", "compressed-tensors"),
    ("w8a8", "compressed-tensors"),
    ("fp8", "compressed-tensors"),
    ("w3a16-g32-asym", "gptq"),
    ("w4a16-g32-asym", "awq"),
    ("nf4-dq", "bitsandbytes"),
    ("w8a8", "bitsandbytes"),
]
VALUES: list[Any] = [None, True, 0, -1, 3, 1e308, "x", "", [], [1], {}, {"a": 1}, 1 << 40, "re:(", ["re:("], "group"]
DTYPES = (torch.int32, torch.int8, torch.uint8, torch.float16, torch.float8_e4m3fn, torch.bool)


def artifact(scheme: str, format: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    layout, parsed = load_format(format), Scheme.parse(scheme)
    if parsed.nested:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (64, 64), generator=generator).to(torch.int8)
        nested = NestedScales.quantize(torch.rand((64, 1), generator=generator))
        tensor = QuantizedTensor(codes, nested.dequantize().view(64, 1), None, parsed, nested)
    else:
        tensor = random_tensor(parsed, 64, 64)
    return layout.pack("a.b", tensor), layout.quantization_config({"a.b": parsed}, ["lm_head"])


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a config."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damage(chance: random.Random, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """One thing is changed, taken away or added."""
    if chance.random() < 0.5:
        *outer, last = chance.choice(list(places(config)))
        owner: Any = config
        for key in outer:
            owner = owner[key]
        if isinstance(owner, dict) and chance.random() < 0.2:
            del owner[last]
        else:
            owner[last] = chance.choice(VALUES)
        return
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    kind = chance.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = torch.zeros(
            [chance.choice((0, 1, 2, 64)) for _ in range(chance.randrange(4))], dtype=value.dtype
        )
    elif kind == 2:
        tensors[name] = torch.zeros(value.shape).to(chance.choice(DTYPES))
    elif kind == 3:
        tensors[name] = value.reshape(-1)[: chance.randrange(value.numel() + 1)].clone()
    elif kind == 4:
        raw = torch.randint(0, 256, (value.numel() * value.element_size(),), dtype=torch.uint8)
        tensors[name] = raw.view(value.dtype).reshape(value.shape)
    else:
        tensors[name + "2"] = value.clone()


@pytest.mark.parametrize(("scheme", "format"), FORMATS)
def test_damage_is_refused_by_name(tmp_path: Path, scheme: str, format: str) -> None:
    outcomes = {"read": 0, "refused": 0}
    for seed in range(100):
        torch.manual_seed(seed)
        chance = random.Random(f"{scheme} {format} {seed}")
        tensors, config = artifact(scheme, format)
        config = json.loads(json.dumps(config))
        for _ in range(chance.choice((1, 1, 2))):
            damage(chance, tensors, config)
        try:
            view = open_dense(write_quantized(tmp_path / str(seed), tensors, config))
            for name in view:
                view[name]
        except LlmconvertError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert min(outcomes.values()) > 5, outcomes
