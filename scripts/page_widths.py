"""Find what is wider than the window on a page: opened in headless Chromium, at several widths.

    python scripts/page_widths.py out/run/report.html --pictures /tmp/pictures

An element counts if its content is wider than itself and it cuts or scrolls the rest, or if it ends to the right of the
window; folded parts are opened first. Exit code 1: there is such an element. Needs chromium on the path.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WIDTHS = (390, 768, 1280)  # a phone, a tablet, a laptop; pixels
LEAST = 500  # width in pixels below which Chromium's window does not go: a page is in a frame of its width
MEASURE = """
function measured(frame) {
  const page = frame.contentDocument, root = page.documentElement, height = root.scrollHeight, found = [];
  for (const each of page.querySelectorAll("details")) each.open = true;
  for (const each of page.body.querySelectorAll("*")) {
    if (each.closest("svg") || !each.getClientRects().length) continue;
    const cut = each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX !== "visible";
    if (cut || each.getBoundingClientRect().right > root.clientWidth + 1)
      found.push(each.tagName.toLowerCase() + " " + each.className + ": " + each.textContent.trim().slice(0, 60));
  }
  if (root.scrollWidth > root.clientWidth) found.push("the page: " + root.scrollWidth + " px");
  return [height, found];
}
onload = () => {
  const all = [...document.querySelectorAll("iframe")].map(measured);
  document.getElementById("found").textContent = JSON.stringify(all);
};
"""


class Fit(NamedTuple):
    """How a page fits a width."""

    height: int  # of the page as it opens, pixels
    too_wide: list[str]  # elements, in the order of the page


def fits(page: str, widths: Sequence[int]) -> list[Fit]:
    """Measure a page, the text of an HTML file, at each width in pixels."""
    frames = "".join(_frame(page, width, 800) for width in widths)
    text = _chromium(f'{frames}<pre id="found"></pre><script>{MEASURE}</script>', "--dump-dom")
    found = json.loads(html.unescape(re.findall(r'<pre id="found">(.*?)</pre>', text, re.S)[-1]))
    return [Fit(*each) for each in found]


def picture(page: str, width: int, height: int, dark: bool, file: Path) -> None:
    """Write a picture of a page."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={max(width, LEAST)},{height}"
    _chromium(_frame(page, width, height), scheme, size, f"--screenshot={file.resolve()}")


def _frame(page: str, width: int, height: int) -> str:
    style = f"border: 0; display: block; width: {width}px; height: {height}px"
    return f'<iframe style="{style}" srcdoc="{html.escape(page)}"></iframe>'


def _chromium(body: str, *options: str) -> str:
    """Open a page with this body, and return what Chromium prints."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("error: no chromium, chromium-browser or google-chrome on the path")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin: 0">{body}', encoding="utf-8")
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", *options, file.as_uri()]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    return done.stdout


def main() -> int:
    """Measure each page at each width; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="pixels, separated by commas")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also write pictures, light and dark")
    options = parser.parse_args()
    widths, faults = [int(width) for width in options.widths.split(",")], 0
    for path in options.pages:
        page = path.read_text(encoding="utf-8")
        for width, fit in zip(widths, fits(page, widths), strict=True):
            faults += len(fit.too_wide)
            print(f"{path} at {width} px: {'too wide' if fit.too_wide else 'fits'}", *fit.too_wide, sep="\n    ")
            if options.pictures is not None:
                options.pictures.mkdir(parents=True, exist_ok=True)
                for theme in ("light", "dark"):
                    file = options.pictures / f"{path.resolve().parent.name}-{width}-{theme}.png"
                    picture(page, width, fit.height, theme == "dark", file)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
