"""Choosers of static ranges: the histogram of an edge and its scheme -> scale and zero point."""
