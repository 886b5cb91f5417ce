#!/usr/bin/env python3
"""The benchmark of kvserver: ratios to yardsticks that run side by side with it, on the same machine in the same run.

    python .ci/bench.py [--check] [--json] [--rounds N] [--only TEXT] [--directory FOLDER] [--quick]

Absolute times mean nothing on a machine that others use too, so every figure has a yardstick that is measured in turns
with it, in an order that changes from round to round; what counts is the median of the rounds' ratios. It runs on
Linux, with the standard library alone. --check exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
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
VALUE = "open"
FEW_PAIRS, MANY_PAIRS, LIST_PAIRS = 1_000, 1_000_000, 10_000
SLOW_FSYNC_MICROSECONDS = 10_000


class Target(NamedTuple):
    """A row of the table below. The ratio, or the figure where there is no yardstick, is to reach must, or even aim."""

    key: str
    what: str
    yardstick: str
    must: float
    aim: float
    larger_is_better: bool


STOCK = "stock handler's constant"
TARGETS = (
    Target("get1", "/get, 1 connection, CPU us a request", STOCK, 0.6, 0.4, False),
    Target("get16", "/get, 16 connections, requests/s", STOCK, 1.6, 2.5, True),
    Target("get64", "/get, 64 connections, requests/s", STOCK, 1.7, 2.5, True),
    Target("tail", "/get, 64 connections, p99 ms", STOCK, 0.2, 0.1, False),
    Target("spread", "/get, 64 connections, p99 ms", "its own median", 10, 5, False),
    Target("fresh", "/get, a connection a request, 16 at once, requests/s", STOCK, 1.5, 2, True),
    Target("set1", "/set, 1 connection, requests/s", "bare sqlite3 commits/s", 0.6, 0.8, True),
    Target("set64", "/set, 64 connections, requests/s", "min(3 bare, 0.6 /get at 64)", 1, 1.3, True),
    Target("slow", "/set, 64 connections, fsync of 10 ms, requests/s", "1 connection", 15, 30, True),
    Target("list", "/list of 10,000 pairs, CPU ms", "json.dumps(dict(rows))", 1.15, 0.8, False),
    Target("many", "/get of random keys, 1,000,000 pairs, CPU us", "1,000 pairs", 1.3, 1.1, False),
    Target("rss", "resident MB after 100,000 requests", "", 50, 30, False),
    Target("growth", "resident MB more than after 50,000 requests", "", 2, 2, False),
    Target("idle", "resident MB when idle", "python with three imports", 1.5, 1.2, False),
    Target("start", "start until listening, ms", "python with three imports", 1.5, 1.2, False),
)


# ---- The load generator ----------------------------------------------------------------------------------------------
# It runs in a process of its own, and does as little as it can: requests are made beforehand, and an answer is checked
# by its status and by its end, which is the empty line and the body that must come.

Exchange = tuple[bytes, bytes]  # a request, and how its answer has to end


def get_request(key: str, fresh: bool = False) -> bytes:
    """Return a GET of a key."""
    close = "Connection: close\r\n" if fresh else ""
    return f"GET /get?key={urllib.parse.quote(key)} HTTP/1.1\r\n{FIELDS}{close}\r\n".encode()


def exchanges(kind: str) -> list[Exchange]:
    """Return the requests of a kind of load, which are sent again and again."""
    if kind == "set":
        answer = b"\r\n\r\nSuccess"
        # The values change from request to request, since SQLite commits nothing when nothing changes.
        return [
            (f"GET /set?key=key{number % 100}&value={number} HTTP/1.1\r\n{FIELDS}\r\n".encode(), answer)
            for number in range(10_100)
        ]
    if kind == "list":
        return [(f"GET /list HTTP/1.1\r\n{FIELDS}\r\n".encode(), b'"}')]
    if kind.startswith("random"):
        chosen = random.Random(1).choices(range(int(kind[6:])), k=20_000)
        return [(get_request(f"key{number}"), f"\r\n\r\nvalue {number}".encode()) for number in chosen]
    return [(get_request("door", fresh=kind == "fresh"), f"\r\n\r\n{VALUE}".encode())]


def check_answer(answer: bytes, end: bytes) -> bool:
    """Tell whether an answer is complete; exit when it is not the right one."""
    if not answer.startswith(b"HTTP/1.1 200 "):
        sys.exit(f"the answer is not the expected one: {answer[:200]!r}")
    return answer.endswith(end)


def drive_one(port: int, todo: list[Exchange], count: int) -> list[float]:
    """Send requests on one connection, one after the other, and return each one's seconds.

    It asks for the answer again and again instead of sleeping: what it takes to wake this process would be counted for
    the server otherwise, and is more than the server itself takes on a virtual machine.
    """
    connection = socket.create_connection(("127.0.0.1", port), WAIT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    connection.setblocking(False)
    seconds = []
    for number in range(count):
        request, end = todo[number % len(todo)]
        begun = time.perf_counter()
        connection.send(request)
        answer = b""
        while not answer or not check_answer(answer, end):
            with contextlib.suppress(BlockingIOError):
                answer += connection.recv(1 << 20)
            if time.perf_counter() - begun > WAIT_SECONDS:
                sys.exit(f"there is no answer: {answer[:200]!r}")
        seconds.append(time.perf_counter() - begun)
    return seconds


def drive_many(port: int, todo: list[Exchange], connections: int, count: int) -> list[float]:
    """Keep requests on their way on many connections at once and return each one's seconds."""
    poll, sockets, begun, answers, ends = select.epoll(), {}, {}, {}, {}
    sent = 0
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port), WAIT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        connection.setblocking(False)
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
    for number, connection in sockets.items():
        request, ends[number] = todo[sent % len(todo)]
        begun[number], answers[number] = time.perf_counter(), b""
        connection.send(request)
        sent += 1
    seconds: list[float] = []
    while len(seconds) < count:
        events = poll.poll(WAIT_SECONDS)
        if not events:
            sys.exit("there is no answer")
        for number, _ in events:
            answers[number] += sockets[number].recv(65536)
            if check_answer(answers[number], ends[number]):
                now = time.perf_counter()
                seconds.append(now - begun[number])
                request, ends[number] = todo[sent % len(todo)]
                begun[number], answers[number] = now, b""
                sockets[number].send(request)
                sent += 1
    return seconds


def drive_fresh(port: int, todo: list[Exchange], connections: int, count: int) -> list[float]:
    """Open a connection for each request, so many at once, and return each one's seconds."""
    poll, sockets, answers, begun = select.epoll(), {}, {}, {}
    request, end = todo[0]

    def start() -> None:
        now = time.perf_counter()
        connection = socket.create_connection(("127.0.0.1", port), WAIT_SECONDS)
        connection.send(request)
        number = connection.fileno()
        sockets[number], answers[number], begun[number] = connection, b"", now
        poll.register(number, select.EPOLLIN)

    for _ in range(connections):
        start()
    seconds: list[float] = []
    while len(seconds) < count:
        events = poll.poll(WAIT_SECONDS)
        if not events:
            sys.exit("there is no answer")
        for number, _ in events:
            data = sockets[number].recv(65536)
            answers[number] += data
            if data:
                continue
            if not check_answer(answers[number], end):
                sys.exit(f"the answer is cut: {answers[number]!r}")
            seconds.append(time.perf_counter() - begun[number])
            poll.unregister(number)
            sockets.pop(number).close()
            start()
    return seconds


def generate_load(port: int, kind: str, connections: int, count: int) -> None:
    """Drive a server and print the figures; this is the generator's process."""
    todo = exchanges(kind)
    warm_up, begun = min(count // 10, 500), 0.0
    drive_one(port, todo[-1:], 1)
    for number in (warm_up, count):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        if kind == "fresh":
            seconds = drive_fresh(port, todo, connections, number)
        elif connections == 1:
            seconds = drive_one(port, todo, number)
        else:
            seconds = drive_many(port, todo, connections, number)
        if number == warm_up:
            print("warm", flush=True)
            sys.stdin.readline()
    elapsed = time.perf_counter() - begun
    p99 = statistics.quantiles(seconds, n=100)[98] if len(seconds) > 1 else seconds[0]
    figures = {
        "per_second": len(seconds) / elapsed,
        "median": statistics.median(seconds),
        "p99": p99,
        "generator_cpu": (time.process_time() - begun_cpu) / len(seconds),
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
    """A process that has said that it is ready, with the time this took and, for servers, its port."""

    def __init__(self, command: list[str]) -> None:
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that what strace has started can be ended together with it
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        line = self.read_line()
        self.start_seconds = time.perf_counter() - begun
        self.port = urllib.parse.urlsplit(line.split()[-1]).port or 0 if "listening" in line else 0

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
    generator = Process(own_command("--load", server.port, kind, connections, count))
    try:
        begun = server.cpu_seconds()
        generator.input.write("go\n")
        generator.input.flush()
        figures: dict[str, float] = json.loads(generator.read_line())
        figures["cpu"] = (server.cpu_seconds() - begun) / count
        return figures
    finally:
        generator.end()


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """The servers under test, and what has been measured: a pair of figures a round, by the key of the target."""

    def __init__(self, server: str, folder: str, scale: float, stack: contextlib.ExitStack) -> None:
        self.server, self.folder, self.scale, self.stack = server, folder, scale, stack
        self.pairs: dict[str, list[tuple[float, float]]] = {}
        self.notes: list[str] = []
        self.generator_cpu: list[float] = []
        self.stock = self.start(own_command("--stock"))
        self.main = self.serve(self.database("main.db", {"door": VALUE}))
        self.reversed = False

    def start(self, command: list[str]) -> Process:
        """Start a process that ends with the benchmark."""
        process = Process(command)
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

    def both(self, measured: Callable[[], Any], yardstick: Callable[[], Any]) -> tuple[Any, Any]:
        """Measure both, in an order that changes from round to round."""
        if self.reversed:
            second = yardstick()
            return measured(), second
        return measured(), yardstick()

    def load(self, server: Process, kind: str, connections: int, count: int) -> dict[str, float]:
        """Drive a server with so many requests, fewer when only trying out."""
        figures = load(server, kind, connections, max(int(count * self.scale), connections, 2))
        if kind == "get":
            self.generator_cpu.append(figures["generator_cpu"])
        return figures

    def measure_get(self) -> None:
        """Measure reads against the stock handler."""
        for key, kind, connections, count in (
            ("get1", "get", 1, 10_000),
            ("get16", "get", 16, 10_000),
            ("get64", "get", 64, 10_000),
            ("fresh", "fresh", 16, 4_000),
        ):
            ours, stock = self.both(
                functools.partial(self.load, self.main, kind, connections, count),
                functools.partial(self.load, self.stock, kind, connections, count),
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
        ours, bare = self.both(
            lambda: self.load(self.main, "set", 1, 3_000),
            lambda: run_once("--commits", self.folder, int(3_000 * self.scale)),
        )
        self.note("set1", ours["per_second"], bare)
        many, get = self.both(
            lambda: self.load(self.main, "set", 64, 10_000), lambda: self.load(self.main, "get", 64, 10_000)
        )
        self.note("set64", many["per_second"], min(3 * bare, 0.6 * get["per_second"]))

    def measure_slow_disk(self) -> None:
        """Measure writes on a disk whose fsync takes 10 ms."""
        if not hasattr(self, "slow"):
            inject = f"inject=fdatasync:delay_exit={SLOW_FSYNC_MICROSECONDS}"
            strace = ("strace", "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "-e", "trace=fdatasync", "-e", inject)
            if not shutil.which("strace") or subprocess.run([*strace, "true"], check=False).returncode:
                self.notes.append("the slow disk was left out: there is no strace that can trace here")
                return
            self.slow = self.serve(self.database("slow.db", {"door": VALUE}), strace)
        many, one = self.both(
            lambda: self.load(self.slow, "set", 64, 3_000), lambda: self.load(self.slow, "set", 1, 100)
        )
        self.note("slow", many["per_second"], one["per_second"])

    def measure_list(self) -> None:
        """Measure the CPU time of a long list."""
        if not hasattr(self, "lister"):
            self.list_database = self.database("list.db", {f"key{n}": f"value {n}" for n in range(LIST_PAIRS)})
            self.lister = self.serve(self.list_database)
        ours, dumps = self.both(
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
        large, small = self.both(
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
        ours, python = self.both(
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
    parser.add_argument("--only", default="", metavar="TEXT", help="measure what has this in its name: get, set, ...")
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
            bench.reversed = number % 2 == 1
            for name in ("get", "set", "slow_disk", "list", "many", "start", "memory"):
                if arguments.only in name:
                    getattr(bench, f"measure_{name}")()
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    rows = report(bench)
    if bench.generator_cpu:
        bench.notes.append(f"the load generator took {statistics.median(bench.generator_cpu) * 1e6:.0f} us a request")
    if arguments.quick:
        bench.notes.append("this was only a try: no result")
    if arguments.json:
        print(json.dumps({"targets": rows, "notes": bench.notes}, indent=1))
    else:
        print_table(rows, bench.notes)
    return int(arguments.check and any(row["verdict"] == "MISSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
