"""The documentation does what it says: blocks are executed, commands exist, links lead somewhere, figures are those that were computed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import DOCS, ROOT, Block, blocks, pages, prose

EXECUTED = ("sh", "python")
PAGES = [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages()]
ALL = [block for page in pages() for block in blocks(page)]
SKIPPED = [block for block in ALL if block.reason]


def is_run(block: Block) -> bool:
    """Whether a block is executed or written to a file."""
    return not block.reason and (block.language in EXECUTED or bool(block.title))


def environment() -> dict[str, str]:
    """What a reader has who activated the environment, without a network."""
    tools = Path(sys.executable).parent
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    return {**os.environ, **offline, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def pages_that_run() -> list:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages() if any(map(is_run, blocks(page)))]


# ---- commands -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_that_run())
def test_blocks_run_as_a_reader_runs_them(page: Path, tmp_path: Path):
    steps = [vars(block) | {"place": block.place, "page": ""} for block in blocks(page) if is_run(block)]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("execute_page.py"))],
        input=json.dumps(steps),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-4000:]}"


def test_few_blocks_are_not_executed_and_each_says_why():
    assert all(len(block.reason) > 10 for block in SKIPPED), [block.place for block in SKIPPED]
    share = len([block for block in SKIPPED if block.language == "sh"]) / len([block for block in ALL if block.language == "sh"])
    assert share <= 0.4, f"{share:.0%} of the shell blocks are not executed: {[(block.place, block.reason) for block in SKIPPED]}"


def test_blocks_are_of_a_language_that_is_executed_or_cannot_be():
    known = {*EXECUTED, "yaml", "json", "text", "mermaid", ""}
    assert not [block.place for block in ALL if block.language not in known]


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in SKIPPED])
def test_what_is_not_executed_is_at_least_understood(block: Block):
    if block.language == "python":
        compile(block.code, block.place, "exec")
    for command in block.commands if block.language == "sh" else []:
        words = shlex.split(command)
        if words[0] == "make":
            check_make(words[1:])
        elif "metamorph" in words:
            parse(words[words.index("metamorph") + 1 :])
        elif scripts := [word for word in words if word.endswith(".py")]:
            written = {other.title for other in ALL if other.page == block.page}
            assert all(name in written or (ROOT / name).is_file() for name in scripts), f"{command!r} ({block.place}): no such script"
        else:
            assert words[0] in {"pip", "."}, f"{command!r} ({block.place}) is neither executed nor understood"


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_passing_exist(page: Path):
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        words = span.split()
        if words[0] == "make" and len(words) > 1:
            check_make(words[1:])
        elif words[0] == "metamorph" and len(words) > 1:
            parse([word for word in words[1:] if word != "..."], in_passing=True)


@pytest.mark.parametrize("block", [pytest.param(block, id=block.title) for block in ALL if block.title.endswith(".yaml")])
def test_recipes_on_pages_are_valid(block: Block):
    import yaml

    from metamorph.training.config import RunConfig

    assert RunConfig(**yaml.safe_load(block.code)).name


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = [word for word in words if "=" not in word and word not in targets]
    assert not missing, f"make {missing[0]}: no such target"


def parse(words: list[str], *, in_passing: bool = False) -> None:
    """Let the real command line read the words, without doing anything; `in_passing` they may lack what the command requires."""
    import typer

    from metamorph.cli.main import app

    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"metamorph {words[0]}: no such command"
        command, words = command.commands[words[0]], words[1:]
    if not words and in_passing:
        return
    command.make_context(command.name, list(words), resilient_parsing=in_passing)
    if in_passing:  # resilient parsing forgives unknown options
        known = {name for parameter in command.params for name in parameter.opts}
        unknown = [word for word in words if word.startswith("-") and word not in known | {"--help"}]
        assert not unknown, f"{unknown[0]}: no option of `{command.name}`"


# ---- links, figures and pictures ----------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both the site and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower() for heading in headings)
    return {text.replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", [*PAGES, pytest.param(ROOT / "README.zh.md", id="README.zh.md")])
def test_links_and_pictures_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"(https?|mailto):", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name).resolve()
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        assert page.parent == ROOT or file.is_relative_to(DOCS), f"{page.name}: {target} leaves the site"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: no such heading; there are {sorted(anchors(file))}"


def test_every_page_is_in_the_navigation_and_the_navigation_leads_to_pages():
    def files(entries: list) -> list[str]:
        return [name for entry in entries for value in entry.values() for name in ([value] if isinstance(value, str) else files(value))]

    listed = files(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_tables_hold_what_was_computed_and_measured():
    from tests.docs.figures import PAGE, rewritten

    assert PAGE.read_text(encoding="utf-8") == rewritten(), "Run: python -m tests.docs.figures"


def test_faq_answers_twenty_complaints_and_cites_threads():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) == 20
    thread = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+")
    assert not [section.splitlines()[0] for section in sections if not thread.search(section)]


def test_api_reference_covers_the_public_surface():
    import metamorph

    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))
    missing = []
    for name in sorted(set(metamorph.__all__) - {"__version__"}):
        home = getattr(metamorph, name).__module__
        if not {home, f"{home}.{name}"} & documented:
            missing.append(name)
    assert not missing


# ---- the site -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, made from a copy so that a checkout is never touched."""
    copy = tmp_path_factory.mktemp("site")
    for name in ("zensical.toml", "CHANGELOG.md", "LAB_LOG.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    build = subprocess.run(
        [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"],
        cwd=copy,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = build.stdout + build.stderr
    assert build.returncode == 0, output
    assert "No issues found" in output, output
    assert "warning" not in output.lower(), output
    return copy / "build" / "docs"


@pytest.mark.slow
def test_site_is_built_without_warnings_and_resolves_every_reference(site: Path):
    for page in DOCS.rglob("*.md"):
        html = (site / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert "autoref" not in re.sub(r'class="autorefs[^"]*"', "", html), page
        assert not re.search(r"\]\[metamorph\.", html), f"{page}: a reference that is not resolved"


@pytest.mark.slow
def test_site_asks_nothing_of_other_hosts(site: Path):
    """Scripts, styles, fonts, pictures: all from the site itself. (Links that a reader may follow are another matter.)"""
    for html in site.rglob("*.html"):
        text = html.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source|video)[^>]*\ssrc="?([^">\s]+)', text)
        loaded += re.findall(r'<link(?![^>]*rel="?(?:canonical|prev|next|alternate))[^>]*\shref="?([^">\s]+)', text)
        foreign = [url for url in loaded if re.match(r"(https?:)?//", url)]
        assert not foreign, f"{html.name} loads {foreign}"
        assert 'class="mermaid"' not in text, f"{html.name}: mermaid is loaded from elsewhere; draw an SVG"
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


# ---- the translation ----------------------------------------------------------------------------------------


def numbers(text: str) -> list[str]:
    """Every figure, sorted; large ones as Chinese writes them: 16 million is 1600 wan."""
    text = re.sub(r"(\d+) million", lambda match: f"{int(match[1]) * 100}", text)
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_the_chinese_readme_says_the_same():
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    shape = [re.findall(r"^(#+) ", prose(page), flags=re.MULTILINE) for page in (english, chinese)]
    assert shape[0] == shape[1], "other headings"
    for ours, theirs in zip(blocks(english), blocks(chinese), strict=True):
        assert ours.language == theirs.language
        if ours.language in EXECUTED:
            assert ours.commands == theirs.commands, f"{ours.place} and {theirs.place} differ"
            assert bool(ours.reason) == bool(theirs.reason), theirs.place
    rows = [[line for line in prose(page).splitlines() if line.startswith("| `")] for page in (english, chinese)]
    assert len(rows[0]) == len(rows[1])
    for ours, theirs in zip(*rows, strict=True):
        cells, their_cells = ours.split("|"), theirs.split("|")
        assert cells[1] == their_cells[1], "a row of another figure"
        assert numbers(ours) == numbers(theirs), f"{cells[1].strip()}: figures differ"
    found, expected = numbers(prose(chinese)), numbers(prose(english))
    assert found == expected, f"figures in the text differ: {sorted(set(found) ^ set(expected))}"
