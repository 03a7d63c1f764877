"""Plans: which scheme each site gets."""
