"""Options of the whole suite, and what every test process starts with."""

import os
import sys
from collections import Counter

import pytest

# Ray reads a token once a process and keeps it: a second local Ray under another HOME would be refused with the first one's.
# Processes that tests start (the fixture `environment`) go without this, so that tokens are used there.
os.environ["RAY_AUTH_MODE"] = "disabled"


def pytest_addoption(parser):
    parser.addoption(
        "--refresh-golden",
        action="store_true",
        help="write the files under tests/golden/ anew instead of comparing with them; review the change as a diff",
    )


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: begun last, one of them keeps a process busy when the others have ended."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(autouse=True)
def _forget_modules_of_temporary_folders(tmp_path_factory):
    """A module that a test wrote and imported must not be what another test gets under that name."""
    before = set(sys.modules)
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]
