"""What becomes of a model's parts for images or sound beside the file of its decoder: a file, or a sentence why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.mmproj.file import ImagesFile, plan_images_file
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import Layout

__all__ = ["plan_beside", "with_images"]


def plan_beside(
    source: Checkpoint, names: Sequence[str], name: str, kind: str, *, single: bool
) -> tuple[ImagesFile | None, tuple[str, ...]]:
    """The plan of an ``mmproj`` file, if there can be one, and sentences on it.

    Args:
        source: the whole model.
        names: the checkpoint's tensors of such parts; none of a model that is all decoder.
        name: of the model.
        kind: of the file's matrices: ``F32``, ``F16`` or ``BF16``.
        single: whether the output is one file, with no room for another.
    """
    if not names:
        return None, ()
    left_out = f"{len(names)} tensors of parts for images or sound ({names[0]}, …) are left out: the file is of the "
    left_out += "text part"
    try:
        file = plan_images_file(source, name, kind, names)
    except (UnsupportedError, CheckpointError) as error:
        return None, (f"{left_out}, and there is no mmproj file, because {error}",)
    if single:
        return None, (f"{left_out}; name a directory as output to have them beside it, as {file.name}",)
    said = (
        f"{file.name} has the part for images ({file.projector}): llama-mtmd-cli and llama-server take it as --mmproj"
    )
    return file, (said, *file.notes)


def with_images(layout: Layout, file: ImagesFile | None) -> Layout:
    """The layout of a decoder's file, or files, and of the one beside it."""
    if file is None:
        return layout
    (shard,), specs = file.layout.shards, file.layout.specs
    return replace(
        layout,
        shards=(*layout.shards, shard),
        specs={**layout.specs, **specs},
        shard_of={**layout.shard_of, **dict.fromkeys(specs, shard)},
    )
