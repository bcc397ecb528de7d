"""Attacks on the exchange `tokens`: what hosts read in hidden vectors, returned gradients and chosen experts.

In reading order. What an attacker prepares is `coterie.audit.tokens.known`: public text through the public model
(`coterie.audit.tokens.views`), and readers of a token from a vector (`coterie.audit.tokens.decoders`). What it
received is `coterie.audit.tokens.rows`. Then `coterie.audit.tokens.link` puts rows beside each other again,
`coterie.audit.tokens.routes` looks at expert ids alone, `coterie.audit.tokens.search` rebuilds records word by word,
and `coterie.audit.tokens.sizes` sees the size of messages only. `coterie.audit.tokens.attack` does it all, and
`coterie.audit.tokens.scored` compares it with the truth; `coterie.audit.tokens.controls` are attacks whose outcome is
known.
"""
