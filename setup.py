"""What is native, compiled for CPU if there is a compiler, and the README as PyPI shows it.

Everything else is in pyproject.toml.
"""

import os
import platform
import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

_FOLDER = "jaxquant/cpp"
_FLAGS = {  # of a source file; what it compiles runs only where the processor has these registers
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
}
_LOOPS = ("clusters",)  # whose loops the compiler is to make vectors of
_X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildNative(build_ext):
    """Each file with its own flags, side by side."""

    def build_extension(self, ext):
        """Compile and link; setuptools goes on without what fails, as it is optional."""
        import jaxlib  # of the build environment: it has XLA's headers

        include = Path(jaxlib.__file__).parent / "include"

        def compile_one(source):
            flags = _FLAGS.get(Path(source).stem, "").split() if _X86 else []
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[str(include)],
                extra_postargs=[
                    "-std=c++17",
                    "-O3" if Path(source).stem in _LOOPS else "-O2",
                    "-g0",
                    "-fvisibility=hidden",
                    "-w",
                    *flags,
                ],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [made for own in pool.map(compile_one, ext.sources) for made in own]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread"],
            target_lang="c++",
        )


class Source(sdist):
    """What a build needs. Setuptools adds tests named test_*, but not what they import."""

    def make_release_tree(self, base_dir, files):
        """Leave the tests out."""
        super().make_release_tree(base_dir, [x for x in files if not x.startswith("tests")])


def description():
    """Return the README with links to the files of this version: PyPI has the README alone."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    repository, version = project["urls"]["Repository"], project["version"]
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    text = Path("README.md").read_text()
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:)", rf"\g<1>{raw}/v{version}/", text)
    return re.sub(r"(?<=\]\()(?![a-z]+:|#)", f"{repository}/blob/v{version}/", text)


sources = ["avx512", "avx2", "plain", "product", "clusters", "pool", "ffi"]
native = Extension(
    "jaxquant.cpp._native",
    [f"{_FOLDER}/{name}.cpp" for name in sources],
    optional=True,
    py_limited_api=True,  # it uses none of Python, so one wheel serves all versions
)
setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative, "sdist": Source},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
