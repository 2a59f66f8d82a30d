"""Large objects of the loopback Hub: uploaded whole or in parts to a store with signatures of its own, or by Xet."""

from __future__ import annotations

import hashlib
import json
import math
import time
from typing import Any

from support.hub_server_access import Access
from support.hub_server_state import RefusalError


class Objects(Access):
    """Operations on large objects."""

    def lfs_batch(self, repo_id: str) -> None:
        repo = self._repo(repo_id, write=True, proposal=True)  # it does not say what for
        asked = json.loads(self.body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise RefusalError(422, "unsupported transfer")
        objects: list[dict[str, Any]] = []
        for thing in asked["objects"]:
            known = thing["oid"] in repo.objects
            actions = {} if known else {"actions": self._actions(repo_id, thing["oid"], thing["size"])}
            if self.state.refused_object and not known:
                actions = {"error": {"code": 507, "message": self.state.refused_object}}
            objects.append({"oid": thing["oid"], "size": thing["size"], **actions})
        self.answer_json({"transfer": "basic", "objects": objects})

    def _actions(self, repo_id: str, oid: str, size: int) -> dict[str, Any]:
        href, step = f"{self.state.storage or self.state.url}/lfs/{repo_id}/{oid}", self.state.part_bytes
        signature = f"?signature={_signature(oid)}"
        verify = {"href": f"{href}/verify"}
        if step is None or size <= step:
            return {"upload": {"href": href + signature}, "verify": verify}
        count = math.ceil(size / step)
        urls = {str(number): f"{href}/part/{number}{signature}" for number in range(1, count + 1)}
        return {"upload": {"href": f"{href}/complete", "header": {"chunk_size": str(step), **urls}}, "verify": verify}

    def _check_signature(self, oid: str) -> None:
        if self.authorization is not None:
            raise RefusalError(400, "only one way to authenticate is allowed, and the token is not for the store")
        if self.query.get("signature") != _signature(oid):
            raise RefusalError(403, "SignatureDoesNotMatch")

    def lfs_put(self, repo_id: str, oid: str) -> None:
        self._check_signature(oid)
        self.state.store(self.state.repos[repo_id], oid, self.body)
        self.answer(b"")

    def lfs_part(self, repo_id: str, oid: str, number: str) -> None:
        self._check_signature(oid)
        self.state.repos[repo_id].parts[oid, int(number)] = self.body
        self.answer(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, repo_id: str, oid: str) -> None:
        repo, asked = self.state.repos[repo_id], json.loads(self.body)
        content = b""
        for part in asked["parts"]:
            data = repo.parts.pop((oid, part["partNumber"]), b"")
            if part["etag"].strip('"') != hashlib.md5(data).hexdigest():
                raise RefusalError(400, f"InvalidPart {part['partNumber']}")
            content += data
        self.state.store(repo, oid, content)
        self.answer_json({})

    def lfs_verify(self, repo_id: str, oid: str) -> None:
        repo, asked = self._repo(repo_id, write=True, proposal=True), json.loads(self.body)
        if asked["oid"] != oid or len(repo.objects.get(oid, b"")) != asked["size"]:
            raise RefusalError(422, "the object is not here, or has another size")
        self.answer_json({})

    def xet_token(self, repo_id: str, kind: str, revision: str) -> None:
        self._repo(repo_id, write=kind == "write")
        expiry = int(time.time()) + 3600
        answer = {"casUrl": self.xet.url, "accessToken": "xet", "exp": expiry}
        headers = {
            "X-Xet-Cas-Url": self.xet.url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(expiry),
        }
        self.answer_json(answer, headers=headers)


def _signature(oid: str) -> str:
    return hashlib.sha256(f"the store's secret {oid}".encode()).hexdigest()[:16]
