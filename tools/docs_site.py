# SPDX-License-Identifier: Apache-2.0
"""What `mkdocs build` needs beside docs/: the reference from docstrings, pages from outside of docs/, their links.

The pages of docs/ are written to be read in the repository, so they link to sources and to README.md. On the site the
pages from outside have other names, and a link to a source goes to `repo_url`, or is no link where there is none.
"""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

# Pages that lie outside of docs/.
OUTSIDE = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# Pages of the reference: their title, and the modules below fastkern.ops whose public functions they hold.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "norm": ("Norms", ("norm", "add_norm", "add_norm_inplace", "norm_quant", "group_norm")),
    "attention": ("Attention", ("attention",)),
    "rope": ("Rotary embeddings", ("rope", "rope_table")),
    "softmax": ("Softmax", ("softmax",)),
    "loss": ("Losses", ("loss", "linear_cross_entropy")),
    "activation": ("Activations and dropout", ("activation", "dropout")),
    "elementwise": ("Pointwise functions", ("elementwise", "_pointwise_arithmetic")),
    "functional_optim": ("Optimizers on lists", ("optim",)),
}
# Pages of the classes of a package.
CLASSES = {"optim": ("Optimizers", "fastkern.optim"), "nn": ("Modules", "fastkern.nn")}
OTHERS = ("package", "The package")


# ---- the reference ---------------------------------------------------------------------------------------------------


def public_objects() -> dict[str, list[tuple[str, Any]]]:
    """Everything public: for each page the names and the objects."""
    import importlib

    import fastkern
    from fastkern.ops import elementwise

    page_of = {f"fastkern.ops.{module}": page for page, (_, modules) in FAMILIES.items() for module in modules}
    pages: dict[str, list[tuple[str, Any]]] = {page: [] for page in (*FAMILIES, *CLASSES, OTHERS[0])}
    for name in sorted({*fastkern.__all__, *elementwise.__all__}):
        value = getattr(fastkern, name)
        if name.startswith("__") or inspect.ismodule(value):
            continue
        pages[page_of.get(getattr(value, "__module__", ""), OTHERS[0])].append((name, value))
    for page, (_, package) in CLASSES.items():
        module = importlib.import_module(package)
        pages[page] = [(name, getattr(module, name)) for name in sorted(module.__all__, key=str.lower)]
    return pages


def _annotation(annotation: Any) -> str:
    """A type in the words of the source."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def signature(name: str, value: Any) -> str:
    """A definition in Python's words; in one line where that fits."""
    try:
        given = inspect.signature(value)
    except ValueError:
        return f"{name}(...)"
    word = "class" if inspect.isclass(value) else "def"
    parameters = list(given.parameters.values())
    texts, star = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            texts.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        bare = str(parameter.replace(annotation=parameter.empty))
        name_, equals, default = bare.partition("=")
        if isinstance(parameter.default, str):
            default = f'"{parameter.default}"'
        shown = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        texts.append(f"{name_}{shown}" + (f" = {default}" if equals else ""))
    back = "" if inspect.isclass(value) or given.return_annotation is given.empty else given.return_annotation
    back = back and f" -> {_annotation(back)}"
    line = f"{word} {name}({', '.join(texts)}){back}"
    return line if len(line) <= 100 else f"{word} {name}(\n    " + ",\n    ".join(texts) + f",\n){back}"


def _plain(text: str, known: dict[str, str]) -> str:
    """Roles, literal blocks and formulas of a docstring in Markdown; `known` are links of names."""

    def role(found: re.Match[str]) -> str:
        path = found[1].lstrip("~")
        place, _, name = path.rpartition(".")
        ours = not place or place.startswith("fastkern")
        return f"[`{name}`]({known[name]})" if ours and name in known else f"`{path}`"

    def formula(found: re.Match[str]) -> str:
        return f"\n```latex\n{textwrap.dedent(found[1]).strip()}\n```\n"

    text = re.sub(r"^\.\. math::\n((?:[ \t]+.*\n?|\n)+)", formula, text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`([^`]+)`", role, text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


_SECTION = re.compile(r"^(Args|Returns|Raises|Notes|Note|Example|Examples|Yields|Attributes):$", re.MULTILINE)
_TITLES = {"Args": "Arguments"}
_ENTRY = re.compile(r"^(\*{0,2}\w[\w., *]*):\s", re.MULTILINE)


def _entries(body: str) -> str:
    """``name: text`` with its further lines, as a list."""
    items = re.sub(_ENTRY, lambda found: f"\0`{found[1]}`: ", body).split("\0")
    lines = [items[0].rstrip()] if items[0].strip() else []
    for item in items[1:]:
        first, _, rest = item.rstrip().partition("\n")
        lines.append(f"* {first}" + (f"\n{textwrap.indent(textwrap.dedent(rest), '    ')}" if rest else ""))
    return "\n".join(lines)


def docstring(text: str, known: dict[str, str]) -> str:
    """A docstring in Google's style as Markdown."""
    parts = _SECTION.split(_plain(inspect.cleandoc(text), known))
    out = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        inside, after = _section(body)
        listed = _entries(inside) if title in ("Args", "Raises", "Attributes") else inside
        out += [f"**{_TITLES.get(title, title)}**", listed, after]
    return "\n\n".join(filter(None, out))


def _section(body: str) -> tuple[str, str]:
    """What is indented belongs to a section; text at the margin after it does not."""
    lines = body.strip("\n").splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    return textwrap.dedent("\n".join(lines[:end])).strip("\n"), "\n".join(lines[end:]).strip()


def reference() -> Iterator[tuple[str, str]]:
    """The generated pages: place on the site, Markdown."""
    objects = public_objects()
    titles = {page: title for page, (title, _) in (FAMILIES | CLASSES).items()} | dict([OTHERS])
    known = {name: f"{page}.md#{name.lower()}" for page, entries in objects.items() for name, _ in entries}
    for page, entries in objects.items():
        prefix = f"{CLASSES[page][1]}." if page in CLASSES else "fastkern."
        text = [f"# {titles[page]}", f"Of `{prefix[:-1]}`, from the docstrings: `help({prefix}{entries[0][0]})`."]
        for name, value in entries:
            if not value.__doc__:
                raise ValueError(f"{prefix}{name} has no docstring for the reference")
            text += [
                f"## {name}",
                f"```python\n{signature(prefix + name, value)}\n```",
                docstring(value.__doc__, known),
            ]
        yield f"api/{page}.md", "\n\n".join(text) + "\n"


# ---- links -----------------------------------------------------------------------------------------------------------

_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]+`(?!\]))|(?P<image>!?)\[(?P<text>[^]]*)\]\((?P<target>[^)\s]+)\)", re.M | re.S
)


def relink(text: str, source: Path, place: str, repository: str) -> str:
    """A page's text with links that hold on the site.

    Args:
        text: of the page.
        source: the file that it was written in.
        place: of the page on the site, e.g. `coming_from/apex.md`.
        repository: what shows a file when its path is appended; empty: links to sources become their text.
    """

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if found["code"] is not None or target.startswith(("#", "http://", "https://", "mailto:")):
            return found[0]
        name, hash_, anchor = target.replace("\\", "").partition("#")
        path = (source.parent / name).resolve()
        inside = OUTSIDE.get(path.relative_to(ROOT).as_posix())
        if inside is None and path.is_relative_to(DOCS) and path.is_file():
            inside = path.relative_to(DOCS).as_posix()
        if inside is not None:
            return f"{found['image']}[{found['text']}]({os.path.relpath(inside, Path(place).parent)}{hash_}{anchor})"
        shown = f"[{found['text']}]({repository}{path.relative_to(ROOT).as_posix()})"
        return shown if repository else found["text"]

    return _LINK.sub(link, text)


def _repository(config: Any) -> str:
    url = (config["repo_url"] or "").rstrip("/")
    return f"{url}/blob/main/" if url else ""


# ---- mkdocs calls these ----------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/ and the reference."""
    from mkdocs.structure.files import File

    for name, place in OUTSIDE.items():
        text = relink((ROOT / name).read_text(encoding="utf-8"), ROOT / name, place, _repository(config))
        files.append(File.generated(config, place, content=text))
    for place, text in reference():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Mend the links of a page of docs/."""
    place = page.file.src_uri
    if page.file.generated_by:
        return markdown
    return relink(markdown, DOCS / place, place, _repository(config))
