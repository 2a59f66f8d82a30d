"""Over how many devices a model can be split: heads, widths, groups, and the group size that doesn't spoil it."""

from __future__ import annotations

from typing import Any

import pytest

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.serving.kernel_groups import unusual_groups
from llmconvert.quantize.serving.tensor_parallel import Matrix, TensorParallel, tensor_parallel


def split(scheme: str | None = None, *, heads: int = 32, shared: int = 8, inner: int = 8960) -> TensorParallel:
    """A Llama of these sizes: every linear in that scheme."""
    width = 64 * heads
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": width, "intermediate_size": inner}
    config |= {"num_attention_heads": heads, "num_key_value_heads": shared, "num_hidden_layers": 1, "vocab_size": 100}
    chosen = Scheme.parse(scheme) if scheme is not None else None
    named = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (64 * shared, width)}
    named |= {"self_attn.o_proj": (width, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    matrices = [Matrix(f"model.layers.0.{name}", *shape, chosen) for name, shape in named.items()]
    return tensor_parallel(Architecture.of(config), matrices)


@pytest.mark.parametrize(
    ("scheme", "sizes", "group"),
    [
        (None, (2, 4, 8), None),
        ("w4a16-channel", (2, 4, 8), None),
        ("w4a16-g128", (2,), 32),  # 8,960 / 4 = 17.5 groups
        ("w4a16-g64", (2, 4), 32),
        ("w4a16-g32", (2, 4, 8), None),
    ],
)
def test_groups_must_come_out_whole(scheme: str | None, sizes: tuple[int, ...], group: int | None) -> None:
    found = split(scheme)
    assert (found.sizes, found.group) == (sizes, group)
    assert ("2,240 columns of down_proj" in str(found)) == (scheme == "w4a16-g128")
    assert bool(found.warning) == (group is not None)


def test_heads_and_widths_must_come_out_whole() -> None:
    assert split(heads=9, shared=3).sizes == ()
    assert split(shared=2).sizes == (2, 4, 8), "key-value heads are given to several devices"
    assert split(heads=24, shared=6).reasons == {4: "6 key-value heads", 8: "6 key-value heads"}
    wide = split("w4a16-g128", inner=8964)
    assert wide.reasons[8] == "up_proj is 8,964 wide"


def test_no_group_size_is_named_that_would_not_help() -> None:
    assert split("w4a16-g64", inner=8 * 1000).group is None  # 1,000 columns on each of 8 devices
    assert split("w4a16-g64", inner=8 * 16 * 63).group is None  # groups of 16 would, and no usual kernel takes them
    assert split("mxfp4", inner=8 * 16 * 63).group is None  # nor have MX's groups another size


def test_groups_that_few_kernels_take_are_told() -> None:
    schemes = [Scheme.parse(name) for name in ("w4a16-g16", "w8a16-g256", "w4a16-g64", "nvfp4", "w4a16-channel")]
    assert unusual_groups(schemes).startswith("groups of 16 and 256: vLLM's usual kernels")
    assert not unusual_groups(schemes[2:])


@pytest.mark.parametrize(
    ("heads", "shared", "inner", "sizes", "reason"),
    [
        (32, 8, 8192, (2, 4), "a share of 64 rows of k_proj is no whole number of blocks of 128"),
        (32, 16, 8192, (2, 4, 8), ""),
        (32, 2, 8192, (), "a share of 64 rows of k_proj"),
        (32, 16, 8960, (2,), "a share of 2,240 columns of down_proj is no whole number of groups of 128"),
    ],
)
def test_blocks_that_rows_share_must_come_out_whole(
    heads: int, shared: int, inner: int, sizes: tuple[int, ...], reason: str
) -> None:
    found = split("fp8-block", heads=heads, shared=shared, inner=inner)
    assert found.sizes == sizes and reason in str(found)
    assert found.group is None
