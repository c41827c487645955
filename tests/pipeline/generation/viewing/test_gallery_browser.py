"""The gallery in Chromium, from disk and from a plain web server: what is seen, what is asked for, how fast it is."""

import contextlib
import dataclasses
import functools
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.shards import encode_png
from pipeline.generation.viewing.gallery import PAGE_KEY
from tests.pipeline.generation.viewing.browser import LOADED, PROGRAM, Browser
from tests.pipeline.generation.viewing.synthetic_runs import LINEAGE, SHAPES, SPEC, SyntheticRun, make_run, shapes
from tests.pipeline.generation.viewing.test_gallery import HOSTILE

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install -y chromium"),
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844, "phone": True}
COLOUR = dataclasses.replace(SPEC, image_size=(32, 32), channels=3)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as one:
        yield one


@contextlib.contextmanager
def served(folder: Path, handler: type[http.server.SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Whole(http.server.SimpleHTTPRequestHandler):
    """Files as they are, like Python's own server."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Ranged(Whole):
    """Also parts of files, like S3."""

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            return super().do_GET()
        first, last = int(found[1]), int(found[2])
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


def address(run: SyntheticRun, choice: str = "") -> str:
    return f"{(run.folder / PAGE_KEY).as_uri()}{choice}"


def ids_shown(browser: Browser) -> list[int]:
    return [int(i) for i in browser.evaluate("[...document.querySelectorAll('.tile')].map((t) => t.dataset.id)")]


def wait_for_ids(browser: Browser, expected: list[int]) -> None:
    """The address changes before the page does: the tiles are waited for."""
    ends_s = time.monotonic() + 30
    while (shown := ids_shown(browser)) != expected:
        assert time.monotonic() < ends_s, shown
        time.sleep(0.05)


def choose(browser: Browser, field: str, value: str) -> None:
    """As a hand does: the field's value, and the event that follows."""
    browser.evaluate(
        f"document.getElementById({json.dumps(field)}).value = {json.dumps(value)};"
        f"document.getElementById({json.dumps(field)}).dispatchEvent(new Event('change'))"
    )


def settled(browser: Browser, choice: str) -> None:
    browser.wait_for(f"location.hash === {json.dumps(choice)}")
    browser.wait_for(LOADED)


def check_quiet(browser: Browser, root: str) -> None:
    """Nothing was complained of, and no request left the folder."""
    assert browser.complaints == []
    assert browser.requests and [url for url in browser.requests if not url.startswith(root)] == []


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_from_disk(tmp_path: Path, browser: Browser, screen: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", 1000, spec=COLOUR, class_names=SHAPES, draw=shapes(COLOUR))
    run.write()
    browser.open(address(run), **screen)
    browser.wait_for(LOADED)
    wait_for_ids(browser, [label + 10 * k for label in range(10) for k in range(12)])  # by class
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
    small = (
        "[...document.querySelectorAll('button, select, input, .tile, .button')].filter((e) => e.offsetParent)"
        ".filter((e) => e.getBoundingClientRect().height < 44).map((e) => e.outerHTML)"
    )
    assert browser.evaluate(small) == [], "large enough for a thumb"
    unnamed = (
        "[...document.querySelectorAll('a, button, input, select')].filter((e) => e.offsetParent)"
        ".filter((e) => !(e.ariaLabel || e.innerText || e.labels?.[0]?.innerText)).map((e) => e.outerHTML)"
    )
    assert browser.evaluate(unnamed) == []

    choose(browser, "class", "3")
    settled(browser, "#class=3")
    wait_for_ids(browser, list(range(3, 1000, 10)))
    choose(browser, "ids", "400-499")
    settled(browser, "#class=3&ids=400-499")
    wait_for_ids(browser, list(range(403, 500, 10)))
    choose(browser, "class", "all")
    settled(browser, "#class=all&ids=400-499")
    wait_for_ids(browser, list(range(400, 500)))

    browser.evaluate("document.querySelector('.tile[data-id=\"471\"]').click()")
    browser.wait_for("document.querySelector('dialog[open]')")
    said = browser.evaluate("document.querySelector('dialog').innerText")
    for words in (
        *("Image 471", "square", "models:/shapes/3", "ddim, 50 steps", "1.5", run.shards[4].key),
        *(run.spec.model_digest, LINEAGE.dataset_digest, run.spec.digest),
        f"python jobs/output.py remake {run.folder} --ids 471",
    ):
        assert words in said, words
    browser.press("ArrowRight")
    browser.wait_for("document.getElementById('detail-title').innerText === 'Image 472'")
    browser.press("Escape")
    browser.wait_for("!document.querySelector('dialog[open]')")
    assert browser.evaluate("document.activeElement.dataset.id") == "472", "the focus is where the reader was"
    check_quiet(browser, run.folder.as_uri())


def test_a_thumbnail_is_the_image_that_it_says(tmp_path: Path, browser: Browser) -> None:
    """Every image is of one grey, its id: the place on the sheet is computed twice, here and in the page."""
    grey = [encode_png(np.full((8, 8, 1), k, dtype=np.uint8)) for k in range(250)]
    run = make_run(tmp_path / "run", 250, draw=lambda sample_id, _: grey[sample_id], without=frozenset({17, 100, 101}))
    run.write()
    for choice in ("", "#class=all", "#class=all&page=3", "#class=2"):
        with served(run.folder, Whole) as root:  # from disk no script may look at the pixels
            browser.open(f"{root}/{PAGE_KEY}{choice}", **DESKTOP)
            browser.wait_for(LOADED)
            shown = browser.evaluate(
                "[...document.querySelectorAll('.tile')].map((t) => [Number(t.dataset.id),"
                "t.querySelector('canvas').getContext('2d').getImageData(4, 4, 1, 1).data[0]])"
            )
        assert shown and all(sample_id == pixel for sample_id, pixel in shown), choice
        assert not {17, 100, 101} & {sample_id for sample_id, _ in shown}


def test_keys_alone_are_enough(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", 500)
    run.write()
    browser.open(address(run, "#class=all"), **DESKTOP)
    browser.wait_for(LOADED)
    for _ in range(40):
        browser.press("Tab")
        if browser.evaluate("document.activeElement.getAttribute('aria-label')") == "Next page":
            break
    browser.press("Enter")
    settled(browser, "#class=all&page=2")
    wait_for_ids(browser, list(range(120, 240)))
    browser.evaluate("document.querySelector('.tile').focus()")
    browser.press("Enter")
    browser.wait_for("document.querySelector('dialog[open]')")
    browser.press("ArrowLeft")
    browser.wait_for("document.getElementById('detail-title').innerText === 'Image 119'")
    settled(browser, "#class=all&image=119")
    wait_for_ids(browser, list(range(120)))  # the page goes along


def test_a_hostile_name_is_text(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", 30, class_names=(HOSTILE, "dog", "bird"))
    run.write()
    browser.open(address(run, "#image=3&ids=%3Cimg%20src%3Dx%3E"), **DESKTOP)
    browser.wait_for("document.querySelector('dialog[open]')")
    said = browser.evaluate(
        "[document.querySelector('#facts').innerText, document.querySelector('#message').innerText]"
    )
    assert HOSTILE.replace("\u2028", "") in said[0].replace("\u2028", "").replace("\n", "") and "<img src=x>" in said[1]
    browser.open(address(run), **DESKTOP)
    browser.wait_for(LOADED)
    assert browser.evaluate("document.querySelectorAll('img, script:not([src])').length") == 0
    check_quiet(browser, run.folder.as_uri())


@pytest.mark.parametrize("handler", [Ranged, Whole])
def test_a_larger_image_comes_out_of_its_shard(tmp_path: Path, browser: Browser, handler: Any) -> None:
    spec = dataclasses.replace(SPEC, image_size=(96, 128), channels=3, shard_size=20)
    run = make_run(tmp_path / "run", 50, spec=spec, draw=shapes(spec))
    run.write()
    picture = "document.getElementById('picture').width"
    with served(run.folder, handler) as root:
        browser.open(f"{root}/{PAGE_KEY}#image=33", **DESKTOP)
        browser.wait_for("document.querySelector('dialog[open]')")
        browser.wait_for("document.getElementById('caption').innerText.includes('shard')")
        assert browser.evaluate(picture) == (128 if handler is Ranged else 64)
        check_quiet(browser, root)
    browser.requests.clear()
    browser.open(address(run, "#image=33"), **DESKTOP)
    browser.wait_for("document.querySelector('dialog[open]')")
    assert browser.evaluate(picture) == 64 and "Thumbnail of 64 x 48" in browser.evaluate(
        "document.getElementById('caption').innerText"
    )
    check_quiet(browser, run.folder.as_uri())


def test_a_folder_that_is_not_there_is_said(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", 30)
    run.write()
    (run.folder / "gallery/contents.js").unlink()
    browser.open(address(run), **DESKTOP)
    browser.wait_for("document.getElementById('message').innerText.includes('copy the whole folder')")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_images(tmp_path: Path, browser: Browser, capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand classes, 32x32 in colour: the first picture, the last page and a class do not wait for the others."""
    pool = [shapes(COLOUR)(k, k) for k in range(1000)]
    spec = dataclasses.replace(COLOUR, shard_size=1000)
    names = tuple(f"class {k:03d}" for k in range(1000))
    run = make_run(
        tmp_path / "run", 1_000_100, spec=spec, class_names=names, draw=lambda sample_id, _: pool[sample_id % 1000]
    )
    started_s = time.monotonic()
    assert run.write() == 125
    made_s = time.monotonic() - started_s
    started_s = time.monotonic()
    assert run.write() == 0
    again_s = time.monotonic() - started_s
    files = [path for path in (run.folder / "gallery").rglob("*") if path.is_file()]
    figures = [
        f"made in {made_s:.0f} s, again {again_s:.1f} s; {len(files):,} files, "
        f"{sum(path.stat().st_size for path in files) / 2**20:.0f} MiB, contents.js "
        f"{(run.folder / 'gallery/contents.js').stat().st_size / 2**10:.0f} KiB"
    ]
    for name, choice, expected in [
        ("overview", "", 240),
        ("all", "#class=all", 120),
        ("last page", "#class=all&page=8334", 40),
        ("class 500, page 8", "#class=500&page=8", 120),
        ("ids", "#ids=654321-654400", 80),
    ]:
        browser.open("about:blank", **DESKTOP)
        browser.requests.clear()
        started_s = time.monotonic()
        browser.open(address(run, choice), **DESKTOP)
        browser.wait_for("document.querySelector('.tile.loaded')")
        first_s = time.monotonic() - started_s
        browser.wait_for(LOADED)
        all_s = time.monotonic() - started_s
        assert len(ids_shown(browser)) == expected, name
        loaded = [
            run.folder / url.removeprefix(run.folder.as_uri() + "/").partition("#")[0] for url in browser.requests
        ]
        figures.append(
            f"{name}: first picture {first_s:.2f} s, all {expected} {all_s:.2f} s, {len(loaded)} requests, "
            f"{sum(path.stat().st_size for path in loaded) / 2**20:.1f} MiB"
        )
        assert len(loaded) < 60, "a page does not load the gallery"
    assert "1,000,000 images of 1,000 classes, the first of 1,000,100" in browser.evaluate("document.body.innerText")
    with capsys.disabled():
        print("", *figures, sep="\n")
