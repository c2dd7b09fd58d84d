# SPDX-License-Identifier: Apache-2.0
"""What the documentation says is so: its code runs, its quotes are in the sources, its links and names exist.

A ``python`` block is executed, blocks of one page one after the other in one namespace; a ``python cuda`` block on a
GPU only, one with the name of a module (``python transformers``) where that is installed. A ``cpp`` block is compiled
against the public headers. A block after ``<!-- quote: PATH -->`` is neither: it must stand in that file, but for white
space, where lines of ``...`` skip some of it. Tables between
``<!-- plan: OP -->`` and ``<!-- /plan -->`` are written by ``python tests/test_docs.py``.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import fastkern
import pytest
import torch
from fastkern import _core
from fastkern.specs import SPECS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
WRITTEN_BY_THE_BENCHMARK = ROOT / "docs" / "benchmarks.md"
ROOMS = ("cmake", "cpp", "cuda", "docs", "examples", "python", "tests", "tools", ".ci", ".github")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


@dataclass
class Block:
    """A fenced block: its info string, the line of its first line, its text, the file it quotes."""

    info: str
    line: int
    text: str
    quotes: str | None

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start, info, quotes = 0, None, None
    for number, line in enumerate(lines, 1):
        if info is None:
            if line.startswith("```"):
                before = re.fullmatch(r"<!-- quote: (\S+) -->", lines[number - 2]) if number > 1 else None
                start, info, quotes = number, line[3:].strip(), before and before[1]
        elif line == "```":
            yield Block(info, start + 1, "\n".join(lines[start : number - 1]), quotes)
            info = None
    assert info is None, f"{page.name}: the block that starts in line {start} has no end"


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> str:
    """Everything set as code: fenced blocks (that are no quotes) and words between backticks."""
    fenced = [block.text for block in blocks(page) if not block.quotes]
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", prose(page))])


# ---- code ------------------------------------------------------------------------------------------------------------


@pages
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    gpu = torch.cuda.is_available() and _core.build_info()["cuda"]
    for block in blocks(page):
        if block.language == "python" and not block.quotes:
            compiled = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            needs = block.info.split()[1:]
            if all(gpu if word == "cuda" else importlib.util.find_spec(word) for word in needs):
                exec(compiled, namespace)


@pages
def test_cpp_blocks_compile(page: Path) -> None:
    sources = [b for b in blocks(page) if b.language == "cpp" and not b.quotes]
    if sources and shutil.which("g++") is None:
        pytest.skip("no g++")
    for block in sources:
        command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/cpp/include"]
        source = f'#line {block.line} "{page.name}"\n{block.text}\n'
        done = subprocess.run([*command, "-x", "c++", "-"], input=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pages
def test_shell_blocks_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{page.name}, line {block.line}: {done.stderr}"


@pages
def test_quotes_are_in_the_sources(page: Path) -> None:
    def squeezed(text: str) -> str:
        return " ".join(text.split())

    for block in blocks(page):
        if not block.quotes:
            continue
        source, position = squeezed((ROOT / block.quotes).read_text(encoding="utf-8")), 0
        for part in re.split(r"^\s*\.\.\.$", block.text, flags=re.MULTILINE):
            found = source.find(squeezed(part), position)
            where = f"{page.name}, line {block.line}: not in {block.quotes} (or not in this order)"
            assert found >= 0, f"{where}:\n{part.strip()}"
            position = found + len(squeezed(part))


# ---- links and names -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    words = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", word).strip().replace(" ", "-") for word in words}


@pages
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if file == WRITTEN_BY_THE_BENCHMARK and not file.exists():
            continue
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: no such heading"


@pages
def test_paths_exist(page: Path) -> None:
    for word in re.findall(r"[\w./*-]+", code(page)):
        path = word.rstrip(".")
        if path.split("/")[0] not in ROOMS or "/" not in path:
            continue
        if ROOT / path == WRITTEN_BY_THE_BENCHMARK or re.search(rf"{re.escape(path)}/?<", code(page)):
            continue
        assert any(ROOT.glob(path.rstrip("/"))), f"{page.name}: there is no {path}"


@pages
def test_commands_exist(page: Path) -> None:
    text = code(page)
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", text):
        assert target in targets[1].split(), f"{page.name}: there is no target `make {target}`"
    presets = json.loads((ROOT / "CMakePresets.json").read_text())["configurePresets"]
    for preset in re.findall(r"--preset (\w+)", text):
        assert preset in {p["name"] for p in presets}, f"{page.name}: there is no preset {preset}"
    for module in re.findall(r"python -m (fastkern[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page.name}: there is no module {module}"


def test_public_names_are_documented() -> None:
    text = "\n".join(code(page) for page in PAGES)
    for name in fastkern.__all__:
        assert name.startswith("__") or re.search(rf"\b{name}\b", text), f"fastkern.{name} is nowhere in the docs"


def test_operators_are_documented() -> None:
    operators = (ROOT / "docs" / "operators.md").read_text()
    for spec in SPECS:
        assert f"`{spec.name}(" in operators, f"docs/operators.md: no row for {spec.name}"
        assert (ROOT / "docs" / f"{spec.family}.md").exists(), f"there is no docs/{spec.family}.md"


# ---- the site, the chart, the messages -------------------------------------------------------------------------------


def load(tool: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site() -> ModuleType:
    return load("docs_site")


def test_site_has_every_page(site: ModuleType) -> None:
    """The navigation names the pages of docs/, those from outside and the reference, each once."""
    named = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert sorted(named) == sorted([*pages, *site.OUTSIDE.values(), *dict(site.reference())])


def test_reference_has_every_public_name(site: ModuleType) -> None:
    text = "\n".join(text for _, text in site.reference())
    names = {name for name in fastkern.__all__ if not name.startswith("__")}
    for name in sorted({*names, *fastkern.optim.__all__, *fastkern.nn.__all__}):
        assert f"\n## {name}\n" in text or inspect.ismodule(getattr(fastkern, name, None)), f"no reference of {name}"
    assert not re.search(r":(func|class|meth|mod):`", text), "roles of docstrings are left"
    assert "\n* `eps`: " in text, "arguments are no list"


def test_reference_shows_a_docstring_in_sections(site: ModuleType) -> None:
    text = """Sums, as :func:`add` does::

        a + b

    Args:
        a: (N,), like
            :func:`~fastkern.other`.
        *more: none.

    Returns:
        (N,).

    The end.
    """
    assert site.docstring(text, {"add": "elementwise.md#add"}) == "\n\n".join(
        [
            "Sums, as [`add`](elementwise.md#add) does:",
            "    a + b",
            "**Arguments**",
            "* `a`: (N,), like\n    `fastkern.other`.\n* `*more`: none.",
            "**Returns**",
            "(N,).",
            "The end.",
        ]
    )


def test_reference_shows_signatures(site: ModuleType) -> None:
    assert site.signature("f", fastkern.abs) == "def f(input: Tensor, *, out: Tensor | None = None) -> Tensor"
    assert '\n    approximate: str = "none",\n' in site.signature("f", fastkern.geglu)
    assert "\n    *,\n    causal: bool = False,\n" in site.signature("f", fastkern.flash_attn)
    assert site.signature("C", fastkern.optim.SGD).startswith("class C(\n    params: Any,\n")
    assert "-> None" not in site.signature("C", fastkern.optim.SGD)


def test_links_of_the_site(site: ModuleType) -> None:
    def relink(text: str, source: str, repository: str = "") -> str:
        place = site.OUTSIDE.get(source, source.removeprefix("docs/"))
        return site.relink(text, ROOT / source, place, repository)

    assert relink("[a](docs/norm.md#limits) `[b](c)`", "README.md") == "[a](norm.md#limits) `[b](c)`"
    assert relink("[a](../operators.md)", "docs/coming_from/apex.md") == "[a](../operators.md)"
    assert relink("[a](../README.md)", "docs/norm.md") == "[a](overview.md)"
    assert relink("[a](../cuda/launch.cuh), [b](https://x.y)", "docs/norm.md") == "a, [b](https://x.y)"
    assert relink("[a](../LICENSE)", "docs/norm.md", "https://x.y/blob/main/") == "[a](https://x.y/blob/main/LICENSE)"
    assert relink("![a](docs/speed.svg)", "README.md") == "![a](speed.svg)"


def test_chart_is_that_of_the_tables() -> None:
    chart = load("speed_chart")
    assert chart.CHART.read_text() == chart.chart(), "run python tools/speed_chart.py to draw docs/speed.svg anew"


def rows(page: Path, section: str) -> list[str]:
    """The messages in the first column of a section's table, as regular expressions."""
    text = page.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    assert found
    return [re.escape(message).replace(r"\.\.\.", ".*") for message in found]


def test_messages_of_the_installation_are_in_the_sources() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    files = [*ROOT.glob("python/fastkern/*.py"), *ROOT.glob("cmake/*.cmake"), *ROOT.glob("tools/*")]
    sources = "\n".join(file.read_text() for file in files if file.is_file())
    for message in rows(page, "Importing and building"):
        assert re.search(message, sources), f"{page.name}: nothing says {message}"


def test_messages_of_calls_are_raised() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    namespace: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(block.text, namespace)
    expected = rows(page, "Calls")
    assert len(expected) == len(namespace["messages"])
    for pattern, message in zip(expected, namespace["messages"], strict=True):
        assert re.search(pattern, message), f"{page.name}: {message!r} is not {pattern!r}"


# ---- tables of launch plans ------------------------------------------------------------------------------------------

_PLANS = re.compile(r"(?<=<!-- plan: )(\w+)( -->\n).*?(?=<!-- /plan -->)", re.DOTALL)
_MOST_PACKS = 1 << 16


def plan_ranges(op: str, dtype: str, vector: int) -> dict[tuple[object, ...], tuple[int, int]]:
    """Who owns a row, and for which lengths in packs of 16 bytes."""
    ranges: dict[tuple[object, ...], tuple[int, int]] = {}
    last: tuple[object, ...] = ()
    for packs in range(1, _MOST_PACKS + 1):
        plan = _core.plan(op, packs * vector, dtype)
        assert plan == _core.plan(op, (packs - 1) * vector + 1, dtype), f"{op}: the plan changes within a pack"
        threads, blocks = plan["threads_per_row"], plan["blocks_per_row"]
        facts = (
            f"`{plan['kernel']}`",
            threads if blocks == 1 else f"{blocks} x {threads}",
            plan["elements_per_thread"] // vector if plan["resident"] else "any",
            plan["rows_per_block"],
            plan["threads_per_block"],
        )
        assert facts == last or facts not in ranges, f"{op}: two ranges with the same plan"
        ranges[facts] = (ranges.get(facts, (packs, packs))[0], packs)
        last = facts
    return ranges


def plan_table(op: str) -> str:
    """Who owns a row, for rows of each length; a dash where a type has no rows of this kind."""
    half, single = plan_ranges(op, "bfloat16", 8), plan_ranges(op, "float32", 4)
    plans = sorted(half | single, key=lambda facts: half.get(facts) or single[facts])

    def span(ranges: dict[tuple[object, ...], tuple[int, int]], facts: tuple[object, ...], vector: int) -> str:
        if facts not in ranges:
            return "-"
        first, last = ranges[facts]
        start = (first - 1) * vector + 1
        return f"{start:,} and more" if last == _MOST_PACKS else f"{start:,} to {last * vector:,}"

    head = ("N in 16-bit", "N in f32", "kernel", "threads a row", "packs a thread", "rows a block", "threads a block")
    rows = [(span(half, facts, 8), span(single, facts, 4), *facts) for facts in plans]
    lines = [head, ("---:",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in lines)


def with_plans(text: str) -> str:
    return _PLANS.sub(lambda found: found[1] + found[2] + plan_table(found[1]), text)


@pages
def test_plan_tables(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if _PLANS.search(text) is None:
        return
    if not _core.build_info()["cuda"]:
        pytest.skip("a build without CUDA knows no plans")
    assert with_plans(text) == text, f"{page.name}: run python tests/test_docs.py to write the tables anew"


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(with_plans(each.read_text(encoding="utf-8")), encoding="utf-8")
