"""The earlier place of `coterie.storage.write_whole`."""

from coterie.storage import write_whole as write_whole
