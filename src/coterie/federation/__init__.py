"""What several organisations do together: identities, the wire, rounds, and both ends of the two exchanges.

gRPC reads its environment once, when it is first imported; so it is set here.

In reading order: `coterie.federation.identity` (who is who), `coterie.federation.wire` (messages),
`coterie.federation.enrolment` (how members come in), `coterie.federation.rounds` (a round as a transaction), then the
two exchanges `coterie.federation.tokens` and `coterie.federation.experts`. `coterie.federation.shard` is what a party
hosts for all: weights, their optimiser, their part of a checkpoint; `coterie.federation.cancel` tells whoever
computes or waits that it counts no more.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a refused handshake is reported in our words, once
# TLS 1.3 alone. gRPC has no setting for the version; this one names the suites of TLS 1.2 and leaves 1.3 as it is.
# One that needs an RSA certificate can never be agreed on with our P-256 certificates, on either side.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"
