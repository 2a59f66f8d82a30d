"""Second moments of the inputs of experts, which few tokens reach.

An expert sees only the tokens that the router sends it, which for some experts are fewer than the inputs have columns;
solvers draw such moments toward their diagonal (:func:`~llmconvert.quantize.solve.hessian.own_ridge`). An expert that
no token reaches gets the moments of all tokens of its layer; for down of what these would bring, if they were sent to
this expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.discovery import Stop
from llmconvert.engine.statistics import Arrival, Hessian, HessianSum
from llmconvert.engine.stream import BlockRun

__all__ = ["ExpertMoments"]


class ExpertMoments:
    """Statistics of the inputs of a block's experts, to be asked for in the order of its stops.

    Args:
        run: the block.
        original: the same in the original model, for methods that aim at its outputs.
        device: where it is computed.
        every: whether every expert is shown all tokens of the layer, wherever the router sends them.
        ranks: the processes, each of which has a part of the tokens.
    """

    def __init__(
        self,
        run: BlockRun,
        original: BlockRun | None,
        device: torch.device,
        *,
        every: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._run, self._original, self._device, self._ranks = run, original, device, ranks
        self.every = every
        self._layer: tuple[str, Hessian] | None = None
        self._counts: dict[str, Sequence[int]] = {}

    def tokens(self, name: str) -> int:
        """How many tokens the router sends to the expert that a site belongs to."""
        site = self._run.site(name)
        if site.layer not in self._counts:
            counts = self._ranks.ask(list(self._run.experts(name).tokens()))
            self._counts[site.layer] = [sum(each) for each in zip(*counts, strict=True)]
        return self._counts[site.layer][site.expert]

    def hessian(self, stop: Stop) -> Hessian:
        """Of the inputs of a stop's matrices.

        Raises:
            CalibrationError: an input is not finite.
        """
        name, columns = stop.linears[0], stop.columns
        self._run.experts(name).reach(self._run.site(name).expert)
        if self._by_layer(name):
            return self._of_layer(stop)
        return self._sum(name, columns, self._arrivals(stop, routed=True)).hessian()

    def magnitudes(self, stop: Stop) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the inputs of a stop's matrices the mean magnitude of each column, and the largest.

        Returns:
            float32 ``[columns]`` each; of all tokens of the layer, where these stand for the expert's own.
        """
        total = torch.zeros(stop.columns, dtype=torch.float64, device=self._device)
        largest = torch.zeros(stop.columns, dtype=torch.float32, device=self._device)
        tokens = 0
        for here, _ in self._arrivals(stop, routed=not self._by_layer(stop.linears[0])):
            if len(here.inputs):
                sizes = here.inputs.abs()
                total += sizes.sum(0, dtype=torch.float32)
                largest = torch.maximum(largest, sizes.amax(0).float())
                tokens += len(sizes)
        return (total / max(1, tokens)).float(), largest

    def _by_layer(self, name: str) -> bool:
        """Whether all tokens of the layer stand for those of the expert that a site belongs to."""
        return self.every or not self.tokens(name)

    def _of_layer(self, stop: Stop) -> Hessian:
        """Of the inputs of all experts of a layer, copied of what is kept, since each asks; of down of this one."""
        site = self._run.site(stop.linears[0])
        if site.projection == "down_proj":
            return self._sum(site.name, stop.columns, self._arrivals(stop, routed=False)).hessian()
        if self._layer is None or self._layer[0] != site.layer:
            total = self._sum(stop.linears[0], stop.columns, self._arrivals(stop, routed=False))
            self._layer = site.layer, total.hessian()
        kept = self._layer[1]
        return Hessian(kept.matrix.clone(), kept.tokens, None if kept.cross is None else kept.cross.clone())

    def _arrivals(self, stop: Stop, *, routed: bool) -> Iterable[tuple[Arrival, Arrival | None]]:
        here = self._run.arrivals(stop, everywhere=not routed)
        there: Iterable[Arrival | None] = repeat(None)
        if self._original is not None:
            there = self._original.arrivals(stop, like=self._run, everywhere=not routed)
        return zip(here, there, strict=False)

    def _sum(self, name: str, columns: int, arrivals: Iterable[tuple[Arrival, Arrival | None]]) -> HessianSum:
        total = HessianSum(name, columns, self._device, original=self._original is not None, ranks=self._ranks)
        for here, there in arrivals:
            if len(here.inputs):
                total.add(here, there)
        return total
