"""Models: the seam to Hugging Face, and what lets one model be in several places.

In reading order.

Experts, wherever they are: `coterie.models.seam` is the one function that transformers calls for every MoE layer;
`coterie.models.grouped` multiplies rows sorted by expert; `coterie.models.expert_math` is forward and backward in
closed form; `coterie.models.lora` and `coterie.models.adapted` are the same with low-rank factors.
`coterie.models.autograd` calls what torch leaves untyped.

Which models there are: `coterie.models.families` (the table and its refusals), `coterie.models.catalogue` (what the
installed transformers offers), `coterie.models.build` (a model from its settings), `coterie.models.tiny` (for
tests), `coterie.models.upcycle` and `coterie.models.bert_moe` (experts made from a dense model).

One checkpoint, many files: `coterie.models.placement` (who hosts what), `coterie.models.stream` (a checkpoint read
layer by layer), `coterie.models.splitter` and `coterie.models.exporter` (apart and together again),
`coterie.models.shards` (the files), `coterie.models.partial` (the model a party runs), `coterie.models.saved`,
`coterie.models.origins` and `coterie.models.trainings` (what a saved model says of itself).

A backward that never waits for the wire: `coterie.models.segments` cuts the graph, `coterie.models.pieces` runs
what was cut, `coterie.models.turn` lets one micro-batch compute at a time.

Layers lent to the device: `coterie.models.weight_cache` keeps them off it, `coterie.models.streaming` brings one.
"""
