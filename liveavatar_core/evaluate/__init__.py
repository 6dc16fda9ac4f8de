"""How good a video is, in numbers: measured on frames and sound alone, whatever made them."""
