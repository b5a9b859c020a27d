"""Which files a sandboxed interpreter needs: itself, the standard library, the packages that this machine's owner shows
(``packages.py``), and the shared libraries that they load."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stillhouse.pipeline.sandbox.packages import PLACE, ShownPackages, shown_packages
from stillhouse.pipeline.sandbox.records import SandboxUnavailable

# Runs in the base interpreter: loads every extension module of the standard library and of the files and folders on its command
# line, not as Python imports it, though what a library runs when loaded does run; and asks the loader which libraries that
# brought in, by the names it found them under (the soname's link, not the file behind it).
_SURVEY = """
import ctypes, json, os, pathlib, sys, sysconfig
stdlib = sysconfig.get_path("stdlib")
dynload = pathlib.Path(sysconfig.get_path("platstdlib"), "lib-dynload")
shown = [path for top in map(pathlib.Path, sys.argv[1:]) for path in ([top] if top.is_file() else top.rglob("*.so*"))]
for path in [*map(str, sorted(dynload.glob("*.so")) + sorted(shown)), "libgcc_s.so.1"]:
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
# Not /dev/zero: mapped as shared it is memory without a bound (seccomp.py).
_DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True, slots=True)
class PythonView:
    """What is shown to a program.

    Args:
        executable: path of the interpreter, the same inside and outside.
        read_only: pairs (path outside, path inside) of files and folders.
        masked: folders inside these that are shown empty (site-packages).
        devices: device nodes.
        packages: the folder inside that has the packages, "" where none are shown.
        environment: variables for them.
    """

    executable: str
    read_only: tuple[tuple[str, str], ...]
    masked: tuple[str, ...]
    devices: tuple[str, ...]
    packages: str
    environment: Mapping[str, str]


def python_view() -> PythonView:
    """Find the files of this interpreter, once a process; a virtual environment's is its base interpreter.

    About 0.1 s, and as long as the libraries of the packages that are shown take to load (for torch about a second).

    Raises:
        SandboxUnavailable: the interpreter does not start on its own, a library ends it as it is loaded, or a package that
            ``STILLHOUSE_SANDBOX_PACKAGES`` names cannot be shown.
    """
    return _view(shown_packages())


@functools.cache
def _view(packages: ShownPackages) -> PythonView:
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    sources = [source for source, _ in packages.read_only]
    command = [executable, "-I", "-S", "-B", "-c", _SURVEY, *sources]
    answer = subprocess.run(command, capture_output=True, text=True, env=loader_environment(), check=False)
    if answer.returncode:
        said = answer.stderr.strip()[-300:] or f"status {answer.returncode}"
        loads = f", or a library of {packages} ends it" if sources else ""
        raise SandboxUnavailable(f"{executable} does not start on its own{loads}: {said}")
    survey = json.loads(answer.stdout)
    folders = [os.path.abspath(folder) for folder in survey["folders"]]
    inside_folders = tuple(folder + os.sep for folder in (*folders, *sources))
    files = [executable, interpreter_of(executable), "/etc/ld.so.cache", *survey["libraries"]]
    files = [name for name in dict.fromkeys(files) if name and os.path.isfile(name)]
    files = [name for name in files if name not in sources and not os.path.abspath(name).startswith(inside_folders)]
    masked = [str(path) for folder in folders for path in Path(folder).glob("*-packages") if path.is_dir()]
    shown = tuple((os.path.realpath(path), path) for path in (*folders, *files)) + packages.read_only
    devices = tuple(path for path in _DEVICES if os.path.exists(path))
    return PythonView(executable, shown, tuple(masked), devices, PLACE if sources else "", packages.environment)


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
