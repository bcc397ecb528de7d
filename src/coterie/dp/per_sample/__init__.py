"""Norms and sums of every record's gradient, from operations to sums, without a gradient of each.

`coterie.dp.per_sample.functional` is what people call. `coterie.dp.per_sample.engine` adds up, into
`coterie.dp.per_sample.gradient_sums`: `coterie.dp.per_sample.gradient_groups` says what is clipped together,
`coterie.dp.per_sample.memory_choice` in how many backwards (`coterie.dp.per_sample.book_keeping` or
`coterie.dp.per_sample.ghost_clipping`), `coterie.dp.per_sample.shared_batch` whose records a parameter sees where
experts are on several ranks, and `coterie.dp.per_sample.captured_pass` runs one of them. In it
`coterie.dp.per_sample.capture` sees every use of a parameter, `coterie.dp.per_sample.weight_expressions` follows
values that are computed from parameters alone, `coterie.dp.per_sample.probe` and `coterie.dp.per_sample.sites` know
where the records lie. A use is handled by a rule: `coterie.dp.per_sample.rules`, then
`coterie.dp.per_sample.rules_matrix`, `coterie.dp.per_sample.rules_elementwise`,
`coterie.dp.per_sample.rules_convolution` and `coterie.dp.per_sample.replays`. A rule makes a term:
`coterie.dp.per_sample.terms`, `coterie.dp.per_sample.stacked_terms` for stacked experts,
`coterie.dp.per_sample.combine_uses` where one parameter is used several times. Norms without cancellation:
`coterie.dp.per_sample.gram`, `coterie.dp.per_sample.gram_kernel`, `coterie.dp.per_sample.scaling`,
`coterie.dp.per_sample.precision`, `coterie.dp.per_sample.products`. Experts:
`coterie.dp.per_sample.private_experts` behind the seam,
`coterie.dp.per_sample.switch_experts` for Switch Transformers. `coterie.dp.per_sample.guard` keeps the arithmetic
from being changed meanwhile.
"""
