"""The last steps before a sandboxed program starts, in the process that becomes it: ids, files, limits, Landlock, seccomp,
exec.

Imported by ``launcher.py``; where bubblewrap makes the namespaces, the source of this file is what it starts inside (``python
-c``). So nothing of stillhouse is imported here.
"""

import ctypes
import marshal
import os
import resource
import signal
import struct
import sys

# capset; landlock_create_ruleset (add_rule and restrict_self follow)
CAPSET = {"x86_64": 126, "aarch64": 91}
LANDLOCK = 444
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 36, 38

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter's lock: clone() must not return without it
_step = ["read the order"]


def at(step: str) -> None:
    """Note which step comes now, for the report if it fails."""
    _step[0] = step


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def syscall(number: int, *arguments: object) -> int:
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return check(libc.syscall(ctypes.c_long(number), *longs), f"system call {number}")


def prctl(option: int, *values: object) -> int:
    padded = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in (*values, 0, 0, 0, 0)[:4]]
    return check(libc.prctl(option, *padded), f"prctl {option}")


def report(fd: int, error: BaseException) -> None:
    os.write(fd, f"failed: {_step[0]}: {error}\n".encode())


def finish(report_fd: int, body) -> None:
    """Run a child's part and end the process there, with a report where it fails."""
    try:
        body()
    except OSError as error:
        report(report_fd, error)
    except BaseException as error:
        report(report_fd, error)
        raise
    finally:
        os._exit(1)


def become_nobody(spec: dict) -> None:
    """Give up what root or a namespace's first process has: ids, groups, capabilities, the way back."""
    at("give up privileges")
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), *[ctypes.c_ulong(0)] * 3) < 0:
            break  # past the last capability, or none to drop
    uid = spec["uid"]
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("=Ii", 0x20080522, 0)
    syscall(CAPSET[os.uname().machine], ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of ids has cleared it


def become_program(spec: dict, report_fd: int) -> None:
    """The last steps, in the process that is going to be the program: limits, files, Landlock, seccomp, exec."""
    become_nobody(spec)
    at("enter the work folder")
    os.chdir(spec["work"])
    for name, content in spec["files"].items():
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "xb") as file:
            file.write(content)
    at("set the limits")
    set_limits(spec)
    at("set up Landlock")
    if spec["landlock"]:
        restrict_files(spec)
    program = [spec["python"], "-s", "-B", *spec["argv"]]
    prctl(PR_SET_DUMPABLE, 1)
    at("set up seccomp")
    if spec["filter"]:
        code = spec["filter"]
        buffer = ctypes.create_string_buffer(code, len(code))
        instructions = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
        prctl(PR_SET_SECCOMP, 2, ctypes.c_ulong(ctypes.addressof(instructions)))
    os.write(report_fd, b"ready\n")
    at("start the interpreter")
    os.execve(program[0], program, dict(spec["environment"]))


def set_limits(spec: dict) -> None:
    limits = spec["limits"]
    processes = limits["processes"] + (threads_of(os.getuid()) if spec["count_threads"] else 0)
    for what, soft, hard in (
        (resource.RLIMIT_CORE, 1, 1),  # no dump, and no handler of the machine's that gets one; see seccomp.py
        (resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"], limits["disk_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_STACK, 8 << 20, resource.RLIM_INFINITY),  # address space: RLIMIT_AS bounds it
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_SIGPENDING, 1024, 1024),
    ):
        ceiling = resource.getrlimit(what)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = (ceiling if value == resource.RLIM_INFINITY else min(value, ceiling) for value in (soft, hard))
        resource.setrlimit(what, (soft, hard))


def threads_of(uid: int) -> int:
    """Threads that this user runs already, where the kernel counts them against the same limit."""
    total = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                total += len(os.listdir(f"/proc/{name}/task"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended meanwhile, or is not ours to count
            continue
    return total


def restrict_files(spec: dict) -> None:
    """Landlock: read and execute the interpreter, write in the work folder, nothing else; no TCP; no signal to the outside."""
    version = spec["landlock"]
    read_file, read_folder, execute, write_file = 1 << 2, 1 << 3, 1 << 0, 1 << 1
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    truncate, ioctl_device = (1 << 14) & known, (1 << 15) & known
    attributes = struct.pack("=Q", known)
    if version >= 4:
        attributes += struct.pack("=Q", 0b11)  # bind and connect over TCP
    if version >= 6:
        attributes += struct.pack("=Q", 0b11)  # abstract unix sockets and signals
    rules = syscall(LANDLOCK, ctypes.c_char_p(attributes), len(attributes), 0)
    allowed = [(target, read_file | read_folder | execute) for _, target in spec["read_only"]]
    if spec["packages"]:  # the folder itself has to be listed for an import
        allowed.append((spec["packages"], read_file | read_folder))
    allowed += [(path, read_file | write_file) for path in spec["devices"]]
    if spec["route"] != "none" and spec["stdin_bytes"]:
        allowed.append(("/dev/stdin", read_file))
    allowed += [(spec["work"], known & ~execute & ~ioctl_device & ~(1 << 6) & ~(1 << 11))]  # no device nodes
    for path, rights in allowed:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= execute | write_file | read_file | truncate | ioctl_device
        syscall(LANDLOCK + 1, rules, 1, ctypes.c_char_p(struct.pack("=Qi", rights, fd)), 0)
        os.close(fd)
    syscall(LANDLOCK + 2, rules, 0)
    os.close(rules)


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def inside(spec_fd: int, report_fd: int) -> None:
    """Become the program, in a process that bubblewrap has started inside."""
    for fd in (spec_fd, report_fd):
        os.set_inheritable(fd, False)
    finish(report_fd, lambda: become_program(marshal.loads(read_all(spec_fd)), report_fd))


if __name__ == "__main__":
    inside(*map(int, sys.argv[1:3]))
