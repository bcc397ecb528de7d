"""What a federation will need, before it starts: `coterie plan`.

`coterie.training.planning.plan` puts it together, from `coterie.training.planning.closed_form` (memory by formula)
and `coterie.training.planning.measured` (memory as it was). `coterie.training.planning.exposure` says what others can
read where nothing is promised, and up to which sizes.
"""
