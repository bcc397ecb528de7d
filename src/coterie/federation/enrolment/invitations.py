"""What the inviter remembers of its codes: whom each is for, until when, which key used it, and who has all it needs.

The file lies beside the CA's key, as closed as that, since a code is worth a certificate. It is written before an
answer leaves, so that a crash never gives one code to two keys.
"""

from __future__ import annotations

import datetime as dt
import json
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from coterie.errors import IdentityError
from coterie.federation.enrolment.codes import CodeKeys, new_secret
from coterie.storage import PRIVATE, check_keys, check_known, json_object, write_whole

INVITATIONS_FILE = "invitations.json"
FORMAT = "coterie-invitations-1"


@dataclass(frozen=True)
class Invitation:
    """One member's.

    Args:
        name: of the member.
        secret: of its code.
        expires: seconds since 1970; counts until the code is used.
        request: hex SHA-256 of the signing request that used it; empty: nobody did.
        certificate: PEM of what that got.
        left: whether the member has the roster that all signed.
    """

    name: str
    secret: str
    expires: float
    request: str = ""
    certificate: str = ""
    left: bool = False

    def expired(self, now: dt.datetime) -> bool:
        """Whether nobody can use it any more."""
        return not self.request and now.timestamp() >= self.expires


class Invitations:
    """All invitations to one agreement.

    Args:
        folder: the CA's.
        agreement: hash of federation.yaml.
        names: members that are invited.
        valid: how long a new code counts.
        now: today.

    Raises:
        IdentityError: the folder has invitations to another agreement, or what this version cannot read.
    """

    def __init__(
        self, folder: Path, agreement: str, names: Iterable[str], valid: dt.timedelta, now: dt.datetime
    ) -> None:
        self._path, self._agreement = folder / INVITATIONS_FILE, agreement
        self._lock = threading.Lock()
        known = self._read()
        by_member = {
            name: known[name]
            if name in known and not known[name].expired(now)
            else Invitation(name, new_secret(), (now + valid).timestamp())
            for name in names
        }
        self._names = {CodeKeys.of(each.secret).name: each.name for each in by_member.values()}
        self._by_member = self._written(by_member)

    def all(self) -> tuple[Invitation, ...]:
        """As they are now, in the order of the names."""
        with self._lock:
            return tuple(self._by_member.values())

    def by_code(self, name: str) -> Invitation | None:
        """The invitation whose code has this name (`CodeKeys.name`)."""
        with self._lock:
            return self._by_member[self._names[name]] if name in self._names else None

    def use(self, name: str, request: str, certificate: str) -> Invitation:
        """Write down that a request used the member's code; what stands there if one did already."""
        with self._lock:
            invitation = self._by_member[name]
            if not invitation.request:
                invitation = replace(invitation, request=request, certificate=certificate)
                self._by_member = self._written({**self._by_member, name: invitation})
            return invitation

    def leave(self, name: str) -> bool:
        """Write down that a member has all it needs; False where that stands there already."""
        with self._lock:
            invitation = self._by_member[name]
            if not invitation.left:
                self._by_member = self._written({**self._by_member, name: replace(invitation, left=True)})
            return not invitation.left

    def _read(self) -> dict[str, Invitation]:
        if not self._path.exists():
            return {}
        try:
            content = json_object(self._path.read_bytes())
            check_known(self._path, "format", content.get("format"), {FORMAT}, IdentityError)
            check_keys(self._path, "key", content, {"format", "agreement", "members"}, IdentityError)
            members = {str(each["name"]): Invitation(**each) for each in content["members"]}
            agreement = content["agreement"]
        except (ValueError, TypeError, KeyError) as error:
            raise IdentityError(
                f"{self._path} is not the list of invitations that `coterie invite` wrote.",
                code="identity-damaged",
                fix="put it back from a copy, or remove it and invite everybody anew: each then needs a new kit",
            ) from error
        if agreement != self._agreement:
            raise IdentityError(
                f"The invitations in {self._path} are to another federation.yaml.",
                code="invite-other-agreement",
                why="who joined by them agreed to other settings",
                fix="put back the federation.yaml that they are to, or name a new folder with --keys and invite anew",
            )
        return members

    def _written(self, by_member: dict[str, Invitation]) -> dict[str, Invitation]:
        """The same, once the file says so: what the disk did not take counts for nobody."""
        members = [asdict(each) for each in by_member.values()]
        content = {"format": FORMAT, "agreement": self._agreement, "members": members}
        write_whole(self._path, (json.dumps(content, indent=2) + "\n").encode(), PRIVATE)
        return by_member
