"""report.html in a real browser: it fits, it fetches nothing, it complains of nothing, and its colours follow the page."""

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from loadtest import _report
from tests.e2e import browser
from tests.unit.run_folder import make, target, with_stages

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="needs Chromium: apt-get install --no-install-recommends chromium"
)
SHOTS = os.environ.get("ISOLATENCY_SHOTS")  # a folder for the screenshots; else they go with the test's own
SERVER = {
    "null": {"read": 20, "parse": 8, "serialise": 20}, "knn": {"read": 22, "parse": 12, "compute": 80, "serialise": 25},
    "dnn": {"read": 22, "parse": 12, "compute": 140, "serialise": 25},
}  # fmt: skip
RESIDUAL = {"process": 95, "docker": 99, "a-firecracker-of-a-long-name-31": 125, "uml": 260, "qemu": 2600}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full report: five targets, one of them emulated and one with the longest name, six starts, all sections."""
    run = tmp_path_factory.mktemp("run")
    chance = np.random.default_rng(1)
    targets = []
    for number, (name, us) in enumerate(RESIDUAL.items()):
        starts = [
            {"restart": n, "ready_s": us / 200 * chance.uniform(0.9, 1.1), "first_prediction_ms": 2.0} for n in range(6)
        ]
        kind = "firecracker" if "firecracker" in name else name
        accel = {"qemu": "tcg"}.get(name)
        targets.append(
            target(name, kind=kind, accel=accel, starts=starts, caveats=["a caveat of its own"] * (number == 3))
        )
    jobs = [
        (name, job, r, 0.5 * chance.uniform(0.95, 1.05), 0.5, 0.9)
        for job in ("knn", "dnn") for name in RESIDUAL for r in range(1 if name == "qemu" else 6)
    ]  # fmt: skip
    make(run, targets, models=tuple(SERVER), restarts=6, start_sd=0.01, rounds=4, per_block=700, jobs=jobs,
         caveats=["the load client shares the targets' cores"], partial=True, errors=["docker died once"])  # fmt: skip
    with_stages(run, SERVER, residual_us=RESIDUAL)
    (run / "peak.csv").write_text(
        "restart,target,model,bound,rate_rps,low_rps,high_rps,reason\n0,process,knn,p99<=5ms,3000,2950,3050,\n"
        "0,uml,knn,p99<=5ms,,,,it holds at no rate\n"
    )
    _report.write(run)
    return run / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.page(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_and_complains_of_nothing(
    page: browser.Page, report: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    page.open(report, width, dark=dark)
    page.screenshot((Path(SHOTS) if SHOTS else tmp_path) / f"report-{width}{'-dark' * dark}.png")
    assert page.complaints == []
    assert {url.split(":")[0] for url in page.fetched} <= {"file", "data"}
    assert page.value("document.documentElement.scrollWidth") <= width
    # Only what scrolls by itself may be wider than the page.
    wide = page.value(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"
    )
    assert wide == []


def test_pictures_are_drawn_inside_their_frames_and_their_text_can_be_read(page: browser.Page, report: Path) -> None:
    for width in (400, 1400):
        page.open(report, width)
        assert page.value("document.querySelectorAll('figure svg').length") >= 15
        outside = page.value(
            "[...document.querySelectorAll('figure svg')].flatMap(s => { const f = s.getBoundingClientRect(); return "
            "[...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect(); return r.left < f.left - 1 "
            "|| r.right > f.right + 1 || r.top < f.top - 1 || r.bottom > f.bottom + 1 }).map(t => s.ariaLabel + ': ' + "
            "t.textContent) })"
        )
        assert outside == []
        heights = page.value(
            "[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
        )
        assert min(heights) >= 9


def test_text_stands_out_in_light_and_in_dark(page: browser.Page, report: Path) -> None:
    """WCAG's contrast of 4.5 for words and labels, against what they stand on."""
    script = """(() => { const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const lum = c => { const [r, g, b] = rgb(c).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b };
      const under = e => { for (; e; e = e.parentElement) { const b = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$/.test(b)) return b } return 'rgb(255, 255, 255)' };
      return [...document.querySelectorAll('p, li, td, th, h2, h3, summary, .mark, svg text')].map(e => {
        const s = getComputedStyle(e), a = lum(e.closest('svg') ? s.fill : s.color), b = lum(under(e));
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName, e.textContent.slice(0, 30)] })
        .filter(x => x[0] < 4.5) })()"""
    for dark in (False, True):
        page.open(report, 1400, dark=dark)
        assert page.value(script) == []
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"


def test_printed_it_has_no_links_and_is_on_white(page: browser.Page, report: Path) -> None:
    page.open(report, 1000, dark=True, media="print")
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.value("document.documentElement.scrollWidth") <= 1000


def test_an_emulated_target_shares_no_picture_and_no_table(page: browser.Page, report: Path) -> None:
    page.open(report, 1400)
    shared = page.value(
        "[...document.querySelectorAll('section:not(.emulated)')].filter(s => s.querySelector('figure') && "
        "/qemu/.test(s.textContent)).map(s => s.querySelector('h2').textContent)"
    )
    assert shared == []
    assert "qemu" in page.value("document.querySelector('section.emulated h2').textContent")
    assert not re.search("docker|uml", page.value("document.querySelector('section.emulated').textContent"))


def test_every_picture_has_its_numbers_in_a_table_of_its_section(page: browser.Page, report: Path) -> None:
    page.open(report, 1400)
    bare = page.value(
        "[...document.querySelectorAll('section')].filter(s => s.querySelector('figure') && !s.querySelector('table'))"
        ".map(s => s.querySelector('h2').textContent)"
    )
    assert bare == []


class _Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]


def test_it_is_one_small_file_and_the_same_again(report: Path) -> None:
    first = report.read_bytes()
    assert len(first) <= 1_500_000
    assert not re.search(rb"(src|href)=\"(?!#|data:)[^\"]*\"|@import|url\((?!#)", first)
    parser = _Ids()
    parser.feed(first.decode())
    assert len(parser.ids) == len(set(parser.ids))
    _report.write(report.parent)
    assert report.read_bytes() == first
