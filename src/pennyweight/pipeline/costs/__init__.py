"""Costs: the loss increase predicted for giving a group of sites a scheme, one file a way of measuring it."""
