"""Python that a language model wrote, run where it can do no harm: in bubblewrap's namespaces, within limits, with an end that it
cannot outlive.

A program finds the standard library and the system's own programs, read-only, and a folder that is memory; no network, no other file,
no environment and no process but its own. What it uses is watched from outside. It runs on the same kernel, so a hole in that is one
here. What a program prints and how it ends are its own word: whether it solved a task is not judged here.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import platform
import re
import secrets
import select
import shutil
import signal
import site
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Mapping

OUTPUT = 64 << 10  # bytes printed
TASKS = 64  # processes and threads, of all together
FOLDER = 16 << 20  # bytes of all files
FILES = 4096
TEXT = 1 << 20  # bytes of a file that is read back
LOOK = 20  # milliseconds between two looks at what is used
START = 60.0  # seconds until the program begins, at most
NEEDED = (
    "running code that a model wrote needs bubblewrap, 0.7 or later, with leave to make namespaces: install it "
    "(apt install bubblewrap, dnf install bubblewrap)"
)

# Calls that give memory which no limit counts, or namespaces in which it may be had, and their numbers on the machines.
REFUSED = ("shmget", "msgget", "semget", "memfd_create", "memfd_secret", "add_key", "io_uring_setup", "unshare")
MACHINES = {  # the kernel's name, the numbers, and those of clone and socket
    "x86_64": (0xC000003E, (29, 68, 64, 319, 447, 248, 425, 272), 56, 41),
    "aarch64": (0xC00000B7, (194, 186, 190, 279, 447, 217, 425, 97), 220, 198),
}

# The sandbox's first process, whose end is the end of all others. It hands out what they are watched by, and begins the program at a
# word. The program is nobody's where this is root, whose processes the kernel does not limit; and it is limited from here, since
# outside all the processes of the user would count.
FIRST = """
import ctypes, json, os, resource, signal, socket, sys
given, channel = json.load(sys.stdin), socket.socket(fileno=int(sys.argv[1]))
watched = [os.open(".", os.O_RDONLY), os.open("/proc", os.O_RDONLY), os.pidfd_open(1)]
with open("/proc/self/oom_score_adj", "w") as score:
    score.write("1000")  # should the machine's memory run out all the same, this goes before others
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: the program may not look into this process
if child := os.fork():
    os.closerange(0, 1 << 20)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:  # orphans are waited for as well
        pid, status = os.wait()
        if pid == child:
            status = os.waitstatus_to_exitcode(status)
            os._exit(status if status >= 0 else 128 - status)
if user := given["user"]:
    os.chown(".", user, user)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
for name, text in given["files"].items():
    with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)
for name, most in given["limits"].items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
socket.send_fds(channel, [b"."], watched)
if not channel.recv(1):
    sys.exit("nobody is there to watch")
channel.detach()
os.closerange(3, 1 << 20)
environment = {"HOME": "/nonexistent", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
os.execve(sys.executable, [sys.executable, "-I", "-u", "/tmp/program.py"], environment)
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of a program: `output`, both streams as one, cut at 64 KiB, with U+FFFD for what is no text; its exit `status`, 128
    more than the signal that ended it; the limit it was `stopped` at ("time", "memory", "processes", "output", "files", or "" for
    none); and those of the `files` given to it that are still there, as it left them, cut at 1 MiB."""

    output: str
    status: int
    stopped: str
    seconds: float
    files: dict[str, str]


def run(code: str, *, seconds: float = 10.0, memory: int = 512 << 20, files: Mapping[str, str] | None = None) -> Run:
    """Run `code` as a program, for at most `seconds` of the wall and with `memory` bytes for all its processes. `files` (names and
    texts) lie in the folder it begins in, where it may change them.

    Raises RuntimeError where bubblewrap is missing or may not make namespaces, since nothing is ever run without it, and ValueError
    for a name that is not plain.
    """
    files = files or {}
    if bad := [name for name in files if not re.fullmatch(r"(?!\.)[A-Za-z0-9_.-]{1,100}", name)]:
        raise ValueError(f"{bad[0]!r} is no plain name of a file; use letters, digits, '_', '-' and '.'")
    limits = {
        "AS": 2 * memory, "CPU": math.ceil(seconds) * (os.cpu_count() or 1), "FSIZE": FOLDER, "NOFILE": 64, "CORE": 0,
        "NPROC": 2 * TASKS,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        process, channel, (folder, processes, first) = _start(stack, {**files, "../program.py": code}, limits)
        assert process.stdout
        printed, written, stopped, end = process.stdout.fileno(), b"", "", select.poll()
        os.set_blocking(printed, False)
        end.register(first, select.POLLIN)
        begin = time.monotonic()
        try:
            channel.send(b".")
            while not stopped and not end.poll(LOOK):
                written += _read(printed)
                stopped = _beyond(folder, processes, memory)
                if len(written) > OUTPUT:
                    stopped = "output"
                elif time.monotonic() - begin > seconds:
                    stopped = "time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(first, signal.SIGKILL)
            status = process.wait()  # the kernel ends all others before the first
        spent = time.monotonic() - begin
        while len(written) <= OUTPUT and (part := _read(printed)):
            written += part
        left = {name: text for name in files if (text := _text(folder, name)) is not None}
    if len(written) > OUTPUT:
        stopped = stopped or "output"
    # no codes that a terminal would obey
    output = re.sub(r"[^\t\n -~\xa0-\U0010ffff]", "\ufffd", written[:OUTPUT].decode(errors="replace"))
    return Run(output, status, stopped, spent, left)


def _start(
    stack: contextlib.ExitStack, files: Mapping[str, str], limits: Mapping[str, int]
) -> tuple[subprocess.Popen[bytes], socket.socket, list[int]]:
    """The sandbox, which ends with `stack`, its program about to begin: where to give the word, and descriptors of its folder, of its
    /proc and of its first process."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise RuntimeError(NEEDED)
    if platform.machine() not in MACHINES:
        raise RuntimeError(f"no code is run on {platform.machine()}, only on {' and '.join(MACHINES)}")
    with open("/proc/self/uid_map") as users:  # in some containers 0 is not the kernel's root
        root = os.geteuid() == 0 and users.read().split() == ["0", "0", "4294967295"]
    given = {"user": (1 << 30) + secrets.randbelow(1 << 29) if root else 0, "files": dict(files), "limits": limits}
    ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
    text, rules = (stack.enter_context(os.fdopen(os.memfd_create("jaxemo"), "w+b", 0)) for _ in range(2))
    for file, content in ((text, json.dumps(given).encode()), (rules, _rules())):
        file.write(content)
        file.seek(0)
    caps = ("--cap-add", "CAP_CHOWN", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    python = os.path.join(sys.base_exec_prefix, "bin", f"python3.{sys.version_info.minor}")
    seen = {"/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", sys.base_prefix, sys.base_exec_prefix}
    packages = {*site.getsitepackages(), *site.getsitepackages([sys.base_prefix])}  # hidden: jaxemo's tasks are there
    command = [
        bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1",
        "--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL", *(caps if root else ("--unshare-user",)),
        "--seccomp", str(rules.fileno()),
        *(part for path in sorted(seen) if os.path.exists(path)
          for part in ("--dir", os.path.dirname(path), "--ro-bind", path, path)),
        *(part for path in sorted(packages) if os.path.isdir(path) for part in ("--tmpfs", path, "--remount-ro", path)),
        "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--perms", "1777", "--size", str(FOLDER), "--tmpfs", "/tmp",
        "--dir", "/tmp/scratch", "--chdir", "/tmp/scratch", "--remount-ro", "/",
        python, "-I", "-S", "-c", FIRST, str(theirs.fileno()),
    ]  # fmt: skip
    process = stack.enter_context(
        subprocess.Popen(
            command, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", env={}, start_new_session=True,
            pass_fds=(theirs.fileno(), rules.fileno()),
        )
    )  # fmt: skip
    stack.callback(process.kill)
    theirs.close()
    ours.settimeout(START)
    watched: list[int] = []
    with contextlib.suppress(TimeoutError):
        watched = socket.recv_fds(ours, 1, 3)[1]
    for descriptor in watched:
        stack.callback(os.close, descriptor)
        os.set_inheritable(descriptor, False)
    if len(watched) < 3:
        process.kill()
        said = process.communicate()[0].decode(errors="replace").strip()
        raise RuntimeError(f"{NEEDED}. Here it failed: {said or 'no word of it'}")
    return process, ours, watched


def _rules() -> bytes:
    """For the kernel (seccomp): which calls fail. One in the manner of another machine is the end of the process."""
    load, equal, at_least, holds, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, end = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000)
    refuse, missing = ((give, 0, 0, 0x00050000 | number) for number in (errno.EPERM, errno.ENOSYS))
    machine, numbers, clone, network = MACHINES[platform.machine()]
    lines = [(load, 0, 0, 4), (equal, 1, 0, machine), end, (load, 0, 0, 0), (at_least, 0, 1, 1 << 30), refuse]
    for number in numbers:
        lines += [(equal, 0, 1, number), refuse]
    # clone3, whose flags cannot be looked at, is said to be missing; clone may not make a user namespace (CLONE_NEWUSER)
    lines += [(equal, 0, 1, 435), missing]
    lines += [(equal, 0, 4, clone), (load, 0, 0, 16), (holds, 0, 1, 1 << 28), refuse, allow]
    # sockets are AF_UNIX's alone: others reach, without any network, from a virtual machine to its host
    lines += [(equal, 0, 3, network), (load, 0, 0, 16), (equal, 1, 0, 1), refuse, allow]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _beyond(folder: int, processes: int, memory: int) -> str:
    """Which limit all processes of the sandbox are beyond, together."""
    tasks, held = 0, 0
    for name in filter(str.isdigit, os.listdir(processes)):
        with contextlib.suppress(OSError):  # it has just ended
            with open(os.open(f"{name}/stat", os.O_RDONLY, dir_fd=processes), "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            tasks, held = tasks + int(fields[17]), held + int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    if tasks > TASKS:
        return "processes"
    space = os.fstatvfs(folder)
    return "memory" if held > memory else "files" if space.f_files - space.f_ffree > FILES else ""


def _read(descriptor: int) -> bytes:
    """What is there to be read now, a little over OUTPUT at most."""
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, OUTPUT + 1)
    return b""


def _text(folder: int, name: str) -> str | None:
    """A file's text; None for what is gone or no longer a plain file. The program may have put a link to a file of ours there."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    try:
        return (
            os.read(descriptor, TEXT).decode(errors="replace") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
        )
    finally:
        os.close(descriptor)
