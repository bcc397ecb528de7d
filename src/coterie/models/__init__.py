"""Models: the seam to Hugging Face, and what lets one model be in several places.

Experts, wherever they are: `coterie.models.seam` is the one function that transformers calls for every MoE layer;
`coterie.models.grouped` multiplies rows sorted by expert; `coterie.models.expert_math` is forward and backward in
closed form; `coterie.models.lora` is the same with low-rank factors; `coterie.models.sizes` refuses a model whose
tokens would not find them. `coterie.models.autograd` calls what torch
leaves untyped, `coterie.models.tensors` tells the bytes of a tensor and the dtype of a product,
`coterie.models.shares` which experts each of several ranks has. `coterie.models.narrow` is frozen weights in fewer
bytes than they are computed with, `coterie.models.widened` the room for one of them at a time.
`coterie.models.preconditioner` stores weights in other coordinates, `coterie.models.second_moments` finds these.

Then five folders: `coterie.models.zoo` (which models, and how they are made), `coterie.models.split` (one checkpoint,
many files), `coterie.models.cut` (a backward that never waits for the wire), `coterie.models.streaming` (layers lent
to the device), `coterie.models.spread` (experts on several ranks of one party).
"""
