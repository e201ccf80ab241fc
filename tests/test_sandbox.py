"""Code that a model wrote: hostile programs leave nothing outside, and ordinary ones run as they would anywhere."""

import contextlib
import glob
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from jaxemo.studies import sandbox

LINES = (pathlib.Path(__file__).parent / "data" / "hostile_snippets.jsonl").read_text(encoding="utf-8").splitlines()
SNIPPETS = {snippet["name"]: snippet["code"] for snippet in map(json.loads, LINES)}
SECRET = "of-the-hosts-environment"
HIDDEN = "assert solve(7) == 49"
SECONDS = 2.0

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

# What the file's snippets leave out: memory that is neither a process's nor a file's, other ways out, and programs that dodge a look.
MORE = {
    "memory-memfd": """
import os
held = []
for _ in range(40):
    held.append(os.memfd_create("block"))
    os.write(held[-1], b"x" * (15 << 20))
print("BREACH: 600 MB in no process and no folder")
""",
    "memory-shmget": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
for _ in range(4):
    number = libc.shmget(0, ctypes.c_size_t(200 << 20), 0o1600)
    if number < 0:
        raise SystemExit("refused")
    at = libc.shmat(number, None, 0)
    ctypes.memset(at, 1, 200 << 20)
    libc.shmdt(ctypes.c_void_p(at))
print("BREACH: 800 MB in segments")
""",
    "memory-mount": """
import ctypes
if ctypes.CDLL(None).unshare(0x10000000) == 0:
    print("BREACH: a namespace in which more may be mounted")
""",
    "files-together": """
for n in range(10):
    with open(f"{n}", "wb") as file:
        file.write(b"x" * (10 << 20))
print("BREACH: 100 MB of files")
""",
    "files-empty": """
for n in range(300_000):
    open(f"{n}", "w").close()
print("BREACH: inodes without limit")
""",
    "write-elsewhere": """
import os
for folder in ("/", "/dev", "/dev/shm", "/usr", "/usr/tmp", "/etc", "/proc/sys/kernel", os.path.dirname(os.__file__)):
    try:
        open(os.path.join(folder, "mark"), "w").close()
        print("BREACH: wrote to", folder)
    except OSError:
        pass
for folder in ("/", "/dev", "/usr", os.path.dirname(os.__file__)):
    if not os.statvfs(folder).f_flag & os.ST_RDONLY:
        print("BREACH: may be written to", folder)
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/1/oom_score_adj"):
    try:
        open(path, "a").close()
        print("BREACH: may write", path)
    except OSError:
        pass
""",
    "read-elsewhere": """
import os
for path in (VICTIM, "/etc/passwd", "/etc/shadow", "/etc/hostname", "/home", "/tmp/pytest-of-root", "/var", "/sys"):
    if os.path.lexists(path):
        print("BREACH: there is", path)
""",
    "import-elsewhere": """
for name in ("jaxemo", "numpy", "pytest"):
    try:
        __import__(name)
        print("BREACH: imported", name)
    except ImportError:
        pass
""",
    "sockets-of-other-kinds": """
import socket
for kind in ("INET", "INET6", "VSOCK", "NETLINK", "PACKET", "ALG", "BLUETOOTH"):
    try:
        socket.socket(getattr(socket, "AF_" + kind), socket.SOCK_DGRAM if kind != "ALG" else socket.SOCK_SEQPACKET)
        print("BREACH: a socket of", kind)
    except OSError:
        pass
""",
    "clone-namespace": """
import ctypes, os
libc = ctypes.CDLL(None)
libc.syscall.restype = ctypes.c_long
number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
child = libc.syscall(ctypes.c_long(number), ctypes.c_ulong(0x10000000 | 17), None, None, None, None)
if child == 0:
    os._exit(0)
if child > 0:
    print("BREACH: a child in a namespace of its own")
""",
    "become-root": """
import os
for change in (os.setuid, os.setgid):
    try:
        change(0)
        print("BREACH: became root")
    except OSError:
        pass
if os.getuid() == 0:
    print("BREACH: is root")
""",
    "comet": """
import os, time
if os.fork() == 0:
    os.setsid()
    while True:
        if os.fork():
            os._exit(0)
time.sleep(60)
""",
    "kill-all": """
import os, signal
for number in (1, -1):
    try:
        os.kill(number, signal.SIGKILL)
    except OSError:
        pass
""",
}

STOPPED = {
    "time": {"loop-python", "regex-backtracking", "swallows-timeout", "sleep-forever", "ignores-sigterm", "disarms-timers",
             "thread-after-end", "stops-itself", "comet"},
    "processes": {"fork-bomb", "thread-bomb", "zombies"},
    "output": {"stdout-flood", "stderr-flood", "output-no-newline"},
    "memory": {"subprocess-python"},
    "files": {"files-empty"},
}  # fmt: skip


class Host:
    """What a program must not reach, and the state that must be the same after it."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.victim, self.canary = folder, folder / "victim", folder / "home" / "jaxemo-sandbox-canary"
        self.canary.parent.mkdir()
        self.canary.write_text("jaxemo-sandbox-canary")
        self.victim.write_text("as it was")
        self.victim.chmod(0o640)
        (folder / "tests.py").write_text(HIDDEN)
        self.calls, self.datagrams = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for listener in (self.calls, self.datagrams):
            listener.bind(("127.0.0.1", self.calls.getsockname()[1]))
            listener.setblocking(False)
        self.calls.listen()

    def filled(self, code: str) -> str:
        host, port = self.calls.getsockname()
        for word, value in (("VICTIM", str(self.victim)), ("HOST", host), ("PORT", port)):
            code = re.sub(rf"\b{word}\b", lambda _, value=value: repr(value), code)
        return code

    def state(self) -> dict:
        limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
        return {
            "files": {str(path): path.read_bytes() if path.is_file() else None for path in self.folder.rglob("*")},
            "mode": os.stat(self.victim).st_mode if self.victim.exists() else None,
            "processes": {child.pid for child in psutil.Process().children(recursive=True)},
            "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
            "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "limits": [resource.getrlimit(getattr(resource, name)) for name in limits],
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "session": (os.getsid(0), os.getpgrp()),
            "descriptors": set(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "memory files": glob.glob("/dev/shm/jaxemo-*"),
        }

    def called(self) -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            self.calls.accept()[0].close()
            found.append("a call")
        with contextlib.suppress(BlockingIOError):
            found.append(f"a datagram {self.datagrams.recv(1000)!r}")
        return found


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEMO_SECRET", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made = Host(tmp_path)
    yield made
    made.calls.close()
    made.datagrams.close()


def namespace(pid: int) -> int:
    """A descriptor of the process namespace that `pid` lives in: while it is held, no other gets the same number."""
    return os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY)


def inhabited(held: int) -> bool:
    """Whether anything lives in the namespace, orphans too, which are nobody's children."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/ns/pid"):
        with contextlib.suppress(OSError):
            found.add(os.stat(path).st_ino)
    return os.fstat(held).st_ino in found


@pytest.fixture
def left(monkeypatch):
    """Says of each sandbox begun since the test began, or since it was asked last, whether anything lives in it."""
    held, start = [], sandbox._start

    def noting(*given):
        found = start(*given)
        held.append(namespace(psutil.Process(found[0].pid).children()[0].pid))
        assert inhabited(held[-1])
        return found

    def ask() -> list[bool]:
        answers = [inhabited(descriptor) for descriptor in held]
        while held:
            os.close(held.pop())
        return answers

    monkeypatch.setattr(sandbox, "_start", noting)
    return ask


@needs_bwrap
@pytest.mark.parametrize("name", [*SNIPPETS, *MORE])
def test_a_hostile_program_leaves_the_host_as_it_was(name, host, left):
    before = host.state()
    done = sandbox.run(host.filled((SNIPPETS | MORE)[name]), seconds=SECONDS)
    assert left() == [False]
    after = host.state()
    print(f"{done.seconds:.2f} s, status {done.status}, stopped {done.stopped!r}: {done.output[-300:]}")
    assert after == before
    assert not host.called()
    assert "BREACH" not in done.output and SECRET not in done.output and "JAXEMO_SECRET" not in done.output
    assert HIDDEN not in done.output and "\x1b" not in done.output and len(done.output) <= sandbox.OUTPUT
    assert {name} & set().union(*STOPPED.values()) <= STOPPED.get(done.stopped, set())
    assert done.files == {}
    ordinary = sandbox.run("print(6 * 7)")
    assert (ordinary.output, ordinary.status, ordinary.stopped) == ("42\n", 0, "")


@pytest.mark.parametrize("name", ["delete-outside", "write-outside", "ctypes-syscall", "unpickle", "connect", "dns"])
def test_what_hostile_programs_do_would_be_seen(name, host):
    """Outside the sandbox, each does what the test above looks for."""
    before = host.state()
    subprocess.run(
        [sys.executable, "-c", host.filled(SNIPPETS[name])], cwd=host.folder, capture_output=True, timeout=30
    )
    assert host.state() != before or host.called()


@needs_bwrap
@pytest.mark.skipif(os.geteuid() != 0, reason="all tests here are an ordinary user's")
def test_an_ordinary_user_is_as_safe_as_root(host):
    """Whose programs have no other user to become: they are one with the sandbox's first process."""
    names = [
        "parent-environ",
        "parent-memory",
        "ptrace-parent",
        "kill-parent",
        "fork-bomb",
        "raise-limits",
        "delete-scratch",
    ]
    codes = {name: SNIPPETS[name] for name in names} | MORE
    script = f"""
import json, sys
given = json.load(sys.stdin)
scope = {{"__name__": "sandbox"}}
exec(given["module"], scope)
print(json.dumps({{name: scope["run"](code, seconds={SECONDS}).output for name, code in given["codes"].items()}}))
"""
    given = {
        "module": pathlib.Path(sandbox.__file__).read_text(),
        "codes": {k: host.filled(v) for k, v in codes.items()},
    }
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):  # root's own, or missing
            done = subprocess.run(
                [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], user=65534, cwd="/"
            )
            if done.returncode == 0:
                break
    else:
        pytest.skip("no Python that an ordinary user may run")
    done = subprocess.run([python, "-c", script], input=json.dumps(given), text=True, capture_output=True, user=65534, group=65534,
                          extra_groups=[], cwd="/")  # fmt: skip
    assert done.returncode == 0, done.stderr
    outputs = json.loads(done.stdout)
    assert list(outputs) == list(codes) and not {name: text for name, text in outputs.items() if "BREACH" in text}


@needs_bwrap
def test_environments_have_what_was_set_alone(host):
    own = sandbox.run(SNIPPETS["own-environ"]).output.splitlines()
    assert own == [f"environment has {name}" for name in ("HOME", "PATH", "LANG")]
    first = sandbox.run(SNIPPETS["parent-environ"]).output
    assert set(re.findall("parent has (.*)", first)) <= {"", "PWD"}


@needs_bwrap
def test_an_ordinary_program_runs_as_anywhere():
    code = """
import asyncio, json, os, socket, sys, tempfile, subprocess, threading
print("größer €", "😀", sep="\\t")
print("a warning", file=sys.stderr)
print(json.dumps(sorted(os.listdir("."))), sys.argv, __name__)
with tempfile.TemporaryFile("w+") as file:
    print(file.write("text"))
threads = [threading.Thread(target=print, args=("thread",)) for _ in range(20)]
for thread in threads:
    thread.start()
    thread.join()
print(subprocess.run([sys.executable, "-c", "print(2 ** 10)"], capture_output=True, text=True).stdout, end="")
print(repr(sys.stdin.read()), sorted(os.listdir("/proc/self/fd")))
one, other = socket.socketpair()
one.send(b"through")
print(other.recv(10), asyncio.run(asyncio.sleep(0.01, "later")))
sys.exit(3)
"""
    done = sandbox.run(code, files={"given.txt": "text"})
    assert done.output == (
        "größer €\t😀\na warning\n[\"given.txt\"] ['/tmp/program.py'] __main__\n4\n"
        + "thread\n" * 20
        + "1024\n'' ['0', '1', '2', '3']\nb'through' later\n"
    )
    assert (done.status, done.stopped, done.files) == (3, "", {"given.txt": "text"})


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("print('ü', '\\ud800'.encode('utf-8', 'replace'))", 0, "ü b'?'\n"),
        ("print('\ud800')", 1, "SyntaxError"),
        ("x = 1\0", 1, "null bytes"),
        ("x = 1\n" * 100_000 + "print(x)", 0, "1\n"),
        ("", 0, ""),
        ("def f():\n    return 1 / 0\nf()\n", 1, "    return 1 / 0\n"),
        ("import os; os.abort()", 128 + signal.SIGABRT, ""),
        ("import os; os._exit(77)", 77, ""),
    ],
    ids=range(8),
)
def test_any_text_is_a_program(code, status, says):
    done = sandbox.run(code)
    assert (done.status, done.stopped) == (status, "") and says in done.output


@needs_bwrap
def test_limits():
    late = sandbox.run("print('before')\nimport time\ntime.sleep(60)", seconds=1.0)
    assert (late.output, late.status, late.stopped) == ("before\n", 128 + signal.SIGKILL, "time")

    hold = "block = b'x' * ({} << 20)\nimport time\ntime.sleep({})\nprint('held')"
    assert sandbox.run(hold.format(150, 0.2), memory=256 << 20).output == "held\n"
    assert sandbox.run(hold.format(300, 60), memory=256 << 20).stopped == "memory"
    assert "MemoryError" in sandbox.run(hold.format(3000, 60), memory=256 << 20).output
    children = f"import os\nos.fork()\nos.fork()\n{hold.format(100, 60)}"
    assert sandbox.run(children, memory=256 << 20).stopped == "memory"

    for more in (0, 1):
        done = sandbox.run(f"print('x' * {sandbox.OUTPUT - 1 + more})")
        assert (done.stopped, len(done.output)) == (("", "output")[more], sandbox.OUTPUT)
    assert sandbox.run("open('big', 'wb').write(b'x' * (20 << 20))").output.count("OSError") == 1
    threads = """
import threading, time
threading.stack_size(1 << 18)
for _ in range({}):
    threading.Thread(target=time.sleep, args=({},)).start()
"""
    assert sandbox.run(threads.format(50, 0.3)).stopped == ""
    assert sandbox.run(threads.format(100, 30)).stopped == "processes"


@needs_bwrap
def test_between_two_looks_the_kernel_limits(monkeypatch):
    monkeypatch.setattr(sandbox, "_beyond", lambda *_: "")
    forks = """
import os, time
try:
    for n in range(1000):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
except OSError:
    pass
print(n)
"""
    assert 1 < int(sandbox.run(forks).output) < 2 * sandbox.TASKS
    threads = """
import threading, time
threading.stack_size(1 << 16)
try:
    for n in range(1000):
        threading.Thread(target=time.sleep, args=(0.5,)).start()
except RuntimeError:
    print(n)
"""
    assert 1 < int(sandbox.run(threads).output) < 2 * sandbox.TASKS
    assert "MemoryError" in sandbox.run("block = b'x' * (1200 << 20)").output


@needs_bwrap
def test_files_are_read_back_as_they_were_left(host):
    names = ("kept", "edited.py", "deleted", "linked", "hard", "folder", "pipe", "long", "binary", "locked")
    code = """
import os
open("edited.py", "a").write("more ü")
for name in ("deleted", "linked", "hard", "folder", "pipe"):
    os.remove(name)
os.symlink(VICTIM, "linked")
os.symlink("kept", "hard")
os.mkdir("folder")
os.mkfifo("pipe")
open("long", "w").write("x" * (3 << 20))
open("binary", "wb").write(b"\\xff\\0")
open("other", "w").write("not asked for")
os.chmod("kept", 0o400)
"""
    done = sandbox.run(host.filled(code), files={name: f"{name} € \n" for name in names})
    assert (done.output, done.status) == ("", 0)
    assert done.files == {
        "kept": "kept € \n", "edited.py": "edited.py € \nmore ü", "long": "x" * sandbox.TEXT, "binary": "\ufffd\0",
        "locked": "locked € \n",
    }  # fmt: skip
    stopped = sandbox.run("open('a', 'w').write('new')\nwhile True: pass", seconds=1.0, files={"a": "old"})
    assert (stopped.stopped, stopped.files) == ("time", {"a": "new"})


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/etc/passwd", "a\0b", "ü", ".hidden", "a\n", "x" * 200]
)
def test_names_of_files_are_plain(name):
    with pytest.raises(ValueError, match="no plain name"):
        sandbox.run("", files={name: ""})


def test_without_bubblewrap_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs bubblewrap.*apt install bubblewrap"):
        sandbox.run("print(1)")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no leave to make namespaces\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(RuntimeError, match=r"needs bubblewrap.*Here it failed: .*no leave to make namespaces"):
        sandbox.run("print(1)")


@needs_bwrap
def test_a_sandbox_that_does_not_begin_is_an_error(monkeypatch, host):
    before = host.state()
    monkeypatch.setattr(sandbox, "FIRST", "raise SystemExit('not today')")
    with pytest.raises(RuntimeError, match=r"bubblewrap.*Here it failed: not today"):
        sandbox.run("print(1)")
    monkeypatch.setattr(sandbox, "FIRST", "import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "START", 0.5)
    with pytest.raises(RuntimeError, match=r"bubblewrap.*Here it failed"):
        sandbox.run("print(1)")
    assert host.state() == before


@needs_bwrap
def test_an_interrupt_leaves_nothing(monkeypatch, host, left):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = host.state()
    monkeypatch.setattr(sandbox, "_beyond", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sandbox.run("import time; time.sleep(60)")
    assert left() == [False] and host.state() == before


@needs_bwrap
def test_the_end_of_who_runs_it_is_the_end_of_the_program():
    code = f"import runpy; runpy.run_path({sandbox.__file__!r})['run']('import time; time.sleep(60)', seconds=60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    end, programs = time.monotonic() + 30, []
    while not programs and time.monotonic() < end:
        below = psutil.Process(parent.pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            programs = [process.pid for process in below if "/tmp/program.py" in process.cmdline()]
        time.sleep(0.05)
    held = namespace(programs[0])
    parent.kill()
    parent.wait()
    while inhabited(held) and time.monotonic() < end:
        time.sleep(0.05)
    assert not inhabited(held)
    os.close(held)


@needs_bwrap
def test_several_run_at_once(host, left):
    before = host.state()
    with ThreadPoolExecutor(4) as pool:
        codes = [f"open('n', 'w').write('{n}')\nprint(open('n').read())" for n in range(8)]
        outputs = list(pool.map(lambda code: sandbox.run(code).output, codes))
    assert outputs == [f"{n}\n" for n in range(8)] and left() == [False] * 8
    assert host.state() == before
