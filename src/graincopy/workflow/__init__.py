"""The nine stages in order: backup, restore, expire, reap; each readable on one page."""
