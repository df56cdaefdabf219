# SPDX-License-Identifier: Apache-2.0
"""What the README and the docs show is run: every block of Python, page by page, and the diffs are applied.

The blocks of one page share their names, as a reader who types along would have it. A block under the comment
`<!-- not run -->` is left out; one that needs torch is too, where there is none.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

import damo_embedding as de

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HAS_TORCH = importlib.util.find_spec("torch") is not None
BLOCK = re.compile(
    r"^(?P<skip><!-- not run -->\n\s*)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path, language: str, *, not_run_too: bool = False) -> list[tuple[int, str]]:
    """(line, code) of the page's blocks that are to be run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in BLOCK.finditer(text)
        if match["language"] == language and (not_run_too or match["skip"] is None)
    ]


def needs_torch(code: str) -> bool:
    return re.search(r"\btorch\b", code) is not None


def run(code: str, page: Path, line: int, names: dict[str, object]) -> None:
    # As many empty lines before it as the page has, so that a traceback shows the page's own line.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def close_storages(names: dict[str, object]) -> None:
    for value in names.values():
        if isinstance(value, de.Storage):
            value.close()


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_the_examples_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")  # a real one: dataclasses look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    names: dict[str, object] = module.__dict__
    if HAS_TORCH:
        import torch

        torch.manual_seed(0)
    try:
        for line, code in blocks(page, "python"):
            if HAS_TORCH or not needs_torch(code):
                run(code, page, line, names)
    finally:
        close_storages(names)


@pytest.mark.skipif(not HAS_TORCH, reason="the diffs are of torch scripts")
@pytest.mark.parametrize("page", pages_with("diff"), ids=lambda page: page.name)
def test_a_diff_turns_one_script_that_runs_into_another(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for number, (line, diff) in enumerate(blocks(page, "diff")):
        lines = diff.splitlines()
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        torch.manual_seed(0)
        for removed in ("+", "-"):  # the script before, then the script after
            script = "\n".join("" if text.startswith(removed) else text[1:] for text in lines)
            names: dict[str, object] = {"__name__": "script"}
            run(script, page, line, names)
            close_storages(names)
        assert any(Path(".").glob("*.damo"))


@pytest.mark.parametrize("name", ["README.md", "docs/torch.md"])
def test_a_diff_from_nn_embedding_changes_six_lines_at_most(name: str) -> None:
    diffs = blocks(ROOT / name, "diff", not_run_too=True)
    assert diffs
    for _, diff in diffs:
        assert sum(text.startswith("+") for text in diff.splitlines()) <= 6


def outline(page: Path) -> dict[str, object]:
    """What a translation has to have as well: everything but the prose."""
    text = page.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", prose)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    return {
        "code blocks": re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL),
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "cells of each row": [line.count("|") for line in rows],
        "code in each row": [sorted(re.findall(r"`[^`]+`", line)) for line in rows],
        "code": sorted(set(re.findall(r"`[^`]+`", prose))),
        "items": len(re.findall(r"^- ", prose, re.MULTILINE)),
        "links": ["README.md or README_CN.md" if link.startswith("README") else link for link in links],
    }


def test_the_chinese_readme_says_the_same() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README_CN.md"
    assert outline(english) == outline(chinese)
    assert "(README_CN.md)" in english.read_text()
    assert "(README.md)" in chinese.read_text()


def slug(heading: str) -> str:
    """The anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README_CN.md"], ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), link
        if anchor:
            text = re.sub(r"^```.*?^```$", "", target.read_text(), flags=re.MULTILINE | re.DOTALL)
            assert anchor in [slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)], link


def test_a_block_is_left_out_only_when_the_page_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n```python\n1\n```\n<!-- not run -->\n```python\n2\n```\n\n```sh\n3\n```\n```python\n4\n```\n")
    assert blocks(page, "python") == [(3, "1\n"), (14, "4\n")]
