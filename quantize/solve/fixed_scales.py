"""What calibration fixes beside weights, by largest magnitudes: how inputs are quantized, and what lies in caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from llmconvert.compute.kv_cache import CacheQuantizer, CacheScales
from llmconvert.compute.narrowing import bounds
from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.coroutine import record_inputs
from llmconvert.engine.skeleton import BlockCall, Skeleton
from llmconvert.engine.stream import BlockRun
from llmconvert.errors import CalibrationError, UnsupportedError
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["LargestInput", "cache_scales", "largest_inputs", "lone_peaks"]

# From how many times all others a window's largest input makes a scale one that text like it would have overflown.
_LONE = 2.0


class LargestInput:
    """The largest magnitude of what batches bring to linears that share an input, if any of them wants it.

    Args:
        schemes: of the linears.
        ranks: the processes, each of which looks at a part of the batches.
    """

    def __init__(self, schemes: Iterable[Scheme], ranks: Ranks = ALONE) -> None:
        self.wanted = any(scheme.fixes_inputs for scheme in schemes)
        self._ranks = ranks
        #: Of the batch that has the largest, and of the one that has the largest but for that.
        self._peaks = (0.0, 0.0)
        self._batches = 0

    @property
    def value(self) -> float:
        """The largest magnitude so far."""
        return self._peaks[0]

    @property
    def lead(self) -> float:
        """How many times the largest of all other batches one batch has; 1 where there are no others to tell.

        So far beyond the scale its largest input would have been if calibration had not met it.
        """
        first, second = self._peaks
        return first / second if self._batches > 1 and second else 1.0

    def watch(self, inputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The same inputs, looked at as they pass."""
        for batch in inputs:
            self.look(batch)
            yield batch

    def look(self, batch: torch.Tensor) -> None:
        """Take a batch of any shape into account."""
        if self.wanted and batch.numel():
            self._batches += 1
            self._take(float(batch.abs().max()))

    def _take(self, peak: float) -> None:
        first, second = self._peaks
        self._peaks = max(first, peak), max(second, min(first, peak))

    def scale(self, name: str, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor | None:
        """What is fixed for the inputs of a linear in this scheme, as it is stored; None where nothing is.

        Args:
            name: of the linear, for errors.
            scheme: of the linear.
            dtype: of the model.

        Raises:
            UnsupportedError: the inputs are so small, or so large, that no such scale can be stored.
        """
        kind = scheme.input_kind
        if kind is None or not kind.calibrated:
            return None
        if not self._ranks.alone:
            said = self._ranks.ask([*self._peaks, self._batches])
            self._peaks, self._batches = (0.0, 0.0), sum(batches for *_, batches in said)
            for first, second, _ in said:
                self._take(first)
                self._take(second)
        found = kind.scale_for(self.value, dtype)
        _require_held(name, "inputs", self.value, found, "leave the linear dense with an override (scheme: none)")
        return found


def _require_held(name: str, what: str, largest: float, scale: torch.Tensor, instead: str) -> None:
    """Refuse a scale that came out as zero or infinite: what is divided by it would be no number."""
    if not bool((scale > 0).all() and torch.isfinite(scale).all()):
        raise UnsupportedError(
            f"{name}: its {what} reach {largest:g} on calibration text, and {bounds(scale.dtype)}, so that it has no "
            f"scale for them; take the model in bfloat16 or float32, or {instead}"
        )


def lone_peaks(leads: Mapping[str, float]) -> str:
    """What is said of static scales that one window alone has set; nothing where there are none.

    Args:
        leads: of linears with such a scale, by name (:attr:`LargestInput.lead`).
    """
    lone = {name: lead for name, lead in leads.items() if lead >= _LONE}
    if not lone:
        return ""
    worst = max(lone, key=lambda name: lone[name])
    return (
        f"static scales: in {len(lone)} of {len(leads)} linears one window alone has the largest input, at least "
        f"{_LONE:g} times that of all others ({worst}: {lone[worst]:.3g} times). Other text may go beyond "
        "such scales, and is cut off then; more windows make that rarer, validate counts it on text of its own "
        "(saturated_inputs)"
    )


def largest_inputs(
    tensors: Mapping[str, QuantizedTensor],
    parameters: Mapping[str, str],
    entries: Iterable[tuple[torch.Tensor, BlockCall]],
) -> dict[str, LargestInput]:
    """What comes to linears of a block that want to know it, with all of its new weights in place.

    Args:
        tensors: the new weights.
        parameters: linear → what the block calls the parameter that holds its weight.
        entries: what batches enter the block with.
    """
    inside = {parameters[name].removesuffix(".weight"): name for name in tensors}
    seen = {name: LargestInput([tensor.scheme]) for name, tensor in tensors.items()}
    wanted = [module for module, name in inside.items() if seen[name].wanted]
    if not wanted:
        return {}

    def look(module: str, value: torch.Tensor) -> None:
        seen[inside[module]].look(value)

    weights: dict[str, torch.Tensor] = {}
    for hidden, call in entries:
        if not weights:
            weights = {parameters[name]: tensor.dequantize(hidden.dtype) for name, tensor in tensors.items()}
        with record_inputs(call.block, wanted, look):
            call.output(hidden, weights)
    return seen


def cache_scales(
    run: BlockRun,
    caches: Mapping[str, CacheQuantizer],
    skeleton: Skeleton,
    ranks: Ranks = ALONE,
    *,
    by_head: bool = False,
) -> Iterator[tuple[str, CacheScales]]:
    """Scales of a block's caches, with all batches through its attention and the new weights in place.

    Args:
        run: of the block, whose linears have been asked for.
        caches: what looks at keys and values, by what the checkpoint calls attention modules.
        skeleton: the model.
        ranks: the processes, each of which has a part of the batches.
        by_head: whether each head has its own.

    Raises:
        CalibrationError: nothing came to a cache, or not as many heads as the config says.
        UnsupportedError: keys or values are so small that the model's dtype holds no scales for them.
    """
    tensors = [tensor for name, tensor in skeleton.names.items() if name.startswith(skeleton.prefix(run.plan.index))]
    own = {name: cache for name, cache in caches.items() if any(part.startswith(f"{name}.") for part in tensors)}
    if not all(cache.met for cache in own.values()):
        for _ in run.inputs(run.plan.stops[-1].linears[0]):
            pass
    for name, cache in own.items():
        if not ranks.alone and cache.largest is not None:
            came = ranks.exchange(cache.largest, torch.device("cpu"))
            keys, values = (torch.stack(parts).amax(0) for parts in zip(*came, strict=True))
            cache.largest = keys, values
        if not cache.met:
            raise CalibrationError(
                f"{name}: no keys and values of calibration text came to a cache; leave out kv_cache"
            )
        scales = cache.scales(skeleton.dtype, by_head=by_head)
        if by_head and len(scales.key) != skeleton.architecture.kv_heads:
            raise CalibrationError(
                f"{name}: has {len(scales.key)} key-value heads, and the config says {skeleton.architecture.kv_heads}; "
                "runtimes expect as many scales as that; take kv_cache: fp8"
            )
        assert cache.largest is not None
        for what, largest, scale in zip(("keys", "values"), cache.largest, (scales.key, scales.value), strict=True):
            _require_held(name, what, float(largest.max()), scale, "leave out kv_cache")
        yield name, scales
