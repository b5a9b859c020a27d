"""The sandbox on this machine: what it gives, what gets out (nothing), and that nothing runs where it is not there."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stillhouse.pipeline.sandbox import seccomp
from stillhouse.pipeline.sandbox.packages import ShownPackages, shown_packages
from stillhouse.pipeline.sandbox.probe import probed
from stillhouse.pipeline.sandbox.process import SandboxProcess
from stillhouse.pipeline.sandbox.python_view import _view
from stillhouse.pipeline.sandbox.records import Limits, SandboxUnavailable
from stillhouse.pipeline.sandbox.run import run_by_route, run_sandboxed
from stillhouse.pipeline.sandbox.service import SandboxService
from stillhouse.pipeline.verifiers.code import verify_program
from tests import as_nobody
from tests.harness import attack_table, sandbox_attacks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    """What the probe finds here; the test is skipped by name where the kernel refuses what the strict tier needs."""
    found = probed()
    through = [why for why in found.missing.split("; ") if ": a program could" in why and "unsafe" not in why]
    assert not through, "the sandbox can be made here and lets something through"
    if found.tier != "strict":
        pytest.skip(f"no strict sandbox on this machine: {found.missing}")
    return found


def as_user_or_skip():
    if why := as_nobody.why_not():
        pytest.skip(why)


def test_a_program_gets_its_files_and_input_and_returns_what_it_wrote(report):
    """Nothing could be verified: the program would see other files or input, or its output would be cut."""
    files = {"main.py": "import sys, helper\nprint(helper.f(sys.stdin.read()))\nsys.exit(3)", "helper.py": "f = str.upper"}
    result = run_sandboxed(files, ("main.py",), "a\u00e9" * 100_000)
    assert (result.stdout.decode(), result.stderr, result.exit_status) == ("A\u00c9" * 100_000 + "\n", b"", 3)
    assert not result.timed_out
    assert result.killed_for == ""


def test_the_standard_library_works_inside(report):
    """Honest programs would fail in the sandbox, and with them correct traces."""
    program = """
import asyncio, bisect, collections, concurrent.futures, ctypes, decimal, fractions, hashlib, heapq, itertools, json, math
import multiprocessing, random, re, sqlite3, statistics, string, subprocess, sys, tempfile, threading, zlib
async def later(): await asyncio.sleep(0.01); return 1
with concurrent.futures.ThreadPoolExecutor(4) as pool, tempfile.TemporaryFile() as file:
    threads = sum(pool.map(int, "1234"))
with multiprocessing.Pool(2) as pool:
    processes = sum(pool.map(int, "1234"))
rows = sqlite3.connect(":memory:").execute("select 3").fetchall()
child = subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True, text=True).stdout
print(asyncio.run(later()), threads, processes, rows, child.strip(), len(hashlib.sha256(b"").hexdigest()))
"""
    result = run_sandboxed({"main.py": program}, ("main.py",))
    assert result.stdout.decode() == "1 10 10 [(3,)] 5 64\n", result.stderr.decode()


def test_a_file_that_leads_out_of_the_work_folder_is_refused(report):
    """An entry of a data set could write where the launcher may."""
    for name in ("/etc/x", "../x", "a/../../x", "."):
        with pytest.raises(ValueError, match="inside its work folder"):
            run_sandboxed({name: ""}, ("-c", ""))


def test_attacks_are_refused(report):
    """A model-written program could read the caller's files, reach the network, or take the machine down."""
    outcomes = sandbox_attacks.run_all("strict", report.route, every=16)
    assert len(outcomes) >= 300
    assert [outcome for outcome in outcomes if outcome.leaked] == []


@pytest.mark.slow
@pytest.mark.parametrize("route", ["own", "bubblewrap"])
def test_every_attack_and_cheat_is_refused_to_both_users_by_both_routes(report, route):
    """The table above would hold for root only, or only with bubblewrap installed."""
    if route == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    users = ("me",) if as_nobody.why_not() else ("me", "nobody")  # whoever is not root is the other user already
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}

    def attacked(user: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.harness.sandbox_attacks", "--route", route, "--user", user]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    with ThreadPoolExecutor(2) as side_by_side:  # most of the time is waiting for deadlines
        for answer in side_by_side.map(attacked, users):
            assert answer.returncode == 0, answer.stdout + answer.stderr
            assert re.search(r"[4-9]\d\d attacks, 0 leaks; \d{3} scoring cheats, 0 false passes", answer.stdout)


@pytest.mark.slow
def test_the_table_sees_leaks_where_there_is_no_sandbox():
    """The table would pass whatever the sandbox lets through."""
    as_user_or_skip()
    code = (
        "from tests.harness import sandbox_attacks as a\n"
        "a.programs = lambda: []\n"
        "a.CALLS = {}\n"  # they would leave shared memory and the like on this machine
        "found = a.run_all('unsafe-limits', None)\n"
        "print(*sorted({o.kind for o in found if o.leaked}), sum(o.leaked for o in found))"
    )
    answer = as_nobody.run(["-c", code], timeout_s=120)
    kinds = answer.stdout.split()
    assert set(kinds[:-1]) >= {"environment", "files", "network", "processes"}, answer.stderr
    assert int(kinds[-1]) > 40


@pytest.mark.parametrize("route", ["own", "bubblewrap"])
def test_namespaces_hold_without_the_filter(report, monkeypatch, route):
    """Only seccomp would stand between a program and the machine; the layers behind it would be untried."""
    if route == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    allow_all = seccomp.struct.pack("=HBBI", seccomp._RETURN, 0, 0, seccomp._ALLOW)
    monkeypatch.setattr("stillhouse.pipeline.sandbox.process.seccomp_filter", lambda machine: allow_all)
    monkeypatch.setattr("stillhouse.pipeline.sandbox.process.landlock_version", lambda: 0)
    monkeypatch.setattr(sandbox_attacks, "CALLS", {})
    monkeypatch.setattr(sandbox_attacks, "programs", lambda: [])
    kernel_only = {"talk to the kernel over netlink", "use the kernel's crypto sockets", "listen", "see a network interface"}
    kernel_only |= {"send UDP", "reach the hypervisor (vsock)", "bind one of a pair", "serve with multiprocessing"}
    kernel_only |= {"trace its own child", "run the loader on what it wrote"}  # and sockets that lead nowhere
    kernel_only |= {"serve on every address", "be told when the library's folder is used", "lease its own file"}
    kernel_only |= {"map it by the C library", "map shared memory that stays when it is unmapped", "swap itself out"}
    kernel_only |= {"share its pages with others'", "allow itself a core dump", "allow itself a core dump by the old call"}
    kernel_only |= {"allow another process a core dump"}
    leaked = {o.name for o in sandbox_attacks.run_all("strict", route) if o.leaked}
    assert leaked <= kernel_only | {"run a binary it wrote", "run a library as a program", "run from shared memory"}


def test_landlock_holds_without_namespaces():
    """The tier below strict would be no tier at all."""
    code = (
        "import json\nfrom stillhouse.pipeline.sandbox.probe import probe\nfound = probe(routes=())\n"
        "print(json.dumps([found.tier, found.missing, {c.name: c.refused for c in found.checks}]))"
    )
    if os.geteuid() == 0:
        as_user_or_skip()
        answer = as_nobody.run(["-c", code], timeout_s=120)
    else:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    tier, missing, refused = json.loads(answer.stdout)
    if tier != "unsafe-confined":
        pytest.skip(f"unsafe-confined is not there: {missing}")
    for name in ("read another user's file", "write outside the work folder", "connect over TCP", "leave a process behind"):
        assert refused[name], name


# Makes this process's kernel answer some system calls as if it did not have them, for it and all that it starts.
FORBID = """
import ctypes, os, platform, struct
from stillhouse.pipeline.sandbox import seccomp as s
def forbid(*, landlock, filters):
    program = [(s._LOAD, 0, 0, 0)]
    for number in (444, 445, 446) if landlock else ():
        program += [(s._JUMP_IF_EQUAL, 0, 1, number), (s._RETURN, 0, 0, s._ERRNO | s._ENOSYS)]
    if filters:  # prctl(PR_SET_SECCOMP), invalid where the kernel was built without
        program += [(s._JUMP_IF_EQUAL, 0, 3, s._PRCTL[platform.machine()]), (s._LOAD, 0, 0, s._argument(0))]
        program += [(s._JUMP_IF_EQUAL, 0, 1, 22), (s._RETURN, 0, 0, s._ERRNO | 22)]
    program.append((s._RETURN, 0, 0, s._ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in program), 8 * len(program))
    order = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, order, 0, 0) == 0
"""


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_a_kernel_without_landlock_is_reported(report):
    """The user would believe in a layer that is not there; the tier that stands on it alone would let programs read files."""
    answer = in_a_process(
        f"{FORBID}\nforbid(landlock=True, filters=False)\n"
        "from stillhouse.pipeline.sandbox.probe import probe\n"
        "whole, below = probe(), probe(routes=())\n"
        "print(whole.tier, *whole.layers, sep='; ')\nprint(below.tier, below.missing, sep='; ')"
    )
    whole, below = answer.stdout.splitlines() or [answer.stderr, ""]
    assert whole.startswith("strict; ")
    assert "no Landlock in this kernel" in whole
    assert "unsafe-confined: this kernel has no Landlock" in below
    assert not below.startswith("unsafe-confined")


def test_nothing_runs_on_a_kernel_without_seccomp(report, tmp_path):
    """Programs would run with every system call of the kernel open to them."""
    witness = tmp_path / "witness"
    program = f"open({str(witness)!r}, 'w')"
    answer = in_a_process(
        f"{FORBID}\nforbid(landlock=False, filters=True)\n"
        "from stillhouse.pipeline.verifiers.code import verify_program\n"
        f"print(verify_program({{'tests': [{{'stdin': '', 'stdout': ''}}]}}, {program!r}))"
    )
    assert "SandboxUnavailable: programs that a model wrote are not run here" in answer.stderr
    assert "set up seccomp" in answer.stderr
    assert answer.stdout == ""
    assert not witness.exists()


SEES_NUMPY = """
import importlib, os, threading, numpy
found = {}
for name in ("pydantic", "stillhouse", "pandas", "ray", "typer"):
    try:
        importlib.import_module(name)
        found[name] = "imported"
    except ModuleNotFoundError:
        pass
try:
    open("/packages/numpy/x.py", "w")
    found["write"] = "written"
except OSError:
    pass
matrix = numpy.random.default_rng(0).normal(size=(200, 200))
same = numpy.allclose(numpy.linalg.inv(matrix) @ matrix, numpy.eye(200))
print(same, found, sorted({name.partition("-")[0] for name in os.listdir("/packages")}))
"""
RUN_SEES_NUMPY = f"""
import os
os.environ["STILLHOUSE_SANDBOX_PACKAGES"] = "numpy"
from stillhouse.pipeline.sandbox.records import Limits
from stillhouse.pipeline.sandbox.run import run_by_route
for route in os.environ["ROUTES"].split():
    result = run_by_route({{"main.py": {SEES_NUMPY!r}}}, ("main.py",), "", limits=Limits(), tier="strict", route=route)
    print(result.stdout.decode().strip() or result.stderr.decode())
"""


@pytest.mark.parametrize("user", ["me", "nobody"])
def test_a_named_package_is_all_that_is_seen_of_the_environment(report, monkeypatch, user):
    """Programs that use numpy could never be judged; or they would see all that is installed, this project among it."""
    if user == "nobody":
        as_user_or_skip()
    routes = ["own", *(["bubblewrap"] if shutil.which("bwrap") else [])]
    code = RUN_SEES_NUMPY.replace('os.environ["ROUTES"]', repr(" ".join(routes)))
    answer = as_nobody.run(["-c", code], timeout_s=120) if user == "nobody" else in_a_process(code)
    assert answer.stdout.splitlines() == ["True {} ['numpy', 'numpy.libs']"] * len(routes), answer.stdout + answer.stderr


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Installs a package of one file into a folder on the path; returns a function of its name, code and requirements."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, code: str, *requires: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.5.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.5", *(f"Requires-Dist: {r}" for r in requires)]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "RECORD").write_text(f"{name}.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")

    return install


def test_what_a_package_requires_is_shown_too_and_its_version_is_known(report, fake_package, monkeypatch):
    """pandas would not import without numpy; a verdict made with one version would be reused with another."""
    fake_package("stillhouse_fake_base", "five = 5")
    fake_package(
        "stillhouse_fake_top", "from stillhouse_fake_base import five", "stillhouse-fake_base>=1", "not-there; extra == 'x'"
    )
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "stillhouse-fake.top")
    result = run_sandboxed({}, ("-c", "import stillhouse_fake_top; print(stillhouse_fake_top.five)"))
    assert result.stdout == b"5\n", result.stderr
    assert shown_packages().imports == ("stillhouse_fake_top",)
    assert shown_packages().versions == (("stillhouse_fake_base", "1.5"), ("stillhouse_fake_top", "1.5"))
    assert "packages shown: stillhouse_fake_base 1.5, stillhouse_fake_top 1.5" in probed().layers


def test_a_package_that_does_not_import_inside_is_heard_of_before_any_program(report, fake_package, monkeypatch):
    """Each program that imports it would be called wrong."""
    fake_package("stillhouse_fake_lacking", "import stillhouse_fake_missing")
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "stillhouse_fake_lacking")
    with pytest.raises(SandboxUnavailable, match=r"No module named 'stillhouse_fake_missing'\. Name what it needs there too"):
        run_sandboxed({}, ("-c", "print(1)"))


def test_a_package_of_one_file_gets_its_libraries(tmp_path):
    """cffi, a single extension module beside its folder, would not import inside where its library is the machine's."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    (tmp_path / "base.c").write_text("int five(void) { return 5; }")
    (tmp_path / "top.c").write_text("int five(void); int ten(void) { return 2 * five(); }")
    library, package = tmp_path / "libstillhouse_fake.so", tmp_path / "shown" / "stillhouse_fake_top.so"
    package.parent.mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "base.c"], check=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", package, tmp_path / "top.c", library], check=True)
    inside = (str(package), "/packages/stillhouse_fake_top.so")
    shown = _view(ShownPackages(read_only=(inside,))).read_only
    assert (str(library), str(library)) in shown
    assert [pair for pair in shown if pair[0] == str(package)] == [inside]


def test_packages_that_cannot_be_shown_are_refused_by_name(report, fake_package, monkeypatch):
    """A typing error would leave programs undecided; an editable install or a shared folder would show more than was named."""
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "nunpy")
    with pytest.raises(SandboxUnavailable, match="names 'nunpy', which is not installed"):
        run_sandboxed({}, ("-c", "print(1)"))
    fake_package("stillhouse_fake_editable", "")
    for file in Path(sys.path[0]).glob("stillhouse_fake_editable*/RECORD"):
        file.write_text("__editable__.stillhouse_fake_editable.pth,,\nstillhouse_fake_editable-1.5.dist-info/RECORD,,\n")
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "stillhouse_fake_editable")
    with pytest.raises(SandboxUnavailable, match=r"stillhouse_fake_editable is installed .*editable"):
        run_sandboxed({}, ("-c", "print(1)"))
    fake_package("stillhouse_fake_above", "", "stillhouse_fake_editable")
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "stillhouse_fake_above")
    with pytest.raises(SandboxUnavailable, match="stillhouse_fake_editable, which stillhouse_fake_above needs, is"):
        run_sandboxed({}, ("-c", "print(1)"))
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "numpy")
    with (
        pytest.raises(SandboxUnavailable, match="strict only"),
        SandboxProcess({}, ("-c", ""), limits=Limits(), tier="unsafe-limits", route=None),
    ):
        pass


def test_nothing_runs_where_namespaces_are_forbidden(tmp_path):
    """A sandbox that is not there would be noticed only after a program had done its work."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare of util-linux not installed")
    witness = tmp_path / "witness"
    program = f"open({str(witness)!r}, 'w').write('ran')"
    code = (
        "from stillhouse.pipeline.verifiers.code import verify_program\n"
        f"print(verify_program({{'tests': [{{'stdin': '', 'stdout': ''}}]}}, {program!r}))"
    )
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "unshare" in answer.stderr.partition("\n")[0] and answer.returncode == 1 and "Traceback" not in answer.stderr:
        pytest.skip(f"no user namespace to forbid them in: {answer.stderr.strip()}")
    assert "SandboxUnavailable: programs that a model wrote are not run here" in answer.stderr
    assert "max_user_namespaces" in answer.stderr
    assert "STILLHOUSE_SANDBOX" in answer.stderr
    assert answer.stdout == ""
    assert not witness.exists()


def test_a_named_unsafe_tier_runs_with_a_warning():
    """Whoever accepts the risk on a machine of their own could not take it, or would take it without a word."""
    code = (
        "import os; os.environ['STILLHOUSE_SANDBOX'] = 'unsafe-limits'\n"
        "from stillhouse.pipeline.verifiers.code import verify_program\n"
        "entry = {'tests': [{'stdin': '1 2', 'stdout': '3'}]}\n"
        "print(verify_program(entry, 'print(sum(map(int, open(0).read().split())))').outcome, end=' ')\n"
        "print(verify_program({'tests': 'assert f(1) == 2'}, 'def f(n): return 2 * n').outcome)"
    )
    if os.geteuid() == 0:
        as_user_or_skip()
        answer = as_nobody.run(["-c", code], timeout_s=120)
    else:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.stdout == "correct correct\n", answer.stderr
    assert "run in the tier unsafe-limits: they are not shut off from this machine" in answer.stderr


def test_an_unsafe_tier_is_announced(report, caplog):
    """Somebody would run hostile programs unprotected without a line in the log."""
    from stillhouse.pipeline.sandbox import probe as probe_module

    probe_module._warn_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert probe_module.require("unsafe-limits") is None
    assert "not shut off" in caplog.text


def test_many_threads_run_programs_at_once(report):
    """A pool of verifiers would mix up outputs or leave processes behind."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: run_sandboxed({}, ("-c", f"print({n} ** 2)")), range(24)))
    assert [int(result.stdout) for result in results] == [n**2 for n in range(24)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_sandbox_dies_with_its_caller(report):
    """A killed run would leave model-written programs running."""
    mark = "stillhouse-orphan-" + os.urandom(8).hex()
    code = (
        "from stillhouse.pipeline.sandbox.run import run_sandboxed\n"
        f"run_sandboxed({{}}, ('-c', 'import time; time.sleep(600)', {mark!r}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        assert happens(lambda: sandbox_attacks.processes_with(mark) > 1, limit_s=120)  # it probes the machine first
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    assert happens(lambda: sandbox_attacks.processes_with(mark) == 0)


def happens(condition, limit_s: float = 30.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_failed_start_says_at_which_step(report, monkeypatch):
    """The user would learn that the sandbox failed, and not why."""
    from stillhouse.pipeline.sandbox import process as process_module

    view = process_module.python_view()
    missing = replace(view, read_only=(*view.read_only, ("/no/such/library", "/no/such/library")))
    monkeypatch.setattr(process_module, "python_view", lambda: missing)
    with (
        pytest.raises(SandboxUnavailable, match="show /no/such/library"),
        SandboxProcess({}, ("-c", ""), limits=Limits(), tier="strict", route="own") as process,
    ):
        process.wait_until_started()


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_system_call_numbers_are_the_kernels(machine, header):
    """The filter would let through a call that it does not mean to, or refuse one that programs need."""
    if not Path(header).exists():
        pytest.skip(f"no {header}: the kernel's headers are not installed")
    pairs = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    numbers = {name: int(number) for name, number in pairs}
    listed = seccomp.allowed_syscalls(machine)
    assert [name for name, number in listed.items() if numbers.get(name, number) != number] == []
    assert len(set(listed) & set(numbers)) > 100
    denied = {row[machine == "aarch64"] for name, row in attack_table.CALLS.items() if "clone" not in name and "(" not in name}
    assert not denied & set(listed.values())
    by_argument = {"clone", "fcntl", "ioctl", "madvise", "mmap", "prctl", "prlimit64", "setrlimit", "socketpair"}
    assert {name: getattr(seccomp, f"_{name.upper()}")[machine] for name in by_argument} == {n: numbers[n] for n in by_argument}
    assert not by_argument & set(listed)


class RunCode(BaseHTTPRequestHandler):
    """A service that answers SandboxFusion's /run_code with our own sandbox behind it."""

    def do_POST(self):
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/run_code" or order["language"] != "python":
            self.send_error(422, "only python on /run_code")
            return
        limits = Limits(wall_s=order["run_timeout"])
        files = {name: base64.b64decode(content) for name, content in order["files"].items()} | {"main.py": order["code"]}
        result = run_sandboxed(files, ("main.py",), order["stdin"] or "", limits=limits)
        ran = {
            "status": "TimeLimitExceeded" if result.timed_out else "Finished",
            "execution_time": result.seconds,
            "return_code": None if result.timed_out else result.exit_status,
            "stdout": result.stdout.decode(errors="replace"),
            "stderr": result.stderr.decode(errors="replace"),
        }
        status = "Success" if result.exit_status == 0 else "Failed"
        answer = {"status": status, "message": "", "compile_result": None, "run_result": ran, "files": {}}
        if order["stdin"] == "break":
            answer = {"status": "SandboxError", "message": "no worker is left", "run_result": None}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing: the test reads its own output."""


@pytest.fixture(scope="module")
def service(report):
    server = ThreadingHTTPServer(("127.0.0.1", 0), RunCode)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SandboxService(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_runs_programs(service):
    """A cluster whose sandbox is a service could not verify code."""
    result = service.run_program("import sys\nprint(int(input()) + 1)\nsys.exit(4)", "41\n")
    assert (result.stdout, result.exit_status, result.timed_out) == (b"42\n", 4, False)
    assert service.run_program("while True: pass", limits=Limits(wall_s=0.5)).timed_out


def test_a_setup_is_sent_to_a_service(service):
    """Problems that count on imports would be wrong on a cluster and right at home."""
    entry = {"setup": "from math import isqrt", "tests": [{"stdin": "9", "stdout": "3"}]}
    assert verify_program(entry, "print(isqrt(int(input())))", sandbox=service).outcome == "correct"
    assert verify_program(entry, "print(isqrt(4))", sandbox=service).outcome == "wrong"


ON_A_SERVICE = [
    ("def f(a, b): return 10**400 if isinstance(a, float) else a + b", "wrong", "test 3 of 3: returned 1000"),
    ("def f(a, b):\n    print('remark')\n    return a + b", "correct", "all 3 results"),
    ("class Solution:\n    def f(self, a, b): return tuple(a + b) if isinstance(a, list) else a + b", "correct", "all 3"),
    ("def f(a, b): return a + a", "wrong", "test 1 of 3: returned 4, expected 5"),
    ("def f(a, b): return type('All', (list,), {'__eq__': lambda *_: True})()", "wrong", "returned [], expected 5"),
    ("def f(a, b): return f", "wrong", "AttributeError"),
    ("def g(a, b): return 5", "wrong", "name 'f' is not defined"),
    ("import sys; sys.exit(0)", "wrong", "before it had answered all calls: status 0"),
    ("def f(a, b): raise StopIteration", "wrong", "StopIteration"),
    ("import numpy", "undecided", "numpy, which the sandbox service does not have"),
    ("def f(a, b):\n    while True: pass", "undecided", "not ready after"),
]


@pytest.mark.parametrize(
    ("program", "outcome", "said"),
    [*ON_A_SERVICE[:4], *(pytest.param(*row, marks=pytest.mark.slow) for row in ON_A_SERVICE[4:])],
)
def test_rows_of_arguments_are_judged_on_a_service(service, program, outcome, said):
    """A cluster whose sandbox is a service could judge no function at all; or a program there would be its own judge."""
    rows = [
        {"args": [2, 3], "returns": 5},
        {"args": [[1], [2]], "returns": [1, 2]},
        {"args": [0.1, 0.2], "returns": 0.3, "rel_tol": 1e-9},
    ]
    entry = {"tests": rows, "entry_point": "f", "setup": "import math"}
    judgement = verify_program(entry, program, sandbox=service, timeout_s=1 if "while" in program else 30)
    assert judgement.outcome == outcome, judgement
    assert said in judgement.reason


def test_attacks_gain_nothing_by_a_package_that_is_shown(report, monkeypatch):
    """Showing numpy would open a way to files, descriptors or memory that the table finds shut without it."""
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "numpy")
    monkeypatch.setattr(sandbox_attacks, "programs", lambda: [])
    leaked = {outcome.name for outcome in sandbox_attacks.run_all("strict", report.route) if outcome.leaked}
    assert leaked == {"find numpy", "find installed packages by their metadata", "see the caller's variables"}


def test_a_service_that_fails_is_no_verdict(service):
    """A broken service would make every program wrong."""
    with pytest.raises(SandboxUnavailable, match="no worker is left"):
        service.run_program("print(1)", "break")
    with pytest.raises(SandboxUnavailable, match="answered 422"):
        SandboxService(service.url + "/elsewhere").run_program("print(1)")
    with pytest.raises(SandboxUnavailable, match="cannot be reached"):
        SandboxService("http://127.0.0.1:9").run_program("print(1)")
    with pytest.raises(SandboxUnavailable, match="http or https"):
        SandboxService("file:///etc").run_program("print(1)")


def test_the_probe_reports_what_it_tried(report):
    """The plan could not tell the user what protects them."""
    assert {check.name for check in report.checks} >= {
        "connect over TCP",
        "leave a process behind",
        "share out more memory than allowed",
    }
    assert all(check.refused for check in report.checks)
    assert any("namespaces" in layer for layer in report.layers)
    assert run_by_route({}, ("-c", ""), "", limits=Limits(), tier=report.tier, route=report.route).exit_status == 0
