"""Judging: everything that turns a trajectory into a teacher's opinion of each token."""
