"""Who is who: keys, certificates and the list that all sign.

`coterie.federation.identity.certificates` makes keys and the private CA, `coterie.federation.identity.kit` is a
member's folder, `coterie.federation.identity.roster` the signed list, `coterie.federation.identity.provision` all of
it at one administrator's.
"""
