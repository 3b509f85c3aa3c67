"""Whole or not at all: under every error at every system call, under a kill at every system call, in a race."""

import errno
import itertools
import os
import signal
import stat
from functools import partial

import pytest

from nexus import atomic
from nexus.errors import OutputError

OLD, NEW = b"old" * 1000, b"new" * 2000
ERRORS = ("ENOSPC", "EACCES", "EROFS", "EMFILE", "EIO", "EFBIG")


def write_file(folder, exists):
    atomic.write_bytes(folder / "a.bin", NEW, exists=exists)


def write_folder(folder, exists):
    with atomic.staged_dir(folder / "d", exists=exists) as staged:
        atomic.write_bytes(staged / "a.bin", NEW)
        atomic.write_bytes(staged / "sub" / "b.bin", NEW)


def states(folder):
    """(what stands at the file, what stands at the folder): "none", "old", "new" or "torn"."""
    def kind(path):
        if not path.exists():
            return "none"
        data = path.read_bytes()
        return {OLD: "old", NEW: "new"}.get(data, "torn")
    return kind(folder / "a.bin"), kind(folder / "d" / "a.bin"), kind(folder / "d" / "sub" / "b.bin")


def prepare(folder, old):
    if old:
        (folder / "a.bin").write_bytes(OLD)
        (folder / "d" / "sub").mkdir(parents=True)
        for name in ("a.bin", "sub/b.bin"):
            (folder / "d" / name).write_bytes(OLD)


CASES = [(write_file, "error", False), (write_file, "overwrite", False), (write_file, "overwrite", True),
         (write_folder, "error", False), (write_folder, "overwrite", False), (write_folder, "overwrite", True)]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("act,exists,old", CASES)
def test_an_error_at_any_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, act, exists, old, error):
    struck = 0
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder, old)
        monkeypatch.setenv("NEXUS_FAULT", f"any:{number}:{error}")
        atomic._seen.clear()
        try:
            act(folder, exists)
        except OutputError as caught:
            struck += 1
            assert str(folder) in str(caught) and caught.code == 6 and caught.hint
        else:
            assert atomic._seen[f"any:{number}:{error}"]["any"] < number
            break
        finally:
            monkeypatch.delenv("NEXUS_FAULT")
        assert "torn" not in states(folder)
        assert not list(folder.rglob(".*.tmp"))
    assert struck >= 4


@pytest.mark.parametrize("act,exists,old", CASES)
def test_a_kill_at_any_call_leaves_the_old_or_the_new(tmp_path, act, exists, old):
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder, old)
        if not killed(partial(act, folder, exists), f"any:{number}:kill"):
            break
        index = 0 if act is write_file else 1
        allowed = {"old", "new"} if old else {"none", "new"}
        assert states(folder)[index] in allowed
        assert states(folder)[1] == states(folder)[2] or act is write_file
        atomic.clean_temporary(folder)
        assert not list(folder.rglob(".*.tmp"))
        act(folder, "overwrite")                        # the same command again
        assert states(folder)[index] == "new"
    assert number >= 5


def killed(act, spec) -> bool:
    """Whether a forked child running `act` under the fault was killed by it."""
    child = os.fork()
    if child == 0:
        os.environ["NEXUS_FAULT"] = spec
        atomic._seen.clear()
        try:
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_full_disk_says_how_much_is_needed_and_free(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_FAULT", "write:1:ENOSPC")
    atomic._seen.clear()
    with pytest.raises(OutputError, match=r"disk full \(6,000 bytes needed, [\d,]+ bytes free\)"):
        write_file(tmp_path, "error")


@pytest.mark.parametrize("umask", (0o022, 0o027, 0o077))
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path, "error")
        with atomic.staged_dir(tmp_path / "d") as staged:
            os.close(os.open(staged / "a.bin", os.O_CREAT, 0o600))
        atomic.append_line(tmp_path / "log", "x")
    finally:
        os.umask(before)
    for path in (tmp_path / "a.bin", tmp_path / "d" / "a.bin", tmp_path / "log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o777 & ~umask


def test_an_existing_file_is_never_replaced_in_a_race(tmp_path):
    children = []
    for number in (1, 2):                               # two processes, so that their temporary names differ
        child = os.fork()
        if child == 0:
            try:
                atomic.write_bytes(tmp_path / "a", bytes([number]) * 1000)
                os._exit(0)
            except OutputError:
                os._exit(6)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 6]
    assert len(set((tmp_path / "a").read_bytes())) == 1


@pytest.mark.parametrize("path,why", [
    ("\0", "NUL"), ("x" * 300, "too long"), ("file/b", "is not a folder"), ("folder", "exists already"), ("file",
                                                                                                          "exists"),
])
def test_impossible_targets(tmp_path, path, why):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=why):
        atomic.write_bytes(tmp_path / path, NEW)


@pytest.mark.parametrize("path", ("/dev/null", "/dev/full"))
def test_devices_are_not_replaced(path):
    with pytest.raises(OutputError, match="not a file"):
        atomic.write_bytes(path, NEW, exists="overwrite")


def test_names_of_the_longest_legal_length(tmp_path):
    assert atomic.write_bytes(tmp_path / ("x" * 255), NEW).read_bytes() == NEW


def test_an_error_of_the_caller_passes_through_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic.staged_file(tmp_path / "a") as file:
        file.write(NEW)
        raise KeyError
    with pytest.raises(ZeroDivisionError), atomic.staged_dir(tmp_path / "d") as folder:
        (folder / "a").write_bytes(NEW)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_append_after_a_torn_line(tmp_path):
    log = tmp_path / "log.jsonl"
    atomic.append_line(log, '{"a": 1}')
    with open(log, "ab") as file:
        file.write(b'{"b": ')
    assert atomic.read_records(log) == [{"a": 1}]
    atomic.append_line(log, '{"c": 3}')
    assert atomic.read_records(log) == [{"a": 1}, {"c": 3}]
    with pytest.raises(OutputError):
        atomic.append_line(log, "two\nlines")


def test_a_kill_at_any_call_of_append_keeps_the_lines_before(tmp_path):
    log = tmp_path / "log.jsonl"
    atomic.append_line(log, '{"n": 0}')
    for number in itertools.count(1):
        if not killed(lambda: atomic.append_line(log, '{"n": 1}'), f"any:{number}:kill"):
            break
        assert atomic.read_records(log)[0] == {"n": 0}
    assert atomic.read_records(log)[-1] == {"n": 1} and number >= 4


def test_appending_processes_lose_no_line(tmp_path):
    children = []
    for worker in range(4):
        child = os.fork()
        if child == 0:
            for number in range(25):
                atomic.append_line(tmp_path / "log", f'{{"w": {worker}, "n": {number}}}')
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = {(r["w"], r["n"]) for r in atomic.read_records(tmp_path / "log")}
    assert found == set(itertools.product(range(4), range(25)))


def test_records_of_a_foreign_file(tmp_path):
    (tmp_path / "log").write_bytes(b'[1]\n{"a": 1}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"b": 2}')
    assert atomic.read_records(tmp_path / "log") == [{"a": 1}, {"b": 2}]
    assert atomic.read_records(tmp_path / "none") == []


def test_cleaning_spares_the_living(tmp_path):
    for name in (".a.999999999.tmp", f".b.{os.getpid()}.tmp", ".c.1.tmp", ".d.x.tmp", "e.999999999.tmp"):
        (tmp_path / name).write_bytes(b"")
    removed = {path.name for path in atomic.clean_temporary(tmp_path)}
    assert removed == {".a.999999999.tmp", f".b.{os.getpid()}.tmp"}


def test_a_fault_with_a_number_of_its_own(monkeypatch):
    monkeypatch.setenv("NEXUS_FAULT", "step:2:EIO")
    atomic._seen.clear()
    atomic.fault("write")
    atomic.fault("step")
    with pytest.raises(OSError) as caught:
        atomic.fault("step")
    assert caught.value.errno == errno.EIO
    atomic.fault("step")
