"""Questions with choices, asked of a trained model by EleutherAI's lm-eval, without a hub.

In reading order: `coterie.training.tasks.questions` reads the files of the commonsense sets; the YAML files beside it
tell lm-eval what a task asks; `coterie.training.tasks.harness` runs it and says whether the answers are better than
guessing.
"""
