"""The wheel's build: the native core is compiled into it. Without a compiler or Python's headers the wheel is pure."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _build(root: Path) -> ModuleType:
    """`vmbus.native.build`, without the rest of the package."""
    spec = importlib.util.spec_from_file_location("vmbus_native_build", root / "device/vmbus/native/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeCore(BuildHookInterface):
    """A custom build hook of hatchling's."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and add the file to the wheel. Raises BuildError with what the compiler said."""
        if version == "editable":
            return  # the checkout's own: set-up builds that into the cache
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        include = Path(sysconfig.get_path("include"))
        if compiler is None or not (include / "Python.h").exists():
            self.app.display_warning("without a C compiler or Python's headers: a wheel without the native core")
            return
        build = _build(Path(self.root))
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name, build.FILE_NAME)
        build.compile_core(compiler, [include], file)
        build_data["force_include"][str(file)] = f"vmbus/native/{build.FILE_NAME}"
        build_data["pure_python"] = False
        build_data["tag"] = "cp311-abi3-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The file is in the wheel."""
        folder = getattr(self, "_folder", None)
        if folder is not None:
            folder.cleanup()
