"""coterie trains Mixture-of-Experts language models on private text, alone or together.

Importing this package does not load torch: submodules do, when they are imported.

From the bottom: `coterie.errors`, `coterie.storage`, `coterie.pages`, `coterie.config`, `coterie.models`,
`coterie.checkpoints`, then `coterie.dp` (privacy) and `coterie.federation` (several organisations) side by side,
`coterie.training` which joins them, `coterie.hf`, `coterie.audit`, `coterie.demonstration`, `coterie.cli`. Each
package's docstring names its modules in reading order.
"""

__version__ = "0.1.0"
