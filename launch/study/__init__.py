"""Study behind the claim: reconstruction first, then contrastive, against contrastive alone.

``python -m launch.study launch/recipes/study/cpu.yaml`` runs it with the project's own commands and writes one small
JSON per finished cell. Started again, it runs what is missing.
"""
