"""What of a model can be quantized by itself, and where it lies: in the model, in the checkpoint, in an artifact.

A site is one weight matrix with a scheme of its own. Whoever plans, solves, measures or writes knows it by its name and
asks it for the rest, so that another kind of site is described here, and nowhere else is a name put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmconvert.engine.architecture.expert_storage import StoredExperts
from llmconvert.engine.architecture.experts import expert_parameter
from llmconvert.engine.experts import ExpertsSlot
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["Site", "find_outer_sites", "find_sites", "head_tensor"]

_WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Site:
    """One weight matrix ``[rows, columns]``; its output has ``rows`` numbers, its input ``columns``.

    Attributes:
        name: what schemes, overrides and stops know it by: its module in the model, ``model.layers.0.mlp.up_proj``.
        tensor: the tensor of the checkpoint that holds it, or it and other experts' matrices.
        rows: outputs.
        columns: inputs.
        block: index of the decoder block that it is in; of what lies outside them, of the last one, behind which it is
            quantized.
        kind: how the model holds it: as the weight of a linear of its own, or as a matrix of one of a layer's experts;
            outside the blocks as the output head, the embedding, or both, tied.
        expert: which of them.
        experts: where the checkpoint has those of the layer.
        transposed: whether model and checkpoint hold it ``[columns, rows]``, as GPT-2's ``Conv1D`` does.
        head: of an embedding, the module of the head that is tied to it.
    """

    name: str
    tensor: str
    rows: int
    columns: int
    block: int
    kind: Literal["linear", "expert", "head", "embedding", "tied"] = "linear"
    expert: int = 0
    experts: StoredExperts | None = field(default=None, compare=False, repr=False)
    transposed: bool = False
    head: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return self.rows, self.columns

    @property
    def weights(self) -> int:
        """How many numbers it has."""
        return self.rows * self.columns

    @property
    def layer(self) -> str:
        """The module of the layer's experts that an expert's matrix belongs to; of others, themselves."""
        return self.name if self.kind != "expert" else self.name.rsplit(".", 2)[0]

    @property
    def owner(self) -> str | None:
        """The expert that it belongs to, ``model.layers.0.mlp.experts.3``; None for others."""
        return f"{self.layer}.{self.expert}" if self.kind == "expert" else None

    @property
    def outside(self) -> str:
        """What it is outside the blocks: ``head``, ``embedding``, ``tied``; "" for others."""
        return self.kind if self.is_outer else ""

    @property
    def called(self) -> tuple[str, ...]:
        """What overrides call it: its name, and outside the blocks by the words for that, two where it is both."""
        words = {"head": ("head",), "embedding": ("embedding",), "tied": ("head", "embedding")}
        return (self.name, *words.get(self.kind, ()))

    @property
    def is_outer(self) -> bool:
        """Whether it lies outside the blocks."""
        return self.kind in ("head", "embedding", "tied")

    @property
    def projection(self) -> str:
        """Which of its expert's matrices it is."""
        return self.name.rpartition(".")[2]

    @property
    def parameter(self) -> str:
        """The parameter of the model that holds it; of an expert's, the name that stands for it."""
        return f"{self.name}.{_WEIGHT}"

    @property
    def stored(self) -> str:
        """What artifacts and reports call it: the checkpoint's name of its module, if there is one."""
        if self.experts is not None:
            return self.experts.artifact_name(self.expert, self.projection) or self.name
        return self.tensor.removesuffix(f".{_WEIGHT}")

    @property
    def stored_alone(self) -> bool:
        """Whether its tensor holds nothing else."""
        return self.experts is None or self.experts.layout.matrices[self.projection].leaf not in self.experts.whole

    @property
    def named_alone(self) -> bool:
        """Whether there is a name for it alone, in the checkpoint or where quantized models are read."""
        return self.experts is None or self.experts.artifact_name(self.expert, self.projection) is not None

    @property
    def unread(self) -> str:
        """Why transformers reads no artifact that has it quantized; "" where it does."""
        return "" if self.experts is None else self.experts.unread

    @property
    def prefix(self) -> str:
        """What the name of every tensor begins with that an artifact holds of it."""
        return f"{self.stored}."

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Its values in a checkpoint of the model's names, ``[rows, columns]``, in CPU memory of the caller's own."""
        if self.experts is not None:
            return self.experts.read_matrix(checkpoint, self.expert, self.projection)
        return checkpoint[self.tensor].T.contiguous() if self.transposed else checkpoint[self.tensor]

    def value(self, module: nn.Module) -> torch.Tensor:
        """Its values ``[rows, columns]`` in the loaded module that holds it; the model's own memory.

        Args:
            module: the linear called :attr:`name`, or the layer's experts.
        """
        if isinstance(module, ExpertsSlot):
            return module.value(self.expert, self.projection)
        assert isinstance(module, nn.Linear | Conv1D)
        return module.weight.data.T if self.transposed else module.weight.data

    def put(self, module: nn.Module, value: torch.Tensor) -> None:
        """Let the loaded module that holds it compute with other values."""
        self.value(module).copy_(value)


def find_sites(
    blocks: Sequence[Mapping[str, nn.Linear | Conv1D]],
    names: Mapping[str, str],
    experts: Sequence[Iterable[StoredExperts]] = (),
) -> dict[str, Site]:
    """The sites of a model by name, block after block.

    Args:
        blocks: the linears of each block, by their names in the model.
        names: the model's parameters → the checkpoint's tensors.
        experts: of each block.
    """
    sites: dict[str, Site] = {}
    for block, linears in enumerate(blocks):
        for name, linear in linears.items():
            tensor = names[f"{name}.{_WEIGHT}"]
            if isinstance(linear, Conv1D):
                sites[name] = Site(name, tensor, linear.nf, linear.nx, block, transposed=True)
            else:
                sites[name] = Site(name, tensor, linear.out_features, linear.in_features, block)
        for stored in experts[block] if experts else ():
            for number in range(stored.layout.count):
                for projection, matrix in stored.layout.matrices.items():
                    name = expert_parameter(stored.name, number, projection).removesuffix(f".{_WEIGHT}")
                    tensor = stored.tensor(number, projection)
                    sites[name] = Site(name, tensor, matrix.rows, matrix.columns, block, "expert", number, stored)
    return sites


def find_outer_sites(model: PreTrainedModel, names: Mapping[str, str], last: int) -> dict[str, Site]:
    """The token embedding and the output head of a model by name, if they are matrices of the checkpoint.

    A head that is tied to the embedding is in one site with it.

    Args:
        model: on any device.
        names: its parameters → the checkpoint's tensors.
        last: the last block.
    """
    found: dict[str, Site] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    heads = {name for name, module in model.named_modules() if module is head}
    tied_head = next((name for name in heads if f"{name}.{_WEIGHT}" in model.all_tied_weights_keys), "")
    for name, module in model.named_modules():
        tensor = names.get(f"{name}.{_WEIGHT}")
        if tensor is None or f"{name}.{_WEIGHT}" in model.all_tied_weights_keys:
            continue
        if module is embedding and isinstance(module, nn.Embedding):
            kind: Literal["tied", "embedding"] = "tied" if f"{name}.{_WEIGHT}" in tied else "embedding"
            rows, columns = module.num_embeddings, module.embedding_dim
            found[name] = Site(name, tensor, rows, columns, last, kind, head=tied_head if kind == "tied" else "")
        elif module is head and isinstance(module, nn.Linear):
            found[name] = Site(name, tensor, module.out_features, module.in_features, last, "head")
    return found


def head_tensor(outer: Mapping[str, Site]) -> str | None:
    """The checkpoint's tensor of the output head, the embedding's where they are tied; None without a head."""
    return next((site.tensor for site in outer.values() if site.kind in ("head", "tied")), None)
