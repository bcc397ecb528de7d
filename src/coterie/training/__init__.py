"""Training: data, one party alone, one party in a federation, and what it will need.

It joins `coterie.dp` and `coterie.federation`, which know nothing of each other.

A round: `coterie.training.loop`, with `coterie.training.optim`, `coterie.training.seeds`, `coterie.training.evaluate`
and `coterie.training.metrics`, of which `coterie.training.public_figures` may leave the machine, to
`coterie.training.trackers`. `coterie.training.provenance` says where model and text come from,
`coterie.training.folders` keeps what is for people apart from what is for the owner, `coterie.training.purging`
removes text.

Then, in reading order: `coterie.training.data` (text becomes sequences), `coterie.training.single` (one party alone),
`coterie.training.party` (one party in a federation), `coterie.training.tokens` and `coterie.training.experts` (its
side of the two exchanges), `coterie.training.tasks` (questions to what was trained), `coterie.training.planning`
(what it will need).
"""
