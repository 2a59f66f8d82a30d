"""Reading GPTQ v1 checkpoints as dense ones: written for this benchmark from the layout alone, apart from our package.

A linear of ``n`` inputs and ``r`` outputs is stored as ``qweight`` int32 ``[n · bits / 32, r]`` (codes unsigned, packed
along the inputs, lowest bits first), ``scales`` ``[groups, r]``, ``qzeros`` int32 ``[groups, r · bits / 32]`` (packed
along the outputs) and ``g_idx`` int32 ``[n]``, the group of every input. Zero points are stored minus one, modulo
``2 ** bits``. The weight is ``(code - zero) · scale``, transposed. Widths of 2, 4 and 8 bits.
"""

from __future__ import annotations

import numpy as np
import torch

from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, TensorInfo

__all__ = ["GptqView"]

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqView(CheckpointView):
    """A GPTQ v1 checkpoint with dense weights of the given dtype in place of its packed ones."""

    def __init__(self, base: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(base)
        declared = base.config["quantization_config"]
        if declared["quant_method"] != "gptq" or declared.get("checkpoint_format", "gptq") != "gptq":
            raise SystemExit(f"not a GPTQ v1 checkpoint: {declared}")
        self._bits = int(declared["bits"])
        if self._bits not in (2, 4, 8):
            raise SystemExit(f"GPTQ checkpoint of {self._bits} bits; 2, 4 and 8 can be read")
        self.config = {key: value for key, value in base.config.items() if key != "quantization_config"}
        infos: dict[str, TensorInfo] = {}
        for name, info in base.infos.items():
            linear, _, part = name.rpartition(".")
            if part == "qweight":
                columns, rows = info.shape[0] * 32 // self._bits, info.shape[1]
                infos[f"{linear}.weight"] = TensorInfo(f"{linear}.weight", dtype, (rows, columns), info.shard)
            elif part not in _PARTS:
                infos[name] = info
        self.infos = infos

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if f"{linear}.qweight" not in self.base:
            return super().read_rows(name, start, stop)
        codes = self._unpack(self.base[f"{linear}.qweight"].T)
        zeros = (self._unpack(self.base[f"{linear}.qzeros"]).T + 1) % (1 << self._bits)
        scales = self.base[f"{linear}.scales"].float().T.numpy()
        group = self.base[f"{linear}.g_idx"].numpy()
        weight = (codes - zeros[:, group]).astype(np.float32) * scales[:, group]
        return torch.from_numpy(weight[start:stop]).to(self.infos[name].dtype)

    def _unpack(self, words: torch.Tensor) -> np.ndarray:
        """Unsigned codes of int32 words, lowest bits first, along the last dimension; int32."""
        lanes = np.arange(0, 32, self._bits, dtype=np.uint32)
        spread = words.numpy().view(np.uint32) if words.is_contiguous() else words.contiguous().numpy().view(np.uint32)
        codes = (spread[..., None] >> lanes) & np.uint32((1 << self._bits) - 1)
        return codes.reshape(words.shape[0], -1).astype(np.int32)
