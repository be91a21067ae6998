"""After stage 9: restore points as readable images."""
