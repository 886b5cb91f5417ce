"""The tests of kvserver: real servers on free ports, real sockets, real processes. Run: python3 -m unittest

The tests log in hundreds of times, so they patch the cost of scrypt. The program has no switch for that on purpose.
"""

from __future__ import annotations

import ast
import base64
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import fractions
import functools
import gc
import glob
import hashlib
import html
import html.parser
import http.client
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import resource
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import urllib.parse
import urllib.request
import warnings
import weakref
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, cast
from unittest import mock

import kvserver

PROGRAM = os.path.abspath(kvserver.__file__)
REAL_LOG = kvserver.log
README = os.path.join(os.path.dirname(PROGRAM), "README.md")
WAIT_SECONDS = 20  # a test waits so long for events that should come at once
# The long evidence (random requests, histories, kills) runs a short round unless KVSERVER_TEST_LONG is set.
LONG = bool(os.environ.get("KVSERVER_TEST_LONG"))


def pem(kind: str, text: str) -> str:
    """Return base64 text as a file in PEM format (RFC 7468)."""
    lines = [f"-----BEGIN {kind}-----", *textwrap.wrap(text, 64), f"-----END {kind}-----", ""]
    return "\n".join(lines)


# Two certificates for localhost and 127.0.0.1 with their keys, and the first key encrypted. They are for tests only.
CERTIFICATE = pem(
    "CERTIFICATE",
    "MIIBejCCASCgAwIBAgIUW41TSLLc3YB1Uxn3V+hGPYr1FbwwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTAwMDEwMTAwMDAw"
    "MFoYDzIyMDAwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASIyhCd8CB9Sd1AbdXimIGq"
    "JQv3rDnP3oqnpGVZ5vjCXY+Q1qNpHwu/uMGHUQA5BYQW1Hm2NKuFAJ3gwHZaxKSOo04wTDAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwDwYD"
    "VR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQUMS357Hb/+cMPAXtUwFmCgA+f9PowCgYIKoZIzj0EAwIDSAAwRQIgH6tHJSwve2qlBxgLrh3ySugk42Qd"
    "v3y+3qcIr7PSXxMCIQD053RLanPTvsjvt7htpeWuJgb8FhQeLoQ0eLwq+BqznQ==",
)
KEY = pem(
    "PRIVATE KEY",
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg2a6daiEjeHNXsfwnHOEIOjJdPlTWVOOmU4T25fL8BHihRANCAASIyhCd8CB9Sd1A"
    "bdXimIGqJQv3rDnP3oqnpGVZ5vjCXY+Q1qNpHwu/uMGHUQA5BYQW1Hm2NKuFAJ3gwHZaxKSO",
)
OTHER_CERTIFICATE = pem(
    "CERTIFICATE",
    "MIIBezCCASCgAwIBAgIUXknCluheeBhN/5bOFDB7RjgVOzAwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTAwMDEwMTAwMDAw"
    "MFoYDzIyMDAwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASdz94T7GexL92VAsDkbPz3"
    "GOnf/Jle5m9o3tIx7htmVhDyUqg9ULhgO2D4mU6RQ8A5WF+yd5JU5NmwYPOjJplgo04wTDAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwDwYD"
    "VR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQUHArEwf3hQ4l69kQJ98sVkJRrLR8wCgYIKoZIzj0EAwIDSQAwRgIhAKONkoBjLGIouIFlnEiSVpoN9N5w"
    "QbStHobUfRLiZfHhAiEAsCvtCRvfqVBuaN4S4itcwYSj9wXE1pEYA97Lmwii66c=",
)
OTHER_KEY = pem(
    "PRIVATE KEY",
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0QHAesVMgdD/Fen82IcLGpqei0SPJ/HgX9ofVhjG6nChRANCAASdz94T7GexL92V"
    "AsDkbPz3GOnf/Jle5m9o3tIx7htmVhDyUqg9ULhgO2D4mU6RQ8A5WF+yd5JU5NmwYPOjJplg",
)
ENCRYPTED_KEY = pem(
    "ENCRYPTED PRIVATE KEY",
    "MIH0MF8GCSqGSIb3DQEFDTBSMDEGCSqGSIb3DQEFDDAkBBCezmeDNS45i6+2LNxigye5AgIIADAMBggqhkiG9w0CCQUAMB0GCWCGSAFlAwQBKgQQ"
    "l7I8u9uPUCAD3IqGXHv7EASBkIwFJ2hp9wa0Q+Pnnl5jtw1bW3hBJUHnxTiVIOcFXwKHeofTlvvpCZ4Da1bLoRNs7iItLTPVMrU3SCLYgSPzgQrr"
    "ydxugvtTbi+nOEddLEOQAxzgP+x8O4qzqoyI5yn+BzZG76LDhjWMtlE5Py7GiV+e6NA4M6ae9Dv9t9N9hHipWkXT3ksOqta/VNnq5WSySA==",
)
PASSWORDS = {"alice": "alice's password", "bob": "bob's pässword ☃"}
# Made by Werkzeug 3.1 from two passwords, with its default method and with the one before.
WERKZEUG_HASHES = {
    "admin's pässword": "scrypt:32768:8:1$E01eZtJMiow9H3WS$8fab4b30bff35f2194214986b0e358a514336c8c1151b21ec115095fe7c"
    "b474bae7a189fa82620a0ad762a0022c66e0f75c8208e27e38cedcb7a77bb1a01624c",
    "an old password": "pbkdf2:sha256:1000000$J5ZK2Hs3uAxFvfN1$e7cd7f246bac7de8502e89e6fed44312eda67ea466cb36099b35e18"
    "20e9245d8",
}


def basic(name: str, password: str) -> str:
    """Return the value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def url(path: str, **parameters: object) -> str:
    """Return a target with a query."""
    return path + "?" + urllib.parse.urlencode(parameters)


class Answer(NamedTuple):
    """A response; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def read_answer(response: http.client.HTTPResponse) -> Answer:
    """Return an http.client response as an Answer."""
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def read_all(connection: socket.socket) -> bytes:
    """Return everything that comes until the other side closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def statuses(answers: bytes) -> list[int]:
    """Return the status codes in the bytes from a server."""
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", answers)]


class CapturedLog:
    """Keeps the program's log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, level: str, message: str) -> None:
        self.lines.append(message)

    def text(self) -> str:
        return "\n".join(self.lines)


@contextlib.contextmanager
def captured_log() -> Iterator[CapturedLog]:
    """Keep the program's log away from the terminal."""
    log = CapturedLog()
    with mock.patch.object(kvserver, "log", log.write):
        yield log


@contextlib.contextmanager
def locked(database: str) -> Iterator[sqlite3.Connection]:
    """Lock a database against writes, as another process might, and give the connection that holds the lock."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")


@contextlib.contextmanager
def held(owner: object, name: str) -> Iterator[tuple[threading.Semaphore, threading.Event]]:
    """Hold up the calls of a function until the event is set; each call releases the semaphore first."""
    begun, release, function = threading.Semaphore(0), threading.Event(), getattr(owner, name)

    def wait_and_call(*arguments: Any, **named: Any) -> Any:
        begun.release()
        assert release.wait(WAIT_SECONDS)
        return function(*arguments, **named)

    with mock.patch.object(owner, name, wait_and_call):
        try:
            yield begun, release
        finally:
            release.set()


def execute(database: str, script: str) -> None:
    """Run SQL statements as another process might."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.executescript(script)


def in_threads(
    function: Callable[..., Any], arguments: Sequence[Sequence[Any]]
) -> list[concurrent.futures.Future[Any]]:
    """Call a function with each tuple of arguments, each call in a thread."""
    executor = concurrent.futures.ThreadPoolExecutor(len(arguments))
    calls = [executor.submit(function, *each) for each in arguments]
    executor.shutdown(wait=False)
    return calls


def join(calls: Iterable[concurrent.futures.Future[Any]]) -> list[Any]:
    """Wait for calls in threads, and return their results or raise their exceptions."""
    return [call.result(WAIT_SECONDS) for call in calls]


def wait_until(is_so: Callable[[], object]) -> None:
    """Return as soon as a condition holds; fail if that takes too long."""
    deadline = time.monotonic() + WAIT_SECONDS
    pause = threading.Event()  # lets the thread under test run between two looks
    while not is_so():
        pause.wait(0.001)
        if time.monotonic() > deadline:
            raise AssertionError("this takes too long")


class ServerCase(unittest.TestCase):
    """A server in this process with the users alice, an admin, and bob."""

    host = "127.0.0.1"
    base_path = kvserver.SETTINGS["base_path"].default
    log_requests = False
    poll_seconds = 0.01
    failures_max = 1000  # most tests are not about the throttle
    max_db_mb = kvserver.SETTINGS["max_db_mb"].default
    trusted_proxy: kvserver.Networks = ()
    cors_origin: Sequence[str] = ()
    certificate: kvserver.Certificate | None = None

    def setUp(self) -> None:
        self.patch("SCRYPT_COST_LOG2", 1)
        self.patch("POLL_SECONDS", self.poll_seconds)
        self.patch("FAILURES_MAX", self.failures_max)
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.database = os.path.join(self.folder, "test.db")
        self.log = self.enterContext(captured_log())
        self.start()
        for name, password in PASSWORDS.items():
            self.store.add_user(name, kvserver.hash_password(password), name == "alice")

    def patch(self, name: str, value: object) -> None:
        """Replace a constant or a function of the program until the test ends."""
        self.enterContext(mock.patch.object(kvserver, name, value))

    def start(self) -> None:
        self.store = kvserver.open_store(self.database)
        self.addCleanup(self.store.close)
        settings = {name: setting.default for name, setting in kvserver.SETTINGS.items()}
        settings |= {"host": self.host, "port": 0, "base_path": self.base_path, "log_requests": self.log_requests}
        settings |= {"max_db_mb": self.max_db_mb, "trusted_proxy": self.trusted_proxy, "cors_origin": self.cors_origin}
        self.settings = settings
        self.server = kvserver.Server(self.database, self.settings, self.certificate)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.addCleanup(self.stop)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(WAIT_SECONDS)
        self.assertFalse(self.thread.is_alive(), "the server does not stop")

    def new_connection(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        self.addCleanup(connection.close)
        return connection

    def request(
        self,
        method: str,
        target: str,
        body: bytes | str | None = None,
        content_type: str | None = None,
        user: str | None = "alice",
        headers: Mapping[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """Send a request. user is a name with a known password, or the value of an Authorization header."""
        sent = dict(headers or {})
        if user:
            sent["Authorization"] = basic(user, PASSWORDS[user]) if user in PASSWORDS else user
        if content_type:
            sent["Content-Type"] = content_type
        used = connection or self.new_connection()
        used.request(method, target, body.encode() if isinstance(body, str) else body, sent)
        answer = read_answer(used.getresponse())
        if used is not connection:
            used.close()
        return answer

    def check(self, status: int, method: str, target: str, *arguments: Any, **named: Any) -> Answer:
        """Send a request, and check the status of the response."""
        answer = self.request(method, target, *arguments, **named)
        self.assertEqual(status, answer.status, f"{method} {target} {arguments} {named}: {answer.body!r}"[:1000])
        return answer

    def fetch(
        self, target: str, method: str = "GET", body: str | None = None, user: str | None = "alice", **headers: str
    ) -> tuple[int, str]:
        """Return status and text of a response. Underscores in the names of headers become hyphens."""
        renamed = {name.replace("_", "-"): text for name, text in headers.items()}
        answer = self.request(method, target, body, user=user, headers=renamed)
        return answer.status, answer.body.decode()

    def get(self, key: str, user: str = "alice") -> bytes | None:
        answer = self.request("GET", url("/get", key=key), user=user)
        self.assertIn(answer.status, (200, 404))
        return answer.body if answer.status == 200 else None

    def pairs(self, user: str = "alice") -> dict[str, str]:
        return cast("dict[str, str]", json.loads(self.request("GET", "/list", user=user).body))

    def fill(self, count: int, user_id: int = 1) -> dict[str, str]:
        """Store values of the longest size, and return the pairs."""
        pairs = {str(number): "x" * kvserver.VALUE_BYTES_MAX for number in range(count)}
        for key, value in pairs.items():
            self.store.set_value(user_id, key, value)
        return pairs

    def connect(self, data: bytes = b"", has_small_buffer: bool = False) -> socket.socket:
        """Return a raw connection, after sending these bytes. A small buffer takes few bytes before they are read."""
        connection = self.enterContext(socket.socket())
        if has_small_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        connection.settimeout(WAIT_SECONDS)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(data)
        return connection

    def begin(self, request_line: str, *lines: str, body: bytes = b"", user: str = "alice") -> socket.socket:
        """Send a user's request on a new connection, and leave the response to the caller."""
        return self.connect(self.raw(request_line, *lines, body=body, user=user))

    def exchange(self, data: bytes, end: bool = False) -> bytes:
        """Send bytes, and return everything that comes until the server closes; end closes our direction."""
        connection = self.connect(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)

    def raw(self, request_line: str, *lines: str, body: bytes = b"", user: str = "alice") -> bytes:
        """Return a user's request as bytes, with a Host, and the lines given as further headers."""
        head = [request_line, "Host: localhost", "Authorization: " + basic(user, PASSWORDS[user]), *lines]
        return "\r\n".join(head).encode("utf-8") + b"\r\n\r\n" + body


class Api(ServerCase):
    """The promises to clients of IoT Persistence Api."""

    def test_set_get_del_and_list(self) -> None:
        self.assertEqual(b"{}", self.request("GET", "/list").body)
        for target, status, body, content_type in (
            ("/set?key=door&value=open", 200, b"Success", "text/plain; charset=utf-8"),
            ("/get?key=door", 200, b"open", "text/plain; charset=utf-8"),
            ("/set?key=door&value=closed", 200, b"Success", "text/plain; charset=utf-8"),
            ("/list", 200, b'{"door":"closed"}', "application/json"),
            ("/del?key=door", 200, b"Successfully removed state", "text/plain; charset=utf-8"),
            ("/list", 200, b"{}", "application/json"),
        ):
            answer = self.check(status, "GET", target)
            self.assertEqual((body, content_type), (answer.body, answer.headers["content-type"]))
        self.check(404, "GET", "/get?key=door")
        self.check(404, "GET", "/del?key=door")
        for key, value in (("b", "2"), ("a", '"'), ("é", "☃\0")):
            self.store.set_value(1, key, value)
        self.assertEqual({"a": '"', "b": "2", "é": "☃\0"}, self.pairs())

    def test_health_needs_no_login_and_notices_a_damaged_database(self) -> None:
        self.assertEqual(b"ok", self.check(200, "GET", "/health", user=None).body)
        self.check(200, "HEAD", "/health", user=None)
        self.check(400, "GET", "/health?a=1&a=2", user=None)
        execute(self.database, "DROP TABLE pair")
        self.check(503, "GET", "/health", user=None)
        with open(self.database, "r+b") as file:
            file.write(b"damaged" * 100)
        self.assertIn("retry-after", self.check(503, "GET", "/health", user=None).headers)

    def test_missing_parameters_are_400_and_only_an_explicit_empty_value_is_empty(self) -> None:
        for target in ("/set", "/set?key=a", "/set?value=a", "/set?key=a&value", "/get", "/get?key", "/del?key="):
            self.check(400, "GET", target)
        self.assertIn(b"in the URL (in quotes) or the body", self.check(400, "POST", "/set?key=a").body)
        self.check(400, "POST", "/set?key=a", "")
        self.assertNotIn("\n", self.fetch("/incr", "POST", "key=a&a\nb", Content_Type=kvserver.FORM)[1])
        self.assertEqual({}, self.pairs())
        self.check(200, "GET", "/set?key=a&value=")
        self.assertEqual({"a": ""}, self.pairs())

    def test_paths_exist_at_the_root_and_below_the_prefix(self) -> None:
        for target, body in (
            ("/iotpersistenceapi/set?key=a&value=1", b"Success"),
            ("/get?key=a", b"1"),
            ("/iotpersistenceapi/get?key=a", b"1"),
            ("/iotpersistenceapi/list", b'{"a":"1"}'),
            ("/iotpersistenceapi/health", b"ok"),
            ("/iotpersistenceapi/del?key=a", b"Successfully removed state"),
        ):
            self.assertEqual(body, self.check(200, "GET", target).body)
        self.stop()
        for self.base_path in ("/kv", "/Api/v1"):  # what is at the root stays there
            self.start()
            self.request("PUT", "/kv/a", "1")
            self.assertEqual(b"1", self.get("a"))
            self.stop()
        self.start()
        self.check(200, "GET", "/Api/v1/get?key=a")
        self.assertEqual(b"there is no such path; use /get", self.check(404, "GET", "/api/v1/get/").body)
        self.check(404, "GET", "/iotpersistenceapi/get?key=a")

    def test_query_is_form_encoded_or_raw_utf8(self) -> None:
        self.check(200, "GET", "/set?key=a+b%20c%2B&value=100%%zz")
        self.check(200, "GET", "/set?key=half&value=%4")
        self.exchange(self.raw("GET /set?key=tür&value=☃+☃ HTTP/1.1", "Connection: close"))
        self.assertEqual({"a b c+": "100%%zz", "half": "%4", "tür": "☃ ☃"}, self.pairs())

    def test_keys_come_back_unchanged_up_to_a_limit(self) -> None:
        keys = ["..", "/", "../../etc/passwd", "%2F", "%", " ", "a b", "😀", "a\nb", "?key=x&", "k" * 512, "é" * 256]
        for key in keys:
            self.check(200, "GET", url("/set", key=key, value="of " + key))
        self.assertEqual({key: "of " + key for key in keys}, self.pairs())
        for key in keys:
            self.assertEqual(("of " + key).encode(), self.get(key))
        for key in ("", "k" * 513, "é" * 257, "\0", "a\0b"):
            self.check(400, "GET", url("/set", key=key, value="1"))
        self.assertEqual(len(keys), len(self.pairs()))

    def test_value_may_be_as_long_as_the_limit(self) -> None:
        longest = "é" * (kvserver.VALUE_BYTES_MAX // 2)
        self.check(200, "POST", "/set?key=a", longest)
        too_long = "x" * (kvserver.VALUE_BYTES_MAX + 1)
        self.check(413, "POST", "/set?key=a", too_long)
        self.check(413, "POST", "/set", "key=a&value=" + too_long, kvserver.FORM)
        self.check(413, "POST", "/set", json.dumps({"key": "a", "value": too_long}), kvserver.JSON)
        self.assertEqual(longest.encode(), self.get("a"))

    def test_value_may_be_any_text(self) -> None:
        for value in ("", "\0", "a\0b", "\r\n", "\ufeff", " x ", "<script>", "😀", "\x7f\x80\uffff"):
            self.check(200, "GET", url("/set", key="a", value=value))
            self.assertEqual(value.encode(), self.get("a"))

    def test_invalid_utf8_is_400(self) -> None:
        for query in ("/set?key=a&value=%ff", "/set?key=%c3&value=a", "/set?key=a&value=%ed%a0%80", "/get?key=%ff"):
            self.check(400, "GET", query)
        self.check(400, "POST", "/set?key=a", b"\xff", "text/plain")
        for body in (b"key=a&value=%ff", b"key=a&value=\xff"):
            self.check(400, "POST", "/set", body, kvserver.FORM)
        for value in (b'"\xff"', b'"\\ud800"', b'["\\ud800"]'):
            self.check(400, "POST", "/set", b'{"key": "a", "value": %b}' % value, kvserver.JSON)
        self.check(400, "POST", "/set?value=1", b'{"key": "\\udfff"}', kvserver.JSON)
        self.assertEqual({}, self.pairs())

    def test_every_response_carries_the_same_headers(self) -> None:
        for user, method, target in (
            *(("alice", method, "/get?key=a") for method in ("GET", "HEAD")),
            *(("alice", "GET", target) for target in ("/set?key=a&value=1", "/get?key=a", "/list", "/get")),
            *((None, "GET", target) for target in ("/health", "/get?key=a", "/nowhere")),
            *((None, method, "/list") for method in ("POST", "BREW")),
        ):
            headers = self.request(method, target, user=user).headers
            self.assertEqual(("no-store", "nosniff"), (headers["cache-control"], headers["x-content-type-options"]))
            self.assertRegex(headers["content-length"], r"\A[0-9]+\Z")
            self.assertRegex(headers["date"], r"\A[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\Z")
            self.assertNotIn("transfer-encoding", headers)


class Methods(ServerCase):
    def test_set_and_del_take_get_post_and_put(self) -> None:
        for method in ("GET", "POST", "PUT"):
            for prefix in ("", "/iotpersistenceapi"):
                self.check(200, method, prefix + "/set?key=a&value=1")
                self.check(200, method, prefix + "/del?key=a")

    def test_head_is_get_without_the_body_and_never_writes(self) -> None:
        self.store.set_value(1, "a", "12345")
        for target in ("/get?key=a", "/list", "/health", "/get?key=unknown"):
            got, head = self.request("GET", target), self.request("HEAD", target)
            self.assertEqual((got.status, b""), (head.status, head.body), target)
            for name in ("content-length", "content-type"):
                self.assertEqual(got.headers[name], head.headers[name])
        for target in ("/set?key=a&value=2", "/del?key=a"):
            self.assertEqual("GET, POST, PUT, OPTIONS", self.check(405, "HEAD", target).headers["allow"])
        self.assertEqual({"a": "12345"}, self.pairs())

    def test_refusals_need_no_login(self) -> None:
        for status, requests in (
            (404, ("GET /", "GET /SET?key=a", "GET /get/", "GET /iotpersistenceapi/x", "GET /../get?key=a")),
            (405, ("POST /get?key=a", "DELETE /set", "PATCH /list", "TRACE /list")),
            (501, ("BREW /get", "get /get", "BREW /nowhere")),
        ):
            for request in requests:
                answer = self.check(status, *request.split(), user=None)
                self.assertEqual("text/plain; charset=utf-8", answer.headers["content-type"])
                self.assertRegex(answer.body, rb"\A[^\r\n]{10,}\Z")
                self.assertEqual(status == 405, "allow" in answer.headers)
        answer = self.request("POST", "/list", user=None)
        self.assertEqual("GET, HEAD, OPTIONS", answer.headers["allow"])
        self.assertEqual(b"/list does not take POST; use GET, HEAD", answer.body)
        answer = self.request("POST", "/kv/door/s3cr3t", user=None)  # the key ends with a value by mistake
        self.assertEqual(b"/kv/ does not take POST; use GET, HEAD, PUT, DELETE", answer.body)
        paths = b"/set, /get, /del, /incr, /toggle, /list, /kv/KEY, /history, /events, /health, /me/, /admin/"
        endpoints = b"Use the api endpoints: " + paths
        for path in ("/", "/s3cr3t", "/set&key=a&value=s3cr3t", "/set/s3cr3t"):
            self.assertEqual(endpoints, self.request("GET", path, user=None).body)

    def test_a_path_that_is_almost_right_gets_the_right_one(self) -> None:
        for wrong, right in (
            ("/set/", "/set"),
            ("//set", "/set"),
            ("/SET", "/set"),
            ("/KV/s3cr3t", "/kv/KEY"),
            ("/iotpersistenceapi/get/", "/get"),
            ("//IotPersistenceApi//Get", "/get"),
            ("/Admin/user/", "/admin/user"),
        ):
            answer = self.check(404, "GET", wrong + "?key=a&value=s3cr3t", user=None)
            self.assertEqual(f"there is no such path; use {right}", answer.body.decode(), wrong)

    def test_options_names_the_methods(self) -> None:
        for target, allow in (
            ("*", ", ".join(kvserver.METHODS)),
            ("/set", "GET, POST, PUT, OPTIONS"),
            ("/iotpersistenceapi/get?key=a", "GET, HEAD, OPTIONS"),
        ):
            answer = self.check(204, "OPTIONS", target, user=None)
            self.assertEqual((b"", allow), (answer.body, answer.headers["allow"]))
            self.assertNotIn("content-length", answer.headers)
        self.check(404, "OPTIONS", "/nowhere", user=None)

    def test_errors_are_problems_for_clients_that_take_json(self) -> None:
        hint = "send key=TEXT in the URL (in quotes) or the body"
        detail = f"key is missing; {hint}"
        problem = {"title": "Bad Request", "status": 400, "detail": detail}
        for accept in ("text/html, application/json;q=0.5", "application/ld+json", "APPLICATION/JSON"):
            answer = self.check(400, "GET", "/get", headers={"Accept": accept})
            self.assertEqual("application/problem+json", answer.headers["content-type"])
            self.assertEqual(problem, json.loads(answer.body))
        for accept in ("*/*", "text/plain", "application/*"):
            self.assertEqual(detail.encode(), self.check(400, "GET", "/get", headers={"Accept": accept}).body)


class Bodies(ServerCase):
    def assert_stored(self, expected: Mapping[str, str], target: str, body: str, content_type: str | None) -> None:
        """Check that a POST and a PUT each leave exactly these pairs."""
        for method in ("POST", "PUT"):
            self.assertEqual(b"Success", self.check(200, method, target, body, content_type).body)
            self.assertEqual(expected, self.pairs())
            for key in expected:
                self.store.delete_pair(1, key)

    def assert_refused(self, content_type: str | None, target: str, *bodies: str) -> None:
        """Check that a POST of each body is refused and stores nothing."""
        for body in bodies:
            self.check(400, "POST", target, body, content_type)
            self.assertEqual({}, self.pairs())

    def test_form_and_json_bodies(self) -> None:
        for content_type, expected, target, body in (
            (kvserver.FORM, {"a b": "c d%"}, "/set", "key=a+b&value=c%20d%"),
            (kvserver.FORM, {"a": "1"}, "/set?value=1", "key=a"),
            (kvserver.FORM, {"a": "1"}, "/set?key=a", "value=1"),
            (kvserver.FORM, {"a": "1"}, "/set?key=a", "ttl=100&value=1"),
            (kvserver.FORM, {"a": ""}, "/set?key=a", "value="),
            (kvserver.FORM + "; charset=UTF-8", {"a": "é"}, "/set", "key=a&value=é"),
            ("Application/JSON; charset=utf-8", {"a": "1"}, "/set", '{"key": "a", "value": "1"}'),
            (kvserver.JSON, {"a": "1"}, "/set", '\ufeff{"key": "a", "value": "1"}'),
            (kvserver.JSON, {"a": "é"}, "/set?value=%C3%A9", '{"key": "a"}'),
        ):
            self.assert_stored(expected, target, body, content_type)
        for value in ("1", "1.5", "true", "null", "[]", '{"ä": [1, "☃"]}', "-0.0", str(10**30)):  # stored as JSON
            self.assert_stored({"a": value}, "/set", f'{{"key": "a", "value": {value}}}', kvserver.JSON)

    def test_bad_json_is_400(self) -> None:
        many = json.dumps({"key": "a", "value": "1", **{str(number): 1 for number in range(99)}})
        self.assert_refused(kvserver.JSON, "/set", "{", "[]", '"a"', "null", '{"value": "a"}', many)
        self.assert_refused(kvserver.JSON, "/set?value=1", '{"key": 1}', '{"key": null}', '{"key": "a"} x')
        for value in ("NaN", "-Infinity", "[Infinity]", "1e999", "9" * 5000, '{"b": 1, "b": 2}', '"1", "value": "2"'):
            self.assert_refused(kvserver.JSON, "/set", f'{{"key": "a", "value": {value}}}')

    def test_deeply_nested_json_is_400_in_linear_time(self) -> None:
        deepest = kvserver.JSON_DEPTH_MAX - 1  # the object around it counts too
        many = json.dumps([[], {}] * 500 + ["[" * 500, '\\"{'])
        for value in ("[" * deepest + "]" * deepest, many):
            self.assert_stored({"a": value}, "/set", f'{{"key": "a", "value": {value}}}', kvserver.JSON)
        for depth in (deepest + 1, 200_000):
            body = '{"key": "a", "value": ' + "[" * depth + "]" * depth + "}"
            self.assert_refused(kvserver.JSON, "/set", body, '{"a":' * depth)
        started = time.process_time()
        self.assert_refused(kvserver.JSON, "/set", "[" * 101 + '"' + '\\"' * 400_000)
        self.assertLess(time.process_time() - started, 5)  # quadratic time would be minutes

    def test_a_repeated_name_is_400(self) -> None:
        self.assert_refused(None, "/set?key=a&key=b&value=1", "")
        self.assert_refused(None, "/set?key=a&value=1&value=1", "")
        self.assert_refused(kvserver.JSON, "/set?key=a&value=1", '{"value": "2"}')
        self.assert_refused(kvserver.FORM, "/set?key=a&value=1", "value=2")
        self.assert_refused(kvserver.FORM, "/set?key=a", "key=b&value=2")
        self.assert_refused(kvserver.FORM, "/set", "key=a&value=1&k%65y=a")

    def test_over_100_parameters_are_400(self) -> None:
        hundred = "key=a&value=1" + "".join(f"&x{number}=1" for number in range(98))
        self.assertIn(b"'x0' is unknown", self.check(400, "GET", "/set?" + hundred).body)
        self.assertIn(b"more than 100", self.check(400, "GET", f"/set?{hundred}&y=1").body)
        self.assertIn(b"more than 100", self.check(400, "POST", "/set", hundred + "&y=1", kvserver.FORM).body)
        self.assertEqual({}, self.pairs())

    def test_body_is_the_value_when_the_query_has_only_the_key(self) -> None:
        for content_type, bodies in (
            ("application/octet-stream", ("ON",)),
            (kvserver.FORM, ("on", "on=off", "xvalue=1", "value", "100%&")),
            (kvserver.JSON, ('{"key": "b", "value": "1"}', "{")),
            ("text/plain", ("value=1",)),
            (None, ("plain",)),
            ("image/png", ("é\0\r\n",)),
        ):
            for body in bodies:
                self.assert_stored({"a": body}, "/set?key=a", body, content_type)

    def test_bodies_that_are_not_plain_utf8_text_are_415_and_not_stored(self) -> None:
        form = '--x\r\nContent-Disposition: form-data; name="value"\r\n\r\n1\r\n--x--\r\n'
        for method, target, other in (
            ("POST", "/set?key=a", f"{kvserver.FORM}, or "),
            ("PUT", "/set", f"{kvserver.FORM}, or "),
            ("POST", "/del?key=a", f"{kvserver.FORM}, or "),
            ("PUT", "/kv/a", ""),
        ):
            answer = self.check(415, method, target, form, "Multipart/Form-Data; boundary=x")
            self.assertTrue(answer.body.endswith(f"; send {other}the value alone".encode()), answer.body)
            for charset in ("utf-16", "UTF-16LE", '"utf-16"', "'iso-8859-1'", "utf-8-sig", "utf-8; charset=utf-16", ""):
                answer = self.check(415, method, target, "open".encode("utf-16-le"), f"text/plain; charset={charset}")
                self.assertIn(b"send UTF-8", answer.body)
            for coding in ("gzip", "GZip, identity", "deflate", "x"):
                for body in (b"open", b""):
                    answer = self.check(415, method, target, body, "text/plain", headers={"Content-Encoding": coding})
                    self.assertIn(b"without Content-Encoding", answer.body)
                    self.assertEqual("identity", answer.headers["accept-encoding"])
        self.assertEqual({}, self.pairs())
        for charset in ("utf-8", "UTF8", '"Utf-8"', "us-ascii", "ASCII", "'utf-8'", 'utf-8; format="flowed"'):
            for separator in (";charset=", "; Charset = "):
                headers = {"Content-Encoding": "Identity"}
                answer = self.check(201, "PUT", "/kv/a", "é", f"text/plain{separator}{charset}", headers=headers)
                self.assertEqual({"a": "é"}, self.pairs())
                self.store.delete_pair(1, "a")
        self.check(404, "GET", "/get?key=a", None, "text/plain; charset=utf-16")  # no body, no charset

    def test_body_without_a_meaning_is_400(self) -> None:
        self.assert_refused(None, "/set?key=a&value=1", "on")
        for target, body in (("?key=a&value=1", "on"), ("?value=1", "on"), ("", "key=a&value=1"), ("?key=a", "")):
            self.assert_refused("text/plain", "/set" + target, body)

    def test_only_set_takes_a_body_as_the_value(self) -> None:
        self.store.set_value(1, "a", "1")
        for method, target in (("PUT", "/del?key=a"), ("GET", "/get?key=a"), ("GET", "/list")):
            self.check(400, method, target, "on", "text/plain")
        self.assertEqual(b"1", self.check(200, "GET", "/get", "key=a", kvserver.FORM).body)
        self.assertEqual(b"1", self.check(200, "GET", "/get", '{"key": "a"}', kvserver.JSON).body)
        self.check(200, "POST", "/del", '{"key": "a"}', kvserver.JSON)
        self.assertEqual({}, self.pairs())

    def test_post_without_length_has_an_empty_body_and_closes(self) -> None:
        for status, query in ((200, "key=a&value=1"), (400, "key=b")):
            for version in ("1.0", "1.1"):
                data = self.raw(f"POST /set?{query} HTTP/{version}", "Connection: close")
                self.assertEqual([status], statuses(self.exchange(data)), query)
        for status, extra in ((200, b""), (200, b"\r\n"), (411, self.raw("GET /get?key=a HTTP/1.1"))):
            answer = self.exchange(self.raw("POST /incr?key=n HTTP/1.1") + extra)
            self.assertEqual(([status], True), (statuses(answer), b"\r\nConnection: close\r\n" in answer))
        self.assertEqual({"a": "1", "n": "2"}, self.pairs())

    def test_a_body_without_length_is_411_and_closes(self) -> None:
        self.patch("REQUEST_SECONDS", 10 * WAIT_SECONDS)
        bodies = (b"open", b"GETTING", b"get /x HTTP/1.1\r\n\r\n", b'{"a": 1}', b" ", b"\xff", b"a" * 100_000)
        for request, expected in (
            ("POST /set?key=a HTTP/1.1", 411),
            ("PUT /set?key=a&value=1 HTTP/1.1", 411),
            ("PUT /kv/a HTTP/1.0", 411),
            ("POST /me/ HTTP/1.1", 411),
            ("POST /nowhere HTTP/1.1", 404),
            ("PUT /get?key=a HTTP/1.1", 405),
        ):
            for body in bodies:
                answer = self.exchange(self.raw(request, body=body), end=True)
                self.assertEqual([expected], statuses(answer), (request, body))
                if expected == 411:
                    self.assertIn(b"\r\nConnection: close\r\n", answer)
                    self.assertIn(b"send the header Content-Length", answer)
        stranger = self.raw("PUT /kv/a HTTP/1.1", "Origin: null", body=b"open")
        self.assertEqual([403], statuses(self.exchange(stranger, end=True)))
        self.assertEqual([401], statuses(self.exchange(stranger.replace(b"Basic", b"Other"), end=True)))
        self.assertEqual(
            [411], statuses(self.exchange(self.raw("PUT /kv/a HTTP/1.1")))
        )  # it would store an empty value
        self.assertEqual({}, self.pairs())

    def test_a_late_body_without_length_gets_no_second_response(self) -> None:
        self.patch("REQUEST_SECONDS", 10 * WAIT_SECONDS)
        with held(kvserver, "check_same_site") as (begun, release):
            connection = self.begin("POST /incr?key=n HTTP/1.1")
            self.assertTrue(begun.acquire(timeout=WAIT_SECONDS))
            connection.sendall(b"open")
            release.set()
            self.assertEqual([411], statuses(read_all(connection)))
        for body in (b"open", b"GET open\r\n\r\n", b'{"a": 1}\r\n\r\n', b"\0", b"x" * 100_000):
            for status, request in ((200, "POST /incr?key=n HTTP/1.1"), (404, "PUT /nowhere HTTP/1.1")):
                connection = self.begin(request)
                self.assertEqual([status], statuses(connection.recv(65536)))
                connection.sendall(body)
                self.assertEqual(b"", read_all(connection))
        closing = self.begin("POST /incr?key=n HTTP/1.1", "Connection: close")
        self.assertEqual([200], statuses(read_all(closing)))
        closing.sendall(b"open")
        closing.sendall(b"open")  # not reset: the client may still read its response

    def test_chunked_body(self) -> None:
        chunks = b'2;x="y"\r\nop\r\n2\r\nen\r\n0\r\nTrailer: x\r\n\r\n'
        self.begin("POST /set?key=a HTTP/1.1", "Transfer-Encoding: chunked", body=chunks).recv(65536)
        self.assertEqual({"a": "open"}, self.pairs())

    def test_a_long_body_is_read_while_others_are_served(self) -> None:
        body = b"key=a&value=" + b"%41" * kvserver.QUICK_BODY_BYTES_MAX
        head = ("POST /set HTTP/1.1", "Content-Type: " + kvserver.FORM, f"Content-Length: {len(body)}")
        parse = kvserver.parse_parameters
        with held(kvserver, "parse_parameters") as (parsing, release):
            connection = self.connect(self.raw(*head, body=body))
            self.assertTrue(parsing.acquire(timeout=WAIT_SECONDS))
            with mock.patch.object(kvserver, "parse_parameters", parse):
                self.assertIsNone(self.get("a"))
            release.set()
            self.assertEqual([200], statuses(connection.recv(65536)))
        self.assertEqual(b"A" * kvserver.QUICK_BODY_BYTES_MAX, self.get("a"))


class Messages(ServerCase):
    """What a refusal says."""

    def test_a_mistake_is_named_with_the_way_out(self) -> None:
        takes = "/set takes: key, value, ttl, nx, old"
        json_body, form = ("POST", kvserver.JSON), ("POST", kvserver.FORM)
        limit = kvserver.BODY_BYTES_MAX
        long_value, long_body = "x" * (kvserver.VALUE_BYTES_MAX + 1), "x" * (limit + 1)
        for status, message, target, *more in (
            (400, "this looks like JSON; add the header Content-Type: application/json", "/set", '{"key":"a"}', *form),
            (400, "this looks like JSON; add the header Content-Type: application/json", "/del", "\ufeff {}", "PUT"),
            (400, "'kye' is unknown; send key; /get takes: key, default, format, wait, unless", "/get?kye=a"),
            (400, f"'lamp' is unknown; send key; send value; {takes}", "/set", "lamp=on", *form),
            (400, f"'valeu' is unknown; send value; {takes}", "/set?key=a&valeu=on"),
            (400, f"'ttll' is unknown; {takes}", "/set?key=a&ttll=5", "on", "POST"),
            (400, "'act' is unknown; send action; /me/ takes: action", "/me/", "act=set", *form),
            (400, "a parameter has no value; write NAME=VALUE, and & in a value as %26", "/set?key=a&value=b&s3cr3t"),
            (400, "is '5m'; send 0.001 to 315360000 seconds, such as 1.5", "/set?key=a&value=1&ttl=5m"),
            (400, f"the parameter ttl is '{'1' * 40}'; send", "/set?key=a&value=1&ttl=" + "1" * 50),
            (400, "parameter wait is 'long'; send 0 to 60 seconds, such as 1.5", "/get?key=a&unless=&wait=long"),
            (400, "the parameter limit is 'all'; send a number from 1 to 10000", "/list?limit=all"),
            (400, "is malformed at line 2, column 10", "/set", '{"key": "s3cr3t",\n"value": s3cr3t}', *json_body),
            (400, "has half a surrogate pair, or a number such as NaN", "/set", '{"value": NaN}', *json_body),
            (400, "a name in the JSON is repeated", "/set", '{"value": {"s3cr3t": 1, "s3cr3t": 2}}', *json_body),
            (400, "'value' is repeated; send it once", "/set?value=s3cr3t&value=s3cr3t"),
            (400, "value is missing; send value=TEXT in the URL (in quotes) or the body; if", "/set?key=a", "", "POST"),
            (404, "there is no such key; missing=ok allows this", "/del?key=a"),
            (404, kvserver.UNKNOWN_KEY, "/kv/a"),
            (413, "the value is too large: 1048577 bytes; the limit is 1048576", "/set?key=a", long_value, "POST"),
            (413, f"the body is too large: {limit + 1} bytes; the limit is {limit}", "/kv/a", long_body, "PUT"),
        ):
            body, method, content_type = (*more, None, None, None)[:3]
            answer = self.check(status, method or "GET", target, body, content_type)
            self.assertIn(message, answer.body.decode())
            self.assertNotIn(b"s3cr3t", answer.body)
        self.assertEqual({}, self.pairs())

    def test_a_refusal_shows_no_stored_value(self) -> None:
        self.store.set_value(1, "a", "s3cr3t")
        for query in (
            "/toggle?",
            "/incr?",
            "/set?nx=1&value=1&",
            "/set?old=1&value=s3cr3t&",
            "/toggle?values=on,s3cr3t1&",
        ):
            answer = self.check(409, "GET", query + "key=a")
            self.assertNotIn(b"s3cr3t", answer.body)
        for query in ("/toggle?values=s3cr3t", "/incr?by=s3cr3t", "/set?value=1&nx=s3cr3t", "/get?format=s3cr3t"):
            self.assertNotIn(b"s3cr3t", self.check(400, "GET", query + "&key=a").body)

    def test_refusals_of_a_login_or_a_site_say_what_a_program_needs(self) -> None:
        for user in ("kv_s3cr3ts3cr3t", "kv_ s3cr3t"):
            message = b"the word Bearer is missing before the token; send Authorization: Bearer TOKEN"
            self.assertEqual(message, self.check(401, "GET", "/list", user=user).body)
        latin = "Basic " + base64.b64encode("alice:grün".encode("latin-1")).decode()
        for login, message in (
            (None, b"log in with user and password (curl -u USER:PASSWORD), or Authorization: Bearer TOKEN"),
            (latin, b"the login is not USER:PASSWORD in UTF-8"),
            (basic("alice", "wrong"), b"the user name or password is wrong"),
        ):
            self.assertEqual(message, self.check(401, "GET", "/list", user=login).body)
        answer = self.check(403, "GET", "/set?key=a&value=1", headers={"Origin": "http://other.example"})
        for hint in (b"open the page here", b"leave out Origin and Referer", b"Authorization: Bearer TOKEN"):
            self.assertIn(hint, answer.body)


class Logins(ServerCase):
    def try_password(self, status: int, name: str, password: str) -> None:
        self.check(status, "GET", "/list", user=basic(name, password))

    def count_scrypt(self) -> mock.Mock:
        return cast("mock.Mock", self.enterContext(mock.patch.object(kvserver, "scrypt", wraps=kvserver.scrypt)))

    def test_no_and_bad_credentials_are_401(self) -> None:
        for target in ("/set?key=a&value=1", "/get?key=a", "/del?key=a", "/iotpersistenceapi/list"):
            self.check(401, "GET", target, user=None)
        password = PASSWORDS["alice"]
        for authorization in (
            *(basic("alice", wrong) for wrong in ("wrong password", PASSWORDS["bob"], "", password + "\0")),
            *(basic(name, password) for name in ("ALICE", "nobody", "", "alice\n")),
            *("Basic " + text for text in ("YWxpY2U=", "YWxpY2U6/w==", basic("alice", "x" * 6000)[6:])),
            *("Basic", "Basic ", "Basic !!!!", basic("alice", password) + "!", "Bearer x", password, "", None),
        ):
            headers = {} if authorization is None else {"Authorization": authorization}
            answer = self.check(401, "GET", "/list", user=None, headers=headers)
            self.assertEqual('Basic realm="kvserver", charset="UTF-8"', answer.headers["www-authenticate"])
        self.assertEqual({}, self.pairs())

    def test_password_may_contain_colons_and_any_letter(self) -> None:
        self.store.set_password_hash("bob", kvserver.hash_password("a:b:☃ç😀 "))
        self.try_password(200, "bob", "a:b:☃ç😀 ")
        self.try_password(401, "bob", "a:b:☃ç😀")

    def test_only_the_first_good_request_pays_for_scrypt(self) -> None:
        scrypt = self.count_scrypt()
        good, wrong = PASSWORDS["alice"], "wrong password"
        steps = ((200, good, 1), (200, good, 1), (401, wrong, 2), (401, "another one", 3), (200, good, 3))
        for status, password, count in steps:
            self.try_password(status, "alice", password)
            self.assertEqual(count, scrypt.call_count)

    def test_unknown_user_costs_a_scrypt_like_a_wrong_password_and_control_characters_cost_none(self) -> None:
        scrypt = self.count_scrypt()
        for password in (PASSWORDS["alice"] + "\0", "\x7f" * 8, "tab\there"):
            self.try_password(401, "alice", password)
        scrypt.assert_not_called()
        for name in ("nobody", "alice"):
            self.try_password(401, name, "wrong password")
        unknown, known = (call.args for call in scrypt.call_args_list)
        self.assertEqual(known[2:], unknown[2:])
        self.assertEqual([len(known[0]), len(known[1])], [len(unknown[0]), len(unknown[1])])

    def test_credentials_must_still_be_good_when_the_body_has_come(self) -> None:
        token = kvserver.make_token()
        self.store.add_token("bob", kvserver.hash_token(token), "", False, "")
        password_hash = kvserver.hash_password(PASSWORDS["bob"])
        requests = (("PUT", "/kv/a", "1"), ("GET", "/list", "prefix=a"), ("POST", "/me/", "action=set&key=a&value=1"))
        logins = (basic("bob", PASSWORDS["bob"]), "Bearer " + token)
        for authorization, (method, path, body) in list(itertools.product(logins, requests))[:-1]:
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\nExpect: 100-continue\r\n"
            head += f"Content-Type: {kvserver.FORM}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection = self.connect(head.encode())
            self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", connection.recv(100))
            self.store.set_password_hash("bob", kvserver.hash_password("another password"))
            self.store._execute("UPDATE token SET digest = x'00'")
            connection.sendall(body.encode())
            self.assertEqual([401], statuses(connection.recv(65536)), path)
            self.store.set_password_hash("bob", password_hash)
            self.store._execute("UPDATE token SET digest = ?", kvserver.hash_token(token))
        self.assertEqual({}, self.pairs("bob"))

    def test_remembered_credentials_are_bounded(self) -> None:
        self.patch("CREDENTIALS_MAX", 2)
        self.store.add_user("carol", kvserver.hash_password("a password"), False)
        self.enterContext(mock.patch.dict(PASSWORDS, carol="a password"))
        scrypt = self.count_scrypt()
        for user, count in (("alice", 1), ("bob", 2), ("bob", 2), ("carol", 3), ("carol", 3), ("alice", 4)):
            self.check(200, "GET", "/list", user=user)
            self.assertEqual(count, scrypt.call_count)

    def test_failed_login_is_one_line_in_the_log(self) -> None:
        self.try_password(401, "eve' address=1.2.3.4 é☃", "a guessed password")
        self.check(401, "GET", "/list", user="Basic " + base64.b64encode(b"a lone password").decode())
        names = ('"eve\' address=1.2.3.4 é☃"', "''")
        self.assertEqual([f"login failed: user={name} address=127.0.0.1" for name in names], self.log.lines)

    def test_hash_with_other_parameters_is_renewed_at_the_next_login(self) -> None:
        self.check(200, "GET", "/list")
        self.stop()
        self.patch("SCRYPT_COST_LOG2", 2)
        self.start()
        self.assertIn("$scrypt$ln=1,r=8,p=5$", str(self.store.user("alice")))
        with mock.patch.object(kvserver.Store, "set_password_hash", side_effect=sqlite3.OperationalError("disk full")):
            self.check(200, "GET", "/list")  # a login is good even if its new hash cannot be stored
        self.stop()
        self.start()
        with locked(self.database), mock.patch.object(kvserver, "DATABASE_LOCK_SECONDS", 1000):
            self.check(200, "GET", "/list")  # the response does not wait until the new hash is stored
        wait_until(lambda: "$scrypt$ln=2,r=8,p=5$" in str(self.store.user("alice")))
        self.check(200, "GET", "/list")
        scrypt = self.count_scrypt()
        self.check(200, "GET", "/list")
        scrypt.assert_not_called()


class Checks(ServerCase):
    """Passwords that wait for the one thread that checks them."""

    def setUp(self) -> None:
        super().setUp()
        self.check(200, "GET", "/list", user="bob")
        self.checked: list[tuple[str, int]] = []  # passwords, and the thread that checked them
        self.release = threading.Event()
        self.addCleanup(self.release.set)
        verify = kvserver.verify_password

        def wait_and_verify(password: str, stored: str) -> bool:
            self.checked.append((password, threading.get_ident()))
            return self.release.wait(WAIT_SECONDS) and verify(password, stored)

        self.patch("verify_password", wait_and_verify)

    def login(self, password: str, name: str = "alice") -> socket.socket:
        with mock.patch.dict(PASSWORDS, {name: password}):
            return self.begin("GET /get?key=a HTTP/1.1", user=name)

    def assert_answered(self, status: int, *connections: socket.socket) -> None:
        """Check the status that comes next on each connection; 503 must say when to try again."""
        for connection in connections:
            answer = connection.recv(65536)
            self.assertEqual([status], statuses(answer))
            self.assertEqual(status == 503, b"\r\nRetry-After: 5\r\n" in answer)

    def test_a_check_of_a_hash_from_another_program_delays_nobody_else(self) -> None:
        self.store.add_user("carol", "pbkdf2:sha256:1$salt$" + "0" * 64, is_admin=False)
        carol = self.login("a password", "carol")
        wait_until(lambda: len(self.checked) == 1)
        alice = self.login("wrong")
        wait_until(lambda: len(self.checked) == 2)
        self.assertNotEqual(self.checked[0][1], self.checked[1][1])
        self.release.set()
        self.assert_answered(401, alice, carol)

    def test_requests_with_the_same_header_share_one_check(self) -> None:
        connections = [self.login(PASSWORDS["alice"]) for _ in range(20)]
        wait_until(lambda: len(self.server.connections) >= 20 and self.checked)
        self.check(200, "GET", "/set?key=a&value=1", user="bob")  # known clients do not wait
        self.release.set()
        self.assert_answered(404, *connections)
        login = basic("alice", PASSWORDS["alice"])
        for spelling in (login.replace("Basic ", "bAsIc   "), login.replace("Basic", "BASIC")):
            self.check(200, "GET", "/list", user=spelling)
        self.assertEqual(1, len(self.checked))

    def test_one_thread_makes_all_checks_and_one_login_too_many_is_503_at_once(self) -> None:
        waiting = [self.login(f"wrong {number}") for number in range(kvserver.CHECKS_MAX)]
        wait_until(lambda: len(self.server.authenticator._waiting) == kvserver.CHECKS_MAX)
        self.assert_answered(503, self.login("one more"))
        self.release.set()
        self.assert_answered(401, *waiting)
        self.assert_answered(401, self.login("one more"))
        self.assertEqual(1, len({thread for _, thread in self.checked}))

    def test_a_check_that_takes_too_long_is_503_and_counts_for_the_next_try(self) -> None:
        with mock.patch.object(kvserver, "CHECK_SECONDS", 0.05):
            self.assert_answered(503, self.login(PASSWORDS["alice"]))
        self.release.set()
        wait_until(lambda: len(self.server.authenticator._verified) == 2)
        self.assert_answered(404, self.login(PASSWORDS["alice"]))
        self.assertEqual(1, len(self.checked))

    def test_a_password_changed_during_its_check_is_checked_again(self) -> None:
        connection = self.login(PASSWORDS["alice"])
        wait_until(lambda: self.checked)
        self.store.set_password_hash("alice", kvserver.hash_password("another password"))
        self.release.set()
        self.assert_answered(401, connection)
        self.assertEqual(2, len(self.checked))

    def test_a_request_after_a_change_of_password_does_not_join_an_older_check(self) -> None:
        early = self.login("the new password")
        wait_until(lambda: self.checked)
        self.store.set_password_hash("alice", kvserver.hash_password("the new password"))
        late = self.login("the new password")
        wait_until(lambda: len(self.server.authenticator._waiting) == 2)
        self.release.set()
        self.assert_answered(401, early)
        self.assert_answered(404, late)


class Commits(ServerCase):
    """Writes that share a commit, reads meanwhile, and rows that are remembered."""

    def setUp(self) -> None:
        super().setUp()
        for user in PASSWORDS:
            self.pairs(user)  # now the passwords are known
        self.sizes: list[int] = []  # how many changes each commit had
        self.after_commit: Callable[[], object] = int
        self.also: list[Callable[[kvserver.Store], Any]] = []  # further operations for the next commit
        commit = self.server.writer.commit

        def note_and_commit(operations: Sequence[Callable[[kvserver.Store], Any]], begin: bool = False) -> list[Any]:
            self.sizes.append(len(operations))
            also, self.also = self.also, []
            results = commit([*operations, *also], begin)
            self.after_commit()
            return results[: len(operations)]

        self.enterContext(mock.patch.object(self.server.writer, "commit", note_and_commit))

    def begin_set(self, key: str, user: str = "alice") -> socket.socket:
        return self.begin(f"GET /set?key={key}&value=1 HTTP/1.1", user=user)

    def test_waiting_writes_share_one_commit_and_each_fails_alone(self) -> None:
        with locked(self.database) as other:
            connections = [self.begin_set(str(number)) for number in range(20)]
            connections += [self.begin("GET /set?key=a HTTP/1.1"), self.begin_set("b", "bob")]
            wait_until(lambda: len(self.server.changes) == 22)
            other.execute("DELETE FROM user WHERE name = 'bob'")
        answers = [statuses(connection.recv(65536)) for connection in connections]
        self.assertEqual([*[[200]] * 20, [400], [401]], answers)
        self.assertEqual([22], self.sizes)
        self.assertEqual({str(number): "1" for number in range(20)}, self.pairs())

    def test_writes_wait_for_each_other_while_others_ask_but_not_for_long(self) -> None:
        run_once = kvserver.Loop.run_once
        self.enterContext(
            mock.patch.object(kvserver.Loop, "run_once", lambda loop, may_wait: run_once(loop, False) or True)
        )
        self.patch("GATHER_SECONDS_MAX", 60)
        idle = self.connect()
        wait_until(lambda: len(self.server.connections) == 1)
        self.server.writer.commit_seconds = 120
        connections = [self.begin_set("a"), self.begin_set("b")]
        wait_until(lambda: len(self.server.changes) == 2)
        self.assertEqual([], self.sizes)
        idle.sendall(self.raw("GET /set?key=c&value=1 HTTP/1.1"))
        for connection in (*connections, idle):
            self.assertEqual([200], statuses(connection.recv(65536)))
        self.patch("GATHER_SECONDS_MAX", 0.05)
        self.assertEqual([200], statuses(self.begin_set("d").recv(65536)))
        self.assertEqual([3, 1], self.sizes)

    def test_a_slow_disk_delays_no_reads_and_a_write_behind_it_is_503_after_a_while(self) -> None:
        self.server.writer.commit_seconds = 1
        with held(self.server.writer, "commit") as (committing, release):
            connections = [self.begin_set("a")]
            self.assertTrue(committing.acquire(timeout=WAIT_SECONDS))
            with mock.patch.object(kvserver, "DATABASE_LOCK_SECONDS", 0.05):
                self.assertEqual("5", self.check(503, "GET", "/set?key=b&value=2").headers["retry-after"])
            connections.append(self.begin_set("c"))
            wait_until(lambda: len(self.server.changes) == 1)
            self.assertEqual(({}, None), (self.pairs(), self.get("a")))
            release.set()
            # Nobody can know whether a commit under way will succeed, so its write is answered only when it ends.
            self.assertEqual([[200]] * 2, [statuses(connection.recv(65536)) for connection in connections])
        self.assertEqual({"a": "1", "c": "1"}, self.pairs())

    def test_writers_read_what_they_wrote_while_the_disk_is_now_quick_now_slow(self) -> None:
        rates = random.Random(1)
        self.after_commit = lambda: setattr(self.server.writer, "commit_seconds", rates.choice((0, 1)))

        def write(name: str) -> None:
            connection = self.new_connection()
            for number in range(30):
                self.check(200, "GET", f"/set?key={name}&value={number}", connection=connection)
                answer = self.check(200, "GET", f"/get?key={name}", connection=connection)
                self.assertEqual(str(number).encode(), answer.body)

        join(in_threads(write, [(f"writer{number}",) for number in range(8)]))
        self.assertEqual({f"writer{number}": "29" for number in range(8)}, self.pairs())

    def read_pairs(self, **expected: str) -> int:
        """Check the values of some keys; return how many of them SQLite was asked for."""
        statements: list[str] = []
        self.server.reader._connection.set_trace_callback(statements.append)
        for key, value in expected.items():
            self.assertEqual(value.encode(), self.get(key))
        self.server.reader._connection.set_trace_callback(None)
        return sum("AS BLOB), updated, expires FROM pair" in statement for statement in statements)

    def test_sqlite_is_asked_only_for_rows_that_may_have_changed(self) -> None:
        for key in "ab":
            self.check(200, "GET", f"/set?key={key}&value=1")
        self.assertEqual(2, self.read_pairs(a="1", b="1"))
        self.assertEqual(0, self.read_pairs(a="1", b="1"))
        self.check(200, "GET", "/set?key=a&value=2")
        self.assertEqual(1, self.read_pairs(a="2", b="1"))
        self.store.set_value(1, "b", "2")  # as another process does
        self.assertEqual(2, self.read_pairs(a="2", b="2"))
        self.after_commit = lambda: self.store.set_value(1, "b", "3")
        self.check(200, "GET", "/set?key=a&value=3")
        self.assertEqual(2, self.read_pairs(a="3", b="3"))
        self.after_commit = int
        self.also.append(lambda store: store.set_password_hash("bob", "changed"))
        self.check(200, "GET", "/set?key=a&value=4")
        self.assertEqual(2, self.read_pairs(a="4", b="3"))

        def fail(store: kvserver.Store) -> None:
            store._execute("ROLLBACK")  # as SQLite does when the disk is full
            raise sqlite3.OperationalError("database or disk is full")

        self.also.append(fail)
        self.check(200, "GET", "/set?key=a&value=5")
        self.read_pairs(a="5", b="3")

    def test_a_commit_of_another_process_is_seen_after_a_transaction_that_changed_nothing(self) -> None:
        reader = kvserver.CachingStore(self.database)
        self.addCleanup(reader.close)
        user, state = reader.user("bob"), reader.state()
        self.store.set_password_hash("bob", "new")
        reader.keep_rows(state, reader.state(), 0, set())
        self.assertNotEqual(user, reader.user("bob"))
        self.store.set_value(1, "a", "1")
        with self.assertRaises(ZeroDivisionError):
            self.store.transact(lambda store: store.delete_pair(1, "a") // 0)
        self.assertTrue(self.store.changed_others, "rows are kept by pairs that were not committed")

    def test_remembered_rows_are_bounded(self) -> None:
        reader = kvserver.CachingStore(self.database)
        self.addCleanup(reader.close)
        self.store.begin()
        for number in range(3 * kvserver.CACHED_ROWS_MAX):
            self.store.set_value(1, str(number), "x")
        self.store.commit([])
        for number in range(3 * kvserver.CACHED_ROWS_MAX):
            self.assertIsNotNone(reader.pair(1, str(number)))
            self.assertLessEqual(len(reader._rows), kvserver.CACHED_ROWS_MAX)
        longest = "x" * kvserver.VALUE_BYTES_MAX
        for key in "aaaaaaaabcdefgh":
            state = reader.state()
            self.store.set_value(1, key, longest)
            reader.keep_rows(state, reader.state(), 1, {(1, key)})
            self.assertEqual(longest.encode(), getattr(reader.pair(1, key), "value", None))
            size = sum(len(row.value) for row in reader._rows.values())
            self.assertLess(size, kvserver.CACHED_BYTES_MAX + kvserver.VALUE_BYTES_MAX)


class Hashes(unittest.TestCase):
    def test_stored_hash_has_the_phc_form_and_is_the_scrypt_of_rfc_7914(self) -> None:
        stored = kvserver.hash_password("a password")
        self.assertRegex(stored, r"\A\$scrypt\$ln=14,r=8,p=5\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}\Z")
        self.assertTrue(kvserver.verify_password("a password", stored))
        with mock.patch.object(kvserver, "SCRYPT_COST_LOG2", 1):
            self.assertNotEqual(kvserver.hash_password("x"), kvserver.hash_password("x"), "the salt is not random")
        # The RFC's third test vector (section 12), cut to the 32 bytes that we store.
        salt = base64.b64encode(b"SodiumChloride").decode().rstrip("=")
        digest = bytes.fromhex("7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2")
        stored = f"$scrypt$ln=14,r=8,p=1${salt}${base64.b64encode(digest).decode().rstrip('=')}"
        self.assertTrue(kvserver.verify_password("pleaseletmein", stored))
        self.assertFalse(kvserver.verify_password("pleaseletmeix", stored))

    def test_hashes_of_werkzeug_are_verified_unchanged(self) -> None:
        for password, stored in WERKZEUG_HASHES.items():
            self.assertTrue(kvserver.verify_password(password, stored))
        stored = "pbkdf2:sha256:1$salt$" + hashlib.pbkdf2_hmac("sha256", b"right", b"salt", 1).hex()
        verified = [kvserver.verify_password(password, stored) for password in ("right", "wrong", "")]
        self.assertEqual([True, False, False], verified)

    def test_expensive_hashes_are_not_computed(self) -> None:
        scrypt = "$salt$" + "0" * 128  # up to 64 MiB, and N is less than 2^(128 r / 8) (RFC 7914 section 2)
        for method in ("scrypt:65536:8:1", "scrypt:2:1:16"):
            parsed = kvserver.parse_hash(method + scrypt)
            self.assertEqual(64, len(parsed[1](b"a password")) if parsed else 0)
        for stored in ("scrypt:8192:8:10" + scrypt, "pbkdf2:sha256:9999999$salt$" + "0" * 64):
            self.assertIsNotNone(kvserver.parse_hash(stored))
        for rest, methods in (
            (scrypt, "scrypt:131072:8:1 scrypt:2:1:17 scrypt:2:1:0 scrypt:32767:8:1 scrypt:65536:1:1"),
            (scrypt, "scrypt:1:8:1 scrypt:0:8:1 scrypt:2:0:1"),
            ("$salt$" + "0" * 64, "pbkdf2:sha256:10000000 pbkdf2:sha256:0 pbkdf2:sha1:1000"),
            ("$salt$" + "0" * 63, "pbkdf2:sha256:1000"),
            ("$$" + "0" * 64, "pbkdf2:sha256:1000"),
            ("$aGFzaA", "$scrypt$ln=14,r=8,p=5$a $scrypt$ln=1,r=8,p=1$ $scrypt$ln=99,r=8,p=1$c2FsdA"),
            ("$c2FsdA$aGFzaA", "$argon2id$v=19$m=65536 $scrypt x"),
            ("", "password $scrypt$"),
        ):
            for method in methods.split():
                self.assertIsNone(kvserver.parse_hash(method + rest), method)
                self.assertFalse(kvserver.verify_password("password", method + rest))


class Loops(unittest.TestCase):
    """The loop alone, without HTTP and SQL."""

    def setUp(self) -> None:
        self.errors: list[Exception] = []
        self.loop = kvserver.Loop(self.errors.append)
        self.addCleanup(self.loop.close)
        self.loop.start(kvserver.sleep(WAIT_SECONDS))  # so that a test cannot wait for ever
        self.notes: list[Any] = []
        self.wakeups: list[kvserver.Wakeup] = []

    def run_until(self, is_so: Callable[[], object]) -> int:
        """Run the loop until a condition holds, and return how many rounds that took."""
        deadline, rounds = time.monotonic() + WAIT_SECONDS, 0
        while not is_so():
            self.assertLess(time.monotonic(), deadline, "this takes too long")
            self.loop.run_once()
            rounds += 1
        return rounds

    def run_to_end(self, task: kvserver.Task) -> int:
        return self.run_until(lambda: task not in self.loop._tasks)

    async def wait(self, deadline: float = kvserver.NEVER) -> None:
        self.wakeups.append(kvserver.Wakeup(self.loop))
        self.notes.append(await kvserver.ready(0, deadline))

    async def receive(self, connection: socket.socket) -> None:
        self.loop.use(connection)
        self.notes.append(await kvserver.receive(connection, 1, kvserver.NEVER))

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Return two connected sockets; the first is for a task."""
        ours, theirs = (self.enterContext(each) for each in socket.socketpair())
        ours.setblocking(False)
        return ours, theirs

    def test_a_wakeup_resumes_its_task_once_and_never_late(self) -> None:
        async def wait_twice() -> None:
            with contextlib.suppress(TimeoutError):
                await self.wait(0)
            await self.wait()
            await self.wait()

        task = self.loop.start(wait_twice())
        self.run_until(lambda: len(self.wakeups) == 2)
        late, wakeup = self.wakeups
        self.assertEqual((False, True), (late.is_wanted(), wakeup.is_wanted()))
        self.loop.post(late, "late")
        self.loop.run_once()
        self.assertEqual([], self.notes)
        wakeup("first")
        wakeup("second")
        for _ in range(2):
            self.loop.run_once(may_wait=False)
        self.assertEqual((["first"], 3), (self.notes, len(self.wakeups)))
        self.wakeups[2]("third")
        self.run_to_end(task)
        self.wakeups[2]("after the end")
        self.loop.run_once(may_wait=False)
        self.assertEqual((["first", "third"], []), (self.notes, self.errors))

    def test_an_exception_from_outside_keeps_no_memory_of_its_task(self) -> None:
        kept: list[Any] = []

        async def hold(response: threading.Event) -> None:
            kept.append(weakref.ref(response))
            with contextlib.suppress(TimeoutError):
                await kvserver.ready(0)

        gc.disable()
        self.addCleanup(gc.enable)
        for error in (kvserver.Cancelled, TimeoutError):
            self.loop.throw(self.loop.start(hold(threading.Event())), error())
        self.assertEqual([None, None], [reference() for reference in kept])

    def test_a_finished_task_leaves_no_registration_behind(self) -> None:
        async def receive_and_raise(connection: socket.socket, error: Exception | None) -> None:
            with connection:
                await self.receive(connection)
                raise error or EOFError

        mistake = ValueError("a mistake")
        for sent, error in ((b"x", mistake), (b"", None)):
            ours, theirs = self.pair()
            task = self.loop.start(receive_and_raise(ours, error))
            self.assertEqual(2, len(self.loop._selector.get_map()))
            theirs.sendall(sent)
            theirs.close()
            self.run_to_end(task)
            self.assertEqual(1, len(self.loop._selector.get_map()))
        self.assertEqual(([b"x", b""], mistake), (self.notes, self.errors[0]))
        self.loop.throw(self.loop.start(receive_and_raise(self.pair()[0], None)), kvserver.Cancelled())
        self.assertEqual(1, len(self.loop._selector.get_map()))

    def test_bytes_for_a_busy_task_are_reported_once_and_not_lost(self) -> None:
        ours, theirs = self.pair()

        async def receive_wait_and_receive() -> None:
            await self.receive(ours)
            await self.wait()
            self.notes.append(await kvserver.receive(ours, 1, kvserver.NEVER))

        task = self.loop.start(receive_wait_and_receive())
        theirs.sendall(b"ab")
        theirs.close()
        self.run_until(lambda: ours not in self.loop._selector.get_map())
        self.assertEqual([b"a"], self.notes)
        self.wakeups[0]("woken")
        self.run_to_end(task)
        self.assertEqual([b"a", "woken", b"b"], self.notes)

    def test_an_error_in_one_task_ends_no_other_and_is_reported(self) -> None:
        async def fail() -> None:
            await kvserver.sleep(0)
            raise mistake

        mistake = ZeroDivisionError("a mistake")
        for coroutine in (self.wait(), fail()):
            self.loop.start(coroutine)
        self.run_until(lambda: self.errors)
        self.wakeups[0]("on")
        self.run_until(lambda: self.notes)
        self.assertEqual((["on"], [mistake]), (self.notes, self.errors))

    def test_sleeping_tasks_cost_nothing(self) -> None:
        for _ in range(1000):
            self.loop.start(kvserver.sleep(WAIT_SECONDS))
        self.run_to_end(self.loop.start(kvserver.sleep(0)))  # all deadlines have been checked once
        self.assertLess(self.run_to_end(self.loop.start(kvserver.sleep(0.1))), 10)

    def test_a_round_waits_only_while_no_task_can_go_on(self) -> None:
        waits, select = list[float](), self.loop._selector.select

        def select_and_note(seconds: float) -> list[tuple[selectors.SelectorKey, int]]:
            waits.append(seconds)
            if seconds > 0:
                # Another thread's Wakeup ends the wait.
                join(in_threads(self.loop.post, [(self.wakeups[-1], "woken")]))
            return select(seconds)

        with mock.patch.object(self.loop._selector, "select", select_and_note):
            self.loop.start(self.wait())
            self.wakeups[0]("at once")
            self.loop.run_once()
            self.assertEqual((["at once"], [0]), (self.notes, waits))
            self.loop.start(self.wait())
            self.run_until(lambda: len(self.notes) == 2)
        self.assertTrue(self.notes[1] == "woken" and 1 < waits[1] <= WAIT_SECONDS, waits)


class Connections(ServerCase):
    def test_tls_on_the_plain_port_is_logged_once_a_minute(self) -> None:
        self.patch("parse_address", mock.Mock(side_effect=[f"192.0.2.{number}" for number in range(1, 5)]))
        self.exchange(b"\x16", end=True)  # the first byte may come alone
        self.assertEqual(1, len(self.log.lines))
        for _ in range(3):
            with contextlib.suppress(OSError), self.connect() as connection:
                ssl.create_default_context().wrap_socket(connection, server_hostname="localhost")
            self.exchange(b"\x80\x16\x03\x01\r\n\r\n", end=True)
        self.assertEqual(["a client speaks TLS; use http:// or set --tls-cert: address=192.0.2.1"], self.log.lines)

    def test_connection_is_kept_for_further_requests(self) -> None:
        connection, sockets = self.new_connection(), set()
        requests = ((200, "POST /set?key=a&value=1"), (404, "GET /get?key=b"), (400, "GET /get"), (404, "GET /x"))
        for status, request in requests * 2:
            self.check(status, *request.split(), connection=connection)
            sockets.add(connection.sock)
        self.assertEqual(1, len(sockets))

    def test_connection_is_closed_when_asked_for_and_after_http_1_0(self) -> None:
        answer = self.exchange(b"GET /health HTTP/1.0\r\n\r\n")
        self.assertTrue(answer.startswith(b"HTTP/1.1 200 OK\r\n"))
        self.assertTrue(answer.endswith(b"\r\nConnection: close\r\n\r\nok"))
        answer = self.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: x, CLOSE\r\n\r\n")
        self.assertIn(b"Connection: close\r\n", answer)
        first = b"GET /health HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
        answers = self.exchange(first + b"GET /health HTTP/1.0\r\n\r\n")
        self.assertEqual(([200, 200], 1), (statuses(answers), answers.count(b"Connection: keep-alive\r\n")))
        for target, status in (("http://x:80/health", 200), ("HTTPS://x/health?_=1", 200), ("http://x", 404)):
            self.assertEqual([status], statuses(self.exchange(f"GET {target} HTTP/1.0\r\n\r\n".encode())), target)

    def test_pipelined_requests_are_answered_in_order_even_if_the_client_has_ended(self) -> None:
        data = self.raw("POST /set?key=a HTTP/1.1", "Content-Length: 1", body=b"1")
        data += self.raw("GET /get?key=a HTTP/1.1") + b"\r\n" + self.raw("GET /nowhere HTTP/1.1")
        for target in ("/list", "/set?key=a&value=1", "/get?key=a"):
            data += self.raw(f"GET {target} HTTP/1.1") * 3
        self.assertEqual([200, 200, 404, *[200] * 9], statuses(self.exchange(data, end=True)))

    def test_request_may_come_in_small_pieces(self) -> None:
        connection = self.connect()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for byte in self.raw("POST /set?key=a HTTP/1.1", "Content-Length: 3", body=b"abc"):
            connection.sendall(bytes([byte]))
        self.assertEqual([200], statuses(connection.recv(65536)))
        self.assertEqual({"a": "abc"}, self.pairs())

    def test_malformed_requests_are_refused_and_closed(self) -> None:
        cases = [(505, f"GET / HTTP/{version}\r\n\r\n") for version in ("2.0", "0.9")]
        cases += [(505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")]
        texts = ["GET / HTTP/1.1\r\n\r\n", "GET /\r\n", "GET\r\n\r\n", "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", "\0"]
        texts += ["GET / HTTP/1.1\nHost: x\n\n", "GET / HTTP/1.1\rHost: x\r\r", "GET / HTTP/1.1\r\nHost: x\n\r\n"]
        texts += [f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n" for host in ("x\r\nHost: x", "a b", "user@x", "[::1%]")]
        starts = ["G(T /", "GET get", "GET *", "CONNECT x:80", "GET /a#b", "GET /\xff", "GET  /", "GET\t/"]
        starts.append("GET http://a@b/")
        texts += [start + " HTTP/1.1\r\nHost: x\r\n\r\n" for start in starts]
        texts += [f"GET / {version}\r\nHost: x\r\n\r\n" for version in ("HTTP/1.10", "http/1.1", "HTTP/1.1 ")]
        cases += [(400, text) for text in texts]
        login = "Authorization: " + basic("alice", PASSWORDS["alice"])
        lines = ["X: a\rb", "X: a\0b", "X: a\x7fb", "X : a", " X: a", "X: a\r\n b", ": a", "no colon", login]
        lines += ["Content-Length: 1\r\nContent-Length: 1", "Transfer-Encoding: chunked\r\nContent-Length: 3"]
        lengths = ("+5", "-1", "1_0", "5, 5", "5 5", "0x5", "", "\xb2", "9" * 30)
        lines += ["Content-Length: " + length for length in lengths]
        good = f"GET /set?key=a&value=1 HTTP/1.1\r\nHost: x\r\n{login}\r\n"
        cases += [(400, good + line + "\r\n\r\nhello") for line in lines]
        cases += [(501, good + f"Transfer-Encoding: {coding}\r\n\r\n") for coding in ("gzip", "gzip, chunked")]
        cases += [(400, good.replace("1.1", "1.0") + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")]
        coding = "Transfer-Encoding: chunked\r\n\r\n"
        chunks = ["1 \r\nx\r\n0\r\n\r\n", "x\r\n", "-1\r\n", "0x1\r\na\r\n", "1\r\nab\r\n", "1\na\n0\n\n"]
        cases += [(400, good + coding + text) for text in (*chunks, "fffffffff\r\n", " 1\r\na\r\n")]
        for status, text in cases:
            # A second request follows. It must get no response, because its bytes belong to the refused one.
            answer = self.exchange(text.encode("latin-1") + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", end=True)
            self.assertEqual([status], statuses(answer), text)
            self.assertIn(b"\r\nConnection: close\r\n", answer)
            self.assertIn(b"\r\nContent-Type: text/plain; charset=utf-8\r\n", answer)
        self.assertEqual(({}, ""), (self.pairs(), self.log.text()))

    def test_hopeless_bytes_are_refused_without_waiting_for_more(self) -> None:
        self.patch("REQUEST_SECONDS", 10 * WAIT_SECONDS)
        for data in (b"\x16\x03\x01\x02\x00", b"\0", b"GET / HTTP/1.1\rHost: x\r\r", b"GET / HTTP/1.1\n", b"\nGET"):
            self.assertEqual([400], statuses(self.exchange(data)), data)

    def test_sizes_have_limits(self) -> None:
        def head(*lines: bytes) -> bytes:
            return b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: x\r\n" + b"".join(lines) + b"\r\n"

        def target(size: int) -> bytes:
            return head().replace(b" /health", b" /health?_=" + b"x" * (size - len("GET /health?_= HTTP/1.1")))

        left = kvserver.HEADERS_BYTES_MAX - len(b"Connection: close\r\nHost: x\r\nX: \r\n")
        fields = kvserver.HEADER_FIELDS_MAX - 2
        for most, too_much, status in (
            (target(kvserver.REQUEST_LINE_BYTES_MAX), target(kvserver.REQUEST_LINE_BYTES_MAX + 1), 414),
            (head(), b"G" * 100_000, 414),
            (head(), head(b"x" * 100_000), 431),
            (head(b"X: " + b"x" * left + b"\r\n"), head(b"X: x" + b"x" * left + b"\r\n"), 431),
            (head(*[b"X: 1\r\n"] * fields), head(*[b"X: 1\r\n"] * (fields + 1)), 431),
        ):
            self.assertEqual([200], statuses(self.exchange(most)), most[:60])
            self.assertEqual([status], statuses(self.exchange(too_much, end=True)), too_much[:60])

    def test_body_has_a_limit(self) -> None:
        limit = kvserver.BODY_BYTES_MAX
        members = {"key": "a", "value": "x" * (kvserver.VALUE_BYTES_MAX - 3), "_": ""}
        members["_"] = "y" * (limit - len(json.dumps(members)))
        self.check(200, "POST", "/set", json.dumps(members), kvserver.JSON)
        self.check(413, "POST", "/set", json.dumps(members) + " ", kvserver.JSON)
        for chunks in (b"%x\r\n" % (limit + 1), b"%x\r\n" % limit + b"x" * limit + b"\r\n1\r\nx\r\n0\r\n\r\n"):
            data = self.raw("POST /set?key=a HTTP/1.1", "Transfer-Encoding: chunked", body=chunks)
            self.assertEqual([413], statuses(self.exchange(data, end=True)))

    def test_client_that_sends_a_refused_body_reads_the_response(self) -> None:
        for user, target, status in ((None, "/set", 401), ("alice", "/set?key=a", 413), ("alice", "/nowhere", 404)):
            answer = self.check(status, "POST", target, b"x" * 3_000_000, user=user)
            self.assertEqual("close", answer.headers["connection"])

    def test_an_empty_line_behind_a_request_begins_no_other_one(self) -> None:
        connection = self.connect(self.raw("GET /get?key=a HTTP/1.1") + b"\r\n")
        self.assertEqual([404], statuses(connection.recv(65536)))
        ((accepted, handler),) = self.server.connections.items()
        self.assertTrue(
            accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        )  # nothing waits for acknowledgements
        wait_until(lambda: not handler.received and handler.state == kvserver.IDLE)
        connection.sendall(b"\r\n" + self.raw("GET /get?key=a HTTP/1.1"))
        self.assertEqual([404], statuses(connection.recv(65536)))

    def test_100_continue_comes_only_before_a_body_that_will_be_read(self) -> None:
        post = ("POST /set?key=a HTTP/1.1", "Expect: 100-Continue")
        connection = self.begin(*post, "Content-Length: 1")
        self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", connection.recv(65536))
        connection.sendall(b"1")
        self.assertEqual([200], statuses(connection.recv(65536)))
        too_long, too_short = self.begin(*post, f"Content-Length: {kvserver.BODY_BYTES_MAX + 1}"), self.begin(*post)
        login = basic("alice", PASSWORDS["alice"]).encode()
        stranger = self.connect(self.raw(*post, "Content-Length: 1").replace(login, b"Basic !"))
        for status, connection in ((413, too_long), (400, too_short), (401, stranger)):
            self.assertEqual([status], statuses(connection.recv(65536)))

    def test_slow_clients_are_closed(self) -> None:
        self.patch("LINGER_SECONDS", 0.05)
        half = self.raw("POST /set?key=a HTTP/1.1", "Content-Length: 9", body=b"1")
        for name, data, expected in (
            ("FIRST_BYTE_SECONDS", b"", []),
            ("REQUEST_SECONDS", b"GET /health HTTP/1.1\r\nHos", [408]),
            ("REQUEST_SECONDS", half, [408]),
            ("IDLE_SECONDS", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
        ):
            with mock.patch.object(kvserver, name, 0.05):
                self.assertEqual(expected, statuses(self.exchange(data)), name)
        self.assertEqual({}, self.pairs())
        self.fill(12)
        self.patch("SEND_SECONDS", 0.05)
        self.connect(self.raw("GET /list HTTP/1.1"), has_small_buffer=True)
        wait_until(lambda: self.server.connections)
        wait_until(lambda: not self.server.connections)

    def test_responses_that_wait_for_slow_clients_are_bounded(self) -> None:
        for user_id in (1, 2):
            self.fill(8, user_id)
        self.patch("UNSENT_BYTES_MAX", 20 * 1024 * 1024)
        clients = [self.begin("GET /list HTTP/1.0", user=user) for user in ("bob", "alice", "alice")]
        for client in clients:
            client.recv(1)
        wait_until(lambda: len(self.server.connections) < len(clients))
        sizes = [0, 0, 0]
        for number, client in enumerate(clients):
            with contextlib.suppress(ConnectionError):
                while data := client.recv(1 << 20):
                    sizes[number] += len(data)
        whole = [size > 8 * kvserver.VALUE_BYTES_MAX for size in sizes]
        self.assertTrue(whole[0] and sum(whole) == 2, sizes)

    def test_client_that_goes_away_leaves_no_trace(self) -> None:
        for _ in range(20):
            connection = self.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close resets
            connection.sendall(self.raw("GET /list HTTP/1.1") * 10)
            connection.close()
        self.check(200, "GET", "/list")
        self.stop()
        self.assertEqual("", self.log.text())

    def test_a_pipelining_client_gets_one_response_a_round(self) -> None:
        answered, waiting_bytes = list[str](), list[int]()
        respond = kvserver.RequestHandler.respond

        async def note_and_respond(handler: kvserver.RequestHandler, request: kvserver.Request) -> kvserver.Response:
            answered.append(request.path)
            waiting_bytes.append(len(handler.received))
            return await respond(handler, request)

        self.enterContext(mock.patch.object(kvserver.RequestHandler, "respond", note_and_respond))
        with mock.patch.object(self.server, "get_request", side_effect=BlockingIOError):
            many = self.connect(self.raw("GET /many HTTP/1.1") * 2_000)
            one = self.begin("GET /one HTTP/1.1")
        reader = in_threads(read_all, [(many,)])
        self.assertEqual([404], statuses(one.recv(65536)))
        wait_until(lambda: answered.count("/many") == 2_000)
        self.assertLess(answered.index("/one"), 10)
        self.assertLess(max(waiting_bytes), 2 * kvserver.RECEIVE_BYTES)
        self.stop()
        join(reader)

    def test_requests_behind_a_waiting_one_are_answered_after_it(self) -> None:
        with locked(self.database):
            connection = self.begin("GET /set?key=a&value=1 HTTP/1.1")
            connection.sendall(self.raw("GET /get?key=a HTTP/1.1") * 3)
            self.assertIsNone(self.get("a"))
        connection.sendall(self.raw("GET /nowhere HTTP/1.1", "Connection: close"))
        answers = read_all(connection)
        self.assertEqual(([200, 200, 200, 200, 404], 3), (statuses(answers), answers.count(b"\r\n\r\n1")))

    def test_a_write_is_made_even_if_its_client_has_gone(self) -> None:
        with locked(self.database):
            connection = self.begin("GET /set?key=a&value=1 HTTP/1.1")
            wait_until(lambda: len(self.server.changes) == 1)
            connection.close()
            self.assertIsNone(self.get("a"))
        wait_until(lambda: self.get("a") == b"1")
        wait_until(lambda: not self.server.connections)


def trust(certificate: str) -> ssl.SSLContext:
    """Return what a client uses that trusts a certificate, and no other."""
    context = ssl.create_default_context(cadata=certificate)
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


class Secure(ServerCase):
    def setUp(self) -> None:
        self.context = trust(CERTIFICATE)
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for name, text in (("certificate", CERTIFICATE), ("key", KEY)):
            (folder / name).write_text(text)
        self.certificate = kvserver.Certificate(str(folder / "certificate"), str(folder / "key"))
        super().setUp()

    def test_pages_name_an_https_address(self) -> None:
        body = self.check(200, "GET", "/", user=None, headers={"Accept": "text/html"}).body.decode()
        self.assertIn(f"<pre>https://localhost:{self.port}/</pre>", body)

    def new_connection(self) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection("localhost", self.port, timeout=WAIT_SECONDS, context=self.context)
        self.addCleanup(connection.close)
        return connection

    def wrap(self, data: bytes = b"", connection: socket.socket | None = None) -> ssl.SSLSocket:
        tls = self.context.wrap_socket(connection or self.connect(), server_hostname="localhost")
        self.addCleanup(tls.close)
        tls.sendall(data)
        return tls

    def hello(self) -> bytes:
        sent = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
        return sent.read()

    def assert_no_trace(self) -> None:
        wait_until(lambda: not self.server.connections)
        self.assertEqual("", self.log.text())

    def test_the_longest_value_comes_back_and_the_connection_stays(self) -> None:
        value = random.Random(7).randbytes(kvserver.VALUE_BYTES_MAX // 2).hex().encode()
        connection = self.new_connection()
        self.check(201, "PUT", "/kv/a", value, connection=connection)
        first = connection.sock
        self.assertEqual(value, self.request("GET", "/kv/a", connection=connection).body)
        self.assertIs(first, connection.sock)
        self.store.delete_pair(1, "a")
        self.assertEqual(self.fill(8), self.pairs())  # longer than all buffers

    def test_a_stream_of_events(self) -> None:
        pairs = self.fill(4)
        events = Events(self.new_connection(), basic("alice", PASSWORDS["alice"]))
        self.assertEqual(pairs, events.take_pairs())
        self.fetch("/set?key=a&value=1")
        self.assertEqual([("set", "a", "1")], events.take())
        self.stop()
        self.assertEqual(b"", events.response.read())

    def test_slow_client_that_goes_on_reading_gets_the_whole_response(self) -> None:
        expected_size = sum(map(len, self.fill(16).values()))
        self.patch("SEND_SECONDS", 0.3)
        connection = self.wrap(self.raw("GET /list HTTP/1.0"), self.connect(has_small_buffer=True))
        started, size = time.monotonic(), 0
        while data := connection.recv(16384):
            size += len(data)
            due = started + size / expected_size * 2.2 * kvserver.SEND_SECONDS
            threading.Event().wait(due - time.monotonic())
        self.assertGreater(size, expected_size)
        self.assertGreater(time.monotonic() - started, 2 * kvserver.SEND_SECONDS)

    def test_requests_in_one_piece_are_all_answered_even_if_the_client_has_ended(self) -> None:
        put = self.raw("PUT /kv/a HTTP/1.1", "Content-Length: 40000", body=b"x" * 40000)
        answers = read_all(self.wrap(put + self.raw("GET /kv/a HTTP/1.1") * 20 + self.raw("GET /nowhere HTTP/1.0")))
        self.assertEqual(([201, *[200] * 20, 404], 20), (statuses(answers), answers.count(b"x" * 40000)))
        for number in range(10):
            data = (self.raw(f"PUT /kv/{key}{number} HTTP/1.1", "Content-Length: 1", body=b"1") for key in "abc")
            connection = self.wrap(b"".join(data))
            connection.shutdown(socket.SHUT_WR)  # also decrypts no more
            read_all(connection)
        self.assertEqual(31, len(self.pairs()))

    def test_versions_before_tls_1_2_are_refused(self) -> None:
        self.context.maximum_version = ssl.TLSVersion.TLSv1_2
        self.check(200, "GET", "/list")
        self.context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.context.minimum_version, self.context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with self.assertRaisesRegex(ssl.SSLError, "ALERT_PROTOCOL_VERSION"):
            self.request("GET", "/list")

    def test_an_unfinished_handshake_delays_nobody_and_has_an_end(self) -> None:
        kept, hello = self.new_connection(), self.hello()
        self.check(200, "GET", "/list", connection=kept)
        self.patch("FIRST_BYTE_SECONDS", 0.1)
        waiting = [self.connect() for _ in range(20)] + [self.connect(hello[:-1])]
        dripping = self.connect()
        for byte in hello[:-1]:
            try:
                dripping.sendall(bytes([byte]))
            except OSError:  # further bytes do not give it more time
                break
            self.check(200, "GET", "/list", connection=kept)
        else:
            self.fail("the handshake may take as long as bytes come")
        for connection in waiting:
            self.assertEqual(b"", connection.recv(1))
        with held(ssl.SSLObject, "do_handshake"):  # computing takes too long
            self.assertEqual(b"", self.connect(hello).recv(1))
        kept.close()
        self.assert_no_trace()

    def test_handshakes_do_not_close_the_connection_of_a_known_device(self) -> None:
        self.server.max_connections = 8
        kept, hello = self.new_connection(), self.hello()
        self.check(200, "GET", "/list", connection=kept)
        first = kept.sock
        with held(ssl.SSLObject, "do_handshake"):
            for _ in range(30):
                self.connect(hello)
                self.check(200, "GET", "/list", connection=kept)
        self.assertIs(first, kept.sock)
        self.check(200, "GET", "/list")

    def test_records_without_data_have_an_end(self) -> None:
        self.patch("FIRST_BYTE_SECONDS", 10 * WAIT_SECONDS)
        self.patch("REQUEST_SECONDS", 10 * WAIT_SECONDS)
        for reads in ((ssl.SSLWantReadError,), (b"x", ssl.SSLWantReadError)):  # none has data, and some have a byte
            connection = self.wrap()
            with mock.patch.object(ssl.SSLObject, "read", side_effect=itertools.cycle(reads)):
                with contextlib.suppress(OSError):
                    socket.socket.sendall(connection, b"x" * 2 * kvserver.TLS_FRUITLESS_BYTES_MAX)
                wait_until(lambda: not self.server.connections)

    def test_garbage_and_early_ends_leave_nothing_behind(self) -> None:
        connection = self.wrap(self.raw("GET /get?key=a&wait=60&unless=1 HTTP/1.1"))
        wait_until(lambda: len(self.server.polls) == 1)
        socket.socket.sendall(connection, b"\x17\x03\x03\x00\x20" + b"x" * 32)
        for data in (b"", b"\x16\x03\x01\x02\x00", bytes(range(256)) * 100):
            self.connect(data).close()
        self.check(200, "GET", "/list")
        self.assert_no_trace()

    def test_plain_http_is_told_to_use_https(self) -> None:
        for method, body in (("GET", b""), ("DELETE", b""), ("OPTIONS", b""), ("PUT", b"x" * 1_000_000)):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)) as plain:
                answer = self.check(400, method, "/kv/a", body, connection=plain)
            self.assertEqual(b"this server speaks TLS; use https:// instead of http://", answer.body)

    def test_an_end_that_comes_together_with_a_request_is_seen(self) -> None:
        self.patch("IDLE_SECONDS", 10 * WAIT_SECONDS)
        self.patch("REQUEST_SECONDS", 10 * WAIT_SECONDS)
        for is_whole in (True, False):
            sent, received, connection = ssl.MemoryBIO(), ssl.MemoryBIO(), self.connect()
            client = self.context.wrap_bio(received, sent, server_hostname="localhost")
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
                    break
                connection.sendall(sent.read())
                received.write(connection.recv(65536))
            client.write(self.raw("GET /list HTTP/1.1")[: None if is_whole else -1])
            with contextlib.suppress(ssl.SSLWantReadError):
                client.unwrap()
            connection.sendall(sent.read())
            read_all(connection)  # fails when the server waits for more

    def test_the_end_is_told(self) -> None:
        for request, end in (
            (self.raw("GET /list HTTP/1.0"), b"{}"),
            (
                self.raw("PUT /kv/a HTTP/1.1", "Content-Length: 9999999"),
                kvserver.BODY_TOO_LARGE.format(9999999).encode(),
            ),
        ):
            raw = self.connect()
            with self.context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as connection:
                connection.sendall(request)
                self.assertTrue(read_all(connection).endswith(end))  # raises if the end is not told

    def test_a_body_without_length_is_noticed(self) -> None:
        refused = self.wrap(self.raw("POST /set?key=a&value=1 HTTP/1.1", body=b"open"))
        self.assertEqual([411], statuses(read_all(refused)))
        late = self.wrap(self.raw("POST /incr?key=n HTTP/1.1"))
        self.assertEqual([200], statuses(late.recv(65536)))
        late.sendall(b"open")
        self.assertEqual(b"", read_all(late))

    def test_a_stop_does_not_wait_for_a_handshake(self) -> None:
        self.patch("STOP_REQUEST_SECONDS", 10 * WAIT_SECONDS)
        self.patch("FIRST_BYTE_SECONDS", 10 * WAIT_SECONDS)
        connection = self.connect()
        wait_until(lambda: self.server.connections)
        self.stop()
        self.assertEqual(b"", connection.recv(1))


class Throttled(ServerCase):
    failures_max = kvserver.FAILURES_MAX
    trusted_proxy = kvserver.parse_networks("127.0.0.0/8,::1")

    def login(self, password: str, address: str = "192.0.2.1", name: str = "alice") -> int:
        return self.fetch("/list", user=basic(name, password), X_Forwarded_For=address)[0]

    def fail_often(self, address: str = "192.0.2.1") -> None:
        for number in range(kvserver.FAILURES_MAX):
            self.assertEqual(401, self.login(f"wrong password {number} from {address}", address))

    def test_an_address_has_ten_failures(self) -> None:
        self.assertEqual(200, self.login(PASSWORDS["bob"], name="bob"))
        self.fail_often()
        with mock.patch.object(kvserver, "scrypt") as scrypt:
            headers = {"X-Forwarded-For": "192.0.2.1"}
            answer = self.check(429, "GET", "/list", user=basic("alice", "wrong password"), headers=headers)
            self.assertLessEqual(int(answer.headers["retry-after"]), kvserver.FAILURE_SECONDS)
            self.assertEqual(429, self.login(PASSWORDS["alice"]), "right, but not known")
            self.assertEqual(200, self.login(PASSWORDS["bob"], name="bob"), "known")
            scrypt.assert_not_called()
        self.assertEqual(200, self.login(PASSWORDS["alice"], "192.0.2.2"), "the user is not locked")
        self.assertEqual(200, self.login(PASSWORDS["alice"]), "known now")

    def test_a_failure_is_forgotten_after_a_while(self) -> None:
        charge, address, now = self.server.authenticator._charge, kvserver.parse_address("192.0.2.1"), time.monotonic()
        for seconds, allowed in ((0, kvserver.FAILURES_MAX), (kvserver.FAILURE_SECONDS + 1, 1)):
            with mock.patch("time.monotonic", lambda: now + seconds):  # noqa: B023
                for _ in range(allowed):
                    charge(address, 1)
                with self.assertRaises(kvserver.HTTPError):
                    charge(address, 1)

    def test_right_logins_are_free(self) -> None:
        for number in range(2 * kvserver.FAILURES_MAX):
            self.store.set_password_hash("alice", kvserver.hash_password(f"password {number}"))
            self.assertEqual(200, self.login(f"password {number}"))

    def test_only_guesses_are_charged(self) -> None:
        free, malformed = ((None, 401), ("Digest x", 401)), ("Basic !!!!", "Basic eA==", "Bearer")  # eA== is x
        with mock.patch.object(kvserver, "scrypt") as scrypt:
            for number, login in enumerate(malformed):
                headers = {"X-Forwarded-For": f"192.0.2.{number}"}
                guesses = [(login, 401)] * kvserver.FAILURES_MAX  # a malformed header is not remembered
                for user, status in (*free * 20, *guesses, (login, 429), *free):
                    self.check(status, "GET", "/list", user=user, headers=headers)
            scrypt.assert_not_called()

    def test_a_wrong_header_is_remembered_and_costs_its_neighbours_nothing(self) -> None:
        logins = [basic("alice", "outdated"), basic("alice", ""), basic("nobody", "outdated"), "Bearer kv_deleted"]
        logins += [basic("alice", "kv_deleted"), "Bearer x"]
        with mock.patch.object(kvserver, "scrypt", wraps=kvserver.scrypt) as scrypt:
            for login in logins * 3 * kvserver.FAILURES_MAX:
                self.assertEqual(401, self.fetch("/list", user=login)[0])
            self.assertEqual(3, scrypt.call_count)
            self.assertEqual(len(logins), len(self.log.lines))
            for number in range(kvserver.FAILURES_MAX - len(logins)):
                self.assertEqual(401, self.login(f"guess {number}", "127.0.0.1"))
            self.assertEqual(429, self.login("one guess more", "127.0.0.1"))
            self.log.lines.clear()
            calls = scrypt.call_count
            for login, address in itertools.product(logins, ("127.0.0.1", "192.0.2.1")):
                self.assertEqual(401, self.fetch("/list", user=login, X_Forwarded_For=address)[0])
            self.assertEqual((calls, []), (scrypt.call_count, self.log.lines))
            self.fail_often("192.0.2.1")  # all of them
        failed = 2 * kvserver.FAILURES_MAX + len(logins) * (3 * kvserver.FAILURES_MAX + 1)
        self.assertEqual(failed, self.server.metrics.failed_logins)

    def test_a_wrong_header_is_forgotten_with_a_new_password_user_or_token(self) -> None:
        token = kvserver.make_token()
        changes: dict[str, Callable[[], object]] = {
            basic("alice", "new password"): lambda: self.store.set_password_hash(
                "alice", kvserver.hash_password("new password")
            ),
            basic("carol", "a password"): lambda: self.store.add_user(
                "carol", kvserver.hash_password("a password"), False
            ),
            basic("bob", token): lambda: self.store.add_token("bob", kvserver.hash_token(token), "", False, ""),
            f"Bearer {token}": lambda: None,
        }
        for login in changes:
            self.check(401, "GET", "/list", user=login)
        for login, change in changes.items():
            change()
            self.check(200, "GET", "/list", user=login)
        self.store.delete_token("bob", 1)
        for _ in range(2 * kvserver.FAILURES_MAX):
            self.check(401, "GET", "/list", user=f"Bearer {token}")
        self.assertEqual(600, kvserver.REFUSED_SECONDS)

    def test_few_wrong_headers_are_remembered_and_not_forever(self) -> None:
        with mock.patch.object(kvserver, "scrypt", wraps=kvserver.scrypt) as scrypt:
            self.patch("CREDENTIALS_MAX", 2)
            for password, count in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("b", 3), ("a", 4)):
                self.assertEqual(401, self.login(password))
                self.assertEqual(count, scrypt.call_count, password)
            self.patch("REFUSED_SECONDS", 0)
            for count in (5, 6):
                self.assertEqual(401, self.login("d"))
                self.assertEqual(count, scrypt.call_count)

    def test_the_log_names_a_throttled_address_once_a_minute(self) -> None:
        addresses = ("192.0.2.1", "2001:db8:0:1::1", "2001:db8:0:1::2", "192.0.2.1", "2001:db8:0:1::1")
        for address in addresses[:2]:
            self.fail_often(address)
        self.log.lines.clear()
        for address in addresses:
            self.assertEqual(429, self.login("one guess more", address))
        self.assertEqual([f"login throttled: address={address}" for address in addresses[:2]], self.log.lines)
        self.assertEqual(60, kvserver.RARE_LOG_SECONDS)

    def test_parallel_guesses_stay_within_the_limit_and_parallel_logins_pass(self) -> None:
        limited = [401] * kvserver.FAILURES_MAX + [429] * (40 - kvserver.FAILURES_MAX)
        cases = [[f"guess {number}" for number in range(40)], ["the same guess"] * 40, [PASSWORDS["alice"]] * 40]
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            for number, (passwords, expected) in enumerate(zip(cases, (limited, [401] * 40, [200] * 40))):
                addresses = itertools.repeat(f"192.0.2.{number}")
                self.assertEqual(expected, sorted(pool.map(self.login, passwords, addresses)))
        failures = [line for line in self.log.lines if line.endswith("address=192.0.2.1")]
        self.assertEqual(["login failed: user='alice' address=192.0.2.1"], failures)
        statuses = [self.login(f"wrong password {number}", "192.0.2.1") for number in range(kvserver.FAILURES_MAX)]
        self.assertEqual([401] * (kvserver.FAILURES_MAX - 1) + [429], statuses, "equal guesses count once")

    def test_addresses_are_counted_apart_and_ipv6_by_network(self) -> None:
        self.fail_often("192.0.2.1")
        self.fail_often("2001:db8:0:1::1")
        for address, status, shown in (
            ("192.0.2.1", 429, ""),
            ("::ffff:192.0.2.1", 429, ""),
            ("192.0.2.2", 401, "192.0.2.2"),
            ("2001:db8:0:1:ffff::2", 429, ""),
            ("2001:db8:0:2::1", 401, "2001:db8:0:2::1"),
            ("fe80::1%' status=200 address=192.0.2.3", 401, "fe80::1"),
        ):
            self.assertEqual(status, self.login(f"wrong password from {address}", address), address)
            self.assertTrue(self.log.lines[-1].endswith(f"address={shown}" if shown else ""), self.log.lines[-1])

    def test_only_trusted_proxies_are_believed(self) -> None:
        proxies = kvserver.parse_networks("10.0.0.0/8, 2001:db8::5")
        for expected, peer, *headers in (
            ("192.0.2.1", "192.0.2.1", "", "203.0.113.9"),
            ("10.0.0.1", "10.0.0.1", "", "nonsense", "203.0.113.9,"),
            ("203.0.113.9", "10.0.0.1", "203.0.113.9", "198.51.100.7, 203.0.113.9, 10.0.0.2,10.0.0.3"),
            ("203.0.113.9", "::ffff:10.0.0.1", "203.0.113.9", "198.51.100.7, 203.0.113.9"),
            ("2001:db8::9", "2001:db8::5", " 2001:DB8::9 "),
            ("10.0.0.2", "10.0.0.1", "203.0.113.9, nonsense, 10.0.0.2"),
            ("10.0.0.7", "10.0.0.1", "10.0.0.7, 10.0.0.2"),
            ("203.0.113.9", "10.0.0.1", "203.0.113.9:51234", "198.51.100.7:1, 203.0.113.9:65535,10.0.0.2:80"),
            (
                "2001:db8::7",
                "10.0.0.1",
                "[2001:db8::7]:443",
                "[2001:db8::7]",
                "[2001:DB8::7%25eth0]:443, [2001:db8::5]",
            ),
            ("10.0.0.1", "10.0.0.1", "203.0.113.9:x", "203.0.113.9:1:2", "[2001:db8::7", "[2001:db8::7]443", "[]:443"),
        ):
            for forwarded_for in headers:
                with self.subTest(peer=peer, forwarded_for=forwarded_for):
                    self.assertEqual(expected, str(kvserver.client_address(peer, forwarded_for, proxies)))

    def test_few_addresses_are_remembered(self) -> None:
        self.patch("THROTTLED_ADDRESSES_MAX", 3)
        for number in (1, 2, 3):
            self.fail_often(f"192.0.2.{number}")
        for number, status in ((1, 429), (4, 401), (1, 401)):
            self.assertEqual(status, self.login(f"wrong password {number}", f"192.0.2.{number}"))

    def test_an_unknown_user_costs_the_same_work_as_a_wrong_password(self) -> None:
        with mock.patch.object(kvserver, "scrypt", wraps=kvserver.scrypt) as scrypt:
            for name in ("alice", "nobody"):
                self.assertEqual(401, self.login("wrong password", name=name))
        known, unknown = [(len(call.args[1]), *call.args[2:]) for call in scrypt.call_args_list]
        self.assertEqual(known, unknown)


class Sites(ServerCase):
    """Requests that a browser sends for a page of this site or of another one."""

    def status(self, **headers: str) -> int:
        return self.fetch("/set?key=a&value=1", **headers)[0]

    def test_sec_fetch_site_decides_before_origin(self) -> None:
        for site in ("same-origin", "none"):
            self.assertEqual(200, self.status(Sec_Fetch_Site=site, Origin="null"), site)
        for site in ("cross-site", "same-site", "Same-Origin", "same-origin, cross-site", ""):
            self.assertEqual(403, self.status(Sec_Fetch_Site=site, Origin="http://x", Host="x"), site)

    def test_a_foreign_origin_or_else_referer_is_refused(self) -> None:
        others = "other.example http://other.example http://kv.example.other.example http://kv.example@other.example"
        for host, allowed, refused in (
            ("kv.example", "http://kv.example https://kv.example", f"{others} http://kv.example:8080 kv.example null"),
            ("localhost", "http://localhost", "chrome-extension://localhost"),
            ("KV.example", "http://kv.EXAMPLE", ""),
            ("kv.example:8080", "http://kv.example:8080", "http://kv.example"),
            ("[::1]:8080", "http://[::1]:8080", ""),
            ("[::1]", "http://[::1]", "http://[::2]"),
            ("[fe80::1%eth0]:8080", "http://[fe80::1%eth0]:8080", "http://[fe80::1]:8080"),
            ("[fe80::1%25wlan0.1]", "http://[fe80::1%25wlan0.1]", ""),
        ):
            for status, origins in ((200, allowed.split()), (403, refused.split())):
                for origin in origins:
                    with self.subTest(host=host, origin=origin):
                        self.assertEqual(status, self.status(Host=host, Origin=origin, Referer="http://other.example/"))
                        self.assertEqual(status, self.status(Host=host, Referer=origin + "/page?query#fragment"))
        self.assertEqual(403, self.status(Host="kv.example", Origin="", Referer="http://kv.example/"))
        self.assertEqual(403, self.status(Host="kv.example", Referer=""))

    def test_a_refused_request_changes_nothing(self) -> None:
        self.fetch("/set?key=a&value=1")
        for method in ("GET", "POST", "PUT"):
            for target in ("/set?key=a&value=2", "/del?key=a", "/iotpersistenceapi/set?key=a&value=2"):
                self.assertEqual(403, self.fetch(target, method, Origin="http://other.example")[0])
        self.assertEqual((200, "1"), self.fetch("/get?key=a", Origin="http://other.example"))

    def test_login_comes_first_and_no_body_is_asked_for(self) -> None:
        self.assertEqual(401, self.fetch("/set", user=None, Origin="null")[0])
        lines = ("Origin: null", "Expect: 100-continue", "Content-Length: 1")
        response = self.exchange(self.raw("POST /set?key=a HTTP/1.1", *lines), end=True)
        self.assertTrue(response.startswith(b"HTTP/1.1 403 "))

    def test_a_bearer_token_needs_no_page_of_this_site(self) -> None:
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", False, "")
        foreign = (
            {"Origin": "http://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Referer": "http://evil.example"},
        )
        logins = {
            f"Bearer {token}": 200,
            f"bEARER {token}": 200,
            "alice": 403,
            basic("alice", token): 403,
            "Bearer x": 401,
        }
        for headers, (user, status) in itertools.product(foreign, logins.items()):
            self.check(status, "GET", "/set?key=a&value=1", user=user, headers=headers)
        self.check(401, "POST", "/me/", "action=set&key=a&value=2", kvserver.FORM, f"Bearer {token}", foreign[0])
        self.assertEqual({"a": "1"}, self.pairs())

    def test_what_a_browser_loads_in_advance_changes_nothing(self) -> None:
        self.fetch("/set?key=a&value=1")
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", False, "")
        connection = self.new_connection()
        for name, purpose in (
            *(("Sec-Purpose", text) for text in ("prefetch", "prefetch;prerender", "Prerender", "x, prefetch;y=1")),
            *(("purpose", "prefetch"), ("Purpose", "prerender"), ("X-moz", "prefetch"), ("X-Purpose", "preview")),
        ):
            for user in (None, "alice", basic("alice", "wrong"), f"Bearer {token}"):
                for target in ("/set?key=a&value=2", "/del?key=a", "/toggle?key=a", "/iotpersistenceapi/incr?key=a"):
                    answer = self.check(503, "GET", target, user=user, headers={name: purpose}, connection=connection)
                    self.assertEqual("no-store", answer.headers["cache-control"])
            self.check(503, "POST", "/me/", "action=set&key=a&value=2", kvserver.FORM, headers={name: purpose})
            answer = self.check(200, "GET", "/get?key=a", headers={name: purpose}, connection=connection)
            self.assertEqual(b"1", answer.body)
        self.assertEqual([], self.log.lines)
        self.check(200, "GET", "/set?key=a&value=2", headers={"Sec-Purpose": "", "Purpose": "x", "X-Moz": "y"})

    def test_the_host_of_an_absolute_target_counts(self) -> None:
        for host, status in (("kv.example", 200), ("localhost", 403)):
            lines = (f"GET http://{host}/set?key=a&value=1 HTTP/1.1", "Origin: http://kv.example", "Connection: close")
            self.assertEqual([status], statuses(self.exchange(self.raw(*lines))))

    def test_without_the_flag_no_page_of_another_origin_may_read(self) -> None:
        wanted = {"Origin": "http://x", "Access-Control-Request-Method": "GET"}
        for method, target in (("GET", "/get?key=a"), ("OPTIONS", "/get"), ("GET", "/health")):
            names = [set(self.request(method, target, headers=headers).headers) for headers in (wanted, None)]
            self.assertEqual(*names)
            self.assertNotRegex(" ".join(names[0]).lower(), "access-control|vary")


class Origins(ServerCase):
    """Pages of other origins, to which a flag opens the API."""

    cors_origin = kvserver.parse_origins("https://App.example:443, http://[::1]:3000,chrome-extension://abcdef")
    origin = "https://app.example"

    def setUp(self) -> None:
        super().setUp()
        self.expected = {
            "access-control-allow-origin": self.origin,
            "access-control-expose-headers": "ETag, Link, Retry-After",
            "vary": "Origin",
        }

    def shared(self, method: str, target: str, status: int, origin: str | None = None, **named: Any) -> dict[str, str]:
        """Return the headers of a response that concern other origins."""
        headers = {"Origin": origin or self.origin, **named.pop("headers", {})}
        answer = self.check(status, method, target, headers=headers, **named)
        return {name: text for name, text in answer.headers.items() if re.match("access-control|vary", name)}

    def token(self, prefix: str = "") -> str:
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", False, prefix)
        return f"Bearer {token}"

    def test_answers_of_the_api_may_be_read_errors_too(self) -> None:
        etag = self.check(201, "PUT", "/kv/a", "1").headers["etag"]
        login, narrow = self.token(), self.token("b")
        cases: tuple[tuple[int, str, str, dict[str, Any]], ...] = (
            *((200, method, "/get?key=a", {}) for method in ("GET", "HEAD")),
            (200, "GET", "/iotpersistenceapi/list?limit=1", {"user": login}),
            (200, "POST", "/set?key=a", {"user": login, "body": "2"}),
            (201, "PUT", "/kv/b", {"user": login, "body": "1"}),
            (200, "GET", "/health", {"user": None}),
            (304, "GET", "/kv/b", {"headers": {"If-None-Match": etag}}),
            (400, "GET", "/get", {}),
            (401, "GET", "/get?key=a", {"user": None}),
            (403, "GET", "/get?key=a", {"user": narrow}),
            (403, "POST", "/set?key=a", {"body": "3"}),
            (404, "GET", "/get?key=unknown", {}),
            (404, "GET", "/unknown", {}),
            (405, "PATCH", "/kv/a", {}),
            (412, "DELETE", "/kv/a", {"user": login, "headers": {"If-Match": '"x"'}}),
            (413, "PUT", "/kv/a", {"user": login, "headers": {"Content-Length": "99999999"}}),
            (501, "BREW", "/set", {}),
        )
        for status, method, target, named in cases:
            with self.subTest(f"{method} {target} {status}"):
                self.assertEqual(self.expected, self.shared(method, target, status, **named))
        self.assertEqual({"a": "2", "b": "1"}, self.pairs())

    def test_pages_and_metrics_never_take_part(self) -> None:
        accept = {"Accept": "text/html", "Access-Control-Request-Method": "GET"}
        for target in ("/", "/iotpersistenceapi", "/me", "/me/", "/me/state?key=a", "/admin", "/admin/", "/metrics"):
            for method, user in itertools.product(("GET", "OPTIONS"), ("alice", None)):
                answer = self.request(method, target, user=user, headers={"Origin": self.origin, **accept})
                self.assertNotRegex(" ".join(answer.headers).lower(), "access-control|vary", (method, target, user))
        self.assertEqual({}, self.shared("POST", "/me/", 403, body="action=set&key=a&value=1"))

    def test_an_origin_matches_without_case_and_default_port(self) -> None:
        for origin in (self.origin, "HTTPS://APP.EXAMPLE:443", "http://[::1]:3000", "chrome-extension://abcdef"):
            self.assertEqual(
                self.expected | {"access-control-allow-origin": origin}, self.shared("GET", "/list", 200, origin)
            )
        for origin in (
            *("http://app.example", "https://app.example:80", "https://app.example:8443", "https://app.example."),
            *(
                "https://app.example.evil.example",
                "https://evil.example",
                "https://x.app.example",
                "https://app.example/",
            ),
            *("http://[::1]", "null", "*", "x", "chrome-extension://abcdefg", f"{self.origin}, {self.origin}"),
        ):
            self.assertEqual({}, self.shared("GET", "/list", 200, origin), origin)
            self.assertEqual({}, self.shared("OPTIONS", "/set", 204, origin, user=None), origin)
        self.server.cors_origins = kvserver.parse_origins("https://app.example,*")
        for origin in (self.origin, "http://x", "null"):
            self.assertEqual(
                self.expected | {"access-control-allow-origin": "*"}, self.shared("GET", "/list", 200, origin)
            )
        self.assertNotIn("vary", self.request("GET", "/list").headers)

    def test_a_preflight_needs_no_login_and_names_methods_and_headers(self) -> None:
        for path, methods in {
            "/set": "GET, POST, PUT, OPTIONS",
            "/get": "GET, HEAD, OPTIONS",
            "/iotpersistenceapi/list": "GET, HEAD, OPTIONS",
            "/kv/a": "GET, HEAD, PUT, DELETE, OPTIONS",
            "/history": "GET, HEAD, DELETE, OPTIONS",
            "/events": "GET, OPTIONS",
            "/health": "GET, HEAD, OPTIONS",
        }.items():
            wanted = {
                "Access-Control-Request-Method": "PUT",
                "Access-Control-Request-Headers": "authorization,if-match",
                "Sec-Fetch-Site": "cross-site",
            }
            expected = self.expected | {
                "access-control-allow-methods": methods,
                "access-control-allow-headers": "Authorization, Content-Type, If-Match, If-None-Match",
                "access-control-max-age": "600",
            }
            self.assertEqual(expected, self.shared("OPTIONS", path, 204, user=None, headers=wanted))
        self.assertEqual(self.expected, self.shared("OPTIONS", "/unknown", 404, user=None))


class Values(ServerCase):
    """Operations that the server decides, so that two clients cannot both be first."""

    def expire(self) -> None:
        execute(self.database, "UPDATE pair SET expires = 1 WHERE expires IS NOT NULL")

    def members(self, key: str = "a") -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(self.fetch(f"/get?key={key}&format=json")[1]))

    def test_a_missing_key_has_a_default_and_its_deletion_can_succeed(self) -> None:
        self.assertEqual((200, "off"), self.fetch("/get?key=a&default=off"))
        self.assertEqual((200, ""), self.fetch("/get?key=a&default="))
        self.assertNotIn("etag", self.request("GET", "/get?key=a&default=on").headers)
        self.check(400, "GET", "/get?key=a&default=never&format=age")
        for query, status in (("&missing=ok", 200), ("&missing=1", 400), ("", 404)):
            self.check(status, "GET", "/del?key=a" + query)
        self.fetch("/set?key=a&value=on")
        self.assertEqual((200, "on"), self.fetch("/get?key=a&default=off"))

    def test_incr_counts_exactly(self) -> None:
        self.assertEqual((200, "1"), self.fetch("/incr?key=b"))
        self.assertEqual((200, "-2.5"), self.fetch("/incr?key=c&by=-2.50"))
        sums = ["0.1+0.2=0.3", "1.50+1.50=3", "-1+1=0", "-0.0+0=0", "100+0=100", "007+1=8", "0.1+-0.1=0"]
        nines, zeros = "9" * 100, "0" * 98
        for case in (*sums, f"{nines}+-1={nines[1:]}8", f"1{zeros}+0.1=1{zeros}.1", f"0.{zeros}1+1=1.{zeros}1"):
            stored, by, number = re.split("[+=]", case)
            self.store.set_value(1, "a", stored)
            self.assertEqual((200, number), self.fetch(url("/incr", key="a", by=by)), case)
            self.assertEqual((200, number), self.fetch("/get?key=a"))

    def test_incr_refuses_other_text_and_long_numbers(self) -> None:
        for stored in ("", "x", "1e3", "+1", " 1", "1.", ".5", "١", "9" * 100, "1" * 101, "0x1", "NaN", "1\n"):
            self.store.set_value(1, "a", stored)
            self.assertEqual(409, self.fetch("/incr?key=a")[0], stored)
            self.assertEqual((200, stored), self.fetch("/get?key=a"))
        self.store.set_value(1, "a", "1" + "0" * 99)
        self.assertEqual(409, self.fetch("/incr?key=a&by=0.1")[0])
        for by in ("", "x", "1e3", "%2B1", "1" * 101, "1.", "%D9%A1"):
            self.assertEqual(400, self.fetch(f"/incr?key=b&by={by}")[0], by)
        self.assertIsNone(self.get("b"))

    def test_toggle_has_two_words_of_the_length_of_a_value(self) -> None:
        self.assertEqual(["on", "off", "on"], [self.fetch("/toggle?key=a")[1] for _ in range(3)])
        self.assertEqual(["auf", "zu", "auf"], [self.fetch("/toggle?key=b&values=auf,zu")[1] for _ in range(3)])
        for stored in ("on", "auf,zu", "", "Auf", "auf\n"):
            self.store.set_value(1, "b", stored)
            self.assertEqual(409, self.fetch("/toggle?key=b&values=auf,zu")[0], stored)
            self.assertEqual((200, stored), self.fetch("/get?key=b"))
        self.fetch("/del?key=b")
        for words in ("on", "on,on", "on,", ",on", "a,b,c", ""):
            self.assertEqual(400, self.fetch(f"/toggle?key=a&values={words}")[0], words)
        for extra, status in ((1, 413), (0, 200)):
            form = f"key=b&values={'x' * (kvserver.VALUE_BYTES_MAX + extra)},b"
            self.assertEqual(status, self.fetch("/toggle", "POST", form, Content_Type=kvserver.FORM)[0])

    def test_only_a_value_can_be_an_array_or_an_object(self) -> None:
        for member in ('["a", "b"]', '{"a": 1}'):
            for path, members, status in (
                ("/toggle", f'"values": {member}', 400),
                ("/set", f'"value": {member}', 200),
                ("/set", f'"value": {member}, "old": {member}', 200),
            ):
                self.check(status, "POST", path, f'{{"key": "a", {members}}}', kvserver.JSON)
            self.assertEqual({"a": member}, self.pairs())

    def test_incr_takes_form_and_json(self) -> None:
        for body, content_type, total in (
            ("key=a&by=2", kvserver.FORM, b"2"),
            ('{"key": "a", "by": 2}', kvserver.JSON, b"4"),
        ):
            self.assertEqual(total, self.check(200, "POST", "/incr", body, content_type).body)
        self.check(405, "PUT", "/incr?key=a")

    def test_nx_and_old_guard_a_value(self) -> None:
        for query, status, text, stored in (
            ("value=1&old=", 409, "Value differs", None),
            ("value=1&nx=1", 200, "Success", b"1"),
            ("value=2&nx=1", 409, "Key exists", b"1"),
            ("value=2&old=2", 409, "Value differs", b"1"),
            ("value=2&old=1", 200, "Success", b"2"),
            ("value=3&old=2&nx=1", 400, "", b"2"),
            ("value=3&nx=yes", 400, "", b"2"),
        ):
            answer = self.fetch("/set?key=a&" + query)
            self.assertEqual((status, text), (answer[0], answer[1][: len(text)]), query)
            self.assertEqual(stored, self.get("a"), query)

    def test_ttl_ends_a_pair(self) -> None:
        for target in ("/set?key=a&value=1&ttl=", "/incr?key=a&ttl=", "/toggle?key=a&ttl="):
            for ttl in ("0", "-1", "x", "", "1e3", "0.0", "0.000999", "315360000.1", "99999999999999999999999"):
                self.check(400, "GET", target + ttl)
            self.check(200, "GET", target + "0.001")
            self.check(200, "GET", target + "315360000")
            self.check(200, "GET", "/get?key=a")
            times = [clock() + 315360001 for clock in (time.time, kvserver.running_time)]
            running = mock.patch.object(kvserver, "running_time", return_value=times[1])
            with mock.patch("time.time", return_value=times[0]), running:
                self.check(404, "GET", "/get?key=a")  # though its row is cached
            self.expire()
            for method, path in (("GET", "/get?key=a"), ("GET", "/del?key=a"), ("DELETE", "/kv/a")):
                self.check(404, method, path)
            self.assertEqual(({}, [0, 0]), (self.pairs(), [pairs for _, pairs, _ in self.store.users()]))
        for target, expected in (("/incr?key=a", (200, "1")), ("/set?key=a&value=6&nx=1", (200, "Success"))):
            self.fetch("/set?key=a&value=5&ttl=100")
            self.expire()
            self.assertEqual(expected, self.fetch(target))

    def test_set_clears_the_ttl_and_incr_and_toggle_keep_it(self) -> None:
        for path, value in (("/incr", "1"), ("/toggle", "on")):
            self.fetch(f"/set?key=a&value={value}&ttl=1000")
            expires = self.members()["expires"]
            self.assertRegex(expires, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")
            self.fetch(f"{path}?key=a")
            self.assertEqual(expires, self.members()["expires"])
            self.fetch(f"{path}?key=a&ttl=2000")
            self.assertGreater(self.members()["expires"], expires)
            self.fetch("/set?key=a&value=1")
            self.assertIsNone(self.members()["expires"])

    def test_expired_pairs_leave_the_disk(self) -> None:
        for number in range(5):
            self.store.set_value(1, str(number), "x", time.time() - 1)
        with mock.patch.object(kvserver.CachingStore, "has_expired", side_effect=MemoryError) as has_expired:
            wait_until(lambda: has_expired.called)  # whatever happens, it tries again
        wait_until(lambda: not self.store._execute("SELECT 1 FROM pair").fetchall())

    def test_format_json_and_age(self) -> None:
        before, form = time.time(), {"Content_Type": "text/plain"}
        self.fetch("/set?key=a%22", "POST", 'é\0"', **form)
        members = self.members("a%22")
        self.assertEqual(["key", "value", "updated", "age", "expires"], list(members))
        self.assertEqual(('a"', 'é\0"', 0, None), tuple(members[name] for name in ("key", "value", "age", "expires")))
        updated = datetime.datetime.fromisoformat(members["updated"]).timestamp()
        self.assertTrue(before - 0.01 <= updated <= time.time() + 0.01)
        execute(self.database, "UPDATE pair SET updated = updated - 90.5")
        self.assertEqual((200, "90"), self.fetch("/get?key=a%22&format=age"))
        self.assertEqual({'a"': self.members("a%22")}, json.loads(self.fetch("/list?format=json&limit=5")[1]))
        etag = self.request("GET", "/get?key=a%22").headers["etag"]
        for format in ("age", "json"):
            self.assertNotIn("etag", self.request("GET", f"/get?key=a%22&format={format}").headers)
            self.assertEqual(404, self.fetch(f"/get?key=b&format={format}")[0])
            for wait in ("", "&wait=0.01"):  # the client may know the value, but not its age
                self.assertEqual(200, self.fetch(f"/get?key=a%22&format={format}{wait}", If_None_Match=etag)[0])
        self.assertEqual(400, self.fetch("/get?key=a%22&format=xml")[0])
        self.fetch("/set?key=a%22", "POST", 'é\0"', **form)
        self.assertEqual((200, "0"), self.fetch("/get?key=a%22&format=age"), "the same value again is an update")

    def test_unknown_parameters_are_400_everywhere(self) -> None:
        for route in kvserver.ROUTES:
            path = "/iotpersistenceapi" + route.path.replace("KEY", "k")
            for method in route.methods:
                known = "key=x&" if route.parameters[:1] == ("key",) else ""
                status, text = self.fetch(f"{path}?{known}tll=5", method, Accept="text/html")
                self.assertEqual((400, method != "HEAD"), (status, "tll" in text), (method, path))
        for body, content_type in (("key=a&value=1&tll=1", kvserver.FORM), ('{"key": "a", "tll": 1}', kvserver.JSON)):
            self.assertIn("'tll' is unknown", self.fetch("/set", "POST", body, Content_Type=content_type)[1])
        self.assertEqual((200, "Success"), self.fetch("/set?key=a&value=1&_=123&_=124"))
        self.assertEqual({"a": "1"}, self.pairs())

    def test_lists_have_pages(self) -> None:
        keys = ["a", "b/", "b/1", "b/10", "b/2", "b/é", "b/\U0010ffff", "b/\U0010ffff\U0010ffff", "b0", "ü"]
        for key in reversed(keys):
            self.store.set_value(1, key, key + "!")
        self.store.set_value(2, "b/3", "bob's")
        self.store.set_value(1, "b/9", "x", time.time() - 1)
        for prefix, limit in itertools.product(("", "b/", "b", "x", "b/\U0010ffff"), (1, 2, 3, 7, 8, 10_000)):
            expected = [key for key in keys if key.startswith(prefix)]
            found, pages = list[str](), 0
            target = "?" + urllib.parse.urlencode({"prefix": prefix, "limit": limit})
            while target:
                answer = self.request("GET", "/iotpersistenceapi/list" + target)
                pairs = json.loads(answer.body)
                self.assertEqual([key + "!" for key in pairs], list(pairs.values()))
                found, pages = [*found, *pairs], pages + 1
                link = re.fullmatch(r'<(\?[!-~]*)>; rel="next"', answer.headers.get("link", '<?>; rel="next"'))
                target = link[1].removesuffix("?") if link else self.fail(answer.headers["link"])
            self.assertEqual((expected, max(1, math.ceil(len(expected) / limit))), (found, pages), (prefix, limit))
        self.assertEqual('{"b/10":"b/10!"}', self.fetch("/list?after=b/1&limit=1&prefix=b/1")[1])
        for wrong in ("0", "-1", "x", "", "10001", "1.5"):
            self.assertEqual(400, self.fetch(f"/list?limit={wrong}")[0], wrong)


class History(ServerCase):
    """The last changes of each pair."""

    def setUp(self) -> None:
        super().setUp()
        self.keep(100)

    def keep(self, rows_max: int) -> None:
        """Do as a start with --history does."""
        self.store.transact(lambda store: store.keep_history(rows_max))

    def changes(self, key: str = "a", user: str = "alice", **parameters: object) -> list[dict[str, Any]]:
        answer = self.check(200, "GET", url("/history", key=key, **parameters), user=user)
        self.assertEqual("application/json", answer.headers["content-type"])
        return cast("list[dict[str, Any]]", json.loads(answer.body))

    def values(self, key: str = "a", user: str = "alice", **parameters: object) -> list[str | None]:
        return [change["value"] for change in self.changes(key, user, **parameters)]

    def set(self, key: str, *values: object, user: str = "alice", **parameters: object) -> None:
        for value in values:
            self.check(200, "GET", url("/set", key=key, value=value, **parameters), user=user)

    def import_pair(self, value: str, updated: float) -> None:
        with contextlib.closing(kvserver.open_store(self.database)) as store:
            store.import_all([], [("alice", "a", value, updated, None)])

    def test_every_change_is_kept_newest_first(self) -> None:
        before = time.time()
        self.set("b", "1")
        self.set("a", "1", user="bob")
        requests: tuple[tuple[str, ...], ...] = (
            ("GET", "/set?key=a&value=open"),
            ("GET", "/set?key=a&value=open"),  # is no change
            ("GET", "/set?key=a&value=open&ttl=60"),  # nor is this
            ("GET", "/set?key=a&value=7&old=open"),
            ("GET", "/incr?key=a"),
            ("GET", "/toggle?key=a&values=8,9"),
            ("PUT", "/kv/a", 'é ☃ " \0 \n'),
            ("DELETE", "/kv/a"),
            ("GET", "/set?key=a&value=&nx=1"),
            ("GET", "/del?key=a"),
            ("POST", "/me/", "action=set&key=a&value=x", kvserver.FORM),
            ("POST", "/me/", "action=del&key=a", kvserver.FORM),
        )
        for method, target, *body_and_type in requests:
            self.assertLess(self.request(method, target, *cast(Any, body_and_type)).status, 400, target)
        after = time.time()
        values = ["open", "7", "8", "9", 'é ☃ " \0 \n', None, "", None, "x", None]
        changes = self.changes()
        self.assertEqual(values[::-1], [change["value"] for change in changes])
        self.assertEqual([["time", "value"]] * 10, [list(change) for change in changes])
        times = [datetime.datetime.fromisoformat(change["time"]).timestamp() for change in changes]
        self.assertEqual([], [pair for pair in itertools.pairwise(times) if pair[0] < pair[1] - 0.002])
        self.assertTrue(before - 0.001 <= times[-1] <= times[0] <= after + 0.002, (before, times, after))
        self.import_pair("imported", 1.0625)
        self.store.set_value(1, "a", "by another process")
        self.import_pair("again", 0)
        times_and_values = [tuple(change.values()) for change in self.changes(limit=4)]
        self.assertEqual(["again", "by another process", "imported", None], [value for _, value in times_and_values])
        self.assertEqual("1970-01-01T00:00:01.063Z", times_and_values[2][0])
        self.assertEqual((["1"], ["1"]), (self.values("b"), self.values("a", "bob")))

    def test_an_expiry_is_a_change_also_before_the_next_value_and_after_a_stop(self) -> None:
        with mock.patch.object(kvserver.CachingStore, "has_expired", return_value=False):
            for expired, new in (("1", "1"), ("2", "3")):
                self.store.set_value(1, "a", expired, 1e9)
                self.set("a", new)
            self.import_pair("4", 5)
            execute(self.database, "UPDATE pair SET expires = 1")
            self.import_pair("4", 6)
            self.assertEqual(["4", None, "4", "3", None, "2", "1", None, "1"], self.values())
            self.assertEqual("2001-09-09T01:46:40.000Z", self.changes()[4]["time"], "when it expired")
            self.stop()
        self.store.set_value(1, "a", "5", 1.5e9)
        self.start()
        wait_until(lambda: len(self.changes()) == 11)
        self.assertEqual({"time": "2017-07-14T02:40:00.000Z", "value": None}, self.changes()[0])
        self.set("a", "6", ttl=0.01)
        wait_until(lambda: len(self.changes()) == 13)
        self.assertEqual([None, "6"], self.values(limit=2))

    def test_of_a_long_value_the_first_whole_characters_are_kept(self) -> None:
        cases = (
            ("x" * 1024, "x" * 1024),
            ("x" * 1025, "x" * 1024),
            ("x" * 1023 + "é", "x" * 1023),
            ("x" * 1022 + "é", "x" * 1022 + "é"),
            ("x" * 1022 + "é" + "y" * 1_000_000, "x" * 1022 + "é"),
            ("x" * 1021 + "😀", "x" * 1021),
            ("\0" * 1025, "\0" * 1024),
        )
        for value, kept in cases:
            self.check(200, "POST", "/set?key=a", value)
            change = self.changes(limit=1)[0]
            self.assertEqual((kept, value != kept), (change["value"], change.get("cut", False)))
        self.assertNotIn("cut", self.changes()[-1])

    def test_csv(self) -> None:
        self.assertEqual(404, self.fetch("/history?key=a&format=csv")[0])
        values = ('say "hi", you', "a\r\nb\n", "", "=1+1", "☃" * 342, "\0")
        for value in values:
            self.check(201 if value == values[0] else 200, "PUT", "/kv/a", value)
        self.check(200, "DELETE", "/kv/a")
        answer = self.check(200, "GET", "/history?key=a&format=csv")
        self.assertEqual("text/csv; charset=utf-8", answer.headers["content-type"])
        head, *rows = csv.reader(io.StringIO(answer.body.decode(), newline=""), strict=True)
        self.assertEqual(["time", "value", "state"], head)
        expected = [[value, "set"] for value in values]
        expected[4] = ["☃" * 341, "cut"]
        self.assertEqual([["", "gone"], *expected[::-1]], [row[1:] for row in rows])
        self.assertEqual([change["time"] for change in self.changes()], [row[0] for row in rows])
        self.check(200, "DELETE", "/history?key=a")
        self.check(404, "GET", "/history?key=a&format=csv")

    def test_limit_and_since(self) -> None:
        now = time.time()
        for value, updated in (("1", 1e9 + 0.0004), ("2", 1e9 + 0.0006), ("3", now - 1000), ("4", now - 10)):
            self.import_pair(value, updated)
        for parameters, expected in (
            ({}, "4321"),
            ({"limit": 1}, "4"),
            ({"limit": 10_000}, "4321"),
            ({"limit": 1, "since": 10**9}, "4"),
            ({"since": 0}, ""),
            ({"since": 600}, "4"),
            ({"since": "1001.5"}, "43"),
            ({"since": "1970-01-01T00:00:00Z"}, "4321"),
            ({"since": "2001-09-09t01:46:40z"}, "4321"),
            ({"since": "2001-09-09T01:46:40.001Z"}, "432"),  # the time that the answer tells of the second
            ({"since": "2001-09-09T03:46:40.001+02:00"}, "432"),
            ({"since": "2001-09-09T01:46:40.002Z"}, "43"),
            ({"since": "2001-09-09T01:46:40-00:01"}, "43"),
            ({"since": "9999-12-31T23:59:59Z"}, ""),
        ):
            self.assertEqual([*expected], self.values(**cast(Any, parameters)), parameters)
        plus = "/history?key=a&since=2001-09-09T03:46:40.002+02:00"  # as it is, the plus means a space
        self.assertEqual(2, len(json.loads(self.check(200, "GET", plus).body)))
        limits = ("limit=0", "limit=10001", "limit=x", "limit=-1", "limit=")
        times = ("x", "-5", "1e3", "", "1h", "1000000001", "2030-01-31T23:59:59", "2030-01-31", "10000-01-01T00:00:00Z")
        for wrong in (*limits, *("since=" + text for text in times), "format=json"):
            status, text = self.fetch("/history?key=a&" + wrong)
            hint = "a time is like 2030" if "-01-" in wrong else f"the parameter {wrong.partition('=')[0]} "
            self.assertEqual((400, True), (status, hint in text), text)
        wrong = "the parameter since is '1h'; send 0 to 1000000000 seconds, such as 3600 or 2030"
        self.assertTrue(self.fetch("/history?key=a&since=1h")[1].startswith(wrong))

    def test_only_the_last_ones_are_kept_and_fewer_after_a_start_with_less(self) -> None:
        self.keep(3)
        self.set("a", *range(1, 8))
        self.set("b", "1", "2")
        self.assertEqual((["7", "6", "5"], ["2", "1"]), (self.values(), self.values("b")))
        self.keep(1)
        self.assertEqual((["7"], ["2"]), (self.values(), self.values("b")))
        self.set("a", "8")
        self.assertEqual(["8"], self.values())
        self.keep(2)
        self.set("a", "9")
        self.check(200, "GET", "/del?key=b")
        self.assertEqual((["9", "8"], [None, "2"]), (self.values(), self.values("b")))
        self.keep(100)  # stores some more, and deletes several at once
        with self.store.begin():
            for number in range(113):
                self.store.set_value(1, "a", str(number))
        self.assertEqual([str(number) for number in range(112, 12, -1)], self.values())
        self.assertEqual(["112"], self.values(since=600, limit=1))
        self.assertIn(self.number_of_rows(), range(102, 109))
        self.keep(0)
        self.keep(5)
        self.assertEqual([], self.values())
        self.check(404, "GET", "/history?key=b")

    def test_without_history_every_request_is_404_and_there_is_no_trigger(self) -> None:
        self.set("a", "1")
        triggers = "SELECT 1 FROM sqlite_master WHERE type = 'trigger'"
        self.assertTrue(self.store._execute(triggers).fetchall())
        self.keep(0)
        self.assertFalse(self.store._execute(triggers).fetchall())
        for method, target in (
            ("GET", "/history?key=a"),
            ("DELETE", "/history?key=a"),
            ("GET", "/history?key=b&limit=x"),
        ):
            self.assertIn(b"--history", self.check(404, method, target).body)
        self.check(404, "HEAD", "/history?key=a")
        self.assertEqual((0,), self.store._execute("SELECT count(*) FROM history").fetchone())

    def test_a_key_is_known_by_its_value_or_its_history(self) -> None:
        self.keep(0)
        self.set("a", "1")
        self.keep(5)
        self.assertEqual([], self.changes())
        self.check(404, "GET", "/history?key=b")
        self.set("b", "1")
        self.check(200, "GET", "/del?key=b")
        self.assertEqual([None, "1"], self.values("b"))
        self.assertEqual([], self.values("b", since=0))
        self.check(404, "GET", "/history?key=b", user="bob")
        self.assertEqual(b"", self.check(200, "HEAD", "/history?key=b").body)

    def test_it_can_be_erased(self) -> None:
        waiting = self.begin("GET /get?key=a&wait=60&unless=2 HTTP/1.1")
        for user in PASSWORDS:
            self.set("a", "1", "2", user=user)
        self.assertEqual([200], statuses(waiting.recv(65536)))
        self.set("b", "1")
        events = Events(self.new_connection(), basic("alice", PASSWORDS["alice"]))
        self.assertEqual([("set", "a", "2"), ("set", "b", "1"), ("ready",)], events.take(3))
        for key, status in (("a", 200), ("a", 200), ("c", 404)):
            self.check(status, "DELETE", "/history?key=" + key)
        self.assertEqual(([], ["1"], ["2", "1"]), (self.values(), self.values("b"), self.values("a", "bob")))
        self.set("a", "2", "3")
        self.assertEqual(["3"], self.values())
        self.assertEqual([("set", "a", "2"), ("set", "a", "3")], events.take(2), "no pair has changed before")
        self.check(403, "DELETE", "/history?key=a", headers={"Sec-Fetch-Site": "cross-site"})
        for times in range(2):  # a new user of the same name sees nothing of the one before
            self.check(303, "POST", "/admin/", "action=deluser&username=bob", kvserver.FORM)
            rows = self.store._execute("SELECT DISTINCT user_id FROM history").fetchall()
            self.assertEqual([(1,)], rows)
            self.store.add_user("bob", kvserver.hash_password(PASSWORDS["bob"]), False)
            self.check(404, "GET", "/history?key=a", user="bob")
            self.set("a", times, user="bob")

    def test_a_full_database_still_deletes_values_and_their_history(self) -> None:
        self.max_db_mb = 1
        self.stop()
        self.start()
        self.keep(10_000)
        self.assertEqual(0, self.number_of_rows())
        stored = 0
        while self.request("POST", "/set?key=a", f"{stored} " + "x" * 1000).status != 507:
            stored += 1
        self.assertIn(stored, range(200, 1000), "the history counts")
        self.assertEqual(stored, self.number_of_rows())
        self.check(200, "GET", "/del?key=a")
        self.assertEqual(None, self.values(limit=1)[0])
        self.check(200, "DELETE", "/history?key=a")
        self.assertEqual(0, self.number_of_rows())
        self.check(200, "POST", "/set?key=a", "x" * 500_000)

    def number_of_rows(self) -> int:
        (number,) = re.findall(r"^kvserver_history_rows (\d+)$", self.fetch("/metrics")[1], re.MULTILINE)
        return int(number)

    def test_a_change_writes_at_most_two_more_pages(self) -> None:
        medians = list[float]()
        for rows_max in (0, 100):
            self.keep(rows_max)
            pages = list[int]()
            for number in range(400):
                self.store._execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self.set("a", f"{number} ".ljust(100, "x"))
                pages.append(self.server.reader.wal_pages())
            medians.append(statistics.median(pages[200:]))
        self.assertLessEqual(medians[1], medians[0] + 2)

    def test_a_longer_list_than_the_limit_is_409(self) -> None:
        self.set("a", "1" * 100, "2" * 100)
        for form in ("", "&format=csv"):
            size = len(self.check(200, "GET", "/history?key=a" + form).body)
            for limit, status in ((size, 200), (size - 2, 409)):
                with mock.patch.object(kvserver, "LIST_BYTES_MAX", limit):
                    answer = self.check(status, "GET", "/history?key=a" + form)
                    self.assertTrue(status == 200 or b"use limit=N" in answer.body)


class Waiting(ServerCase):
    def wait(self, query: str = "key=a&wait=60&unless=1", *lines: str) -> socket.socket:
        """Send a request on a connection of its own, and return when it waits."""
        count = len(self.server.polls)
        connection = self.connect(self.raw(f"GET /get?{query} HTTP/1.1", *lines))
        wait_until(lambda: len(self.server.polls) == count + 1)
        return connection

    def assert_answers(self, expected: tuple[int, str], *connections: socket.socket) -> None:
        for connection in connections:
            status, _, body = connection.recv(65536).decode().partition("\r\n\r\n")
            self.assertEqual(expected, (int(status.split()[1]), body))

    def test_a_change_ends_the_wait(self) -> None:
        self.fetch("/set?key=a&value=1")
        tag = self.request("GET", "/get?key=a").headers["etag"]
        waiting = [self.wait(), self.wait("key=a&wait=60&unless=1&default=x")]
        waiting.append(self.wait("key=a&wait=60", f"If-None-Match: W/{tag}"))
        age = self.wait("key=a&wait=60&unless=1&format=age")
        self.fetch("/set?key=b&value=2")
        self.fetch("/set?key=a&value=1")
        wait_until(lambda: len(self.server.polls) == 4)  # the server has looked at them, and they wait again
        self.fetch("/set?key=a&value=2")
        self.assert_answers((200, "2"), *waiting)
        self.assert_answers((200, "0"), age)
        self.assertEqual({}, self.server.polls)

    def test_a_new_key_and_a_change_by_another_process_end_the_wait(self) -> None:
        waiting = self.wait()
        self.fetch("/kv/a", "PUT", "2")
        self.assert_answers((200, "2"), waiting)
        waiting = self.wait("key=a&wait=60&unless=2")
        self.store.set_value(1, "a", "3")
        self.assert_answers((200, "3"), waiting)

    def test_a_deletion_or_an_expiry_ends_the_wait(self) -> None:
        for default, expected in (("", (404, kvserver.UNKNOWN_KEY)), ("&default=x", (200, "x"))):
            self.fetch("/set?key=a&value=1")
            waiting = self.wait("key=a&wait=60&unless=1" + default)
            self.fetch("/del?key=a")
            self.assert_answers(expected, waiting)
            self.fetch("/set?key=a&value=1&ttl=0.1")
            raw = self.raw(f"GET /get?key=a&wait=60&unless=1{default} HTTP/1.1")
            self.assert_answers(expected, self.connect(raw))

    def test_the_time_is_kept(self) -> None:
        self.fetch("/set?key=a&value=1")
        tag = self.request("GET", "/get?key=a").headers["etag"]
        for query, lines, expected in (
            ("key=a&unless=1", (), (200, "1")),
            ("key=a", (f"If-None-Match: {tag}",), (304, "")),
            ("key=b&unless=1", (), (404, kvserver.UNKNOWN_KEY)),
            ("key=b&unless=1&default=x", (), (200, "x")),
        ):
            begun = time.monotonic()
            for seconds in (0, 0.05):
                request = self.raw(f"GET /get?{query}&wait={seconds} HTTP/1.1", *lines)
                self.assert_answers(expected, self.connect(request))
                self.assertGreaterEqual(time.monotonic() - begun, seconds)

    def test_wait_needs_unless_or_an_entity_tag_and_another_value_is_sent_at_once(self) -> None:
        self.fetch("/set?key=a&value=1")
        for query in ("wait=1", "unless=1", *(f"wait={wait}&unless=1" for wait in ("61", "-1", "x", ""))):
            self.check(400, "GET", f"/get?key=a&{query}")
        self.assertEqual((200, "1"), self.fetch("/get?key=a&wait=60&unless=0"))
        self.assertEqual((200, "1"), self.fetch("/get?key=a&wait=60", If_None_Match='"x"'))

    def test_changes_of_other_keys_cost_nothing(self) -> None:
        self.patch("QUICK_COMMIT_SECONDS", math.inf)  # otherwise a look may come between a commit and its end
        self.server.writer.commit_seconds = 0
        with mock.patch.object(self.server.reader, "pair", wraps=self.server.reader.pair) as pair:
            waiting = self.wait()
            for number in range(20):
                self.fetch(f"/set?key=b&value={number}")
            self.fetch("/set?key=a&value=2")
            self.assert_answers((200, "2"), waiting)
        self.assertLessEqual(pair.call_count, 3, "at its begin, at its end, and once after the users were added")

    def test_half_of_the_connections_may_wait(self) -> None:
        self.server.max_connections = 4
        waiting = [self.wait() for _ in range(2)]
        answer = self.request("GET", "/get?key=a&wait=60&unless=1")
        self.assertEqual((503, True), (answer.status, "retry-after" in answer.headers))
        for _ in range(6):
            self.connect()
        self.fetch("/set?key=a&value=2")
        self.assert_answers((200, "2"), *waiting)

    def test_a_client_that_goes_away_makes_room(self) -> None:
        self.wait().close()
        wait_until(lambda: not self.server.polls and not self.server.connections)

    def test_a_request_sent_while_waiting_comes_next(self) -> None:
        waiting = self.wait()
        waiting.sendall(self.raw("GET /health HTTP/1.1", "Connection: close"))
        self.fetch("/set?key=a&value=2")
        self.assertRegex(read_all(waiting), rb"(?s)\r\n\r\n2HTTP/1.1 200 .*\r\n\r\nok\Z")

    def test_a_stop_ends_the_wait(self) -> None:
        self.fetch("/set?key=a&value=1")
        waiting, without_value = self.wait(), self.wait("key=b&wait=60&unless=1")
        begun = time.monotonic()
        self.stop()
        self.assert_answers((200, "1"), waiting)
        self.assert_answers((404, kvserver.UNKNOWN_KEY), without_value)
        self.assertLess(time.monotonic() - begun, kvserver.STOP_REQUEST_SECONDS)

    def test_a_user_whose_password_changes_gets_no_value(self) -> None:
        waiting = self.wait()
        change = "UPDATE user SET password_hash = 'x' WHERE id = 1; INSERT INTO pair VALUES (1, 'a', 's3cr3t', 0, NULL)"
        execute(self.database, f"BEGIN; {change}; COMMIT")
        response = waiting.recv(65536)
        self.assertEqual((b"401", False), (response[9:12], b"s3cr3t" in response))


class Events:
    """A client of /events. It reads events as tuples of name, key and value, as far as they have them."""

    def __init__(self, connection: http.client.HTTPConnection, login: str, query: str = "") -> None:
        connection.request("GET", "/events" + query, headers={"Authorization": login})
        self.response = connection.getresponse()

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        while True:
            lines = list(iter(lambda: self.response.readline().decode().rstrip("\n"), ""))
            if not lines:
                return
            if lines != [":"]:
                data = json.loads(lines[1].removeprefix("data: "))
                found = (lines[0].removeprefix("event: "), data.get("key"), data.get("value"))
                yield tuple(part for part in found if part is not None)

    def take(self, count: int = 1) -> list[tuple[str, ...]]:
        return list(itertools.islice(self, count))

    def take_pairs(self) -> dict[str, str]:
        """Return the pairs that come before the event ready."""
        pairs: dict[str, str] = {}
        for name, *pair in self:
            if name == "ready":
                break
            pairs.pop(pair[0], None)
            pairs.update({pair[0]: pair[1]} if name == "set" else {})
        return pairs


class Streams(ServerCase):
    def stream(self, query: str = "", login: str = "alice") -> Events:
        return Events(self.new_connection(), basic(login, PASSWORDS[login]) if login in PASSWORDS else login, query)

    def test_all_pairs_come_sorted_and_then_each_change_in_order(self) -> None:
        self.fetch("/set?key=b&value=2")
        self.fetch("/set?key=a&value=%C3%BC%0A%22")
        self.fetch("/set?key=a&value=0", user="bob")
        events = self.stream()
        self.assertEqual([("set", "a", 'ü\n"'), ("set", "b", "2"), ("ready",)], events.take(3))
        for target in ("set?key=a&value=1", "set?key=a&value=1", "del?key=b", "incr?key=n", "toggle?key=t"):
            self.fetch("/" + target)
        self.fetch("/set?key=a&value=0", user="bob")
        self.fetch("/set?key=b&value=3&ttl=0.01")
        expected = [("set", "a", "1"), ("set", "a", "1"), ("del", "b"), ("set", "n", "1"), ("set", "t", "on")]
        self.assertEqual([*expected, ("set", "b", "3"), ("del", "b")], events.take(7))

    def test_times_are_those_of_other_answers(self) -> None:
        self.fetch("/set?key=a&value=1")
        for updated in (0, 1e9 + 0.0006, 253402300799.9994):
            execute(self.database, f"UPDATE pair SET updated = {updated!r}")
            shown = json.loads(self.fetch("/get?key=a&format=json")[1])["updated"]
            response = self.stream().response
            response.readline()
            self.assertEqual(shown, json.loads(response.readline().removeprefix(b"data: "))["updated"])

    def test_the_bytes_of_a_stream(self) -> None:
        self.patch("SILENT_SECONDS", 0.05)
        streams = [self.begin(f"GET /events HTTP/1.{minor}") for minor in (0, 1)]
        for stream in streams:
            wait_until(lambda stream=stream: b"ready" in stream.recv(9999, socket.MSG_PEEK))  # type: ignore[misc]
        self.fetch("/set?key=a&value=%C3%BC")
        for stream, comment in zip(streams, (b":\n\n", b"3\r\n:\n\n\r\n")):
            wait_until(lambda stream=stream, end=comment: stream.recv(9999, socket.MSG_PEEK).endswith(end))  # type: ignore[misc]
        updated = json.loads(self.fetch("/get?key=a&format=json")[1])["updated"]
        self.stop()
        event = f'event: set\ndata: {{"key": "a", "value": "\\u00fc", "updated": "{updated}"}}\n\n'.encode()
        body = b"event: ready\ndata: {}\n\n", event, b":\n\n"
        chunks = *(b"%x\r\n%b\r\n" % (len(part), part) for part in body), b"0\r\n\r\n"
        for stream, parts, coding in zip(streams, (body, chunks), (b"", b"Transfer-Encoding: chunked\r\n")):
            head, _, received = read_all(stream).partition(b"\r\n\r\n")
            lines = b"Content-Type: text/event-stream\r\nX-Accel-Buffering: no\r\n" + coding
            for line in (b"HTTP/1.1 200 OK\r\n", b"Cache-Control: no-store\r\n", lines + b"Connection: close"):
                self.assertIn(line, head)
            self.assertNotIn(b"Content-Length", head)
            while parts[2] * 2 in received:  # more comments
                received = received.replace(parts[2] * 2, parts[2])
            self.assertEqual(b"".join(parts), received.replace(parts[0] + parts[2], parts[0]))

    def test_a_token_with_a_prefix_sees_its_keys_only(self) -> None:
        for key in ("a/x", "a/y", "b"):
            self.fetch("/kv/" + key, "PUT", "1")
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", True, "a/")
        for query, login, keys in (
            ("?prefix=a/z", "alice", []),
            ("?prefix=a/y", "alice", ["a/y"]),
            ("", f"Bearer {token}", ["a/x", "a/y", "a/z"]),
            ("?prefix=a", f"Bearer {token}", ["a/x", "a/y", "a/z"]),
            ("?prefix=a/y", f"Bearer {token}", ["a/y"]),
        ):
            events = self.stream(query, login)
            self.assertEqual([*(("set", key, "1") for key in keys), ("ready",)], events.take(len(keys) + 1))
            for key in ("A", "b", "a/y", "a/z"):
                self.fetch("/kv/" + key, "PUT", "1")
            self.assertEqual([("set", "a/y" if keys else "a/z", "1")], events.take())
        for status, prefix in ((403, "b"), (403, "aa"), (400, "x" * (kvserver.KEY_BYTES_MAX + 1))):
            self.check(status, "GET", "/events?prefix=" + prefix, user=f"Bearer {token}")

    def test_half_of_the_connections_may_wait(self) -> None:
        self.server.max_connections = 4
        first = self.stream()
        self.begin("GET /get?key=a&wait=60&unless=1 HTTP/1.1")
        wait_until(lambda: self.server.polls)
        self.assertIn("retry-after", self.check(503, "GET", "/events").headers)
        self.check(503, "GET", "/get?key=a&wait=60&unless=1")
        self.assertIn("\nkvserver_streams 1\n", self.fetch("/metrics")[1])
        first.response.close()
        wait_until(lambda: not self.server.streams)
        self.assertEqual([("ready",)], self.stream().take())

    def test_the_end_of_a_login_ends_the_stream_even_of_a_client_that_takes_nothing(self) -> None:
        self.patch("SEND_SECONDS", 1000)
        self.fill(8, 2)
        password_hash = self.store.user("bob").password_hash  # type: ignore[union-attr]

        def delete_token(store: kvserver.Store) -> None:
            store.set_password_hash("bob", password_hash)
            store.delete_token("bob", 1)

        def replace_user(store: kvserver.Store) -> None:
            store.delete_user("bob", False)
            store.add_user("bob", password_hash, False)

        ends: tuple[Callable[[kvserver.Store], object], ...] = (
            lambda store: store.set_password_hash("bob", "x"),
            delete_token,
            replace_user,
        )
        token = kvserver.make_token()
        self.store.add_token("bob", kvserver.hash_token(token), "", True, "a")
        for login, end in zip(("bob", f"Bearer {token}", "bob"), ends):
            events = self.stream("?prefix=a", login)
            self.assertEqual([("ready",)], events.take())
            blocked = [self.connect(self.raw("GET /events HTTP/1.1", user="bob"), True)] if login == "bob" else []
            wait_until(lambda blocked=blocked: self.blocked() == len(blocked))  # type: ignore[misc]
            self.store.transact(end)
            self.assertEqual(b"", events.response.read())  # with a last chunk
            wait_until(lambda: not self.server.streams)

    def blocked(self) -> int:
        return sum(handler.state == kvserver.SENDING for handler in self.server.connections.values())

    def test_a_commit_of_another_process_starts_a_stream_again_at_most_once_in_a_while(self) -> None:
        self.patch("RESTART_SECONDS", 0.2)
        begun = time.monotonic()
        events = self.stream()
        self.assertEqual([("ready",)], events.take())
        for number in range(1, 4):
            for _ in range(3):
                self.store.set_value(1, "a", str(number))
                wait_until(lambda: self.server._state == self.server.reader.state())
            self.assertEqual([("reset",), ("set", "a", str(number)), ("ready",)], events.take(3))
            self.assertGreater(time.monotonic() - begun, 0.2 * number)
        self.fetch("/set?key=b&value=1")
        self.assertEqual([("set", "b", "1")], events.take())

    def test_own_commits_without_pairs_and_refused_changes_start_nothing_again(self) -> None:
        self.patch("RESTART_SECONDS", 0)
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", False, "")
        self.fetch("/set?key=a&value=1")
        wait_until(lambda: self.server._state == self.server.reader.state())
        events = self.stream()
        self.assertEqual([("set", "a", "1"), ("ready",)], events.take(2))
        self.check(200, "GET", "/get?key=a", user=f"Bearer {token}")
        wait_until(lambda: self.store.tokens("alice")[0].last_used is not None)  # the server has stored that
        for target in ("/set?key=a&value=2&old=x", "/incr?key=b&by=x", "/del?key=b"):
            self.fetch(target)
        self.fetch("/set?key=b&value=2")
        self.assertEqual([("set", "b", "2")], events.take())

    def test_another_process_or_a_full_disk_beside_own_commits(self) -> None:
        self.patch("RESTART_SECONDS", 0)
        commit, also, after = self.server.writer.commit, list[Any](), list[Callable[[], object]]()

        def commit_these_too(operations: Sequence[Any], begin: bool = False) -> list[Any]:
            together = [*operations, *also]
            also.clear()
            results = commit(together, begin)
            while after:
                after.pop()()
            return results[: len(operations)]

        def fail(store: kvserver.Store) -> None:
            store._execute("ROLLBACK")  # as SQLite does when the disk is full
            raise sqlite3.OperationalError("database or disk is full")

        events = self.stream()
        self.assertEqual([("ready",)], events.take())
        with mock.patch.object(self.server.writer, "commit", commit_these_too):
            also += [lambda store: store.set_value(1, "b", "1"), fail]  # each is tried again by itself
            self.fetch("/set?key=a&value=1")
            self.assertEqual([("set", "a", "1"), ("set", "b", "1")], events.take(2))
            for target in ("/del?key=unknown", "/set?key=a&value=2"):
                after.append(lambda: self.store.set_value(1, "c", "1"))
                self.fetch(target)
                self.assertEqual([("reset",), ("set", "a", target[-1] if target[-1] == "2" else "1")], events.take(2))
                self.assertEqual([("set", "b", "1"), ("set", "c", "1"), ("ready",)], events.take(3))
        self.patch("RESTART_SECONDS", 1000)
        begin = self.server.writer.begin

        def begin_after_another_process() -> sqlite3.Connection:
            self.store.set_value(1, "c", "2")
            return begin()

        with mock.patch.object(self.server.writer, "begin", begin_after_another_process):
            self.fetch("/set?key=d&value=1")
        self.assertEqual([("set", "d", "1")], events.take())

    def test_a_client_that_takes_nothing_is_closed(self) -> None:
        self.patch("SEND_SECONDS", 1000)
        self.fill(8)
        self.connect(self.raw("GET /events HTTP/1.1"), has_small_buffer=True)
        wait_until(self.blocked)
        self.patch("SEND_SECONDS", 0.1)  # from now on; the stream waits with the other limit
        self.store.set_value(1, "a", "1")  # wakes the stream
        wait_until(lambda: not self.server.streams)

    @unittest.skipUnless(sys.platform == "linux", "other kernels buffer more")
    def test_a_client_that_takes_no_more_than_its_buffer_is_closed(self) -> None:
        self.patch("SEND_SECONDS", 0.2)
        self.connect(self.raw("GET /events HTTP/1.1"), has_small_buffer=True)
        wait_until(lambda: self.server.streams)
        self.fetch("/kv/a", "PUT", "x" * 200_000)
        wait_until(lambda: not self.server.streams)

    def test_a_client_that_lets_changes_pile_up_is_closed(self) -> None:
        self.patch("SEND_SECONDS", 1000)
        self.patch("PENDING_BYTES_MAX", 200)
        self.fill(8)
        self.connect(self.raw("GET /events HTTP/1.1"), has_small_buffer=True)
        wait_until(self.blocked)
        (stream,) = self.server.streams
        self.fetch("/set?key=0&value=1")  # its key has been sent
        size = stream.pending_bytes
        self.fetch("/set?key=9&value=1")  # this one has not
        self.assertEqual(size, stream.pending_bytes)
        self.fetch("/set?key=0&value=" + "x" * (200 - 2 * size + 1))
        self.assertEqual(200, stream.pending_bytes)
        self.fetch("/set?key=0&value=2")
        self.assertEqual({stream}, self.server.streams)
        self.fetch("/set?key=0&value=1")
        wait_until(lambda: not self.server.streams)

    def test_streams_share_the_memory_of_a_long_value(self) -> None:
        self.patch("UNSENT_BYTES_MAX", math.inf)
        for version in ("1.0", "1.1"):
            for _ in range(10):
                self.connect(self.raw("GET /events HTTP/" + version), has_small_buffer=True)
        wait_until(lambda: sum(stream.after == stream.end for stream in self.server.streams) == 20)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.fetch("/kv/a", "PUT", "\x01" * kvserver.VALUE_BYTES_MAX)  # 6 MiB as JSON
        wait_until(lambda: self.blocked() == 20)
        for version in ("1.0", "1.1"):  # these begin with it
            for _ in range(10):
                self.connect(self.raw("GET /events HTTP/" + version), has_small_buffer=True)
        wait_until(lambda: self.blocked() == 40)
        self.assertLess(tracemalloc.get_traced_memory()[1], 64 * 1024 * 1024)

    def test_first_pairs_are_finished_before_the_stream_starts_again(self) -> None:
        self.patch("RESTART_SECONDS", 0)
        pairs = self.fill(8)
        connection = self.new_connection()
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        events = Events(connection, basic("alice", PASSWORDS["alice"]))
        wait_until(self.blocked)
        self.store.set_value(1, "0", "new")
        wait_until(lambda: self.server._state == self.server.reader.state())
        self.assertEqual(pairs, events.take_pairs())
        self.assertEqual([("reset",)], events.take())
        self.assertEqual(pairs | {"0": "new"}, events.take_pairs())

    def test_a_change_comes_after_its_commit_and_only_once(self) -> None:
        self.fetch("/set?key=a&value=0")
        first = self.stream("?prefix=a")
        first.take_pairs()
        self.server.writer.commit_seconds = 1  # a thread commits
        commit, committed, release = self.server.writer.commit, threading.Event(), threading.Event()

        def commit_and_wait(*arguments: Any) -> list[Any]:
            results = commit(*arguments)
            committed.set()
            assert release.wait(WAIT_SECONDS)
            return results

        with mock.patch.object(self.server.writer, "commit", commit_and_wait):
            writing = self.begin("GET /set?key=a&value=1 HTTP/1.1")
            self.assertTrue(committed.wait(WAIT_SECONDS))
            with mock.patch.object(self.server.reader, "pairs", wraps=self.server.reader.pairs) as read:
                second = self.stream()  # it could see the change, but the first stream has not got it yet
                wait_until(lambda: read.call_count > 1)
            release.set()
            self.assertEqual([200], statuses(writing.recv(65536)))
        self.assertEqual([("set", "a", "1")], first.take())
        self.assertEqual([("set", "a", "1"), ("ready",)], second.take(2))
        self.fetch("/set?key=b&value=1")
        self.assertEqual([("set", "b", "1")], second.take())

    def test_streams_that_begin_while_others_write_follow_all_commits(self) -> None:
        rates, commit = random.Random(1), self.server.writer.commit

        def commit_in_the_loop_or_in_a_thread(*arguments: Any) -> list[Any]:
            results = commit(*arguments)
            self.server.writer.commit_seconds = rates.choice((0, 1))
            return results

        self.enterContext(mock.patch.object(self.server.writer, "commit", commit_in_the_loop_or_in_a_thread))
        start = {f"{number:03}": "x" * 50 for number in range(600)}  # several pages
        with self.store.begin():
            for key, value in start.items():
                self.store.set_value(1, key, value)
        record = "BEGIN INSERT INTO log VALUES (NULL, {0}.key, {1}); END;"
        execute(
            self.database,
            "CREATE TABLE log (id INTEGER PRIMARY KEY, key, value);"
            f"CREATE TRIGGER log_added AFTER INSERT ON pair {record.format('NEW', 'NEW.value')}"
            f"CREATE TRIGGER log_changed AFTER UPDATE OF value ON pair {record.format('NEW', 'NEW.value')}"
            f"CREATE TRIGGER log_removed AFTER DELETE ON pair {record.format('OLD', 'NULL')}",
        )
        wait_until(lambda: self.server._state == self.server.reader.state())

        def write(name: str) -> None:
            chance, connection = random.Random(name), self.new_connection()
            for number in range(60):
                key = chance.choice(("000", "599", f"{chance.randrange(600):03}"))
                target = chance.choice((f"/set?key={key}&value={name}{number}", f"/del?key={key}&missing=ok"))
                self.check(200, "GET", target, connection=connection)

        def follow(number: int) -> tuple[dict[str, str], list[tuple[str, ...]]]:
            events = self.stream()
            return events.take_pairs(), list(itertools.takewhile(lambda event: event[1] != "end", events))

        writing = in_threads(write, [(f"w{number}-",) for number in range(5)])
        streams = in_threads(follow, [(number,) for number in range(8)])
        join(writing)
        wait_until(lambda: all(stream.after == stream.end for stream in self.server.streams))
        self.fetch("/set?key=end&value=1")
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            log = connection.execute("SELECT key, value FROM log WHERE key <> 'end' ORDER BY id").fetchall()
        for pairs, events in join(streams):
            expected = dict(start)
            for key, value in log[: len(log) - len(events)]:
                expected.update({key: value} if value else {})
                expected.pop(key if value is None else "", None)
            self.assertEqual(expected, pairs)
            changes = [("set", key, value) if value else ("del", key) for key, value in log[len(log) - len(events) :]]
            self.assertEqual(changes, events)


class Resources(ServerCase):
    def test_put_get_and_delete(self) -> None:
        for prefix, content_type in (("", kvserver.FORM), ("", kvserver.JSON), ("/iotpersistenceapi", "text/plain")):
            path = prefix + "/kv/a%2Fb/c%20d+%25%C3%A9"
            for method, body, expected in (
                ("PUT", "é=☃", (201, "Success")),
                ("GET", None, (200, "é=☃")),
                ("HEAD", None, (200, "")),
                ("PUT", None, (200, "Success")),
                ("GET", None, (200, "")),
                ("DELETE", None, (200, "Successfully removed state")),
                ("DELETE", None, (404, kvserver.UNKNOWN_KEY)),
                ("GET", None, (404, kvserver.UNKNOWN_KEY)),
            ):
                self.assertEqual(expected, self.fetch(path, method, body, Content_Type=content_type), method)
                if body:
                    self.assertEqual({"a/b/c d+%é": body}, self.pairs())

    def test_paths_without_a_key_are_404(self) -> None:
        for path in ("/kv", "/kv/", "/iotpersistenceapi/kv/"):
            for method in ("GET", "PUT", "DELETE"):
                self.assertEqual(404, self.fetch(path, method)[0], (method, path))
        self.assertEqual((201, "Success"), self.fetch("/kv/KEY", "PUT", "1"))
        self.assertEqual({"KEY": "1"}, self.pairs())
        for path in ("/kv/%00", "/kv/" + "x" * 513, "/kv/%FF"):
            self.assertEqual(400, self.fetch(path, "PUT", "1")[0], path)
        self.assertEqual(405, self.fetch("/kv/a", "POST", "1")[0])
        self.assertEqual("GET, HEAD, PUT, DELETE, OPTIONS", self.request("OPTIONS", "/kv/a").headers["allow"])

    def test_put_has_a_ttl_and_no_other_parameter(self) -> None:
        self.fetch("/kv/a?ttl=100", "PUT", "1")
        self.assertIsNotNone(json.loads(self.fetch("/get?key=a&format=json")[1])["expires"])
        for query in ("key=b", "value=2", "nx=1", "ttl=0"):
            for body in (None, "2"):
                self.assertEqual(400, self.fetch("/kv/a?" + query, "PUT", body)[0], query)
        message = "the parameter 'value' is unknown; /kv/KEY takes: ttl"
        self.assertEqual((400, message), self.fetch("/kv/a?value=2", "PUT"))
        self.assertEqual(400, self.fetch("/kv/a", "PUT", "2", Content_Range="bytes 0-0/2")[0])
        self.assertEqual({"a": "1"}, self.pairs())

    def test_entity_tags(self) -> None:
        put = self.request("PUT", "/kv/a", "1")
        answers = [self.request(method, path) for path in ("/kv/a", "/get?key=a") for method in ("GET", "HEAD")]
        self.fetch("/kv/b", "PUT", "1")
        (tag,) = {answer.headers["etag"] for answer in (put, *answers, self.request("GET", "/kv/b"))}
        self.assertRegex(tag, r'\A"[^"]+"\Z')
        self.fetch("/kv/b", "PUT", "2")
        self.assertNotEqual(tag, self.request("GET", "/kv/b").headers["etag"])
        for path in ("/kv/a", "/get?key=a"):
            for condition, status in ((tag, 304), ("*", 304), (f'"x", W/{tag}', 304), ('"x"', 200)):
                answer = self.request("GET", path, headers={"If-None-Match": condition})
                self.assertEqual((status, tag), (answer.status, answer.headers["etag"]), condition)
                if status == 304:
                    self.assertEqual(b"", answer.body)
                    self.assertFalse({"content-length", "content-type"} & answer.headers.keys())
            for suffix, status in (
                ("-gzip", 304),
                ("-br", 304),
                ("-zstd", 304),
                (";gzip", 304),
                ("-x", 200),
                ("gzip", 200),
            ):
                condition = f'"x", {tag[:-1]}{suffix}"'
                self.assertEqual(status, self.fetch(path, If_None_Match=condition)[0], condition)
            for condition in ("x", '"', tag + "x", "", '"a" "b"', "W/*"):
                self.assertEqual(400, self.fetch(path, If_None_Match=condition)[0], condition)

    def test_preconditions_guard_changes(self) -> None:
        self.assertEqual(412, self.fetch("/kv/a", "PUT", "1", If_Match="*")[0])
        self.assertEqual(201, self.fetch("/kv/a", "PUT", "1", If_None_Match="*")[0])
        tag = self.request("GET", "/kv/a").headers["etag"]
        for headers in ({"If_None_Match": "*"}, {"If_None_Match": tag}, {"If_Match": '"x"'}, {"If_Match": "W/" + tag}):
            for method, body in (("PUT", "2"), ("DELETE", None)):
                self.assertEqual(412, self.fetch("/kv/a", method, body, **headers)[0])
        self.assertEqual(400, self.fetch("/kv/a", "PUT", "2", If_Match="x")[0])
        self.assertEqual({"a": "1"}, self.pairs())
        self.assertEqual(200, self.fetch("/kv/a", "PUT", "1", If_Match=tag[:-1] + '-gzip"')[0])
        self.assertEqual(200, self.fetch("/kv/a", "PUT", "2", If_Match=f'"x", {tag}')[0])
        self.assertEqual(412, self.fetch("/kv/a", "DELETE", If_Match=tag)[0])
        self.assertEqual(404, self.fetch("/kv/b", "DELETE", If_Match=tag)[0])
        self.assertEqual(200, self.fetch("/kv/a", "DELETE", If_None_Match=tag)[0])


class Tokens(ServerCase):
    def add_token(self, is_read_only: bool = False, prefix: str = "") -> str:
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", is_read_only, prefix)
        return token

    def test_a_token_is_a_login_and_costs_no_scrypt(self) -> None:
        token = self.add_token()
        self.assertRegex(token, r"\Akv_[A-Za-z0-9_-]{43}\Z")
        with mock.patch.object(kvserver, "scrypt") as scrypt:
            for authorization in (f"Bearer {token}", f"bearer  {token}", basic("alice", token)):
                self.check(200, "GET", "/set?key=a&value=1", user=authorization)
            for authorization in (f"Bearer {token}x", f"Digest {token}"):
                self.check(401, "GET", "/list", user=authorization)
            scrypt.assert_not_called()
        for authorization in (basic("bob", token), basic("", token), basic(token, ""), basic(token, "x")):
            self.check(401, "GET", "/list", user=authorization)
        self.assertEqual({"a": "1"}, self.pairs())
        with open(self.database, "rb") as file, open(self.database + "-wal", "rb") as wal:
            self.assertNotIn(token.encode(), file.read() + wal.read())
        self.store.set_password_hash("alice", kvserver.hash_password("kv_alice's password"))
        self.check(200, "GET", "/list", user=basic("alice", "kv_alice's password"))

    def test_the_log_masks_tokens(self) -> None:
        token = self.add_token()
        with mock.patch.object(kvserver, "log", REAL_LOG), mock.patch("sys.stderr", io.StringIO()) as error:
            for name, password in itertools.product((token, "x" + token, token[:30]), ("", "x")):
                self.check(401, "GET", "/list", user=basic(name, password))
        self.assertEqual(6, error.getvalue().count("kv_..."))
        self.assertNotIn(token[3:12], error.getvalue())

    def test_a_deleted_token_is_out_at_once(self) -> None:
        token, other = self.add_token(), self.add_token()
        connection = self.new_connection()
        self.check(200, "GET", "/list", user=f"Bearer {token}", connection=connection)
        self.store.delete_token("alice", 1)
        self.check(401, "GET", "/list", user=f"Bearer {token}", connection=connection)
        self.store.set_password_hash("alice", kvserver.hash_password("another password"))
        self.check(200, "GET", "/list", user=f"Bearer {other}")
        self.store.delete_user("alice", even_last_admin=True)
        self.check(401, "GET", "/list", user=f"Bearer {other}")

    def test_read_only_tokens_change_nothing(self) -> None:
        token = "Bearer " + self.add_token(is_read_only=True)
        self.store.transact(lambda store: store.keep_history(1))
        self.store.set_value(1, "a", "1")
        for route in kvserver.ROUTES:
            for method in route.methods if route.who == kvserver.USER else ():
                target = route.path.replace("KEY", "a") + ("?key=a" if "key" in route.parameters else "")
                expected = 403 if route.where == kvserver.COMMIT else 200
                connection = self.new_connection()
                connection.request(method, target, headers={"Authorization": token})
                self.assertEqual(expected, connection.getresponse().status, target)  # /events has no end
        self.assertEqual({"a": "1"}, self.pairs())

    def test_a_token_sees_only_its_prefix(self) -> None:
        token = "Bearer " + self.add_token(prefix="p/")
        for key in ("p/1", "p/2", "q"):
            self.store.set_value(1, key, "1")
        for key in ("q", "none", "p"):  # mistakes in other parameters don't tell either whether a key exists
            for target in ("get?key=", "get?wait=x&key=", "set?key=", "del?key=", "incr?by=x&key=", "history?key="):
                self.check(403, "GET", f"/{target}{key}", user=token)
            self.check(403, "GET", f"/toggle?key={key}", user=token)
            self.check(403, "DELETE", f"/history?key={key}", user=token)
            for method in ("GET", "PUT", "DELETE"):
                self.check(403, method, f"/kv/{key}", user=token)
        for target, status in (("get?key=%00", 400), ("get", 400), ("set?key=p/3&value=1", 200), ("del?key=p/3", 200)):
            self.check(status, "GET", "/" + target, user=token)
        for query, keys in (
            ("", "p/1 p/2"),
            ("?prefix=p", "p/1 p/2"),
            ("?prefix=p/2", "p/2"),
            ("?prefix=q", ""),
            ("?after=p/1", "p/2"),
            ("?after=a", "p/1 p/2"),
            ("?after=q", ""),
        ):
            self.assertEqual(keys.split(), list(json.loads(self.fetch("/list" + query, user=token)[1])), query)

    def test_the_day_of_the_last_use_is_stored_once(self) -> None:
        token = "Bearer " + self.add_token()
        for _ in range(3):
            self.check(404, "GET", "/get?key=a", user=token)
        today = int(time.time() // 86400) * 86400
        wait_until(lambda: self.store.tokens("alice")[0].last_used in (today, today + 86400))
        self.fetch("/set?key=a&value=1")  # its commit comes after theirs
        self.assertEqual(2, self.server.metrics.writes)


class Overload(ServerCase):
    REQUEST = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"

    def open(self, data: bytes) -> socket.socket:
        """Return a connection whose bytes the server has received."""
        before = set(self.server.connections.values())
        connection = self.connect(data)
        wait_until(lambda: any(h.received == data for h in set(self.server.connections.values()) - before))
        return connection

    def ask(self, request: bytes = REQUEST) -> socket.socket:
        connection = self.connect(request)
        self.assertIn(b" 404 ", connection.recv(65536))
        return connection

    def test_the_oldest_incomplete_request_gives_way_then_the_oldest_idle_connection(self) -> None:
        self.server.max_connections = 4
        first_idle, silent, half, second_idle = self.ask(), self.open(b""), self.open(b"GET / HTTP/1.1\r\n"), self.ask()
        for closed in (silent, half, first_idle, second_idle):
            self.ask()
            self.assertEqual(b"", closed.recv(65536))
        self.assertEqual(4, len(self.server.connections))

    def test_a_client_that_waits_for_a_response_never_gives_way(self) -> None:
        self.server.max_connections = 2
        self.check(200, "GET", "/list")
        with locked(self.database):
            waiting = [self.connect(self.raw(f"GET /set?key={number}&value=1 HTTP/1.1")) for number in range(2)]
            wait_until(lambda: len(self.server.changes) == 2)
            late = self.connect(self.REQUEST)
            selector = self.server.loop._selector
            with mock.patch.object(selector, "select", wraps=selector.select) as select:
                wait_until(lambda: select.call_count > 10)  # the server has seen the new connection
            self.assertEqual(2, len(self.server.connections))
        for connection in waiting:
            self.assertIn(b" 200 ", connection.recv(65536))
        self.assertIn(b" 404 ", late.recv(65536))

    def test_busy_strangers_give_way_before_clients_that_have_logged_in(self) -> None:
        self.server.max_connections = 4
        request = self.raw("GET /get?key=a HTTP/1.1")
        known, strangers = self.ask(request), [self.ask() for _ in range(3)]

        def ask_again_and_again(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(self.REQUEST * 20)
                    connection.recv(65536)

        self.addCleanup(join, in_threads(ask_again_and_again, [(stranger,) for stranger in strangers]))
        self.addCleanup(self.stop)
        for _ in range(20):
            self.ask(request).close()
            known.sendall(request)
            self.assertIn(b" 404 ", known.recv(65536))

    def test_long_lists_of_one_user_take_half_of_the_threads(self) -> None:
        self.check(200, "GET", "/list")
        begun, go_on, real = list[int](), threading.Event(), kvserver.Store.page_as_json
        self.addCleanup(go_on.set)

        def wait_and_list(store: kvserver.Store, user_id: int, *arguments: Any) -> Any:
            begun.append(user_id)
            return go_on.wait(WAIT_SECONDS) and real(store, user_id, *arguments)

        self.enterContext(mock.patch.object(kvserver.Store, "page_as_json", wait_and_list))
        users, handlers = ["alice"] * 2 * kvserver.WORKERS_MAX + ["bob"], self.server.connections
        connections = [self.connect(self.raw("GET /list HTTP/1.1", user=user)) for user in users]
        wait_until(lambda: [h.state for h in [*handlers.values()]].count(kvserver.WORKING) == len(users))
        wait_until(lambda: len(begun) > kvserver.WORKERS_MAX // 2)
        self.assertEqual([1] * (kvserver.WORKERS_MAX // 2) + [2], sorted(begun))
        go_on.set()
        for connection in connections:
            self.assertIn(b" 200 ", connection.recv(65536))

    def test_threads_start_only_when_all_are_busy(self) -> None:
        self.check(200, "GET", "/list")
        count = threading.active_count()
        for _ in range(5):
            self.check(200, "GET", "/list")
        self.assertEqual(count, threading.active_count())

    def test_a_machine_that_cannot_start_threads_still_serves(self) -> None:
        self.server.writer.commit_seconds = 1  # a slow disk: a thread would commit
        for _ in range(2):  # without a thread, and with one that has started before
            with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
                self.check(200, "GET", "/set?key=a&value=1")
                self.check(200, "GET", "/list")
                self.check(200, "GET", "/health", user=None)
            self.check(200, "GET", "/list")
        self.assertNotIn("ERROR", self.log.text())

    def test_an_abandoned_check_is_not_made(self) -> None:
        with held(kvserver, "verify_password") as (begun, release):
            with mock.patch.object(kvserver, "CHECK_SECONDS", 0.01):
                for number in range(5):
                    self.check(503, "GET", "/list", user=basic("alice", f"wrong password {number}"))
            release.set()
            self.check(401, "GET", "/list", user=basic("alice", "the last one"))
            self.assertEqual([True, True, False], [begun.acquire(blocking=False) for _ in range(3)])
        self.assertEqual({}, self.server.authenticator._waiting)

    def test_the_same_error_is_logged_once_a_second(self) -> None:
        errors = kvserver.ErrorLog()
        with mock.patch("time.monotonic", side_effect=[5.0, 5.0, 5.9, 6.0, 6.9]):
            for number in range(5):
                errors.write("disk I/O error" if number != 1 else "another one")
        self.assertEqual(["disk I/O error", "another one", "disk I/O error"], self.log.lines)
        self.log.lines.clear()
        with mock.patch("time.monotonic", side_effect=[5.0, 5.0, 64.9, 65.0]):
            for number, kind in enumerate("abaa"):
                errors.write(f"{kind} {number}", 60, kind)
        self.assertEqual(["a 0", "b 1", "a 3"], self.log.lines)
        errors = kvserver.ErrorLog()
        self.patch("LOGGED_KINDS_MAX", 3)
        for message in "abcabd":
            errors.write(message, pause_seconds=0)
        self.assertEqual(["a", "b", "d"], list(errors._paused), "the oldest goes")


class Observed(ServerCase):
    def metrics(self) -> dict[str, float]:
        """Return the numbers, by name with labels, after a check of the format."""
        answer = self.check(200, "GET", "/metrics")
        self.assertEqual("text/plain; version=0.0.4; charset=utf-8", answer.headers["content-type"])
        numbers: dict[str, float] = {}
        family = r"# HELP (\w+) [^\n]+\n# TYPE \1 (counter|gauge|histogram)\n((?:\1[^\n]* [^ \n]+\n)*)"
        self.assertEqual("", re.sub(family, "", answer.body.decode()), "nothing else")
        families = re.findall(family, answer.body.decode())
        self.assertEqual(len(families), len({name for name, _, _ in families}))
        for name, kind, samples in families:
            suffix = "(?:_bucket|_sum|_count)" if kind == "histogram" else ""
            for line in samples.splitlines():
                sample, _, number = line.rpartition(" ")
                self.assertRegex(sample, rf'\A{name}{suffix}(?:\{{[a-z]+="[^"\\]*"(?:,[a-z]+="[^"\\]*")*\}})?\Z')
                self.assertNotIn(sample, numbers)
                numbers[sample] = float(number)
        return numbers

    def test_requests_are_counted_by_endpoint_and_status(self) -> None:
        for target in ("/set?key=a&value=1", "/iotpersistenceapi/set?key=b&value=1", "/get?key=a", "/get?key=c", "/x"):
            self.request("GET", target)
        self.request("PATCH", "/set")
        self.request("DELETE", "/kv/a")
        self.exchange(b"nonsense\r\n\r\n", end=True)
        self.metrics()
        name = r'kvserver_requests_total\{endpoint="(.*)",status="(.*)"\}'
        expected = {("/set", "200"): 2, ("/get", "200"): 1, ("/get", "404"): 1, ("/kv/KEY", "200"): 1}
        expected |= {("other", "404"): 1, ("/set", "405"): 1, ("other", "400"): 1, ("/metrics", "200"): 1}
        counts = {re.fullmatch(name, sample): count for sample, count in self.metrics().items()}
        self.assertEqual(expected, {match.groups(): count for match, count in counts.items() if match})

    def test_durations_are_a_histogram(self) -> None:
        for query in ("", "&wait=0.1&unless=x", "&wait=0.1&unless=x"):
            self.request("GET", "/get?key=a" + query)
        numbers = self.metrics()
        bounds = ("0.0005", "0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5")
        name = 'kvserver_request_seconds_bucket{{endpoint="/get",le="{}"}}'
        counts = [numbers[name.format(bound)] for bound in (*bounds, "1", "2.5", "5", "10", "60", "+Inf")]
        self.assertEqual(sorted(counts), counts)
        self.assertEqual((3, 3), (counts[-1], numbers['kvserver_request_seconds_count{endpoint="/get"}']))
        self.assertLessEqual(counts[bounds.index("0.1")], 1)
        self.assertGreaterEqual(numbers['kvserver_request_seconds_sum{endpoint="/get"}'], 0.2)

    def test_sizes_changes_and_failed_logins_are_told_without_names(self) -> None:
        before = self.metrics()
        self.assertEqual((2, 0), (before["kvserver_users"], before["kvserver_pairs"]))
        for query in ("key=s3cr3t&value=1", "key=b&value=1&ttl=0.001", "key=s3cr3t&value=2&nx=1"):
            self.request("GET", "/set?" + query)
        for authorization in (None, basic("alice", "wrong"), basic("", "x"), "Bearer kv_unknown"):
            self.check(401, "GET", "/kv/s3cr3t", user=authorization)
        self.connect(self.raw("GET /get?key=s3cr3t&wait=60&unless=1 HTTP/1.1"))
        wait_until(lambda: bool(self.server.polls) and not self.store.has_expired())
        numbers = self.metrics()
        self.assertEqual((1, 1, 2), tuple(numbers[f"kvserver_{name}"] for name in ("pairs", "polls", "connections")))
        self.assertEqual(3, numbers["kvserver_failed_logins_total"], "a request without credentials has not tried")
        writes = numbers["kvserver_writes_total"] - before["kvserver_writes_total"]
        self.assertEqual(3, writes, "the deletion of what has expired is one")
        self.assertIn(numbers["kvserver_commits_total"] - before["kvserver_commits_total"], (3, 4))
        self.assertEqual(os.path.getsize(self.database), numbers["kvserver_database_bytes"])
        self.assertEqual(os.path.getsize(self.database + "-wal"), numbers["kvserver_wal_bytes"])
        self.assertGreater(numbers["kvserver_uptime_seconds"], before["kvserver_uptime_seconds"])
        self.assertNotRegex(self.check(200, "GET", "/metrics").body, b"s3cr3t|alice")

    def test_they_are_for_admins_by_password_or_a_token_without_limits(self) -> None:
        tokens = (
            ("alice", True, "", 403),
            ("alice", False, "a", 403),
            ("bob", False, "", 403),
            ("alice", False, "", 200),
        )
        for user, is_read_only, prefix, status in tokens:
            token = kvserver.make_token()
            self.store.add_token(user, kvserver.hash_token(token), "", is_read_only, prefix)
            self.check(status, "GET", "/metrics", user=f"Bearer {token}")
        self.check(200, "HEAD", "/metrics")
        self.check(200, "GET", "/iotpersistenceapi/metrics")
        self.check(403, "GET", "/metrics", user="bob")
        answer = self.check(401, "GET", "/metrics", user=None)
        self.assertEqual('Basic realm="kvserver", charset="UTF-8"', answer.headers["www-authenticate"])


ARRIVED = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
REFUSED = b"HTTP/1.1 404 SECRET\r\n\r\n"


class Received(NamedTuple):
    """A request from a hook; header names are in lower case."""

    line: str
    headers: dict[str, str]
    data: bytes

    @property
    def body(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(self.data))

    def change(self) -> tuple[Any, ...]:
        return tuple(self.body.get(name) for name in ("value1", "value2", "value3"))


Behaviour = Callable[[socket.socket, int], None]


def respond(*responses: bytes) -> Behaviour:
    """Return a behaviour that sends these responses, one to each request, and the last one to all further requests."""
    return lambda connection, number: connection.sendall(responses[min(number, len(responses)) - 1])


def arrive(connection: socket.socket, number: int) -> None:
    """Accept the delivery."""
    connection.sendall(ARRIVED)


def hang(connection: socket.socket, number: int) -> None:
    """Send nothing until the other side closes."""
    connection.recv(1)


class Target:
    """The server behind a hook's URL. It takes each request on a connection of its own."""

    def __init__(self, behave: Behaviour = arrive, certificate: ssl.SSLContext | None = None) -> None:
        self.received, self.behave = list[Received](), behave
        self._certificate, self._connections = certificate, list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.origin = f"{'https' if certificate else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = self.origin + "/trigger/door/with/key/SECRET?also=SECRET"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for connection in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def changes(self) -> list[tuple[Any, ...]]:
        return [received.change() for received in self.received]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            connection.settimeout(WAIT_SECONDS)
            self._connections.append(connection)
            if self._certificate:
                connection = self._certificate.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as file:
                line = file.readline().decode().rstrip()
                fields = http.client.parse_headers(file).items()
                headers = {name.lower(): text for name, text in fields}
                if len(headers) < len(fields):
                    raise ValueError("a header is repeated")
                self.received.append(Received(line, headers, file.read(int(headers.get("content-length", "0")))))
                self.behave(connection, len(self.received))


def delivery(hook_url: str, **others: Any) -> kvserver.Delivery:
    """Return a delivery of a value "open" for the key door."""
    request = (1, "", hook_url, "POST", "", None)
    return kvserver.Delivery(*request, 1, 0, "door", "open", None, 4, 1.5, "0a1b")._replace(**others)


class HookCase(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        self.patch("HOOK_RETRY_SECONDS_MAX", 0.02)
        self.patch("HOOK_SECONDS", 3 * WAIT_SECONDS)  # a test that has to wait for that fails
        self.target = self.new_target()

    def new_target(self, behave: Behaviour = arrive, certificate: ssl.SSLContext | None = None) -> Target:
        return self.enterContext(contextlib.closing(Target(behave, certificate)))

    def add_hook(
        self,
        pattern: str,
        value: str | None = None,
        target: Target | None = None,
        user: str = "alice",
        method: str = "POST",
        headers: Sequence[str] = (),
        body: str | None = None,
    ) -> int:
        target = target or self.target
        _, lines = kvserver.check_hook(target.url, method, headers, body)
        row = (pattern, value, "", target.origin, target.url, method, lines, body)
        return cast(int, self.store.transact(lambda store: store.add_hook(user, *row)))

    def set(self, key: str, *values: object, user: str = "alice") -> None:
        for value in values:
            self.check(200, "GET", url("/set", key=key, value=value), user=user)

    def assert_told(self, *changes: tuple[Any, ...], target: Target | None = None) -> None:
        """Wait until as many changes have arrived and none is pending; check them."""
        told = target or self.target
        wait_until(lambda: len(told.received) >= len(changes) and self.store.sizes()[2] == 0)
        self.assertEqual(list(changes), told.changes())

    def assert_values(self, key: str, *values: str | None, target: Target | None = None) -> None:
        """Wait until all changes of a new key through these values have arrived; check them."""
        changes = [(key, new, old) for old, new in itertools.pairwise((None, *values))]
        self.assert_told(*changes, target=target)

    def add_working_hook(self, key: str) -> None:
        self.add_hook(key)
        self.set(key, "0")
        self.assert_values(key, "0")


class Hooks(HookCase):
    """Which changes a hook delivers."""

    def test_every_operation_that_changes_a_value_is_told_in_order(self) -> None:
        self.add_hook("door")
        self.set("other", "1")
        self.set("door", "1", user="bob")
        requests: tuple[tuple[str, ...], ...] = (
            ("GET", "/set?key=door&value=open"),
            ("GET", "/set?key=door&value=open"),
            ("GET", "/set?key=door&value=open&ttl=60"),
            ("GET", "/set?key=door&value=7&old=open"),
            ("GET", "/incr?key=door"),
            ("GET", "/toggle?key=door&values=8,9"),
            ("PUT", "/kv/door", 'é ☃ " \0 \n'),
            ("DELETE", "/kv/door"),
            ("GET", "/set?key=door&value=&nx=1"),
            ("GET", "/del?key=door"),
            ("POST", "/me/", "action=set&key=door&value=x", kvserver.FORM),
            ("POST", "/me/", "action=del&key=door", kvserver.FORM),
        )
        for method, target, *body_and_type in requests:
            self.assertLess(self.request(method, target, *cast(Any, body_and_type)).status, 400, target)
        for value in ("imported", "again"):
            with contextlib.closing(kvserver.open_store(self.database)) as store:
                store.import_all([], [("alice", "door", value, 1.0, None), ("bob", "b", "1", 1.0, None)])
        values = ["open", "7", "8", "9", 'é ☃ " \0 \n', None, "", None, "x", None, "imported", "again"]
        self.assert_values("door", *values)
        received = self.target.received[0]
        self.assertEqual("POST /trigger/door/with/key/SECRET?also=SECRET HTTP/1.1", received.line)
        self.assertEqual("application/json", received.headers["content-type"])
        self.assertEqual(self.target.origin, "http://" + received.headers["host"])
        self.assertRegex(received.headers["idempotency-key"], r"\A[0-9a-f]{32}\Z")
        self.assertEqual(len(values), len({each.headers["idempotency-key"] for each in self.target.received}))
        self.assertEqual(stat.S_IFREG | 0o600, os.stat(self.database + "-lock").st_mode)

    def test_a_hook_is_for_a_key_or_a_prefix_or_all_of_one_user(self) -> None:
        keys = ("room", "room/", "room/a", "roo", "zürich/☃", "zürich", "a*", "a*b", "x" * 512)
        patterns = ("room", "room/*", "*", "zürich/*", "a*", "a**", "x" * 512 + "*", "y*")
        targets = {pattern: self.new_target() for pattern in patterns}
        for pattern, target in targets.items():
            self.add_hook(pattern, target=target)
        for key, user in itertools.product(keys, PASSWORDS):
            self.set(key, "1", user=user)
        for pattern, target in targets.items():
            prefix = pattern.removesuffix("*")
            expected = [key for key in keys if (key.startswith(prefix) if prefix != pattern else key == pattern)]
            self.assert_told(*((key, "1", None) for key in expected), target=target)

    def test_a_hook_for_a_value_is_told_only_when_the_pair_becomes_that(self) -> None:
        self.add_hook("counter", "3")
        for target in (*["/incr?key=counter"] * 4, *["/set?key=counter&value=3"] * 2, "/del?key=counter"):
            self.check(200, "GET", target)
        self.set("counter", "3")
        self.assert_told(("counter", "3", "2"), ("counter", "3", "4"), ("counter", "3", None))

    def test_an_expiry_is_told_without_any_request(self) -> None:
        self.add_hook("phone")
        self.check(200, "GET", "/set?key=phone&value=home&ttl=0.1")
        self.assert_values("phone", "home", None)

    def test_a_set_over_an_expired_pair_is_told_as_two_changes(self) -> None:
        self.add_hook("a")
        with mock.patch.object(kvserver.CachingStore, "has_expired", return_value=False):
            for expired, new in (("1", "1"), ("2", "3")):
                self.store.set_value(1, "a", expired, time.time() - 1)
                self.set("a", new)
                self.check(200, "GET", "/del?key=a")
        self.assert_values("a", "1", None, "1", None, "2", None, "3", None)

    def test_a_refused_request_tells_nothing(self) -> None:
        self.add_hook("*")
        self.set("a", "x")
        for target in ("/set?key=a&value=y&nx=1", "/set?key=a&value=y&old=z", "/incr?key=a", "/del?key=b"):
            self.assertIn(self.request("GET", target).status, (404, 409))
        self.set("a", "end")
        self.assert_values("a", "x", "end")

    def test_a_hook_counts_from_the_next_change_to_the_last_one(self) -> None:
        expected, other = list[tuple[Any, ...]](), self.add_hook("other")
        for number in range(5):
            self.set("a", f"before-{number}")
            hook_id = self.add_hook("*")
            self.set("a", f"with-{number}")
            expected.append(("a", f"with-{number}", f"before-{number}"))
            self.assert_told(*expected)
            self.store.transact(lambda store: store.delete_hook(hook_id))  # noqa: B023
        self.store.set_value(1, "a", "old", time.time() - 1)
        self.add_hook("a")
        self.store.transact(lambda store: store.delete_hook(other))
        self.set("a", "1")
        self.assert_told(*expected, ("a", "1", None))

    def test_a_full_database_still_deletes_and_tells_expired_values(self) -> None:
        self.max_db_mb = 1
        self.stop()
        self.start()
        self.target.behave = hang
        self.add_hook("*")
        wait_until(lambda: self.server.outbox.has_hooks)
        stored = 0
        while self.request("PUT", f"/kv/{stored}" + "?ttl=1000" * (stored < 30), "x" * 5000).status != 507:
            stored += 1
        for number in range(30, stored):
            self.check(200, "DELETE", f"/kv/{number}")
        self.check(507, "PUT", "/kv/more", "x" * 200_000)
        execute(self.database, "UPDATE pair SET expires = 1")
        wait_until(lambda: self.store.sizes()[2] == 2 * stored)
        self.assertEqual({}, self.pairs())
        self.target.close()

    def test_deleting_a_user_deletes_hooks_and_pending_deliveries(self) -> None:
        self.target.behave = hang
        self.add_hook("*")
        self.add_hook("*", user="bob")
        self.set("a", "1", "2", user="bob")
        wait_until(lambda: len(self.target.received) == 1)
        self.check(303, "POST", "/admin/", "action=deluser&username=bob", kvserver.FORM)
        self.assertEqual([("alice", 0)], [(hook.user_name, hook.pending) for hook in self.store.hooks()])
        self.assertEqual(0, self.store.sizes()[2])

    def test_without_hooks_a_change_takes_no_further_statement(self) -> None:
        self.assertEqual(0, self.server.outbox._threads._started)
        statements: list[str] = []
        self.server.writer._connection.set_trace_callback(statements.append)
        self.set("a", "1")
        self.assertEqual(3, len(statements), statements)
        hook_id = self.add_hook("*")
        self.set("a", "2")
        self.assert_told(("a", "2", "1"))
        self.store.transact(lambda store: store.delete_hook(hook_id))
        wait_until(lambda: not self.server.outbox.has_hooks and not self.server.outbox.gate.taken)
        statements.clear()
        self.set("a", "3")
        self.assertEqual(3, len(statements), statements)

    def test_a_change_takes_no_longer_with_many_hooks_or_pending_deliveries(self) -> None:
        self.server.outbox.is_stopping = True
        self.add_hook("key")
        steps = list[int]()  # of SQLite's machine

        def add_many(store: kvserver.Store, count: int) -> None:
            for number in range(count):
                store.add_hook("alice", f"key{number}", None, "", "http://h", "http://h/", "POST", "", None)
                store.set_value(1, "key", "1")

        for count in (20, 500):
            self.store.transact(functools.partial(add_many, count=count))
            newest, taken = self.store._execute("SELECT max(id) FROM delivery").fetchone()[0], list[None]()
            self.store._connection.set_progress_handler(lambda: taken.append(None), 1)  # noqa: B023
            self.store.set_value(1, "key", "1")
            self.store.new_deliveries(newest)
            self.store.next_delivery(1, with_values=True)
            self.store._connection.set_progress_handler(None, 1)
            steps.append(len(taken))
        self.assertLess(steps[1], steps[0] + 50)

    def test_the_secrets_of_urls_are_shown_nowhere(self) -> None:
        self.target.behave = respond(REFUSED)
        self.add_hook("a")
        self.add_hook("counter", "<3>")
        self.set("a", "1")
        wait_until(lambda: "404 Not Found" in str(self.store.hooks()))  # a port may have 404 in it
        pages = self.check(200, "GET", "/admin/hooks").body.decode()
        for text in ("only when it becomes &quot;&lt;3&gt;&quot;", self.target.origin, "404 Not Found, dropped"):
            self.assertIn(text, pages)
        dropped = f"hook 1 to {self.target.origin}: dropped deliveries: 1 (404 Not Found)"
        wait_until(lambda: dropped in self.log.text())
        shown = pages + self.check(200, "GET", "/metrics").body.decode() + self.log.text() + str(self.store.hooks())
        self.assertNotIn("SECRET", shown)


class PromptHooks(HookCase):
    """How soon a change is told, with a server that looks for changes of others as seldom as usual."""

    poll_seconds = kvserver.POLL_SECONDS

    def test_a_change_is_told_at_once(self) -> None:
        self.add_hook("a")
        wait_until(lambda: self.server.outbox.has_hooks)
        started = time.monotonic()
        for number in range(20):
            self.set("a", number)
            wait_until(lambda: len(self.target.received) > number)  # noqa: B023
        self.assertLess(time.monotonic() - started, 20 * self.poll_seconds / 2)

    def test_many_expiries_at_once_are_all_told(self) -> None:
        self.patch("EXPIRED_PAIRS_MAX", 3)  # in each transaction; WAIT_SECONDS are too few for one at each look
        keys = [f"k{number:03}" for number in range(300)]
        self.store.import_all([], [("alice", key, "v", 1.0, time.time() + 1000) for key in keys])
        self.add_hook("k00*")
        wait_until(lambda: self.server.outbox.has_hooks)
        execute(self.database, "UPDATE pair SET expires = 1")
        self.assert_told(*((key, None, "v") for key in keys[:10]))
        wait_until(lambda: not self.store._execute("SELECT 1 FROM pair").fetchall())


class Deliveries(HookCase):
    """How a delivery arrives, whatever its target does."""

    def test_a_failed_delivery_is_sent_again_with_the_same_key_and_in_order(self) -> None:
        failures = (b"HTTP/1.1 500 Oh\r\n\r\n", b"HTTP/1.1 200 O", b"", b"HTTP/1.1 408 Slow\r\n\r\n")
        self.target.behave = respond(*failures, ARRIVED)
        self.add_hook("a")
        self.set("a", "1", "2")
        self.assert_told(*[("a", "1", None)] * 5, ("a", "2", "1"))
        keys = [received.headers["idempotency-key"] for received in self.target.received]
        self.assertEqual((1, 2), (len(set(keys[:5])), len(set(keys))))
        self.assertIn("500 Internal Server Error; trying again", self.log.text())

    def test_a_whole_status_line_is_enough(self) -> None:
        self.patch("HOOK_LINGER_SECONDS", 0.05)

        def send_slowly(connection: socket.socket, number: int, response: bytes) -> None:
            for byte in response:
                connection.sendall(bytes([byte]))
            hang(connection, number)

        early = b"HTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n"
        for response in (b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.0 299\n", early):
            self.add_hook("a", target=self.new_target(functools.partial(send_slowly, response=response)))
        self.set("a", "1", "2")
        wait_until(lambda: self.store.sizes()[2] == 0)
        self.assertEqual(["204 No Content", "299", "200 OK"], [hook.result for hook in self.store.hooks()])
        self.assertEqual("", self.log.text())

    def test_a_refused_delivery_is_dropped_at_once(self) -> None:
        self.patch("DROPPED_SECONDS", -1)
        elsewhere = self.new_target()
        for status in (301, 307, 400, 404, 410):
            response = f"HTTP/1.1 {status} No\r\nLocation: {elsewhere.url}\r\n\r\n".encode()
            target, key = self.new_target(respond(response)), f"a{status}"
            self.add_hook(key, target=target)
            self.set(key, "1", "2")
            self.assert_values(key, "1", "2", target=target)
            logged = re.compile(rf"to {target.origin}: dropped deliveries: [12] \({status} ")
            wait_until(lambda: logged.search(self.log.text()) is not None)  # noqa: B023
        self.assertEqual([], elsewhere.received)

    def test_an_exchange_ends_whatever_comes(self) -> None:
        def drip(connection: socket.socket, number: int) -> None:
            for byte in itertools.chain(b"HTTP/1.1 200 ", itertools.repeat(65)):
                connection.sendall(bytes([byte]))
                threading.Event().wait(0.01)

        no_end = "the connection was closed before a whole status line had come"
        for behave, seconds, result in (
            (drip, 0.1, "no answer within 0.1 seconds"),
            (hang, 0.1, "no answer within 0.1 seconds"),
            (respond(b"x" * 5000), WAIT_SECONDS, "the answer is not HTTP/1.1"),
            (respond(b"hello\n"), WAIT_SECONDS, "the answer is not HTTP/1.1"),
            (respond(b""), WAIT_SECONDS, no_end),
        ):
            self.patch("HOOK_SECONDS", seconds)
            self.target.behave = behave
            self.assertEqual((0, result), kvserver.deliver(delivery(self.target.url))[:2])

    def test_headers_that_come_late_may_tell_when_to_try_again(self) -> None:
        def answer_slowly(connection: socket.socket, number: int) -> None:
            for line in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 503 Later\r\n", b"Retry-After: 120\r\n\r\n"):
                connection.sendall(line)
                threading.Event().wait(0.02)

        self.patch("HOOK_LINGER_SECONDS", 0)
        self.target.behave = answer_slowly
        self.assertEqual(120, kvserver.deliver(delivery(self.target.url)).retry_after)

    def test_the_reason_of_a_failure_is_told(self) -> None:
        self.target.close()
        for hook_url, reason in (
            (self.target.url, "Connection refused"),
            ("http://no-such-host.invalid/SECRET", "ame"),
            (f"http://{'a' * 64}.example/SECRET", "this is not a valid host name"),
        ):
            answer = kvserver.deliver(delivery(hook_url))
            self.assertEqual((0, True), (answer.status, reason in answer.text), answer.text)
            self.assertNotIn("SECRET", answer.text)

    def test_an_address_that_does_not_work_is_skipped(self) -> None:
        port = int(self.target.origin.rpartition(":")[2])
        full = self.enterContext(socket.create_server(("127.0.0.1", 0), backlog=0))
        clients = [self.enterContext(contextlib.closing(socket.socket())) for _ in range(4)]
        for client in clients:  # until nobody answers there
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        self.patch("HOOK_SECONDS", 2)
        silent = [(socket.AF_INET, full.getsockname())] * 2
        addresses = [
            (12345, ("", 0)),
            (socket.AF_INET, ("127.0.0.1", 1)),
            *silent,
            (socket.AF_INET, ("127.0.0.1", port)),
        ]
        found = [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for family, address in addresses]
        with mock.patch.object(socket, "getaddrinfo", return_value=found):
            self.assertEqual(200, kvserver.deliver(delivery(self.target.url)).status)

    def test_slow_name_look_ups_leave_threads_to_others(self) -> None:
        self.add_working_hook("good")
        most, look_up, go_on = kvserver.EXCHANGES_MAX // 2, socket.getaddrinfo, threading.Event()
        for number in range(most + 1):
            hook = ("alice", "a", None, "", f"http://slow{number}", "http://slow/", "POST", "", None)
            self.store.transact(lambda store: store.add_hook(*hook))  # noqa: B023

        def look_up_slowly(host: str, *arguments: Any, **options: Any) -> Any:
            if host == "slow":
                go_on.wait(WAIT_SECONDS)
                raise socket.gaierror(0, "unknown")
            return look_up(host, *arguments, **options)

        self.enterContext(mock.patch.object(socket, "getaddrinfo", look_up_slowly))
        self.set("a", "1")
        wait_until(lambda: self.server.outbox.gate.taken[False] == most)
        self.set("good", "1")
        wait_until(lambda: len(self.target.received) == 2)
        go_on.set()
        self.stop()

    def test_a_delivery_after_a_slow_name_look_up_is_sent_once(self) -> None:
        ahead, look_up = [0.0], socket.getaddrinfo
        clock = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + ahead[0]})

        def look_up_slowly(host: str, *arguments: Any, **options: Any) -> Any:
            ahead[0] += 2 * kvserver.HOOK_SECONDS if host == "slow" else 0
            return look_up("127.0.0.1" if host == "slow" else host, *arguments, **options)

        def arrive_later(connection: socket.socket, number: int) -> None:
            threading.Event().wait(0.02)
            arrive(connection, number)

        self.target.behave = arrive_later
        slow_url = self.target.url.replace("127.0.0.1", "slow")
        hook = ("alice", "a", None, "", "http://slow", slow_url, "POST", "", None)
        self.store.transact(lambda store: store.add_hook(*hook))
        self.enterContext(mock.patch.object(kvserver, "time", clock))
        self.enterContext(mock.patch.object(socket, "getaddrinfo", look_up_slowly))
        self.set("a", "1")
        wait_until(lambda: self.store.sizes()[2] == 0)
        self.assertEqual([("a", "1", None)], self.target.changes())
        self.assertGreater(ahead[0], 0)

    def test_long_values_that_hang_leave_threads_to_short_ones(self) -> None:
        most, go_on = kvserver.LONG_EXCHANGES_MAX, threading.Event()
        self.addCleanup(go_on.set)

        def arrive_later(connection: socket.socket, number: int) -> None:
            self.assertTrue(number == 1 or go_on.wait(WAIT_SECONDS))
            arrive(connection, number)

        targets = [self.new_target(arrive_later) for _ in range(most + 2)]
        for target in targets:
            self.add_hook("long", target=target)
        self.set("long", "1")
        wait_until(lambda: all(target.received for target in targets) and self.store.sizes()[2] == 0)
        self.check(200, "POST", "/set?key=long", "x" * (kvserver.LONG_DELIVERY_BYTES + 1))
        wait_until(lambda: sum(len(target.received) for target in targets) == len(targets) + most)
        self.add_hook("short")
        self.set("short", "1")
        wait_until(lambda: self.target.changes() == [("short", "1", None)])
        self.assertEqual(len(targets) + most, sum(len(target.received) for target in targets))
        go_on.set()
        wait_until(lambda: self.store.sizes()[2] == 0)

    def test_a_mistake_counts_as_a_failure(self) -> None:
        self.add_hook("a")
        with mock.patch.object(kvserver, "encode_delivery", side_effect=MemoryError):
            self.set("a", "1")
            wait_until(lambda: self.store.hooks()[0].result == "MemoryError")
        self.assert_values("a", "1")

    def test_a_response_before_the_end_of_the_body_counts(self) -> None:
        self.patch("HOOK_SECONDS", 2)
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # its connections take few bytes
            hook_url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            with concurrent.futures.ThreadPoolExecutor() as pool:
                answer = pool.submit(kvserver.deliver, delivery(hook_url, value="x" * 5_000_000))
                with listener.accept()[0] as connection:
                    connection.sendall(b"HTTP/1.1 413 Too long\r\n\r\n")
                    self.assertEqual(413, answer.result(WAIT_SECONDS).status)

    def test_a_url_is_sent_as_it_is_but_without_fragment_password_or_proxy(self) -> None:
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
        self.enterContext(mock.patch.dict(os.environ, proxies))
        login = self.target.origin.replace("http://", "http://al%20ice:p%40ss:%e2%98%83@")
        for rest, target in (("", "/"), ("?x=1", "/?x=1"), ("/a//b?c#d?e", "/a//b?c"), ("/%20;a=b?", "/%20;a=b")):
            for origin, authorization in ((self.target.origin, None), (login, basic("al ice", "p@ss:☃"))):
                self.assertEqual(200, kvserver.deliver(delivery(origin + rest)).status)
                received = self.target.received[-1]
                self.assertEqual(f"POST {target} HTTP/1.1", received.line)
                self.assertEqual(authorization, received.headers.get("authorization"))
                self.assertEqual(self.target.origin, "http://" + received.headers["host"])

    def test_a_certificate_is_verified(self) -> None:
        context, path = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), os.path.join(self.folder, "certificate.pem")
        with open(path, "w", encoding="ascii") as file:
            file.write(CERTIFICATE + KEY)
        context.load_cert_chain(path)
        target = self.new_target(certificate=context)
        answer = kvserver.deliver(delivery(target.url))
        self.assertEqual((0, []), (answer.status, target.received))
        self.assertIn("certificate verify failed: self", answer.text)
        trusted = trust(CERTIFICATE)
        self.patch("client_context", lambda: trusted)
        self.add_hook("a", target=target)
        self.set("a", "x" * 5000)
        self.assert_values("a", "x" * 5000, target=target)

    def test_a_database_that_is_gone_is_not_tried_again_and_again(self) -> None:
        self.add_hook("*")
        self.check(200, "GET", "/set?key=a&value=1&ttl=1000")
        self.assert_values("a", "1")
        with mock.patch.object(kvserver.Store, "begin", side_effect=kvserver.StoreError("gone")) as begin:
            execute(self.database, "UPDATE pair SET expires = 1")
            wait_until(lambda: begin.called)
            with mock.patch.object(self.server.outbox, "look", wraps=self.server.outbox.look) as look:
                wait_until(lambda: look.call_count > 5)
        self.assertLess(begin.call_count, 20)

    def test_long_values_arrive(self) -> None:
        long_value = "\x01é" * (kvserver.VALUE_BYTES_MAX // 3)
        self.add_hook("a")
        for value in (long_value, "x" + long_value):
            self.check(200, "POST", "/set?key=a", value)
        self.assert_values("a", long_value, "x" + long_value)

    def test_targets_that_hang_slow_neither_writes_nor_other_hooks(self) -> None:
        self.add_working_hook("good")
        most = kvserver.EXCHANGES_MAX // 2
        for _ in range(most // 4 + 2):  # more than may be called at once
            target = self.new_target(hang)
            for _ in range(4):
                self.add_hook("*", target=target)
        self.set("a", "1")
        wait_until(lambda: self.server.outbox.gate.taken[False] == most)
        for number in range(1, 20):
            self.set("good", number)
            wait_until(lambda: len(self.target.received) > number)  # noqa: B023
        self.assertEqual(("good", "19", "18"), self.target.changes()[-1])

    def test_a_target_gets_few_connections_and_half_of_them_for_hooks_that_have_worked(self) -> None:
        most = kvserver.ORIGIN_EXCHANGES_MAX
        for _ in range(most):
            self.add_hook("good")
        self.set("good", "0")
        wait_until(lambda: len(self.target.received) == most and not self.server.outbox.gate.taken)
        self.target.behave = hang
        self.stop()
        self.start()  # which hooks have worked is stored
        for _ in range(most):
            self.add_hook("new")
        for key, count in (("new", most // 2), ("good", most)):
            self.set(key, "1")
            wait_until(lambda: len(self.target.received) == most + count)  # noqa: B023
            self.set("new", "2")
            self.assertEqual(count, self.server.outbox.gate.taken[False])
        self.target.close()

    def test_of_two_servers_one_sends(self) -> None:
        other = kvserver.Server(self.database, self.settings)
        self.addCleanup(join, in_threads(other.run, [()]))
        self.addCleanup(other.stop)
        self.add_hook("a")
        wait_until(lambda: self.server.outbox.has_hooks and other.outbox.has_hooks)
        for number in range(10):
            with mock.patch.object(self, "port", (self.port, other.server_port)[number % 2]):
                self.set("a", number)
        self.assert_values("a", *map(str, range(10)))
        sender, heir = self.server, other
        self.assertFalse(heir.outbox.take_lock())
        (line,) = self.log.lines
        self.assertIn(f"another server runs on {self.database} and sends deliveries; stop one", line)
        sender.stop()
        wait_until(heir.outbox.take_lock)
        self.store.set_value(1, "a", "end")
        self.assert_values("a", *map(str, range(10)), "end")

    def test_the_lock_of_the_sender_belongs_to_the_owner_of_the_database(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("only root can start a server on another user's database and leave such a file")
        os.chown(self.database, 12345, 12346)
        os.remove(self.database + "-lock")
        kvserver.lock_database(self.database).close()
        status = os.stat(self.database + "-lock")
        self.assertEqual((12345, 12346), (status.st_uid, status.st_gid))

    def test_a_lock_that_cannot_be_opened_is_logged_once(self) -> None:
        self.patch("HOOK_RETRY_SECONDS_MAX", 3600)
        self.stop()
        os.remove(self.database + "-lock")
        os.mkdir(self.database + "-lock")
        self.start()
        self.add_hook("a")
        self.set("a", "1")
        wait_until(lambda: self.server.outbox.has_hooks)
        os.rmdir(self.database + "-lock")
        self.assert_values("a", "1")
        (line,) = self.log.lines
        self.assertIn("-lock (Is a directory); delete that file", line)

    def test_a_stop_waits_for_an_exchange_and_logs_all_dropped_deliveries(self) -> None:
        go_on = threading.Event()
        self.addCleanup(go_on.set)

        def refuse(connection: socket.socket, number: int) -> None:
            self.assertTrue(number < 6 or go_on.wait(WAIT_SECONDS))
            connection.sendall(REFUSED)

        self.target.behave = refuse
        self.add_hook("a")
        self.set("a", *range(7))
        wait_until(lambda: len(self.target.received) == 6)
        self.server.stop()
        wait_until(lambda: self.server.outbox.is_stopping)
        go_on.set()
        self.stop()
        self.assertEqual(1, self.store.sizes()[2])
        logged = re.findall(r"dropped deliveries: (\d+) \(404 Not Found\)", self.log.text())
        self.assertEqual(["1", "5"], logged, "the first at once, the others when the server stops")
        self.start()
        self.assert_values("a", *map(str, range(7)))

    def test_metrics_count_deliveries(self) -> None:
        later = respond(b"HTTP/1.1 503 Later\r\nRetry-After: 0\r\n\r\n", ARRIVED, REFUSED)
        self.target.behave = lambda connection, number: (later if number < 4 else hang)(connection, number)
        self.add_hook("a")
        self.set("a", *range(3))
        wait_until(lambda: len(self.target.received) == 4)
        text = self.check(200, "GET", "/metrics").body.decode()
        counted = {name: int(count) for name, count in re.findall(r"\nkvserver_(\w*deliveries\w*) (\d+)", text)}
        expected = {"deliveries_total": 1, "failed_deliveries_total": 2, "dropped_deliveries_total": 1}
        self.assertEqual(expected | {"pending_deliveries": 1}, counted)


class Templates(HookCase):
    """What a hook sends: the texts of a change inserted in its URL, headers and body."""

    def send(
        self, path: str = "/", *headers: str, body: str | None = None, method: str = "POST", **others: Any
    ) -> Received:
        """Return the request of a delivery of a hook with these templates."""
        target = self.target.origin + path
        _, lines = kvserver.check_hook(target, method, headers, body)
        sent = delivery(target, headers=lines, body=body, method=method, **others)
        self.assertEqual(200, kvserver.deliver(sent).status)
        return self.target.received[-1]

    def test_a_change_is_inserted_everywhere_and_is_the_same_on_every_try(self) -> None:
        self.target.behave = respond(b"HTTP/1.1 503 Later\r\n\r\n", b"", ARRIVED)
        self.target.url = self.target.origin + "/{key}?v={value}&o={old}&t={time}"
        texts = "{key}={value}={old}={time}"
        self.add_hook("*", None, None, "alice", "PUT", (f"X-A: {texts}", "Title: door", f"X-B: {texts}"), texts)
        before = time.time()
        self.set("a/b", "é")
        self.check(200, "GET", "/del?key=a/b")
        self.set("last", "")
        wait_until(lambda: len(self.target.received) == 5)
        first, *others = self.target.received
        self.assertEqual([first] * 2, others[:2])
        for received, (line, inserted) in zip(
            others[1:],
            (
                ("/a%2Fb?v=%C3%A9&o=&t=", "a/b=é=="),
                ("/a%2Fb?v=&o=%C3%A9&t=", "a/b==é="),
                ("/last?v=&o=&t=", "last==="),
            ),
            strict=True,
        ):
            at = received.data.decode().removeprefix(inserted)
            self.assertRegex(at, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")
            self.assertLess(abs(datetime.datetime.fromisoformat(at).timestamp() - before), WAIT_SECONDS)
            self.assertEqual(f"PUT {line}{urllib.parse.quote(at)} HTTP/1.1", received.line)
            for name in ("x-a", "x-b"):
                self.assertEqual(inserted + at, received.headers[name].encode("iso-8859-1").decode())
            self.assertEqual("door", received.headers["title"])

    def test_inserted_text_is_encoded_for_its_place(self) -> None:
        text = 'a "b"\\\r\nX: {key} {old}%&=+/;?#é☃\0\x7f\x85\u2028😀'
        percent = urllib.parse.quote(text, safe="")
        escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r\n", "\\r\\n").replace("\0", "\\u0000")
        for content_type, template, inserted in (
            (None, '{"a{b}": "{value}", "n": [1{old}, {}]}', escaped),
            (None, '["{value}"]', escaped),
            ("application/problem+JSON ; charset=utf-8", '  {"{value}": "☃"}', escaped),
            (None, " {value}{{x}}☃{keys}{ key}{KEY}", text),
            (None, "{value}{}", text),
            (None, "{time} {value}", text),
            ("text/plain", '{"{value}"', text),
            ("Application/X-WWW-Form-Urlencoded;charset=utf-8", "☃={value}&b+c=%20", percent),
        ):
            headers = ("X-Key: {key}", *([f"content-TYPE: {content_type}"] if content_type else []))
            received = self.send("/{key}/{x}?{value}&%7Bkey%7D", *headers, body=template, key="{value}", value=text)
            expected = template.replace("{old}", "").replace("{time}", "1970-01-01T00:00:01.500Z")
            self.assertEqual(expected.replace("{value}", inserted), received.data.decode())
            self.assertEqual(f"POST /%7Bvalue%7D/{{x}}?{percent}&%7Bkey%7D HTTP/1.1", received.line)
            self.assertEqual("{value}", received.headers["x-key"])
            default = "text/plain; charset=utf-8" if inserted == text else kvserver.JSON
            self.assertEqual(content_type or default, received.headers["content-type"])
            if inserted == escaped:
                self.assertIn(repr(text), repr(json.loads(received.data)))

    def test_a_value_cannot_add_a_header(self) -> None:
        controls = "".join(map(chr, (*range(32), *range(127, 160))))
        received = self.send("/", "X-Value: <{value}>", value=f"a\r\n\r\nX: é☃{controls}")
        shown = received.headers["x-value"].encode("iso-8859-1").decode()
        self.assertEqual(f"<a    X: é☃{' ' * len(controls)}>", shown)
        self.assertNotIn("x", received.headers)

    def test_long_values_are_cut_in_urls_and_headers_only(self) -> None:
        for value, inserted in (
            ("x" * 4096, "x" * 4096),
            ("x" * 4097, "x" * 4096),
            ("x" * 4094 + "é", "x" * 4094 + "é"),
            ("x" * 4095 + "éy", "x" * 4095),
            ("x" * 4093 + "😀", "x" * 4093),
        ):
            received = self.send(
                "/{value}?{old}", "X-Value: {value}", "X-Old: {old}", body="{value}", value=value, old=value
            )
            percent = urllib.parse.quote(inserted)
            self.assertEqual(f"POST /{percent}?{percent} HTTP/1.1", received.line)
            for name in ("x-value", "x-old"):
                self.assertEqual(inserted, received.headers[name].encode("iso-8859-1").decode())
            self.assertEqual(value, received.data.decode())

    def test_a_body_of_16_mib_arrives_and_a_longer_one_is_dropped(self) -> None:
        value = "é" * (kvserver.VALUE_BYTES_MAX // 2)
        self.assertEqual(16 * 1024 * 1024, len(self.send(body="{value}" * 16, value=value).data))
        answer = kvserver.deliver(delivery(self.target.url, body="{value}" * 16 + "x", value=value))
        self.assertEqual((413, "the body with its values is over 16 MiB"), answer[:2])
        self.add_hook("*", body='["{value}"]')
        self.patch("HOOK_BODY_BYTES_MAX", 1004)
        self.set("a", "x" * 998 + '"', "x" * 999 + '"', "x")
        wait_until(lambda: len(self.target.received) == 3 and self.store.sizes()[2] == 0)
        self.assertEqual([1004, 5], [len(received.data) for received in self.target.received[1:]])
        dropped = f"hook 1 to {self.target.origin}: dropped deliveries: 1 (the body with its values is over 0 MiB)"
        wait_until(lambda: dropped in self.log.text())

    def test_get_and_delete_send_no_body(self) -> None:
        for method in ("POST", "PUT", "PATCH", "GET", "DELETE"):
            received = self.send("/", "User-Agent: me", method=method)
            self.assertEqual((f"{method} / HTTP/1.1", "me"), (received.line, received.headers["user-agent"]))
            self.assertEqual("0a1b", received.headers["idempotency-key"])
            has_body = method[0] == "P"
            self.assertEqual(has_body, received.data == b'{"value1": "door", "value2": "open", "value3": null}')
            for name in ("content-type", "content-length"):
                self.assertEqual(has_body, name in received.headers)
            sent = delivery("http://h", method=method)
            whole = kvserver.encode_delivery(urllib.parse.urlsplit(sent.url), sent)
            self.assertEqual(has_body, not whole.endswith(b"\r\n\r\n"))

    def test_a_short_value_that_is_inserted_often_counts_as_long(self) -> None:
        self.target.behave = hang
        size = kvserver.LONG_DELIVERY_BYTES // 16
        self.add_hook("long", body="{value}" * 16)
        self.add_hook("short", body="{value}" * 14)
        for key in ("long", "short"):
            self.set(key, "x" * size)
        wait_until(lambda: len(self.target.received) == 2)
        self.assertEqual(
            {True: 1, False: 1}, {is_long: self.server.outbox.gate.taken[is_long] for is_long in (True, False)}
        )
        self.target.close()


class Clocks(HookCase):
    """A clock that is set while the server runs: a ttl counts real seconds."""

    def setUp(self) -> None:
        real, self.jump = time.time, -3600.0  # the server starts in the past, as on a Pi without a clock
        self.enterContext(mock.patch("time.time", lambda: real() + self.jump))
        super().setUp()

    def rest(self) -> None:
        """Leave it to the requests to notice a jump."""

        async def do_nothing(server: kvserver.Server) -> None:
            pass

        self.stop()
        self.enterContext(mock.patch.object(kvserver.Server, "_make_own_changes", do_nothing))
        self.start()

    def seconds_left(self) -> dict[str, float]:
        """Return the seconds until pairs expire, rounded to tens."""
        pairs = json.loads(self.check(200, "GET", "/list?format=json").body)
        times = {key: pair["expires"] for key, pair in pairs.items() if pair["expires"]}
        now = time.time()
        return {key: round(datetime.datetime.fromisoformat(at).timestamp() - now, -1) for key, at in times.items()}

    def jumps(self) -> list[float]:
        """Return the logged jumps."""
        return [float(jump) for jump in re.findall(r"the clock jumped by (\S+) seconds", self.log.text())]

    def jump_to(self, seconds: float) -> None:
        """Set the clock, and wait until the server has noticed that without a request."""
        expected, self.jump = [*self.jumps(), seconds - self.jump], seconds
        wait_until(lambda: self.jumps() == expected)

    def test_a_ttl_follows_every_jump_and_other_expiries_do_not(self) -> None:
        for target in ("/set?key=a&value=1&ttl=500", "/incr?key=b&ttl=1000", "/incr?key=b", "/toggle?key=c&ttl=2000"):
            self.check(200, "GET", target)
        for target in ("/incr?key=edited&ttl=9000", "/set?key=e&value=1&ttl=9000", "/set?key=e&value=1"):
            self.check(200, "GET", target)
        self.check(201, "PUT", "/kv/d?ttl=3000", "1")
        given = {"a": 500, "b": 1000, "c": 2000, "d": 3000}
        for key, ttl in (("before", 9000), ("edited", 8000), ("gone", 3000)):
            self.store.set_value(1, key, "1", ttl=ttl)  # by another process
        self.jump_to(0)
        wait_until(lambda: not self.store._execute("SELECT 1 FROM pair WHERE key = 'gone'").fetchall())
        self.assertEqual({**given, "before": 5400, "edited": 4400}, self.seconds_left())
        for seconds in (-1e6, -7200):
            self.jump_to(seconds)
        self.assertEqual({**given, "before": 12600, "edited": 11600}, self.seconds_left())
        self.jump_to(1e9)
        self.assertEqual(given, self.seconds_left())
        self.assertEqual(b"1", self.get("e"))

    def test_the_next_request_sees_the_jump(self) -> None:
        self.rest()
        self.check(200, "GET", "/set?key=a&value=1&ttl=600")
        self.assertEqual(b"1", self.get("a"))  # its row is remembered
        waiting = self.begin("GET /get?key=a&wait=60&unless=1 HTTP/1.1")
        wait_until(lambda: len(self.server.polls) == 1)
        for status, method, target, body in (
            (200, "GET", "/get?key=a", b"1"),
            (409, "GET", "/set?key=a&value=2&nx=1&ttl=600", b"Key exists"),
            (409, "GET", "/set?key=a&value=2&old=3", b"Value differs"),
            (200, "GET", "/list", b'{"a":"1"}'),
            (200, "GET", "/me/value?key=a", b"in 10 min"),
            (200, "GET", "/get?key=a&wait=0.001&unless=1", b"1"),
            (200, "GET", "/incr?key=a&by=0", b"1"),
            (200, "DELETE", "/kv/a", b"removed"),
        ):
            self.jump += 3600
            self.assertIn(body, self.check(status, method, target).body, target)
        self.assertEqual([404], statuses(waiting.recv(65536)))
        self.assertEqual([3600] * 8, self.jumps())

    def test_small_jumps_add_up(self) -> None:
        self.rest()
        self.check(200, "GET", "/set?key=a&value=1&ttl=600")
        for jump, expected in ((1.9, []), (0.2, [2.1]), (-1.9, [2.1]), (-0.2, [2.1, -2.1])):
            self.jump += jump
            self.get("a")
            self.assertEqual(expected, self.jumps())

    def test_a_wait_for_an_expiry_ends_in_time(self) -> None:
        for seconds in (7200, -7200):
            begun = time.monotonic()
            for query in ("key=a&value=1&ttl=600", "key=b&value=1&ttl=0.5"):
                self.check(200, "GET", "/set?" + query)
            waiting = [self.begin(f"GET /get?key={key}&wait=60&unless=1 HTTP/1.1") for key in "ab"]
            wait_until(lambda: len(self.server.polls) == 2)
            self.jump_to(seconds)
            self.assertEqual([404], statuses(waiting[1].recv(65536)))
            self.assertGreater(time.monotonic() - begun, 0.5)
            wait_until(lambda: len(self.server.polls) == 1)
            self.set("a", "2")
            self.assertEqual(b"2", waiting[0].recv(65536)[-1:])

    def test_hooks_hear_of_no_false_expiry(self) -> None:
        self.add_hook("*")
        old = kvserver.TRIGGERS["pair_changed"].replace("UPDATE OF value", "UPDATE")  # an earlier version's
        execute(self.database, f"DROP TRIGGER pair_changed; CREATE TRIGGER pair_changed {old}")
        self.check(200, "GET", "/set?key=a&value=1&ttl=600")
        self.store.set_value(1, "b", "1", ttl=600)  # by another process
        self.jump_to(0)
        self.check(200, "GET", "/set?key=a&value=2&ttl=0.1")
        wait_until(lambda: len(self.target.received) == 5)
        changes = self.target.changes()
        self.assertEqual(
            [("a", "1", None), ("a", "2", "1"), ("a", None, "2")], [change for change in changes if change[0] == "a"]
        )
        self.assertIn(("b", None, "1"), changes)

    def test_of_two_servers_each_shifts_what_it_has_given(self) -> None:
        self.jump_to(0)  # the triggers use the real clock
        self.patch("POLL_SECONDS", PromptHooks.poll_seconds)  # each waits so long for the other
        other = kvserver.Server(self.database, self.settings)
        self.addCleanup(join, in_threads(other.run, [()]))
        self.addCleanup(other.stop)
        self.add_hook("*")
        ports = self.port, other.server_port
        for key, port in (("a", ports[0]), ("a", ports[1]), ("b", ports[1]), ("b", ports[0]), ("c", ports[1])):
            with mock.patch.object(self, "port", port):
                self.check(200, "GET", f"/set?key={key}&value=1&ttl=600")
        for seconds in (7200, -100):
            with held(other.reader, "state") as (begun, _):
                self.assertTrue(begun.acquire(timeout=WAIT_SECONDS))
                self.jump = seconds
                wait_until(lambda: not self.server.writer.clock_jump())
                self.set("d", "1")
            wait_until(lambda: not other.writer.clock_jump())
            self.assertEqual({"a": 600, "b": 600, "c": 600}, self.seconds_left())
        self.assertEqual([7200, 7200, -7300, -7300], self.jumps()[-4:])
        self.assert_told(*((key, "1", None) for key in "abcd"))

    def test_of_two_servers_on_a_slow_disk_none_deletes_what_the_other_has_given(self) -> None:
        self.jump_to(0)  # the triggers use the real clock
        self.patch("POLL_SECONDS", 0.02)
        other = kvserver.Server(self.database, self.settings)
        self.addCleanup(join, in_threads(other.run, [()]))
        self.addCleanup(other.stop)
        self.add_hook("*")
        real = kvserver.Store._execute

        def execute_slowly(store: kvserver.Store, statement: str, *parameters: Any) -> sqlite3.Cursor:
            time.sleep(0.1 if statement == "COMMIT" else 0)
            return real(store, statement, *parameters)

        ports = self.port, other.server_port
        for key, port in zip("ab", ports):
            with mock.patch.object(self, "port", port):
                self.check(200, "GET", f"/set?key={key}&value=1&ttl=600")
        with mock.patch.object(kvserver.Store, "_execute", execute_slowly):
            self.jump = 7200
            for key, port in zip("ab", ports):
                with mock.patch.object(self, "port", port):
                    self.check(409, "GET", f"/set?key={key}&value=2&ttl=600&nx=1")
        self.assert_told(("a", "1", None), ("b", "1", None))

    def test_a_failed_transaction_shifts_nothing_and_the_next_one_does(self) -> None:
        self.rest()
        self.add_hook("*")
        for query in ("key=a", "key=b&nx=1"):
            self.check(200, "GET", f"/set?{query}&value=1&ttl=600")
        real, error = kvserver.Store.set_value, sqlite3.OperationalError("disk I/O error")

        def set_and_fail(store: kvserver.Store, *arguments: Any, **named: Any) -> None:
            real(store, *arguments, **named)
            raise error

        with mock.patch.object(kvserver.Store, "set_value", set_and_fail):
            self.check(503, "GET", "/set?key=b&value=2&ttl=900")
        self.jump = 0
        for function in ("_renew_triggers", "_exceed_limit"):
            with mock.patch.object(self.server.writer, function, side_effect=error):
                self.check(503, "GET", "/set?key=b&value=2&ttl=900")
                self.check(200, "GET", "/list")  # reads go on
        self.assertEqual([], self.jumps())
        self.check(409, "GET", "/set?key=b&value=2&nx=1&ttl=900")
        self.jump = 3600
        self.assertEqual({"a": 600, "b": 600}, self.seconds_left())
        with locked(self.database):
            self.assertEqual(b"1", self.get("a"))  # its row is remembered
            waiting = [self.begin("GET /set?key=c&value=1 HTTP/1.1")]
            wait_until(lambda: self.server.changes)
            self.jump = 7200
            waiting.append(self.begin("GET /get?key=b HTTP/1.1"))
            wait_until(lambda: len(self.server.changes) == 2)
        self.assertEqual([b"s", b"1"], [connection.recv(65536)[-1:] for connection in waiting])
        self.assertEqual(b"1", self.get("a"))

    def test_a_jump_within_a_transaction_or_while_the_disk_is_slow(self) -> None:
        real = kvserver.Store.set_value

        def jump_and_set(store: kvserver.Store, *arguments: Any, **named: Any) -> None:
            self.jump = 0
            real(store, *arguments, **named)

        for seconds in (0.0, 1.0):
            self.check(200, "GET", "/set?key=a&value=1&ttl=600")
            self.server.writer.commit_seconds = seconds
            with mock.patch.object(kvserver.Store, "set_value", jump_and_set):
                self.check(200, "GET", "/set?key=b&value=1&ttl=1200")
            self.assertEqual({"a": 600, "b": 1200}, self.seconds_left())
            with held(self.server.writer, "_shift_expiries") as (begun, _):
                self.jump = -3600
                waiting = [self.begin(f"GET {target} HTTP/1.1") for target in ("/list", "/incr?key=a&by=0")]
                self.assertTrue(begun.acquire(timeout=WAIT_SECONDS))
                self.check(200, "GET", "/health")  # the loop goes on
            self.assertEqual([[200]] * 2, [statuses(connection.recv(65536)) for connection in waiting])

    def test_a_jump_between_the_first_two_of_a_transaction(self) -> None:
        real = kvserver.Store.set_value

        def set_and_jump(store: kvserver.Store, *arguments: Any, **named: Any) -> None:
            real(store, *arguments, **named)
            self.jump = 0

        with mock.patch.object(kvserver.Store, "set_value", set_and_jump):
            with locked(self.database):
                waiting = [self.begin(f"GET /set?key={key}&value=1&ttl=600 HTTP/1.1") for key in "ab"]
                wait_until(lambda: len(self.server.changes) == 2)
            self.assertEqual([[200]] * 2, [statuses(connection.recv(65536)) for connection in waiting])
            wait_until(lambda: self.jumps() == [3600])
            self.jump_to(-3600)
            with locked(self.database):
                waiting = [self.begin("GET /set?key=b&value=2&ttl=600 HTTP/1.1")]
                wait_until(lambda: len(self.server.changes) == 1)
                waiting.append(self.begin("GET /set?key=a&value=2&ttl=600&nx=1 HTTP/1.1"))
                wait_until(lambda: len(self.server.changes) == 2)
            self.assertEqual([[200], [409]], [statuses(connection.recv(65536)) for connection in waiting])
        self.assertEqual({"a": 600, "b": 600}, self.seconds_left())

    def test_only_the_newest_are_remembered(self) -> None:
        self.patch("TIMED_PAIRS_MAX", 3)
        for key in "abcad":
            self.check(200, "GET", f"/set?key={key}&value=1&ttl=9000")
        self.jump_to(0)
        self.assertEqual({"a": 9000, "b": 5400, "c": 9000, "d": 9000}, self.seconds_left())


class Gates(unittest.TestCase):
    """A gate limits how many tasks pass at once."""

    def test_owners_take_turns_at_a_thread_and_a_cancelled_job_is_not_run(self) -> None:
        loop, jobs, go_on = kvserver.Loop(self.fail), list[str](), threading.Event()
        self.addCleanup(loop.close)
        threads = kvserver.Threads(loop, 1)

        def work(name: str) -> None:
            jobs.append(name)
            go_on.wait(WAIT_SECONDS)

        names = ("a1", "a2", "a3", "a4", "b1")
        tasks = [loop.start(threads.run(functools.partial(work, name), name[0])) for name in names]
        loop.throw(tasks[1], kvserver.Cancelled())
        for _ in names:
            loop.run_once(may_wait=False)
        loop.throw(tasks[2], kvserver.Cancelled())
        go_on.set()
        while tasks[3] in loop._tasks:
            loop.run_once()
        self.assertEqual(["a1", "b1", "a4"], jobs)


class Schedules(unittest.TestCase):
    """When a delivery is sent again, and when it is dropped, by a clock that the test puts forward."""

    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.store = kvserver.open_store(os.path.join(self.folder, "test.db"))
        self.addCleanup(self.store.close)
        self.store.add_user("alice", "", True)
        self.add_hook("http://h")
        self.seconds, wall, running = 0.0, time.time(), kvserver.running_time()
        self.tries, self.answers = list[tuple[float, str | None]](), list[kvserver.Answer]()
        self.answer = kvserver.Answer(0, "Connection refused")  # after self.answers
        self.mistakes = list[Exception]()
        self.addCleanup(lambda: self.assertEqual([], self.mistakes))
        self.loop = kvserver.Loop(self.mistakes.append)
        self.addCleanup(self.loop.close)
        self.metrics = kvserver.Metrics({}, {}, set())
        self.enterContext(mock.patch.object(time, "monotonic", lambda: self.seconds))
        self.enterContext(mock.patch.object(time, "time", lambda: wall + self.seconds))
        self.enterContext(mock.patch.object(kvserver, "running_time", lambda: running + self.seconds))
        self.log = self.enterContext(captured_log())
        self.outbox = kvserver.Outbox(self.store, self.loop, self.commit, self.metrics, kvserver.ErrorLog())
        self.addCleanup(self.outbox.close)
        self.enterContext(mock.patch.object(self.outbox._threads, "run", self.run_here))
        self.enterContext(mock.patch.object(kvserver, "deliver", self.deliver))
        enter = self.outbox.gate.enter
        self.enter = self.enterContext(mock.patch.object(self.outbox.gate, "enter", wraps=enter))

    def add_hook(self, origin: str) -> None:
        hook = ("*", None, "", origin, "http://h/SECRET", "POST", "", None)
        self.store.transact(lambda store: store.add_hook("alice", *hook))

    def set(self, *values: object) -> None:
        for value in values:
            self.store.set_value(1, "a", str(value))

    async def commit(self, operation: Callable[[kvserver.Store], object], size: int = 0) -> None:
        self.store.transact(operation)

    async def run_here(self, function: Callable[[], object], owner: object) -> object:
        return function()

    def deliver(self, delivery: kvserver.Delivery) -> kvserver.Answer:
        self.tries.append((round(self.seconds, 3), delivery.value))
        return self.answers.pop(0) if self.answers else self.answer

    def kinds(self) -> tuple[list[bool], list[bool]]:
        """Return which exchanges were long, and which were of hooks that may not work."""
        bounds = [call.args[0] for call in self.enter.call_args_list]
        return [True in each for each in bounds], [len(each) > 2 for each in bounds]

    def run_until(self, seconds: float) -> None:
        """Put the clock forward, from one event to the next."""
        while True:
            self.outbox.look()
            while self.loop.soon or self.loop._next_check <= self.seconds:
                self.loop.run_once(may_wait=False)
            if self.seconds >= seconds:
                return
            self.seconds = min(seconds, self.loop._next_check)

    def test_pauses_double_up_to_an_hour_for_a_day(self) -> None:
        self.set("1")
        self.run_until(30 * 3600)
        pauses = [round(later - earlier) for (earlier, _), (later, _) in itertools.pairwise(self.tries)]
        self.assertEqual([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], pauses[:12])
        self.assertEqual({3600}, set(pauses[12:-1]))
        self.assertAlmostEqual(24 * 3600, self.tries[-1][0], delta=2)
        self.assertEqual(0, self.store.sizes()[2])
        problem = "hook 1 to http://h: Connection refused; trying again for 24 hours"
        dropped = "hook 1 to http://h: dropped deliveries: 1 (a day old, Connection refused)"
        self.assertEqual([problem, dropped], self.log.lines)

    def test_the_next_delivery_after_a_dropped_one_is_a_retry_but_sent_at_once(self) -> None:
        self.set("1")
        self.run_until(23 * 3600)
        self.set("2")
        self.store._execute("UPDATE delivery SET created = created + 23 * 3600 WHERE value = '2'")
        self.run_until(24 * 3600 + 10)
        times = [at for at, value in self.tries if value == "2"]
        self.assertEqual([0, 1, 3, 7], [round(at - times[0]) for at in times][:4])
        self.assertAlmostEqual(24 * 3600, times[0], delta=1)
        self.assertEqual(({True}, 1), (set(self.kinds()[1]), self.store.sizes()[2]))

    def test_old_deliveries_get_some_minutes_after_a_start(self) -> None:
        self.set("1")
        self.store._execute("UPDATE delivery SET created = created - 48 * 3600")
        self.run_until(kvserver.HOOK_GRACE_SECONDS - 1)
        self.assertEqual([0, 1, 3, 7, 15, 31, 63, 127, 255], [round(at) for at, _ in self.tries])
        self.assertEqual(1, self.store.sizes()[2])
        self.run_until(kvserver.HOOK_GRACE_SECONDS + 1)
        self.assertEqual((10, 0), (len(self.tries), self.store.sizes()[2]))

    def test_retry_after_is_obeyed_up_to_an_hour(self) -> None:
        for retry_after, seconds in ((120.0, 120), (7200.0, 3600), (1.0, 1)):
            started, before = self.seconds, len(self.tries)
            self.set(retry_after)
            self.answers = [kvserver.Answer(503, "503 Later", retry_after), kvserver.Answer(200, "200 OK")]
            self.run_until(started + seconds + 0.5)
            self.assertEqual([0, seconds], [round(at - started) for at, _ in self.tries[before:]])
            self.assertEqual(0, self.store.sizes()[2])

    def test_a_status_means_success_refusal_or_a_further_try(self) -> None:
        for status in (200, 201, 204, 299, 300, 301, 399, 400, 404, 408, 410, 429, 499, 500, 503, 599):
            self.answers, self.answer = [kvserver.Answer(status, "")], kvserver.Answer(200, "200 OK")
            tries, failed = len(self.tries), self.metrics.failed_deliveries
            self.set(status)
            self.run_until(self.seconds + 2)
            is_tried_again = status >= 500 or status in (408, 429)
            self.assertEqual(2 if is_tried_again else 1, len(self.tries) - tries, status)
            self.assertEqual(status >= 300, self.metrics.failed_deliveries - failed, status)

    def test_status_line_and_retry_after_are_read(self) -> None:
        for line in (b"HTTP/1.1 200 OK", b"HTTP/1.1 20", b"HTTP/2 200\r\n", b"HTTP/1.1 600 A\r\n", b"ICY 200 OK\r\n"):
            self.assertIsNone(kvserver.parse_answer(line), line)
        for head, expected in (
            (b"429 No\r\nA: b\r\nretry-AFTER:  90 \r\n\r\n", 90),
            (b"503 No\nRetry-After: 0\n\n", 1),
            (b"503 No\r\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n\r\n", None),
            (b"503 No\r\nA: b\r\n\r\nRetry-After: 5\r\n", None),
            (b"500 No\r\nRetry-After: 5\r\n\r\n", None),
            (b"503 No\r\nA: b\r\nRetry-After: 5", None),
        ):
            answer = kvserver.parse_answer(b"HTTP/1.1 " + head)
            self.assertEqual((int(head[:3]), expected), (answer and answer.status, answer and answer.retry_after), head)

    def test_the_oldest_make_room_for_the_newest(self) -> None:
        self.run_until(1)
        count = kvserver.HOOK_PENDING_MAX + 20
        self.store.transact(lambda store: self.set(*range(count)))
        self.run_until(2)
        self.assertEqual("20", self.tries[0][1])
        self.assertIn("deliveries: 20 (over 10000 or 16 MiB pending)", self.log.text())
        pending = [int(value) for (value,) in self.store._execute("SELECT value FROM delivery ORDER BY id")]
        self.assertTrue(pending == [*range(20, count)])  # assertEqual would compare long lists for minutes

    def test_the_oldest_make_room_for_long_values(self) -> None:
        self.set("first")
        self.run_until(10_000)
        for number in range(20):
            self.store.set_value(1, f"k{number}", "é" * (kvserver.VALUE_BYTES_MAX // 2))
        self.store.delete_pair(1, "k0")
        self.store.set_value(1, "k1", "")
        self.assertEqual(15, self.store.sizes()[2], "keys and old values count as well")
        self.run_until(10_001 + kvserver.HOOK_RETRY_SECONDS_MAX)
        self.assertEqual(["8"], re.findall(r"dropped deliveries: (\d+) \(over", self.log.text()))
        self.assertEqual(8, self.metrics.dropped_deliveries)

    def test_a_delivery_is_long_by_its_old_value_as_well(self) -> None:
        self.answer = kvserver.Answer(200, "200 OK")
        self.set("1", "\0" + "x" * kvserver.LONG_DELIVERY_BYTES, "2", "3")
        self.run_until(1)
        self.assertEqual([False, True, True, False], self.kinds()[0])

    def test_a_refusal_ends_a_row_of_failures(self) -> None:
        self.set("0", "1", "2")
        self.answers = [self.answer, self.answer, kvserver.Answer(404, "404 Not Found")]
        self.run_until(6.5)
        self.assertEqual([0, 1, 3, 3, 4, 6], [round(at) for at, _ in self.tries])
        self.assertEqual([True, True, True, False, True, True], self.kinds()[1][:6])

    def test_dropped_deliveries_are_logged_now_and_then(self) -> None:
        self.answer = kvserver.Answer(404, "404 Not Found")
        for count, seconds, logged in ((5, 1, ["5"]), (2, kvserver.DROPPED_SECONDS, ["5"]), (1, 20, ["5", "3"])):
            self.set(*range(count))
            self.run_until(seconds)
            self.assertEqual(logged, re.findall(r"dropped deliveries: (\d+) \(404 Not Found\)", self.log.text()))

    def test_a_single_failure_of_the_disk_does_not_stop_a_hook(self) -> None:
        self.add_hook("http://a")
        self.answer = kvserver.Answer(200, "200 OK")
        for reads in range(2):  # before the failing one: with values, or only their size
            self.set(str(reads))
            results: list[Any] = [mock.DEFAULT] * 20
            results[reads] = sqlite3.OperationalError("disk I/O error")
            read = self.store.next_delivery
            with mock.patch.object(self.store, "next_delivery", wraps=read, side_effect=results):
                self.run_until(self.seconds + 2)
            self.assertEqual(0, self.store.sizes()[2])
            self.assertEqual(["disk I/O error"], [str(self.mistakes.pop())])

    def test_a_full_disk_does_not_stop_a_hook(self) -> None:
        self.answer = kvserver.Answer(200, "200 OK")
        self.set("1")
        with mock.patch.object(self.store, "transact", side_effect=kvserver.StoreFull("full")):
            self.run_until(300)
        self.assertEqual([0, 1, 3, 7, 15, 31, 63, 123, 183, 243], [round(at) for at, _ in self.tries])
        self.run_until(400)
        self.assertEqual((11, 0), (len(self.tries), self.store.sizes()[2]))


class Disk(ServerCase):
    """A disk that is full, broken or gone, and requests that still work then."""

    max_db_mb = 1

    def test_a_write_waits_for_another_process_but_not_for_long(self) -> None:
        self.check(200, "GET", "/set?key=a&value=1")
        with locked(self.database):
            waiting = self.connect(self.raw("GET /set?key=a&value=2 HTTP/1.1"))
            wait_until(lambda: len(self.server.changes) == 1)
        self.assertIn(b" 200 ", waiting.recv(65536))
        with mock.patch.object(kvserver, "DATABASE_LOCK_SECONDS", 0.05), locked(self.database):
            self.assertEqual("5", self.check(503, "GET", "/set?key=a&value=3").headers["retry-after"])
            self.assertEqual({"a": "2"}, self.pairs())
        self.check(200, "GET", "/set?key=a&value=4")
        self.assertEqual({"a": "4"}, self.pairs())

    def test_a_disk_that_refuses_even_the_rollback_is_503_until_it_recovers(self) -> None:
        writer = self.server.writer
        connection, broken = writer._connection, mock.Mock(in_transaction=True)
        broken.execute.side_effect = sqlite3.OperationalError("disk I/O error")
        with mock.patch.object(writer, "_connection", broken):
            self.check(503, "GET", "/set?key=a&value=1")
        self.assertIn("the database failed: disk I/O error", self.log.text())
        connection.execute("BEGIN IMMEDIATE")  # a failed rollback leaves this
        self.check(200, "GET", "/set?key=a&value=2")
        self.assertEqual({"a": "2"}, self.pairs())

    def test_a_refused_request_is_forgotten_with_its_body(self) -> None:
        self.check(200, "GET", "/set?key=a&value=1")
        connection = self.new_connection()
        gc.disable()
        self.addCleanup(gc.enable)
        for _ in range(4):
            self.check(409, "POST", "/set?key=a&nx=1", "x", connection=connection)
            self.check(507, "POST", "/set?key=b", "x" * kvserver.VALUE_BYTES_MAX, connection=connection)
            for form in ("action=set&value=x", "action=set&key=%ff"):
                named: Any = {"headers": {"Accept": "text/html"}, "connection": connection}
                self.check(400, "POST", "/me/", form, kvserver.FORM, **named)
        kept = [each.path for each in gc.get_objects() if isinstance(each, kvserver.Request) and each.body]
        self.assertLess(len(kept), 3, kept)

    def test_every_commit_is_synced(self) -> None:
        connection = self.server.writer._connection
        self.assertEqual([("wal",)], connection.execute("PRAGMA journal_mode").fetchall())
        self.assertEqual([(2,)], connection.execute("PRAGMA synchronous").fetchall())  # 2 is FULL

    def test_a_full_database_is_507_until_values_are_deleted_or_expire(self) -> None:
        value, stored = "x" * 50_000, 0
        while (answer := self.request("POST", f"/set?key={stored}&ttl=1000", value)).status == 200:
            stored += 1
        self.assertEqual((507, True), (answer.status, b"delete something" in answer.body))
        self.assertIn(stored, range(15, 22))
        self.assertEqual(value.encode(), self.get("0"))
        self.assertEqual(stored, len(self.pairs()))
        self.check(200, "GET", "/del?key=0")
        self.check(200, "POST", "/set?key=again", value)
        self.check(507, "POST", "/set?key=more", value)
        self.assertLessEqual(os.path.getsize(self.database), 1024 * 1024)
        self.assertIn("the database failed", self.log.text())
        execute(self.database, "UPDATE pair SET expires = 1 WHERE key = '1'")
        wait_until(lambda: self.request("POST", "/set?key=more", value).status == 200)

    def test_a_write_that_fails_is_undone_and_does_not_fail_its_neighbours(self) -> None:
        real = kvserver.Store.set_value

        def set_and_fail(store: kvserver.Store, user_id: int, key: str, *arguments: Any, **named: Any) -> None:
            real(store, user_id, key, *arguments, **named)
            if key == "mistake":
                raise RuntimeError("after the change")
            if key == "rollback":  # as SQLite does when the disk is full
                store._execute("ROLLBACK")
                raise sqlite3.OperationalError("database or disk is full")

        self.enterContext(mock.patch.object(kvserver.Store, "set_value", set_and_fail))
        self.check(404, "GET", "/get?key=a")
        expected = {
            "a": b"200",
            "long": b"507",
            "b": b"200",
            "mistake": b"500",
            "c": b"200",
            "rollback": b"503",
            "d": b"200",
        }
        with locked(self.database):
            connections = []
            for key in expected:
                body = b"x" * (1024 * 1024 if key == "long" else 10)
                request = self.raw(f"POST /set?key={key} HTTP/1.1", f"Content-Length: {len(body)}", body=body)
                connections.append(self.connect(request))
            wait_until(lambda: len(self.server.changes) == len(expected))
        self.assertEqual(expected, dict(zip(expected, (connection.recv(12)[9:] for connection in connections))))
        self.assertEqual(set("abcd"), set(self.pairs()))

    def test_a_file_that_was_deleted_or_replaced_gets_no_write(self) -> None:
        self.check(200, "GET", "/set?key=a&value=1")
        elsewhere = self.database + ".elsewhere"
        os.rename(self.database, elsewhere)
        for is_replaced in (False, True):
            if is_replaced:
                shutil.copy(elsewhere, self.database)
            for target in ("/set?key=a&value=2", "/list", "/health"):
                self.check(503, "GET", target)
        self.assertIn("has been deleted or replaced", self.log.text())
        os.rename(elsewhere, self.database)
        self.check(200, "GET", "/set?key=a&value=3")
        self.assertEqual({"a": "3"}, self.pairs())

    def test_a_damaged_file_is_503_and_stays_as_it_is(self) -> None:
        for number in range(10):
            self.check(200, "POST", f"/set?key={number}", "x" * 50_000)
        self.stop()
        self.store.close()
        self.start()
        with open(self.database, "r+b") as file:
            file.seek(20 * 4096)
            file.write(b"\xff" * 60 * 4096)
            file.seek(0)
            damaged = file.read()
            self.check(503, "GET", "/list")
            file.seek(0)
            self.assertEqual(damaged, file.read())
        self.assertIn("the database failed", self.log.text())

    def test_a_list_that_is_too_long_is_409(self) -> None:
        self.patch("LIST_BYTES_MAX", 1000)
        longest = "x" * 980
        self.store.set_value(1, "k", longest)
        self.assertEqual({"k": longest}, self.pairs())
        for value in (longest + "x" * 20, "\x01" * 200):  # JSON makes six bytes of each control character
            self.store.set_value(1, "k", value)
            self.assertIn(b"limit", self.check(409, "GET", "/list").body)
        self.store.set_value(1, "k" * 490, "")
        self.check(409, "GET", "/list?format=json&prefix=kk")  # which names the key twice

    def test_a_list_and_its_link_are_of_one_moment(self) -> None:
        for key in "bcdef":
            self.store.set_value(1, key, "1")
        execute = kvserver.Store._execute

        def read_and_change(store: kvserver.Store, statement: str, *parameters: Any) -> sqlite3.Cursor:
            cursor = execute(store, statement, *parameters)
            if "group_concat" in statement:
                self.store.set_value(1, "a", "1")
            return cursor

        with mock.patch.object(kvserver.Store, "_execute", read_and_change):
            answer = self.check(200, "GET", "/list?limit=2")
        self.assertEqual({"b": "1", "c": "1"}, json.loads(answer.body))
        self.assertIn("after=c", answer.headers["link"])


class Log(ServerCase):
    """The write-ahead log, which must stay short."""

    def write_much(self) -> int:
        longest = 0
        for number in range(30):
            self.check(200, "POST", f"/set?key={number % 3}", "x" * 200_000)
            longest = max(longest, self.server.reader.wal_pages())
        return longest

    def test_it_restarts_although_there_are_always_readers(self) -> None:
        self.patch("WAL_PAGES_MAX", 200)
        done = threading.Event()

        def read() -> None:  # one reader begins before the other ends
            with contextlib.ExitStack() as stack:
                readers = [stack.enter_context(contextlib.closing(sqlite3.connect(self.database))) for _ in range(2)]
                for late, early in itertools.cycle((readers, readers[::-1])):
                    late.execute("BEGIN")
                    late.execute("SELECT * FROM pair").fetchall()
                    early.rollback()
                    if done.is_set():
                        return

        self.addCleanup(join, in_threads(read, [()]))
        self.addCleanup(done.set)
        self.assertLess(self.write_much(), 300)

    def test_a_reader_that_does_not_end_holds_up_one_write_only(self) -> None:
        self.patch("WAL_PAGES_MAX", 50)
        self.patch("CHECKPOINT_SECONDS", 0)
        with contextlib.closing(sqlite3.connect(self.database, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM user").fetchall()
            with mock.patch.object(self.server.writer, "checkpoint", wraps=self.server.writer.checkpoint) as checkpoint:
                self.write_much()
                checkpoint.assert_called_once()
        self.server._next_checkpoint = 0
        self.write_much()
        self.assertLess(self.write_much(), 150)

    def test_a_checkpoint_that_fails_is_logged_and_loses_nothing(self) -> None:
        self.patch("WAL_PAGES_MAX", 0)
        error = sqlite3.OperationalError("disk I/O error")
        with mock.patch.object(self.server.writer, "checkpoint", side_effect=error):
            self.check(200, "GET", "/set?key=a&value=1")
            wait_until(lambda: "the database failed: disk I/O error" in self.log.text())
        self.assertEqual({"a": "1"}, self.pairs())

    def test_many_large_writes_are_not_one_transaction(self) -> None:
        self.patch("TRANSACTION_BYTES_MAX", 100_000)
        self.get("a")
        with mock.patch.object(self.server.writer, "commit", wraps=self.server.writer.commit) as commit:
            with locked(self.database):
                requests = [self.raw(f"POST /set?key={n} HTTP/1.1", "Content-Length: 60000") for n in range(6)]
                connections = [self.connect(request + b"x" * 60_000) for request in requests]
                wait_until(lambda: len(self.server.changes) == 6)
            for connection in connections:
                self.assertIn(b" 200 ", connection.recv(65536))
            self.assertEqual([2, 2, 2], [len(call.args[0]) for call in commit.call_args_list])


class Model(ServerCase):
    """Random requests, compared with a dictionary for each user."""

    KEYS = ("a", "door", "front door", "tür", "😀", "a\nb", "%41", "..", "x" * 512)
    KINDS = ("set", "set", "get", "get", "del", "list", "incr", "toggle", "old", "kv", "kv", "history")

    def next_request(self, kind: str, key: str, value: str, model: dict[str, str], choice: Callable[..., Any]) -> Any:
        """Return a random request of a kind and its response, and change the model as the request does."""
        stored, pair = model.get(key), {"key": key, "value": value}
        found = (404, "") if stored is None else (200, stored)
        if kind == "set":
            model[key] = value
            requests = (
                ("GET", url("/set", **pair)),
                ("POST", "/set", urllib.parse.urlencode(pair), kvserver.FORM),
                ("PUT", "/set", json.dumps(pair), kvserver.JSON),
                ("POST", url("/set", key=key), value, "text/plain"),
            )
            return (200, "Success"), *choice(requests)
        if kind == "get":
            default = choice(({}, {"default": ""}, {"default": "none"}))
            absent = (200, default["default"]) if default else (404, "")
            return absent if stored is None else found, "GET", url("/get", key=key, **default)
        if kind == "del":
            missing = choice(({}, {"missing": "ok"}))
            is_good = model.pop(key, None) is not None or missing
            return (200, "Successfully removed state") if is_good else (404, ""), "GET", url("/del", key=key, **missing)
        if kind == "incr":
            if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", stored or "0"):
                return (409, ""), "POST", url("/incr", key=key, by="0.25")
            total = fractions.Fraction(stored or "0") + fractions.Fraction("0.25")
            model[key] = re.sub(r"\.?0+\Z", "", f"{float(total):.6f}")
            return (200, model[key]), "POST", url("/incr", key=key, by="0.25")
        if kind == "toggle":
            if stored not in (None, "a", "b"):
                return (409, ""), "GET", url("/toggle", key=key, values="a,b")
            model[key] = "b" if stored == "a" else "a"
            return (200, model[key]), "GET", url("/toggle", key=key, values="a,b")
        if kind == "old":
            old = choice((stored or "", value, None))
            condition = {"nx": "1"} if old is None else {"old": old}
            if stored == old:
                model[key] = value
            return (200, "Success") if stored == old else (409, ""), "POST", url("/set", key=key, **condition), value
        path, method = "/kv/" + urllib.parse.quote(key, safe=""), choice(("GET", "PUT", "PUT", "DELETE"))
        if method == "PUT":
            model[key] = value
            return (201 if stored is None else 200, "Success"), method, path, value
        if method == "DELETE" and model.pop(key, None) is not None:
            found = (200, "Successfully removed state")
        return found, method, path

    def assert_history(self, user: str, key: str, pairs: dict[str, str], changes: list[str | None], which: str) -> None:
        """Compare the history of a key with the changes, newest first."""
        answer = self.request("GET", url("/history", key=key), user=user)
        self.assertEqual(200 if key in pairs or changes else 404, answer.status, which)
        kept = json.loads(answer.body) if answer.status == 200 else []
        values = [(change["value"], change.get("cut", False)) for change in kept]
        expected = [(value and value[:1024], len(value or "") > 1024) for value in changes]
        self.assertEqual(expected, values, which)

    def test_the_server_is_a_dictionary_for_each_user_and_survives_restarts(self) -> None:
        models: dict[str, dict[str, str]] = {user: {} for user in PASSWORDS}
        histories, rows_max = collections.defaultdict[Any, list[str | None]](list), 0  # by user and key, newest first
        seed, count, restarts = random.randrange(1_000_000), *((3000, 10) if LONG else (300, 3))
        choice = random.Random(seed).choice
        streams: dict[str, tuple[Events, list[tuple[str, ...]]]] = {}  # by user, with the events that must come
        for number in range(count):
            user, key, kind = choice(tuple(PASSWORDS)), choice(self.KEYS), choice(self.KINDS)
            model, which = models[user], f"request {number} of {user} for {key!r}, seed {seed}"
            value = choice(("", "0", "12", "-0.50", "open", "é☃", "\0\r\n", "x" * 5000)) + str(number)
            if kind == "list":
                self.assertEqual(model, self.pairs(user), which)
                page = json.loads(self.fetch(url("/list", limit=2, after=key), user=user)[1])
                self.assertEqual([pair for pair in sorted(model.items()) if pair[0] > key][:2], [*page.items()], which)
            elif kind == "history":
                self.assert_history(user, key, model, histories[user, key], which)
                if choice((True, False)):
                    self.check(
                        200 if key in model or histories[user, key] else 404,
                        "DELETE",
                        url("/history", key=key),
                        user=user,
                    )
                    histories[user, key].clear()
            else:
                before = model.get(key)
                expected, method, target, *more = self.next_request(kind, key, value, model, choice)
                body, content_type = (*more, None, None)[:2]
                answer = self.request(method, target, body, content_type, user)
                text = answer.body.decode() if answer.status < 300 else ""
                self.assertEqual(expected, (answer.status, text), which)
                is_read = kind == "get" or (kind == "kv" and method == "GET")
                if user in streams and answer.status < 300 and not is_read and (key in model or before is not None):
                    streams[user][1].append(("set", key, model[key]) if key in model else ("del", key))
                if before != model.get(key):
                    histories[user, key] = [model.get(key), *histories[user, key]][:rows_max]
            if number % (count // restarts) == 0:
                for events, changes in streams.values():
                    self.assertEqual(changes, events.take(len(changes)), which)
                self.stop()
                self.store.close()
                self.start()
                rows_max = choice((1, 2, 10, 20))
                self.store.transact(lambda store: store.keep_history(rows_max))  # noqa: B023 - it ends before
                for kept in histories.values():
                    del kept[rows_max:]
                for name, pairs in models.items():
                    events = Events(self.new_connection(), basic(name, PASSWORDS[name]))
                    self.assertEqual(pairs, events.take_pairs(), which)
                    streams[name] = events, []
        self.assertEqual(models, {user: self.pairs(user) for user in models})
        for events, changes in streams.values():
            self.assertEqual(changes, events.take(len(changes)), f"seed {seed}")
        for (user, key), kept in histories.items():
            self.assert_history(user, key, models[user], kept, f"seed {seed}")


class Fuzz(ServerCase):
    failures_max = 10**9
    PIECES = (
        *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"\xff", b"\x80", b"#", b"?", b"&", b"=", b","),
        *(b"chunked", b"0\r\n\r\n", b"99999999999", b"-1", b"HTTP/1.1", b"HTTP/1.0", b"Host: y\r\n", b"Expect: x\r\n"),
    )
    # In each line: request line, header lines, and the body of a POST or PUT. No request waits: a client that closes
    # one direction meanwhile counts as gone.
    REQUESTS = """\
GET /get?key=a
HEAD /get?key=%C3%A9
GET http://x/del?key=a&z=%41 HTTP/1.0 | Connection: keep-alive
DELETE /kv/a%20b | If-None-Match: "x"
GET /incr?key=n&by=-1.5&ttl=9
GET /toggle?key=n&values=a,b
GET /get?key=a&wait=0&unless=hello&default=x | If-None-Match: *
GET /get?key=a&format=json
GET /list?prefix=a&limit=2&after=a&format=json
GET /set?key=a&value=1&old=2
GET /me/value?key=a | Accept: text/html
GET /admin/user?username=bob&after=a | Accept: text/html
POST /set?key=a | Expect: 100-continue | Origin: null | hello
POST /set | Content-Type: application/json | {"key":"a","value":[1]}
PUT /kv/a%20b?ttl=5 | If-Match: "a", W/"b" | If-None-Match: * | abc
POST /me/ | Content-Type: application/x-www-form-urlencoded | action=set&key=a&value=1%0d%0a&page=value&ttl=5
POST /me/?key=a | Content-Type: application/x-www-form-urlencoded | action=del
POST /me/ | Content-Type: application/x-www-form-urlencoded | action=addtoken&label=x&readonly=1&prefix=a
POST /admin/ | Content-Type: application/x-www-form-urlencoded | action=adduser&username=x&password=a+password
POST /admin?action=deluser | Content-Type: application/x-www-form-urlencoded | username=x
"""

    def mutate(self, request: bytes, chance: random.Random) -> bytes:
        mutated = bytearray(request)
        for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
            begin = chance.randrange(len(mutated) + 1)
            end = min(len(mutated), begin + chance.choice((0, 1, 1, 2, 5, 20)))
            random_bytes, repeated = (
                chance.randbytes(chance.choice((1, 2, 4))),
                mutated[begin:end] * chance.choice((2, 50)),
            )
            mutated[begin:end] = chance.choice((b"", repeated, random_bytes, *[chance.choice(self.PIECES)] * 2))
        return bytes(mutated)

    def requests(self) -> list[bytes]:
        chunks = b"5\r\nkey=a\r\n8;x=y\r\n&value=1\r\n0\r\nA: b\r\n\r\n"
        chunked = self.raw(
            "PUT /set HTTP/1.1", "Transfer-Encoding: chunked", f"Content-Type: {kvserver.FORM}", body=chunks
        )
        requests = [b"OPTIONS /set HTTP/1.1\r\nHost: x\r\n\r\n", chunked]
        for line in self.REQUESTS.splitlines():
            start, *fields = line.split(" | ")
            start += "" if "HTTP/" in start else " HTTP/1.1"
            body = fields.pop().encode() if start.startswith("P") else b""
            requests.append(self.raw(start, *fields, *([f"Content-Length: {len(body)}"] if body else []), body=body))
        return requests

    def test_every_request_gets_proper_responses(self) -> None:
        chance, requests = random.Random(4), self.requests()
        for number in range(20_000 if LONG else 1_500):
            data = b"".join(self.mutate(chance.choice(requests), chance) for _ in range(chance.choice((1, 1, 2))))
            answers, connection = b"", socket.create_connection(("127.0.0.1", self.port), WAIT_SECONDS)
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answers = read_all(connection)
            heads = re.findall(rb"HTTP/1\.1 (\d\d\d) [A-Za-z ]+\r\n((?:[A-Za-z-]+: [^\r\n]*\r\n)*)\r\n", answers)
            which = f"request {number}: {data!r}, responses: {answers!r}, log: {self.log.lines[-1:]}"
            self.assertTrue(answers.startswith(b"HTTP/1.1 ") if answers else not data.strip(b"\r\n"), which)
            self.assertEqual(len(heads), len(re.findall(rb"HTTP/1\.1 \d{3} [A-Z]", answers)), which)
            for status, fields in heads:
                self.assertTrue(status < b"500" or status in (b"501", b"505"), which)
                self.assertTrue(b"Connection: close" not in fields or (status, fields) == heads[-1], which)
        self.assertNotIn("internal error", self.log.text())
        self.check(200, "GET", "/list")


class Secrets(ServerCase):
    log_requests = True

    def test_a_line_names_the_key_and_no_value(self) -> None:
        requests = (
            ("GET /set?key=the+door&value=s3cr3t1", "method=GET path='/set' key='the door' status=200 "),
            ("GET /set?key=a&value=s3cr3t1&old=s3cr3t2", "method=GET path='/set' key='a' status=409 "),
            ("GET /get?key=b&default=s3cr3t3", "method=GET path='/get' key='b' status=200 "),
            ("GET /get?key=b&wait=0&unless=s3cr3t4", "method=GET path='/get' key='b' status=404 "),
            ("GET /toggle?key=a&values=s3cr3t5,s3cr3t6", "method=GET path='/toggle' key='a' status=200 "),
            ("GET /set&key=a&value=s3cr3t7", "method=GET path='' key='' status=404 "),
            ("GET /set%3Fkey=a&value=s3cr3t8", "method=GET path='' key='' status=404 "),
            ("GET /a/s3cr3t9", "method=GET path='' key='' status=404 "),
            ("GET /set?key=a&value=s3cr3t10&what=s3cr3t11", "status=400 "),
            ("GET /set?key=a&s3cr3t12", "status=400 "),
            ("GET /list?after=s3cr3t13&limit=s3cr3t14", "method=GET path='/list' key='' status=400 "),
            ("PUT /kv/the/door?ttl=s3cr3t15", "method=PUT path='/kv/' key='the/door' status=400 "),
            ("POST /set", "method=POST path='/set' key='a\\nb' status=200 "),
            ("PUT /kv/the/door", "method=PUT path='/kv/' key='the/door' status=201 "),
            ("s3cr3t16 /list", "method= path='/list' key='' status=501 "),
            ("DELETE /iotpersistenceapi/set?key=a&value=s3cr3t17", "path='/iotpersistenceapi/set' key='' status=405 "),
            ("GET /get?s3cr3t18 s3cr3t19", "method= path='' key='' status=400 "),
        )
        body = b'{"key": "a\\nb", "value": "s3cr3t"}'
        for line, _ in requests:
            fields = (f"Content-Type: {kvserver.JSON}", f"Content-Length: {len(body)}") if line[0] == "P" else ()
            self.exchange(self.raw(line + " HTTP/1.1", *fields, body=body if fields else b""), end=True)
        self.check(200, "GET", "/health", user=None)
        self.stop()
        for line, (_, shown) in zip(self.log.lines, (*requests, ("", "path='/health' key='' status=200")), strict=True):
            self.assertIn(shown, line)
            self.assertRegex(line, r"\Arequest: .* status=... milliseconds=\d+\.\d user='.*' address=127.0.0.1\Z")
        self.assertIn("user='alice'", self.log.lines[0])
        self.assertNotIn("s3cr3t", self.log.text())

    def test_no_path_tells_passwords_or_values(self) -> None:
        self.store.set_password_hash("alice", kvserver.hash_password("s3cr3t-password"))
        right, wrong = basic("alice", "s3cr3t-password"), basic("alice", "s3cr3t-password x")
        users = (right, wrong, "Basic " + base64.b64encode(b"s3cr3t-password").decode())
        requests = (
            ("GET", "/set?key=a&value=s3cr3t-value", None, None),
            ("GET", "/set?value=s3cr3t-value&value=x", None, None),
            ("POST", "/set?key=a", "s3cr3t-value", "text/plain"),
            ("POST", "/set", "value=s3cr3t-value", kvserver.FORM),
            ("POST", "/set", '{"key": "a", "value": "s3cr3t-value"', kvserver.JSON),
            ("POST", "/del", '{"key": ["s3cr3t-value"]}', kvserver.JSON),
            ("DELETE", "/set?key=a&value=s3cr3t-value", None, None),
            ("GET", "/nowhere?key=a&value=s3cr3t-value", None, None),
        )
        answers: list[Answer] = []
        for request, user in itertools.product(requests, users):
            headers = {"Accept": "application/json" if user == wrong else "*/*"}
            answers.append(self.request(*request, user=user, headers=headers))
        for owner, name in (
            *((kvserver, name) for name in ("parse_parameters", "decode_credentials", "verify_password")),
            (kvserver, "check_same_site"),
            (kvserver.Store, "set_value"),
            (kvserver.Store, "commit"),
            (kvserver.Authenticator, "authenticate"),
            (kvserver.RequestHandler, "respond"),
        ):
            for error, user in itertools.product((RuntimeError, UnicodeError, OSError, MemoryError), users):
                self.server.authenticator._refused.clear()
                with mock.patch.object(owner, name, side_effect=error("s3cr3t-value s3cr3t-password")):
                    answers.append(self.request(*requests[0], user=user))
        self.assertGreater(len([answer for answer in answers if answer.status == 500]), 20)
        self.assertIn("internal error: RuntimeError in ", self.log.text())
        self.assertNotRegex(self.log.text() + str(answers), "s3cr3t|" + right.partition(" ")[2])

    def test_no_text_of_a_client_becomes_a_header(self) -> None:
        self.store.set_value(1, "a", "1\r\nInjected: 1\r\n\r\n")
        text = "%0d%0aInjected:%201"
        targets = ("/get?key=a", f"/get?key=a{text}", "/list", f"/nowhere{text}", f"/set?key=a&value=1&{text}&{text}=")
        for target, method in itertools.product(targets, ("GET", "HEAD", "DELETE", "OPTIONS")):
            self.assertNotIn("injected", self.request(method, target).headers)
        for target, name in (
            ("/me/?action=set&page=state&value=1", "key"),
            ("/me/?action=set&value=1&key=a", "page"),
            ("/admin/?action=setadmin", "username"),
        ):
            body = f"{name}=a{text}%0d%0a%0d%0a"
            self.assertNotIn("injected", self.request("POST", target, body, kvserver.FORM).headers)

    def test_no_page_shows_a_password(self) -> None:
        for target, body, status in (
            ("/me/", "action=passwd&current=s3cr3t-value&password=s3cr3t-password", 400),
            ("/me/", "action=explode&current=s3cr3t-value&password=s3cr3t-password", 400),
            ("/admin/", "action=setpassword&username=bob&password=s3cr3t-password%00", 400),
            ("/admin/", "action=setpassword&username=nobody&password=s3cr3t-password", 404),
        ):
            answer = self.check(status, "POST", target, body, kvserver.FORM, headers={"Accept": "text/html"})
            self.assertNotIn(b"s3cr3t", answer.body)
        self.assertNotIn("s3cr3t", self.log.text())

    def test_log_lines_cannot_be_forged(self) -> None:
        name = "x' address=192.0.2.1 \u2028\u202e\x1b[31m\u0085"
        self.request("GET", "/get?key=a", user=basic(name, "wrong password"))
        self.exchange(self.raw("GET /get%0a\u2028\u202e?key=%0aERROR&value=1 HTTP/1.1", "Connection: close"))
        self.exchange(self.raw("GET /get?key=%0aERROR%e2%80%a8 HTTP/1.1", "Connection: close"))
        messages = [*self.log.lines, "a\nb"]
        with mock.patch.object(kvserver, "log", REAL_LOG), mock.patch("sys.stderr", io.StringIO()) as stderr:
            for message in messages:
                kvserver.log("INFO", message)
        lines = stderr.getvalue().split("\n")
        self.assertEqual(len(messages) + 1, len(lines))
        self.assertTrue(all(line.isprintable() for line in lines), lines)


class Addresses(ServerCase):
    host = ""

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "this machine has no IPv6")
    def test_no_host_means_ipv6_and_ipv4(self) -> None:
        self.assertEqual("::", self.server.server_name)
        for address in ("127.0.0.1", "::1"):
            with contextlib.closing(http.client.HTTPConnection(address, self.port, timeout=WAIT_SECONDS)) as connection:
                self.check(200, "GET", "/health", connection=connection)
        self.check(401, "GET", "/list", user=basic("x", "y"))
        self.assertEqual(["login failed: user='x' address=127.0.0.1"], self.log.lines, "not as ::ffff:127.0.0.1")

    def test_no_host_means_ipv4_on_a_machine_without_ipv6(self) -> None:
        self.stop()
        with mock.patch.object(socket, "has_dualstack_ipv6", return_value=False):
            self.start()
        self.assertEqual("0.0.0.0", self.server.server_name)
        self.check(200, "GET", "/health")


class Page(html.parser.HTMLParser):
    """A page as a browser might see it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        body = answer.body.decode("utf-8")
        self.feed(body)
        self.close()
        rows = [re.split(r"\s*</?t(?:able|head|body)\b", row)[0] for row in re.split("<tr[^>]*>", body)[1:]]
        cells = [re.split("<t[dh][^>]*>", row)[1:] for row in rows]
        self.rows = [[html.unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in row] for row in cells]
        links = re.findall(r'<a [^>]*\bhref="?([^"> ]*)"?[^>]*>([^<]*)', body)
        self.links = {html.unescape(text): html.unescape(address) for address, text in links}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, **wanted: str) -> list[str | None]:
        """Return the values of the input fields with these attributes."""
        return [each.get("value") for tag, each in self.elements if tag == "input" and wanted.items() <= each.items()]

    def has_alert(self) -> bool:
        """Return whether the page says once what is wrong."""
        return [each.get("role") for _, each in self.elements].count("alert") == 1


def as_a_browser(target: str) -> str:
    """Return a target as a browser sends it, with percent-encoding."""
    return "".join(c if c.isascii() else urllib.parse.quote(c) for c in target)


class PageCase(ServerCase):
    def see(self, status: int, target: str, user: str | None = "alice", method: str = "GET") -> Answer:
        """Return a browser's response, and check its status."""
        return self.check(status, method, as_a_browser(target), user=user, headers={"Accept": "text/html,*/*;q=0.8"})

    def page(self, target: str, user: str = "alice") -> Page:
        return Page(self.see(200, target, user))

    def send(
        self, status: int, target: str, user: str | None = "alice", form: str = "", location: str = "", **fields: Any
    ) -> Answer:
        """Send a form, with the headers in the argument headers; check status and location, but not when it is done."""
        headers = {"Accept": "text/html,*/*;q=0.8", **fields.pop("headers", {})}
        body = form or urllib.parse.urlencode(fields)
        answer = self.check(status, "POST", as_a_browser(target), body, kvserver.FORM, user, headers)
        if location:
            self.assertEqual(location, re.sub(r"(?<=done=)\d{10}\Z", "NOW", answer.headers["location"]))
        return answer

    def names(self) -> list[str]:
        return [user.name for user, *_ in self.store.users()]

    def follow(self, target: str) -> list[list[str]]:
        """Return the rows of a table over all its pages."""
        rows = []
        while True:
            page = self.page(target)
            self.assertLess(len(page.rows), 110)
            rows += page.rows[1:]
            self.assertLess(len(rows), 1000)
            if "Next page" not in page.links:
                return rows
            target = urllib.parse.urljoin(target, page.links["Next page"])


class Visits(PageCase):
    def test_first_paths_lead_to_the_slash_before_any_login(self) -> None:
        for path in (
            *("/admin", "/me", "/iotpersistenceapi", "/iotpersistenceapi/admin", "/iotpersistenceapi/me"),
            *("/me?folder=hall/&after=%C3%A9", "/iotpersistenceapi?_=1", "/admin?after=\u00e9", "/admin?done=1"),
        ):
            for method in ("GET", "HEAD"):
                headers = self.see(301, path, None, method).headers
                expected = re.sub(r"(\?|$)", r"/\1", as_a_browser(path), count=1)
                self.assertEqual(expected, urllib.parse.urljoin(path, headers["location"]))
                self.assertFalse(headers["location"].startswith("/"))
                self.assertNotIn("www-authenticate", headers)

    def test_the_root_is_for_browsers(self) -> None:
        for path in ("/", "/iotpersistenceapi/"):
            self.assertEqual(["./", "me/", "admin/"], list(Page(self.see(200, path, None)).links.values()))
            answer = self.check(404, "GET", path, user=None, headers={"Accept": "*/*"})
            self.assertTrue(answer.body.startswith(b"Use the api endpoints: /set, /get,"))
            self.check(405, "POST", path, user=None)

    def test_the_root_names_the_address_that_the_browser_uses(self) -> None:
        local = f"127.0.0.1:{self.port}"
        for is_trusted, path, sent, expected in (
            (False, "/", {}, f"http://{local}"),
            (False, "/iotpersistenceapi/", {"Host": "kv.lan:81"}, "http://kv.lan:81/iotpersistenceapi"),
            (False, "/", {"Host": "kv.lan", "X-Forwarded-Proto": "https"}, "http://kv.lan"),
            (True, "/", {"Host": "kv.lan", "X-Forwarded-Proto": "HTTPS"}, "https://kv.lan"),
            (True, "/", {"Host": "kv.lan", "X-Forwarded-Proto": "ftp"}, "http://kv.lan"),
            (True, "/", {"Host": "kv.lan"}, "http://kv.lan"),
            (False, "/", {"Host": "[::1]:8080"}, "http://[::1]:8080"),
            (False, "/", {"Host": ""}, f"http://HOST:{self.port}"),
            (False, "/", {"Host": "a';$(rm)&lt;"}, "http://a';$(rm)&lt;"),
        ):
            self.server.trusted_proxy = kvserver.parse_networks("127.0.0.0/8") if is_trusted else ()
            headers = {"Accept": "text/html", **sent}
            body = self.check(200, "GET", path, user=None, headers=headers).body.decode()
            address, command = map(html.unescape, re.findall("<pre>(.*?)</pre>", body))
            self.assertEqual(expected + "/", address)
            self.assertEqual(["curl", "-u", "USER", expected + "/set?key=door&value=open"], shlex.split(command))
            self.assertIn(kvserver.__version__, body)
            self.assertNotIn("alice", body)
        for host in ('"><script>', "a b", "a/b", "é"):
            self.check(
                400, "GET", "/", user=None, headers={"Accept": "text/html", "Host": host.encode().decode("latin1")}
            )

    def test_a_page_tells_of_a_change_only_after_one(self) -> None:
        now = int(time.time())
        paths = ["/", "/me/", "/me/value?key=a", "/me/tokens", "/me/password", "/admin/", "/admin/user?username=bob"]
        paths += [f"/me/tokens?done={done}" for done in (now - kvserver.DONE_SECONDS - 1, now + 60, 0)]
        self.store.set_value(1, "a", "1")
        for path in (*paths, "/admin/hooks", "/admin/delete?username=bob"):
            self.assertNotIn("The change is made.", self.page(path).text)
        form = urllib.parse.urlencode({"action": "setpassword", "username": "bob", "password": PASSWORDS["bob"]})
        target = self.send(303, "/admin/", form=form).headers["location"]
        self.assertEqual(1, self.page("/admin/" + target).text.count("The change is made."))
        self.assertNotIn("The change is made.", Page(self.send(400, "/admin/" + "?action=zzz", done="1")).text)
        self.see(400, "/me/tokens?done=x")

    def test_pages_have_a_realm_of_their_own(self) -> None:
        for path, realm in (
            *((path, "kvserver pages") for path in ("/admin/", "/admin/user?username=bob", "/me/value?key=a")),
            *(("/iotpersistenceapi/me/", "kvserver pages"), ("/list", "kvserver")),
        ):
            for user in (None, basic("alice", "wrong")):
                headers = self.see(401, path, user).headers
                self.assertEqual(f'Basic realm="{realm}", charset="UTF-8"', headers["www-authenticate"])
        self.send(401, "/me/", None, action="del", key="a")

    def test_the_pages_of_users_are_for_admins(self) -> None:
        for path in ("/admin/", "/admin/user?username=alice", "/admin/delete?username=alice", "/admin/hooks"):
            self.see(200, path)
            self.see(403, path, "bob")
        with mock.patch.object(kvserver, "hash_password") as hash_password:
            for status, path, user in (
                *((403, path, "bob") for path in ("/admin", "/admin/")),
                *((401, path, None) for path in ("/me/", "/admin/", "/admin")),
            ):
                self.send(status, path, user, action="passwd", password="a password")
                self.send(status, path, user, action="setadmin", username="bob", isAdmin="1")
        hash_password.assert_not_called()
        self.assertNotIn("admin/", str(self.page("/me/", "bob").links))
        self.assertIn("../admin/", self.page("/me/").links.values())
        self.assertFalse(self.store.users()[1][0].is_admin)

    def test_tokens_open_no_page(self) -> None:
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", False, "")
        self.store.set_value(1, "a", "1")
        for user in ("Bearer " + token, basic("alice", token)):
            for path in ("/admin/", "/admin/hooks", "/me/", "/me/value?key=a", "/me/tokens", "/me/password"):
                body = self.see(401, path, user).body
                self.assertTrue(b"password" in body and b"alice" not in body, body)
            self.send(401, "/me/", user, action="del", key="a")
            self.send(401, "/me/", user, action="addtoken")
            self.send(401, "/admin/", user, action="deluser", username="bob")
            self.send(401, "/admin/", user, action="delhook", id="1")
            self.send(401, "/admin", user, action="deluser", username="bob")
        self.assertEqual((["alice", "bob"], {"a": "1"}), (self.names(), self.pairs()))

    def test_pages_exist_below_the_prefix_too_and_all_their_addresses_are_relative(self) -> None:
        self.store.set_value(1, "a b&c/é", "1")
        self.store.add_token("alice", b"digest", "", False, "")
        seen, icons, paths = set(), set(), ["/iotpersistenceapi/", "/"]
        while paths:
            path = paths.pop()
            for tag, attributes in self.page(path).elements:
                for address in filter(None, map(attributes.get, ("href", "action", "src"))):
                    self.assertNotRegex(address, r"\A(?:/|[a-z]+:)")
                    target = urllib.parse.urldefrag(urllib.parse.urljoin(path, address))[0]
                    is_below = path.startswith("/iotpersistenceapi/")
                    self.assertEqual(is_below, target.startswith("/iotpersistenceapi/"))
                    if target not in seen and tag == "a":
                        paths.append(target)
                    seen.add(target)
                    icons |= {target} if tag in ("img", "link") else set()
        self.assertEqual({"/icon.svg", "/iotpersistenceapi/icon.svg"}, icons)
        for path in icons:
            answer = self.see(200, path, None)
            self.assertEqual("image/svg+xml", answer.headers["content-type"])
            self.assertEqual("{http://www.w3.org/2000/svg}svg", xml.etree.ElementTree.fromstring(answer.body).tag)
        self.assertIn("/iotpersistenceapi/me/value?key=a%20b%26c/é", seen)
        self.assertIn("/iotpersistenceapi/admin/user?username=bob", seen)

    def test_headers_let_the_browser_run_and_load_nothing(self) -> None:
        for status, path in (
            *((200, path) for path in ("/", "/me/", "/admin/", "/admin/user?username=bob")),
            (404, "/me/value?key=unknown"),
        ):
            answer = self.see(status, path)
            (style,) = re.findall(rb"<style>(.*?)</style>", answer.body, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
            policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self'; form-action 'self';"
            names = ("content-type", "referrer-policy", "cache-control", "content-security-policy")
            expected = [
                "text/html; charset=utf-8",
                "same-origin",
                "no-store",
                policy + " frame-ancestors 'none'; base-uri 'none'",
            ]
            self.assertEqual(expected, [answer.headers[name] for name in names])

    def test_a_refusal_is_a_page_in_a_browser_and_otherwise_a_line(self) -> None:
        for status, path in (
            (404, "/admin/user?username=nobody"),
            *((400, path) for path in ("/admin/user", "/me/value", "/me/?nothing=2")),
            (404, "/me/value?key=nothing"),
        ):
            self.assertEqual("../me/", Page(self.see(status, path)).links["Values"])
            self.assertEqual("text/plain; charset=utf-8", self.check(status, "GET", path).headers["content-type"])
        self.see(404, "/nowhere")

    def test_stored_markup_stays_text(self) -> None:
        hostile = ["<script>1</script>", '"><img src=x onerror=1>', "'><svg onload=1>", "&lt;b&gt;"]
        known = (
            "html head meta title link style body header nav a img main h1 h2 p table thead tbody tr th td time form"
        )
        known += " input label button textarea span strong em div code small details summary pre dl dt dd br ul li"
        paths = ["/admin/", "/me/", "/admin/user?username=alice", "/me/?search=%22%3E%3Cimg", "/me/tokens"]
        paths += ["/admin/hooks"]
        self.store.transact(lambda store: store.keep_history(10))
        answers = []
        for text in hostile:
            self.store.add_user(text, kvserver.hash_password("a password"), False)
            self.store.set_value(1, text, text)
            self.store.add_token("alice", text.encode(), text, False, text)
            self.store.add_hook("alice", text, text, text, "http://h", "http://h/", "POST", "", None)
            paths.append(url("/admin/delete", username=text))
            paths += [url("/admin/user", username=text), url("/me/value", key=text), url("/me/", search=text)]
            answers.append(self.send(409, "/admin/", action="adduser", username=text, password="a password"))
            answers.append(self.send(400, "/me/", action="set", key="", value=text))
            answers.append(self.send(400, "/me/", action="addtoken", label=text + "x" * 64, prefix=text))
            answers.append(self.send(400, "/me/", action=text, key=text, value=text))
            answers.append(self.send(409, "/me/", action="set", key=text, value=text, etag=text, page="value"))
        for answer in (*answers, *(self.see(200, path) for path in paths)):
            page = Page(answer)
            for tag, attributes in page.elements:
                self.assertIn(tag, known.split())
                self.assertFalse([name for name in attributes if name.startswith("on")])
                self.assertEqual("../icon.svg", attributes.get("src", "../icon.svg"))
            shown = page.text + str(page.values())
            self.assertTrue(any(text in shown for text in hostile), shown)


class UserPages(PageCase):
    def test_users_are_a_table_with_pages(self) -> None:
        for key, value, expires in (("a", "1", None), ("b", "2", None), ("c", "3", time.time() - 1)):
            self.store.set_value(2, key, value, expires)
        execute(self.database, "UPDATE pair SET updated = updated - iif(key = 'b', 7201, 3 * 86400)")
        rows = self.page("/admin/").rows
        self.assertEqual(["Name", "Role", "Values", "Last change"], rows[0])
        users = [["alice", "admin", "0", "never"], ["bob", "user", "2", "2 h"]]
        self.assertEqual(users, [row[:4] for row in rows[1:]])
        names = [f"user {number:03}" for number in range(203)]
        for name in names:
            self.store.add_user(name, "", False)
        self.assertEqual(["alice", "bob", *names], [row[0] for row in self.follow("/admin/")])
        self.assertIn("First page", self.page("/admin/?after=user+100").links)

    def test_adduser_adds_a_user(self) -> None:
        done = "./?done=NOW"
        self.send(303, "/admin/", location=done, action="adduser", username="carol", password="carol's pass")
        self.check(200, "GET", "/list", user=basic("carol", "carol's pass"))
        self.see(403, "/admin/", basic("carol", "carol's pass"))
        for is_admin, texts in ((True, ("1", "on", "yes")), (False, ("", "0", "False", "off"))):
            for text in texts:
                name = f"x{text}"
                self.send(303, "/admin/", action="adduser", username=name, password="a password", isAdmin=text)
                self.assertEqual([is_admin], [bool(user.is_admin) for user, *_ in self.store.users(name)])

    def test_a_form_comes_back_with_everything_typed_but_the_password(self) -> None:
        for status, username, password in (
            (409, "bob", "a password"),
            *((400, "carol", password) for password in ("short", None, "x" * 4097)),
            *((400, username, "a password") for username in ("car:ol", "")),
        ):
            fields = {} if password is None else {"password": password}
            page = Page(self.send(status, "/admin/", action="adduser", isAdmin="1", username=username, **fields))
            self.assertEqual(([username], [None]), (page.values(name="username"), page.values(name="password")))
            self.assertTrue(any("checked" in attributes for _, attributes in page.elements))
            self.assertTrue(page.has_alert())
        self.send(400, "/admin/", action="adduser", password="a password")
        self.assertEqual(["alice", "bob"], self.names())

    def test_deluser_names_first_what_is_lost_and_deletes_everything(self) -> None:
        self.store.keep_history(9)
        for value in "1234":
            self.store.set_value(2, "a", value)
        self.store.set_value(2, "b", "1")
        self.store.set_value(1, "a", "1")
        for digest in (b"1", b"2", b"3"):
            self.store.add_token("bob", digest, "", False, "")
        self.store.add_hook("bob", "a", None, "", "http://h", "http://h/", "POST", "", None)
        self.check(200, "GET", "/list", user="bob")
        page = self.page("/admin/delete?username=bob")
        for words in ("values: 2", "tokens: 3", "hooks: 1", "changes in the history: 5"):
            self.assertIn(words, page.text)
        self.assertEqual("user?username=bob", page.links["Keep bob"])
        self.assertEqual("delete?username=bob", self.page("/admin/user?username=bob").links["Delete…"])
        self.see(404, "/admin/delete?username=x")
        self.assertEqual(["alice", "bob"], self.names())
        self.send(303, "/admin/", location="./?done=NOW", action="deluser", username="bob")
        self.assertEqual((["alice"], [], 0), (self.names(), self.store.hooks(), self.store.history_size(2)))
        self.check(401, "GET", "/list", user="bob")
        self.store.add_user("bob", kvserver.hash_password(PASSWORDS["bob"]), False)
        self.assertEqual({}, self.pairs("bob"))

    def test_nobody_deletes_themselves_nor_the_last_admin(self) -> None:
        self.assertIn("deluser", self.page("/admin/delete?username=bob").values(name="action"))
        self.assertNotIn("deluser", self.page("/admin/delete?username=alice").values(name="action"))
        self.send(409, "/admin/", action="deluser", username="alice")
        self.send(409, "/admin/", action="setadmin", username="alice", isAdmin="0")
        self.store.set_admin("bob", True)
        self.send(409, "/admin/", action="deluser", username="alice")
        form = "action=setadmin&username=alice&isAdmin=0"
        self.send(303, "/admin/", form=form, location="../me/?done=NOW")  # still open to her
        self.see(403, "/admin/")
        self.send(409, "/admin/", "bob", action="setadmin", username="bob")
        self.assertEqual(["alice", "bob"], self.names())

    def test_a_refusal_is_told_even_if_its_form_is_not_on_the_page(self) -> None:
        for status, target, forms in (
            (400, "/me/", ("action=zzz", "key=a&value=1", "action=deltoken", "action=del")),
            (404, "/me/", ("action=deltoken&id=1", "action=del&key=gone", "action=del&key=gone&page=state")),
            (409, "/me/", ("action=set&key=gone&page=state&value=1&etag=a",)),
            (400, "/admin/", ("action=zzz&username=bob", "username=bob", "action=deluser")),
            (400, "/admin/", ("action=setpassword&username=bob&password=x", "action=deltoken&username=bob")),
            (404, "/admin/", ("action=deluser&username=x", "action=setpassword&username=x&password=a+password")),
            (404, "/admin/", [f"action=deltoken&username=bob&id={number}" for number in ("1", "x", "9" * 30, "-1")]),
            (400, "/admin/", ("action=testhook", "action=delhook")),
            (
                404,
                "/admin/",
                [f"action={action}hook&id={n}" for action in ("test", "del") for n in ("1", "x", "9" * 30)],
            ),
            (409, "/admin/", ("action=deluser&username=alice", "action=setadmin&username=alice")),
            (409, "/admin/", ("action=adduser&username=bob&password=a+password",)),
        ):
            for form in forms:
                self.assertTrue(Page(self.send(status, target, form=form)).has_alert(), form)

    def test_two_admins_cannot_delete_each_other_at_once_nor_take_their_roles(self) -> None:
        def send(user: str, other: str, fields: Mapping[str, str], barrier: threading.Barrier) -> int:
            barrier.wait(WAIT_SECONDS)
            form = urllib.parse.urlencode({"username": other, **fields})
            return self.request("POST", "/admin/", form, kvserver.FORM, user).status

        for fields in [{"action": "deluser"}, {"action": "setadmin", "isAdmin": "0"}] * 5:
            for name, password in PASSWORDS.items():
                with contextlib.suppress(kvserver.Conflict):
                    self.store.add_user(name, kvserver.hash_password(password), True)
                self.store.set_admin(name, True)
            barrier = threading.Barrier(2)
            results = join(in_threads(send, [("alice", "bob", fields, barrier), ("bob", "alice", fields, barrier)]))
            self.assertEqual(1, sum(bool(user.is_admin) for user, *_ in self.store.users()), results)
            self.assertEqual(1, results.count(303))

    def test_setpassword_counts_at_once_and_tokens_stay(self) -> None:
        token = kvserver.make_token()
        self.store.add_token("bob", kvserver.hash_token(token), "", False, "")
        self.check(200, "GET", "/list", user="bob")
        form = "action=setpassword&username=bob&password="
        self.send(303, "/admin/", form=form + "another+one", location="user?username=bob&done=NOW")
        for status, user in ((401, "bob"), (200, basic("bob", "another one")), (200, "Bearer " + token)):
            self.check(status, "GET", "/list", user=user)
        self.assertIn("Tokens keep working", self.page("/admin/user?username=bob").text)
        self.assertIn(b"<h1>bob</h1>", self.send(400, "/admin/", form=form + "short").body)

    def test_the_page_of_a_user_shows_values_and_tokens(self) -> None:
        for number in range(250):
            self.store.set_value(2, f"key {number:03}", f"value {number}")
        self.store.add_token("bob", b"1", "hall", True, "hall/")
        execute(self.database, "UPDATE token SET last_used_day = 20000")
        rows = [row[:2] for row in self.follow("/admin/user?username=bob") if row[0].startswith("key ")]
        self.assertEqual([[f"key {n:03}", f"value {n}"] for n in range(250)], rows)
        rows = self.page("/admin/user?username=bob").rows
        days = f"{int(time.time() / 86400) - 20000} days"
        self.assertEqual(["hall", "read hall/*", days], next(row[:3] for row in rows if row[0] == "hall"))
        for form in ("action=deltoken&username=bob&id=1", "action=setadmin&username=bob&isAdmin=1"):
            self.send(303, "/admin/", form=form, location="user?username=bob&done=NOW")
        self.assertEqual([], self.store.tokens("bob"))

    def test_programs_for_the_flask_version_keep_working(self) -> None:
        for path in ("/admin", "/iotpersistenceapi/admin"):
            add, delete = path + "?action=adduser", path + "?action=deluser"
            answer = self.send(303, add, username="carol", password="a password", isAdmin="on")
            self.assertEqual(path + "/", urllib.parse.urljoin(path, answer.headers["location"]))
            self.send(409, add, username="carol", password="a password")
            self.send(303, add, username="dave", password="a password")
            self.assertEqual([True, False], [bool(user.is_admin) for user, *_ in self.store.users(after="bob")])
            self.send(303, delete + "&username=carol")
            self.send(303, delete, username="dave")
            for user in (None, "alice"):
                self.see(400, delete + "&username=bob", user)
        self.assertEqual(["alice", "bob"], self.names())

    def test_another_site_changes_nothing(self) -> None:
        self.store.add_token("alice", b"1", "", False, "")
        evil = "http://evil.example"
        foreign = ({"Origin": evil}, {"Sec-Fetch-Site": "same-site"}, {"Referer": evil})
        eve = "action=adduser&username=eve&password=a+password&isAdmin=1"
        password = url("action=passwd", current=PASSWORDS["alice"], password="a password").replace("?", "&")
        for path, forms in (
            ("/admin", (eve,)),
            ("/admin/", (eve, "action=deluser&username=bob", "action=setpassword&username=alice&password=a+password")),
            ("/admin/", ("action=setadmin&username=bob&isAdmin=1", "action=deltoken&username=alice&id=1")),
            ("/me/", ("action=set&key=a&value=1", "action=addtoken", "action=deltoken&id=1", password)),
        ):
            for form, headers in itertools.product(forms, foreign):
                self.send(403, path, form=form, headers=headers)
        self.assertEqual((["alice", "bob"], {}), (self.names(), self.pairs()))
        self.assertEqual(1, len(self.store.tokens("alice")))
        self.assertEqual([True, False], [bool(user.is_admin) for user, *_ in self.store.users()])
        self.send(303, "/me/", headers={"Sec-Fetch-Site": "same-origin"}, action="set", key="a", value="1")

    def test_a_password_is_hashed_while_others_are_served(self) -> None:
        self.page("/admin/")
        add = functools.partial(self.send, action="adduser", password="a password")
        with held(kvserver, "hash_password") as (hashing, release):
            calls = in_threads(lambda name: add(303, "/admin/", username=name), [("x",), ("y",), ("z",)])
            self.assertTrue(hashing.acquire(timeout=WAIT_SECONDS))
            self.check(200, "GET", "/set?key=a&value=1")
            self.assertEqual(["alice", "bob"], self.names())
            release.set()
            join(calls)
        self.assertEqual(["alice", "bob", "x", "y", "z"], self.names())

    def test_an_admin_who_loses_the_role_while_the_password_is_hashed_changes_nothing(self) -> None:
        hash_password, form = kvserver.hash_password, "action=adduser&username=x&password=a+password"
        changes = ((403, "UPDATE user SET is_admin = 0 WHERE id = 2"), (401, "DELETE FROM user WHERE id = 2"))
        for status, change in changes:
            self.store.set_admin("bob", True)
            self.see(200, "/admin/", "bob")

            def hash_late(password: str, change: str = change) -> str:
                execute(self.database, change)
                return hash_password(password)

            with mock.patch.object(kvserver, "hash_password", side_effect=hash_late) as late:
                self.send(status, "/admin/", "bob", form)
            late.assert_called_once()
            self.assertNotIn("x", self.names())

    def test_a_user_who_changes_just_before_the_transaction_changes_nothing(self) -> None:
        again = "CREATE TEMP TABLE old AS SELECT * FROM user WHERE id = 2; DELETE FROM user WHERE id = 2;"
        again += "INSERT INTO user SELECT 3, name, password_hash, is_admin, tokens_added FROM old"
        commit = kvserver.Server.commit
        for status, target, form, change in (
            (403, "/admin/", "action=deluser&username=carol", "UPDATE user SET is_admin = 0 WHERE id = 2"),
            (503, "/admin", "action=deluser&username=carol", again),
            (503, "/me/", "action=addtoken", again),
            (401, "/me/", "action=set&key=a&value=1", "DELETE FROM user WHERE id = 2"),
        ):
            execute(self.database, "DELETE FROM user WHERE name != 'alice'")
            execute(self.database, "INSERT INTO user SELECT 2, 'bob', password_hash, 1, 0 FROM user")
            self.store.add_user("carol", "", False)

            def commit_late(server: kvserver.Server, *arguments: Any, change: str = change) -> Any:
                execute(self.database, change)
                return commit(server, *arguments)

            login = basic("bob", PASSWORDS["alice"])
            with mock.patch.object(kvserver.Server, "commit", commit_late):
                answer = self.send(status, target, login, form)
            self.assertEqual(status == 503, b"our user has just been changed; try again" in answer.body)
            self.assertIn("carol", self.names())
            self.assertEqual(([], {}), (self.store.tokens("bob"), self.pairs()))


class HookPages(HookCase, PageCase):
    def test_all_hooks_are_listed_without_their_urls(self) -> None:
        add = functools.partial(self.store.add_hook, "bob")
        add("hall/*", "on", "phone", "https://maker.example", "https://maker.example/SECRET", "POST", "", None)
        self.add_hook("door")
        self.set("door", "open")
        self.assert_told(("door", "open", None))
        answer = self.see(200, "/admin/hooks")
        words = 'only when it becomes "on"'
        rows = [["1 phone", "https://maker.example", "bob", "hall/*", words, "not tried", "pending: 0"]]
        rows += [["2", self.target.origin, "alice", "door", "200 OK", "just now, pending: 0"]]
        texts = re.findall(r"<tr role=\"row\">(.*?)(?=<tr|</table)", answer.body.decode(), re.DOTALL)[1:]
        cells = [re.split("<td[^>]*>|<br>", text)[1:] for text in texts]
        shown = [[html.unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in row] for row in cells]
        self.assertEqual(rows, [row[: len(wanted)] for row, wanted in zip(shown, rows)])
        self.assertNotIn(b"SECRET", answer.body)
        self.assertNotIn("Next page", Page(answer).links)
        for number in range(3, 103):
            add(str(number), None, "", "http://h", "http://h/", "POST", "", None)
        self.assertEqual([str(number) for number in range(3, 103)], [row[2] for row in self.follow("/admin/hooks")][2:])
        self.assertLess(len(self.see(200, "/admin/hooks?after=10").body), 60_000)

    def test_the_command_that_adds_a_hook_is_ready_to_copy(self) -> None:
        def command() -> list[str]:
            (text,) = re.findall("<pre>(.*?)</pre>", self.see(200, "/admin/hooks").body.decode())
            return shlex.split(html.unescape(text))

        words = command()
        self.assertEqual([sys.executable, os.path.abspath(kvserver.__file__)], words[:2])
        self.assertEqual(["addhook", "USER", "KEY", "URL"], words[-4:])
        output = io.TextIOWrapper(io.BytesIO())
        with mock.patch.dict(os.environ, {}, clear=True), contextlib.redirect_stdout(output):
            self.assertEqual(0, kvserver.main([*words[2:-3], "bob", "a key", "http://h/"]))
        self.assertEqual([("bob", "a key")], [(hook.user_name, hook.pattern) for hook in self.store.hooks()])
        self.patch("__file__", os.path.join(self.folder, "kv server.py"))
        self.assertEqual(kvserver.__file__, command()[1], "quoted for the shell")

    def test_a_test_is_sent_at_once_and_not_stored(self) -> None:
        self.patch("TESTS_MAX", 1)  # each test makes room for the next one
        self.add_hook("door")
        for path in ("/admin/", "/admin"):
            page = Page(self.send(200, path, action="testhook", id="1"))
            self.assertIn("Hook 1 answered 200 OK.", page.text)
            self.assertNotIn("The change is made.", page.text)
        self.assertEqual([("door", "test", None)] * 2, self.target.changes())
        self.assertEqual([(None, 0)], [(hook.result, hook.pending) for hook in self.store.hooks()])
        self.target.behave = lambda connection, number: connection.sendall(b"HTTP/1.1 404 Nothing\r\n\r\n")
        page = Page(self.send(424, "/admin/", action="testhook", id="1"))
        self.assertIn("hook 1: 404 Not Found; check the URL and the program there", page.text)
        self.assertTrue(page.text.startswith("Hooks - kvserver"))
        self.target.close()
        message = b"hook 1: Connection refused; check the URL and the program there"
        answer = self.check(424, "POST", "/admin", "action=testhook&id=1", kvserver.FORM)
        self.assertEqual(message, answer.body)
        self.check(403, "POST", "/admin", "action=testhook&id=1", kvserver.FORM, "bob")

    def test_a_test_that_hangs_ends_and_holds_up_nobody(self) -> None:
        self.add_hook("door")
        self.store.set_admin("bob", True)
        with held(kvserver, "deliver") as (delivering, release):
            calls = in_threads(lambda: self.send(403, "/admin/", action="testhook", id="1"), [()])
            self.assertTrue(delivering.acquire(timeout=WAIT_SECONDS))
            self.set("a", "1")
            with mock.patch.object(kvserver, "TESTS_MAX", 1):
                self.send(503, "/admin/", "bob", action="testhook", id="1")
            self.store.set_admin("alice", False)
            release.set()
            join(calls)
        self.target.behave = hang
        self.patch("HOOK_SECONDS", 0.05)
        page = Page(self.send(424, "/admin/", "bob", action="testhook", id="1"))
        self.assertIn("hook 1: no answer within 0.05 seconds; check the URL", page.text)
        with held(kvserver, "deliver"):  # as if a name look-up hung
            page = Page(self.send(424, "/admin/", "bob", action="testhook", id="1"))
            self.assertIn("hook 1: no answer within 0.05 seconds; check the URL", page.text)
        self.server.outbox.is_stopping = True
        self.send(503, "/admin/", "bob", action="testhook", id="1")

    def test_dangerous_buttons_are_folded_and_name_their_thing(self) -> None:
        self.add_hook("door")
        self.store.add_token("bob", b"1", "phone", False, "")
        self.store.set_value(1, "hall/lamp", "on")
        inside = r'(?s)<details ?><summary class="bad" aria-label="([^"]*)">([^<]*)…</summary>((?:(?!</details>).)*)'
        found = list[tuple[str, str, str]]()
        for target in ("/me/value?key=hall/lamp", "/admin/hooks", "/admin/user?username=bob", "/me/tokens"):
            body = self.see(200, target, "bob" if target == "/me/tokens" else "alice").body.decode()
            for name, word, form in re.findall(inside, body):
                (action,) = re.findall('name="action" value="(.*?)"', form)
                self.assertEqual(1, body.count(f'value="{action}"'), "it is nowhere else")
                found.append((name, word, action))
        token, role = (
            ("Delete phone", "Delete", "deltoken"),
            ("Change the role to admin", "Change the role", "setadmin"),
        )
        others = [("Delete hall/lamp", "Delete", "del"), ("Delete hook 1", "Delete", "delhook")]
        self.assertEqual([*others, role, token, token], found)
        hooks = self.see(200, "/admin/hooks").body
        self.assertIn(b'aria-label="Send a test to hook 1">Send a test</button>', hooks)

    def test_a_hook_is_deleted_with_its_deliveries(self) -> None:
        for path, location in (("/admin/", "hooks?done=NOW"), ("/admin", "admin/")):
            number = self.add_hook("door")
            self.send(303, path, location=location, action="delhook", id=number)
            self.send(404, path, action="delhook", id=number)
        self.assertEqual([], self.store.hooks())
        self.set("door", "1")
        self.assertEqual(0, self.store.sizes()[2])


class OwnPages(PageCase):
    def edit(self, key: str) -> None:
        """Save a value's form as a browser does, unchanged."""
        target = url("/me/value", key=key)
        text = self.see(200, target).body.decode("utf-8")
        (area,) = re.findall(r"<textarea[^>]*>\n(.*?)</textarea>", text, re.DOTALL)
        (action,) = re.findall(r'<form[^>]*action="([^"]*)"[^>]*>\s*<input[^>]*value="set">', text)
        value = html.unescape(area).replace("\n", "\r\n")
        self.send(303, urllib.parse.urljoin(target, html.unescape(action)), action="set", value=value)

    def test_values_are_a_table(self) -> None:
        shown = {"as long as that": "é" * 40, "door": "open", "empty": "empty", "lines": "↵a\ufffd b\ufffd"}
        shown |= {"long": "😀" * 40 + "…", "motion": "yes"}
        for key, value in {**shown, "empty": "", "lines": "\na\r\tb\0", "long": "😀" * 41}.items():
            self.store.set_value(1, key, value, time.time() + 3601 if key == "motion" else None)
        self.store.set_value(1, "gone", "x", time.time() - 1)
        self.store.set_value(1, "gone/too", "x", time.time() - 1)
        self.store.set_value(1, "hall/lamp", "on")
        self.store.add_user(" ", "", False)
        self.assertIn("␣", self.page("/admin/").links)
        answer = self.see(200, "/me/")
        for part in (b'<a href="../me/" aria-current="page">', b'<a href="../admin/">', b'role="columnheader">Name'):
            self.assertIn(part, answer.body)
        self.assertEqual([["Name", "Value", "Changed", "Expires"], ["hall/", "", "", ""]], Page(answer).rows[:5:4])
        rows = [row[:2] for row in Page(answer).rows[1:] if row[2]]
        self.assertEqual([*map(list, shown.items())], rows)
        times = re.findall(r'<time datetime="([^"]+)" title="([^"]+)">([^<]+)</time>', answer.body.decode())
        self.assertRegex(times[0][0], r"\A\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ\Z")
        self.assertEqual(times[0][0], times[0][1])
        self.assertEqual(["in 2 h"], [row[3] for row in Page(answer).rows[1:] if row[3]])
        for key in (" ", " a", "a ", "\u202eabc", "\u200b"):  # invisible characters
            self.store.set_value(2, key, key)
        rows = [row[:2] for row in self.page("/me/", "bob").rows[1:]]
        self.assertEqual([[text] * 2 for text in ("␣", "␣a", "a␣", "\ufffd", "\ufffdabc")], rows)

    def test_times_are_words(self) -> None:
        for seconds, words in (
            *((0, "now"), (-0.9, "now"), (-1, "1 s"), (-4.5, "4 s"), (-59.9, "59 s"), (-60, "1 min"), (-239, "3 min")),
            *((-3599, "59 min"), (-7200, "2 h"), (-86399, "23 h"), (-86400, "1 day"), (-86400 * 800, "800 days")),
            *((0.1, "in 1 s"), (59, "in 59 s"), (59.1, "in 1 min"), (599.9, "in 10 min"), (600, "in 10 min")),
            *((600.1, "in 11 min"), (3541, "in 1 h"), (82801, "in 1 day"), (86400 * 2, "in 2 days")),
        ):
            with mock.patch.object(time, "time", return_value=0.0):
                self.assertIn(f">{words}<", kvserver.make_time(seconds))

    def test_values_have_folders_pages_and_a_search(self) -> None:
        keys = [f"{room}/{number:03}" for room in ("cellar", "hall") for number in range(120)] + ["50%_Ü"]
        for key in keys:
            self.store.set_value(1, key, "1")
        self.assertEqual(["50%_Ü", "cellar/", "hall/"], [row[0] for row in self.page("/me/").rows[1:]])
        for target, expected in (
            ("/me/?folder=hall/", [key[5:] for key in keys[120:240]]),
            ("/me/?search=L", keys[:240]),
            ("/me/?search=ALL/11", keys[230:240]),
            ("/me/?search=11&folder=hall/", ["hall/011", *keys[230:240]]),
            *((f"/me/?search={text}", keys[240:]) for text in ("%25_", "Ü", "50%25_Ü")),
            *((f"/me/?search={text}", []) for text in ("ü", "_%25", "5_%25", "hall/&folder=cellar/", "é" * 256)),
            (f"/me/?folder={'é' * 255}a/", []),
        ):
            self.assertEqual(expected, [row[0] for row in self.follow(target)], target)
        live = "?folder=hall/&refresh=10"
        self.assertEqual(f"./{live}&after=hall/099", self.page("/me/" + live).links["Next page"])
        self.assertEqual("./" + live, self.page(f"/me/{live}&after=hall/099").links["First page"])
        page = self.page("/me/?folder=hall/&search=1&after=hall/100")
        self.assertEqual(["1"], page.values(name="search"))
        links = {"First page": "./?folder=hall/&search=1", "Show all": "./?folder=hall/"}
        self.assertLessEqual(links.items(), page.links.items())
        page = self.page("/me/?search=x")
        self.assertTrue("Keys with x. Show all" in page.text and "No values here." in page.text)
        for target in ("folder=hall", f"folder={'é' * 256}/", f"search={'é' * 256}a"):
            for start in ("/me/?", "/admin/user?username=alice&"):
                if not (start.startswith("/admin") and "search" in target):
                    body = self.see(400, start + target).body
                    self.assertTrue(b"folder=hall/" in body or b"at most 512 bytes" in body)

    def test_every_key_is_reached_once_by_links(self) -> None:
        choose = random.Random(21)
        keys = {"".join(choose.choices("//ab!é", k=choose.randint(1, 6))) for _ in range(70)}
        keys |= {"/", "//", "a", "a/", "a//b", "a" * 510 + "/b", "\U0010ffff" * 128, "\U0010ffff/\U0010ffff"}
        for key in keys:
            self.store.set_value(1, key, "1")
            self.store.set_value(1, f"{key[:200]}/x/gone", "1", time.time() - 1)
        self.enterContext(mock.patch.object(kvserver, "PAGE_ROWS_MAX", 3))
        for start, links in (("/me/", r"value\?key=(.*)"), ("/admin/user?username=alice", "")):
            reached, targets, seen = [], [start], set[str]()
            while targets:
                target = targets.pop()
                self.assertNotIn(target, seen)
                seen.add(target)
                page = self.page(target)
                self.assertLessEqual(len(page.rows), 4)
                for tag, attributes in page.elements:
                    address = attributes.get("href") or ""
                    match = re.fullmatch(links, address) if links else None
                    if match:
                        reached.append(urllib.parse.unquote(match[1]))
                    elif tag == "a" and (attributes.get("class") == "folder" or address == page.links.get("Next page")):
                        targets.append(urllib.parse.urljoin(target, address))
                if not links:
                    folder = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(target).query)).get("folder", "")
                    reached += [folder + row[0].replace("no name", "") for row in page.rows if row[1:2] == ["1"]]
            self.assertEqual(sorted(keys), sorted(reached))

    def test_a_folder_is_listed_without_reading_all_its_keys(self) -> None:
        numbers = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 20000)"
        execute(self.database, f"{numbers} INSERT INTO pair SELECT 1, 'a/' || n, '1', 0, NULL FROM c")
        self.store.set_value(1, "b", "1")
        thousands = list[int]()
        self.store._connection.set_progress_handler(lambda: thousands.append(1), 1000)  # steps of SQLite's machine
        self.assertEqual(["a/", "b"], [entry.name for entry in self.store.entries(1, "")])
        self.assertLess(len(thousands), 3)

    def test_an_added_value_is_marked_on_the_page_with_its_row(self) -> None:
        def add(key: str) -> str:
            answer = self.send(303, "/me/?page=add", action="set", key=key, value="new", etag="")
            return urllib.parse.urljoin("/me/", answer.headers["location"])

        def seen(target: str) -> tuple[list[str], bool, bool]:
            """Return the marked names, whether the page names their key, and whether it is a later page."""
            answer = self.see(200, target)
            marked = re.findall(
                r'<tr role="row" class="mark"><td role="cell"><a href="[^"]*">([^/]*)</', answer.body.decode()
            )
            status = re.findall(r'<p role="status">(.*)</p>', answer.body.decode())
            return marked, "is stored" in str(status), "First page" in Page(answer).links

        for number in range(150):
            self.store.set_value(1, f"hall/{number:03}", "1")
        for key, name, is_late in (
            *(("hall/050x", "050x", False), ("hall/098x", "098x", True), ("hall/ z&", "␣z&amp;", False)),
            *(("hall/zé", "zé", True), ("door", "door", False), ("hall/", '<span class="soft">no name', False)),
        ):
            target = add(key)
            self.assertEqual(([name], True, is_late), seen(target), target)
            link = self.page(target).links[kvserver.make_visible(key)]
            self.assertEqual(f"value?key={key}", urllib.parse.unquote(link))
            if is_late:
                self.assertEqual(name, self.page(target).rows[1][0])
        late = add("hall/151")
        self.store.delete_pair(1, "hall/151")
        self.assertEqual(([], False, False), seen(late))
        self.assertEqual("no name", self.page(late).rows[1][0])
        self.assertEqual(["hall/"], self.page("/me/?folder=hall/").values(name="key"))
        page = Page(self.send(400, "/me/?page=add", action="set", key="", value="typed"))
        self.assertEqual(([""], True), (page.values(name="key"), page.has_alert()))

    def test_live_pages_reload_themselves_and_have_no_field(self) -> None:
        self.store.set_value(1, "hall/1", "1")
        for path, live in (
            ("/me/?folder=hall/&search=1&added=hall/1", "./?folder=hall/&search=1&refresh=10"),
            ("/me/?folder=hall/&after=a", "./?folder=hall/&after=a&refresh=10"),
        ):
            answer = self.see(200, path)
            self.assertNotIn("refresh", answer.headers)
            self.assertEqual(live, Page(answer).links["Live"])
            answer = self.see(200, urllib.parse.urljoin(path, live))
            self.assertEqual("10", answer.headers["refresh"])
            self.assertNotRegex(answer.body.decode(), "<input [^>]*(?:text|search)|<textarea")
            self.assertEqual(live.replace("&refresh=10", ""), Page(answer).links["Stop"])
            for text in ("9", "11", "010", "", "ten"):
                answer = self.see(400, f"{path}&refresh={text}")
                self.assertTrue("refresh" not in answer.headers and "refresh can only be: 10" in Page(answer).text)
        self.assertEqual("10", self.see(200, "/me/value?key=hall/1&refresh=10").headers["refresh"])
        self.see(400, "/me/value?key=hall/1&refresh=9")
        form = "action=set&key=hall/2&value=2"
        self.assertIn("refresh", Page(self.send(400, "/me/?refresh=10", form=form)).text)
        self.assertEqual({"hall/1": "1"}, self.pairs())

    def test_the_answer_to_a_form_of_a_live_page_never_reloads_itself(self) -> None:
        self.store.set_value(1, "hall/1", "1")
        live = "/me/value?key=hall/1&refresh=10"
        (address,) = {each["action"] for tag, each in self.page(live).elements if tag == "form"}
        headers = {"Referer": f"http://127.0.0.1:{self.port}{live}"}
        for status, fields in (
            *((303, {"action": "incr"}), (303, {"action": "set", "value": "on"}), (409, {"action": "incr"})),
            *((400, {"action": "set"}), (404, {"action": "del", "key": "gone"}), (200, {"action": "addtoken"})),
        ):
            target = urllib.parse.urljoin(live, address).replace("hall/1", fields.pop("key", "hall/1"))
            answer = self.send(status, target, headers=headers, **fields)
            self.assertNotIn("refresh", answer.headers)
            self.assertNotIn("refresh", answer.headers.get("location", ""))

    def test_an_admin_reads_the_values_of_others(self) -> None:
        for key in ("a", "hall/b", *(f"hall/{number:03}" for number in range(120))):
            self.store.set_value(2, key, "theirs")
        page = self.page("/admin/user?username=bob")
        self.assertEqual([["a", "theirs"], ["hall/", ""]], [row[:2] for row in page.rows[-2:]])
        folder = page.links["hall/"]
        self.assertEqual("user?username=bob&folder=hall/", folder)
        rows = self.follow("/admin/" + folder)
        self.assertEqual(121, [row[1:2] for row in rows].count(["theirs"]))
        page = self.page("/admin/" + folder)
        self.assertEqual("user?username=bob", page.links["All values"])
        self.assertNotIn("value?key", str(page.links))

    def test_values_are_added_edited_and_deleted(self) -> None:
        for target, form, location, pairs in (
            (
                "/me/",
                "action=set&key=a/b+%C3%A9&value=1%0D%0A2%0D3%0A",
                "./?folder=a/&added=a/b%20%C3%A9",
                {"a/b é": "1\n2\n3\n"},
            ),
            ("/me/?key=a%2Fb+%C3%A9", "action=set&value=2&page=value", "value?key=a/b%20%C3%A9", {"a/b é": "2"}),
            ("/me/", "action=del&key=a/b+%C3%A9&page=value", "./?folder=a/", {}),
        ):
            answer = self.send(303, target, form=form)
            self.assertRegex(answer.headers["location"], re.escape(location) + r"&done=\d{10}\Z")
            self.assertEqual((pairs, {}), (self.pairs(), self.pairs("bob")))

    def test_a_form_comes_back_with_everything_typed(self) -> None:
        for status, fields in (
            *((400, {"key": key, "value": "typed"}) for key in ("", "k" * 513)),
            *((400, {"value": "typed"}), (400, {"key": "k"})),
            (413, {"key": "k", "value": "typed" + "x" * 1024 * 1024}),
        ):
            page = Page(self.send(status, "/me/", action="set", **fields))
            self.assertIn(fields.get("key", ""), page.values(name="key"))
            self.assertIn("typed" if "value" in fields else "Value", page.text)
            self.assertIn(("details", {"open": None}), page.elements)
        self.assertEqual({}, self.pairs())

    def test_adding_and_editing_overwrite_only_what_was_shown(self) -> None:
        def refuse(shown: str, target: str = "/me/?key=a", **fields: str) -> None:
            """Be refused because of another value, which the page shows; save the form again, and take it back."""
            answer = self.send(409, target, action="set", value="typed", **fields)
            page, html_text = Page(answer), answer.body.decode()
            self.assertRegex(html_text, f'(?s)<details open>.*role="alert"[^>]*>{shown}\\.</p>.*typed')
            self.assertTrue(page.has_alert() and self.pairs().get("a") != "typed")
            self.assertNotIn("refresh", answer.headers)
            (etag,) = page.values(name="etag")
            self.send(303, "/me/?key=a", action="set", value="typed", page="value", etag=etag)
            self.assertEqual("typed", self.pairs()["a"])

        def now(value: str) -> str:
            return rf"to <em>{value}</em> <time [^>]*>(just now|1 s ago)</time>; save again to overwrite it"

        self.assertEqual([""], self.page("/me/").values(name="etag"))
        answer = self.send(303, "/me/", form="action=set&key=b/%C3%A9&value=2&page=add&etag=")
        self.assertRegex(answer.headers["location"], r"\A\./\?folder=b/&added=b/%C3%A9&done=\d+\Z")
        self.store.set_value(1, "a", "shown", time.time() + 100)
        refuse("The key exists: it was set " + now("shown"), "/me/", key="a", page="add", etag="")
        (etag,) = self.page("/me/value?key=a").values(name="etag")
        self.store.set_value(1, "a", "\u202e<" + "x" * 40)
        refuse("The value was changed " + now("\ufffd&lt;x{38}…"), page="value", etag=str(etag))
        self.store.delete_pair(1, "a")
        refuse("The value was deleted; save one to add it again", page="value", etag=kvserver.entity_tag(b"typed"))
        self.assertEqual({"a": "typed", "b/é": "2"}, self.pairs())
        self.assertNotIn("xxx", self.log.text())

    def test_a_full_or_locked_database_gives_the_typed_text_back(self) -> None:
        busy, full = kvserver.StoreBusy("another process keeps it"), kvserver.StoreFull("the disk is full")
        for status, place, error in (
            (507, mock.patch.object(kvserver.Store, "set_value"), full),
            (503, mock.patch.object(kvserver.Server, "commit"), busy),  # the transaction does not even begin
        ):
            with place as failing:
                failing.side_effect = error
                page = Page(self.send(status, "/me/?key=a", action="set", value="typed", page="add"))
            self.assertTrue(page.has_alert() and "typed" in page.text)

    def test_a_user_who_is_deleted_while_a_page_waits_for_a_thread_sees_nothing(self) -> None:
        self.see(200, "/me/tokens", "bob")
        begin = kvserver.Store.begin

        def begin_late(store: kvserver.Store, is_reading: bool = False) -> sqlite3.Connection:
            if is_reading:
                execute(self.database, "DELETE FROM user WHERE name = 'bob'")
            return begin(store, is_reading)

        with mock.patch.object(kvserver.Store, "begin", begin_late):
            self.see(401, "/me/tokens", "bob")

    def test_a_refused_form_is_a_line_for_a_program(self) -> None:
        for status, path, form, text in (
            (400, "/me/", "action=set&key=&value=1", b"a key is 1 to 512 bytes"),
            (409, "/admin/", "action=deluser&username=alice", b"nobody can delete themselves"),
        ):
            answer = self.check(status, "POST", path, form, kvserver.FORM)
            self.assertTrue(answer.body.startswith(text) and b"<" not in answer.body, answer.body)
        page = Page(self.send(400, "/me/?page=value", action="set", value="typed"))
        self.assertTrue(page.text.startswith("Values - kvserver") and "typed" in page.text)

    def test_tokens_of_a_user_are_bounded(self) -> None:
        for number in range(kvserver.TOKENS_MAX):
            self.send(200, "/me/", action="addtoken", label=str(number))
        answer = self.send(409, "/me/", action="addtoken", label="typed")
        self.assertEqual(["typed"], Page(answer).values(name="label"))
        self.send(303, "/me/", action="deltoken", id="1")
        for user in PASSWORDS:
            self.send(200, "/me/", user, action="addtoken")

    def test_a_page_is_not_made_while_others_wait_to_write(self) -> None:
        with held(kvserver, "make_values") as (making, release):
            thread = in_threads(functools.partial(self.send, action="zzz"), [(400, "/me/")])
            self.assertTrue(making.acquire(timeout=WAIT_SECONDS))
            self.check(200, "GET", "/set?key=a&value=1", user="bob")
            release.set()
            join(thread)

    def test_an_edit_keeps_the_expiry_and_a_new_value_does_not(self) -> None:
        expires = time.time() + 100
        self.store.set_value(1, "a", "1", expires)
        self.edit("a")
        self.assertEqual(expires, getattr(self.store.pair(1, "a"), "expires", ""))
        for page, fields, seconds in (
            *(("value", {"ttl": ""}, 100), ("value", {"ttl": "", "never": "0"}, 100), ("value", {"ttl": "600"}, 600)),
            *(("value", {"never": "1"}, None), ("value", {"ttl": "0.5e1"}, 400), ("value", {"ttl": "0"}, 400)),
            *(("value", {"never": "1", "ttl": "5"}, 400), ("", {}, None), ("add", {"ttl": ""}, None)),
            *(("", {"ttl": "600"}, 600), ("state", {}, 100)),
        ):
            self.store.set_value(1, "a", "1", time.time() + 100)
            status = 400 if seconds == 400 else 303
            answer = self.send(status, "/me/", action="set", key="a", value="2", page=page, **fields)
            pair = self.store.pair(1, "a")
            left = pair and pair.expires and pair.expires - time.time()
            expected = 100 if status == 400 else seconds
            self.assertEqual(expected, left and round(left, -1), (page, fields))
            self.assertEqual(b"1" if status == 400 else b"2", pair and pair.value)
            if status == 400:  # everything typed comes back
                shown = Page(answer)
                self.assertEqual([fields["ttl"]], shown.values(name="ttl"))
                checked = [each for _, each in shown.elements if each.get("name") == "never" and "checked" in each]
                self.assertEqual("never" in fields, bool(checked))

    def test_a_value_that_a_form_cannot_carry_is_shown_and_not_editable(self) -> None:
        room = kvserver.FORM_BYTES_MAX
        for is_editable, values in (
            (True, ("a" * kvserver.VALUE_BYTES_MAX, "é" * (room // 6), "\n" * (room // 6), "~" * (room // 3))),
            (False, ("a\0b", "a\rb", "a\r\nb", "é" * (room // 6 + 1), "\n" * (room // 6 + 1))),
        ):
            for value in values:
                self.store.set_value(1, "a", value)
                page = self.see(200, "/me/value?key=a").body
                self.assertEqual((is_editable, not is_editable), (b"<textarea" in page, b"with /set: a form" in page))
                self.assertRegex(page, b'<(p|pre) class="card')
                if is_editable:
                    self.edit("a")
                    self.assertEqual(value.encode(), self.get("a"))

    def test_passwd_asks_for_the_current_password(self) -> None:
        for current, password in (("wrong", "another one"), ("", "another one"), (PASSWORDS["bob"], "short")):
            answer = self.send(400, "/me/", "bob", action="passwd", current=current, password=password)
            self.assertEqual([None], Page(answer).values(name="current"))
            self.check(200, "GET", "/list", user="bob")
        self.send(400, "/me/", "bob", action="passwd", password="a password")
        self.assertIn("until you close all its windows", self.page("/me/password", "bob").text)
        changed = {"current": PASSWORDS["bob"], "password": "another one"}
        self.send(303, "/me/", "bob", location="password?done=NOW", action="passwd", **changed)
        self.see(401, "/me/", "bob")
        self.see(200, "/me/", basic("bob", "another one"))

    def test_a_token_is_shown_once_and_works_until_it_is_deleted(self) -> None:
        answer = self.send(200, "/me/", action="addtoken", label="hall", readonly="1", prefix="hall/")
        (token,) = set(re.findall(r"kv_[A-Za-z0-9_-]{43}", answer.body.decode()))
        for target, status in (("/get?key=hall/a", 404), ("/set?key=hall/a&value=1", 403), ("/get?key=b", 403)):
            self.check(status, "GET", target, user="Bearer " + token)
        wait_until(lambda: self.store.tokens("alice")[0].last_used is not None)
        answer = self.see(200, "/me/tokens")
        self.assertNotIn(token, answer.body.decode())
        self.assertEqual(["hall", "read hall/*", "today"], Page(answer).rows[1][:3])
        answer = self.send(404, "/me/", "bob", action="deltoken", id="1")
        self.assertIn("no such token or hook; reload the page", answer.body.decode())
        self.send(303, "/me/", location="tokens?done=NOW", action="deltoken", id="1")
        self.check(401, "GET", "/list", user="Bearer " + token)
        for fields in ({"label": "x" * 65}, {"label": "a\nb"}, {"prefix": "x" * 513}, {"prefix": "\0"}):
            self.send(400, "/me/", action="addtoken", **fields)
        self.assertEqual([], self.store.tokens("alice"))

    def test_a_form_for_a_token_adds_only_one(self) -> None:
        (once,) = self.page("/me/tokens").values(name="once")
        form: dict[str, Any] = {"action": "addtoken", "label": "typed", "prefix": "hall/", "once": once}
        self.send(400, "/me/", **{**form, "label": "x" * 65})
        self.send(200, "/me/", **form)
        for _ in range(2):
            answer = self.send(409, "/me/", **form)
            self.assertIn("press again to add one more", answer.body.decode())
            self.assertEqual(["typed"], Page(answer).values(name="label"))
            self.assertEqual(["typed"], [row[0] for row in Page(answer).rows[1:]])
        self.send(200, "/me/", "bob", **form)
        self.send(303, "/me/", action="deltoken", id="1")
        for stale in (once, "", "x", "9" * 30):
            self.send(409, "/me/", **{**form, "once": stale})
        (fresh,) = Page(self.send(409, "/me/", **form)).values(name="once")
        self.send(200, "/me/", **{**form, "once": fresh})
        for _ in range(2):  # as programs do
            self.send(200, "/me/", action="addtoken")
        forms = [each["action"] for tag, each in self.page("/me/tokens").elements if tag == "form"]
        self.assertEqual(["./", "./?id=3", "./?id=4", "./?id=5"], forms)

    def test_a_new_token_comes_with_a_command_and_a_header_to_copy(self) -> None:
        for prefix, key in (("", "door"), ("'; rm x #", "'; rm x #"), ("hall/", "hall/ü &")):
            if key == "hall/ü &":
                self.store.set_value(1, key, "1")
            body = self.send(200, "/me/", action="addtoken", prefix=prefix).body.decode()
            token, header, command = map(html.unescape, re.findall("<pre>(.*?)</pre>", body, re.DOTALL))
            self.assertEqual("Authorization: Bearer " + token, header)
            *words, address = shlex.split(command)
            self.assertEqual(["curl", "-H", header], words)
            host, query = f"http://127.0.0.1:{self.port}", address.partition("?")[2]
            self.assertEqual(f"{host}/get?{query}", address)
            self.assertEqual([("key", key)], urllib.parse.parse_qsl(query))
            self.check(404 if key != "hall/ü &" else 200, "GET", address.removeprefix(host), user="Bearer " + token)

    def test_pages_are_small_and_quick(self) -> None:
        self.store.begin()
        for user_id, number in itertools.product((1, 2), range(1000)):
            key, value = f"sensor{number:04}".ljust(25, "ж"), f"{number} ".ljust(80, "é")  # the key has 40 bytes
            self.store.set_value(user_id, key, value, time.time() + 1e6)
        for number in range(98):
            self.store.add_user(f"a user with a long name {number:03}", "", False)
        for number in range(kvserver.TOKENS_MAX):
            label, prefix = f"motion sensor {number} in the hall", f"hall/motion {number}/"
            self.store.add_token("alice", kvserver.hash_token(label), label, False, prefix)
        self.store.commit([])
        targets = ("/me/", "/me/tokens", "/admin/", "/admin/user?username=bob", "/me/?search=sensor")
        for target in targets:
            seconds = []
            for _ in range(11):
                # There is no disk to wait for: a quiet machine takes as long as the computing time.
                begun = time.process_time()
                answer = self.see(200, target)
                seconds.append(time.process_time() - begun)
                self.assertLess(len(answer.body), 60_000, target)
            if sys.gettrace() is None:  # measuring coverage takes several times as long
                self.assertLess(statistics.median(seconds), 0.020, target)


class ValuePages(PageCase):
    """The page of one value."""

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(time.tzset)
        self.enterContext(mock.patch.dict(os.environ, TZ="XYZ-2"))
        time.tzset()
        self.store.transact(lambda store: store.keep_history(60))

    def value_page(self, key: str, **parameters: str) -> str:
        return self.see(200, url("/me/value", key=key, **parameters)).body.decode()

    def test_a_value_is_there_to_be_read(self) -> None:
        most = kvserver.VALUE_READ_CHARACTERS_MAX
        for value, shown in (
            *(("21.5", '<p class="card big">21.5</p>'), ("x" * 24, f'<p class="card big">{"x" * 24}</p>')),
            *(("x" * 25, f'<pre class="card">\n{"x" * 25}</pre>'), ("a\nb\t", '<pre class="card">\na\nb\t</pre>')),
            *(("", "empty</span></p>"), (" a ", ">␣a␣<"), ("\u202e" + "a" * 24, "\n\ufffd" + "a" * 24)),
            (
                '{"a":[1.10,2e3,{}],"a":"\\u00e9 ,:{"}',
                '\n{\n  "a": [\n    1.10,\n    2e3,\n    {}\n  ],\n  "a": "\\u00e9 ,:{"\n}<',
            ),
            *(("[12345678901234567890]", "\n[\n  12345678901234567890\n]<"), (" [ ]\n", ">[ ]<"), ("[1,]", ">[1,]<")),
            *(
                ("[" * 100 + "]" * 100, "\n" + " " * 198 + "[]\n"),
                ("[" * 101 + "]" * 101, "\n" + "[" * 101 + "]" * 101),
            ),
            *(("[" + "1," * 50 + "1]", "  1,\n  1\n]<"), ("x" * most, "x" * most + "</pre>")),
            (
                "é" * (most + 1),
                f'\n{"é" * most}</pre><p class="soft">This is only the beginning: it has {most + 1} characters.',
            ),
            ("[" + "1," * 9999 + "1]", "\n[1,1,1"),
            ("[" + "1," * 9998 + "1]", "\n[\n  1,\n  1,\n"),
            ("[" + "1," * 9998 + "1]", "beginning: it has 19999 characters."),
        ):
            self.store.set_value(1, "a", value)
            reading = self.value_page("a").partition('<div class="bar">')[0]
            self.assertIn(shown.replace('"', "&quot;") if value[:1] in "{[" else shown, reading, value[:50])

    def test_a_page_tells_when_a_value_changed_and_expires(self) -> None:
        self.store.set_value(1, "a", "1")
        self.store.set_value(1, "b", "1", ttl=600)
        changed = 1_800_000_000.5
        self.store._execute("UPDATE pair SET updated = ?", changed)
        with mock.patch.object(time, "time", return_value=changed + 185):
            page = self.value_page("a")
        times = '<time datetime="2027-01-15 08:00:00Z" title="2027-01-15 08:00:00Z">3 min ago</time>'
        self.assertIn(f"Changed {times} (2027-01-15 10:00:00 XYZ).", page)
        self.assertNotIn("Expires <", page)
        self.assertRegex(self.value_page("b"), r"Expires <time [^>]*>in 10 min</time> \(20[-0-9]+ [0-9:]+ XYZ\)\.")

    def press(self, key: str, label: str, status: int = 303) -> Answer:
        """Press a button of a value's page as a browser does."""
        target = url("/me/value", key=key)
        for action, fields in re.findall(
            r'<form method="post" action="([^"]*)"[^>]*>(.*?)</form>', self.value_page(key), re.DOTALL
        ):
            buttons = re.findall(r"<button([^>]*)>([^<]*)</button>", fields)
            names = "".join([*re.findall("<input[^>]*>", fields), *(each for each, text in buttons if text == label)])
            if label in [text for _, text in buttons]:
                sent = dict(
                    re.findall(r'name="([^"]*)" value="([^"]*)"', html.unescape(names.replace("&quot;", "%22")))
                )
                sent = {name: text.replace("%22", '"') for name, text in sent.items()}
                return self.send(status, urllib.parse.urljoin(target, html.unescape(action)), **sent)
        raise AssertionError(f"there is no button {label}")

    def test_buttons_fit_the_value(self) -> None:
        words = {"on": "off", "open": "closed", "true": "false"}
        cases = {(a, f"Switch to {b}", b) for a, b in [*words.items(), *((b, a) for a, b in words.items())]}
        steps = {("9", "−1", "8"), ("9", "+1", "10"), ("-0.5", "+1", "0.5"), ("9" * 99, "+1", "1" + "0" * 99)}
        for value, label, then in cases | steps:
            key = "a b/é&"
            self.store.set_value(1, key, value, time.time() + 100)
            location = self.press(key, label).headers["location"]
            self.assertRegex(location, r"\Avalue\?key=a%20b/%C3%A9%26&done=\d+\Z")
            self.assertEqual(then.encode(), self.get(key))
            self.assertIsNotNone(getattr(self.store.pair(1, key), "expires", None), "a button keeps the expiry")
        for value in ("On", "on ", "+1", "1e3", "9" * 101, "", "ajar"):
            self.store.set_value(1, "b", value)
            self.assertNotRegex(self.value_page("b"), r"<button[^>]*>(Switch|[−+])", value)

    def test_a_button_does_what_it_says_or_nothing(self) -> None:
        self.store.set_value(1, "door", "open")
        with mock.patch.object(self, "value_page", return_value=self.value_page("door")):
            self.store.set_value(1, "door", "closed")
            answer = self.press("door", "Switch to closed", 409)
        text = Page(answer).text
        self.assertRegex(text, "The value was changed to closed (just now|1 s ago); nothing was done\\.")
        self.assertEqual(b"closed", self.get("door"))
        self.assertIn("Switch to open", text)

    def test_programs_increment_and_toggle_too(self) -> None:
        for status, fields, then in (
            *((303, {"action": "incr"}, "1"), (303, {"action": "incr", "by": "-0.5"}, "0.5")),
            *((400, {"action": "incr", "by": "+1"}, "0.5"), (409, {"action": "toggle"}, "0.5")),
            *((303, {"action": "incr", "ttl": "600", "by": "0"}, "0.5"), (400, {"action": "incr", "ttl": "x"}, "0.5")),
        ):
            self.send(status, "/me/", key="a", **fields)
            self.assertEqual(then, self.pairs().get("a"), fields)
        for old, new in ((None, "on"), ("off", "on"), ("closed", "open"), ("true", "false")):
            self.store.set_value(1, "b", old) if old else None
            self.send(303, "/me/", action="toggle", key="b", ttl="")
            self.assertEqual(new, self.pairs()["b"])
        connection = self.new_connection()
        for old, new in (("open", "closed"), ("", "on")):  # equal requests
            self.store.set_value(1, "c", old) if old else self.store.delete_pair(1, "c")
            self.check(303, "POST", "/me/?action=toggle&key=c", connection=connection)
            self.assertEqual(new, self.pairs()["c"])
        self.store.delete_pair(1, "c")
        self.send(409, "/me/", action="incr", key="b")
        for action, key in itertools.product(("incr", "toggle"), ("", "k" * 513, "\0")):
            self.send(400, "/me/", action=action, key=key)
        self.assertEqual({"a": "0.5", "b": "false"}, self.pairs())

    def test_the_last_50_changes_are_listed(self) -> None:
        self.store.set_value(1, "a", "é" * 41)
        self.store.delete_pair(1, "a")
        self.store.set_value(1, "a", "")
        self.assertIn("<h2>History</h2><table", self.value_page("a"))
        rows = Page(self.see(200, "/me/value?key=a")).rows
        self.assertEqual(["Value", "empty", "deleted", "é" * 40 + "…"], [row[1] for row in rows])
        for number in range(7):
            self.store.set_value(1, "a", f"<{number}>")
        self.assertNotIn("The last 10 changes", self.value_page("a"))
        for number in range(7, 60):
            self.store.set_value(1, "a", f"<{number}>")
        page = Page(self.see(200, "/me/value?key=a"))
        self.assertEqual([f"<{number}>" for number in range(59, 9, -1)], [row[1] for row in page.rows[1:]])
        self.assertIn("The last 50 changes", page.text)
        self.assertNotIn("<svg", self.value_page("a"))
        self.store.transact(lambda store: store.keep_history(0))
        self.assertNotIn("History", self.value_page("a"))

    def chart(self, *changes: tuple[float, str | None], later: float = 1) -> str:
        """Return the chart of a value with changes at some seconds, one second after the last one, or later."""
        self.store._execute("DELETE FROM history")
        self.store.set_value(1, "a", "text")
        self.store._execute("DELETE FROM history")
        for number, (moment, value) in enumerate(changes):
            row = (1, "a", number, 1e9 + moment, None if value is None else value.encode())
            self.store._execute("INSERT INTO history VALUES (?, ?, ?, ?, ?)", *row)
        with mock.patch.object(time, "time", return_value=1e9 + changes[-1][0] + later):
            page = self.value_page("a")
        return re.sub(r"(?s).*<figure[^>]*>|</figure>.*", "", page) if "<figure" in page else ""

    def test_numbers_have_a_chart(self) -> None:
        chart = self.chart((0, "10"), (1, "-2.50"), (2, None), (2.5, "ajar"), (3, "20"))
        # From 50 to 292 in 4 seconds, and from 120 for the minimum up to 10 for the maximum.
        self.assertIn('<path class="line" d="M50.0 58.9H110.5V120.0H171.0M231.5 10.0H292.0"', chart)
        first = "2001-09-09 03:46 XYZ"  # in the server's zone
        summary = "Minimum -2.50, maximum 20, last 20."
        self.assertIn(f'role="img" aria-label="A chart of all numbers since {first}. {summary}"', chart)
        self.assertIn(f'<figcaption class="soft">{summary}</figcaption>', chart)
        texts = re.findall("<text[^>]*>([^<]*)</text>", chart)
        self.assertEqual(sorted(["20", "20", "-2.50", first, "now"]), sorted(texts))
        self.assertNotIn("style=", chart)
        self.assertIn("Minimum 1234567890.901,", self.chart((0, "1234567890.905"), (1, "1234567890.901")))
        self.assertIn("Minimum 7, maximum 7, last 7.", self.chart((0, "7"), (0, "7"), (0, "7"), later=0))
        for later in (1, -5):  # clocks may be set back
            chart = self.chart((5, "1e3"), (4, "5"), (3, "-3"), (9, None), later=later)
            self.assertIn("last -3.", chart)
            (line,) = re.findall('class="line" d="([^"]*)"', chart)
            self.assertTrue(all(26 <= float(x) <= 292 for x in re.findall("[MH]([-0-9.]+)", line)), line)
        huge = "9" * 100
        for numbers in ((huge, "-" + huge), ("0." + "0" * 98 + "1", "0")):
            self.assertNotRegex(self.chart(*enumerate(numbers)), r"nan|inf\b|[\" ]-\d{3}")
        for changes in ([(0, "1")], [(0, "1"), (1, "open")], [(0, "1"), (1, None), (2, "9" * 101)]):
            self.assertEqual("", self.chart(*changes))

    def commands(self, key: str) -> dict[str, list[str]]:
        """Return the words of each command on a value's page as a shell splits them, and the URL."""
        page = self.value_page(key)
        texts = [html.unescape(each) for each in re.findall(r"(?s)<code>(.*?)</code>", page)]
        self.assertEqual(4, len(texts))
        code, output, _ = run("curl() { printf '%s\\0' \"$@\"; echo; }\n" + "\n".join(texts[1:]))
        lines = [line.rstrip("\0").split("\0") for line in output.split("\0\n")[:-1]]
        self.assertEqual((0, 3), (code, len(lines)))
        return dict(zip(("get", "set", "wait"), lines)) | {"url": [texts[0]]}

    def test_commands_to_copy_reach_the_value(self) -> None:
        base = f"http://127.0.0.1:{self.port}"
        long, odd = "x" * 41, 'it\'s "$HOME" `a` @b'
        for key, value in (("'; rm x #", odd), ("a b/é&?#%+{}[]*", "é"), ("-x\ny", long), ("e", ""), ("c", "\x1b[31m")):
            self.store.set_value(1, key, value)
            commands = self.commands(key)
            get_url = f"{base}/get?key={urllib.parse.quote(key, safe='')}"
            self.assertEqual((["-u", "alice", get_url], [get_url]), (commands["get"], commands["url"]))
            *options, set_url = commands["set"]
            is_short = value in (odd, "é", "")
            self.assertEqual(["-u", "alice", "--data-urlencode", f"value={value if is_short else 'VALUE'}"], options)
            self.assertEqual(get_url.replace("/get?", "/set?"), set_url)
            *options, wait_url = commands["wait"]
            header = [] if is_short else ["-H", f"If-None-Match: {kvserver.entity_tag(value.encode())}"]
            self.assertEqual(["-u", "alice", *header], options)
            headers = dict([header[1].split(": ")] if header else [])
            self.check(200, "GET", get_url.removeprefix(base))
            self.store.set_value(1, key, "changed")
            self.assertEqual(b"changed", self.check(200, "GET", wait_url.removeprefix(base), headers=headers).body)
            self.assertIn("&wait=60", wait_url)
            self.send(200, set_url.removeprefix(base), value=value)
            self.assertEqual(value.encode(), self.get(key))
        self.store.add_user("o'neil x", kvserver.hash_password("a password"), False)
        self.store.set_value(3, "a", "1")
        page = Page(self.see(200, "/iotpersistenceapi/me/value?key=a", basic("o'neil x", "a password")))
        self.assertIn(f"curl -u 'o'\"'\"'neil x' '{base}/iotpersistenceapi/get?key=a'", page.text)

    def test_a_page_that_reloads_itself_has_no_form_to_type_in(self) -> None:
        self.store.set_value(1, "a", "on")
        live = self.page("/me/value?key=a").links["Live"]
        self.assertEqual("value?key=a&refresh=10", live)
        answer = self.see(200, "/me/" + live)
        page = Page(answer)
        self.assertEqual(("10", "value?key=a"), (answer.headers["refresh"], page.links["Stop"]))
        self.assertIn("This page reloads every 10 s.", page.text)
        buttons = re.findall('<button[^>]* value="([^"]*)"', answer.body.decode())
        self.assertEqual((["toggle"], False), (buttons, "<textarea" in answer.body.decode()))
        for target in ("/me/value?key=a&refresh=9", "/me/value?key=a&refresh="):
            self.assertNotIn("refresh", self.see(400, target).headers)

    def test_a_missing_value_leads_back_or_is_added(self) -> None:
        self.store.set_value(1, "hall/lamp", "on")
        self.store.delete_pair(1, "hall/lamp")
        for target, link in (("/me/value?key=hall/lamp", None), ("/me/value?key=hall/lamp&refresh=10", "Stop")):
            answer = self.see(404, target)
            page = Page(answer)
            self.assertEqual("10" if link else None, answer.headers.get("refresh"), "the value may come again")
            self.assertEqual(("./", "./?folder=hall/"), (page.links["All values"], page.links["hall/"]))
            self.assertTrue(page.has_alert() and "Live" not in page.links)
            self.assertEqual((link is None, link in page.links), (b">Add</summary>" in answer.body, link is not None))
        self.assertEqual(b"there is no such key", self.check(404, "GET", target).body[:20])
        self.send(303, "/me/?key=hall/lamp&page=value", action="set", value="off", etag="", ttl="")
        self.assertEqual({"hall/lamp": "off"}, self.pairs())

    def test_a_value_is_deleted_after_a_confirmation(self) -> None:
        self.store.set_value(1, "hall//lamp", "on")
        self.assertRegex(self.value_page("hall//lamp"), '<summary class="bad"[^>]*>Delete…</summary>')
        answer = self.press("hall//lamp", "Delete hall//lamp")
        self.assertRegex(answer.headers["location"], r"\A\./\?folder=hall//&done=\d+\Z")
        self.assertEqual({}, self.pairs())
        self.send(404, "/me/", action="del", key="hall//lamp", page="value")

    def test_the_path_of_earlier_versions_leads_to_the_page(self) -> None:
        for prefix, user in itertools.product(("", "/iotpersistenceapi"), (None, "alice")):
            answer = self.see(301, prefix + "/me/state?key=a%20b/%C3%A9%26", user)
            self.assertEqual("value?key=a%20b/%C3%A9%26", answer.headers["location"])
            self.assertNotIn("www-authenticate", answer.headers)
        self.see(400, "/me/state")


def find_driver() -> tuple[str, str] | None:
    """Return the paths of chromedriver and of a Chromium, if this machine has both."""
    driver = shutil.which("chromedriver")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return (driver, browser) if driver and browser else None


class WebDriver:
    """A browser without a window, spoken to in the W3C's WebDriver protocol: JSON over HTTP."""

    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's reference (WebDriver, section 12)

    def __init__(self) -> None:
        driver, browser = find_driver() or ("chromedriver", "chromium")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        matches = (re.search(r"successfully on port (\d+)", line) for line in self._process.stdout)
        port = next(match[1] for match in matches if match)
        self._url = f"http://127.0.0.1:{port}/session"
        arguments = "--headless=new --disable-gpu --disable-extensions --disable-dev-shm-usage --no-first-run"
        # Chromium's own sandbox does not work for root; it would protect us from our own pages.
        arguments += " --disable-background-networking" + " --no-sandbox" * (os.getuid() == 0)
        options = {"args": arguments.split(), "binary": browser}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self._url += "/" + self.send("", capabilities={"alwaysMatch": wanted})["sessionId"]
        self.window = self.get("/window")

    def _request(self, method: str, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with self._opener.open(request, timeout=WAIT_SECONDS) as answer:
            return json.load(answer)["value"]

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def send(self, path: str, **arguments: Any) -> Any:
        """Send a command and return its outcome; raise HTTPError if the browser fails to do it."""
        return self._request("POST", path, json.dumps(arguments).encode())

    def close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._request("DELETE", "")
        self._process.terminate()
        self._process.communicate()

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the result of the body of a JavaScript function."""
        return self.send("/execute/sync", script=script, args=arguments)

    def command(self, name: str, **parameters: Any) -> Any:
        return self.send("/goog/cdp/execute", cmd=name, params=parameters)

    def _find(self, selector: str) -> str:
        """Return the path of the first element that a CSS selector selects."""
        return f"/element/{self.send('/element', using='css selector', value=selector)[self.ELEMENT]}"

    def click(self, selector: str) -> None:
        self.send(self._find(selector) + "/click")

    def follow(self, selector: str) -> None:
        """Click on an element that leads to another page, and wait for that page."""
        self.run("window.isOld = true")
        self.click(selector)
        wait_until(lambda: self.run("return !window.isOld && document.readyState == 'complete'"))

    def type(self, selector: str, text: str) -> None:
        path = self._find(selector)
        self.send(path + "/clear")
        self.send(path + "/value", text=text)

    def text(self, selector: str = "body") -> str:
        return str(self.get(self._find(selector) + "/text"))

    def log(self, kind: str) -> list[Any]:
        return list(self.send("/se/log", type=kind))


@unittest.skipUnless(find_driver() or "CI" in os.environ, "on Debian: apt-get install chromium chromium-driver")
class Browser(PageCase):
    log_requests = True
    browser: WebDriver

    @classmethod
    def setUpClass(cls) -> None:
        cls.browser = WebDriver()
        cls.addClassCleanup(cls.browser.close)
        cls.enterClassContext(mock.patch.object(http.server.SimpleHTTPRequestHandler, "log_message"))

    def setUp(self) -> None:
        super().setUp()
        for kind in ("browser", "performance"):
            self.browser.log(kind)

    def open(self, path: str, user: str = "", host: str = "127.0.0.1") -> None:
        """Load a page, as a user the first time: a browser remembers name and password for each host."""
        login = f"{user}:{urllib.parse.quote(PASSWORDS[user])}@" if user else ""
        self.browser.send("/url", url=f"http://{login}{host}:{self.port}{path}")

    def open_window(self, address: str) -> None:
        """Load a page in another window. In ours, a frame that asks for a password would hold up everything."""
        self.browser.run("window.open(arguments[0])", address)

    def close_windows(self) -> None:
        for window in self.browser.get("/window/handles"):
            if window != self.browser.window:
                self.browser.command("Target.closeTarget", targetId=window)

    def serve_elsewhere(self, pages: Mapping[str, str]) -> int:
        """Serve the pages of another origin, by name, and return its port."""
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        for name, text in pages.items():
            (folder / name).write_text(text)
        elsewhere = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        server = self.enterContext(http.server.ThreadingHTTPServer(("127.0.0.1", 0), elsewhere))
        self.addCleanup(join, in_threads(server.serve_forever, [(0.01,)]))
        self.addCleanup(server.shutdown)
        return int(server.server_address[1])

    def assert_quiet(self) -> None:
        """Check that the browser asks nobody else, and complains of nothing but the refusals of forms."""
        entries = [entry["message"] for entry in self.browser.log("browser") if entry["level"] != "DEBUG"]
        refusal = re.compile(r"(?!.*/icon\.svg).*status of 4(00|04|09)")
        self.assertEqual([], [entry for entry in entries if not refusal.match(entry)])
        events = (json.loads(entry["message"])["message"] for entry in self.browser.log("performance"))
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        hosts = {urllib.parse.urlsplit(url).netloc.rpartition("@")[2] for url in urls if not url.startswith("about:")}
        self.assertLessEqual(hosts, {f"{host}:{self.port}" for host in ("127.0.0.1", "localhost")})

    def test_an_admin_adds_a_user_who_logs_in_and_is_deleted(self) -> None:
        browser = self.browser
        self.open("/iotpersistenceapi/admin", "alice")
        browser.click("summary")
        browser.type("[name=username]", "carol")
        browser.type("[name=password]", "carol's password")
        browser.follow("details[open] button")
        self.assertEqual(["alice", "bob", "carol"], self.names())
        self.enterContext(mock.patch.dict(PASSWORDS, carol="carol's password"))
        self.open("/iotpersistenceapi/me/", "carol", "localhost")
        browser.click("summary.main")
        browser.type("[name=key]", "door/1 é")
        browser.type("textarea", "open\nwide")
        browser.follow("form:has(textarea) button")
        self.assertEqual({"door/1 é": "open\nwide"}, self.pairs("carol"))
        browser.follow("tbody a")
        browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
        browser.type("textarea", "shut")
        browser.follow("form:has(textarea) button")
        self.assertEqual({"door/1 é": "shut"}, self.pairs("carol"))
        self.assertEqual("The change is made.", browser.text("[role=status]"))
        browser.click("summary.bad")
        browser.follow("details[open] button.bad")
        self.assertEqual({}, self.pairs("carol"))
        self.open("/iotpersistenceapi/admin/")
        browser.follow("[href='user?username=carol']")
        browser.follow("a.bad")
        browser.follow("button.bad")
        self.assertEqual(["alice", "bob"], self.names())
        self.assertRegex(browser.get("/url"), r"/iotpersistenceapi/admin/\?done=\d+\Z")
        self.assertEqual("The change is made.", browser.text("[role=status]"))
        self.assert_quiet()

    def test_a_token_is_added_once_even_if_its_page_is_loaded_again(self) -> None:
        browser = self.browser
        self.open("/me/tokens", "alice")
        browser.click("summary.main")
        browser.type("[name=label]", "hall")
        browser.follow("details[open] button")
        token = browser.text("pre")
        browser.command("Page.reload")
        wait_until(lambda: browser.get("/url").endswith("/me/") and token not in browser.text())
        self.assertIn("a token was added since this form was opened", browser.text("[role=alert]"))
        self.assertEqual(["hall"], [each.label for each in self.store.tokens("alice")])

    def test_a_form_saved_unchanged_leaves_the_value_unchanged(self) -> None:
        for key, value in (
            *(("a\n+&é<", ""), ("plain", "\n")),
            ("\r\n", "\n\na</textarea>&lt;\x01\x0b\x0c\x1b\x7f\x85\u2028\ufeff😀é+%41&a=b \t\n"),
        ):
            self.store.set_value(1, key, value)
            self.open(url("/me/value", key=key), "alice")
            self.browser.click("summary")
            self.browser.follow("label ~ button")
            self.assertIn("The change is made.", self.browser.text("[role=status]"))
            self.assertEqual(value, self.pairs()[key])
        self.assertEqual({"plain", "a\n+&é<", "\r\n"}, set(self.pairs()))
        self.store.set_value(1, "plain", "x  y")
        self.open("/me/value?key=plain")
        self.assertEqual(("x  y", True), (self.browser.text(".big"), "'value=x  y'" in self.browser.text("dl")))

    def test_another_site_cannot_change_anything(self) -> None:
        self.store.set_value(1, "a", "1")
        ours = f"http://127.0.0.1:{self.port}"
        submit = "<script>document.forms[0].submit()</script>"
        pages = {
            "state.html": f"""<form method=post action="{ours}/me/"><input name=action value=set>
                <input name=key value=a><input name=value value=evil></form>{submit}""",
            "flask.html": f"""<form method=post action="{ours}/admin?action=deluser">
                <input name=username value=bob></form>{submit}""",
            "all.html": f"""<img src="{ours}/set?key=a&amp;value=evil"><iframe src="/state.html"></iframe>
                <script>fetch("{ours}/me/", {{method: "POST", mode: "no-cors", credentials: "include",
                    headers: {{"Content-Type": "{kvserver.FORM}"}}, body: "action=del&key=a"}});</script>""",
        }
        for path in ("/me/", "/admin/"):
            self.open(path, "alice")
        self.addCleanup(self.close_windows)
        port = self.serve_elsewhere(pages)
        lines = (
            # The browser sends the form of a whole page with the password, and the server refuses it.
            *("POST path='/me/' key='' status=403", "POST path='/admin' key='' status=403"),
            # It sends the requests for a part of a page without it.
            *("GET path='/set' key='' status=40[13]", "(?s)(?:POST path='/me/' .*status=40[13].*){3}"),
        )
        for host in ("127.0.0.1", "localhost"):  # the same site with another origin, and another site
            self.log.lines.clear()
            for name in pages:
                self.open_window(f"http://{host}:{port}/{name}")
            wait_until(lambda: all(re.search(line, self.log.text()) for line in lines))
        self.assertEqual(({"a": "1"}, ["alice", "bob"]), (self.pairs(), self.names()))

    def test_a_page_of_another_origin_uses_a_token_but_never_the_remembered_password(self) -> None:
        self.store.set_value(1, "a", "1")
        token = kvserver.make_token()
        self.store.add_token("alice", kvserver.hash_token(token), "", False, "")
        bearer, password = {"Authorization": f"Bearer {token}"}, {"Authorization": basic("alice", PASSWORDS["alice"])}
        port = self.serve_elsewhere({"page.html": "<title>Another origin</title>"})
        script = """const answer = await fetch(arguments[0], arguments[1]).catch(() => null);
            return answer && [answer.status, await answer.text(), answer.headers.has("ETag")]"""
        stream = """await fetch(arguments[0] + "/set?key=door", {method: "POST", body: "open", headers: arguments[1]});
            const response = await fetch(arguments[0] + "/events", {headers: arguments[1]});
            const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
            let text = "";
            const until = async end => { while (!text.includes(end)) text += (await reader.read()).value; };
            await until("event: ready");
            await fetch(arguments[0] + "/set?key=door&value=shut", {headers: arguments[1]});
            await until("shut");
            return text"""
        source = """const source = new EventSource(arguments[0], {withCredentials: true});
            const type = await new Promise(done => source.onopen = source.onerror = event => done(event.type));
            source.close();
            return type"""

        def fetch(path: str, **options: Any) -> Any:
            return self.browser.run(script, address + path, options)

        address = f"http://127.0.0.1:{self.port}"
        self.open("/list", "alice")
        self.assertEqual([200, "1", True], fetch("/kv/a"))
        self.assertEqual("open", self.browser.run(source, address + "/events"))
        for host, is_sent in (("127.0.0.1", True), ("localhost", False)):  # of the same site, and of another one
            self.browser.send("/url", url=f"http://{host}:{port}/page.html")
            self.assertIsNone(fetch("/kv/a", headers=bearer), "this origin is not allowed yet")
            self.server.cors_origins = kvserver.parse_origins(f"HTTP://{host}:{port}")
            self.assertEqual([200, "1", True], fetch("/kv/a", headers=bearer))
            self.assertEqual([200, "Success", False], fetch("/set?key=b", method="POST", body="2", headers=bearer))
            self.assertEqual(412, fetch("/kv/b", method="PUT", body="3", headers={**bearer, "If-Match": '"x"'})[0])
            self.assertEqual(200, fetch("/kv/b", method="DELETE", headers=bearer)[0])
            self.assertEqual(404, fetch("/kv/b", headers=bearer)[0])
            text = self.browser.run(stream, address, bearer)
            self.assertRegex(text, r'(?s)"value": "open".*\nevent: ready\n.*\nevent: set\n[^\n]*"value": "shut"')
            self.assertEqual([200, "1", True], fetch("/kv/a", headers=password))
            self.assertEqual(403, fetch("/set?key=a&value=2", headers=password)[0])
            self.assertEqual(401, fetch("/kv/a")[0])
            self.assertEqual("error", self.browser.run(source, address + "/events"))
            self.log.lines.clear()
            for path in ("/kv/a", "/set?key=a&value=2", "/events"):
                self.assertIsNone(fetch(path, credentials="include"))
            answers = re.findall(r"path='(\S+)' .* status=(\d+)", self.log.text())
            statuses = ("200", "403", "200") if is_sent else ("401", "401", "401")
            self.assertEqual([*zip(("/kv/", "/set", "/events"), statuses)], answers)
        self.assertEqual({"a": "1", "door": "shut"}, self.pairs())

    def test_a_problem_of_a_form_is_in_view(self) -> None:
        for number in range(100):
            self.store.set_value(1, f"key {number}", "1")
        self.open("/me/", "alice")
        self.browser.click("summary")
        self.browser.type("[name=key]", "k" * 513)
        self.browser.type("textarea", "typed")
        self.browser.follow("form[method=post] button")
        script = """const box = document.querySelector("[role=alert]").getBoundingClientRect();
            return [box.top >= 0, box.bottom <= innerHeight, document.activeElement.getAttribute("role")]"""
        wait_until(lambda: self.browser.run(script) == [True, True, "alert"])
        self.assert_quiet()

    def test_the_keyboard_shows_where_it_is(self) -> None:
        self.open("/me/", "alice")
        script = """const style = getComputedStyle(document.activeElement);
            return [document.activeElement.localName, style.outlineStyle, parseFloat(style.outlineWidth) >= 2]"""
        elements = list[str]()
        for _ in range(10):
            for kind in ("keyDown", "keyUp"):
                self.browser.command(
                    "Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9
                )
            element, *outline = self.browser.run(script)
            self.assertEqual(["solid", True], outline, element)
            elements.append(element)
        self.assertEqual([*["a"] * 6, "summary", "input", "button", "a"], elements)

    def test_credentials_of_the_pages_are_kept_from_the_api(self) -> None:
        for path in ("/admin", "/me/"):
            self.open(path, "alice")
        self.addCleanup(self.close_windows)
        self.log.lines.clear()
        for path in ("/list", "/admin/"):
            self.open_window(f"http://127.0.0.1:{self.port}{path}")
        wait_until(lambda: all(f"path='{path}'" in self.log.text() for path in ("/list", "/admin/")))
        answers = set(re.findall(r"path='(\S+/|/list)' .*status=(\d+)", self.log.text()))
        self.assertEqual({("/list", "401"), ("/admin/", "200")}, answers)

    def test_pages_fit_narrow_screens_name_all_fields_and_have_contrast_in_light_and_dark(self) -> None:
        for name in ("a-user-with-a-name-that-is-as-long-as-it-can-be-which-is-64-chars", "w" * 64):
            self.store.add_user(name, "", True)
        self.store.transact(lambda store: store.keep_history(10))
        for text in ("k" * 500, "a key with many words " * 10, "ü"):
            self.store.set_value(1, text, text * 3, time.time() + 100)
        for number in ("-1.5", "12345678901234567890", "0.1"):
            self.store.set_value(1, "number", number)
        self.store.add_token("alice", b"1", "l" * 64, True, "p" * 100)
        origin = "http://" + "h" * 60 + "." + "h" * 60
        hook = ("w" * 64, "k" * 500, "v" * 500, "l" * 64, origin, "http://h/", "POST", "", None)
        hook_id = self.store.transact(lambda store: store.add_hook(*hook))
        self.store.note_try(hook_id, "the certificate was refused: " + "x" * 60, 0)
        contrast = """
            const light = text => { const c = text.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
                .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
                return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
            const back = e => { const c = getComputedStyle(e).backgroundColor;
                return c != "rgba(0, 0, 0, 0)" ? c : e.parentElement ? back(e.parentElement) : "rgb(255, 255, 255)"; };
            return [...document.querySelectorAll("body *")].filter(e => e.innerText || e.localName == "text").map(e => {
                const style = getComputedStyle(e);
                const [a, b] = [light(e.localName == "text" ? style.fill : style.color), light(back(e))];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML]; })"""
        unnamed = """return [...document.querySelectorAll("input, textarea")].filter(
            field => field.type != "hidden" && !field.hidden && !field.labels.length && !field.ariaLabel).length"""
        command = self.browser.command
        self.addCleanup(command, "Emulation.clearDeviceMetricsOverride")
        self.addCleanup(command, "Emulation.setEmulatedMedia", features=[])
        backgrounds = set()
        for target in (
            *("/", "/me/", "/admin/", "/admin/user?username=alice", "/admin/user?username=" + "w" * 64),
            *("/me/value?key=%C3%BC", "/me/value?key=" + "k" * 500, "/me/value?key=number", "/me/value?key=unknown"),
            *("/me/tokens", "/me/password", "/admin/hooks", "/admin/delete?username=" + "w" * 64),
        ):
            self.open(target, "alice" if target == "/me/" else "")
            self.assertEqual(0, self.browser.run(unnamed), target)
            self.assertEqual("en", self.browser.run("return document.documentElement.lang"))
            for width, scheme in ((320, "light"), (1280, "dark")):
                command(
                    "Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=False
                )
                command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                self.assertLessEqual(self.browser.run("return document.documentElement.scrollWidth"), width, target)
                for ratio, element in self.browser.run(contrast):
                    self.assertGreaterEqual(ratio, 4.5, element)  # WCAG 2.2, success criterion 1.4.3
                backgrounds.add(self.browser.run("return getComputedStyle(document.body).backgroundColor"))
        self.assertEqual(2, len(backgrounds))


def run(command: str | Sequence[str], **options: Any) -> tuple[int, str, str]:
    """Run a program, or a line of a shell; return exit code, standard output and standard error."""
    command = ["sh", "-c", command] if isinstance(command, str) else command
    options = {"capture_output": True, "encoding": "utf-8", "timeout": WAIT_SECONDS, **options}
    done = subprocess.run(command, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def program(code: str = "", **constants: float) -> list[str]:
    """Return a command that runs some code, and then the program with other constants and cheap scrypt."""
    changes = "".join(f"kvserver.{name} = {number}\n" for name, number in {"SCRYPT_COST_LOG2": 1, **constants}.items())
    return [sys.executable, "-c", f"import sys, threading, kvserver\n{code}{changes}sys.exit(kvserver.main())"]


CHEAP_PROGRAM = program()
NO_USERS = "there are no users; add one with: python3 kvserver.py adduser USER\n"
INSERT_PAIR = "INSERT INTO pair (user_id, key, value, updated, expires) VALUES (?, ?, ?, ?, ?)"


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Act as a user without rights, if this is root."""
    if os.geteuid() != 0:
        yield
        return
    "a".encode("idna")  # an import that the other user may not make
    os.setresuid(12345, 12345, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


class CommandCase(unittest.TestCase):
    """The command line: commands run in this process, and servers in processes or threads."""

    def setUp(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.database = str(self.folder / "test.db")
        given = os.environ.items()
        self.environment = {name: text for name, text in given if not re.match("(?i)kvserver_|.*_proxy$", name)}
        self.environment |= {
            "CURL_HOME": str(self.folder),
            "PYTHONPATH": os.path.dirname(PROGRAM),
            "KVSERVER_DB": self.database,
        }
        self.environment |= {"KVSERVER_HOST": "127.0.0.1", "KVSERVER_PORT": "0", "COLUMNS": "80"}

    def write(self, name: str, content: str | bytes) -> None:
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def sql(self, statement: str, *rows: Sequence[Any]) -> list[Any]:
        """Run a statement on the database, with each row of parameters if there are any; return its result."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            if not rows:
                return connection.execute(statement).fetchall()
            return connection.executemany(statement, rows).fetchall()

    def make_old_database(self, users: Sequence[tuple[Any, ...]], states: Sequence[tuple[Any, ...]] = ()) -> None:
        """Write the database of IoT Persistence Api as SQLAlchemy makes it."""
        self.write("database.db", "")
        with contextlib.closing(sqlite3.connect(self.folder / "database.db")) as connection, connection:
            connection.executescript(
                'CREATE TABLE user (name VARCHAR NOT NULL, "passwordHash" VARCHAR NOT NULL, "isAdmin" BOOLEAN NOT NULL,'
                ' PRIMARY KEY (name)); CREATE TABLE state ("key" VARCHAR NOT NULL, value VARCHAR NOT NULL, user VARCHAR'
                ' NOT NULL, PRIMARY KEY ("key", value), FOREIGN KEY (user) REFERENCES user (name))'
            )
            connection.executemany("INSERT INTO user VALUES (?, ?, ?)", users)
            connection.executemany("INSERT INTO state VALUES (?, ?, ?)", states)

    def pairs(self) -> dict[tuple[str, str], str]:
        """Return all values by user and key."""
        rows = self.sql("SELECT name, key, value FROM pair JOIN user ON user.id = user_id")
        return {(name, key): value for name, key, value in rows}

    def password_hash(self, name: str = "alice") -> str:
        return str(dict(self.sql("SELECT name, password_hash FROM user"))[name])

    @contextlib.contextmanager
    def in_this_process(self, environment: dict[str, str], **streams: IO[str]) -> Iterator[dict[int, Any]]:
        """Prepare a call of main, with cheap scrypt; give the signal handlers that it sets."""
        handlers: dict[int, Any] = {}
        with (
            mock.patch.dict(os.environ, {**self.environment, **environment}, clear=True),
            mock.patch.multiple(sys, **cast(Any, streams)),
            mock.patch.multiple(kvserver, SCRYPT_COST_LOG2=1, POLL_SECONDS=0.01),
            mock.patch.multiple(gc, freeze=mock.DEFAULT, set_threshold=mock.DEFAULT),
            warnings.catch_warnings(action="ignore", category=ResourceWarning),  # from garbage of other tests
            mock.patch("threading.stack_size"),
            mock.patch("os._exit", side_effect=AssertionError("the server has not ended in time")),
            mock.patch("signal.signal", handlers.__setitem__),
            contextlib.chdir(self.folder),
        ):
            yield handlers

    def run_program(self, *arguments: str, stdin: Any = "", **environment: str) -> tuple[int, str, str]:
        """Call main with text, bytes or a file as standard input; return exit code, standard output and error."""
        if isinstance(stdin, (str, bytes)):
            stdin = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin), "utf-8")
        output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with (
            self.in_this_process(environment, stdin=stdin, stdout=output, stderr=errors),
            contextlib.ExitStack() as stack,
        ):
            if "serve" in arguments:
                must_not_run = AssertionError("the server has started")
                stack.enter_context(mock.patch.object(kvserver.Server, "run", side_effect=must_not_run))
            try:
                code = kvserver.main(arguments)
            except SystemExit as end:
                code = cast(int, end.code)
        return code, output.buffer.getvalue().decode(), errors.buffer.getvalue().decode()

    def run_process(self, *arguments: str, stdin: str = "", **environment: str) -> tuple[int, str, str]:
        """Run the program in a process; return exit code, standard output and standard error."""
        environment = {**self.environment, **environment}
        return run([*CHEAP_PROGRAM, *arguments], input=stdin, cwd=self.folder, env=environment)

    def succeed(self, *arguments: str, **options: Any) -> str:
        """Check that the program exits with 0 and without an error; return its standard output."""
        code, output, errors = self.run_program(*arguments, **options)
        self.assertEqual((0, ""), (code, errors))
        return output

    def add_user(self, name: str, *arguments: str, **environment: str) -> None:
        """Add a user with the password "a password"."""
        self.succeed("adduser", name, "--password-stdin", *arguments, stdin="a password", **environment)

    def assert_fails(self, message: str, *arguments: str, code: int = 1, **options: Any) -> None:
        """Check that the program prints one line that contains message and no secret, and exits with a code."""
        with self.subTest(arguments=str(arguments)[:200]):
            exit_code, output, errors = self.run_program(*arguments, **options)
            self.assertEqual((code, ""), (exit_code, output), errors)
            self.assertRegex(errors, r"\Akvserver: [^\n]+\n\Z")
            self.assertIn(message, errors)
            self.assertNotIn("SECRET", errors)

    def started(self, output: IO[str], errors: Callable[[], str]) -> tuple[int, list[str]]:
        """Return the port of a server, and the lines that it printed, as soon as it listens."""
        lines: list[str] = []
        for line in output:
            lines.append(line.rstrip("\n"))
            if line.startswith("listening on "):
                return int(line.rpartition(":")[2]), lines
        raise AssertionError("the server has not started: " + errors())

    @contextlib.contextmanager
    def serving(
        self, *arguments: str, command: Sequence[str] = CHEAP_PROGRAM, **environment: str
    ) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
        """Run the server in a process; give that, the port and the printed lines."""
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": self.folder}
        environment = {**self.environment, **environment}
        with subprocess.Popen([*command, "serve", *arguments], env=environment, **options) as process:
            assert process.stdout and process.stderr
            try:
                yield process, *self.started(process.stdout, process.stderr.read)
            finally:
                process.kill()

    @contextlib.contextmanager
    def serving_here(self, *arguments: str, **environment: str) -> Iterator[tuple[int, list[str], io.StringIO]]:
        """Run the server in a thread until the block ends; give its port, the printed lines, and its log."""
        log = io.StringIO()
        output, stdout = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw"))

        def serve() -> int:
            with stdout:
                return kvserver.main(["serve", *arguments])

        with output, self.in_this_process(environment, stdin=io.StringIO(), stdout=stdout, stderr=log) as handlers:
            calls = in_threads(serve, [()])
            try:
                yield *self.started(output, log.getvalue), log
            finally:
                handlers.get(signal.SIGTERM, lambda: None)()
                self.assertEqual([0], join(calls))

    def stop(self, process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
        """Stop a server process, check that it exits with 0, and return its log."""
        process.send_signal(number)
        self.assertEqual(0, process.wait(WAIT_SECONDS))
        log = process.stderr.read() if process.stderr else ""
        self.assertNotIn("Traceback", log)
        return log

    def request(
        self, port: int, target: str, name: str = "alice", password: str = "a password", body: str = "", **headers: str
    ) -> tuple[int, bytes]:
        """Return status and body of the response to a GET, or to a POST of a body."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)) as connection:
            headers["Authorization"] = basic(name, password)
            connection.request("POST" if body else "GET", target, body or None, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def send(self, port: int, request_line: str = "", *fields: str) -> socket.socket:
        """Return a connection on which the head of a request was sent, or nothing."""
        connection = self.enterContext(socket.create_connection(("127.0.0.1", port), WAIT_SECONDS))
        head = (request_line, "Host: x", "Authorization: " + basic("alice", "a password"), *fields, "\r\n")
        connection.sendall("\r\n".join(head).encode() if request_line else b"")
        return connection

    def assert_curl_works(self, lines: Sequence[str]) -> None:
        """Check the line of curl that the first start prints."""
        if shutil.which("curl"):
            self.assertEqual((0, "Success"), run(lines[2], env=self.environment)[:2])


class UserCommands(CommandCase):
    """The commands that manage users and their tokens, and mistakes in these and in the commands for hooks."""

    def test_users_are_listed_in_columns(self) -> None:
        self.add_user("zoe")
        self.add_user("bob the second", "--admin")
        self.sql(INSERT_PAIR, *((1, str(number), "", 0, None) for number in range(12)))
        table = "USER            ROLE   VALUES\nbob the second  admin  0\nzoe             user   12\n"
        self.assertEqual(table, self.succeed("users"))

    def test_the_database_is_private(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        self.add_user("alice")
        with self.serving_here() as (port, _, _):
            self.assertEqual((200, b"{}"), self.request(port, "/list"))
            modes = {name: stat.S_IMODE(os.stat(self.folder / name).st_mode) for name in os.listdir(self.folder)}
        self.assertEqual(dict.fromkeys(("test.db", "test.db-lock", "test.db-shm", "test.db-wal"), 0o600), modes)

    def test_commands_count_at_once_while_the_server_runs(self) -> None:
        self.add_user("alice", "--admin")
        with self.serving() as (_, port, _):
            self.assertEqual(200, self.request(port, "/set?key=a&value=1")[0])
            self.add_user("bob")
            self.assertEqual(200, self.request(port, "/set?key=a&value=2", "bob")[0])
            output = self.succeed("passwd", "bob", "--password-stdin", stdin="another password")
            self.assertEqual("set the password of bob; tokens keep working\n", output)
            self.assertEqual(401, self.request(port, "/list", "bob")[0])
            self.assertEqual((200, b'{"a":"2"}'), self.request(port, "/list", "bob", "another password"))
            output = self.succeed("deluser", "bob", "--yes")
            self.assertEqual("deleted the user bob and all they have (values: 1, tokens: 0, hooks: 0)\n", output)
            self.assertEqual(401, self.request(port, "/list", "bob", "another password")[0])
            self.add_user("bob")
            self.assertEqual((200, b"{}"), self.request(port, "/list", "bob"))
            self.assertEqual((200, b'{"a":"1"}'), self.request(port, "/list"))

    def test_password_on_standard_input_loses_only_its_line_end_and_a_bom(self) -> None:
        self.add_user("alice")
        longest = "x" * kvserver.PASSWORD_BYTES_MAX
        for password, rest in (
            ("  blanks  ", "\n"),
            ("with CR LF", "\r\n"),
            ("no line end", ""),
            ("first line", "\nsecond\n"),
            ("pässwörd ☃", "\n"),
            ("☃" * 8, ""),
            (longest, "\r\n"),
        ):
            for bom in ("", "\ufeff"):
                self.succeed("passwd", "alice", "--password-stdin", stdin=bom + password + rest)
                self.assertTrue(kvserver.verify_password(password, self.password_hash()), password)

    def test_bad_passwords_are_refused(self) -> None:
        for message, *inputs in (
            ("a password has ", "", "\n", "1234567\n", "tab\there too\n", "12345678\r\r\n", "\x7f2345678\n"),
            ("a password has ", "nul\0 nul nul\n"),
            ("a password has ", "ä" * 3000, "x" * (kvserver.PASSWORD_BYTES_MAX + 1), "x" * 100_000),
            ("not UTF-8", b"\xff" * 9),
        ):
            for stdin in inputs:
                self.assert_fails(message, "adduser", "alice", "--password-stdin", stdin=stdin)
        self.assertFalse(os.path.exists(self.database), "a refused password made a database")

    def test_the_last_admin_and_without_a_terminal_anybody_is_deleted_only_with_yes(self) -> None:
        for name, *flags in (("alice", "--admin"), ("bob",), ("carol", "--admin")):
            self.add_user(name, *flags)
        self.assert_fails("there is no terminal to ask; to delete the user bob", "deluser", "bob")
        for name in ("bob", "alice"):
            self.succeed("deluser", name, "--yes")
        self.assert_fails("there is no terminal to ask; to delete the last admin carol", "deluser", "carol")
        self.succeed("deluser", "carol", "--yes")
        self.assertEqual(NO_USERS, self.succeed("users"))

    def test_commands_may_run_at_the_same_time_on_a_new_database(self) -> None:
        def add(number: int) -> int:
            return self.run_process("adduser", f"user{number}", "--password-stdin", stdin="a password")[0]

        self.assertEqual([0] * 4, join(in_threads(add, [(number,) for number in range(4)])))
        self.assertEqual(5, len(self.succeed("users").splitlines()))

    def test_a_log_that_another_process_deletes_or_makes_meanwhile_is_no_lack_of_permission(self) -> None:
        self.add_user("alice")
        log, access = self.folder / "test.db-wal", os.access

        def access_after_delete(path: str, mode: int) -> bool:
            if path.endswith("-wal"):
                log.unlink(missing_ok=True)
            return access(path, mode)

        def access_before_make(path: str, mode: int) -> bool:
            has_access = access(path, mode)
            log.touch()
            return has_access

        log.touch()
        for meanwhile in (access_after_delete, access_before_make):
            with mock.patch("os.access", meanwhile):
                self.succeed("users")

    def test_tokens_are_added_listed_and_deleted(self) -> None:
        self.add_user("alice")
        no_tokens = "there are no tokens; add one with: python3 kvserver.py addtoken alice\n"
        self.assertEqual(no_tokens, self.succeed("tokens", "alice"))
        token = self.succeed("addtoken", "alice", "--label", "Küche", "--read-only", "--prefix", "a/")
        self.assertRegex(token, r"\Akv_[A-Za-z0-9_-]{43}\n\Z")
        other = self.succeed("addtoken", "alice")
        with self.serving_here() as (port, _, _):
            self.assertEqual((200, b"{}"), self.request(port, "/list", password=token.strip()))
            self.assertEqual(403, self.request(port, "/set?key=a/1&value=1", password=token.strip())[0])
            self.assertEqual((200, b"Success"), self.request(port, "/set?key=b&value=1", password=other.strip()))
        today = time.strftime("%Y-%m-%d", time.gmtime())
        table = [
            "ID  LABEL  RIGHTS          CREATED     LAST USED",
            f"1   Küche  read a/*        {today}  {today}",
            f"2   -      read and write  {today}  {today}",
        ]
        self.assertEqual(table, self.succeed("tokens", "alice").splitlines())
        self.assertEqual("deleted the token 1 of alice\n", self.succeed("deltoken", "alice", "1"))
        table = ["ID  RIGHTS          CREATED     LAST USED", f"2   read and write  {today}  {today}"]
        self.assertEqual(table, self.succeed("tokens", "alice").splitlines())

    def test_tables_fit_80_columns(self) -> None:
        name, label, today = "a" * 64, "b" * 64, time.strftime("%Y-%m-%d", time.gmtime())
        self.add_user(name)
        for prefix in ("k" * 512, ""):
            self.succeed("addtoken", name, "--label", label, "--prefix", prefix)
        rows = [
            f"ID  LABEL{' ' * 22}RIGHTS{' ' * 22}CREATED     LAST USED",
            f"1   {'b' * 24}…  read and write {'k' * 10}…  {today}  never",
            f"2   {'b' * 24}…  read and write{' ' * 12}  {today}  never",
        ]
        self.assertEqual(rows, self.succeed("tokens", name).splitlines())
        self.assertEqual(80, len(rows[0]))
        self.assertIn(f"{name}  user  0\n", self.succeed("users"))

    def test_mistakes_are_named(self) -> None:
        for name in ("", "a:b", "é", "a\nb", "a\x7f", "a" * 65):
            self.assert_fails("a user name is 1 to 64 printable ASCII characters", "adduser", name)
        self.assert_fails("there is no database", "users")
        self.assertEqual([], os.listdir(self.folder), "a mistake, or a command that only reads, made a database")
        for name in ("alice", "bob", "a" * 64, "~! a'\"\\<b>"):
            self.add_user(name)
        self.succeed("addtoken", "alice")
        for message, *arguments in (
            ("alice exists; set the password with: python3 kvserver.py passwd USER", "adduser", "alice"),
            ("no user eve; list all with: python3 kvserver.py users", "passwd", "eve"),
            ("no user eve", "deluser", "eve", "--yes"),
            ("--password-stdin", "adduser", "eve"),  # there is no terminal
            ("mkdir -p /nowhere", "adduser", "eve", "--password-stdin", "--db", "/nowhere/test.db"),
            ("alice has no token 2; list them with: python3 kvserver.py tokens alice", "deltoken", "alice", "2"),
            ("bob has no token 1", "deltoken", "bob", "1"),
            ("no token 999999", "deltoken", "alice", "999999"),
            ("no user eve", "deltoken", "eve", "1"),
            ("no user eve", "addtoken", "eve"),
            ("no user eve", "tokens", "eve"),
            ("a label", "addtoken", "alice", "--label", "x" * 65),
            ("a label", "addtoken", "alice", "--label", "a\nb"),
            ("a prefix", "addtoken", "alice", "--prefix", "x" * 513),
            ("no user eve; list all with", "addhook", "eve", "a", "http://h"),
            ("no user eve", "hooks", "eve"),
            ("there is no hook 2; list them with: python3 kvserver.py hooks", "delhook", "2"),
            ("there is no hook 2", "testhook", "2"),
            ("a key is 1 to 512 bytes", "addhook", "alice", "", "http://h"),
            ("a key is 1 to 512 bytes", "addhook", "alice", "x" * 513, "http://h"),
            ("a key is 1 to 512 bytes", "addhook", "alice", "x" * 513 + "*", "http://h"),
            ("a label has at most", "addhook", "alice", "a", "http://h", "--label", "a\nb"),
        ):
            self.assert_fails(message, *arguments, stdin="a password")
        is_url = "a URL is http(s)://HOST:PORT/PATH?QUERY, with placeholders"
        for message, *urls in (
            (is_url, "ftp://h/SECRET", "h/SECRET", "http:///SECRET", "", "http://:80/SECRET"),
            (is_url, "http://h:/SECRET", "http://h:0/SECRET", "http://h:65536/SECRET", "http://h:x/SECRET"),
            (
                "a URL has at most 4096 letters, digits and signs; percent-encode",
                "http://h/SECRET SECRET",
                "http://h/é",
            ),
            ("a URL has at most 4096 letters, digits and signs", "http://h/SECRET\r\nA: b", "http://h/" + "x" * 4096),
        ):
            for url in urls:
                self.assert_fails(message, "addhook", "alice", "a", url)
        self.assertEqual([], self.sql("SELECT * FROM hook"))
        for number in ("x", "1000000", "1.0", "\u0661"):
            for command in (("deltoken", "alice"), ("testhook",)):
                code, _, errors = self.run_program(*command, number)
                self.assertEqual(2, code)
                self.assertIn("a whole number from 1", errors)


# Each schema version as the program created it from the one before, with rows of then: alice with "a password".
OUR_HASH = "$scrypt$ln=1,r=8,p=5$C7j6d0SS1Pl/pNuP3qNYvA$9z1pdQZC/mP7fAIVVCgG5JYKmf/NcIJxxdOHf+V5eNo"
OLD_TOKEN = "kv_" + "x" * 43
SCHEMAS = (
    f"""
    CREATE TABLE user (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, password_hash TEXT NOT NULL,
        is_admin INTEGER NOT NULL);
    CREATE TABLE pair (user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE, key TEXT NOT NULL,
        value TEXT NOT NULL, updated REAL NOT NULL, PRIMARY KEY (user_id, key)) WITHOUT ROWID;
    INSERT INTO user VALUES (1, 'alice', '{OUR_HASH}', 1);
    INSERT INTO pair VALUES (1, 'a', 'old', 0);
    PRAGMA application_id = 0x6B767372;
    """,
    """
    ALTER TABLE pair ADD COLUMN expires REAL;
    CREATE INDEX pair_expires ON pair (expires) WHERE expires IS NOT NULL;
    CREATE TABLE token (id INTEGER PRIMARY KEY AUTOINCREMENT,
        user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE, digest BLOB NOT NULL UNIQUE,
        label TEXT NOT NULL, is_read_only INTEGER NOT NULL, prefix TEXT NOT NULL, created REAL NOT NULL,
        last_used_day INTEGER);
    CREATE INDEX token_user_id ON token (user_id);
    INSERT INTO token VALUES (1, 1, X'36996bc3f0be5f31b6e9d765abe46b26da29859528f062a6d86b001138220d1d', 'lamp', 0, '',
        0, NULL);
    """,
    """
    CREATE TABLE hook (id INTEGER PRIMARY KEY AUTOINCREMENT,
        user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE, pattern TEXT NOT NULL, value TEXT,
        receiver TEXT NOT NULL, url TEXT NOT NULL, label TEXT NOT NULL, queued INTEGER NOT NULL DEFAULT 0,
        queued_bytes INTEGER NOT NULL DEFAULT 0, handled INTEGER NOT NULL DEFAULT 0, result TEXT, result_time REAL);
    CREATE INDEX hook_pattern ON hook (user_id, pattern);
    CREATE TABLE delivery (id INTEGER PRIMARY KEY AUTOINCREMENT,
        hook_id INTEGER NOT NULL REFERENCES hook (id) ON DELETE CASCADE, number INTEGER NOT NULL,
        bytes_before INTEGER NOT NULL, key TEXT NOT NULL, value TEXT, old TEXT, created REAL NOT NULL,
        idempotency_key TEXT NOT NULL, UNIQUE (hook_id, number));
    CREATE TABLE prefix_length (length INTEGER PRIMARY KEY);
    WITH RECURSIVE counter (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM counter WHERE n < 512)
        INSERT INTO prefix_length SELECT n FROM counter;
    """,
    """
    ALTER TABLE hook ADD COLUMN method TEXT NOT NULL DEFAULT 'POST';
    ALTER TABLE hook ADD COLUMN headers TEXT NOT NULL DEFAULT '';
    ALTER TABLE hook ADD COLUMN body TEXT;
    CREATE TABLE setting (history_rows_max INTEGER NOT NULL);
    INSERT INTO setting VALUES (0);
    CREATE TABLE history (user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE, key TEXT NOT NULL,
        number INTEGER NOT NULL, time REAL NOT NULL, value BLOB, PRIMARY KEY (user_id, key, number)) WITHOUT ROWID;
    """,
    "ALTER TABLE user ADD COLUMN tokens_added INTEGER NOT NULL DEFAULT 0;",
)
COLUMNS = """
    SELECT m.name, t.name, t.type, t."notnull", t.dflt_value, t.pk FROM sqlite_master m, pragma_table_info(m.name) t
    UNION ALL SELECT m.name, i.name, 'index', 0, NULL, 0 FROM sqlite_master m, pragma_index_info(m.name) i ORDER BY 1, 2
"""


class Schemas(CommandCase):
    def make(self, version: int) -> None:
        """Create the database as the program did at a schema version."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            connection.executescript("".join(SCHEMAS[:version]) + f"PRAGMA user_version = {version}")

    def test_each_schema_version_is_migrated_and_served(self) -> None:
        self.add_user("alice")
        self.write("lines", '{"user": "alice", "key": "b", "value": "1"}')
        expected = self.sql(COLUMNS)
        self.assertEqual([(len(SCHEMAS),)], self.sql("PRAGMA user_version"), "the last schema version is missing here")
        for version in range(1, len(SCHEMAS) + 1):
            with self.subTest(version):
                os.remove(self.database)
                self.make(version)
                with self.serving_here() as (port, _, _):
                    self.assertEqual((200, b"old"), self.request(port, "/get?key=a"))
                    self.assertEqual((200, b"Success"), self.request(port, "/set?key=a&value=new&ttl=100"))
                    if version > 1:
                        self.assertEqual((200, b"new"), self.request(port, "/get?key=a", password=OLD_TOKEN))
                self.assertEqual(expected, self.sql(COLUMNS))
                self.assertEqual([(len(SCHEMAS),)], self.sql("PRAGMA user_version"))
                for arguments in (("addhook", "alice", "a", "http://h"), ("addtoken", "alice"), ("import", "lines")):
                    self.succeed(*arguments)

    def test_a_hook_of_an_older_version_works_as_before(self) -> None:
        self.make(3)
        with contextlib.closing(Target()) as target:
            self.sql(
                "INSERT INTO hook VALUES (1, 1, 'a', NULL, ?, ?, '', 1, 4, 0, NULL, NULL)", (target.origin, target.url)
            )
            self.sql("INSERT INTO delivery VALUES (1, 1, 1, 0, 'a', NULL, 'é\n', ?, '0a1b')", (time.time(),))
            with self.serving_here():
                wait_until(lambda: target.received)
            (received,) = target.received
        self.assertTrue(received.line.startswith("POST /trigger/"))
        self.assertEqual(b'{"value1": "a", "value2": null, "value3": "\\u00e9\\n"}', received.data)
        headers = ("host", "user-agent", "content-type", "content-length", "idempotency-key", "connection")
        self.assertEqual(headers, tuple(received.headers))

    def test_a_backup_does_not_migrate(self) -> None:
        self.make(1)
        self.succeed("backup", "backup.db")
        for path in (self.database, str(self.folder / "backup.db")):
            self.database = path
            self.assertEqual([(1,)], self.sql("PRAGMA user_version"))

    def test_a_newer_schema_version_is_refused(self) -> None:
        self.make(len(SCHEMAS))
        self.sql(f"PRAGMA user_version = {len(SCHEMAS) + 1}")
        for arguments in (("users",), ("serve",)):
            self.assert_fails("written by a newer kvserver.py", *arguments)

    def test_other_and_truncated_files_are_refused_and_left_alone(self) -> None:
        self.make(len(SCHEMAS))
        self.sql(INSERT_PAIR, *((1, str(number), "x" * 5000, 0, None) for number in range(20)))
        whole = (self.folder / "test.db").read_bytes()
        os.remove(self.database)
        self.sql("CREATE TABLE user (name TEXT)")
        foreign = (self.folder / "test.db").read_bytes()
        self.sql("PRAGMA user_version = 1")
        for message, content in (
            ("database of another program", foreign),
            ("database of another program", (self.folder / "test.db").read_bytes()),
            ("cannot use the database", b"No database. " * 400),
            *(("cannot use the database", whole[:size]) for size in (50_000, 5000, 100)),
        ):
            self.write("test.db", content)
            for arguments in (("users",), ("serve",)):
                self.assert_fails(message, *arguments)
            self.assertEqual(content, (self.folder / "test.db").read_bytes())

    def test_a_place_that_cannot_be_used_is_named_with_the_way_out(self) -> None:
        for arguments in (("users",), ("serve",), ("adduser", "x", "--password-stdin"), ("backup", "x")):
            message = f"{self.folder} is a folder or a device; name a file: --db {self.folder}/kvserver.db"
            if arguments[0] != "adduser":
                self.assert_fails(message, *arguments, "--db", str(self.folder))
            self.assert_fails(f"mkdir -p {self.folder}/no", *arguments, "--db", "no/x.db", stdin="a password")

    def test_missing_rights_are_named_at_the_start(self) -> None:
        self.add_user("alice")
        (self.folder / "new").mkdir()
        self.folder.chmod(0o555)
        with as_another_user():
            for name, place in (("test.db", self.folder), ("new.db", self.folder)):
                for arguments in (("users",), ("serve",), ("adduser", "x", "--password-stdin")):
                    message = f"no permission to write {place}; use sudo, or see who may: ls -ld {place}"
                    self.assert_fails(message, *arguments, "--db", name, stdin="a password")
        self.folder.chmod(0o777)
        (self.folder / "test.db").chmod(0)
        with as_another_user():
            self.assert_fails(f"no permission to write {self.database};", "serve")
            self.assert_fails(f"no permission to read {self.database};", "backup", "x")
        (self.folder / "test.db").chmod(0o666)
        (self.folder / "test.db-shm").touch(0o444)  # as a backup of a read-only database leaves it
        with as_another_user():
            self.assert_fails(f"no permission to write {self.database}-shm;", "serve")
        (self.folder / "test.db-shm").unlink()
        self.assertEqual(["new", "test.db"], sorted(os.listdir(self.folder)))

    def test_a_low_port_needs_rights(self) -> None:
        self.folder.chmod(0o777)
        with as_another_user():
            with contextlib.suppress(PermissionError), socket.socket() as unused:
                unused.bind(("127.0.0.1", 1))
                self.skipTest("this machine lets everybody listen on port 1")
            self.assert_fails(
                "a port below 1024 needs rights, which python3 kvserver.py unit gives", "serve", "--port", "1"
            )

    def test_the_file_may_be_anywhere_or_empty_or_a_symbolic_link(self) -> None:
        (self.folder / "sub").mkdir()
        self.write("sub/real.db", "")
        os.symlink("sub/real.db", self.folder / "link.db")
        for name in (":memory:", "a b?mode=memory#%41", f"/{self.folder}/slashes", "link.db"):
            self.add_user("alice", "--db", name)
            self.assertTrue((self.folder / name).exists())
            with self.serving_here("--db", name) as (port, _, _):
                self.assertEqual(200, self.request(port, "/set?key=a&value=1")[0])
        self.assertIn("alice", self.succeed("users", "--db", "sub/real.db"))


class Backups(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        self.add_user("alice")

    def tearDown(self) -> None:
        self.assertEqual([], [name for name in os.listdir(self.folder) if "part" in name])

    def test_a_backup_is_the_database_of_one_moment_though_the_server_writes(self) -> None:
        self.sql(INSERT_PAIR, *((1, f"filler {number}", "x" * 1000, 0, None) for number in range(5000)))
        last = 0
        with self.serving() as (_, port, _):
            for _ in range(5 if LONG else 2):
                before = last
                (backup,) = in_threads(self.succeed, [("backup", "backup.db", "--force")])
                while not backup.done():
                    last = int(self.request(port, "/incr?key=one")[1])
                    self.request(port, "/incr?key=other")
                self.assertEqual([f"wrote backup.db, a copy of {self.database}\n"], join([backup]))
                with contextlib.closing(sqlite3.connect(self.folder / "backup.db")) as copy:
                    self.assertEqual([("ok",)], copy.execute("PRAGMA integrity_check").fetchall())
                    pairs = dict(copy.execute("SELECT key, value FROM pair"))
                one, other = int(pairs.pop("one", 0)), int(pairs.pop("other", 0))
                self.assertEqual(5000, len(pairs))
                self.assertIn(one - other, (0, 1))
                self.assertTrue(before <= one <= last, (before, one, last))

    def test_a_backup_is_private_and_can_replace_the_database(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        with self.serving_here() as (port, _, _):
            self.assertEqual((200, b"Success"), self.request(port, "/set?key=door&value=open"))
            self.succeed("backup", "backup.db")
            self.assertEqual((200, b"Success"), self.request(port, "/set?key=door&value=shut"))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.folder / "backup.db").st_mode))
        os.replace(self.folder / "backup.db", self.database)
        with self.serving_here() as (port, _, _):
            self.assertEqual((200, b"open"), self.request(port, "/get?key=door"))
            self.assertEqual((200, b"Success"), self.request(port, "/set?key=door&value=shut"))

    def test_an_existing_file_is_overwritten_only_with_force(self) -> None:
        self.write("backup.db", "precious")
        self.assert_fails("backup.db exists; to overwrite it, add --force", "backup", "backup.db")
        self.assertEqual(b"precious", (self.folder / "backup.db").read_bytes())
        self.succeed("backup", "backup.db", "--force")
        self.assertIn("alice", self.succeed("users", "--db", "backup.db"))

    def test_other_places_are_refused_even_with_force(self) -> None:
        os.symlink("test.db", self.folder / "link")
        os.symlink("nothing", self.folder / "dangling")
        os.link(self.database, self.folder / "same")
        (self.folder / "sub").mkdir()
        os.symlink(self.folder, self.folder / "sub/folder")
        os.mkfifo(self.folder / "pipe")
        self.write("used", "")
        self.write("used-wal", "")
        names = os.listdir(self.folder)
        refused = ("link", "dangling", "test.db", "test.db-wal", "sub/folder/test.db", "same", "sub", "pipe", "used")
        for path, message in (
            *((path, f"{path} is a database in use, or not a plain file; name another file") for path in refused),
            ("nowhere/backup.db", "test.db to nowhere/backup.db: No such file or directory"),
        ):
            self.assert_fails(message, "backup", path, "--force")
        self.assertEqual(names, os.listdir(self.folder))
        self.assertIn("alice", self.succeed("users"))

    def test_without_a_database_nothing_is_created(self) -> None:
        for arguments in (("users",), ("export",), ("backup", "backup.db")):
            for path, what in (("inner.db", "database"), ("test.db/inner.db", "folder for the database")):
                self.assert_fails(f"there is no {what}", *arguments, KVSERVER_DB=path)
        self.assertEqual(["test.db"], os.listdir(self.folder))

    def test_a_name_that_is_no_text_is_printed_in_another_way(self) -> None:
        self.assertEqual(f"wrote \\udcff.db, a copy of {self.database}\n", self.succeed("backup", "\udcff.db"))

    def test_a_backup_that_fails_leaves_nothing_behind(self) -> None:
        self.sql(INSERT_PAIR, *((1, str(number), "x" * 10_000, 0, None) for number in range(50)))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # bytes of a file, as if the disk were full
        try:
            self.assert_fails("test.db to backup.db: ", "backup", "backup.db")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual(["test.db"], os.listdir(self.folder))
        content = (self.folder / "test.db").read_bytes()
        self.write("test.db", content[:200_000] + b"damaged" * 2000 + content[214_000:])
        self.assert_fails("is damaged, and was not copied", "backup", "backup.db")
        self.assertEqual(["test.db"], os.listdir(self.folder))


class Restores(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        self.add_user("alice")
        self.set("old")
        self.succeed("backup", "backup.db")
        self.sql(INSERT_PAIR, *((1, str(number), "x" * 5000, 0, None) for number in range(50)))
        self.set("new", in_log=True)

    def set(self, value: str, in_log: bool = False) -> None:
        """Store a value of the key a; leave it in the write-ahead log, as a killed server does."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute("INSERT OR REPLACE INTO pair VALUES (1, 'a', ?, 0, NULL)", (value,)).connection.commit()
            files = {name: (self.folder / name).read_bytes() for name in ("test.db", "test.db-wal")} if in_log else {}
        for name, content in files.items():
            self.write(name, content)

    def value(self, path: str = "") -> str:
        """Return the value of the key a, in a copy of a database and its log."""
        for suffix in ("", "-wal"):
            if os.path.exists((path or self.database) + suffix):
                shutil.copy((path or self.database) + suffix, self.folder / f"copy{suffix}")
        with contextlib.closing(sqlite3.connect(self.folder / "copy")) as connection:
            ((value,),) = connection.execute("SELECT value FROM pair WHERE key = 'a'")
        os.remove(self.folder / "copy")
        return str(value)

    def kept(self) -> list[str]:
        """Return the names of the old databases and of their logs."""
        return sorted(glob.glob("*.before-restore-*", root_dir=self.folder))

    def restore(self, *times: str, **environment: str) -> str:
        """Restore the backup, check that it is the database, and return the path of the old one, if there was one."""
        clock = iter(times or [str(time.monotonic_ns())])
        with mock.patch.object(time, "strftime", lambda *arguments: next(clock)):
            output = self.succeed("restore", "backup.db", **environment)
        self.assertEqual("old", self.value())
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.database).st_mode))
        self.assertFalse({"test.db-wal", "test.db-shm", "test.db-journal"} & set(os.listdir(self.folder)))
        old = r"(?:the old database is now (\S+); delete it when all is well\n)?"
        match = re.fullmatch(rf"restored {self.database}\n{old}", output)
        assert match, output
        return match[1] or ""

    def test_the_backup_is_the_database_and_the_old_one_is_kept_with_what_was_in_its_log(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        self.succeed("restore", "backup.db")
        (kept,) = (str(self.folder / name) for name in self.kept())
        self.assertRegex(kept, rf"\A{self.database}\.before-restore-\d{{8}}-\d{{6}}\Z")
        self.assertEqual("new", self.value(kept))
        with self.serving_here() as (port, _, _):
            self.assertEqual((200, b"old"), self.request(port, "/get?key=a"))
            self.assertEqual((200, b"Success"), self.request(port, "/set?key=a&value=newer"))
        self.assertEqual("newer", self.value(self.restore("1")))
        self.write("test.db.before-restore-2", "another one")
        self.assertEqual(self.database + ".before-restore-3", self.restore("1", "1", "2", "3"))  # none is overwritten
        self.assertEqual("newer", self.value(self.database + ".before-restore-1"))
        self.assertEqual("new", self.value(kept))

    def test_a_link_stays_and_the_file_system_may_have_no_links(self) -> None:
        (self.folder / "sub").mkdir()
        os.symlink("../test.db", self.folder / "sub/link.db")
        with mock.patch("os.link", side_effect=PermissionError):
            kept = self.restore(KVSERVER_DB="sub/link.db")
        self.assertEqual("new", self.value(kept))
        self.assertTrue(os.path.islink(self.folder / "sub/link.db"))
        os.remove(self.database)
        self.assertEqual("", self.restore(KVSERVER_DB="sub/link.db"))

    def test_a_log_next_to_another_database_is_refused_and_moved_away_by_restore(self) -> None:
        log, backup = ((self.folder / name).read_bytes() for name in ("test.db-wal", "backup.db"))
        commands = (("serve",), ("users",), ("adduser", "x", "--password-stdin"), ("import", "x"), ("backup", "x"))
        message = f"{self.database}-wal belongs to another database; move it away"
        self.write("x", "")
        for content in (backup, b"", b"damaged", None):
            self.write("test.db", content or b"")
            self.write("test.db-wal", log)
            if content is None:
                os.remove(self.database)
            names = sorted(os.listdir(self.folder))
            for arguments in commands:
                if content is not None or arguments[0] != "adduser":
                    self.assert_fails(message, *arguments, stdin="a password")
            self.assertEqual(names, sorted(os.listdir(self.folder)))
            kept = self.restore()
            if content is not None:
                self.assertEqual(content, pathlib.Path(kept).read_bytes())
            (old_log,) = (self.folder / name for name in self.kept() if name.startswith("test.db-wal."))
            self.assertEqual(log, old_log.read_bytes())
            old_log.unlink()
        self.write("test.db-wal", "")  # an empty log says nothing
        self.assertIn("alice", self.succeed("users"))

    def test_a_damaged_database_is_kept(self) -> None:
        damaged = (self.folder / "test.db").read_bytes()[:20] + b"damaged" * 5000
        for log in ("", "damaged"):
            self.write("test.db", damaged)
            self.write("test.db-wal", log)
            self.assert_fails("return to a backup with: python3 kvserver.py restore FILE", "users")
            self.write("test.db-wal", log)
            self.assertEqual(damaged, pathlib.Path(self.restore()).read_bytes())

    def test_nothing_changes_while_anybody_uses_the_database(self) -> None:
        message = f"another process uses the database {self.database}; stop the server"
        with self.serving_here() as (port, _, _):
            names = set(os.listdir(self.folder))
            self.assert_fails(message, "restore", "backup.db")
            self.assertEqual((200, b"new"), self.request(port, "/get?key=a"))
        with contextlib.closing(sqlite3.connect(self.database)) as other:  # a command at work
            other.execute("SELECT * FROM pair").fetchone()
            self.assert_fails(message, "restore", "backup.db")
        with kvserver.lock_database(self.database):
            self.assert_fails(message, "restore", "backup.db")
        self.assertEqual(names - {"test.db-wal", "test.db-shm"}, set(os.listdir(self.folder)))
        self.assertEqual("new", self.value())
        self.restore()

    def test_a_file_that_is_no_sound_backup_changes_nothing(self) -> None:
        content = (self.folder / "backup.db").read_bytes()
        self.write("damaged", content[:4096] + b"damaged" * 100 + content[4796:])
        self.write("short", content[:20_000])
        self.write("text", "No database. " * 400)
        self.write("empty", "")
        self.write("raw", content)
        self.write("raw-wal", "the log of another one")
        for name, statement in (("foreign", "CREATE TABLE user (name TEXT)"), ("newer", "PRAGMA user_version = 99")):
            shutil.copy(self.folder / ("backup.db" if name == "newer" else "empty"), self.folder / name)
            with contextlib.closing(sqlite3.connect(self.folder / name)) as connection, connection:
                connection.execute(statement)
        os.mkfifo(self.folder / "pipe")
        names = sorted(os.listdir(self.folder))
        for path, message in (
            ("damaged", "damaged is damaged, and was not copied"),
            ("short", "short"),
            ("text", "text: file is not a database"),
            ("empty", "empty is empty; name a backup"),
            ("raw", "raw-wal belongs to another database;"),
            ("foreign", "foreign is a database of another program"),
            ("newer", "written by a newer kvserver.py"),
            ("pipe", "pipe is no backup; name a file that this wrote: python3 kvserver.py backup FILE"),
            ("nothing", "nothing is no backup; name a file that this wrote: python3 kvserver.py backup FILE"),
            (".", ". is no backup; name a file that this wrote: python3 kvserver.py backup FILE"),
            ("test.db", "test.db is no backup; name a file that this wrote: python3 kvserver.py backup FILE"),
        ):
            self.assert_fails(message, "restore", path)
            self.assertEqual(names, sorted(os.listdir(self.folder)), path)
        self.assertEqual("new", self.value())
        for path, message in (
            (
                "no/x.db",
                f"there is no folder for the database {self.folder}/no/x.db; make it with: mkdir -p {self.folder}/no",
            ),
            ("new/", f"{self.folder}/new is a folder or a device; name a file"),
            *((path, f"{self.folder} is a folder or a device") for path in (".", "")),  # it would be moved away
            ("pipe", f"{self.folder}/pipe is a folder or a device"),
        ):
            self.assert_fails(message, "restore", "backup.db", "--db", path)
            self.assertEqual(names, sorted(os.listdir(self.folder)), path)
        shutil.copy(self.folder / "foreign", self.database)
        os.remove(self.database + "-wal")
        self.assert_fails("database of another program", "restore", "backup.db")
        self.assertEqual([], self.kept())

    def test_a_kill_at_any_step_leaves_the_old_or_the_new_database(self) -> None:
        values = list[str]()
        for name in ("os.fsync", "kvserver.Store.lock_alone", "os.link", "os.replace"):
            die = f"call = {name}\ndef step(*a): call(*a); os.kill(os.getpid(), 9)\n{name} = step\n"
            command = [*program("import os\n" + die), "restore", "backup.db"]
            self.assertEqual(-signal.SIGKILL, run(command, cwd=self.folder, env=self.environment)[0], name)
            values.append(self.value())
            self.succeed("users")
        self.assertEqual(["new", "new", "new", "old"], values)
        self.restore()

    @unittest.skipUnless(os.geteuid() == 0, "only root can restore a database of another user")
    def test_root_leaves_the_database_to_its_owner(self) -> None:
        os.chown(self.database, 12345, 12346)
        self.restore()
        os.remove(self.database)
        os.remove(self.database + "-lock")
        os.chown(self.folder, 12345, 12346)
        self.restore()
        for path in (self.database, self.database + "-lock"):
            status = os.stat(path)
            self.assertEqual((12345, 12346), (status.st_uid, status.st_gid))

    def test_a_command_that_waited_for_the_lock_notices_the_restore(self) -> None:
        begin = kvserver.Store.begin
        os.remove(self.database + "-wal")
        for path in (self.database, self.folder / "copy"):
            shutil.copy(self.folder / "backup.db", path)

        def begin_late(store: kvserver.Store) -> sqlite3.Connection:
            connection = begin(store)
            os.replace(self.folder / "copy", self.database)
            return connection

        with mock.patch.object(kvserver.Store, "begin", begin_late):
            self.assert_fails("has been deleted or replaced", "users")

    def test_a_signal_takes_the_incomplete_copy_away(self) -> None:
        names = sorted(os.listdir(self.folder))
        with mock.patch.object(kvserver.Store, "back_up", side_effect=KeyboardInterrupt):
            self.assertEqual("kvserver: interrupted", self.run_program("restore", "backup.db")[2][:21])
        self.assertEqual(names, sorted(os.listdir(self.folder)))


class Exports(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        self.add_user("alice")
        self.add_user("bob")

    def test_an_export_comes_back_as_it_was(self) -> None:
        names, expected = ("user", "key", "value", "updated", "expires"), []
        for number, text in enumerate(["open", "", "a\nb\r\n", "\0", "\u2028\x85", "☃ 😀", '"\\', "\ufeff", " "]):
            key = f"{number} {text}".strip("\0")
            self.sql(INSERT_PAIR, (1, key, text, 1577934245.5, None), (2, key, text, 1577934245.5, 16725223800 + 1 / 7))
            line = dict(zip(names, ("alice", key, text, "2020-01-02T03:04:05.500000Z", None)))
            expected += [line, {**line, "user": "bob", "expires": "2499-12-31T23:30:00.142857Z"}]
        self.sql(INSERT_PAIR, (2, "gone", "1", 1577934245.5, time.time() - 1))
        output = self.succeed("export")
        self.assertTrue(output.endswith("\n"))
        lines = [json.dumps(line, ensure_ascii=False) for line in sorted(expected, key=lambda line: str(line["user"]))]
        self.assertEqual(lines, output.split("\n")[:-1])
        self.write("lines", output.removesuffix("\n"))
        for name in ("alice", "bob"):
            self.add_user(name, KVSERVER_DB="other.db")
        printed = self.succeed("import", "lines", KVSERVER_DB="other.db")
        self.assertEqual("imported users: 0, values: 18; left out: 0, expired: 0\n", printed)
        self.assertEqual(output, self.succeed("export", KVSERVER_DB="other.db"))

    def test_an_export_has_one_users_values_and_no_secrets(self) -> None:
        self.sql(INSERT_PAIR, (1, "a", "1", 0, None), (2, "b", "2", 0, None))
        self.succeed("addtoken", "bob", "--label", "label")
        (line,) = self.succeed("export", "bob").splitlines()
        self.assertEqual(["bob", "b", "2"], list(json.loads(line).values())[:3])
        self.assertNotRegex(self.succeed("export"), "label|scrypt")
        self.assert_fails("no user carol", "export", "carol")

    def test_closed_standard_input_and_output_are_named(self) -> None:
        self.sql(INSERT_PAIR, *((1, str(number), "x" * 10_000, 0, None) for number in range(200)))
        kvserver = shlex.join(CHEAP_PROGRAM)
        for line, result in (
            ("import - <&-", (1, "", "kvserver: standard input or output is closed; use /dev/null instead\n")),
            ("export >&-", (1, "", "kvserver: standard input or output is closed; use /dev/null instead\n")),
            ("export | head -c 10", (0, '{"user": "', "kvserver: standard input or output: Broken pipe\n")),
        ):
            self.assertEqual(result, run(f"{kvserver} {line}", env=self.environment))

    def test_the_file_wins_and_times_are_kept(self) -> None:
        before = time.time()
        self.sql(INSERT_PAIR, *((1, key, "here", before, before + 9) for key in ("both", "here", "expired")))
        lines = (
            '{"user": "alice", "key": "both", "value": "1", "updated": "2020-01-02T03:04:05.5Z", "expires": null}',
            '{"user": "alice", "key": "new", "value": "2", "updated": null, "expires": "2500-01-01T01:00:00.25+01:30"}',
            "",
            '{"user": "bob", "key": "short", "value": "3", "updated": "1970-01-01T00:00:00Z"}',
            '{"user": "bob", "key": "twice", "value": "4", "updated": "2020-01-01t00:00:00z"}',
            '{"user": "bob", "key": "twice", "value": "5", "updated": "2021-01-01T00:00:00-00:00"}',
            '{"user": "alice", "key": "expired", "value": "6", "expires": "2020-01-01T00:00:00Z"}\r\n',
        )
        printed = "imported users: 0, values: 4; left out: 0, expired: 1\n"
        self.assertEqual((0, printed, ""), self.run_process("import", "-", stdin="\n".join(lines)))
        here = ("here", before, before + 9)
        rows = {"both": ("1", 1577934245.5, None), "twice": ("5", 1609459200.0, None), "here": here, "expired": here}
        rows |= {"new": ("2", before, 16725223800.25), "short": ("3", 0, None)}
        # SQLite's min: what was stored now has a later time.
        stored = self.sql(f"SELECT key, value, min(updated, {before!r}), expires FROM pair")
        self.assertEqual(rows, {key: tuple(row) for key, *row in stored})
        self.assertIn(
            '"short", "value": "3", "updated": "1970-01-01T00:00:00.000000Z", "expires": null', self.succeed("export")
        )

    def test_an_import_counts_at_once_and_holds_up_no_write(self) -> None:
        os.mkfifo(self.folder / "pipe")
        with self.serving() as (_, port, _):
            self.assertEqual(200, self.request(port, "/set?key=door&value=shut")[0])

            def write() -> tuple[int, bytes]:
                with open(self.folder / "pipe", "wb") as file:
                    file.write(b'{"user": "alice", "key": "door", "value": "open"}\n' * 3000)  # more than a pipe holds
                    file.flush()
                    return self.request(port, "/set?key=b&value=2")

            wait = (port, "/get?key=door&wait=20&unless=shut")
            calls = [*in_threads(write, [()]), *in_threads(self.request, [wait])]
            self.succeed("import", "pipe")
            self.assertEqual([(200, b"Success"), (200, b"open")], join(calls))

    def test_mistakes_are_named_and_nothing_is_stored(self) -> None:
        good = {"user": "alice", "key": "a", "value": "1"}
        begin = '{"user": "alice", "key": "a", "value": "SECRET", '
        for message, *lines in (
            ("this is not JSON in UTF-8", "{", b"\xff", '{"user": "alice", "key": "a", "value": "SECRET\\ud800"}'),
            ("nested too deeply", "[" * 100_000),
            ("a line is a JSON object with: user, key, value, updated, expires", "[]", {"expire": "SECRET"}),
            ("a line is a JSON object with", '{"user": "alice", "key": "SECRET"}'),
            ("a name in the JSON is repeated", begin + '"value": "2"}'),
            ("Exceeds the limit (4300 digits)", begin + '"updated": %s}' % ("1" * 5000)),
            ("a line has at most", begin + '"updated": "%s"}' % ("\\u0041" * 1500_000)),
            ("user, key and value are strings", {"value": 1}),
            ("the value is too large", {"value": "x" * 1024 * 1025}),
            ("a user name is 1 to 64 printable", {"user": "x" * 65}),
            ("a key is 1 to 512 bytes", {"key": ""}, {"key": "\0"}),
            ("a time is like 2030-01-31T23:59:59Z", {"updated": 5}, {"expires": "2030-01-31"}),
            ("a time is like", {"expires": "2030-02-31T00:00:00Z"}, {"updated": "1969-12-31T23:59:59Z"}),
            ("a time is like", {"updated": "9999-12-31T23:59:59-05:00"}, {"updated": "0001-01-01T00:00:00+23:59"}),
            ("a time is like", {"updated": "9999-12-31T23:59:59.9995Z"}),  # a millisecond is the smallest unit shown
            ("a time is like", {"expires": "9999-12-31T23:59:59.999999999Z"}),
        ):
            for line in lines:
                text = json.dumps({**good, **line}) if isinstance(line, dict) else line
                data = text if isinstance(text, bytes) else str(text).encode()
                self.write("lines", json.dumps(good).encode() + b"\n" + data + b"\n")
                self.assert_fails("line 2: " + message, "import", "lines")
        carol = json.dumps({**good, "user": "carol", "expires": "1970-01-01T00:00:00Z"})
        self.write("lines", "\n".join((json.dumps(good), carol, json.dumps({**good, "user": "x"}))))
        self.assert_fails("nothing was imported: no user carol, x; list all with", "import", "lines")
        self.assertEqual({}, self.pairs())
        self.assert_fails("missing: No such file or directory", "import", "missing")
        self.assert_fails(".: Is a directory", "import", ".")
        self.assert_fails("there is no database", "import", "lines", KVSERVER_DB="missing.db")
        self.assertFalse((self.folder / "missing.db").exists())


class ValueCommands(CommandCase):
    """The commands that read and change values without a password."""

    def setUp(self) -> None:
        super().setUp()
        self.add_user("alice")

    def test_a_value_is_stored_printed_listed_and_deleted(self) -> None:
        self.add_user("bob")
        self.assertEqual("stored the key room/1 of alice\n", self.succeed("set", "alice", "room/1", "a\tb\x1b[0m\n"))
        self.assertEqual("a\tb\x1b[0m\n\n", self.succeed("get", "alice", "room/1"))
        for key, *value in (("door", "käse"), ("room/é\n", ""), ("roo", "-5"), ("rp", "--", "-x")):
            self.succeed("set", "alice", key, *value)
        in_room = "room/1\ta\\tb\\x1b[0m\\n\nroom/é\\n\t\n"
        self.assertEqual(f"door\tkäse\nroo\t-5\n{in_room}rp\t-x\n", self.succeed("list", "alice"))
        self.assertEqual(in_room, self.succeed("list", "alice", "room/"))
        self.assertEqual("deleted the key door of alice\n", self.succeed("del", "alice", "door"))
        for command, name, key in (("get", "alice", "door"), ("del", "alice", "door"), ("get", "bob", "roo")):
            self.assert_fails(f"{name} has no key {key}; list all with: ", command, name, key)
        for arguments, message in (
            (("bob",), "bob has no values\n"),
            (("bob", "x"), "bob has no such keys\n"),
        ):
            self.assertEqual((0, "", message), self.run_program("list", *arguments))
        for command, *others in (("get", "a"), ("set", "a", "b"), ("del", "a"), ("list",)):
            self.assert_fails("no user carol", command, "carol", *others)

    def test_standard_input_loses_one_newline_and_a_byte_order_mark(self) -> None:
        for text, value in (
            (b"open", b"open"),
            (b"open\n", b"open"),
            (b"open\r\n", b"open"),
            (b"\xef\xbb\xbfa\nb\n\n", b"a\nb\n"),
            (b"\n", b""),
            (b"", b""),
            ("ä".encode() * 2**19 + b"\n", "ä".encode() * 2**19),
        ):
            self.succeed("set", "alice", "a", "-", stdin=text)
            self.assertEqual(value, self.pairs()["alice", "a"].encode())
        self.assert_fails("1048577 bytes; the limit is 1048576", "set", "alice", "a", "-", stdin="a" * 2**20 + "a\n")
        self.assert_fails("not UTF-8", "set", "alice", "a", "-", stdin=b"\xff")
        self.assertEqual(2**19, len(self.pairs()["alice", "a"]))

    def test_keys_and_times_have_limits(self) -> None:
        self.succeed("set", "alice", "k" * 512, "v", "--ttl", "315360000")
        for key in ("", "k" * 513):
            self.assert_fails("a key is 1 to 512 bytes", "set", "alice", key, "v")
        for ttl in ("0", "315360001", "5m", "-1", ""):
            code, _, errors = self.run_program("set", "alice", "a", "v", "--ttl", ttl)
            self.assertEqual(2, code)
            self.assertIn("argument --ttl: ", errors)
        self.assertEqual(["k" * 512], [key for _, key in self.pairs()])
        ((updated, expires),) = self.sql("SELECT updated, expires FROM pair")
        self.assertAlmostEqual(315360000, expires - updated, delta=WAIT_SECONDS)
        self.sql(INSERT_PAIR, (1, "old", "v", 0, 1))
        self.assertNotIn("old", self.succeed("list", "alice"))
        for command in ("get", "del"):
            self.assert_fails("no key old", command, "alice", "old")
        self.succeed("set", "alice", "k" * 512, "v")
        self.assertIn((None,), self.sql("SELECT expires FROM pair"))

    def test_a_running_server_hears_of_them(self) -> None:
        target = self.enterContext(contextlib.closing(Target()))
        self.succeed("addhook", "alice", "door", target.url)
        with self.serving_here() as (port, _, _):
            for command, status in (("set", b"200"), ("del", b"404")):
                tag = 'If-None-Match: "x"' if command == "set" else f"If-None-Match: {kvserver.entity_tag(b'open')}"
                waiting = self.send(port, "GET /get?key=door&wait=60 HTTP/1.1", tag)
                self.assertEqual(200, self.request(port, "/list")[0])
                self.succeed(command, "alice", "door", *["open"][: command == "set"])
                self.assertEqual(b"HTTP/1.1 " + status, waiting.recv(12))
            wait_until(lambda: len(target.received) == 2)
        self.assertEqual([("door", "open", None), ("door", None, "open")], [change[:3] for change in target.changes()])


class MovingIn(CommandCase):
    scrypt, pbkdf2 = WERKZEUG_HASHES.values()

    def test_users_keep_their_passwords_and_get_our_hash_with_the_first_login(self) -> None:
        self.make_old_database(
            [("admin", self.scrypt, 1), ("old", self.pbkdf2, 0)], [("a", "1", "admin"), ("a", "2", "old")]
        )
        output = "imported users: 2, values: 2; left out: 0, expired: 0\n"
        self.assertEqual(output, self.succeed("import", "database.db"))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.database).st_mode))
        rows = [line.split() for line in self.succeed("users").splitlines()[1:]]
        self.assertEqual([["admin", "admin", "1"], ["old", "user", "1"]], rows)
        with self.serving_here() as (port, lines, _):
            self.assertIn("to set a new password: ", lines[1], "another admin was made")
            for (password, stored), name, value in zip(WERKZEUG_HASHES.items(), ("admin", "old"), (b"1", b"2")):
                self.assertEqual(stored, self.password_hash(name))
                self.assertEqual(401, self.request(port, "/get?key=a", name, password + "x")[0])
                self.assertEqual((200, value), self.request(port, "/get?key=a", name, password))
                wait_until(lambda name=name: self.password_hash(name).startswith("$scrypt$"))  # type: ignore[misc]
                self.assertEqual((200, value), self.request(port, "/get?key=a", name, password))
                self.assertTrue(kvserver.verify_password(password, self.password_hash(name)))

    def test_what_cannot_be_imported_is_listed_without_values(self) -> None:
        users = {
            "a:b": "user 'a:b': a user name is",
            "é": "user 'é': a user name is",
            b"\xff": "user b'\\xff': a user name is",
        }
        states = (
            ("", "SECRET", "bob", "user 'bob', key '': a key is"),
            ("twice", "SECRET", "bob", "user 'bob', key 'twice': another row"),
            ("twice", "SECRET2", "deleted", "user 'deleted', key 'twice': this user is not imported"),
            ("k" * 513, "SECRET", "bob", f"user 'bob', key '{'k' * 79}: a key is"),
            ("large", "SECRET!" * 200_000, "bob", "user 'bob', key 'large': the value is too large"),
            ("text", b"SECRET\xff", "bob", "user 'bob', key 'text': the key or the value is not UTF-8 text"),
            (b"\xfe", "SECRET", "bob", "user 'bob', key b'\\xfe': the key or the value is not UTF-8 text"),
            ("n\nl", "SECRET", "a:b", "user 'a:b', key 'n\\nl': this user is not imported"),
        )
        rows = [*(row[:3] for row in states), ("number", 5, "bob")]
        rows.insert(2, ("twice", "kept", "bob"))
        self.make_old_database([(name, self.scrypt, 0) for name in ("bob", *users)], rows)
        *lines, imported, hint = self.succeed("import", "database.db").splitlines()
        for line, begin in zip(lines, (*users.values(), *(row[3] for row in reversed(states))), strict=True):
            self.assertTrue(line.startswith("left out: " + begin), line)
            self.assertNotIn("SECRET", line)
        self.assertEqual("imported users: 1, values: 2; left out: 11, expired: 0", imported)
        self.assertEqual("nobody is an admin; add one with: python3 kvserver.py adduser USER --admin", hint)
        self.assertEqual({("bob", "twice"): "kept", ("bob", "number"): "5"}, self.pairs())

    def test_other_databases_are_told_apart(self) -> None:
        self.add_user("alice", KVSERVER_DB="ours.db")
        for name, table in (("other.db", "t (a)"), ("old.db", "user (name, passwordHash)")):
            with contextlib.closing(sqlite3.connect(self.folder / name)) as connection:
                connection.execute(f"CREATE TABLE {table}")
        self.write("damaged.db", b"SQLite format 3\0" + b"x" * 2000)
        begin = "as a database of IoT Persistence Api: "
        for name, message in (
            ("ours.db", "is a database of kvserver"),
            ("other.db", f"cannot read other.db {begin}no such table: user"),
            ("old.db", f"cannot read old.db {begin}no such column: isAdmin"),
            ("damaged.db", f"cannot read damaged.db {begin}"),
        ):
            self.assert_fails(message, "import", name)
        self.assertFalse(os.path.exists(self.database))

    def test_a_hash_that_is_not_known_refuses_all_and_names_whose_it_is(self) -> None:
        too_costly = "scrypt:1048576:8:1" + self.scrypt[16:]
        for stored in (OUR_HASH, "md5$salt$00", "", too_costly, "pbkdf2:sha256:1000$salt$xyz", b"\xff"):
            self.make_old_database(
                [("alice", self.scrypt, 1), ("bob", stored, 0), ("carol", stored, 0)], [("a", "1", "alice")]
            )
            self.assert_fails(
                "nothing was imported: the password hash of bob, carol is of an unknown kind", "import", "database.db"
            )
        self.assertFalse(os.path.exists(self.database))

    def test_a_user_that_exists_refuses_all_unless_it_is_merged(self) -> None:
        self.add_user("alice")
        self.sql(INSERT_PAIR, (1, "door", "here", 0, None), (1, "only", "here", 0, None))
        before = self.password_hash()
        self.make_old_database(
            [("alice", self.scrypt, 1), ("bob", self.pbkdf2, 0)], [("door", "there", "alice"), ("b", "2", "bob")]
        )
        message = "nothing was imported: users exist; --merge only adds values: alice"
        self.assert_fails(message, "import", "database.db")
        self.assertNotIn("bob", self.succeed("users"))
        lines = self.succeed("import", "database.db", "--merge").splitlines()
        self.assertEqual("imported users: 1, values: 2; left out: 0, expired: 0", lines[0])
        self.assertIn("nobody is an admin", lines[-1])
        self.assertEqual(before, self.password_hash())
        merged = {("alice", "door"): "there", ("alice", "only"): "here", ("bob", "b"): "2"}
        self.assertEqual(merged, self.pairs())


class HookCommands(CommandCase):
    """The commands for hooks, and deliveries of servers in processes."""

    def setUp(self) -> None:
        super().setUp()
        self.add_user("alice", "--admin")
        self.add_user("bob")
        self.target = self.enterContext(contextlib.closing(Target()))

    def hooks(self, *arguments: str) -> list[str]:
        """Return the lines of the table of hooks, with single spaces."""
        return [" ".join(line.split()) for line in self.succeed("hooks", *arguments).splitlines()]

    def wait_until_delivered(self) -> None:
        """Wait until no delivery is pending."""
        wait_until(lambda: self.sql("SELECT count(*) FROM delivery") == [(0,)])

    def test_hooks_are_added_listed_and_deleted(self) -> None:
        secret = "/trigger/door/with/key/SECRET?x=SECRET"
        first = self.succeed("addhook", "alice", "door", "https://name:SECRET@maker.ifttt.com" + secret)
        second = self.succeed(
            "addhook", "bob", "room/*", "-", "--value", "x" * 99, stdin=f"\ufeffhttp://[::1]:81{secret}\n"
        )
        third = self.succeed("addhook", "alice", "*", "HTTP://h", "--value", "", "--label", "all of it")
        self.assertEqual(["1\n", "2\n", "3\n"], [first, second, third])
        table = [
            "ID USER KEY VALUE LABEL URL LAST TRY",
            "1 alice door - - https://maker.iftt… never",
            f'2 bob room/* "{"x" * 17}… - http://[::1]:81 never',
            '3 alice * "" all of it http://h never',
        ]
        self.assertEqual(table, self.hooks())
        bobs = ["ID USER KEY VALUE URL LAST TRY", f'2 bob room/* "{"x" * 33}… http://[::1]:81 never']
        self.assertEqual(bobs, self.hooks("bob"))
        self.assertEqual("deleted the hook 2\n", self.succeed("delhook", "2"))
        self.assertEqual("4\n", self.succeed("addhook", "bob", "a", "http://h"), "an id is given out again")
        self.succeed("deluser", "alice", "--yes")
        self.assertEqual(["ID USER KEY URL LAST TRY", "4 bob a http://h never"], self.hooks())
        self.succeed("deluser", "bob", "--yes")
        no_hooks = "there are no hooks; add one with: python3 kvserver.py addhook USER KEY URL"
        self.assertEqual([no_hooks], self.hooks())
        self.assertEqual([], self.sql("SELECT * FROM sqlite_master WHERE type = 'trigger'"))

    def test_a_test_is_sent_at_once_without_a_server(self) -> None:
        self.succeed("addhook", "alice", "room/*", self.target.url)
        self.assertEqual("200 OK\n", self.succeed("testhook", "1"))
        (received,) = self.target.received
        self.assertIn("/trigger/door/with/key/SECRET", received.line)
        self.assertEqual({"value1": "room/*", "value2": "test", "value3": None, "test": True}, received.body)
        self.target.close()
        code, output, errors = self.run_program("testhook", "1")
        self.assertEqual((1, "Connection refused\n"), (code, output))
        self.assertRegex(errors, r"\Akvserver: the test of hook 1 failed; check [^\n]+\n\Z")

    def test_a_test_shows_what_is_sent(self) -> None:
        path, title = "/{key}?{value}{old}&{other}", ("--header", "Title: {key} SECRET", "--header", "X: {value}")
        self.write("body", "\ufeff{time} {key}\n\r\n")
        for arguments, stdin, line, body in (
            (("--body", "-"), "{key}={value}={old}\n", "POST", rb"\Aa/\*=test=\Z"),
            (("--body", "@body", "--method", "PATCH"), "", "PATCH", rb"\A20\d\d-\S{18}Z a/\*\n\Z"),
            (("--body", ""), "", "POST", rb"\A\Z"),
            (("--method", "DELETE"), "", "DELETE", rb"\A\Z"),
            ((), "", "POST", rb'\A{"value1": "a/\*", "value2": "test", "value3": null, "test": true}\Z'),
        ):
            hook_id = self.succeed(
                "addhook", "alice", "a/*", self.target.origin + path, *title, *arguments, stdin=stdin
            )
            self.assertEqual("200 OK\n", self.succeed("testhook", hook_id.strip()))
            received = self.target.received[-1]
            self.assertEqual(f"{line} /a%2F%2A?test&{{other}} HTTP/1.1", received.line)
            self.assertEqual(("a/* SECRET", "test"), (received.headers["title"], received.headers["x"]))
            self.assertRegex(received.data, body)
        with self.serving_here() as (port, _, _):
            shown = self.request(port, "/admin/hooks")[1].decode() + "".join(self.hooks())
        self.assertIn(self.target.origin, shown)
        self.assertNotIn("SECRET", shown)

    def test_templates_that_cannot_work_are_refused(self) -> None:
        add, hint = ("addhook", "alice", "a"), "for text, add --header 'Content-Type: text/plain'"
        in_a_url = "with placeholders in PATH and QUERY only"
        is_header = "a header is 'NAME: TEXT', with ASCII letters in the name, and no control characters"
        long = ("all headers have 8192 bytes at most, a body 65536", "--header", "A: SECRET")
        json_type = ("--header", "content-type: application/ld+json")
        for url in (
            "{key}://h/",
            "http://{key}/",
            "http://h{old}.x/",
            "http://h:{value}/",
            "http://{key}@h/",
            "http://h/#{time}",
        ):
            self.assert_fails(in_a_url, *add, url)
        for message, *arguments in (
            *(
                (is_header, "--header", each)
                for each in ("SECRET", ": SECRET", "A B: SECRET", "{key}: SECRET", "é: SECRET")
            ),
            *((is_header, "--header", f"A: SECRET{control}") for control in ("\r\nB: c", "\n", "\t", "\x7f", "\x85")),
            *(
                (
                    "leave out those that kvserver sets: Host, Content-Length, Connection, Tran",
                    "--header",
                    f"{name}: SECRET",
                )
                for name in ("HOST", "content-length", "Connection", "Transfer-Encoding", "Idempotency-Key")
            ),
            (
                "send each header once, and leave out those that kvserver sets: Host",
                "--header",
                "A: SECRET",
                "--header",
                "a: SECRET",
            ),
            (*long, "--header", "B: " + "x" * 8180),
            (*long, "--body", "é" * 32768 + "x"),
            ("GET sends no body; leave out --body, or use --method POST", "--method", "GET", "--body", ""),
            ("DELETE sends no body", "--method", "DELETE", "--body", "SECRET"),
            (
                f"malformed JSON (Expecting ',' delimiter: line 2 column 12 (char 22)); {hint}",
                "--body",
                '{"SECRET":\n "{value}" x}',
            ),
            ("line 1 column 16 ", "--body", '{"n": {value}, SECRET}'),
            (hint, "--body", "[" * 60_000),
            ("malformed JSON (Expecting value: line 1 column 1 ", *json_type, "--body", "SECRET"),
            ("malformed JSON (Expecting value: line 1 column 1 ", *json_type, "--body", ""),
            ("/nowhere: No such file", "--body", "@/nowhere"),
            ("is not UTF-8 text", "--body", "\udcff SECRET"),
            ("is not UTF-8 text", "--header", "A: \udcff SECRET"),
        ):
            self.assert_fails(message, *add, "http://h", *arguments)
        login, authorization = "http://alice:SECRET@h", ("--header", "authorization: Bearer SECRET")
        self.assert_fails("and with a login in the URL, Authorization", *add, login, *authorization)
        self.assert_fails("the URL and the body cannot both be -", *add, "-", "--body", "-", code=2)
        self.assert_fails("is not UTF-8 text", *add, "http://h", "--body", "-", stdin=b"\xff SECRET")
        self.assertEqual(2, self.run_program(*add, "http://h", "--method", "HEAD")[0])
        self.assertEqual([], self.sql("SELECT * FROM hook"))
        for accepted in (
            ("http://h", *authorization, "--header", "B: " + "x" * (8192 - 32), "--body", "é" * 32768),
            (
                "http://h/?{other}#{other}",
                "--body",
                '{"n": [{value}, -{old}, 0.{key}], "{key}": "{time}", "{old}": {}}',
            ),
            ("http://h", "--body", "{value} {", "--header", "A:", "--header", "B: {}"),
            ("http://h", "--body", "{SECRET", "--header", "Content-Type:text/plain"),
        ):
            self.succeed(*add, *accepted)

    def test_deliveries_arrive_complete_and_in_order_over_a_kill(self) -> None:
        changes = [(f"k{n % 10}", str(n), str(n - 10) if n >= 10 else None) for n in range(1000 if LONG else 200)]
        targets = {pattern: self.enterContext(contextlib.closing(Target())) for pattern in ("*", "k1", "k2*")}
        for pattern, target in targets.items():
            self.succeed("addhook", "alice", pattern, target.url)

        def send(port: int, *changes: tuple[str, str, str | None]) -> None:
            for key, value, _ in changes:
                self.assertEqual((200, b"Success"), self.request(port, url("/set", key=key, value=value)))

        with self.serving() as (server, port, _):
            send(port, *changes[:101])
            self.wait_until_delivered()
            for target in targets.values():
                target.behave = hang
            send(port, *changes[101:103])  # one for each hook, and one more for the first
            wait_until(lambda: sum(len(target.received) for target in targets.values()) == 101 + 10 + 10 + 3)
            server.kill()
        self.assertEqual(["2", "1", "1"], [line.split()[4] for line in self.hooks()[1:]])
        for target in targets.values():
            target.behave = arrive
        with self.serving() as (_, port, _):
            send(port, *changes[103:])
            self.wait_until_delivered()
        for line in self.hooks()[1:]:
            self.assertRegex(line, r" http://\S+ \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ 200 OK\Z")
        for pattern, target in targets.items():
            told = {received.headers["idempotency-key"]: received.change() for received in target.received}
            expected = [change for change in changes if change[0].startswith(pattern.strip("*"))]
            self.assertEqual(expected, list(told.values()))
            self.assertEqual(len(expected) + 1, len(target.received), "the delivery without a response comes again")


# Makes standard input the controlling terminal, from which passwords are read.
ON_TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
"""


class Terminal(CommandCase):
    def type_in(self, arguments: list[str], *answers: tuple[str, str]) -> tuple[int, str]:
        """Run the program on a new terminal and answer each prompt; return exit code and output."""
        terminal, end = os.openpty()
        streams: Any = {"stdin": end, "stdout": end, "stderr": end, "start_new_session": True}
        command = [*program(ON_TERMINAL), *arguments]
        with open(terminal, "r+b", buffering=0) as file:
            process = subprocess.Popen(command, env=self.environment, **streams)
            os.close(end)
            shown = b""
            for prompt, answer in answers:
                while not shown.endswith(prompt.encode()):
                    shown += file.read(1024)
                file.write(answer.encode())
            with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an I/O error
                while data := file.read(1024):
                    shown += data
        return process.wait(WAIT_SECONDS), shown.decode()

    def test_a_password_is_asked_twice_and_not_shown(self) -> None:
        asks, again = "Password for alice: ", "The same again: "
        for command, code, expected, *answers in (
            ("adduser", 130, f"{asks}\r\nkvserver: interrupted; nothing was changed\r\n", (asks, "\x03")),
            ("adduser", 1, "\r\nkvserver: interrupted; nothing was changed\r\n", (asks, "\x04")),
            ("adduser", 0, "added the user alice", (asks, "pässword1\n"), (again, "pässword1\n")),
            ("adduser", 1, "alice exists; set the password"),  # before anybody types
            ("passwd", 1, "at least 8 characters", (asks, "short\n")),
            ("passwd", 1, "nothing was changed", (asks, "pässword2\n"), (again, "pässword3\n")),
        ):
            exit_code, shown = self.type_in([command, "alice"], *answers)
            self.assertEqual(code, exit_code, shown)
            self.assertIn(expected, shown)
            self.assertNotRegex(shown, "ssword1|Traceback")
        self.assertTrue(kvserver.verify_password("pässword1", self.password_hash()))

    def test_deluser_asks_and_addhook_reads_the_url(self) -> None:
        self.add_user("alice", "--admin")
        self.add_user("bob")
        asks = "Delete the user bob and all they have (values: 0, tokens: 0, hooks: 0)? [y/N] "
        for answer, arguments, code, shown in (
            *((answer, ("deluser", "bob"), 1, asks) for answer in (b"\n", b"n\n", b"\x04")),
            (b"Y\n", ("deluser", "bob"), 0, asks),
            (b"http://h/SECRET\n\x04", ("addhook", "alice", "door", "-"), 0, "1\n"),
            (b"\x04", ("import", "-"), 0, "imported users: 0, values: 0"),  # one Ctrl-D is enough
        ):
            terminal, end = os.openpty()
            with open(terminal, "wb", buffering=0) as keyboard, os.fdopen(end) as stdin:
                keyboard.write(answer)
                exit_code, output, errors = self.run_program(*arguments, stdin=stdin)
            self.assertEqual((code, shown), (exit_code, (output + errors)[: len(shown)]))
        self.assertNotIn("bob", self.succeed("users"))


class Certificates(CommandCase):
    flags = ("--tls-cert", "certificate", "--tls-key", "key")

    def setUp(self) -> None:
        super().setUp()
        self.write("certificate", CERTIFICATE)
        self.write("key", KEY)

    def connect(self, port: int, certificate: str = CERTIFICATE) -> http.client.HTTPSConnection:
        """Return a connection to a server that has to show a certificate, after a request."""
        connection = http.client.HTTPSConnection("localhost", port, timeout=WAIT_SECONDS, context=trust(certificate))
        self.addCleanup(connection.close)
        self.assert_serves(connection)
        return connection

    def assert_serves(self, connection: http.client.HTTPConnection) -> None:
        connection.request("GET", "/health")
        self.assertEqual(200, read_answer(connection.getresponse()).status)

    def test_the_lines_at_the_start_say_https_and_curl_works(self) -> None:
        with self.serving_here(*self.flags, "--host", "0.0.0.0") as (port, lines, log):
            self.assertEqual(f"listening on https://0.0.0.0:{port}", lines[3])
            self.assertIn(f'"https://127.0.0.1:{port}/set?key=door&value=open"', lines[2])
            self.connect(port)
            self.assert_curl_works(lines)
        self.assertNotIn("plain HTTP", log.getvalue())

    def test_paths_in_the_configuration_are_relative_to_it(self) -> None:
        (self.folder / "sub").mkdir()
        self.write("sub/config.json", '{"tls_cert": "../certificate", "tls_key": "../key"}')
        with self.serving_here("--config", "sub/config.json") as (port, _, _):
            self.connect(port)
        with self.serving_here(KVSERVER_TLS_CERT="certificate", KVSERVER_TLS_KEY="key") as (port, _, _):
            self.connect(port)

    def test_files_that_are_no_good_are_one_line_and_nothing_is_created(self) -> None:
        for certificate, key, reason in (
            (CERTIFICATE, OTHER_KEY, "key values mismatch"),
            (CERTIFICATE, "", "not pem"),
            ("", KEY, "not pem"),
            (CERTIFICATE, ENCRYPTED_KEY, "not pem"),
        ):
            problem = "kvserver: certificate: cannot use the certificate certificate with the key key: "
            self.write("certificate", certificate)
            self.write("key", key)
            self.assert_fails(problem + reason, "serve", *self.flags)
        (self.folder / "key").unlink()
        self.assert_fails("key: No such file or directory", "serve", *self.flags)
        for flags in (self.flags[:2], self.flags[2:], (*self.flags[:3], "")):
            code, _, errors = self.run_program("serve", *flags)
            self.assertEqual(2, code)
            self.assertIn("--tls-cert and --tls-key go together", errors)
        self.assertEqual(["certificate"], os.listdir(self.folder))

    def test_a_renewed_certificate_counts_after_sighup_and_no_connection_is_dropped(self) -> None:
        with self.serving(*self.flags) as (process, port, _):
            old = self.connect(port)
            first = old.sock

            def renew(expected: str) -> None:
                timer = threading.Timer(WAIT_SECONDS, process.kill)  # ends a wait for a line that never comes
                timer.start()
                process.send_signal(signal.SIGHUP)
                self.assertIn(expected, next((line for line in process.stderr or () if "certificate" in line), ""))
                timer.cancel()

            self.write("certificate", OTHER_CERTIFICATE)
            renew("the old certificate stays in use: cannot use the certificate")
            self.connect(port)
            self.write("key", OTHER_KEY)
            renew("INFO loaded the certificate")
            self.connect(port, OTHER_CERTIFICATE)
            with self.assertRaises(ssl.SSLCertVerificationError):
                self.connect(port)
            self.assert_serves(old)
            self.assertIs(first, old.sock)
            (self.folder / "key").unlink()
            renew("the old certificate stays in use: [Errno 2] No such file or directory: 'key'")
            self.connect(port, OTHER_CERTIFICATE)
            self.stop(process)


class Serving(CommandCase):
    def test_one_command_gives_a_working_server(self) -> None:
        shutil.copy(PROGRAM, self.folder)
        del self.environment["KVSERVER_DB"], self.environment["PYTHONPATH"]
        command = [sys.executable, "kvserver.py"]
        with self.serving(command=command) as (process, port, lines):
            match = re.fullmatch(r"user: admin, password: (\S+) \(shown only now\)", lines[1])
            assert match
            password, root = match[1], f"http://127.0.0.1:{port}"
            curl = f'curl -u admin:{password} "{root}/set?key=door&value=open"'
            self.assertEqual([f"open in a browser: {root}/", lines[1], curl, f"listening on {root}"], lines)
            self.assertEqual((200, b"Success"), self.request(port, "/set?key=door&value=open", "admin", password))
            self.assert_curl_works(lines)
            self.assertNotIn(password, self.stop(process))
        self.assertTrue((self.folder / "kvserver.db").exists(), "the database is not next to the program")
        with self.serving(command=command) as (_, port, lines):
            root, hint = f"http://127.0.0.1:{port}", f"to set a new password: {shlex.join(command)} passwd admin"
            self.assertEqual([f"open in a browser: {root}/", hint, f"listening on {root}"], lines)
            self.assertEqual((200, b'{"door":"open"}'), self.request(port, "/list", "admin", password))

    def test_all_interfaces_is_the_default_and_warned_of(self) -> None:
        has_ipv6 = socket.has_dualstack_ipv6()
        ipv6 = [("::1", "[::1]", False), ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]", False)] if has_ipv6 else []
        for host, shown, is_warned in (
            ("", "[::]" if has_ipv6 else "0.0.0.0", True),
            ("0.0.0.0", "0.0.0.0", True),
            ("127.0.0.1", "127.0.0.1", False),
            ("localhost", "", False),
            *ipv6,
        ):
            with self.subTest(host):
                with self.serving_here("--db", f"{host}.db", KVSERVER_HOST=host) as (port, lines, log):
                    self.assertIn(f"listening on http://{shown}", lines[-1])
                    self.assert_curl_works(lines)
                warning = r"\A\S+ \S+ WARNING plain HTTP sends passwords[^\n]*\n.* INFO started"
                self.assertEqual(is_warned, bool(re.search(warning, log.getvalue())), log.getvalue())
                if host in ("", "0.0.0.0"):
                    self.check_reachable(lines[0], port)
                else:
                    self.assertEqual(lines[-1].replace("listening on", "open in a browser:") + "/", lines[0])

    def test_the_warning_about_plain_http_comes_before_that_about_another_server(self) -> None:
        with kvserver.lock_database(self.database), self.serving_here(KVSERVER_HOST="") as (_, _, log):
            pass
        warning = r"\A\S+ \S+ WARNING plain HTTP [^\n]*\n\S+ \S+ WARNING another server runs on .*\n.* INFO started"
        self.assertRegex(log.getvalue(), warning)

    def check_reachable(self, line: str, port: int) -> None:
        """Check that a line names this machine, and its own address if it has a network."""
        urls = line.removeprefix("open in a browser: ").split(" or ")
        self.assertEqual(f"http://{socket.gethostname().partition('.')[0]}.local:{port}/", urls.pop(0))
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("198.51.100.1", 9))
            self.assertEqual([f"http://{probe.getsockname()[0]}:{port}/"], urls)
            self.assertEqual(200, urllib.request.urlopen(urls[0] + "health", timeout=WAIT_SECONDS).status)

    def test_flag_beats_environment_beats_file_beats_default(self) -> None:
        (self.folder / "sub").mkdir()
        config = "sub/config.json"
        self.write(config, '{"base_path": "/file", "log_requests": true, "db": "file.db"}')
        self.add_user("alice", "--db", "sub/file.db")
        del self.environment["KVSERVER_DB"]
        database = {"KVSERVER_DB": "sub/file.db"}
        cases: list[tuple[str, dict[str, str], str, bool]] = [
            ("", database, "/iotpersistenceapi", False),
            ("--log-requests", database, "/iotpersistenceapi", True),
            ("", {"KVSERVER_CONFIG": config, "KVSERVER_BASE_PATH": ""}, "/file", True),
            (f"--config {config}", {}, "/file", True),
            (f"--config {config}", {"KVSERVER_BASE_PATH": "/environment"}, "/environment", True),
            (f"--config {config} --base-path flag/", {"KVSERVER_BASE_PATH": "/environment"}, "/flag", True),
            (f"--config {config}", {"KVSERVER_LOG_REQUESTS": "0"}, "/file", False),
            (f"--config {config} --no-log-requests", {"KVSERVER_LOG_REQUESTS": "true"}, "/file", False),
        ]
        for arguments, environment, path, is_logged in cases:
            with self.subTest(arguments=arguments, environment=environment):
                with self.serving_here(*arguments.split(), **environment) as (port, _, log):
                    self.assertEqual((200, b"{}"), self.request(port, path + "/list"))
                self.assertEqual(is_logged, f"request: method=GET path='{path}/list'" in log.getvalue())
        self.assertIn("alice", self.succeed("users", KVSERVER_CONFIG=config))

    def test_the_database_of_a_service_is_in_its_first_folder_unless_it_is_named(self) -> None:
        del self.environment["KVSERVER_DB"]
        (self.folder / "state").mkdir()
        self.write("config.json", '{"db": "config.db"}')
        self.environment["STATE_DIRECTORY"] = f"{self.folder}/state:{self.folder}/other"
        for name, environment in (("state/kvserver.db", {}), ("config.db", {"KVSERVER_CONFIG": "config.json"})):
            self.run_process("adduser", "alice", "--password-stdin", stdin="a password", **environment)
            self.assertTrue((self.folder / name).exists(), name)

    def test_systemd_is_told_when_the_server_listens(self) -> None:
        abstract = ["\0kvserver-test-" + os.path.basename(self.folder)] if sys.platform == "linux" else []
        for name in (str(self.folder / "notify"), *abstract):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
                notify_socket.bind(name)
                notify_socket.settimeout(WAIT_SECONDS)
                with self.serving_here(NOTIFY_SOCKET=name.replace("\0", "@")):
                    self.assertEqual(b"READY=1", notify_socket.recv(100))
        with self.serving_here(NOTIFY_SOCKET="/nowhere/at/all") as (port, _, log):
            self.assertEqual((200, b"ok"), self.request(port, "/health"))
        self.assertIn("cannot tell systemd that the server is ready: No such file", log.getvalue())

    def test_limits_and_proxies_can_be_set_in_every_way(self) -> None:
        config = {"trusted_proxy": ["192.0.2.0/24", "127.0.0.1"], "max_connections": 3, "max_db_mb": "1"}
        self.write("config.json", json.dumps(config))
        self.add_user("alice")
        cases: list[tuple[str, dict[str, str]]] = [
            ("--config config.json", {}),
            ("--trusted-proxy ::1 --trusted-proxy 127.0.0.0/8 --max-db-mb 1", {}),
            ("--trusted-proxy=::1,127.0.0.1 --max-connections=3", {"KVSERVER_MAX_DB_MB": "1"}),
            ("--max-db-mb 1", {"KVSERVER_TRUSTED_PROXY": "::1, 127.0.0.1,", "KVSERVER_MAX_CONNECTIONS": "3"}),
        ]
        for arguments, environment in cases:
            with self.subTest(arguments):
                with self.serving_here(*arguments.split(), **environment) as (port, _, log):
                    self.assertEqual(507, self.request(port, "/set?key=a", body="x" * 1024 * 1024)[0])
                    proxied = {"X-Forwarded-For": "203.0.113.9"}
                    self.assertEqual(401, self.request(port, "/list", password="wrong", **proxied)[0])
                self.assertIn("login failed: user='alice' address=203.0.113.9\n", log.getvalue())

    def test_other_origins_can_be_allowed_in_every_way(self) -> None:
        self.write("config.json", '{"cors_origin": ["http://a", "http://b:1"]}')
        cases: tuple[tuple[str, dict[str, str]], ...] = (
            ("--config config.json", {}),
            ("--cors-origin http://A:80 --cors-origin http://b:1", {"KVSERVER_CORS_ORIGIN": "http://c"}),
            ("", {"KVSERVER_CORS_ORIGIN": "http://a, HTTP://B:1"}),
        )
        for arguments, environment in cases:
            with self.serving_here(*arguments.split(), **environment) as (port, _, _):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
                shared = []
                for origin in ("http://a", "http://b:1", "http://c"):
                    connection.request("GET", "/health", headers={"Origin": origin})
                    shared.append(read_answer(connection.getresponse()).headers.get("access-control-allow-origin"))
                connection.close()
                self.assertEqual(["http://a", "http://b:1", None], shared, arguments)

    def test_origins_that_no_browser_sends_are_refused(self) -> None:
        message = "it must be *, https://HOST:PORT or chrome-extension://ID, without a path"
        for text in (
            *("", "null", "x", "http:", "http://", "https://x/", "https://x:", "https://x:0", "https://x:080"),
            *("https://x:65536", "https://u@x", "https://*.x", "https://x?", "https://x#", "https://é", "https://x y"),
            *("ftp://x", "chrome-extension://", "chrome-extension://x:1", "capacitor://x", "capacitor://localhost:1"),
            *("https://x,", "https://x,null", "**"),
        ):
            code, _, errors = self.run_program("serve", f"--cors-origin={text}")
            self.assertEqual(2, code, text)
            self.assertTrue(errors.endswith(f"argument --cors-origin: {message}\n"), text)
        for text in ("https://x:65535", "http://127.0.0.1:1", "chrome-extension://abcdef", "capacitor://localhost"):
            self.assertEqual([text], kvserver.parse_origins(text.upper()))

    def test_the_last_start_decides_about_the_history_and_commands_obey(self) -> None:
        self.add_user("alice")
        rows = "SELECT number, CAST(value AS TEXT) FROM history ORDER BY number"
        self.succeed("set", "alice", "a", "0")
        with self.serving_here("--history", "10000") as (port, _, _):
            for value in ("1", "2"):
                self.succeed("set", "alice", "a", value)
            status, body = self.request(port, "/history?key=a")
            self.assertEqual((200, ["2", "1"]), (status, [change["value"] for change in json.loads(body)]))
            arguments = ("serve", "--history", "1", "--port", str(port))
            self.assert_fails("is kvserver running already?", *arguments)
            self.assertEqual([(1, "1"), (2, "2")], self.sql(rows), "a start that fails changes nothing")
        self.succeed("backup", "backup.db")
        self.assertEqual(["alice", "a", "2"], list(json.loads(self.succeed("export")).values())[:3])
        self.write("lines", '{"user": "alice", "key": "a", "value": "3", "updated": "2020-01-01T00:00:00Z"}')
        self.succeed("import", "lines")
        self.succeed("del", "alice", "a")
        self.assertEqual([(1, "1"), (2, "2"), (3, "3"), (4, None)], self.sql(rows))
        with self.serving_here(KVSERVER_HISTORY="2") as (_, _, log):
            self.assertEqual([(3, "3"), (4, None)], self.sql(rows))
            message = "WARNING the history keeps 2 changes of a value now, not 10000; see --history"
            self.assertIn(message, log.getvalue())
        self.succeed("restore", "backup.db")
        self.assertEqual([(1, "1"), (2, "2")], self.sql(rows))
        self.write("config.json", '{"history": 1}')
        with self.serving_here("--config", "config.json"):
            self.assertEqual([(2, "2")], self.sql(rows))
        with self.serving_here() as (port, _, _):
            self.succeed("set", "alice", "a", "4")
            self.assertEqual((404, []), (self.request(port, "/history?key=a")[0], self.sql(rows)))

    def test_bad_settings_are_named(self) -> None:
        self.environment.clear()
        for message, *texts in (
            ("prot", '{"prot": 80}'),
            ("port", '{"port": 65536}', '{"port": "x"}', '{"port": true}', '{"port": 1.5}', '{"port": [80]}'),
            ("repeated", '{"port": 1, "port": 2}'),
            ("db", '{"db": 5}'),
            ("host", '{"host": null}'),
            ("log_requests", '{"log_requests": "perhaps"}'),
            ("base_path", '{"base_path": "/a b"}'),
            ("config", '{"config": "x"}'),
            ("a whole number from 0 to 10000", '{"history": 10001}', '{"history": -1}', '{"history": "all"}'),
            ("a whole number from 1 to 999999", '{"max_connections": 0}', '{"max_db_mb": "1 GB"}'),
            ("such as 10.1.0.0/16", '{"trusted_proxy": ["10.0.0.1/8"]}', '{"trusted_proxy": [1]}'),
            ("such as 10.1.0.0/16", '{"trusted_proxy": "proxy.example"}'),
            (
                "it must be *, https://HOST:PORT",
                '{"cors_origin": ["https://a.example", "null"]}',
                '{"cors_origin": 80}',
            ),
            ("not a JSON object", "[]"),
            ("config.json", "{"),
            ("cannot use the database", '{"db": "a\\u0000b"}'),
        ):
            for text in texts:
                self.write("config.json", text)
                code = 1 if message == "cannot use the database" else 2
                self.assert_fails(message, "serve", "--config", "config.json", code=code)
        self.assert_fails("missing.json: No such file", "serve", "--config", "missing.json")
        self.assert_fails("KVSERVER_PORT is '65536'", "serve", code=2, KVSERVER_PORT="65536")
        self.assert_fails("KVSERVER_LOG_REQUESTS is 'yes'", "serve", code=2, KVSERVER_LOG_REQUESTS="yes")
        self.assert_fails("KVSERVER_PROT", "serve", code=2, KVSERVER_PROT="80")
        self.assert_fails("KVSERVER_BD", "users", code=2, KVSERVER_BD="x.db")
        self.assertEqual(["config.json"], os.listdir(self.folder))

    def test_wrong_usage_exits_with_2(self) -> None:
        bad_flags = ("--port 65536", "--port -1", "--port x", "--base-path /%", "--x", "extra")
        exposed = ("adduser alice password", "adduser alice --password password")  # in the list of processes
        for line in ("", "fly", "users --port 1", "adduser", *exposed, *("serve " + flag for flag in bad_flags)):
            with self.subTest(line):
                code, output, errors = self.run_program(*line.split())
                self.assertEqual((2, ""), (code, output))
                self.assertNotIn("Traceback", errors)
        self.assertRegex(errors, r"too many arguments; one that contains spaces or \* needs quotes\n\Z")

    def test_a_mistyped_command_or_flag_gets_the_likely_one_and_no_command_the_help(self) -> None:
        kvserver = "python3 kvserver.py"
        code, _, errors = self.run_program("--db", "x.db")
        self.assertEqual(2, code)
        self.assertEqual(self.succeed("--db", "x.db", "--help") + f"\nTo begin: {kvserver} --db x.db serve\n", errors)
        for line, mistake in (
            ("usrs", f"command usrs; did you mean {kvserver} users?"),
            ("--db x.db deltokn alice 1", f"command deltokn; did you mean {kvserver} --db x.db deltoken?"),
            ("USERS", f"command USERS; did you mean {kvserver} users?"),
            ("fly --away", f"command fly; list all with: {kvserver} --help"),
            ("serve --prot=1", f"flag --prot; did you mean {kvserver} serve --port?"),
            ("serve --cors '*'", f"flag --cors; did you mean {kvserver} serve --cors-origin?"),
            ("serve --db x.db -port 1", f"flag -port; did you mean {kvserver} serve --port?"),
            ("serve --x", f"flag --x; list all with: {kvserver} serve --help"),
            ("--port 1 serve", f"flag --port; list all with: {kvserver} --help"),
        ):
            self.assertEqual((2, "", f"kvserver: there is no {mistake}\n"), self.run_program(*line.split()))

    def test_the_database_may_be_named_before_the_command(self) -> None:
        for number, flags in enumerate((("--db", "1.db"), ("--db=2.db",)), 1):
            self.add_user("alice", "--db", f"{number}.db")
            self.assertIn("alice", self.succeed(*flags, "users"))
            self.assertIn(
                "alice", self.succeed("--db", "users", "users", "--db", f"{number}.db"), "the later one counts"
            )

    def test_hints_repeat_how_the_program_was_started(self) -> None:
        self.add_user("alice", "--db", "a b.db")
        self.write("config.json", '{"db": "a b.db"}')
        self.assert_fails("list all with: python3 kvserver.py --db 'a b.db' users; ", "passwd", "eve", "--db", "a b.db")
        service: dict[str, Any] = {
            "STATE_DIRECTORY": str(self.folder),
            "KVSERVER_DB": "a b.db",
        }  # a shell of root has neither
        self.assert_fails("list all with: python3 kvserver.py --db 'a b.db' users; ", "passwd", "eve", **service)
        with self.serving_here("--config", "config.json", KVSERVER_DB="") as (_, lines, _):
            self.assertEqual("to set a new password: python3 kvserver.py --db 'a b.db' passwd alice", lines[1])
        shutil.copy(PROGRAM, self.folder)
        python = self.folder / "python"
        python.symlink_to(sys.executable)
        for start in (
            [str(python), "kvserver.py"],
            [str(python), "-B", "./kvserver.py"],
            [str(python), "-m", "kvserver"],
        ):
            options: dict[str, Any] = {"cwd": self.folder, "env": self.environment}
            code, output, errors = run([*start, "--db", "a b.db", "tokens", "eve"], **options)
            self.assertEqual((1, ""), (code, output))
            self.assertIn(f"list all with: {shlex.join(start)} --db 'a b.db' users; ", errors)
            self.assertIn(f"\nTo begin: {shlex.join(start)} serve\n", run(start, **options)[2])
            self.assertIn(f"list all with: {shlex.join(start)} --help\n", run([*start, "fly"], **options)[2])

    def test_version_and_help(self) -> None:
        self.assertEqual(f"kvserver {kvserver.__version__}\n", self.succeed("--version"))
        parser, commands = kvserver.build_parser("python3 kvserver.py")
        self.assertEqual([name for name, *_ in kvserver.COMMANDS], list(commands))
        for name, described in (("", parser), *commands.items()):
            output = self.succeed(*name.split(), "--help", COLUMNS="80")
            self.assertLessEqual(max(map(len, output.splitlines())), 80)
            self.assertRegex(output, r"\n  --db FILE +database \(default: kvserver.db next to the program\)\n")
            self.assertTrue(described.description)
            for action in described._actions:
                self.assertTrue(action.help or action.choices, f"{name} does not explain {action.dest}")
            self.assertRegex(kvserver.__doc__ or "", rf"\b{name}\b")

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no /dev/full")
    def test_a_full_or_broken_output_is_one_line_and_a_password_or_token_there_is_taken_back(self) -> None:
        environment = {name: text for name, text in self.environment.items() if name != "PYTHONUNBUFFERED"}
        for arguments in ("serve", "--help", "users"):
            for output, reason in (("/dev/full", "No space left on device"), ("pipe", "Broken pipe")):
                reader, writer = os.pipe()
                os.close(reader)
                with os.fdopen(writer, "wb") as broken, open("/dev/full", "wb") as full:
                    options: Any = {"stdout": full if output == "/dev/full" else broken, "stderr": subprocess.PIPE}
                    command = [*CHEAP_PROGRAM, arguments]
                    code, _, errors = run(command, env=environment, capture_output=False, **options)
                lines = [line for line in errors.splitlines() if " INFO started: " not in line]
                self.assertEqual((1, [f"kvserver: standard input or output: {reason}"]), (code, lines))
        self.assertEqual(NO_USERS, self.succeed("users"))
        self.add_user("alice")
        with open("/dev/full", "wb") as full:
            options = {"stdout": full, "stderr": subprocess.PIPE}
            code, _, errors = run(
                [*CHEAP_PROGRAM, "addtoken", "alice"], env=environment, capture_output=False, **options
            )
        self.assertEqual((1, "kvserver: standard input or output: No space left on device\n"), (code, errors))
        self.assertIn("no tokens", self.succeed("tokens", "alice"))

    def test_an_address_that_cannot_be_listened_on_is_named(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            for host, port in (
                ("127.0.0.1", str(taken.getsockname()[1])),
                *((host, "0") for host in ("no.such.host.invalid", "a..b", "x" * 70)),
            ):
                self.assert_fails(f"cannot listen on {host}", "serve", "--host", host, "--port", port)


HANG = """
def hang(*arguments):
    print("hanging", flush=True)
    threading.Event().wait()
"""


class Units(CommandCase):
    """The unit for systemd, for a program in /opt and Debian's Python."""

    def setUp(self) -> None:
        super().setUp()
        self.environment.clear()
        self.enterContext(mock.patch.object(sys, "executable", "/usr/bin/python3"))
        self.enterContext(mock.patch.object(kvserver, "__file__", "/opt/kvserver/kvserver.py"))

    def unit(self, *flags: str, **environment: str) -> tuple[list[str], list[str]]:
        """Return the comments, without their marks, and the other lines."""
        lines = self.succeed("unit", *flags, **environment).splitlines()
        comments = [line[1:].strip() for line in lines if line.startswith("#")]
        return comments, [line for line in lines if not line.startswith("#")]

    def test_the_usual_unit(self) -> None:
        comments, lines = self.unit("--trusted-proxy", "127.0.0.1", "--no-log-requests", "--base-path", "/")
        flags = "--trusted-proxy 127.0.0.1 --no-log-requests --base-path /"
        python = "/usr/bin/python3 /opt/kvserver/kvserver.py"
        path = "/etc/systemd/system/kvserver.service"
        self.assertEqual(f"{python} unit {flags} | sudo tee {path} >/dev/null", comments[1])
        run = "sudo systemd-run -qt -p User=kvserver -p DynamicUser=yes -p StateDirectory=kvserver"
        self.assertEqual(f"{run} {python} adduser USER --admin --db /var/lib/kvserver/kvserver.db", comments[3])
        self.assertEqual(["sudo systemctl daemon-reload", "sudo systemctl enable --now kvserver"], comments[2::2])
        self.assertIn(f"ExecStart={python} serve {flags}", lines)
        targets = "network-online.target time-sync.target"
        for line in (f"Wants={targets}", f"After={targets}", "Type=notify", "Restart=on-failure", "RestartSec=5"):
            self.assertIn(line, lines)
        for line in ("DynamicUser=yes", "StateDirectory=kvserver", "CapabilityBoundingSet=", "ProtectHome=yes"):
            self.assertIn(line, lines)
        self.assertNotIn("ReadWritePaths", "".join(lines))
        self.assertEqual([], os.listdir(self.folder))

    def test_ports_below_1024_need_a_capability(self) -> None:
        for port in ("1", "1023"):
            _, lines = self.unit("--port", port)
            self.assertIn("AmbientCapabilities=CAP_NET_BIND_SERVICE", lines)
            self.assertIn("CapabilityBoundingSet=CAP_NET_BIND_SERVICE", lines)
            self.assertNotIn("PrivateUsers=yes", lines)  # a capability counts only among all users
        for port in ("1024", "0"):
            _, lines = self.unit(
                "--port", port, KVSERVER_PORT="80", KVSERVER_DB="x.db"
            )  # the service has another environment
            self.assertIn("CapabilityBoundingSet=", lines)
            self.assertIn("PrivateUsers=yes", lines)
            self.assertIn(f"ExecStart=/usr/bin/python3 /opt/kvserver/kvserver.py serve --port {port}", lines)

    def test_paths_are_absolute_and_quoted(self) -> None:
        (self.folder / 'a "b" 50%').mkdir()
        database = f'{self.folder}/a "b" 50%/$x.db'
        comments, lines = self.unit("--db", 'a "b" 50%/$x.db', "--tls-cert", "c", "--tls-key=../k", "--config=")
        quoted = f'"{self.folder}/a \\"b\\" 50%%'
        tls = f'--tls-cert {self.folder}/c --tls-key {os.path.dirname(self.folder)}/k --config ""'
        command = f'ExecStart=/usr/bin/python3 /opt/kvserver/kvserver.py serve --db {quoted}/$$x.db" {tls}'
        self.assertIn(command, lines)
        self.assertIn(f'ReadWritePaths={quoted}"', lines)
        self.assertIn(f"adduser USER --admin --db '{database}'", "\n".join(comments))
        self.write("config.json", '{"db": "new.db", "port": 80}')
        _, lines = self.unit("--config", "config.json")
        self.assertIn(f"ReadWritePaths={self.folder}", lines)
        command = f"/usr/bin/python3 /opt/kvserver/kvserver.py serve --config {self.folder}/config.json"
        self.assertIn(f"ExecStart={command}", lines)
        self.assertIn("CapabilityBoundingSet=CAP_NET_BIND_SERVICE", lines)
        _, lines = self.unit("--db", kvserver.DEFAULT_DATABASE)
        self.assertIn(f"ReadWritePaths={os.path.dirname(kvserver.DEFAULT_DATABASE)}", lines)
        _, lines = self.unit("--db", "/var/lib/kvserver/other.db")
        self.assertIn("DynamicUser=yes", lines)
        self.assertNotIn("ReadWritePaths", "".join(lines))

    def test_the_owner_of_the_files_runs_the_service_if_others_cannot(self) -> None:
        database, key = ("--db", "/srv/x/y.db"), os.path.expanduser("~root/key")
        for program, flags, owner, user, hint in (
            ("/opt/kvserver.py", database, 1000, "1000", ""),
            (
                "/opt/kvserver.py",
                database,
                0,
                "kvserver",
                "user kvserver (sudo useradd --system kvserver) own /srv/x and",
            ),
            ("/home/pi/kv/kvserver.py", (), 1000, "1000", "left out, for /home/pi/kv/kvserver.py"),
            ("/home/pi/kv/kvserver.py", database, 1000, "1000", "First, let user 1000 own /srv/x and its files"),
            ("/opt/kvserver.py", ("--tls-key", key), 0, "kvserver", f"left out, for {key}"),
        ):
            owners = {"/home/pi": owner, "/srv/x": 0 if "/home" in program else owner}
            find_owner = mock.patch.object(kvserver, "owner_of", collections.defaultdict(int, owners).__getitem__)
            with mock.patch.object(kvserver, "__file__", program), find_owner:
                comments, lines = self.unit(*flags)
            is_dynamic = "no" if flags == database or user != "kvserver" else "yes"
            self.assertEqual([f"User={user}", f"DynamicUser={is_dynamic}"], [line for line in lines if "User=" in line])
            self.assertIn(f" -p User={user} -p DynamicUser={is_dynamic} ", "\n".join(comments))
            self.assertIn(hint, "\n".join(comments))
            self.assertEqual(" own " in hint, " own " in "".join(comments))
            self.assertEqual("/home" not in program and key not in flags, "ProtectHome=yes" in lines)
        self.unit("--db", "/no/such/folder/x.db")  # it may be made later


class Stopping(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        self.add_user("alice")

    def test_signals_end_the_server_at_once_and_once_only(self) -> None:
        # Both signals come again while the interpreter ends.
        again = "import atexit, os\nfor number in 2, 15: atexit.register(os.kill, os.getpid(), number)\n"
        names = ("FIRST_BYTE_SECONDS", "STOP_REQUEST_SECONDS", "STOP_SECONDS", "EXIT_SECONDS")
        patient = program(again, **dict.fromkeys(names, 1000))
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number), self.serving(command=patient) as (process, port, _):
                idle = self.send(port)
                process.send_signal(signal.SIGHUP)  # means nothing without TLS
                self.assertEqual(200, self.request(port, "/set?key=a&value=1")[0])
                self.assertNotIn("ERROR", self.stop(process, number))
                self.assertEqual(b"", idle.recv(1))
                self.assertEqual(["test.db", "test.db-lock"], sorted(os.listdir(self.folder)))

    def test_a_response_and_a_commit_that_never_come_are_not_waited_for(self) -> None:
        route = 'kvserver.Route("/list", ("GET",), hang, kvserver.ANYONE, kvserver.THREAD)'
        route = f'kvserver.BY_PATH_AND_METHOD["/list"] = {{"GET": {route}}}\n'
        for change, target in ((route, "/list"), ("kvserver.Store.commit = hang\n", "/set?key=a&value=1")):
            command = program(HANG + change, STOP_REQUEST_SECONDS=0.1, STOP_SECONDS=0.2, EXIT_SECONDS=0.4)
            with self.subTest(change), self.serving(command=command) as (process, port, _):
                self.send(port, f"GET {target} HTTP/1.1")
                assert process.stdout
                self.assertEqual("hanging\n", process.stdout.readline())
                self.stop(process)

    def test_requests_under_way_are_finished(self) -> None:
        head = ("POST /set?key=a HTTP/1.1", "Content-Length: 4", "Expect: 100-continue")
        with self.serving(command=program(STOP_REQUEST_SECONDS=1.5)) as (process, port, _):
            first, second = self.send(port, *head), self.send(port, *head)
            for connection in (first, second):
                self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", connection.recv(65536))
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(OSError):
                while True:  # the server sees the signal, and then refuses connections
                    socket.create_connection(("127.0.0.1", port), WAIT_SECONDS).close()
            first.sendall(b"last")
            answer = first.recv(65536)
            self.assertTrue(answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer)
            self.assertIn(b"Connection: close\r\n", answer)
            self.assertTrue(second.recv(65536).startswith(b"HTTP/1.1 408 "))
            self.assertGreater(time.monotonic() - started, 1.4)
            self.assertEqual(0, process.wait(WAIT_SECONDS))
        self.assertEqual({("alice", "a"): "last"}, self.pairs())


# A request of a history: the times of request and response (infinity for none), the kind, the value that it set or
# returned, its success, and the value to replace.
Operation = tuple[float, float, str, str | None, bool, str | None]
# Each returns success and the next value, from the value before, the operation's own value, and the one to replace.
EFFECTS: dict[str, Callable[[str | None, str | None, str | None], tuple[bool, str | None]]] = {
    "get": lambda before, value, old: (before is not None, before),
    "set": lambda before, value, old: (True, value),
    "replace": lambda before, value, old: (True, value) if before == old else (False, before),
    "del": lambda before, value, old: (before is not None, None),
    "incr": lambda before, value, old: (True, str(int(before or 0) + 1)),
    "toggle": lambda before, value, old: (True, "off" if before == "on" else "on"),
}


def is_linearizable(history: Sequence[Operation]) -> bool:
    """Tell whether one order of the operations on a key explains all responses.

    An operation happens at one moment between its request and its response (Herlihy and Wing, 1990). Without a
    response, it happens at any later moment or never. The search is Wing and Gong's, and remembers its tries.
    """
    operations = sorted(operation for operation in history if operation[2] != "get" or operation[1] < math.inf)
    answered = sum(1 << i for i, operation in enumerate(operations) if operation[1] < math.inf)
    todo: list[tuple[int, str | None]] = [(0, None)]
    tried = set(todo)
    while todo:
        done, before = todo.pop()
        if done & answered == answered:
            return True
        earliest_end = math.inf
        for i, (begun, ended, kind, value, succeeded, old) in enumerate(operations):
            if begun > earliest_end:
                break
            if done >> i & 1:
                continue
            earliest_end = min(earliest_end, ended)
            succeeds, after = EFFECTS[kind](before, value, old)
            shows = succeeds and kind in ("get", "incr", "toggle")
            is_possible = ended == math.inf or (succeeds == succeeded and (not shows or value == after))
            following = (done | 1 << i, after)
            if is_possible and following not in tried:
                tried.add(following)
                todo.append(following)
    return False


class Killed(CommandCase):
    """Two servers on one database, one killed with -9 and the other stopped, again and again, while clients write."""

    def test_the_checker_knows_good_from_bad(self) -> None:
        for is_good, *rows in (
            (True, (0, 1, "set", "a"), (2, 3, "get", "a"), (4, 5, "del", None), (6, 7, "get", None)),
            (False, (0, 1, "set", "a"), (2, 3, "get", None)),
            (False, (0, 1, "set", "a"), (2, 3, "set", "b"), (4, 5, "get", "a")),
            (True, (0, 9, "set", "a"), (1, 2, "get", None), (3, 4, "get", "a")),
            (False, (0, 9, "set", "a"), (1, 2, "get", "a"), (3, 4, "get", None)),
            (True, (0, math.inf, "set", "a"), (1, 2, "get", None), (3, 4, "get", "a")),
            (False, (0, math.inf, "set", "a"), (1, 2, "get", "a"), (3, 4, "get", None)),
            (True, (0, 1, "incr", "1"), (0, 1, "incr", "2"), (2, math.inf, "incr", None), (3, 4, "incr", "4")),
            (False, (0, 1, "incr", "1"), (0, 1, "incr", "1")),
            (False, (0, 1, "toggle", "off"), (2, 3, "toggle", "on")),
            (False, (0, 1, "replace", "a"), (0, 1, "replace", "b")),
        ):
            history = [(*row, row[2] != "get" or row[3] is not None, None) for row in rows]
            self.assertEqual(is_good, is_linearizable(history), rows)

    def test_all_responses_are_linearizable_over_two_servers_and_no_write_is_lost(self) -> None:
        self.add_user("alice")
        seed, answered = random.randrange(1_000_000), list[int]()
        histories: dict[str, list[Operation]] = collections.defaultdict(list)
        on_x = ("set", "replace", "replace", "replace", "get", "get", "del")
        kinds = {"x": on_x, "n": ("incr", "incr", "incr", "get", "del"), "t": ("toggle", "toggle", "get", "del")}

        def send(chance: random.Random, ports: tuple[int, int], new: str) -> None:
            key = chance.choice(("x", "n", "t", new))  # the last one is new, as the value
            kind = chance.choice(kinds.get(key, ("set",)))
            value, old = new if kind in ("set", "replace") else None, None
            if kind == "replace":
                old = chance.choice([None, *(operation[3] for operation in histories[key][-3:])])
            target = url("/set", key=key, value=value) if value else url("/" + kind, key=key)
            target += "" if kind != "replace" else url("", old=old).replace("?", "&") if old else "&nx=1"
            begun, ended, succeeded = time.monotonic(), math.inf, False
            try:
                status, body = self.request(chance.choice(ports), target)
                ended, succeeded = time.monotonic(), status == 200
                value = value or body.decode()
                answered.append(status)
            finally:
                histories[key].append((begun, ended, kind, value, succeeded, old))

        def work(ports: tuple[int, int], client: str) -> None:
            chance = random.Random(f"{seed} {client}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                for number in itertools.count():
                    send(chance, ports, f"{client}-{number}")

        def follow(port: int) -> list[tuple[str, ...]]:
            connection, events = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS), []
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException, LookupError):
                for event in Events(connection, basic("alice", "a password")):
                    events.append(event)  # noqa: PERF402 - the others stay when the server dies
            return events

        serve = functools.partial(self.serving, "--history", "10000", command=program(RESTART_SECONDS=0.05))
        streams = list[list[tuple[str, ...]]]()
        for kill in range(20 if LONG else 3):
            known = {key for _, key in self.pairs()} - {"x", "n", "t"}  # the others are never deleted
            with serve() as (first, port, _), serve() as (second, other, _):
                following = in_threads(follow, [(port,), (other,)])
                clients = in_threads(work, [((port, other), f"{kill}-{client}") for client in range(6)])
                enough = len(answered) + random.Random(f"{seed} {kill}").randrange(50, 200)
                wait_until(lambda enough=enough: len(answered) > enough)  # type: ignore[misc]
                first.kill()
                self.assertNotIn("ERROR", self.stop(second))
                join(clients)
                for events in join(following):
                    begin = itertools.takewhile(lambda event: event[0] != "ready", events)
                    self.assertLessEqual(known if ("ready",) in events else set(), {event[1] for event in begin})
                    streams.append(events)
        pairs = {key: value for (_, key), value in self.pairs().items()}
        self.assertLessEqual(set(pairs), set(histories))
        for key, history in histories.items():
            history.append((math.inf, 0, "get", pairs.get(key), key in pairs, None))
            self.assertTrue(is_linearizable(history), f"key {key}, seed {seed}")
        self.assertLessEqual(set(answered), {200, 404, 409})
        self.assertEqual([("ok",)], self.sql("PRAGMA integrity_check"))
        self.assert_histories(histories, pairs)
        self.assert_streams(streams)

    def assert_streams(self, streams: Iterable[list[tuple[str, ...]]]) -> None:
        """Check that each stream shows the values of each key in the order of the commits, also after a reset."""
        kept = collections.defaultdict[str, list[str | None]](list)
        for key, value in self.sql("SELECT key, value FROM history ORDER BY key, number"):
            kept[key].append(value and value.decode())
        for events in streams:
            places = dict[str, int]()
            for name, *pair in events:
                if name in ("set", "del"):
                    key, value = pair[0], pair[1] if name == "set" else None
                    self.assertIn(value, kept[key][places.get(key, 0) :], f"{key}: not stored, or earlier")
                    places[key] = kept[key].index(value, places.get(key, 0))
        self.assertTrue(any(("reset",) in events for events in streams))

    def assert_histories(self, histories: Mapping[str, list[Operation]], pairs: Mapping[str, str]) -> None:
        """Check that the server's own history has each successful change once, in the order of the commits."""
        kept = collections.defaultdict[str, list[tuple[float, str | None]]](list)
        for key, number, moment, value in self.sql("SELECT key, number, time, value FROM history ORDER BY key, number"):
            kept[key].append((moment, value and value.decode()))
            self.assertEqual(len(kept[key]), number)
        for key, history in histories.items():
            values = [value for _, value in kept[key]]
            self.assertEqual(pairs.get(key), values[-1] if values else None, "the newest change is the stored value")
            self.assertTrue(all(old != new for old, new in itertools.pairwise((None, *values))), (key, values))
            times = [moment for moment, _ in kept[key]]  # that of a deletion has milliseconds
            self.assertTrue(all(old < new + 0.002 for old, new in itertools.pairwise(times)), (key, times))
            changes = [operation for operation in history if operation[2] != "get" and operation[0] < math.inf]
            lost = sum(operation[1] == math.inf for operation in changes)
            made = [operation for operation in changes if operation[1] < math.inf and operation[4]]
            answered = collections.Counter(None if kind == "del" else value for _, _, kind, value, _, _ in made)
            self.assertFalse(answered - collections.Counter(values), f"{key}: answered, but not in the history")
            self.assertLessEqual(len(values), len(made) + lost, f"{key}: in the history, but not made")
            latest = -math.inf
            unique = [each for each in made if each[2] in ("set", "replace")]  # these values were set once
            for begun, ended, *_ in sorted(unique, key=lambda each: values.index(each[3])):
                self.assertGreaterEqual(ended, latest, f"{key}: a later change has an earlier place")
                latest = max(latest, begun)


@unittest.skipUnless(hasattr(resource, "prlimit"), "only Linux can change the limits of a running process")
class Exhausted(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        self.add_user("alice")

    def limit(self, process: subprocess.Popen[str], kind: int, limit: int = resource.RLIM_INFINITY) -> None:
        """Limit a resource of a process, or end that."""
        hard_limit = resource.prlimit(process.pid, kind)[1]
        resource.prlimit(process.pid, kind, (hard_limit if limit == resource.RLIM_INFINITY else limit, hard_limit))

    def test_without_descriptors_it_neither_spins_nor_fills_the_log_and_recovers(self) -> None:
        with self.serving() as (process, port, _), locked(self.database):

            def cpu_seconds() -> float:
                with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
                    fields = file.read().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

            # It waits for its response, so it is not closed to make room.
            self.send(port, "GET /set?key=a&value=1 HTTP/1.1")
            for _ in range(2):
                self.assertEqual(404, self.request(port, "/get?key=a")[0])
            assert process.stderr
            self.limit(process, resource.RLIMIT_NOFILE, 3)
            late = self.send(port, "GET /nowhere HTTP/1.1")
            lines = [process.stderr.readline() for _ in range(2)]
            begun, cpu_begun = time.monotonic(), cpu_seconds()
            lines.append(process.stderr.readline())
            seconds, used_seconds = time.monotonic() - begun, cpu_seconds() - cpu_begun
            self.limit(process, resource.RLIMIT_NOFILE)
            self.assertIn("started: ", lines[0])
            for line in lines[1:]:
                self.assertIn("cannot accept a connection: Too many open files", line)
            self.assertGreater(seconds, 0.8)
            self.assertLess(used_seconds, 0.3 * seconds)
            self.assertIn(b" 404 ", late.recv(65536))

    def test_a_disk_that_takes_nothing_is_503_and_reads_go_on(self) -> None:
        with self.serving() as (process, port, _):
            self.assertEqual(200, self.request(port, "/set?key=a&value=1")[0])
            self.limit(process, resource.RLIMIT_FSIZE, 1000)
            status, body = self.request(port, "/set?key=a&value=2")
            self.assertIn(status, (503, 507))
            self.assertRegex(body, rb"\A[a-z].*[a-z]\Z")
            self.assertEqual((200, b"1"), self.request(port, "/get?key=a"))
            self.assertEqual((200, b'{"a":"1"}'), self.request(port, "/list"))
            self.limit(process, resource.RLIMIT_FSIZE)
            self.assertEqual((200, b"Success"), self.request(port, "/set?key=a&value=3"))
            self.assertEqual((200, b"3"), self.request(port, "/get?key=a"))

    def test_a_flood_of_guesses_costs_little_memory_and_no_time_of_others(self) -> None:
        command, guesses = [sys.executable, PROGRAM], list[int]()
        with self.serving("--trusted-proxy", "127.0.0.1", command=command) as (process, port, _):

            def status(name: str) -> int:
                with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
                    return int(re.findall(rf"^{name}:\s*(\d+)", file.read(), re.MULTILINE)[0])

            def guess(address: str) -> None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    for number in itertools.count():
                        self.request(port, "/list", password=f"{address} {number}", **{"X-Forwarded-For": address})
                        guesses.append(number)

            self.assertEqual(404, self.request(port, "/get?key=a")[0])
            before = status("VmHWM")  # the largest size so far
            guessers = in_threads(guess, [(f"203.0.113.{number}",) for number in range(40)])
            wait_until(lambda: guesses)
            count, undisturbed = 1000 if LONG else 200, 0
            for _ in range(count):
                guessed = len(guesses)
                self.assertEqual(404, self.request(port, "/get?key=a")[0])
                undisturbed += guessed == len(guesses)  # the response has not waited for a guess
            self.assertGreater(undisturbed, count / 4)
            wait_until(lambda: len(guesses) > 3)
            self.assertLess(status("VmHWM") - before, 60_000)  # kB
            self.assertLess(status("Threads"), 10)
            process.kill()
            join(guessers)


def can_trace() -> bool:
    """Tell whether strace exists and may trace."""
    with contextlib.suppress(OSError):
        return run(["strace", "-o", os.devnull, "true"])[0] == 0
    return False


class Durable(CommandCase):
    @unittest.skipUnless(can_trace(), "strace is not installed, or may not trace")
    def test_the_log_is_synced_before_each_response(self) -> None:
        self.add_user("alice")
        other = self.enterContext(contextlib.closing(sqlite3.connect(self.database)))
        other.execute("UPDATE user SET is_admin = TRUE").connection.commit()  # stays in the log, as after a kill
        calls = "pwrite64,fdatasync,fsync,sendto,ftruncate"
        command = [*f"strace -f -y -s 20 -e trace={calls} -o {self.folder}/trace".split(), *CHEAP_PROGRAM]
        count = 50 if LONG else 20
        with self.serving("--history", "100", command=command) as (process, port, _):
            for number in range(count):
                self.assertEqual(200, self.request(port, f"/set?key=a&value={number}")[0])
            os.kill(int(subprocess.check_output(["pgrep", "-P", str(process.pid)])), signal.SIGTERM)
            self.assertEqual(0, process.wait(WAIT_SECONDS))
        answers, synced, unsynced = 0, 0, False
        trace = (self.folder / "trace").read_bytes().decode().splitlines()
        self.assertIn("sync", next(line for line in trace if "-wal>" in line), "a start syncs what it finds")
        for line in trace:
            if "pwrite64(" in line and "-wal>" in line:
                unsynced = True
            elif "sync" in line and line.rstrip().endswith("= 0"):  # also of a call that was interrupted
                synced, unsynced = synced + unsynced, False
            elif "sendto(" in line and '"HTTP/1.1 200 ' in line:
                self.assertTrue(synced and not unsynced, f"response {answers} was sent before it was on the disk")
                self.assertTrue(synced == 1 or not answers, "one sync is enough; the first response follows the start")
                answers, synced = answers + 1, 0
        self.assertEqual(count, answers)


@unittest.skipUnless(os.path.exists(README), "README.md is not beside the tests")
class Readme(CommandCase):
    """Commands, requests and facts in README.md are true."""

    # What the first start prints. Then, for each line to type in order: its end, and a pattern for what it prints.
    PRINTED = r"""open in a browser: http://[^/]+/(?: or http://[^/]+/)?
user: admin, password: (.{20}) \(shown only now\)
curl -u admin:.{20} "http://127.0.0.1:\d+/set\?key=door&value=open"
listening on http://.*:\d+"""
    SHOWN = (
        ("key=door&value=open'", "Success"),
        ("/get?key=door'", "open"),
        ("/toggle?key=lamp'", "on"),
        ("/incr?key=visits'", "1"),
        ("&wait=60&unless=open'", "closed"),
        ("'milk & honey, 100%'", "Success"),
        ('"value": "off"}\'', "Success"),
        ("&default=away'", "away"),
        ("/list'", '{"door":"closed","lamp":"off","note":"milk & honey, 100%","visits":"1"}'),
        ("addtoken admin --label esp", "kv_.{43}\n"),
        ("/get?key=door'", "closed"),
        ("tokens admin", "ID  LABEL .*\n1   esp .*\n"),
        ("--body 'It is {value}.'", "1\n"),
        ("testhook 1", "200 OK\n"),
        ("&since=3600'", r'\[\{"time": "2.*Z", "value": "closed"\},\{"time": "2.*Z", "value": "open"\}\]'),
        ("/events?prefix=house/'", "event: ready\r?\n"),
        ("adduser alice", "Password for alice: \nThe same again: \nadded the user alice\n"),
        ("passwd alice", "Password for alice: \nThe same again: \nset the password of alice.*\n"),
        ("users", "USER   ROLE   VALUES\nadmin  admin  4\nalice  user   0\n"),
        ("get admin door", "closed\n"),
        (
            "unit --db kvserver.db | head -7",
            r"(?s)# .*\n# To install .*\n#     sudo systemctl enable --now kvserver\n.*",
        ),
        ("-out fullchain.pem", "(?s).*"),
        ("--tls-key privkey.pem", r"(?s).*\nlistening on https://.*"),
        ("backup backup.db", "wrote backup.db, a copy of .*/kvserver.db\n"),
        ("restore backup.db", "restored .*\nthe old database is now .*\n"),
        ("export > values.jsonl)", ""),
        ("import values.jsonl", "imported users: 0, values: 4; .*\n"),
        ("import PATH/database.db", "imported users: 1, values: 0; .*\n"),
    )

    def setUp(self) -> None:
        super().setUp()
        self.text = pathlib.Path(README).read_text("utf-8")
        self.prose = re.sub("(?ms)^```.*?^```$", "\n", self.text)

    def blocks(self, language: str) -> list[str]:
        return re.findall(f"(?ms)^```{language}\n(.*?)^```$", self.text)

    def test_the_page_and_its_sentences_are_short(self) -> None:
        self.assertLessEqual(len(self.text.splitlines()), 450)
        self.assertNotRegex(self.text, r"\bpython (?:-m|\S*kvserver|\.ci)")
        for text in re.split(r"\n\s*\n|\n(?=\s*[-<#])|\|", self.prose):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[^a-z])", re.sub("`[^`]*`", "C", text)):
                self.assertLessEqual(len(re.findall(r"[\w'/.-]+", sentence)), 25, sentence)

    def test_the_limits_are_those_of_the_program(self) -> None:
        prose = " ".join(self.prose.split())
        for limit in (
            f"({kvserver.WAIT_SECONDS_MAX} at most)",
            f"After {kvserver.FAILURES_MAX} failed logins",
            f"once every {kvserver.FAILURE_SECONDS} seconds",
            f"at most {kvserver.KEY_BYTES_MAX} bytes, and a value {kvserver.VALUE_BYTES_MAX >> 20} MiB",
            f"after {kvserver.IDLE_SECONDS} seconds, and a stream after {kvserver.SEND_SECONDS} seconds",
            f"first {kvserver.HISTORY_VALUE_BYTES_MAX:,} bytes",
            f"{kvserver.HOOK_SECONDS} seconds to answer",
            f"for {kvserver.HOOK_GIVE_UP_SECONDS // 3600} hours",
            f"newest {kvserver.HOOK_PENDING_MAX:,} or {kvserver.HOOK_PENDING_BYTES_MAX >> 20} MiB",
            f"at most {kvserver.EXCHANGES_MAX} are sent",
        ):
            self.assertIn(limit.lower(), prose.lower())

    def test_every_link_within_the_page_works(self) -> None:
        headings = re.findall("(?m)^#+ (.*)$", self.prose)
        # GitHub makes the anchor of a heading from its letters in lower case, with hyphens for spaces.
        anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        links = set(re.findall(r"\]\((?!https:)([^)]*)\)", self.text))
        self.assertIn("LICENSE", links)
        self.assertEqual(self.text.count("<details>"), self.text.count("</details>"))
        self.assertLessEqual(links, {*anchors, *os.listdir(os.path.dirname(README))})

    def type_line(self, line: str, *replies: str) -> str:
        """Run a line of a shell in a terminal, reply to its questions, and return what the terminal shows."""
        master, slave = os.openpty()
        streams: Any = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
        process = subprocess.Popen(["sh", "-c", line], cwd=self.folder, env=self.environment, **streams)
        os.close(slave)
        shown, left = "", list(replies)
        timer = threading.Timer(WAIT_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()  # or a prompt that has changed would wait for its reply
        with process, os.fdopen(master, "r+b", 0) as terminal, contextlib.suppress(OSError):  # EIO: it has ended
            while data := terminal.read(65536):
                shown += data.decode().replace("\r\n", "\n")
                if left and shown.endswith(": "):
                    terminal.write(left.pop(0).encode() + b"\n")
        timer.cancel()
        self.assertEqual((0, []), (process.returncode, left), f"{line}: {shown}")
        return shown

    @unittest.skipUnless(shutil.which("curl") and shutil.which("openssl"), "curl or openssl is not installed")
    def test_every_command_and_every_curl_line_does_what_it_says(self) -> None:
        """Type all lines in their order into a terminal, in an empty folder."""
        target = self.enterContext(contextlib.closing(Target()))
        self.make_old_database([("carol", WERKZEUG_HASHES["an old password"], 0)])
        for name in ("PYTHONPATH", "KVSERVER_DB", "KVSERVER_HOST"):
            del self.environment[name]
        (self.folder / "python3").symlink_to(sys.executable)
        self.environment["PATH"] = f"{self.folder}:{self.environment['PATH']}"
        replies = {"adduser": ["a password"] * 2, "passwd": ["a password"] * 2}
        download, start, *lines = "".join(self.blocks("sh")).splitlines()
        lines.remove("python3 -m unittest")  # which runs this test
        self.assertEqual("curl -fLO https://raw.githubusercontent.com/OWNER/kvserver/main/kvserver.py", download)
        shutil.copy(PROGRAM, self.folder)
        self.assertEqual("python3 kvserver.py serve", start)
        program = ["python3", "kvserver.py"]
        server, port, printed = self.enterContext(self.serving(command=program, KVSERVER_HISTORY="9"))
        match = re.fullmatch(self.PRINTED, "\n".join(printed))
        assert match, printed
        self.assertTrue(any(re.fullmatch(self.PRINTED, block.strip()) for block in self.blocks("")))
        password = match[1]
        actual = {
            "PATH/": "",
            "PASSWORD": password,
            "HOST.local:8080": f"127.0.0.1:{port}",
            "https://ntfy.sh": target.origin,
        }
        for line, (end, pattern) in zip(lines, self.SHOWN, strict=True):
            self.assertTrue(line.endswith(end), f"{line}, not: {end}")
            typed = functools.reduce(lambda text, pair: text.replace(*pair), actual.items(), line)
            if " serve " in line:  # another server, with TLS
                with self.serving(*typed.replace("--port 8443 ", "").split()[3:], command=program) as (_, _, printed):
                    shown = "\n".join(printed)
            elif " -N " in line:  # a stream
                pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": self.environment}
                with subprocess.Popen(shlex.split(typed), **pipes) as stream:
                    assert stream.stdout
                    shown = stream.stdout.readline().decode()
                    stream.kill()
            elif "&wait=" in line:  # until the value changes
                (call,) = in_threads(self.type_line, [(typed,)])
                wait_until(lambda: b"kvserver_polls 1\n" in self.request(port, "/metrics", "admin", password)[1])
                self.request(port, "/set?key=door&value=closed", "admin", password)
                shown = call.result(WAIT_SECONDS)
            else:
                if " restore " in line:
                    self.stop(server)
                shown = self.type_line(typed, *replies.get(typed.split()[2], []))
            self.assertTrue(re.fullmatch(pattern, shown), f"{line}: {shown}")
            if " addtoken " in line:
                actual["TOKEN"] = shown.strip()
        answers = [shown for _, shown in self.SHOWN[:9]]
        *first, closed, stored, _, away, values = answers
        prose = " ".join(self.prose.split())
        self.assertIn("answer `{}`, `{}`, `{}` and `{}`. ".format(*first), prose)
        self.assertIn(f"it answers `{closed}`.", prose)
        self.assertIn(f"answer `{stored}` twice, `{away}`, and `{values}`.", prose)
        session = re.findall(r"^\$ (.*)\n(.*)$", "".join(self.blocks("console")), re.MULTILINE)
        typed_lines = [line.replace("HOST", "raspberrypi") for line in lines]
        self.assertEqual(list(zip(typed_lines[:2], answers[:2])), session)

    def test_every_hook_sends_what_its_service_takes(self) -> None:
        target = self.enterContext(contextlib.closing(Target()))
        self.add_user("admin")
        text, json_type = "text/plain; charset=utf-8", "application/json"
        values = '{"value1": "door", "value2": "test", "value3": null'
        expected: dict[str, tuple[str, str, dict[str, str], str]] = {
            "ntfy": ("/TOPIC", text, {"title": "Front door"}, "It is test."),
            "Discord": ("/api/webhooks/ID/SECRET", json_type, {}, '{"content": "door is test", "allowed_mentions": {'),
            "Slack": ("/services/T/B/SECRET", json_type, {}, '{"text": "door is test"}'),
            "Gotify": ("/message?token=TOKEN", json_type, {}, '{"message": "door is test", "priority": 5}'),
            "IFTTT (Pro)": ("/trigger/EVENT/with/key/SECRET", json_type, {}, values),
            "Home Assistant": ("/api/webhook/SECRET", json_type, {}, values),
            "another kvserver": ("/kv/door", text, {"authorization": "Bearer TOKEN"}, "test"),
        }
        (ntfy,) = re.findall("^python3 kvserver.py addhook admin door (.*ntfy.*)$", self.text, re.MULTILINE)
        rows = re.findall(r"^\| ([^|]+) \| `([^`|]+//[^`]*)` \| (?:`(.*)` )?\|$", self.text, re.MULTILINE)
        for number, (service, url, flags) in enumerate([("ntfy", ntfy, ""), *rows], 1):
            path, content_type, headers, body = expected.pop(service)
            arguments = shlex.split(f"{url} {flags}")
            arguments[0] = re.sub(r"\Ahttps?://[^/]*", target.origin, arguments[0])
            self.assertEqual(f"{number}\n", self.succeed("addhook", "admin", "door", *arguments))
            self.assertEqual("200 OK\n", self.succeed("testhook", str(number)))
            received = target.received.pop()
            self.assertEqual(f"{'PUT' if '--method PUT' in flags else 'POST'} {path} HTTP/1.1", received.line)
            self.assertLessEqual({"content-type": content_type, **headers}.items(), received.headers.items())
            self.assertIn(body, received.data.decode())
        self.assertEqual({}, expected)

    def test_the_program_for_python_runs(self) -> None:
        (program,) = (text for text in self.blocks("python") if "urllib" in text)
        self.add_user("alice")
        token = self.succeed("addtoken", "alice").strip()
        with self.serving_here() as (port, _, _):
            program = program.replace("TOKEN", token).replace("HOST.local:8080", f"127.0.0.1:{port}")
            done = run([sys.executable, "-c", program], env=self.environment)
            self.assertEqual((0, "Success milk & honey\n", ""), done)

    def test_the_flow_of_node_red_is_json(self) -> None:
        (flow,) = self.blocks("json")
        nodes = [node["type"] for node in json.loads(flow)]
        self.assertEqual(["inject", "http request", "inject", "http request", "debug"], nodes)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_systemd_accepts_the_units_and_finds_them_hardened(self) -> None:
        self.environment.clear()
        (self.folder / "a b%").mkdir()
        plain, tls = map(shlex.split, re.findall(r"^python3 kvserver.py unit ([^|\n]*)", self.text, re.MULTILINE))
        self.assertEqual(["--db", "kvserver.db", "--port", "443"], [*plain, *tls[2:4]])
        # systemd's rating of the exposure, in tenths: a port below 1024 and a file below /home cost some protection.
        opt = shlex.split("--port 443 --tls-cert /run/kvserver/fullchain.pem --tls-key /run/kvserver/privkey.pem")
        database = ["--db", "a b%/x.db", "--base-path", "/"]
        for arguments, threshold in (([], 15), (database, 15), (opt, 15), (plain, 15), (tls, 16)):
            with (
                mock.patch.object(sys, "executable", "/bin/sh"),
                mock.patch.object(kvserver, "__file__", "/opt/k v.py"),
            ):
                self.write("kvserver.service", self.succeed("unit", *arguments))
            for check in (("verify",), ("security", "--offline=true", f"--threshold={threshold}", "--no-pager")):
                code, output, errors = run(["systemd-analyze", *check, f"{self.folder}/kvserver.service"])
                self.assertEqual((0, ""), (code, errors), output)

    def test_it_runs_as_a_module_too(self) -> None:
        self.assertIn("`python3 -m kvserver serve`", self.text)
        self.add_user("alice")
        code, output, errors = run([sys.executable, "-m", "kvserver", "users"], env=self.environment)
        self.assertEqual((0, ""), (code, errors))
        self.assertIn("alice", output)

    def test_the_fail2ban_filter_matches_failed_logins_and_nothing_else(self) -> None:
        (failregex,) = re.findall("`failregex = (.*?)`", self.text)
        # fail2ban replaces <ADDR> by a pattern for addresses of either kind.
        pattern = re.compile(failregex.replace("<ADDR>", r"(?P<address>[0-9A-Fa-f:.]+)"))
        self.add_user("alice")
        target = "/get?key=WARNING+login+failed:+user="
        addresses = {
            "alice": "203.0.113.9",
            "x' address=192.0.2.1": "2001:db8::9",
            "WARNING login failed: user='y' address=192.0.2.2": "203.0.113.10",
        }
        self.enterContext(mock.patch.object(kvserver, "FAILURES_MAX", 1))
        with self.serving_here("--log-requests", "--trusted-proxy", "127.0.0.1") as (port, _, log):
            for name, address in addresses.items():
                for password, status in (("wrong", 401), ("wrong", 401), ("throttled", 429)):
                    answer = self.request(port, target, name, password, **{"X-Forwarded-For": address})
                    self.assertEqual(status, answer[0])
            self.request(port, f"{target}''+address=192.0.2.3")
            self.request(port, "/WARNING%20login%20failed:%20user=''%20address=192.0.2.4")
        matches = [pattern.search(line) for line in log.getvalue().splitlines()]
        self.assertEqual(list(addresses.values()), [match["address"] for match in matches if match])

    def test_every_setting_is_explained_as_in_its_help(self) -> None:
        text = re.sub(r"`|\[|\]\(.*?\)", "", self.text)
        for name, setting in kvserver.SETTINGS.items():
            meaning = re.split("[,;(]", setting.help)[0].strip()
            default = setting.default if type(setting.default) is int else ""
            row = rf"\n\| --{name.replace('_', '-')}(?: [A-Z]+)? \| {meaning}.* \| .*\b{default}\b"
            self.assertRegex(text, row)

    def test_every_command_and_every_flag_exists(self) -> None:
        _, commands = kvserver.build_parser("kvserver.py")
        self.assertLessEqual(set(re.findall(r"kvserver\.py (\w+)", self.text)), set(commands))
        self.assertLessEqual(set(commands), set(re.findall(r"(?:`|kvserver\.py )(\w+)", self.text)))
        usage = "".join(command.format_usage() for command in commands.values())
        of_others = {"--cacert", "--data-binary", "--standalone", "--deploy-hook", "--now", "--bg"}
        flags = {"--help", *of_others, *re.findall("--[a-z-]+", usage)}
        self.assertLessEqual(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", self.text)), flags)

    def test_every_request_and_every_parameter_exists(self) -> None:
        rows = re.findall(r"^\| `([A-Z]+) (/[^?`]*)(.*)$", self.text, re.MULTILINE)
        self.assertEqual({*kvserver.API_PATHS, "/metrics"}, {path for _, path, _ in rows})
        for method, path, rest in rows:
            route = kvserver.BY_PATH_AND_METHOD[path][method]
            self.assertLessEqual(set(re.findall("[?&`]([a-z]+)=", rest)), set(route.parameters), path)
        for path, query in re.findall(r"""(?:8080|//DOMAIN|\(")(/[a-z]+)\?([^\s"'`]*)""", self.text):
            route = kvserver.BY_PATH_AND_METHOD[path]["GET"]
            self.assertLessEqual(set(re.findall("([a-z]+)=", query)), set(route.parameters), path)


class Source(unittest.TestCase):
    """The promises about the file itself."""

    text = pathlib.Path(PROGRAM).read_text("utf-8")

    def test_only_the_standard_library_is_imported(self) -> None:
        modules = set(re.findall(r"^ *(?:import|from) (\w+)", self.text, re.MULTILINE)) - {"__future__"}
        self.assertLessEqual(modules, sys.stdlib_module_names)
        self.assertIn("sqlite3", modules)

    def test_an_older_python_is_told_in_one_line_what_is_needed(self) -> None:
        ast.parse(self.text, feature_version=(3, 7))
        pretend = "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0)"
        code, output, errors = run(
            [sys.executable, "-c", f"{pretend}; runpy.run_path({PROGRAM!r}, run_name='__main__')", "serve"]
        )
        needed = "kvserver needs Python 3.11 or newer (Raspberry Pi OS Bookworm), not 3.9.18\n"
        self.assertEqual(needed, errors)
        self.assertEqual((1, ""), (code, output))

    def test_the_room_of_the_pages_stays_small(self) -> None:
        (pages,) = re.findall("(?s)\n(# ---- Pages -.*?\n)# ---- ", self.text)
        for text, most in ((self.text, 4500), (pages, 650), (kvserver.STYLE.strip("\n"), 120)):
            self.assertLessEqual(len(text.splitlines()), most, text[:50])

    def test_docstring_names_every_path(self) -> None:
        for path in (*kvserver.API_PATHS, "/admin/", "/me/"):
            self.assertIn(path, kvserver.__doc__ or "")


if __name__ == "__main__":
    unittest.main()
