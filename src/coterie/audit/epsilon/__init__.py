"""Epsilon from below: is a privacy claim kept by the code that makes it?

`coterie.audit.epsilon.run` asks it of a run that `coterie.audit.epsilon.subject` makes anew from its settings and
`coterie.audit.epsilon.rehearsal` takes through rounds that leave no trace. `coterie.audit.epsilon.premises` measures
what the accounting takes for granted: noise by the law of `coterie.audit.epsilon.laws`, lots, contributions, with the
statistics of `coterie.audit.epsilon.checks`. `coterie.audit.epsilon.one_run` puts in canaries
(`coterie.audit.epsilon.canaries`) by coin flips and tells them apart (`coterie.audit.epsilon.shares`);
`coterie.audit.epsilon.bounds` turns right guesses into lower bounds on epsilon. `coterie.audit.epsilon.allowed` says
what a claim allows a membership test, `coterie.audit.epsilon.findings` holds all of it.
"""
