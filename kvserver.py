#!/usr/bin/env python3
"""kvserver keeps state for things that cannot keep it themselves, in one file with no dependencies.

Applets, home automations, shortcuts, chips and shell scripts store a value under a key with one web request and read it
back with another. Every user has keys of their own, every request carries HTTP Basic credentials, and a write is
answered only after it is on the disk.

    python kvserver.py serve             run the server; the first start creates the user admin and prints its password
    python kvserver.py adduser NAME      add a user            passwd NAME     set a user's password
    python kvserver.py users             list the users        deluser NAME    delete a user and all they stored

    request                      answer
    GET /set?key=K&value=V       200 Success
    GET /get?key=K               200 and the value as text, byte for byte; 404 when the key is unknown
    GET /del?key=K               200 Successfully removed state; 404 when the key is unknown
    GET /list                    200 and a JSON object of all keys and values
    GET /health                  200 ok, without a login; 503 when the database cannot be read

/set and /del take POST and PUT too; /get, /list and /health take HEAD. Parameters may stand in the query, in a form or
in a JSON object; the body of /set?key=K may be the value itself. All paths also exist below /iotpersistenceapi, or the
prefix that --base-path names. An error is one line of text that says what to do.

The file is built from the ground up, each section using only what stands above it: Limits and defaults, Names and
passwords, Storage, HTTP messages, Parameters, Authentication, API, Server, Settings, Command line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import email.utils
import getpass
import hashlib
import hmac
import http.server
import io
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import shlex
import signal
import socket
import socketserver
import sqlite3
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

__version__ = "0.1.0"
LOG = logging.getLogger("kvserver")

# ---- Limits and defaults ---------------------------------------------------------------------------------------------
# Every number that somebody may want to turn stands here, its unit last in its name. What a client controls has a
# bound, so that no client can make the server wait for ever or fill a small machine's memory.

KEY_BYTES_MAX = 512
VALUE_BYTES_MAX = 1024 * 1024
PARAMETERS_MAX = 100
JSON_DIGITS_MAX = 4300  # of an integer; newer Pythons have this bound, older ones take 20 s for a million digits
JSON_DEPTH_MAX = 100  # CPython 3.13 itself follows nesting until a small thread stack overflows, and the process dies

REQUEST_LINE_BYTES_MAX = 16 * 1024
HEADER_LINE_BYTES_MAX = 8 * 1024
HEADERS_BYTES_MAX = 32 * 1024
HEADER_FIELDS_MAX = 100
BODY_BYTES_MAX = VALUE_BYTES_MAX + 64 * 1024  # the longest value, and room for the form or the JSON around it

PASSWORD_CHARACTERS_MIN = 8
PASSWORD_BYTES_MAX = 4096  # in base64, together with a name, it has to fit on one header line
FIRST_PASSWORD_BYTES = 15  # random bytes in the password that the first start makes: 120 bits, 20 characters

# n=2^14, r=8, p=5 is one of the scrypt settings that OWASP's password storage cheat sheet calls equally strong: the one
# with the least memory (16 MiB) but one, which suits a small machine.
SCRYPT_COST_LOG2 = 14
SCRYPT_BLOCK_SIZE = 8
SCRYPT_PARALLELISM = 5
SCRYPT_MEMORY_BYTES_MAX = 64 * 1024 * 1024
SALT_BYTES = 16
DIGEST_BYTES = 32
CREDENTIALS_MAX = 1024  # verified credentials that are remembered

CONNECTIONS_MAX = 256  # connections served at the same time, each by a thread; more wait for their turn
LISTEN_BACKLOG = 128
THREAD_STACK_BYTES = 512 * 1024  # the usual 8 MiB times the connections would fill a 32-bit address space
FIRST_BYTE_SECONDS = 10
REQUEST_SECONDS = 10
IDLE_SECONDS = 30
SEND_SECONDS = 10  # for each SEND_BYTES of an answer
SEND_BYTES = 64 * 1024
LINGER_SECONDS = 2
DATABASE_LOCK_SECONDS = 5
RETRY_AFTER_SECONDS = 5
POLL_SECONDS = 0.25  # how often the server looks for connections that are overdue, and whether it has to stop
STOP_REQUEST_SECONDS = 3  # a request that is still incomplete this long after the stop is dropped
STOP_SECONDS = 4  # then all connections are closed
EXIT_SECONDS = 4.5  # then the process ends, whatever it is doing

DEFAULT_PORT = 8080
DEFAULT_BASE_PATH = "/iotpersistenceapi"
DEFAULT_DATABASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kvserver.db")


# ---- Names and passwords ---------------------------------------------------------------------------------------------
# What a user name and a password may be, and how a password is stored: as a string that says itself how it was made, so
# that the parameters above can change without a stored password becoming void.

USER_NAME = re.compile(r"[ -9;-~]{1,64}")
PASSWORD_TOO_LONG = f"a password has at most {PASSWORD_BYTES_MAX} bytes in UTF-8"
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
SCRYPT_HASH = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")


class BadCredential(ValueError):
    """This cannot be a user's name or password; the message says what can."""


def check_user_name(name: str) -> None:
    """Raise BadCredential unless name can be a user's: HTTP Basic ends it at the first colon (RFC 7617 section 2)."""
    if not USER_NAME.fullmatch(name):
        raise BadCredential("a user name is 1 to 64 printable ASCII characters, without a colon")


def check_password(password: str) -> None:
    """Raise BadCredential unless password can be a user's."""
    if len(password) < PASSWORD_CHARACTERS_MIN:
        raise BadCredential(f"a password has at least {PASSWORD_CHARACTERS_MIN} characters")
    if len(password.encode("utf-8")) > PASSWORD_BYTES_MAX:
        raise BadCredential(PASSWORD_TOO_LONG)
    if CONTROL_CHARACTER.search(password):
        raise BadCredential("a password has no control characters")


def scrypt(password: str, salt: bytes, cost_log2: int, block_size: int, parallelism: int) -> bytes:
    """Return the scrypt digest (RFC 7914) of the password's UTF-8 bytes; this takes a good part of a second."""
    cost, memory = 1 << cost_log2, SCRYPT_MEMORY_BYTES_MAX
    secret = password.encode("utf-8")
    return hashlib.scrypt(secret, salt=salt, n=cost, r=block_size, p=parallelism, maxmem=memory, dklen=DIGEST_BYTES)


def hash_parameters() -> str:
    """Return how a stored hash that is made now begins."""
    return f"$scrypt$ln={SCRYPT_COST_LOG2},r={SCRYPT_BLOCK_SIZE},p={SCRYPT_PARALLELISM}$"


def format_hash(salt: bytes, digest: bytes) -> str:
    """Return salt and digest as the string to store, in PHC format: base64 without padding."""
    return hash_parameters() + "$".join(base64.b64encode(part).decode().rstrip("=") for part in (salt, digest))


def hash_password(password: str) -> str:
    """Return the string to store for a password: scrypt with a random salt."""
    salt = secrets.token_bytes(SALT_BYTES)
    return format_hash(salt, scrypt(password, salt, SCRYPT_COST_LOG2, SCRYPT_BLOCK_SIZE, SCRYPT_PARALLELISM))


def verify_password(password: str, stored: str) -> bool:
    """Tell whether the stored hash was made from password; a hash of unknown form was made from none."""
    match = SCRYPT_HASH.fullmatch(stored)
    if match is None:
        return False
    try:
        salt, digest = (base64.b64decode(text + "=" * (-len(text) % 4)) for text in match.group(4, 5))
        return hmac.compare_digest(digest, scrypt(password, salt, int(match[1]), int(match[2]), int(match[3])))
    except (ValueError, OverflowError, TypeError):  # parameters that scrypt does not take
        return False


# ---- Storage ---------------------------------------------------------------------------------------------------------
# The database: its schema, its statements, and one class that runs them. A method that changes something returns after
# its commit is on the disk. Nothing here knows of HTTP.

# One entry a schema version: the statements that lead to it from the version before. PRAGMA user_version holds a file's
# version. What has been released is never edited; a change of the schema is a further entry.
# A user's id is never given out again (AUTOINCREMENT): a request still under way while its user is deleted must not
# write into the account of the next user. Without a rowid, a pair is found in one search instead of two.
MIGRATIONS = (
    (
        """CREATE TABLE user (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL UNIQUE,
            password_hash TEXT NOT NULL,
            is_admin INTEGER NOT NULL)""",
        """CREATE TABLE pair (
            user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE,
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            updated REAL NOT NULL, -- unix seconds
            PRIMARY KEY (user_id, key)) WITHOUT ROWID""",
    ),
)
APPLICATION_ID = 0x6B767372  # "kvsr" in PRAGMA application_id tells our files from those of other programs

# Every connection runs these first. WAL mode is a property of the file instead.
PRAGMAS = (
    "PRAGMA synchronous = FULL",  # in WAL mode only FULL syncs at each commit: an answered write survives a power cut
    "PRAGMA fullfsync = ON",  # on macOS fsync alone leaves data in the drive's cache; elsewhere this does nothing
    "PRAGMA foreign_keys = ON",  # off by default; without it a deleted user's pairs would stay
)

SELECT_USER = "SELECT id, name, password_hash, is_admin FROM user WHERE name = ?"
SELECT_USERS = "SELECT name, is_admin, (SELECT count(*) FROM pair WHERE user_id = user.id) FROM user ORDER BY name"
INSERT_USER = "INSERT INTO user (name, password_hash, is_admin) VALUES (?, ?, ?)"
INSERT_FIRST_ADMIN = (
    "INSERT INTO user (name, password_hash, is_admin) SELECT ?, ?, 1 WHERE NOT EXISTS (SELECT 1 FROM user)"
)
UPDATE_PASSWORD = "UPDATE user SET password_hash = ? WHERE name = ?"
RENEW_PASSWORD_HASH = "UPDATE user SET password_hash = ? WHERE name = ? AND password_hash = ?"
DELETE_USER = (
    "DELETE FROM user WHERE name = ?"
    " AND (? OR NOT is_admin OR EXISTS (SELECT 1 FROM user WHERE is_admin AND name <> ?))"
)

# The cast hands over the UTF-8 bytes that are on the disk: they are what is sent, so that nothing need be decoded.
SELECT_VALUE = "SELECT CAST(value AS BLOB) FROM pair WHERE user_id = ? AND key = ?"
SELECT_PAIRS = "SELECT key, value FROM pair WHERE user_id = ? ORDER BY key"
UPSERT_PAIR = (
    "INSERT INTO pair (user_id, key, value, updated) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, updated = excluded.updated"
)
DELETE_PAIR = "DELETE FROM pair WHERE user_id = ? AND key = ?"
SELECT_ANY_ROWS = "SELECT (SELECT id FROM user LIMIT 1), (SELECT key FROM pair LIMIT 1)"

Result = TypeVar("Result")


class User(NamedTuple):
    """A user's row; password_hash is what hash_password returned."""

    id: int
    name: str
    password_hash: str
    is_admin: bool


NOBODY = User(0, "", "", False)  # SQLite's ids begin with 1


class UserSummary(NamedTuple):
    """What the list of users shows of one; pairs is how many they have."""

    name: str
    is_admin: bool
    pairs: int


class StoreError(Exception):
    """The database refuses or cannot be used; the message is a sentence for people."""


class StoreBusy(StoreError):
    """A write had to wait too long for a lock."""


class NoSuchUser(StoreError):
    """There is no user of that name, or no longer."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no user {name}; add one with: python kvserver.py adduser NAME")


class UserExists(StoreError):
    """There is a user of that name already."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the user {name} exists; set a password with: python kvserver.py passwd NAME")


class LastAdmin(StoreError):
    """The user is the only admin, and without one nobody could administer."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is the last admin; to delete it all the same, add --yes")


class Store:
    """The users and their pairs, in an SQLite file.

    One connection reads and one writes, each behind a lock: opening one for a request costs more than the request, and
    in WAL mode a reader never waits for a commit. All methods may be called from any thread. What changes something
    raises StoreBusy when the database stays locked; any method may raise sqlite3.Error when the disk fails.
    """

    def __init__(self, path: str, create: bool = True) -> None:
        """Open the file at path; raise StoreError when that is not possible, or there is none and create is false."""
        # SQLite has special names like ":memory:", but no absolute path is one of them.
        self.path = os.path.abspath(path)
        self._closing = False
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        try:
            if create:
                # Readable by the owner only; SQLite gives the files that it puts beside it the same permissions.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            elif not os.path.exists(self.path):
                raise StoreError(
                    f"there is no database {self.path}; name it with --db, or make one with adduser or serve"
                )
            self._writer = self._connect(0.1)  # the rest of the waiting is up to _execute
            self._transact(self._migrate)
            give_up = time.monotonic() + DATABASE_LOCK_SECONDS
            if self._execute("PRAGMA journal_mode = WAL", give_up).fetchone() != ("wal",):
                raise StoreError(f"cannot use the database {self.path}: SQLite's WAL mode does not work on its disk")
            self._reader = self._connect(DATABASE_LOCK_SECONDS)
        except (OSError, ValueError, sqlite3.Error) as error:  # ValueError is for a path with NUL
            reason = error.strerror if isinstance(error, OSError) else error
            raise StoreError(f"cannot use the database {self.path}: {reason}") from error

    def _connect(self, lock_seconds: float) -> sqlite3.Connection:
        """Open a connection that leaves transactions to us and waits that long for other processes' locks."""
        # rw without c: SQLite must not create what is missing.
        uri = f"file://{urllib.parse.quote(os.fsencode(self.path))}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, timeout=lock_seconds, isolation_level=None, check_same_thread=False)
        try:
            for pragma in PRAGMAS:
                connection.execute(pragma)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        """Bring the file to the newest schema; raise StoreError when it is not ours, or newer than this program."""
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        is_new = version == 0 and not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        if not is_new and connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise StoreError(f"{self.path} is a database of another program; name another file with --db")
        if version > len(MIGRATIONS):
            known = f"it has schema version {version}, this program knows up to {len(MIGRATIONS)}"
            raise StoreError(f"{self.path} was written by a newer kvserver.py ({known}); use that")
        for statement in (statement for migration in MIGRATIONS[version:] for statement in migration):
            connection.execute(statement)
        if version < len(MIGRATIONS):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _execute(self, statement: str, give_up: float) -> sqlite3.Cursor:
        """Run a statement that needs a lock; raise StoreBusy when others have it until give_up, in monotonic seconds.

        SQLite's own waiting does not do: it cannot be told to stop, and it leaves out the change to WAL mode.
        """
        while True:
            try:
                return self._writer.execute(statement)
            except sqlite3.OperationalError as error:
                # Error codes came with Python 3.11, so the text has to tell.
                if not str(error).startswith("database is locked"):
                    raise
                if self._closing or time.monotonic() > give_up:
                    raise StoreBusy("another process keeps the database locked") from error

    def _transact(self, operation: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run operation in a write transaction and return its result once the commit is on the disk.

        Whatever goes wrong undoes the whole transaction and is raised.
        """
        give_up = time.monotonic() + DATABASE_LOCK_SECONDS
        if not self._write_lock.acquire(timeout=DATABASE_LOCK_SECONDS):
            raise StoreBusy("other writes take too long")
        try:
            if self._closing:
                raise StoreBusy("the server is stopping")
            if self._writer.in_transaction:  # a disk that failed may have refused the last ROLLBACK
                self._writer.execute("ROLLBACK")
            # IMMEDIATE takes the write lock now: a transaction that begins by reading may be refused it later.
            self._execute("BEGIN IMMEDIATE", give_up)
            try:
                result = operation(self._writer)
                self._execute("COMMIT", give_up)
                return result
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
        finally:
            self._write_lock.release()

    def _change(self, statement: str, *parameters: Any) -> int:
        """Run one statement in a transaction of its own and return how many rows it changed."""
        return self._transact(lambda connection: connection.execute(statement, parameters).rowcount)

    def _read(self, statement: str, *parameters: Any) -> list[Any]:
        """Return all rows that a statement selects."""
        with self._read_lock:
            return self._reader.execute(statement, parameters).fetchall()

    def give_up_waiting(self) -> None:
        """From now on refuse writes that would have to wait for a lock."""
        self._closing = True

    def close(self) -> None:
        """Close the database; what is under way is finished first."""
        self.give_up_waiting()
        with self._read_lock, self._write_lock:
            self._reader.close()
            self._writer.close()

    def check(self) -> None:
        """Read a row of each table; raise sqlite3.Error when that fails.

        It does so through a new connection, because those that are open answer from their memory even after the file
        has become unreadable.
        """
        with contextlib.closing(self._connect(DATABASE_LOCK_SECONDS)) as connection:
            connection.execute(SELECT_ANY_ROWS).fetchone()

    def user(self, name: str) -> User | None:
        """Return the user of that name, if there is one."""
        rows = self._read(SELECT_USER, name)
        return User(*rows[0]) if rows else None

    def users(self) -> list[UserSummary]:
        """Return all users, sorted by name."""
        return [UserSummary(*row) for row in self._read(SELECT_USERS)]

    def add_user(self, name: str, password_hash: str, is_admin: bool) -> None:
        """Add a user; raise UserExists when the name is taken."""
        try:
            self._change(INSERT_USER, name, password_hash, is_admin)
        except sqlite3.IntegrityError:
            raise UserExists(name) from None

    def add_first_admin(self, name: str, password_hash: str) -> bool:
        """Add an admin if there is no user at all; tell whether that was so."""
        return self._change(INSERT_FIRST_ADMIN, name, password_hash) == 1

    def set_password_hash(self, name: str, password_hash: str) -> None:
        """Replace what is stored of a user's password; raise NoSuchUser."""
        if not self._change(UPDATE_PASSWORD, password_hash, name):
            raise NoSuchUser(name)

    def renew_password_hash(self, user: User, password_hash: str) -> None:
        """Replace the hash of the same password, unless the password has been changed meanwhile."""
        self._change(RENEW_PASSWORD_HASH, password_hash, user.name, user.password_hash)

    def delete_user(self, name: str, even_last_admin: bool) -> None:
        """Delete a user and all they stored; raise NoSuchUser, or LastAdmin unless that is wanted."""
        if not self._change(DELETE_USER, name, even_last_admin, name):
            raise LastAdmin(name) if self.user(name) else NoSuchUser(name)

    def value(self, user_id: int, key: str) -> bytes | None:
        """Return a value as UTF-8 bytes, or None when the user has no such key."""
        rows = self._read(SELECT_VALUE, user_id, key)
        return rows[0][0] if rows else None

    def pairs(self, user_id: int) -> dict[str, str]:
        """Return all of a user's keys and values, sorted by the UTF-8 bytes of the keys."""
        return dict(self._read(SELECT_PAIRS, user_id))

    def set_value(self, user_id: int, key: str, value: str) -> None:
        """Store a value under a key; raise NoSuchUser when the user has been deleted meanwhile."""
        try:
            self._change(UPSERT_PAIR, user_id, key, value, time.time())
        except sqlite3.IntegrityError:
            raise NoSuchUser(f"with the id {user_id}") from None

    def delete_pair(self, user_id: int, key: str) -> bool:
        """Remove a key and its value; tell whether there was one."""
        return self._change(DELETE_PAIR, user_id, key) == 1


# ---- HTTP messages ---------------------------------------------------------------------------------------------------
# Bytes to a Request, a Response to bytes, after RFC 9110 and RFC 9112. What is malformed is refused, not repaired: a
# proxy before us might repair it in another way and then see other requests than we do.

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
PROBLEM = "application/problem+json"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED = -1  # stands for the length of a body that comes in chunks, each with its own
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
REQUEST_LINE = re.compile(rf"({TOKEN.pattern}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
ABSOLUTE_TARGET = re.compile(r"https?://([^/?]+)(.*)", re.IGNORECASE)
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
LENGTH = re.compile(r"[0-9]{1,18}")
CHUNK_SIZE = re.compile(r"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t -~\x80-\xff]*)?")
NOT_HTTP = re.compile(rb"[^!-~\r]|[^\n]*\r[^\n]")  # what waits in vain for the end of a line, such as TLS
NOT_IN_FIELD = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# A second one of these would change whom we believe or where a request ends. Others are joined with a comma.
SINGLE_FIELDS = frozenset(("authorization", "content-length", "content-type", "host", "transfer-encoding"))

ADDRESS_TOO_LONG = f"the address is longer than {REQUEST_LINE_BYTES_MAX} bytes; send the value as the body"
HEADERS_TOO_LARGE = (
    f"the headers are over {HEADER_FIELDS_MAX} lines of {HEADER_LINE_BYTES_MAX} bytes, or {HEADERS_BYTES_MAX} in all"
)
BODY_TOO_LARGE = (
    f"the body is longer than {BODY_BYTES_MAX} bytes, or the value than {VALUE_BYTES_MAX}; send it as it is"
)
CHUNKS_MALFORMED = "the chunked body is malformed"

Headers = tuple[tuple[str, str], ...]


class Response(NamedTuple):
    """An answer. Its length, its date and the headers that every answer has are added when it is sent."""

    body: bytes = b""
    status: int = 200
    content_type: str = TEXT
    headers: Headers = ()


class HTTPError(Exception):
    """A request is refused: raised anywhere, made an answer in one place.

    The message is one line that tells the client what to do. It never contains a value or a credential.
    """

    def __init__(self, status: int, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    def response(self, accept: str) -> Response:
        """Return the answer: a line of text, or a problem (RFC 9457) if the Accept header names a kind of JSON."""
        if JSON not in accept.lower() and "+json" not in accept.lower():
            return Response(self.message.encode(), self.status, TEXT, self.headers)
        problem = {"title": http.HTTPStatus(self.status).phrase, "status": self.status, "detail": self.message}
        return Response(json.dumps(problem).encode(), self.status, PROBLEM, self.headers)


class Request(NamedTuple):
    """A request; body and user come last, when they are known. Header names are in lower case, the query is encoded."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    is_http_1_0: bool
    keep_alive: bool
    body_length: int  # bytes, or CHUNKED
    body: bytes = b""
    user: User = NOBODY


def read_line(reader: io.BufferedReader, bytes_max: int, status: int, message: str) -> str:
    """Return the next line, decoded as ISO 8859-1 so that no byte is lost.

    Raises HTTPError, with status and message when the line is too long, or ConnectionError at the end of all bytes.
    """
    line = reader.readline(bytes_max + 3)
    if line.endswith(b"\r\n") and len(line) <= bytes_max + 2:
        return line[:-2].decode("iso-8859-1")
    if not line:
        raise ConnectionError("the client has gone")
    if len(line) > bytes_max + 1:
        raise HTTPError(status, message)
    raise HTTPError(400, "the request is incomplete, or has a line that does not end in CR LF")


def read_fields(reader: io.BufferedReader) -> dict[str, str]:
    """Return the header fields by lower-case name, up to the empty line that ends them (RFC 9112 section 5)."""
    headers: dict[str, str] = {}
    lines_left, bytes_left = HEADER_FIELDS_MAX, HEADERS_BYTES_MAX
    while line := read_line(reader, HEADER_LINE_BYTES_MAX, 431, HEADERS_TOO_LARGE):
        lines_left, bytes_left = lines_left - 1, bytes_left - len(line) - 2
        if lines_left < 0 or bytes_left < 0:
            raise HTTPError(431, HEADERS_TOO_LARGE)
        name, colon, value = line.partition(":")
        if not colon or not TOKEN.fullmatch(name) or NOT_IN_FIELD.search(value):
            raise HTTPError(400, "a header is malformed; it is NAME: VALUE on one line, with no space before the colon")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in SINGLE_FIELDS:
                raise HTTPError(400, f"the header {name} stands twice; send it once")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def read_exactly(reader: io.BufferedReader, count: int) -> bytes:
    """Return the next count bytes; raise ConnectionError when there are fewer."""
    data = reader.read(count)
    if len(data) < count:
        raise ConnectionError("the client has gone")
    return data


def read_chunks(reader: io.BufferedReader) -> bytes:
    """Return a body that comes in chunks (RFC 9112 section 7.1); trailers are checked and thrown away."""
    body = bytearray()
    while True:
        match = CHUNK_SIZE.fullmatch(read_line(reader, HEADER_LINE_BYTES_MAX, 400, CHUNKS_MALFORMED))
        if not match:
            raise HTTPError(400, CHUNKS_MALFORMED)
        size = int(match[1], 16)
        if size == 0:
            read_fields(reader)
            return bytes(body)
        if len(body) + size > BODY_BYTES_MAX:
            raise HTTPError(413, BODY_TOO_LARGE)
        body += read_exactly(reader, size)
        if read_exactly(reader, 2) != b"\r\n":
            raise HTTPError(400, CHUNKS_MALFORMED)


def parse_target(method: str, target: str) -> tuple[str, str, str]:
    """Return host, path and query of a request target, the host empty unless it stands there (RFC 9112 section 3.2).

    Bytes above 127 are taken if they are UTF-8: many a shell script sends such, and they can mean only one thing.
    """
    host = ""
    absolute = ABSOLUTE_TARGET.fullmatch(target)
    if absolute:
        host, target = absolute[1], absolute[2]
        target = target if target.startswith("/") else "/" + target
    if not target.startswith("/") and (method, target) != ("OPTIONS", "*"):
        raise HTTPError(400, "the path is malformed; it begins with a slash")
    if "#" in target:
        raise HTTPError(400, "the address contains a #; write it as %23")
    if not target.isascii():
        try:
            target = target.encode("iso-8859-1").decode("utf-8")
        except UnicodeDecodeError:
            raise HTTPError(400, "the address is not UTF-8") from None
    path, _, query = target.partition("?")
    return host, path, query


def parse_body_length(headers: Mapping[str, str], is_http_1_0: bool) -> int:
    """Return how many bytes the body has, or CHUNKED (RFC 9112 section 6); with neither header there is none."""
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers:
        if "content-length" in headers or is_http_1_0:
            raise HTTPError(400, "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0")
        if headers["transfer-encoding"].lower() != "chunked":
            raise HTTPError(501, "this transfer coding is not supported; send Content-Length, or chunked")
        return CHUNKED
    if not LENGTH.fullmatch(length):
        raise HTTPError(400, "the header Content-Length is malformed; it is the number of bytes in the body")
    return int(length)


def read_head(reader: io.BufferedReader) -> Request:
    """Return the next request, its body still to be read; raise HTTPError or ConnectionError.

    A minor version that we do not know is served like 1.1 (RFC 9110 section 2.5).
    """
    line = read_line(reader, REQUEST_LINE_BYTES_MAX, 414, ADDRESS_TOO_LONG)
    if not line:  # an empty line before a request is to be ignored (RFC 9112 section 2.2)
        line = read_line(reader, REQUEST_LINE_BYTES_MAX, 414, ADDRESS_TOO_LONG)
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(400, "the request line is malformed; it is METHOD TARGET HTTP/1.1, with one space between")
    method, target, major, minor = match.groups()
    if major != "1":
        raise HTTPError(505, "this version of HTTP is not supported; use HTTP/1.1")
    is_http_1_0 = minor == "0"
    host, path, query = parse_target(method, target)
    headers = read_fields(reader)
    if "host" not in headers and not is_http_1_0:
        raise HTTPError(400, "the header Host is missing; HTTP/1.1 needs it")
    if host:
        headers["host"] = host  # RFC 9112 section 3.2.2: the target has the last word
    if not HOST.fullmatch(headers.get("host", "")):
        raise HTTPError(400, "the host is malformed; it is a name or an address, and a port perhaps")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise HTTPError(417, "this expectation is not supported; only 100-continue is")
    options = [option.strip() for option in headers.get("connection", "").lower().split(",")]
    keep_alive = "close" not in options and (not is_http_1_0 or "keep-alive" in options)
    body_length = parse_body_length(headers, is_http_1_0)
    return Request(method, path, query, headers, is_http_1_0, keep_alive, body_length)


def encode_response(response: Response, date: str, connection: str, with_body: bool) -> bytes:
    """Return an answer as one string of bytes: a second write would wait for the first one's acknowledgement.

    date and connection are those headers' values, an empty connection for none. Without the body, the head is the one
    that would stand before it (RFC 9110 section 9.3.2).
    """
    head = [STATUS_LINES[response.status], f"Date: {date}\r\n"]
    if response.status != 204:
        head.append(f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\n")
    head.append("Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n")
    head.extend(f"{name}: {value}\r\n" for name, value in response.headers)
    head.append(f"Connection: {connection}\r\n\r\n" if connection else "\r\n")
    return "".join(head).encode("iso-8859-1") + (response.body if with_body else b"")


# ---- Parameters ------------------------------------------------------------------------------------------------------
# A request's parameters, from its query and its body. Everything is text, and one name has one value: what is not
# UTF-8, or is said twice, is refused rather than guessed at.

FORM = "application/x-www-form-urlencoded"
FORM_WITH_VALUE = re.compile(rb"(?:^|&)value=")
JSON_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|([\[{])|[\]}]', re.DOTALL)
TOO_MANY_PARAMETERS = f"there are more than {PARAMETERS_MAX} parameters"


def shorten(name: str) -> str:
    """Return a name that came from outside so that it fits into a message of one line."""
    return ascii(name if len(name) <= 40 else name[:40] + "...")[1:-1]


def decode_text(body: bytes) -> str:
    """Return a body as text; raise HTTPError when it is not UTF-8."""
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise HTTPError(400, "the body is not UTF-8") from None


def parse_form(text: str) -> list[tuple[str, str]]:
    """Return names and values of a query or a form body; raise HTTPError.

    The encoding is that of HTML forms (WHATWG URL standard, application/x-www-form-urlencoded): "+" is a space, and a
    "%" without two hexadecimal digits stands for itself. A name without "=" is refused, since it may be a typing error
    and must not store an empty value.
    """
    if text.count("&") >= PARAMETERS_MAX:
        raise HTTPError(400, TOO_MANY_PARAMETERS)
    pairs = []
    for field in text.split("&"):
        name, equals, value = field.partition("=")
        if equals:
            try:
                name = urllib.parse.unquote_plus(name, errors="strict")
                pairs.append((name, urllib.parse.unquote_plus(value, errors="strict")))
            except UnicodeDecodeError:
                raise HTTPError(400, "a parameter is not UTF-8; percent-encode the bytes of its UTF-8 form") from None
        elif field:
            raise HTTPError(400, f"the parameter {shorten(name)} has no value; write {shorten(name)}=VALUE")
    return pairs


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return values by name; raise HTTPError when a name stands twice."""
    by_name = dict(pairs)
    if len(by_name) != len(pairs):
        names = sorted(name for name, _ in pairs)
        repeated = next(name for name, following in zip(names, names[1:]) if name == following)
        raise HTTPError(400, f"the name {shorten(repeated)} stands twice; send it once")
    return by_name


def check_json_depth(text: str) -> None:
    """Raise ValueError when arrays and objects are nested more than JSON_DEPTH_MAX deep."""
    if text.count("[") + text.count("{") <= JSON_DEPTH_MAX:
        return
    depth = 0
    for match in JSON_STRING_OR_BRACKET.finditer(text):
        depth += 1 if match[1] else -1 if match[0] in "]}" else 0
        if depth > JSON_DEPTH_MAX:
            raise ValueError("nested too deeply")


def parse_integer(digits: str) -> int:
    """Return a JSON integer; raise ValueError when it is longer than JSON_DIGITS_MAX."""
    if len(digits) > JSON_DIGITS_MAX:
        raise ValueError("too many digits")
    return int(digits)


def parse_json_object(text: str) -> list[tuple[str, str]]:
    """Return names and values of a JSON object, a value that is no string as its JSON text; raise HTTPError."""
    try:
        check_json_depth(text)
        # A byte order mark is no JSON, but a parser may ignore one (RFC 8259 section 8.1), and PowerShell sends it.
        text = text.lstrip("\ufeff")
        members = json.loads(text, object_pairs_hook=unique_names, parse_int=parse_integer)
        if not isinstance(members, dict) or not isinstance(members.get("key", ""), str):
            raise HTTPError(400, "the JSON body is not an object, or its key is not a string")
        if len(members) > PARAMETERS_MAX:
            raise HTTPError(400, TOO_MANY_PARAMETERS)
        return [
            (name, member if isinstance(member, str) else json.dumps(member, ensure_ascii=False, allow_nan=False))
            for name, member in members.items()
        ]
    except ValueError:
        # Also for NaN and Infinity, which are no JSON but come out of Python's parser, and of a number like 1e999.
        raise HTTPError(400, "the JSON body is malformed, nested too deeply, or has a number too large") from None


def parse_parameters(request: Request, body_may_be_value: bool = False) -> dict[str, str]:
    """Return the parameters of the query joined with those of a form body or of a JSON object; raise HTTPError.

    With body_may_be_value, a query that has a key but no value makes the body the value, whatever its declared type:
    programs label what they send carelessly. Only a form that has a field "value" is a form even then.
    """
    pairs = parse_form(request.query)
    if request.body:
        in_query = dict(pairs)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_value = body_may_be_value and "key" in in_query and "value" not in in_query
        if is_value and not (content_type == FORM and FORM_WITH_VALUE.search(request.body)):
            pairs.append(("value", decode_text(request.body)))
        elif content_type == FORM:
            pairs += parse_form(decode_text(request.body))
        elif content_type == JSON:
            pairs += parse_json_object(decode_text(request.body))
        else:
            raise HTTPError(400, f"send parameters in the query, or in a body of the type {FORM} or {JSON}")
    return unique_names(pairs)


def utf8_length(name: str, text: str) -> int:
    """Return how many bytes a parameter has in UTF-8; raise HTTPError when it has no such form."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise HTTPError(400, f"the {name} has half of a surrogate pair, which is no character") from None


def require_key(parameters: Mapping[str, str]) -> str:
    """Return the parameter key; raise HTTPError when it is missing or cannot be a key."""
    key = parameters.get("key")
    if key is None:
        raise HTTPError(400, "the parameter key is missing; send it as in ?key=door")
    if not 1 <= utf8_length("key", key) <= KEY_BYTES_MAX or "\0" in key:
        raise HTTPError(400, f"a key is 1 to {KEY_BYTES_MAX} bytes of UTF-8 without NUL")
    return key


def require_value(parameters: Mapping[str, str]) -> str:
    """Return the parameter value; raise HTTPError when it is missing or cannot be a value."""
    value = parameters.get("value")
    if value is None:
        raise HTTPError(400, "the parameter value is missing; send it as in ?key=door&value=open, or as the body")
    if utf8_length("value", value) > VALUE_BYTES_MAX:
        raise HTTPError(413, f"the value is too large; the limit is {VALUE_BYTES_MAX} bytes")
    return value


# ---- Authentication --------------------------------------------------------------------------------------------------
# Credentials in, a User or an HTTPError out. scrypt makes guessing expensive, and would make every request so: hence
# credentials that were verified are remembered, under a keyed hash, never as they came.

CHALLENGE = (("WWW-Authenticate", 'Basic realm="kvserver", charset="UTF-8"'),)
RETRY_AFTER = (("Retry-After", str(RETRY_AFTER_SECONDS)),)


def decode_credentials(encoded: str) -> tuple[str, str]:
    """Return user name and password of Basic credentials (RFC 7617, in UTF-8), both empty when they are malformed.

    Control characters make them malformed: scrypt pads with zeros, so "password" and "password\\0" would be one.
    """
    try:
        text = base64.b64decode(encoded.strip(" "), validate=True).decode("utf-8")
    except ValueError:
        return "", ""
    name, colon, password = text.partition(":")
    # Without a colon it may be a lone password, which must not come into the log as a name.
    return ("", "") if CONTROL_CHARACTER.search(text) or not colon else (name, password)


class Authenticator:
    """Tells who sends a request."""

    def __init__(self, store: Store) -> None:
        """Use the users of a store."""
        self._store = store
        # What an unknown name is checked against, so that it takes as long as a wrong password and does not tell which
        # names exist. No password matches a random digest.
        self._unknown_user_hash = format_hash(secrets.token_bytes(SALT_BYTES), secrets.token_bytes(DIGEST_BYTES))
        # From the keyed hash of an Authorization header to the user's name and the stored hash it was verified against.
        self._verified: dict[bytes, tuple[str, str]] = {}
        self._verified_lock = threading.Lock()
        self._secret = secrets.token_bytes(32)
        # One thread runs scrypt, because the allocator keeps 16 MiB for each thread that has ever run it.
        self._scrypt = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scrypt")

    def close(self) -> None:
        """Refuse logins that wait for the scrypt thread, and all further ones."""
        self._scrypt.shutdown(wait=False, cancel_futures=True)

    def authenticate(self, authorization: str | None, address: str) -> User:
        """Return the user whose credentials an Authorization header holds; raise HTTPError 401.

        The user's row is read with every request, and what is remembered counts only while the row has the hash that it
        was verified against: a new password or a deletion counts at once, whichever process made it. address is the
        client's, for the log.
        """
        if authorization is None:
            raise HTTPError(401, "log in with a user name and a password, by HTTP Basic authentication", CHALLENGE)
        digest = hashlib.blake2b(authorization.encode("iso-8859-1"), key=self._secret).digest()
        name, password_hash = self._verified.get(digest, ("", ""))
        if name:
            user = self._store.user(name)
            if user and user.password_hash == password_hash:
                return user
        return self._log_in(authorization, digest, address)

    def _log_in(self, authorization: str, digest: bytes, address: str) -> User:
        """Check credentials that are not remembered, and remember them if they are right."""
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic":
            raise HTTPError(401, "this authentication scheme is not supported; use HTTP Basic", CHALLENGE)
        name, password = decode_credentials(encoded)
        try:
            user = self._scrypt.submit(self._verify, name, password).result() if name and password else None
        except (CancelledError, RuntimeError):  # the latter from submit, after the shutdown or for want of a thread
            raise HTTPError(503, "no password can be checked just now; try again", RETRY_AFTER) from None
        if user is None:
            # repr escapes what could forge another line or field, and the address stands last for the same reason.
            LOG.warning("login failed: user=%r address=%s", name[:64], address)
            raise HTTPError(401, "the user name or the password is wrong", CHALLENGE)
        with self._verified_lock:
            if len(self._verified) >= CREDENTIALS_MAX:
                del self._verified[next(iter(self._verified))]
            self._verified[digest] = (user.name, user.password_hash)
        return user

    def _verify(self, name: str, password: str) -> User | None:
        """Return the user if the password is theirs; runs in the scrypt thread."""
        user = self._store.user(name)
        matches = verify_password(password, user.password_hash if user else self._unknown_user_hash)
        if not user or not matches or user.password_hash.startswith(hash_parameters()):
            return user if matches else None
        try:  # the parameters have changed since the hash was made, and here is the password to make a new one of
            renewed = hash_password(password)
            self._store.renew_password_hash(user, renewed)
            return user._replace(password_hash=renewed)
        except (StoreError, sqlite3.Error) as error:
            LOG.warning("cannot store a new password hash: user=%r error=%s", name, error)
            return user  # the old hash is good too


# ---- API -------------------------------------------------------------------------------------------------------------
# One plain function an endpoint: the store and the request in, the response out. The bodies are those that clients of
# IoT Persistence Api look for.

UNKNOWN_KEY = "there is no such key; store one with /set?key=KEY&value=VALUE"


def set_value(store: Store, request: Request) -> Response:
    """Store a value under a key."""
    parameters = parse_parameters(request, body_may_be_value=True)
    store.set_value(request.user.id, require_key(parameters), require_value(parameters))
    return Response(b"Success")


def get_value(store: Store, request: Request) -> Response:
    """Answer with the value of a key as it was stored."""
    value = store.value(request.user.id, require_key(parse_parameters(request)))
    if value is None:
        raise HTTPError(404, UNKNOWN_KEY)
    return Response(value)


def delete_pair(store: Store, request: Request) -> Response:
    """Remove a key and its value."""
    if not store.delete_pair(request.user.id, require_key(parse_parameters(request))):
        raise HTTPError(404, UNKNOWN_KEY)
    return Response(b"Successfully removed state")


def list_pairs(store: Store, request: Request) -> Response:
    """Answer with all keys and values of the user as one JSON object."""
    parse_parameters(request)  # for its errors: it takes none
    pairs = store.pairs(request.user.id)
    return Response(json.dumps(pairs, ensure_ascii=False).encode("utf-8"), content_type=JSON)


def check_health(store: Store, request: Request) -> Response:
    """Answer whether the database can be read."""
    parse_parameters(request)  # for its errors: it takes none, and no body, which anybody could send, is read
    store.check()
    return Response(b"ok")


# ---- Server ----------------------------------------------------------------------------------------------------------
# The HTTP surface in one table, the handler that serves one connection, and the server that accepts connections and
# hands them to threads. Sockets have no time-outs of their own: a handler notes until when it may wait, and the server
# closes what is overdue, so that a client that sends a byte now and then gains nothing.

ANYONE, USER = "anyone", "user"  # who may send a request: ANYONE without a login, USER with one


class Route(NamedTuple):
    """A row of the table below."""

    path: str
    methods: tuple[str, ...]
    endpoint: Callable[[Store, Request], Response]
    who: str


ROUTES = (
    Route("/set", ("GET", "POST", "PUT"), set_value, USER),
    Route("/get", ("GET", "HEAD"), get_value, USER),
    Route("/del", ("GET", "POST", "PUT"), delete_pair, USER),
    Route("/list", ("GET", "HEAD"), list_pairs, USER),
    Route("/health", ("GET", "HEAD"), check_health, ANYONE),
)

# What a handler is doing; it decides how the server closes its connection when the time is up.
IDLE, RECEIVING, ANSWERING = "idle", "receiving", "answering"


class Stopped(Exception):
    """The server was told to stop."""


def route_table(base_path: str) -> dict[str, dict[str, Route]]:
    """Return the routes by path, at the root and below base_path, and then by method."""
    return {
        prefix + route.path: {method: route for method in route.methods}
        for prefix in ("", base_path)
        for route in ROUTES
    }


def answer_without_route(method: str, path: str, methods: Sequence[str]) -> Response:
    """Answer OPTIONS, or raise HTTPError for a path or a method that is not served; methods are those of the path."""
    if method not in METHODS:
        raise HTTPError(501, f"the method {shorten(method)} is unknown; use {', '.join(methods or METHODS[:4])}")
    if path == "*":
        methods = METHODS
    if not methods:
        raise HTTPError(404, "Use the api endpoints: " + ", ".join(route.path for route in ROUTES))
    allow = (("Allow", ", ".join(dict.fromkeys([*methods, "OPTIONS"]))),)
    if method != "OPTIONS":
        raise HTTPError(405, f"{path} does not take {method}; use {', '.join(methods)}", allow)
    return Response(status=204, headers=allow)


def log_exception(error: BaseException | None) -> None:
    """Log where an exception was raised. Its message is left out, since it may quote what a client sent."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    places = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    LOG.error("internal error: %s in %s", type(error).__name__, places)


def as_http_error(error: Exception) -> HTTPError:
    """Return the answer to an exception: the one place where errors of the sections above get their status."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, NoSuchUser):
        return HTTPError(401, "the user has been deleted", CHALLENGE)
    if isinstance(error, StoreBusy):
        return HTTPError(503, f"{error}; try again", RETRY_AFTER)
    if isinstance(error, sqlite3.Error):
        LOG.error("the database failed: %s", error)
        return HTTPError(503, "the database cannot be used; the server's log says why", RETRY_AFTER)
    log_exception(error)
    return HTTPError(500, "the server made a mistake; its log says where")


def log_request(request: Request, status: int, seconds: float, address: str) -> None:
    """Log an answered request: its key, but not its value nor the query as it came."""
    key = ""
    with contextlib.suppress(HTTPError):
        key = (dict(parse_form(request.query)).get("key") or parse_parameters(request).get("key", ""))[:KEY_BYTES_MAX]
    line = "request: method=%s path=%r key=%r status=%d milliseconds=%.1f user=%r address=%s"
    LOG.info(
        line, request.method, request.path[:KEY_BYTES_MAX], key, status, seconds * 1000, request.user.name, address
    )


class RequestHandler(socketserver.StreamRequestHandler):
    """Serves one connection: request after request, until one side closes it."""

    disable_nagle_algorithm = True
    server: Server
    rfile: io.BufferedReader

    def setup(self) -> None:
        """Take over the connection."""
        super().setup()
        # An IPv6 socket that serves IPv4 too gives such an address a prefix, which no other program would recognise.
        address: str = self.client_address[0]
        self.address = address[7:] if address.startswith("::ffff:") and "." in address else address
        self.request_head: Request | None = None
        self.keep_alive = True
        self.body_pending = False  # whether bytes of the request may still be on their way
        self.enter(IDLE, FIRST_BYTE_SECONDS)
        self.server.connections[self.connection] = self

    def enter(self, phase: str, seconds: float) -> None:
        """Note what is done now, and for how long it may be done."""
        # One assignment, since the server's thread reads both.
        self.state = (phase, time.monotonic() + seconds)

    def handle(self) -> None:
        """Answer one request after the other."""
        with contextlib.suppress(OSError):  # the client has gone, or its time was up
            while self.keep_alive:
                self.handle_request()
                self.enter(IDLE, IDLE_SECONDS)

    def handle_request(self) -> None:
        """Receive a request and answer it: the only place where an exception becomes an answer."""
        begin = self.rfile.peek(1)
        started = time.monotonic()
        self.enter(RECEIVING, REQUEST_SECONDS)
        self.request_head, self.keep_alive, self.body_pending = None, False, True  # until the head has proved good
        try:
            if NOT_HTTP.match(begin):
                raise HTTPError(400, "this is not HTTP/1.1; if it is TLS, use http:// instead of https://")
            response = self.respond(read_head(self.rfile))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever happens, the client gets an answer
            accept = self.request_head.headers.get("accept", "") if self.request_head else ""
            response = as_http_error(error).response(accept)
        request = self.request_head
        self.keep_alive = self.keep_alive and not self.body_pending and not self.server.stopping
        connection = "close" if not self.keep_alive else "keep-alive" if request and request.is_http_1_0 else ""
        with_body = not request or request.method != "HEAD"
        self.send(encode_response(response, self.server.date(), connection, with_body))
        if request and self.server.log_requests:
            log_request(request, response.status, time.monotonic() - started, self.address)
        if self.body_pending:
            self.linger()

    def respond(self, request: Request) -> Response:
        """Return the answer to a request; what it raises is answered above."""
        self.request_head, self.keep_alive = request, request.keep_alive
        self.body_pending = request.body_length != 0
        methods = self.server.routes.get(request.path, {})
        route = methods.get(request.method)
        if route is None:
            return answer_without_route(request.method, request.path, list(methods))
        if route.who == USER:
            left_seconds = self.state[1] - time.monotonic()
            self.enter(ANSWERING, math.inf)  # what a login takes is not the client's fault
            user = self.server.authenticator.authenticate(request.headers.get("authorization"), self.address)
            body = self.read_body(request, left_seconds) if self.body_pending else b""
            self.request_head = request = request._replace(user=user, body=body)
        self.enter(ANSWERING, math.inf)
        return route.endpoint(self.server.store, request)

    def read_body(self, request: Request, seconds: float) -> bytes:
        """Return the body of a request, waiting that long; raise HTTPError when it is malformed or too large."""
        if request.body_length > BODY_BYTES_MAX:
            raise HTTPError(413, BODY_TOO_LARGE)
        if "expect" in request.headers and not request.is_http_1_0:
            self.send(CONTINUE)
        self.enter(RECEIVING, seconds)
        chunked = request.body_length == CHUNKED
        body = read_chunks(self.rfile) if chunked else read_exactly(self.rfile, request.body_length)
        self.body_pending = False
        return body

    def send(self, data: bytes) -> None:
        """Send bytes; the connection is closed when the client takes none for SEND_SECONDS."""
        unsent = memoryview(data)
        while unsent:
            self.enter(ANSWERING, SEND_SECONDS)
            # A blocking send returns when all has been taken, so that a slow client would run out of time with more.
            unsent = unsent[self.connection.send(unsent[:SEND_BYTES]) :]

    def linger(self) -> None:
        """Read on and throw it away, until the client has seen the answer and closes, or LINGER_SECONDS have passed.

        To close a connection with unread bytes is to reset it, and a reset takes the answer with it (RFC 9112 section
        9.6).
        """
        self.enter(RECEIVING, LINGER_SECONDS)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < self.state[1] and self.connection.recv(16 * 1024):
                pass


def bind_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return the family and the address to bind; raise OSError when the host is unknown.

    An empty host is all interfaces: the IPv6 wildcard serves IPv4 as well, where the machine can do that.
    """
    host = host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][::4]


def shut(connection: socket.socket, how: int) -> None:
    """End one direction of a connection, or both; the thread that waits for it wakes up."""
    with contextlib.suppress(OSError):
        connection.shutdown(how)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections and hands each to a thread of a pool, until it is told to stop."""

    request_queue_size = LISTEN_BACKLOG
    allow_reuse_port = False  # a second server on the port must fail, not take half of the connections

    def __init__(
        self, store: Store, host: str, port: int, base_path: str = DEFAULT_BASE_PATH, log_requests: bool = False
    ) -> None:
        """Bind host and port and listen; raise OSError when that is not possible."""
        self.store = store
        self.authenticator = Authenticator(store)
        self.routes = route_table(base_path)
        self.log_requests = log_requests
        self.stopping = False
        # All that have been accepted; None until a thread serves the connection.
        self.connections: dict[socket.socket, RequestHandler | None] = {}
        self._workers = ThreadPoolExecutor(CONNECTIONS_MAX, thread_name_prefix="connection")
        self._next_look = 0.0  # monotonic seconds
        self._date = (0, "")
        self.address_family, address = bind_address(host, port)
        super().__init__(address, RequestHandler)

    def server_bind(self) -> None:
        """Bind the socket. HTTPServer's own method would ask the DNS for our name, which can take seconds."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, False)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def url(self, host: str) -> str:
        """Return the URL of this server under the given host."""
        return f"http://[{host}]:{self.server_port}" if ":" in host else f"http://{host}:{self.server_port}"

    def date(self) -> str:
        """Return the value of the Date header, formatted once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, email.utils.formatdate(now, usegmt=True))
        return self._date[1]

    def run(self, on_stop: Callable[[], object] = lambda: None) -> None:
        """Serve until stop is called, then call on_stop and finish what is under way."""
        with contextlib.suppress(Stopped):
            self.serve_forever(POLL_SECONDS)
        on_stop()
        self._finish()

    def stop(self) -> None:
        """Make run end. This is safe in a signal handler: it only sets a flag."""
        self.stopping = True

    def service_actions(self) -> None:
        """Do what is due; serve_forever calls this after each accept and every POLL_SECONDS."""
        if self.stopping:
            raise Stopped
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + POLL_SECONDS
            self._close_overdue()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a new connection to a thread."""
        self.connections[request] = None
        self._workers.submit(self.process_request_thread, request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error that no request is to blame for."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # those are about connections that ended before they began
            log_exception(error)

    def _close_overdue(self, stop_begun: float = math.inf) -> None:
        """Wake the handlers whose time is up; once a stop has begun, the idle ones at once and incomplete ones soon."""
        stop_seconds = {IDLE: 0, RECEIVING: STOP_REQUEST_SECONDS, ANSWERING: math.inf}
        now = time.monotonic()
        for connection, handler in list(self.connections.items()):
            phase, deadline = handler.state if handler else (ANSWERING, math.inf)
            if min(deadline, stop_begun + stop_seconds[phase]) < now:
                # The client of an incomplete head is told so (400), for which its direction stays open.
                shut(connection, socket.SHUT_RDWR if phase == ANSWERING else socket.SHUT_RD)

    def _finish(self) -> None:
        """Close idle connections at once, the others when they are done, and all of them after STOP_SECONDS."""
        self.server_close()
        begun = time.monotonic()
        while self.connections and time.monotonic() < begun + STOP_SECONDS:
            if time.monotonic() > begun + STOP_REQUEST_SECONDS:
                self._give_up_waiting()
            self._close_overdue(begun)
            time.sleep(0.01)
        self._give_up_waiting()
        for connection in list(self.connections):
            shut(connection, socket.SHUT_RDWR)
        self._workers.shutdown()

    def _give_up_waiting(self) -> None:
        """Refuse requests that wait for a password check or for a lock."""
        self.authenticator.close()
        self.store.give_up_waiting()


# ---- Settings --------------------------------------------------------------------------------------------------------
# What can be set: by a flag, else by an environment variable, else in a JSON file, else it is the default. One table
# serves all four, so that none can miss a name.

CONFIG_VARIABLE = "KVSERVER_CONFIG"


class CommandError(Exception):
    """A command cannot be carried out; the message is one line for people."""


class Setting(NamedTuple):
    """A row of the table below: log_requests is --log-requests, KVSERVER_LOG_REQUESTS, and log_requests in the file."""

    name: str
    parse: Callable[[str], Any]  # raises ArgumentTypeError, which says what the text may be
    json_types: tuple[type, ...]
    default: Any
    metavar: str
    help: str

    def variable(self) -> str:
        """Return the name of the environment variable."""
        return "KVSERVER_" + self.name.upper()


def parse_port(text: str) -> int:
    """Return a port number."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return int(text)


def parse_base_path(text: str) -> str:
    """Return a prefix of paths, with a slash before it and none behind, or nothing for no prefix."""
    path = ("/" + text.strip("/")).rstrip("/")
    if not re.fullmatch("(?:/[A-Za-z0-9._~-]+)*", path):
        raise argparse.ArgumentTypeError("a base path is like /api: letters, digits, . _ ~ - and slashes")
    return path


def parse_switch(text: str) -> bool:
    """Return whether a switch is on."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError("a switch is true, false, 1 or 0")
    return text.lower() in ("true", "1")


DATABASE = Setting("db", str, (str,), DEFAULT_DATABASE, "FILE", "database (default: kvserver.db beside the program)")
LOG_REQUESTS = Setting("log_requests", parse_switch, (bool, int, str), False, "", "log a line for each request")
SETTINGS = (
    Setting("host", str, (str,), "", "H", "address to listen on (default: all, IPv6 and IPv4)"),
    Setting("port", parse_port, (int, str), DEFAULT_PORT, "P", f"port, 0 for any (default: {DEFAULT_PORT})"),
    DATABASE,
    Setting(
        "base_path",
        parse_base_path,
        (str,),
        DEFAULT_BASE_PATH,
        "P",
        f"prefix of all paths, / for none (default: {DEFAULT_BASE_PATH})",
    ),
    LOG_REQUESTS,
)


def read_config(path: str | None) -> dict[str, str]:
    """Return the settings that a JSON file has, as text by name; none without a path; raise CommandError."""
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            members = json.load(file, object_pairs_hook=unique_names)
    except (OSError, ValueError, RecursionError, HTTPError) as error:
        raise CommandError(f"cannot read the configuration file {path}: {error}") from None
    if not isinstance(members, dict):
        raise CommandError(f"the configuration file {path} is not a JSON object")
    settings = {setting.name: setting for setting in SETTINGS}
    config = {}
    for name, member in members.items():
        if name not in settings:
            raise CommandError(f"unknown name {name!r} in {path}; the names are: {', '.join(settings)}")
        if type(member) not in settings[name].json_types:
            raise CommandError(f"{name} in {path} cannot be {json.dumps(member)}")
        config[name] = member if isinstance(member, str) else json.dumps(member)
    if DATABASE.name in config:
        config[DATABASE.name] = os.path.join(os.path.dirname(path), config[DATABASE.name])
    return config


def check_variables() -> None:
    """Raise CommandError when there is an environment variable that looks like a setting, and is none."""
    known = [setting.variable() for setting in SETTINGS] + [CONFIG_VARIABLE]
    for name in os.environ:
        if name.startswith("KVSERVER_") and name not in known:
            raise CommandError(f"unknown environment variable {name}; the names are: {', '.join(known)}")


def read_settings(arguments: argparse.Namespace, settings: Sequence[Setting]) -> dict[str, Any]:
    """Return what is set, by name; raise CommandError. None stands for a flag not given; an empty variable is unset."""
    check_variables()
    config = read_config(getattr(arguments, "config", None) or os.environ.get(CONFIG_VARIABLE))
    values = {}
    for setting in settings:
        values[setting.name] = getattr(arguments, setting.name)
        text, source = os.environ.get(setting.variable()), f"the environment variable {setting.variable()}"
        if not text:
            text, source = config.get(setting.name), f"{setting.name} in the configuration file"
        if values[setting.name] is None:
            try:
                values[setting.name] = setting.default if text is None else setting.parse(text)
            except argparse.ArgumentTypeError as error:
                raise CommandError(f"{source} is {text!r}; {error}") from None
    return values


# ---- Command line ----------------------------------------------------------------------------------------------------
# One function a command: it returns when all is done, or raises an error whose message is the one line that people see.


def database_path(arguments: argparse.Namespace) -> str:
    """Return where the database of a command is."""
    return str(read_settings(arguments, [DATABASE])[DATABASE.name])


def open_store(arguments: argparse.Namespace) -> contextlib.closing[Store]:
    """Open the database of a command that needs one to exist."""
    return contextlib.closing(Store(database_path(arguments), create=False))


def read_password(arguments: argparse.Namespace) -> str:
    """Return a new password: never from the arguments, which all users of a machine can see."""
    if arguments.password_stdin:
        line = sys.stdin.buffer.readline(PASSWORD_BYTES_MAX + 3)
        if len(line) > PASSWORD_BYTES_MAX + 2:  # it is cut, perhaps within a character
            raise BadCredential(PASSWORD_TOO_LONG)
        try:
            password = re.sub(r"\r?\n\Z", "", line.decode("utf-8"))
        except UnicodeDecodeError:
            raise CommandError("the password on standard input is not UTF-8") from None
    elif sys.stdin.isatty():
        try:
            password = getpass.getpass(f"Password for {arguments.name}: ")
            check_password(password)
            if getpass.getpass("The same again: ") != password:
                raise CommandError("the two are not the same; nothing was changed")
        except UnicodeDecodeError:
            raise CommandError("the password is not in the terminal's encoding; nothing was changed") from None
    else:
        raise CommandError("there is no terminal to ask for the password; pipe it in and add --password-stdin")
    check_password(password)
    return password


def add_user(arguments: argparse.Namespace) -> None:
    """Add a user."""
    check_user_name(arguments.name)
    path = database_path(arguments)
    if os.path.exists(path):
        with contextlib.closing(Store(path, create=False)) as store:
            if store.user(arguments.name):
                raise UserExists(arguments.name)  # known before anybody has typed a password
    password_hash = hash_password(read_password(arguments))
    with contextlib.closing(Store(path)) as store:
        store.add_user(arguments.name, password_hash, arguments.admin)
    print(f"added the {'admin' if arguments.admin else 'user'} {arguments.name}")


def set_password(arguments: argparse.Namespace) -> None:
    """Set a user's password."""
    check_user_name(arguments.name)
    with open_store(arguments) as store:
        if not store.user(arguments.name):
            raise NoSuchUser(arguments.name)
        store.set_password_hash(arguments.name, hash_password(read_password(arguments)))
    print(f"set the password of {arguments.name}")


def delete_user(arguments: argparse.Namespace) -> None:
    """Delete a user and all they stored, after asking."""
    with open_store(arguments) as store:
        users = store.users()
        user = next((user for user in users if user.name == arguments.name), None)
        if user is None:
            raise NoSuchUser(arguments.name)
        what = f"the user {user.name} and what they stored (pairs: {user.pairs})"
        if not arguments.yes:
            if user.is_admin and sum(other.is_admin for other in users) == 1:
                raise LastAdmin(user.name)
            if not sys.stdin.isatty():
                raise CommandError(f"there is no terminal to ask; to delete {what}, add --yes")
            if input(f"Delete {what}? [y/N] ").strip().lower() not in ("y", "yes"):
                raise CommandError("nothing was deleted")
        store.delete_user(user.name, even_last_admin=arguments.yes)
    print(f"deleted {what}")


def list_users(arguments: argparse.Namespace) -> None:
    """Print the users as a table."""
    with open_store(arguments) as store:
        rows = [(user.name, "admin" if user.is_admin else "user", str(user.pairs)) for user in store.users()]
    rows.insert(0, ("NAME", "ROLE", "PAIRS"))
    name_width, role_width, pairs_width = (max(map(len, column)) for column in zip(*rows))
    for name, role, pairs in rows:
        print(f"{name:{name_width}}  {role:{role_width}}  {pairs:>{pairs_width}}")


def announce(server: Server) -> None:
    """Say that the server is there; if there is no user yet, make one and say how to try it."""
    address = ipaddress.ip_address(server.server_name.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:127.0.0.1 is loopback too
    if not address.is_loopback:
        LOG.warning("plain HTTP shows passwords to the network; put a TLS proxy before it, or use --host 127.0.0.1")
    if not server.store.users():
        password = secrets.token_urlsafe(FIRST_PASSWORD_BYTES)
        if server.store.add_first_admin("admin", hash_password(password)):
            url = server.url("127.0.0.1" if address.is_unspecified else server.server_name)
            try:
                print(f"created the user admin with the password {password} (it is shown only now)")
                print(f"try it: curl -u admin:{password} {shlex.quote(url + '/set?key=door&value=open')}", flush=True)
            except OSError:
                server.store.delete_user("admin", even_last_admin=True)  # nobody has seen the password
                raise
    print(f"listening on {server.url(server.server_name)}", flush=True)


def serve(arguments: argparse.Namespace) -> None:
    """Run the server until SIGTERM or Ctrl-C."""
    settings = read_settings(arguments, SETTINGS)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    threading.stack_size(THREAD_STACK_BYTES)
    with contextlib.closing(Store(settings.pop("db"))) as store:
        try:
            server = Server(store, **settings)
        except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one of a host
            reason = error.strerror if isinstance(error, OSError) else "this is no host name"
            where = f"{settings['host'] or 'all interfaces'}, port {settings['port']}"
            raise CommandError(f"cannot listen on {where}: {reason}; see --host and --port") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        LOG.info("started: database=%s", store.path)
        announce(server)
        # An answer that takes long to compute cannot be called off. What was answered is on the disk, and so is what a
        # commit has written: an end in the middle of things loses nothing.
        last_resort = threading.Timer(EXIT_SECONDS, os._exit, [0])
        last_resort.daemon = True
        server.run(on_stop=last_resort.start)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # impatience must not change the exit code
    LOG.info("stopped")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Keep state for things that cannot keep it themselves: a key-value server.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"kvserver {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(
        name: str, run: Callable[[argparse.Namespace], None], text: str, settings: Sequence[Setting] = (DATABASE,)
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        for setting in settings:
            flag = "--" + setting.name.replace("_", "-")
            if setting is LOG_REQUESTS:
                command.add_argument(flag, action=argparse.BooleanOptionalAction, help=setting.help)
            else:
                command.add_argument(flag, type=setting.parse, metavar=setting.metavar, help=setting.help)
        return command

    command = add_command("serve", serve, "run the server", SETTINGS)
    command.add_argument("--config", metavar="FILE", help="JSON file with settings, named as these flags, _ for -")
    command = add_command("adduser", add_user, "add a user")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--admin", action="store_true", help="make the user an admin")
    command.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    command = add_command("passwd", set_password, "set a user's password")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    command = add_command("deluser", delete_user, "delete a user and all they stored")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--yes", action="store_true", help="do not ask, and delete even the last admin")
    add_command("users", list_users, "list the users")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 could not. Wrong usage exits with 2."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        return 0
    except (CommandError, BadCredential, StoreError, OSError) as error:
        message = str(error)
    except sqlite3.Error as error:
        message = f"the database failed: {error}"
    except (KeyboardInterrupt, EOFError):
        message = "interrupted; nothing was changed"
    print(f"kvserver: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
