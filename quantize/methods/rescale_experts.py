"""Scales of experts, whose weights are never in memory together: what a method that moves scales gets to see of them.

Two places take scales of an expert. What its up projection gives is multiplied with the gate's, so the columns of its
down projection can be scaled and the rows of its up projection divided; that is the expert's own affair. What comes to
the experts of a layer comes from one norm, which the router sees as well: there one scale serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from llmconvert.compute.precision import all_finite
from llmconvert.engine.discovery import Stop
from llmconvert.engine.experts import ExpertsSlot
from llmconvert.engine.sites import Site
from llmconvert.engine.stream import BlockRun
from llmconvert.errors import CheckpointError
from llmconvert.quantize.methods.base import ScaledEdge, ScalingQuantizer, Target
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.expert_moments import ExpertMoments

__all__ = ["ExpertTargets", "down_scale"]


class ExpertTargets:
    """The gate and up projections of all experts of a layer, read one expert after the other each time.

    Args:
        slot: of the layer.
        sites: of the block, in order; others than these are left out.
        schemes: by site.
        beside: linears with the same input, which come first.
    """

    def __init__(
        self, slot: ExpertsSlot, sites: Iterable[Site], schemes: Mapping[str, Scheme], beside: Sequence[Target]
    ) -> None:
        self._slot, self._schemes, self._beside = slot, schemes, beside
        own = (site for site in sites if site.kind == "expert" and site.layer == slot.name)
        self._sites = [site for site in own if site.projection != "down_proj"]

    def __iter__(self) -> Iterator[Target]:
        yield from self._beside
        for site in self._sites:
            self._slot.load(site.expert)
            yield Target(site.name, finite_value(site, self._slot), self._schemes[site.name])
        self._slot.clear()


def finite_value(site: Site, slot: ExpertsSlot) -> torch.Tensor:
    """A matrix of the expert that is loaded.

    Raises:
        CheckpointError: it has values that are not finite.
    """
    value = site.value(slot)
    if not all_finite(value):
        raise CheckpointError(f"tensor {site.name!r} has values that are not finite; the checkpoint is damaged")
    return value


def down_scale(
    run: BlockRun,
    stop: Stop,
    moments: ExpertMoments,
    schemes: Mapping[str, Scheme],
    method: ScalingQuantizer,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """What to multiply the columns of an expert's down projection by, and divide the rows of its up projection by.

    Args:
        run: of the block.
        stop: the down projection's; the experts before it have been passed, this one is as it was loaded.
        moments: of the block's experts.
        schemes: by site.
        method: chooses.
        scale_dtype: of the quantized weights.

    Returns:
        float32 ``[columns]``.

    Raises:
        CheckpointError: a weight is not finite.
        CalibrationError: activations are unusable.
    """
    site = run.site(stop.linears[0])
    experts = run.experts(site.name)
    experts.reach(site.expert)
    weight = finite_value(site, experts.slot)
    hessian = moments.hessian(stop)
    mean, largest = moments.magnitudes(stop)
    target = Target(site.name, weight, schemes[site.name])
    edge = ScaledEdge([target], torch.arange(stop.columns), hessian, mean, largest)
    return method.scales(edge, scale_dtype).float()
