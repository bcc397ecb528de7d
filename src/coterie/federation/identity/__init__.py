"""Who is who: keys, certificates and the list that all sign.

`coterie.federation.identity.certificates` makes keys and the private CA, `coterie.federation.identity.kit` is a
member's folder, `coterie.federation.identity.roster` the signed list, `coterie.federation.identity.provision` all of
it at one administrator's; `coterie.federation.identity.letters` are how a roster or a code is read out by telephone;
`coterie.federation.identity.agreed` is what federation.yaml means for a roster;
`coterie.federation.identity.identify` compares them when a process starts.
`coterie.federation.identity.signing` is a party's word on the wire.
"""

from importlib import import_module
from typing import Any

_HERE = ("Authority", "Member", "Role", "cert_pem", "key_pem", "new_authority", "new_key")


def __getattr__(name: str) -> Any:
    if name not in _HERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("coterie.federation.identity.certificates"), name)
