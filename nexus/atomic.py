"""The one writer: a file or folder appears whole under its final name, or not at all; and the reader of given files."""

import contextlib
import ctypes
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

from nexus.errors import InputError, OutputError

CHUNK = 16 * 2**20
_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
_CAUSES = {
    errno.EACCES: "permission denied", errno.EPERM: "operation not permitted", errno.EROFS: "read-only file system",
    errno.EISDIR: "it is a folder", errno.ENOTDIR: "a part of its path is a file", errno.ENOENT: "its folder is gone",
    errno.ENAMETOOLONG: "the name is too long", errno.EMFILE: "too many open files", errno.EIO: "the disk failed",
    errno.EFBIG: "the file is too large for this file system or limit", errno.ELOOP: "too many symbolic links",
}
_seen: dict[str, dict[str, int]] = {}


def fault(point: str) -> None:
    """The hook of the reliability suite: NEXUS_FAULT=POINT:N[:kill|ERRNO] strikes before the N-th call at POINT.

    POINT is open, write, fsync, rename, link, unlink, a caller's own name, or any. Without the variable: nothing.
    """
    spec = os.environ.get("NEXUS_FAULT")
    if not spec:
        return
    counts = _seen.setdefault(spec, {})
    wanted, number, *how = spec.split(":")
    if wanted not in (point, "any"):
        return
    counts[wanted] = counts.get(wanted, 0) + 1
    if counts[wanted] != int(number):
        return
    if how and how[0] != "kill":
        code = getattr(errno, how[0])
        raise OSError(code, os.strerror(code))
    os.kill(os.getpid(), signal.SIGKILL)


def write_bytes(path: str | os.PathLike, data: bytes, *, exists: str = "error") -> Path:
    """Write a whole file; `exists` is "error" (never replaces, even in a race) or "overwrite". Raises OutputError."""
    with staged_file(path, exists=exists, size=len(data)) as file:
        file.write(data)
    return Path(path)


def write_text(path: str | os.PathLike, text: str, *, exists: str = "error") -> Path:
    """`write_bytes` of UTF-8 text."""
    return write_bytes(path, text.encode("utf-8"), exists=exists)


class _Staged(io.FileIO):
    """A binary file whose every write is complete and passes the fault hook."""

    written = 0

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            fault("write")
            done += super().write(view[done:done + CHUNK])
        self.written += done
        return done


@contextlib.contextmanager
def staged_file(path: str | os.PathLike, *, exists: str = "error", size: int = 0) -> Iterator[_Staged]:
    """A binary file to write to; it gets its final name, synced, when the block ends well, and else is removed.

    Missing parent folders are made. size: bytes about to be written, for the message of a full disk.
    """
    path = Path(path)
    with _explained(path, size):
        check_target(path, exists=exists)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()                          # left by a killed process that had our number
        fault("open")
        file = _Staged(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "r+b")
        try:
            with file:
                yield file
                fault("fsync")
                os.fsync(file.fileno())
            publish(temporary, path, exists=exists)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def staged_dir(path: str | os.PathLike, *, exists: str = "error") -> Iterator[Path]:
    """A temporary folder beside `path` to fill; all its files are synced and it is renamed when the block ends well.

    "overwrite" swaps the folders in one step where the system can (Linux), so a kill never leaves neither.
    """
    path = Path(path)
    with _explained(path):
        check_target(path, exists=exists, folder=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        shutil.rmtree(temporary, ignore_errors=True)
        fault("open")
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            _publish_dir(temporary, path, exists)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def publish(temporary: Path, path: Path, *, exists: str = "error") -> None:
    """Give a synced file its final name: link without replacing, or rename over; then sync the folder."""
    if exists == "overwrite":
        fault("rename")
        os.replace(temporary, path)
    else:
        fault("link")
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno == errno.EEXIST or not _renameat2(temporary, path, _NOREPLACE):
                raise
        else:
            fault("unlink")
            temporary.unlink()
    sync_dir(path.parent)


def _publish_dir(temporary: Path, path: Path, exists: str) -> None:
    fault("rename")
    if exists == "error":
        if not _renameat2(temporary, path, _NOREPLACE):
            os.rename(temporary, path)                  # fails by itself on a folder that is not empty
    elif not path.exists():
        os.rename(temporary, path)
    elif _renameat2(temporary, path, _EXCHANGE):
        shutil.rmtree(temporary)
    else:
        aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
        os.rename(path, aside)
        os.rename(temporary, path)
        shutil.rmtree(aside)
    sync_dir(path.parent)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename without replacing, or exchanging; False where kernel or file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(target))


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below `folder`, and give the files the mode that the umask asks for."""
    for root, _, names in os.walk(folder):
        mode = stat.S_IMODE(os.stat(root).st_mode) & 0o666
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fchmod(descriptor, mode)             # safetensors makes its files 0600
                fault("fsync")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_dir(Path(root))


def sync_dir(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fault("fsync")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):     # some network file systems sync no folder
            raise
    finally:
        os.close(descriptor)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add one line to a log in a single synced write; the torn line of a killed writer is closed off first."""
    path = Path(path)
    data = line.encode("utf-8") + b"\n"
    if b"\n" in data[:-1]:
        raise OutputError(f"cannot add a line with a line break to '{path}'")
    with _explained(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        fault("open")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            _append(descriptor, b"\n" + data if torn else data, size)
            fault("fsync")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _append(descriptor: int, data: bytes, size: int) -> None:
    fault("write")
    if os.write(descriptor, data) != len(data):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_records(path: str | os.PathLike) -> list[dict]:
    """The JSON objects of a line log, in order; torn or foreign lines are left out, a missing file is empty."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                records.append(value)
    return records


def check_target(path: str | os.PathLike, *, exists: str = "error", folder: bool = False) -> None:
    """OutputError at once if `path` could not be written: it exists, is of the wrong kind, or its folder is closed."""
    path = Path(path)
    kind = "folder" if folder else "file"
    with _explained(path):
        there = os.path.lexists(path)
        if there and exists == "error":
            raise OutputError(f"'{path}' exists already", hint=f"choose another name, or give -f to replace the {kind}")
        if there and folder and path.is_symlink():
            raise OutputError(f"cannot replace '{path}': it is a link", hint="name what it leads to, or remove it")
        if there and not (path.is_dir() if folder else path.is_file() or path.is_symlink()):
            raise OutputError(f"cannot replace '{path}': it is not a {kind}", hint="choose another name")
        above = path.parent
        while not os.path.lexists(above):
            above = above.parent
        if not above.is_dir():
            raise OutputError(f"cannot write '{path}': '{above}' is not a folder", hint="choose another place")
        if not os.access(above, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write '{path}': no permission in '{above}'", hint="choose another place with -o")


def clean_temporary(folder: str | os.PathLike) -> list[Path]:
    """Remove what killed writers left directly in `folder` (`.name.PID.tmp` of a process that is gone)."""
    removed = []
    for path in sorted(Path(folder).glob(".*.tmp")):
        pid = path.name.split(".")[-2]
        if not pid.isdecimal() or (int(pid) != os.getpid() and _alive(int(pid))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _temporary(path: Path) -> Path:
    name = os.fsdecode(os.fsencode(path.name)[:200])    # the longest legal name still has a legal temporary one
    return path.with_name(f".{name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _explained(path: Path, size: int = 0) -> Iterator[None]:
    """Turn what the system says into OutputError (code 6) naming the path and the cause."""
    try:
        yield
    except OSError as error:
        raise _explain(path, error, size) from error
    except ValueError as error:                         # a NUL in a path
        if "null" not in str(error):
            raise
        raise OutputError(f"cannot write {str(path)!r}: the name holds a NUL character") from error


def _explain(path: Path, error: OSError, size: int) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f"{size:,} bytes needed, " if size else ""
        return OutputError(f"cannot write '{path}': disk full ({needed}{_free(path):,} bytes free)",
                           hint="free some space and run the same command again")
    if error.errno == errno.EEXIST:
        return OutputError(f"'{path}' exists already", hint="choose another name, or give -f to replace it")
    cause = _CAUSES.get(error.errno) or error.strerror or str(error)
    return OutputError(f"cannot write '{path}': {cause}", hint="choose another place with -o")


def _free(path: Path) -> int:
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def read_given(source: str | os.PathLike | bytes, noun: str, most: int) -> bytes:
    """The bytes of a file that a user gave, at most `most` + 1 of them; of one in memory all.

    noun: what it should be ("picture"), for the InputError that says why it cannot be read.
    """
    if isinstance(source, bytes):
        return source
    try:
        if os.path.isdir(source):
            raise InputError(f"{source} is a folder, not a {noun}")
        if not os.path.isfile(source):
            raise InputError(f"there is no {noun} '{source}'", hint="check the path")
        with open(source, "rb") as file:
            return file.read(most + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{source}': {getattr(error, 'strerror', None) or error}") from None


def cache_folder(name: str) -> Path:
    """Where what can be made anew is kept: $NEXUS_HOME/cache/NAME, or below the platform's cache folder."""
    from platformdirs import user_cache_path
    home = os.environ.get("NEXUS_HOME")
    return (Path(home) / "cache" if home else user_cache_path("nexus")) / name
