"""The browser for tests: which is taken, which is refused and in which words, and what its private root consists of."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.debs import make_deb, script
from vmbus.errors import EnvironmentProblem
from vmbus.provision import chromium
from vmbus.provision.cache import Cache
from vmbus.provision.chromium import find_chromium, font_settings, make_chromium, query, recipe
from vmbus.provision.programs import ProgramFailed
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import find_root


def fake(path: Path, says: str = "Chromium 150.0.7871.100 built on Debian", status: int = 0) -> Path:
    """Write a program that answers like Chromium."""
    return script(path, f"echo '{says}'\nexit {status}")


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("Chromium 150.0.7871.100 built on Debian GNU/Linux 12 (bookworm)", 150),
        ("Google Chrome 131.0.6778.85 ", 131),
        ("Google Chrome for Testing 140.0.7339.82", 140),
        ("HeadlessChrome 150.0.7871.100", 150),
    ],
)
def test_versions(tmp_path: Path, says: str, version: int) -> None:
    assert query(fake(tmp_path / "c", says), "a test").version == version


@pytest.mark.parametrize(
    ("says", "status", "message"),
    [
        ("Chromium 90.0.1 x", 0, "is Chromium 90; 112 or later is needed"),
        ("GNU bash 5.2", 0, "is no Chromium that runs here"),
        ("Chromium 150.0.1", 1, r"is no Chromium that runs here \(status 1\)"),
    ],
)
def test_an_explicit_program_that_does_not_qualify_is_not_replaced(
    tmp_path: Path, says: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chromium, "make_chromium", lambda *_: pytest.fail("something else was fetched"))
    program = fake(tmp_path / "c", says, status)
    with pytest.raises(EnvironmentProblem, match=f"VMBUS_CHROMIUM cannot be used: .*{message}.*; unset it"):
        find_chromium(Cache(tmp_path / "cache"), environment={"VMBUS_CHROMIUM": str(program), "PATH": ""})


def test_an_explicit_program(tmp_path: Path) -> None:
    program = fake(tmp_path / "c")
    found = find_chromium(Cache(tmp_path / "cache"), environment={"VMBUS_CHROMIUM": str(program), "PATH": ""})
    assert (found.path, found.source, dict(found.environment)) == (program, "VMBUS_CHROMIUM", {})
    with pytest.raises(EnvironmentProblem, match="cannot be started"):
        find_chromium(Cache(tmp_path / "cache"), environment={"VMBUS_CHROMIUM": str(tmp_path / "none")})


def test_one_on_the_path_is_taken_unless_it_is_a_snap(tmp_path: Path) -> None:
    fake(tmp_path / "bin" / "chromium-browser").write_text("#!/bin/sh\nexec /snap/bin/chromium\n")
    fake(tmp_path / "bin" / "chromium", "Chromium 80.0.1")
    wanted = fake(tmp_path / "bin" / "google-chrome", "Google Chrome 131.0.1")
    found = find_chromium(Cache(tmp_path / "cache"), environment={"PATH": str(tmp_path / "bin")})
    assert (found.path, found.source) == (wanted, "PATH")


def deb(folder: Path, name: str, file: str) -> Path:
    """A package of one program."""
    return make_deb(folder, name, {f"{file}*": "#!/bin/sh\necho Chromium 150.0.1\n"})


class Archive:
    """Stands for apt with an archive of our own packages: the real one needs a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[list[str]] = []

    def update(self) -> None:
        pass

    def depends(self, package: str) -> list[str]:
        assert package == "chromium-headless-shell"
        return ["libc6", "libnss3", "<something-virtual>", "chromium-common"]

    def install_closure(self, packages: list[str]) -> list[Path]:
        self.asked.append(list(packages))
        return [
            deb(self.folder, "libc6", "usr/lib/x86_64-linux-gnu/libc.so.6"),
            deb(self.folder, "libnss3", "usr/lib/x86_64-linux-gnu/libnss3.so"),
        ]

    def download(self, packages: list[str]) -> list[Path]:
        self.asked.append(list(packages))
        return [
            deb(self.folder, "chromium-headless-shell", chromium.PROGRAM),
            deb(self.folder, "chromium-common", "usr/share/common"),
        ]


def test_the_private_root(tmp_path: Path) -> None:
    cache, archive = Cache(tmp_path / "cache"), Archive(tmp_path)
    with cache.lock():
        root = make_chromium(cache, SilentReporter(), archive)  # type: ignore[arg-type]
    assert archive.asked == [["libc6", "libnss3"], [*chromium.BROWSER, *chromium.FONTS]]
    assert (root.path / "usr/lib/x86_64-linux-gnu/libnss3.so").exists()
    assert not (root.path / "usr/lib/x86_64-linux-gnu/libc.so.6").exists(), "it belongs to the host's loader"
    assert set(root.packages) == {"libnss3", *chromium.BROWSER}
    found = find_chromium(cache, environment={"PATH": ""})
    assert found.path == root.path / chromium.PROGRAM and found.version == 150
    assert found.source == "Debian package chromium-headless-shell 1.0"
    assert found.environment["LD_LIBRARY_PATH"].startswith(f"{root.path}/usr/lib/x86_64-linux-gnu:")
    assert Path(found.environment["FONTCONFIG_FILE"]).read_text() == font_settings(root.path)
    assert list(tmp_path.glob("*.deb")) == [], "packages that were unpacked are removed"


def test_an_interrupted_set_up_leaves_nothing_that_is_taken_for_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise ProgramFailed("no space left")

    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr(chromium, "write_record", interrupted)
    with cache.lock(), pytest.raises(ProgramFailed):
        make_chromium(cache, SilentReporter(), Archive(tmp_path))  # type: ignore[arg-type]
    assert find_root(cache, recipe()) is None
    assert list(cache.path("root").iterdir()) == []


def test_each_suite_has_a_root_of_its_own() -> None:
    assert recipe("bookworm").key != recipe("trixie").key


def test_font_settings_name_the_roots_fonts_only() -> None:
    tree = ElementTree.fromstring(font_settings(Path("/a <strange> & path")))
    assert [one.text for one in tree.findall("dir")] == ["/a <strange> & path/usr/share/fonts"]
    assert {one.findtext("family") for one in tree.findall("alias")} == {"system-ui", "sans-serif", "monospace"}
