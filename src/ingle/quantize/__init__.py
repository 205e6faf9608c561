"""`ingle quantize`: a model's folder of floats to one of codes, which other engines read too."""
