"""What plans that are made one after the other look up once: models' headers, texts, and models built on shapes."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch

from llmconvert.compute.precision import Products
from llmconvert.engine.skeleton import Skeleton
from llmconvert.recipes.forecast import Forecast
from llmconvert.recipes.planning.headers import Headers, open_headers
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.stage import Original, Work
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.text.tokens import TokenWindows

__all__ = ["KeptSkeletons", "SharedWork", "sharing"]

# Models on shapes that are kept: as they come, for evaluation and for quantizing, and some with fewer heads.
_KEPT = 6


class KeptSkeletons:
    """Builds models on shapes as :class:`~llmconvert.engine.skeleton.Skeleton` does, and gives those of a checkpoint
    object that it has built before; for plans alone, since a run fills its own."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[Checkpoint, Skeleton]] = {}

    def __call__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        products: Products = "exact",
    ) -> Skeleton:
        """See :class:`~llmconvert.engine.skeleton.Skeleton`."""
        asked = (id(checkpoint), device, dtype, products)
        found = self._kept.pop(asked, None)  # back to the end; the checkpoint is kept, so that no other has its id
        if found is None:
            found = checkpoint, Skeleton(checkpoint, device, dtype, products=products)
            if len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
        self._kept[asked] = found
        return found[1]


class SharedWork:
    """What several plans have in common; models stay open until its end."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._headers: dict[Hashable, Headers] = {}
        self._originals: dict[str, Original] = {}
        self._drawn: dict[Hashable, TokenWindows] = {}
        self._forecasts: dict[Hashable, Forecast] = {}
        self._skeletons = KeptSkeletons()

    def __enter__(self) -> SharedWork:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def headers(self, recipe: Recipe) -> Headers:
        """A recipe's model, opened once.

        Raises:
            LlmconvertError: see :func:`llmconvert.recipes.planning.headers.open_headers`.
        """
        asked = (recipe.model, recipe.allow_pickle, recipe.stream)
        if asked not in self._headers:
            found = open_headers(recipe)
            self._open.enter_context(found.source.checkpoint)
            self._headers[asked] = found
        return self._headers[asked]

    def join(self, work: Work) -> None:
        """Have a plan's work draw its texts, see its original and what is made of it, and build its models here.

        What a quantized source is seen as depends on what becomes of it, so each plan has its own view of one.
        """
        work.drawn, work.skeletons = self._drawn, self._skeletons
        if work.stored is None:
            work.forecasts = self._forecasts
            work.view = self._originals.setdefault(work.view.key, work.view)


def sharing(shared: SharedWork | None) -> AbstractContextManager[SharedWork]:
    """What is shared with other plans, which goes on; or what one plan has for itself, until the block's end."""
    return nullcontext(shared) if shared is not None else SharedWork()
