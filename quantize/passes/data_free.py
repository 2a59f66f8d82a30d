"""The loop over blocks without text: linears are read and rounded one at a time, or one by each process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.phases import Phases
from llmconvert.quantize.methods.base import Method, Quantizer, Solution, Target
from llmconvert.quantize.methods.ranks.together import exchange_solutions
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.quantize.solve.shared_scales import largest_magnitude
from llmconvert.quantize.steps import Outcome, Step

__all__ = ["DataFreeSteps"]


@dataclass(frozen=True, slots=True)
class DataFreeSteps:
    """Linears are read without a forward pass; see :class:`llmconvert.quantize.steps.Steps`."""

    skeleton: Skeleton
    method: Method
    plan: QuantizationPlan
    scale_dtype: torch.dtype
    phases: Phases
    ranks: Ranks = ALONE

    def lost(self, work: Path, done: int) -> bool:
        return False

    def run(self, work: Path, done: int) -> Iterator[Step[Outcome]]:
        for index in range(done, self.skeleton.block_count):
            yield Step(index, partial(self._solve, index), _nothing)

    def _solve(self, index: int) -> Iterator[tuple[str, Solution]]:
        if not self.plan.schemes:
            return
        own = [site for site in self.plan.sites.values() if site.block == index and site.name in self.plan.schemes]
        reaches: dict[tuple[str, ...], float] = {}
        for start in range(0, len(own), self.ranks.count):
            sites = own[start : start + self.ranks.count]
            solved = [
                (rank, self._solution(site, reaches)) for rank, site in enumerate(sites) if rank == self.ranks.rank
            ]
            if not self.ranks.alone:
                schemes = [self.plan.schemes[site.name] for site in sites]
                with self.phases.measure("exchanging"):
                    found = exchange_solutions(solved, schemes, self.skeleton.device, self.ranks)
                solved = [(rank, solution) for rank, (solution,) in sorted(found.items())]
            for number, solution in solved:
                yield sites[number].name, solution
            del solved, solution

    def _solution(self, site: Site, reaches: dict[tuple[str, ...], float]) -> Solution:
        assert isinstance(self.method, Quantizer)
        with self.phases.measure("reading"):
            reach = self._reach(self.plan.sharing.get(site.name, ()), reaches)
            weight = site.read(self.skeleton.checkpoint)
        targets = [Target(site.name, weight.to(self.skeleton.device), self.plan.schemes[site.name], reach)]
        with self.phases.measure("solving"):
            return self.method.quantize(targets, None, self.scale_dtype)[site.name]

    def _reach(self, names: tuple[str, ...], known: dict[tuple[str, ...], float]) -> float:
        """Of linears with a float32 scale in common, which are read once more for it, one by one."""
        if names and names not in known:
            sites = self.plan.sites
            read = ((name, sites[name].read(self.skeleton.checkpoint).to(self.skeleton.device)) for name in names)
            known[names] = largest_magnitude(read)
        return known.get(names, 0.0)


def _nothing() -> None:
    """There are no activations to make last."""
