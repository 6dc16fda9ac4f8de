"""How good a finished demo model is: films of faces and voices that were kept for tests, against the truth."""
