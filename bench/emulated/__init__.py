"""A GPU's part on a CPU: what runs here is what a GPU would be given, and it is watched."""
