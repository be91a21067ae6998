"""Stages 3 to 7 of 9: files → volumes → targets at one instant → readable images and change maps."""
