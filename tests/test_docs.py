"""What the documentation says exists: links, headings, commands with their options, targets of make, Python.

`tests/e2e/test_shown_commands.py` and `test_quickstart.py` run the commands and the Python.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"^\$?\s*(?:\S*/)?(accelerate launch .* -m sdq_deploy\.cli\.main|sdq-deploy) (.*)$")
_INLINE = re.compile(r"`(sdq-deploy [^`]+)`")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return _FENCE.findall(page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text("utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path.is_relative_to(ROOT), f"{page.name} links out of the project: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


def shown(page: Path, in_blocks: bool = True) -> Iterator[tuple[str, str]]:
    """Every command of ours that a reader could type: (`sdq-deploy` or `accelerate launch ...`, what follows it).

    Of blocks, lines joined and remarks dropped, if wanted; and of sentences.
    """
    for language, text in blocks(page) if in_blocks else ():
        if language in ("", "sh", "bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                if found := _COMMAND.match(line):
                    yield found[1], re.sub(r"\s#\s.*$", "", found[2]).strip()
    for inline in _INLINE.findall(_FENCE.sub("", page.read_text("utf-8"))):
        yield "sdq-deploy", inline.removeprefix("sdq-deploy ")


def parse(arguments: list[str]) -> None:
    """As the command line does, up to the command itself, which is not run."""
    import typer.main

    from sdq_deploy.cli.main import app

    group: Any = typer.main.get_command(app)
    with group.make_context("sdq-deploy", [arguments[0]], resilient_parsing=True) as context:
        name, command, _ = group.resolve_command(context, arguments)
        command.make_context(name, arguments[1:], parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    for _, line in shown(page):
        typed = re.sub(r"\[(-[^\]]*)\]", r"\1", line)  # [--mask mask.png] is optional
        words = shlex.split(typed.replace("…", "").replace("...", ""))
        if not words or words[0].startswith("-") or "--help" in words:
            continue
        try:
            parse(words)
        except Exception as error:  # click's own kinds, of which typer has a copy
            in_a_sentence = type(error).__name__ == "MissingParameter" or ("…" in line and "requires an" in str(error))
            if not in_a_sentence:
                raise AssertionError(f"{page.name}: sdq-deploy {line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = page.read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, f"{page.name}: make {target}"
