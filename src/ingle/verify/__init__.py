"""`ingle verify`: does the engine compute what the model's makers meant? Proof by comparison with transformers."""
