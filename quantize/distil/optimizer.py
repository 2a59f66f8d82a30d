"""The optimizer of distillation: Adam on factors of scales and on the places of codes, seen through what is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from llmconvert.quantize.distil.trained import Trained

__all__ = ["StoredAdam"]


class StoredAdam(torch.optim.Optimizer):
    """Steps of Adam that end in what a file can store.

    Args:
        trained: by name.
        lr: learning rate of scales and norms, as a share of their size.
        code_rate: learning rate of codes at the same time.
    """

    def __init__(self, trained: Mapping[str, Trained], *, lr: float, code_rate: float) -> None:
        self._trained = {one.value: one for one in trained.values()}
        self._names = dict(trained)
        super().__init__(list(self._trained), {"lr": lr})
        self._share = code_rate / lr
        for parameter, one in self._trained.items():
            self.state[parameter] = {"step": torch.zeros((), dtype=torch.int64), **one.begin()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move everything that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, one = self.state[parameter], self._trained[parameter]
                state["step"] += 1
                one.move(state, group["lr"], group["lr"] * self._share, int(state["step"]))
                one.write(state)

    def write(self) -> None:
        """Bring all values up to date with what is remembered."""
        for parameter, one in self._trained.items():
            one.write(self.state[parameter])

    def stored(self, one: Trained) -> dict[str, torch.Tensor]:
        """What would be stored of it now, in memory of its own."""
        return {name: value.clone() for name, value in one.stored(self.state[one.value]).items()}

    def keep(self) -> dict[str, torch.Tensor]:
        """What would be stored of everything now, by ``NAME/PART``."""
        return {
            f"{name}/{part}": value for name, one in self._names.items() for part, value in self.stored(one).items()
        }
