"""RoPE settings, both ways between GGUF metadata and transformers' ``rope_parameters``.

Llama 3's frequency scaling is not in the metadata: llama.cpp stores what it works out to, one divisor per frequency,
as the tensor ``rope_freqs.weight``. The parameters are recovered from it (:func:`llama3_parameters`) and proven by
computing the divisors from them again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.header import Metadata, shown

__all__ = [
    "export_rope_tensors",
    "head_dim_of",
    "latent_rope_metadata",
    "llama3_divisors",
    "llama3_parameters",
    "rope_metadata",
    "rope_parameters",
    "rope_settings",
    "shortest",
]

# Divisors are stored in float32; the original's were computed in it too.
_TOLERANCE = 1e-5
# Meta's own values of Llama 3.1 to 3.3. Only the ratios of the three matter, so they also serve as the scale.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
# Of YaRN, in either's words, with the defaults of both.
_LOG_MULTIPLIER = "yarn_log_multiplier"
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def shortest(value: float) -> float:
    """The decimal number a float32 came from: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_parameters(metadata: Metadata, arch: str, *, latent: bool = False) -> dict[str, Any]:
    """``rope_parameters`` as the metadata gives them: plain, linear or YaRN.

    Args:
        metadata: of the file.
        arch: of it.
        latent: whether it is of DeepSeek's attention, of which YaRN has a temperature of its own
            (:func:`latent_rope_metadata`).

    Raises:
        UnsupportedError: another scaling type.
        CheckpointError: a value is missing or makes no sense.
    """
    theta = shortest(metadata.number(f"{arch}.rope.freq_base", 10000.0))
    if theta <= 0:
        raise CheckpointError(f"{metadata.path}: {arch}.rope.freq_base is {theta}, expected a positive number")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    # Files from before the scaling type was stored have only the factor of a linear scaling.
    linear = shortest(metadata.number(f"{arch}.rope.scale_linear", 1.0))
    kind = metadata.text(f"{arch}.rope.scaling.type", "linear" if linear != 1.0 else "none")
    factor = shortest(metadata.number(f"{arch}.rope.scaling.factor", linear))
    # llama.cpp takes a factor of 0 for "not set"; phi3 stores its scaling as tensors and its type as longrope.
    if kind in ("none", "longrope") or factor in (0.0, 1.0):
        return parameters
    if factor < 0:
        raise CheckpointError(f"{metadata.path}: {arch}.rope.scaling.factor is {factor}, expected a positive number")
    if kind == "linear":
        return parameters | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        temperature = _read_temperature(metadata, f"{arch}.rope.scaling.{_LOG_MULTIPLIER}") if latent else {}
        return parameters | _yarn(metadata, f"{arch}.rope.scaling", factor, temperature)
    raise UnsupportedError(
        f"{metadata.path}: {arch}.rope.scaling.type is {shown(kind)}; supported are none, linear and yarn"
    )


def _read_temperature(metadata: Metadata, key: str) -> dict[str, float]:
    scale = shortest(10 * metadata.number(key, 0.0))
    if not scale:
        raise UnsupportedError(f"{metadata.path}: {key} is not set; DeepSeek's YaRN without it is not supported")
    return {"mscale": scale, "mscale_all_dim": scale}


def _yarn(metadata: Metadata, prefix: str, factor: float, temperature: Mapping[str, float]) -> dict[str, Any]:
    for key in ("yarn_ext_factor", "yarn_attn_factor", *(() if temperature else (_LOG_MULTIPLIER,))):
        if f"{prefix}.{key}" in metadata:
            raise UnsupportedError(f"{metadata.path}: {prefix}.{key} is set; YaRN is supported with its defaults only")
    original = metadata.integer(f"{prefix}.original_context_length")
    if original < 1:
        raise CheckpointError(f"{metadata.path}: {prefix}.original_context_length is {original}, expected at least 1")
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        **temperature,
    }
    if (scale := shortest(metadata.number(f"{prefix}.attn_factor", 1.0))) != 1.0:
        # llama.cpp multiplies it with YaRN's own temperature, transformers takes it instead.
        yarn["attention_factor"] = scale * _temperature(factor)
    for key in _BETAS:
        if f"{prefix}.yarn_{key}" in metadata:
            yarn[key] = shortest(metadata.number(f"{prefix}.yarn_{key}"))
    return yarn


def _temperature(factor: float) -> float:
    """What YaRN itself multiplies attention logits' scale with."""
    return 1.0 + 0.1 * math.log(factor)


def rope_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``rope_parameters`` of a completed config, with a ``rope_type``."""
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    return {"rope_type": "default", **rope}


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Dimensions of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_metadata(config: Mapping[str, Any], arch: str, scalings: Collection[str]) -> dict[str, Any]:
    """The metadata's keys on the scaling of positions, without the architecture's name before them.

    Args:
        config: with transformers' defaults filled in.
        arch: the GGUF architecture, for errors.
        scalings: kinds that its class in llama.cpp knows.

    Raises:
        UnsupportedError: a kind of scaling that llama.cpp's class of this architecture does not know.
    """
    rope = rope_settings(config)
    kind = rope["rope_type"]
    if kind == "default":
        original = config.get("original_max_position_embeddings") if "longrope" in scalings else None
        return {"rope.scaling.original_context_length": original} if original else {}
    if kind == "llama3" and kind in scalings:
        return {}
    if kind == "linear" and kind in scalings:
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    given = {key for key, value in rope.items() if value is not None}
    unknown = {"mscale", "mscale_all_dim", "truncate"} & given
    # A ramp whose ends are no whole dimensions; llama.cpp rounds them, which is said.
    unknown -= {"truncate"} if "open yarn" in scalings else set()
    if kind == "yarn" and kind in scalings and not unknown:
        return _yarn_metadata(rope)
    if kind == "longrope" and kind in scalings:
        original = config["original_max_position_embeddings"]
        stretch = config["max_position_embeddings"] / original
        attention = rope.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(attention),
        }
    raise UnsupportedError(f"config.json: RoPE scaling {kind!r} cannot be written for GGUF architecture {arch!r}")


def latent_rope_metadata(config: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """:func:`rope_metadata` of DeepSeek's attention, whose YaRN scales all of the logits by a temperature.

    llama.cpp's file has a tenth of ``mscale_all_dim``, as its converter writes it, and takes ``mscale``, which turned
    dimensions are scaled by over it, for the same.

    Raises:
        UnsupportedError: another kind of scaling, or a temperature that llama.cpp computes otherwise.
    """
    rope = dict(rope_settings(config))
    if rope["rope_type"] != "yarn":
        return rope_metadata(config, arch, ())
    own, every = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if not every or own != every or rope.get("attention_factor") is not None:
        raise UnsupportedError(
            f"config.json: YaRN's mscale is {own}, mscale_all_dim {every}, attention_factor "
            f"{rope.get('attention_factor')}; llama.cpp's {arch} takes the first two for equal, and none of the third"
        )
    found = rope_metadata({**config, "rope_parameters": rope}, arch, ("yarn",))
    return {**found, f"rope.scaling.{_LOG_MULTIPLIER}": 0.1 * float(every)}


def _yarn_metadata(rope: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
    if rope.get("attention_factor") is not None:
        # llama.cpp multiplies it with YaRN's own temperature, transformers takes it instead.
        values["rope.scaling.attn_factor"] = rope["attention_factor"] / _temperature(rope["factor"])
    for key, default in _BETAS.items():
        if rope.get(key) is not None and float(rope[key]) != default:
            raise UnsupportedError(
                f"config.json: YaRN's {key} is {rope[key]}; llama.cpp computes with {default:g} whatever a file says"
            )
    return values


def export_rope_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What llama.cpp keeps of RoPE scalings as tensors: Llama 3's divisors, Phi-3's long and short factors."""
    rope = rope_settings(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_divisors(dict(rope), head_dim_of(config)).astype(np.float32)}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


def llama3_divisors(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """What Llama 3's scaling divides each of the ``head_dim / 2`` frequencies by, in float64.

    The ramp between unscaled high and fully scaled low frequencies is linear in the wavelength's inverse
    (``transformers.modeling_rope_utils``, rope type ``llama3``).
    """
    exponents = np.arange(0, head_dim, 2) / head_dim
    turns = parameters["original_max_position_embeddings"] * parameters["rope_theta"] ** -exponents / (2 * math.pi)
    low, high, factor = parameters["low_freq_factor"], parameters["high_freq_factor"], parameters["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: np.ndarray = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors


def llama3_parameters(divisors: np.ndarray, plain: dict[str, Any], head_dim: int, what: str) -> dict[str, Any]:
    """Recover ``rope_parameters`` of type ``llama3`` from the divisors a file stores.

    Args:
        divisors: ``[head_dim / 2]``, the tensor ``rope_freqs.weight``.
        plain: the parameters without scaling (for ``rope_theta``).
        head_dim: rotary width of a head.
        what: names the tensor in errors.

    Raises:
        UnsupportedError: no ``llama3`` scaling gives these divisors.
    """
    divisors = divisors.astype(np.float64)
    if divisors.shape != (head_dim // 2,):
        raise CheckpointError(f"{what}: has shape {list(divisors.shape)}, expected [{head_dim // 2}]")
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise CheckpointError(f"{what}: holds a frequency divisor that is no positive number; the file is corrupt")
    if np.allclose(divisors, 1.0, rtol=_TOLERANCE, atol=0):
        return plain
    factor = shortest(float(divisors.max()))
    meta = plain | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    for candidate in (meta, _fitted(divisors, meta, head_dim)):
        if candidate and np.allclose(llama3_divisors(candidate, head_dim), divisors, rtol=_TOLERANCE, atol=0):
            return candidate
    raise UnsupportedError(
        f"{what}: holds frequency divisors from {divisors.min():g} to {divisors.max():g} that Llama 3's scaling "
        "does not produce; this RoPE variant is not supported"
    )


def _fitted(divisors: np.ndarray, meta: dict[str, Any], head_dim: int) -> dict[str, Any] | None:
    """Parameters whose ramp goes through the divisors: ``smooth`` is a line over the frequencies, cut off at 0 and 1.

    The least divided frequency may be on the ramp and so may the most divided: the line is the same for every factor
    that the largest divisor is taken for. Few frequencies on it leave room, which any line that passes the others on
    their right sides may use.
    """
    factor = meta["factor"]
    if factor <= 1.0:
        return None
    frequencies = meta["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    if not np.isfinite(frequencies).all():
        return None
    smooth = (1.0 / divisors - 1.0 / factor) / (1.0 - 1.0 / factor)
    plain, scaled = smooth > 1.0 - _TOLERANCE, smooth < _TOLERANCE
    ramp = ~plain & ~scaled
    if ramp.sum() >= 2:
        slope, intercept = np.polyfit(frequencies[ramp], smooth[ramp], 1)
    else:
        slope, intercept = _steep_line(frequencies, smooth, plain, scaled)
    # A base of RoPE that makes no sense makes no line either; comparisons with NaN are false.
    if not (0 < slope < math.inf and -math.inf < intercept < 0 and math.isfinite(slope / intercept)):
        return None
    # smooth = (context × frequency − low) / (high − low): the context is a whole number, the others make up for it.
    context = max(1, round(-slope / intercept))
    span = context / slope
    low = -intercept * span
    return meta | {
        "low_freq_factor": low,
        "high_freq_factor": low + span,
        "original_max_position_embeddings": context,
    }


def _steep_line(
    frequencies: np.ndarray, smooth: np.ndarray, plain: np.ndarray, scaled: np.ndarray
) -> tuple[float, float]:
    """Slope and intercept of a line that is above 1 at the plain, below 0 at the scaled frequencies, and through the
    one between them, if there is one."""
    lowest_plain = frequencies[plain].min() if plain.any() else 2 * frequencies.max()
    highest_scaled = frequencies[scaled].max()
    between = ~plain & ~scaled
    if between.any():
        at, value = frequencies[between][0], smooth[between][0]
    else:
        at, value = math.sqrt(lowest_plain * highest_scaled), 0.5
    slope = 1.1 * max((1.0 - value) / (lowest_plain - at), value / (at - highest_scaled))
    return float(slope), float(value - slope * at)
