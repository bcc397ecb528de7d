"""One party in a federation: `coterie up`.

`coterie.training.party.process` is the process, `coterie.training.party.inputs` what it starts from,
`coterie.training.party.run` the run over any transport, `coterie.training.party.actor` what it does in each phase of
a round by the exchange that it is given, `coterie.training.party.helping` what the other ranks of a party do,
`coterie.training.party.own_trunk` what it trains by itself, `coterie.training.party.store` its checkpoints,
`coterie.training.party.whole_model` the model that it ends with.
`coterie.training.party.in_process` has all parties in one process,
`coterie.training.party.doctor` looks before anybody starts, `coterie.training.party.agreed_limits` says what a member
may send, `coterie.training.party.after_private` keeps private text out of `tokens`, and
`coterie.training.party.questions` says what a finished federation may be asked;
`coterie.training.party.planned_time` says what a round will take, `coterie.training.party.planned_ranks` what each
rank of a party holds. Where all agreed to a transcript,
`coterie.training.party.recordings` keeps it and `coterie.training.party.answer_key` notes which text was sent,
`coterie.training.party.own_masks` what was added to a masked push.
"""
