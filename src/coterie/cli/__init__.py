"""The command line: one module a command, and what they show.

`coterie.cli.app` is the table of commands; each is loaded when it is used, so that `--help` answers without torch.
Only bodies of commands import what is heavy. In reading order.

One party: `coterie.cli.data`, `coterie.cli.precondition`, `coterie.cli.train`, `coterie.cli.tune`,
`coterie.cli.report`, `coterie.cli.resume`,
`coterie.cli.eval`, `coterie.cli.predict`, `coterie.cli.generate`, `coterie.cli.purge`; on several devices by
`coterie.cli.ranks`, through a federation by `coterie.cli.live`.

Models: `coterie.cli.models`, `coterie.cli.upcycle`, `coterie.cli.split`, `coterie.cli.export`.

Keys and the roster: `coterie.cli.invite` and `coterie.cli.join`, with
`coterie.cli.party_file`; by hand `coterie.cli.provision`, or
`coterie.cli.request`, `coterie.cli.approve`, `coterie.cli.install`; `coterie.cli.roster`.

A federation: `coterie.cli.plan`, `coterie.cli.doctor`, `coterie.cli.coordinator`, `coterie.cli.up`,
`coterie.cli.status`, `coterie.cli.dashboard`; inside FLARE, `coterie.cli.export_nvflare`.

What was spent, what leaked, and what an error means: `coterie.cli.ledger`, `coterie.cli.audit`,
`coterie.cli.explain`. All of it at once:
`coterie.cli.demo`.

Shown and ended: `coterie.cli.output` prints, `coterie.cli.streams` never reaches into the work,
`coterie.cli.timed_screen`, `coterie.cli.training_progress`, `coterie.cli.rounds_progress` and
`coterie.cli.privacy_lines` say how far it is, `coterie.cli.stopping` ends on request; `coterie.cli.pairs` reads
options that say NAME=VALUE.
"""
