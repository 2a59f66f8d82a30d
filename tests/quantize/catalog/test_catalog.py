"""What is read of classes without importing them is what importing them says."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.catalog.declared import declaration_of
from llmconvert.quantize.catalog.formats import FORMATS, about_format, loaders_of, only_format, require_format
from llmconvert.quantize.catalog.methods import METHODS, about_method, check_options, method_settings, needs_calibration
from llmconvert.quantize.catalog.schemes import USUAL
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.matrix import formats_for
from llmconvert.quantize.methods.base import load_method
from llmconvert.quantize.scheme import parse_scheme


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_in_their_source_what_they_are(name: str) -> None:
    method: Any = load_method(name, {})
    fields = [field for field in dataclasses.fields(method) if field.name != "dtype"]
    settings = method_settings(name)
    assert [setting.name for setting in settings] == [field.name for field in fields]
    for setting, field in zip(settings, fields, strict=True):
        assert setting.default == repr(field.default).replace("'", '"') or setting.default == repr(field.default)
        assert setting.kind == field.type
    assert needs_calibration(name) == (method.calibration != "none")
    assert len(about_method(name)) > 20 and "``" not in "".join(setting.about for setting in settings)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_say_in_their_source_what_they_are(name: str) -> None:
    assert loaders_of(name) == tuple(load_format(name).loaders)
    assert len(about_format(name)) > 20


@pytest.mark.parametrize("scheme", USUAL)
def test_a_format_that_is_the_only_one_is_known(scheme: str) -> None:
    only = only_format(scheme)
    assert only is None or formats_for(parse_scheme(scheme)) == (only,)
    assert only_format("no-scheme") is None


def test_settings_have_their_meaning_in_one_line() -> None:
    found = {setting.name: setting for setting in method_settings("gptq")}
    assert found["sweeps"].about == "how often codes and scales are then refined in turn (refine)."
    assert found["damping"].about.endswith("grows tenfold until H factorizes.") and found["damping"].default == "0.01"


def test_what_is_not_there_is_said_with_what_is_near() -> None:
    with pytest.raises(UnsupportedError, match=r"has no option 'sweep'; it has .*; did you mean sweeps\?"):
        check_options("gptq", ["damping", "sweep"])
    with pytest.raises(UnsupportedError, match=r"method 'GPTQQ' is not known; known are rtn, .*; did you mean gptq\?"):
        check_options("GPTQQ", [])
    with pytest.raises(UnsupportedError, match=r"did you mean compressed-tensors\?"):
        require_format("compressed_tensors")
    with pytest.raises(LookupError, match="no class Gone"):
        declaration_of("llmconvert.quantize.methods.rtn:Gone")
    with pytest.raises(LookupError, match="no such module"):
        declaration_of("llmconvert.quantize.methods.gone:Gone")


def test_reading_a_class_is_not_importing_it() -> None:
    module = importlib.import_module("llmconvert.quantize.catalog.declared")
    assert not hasattr(module, "torch")
