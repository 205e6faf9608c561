"""What a model takes and which machine carries it, from its configuration and the headers of its files alone."""
