"""Tensors' names as a network has them, from files of networks that lay in something else.

DataParallel, torch.compile, Lightning, mmlab and classes of users' own put a prefix before every
name. The prefix is found by the network's own names: it is the one behind which all of them are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor

from .errors import HubError

# Of torch.compile, FSDP and activation checkpointing, which may wrap any module inside a network.
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
NAMES_IN_MESSAGE = 8


def strip_prefix(
    state: Mapping[str, Tensor],
    body: Collection[str],
    layout_prefix: str = "",
    wanted: str | None = None,
    source: str = "",
) -> dict[str, Tensor]:
    """The tensors of one network of a file, under its own names.

    Args:
        state: all tensors of the file.
        body: the network's names, head and counters of BatchNorm aside.
        layout_prefix: which the network's source puts before each name, and which stays.
        wanted: the prefix, where a user says it; None: it is found.
        source: the file, for messages.

    Returns:
        The tensors behind the prefix; what the file holds beside it belongs to something else. All
        of them, where the names need no change, or none of the network's are behind any prefix: the
        loading says then what does not fit.

    Raises:
        HubError: nothing begins with ``wanted``; or the network is behind several prefixes.
    """
    plain = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if wanted is not None:
        prefix = WRAPPERS.sub("", wanted.rstrip(".") + ".")
        if not any(name.startswith(prefix) for name in plain):
            raise HubError(
                f"{source} has no tensors whose names begin with {prefix!r}; they begin with "
                f"{_beginnings(plain)}"
            )
        return _behind(plain, prefix, layout_prefix)
    counts = Counter(
        name[:start]
        for name in plain
        for start in (0, *(match.end() for match in re.finditer(r"\.", name)))
        if name[start:] in body
    )
    whole = [prefix for prefix, count in counts.items() if count == len(body)]
    if "" in whole or layout_prefix in whole:
        return plain
    if len(whole) > 1:
        raise HubError(
            f"{source} holds several networks of this kind, behind the prefixes "
            f"{', '.join(sorted(whole))}; say which with prefix=, as in "
            f"file/PATH?arch=NAME&prefix={sorted(whole)[0]}"
        )
    [(best, count)] = counts.most_common(1) or [("", 0)]
    if best not in ("", layout_prefix) and 2 * count > len(body):
        return _behind(plain, best, layout_prefix)
    # A file of older names, which the network's library changes: a first part that all names share
    # and the network does not have.
    own = {name.partition(".")[0] for name in body}
    firsts = {name.partition(".")[0] for name in plain}
    while len(firsts) == 1 and not firsts & own and not layout_prefix:
        rest = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
        if "" in rest:
            break
        plain, firsts = rest, {name.partition(".")[0] for name in rest}
    return plain


def _behind(state: Mapping[str, Tensor], prefix: str, layout_prefix: str) -> dict[str, Tensor]:
    return {
        layout_prefix + name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _beginnings(names: Collection[str]) -> str:
    firsts = list(dict.fromkeys(name.partition(".")[0] + "." for name in names))
    more = ", ..." if len(firsts) > NAMES_IN_MESSAGE else ""
    return ", ".join(firsts[:NAMES_IN_MESSAGE]) + more
