"""The exchange `experts`: whole experts travel to the data, and sums travel back.

`coterie.federation.experts.parts` is what crosses. The host is `coterie.federation.experts.host`, with
`coterie.federation.experts.serve_weights` (down; experts that nobody trains from
`coterie.federation.experts.frozen_shard`), `coterie.federation.experts.take_sums` (up) and
`coterie.federation.experts.shared_trunk` (a trunk's place among the parties); the owner is
`coterie.federation.experts.owner`, with `coterie.federation.experts.fetch_weights` and
`coterie.federation.experts.push_sums`. With `coterie.federation.experts.masking` hosts see only the sum of all.
"""
