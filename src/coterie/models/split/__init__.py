"""One checkpoint, many files: taken apart for the parties and put together again, bit by bit.

`coterie.models.split.placement` says who hosts what. `coterie.models.split.read_checkpoint` reads a checkpoint layer
by layer; `coterie.models.split.splitter` writes one trunk and a shard for each party (`coterie.models.split.shards`
is their format) and `coterie.models.split.exporter` makes a checkpoint of them again. `coterie.models.split.partial`
is the model that a party runs. `coterie.models.split.saved`, `coterie.models.split.origins`,
`coterie.models.split.adapted` and `coterie.models.split.trainings` are what a saved model says of itself: where its
weights lie, where they come from, adapters beside them, and the runs that trained it. `coterie.models.split.card`
says it in words, and `coterie.models.split.pushing` takes an export to a hub.
"""
