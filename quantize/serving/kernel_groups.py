"""Group sizes that vLLM has kernels for on NVIDIA's GPUs: one of another size loads in few ways, or in none.

Read in vLLM 0.32: Marlin takes groups of 32, 64 and 128 (``MARLIN_SUPPORTED_GROUP_SIZES``), Machete and Conch of 128,
the Triton kernels of AWQ and of others those of Marlin, and 256. What is left is Exllama, for models in float16, and
Humming.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmconvert.quantize.scheme import Scheme

__all__ = ["KERNEL_GROUPS", "unusual_groups"]

#: Of integers with inputs of 16 bits, the largest first.
KERNEL_GROUPS = (128, 64, 32)
# It reads no others.
_WIDTHS = (4, 8)


def unusual_groups(schemes: Iterable[Scheme]) -> str:
    """What is to be known of groups in sizes that few kernels take; empty where there are none."""
    sizes = {
        scheme.group_size
        for scheme in schemes
        if scheme.group_size is not None
        and scheme.number.name == "int"
        and scheme.bits in _WIDTHS
        and scheme.activation_bits == 16
    }
    unusual = sorted(sizes - set(KERNEL_GROUPS))
    if not unusual:
        return ""
    return (
        f"groups of {' and '.join(map(str, unusual))}: vLLM's usual kernels for NVIDIA GPUs (Marlin) take 32, 64 and "
        "128, or one scale per channel; what takes others is for models in float16, or a package of its own"
    )
