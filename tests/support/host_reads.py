"""What reads values of tensors on the host, for which a GPU would have to wait."""

import contextlib

import torch


@contextlib.contextmanager
def host_reads():
    """The list of calls that read values of tensors on the host."""
    found, originals = [], {}

    def spy(name, original):
        def read(tensor, *args, **kwargs):
            found.append(name)
            return original(tensor, *args, **kwargs)

        return read

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__",
                 "__index__", "__array__", "unique", "masked_select"):  # fmt: skip
        originals[name] = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, spy(name, originals[name]))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
