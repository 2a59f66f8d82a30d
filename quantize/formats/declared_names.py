"""What a config calls the linears of a checkpoint, quantized ones and those that are left dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import TensorInfo

__all__ = ["DeclaredNames"]

_WEIGHT, _EXPERTS = ".weight", ".experts"


@dataclass(frozen=True, slots=True)
class DeclaredNames:
    """What runtimes call the linears of a checkpoint, and which of its tensors a config has to speak of.

    transformers looks for its own modules' names, vLLM and this package for those that the checkpoint has; where they
    differ, both are declared. A model may hold more than the decoder that is quantized, a vision tower for one; and a
    checkpoint may hold more than its class, layers that predict several tokens for one, which other runtimes load,
    with experts of their own in one tensor. A config that says all linears are quantized has to name every one that
    is not.

    Attributes:
        skeleton: the model, and its checkpoint.
        modules: tensor → module, of the tensors that the model loads as they are.
    """

    skeleton: Skeleton
    modules: Mapping[str, str]

    @classmethod
    def of(cls, skeleton: Skeleton) -> DeclaredNames:
        names = {tensor: parameter for parameter, tensor in skeleton.names.items()}
        return cls(skeleton, {tensor: name.removesuffix(_WEIGHT) for tensor, name in names.items()})

    def of_site(self, site: Site) -> Iterator[str]:
        """What runtimes call a linear of the decoder."""
        name = site.name if site.kind == "expert" else self.modules.get(site.tensor, site.name)
        yield name
        if site.kind != "expert" and site.stored != name:
            yield site.stored

    def kept(self, dense: Iterable[Site], quantized: Mapping[str, Scheme]) -> tuple[str, ...]:
        """All that could be taken for quantized linears and are none.

        Args:
            dense: linears of the decoder that are left so.
            quantized: the names of the others, with their schemes.
        """
        sites = list(dense)
        # Experts are no linears: all of a layer go by the name of their module.
        called = ([site.layer] if site.kind == "expert" else self.of_site(site) for site in sites)
        names = dict.fromkeys(self.skeleton.shared) | dict.fromkeys(name for found in called for name in found)
        experts = {site.tensor for site in sites if site.kind == "expert"}
        stored = {module: tensor.removesuffix(_WEIGHT) for tensor, module in self.modules.items()}
        embeddings: set[str] = set()
        for name, module in self.skeleton.model.named_modules():
            if isinstance(module, nn.Embedding):
                embeddings.add(name)
            elif isinstance(module, nn.Linear) and name not in quantized and not self.skeleton.holds(name):
                names |= dict.fromkeys((name, stored.get(name, name)))
        known = {*self.modules, *(site.tensor for site in self.skeleton.sites.values())}
        for tensor, info in self.skeleton.checkpoint.infos.items():
            if tensor not in known and (layer := _layer_of_experts(info)):
                names[layer] = None
            found = tensor.removesuffix(_WEIGHT)
            name = self.modules.get(tensor, found)
            matrix = tensor.endswith(_WEIGHT) and len(info.shape) == 2 and info.dtype.is_floating_point
            if matrix and not {name, found} & quantized.keys() and name not in embeddings and tensor not in experts:
                names |= dict.fromkeys((name, found))
        return tuple(names)


def _layer_of_experts(info: TensorInfo) -> str:
    """The module of a layer's experts that a tensor holds a part of all of; "" where it holds something else.

    Runtimes ask for each of these experts by a name of its own, ``mtp.layers.0.mlp.experts.0.up_proj`` for one.
    """
    module, _, _ = info.name.removesuffix(_WEIGHT).rpartition(".")
    return module if len(info.shape) == 3 and info.dtype.is_floating_point and module.endswith(_EXPERTS) else ""
