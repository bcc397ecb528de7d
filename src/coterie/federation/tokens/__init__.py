"""The exchange `tokens`: hidden vectors travel to the experts.

`coterie.federation.tokens.owner` dispatches and combines; `coterie.federation.tokens.host` answers, with
`coterie.federation.tokens.host_math` (its arithmetic) and `coterie.federation.tokens.staging` (what waits for a
commit).
"""
