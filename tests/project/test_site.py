"""The documentation as a site: every page is there, and nothing is fetched from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
from project.pages import DOCS, ROOT, blocks, text_of


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; whatever reaches for the network finds a closed door."""
    folder = tmp_path_factory.mktemp("site") / "a site"
    closed = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **closed, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    """What a page makes the browser fetch; where it only links to is left out."""

    ATTRIBUTES: ClassVar = {
        "script": "src",
        "img": "src",
        "iframe": "src",
        "source": "src",
        "link": "href",
    }

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        name = self.ATTRIBUTES.get(tag)
        if name and values.get(name) and values.get("rel") not in ("next", "prev", "canonical"):
            self.addresses.append(str(values[name]))


def is_outside(address: str) -> bool:
    return address.startswith(("http:", "https:", "//"))


@pytest.mark.slow
def test_site_has_every_page(site: Path) -> None:
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    expected = {
        page.removeprefix("docs/").removesuffix(".md") + ".html"
        for page in DOCS
        if not page.endswith("-notes.md")
    }
    assert pages == {*expected, "404.html"}
    assert not [*site.rglob("*.py"), *site.rglob("*-notes*")]


@pytest.mark.slow
def test_site_fetches_nothing_from_outside(site: Path) -> None:
    fetched = {str(page): Fetched(page).addresses for page in site.rglob("*.html")}
    assert all(any(".css" in address for address in page) for page in fetched.values())
    assert all(any(".js" in address for address in page) for page in fetched.values())
    assert [a for page in fetched.values() for a in page if is_outside(a)] == []
    styles = [path.read_text() for path in [*site.rglob("*.css"), *site.rglob("*.html")]]
    urls = [u for style in styles for u in re.findall(r"url\(\s*['\"]?([^)'\"]+)", style)]
    imports = [u for style in styles for u in re.findall(r"@import\s+['\"]([^'\"]+)", style)]
    assert urls
    assert [u for u in (*urls, *imports) if is_outside(u)] == []


@pytest.mark.slow
def test_search_works_from_a_folder(site: Path, browser: Any) -> None:
    page = browser.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto((site / "index.html").as_uri())
    page.fill("input.md-search__input", "Lagrange")
    page.locator(".md-search-result__item").first.wait_for(timeout=30_000)
    results = page.inner_text(".md-search-result__list")
    assert "Lagrange" in results
    assert failures == []


def test_fetched_addresses_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<link rel="stylesheet" href="https://a/a.css"><link rel="next" href="https://b">'
        '<script src="//c/c.js"></script><a href="https://d">d</a><img src="e.png">'
    )
    assert Fetched(page).addresses == ["https://a/a.css", "//c/c.js", "e.png"]
    assert [is_outside(address) for address in Fetched(page).addresses] == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["concepts", "method"])
def test_formulas_are_drawn(page: str, site: Path) -> None:
    html = (site / f"{page}.html").read_text()
    formulas = re.findall(r"<math.*?</math>", html, re.DOTALL)
    assert len(formulas) == len(blocks(text_of(f"docs/{page}.md"), "math")) > 0
    # A command that the library does not know stays as it is, backslash and all.
    assert [formula for formula in formulas if "\\" in formula or "&#x0005C;" in formula] == []


@pytest.mark.slow
@pytest.mark.parametrize("package", ["graph_passes", "export"])
def test_reference_has_every_public_name(package: str, site: Path) -> None:
    html = (site / "reference" / f"{package}.html").read_text()
    anchors = set(re.findall(rf'id="calicache\.{package}\.([\w.]+)"', html))
    names = importlib.import_module(f"calicache.{package}").__all__
    # A function that has the name of a module is documented in the module that it is from.
    documented = {anchor.rpartition(".")[2] for anchor in anchors}
    assert [name for name in names if name not in documented] == []
