"""A server that speaks the Hugging Face hub's API, as much as its client asks for."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee00" * 5
TOKEN = "hf_averysecrettoken"


class Hub(BaseHTTPRequestHandler):
    """Repositories of files in memory; `heard` has a line for each large one received.

    One commit is refused where `full` is set, one download cut off where `cut` is.
    """

    protocol_version = "HTTP/1.1"

    def answer(self, body=None, status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self):
        self.answer({}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server, path = self.server, self.path.partition("?")[0]
        server.agents.append(self.headers.get("User-Agent"))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in server.repos else 200
            server.repos.setdefault(name, {})
            url = f"http://{self.headers['Host']}/{name}"
            return self.answer({"url": url, "id": name}, status)
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        files = server.repos.get(name.removesuffix(".git"))
        if files is None:
            return self.missing()
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            kinds = {True: "lfs", False: "regular"}
            rows = [
                {
                    "path": f["path"],
                    "uploadMode": kinds[f["path"].endswith((".safetensors", ".png"))],
                    "shouldIgnore": False,
                }
                for f in asked
            ]
            return self.answer({"files": rows})
        if path.endswith("/info/lfs/objects/batch"):
            rows = []
            for wanted in json.loads(body)["objects"]:
                href = f"http://{self.headers['Host']}/lfs/{wanted['oid']}"
                new = {"actions": {"upload": {"href": href}}}
                rows.append(wanted | ({} if wanted["oid"] in server.large else new))
            return self.answer({"transfer": "basic", "objects": rows})
        if "/commit/" in path:
            if server.full:
                server.full = False
                return self.answer({"error": "no space left"}, 507)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = server.large[value["oid"]]
            url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            return self.answer({"commitUrl": url, "commitOid": COMMIT})
        return self.missing()

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self.server.heard.append(oid)
        self.answer(b"")

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/api/models")
        name, _, rest = path.strip("/").partition("/")
        owned, _, rest = rest.partition("/")
        files = self.server.repos.get(f"{name}/{owned}")
        kind, _, rest = rest.partition("/")
        if files is None or kind not in ("revision", "tree", "resolve"):
            return self.missing()
        if kind == "revision":
            return self.answer({"id": f"{name}/{owned}", "sha": COMMIT})
        if kind == "tree":
            rows = [
                {"type": "file", "path": n, "size": len(data), "oid": ""}
                for n, data in files.items()
            ]
            return self.answer(rows)
        data = files[rest.partition("/")[2]]
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        about = {"X_Repo_Commit": COMMIT, "ETag": tag, "Accept_Ranges": "bytes"}
        if self.command == "GET" and self.server.cut and len(data) > 1000:
            self.server.cut = False
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:1000])
            self.close_connection = True
            return None
        if first:
            end = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.answer(data[first:], 206, Content_Range=end, **about)
        return self.answer(data, **about)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@contextmanager
def hub(monkeypatch, cache, **repos):
    """The server, which the client of this process takes for the hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repos, server.large, server.heard, server.agents = repos, {}, [], []
        server.full = server.cut = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        named = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        named |= {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True}
        for name, value in named.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        try:
            yield server
        finally:
            server.shutdown()
