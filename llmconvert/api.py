"""The commands as Python functions: convert, quantize, validate and push a model, each with the command's options.

The command line parses, calls these and prints. What they were asked for becomes a recipe, so names, defaults and
refusals are those of recipe files; whole runs are :func:`llmconvert.run_recipe` and :func:`llmconvert.run_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmconvert.interrupt import interruptible
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.options import convert_recipe, quantize_recipe, validate_recipe

if TYPE_CHECKING:  # what computes is loaded once it is clear that what was asked for can be meant
    from llmconvert.compute.ranks.group import Ranks
    from llmconvert.report.report import Report
    from llmconvert.report.steps import AttentionReport, DistilReport, DtypeReport, HealReport, QuantizeReport
    from llmconvert.validate.measurement import Measurement

__all__ = [
    "ConvertedModel",
    "QuantizedModel",
    "convert_model",
    "push_model",
    "quantize_model",
    "validate_model",
]

Dtype = Literal["bfloat16", "float16", "float32"]
Order = Literal["shuffled", "sequential"]
#: A share of something: ``0.05``, or ``"5%"``.
Share = float | str
#: A text, or names of several and what share of the windows comes from each.
Calibration = str | Path | Mapping[str, Share]
#: Bytes: a number, or one with a unit, ``"4GB"``.
Size = int | str


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """What :func:`convert_model` wrote.

    Attributes:
        path: the model's directory.
        dtype: what the cast did; None where attention was rewritten.
        attention: what the merge of key-value heads did; None without one.
        healing: what distillation after the merge did; None without it.
    """

    path: Path
    dtype: DtypeReport | None = None
    attention: AttentionReport | None = None
    healing: HealReport | None = None


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What :func:`quantize_model` wrote.

    Attributes:
        path: the artifact: a directory, or a ``.gguf`` file.
        layers: number of quantized linears (of GGUF: tensors).
        nbytes: of the weight files.
        seconds: wall-clock time of this call; what an earlier, stopped one took is not counted.
        details: everything that was reported: linears with their errors, seconds by phase, what a budget chose.
        distilled: what distillation did; None without it.
    """

    path: Path
    layers: int
    nbytes: int
    seconds: float
    details: QuantizeReport
    distilled: DistilReport | None = None


def convert_model(
    model: str | Path,
    output: str | Path,
    *,
    dtype: Dtype | None = None,
    overflow: Literal["error", "clip"] | None = None,
    rope_scaling: str | None = None,
    adapter: str | Path | None = None,
    allow_pickle: bool = False,
    kv_heads: int | None = None,
    gqa_method: Literal["svd", "mean", "first"] | None = None,
    refit: bool | None = None,
    heal_steps: int | None = None,
    heal_train: Literal["attention", "all", "lora"] | None = None,
    calibration: Calibration | None = None,
    samples: int | None = None,
    length: int | None = None,
    order: Order | None = None,
    seed: int | None = None,
    device: str | None = None,
    stream: bool = False,
    progress: Progress = SILENT,
) -> ConvertedModel:
    """Write a model as safetensors in another dtype, in constant memory; with ``kv_heads`` rewrite MHA to GQA or MQA.

    Example::

        llmconvert.convert_model("model.gguf", "out/model", dtype="bfloat16")
        llmconvert.convert_model("org/name", "out/gqa", kv_heads=8, calibration="pydoc-topics:train", length=512)

    Args:
        model: a Hub id (``org/name``, ``org/name@revision``), a directory, a ``.gguf`` file, or ``package:PKG/FILE``.
        output: directory to make; it may exist if it is empty.
        dtype: of every floating-point tensor; bfloat16 by default.
        overflow: whether values too large for ``dtype`` are an error (the default), or are clipped to its range.
        adapter: a LoRA of peft to merge into the model: a directory, or a Hub id.
        rope_scaling: stretches rotary positions, by kind and factor: ``"yarn:2.0"``, ``"linear:4"``, ``"dynamic:2"``.
        allow_pickle: read ``.bin`` weights, by torch's ``weights_only`` loader.
        kv_heads: merge key-value heads to this number per layer; 1 is MQA. None leaves attention as it is.
        gqa_method: how heads of a group become one; ``svd`` by default.
        refit: adapt queries, keys and output projections to the original's attention, as is the default.
        heal_steps: steps of distillation from the original after the merge; none by default.
        heal_train: what learns then: the weights of ``attention`` (the default), ``all``, or ``lora``, adapters of the
            linears that are merged in the end.
        calibration: text for the merge, a file or a named dataset, or several with their shares; without it the weights
            alone decide.
        samples, length, order, seed: windows drawn from ``calibration`` (128), tokens per window (2,048), and which
            (``shuffled``, by seed 0).
        device: where heads are merged, ``cpu`` (the default), ``cuda``, ``cuda:N`` or ``auto``; a change of dtype needs
            none.
        stream: convert a Hub model while it downloads; disk need is the output and two source shards.
        progress: where long work is shown, :func:`llmconvert.console_progress` for example.

    Raises:
        UsageError: options contradict each other, the output is not empty, or the architecture can't be rewritten.
        SourceError: the model or the text cannot be read.
        CapacityError: memory or disk do not suffice.
        RunInterruptedError: the process was asked to stop.
    """
    recipe = convert_recipe(locals())
    from llmconvert.recipes import single

    if recipe.attention is None:
        written = single.convert_model(recipe, Path(output), progress=progress)
        return ConvertedModel(Path(output), dtype=written)
    merged, healed = single.rewrite_model(recipe, Path(output), progress=progress)
    return ConvertedModel(Path(output), attention=merged, healing=healed)


def quantize_model(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str | None = None,
    method: str | None = None,
    bits_per_weight: float | None = None,
    format: str | None = None,
    imatrix: str | Path | None = None,
    split_max_size: Size | None = None,
    overrides: Mapping[str, str] | None = None,
    rotate: bool = False,
    experts: Literal["all"] | None = None,
    min_tokens_per_expert: int | None = None,
    distil_steps: int | None = None,
    kv_cache: Literal["fp8", "fp8-head"] | None = None,
    runtime: Literal["vllm"] | None = None,
    preset: Literal["fast", "balanced", "best"] | None = None,
    adapter: str | Path | None = None,
    requantize: bool = False,
    dtype: Dtype | None = None,
    calibration: Calibration | None = None,
    samples: int | None = None,
    length: int | None = None,
    order: Order | None = None,
    seed: int | None = None,
    device: str | None = None,
    memory: Size | None = None,
    allow_pickle: bool = False,
    stream: bool = False,
    progress: Progress = SILENT,
    ranks: Ranks | None = None,
) -> QuantizedModel:
    """Quantize a model to a directory that its runtime loads, or to a ``.gguf`` file. Stopped, the same call continues.

    Example::

        llmconvert.quantize_model(
            "org/name", "out/w4", scheme="w4a16-g128", calibration="pydoc-topics:train", samples=32, length=512
        )

    Args:
        model: a Hub id (``org/name``, ``org/name@revision``), a directory, a ``.gguf`` file, or ``package:PKG/FILE``.
        output: directory to make, or with ``format="gguf"`` a file.
        scheme: bits and groups, ``w4a16-g128``, ``w8a8``; of GGUF a type, ``q4_k_m``.
        method: ``gptq`` by default; of a GGUF type without calibration text ``rtn``.
        bits_per_weight: choose bits and group sizes by layer for this mean, scales included, instead of one scheme.
        format: on disk: ``compressed-tensors`` (the default), ``gptq``, ``awq``, ``bitsandbytes``, ``gguf``; the one
            that alone has the scheme need not be named.
        imatrix: an importance matrix in llama.cpp's format, for GGUF types in the place of calibration text.
        split_max_size: bytes of a GGUF file's tensors above which another file is begun, ``"2GB"``.
        overrides: shell pattern of layer names → another scheme, or ``none``; the first that matches counts. Of GGUF
            ``head`` and ``embedding`` are names too.
        rotate: fold orthogonal rotations of hidden states and values into the weights first (QuaRot).
        experts: calibrate every expert of a mixture on ``"all"`` tokens; by default on those that its router sends it.
        min_tokens_per_expert: begin nothing while an expert gets fewer tokens of the calibration text.
        distil_steps: steps of distillation from the original after quantization; none by default.
        kv_cache: ``"fp8"`` adds scales from the calibration text, by which runtimes keep keys and values in 8 bits;
            ``"fp8-head"`` one for each head.
        runtime: ``"vllm"`` writes what vLLM alone has to load; by default what every reader of the format does.
        preset: method, scheme, text, samples and distillation where they are not given; ``balanced`` where neither
            scheme, bits per weight, method nor format is.
        adapter: a LoRA of peft to merge into the model first: a directory, or a Hub id.
        requantize: quantize again what was quantized for deployment (GPTQ, AWQ, bitsandbytes, GGUF below 8 bits, an
            artifact of this package), which is refused otherwise; releases in FP8, MXFP4, NVFP4 or int4 need no word.
        dtype: of what stays unquantized; bfloat16 by default.
        calibration: text that activations are measured on, a file or a named dataset, or several with their shares:
            ``{"pydoc-topics:train": "60%", "chats.jsonl": "40%"}``.
        samples, length, order, seed: windows drawn from ``calibration`` (128), tokens per window (2,048), and which
            (``shuffled``, by seed 0).
        device: where to compute, ``cpu`` (the default), ``cuda``, ``cuda:N`` or ``auto``.
        memory: bytes that may be used, as a number or ``"4GB"``; what is free by default.
        allow_pickle: read ``.bin`` weights, by torch's ``weights_only`` loader.
        stream: quantize a Hub model while it downloads, by a method without calibration.
        progress: where long work is shown, :func:`llmconvert.console_progress` for example.
        ranks: the processes that do it together (``llmconvert/compute/ranks/opening.py``); each gets the same result.

    Raises:
        UsageError: options contradict each other, or a scheme does not fit the model's layers.
        SourceError: the model or the text cannot be read, or activations are not finite.
        CapacityError: memory or disk do not suffice.
        RunInterruptedError: the process was asked to stop.
    """
    recipe = quantize_recipe(locals(), Path(output))
    from llmconvert.compute.ranks.group import ALONE
    from llmconvert.recipes import single

    made, distilled = single.quantize_model(recipe, Path(output), progress=progress, ranks=ranks or ALONE)
    seconds = made.seconds + (distilled.seconds if distilled is not None else 0.0)
    return QuantizedModel(Path(output), made.layers, made.bytes, seconds, made, distilled)


def validate_model(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    text: str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    max_increase: Share | None = None,
    max_kl: float | None = None,
    min_top1: Share | None = None,
    max_saturated: Share | None = None,
    activations: Literal["transformers", "vllm"] | None = None,
    max_bytes: Size | None = None,
    generation: bool = False,
    min_agreement: Share | None = None,
    tasks: Sequence[str] = (),
    task_samples: int | None = None,
    attention: Sequence[str] = (),
    attention_lengths: Sequence[int] = (),
    positions: bool = False,
    positions_window: int | None = None,
    memory: bool = False,
    serve: Sequence[str] = (),
    measurements: Sequence[Measurement] = (),
    card: bool = False,
    device: str | None = None,
    progress: Progress = SILENT,
    ranks: Ranks | None = None,
) -> Report:
    """Measure an artifact, against the original it was made from where one is named.

    Limits that are missed are failed checks; :func:`llmconvert.require_passed` raises for them.

    Example::

        report = llmconvert.validate_model("out/w4", "org/name", text="pydoc-topics:test", window=512, max_windows=16)
        print(report["perplexity"].value, report["kl_mean"].value)

    Args:
        model: the artifact: a directory, or a ``.gguf`` file.
        reference: the original, in any form that :func:`quantize_model` takes.
        text: to measure perplexity and divergence on, a file or a named dataset.
        window, stride, max_windows: tokens per window (2,048 by default), tokens between their beginnings (``window``
            by default), and how many windows from the beginning of the text (all by default).
        max_increase: limit on the rise of perplexity over the original's, ``"5%"`` or ``0.05``.
        max_kl: limit on the mean divergence KL(original ‖ artifact), in nats per token.
        min_top1: least share of predictions with the same most likely token.
        max_saturated: limit on the share of a linear's inputs that a static scale cuts off, ``0.001`` for example.
        activations: whose formulas inputs of 8 bits are quantized by, ``transformers`` (the default) or ``vllm``.
        max_bytes: limit on the weight files, as a number or ``"4GB"``.
        generation: continue prompts greedily and compare with the original's text.
        min_agreement: least share of equal tokens in that; it turns ``generation`` on.
        tasks, task_samples: benchmarks of lm-eval by name, and how many samples of each (all by default).
        attention, attention_lengths: attention backends to compare (``eager``, ``math``, ``flash``, …), and the prompt
            lengths in tokens that they read.
        positions, positions_window: perplexity by position, in windows of so many tokens (twice the trained length).
        memory: the key-value cache and the memory ladder, computed and measured.
        serve: load time, memory and speed in runtimes (``transformers``, ``llama.cpp``, ``vllm``, ``mlx``), each with
            its Python where that is another one: ``mlx=/path/to/python``.
        measurements: of one's own, made after these; their checks are shown like all others.
        card: write report, page, plots and model card into the artifact, as a run does; it must have been made here.
        device: where to compute, ``cpu`` (the default), ``cuda``, ``cuda:N`` or ``auto``.
        progress: where long work is shown, :func:`llmconvert.console_progress` for example.
        ranks: the processes that do it together (``llmconvert/compute/ranks/opening.py``); each gets the same result.

    Raises:
        UsageError: options contradict each other, or the reference has another vocabulary.
        SourceError: a model or the text cannot be read; the text is what the artifact was calibrated on; the reference
            computes NaN or infinity.
        CapacityError: memory does not suffice.
        RunInterruptedError: the process was asked to stop.
    """
    recipe = validate_recipe(locals())
    from llmconvert.compute.ranks.group import ALONE
    from llmconvert.recipes import single

    original = None if reference is None else str(reference)
    return single.validate_model(recipe, original, measurements, card=card, progress=progress, ranks=ranks or ALONE)


def push_model(
    directory: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    folder: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    replace: bool = False,
    verify_download: bool = False,
    gated: Literal["auto", "manual"] | None = None,
    collection: str | None = None,
    unmeasured: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> str:
    """Push an artifact to the Hub in one commit; :func:`llmconvert.plan_push` says what it would send.

    Example::

        llmconvert.push_model("out/w4", "user/name-W4A16", private=True, tag="v1")

    Args:
        directory: the artifact.
        repository: ``user/name``.
        private: what a new repository becomes; True also refuses to push into a public one.
        revision: branch to push to, made if need be; the main branch by default.
        folder: of the repository, for one of several variants; its root by default.
        create_pr: open a pull request instead of pushing to the branch.
        tag: name to give the commit.
        message: the commit's title, and after its first line a description; a pull request's as well.
        replace: remove files that are there and don't belong to the artifact.
        verify_download: fetch what was published again and compare it byte for byte.
        gated: who wants a new repository's files has to ask, and is let in at once (``"auto"``) or by hand
            (``"manual"``); also refuses to push into one that is open.
        collection: title or address of a collection that shall list the repository, made if need be.
        unmeasured: push even where no report in the directory tells how well the artifact predicts.
        force: push it even if it is no model, has no card, did not pass its checks, or was not measured.
        progress: where to report, in bytes.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        UsageError: it is no model, has no card, did not pass its checks, or nothing tells how well it predicts, and it
            was not said that it may go so.
        HubError: there is no token, or the Hub refused or could not be reached.
        SourceError: the directory is no artifact.
        RunInterruptedError: the process was asked to stop; files already sent are not sent again.
    """
    from llmconvert.hub import PushOptions, push_folder
    from llmconvert.recipes.papers.gate import require_publishable
    from llmconvert.recipes.publishing import card_there

    options = PushOptions(
        private, revision, folder, create_pr, tag, message, replace, verify_download, gated, collection
    )
    options.check(repository)
    if not force:
        require_publishable(Path(directory), unmeasured=unmeasured)
    instead = card_there(Path(directory), repository, revision, folder)
    with interruptible("files already sent are not sent again; run the same command to continue"):
        return push_folder(Path(directory), repository, options, instead=instead, progress=progress)
