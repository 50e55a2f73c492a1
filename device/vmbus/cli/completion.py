"""Completion by shells: the script that teaches one, and what is completed that only this machine knows.

Click asks us again at each Tab, with the line so far in the environment. In a checkout the scripts are commands, too:
what they are asked about is a line of ours that begins behind their names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from vmbus.cli.asking import ask, find_vm
from vmbus.cli.terminal import run
from vmbus.cli.words import PROGRAM, VARIABLE
from vmbus.errors import VmbusError
from vmbus.places import CHECKOUT, DESCRIPTIONS
from vmbus.vm.run_directory import running_vms

SHELLS = ("bash", "zsh", "fish")
_FUNCTION = "_vmbus_completion"
_SECONDS = 3.0  # for an owner's answer: somebody waits for it at a Tab


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what teaches SHELL to complete our commands, to be read in its start-up file."""
    folder = None if CHECKOUT is None else CHECKOUT / "scripts"
    click.echo(script(shell, folder))


def is_script(path: Path) -> bool:
    """Whether this is one of our commands and nothing else: else a Tab would run it."""
    return path.is_file() and path.read_text().rstrip().endswith(f'/_run" {path.name} "$@"')


def script(shell: str, folder: Path | None) -> str:
    """For `vmbus`; or for the scripts in the `folder` of a checkout, wherever they are called from."""
    kind = get_completion_class(shell)
    assert kind is not None
    text = kind(click.Command(PROGRAM), {}, PROGRAM, VARIABLE).source()
    if folder is None:
        return text
    names = sorted(path.name for path in folder.iterdir() if is_script(path))
    paths = [f"{folder}/{name}" for name in names]
    # Whatever has such a name elsewhere is another program, which is not to be run for this.
    if shell == "bash":
        text = text.replace("$1)", '"$program")').replace(
            "    local response\n",
            f'    local response program="{folder}/${{1##*/}}"\n    [[ $1 -ef $program ]] || return 0\n',
        )
        typed = [f"{lead}{name}" for lead in ("scripts/", "./scripts/", "./", f"{folder}/") for name in names]
        return text.replace(f"-F {_FUNCTION} {PROGRAM}", f"-F {_FUNCTION} {' '.join(typed)}")
    if shell == "zsh":
        check = f'    local program="{folder}/${{words[1]:t}}"\n    [[ $words[1] -ef $program ]] || return 1\n'
        text = re.sub(r"    \(\(.*commands\[vmbus\].*\n", lambda _: check, text)
        text = text.replace("zsh_complete vmbus)", 'zsh_complete "$program")')
        return text.replace(f"compdef {_FUNCTION} {PROGRAM}", f"compdef -p {_FUNCTION} '*/({'|'.join(names)})'")
    text = text.replace("(commandline -t) vmbus)", "(commandline -t) $argv[1])")
    head, _, _ = text.rpartition("complete --no-files")
    return head + "\n".join(f"complete --no-files --path {path} --arguments '({_FUNCTION} {path})'" for path in paths)


# ---- what only this machine knows ------------------------------------------------------------------------------------


def _items(values: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(value) for value in values if value.startswith(incomplete)]


def vms(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Names of running VMs."""
    return _items(_running(), incomplete)


def descriptions(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """VM descriptions of ours, or a file."""
    if "/" in incomplete:
        return [CompletionItem(incomplete, type="file")]
    return _items(sorted(path.stem for path in DESCRIPTIONS.glob("*.toml")), incomplete)


def test_drivers(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Test drivers."""
    from vmbus_guest.testdrivers import CATALOGUE

    return _items(sorted(CATALOGUE), incomplete)


def tags(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """A VM's name, or the tags of its checkpoints (with `--directory`: of those there)."""
    from vmbus.snapshot.checkpoints import Store

    given = context.params.get("words") or ()
    running = [] if given else _running()
    found = running if len(running) > 1 else []
    with contextlib.suppress(VmbusError, OSError, KeyError, TypeError):
        directory = context.params.get("directory")
        if directory is not None:
            found += [one.tag for one in Store(Path(directory), own=False).list()]
        else:
            answer = run(
                ask(find_vm(given[0] if given else None), "checkpoints", {"directory": None}, timeout=_SECONDS)
            )
            found += [str(one["tag"]) for one in answer["checkpoints"]]
    return _items(found, incomplete)


def first_vm(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """A VM's name, as the first of several words."""
    return [] if context.params.get("words") else _items(_running(), incomplete)


def targets(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """A running VM, or something saved."""
    return _items(_running(), incomplete) or [CompletionItem(incomplete, type="file")]


def providers(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The providers of the VM that is meant."""
    with contextlib.suppress(VmbusError, OSError):
        answer = run(ask(find_vm(context.params.get("name")), "status", timeout=_SECONDS))
        return _items([str(name) for name in answer.get("providers", ())], incomplete)
    return []


vm_option = click.option("--vm", "name", help="Which VM, if several are running.", shell_complete=vms)
"""Of commands whose words say something else."""


def _running() -> list[str]:
    with contextlib.suppress(VmbusError, OSError):
        return running_vms()
    return []
