"""The report in a real headless Chromium: what a reader sees, and what the page tries to do behind their back."""

import html
import json
import re
import shutil
import struct
import subprocess
import zlib

import pytest

from stillhouse.pipeline.report import write_report
from tests.report_example import MARKUP, make_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (looked for chromium, chromium-browser, google-chrome)"
)
OUTSIDE = "http://127.0.0.1:9/pixel.png"  # nothing listens there; asking is what must not happen


def browse(page, tmp_path, *arguments):
    """Open a file; returns the finished document, the console's lines, and the addresses that the page asked for."""
    net_log = tmp_path / "net.json"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser's own calls home stay here, too
        f"--log-net-log={net_log}",
        f"--user-data-dir={tmp_path / 'profile'}",
        *arguments,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    # One event a line. What the browser asks for on its own account (updates, time) has "not an origin" as initiator.
    asked = re.findall(r'"initiator":"([^"]*)".*?"url":"([^"]+)"', net_log.read_text(errors="replace"))
    requests = sorted({url for initiator, url in asked if initiator != "not an origin"})
    return done.stdout, console, requests


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    _, page = write_report(make_report(), tmp_path_factory.mktemp("run"))
    return page


def test_a_reader_sees_the_report(report_page, tmp_path):
    """The page would open blank, or without the numbers, in the program that people read it with."""
    document, console, requests = browse(report_page, tmp_path, "--dump-dom")
    assert "<title>Stillhouse: demo</title>" in document
    report = make_report()
    text = html.unescape(re.sub(r"<[^>]+>", " ", document.partition("<body>")[2]))
    for step in report.results.funnel:
        assert f"{step.num_kept:,} kept" in text
    assert "402 dropped (11.4 %)" in text
    assert "84.4 % [80.3, 87.8]" in re.sub(r"\s+", " ", text)
    assert document.count("<polyline") == 2
    assert (console, requests) == ([], [])


def test_a_trace_that_carries_a_script_is_shown_and_not_run(report_page, tmp_path):
    """A completion could rename the page, call home, or draw over it."""
    document, console, _ = browse(report_page, tmp_path, "--dump-dom")
    assert html.escape(MARKUP, quote=False) in document
    assert "<title>Stillhouse: demo</title>" in document
    assert console == []


def test_the_policy_stops_what_the_escaping_would_miss(report_page, tmp_path):
    """Were an escape forgotten one day, the page would call home; and the checks above would not notice a request."""
    text = report_page.read_text()
    attack = f"<img src='{OUTSIDE}'><script>document.title = 'taken over'</script>"
    hostile = tmp_path / "hostile.html"
    hostile.write_text(text.replace("<main>", f"<main>{attack}", 1))
    document, console, requests = browse(hostile, tmp_path / "a", "--dump-dom")
    assert requests == []
    assert "<title>Stillhouse: demo</title>" in document
    assert len(console) >= 2  # both refusals are told

    open_door = tmp_path / "open.html"
    open_door.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile.read_text()))
    document, _, requests = browse(open_door, tmp_path / "b", "--dump-dom")
    assert requests == [OUTSIDE]
    assert "<title>taken over</title>" in document


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out_of_the_page(report_page, tmp_path, width):
    """On a telephone the reader would have to scroll sideways, or see numbers cut off."""
    probe = (
        "<script>const root = document.documentElement;"
        "document.title = JSON.stringify([innerWidth, root.scrollWidth, document.querySelectorAll('svg').length]);</script>"
    )
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report_page.read_text())
    inner = text.replace("</body>", probe + "</body>").replace("<details>", "<details open>")
    # A frame, because the browser does not make a window narrower than 500 pixels.
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(inner)}"></iframe>'
    read = "<script>onload = () => { document.title = frames[0].document.title }</script>"
    outer = tmp_path / "frame.html"
    outer.write_text(f"<!doctype html><title></title><body style='margin:0'>{frame}{read}</body>")
    document, console, _ = browse(outer, tmp_path, "--dump-dom", "--window-size=1400,1000")
    inner_width, scroll_width, charts = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document)[1]))
    assert (console, inner_width) == ([], width)
    assert scroll_width <= width
    assert charts > 20


def pixels(path):
    """Rows of an 8-bit RGB or RGBA PNG as bytes, and the bytes a pixel (PNG specification, sections 9 and 10)."""
    raw, position, data = path.read_bytes(), 8, b""
    while position < len(raw):
        length, kind = struct.unpack(">I4s", raw[position : position + 8])
        body = raw[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            size = {2: 3, 6: 4}[colour]
        if kind == b"IDAT":
            data += body
        position += 12 + length
    flat, stride, rows = zlib.decompress(data), width * size, []
    previous = bytearray(stride)
    for y in range(height):
        start = y * (stride + 1)
        row = bytearray(flat[start + 1 : start + 1 + stride])
        for x in range(stride):
            left = row[x - size] if x >= size else 0
            up, corner = previous[x], previous[x - size] if x >= size else 0
            row[x] = (row[x] + predict(flat[start], left, up, corner)) & 255
        rows.append(bytes(row))
        previous = row
    return rows, size


def predict(kind, left, up, corner):
    if kind == 4:
        guess = left + up - corner
        return min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
    return (0, left, up, (left + up) // 2)[kind]


@pytest.mark.parametrize(("scheme", "page_colour", "dot_colour"), [("light", "f7f6f3", "0d7d68"), ("dark", "141516", "41c3a6")])
def test_the_charts_are_painted_in_both_colour_schemes(report_page, tmp_path, scheme, page_colour, dot_colour):
    """The page would be white on white for readers whose system is dark, or its charts would stay empty."""
    picture = tmp_path / "page.png"
    arguments = ["--force-dark-mode"] if scheme == "dark" else []
    browse(report_page, tmp_path, "--window-size=800,700", f"--screenshot={picture}", *arguments)
    rows, size = pixels(picture)
    counts = {colour: 0 for colour in (page_colour, dot_colour)}
    for row in rows:
        for colour in counts:
            wanted = bytes.fromhex(colour)
            counts[colour] += sum(row[x : x + 3] == wanted for x in range(0, len(row), size))
    assert counts[page_colour] > 20_000  # the margins
    assert counts[dot_colour] > 60  # the checkpoint's dot, whiskers and legend
