"""A small stand-in for the Hugging Face Hub on 127.0.0.1: takes uploads, gives them back, records what arrived.

with HubServer() as hub:
    subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "t"})
hub.repositories["organisation/name"]["config.json"]        # bytes
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model")


class HubServer:
    """`repositories`: name -> {path: content}; `calls`: "METHOD path" of every request; `url`: the endpoint."""

    def __enter__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict] = []
        self.calls: list[str] = []
        self.blobs: dict[str, bytes] = {}
        server = self
        handler = type("Handler", (_Handler,), {"hub": server})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()

    def commit_hash(self, repo_id: str) -> str:
        files = sorted((path, _sha256(content)) for path, content in self.repositories[repo_id].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body, path = self._begin()
        if path == "/api/repos/create":
            created = json.loads(body)
            repo_id = "/".join(filter(None, (created.get("organization") or "me", created["name"])))
            self.hub.repositories.setdefault(repo_id, {})
            return self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{wanted['oid']}", "header": {}}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", path):
            return self._commit(match[1], [json.loads(line) for line in body.decode().splitlines() if line.strip()])
        self._json({"error": f"no such call: {path}"}, 404)

    def do_PUT(self):
        body, path = self._begin()
        self.hub.blobs[path.removeprefix("/blobs/")] = body
        self._send(200, b"")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        _, path = self._begin()
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": "me", "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if match[1] not in self.hub.repositories:
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in self.hub.repositories[match[1]]]
            sha = self.hub.commit_hash(match[1])
            return self._json({"id": match[1], "sha": sha, "siblings": siblings, "private": False, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            files = self.hub.repositories.get(match[1], {})
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _sha256(content)}
                    for name, content in files.items()
                    if name.startswith(match[2] or "")
                ]
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.hub.repositories.get(match[1], {}).get(match[2])
            if content is None:
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            headers = {"ETag": f'"{_sha256(content)}"', "X-Repo-Commit": self.hub.commit_hash(match[1])}
            return self._send(200, content, headers)
        self._json({"error": f"no such call: {path}"}, 404)

    def _commit(self, repo_id: str, lines: list[dict]):
        files = self.hub.repositories[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = self.hub.commit_hash(repo_id)
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _begin(self) -> tuple[bytes, str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0)), path

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
