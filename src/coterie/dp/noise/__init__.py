"""Noise: exact Gaussians on a grid, from a source that no attacker can guess.

`coterie.dp.noise.randomness` is where chance comes from, `coterie.dp.noise.discrete_gaussian` the sampler with
`coterie.dp.noise.noise_kernel` as its compiled pass; `coterie.dp.noise.lot_noise` says how much each released part of
a lot gets, and `coterie.dp.noise.joint_noise` that all of it is one Gaussian for the accountant.
Where several parties' noise lies in every sum, `coterie.dp.noise.pooled` says how much each adds. Where rounds take
back earlier rounds' noise, `coterie.dp.noise.bands` says how, and `coterie.dp.noise.past_noise` does it.
"""
