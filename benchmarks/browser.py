"""Looks at a report in headless Chromium: what overflows, is empty, cut off or too pale; and takes pictures of it.

    python -m diffpress.benchmarks.browser BUNDLE/report/report.html --width 1280 --screenshot page.png

The page stands in a frame, as windows are never narrower than 500 pixels.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffpress.errors import DiffpressError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 300  # a page takes three on an idle machine
PROBE = Path(__file__).parent / "probe.js"
_FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><style>
body {{ margin: 0 }} iframe {{ display: block; border: 0; width: {width}px; height: {height}px }}
</style><iframe srcdoc="{page}"></iframe>{script}"""


def find() -> str | None:
    """The browser of this machine; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(page: str, width: int, dark: bool = False, script: bool = True) -> dict[str, Any]:
    """What the probe saw of a page of HTML at a width in pixels: its height, and a list of faults in words.

    Without `script` that of the page does not run. Raises `DiffpressError` where there is no browser, or it fails.
    """
    # The probe runs in the frame's parent, so that it works where the page's own script may not.
    probe = f"<script>{PROBE.read_text('utf-8')}</script>"
    shown = _framed(page if script else _scriptless(page), width, 800, probe)
    text = _run(shown, max(500, width), 800, dark, "--dump-dom")
    found = re.search(r'data-seen="([^"]*)"', text)
    if found is None:
        raise DiffpressError("the browser showed the page, but its probe did not end")
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


def screenshot(page: str, file: Path, width: int, dark: bool = False, height: int | None = None) -> None:
    """Write a PNG of the whole page, or of its first `height` pixels."""
    height = height or int(look(page, width, dark)["height"])
    _run(_framed(page, width, height), width, height, dark, f"--screenshot={file.resolve()}")
    if width < 500:  # of a window that is wider than the page
        from PIL import Image

        Image.open(file).crop((0, 0, width, height)).save(file)


def _scriptless(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def _framed(page: str, width: int, height: int, script: str = "") -> str:
    return _FRAME.format(width=width, height=height, page=html.escape(page), script=script)


def _run(document: str, width: int, height: int, dark: bool, action: str) -> str:
    browser = find()
    if browser is None:
        raise DiffpressError(f"there is no browser to look with: install one of {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="diffpress-browser-") as folder:
        file = Path(folder) / "page.html"
        file.write_text(document, "utf-8")
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", f"--user-data-dir={folder}/profile", f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000", action,
            file.as_uri(),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise DiffpressError(f"{browser} did not end within {SECONDS} seconds") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        raise DiffpressError(f"{browser} failed ({done.returncode}): {lines[-1]}")
    return done.stdout


def main() -> None:
    """Print what is wrong with a page; with --screenshot take its picture."""
    parser = argparse.ArgumentParser(description="look at a report in headless Chromium")
    parser.add_argument("page", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, help="of the picture (default: the whole page)")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--screenshot", type=Path, metavar="FILE")
    options = parser.parse_args()
    page = options.page.read_text("utf-8")
    seen = look(page, options.width, options.dark)
    sys.stdout.write("\n".join(seen["faults"] or ["nothing is wrong"]) + "\n")
    if options.screenshot:
        screenshot(page, options.screenshot, options.width, options.dark, options.height)


if __name__ == "__main__":
    main()
