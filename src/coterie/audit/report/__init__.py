"""Pages of an audit and of a run: `coterie.audit.report.findings_page` and `coterie.audit.report.training_page`.

`coterie.audit.report.shareable` makes the edition of an audit that may be passed on.
"""
