"""Docs say what is there: links, commands, the reference of the config, the site."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sra2_jax import config_file
from sra2_jax.__main__ import COMMANDS
from sra2_jax.command import Parser
from sra2_jax.errors import UserError
from tools import reference

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*/*.md")]
)
NAME = (
    r"(?:sra2|main\.py|python3? -m (?:sra2_jax|tools\.|benchmarks\.)[\w.]*)(?![\w.-])"
)
PROGRAM = re.compile(rf"(?:^|(?<=\s))(?:[\w.]+/)*{NAME}")


def anchors(page):
    """Of its titles, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def commands(page):
    """Words of each command of this project on a page, in blocks of shell or between
    backticks."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.M)
    inline = re.findall(
        rf"`({NAME}[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M)
    )
    blocks += (x.replace("\n", " ") for x in inline if "-" in x.split(" ", 3)[-1])
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)
        for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line)):
            if (found := PROGRAM.search(part)) and "..." not in part:
                yield shlex.split(part[found.start() :])


FOUND = {" ".join(words): words for page in PAGES for words in commands(page)}


class Parsed(Exception):
    pass


@pytest.mark.parametrize("words", FOUND.values(), ids=FOUND)
def test_commands_have_these_flags(words, monkeypatch):
    """Each program takes its flags and keys; what they name need not be there."""
    plain = Parser.parse_args

    def parse(parser, *given):
        arguments = plain(parser, *given)
        if file := getattr(arguments, "config", None):
            config_file.override(file, arguments.overrides)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse)
    name, *given = words[2:] if words[1:2] == ["-m"] else words
    name = Path(name).name
    if name in ("sra2", "sra2_jax"):
        name = f"sra2_jax.{COMMANDS[given.pop(0)][0]}"
    elif name == "main.py":
        name = "sra2_jax.programs.train"
    elif name == "benchmarks.study":
        name = "benchmarks.study.__main__"
    monkeypatch.setattr(sys, "argv", [name, *given])
    with pytest.raises(Parsed):
        importlib.import_module(name).main()


def test_a_wrong_command_is_found(monkeypatch):
    words = shlex.split("sra2 sample runs/xl --out=a.npz --config.sampling.stepz=3")
    with pytest.raises(UserError, match="did you mean"):
        test_commands_have_these_flags(words, monkeypatch)
    assert len(FOUND) > 80


def test_the_reference_of_the_config_is_the_configs():
    assert reference.PAGE.read_text() == reference.page(), "python -m tools.reference"


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d"]
    done = subprocess.run(
        [*command, tmp_path / "s"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "s" / "index.html").read_text()
    assert "Which method for me" in start
    assert 'href="faq/"' in start
