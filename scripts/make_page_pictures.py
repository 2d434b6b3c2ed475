"""Draw docs/ui-form.png and docs/ui-run.png: the page of `mindspeed-simpo ui` with a finished run of the quickstart.

python -m scripts.make_page_pictures outputs/quickstart

It needs the extra `ui`, playwright and a Chromium, as the tests of the page do.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser import open_browser, open_page

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
CONFIGURATION, RUN = "configs/quickstart.yaml", "outputs/quickstart"
LARGEST_BYTES = 200_000
WIDTH, HEIGHT, RUN_HEIGHT = 1280, 860, 1760


def copy(run: Path, home: Path) -> Path:
    """A root folder with the quickstart and the run, without its checkpoints, in a home folder of its own."""
    root = home / "mindspeed_simpo"
    shutil.copytree(REPO / "configs" / "quickstart", root / "configs" / "quickstart")
    shutil.copy(REPO / CONFIGURATION, root / "configs")
    shutil.copytree(run, root / RUN, ignore=shutil.ignore_patterns("checkpoints", "hf", "start", "tensorboard"))
    return root


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a page with a root folder."""
    words = [sys.executable, "-m", "mindspeed_simpo", "ui", "--root", str(root), "--port", "0"]
    environment = os.environ | {"HOME": str(root.parent)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def write(page: Any, path: Path) -> None:
    """A picture of what the page shows, as a PNG of few colours."""
    image = Image.open(io.BytesIO(page.screenshot()))
    image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > LARGEST_BYTES:
        raise SystemExit(f"error: {path} has {path.stat().st_size} bytes, more than {LARGEST_BYTES}")


def draw_form(page: Any) -> None:
    """The form with the quickstart, checked."""
    page.locator("#source input").fill(CONFIGURATION)
    page.keyboard.press("Enter")
    page.locator("#load").click()
    page.wait_for_selector("#verdict .good")
    page.locator("#ranks input").fill("2")
    page.locator("#check").click()
    page.wait_for_selector("#answer .notice.good", timeout=120_000)
    page.evaluate("document.querySelector('#answer .terminal').scrollTop = 0")
    page.wait_for_timeout(500)
    write(page, DOCS / "ui-form.png")


def draw_run(page: Any) -> None:
    """The curves and answers of the run."""
    page.set_viewport_size({"width": WIDTH, "height": RUN_HEIGHT})
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_function("document.querySelectorAll('.curve .scatterlayer .trace').length > 8")
    page.wait_for_timeout(1000)
    write(page, DOCS / "ui-run.png")


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of the quickstart")
    run = parser.parse_args().run
    if not (run / "metrics.jsonl").is_file():
        raise SystemExit(f"error: {run} holds no run")
    with (
        tempfile.TemporaryDirectory() as home,
        served(copy(run, Path(home))) as url,
        open_browser() as browser,
        open_page(browser, url, width=WIDTH, height=HEIGHT) as page,
    ):
        draw_form(page)
        draw_run(page)


if __name__ == "__main__":
    main()
