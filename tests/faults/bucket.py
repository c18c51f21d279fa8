"""A server of Google Cloud Storage's JSON API on the loopback, in memory.

What gcsfs, google-cloud-storage and TensorStore ask of it: objects with generations
and preconditions, ranges, lists by prefix and delimiter, uploads (media, multipart,
resumable), copies, deletes, batches. Source: cloud.google.com/storage/docs/json_api.
"""

import base64
import email
import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

COUNTER = itertools.count(1)


class Bucket(ThreadingHTTPServer):
    """Any bucket's objects, {(bucket, name): (generation, time, bytes)}.

    Attributes:
      fault: method -> the status to answer with instead, or 0.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[tuple[str, str], tuple[int, float, bytes]] = {}
        self.sessions: dict[str, tuple[str, str, bytearray]] = {}
        self.lock = threading.RLock()
        self.fault: Callable[[str], int] = lambda method: 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What points the clients here."""
        names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
        plain = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # asks by gRPC
        plain |= {"GOOGLE_CLOUD_PROJECT": "test"}
        return dict.fromkeys(names, self.url) | plain

    def handle_error(self, *_: Any) -> None:
        """A client that hung up."""

    def upload(self, bucket: str, name: str, data: bytes) -> None:
        self.objects[bucket, name] = next(COUNTER), time.time(), data

    def names(self, bucket: str = "test-bucket") -> list[str]:
        with self.lock:
            return sorted(name for b, name in self.objects if b == bucket)

    def read(self, name: str, bucket: str = "test-bucket") -> bytes:
        return self.objects[bucket, name][2]

    def remove(self, name: str, bucket: str = "test-bucket") -> None:
        del self.objects[bucket, name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        body, server = self._body(), self.server
        if status := server.fault(self.command):
            self._json({"error": {"code": status, "message": "a fault"}}, status)
            return
        with server.lock:
            self._answer(*self._serve(self.command, self.path, self.headers, body))

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict[str, Any], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(*as_json(value, status))

    def _serve(self, method: str, path: str, headers: Any, body: bytes) -> Any:
        url = urlsplit(path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        if url.path.startswith("/batch"):
            return self._batch(headers, body)
        route = re.fullmatch(
            r"/(upload/|download/)?(?:storage/v1/)?b/([^/]+)(?:/o(?:/(.*))?)?", url.path
        )
        if not route:
            return as_json({"error": {"code": 404, "message": path}}, 404)
        kind, bucket, rest = route[1], route[2], route[3] or ""
        if kind == "upload/":
            return self._upload(method, bucket, query, headers, body)
        if re.search(r"/o/?$", url.path):
            return self._list(bucket, query)
        if copy := re.fullmatch(
            r"(.*)/(rewrite|copy|move)To(?:/b/([^/]+))?/o/(.*)", rest
        ):
            source = bucket, unquote(copy[1])
            if source not in self.server.objects:
                return missing(path)
            data = self.server.objects[source][2]
            done = self._write(copy[3] or bucket, unquote(copy[4]), {}, data)
            if copy[2] == "move":
                del self.server.objects[source]
            whole = {"done": True, "resource": json.loads(done[2])}
            return as_json(whole) if copy[2] == "rewrite" else done
        if not rest:
            return as_json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        return self._object(method, bucket, unquote(rest), query, headers)

    def _object(self, method: str, bucket: str, name: str, query: Any, headers: Any):
        found = self.server.objects.get((bucket, name))
        if not found:
            return missing(name)
        generation, _, data = found
        if fails(query, generation):
            return as_json({"error": {"code": 412, "message": name}}, 412)
        if (
            "ifGenerationNotMatch" in query
            and int(query["ifGenerationNotMatch"]) == generation
        ):
            return 304, {}, b""
        if method == "DELETE":
            del self.server.objects[bucket, name]
            return 204, {}, b""
        if query.get("alt") != "media":
            return as_json(resource(bucket, name, found))
        more = {
            "x-goog-generation": generation,
            "x-goog-stored-content-length": len(data),
        }
        more |= {"Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range") or "")
        if not wanted:
            return 200, more, data
        first = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
        last = (
            min(int(wanted[2]), len(data) - 1)
            if wanted[1] and wanted[2]
            else len(data) - 1
        )
        if first > last:
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        more["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, more, data[first : last + 1]

    def _list(self, bucket: str, query: Any) -> Any:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.server.names(bucket):
            low, high = query.get("startOffset", ""), query.get("endOffset")
            if not name.startswith(prefix) or name < low or (high and name >= high):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if delimiter and found:
                prefixes.add(prefix + head + delimiter)
            else:
                items.append(resource(bucket, name, self.server.objects[bucket, name]))
        answer = {"kind": "storage#objects", "items": items}
        return as_json(answer | {"prefixes": sorted(prefixes)})

    def _upload(self, method: str, bucket: str, query: Any, headers: Any, body: bytes):
        kind, name = query.get("uploadType"), query.get("name", "")
        if "upload_id" in query:
            return self._continue(query["upload_id"], headers, body)
        if kind == "media":
            return self._write(bucket, name, query, body)
        if kind == "multipart":
            typed = b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n"
            about, data = email.message_from_bytes(typed + body).get_payload()
            name = name or json.loads(about.get_payload())["name"]
            # As bytes: the parser of mails changes line ends.
            boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1]
            part = body.split(b"--" + boundary.encode())[2]
            end = b"\r\n" if part.startswith(b"\r\n") else b"\n"  # gcsfs sends these
            data = part.split(2 * end, 1)[1][: -len(end)]
            return self._write(bucket, name, query, data)
        name = name or json.loads(body or b"{}")["name"]
        session = str(next(COUNTER))
        self.server.sessions[session] = bucket, name, bytearray()
        base = f"{self.server.url}/upload/storage/v1/b/{bucket}/o"
        where = f"{base}?uploadType=resumable&upload_id={session}"
        return 200, {"Location": where, "X-GUploader-UploadID": session}, b""

    def _continue(self, session: str, headers: Any, body: bytes) -> Any:
        bucket, name, held = self.server.sessions[session]
        span = re.fullmatch(
            r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("Content-Range") or ""
        )
        if span and span[1]:
            del held[int(span[1]) :]
        held += body
        if not span or (span[3] != "*" and int(span[3]) == len(held)):
            return self._write(bucket, name, {}, bytes(held))
        more = {"Range": f"bytes=0-{len(held) - 1}"} if held else {}
        return 308, more, b""

    def _write(self, bucket: str, name: str, query: Any, data: bytes) -> Any:
        found = self.server.objects.get((bucket, name))
        if fails(query, found[0] if found else 0):
            return as_json({"error": {"code": 412, "message": name}}, 412)
        self.server.upload(bucket, name, data)
        return as_json(resource(bucket, name, self.server.objects[bucket, name]))

    def _batch(self, headers: Any, body: bytes) -> Any:
        typed = b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n"
        out = []
        for part in email.message_from_bytes(typed + body).get_payload():
            method, path, *_ = part.get_payload().split()
            path = urlsplit(path)._replace(scheme="", netloc="").geturl()
            status, _, answer = self._serve(method, path, {}, b"")
            out.append(
                "--end\r\nContent-Type: application/http\r\nContent-ID: <response-"
                f"{part['Content-ID'].strip('<>')}>\r\n\r\nHTTP/1.1 {status} X\r\n"
                f"Content-Type: application/json\r\n\r\n{answer.decode()}\r\n"
            )
        text = "".join(out) + "--end--"
        return 200, {"Content-Type": "multipart/mixed; boundary=end"}, text.encode()


def fails(query: Any, generation: int) -> bool:
    """Whether a precondition does not hold; generation 0: there is no object."""
    wanted = query.get("ifGenerationMatch")
    return wanted is not None and int(wanted) != generation


def as_json(value: Any, status: int = 200) -> Any:
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    return status, headers, json.dumps(value).encode()


def missing(name: str) -> Any:
    return as_json({"error": {"code": 404, "message": f"No such object: {name}"}}, 404)


def resource(bucket: str, name: str, found: tuple[int, float, bytes]) -> dict[str, Any]:
    generation, when, data = found
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
    stamp += f".{int(when % 1 * 1000):03d}Z"
    crc = google_crc32c.value(data).to_bytes(4, "big")
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{generation}",
        "bucket": bucket,
        "name": name,
        "generation": str(generation),
        "metageneration": "1",
        "size": str(len(data)),
        "timeCreated": stamp,
        "updated": stamp,
        "contentType": "application/octet-stream",
        "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        "crc32c": base64.b64encode(crc).decode(),
        "etag": str(generation),
    }
