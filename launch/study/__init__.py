"""The study that the claim rests on: reconstruction first, then contrastive, against contrastive alone.

``python -m launch.study launch/recipes/study/cpu.yaml`` runs it with the project's own commands, one small JSON per
finished cell; started again it goes on with what is missing.
"""
