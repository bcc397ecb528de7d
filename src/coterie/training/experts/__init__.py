"""A party's side of the exchange `experts`.

`coterie.training.experts.exchange` is what the actor is given; it joins `coterie.training.experts.host` (what is
stored for all) and `coterie.training.experts.owner` (fetch, compute, push), with
`coterie.training.experts.shared_trunk` and `coterie.training.experts.sum_bytes`. Where sums come from:
`coterie.training.experts.contribution`, `coterie.training.experts.private_sums`,
`coterie.training.experts.adapter_sums`, and `coterie.training.experts.gateway` where several ranks make them;
`coterie.training.experts.held_sums` is where they lie until they are pushed.
`coterie.training.experts.masked_push` hides each party's from hosts, on
the grid of `coterie.training.experts.push_grid`. `coterie.training.experts.constant_work` makes every round look the
same, `coterie.training.experts.public_loads` adds up the loads of all parties.
"""
