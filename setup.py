"""Builds the C++ extension; everything else is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("LLFAST_BUILD_JOBS").install()

setup(
    ext_modules=[
        Pybind11Extension(
            "llfast._native",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=17,
            extra_compile_args=[
                "-O3",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-fvisibility=hidden",
                "-ffp-contract=off",
            ],
            extra_link_args=["-pthread", "-ldl"],
        )
    ],
)
