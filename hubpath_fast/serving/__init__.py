"""A trained model as a package that runs without this one: ``export`` writes and proves it."""

from .errors import ExportError
from .exporting import Package, export, export_parts
from .package import read_package

__all__ = ["ExportError", "Package", "export", "export_parts", "read_package"]
