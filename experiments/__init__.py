"""The small-scale reproduction: UniAlignment on the shapes world, from scratch, on a laptop."""
