"""What `coterie demo` runs: text from the Python installation, a small public model, the arms, the report.

In reading order: `coterie.demonstration.demo` is the whole; `coterie.demonstration.plan` says what is compared,
`coterie.demonstration.corpus` makes the text, `coterie.demonstration.folder` the settings files and
`coterie.demonstration.readme` how to type it by hand; `coterie.demonstration.run` runs it all,
`coterie.demonstration.processes` as real processes, started by `coterie.demonstration.commands`, on Linux as forks of
`coterie.demonstration.preloaded`, `coterie.demonstration.screen` tells how far it is;
`coterie.demonstration.audited` attacks what the parties received;
`coterie.demonstration.results` reads what came out, `coterie.demonstration.verdict` says what it means,
`coterie.demonstration.tables`, `coterie.demonstration.plot` and `coterie.demonstration.report` show it.
"""
