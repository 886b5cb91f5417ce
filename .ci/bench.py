#!/usr/bin/env python3
"""The benchmark of kvserver: ratios to yardsticks that run side by side with it, on the same machine in the same run.

    python3 .ci/bench.py [--check] [--json] [--rounds N] [--only TEXT] [--directory FOLDER] [--quick]

Absolute times mean little on a shared machine. Each figure is therefore measured in turns with its yardstick, in an
order that changes from round to round, and the median of the rounds' ratios counts. It runs on Linux and needs only the
standard library. strace simulates a slow disk; webdis and redis-server are yardsticks. Without them, it leaves their
rows out. --check exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import gc
import http.server
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAME, PASSWORD = "bench", "a benchmark's password"
FIELDS = (
    "Host: 127.0.0.1\r\n"
    f"Authorization: Basic {base64.b64encode(f'{NAME}:{PASSWORD}'.encode()).decode()}\r\n"
    "User-Agent: kvserver-bench/1.0\r\n"
    "Accept: */*\r\n"
)
WAIT_SECONDS = 60  # how long anything may take that should come at once
ANSWER_SECONDS = 30
ENDLESS = 1_000_000_000  # requests, of a load that is ended
VALUE = "open"
SET_KEYS = 100  # keys that are written in turn
PAIRS = {"door": VALUE} | {f"mixed{number}": VALUE for number in range(SET_KEYS)}
FEW_PAIRS, MANY_PAIRS, LIST_PAIRS = 1_000, 1_000_000, 10_000
SLOW_FSYNC_MICROSECONDS = 10_000
PAUSE_SECONDS_MAX = 0.004  # between paced requests


class Target(NamedTuple):
    """A row of the table, with the limits of its ratio, or of its figure if it has no yardstick."""

    key: str
    what: str
    yardstick: str
    must: float
    aim: float
    larger_is_better: bool


STOCK = "stock handler's constant"
WEBDIS = "webdis, Redis fsyncs always"
TARGETS = (
    Target("get1", "/get, 1 connection, CPU us a request", STOCK, 0.55, 0.45, False),
    Target("get16", "/get, 16 connections, requests/s", STOCK, 4.8, 6, True),
    Target("get64", "/get, 64 connections, requests/s", STOCK, 4.8, 6, True),
    Target("tail", "/get, 64 connections, p99 ms", STOCK, 0.2, 0.1, False),
    Target("spread", "/get, 64 connections, p99 ms", "its own median", 6, 4, False),
    Target("fresh", "/get, a connection a request, 16 at once, requests/s", STOCK, 4.5, 7, True),
    Target("set1", "/set, 1 connection, us a request", "bare commit + /get", 1.4, 1.2, False),
    Target("set64", "/set, 64 connections, requests/s", "min(3 bare, 0.6 /get at 64)", 1.5, 2, True),
    Target("slow", "/set, 64 connections, fsync of 10 ms, requests/s", "1 connection", 25, 30, True),
    Target("beside", "/get beside 64 writers, fsync of 10 ms, p95 ms", "", 4, 2, False),
    Target("webdis_get", "/get, 16 connections, requests/s", WEBDIS, 1.2, 1.5, True),
    Target("webdis_set", "/set, 16 connections, requests/s", WEBDIS, 1, 1.2, True),
    Target("webdis_mix", "four /get to one /set, 16 connections, requests/s", WEBDIS, 1, 1.3, True),
    Target("webdis_fresh", "/get, a connection a request, 16 at once, requests/s", WEBDIS, 1, 1.2, True),
    Target("list", "/list of 10,000 pairs, CPU ms", "json.dumps(dict(rows))", 1.15, 0.8, False),
    Target("many", "/get of random keys, 1,000,000 pairs, CPU us", "1,000 pairs", 1.3, 1.1, False),
    Target("rss", "resident MB after 100,000 requests", "", 50, 30, False),
    Target("growth", "resident MB more than after 50,000 requests", "", 2, 1, False),
    Target("idle", "resident MB when idle", "python with three imports", 1.5, 1.2, False),
    Target("start", "start until listening, ms", "python with three imports", 1.7, 1.5, False),
)


# ---- The load generator ----------------------------------------------------------------------------------------------
# It runs in its own process and does as little as it can, so that it keeps up with a quick server. It makes the
# requests beforehand, and it reads and writes descriptors, which costs less than the methods of sockets. It checks each
# answer by its status and by its end: the empty line and the body.

Exchange = tuple[bytes, bytes]  # a request, and the end of its answer
GOOD = b"HTTP/1.1 200 "


def make_request(target: str, close: bool = False) -> bytes:
    """Return a GET request, after which the connection may be closed."""
    last_field = "Connection: close\r\n" if close else ""
    return f"GET {target} HTTP/1.1\r\n{FIELDS}{last_field}\r\n".encode()


def make_get(kind: str, key: str, body: str) -> Exchange:
    """Return a request for a value, for kvserver or for webdis."""
    target = f"/GET/{key}.txt" if kind.startswith("webdis") else f"/get?key={key}"
    return make_request(target, close=kind.endswith("fresh")), body.encode()


def make_set(kind: str, key: str, value: str) -> Exchange:
    """Return a request that stores a value, for kvserver or for webdis."""
    if kind.startswith("webdis"):
        return make_request(f"/SET/{key}/{value}"), b'\r\n\r\n{"SET":[true,"OK"]}'
    return make_request(f"/set?key={key}&value={value}"), b"\r\n\r\nSuccess"


def exchanges(kind: str) -> list[Exchange]:
    """Return the requests of a kind of load, which are sent again and again."""
    if kind.endswith("set"):
        # The values change from request to request, because SQLite writes nothing when nothing changes.
        return [make_set(kind, f"key{number % SET_KEYS}", str(number)) for number in range(101 * SET_KEYS)]
    if kind.endswith("mix"):
        # Reads choose among the keys that are written. All values end alike, whatever was written last.
        chosen = random.Random(1)
        return [
            make_set(kind, f"mixed{number // 5 % SET_KEYS}", f"{number}{VALUE}")
            if number % 5 == 0
            else make_get(kind, f"mixed{chosen.randrange(SET_KEYS)}", VALUE)
            for number in range(5 * 101 * SET_KEYS)
        ]
    if kind == "list":
        return [(make_request("/list"), b'"}')]
    if kind.startswith("random"):
        numbers = random.Random(1).choices(range(int(kind[6:])), k=20_000)
        return [make_get(kind, f"key{number}", f"\r\n\r\nvalue {number}") for number in numbers]
    return [make_get(kind, "door", f"\r\n\r\n{VALUE}")]


def connect(port: int) -> socket.socket:
    """Return a new connection that doesn't block."""
    connection = socket.create_connection(("127.0.0.1", port), WAIT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    connection.setblocking(False)
    return connection


def read_rest(descriptor: int, answer: bytes, end: bytes) -> None:
    """Read until an answer is complete, asking again and again; exit if it is not the expected one."""
    deadline = time.perf_counter() + ANSWER_SECONDS
    while not answer.startswith(GOOD) or not answer.endswith(end):
        if answer and not answer.startswith(GOOD):
            sys.exit(f"the answer is not the expected one: {answer[:200]!r}")
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            if time.perf_counter() > deadline:
                sys.exit(f"the answer doesn't end with {end!r}: {answer[-500:]!r}")
            continue
        if not data:
            sys.exit(f"the connection was closed: {answer[:200]!r}")
        answer += data


def drive_one(port: int, todo: list[Exchange], count: int) -> tuple[list[float], float]:
    """Send requests on one connection, one after the other; return each one's seconds, and those of all.

    It asks for the answer again and again instead of sleeping. On a virtual machine, waking this process takes longer
    than the server's work, and would count as the server's time.
    """
    connection, seconds = connect(port), []
    for request, end in itertools.islice(itertools.cycle(todo), count):
        begun = time.perf_counter()
        os.write(connection.fileno(), request)
        read_rest(connection.fileno(), b"", end)
        seconds.append(time.perf_counter() - begun)
    return seconds, sum(seconds)


def drive_paced(port: int, todo: list[Exchange], count: int) -> tuple[list[float], float]:
    """Send each request after a random pause and sleep until its answer; return each one's seconds, and those of all.

    A client without pauses sends most of its requests while the server has nothing else to do, and misses the rest.
    """
    pauses, connection, seconds = random.Random(1), connect(port), []
    connection.setblocking(True)
    for request, end in itertools.islice(itertools.cycle(todo), count):
        time.sleep(pauses.uniform(0, PAUSE_SECONDS_MAX))
        begun = time.perf_counter()
        os.write(connection.fileno(), request)
        read_rest(connection.fileno(), b"", end)
        seconds.append(time.perf_counter() - begun)
    return seconds, sum(seconds)


def drive_many(port: int, todo: list[Exchange], connections: int, count: int) -> tuple[list[float], float]:
    """Keep a request under way on each connection; return each request's seconds, and those of all.

    It waits for every answer in the end: webdis may send one that nobody waits for to the next connection.
    """
    read, write, clock = os.read, os.write, time.perf_counter
    upcoming = itertools.islice(itertools.cycle(todo), count)
    poll, sockets = select.epoll(), [connect(port) for _ in range(connections)]
    begun: dict[int, float] = {}
    ends: dict[int, bytes] = {}
    seconds: list[float] = []
    start = clock()
    for connection, (request, end) in zip(sockets, itertools.islice(upcoming, connections), strict=True):
        descriptor = connection.fileno()
        poll.register(descriptor, select.EPOLLIN | select.EPOLLET)
        ends[descriptor] = end
        begun[descriptor] = clock()
        write(descriptor, request)
    while len(seconds) < count:
        events = poll.poll(ANSWER_SECONDS)
        if not events:
            sys.exit("there is no answer")
        for descriptor, _ in events:
            answer = read(descriptor, 4096)
            if not answer.startswith(GOOD) or not answer.endswith(ends[descriptor]):
                read_rest(descriptor, answer, ends[descriptor])
            now = clock()
            seconds.append(now - begun[descriptor])
            exchange = next(upcoming, None)
            if exchange:
                request, ends[descriptor] = exchange
                begun[descriptor] = now
                write(descriptor, request)
    return seconds, clock() - start


def drive_fresh(port: int, todo: list[Exchange], connections: int, count: int) -> tuple[list[float], float]:
    """Open a connection for each request, so many at once; return each request's seconds, and those of all.

    The server has closed a connection when the kernel reports it, so one read returns the whole answer.
    """
    address, clock, poll = ("127.0.0.1", port), time.perf_counter, select.epoll()
    under_way: dict[int, tuple[socket.socket, float]] = {}
    seconds: list[float] = []
    request, end = todo[0]

    def begin() -> None:
        begun, connection = clock(), socket.socket()
        connection.connect(address)
        connection.send(request)
        descriptor = connection.fileno()
        under_way[descriptor] = connection, begun
        poll.register(descriptor, select.EPOLLRDHUP)

    start = clock()
    for _ in range(connections):
        begin()
    while under_way:
        events = poll.poll(ANSWER_SECONDS)
        if not events:
            sys.exit("there is no answer")
        for descriptor, _ in events:
            connection, begun = under_way.pop(descriptor)
            answer = connection.recv(4096)
            if not answer.startswith(GOOD) or not answer.endswith(end):
                sys.exit(f"the answer is not the expected one: {answer[:200]!r}")
            connection.close()
            seconds.append(clock() - begun)
            if len(seconds) + len(under_way) < count:
                begin()
    return seconds, clock() - start


def generate_load(port: int, kind: str, connections: int, count: int) -> None:
    """Drive a server and print the figures; this is the generator's process."""
    todo = exchanges(kind)
    gc.disable()  # its pauses would count as the server's

    def drive(count: int) -> tuple[list[float], float]:
        if kind.endswith("fresh"):
            return drive_fresh(port, todo, connections, count)
        if kind == "paced":
            return drive_paced(port, todo, count)
        if connections == 1:
            return drive_one(port, todo, count)
        return drive_many(port, todo, connections, count)

    drive(max(min(count // 10, 500), connections))
    print("warm", flush=True)
    sys.stdin.readline()
    begun_cpu = time.process_time()
    seconds, elapsed = drive(count)
    cpu = time.process_time() - begun_cpu
    hundredths = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    figures = {
        "per_second": len(seconds) / elapsed,
        "median": statistics.median(seconds),
        "p95": hundredths[94],
        "p99": hundredths[98],
        "generator_cpu": cpu / len(seconds),
        "generator_busy": cpu / elapsed,
    }
    print(json.dumps(figures), flush=True)


# ---- The yardsticks --------------------------------------------------------------------------------------------------
# Each runs in a process of its own, like the server.


class StockHandler(http.server.BaseHTTPRequestHandler):
    """What the standard library does for a constant, as well configured as it can be."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        """Answer with a constant, written at once."""
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(VALUE)))
        self.end_headers()
        self.wfile.write(VALUE.encode())
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


class StockServer(http.server.ThreadingHTTPServer):
    """The standard library's server, which gets a longer queue so that no connection is refused."""

    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let clients go in silence."""


def run_stock() -> None:
    """Serve a constant."""
    server = StockServer(("127.0.0.1", 0), StockHandler)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def run_commits(folder: str, count: int) -> None:
    """Print how many commits a second a loop makes that does nothing else."""
    with contextlib.closing(sqlite3.connect(os.path.join(folder, "bare.db"))) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS pair (user_id INTEGER, key TEXT, value TEXT, updated REAL,"
            " PRIMARY KEY (user_id, key)) WITHOUT ROWID"
        )
        begun = 0.0
        for number in range(-100, count):
            if number == 0:
                begun = time.perf_counter()
            with connection:
                connection.execute(
                    "INSERT INTO pair VALUES (1, ?, ?, ?) ON CONFLICT (user_id, key)"
                    " DO UPDATE SET value = excluded.value, updated = excluded.updated",
                    (f"key{number % 100}", str(number), time.time()),
                )
        print(count / (time.perf_counter() - begun))


def run_dumps(database: str, count: int) -> None:
    """Print the CPU seconds that it takes to read all pairs and to make them JSON."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        begun = 0.0
        for number in range(-2, count):
            if number == 0:
                begun = time.process_time()
            json.dumps(dict(connection.execute("SELECT key, value FROM pair WHERE user_id = 1"))).encode()
        print((time.process_time() - begun) / count)


# ---- Processes -------------------------------------------------------------------------------------------------------


class Process:
    """A process that is ready: it has printed a line, or it answers on the port that it was told to use."""

    def __init__(self, command: list[str], port: int = 0, errors: int | None = subprocess.DEVNULL) -> None:
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that a process that strace started ends together with it
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output, self.port = self.process.stdin, self.process.stdout, port
        if port:
            self.wait_for_port()
        else:
            line = self.read_line()
            while "serve" in command and "listening" not in line:  # our server says more first
                line = self.output.readline() or sys.exit(f"this has ended: {command!r}")
            self.port = urllib.parse.urlsplit(line.split()[-1]).port or 0 if "listening" in line else 0
        self.start_seconds = time.perf_counter() - begun

    def wait_for_port(self) -> None:
        """Wait until something accepts connections on its port."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.01)
        self.end()
        sys.exit(f"this doesn't listen on port {self.port}: {self.process.args!r}")

    def go(self) -> None:
        """Tell a load generator to begin."""
        self.input.write("go\n")
        self.input.flush()

    def read_line(self) -> str:
        """Return the next line that it prints."""
        ready = select.select([self.output], [], [], WAIT_SECONDS)[0]
        line = self.output.readline() if ready else ""
        if not line:
            self.end()
            sys.exit(f"this printed nothing: {self.process.args!r}")
        return line

    def end(self) -> None:
        """End the process."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.input.close()
        self.output.close()

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used so far."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_megabytes(self) -> float:
        """Return its resident memory."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS:"))


def own_command(*arguments: object) -> list[str]:
    """Return the command that runs a part of this file in a process of its own."""
    return [sys.executable, os.path.abspath(__file__), *map(str, arguments)]


def run_once(*arguments: object) -> float:
    """Run a yardstick that prints one number, and return that."""
    done = subprocess.run(own_command(*arguments), stdout=subprocess.PIPE, timeout=10 * WAIT_SECONDS, check=True)
    return float(done.stdout)


def load(server: Process, kind: str, connections: int, count: int) -> dict[str, float]:
    """Drive a server from a process of its own and return the figures, with the server's CPU seconds a request."""
    generator = Process(own_command("--load", server.port, kind, connections, count), errors=None)
    try:
        begun = server.cpu_seconds()
        generator.go()
        figures: dict[str, float] = json.loads(generator.read_line())
        figures["cpu"] = (server.cpu_seconds() - begun) / count
        return figures
    finally:
        generator.end()


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fetch(port: int, path: str) -> str:
    """Return the body of an answer."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_SECONDS) as answer:
        body: bytes = answer.read()
        return body.decode()


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """The servers under test, and the measurements: a pair of figures a round, by the key of the target."""

    def __init__(self, server: str, folder: str, scale: float, stack: contextlib.ExitStack) -> None:
        self.server, self.folder, self.scale, self.stack = server, folder, scale, stack
        self.pairs: dict[str, list[tuple[float, float]]] = {}
        self.notes: list[str] = []
        self.busy: dict[str, list[tuple[float, float, float]]] = {}  # by load: the generator's us a request, and shares
        self.stock = self.start(own_command("--stock"))
        self.main = self.serve(self.database("main.db", PAIRS))
        self.webdis: Process | None = None
        self.round = 0

    def start(self, command: list[str], port: int = 0) -> Process:
        """Start a process that ends with the benchmark."""
        process = Process(command, port)
        self.stack.callback(process.end)
        return process

    def serve_command(self, database: str) -> list[str]:
        """Return the command that serves a database."""
        return [sys.executable, self.server, "serve", "--host", "127.0.0.1", "--port", "0", "--db", database]

    def serve(self, database: str, before: tuple[str, ...] = ()) -> Process:
        """Start a server that knows the credentials already."""
        server = self.start([*before, *self.serve_command(database)])
        load(server, "list", 1, 1)
        return server

    def serve_webdis(self) -> Process:
        """Start Redis, which syncs each write to the disk, and webdis before it, with the pairs of the main server."""
        redis_port, port = free_port(), free_port()
        options = {"bind": "127.0.0.1", "port": redis_port, "dir": self.folder, "logfile": "redis.log"}
        options |= {"appendonly": "yes", "appendfsync": "always", "save": ""}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self.start(["redis-server", *arguments], redis_port)
        addresses = {"http_host": "127.0.0.1", "http_port": port, "redis_host": "127.0.0.1", "redis_port": redis_port}
        path = os.path.join(self.folder, "webdis.json")
        with open(path, "w", encoding="ascii") as file:
            json.dump({**addresses, "daemonize": False, "logfile": os.path.join(self.folder, "webdis.log")}, file)
        webdis = self.start(["webdis", path], port)
        if json.loads(fetch(port, "/CONFIG/GET/appendfsync"))["CONFIG"] != ["appendfsync", "always"]:
            sys.exit("Redis doesn't sync each write")
        for key, value in PAIRS.items():
            fetch(port, f"/SET/{key}/{value}")
        return webdis

    def database(self, name: str, pairs: dict[str, str]) -> str:
        """Make a database with a user and pairs, and return its path."""
        path = os.path.join(self.folder, name)
        command = [sys.executable, self.server, "adduser", NAME, "--password-stdin", "--db", path]
        subprocess.run(command, input=PASSWORD.encode(), stdout=subprocess.DEVNULL, timeout=WAIT_SECONDS, check=True)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            rows = ((key, value) for key, value in pairs.items())
            connection.executemany("INSERT INTO pair (user_id, key, value, updated) VALUES (1, ?, ?, 0.0)", rows)
        return path

    def note(self, key: str, measured: float, yardstick: float = 1) -> None:
        """Keep a pair of figures."""
        self.pairs.setdefault(key, []).append((measured, yardstick))

    def in_turns(self, *measures: Callable[[], Any]) -> list[Any]:
        """Take several measurements, each round beginning with another one, and return them in the given order."""
        count = len(measures)
        order = [(self.round + number) % count for number in range(count)]
        results = {number: measures[number]() for number in order}
        return [results[number] for number in range(count)]

    def load(self, server: Process, kind: str, connections: int, count: int) -> dict[str, float]:
        """Drive a server with so many requests, fewer when only trying out."""
        figures = load(server, kind, connections, max(int(count * self.scale), connections, 2))
        if server in (self.main, self.webdis) and connections > 1:
            busy = figures["generator_cpu"] * 1e6, figures["generator_busy"], figures["cpu"] * figures["per_second"]
            self.busy.setdefault(f"{kind} at {connections}", []).append(busy)
        return figures

    def measure_get(self) -> None:
        """Measure reads against the stock handler."""
        for key, kind, connections, count, stock_count in (
            ("get1", "get", 1, 20_000, 10_000),
            ("get16", "get", 16, 30_000, 8_000),
            ("get64", "get", 64, 30_000, 8_000),
            ("fresh", "fresh", 16, 8_000, 3_000),
        ):
            ours, stock = self.in_turns(
                functools.partial(self.load, self.main, kind, connections, count),
                functools.partial(self.load, self.stock, kind, connections, stock_count),
            )
            if key == "get1":
                self.note(key, ours["cpu"] * 1e6, stock["cpu"] * 1e6)
            else:
                self.note(key, ours["per_second"], stock["per_second"])
            if key == "get64":
                self.note("tail", ours["p99"] * 1e3, stock["p99"] * 1e3)
                self.note("spread", ours["p99"] * 1e3, ours["median"] * 1e3)

    def measure_set(self) -> None:
        """Measure durable writes against commits that do nothing else."""
        one, get, bare = self.in_turns(
            lambda: self.load(self.main, "set", 1, 3_000),
            lambda: self.load(self.main, "get", 1, 10_000),
            lambda: run_once("--commits", self.folder, int(3_000 * self.scale)),
        )
        self.note("set1", 1e6 / one["per_second"], 1e6 / bare + 1e6 / get["per_second"])
        many, get = self.in_turns(
            lambda: self.load(self.main, "set", 64, 20_000), lambda: self.load(self.main, "get", 64, 30_000)
        )
        self.note("set64", many["per_second"], min(3 * bare, 0.6 * get["per_second"]))

    def measure_slow_disk(self) -> None:
        """Measure writes on a disk whose fsync takes 10 ms, and reads beside them."""
        if not hasattr(self, "slow"):
            inject = f"inject=fdatasync:delay_exit={SLOW_FSYNC_MICROSECONDS}"
            strace = ("strace", "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "-e", "trace=fdatasync", "-e", inject)
            if not shutil.which("strace") or subprocess.run([*strace, "true"], check=False).returncode:
                self.leave_out("the slow disk was left out: there is no strace that can trace here")
                return
            self.slow = self.serve(self.database("slow.db", {"door": VALUE}), strace)
        many, one, beside = self.in_turns(
            lambda: self.load(self.slow, "set", 64, 5_000),
            lambda: self.load(self.slow, "set", 1, 100),
            self.read_beside_writers,
        )
        self.note("slow", many["per_second"], one["per_second"])
        self.note("beside", beside["p95"] * 1e3)

    def read_beside_writers(self) -> dict[str, float]:
        """Measure reads on 1 connection while another process writes on 64."""
        writers = Process(own_command("--load", self.slow.port, "set", 64, ENDLESS))
        try:
            writers.go()
            figures = self.load(self.slow, "paced", 1, 600)
            if writers.process.poll() is not None:
                sys.exit("the writers ended too early")
            return figures
        finally:
            writers.end()

    def measure_webdis(self) -> None:
        """Measure reads, durable writes, both mixed, and new connections against webdis with Redis."""
        if self.webdis is None:
            if not shutil.which("webdis") or not shutil.which("redis-server"):
                self.leave_out("webdis was left out: it isn't installed, or redis-server isn't")
                return
            self.webdis = self.serve_webdis()
        for kind, count in (("get", 20_000), ("set", 10_000), ("mix", 20_000), ("fresh", 5_000)):
            ours, webdis = self.in_turns(
                functools.partial(self.load, self.main, kind, 16, count),
                functools.partial(self.load, self.webdis, f"webdis_{kind}", 16, count),
            )
            self.note(f"webdis_{kind}", ours["per_second"], webdis["per_second"])

    def leave_out(self, reason: str) -> None:
        """Note once why rows are missing."""
        if reason not in self.notes:
            self.notes.append(reason)

    def measure_list(self) -> None:
        """Measure the CPU time of a long list."""
        if not hasattr(self, "lister"):
            self.list_database = self.database("list.db", {f"key{n}": f"value {n}" for n in range(LIST_PAIRS)})
            self.lister = self.serve(self.list_database)
        ours, dumps = self.in_turns(
            lambda: self.load(self.lister, "list", 1, 100), lambda: run_once("--dumps", self.list_database, 50)
        )
        self.note("list", ours["cpu"] * 1e3, dumps * 1e3)

    def measure_many(self) -> None:
        """Measure reads from a large database against those from a small one."""
        if not hasattr(self, "large"):
            self.large, self.small = (
                self.serve(self.database(f"{count}.db", {f"key{n}": f"value {n}" for n in range(count)}))
                for count in (MANY_PAIRS, FEW_PAIRS)
            )
        large, small = self.in_turns(
            lambda: self.load(self.large, f"random{MANY_PAIRS}", 1, 10_000),
            lambda: self.load(self.small, f"random{FEW_PAIRS}", 1, 10_000),
        )
        self.note("many", large["cpu"] * 1e6, small["cpu"] * 1e6)

    def measure_start(self) -> None:
        """Measure how a server starts, against the imports that it cannot do without."""
        imports = "import http.server, sqlite3, ssl; print('ready', flush=True); input()"

        def look(command: list[str]) -> tuple[float, float]:
            process = Process(command)
            try:
                return process.start_seconds, process.resident_megabytes()
            finally:
                process.end()

        database = os.path.join(self.folder, "start.db")
        if not os.path.exists(database):
            self.database("start.db", {"door": VALUE})
        ours, python = self.in_turns(
            lambda: look(self.serve_command(database)), lambda: look([sys.executable, "-c", imports])
        )
        self.note("start", ours[0] * 1e3, python[0] * 1e3)
        self.note("idle", ours[1], python[1])

    def measure_memory(self) -> None:
        """Measure how memory grows, once, with a server of its own."""
        if "rss" in self.pairs:
            return
        server = self.serve(self.database("memory.db", {"door": VALUE}))
        resident = []
        for _ in range(2):
            self.load(server, "get", 64, 25_000)
            self.load(server, "set", 64, 25_000)
            resident.append(server.resident_megabytes())
        self.note("rss", resident[1])
        self.note("growth", resident[1] - resident[0])


# ---- Report ----------------------------------------------------------------------------------------------------------


def report(bench: Bench) -> list[dict[str, Any]]:
    """Return a row of figures for each target that was measured."""
    rows = []
    for target in TARGETS:
        pairs = bench.pairs.get(target.key)
        if not pairs:
            continue
        ratio = statistics.median(measured / yardstick for measured, yardstick in pairs)
        sign = 1 if target.larger_is_better else -1
        verdict = (
            "aim" if sign * ratio >= sign * target.aim else "must" if sign * ratio >= sign * target.must else "MISSED"
        )
        rows.append(
            {
                "key": target.key,
                "what": target.what,
                "measured": statistics.median(measured for measured, _ in pairs),
                "yardstick": target.yardstick,
                "yardstick_measured": statistics.median(yardstick for _, yardstick in pairs)
                if target.yardstick
                else None,
                "ratio": ratio,
                "ratios": sorted(measured / yardstick for measured, yardstick in pairs),
                "must": target.must,
                "aim": target.aim,
                "verdict": verdict,
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Print the rows for people."""
    print(f"{'what':54} {'measured':>9} {'yardstick':>9}  {'':28} {'ratio':>6} {'must':>5} {'aim':>5}")
    for row in rows:
        yardstick = f"{row['yardstick_measured']:9.1f}" if row["yardstick"] else " " * 9
        print(
            f"{row['what']:54} {row['measured']:9.1f} {yardstick}  {row['yardstick']:28}"
            f" {row['ratio']:6.2f} {row['must']:5g} {row['aim']:5g} {row['verdict']}"
        )
    for note in notes:
        print(note)


@contextlib.contextmanager
def scratch_folder(parent: str) -> Iterator[str]:
    """Give a folder that is removed at the end, however that comes."""
    folder = tempfile.mkdtemp(prefix="kvserver-bench-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run the benchmark, or the part of it that runs in a process of its own."""
    parts: dict[str, Callable[..., None]] = {
        "--load": lambda port, kind, connections, count: generate_load(int(port), kind, int(connections), int(count)),
        "--stock": run_stock,
        "--commits": lambda folder, count: run_commits(folder, int(count)),
        "--dumps": lambda database, count: run_dumps(database, int(count)),
    }
    if sys.argv[1:] and sys.argv[1] in parts:
        parts[sys.argv[1]](*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description="Measure kvserver against yardsticks on the same machine.")
    parser.add_argument("--server", default=os.path.join(ROOT, "kvserver.py"), help="the program to measure")
    parser.add_argument("--directory", default=os.path.dirname(ROOT), help="where to put databases: on a real disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="measure what has this in its name: get, set, webdis, ..."
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests: to try out, not a result")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.check and (arguments.rounds < 5 or arguments.quick):
        parser.error("--check takes at least 5 rounds, and no --quick")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with scratch_folder(arguments.directory) as folder, contextlib.ExitStack() as stack:
        bench = Bench(arguments.server, folder, 0.1 if arguments.quick else 1, stack)
        for number in range(arguments.rounds):
            bench.round = number
            for name in ("get", "set", "slow_disk", "webdis", "list", "many", "start", "memory"):
                if arguments.only in name:
                    getattr(bench, f"measure_{name}")()
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    rows = report(bench)
    for kind, figures in bench.busy.items():
        cpu, generator, server = (statistics.median(column) for column in zip(*figures, strict=True))
        bench.notes.append(
            f"{kind:18} load generator: {cpu:3.0f} us a request, {generator:4.0%} busy; server: {server:4.0%} busy"
        )
    if bench.busy:
        bench.notes.append("If neither was busy all the time, other programs, the disk or Redis were the limit.")
    if arguments.quick:
        bench.notes.append("this was only a try: no result")
    if arguments.json:
        print(json.dumps({"targets": rows, "notes": bench.notes}, indent=1))
    else:
        print_table(rows, bench.notes)
    return int(arguments.check and any(row["verdict"] == "MISSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
