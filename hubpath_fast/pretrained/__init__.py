"""Models that are saved for others, and opened anywhere: from a folder, or the Hugging Face Hub."""

from .load import from_pretrained, load_expert
from .save import save_model
from .saved import SavedHub

__all__ = ["SavedHub", "from_pretrained", "load_expert", "save_model"]
