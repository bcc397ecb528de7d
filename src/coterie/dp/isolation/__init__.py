"""Every record computed alone and added in integers, so that no record moves what another adds.

`coterie.dp.isolation.exact_engine` is the engine, `coterie.dp.isolation.lone_experts` its experts,
`coterie.dp.isolation.grid_sums` the sums on the noise's grid; `coterie.dp.isolation.model_state` sees whether the
model was changed meanwhile.
"""
