"""Experts spread over ranks: the layers' experts lie on different devices of one party, and tokens travel to them.

`coterie.models.spread.cuts` says which part of which parameter a rank holds, whatever the number of ranks;
`coterie.models.spread.spread` cuts a model so, and `coterie.models.spread.loaded` reads one without ever holding the
whole; `coterie.models.spread.travel` brings rows to the experts that they chose and back, the same for one rank and
for several; `coterie.models.spread.whole_layers` instead brings a layer's weights to the rows;
`coterie.models.spread.unison` computes the same without either, to compare.
`coterie.models.spread.beside` makes a spread model over the trunk of one whose experts are lent.
`coterie.models.spread.holdings` names parts in files, `coterie.models.spread.gathered` writes the whole model.
"""
