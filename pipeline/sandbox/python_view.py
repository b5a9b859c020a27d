"""Which files a sandboxed interpreter needs: itself, the standard library, and the shared libraries that they load."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from stillhouse.pipeline.sandbox.records import SandboxUnavailable

# Runs in the base interpreter: loads every extension module of the standard library without running it, and asks the loader
# which libraries that brought in, by the names it found them under (the soname's link, not the file behind it).
_SURVEY = """
import ctypes, json, os, pathlib, sys, sysconfig
stdlib = sysconfig.get_path("stdlib")
dynload = pathlib.Path(sysconfig.get_path("platstdlib"), "lib-dynload")
for path in [*map(str, sorted(dynload.glob("*.so"))), "libgcc_s.so.1"]:
    try:
        ctypes.CDLL(path)
    except OSError:  # a module whose library is not installed (tkinter), or another architecture's
        continue
class Info(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]
names = []
Visit = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
ctypes.CDLL(None).dl_iterate_phdr(Visit(lambda info, size, data: names.append(os.fsdecode(info[0].name or b"")) or 0), None)
folders = sorted({stdlib, str(dynload.parent)})
print(json.dumps({"folders": folders, "libraries": [name for name in names if name.startswith("/")]}))
"""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True, slots=True)
class PythonView:
    """What is shown to a program.

    Args:
        executable: path of the interpreter, the same inside and outside.
        read_only: pairs (path outside, path inside) of files and folders.
        masked: folders inside these that are shown empty (site-packages).
        devices: device nodes.
    """

    executable: str
    read_only: tuple[tuple[str, str], ...]
    masked: tuple[str, ...]
    devices: tuple[str, ...]


@functools.cache
def python_view() -> PythonView:
    """Find the files of this interpreter, once a process (about 0.1 s); a virtual environment's is its base interpreter.

    Raises:
        SandboxUnavailable: the interpreter does not start on its own.
    """
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    command = [executable, "-I", "-S", "-B", "-c", _SURVEY]
    answer = subprocess.run(command, capture_output=True, text=True, env=loader_environment(), check=False)
    if answer.returncode:
        raise SandboxUnavailable(f"{executable} does not start on its own: {answer.stderr.strip()[-300:]}")
    survey = json.loads(answer.stdout)
    folders = [os.path.abspath(folder) for folder in survey["folders"]]
    inside_folders = tuple(folder + os.sep for folder in folders)
    files = [executable, interpreter_of(executable), "/etc/ld.so.cache", *survey["libraries"]]
    files = [name for name in dict.fromkeys(files) if name and not name.startswith(inside_folders) and os.path.isfile(name)]
    masked = [str(path) for folder in folders for path in Path(folder).glob("*-packages") if path.is_dir()]
    shown = tuple((os.path.realpath(path), path) for path in (*folders, *files))
    return PythonView(executable, shown, tuple(masked), tuple(path for path in _DEVICES if os.path.exists(path)))


def loader_environment() -> dict[str, str]:
    """LD_LIBRARY_PATH where it is set: a Python that was built somewhere unusual does not start without it."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def interpreter_of(executable: str) -> str:
    """Read from a 64-bit ELF file the path of the loader that starts it (PT_INTERP); "" for a static one."""
    content = Path(executable).read_bytes()
    table, size, count = (int.from_bytes(content[a:b], "little") for a, b in ((0x20, 0x28), (0x36, 0x38), (0x38, 0x3A)))
    for header in range(table, table + size * count, size):
        if content[header : header + 4] == b"\x03\0\0\0":
            offset, length = (int.from_bytes(content[header + a : header + a + 8], "little") for a in (8, 0x20))
            return content[offset : offset + length].rstrip(b"\0").decode()
    return ""
