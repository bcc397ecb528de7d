"""A federation inside NVIDIA FLARE: its messages carry the members' own TLS connections, so that no port is opened.

In reading order: `coterie.flare.job` writes the job that `coterie export-nvflare` exports; `coterie.flare.local`
reads what a site itself says it runs, and refuses what a job may not bring; `coterie.flare.tunnel` carries TCP
connections through messages and knows nothing of FLARE; `coterie.flare.site` and `coterie.flare.hub` are FLARE's
executor and controller, in the version that `coterie.flare.supported` knows. What the hub carries is TLS between two
members: it sees who talks to whom, how much and when.
"""
