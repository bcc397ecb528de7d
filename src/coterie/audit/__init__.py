"""Attacks on a finished run: what each party could read from what it received, measured.

`coterie.audit.adversaries` says who attacks, `coterie.audit.metrics` what a figure means and how far it carries.
"""
