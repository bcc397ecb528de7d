"""A party's side of the exchange `tokens`.

`coterie.training.tokens.exchange` is what the actor is given, `coterie.training.tokens.micro_batches` keeps several
in flight, `coterie.training.tokens.ordered_sums` adds up without regard to who came first.
"""
