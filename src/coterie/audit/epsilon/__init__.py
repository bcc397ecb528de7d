"""Epsilon from below: is a privacy claim kept by the code that makes it?

`coterie.audit.epsilon.allowed` says what a claim allows a membership test. `coterie.audit.epsilon.bounds` turns right
guesses about canaries into lower bounds on epsilon.
"""
