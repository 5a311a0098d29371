"""The README says what is there: its commands have only flags that exist, and its file map names every room."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
COMMANDS = sorted({c for page in PAGES for c in re.findall(r"python ((?:demo/)?\w+\.py[^\n`]*)", page)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_readme_command_exists(command, capsys):
    script, *words = command.split()
    # evaluate.py has a help of its own for each of these
    mode = [words[0], "X"] if words and words[0] in ("--reconstruct", "--diagnose") else []
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as exit_:
        module.main([*mode, "--help-all" if hasattr(module, "USUAL") else "--help"])
    known = capsys.readouterr().out
    assert exit_.value.code == 0
    missing = [flag for flag in re.findall(r"(--[a-z][\w-]*)", command) if not re.search(rf"{flag}\b", known)]
    assert not missing


def test_the_two_first_commands_are_there_word_for_word():
    assert "\npip install -e . && python sample.py --class 207 --cfg 1.0\n" in README
    assert "\npip install -e '.[test]' && pytest\n" in README


def test_the_file_map_names_every_script_and_package():
    rooms = {p.name for p in ROOT.glob("*.py")}
    rooms |= {f"{p.parent.name}/" for p in ROOT.glob("*/__init__.py")}
    named = set(re.findall(r"^\| `([^`]+)`", README, re.M))
    assert rooms <= named and all((ROOT / name).exists() for name in named)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
