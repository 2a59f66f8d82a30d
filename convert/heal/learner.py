"""The student's weights in training and their optimizer, by what is trained; and what is written of them in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.heal.lora import attach, merge_adapter
from llmconvert.convert.heal.muon import Muon
from llmconvert.convert.heal.options import HealOptions
from llmconvert.convert.heal.targets import Targets
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.loop import Learner
from llmconvert.training.model import ResidentModel

__all__ = ["heal_learner", "written_tensors"]

# Where everything learns, what was never changed has less to learn than attention.
_SHARE_OF_ALL = 0.1
_SETTING = "attention.heal.learning_rate"


def heal_learner(student: ResidentModel, targets: Targets, options: HealOptions) -> Learner:
    """What is trained of ``student``, in float32.

    Attention learns by Muon, head by head, which learned more than AdamW from a given text; adapters and all that has
    no heads learn by Adam.
    """
    geometry = read_geometry(student.skeleton.checkpoint)
    if options.train == "lora":
        scale = options.alpha / options.rank
        parameters = attach(student, targets.names, options.rank, scale, options.seed)
        optimizer = Muon([], [], parameters.values(), head_dim=geometry.head_dim, lr=options.learning_rate)
        return Learner(parameters, optimizer, _keeping(parameters), _SETTING)
    parameters = student.train(targets.names)
    attention = set(targets.attention)
    outputs = {f"{projections.output}.weight" for projections in geometry.projections}
    optimizer = Muon(
        [parameter for name, parameter in parameters.items() if name in attention - outputs],
        [parameter for name, parameter in parameters.items() if name in outputs],
        [parameter for name, parameter in parameters.items() if name not in attention],
        head_dim=geometry.head_dim,
        lr=options.learning_rate,
        share=_SHARE_OF_ALL,
    )
    return Learner(parameters, optimizer, _keeping(parameters), _SETTING)


def _keeping(parameters: Mapping[str, nn.Parameter]) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: parameter.detach().clone() for name, parameter in parameters.items()}


def written_tensors(
    best: dict[str, torch.Tensor], targets: Targets, merged: Checkpoint, options: HealOptions
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the output by name, one by one, each in the dtype that ``merged`` has it in.

    Args:
        best: what was kept of the learner's parameters; goes as it is written.
    """
    for name in targets.names:
        if options.train == "lora":
            yield name, merge_adapter(merged[name], best, name, options.alpha / options.rank)
        else:
            yield name, best.pop(name).to(merged.infos[name].dtype)
