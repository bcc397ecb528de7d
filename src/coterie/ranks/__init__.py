"""Several processes that are one party: the ranks of a run.

`coterie.ranks.world` says whether this process was started as one of several, and refuses to run as if it were alone;
it counts the GPUs of the machine, too.
`coterie.ranks.ranks` is what ranks do together, the same for one process and for several; `coterie.ranks.processes`
does it over torch.distributed, by the ways that `coterie.ranks.ways` knows for tensors in host memory and on GPUs,
and `coterie.ranks.pulse` tells a rank that is busy from one that is gone. Tensors and JSON cross, nothing else.
"""
