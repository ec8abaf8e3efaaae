"""What headless Chromium makes of a page when there is no network."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
QUIET += "--disable-background-networking --disable-component-update --disable-sync "
QUIET += "--enable-logging=stderr"
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

# The page tells what no script of its own could: how wide it became, what it asked for.
PROBE = """<script>
const missed = [];
addEventListener("error", e => e.target.src && missed.push(e.target.src), true);
addEventListener("load", () => {
  const box = e => e.getBoundingClientRect();
  const out = (a, b) => a.left < b.left - 1 || a.right > b.right + 1;
  const cut = [...document.body.querySelectorAll("*")].filter(e => e.ownerSVGElement
    ? e.matches("text") && out(box(e), box(e.ownerSVGElement))
    : e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1);
  document.title = JSON.stringify({
    width: document.documentElement.scrollWidth,
    asked: performance.getEntriesByType("resource").map(e => e.name).concat(missed),
    cut: cut.map(e => e.tagName + " " + e.textContent.trim().slice(0, 40)),
    figures: [...document.querySelectorAll("svg, img")].filter(
      e => box(e).width > 0 && (e.naturalWidth ?? 1) > 0).length,
  })
})</script>"""


def chromium(file, profile, *options):
    """The finished process: the page as text on stdout, what it said in its console on stderr."""
    command = [CHROMIUM, *QUIET.split(), OFFLINE, f"--user-data-dir={profile}"]
    command += [*options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def opened(text, folder, *, width, height=900):
    """The page's facts at that width, `console` and `dom` among them."""
    file = folder / "page.html"
    file.write_text(text.replace("<head>", f"<head>{PROBE}", 1))
    done = chromium(file, folder / "profile", f"--window-size={width},{height}", "--dump-dom")
    told = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.S)[1]
    facts = json.loads(html.unescape(told))
    facts["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return facts | {"dom": done.stdout}
