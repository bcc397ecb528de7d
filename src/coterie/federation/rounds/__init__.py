"""A round is a transaction.

`coterie.federation.rounds.settings` is what federation.yaml says of it,
`coterie.federation.rounds.state` what a round is made of, `coterie.federation.rounds.attempt` which try of it a
number belongs to; `coterie.federation.rounds.coordinator_rules` is what the coordinator decides and
`coterie.federation.rounds.party_rules` what a party does about it, as plain functions. Around them
`coterie.federation.rounds.coordinator`, `coterie.federation.rounds.journal` and
`coterie.federation.rounds.coordinator_process` on one side, `coterie.federation.rounds.follower` and
`coterie.federation.rounds.heartbeat` on the other. `coterie.federation.rounds.directives` are their messages,
`coterie.federation.rounds.failures` what all are told when a run failed, `coterie.federation.rounds.run_folder` what
lies on disk.
"""
