"""What the loopback Hub answers: the routes of its API, strict where the real one is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import urllib.parse
from collections.abc import Callable
from typing import Any

import yaml
from support.hub_server_objects import Objects
from support.hub_server_state import DATE, LFS_BYTES, Blob, Collection, RefusalError, Repo


class Routes(Objects):
    """The API's operations."""

    def whoami(self) -> None:
        role = self._role()
        if role is None:
            raise RefusalError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": role, **self.state.account.get("token", {})}
        auth = {"type": "access_token", "accessToken": token}
        orgs = [{"type": "org", **organization} for organization in self.state.account.get("orgs", [])]
        self.answer_json({"type": "user", "name": "me", "orgs": orgs, "auth": auth})

    def search(self) -> None:
        role, words = self._role(), self.query.get("search", "").lower()
        found = [
            {"id": repo_id, "private": repo.private}
            for repo_id, repo in self.state.repos.items()
            if words in repo_id.lower()
            and repo_id.split("/")[0] == self.query.get("author", repo_id.split("/")[0])
            and (role is not None or not repo.private)
        ]
        self.answer_json(found[: int(self.query.get("limit", 100))])

    def create(self) -> None:
        if self._role() != "write":
            raise RefusalError(401 if self._role() is None else 403, "Forbidden: cannot create")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self._require_writable(repo_id)
        url = {"url": f"{self.state.url}/{repo_id}"}
        if repo_id in self.state.repos:
            self.answer_json({"error": "You already created this model repo", **url}, 409)
            return
        private = asked.get("visibility") == "private"
        self.state.add_repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self.answer_json(url)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        errors, warnings = [], []
        try:
            fields = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            fields, errors = {}, [f"YAML: {error}"]
        if fields is None:
            warnings.append("empty or missing yaml metadata in repo card")
        elif fields.get("license") == "nonsense":
            errors.append('"license" must be one of the list')
        answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": t} for t in warnings]}
        self.answer_json(answer, 400 if errors else 200)

    def info(self, repo_id: str, revision: str) -> None:
        repo, sha, tree = self._tree(repo_id, revision or "main")
        siblings = [
            {"rfilename": path, "size": len(blob.content), "blobId": blob.blob_id} for path, blob in tree.items()
        ]
        about = {"id": repo_id, "sha": sha, "private": repo.private, "gated": repo.gated, "lastModified": DATE}
        self.answer_json({**about, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        _, _, tree = self._tree(repo_id, revision)
        folders = {path.rsplit("/", 1)[0] for path in tree if "/" in path}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
        entries += [blob.entry(path) for path, blob in sorted(tree.items())]
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + self.state.page < len(entries):
            query = urllib.parse.urlencode({**self.query, "cursor": start + self.state.page})
            path = f"/api/models/{repo_id}/tree/{urllib.parse.quote(revision, safe='')}"
            headers["Link"] = f'<{self.state.url}{path}?{query}>; rel="next"'
        self.answer_json(entries[start : start + self.state.page], headers=headers)

    def paths_info(self, repo_id: str, revision: str) -> None:
        _, _, tree = self._tree(repo_id, revision)
        asked = urllib.parse.parse_qs(self.body.decode())["paths"]
        self.answer_json([tree[path].entry(path) for path in asked if path in tree])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        _, sha, tree = self._tree(repo_id, revision, content=True)
        if path not in tree:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        blob, status = tree[path], 200
        content = self.state.served_instead.get(blob.sha256, blob.content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.byte_range)
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            if first >= len(content):
                raise RefusalError(416, "range starts behind the end")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.answer(content, status, headers)

    def preupload(self, repo_id: str, revision: str) -> None:
        _, _, tree = self._tree(repo_id, revision, write=True)
        asked = json.loads(self.body)["files"]
        if len(asked) > 256:
            raise RefusalError(413, "too many files")
        answers = []
        for file in asked:
            mode = "lfs" if file["size"] >= LFS_BYTES else "regular"
            known = {"oid": tree[file["path"]].oid} if file["path"] in tree else {}
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in self.state.ignored, **known}
            )
        self.answer_json({"files": answers})

    def commit(self, repo_id: str, revision: str) -> None:
        repo, head, tree = self._tree(repo_id, revision, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if not header["summary"].strip():
            raise RefusalError(400, "a commit needs a summary")
        if header.get("parentCommit", head) != head:
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        if revision not in repo.branches and revision not in repo.pull_requests:
            raise RefusalError(400, f"{revision} is no branch")
        tree = dict(tree)
        for line in lines[1:]:
            self._apply(repo, tree, line["key"], line["value"])
        pull = self.query.get("create_pr") == "1"
        sha = repo.commit(None if pull or revision in repo.pull_requests else revision, tree)
        if revision in repo.pull_requests:
            repo.pull_requests[revision] = sha
        repo.messages[sha] = header["summary"], header.get("description", "")
        answer = {"commitUrl": f"{self.state.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        if pull:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = sha
            answer["pullRequestUrl"] = f"{self.state.url}/{repo_id}/discussions/{number}"
        self.answer_json(answer)

    def _apply(self, repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if {"..", ".", "", ".git"} & set(path.split("/")):
            raise RefusalError(422, "invalid path")
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if len(content) >= LFS_BYTES:
                raise RefusalError(422, f"{path}: belongs into a large object")
            tree[path] = Blob(content, lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects and (sent := self.xet.read(value["oid"])) is not None:
                self.state.store(repo, value["oid"], sent)
            if len(repo.objects.get(value["oid"], b"")) != value["size"]:
                raise RefusalError(422, f"{path}: its object was never uploaded")
            tree[path] = Blob(repo.objects[value["oid"]], lfs=True)
        elif key == "deletedFile" and path in tree:
            del tree[path]
        else:
            raise RefusalError(400, f"cannot do {key} on {path}")

    def refs(self, repo_id: str) -> None:
        repo = self._repo(repo_id)

        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

        branches, tags = listed(repo.branches, "refs/heads/"), listed(repo.tags, "refs/tags/")
        answer = {"branches": branches, "tags": tags, "converts": []}
        if self.query.get("include_prs") == "1":
            answer["pullRequests"] = [{**ref, "name": ref["ref"]} for ref in listed(repo.pull_requests, "")]
        self.answer_json(answer)

    def discussions(self, repo_id: str) -> None:
        repo = self._repo(repo_id)
        found = [reference for reference in repo.pull_requests if reference not in repo.closed]
        if (self.query.get("type"), self.query.get("status")) != ("pull_request", "open"):
            raise RefusalError(400, "only open pull requests are listed here")
        start = int(self.query.get("p", 0)) * self.state.page
        shown = [
            {
                "num": int(reference.rsplit("/", 1)[1]),
                "title": "Upload model",
                "author": {"name": "me"},
                "createdAt": DATE,
                "status": "open",
                "repo": {"name": repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for reference in found[start : start + self.state.page]
        ]
        self.answer_json({"discussions": shown, "count": len(found), "start": start})

    def settings(self, repo_id: str) -> None:
        repo, asked = self._repo(repo_id, write=True), json.loads(self.body)
        if asked.get("gated", False) not in (False, "auto", "manual") or asked.keys() - {"gated", "visibility"}:
            raise RefusalError(400, "unknown settings")
        repo.gated = asked.get("gated", repo.gated)
        repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
        self.answer_json({})

    def create_collection(self) -> None:
        asked = json.loads(self.body)
        owner, title = asked["namespace"], asked["title"]
        self._require_collections(owner)
        if not 0 < len(title) <= 60:
            raise RefusalError(400, "title: between 1 and 60 characters")
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{owner}/{name}-{hashlib.sha256(title.encode()).hexdigest()[:24]}"
        if slug in self.state.collections:
            self.answer_json({"error": "this collection already exists", "slug": slug}, 409)
            return
        self.state.collections[slug] = Collection(title, owner, asked["private"])
        self._answer_collection(slug)

    def collection(self, slug: str) -> None:
        self._answer_collection(slug)

    def collection_item(self, slug: str) -> None:
        asked = json.loads(self.body)["item"]
        if slug not in self.state.collections:
            raise RefusalError(404, "Collection not found")
        found = self.state.collections[slug]
        self._require_collections(found.owner)
        self._repo(asked["id"])
        if asked["type"] != "model" or asked["id"] in found.items:
            raise RefusalError(409, "already in the collection")
        found.items.append(asked["id"])
        self._answer_collection(slug)

    def _require_collections(self, owner: str) -> None:
        if self._role() != "write":
            raise RefusalError(403 if self._role() else 401, "Forbidden: this token cannot write")
        token, own = (
            self.state.account.get("token", {}),
            {"me", *(o["name"] for o in self.state.account.get("orgs", []))},
        )
        scopes = token.get("fineGrained", {}).get("scoped", [])
        granted = {scope["entity"]["name"] for scope in scopes if "collection.write" in scope["permissions"]}
        if owner not in own or (token.get("role") == "fineGrained" and owner not in granted):
            raise RefusalError(403, f"Forbidden: no rights on collections of {owner}")

    def _answer_collection(self, slug: str) -> None:
        found = self.state.collections.get(slug)
        if found is None or (found.private and self._role() is None):
            raise RefusalError(404, "Collection not found")
        items = [
            {"_id": str(place), "id": repo_id, "type": "model", "position": place}
            for place, repo_id in enumerate(found.items)
        ]
        about = {"slug": slug, "title": found.title, "owner": {"name": found.owner}, "lastUpdated": DATE}
        more = {"position": 0, "private": found.private, "theme": "blue", "upvotes": 0, "items": items}
        self.answer_json({**about, **more})

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id, write=True)
        _require_ref(name, repo.branches, "branch")
        start = repo.resolve(json.loads(self.body or b"{}").get("startingPoint", "main"))
        if start is None:
            raise RefusalError(404, "no such starting point", "RevisionNotFound")
        repo.branches[name] = start
        self.answer_json({})

    def tag(self, repo_id: str, revision: str) -> None:
        repo, sha, _ = self._tree(repo_id, revision, write=True)
        name = json.loads(self.body)["tag"]
        _require_ref(name, repo.tags, "tag")
        repo.tags[name] = sha
        self.answer_json({})


def _require_ref(name: str, present: dict[str, str], what: str) -> None:
    """As git does: no name that it refuses, none twice, and none that is the folder of another."""
    checked = subprocess.run(["git", "check-ref-format", f"refs/heads/{name}"], check=False)
    if checked.returncode or name.startswith("-"):
        raise RefusalError(400, f"Invalid reference name: {name}")
    if name in present:
        raise RefusalError(409, f"{what} exists")
    if any(f"{name}/".startswith(f"{other}/") or other.startswith(f"{name}/") for other in present):
        raise RefusalError(400, f"cannot lock ref {name}")


_ID = r"([^/]+/[^/]+)"
_OID = r"([0-9a-f]{64})"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Routes.whoami),
    ("GET", "/api/models", Routes.search),
    ("POST", "/api/repos/create", Routes.create),
    ("POST", "/api/validate-yaml", Routes.validate_yaml),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", Routes.preupload),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", Routes.commit),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", Routes.branch),
    ("POST", rf"/api/models/{_ID}/tag/([^/]+)", Routes.tag),
    ("GET", rf"/api/models/{_ID}/refs", Routes.refs),
    ("PUT", rf"/api/models/{_ID}/settings", Routes.settings),
    ("POST", "/api/collections", Routes.create_collection),
    ("GET", rf"/api/collections/{_ID}", Routes.collection),
    ("POST", rf"/api/collections/{_ID}/items", Routes.collection_item),
    ("GET", rf"/api/models/{_ID}/discussions", Routes.discussions),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", Routes.tree),
    ("POST", rf"/api/models/{_ID}/paths-info/([^/]+)", Routes.paths_info),
    ("GET", rf"/api/models/{_ID}/xet-(read|write)-token/([^/]+)", Routes.xet_token),
    ("GET", rf"/api/models/{_ID}(?:/revision/([^/]+))?", Routes.info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Routes.lfs_batch),
    ("PUT", rf"/lfs/{_ID}/{_OID}", Routes.lfs_put),
    ("PUT", rf"/lfs/{_ID}/{_OID}/part/(\d+)", Routes.lfs_part),
    ("POST", rf"/lfs/{_ID}/{_OID}/complete", Routes.lfs_complete),
    ("POST", rf"/lfs/{_ID}/{_OID}/verify", Routes.lfs_verify),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", Routes.resolve),
]
