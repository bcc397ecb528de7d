"""Layers lent to the device, one at a time.

`coterie.models.streaming.cache` keeps weights off the device; `coterie.models.streaming.streamer` brings a layer's
and takes them away, `coterie.models.streaming.beside_adapters` lends a whole model's own to its adapters.
`coterie.models.streaming.heap` gives freed memory back to the system.
"""
