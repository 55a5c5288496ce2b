"""A hub of our own on the loopback: as much of its protocol as looking up, loading and uploading models needs."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

# What the hub says to those that it refuses, and what the client makes of it.
GATED = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"})
HIDDEN = (401, {"X-Error-Code": "RepoNotFound"})


class FakeHub(ThreadingHTTPServer):
    """`refuse`: (status, headers) of the answer to every request. `cut`: so many large files are taken."""

    def __init__(self, refuse=None, cut=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse, self.cut = refuse, cut
        self.authorizations: dict[str, str | None] = {}  # of each address that was asked
        self.created: list[dict] = []
        self.objects: dict[str, bytes] = {}  # large files, by their SHA-256
        self.sent: list[str] = []  # SHA-256 of each that was sent
        self.commits: dict[str, dict[str, bytes]] = {}  # files, by commit
        self.branches: dict[str, dict[str, str]] = {}  # commits, by repository and name: "owner/name", "datasets/o/n"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository, files, branch="main"):
        """Files on top of those that the branch has; returns the commit."""
        before = self.branches.setdefault(repository, {}).get(branch)
        commit = hashlib.sha1(repr((repository, before, sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = self.commits.get(before, {}) | files
        self.branches[repository][branch] = commit
        return commit

    def files(self, repository="owner/name", branch="main"):
        """What a repository holds; nothing where there is none."""
        return self.commits.get(self.branches.get(repository, {}).get(branch), {})

    def stop(self):
        self.shutdown()
        self.server_close()
        huggingface_hub.close_session()  # whose connections would still be served


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_any(self):
        hub, body, path = self.server, self.body(), self.path.partition("?")[0]
        hub.authorizations[path] = self.headers.get("Authorization")
        if hub.refuse:
            status, headers = hub.refuse
            return self.answer({"error": "You don't have the rights to create a model"}, status, headers)
        if path == "/api/repos/create":
            made = json.loads(body)
            hub.created.append(made)
            repository = f"{made['organization']}/{made['name']}"
            hub.branches.setdefault(repository, {})
            return self.answer({"url": f"{hub.url}/{repository}", "id": repository})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/lfs-object/"):
            if hub.cut is not None and len(hub.objects) >= hub.cut:
                return self.answer({"error": "no more"}, 400)
            name = path.rpartition("/")[2]
            hub.sent.append(name)
            hub.objects[name] = body
            return self.answer({})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self.place(one) for one in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/api/"):
            kind, owner, name, *rest = path.removeprefix("/api/").split("/")
            repository = "/".join([owner, name] if kind == "models" else [kind, owner, name])
            if rest[:1] == ["preupload"]:
                return self.answer({"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]})
            if rest[:1] == ["commit"]:
                return self.answer(self.committed(repository, rest[1], body))
            revision = rest[1] if len(rest) > 1 else "main"
            return self.look_up(repository, revision, lambda commit: self.about(repository, commit, rest))
        repository, _, rest = path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        return self.look_up(repository, revision, lambda commit: self.file(commit, file))

    do_GET = do_POST = do_PUT = do_HEAD = do_any

    def look_up(self, repository, revision, found):
        branches = self.server.branches.get(repository)
        if branches is None:
            return self.answer({}, *HIDDEN)
        commit = branches.get(revision, revision if revision in self.server.commits else None)
        if commit is None:
            return self.answer({}, 404, {"X-Error-Code": "RevisionNotFound"})
        return found(commit)

    def about(self, repository, commit, rest):
        files = self.server.commits[commit]
        if rest[:1] == ["tree"]:
            if rest[2:]:  # a folder, of which there are none here
                return self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
            return self.answer([{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files.items()])
        siblings = [{"rfilename": path} for path in files]
        about = {"siblings": siblings, "id": repository, "sha": commit, "private": False, "tags": []}
        return self.answer(about | ({"cardData": {"license": "mit"}} if files else {}))

    def file(self, commit, name):
        headers = {"X-Repo-Commit": commit}
        data = self.server.commits[commit].get(name)
        if data is None:
            return self.answer({}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        return self.answer(data, 200, headers | {"ETag": f'"{_oid(data)}"'})

    def place(self, one):
        """Where a large file is sent, unless it is here."""
        if one["oid"] in self.server.objects:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs-object/{one['oid']}"}}}

    def mode(self, path):
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }

    def committed(self, repository, branch, body):
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = self.server.commit(repository, files, branch)
        return {"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit, "success": True}

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value, status=200, headers=None):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *args):
        pass


def _oid(data):
    return hashlib.sha1(data).hexdigest()


@contextmanager
def as_the_hub(server, cache):
    """Meanwhile this process takes the server for the hub, and `cache` for its cache of it."""
    import transformers.utils.hub

    from transpoint.distill.run import identity
    from transpoint.teachers.hub import hub_commit

    forget = (hub_commit.cache_clear, identity._present.cache_clear, huggingface_hub.close_session)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # it keeps its address
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("NO_PROXY", "127.0.0.1")
        for one in forget:
            one()
        yield
    for one in forget:
        one()
