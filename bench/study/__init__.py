"""Study behind the claim: reconstruction followed by contrastive training, against contrastive training alone."""
