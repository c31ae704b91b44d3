"""A small stand-in for the Hugging Face Hub on 127.0.0.1: takes uploads, gives them back, records what arrived.

with HubServer() as hub:
    subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "t"})
hub.repositories["organisation/name"]["config.json"]                # bytes, of the main branch
hub.branches["organisation/name", "refs/pr/1"]["config.json"]       # of another one
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model")


class HubServer:
    """The server, started by `with`.

    Attributes:
        url: the endpoint.
        repositories: name -> {path: content} of the main branches.
        branches: (name, branch) -> {path: content} of the others.
        calls: "METHOD path" of every request.
        commits: their headers (summary, description).
        refused: name -> (status, what the Hub says) for uploads to it.
        private: names of repositories that were created as such.
        needs_token: whether requests without a token are refused.
        lost_uploads: how many uploads of data break off before they work.
        unreadable: names of files that are there, but for which the Hub has no answer.
    """

    def __enter__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: list[dict] = []
        self.calls: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.private: set[str] = set()
        self.needs_token = False
        self.lost_uploads = 0
        self.unreadable: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()

    def files(self, repo_id: str, revision: str) -> dict[str, bytes] | None:
        """Of a branch, or of the commit at its tip; None where there is none."""
        if revision == "main":
            return self.repositories.get(repo_id)
        for (name, branch), files in [((repo_id, "main"), self.repositories.get(repo_id)), *self.branches.items()]:
            if name == repo_id and files is not None and revision in (branch, commit_hash(files)):
                return files
        return None


def commit_hash(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((path, _sha256(content)) for path, content in files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body, path = self._begin()
        if self.hub.needs_token and "Authorization" not in self.headers:
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            created = json.loads(body)
            repo_id = "/".join(filter(None, (created.get("organization") or "me", created["name"])))
            if repo_id in self.hub.repositories:
                return self._json({"error": "You already created this model repo", "url": repo_id}, 409)
            self.hub.repositories[repo_id] = {}
            if created.get("private") or created.get("visibility") == "private":
                self.hub.private.add(repo_id)
            return self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self.hub.branches.setdefault((match[1], match[2]), dict(self.hub.repositories[match[1]]))
            return self._json({})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
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
            objects = []
            for wanted in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{self.hub.url}/blobs/{wanted['oid']}", "header": {}}}
                objects.append(wanted if wanted["oid"] in self.hub.blobs else {**wanted, "actions": actions})
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(*match.groups(), [json.loads(line) for line in body.decode().splitlines() if line])
        self._json({"error": f"no such call: {path}"}, 404)

    def do_PUT(self):
        body, path = self._begin()
        if self.hub.lost_uploads:
            self.hub.lost_uploads -= 1
            return self._json({"error": "the connection was lost"}, 400)
        self.hub.blobs[path.removeprefix("/blobs/")] = body
        self._send(200, b"")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        _, path = self._begin()
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": "me", "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if match[1] not in self.hub.repositories:
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            files = self.hub.files(match[1], match[2] or "main")
            if files is None:
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            sha = commit_hash(files)
            return self._json({"id": match[1], "sha": sha, "siblings": siblings, "private": False, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/((?:refs/\w+/)?[^/]+)(?:/(.*))?", path):
            files = self.hub.files(match[1], match[2])
            if files is None:
                code = "RevisionNotFound" if match[1] in self.hub.repositories else "RepoNotFound"
                return self._json({"error": "not found"}, 404, {"X-Error-Code": code})
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(content), **_object_ids(name, content)}
                    for name, content in files.items()
                    if name.startswith(match[3] or "")
                ]
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/((?:refs/\w+/)?[^/]+)/(.+)", path):
            files = self.hub.files(match[1], match[2])
            if files is None:
                code = "RevisionNotFound" if match[1] in self.hub.repositories else "RepoNotFound"
                return self._json({"error": "not found"}, 404, {"X-Error-Code": code})
            if match[3] in self.hub.unreadable:
                return self._json({"error": "out of order"}, 500)
            if match[3] not in files:
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            content = files[match[3]]
            headers = {"ETag": f'"{_sha256(content)}"', "X-Repo-Commit": commit_hash(files)}
            return self._send(200, content, headers)
        self._json({"error": f"no such call: {path}"}, 404)

    def _commit(self, repo_id: str, revision: str, lines: list[dict]):
        if repo_id in self.hub.refused:
            status, message = self.hub.refused[repo_id]
            return self._json({"error": message}, status)
        url = f"{self.hub.url}/{repo_id}"
        request = None
        if parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]:
            number = 1 + sum(name == repo_id for name, _ in self.hub.branches)
            revision, request = f"refs/pr/{number}", f"{url}/discussions/{number}"
            self.hub.branches[repo_id, revision] = dict(self.hub.repositories[repo_id])
        files = self.hub.repositories[repo_id] if revision == "main" else self.hub.branches[repo_id, revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = commit_hash(files)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        self._json(answer | ({"pullRequestUrl": request} if request else {}))

    def _begin(self) -> tuple[bytes, str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0)), path

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        headers = {"Content-Type": "application/json", **(headers or {})}
        if status >= 400 and isinstance(content, dict):
            headers["X-Error-Message"] = content["error"]
        self._send(status, json.dumps(content).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _object_ids(name: str, content: bytes) -> dict:
    """As git names a file, and its large content."""
    large = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"oid": oid, "lfs": large} if name.endswith(LFS_SUFFIXES) else {"oid": oid}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
