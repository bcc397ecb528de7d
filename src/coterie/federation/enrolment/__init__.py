"""How members come in: from an agreed federation.yaml to kits, a roster that all signed, and everybody's parts.

One party invites: it keeps the CA and the split model. `coterie.federation.enrolment.codes` are what it reads out by
telephone, and what both sides prove with them; `coterie.federation.enrolment.invitations` is what it remembers of
them. `coterie.federation.enrolment.desk` answers strangers who hold a code, and gives them a certificate;
`coterie.federation.enrolment.hand_out` answers members who have theirs, with parts and the roster.
`coterie.federation.enrolment.inviting` runs both; `coterie.federation.enrolment.joining` is the other side, with
`coterie.federation.enrolment.asking` for what crosses and `coterie.federation.enrolment.fetching` for files.
"""
