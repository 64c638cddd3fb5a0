"""README and docs: every block of code runs, every link leads somewhere, the pages build."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from markdown.extensions.toc import slugify
from typer.main import get_command

from calicache.export import Session
from calicache.tools.cli import app

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = (*TOP, *DOCS)
# Blocks that cannot run here, by page; the comment in front of each says why.
NOT_RUN = {"docs/index.md": 1}
ORT_NODE = "onnxruntime-node@1.30.0"


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, code and first line, and why it is not run."""

    language: str
    code: str
    line: int
    not_run: str | None


FENCED = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str, language: str) -> list[Block]:
    found = []
    for match in FENCED.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(match["language"], match["code"], line, match["reason"]))
    return [block for block in found if block.language == language]


WITH_CODE = [
    page
    for page in PAGES
    if any(block.not_run is None for block in blocks(text_of(page), "python"))
]


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run a page's blocks in order, in one namespace, in a folder of their own; each page once."""
    folders: dict[str, Path] = {}

    def run(page: str) -> Path:
        if page not in folders:
            folder = tmp_path_factory.mktemp("page")
            torch.manual_seed(0)
            namespace: dict[str, object] = {}
            with contextlib.chdir(folder):
                for block in blocks(text_of(page), "python"):
                    if block.not_run is None:
                        # Empty lines in front: a traceback then shows the page's own lines.
                        code = "\n" * block.line + block.code
                        exec(compile(code, str(ROOT / page), "exec"), namespace)
            folders[page] = folder
        return folders[page]

    return run


# Code.


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks_run(page: str, run_page: Callable[[str], Path]) -> None:
    assert any(run_page(page).iterdir())  # each of them makes an artifact at the least


def test_pages_with_code_are_the_known_ones() -> None:
    assert WITH_CODE == ["README.md", "docs/deploy.md", "docs/tour.md", "docs/tutorial.md"]


def test_blocks_that_do_not_run_are_counted() -> None:
    marked = {page: [b for b in blocks(text_of(page), "python") if b.not_run] for page in PAGES}
    assert {page: len(there) for page, there in marked.items() if there} == NOT_RUN
    for page in PAGES:  # a comment that is not right above a block of Python would mark nothing
        assert text_of(page).count("<!-- not run: ") == len(marked[page]) + (
            page == "CONTRIBUTING.md"  # which explains the comment
        )


@pytest.mark.parametrize("page", PAGES)
def test_fences_are_closed_and_have_a_language(page: str) -> None:
    text = text_of(page)
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(FENCED.findall(text))
    assert all(language for _, language, _ in FENCED.findall(text))


@pytest.mark.slow
def test_readme_exports_a_whole_run(run_page: Callable[[str], Path]) -> None:
    assert (run_page("README.md") / "dit.onnx.d" / "model.onnx").is_file()


def test_commands_in_console_blocks_exist() -> None:
    names = set(get_command(app).commands)  # type: ignore[attr-defined]
    consoles = [block.code for page in PAGES for block in blocks(text_of(page), "console")]
    used = {name for code in consoles for name in re.findall(r"^calicache (\w+)", code, re.M)}
    assert "inspect" in used
    assert used - names == set()


def test_reference_lists_every_command() -> None:
    names = set(get_command(app).commands)  # type: ignore[attr-defined]
    listed = set(re.findall(r"^\| `calicache (\w+)", text_of("docs/reference/tools.md"), re.M))
    assert listed == names


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    consoles = [block.code for page in PAGES for block in blocks(text_of(page), "console")]
    used = {name for code in consoles for name in re.findall(r"^make (\w+)", code, re.M)}
    assert {"demo", "test", "docs"} <= used <= targets


# JavaScript.


def node_block() -> str:
    return blocks(text_of("docs/deploy.md"), "javascript")[0].code


def browser_block() -> str:
    return blocks(text_of("docs/deploy.md"), "javascript")[1].code


ELEMENTS = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}


@pytest.mark.slow
def test_javascript_names_what_the_model_takes(run_page: Callable[[str], Path]) -> None:
    folder = run_page("docs/deploy.md") / "dit.onnx.d"
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    fed = re.findall(r'^  (\w+): new ort\.Tensor\("(\w+)"', node_block(), re.MULTILINE)
    assert {name: ELEMENTS[kind] for name, kind in fed} == {
        value.name: value.type.tensor_type.elem_type for value in graph.input
    }
    (taken,) = re.findall(r"const \{ (\w+) \} = await session\.run", node_block())
    assert [taken] == [value.name for value in graph.output]
    sampler = json.loads((folder / "manifest.json").read_text())["sampler"]
    (read,) = re.findall(r"const \{ ([\w, ]+) \} = JSON\.parse", node_block())
    assert set(read.split(", ")) <= set(sampler)


@pytest.mark.slow
def test_browser_snippet_names_the_files(run_page: Callable[[str], Path]) -> None:
    folder = run_page("docs/deploy.md") / "dit.onnx.d"
    fetched = re.findall(r'"([\w.]+\.(?:onnx|bin))"', browser_block())
    assert set(fetched) == {path.name for path in folder.iterdir() if path.suffix != ".json"}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    outside = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert re.findall(r'path: "([\w.]+)"', browser_block()) == [*outside]


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """onnxruntime-node, installed once into `out/node`."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    home = ROOT / "out" / "node"
    if not (home / "node_modules" / "onnxruntime-node" / "package.json").is_file():
        home.mkdir(parents=True, exist_ok=True)
        # Its install script fetches CUDA libraries, which nothing here needs.
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", ORT_NODE]
        done = subprocess.run(
            [*command, "--prefix", str(home)], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            pytest.skip(f"npm cannot install {ORT_NODE}: {' '.join(reason)}")
    return home / "node_modules"


@pytest.mark.slow
def test_javascript_runs_and_agrees(run_page: Callable[[str], Path], node_modules: Path) -> None:
    folder = run_page("docs/deploy.md")
    (folder / "sample.mjs").write_text(node_block())
    (folder / "node_modules").symlink_to(node_modules)
    done = subprocess.run(
        ["node", "sample.mjs"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    session = Session(folder / "dit.onnx.d")
    noise = np.fromfile(folder / "noise.f32", "<f4").reshape(4, 1, 28, 28)
    assert abs(noise.mean()) < 0.1  # of 3,136 standard normal numbers: 0.018 is usual
    assert abs(noise.std() - 1) < 0.1
    expected = session.sample(noise, class_labels=np.array([0, 1, 7, 8, 10, 10, 10, 10]))
    made = np.fromfile(folder / "latents.f32", "<f4").reshape(expected.shape)
    # The same graph in two builds of ONNX Runtime, in float32.
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4)


# Links.

CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slugify(heading.replace("`", ""), "-") for heading in HEADING.findall(text)}


def links(path: Path) -> Iterator[tuple[str, str]]:
    """Relative links as file and anchor, those in code left out."""
    for link in LINK.findall(CODE.sub("", path.read_text())):
        if not re.match(r"[a-z]+:", link):
            file, _, anchor = link.partition("#")
            yield file, anchor


def broken_links(path: Path) -> list[str]:
    broken = []
    for file, anchor in links(path):
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{file}#{anchor}" if anchor else file)
    return broken


def test_links_lead_somewhere() -> None:
    assert {page: broken for page in PAGES if (broken := broken_links(ROOT / page))} == {}
    assert sum(1 for page in PAGES for _ in links(ROOT / page)) > 50


def test_broken_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `b`, c\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[1](other.md#a-b-c) [2](other.md#no) [3](no.md) [4](#here) [5](#no)\n"
        "[6](https://example.org/no) `[7](no.md)`\n```text\n[8](no.md)\n```\n"
    )
    assert broken_links(page) == ["other.md#no", "no.md", "#no"]


def test_source_files_that_the_pages_name_exist() -> None:
    named = {
        (page, path)
        for page in PAGES
        for path in re.findall(
            r"`((?:graph_passes|export|tools|tests|docs)/[\w./-]+)`", text_of(page)
        )
    }
    assert len(named) > 20
    assert {(page, path) for page, path in named if not (ROOT / path).exists()} == set()


def test_every_formula_names_its_file() -> None:
    sections = re.split(r"^#{2,3} ", text_of("docs/method.md"), flags=re.MULTILINE)
    with_formula = [section for section in sections if "```math" in section]
    assert len(with_formula) >= 10
    for section in with_formula:
        after = section[section.rindex("```math") :]
        assert re.search(r"`graph_passes/\w+\.py`", after), section.splitlines()[0]


# What the pages say.


def test_readme_starts_with_the_two_commands() -> None:
    text = text_of("README.md")
    assert text.index("make demo") < text.index("make test") < 2000


def test_readme_compares_with_every_alternative() -> None:
    _, table, _ = re.split(r"<!-- --8<-- \[\w+:alternatives\] -->", text_of("README.md"))
    names = [re.sub(r"[*[\]]", "", row.split("|")[1]).strip() for row in table.split("\n")[3:-1]]
    wanted = ("calicache", "cache-dit", "diffusers", "TeaCache", "TaylorSeer", "FORA", "NVIDIA")
    assert len(names) == len(wanted)
    assert [n for n, start in zip(names, wanted, strict=True) if not n.startswith(start)] == []


def test_changelog_has_the_version() -> None:
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert version in text_of("CHANGELOG.md")


def test_index_of_decisions_is_complete() -> None:
    files = sorted(path.name for path in (ROOT / "docs/decisions").glob("0*.md"))
    rows = re.findall(
        r"^\| (\d+) \| \[[^\]]+\]\(([^)]+)\)", text_of("docs/decisions/index.md"), re.M
    )
    assert [file for _, file in rows] == files
    assert [int(number) for number, _ in rows] == [int(file[:4]) for file in files]
    for number, file in rows:
        assert text_of(f"docs/decisions/{file}").startswith(f"# {number}. ")


# The site.


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

    TAKEN_BY: ClassVar = {
        "script": "src",
        "img": "src",
        "iframe": "src",
        "source": "src",
        "link": "href",
    }

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        name = self.TAKEN_BY.get(tag)
        if name and values.get(name) and values.get("rel") not in ("next", "prev", "canonical"):
            self.found.append(str(values[name]))


def is_outside(address: str) -> bool:
    return address.startswith(("http:", "https:", "//"))


@pytest.mark.slow
def test_site_has_every_page(site: Path) -> None:
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    wanted = {
        page.removeprefix("docs/").removesuffix(".md") + ".html"
        for page in DOCS
        if not page.endswith("-notes.md")
    }
    assert pages == {*wanted, "404.html"}
    assert not [*site.rglob("*.py"), *site.rglob("*-notes*")]


@pytest.mark.slow
def test_site_fetches_nothing_from_outside(site: Path) -> None:
    fetched = {str(page): Fetched(page).found for page in site.rglob("*.html")}
    assert all(any(".css" in found for found in there) for there in fetched.values())
    assert all(any(".js" in found for found in there) for there in fetched.values())
    assert [a for there in fetched.values() for a in there if is_outside(a)] == []
    styles = [path.read_text() for path in [*site.rglob("*.css"), *site.rglob("*.html")]]
    urls = [u for style in styles for u in re.findall(r"url\(\s*['\"]?([^)'\"]+)", style)]
    imports = [u for style in styles for u in re.findall(r"@import\s+['\"]([^'\"]+)", style)]
    assert urls
    assert [u for u in (*urls, *imports) if is_outside(u)] == []


def test_fetched_addresses_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<link rel="stylesheet" href="https://a/a.css"><link rel="next" href="https://b">'
        '<script src="//c/c.js"></script><a href="https://d">d</a><img src="e.png">'
    )
    assert Fetched(page).found == ["https://a/a.css", "//c/c.js", "e.png"]
    assert [is_outside(address) for address in Fetched(page).found] == [True, True, False]


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
    there = set(re.findall(rf'id="calicache\.{package}\.([\w.]+)"', html))
    names = importlib.import_module(f"calicache.{package}").__all__
    # A function that has the name of its module is found in that module.
    assert [name for name in names if not {name, f"{name}.{name}"} & there] == []
