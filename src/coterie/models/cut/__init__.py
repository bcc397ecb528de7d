"""A backward that never waits for the wire.

`coterie.models.cut.cut_model` cuts the autograd graph at every MoE layer, `coterie.models.cut.graph` runs what was
cut, piece by piece, and `coterie.models.cut.device_lock` lets one micro-batch compute at a time.
"""
