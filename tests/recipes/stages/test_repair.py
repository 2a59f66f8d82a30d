"""Repair: an artifact that missed the gate gets more bits where they tell most, and passes, or it is said why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf import GGUFReader
from safetensors.torch import load_file
from support.tiny_models import tiny_llama_dir

from llmconvert.cli import main

TWO_BITS = {"method": "gptq", "scheme": "w2a16-g32"}


def run(recipe: Path, *settings: str) -> Any:
    return CliRunner().invoke(main, ["run", str(recipe), *(word for text in settings for word in ("--set", text))])


def stage(work: Path, name: str) -> Path:
    (found,) = work.glob(f"{name}-*")
    return found / "model"


def report_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "llmconvert" / "report.json").read_text())
    return found


def kl_of(directory: Path) -> tuple[float, int]:
    checks = {check["name"]: check["value"] for check in report_of(directory)["checks"]}
    return checks["kl_mean"], int(checks["size_bytes"])


def test_a_failed_gate_passes_after_repair_within_the_size_limit(write_recipe: Any, tmp_path: Path) -> None:
    recipe = write_recipe(quantize=TWO_BITS, publish={"to": f"file:{tmp_path}/out"})
    failed = run(recipe, "validate.max_kl=1e-9")
    assert failed.exit_code == 3 and not (tmp_path / "out").exists()
    broken = stage(tmp_path / "work", "artifact")
    before, size = kl_of(broken)
    limit = size + 30_000
    done = run(recipe, f"validate.max_kl={before / 2}", f"validate.repair.max_bytes={limit}")
    assert done.exit_code == 0, done.output
    after, larger = kl_of(tmp_path / "out")
    assert after <= before / 2 and size < larger <= limit
    found = report_of(tmp_path / "out")
    (check,) = [check for check in found["checks"] if check["name"] == "repair"]
    assert check["ok"] and "groups of layers got better schemes" in check["detail"]["text"]
    changes = check["detail"]["changes"]
    changed = {name for change in changes for name in change["linears"]}
    assert sum(change["bytes"] for change in changes) == pytest.approx(larger - size, abs=2000)
    # The table says the same in few words.
    (section,) = check["sections"]
    assert sum(row[4] for row in section["rows"]) == sum(change["bytes"] for change in changes)
    assert {(row[0], row[1], row[2]) for row in section["rows"]} == {
        (change["round"], change["before"], change["after"]) for change in changes
    }
    assert all(
        re.fullmatch(r"(([qkv]_proj(, )?|(gate|up)_proj(, )?|[a-z]+_proj)+ of [01](–1)?(; )?)+", row[3])
        for row in section["rows"]
    )
    # Runtimes fuse q, k, v and gate, up: they changed together or not at all.
    for name in changed:
        for unit in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            stem, _, leaf = name.rpartition(".")
            assert leaf not in unit or {f"{stem}.{other}" for other in unit} <= changed
    # All else kept its bytes.
    old, new = (
        load_file(stage(tmp_path / "work", "quantize") / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    kept = [name for name in old if name.rpartition(".")[0] not in changed]
    assert kept and all(old[name].equal(new[name]) for name in kept)
    assert any(name.endswith("weight_packed") for name in kept)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "## Repair" in card and "llmconvert/repair.png" in card and (tmp_path / "out/llmconvert/repair.png").is_file()
    )


def test_a_gguf_file_gets_the_next_types_where_it_errs_most(write_recipe: Any, tmp_path: Path) -> None:
    tiny_llama_dir(tmp_path / "Tiny-1M", hidden_size=256, intermediate_size=256)
    quantize = {"method": "imatrix", "scheme": "q8_0", "format": "gguf"}
    bad = "model.layers.1.mlp.down_proj"
    recipe = write_recipe(
        model=str(tmp_path / "Tiny-1M"),
        quantize={**quantize, "overrides": [{"match": bad, "scheme": "q2_k"}]},
        publish={"to": f"file:{tmp_path}/out"},
    )
    assert run(recipe, "validate.max_kl=1e-9").exit_code == 3
    broken = stage(tmp_path / "work", "artifact")
    before, size = kl_of(broken)
    limit = size + 256 * 256 // 2
    done = run(recipe, f"validate.max_kl={before / 3}", f"validate.repair.max_bytes={limit}")
    assert done.exit_code == 0, done.output
    after, larger = kl_of(tmp_path / "out")
    assert after <= before / 3 and size < larger <= limit
    old, new = (
        {tensor.name: tensor for tensor in GGUFReader(next(place.glob("*.gguf"))).tensors}
        for place in (broken, tmp_path / "out")
    )
    # Nothing but the linear that was made bad has another type, and what lies before it keeps its bytes.
    last = "blk.1.ffn_down.weight"
    assert {name for name in old if old[name].tensor_type != new[name].tensor_type} == {last}
    assert all((old[name].data == new[name].data).all() for name in old if name not in (last, "output.weight"))
    (check,) = [check for check in report_of(tmp_path / "out")["checks"] if check["name"] == "repair"]
    changes = check["detail"]["changes"]
    assert [change["linears"] for change in changes] == [[bad]] * len(changes)
    assert changes[0]["before"] == "q2_k" and changes[-1]["after"].upper() == new[last].tensor_type.name
    assert sum(change["bytes"] for change in changes) == new[last].n_bytes - old[last].n_bytes
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Repair" in card and "down_proj of 1" in card and card.count("## Types of tensors") == 1
    assert f"| {new[last].tensor_type.name} | 1 |" in card


def test_the_runtime_reads_a_repaired_artifact(write_recipe: Any, tmp_path: Path) -> None:
    """Its own check of fidelity compares transformers with our reader, bit for bit on this machine."""
    recipe = write_recipe(quantize=TWO_BITS, publish={"to": f"file:{tmp_path}/out"})
    done = run(recipe, "validate.max_kl=3e-5", "validate.repair=true")
    assert done.exit_code == 0, done.output
    checks = {check["name"]: check for check in report_of(tmp_path / "out")["checks"]}
    assert checks["fidelity.max_abs_diff"]["ok"] and checks["inventory"]["value"] == 0


def test_what_cannot_be_repaired_is_said(write_recipe: Any, tmp_path: Path) -> None:
    recipe = write_recipe(quantize=TWO_BITS, publish={"to": f"file:{tmp_path}/out"})
    found = run(recipe, "validate.max_kl=1e-9", "validate.repair.max_bytes=1kB")
    text = " ".join(found.output.split())
    assert found.exit_code == 3 and not (tmp_path / "out").exists()
    assert "can't be repaired: no better scheme fits into 1.0 kB" in text and "To blame:" in text
    assert (stage(tmp_path / "work", "artifact") / "README.md").is_file()
    found = run(recipe, "validate.max_bytes=1kB", "validate.max_kl=9", "validate.repair=true")
    text = " ".join(found.output.split())
    assert found.exit_code == 3 and "more bits don't mend size_bytes" in text


def test_rounds_are_limited_and_what_they_achieved_is_kept(write_recipe: Any, tmp_path: Path) -> None:
    recipe = write_recipe(quantize={"method": "rtn", "scheme": "w2a16-g32"})
    failed = run(recipe, "validate.max_kl=1e-9")
    size = kl_of(stage(tmp_path / "work", "artifact"))[1]
    assert failed.exit_code == 3
    found = run(recipe, "validate.max_kl=1e-9", "validate.repair.rounds=1", f"validate.repair.max_bytes={size + 6000}")
    text = " ".join(found.output.split())
    assert found.exit_code == 3 and "can't be repaired: the rounds allowed did not suffice" in text
    kept = Path(found.output.rsplit("the artifact is in ", 1)[1].strip().replace("\n", ""))
    assert size < kl_of(kept)[1] <= size + 6000


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"quantize": None}, "nothing is quantized"),
        ({}, "there is no limit on quality that could be missed"),
        (
            {
                "quantize": {"method": "awq", "scheme": "w4a16-g32"},
                "validate": {"perplexity": {"dataset": "pydoc-topics:test"}, "max_kl": 1.0},
            },
            "awq changes norms along with the linears",
        ),
        ({"quantize": {"method": "gptq", "scheme": "w4a16", "rotate": True}}, "a rotation changes norms along with"),
        ({"stream": True, "calibrate": None, "quantize": {"method": "rtn", "scheme": "w4a16"}}, "leave one of them"),
    ],
)
def test_a_repair_that_makes_no_sense_is_refused(write_recipe: Any, sections: dict[str, Any], message: str) -> None:
    found = run(write_recipe(**sections), "validate.repair=true")
    assert found.exit_code == 2 and message in " ".join(found.output.split())
