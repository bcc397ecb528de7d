"""What a person reads: `coterie.audit.report.findings_page` is the page of an audit.

`coterie.audit.report.shareable` makes the edition that may be passed on, without figures over the owner's text.
`coterie.audit.report.training_page` is the page of a run, `coterie.audit.report.live_page` that of runs as they go.
"""
