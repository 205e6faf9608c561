"""What `pyproject.toml` cannot say: a wheel carries the CPU's kernels compiled, where there is a C++ compiler.

An editable install does not: there they are compiled when first used, for the very processor.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "src"))

from ingle.kernels.cpu import compile


class BuildPy(build_py):
    """Modules and data files, then the kernels."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.build_kernels()

    def build_kernels(self) -> None:
        folder = self.kernels_folder()
        shutil.rmtree(folder, ignore_errors=True)  # of a build before this one
        try:
            for failure in compile.prebuild(folder):
                self.warn(f"no CPU kernels for {failure}")
        except compile.CompileError as error:
            self.warn(f"the package brings no CPU kernels: {error}")

    def kernels_folder(self) -> Path:
        return Path(self.build_lib, "ingle", *compile.PREBUILT.parts[-3:])


class BdistWheel(bdist_wheel):
    """For the platform that its kernels run on; for any if it has none. No Python version matters to them."""

    def run(self) -> None:
        self.run_command("build")
        if any(self.get_finalized_command("build_py").kernels_folder().glob("*.so")):
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
