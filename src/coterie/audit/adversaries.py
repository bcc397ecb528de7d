"""Who attacks, and with what. Every finding names one of them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Adversary(StrEnum):
    """Who attacks a party, from the weakest to the strongest."""

    NETWORK = "network"
    HOST = "host"
    HOST_PUBLIC = "host_public"
    HOST_DOMAIN = "host_domain"
    ALL_HOSTS = "all_hosts"

    @property
    def label(self) -> str:
        """T0 to T4."""
        return f"T{list(Adversary).index(self)}"

    @property
    def sentence(self) -> str:
        """Who it is, for a person who reads the report."""
        return _SENTENCES[self]


DEFAULT = Adversary.HOST_PUBLIC
"""What every other party of a federation has: what it received, and the checkpoint that all started from."""

_SENTENCES = {
    Adversary.NETWORK: "Somebody on the wire, who sees encrypted frames: their sizes and who sends them to whom.",
    Adversary.HOST: "One other party that knows its own experts and what it received, and nothing of the rest of the "
    "model.",
    Adversary.HOST_PUBLIC: "One other party that also has the public starting checkpoint and public text.",
    Adversary.HOST_DOMAIN: "One other party that also has text of the same kind as the attacked party's, or knows "
    "some of its records.",
    Adversary.ALL_HOSTS: "All other parties together, with the public starting checkpoint and public text.",
}


def most_received(sizes: Mapping[str, int]) -> str:
    """The party that plays one host: whoever received most of the owner, the first by name among equals.

    Args:
        sizes: how much each other party received.
    """
    return min(sizes, key=lambda name: (-sizes[name], name))
