"""The doctor's measurements of a disk, of ports and of the network. Used by `doctor`."""

import fcntl
import os
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

GIB = 2**30
SIZE = 64 * 2**20  # bytes that are written and read
PATIENCE = 4.0  # seconds for a name and its server to answer
Said = tuple[Literal["ok", "warning", "problem"], str, str]


def disk(folder: Path) -> Iterator[Said]:
    """Speed with fsync, free space and locks of the file system of an existing folder."""
    data = os.urandom(SIZE)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kalmagrove-doctor-") as file:
            yield _speed(file, data)
            if not _locks(file.name):
                rule = "the file system has no locks: two runs into one folder are not noticed"
                yield "warning", rule, "mount it with locks (NFS: nfsvers=4; Lustre: -o flock)"
    except OSError as error:
        yield "problem", f"cannot be written ({error.strerror})", "check rights and free space"
    free = shutil.disk_usage(folder).free / GIB
    if free < 10:
        level: Literal["warning", "problem"] = "problem" if free < 1 else "warning"
        yield level, f"{free:.1f} GiB free", "make room, or choose another dir or data.cache"
    else:
        yield "ok", f"{free:,.0f} GiB free", ""


def _speed(file: "IO[bytes]", data: bytes) -> Said:
    start = time.perf_counter()
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
    wrote = len(data) / (time.perf_counter() - start) / 1e6
    if hasattr(os, "posix_fadvise"):  # read from the disk, not from memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    file.seek(0)
    same = file.read() == data
    read = len(data) / (time.perf_counter() - start) / 1e6
    if not same:
        return "problem", "gives back other bytes than were written", "do not use this disk"
    text = f"writes {wrote:,.0f} MB/s with fsync, reads {read:,.0f} MB/s"
    if wrote < 50:
        return "warning", text, "checkpoints will take long; choose a faster disk"
    return "ok", text, ""


def _locks(path: str) -> bool:
    """Whether a second open of a locked file is refused the lock."""
    with open(path, "rb") as first, open(path, "rb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def clock_offset(folder: Path) -> float:
    """Seconds by which the file system's clock is ahead of this machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kalmagrove-doctor-") as file:
        before = time.time()
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        after, theirs = time.time(), os.stat(file.name).st_mtime
    return theirs - min(max(theirs, before), after)


def ports() -> Iterator[Said]:
    """Whether ranks could meet: at this machine itself, and by its name."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        try:
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
        except OSError as error:
            text = f"no connection to this machine itself ({error.strerror or error})"
            yield "problem", text, "a firewall forbids it: ranks cannot meet"
            return
        name = socket.gethostname()
        try:
            socket.create_connection((name, port), PATIENCE).close()
        except OSError as error:
            text = f"{name}, this machine's name, does not lead here ({error.strerror or error})"
            advice = "for runs over several machines: mend /etc/hosts, or set MASTER_ADDR"
            yield "warning", text, advice
        else:
            yield "ok", f"open on this machine, also by its name {name}", ""


def network(places: dict[str, str]) -> dict[str, bool]:
    """Whether servers, by name and address, answer at all; asked side by side."""
    reached = dict.fromkeys(places, False)

    def ask(name: str) -> None:
        reached[name] = answers(places[name])

    # Looking up a name has no timeout of its own: threads that may be left behind.
    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in places]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(reached)


def answers(url: str) -> bool:
    """Whether a HEAD request gets any answer."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=PATIENCE).close()
    except urllib.error.HTTPError:  # an answer
        return True
    except (OSError, ValueError):
        return False
    return True
