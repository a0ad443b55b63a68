"""The cache: one step of one layer, and the face users see."""
