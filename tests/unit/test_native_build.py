"""The native core as a file: chosen, built, packed, and broken on purpose."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from support.twins import core
from vmbus import native
from vmbus.errors import EnvironmentProblem
from vmbus.native import build
from vmbus.provision import native as provision_native
from vmbus.provision.cache import Cache
from vmbus.provision.libvfio_user import find_compiler
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import Root
from vmbus_guest import image

pytestmark = [
    pytest.mark.unit,
    pytest.mark.long,
    pytest.mark.skipif(core is None, reason="no C compiler for the native core"),
]

CHECKOUT = Path(__file__).resolve().parents[2]
WHICH = "import vmbus.ring as r, vmbus.ring.fence, vmbus.native.choice as c; print(c.CORE, r.RingReader.__module__)"

# ---- the choice ----------------------------------------------------------------------------------------------------


def run(*argv: str, timeout: float = 60, **environment: str) -> tuple[int, str]:
    """A Python of this environment with these variables; its status, and what it said."""
    done = subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": "device:guest:tests", **environment},
    )
    return done.returncode, done.stdout + done.stderr


def placed(cache: Path, file: Path | None = None) -> Mapping[str, str]:
    """A cache that has this file for the native core, by default the one in use."""
    folder = cache / "native" / build.key()
    folder.mkdir(parents=True)
    shutil.copyfile(core.__file__ if file is None else file, folder / build.FILE_NAME)
    return {"VMBUS_CACHE": str(cache)}


def test_the_setting_decides(tmp_path: Path) -> None:
    there = placed(tmp_path / "there")
    assert run("-c", WHICH, **there, VMBUS_CORE="") == (0, "native vmbus.native._core\n")
    assert run("-c", WHICH, **there, VMBUS_CORE="native") == (0, "native vmbus.native._core\n")
    assert run("-c", WHICH, **there, VMBUS_CORE="pure") == (0, "pure (VMBUS_CORE is pure) vmbus.ring.pure\n")
    empty = {"VMBUS_CACHE": str(tmp_path / "empty")}
    assert run("-c", WHICH, **empty, VMBUS_CORE="") == (
        0,
        "pure (it was not built for these sources) vmbus.ring.pure\n",
    )
    code, text = run("-c", WHICH, **empty, VMBUS_CORE="native")
    assert code == 1
    assert "the native core cannot be loaded: it was not built for these sources; run scripts/setup, or unset" in text
    code, text = run("-c", WHICH, **there, VMBUS_CORE="C")
    assert code == 1 and "VMBUS_CORE is 'C': set it to native or pure" in text


def test_a_file_that_cannot_be_loaded_is_passed_over_or_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no library\n")
    spoilt = placed(tmp_path / "spoilt", tmp_path / "file")
    code, text = run("-c", WHICH, **spoilt, VMBUS_CORE="")
    assert code == 0 and text.startswith("pure (") and text.endswith(" vmbus.ring.pure\n")
    code, text = run("-c", WHICH, **spoilt, VMBUS_CORE="native")
    assert code == 1 and "the native core cannot be loaded" in text


# ---- set-up --------------------------------------------------------------------------------------------------------


def test_set_up_builds_it_once_for_these_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    assert not provision_native.settled(cache, {})
    with cache.lock():
        file = provision_native.find(cache, environment={})
    assert file == tmp_path / "native" / build.key() / build.FILE_NAME and file.exists()
    assert provision_native.settled(cache, {"VMBUS_CORE": "native"}) and native.find(tmp_path) == file
    monkeypatch.setattr(build, "compile_core", None)
    assert provision_native.find(cache, environment={}) == file
    assert provision_native.find(cache, environment={"VMBUS_CORE": "pure"}) is None
    monkeypatch.setattr(build, "OPTIONS", (*build.OPTIONS, "-O3"))
    assert not provision_native.settled(cache, {}), "other options make another file"


def test_every_source_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(tmp_path)
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    keys = {build.key()}
    for path in build.sources():
        path.write_text(path.read_text() + "\n")
        keys.add(build.key())
    assert len(keys) == len(build.sources()) + 1 >= 6


def test_without_a_compiler_it_is_pure_unless_native_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    cache = Cache(tmp_path / "cache")
    assert provision_native.settled(cache, {})
    assert provision_native.find(cache, environment={}) is None
    assert not provision_native.settled(cache, {"VMBUS_CORE": "native"})
    with pytest.raises(EnvironmentProblem, match="apt-get install -y gcc"):
        provision_native.find(cache, environment={"VMBUS_CORE": "native"})


def test_a_failed_build_says_how_to_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(tmp_path)
    (tmp_path / "ring.c").write_text("#error of the test\n")
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(EnvironmentProblem, match=r"(?s)VMBUS_CORE=pure to go without it.*of the test"):
        provision_native.find(cache, environment={})
    assert native.find(cache.root) is None


def test_headers_come_from_a_package_where_python_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert provision_native.python_headers(Cache(tmp_path), SilentReporter()) == [tmp_path]
    (tmp_path / "Python.h").unlink()
    asked = []
    monkeypatch.setattr(
        provision_native, "make_root", lambda _, recipe, __: asked.append(recipe) or Root(tmp_path / "root", {})
    )
    folders = provision_native.python_headers(Cache(tmp_path), SilentReporter())
    assert folders[0] == tmp_path / "root/usr/include/python3.13"
    assert [recipe.packages for recipe in asked] == [("libpython3.13-dev",)]


# ---- the guest's image and the wheel -------------------------------------------------------------------------------


def test_the_guest_gets_it_if_it_can_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here(Root):
        def program(self, name: str) -> list[str]:
            return [sys.executable]

    notes: list[str] = []
    reporter = SilentReporter()
    monkeypatch.setattr(SilentReporter, "note", lambda _, text: notes.append(text))
    file = Path(core.__file__)
    (entry,) = image._native_core(Here(tmp_path, {}), file, reporter)
    assert (entry.name, entry.data) == ("usr/lib/vmbus/vmbus/native/_core.abi3.so", file.read_bytes())
    (tmp_path / "other").write_text("another machine's")
    assert not list(image._native_core(Here(tmp_path, {}), tmp_path / "other", reporter))
    assert len(notes) == 1 and "the guest goes without the native core" in notes[0]
    assert not list(image._native_core(Here(tmp_path, {}), None, reporter))


def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The wheel's build hook, without hatchling, which only builds of wheels have."""

    class BuildHookInterface:
        root = str(CHECKOUT)
        warnings: list[str] = []  # noqa: RUF012
        app = SimpleNamespace(display_warning=warnings.append)

    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = BuildHookInterface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build_of_the_test", CHECKOUT / "scripts" / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NativeCore()


def test_the_wheel_has_it_and_is_pure_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *more = headers()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(folder))
    monkeypatch.setenv("C_INCLUDE_PATH", os.pathsep.join(map(str, more)))
    one = hook(monkeypatch)
    data: dict[str, Any] = {"force_include": {}}
    one.initialize("standard", data)
    ((file, name),) = data["force_include"].items()
    assert name == "vmbus/native/_core.abi3.so" and Path(file).read_bytes().startswith(b"\x7fELF")
    assert data["tag"].startswith("cp311-abi3-linux_") and data["pure_python"] is False
    one.finalize("standard", data, "")
    assert not Path(file).exists()
    for version, path in (("editable", os.environ["PATH"]), ("standard", str(tmp_path))):
        monkeypatch.setenv("PATH", path)
        data = {"force_include": {}}
        one.initialize(version, data)
        assert data == {"force_include": {}}
        one.finalize(version, data, "")
    assert len(one.warnings) == 1


# ---- broken on purpose ---------------------------------------------------------------------------------------------


def copy(folder: Path) -> None:
    for path in build.sources():
        shutil.copyfile(path, folder / path.name)


def headers() -> list[Path]:
    with Cache().lock():
        return provision_native.python_headers(Cache(), SilentReporter())


def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, str], *options: str) -> dict[str, str]:
    """The environment for a process with a native core whose sources have these changes, built with these options."""
    copy(tmp_path)
    for old, new in changes.items():
        texts = {path: path.read_text() for path in tmp_path.glob("*.c")}
        assert sum(text.count(old) for text in texts.values()) == 1, old
        for path, text in texts.items():
            path.write_text(text.replace(old, new))
    with monkeypatch.context() as patch:
        patch.setattr(build, "_FOLDER", tmp_path)
        # What is tried once need not be quick; a sanitizer's options may say otherwise.
        build.compile_core(find_compiler(), headers(), tmp_path / "made.so", ("-Wno-error", "-O0", *options))
    return {**placed(tmp_path / "cache", tmp_path / "made.so"), "VMBUS_CORE": "native"}


def run_tests(environment: Mapping[str, str], *which: str) -> tuple[int, str]:
    # One and the same draw each time: what finds a fault now finds it on any other day.
    quiet = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "--capture=no")
    argv = ("-m", "pytest", *quiet, "--hypothesis-seed=1", *which)
    return run(*argv, timeout=280, **environment)


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"return mark(span->pieces, offset, length);": "return 0;"}, "log_that_starts"),
        ({"return mark(span->pieces, offset, sizeof value);": "return 0;"}, "log_that_starts"),
        ({"    let_go((Pieces *)self);\n    return ref": "    return ref"}, "after_revocation and unmap"),
        ({"self->count = 0;\n    for": "for"}, "nothing_is_held and commit"),
        ({"Py_VISIT(self->memory);": ""}, "collected_together"),
        (
            # Looked at before the copy, and again in it: either is enough here, where nothing changes in between.
            {
                "*claimed = packet_first_size(data, size);": "*claimed = 0;",
                "if (hint > length && hint <= available)": "if (hint < 0)",
            },
            "any_steps_of and native",
        ),
    ],
    ids=["write not logged", "store not logged", "not released", "used after release", "not collected", "claim"],
)
def test_sabotage_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], which: str
) -> None:
    environment = made(tmp_path, monkeypatch, changes)
    code, text = run_tests(environment, "tests/unit/test_pure_and_native.py", "tests/unit/test_ring.py", "-k", which)
    assert code not in (0, 2, 3, 4, 5), text


@pytest.mark.parametrize(
    ("changes", "file", "which"),
    [
        (
            {"PyDict_Size(flow->outstanding) + flow->waiting >= flow->most || ": ""},
            "backpressure",
            "quota or no_longer",
        ),
        ({"    flow->held_bytes -= self->size;\n": ""}, "backpressure", "books"),
        ({"        if (!flow->active)\n            break;\n": ""}, "exactly_once", "stops_the_channel"),
        ({" || PyThread_get_thread_ident() != flow->thread": ""}, "from_any_thread", "completions_once_each"),
        ({"        flow->at = ++at;\n": "        ++at;\n"}, "exactly_once", "one_by_one"),
        ({"    flow->next_transaction++;\n": ""}, "kmcl", "transaction or order"),
        ({" || (written && region->buffer.readonly)": ""}, "pure_and_native_reach", "read_only"),
        ({" || part > region->end - address": ""}, "pure_and_native_reach", "inside_of_a_page"),
        ({"    let_go((Reach *)self);\n    return ref": "    return ref"}, "pure_and_native_reach", "taken_back"),
    ],
    ids=[
        *("no limit", "bytes kept", "on after a pause", "any thread", "cursor stands", "one id for all"),
        *("read-only memory", "beyond a region", "within reach for ever"),
    ],
)
def test_sabotage_of_the_flow_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], file: str, which: str
) -> None:
    environment = made(tmp_path, monkeypatch, changes)
    code, text = run_tests(environment, f"tests/unit/test_{file}.py", "-k", which)
    assert code not in (0, 2, 3, 4, 5), text


SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
SANITIZED: dict[str, str] = {}
"""The environment with the sanitizers' core: built once."""


def sanitized(environment: Mapping[str, str]) -> dict[str, str]:
    runtime = subprocess.check_output([find_compiler(), "-print-file-name=libasan.so"], text=True, timeout=60)
    return {
        **environment,
        "LD_PRELOAD": str(Path(runtime.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # each of our blocks is one of the sanitizer's
    }


@pytest.mark.parametrize(
    ("names", "which"),
    [
        (("pure_and_native", "pure_and_native_reach", "ring", "wire"), "pure_and_native and not pure]"),
        # What runs owners' callbacks from C: they may close the channel, raise, or be on another thread.
        (("kmcl", "exactly_once", "backpressure", "from_any_thread"), "not thousand"),
    ],
    ids=["rings", "channels"],
)
def test_sanitizers_find_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], which: str
) -> None:
    if not SANITIZED:
        SANITIZED.update(sanitized(made(tmp_path_factory.mktemp("sanitized"), monkeypatch, {}, *SANITIZERS)))
    code, text = run_tests(SANITIZED, *(f"tests/unit/test_{name}.py" for name in names), "-k", which)
    assert code == 0 and " passed" in text, text


def test_sanitizers_would_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: a staging buffer that does not grow."""
    changes = {"    while (room < needed)\n        room *= 2;\n": ""}
    environment = sanitized(made(tmp_path, monkeypatch, changes, *SANITIZERS))
    code, text = run_tests(environment, "tests/unit/test_ring.py", "-k", "wraps and native")
    assert code != 0 and "heap-buffer-overflow" in text, text
