"""Attacks on a finished run: what each party could read from what it received, measured."""
