"""Whether a party could start: everything that can be checked before anybody else is there, and who can be reached.

Each check is one finding, good or bad, and a bad one does not keep the others from being made. Nothing is sent: the
starting weights are read through once, endpoints are tried by a TLS handshake.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from coterie.config import FederationConfig, PartyConfig, load_yaml
from coterie.config.federation import check_devices, party_privacy
from coterie.dp.accounting.ledger import default_root
from coterie.dp.private_data import PrivateData
from coterie.errors import CoterieError, IdentityError, LedgerError
from coterie.federation.identity.certificates import COORDINATOR, Role
from coterie.federation.identity.identify import identify
from coterie.federation.identity.kit import Kit, load_kit
from coterie.federation.identity.roster import Roster, verify
from coterie.federation.rounds.run_folder import is_running
from coterie.federation.wire import newcomers, unreachable
from coterie.federation.wire.base_transport import ALL_LANES
from coterie.models.preconditioner import is_factor
from coterie.models.split.placement import Placement
from coterie.models.split.shards import stored_shapes
from coterie.models.split.splitter import trunk_shapes
from coterie.models.zoo.build import build_model, check_keys
from coterie.ranks.world import check_enough_gpus
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import get_tokenizer, tokenize
from coterie.training.party.inputs import PrivacyInputs, party_plan
from coterie.training.party.process import (
    check_compared,
    check_coordinates,
    check_experts_over,
    check_placement_signed,
    check_shard,
    check_starting_weights,
)
from coterie.training.provenance import artefacts
from coterie.training.single.setup import check_fit, pick_device

_CLOCK_SLACK = dt.timedelta(minutes=5)


@dataclass(frozen=True)
class Diagnosis:
    """What one check found.

    Attributes:
        check: what was looked at.
        state: ``ok``, ``note`` (nothing to mend yet) or ``bad`` (`coterie up` would fail, now or soon).
        found: one sentence.
        fix: what to do about it; empty where nothing is wrong.
        code: of the error, as `coterie explain` knows it; empty where nothing is wrong.
    """

    check: str
    state: str
    found: str
    fix: str = ""
    code: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def diagnose(settings: Path, *, listen: str | None = None, now: dt.datetime | None = None) -> list[Diagnosis]:
    """All findings about the party of a party.yaml.

    Args:
        settings: the party.yaml; it names the federation.yaml.
        listen: address to listen on, where it differs from the agreed endpoint.
        now: for tests.

    Raises:
        ConfigError: one of the two settings files cannot be read; without them there is nothing to look at.
    """
    config = load_yaml(settings, PartyConfig)
    federation = load_yaml(config.federation, FederationConfig)
    return list(_Examination(config, federation, listen, now or dt.datetime.now(dt.UTC)).findings())


class _Examination:
    def __init__(
        self, config: PartyConfig, federation: FederationConfig, listen: str | None, now: dt.datetime
    ) -> None:
        self._config, self._federation, self._listen, self._now = config, federation, listen, now

    def findings(self) -> Iterator[Diagnosis]:
        yield self._look("settings", self._settings)
        yield self._look("ranks", self._ranks)
        yield self._look("certificate", self._certificate)
        yield self._look("clock", self._clock)
        yield self._look("roster", self._roster)
        yield self._look("placement", self._placement)
        yield self._look("trunk", self._trunk)
        yield self._look("shard", self._shard)
        yield self._look("starting weights", self._weights)
        yield self._look("provenance", self._provenance)
        yield self._look("training text", self._trained)
        yield self._look("held-out text", lambda: self._text(self._config.data.test))
        yield self._look("lot and noise", self._noise)
        yield self._look("ledger folder", self._ledger)
        yield self._look("own endpoint", self._own_endpoint)
        yield self._look("proxy", self._proxy)
        yield self._look("descriptors", self._descriptors)
        for name in (COORDINATOR, *self._federation.parties):
            if name != self._config.party:
                yield self._look(f"reach {name}", lambda name=name: self._reach(name))  # type: ignore[misc]

    def _look(self, check: str, look: Callable[[], Diagnosis | str]) -> Diagnosis:
        try:
            found = look()
        except CoterieError as error:
            return Diagnosis(check, "bad", error.message, error.fix or "", error.code)
        return found if isinstance(found, Diagnosis) else Diagnosis(check, "ok", found)

    def _settings(self) -> str:
        party_privacy(self._federation, self._config)
        check_devices(self._config, self._federation)
        check_compared(self._config, self._federation)
        return f"{self._config.party} of {self._federation.name}, exchange {self._federation.exchange}"

    def _ranks(self) -> str:
        config = self._config
        if config.ranks == 1:
            return "one process"
        if pick_device(config.device).type != "cpu":
            check_enough_gpus(config.ranks)
        if config.experts_over == 1:
            return f"{config.ranks} processes of this machine, each with whole layers"
        check_experts_over(config, self._model())
        return f"{config.ranks} processes of this machine, of which every {config.experts_over} hold all experts"

    def _kit(self) -> Kit:
        return load_kit(self._config.kit, now=self._now)

    def _certificate(self) -> Diagnosis | str:
        kit = self._kit()
        soon = kit.ends_soon(now=self._now)
        if soon:
            fix = "renew it (docs/how-to/identity.md, Renewing) and sign a new roster"
            return Diagnosis("certificate", "note", soon, fix, "identity-expires-soon")
        end, what = kit.first_to_end()
        return f"of this federation's CA; first to end is {what}, in {(end - self._now).days} days"

    def _clock(self) -> str:
        written = max(path.stat().st_mtime for path in (self._kit().folder, self._kit().roster_path) if path.exists())
        if dt.datetime.fromtimestamp(written, dt.UTC) > self._now + _CLOCK_SLACK:
            raise IdentityError(
                "The clock is behind the dates of the kit's own files.",
                code="clock-behind",
                why="certificates are refused outside their dates, and dates in logs would mislead",
                fix="set the clock",
            )
        return f"{self._now:%Y-%m-%d %H:%M} UTC, within the certificate's dates"

    def _identified(self) -> tuple[Kit, Roster]:
        kit, roster = identify(self._federation, self._config.kit, self._config.party, Role.PARTY)
        verify(roster, kit.authority)
        return kit, roster

    def _roster(self) -> str:
        _, roster = self._identified()
        return f"epoch {roster.membership_epoch}, {roster.content_hash()[:8]}, signed by all; federation.yaml fits"

    def _model(self) -> PreTrainedModel:
        return build_model(self._federation.model, meta=True)

    def _placed(self) -> Placement:
        return Placement.of_spec(self._federation.placement, list(self._federation.parties), self._model())

    def _placement(self) -> str:
        placement = self._placed()
        check_placement_signed(placement, self._identified()[1])
        return f"{placement.content_hash()[:8]}, as signed"

    def _trunk(self) -> str:
        shapes, stored = trunk_shapes(model := self._model()), stored_shapes(self._config.trunk)
        tied = model.all_tied_weights_keys
        weights = {name: shape for name, shape in stored.items() if not is_factor(name)}
        check_coordinates(len(weights) < len(stored), self._federation, self._config.trunk)
        held = {name: shape for name, shape in weights.items() if not (name in tied and tied[name] in weights)}
        other = {name for name in shapes.keys() & held.keys() if shapes[name][1] != held[name]}
        missing, unexpected = shapes.keys() - held.keys(), held.keys() - shapes.keys()
        check_keys(str(self._config.trunk), set(missing), set(unexpected), other, code="model-bad-trunk")
        return f"{self._config.trunk.name} has the {len(held)} tensors of this model's trunk"

    def _shard(self) -> str:
        placement = self._placed()
        check_shard(self._config.shard, placement, self._config.party)
        hosted = sum(len(experts) for experts in placement.hosted(self._config.party).values())
        return f"{self._config.shard.name} holds this party's {hosted} experts"

    def _weights(self) -> Diagnosis | str:
        roster = self._identified()[1]
        found = check_starting_weights(self._config, roster)
        if roster.weights:
            return found
        fix = "make the next roster with --weights DIR, the folder that `coterie split` wrote"
        return Diagnosis(
            "starting weights", "note", f"{found}; the roster does not name them", fix, "weights-unsigned"
        )

    def _provenance(self) -> str:
        config = self._config
        if party_privacy(self._federation, config) is None:
            return "not needed: this party trains without a budget"
        federation = self._federation
        found = artefacts(
            federation.model, config.data, config.trunk, config.shard, preconditioner=federation.preconditioner
        )
        return ", ".join(f"{each.kind} {each.origin}" for each in found)

    def _trained(self) -> Diagnosis | str:
        data, model = self._config.data, self._federation.model
        found = self._text(data.train)
        check_fit(self._model(), get_tokenizer(data.tokenizer, model, data), data)
        return found

    def _text(self, files: tuple[Path, ...]) -> Diagnosis | str:
        if not files:
            return Diagnosis("held-out text", "note", "none is named, so nothing is evaluated", "set `data.test`")
        documents = read_documents(files, self._config.data)
        return f"{len(documents)} documents in {len(files)} file{'s' if len(files) > 1 else ''}"

    def _noise(self) -> str:
        """What the set-up of a private party would refuse: a lot that is too large, agreed noise too small."""
        federation, data = self._federation, self._config.data
        spec = party_privacy(federation, self._config)
        if spec is None:
            return "not needed: this party trains without a budget"
        documents = read_documents(data.train, data, user_column=spec.user_column)
        records = tokenize(documents, data, get_tokenizer(data.tokenizer, federation.model, data))
        plan = party_plan(
            PrivacyInputs(
                spec, federation.train.rounds, agreed_noise=federation.noise_multiplier,
                momentum=federation.optim.added_momentum,
            ),
            self._model(),
        )  # fmt: skip
        units = PrivateData.of(records, users=documents.users, records_per_user=plan.records_per_user).units.count
        mechanism = plan.mechanism(plan.lots(units))
        agreed = ", as agreed" if federation.noise_multiplier is not None else ""
        return (
            f"{units} {spec.unit}s, about {plan.lot_size} in a round; noise multiplier "
            f"{mechanism.noise_multiplier:.4g}{agreed}, which keeps epsilon {spec.epsilon:g}"
        )

    def _ledger(self) -> str:
        spec = party_privacy(self._federation, self._config)
        root = (
            (spec.ledger if spec is not None else None) or self._config.ledger or default_root(self._config.run_dir)
        )
        root = root.expanduser()
        if spec is None:
            return f"{root}, not needed: this party trains without a budget"
        made = not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
            if made:
                root.rmdir()
        except OSError as error:
            raise LedgerError(
                f"The ledger's folder {root} cannot be written: {error.strerror}.",
                code="dp-ledger-home",
                why="what is spent on a text has to be remembered from one run to the next",
                fix="set COTERIE_HOME to a folder that stays and can be written, or name one with `ledger`",
            ) from None
        return f"{root} can be written"

    def _own_endpoint(self) -> str:
        endpoint = self._listen or self._federation.parties[self._config.party].endpoint
        if is_running(self._config.run_dir):
            return f"{endpoint}, in use by this party, which is running"
        unreachable.check_free(self._config.party, endpoint)
        return f"{endpoint} is free"

    def _proxy(self) -> Diagnosis | str:
        named = unreachable.proxies_named()
        if not named:
            return "the environment names none"
        found = f"{', '.join(named)} named in the environment; `coterie up` and this check dial members past it"
        return Diagnosis("proxy", "note", found, "if only the proxy leads to a member, have a direct route opened")

    def _descriptors(self) -> str:
        others = len(self._federation.parties) - 1
        soft, _ = newcomers.descriptors_allowed()
        reached = newcomers.check_descriptors(self._config.party, len(ALL_LANES) * others, 1)
        raised = f", raised to {reached} at start" if reached > soft else ""
        needed = newcomers.descriptors_needed(len(ALL_LANES) * others, 1)
        return (
            f"{soft} files and connections may be open{raised}; {needed} are needed, of which strangers "
            f"can take {2 * newcomers.NEWCOMERS} at most"
        )

    def _reach(self, name: str) -> Diagnosis | str:
        kit, roster = self._identified()
        error = unreachable.look_at(name, roster, kit.authority)
        endpoint = roster.entry(name).endpoint
        if error is None:
            return f"{endpoint} answers with the certificate that the roster lists"
        order = [COORDINATOR, *self._federation.parties]
        if error.code == "unreachable" and order.index(name) > order.index(self._config.party):
            return Diagnosis(f"reach {name}", "note", f"{endpoint} does not answer; it dials us, so it need not")
        raise error
