"""What the tests of the chat client share: a server with a tiny random model, and a run's ledger and store."""

from __future__ import annotations

import pytest

from stillhouse.teachers.local import TransformersGenerator
from tests.chat_server import ChatServer
from tests.endpoint_run import Run
from tests.tiny_models import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> TransformersGenerator:
    return TransformersGenerator(make_model(tmp_path_factory.mktemp("models") / "qwen", "Qwen2"), dtype="float32")


@pytest.fixture
def server(model):
    with ChatServer(model) as running:
        yield running


@pytest.fixture
def slept() -> list[float]:
    """Seconds that the client wanted to wait between attempts, instead of waiting."""
    return []


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)
