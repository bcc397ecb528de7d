"""What a run will need and cost, before it starts: `coterie plan`.

`coterie.training.planning.plan` puts it together, from `coterie.training.planning.closed_form` (memory by formula)
and `coterie.training.planning.measured` (memory as it was; `coterie.training.planning.allocations` at its peak).
`coterie.training.planning.forecast` says what a private
run will spend, `coterie.training.planning.exposure` what others can read where nothing is promised, and up to which
sizes, `coterie.training.planning.pooled_noise` what noise of several parties is worth,
`coterie.training.planning.record_time` measures a record's time, `coterie.training.planning.round_time` puts a
federation's round together, `coterie.training.planning.equal_rates` proposes
lots that need the same noise at every party, `coterie.training.planning.outside`
counts a model that cannot be trained here, `coterie.training.planning.full_or_lora` sets
full training beside adapters, `coterie.training.planning.noise_bands` says what noise in bands
would leave, and `coterie.training.planning.ways` whether one device, records over several or experts over several
suits a run, by what `coterie.training.planning.rank_memory` says that a rank holds, and
`coterie.training.planning.party_memory` that one of a party in a federation does.
"""
