"""Scales moved around experts: nothing that is computed changes, and what chooses them sees what it is defined as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_architectures import ids
from support.tiny_mixtures import load_mixture

from llmconvert.engine.discovery import discover
from llmconvert.engine.edges import find_edges, find_mixture_edges
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode, Stream
from llmconvert.errors import CheckpointError
from llmconvert.quantize.methods.awq import Awq
from llmconvert.quantize.methods.base import ScaledEdge
from llmconvert.quantize.methods.rescale import describe_edges, rescale_block
from llmconvert.quantize.methods.rescale_experts import down_scale
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.expert_moments import ExpertMoments
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((24, 16, 24))
Mixture = Callable[..., Path]


class RandomScales(Awq):
    """Powers of two between a quarter and four where they have to be such, and a note of what was seen."""

    seen: list[tuple[ScaledEdge, list[str]]]

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def scales(self, edge: ScaledEdge, scale_dtype: torch.dtype) -> torch.Tensor:
        self.seen.append((edge, [target.name for target in edge.targets]))
        generator = torch.Generator().manual_seed(len(self.seen))
        exponent = 4 * torch.rand(len(edge.mean), generator=generator) - 2
        return 2 ** (exponent.round() if edge.binary else exponent)


@pytest.mark.parametrize("mode", ["lockstep", "replay"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3", "hunyuan_v1_moe", "lfm2_moe"])
def test_a_norm_before_experts_gives_its_scales_to_all_that_see_it(mixture: Mixture, kind: str, mode: Mode) -> None:
    """Powers of two change nothing: the logits are those of the resident model to the bit."""
    skeleton = Skeleton(SafetensorsCheckpoint(mixture(kind)), CPU)
    plans = discover(skeleton, 24)
    schemes = dict.fromkeys(skeleton.sites, Scheme(Int(8)))
    method, changed = RandomScales(), 0
    stream = Stream(skeleton, WINDOWS, plans, mode=mode, head=True)
    for run, edges in zip(stream.blocks(), find_mixture_edges(skeleton, plans), strict=True):
        index = run.plan.index
        prefix, block = skeleton.prefix(index), skeleton.blocks[index]
        scaling = rescale_block(run, block, len(WINDOWS), (), prefix, schemes, method, torch.float32, edges)
        for name in skeleton.linears[index]:
            if name in scaling:
                run.install(name, scaling.apply(name, run.weight(name)))
        changed += len(scaling.changed)
    model = load_mixture(mixture(kind))
    with torch.no_grad():
        wanted = [model(window, use_cache=False).logits for window in WINDOWS]
    assert all(map(torch.equal, stream.logits(), wanted))
    assert changed >= sum(any(slots) for slots in skeleton.experts) > 0
    stream.close()


def test_what_chooses_a_layers_scale_sees_all_tokens_and_all_experts(mixture: Mixture) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture("deepseek_v3")), CPU)
    plans = discover(skeleton, 24)
    schemes = dict.fromkeys(skeleton.sites, Scheme(Int(8)))
    method = RandomScales()
    stream = Stream(skeleton, WINDOWS, plans, mode="lockstep")
    ordinary, mixtures = find_edges(skeleton, plans), find_mixture_edges(skeleton, plans)
    for run in stream.blocks():
        if run.plan.index == 1:
            prefix, block = skeleton.prefix(1), skeleton.blocks[1]
            rescale_block(run, block, 3, ordinary[1], prefix, schemes, method, torch.float32, mixtures[1])
    stream.close()
    seen: dict[str, list[torch.Tensor]] = {"mlp.experts": [], "mlp.shared_experts.down_proj": []}
    model = load_mixture(mixture("deepseek_v3"))
    for name, inputs in seen.items():
        module = model.model.layers[1].get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2).float()))
    with torch.no_grad():
        for window in WINDOWS:
            model(window)
    # Shared experts stand behind the others in this family, whose outputs their inputs don't depend on here.
    edges = {names[0].removeprefix(prefix): edge for edge, names in method.seen}
    for first, name in (
        ("mlp.shared_experts.gate_proj", "mlp.experts"),
        ("mlp.shared_experts.down_proj", "mlp.shared_experts.down_proj"),
    ):
        rows = torch.cat(seen[name])
        hessian = edges[first].hessian
        assert hessian is not None and hessian.tokens == len(rows)
        torch.testing.assert_close(hessian.matrix, rows.T @ rows / len(rows), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(edges[first].mean, rows.abs().mean(0), rtol=1e-2, atol=1e-3)
    names = next(names for edge, names in method.seen if edge.binary)
    experts = [f"{prefix}mlp.experts.{number}.{part}_proj" for number in range(6) for part in ("gate", "up")]
    assert names == [f"{prefix}mlp.shared_experts.{part}_proj" for part in ("gate", "up")] + experts


def test_an_experts_own_scale_changes_nothing_that_it_gives(mixture: Mixture) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture("mixtral")), CPU)
    stream = Stream(skeleton, WINDOWS, discover(skeleton, 24), mode="lockstep")
    run = next(stream.blocks())
    schemes = dict.fromkeys(skeleton.sites, Scheme(Int(8)))
    method, moments = RandomScales(), ExpertMoments(run, None, CPU, every=True)
    name = "model.layers.0.mlp.experts.2"
    stop = next(stop for stop in run.plan.stops if stop.linears == (f"{name}.down_proj",))
    scale = down_scale(run, stop, moments, schemes, method, torch.float32)
    experts = run.experts(f"{name}.down_proj")
    rows = torch.cat([visit.hidden for visit in experts.visits.values()])
    inner = experts.slot.inner(rows).float()
    edge, names = method.seen[0]
    assert names == [f"{name}.down_proj"] and edge.hessian is not None and edge.hessian.tokens == len(rows)
    torch.testing.assert_close(edge.mean, inner.abs().mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(edge.largest, inner.abs().amax(0))
    before = inner @ run.weight(f"{name}.down_proj").float().T
    run.install(f"{name}.up_proj", (run.weight(f"{name}.up_proj").float() / scale[:, None]).bfloat16())
    after = experts.slot.inner(rows).float() @ (run.weight(f"{name}.down_proj").float() * scale).T
    torch.testing.assert_close(after, before, rtol=2e-2, atol=1e-2 * float(before.abs().max()))
    stream.close()


def test_a_damaged_expert_is_named(mixture: Mixture) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture("mixtral")), CPU)
    stream = Stream(skeleton, WINDOWS, discover(skeleton, 24), mode="lockstep")
    run = next(stream.blocks())
    schemes = dict.fromkeys(skeleton.sites, Scheme(Int(8)))
    stop = next(stop for stop in run.plan.stops if stop.linears == ("model.layers.0.mlp.experts.0.down_proj",))
    run.experts(stop.linears[0]).reach(0)
    run.weight(stop.linears[0])[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj.* not finite"):
        down_scale(run, stop, ExpertMoments(run, None, CPU), schemes, Awq(), torch.float32)
    stream.close()


def test_where_scales_of_experts_move_is_told(mixture: Mixture) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture("qwen2_moe")), CPU)
    plans = discover(skeleton, 24)
    words = describe_edges(skeleton, plans, find_edges(skeleton, plans), find_mixture_edges(skeleton, plans))
    assert "every expert's down_proj to its up_proj" in words
    assert "all experts' gate_proj and up_proj to post_attention_layernorm, in powers of two, with mlp.gate" in words
    # One plus a norm's weight can't be divided by a power of two exactly; and another model adds the norm's output.
    for kind in ("qwen3_next", "minimax"):
        skeleton = Skeleton(SafetensorsCheckpoint(mixture(kind)), CPU)
        assert find_mixture_edges(skeleton, discover(skeleton, 24)) == ((), ())
