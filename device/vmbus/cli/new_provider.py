"""``new-provider``: a provider to begin with, its guest's driver, its tests, a VM and a soak campaign with it."""

from __future__ import annotations

import keyword
import re
import sys
import uuid
from importlib import resources
from pathlib import Path
from string import Template

import click

from vmbus.cli.results import json_option, print_json
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.places import command
from vmbus.providers.loading import PATH_VARIABLE

_NAME = re.compile(r"[a-z][a-z0-9_]{0,24}")
_FILES = {
    "provider.py.in": "{}.py",
    "driver.py.in": "{}_driver.py",
    "test_provider.py.in": "test_{}.py",
    "test_device.py.in": "test_{}_device.py",
    "machine.toml.in": "{}.toml",
    "soak.toml.in": "{}_soak.toml",
}


def create(name: str, directory: Path) -> list[Path]:
    """Writes the files for a provider of that name; returns their paths.

    Raises UsageError for a name that cannot be a module's, EnvironmentProblem when a file is there already or cannot
    be written. Nothing is overwritten, and nothing written when one of them is there.
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise UsageError(
            f"{name!r} cannot be the name of a provider's module; allowed: 1 to 25 of a-z, 0-9 and '_', starting with "
            "a letter, no word of Python's, for instance door_bell"
        )
    if name in sys.stdlib_module_names or name in ("vmbus", "vmbus_guest", "msgspec", "click", "rich", "qemu"):
        raise UsageError(f"{name!r} is the name of a module that exists; choose another, for instance my_{name}")
    values = {
        "name": name,
        "class_name": "".join(word.capitalize() for word in name.split("_")),
        "driver_name": f"{name}_driver".replace("_", "-"),
        "vm_name": name.replace("_", "-").strip("-"),
        "interface_type": str(uuid.uuid4()),
        "instance": str(uuid.uuid4()),
    }
    made = {template: directory / pattern.format(name) for template, pattern in _FILES.items()}
    for path in made.values():
        if path.exists():
            raise EnvironmentProblem(f"{path} is there already; nothing was written")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for template, path in made.items():
            text = resources.files("vmbus").joinpath("templates", template).read_text()
            with path.open("x") as file:
                file.write(Template(text).substitute(values))
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {error.filename or directory}: {error.strerror}") from error
    return list(made.values())


@click.command("new-provider")
@click.argument("name")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), default=Path())
@json_option
def new_provider(name: str, directory: Path, as_json: bool) -> None:
    """Create a provider NAME (a module, such as door_bell) in DIRECTORY: with its guest's driver, tests that pass, a VM
    and a soak campaign."""
    module, driver, test, device, machine, soak = (path.resolve() for path in create(name, directory))
    if as_json:
        files = {"provider": module, "driver": driver, "test": test, "device_test": device}
        files |= {"machine": machine, "soak": soak}
        print_json({"name": name, "files": {what: str(path) for what, path in files.items()}})
        return
    for what, path in (
        ("the provider", module),
        ("its guest's driver", driver),
        ("tests in milliseconds", test),
        ("with a server, and a VM", device),
        ("a VM with it", machine),
        ("a soak campaign", soak),
    ):
        click.echo(f"{what:24} {path}")
    click.echo("")
    click.echo(f"  {command('test')} {test} {device}")
    click.echo(f"  {command('soak')} --schedule {soak}")
    found = f"{PATH_VARIABLE}={module.parent} {command('run-vm')} {machine}"
    click.echo(f"  {found} --driver-file {driver} --drive {driver.stem.replace('_', '-')}")
    click.echo("")
    click.echo("docs/writing-a-provider.md explains what is in them.")
