"""Look at the built site in a browser: `python docs/look.py [--pictures FOLDER] [PAGE ...]`, after `make docs`.

It opens each page at 400 and at 1280 pixels, and fails if a page scrolls sideways at 400 or a block of code is cut at 1280.
With `--pictures` it also takes a picture of each page at both widths, light and dark. It needs Chromium (on Debian
`apt-get install chromium`), and says so if there is none.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

SITE = Path(__file__).parents[1] / ".cache" / "site"
WIDTHS = (400, 1280)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: The height of a picture at most.
MOST_PIXELS = 12000
#: Opens the pages one after the other in a frame of each width, and sends what it measured.
MEASURE = """<!doctype html><body><script>
async function measured(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  const loaded = new Promise((done) => (frame.onload = done));
  document.body.append(frame);
  await loaded;
  await new Promise((done) => setTimeout(done, 250)); // scripts of the site put tables into boxes that scroll
  const root = frame.contentDocument.documentElement;
  const cut = [...root.querySelectorAll("pre > code")].filter((code) => code.scrollWidth > code.clientWidth + 1);
  const wide = [...root.querySelectorAll(".md-content *")].filter((each) => each.getBoundingClientRect().right > width + 1
    && !each.closest(".md-typeset__scrollwrap, pre"));
  const found = { page, width, height: root.scrollHeight, sideways: root.scrollWidth - root.clientWidth,
    cut: cut.map((code) => code.textContent.slice(0, 60)),
    wide: wide.slice(0, 3).map((each) => each.outerHTML.slice(0, 80)) };
  frame.remove();
  return found;
}
(async () => {
  const found = [];
  for (const page of PAGES) for (const width of WIDTHS) found.push(await measured(page, width));
  await fetch("/__found__", { method: "POST", body: JSON.stringify(found) });
})();
</script>"""
#: Shows one page in a frame of a width, light or dark.
FRAME = """<!doctype html><body style="margin: 0">
<iframe src="PAGE" style="width: WIDTHpx; height: HEIGHTpx; border: 0; display: block"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument;
  page.head.append(Object.assign(page.createElement("style"), { textContent: "* { transition: none !important }" }));
  page.body.setAttribute("data-md-color-scheme", "SCHEME");
};
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, and two pages that show pages of it in frames."""

    pages: dict[str, str] = {}
    found: queue.Queue[Any] = queue.Queue()

    def do_GET(self) -> None:
        text = self.pages.get(self.path)
        if text is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self) -> None:
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def browser() -> str | None:
    """The command of a browser, or `None`."""
    return next((each for each in BROWSERS if shutil.which(each)), None)


def pages_of(site: Path) -> list[str]:
    """The addresses of all pages."""
    return sorted(f"/{path.parent.relative_to(site).as_posix()}/".replace("/./", "/") for path in site.rglob("index.html"))


def problems_of(found: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the measured pages."""
    problems = []
    for each in found:
        if each["width"] == min(WIDTHS) and each["sideways"] > 0:
            problems.append(
                f"{each['page']} scrolls sideways at {each['width']} pixels, by {each['sideways']}: {each['wide']}"
            )
        if each["width"] == max(WIDTHS):
            problems += [f"{each['page']} cuts a block of code at {each['width']} pixels: {code!r}" for code in each["cut"]]
    return problems


def look(pages: list[str], pictures: Path | None = None, site: Path = SITE, seconds: float = 600) -> list[str]:
    """Open pages in the browser, and return what is wrong with them."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    Handler.pages["/__look__"] = MEASURE.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        start = [
            str(browser()),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen([*start, "--remote-debugging-port=0", f"{address}/__look__"], **quiet)
        try:
            found = Handler.found.get(timeout=seconds)
        finally:
            running.terminate()
            running.wait()
        for each in found:
            if pictures is None:
                break
            page, width, height = each["page"], each["width"], min(each["height"], MOST_PIXELS)
            for name, scheme in {"light": "default", "dark": "slate"}.items():
                text = FRAME.replace("PAGE", page).replace("WIDTH", str(width)).replace("HEIGHT", str(height))
                Handler.pages["/__frame__"] = text.replace("SCHEME", scheme)
                path = pictures / f"{quote(page.strip('/') or 'index', safe='').replace('%2F', '_')}_{width}_{name}.png"
                size = [f"--window-size={width},{height}", f"--screenshot={path}", "--virtual-time-budget=3000"]
                subprocess.run([*start, *size, f"{address}/__frame__"], **quiet, check=True)
    server.shutdown()
    server.server_close()
    return problems_of(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="a folder for pictures")
    parser.add_argument("pages", nargs="*", help="addresses such as /api/apply_lora/; all pages if there are none")
    arguments = parser.parse_args()
    if browser() is None:
        sys.exit(f"This needs a browser, one of {', '.join(BROWSERS)}. On Debian: apt-get install chromium")
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    problems = look(arguments.pages or pages_of(SITE), arguments.pictures)
    print("\n".join(problems) or "No page scrolls sideways, and no code is cut.")
    sys.exit(bool(problems))
