"""README and docs: every block of code runs, every link leads somewhere, the pages build."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from markdown.extensions.toc import slugify
from project.pages import FENCED, PAGES, ROOT, blocks, text_of
from typer.main import get_command

from calicache import speed_up
from calicache.tools.cli import app

# Blocks that cannot run here, by page; the comment in front of each says why.
NOT_RUN = {
    "docs/distributed.md": 1,
    "docs/from-hooks.md": 1,
    "docs/index.md": 1,
    "docs/serving.md": 2,
    "docs/will-it-help.md": 1,
}

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
            with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
                patch.setitem(speed_up.__kwdefaults__ or {}, "cache", folder / "cache")
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
    assert WITH_CODE == [
        "README.md",
        "docs/deploy.md",
        "docs/serving.md",
        "docs/speed-up.md",
        "docs/tour.md",
        "docs/tutorial.md",
    ]


def test_blocks_that_do_not_run_are_counted() -> None:
    marked = {page: [b for b in blocks(text_of(page), "python") if b.not_run] for page in PAGES}
    assert {page: len(unrun) for page, unrun in marked.items() if unrun} == NOT_RUN
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
    used = {name for code in consoles for name in re.findall(r"^calicache ([\w-]+)", code, re.M)}
    assert "inspect" in used
    assert used - names == set()


def test_reference_lists_every_command() -> None:
    names = set(get_command(app).commands)  # type: ignore[attr-defined]
    listed = set(re.findall(r"^\| `calicache ([\w-]+)", text_of("docs/reference/tools.md"), re.M))
    assert listed == names


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    consoles = [block.code for page in PAGES for block in blocks(text_of(page), "console")]
    used = {name for code in consoles for name in re.findall(r"^make ([\w-]+)", code, re.M)}
    assert {"demo", "test", "docs"} <= used <= targets


# JavaScript.


def browser_block() -> str:
    return blocks(text_of("docs/deploy.md"), "javascript")[0].code


@pytest.mark.slow
def test_browser_snippet_names_the_files(run_page: Callable[[str], Path]) -> None:
    folder = run_page("docs/deploy.md") / "dit.onnx.d"
    fetched = re.findall(r'"([\w.]+\.(?:onnx|bin))"', browser_block())
    assert set(fetched) == {path.name for path in folder.iterdir() if ".json" not in path.suffixes}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    outside = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert re.findall(r'path: "([\w.]+)"', browser_block()) == [*outside]


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
        assert re.search(r"`graph_passes/\w+/\w+\.py`", after), section.splitlines()[0]


# What the pages say.


def test_readme_starts_with_the_two_commands() -> None:
    text = text_of("README.md")
    assert text.index("make demo") < text.index("make test") < 2000


def test_readme_compares_with_every_alternative() -> None:
    _, table, _ = re.split(r"<!-- --8<-- \[\w+:alternatives\] -->", text_of("README.md"))
    names = [re.sub(r"[*[\]]", "", row.split("|")[1]).strip() for row in table.split("\n")[3:-1]]
    peers = ("cache-dit", "diffusers", "TeaCache", "TaylorSeer", "OpenVINO", "Spectrum", "FORA")
    expected = ("calicache", *peers, "NVIDIA")
    assert len(names) == len(expected)
    assert [n for n, start in zip(names, expected, strict=True) if not n.startswith(start)] == []


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
