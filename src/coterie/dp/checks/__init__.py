"""What is looked at before the first lot, and while a run goes.

`coterie.dp.checks.records` and `coterie.dp.checks.dry_step` are the first looks. `coterie.dp.checks.self_check`
compares the engine with plain autograd, one record at a time: `coterie.dp.checks.made_up` makes the records,
`coterie.dp.checks.draws` fixes chance, `coterie.dp.checks.batches_of_one` runs both sides,
`coterie.dp.checks.comparison` compares; `coterie.dp.checks.between_ranks` does so where several ranks compute
together. `coterie.dp.checks.watched` sees what moves that nobody said would.
"""
