"""The table of attacks on the sandbox: probes, system calls and programs, as ``sandbox_attacks.py`` runs them.

A *probe* is an expression (``attack_probes.txt``); it leaks when it comes to something true. Probes of one kind run in one
sandbox, one after the other. A *call* is a raw system call; it leaks unless the kernel says EPERM or ENOSYS, because any other
error means that the filter let it through to the kernel's own code. A *program* (``attack_programs.txt``) runs in a sandbox of
its own: it leaks when it prints LEAK, when it ends otherwise than it should, or when anything outside has changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# name: x86_64, aarch64 (None: not there), arguments
CALLS: dict[str, tuple[int | None, int | None, tuple[Any, ...]]] = {
    "mount": (165, 40, (b"tmpfs", b"/tmp", b"tmpfs", 0, 0)),
    "umount2": (166, 39, (b"/tmp", 2)),
    "pivot_root": (155, 41, (b"/tmp", b"/tmp")),
    "chroot": (161, 51, (b"/tmp",)),
    "fsopen": (430, 430, (b"tmpfs", 0)),
    "fsmount": (432, 432, (0, 0, 0)),
    "fspick": (433, 433, (-100, b"/tmp", 0)),
    "move_mount": (429, 429, (-100, b"/tmp", -100, b"/tmp", 0)),
    "open_tree": (428, 428, (-100, b"/", 1)),
    "mount_setattr": (442, 442, (-100, b"/", 0, 0, 0)),
    "open_by_handle_at": (304, 265, (-100, b"\0" * 64, 0)),
    "name_to_handle_at": (303, 264, (-100, b"/", b"\0" * 64, b"\0" * 8, 0)),
    "unshare user": (272, 97, (0x10000000,)),
    "unshare net": (272, 97, (0x40000000,)),
    "unshare mount": (272, 97, (0x20000,)),
    "setns": (308, 268, (0, 0)),
    "clone with a new user namespace": (56, 220, (0x10000000 | 17, 0, 0, 0, 0)),
    "clone with a new pid namespace": (56, 220, (0x20000000 | 17, 0, 0, 0, 0)),
    "clone3": (435, 435, (b"\0" * 88, 88)),
    "ptrace": (101, 117, (16, 1, 0, 0)),
    "process_vm_readv": (310, 270, (1, 0, 0, 0, 0, 0)),
    "process_vm_writev": (311, 271, (1, 0, 0, 0, 0, 0)),
    "process_madvise": (440, 440, (0, 0, 0, 0, 0)),
    "kcmp": (312, 272, (1, 1, 0, 0, 0)),
    "pidfd_open": (434, 434, (1, 0)),
    "pidfd_getfd": (438, 438, (0, 0, 0)),
    "pidfd_send_signal": (424, 424, (0, 0, 0, 0)),
    "bpf": (321, 280, (0, b"\0" * 128, 128)),
    "perf_event_open": (298, 241, (b"\0" * 128, 0, -1, -1, 0)),
    "userfaultfd": (323, 282, (1,)),
    "io_uring_setup": (425, 425, (4, b"\0" * 120)),
    "io_uring_enter": (426, 426, (0, 0, 0, 0, 0, 0)),
    "keyctl": (250, 219, (0, -3, 1)),
    "add_key": (248, 217, (b"user", b"x", b"x", 1, -3)),
    "request_key": (249, 218, (b"user", b"x", 0, -3)),
    "memfd_create": (319, 279, (b"x", 0)),
    "memfd_secret": (447, 447, (0,)),
    "splice": (275, 76, (0, 0, 1, 0, 1, 0)),
    "vmsplice": (278, 75, (1, 0, 0, 0)),
    "tee": (276, 77, (0, 1, 1, 0)),
    "init_module": (175, 105, (b"x", 1, b"")),
    "finit_module": (313, 273, (0, b"", 0)),
    "delete_module": (176, 106, (b"x", 0)),
    "kexec_load": (246, 104, (0, 0, 0, 0)),
    "reboot": (169, 142, (0, 0, 0, 0)),
    "swapon": (167, 224, (b"/tmp", 0)),
    "acct": (163, 89, (b"/tmp/acct",)),
    "syslog": (103, 116, (3, b"\0" * 64, 64)),
    "settimeofday": (164, 170, (b"\0" * 16, 0)),
    "clock_settime": (227, 112, (0, b"\0" * 16)),
    "adjtimex": (159, 171, (b"\0" * 256,)),
    "sethostname": (170, 161, (b"x", 1)),
    "setdomainname": (171, 162, (b"x", 1)),
    "personality": (135, 92, (0x0040000,)),
    "modify_ldt": (154, None, (0, b"\0" * 64, 64)),
    "iopl": (172, None, (3,)),
    "ioperm": (173, None, (0, 1, 1)),
    "capset": (126, 91, (b"\0" * 8, b"\0" * 24)),
    "setresuid": (117, 147, (0, 0, 0)),
    "setfsuid": (122, 151, (0,)),
    "shmget": (29, 194, (0, 4096, 0o1600)),
    "shmat": (30, 196, (0, 0, 0)),
    "semget": (64, 190, (0, 1, 0o1600)),
    "msgget": (68, 186, (0, 0o1600)),
    "mq_open": (240, 180, (b"x", 0o102, 0o600, 0)),
    "fanotify_init": (300, 262, (0, 0)),
    "inotify_init1": (294, 26, (0,)),
    "quotactl": (179, 60, (0, 0, 0, 0)),
    "move_pages": (279, 239, (0, 0, 0, 0, 0, 0)),
    "set_mempolicy": (238, 237, (0, 0, 0)),
    "mlock": (149, 228, (0, 4096)),
    "terminal input (ioctl TIOCSTI)": (16, 29, (0, 0x5412, b"x")),
    "block device (ioctl BLKGETSIZE)": (16, 29, (0, 0x1260, b"\0" * 8)),
    "memory map (prctl PR_SET_MM)": (157, 167, (35, 1, 0, 0, 0)),
    "timer slack of others (prctl)": (157, 167, (29, 1, 0, 0, 0)),
    "io_uring_register": (427, 427, (0, 0, 0, 0)),
    "fsconfig": (431, 431, (0, 0, 0, 0, 0)),
    "open_tree_attr": (467, 467, (-100, b"/", 1, 0, 0)),
    "statmount": (457, 457, (b"\0" * 64, b"\0" * 64, 64, 0)),
    "listmount": (458, 458, (b"\0" * 64, b"\0" * 64, 8, 0)),
    "quotactl_fd": (443, 443, (0, 0, 0, 0)),
    "mknod": (133, None, (b"/tmp/node", 0o20666, 259)),
    "mknodat": (259, 33, (-100, b"/tmp/node", 0o20666, 259)),
    "fchownat": (260, 54, (-100, b"/tmp", 0, 0, 0)),
    "setxattr": (188, 5, (b"/tmp", b"user.x", b"x", 1, 0)),
    "fsetxattr": (190, 7, (0, b"user.x", b"x", 1, 0)),
    "unshare pid": (272, 97, (0x20000000,)),
    "unshare time": (272, 97, (0x80,)),
    "unshare cgroup": (272, 97, (0x2000000,)),
    "clone with a new mount namespace": (56, 220, (0x20000 | 17, 0, 0, 0, 0)),
    "clone with a new network namespace": (56, 220, (0x40000000 | 17, 0, 0, 0, 0)),
    "clone with a new ipc namespace": (56, 220, (0x8000000 | 17, 0, 0, 0, 0)),
    "clone with a new cgroup namespace": (56, 220, (0x2000000 | 17, 0, 0, 0, 0)),
    "clone3 into a cgroup": (435, 435, ((0x200000000).to_bytes(8, "little") + bytes(80), 88)),
    "ptrace (traceme)": (101, 117, (0, 0, 0, 0)),
    "ptrace (seize its parent)": (101, 117, (0x4206, 1, 0, 0)),
    "process_mrelease": (448, 448, (0, 0)),
    "rt_tgsigqueueinfo": (297, 240, (1, 1, 0, b"\0" * 128)),
    "execveat": (322, 281, (0, b"", 0, 0, 0x1000)),
    "seccomp": (317, 277, (0, 0, 0)),
    "landlock_create_ruleset": (444, 444, (0, 0, 1)),
    "setuid": (105, 146, (0,)),
    "setgid": (106, 144, (0,)),
    "setgroups": (116, 159, (0, 0)),
    "setreuid": (113, 145, (0, 0)),
    "setresgid": (119, 149, (0, 0, 0)),
    "setfsgid": (123, 152, (0,)),
    "socket (netlink)": (41, 198, (16, 3, 0)),
    "socket (packet)": (41, 198, (17, 3, 0)),
    "socket (vsock)": (41, 198, (40, 1, 0)),
    "socket (crypto)": (41, 198, (38, 5, 0)),
    "socket (XDP)": (41, 198, (44, 3, 0)),
    "socket (bluetooth)": (41, 198, (31, 3, 1)),
    "socket (keys)": (41, 198, (15, 3, 2)),
    "socket (IPv6)": (41, 198, (10, 1, 0)),
    "socketpair (TIPC)": (53, 199, (30, 1, 0, b"\0" * 8)),
    "connect": (42, 203, (0, b"\1\0/tmp/x", 9)),
    "bind": (49, 200, (0, b"\1\0/tmp/x", 9)),
    "accept4": (288, 242, (0, 0, 0, 0)),
    "sendmmsg": (307, 269, (1, 0, 0, 0)),
    "shmctl": (31, 195, (0, 0, 0)),
    "semctl": (66, 191, (0, 0, 0)),
    "msgsnd": (69, 189, (0, b"\0" * 16, 1, 0)),
    "mq_unlink": (241, 181, (b"x",)),
    "mq_timedsend": (242, 182, (0, b"x", 1, 0, 0)),
    "timer_create": (222, 107, (0, 0, b"\0" * 8)),
    "timerfd_create": (283, 85, (0, 0)),
    "signalfd4": (289, 74, (-1, b"\0" * 8, 8, 0)),
    "migrate_pages": (256, 238, (1, 1, b"\1" * 8, b"\1" * 8)),
    "mbind": (237, 235, (0, 4096, 0, 0, 0, 0)),
    "remap_file_pages": (216, 234, (0, 0, 0, 0, 0)),
    "pkey_alloc": (330, 289, (0, 0)),
    "mlock2": (325, 284, (0, 4096, 0)),
    "mlockall": (151, 230, (2,)),
    "lookup_dcookie": (212, 18, (0, b"\0" * 8, 8)),
    "sysfs": (139, None, (3,)),
    "uselib": (134, None, (b"/tmp/lib",)),
    "vhangup": (153, 58, ()),
    "swapoff": (168, 225, (b"/tmp",)),
    "kexec_file_load": (320, 294, (0, 0, 0, 0, 0)),
    "clock_adjtime": (305, 266, (0, b"\0" * 256)),
    "ioprio_set": (251, 30, (1, 0, 0)),
    "sched_setattr": (314, 274, (0, b"\0" * 64, 0)),
    "sync": (162, 81, ()),
    "mseal": (462, 462, (0, 0, 0)),
    "lsm_set_self_attr": (460, 460, (0, 0, 0, 0)),
    "map_shadow_stack": (453, 453, (0, 4096, 0)),
    "virtual console (ioctl TIOCLINUX)": (16, 29, (0, 0x541C, b"\2")),
    "loop device (ioctl LOOP_SET_FD)": (16, 29, (0, 0x4C00, 0)),
    "share blocks (ioctl FICLONE)": (16, 29, (1, 0x40049409, 0)),
    "freeze a file system (ioctl FIFREEZE)": (16, 29, (0, 0xC0045877, 0)),
    "list interfaces (ioctl SIOCGIFCONF)": (16, 29, (0, 0x8912, b"\0" * 16)),
    "make a tunnel (ioctl TUNSETIFF)": (16, 29, (0, 0x400454CA, b"\0" * 40)),
    "TIOCSTI behind high bits (ioctl)": (16, 29, (0, 0x100005412, b"x")),
    "outlive the parent (prctl PR_SET_PDEATHSIG)": (157, 167, (1, 0, 0, 0, 0)),
    "adopt orphans (prctl PR_SET_CHILD_SUBREAPER)": (157, 167, (36, 1, 0, 0, 0)),
    "let others trace it (prctl PR_SET_PTRACER)": (157, 167, (0x59616D61, -1, 0, 0, 0)),
    "ambient capabilities (prctl)": (157, 167, (47, 2, 0, 0, 0)),
    "keep capabilities (prctl)": (157, 167, (8, 1, 0, 0, 0)),
    "speculation (prctl)": (157, 167, (53, 0, 2, 0, 0)),
    "core scheduling (prctl)": (157, 167, (62, 1, 1, 0, 0)),
    "fanotify_mark": (301, 263, (0, 1, 0, 0, -100, b"/")),
    "inotify_init": (253, None, ()),
    "inotify_add_watch": (254, 27, (0, b"/", 2)),
    "sched_setscheduler": (144, 119, (0, 1, b"\1\0\0\0")),
    "sched_setparam": (142, 118, (0, b"\1\0\0\0")),
    "sched_setaffinity": (203, 122, (0, 8, b"\1" + bytes(7))),
    "ioprio_get": (252, 31, (1, 0)),
    "cachestat": (451, 451, (0, b"\0" * 16, b"\0" * 40, 0)),
    "futex_waitv": (449, 449, (0, 0, 0, 0, 0)),
    "futex_wake": (454, 454, (0, 0, 0, 0)),
    "futex_requeue": (456, 456, (0, 0, 0, 0)),
    "set_mempolicy_home_node": (450, 450, (0, 4096, 0, 0)),
    "get_mempolicy": (239, 236, (0, 0, 0, 0, 0)),
    "landlock_add_rule": (445, 445, (0, 1, 0, 0)),
    "landlock_restrict_self": (446, 446, (0, 0)),
    "lsm_get_self_attr": (459, 459, (100, 0, 0, 0)),
    "lsm_list_modules": (461, 461, (b"\0" * 64, b"\x40" + bytes(7), 0)),
    "setxattrat": (463, 463, (-100, b"/tmp", 0, b"user.x", 0, 0)),
    "getxattrat": (464, 464, (-100, b"/tmp", 0, b"user.x", 0, 0)),
    "removexattrat": (466, 466, (-100, b"/tmp", 0, b"user.x")),
    "pkey_mprotect": (329, 288, (0, 4096, 1, 0)),
    "io_setup": (206, 0, (1, b"\0" * 8)),
    "io_submit": (209, 2, (0, 1, 0)),
    "io_pgetevents": (333, 292, (0, 0, 0, 0, 0, 0)),
    "sync_file_range": (277, 84, (0, 0, 0, 0)),
    "syncfs": (306, 267, (0,)),
    "readahead": (187, 213, (0, 0, 4096)),
    "accept": (43, 202, (0, 0, 0)),
    "listen": (50, 201, (0, 1)),
    "setsockopt": (54, 208, (0, 1, 7, b"\0" * 4, 4)),
    "recvmmsg": (299, 243, (0, 0, 0, 0, 0)),
    "fchmodat2": (452, 452, (-100, b"/", 0o777, 0x1000)),
    "chown": (92, None, (b"/tmp", 0, 0)),
    "fchown": (93, 55, (0, 0, 0)),
    "getxattr": (191, 8, (b"/tmp", b"user.x", b"\0" * 8, 8)),
    "removexattr": (197, 14, (b"/tmp", b"user.x")),
    "mq_notify": (244, 184, (0, 0)),
    "semop": (65, 193, (0, 0, 0)),
    "semtimedop": (220, 192, (0, 0, 0, 0)),
    "shmdt": (67, 197, (0,)),
    "msgrcv": (70, 188, (0, b"\0" * 16, 1, 0, 0)),
    "msgctl": (71, 187, (0, 0, 0)),
    "timer_settime": (223, 110, (0, 0, b"\0" * 32, 0)),
    "timerfd_settime": (286, 86, (0, 0, b"\0" * 32, 0)),
    "unshare uts": (272, 97, (0x4000000,)),
    "unshare ipc": (272, 97, (0x8000000,)),
    "clone with a new uts namespace": (56, 220, (0x4000000 | 17, 0, 0, 0, 0)),
    "shared anonymous memory (mmap)": (9, 222, (0, 4096, 3, 0x21, -1, 0)),
    "the same behind high bits (mmap)": (9, 222, (0, 4096, 3, 0x100000021, -1, 0)),
    "watch a folder (fcntl F_NOTIFY)": (72, 25, (0, 1026, 1)),
    "lease (fcntl F_SETLEASE)": (72, 25, (0, 1024, 0)),
    "page out (madvise)": (28, 233, (0, 0, 21)),
    "merge pages (madvise)": (28, 233, (0, 0, 12)),
    "core dumps (setrlimit)": (160, 164, (4, b"\0" * 16)),
    "core dumps (prlimit64)": (302, 261, (0, 4, b"\0" * 16, 0)),
    "a controlling terminal (ioctl TIOCSCTTY)": (16, 29, (0, 0x540E, 1)),
    "the console (ioctl TIOCCONS)": (16, 29, (0, 0x541D, 0)),
    "flags of a file (ioctl FS_IOC_SETFLAGS)": (16, 29, (0, 0x40086602, b"\x10" + bytes(7))),
    "entropy (ioctl RNDADDENTROPY)": (16, 29, (0, 0x40085203, b"\0" * 16)),
    "owner of a namespace (ioctl NS_GET_USERNS)": (16, 29, (0, 0xB701, 0)),
    "a second filter (prctl PR_SET_SECCOMP)": (157, 167, (22, 2, 0, 0, 0)),
    "not dumpable (prctl PR_SET_DUMPABLE)": (157, 167, (4, 0, 0, 0, 0)),
    "secure bits (prctl)": (157, 167, (28, 0, 0, 0, 0)),
    "poisoned memory (prctl PR_MCE_KILL)": (157, 167, (33, 1, 0, 0, 0)),
    "system calls to user space (prctl)": (157, 167, (59, 1, 0, 0, 0)),
    "merge all memory (prctl)": (157, 167, (67, 1, 0, 0, 0)),
    "x32 system call": (0x40000000 | 39, None, ()),
    "a number that no kernel has": (9999, 9999, ()),
}

PRELUDE = """
import ctypes, json, mmap, os, resource, signal, socket, sys, threading, time
aim = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
libc.getenv.restype = ctypes.c_char_p
def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        client.connect(address)
    return "connected"
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
def fcntl(fd, command, argument):
    import fcntl
    return fcntl.fcntl(fd, command, argument)
def ioctl(fd, request, argument):
    import fcntl
    fcntl.ioctl(fd, request, bytearray(argument))
    return 0
_pages = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def page():
    return ctypes.c_void_p((ctypes.addressof(ctypes.c_char.from_buffer(_pages)) + 4095) & ~4095)
def run(path):
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, [path, "-c", "pass"])
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 99
def copy_of_python(path="/tmp/native"):
    with open(os.path.realpath(sys.executable), "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    os.chmod(path, 0o755)
    return path
"""
RUN_PROBES = """
found = {}
signal.signal(signal.SIGIO, signal.SIG_IGN)  # what a notification comes with
for name, expression in rows.items():
    try:
        value = eval(expression)
    except BaseException as error:
        found[name] = [False, type(error).__name__ + ": " + str(error)]
    else:
        found[name] = [bool(value), repr(value)[:200]]
print(json.dumps(found))
"""
RUN_CALLS = """
machine = {"aarch64": 1}.get(os.uname().machine, 0)
found = {}
for name, row in rows.items():
    if row[machine] is None:
        found[name] = [False, "this machine has no such call"]
        continue
    arguments = [ctypes.c_long(a) if isinstance(a, int) else ctypes.create_string_buffer(a, len(a)) for a in row[2]]
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(row[machine]), *arguments)
    error = ctypes.get_errno()
    if result == 0 and name.startswith("clone") and os.getppid() == 0:
        os._exit(0)
    found[name] = [result >= 0 or error not in (1, 38), f"{result} {os.strerror(error)}"]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Program:
    """An attack with a sandbox of its own. ``ends`` are the ends allowed: what it was killed for, or "" for its own end."""

    kind: str
    name: str
    source: str
    ends: tuple[str, ...]
    limits: dict[str, float]


HERE = Path(__file__).parent


def sections(path: Path) -> list[tuple[list[str], str]]:
    """A text file's sections: the fields of each ``== a | b | c`` line, and what stands below it."""
    parts = path.read_text().split("\n== ")[1:]
    return [([field.strip() for field in head.split("|")], body) for head, _, body in (part.partition("\n") for part in parts)]


def probes() -> dict[str, dict[str, str]]:
    """Expressions by kind and name."""
    rows = {
        kind: [line.split(" | ", 1) for line in body.splitlines() if line]
        for (kind,), body in sections(HERE / "attack_probes.txt")
    }
    return {kind: dict(pairs) for kind, pairs in rows.items()}


def programs() -> list[Program]:
    """Programs with the ends they may come to."""
    found = []
    for (kind, name, ends, *limits), body in sections(HERE / "attack_programs.txt"):
        given = dict(pair.split("=") for text in limits for pair in text.split())
        numbers = {key: int(value) if key == "cpu_s" else float(value) for key, value in given.items()}
        found.append(Program(kind, name, body, tuple("" if end == "itself" else end for end in ends.split()), numbers))
    return found


def count() -> int:
    """How many attacks the table holds; the scoring cheats are counted apart."""
    return sum(map(len, probes().values())) + len(CALLS) + len(programs())
