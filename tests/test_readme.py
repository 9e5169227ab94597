"""What README shows runs, and what it names exists."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from pullback import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples(block):
    if ">>>" not in block:
        exec(compile(block, "README.md", "exec"), {})
        return
    test = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_command_lines_are_understood():
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pullback ")]
    assert commands
    for command in commands:
        parsed = cli.parser().parse_args(shlex.split(command)[1:])
        if parsed.run is cli.explain:
            cli.chosen_methods(parsed.method, parsed.option, parsed.layer)


def test_every_method_of_the_table_is_public():
    section = README.split("\n## Methods\n")[1].split("\n## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.+?`) \|", section, flags=re.MULTILINE) for name in re.findall(r"\w+", row)
    ]
    assert named
    assert set(named) <= set(cli.public_methods())
