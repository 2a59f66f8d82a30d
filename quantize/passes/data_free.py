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
        for start in range(0, len(own), self.ranks.count):
            sites = own[start : start + self.ranks.count]
            solved = [(rank, self._solution(site)) for rank, site in enumerate(sites) if rank == self.ranks.rank]
            if not self.ranks.alone:
                schemes = [self.plan.schemes[site.name] for site in sites]
                with self.phases.measure("exchanging"):
                    found = exchange_solutions(solved, schemes, self.skeleton.device, self.ranks)
                solved = [(rank, solution) for rank, (solution,) in sorted(found.items())]
            for number, solution in solved:
                yield sites[number].name, solution
            del solved, solution

    def _solution(self, site: Site) -> Solution:
        assert isinstance(self.method, Quantizer)
        with self.phases.measure("reading"):
            weight = site.read(self.skeleton.checkpoint)
        targets = [Target(site.name, weight.to(self.skeleton.device), self.plan.schemes[site.name])]
        with self.phases.measure("solving"):
            return self.method.quantize(targets, None, self.scale_dtype)[site.name]


def _nothing() -> None:
    """There are no activations to make last."""
