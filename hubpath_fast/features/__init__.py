"""Features of a hub's models, computed once for every image and kept in a folder, the shelf."""

from .shelf import Shelf, ShelfModel, ShelfRecord
from .write import write_shelf

__all__ = ["Shelf", "ShelfModel", "ShelfRecord", "write_shelf"]
