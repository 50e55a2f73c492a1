"""The virtual environment, the guest's files, and the scripts' first stage."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from support.debs import make_deb, script
from vmbus.errors import EnvironmentProblem
from vmbus.provision import archive, environment, guest_files
from vmbus.provision.archive import command_output, decompress_xz
from vmbus.provision.cache import Cache
from vmbus.provision.environment import environment_path, environment_python, find_pip, relocate
from vmbus.provision.guest_files import module_dependencies, module_name, unpack_kernel
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import Root, RootRecipe

CHECKOUT = Path(__file__).parents[2]


# --- the lock file ---------------------------------------------------------------------------------------------


def _locked() -> dict[str, str]:
    """Return for each pinned package what the lock file says about it."""
    text = (CHECKOUT / "requirements.lock").read_text()
    parts = re.split(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_pin_has_digests() -> None:
    locked = _locked()
    assert len(locked) > 10
    for name, text in locked.items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", text), name


def test_lock_file_covers_the_project() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].replace(".", "-").lower() for requirement in wanted}
    assert names <= set(_locked())


def test_lock_file_names_no_place() -> None:
    text = (CHECKOUT / "requirements.lock").read_text()
    assert not re.search(r"://|^\s*--?(i|index-url|extra-index-url|find-links|f)\b", text, re.MULTILINE)


# --- the environment -------------------------------------------------------------------------------------------


def test_environment_follows_the_lock_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    (tmp_path / "requirements.lock").write_text("a==1\n")
    first = environment_path(cache, tmp_path)
    assert environment_path(cache, tmp_path) == first
    (tmp_path / "requirements.lock").write_text("a==2\n")
    assert environment_path(cache, tmp_path) != first


def test_missing_lock_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"requirements\.lock"):
        environment_path(Cache(tmp_path), tmp_path)


def test_old_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "MINIMUM_PYTHON", (4, 0))
    with pytest.raises(EnvironmentProblem, match=r"Python 4\.0 or later is needed"):
        environment_path(Cache(tmp_path), CHECKOUT)


def test_environment_counts_only_when_complete(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("")
    cache = Cache(tmp_path / "cache")
    directory = environment_path(cache, tmp_path)
    (directory / "bin").mkdir(parents=True)
    python = directory / "bin/python"
    python.symlink_to(sys.executable)
    assert environment_python(cache, tmp_path) is None
    (directory / environment.STAMP).write_text("")
    assert environment_python(cache, tmp_path) == python
    python.unlink()
    python.symlink_to(tmp_path / "gone")  # the host's Python was removed
    assert environment_python(cache, tmp_path) is None


def test_scripts_of_a_renamed_environment_name_their_place(tmp_path: Path) -> None:
    partial, final = tmp_path / ".key.partial", tmp_path / "key"
    (partial / "bin").mkdir(parents=True)
    (partial / "bin/tool").write_text(f"#!{partial}/bin/python\nprint()\n")
    (partial / "bin/binary").write_bytes(b"\x7fELF\0" + str(partial).encode())
    (partial / "bin/python").symlink_to("/usr/bin/python3")
    relocate(partial, final)
    assert (partial / "bin/tool").read_text() == f"#!{final}/bin/python\nprint()\n"
    assert str(partial).encode() in (partial / "bin/binary").read_bytes()


def test_pip_comes_from_a_package_where_python_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "usr/share/python-wheels/pip-25.1.1-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"")
    asked: list[RootRecipe] = []

    def fake_root(cache: Cache, recipe: RootRecipe, reporter: object) -> Root:
        asked.append(recipe)
        return Root(tmp_path, {})

    monkeypatch.setattr(environment, "make_root", fake_root)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = find_pip(Cache(tmp_path / "cache"), Path("/nonexistent/python"), SilentReporter(), tmp_path)
    assert found == ["-I", str(wheel / "pip")]
    assert asked == [environment.PIP_RECIPE]


# --- the guest's files -----------------------------------------------------------------------------------------


def module(*needed: str) -> bytes:
    """Return bytes that look like a kernel module, as far as anybody looks."""
    return b"\x7fELF" + bytes(12) + b"\0license=GPL\0depends=" + ",".join(needed).encode() + b"\0name=x\0"


def test_module_names_and_dependencies() -> None:
    assert module_name("kernel/drivers/vfio/pci/vfio-pci.ko.xz") == "vfio_pci"
    assert module_name("vfio.ko") == "vfio"
    assert list(module_dependencies(module("vfio-pci-core", "irqbypass"))) == ["vfio_pci_core", "irqbypass"]
    assert list(module_dependencies(module())) == []


def test_kernel_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wanted modules come with what they depend on, before them; what is built in is left out."""
    lzma = pytest.importorskip("lzma")
    monkeypatch.setattr(guest_files, "MODULES", ("vfio-pci", "tun"))
    base = "usr/lib/modules/6.12.1-cloud/kernel/"
    deb = make_deb(
        tmp_path,
        "kernel",
        {
            "boot/vmlinuz-6.12.1-cloud": b"image",
            base + "vfio/vfio-pci.ko.xz": lzma.compress(module("vfio-pci-core", "vfio", "iommufd")),
            base + "vfio/vfio-pci-core.ko.xz": lzma.compress(module("vfio")),
            base + "vfio/vfio.ko.xz": lzma.compress(module()),
            base + "net/tun.ko": module(),
            base + "net/veth.ko": module(),
            base + "hv/hv_x.ko.xz": lzma.compress(module() + b"\0alias=vmbus:394f16571591784eab55382f3bd5422d\0"),
            "usr/lib/modules/6.12.1-cloud/modules.builtin": b"kernel/iommu/iommufd.ko\n",
        },
    )
    target = tmp_path / "out"
    target.mkdir()
    version, order, vmbus = unpack_kernel(deb, target)
    assert version == "6.12.1-cloud"
    assert list(order) == ["vfio", "vfio_pci_core", "vfio_pci", "tun"]
    assert order["vfio_pci"] == ("vfio_pci_core", "vfio")
    assert vmbus == {"hv_x": ["57164f39-9115-4e78-ab55-382f3bd5422d"]}, "of all modules, wanted or not"
    assert (target / "vmlinuz").read_bytes() == b"image"
    assert (target / "modules/vfio_pci_core.ko").read_bytes() == module("vfio")
    assert sorted(path.name for path in (target / "modules").iterdir()) == sorted(f"{name}.ko" for name in order)


def test_kernel_package_without_what_is_wanted(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(EnvironmentProblem, match="no kernel image"):
        unpack_kernel(make_deb(tmp_path, "a", {"usr/share/doc/x": b""}), target)
    with pytest.raises(EnvironmentProblem, match="no module irqbypass"):
        unpack_kernel(make_deb(tmp_path, "b", {"boot/vmlinuz-6": b""}), target)


def test_damaged_package_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(b"rubbish")
    with pytest.raises((EnvironmentProblem, tarfile.TarError)):
        unpack_kernel(tmp_path / "a.deb", tmp_path)


def test_xz_without_pythons_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = script(tmp_path / "unxz", "tr a-z A-Z")
    monkeypatch.setattr(archive, "lzma", None)
    assert decompress_xz(b"abc", [("/nonexistent",), (str(tool),)]) == b"ABC"
    with pytest.raises(EnvironmentProblem, match="apt-get install -y xz-utils"):
        decompress_xz(b"abc", [("/nonexistent",)])


def test_command_output_reports_failure_and_allows_leaving_early() -> None:
    with (
        pytest.raises(EnvironmentProblem, match="the job failed with status 4: bad"),
        command_output(["sh", "-c", "echo x; echo bad >&2; exit 4"], "the job") as stream,
    ):
        assert stream.read() == b"x\n"
    with command_output(["yes"], "the job") as stream:
        assert stream.read(2) == b"y\n"


# --- the scripts -----------------------------------------------------------------------------------------------


def test_first_stage_needs_the_standard_library_only() -> None:
    """`-S` takes away every installed package."""
    script = CHECKOUT / "scripts/setup"
    result = subprocess.run(
        [sys.executable, "-S", str(script), "--help"], capture_output=True, text=True, timeout=60, env=_bare()
    )
    assert result.returncode == 0, result.stderr
    assert "Set up everything" in result.stdout
    assert os.access(script, os.X_OK)


def test_set_up_modules_need_the_standard_library_only() -> None:
    folder = CHECKOUT / "device/vmbus/provision"
    names = [
        f"vmbus.provision.{path.stem}" for path in folder.glob("*.py") if path.stem not in ("__main__", "__init__")
    ]
    program = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    environment = {**_bare(), "PYTHONPATH": os.pathsep.join((str(CHECKOUT / "device"), str(CHECKOUT / "guest")))}
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, *names, "vmbus_guest.image"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert result.returncode == 0, result.stderr


def test_missing_lock_file_ends_the_scripts_with_a_message(tmp_path: Path) -> None:
    """A checkout without its lock file: one line that says so, and no traceback."""
    for name in ("device", "guest"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    (tmp_path / "scripts").mkdir()
    for name in ("setup", "_run", "_env.py"):
        (tmp_path / "scripts" / name).write_bytes((CHECKOUT / "scripts" / name).read_bytes())
    for arguments in (["setup"], ["_run", "run-vm"]):
        result = subprocess.run(
            [sys.executable, str(tmp_path / "scripts" / arguments[0]), *arguments[1:]],
            capture_output=True,
            text=True,
            timeout=60,
            env={**_bare(), "VMBUS_CACHE": str(tmp_path / "cache")},
        )
        assert result.returncode == 10
        assert result.stderr.startswith("set-up: cannot read")
        assert "Traceback" not in result.stderr


def _bare() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
