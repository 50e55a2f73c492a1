"""What the pages tell a reader to type on the host is taken by the commands. (What they tell to type in a guest is
typed there by tests/vm/test_pages.py.)"""

from __future__ import annotations

import re

import click
import pytest

from support.console_lines import CHECKOUT, HostLine, host_lines, shape, stories
from vmbus.cli import main
from vmbus.cli.drivers import DriverFile, jobs_for, parse_drive
from vmbus.places import DESCRIPTIONS as CONFIGURATIONS

LINES = host_lines()
NOT_COMMANDS = {"test", "setup", "_run"}
"""Scripts whose arguments are not click's."""


def _parsed(line: HostLine) -> dict[str, object]:
    command = main.commands[line.script]
    arguments = [one for one in line.arguments if one not in ("&", "...")]
    if any(one.startswith(("[", "|", "<", ">")) for one in arguments):  # a synopsis, or a pipe
        cut = next(at for at, one in enumerate(arguments) if one.startswith(("[", "|", "<", ">")))
        arguments = arguments[:cut]
    arguments = [one.removesuffix("...") for one in arguments]
    with command.make_context(line.script, arguments, parent=click.Context(main)) as context:
        return dict(context.params)


@pytest.mark.parametrize("line", LINES, ids=[f"{line.page}: {line.script}" for line in LINES])
def test_fault_n3_a_line_of_a_page_is_taken_by_its_command(line: HostLine) -> None:
    assert (CHECKOUT / "scripts" / line.script).is_file()
    if line.script in NOT_COMMANDS:
        return
    try:
        found = _parsed(line)
    except click.UsageError as error:
        if not line.arguments or line.arguments[0].startswith("["):
            return  # a line that only names the script
        raise AssertionError(f"{line}: {error.format_message()}") from error
    if line.script != "run-vm":
        return
    config = found["config"]
    if isinstance(config, str) and not config.endswith(".toml"):
        assert (CONFIGURATIONS / f"{config}.toml").is_file(), config
    files = found["driver_files"]
    drives = found["drives"]
    assert isinstance(files, tuple) and isinstance(drives, tuple)
    own = [DriverFile(path.stem.replace("_", "-"), "", True) for path in files]
    jobs_for([parse_drive(drive) for drive in drives], own)


def test_there_are_lines_to_try() -> None:
    assert len(LINES) > 60 and len({line.page for line in LINES}) > 10
    assert {story.name for story in stories()} >= {"linux"}


def test_shapes() -> None:
    assert shape("[    4.447262] hv_vmbus: Vmbus version:5.3") == shape("[   14.1] hv_vmbus:  Vmbus version:5.3")
    assert re.search("[a-z]", shape("/dev/sda")) and shape("sda") != shape("sdb")
