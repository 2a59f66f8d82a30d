"""Second moments of the inputs of experts, which few tokens reach, drawn toward those of their layer.

An expert sees only the tokens that the router sends it, which for some experts are fewer than the inputs have columns:
their Hessian says nothing of most directions, and a solver that believes it moves weights astray there. So it is drawn
toward what the other tokens of the layer say (a linear shrinkage, Ledoit and Wolf 2004): ``H' = (n H + κ H̄)/(n + κ)``,
with ``n`` tokens of the expert's own. For gate and up, whose inputs are those of the layer, ``H̄`` is of all its
tokens. The inputs of down lie in a space of the expert's own; there ``H̄`` is of what all tokens of the layer would
bring, if they were sent to this expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.discovery import Stop
from llmconvert.engine.statistics import Arrival, Hessian, HessianSum
from llmconvert.engine.stream import BlockRun

__all__ = ["PRIOR", "ExpertMoments"]

#: κ by the columns of the input. Seen on eight experts with 256 tokens each (``bench/moe.py``, over 1,022 predictions):
#: KL 0.281 with 0, 0.271 with 0.01, 0.296 with 0.25; on four other texts 0 and 0.01 gave the same within what another
#: text changes (``bench/results/2026-11-30-mixtures-epyc.md``). What no token reached has nothing but its layer's.
PRIOR = 0.01
# Down projections of experts with more tokens than this by column are not shown the others' tokens, which costs all
# tokens of the layer for every expert: from one token by column on, κ is a hundredth of what is there.
_ENOUGH = 1


class ExpertMoments:
    """Statistics of the inputs of a block's experts, to be asked for in the order of its stops.

    Args:
        run: the block.
        original: the same in the original model, for methods that aim at its outputs.
        device: where it is computed.
        prior: κ by the columns of the input; 0 leaves moments as the expert's own tokens give them.
        every: whether every expert is shown all tokens of the layer, wherever the router sends them.
        ranks: the processes, each of which has a part of the tokens.
    """

    def __init__(
        self,
        run: BlockRun,
        original: BlockRun | None,
        device: torch.device,
        prior: float = PRIOR,
        *,
        every: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._run, self._original, self._device, self._ranks = run, original, device, ranks
        self._prior = prior
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
        """Of the inputs of a stop's matrices, drawn toward those of the layer.

        Raises:
            CalibrationError: an input is not finite; or no token reached the expert, and it is not to be drawn.
        """
        name, columns = stop.linears[0], stop.columns
        self._run.experts(name).reach(self._run.site(name).expert)
        share = self._share(stop)
        if not share:
            return self._sum(name, columns, self._arrivals(stop, routed=True)).hessian()
        if share == 1:
            drawn = self._of_layer(stop)
            return Hessian(drawn.matrix.clone(), drawn.tokens, None if drawn.cross is None else drawn.cross.clone())
        found = self._sum(name, columns, self._arrivals(stop, routed=True)).hessian()
        drawn = self._of_layer(stop)
        found.matrix.lerp_(drawn.matrix, share)
        if found.cross is not None and drawn.cross is not None:
            found.cross.lerp_(drawn.cross, share)
        return found

    def magnitudes(self, stop: Stop) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the inputs of a stop's matrices the mean magnitude of each column, drawn likewise, and the largest.

        Returns:
            float32 ``[columns]`` each; what is drawn toward counts among the largest.
        """
        share = self._share(stop)
        mean = torch.zeros(stop.columns, dtype=torch.float32, device=self._device)
        largest = torch.zeros_like(mean)
        for weight, routed in ((1 - share, True), (share, False)):
            if weight:
                total, tokens = torch.zeros_like(mean, dtype=torch.float64), 0
                for here, _ in self._arrivals(stop, routed=routed):
                    if len(here.inputs):
                        sizes = here.inputs.abs()
                        total += sizes.sum(0, dtype=torch.float32)
                        largest = torch.maximum(largest, sizes.amax(0).float())
                        tokens += len(sizes)
                mean += weight * (total / max(1, tokens)).float()
        return mean, largest

    def _share(self, stop: Stop) -> float:
        """How far the expert's own statistics are drawn: 0 not at all, 1 says that nothing is left of them."""
        name, columns = stop.linears[0], stop.columns
        tokens, weight = self.tokens(name), self._prior * columns
        if self.every:
            return 1.0
        if not weight or (self._run.site(name).projection == "down_proj" and tokens > _ENOUGH * columns):
            return 0.0
        return weight / (tokens + weight)

    def _of_layer(self, stop: Stop) -> Hessian:
        """Of the inputs of all experts of a layer, which is kept, since each of them asks; of down of this one."""
        site = self._run.site(stop.linears[0])
        if site.projection == "down_proj":
            return self._sum(site.name, stop.columns, self._arrivals(stop, routed=False)).hessian()
        if self._layer is None or self._layer[0] != site.layer:
            total = self._sum(stop.linears[0], stop.columns, self._arrivals(stop, routed=False))
            self._layer = site.layer, total.hessian()
        return self._layer[1]

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
