"""Text becomes sequences.

`coterie.training.data.documents` reads what settings name, `coterie.training.data.readers` each kind of file;
`coterie.training.data.tokenizer` makes or loads one; `coterie.training.data.packing` cuts sequences and says which of
them a round takes.
"""
