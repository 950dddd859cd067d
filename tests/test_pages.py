"""The built documentation in a browser: ``make test-pages``, which needs Chromium or Chrome."""

from __future__ import annotations

import functools
import http.server
import json
import queue
import shutil
import subprocess
import sys
import threading

import pytest

import mpi_job

pytestmark = [pytest.mark.mpi_skip, pytest.mark.browser]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (390, 1280)  # of a phone and of a laptop, in pixels
LIMIT = 300  # seconds

# Loads each page in a frame of each width, and sends what reaches beyond it and is not in a box that scrolls, and what
# is written beyond the edge of its picture.
FRAMES = """<!doctype html><body><script>
const inBox = (element) => {
  for (let e = element.parentElement; e && e.ownerDocument.body !== e; e = e.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true;
  return false;
};
(async () => {
  const found = {};
  for (const width of WIDTHS) for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:800px;border:0`;
    frame.src = page;
    document.body.append(frame);
    await new Promise((loaded) => { frame.onload = loaded; });
    const doc = frame.contentDocument;
    found[`${page} at ${width}`] = {
      width: doc.documentElement.scrollWidth,
      text: doc.body.innerText.length,
      wide: [...doc.querySelectorAll("article *")]
        .filter((e) => e.getBoundingClientRect().right > width + 1 && !inBox(e))
        .map((e) => `<${e.tagName.toLowerCase()} class="${e.getAttribute("class")}"> ${e.textContent.slice(0, 60)}`),
      cut: [...doc.querySelectorAll("svg text")].filter((e) => {
        const box = e.getBBox(), picture = e.ownerSVGElement.viewBox.baseVal;
        return box.x < picture.x || box.x + box.width > picture.x + picture.width;
      }).map((e) => e.textContent),
    };
    frame.remove();
  }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the pages and the frames, and takes what was found."""

    def __init__(self, *args, frames, found, **options):
        self.frames, self.found = frames, found
        super().__init__(*args, **options)

    def do_GET(self):
        """Answer with the frames, or with a file of the documentation."""
        if self.path != "/frames":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.frames.encode())

    def do_POST(self):
        """Take what the frames have found."""
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """Build the documentation."""
    out = tmp_path_factory.mktemp("html")
    docs = mpi_job.ROOT / "docs"
    options = ["-q", "-d", docs / "_build" / "doctrees", "-b", "html", docs, out]
    subprocess.run([sys.executable, "-m", "sphinx", *options], check=True, timeout=LIMIT)
    return out


def measure(html, pages, profile):
    """Return what a browser finds of each page at each width."""
    names = [name for name in BROWSERS if shutil.which(name)]
    assert names, (
        f"none of {', '.join(BROWSERS)} is installed; on Debian and Ubuntu: apt install chromium"
    )
    frames = FRAMES.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    found = queue.Queue()
    handler = functools.partial(Handler, directory=html, frames=frames, found=found)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        address = f"http://127.0.0.1:{server.server_port}/frames"
        # It would end when the page is loaded, but for the port on which it waits for a debugger.
        browser = subprocess.Popen(
            [names[0], *options, "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return found.get(timeout=LIMIT)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()


def test_no_page_scrolls_sideways(html, tmp_path):
    """Neither on a phone nor on a laptop: wide tables and lines of code scroll in boxes of their own.

    Nothing is written beyond the edge of a picture, either.
    """
    pages = sorted(str(file.relative_to(html)) for file in html.rglob("*.html"))
    assert len(pages) > 40
    found = measure(html, pages, tmp_path)
    assert len(found) == len(pages) * len(WIDTHS)
    assert all(each["text"] for each in found.values())
    too_wide = {
        name: each
        for name, each in found.items()
        if each["width"] > int(name.split()[-1]) or each["wide"] or each["cut"]
    }
    assert too_wide == {}


def test_a_wide_page_is_found(tmp_path):
    """What is wider than the page, and not in a box that scrolls, or than its picture, is reported with its text."""
    page = (
        "<html><body style='margin:0'><article><div style='overflow-x:auto'><p style='width:3000px'>in a box</p></div>"
        "<p style='width:{}px'>wide</p><svg viewBox='0 0 300 20' style='width:300px'><text x='{}' y='9'>left</text></svg>"
        "</article></body></html>"
    )
    html = tmp_path / "html"
    html.mkdir()
    (html / "wide.html").write_text(page.format(500, -1))
    (html / "narrow.html").write_text(page.format(300, 1))
    found = measure(html, ["wide.html", "narrow.html"], tmp_path / "profile")
    assert found["wide.html at 390"]["width"] == 500
    assert found["wide.html at 390"]["wide"] == ['<p class="null"> wide']
    assert found["narrow.html at 390"]["width"] == 390
    assert found["narrow.html at 390"]["wide"] == []
    assert found["wide.html at 390"]["cut"] == ["left"]
    assert found["narrow.html at 390"]["cut"] == []
    assert found["wide.html at 1280"]["width"] == 1280
