"""The benchmark: grids of cells, a store that computes nothing twice, tables beside the papers' numbers."""
