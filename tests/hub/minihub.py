"""A double of the Hugging Face Hub on 127.0.0.1: the endpoints that the real clients call, with optional faults."""

import base64
import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.connection import Connection, Fault, Refusal, Request
from tests.hub.store import Blob, Commit, NotFound, Repository, Store, is_large
from tests.hub.xet import XetFolders

API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILES = r"(?:/(?P<datasets>datasets))?/(?P<name>[^/]+/[^/]+?)"
ROUTES = [
    (method, re.compile(pattern), handler)
    for method, pattern, handler in (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
        ("POST", API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", API + r"/refs", "refs"),
        ("GET", API + r"/commits/(?P<revision>[^/]+)", "commits"),
        ("POST", API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", API + r"/commit/(?P<branch>[^/]+)", "commit"),
        ("POST", API + r"/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", API + r"/tag/(?P<revision>[^/]+)", "create_tag"),
        ("GET", API + r"/xet-write-token/(?P<revision>[^/]+)", "xet_write_token"),
        ("POST", FILES + r"\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", "lfs_put"),
        ("GET", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


class Endpoints(Connection):
    """The endpoints of the Hub."""

    server: "MiniHub"

    def dispatch(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Call the handler of a request and return status, answer and headers."""
        self.query = parse_qs(urlsplit(self.path).query)
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, handler in ROUTES:
            match = pattern.fullmatch(path)
            if route_method == method and match:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "name" in arguments:
                    arguments.setdefault("kind", "dataset" if arguments.pop("datasets", None) else "model")
                if handler != "lfs_put":  # the URL itself grants access
                    self.user = self._authenticated()
                try:
                    with self.server.store.lock:
                        answer = getattr(self, handler)(body, **arguments)
                except NotFound as error:
                    raise Refusal(404, str(error), error.code) from error
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise Refusal(404, "Not Found")

    # Permissions

    def _authenticated(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.server.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _writable(self, name: str):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if name.split("/")[0] != self.user:
            raise Refusal(403, "You don't have the rights to write here")

    def _repository(self, kind: str, name: str) -> Repository:
        repository = self.server.store.repositories.get((kind, name))
        if repository is None or (repository.private and name.split("/")[0] != self.user):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repository

    # Repositories and their content

    def create(self, body: bytes):
        asked = json.loads(body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or self.user}/{asked['name']}"
        self._writable(name)
        answer = {"url": f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
        if (kind, name) in self.server.store.repositories:
            raise Refusal(409, "You already created this repo", body=answer)
        self.server.store.create(kind, name, asked.get("visibility") == "private")
        return answer

    def validate_yaml(self, body: bytes):
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(header[1] if header else "") or {}
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid metadata", body={"errors": [{"message": str(error)}]}) from error
        for key in ("base_model", "datasets"):
            named = data.get(key) or []
            for name in named if isinstance(named, list) else [named]:
                if not ID.fullmatch(name):
                    message = f'"{key}" must be an id on the Hub, not {name}'
                    raise Refusal(400, "Invalid metadata", body={"errors": [{"message": message}]})
        return {"errors": [], "warnings": []}

    def info(self, body: bytes, kind: str, name: str, revision: str = "main"):
        repository = self._repository(kind, name)
        commit = repository.resolve(revision)
        return {
            "id": name,
            "sha": commit.id,
            "private": repository.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str = ""):
        commit = self._repository(kind, name).resolve(revision)
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        entries = [entry for entry in _tree(commit) if _is_below(entry["path"], folder, recursive)]
        if folder and not entries:
            raise NotFound("EntryNotFound", f"{folder} does not exist")
        return entries

    def paths_info(self, body: bytes, kind: str, name: str, revision: str):
        is_json = "json" in self.headers["Content-Type"]
        paths = (json.loads(body) if is_json else parse_qs(body.decode())).get("paths", [])
        commit = self._repository(kind, name).resolve(revision)
        return [entry for entry in _tree(commit) if entry["path"] in paths]

    def refs(self, body: bytes, kind: str, name: str):
        repository = self._repository(kind, name)

        def references(sort: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": key, "ref": f"refs/{sort}/{key}", "targetCommit": id} for key, id in names.items()]

        return {
            "branches": references("heads", repository.branches),
            "tags": references("tags", repository.tags),
            "converts": [],
        }

    def commits(self, body: bytes, kind: str, name: str, revision: str):
        history = self._repository(kind, name).history(revision)
        keys = ("id", "title", "message", "date")
        return [
            {key: getattr(commit, key) for key in keys} | {"authors": [{"user": commit.author}]} for commit in history
        ]

    # Commits, branches and tags

    def preupload(self, body: bytes, kind: str, name: str, revision: str):
        self._writable(name)
        known = self._repository(kind, name).resolve(revision).files
        answers = []
        for file in json.loads(body)["files"]:
            large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in known:
                answer["oid"] = known[file["path"]].etag
            answers.append(answer)
        return {"files": answers}

    def commit(self, body: bytes, kind: str, name: str, branch: str):
        self._writable(name)
        repository = self._repository(kind, name)
        if branch not in repository.branches:
            raise NotFound("RevisionNotFound", f"Invalid rev id: {branch}")
        parent, header = repository.branches[branch], {}
        files = dict(repository.commits[parent].files)
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.server.store.add_small(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self._large(value)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {key}")
        commit = self.server.store.commit(
            repository, branch, files, header["summary"], header["description"], self.user
        )
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.server.url}/{name}/commit/{commit.id}"}

    def _large(self, value: dict[str, Any]) -> Blob:
        store, sha256 = self.server.store, value["oid"]
        if sha256 not in store.contents:
            content = self.server.xet.read(sha256, value["size"])
            if content is not None:
                store.contents[sha256] = content
        blob = store.large(sha256)
        if blob is None:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        return blob

    def create_branch(self, body: bytes, kind: str, name: str, branch: str):
        self._writable(name)
        repository = self._repository(kind, name)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = repository.resolve(json.loads(body or b"{}").get("startingPoint", "main")).id
        return {}

    def create_tag(self, body: bytes, kind: str, name: str, revision: str):
        self._writable(name)
        repository, tag = self._repository(kind, name), json.loads(body)["tag"]
        if tag in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = repository.resolve(revision).id
        return {}

    # Contents

    def xet_write_token(self, body: bytes, kind: str, name: str, revision: str):
        self._writable(name)
        return {"accessToken": "x", "exp": 2**40, "casUrl": self.server.xet.new_address()}

    def lfs_batch(self, body: bytes, kind: str, name: str):
        self._writable(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.store.contents:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, sha256: str):
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refusal(400, "the content is not what its name says")
        self.server.store.contents[sha256] = body
        return b""

    def resolve(self, body: bytes, kind: str, name: str, revision: str, path: str):
        commit = self._repository(kind, name).resolve(revision)
        if path not in commit.files:
            raise NotFound("EntryNotFound", "Entry not found")
        blob = commit.files[path]
        content = self.server.store.contents[blob.etag]
        headers = {
            "X-Repo-Commit": commit.id,
            "ETag": f'"{blob.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if blob.sha256:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.etag}"'}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, content, headers
        start = int(asked[1]) if asked[1] else max(0, blob.size - int(asked[2]))
        end = min(int(asked[2]), blob.size - 1) if asked[1] and asked[2] else blob.size - 1
        if start >= blob.size:
            return 416, b"", headers | {"Content-Range": f"bytes */{blob.size}"}
        return 206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{blob.size}"}


class MiniHub(ThreadingHTTPServer):
    """The server of the double; `with` starts and stops it.

    Args:
        tokens: User names by access token.
        xet_root: Folder for the contents uploaded with xet.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, tokens: dict[str, str], xet_root: Path):
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.tokens, self.xet = tokens, XetFolders(xet_root)
        self.clear()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def clear(self):
        """Remove everything except the tokens."""
        self.store = Store()
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.stalled = threading.Event()
        self._uploads_left: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.store.repositories[kind, name]

    def file(self, name: str, revision: str, path: str) -> bytes:
        """The content of a file of a model."""
        return self.store.contents[self.repository(name).resolve(revision).files[path].etag]

    def write(self, name: str, files: dict[str, bytes], branch: str = "main"):
        """Commit files to a branch of a model, as with the editor on the Hub's website."""
        repository = self.repository(name)
        known = repository.resolve(branch).files
        added = {path: self.store.add_small(content) for path, content in files.items()}
        self.store.commit(repository, branch, known | added, f"Update {', '.join(files)}", author="user")

    def uploads(self) -> list[str]:
        """SHA-256 of the completely uploaded large files, in order."""
        return [line.path[5:] for line in self.log if line.method == "PUT" and line.status == 200]

    def stall_uploads(self, after: int | None):
        """Accept `after` more large files and stall all later uploads; None accepts all."""
        self._uploads_left = after
        self.stalled.clear()

    def takes_upload(self) -> bool:
        """Whether the next large file is accepted."""
        with self.store.lock:
            if self._uploads_left is None:
                return True
            self._uploads_left -= 1
            if self._uploads_left < 0:
                self.stalled.set()
            return self._uploads_left >= 0

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that applies to a request, or None."""
        with self.store.lock:
            for fault in self.faults:
                if fault.times and fault.method in ("", method) and re.search(fault.pattern, path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


def _tree(commit: Commit) -> list[dict[str, Any]]:
    """The folders and files of a commit in the format of the Hub."""
    folders = {parent.as_posix() for path in commit.files for parent in Path(path).parents} - {"."}
    entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in sorted(folders)]
    last = {"id": commit.id, "title": commit.title, "date": commit.date}
    for path, blob in sorted(commit.files.items()):
        entry = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        entries.append(entry)
    return [entry | {"lastCommit": last} for entry in entries]


def _is_below(path: str, folder: str, recursive: bool) -> bool:
    parent = Path(path).parent
    top = Path(folder)
    return parent == top or (recursive and top in parent.parents)
