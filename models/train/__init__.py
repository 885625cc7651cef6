"""How the bundled Glimmer models are made: data, tokenizer, training, export, evaluation, goldens.

Run `python -m models.train --help` from the repository root.
"""
