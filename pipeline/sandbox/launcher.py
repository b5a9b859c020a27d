"""The process between Stillhouse and a sandboxed program: makes the namespaces, starts the program in them, kills it.

Started by ``process.py`` with three file descriptors, without site-packages and importing little, because it runs once for each
program. SPEC holds the order (with ``marshal``: json takes longer to import than all of this to run). On REPORT it says
``ready`` right before the program starts, or which step failed. It ends when every process of the sandbox is dead: when the
program has ended, at a byte or the end of CONTROL, or when Stillhouse dies.

Without bubblewrap: this process (outside) clones pid 1 of the new namespaces, which builds the file system, gives up its
capabilities, starts the program and reaps orphans. With bubblewrap: bwrap does that, and starts ``confine.py`` inside. When
started as root, two ids are mapped into the user namespace, so that the program's uid is an unprivileged one outside as well;
bwrap on its own would map it onto root.
"""

import ctypes
import marshal
import os
import select
import signal
import sys

from stillhouse.pipeline.sandbox.confine import (
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    PR_SET_SUBREAPER,
    at,
    become_nobody,
    become_program,
    check,
    finish,
    libc,
    prctl,
    read_all,
    report,
)

CLONE = {"x86_64": 56, "aarch64": 220}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
# Flags of a mount that a user namespace may not take away, as statvfs reports and as mount() takes them.
LOCKED_FLAGS = ((1, 1), (2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))
MNT_DETACH = 2
BACKSTOP_S = 60


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    arguments = (*texts, ctypes.c_ulong(flags), None if data is None else data.encode())
    check(libc.mount(*arguments), f"mount {target}")


def main(spec_fd: int, report_fd: int, control_fd: int) -> int:
    """Run the sandbox of the order and return the program's exit status, 128 + n where signal n ended it."""
    for fd in (spec_fd, report_fd, control_fd):
        os.set_inheritable(fd, False)
    spec = marshal.loads(read_all(spec_fd))
    prctl(PR_SET_SUBREAPER, 1)
    if spec["cgroup"]:
        at("join the cgroup")
        write_text(spec["cgroup"] + "/cgroup.procs", "0")
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    if spec["route"] == "own":
        at("create the namespaces")
        everything = NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
        child = start_in_namespaces(everything, spec, report_fd, lambda: first_process(spec, report_fd))
    elif spec["route"] == "bubblewrap" and spec["as_root"]:
        at("create the user namespace")
        child = start_in_namespaces(NEWUSER, spec, report_fd, lambda: run_bubblewrap(spec, spec_fd, report_fd))
    elif spec["route"] == "bubblewrap":
        child = start(report_fd, lambda: run_bubblewrap(spec, spec_fd, report_fd))
    else:
        child = start(report_fd, lambda: become_program(spec, report_fd))
    os.close(report_fd)
    status = wait(child, control_fd, waking, limit_s=spec["limits"]["wall_s"], namespaced=spec["route"] != "none")
    if spec["cgroup"]:  # here and not in the caller, which may have been killed
        write_text(os.path.dirname(spec["cgroup"]) + "/cgroup.procs", "0")
        try:
            os.rmdir(spec["cgroup"])
        except OSError:  # the kernel has not noticed yet that it is empty: the caller removes it
            return status
    return status


def wait(child: int, control_fd: int, waking: int, *, limit_s: float, namespaced: bool) -> int:
    """Wait for the program, or for the word to kill it; then until nothing of it is left."""
    events = select.poll()
    events.register(control_fd, select.POLLIN)
    events.register(waking, select.POLLIN)
    status = None
    while status is None:
        # The time-out is a backstop: the clock is the caller's, and CONTROL ends with it unless a fork of it lives on.
        for fd, _ in events.poll(1000 * (limit_s + BACKSTOP_S)) or [(control_fd, 0)]:
            if fd == control_fd:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                break
            os.read(waking, 4096)
            pid, ended = os.waitpid(child, os.WNOHANG)
            if pid:
                status = ended
                break
    while True:  # orphans come to us, the subreaper; those of a pid namespace are being killed with its pid 1
        if not namespaced:
            kill_descendants()
        try:
            os.wait()
        except ChildProcessError:
            return exit_status(status)


def kill_descendants() -> None:
    """Kill what a program without a pid namespace left behind; a fork meanwhile is met in the next round."""
    mine = {os.getpid()}
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(read_text(f"/proc/{name}/stat").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    while found := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= found
    for pid in mine - {os.getpid()}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def start(report_fd: int, body) -> int:
    """Fork a child that dies with this process and runs ``body``; what goes wrong in it is reported."""
    pid = os.fork()
    if pid == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        finish(report_fd, body)
    return pid


def start_in_namespaces(flags: int, spec: dict, report_fd: int, body) -> int:
    """Clone a child into new namespaces, give it its ids from outside, and let it run ``body``."""
    go_read, go_write = os.pipe()
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid = libc.syscall(
        ctypes.c_long(CLONE[os.uname().machine]), ctypes.c_ulong(flags | signal.SIGCHLD), *[ctypes.c_long(0)] * 4
    )
    number = ctypes.get_errno()
    if pid == 0:
        api.PyOS_AfterFork_Child()
        os.close(go_write)

        def begin():
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.read(go_read, 1) != b"g":
                os._exit(1)  # the parent could not map the ids, and has said so
            body()

        finish(report_fd, begin)
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number), "clone")
    at("map the ids of the user namespace")
    uid, inside = os.geteuid(), spec["uid"]
    if spec["as_root"]:
        users = groups = f"0 0 1\n{inside} {inside} 1\n"
    else:
        users, groups = f"{inside} {uid} 1\n", f"{inside} {os.getegid()} 1\n"
        write_text(f"/proc/{pid}/setgroups", "deny")
    write_text(f"/proc/{pid}/uid_map", users)
    write_text(f"/proc/{pid}/gid_map", groups)
    os.write(go_write, b"g")
    os.close(go_write)
    os.close(go_read)
    return pid


def first_process(spec: dict, report_fd: int) -> None:
    """Pid 1 of the sandbox: build what the program sees, give everything up, start the program, reap until it ends."""
    build_file_system(spec)
    at("set the host name")
    name = b"sandbox"
    check(libc.sethostname(name, len(name)), "sethostname")
    become_nobody(spec)
    prctl(PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a first process gets no signal from inside that it has no handler for
    program = start(report_fd, lambda: become_program(spec, report_fd))
    os.close(report_fd)
    for fd in (0, 1, 2):  # the program's pipes end with the program
        os.close(fd)
    while True:
        pid, status = os.wait()
        if pid == program:
            os._exit(exit_status(status))


def build_file_system(spec: dict) -> None:
    """Make a root of its own: a read-only tmpfs with the interpreter bound into it, and one writable tmpfs, ``/tmp``."""
    at("mount inside a user namespace")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={spec['stdin_bytes'] + (1 << 20)},mode=755")
    os.mkdir("/tmp/old")
    at("change the root")
    check(libc.syscall(ctypes.c_long(PIVOT_ROOT[os.uname().machine]), b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    for source, target in spec["read_only"]:
        at(f"show {source}")
        bind("/old" + source, target, MS_RDONLY | MS_NOSUID | MS_NODEV)
    for path in spec["masked"]:
        mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,mode=755")
    for path in spec["devices"]:
        at(f"show {path}")
        bind("/old" + path, path, MS_RDONLY | MS_NOSUID | MS_NOEXEC)  # the node; what is behind it takes writes
    if spec["stdin_bytes"]:
        at("show /dev/stdin")
        os.makedirs("/dev", exist_ok=True)
        with open("/dev/stdin", "wb", opener=lambda path, flags: os.open(path, flags, 0o444)) as file:
            file.write(read_all(0))
    at("make /tmp")
    os.mkdir("/tmp")
    size = spec["limits"]["disk_bytes"]
    mount(
        "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={size},nr_inodes={spec['limits']['files']},mode=1777"
    )
    os.symlink("/tmp", "/dev/shm")
    at("leave the old root")
    check(libc.umount2(b"/old", MNT_DETACH), "umount")
    os.rmdir("/old")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def bind(source: str, target: str, flags: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(source, target, None, MS_BIND | MS_REC)
    has = os.statvfs(target).f_flag
    locked = sum(flag for bit, flag in LOCKED_FLAGS if has & bit)
    mount("none", target, None, MS_REMOUNT | MS_BIND | flags | locked)


def run_bubblewrap(spec: dict, spec_fd: int, report_fd: int) -> None:
    at("start bubblewrap")
    limits = spec["limits"]
    command = [spec["bubblewrap"], "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    command += [
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--hostname",
        "sandbox",
    ]
    if spec["as_root"]:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    else:
        command += ["--unshare-user", "--uid", str(spec["uid"]), "--gid", str(spec["uid"])]
    parents = {os.path.dirname(path) for path in [*(target for _, target in spec["read_only"]), *spec["devices"]]}
    while more := {os.path.dirname(path) for path in parents} - parents:
        parents |= more
    for path in sorted(parents - {"/"}):  # bubblewrap makes missing ones for their owner only
        command += ["--perms", "755", "--dir", path]
    for source, target in spec["read_only"]:
        command += ["--ro-bind", source, target]
    for path in spec["masked"]:
        command += ["--tmpfs", path, "--remount-ro", path]
    for path in spec["devices"]:
        command += ["--dev-bind", path, path]  # bubblewrap cannot make one read-only and leave it a device
    if spec["stdin_bytes"]:  # opened anew: bubblewrap reads it to its end, and the program begins at its beginning
        copy = os.open("/proc/self/fd/0", os.O_RDONLY)
        os.set_inheritable(copy, True)
        command += ["--perms", "444", "--ro-bind-data", str(copy), "/dev/stdin"]
    command += ["--perms", "1777", "--size", str(limits["disk_bytes"]), "--tmpfs", "/tmp", "--symlink", "/tmp", "/dev/shm"]
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    with open(os.path.join(os.path.dirname(__file__), "confine.py")) as source:
        command += ["--", spec["python"], "-I", "-S", "-B", "-c", source.read(), str(spec_fd), str(report_fd)]
    for fd in (spec_fd, report_fd):
        os.set_inheritable(fd, True)
    os.execve(command[0], command, dict(spec["environment"]))


def read_text(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def launch() -> None:
    """Run what the command line says and end this process with the program's exit status."""
    spec_fd, report_fd, control_fd = map(int, sys.argv[1:4])
    status = 1
    try:
        status = main(spec_fd, report_fd, control_fd)
    except OSError as error:
        report(report_fd, error)
    finally:
        os._exit(status)
