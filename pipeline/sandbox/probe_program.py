"""What the probe runs inside the sandbox: tries an escape of each kind, prints what came of it as JSON.

Reads on stdin what to reach for (paths, ports and pids that the probe has set up). It reports honestly; whatever a lie could
hide is looked at from outside as well (``probe.py``).
"""

import ctypes
import json
import mmap
import os
import socket
import sys

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    """A raw system call; what it refuses is an OSError."""
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def read(path):
    with open(path, "rb") as file:
        return f"read {len(file.read(64))} bytes of {path}"


def write(path):
    with open(path, "ab") as file:
        file.write(b"written from the sandbox")
    return f"wrote {path}"


def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        client.connect(address)
    return f"connected to {address!r}"


def environment(ours):
    names = sorted(set(os.environ) - {"PYTHONHASHSEED", "MALLOC_ARENA_MAX", "LD_LIBRARY_PATH", "LC_CTYPE", *ours})
    if names:
        return f"has {names}"
    raise OSError("nothing but our own variables")


def privileges():
    if 0 in os.getresuid():
        return f"runs as {os.getresuid()}"
    os.setuid(0)
    return "became root"


def run(path):
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, [path])
        finally:
            os._exit(99)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 99:
        raise OSError("does not start")
    return f"ran {path}"


def run_written():
    with open("/tmp/native", "wb") as file, open(os.path.realpath(sys.executable), "rb") as interpreter:
        file.write(interpreter.read())
    os.chmod("/tmp/native", 0o755)
    return run("/tmp/native")


def no_new_privileges():
    if libc.prctl(39, 0, 0, 0, 0) != 1:
        return "no_new_privs is not set"
    if libc.prctl(21, 0, 0, 0, 0) != 2:
        return "no seccomp filter is set"
    raise OSError("both are set")


def descriptors():
    extra = []
    for fd in range(3, 1024):
        try:
            os.fstat(fd)
        except OSError:
            continue
        extra.append(fd)
    if extra:
        return f"has open descriptors {extra}"
    raise OSError("only its three")


def processes(limit):
    ends = []
    try:
        while len(ends) <= limit:
            reading, writing = os.pipe()
            if os.fork() == 0:
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            os.close(reading)
            ends.append(writing)
    finally:
        for end in ends:
            os.close(end)
        for _ in ends:
            os.wait()
    return f"started {len(ends)} processes, allowed are {limit}"


def memory(limit):
    mmap.mmap(-1, limit + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return f"mapped {limit} bytes"


def disk(limit):
    for number in range(4):
        with open(f"/tmp/big{number}", "wb") as file:
            for _ in range(limit // 2 >> 16):
                file.write(bytes(1 << 16))
    return f"wrote {2 * limit} bytes, allowed are {limit}"


def uncounted_memory():
    """Shared memory that stays allocated when all but a page of it is unmapped: no limit of a process would count it."""
    mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    return "mapped shared anonymous memory"


def shared_memory():
    segment = call(numbers(29, 194), 0, 4096, 0o1600)
    call(numbers(31, 195), segment, 0, 0)  # removed again, where there is no namespace that would end with us
    return f"made segment {segment}"


def clone_with_a_namespace():
    child = call(numbers(56, 220), 0x10000000 | 17, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    return f"made process {child}"


def numbers(x86_64, aarch64):
    return aarch64 if os.uname().machine == "aarch64" else x86_64


def attempts(aim):
    new_user, pid = 0x10000000, aim["pid"]
    yield "read another user's file", lambda: read(aim["secret"])
    yield "read /etc/passwd", lambda: read("/etc/passwd")
    yield "write outside the work folder", lambda: write(aim["secret"])
    yield (
        "write into the interpreter's folder",
        lambda: write(os.path.join(os.path.dirname(os.__file__), "stillhouse_probe.py")),
    )
    yield "read another process's environment", lambda: read(f"/proc/{pid}/environ")
    yield "connect over TCP", lambda: connect(socket.AF_INET, ("127.0.0.1", aim["port"]))
    yield "connect to a unix socket", lambda: connect(socket.AF_UNIX, aim["unix"])
    yield "connect to an abstract unix socket", lambda: connect(socket.AF_UNIX, "\0" + aim["abstract"])
    yield "see the environment", lambda: environment(aim["environment"])
    yield "have or take root", privileges
    yield "run without no_new_privs and seccomp", no_new_privileges
    yield "use inherited descriptors", descriptors
    yield "run a shell", lambda: run("/bin/sh")
    yield "run a binary it wrote", run_written
    yield "make a user namespace (unshare)", lambda: call(numbers(272, 97), new_user)
    yield "make a user namespace (clone)", clone_with_a_namespace
    yield "mount", lambda: call(numbers(165, 40), b"tmpfs", b"/tmp", b"tmpfs", 0, 0)
    yield "trace a process", lambda: call(numbers(101, 117), 16, 1, 0, 0)
    yield "read another process's memory", lambda: call(numbers(310, 270), pid, 0, 0, 0, 0, 0)
    yield "load a BPF program", lambda: call(numbers(321, 280), 0, ctypes.create_string_buffer(128), 128)
    yield "set up an io_uring", lambda: call(425, 4, ctypes.create_string_buffer(120))
    yield "use the kernel's keyring", lambda: call(numbers(250, 219), 0, -3, 1)
    yield "make System V shared memory", shared_memory
    yield "set the host name", lambda: call(numbers(170, 161), b"x", 1)
    yield "signal a process outside", lambda: os.kill(pid, 15)
    yield "start more processes than allowed", lambda: processes(aim["processes"])
    yield "take more memory than allowed", lambda: memory(aim["memory_bytes"])
    yield "hold memory that is not counted", uncounted_memory
    yield "write more than allowed", lambda: disk(aim["disk_bytes"])


if __name__ == "__main__":
    found = []
    for name, attempt in attempts(json.load(sys.stdin)):
        try:
            found.append((name, False, str(attempt())))
        except (OSError, MemoryError, ValueError) as error:
            found.append((name, True, f"{type(error).__name__}: {error}"))
    print(json.dumps(found))
