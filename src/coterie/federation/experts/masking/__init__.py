"""Masked pushes: what a host receives of one party looks uniformly random, and only the sum over all is readable.

`coterie.federation.experts.masking.grid` says which integers are masked and how many bytes one takes,
`coterie.federation.experts.masking.session` how the parties agree on keys that last one push,
`coterie.federation.experts.masking.streams` adds the masks, and `coterie.federation.experts.masking.board` carries
the agreement over the wire.
"""
