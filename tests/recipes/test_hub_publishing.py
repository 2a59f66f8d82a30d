"""Recipes that publish to the Hub: what is published is what was measured, and variants find their places."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import Client
from support.hub_server import READ_TOKEN, WRITE_TOKEN, Fault, HubServer

from llmconvert.errors import RecipeError
from llmconvert.recipes.loading import load_recipe
from llmconvert.recipes.publishing import fill_target


@pytest.fixture(scope="module")
def running_hub() -> Iterator[HubServer]:
    with HubServer().running() as server:
        yield server


@pytest.fixture
def hub(running_hub: HubServer) -> HubServer:
    running_hub.reset()
    return running_hub


def run(hub: HubServer, home: Path, *arguments: str, token: str = WRITE_TOKEN) -> subprocess.CompletedProcess[str]:
    """The command line, with a Hub to talk to."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "llmconvert.cli", *arguments],
        env={
            **environment,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "OMP_NUM_THREADS": "1",
        },
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_what_is_fetched_back_scores_the_same(
    hub: HubServer, write_recipe: Any, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(publish={"to": "me/{model}-{scheme}", "private": True, "verify_download": True, "tag": "v1"})
    done = run(hub, tmp_path / "home", "run", str(recipe))
    assert done.returncode == 0, done.stderr
    repo_id = "me/llama-w4a16-g32-sym"
    repo = hub.repos[repo_id]
    assert repo.private and repo.tags == {"v1": repo.branches["main"]}
    assert f"{hub.url}/{repo_id}/commit/{repo.branches['main']}" in done.stdout
    files = hub.files(repo_id)
    card = files["README.md"].decode()
    assert repo_id in card

    scored = run(
        hub,
        tmp_path / "other-home",
        *("validate", f"{repo_id}@v1", "--text", str(texts[1]), "--window", "64", "--max-windows", "4"),
        *("--json", str(tmp_path / "scored.json")),
    )
    assert scored.returncode == 0, scored.stderr
    measured, again = json.loads(files["llmconvert/report.json"]), json.loads((tmp_path / "scored.json").read_text())
    assert _perplexity(again) == _perplexity(measured)

    for text in (done.stdout, done.stderr, scored.stdout, scored.stderr):
        assert WRITE_TOKEN not in text
    left = [path for path in tmp_path.rglob("*") if path.is_file() and WRITE_TOKEN.encode() in path.read_bytes()]
    assert left == []
    assert not [name for name, content in files.items() if WRITE_TOKEN.encode() in content]


def _perplexity(report: dict[str, Any]) -> float:
    return float(next(check["value"] for check in report["checks"] if check["name"] == "perplexity"))


@pytest.mark.slow
def test_a_batch_goes_on_when_one_repository_fails(hub: HubServer, write_recipe: Any, tmp_path: Path) -> None:
    quick = {"quantize": {"method": "rtn", "scheme": "w8a16-g32"}, "validate": None, "calibrate": None}
    hub.add_repo("me/public", {"config.json": b"old"})
    hub.faults.append(Fault("POST .*me/broken/preupload", 403, "quota"))
    recipes = [
        write_recipe("first", publish={"to": "me/{name}", "unmeasured": True}, **quick),
        write_recipe("broken", publish={"to": "me/broken", "unmeasured": True}, **quick),
        write_recipe("visible", publish={"to": "me/public", "private": True, "unmeasured": True}, **quick),
        write_recipe("branch", publish={"to": "me/first", "revision": "{scheme}", "unmeasured": True}, **quick),
        write_recipe("folder", publish={"to": "me/variants", "folder": "{scheme}", "unmeasured": True}, **quick),
    ]
    done = run(hub, tmp_path / "home", "run", *map(str, recipes))
    assert done.returncode == 4, done.stderr
    assert (done.stdout.count(" failed (4) "), done.stdout.count(" done, not measured ")) == (2, 3), done.stdout
    assert "HTTP 403" in done.stdout and "is public" in done.stdout
    assert "model.safetensors" in hub.files("me/first") and "model.safetensors" in hub.files(
        "me/first", "w8a16-g32-sym"
    )
    assert "w8a16-g32-sym/model.safetensors" in hub.files("me/variants")
    assert hub.files("me/public") == {"config.json": b"old"}


@pytest.mark.slow
def test_a_token_that_may_not_write_is_found_out_before_the_work(
    hub: HubServer, write_recipe: Any, tmp_path: Path
) -> None:
    recipe = write_recipe(publish={"to": "me/new"})
    for token, text in (("hf_" + "x" * 34, "the token was rejected"), (READ_TOKEN, "the token may only read")):
        done = run(hub, tmp_path / "home", "run", str(recipe), token=token)
        assert done.returncode == 4
        assert text in done.stderr
        assert not list((tmp_path / "work").glob("convert-*"))
        assert token not in done.stderr


@pytest.mark.slow
def test_what_the_hub_would_refuse_at_the_end_is_refused_before_the_work(
    hub: HubServer, tiny_llama: Path, write_recipe: Any, tmp_path: Path
) -> None:
    model = tmp_path / "mine"
    shutil.copytree(tiny_llama, model)
    quick = {"quantize": {"method": "rtn", "scheme": "w8a16-g32"}, "calibrate": None}
    recipe = write_recipe(model=str(model), publish={"to": "me/new"}, **quick)
    card = model / "README.md"

    def refused(client: Client, *overrides: str) -> str:
        answer = client("cli", "run", recipe, *(f"--set={text}" for text in overrides))
        assert answer["code"] == 4, answer
        assert not list((tmp_path / "work").glob("*-*"))
        return str(answer["text"])

    with Client(hub.url, tmp_path / "home") as client:
        assert "can't publish as 'other'" in refused(client, "publish.to=other/new")
        assert "is no folder of a repository" in refused(client, "publish.folder=..")
        assert "tag 'a b' is no name that git takes" in refused(client, "publish.tag=a b")
        assert "git can't have branch 'main/w4' beside 'main'" in refused(client, "publish.revision=main/w4")
        hub.account["token"] = {"role": "fineGrained", "fineGrained": {"scoped": []}}
        assert "lacks write access" in refused(client)
        hub.account.clear()
        card.write_text("---\nlicense: nonsense\n---\n")
        assert 'refuses its front matter: "license" must be one of the list' in refused(client)
        card.unlink()
    hub.faults.append(Fault("xet-write-token", 404, "no such route"))
    with Client(hub.url, tmp_path / "home", HF_HUB_DISABLE_XET="0") as client:
        assert "has no Xet storage" in refused(client)
    assert hub.repos == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "publish",
    [
        {"to": "me/{name}", "revision": "{scheme}"},
        {"to": "me/{name}", "folder": "{scheme}"},
        {"to": "file:published"},
    ],
    ids=lambda publish: "-".join(publish) + "-" + publish["to"].partition(":")[0].replace("/", "-"),
)
def test_the_lines_on_a_card_load_what_was_published(
    publish: dict[str, str], hub: HubServer, write_recipe: Any, tmp_path: Path
) -> None:
    quick = {"quantize": {"method": "rtn", "scheme": "w8a16-g32"}, "validate": None, "calibrate": None}
    of_hub: dict[str, Any] = {} if publish["to"].startswith("file:") else {"unmeasured": True}
    done = run(hub, tmp_path / "home", "run", str(write_recipe("tiny", publish={**publish, **of_hub}, **quick)))
    assert done.returncode == 0, done.stderr
    where = tmp_path
    if publish["to"].startswith("file:"):
        where = tmp_path / "published"
        card = (where / "README.md").read_text()
    else:
        folder = "w8a16-g32-sym/" if "folder" in publish else ""
        files = hub.files("me/tiny", "w8a16-g32-sym" if "revision" in publish else "main")
        card = files[f"{folder}README.md"].decode()
        if folder:  # the root's card as well
            card += files["README.md"].decode()
    snippets = [text for text in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "AutoModel" in text]
    assert len(snippets) == (2 if "folder" in publish else 1)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    for number, snippet in enumerate(snippets):
        loaded = subprocess.run(
            [sys.executable, "-c", snippet],
            env={**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / f"reader-{number}")},
            cwd=where,
            capture_output=True,
            text=True,
            check=False,
        )
        assert loaded.returncode == 0, f"{snippet}\n{loaded.stderr}"


@pytest.mark.parametrize(
    "target", [{"to": "org/llama"}, {"to": "org/{model}"}, {"to": "org/llama", "revision": "main"}]
)
def test_an_artifact_does_not_take_the_place_of_its_source(target: dict[str, str], write_recipe: Any) -> None:
    for model in ("org/llama", "org/llama@v1", "org/llama@main"):  # an earlier version is not on main, main's is
        recipe = load_recipe(write_recipe(publish=target), [f"model={model}"])
        with pytest.raises(RecipeError, match="is the model itself; its weights would be replaced"):
            fill_target(recipe)
    recipe = load_recipe(write_recipe(publish={**target, "revision": "v1"}), ["model=org/llama@v1"])
    with pytest.raises(RecipeError, match="is the model itself"):
        fill_target(recipe)
    for more in ({"revision": "w4"}, {"folder": "w4"}):
        assert fill_target(load_recipe(write_recipe(publish={**target, **more}), ["model=org/llama"])).publish


def test_placeholders_stand_for_the_recipes_values(write_recipe: Any) -> None:
    publish = {"to": "me/{model}-{scheme}", "revision": "{method}", "folder": "{name}/{scheme}", "tag": "v1-{scheme}"}
    recipe = fill_target(load_recipe(str(write_recipe(publish=publish))))
    assert recipe.publish is not None
    assert recipe.publish.to == "me/llama-w4a16-g32-sym"
    assert (recipe.publish.revision, recipe.publish.folder) == ("gptq", "tiny/w4a16-g32-sym")
    assert recipe.publish.tag == "v1-w4a16-g32-sym"
    dense = fill_target(load_recipe(str(write_recipe(publish=publish, quantize=None, calibrate=None))))
    assert dense.publish is not None and dense.publish.to == "me/llama-bfloat16"


@pytest.mark.parametrize("value", ["{shceme}", "{scheme!r}", "{scheme:>9}", "{0}", "{", "a}"])
def test_other_placeholders_are_refused(write_recipe: Any, value: str) -> None:
    with pytest.raises(RecipeError, match="publish"):
        load_recipe(str(write_recipe(publish={"to": "me/x", "revision": value})))


@pytest.mark.slow
def test_a_set_goes_to_repositories_branches_folders_or_one_place(
    hub: HubServer, write_recipe: Any, tmp_path: Path
) -> None:
    """Wherever variants lie, a card compares all of them; with a rule, the one that it takes is published."""
    schemes = ["w4a16-g32", "w8a16-g32"]
    labels = [f"{scheme}-sym" for scheme in schemes]

    def publish(name: str, quantize: dict[str, Any], **target: Any) -> None:
        more = {"pick": target.pop("pick")} if "pick" in target else {}
        more |= {"validate": None} if "unmeasured" in target else {}
        recipe = write_recipe(name, quantize={"method": "rtn", **quantize}, publish=target, **more)
        answer = client("cli", "run", recipe)
        assert answer["code"] == 0, answer

    def compares(card: bytes, pages: list[str]) -> bool:
        text = card.decode()
        assert text.count("| RAM at 4k |") == 1 and "perplexity" in text
        return all(f"]({page})" in text for page in pages)

    with Client(hub.url, tmp_path / "home") as client:
        publish("repos", {"schemes": schemes}, to="me/of-{scheme}", set=True)
        pages = [f"{hub.url}/me/of-{label}" for label in labels]
        assert all(compares(hub.files(f"me/of-{label}")["README.md"], pages) for label in labels)

        publish("branches", {"schemes": schemes}, to="me/branches", revision="{scheme}", set=True, unmeasured=True)
        pages = [f"{hub.url}/me/branches/tree/{label}" for label in labels]
        assert all(compares(hub.files("me/branches", label)["README.md"], pages) for label in labels)

        publish("folders", {"schemes": schemes}, to="me/folders", folder="{scheme}", set=True, unmeasured=True)
        pages = [f"{hub.url}/me/folders/tree/main/{label}" for label in labels]
        files = hub.files("me/folders")
        assert all(compares(files[f"{label}/README.md"], pages) for label in labels)
        assert all(f"`{label}`" in files["README.md"].decode() for label in labels), "the root lists them"

        publish("files", {"format": "gguf", "schemes": ["q4_0", "q8_0"]}, to="me/files-GGUF", set=True)
        files = hub.files("me/files-GGUF")
        names = sorted(name for name in files if name.endswith(".gguf"))
        assert len(names) == 2 and compares(files["README.md"], names)

        publish("picked", {"schemes": schemes}, to="me/picked", pick="best under 1GB")
        picked = hub.files("me/picked")["model.safetensors"]
        assert picked in [hub.files(f"me/of-{label}")["model.safetensors"] for label in labels]
