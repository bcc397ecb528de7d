"""Messages between members, and what can go wrong with them.

`coterie.federation.wire.transport` is the interface and its rules. `coterie.federation.wire.frame` is the bytes of a
message, `coterie.federation.wire.messages` all that may be said, `coterie.federation.wire.gate` what does not fit,
`coterie.federation.wire.values` whether numbers can be computed with. `coterie.federation.wire.base_transport` is
what both transports share, with `coterie.federation.wire.peer_lane` (one peer on one lane) and
`coterie.federation.wire.pending` (open requests); `coterie.federation.wire.replies` waits for several peers.
`coterie.federation.wire.in_process` is the transport for tests.
`coterie.federation.wire.grpc_transport` is the real one, with `coterie.federation.wire.grpc_connection`,
`coterie.federation.wire.handshake`, `coterie.federation.wire.newcomers`, `coterie.federation.wire.pace`,
`coterie.federation.wire.unreachable`, `coterie.federation.wire.seldom` (what is logged once) and
`coterie.federation.wire.own_time` (a clock for judging others). `coterie.federation.wire.frame_log` keeps messages on
disk and `coterie.federation.wire.recording` decides which, where all agreed to a transcript.
"""
