"""Packaging. Metadata lives in pyproject.toml; this file only says where packages lie.

The Triton kernels are a top-level folder of the repository, so that they can be read on their
own, and install inside the package as ``hubpath_fast.kernels``: the plain name ``kernels``
belongs to another distribution.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["hubpath_fast", "hubpath_fast.*"]),
        "hubpath_fast.kernels",
    ],
    py_modules=["hubpath_command"],
    package_dir={"hubpath_fast.kernels": "kernels"},
    package_data={
        "hubpath_fast.compare": ["paper_tables.json"],
        "hubpath_fast.pretrained": ["card.md.jinja"],
        "hubpath_fast.report": ["page.html.jinja"],
    },
)
