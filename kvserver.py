#!/usr/bin/env python3
"""kvserver keeps values for devices and scripts: they set a value by its key, and get it back, over HTTP.

Each user has their own values, and logs in with a password or a token. The server confirms a write once it is on disk.

    python3 kvserver.py serve    run the server; its first start adds the user admin and prints a password
    python3 kvserver.py --help   explain unit, get, set, del, list, adduser, passwd, deluser, users, addtoken, tokens,
                                 deltoken, addhook, hooks, delhook, testhook, backup, restore, export and import

    request                      response
    GET /set?key=K&value=V       200 Success; ttl=SECONDS; nx=1 (409 if the key exists); old=V (409 if it differs)
    GET /get?key=K               200 and the value; 404, or default=D; format=json or age; wait=SECONDS&unless=V
    GET /del?key=K               200 Successfully removed state; 404 for an unknown key, or missing=ok
    GET /incr?key=K              200 and the stored number plus 1, or plus N with by=N
    GET /toggle?key=K            200 and off if on was stored, else on; other words with values=A,B
    GET /list                    200 and a JSON object of keys and values; prefix=P, limit=N, after=K, format=json
    GET PUT DELETE /kv/KEY       the same values as resources
    GET DELETE /history?key=K    the last changes (serve --history N), or delete them; limit=N, since=TIME, format=csv
    GET /events                  a stream (text/event-stream) of all values, then of each change; prefix=P
    GET /health                  200 ok, without a login; 503 if the database cannot be read
    GET /metrics                 counters for admins, in Prometheus' text format
    GET /me/, /admin/            pages for browsers: a user's values, tokens and password; users and hooks, for admins

ROUTES has all methods and parameters. Parameters may be in the query, a form or a JSON object; the body of /set?key=K
may be the value. All paths also exist below /iotpersistenceapi, or below --base-path. Lines like "# ---- Storage ----"
divide the file into parts. Each uses only the parts above it.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - older versions can parse this file, and then say what they need
    sys.exit("kvserver needs Python 3.11 or newer (Raspberry Pi OS Bookworm), not {}.{}.{}".format(*sys.version_info))

import argparse
import base64
import bisect
import collections
import contextlib
import datetime
import errno
import functools
import gc
import getpass
import hashlib
import html
import http.server
import io
import ipaddress
import itertools
import json
import math
import mmap
import os
import queue
import re
import secrets
import selectors
import shlex
import signal
import socket
import sqlite3
import ssl
import threading
import time
import types
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

__version__ = "0.1.0"

# ---- Limits and defaults ---------------------------------------------------------------------------------------------
# The numbers that you may want to change, with their units. They keep clients from filling the memory or stalling us.

KEY_BYTES_MAX, VALUE_BYTES_MAX = 512, 1024 * 1024
BODY_BYTES_MAX = VALUE_BYTES_MAX + 64 * 1024  # the longest value, with room for the form or the JSON around it
PARAMETERS_MAX = 100
TTL_SECONDS_MAX, WAIT_SECONDS_MAX = 10 * 365 * 24 * 3600, 60
LIST_LIMIT_MAX, LIST_BYTES_MAX = 10_000, 32 * 1024 * 1024  # of pairs, or of the changes of one
HISTORY_VALUE_BYTES_MAX = 1024  # longer values are cut off in the history

PASSWORD_CHARACTERS_MIN = 8
SCRYPT_COST_LOG2, SCRYPT_BLOCK_SIZE, SCRYPT_PARALLELISM = 14, 8, 5  # one of OWASP's equal settings; takes 16 MiB
TOKENS_MAX, LABEL_CHARACTERS_MAX = 100, 64  # per user; of the label of a token or a hook
FAILURES_MAX, FAILURE_SECONDS = 10, 30  # failed logins before an address must wait; until one of them is forgotten

WORKERS_MAX = 4  # threads for slow requests
FIRST_BYTE_SECONDS = 10  # and as long again for a TLS handshake before it
REQUEST_SECONDS = 10  # for the head of a request, and again for its body
IDLE_SECONDS, SEND_SECONDS = 30, 10  # without a request; without any progress while sending

HOOK_SECONDS = 10  # for a delivery and its answer
HOOK_GIVE_UP_SECONDS = 24 * 3600  # after the change, at the earliest
HOOK_PENDING_MAX, HOOK_PENDING_BYTES_MAX = 10_000, 16 * 1024 * 1024  # deliveries per hook
EXCHANGES_MAX, ORIGIN_EXCHANGES_MAX = 64, 8  # deliveries at once; of these, to one host and port

STATE_FOLDER = os.environ.get("STATE_DIRECTORY", "").partition(":")[0] or os.path.dirname(os.path.abspath(__file__))
DEFAULT_DATABASE = os.path.join(STATE_FOLDER, "kvserver.db")  # systemd may pass several folders, with colons

# ---- Log -------------------------------------------------------------------------------------------------------------
# One line per event on standard error, without secrets. The logging module would take a tenth of the start-up time.

TOKEN_PREFIX = "kv_"
LOGGED_KINDS_MAX, RARE_LOG_SECONDS = 10_000, 60  # kinds that are remembered; between two lines that clients can cause


def escape_unprintable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def cut_off(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def log(level: str, message: str) -> None:
    line = escape_unprintable(re.sub(TOKEN_PREFIX + "[A-Za-z0-9_-]{8,}", TOKEN_PREFIX + "...", message))
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # closed, or busy in a signal handler
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {level} {line}\n")  # flushed at the end of the line


def remember(memory: dict[Any, Any], key: Hashable, value: object, most: int) -> None:
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > most:  # the oldest goes
        del memory[next(iter(memory))]


class ErrorLog:
    """Logs what may come with every request, each kind only once in a while."""

    def __init__(self) -> None:
        self._paused: dict[Hashable, float] = {}  # kinds, and when they may be logged again, in monotonic seconds

    def write(self, message: str, pause_seconds: float = 1, kind: Hashable = None, level: str = "ERROR") -> None:
        """Log a message, unless one of its kind is paused. Without a kind, only equal messages are of one kind."""
        now = time.monotonic()
        if self._paused.get(kind or message, 0) <= now:
            remember(self._paused, kind or message, now + pause_seconds, LOGGED_KINDS_MAX)
            log(level, message)


# ---- Passwords and tokens --------------------------------------------------------------------------------------------
# Their stored form. A stored hash contains its own parameters, so it stays valid when the settings above change.

SCRYPT_MEMORY_BYTES_MAX = 64 * 1024 * 1024  # for hashes that another program made
BASE64 = "((?:[A-Za-z0-9+/]{4})*[A-Za-z0-9+/]{2,4})"  # without padding
SCRYPT_HASH = re.compile(rf"\$scrypt\$ln=(\d{{1,2}}),r=(\d{{1,2}}),p=(\d{{1,2}})\${BASE64}\${BASE64}")


def scrypt(secret: bytes, salt: bytes, cost: int, block_size: int, parallelism: int, length: int) -> bytes:
    memory = SCRYPT_MEMORY_BYTES_MAX + 1024 * 1024  # OpenSSL needs a little more than the formula gives
    return hashlib.scrypt(secret, salt=salt, n=cost, r=block_size, p=parallelism, maxmem=memory, dklen=length)


def hash_parameters() -> str:
    return f"$scrypt$ln={SCRYPT_COST_LOG2},r={SCRYPT_BLOCK_SIZE},p={SCRYPT_PARALLELISM}$"


def hash_password(password: str | None) -> str:
    """Return the hash to store for a password, in PHC format with a random salt; for None, one that nothing matches."""
    salt, digest = secrets.token_bytes(16), secrets.token_bytes(32)
    if password is not None:
        digest = scrypt(password.encode(), salt, 1 << SCRYPT_COST_LOG2, SCRYPT_BLOCK_SIZE, SCRYPT_PARALLELISM, 32)
    return hash_parameters() + "$".join(base64.b64encode(part).decode().rstrip("=") for part in (salt, digest))


def parse_hash(stored: str) -> tuple[bytes, Callable[[bytes], bytes]] | None:
    """Return a hash's digest, and the function that makes it from the password, or None: it is unknown or too slow."""
    ours = SCRYPT_HASH.fullmatch(stored)
    pbkdf2 = re.fullmatch(r"pbkdf2:sha256:([1-9][0-9]{0,6})\$([^$]+)\$([0-9a-f]{64})", stored)
    scrypt_of_werkzeug = r"scrypt:([0-9]{1,8}):([0-9]{1,4}):([0-9]{1,4})\$([^$]+)\$([0-9a-f]{128})"
    match = ours or pbkdf2 or re.fullmatch(scrypt_of_werkzeug, stored)
    if not match:
        return None
    *numbers, salt_text, digest_text = match.groups()
    if ours:
        salt, digest = (base64.b64decode(text + "=" * (-len(text) % 4)) for text in (salt_text, digest_text))
    else:
        salt, digest = salt_text.encode("utf-8"), bytes.fromhex(digest_text)
    if pbkdf2:
        return digest, lambda secret: hashlib.pbkdf2_hmac("sha256", secret, salt, int(numbers[0]))
    cost, block_size, parallelism = map(int, numbers)
    cost = 1 << cost if ours else cost
    is_power_of_2 = 1 < cost < 1 << 16 * block_size and cost & (cost - 1) == 0  # RFC 7914 section 2
    if not is_power_of_2 or 128 * cost * block_size > SCRYPT_MEMORY_BYTES_MAX or not 0 < parallelism <= 16:
        return None
    return digest, lambda secret: scrypt(secret, salt, cost, block_size, parallelism, len(digest))


def verify_password(password: str, stored: str) -> bool:
    parsed = parse_hash(stored)
    return parsed is not None and secrets.compare_digest(parsed[0], parsed[1](password.encode("utf-8")))


def make_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8")).digest()  # no slow hash is needed: nobody can guess 256 random bits


# ---- Storage ---------------------------------------------------------------------------------------------------------
# A change is on the disk when its method returns; within a transaction, when commit returns. Other connections see it
# only then: no read returns a value that a power cut takes back. Nothing here knows of HTTP.

DATABASE_LOCK_SECONDS, CHECKPOINT_SECONDS = 5, 2  # that a change waits for other processes, a checkpoint for readers
SHORT_POLL_SECONDS = 0.02  # between two looks for something that comes soon
CACHED_ROWS_MAX, CACHED_BYTES_MAX = 256, 4 * 1024 * 1024  # plus the value that passes it
TIMED_PAIRS_MAX = 10_000  # that the server remembers, in case the clock jumps
BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", 0))  # counts sleep; 0 on Windows
running_time: Callable[[], float] = functools.partial(time.clock_gettime, BOOT_CLOCK) if BOOT_CLOCK else time.monotonic
EXPIRED_PAIRS_MAX = 100  # that one transaction deletes: long values take time
DAY_SECONDS = 24 * 3600
VALUE_SHOWN_CHARACTERS_MAX = 40  # in a table
NEXT_KEY = "\0"  # key + NEXT_KEY is the next possible key, because keys contain no NUL
LAST_KEY = "\U0010ffff" * (KEY_BYTES_MAX // 4)  # prefix + LAST_KEY sorts after every key with the same prefix
APPLICATION_ID = 0x6B767372  # "kvsr" in PRAGMA application_id marks our files

# The statements that lead to each schema version (PRAGMA user_version). Never change a released entry; add another.
# AUTOINCREMENT: a late request of a deleted user cannot write to a newer one. WITHOUT ROWID saves a search per pair.
MIGRATIONS = (
    f"""PRAGMA application_id = {APPLICATION_ID};
    CREATE TABLE user (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
        password_hash TEXT NOT NULL, is_admin INTEGER NOT NULL);
    CREATE TABLE pair (user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE, key TEXT NOT NULL,
        value TEXT NOT NULL, updated REAL NOT NULL, PRIMARY KEY (user_id, key)) WITHOUT ROWID""",
    """ALTER TABLE pair ADD COLUMN expires REAL;
    CREATE INDEX pair_expires ON pair (expires) WHERE expires IS NOT NULL;
    CREATE TABLE token (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER NOT NULL REFERENCES user (id)
        ON DELETE CASCADE, digest BLOB NOT NULL UNIQUE, label TEXT NOT NULL, is_read_only INTEGER NOT NULL,
        prefix TEXT NOT NULL, created REAL NOT NULL, last_used_day INTEGER);
    CREATE INDEX token_user_id ON token (user_id)""",
    """CREATE TABLE hook (id INTEGER PRIMARY KEY AUTOINCREMENT, user_id INTEGER NOT NULL REFERENCES user (id)
        ON DELETE CASCADE, pattern TEXT NOT NULL, value TEXT, receiver TEXT NOT NULL, url TEXT NOT NULL,
        label TEXT NOT NULL, queued INTEGER NOT NULL DEFAULT 0, -- number of the newest delivery
        queued_bytes INTEGER NOT NULL DEFAULT 0, -- of all deliveries up to that one
        handled INTEGER NOT NULL DEFAULT 0, result TEXT, result_time REAL);
    CREATE INDEX hook_pattern ON hook (user_id, pattern);
    CREATE TABLE delivery (id INTEGER PRIMARY KEY AUTOINCREMENT, hook_id INTEGER NOT NULL REFERENCES hook (id)
        ON DELETE CASCADE, number INTEGER NOT NULL, bytes_before INTEGER NOT NULL, -- of earlier ones
        key TEXT NOT NULL, value TEXT, old TEXT, created REAL NOT NULL, idempotency_key TEXT NOT NULL,
        UNIQUE (hook_id, number));
    CREATE TABLE prefix_length (length INTEGER PRIMARY KEY); -- to join with: a trigger has no WITH
    WITH c(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM c WHERE n < 512) INSERT INTO prefix_length SELECT n FROM c""",
    """ALTER TABLE hook ADD COLUMN method TEXT NOT NULL DEFAULT 'POST';
    ALTER TABLE hook ADD COLUMN headers TEXT NOT NULL DEFAULT ''; -- templates, a line each
    ALTER TABLE hook ADD COLUMN body TEXT; -- a template, or NULL for JSON
    CREATE TABLE setting (history_rows_max INTEGER NOT NULL); -- per pair, 0 for none
    INSERT INTO setting VALUES (0);
    CREATE TABLE history (user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE, key TEXT NOT NULL,
        number INTEGER, time REAL NOT NULL, value BLOB, PRIMARY KEY (user_id, key, number)) WITHOUT ROWID""",
    "ALTER TABLE user ADD COLUMN tokens_added INTEGER NOT NULL DEFAULT 0",  # deleted ones, too
)

# Triggers write deliveries and history in the transaction of a change. They exist only while hooks or a history exist.
NOW = "((julianday('now') - 2440587.5) * 86400 + 0.001)"  # unix seconds, rounded up: SQLite cuts off microseconds
HAD_EXPIRED = f"(OLD.expires IS NOT NULL AND OLD.expires <= {NOW})"
CHANGED = f"(NEW.value <> OLD.value OR {HAD_EXPIRED})"
# Adds a delivery for each hook that matches a row of pair, which is NEW or OLD.
QUEUE = f"""AND EXISTS (SELECT 1 FROM hook WHERE user_id = {{row}}.user_id) BEGIN
    INSERT INTO delivery (hook_id, number, bytes_before, key, value, old, created, idempotency_key)
    SELECT id, queued + 1, queued_bytes, {{row}}.key, {{value}}, {{old}}, {NOW}, lower(hex(randomblob(16))) FROM hook
    WHERE user_id = {{row}}.user_id AND (hook.value IS NULL OR hook.value = {{value}}) AND pattern IN
        (SELECT {{row}}.key UNION ALL SELECT substr({{row}}.key, 1, length) || '*' FROM prefix_length
        WHERE length <= length({{row}}.key)); END"""
QUEUE_END = QUEUE.format(row="OLD", value="NULL", old="OLD.value")
TRIGGERS = {
    "pair_added": "AFTER INSERT ON pair WHEN TRUE " + QUEUE.format(row="NEW", value="NEW.value", old="NULL"),
    "pair_removed": f"AFTER DELETE ON pair WHEN TRUE {QUEUE_END}",
    "pair_expired": f"BEFORE UPDATE OF value ON pair WHEN {HAD_EXPIRED} {QUEUE_END}",  # the old value ended first
    "pair_changed": f"AFTER UPDATE OF value ON pair WHEN {CHANGED} "
    + QUEUE.format(row="NEW", value="NEW.value", old=f"iif({HAD_EXPIRED}, NULL, OLD.value)"),
    "delivery_added": f"""AFTER INSERT ON delivery BEGIN
        UPDATE hook SET queued = NEW.number, queued_bytes = NEW.bytes_before
            + length(CAST(NEW.key || ifnull(NEW.value, '') || ifnull(NEW.old, '') AS BLOB)) WHERE id = NEW.hook_id;
        DELETE FROM delivery WHERE hook_id = NEW.hook_id AND number < (SELECT min(number) FROM delivery
            WHERE hook_id = NEW.hook_id AND number > NEW.number - {HOOK_PENDING_MAX} AND (number = NEW.number OR
            bytes_before >= (SELECT queued_bytes FROM hook WHERE id = NEW.hook_id) - {HOOK_PENDING_BYTES_MAX})); END""",
}
RECORD = """BEGIN INSERT INTO history VALUES ({row}.user_id, {row}.key, 1 + ifnull((SELECT max(number) FROM history
    WHERE user_id = {row}.user_id AND key = {row}.key), 0), {time}, {value}); END"""
BEGINNING = f"ifnull(substr(CAST(NEW.value AS BLOB), 1, {HISTORY_VALUE_BYTES_MAX + 1}), x'')"  # substr of x'' is NULL
RECORD_NEW = RECORD.format(row="NEW", time="NEW.updated", value=BEGINNING)
RECORD_END = RECORD.format(row="OLD", time=f"iif({HAD_EXPIRED}, OLD.expires, {NOW})", value="NULL")
HISTORY_TRIGGERS = {
    "history_added": f"AFTER INSERT ON pair {RECORD_NEW}",
    "history_removed": f"AFTER DELETE ON pair WHEN EXISTS (SELECT 1 FROM user WHERE id = OLD.user_id) {RECORD_END}",
    "history_expired": f"BEFORE UPDATE OF value ON pair WHEN {HAD_EXPIRED} {RECORD_END}",
    "history_changed": f"AFTER UPDATE OF value ON pair WHEN {CHANGED} {RECORD_NEW}",
    "history_trimmed": """AFTER INSERT ON history WHEN NEW.number % (SELECT 1 + history_rows_max / 16 FROM setting) = 0
        BEGIN DELETE FROM history WHERE user_id = NEW.user_id AND key = NEW.key
        AND number <= NEW.number - (SELECT history_rows_max FROM setting); END""",  # several at once: fewer pages
}

NOT_EXPIRED = "(expires IS NULL OR expires > ?)"
SELECT_PAIR = f"SELECT CAST(value AS BLOB), updated, expires FROM pair WHERE user_id = ? AND key = ? AND {NOT_EXPIRED}"
PAGE = f"""(SELECT key, value, updated, expires FROM pair WHERE user_id = ? AND key BETWEEN ? AND ? AND {NOT_EXPIRED}
    ORDER BY key LIMIT ?)"""  # a user's pairs from key to key; a negative limit means all
PAIR_JSON = """json_object('key', key, 'value', value, 'updated', strftime('%Y-%m-%dT%H:%M:%fZ', updated, 'unixepoch'),
    'age', max(0, CAST(? - updated AS INTEGER)), 'expires', strftime('%Y-%m-%dT%H:%M:%fZ', expires, 'unixepoch'))"""
# Not OR REPLACE: it would run the insert trigger, without the old value. SQLite before 3.35 needs the columns here.
REPLACE = """ON CONFLICT (user_id, key)
    DO UPDATE SET value = excluded.value, updated = excluded.updated, expires = excluded.expires"""
SET_VALUE = f"INSERT INTO pair (user_id, key, value, updated, expires) VALUES (?, ?, ?, ?, ?) {REPLACE}"
# A folder's next pair, with the beginning of its value: as a blob, because SQLite's substr of a text ends at a NUL.
SELECT_ENTRY = f"""SELECT key, ifnull(substr(CAST(value AS BLOB), 1, ?), x''), updated, expires FROM pair
    WHERE user_id = ? AND key BETWEEN ? AND ? AND instr(lower(key), lower(?)) AND {NOT_EXPIRED} ORDER BY key LIMIT 1"""
USER_ROW = "user.id, name, password_hash, is_admin"
TOKEN_ROW = f"token.id, digest, label, is_read_only, prefix, created, last_used_day * {DAY_SECONDS}"
HOOK_REQUEST = "hook.id, receiver, url, method, headers, body"


def utc_second(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def rfc3339(seconds: float) -> str:
    """Return unix seconds as a time such as 2030-01-31T23:59:59.125Z, rounded like SQLite's."""
    julian_1970 = 210_866_760_000_000  # milliseconds; SQLite adds them too, so the sum rounds like its own
    milliseconds = int(seconds * 1000 + julian_1970 + 0.5) - julian_1970
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(milliseconds // 1000))}.{milliseconds % 1000:03}Z"


class Token(NamedTuple):
    id: int
    digest: bytes  # of hash_token
    label: str
    is_read_only: bool
    prefix: str  # of the keys that it may see
    created: float  # unix seconds
    last_used: int | None  # unix seconds of the beginning of the day, in UTC

    def rights(self) -> str:
        prefix = f" {escape_unprintable(self.prefix)}*" if self.prefix else ""
        return ("read" if self.is_read_only else "read and write") + prefix


class User(NamedTuple):
    id: int
    name: str
    password_hash: str  # of hash_password
    is_admin: bool
    token: Token | None = None  # that the user logged in with


NOBODY = User(0, "", "", False)  # SQLite's ids begin with 1
PairId = tuple[int, str]  # user's id, key
PairChange = tuple[PairId, str | None, float]  # with the new value, or None after a delete; unix seconds
UserSummary = tuple[User, int, float | None]  # with the number of pairs, and when the newest was set (unix seconds)
UserPair = tuple[str, str, str, float, float | None]  # user's name, key, value, updated, expires (unix seconds)


class Pair(NamedTuple):
    value: bytes  # UTF-8
    updated: float  # unix seconds, when it was last set
    expires: float | None  # unix seconds
    etag: str  # strong entity tag: a hash of the value, so that equal values have equal tags (RFC 9110 section 8.8.3)


class Entry(NamedTuple):  # a row of a folder: a pair, or a sub-folder, which has only a name
    name: str  # the whole key, or the beginning of keys up to and including the sub-folder's slash
    value: str = ""  # its beginning
    updated: float | None = None  # unix seconds
    expires: float | None = None


class Hook(NamedTuple):
    id: int
    user_name: str
    pattern: str  # a key, or the beginning of keys and a star
    value: str | None  # the value that counts, in quotes and cut off if it is long; None for any
    label: str
    origin: str  # scheme, host and port of its URL, which itself is secret
    pending: int  # deliveries
    result: str | None  # of the last try
    result_time: float | None  # unix seconds


class Delivery(NamedTuple):
    hook_id: int
    origin: str  # scheme, host and port of the URL
    url: str  # secret, like headers and body
    method: str
    headers: str  # a line each
    body: str | None  # without one, it is JSON
    number: int  # counts the hook's deliveries; 0 for a test
    handled: int  # number of the last one that arrived or was given up; a gap up to this one had to make room
    key: str
    value: str | None
    old: str | None
    size: int  # bytes of both values
    created: float  # unix seconds
    idempotency_key: str


class StoreError(Exception): ...  # the database refuses or fails; the message is for people


class StoreBusy(StoreError): ...


class StoreFull(StoreError): ...


class Conflict(StoreError): ...


class NotFound(StoreError): ...  # a token or a hook


class NoSuchUser(StoreError):
    def __str__(self) -> str:
        return f"no user {self.args[0]}; list all with: python3 kvserver.py users; add one: python3 kvserver.py adduser"


ERRORS_BY_CODE: dict[int, tuple[type[StoreError], str]] = {
    sqlite3.SQLITE_BUSY: (StoreBusy, "another process keeps the database locked; try again"),
    sqlite3.SQLITE_CONSTRAINT: (NoSuchUser, "with this id"),  # of a pair; no other constraint may fail
    sqlite3.SQLITE_FULL: (StoreFull, "the database has reached --max-db-mb, or the disk is full; delete something"),
    sqlite3.SQLITE_TOOBIG: (Conflict, f"the list would have more than {LIST_BYTES_MAX} bytes; use limit=N"),
}


def entity_tag(value: bytes) -> str:
    return f'"{hashlib.blake2b(value, digest_size=16).hexdigest()}"'


class Store:
    """Users and their pairs in an SQLite file, for one thread at a time. Methods raise StoreError and sqlite3.Error."""

    def __init__(self, path: str, wait: float = DATABASE_LOCK_SECONDS, mb_max: int = 0, migrate: bool = False) -> None:
        """Open a file by its real path. wait: seconds that a change waits for other processes; mb_max: its size."""
        self.path, self._file = path, os.stat(path)
        uri = f"file:{urllib.parse.quote(os.fsencode(path), safe='')}?mode=rw"  # creates no file
        self._connection = sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None, check_same_thread=False)
        self._pages_max = 2**30 - 1  # SQLite's own limit
        self.commit_seconds = math.inf  # the duration of the last commit
        self.changed_pairs, self.changed_others = list[PairChange](), False  # in the transaction
        self.committed: list[list[PairChange]] = []  # changed_pairs of each commit, until the server hands them out
        # Pairs that got a ttl since the start, and in the transaction: their expires, and the same by running_time.
        self.timed_pairs, self._newly_timed = dict[PairId, tuple[float, float]](), dict[PairId, tuple[float, float]]()
        self.clock_offset = time.time() - running_time()  # when expiries were last shifted
        try:
            self._execute("PRAGMA synchronous = FULL")  # in WAL mode, only FULL makes commits survive a power cut
            self._execute("PRAGMA fullfsync = ON")  # on macOS, fsync alone leaves data in the drive's cache
            self._execute("PRAGMA foreign_keys = ON")  # off by default; a deleted user's pairs would stay
            self._execute("PRAGMA secure_delete = FAST")  # some builds overwrite deleted values, which doubles the log
            if mb_max:
                self._pages_max = mb_max * 1024 * 1024 // self._execute("PRAGMA page_size").fetchone()[0]
                self._execute(f"PRAGMA max_page_count = {self._pages_max}")
            if migrate:
                self._migrate()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def _execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, parameters)
        except sqlite3.Error as error:
            kind, message = ERRORS_BY_CODE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, (None, ""))
            if kind is None:
                raise
            raise kind(message) from error

    def schema_version(self, newest: float = len(MIGRATIONS)) -> int:
        """Return 0 for an empty file; raise StoreError for another program's database, or one newer than newest."""
        version: int = self._execute("PRAGMA user_version").fetchone()[0]
        is_new = version == 0 and not self._execute("SELECT 1 FROM sqlite_master").fetchone()
        if not is_new and self._execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise StoreError(f"{self.path} is a database of another program; name another file")
        if version > newest:
            raise StoreError(f"{self.path} was written by a newer kvserver.py (schema version {version}); use that")
        return version

    def _migrate(self) -> None:
        with self.begin():  # commits, or rolls back after an error
            self.check_file()  # a restore may have replaced it during the wait for the lock
            version = self.schema_version()
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                for statement in f"{script}; PRAGMA user_version = {number}".split(";"):
                    self._execute(statement)
        give_up = time.monotonic() + DATABASE_LOCK_SECONDS
        while True:
            try:
                if self._execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                    raise StoreError(f"SQLite's WAL mode does not work on the disk of the database {self.path}")
                with contextlib.suppress(StoreFull):  # it has synced the log before that
                    self._execute("PRAGMA wal_checkpoint")  # syncs a killed process's last commit before any read
                return
            except StoreBusy:  # SQLite's own timeout ignores this statement
                if time.monotonic() > give_up:
                    raise
                time.sleep(SHORT_POLL_SECONDS)

    def check_file(self) -> None:
        """Raise StoreError if somebody deleted or replaced the file: changes would be lost."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), self._file):
                return
        raise StoreError(f"{self.path} has been deleted or replaced; restart the server; next time, stop it first")

    def checkpoint(self) -> bool:
        """Copy the whole write-ahead log into the database; return whether the next commit restarts the log."""
        with contextlib.closing(Store(self.path, CHECKPOINT_SECONDS)) as store:  # SQLite's own waits for no readers
            return not store._execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0]

    def begin(self, is_reading: bool = False) -> sqlite3.Connection:
        """Lock the database and begin a transaction, or one in which all reads see the same moment."""
        self.check_file()
        self._connection.rollback()  # a failed disk may have refused the last one
        self.changed_pairs, self.changed_others, self._newly_timed = [], False, {}
        self._execute("BEGIN" if is_reading else "BEGIN IMMEDIATE")
        self._changes_before = self._connection.total_changes
        return self._connection

    def commit(self, operations: Sequence[Callable[[Store], Any]], begin: bool = False) -> list[Any]:
        """Run operations in a transaction that has begun or begins, and commit; return what each returned or raised."""
        try:
            if begin:
                self.begin()
            jump = self.clock_jump()
            if jump:
                self._shift_expiries(jump)
            outcomes = [self._run(operation) for operation in operations]
            if not jump and (self.timed_pairs or self._newly_timed) and self.clock_jump():  # some saw false expiries
                return self.commit(operations, begin=True)
            begun = time.monotonic()
            self._execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - its caller raises it
            with contextlib.suppress(sqlite3.Error):  # begin tries again
                self._connection.rollback()
            # One that fails, or a full disk, must not undo the others.
            outcomes = [error] if len(operations) < 2 else [self.commit([each], begin=True)[0] for each in operations]
            self.changed_others = True  # what is in changed_pairs may not have been committed
            return outcomes
        self.commit_seconds = time.monotonic() - begun
        if self._connection.total_changes != self._changes_before:
            self.committed.append(self.changed_pairs)
        self.clock_offset += jump
        if jump:
            log("WARNING", f"the clock jumped by {jump:+.1f} seconds; values set since the start keep their ttl")
        for pair, expiry in self._newly_timed.items():
            remember(self.timed_pairs, pair, expiry, TIMED_PAIRS_MAX)
        return outcomes

    def _run(self, operation: Callable[[Store], Any]) -> Any:
        changes_before = self._connection.total_changes
        try:
            return operation(self)
        except Exception as error:
            if self._connection.total_changes != changes_before or not self._connection.in_transaction:
                raise  # the transaction must end: an operation that fails changes nothing
            return error  # its caller raises it

    def clock_jump(self) -> float:
        """Return by how many seconds the clock has jumped since expiries were last shifted; 0 if by 2 or less."""
        jump = time.time() - running_time() - self.clock_offset
        return jump if abs(jump) > 2 else 0

    def _shift_expiries(self, jump: float) -> None:
        self._renew_triggers()  # those of earlier versions take a shift for an expiry
        self.changed_others = True
        for pair, (expires, end) in self.timed_pairs.items():
            shifted = end + self.clock_offset + jump
            self._newly_timed[pair] = shifted, end
            update = "UPDATE pair SET expires = ? WHERE user_id = ? AND key = ? AND expires = ?"
            self._exceed_limit(update, shifted, *pair, expires)  # unless it has a newer one

    def transact(self, operation: Callable[[Store], Any]) -> Any:
        outcome = self.commit([operation], begin=True)[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def lock_alone(self) -> None:
        """Fold the log into the file, and lock the file until close; raise StoreBusy if another process uses it."""
        self._execute("PRAGMA journal_mode = DELETE")
        self._execute("BEGIN EXCLUSIVE")
        if self._execute("PRAGMA journal_mode").fetchone() != ("delete",):  # somebody was quick between the two
            raise StoreBusy

    def back_up(self, path: str) -> None:
        """Copy the database at one moment into the empty file at path; raise StoreError if the copy is damaged."""
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as copy:
            self._connection.backup(copy)  # all pages in one step, which is one transaction
            copy.execute("PRAGMA journal_mode = DELETE")  # one file is the whole copy, and may be read-only
            if copy.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
                raise StoreError(f"{self.path} is damaged, and was not copied")

    def pairs(self, user_id: int | None = None, prefix: str = "", after: str = "") -> sqlite3.Cursor:
        """Return a cursor over one user's or all pairs, each a UserPair, sorted by user and key."""
        whose = "? IS NULL" if user_id is None else "user.id = ?"  # one user is found by the primary key
        select = f"""SELECT name, key, value, updated, expires FROM user CROSS JOIN pair ON user_id = user.id
            WHERE {whose} AND key BETWEEN ? AND ? AND {NOT_EXPIRED} ORDER BY name, key"""
        return self._execute(select, user_id, max(prefix, after + NEXT_KEY), prefix + LAST_KEY, time.time())

    def entries(self, user_id: int, folder: str, search: str = "", first: str = "") -> Iterator[Entry]:
        """Yield a folder's pairs and sub-folders by name, from first on; for a search, pairs with it in the key."""
        while True:
            sub_folder = "" if search else first[: first.find("/", len(folder)) + 1]
            page = (user_id, max(folder, sub_folder + LAST_KEY if sub_folder else first), folder + LAST_KEY)
            row = self._execute(SELECT_ENTRY, 4 * VALUE_SHOWN_CHARACTERS_MAX + 4, *page, search, time.time()).fetchone()
            if row is None:
                return
            key, value, updated, expires = row
            sub_folder = "" if search else key[: key.find("/", len(folder)) + 1]
            yield Entry(sub_folder) if sub_folder else Entry(key, value.decode("utf-8", "ignore"), updated, expires)
            first = key + NEXT_KEY

    def import_all(self, users: Iterable[User], pairs: Iterable[UserPair]) -> tuple[int, int]:
        """Add users and store pairs, or nothing at all; return how many pairs are stored, and how many had expired."""
        self._execute("CREATE TEMP TABLE imported (name, key, value, updated, expires, PRIMARY KEY (name, key))")
        self._connection.executemany("INSERT OR REPLACE INTO imported VALUES (?, ?, ?, ?, ?)", pairs)  # slow; no lock
        with self.begin():  # commits, or rolls back after an error
            for user in users:
                self.add_user(user.name, user.password_hash, user.is_admin)
            select = "SELECT DISTINCT name FROM imported WHERE name NOT IN (SELECT name FROM user)"
            unknown = ", ".join(name for (name,) in self._execute(select))
            if unknown:
                raise StoreError(f"nothing was imported: {NoSuchUser(unknown)}")
            expired = self._execute("DELETE FROM imported WHERE expires <= ?", time.time())
            insert = f"""INSERT INTO pair (user_id, key, value, updated, expires)
                SELECT id, key, value, updated, expires FROM imported JOIN user USING (name) WHERE TRUE {REPLACE}"""
            return self._execute(insert).rowcount, expired.rowcount

    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Return the numbers of users, pairs, pending deliveries and changes, and the bytes of the file and its log."""
        select = """SELECT (SELECT count(*) FROM user), (SELECT count(*) FROM pair) - (SELECT count(*) FROM pair
            WHERE expires <= ?), (SELECT count(*) FROM delivery), (SELECT count(*) FROM history)"""
        counts = self._execute(select, time.time()).fetchone()  # one condition in one count would read all values
        return (*counts, os.path.getsize(self.path), os.path.getsize(self.path + "-wal"))

    def user(self, login: str | bytes) -> User | None:
        """Return the user with this name, or the user and the token with this digest."""
        select = f"SELECT {USER_ROW} FROM user WHERE name = ?"
        if isinstance(login, bytes):
            select = f"SELECT {USER_ROW}, {TOKEN_ROW} FROM token JOIN user ON user.id = user_id WHERE digest = ?"
        row = self._execute(select, login).fetchone()
        return User(*row[:4])._replace(token=Token(*row[4:]) if row[4:] else None) if row else None

    def users(self, name: str | None = None, after: str = "", limit: int = -1) -> list[UserSummary]:
        """Return one user or all users with names after another, sorted by name; a negative limit means all."""
        select = f"""SELECT {USER_ROW}, count(key), max(updated) FROM user LEFT JOIN pair ON user_id = user.id
            AND {NOT_EXPIRED} WHERE name = ifnull(?, name) AND name > ? GROUP BY name ORDER BY name LIMIT ?"""
        return [(User(*row[:4]), *row[4:]) for row in self._execute(select, time.time(), name, after, limit)]

    def _change_users(self, refusal: StoreError, statement: str, *parameters: Any) -> sqlite3.Cursor:
        self.changed_others = True
        cursor = self._execute(statement, *parameters)
        if not cursor.rowcount:
            raise refusal
        return cursor

    def add_user(self, name: str, password_hash: str, is_admin: bool) -> None:
        insert = "INSERT INTO user (name, password_hash, is_admin) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        self._change_users(Conflict(f"the user {name} exists; choose another"), insert, name, password_hash, is_admin)

    def set_password_hash(self, name: str, password_hash: str, old_hash: str | None = None) -> None:
        """Replace a user's password hash, or if old_hash is given, only that hash; raise NoSuchUser."""
        update = "UPDATE user SET password_hash = ? WHERE name = ? AND password_hash = ifnull(?, password_hash)"
        self._change_users(NoSuchUser(name), update, password_hash, name, old_hash)

    def set_admin(self, name: str, is_admin: bool) -> None:
        if not is_admin and self._execute("SELECT name FROM user WHERE is_admin LIMIT 2").fetchall() == [(name,)]:
            raise Conflict(f"the last admin is {name}; make somebody else an admin first")
        self._change_users(NoSuchUser(name), "UPDATE user SET is_admin = ? WHERE name = ?", is_admin, name)

    def delete_user(self, name: str, even_last_admin: bool) -> None:
        if not even_last_admin:
            self.set_admin(name, False)  # raises Conflict for the last one
        self._change_users(NoSuchUser(name), "DELETE FROM user WHERE name = ?", name)
        self._renew_triggers()

    def tokens(self, name: str) -> list[Token]:
        select = f"SELECT {TOKEN_ROW} FROM token JOIN user ON user.id = user_id WHERE name = ? ORDER BY token.id"
        return [Token(*row) for row in self._execute(select, name)]

    def tokens_added(self, name: str) -> int:
        for (count,) in self._execute("SELECT tokens_added FROM user WHERE name = ?", name):
            return cast(int, count)
        raise NoSuchUser(name)

    def add_token(self, name: str, *row: bytes | str | bool, once: str | None = None) -> None:
        """Add a token. The row: digest, label, is_read_only, prefix. A form's once is the tokens_added that it saw."""
        refusal = "a token was added since this form was opened; press again to add one more"
        count = "UPDATE user SET tokens_added = tokens_added + 1 WHERE name = ? AND ifnull(tokens_added = ?, TRUE)"
        self._change_users(NoSuchUser(name) if once is None else Conflict(refusal), count, name, once)
        if len(self.tokens(name)) >= TOKENS_MAX:
            raise Conflict(f"a user has at most {TOKENS_MAX} tokens; delete one that is no longer used")
        insert = """INSERT INTO token (user_id, digest, label, is_read_only, prefix, created)
            SELECT id, ?, ?, ?, ?, ? FROM user WHERE name = ?"""
        self._change_users(NoSuchUser(name), insert, *row, time.time(), name)

    def note_token_uses(self, days: Mapping[int, int]) -> None:
        self.changed_others = True
        for token_id, day in days.items():
            self._execute("UPDATE token SET last_used_day = ? WHERE id = ?", day, token_id)

    def delete_token(self, name: str, token_id: int | str) -> None:
        refusal = NotFound(f"{name} has no token {token_id}; list them with: python3 kvserver.py tokens {name}")
        delete = "DELETE FROM token WHERE id = ? AND user_id = (SELECT id FROM user WHERE name = ?)"
        self._change_users(refusal, delete, token_id, name)

    def pair(self, user_id: int, key: str) -> Pair | None:
        row = self._execute(SELECT_PAIR, user_id, key, time.time()).fetchone()
        return Pair(row[0], row[1], row[2], entity_tag(row[0])) if row else None

    def as_json(self, key: str, pair: Pair) -> bytes:
        select = f"SELECT CAST({PAIR_JSON} AS BLOB) FROM (SELECT ? AS key, ? AS value, ? AS updated, ? AS expires)"
        return cast(bytes, self._execute(select, time.time(), key, pair.value.decode(), *pair[1:3]).fetchone()[0])

    def page_as_json(self, user_id: int, prefix: str, after: str, limit: int, times: bool) -> tuple[bytes, str | None]:
        """Return a page as a JSON object of values, or of objects with times; and its last key if more pairs follow."""
        page = (user_id, max(prefix, after + NEXT_KEY), prefix + LAST_KEY, time.time())
        value, now = (PAIR_JSON, page[-1:]) if times else ("value", ())
        # Not json_group_object: it would ignore the limit until the end. JSON escapes newlines, so one can separate.
        select = f"SELECT CAST(group_concat(json_object(key, {value}), '\n') AS BLOB) FROM {PAGE}"
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LIST_BYTES_MAX)  # or it is SQLITE_TOOBIG
        objects = self._execute(select, *now, *page, limit).fetchone()[0] or b"{}"
        keys = self._execute(f"SELECT key FROM {PAGE} LIMIT 2 OFFSET ?", *page, limit + 1, limit - 1).fetchall()
        return objects.replace(b"}\n{", b","), keys[0][0] if len(keys) == 2 else None  # of the last pair and the next

    def set_value(self, user_id: int, key: str, value: str, expires: float | None = None, ttl: float = 0) -> None:
        """Store a value until expires (unix seconds), or for ttl seconds; raise NoSuchUser if the user was deleted."""
        now = time.time()
        if ttl:
            expires = now + ttl
            self._newly_timed[user_id, key] = expires, running_time() + ttl
        self._execute(SET_VALUE, user_id, key, value, now, expires)
        self.changed_pairs.append(((user_id, key), value, now))

    def _exceed_limit(self, statement: str, *parameters: Any) -> int:
        self._execute(f"PRAGMA max_page_count = {2**30 - 1}")  # deletes need room too, for hooks and the history
        try:
            return self._execute(statement, *parameters).rowcount
        finally:
            self._execute(f"PRAGMA max_page_count = {self._pages_max}")

    def delete_pair(self, user_id: int, key: str) -> bool:
        delete = f"DELETE FROM pair WHERE user_id = ? AND key = ? AND {NOT_EXPIRED}"
        exists = self._exceed_limit(delete, user_id, key, time.time()) > 0
        if exists:
            self.changed_pairs.append(((user_id, key), None, 0))
        return exists

    def has_expired(self) -> bool:
        return bool(self._execute("SELECT 1 FROM pair WHERE expires <= ? LIMIT 1", time.time()).fetchone())

    def delete_expired(self) -> None:
        select = "SELECT user_id, key FROM pair WHERE expires <= ? ORDER BY expires LIMIT ?"
        for pair in self._execute(select, time.time(), EXPIRED_PAIRS_MAX).fetchall():
            self._exceed_limit("DELETE FROM pair WHERE user_id = ? AND key = ?", *pair)
            self.changed_pairs.append((pair, None, 0))

    def history_rows_max(self) -> int:
        return cast(int, self._execute("SELECT history_rows_max FROM setting").fetchone()[0])

    def keep_history(self, rows_max: int) -> None:
        self._execute("UPDATE setting SET history_rows_max = ?", rows_max)
        delete = """DELETE FROM history WHERE number <= (SELECT max(number) FROM history AS newer
            WHERE newer.user_id = history.user_id AND newer.key = history.key) - ?"""
        self._execute(delete, rows_max)
        self._renew_triggers()

    def history(self, user_id: int, key: str, since: float, limit: int) -> Iterator[tuple[float, str | None, bool]]:
        """Yield the changes of a pair, newest first: time, value, and whether it was cut off."""
        select = """SELECT time, value FROM (SELECT * FROM history WHERE user_id = ? AND key = ? ORDER BY number DESC
            LIMIT (SELECT history_rows_max FROM setting)) WHERE time >= ? ORDER BY number DESC LIMIT ?"""
        for moment, value in self._execute(select, user_id, key, since, limit):
            text = None if value is None else value[:HISTORY_VALUE_BYTES_MAX].decode("utf-8", "ignore")
            yield moment, text, len(value or b"") > HISTORY_VALUE_BYTES_MAX  # a longer value has one byte more

    def history_size(self, user_id: int) -> int:
        return cast(int, self._execute("SELECT count(*) FROM history WHERE user_id = ?", user_id).fetchone()[0])

    def delete_history(self, user_id: int, key: str) -> None:
        self._exceed_limit("DELETE FROM history WHERE user_id = ? AND key = ?", user_id, key)

    def add_hook(self, name: str, *row: str | None) -> int:
        """Add a hook of a user. The row: pattern, value, label, origin, URL, method, headers (a line each), body."""
        while self.has_expired():  # the hook is not told of earlier expiries
            self.delete_expired()
        insert = """INSERT INTO hook (user_id, pattern, value, label, receiver, url, method, headers, body)
            SELECT id, ?, ?, ?, ?, ?, ?, ?, ? FROM user WHERE name = ?"""
        cursor = self._change_users(NoSuchUser(name), insert, *row, name)
        self._renew_triggers()
        return cast(int, cursor.lastrowid)

    def delete_hook(self, hook_id: int | str) -> None:
        self.test_delivery(hook_id)  # raises NotFound
        self._execute("DELETE FROM hook WHERE id = ?", hook_id)
        self._renew_triggers()

    def _renew_triggers(self) -> None:
        for triggers, is_needed in ((TRIGGERS, self.has_hooks()), (HISTORY_TRIGGERS, self.history_rows_max() > 0)):
            for trigger, text in triggers.items():
                self._execute(f"DROP TRIGGER IF EXISTS {trigger}")  # an older one may have other limits
                if is_needed:  # without triggers, a change takes less time
                    self._execute(f"CREATE TRIGGER {trigger} {text}")

    def has_hooks(self) -> bool:
        return bool(self._execute("SELECT 1 FROM hook LIMIT 1").fetchone())

    def hooks(self, user_name: str | None = None, limit: int = -1, after: int | str = 0) -> list[Hook]:
        select = """SELECT hook.id, name, pattern, '"' || substr(value, 1, ?) || iif(length(value) > ?, '…"', '"'),
            label, receiver, (SELECT count(*) FROM delivery WHERE hook_id = hook.id), result, result_time
            FROM hook JOIN user ON user.id = user_id
            WHERE name = ifnull(?, name) AND hook.id > CAST(? AS INTEGER) ORDER BY hook.id LIMIT ?"""
        shown = VALUE_SHOWN_CHARACTERS_MAX
        return [Hook(*row) for row in self._execute(select, shown, shown, user_name, after, limit)]

    def test_delivery(self, hook_id: int | str) -> Delivery:
        select = f"""SELECT {HOOK_REQUEST}, 0, 0, pattern, 'test', NULL, 4, {NOW}, lower(hex(randomblob(16)))
            FROM hook WHERE id = ?"""
        for row in self._execute(select, hook_id):
            return Delivery(*row)
        raise NotFound(f"there is no hook {hook_id}; list them with: python3 kvserver.py hooks")

    def new_deliveries(self, newest: int) -> list[tuple[int, bool, int]]:
        """Return id, success of the last try, and newest delivery of the hooks with deliveries after newest."""
        select = """SELECT hook_id, ifnull(result GLOB '2*', FALSE), max(delivery.id)
            FROM delivery NOT INDEXED JOIN hook ON hook.id = hook_id WHERE delivery.id > ? GROUP BY hook_id"""
        return self._execute(select, newest).fetchall()  # with an index, SQLite would read all pending deliveries

    def next_delivery(self, hook_id: int, with_values: bool) -> Delivery | None:
        """Return the oldest pending delivery of a hook; its values may be long, and are None unless asked for."""
        select = f"""SELECT {HOOK_REQUEST}, number, handled, key, iif(?, delivery.value, NULL), iif(?, old, NULL),
            length(CAST(ifnull(delivery.value, '') || ifnull(old, '') AS BLOB)), created, idempotency_key
            FROM delivery JOIN hook ON hook.id = hook_id WHERE hook_id = ? ORDER BY number LIMIT 1"""
        row = self._execute(select, with_values, with_values, hook_id).fetchone()
        return Delivery(*row) if row else None

    def note_try(self, hook_id: int, result: str, handled: int) -> None:
        self._execute("DELETE FROM delivery WHERE hook_id = ? AND number <= ?", hook_id, handled)
        update = "UPDATE hook SET handled = ?, result = ?, result_time = ? WHERE id = ?"
        self._execute(update, handled, result, time.time(), hook_id)


class CachingStore(Store):
    """A store to read from, which remembers rows until the next commit of any process."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._rows, self._rows_state, self._rows_bytes = dict[Any, Any](), b"", 0  # cached, as they were in that state
        self.has_hooks()  # creates the -shm file, which begins with a header, twice (SQLite's "WAL-mode File Format")
        self._shared_file = open(self.path + "-shm", "rb")  # noqa: SIM115 - closing it drops our locks (POSIX)
        self._shared = mmap.mmap(self._shared_file.fileno(), 96, access=mmap.ACCESS_READ)  # both copies

    def close(self) -> None:
        super().close()
        self._shared.close()
        self._shared_file.close()

    def state(self) -> bytes:
        """Return bytes that every commit changes once it is on the disk. Comparing them takes less than a SELECT."""
        return self._shared[:]

    def wal_pages(self) -> int:
        return int.from_bytes(self._shared[16:20], sys.byteorder)  # mxFrame

    def keep_rows(self, old: bytes, new: bytes, commits: int, changed_pairs: set[PairId] | None) -> bool:
        """Return whether only our commits lie between two states. If so, keep all rows but the changed pairs."""
        before, after = (int.from_bytes(state[8:12], sys.byteorder) for state in (old, new))  # iChange counts commits
        are_all_ours = after == before + commits
        if are_all_ours and changed_pairs is not None and self._rows_state == old:
            for pair in changed_pairs:
                self._rows.pop(pair, None)
            self._rows_state = new
        return are_all_ours

    def _current_rows(self) -> dict[Any, Any]:
        state = self.state()
        is_full = len(self._rows) >= CACHED_ROWS_MAX or self._rows_bytes >= CACHED_BYTES_MAX
        if is_full or state != self._rows_state:
            self._rows, self._rows_state, self._rows_bytes = {}, state, 0  # a commit from now on makes it differ
        return self._rows

    def user(self, login: str | bytes) -> User | None:
        rows = self._current_rows()
        user: User | None = rows.get(login) or super().user(login)
        if user:
            rows[login] = user
        return user

    def pair(self, user_id: int, key: str) -> Pair | None:
        rows = self._current_rows()
        pair: Pair | None = rows.get((user_id, key))
        if pair is None:
            pair = super().pair(user_id, key)
            if pair:
                rows[user_id, key] = pair
                self._rows_bytes += len(pair.value)
        return pair if pair and (pair.expires is None or pair.expires > time.time()) else None


def hand_over(descriptor: int, path: str) -> None:
    """Give root's file to the owner of the database at path, or of its folder: a service must be able to open it."""
    if os.name != "nt" and os.geteuid() == 0:
        owner = os.stat(path if os.path.exists(path) else os.path.dirname(path))
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def lock_database(path: str) -> BinaryIO:
    """Lock a file next to a database until it is closed, and return it; raise BlockingIOError if another has it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with contextlib.ExitStack() as on_error:
        lock = on_error.enter_context(os.fdopen(os.open(path + "-lock", flags, 0o600), "rb"))
        hand_over(lock.fileno(), path)
        if os.name != "nt":  # Windows has no such locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        on_error.pop_all()
    return lock


def has_stray_log(path: str) -> bool:
    """Tell whether the write-ahead log next to a database is another one's. SQLite would mix the two."""
    if not os.path.exists(path + "-wal") or not os.path.getsize(path + "-wal"):
        return False
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read(20)[18:] != b"\2\2"  # WAL mode (SQLite's "Database File Format", section 1.3.3)
    return True


def check_place(path: str, to_write: bool = True) -> str:
    """Return the real path of a database, next to which SQLite puts its other files; raise StoreError."""
    place, folder = os.path.realpath(path), os.path.dirname(os.path.realpath(path))
    if (os.path.exists(place) and not os.path.isfile(place)) or path.endswith("/"):
        raise StoreError(f"{place} is a folder or a device; name a file: --db {shlex.quote(place + '/kvserver.db')}")
    if not os.path.isdir(folder):
        raise StoreError(f"there is no folder for the database {place}; make it with: mkdir -p {shlex.quote(folder)}")
    verb, mode = ("write", os.W_OK) if to_write else ("read", os.R_OK)
    for file in (folder, place, place + "-wal", place + "-shm"):
        if not os.access(file, mode) and os.path.exists(file) and not os.access(file, mode):  # it may be new, or gone
            raise StoreError(f"no permission to {verb} {file}; use sudo, or see who may: ls -ld {shlex.quote(file)}")
    return place


def open_store(path: str, create: bool = True, migrate: bool = True) -> Store:
    """Open the database at path with the newest schema; raise StoreError. Without migrate, its schema stays."""
    try:
        path = check_place(path, to_write=migrate)
        if has_stray_log(path):
            raise StoreError(f"{path}-wal belongs to another database; move it away")
        if not create and not os.path.exists(path):
            raise StoreError(f"there is no database {path}; name it with --db, or type: python3 kvserver.py serve")
        with contextlib.suppress(FileExistsError):  # SQLite gives its -wal and -shm files the same permissions
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        return Store(path, migrate=migrate)
    except (OSError, ValueError, sqlite3.Error) as error:  # ValueError is for a path with NUL
        hint = "name another file, or return to a backup with: python3 kvserver.py restore FILE"
        raise StoreError(f"cannot use the database {path}: {getattr(error, 'strerror', error)}; {hint}") from error


# ---- HTTP messages ---------------------------------------------------------------------------------------------------
# RFC 9110 and RFC 9112. Malformed requests are refused: a proxy that repairs them might see other requests than we do.

REQUEST_LINE_BYTES_MAX, HEADERS_BYTES_MAX, HEADER_FIELDS_MAX = 16 * 1024, 32 * 1024, 100
DEFAULT_PORTS = {"http": 80, "https": 443}
HOOK_BODY_METHODS = ("POST", "PUT", "PATCH")
HOOK_URL_BYTES_MAX, HOOK_BODY_BYTES_MAX = 4096, 16 * 1024 * 1024  # a body counts with the values that it inserts
PLACEHOLDER = re.compile(r"\{(key|value|old|time)\}")
JSON_HEADER = re.compile(r"(?im)^content-type:[^;\n]*[/+]json[ ]*(;|$)")
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # with C1, which some programs take for line ends

JSON, FORM = "application/json", "application/x-www-form-urlencoded"
CHUNKED = -1  # the length of a body in chunks
PARAMETERS, VALUE, EITHER = "parameters", "value", "either"  # EITHER: the value, if the query has a key and no value
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}
format_date = functools.lru_cache(1)(lambda second: time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second)))

HTTP_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~-]+)?\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
ORIGIN = rf"(?i:https?)://(?=[^/?])({HOST.pattern})"
REQUEST_LINE = re.compile(rf"({HTTP_TOKEN}) (?! )(?:{ORIGIN})?([!-~\x80-\xff]*) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(rf"({HTTP_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")

BODY_TOO_LARGE = f"the body is too large: {{}} bytes; the limit is {BODY_BYTES_MAX}, and for a value {VALUE_BYTES_MAX}"
UNPARSED: dict[str, str] = {}  # a request's parameters, until they are parsed
RETRY_AFTER = (("Retry-After", "5"),)


class Response(NamedTuple):  # without the headers that all responses have
    body: bytes = b""
    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    wait_until: float = 0.0  # monotonic seconds: until then, the request first waits for a change
    stream_prefix: str | None = None  # of the keys whose events follow as the body


def redirect(status: int, url: str) -> Response:
    return Response(status=status, headers=(("Location", urllib.parse.quote(url, "%&=+?/:#")),))


class HTTPError(Exception):  # refuses a request in one line that says what to do, without values and credentials
    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


def decode_utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise HTTPError(400, f"{what} is not UTF-8; send UTF-8 (in a URL, ü is %C3%BC)") from None


class Fields(NamedTuple):
    text: str  # of all header fields, as received
    headers: dict[str, str]  # by name in lower case
    is_http_1_0: bool
    keep_alive: bool
    body_length: int  # bytes, or CHUNKED


class Request:
    """A request. The query is still encoded; the attributes below are set later, as soon as they are known."""

    user = NOBODY
    body = b""
    parameters = UNPARSED
    key_in_path = ""  # still encoded
    may_wait = True  # for a change
    was_there = False  # the pair, when the request began to wait
    metrics: Metrics  # for endpoints that run in a thread
    password_hash = ""  # of the parameter password
    test: Delivery | None = None  # of a hook, to send before the response
    refusal: HTTPError | None = None  # of the request, for the page that shows it
    server_url = ""  # as the browser of a page sees it

    def __init__(self, method: str, path: str, query: str, fields: Fields) -> None:
        self.method, self.path, self.query, self.fields = method, path, query, fields
        self.begun = time.monotonic()

    def wants_html(self) -> bool:
        return "text/html" in self.fields.headers.get("accept", "").lower()

    def names_etag(self, header: str, etag: str) -> bool:
        """Return whether if-match or if-none-match names an entity tag, "" for a missing pair; raise HTTPError."""
        condition = self.fields.headers.get(header)
        if condition is None or condition == "*":
            return condition == "*" and etag != ""
        if not re.fullmatch(r'(?:(?:W/)?"[!#-~\x80-\xff]*"(?:[ \t]*,[ \t]*|\Z))+', condition):
            raise HTTPError(400, f'the header {header} is malformed; send * or the ETag of a response, as in "0a1b"')
        # Weak tags match in If-None-Match only (RFC 9110 section 13.1). Proxies that compress add a suffix to ours.
        tags = re.findall(r'(W/)?("[^"]*?)(?:-gzip|-br|-zstd|;gzip)?"', condition)
        return any(tag + '"' == etag and (header != "if-match" or not weak) for weak, tag in tags)


class Route(NamedTuple):  # a row of the table of paths: what answers, who may call it, and where it runs
    path: str  # KEY at its end matches any key
    methods: tuple[str, ...]
    endpoint: Callable[[Any, Request], Response]
    who: str
    where: str
    parameters: tuple[str, ...] = ()
    required: int = 0  # of the first parameters
    body: str = PARAMETERS


def parse_fields(text: str, is_http_1_0: bool) -> Fields:
    """Return the header fields of a request (RFC 9112 sections 5 and 6); raise HTTPError."""
    lines = text.split("\r\n") if text else ()
    if len(lines) > HEADER_FIELDS_MAX or len(text) + 2 > HEADERS_BYTES_MAX:
        raise HTTPError(431, f"the headers are over {HEADER_FIELDS_MAX} lines or {HEADERS_BYTES_MAX} bytes; send fewer")
    headers: dict[str, str] = {}
    for line in lines:
        match = FIELD.fullmatch(line)
        if not match:
            raise HTTPError(400, "a header is malformed; send NAME: VALUE on one line, with no space before the colon")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers:  # sent twice, some could change whose request it is or where it ends; others are joined
            if name in ("authorization", "content-length", "content-type", "host", "transfer-encoding"):
                raise HTTPError(400, f"the header {name} is repeated; send it once")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if not HOST.fullmatch(headers.get("host", "" if is_http_1_0 else " ")):
        raise HTTPError(400, "the header Host is missing or malformed; send a name or an address, perhaps with a port")
    options = [option.strip() for option in headers.get("connection", "").lower().split(",")]
    keep_alive = "close" not in options and (not is_http_1_0 or "keep-alive" in options)
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding")
    if coding is not None and ("content-length" in headers or is_http_1_0):
        raise HTTPError(400, "send Transfer-Encoding without Content-Length, and not with HTTP/1.0")
    if coding is not None and coding.lower() != "chunked":
        raise HTTPError(501, "this transfer coding is not supported; send Content-Length, or chunked")
    if not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise HTTPError(400, "the header Content-Length is malformed; send the number of bytes in the body")
    return Fields(text, headers, is_http_1_0, keep_alive, int(length) if coding is None else CHUNKED)


def parse_head(head: bytes, known: Fields | None = None) -> Request:
    """Return the request with a head, given without its last line; raise HTTPError. Known fields stay as parsed."""
    line, _, text = head.decode("iso-8859-1").removeprefix("\r\n").partition("\r\n")  # ISO 8859-1 keeps every byte
    if len(line) > REQUEST_LINE_BYTES_MAX:
        raise HTTPError(414, f"the URL is over {REQUEST_LINE_BYTES_MAX} bytes; send the value as the body")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(400, "the request line is malformed; send METHOD URL HTTP/1.1, with %20 for a space in the URL")
    method, host, target, major, minor = match.groups()
    if major != "1":  # later minor versions are served like 1.1 (RFC 9110 section 2.5)
        raise HTTPError(505, "this version of HTTP is not supported; use HTTP/1.1")
    if host and target[:1] in ("", "?"):
        target = "/" + target
    if "#" in target or not (target.startswith("/") or (method, target) == ("OPTIONS", "*")):
        raise HTTPError(400, "the URL is malformed; its path begins with a slash, and a # in it is written as %23")
    if not target.isascii():  # many shell scripts send UTF-8 as it is, and the meaning is clear
        target = decode_utf8(target.encode("iso-8859-1"), "the URL")
    path, _, query = target.partition("?")
    if known is None or text != known.text or (minor == "0") != known.is_http_1_0:
        known = parse_fields(text, minor == "0")
    if host:  # it overrides the header Host (RFC 9112 section 3.2.2)
        known = known._replace(text="\r\n", headers={**known.headers, "host": host})
    return Request(method, path, query, known)


def check_incomplete_head(received: bytearray, begin: int) -> int:
    """Raise HTTPError if the bytes from begin on cannot belong to a head. Return the begin for the next call."""
    if re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n").search(received, begin):
        raise HTTPError(400, "this is not HTTP/1.1, or a header is malformed; if it is TLS, use http:// instead")
    if len(received) > REQUEST_LINE_BYTES_MAX + HEADERS_BYTES_MAX + 4:
        parse_head(bytes(received))  # raises HTTPError: the first line or the others are too long
    return max(len(received) - 3, 0)  # the empty line may have begun


def take_chunks(received: bytearray, body: bytearray) -> bool:
    """Move whole chunks to body, and return whether the last one has come (RFC 9112 section 7.1); raise HTTPError."""
    while True:
        match = re.match(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n", received)
        begin, size = (match.end(), int(match[1], 16)) if match else (0, 0)
        if size == 0:
            break
        if len(body) + size > BODY_BYTES_MAX:
            raise HTTPError(413, BODY_TOO_LARGE.format(len(body) + size))
        if len(received) < begin + size + 2:
            return False
        if not received.startswith(b"\r\n", begin + size):
            raise HTTPError(400, "the chunked body is malformed")
        body += received[begin : begin + size]
        del received[: begin + size + 2]
    trailers = re.match(rf"(?:{FIELD.pattern}\r\n)*\r\n", received[begin:].decode("iso-8859-1")) if match else None
    if trailers:
        del received[: begin + trailers.end()]
    elif (b"\r\n\r\n" if match else b"\n") in received or len(received) > 4096:  # each look reads all of it
        raise HTTPError(400, "the chunked body is malformed")
    return trailers is not None


def encode_response(response: Response, connection: str, with_body: bool) -> bytes:
    """Return a response as bytes for one write: a second write would wait until the client acknowledges the first."""
    body, status, content_type, headers, _, stream_prefix = response
    has_length = status not in (204, 304) and stream_prefix is None
    entity = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n" if has_length else ""
    head = f"{STATUS_LINES[status]}Date: {format_date(int(time.time()))}\r\n{entity}"
    head += "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
    for name, value in headers:
        head += f"{name}: {value}\r\n"
    head += f"Connection: {connection}\r\n\r\n" if connection else "\r\n"
    return head.encode("iso-8859-1") + body if with_body else head.encode("iso-8859-1")


def encode_event(kind: str, **members: object) -> bytes:
    """Return an event with a JSON object, all ASCII (WHATWG HTML, server-sent events), as a chunk."""
    event = f"event: {kind}\ndata: {json.dumps(members)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def fill_template(template: str, texts: Mapping[str, str], encode: Callable[[str], str]) -> bytes:
    """Return a template in UTF-8, with encoded texts in place of its placeholders; raise HTTPError if it is long."""
    pieces = PLACEHOLDER.split(template)  # every second one is a name
    encoded = {name: encode(texts[name]).encode() for name in set(pieces[1::2])}
    parts = [encoded[piece] if index % 2 else piece.encode() for index, piece in enumerate(pieces)]
    if sum(map(len, parts)) > HOOK_BODY_BYTES_MAX:
        raise HTTPError(413, f"the body with its values is over {HOOK_BODY_BYTES_MAX // 1024 // 1024} MiB")
    return b"".join(parts)


def encode_delivery(url: urllib.parse.SplitResult, delivery: Delivery) -> bytes:
    """Return the request of a delivery, whose URL has these parts; raise HTTPError if its body is too long."""
    key, value, old = delivery.key, delivery.value, delivery.old
    texts = {"key": key, "value": value or "", "old": old or "", "time": rfc3339(delivery.created)}
    short = {name: text.encode()[:4096].decode(errors="ignore") for name, text in texts.items()}  # whole characters
    percent_encode = functools.partial(urllib.parse.quote, safe="")
    if delivery.body is None:
        members = {"value1": key, "value2": value, "value3": old}  # IFTTT's names
        body = json.dumps(members if delivery.number else {**members, "test": True}).encode()
    elif JSON_HEADER.search(delivery.headers):
        body = fill_template(delivery.body, texts, lambda text: json.dumps(text, ensure_ascii=False)[1:-1])
    else:
        is_form = re.search(rf"(?im)^content-type:[ ]*{FORM}[ ]*(;|$)", delivery.headers)
        body = fill_template(delivery.body, texts, percent_encode if is_form else str)
    login = urllib.parse.unquote(f"{url.username or ''}:{url.password or ''}")
    basic = f"Authorization: Basic {base64.b64encode(login.encode()).decode()}" if login != ":" else ""
    lines = [f"Host: {url.netloc.rpartition('@')[2]}", f"User-Agent: kvserver/{__version__}"]
    if delivery.method in HOOK_BODY_METHODS:
        lines += [f"Content-Type: {JSON}", f"Content-Length: {len(body)}"]
    lines += [f"Idempotency-Key: {delivery.idempotency_key}", "Connection: close", basic, *delivery.headers.split("\n")]
    by_name = {line.partition(":")[0].lower(): line for line in lines if line}  # the hook's replace ours
    target = f"{url.path or '/'}{'?' if url.query else ''}{url.query}"
    head = f"{delivery.method} ".encode() + fill_template(target, short, percent_encode) + b" HTTP/1.1\r\n"
    head += fill_template("\r\n".join(by_name.values()), short, lambda text: CONTROLS.sub(" ", text)) + b"\r\n\r\n"
    return head + body if delivery.method in HOOK_BODY_METHODS else head


class Answer(NamedTuple):
    status: int  # of the response to a delivery, 0 without a whole status line
    text: str  # the status, or the failure; never the URL
    retry_after: float | None = None  # seconds


def parse_answer(received: bytes) -> Answer | None:
    """Return the answer, with the headers that have come so far, or None before its status line is whole."""
    interim = rb"(?:HTTP/1\.[0-9] 1.*\n(?:[^\r\n].*\n)*\r?\n)*"  # responses that are skipped
    head = re.match(interim + rb"HTTP/1\.[0-9] ([2-5][0-9]{2})(?: .*)?\r?\n((?:[^\r\n].*\n)*)", received)
    if not head:
        return None
    status = int(head[1])
    text = f"{status} {http.HTTPStatus(status).phrase}" if status in STATUS_LINES else str(status)
    seconds = re.search(rb"(?im)^retry-after:[ \t]*([0-9]+)[ \t]*\r?$", head[2]) if status in (429, 503) else None
    return Answer(status, text, max(1.0, float(seconds[1])) if seconds else None)


# ---- Parameters ------------------------------------------------------------------------------------------------------
# All are text. Other bytes than UTF-8 and repeated names are refused: a guess could store the wrong value.

JSON_DEPTH_MAX = 100
JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|\[\s*]|{\s*}|[][{},:]|[^][{},:"\s]+')
OUR_HEADERS = ("Host", "Content-Length", "Connection", "Transfer-Encoding", "Idempotency-Key")  # of deliveries
PASSWORD_BYTES_MAX = 4096  # with a user name, in base64, this fits in one header line
PASSWORD_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def parse_form(text: str) -> list[tuple[str, str]]:
    """Return the names and values of a query or a form body (WHATWG URL standard); raise HTTPError."""
    if text.count("&") >= PARAMETERS_MAX:
        raise HTTPError(400, f"there are more than {PARAMETERS_MAX} parameters; send fewer")
    pairs = []
    for field in text.split("&"):
        name, equals, value = field.replace("+", " ").partition("=")
        if equals:
            if "%" in field:
                name, value = (decode_utf8(urllib.parse.unquote_to_bytes(raw), "a parameter") for raw in (name, value))
            pairs.append((name, value))
        elif field:  # a typing error must not store an empty value
            raise HTTPError(400, "a parameter has no value; write NAME=VALUE, and & in a value as %26")
    return pairs


def unique_names(pairs: Iterable[tuple[str, Any]], in_value: bool = False) -> dict[str, Any]:
    """Return values by name; raise HTTPError for a repeated name, except "_", which is ignored anyway."""
    by_name: dict[str, Any] = {}
    for name, value in pairs:
        if name in by_name and name != "_":
            raise HTTPError(400, f"{'a name in the JSON' if in_value else repr(name)[:40]} is repeated; send it once")
        by_name[name] = value
    return by_name


def parse_json(text: str, unique: bool = True) -> Any:
    """Return the value of a JSON text; raise ValueError, or if names must be unique, HTTPError for repeated ones."""
    if text.count("[") + text.count("{") > JSON_DEPTH_MAX:  # deep nesting ends the process on CPython 3.12 and 3.13
        brackets = re.sub(r'(?s)"[^"\\]*(?:\\.[^"\\]*)*"?|[^][{}"]+', "", text)
        if max(itertools.accumulate(1 if each in "[{" else -1 for each in brackets), default=0) > JSON_DEPTH_MAX:
            raise ValueError("nested too deeply")
    make_object = functools.partial(unique_names, in_value=True) if unique else None
    return json.loads(text.lstrip("\ufeff"), object_pairs_hook=make_object)  # PowerShell sends a byte order mark


def indent_json(text: str) -> str:
    """Return JSON with a line for each item, its digits and repeated names kept; return other text as it is."""
    try:
        parse_json(text, unique=False)
    except ValueError:
        return text
    parts, indent = list[str](), "\n"
    for token in JSON_TOKEN.findall(text):
        indent = indent[:-2] if token in "]}" else indent + "  " * (token in "[{")
        parts += [indent * (token in "]}"), token, indent * (token in "[{,"), " " * (token == ":")]
    return "".join(parts)


def parse_body(request: Request, in_query: Mapping[str, str], body: str) -> Iterable[tuple[str, str]]:
    """Return the parameters in a body, members of JSON as strings, or the value that it is; raise HTTPError."""
    header = request.fields.headers.get("content-type", "").lower()
    content_type = header.partition(";")[0].strip()
    other = "" if body == VALUE else f"{FORM}, or "
    if content_type == "multipart/form-data":
        raise HTTPError(415, f"a body of the type {content_type} is not supported; send {other}the value alone")
    if set(re.findall(r"""charset\s*=\s*["']?([^\s"';,]*)""", header)) - {"utf-8", "utf8", "us-ascii", "ascii"}:
        raise HTTPError(415, "this charset is not supported; send UTF-8, with charset=utf-8 or without a charset")
    text = decode_utf8(request.body, "the body")
    may_be_value = body == EITHER and "key" in in_query and "value" not in in_query  # programs label it carelessly
    if body == VALUE or (may_be_value and not (content_type == FORM and re.search("(?:^|&)value=", text))):
        return [("value", text)]
    if content_type != JSON and re.match(r"\ufeff?\s*\{", text):  # curl -d calls everything a form
        raise HTTPError(400, f"this looks like JSON; add the header Content-Type: {JSON}")
    if content_type == FORM:
        return parse_form(text)
    if content_type != JSON:
        raise HTTPError(400, f"send parameters in the query, or in a body of the type {FORM} or {JSON}")
    try:
        members = parse_json(text)
        if not isinstance(members, dict):
            raise HTTPError(400, 'the JSON body is not an object; send one such as {"key": "door"}')
        for name, member in members.items():
            is_nested = isinstance(member, (dict, list)) and name not in ("value", "old", "unless", "default")
            if is_nested or (name == "key" and not isinstance(member, str)):
                raise HTTPError(400, f"{name!r:.40} in the JSON body is not a string; send one")
            if not isinstance(member, str):  # raises ValueError for NaN, Infinity and numbers like 1e999
                members[name] = json.dumps(member, ensure_ascii=False, allow_nan=False)
        "".join(members.values()).encode("utf-8")
    except json.JSONDecodeError as error:
        raise HTTPError(400, f"the JSON body is malformed at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise HTTPError(400, "the JSON body is too deep, has half a surrogate pair, or a number such as NaN") from None
    return members.items()


def required(parameters: Mapping[str, str], name: str) -> str:
    if name not in parameters:
        empty = "; if it is empty, send value=" if name == "value" else ""
        raise HTTPError(400, f"{name} is missing; send {name}=TEXT in the URL (in quotes) or the body{empty}")
    return parameters[name]


def require_key(key: str, token: Token | None = None) -> str:
    if not 1 <= len(key.encode("utf-8")) <= KEY_BYTES_MAX or "\0" in key:
        raise HTTPError(400, f"a key is 1 to {KEY_BYTES_MAX} bytes of UTF-8 without NUL")
    if token and not key.startswith(token.prefix):
        raise HTTPError(403, f"this token may only see keys that begin with {token.prefix!r:.40}")
    return key


def parse_parameters(request: Request, route: Route) -> dict[str, str]:
    """Return the parameters of a request, with a checked key; raise HTTPError if its route doesn't take them."""
    if request.fields.headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise HTTPError(415, "send the body as it is, without Content-Encoding", (("Accept-Encoding", "identity"),))
    parameters = unique_names(parse_form(request.query)) if request.query else {}
    if request.body and route.body != VALUE:
        parameters = unique_names([*parameters.items(), *parse_body(request, parameters, route.body)])
    parameters.pop("_", None)  # scripts in browsers send it to bypass caches
    for name in parameters:
        if name not in route.parameters:
            missing = "".join(f"send {each}; " for each in route.parameters[: route.required] if each not in parameters)
            names = ", ".join(route.parameters) or "none"
            raise HTTPError(400, f"the parameter {name!r:.40} is unknown; {missing}{route.path} takes: {names}")
    if request.key_in_path:
        parameters["key"] = decode_utf8(urllib.parse.unquote_to_bytes(request.key_in_path), "the key")
    if request.key_in_path or "key" in route.parameters[:1]:
        require_key(required(parameters, "key"), request.user.token)
    if route.body == VALUE:
        parameters.update(parse_body(request, parameters, VALUE))
    return parameters


def check_value(value: str) -> str:
    if len(value.encode("utf-8")) > VALUE_BYTES_MAX:
        raise HTTPError(413, f"the value is too large: {len(value.encode())} bytes; the limit is {VALUE_BYTES_MAX}")
    return value


def check_user_name(name: str) -> None:
    if not re.fullmatch("[ -9;-~]{1,64}", name):  # HTTP Basic ends it at a colon (RFC 7617 section 2)
        raise HTTPError(400, "a user name is 1 to 64 printable ASCII characters, without a colon")


def check_password(password: str) -> None:
    least, most = PASSWORD_CHARACTERS_MIN, PASSWORD_BYTES_MAX
    if len(password) < least or len(password.encode("utf-8")) > most or PASSWORD_CONTROL.search(password):
        raise HTTPError(400, f"a password has at least {least} characters, at most {most} bytes, no control characters")


def check_label_and_prefix(label: str, prefix: str) -> None:
    if not label.isprintable() or len(label) > LABEL_CHARACTERS_MAX:
        raise HTTPError(400, f"a label has at most {LABEL_CHARACTERS_MAX} printable characters")
    if "\0" in prefix or len(prefix.encode("utf-8")) > KEY_BYTES_MAX:
        raise HTTPError(400, f"a prefix is at most {KEY_BYTES_MAX} bytes of UTF-8 without NUL")


def check_hook(url: str, method: str, headers: Sequence[str], body: str | None) -> tuple[str, str]:
    """Return the origin of a hook's URL, and a line for each header; raise HTTPError, which quotes nothing."""
    if not re.fullmatch("[!-~]*", url) or len(url) > HOOK_URL_BYTES_MAX:
        raise HTTPError(400, f"a URL has at most {HOOK_URL_BYTES_MAX} letters, digits and signs; percent-encode others")
    is_url, lines = False, "\n".join(headers)
    with contextlib.suppress(ValueError):  # not a possible port
        parts = urllib.parse.urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        is_url = parts.scheme in DEFAULT_PORTS and bool(parts.hostname) and parts.port != 0 and host[-1] != ":"
    if not is_url or not HOST.fullmatch(host) or PLACEHOLDER.search(login + parts.fragment):
        raise HTTPError(400, "a URL is http(s)://HOST:PORT/PATH?QUERY, with placeholders in PATH and QUERY only")
    if any(CONTROLS.search(header) or not re.match(HTTP_TOKEN + ":", header) for header in headers):
        raise HTTPError(400, "a header is 'NAME: TEXT', with ASCII letters in the name, and no control characters")
    names = [*OUR_HEADERS, *(["Authorization"] if login else []), *re.findall("(?m)^[^:]+", lines)]
    if len(set(map(str.lower, names))) < len(names):
        ours = f"{', '.join(OUR_HEADERS)}, and with a login in the URL, Authorization"
        raise HTTPError(400, f"send each header once, and leave out those that kvserver sets: {ours}")
    if len(lines.encode()) > 8192 or len((body or "").encode()) > 65536:
        raise HTTPError(400, "all headers have 8192 bytes at most, a body 65536")
    if body is None:
        return f"{parts.scheme}://{host}", lines
    if method not in HOOK_BODY_METHODS:
        raise HTTPError(400, f"{method} sends no body; leave out --body, or use --method POST")
    if not re.search("(?im)^content-type:", lines):
        is_json = body.startswith(("[", "{")) and not PLACEHOLDER.match(body)
        lines = f"{lines}\nContent-Type: {JSON if is_json else 'text/plain; charset=utf-8'}"
    try:
        if JSON_HEADER.search(lines):
            json.loads(PLACEHOLDER.sub(lambda match: "1" * len(match[0]), body))
    except (ValueError, RecursionError) as error:  # these name the place
        raise HTTPError(400, f"malformed JSON ({error}); for text, add --header 'Content-Type: text/plain'") from None
    return f"{parts.scheme}://{host}", lines


def take_choice(parameters: Mapping[str, str], name: str, choices: Sequence[str]) -> str | None:
    text = parameters.get(name)
    if text is not None and text not in choices:
        raise HTTPError(400, f"the parameter {name} can only be: {', '.join(choices)}")
    return text


def is_on(parameters: Mapping[str, str], name: str) -> bool:
    return parameters.get(name, "").lower() not in ("", "0", "false", "off")  # browsers leave out a box that is off


def take_seconds(given: Mapping[str, str], name: str, least: float, most: float, such: str = "1.5") -> float | None:
    text = given.get(name)
    if text is not None and not (re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", text) and least <= float(text) <= most):
        raise HTTPError(400, f"the parameter {name} is {text[:40]!r}; send {least} to {most} seconds, such as {such}")
    return None if text is None else float(text)


def take_ttl(parameters: Mapping[str, str]) -> float:
    return take_seconds(parameters, "ttl", 0.001, TTL_SECONDS_MAX) or 0


def take_limit(parameters: Mapping[str, str]) -> int:
    text = parameters.get("limit", "-1")
    if "limit" in parameters and not (re.fullmatch("[0-9]{1,5}", text) and 1 <= int(text) <= LIST_LIMIT_MAX):
        raise HTTPError(400, f"the parameter limit is {text[:40]!r}; send a number from 1 to {LIST_LIMIT_MAX}")
    return int(text)


def parse_time(text: object) -> float:
    """Return the unix seconds of a time in RFC 3339; raise HTTPError."""
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(str(text).upper())
        if moment.tzinfo and 0 <= moment.timestamp() < 253402300799.9995:  # a later one rounds to the year 10000
            return moment.timestamp()
    raise HTTPError(400, "a time is like 2030-01-31T23:59:59Z, with a time zone, in the years 1970 to 9999")


# ---- Loop ------------------------------------------------------------------------------------------------------------
# Runs coroutines in one thread. Nothing else runs between two awaits, so they need no locks. Knows no HTTP and no SQL.

READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE
NEVER = math.inf  # as a deadline
RECEIVE_BYTES = 64 * 1024  # at a time
Cancelled = GeneratorExit  # ends the task that it is thrown into


class Task:  # a running coroutine, the events that it waits for on its connection, and until when
    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.coroutine, self.connection = coroutine, cast(socket.socket, None)
        self.events = self.watched = 0  # READABLE, WRITABLE or both: those it waits for, those the selector reports
        self.deadline, self.wakeup = NEVER, cast("Wakeup | None", None)  # monotonic seconds


class Wakeup:
    """Resumes the task that made it: once, with a result, and only while the task still waits."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self.task = loop, loop.current
        self.task.wakeup = self

    def __call__(self, result: Any = None) -> None:
        self._loop.soon.append((self, result))

    def is_wanted(self) -> bool:
        return self.task.wakeup is self


@types.coroutine
def ready(events: int, deadline: float = NEVER) -> Generator[tuple[int, float], Any, Any]:
    """Wait for events or a Wakeup; return its result, or raise it; raise TimeoutError at the deadline."""
    return (yield events, deadline)


async def sleep(seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await ready(0, time.monotonic() + seconds)


async def receive(connection: Any, size: int, deadline: float) -> bytes:
    """Return the next bytes on the task's connection, none at its end; raise ConnectionError or TimeoutError."""
    while True:
        await ready(READABLE, deadline)
        try:
            return cast(bytes, connection.recv(size))
        except BlockingIOError:
            pass
        except OSError as error:  # also an unreachable network
            raise ConnectionAbortedError(error.errno, error.strerror) from None


class Loop:
    """Resumes tasks by their connection, Wakeup or deadline. Passes the exceptions that end tasks to report."""

    def __init__(self, report: Callable[[Exception], object]) -> None:
        self._report, self._tasks, self._selector = report, set[Task](), selectors.DefaultSelector()
        self.current = Task(cast(Any, None))  # while no task runs
        self.soon: collections.deque[tuple[Wakeup, Any]] = collections.deque()
        self._next_check = NEVER  # monotonic seconds; no deadline is earlier
        self._woken, self._waker = socket.socketpair()
        self._selector.register(self._woken, READABLE)

    def close(self) -> None:
        for task in list(self._tasks):
            self.throw(task, Cancelled())
        for part in (self._selector, self._woken, self._waker):
            part.close()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Task:
        """Run a coroutine as a task, until its first await."""
        task = Task(coroutine)
        self._tasks.add(task)
        self._resume(task)
        return task

    def throw(self, task: Task, error: BaseException) -> None:
        """Raise an exception in a waiting task now; do nothing if the task has ended."""
        if task in self._tasks:
            self._resume(task, error)
        del error  # its traceback leads here: together they would keep all memory of the task

    def use(self, connection: socket.socket | None) -> None:
        """Set the connection on which the current task waits."""
        if self.current.watched:
            self._selector.unregister(self.current.connection)
        self.current.connection, self.current.watched = cast(socket.socket, connection), 0

    def post(self, wakeup: Wakeup, result: Any = None) -> None:
        wakeup(result)
        with contextlib.suppress(OSError):  # the loop is closed
            self._waker.send(b"\0")

    def run_once(self, may_wait: bool = True) -> bool:
        """Resume every task that can go on, and return whether any could. With may_wait, wait until one can."""
        resumed = len(self.soon)  # tasks that these add have their turn the next time
        for _ in range(resumed):
            wakeup, result = self.soon.popleft()
            if wakeup.task.wakeup is wakeup:
                self._resume(wakeup.task, result)
        seconds = self._next_check - time.monotonic() if may_wait and not resumed else 0
        events = self._selector.select(min(max(seconds, 0), 60))
        for key, _ in events:
            task: Task | None = key.data
            if task is None:
                self._woken.recv(RECEIVE_BYTES)
            elif task.events:
                self._resume(task)
            elif task.watched:  # it waits for something else, and reads later
                self._selector.unregister(key.fileobj)
                task.watched = 0
        now = time.monotonic()
        if now >= self._next_check:
            for task in list(self._tasks):
                if task.deadline <= now:
                    self._resume(task, TimeoutError())
            self._next_check = min((task.deadline for task in self._tasks), default=NEVER)
        return bool(resumed or events)

    def _resume(self, task: Task, result: Any = None) -> None:
        previous, self.current, task.wakeup, task.events, task.deadline = self.current, task, None, 0, NEVER
        try:
            resume = task.coroutine.throw if isinstance(result, BaseException) else task.coroutine.send
            events, deadline = task.events, task.deadline = resume(result)
            self._next_check = min(self._next_check, deadline)
            if events and events != task.watched:
                try:
                    (self._selector.modify if task.watched else self._selector.register)(task.connection, events, task)
                    task.watched = events
                except OSError as failure:  # the system is short of memory
                    task.watched = 0
                    self._resume(task, failure)
        except (Exception, Cancelled) as end:  # noqa: BLE001 - a mistake must not end the other tasks
            self._tasks.discard(task)
            self.use(None)
            task.wakeup = None
            if not isinstance(end, (StopIteration, Cancelled)):
                self._report(end)
        del result  # an exception's traceback leads here: together they would keep all memory of the task
        self.current = previous


class Gate:  # bounds how many tasks hold a key at once; further ones wait in line
    def __init__(self, loop: Loop) -> None:
        self._loop, self.taken = loop, collections.Counter[Hashable]()
        self._line: list[tuple[Mapping[Hashable, int], Wakeup]] = []

    async def enter(self, bounds: Mapping[Hashable, int]) -> None:
        """Take keys, each at most as often as bounds says; wait for that if needed. Leave with the same bounds."""
        self._admit([(bounds, Wakeup(self._loop))])
        await ready(0)

    def leave(self, bounds: Mapping[Hashable, int]) -> None:
        self.taken -= collections.Counter(bounds.keys())
        line, self._line = self._line, []
        self._admit(line)

    def _admit(self, line: Iterable[tuple[Mapping[Hashable, int], Wakeup]]) -> None:
        for bounds, wakeup in line:
            if all(self.taken[key] < most for key, most in bounds.items()):
                self.taken.update(bounds.keys())
                wakeup()
            else:
                self._line.append((bounds, wakeup))


class Threads:
    """Daemon threads that run functions for tasks. One more starts when all are busy, up to a limit."""

    def __init__(self, loop: Loop, most: int) -> None:
        self._loop, self._gate, self._most, self._started = loop, Gate(loop), most, 0
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Wakeup, Wakeup]] = queue.SimpleQueue()

    async def run(self, function: Callable[[], Any], owner: Hashable = None, deadline: float = NEVER) -> Any:
        """Run a function in a thread, and return or raise its result; raise TimeoutError at the deadline."""
        self._loop.start(self._run(function, owner, Wakeup(self._loop)))
        return await ready(0, deadline)

    async def _run(self, function: Callable[[], Any], owner: Hashable, done: Wakeup) -> None:
        bounds = {owner: max(1, self._most // 2)}  # others get through
        await self._gate.enter(bounds)
        if self._started < min(self._gate.taken.total(), self._most):
            with contextlib.suppress(RuntimeError):  # the machine is short of memory
                threading.Thread(target=self._work, daemon=True).start()
                self._started += 1
        try:
            if self._started:  # else the loop runs the function
                self._jobs.put((function, done, Wakeup(self._loop)))
            done(await ready(0) if self._started else function())
        except Exception as error:  # noqa: BLE001 - the task raises it
            done(error)
        self._gate.leave(bounds)

    def _work(self) -> None:
        while True:
            function, done, ended = self._jobs.get()
            try:
                result = function() if done.is_wanted() else None
            except Exception as error:  # noqa: BLE001 - the task raises it
                result = error
            self._loop.post(ended, result)
            del function, done, ended, result  # a thread that waits must not keep their memory


# ---- TLS -------------------------------------------------------------------------------------------------------------
# A connection that encrypts, and the server's certificate, which can be replaced while it runs.

TLS_RECEIVE_BYTES = 4 * 1024  # at a time: records without data take a millisecond for each 1.4 KB
TLS_FRUITLESS_BYTES_MAX = 64 * 1024  # received beyond 64 per byte of data, or of TLS's own replies


class SecureSocket:
    """A connection with TLS, used like the socket below it. It works in memory, so a thread can shake hands."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._connection, self._incoming, self._outgoing = connection, ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._fruitless_bytes = 0  # after the handshake
        self._encrypted, self._in_flight = b"", 0  # bytes to send, and the length of the data in them

    async def shake_hands(self, threads: Threads, owner: Hashable, deadline: float) -> None:
        """Complete the handshake, which a thread computes; raise OSError or TimeoutError."""
        while not self._tls.version():
            data = await receive(self._connection, TLS_RECEIVE_BYTES, deadline)
            if not data:
                raise ConnectionResetError
            self._incoming.write(data)
            try:
                await threads.run(self._tls.do_handshake, owner, deadline)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                self._flush()  # an alert; it fits into the socket's buffer
                raise
            self._flush()  # never while the thread may still write: nothing guards the memory that they share

    def _flush(self) -> bool:
        self._encrypted += self._outgoing.read()
        with contextlib.suppress(BlockingIOError):
            self._encrypted = self._encrypted[self._connection.send(self._encrypted) :] if self._encrypted else b""
        return not self._encrypted

    def recv(self, size: int) -> bytes:
        """Return the bytes that have come, none at the end; raise BlockingIOError if none has come yet."""
        data, parts, is_at_end = b"", list[bytes](), False
        with contextlib.suppress(BlockingIOError):  # some may have come together with the handshake
            data = self._connection.recv(TLS_RECEIVE_BYTES)
            is_at_end = not data
        self._incoming.write(data)
        try:
            parts.extend(iter(functools.partial(self._tls.read, size), b""))
            is_at_end = True
            with contextlib.suppress(OSError):  # so that the selector reports this end like any other
                self._connection.shutdown(socket.SHUT_RD)
        except ssl.SSLError as error:
            if not isinstance(error, ssl.SSLWantReadError):
                raise ConnectionAbortedError from error
        decrypted = b"".join(parts)
        self._fruitless_bytes = max(0, self._fruitless_bytes + len(data) - 64 * len(decrypted))
        if max(self._fruitless_bytes, self._outgoing.pending) > TLS_FRUITLESS_BYTES_MAX:
            raise ConnectionAbortedError
        if not decrypted and not is_at_end:
            raise BlockingIOError
        return decrypted

    def send(self, data: bytes | memoryview) -> int:
        """Send the first bytes of data, and return how many; raise BlockingIOError to be called again with the same."""
        self._in_flight = self._in_flight or self._tls.write(memoryview(data)[: 64 * 1024])  # reported only as a whole
        if not self._flush():
            raise BlockingIOError
        sent, self._in_flight = self._in_flight, 0
        return sent

    def shutdown(self, how: int) -> None:
        """Send no more, and say so: otherwise the data might seem to be cut off (RFC 8446 section 6.1)."""
        if self._tls.version():
            with contextlib.suppress(OSError, ValueError):
                self._tls.unwrap()
            self._flush()
        self._connection.shutdown(how)


class Certificate:  # the server's, from PEM files; the context is for new connections
    def __init__(self, path: str, key_path: str) -> None:
        self._paths, self.context = (path, key_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        for file in self._paths:  # errors of the next step do not name the file
            open(file, "rb").close()
        try:
            self.context.load_cert_chain(path, key_path, password="")  # or OpenSSL would ask for one
        except ssl.SSLError as error:
            reason = (error.reason or "not PEM").lower().replace("_", " ")
            problem = f"cannot use the certificate {path} with the key {key_path}: {reason}; use PEM files"
            raise ssl.SSLError(1, f"{problem} that belong together, and have no password", path) from None

    def renew(self) -> None:
        try:
            self.context = Certificate(*self._paths).context
            log("INFO", f"loaded the certificate {self._paths[0]}")
        except OSError as error:
            log("ERROR", f"the old certificate stays in use: {error}")


# ---- Metrics ---------------------------------------------------------------------------------------------------------
# Counters for programs that draw curves and raise alarms. They count users and keys, but never name them.

DURATION_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)  # of buckets


class Metrics:
    """Counts the server's work since its start. The loop counts; any thread may ask for the text for Prometheus."""

    def __init__(self, connections: Mapping[Any, Any], polls: Mapping[Any, Any], streams: set[Any]) -> None:
        self._connections, self._polls, self._streams = connections, polls, streams  # their lengths are reported
        self._started = time.monotonic()
        self._responses = collections.Counter[tuple[str, int]]()  # by endpoint and status
        # By endpoint: a count for each of DURATION_SECONDS and one for longer responses, then all seconds.
        self._durations = collections.defaultdict[str, list[float]](lambda: [0] * (len(DURATION_SECONDS) + 2))
        self.failed_logins = self.commits = self.writes = 0
        self.deliveries = self.failed_deliveries = self.dropped_deliveries = 0

    def note_response(self, endpoint: str, status: int, seconds: float) -> None:
        self._responses[endpoint, status] += 1
        numbers = self._durations[endpoint]
        numbers[bisect.bisect_left(DURATION_SECONDS, seconds)] += 1
        numbers[-1] += seconds

    def text(self, store: Store) -> str:
        users, pairs, pending, changes, database_bytes, log_bytes = store.sizes()
        requests = [f'{{endpoint="{path}",status="{code}"}} {n}' for (path, code), n in list(self._responses.items())]
        lines, durations = list[str](), list[str]()
        for endpoint, (*counts, seconds) in list(self._durations.items()):  # a copy: the loop goes on counting
            for bound, count in zip((*DURATION_SECONDS, "+Inf"), itertools.accumulate(counts)):
                durations.append(f'_bucket{{endpoint="{endpoint}",le="{bound}"}} {count}')
            durations += [f'_sum{{endpoint="{endpoint}"}} {seconds}', f'_count{{endpoint="{endpoint}"}} {sum(counts)}']
        for name, kind, meaning, samples in (
            ("requests_total", "counter", "Responses by endpoint and status.", requests),
            ("request_seconds", "histogram", "Time from a request's first byte to its response.", durations),
            ("failed_logins_total", "counter", "Logins with a wrong name, password or token.", self.failed_logins),
            ("commits_total", "counter", "Committed transactions.", self.commits),
            ("writes_total", "counter", "Changes in these transactions, without the refused ones.", self.writes),
            ("deliveries_total", "counter", "Deliveries of hooks that arrived.", self.deliveries),
            ("failed_deliveries_total", "counter", "Attempts to deliver that failed.", self.failed_deliveries),
            ("dropped_deliveries_total", "counter", "Dropped deliveries.", self.dropped_deliveries),
            ("pending_deliveries", "gauge", "Deliveries that have not arrived yet.", pending),
            ("connections", "gauge", "Open connections.", len(self._connections)),
            ("polls", "gauge", "Requests that wait for a change.", len(self._polls)),
            ("streams", "gauge", "Streams of events.", len(self._streams)),
            ("database_bytes", "gauge", "Size of the database.", database_bytes),
            ("wal_bytes", "gauge", "Size of its write-ahead log.", log_bytes),
            ("history_rows", "gauge", "Changes that the history keeps.", changes),
            ("users", "gauge", "Users.", users),
            ("pairs", "gauge", "Values.", pairs),
            ("uptime_seconds", "gauge", "Time since the start.", time.monotonic() - self._started),
        ):
            lines += [f"# HELP kvserver_{name} {meaning}", f"# TYPE kvserver_{name} {kind}"]
            lines += [f"kvserver_{name}{s}" for s in (samples if isinstance(samples, list) else [f" {samples}"])]
        return "\n".join(lines) + "\n"


# ---- Authentication --------------------------------------------------------------------------------------------------
# Credentials in, a User or an HTTPError out. scrypt is slow, so we remember credentials, but only under a keyed hash.

CREDENTIALS_MAX, REFUSED_SECONDS = 1024, 600  # right ones that are remembered, and as many wrong ones, for so long
CHECKS_MAX, CHECK_SECONDS = 64, 10  # passwords that wait to be checked, and how long a request waits for that
THROTTLED_ADDRESSES_MAX = 10_000
# Visitors of a route. ANYONE and BROWSER need no login; for a BROWSER, the path exists only in HTML. A PERSON needs a
# password, a USER may have a token. An ADMIN is a PERSON; an OPERATOR is an admin, who may have an unrestricted token.
ANYONE, BROWSER, USER, PERSON, ADMIN, OPERATOR = "anyone", "browser", "user", "person", "admin", "operator"
NO_LOGIN, PAGE_VISITORS = (ANYONE, BROWSER), (PERSON, ADMIN)
# Pages have their own realm and paths, so browsers keep their credentials from the API (RFC 7617 section 2.2).
REALMS = {USER: "kvserver", OPERATOR: "kvserver", PERSON: "kvserver pages", ADMIN: "kvserver pages"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]
Check = tuple[bytes, str]  # the keyed hash of a login, and the stored hash that it must match
Commit = Callable[[Callable[[Store], Any]], Awaitable[Any]]  # makes a change, and returns its result when it is on disk


def check_no_prefetch(headers: Mapping[str, str]) -> None:
    for name in ("sec-purpose", "purpose", "x-moz", "x-purpose"):
        if name in headers and re.search("prefetch|prerender|preview", headers[name].lower()):
            raise HTTPError(503, "the browser loads this in advance, so nothing was changed; open it again")


def check_same_site(headers: Mapping[str, str]) -> None:
    """Raise HTTPError when a browser sends this for a page of another site. Programs send none of these headers."""
    site, url = headers.get("sec-fetch-site"), headers.get("origin", headers.get("referer"))
    if site is None and url is not None:
        origin = re.match("https?://([^/?#]*)", url.lower())  # None for "null"; a TLS proxy hides the scheme from us
        site = "same-origin" if origin and origin[1] == headers.get("host", "").lower() else "cross-site"
    # Browsers never add a token by themselves: the page knows it.
    if site not in (None, "same-origin", "none") and headers.get("authorization", "")[:7].lower() != "bearer ":
        way_out = "open the page here; in a program, leave out Origin and Referer, or use Authorization: Bearer TOKEN"
        raise HTTPError(403, f"another site's page sent this, or a proxy changed the header Host; {way_out}")


def check_visitor(user: User, who: str) -> None:
    if who in PAGE_VISITORS and user.token:
        raise HTTPError(401, "a token does not open pages; log in with your password")
    if who in (ADMIN, OPERATOR) and not user.is_admin:
        raise HTTPError(403, "only admins may do this; ask one of them")
    if who == OPERATOR and user.token and (user.token.is_read_only or user.token.prefix):
        raise HTTPError(403, "this token is restricted; use one that was made without --read-only and --prefix")


def parse_address(text: str) -> Address | None:
    """Return an IP address, an IPv4 address for one that is mapped to IPv6; None for any other text."""
    text = re.sub(r"^\[(.*)\](:\d+)?$|^([\d.]+):\d+$", r"\1\3", text.strip())  # without the port that some proxies add
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])  # a zone may be any text
        return getattr(address, "ipv4_mapped", None) or address
    return None


def client_address(peer: str, forwarded_for: str, proxies: Networks) -> Address | None:
    """Return the sender's address: the peer, or if that is a trusted proxy the address that X-Forwarded-For names."""
    address = parse_address(peer)
    # Every proxy appends its client's address. A sender may make up those before the last one that is no proxy's.
    for hop in map(parse_address, reversed(forwarded_for.split(","))):
        if address is None or hop is None or not any(address in network for network in proxies):
            break
        address = hop
    return address


def client_of(address: Address | None) -> Hashable:
    """Return the throttle's key of an address. All of an IPv6 /64 share one, since one person can use them all."""
    return int(address) >> 64 if isinstance(address, ipaddress.IPv6Address) else address


def decode_credentials(authorization: str) -> tuple[str | None, str]:
    """Return a header's name and password (RFC 7617), both "" if malformed, or None and a token; raise HTTPError."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return None, credentials.strip(" ")
    if scheme.startswith(TOKEN_PREFIX):
        raise HTTPError(401, "the word Bearer is missing before the token; send Authorization: Bearer TOKEN")
    if scheme.lower() != "basic":
        raise HTTPError(401, "log in with user and password (curl -u USER:PASSWORD), or Authorization: Bearer TOKEN")
    with contextlib.suppress(ValueError):
        name, colon, password = base64.b64decode(credentials.strip(" "), validate=True).decode("utf-8").partition(":")
        # To scrypt, "password" and "password\0" are the same. A lone password must not come into the log as a name.
        if colon and not PASSWORD_CONTROL.search(name + password):
            return name, password
    return "", ""


class Authenticator:
    """Finds the users of requests. Passwords are checked in one thread, everything else runs in the loop."""

    def __init__(self, store: Store, loop: Loop, threads: Threads, commit: Commit, metrics: Metrics) -> None:
        self._store, self._loop, self._commit, self._metrics = store, loop, commit, metrics
        self.scrypt, self._threads = Threads(loop, 1), threads  # glibc keeps 16 MiB per thread that ran scrypt
        self._unknown_user_hash = hash_password(None)  # checked for unknown names, so times do not tell which exist
        self._verified: dict[Check, None] = {}  # a check contains the stored hash: a new password counts at once
        self._refused: dict[Check, float] = {}  # failed checks, until when: one device must not throttle its neighbours
        self._secret, self._errors = secrets.token_bytes(32), ErrorLog()
        self._waiting: dict[Check, list[Wakeup]] = {}  # requests that wait for a check
        self._paid_off: dict[Hashable, float] = {}  # when a client's last failure is forgotten, in monotonic seconds

    async def authenticate(self, authorization: str, find_address: Callable[[], Address | None]) -> User:
        name, password = decode_credentials(authorization)
        digest = hashlib.blake2b(f"{name}:{password}".encode(), key=self._secret).digest()
        while True:  # every round reads the rows: during a check, everything may change, in another process too
            user = self._store.user(hash_token(password)) if password.startswith(TOKEN_PREFIX) else None
            if user and name in (None, user.name):
                return user
            user = self._store.user(name or "") or NOBODY
            check = digest, user.password_hash or self._unknown_user_hash
            if check in self._verified:
                return user
            is_refused = time.monotonic() < self._refused.get(check, 0)
            if is_refused or await self._check(check, name, password, find_address()) is False:
                self._metrics.failed_logins += 1
                wrong = "user name or password is wrong" if name else "login is not USER:PASSWORD in UTF-8"
                raise HTTPError(401, "the token is unknown" if name is None else f"the {wrong}")

    def _charge(self, address: Address | None, failures: int) -> None:  # by client: else anybody could lock a user out
        now, client = time.monotonic(), client_of(address)
        paid_off = max(self._paid_off.get(client, now), now) + failures * FAILURE_SECONDS
        wait = math.ceil(round(paid_off - now - FAILURES_MAX * FAILURE_SECONDS, 3))  # seconds
        if wait > 0:
            self._errors.write(f"login throttled: address={address}", RARE_LOG_SECONDS, client, "WARNING")
            raise HTTPError(429, f"too many failed logins; try again in {wait} seconds", (("Retry-After", str(wait)),))
        remember(self._paid_off, client, paid_off, THROTTLED_ADDRESSES_MAX)

    async def _check(self, check: Check, name: str | None, password: str, address: Address | None) -> bool | None:
        is_first = check not in self._waiting
        if is_first:  # the others have the same header, and share its check
            if len(self._waiting) >= CHECKS_MAX and name and password:
                raise StoreBusy("no password can be checked just now; try again")
            self._charge(address, 1)  # now, or all guesses before the first failure would be free
        self._waiting.setdefault(check, []).append(Wakeup(self._loop))
        if is_first:
            self._loop.start(self._verify(check, name or "", password, address))
        try:
            return cast("bool | None", await ready(0, time.monotonic() + CHECK_SECONDS))
        except TimeoutError:
            raise StoreBusy("the server is too busy; try again") from None

    async def _verify(self, check: Check, name: str, password: str, address: Address | None) -> None:
        (digest, stored), waiting = check, self._waiting[check]
        threads = self.scrypt if SCRYPT_HASH.fullmatch(stored) else self._threads  # other programs' hashes may be slow
        try:
            result = bool(name and password) and await threads.run(
                lambda: verify_password(password, stored) if any(map(Wakeup.is_wanted, waiting)) else None, "checks"
            )
        except Exception as error:  # noqa: BLE001 - the requests raise it
            result = error
        if result is False:
            if name or password:  # else the header is malformed
                remember(self._refused, check, time.monotonic() + REFUSED_SECONDS, CREDENTIALS_MAX)
            log("WARNING", f"login failed: user={name[:64]!r} address={address}")  # repr: no name forges an address
        else:
            self._charge(address, -1)
        if result is True:
            remember(self._verified, check, None, CREDENTIALS_MAX)
        for wakeup in self._waiting.pop(check):
            wakeup(result)
        if result is True and not stored.startswith(hash_parameters()):  # another program's, or with other parameters
            with contextlib.suppress(StoreError, sqlite3.Error):  # the old hash is good too
                new_hash: str = await self.scrypt.run(lambda: hash_password(password), "checks")
                await self._commit(lambda store: store.set_password_hash(name, new_hash, stored))
                remember(self._verified, (digest, new_hash), None, CREDENTIALS_MAX)


# ---- API -------------------------------------------------------------------------------------------------------------
# One plain function for each endpoint of the table at the top. Clients of IoT Persistence Api compare these bodies.

NUMBER_DIGITS_MAX = 100
NUMBER = re.compile(rf"-?(?:[0-9]{{1,{NUMBER_DIGITS_MAX}}}|(?=[0-9.]{{3,{NUMBER_DIGITS_MAX + 1}}}\Z)[0-9]+\.[0-9]+)")
A_NUMBER = f"a number such as 5, -1 or 0.25, without +, of at most {NUMBER_DIGITS_MAX} digits"
UNKNOWN_KEY = "there is no such key; store one with /set?key=KEY&value=VALUE, or PUT /kv/KEY"


def set_value(store: Store, request: Request) -> Response:
    parameters, ttl = request.parameters, 0.0
    key, value = parameters["key"], check_value(required(parameters, "value"))
    if len(parameters) > 2:
        old, only_new, ttl = parameters.get("old"), take_choice(parameters, "nx", ("1",)), take_ttl(parameters)
        if old is not None and only_new:
            raise HTTPError(400, "the parameters nx and old exclude each other; leave one out")
        pair = store.pair(request.user.id, key) if only_new or old is not None else None
        if only_new and pair:
            raise HTTPError(409, "Key exists")
        if old is not None and (pair is None or pair.value != old.encode("utf-8")):
            raise HTTPError(409, "Value differs")
    store.set_value(request.user.id, key, value, ttl=ttl)
    return Response(b"Success")


def end_of_wait(request: Request, pair: Pair | None) -> float:
    """Return the monotonic time until which the request waits for a change, or 0 to respond now."""
    seconds, unless = take_seconds(request.parameters, "wait", 0, WAIT_SECONDS_MAX), request.parameters.get("unless")
    if seconds is None and unless is None:
        return 0
    if seconds is None or (unless is None and "if-none-match" not in request.fields.headers):
        raise HTTPError(400, "to wait for a change, send wait=SECONDS with unless=VALUE or the header If-None-Match")
    is_news = request.was_there
    if pair:
        same = pair.value == unless.encode() if unless is not None else request.names_etag("if-none-match", pair.etag)
        is_news = not same
    request.was_there = pair is not None
    now, deadline = time.monotonic(), request.begun + seconds
    if is_news or not request.may_wait or deadline <= now:
        return 0
    return min(deadline, now + max(0, pair.expires - time.time())) if pair and pair.expires is not None else deadline


def get_value(store: Store, request: Request) -> Response:
    pair = store.pair(request.user.id, request.parameters["key"])
    if pair and len(request.parameters) == 1 and "if-none-match" not in request.fields.headers:  # the usual case
        return Response(pair.value, headers=(("ETag", pair.etag),))
    form, default = take_choice(request.parameters, "format", ("json", "age")), request.parameters.get("default")
    if form and default is not None:
        raise HTTPError(400, "the parameter default is for the plain value; leave out format")
    wait_until = end_of_wait(request, pair)
    if wait_until:
        return Response(wait_until=wait_until)
    if pair is None:
        if default is None:
            raise HTTPError(404, UNKNOWN_KEY)
        return Response(default.encode("utf-8"))
    if not form and "unless" not in request.parameters and request.names_etag("if-none-match", pair.etag):
        return Response(status=304, headers=(("ETag", pair.etag),))
    if form == "json":
        return Response(store.as_json(request.parameters["key"], pair), content_type=JSON)
    if form == "age":
        return Response(str(max(0, int(time.time() - pair.updated))).encode())
    return Response(pair.value, headers=(("ETag", pair.etag),))


def check_preconditions(request: Request, pair: Pair | None) -> None:
    etag = pair.etag if pair else ""  # If-Match comes first (RFC 9110 section 13.2.2)
    is_wanted = "if-match" not in request.fields.headers or request.names_etag("if-match", etag)
    if not is_wanted or request.names_etag("if-none-match", etag):
        raise HTTPError(412, "the value does not match If-Match or If-None-Match; get it, and try again")


def put_resource(store: Store, request: Request) -> Response:
    value, ttl = check_value(required(request.parameters, "value")), take_ttl(request.parameters)
    if "content-range" in request.fields.headers:  # RFC 9110 section 14.5
        raise HTTPError(400, "a part of a value cannot be stored; send all of it, without Content-Range")
    pair = store.pair(request.user.id, request.parameters["key"])
    check_preconditions(request, pair)
    store.set_value(request.user.id, request.parameters["key"], value, ttl=ttl)
    return Response(b"Success", 200 if pair else 201, headers=(("ETag", entity_tag(value.encode("utf-8"))),))


def delete_pair(store: Store, request: Request) -> Response:
    key, may_be_missing = request.parameters["key"], take_choice(request.parameters, "missing", ("ok",))
    pair = store.pair(request.user.id, key)
    if pair is None and not may_be_missing:  # whatever the preconditions say (RFC 9110 section 13.2.1)
        raise HTTPError(404, UNKNOWN_KEY if request.key_in_path else "there is no such key; missing=ok allows this")
    if pair:
        check_preconditions(request, pair)
        store.delete_pair(request.user.id, key)
    return Response(b"Successfully removed state")


def increment(store: Store, request: Request) -> Response:
    import decimal

    by, ttl = request.parameters.get("by", "1"), take_ttl(request.parameters)
    if not NUMBER.fullmatch(by):
        raise HTTPError(400, f"the parameter by is {A_NUMBER}")
    pair = store.pair(request.user.id, request.parameters["key"])
    stored = pair.value.decode("utf-8") if pair else "0"
    if not NUMBER.fullmatch(stored):
        raise HTTPError(409, f"the stored value is not {A_NUMBER}; set one first")
    exact = decimal.Context(prec=2 * NUMBER_DIGITS_MAX + 1)  # all digits may be before the point, or behind it
    total = exact.normalize(exact.add(decimal.Decimal(stored), decimal.Decimal(by)))
    number = f"{total:f}" if total else "0"
    if not NUMBER.fullmatch(number):
        raise HTTPError(409, f"the sum would not be {A_NUMBER}")
    store.set_value(request.user.id, request.parameters["key"], number, pair.expires if pair else None, ttl)
    return Response(number.encode())


def toggle(store: Store, request: Request) -> Response:
    words, ttl = request.parameters.get("values", "on,off").split(","), take_ttl(request.parameters)
    if len(words) != 2 or not all(words) or words[0] == words[1]:
        raise HTTPError(400, "the parameter values is two different words with a comma between, such as on,off")
    pair = store.pair(request.user.id, request.parameters["key"])
    if pair and pair.value not in [word.encode("utf-8") for word in words]:
        raise HTTPError(409, "the stored value is neither word; set one first, or use /toggle with values=A,B")
    word = check_value(words[1] if pair and pair.value == words[0].encode("utf-8") else words[0])
    store.set_value(request.user.id, request.parameters["key"], word, pair.expires if pair else None, ttl)
    return Response(word.encode("utf-8"))


def list_pairs(store: Store, request: Request) -> Response:
    parameters, token = request.parameters, request.user.token
    with_times, limit = take_choice(parameters, "format", ("json",)) is not None, take_limit(parameters)
    prefix, own_prefix = parameters.get("prefix", ""), token.prefix if token else ""
    if not prefix.startswith(own_prefix) and not own_prefix.startswith(prefix):
        return Response(b"{}", content_type=JSON)
    prefix = max(prefix, own_prefix, key=len)
    page, last_key = store.page_as_json(request.user.id, prefix, parameters.get("after", ""), limit, with_times)
    link = f'<?{urllib.parse.urlencode({**parameters, "after": last_key})}>; rel="next"'
    return Response(page, content_type=JSON, headers=(("Link", link),) if last_key is not None else ())


def require_history(store: Store, request: Request) -> None:
    pair = request.user.id, request.parameters["key"]
    if not store.history_rows_max():
        raise HTTPError(404, "this server keeps no history; start it with --history N, as in: serve --history 100")
    if not store.pair(*pair) and not any(store.history(*pair, since=0, limit=1)):
        raise HTTPError(404, UNKNOWN_KEY)


def show_history(store: Store, request: Request) -> Response:
    require_history(store, request)
    limit, since = take_limit(request.parameters), request.parameters.get("since", "1970-01-01T00:00:00Z")
    if re.match("[0-9]+-", since):
        # A plus in a query means a space. Responses round to milliseconds, and such a time must include its change.
        begin = parse_time(re.sub(r" (\d\d:\d\d)\Z", r"+\1", since)) - 0.0005
    else:  # at most 10**9 seconds, so unix seconds are refused
        begin = time.time() - (take_seconds(request.parameters, "since", 0, 10**9, "3600 or 2030-01-31T23:59:59Z") or 0)
    is_csv = take_choice(request.parameters, "format", ("csv",)) is not None
    body = bytearray(b"time,value,state\r\n" if is_csv else b"")
    for moment, value, is_cut in store.history(request.user.id, request.parameters["key"], begin, limit):
        if is_csv:
            text = (value or "").replace('"', '""')
            state = "gone" if value is None else "cut" if is_cut else "set"
            body += f'{rfc3339(moment)},"{text}",{state}\r\n'.encode()
        else:
            change = {"time": rfc3339(moment), "value": value} | ({"cut": True} if is_cut else {})
            body += b"," + json.dumps(change, ensure_ascii=False).encode()
        if len(body) > LIST_BYTES_MAX:
            raise Conflict(ERRORS_BY_CODE[sqlite3.SQLITE_TOOBIG][1])
    content, kind = (bytes(body), "text/csv; charset=utf-8") if is_csv else (b"[" + body[1:] + b"]", JSON)
    return Response(content, content_type=kind)


def delete_history(store: Store, request: Request) -> Response:
    require_history(store, request)
    store.delete_history(request.user.id, request.parameters["key"])
    return Response(b"Success")


def stream_events(store: Store, request: Request) -> Response:
    prefix, own = request.parameters.get("prefix", ""), request.user.token.prefix if request.user.token else ""
    if not own.startswith(prefix):
        require_key(prefix, request.user.token)
    # X-Accel-Buffering makes nginx pass each event on at once. HTTP/1.0 has no chunks.
    headers = (("Content-Type", "text/event-stream"), ("X-Accel-Buffering", "no"), ("Transfer-Encoding", "chunked"))
    return Response(headers=headers[: 2 if request.fields.is_http_1_0 else 3], stream_prefix=max(prefix, own, key=len))


def check_health(store: Store, request: Request) -> Response:
    store.user("")
    store.pair(NOBODY.id, "")
    return Response(b"ok")


def report_metrics(store: Store, request: Request) -> Response:
    return Response(request.metrics.text(store).encode(), content_type="text/plain; version=0.0.4; charset=utf-8")


# ---- Pages -----------------------------------------------------------------------------------------------------------
# HTML that needs no script, no network and no cookie. A template is HTML with {names}; fill escapes every value that it
# puts there. All addresses are relative, so pages work behind any prefix, whether a proxy keeps or strips it.

HTML = "text/html; charset=utf-8"
PAGE_ROWS_MAX = 100
REFRESH_SECONDS, DONE_SECONDS = 10, 30  # of a page that reloads itself; for so long, a page tells of a change
FORM_BYTES_MAX = BODY_BYTES_MAX - 4096  # of an edited value, with room for the other fields
VALUE_READ_CHARACTERS_MAX = 20_000  # on its page; a longer one is cut off, or not indented
OPPOSITES = {"on": "off", "off": "on", "open": "closed", "closed": "open", "true": "false", "false": "true"}
USER_FIELDS = ("action", "username", "password", "isAdmin", "id")
OWN_FIELDS: tuple[str, ...] = ("action", "key", "value", "ttl", "never", "by", "etag", "page", "id", "once")
OWN_FIELDS += ("label", "readonly", "prefix", "current", "password")
LIST_FIELDS = ("folder", "search", "after", "refresh", "added", "done")
# Signs replace characters that are invisible or reverse the text around them (Unicode standard annex 9).
UNSEEN = (*range(32), *range(127, 160), 0x61C, 0x200B, 0x200E, 0x200F, 0xFEFF, *range(0x202A, 0x202F))
VISIBLE = {**dict.fromkeys((*UNSEEN, *range(0x2066, 0x206A)), "\ufffd"), ord("\n"): "↵", ord("\t"): " "}


class Markup(str):
    """HTML. Only fill makes it, except for the style."""


ICON = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">
<rect width="24" height="24" rx="5" fill="#0b57b0"/>
<path d="M5 7h5m4 0h5M5 12h5m4 0h5M5 17h5m4 0h5" stroke="#fff" stroke-width="2.5" stroke-linecap="round"/></svg>"""
STYLE = Markup("""
:root{color-scheme:light dark;--page:#f3f5f8;--card:#fff;--ink:#1b2230;--soft:#566070;--line:#dbe0e7;--edge:#7c8794;
--link:#0b57b0;--main:#0b57b0;--bad:#b3261e;--danger:#b3261e;--mark:#fff3c4;--good:#dff3e4;--wrong:#fbe9e7}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1b212a;--ink:#e8ecf1;--soft:#a5b0bd;--line:#333c48;
--edge:#75808d;--link:#86bcff;--main:#1d65b8;--danger:#ff9a90;--mark:#463a10;--good:#173a25;--wrong:#3d1f1d}}
*{box-sizing:border-box} [hidden]{display:none!important} a{color:var(--link)}
body{margin:0;font:1rem/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page)}
main{max-width:60rem;margin:0 auto;padding:.5rem 1rem 4rem} p,form,table,pre,details,figure,dl{margin:.5rem 0}
h1{margin:1rem 0;font-size:1.5rem;line-height:1.25} h2{margin:2rem 0 .5rem;font-size:1.125rem}
h1,p,td,dd,code,pre{overflow-wrap:anywhere;unicode-bidi:isolate}
h1,.big,dd code,.path a,.values td,.history td,.users td{white-space:pre-wrap}
small,.soft,dt,th{color:var(--soft);font-size:.875rem;font-weight:400}
header{display:flex;flex-wrap:wrap;align-items:center;gap:0 1rem;padding:0 1rem;background:var(--card);
border-bottom:1px solid var(--line)} header nav{display:flex;flex-wrap:wrap}
header a{padding:.75rem .5rem;color:var(--soft);text-decoration:none;border-bottom:2px solid transparent}
header .home{display:flex;gap:.5rem;padding-left:0;color:var(--ink);font-weight:600}
header nav a:hover,header [aria-current]{color:var(--ink);border-color:var(--link)}
header span{max-width:12rem;font-size:.875rem;margin-left:auto;overflow:hidden;color:var(--soft);white-space:nowrap;
text-overflow:ellipsis} @media(forced-colors:active){header a:not([aria-current]){border-color:Canvas}}
button,.button,summary{display:inline-block;max-width:100%;padding:.375rem .75rem;color:var(--ink);
background:var(--card);border:1px solid var(--edge);border-radius:.375rem;font:inherit;text-decoration:none;
overflow-wrap:break-word;list-style:none;cursor:pointer}
.main{color:#fff;background:var(--main);border-color:var(--main)} .bad{color:var(--danger)}
button.bad{color:#fff;background:var(--bad);border-color:var(--bad)}
summary::-webkit-details-marker{display:none} [open]>summary{margin-bottom:.5rem;color:var(--ink);background:none}
button:hover,.button:hover,summary:hover{filter:brightness(.93)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px} ::placeholder{color:var(--soft);opacity:1}
form,table,pre,.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem}
form,figure,.history{max-width:30rem} form,.card{padding:1rem} label{display:block;margin-bottom:1rem}
input,textarea{padding:.375rem .75rem;color:inherit;background:var(--page);border:1px solid var(--edge);
border-radius:.375rem;font:inherit} input:not([type=checkbox]),textarea{display:block;width:100%}
input[type=checkbox]{width:1.25rem;height:1.25rem;margin:0 .25rem 0 0;vertical-align:-.25rem}
textarea,pre,code{font:.9375rem/1.5 ui-monospace,monospace} pre{padding:.75rem 1rem;white-space:pre-wrap}
.bar{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem;margin:.5rem 0} .bar>*{margin:0}
.bar>form,td form,td details{margin:0;padding:0;border:0;background:none} .bar>[open]{order:1;width:100%}
@supports selector(::details-content){.bar>details,.bar>[open]{display:contents} .bar [open]>summary{margin:0}
.bar>::details-content{order:1;width:100%} .bar>:not([open])::details-content{display:none}}
.bar [role=search]{display:flex;gap:.5rem;flex:1;min-width:12rem;margin-right:auto}
[role=alert],[role=status]{padding:.5rem 1rem;background:var(--good);border-radius:.375rem;font-weight:600}
[role=alert]{background:var(--wrong);border-left:.25rem solid var(--danger);outline:0}
[role=alert]::first-letter{text-transform:uppercase}
.big{font-size:2rem;line-height:1.25} dd{margin:0} dd+dt{margin-top:.75rem} pre:not(.card),dd code{user-select:all}
svg{display:block;fill:none;stroke:var(--edge)} text{fill:var(--soft);stroke:none;font-size:13px}
.last{fill:var(--ink);font-weight:600} .line{stroke:var(--link);stroke-width:2}
table{width:100%;border-collapse:separate;border-spacing:0} .mark{background:var(--mark)} time{white-space:nowrap}
th,td{padding:.5rem .75rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:middle}
tr:last-child,tr:last-child td{border-bottom:0} th{font-weight:500;white-space:nowrap}
.values{table-layout:fixed} .values th:first-child{width:35%} .values th:nth-child(n+3){width:7rem}
.values td:first-child a{display:block} .values td:nth-child(n+3){color:var(--soft)} td .bar{margin:0}
.path a{display:inline-block;min-width:1.5rem;padding:.25rem 0} .path+h1{margin-top:.25rem}
.path a+a::before{content:"›";display:inline-block;padding:0 .5rem 0 .25rem;color:var(--soft)}
.folder::before{content:"";display:inline-block;width:1rem;height:.75rem;margin-right:.5rem;background:currentColor;
clip-path:polygon(0 0,40% 0,50% 20%,100% 20%,100% 100%,0 100%)}
@media(min-width:40.01rem){td{min-width:5rem} text{font-size:10px}}
@media(min-width:48rem){ .hooks td:first-child{min-width:12rem} .hooks td:last-child{min-width:15rem}}
@media(max-width:40rem){header nav{order:1;width:100%;margin:0 -.375rem;font-size:.875rem}
header nav a{padding:.375rem} .bar [role=search]{order:1;min-width:100%}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)} tr,td{display:block}
tr{padding:.5rem 1rem;border-bottom:1px solid var(--line)} td{padding:.125rem 0;border:0}
td:empty{display:none!important} td:first-child{font-weight:600}
.history tr{display:flex;justify-content:space-between;gap:1rem}
td:nth-child(n+3){display:inline-block;margin-right:1rem;color:var(--soft);font-size:.875rem}
.tokens td:last-child,.hooks td{display:block!important} .history td:first-child{color:var(--soft);font-weight:400}
.values td:nth-child(3)::before{content:"changed: "} .values td:nth-child(4)::before{content:"expires "}
.users td:nth-child(3)::before{content:"values: "} .users td:nth-child(4)::before{content:"last change: "}
.tokens td:nth-child(3)::before{content:"last used: "}
.hooks td:nth-child(2){color:var(--soft);font-size:.875rem} .hooks td:nth-child(2)::before{content:"user: "}
.hooks td:nth-child(3)::before{content:"key: "}
.values tr{display:flex;flex-wrap:wrap;gap:0 1rem} .values td:first-child{flex:1 0 50%}
.values td{max-width:100%} .values td:nth-child(3){flex:1 0 55%;margin:0}}
""")
DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{DIGEST}'; img-src 'self'; form-action 'self'; frame-ancestors 'none'"
PAGE_HEADERS = (("Content-Security-Policy", POLICY + "; base-uri 'none'"), ("Referrer-Policy", "same-origin"))
TABS = {"me/": "Values", "me/tokens": "Tokens", "me/password": "Password", "admin/": "Users", "admin/hooks": "Hooks"}
PAGE_HTML = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title} - kvserver</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="{up}icon.svg">
<style>{style}</style></head><body>
<header><a class="home" href="{up}"><img src="{up}icon.svg" alt="" width="24" height="24">kvserver</a>
{nav}</header>
<main>{path}<h1>{title}</h1>{message}{content}</main></body></html>"""
FORM_HTML = """<form method="post" action="{url}" autocapitalize="none" autocomplete="off" spellcheck="false">
{alert}<input type="hidden" name="action" value="{action}">{fields}</form>"""
BUTTON_FORM = '<form method="post" action="{}">{}</form>'
STOP = '<span class="soft">This page reloads every {} s.</span><a class="button" href="{}">Stop</a>\n'
SOFT = '<span class="soft">{}</span>'
LINK = '<a href="{}">{}</a>'
ALERT = '<p role="alert" tabindex="-1" autofocus>{}.</p>'  # with the focus, browsers scroll to it and read it out
NEW_PASSWORD = Markup(f"""<label>New password<small> at least {PASSWORD_CHARACTERS_MIN} characters</small>
<input type="password" name="password" required minlength="{PASSWORD_CHARACTERS_MIN}"
autocomplete="new-password"></label>""")
WELCOME_PAGE = """<p>This server keeps values for devices and scripts: they set a value by its key, and get it back.</p>
<p class="bar"><a class="button main" href="me/">Your values</a> <a class="button" href="admin/">Users</a></p>
<h2>URL</h2><pre>{url}</pre><h2>Try it</h2><p>Replace USER with your user name; curl asks for your password.</p>
<pre>curl -u USER {address}</pre><p class="soft">kvserver {version}</p>"""
SEARCH = """<form role="search" autocapitalize="none" autocomplete="off" spellcheck="false">
<input type="search" name="search" value="{search}" aria-label="Part of a key" placeholder="Find a key">
<button>Search</button></form>"""
FOUND = '<p>Keys with <strong>{}</strong>. <a href="{}">Show all</a></p>'
# Browsers drop a newline that follows <textarea> or <pre> (HTML standard, section 13.1.2.5).
VALUE_FIELDS = """<input type="hidden" name="etag" value="{etag}"><label>Value<textarea name="value" rows="{rows}">
{value}</textarea></label><label>Expires in<small> seconds, such as 600; {hint}</small>
<input name="ttl" value="{ttl}" inputmode="decimal"></label>"""
HINT, SAVE = "empty for never", '<button class="main">Save</button>'
ADD_VALUE = f'<label>Key<input name="key" value="{{key}}" required></label>{VALUE_FIELDS}{SAVE}'
NEVER_BOX = '<label><input type="checkbox" name="never" value="1" {never}> Never expires</label>'
SWITCH = """<input type="hidden" name="etag" value="{}">
<button class="main" name="action" value="toggle">Switch to {}</button>"""
STEPS = """<input type="hidden" name="action" value="incr">
<button name="by" value="-1">−1</button> <button name="by" value="1">+1</button>"""
CHART = """<figure class="card">
<svg viewBox="0 0 320 155" role="img" aria-label="A chart of all numbers since {first}. {summary}">
<path d="M{left} {top}H{right}M{left} 120H{right}"/><path class="line" d="{line}"/>
<circle class="line" cx="{x}" cy="{y}" r="3"/><text class="last" x="{right}" y="{y}" dx="8" dy="4">{last}</text>
<text x="{left}" y="{top}" dx="-6" dy="4" text-anchor="end">{high}</text><text x="{left}" y="145">{first}</text>
<text x="{left}" y="120" dx="-6" dy="4" text-anchor="end">{low}</text>
<text x="{right}" y="145" text-anchor="end">now</text></svg><figcaption class="soft">{summary}</figcaption></figure>"""
ACCESS = """<h2>How to reach it</h2><dl class="card"><dt>URL<dd><code>{url}</code>
<dt>Get it (curl asks for your password)<dd><code>curl -u {user} {get}</code>
<dt>Set it<dd><code>curl -u {user} --data-urlencode {value} {set}</code>
<dt>Wait up to a minute until it changes<dd><code>curl -u {user} {wait}</code></dl>"""
TOKENS_PAGE = """<p>A device that logs in with a token does not need your password.
If it gets lost, delete its token here.</p>{add}{tokens}"""
ADD_TOKEN = """<label>Label<small> what it is for</small><input name="label" value="{label}" maxlength="{label_max}">
</label><label>Only keys that begin with<small> empty for all</small><input name="prefix" value="{prefix}"></label>
<label><input type="checkbox" name="readonly" value="1" {readonly}> Read only</label>
<input type="hidden" name="once" value="{once}"><button class="main">Add a token</button>"""
TOKEN_PAGE = """<p>Copy it to the device now. This page shows it only once.</p><pre>{token}</pre>
<h2>As a header</h2><pre>Authorization: Bearer {token}</pre><h2>Try it</h2><pre>{curl}</pre>
<p><a class="button" href="tokens">All tokens</a></p>"""
PASSWORD_PAGE = """{form}<p>Your browser will then ask for the new password.</p>
<h2>Log out</h2><p>A browser keeps your password until you close all its windows.
On somebody else's computer, use a private window, and close it afterwards.</p>"""
SET_PASSWORD = """<input value="{user}" autocomplete="username" hidden>{new_password}
<p>Tokens keep working.</p><button class="main">Change the password</button>"""
SET_OWN_PASSWORD = f"""<label>Current password<input type="password" name="current" required
autocomplete="current-password"></label>{SET_PASSWORD}"""
ADD_USER = """<label>Name<small> ASCII, no colon</small><input name="username" value="{username}" required></label>
{new_password}<label><input type="checkbox" name="isAdmin" value="1" {isAdmin}> Admin: manages users and hooks</label>
<button class="main">Add the user</button>"""
USER_PAGE = """<p>Role: {}. Values: {}. Last change: {}.</p><div class="bar">{}
<a class="button bad" href="{}" aria-label="Delete this user">Delete…</a></div><h2>Tokens</h2>{}<h2>Values</h2>{}"""
DELETE_USER = """<p>This also deletes, for good:</p><ul>{lost}</ul><div class="bar">
<button class="bad">Delete {name}</button><a class="button" href="{back}">Keep {name}</a></div>"""
HOOKS_PAGE = """{message}<p>A hook calls a URL when a value changes. Its pending deliveries are deleted with it.</p>
{table}<h2>Add a hook</h2><p>Type this in a shell on the server. <code>--help</code> lists the flags.</p>
<pre>{command} addhook USER KEY URL</pre>"""
HOOK = "{} {}<br><small>{}</small>"
RESULT = '<span class="{}">{}</span><br><small>{}pending: {}</small>'
SEND_TEST = '<button name="action" value="testhook" aria-label="Send a test to hook {}">Send a test</button>'


def fill(template: str, *values: object, **names: object) -> Markup:
    """Return a template with values for its {} and {names}: lists are joined, and all text but Markup is escaped."""

    def escape(value: object) -> str:
        if isinstance(value, list):
            return "".join(map(escape, value))
        return value if isinstance(value, Markup) else html.escape(str(value))

    return Markup(template.format(*map(escape, values), **{name: escape(value) for name, value in names.items()}))


def make_visible(text: str) -> str:
    return re.sub("^ +| +$", lambda spaces: "␣" * len(spaces[0]), text.translate(VISIBLE))


def make_page(request: Request, title: str, content: str, tab: str = "", path: str = "", note: str = "") -> Response:
    """Return a page, with a refusal's reason if the content lacks it. The path stands on top; a note names a change."""
    user, refusal, nav, message = request.user, request.refusal, "", ""
    up = "../" if (tab or refusal) and not request.path.endswith("/admin") else "./"  # to the root
    if user.name and not (refusal and refusal.status == 401):  # a stolen token does not reveal its user
        here, tabs = {tab: Markup(' aria-current="page"')}, list[Markup]()
        for page, name in TABS.items():
            if user.is_admin or not page.startswith("admin"):
                tabs.append(fill('<a href="{}{}"{}>{}</a>\n', up, page, here.get(page, ""), name))
        nav = fill('<nav aria-label="Pages">{}</nav><span>{}</span>', tabs, user.name)
    if refusal and 'role="alert"' not in content:  # escaped text contains no quotes
        message = fill(ALERT, refusal.message)
    elif not refusal and 0 <= time.time() - (take_seconds(request.parameters, "done", 0, 1e10) or 0) <= DONE_SECONDS:
        message = fill('<p role="status">The change is made.{}</p>', note)
    texts = {"style": STYLE, "up": up, "nav": nav, "title": title, "message": message, "path": path, "content": content}
    headers = PAGE_HEADERS + (refusal.headers if refusal else ())
    may_reload = refusal is None or refusal.status == 404  # a missing value may come
    if may_reload and take_choice(request.parameters, "refresh", (str(REFRESH_SECONDS),)):
        headers += (("Refresh", str(REFRESH_SECONDS)),)
    return Response(fill(PAGE_HTML, **texts).encode(), refusal.status if refusal else 200, HTML, headers)


def url_to(path: str, **parameters: str) -> str:
    """Add parameters that are not empty to a relative address; letters stay as they are, so that pages are shorter."""
    for name, text in parameters.items():
        if text:
            text = re.sub(r"[^\w/:.~-]", lambda character: urllib.parse.quote(character[0]), text)
            path += f"{'&' if '?' in path else '?'}{name}={text}"
    return path


def make_form(request: Request, action: str, fields: str, url: str = "./", **values: object) -> Markup:
    """Return a form, after a refusal with an alert and the typed text."""
    refusal = request.refusal if request.parameters.get("action") == action else None
    typed, alert = (request.parameters, fill(ALERT, refusal.message)) if refusal else ({}, "")
    texts = {**dict.fromkeys(USER_FIELDS + OWN_FIELDS, ""), "new_password": NEW_PASSWORD, **typed, **values}
    texts |= {name: "checked" if is_on(typed, name) else "" for name in ("isAdmin", "readonly", "never")}
    return fill(FORM_HTML, url=url, alert=alert, action=action, fields=fill(fields, **texts))


def fold(word: str, form: str, kind: str = "main") -> Markup:
    """Return a button that unfolds a form. A form with an alert is open."""
    is_open = "open" if 'role="alert"' in form else ""
    return fill('<details {}><summary class="{}">{}</summary>{}</details>\n', is_open, kind, word, form)


def make_question(word: str, what: str, action: str, url: str, warning: str = "") -> Markup:
    """Return the button of a dangerous action, folded up so that nobody presses it by mistake."""
    button = fill('{}<button class="bad" name="action" value="{}">{} {}</button>', warning, action, word, what)
    question = '<details><summary class="bad" aria-label="{0} {1}">{0}…</summary>{2}</details>\n'
    return fill(question, word, what, fill(BUTTON_FORM, url, button))


def make_time(seconds: float | None, ago: str = "") -> str:
    """Return unix seconds as the time since then, such as 3 min, or the time until then, such as in 10 min."""
    if seconds is None:
        return "never"
    left = seconds - time.time()
    for unit, length, most in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 24), ("days", DAY_SECONDS, math.inf)):
        count = math.ceil(left / length) if left > 0 else int(-left // length)
        if count < most:
            break
    words = f"{count} {unit}" if (count, unit) != (1, "days") else "1 day"
    words = "in " + words if left > 0 else words + ago if count else "just now" if ago else "now"
    return fill('<time datetime="{0}" title="{0}">{1}</time>', utc_second(seconds), words)


def make_short(value: str | None) -> str:
    start = make_visible((value or "")[: VALUE_SHOWN_CHARACTERS_MAX + 1])
    return cut_off(start, VALUE_SHOWN_CHARACTERS_MAX) or fill(SOFT, "deleted" if value is None else "empty")


def make_table(kind: str, columns: Sequence[str], rows: Sequence[Sequence[object]], marked: int = -1) -> Markup:
    """Return a table, with roles that remain when the style makes cards of its rows on a narrow screen."""
    if not rows:
        return fill('<p class="soft">No {} here.</p>', kind)
    head = fill('<th scope="col" role="columnheader">{}' * len(columns), *columns)
    line, marks = '<tr role="row"{}>' + '<td role="cell">{}' * len(columns), {marked: Markup(' class="mark"')}
    body = [fill(line, marks.get(number, ""), *row) for number, row in enumerate(rows)]
    table = """<table role="table" class="{0}" aria-label="{0}"><thead role="rowgroup"><tr role="row">{1}
<tbody role="rowgroup">{2}</table>"""
    return fill(table, kind, head, body)


def make_turns(url: str, after: str, last: str) -> Markup:
    links = [fill('<a class="button" href="{}">First page</a>', url)] if after else []
    links += [fill('<a class="button" href="{}">Next page</a>', url_to(url, after=last))] if last else []
    return fill('<p class="bar">{}</p>', links) if links else fill("")


def make_path(folder: str, url: str = "./") -> Markup:
    """Return links to all values, to each folder on the way to a folder, and to itself. url leads to all values."""
    links = [fill(LINK, url, "All values")]
    for part in re.finditer("[^/]*/", folder):
        links.append(fill(" " + LINK, url_to(url, folder=folder[: part.end()]), make_visible(part[0])))
    return fill('<nav class="path" aria-label="Folder">{}</nav>', links)


def make_live(request: Request, url: str) -> Markup:
    if "refresh" in request.parameters:
        return fill(STOP, REFRESH_SECONDS, url)
    return fill('<a class="button" href="{}">Live</a>\n', url_to(url, refresh=str(REFRESH_SECONDS)))


def redirect_done(url: str, **parameters: str) -> Response:
    return redirect(303, url_to(url, **parameters, done=str(int(time.time()))))


def welcome_page(store: Store, request: Request) -> Response:
    address = shlex.quote(f"{request.server_url}/set?key=door&value=open")
    page = fill(WELCOME_PAGE, url=request.server_url + "/", address=address, version=__version__)
    return make_page(request, "kvserver", page)


def make_values(store: Store, request: Request, user_id: int, url: str, value_url: str = "") -> Markup:
    """Return the table of a folder or of a search in it; with a value_url, each value links to its page."""
    folder, search, after, refresh, added, _ = (request.parameters.get(name, "") for name in LIST_FIELDS)
    if folder and not folder.endswith("/"):
        raise HTTPError(400, "a folder ends with a slash; send one such as folder=hall/")
    if max(len(folder.encode()), len(search.encode())) > KEY_BYTES_MAX:
        raise HTTPError(400, f"a folder or a search has at most {KEY_BYTES_MAX} bytes; shorten it")
    begin, rows = after + NEXT_KEY, list[Sequence[object]]()
    for first in (begin, added, begin) if added else (begin,):  # the usual page; else from the added row; else as usual
        entries = list(itertools.islice(store.entries(user_id, folder, search, first), PAGE_ROWS_MAX + 1))
        names = [entry.name for entry in entries[:PAGE_ROWS_MAX]]
        if added in names:
            break
    for name, value, updated, expires in entries[:PAGE_ROWS_MAX]:
        shown: str = make_visible(name if search else name[len(folder) :]) or fill(SOFT, "no name")
        if updated is None:
            rows.append((fill('<a class="folder" href="{}">{}</a>', url_to(url, folder=name), shown), "", "", ""))
            continue
        key = fill(LINK, url_to(value_url, key=name), shown) if value_url else shown
        rows.append((key, make_short(value), make_time(updated), make_time(expires) if expires else ""))
    path = make_path(folder, url) if folder and not value_url else ""
    marked = names.index(added) if added in names else -1
    table = make_table("values", ("Name", "Value", "Changed", "Expires"), rows, marked)
    url = url_to(url, folder=folder, search=search, refresh=refresh)
    turns = make_turns(url, first.strip(NEXT_KEY), names[-1] if len(entries) > len(names) else "")
    return fill("{}{}{}", path, table, turns)


def values_page(store: Store, request: Request) -> Response:
    folder, search, after, refresh, added, _ = (request.parameters.get(name, "") for name in LIST_FIELDS)
    table, url = make_values(store, request, request.user.id, "./", "value"), url_to("./", folder=folder)
    around = folder[: folder[:-1].rfind("/") + 1]
    path, title = make_path(around) if folder else "", make_visible(folder[len(around) :]) or "Values"
    live = make_live(request, url_to(url, search=search, after=after))
    key = request.parameters.get("key", folder)
    add = fold("Add", make_form(request, "set", ADD_VALUE, "./?page=add", key=key, rows=2, etag="", hint=HINT))
    forms = [] if refresh else [add, fill(SEARCH, search=search)]  # a reload would lose typed text
    found = fill(FOUND, make_visible(search), url) if search else ""
    page = fill('<div class="bar">{}{}</div>{}{}', forms, live, found, table)
    link = fill(LINK, url_to("value", key=added), make_visible(added))
    note = fill(" The key {} is stored.", link) if 'class="mark"' in table else ""
    return make_page(request, title, page, "me/", path, note)


def make_reading(value: str) -> Markup:
    """Return a value to read: large if it is short, and indented if it is JSON."""
    most = VALUE_READ_CHARACTERS_MAX
    text = indent_json(value) if value.lstrip().startswith(("{", "[")) and len(value) <= most else value
    if len(text) <= 24 and "\n" not in text:
        return fill('<p class="card big">{}</p>', make_visible(text) or fill(SOFT, "empty"))
    note = fill('<p class="soft">This is only the beginning: it has {} characters.</p>', len(value))
    shown = text[:most].translate({**VISIBLE, 10: "\n", 9: "\t"})
    return fill('<pre class="card">\n{}</pre>{}', shown, note if len(text) > most else "")


def make_buttons(request: Request, key: str, value: str, pair: Pair | None) -> list[Markup]:
    etag, url, buttons = pair.etag if pair else "", url_to("./", key=key, page="value"), list[Markup]()
    if value in OPPOSITES:  # the etag makes sure that the button does what it says
        buttons.append(fill(BUTTON_FORM, url, fill(SWITCH, etag, OPPOSITES[value])))
    elif NUMBER.fullmatch(value):
        buttons.append(fill(BUTTON_FORM, url, fill(STEPS)))
    live = make_live(request, url_to("value", key=key))
    if "refresh" in request.parameters:  # a reload would lose the typed text
        return [*buttons, live]
    encoded = urllib.parse.quote(value.replace("\n", "\r\n").replace("~", "!"), safe=" *")  # as browsers do
    edit = fill('<p class="soft">Edit this value with /set: a form cannot send it unchanged.</p>')
    if len(encoded) <= FORM_BYTES_MAX and "\0" not in value and "\r" not in value:
        text = request.parameters.get("value", value)
        rows = min(20, text.count("\n") + len(text) // 50 + 2)
        box, hint = (NEVER_BOX, "empty to keep its expiry") if pair else ("", HINT)
        fields = VALUE_FIELDS + box + SAVE
        form = make_form(request, "set", fields, url, value=text, rows=rows, etag=etag, hint=hint)
        edit = fold("Edit" if pair else "Add", form, "" if value in OPPOSITES else "main")
    question = make_question("Delete", make_visible(key), "del", url, fill("<p>This cannot be undone.</p>"))
    return [*buttons, edit, live, question] if pair else [edit]


def make_chart(changes: Sequence[tuple[float, str | None, bool]]) -> Markup:
    """Return a chart of the numbers among changes (oldest first), or nothing if there are fewer than two."""
    numbers = [float(value) if value and NUMBER.fullmatch(value) else None for _, value, _ in changes]
    known, times = [number for number in numbers if number is not None], [moment for moment, *_ in changes]
    if len(known) < 2:
        return fill("")
    least, most, begin, now = min(known), max(known), min(times), max(time.time(), *times)
    stored = dict(zip(numbers, [str(value) for _, value, _ in changes]))
    low, high, last = (stored[n] if len(stored[n]) <= 14 else f"{n:.10g}" for n in (least, most, known[-1]))
    left, right = 10 + 8 * max(len(low), len(high)), 308 - 8 * len(last)  # a digit takes about 8
    heights = {number: round(120 - (number - least) / (most - least or 1) * 110, 1) for number in known}
    line, x, before = "", 0.0, None
    for moment, number in [*zip(times, numbers), (now, None)]:  # a value holds until the next change
        here = round(left + (moment - begin) / (now - begin or 1) * (right - left), 1)
        if before is not None:
            line, x = f"{line}H{here}", here
        if number is not None:
            line += f"M{here} {heights[number]}" if before is None else f"V{heights[number]}"
        before = number
    texts = {"low": low, "high": high, "last": last, "summary": f"Minimum {low}, maximum {high}, last {last}."}
    texts |= {"line": line, "first": time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(begin))}
    return fill(CHART, left=left, right=right, top=heights[most], x=x, y=heights[known[-1]], **texts)


def make_access(request: Request, key: str, value: str, etag: str) -> Markup:
    """Return commands for a shell, and the URL. A short value is part of them, so that a paste changes nothing."""
    url, name = request.server_url, urllib.parse.quote(key, safe="")
    get, text = f"{url}/get?key={name}", "VALUE"
    wait = ["-H", f"If-None-Match: {etag}", f"{get}&wait=60"]
    if len(value) <= VALUE_SHOWN_CHARACTERS_MAX and value.isprintable():
        text, wait = value, [f"{get}&wait=60&unless={urllib.parse.quote(value, safe='')}"]
    words = {"user": request.user.name, "get": get, "value": f"value={text}", "set": f"{url}/set?key={name}"}
    return fill(ACCESS, url=get, wait=shlex.join(wait), **{name: shlex.quote(word) for name, word in words.items()})


def value_page(store: Store, request: Request) -> Response:
    key, refusal = request.parameters.get("key", ""), request.refusal
    pair = store.pair(request.user.id, key)
    if pair is None and refusal and (not key or request.parameters.get("page") != "value"):
        return values_page(store, request)
    if pair is None and not refusal:
        request.refusal = HTTPError(404, "there is no such key now; wait for it, add it, or go back to its folder")
        if not request.wants_html():
            raise request.refusal
    value, etag = (pair.value.decode("utf-8"), pair.etag) if pair else ("", "")
    if refusal and refusal.status == 409 and request.parameters.get("etag", etag) != etag:  # only a page shows a value
        change = "The value was changed" if request.parameters["etag"] else "The key exists: it was set"
        again = "save again to overwrite it" if request.parameters["action"] == "set" else "nothing was done"
        news = f"{change} to <em>{{}}</em> {{}}; {again}" if pair else "The value was deleted; save one to add it again"
        request.refusal = HTTPError(409, fill(news, make_short(value), make_time(pair and pair.updated, " ago")))
    facts = list[Markup]()
    for word, moment in (("Changed", pair.updated), ("Expires", pair.expires)) if pair else ():
        if moment is not None:
            local = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(moment))
            facts.append(fill("{} {} ({}). ", word, make_time(moment, " ago"), local))
    parts = [make_reading(value) if pair else "", fill('<p class="soft">{}</p>', facts)]
    parts.append(fill('<div class="bar">{}</div>', make_buttons(request, key, value, pair)))
    changes = list(store.history(request.user.id, key, 0, 50)) if store.history_rows_max() else []
    if changes:
        rows = [(make_time(moment), make_short(old)) for moment, old, _ in changes]
        table = make_table("history", ("Time", "Value"), rows)
        table = fold(f"The last {len(rows)} changes", table, "") if len(rows) > 10 else table
        parts.append(fill("<h2>History</h2>{}{}", make_chart(changes[::-1]), table))
    if pair:
        parts.append(make_access(request, key, value, etag))
    folder, title = key[: key.rfind("/") + 1], make_visible(key[key.rfind("/") + 1 :] or key)
    return make_page(request, title, fill("{}", parts), "me/", make_path(folder))


def make_tokens(store: Store, user_name: str, url: str) -> Markup:
    rows, today = list[Sequence[object]](), time.time() // DAY_SECONDS * DAY_SECONDS
    for token in store.tokens(user_name):
        label = token.label or f"token {token.id}"
        used = "today" if token.last_used == today else make_time(token.last_used)
        question = make_question("Delete", label, "deltoken", url_to(url, id=str(token.id)))
        rows.append((label, token.rights(), used, question))
    return make_table("tokens", ("Label", "Rights", "Last used", "Delete"), rows)


def tokens_page(store: Store, request: Request) -> Response:
    name = request.user.name
    form = make_form(request, "addtoken", ADD_TOKEN, label_max=LABEL_CHARACTERS_MAX, once=store.tokens_added(name))
    page = fill(TOKENS_PAGE, add=fold("Add", form), tokens=make_tokens(store, name, "./"))
    return make_page(request, "Tokens", page, "me/tokens")


def password_page(store: Store, request: Request) -> Response:
    form = make_form(request, "passwd", SET_OWN_PASSWORD, user=request.user.name)
    return make_page(request, "Password", fill(PASSWORD_PAGE, form=form), "me/password")


def users_page(store: Store, request: Request) -> Response:
    after, rows = request.parameters.get("after", ""), list[Sequence[object]]()
    users = store.users(after=after, limit=PAGE_ROWS_MAX + 1)
    for user, pairs, newest in users[:PAGE_ROWS_MAX]:
        link = fill(LINK, url_to("user", username=user.name), make_visible(user.name))
        rows.append((link, "admin" if user.is_admin else "user", pairs, make_time(newest)))
    last = users[PAGE_ROWS_MAX - 1][0].name if users[PAGE_ROWS_MAX:] else ""
    table = make_table("users", ("Name", "Role", "Values", "Last change"), rows)
    add = fold("Add", make_form(request, "adduser", ADD_USER))
    return make_page(request, "Users", fill("{}{}{}", add, table, make_turns("./", after, last)), "admin/")


def find_user(store: Store, request: Request) -> User:
    user = store.user(required(request.parameters, "username"))
    if user is None:
        raise HTTPError(404, "this user does not exist; it may have been deleted")
    return user


def user_page(store: Store, request: Request) -> Response:
    user, pairs, newest = store.users(find_user(store, request).name)[0]
    name, url = make_visible(user.name), url_to("./", username=user.name)
    role, other, is_admin = ("admin", "user", "") if user.is_admin else ("user", "admin", "1")
    warning = fill("<p>Admins manage all users and hooks. Users manage only their own values and tokens.</p>")
    set_password = fold("Change the password", make_form(request, "setpassword", SET_PASSWORD, url, user=user.name), "")
    set_role = make_question("Change the role", f"to {other}", "setadmin", url_to(url, isAdmin=is_admin), warning)
    buttons, delete = [set_password, set_role], url_to("delete", username=user.name)
    tokens = make_tokens(store, user.name, url)
    values = make_values(store, request, user.id, url_to("user", username=user.name))
    page = fill(USER_PAGE, role, pairs, make_time(newest, " ago"), buttons, delete, tokens, values)
    return make_page(request, name, page, "admin/")


def delete_page(store: Store, request: Request) -> Response:
    user, pairs, _ = store.users(find_user(store, request).name)[0]
    name, page = make_visible(user.name), fill("<p>Only another admin can delete you.</p>")
    if user.id != request.user.id:
        counts = {"values": pairs, "tokens": len(store.tokens(user.name)), "hooks": len(store.hooks(user.name))}
        counts["changes in the history"] = store.history_size(user.id)
        lost = [fill("<li>{}: {}", what, count) for what, count in counts.items() if count]
        lost = lost or [fill("<li>nothing: there are no values, tokens, hooks or changes in the history")]
        back, url = url_to("user", username=user.name), url_to("./", username=user.name)
        page = make_form(request, "deluser", DELETE_USER, url, name=name, back=back, lost=lost)
    return make_page(request, f"Delete {name}?", page, "admin/")


def hooks_page(store: Store, request: Request, message: str = "") -> Response:
    after, most, rows = request.parameters.get("after", "0"), PAGE_ROWS_MAX // 2, list[Sequence[object]]()
    hooks = store.hooks(limit=most + 1, after=after)
    for hook in hooks[:most]:
        only = f"only when it becomes {make_visible(hook.value)}" if hook.value is not None else ""
        key = [make_visible(hook.pattern), fill("<br><small>{}</small>", only) if only else ""]
        kind = "bad" if hook.result and hook.result[0] != "2" else ""
        tried = [make_time(hook.result_time, " ago"), ", "] if hook.result else ""
        result = fill(RESULT, kind, hook.result or "not tried", tried, hook.pending)
        url = url_to("./", id=str(hook.id))
        test = fill(BUTTON_FORM, url, fill(SEND_TEST, hook.id))
        buttons = fill('<div class="bar">{}{}</div>', test, make_question("Delete", f"hook {hook.id}", "delhook", url))
        rows.append((fill(HOOK, hook.id, hook.label, hook.origin), make_visible(hook.user_name), key, result, buttons))
    table = make_table("hooks", ("Hook", "User", "Key", "Last result", "Actions"), rows)
    turns = make_turns("hooks", after if after != "0" else "", str(hooks[most - 1].id) if hooks[most:] else "")
    message = fill('<p role="status">{}</p>', message) if message else ""
    command = shlex.join([sys.executable, os.path.abspath(__file__), "--db", store.path])
    page = fill(HOOKS_PAGE, message=message, table=[table, turns], command=command)
    return make_page(request, "Hooks", page, "admin/hooks")


# The actions of forms, and the page that shows a refused form again.
OWN_PAGES: dict[str, Callable[..., Response]] = dict.fromkeys(("set", "incr", "toggle"), value_page)
OWN_PAGES |= {"del": values_page, "addtoken": tokens_page, "deltoken": tokens_page, "passwd": password_page}
USER_PAGES: dict[str, Callable[..., Response]] = {"adduser": users_page, "deluser": delete_page}
USER_PAGES |= {"setpassword": user_page, "setadmin": user_page, "deltoken": user_page}
USER_PAGES |= {"testhook": hooks_page, "delhook": hooks_page}


def take_action(store: Store, request: Request, actions: Iterable[str]) -> str:
    user = store.user(request.user.name) or NOBODY
    if (user.id, user.is_admin) != (request.user.id, request.user.is_admin):
        raise StoreBusy("your user has just been changed; try again")
    action = required(request.parameters, "action")
    take_choice(request.parameters, "action", list(actions))
    if action in ("adduser", "setpassword", "passwd"):
        check_password(request.parameters.get("password", ""))
    return action


def change_user(store: Store, request: Request) -> Response:
    parameters, action = request.parameters, take_action(store, request, USER_PAGES)
    if action == "testhook":
        request.test = store.test_delivery(required(parameters, "id"))
        return Response()
    url, is_admin = "./", is_on(parameters, "isAdmin")
    if action == "delhook":
        store.delete_hook(required(parameters, "id"))
        url = "hooks"
    elif action == "adduser":
        name = required(parameters, "username")
        check_user_name(name)
        store.add_user(name, request.password_hash, is_admin)
    else:
        name = find_user(store, request).name
        url = url_to("user", username=name)
        if action == "setpassword":
            store.set_password_hash(name, request.password_hash)
        elif action == "deltoken":
            store.delete_token(name, required(parameters, "id"))  # SQLite compares digits with a number
        elif action == "setadmin":
            store.set_admin(name, is_admin)
            if name == request.user.name and not is_admin:
                url = "../me/"  # the pages for admins are closed to them now
        elif name == request.user.name:
            raise HTTPError(409, "nobody can delete themselves; ask another admin")
        else:
            store.delete_user(name, even_last_admin=False)
            url = "./"
    return redirect(303, "admin/") if request.path.endswith("/admin") else redirect_done(url)


def change_value(store: Store, request: Request, action: str) -> Response:
    user, parameters = request.user, request.parameters
    key = require_key(required(parameters, "key"))
    pair, on_value_page = store.pair(user.id, key), parameters.get("page") in ("value", "state")
    etag = pair.etag if pair else ""  # an empty one means that the form has seen no value
    if parameters.get("etag", etag) != etag:
        raise HTTPError(409, "the key has another value now, or none; look at it, and leave out etag to overwrite it")
    if not parameters.get("ttl"):
        parameters.pop("ttl", None)  # an empty field of a form
    is_endless, stored = is_on(parameters, "never"), pair.value.decode("utf-8") if pair else ""
    if is_endless and "ttl" in parameters:
        raise HTTPError(400, "the parameters ttl and never exclude each other; leave one out")
    if action == "incr":
        increment(store, request)
    elif action == "toggle" and stored not in OPPOSITES:
        toggle(store, request)
    else:  # browsers send CR LF
        typed = OPPOSITES[stored] if action == "toggle" else required(parameters, "value")
        value, ttl = check_value(typed.replace("\r\n", "\n").replace("\r", "\n")), take_ttl(parameters)
        keeps_expiry = (on_value_page or action == "toggle") and not is_endless
        store.set_value(user.id, key, value, pair.expires if pair and keeps_expiry else None, ttl)
    if on_value_page or action != "set":
        return redirect_done("value", key=key)
    return redirect_done("./", folder=key[: key.rfind("/") + 1], added=key)


def change_own(store: Store, request: Request) -> Response:
    user, parameters, action = request.user, request.parameters, take_action(store, request, OWN_PAGES)
    if OWN_PAGES[action] is value_page:
        return change_value(store, request, action)
    if action == "addtoken":
        label, prefix, token = parameters.get("label", ""), parameters.get("prefix", ""), make_token()
        check_label_and_prefix(label, prefix)
        row = (hash_token(token), label, is_on(parameters, "readonly"), prefix)
        store.add_token(user.name, *row, once=parameters.get("once"))
        key = next((key for _, key, *_ in store.pairs(user.id, prefix)), prefix or "door")
        address = f"{request.server_url}/get?key={urllib.parse.quote(key, safe='')}"
        curl = shlex.join(["curl", "-H", f"Authorization: Bearer {token}", address])
        return make_page(request, "New token", fill(TOKEN_PAGE, token=token, curl=curl), "me/tokens")
    if action == "del":
        if not store.delete_pair(user.id, require_key(required(parameters, "key"))):
            raise HTTPError(404, "there is no such key; it may have been deleted already")
        return redirect_done("./", folder=parameters["key"][: parameters["key"].rfind("/") + 1])
    if action == "passwd":
        _, password = decode_credentials(request.fields.headers["authorization"])  # this one has been checked
        if required(parameters, "current") != password:
            raise HTTPError(400, "the current password is wrong")
        store.set_password_hash(user.name, request.password_hash)
        return redirect_done("password")
    store.delete_token(user.name, required(parameters, "id"))
    return redirect_done("tokens")


# ---- Routes ----------------------------------------------------------------------------------------------------------
# The HTTP surface in one table, with the policy of each route on its row, and the responses to all other requests.

# Where an endpoint runs. HERE: in the loop, because it is quick. COMMIT: in the next transaction; the response
# waits for the disk; it stores hardly more than its request has. THREAD: in a thread with its own store, if slow.
HERE, COMMIT, THREAD = "here", "commit", "thread"
READ = ("GET", "HEAD")


def lead_on(store: Store, request: Request) -> Response:
    """Redirect to a folder before a login: browsers send its password unasked to the folder (RFC 7617 section 2.2)."""
    path = request.path.rpartition("/")[2] + "/"
    path = "value" if request.path.endswith("/me/state") else path  # /me/value had that name
    return redirect(301, path + (f"?{request.query}" if request.query else ""))


ROUTES = (
    Route("/set", ("GET", "POST", "PUT"), set_value, USER, COMMIT, ("key", "value", "ttl", "nx", "old"), 2, EITHER),
    Route("/get", READ, get_value, USER, HERE, ("key", "default", "format", "wait", "unless"), 1),
    Route("/del", ("GET", "POST", "PUT"), delete_pair, USER, COMMIT, ("key", "missing"), 1),
    Route("/incr", ("GET", "POST"), increment, USER, COMMIT, ("key", "by", "ttl"), 1),
    Route("/toggle", ("GET", "POST"), toggle, USER, COMMIT, ("key", "values", "ttl"), 1),
    Route("/list", READ, list_pairs, USER, THREAD, ("prefix", "limit", "after", "format")),
    Route("/kv/KEY", READ, get_value, USER, HERE),
    Route("/kv/KEY", ("PUT",), put_resource, USER, COMMIT, ("ttl",), 0, VALUE),
    Route("/kv/KEY", ("DELETE",), delete_pair, USER, COMMIT),
    Route("/history", READ, show_history, USER, THREAD, ("key", "limit", "since", "format"), 1),
    Route("/history", ("DELETE",), delete_history, USER, COMMIT, ("key",), 1),
    Route("/events", ("GET",), stream_events, USER, HERE, ("prefix",)),
    Route("/health", READ, check_health, ANYONE, THREAD),
    Route("/metrics", READ, report_metrics, OPERATOR, THREAD),
    Route("", READ, lead_on, ANYONE, HERE),
    Route("/", READ, welcome_page, BROWSER, HERE),
    Route("/icon.svg", READ, lambda store, request: Response(ICON, content_type="image/svg+xml"), ANYONE, HERE),
    Route("/me", READ, lead_on, ANYONE, HERE, LIST_FIELDS),
    Route("/me/", READ, values_page, PERSON, THREAD, (*LIST_FIELDS, "key", "page", "id")),
    Route("/me/", ("POST",), change_own, PERSON, COMMIT, OWN_FIELDS, 1),
    Route("/me/value", READ, value_page, PERSON, THREAD, ("key", "refresh", "done"), 1),
    Route("/me/state", READ, lead_on, ANYONE, HERE, ("key",), 1),
    Route("/me/tokens", READ, tokens_page, PERSON, THREAD, ("done",)),
    Route("/me/password", READ, password_page, PERSON, THREAD, ("done",)),
    Route("/admin", READ, lead_on, ANYONE, HERE, ("after", "done")),
    Route("/admin", ("POST",), change_user, ADMIN, COMMIT, USER_FIELDS, 2),
    Route("/admin/", READ, users_page, ADMIN, THREAD, ("after", "done", "username", "id", "isAdmin")),
    Route("/admin/", ("POST",), change_user, ADMIN, COMMIT, USER_FIELDS, 1),
    Route("/admin/user", READ, user_page, ADMIN, THREAD, ("username", "folder", "after", "done"), 1),
    Route("/admin/delete", READ, delete_page, ADMIN, THREAD, ("username",), 1),
    Route("/admin/hooks", READ, hooks_page, ADMIN, THREAD, ("after", "done")),
)
BY_PATH_AND_METHOD = {
    path: {method: route for route in ROUTES if route.path == path for method in route.methods}
    for path in {route.path for route in ROUTES}
}
API_PATHS = dict.fromkeys(route.path for route in ROUTES if route.who == USER or route.endpoint is check_health)

# Errors that the client or a second try can correct. Some of their messages name commands, which clients don't have.
REFUSALS = {NoSuchUser: 401, NotFound: 404, TimeoutError: 408, Conflict: 409, StoreBusy: 503}
MESSAGES = {401: "the user was deleted", 404: "no such token or hook; reload the page", 408: "the request is too slow"}


def find_routes(path: str, base_path: str) -> tuple[dict[str, Route], str]:
    """Return the routes of a path by method, and its key, still encoded, if it has one."""
    if path not in BY_PATH_AND_METHOD and not path.startswith("/kv/"):
        below = path.removeprefix(base_path)
        path = below if below[:1] in ("", "/") else path  # /a is no prefix of /admin
    key = path[4:] if path.startswith("/kv/") else ""
    return BY_PATH_AND_METHOD.get("/kv/KEY" if key else path, {}), key


def answer_without_route(request: Request, methods: Sequence[str], base_path: str) -> Response:
    """Answer OPTIONS, or raise HTTPError for an unknown path or method; methods are those of the path."""
    if request.method not in METHODS:
        raise HTTPError(501, f"the method {request.method!r:.40} is unknown; use {', '.join(methods or METHODS[:4])}")
    methods = METHODS if request.path == "*" else methods
    if not methods:
        likely = re.sub("/+", "/", request.path).rstrip("/").lower()  # never quoted: it may contain a value
        route = next(iter(find_routes(likely, base_path.lower())[0].values()), None)
        hint = f"there is no such path; use {route.path}" if route and route.path else ""
        raise HTTPError(404, hint or "Use the api endpoints: " + ", ".join([*API_PATHS, "/me/", "/admin/"]))
    allow = (("Allow", ", ".join(dict.fromkeys([*methods, "OPTIONS"]))),)
    if request.method != "OPTIONS":
        path = request.path.removesuffix(request.key_in_path)  # a key may be a value by mistake
        raise HTTPError(405, f"{path} does not take {request.method}; use {', '.join(methods)}", allow)
    return Response(status=204, headers=allow)


def as_http_error(error: Exception, errors: ErrorLog) -> HTTPError:
    """Return the HTTPError for an exception; log it if it is the server's fault."""
    if isinstance(error, HTTPError):  # a new one: a traceback leads to the request, which may keep this
        return HTTPError(error.status, error.message, error.headers)
    status = REFUSALS.get(type(error))
    if status:
        return HTTPError(status, MESSAGES.get(status, str(error)), RETRY_AFTER if status == 503 else ())
    if isinstance(error, (StoreError, sqlite3.Error)):
        errors.write(f"the database failed: {error}")
        if isinstance(error, StoreFull):
            return HTTPError(507, str(error))
        return HTTPError(503, "the database cannot be used; the server's log says why", RETRY_AFTER)
    import traceback  # for the places only: the message may quote the request

    places = (f"{frame.f_code.co_name}:{line}" for frame, line in traceback.walk_tb(error.__traceback__))
    errors.write(f"internal error: {type(error).__name__} in {' > '.join(places)}")
    return HTTPError(500, "the server made a mistake; its log says where")


def answer_to_error(error: HTTPError, route: Route | None, request: Request) -> Response:
    """Return the response to a refused request: a page, a problem (RFC 9457) if it accepts any JSON, or a line."""
    accept, title = request.fields.headers.get("accept", "").lower(), http.HTTPStatus(error.status).phrase
    if error.status == 401 and route:
        error.headers += (("WWW-Authenticate", f'Basic realm="{REALMS[route.who]}", charset="UTF-8"'),)
    if route and route.who in PAGE_VISITORS and request.wants_html():
        request.refusal = error
        return make_page(request, title, fill('<p><a class="button" href="../me/">Your values</a></p>'))
    if JSON in accept or "+json" in accept:
        problem = json.dumps({"title": title, "status": error.status, "detail": error.message})
        return Response(problem.encode(), error.status, "application/problem+json", error.headers)
    return Response(error.message.encode(), error.status, headers=error.headers)


def normalize_origin(text: str) -> str:
    return text.lower().removesuffix(f":{DEFAULT_PORTS.get(text.partition(':')[0].lower())}")


def share_response(response: Response, request: Request, route: Route | None, origins: Sequence[str]) -> Response:
    """Let pages of these origins read a response of the API; answer their preflights (Fetch standard, section 3.3)."""
    origin = request.fields.headers.get("origin", "")
    allowed = "*" if origin and "*" in origins else origin if normalize_origin(origin) in origins else ""
    if not allowed or (route and route.path not in API_PATHS):
        return response
    # Without Access-Control-Allow-Credentials: such pages must not read with the password that the browser remembers.
    headers = {"Access-Control-Allow-Origin": allowed, "Vary": "Origin"}
    headers["Access-Control-Expose-Headers"] = "ETag, Link, Retry-After"
    if response.status == 204:  # to OPTIONS
        headers["Access-Control-Allow-Methods"] = dict(response.headers)["Allow"]
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, If-Match, If-None-Match"
        headers["Access-Control-Max-Age"] = "600"
    return response._replace(headers=(*response.headers, *headers.items()))


# ---- Connections -----------------------------------------------------------------------------------------------------
# The story of one connection: it receives a request, finds its user, runs its endpoint, and sends the response.

LINGER_SECONDS = 2
QUICK_BODY_BYTES_MAX = 16 * 1024  # parsing a longer body may take a second, so a thread does it
NO_REQUEST = Request("", "*", "", Fields("", {}, False, False, 0))  # for one that cannot be parsed
IDLE, RECEIVING, WORKING, SENDING = "idle", "receiving", "working", "sending"  # while its task waits; see rank
EVENTS_BYTES_MAX = 16 * 1024  # that a stream sends at once; a longer event goes alone, and streams share its bytes
PENDING_BYTES_MAX = 1024 * 1024  # of events that a stream has not begun to send, plus those of one transaction
RESTART_SECONDS, SILENT_SECONDS = 1, 15  # from one start of a stream to the next; until it sends a comment


def encode_change(key: str, value: str | None, updated: float) -> bytes:
    content = {} if value is None else {"value": value, "updated": rfc3339(updated)}
    return encode_event("del" if value is None else "set", key=key, **content)


class Stream:
    """The events for a client: first all pairs with a prefix, sorted by key, then changes as they are committed."""

    def __init__(self, wakeup: Wakeup, user_id: int, prefix: str) -> None:
        self.wakeup, self.user_id, self.prefix, self.end = wakeup, user_id, prefix, prefix + LAST_KEY
        self.start()

    def start(self) -> None:
        self.started, self.restart_time = time.monotonic(), NEVER
        self.after = ""  # key of the last pair that was sent; the changes of later ones come with the pairs
        self.pending, self.pending_bytes = collections.deque[bytes](), 0


class RequestHandler:
    """Serves one connection: request after request, until one side closes it."""

    def __init__(self, connection: socket.socket, address: tuple[Any, ...], server: Server) -> None:
        self.socket, self.peer, self.server = connection, str(address[0]), server
        self.connection: socket.socket | SecureSocket = connection
        self.received, self.unsent = bytearray(), b""  # unsent: a response or events that the client is slow to take
        self.state, self.started = IDLE, time.monotonic()  # the connection, and later the request
        self.deadline = self.started + FIRST_BYTE_SECONDS  # for the next bytes
        self.route: Route | None = None  # of the request
        self.fields: Fields | None = None  # of the last request
        self.last: tuple[bytes | bytearray, Request | None] = (b"", None)  # head and request, if the last had no body
        self.login: tuple[Fields | None, User] = (None, NOBODY)  # the last user, and the fields that they sent

    def rank(self) -> tuple[float, float]:
        """Return a sort key: the lowest connection is closed first when there are too many. NEVER protects it."""
        if self.state == RECEIVING or (self.state == IDLE and self.fields is None):
            return 0, self.started
        # Strangers get only short responses. A slow or busy stranger can connect again.
        if self.login[1] is NOBODY and (self.state != WORKING or (self.route and self.route.who in NO_LOGIN)):
            return 1, self.deadline
        return (2 if self.state == IDLE and not self.received else NEVER), self.deadline

    async def handle(self) -> None:
        self.task = self.server.loop.current
        self.server.loop.use(self.socket)
        try:
            while await self.handle_one_request():
                if self.received:  # pipelined: others first
                    Wakeup(self.server.loop)()
                    await ready(0)
            if self.body_pending:  # closing with unread bytes would lose the response (RFC 9112 section 9.6)
                self.state, deadline = RECEIVING, time.monotonic() + LINGER_SECONDS
                self.connection.shutdown(socket.SHUT_WR)
                while await receive(self.socket, RECEIVE_BYTES, deadline):
                    pass
        except (OSError, HTTPError):  # the client has gone, or no request has come
            pass
        finally:
            self.server.loop.use(None)
            del self.server.connections[self.socket]
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
            self.socket.close()

    async def handle_one_request(self) -> bool:
        """Receive a request and answer it; return whether another one may follow."""
        request, self.route, self.body_pending = NO_REQUEST, None, True
        try:
            request = await self._receive_request()
            response = await self.respond(request)
        except Exception as error:  # whatever happens, the client gets a response
            if self.state == IDLE or isinstance(error, ConnectionError):  # nobody is there to read one
                raise
            if self.received.startswith(b"\x16") and not self.server.certificate:  # the handshake of TLS
                message = f"a client speaks TLS; use http:// or set --tls-cert: address={parse_address(self.peer)}"
                self.server.errors.write(message, RARE_LOG_SECONDS, "TLS", "WARNING")
            response = answer_to_error(as_http_error(error, self.server.errors), self.route, request)
        if self.server.cors_origins:
            response = share_response(response, request, self.route, self.server.cors_origins)
        route, seconds = self.route, time.monotonic() - self.started
        self.server.metrics.note_response((route.path or "/") if route else "other", response.status, seconds)
        if self.server.log_requests:
            method = request.method if request.method in METHODS else ""
            path = request.path.removesuffix(request.key_in_path) if route else ""  # an unknown one may be a value
            key = request.parameters.get("key", "")[:KEY_BYTES_MAX]
            line = f"request: method={method} path={path!r} key={key!r} status={response.status} milliseconds="
            log("INFO", f"{line}{seconds * 1000:.1f} user={request.user.name!r} address={self._address(request)}")
        prefix, is_open = response.stream_prefix, not self.body_pending and not self.server.stopping
        keep_alive = request.fields.keep_alive and is_open and prefix is None
        connection = "close" if not keep_alive else "keep-alive" if request.fields.is_http_1_0 else ""
        data = encode_response(response, connection, with_body=request.method != "HEAD")
        del response  # its body may be long
        await (self._send(data) if prefix is None else self._stream(request, data, prefix))
        self.state, self.deadline = IDLE, time.monotonic() + IDLE_SECONDS
        return keep_alive

    async def _receive_request(self) -> Request:
        if self.fields is None:
            if self.server.certificate:
                await ready(READABLE, self.deadline)
                if self.socket.recv(1, socket.MSG_PEEK).isalpha():  # begins a method, never a TLS record
                    self.state = RECEIVING
                    raise HTTPError(400, "this server speaks TLS; use https:// instead of http://")
                self.connection = connection = SecureSocket(self.socket, self.server.certificate.context)
                client = ("client", client_of(parse_address(self.peer)))
                await connection.shake_hands(self.server.threads, client, self.deadline)
                self.deadline = time.monotonic() + FIRST_BYTE_SECONDS
            with contextlib.suppress(BlockingIOError):  # the first request may have come already
                self.received += self.connection.recv(RECEIVE_BYTES)
        while not self.received or self.received == b"\r\n":  # some clients send an empty line behind a body
            self.received.clear()
            await self._receive_more()
        self.state, self.started = RECEIVING, time.monotonic()
        self.deadline, begin = self.started + REQUEST_SECONDS, 0
        while self.received.find(b"\r\n\r\n", begin) < 0:
            begin = check_incomplete_head(self.received, begin)
            await self._receive_more()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        known_head, known = self.last
        if known and head == known_head:  # many clients send the same request again and again
            request = Request(known.method, known.path, known.query, known.fields)
            request.parameters = known.parameters
        else:
            request = parse_head(bytes(head), self.fields)
        # A body without a length may come late. No other request follows it: that might be the body.
        may_come = request.method in ("POST", "PUT") and "content-length" not in request.fields.headers
        self.state, self.fields = WORKING, request.fields
        self.body_pending = may_come or request.fields.body_length != 0
        self.last = (b"", None) if self.body_pending else (head, request)
        return request

    async def _receive_more(self) -> None:
        data = await receive(self.connection, RECEIVE_BYTES, self.deadline)
        if not data:
            raise HTTPError(400, "the request is incomplete")
        self.received += data

    async def respond(self, request: Request) -> Response:
        """Return the response to a request, or raise the reason to refuse it."""
        methods, request.key_in_path = find_routes(request.path, self.server.base_path)
        route = methods.get(request.method)
        self.route = route or next(iter(methods.values()), None)
        if route is None or (route.who == BROWSER and not request.wants_html()):
            return answer_without_route(request, () if route else list(methods), self.server.base_path)  # 404, 405, 501
        if route.where == COMMIT:
            check_no_prefetch(request.fields.headers)  # 503
        if route.who in (BROWSER, *PAGE_VISITORS):
            request.server_url = self._url(request)
        await self._authorize(route, request)  # 401, 403, 429, 503
        if self.body_pending and route.who not in NO_LOGIN:
            await self._receive_parameters(route, request)  # 400, 408, 411, 413, 415
        elif request.parameters is UNPARSED:
            request.parameters = parse_parameters(request, route)  # 400
        if route.where != HERE:
            return await self._run_elsewhere(route, request)
        response = route.endpoint(self.server.reader, request)
        if response.wait_until or response.stream_prefix is not None:
            return await self._wait_for_change(route, request, response)  # 401, 503
        return response

    def _address(self, request: Request) -> Address | None:
        return client_address(self.peer, request.fields.headers.get("x-forwarded-for", ""), self.server.trusted_proxy)

    def _url(self, request: Request) -> str:
        """Return the server's address as the browser of a page sees it, without a slash at the end."""
        headers, scheme = request.fields.headers, "https" if self.server.certificate else "http"
        forwarded, peer = headers.get("x-forwarded-proto", "").lower(), parse_address(self.peer)
        if forwarded in DEFAULT_PORTS and peer and any(peer in network for network in self.server.trusted_proxy):
            scheme = forwarded
        host = headers.get("host") or f"HOST:{self.server.server_port}"
        return f"{scheme}://{host}" + re.sub("/((me|admin)(/[^/]*)?)?$", "", request.path)

    async def _authorize(self, route: Route, request: Request) -> None:
        if route.who in NO_LOGIN:
            return
        if self.server.writer.timed_pairs and self.server.writer.clock_jump():
            with contextlib.suppress(StoreFull, sqlite3.Error):  # reads go on while the disk fails
                await self.server.commit(lambda store: None)  # each transaction shifts expiries
        headers, (fields, user) = request.fields.headers, self.login
        login = user.token.digest if user.token else user.name
        if request.fields is not fields or self.server.reader.user(login) != user:
            find_address = functools.partial(self._address, request)
            user = await self.server.authenticator.authenticate(headers.get("authorization", ""), find_address)
            self.login = (request.fields, user)
        request.user = user
        check_visitor(user, route.who)
        if user.token and user.token.last_used != time.time() // DAY_SECONDS * DAY_SECONDS:
            self.server.token_uses[user.token.id] = int(time.time() // DAY_SECONDS)
        if route.where == COMMIT:
            check_same_site(headers)
            if user.token and user.token.is_read_only:
                raise HTTPError(403, "this token may only read; make another one with: python3 kvserver.py addtoken")

    async def _receive_parameters(self, route: Route, request: Request) -> None:
        length, body = request.fields.body_length, bytearray()
        if length > BODY_BYTES_MAX:
            raise HTTPError(413, BODY_TOO_LARGE.format(length))
        if length == 0:  # it is unknown: the body is empty (RFC 9112 section 6.3), unless it comes in a second write
            with contextlib.suppress(BlockingIOError):
                self.received = self.received or bytearray(self.connection.recv(RECEIVE_BYTES))
            if route.body == VALUE or self.received.strip(b"\r\n"):  # never store an empty value instead
                raise HTTPError(411, "send the header Content-Length with the number of bytes in the body, 0 for none")
        elif request.fields.headers.get("expect", "").lower() == "100-continue" and not request.fields.is_http_1_0:
            await self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.state, self.deadline = RECEIVING, time.monotonic() + REQUEST_SECONDS
        while not (take_chunks(self.received, body) if length == CHUNKED else len(self.received) >= length):
            await self._receive_more()
        if length != CHUNKED:
            body, self.received = self.received[:length], self.received[length:]
        self.state, self.body_pending, request.body = WORKING, length == 0, bytes(body)
        parse = functools.partial(parse_parameters, request, route)
        is_long = len(body) > QUICK_BODY_BYTES_MAX
        request.parameters = await self.server.threads.run(parse, request.user.id) if is_long else parse()
        await self._authorize(route, request)  # meanwhile, the user may have been deleted, or got another password

    async def _run_elsewhere(self, route: Route, request: Request) -> Response:
        endpoint = route.endpoint
        if route.where == COMMIT:
            if "password" in request.parameters:  # its hash would take too long within the transaction
                make_hash = functools.partial(hash_password, request.parameters["password"])
                request.password_hash = await self.server.authenticator.scrypt.run(make_hash, request.user.id)
                await self._authorize(route, request)
            is_long = route.who == ADMIN or endpoint is delete_history  # it may delete a lot, so a thread commits it
            size = math.inf if is_long else len(request.query) + len(request.body)
            try:
                response: Response = await self.server.commit(lambda store: route.endpoint(store, request), size)
                if not request.test:
                    return response
                endpoint = functools.partial(hooks_page, message=await self.server.outbox.test(request.test))
            except (HTTPError, StoreError) as error:
                if route.who not in PAGE_VISITORS or not request.wants_html() or request.path.endswith("/admin"):
                    raise  # programs get a line
                pages = OWN_PAGES if endpoint is change_own else USER_PAGES
                endpoint = pages.get(request.parameters.get("action", ""), next(iter(pages.values())))
                request.refusal = as_http_error(error, self.server.errors)
            await self._authorize(route, request)

        def run() -> Response:
            self.server.writer.check_file()
            with contextlib.closing(Store(self.server.reader.path)) as store:
                store.begin(is_reading=True)
                return endpoint(store, request)

        request.metrics = self.server.metrics
        return cast(Response, await self.server.threads.run(run, request.user.id))

    async def _wait_for_change(self, route: Route, request: Request, response: Response) -> Response:
        polls, streams = self.server.polls, self.server.streams
        if len(polls) + len(streams) >= self.server.max_connections // 2:
            raise HTTPError(503, "too many requests wait already (half of --max-connections); try again", RETRY_AFTER)
        try:
            while response.wait_until:
                polls[request] = Wakeup(self.server.loop)
                await self._wait_for_news(response.wait_until)
                await self._authorize(route, request)
                request.may_wait = not self.server.stopping
                response = route.endpoint(self.server.reader, request)
            return response
        finally:
            polls.pop(request, None)

    async def _wait_for_news(self, deadline: float) -> None:
        with contextlib.suppress(BlockingIOError, TimeoutError):
            if not await ready(0 if self.received else READABLE, deadline):  # the next request, or the client has gone
                self.received += self.connection.recv(RECEIVE_BYTES)
                if not self.received:
                    raise ConnectionResetError

    async def _stream(self, request: Request, head: bytes, prefix: str) -> None:
        """Send a head, and then events until the client goes, its login ends or the server stops."""
        server, route, is_chunked = self.server, cast(Route, self.route), not request.fields.is_http_1_0
        stream, unsent = Stream(Wakeup(server.loop), request.user.id, prefix), memoryview(head)
        active, resume = stream.started, 0.0  # when it last sent, or had to; when it may send more first pairs
        # The kernel buffers little, so that SEND_SECONDS counts, and closes a client that has vanished.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, EVENTS_BYTES_MAX)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)  # without an acknowledgement
        server.streams.add(stream)
        try:
            while not server.stopping and request.user.id == stream.user_id:
                events, is_following, now = list[bytes](), stream.after == stream.end, time.monotonic()
                if not unsent and (is_following or now >= resume):
                    events = server.next_events(stream)
                    if not is_following:  # streams that begin take turns, and leave half of the time to others
                        resume = server.pages_until = max(server.pages_until, now) + 2 * (time.monotonic() - now)
                    if not events and now >= active + SILENT_SECONDS:
                        events = [b"3\r\n:\n\n\r\n"]  # a comment
                    parts = [memoryview(e) if is_chunked else memoryview(e)[e.index(b"\n") + 1 : -2] for e in events]
                    unsent = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
                    active = now if events else active
                with contextlib.suppress(BlockingIOError):
                    if unsent:
                        sent = self.connection.send(unsent[:EVENTS_BYTES_MAX])  # TLS tells no smaller progress
                        unsent, active = unsent[sent:], time.monotonic()
                self.state, self.unsent = (SENDING, cast(bytes, unsent.obj)) if unsent else (WORKING, b"")
                stream.wakeup = Wakeup(server.loop)
                if unsent:
                    await ready(WRITABLE, active + SEND_SECONDS)
                elif events or stream.after != stream.end:
                    # After first pairs, leave time to others. Without any, a commit is under way: look again soon.
                    await sleep(0 if is_following else max(resume - now, 0 if events else SHORT_POLL_SECONDS))
                else:
                    await self._wait_for_news(min(active + SILENT_SECONDS, stream.restart_time))
                await self._authorize(route, request)  # meanwhile, the user may have been deleted
        except (HTTPError, StoreError, sqlite3.Error) as error:
            as_http_error(error, server.errors)  # logs a fault of the server; the stream ends
        finally:
            server.streams.remove(stream)
        if is_chunked and not unsent:
            await self._send(b"0\r\n\r\n")

    async def _send(self, data: bytes) -> None:
        unsent: bytes | memoryview = data
        while unsent:
            try:
                unsent = memoryview(unsent)[self.connection.send(unsent) :]
            except BlockingIOError:
                pass
            if unsent:
                self.state, self.unsent = SENDING, data
                await ready(WRITABLE, time.monotonic() + SEND_SECONDS)
        self.unsent = b""


# ---- Hooks -----------------------------------------------------------------------------------------------------------
# Sends changes to URLs. Only a shell adds hooks: users could make the server call hosts in its own network.

HOOK_LINGER_SECONDS, HOOK_ANSWER_BYTES_MAX = 0.2, 4 * 1024  # for the rest of an answer: its sender must see no error
HOOK_RETRY_SECONDS_MAX, DROPPED_SECONDS = 3600, 10  # until the next try; until the log names dropped deliveries again
HOOK_GRACE_SECONDS = 300  # for so long after a start, nothing is too old: the network may come up late
LONG_EXCHANGES_MAX, LONG_DELIVERY_BYTES = 2, 64 * 1024  # beyond EXCHANGES_MAX: JSON takes six times as much memory
TESTS_MAX = 8  # at once: each holds a connection
client_context = functools.lru_cache(maxsize=1)(ssl.create_default_context)  # making one takes long


def deliver(delivery: Delivery) -> Answer:
    """Send a delivery; return the answer within HOOK_SECONDS, without the time that looking up the name takes."""
    received, answer, problem = b"", None, "the connection was closed before a whole status line had come"
    try:
        parts: Any = urllib.parse.urlsplit(delivery.url)
        address, request = (parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme]), encode_delivery(parts, delivery)
        count = len(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))  # all of them are tried in time
        deadline, share = time.monotonic() + HOOK_SECONDS, HOOK_SECONDS / (count + 1)
        connection = socket.create_connection(address, share)
        if parts.scheme == "https":
            connection = client_context().wrap_socket(connection, server_hostname=parts.hostname)
        with connection:
            deadline = max(deadline, time.monotonic() + share)  # create_connection has looked up the name again
            connection.settimeout((deadline - time.monotonic()) / 2)  # the other half is for the answer
            with contextlib.suppress(OSError):  # the answer may come before the request has been sent in full
                connection.sendall(request)
            while len(received) < HOOK_ANSWER_BYTES_MAX:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                data = connection.recv(HOOK_ANSWER_BYTES_MAX)
                if not data:
                    break
                received += data
                answer = parse_answer(received)
                is_whole = re.search(rb"\n\r?\n(?!HTTP/)", received)  # these headers may tell when to try again
                if answer and (is_whole or answer.status not in (429, 503)):
                    deadline = min(deadline, time.monotonic() + HOOK_LINGER_SECONDS)
        if b"\n" in received or len(received) >= HOOK_ANSWER_BYTES_MAX:
            problem = "the answer is not HTTP/1.1"
    except TimeoutError:
        problem = f"no answer within {HOOK_SECONDS} seconds"
    except UnicodeError:
        problem = "this is not a valid host name"
    except HTTPError as error:  # trying again would not help
        answer = Answer(error.status, error.message)
    except Exception as error:  # noqa: BLE001 - whatever it is, the delivery has not arrived
        problem = getattr(error, "strerror", None) or type(error).__name__
    return answer or Answer(0, problem)


class Outbox:
    """Sends deliveries. Each hook has one task, which sends its deliveries in order, one at a time."""

    def __init__(self, store: Store, loop: Loop, commit: Commit, metrics: Metrics, errors: ErrorLog) -> None:
        self._store, self._loop, self._commit, self._metrics, self._errors = store, loop, commit, metrics, errors
        self._threads = Threads(loop, EXCHANGES_MAX + LONG_EXCHANGES_MAX)
        self.gate = Gate(loop)  # held by exchanges under way, until their results are stored
        self.has_hooks = self.is_stopping = False  # when it stops, no further exchange begins
        self._tests, self._running, self._newest = 0, set[int](), 0  # running tests; hooks with a task; newest delivery
        self._dropped: collections.Counter[tuple[str, str]] = collections.Counter()  # by hook and reason, until logged
        self._dropped_logged, self._started = -NEVER, time.monotonic()
        self._lock: BinaryIO | None = None

    def close(self) -> None:
        self._log_dropped()
        if self._lock:
            self._lock.close()

    def take_lock(self) -> bool:
        """Return whether this server sends: of several with one database only one does, as long as it lives."""
        path = self._store.path
        try:
            self._lock = self._lock or lock_database(path)
        except BlockingIOError:
            self._errors.write(f"another server runs on {path} and sends deliveries; stop one", NEVER, level="WARNING")
        except OSError as error:
            self._errors.write(f"hooks need {path}-lock ({error.strerror}); delete that file", HOOK_RETRY_SECONDS_MAX)
        return self._lock is not None

    def look(self) -> None:
        """Start a task for each hook that has new deliveries; raise sqlite3.Error."""
        if self._dropped and self._dropped_logged + DROPPED_SECONDS < time.monotonic():
            self._log_dropped()
        self.has_hooks = self._store.has_hooks()
        if self.take_lock() and self.has_hooks and not self.is_stopping:
            rows = self._store.new_deliveries(self._newest)
            self._newest = max((newest for *_, newest in rows), default=self._newest)
            for hook_id, is_proven, _ in rows:
                if hook_id not in self._running:
                    self._loop.start(self._run_hook(hook_id, bool(is_proven)))

    async def test(self, delivery: Delivery) -> str:
        """Send a test and return a sentence about the answer; raise HTTPError if it fails. Nothing is stored."""
        if self.is_stopping or self._tests >= TESTS_MAX:
            raise HTTPError(503, "other tests are running, or the server stops; try again", RETRY_AFTER)
        self._tests += 1
        try:
            deadline = time.monotonic() + 2 * HOOK_SECONDS  # looking up the name may hang
            answer: Answer = await self._threads.run(lambda: deliver(delivery), "test", deadline)
        except TimeoutError:
            answer = Answer(0, f"no answer within {HOOK_SECONDS} seconds")
        finally:
            self._tests -= 1
        if not 200 <= answer.status < 300:  # not 502, which some proxies replace
            raise HTTPError(424, f"hook {delivery.hook_id}: {answer.text}; check the URL and the program there")
        return f"Hook {delivery.hook_id} answered {answer.text}."

    async def _run_hook(self, hook_id: int, is_proven: bool) -> None:
        self._running.add(hook_id)
        next_pause = 1.0
        try:
            while True:
                next_one = self._store.next_delivery(hook_id, with_values=False)
                if not next_one or self.is_stopping:
                    return
                inserts = len(PLACEHOLDER.findall(f"{next_one.url}{next_one.headers}{next_one.body}"))
                is_long = next_one.size + inserts * (next_one.size + len(next_one.key)) > LONG_DELIVERY_BYTES
                most = LONG_EXCHANGES_MAX if is_long else EXCHANGES_MAX
                bounds: dict[Hashable, int] = {is_long: most, (is_long, next_one.origin): ORIGIN_EXCHANGES_MAX}
                if not is_proven:  # half of each is for hooks that work
                    bounds |= {("doubtful", kind): max(1, most // 2) for kind, most in bounds.items()}
                await self.gate.enter(bounds)
                try:
                    delivery = self._store.next_delivery(hook_id, with_values=True)
                    if delivery is None or delivery.number != next_one.number or self.is_stopping:
                        continue  # while it waited, that one has been deleted, or the server stopped
                    is_proven, pause = await self._try(delivery, next_pause)
                finally:
                    self.gate.leave(bounds)
                delivery = None  # its values may be long
                next_pause = min(2 * next_pause, HOOK_RETRY_SECONDS_MAX) if pause else 1.0
                await sleep(pause)
        except Exception:
            self._newest = 0  # the next look begins again
            raise
        finally:
            self._running.discard(hook_id)

    async def _try(self, delivery: Delivery, next_pause: float) -> tuple[bool, float]:
        """Send a delivery, and store the result. Return whether the hook works, and the pause until the next try."""
        answer: Answer = await self._threads.run(lambda: deliver(delivery), delivery.hook_id)
        is_success, pause = 200 <= answer.status < 300, 0.0
        self._metrics.deliveries += is_success
        self._metrics.failed_deliveries += not is_success
        is_proven = is_success or (300 <= answer.status < 500 and answer.status not in (408, 429))  # a refusal is final
        if not is_proven:
            age, uptime = time.time() - delivery.created, time.monotonic() - self._started
            seconds_left = max(HOOK_GIVE_UP_SECONDS - age, HOOK_GRACE_SECONDS - uptime)
            pause = max(0, min(answer.retry_after or next_pause, HOOK_RETRY_SECONDS_MAX, seconds_left))
        is_dropped = not pause and not is_success
        result = f"{answer.text}, dropped" if is_dropped else answer.text
        try:
            await self._commit(lambda store: store.note_try(delivery.hook_id, result, delivery.number - bool(pause)))
        except (StoreError, sqlite3.Error):  # it is sent again, but not all the time
            return is_proven, max(pause, min(next_pause, 60))
        hook, overflow = f"hook {delivery.hook_id} to {delivery.origin}", delivery.number - 1 - delivery.handled
        full = f"over {HOOK_PENDING_MAX} or {HOOK_PENDING_BYTES_MAX // 2**20} MiB pending"
        reason = answer.text if is_proven else f"a day old, {answer.text}"
        self._dropped += collections.Counter({(hook, full): overflow, (hook, reason): int(is_dropped)})  # if above 0
        self._metrics.dropped_deliveries += overflow + is_dropped
        if pause and next_pause == 1:
            self._errors.write(f"{hook}: {result}; trying again for 24 hours", DROPPED_SECONDS)
        return is_proven, pause

    def _log_dropped(self) -> None:
        for (hook, reason), count in self._dropped.items():
            log("ERROR", f"{hook}: dropped deliveries: {count} ({reason})")
        self._dropped.clear()
        self._dropped_logged = time.monotonic()


# ---- Server ----------------------------------------------------------------------------------------------------------
# Accepts connections, and commits changes that come in together. One thread runs the loop; others do slow work.

GATHER_SECONDS_MAX = 0.001  # that a change waits for others to share its commit
QUICK_COMMIT_SECONDS = 0.002  # if the last commit took no longer, the loop itself waits for the disk
TRANSACTION_BYTES_MAX = 4 * 1024 * 1024  # of the requests in it, except the last
WAL_PAGES_MAX = 1500  # of 4 KiB: at 6 MB the write-ahead log begins again, even if it has to wait for readers
UNSENT_BYTES_MAX = 64 * 1024 * 1024  # of all responses that clients are slow to take
POLL_SECONDS = 0.25  # between two looks for other processes' changes, expired pairs and new deliveries
STOP_REQUEST_SECONDS, STOP_SECONDS, EXIT_SECONDS = 3, 4, 4.5  # late requests get 408 or 503; connections close; exit

Change = tuple[Callable[[Store], Any], Wakeup, float]  # an operation, its task's Wakeup, bytes of its request or so


class Server(http.server.ThreadingHTTPServer):
    """Serves each connection with a coroutine, where ThreadingHTTPServer starts a thread."""

    request_queue_size = 128
    allow_reuse_port, allow_reuse_address = False, os.name != "nt"  # a second server on the port must fail

    def __init__(self, path: str, settings: Mapping[str, Any], certificate: Certificate | None = None) -> None:
        """Use the database at path, and listen, by TLS with a certificate; raise OSError. SETTINGS has the settings."""
        host = settings["host"] or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")  # :: serves IPv4 as well
        self.address_family, _, _, _, address = socket.getaddrinfo(host, settings["port"], type=socket.SOCK_STREAM)[0]
        self.base_path, self.trusted_proxy = settings["base_path"], settings["trusted_proxy"]
        self.log_requests, self.max_connections = settings["log_requests"], settings["max_connections"]
        self.cors_origins: Sequence[str] = settings["cors_origin"]
        self.certificate, self.errors = certificate, ErrorLog()
        self.reader, self.writer = CachingStore(path), Store(path, wait=0, mb_max=settings["max_db_mb"])
        self.loop = Loop(lambda error: as_http_error(error, self.errors))
        self.threads, self.disk = Threads(self.loop, WORKERS_MAX), Threads(self.loop, 1)  # no commit waits for lists
        self.connections: dict[socket.socket, RequestHandler] = {}
        self.polls, self.streams = dict[Request, Wakeup](), set[Stream]()  # polls: requests that wait for a change
        self.metrics = Metrics(self.connections, self.polls, self.streams)
        self.authenticator = Authenticator(self.reader, self.loop, self.threads, self.commit, self.metrics)
        self.outbox = Outbox(self.reader, self.loop, self.commit, self.metrics, self.errors)
        self.changes: collections.deque[Change] = collections.deque()  # for the next transaction
        self.stopping = self._is_finished = self._is_committing = False
        self._in_transaction = False  # of changes that are not handed out yet
        self.token_uses: dict[int, int] = {}  # days not yet stored, by the token's id
        self._state = b""  # of the database; streams and requests that wait know of all commits up to it
        self.pages_until = self._next_checkpoint = 0.0  # monotonic seconds, before which streams and checkpoints wait
        self._page = (b"", 0, "", ""), list[bytes](), ""  # the last page of pairs that a stream read, and its last key
        super().__init__(cast(Any, address), cast(Any, RequestHandler))
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind the socket. HTTPServer's own method would ask the DNS for our name, which can take seconds."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)  # inherited: no response waits for an ACK
        super(http.server.HTTPServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def server_close(self) -> None:
        super().server_close()
        for part in (self.loop, self.outbox, self.reader, self.writer):
            part.close()

    def run(self) -> bool:
        """Serve until stop is called, finish the requests under way, and return whether all ended in time."""
        # The caller's thread only waits: signal handlers run there, also while a disk holds up the loop.
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        while thread.is_alive() and not self.stopping:
            time.sleep(POLL_SECONDS)
        if not self.stopping:
            raise RuntimeError("the loop has ended")
        thread.join(EXIT_SECONDS)
        if thread.is_alive() or self._is_committing:
            return False
        self.server_close()
        return True

    def stop(self) -> None:
        """Make run end. This is safe in a signal handler: it only sets a flag."""
        self.stopping = True

    def serve_forever(self, poll_interval: float = POLL_SECONDS) -> None:
        """Run the loop until the server has stopped, and commit the changes that come in."""
        self.loop.start(self._keep_house(accepting=self.loop.start(self._accept())))
        self.loop.start(self._make_own_changes())
        while not self._is_finished:
            is_busy = self.loop.run_once(may_wait=self._is_committing or not self.changes)
            if self.changes and not self._is_committing:
                # While other requests come in, so do changes. Those that share a commit take hardly longer than one.
                deadline = time.monotonic() + min(self.writer.commit_seconds / 2, GATHER_SECONDS_MAX)
                while is_busy and len(self.changes) < len(self.connections) and time.monotonic() < deadline:
                    is_busy = self.loop.run_once(may_wait=False)
                self.loop.start(self._commit())

    async def _keep_house(self, accepting: Task) -> None:
        """Look for others' changes and new deliveries. After the stop, let requests end, and drop the slow ones."""
        while not self.stopping:
            try:
                self._look_for_others()
                self._bound_unsent()
                self.outbox.look()
            except Exception as error:  # noqa: BLE001 - a mistake must not end this
                as_http_error(error, self.errors)
            await sleep(POLL_SECONDS)
        self.loop.throw(accepting, Cancelled())  # the stop begins
        self.socket.close()
        self.outbox.is_stopping = True
        for handler in list(self.connections.values()):
            if handler.state == IDLE and not handler.received:
                self.loop.throw(handler.task, Cancelled())
        begun = time.monotonic()
        while self.connections or self.outbox.gate.taken or self.changes or self._is_committing or self.token_uses:
            self._wake(None)
            seconds = time.monotonic() - begun
            if seconds > STOP_REQUEST_SECONDS:
                late = [handler.task for handler in self.connections.values() if handler.state == RECEIVING]
                for task in (*late, *(wakeup.task for _, wakeup, _ in self.changes)):
                    self.loop.throw(task, TimeoutError())
            if seconds > STOP_SECONDS:
                break
            await sleep(SHORT_POLL_SECONDS)
        self._is_finished = True

    async def _make_own_changes(self) -> None:
        """Store the uses of tokens, and delete expired pairs: the triggers of hooks see these deletions."""
        offset, has_jumped = self.writer.clock_offset, False
        while True:
            try:
                days = self.token_uses.copy()
                if days or self.writer.clock_jump():
                    await self.commit(lambda store: store.note_token_uses(days))  # noqa: B023 - it ends before
                self.token_uses = dict(self.token_uses.items() - days.items())
                # After a jump, another server on this database first shifts its expiries, too.
                has_jumped, offset = self.writer.clock_offset != offset, self.writer.clock_offset
                while not has_jumped and not self.stopping and self.reader.has_expired():
                    await self.commit(Store.delete_expired)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next look tries again
                as_http_error(error, self.errors)
            await sleep(max(POLL_SECONDS, 8 * self.writer.commit_seconds) if has_jumped else POLL_SECONDS)

    async def _accept(self) -> None:
        self.loop.use(self.socket)
        while True:
            try:
                await ready(READABLE)
                is_full = len(self.connections) >= self.max_connections
                with contextlib.suppress(BlockingIOError, ConnectionError):  # none is left, or the client did not wait
                    for _ in range(min(8, self.max_connections - len(self.connections))):  # then requests have a turn
                        self.process_request(*self.get_request())
                if not is_full:
                    continue
            except Exception as error:  # noqa: BLE001 - a mistake must not end this
                is_full = getattr(error, "errno", 0) == errno.EMFILE
                self.errors.write(f"cannot accept a connection: {getattr(error, 'strerror', repr(error))}")
            first = min(self.connections.values(), key=RequestHandler.rank, default=None) if is_full else None
            if first and first.rank()[0] != NEVER:
                self.loop.throw(first.task, Cancelled())
            else:
                await sleep(SHORT_POLL_SECONDS)  # further connections wait in the listen queue

    def process_request(self, request: Any, client_address: Any) -> None:
        request.setblocking(False)
        self.connections[request] = handler = RequestHandler(request, client_address, self)
        self.loop.start(handler.handle())

    def _look_for_others(self) -> None:
        state = self.reader.state()
        if state != self._state and not self._in_transaction:
            self._state = state
            for stream in self.streams:
                stream.restart_time = stream.started + RESTART_SECONDS if stream.after else NEVER
            self._wake(None)

    def _wake(self, changed_pairs: set[PairId] | None) -> None:
        for request, wakeup in self.polls.items():
            if changed_pairs is None or (request.user.id, request.parameters["key"]) in changed_pairs:
                wakeup(True)
        for stream in self.streams:
            if changed_pairs is None or stream.pending:
                stream.wakeup(True)

    def next_events(self, stream: Stream) -> list[bytes]:
        """Return the next events of a stream, none if it must wait."""
        is_following, events, size = stream.after == stream.end, list[bytes](), 0
        if is_following and time.monotonic() >= stream.restart_time:
            stream.start()
            return [encode_event("reset")]
        if is_following or stream.pending:  # pending ones go first, so at ready the client has the pairs of one moment
            while stream.pending and (not events or size + len(stream.pending[0]) <= EVENTS_BYTES_MAX):
                events.append(stream.pending.popleft())
                size += len(events[-1])
            stream.pending_bytes -= size
            return events
        self._look_for_others()
        page = (self._state, stream.user_id, stream.prefix, stream.after)
        if page != self._page[0]:
            after = stream.after
            with contextlib.closing(self.reader.pairs(*page[1:])) as rows:
                for _, key, value, updated, _ in rows:
                    event = encode_change(key, value, updated)
                    size += len(event)
                    if events and size > EVENTS_BYTES_MAX:
                        break
                    events.append(event)
                    after = key
                else:
                    if size <= EVENTS_BYTES_MAX:  # a longer event goes alone
                        events.append(encode_event("ready"))
                        after = stream.end
            if self._in_transaction and self.reader.state() != self._state:
                return []  # these pairs may be newer than the changes that have been handed out
            self._page = page, events, after
        _, events, stream.after = self._page  # streams that start together share it
        return events

    def _hand_out(self) -> None:
        commits, self.writer.committed = self.writer.committed, []
        pair_changes = list(itertools.chain.from_iterable(commits))
        pairs = None if self.writer.changed_others else {pair for pair, _, _ in pair_changes}
        state, self._in_transaction = self.reader.state(), False
        if self.reader.keep_rows(self._state, state, len(commits), pairs):
            self._state = state
            for stream in list(self.streams):
                if stream.pending_bytes > PENDING_BYTES_MAX:
                    self.loop.throw(stream.wakeup.task, Cancelled())
            for (user_id, key), value, updated in pair_changes if self.streams else ():
                event = b""
                for stream in self.streams:
                    if stream.user_id == user_id and key <= stream.after and key.startswith(stream.prefix):
                        event = event or encode_change(key, value, updated)
                        stream.pending.append(event)
                        stream.pending_bytes += len(event)
            self._wake(pairs)
        self._look_for_others()

    async def commit(self, operation: Callable[[Store], Any], size: float = 0) -> Any:
        """Run an operation in the next transaction, and return or raise its result after the commit."""
        change = operation, Wakeup(self.loop), size
        self.changes.append(change)
        try:
            return await ready(0, time.monotonic() + DATABASE_LOCK_SECONDS)
        except TimeoutError:
            self.changes.remove(change)
            raise StoreBusy("the server is too busy; try again") from None

    async def _commit(self) -> None:
        # A thread runs transactions on a slow disk, with long values, or after the clock jumped. Reads go on meanwhile.
        self._is_committing, changes, size, writer = True, list[Change](), 0.0, self.writer
        try:
            writer.begin()
            self._look_for_others()  # we have the lock now: until the commit, the state changes only through us
            self._in_transaction = True
            while self.changes and size < TRANSACTION_BYTES_MAX:  # it enters the log whole, so this also bounds the log
                _, wakeup, change_size = change = self.changes.popleft()
                wakeup.task.deadline = NEVER  # from now on it waits, however long that takes
                changes.append(change)
                size += change_size
            is_quick = writer.commit_seconds < QUICK_COMMIT_SECONDS and size < 64 * 1024 and not writer.clock_jump()
            commit = functools.partial(writer.commit, [operation for operation, _, _ in changes])
            results = commit() if is_quick else await self.disk.run(commit)
            for number, ((_, wakeup, _), result) in enumerate(zip(changes, results), 1):
                if not is_quick and number % 4 == 0:  # reads do not wait for many responses
                    Wakeup(self.loop)()
                    await ready(0)
                if isinstance(result, (HTTPError, StoreError)):  # its traceback leads to all results
                    result.__traceback__ = result.__cause__ = result.__context__ = None
                wakeup(result)
            self.metrics.commits += len(writer.committed)
            self.metrics.writes += sum(not isinstance(result, Exception) for result in results)
            self._hand_out()
            if self.outbox.has_hooks:
                self.outbox.look()
            if self.reader.wal_pages() > WAL_PAGES_MAX and time.monotonic() >= self._next_checkpoint:
                # All writers wait for each try, and a reader may never end.
                self._next_checkpoint = time.monotonic() + (0 if await self.disk.run(writer.checkpoint) else 60)
        except StoreBusy:  # another process is writing, and the changes wait
            await sleep(SHORT_POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - the tasks raise it
            as_http_error(error, self.errors)
            failed = changes or self.changes  # none taken: begin failed
            for _, wakeup, _ in failed:
                wakeup(error)
            failed.clear()
        finally:
            self._is_committing = self._in_transaction = False

    def _bound_unsent(self) -> None:
        while True:
            handlers = {id(handler.unsent): handler for handler in self.connections.values()}  # streams share events
            unsent = collections.Counter[int]()  # bytes by user
            for handler in handlers.values():
                unsent[handler.login[1].id] += len(handler.unsent)
            if unsent.total() <= UNSENT_BYTES_MAX:
                return
            # The user with the most loses the longest response.
            longest = max(handlers.values(), key=lambda handler: (unsent[handler.login[1].id], len(handler.unsent)))
            self.loop.throw(longest.task, Cancelled())


# ---- Settings --------------------------------------------------------------------------------------------------------
# One table has all settings. Flags override the environment, which overrides the JSON file, which overrides defaults.


class CommandError(Exception): ...  # the message is one line for people; the program exits with 1


class UsageError(CommandError): ...  # it exits with 2


class Setting(NamedTuple):
    """A row of the table: log_requests is --log-requests, KVSERVER_LOG_REQUESTS, and log_requests in the file."""

    parse: Callable[[str], Any]  # raises ArgumentTypeError
    default: Any  # its type tells texts, numbers, switches and lists apart
    metavar: str
    help: str
    action: Any = "store"  # of argparse


def parse_number(least: int, most: int, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"it must be a whole number from {least} to {most}")
    return int(text)


def parse_networks(text: str) -> Networks:
    try:
        return tuple(ipaddress.ip_network(network.strip()) for network in text.split(",") if network)
    except ValueError:
        raise argparse.ArgumentTypeError("it must be an address, or a network such as 10.1.0.0/16") from None


def parse_origins(text: str) -> Sequence[str]:
    origins = [normalize_origin(origin.strip()) for origin in text.split(",")]
    host = r"(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([1-9][0-9]{0,4}))?"
    for origin in origins:
        match = re.fullmatch(rf"\*|https?://{host}|chrome-extension://[a-z0-9]+|capacitor://localhost", origin)
        if not match or int(match[1] or 0) > 65535:
            raise argparse.ArgumentTypeError("it must be *, https://HOST:PORT or chrome-extension://ID, without a path")
    return origins


def parse_base_path(text: str) -> str:
    path = ("/" + text.strip("/")).rstrip("/")  # "" for no prefix
    if not re.fullmatch("(?:/[A-Za-z0-9._~-]+)*", path):
        raise argparse.ArgumentTypeError("it must be a path such as /api, of letters, digits, . _ ~ - and slashes")
    return path


def parse_switch(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError("it must be true, false, 1 or 0")
    return text.lower() in ("true", "1")


parse_positive = functools.partial(parse_number, 1, 999_999)
parse_history = functools.partial(parse_number, 0, LIST_LIMIT_MAX)
SETTINGS = {
    "host": Setting(str, "", "H", "address to listen on (default: all, IPv6 and IPv4)"),
    "port": Setting(functools.partial(parse_number, 0, 65535), 8080, "P", "port; 0 picks one (default: {})"),
    "db": Setting(str, DEFAULT_DATABASE, "FILE", "database (default: kvserver.db next to the program)"),
    "base_path": Setting(parse_base_path, "/iotpersistenceapi", "P", "extra prefix of paths; / for none (default: {})"),
    "log_requests": Setting(parse_switch, False, "", "log requests, without values", argparse.BooleanOptionalAction),
    "max_connections": Setting(parse_positive, 256, "N", "largest number of open connections (default: {})"),
    "history": Setting(parse_history, 0, "N", "changes kept of each value; a start deletes older ones (default: {})"),
    "max_db_mb": Setting(parse_positive, 1024, "N", "largest size of the database in megabytes (default: {})"),
    "trusted_proxy": Setting(parse_networks, (), "A", "trust X-Forwarded-For from this proxy; repeatable", "extend"),
    "cors_origin": Setting(parse_origins, (), "O", "let web pages of O use the API (* for all); repeatable", "extend"),
    "tls_cert": Setting(str, "", "FILE", "certificate for HTTPS with its chain, in PEM format; SIGHUP loads it again"),
    "tls_key": Setting(str, "", "FILE", "private key of the certificate, in PEM format, not encrypted"),
}


def read_text(what: str, path: str) -> str:
    if path == "-" and sys.stdin.isatty():
        print(f"Type the {what}, and press Enter and Ctrl-D:", file=sys.stderr)
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        return re.sub(r"\r?\n\Z", "", file.read().decode("utf-8-sig"))


def read_config(path: str) -> Iterator[tuple[str, str, str]]:
    try:
        members = parse_json(read_text("settings", path))
    except (ValueError, HTTPError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}") from None
    if not isinstance(members, dict):
        raise UsageError(f"the configuration file {path} is not a JSON object")
    for name, member in members.items():
        setting = SETTINGS.get(name, SETTINGS["port"])  # an unknown name is refused later
        if isinstance(setting.default, str) and not isinstance(member, str):
            raise UsageError(f"{name} in {path} must be a JSON string, not {json.dumps(member)}")
        text = ",".join(map(str, member)) if setting.default == () and isinstance(member, list) else str(member)
        is_path = setting.metavar == "FILE" and text
        yield f"{name} in {path}", name, os.path.join(os.path.dirname(path), text) if is_path else text


def read_settings(path: str | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return all settings by name, without those from flags. An empty environment variable counts as unset."""
    path = path or environment.get("KVSERVER_CONFIG")
    texts = list(read_config(path)) if path else []
    for variable, text in environment.items():
        if variable.startswith("KVSERVER_") and variable != "KVSERVER_CONFIG" and text:
            texts.append((variable, variable[len("KVSERVER_") :].lower(), text))
    values = {name: setting.default for name, setting in SETTINGS.items()}
    for source, name, text in texts:
        if name not in SETTINGS:
            raise UsageError(f"{source} is not a setting; the settings are: {', '.join(SETTINGS)}")
        try:
            values[name] = SETTINGS[name].parse(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{source} is {text!r}; {error}") from None
    return values


# ---- Backup, export and import ---------------------------------------------------------------------------------------
# A backup is a copy of the whole database; an export is lines of JSON. An import is checked before it changes anything.

PAIR_FIELDS = ("user", "key", "value", "updated", "expires")
LINE_BYTES_MAX = 8 * 1024 * 1024  # a value in which every character is escaped, and the rest of the line


@contextlib.contextmanager
def copying(source: Store, path: str) -> Iterator[int]:
    """Copy a database, give the copy's descriptor, and move the copy to path after the block."""
    import tempfile

    folder, name = os.path.split(os.path.abspath(path))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it deletes the incomplete copy
    try:
        with tempfile.TemporaryDirectory(".part", name + ".", folder) as temporary:
            with tempfile.NamedTemporaryFile(dir=temporary, delete=False) as copy:  # only its owner can read it
                source.back_up(copy.name)
                os.fsync(copy.fileno())
                yield copy.fileno()
            os.replace(copy.name, path)
        with contextlib.suppress(OSError):  # Windows cannot open folders
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except (OSError, sqlite3.Error) as error:
        raise CommandError(f"cannot copy {source.path} to {path}: {getattr(error, 'strerror', error)}") from None


def back_up(arguments: argparse.Namespace) -> None:
    """Copy the database to a file, even while the server runs. The file is complete, or does not appear."""
    path, suffixes = arguments.file, ("-wal", "-shm", "-journal")  # SQLite keeps these next to a database in use
    with contextlib.closing(open_store(arguments.db, create=False, migrate=False)) as store:
        is_used = path.endswith(suffixes) or any(os.path.exists(path + suffix) for suffix in suffixes)
        is_plain = os.path.isfile(path) and not os.path.islink(path) and not os.path.samefile(path, store.path)
        if is_used or (os.path.lexists(path) and not is_plain):
            raise CommandError(f"{path} is a database in use, or not a plain file; name another file")
        if os.path.exists(path) and not arguments.force:
            raise CommandError(f"{path} exists; to overwrite it, add --force")
        with copying(store, path):
            pass
    print(escape_unprintable(f"wrote {path}, a copy of {store.path}"))


def set_aside(database: str, locks: contextlib.ExitStack) -> str:
    """Give the old database a second name too, and return that. Nobody else can use the old one until locks end."""
    try:
        locks.enter_context(lock_database(database))
        if os.path.exists(database) and not has_stray_log(database):
            with contextlib.suppress(sqlite3.Error):  # it is damaged, and keeps its log
                old = locks.enter_context(contextlib.closing(Store(database, wait=0)))
                old.schema_version(newest=math.inf)
                old.lock_alone()
    except (BlockingIOError, StoreBusy):
        raise CommandError(f"another process uses the database {database}; stop the server, and try again") from None
    kept = ""
    while not kept or os.path.lexists(kept):
        kept = f"{database}.before-restore-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.path.exists(database):
        try:
            os.link(database, kept)  # after a rename, a server that starts now would make a new database
        except OSError:  # this file system has no links
            os.rename(database, kept)
    for suffix in ("-wal", "-shm", "-journal"):
        if os.path.exists(database + suffix):  # SQLite must not find it next to a database that it doesn't belong to
            os.rename(database + suffix, database + suffix + kept[len(database) :])
    if os.name == "nt":  # Windows replaces no open file
        locks.close()
    return kept


def restore(arguments: argparse.Namespace) -> None:
    """Put a backup in place of the database, which stays under another name. Stop the server first."""
    path, database = arguments.file, check_place(arguments.db)
    if not os.path.isfile(path) or (os.path.exists(database) and os.path.samefile(path, database)):
        raise CommandError(f"{path} is no backup; name a file that this wrote: python3 kvserver.py backup FILE")
    with contextlib.ExitStack() as locks, contextlib.closing(open_store(path, create=False, migrate=False)) as backup:
        if not backup.schema_version():
            raise CommandError(f"{path} is empty; name a backup")
        with copying(backup, database) as copy:
            hand_over(copy, database)
            kept = set_aside(database, locks)
    print(f"restored {database}")
    if os.path.exists(kept):
        print(f"the old database is now {kept}; delete it when all is well")


def export_pairs(arguments: argparse.Namespace, store: Store) -> None:
    """Print values as lines of JSON, which import stores elsewhere. They have no passwords and no tokens."""
    for name, key, value, *times in store.pairs(arguments.user.id if arguments.user else None):
        times = [t if t is None else f"{datetime.datetime.fromtimestamp(t, datetime.UTC):%FT%T.%fZ}" for t in times]
        members = dict(zip(PAIR_FIELDS, (name, key, value, *times)))
        sys.stdout.buffer.write(json.dumps(members, ensure_ascii=False).encode("utf-8") + b"\n")


def read_export(file: BinaryIO) -> Iterator[UserPair]:
    for number, line in enumerate(iter(functools.partial(file.readline, LINE_BYTES_MAX + 1), b""), 1):
        try:
            if len(line) > LINE_BYTES_MAX:
                raise ValueError(f"a line has at most {LINE_BYTES_MAX} bytes")
            if not line.strip():
                continue
            members = parse_json(line.decode("utf-8-sig"))
            if not isinstance(members, dict) or not set(PAIR_FIELDS[:3]) <= set(members) <= set(PAIR_FIELDS):
                raise ValueError("a line is a JSON object with: " + ", ".join(PAIR_FIELDS))
            name, key, value, updated, expires = (cast(Any, members.get(field)) for field in PAIR_FIELDS)
            if not all(isinstance(text, str) for text in (name, key, value)):
                raise ValueError("user, key and value are strings")
            check_user_name(name)
            updated = time.time() if updated is None else parse_time(updated)
            yield name, require_key(key), check_value(value), updated, None if expires is None else parse_time(expires)
        except (ValueError, HTTPError) as error:  # the messages of decoders may quote a value
            reason = "this is not JSON in UTF-8" if isinstance(error, (json.JSONDecodeError, UnicodeError)) else error
            raise CommandError(f"line {number}: {reason}; nothing was imported") from None


def read_foreign_database(path: str) -> tuple[dict[str, User], Iterable[UserPair], list[str]]:
    uri = f"file:{urllib.parse.quote(os.fsencode(os.path.abspath(path)), safe='')}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as source:
            source.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
            if source.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,):
                raise CommandError(f"{path} is a database of kvserver; see: python3 kvserver.py restore --help")
            user_rows = source.execute("SELECT name, passwordHash, isAdmin FROM user").fetchall()
            pair_rows = source.execute("SELECT user, key, value FROM state ORDER BY rowid DESC").fetchall()
    except sqlite3.Error as error:
        raise CommandError(f"cannot read {path} as a database of IoT Persistence Api: {error}") from None
    users, pairs, left_out, unknown = dict[str, User](), dict[tuple[str, str], UserPair](), list[str](), list[str]()
    for name, stored, is_admin in user_rows:
        try:
            check_user_name(name if isinstance(name, str) else "")
            users[name] = User(0, name, str(stored), is_admin == 1)
            if SCRYPT_HASH.match(str(stored)) or not str(stored).isascii() or not parse_hash(str(stored)):
                unknown.append(name)
        except HTTPError as error:
            left_out.append(f"left out: user {name!r:.80}: {error}; all their values are left out too")
    if unknown:
        problem = f"nothing was imported: the password hash of {', '.join(unknown)} is of an unknown kind"
        raise CommandError(f"{problem}. In IoT Persistence Api, delete these users and add them again, with passwords")
    for name, key, value in pair_rows:
        try:
            if name not in users:
                raise ValueError("this user is not imported")
            if not isinstance(key, str) or not isinstance(value, str):
                raise UnicodeError
            if (name, require_key(key)) in pairs:
                raise ValueError("another row has the same key, and is newer")
            pairs[name, key] = name, key, check_value(value), time.time(), None
        except (ValueError, HTTPError) as error:
            reason = "the key or the value is not UTF-8 text" if isinstance(error, UnicodeError) else error
            left_out.append(f"left out: user {name!r:.80}, key {key!r:.80}: {reason}")
    return users, pairs.values(), left_out


def import_pairs(arguments: argparse.Namespace) -> None:
    """Store an export, or move in from IoT Persistence Api: all or nothing. Values with the same key are replaced."""
    with contextlib.nullcontext(sys.stdin.buffer) if arguments.file == "-" else open(arguments.file, "rb") as file:
        is_database = not file.isatty() and isinstance(file, io.BufferedReader) and file.peek(6)[:6] == b"SQLite"
        users, pairs, bad = read_foreign_database(arguments.file) if is_database else ({}, read_export(file), [])
        with contextlib.closing(open_store(arguments.db, create=is_database)) as store:
            known = [name for name in sorted(users) if store.user(name)]
            if known and not arguments.merge:
                raise CommandError(f"nothing was imported: users exist; --merge only adds values: {', '.join(known)}")
            new = [user for name, user in users.items() if name not in known]
            stored, old = store.import_all(new, pairs)
            print(*bad, f"imported users: {len(new)}, values: {stored}; left out: {len(bad)}, expired: {old}", sep="\n")
            if users and not any(user.is_admin for user, *_ in store.users()):
                print(f"nobody is an admin; add one with: {arguments.program} adduser USER --admin")


# ---- Command line ----------------------------------------------------------------------------------------------------
# Each command is a function whose docstring is its help. COMMANDS lists the commands and their arguments.

SERVICE_LINES = """CapabilityBoundingSet= DevicePolicy=closed LockPersonality=yes MemoryDenyWriteExecute=yes
    NoNewPrivileges=yes PrivateDevices=yes PrivateMounts=yes PrivateTmp=yes PrivateUsers=yes ProcSubset=pid
    ProtectClock=yes ProtectControlGroups=yes ProtectHome=yes ProtectHostname=yes ProtectKernelLogs=yes
    ProtectKernelModules=yes ProtectKernelTunables=yes ProtectProc=invisible ProtectSystem=strict RemoveIPC=yes
    Restart=on-failure RestartSec=5 RestrictNamespaces=yes RestrictRealtime=yes RestrictSUIDSGID=yes
    StateDirectory=kvserver SystemCallArchitectures=native SystemCallErrorNumber=EPERM Type=notify UMask=0077"""


def read_password(arguments: argparse.Namespace) -> str:
    """Return a new password. It is never an argument, because all users of a machine can see those."""
    if arguments.password_stdin:
        password = sys.stdin.buffer.readline(64 * 1024).decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    elif not sys.stdin.isatty():
        raise CommandError("there is no terminal to ask for the password; pipe it in and add --password-stdin")
    else:
        password = getpass.getpass(f"Password for {arguments.name}: ")
    check_password(password)
    if not arguments.password_stdin and getpass.getpass("The same again: ") != password:
        raise CommandError("the passwords differ; nothing was changed")
    return password


def print_rows(arguments: argparse.Namespace, what: str, head: str, rows: Iterable[Sequence[object]]) -> None:
    """Print a table that fits 80 columns, or how to add a row. An empty cell is "-"; a column of these is left out."""
    texts = [["-" if cell in (None, "") else escape_unprintable(str(cell)) for cell in row] for row in rows]
    if not texts:
        print(f"there are no {what.split()[0]}s; add one with: {arguments.program} add{what}")
        return
    columns = [column for column in zip(head.split(","), *texts) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    while sum(widths) + 2 * len(widths) - 2 > 80:
        widths[widths.index(max(widths))] -= 1
    for row in zip(*columns):
        cells = (text if len(text) <= width else text[: width - 1] + "…" for text, width in zip(row, widths))
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


def add_user(arguments: argparse.Namespace) -> None:
    """Add a user. The command asks for the password."""
    check_user_name(arguments.name)
    if os.path.exists(arguments.db):
        with contextlib.closing(open_store(arguments.db)) as store:
            if store.user(arguments.name):  # before somebody types a password
                raise CommandError(f"{arguments.name} exists; set the password with: python3 kvserver.py passwd USER")
    password_hash = hash_password(read_password(arguments))
    with contextlib.closing(open_store(arguments.db)) as store:
        store.add_user(arguments.name, password_hash, arguments.admin)
    print(f"added the {'admin' if arguments.admin else 'user'} {arguments.name}")


def set_password(arguments: argparse.Namespace, store: Store) -> None:
    """Set a user's password. The command asks for it. Tokens keep working."""
    store.set_password_hash(arguments.name, hash_password(read_password(arguments)))
    print(f"set the password of {arguments.name}; tokens keep working")


def delete_user(arguments: argparse.Namespace, store: Store) -> None:
    """Delete a user, with all values and their history, tokens and hooks. The command asks first."""
    name = arguments.name
    ((_, values, _),), tokens, hooks = store.users(name), store.tokens(name), store.hooks(name)
    kind = "last admin" if [user.name for user, *_ in store.users() if user.is_admin] == [name] else "user"
    what = f"the {kind} {name} and all they have (values: {values}, tokens: {len(tokens)}, hooks: {len(hooks)})"
    if not arguments.yes and not sys.stdin.isatty():
        raise CommandError(f"there is no terminal to ask; to delete {what}, add --yes")
    if not arguments.yes and input(f"Delete {what}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was deleted")
    store.transact(lambda store: store.delete_user(name, even_last_admin=arguments.yes))
    print(f"deleted {what}")


def list_users(arguments: argparse.Namespace, store: Store) -> None:
    """List the users, with their roles and numbers of values."""
    rows = ((user.name, "admin" if user.is_admin else "user", pairs) for user, pairs, _ in store.users())
    print_rows(arguments, "user USER", "USER,ROLE,VALUES", rows)


def add_token(arguments: argparse.Namespace, store: Store) -> None:
    """Add a token for a device, and print it once. A device sends it instead of the user's password."""
    check_label_and_prefix(arguments.label, arguments.prefix)
    token = make_token()
    with store.begin():  # commits, or rolls back: a token that cannot be printed is not stored
        store.add_token(arguments.name, hash_token(token), arguments.label, arguments.read_only, arguments.prefix)
        print(token, flush=True)


def list_tokens(arguments: argparse.Namespace, store: Store) -> None:
    """List a user's tokens, with rights and last use. The tokens themselves cannot be shown."""
    tokens = store.tokens(arguments.name)
    rows = ((t.id, t.label, t.rights(), utc_second(t.created)[:10], utc_second(t.last_used)[:10]) for t in tokens)
    print_rows(arguments, f"token {shlex.quote(arguments.name)}", "ID,LABEL,RIGHTS,CREATED,LAST USED", rows)


def delete_token(arguments: argparse.Namespace, store: Store) -> None:
    """Delete a token. The server refuses it from then on."""
    store.delete_token(arguments.name, arguments.id)
    print(f"deleted the token {arguments.id} of {arguments.name}")


def add_hook(arguments: argparse.Namespace, store: Store) -> None:
    """Call a URL when a value changes. The command prints the hook's ID. The next change is the first one sent.
    URL, headers and body may contain {key}, {value}, {old} (the value before) and {time}."""
    require_key(arguments.key.removesuffix("*") or arguments.key)
    check_value(arguments.value or "")
    check_label_and_prefix(arguments.label, "")
    method, body = arguments.method, arguments.body
    if arguments.url == body == "-":
        raise UsageError("the URL and the body cannot both be -; read the body from a file with --body @FILE")
    url = read_text("URL", "-").strip() if arguments.url == "-" else arguments.url
    if body == "-" or (body or "").startswith("@"):
        body = read_text("body", body.removeprefix("@"))
    origin, lines = check_hook(url, method, arguments.header, body)
    row = arguments.key, arguments.value, arguments.label, origin, url, method, lines, body
    print(store.transact(lambda store: store.add_hook(arguments.name, *row)))


def list_hooks(arguments: argparse.Namespace, store: Store) -> None:
    """List the hooks, with their pending deliveries and last results. Only scheme, host and port of URLs are shown."""
    rows = ((*h[:6], h.pending or None, utc_second(h.result_time), h.result) for h in store.hooks(arguments.name))
    print_rows(arguments, "hook USER KEY URL", "ID,USER,KEY,VALUE,LABEL,URL,PENDING,LAST TRY,RESULT", rows)


def delete_hook(arguments: argparse.Namespace, store: Store) -> None:
    """Delete a hook, with its pending deliveries."""
    store.transact(lambda store: store.delete_hook(arguments.id))
    print(f"deleted the hook {arguments.id}")


def test_hook(arguments: argparse.Namespace, store: Store) -> None:
    """Send a test to a hook's URL now, and print the response's status. The command fails unless that is 2xx."""
    answer = deliver(store.test_delivery(arguments.id))
    print(answer.text)
    if not 200 <= answer.status < 300:
        raise CommandError(f"the test of hook {arguments.id} failed; check the URL and the program there")


def require_pair(arguments: argparse.Namespace, store: Store) -> Pair:
    pair = store.pair(arguments.user.id, arguments.key)
    if not pair:
        raise CommandError(f"{arguments.name} has no key {arguments.key}; list all with: python3 kvserver.py list USER")
    return pair


def print_value(arguments: argparse.Namespace, store: Store) -> None:
    """Print a user's value, and a newline."""
    sys.stdout.buffer.write(require_pair(arguments, store).value + b"\n")


def store_value(arguments: argparse.Namespace, store: Store) -> None:
    """Store a value under a key of a user. Hooks and waiting requests notice the change."""
    key = require_key(arguments.key)
    value = check_value(read_text("value", "-") if arguments.value == "-" else arguments.value)
    store.transact(lambda store: store.set_value(arguments.user.id, key, value, ttl=arguments.ttl or 0))
    print("stored the key", escape_unprintable(key), "of", arguments.name)


def delete_value(arguments: argparse.Namespace, store: Store) -> None:
    """Delete a key of a user, with its value. Hooks and waiting requests notice that."""
    require_pair(arguments, store)
    store.transact(lambda store: store.delete_pair(arguments.user.id, arguments.key))
    print("deleted the key", escape_unprintable(arguments.key), "of", arguments.name)


def print_values(arguments: argparse.Namespace, store: Store) -> None:
    """List a user's keys and values, a line each, with a tab between. Control characters are escaped."""
    for _, key, value, *_ in store.pairs(arguments.user.id, arguments.prefix):
        print(escape_unprintable(key), escape_unprintable(value), sep="\t")
    if not store.pairs(arguments.user.id, arguments.prefix).fetchone():
        print(f"{arguments.name} has no {'such keys' if arguments.prefix else 'values'}", file=sys.stderr)


def announce(server: Server, store: Store, program: str) -> None:
    """Print where the server listens, and tell systemd. If there are no users, add admin and print the password."""
    name, port, address = server.server_name, server.server_port, parse_address(server.server_name)
    if not server.certificate and not (address and address.is_loopback):
        log("WARNING", "plain HTTP sends passwords openly; see --tls-cert")
    server.outbox.take_lock()  # if another server has it, this logs a warning
    log("INFO", f"started: database={store.path}")
    hosts = [name, name, name]  # to listen on, to try from here, and to open from other machines
    if address and address.is_unspecified:
        hosts = [name, "127.0.0.1", socket.gethostname().partition(".")[0] + ".local"]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing, but the system chooses an interface
            hosts.append(probe.getsockname()[0])
    scheme, curl = ("https", "curl -k") if server.certificate else ("http", "curl")  # few certificates name an address
    listening, here, *elsewhere = (f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host in hosts)
    users, password = store.users(limit=1), make_token()[-20:]
    print("open in a browser:", " or ".join(url + "/" for url in elsewhere))
    if users:
        print(f"to set a new password: {program} passwd {shlex.quote(users[0][0].name)}")
    else:  # in a transaction: a password that cannot be printed is not stored
        with contextlib.suppress(Conflict), store.begin():  # another process was quicker
            store.add_user("admin", hash_password(password), is_admin=True)
            print(f"user: admin, password: {password} (shown only now)")
            print(f'{curl} -u admin:{password} "{here}/set?key=door&value=open"', flush=True)
    print(f"listening on {listening}", flush=True)
    try:
        if os.environ.get("NOTIFY_SOCKET"):  # sd_notify(3)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
                notify_socket.sendto(b"READY=1", re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"]))
    except OSError as error:
        log("ERROR", f"cannot tell systemd that the server is ready: {error.strerror}")


def serve(arguments: argparse.Namespace) -> None:
    """Run the server until Ctrl-C or SIGTERM. The first start adds the user admin, and prints the password once."""
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise UsageError("--tls-cert and --tls-key go together: the certificate and its private key")
    certificate = Certificate(arguments.tls_cert, arguments.tls_key) if arguments.tls_cert else None
    threading.stack_size(512 * 1024)  # the usual 8 MiB per thread are a lot for a small machine
    with contextlib.closing(open_store(arguments.db)) as store:
        try:
            server = Server(store.path, vars(arguments), certificate)
        except (OSError, UnicodeError) as error:
            hints = {errno.EADDRINUSE: "is kvserver running already? "}
            hints[errno.EACCES] = "a port below 1024 needs rights, which python3 kvserver.py unit gives; "
            where = f"{arguments.host or 'all interfaces'}, port {arguments.port}"
            reason, hint = getattr(error, "strerror", error), hints.get(getattr(error, "errno", 0), "")
            raise CommandError(f"cannot listen on {where}: {reason}; {hint}see --host and --port") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        if hasattr(signal, "SIGHUP"):  # closing the terminal sends it too, and must not stop the server
            signal.signal(signal.SIGHUP, lambda *_: certificate.renew() if certificate else None)
        rows_max, before = arguments.history, store.history_rows_max()
        if rows_max != before:
            store.transact(lambda store: store.keep_history(rows_max))
        if rows_max < before:
            log("WARNING", f"the history keeps {rows_max} changes of a value now, not {before}; see --history")
        announce(server, store, arguments.program)
        gc.freeze()  # modules and classes stay: looking at them again and again would take a quarter of the time
        gc.set_threshold(20_000, 20, 100)
        finished = server.run()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second signal must not change the exit code
        log("INFO", "stopped")
        if not finished:
            os._exit(0)  # a commit hangs on its disk; it has no response yet, so no promise is broken


def quote_for_systemd(text: str) -> str:
    return (text if shlex.quote(text) == text else json.dumps(text, ensure_ascii=False)).replace("%", "%%")


def owner_of(path: str) -> int:
    return os.stat(path).st_uid if os.path.exists(path) else 0


def print_unit(arguments: argparse.Namespace) -> None:
    """Print a systemd unit for serve with these flags, and how to install it. The command ignores the environment."""
    arguments.words.remove("unit")
    words = [part for word in arguments.words for part in word.split("=", maxsplit=word.startswith("--"))]
    of_files = ("--config", "--db", "--tls-cert", "--tls-key")
    flags = [os.path.abspath(word) if flag in of_files and word else word for flag, word in zip(["", *words], words)]
    start, database = [sys.executable, os.path.abspath(__file__)], os.path.abspath(arguments.db)
    if database == DEFAULT_DATABASE and "--db" not in flags:
        database = "/var/lib/kvserver/kvserver.db"
    folder, is_elsewhere = os.path.dirname(database), not database.startswith("/var/lib/kvserver/")
    at_home = list(filter(re.compile("/(home|root)/").match, (*start, os.path.realpath(start[0]), *flags, database)))
    # A dynamic user cannot write to other folders, nor enter a closed home: there the owner runs the service.
    uid = owner_of("/".join(at_home[0].split("/")[:3])) if at_home else owner_of(folder) if is_elsewhere else 0
    user = [f"User={uid or 'kvserver'}", f"DynamicUser={'no' if uid or is_elsewhere else 'yes'}"]
    lines, notes, options = [*user, *SERVICE_LINES.split()], "", f"-p {' -p '.join(user)} -p StateDirectory=kvserver"
    if is_elsewhere:
        lines.append(f"ReadWritePaths={quote_for_systemd(folder)}")
        if not uid or owner_of(folder) != uid:  # a command would be dangerous for a folder such as /etc
            whose = f"user {uid}" if uid else "user kvserver (sudo useradd --system kvserver)"
            notes += f"# First, let {whose} own {folder} and its files: a folder for this database alone\n"
    if at_home:
        lines.remove("ProtectHome=yes")
        notes += f"# ProtectHome= is left out, for {at_home[0]}; if the service cannot read that, move it to /opt\n"
    if 0 < arguments.port < 1024:
        lines.remove("PrivateUsers=yes")  # among these, the capability would be in vain
        lines += ["AmbientCapabilities=CAP_NET_BIND_SERVICE", "CapabilityBoundingSet=CAP_NET_BIND_SERVICE"]
    print(f"""{notes}# To install this service with USER as an admin, type:
#     {shlex.join([*start, "unit", *flags])} | sudo tee /etc/systemd/system/kvserver.service >/dev/null
#     sudo systemctl daemon-reload
#     sudo systemd-run -qt {options} {shlex.join([*start, "adduser", "USER", "--admin", "--db", database])}
#     sudo systemctl enable --now kvserver

[Unit]
Description=kvserver, a key-value store over HTTP
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target

[Service]
ExecStart={" ".join(map(quote_for_systemd, [*start, "serve", *flags])).replace("$", "$$")}
ExecReload=/bin/kill -HUP $MAINPID
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources""")
    print(*lines, "", "[Install]", "WantedBy=multi-user.target", sep="\n")


MORE_HELP = """COMMAND --help explains a command. All but serve and restore also work while the server runs. The flags
of serve override the environment (KVSERVER_MAX_DB_MB), which overrides the JSON file that --config or KVSERVER_CONFIG
names ("max_db_mb"). Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "USER": {"dest": "name", "metavar": "USER", "help": "a name of 1 to 64 printable ASCII characters without a colon"},
    "[USER]": {"dest": "name", "metavar": "USER", "nargs": "?", "help": "only this user (default: all users)"},
    "ID": {"dest": "id", "metavar": "ID", "type": parse_positive, "help": "the first column of tokens or hooks"},
    "KEY": {"dest": "key", "metavar": "KEY", "help": f"1 to {KEY_BYTES_MAX} bytes of UTF-8"},
    "VALUE": {"dest": "value", "metavar": "VALUE", "help": "- reads standard input; write -- before one like -x"},
    "[PREFIX]": {"dest": "prefix", "metavar": "PREFIX", "nargs": "?", "default": "", "help": "only keys that begin so"},
    "PATTERN": {"dest": "key", "metavar": "KEY", "help": "a key, or 'PREFIX*' for keys that begin so, or '*' for all"},
    "URL": {"dest": "url", "metavar": "URL", "help": "http://... or https://...; - reads it from standard input"},
    "BACKUP": {"dest": "file", "metavar": "FILE", "help": "a backup, which only its owner can read"},
    "EXPORT": {"dest": "file", "metavar": "FILE", "help": "an export (- for standard input), or an old database.db"},
    "--admin": {"action": "store_true", "help": "make the user an admin, who manages users and hooks"},
    "--body": {"metavar": "TEXT", "help": "send this instead of JSON; - reads standard input, @FILE a file"},
    "--config": {"metavar": "FILE", "help": 'JSON file with settings, such as {"max_db_mb": 99}'},
    "--force": {"action": "store_true", "help": "overwrite the file if it exists"},
    "--header": {"metavar": "'NAME: TEXT'", "action": "append", "default": [], "help": "add a header; repeatable"},
    "--label": {"metavar": "TEXT", "default": "", "help": "what the token or hook is for"},
    "--merge": {"action": "store_true", "help": "add values to users that exist here; they keep password and role"},
    "--method": {"choices": (*HOOK_BODY_METHODS, "GET", "DELETE"), "default": "POST", "help": "default: POST"},
    "--password-stdin": {"action": "store_true", "help": "read the password from standard input, one line"},
    "--prefix": {"metavar": "P", "default": "", "help": "the token sees only keys that begin with P"},
    "--read-only": {"action": "store_true", "help": "the token cannot change anything"},
    "--ttl": {"metavar": "S", "type": functools.partial(parse_number, 1, TTL_SECONDS_MAX), "help": "seconds to live"},
    "--value": {"metavar": "V", "help": "call the URL only when the value becomes V"},
    "--yes": {"action": "store_true", "help": "do not ask, and delete even the last admin"},
}
COMMANDS: tuple[tuple[Any, ...], ...] = (
    ("serve", serve, "--config"),
    ("unit", print_unit, "--config"),
    ("get", print_value, "USER", "KEY"),
    ("set", store_value, "USER", "KEY", "VALUE", "--ttl"),
    ("del", delete_value, "USER", "KEY"),
    ("list", print_values, "USER", "[PREFIX]"),
    ("adduser", add_user, "USER", "--admin", "--password-stdin"),
    ("passwd", set_password, "USER", "--password-stdin"),
    ("deluser", delete_user, "USER", "--yes"),
    ("users", list_users),
    ("addtoken", add_token, "USER", "--label", "--read-only", "--prefix"),
    ("tokens", list_tokens, "USER"),
    ("deltoken", delete_token, "USER", "ID"),
    ("addhook", add_hook, "USER", "PATTERN", "URL", "--value", "--label", "--method", "--header", "--body"),
    ("hooks", list_hooks, "[USER]"),
    ("delhook", delete_hook, "ID"),
    ("testhook", test_hook, "ID"),
    ("backup", back_up, "BACKUP", "--force"),
    ("restore", restore, "BACKUP"),
    ("export", export_pairs, "[USER]"),
    ("import", import_pairs, "EXPORT", "--merge"),
)


def build_parser(program: str, only: str = "") -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and those of all commands, or of only one: a start doesn't wait for the others."""
    description = "A server that keeps values for devices and scripts, over HTTP. To begin: %(prog)s serve"
    parser = argparse.ArgumentParser(program, description=description, epilog=MORE_HELP, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kvserver {__version__}")
    parser.add_argument("--db", metavar="FILE", default=argparse.SUPPRESS, help=SETTINGS["db"].help)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, run, *its_arguments in [row for row in COMMANDS if row[0] == only] or COMMANDS:
        text = run.__doc__ or ""
        command = commands.add_parser(name, help=text.partition(".")[0], description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        for argument in its_arguments:
            command.add_argument(*([argument] if argument.startswith("--") else []), **ARGUMENTS[argument])
        for flag, setting in SETTINGS.items() if run in (serve, print_unit) else [("db", SETTINGS["db"])]:
            options: dict[str, Any] = {"type": setting.parse, "metavar": setting.metavar} if setting.metavar else {}
            options |= {"action": setting.action, "help": setting.help.format(setting.default)}
            command.add_argument("--" + flag.replace("_", "-"), default=argparse.SUPPRESS, **options)
    return parser, commands.choices


def parse_arguments(argv: Sequence[str], arguments: argparse.Namespace) -> None:
    """Add the parsed arguments to a namespace. Wrong usage exits with 2, and names a likely command or flag."""
    words = list(itertools.takewhile("--".__ne__, argv))
    begin = 2 if words[:1] == ["--db"] else 1 if "".join(words[:1]).startswith("--db=") else 0
    name = "".join(words[begin : begin + 1])
    parser, commands = build_parser(" ".join([arguments.program, *map(shlex.quote, words[:begin])]), name)
    level, kind = commands.get(name, parser), "flag"
    given = [flag[0] for flag in map(re.compile("--?[A-Za-z][A-Za-z0-9_-]*(?==|$)").match, words[begin:]) if flag]
    known = ["--help", *re.findall("--?[a-z][a-z-]*", level.format_usage())]
    if level is parser and name and not name.startswith("-"):
        kind, given, known = "command", [name], list(commands)
    for wrong in [each for each in given if each not in known][:1]:
        import difflib

        likely = [*(word for word in known if word.startswith(wrong)), *difflib.get_close_matches(wrong.lower(), known)]
        hint = f"did you mean {level.prog} {likely[0]}?" if likely else f"list all with: {level.prog} --help"
        raise UsageError(f"there is no {kind} {cut_off(wrong, 40)}; {hint}")
    if parser.parse_known_args(argv, arguments)[1]:
        level.error("too many arguments; one that contains spaces or * needs quotes")
    if level is parser:
        parser.exit(2, f"{parser.format_help()}\nTo begin: {parser.prog} serve\n")


def run_command(arguments: argparse.Namespace) -> None:
    flags = vars(arguments)
    flags.update({**read_settings(flags.get("config"), {} if arguments.run is print_unit else os.environ), **flags})
    if os.environ.get("STATE_DIRECTORY") or arguments.db != os.environ.get("KVSERVER_DB", DEFAULT_DATABASE):
        arguments.program += f" --db {shlex.quote(arguments.db)}"  # a shell may not find this database by itself
    if arguments.run in (serve, print_unit, add_user, back_up, restore, import_pairs):
        arguments.run(arguments)
        return
    with contextlib.closing(open_store(arguments.db, create=False)) as store:
        arguments.user = store.user(flags.get("name") or "")
        if flags.get("name") is not None and not arguments.user:
            raise NoSuchUser(arguments.name)
        arguments.run(arguments, store)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    program, code, line_end = "python3 kvserver.py", 1, ""
    if argv is None:
        argv, program = sys.argv[1:], shlex.join(sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1])
    arguments = argparse.Namespace(program=program, words=list(argv))
    try:
        if not sys.stdin or not isinstance(sys.stdout, io.TextIOWrapper):
            raise CommandError("standard input or output is closed; use /dev/null instead")
        sys.stdout.reconfigure(errors="backslashreplace")  # a label or a path may not be in its encoding
        try:
            parse_arguments(argv, arguments)
            run_command(arguments)
        finally:
            try:
                sys.stdout.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
                raise
        return 0
    except (CommandError, StoreError, HTTPError) as error:
        message, code = str(error), 2 if isinstance(error, UsageError) else 1
    except UnicodeError:
        message = "an argument or the input is not UTF-8 text"
    except OSError as error:
        message = f"{error.filename or 'standard input or output'}: {error.strerror}"
    except sqlite3.Error as error:
        message = f"the database failed: {error}"
    except (KeyboardInterrupt, EOFError) as error:
        message, code = "interrupted; nothing was changed", 130 if isinstance(error, KeyboardInterrupt) else 1
        line_end = "\n" if sys.stdin.isatty() else ""  # after a prompt
    message = re.sub(r"(?<!\S)python3 kvserver\.py", lambda _: arguments.program, message)
    print(f"{line_end}kvserver: {escape_unprintable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
