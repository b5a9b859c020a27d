"""The command starts at once: `stillhouse --help` loads none of the heavy libraries."""

import resource
import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("stillhouse"))


def cpu_seconds(*arguments: str) -> float:
    """User and system time of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert answer.returncode == 0, answer.stderr
    assert "Usage" in answer.stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_in_under_half_a_second_of_cpu():
    """Every completion and every typing error in the shell would wait for torch and ray to load."""
    assert min(cpu_seconds("--help") for _ in range(3)) < 0.5


def test_help_loads_no_heavy_library():
    """The same, told by cause: a module-level import that drags in torch names itself here."""
    code = (
        "import sys; sys.argv = ['stillhouse', '--help']\n"
        "from stillhouse.jobs.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'trl', 'peft', 'pyarrow', 'numpy', 'reasoning_gym'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in answer.stdout, answer.stdout + answer.stderr
