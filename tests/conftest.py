"""Options of the whole suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--refresh-golden",
        action="store_true",
        help="write the files under tests/golden/ anew instead of comparing with them; review the change as a diff",
    )
