"""The README and the documentation stay true: their commands exist, their links lead somewhere."""

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from mige_rt.cli import main as mige_rt

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "integrations/comfyui/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# With nothing on the PATH, the shell hands every command to this function: words end with NUL, commands with RS.
PRINT_COMMANDS = r"""
PATH=/dev/null
command_not_found_handle() { printf '%s\0' "$@"; printf '\x1e'; }
"""


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def block_commands(text: str, folder: Path) -> Iterator[list[str]]:
    """Every command of the bash blocks, as the shell splits it, loops unrolled."""
    for block in fenced(text, "bash"):
        shell = subprocess.run(
            ["/bin/bash", "-c", PRINT_COMMANDS + block], cwd=folder, capture_output=True, text=True, check=False
        )
        for command in shell.stdout.split("\x1e")[:-1]:
            yield command.split("\0")[:-1]


def inline_commands(text: str) -> Iterator[list[str]]:
    """Commands in the running text; "..." stands for more arguments."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose):
        try:
            words = shlex.split(code)
        except ValueError:
            continue
        yield [word for word in words if word != "..."]


def check_command(words: list[str], complete: bool) -> bool:
    """Fails if a command of ours does not take these options; returns whether it is one of ours.

    complete: required options must be there.
    """
    if words[:2] == ["/usr/bin/time", "-v"]:
        words = words[2:]
    match words:
        case ["mige-rt"]:
            return True
        case ["mige-rt", *arguments] if arguments[0].startswith("-"):
            command, name = mige_rt, "mige-rt"
        case ["mige-rt", name, *arguments]:
            assert name in mige_rt.commands, f"there is no command mige-rt {name}"
            command = mige_rt.commands[name]
            if isinstance(command, click.Group) and not arguments:
                return True
            if isinstance(command, click.Group) and not arguments[0].startswith("-"):
                assert arguments[0] in command.commands, f"there is no command mige-rt {name} {arguments[0]}"
                command, (name, *arguments) = command.commands[arguments[0]], arguments
        case ["python", "-m", name, *arguments]:
            spec = importlib.util.find_spec(name)
            assert spec is not None, f"there is no module {name}"
            command = import_module(f"{name}.__main__" if spec.submodule_search_locations else name).main
        case ["accelerate", "launch", *launched] | [_, "torchrun", *launched] if "-m" in launched:
            return check_command(["python", *launched[launched.index("-m") :]], complete)
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), f"there is no script {script}"
            return True
        case _:
            return False
    if isinstance(command, click.Group) and arguments and arguments[0] in command.commands:
        name, *arguments = arguments
        command = command.commands[name]
    try:
        command.make_context(name, list(arguments)).close()
    except click.exceptions.Exit:
        pass  # --help and --version
    except click.MissingParameter:
        if complete:
            raise
    return True


def options(command: click.Command) -> set[str]:
    names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    groups = command.commands.values() if isinstance(command, click.Group) else ()
    return names.union(*map(options, groups))


@pytest.mark.parametrize("page", NAMES)
def test_commands_can_be_given_like_this(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text()
    for words in block_commands(text, tmp_path):
        check_command(words, complete=True)
    for words in inline_commands(text):
        check_command(words, complete=False)


def test_the_check_of_commands_finds_mistakes() -> None:
    assert check_command(["mige-rt", "run", "--prompt", "a cat"], complete=True)
    assert not check_command(["ls"], complete=True)
    with pytest.raises(click.NoSuchOption):
        check_command(["mige-rt", "run", "--prompts", "a cat"], complete=True)
    with pytest.raises(AssertionError, match="no command mige-rt draw"):
        check_command(["mige-rt", "draw"], complete=False)
    with pytest.raises(AssertionError, match="no command mige-rt eval draw"):
        check_command(["mige-rt", "eval", "draw"], complete=False)
    with pytest.raises(click.MissingParameter):
        check_command(["mige-rt", "export"], complete=True)


def test_blocks_are_split_as_a_shell_splits_them(tmp_path: Path) -> None:
    text = '```bash\nfor s in a "b c"; do  # twice\n  run $s --x \\\n    1 && run "$s"\ndone\n```\n'
    assert list(block_commands(text, tmp_path)) == [
        ["run", "a", "--x", "1"],
        ["run", "a"],
        ["run", "b", "c", "--x", "1"],
        ["run", "b c"],
    ]


def test_options_named_in_the_text_exist() -> None:
    modules = (
        "trainer.__main__",
        "trainer.evaluate.__main__",
        "trainer.synthetic.fetch",
        "trainer.synthetic.manifest",
        "benchmarks.gpu_stay.__main__",
    )
    commands = (mige_rt, *(import_module(name).main for name in modules))
    known = {"--help", "--version", "--salt", "--backend", "--write", "--strict"}  # the last four of other programs
    known |= {name for command in commands for name in options(command)}
    for page in PAGES:
        named = {word for words in inline_commands(page.read_text()) for word in words if re.match(r"--\w", word)}
        assert not named - known, page


def test_what_the_options_save_is_what_the_committed_report_says() -> None:
    report = json.loads((ROOT / "benchmarks/results/cpu/report.json").read_text())
    text = " ".join((ROOT / "docs/benchmarks.md").read_text().partition("## Options that save time")[2].split())
    for change in ("guidance at 0% to 50% of the steps", "reuse below 0.1"):
        for case in (0, 2):  # one reference; 60 steps, and 20
            (row,) = [row for row in report["speedups"] if (row["case"], row["change"]) == (case, change)]
            gain = row["speedup"]
            assert f"{gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f})" in text
        (result,) = [each for each in report["results"] if (each["case"], each["name"]) == (0, row["candidate"])]
        assert f"; {result['fidelity']['errors']['psnr']:.1f} dB" in text


@pytest.mark.parametrize("page", NAMES)
def test_relative_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), f"{page} links to {link}"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("page", NAMES)
def test_paths_named_in_the_text_exist(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    paths = re.findall(r"`((?:mige_rt|engines|export|trainer|benchmarks|tests|docs|examples)/[\w./-]*)`", prose)
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


def test_the_readme_is_short() -> None:
    assert 600 <= len((ROOT / "README.md").read_text().split()) <= 800


def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    (block,) = fenced((ROOT / "README.md").read_text(), "python")
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "out.png").is_file()
