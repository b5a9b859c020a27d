"""Which texts say the same: normal forms, hashes of word n-grams, MinHash, and evaluation sets to compare with."""
