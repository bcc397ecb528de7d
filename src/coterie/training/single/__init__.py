"""One party alone: `coterie train`.

`coterie.training.single.run` is the whole run. `coterie.training.single.prepared` reads what it works with,
`coterie.training.single.setup` puts model and tokenizer together,
`coterie.training.single.preconditioned` finds coordinates for it on public text,
`coterie.training.single.previewed` says what a private one will cost,
`coterie.training.single.auto_lot` chooses its lot,
`coterie.training.single.calibrated` measures what a round takes on this machine; `coterie.training.single.stepper`
does the rounds, `coterie.training.single.private_stepper` those within a privacy budget.
`coterie.training.single.result` writes what a run ends with.
`coterie.training.single.tune` tries settings within one budget. `coterie.training.single.trained` is a run's model
afterwards, `coterie.training.single.generate` lets it continue a prompt, and `coterie.training.single.predict` says
the class of texts.
"""
