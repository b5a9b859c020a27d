"""The seccomp filter: which system calls a sandboxed program may make, as a BPF program for x86_64 and aarch64.

An allow list, because a list of what is forbidden is out of date with the next kernel. What is on it is what CPython's own
interpreter and standard library use on files, memory, threads, time and pipes. Left out, and so answered with ENOSYS as if the
kernel did not have it (C libraries then take the older way, where they have one):

- sockets of every family (``socketpair`` of AF_UNIX stays: asyncio wakes itself up with it), so there is no network to
  configure;
- other processes' memory (ptrace, process_vm_readv, kcmp, pidfd_getfd) and other namespaces (unshare, setns, clone3);
- mounting and roots (mount, fsopen, move_mount, pivot_root, chroot, open_by_handle_at);
- large or young kernel interfaces (bpf, io_uring, userfaultfd, perf_event_open, keyctl, memfd, splice, System V and POSIX
  queues);
- identity, time and machine (setuid, capset, settimeofday, reboot, swapon, init_module, kexec_load).

Some calls are let through by argument and refused with EPERM otherwise:

- ``clone`` without any namespace flag, ``socketpair`` of AF_UNIX, ``prctl`` on the thread's own name and the like, ``ioctl``
  that asks about terminals and pipes (never TIOCSTI);
- ``mmap`` but for shared anonymous memory: it stays allocated when it is unmapped but for one page, so that neither
  RLIMIT_AS nor a look at resident memory would bound it (files in /tmp can be shared, whose size is bounded);
- ``madvise`` but for what moves memory to swap or shares pages with other processes, ``fcntl`` but for leases and
  notifications, which tell of others' use of a file;
- ``setrlimit`` and ``prlimit64`` but for core dumps: a limit of 1, which ``confine.py`` sets, is the one that keeps the kernel
  from handing a crash to a program of the machine; 0 does not.

A system call of another architecture's table kills the process.

Numbers: the kernel's ``arch/x86/entry/syscalls/syscall_64.tbl`` and ``include/uapi/asm-generic/unistd.h``.
"""

from __future__ import annotations

import struct

# name:x86_64:aarch64
_BOTH = """
    brk:12:214  chdir:80:49  clock_getres:229:114  clock_gettime:228:113  clock_nanosleep:230:115  close:3:57
    close_range:436:436  copy_file_range:326:285  dup:32:23  dup3:292:24  epoll_create1:291:20  epoll_ctl:233:21
    epoll_pwait:281:22  epoll_pwait2:441:441  eventfd2:290:19  execve:59:221  exit:60:93  exit_group:231:94
    faccessat:269:48  faccessat2:439:439  fadvise64:221:223  fallocate:285:47  fchdir:81:50  fchmod:91:52  fchmodat:268:53
    fdatasync:75:83  flock:73:32  fstat:5:80  fstatfs:138:44  fsync:74:82  ftruncate:77:46  futex:202:98
    get_robust_list:274:100  getcpu:309:168  getcwd:79:17  getdents64:217:61  getegid:108:177  geteuid:107:175
    getgid:104:176  getgroups:115:158  getitimer:36:102  getpeername:52:205  getpgid:121:155  getpid:39:172
    getppid:110:173  getpriority:140:141  getrandom:318:278  getresgid:120:150  getresuid:118:148  getrlimit:97:163
    getrusage:98:165  getsid:124:156  getsockname:51:204  getsockopt:55:209  gettid:186:178  gettimeofday:96:169
    getuid:102:174  kill:62:129  linkat:265:37  lseek:8:62  membarrier:324:283  mincore:27:232
    mkdirat:258:34  mprotect:10:226  mremap:25:216  msync:26:227  munmap:11:215  nanosleep:35:101
    newfstatat:262:79  openat:257:56  pipe2:293:59  ppoll:271:73  pread64:17:67  preadv:295:69  preadv2:327:286
    pselect6:270:72  pwrite64:18:68  pwritev:296:70  pwritev2:328:287  read:0:63  readlinkat:267:78
    readv:19:65  recvfrom:45:207  recvmsg:47:212  renameat:264:38  renameat2:316:276  restart_syscall:219:128
    rseq:334:293  rt_sigaction:13:134  rt_sigpending:127:136  rt_sigprocmask:14:135  rt_sigqueueinfo:129:138
    rt_sigreturn:15:139  rt_sigsuspend:130:133  rt_sigtimedwait:128:137  sched_get_priority_max:146:125
    sched_get_priority_min:147:126  sched_getaffinity:204:123  sched_getparam:143:121  sched_getscheduler:145:120
    sched_yield:24:124  sendfile:40:71  sendmsg:46:211  sendto:44:206  set_robust_list:273:99  set_tid_address:218:96
    setitimer:38:103  setpgid:109:154  setpriority:141:140  setsid:112:157  shutdown:48:210
    sigaltstack:131:132  statfs:137:43  statx:332:291  symlinkat:266:36  sysinfo:99:179  tgkill:234:131  times:100:153
    tkill:200:130  truncate:76:45  umask:95:166  uname:63:160  unlinkat:263:35  utimensat:280:88  wait4:61:260
    waitid:247:95  write:1:64  writev:20:66
"""
# Calls that aarch64 never had; its C library uses the *at forms.
_X86_64_ONLY = """
    access:21  alarm:37  arch_prctl:158  chmod:90  creat:85  dup2:33  epoll_create:213  epoll_wait:232  eventfd:284
    fork:57  getdents:78  getpgrp:111  link:86  lstat:6  mkdir:83  open:2  pause:34  pipe:22  poll:7  readlink:89
    rename:82  rmdir:84  select:23  stat:4  symlink:88  time:201  unlink:87  vfork:58
"""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE, _IOCTL, _PRCTL, _SOCKETPAIR = (
    {"x86_64": 56, "aarch64": 220},
    {"x86_64": 16, "aarch64": 29},
    {"x86_64": 157, "aarch64": 167},
    {"x86_64": 53, "aarch64": 199},
)
# CLONE_NEWTIME is bit 7, which clone() reads as part of the exit signal: only clone3 and unshare know it.
_CLONE_NEW_ANYTHING = 0x7E020000  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
# TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2: the same numbers on both architectures.
_IOCTLS = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)
_PRCTLS = (
    3,
    15,
    16,
    21,
    23,
    39,
    0x53564D41,
)  # GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP, CAPBSET_READ, GET_NO_NEW_PRIVS, SET_VMA
_AF_UNIX = 1
_FCNTL, _MADVISE, _MMAP, _PRLIMIT64, _SETRLIMIT = (
    {"x86_64": 72, "aarch64": 25},
    {"x86_64": 28, "aarch64": 233},
    {"x86_64": 9, "aarch64": 222},
    {"x86_64": 302, "aarch64": 261},
    {"x86_64": 160, "aarch64": 164},
)
_REFUSED_FCNTLS = (1024, 1026)  # F_SETLEASE, F_NOTIFY
_REFUSED_ADVICE = (12, 21)  # MADV_MERGEABLE, MADV_PAGEOUT
_MAP_SHARED_ANONYMOUS = 0x21
_RLIMIT_CORE = 4

_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_ERRNO = 0x00050000
_EPERM, _ENOSYS = 1, 38

# Classic BPF over struct seccomp_data: nr at 0, arch at 4, the low half of argument i at 16 + 8 i (little-endian).
_LOAD, _AND, _JUMP_IF_EQUAL, _JUMP_IF_ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06


def allowed_syscalls(machine: str) -> dict[str, int]:
    """Name and number of each call that is allowed whatever its arguments, for ``x86_64`` or ``aarch64``."""
    both = [entry.split(":") for entry in _BOTH.split()]
    if machine == "aarch64":
        return {name: int(number) for name, _, number in both}
    only = [entry.split(":") for entry in _X86_64_ONLY.split()]
    return {entry[0]: int(entry[1]) for entry in both + only}


def seccomp_filter(machine: str) -> bytes | None:
    """Assemble the filter as an array of ``struct sock_filter``; None for an architecture that has no table here."""
    if machine not in _AUDIT_ARCH:
        return None
    program = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, 0)]
    for number in allowed_syscalls(machine).values():
        program += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program += _when_argument_in(_IOCTL[machine], 1, _IOCTLS)
    program += _when_argument_in(_PRCTL[machine], 0, _PRCTLS)
    program += _when_argument_in(_SOCKETPAIR[machine], 0, (_AF_UNIX,))
    program += _when_argument_in(_FCNTL[machine], 1, _REFUSED_FCNTLS, refuse=True)
    program += _when_argument_in(_MADVISE[machine], 2, _REFUSED_ADVICE, refuse=True)
    program += _when_argument_in(_SETRLIMIT[machine], 0, (_RLIMIT_CORE,), refuse=True)
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM)
    program += [(_JUMP_IF_EQUAL, 0, 5, _MMAP[machine]), (_LOAD, 0, 0, _argument(3)), (_AND, 0, 0, _MAP_SHARED_ANONYMOUS)]
    program += [(_JUMP_IF_EQUAL, 0, 1, _MAP_SHARED_ANONYMOUS), refuse, allow]
    program += [(_JUMP_IF_EQUAL, 0, 8, _PRLIMIT64[machine]), (_LOAD, 0, 0, _argument(1))]
    program += [(_JUMP_IF_EQUAL, 0, 4, _RLIMIT_CORE), (_LOAD, 0, 0, _argument(2)), (_JUMP_IF_EQUAL, 0, 3, 0)]
    program += [(_LOAD, 0, 0, _argument(2) + 4), (_JUMP_IF_EQUAL, 0, 1, 0), allow, refuse]  # a null pointer only asks
    program += [(_JUMP_IF_EQUAL, 0, 4, _CLONE[machine]), (_LOAD, 0, 0, _argument(0))]
    program += [(_JUMP_IF_ANY_BIT, 0, 1, _CLONE_NEW_ANYTHING), refuse, allow]
    program.append((_RETURN, 0, 0, _ERRNO | _ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _argument(index: int) -> int:
    """Where the low half of an argument stands in ``struct seccomp_data``."""
    return 16 + 8 * index


def _when_argument_in(
    number: int, argument: int, values: tuple[int, ...], *, refuse: bool = False
) -> list[tuple[int, int, int, int]]:
    """Allow a call when the low half of one argument is one of the values, refuse it with EPERM otherwise; or the reverse."""
    found, otherwise = (_ERRNO | _EPERM, _ALLOW) if refuse else (_ALLOW, _ERRNO | _EPERM)
    tests = [(_LOAD, 0, 0, _argument(argument))]
    for value in values:
        tests += [(_JUMP_IF_EQUAL, 0, 1, value), (_RETURN, 0, 0, found)]
    tests.append((_RETURN, 0, 0, otherwise))
    return [(_JUMP_IF_EQUAL, 0, len(tests), number), *tests]
