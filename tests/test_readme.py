"""The code blocks of README and of the pages under docs/ run, and the names in them exist."""

import ast
import doctest
import pkgutil
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

import pullback
from pullback import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}


def blocks(language: str) -> list[tuple[str, str]]:
    """Pairs of a page's name and a block of code in it."""
    pattern = rf"^```{language}\n(.*?)^```"
    found = {name: re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE) for name, text in TEXTS.items()}
    return [(name, block) for name, of_page in found.items() for block in of_page]


PYTHON = blocks("python")


@pytest.mark.parametrize(("page", "block"), [pair for pair in PYTHON if ">>>" in pair[1]])
def test_python_sessions(page, block):
    test = doctest.DocTestParser().get_doctest(block, {}, page, page, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize(("page", "block"), [pair for pair in PYTHON if ">>>" not in pair[1]])
def test_python_excerpts_import_what_exists(page, block):
    """Excerpts need data, time or packages that the tests lack: they are parsed, and imports of the library run."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pullback":
            exec(ast.unparse(node), {})


@pytest.mark.parametrize("page", TEXTS)
def test_dotted_names_of_the_library_exist(page):
    for name in set(re.findall(r"\bpullback(?:\.[A-Za-z_]\w*)+", TEXTS[page])):
        pkgutil.resolve_name(name)


def test_the_example_with_a_photograph(tmp_path, monkeypatch):
    """README's first example, with random weights in place of those that torchvision would download."""
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib").use("Agg")
    from pullback._networks.models import import_torchvision

    import_torchvision()
    models = pytest.importorskip("torchvision.models")
    untrained = models.resnet50
    monkeypatch.setattr(models, "resnet50", lambda weights: untrained(weights=None))
    monkeypatch.chdir(tmp_path)
    (block,) = [block for page, block in PYTHON if page == "README.md" and "torchvision" in block]
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's own
        exec(compile(block, "README.md", "exec"), names)
    assert names["maps"].shape == (1000, 1, 1, 7, 7)
    assert torch.isfinite(names["maps"]).all()
    assert (tmp_path / "cat.png").stat().st_size > 10_000


def test_readme_is_short_and_begins_with_the_two_commands():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 120
    assert [line.split("  ")[0] for line in lines if line.startswith(("make ", "pip ", "pullback "))][:2] == [
        "make demo",
        "make test",
    ]


def test_command_lines_are_understood():
    commands = [line for _, block in blocks("sh") for line in block.splitlines() if line.startswith("pullback ")]
    assert commands
    for command in commands:
        parsed = cli.parser().parse_args(shlex.split(command, comments=True)[1:])
        if parsed.run is cli.explain:
            cli.chosen_methods(parsed.method, parsed.option, parsed.layer)


def test_links_lead_to_files_and_headings():
    for path in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path.name]):
            if "://" in link:
                continue
            file, _, heading = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), (path.name, link)
            if heading:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert heading in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], link


def test_the_methods_of_the_page_are_public():
    rows = re.findall(r"^\| (`.+?`) \|", TEXTS["methods.md"], flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"\w+", row)]
    assert named
    assert len(named) == len(set(named))
    assert set(named) <= set(cli.public_methods())


def test_the_families_of_readme_name_public_functions():
    section = TEXTS["README.md"].split("\n## Methods\n")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+)`", section)
    assert named
    assert all(hasattr(pullback, name) or name in pullback.metrics.METRICS for name in named)
