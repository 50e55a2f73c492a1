"""Which programs of the machine's the project starts: each is declared, so an empty Debian with those will do.

What a list of words or `shutil.which` names is found in the sources; what a guest runs is none of the machine's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
ESSENTIAL = {
    "apt-cache",
    "apt-get",
    "bash",
    "cat",
    "dpkg-deb",
    "dpkg-query",
    "mkdir",
    "nsenter",
    "sh",
    "sleep",
    "tar",
    "true",
    "unshare",
    "yes",
}
"""Of every Debian: packages that are marked essential, and apt, which installs."""
DECLARED = {
    "cc": "C compiler",
    "git": "git",
    "make": "`make`",
    "objcopy": "gcc",
    "openssl": "the command openssl, which is missing: install openssl",
    "qemu-img": "QEMU",
    "ssh": "openssh-client",
    "systemd-analyze": "systemd",  # tests go without, where it is not there
    "systemd-socket-activate": "systemd",
    "xz": "xz-utils",
    "zstd": "install the program zstd",
}
"""How the pages call it; or, where it may be missing, what is said then."""
_STARTS = r"\b(?:run|Popen|call|check_call|check_output|create_subprocess_exec|spawn|_run|run_lines|command_output)\("
WORDS = re.compile(
    rf'{_STARTS}\s*(?:[^()\[\]]*?,\s*)?\[\s*"(?P<listed>[^"]*)"|\b(?:which|create_subprocess_exec)\(\s*"(?P<named>[^"]*)"'
)


def words_of(source: str) -> Iterator[tuple[int, str]]:
    """Where a program is named, and its name."""
    for match in WORDS.finditer(source):
        yield match.start(), match["listed"] or match["named"] or ""


def found() -> dict[str, list[str]]:
    """Programs, and where they are started."""
    programs: dict[str, list[str]] = {}
    for folder in ("device", "bench", "scripts", "tests"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            source = path.read_text() if path != Path(__file__) else ""
            for at, word in words_of(source):
                where = f"{path.relative_to(CHECKOUT)}:{source.count(chr(10), 0, at) + 1}"
                programs.setdefault(word.removeprefix("/bin/"), []).append(where)
    return programs


def test_fault_n6_every_program_is_declared() -> None:
    programs = found()
    assert {"dpkg-deb", "git", "sh"} <= set(programs)  # so it does find them
    unknown = {
        word: places
        for word, places in programs.items()
        if re.fullmatch(r"[a-z][a-z0-9.+-]*", word) and word not in ESSENTIAL | set(DECLARED)
    }
    assert not unknown


def test_fault_n6_one_that_is_not_would_be_found() -> None:
    source = """subprocess.run(["ps", "-eo"], check=True); Child.spawn(
        "the list", ["ps"]); shutil.which("ps")"""
    assert [word for _, word in words_of(source)] == ["ps"] * 3 and "ps" not in ESSENTIAL | set(DECLARED)


def test_fault_n6_what_is_not_on_every_debian_is_said() -> None:
    places = (CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md"), *(CHECKOUT / "device").rglob("*.py"))
    said = "\n".join(path.read_text() for path in places)
    assert [word for word, text in DECLARED.items() if text not in said] == []


LIVENESS = re.compile(r"""/proc/\{[^}]*\}(/cmdline)?"\)\.exists\(\)|os\.kill\([^()]*, 0\)""")


def test_fault_n19_nobody_takes_a_process_that_is_there_for_one_that_lives() -> None:
    """A zombie is there as long as nobody reaps it: `support.processes.alive` looks at its state."""
    assert LIVENESS.search('assert not Path(f"/proc/{pid}").exists()')
    places = [
        f"{path.relative_to(CHECKOUT)}: {line.strip()}"
        for folder in ("device", "guest", "bench", "tests")
        for path in sorted((CHECKOUT / folder).rglob("*.py"))
        if path != Path(__file__)
        for line in path.read_text().splitlines()
        if LIVENESS.search(line) and "alive(" not in line
    ]
    assert places == []
