"""Attack one's own run: what could others read from what they received, and what does the trained model give away?

In reading order: `coterie.audit.adversaries` says who attacks, `coterie.audit.metrics` what a figure means and how
far it carries, `coterie.audit.matching` which guess stands for which record; `coterie.audit.transcript` reads what a
party recorded of what others sent to it, `coterie.audit.fitting` refuses what could not have crossed,
`coterie.audit.answers` is the owner's own key to it, and `coterie.audit.evidence` joins everything that an audit of
one owner rests on. Attacks read transcripts, the public starting checkpoint and public text; answers are for scoring.
`coterie.audit.model` attacks the trained model, and prepares runs for that.

`coterie.audit.prior` is what the public model guesses without receiving anything, `coterie.audit.tokens` attacks the
exchange of hidden vectors, and `coterie.audit.experts` what an owner pushes in the other exchange.
`coterie.audit.epsilon` holds a run's privacy claim against the code that makes it.

`coterie.audit.run` puts `coterie.audit.pieces` in order. `coterie.audit.findings` holds what came out,
`coterie.audit.figures` the few figures that stand for it, `coterie.audit.verdicts` what it amounts to,
`coterie.audit.identified` what was run, and `coterie.audit.report` shows it.
"""
