"""What can be read from the sums that an owner pushes in the exchange `experts`.

In reading order. `coterie.audit.experts.pushes` puts a transcript's messages together into the sums that an adversary
opens (`coterie.audit.experts.masked`: where pushes were masked, of everybody who is not among those that work
together), `coterie.audit.experts.opened` says what the spectrum of one holds. `coterie.audit.experts.reader` is the
model as the adversary has it, looked at through the seam; `coterie.audit.experts.simulate` makes pushes of public
text.

Without a budget: `coterie.audit.experts.judge` learns how far spectra speak for a token,
`coterie.audit.experts.span` ranks next tokens by it (`coterie.audit.experts.drift`: where a private trunk has moved),
`coterie.audit.experts.records` reads whole records with nothing given, and `coterie.audit.experts.bag` reads which
tokens a push holds from the sums of embedding and head.

With and without: `coterie.audit.experts.membership` holds a known record against sums,
`coterie.audit.experts.bayes` one unknown token of it, and `coterie.audit.experts.clipped` says how far a record's
gradient is scaled down.

`coterie.audit.experts.case` is what one run gives to all of them; `coterie.audit.experts.plain` and
`coterie.audit.experts.noised` measure them on it, `coterie.audit.experts.loads` what a host learns without the model,
and `coterie.audit.experts.attack` does so in the time allowed.
"""
