"""Crystal structure prediction: candidates, scores and pictures."""
