"""Training: data, one party alone, one party in a federation, and what it will need.

It joins `coterie.dp` and `coterie.federation`, which know nothing of each other. In reading order.

A round: `coterie.training.loop`, with `coterie.training.optim`, `coterie.training.seeds`,
`coterie.training.evaluate` and `coterie.training.metrics`.

Text becomes sequences: `coterie.training.data` and `coterie.training.readers`, `coterie.training.tokenizer`,
`coterie.training.packing`.

One party: `coterie.training.run` is `coterie train`. `coterie.training.prepared` reads what it works with
(`coterie.training.setup` puts model and tokenizer together, `coterie.training.provenance` says where they are from);
`coterie.training.stepper` does the rounds, `coterie.training.private_stepper` those within a privacy budget.
`coterie.training.trained` is a run's model afterwards, `coterie.training.generate` lets it continue a prompt.
`coterie.training.folders` keeps what is for people apart from what is for the owner, `coterie.training.purging`
removes text.

One party in a federation: `coterie.training.party` is the process, `coterie.training.party_parts` its inputs,
`coterie.training.party_run` the run over any transport, `coterie.training.party_actor` what it does in each phase of
a round, by the exchange that it is given, `coterie.training.own_trunk` what it trains by itself,
`coterie.training.party_store` its checkpoints. `coterie.training.in_process` has all parties in one
process, `coterie.training.doctor` looks before anybody starts, `coterie.training.agreed_limits` says what a member
may send, and `coterie.training.after_private` keeps private text out of `tokens`. Where an audit was agreed on,
`coterie.training.recordings` keeps what arrives, and `coterie.training.answer_key` what was sent.

The exchange `tokens`: `coterie.training.tokens_exchange`, with `coterie.training.scheduler` for micro-batches in
flight and `coterie.training.ordered_sums` for sums that do not depend on who came first.

The exchange `experts`: `coterie.training.experts_exchange` joins `coterie.training.experts_host` (what is stored for
all) and `coterie.training.experts_owner` (fetch, compute, push), with `coterie.training.shared_trunk` and
`coterie.training.sum_bytes`. Where the sums come from: `coterie.training.contribution`,
`coterie.training.private_sums`, `coterie.training.adapter_sums`; `coterie.training.constant_work` makes every
round look the same, `coterie.training.load_home` adds up the loads of all parties.

Planning: `coterie.training.plan`, by `coterie.training.device_memory` in closed form and `coterie.training.memory`
as measured.
"""
