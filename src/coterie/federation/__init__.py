"""What several organisations do together: identities, the wire, rounds, and both ends of the two exchanges.

gRPC reads its environment once, when it is first imported; so it is set here. In reading order.

Who is who: `coterie.federation.identity` (keys, certificates, the private CA), `coterie.federation.kit` (a member's
folder), `coterie.federation.roster` (the list that all sign), `coterie.federation.provision` (all of it from one
hand).

The wire: `coterie.federation.transport` is the interface and its rules. `coterie.federation.frame` is the bytes of a
message, `coterie.federation.messages` all that may be said, `coterie.federation.gate` what does not fit,
`coterie.federation.values` whether numbers can be computed with; `coterie.federation.recording` keeps what arrives
for an audit, in a `coterie.federation.frame_log`. `coterie.federation.switchboard` is what both transports share,
with `coterie.federation.line` (a peer on a lane) and `coterie.federation.pending` (open requests).
`coterie.federation.inprocess` is the one for tests. `coterie.federation.grpc_transport` is the real one, with
`coterie.federation.grpc_link`, `coterie.federation.handshake`, `coterie.federation.newcomers`,
`coterie.federation.pace`, `coterie.federation.reach` and `coterie.federation.seldom`.

Rounds: `coterie.federation.round_state` (what a round is made of), `coterie.federation.rounds` (what the
coordinator decides), `coterie.federation.standing` (what a party does about it): plain functions. Around them
`coterie.federation.coordinator`, `coterie.federation.journal`, `coterie.federation.coordinator_process` on one
side, `coterie.federation.participant` and `coterie.federation.membership` on the other;
`coterie.federation.control` is what they say, `coterie.federation.failures` what all are told when a run failed,
`coterie.federation.own_time` a clock for judging others, `coterie.federation.run_folder`
(and `coterie.federation.files`, an old name of `coterie.storage.write_whole`) what lies on disk.

The exchange `tokens`: `coterie.federation.tokens` is the owner, `coterie.federation.host` the host, with
`coterie.federation.expert_work` (its arithmetic), `coterie.federation.staging` and `coterie.federation.shard`.

The exchange `experts`: `coterie.federation.parts` is what crosses, `coterie.federation.attempt` when. The host is
`coterie.federation.pool`, with `coterie.federation.serve_weights` (down), `coterie.federation.take_sums` (up) and
`coterie.federation.home` (a shared trunk's place); the owner is `coterie.federation.owner`, with
`coterie.federation.fetch_weights` and `coterie.federation.push_sums`.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a refused handshake is reported in our words, once
# TLS 1.3 alone. gRPC has no setting for the version; this one names the suites of TLS 1.2 and leaves 1.3 as it is.
# One that needs an RSA certificate can never be agreed on with our P-256 certificates, on either side.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"
