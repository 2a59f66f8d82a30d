"""AutoGPTQ's QuantLinear on stored linears: the product with given inputs, in its torch code for CPUs.

    python run_autogptq.py LINEARS.npz OUT.npz

with ``inputs`` and, for each linear, ``NAME/qweight``, ``NAME/qzeros``, ``NAME/scales``, ``NAME/g_idx`` and
``NAME/bits``.
"""

import sys

import numpy as np
import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

stored = np.load(sys.argv[1])
inputs = torch.from_numpy(stored["inputs"])
products = {}
for name in sorted({key.split("/")[0] for key in stored.files if "/" in key}):
    parts = {part: torch.from_numpy(stored[f"{name}/{part}"]) for part in ("qweight", "qzeros", "scales", "g_idx")}
    columns, (groups, rows) = parts["g_idx"].shape[0], parts["scales"].shape
    linear = QuantLinear(int(stored[f"{name}/bits"]), columns // groups, columns, rows, False)
    # Its products are of one dtype: float32 scales, with values that float16 holds.
    linear.load_state_dict({**parts, "scales": parts["scales"]})
    linear.scales = linear.scales.float()
    products[name] = linear(inputs).numpy()
np.savez(sys.argv[2], **products)
