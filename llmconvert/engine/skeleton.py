"""A transformers model on the ``meta`` device, whose decoder blocks are filled and emptied one at a time.

The model is built on the ``meta`` device from ``config.json`` alone; its forward is never changed. Each decoder
block is put into a :class:`BlockSlot`, the only place where a batch can be held, skipped or given another input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from llmconvert.compute.activations import InputKind, InputQuantizer
from llmconvert.compute.attention import use_attention
from llmconvert.compute.dot_products import use_dot_products
from llmconvert.compute.kv_cache import CacheQuantizer, cache_quantizers
from llmconvert.compute.precision import Products, Scratch, WideLinear, compute_dtype
from llmconvert.engine.architecture.buffers import restore_buffers
from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.architecture.expert_storage import Conversions
from llmconvert.engine.architecture.experts import find_experts
from llmconvert.engine.architecture.loading.held import as_held
from llmconvert.engine.architecture.loading.states import assign, dtype_of, own_states
from llmconvert.engine.architecture.model import build_meta_model, find_decoder, find_linears, forget_lengths
from llmconvert.engine.architecture.names import joined_tensors, map_names, stored_experts
from llmconvert.engine.architecture.reach import find_reach
from llmconvert.engine.experts import ExpertsSlot
from llmconvert.engine.sites import Site, find_outer_sites, find_sites
from llmconvert.errors import CheckpointError
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import main_dtype

__all__ = ["BlockCall", "BlockSlot", "Gate", "Skeleton"]


class Gate(Protocol):
    """Decides what happens when a batch arrives at a block."""

    def __call__(self, slot: BlockSlot, hidden: torch.Tensor, call: BlockCall) -> Any:
        """Return what the block returns: ``call(hidden)`` runs it."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """A block with everything the model passes to it besides the hidden state: masks, positions, caches."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, hidden: torch.Tensor) -> Any:
        return self.block(hidden, *self.args, **self.kwargs)

    def output(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] = MappingProxyType({})) -> torch.Tensor:
        """The hidden state that leaves the block, ``[1, length, hidden size]``.

        Args:
            hidden: the one that enters it.
            weights: stand in for the block's own parameters, by their names inside the block; they may require
                gradients.
        """
        given = (hidden, *self.args)
        result = functional_call(self.block, dict(weights), given, dict(self.kwargs)) if weights else self(hidden)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output


class BlockSlot(nn.Module):
    """Stands in a model's list of decoder blocks; passes every call through its gate to the block."""

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self.gate: Gate = self.run_block

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.gate(self, hidden, BlockCall(self.block, args, kwargs))

    @staticmethod
    def run_block(slot: BlockSlot, hidden: torch.Tensor, call: BlockCall) -> Any:
        """The gate that is always open."""
        return call(hidden)

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of their blocks in the loop over them (attention type, layer index).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class Skeleton:
    """A model on ``meta`` with its blocks in slots, and the means to fill it from a checkpoint.

    Args:
        checkpoint: where weights come from; dense (dequantize first).
        device: where blocks are put when loaded.
        dtype: of weights and activations; the checkpoint's own by default.
        products: how linears, the output head and attention multiply.

    Raises:
        UnsupportedError: the architecture is unknown to transformers, needs remote code, or has no list of decoder
            blocks that the engine can find.
        CheckpointError: tensors are missing or have shapes that the config contradicts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        products: Products = "exact",
    ) -> None:
        self.device = device
        self.dtype = dtype or main_dtype(checkpoint)
        self.architecture = Architecture.of(config := build_config(checkpoint.config))
        self.architecture.check_layers(checkpoint.infos)
        attention = "eager" if self.architecture.eager_only else "sdpa"
        self.model = build_meta_model(config, self.dtype, attention)
        forget_lengths(self.model)
        #: What of the model text reaches; the rest is never loaded.
        self.reach = find_reach(self.model, config, self.dtype, self.attention)
        #: Which parameter transformers makes of a tensor, and how.
        self.conversions = Conversions(self.model)
        self.checkpoint = checkpoint = as_held(self.conversions, checkpoint, self.reach.needs)
        self.names = map_names(self.conversions, checkpoint, self.reach.needs)
        #: Parameters that are several tensors of the checkpoint, one behind the other.
        self.joined = joined_tensors(self.conversions, checkpoint)
        #: Of the module of each layer's experts, by its name.
        self.stored_experts = stored_experts(self.conversions, checkpoint, self.names)
        whole = {f"{name}.{leaf}" for name, stored in self.stored_experts.items() for leaf in stored.whole}
        states = {name: state for name, state in self.model.state_dict().items() if name not in whole}
        self._check_shapes({name: tuple(state.shape) for name, state in states.items()})
        blocks: Any = self.model.get_submodule(self.reach.blocks)
        self.blocks: list[nn.Module] = [blocks[position] for position in self.reach.positions]
        self.slots = [BlockSlot(block, index) for index, block in enumerate(self.blocks)]
        #: Of each block, by name: where it has experts.
        self.experts = [self._take_experts(index) for index in range(len(self.blocks))]
        tied = {*self.model.all_tied_weights_keys, *self.model.all_tied_weights_keys.values()}
        found = [
            {self.prefix(index) + name: linear for name, linear in find_linears(block).items()}
            for index, block in enumerate(self.blocks)
        ]
        self.linears = [
            {name: linear for name, linear in linears.items() if f"{name}.weight" not in {*tied, *self.joined}}
            for linears in found
        ]
        #: Linears whose weights several blocks share. No reader ties packed weights, so these stay as they are.
        self.shared = tuple(name for linears in found for name in linears if f"{name}.weight" in tied)
        if products == "learned":
            use_attention(find_decoder(self.model), "trained")
        elif products != "exact" and self.dtype.itemsize == 2 and compute_dtype(device) == torch.float32:
            self._widen_products()
            use_attention(find_decoder(self.model), "float32")
        elif products == "fast" and self.dtype == torch.bfloat16 and device.type == "cpu" and use_dot_products():
            use_attention(find_decoder(self.model), "tiled")
        for position, slot in zip(self.reach.positions, self.slots, strict=True):
            blocks[position] = slot
        stored = [[self.stored_experts[name] for name in slots] for slots in self.experts]
        self.sites = find_sites(self.linears, self.names, stored)
        #: The embedding and the head, by name.
        self.outer = find_outer_sites(self.model, self.names, len(self.blocks) - 1)
        self._check_shapes({site.parameter: site.shape for site in self.sites.values() if site.kind == "expert"})
        self.input_quantizers: dict[str, InputQuantizer] = {}
        if checkpoint.quantized_cache:
            for name, cache in self.watch_caches().items():
                cache.fix(checkpoint.quantized_cache[name])
        inputs = checkpoint.quantized_inputs
        self.quantize_inputs({site.name: inputs[site.tensor] for site in self.sites.values() if site.tensor in inputs})

    @property
    def attention(self) -> str:
        """transformers' name of the way in which the decoder attends."""
        return str(find_decoder(self.model).config._attn_implementation)

    @property
    def block_count(self) -> int:
        """How many decoder blocks the model has."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """Numbers of a token between blocks: the width of the hidden state, of all streams where there are several."""
        return self.architecture.hidden_size * self.architecture.streams

    def prefix(self, index: int) -> str:
        """What the module names of a block's parameters begin with, e.g. ``model.layers.0.``."""
        return self.reach.prefix(index)

    def holds(self, name: str) -> bool:
        """Whether a module, parameter or buffer lies in one of the blocks, by its name in the model."""
        position = name.removeprefix(f"{self.reach.blocks}.").partition(".")[0]
        inside = name.startswith(f"{self.reach.blocks}.") and position.isdecimal()
        return inside and int(position) in self.reach.positions

    def inside(self, index: int, name: str) -> str:
        """What block ``index`` itself calls one of its modules or parameters."""
        return name.removeprefix(self.prefix(index))

    def submodule(self, index: int, name: str) -> nn.Module:
        """A module of block ``index`` by its full name."""
        return self.blocks[index].get_submodule(self.inside(index, name))

    def sites_of(self, index: int) -> tuple[Site, ...]:
        """The sites of block ``index``, linears in the order of its modules, then experts."""
        return tuple(site for site in self.sites.values() if site.block == index)

    def holder(self, site: Site) -> nn.Module:
        """The module that holds a site: a linear, or the experts of a layer."""
        if site.kind == "linear":
            return self.linears[site.block][site.name]
        return self.experts[site.block][site.layer]

    def quantize_inputs(self, kinds: Mapping[str, InputKind]) -> None:
        """Let linears see inputs quantized from here on, by name; where calibration fixes a scale, from then on."""
        for linears in self.linears:
            for name in linears.keys() & kinds.keys():
                self.input_quantizers[name] = InputQuantizer(linears[name], kinds[name])

    @property
    def input_counts(self) -> dict[str, InputQuantizer]:
        """What quantizes the inputs of linears, and counts what fixed scales cut off, by their stored names."""
        return {self.sites[name].stored: one for name, one in self.input_quantizers.items()}

    def watch_caches(self) -> dict[str, CacheQuantizer]:
        """What stands from here on between attention modules and their caches, by what the checkpoint calls these."""
        return cache_quantizers({self.prefix(index): block for index, block in enumerate(self.blocks)}, self.names)

    def _take_experts(self, index: int) -> dict[str, ExpertsSlot]:
        """Put slots in the place of a block's experts."""
        block, prefix = self.blocks[index], self.prefix(index)
        slots = {
            prefix + name: ExpertsSlot(module, prefix + name, layout, partial(self._read_expert, prefix + name))
            for name, module, layout in find_experts(block)
            if prefix + name in self.stored_experts
        }
        for name, slot in slots.items():
            block.set_submodule(self.inside(index, name), slot)
        return slots

    def _read_expert(self, experts: str, number: int, leaf: str) -> torch.Tensor:
        return self.stored_experts[experts].read(self.checkpoint, number, leaf, self.dtype).to(self.device)

    def _widen_products(self) -> None:
        scratch = Scratch()
        for index, linears in enumerate(self.linears):
            for name, linear in linears.items():
                if not isinstance(linear, nn.Linear):
                    continue
                linears[name] = WideLinear.like(linear, scratch)
                self.blocks[index].set_submodule(self.inside(index, name), linears[name])
        for slots in self.experts:
            for slot in slots.values():
                slot.wide = True
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            self.model.set_output_embeddings(WideLinear.like(head, scratch))

    def restore_buffers(self) -> None:
        """Compute the non-persistent buffers (rotary frequencies, embedding scales), which no checkpoint holds.

        Raises:
            UnsupportedError: the model's class leaves some as they were.
            CheckpointError: the config asks for one that is larger than the checkpoint.
        """
        restore_buffers(self.model, self.device, idle=self.reach.idle, most=self.checkpoint.nbytes)

    def load_block(self, index: int) -> None:
        """Read a block's weights from the checkpoint into fresh memory on :attr:`device`."""
        prefix = self.prefix(index)
        for name in self._block_states(index):
            assign(self.blocks[index], name, self._read(prefix + name, dtype_of(self.blocks[index], name)))

    def prefetch_block(self, index: int) -> None:
        """Have a block's weights read ahead from disk, if there is such a block."""
        if index < self.block_count:
            self.checkpoint.prefetch(self._stored_names(index))

    def drop_block(self, index: int) -> None:
        """Free a block's weights."""
        for slot in self.experts[index].values():
            slot.clear()
            slot.answers.clear()
            slot.scale = None
        for name in self._block_states(index):
            assign(self.blocks[index], name, None)

    def load_outer(self, *, head: bool) -> None:
        """Read everything outside the blocks: embeddings and final norm, and the output head if asked for."""
        embeddings = self.model.get_output_embeddings()
        skipped = {id(embeddings)} if embeddings is not None and not head else set()
        loaded: dict[str, nn.Parameter] = {}
        tied: Mapping[str, str] = self.model.all_tied_weights_keys
        for module_name, module in self.model.named_modules():
            if id(module) in skipped or not self._is_outer(module_name):
                continue
            for leaf in own_states(module, recurse=False):
                name = f"{module_name}.{leaf}" if module_name else leaf
                source = name if name in self.names or name in self.joined else tied[name]
                if source not in loaded:
                    value = self._read(source, dtype_of(module, leaf))
                    loaded[source] = nn.Parameter(value, requires_grad=False)
                assign(module, leaf, loaded[source])
        self._stand_in()

    def outer_nbytes(self, *, head: bool) -> int:
        """Bytes that :meth:`load_outer` will take."""
        embeddings = self.model.get_output_embeddings()
        names: set[str] = set()
        for module_name, module in self.model.named_modules():
            if (module is embeddings and not head) or not self._is_outer(module_name):
                continue
            for leaf in own_states(module, recurse=False):
                name = f"{module_name}.{leaf}" if module_name else leaf
                names.update(self._stored(name))
        return sum(self._numel(name) for name in names) * self.dtype.itemsize

    def block_nbytes(self, index: int) -> int:
        """Bytes of one block's weights when loaded."""
        return sum(map(self._numel, self._stored_names(index))) * self.dtype.itemsize

    def expert_nbytes(self) -> int:
        """Bytes of the largest expert when loaded, and of its parts as they are read; 0 without experts."""
        slots = [slot for slots in self.experts for slot in slots.values()]
        return 2 * max((slot.layout.numel for slot in slots), default=0) * self.dtype.itemsize

    def visit_nbytes(self, tokens: int, *, held: bool) -> int:
        """Bytes of what a layer's experts give for so many tokens; with what these bring, if no frame holds it."""
        if not any(self.experts):
            return 0
        routing = 16 * max(self.architecture.experts_per_token, 1)
        return tokens * (self.hidden_size * self.dtype.itemsize * (2 if held else 1) + (routing if held else 0))

    def product_nbytes(self, tokens: int, *, head: bool = False) -> int:
        """Bytes of float32 operands where products are made in float32, for batches of up to ``tokens``.

        Linears share them; those of an expert come and go.
        """
        linears = [linear for linears in self.linears for linear in linears.values()]
        if head:
            linears.append(self.model.get_output_embeddings())
        sizes = [linear.operand_sizes(tokens) for linear in linears if isinstance(linear, WideLinear)]
        largest: list[int] = [max(part) for part in zip(*sizes, strict=True)]
        experts = [slot.product_nbytes(tokens) for slots in self.experts for slot in slots.values()]
        return 4 * sum(largest) + max(experts, default=0)

    def _stand_in(self) -> None:
        """Give weights that text never meets a single number's memory: classes ask any of them for the device."""
        for name, module in self.model.named_modules():
            for leaf in own_states(module, recurse=False) if name in self.reach.idle else ():
                state: torch.Tensor = getattr(module, leaf)
                assign(module, leaf, torch.zeros((), dtype=state.dtype, device=self.device).expand(state.shape))

    def _is_outer(self, module: str) -> bool:
        """Whether a module lies outside the blocks and takes part in what text gives."""
        return not self.holds(module) and module not in self.reach.idle

    def _block_states(self, index: int) -> list[str]:
        """Parameters and buffers of a block that text meets, by their names inside it."""
        prefix = self.prefix(index)
        return [name for name in own_states(self.blocks[index]) if self.reach.needs(prefix + name)]

    def _stored_names(self, index: int) -> list[str]:
        """What a block's weights are called in the checkpoint."""
        own = (self._stored(self.prefix(index) + name) for name in self._block_states(index))
        return [name for names in own for name in names]

    def _stored(self, name: str) -> tuple[str, ...]:
        """The tensor of a parameter or buffer, or its parts; of one that is tied to another, that one's."""
        if name in self.joined:
            return self.joined[name]
        return (self.names[name] if name in self.names else self.names[self.model.all_tied_weights_keys[name]],)

    def _numel(self, checkpoint_name: str) -> int:
        return int(torch.Size(self.checkpoint.infos[checkpoint_name].shape).numel())

    def _read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        parts = [self.checkpoint[stored] for stored in self._stored(name)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        wanted = (dtype or self.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=wanted)

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            info = self.checkpoint.infos[self.names[name]] if name in self.names else None
            if info is not None and info.shape != shape:
                found, wanted = list(info.shape), list(shape)
                raise CheckpointError(f"tensor {info.name!r} has shape {found}, config.json says {wanted}")
