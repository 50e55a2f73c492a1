"""Private Debian roots: which mirror, which files, and what happens when something goes wrong half-way."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import pace
from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.provision import sources
from vmbus.provision.apt import Apt, parse_print_uris
from vmbus.provision.cache import Cache
from vmbus.provision.programs import ProgramFailed, run_lines
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import InstalledPackage, RootRecipe, find_root, make_root
from vmbus.provision.sources import (
    Source,
    debian_mirrors,
    host_sources,
    host_suite,
    mirror_candidates,
    parse_deb822_style,
    parse_one_line_style,
)

ONE_LINE = """
# comment
deb http://mirror.example/debian bookworm main contrib # why not
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/linux/debian bookworm stable
deb [check-valid-until=no] http://mirror.example/old/ bookworm main
deb http://mirror.example/flat ./
#deb http://mirror.example/off bookworm main
"""

DEB822 = """# A comment
Types: deb deb-src
URIs: http://mirror.example/debian http://second.example/debian/
# in the middle of a stanza
Suites: trixie
 trixie-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
Check-Valid-Until: no

Types: deb
URIs: http://mirror.example/debian-security
Suites: trixie-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: trixie
Components: main

Types: deb-src
URIs: http://source.example/debian
Suites: trixie
Components: main

Types: deb
URIs: https://vendor.example/debian
Suites: trixie
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 xyz
"""


def test_one_line_style() -> None:
    assert parse_one_line_style(ONE_LINE) == [
        Source("http://mirror.example/debian", ("bookworm",), ("main", "contrib")),
        Source(
            "https://vendor.example/linux/debian",
            ("bookworm",),
            ("stable",),
            signed_by="/usr/share/keyrings/vendor.gpg",
        ),
        Source("http://mirror.example/old/", ("bookworm",), ("main",), check_valid_until=False),
        Source("http://mirror.example/flat", ("./",), ()),
    ]


def test_deb822_style() -> None:
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    suites = ("trixie", "trixie-updates")
    assert parse_deb822_style(DEB822) == [
        Source("http://mirror.example/debian", suites, ("main",), keyring, check_valid_until=False),
        Source("http://second.example/debian/", suites, ("main",), keyring, check_valid_until=False),
        Source("http://mirror.example/debian-security", ("trixie-security",), ("main",)),
        Source("https://vendor.example/debian", ("trixie",), ("main",)),
    ]


def test_mirrors_are_ranked_and_others_left_out() -> None:
    uris = [source.uri for source in debian_mirrors(parse_one_line_style(ONE_LINE))]
    assert uris == ["http://mirror.example/debian", "http://mirror.example/old/"]
    uris = [source.uri for source in debian_mirrors(parse_deb822_style(DEB822))]
    assert uris[:2] == ["http://mirror.example/debian", "http://second.example/debian/"]
    assert "http://mirror.example/debian-security" not in uris
    third = "deb [signed-by=/etc/keys/vendor.gpg] http://vendor.example/apt bookworm main\n"
    sources = parse_one_line_style(f"{third}deb http://mirror.example/debian bookworm main\n")
    assert next(source.uri for source in debian_mirrors(sources)) == "http://mirror.example/debian"


def test_both_forms_are_read_from_the_usual_places(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://one.example/debian bookworm main\n")
    (tmp_path / "sources.list.d/two.sources").write_text(
        "Types: deb\nURIs: http://two.example/debian\nSuites: bookworm\nComponents: main\n"
    )
    (tmp_path / "sources.list.d/three.list").write_text("deb http://three.example/debian bookworm main\n")
    (tmp_path / "sources.list.d/four.sources.disabled").write_text("Types: deb\nURIs: http://no.example/debian\n")
    found = [source.uri for source in host_sources(tmp_path)]
    assert found == ["http://one.example/debian", "http://three.example/debian", "http://two.example/debian"]


def test_explicit_mirror_wins(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://one.example/debian bookworm main\n")
    found = mirror_candidates({"VMBUS_DEBIAN_MIRROR": "http://mine.example/debian"}, tmp_path)
    assert [source.uri for source in found] == ["http://mine.example/debian"]
    assert [source.uri for source in mirror_candidates({}, tmp_path)] == ["http://one.example/debian"]


def test_no_archive_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://ubuntu.example/ubuntu noble main\n")
    with pytest.raises(EnvironmentProblem, match="VMBUS_DEBIAN_MIRROR"):
        mirror_candidates({}, tmp_path)


def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *archives: str) -> Path:
    """The apt configuration of a host with these archives, and with a keyring."""
    etc, keyring = tmp_path / "etc", tmp_path / "keyring.gpg"
    etc.mkdir()
    (etc / "sources.list").write_text("".join(f"deb {one} bookworm main\n" for one in archives))
    keyring.write_bytes(b"")
    monkeypatch.setattr("vmbus.provision.sources.KEYRINGS", (str(keyring),))
    monkeypatch.setattr("vmbus.provision.apt.require_programs", lambda: None)
    return etc


def test_only_the_suite_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt is asked for our suites at the host's mirror, with the archive's keyring as the only accepted signer."""
    etc = host(tmp_path, monkeypatch, "[trusted=yes check-valid-until=no] http://one.example/debian")
    keyring = tmp_path / "keyring.gpg"
    commands: list[list[str]] = []

    def run(argv: list[str], what: str, timeout: float, **_: object) -> list[str]:
        commands.append([str(part) for part in argv])
        return []

    monkeypatch.setattr("vmbus.provision.apt.run_lines", run)
    apt = Apt(Cache(tmp_path / "cache"), ("trixie", "trixie-backports"), sources=True, environment={}, etc_apt=etc)
    apt.update()
    apt.update()
    assert len(commands) == 1
    assert (apt.directory / "sources.list").read_text().splitlines() == [
        f"{kind} [signed-by={keyring} arch=amd64 check-valid-until=no] http://one.example/debian {suite} main"
        for suite in ("trixie", "trixie-backports")
        for kind in ("deb", "deb-src")
    ]
    settings = dict(part.split("=", 1) for part in commands[0] if re.match(r"[A-Za-z]\w*(::[\w-]+)*=", part))
    for name in ("Dir::State", "Dir::State::status", "Dir::Cache", "Dir::Etc::sourcelist"):
        assert settings[name].startswith(str(apt.directory)), name
    assert settings["APT::Get::AllowUnauthenticated"] == "false"


def test_second_archive_serves_when_the_first_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etc = host(tmp_path, monkeypatch, "http://one.example/debian", "http://two.example/debian")
    tried: list[str] = []
    reachable = {"http://two.example/debian"}

    def run(argv: list[str], what: str, timeout: float, **_: object) -> list[str]:
        uri = what.rsplit(" ", 1)[1]
        tried.append(uri)
        if uri not in reachable:
            raise ProgramFailed(f"{what} failed")
        return []

    monkeypatch.setattr("vmbus.provision.apt.run_lines", run)
    Apt(Cache(tmp_path / "cache"), ("trixie",), environment={}, etc_apt=etc).update()
    assert tried == ["http://one.example/debian", "http://two.example/debian"]
    reachable.clear()
    with pytest.raises(EnvironmentProblem, match=r"(?s)VMBUS_DEBIAN_MIRROR.*one\.example.*two\.example"):
        Apt(Cache(tmp_path / "cache"), ("trixie",), environment={}, etc_apt=etc).update()


def test_downloads_that_are_there_already_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption apt has some of the files and would list the others only."""
    monkeypatch.setattr(Apt, "update", lambda self: None)
    apt = Apt(Cache(tmp_path / "cache"), ("trixie",))
    apt.archives.mkdir(parents=True)
    (apt.archives / "a.deb").write_bytes(b"")

    def run(argv: list[str], what: str, timeout: float, *_: object, cwd: Path) -> list[str]:
        archives = next((part.partition("=")[2] for part in argv if part.startswith("Dir::Cache::archives=")), None)
        if "--print-uris" in argv:
            assert archives is not None
            present = {path.name for folder in (Path(archives), cwd) for path in folder.iterdir()}
            return [f"'http://m.example/{name}' {name} 1" for name in ("a.deb", "b.deb") if name not in present]
        assert archives is None
        assert cwd == apt.archives
        (apt.archives / "b.deb").write_bytes(b"")
        return []

    monkeypatch.setattr("vmbus.provision.apt.run_lines", run)
    assert [path.name for path in apt.install_closure(["thing"])] == ["a.deb", "b.deb"]


def test_fault_p1_only_debians_own_keyrings_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the host's apt trusts for an archive, and whatever that file is called."""
    official = tmp_path / "official.gpg"
    official.write_bytes(b"")
    monkeypatch.setattr("vmbus.provision.sources.KEYRINGS", (str(official),))
    for name in ("debian-evil.gpg", "debian-archive-keyring.gpg", "my-debian.asc"):
        key = tmp_path / name
        key.write_bytes(b"")
        (tmp_path / "sources.list").write_text(f"deb [signed-by={key}] https://mirror.test/debian trixie main\n")
        apt = Apt(Cache(tmp_path / "cache"), ("trixie",), environment={}, etc_apt=tmp_path)
        (source,) = sources.mirror_candidates({}, tmp_path)
        assert source.signed_by == str(key)
        apt._configure(source)
        lines = (apt.directory / "sources.list").read_text()
        assert f"signed-by={official}" in lines and name not in lines


def test_missing_keyring_is_one_line_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus.provision.sources.KEYRINGS", ("/nonexistent",))
    with pytest.raises(EnvironmentProblem, match="sudo apt-get install debian-archive-keyring"):
        sources.archive_keyring()


@pytest.mark.parametrize(
    ("text", "suite"),
    [
        ('ID=debian\nVERSION_CODENAME="trixie"\n', "trixie"),
        ("ID=debian\nVERSION_CODENAME=bookworm\n", "bookworm"),
        ("ID=ubuntu\nVERSION_CODENAME=noble\n", "bookworm"),
        ("", "bookworm"),
    ],
)
def test_host_suite(tmp_path: Path, text: str, suite: str) -> None:
    (tmp_path / "os-release").write_text(text)
    assert host_suite(tmp_path / "os-release") == suite
    assert host_suite(tmp_path / "absent") == "bookworm"


def test_print_uris() -> None:
    lines = [
        "Reading package lists...",
        "'http://mirror.example/debian/pool/a_1%253a2_amd64.deb' a_1%3a2_amd64.deb 1234 SHA256:00",
        "'http://mirror.example/debian/pool/b.orig.tar.xz' b.orig.tar.xz 99",
    ]
    assert parse_print_uris(lines) == [("a_1%3a2_amd64.deb", 1234), ("b.orig.tar.xz", 99)]


def test_failing_program_is_quoted() -> None:
    with pytest.raises(ProgramFailed, match=r"(?s)the job failed with status 3:.*E: broken"):
        run_lines(["sh", "-c", "echo first; echo 'E: broken' >&2; exit 3"], "the job", 30)


def test_hanging_program_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(WaitTimeout, match="the job"):
        run_lines([sys.executable, "-c", "import signal; signal.pause()"], "the job", 0.5)
    assert time.monotonic() - start < pace.seconds(10)


RECIPE = RootRecipe("thing", ("trixie",), ("a", "b"))


class FakeApt:
    """Hands out empty package files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0

    def install_closure(self, packages: tuple[str, ...], target_release: str | None = None) -> list[Path]:
        self.calls += 1
        self.folder.mkdir(exist_ok=True)
        debs = [self.folder / f"{name}_1_amd64.deb" for name in packages]
        for deb in debs:
            deb.write_bytes(b"")
        return debs


def test_root_is_made_once_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    apt = FakeApt(tmp_path / "debs")
    monkeypatch.setattr("vmbus.provision.roots.unpack", _fake_unpack)
    assert find_root(cache, RECIPE) is None
    root = make_root(cache, RECIPE, SilentReporter(), apt)  # type: ignore[arg-type]
    assert root.packages == {"a": "1", "b": "1"}
    assert (root.path / "usr/bin/a").exists()
    assert (root.path / "bin/a").exists()  # the merged layout
    assert make_root(cache, RECIPE, SilentReporter(), apt) == root  # type: ignore[arg-type]
    assert apt.calls == 1
    assert list(apt.folder.iterdir()) == []


def test_interrupted_unpacking_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    apt = FakeApt(tmp_path / "debs")

    def interrupted(debs: list[Path], target: Path, reporter: object = None) -> list[InstalledPackage]:
        (target / "usr/bin/rubbish").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("vmbus.provision.roots.unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_root(cache, RECIPE, SilentReporter(), apt)  # type: ignore[arg-type]
    assert find_root(cache, RECIPE) is None
    assert len(list(apt.folder.iterdir())) == 2  # the downloads are kept for the next run
    monkeypatch.setattr("vmbus.provision.roots.unpack", _fake_unpack)
    root = make_root(cache, RECIPE, SilentReporter(), apt)  # type: ignore[arg-type]
    assert sorted(path.name for path in (root.path / "usr/bin").iterdir()) == ["a", "b"]


def test_recipes_have_different_keys() -> None:
    others = [
        RootRecipe("thing", ("trixie",), ("a",)),
        RootRecipe("thing", ("bookworm",), ("a", "b")),
        RootRecipe("thing", ("trixie",), ("a", "b"), "trixie-backports"),
        RootRecipe("thing", ("trixie",), ("a", "b"), closure=False),
    ]
    assert len({recipe.key for recipe in (RECIPE, *others)}) == 5


def _fake_unpack(debs: list[Path], target: Path, reporter: object = None) -> list[InstalledPackage]:
    for deb in debs:
        (target / "usr/bin" / deb.name.split("_")[0]).write_text("")
    return [InstalledPackage(*deb.stem.split("_")) for deb in debs]


def test_no_mirror_or_registry_is_named_in_the_project() -> None:
    checkout = Path(__file__).parents[2]
    hosts = re.compile(
        rb"(?i)[\w-]+\.debian\.(?:org|net)|[\w.-]*pypi" + rb"\.(?:org|io)|python" + rb"hosted|[\w-]+\.ubuntu\.com"
        rb"|\bmirrors?\.(?!example\b)[a-z][\w-]*\.[a-z]+"
    )
    found = [
        f"{path.relative_to(checkout)}: {match[0].decode()}"
        for path in _project_files(checkout)
        for match in hosts.finditer(path.read_bytes())
    ]
    assert found == []


def _project_files(checkout: Path) -> list[Path]:
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=checkout,
            capture_output=True,
            check=True,
            timeout=30,
        ).stdout
        names = [name.decode() for name in listing.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive of the project
        names = [str(path.relative_to(checkout)) for path in checkout.rglob("*") if "__pycache__" not in path.parts]
    return [checkout / name for name in names if (checkout / name).is_file()]
