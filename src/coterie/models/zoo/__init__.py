"""Which models there are, and how they are made.

`coterie.models.zoo.families` is the table of Hugging Face families with what each can do and why others are refused;
`coterie.models.zoo.catalogue` asks the installed transformers what it offers; `coterie.models.zoo.build` makes a
model from its settings. `coterie.models.zoo.presets` knows the dimensions of published ones.
`coterie.models.zoo.tiny` makes small ones for tests. `coterie.models.zoo.upcycle` makes
experts from a dense model, `coterie.models.zoo.bert_moe` is what becomes of an encoder.
"""
