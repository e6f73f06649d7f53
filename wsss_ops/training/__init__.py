"""Training and evaluation of weakly supervised segmentation systems on image-level labels."""
