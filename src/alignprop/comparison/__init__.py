"""Methods compared at equal budget: every method and seed an ordinary run, the statistics over seeds, one page."""
